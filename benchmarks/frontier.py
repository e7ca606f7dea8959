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
import json
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recfast import Pipeline, cascade, data, metrics, rerank, train
from recfast.data import Jagged
from recfast.files import atomic_path, write_text

RESULTS, TABLE, PLOT = "frontier.json", "frontier.md", "frontier.png"
CANDIDATES, CUTS = 100, (10, 20)
GRID = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
# Of samples, which cost more.
FEW = (0.0, 0.15, 0.3, 0.4, 0.5, 0.7)
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
        counts = self.history.astype(np.float64)
        total = counts.sum(1, keepdims=True)
        return np.where(total > 0, counts / np.maximum(total, 1), 1 / counts.shape[1])

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
    stages = {}
    for stage in ("retriever", "ranker"):
        model = cascade._build(config, stage, dataset)
        stages[stage] = train.fit(model, dataset, config=config.training(stage)).model
    pipeline = Pipeline(
        stages["retriever"],
        stages["ranker"],
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


def trained(path: Path, seed: int, cache: Path | None) -> Problem:
    """`movielens`, kept in the cache for the next time."""
    if cache is None:
        return movielens(path, seed, None)
    file = cache / f"frontier_ml-100k_{seed}.npz"
    if file.exists():
        with np.load(file) as kept:
            relevant = Jagged(*(torch.from_numpy(kept[name]) for name in ("liked", "offsets")))
            arrays = (kept[name] for name in ("genres", "vectors", "history"))
            return Problem("ml-100k", kept["candidates"], relevant, *arrays)
    problem = movielens(path, seed, cache)
    with atomic_path(file) as temporary, open(temporary, "wb") as opened:
        np.savez(
            opened,
            candidates=problem.candidates,
            liked=problem.relevant.values.numpy(),
            offsets=problem.relevant.offsets.numpy(),
            genres=problem.genres,
            vectors=problem.vectors,
            history=problem.history,
        )
    return problem


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
    breadth = np.exp(rng.uniform(np.log(0.005), np.log(0.5), size=(users, 1)))
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
    ("MSD, sum", "MSD", (("mean", False),)),
    ("SSD", "SSD", ()),
    ("DPP", "DPP", ()),
    (f"DPP, window {WINDOW}", "DPP", (("window", WINDOW),)),
    # gamma = 0: the eigenvectors of the narrow side, where 0.1 needs those of all candidates. It draws from the same
    # features, but lists longer than their rank are filled up by relevance.
    ("k-DPP", "KDPP", (("gamma", 0.0),)),
)
METHODS = [
    Method(name, kind, features, options, personal)
    for personal in (False, True)
    for features in ("genres", "vectors")
    for name, kind, options in _KINDS
    if not (personal and (features == "vectors" or kind == "KDPP" or name == "MSD, sum"))
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


def curve(problem: Problem, method: Method, seed: int, grid: tuple[float, ...] | None = None) -> Curve:
    # What is greedy has the shorter list in the longer one; a sample has not.
    sampled = method.kind == "KDPP"
    grid = grid or (FEW if sampled else GRID)
    rows: dict[tuple[int, str], list[Any]] = {}
    for diversity in grid:
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


@dataclass
class Seed:
    """All methods on one problem."""

    problem: Problem
    curves: list[Curve]
    random: dict[int, dict[str, Any]]


def every_method(
    problem: Problem, seed: int, methods: list[Method] | None = None, grid: tuple[float, ...] | None = None
) -> Seed:
    curves = [curve(problem, method, seed, grid) for method in (METHODS if methods is None else methods)]
    return Seed(problem, curves, {k: measured(problem, at_random(problem, k, seed), k) for k in CUTS})


@dataclass
class Outcome:
    """All methods on a data set, over its seeds."""

    name: str
    seeds: int
    curves: list[Curve]
    random: dict[tuple[int, str], np.ndarray | float]
    propensity: np.ndarray
    by_seed: list[dict[str, float]]  # the ranker's order, of each seed

    @property
    def users(self) -> int:
        return len(self.propensity)

    def find(self, features: str, personal: bool) -> list[Curve]:
        return [c for c in self.curves if (c.method.features, c.method.personal) == (features, personal)]


def outcome(seeds: list[Seed]) -> Outcome:
    """Join the seeds.

    A user who is in all problems (another training of the same cascade) counts once, with the mean over them; users of
    generated worlds are users of their own.
    """
    problems = [seed.problem for seed in seeds]
    same = all(
        p.history.shape == problems[0].history.shape and (p.history == problems[0].history).all() for p in problems
    )

    def joined(values: list[Any]) -> Any:
        return np.mean(values, axis=0) if same else np.concatenate(values, axis=-1)

    curves = []
    for found in zip(*(seed.curves for seed in seeds), strict=True):
        by_user = {key: joined([c.by_user[key] for c in found]) for key in found[0].by_user}
        of_all = {key: np.mean([c.of_all[key] for c in found], axis=0) for key in found[0].of_all}
        curves.append(Curve(found[0].method, found[0].grid, by_user, of_all))
    random = {
        (k, name): joined([seed.random[k][name] for seed in seeds])
        if name in BY_USER
        else float(np.mean([seed.random[k][name] for seed in seeds]))
        for k in CUTS
        for name in (*BY_USER, *OF_ALL)
    }
    first = [measured(p, p.candidates, CUTS[0]) for p in problems]
    return Outcome(
        problems[0].name,
        len(problems),
        curves,
        random,
        np.concatenate([p.propensity for p in (problems[:1] if same else problems)]),
        [{name: float(np.mean(f[name])) for name in ("ndcg", "recall", "ild_genres", "ild_vectors")} for f in first],
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


def resampled(users: int, seed: int = 0, replicates: int = REPLICATES) -> np.ndarray:
    """Weights of users in each replicate of the bootstrap, float64 [U, 1 + B]; the first column is all users once."""
    drawn = np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), size=replicates).T
    return np.concatenate([np.ones((users, 1)), drawn], axis=1) / users


