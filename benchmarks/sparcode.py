"""SparCode against two towers with the same query encoder: what each finds, and what a query costs.

    python benchmarks/sparcode.py --ml-100k PATH/ml-100k --gowalla PATH/gowalla --seeds 3 --out results

Every finished training is a line of OUT/sparcode.jsonl and is not done again; OUT/sparcode.json (the lines as a list)
and OUT/sparcode.md are written after each (`--report` writes them from what is there).

Both sides have the same encoder, embeddings, negatives, loss, batches and optimiser. On ml-100k each is tuned on
validation items with the same number of configurations, by NDCG@50 (seed 0); the epoch is chosen there too. On Gowalla
there is one configuration a side. Then each is trained with that for three seeds and measured once on the test items.
What is measured is what the index answers. ml-100k is done for each of GROUPS: encoders, and a way to train.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recfast import data, metrics, models
from recfast.data import Batch, Jagged
from recfast.data.dataset import gather_jagged
from recfast.files import write_text
from recfast.index import CodeIndex, DenseIndex
from recfast.models.retrieval._sparcode_index import allowed
from recfast.models.storage import save_model
from recfast.nn import ProductQuantizer
from recfast.train.evaluate import held_out, top_items

RUNS, RESULTS, TABLE = "sparcode.jsonl", "sparcode.json", "sparcode.md"
CUTS = (20, 50)
CHOICE = "ndcg@50"
# Histories a step; positives that share one; share of a user's items that is predicted where there is no order.
ROWS, WINDOW, SHARE = 256, 5, 0.5
# Codes of the two towers' vectors in CodeIndex.
PQ_BOOKS, PQ_CODES = 8, 256
TIMED = 300
# Items a row of SparCode's index.
TOPS = {"ml-100k": (1000,), "gowalla": (1000, 4000, 16_000)}
# Codebooks and codes of the two towers' user vectors, where it is asked what coding a query costs.
QUERY_CODES = ((8, 64), (8, 256), (8, 512), (16, 256))


@dataclass
class Task:
    """What is trained on and what is to be found.

    positives
        By user id, the positives to train on; in time order where `ordered`.
    known, seen
        By user id, the history that is given when the model is asked, and what it may not answer.
    users, truth
        int64 [U] who is asked, and what each likes.
    """

    name: str
    schema: data.Schema
    positives: Jagged
    known: Jagged
    seen: Jagged
    users: np.ndarray
    truth: Jagged
    ordered: bool
    dataset: data.Dataset


@dataclass(frozen=True)
class Setting:
    """One configuration of one side."""

    side: str
    options: dict[str, Any]
    epochs: int
    lr: float = 2e-3
    decay: float = 0.0
    # SparCode: epochs that pass before tokens are quantised, and the share of `lr` after that.
    free: int = 0
    settle: float = 0.25
    # Of GROUPS: what is compared with what.
    group: str = "mean"

    @property
    def build(self) -> str:
        return "DSSM" if self.side == "two towers" else "SparCode"


COMMON = {
    "ml-100k": {"negatives": "all", "dropout": 0.3},
    "gowalla": {
        "negatives": "sampled",
        "num_negatives": 1024,
        "max_length": 100,
        "recency": False,
        "user_id": False,
        "dropout": 0.0,
        "history_dropout": 0.0,
    },
}
# What both sides of a comparison have beside that.
GROUPS: dict[str, dict[str, Any]] = {
    "mean": {},
    "GRU": {"encoder": "gru"},
    "self-attention": {"encoder": "attention", "max_length": 20, "negatives": "sampled", "num_negatives": 512},
    # The loss of the source's program: ten negatives for each positive, no item bias, the history alone, three layers.
    "mean, trained as the source": {
        "negatives": "private",
        "num_negatives": 10,
        "item_bias": False,
        "user_id": False,
        "recency": False,
        "history_dropout": 0.0,
        "dropout": 0.1,
        "hidden": [256, 256, 256],
    },
}
SPARCODE = {"tokens": 4, "token_dim": 16, "codebooks": 2, "codes": 64, "shared_codebooks": False}
# More bits for a user in fewer rows of the index: one codebook for each of eight tokens.
FINE = {"tokens": 8, "token_dim": 8, "codebooks": 1, "codes": 256}
SPARCODE_ATTENTION = {**SPARCODE, "scorer": "attention", "decay": 0.95}
# The source's form, smaller: four tokens, two shared codebooks, an MLP over the token and the item's tokens, coded from
# the first step on. There tokens are 64 wide, an item has four, codebooks 256 codes and the MLP three layers of 256.
SOURCE = {"tokens": 4, "token_dim": 32, "item_tokens": 2, "codes": 64, "scorer": "mlp", "scorer_hidden": [64, 64]}
SETTINGS = {
    "ml-100k": [
        Setting("two towers", {}, 24, decay=0.05),
        Setting("two towers", {"history_dropout": 0.5}, 24, decay=0.05),
        Setting("two towers", {"dim": 128}, 24, decay=0.05),
        Setting("two towers", {"hidden": []}, 24, decay=0.05),
        Setting("SparCode", {**SPARCODE, "scorer": "attention", "decay": 0.95}, 18, decay=0.05, free=15),
        Setting(
            "SparCode",
            {**SPARCODE, "scorer": "attention", "codes": 256, "shared_codebooks": True, "decay": 0.95},
            18,
            decay=0.05,
            free=15,
        ),
        Setting("SparCode", {**SPARCODE, "scorer": "dot", "item_tokens": 1, "decay": 0.95}, 18, decay=0.05, free=15),
        Setting("SparCode", {**SPARCODE, **FINE, "scorer": "attention"}, 18, decay=0.05, free=15),
        *(
            setting
            for lr in (2e-3, 1e-3)
            for setting in (
                Setting("two towers", {}, 20, lr=lr, decay=0.05, group="GRU"),
                Setting("SparCode", SPARCODE_ATTENTION, 14, lr=lr, decay=0.05, free=12, group="GRU"),
            )
        ),
        Setting("two towers", {}, 14, decay=0.05, group="self-attention"),
        Setting("SparCode", SPARCODE_ATTENTION, 11, decay=0.05, free=9, group="self-attention"),
        Setting("two towers", {}, 16, group="mean, trained as the source"),
        Setting("SparCode", SOURCE, 16, group="mean, trained as the source"),
    ],
    "gowalla": [
        Setting("two towers", {}, 8),
        Setting(
            "SparCode",
            {**SPARCODE, **FINE, "scorer": "attention", "codes": 512},
            8,
            free=7,
        ),
    ],
}


def movielens(path: Path, split: str, cache: Path | None) -> Task:
    """Trained on the train split; asked for the likes of the split, with all that came before as the history."""
    dataset = data.load("ml-100k", path, negatives=0, cache=cache)
    before = {"valid": "train", "test": "valid"}[split]
    users, truth = held_out(getattr(dataset, split), dataset.seen(before))
    history = dataset.history("train"), dataset.history(before)
    return Task("ml-100k", dataset.schema, *history, dataset.seen(before), users, truth, True, dataset)


def gowalla(path: Path, split: str, cache: Path | None) -> Task:
    """Tuned on a tenth of each user's train items, which is trained on when the test items are asked for."""
    share = {"valid_share": 0.1} if split == "valid" else {}
    dataset = data.load("gowalla", path, cache=cache, **share)
    known = dataset.history("train")
    users, truth = held_out(getattr(dataset, split), known)
    return Task("gowalla", dataset.schema, known, known, known, users, truth, False, dataset)


