"""What diversity costs: every re-ranker over a grid of trade-offs, relevance against diversity.

    python benchmarks/frontier.py --ml-100k PATH/ml-100k --seeds 3 --out results

OUT/frontier.json, OUT/frontier.md and OUT/frontier.png are written.

MovieLens 100K: the cascade of `recfast run` is trained on the first 80 % of the log; each user's 100 best candidates,
the training and validation items left out, are re-ranked, and the lists are measured against the likes of the last
10 %. Generated data: 1,200 items in 150 clusters of near-duplicates, and a ranker that errs by the cluster: it takes
all items of a cluster for better, or worse, than they are.

A method sees either the genres or the embeddings of items, and is measured by both: a method that is scored by what it
optimises says nothing. Trade-offs of two methods are no common scale, so methods are compared where they have lost the
same share of NDCG@10, by interpolation between the trade-offs of the grid. Errors are of a bootstrap over users that
draws the same users for all methods.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recfast import Pipeline, cascade, data, metrics, models, rerank, train
from recfast.data import Jagged
from recfast.files import atomic_path, write_json, write_text

RESULTS, TABLE, PLOT = "frontier.json", "frontier.md", "frontier.png"
CANDIDATES, CUTS = 100, (10, 20)
GRID = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
LOSSES = (0.02, 0.05, 0.1)
REPLICATES = 1000
# What is measured of each user's list, and of all lists together.
BY_USER = ("ndcg", "recall", "ild_genres", "ild_vectors", "alpha_ndcg", "err_ia", "s_recall")
OF_ALL = ("coverage", "gini")


@dataclass
class Problem:
    """Candidates of users, and what their lists are measured by.

    candidates
        int64 [U, N], item ids in the ranker's order, -1 where a user has fewer.
    relevant
        The items that each user turned out to like.
    genres, vectors
        float32 [rows, .] by item id; row 0 is no item.
    history
        [U, G], how often each genre occurs in the user's history.
    """

    name: str
    candidates: np.ndarray
    relevant: Jagged
    genres: np.ndarray
    vectors: np.ndarray
    history: np.ndarray

    @cached_property
    def propensity(self) -> np.ndarray:
        return rerank.entropy_propensity(self.history)

    @cached_property
    def preferences(self) -> np.ndarray:
        """Each user's share of each genre; uniform where there is no history."""
        total = self.history.sum(1, keepdims=True)
        return np.where(total > 0, self.history / np.maximum(total, 1), 1 / self.history.shape[1])

    @cached_property
    def worth(self) -> np.ndarray:
        """What the methods are told of relevance: the discount of the place, as `Pipeline.rerank` does."""
        worth = 1 / np.log2(np.arange(self.candidates.shape[1]) + 2)
        return np.where(self.candidates >= 0, worth, 0.0)

    def items(self, positions: np.ndarray) -> np.ndarray:
        """The item ids at positions in the candidates, -1 where there is none."""
        found = np.take_along_axis(self.candidates, np.maximum(positions, 0), axis=1)
        return np.where(positions >= 0, found, -1)


def movielens(path: Path, seed: int, cache: Path | None) -> Problem:
    """The candidates of the cascade that `recfast run --data ml-100k` trains, before the test rows."""
    config = cascade.settings(data="ml-100k", overrides=[f"seed={seed}", "compare_seeds=0"])
    dataset = data.load("ml-100k", path, cache=cache, **config.data.options)
    trained = {}
    for stage in ("retriever", "ranker"):
        model = cascade._build(config, stage, dataset)
        trained[stage] = train.fit(model, dataset, config=config.training(stage)).model
    pipeline = Pipeline(
        trained["retriever"],
        trained["ranker"],
        None,
        dataset,
        candidates=CANDIDATES,
        features="vectors",
        codebooks=config.retriever.codes.codebooks,
        exclude=config.pipeline.exclude,
        seed=seed,
    )
    for split in ("valid", "test"):
        users, relevant = cascade._stand_before(pipeline, dataset, split)
        scores, items = pipeline.retrieve(users)
        logits = pipeline.rank(users, items)
        if split == "valid":
            cascade._choose_blend(pipeline, items, scores, logits, relevant, CUTS[0], None)
    order = torch.argsort(pipeline.relevance(scores, logits), dim=1, descending=True, stable=True)
    return Problem(
        "ml-100k",
        items.gather(1, order).numpy(),
        relevant,
        pipeline.catalogue.genres,
        pipeline._similarity,
        pipeline._genre_counts(pipeline.catalogue.history.take(users)),
    )