@dataclass
class Reached:
    """What a method has at a loss of relevance, by metric: the figure, and that of each replicate [B]."""

    method: Method
    figure: dict[str, float]
    replicates: dict[str, np.ndarray]
    whole: bool  # the loss was reached within the grid

    def error(self, name: str) -> float:
        """Half of the 95 % interval."""
        return half_width(self.replicates[name])


def half_width(values: np.ndarray) -> float:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(high - low) / 2


def reached(curve: Curve, weights: np.ndarray, k: int, loss: float) -> Reached:
    """A method where it has lost the share `loss` of NDCG@k."""
    ndcg = curve.by_user[k, "ndcg"] @ weights
    figures, replicates = {}, {}
    values = {name: curve.by_user[k, name] @ weights for name in BY_USER}
    values["diversity"] = np.broadcast_to(np.array(curve.grid)[:, None], ndcg.shape)
    for name, value in values.items():
        found, passed = at_loss(ndcg, value, loss)
        figures[name], replicates[name] = float(found[0]), found[1:]
    for name in OF_ALL:
        figures[name] = float(at_loss(ndcg[:, :1], curve.of_all[k, name][:, None], loss)[0][0])
    return Reached(curve.method, figures, replicates, bool(passed[0]))


def not_worse(rows: list[Reached], name: str) -> set[str]:
    """The best by a metric, and those whose difference from it has a 95 % interval that holds 0."""
    best = max((row for row in rows if row.whole), key=lambda row: row.figure[name], default=None)
    if best is None:
        return set()
    tied = {best.method.title}
    for row in rows:
        low = np.quantile(best.replicates[name] - row.replicates[name], 0.025)
        if row.whole and low <= 0:
            tied.add(row.method.title)
    return tied