TASKS: dict[str, Callable[[Path, str, Path | None], Task]] = {"ml-100k": movielens, "gowalla": gowalla}


class SharedPositives:
    """Batches in which several positives share one history.

    Of a user in time order: each next `window` positives, with what came before them. Of a user without order: a random
    `share` of the positives, with the others. Every epoch is drawn anew.
    """

    def __init__(self, task: Task, rows: int, seed: int, *, window: int = WINDOW, share: float = SHARE) -> None:
        self.task, self.rows, self.window, self.share = task, rows, window, share
        self.random = np.random.default_rng(seed)
        self.offsets = task.positives.offsets.numpy()
        self.values = task.positives.values.numpy()
        self.columns = tuple(column.name for column in task.schema.categorical)
        self.sequence = next((column.name for column in task.schema.sequences), "history")

    def __len__(self) -> int:
        """Steps of an epoch, about."""
        lengths = np.diff(self.offsets)
        middle = (self.window + 1) / 2
        pieces = (
            np.ceil(np.maximum(0, lengths - middle) / self.window).sum() if self.task.ordered else (lengths > 0).sum()
        )
        return max(1, round(float(pieces) / self.rows))

    def __iter__(self) -> Iterator[Batch]:
        random, offsets = self.random, self.offsets
        lengths = np.diff(offsets)
        if self.task.ordered:
            values = self.values
            first = 1 + random.integers(0, self.window, len(lengths))
            pieces = np.maximum(0, -(-(lengths - first) // self.window))
            user = np.repeat(np.arange(len(lengths)), pieces)
            step = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            begin = offsets[user] + first[user] + step * self.window
            end = np.minimum(begin + self.window, offsets[user + 1])
        else:
            # Shuffled within each user: the last ones are the targets.
            owner = np.repeat(np.arange(len(lengths)), lengths)
            values = self.values[np.lexsort((random.random(len(owner)), owner))]
            targets = np.minimum(np.maximum(1, random.binomial(lengths, self.share)), lengths)
            user = np.flatnonzero(lengths > 0)
            begin, end = offsets[user + 1] - targets[user], offsets[user + 1]
        order = random.permutation(len(user))
        for start in range(0, len(order), self.rows):
            rows = order[start : start + self.rows]
            who, a, b = user[rows], begin[rows], end[rows]
            target = _slices(values, a, b)
            ids = np.zeros((len(target.values), len(self.columns)), dtype=np.int64)
            ids[:, self.columns.index(self.task.schema.user)] = np.repeat(who, b - a)
            ids[:, self.columns.index(self.task.schema.item)] = target.values
            yield Batch(
                ids=torch.from_numpy(ids),
                numeric=torch.zeros(len(ids), 0),
                sequences={self.sequence: _slices(values, offsets[who], a)},
                candidate_offsets=target.offsets,
                columns=self.columns,
            )


def _slices(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Jagged:
    return Jagged(*map(torch.from_numpy, gather_jagged(values, starts, ends, None)))


@cache
def _start(positives: Jagged, dim: int, item_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of items in a history, and as candidates, by the truncated SVD of the normalised interactions.

    Both sides begin with the same ones, where the study has no time to learn embeddings from nothing.
    """
    import scipy.sparse as sp

    shape = len(positives.offsets) - 1, item_rows
    ones = np.ones(len(positives.values), dtype=np.float32)
    x = sp.csr_matrix((ones, positives.values.numpy(), positives.offsets.numpy()), shape=shape)
    of_user = np.maximum(np.asarray(x.sum(1)).ravel(), 1)
    of_item = np.maximum(np.asarray(x.sum(0)).ravel(), 1)
    r = (sp.diags(of_user**-0.5) @ x @ sp.diags(of_item**-0.5)).tocsr().astype(np.float32)
    q = np.random.default_rng(0).standard_normal((item_rows, dim + 16)).astype(np.float32)
    for _ in range(4):
        q, _ = np.linalg.qr(r.T @ (r @ q))
    _, _, vt = np.linalg.svd(r @ q, full_matrices=False)
    v = (q @ vt.T)[:, :dim]
    tables = (v * of_item[:, None] ** -0.5, v * of_item[:, None] ** 0.3)
    events, items = (torch.from_numpy((t / np.linalg.norm(t, axis=1).mean()).astype(np.float32)) for t in tables)
    return events, 4 * items


def built(setting: Setting, task: Task, seed: int, batches: SharedPositives) -> torch.nn.Module:
    """The model before training."""
    torch.manual_seed(seed)
    options = {**COMMON[task.name], **GROUPS[setting.group], **setting.options, "seed": seed}
    if setting.build == "SparCode":
        options["warm_up"] = setting.free * len(batches)
    model = models.build(setting.build, task.schema, options)
    model.prepare(task.dataset)
    if not task.ordered:
        events, items = _start(task.positives, model.encoder.dim, model.rows)
        with torch.no_grad():
            model.encoder.events.copy_(events)
            if setting.build == "DSSM":
                model.items.copy_(items)
            else:
                model.items.copy_(items[:, None] + 0.02 * torch.randn(model.items.shape))
    return model


def train(
    setting: Setting, task: Task, seed: int, epochs: int, look: Callable[..., object] | None
) -> tuple[torch.nn.Module, float]:
    """Train, and return the model and the seconds of the processor; `look(model, epoch, loss, seconds)` after each."""
    batches = SharedPositives(task, ROWS, seed)
    model = built(setting, task, seed, batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=setting.decay)
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        if setting.free and epoch > setting.free:
            optimizer.param_groups[0]["lr"] = setting.lr * setting.settle
        model.train()
        started, total, steps = time.process_time(), 0.0, 0
        for batch in batches:
            loss = model.loss(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
        seconds += time.process_time() - started
        print(f"    epoch {epoch}: loss {total / steps:.4f}, {seconds:.0f} s so far", flush=True)
        if look is not None:
            look(model.eval(), epoch, total / steps, seconds)
    return model.eval(), seconds


def found(ids: torch.Tensor, truth: Jagged) -> dict[str, float]:
    lists = ids.numpy()
    return {
        f"{name}@{k}": float(getattr(metrics, name)(lists, truth, k).mean())
        for k in CUTS
        for name in ("recall", "ndcg")
    }


@torch.inference_mode()
def measured(model: torch.nn.Module, task: Task, every: int = 1) -> dict[str, float]:
    """Exact scoring of all items, for every so manieth user."""
    chosen = np.arange(0, len(task.users), every)
    asked = torch.from_numpy(task.users[chosen])
    ids = top_items(model, asked, CUTS[-1], history=task.known, masked=task.seen)
    return found(ids, task.truth.take(chosen))


class Unquantised(torch.nn.Module):
    """SparCode's scores by the tokens themselves: what its codes cost is the difference."""

    task = "retrieval"

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def item_vectors(self) -> torch.Tensor:
        return self.model.item_vectors()

    def scores(self, histories: Jagged, users: torch.Tensor) -> torch.Tensor:
        model = self.model
        tokens = model.tokens.placed(model.tokens.unquantized(model.encoder(histories, users)))
        return torch.cat([model.token_scores(part).sum(0, keepdim=True) for part in tokens])


class Coded(torch.nn.Module):
    """Two towers whose user vectors are product-quantised."""

    task = "retrieval"

    def __init__(self, model: torch.nn.Module, quantizer: ProductQuantizer) -> None:
        super().__init__()
        self.model, self.quantizer = model, quantizer

    def item_vectors(self) -> torch.Tensor:
        return self.model.item_vectors()

    def user_vectors(self, histories: Jagged, users: torch.Tensor) -> torch.Tensor:
        vectors = self.model.user_vectors(histories, users)
        codes = self.quantizer.encode(vectors[:, :-1].contiguous())
        return torch.cat([self.quantizer.decode(codes), vectors[:, -1:]], dim=1)


class Served:
    """A trained model behind an index: `ids(histories, users)` are the best new items."""

    def __init__(self, name: str, answer: Callable[[Jagged, torch.Tensor], torch.Tensor], bytes_: int, seconds: float):
        self.name, self.ids, self.bytes, self.seconds = name, answer, bytes_, seconds

    def all(self, task: Task) -> torch.Tensor:
        users = torch.from_numpy(task.users)
        return torch.cat([self.ids(task.known.take(part), part) for part in users.split(256)])

    def query_us(self, task: Task) -> dict[str, float]:
        """Microseconds of one user end to end, least and median over `TIMED` users."""
        asked = torch.from_numpy(task.users[:: max(1, len(task.users) // TIMED)])
        times = []
        for user in asked.split(1):
            history = task.known.take(user)
            started = time.perf_counter()
            self.ids(history, user)
            times.append(1e6 * (time.perf_counter() - started))
        return {"query_us": min(times), "query_us_median": statistics.median(times)}


def rows_of(model: torch.nn.Module, task: Task, top: int) -> Served:
    """SparCode by its index."""
    started = time.perf_counter()
    index = model.build_index(top=top, say=lambda text: print("   ", text, flush=True))

    def answer(histories: Jagged, users: torch.Tensor) -> torch.Tensor:
        return index.retrieve(histories, users, CUTS[-1], exclude=task.seen.take(users))[1]

    return Served(f"CodeRows, {top:,} best of a row", answer, index.nbytes(), time.perf_counter() - started)


def served(model: torch.nn.Module, task: Task) -> Iterator[Served]:
    """The indexes of a model, one after the other."""
    if hasattr(model, "build_index"):
        for top in TOPS[task.name]:
            yield rows_of(model, task, top)
        return
    k, started = CUTS[-1], time.perf_counter()
    vectors = model.item_vectors().detach().clone()
    # The unknown item is never found.
    vectors[0, :-1], vectors[0, -1] = 0.0, -1e9
    flat = DenseIndex(vectors)

    def by_flat(histories: Jagged, users: torch.Tensor) -> torch.Tensor:
        return flat.search(model.user_vectors(histories, users), k, mask=allowed(task.seen.take(users), len(vectors)))[
            1
        ]

    yield Served("DenseIndex flat", by_flat, vectors.numel() * 4, time.perf_counter() - started)
    started = time.perf_counter()
    # The bias apart: it is one number an item, and would spoil the part it is in.
    quantizer = ProductQuantizer(vectors.shape[1] - 1, PQ_BOOKS, PQ_CODES).fit(vectors[1:, :-1].contiguous())
    codes = quantizer.encode(vectors[:, :-1].contiguous())
    coded = CodeIndex(codes, n_codes=PQ_CODES, bias=vectors[:, -1].contiguous())

    def by_codes(histories: Jagged, users: torch.Tensor) -> torch.Tensor:
        table = quantizer.score_table(model.user_vectors(histories, users)[:, :-1])
        return coded.search(table, k, mask=allowed(task.seen.take(users), len(vectors)))[1]

    size = codes.numel() + 4 * len(codes) + quantizer.centroids.numel() * 4
    yield Served("CodeIndex", by_codes, size, time.perf_counter() - started)


# Where configurations and epochs are chosen on validation items.
TUNED = ("ml-100k",)


@dataclass
class Study:
    """Trains what is not yet trained, and remembers it."""

    out: Path
    cache: Path | None = None
    # Where trained models are kept, so that indexes can be measured again.
    models: Path | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    # Models of seed 0, which on ml-100k learns from the same items in tuning as in the end.
    kept: dict[str, tuple[torch.nn.Module, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / RUNS
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        # A line that was cut off is a run that was not done.
        self.runs = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        if text and not text.endswith("\n"):
            write_text(self.path, text[: text.rfind("\n") + 1])

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        defaults = {"group": "mean"}
        return [run for run in self.runs if all({**defaults, **run}.get(k) == value for k, value in wanted.items())]

    def remember(self, **run: Any) -> None:
        run = {**run, "load": os.getloadavg()[0]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs.append(run)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in run.items()}, flush=True)

    def tune(self, name: str, path: Path, group: str = "mean") -> None:
        """Every configuration of a group once, on the validation items."""
        for setting in SETTINGS[name] if name in TUNED else ():
            if setting.group != group:
                continue
            wanted = {"kind": "tuning", "data": name, **described(setting)}
            if self.find(**wanted):
                continue
            task = TASKS[name](path, "valid", self.cache)
            print(f"  tuning {wanted}", flush=True)
            seen: list[dict[str, Any]] = []

            def look(
                model: torch.nn.Module, epoch: int, loss: float, seconds: float,
                seen: list[dict[str, Any]] = seen, task: Task = task, setting: Setting = setting,
            ) -> None:  # fmt: skip
                # What is not quantised yet cannot be served.
                if epoch <= setting.free or epoch % (1 if task.ordered else 2):
                    return
                seen.append({"epoch": epoch, "loss": loss, **measured(model, task, 1 if task.ordered else 20)})
                print(f"      {seen[-1]}", flush=True)
                if task.ordered and seen[-1][CHOICE] == max(entry[CHOICE] for entry in seen):
                    self.keep(setting, task, epoch, model, seconds)

            _, seconds = train(setting, task, 0, setting.epochs, look)
            best = max(seen, key=lambda entry: entry[CHOICE])
            self.remember(**wanted, epochs=setting.epochs, seconds=seconds, best=best)

    def keep(self, setting: Setting, task: Task, epoch: int, model: torch.nn.Module, seconds: float) -> None:
        """Remember a model of seed 0."""
        known = {**described(setting), "epochs": epoch}
        self.kept[json.dumps([task.name, known])] = copy.deepcopy(model), seconds

    def trained(self, setting: Setting, task: Task, seed: int, epochs: int) -> tuple[torch.nn.Module, float]:
        """The model and what its training took, from the folder of models if it is there."""
        known = json.dumps([task.name, {**described(setting), "epochs": epochs}])
        kept = self.kept.get(known) if seed == 0 else None
        if self.models is None:
            return kept or train(setting, task, seed, epochs, None)
        folder = self.models / f"{task.name} {setting.group} {setting.side} {seed}"
        wanted = {**described(setting), "epochs": epochs}
        about = folder / "training.json"
        if about.exists() and (told := json.loads(about.read_text())).pop("seconds") and told == wanted:
            return models.load(folder), json.loads(about.read_text())["seconds"]
        model, seconds = kept or train(setting, task, seed, epochs, None)
        save_model(model, task.schema, folder)
        write_text(about, json.dumps({**wanted, "seconds": seconds}))
        return model, seconds

    def coded_queries(self, name: str, path: Path) -> None:
        """What it costs two towers to code their user vectors after training, by bits; on validation items, seed 0."""
        chosen = self.best(name, "two towers", "mean")
        if chosen is None or self.find(kind="coded queries", data=name):
            return
        setting, epochs = chosen
        task = TASKS[name](path, "valid", self.cache)
        model, _ = train(setting, task, 0, epochs, None)
        every = 1 if task.ordered else 20
        out = {"none": {"bits": 32 * model.head.out_features, **measured(model, task, every)}}
        with torch.inference_mode():
            users = torch.arange(1, len(task.known.offsets) - 1)
            vectors = model.user_vectors(task.known.take(users), users)[:, :-1].contiguous()
            for books, codes in QUERY_CODES:
                quantizer = ProductQuantizer(vectors.shape[1], books, codes).fit(vectors, iterations=10)
                coded = {"bits": books * math.log2(codes), **measured(Coded(model, quantizer), task, every)}
                out[f"{books} x {codes}"] = coded
        self.remember(kind="coded queries", data=name, side="two towers", epochs=epochs, codes=out)

    def best(self, name: str, side: str, group: str = "mean") -> tuple[Setting, int] | None:
        """The configuration and the epoch of the best validation."""
        runs = self.find(kind="tuning", data=name, side=side, group=group)
        wanted = [setting for setting in SETTINGS[name] if setting.side == side and setting.group == group]
        if not runs:
            return (wanted[0], wanted[0].epochs) if len(wanted) == 1 else None
        best = max(runs, key=lambda run: run["best"][CHOICE])
        setting = next(
            s for s in wanted if described(s) == {key: {"group": "mean", **best}[key] for key in described(s)}
        )
        return setting, best["best"]["epoch"]

    def test(self, name: str, path: Path, side: str, seed: int, group: str = "mean") -> None:
        """One final training and what its indexes find."""
        chosen = self.best(name, side, group)
        if chosen is None or self.find(kind="test", data=name, side=side, seed=seed, group=group):
            return
        setting, epochs = chosen
        task = TASKS[name](path, "test", self.cache)
        print(f"  test of {name}, {group}, {side}, seed {seed}", flush=True)
        model, seconds = self.trained(setting, task, seed, epochs)
        # Score rows of all codes do not fit the memory that they are kept in where there are many items.
        exact = measured(model, task, 1 if task.ordered else 20)
        free = None
        if hasattr(model, "tokens"):
            free = measured(Unquantised(model), task, 1 if task.ordered else 100)
        indexes = {}
        with torch.inference_mode():
            for index in served(model, task):
                indexes[index.name] = {
                    **found(index.all(task), task.truth),
                    **index.query_us(task),
                    "bytes": index.bytes,
                    "build_seconds": index.seconds,
                }
        report = model.tokens.quantizer.report()["perplexity"] if hasattr(model, "tokens") else None
        self.remember(
            kind="test", data=name, seed=seed, **described(setting), epochs=epochs, seconds=seconds, exact=exact,
            unquantised=free, indexes=indexes, perplexity=report, parameters=sum(p.numel() for p in model.parameters()),
        )  # fmt: skip


def described(setting: Setting) -> dict[str, Any]:
    return {
        "group": setting.group,
        "side": setting.side,
        "options": setting.options,
        "lr": setting.lr,
        "decay": setting.decay,
        "free": setting.free,
    }


def spread(values: list[float], digits: int = 4) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def groups_of(name: str) -> list[str]:
    return list(dict.fromkeys(setting.group for setting in SETTINGS[name]))


def compared() -> list[tuple[str, str]]:
    """All data sets and groups."""
    return [(name, group) for name in SETTINGS for group in groups_of(name)]


def table(study: Study) -> str:
    head = ["data", "encoder", "model", "index", "seeds", "Recall@20", "Recall@50", "NDCG@20", "NDCG@50"]
    head += ["training, CPU s", "µs a query (least; median)", "index, MB"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, group in compared():
        for side in ("two towers", "SparCode"):
            runs = study.find(kind="test", data=name, side=side, group=group)
            for index in dict.fromkeys(key for run in runs for key in run["indexes"]):
                cells = [run["indexes"][index] for run in runs if index in run["indexes"]]
                row = [name, group, side, index, str(len(cells))]
                row += [spread([c[m] for c in cells]) for m in ("recall@20", "recall@50", "ndcg@20", "ndcg@50")]
                row += [f"{statistics.fmean(run['seconds'] for run in runs):.0f}"]
                row += [f"{min(c['query_us'] for c in cells):.0f}; {min(c['query_us_median'] for c in cells):.0f}"]
                row += [f"{cells[0]['bytes'] / 1e6:.2f}"]
                out.append("| " + " | ".join(row) + " |")
    return "\n".join(out)


def error(ours: list[float], theirs: list[float]) -> str:
    """The standard error of the difference of two means of seeds, in percent of theirs; nothing for single seeds."""
    if min(len(ours), len(theirs)) < 2:
        return ""
    squares = sum(statistics.variance(part) / len(part) for part in (ours, theirs))
    return f" (± {100 * math.sqrt(squares) / statistics.fmean(theirs):.1f})"


def gains(study: Study) -> str:
    """What SparCode has over the exact search of two towers, in percent."""
    metrics_ = ("recall@20", "recall@50", "ndcg@20", "ndcg@50")
    out = []
    for name, group in compared():
        towers = study.find(kind="test", data=name, side="two towers", group=group)
        towers = [run["indexes"]["DenseIndex flat"] for run in towers]
        runs = study.find(kind="test", data=name, side="SparCode", group=group)
        for index in dict.fromkeys(index for run in runs for index in run["indexes"]) if towers else ():
            cells = [run["indexes"][index] for run in runs if index in run["indexes"]]
            said = []
            for metric in metrics_:
                ours, theirs = (statistics.fmean(cell[metric] for cell in part) for part in (cells, towers))
                said.append(
                    f"{metric.replace('recall', 'Recall').replace('ndcg', 'NDCG')} {100 * (ours / theirs - 1):+.1f} %"
                )
            said[-1] += error(*([cell["ndcg@50"] for cell in part] for part in (cells, towers)))
            ours, theirs = (min(cell["query_us"] for cell in part) for part in (cells, towers))
            out.append(f"- {name}, {group}, {index}: {', '.join(said)}; {ours / theirs:.2f} times the query time.")
    return "\n".join(out)


def why(study: Study) -> str:
    """What the runs say of where a gain would come from: the scorer without codes, and how both sides are trained."""
    paragraphs = []
    said, less = [], True
    for name, group in compared():
        ours, theirs = (
            study.find(kind="test", data=name, side=side, group=group) for side in ("SparCode", "two towers")
        )
        # Where there are many items, tokens as they are were measured on other users than the indexes.
        if ours and theirs and name in TUNED:
            free = statistics.fmean(run["unquantised"]["ndcg@50"] for run in ours)
            flat = statistics.fmean(run["indexes"]["DenseIndex flat"]["ndcg@50"] for run in theirs)
            said.append(f"{free:.4f} against {flat:.4f} ({group})")
            less = less and free <= flat
    if said:
        begin = "It is not the codes that cost" if less else "Without the codes"
        paragraphs.append(
            f"{begin}: NDCG@50 on ml-100k of SparCode's tokens "
            f"as they are, by its scorer, against the vector of two towers is {'; '.join(said)}."
        )
    best = {}
    for group in ("mean", "mean, trained as the source"):
        for side in ("two towers", "SparCode"):
            runs = study.find(kind="tuning", data="ml-100k", side=side, group=group)
            best[group, side] = max((run["best"][CHOICE] for run in runs), default=None)
    if None not in best.values():
        source = [best["mean, trained as the source", side] for side in ("two towers", "SparCode")]
        ours = [best["mean", side] for side in ("two towers", "SparCode")]
        nor = "Nor the training" if source[1] <= source[0] else "Of the training"
        paragraphs.append(
            f"{nor}: best NDCG@50 on the validation likes of ml-100k is {ours[0]:.4f} for two towers and {ours[1]:.4f} "
            f"for SparCode as they are trained here, {source[0]:.4f} and {source[1]:.4f} trained as the source. "
            "The source reports 3 to 8 % for MovieLens-10M, over towers trained with ten negatives; its 70 % are of "
            "Deezer, whose users are known by features alone, and which is not among the data here."
        )
    return "\n\n".join(textwrap.fill(paragraph, 118) for paragraph in paragraphs)


def lost(study: Study) -> str:
    """What the codes cost: SparCode by its tokens as they are, by codes, and by the rows that were cut."""
    head = ["data", "encoder", "model", "tokens or vectors", "Recall@20", "Recall@50", "NDCG@20", "NDCG@50"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    columns = ("recall@20", "recall@50", "ndcg@20", "ndcg@50")

    def line(name: str, group: str, side: str, what: str, cells: list[dict[str, float]]) -> None:
        row = [name, group, side, what, *(f"{statistics.fmean(c[m] for c in cells):.4f}" for m in columns)]
        out.append("| " + " | ".join(row) + " |")

    for name, group in compared():
        runs = study.find(kind="test", data=name, side="SparCode", group=group)
        side = "SparCode, test"
        if runs:
            line(name, group, side, "as they are", [run["unquantised"] for run in runs])
            line(name, group, side, "coded, all items of a row", [run["exact"] for run in runs])
            for index in dict.fromkeys(index for run in runs for index in run["indexes"]):
                cells = [run["indexes"][index] for run in runs if index in run["indexes"]]
                line(name, group, side, f"coded, {index}", cells)
        for run in study.find(kind="coded queries", data=name) if group == "mean" else ():
            for what, cell in run["codes"].items():
                coded = "as they are" if what == "none" else f"coded after training, {what} ({cell['bits']:.0f} bits)"
                line(name, group, "two towers, validation", coded, [cell])
    return "\n".join(out)


def tuned(study: Study) -> str:
    head = ["data", "encoder", "model", "configuration", "best epoch of"]
    head += ["Recall@20", "Recall@50", "NDCG@20", "NDCG@50"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for run in study.find(kind="tuning"):
        options = {**run["options"], "lr": run["lr"], "weight_decay": run["decay"]}
        if run["side"] == "SparCode":
            options["quantised from epoch"] = run["free"] + 1
        said = ", ".join(f"{key} {value}" for key, value in options.items())
        row = [run["data"], run.get("group", "mean"), run["side"], said, f"{run['best']['epoch']} of {run['epochs']}"]
        row += [f"{run['best'][m]:.4f}" for m in ("recall@20", "recall@50", "ndcg@20", "ndcg@50")]
        out.append("| " + " | ".join(row) + " |")
    return "\n".join(out)


def report(study: Study) -> None:
    load = [run["load"] for run in study.runs]
    paragraphs = (
        "Two towers is `models.DSSM`: the encoder of SparCode, one vector of 64, dot product and item bias. Same "
        "negatives, loss, batches, optimiser and, on Gowalla, the same embeddings to begin with (truncated SVD of the "
        "normalised interactions). Settings common to both sides: "
        + "; ".join(f"{name}: {options}" for name, options in COMMON.items())
        + ".",
        'Encoders: "mean", the mean of the history weighted by age; "GRU", its last state; "self-attention", the '
        'last event after two causal blocks; each with an MLP of 128 beside it. "Mean, trained as the source" is the '
        "mean with what the source's program does: the softmax of a positive and ten uniform items of its own, no item "
        "bias, the plain mean of the history without the user's id, an MLP of three layers; and SparCode of the "
        "source's form, if smaller: shared codebooks from the first step on, an MLP as the scorer. Beside the common "
        "settings: " + "; ".join(f"{name}: {options}" for name, options in GROUPS.items() if options) + ".",
        f"ml-100k: a history predicts the next {WINDOW} likes; asked for the likes of the test split with all before "
        "them as the history. Gowalla: half of a user's train items predict the other half; asked with the last 100 of "
        f"all. Seen items are masked. {ROWS} histories a step.",
        f"CodeIndex has the item vectors in {PQ_BOOKS} codes of {PQ_CODES}. A query is encoding, mask and search for "
        f"one user with one thread. The machine's load while this ran was {min(load, default=0):.1f} to "
        f"{max(load, default=0):.1f}, and a quiet one has 1: above 2, times tell "
        "little.",
    )
    told = "\n\n".join(textwrap.fill(paragraph, 118) for paragraph in paragraphs)
    text = f"""# SparCode against two towers with the same encoder

    python benchmarks/sparcode.py --ml-100k PATH/ml-100k --gowalla PATH/gowalla --seeds 3 --out results

{told}

## Test items

{table(study)}

SparCode against the exact search of two towers, at NDCG@50 with the standard error of the difference where both have
several seeds:

{gains(study)}

{why(study)}

## What the codes cost

On Gowalla measured on some of the users: every hundredth for tokens as they are, every twentieth for the others.

{lost(study)}

## Every configuration that was tried, on validation items

{tuned(study)}
"""
    write_text(study.out / TABLE, text)
    write_text(study.out / RESULTS, json.dumps(study.runs, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="where runs and tables are written")
    parser.add_argument("--ml-100k", type=Path, help="the folder of its files; left out if there is none")
    parser.add_argument("--gowalla", type=Path, help="the folder of its files; left out if there is none")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of the final trainings")
    parser.add_argument("--models", type=Path, help="where trained models are kept, to measure their indexes again")
    parser.add_argument("--cache", type=Path, help="where prepared data are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--groups", default=";".join(GROUPS), help="which of them, separated by semicolons")
    parser.add_argument("--report", action="store_true", help="train nothing, write the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    groups = arguments.groups.split(";")
    for group in groups:
        if group not in GROUPS:
            parser.error(f"--groups: {group!r} is none of {'; '.join(GROUPS)}")
    study = Study(arguments.out, cache=arguments.cache, models=arguments.models)
    paths = {"ml-100k": arguments.ml_100k, "gowalla": arguments.gowalla}
    for name, path in paths.items():
        if path is None or arguments.report:
            continue
        for group in groups_of(name):
            if group not in groups:
                continue
            study.tune(name, path, group)
            for seed in range(arguments.seeds):
                for side in ("two towers", "SparCode"):
                    study.test(name, path, side, seed, group)
                    report(study)
            if group == "mean":
                study.coded_queries(name, path)
    report(study)


if __name__ == "__main__":
    main()
