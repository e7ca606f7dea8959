"""Collaborative filtering on ml-100k, with everything chosen on validation likes.

    python benchmarks/ml_100k.py --data PATH/ml-100k --out results

The log is cut in time for each user: 80 % train, 10 % valid, 10 % test. Of each model a few configurations are prepared
or trained once; the one with the best NDCG@20 on the validation likes, and its best epoch, are taken for three seeds,
and the test likes are looked at once. Every finished run is an entry of OUT/ml_100k.json and is not done again;
OUT/ml_100k.md is written after each (`--report` writes it from what is there).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recfast import data, models, train
from recfast.files import write_json, write_text

RESULTS, TABLE = "ml_100k.json", "ml_100k.md"
CHOICE, CUTS = "ndcg@20", (20, 50)


@dataclass(frozen=True)
class Model:
    """A row of the table: what its options are chosen from; `settings` None where there is nothing to train."""

    name: str
    build: str
    choices: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    settings: dict[str, Any] | None = None


FIT = {"epochs": 15, "batch_size": 512, "lr": 5e-3, "patience": 3, "monitor": CHOICE}
MODELS = [
    Model("popularity", "Popularity"),
    Model("ItemKNN", "ItemKNN", [{"decay": decay} for decay in (1.0, 0.95, 0.9)]),
    Model("GF-CF", "GFCF", [{"rank": rank, "ideal": ideal} for rank in (32, 64) for ideal in (0.0, 0.3)]),
    Model("EASE", "EASE", [{"ridge": ridge} for ridge in (50.0, 200.0, 800.0)]),
    Model(
        "MF-CCL",
        "MF",
        [{"margin": m, "weight": w, "init_std": 0.1, "dropout": 0.3} for m, w in ((0.5, 10.0), (0.3, 10.0))],
        FIT,
    ),
    Model("SimpleX", "SimpleX", [{}, {"margin": 0.3}], FIT),
    Model("two-tower", "TwoTower", [{}, {"history_dropout": 0.5}], {**FIT, "lr": 2e-3}),
]


class Study:
    """Does what is not yet done, and remembers it."""

    def __init__(self, out: Path, dataset: data.Dataset | None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dataset = out, dataset
        self.kept: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {}

    @property
    def runs(self) -> list[dict[str, Any]]:
        place = self.out / RESULTS
        return json.loads(place.read_text(encoding="utf-8")) if place.exists() else []

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run.get(key) == value for key, value in wanted.items())]

    def remember(self, **run: Any) -> None:
        run = {**run, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        write_json(self.out / RESULTS, [*self.runs, run])
        print(run, flush=True)

    def trained(self, model: Model, options: dict[str, Any], seed: int) -> tuple[torch.nn.Module, dict[str, Any]]:
        """A model prepared or trained, and what that took; what seed 0 learnt when it was tried is not learnt again."""
        key = json.dumps([model.name, options, seed])
        if key not in self.kept:
            seeded = {"seed": seed} if "seed" in models.options(model.build) else {}
            retriever = models.build(model.build, self.dataset.schema, {**options, **seeded})
            started, cpu, result = time.perf_counter(), time.process_time(), {}
            if model.settings is None:
                retriever.prepare(self.dataset)
            else:
                run = train.fit(retriever, self.dataset, seed=seed, **model.settings)
                result = {"epochs": run.epochs, "best_epoch": run.best["epoch"] + 1}
            result |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
            self.kept[key] = retriever, result
        return self.kept[key]

    def measured(self, kind: str, split: str, model: Model, options: dict[str, Any], seed: int) -> None:
        """Measure on one split, unless that was done."""
        wanted = {"kind": kind, "model": model.name, "options": options, "seed": seed}
        if not self.find(**wanted):
            retriever, result = self.trained(model, options, seed)
            found = train.evaluate(retriever, getattr(self.dataset, split), dataset=self.dataset, k=CUTS)
            self.remember(**wanted, **result, **found)

    def chosen(self, model: Model) -> dict[str, Any] | None:
        """The options that did best on the validation likes; None before all were tried."""
        runs = [self.find(kind="choice", model=model.name, options=options) for options in model.choices]
        return max((run for (run,) in runs), key=lambda run: run[CHOICE])["options"] if all(runs) else None

    def run(self, model: Model, seeds: int) -> None:
        for options in model.choices:
            self.measured("choice", "valid", model, options, 0)
        # Without anything to train, one seed is as good as three.
        for seed in range(seeds if model.settings is not None else 1):
            self.measured("test", "test", model, self.chosen(model), seed)
        self.kept.clear()


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def table(study: Study) -> str:
    names = [f"{metric}@{k}" for k in CUTS for metric in ("recall", "ndcg")]
    head = ["model", "chosen, of", *(name.replace("recall", "Recall").replace("ndcg", "NDCG") for name in names)]
    head += ["validation NDCG@20", "epochs (best)", "CPU s", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for model in MODELS:
        runs = study.find(kind="test", model=model.name)
        if not runs:
            continue
        options = runs[0]["options"]
        (choice,) = study.find(kind="choice", model=model.name, options=options)
        said = ", ".join(f"{key} {value}" for key, value in options.items()) or "as it comes"
        cells = [model.name, f"{said}, of {len(model.choices)}"]
        cells += [spread([run[name] for run in runs]) for name in names]
        cells += [f"{choice[CHOICE]:.4f}"]
        cells += [f"{runs[0]['epochs']} ({runs[0]['best_epoch']})" if "epochs" in runs[0] else ""]
        cells += [f"{statistics.fmean(run['cpu_seconds'] for run in runs):.1f}", str(len(runs))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(study: Study) -> None:
    about = (
        "Likes are ratings of 4 and 5. Each user's log is cut in time: 80 % train, 10 % valid, 10 % test. "
        "Configuration and epoch are chosen by NDCG@20 on the validation likes with seed 0; the columns are of the "
        "test likes, ranked among all films that the user has not rated before, with all before as the history. Models "
        "learn from train alone. CPU s: preparing or training, with the evaluation after every epoch. Mean ± standard "
        "deviation over the seeds. One split of 943 users: differences below .005 say nothing."
    )
    command = "    python benchmarks/ml_100k.py --data PATH/ml-100k --out results"
    parts = ["# Collaborative filtering on ml-100k, held out", command, textwrap.fill(about, 118), table(study)]
    write_text(study.out / TABLE, "\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    known = [model.name for model in MODELS]
    parser.add_argument("--data", type=Path, help="the folder of its files")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results and table are written")
    parser.add_argument("--models", help="names of MODELS, separated by semicolons; all if left out")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of what is chosen")
    parser.add_argument("--cache", type=Path, help="where prepared data are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="train nothing, write the table")
    arguments = parser.parse_args()
    wanted = arguments.models.split(";") if arguments.models else known
    for name in wanted:
        if name not in known:
            parser.error(f"--models: {name!r} is none of {'; '.join(known)}")
    torch.set_num_threads(arguments.threads)
    if arguments.report:
        report(Study(arguments.out, None))
        return
    study = Study(arguments.out, data.load("ml-100k", arguments.data, negatives=0, cache=arguments.cache))
    for model in MODELS:
        if model.name in wanted:
            study.run(model, arguments.seeds)
            report(study)


if __name__ == "__main__":
    main()