COLUMNS = {
    "ild_genres": "ILD genres",
    "ild_vectors": "ILD embeddings",
    "alpha_ndcg": "α-nDCG",
    "err_ia": "ERR-IA",
    "s_recall": "S-recall",
}
TITLES = {"ndcg": "NDCG", "recall": "recall", **COLUMNS}
SAW = {"genres": "genres", "vectors": "embeddings"}


def table_at_loss(out: Outcome, weights: np.ndarray, features: str, k: int, loss: float) -> str:
    """All methods that saw `features`, where they have lost the same share of NDCG@k."""
    rows = [reached(c, weights, k, loss) for c in out.find(features, False)]
    best = {name: not_worse(rows, name) for name in COLUMNS}
    head = ["method", "diversity", f"NDCG@{k}", f"recall@{k}", *COLUMNS.values(), "coverage", "Gini"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def line(title: str, knob: str, figure: Callable[[str], float], error: Callable[[str], str], bold: Any) -> str:
        cells = [title, knob, f"{figure('ndcg'):.4f}", f"{figure('recall'):.4f}"]
        for name in COLUMNS:
            text = f"{figure(name):.4f}{error(name)}"
            cells.append(f"**{text}**" if bold(name) else text)
        return "| " + " | ".join([*cells, f"{figure('coverage'):.3f}", f"{figure('gini'):.3f}"]) + " |"

    first = out.find(features, False)[0]
    start = {
        **{name: float(first.by_user[k, name][0].mean()) for name in BY_USER},
        **{name: float(first.of_all[k, name][0]) for name in OF_ALL},
    }
    lines.append(line("the ranker's order", "", start.__getitem__, lambda name: "", lambda name: False))
    for row in rows:
        lines.append(
            line(
                row.method.name,
                f"{row.figure['diversity']:.2f}" if row.whole else "1 (loses less)",
                row.figure.__getitem__,
                lambda name, row=row: f" ± {row.error(name):.4f}",
                lambda name, row=row: row.method.title in best[name],
            )
        )
    lines.append(
        line(
            "any order of the 100",
            "",
            lambda name: float(np.mean(out.random[k, name])),
            lambda name: "",
            lambda name: False,
        )
    )
    return "\n".join(lines)


def table_of_grid(out: Outcome, features: str, k: int = CUTS[0]) -> str:
    """What a value of the knob means to each method: NDCG and diversity by the other features, relative to none."""
    other = "ild_vectors" if features == "genres" else "ild_genres"
    curves = out.find(features, False)
    lines = ["| diversity | " + " | ".join(c.method.name for c in curves) + " |", "|---" * (1 + len(curves)) + "|"]
    for diversity in curves[0].grid:
        cells = []
        for c in curves:
            if diversity not in c.grid:
                cells.append("")
                continue
            g = c.grid.index(diversity)
            change = [c.by_user[k, name].mean(1) for name in ("ndcg", other)]
            cells.append(" / ".join(f"{100 * (v[g] / v[0] - 1):+.1f}" for v in change))
        lines.append(f"| {diversity:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quartile(out: Outcome, number: int) -> np.ndarray:
    """The users of a quarter by propensity, bool [U]; 0 has the narrowest tastes."""
    place = np.argsort(np.argsort(out.propensity, kind="stable"), kind="stable")
    return place * 4 // len(place) == number


def personal_rows(out: Outcome, weights: np.ndarray, features: str, loss: float, k: int = CUTS[0]) -> list[dict]:
    """Personal against global at the same loss of all users' NDCG: differences, with 95 % intervals."""
    rows = []
    globals_ = {c.method.name: c for c in out.find(features, False)}
    for own in out.find(features, True):
        row: dict[str, Any] = {"method": own.method.name}
        both = {"personal": own, "global": globals_[own.method.name]}
        found = {key: reached(c, weights, k, loss) for key, c in both.items()}
        row["reached"] = all(r.whole for r in found.values())
        for name in COLUMNS:
            difference = found["personal"].replicates[name] - found["global"].replicates[name]
            row[name] = found["personal"].figure[name] - found["global"].figure[name]
            row[name + "_error"] = half_width(difference)
        for number in (0, 3):
            part = weights * quartile(out, number)[:, None]
            part = part / part.sum(0)
            change = {}
            for key, c in both.items():
                value, _ = at_loss(c.by_user[k, "ndcg"] @ weights, c.by_user[k, "ndcg"] @ part, loss)
                change[key] = value / (c.by_user[k, "ndcg"][0] @ part) - 1
                row[f"ndcg_{number}_{key}"] = float(change[key][0])
            row[f"ndcg_{number}_error"] = half_width((change["personal"] - change["global"])[1:])
        rows.append(row)
    return rows


def table_personal(rows: list[dict]) -> str:
    head = ["method", *(f"{title}, difference" for title in COLUMNS.values())]
    head += ["NDCG of the narrowest quarter, global / personal", "of the widest quarter"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["method"]]
        for name in COLUMNS:
            text = f"{row[name]:+.4f} ± {row[name + '_error']:.4f}"
            cells.append(f"**{text}**" if abs(row[name]) > row[name + "_error"] else text)
        for number in (0, 3):
            both = [row[f"ndcg_{number}_{key}"] for key in ("global", "personal")]
            text = f"{100 * both[0]:+.1f} % / {100 * both[1]:+.1f} % (± {100 * row[f'ndcg_{number}_error']:.1f})"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(out: Outcome, weights: np.ndarray, features: str, name: str, loss: float, k: int = CUTS[0]) -> str:
    """One sentence: who reaches most of a metric at a loss, and who cannot be told from that."""
    rows = [reached(c, weights, k, loss) for c in out.find(features, False)]
    tied = not_worse(rows, name)
    start = float(out.find(features, False)[0].by_user[k, name][0].mean())
    ordered = sorted((r for r in rows if r.whole), key=lambda row: -row.figure[name])

    def named(row: Reached) -> str:
        return f"{row.method.name} {row.figure[name]:.4f}"

    if not ordered:
        return f"no method loses {100 * loss:g} % of NDCG@{k} within the grid."
    same = [named(row) for row in ordered[1:] if row.method.title in tied]
    less = [named(row) for row in ordered if row.method.title not in tied]
    text = f"from {start:.4f}, {named(ordered[0])} goes furthest"
    text += f"; within its error: {', '.join(same)}" if same else ", beyond the error of all others"
    return text + (f"; less: {', '.join(less)}." if less else ".")


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def markdown(outcomes: list[Outcome], loss: float = 0.05) -> str:
    parts = ["# What diversity costs: re-rankers at every trade-off"]
    parts.append("    python benchmarks/frontier.py --ml-100k PATH/ml-100k --seeds 3 --out results")
    parts.append(
        _wrapped(
            f"{CANDIDATES} candidates a user in the order of a ranker, re-ranked at {len(GRID)} trade-offs. Relevance "
            "is told to every method by the place alone (the discount of NDCG), as `Pipeline` does. A method *saw* "
            "genres or embeddings, as cosines (xQuAD: genres as topics, and the user's history of them); figures by "
            "the features that it saw are what it optimises, and say little: read the others. Methods are compared "
            f"where they have lost {100 * loss:g} % of the NDCG of the ranker's order, between two trade-offs of the "
            "grid; `diversity` is the knob there. ± is half of the 95 % interval of a bootstrap over users. **Bold**: "
            "the best, and what cannot be told from it (the paired difference has an interval that holds 0). "
            "α-nDCG (α = 0.5), ERR-IA and S-recall are over genres; coverage and Gini are of all lists together, "
            "without an error."
        )
    )
    for out in outcomes:
        weights = resampled(out.users)
        seeds = "; ".join(
            ", ".join(f"{TITLES[name]} {value:.4f}" for name, value in seed.items()) for seed in out.by_seed
        )
        parts.append(f"## {out.name}")
        count = f"{out.users:,} users; {out.seeds} seed{'s' * (out.seeds > 1)}"
        parts.append(_wrapped(f"{count}. The ranker's order at 10, by seed: {seeds}."))
        said = [
            f"- Saw {SAW[saw]}, {COLUMNS[name]} at {100 * share:g} % less NDCG@10: "
            + verdict(out, weights, saw, name, share)
            for saw, name in (("vectors", "ild_genres"), ("genres", "ild_vectors"), ("genres", "alpha_ndcg"))
            for share in LOSSES
        ]
        parts.append("\n".join(said))
        for k in CUTS:
            for features in SAW:
                parts.append(f"### {out.name}: saw {SAW[features]}, {100 * loss:g} % less NDCG@{k}")
                parts.append(table_at_loss(out, weights, features, k, loss))
        parts.append(f"### {out.name}: personal against global, saw genres, {100 * loss:g} % less NDCG@10")
        parts.append(
            _wrapped(
                "Each user's trade-off is the knob times the entropy of the genres in the history "
                "(`personal=1`). Differences personal minus global at the same loss over all users, in bold where the "
                "95 % interval is beyond 0; and what users of the narrowest and the widest quarter of tastes lose."
            )
        )
        parts.append(table_personal(personal_rows(out, weights, "genres", loss)))
        for features in SAW:
            other = SAW["vectors" if features == "genres" else "genres"]
            parts.append(f"### {out.name}: what the knob does, saw {SAW[features]}")
            parts.append(f"Change of NDCG@10 / of the ILD of {other}, in per cent of the ranker's order.")
            parts.append(table_of_grid(out, features))
    return "\n\n".join(parts) + "\n"


def as_json(outcomes: list[Outcome]) -> dict[str, Any]:
    result: dict[str, Any] = {"grid": GRID, "candidates": CANDIDATES, "cuts": CUTS, "data": {}}
    for out in outcomes:
        weights = resampled(out.users)
        # A list a point, for there are many: `columns` names what is in it.
        columns = ["method", "kind", "saw", "personal", "diversity", "k"]
        columns += [name + end for name in BY_USER for end in ("", "_se")] + list(OF_ALL)
        points = []
        for c in out.curves:
            m = c.method
            about = {"method": m.name, "kind": m.kind, "saw": m.features}
            for g, diversity in enumerate(c.grid):
                for k in CUTS:
                    point = {**about, "personal": m.personal, "diversity": diversity, "k": k}
                    for name in BY_USER:
                        value = c.by_user[k, name][g]
                        point[name] = round(float(value.mean()), 5)
                        point[name + "_se"] = round(float(value.std(ddof=1) / np.sqrt(len(value))), 5)
                    points.append(point | {name: round(float(c.of_all[k, name][g]), 5) for name in OF_ALL})
        losses = [
            {
                "method": c.method.name,
                "saw": c.method.features,
                "personal": c.method.personal,
                "k": k,
                "loss": loss,
                "within_grid": (r := reached(c, weights, k, loss)).whole,
                **{name: round(value, 5) for name, value in r.figure.items()},
                **{name + "_error": round(r.error(name), 5) for name in BY_USER},
            }
            for c in out.curves
            for k in CUTS
            for loss in LOSSES
        ]
        result["data"][out.name] = {
            "users": out.users,
            "seeds": out.seeds,
            "by_seed": out.by_seed,
            "random": {f"{name}@{k}": round(float(np.mean(v)), 5) for (k, name), v in out.random.items()},
            "columns": columns,
            "points": [[point[name] for name in columns] for point in points],
            "at_loss": losses,
            "personal": personal_rows(out, weights, "genres", 0.05),
        }
    return result


# Of the plot: colour-blind safe (Okabe and Ito), one colour a method in all panels.
STYLE = {
    "MMR": ("#d55e00", "-"),
    "MSD": ("#b58900", "-"),
    "SSD": ("#009e73", "-"),
    "DPP": ("#0072b2", "-"),
    f"DPP, window {WINDOW}": ("#0072b2", ":"),
    "k-DPP": ("#cc79a7", "-"),
    "xQuAD": ("#555b66", "--"),
}
PANELS = (
    ("vectors", "ild_genres", "saw embeddings: ILD of genres@10"),
    ("genres", "ild_vectors", "saw genres: ILD of embeddings@10"),
    ("genres", "alpha_ndcg", "saw genres: α-nDCG@10 of genres"),
)
LOWEST = -25.0  # per cent of NDCG; what costs more is no choice


def plot(outcomes: list[Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(outcomes), len(PANELS), figsize=(4.6 * len(PANELS), 4.1 * len(outcomes)), squeeze=False
    )
    for row, out in zip(axes, outcomes, strict=True):
        for axis, (features, name, title) in zip(row, PANELS, strict=True):
            for c in out.find(features, False):
                if c.method.name not in STYLE:
                    continue
                colour, dashes = STYLE[c.method.name]
                ndcg = c.by_user[10, "ndcg"].mean(1)
                x, y = c.by_user[10, name].mean(1), 100 * (ndcg / ndcg[0] - 1)
                axis.plot(x, y, dashes, color=colour, linewidth=1.8, marker="o", markersize=2.6, label=c.method.name)
            axis.plot(x[:1], [0], "k*", markersize=11, zorder=5)
            axis.set_ylim(LOWEST, 4)
            axis.set_title(title, loc="left", fontsize=10)
            axis.grid(color="#e8eaee")
            axis.set_axisbelow(True)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            seen = np.concatenate([line.get_xdata()[line.get_ydata() >= LOWEST] for line in axis.lines])
            low, high = seen.min(), seen.max()
            axis.set_xlim(low - 0.04 * (high - low), high + 0.1 * (high - low))
        row[0].set_ylabel(f"{out.name}\nNDCG@10, change in %")
    figure.suptitle(
        "What diversity costs, from the ranker's order (★): further right is more diverse, higher is more relevant",
        x=0.01,
        ha="left",
        fontsize=11.5,
        fontweight="bold",
    )
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(
        [lines[name] for name in STYLE if name in lines],
        [name for name in STYLE if name in lines],
        loc="lower center",
        ncols=len(STYLE),
        frameon=False,
        handlelength=3,
    )
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


# The tables are written by every run, what a person made of them is not: it stands at the end of the page.
WORDS = "\n## What to choose\n"


def report(outcomes: list[Outcome], out: Path) -> None:
    table = out / TABLE
    words = table.read_text(encoding="utf-8").partition(WORDS) if table.exists() else ("", "", "")
    write_text(out / RESULTS, json.dumps(as_json(outcomes), separators=(",", ":")).replace("],[", "],\n["))
    write_text(table, markdown(outcomes) + words[1] + words[2])
    plot(outcomes, out / PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results, table and plot are written")
    parser.add_argument("--ml-100k", type=Path, help="the folder of its files; left out if there is none")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the cascade, and generated worlds")
    parser.add_argument("--cache", type=Path, help="where prepared data and trained candidates are kept")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in ("ml-100k", "generated"):
        if name == "ml-100k" and arguments.ml_100k is None:
            continue
        seeds = []
        for seed in range(arguments.seeds):
            started = time.perf_counter()
            if name == "ml-100k":
                problem = trained(arguments.ml_100k, seed, arguments.cache)
            else:
                problem = generated(seed)
            middle = time.perf_counter()
            seeds.append(every_method(problem, seed))
            took = f"candidates in {middle - started:.0f} s, methods in {time.perf_counter() - middle:.0f} s"
            print(f"{name}, seed {seed}: {took}", flush=True)
        outcomes.append(outcome(seeds))
        report(outcomes, arguments.out)


if __name__ == "__main__":
    main()
