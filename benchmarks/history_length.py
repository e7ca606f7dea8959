"""Rankers over long histories: accuracy and time against the length of the history.

    python benchmarks/history_length.py --seeds 3 --ml-100k PATH/ml-100k --out results

Every finished training is a line of OUT/runs.jsonl and is not done again; OUT/history_length.md and
OUT/history_length.png are written after each seed (`--report` writes them from what is there).

The data come from the built-in generator: users with 10,000 events before the log begins, in eras of different topics,
of which the latest are the shortest; a click depends on how often the whole past has the topic of the item. A request
is 20 items shown to a user at a time, which share the user's history. Every model is given the last L events of it,
passes once over the requests of the first 80 % of the log, and is measured on those of the rest, which take part in no
choice: each model has one set of options, and there is no stopping early. Only lengths differ within a row of the
table.

On MovieLens 100K every model is given whole histories, trains for two epochs and is measured on the test split, at the
epoch with the best AUC on the validation split.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recfast import data, metrics, models
from recfast.data.synthetic import Generator, bayes
from recfast.files import atomic_path, write_text

LENGTHS = (50, 200, 1000, 5000, 10_000)
CANDIDATES = 20
DATA = {
    "rows": 60_000,
    "n_users": 1000,
    "n_items": 100,
    "list_length": CANDIDATES,
    "days": 7,
    "history_length": LENGTHS[-1],
    # The past decides: what else could tell clicks apart is small or left out.
    "history": 1.0,
    "history_noise": 0.02,
    "bias": -2.0,
    "taste": 0.0,
    "quality": 0.2,
    "price": 0.1,
    "diversity": 0.0,
    "drift": 0.0,
    "examination": 0.0,
    "cold_users": 0.0,
    "policy_taste": 0.0,
    "policy_quality": 0.0,
    "policy_popularity": 0.0,
}
REQUESTS = 8  # a training step
DENSE_LR, TABLE_LR = 5e-3, 0.1
ML_EPOCHS, ML_REQUESTS, ML_NEGATIVES = 2, 128, 1
RUNS, TABLE, PLOT = "runs.jsonl", "history_length.md", "history_length.png"


@dataclass(frozen=True)
class Model:
    """A row of the table: `options(length)` beside those that all models have."""

    name: str
    build: str
    options: Callable[[int], dict[str, Any]] = lambda length: {}
    # Of the embeddings at the start: products with small ones learn slowly, sums of products with large ones fail.
    init_std: float = 0.2
    # Whether its answer depends on the history; if not, one length is enough.
    reads: bool = True
    note: str = ""


MODELS = [
    Model("DeepFM, no history", "DeepFM", init_std=0.05, reads=False, note="the fields alone"),
    Model("DeepFM, mean of the history", "DeepFM", init_std=0.05, note="one vector a user, whatever the candidate"),
    Model(
        "DIN",
        "DIN",
        lambda length: {"attention_hidden": [16], "attention_mode": "softmax"},
        note="activation unit of one layer of 16, softmax",
    ),
    Model("SDIM", "SDIM", lambda length: {"hashes": 16, "bits": 4}, note="16 tables of 4 bits"),
    Model("ETA", "ETA", note="64 bits; k = S = 50"),
    Model(
        "SIM, hard",
        "SIM",
        lambda length: {"search": "hard", "category": "genre"},
        note="by the genre, which has four topics; k = S = 50",
    ),
    Model("SIM, soft", "SIM", note="k = S = 50"),
    Model("TWIN", "TWIN", note="k = S = 50"),
    Model("DARE", "DARE", lambda length: {"attention_dim": 8, "top_k": None}, note="8 wide, all events"),
    Model("QIN", "QIN", lambda length: {"divisor": length / 100}, note="divisor L / 100; its own head"),
]


def built(model: Model, dataset: data.Dataset, length: int, dim: int, seed: int) -> torch.nn.Module:
    """The model for a data set, with what it learns before training."""
    schema = dataset.schema
    if not model.reads:
        schema = replace(schema, columns=tuple(column for column in schema.columns if column.kind != "sequence"))
    options = {"dim": dim, "tables": {"lr": TABLE_LR, "init_std": model.init_std, "seed": seed}}
    if model.build != "QIN":
        options["hidden"] = [64, 32]
    torch.manual_seed(seed)
    ranker = models.build(model.build, schema, {**options, **model.options(length)})
    if hasattr(ranker, "prepare"):
        ranker.prepare(dataset)
    return ranker


def one_epoch(ranker: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: data.Loader) -> list[float]:
    """Train, and return the seconds of each step, the loader's work left out."""
    ranker.train()
    seconds = []
    for batch in loader:
        started = time.perf_counter()
        loss = ranker.loss(ranker(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.inference_mode()
def scores(ranker: torch.nn.Module, splits: Iterable[Any], requests: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Logits and labels of all rows, and the seconds of each call whose histories are as long as they may be."""
    ranker.eval()
    logits, labels, seconds = [], [], []
    for split in splits:
        for batch in data.Loader(split, requests, shared=True):
            started = time.perf_counter()
            logits.append(ranker(batch))
            took = time.perf_counter() - started
            # A user that the train split does not have has no history.
            full = (batch.sequences[c.name].lengths().min() == c.max_length for c in split.schema.sequences)
            seconds += [took] * all(full)
            labels.append(batch.label)
    return torch.cat(logits).double().numpy(), torch.cat(labels).numpy(), seconds


def measured(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(labels).double()
    )
    return {"auc": metrics.auc(labels, logits), "logloss": loss.item()}


@dataclass
class Study:
    """Trains what is not yet trained, and remembers it."""

    out: Path
    dim: int = 16
    cache: Path | None = None
    ml_100k: Path | None = None
    # Options of the generator, in place of some of DATA.
    own: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = self.out / RUNS
        self.out.mkdir(parents=True, exist_ok=True)
        self.options = {**DATA, **self.own}
        self.refresh()

    def refresh(self) -> None:
        """Read what is there; a line that was cut off is a run that was not done."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self.path, whole)
        self.runs = [json.loads(line) for line in whole.splitlines()]

    @cached_property
    def generated(self) -> data.Dataset:
        return data.load("synthetic", cache=self.cache, max_length=self.options["history_length"], **self.options)

    @cached_property
    def movies(self) -> data.Dataset:
        return data.load("ml-100k", self.ml_100k, cache=self.cache, negatives=ML_NEGATIVES, max_length=10_000)

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        wanted = {"dim": self.dim, **wanted}
        return [run for run in self.runs if all(run.get(key) == value for key, value in wanted.items())]

    def remember(self, **run: Any) -> None:
        run = {"dim": self.dim, **run, "load": os.getloadavg()[0]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs.append(run)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in run.items()}, flush=True)

    def limit(self) -> None:
        """What the best possible model reaches on the rows that are measured."""
        wanted = {"data": "generated", "model": "the truth"}
        if not self.find(**wanted):
            generator = Generator(**self.options)
            held_out = generator.frame()[len(self.generated.train) :]
            best = bayes(generator.truth_of(held_out)["p_click"].to_numpy())
            self.remember(**wanted, auc=best["auc"], logloss=best["logloss"])

    def run(self, model: Model, length: int, seed: int) -> None:
        wanted = {"data": "generated", "model": model.name, "length": length, "seed": seed}
        if self.find(**wanted):
            return
        dataset = self.generated.limited(length)
        ranker = built(model, dataset, length, self.dim, seed)
        optimizer = torch.optim.Adam(ranker.parameters(), lr=DENSE_LR)
        loader = data.Loader(dataset.train, REQUESTS, shuffle=True, seed=seed, shared=True)
        steps = one_epoch(ranker, optimizer, loader)
        logits, labels, calls = scores(ranker, (dataset.valid, dataset.test), 1)
        self.remember(
            **wanted,
            **measured(logits, labels),
            train_ms=1e3 * min(steps),
            score_ms=1e3 * min(calls),
        )

    def run_movies(self, model: Model, seed: int) -> None:
        wanted = {"data": "ml-100k", "model": model.name, "seed": seed}
        if self.find(**wanted):
            return
        dataset = self.movies
        longest = int(dataset.history("all").lengths().max())
        ranker = built(model, dataset, longest, self.dim, seed)
        optimizer = torch.optim.Adam(ranker.parameters(), lr=DENSE_LR)
        loader = data.Loader(dataset.train, ML_REQUESTS, shuffle=True, seed=seed, shared=True)
        best: dict[str, Any] = {}
        for epoch in range(ML_EPOCHS):
            loader.set_epoch(epoch)
            one_epoch(ranker, optimizer, loader)
            valid = measured(*scores(ranker, [dataset.valid], ML_REQUESTS)[:2])
            if not best or valid["auc"] > best["valid_auc"]:
                best = {"epoch": epoch + 1, "valid_auc": valid["auc"]}
                best |= measured(*scores(ranker, [dataset.test], ML_REQUESTS)[:2])
        self.remember(**wanted, **best)


def spread(values: list[float], digits: int = 4) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def lines(study: Study, seeds: int) -> Iterator[tuple[Model, dict[int, list[dict[str, Any]]]]]:
    """Each model with its runs by length; one that does not read the history has those of the shortest."""
    for model in MODELS:
        cells = {}
        for length in LENGTHS:
            found = [
                r
                for seed in range(seeds)
                for r in study.find(data="generated", model=model.name, length=length, seed=seed)
            ]
            if found:
                cells[length] = found
        yield model, cells


def table(study: Study, seeds: int) -> str:
    """AUC at each length, times at the shortest, the middle and the longest, and MovieLens."""
    timed = (LENGTHS[0], LENGTHS[2], LENGTHS[-1])
    head = ["model", *(f"AUC, L = {length:,}" for length in LENGTHS), "log loss, longest"]
    head += ["ms a training step, L = " + " / ".join(f"{length:,}" for length in timed)]
    head += ["ms a request scored", "ml-100k AUC"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    # The best of a length, among those that were trained with it by all seeds at hand.
    rows = list(lines(study, seeds))
    top = {
        length: max(
            (statistics.fmean(r["auc"] for r in cells[length]) for _, cells in rows if length in cells), default=0
        )
        for length in LENGTHS
    }
    for model, cells in rows:
        row = [f"{model.name} ({model.note})" if model.note else model.name]
        for length in LENGTHS:
            found = [run["auc"] for run in cells.get(length, [])]
            text = spread(found) if found else ""
            row.append(f"**{text}**" if found and statistics.fmean(found) == top[length] else text)
        longest = cells.get(LENGTHS[-1] if model.reads else LENGTHS[0], [])
        row.append(spread([run["logloss"] for run in longest]) if longest else "")
        for key in ("train_ms", "score_ms"):
            row.append(
                " / ".join(f"{min(r[key] for r in cells[length]):.3g}" if length in cells else "" for length in timed)
                if model.reads
                else f"{min(r[key] for r in cells[LENGTHS[0]]):.3g}" * (LENGTHS[0] in cells)
            )
        movies = [
            run["auc"] for seed in range(seeds) for run in study.find(data="ml-100k", model=model.name, seed=seed)
        ]
        row.append(spread(movies) if movies else "")
        out.append("| " + " | ".join(row) + " |")
    truth = study.find(data="generated", model="the truth")
    if truth:
        out.append(
            f"| the truth itself | {' | '.join([''] * 4)} | {truth[0]['auc']:.4f} | {truth[0]['logloss']:.4f} | | | |"
        )
    return "\n".join(out)


def counts(study: Study, seeds: int) -> str:
    """How many seeds stand behind the cells."""
    seen: dict[int, set[int]] = {}
    for _, cells in lines(study, seeds):
        for length, found in cells.items():
            seen.setdefault(length, set()).add(len(found))
    said = {length: f"{min(n)} to {max(n)}" if len(n) > 1 else f"{min(n)}" for length, n in sorted(seen.items())}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{n} at L = {length:,}" for length, n in said.items())


def markdown(study: Study, seeds: int) -> str:
    options = study.options
    load = [run["load"] for run in study.runs if "load" in run]
    paragraphs = (
        f"Generated data: {options['rows']:,} rows, {options['list_length']} candidates a request; "
        f"{options['n_users']:,} users with {options['history_length']:,} events each before the log begins; "
        f"{options['n_items']} items of 48 topics. A click depends on the count of the item's topic over all of these "
        "events. L is how many of the latest ones a model is given. One pass over the first 80 % of the requests, "
        f"{REQUESTS} a step; AUC and log loss on the other 20 %. D = {study.dim}, Adam at {DENSE_LR:g}, tables at "
        f"{TABLE_LR:g} (row-wise Adagrad), MLP (64, 32).",
        f"Seeds (of weights and order; the data are the same) behind each cell: {counts(study, seeds)}. Mean ± "
        "standard deviation where there are several. In bold the best of a length.",
        "Times are the least of all steps, or requests with full histories, of the trainings, on one thread: a step is "
        f"forward, backward and update of {REQUESTS} requests; a request is scored by itself. The machine's load while "
        f"this ran was {min(load, default=0):.1f} to {max(load, default=0):.1f}, and a quiet one has 1: above 2, times "
        "tell little more than which is the larger.",
        f"MovieLens 100K: whole histories, {ML_NEGATIVES} drawn negative a like, test AUC at the better of {ML_EPOCHS} "
        "epochs by the validation AUC; seed 0 alone.",
    )
    told = "\n\n".join(textwrap.fill(paragraph, 118) for paragraph in paragraphs)
    return f"""# Rankers against the length of the history

    python benchmarks/history_length.py --seeds {seeds} --ml-100k PATH/ml-100k --out results

{told}

{table(study, seeds)}
"""


def plot(study: Study, seeds: int, path: Path) -> None:
    """AUC, time of training and time of scoring against the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 5))
    titles = (
        "AUC on held-out requests",
        f"ms a training step ({REQUESTS} requests of {CANDIDATES})",
        f"ms to score {CANDIDATES} candidates",
    )
    colours = pyplot.get_cmap("tab10").colors
    for (model, cells), colour in zip(lines(study, seeds), colours, strict=False):
        if not cells:
            continue
        style = {"color": colour, "label": model.name}
        for panel, key in zip(panels, ("auc", "train_ms", "score_ms"), strict=True):
            read = statistics.fmean if key == "auc" else min
            values = [read([run[key] for run in found]) for found in cells.values()]
            if model.reads:
                panel.plot(list(cells), values, marker="o", markersize=4, **style)
            else:
                panel.axhline(values[0], linestyle=":", **style)
    truth = study.find(data="generated", model="the truth")
    if truth:
        panels[0].axhline(truth[0]["auc"], color="black", linestyle="--", linewidth=1, label="the truth itself")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_xscale("log")
        panel.set_xticks(LENGTHS, [f"{length // 1000}k" if length % 1000 == 0 else f"{length}" for length in LENGTHS])
        panel.minorticks_off()
        panel.set_xlabel("events of the history")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    for panel in panels[1:]:
        panel.set_yscale("log")
        for kind in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            kind(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def report(study: Study, seeds: int) -> None:
    write_text(study.out / TABLE, markdown(study, seeds))
    plot(study, seeds, study.out / PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="where runs, table and plot are written")
    parser.add_argument("--ml-100k", type=Path, help="the folder of its files; left out if there is none")
    parser.add_argument("--models", help="names of MODELS, separated by semicolons; all if left out")
    parser.add_argument("--lengths", help="comma-separated; all if left out")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every cell (MovieLens: one)")
    parser.add_argument("--cache", type=Path, help="where prepared data are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="train nothing, write table and plot")
    arguments = parser.parse_args()
    known = [model.name for model in MODELS]
    wanted = arguments.models.split(";") if arguments.models else known
    for name in wanted:
        if name not in known:
            parser.error(f"--models: {name!r} is none of {'; '.join(known)}")
    lengths = [int(part) for part in arguments.lengths.split(",")] if arguments.lengths else list(LENGTHS)
    torch.set_num_threads(arguments.threads)
    study = Study(arguments.out, cache=arguments.cache, ml_100k=arguments.ml_100k)
    chosen = [model for model in MODELS if model.name in wanted]
    if not arguments.report:
        study.limit()
        # The first seed of everything, then MovieLens, then the others: a table with one seed is there early.
        for seed in range(arguments.seeds):
            for length, model in itertools.product(lengths, chosen):
                if model.reads or length == lengths[0]:
                    study.run(model, length if model.reads else LENGTHS[0], seed)
            if seed == 0 and study.ml_100k is not None:
                for model in chosen:
                    study.run_movies(model, seed)
            report(study, arguments.seeds)
    report(study, arguments.seeds)


if __name__ == "__main__":
    main()