def generated(seed: int, users: int = 1000) -> Problem:
    """Clusters of near-duplicates, and a ranker that errs by the cluster.

    A user likes genres, and clusters beyond their genres; likes are drawn from that. The ranker knows it but for an
    error that all items of a cluster share, and a small one of each item.
    """
    rng = np.random.default_rng(seed)
    n_genres, n_clusters, size, width = 12, 150, 8, 32
    n_items = n_clusters * size
    of_cluster = np.zeros((n_clusters, n_genres), dtype=np.float32)
    for row in of_cluster:
        row[rng.choice(n_genres, size=rng.integers(1, 3), replace=False)] = 1
    cluster = np.arange(n_items) // size
    centres = of_cluster @ rng.normal(size=(n_genres, width)) + 1.5 * rng.normal(size=(n_clusters, width))
    vectors = centres[cluster] + 0.5 * rng.normal(size=(n_items, width))
    # From users of one genre to users of all.
    breadth = np.exp(rng.uniform(np.log(0.02), np.log(1.0), size=(users, 1)))
    share = rng.gamma(np.broadcast_to(breadth, (users, n_genres))) + 1e-12
    share /= share.sum(1, keepdims=True)
    taste = np.log(share @ (of_cluster / of_cluster.sum(1, keepdims=True)).T + 0.003) + rng.normal(
        scale=0.7, size=(users, n_clusters)
    )
    chance = np.exp(taste[:, cluster] + rng.normal(scale=0.5, size=(users, n_items)))
    # The largest of chance / exponential are draws without replacement.
    order = np.argsort(-chance / rng.exponential(size=chance.shape), axis=1)
    met, liked = order[:, :60], order[:, 60:80]
    score = taste + rng.normal(scale=0.7, size=taste.shape)
    score = score[:, cluster] + rng.normal(scale=0.1, size=(users, n_items))
    np.put_along_axis(score, met, -np.inf, axis=1)
    candidates = np.argsort(-score, axis=1, kind="stable")[:, :CANDIDATES]
    offsets = torch.arange(users + 1) * liked.shape[1]
    empty = np.zeros((1, n_genres), dtype=np.float32)
    return Problem(
        "generated",
        candidates + 1,
        Jagged(torch.from_numpy(np.sort(liked, axis=1).reshape(-1) + 1), offsets),
        np.concatenate([empty, of_cluster[cluster]]),
        np.concatenate([np.zeros((1, width)), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)]).astype(
            np.float32
        ),
        of_cluster[cluster][met].sum(1),
    )


@dataclass(frozen=True)
class Method:
    """A line of the plot: what re-ranks, and what it sees of items."""

    name: str
    kind: str
    features: str  # "genres" or "vectors"
    options: tuple[tuple[str, Any], ...] = ()
    personal: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, personal" if self.personal else self.name

    def lists(self, problem: Problem, diversity: float, k: int, seed: int) -> np.ndarray:
        """Item ids [U, k] at a trade-off."""
        options = dict(self.options)
        if self.kind == "KDPP":
            options["seed"] = seed
        reranker = rerank.build(self.kind, diversity=diversity, personal=float(self.personal), **options)
        further = {"propensity": problem.propensity} if self.personal else {}
        if self.kind == "XQuAD":
            further["preferences"] = problem.preferences
        table = problem.genres if self.features == "genres" else problem.vectors
        return problem.items(reranker.rank(table, problem.worth, k, candidates=problem.candidates, **further))


WINDOW = 5
_KINDS = (
    ("MMR", "MMR", ()),
    ("MSD", "MSD", ()),
    ("SSD", "SSD", ()),
    ("DPP", "DPP", ()),
    (f"DPP, window {WINDOW}", "DPP", (("window", WINDOW),)),
    ("k-DPP", "KDPP", ()),
)
METHODS = [
    Method(name, kind, features, options, personal)
    for personal in (False, True)
    for features in ("genres", "vectors")
    for name, kind, options in _KINDS
    if not (personal and kind == "KDPP")
]
METHODS += [Method("xQuAD", "XQuAD", "genres", (), personal) for personal in (False, True)]


