"""Ways to make embedding tables small, at equal memory: accuracy of DeepFM and DCNv2 on Frappe.

    python benchmarks/compression.py --data PATH/frappe --seeds 3 --models DeepFM,DCNv2 --out results

Every finished training is a line of OUT/runs.jsonl and is not done again; OUT/compression_frappe.md and
OUT/compression.png are written at the end (`--report` writes them from what is there).

The protocol, the same for every method: the published split; the model, its dense optimiser (Adam) and the tables of
DeepFM's linear part (float32) are fixed, only the D-wide tables change. The options of a method are chosen by the AUC
on the validation split with the first seed, from the grid in `METHODS`, the epoch by the same AUC in every run. The
test split is read once an epoch and takes part in no choice.

A point of memory is the bytes that rows of 8, 4 or 2 bits take with their step sizes; hashing, quotient-remainder,
ROBE and pruning get at most the same bytes, with all that they need to serve.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recfast import data, models, nn, train
from recfast.files import atomic_path, write_text
from recfast.ops.formats import row_bytes

POINTS = ("32", "8", "4", "2")
LR = (0.05, 0.1, 0.2, 0.4)
DENSE_LR, LINEAR_LR = 1e-3, 0.1


@dataclass(frozen=True)
class Method:
    """A row of the table for each point of memory.

    `build(schema, dim, point, seed, steps, **options)` gives the tables; `steps` is the number of steps of an epoch.
    """

    name: str
    build: Callable[..., torch.nn.Module]
    grid: dict[str, tuple]
    points: tuple[str, ...] = ("8", "4", "2")
    # The point whose choice of options holds for the others; each chooses its own if this is None.
    tuned_at: str | None = None
    note: str = ""

    def choices(self) -> list[dict[str, Any]]:
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def ratio(point: str, dim: int) -> float:
    """The bytes of a row at a point of memory, as a share of the float32 row."""
    return row_bytes("float32" if point == "32" else f"int{point}", dim) / (4 * dim)


def embedding_tables(schema, dim, point, seed, steps, **options):
    precision = "float32" if point == "32" else f"int{point}"
    return nn.EmbeddingTables(schema, dim, precision, seed=seed, **options)


def hashing(schema, dim, point, seed, steps, **options):
    return nn.HashedTables(schema, dim, ratio=ratio(point, dim), seed=seed)


def quotient_remainder(schema, dim, point, seed, steps, **options):
    return nn.QuotientRemainderTables(schema, dim, ratio=ratio(point, dim), operation="mult", seed=seed)


def robe(schema, dim, point, seed, steps, **options):
    return nn.RobeTables(schema, dim, ratio=ratio(point, dim), block=min(8, dim), seed=seed)


def pruning(schema, dim, point, seed, steps, **options):
    # From the end of the first epoch to that of the sixth.
    return nn.PrunedTables(schema, dim, ratio=ratio(point, dim), begin=steps, end=6 * steps - 1, seed=seed)


def low_precision(**fixed: Any) -> Callable[..., torch.nn.Module]:
    def build(schema, dim, point, seed, steps, **options):
        return embedding_tables(schema, dim, point, seed, steps, **fixed, **options)

    return build


PARAMETERS = "parameters, Adagrad"
METHODS = [
    Method("float32", embedding_tables, {"lr": LR}, ("32",), note="row-wise Adagrad"),
    Method(
        "float32, Adagrad a weight",
        low_precision(optimizer="adagrad"),
        {"lr": LR},
        ("32",),
        note="the optimiser of the methods with parameters",
    ),
    Method("hashing", hashing, {"lr": LR}, tuned_at="4", note=PARAMETERS),
    Method("quotient-remainder", quotient_remainder, {"lr": LR}, tuned_at="4", note=f"product; {PARAMETERS}"),
    Method("ROBE", robe, {"lr": LR}, tuned_at="4", note=f"blocks of 8; {PARAMETERS}"),
    Method("pruning", pruning, {"lr": LR}, tuned_at="4", note=f"gradual, global; {PARAMETERS}"),
]
# What is made of each float32 run without training: (name, step).
AFTERWARDS = [("post-training, largest step", "max"), ("post-training, best step", "mse")]


@dataclass
class Study:
    """Trains what is not yet trained, and remembers it."""

    dataset: data.Dataset
    out: Path
    dim: int
    batch_size: int
    epochs: int
    patience: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = self.out / "runs.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.runs = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        settings = {"dim": self.dim, "batch_size": self.batch_size, "epochs": self.epochs, "patience": self.patience}
        wanted = {**settings, **wanted}
        return [run for run in self.runs if all(run[key] == value for key, value in wanted.items())]

    def run(self, model: str, method: Method, point: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
        known = self.find(model=model, method=method.name, point=point, seed=seed, options=options)
        if known:
            return known[0]
        about = {
            "model": model,
            "method": method.name,
            "point": point,
            "seed": seed,
            "options": options,
            "dim": self.dim,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "patience": self.patience,
        }
        steps = -(-len(self.dataset.train) // self.batch_size)
        torch.manual_seed(seed)
        built = models.build(model, self.dataset.schema, {"dim": self.dim, "tables": {"lr": LINEAR_LR, "seed": seed}})
        built.tables = method.build(self.dataset.schema, self.dim, point, seed, steps, **options)
        result = self._train(built, options["lr"], seed)
        lines = [{**about, **result}]
        if method.name == "float32":
            lines += self._afterwards(built, about)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self.runs += lines
        print(
            f"{model} {method.name} {point} seed {seed} {options}: valid {result['valid_auc']:.4f} "
            f"test {result['test_auc']:.4f} / {result['test_logloss']:.4f} epoch {result['epoch']} "
            f"{result['seconds']:.1f} s/epoch",
            flush=True,
        )
        return lines[0]

    def _train(self, model: torch.nn.Module, lr: float, seed: int) -> dict[str, Any]:
        own = list(model.tables.parameters())
        others = {id(parameter) for parameter in own}
        optimizers = [torch.optim.Adam([p for p in model.parameters() if id(p) not in others], lr=DENSE_LR)]
        if own:
            optimizers.append(torch.optim.Adagrad(own, lr=lr))
        loader = data.Loader(self.dataset.train, self.batch_size, shuffle=True, seed=seed)
        seconds, best, weights, stale = [], None, None, 0
        for epoch in range(self.epochs):
            loader.set_epoch(epoch)
            model.train()
            started = time.perf_counter()
            for batch in loader:
                loss = model.loss(model(batch), batch)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
            seconds.append(time.perf_counter() - started)
            if not getattr(model.tables, "finished", True):
                # Pruning is under way: the tables are still larger than allowed.
                continue
            valid = train.evaluate(model, self.dataset.valid)
            if best is None or valid["auc"] > best["valid_auc"]:
                test = train.evaluate(model, self.dataset.test)
                best = {
                    "epoch": epoch + 1,
                    "valid_auc": valid["auc"],
                    "valid_logloss": valid["logloss"],
                    "test_auc": test["auc"],
                    "test_logloss": test["logloss"],
                }
                weights, stale = copy.deepcopy(model.state_dict()), 0
            else:
                stale += 1
                if stale >= self.patience:
                    break
        if best is None:
            raise SystemExit(f"compression: pruning did not end within {self.epochs} epochs")
        model.load_state_dict(weights)
        return {
            **best,
            "trained": len(seconds),
            "seconds": statistics.median(seconds),
            "bytes": serving_bytes(model.tables),
            "training_bytes": training_bytes(model.tables, optimizers),
            "saturated": int(getattr(model.tables, "saturated", 0)),
        }

    def _afterwards(self, model: torch.nn.Module, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
        trained = model.tables
        for name, step in AFTERWARDS:
            for point in ("8", "4", "2"):
                model.tables = nn.PostTrainingTables(trained, int(point), step=step)
                valid, test = (train.evaluate(model, split) for split in (self.dataset.valid, self.dataset.test))
                yield {
                    **about,
                    "method": name,
                    "point": point,
                    "epoch": 0,
                    "valid_auc": valid["auc"],
                    "valid_logloss": valid["logloss"],
                    "test_auc": test["auc"],
                    "test_logloss": test["logloss"],
                    "trained": 0,
                    "seconds": 0.0,
                    "bytes": model.tables.memory_bytes(),
                    "training_bytes": training_bytes(trained, []),
                    "saturated": 0,
                }
        model.tables = trained

    def choose(self, model: str, method: Method, point: str, seed: int) -> dict[str, Any]:
        """The options that do best on the validation split."""
        tried = [self.run(model, method, method.tuned_at or point, seed, options) for options in method.choices()]
        return max(tried, key=lambda run: run["valid_auc"])["options"]

    def everything(self, names: Iterable[str], methods: Iterable[Method], seeds: int) -> None:
        # First seeds of everything, then the others: a table with one seed is there early.
        cells = [(model, method, point) for method in methods for model in names for point in method.points]
        for model, method, point in cells:
            self.run(model, method, point, 0, self.choose(model, method, point, 0))
        for seed in range(1, seeds):
            for model, method, point in cells:
                self.run(model, method, point, seed, self.choose(model, method, point, 0))


def serving_bytes(tables: torch.nn.Module) -> int:
    """Bytes of the D-wide tables as they are served."""
    if isinstance(tables, nn.EmbeddingTables):
        rows = sum(rows for _, rows in tables.specs)
        return rows * row_bytes(tables.precision, tables.dim)
    return tables.memory_bytes()


def training_bytes(tables: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the D-wide tables in training with their optimiser's state, gradients aside."""
    if isinstance(tables, nn.EmbeddingTables):
        return tables.memory_bytes()
    own = set(tables.parameters())
    state = [
        value
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        if parameter in own
        for value in values.values()
    ]
    held = [*own, *(value for _, value in tables.named_buffers()), *state]
    return sum(value.numel() * value.element_size() for value in held if torch.is_tensor(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="the folder of Frappe's files")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--models", default="DeepFM,DCNv2")
    parser.add_argument("--methods", help="names of METHODS, comma-separated; all if left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=15, help="at most")
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.models.split(",")
    wanted = arguments.methods.split(",") if arguments.methods else [method.name for method in METHODS]
    dataset = data.load("frappe", arguments.data)
    study = Study(dataset, arguments.out, arguments.dim, arguments.batch_size, arguments.epochs, arguments.patience)
    if not arguments.report:
        study.everything(names, [method for method in METHODS if method.name in wanted], arguments.seeds)


if __name__ == "__main__":
    main()