def at_random(problem: Problem, k: int, seed: int) -> np.ndarray:
    """k of each user's candidates in any order."""
    key = np.random.default_rng(seed).random(problem.candidates.shape)
    return problem.items(np.argsort(np.where(problem.candidates >= 0, key, 2.0), axis=1)[:, :k])


def measured(problem: Problem, lists: np.ndarray, k: int) -> dict[str, Any]:
    """Of each user: BY_USER, float64 [U]; of all lists together: OF_ALL."""
    top = lists[:, :k]
    shown = metrics.exposure(top, len(problem.genres))[1:]
    return {
        "ndcg": metrics.ndcg(top, problem.relevant, k),
        "recall": metrics.recall(top, problem.relevant, k),
        "ild_genres": metrics.intra_list_diversity(top, problem.genres),
        "ild_vectors": metrics.intra_list_diversity(top, problem.vectors),
        "alpha_ndcg": metrics.alpha_ndcg(top, problem.relevant, problem.genres, k),
        "err_ia": metrics.err_ia(top, problem.relevant, problem.genres, k),
        "s_recall": metrics.s_recall(top, problem.genres),
        "coverage": metrics.catalogue_coverage(top, len(shown)),
        "gini": metrics.gini(shown),
    }


@dataclass
class Curve:
    """One method over the grid; `by_user[k, metric]` is float64 [grid, U], `of_all[k, metric]` [grid]."""

    method: Method
    grid: tuple[float, ...]
    by_user: dict[tuple[int, str], np.ndarray]
    of_all: dict[tuple[int, str], np.ndarray]


def curve(problem: Problem, method: Method, seed: int, grid: tuple[float, ...] = GRID) -> Curve:
    rows: dict[tuple[int, str], list[Any]] = {}
    for diversity in grid:
        # What is greedy has the shorter list in the longer one; a sample has not.
        sampled = method.kind == "KDPP"
        longest = None if sampled else method.lists(problem, diversity, max(CUTS), seed)
        for k in CUTS:
            lists = method.lists(problem, diversity, k, seed) if sampled else longest
            for name, value in measured(problem, lists, k).items():
                rows.setdefault((k, name), []).append(value)
    stacked = {key: np.stack(value) for key, value in rows.items()}
    return Curve(
        method,
        grid,
        {key: value for key, value in stacked.items() if key[1] in BY_USER},
        {key: value for key, value in stacked.items() if key[1] in OF_ALL},
    )


def mean_of(curves: list[Curve]) -> Curve:
    """The same method on several seeds: each user's mean. Users must be the same."""
    first = curves[0]
    return Curve(
        first.method,
        first.grid,
        {key: np.mean([c.by_user[key] for c in curves], axis=0) for key in first.by_user},
        {key: np.mean([c.of_all[key] for c in curves], axis=0) for key in first.of_all},
    )


def at_loss(ndcg: np.ndarray, value: np.ndarray, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """What a curve has reached where it first falls to (1 - loss) times its first NDCG.

    Parameters
    ----------
    ndcg, value : [grid, B]
        Of each replicate, at each trade-off; the first is the ranker's order.
    loss : float

    Returns
    -------
    (float64 [B], bool [B])
        `value` between the two trade-offs where NDCG passes the threshold, linear in NDCG, or the last one's where it
        never does; and whether it does.
    """
    threshold = (1 - loss) * ndcg[0]
    below = ndcg < threshold
    reached = below.any(0)
    after = np.where(reached, below.argmax(0), len(ndcg) - 1)
    before = np.maximum(after - 1, 0)
    columns = np.arange(ndcg.shape[1])
    high, low = ndcg[before, columns], ndcg[after, columns]
    share = np.where(reached, (high - threshold) / np.where(high > low, high - low, 1.0), 1.0)
    start, end = value[before, columns], value[after, columns]
    return start + share * (end - start), reached
