"""Ways to make embedding tables small, at equal memory: accuracy of DeepFM and DCNv2 on Frappe.

    python benchmarks/compression.py --data PATH/frappe --seeds 3 --models DeepFM,DCNv2 --out results

Every finished training is a line of OUT/runs.jsonl and is not done again; OUT/compression_frappe.md and
OUT/compression.png are written at the end (`--report` writes them from what is there).

The protocol, the same for every method: the published split; the model, its dense optimiser (Adam) and the tables of
DeepFM's linear part (float32) are fixed, only the D-wide tables change. The options of a method are chosen by the AUC
on the validation split with the first seed, from the grid in `METHODS`, the epoch by the same AUC in every run. The
test split takes part in no choice.

A point of memory is the bytes that rows of 8, 4 or 2 bits take with their step sizes; hashing, quotient-remainder,
ROBE and pruning get at most the same bytes, with all that they need to serve.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
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
# Trainings in 2 bits are the longest: what they choose beside lr is chosen with this model for all.
SHARED = {"2": "DeepFM"}


@dataclass(frozen=True)
class Method:
    """A row of the table for each point of memory.

    `build(schema, dim, point, seed, steps, **options)` gives the tables; `steps` is the number of steps of an epoch.
    """

    name: str
    build: Callable[..., torch.nn.Module]
    points: tuple[str, ...] = ("8", "4", "2")
    # Options to choose from at a point, beside the learning rate.
    grid: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # The learning rate is one of LR; or that of float32, halved as long as that helps if `halves`.
    lr_of_float32: bool = False
    halves: bool = False
    # The method whose choice this one takes over.
    like: str | None = None
    # The point whose choice holds for the others; each chooses its own if this is None.
    tuned_at: str | None = None
    note: str = ""


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


def each(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """All combinations."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


# The highest weight that the initial step can hold; as many choices for the fixed step as for the learned one.
FIXED = {
    "8": each(init_range=(0.5, 1.0)),
    "4": each(init_range=(0.125, 0.25, 0.5)),
    "2": each(init_range=(0.1, 0.15, 0.2)),
}
LEARNED = {
    "8": each(init_range=(0.5,), step_lr=(0.003, 0.01)),
    "4": each(init_range=(0.125, 0.25, 0.5), step_lr=(0.01,)),
    "2": each(init_range=(0.1,), step_lr=(0.003, 0.01)) + each(init_range=(0.15,), step_lr=(0.003,)),
}


def in_bits(name: str, note: str, *, like: str | None = None, halves: bool = False, **fixed: Any) -> Method:
    """Tables trained in 8, 4 or 2 bits; weights outside the range of a row are clipped, as published."""
    grid = LEARNED if fixed["step"] == "learned" else FIXED
    build = low_precision(step_range="clip", **fixed)
    return Method(name, build, grid=grid, lr_of_float32=True, halves=halves, like=like, note=note)


PARAMETERS = "parameters, Adagrad"
FLOAT32 = Method("float32", embedding_tables, ("32",), note="row-wise Adagrad")
METHODS = [
    FLOAT32,
    Method(
        "float32, Adagrad a weight",
        low_precision(optimizer="adagrad"),
        ("32",),
        note="the optimiser of the methods with parameters",
    ),
    Method("hashing", hashing, tuned_at="4", note=PARAMETERS),
    Method("quotient-remainder", quotient_remainder, tuned_at="4", note=f"product; {PARAMETERS}"),
    Method("ROBE", robe, tuned_at="4", note=f"blocks of 8; {PARAMETERS}"),
    Method("pruning", pruning, tuned_at="4", note=f"gradual, global; {PARAMETERS}"),
    in_bits("LPT", "fixed step, stochastic", halves=True, step="fixed", rounding="stochastic"),
    in_bits("ALPT", "learned step, stochastic", halves=True, step="learned", rounding="stochastic"),
    in_bits("LPT, nearest", "options of LPT", like="LPT", step="fixed", rounding="nearest"),
    in_bits("ALPT, nearest", "options of ALPT", like="ALPT", step="learned", rounding="nearest"),
    in_bits("ALPT, two passes", "options of ALPT", like="ALPT", step="learned", rounding="stochastic", passes=2),
    Method("ALPT, defaults", embedding_tables, lr_of_float32=True, note="of nn.EmbeddingTables: rows never clipped"),
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
    # False: what is not there is left out.
    trains: bool = True
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = self.out / "runs.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            if not text.endswith("\n"):
                # Stopped while writing: the run of the broken line is done again.
                write_text(self.path, text[: text.rfind("\n") + 1])
        self.refresh()

    def refresh(self) -> None:
        """Read what is there; other processes may work in the same folder, on other models or methods."""
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            self.runs = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        settings = {"dim": self.dim, "batch_size": self.batch_size, "epochs": self.epochs, "patience": self.patience}
        wanted = {**settings, **wanted}
        return [run for run in self.runs if all(run[key] == value for key, value in wanted.items())]

    def run(self, model: str, method: Method, point: str, seed: int, options: dict[str, Any]) -> dict[str, Any] | None:
        wanted = {"model": model, "method": method.name, "point": point, "seed": seed, "options": options}
        known = self.find(**wanted)
        if self.trains and not known:
            self.refresh()
            known = self.find(**wanted)
        if known or not self.trains:
            return known[0] if known else None
        about = {
            **wanted,
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
                if getattr(model.tables, "passes", 1) == 2:
                    # Its gradients of the dense weights are dropped with the next `zero_grad`.
                    with nn.second_pass(model):
                        model.loss(model(batch), batch).backward()
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

    def choose(self, model: str, method: Method, point: str) -> dict[str, Any] | None:
        """The options that do best on the validation split with the first seed; None if runs are missing."""
        point = method.tuned_at or point
        if method.like is not None:
            return self.choose(model, next(other for other in METHODS if other.name == method.like), point)
        rates = LR
        if method.lr_of_float32:
            options = self.choose(model, FLOAT32, "32")
            if options is None:
                return None
            rates = (options["lr"],)
        grid = method.grid.get(point, [{}])
        if point in SHARED and model != SHARED[point] and method.grid:
            shared = self.choose(SHARED[point], method, point)
            if shared is None:
                return None
            grid = [{key: value for key, value in shared.items() if key != "lr"}]
        candidates = [{**options, "lr": lr} for options in grid for lr in rates]
        tried = [self.run(model, method, point, 0, options) for options in candidates]
        if any(run is None for run in tried):
            return None
        best = max(tried, key=lambda run: run["valid_auc"])
        while method.halves:
            lower = self.run(model, method, point, 0, {**best["options"], "lr": best["options"]["lr"] / 2})
            if lower is None:
                return None
            if lower["valid_auc"] <= best["valid_auc"]:
                break
            best = lower
        return best["options"]

    def everything(self, names: Iterable[str], methods: Iterable[Method], seeds: int) -> None:
        # First seeds of everything, then the others: a table with one seed is there early.
        cells = [(model, method, point) for method in methods for model in names for point in method.points]
        for model, method, point in cells:
            self.run(model, method, point, 0, self.choose(model, method, point))
        for seed in range(1, seeds):
            for model, method, point in cells:
                self.run(model, method, point, seed, self.choose(model, method, point))


def serving_bytes(tables: torch.nn.Module) -> int:
    """Bytes of the D-wide tables as they are served."""
    if isinstance(tables, nn.EmbeddingTables):
        return tables.freeze().memory_bytes()
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


@dataclass
class Cell:
    """The runs of a method at a point of memory with one model, one a seed, with the options that were chosen."""

    runs: list[dict[str, Any]]
    seeds: int

    def values(self, key: str) -> list[float]:
        return [run[key] for run in self.runs]

    def mean(self, key: str) -> float:
        return statistics.fmean(self.values(key))

    def deviation(self, key: str) -> float:
        return statistics.stdev(self.values(key)) if len(self.runs) > 1 else 0.0

    def text(self, key: str) -> str:
        both = f"{self.mean(key):.4f}" + (f" ± {self.deviation(key):.4f}" if len(self.runs) > 1 else "")
        return both if len(self.runs) == self.seeds else f"{both} ({len(self.runs)} of {self.seeds} seeds)"


Cells = dict[tuple[str, str, str], Cell]


def collect(study: Study, names: list[str], seeds: int) -> Cells:
    """(model, method, point) -> its runs; a cell may have fewer seeds than were asked for."""
    cells = {}
    for model, method in itertools.product(names, METHODS):
        for point in method.points:
            options = study.choose(model, method, point)
            if options is None:
                continue
            derived = AFTERWARDS if method.name == "float32" else []
            for name, at in [(method.name, point), *((name, bits) for name, _ in derived for bits in POINTS[1:])]:
                runs = [
                    run
                    for seed in range(seeds)
                    for run in study.find(model=model, method=name, point=at, seed=seed, options=options)[:1]
                ]
                if runs:
                    cells[model, name, at] = Cell(runs, seeds)
    return cells


def table(cells: Cells, names: list[str], dim: int) -> str:
    """The Markdown table: a row for each method and point of memory; the best AUC of a point in bold."""
    notes = {method.name: method.note for method in METHODS}
    order = [name for name, _ in AFTERWARDS] + [method.name for method in METHODS if method.points != ("32",)]
    order = [method.name for method in METHODS if method.points == ("32",)] + order
    lines = [
        "| bytes to serve | method | bytes in training | "
        + " | ".join(f"{name} AUC | {name} log loss | epoch | s/epoch" for name in names)
        + " | chosen on validation |",
        "|---" * (4 + 4 * len(names)) + "|",
    ]
    for point in POINTS:
        rows = [name for name in order if any((model, name, point) in cells for model in names)]
        best = {
            model: max(cells[model, name, point].mean("test_auc") for name in rows if (model, name, point) in cells)
            for model in names
            if any((model, name, point) in cells for name in rows)
        }
        for name in rows:
            here = {model: cells.get((model, name, point)) for model in names}
            some = next(cell for cell in here.values() if cell is not None).runs[0]
            parts, chosen = [], []
            for model, cell in here.items():
                if cell is None:
                    parts += ["", "", "", ""]
                    continue
                auc = cell.text("test_auc")
                strong = point != "32" and cell.mean("test_auc") == best[model]
                afterwards = cell.runs[0]["trained"] == 0
                parts += [
                    f"**{auc}**" if strong else auc,
                    cell.text("test_logloss"),
                    "" if afterwards else "/".join(str(run["epoch"]) for run in cell.runs),
                    "" if afterwards else f"{statistics.median(cell.values('seconds')):.1f}",
                ]
                chosen.append(", ".join(f"{key} {value}" for key, value in cell.runs[0]["options"].items()))
            same = len(set(chosen)) == 1
            choice = chosen[0] if same else "; ".join(f"{m}: {c}" for m, c in zip(names, chosen, strict=False))
            note = f" ({notes[name]})" if notes.get(name) else ""
            lines.append(
                f"| {some['bytes']:,} (1/{1 / ratio('32' if point == '32' else point, dim):.3g}) | {name}{note} | "
                f"{some['training_bytes']:,} | " + " | ".join(parts) + f" | {choice} |"
            )
    return "\n".join(lines)


def compare(cells: Cells, names: list[str], title: str, pairs: list[tuple[str, str]], points: Iterable[str]) -> str:
    """Lines that say by how much the first method of each pair is ahead of the second in test AUC, seed by seed."""
    lines = [f"{title}:", ""]
    for (ahead, behind), point, model in itertools.product(pairs, points, names):
        one, two = cells.get((model, ahead, point)), cells.get((model, behind, "32" if behind == "float32" else point))
        if one is None or two is None:
            continue
        seconds = {run["seed"]: run["test_auc"] for run in two.runs}
        gaps = [run["test_auc"] - seconds[run["seed"]] for run in one.runs if run["seed"] in seconds]
        if gaps:
            lines.append(
                f"- {model}, {point} bits, {ahead} less {behind}: {statistics.fmean(gaps):+.5f} "
                f"(seed by seed {' '.join(f'{gap:+.5f}' for gap in gaps)}; "
                f"float32 deviates by {spread(cells, model):.5f})"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def spread(cells: Cells, model: str) -> float:
    cell = cells.get((model, "float32", "32"))
    return float("nan") if cell is None else cell.deviation("test_auc")


def markdown(cells: Cells, names: list[str], seeds: int, study: Study) -> str:
    rows = sum(study.dataset.schema.rows(column.name) for column in study.dataset.schema.categorical)
    goals = [
        compare(cells, names, title, pairs, points)
        for title, pairs, points in (
            ("8 bits against float32", [("ALPT", "float32"), ("ALPT, two passes", "float32")], ("8",)),
            (
                "Stochastic rounding against rounding to nearest",
                [("ALPT", "ALPT, nearest"), ("LPT", "LPT, nearest")],
                ("8", "4", "2"),
            ),
            ("Learned step against fixed step", [("ALPT", "LPT"), ("ALPT, two passes", "LPT")], ("8", "4", "2")),
        )
    ]
    return f"""# Small embedding tables on Frappe

    python benchmarks/compression.py --data PATH/frappe --seeds {seeds} --models {",".join(names)} --out results

Frappe in its published split ({len(study.dataset.train):,} rows to train, {len(study.dataset.valid):,} to validate,
{len(study.dataset.test):,} to test; train negatives re-drawn). {rows:,} rows of D = {study.dim}:
{4 * rows * study.dim:,} bytes in float32. Mean ± standard deviation over {seeds} seeds, at the epoch with the best AUC
on the validation split; the epochs of the seeds are listed. At most {study.epochs} epochs, ended after {study.patience}
without a gain, batches of {study.batch_size}; MLP (200, 80); Adam at {DENSE_LR:g} for the dense part. DCNv2 in
parallel with three full-rank crosses.

Only the D-wide tables are compressed and counted. DeepFM's linear part keeps a float32 for every id in every row of the
table, so DeepFM still tells ids apart that share an embedding; DCNv2 has no such part. Bytes to serve are all that the
method needs for a lookup: step sizes and padding, hash seeds, bitmaps and positions. Bytes in training are those of the
weights and of the optimiser's state, gradients aside. Methods other than quantisation get the bytes of the 8-, 4- and
2-bit rows as their budget. In bold the best AUC at these bytes.

Options are chosen with the first seed on the validation split. lr is one of {", ".join(f"{lr:g}" for lr in LR)} (for
hashing, quotient-remainder, ROBE and pruning at the 4-bit budget). Tables trained in 8, 4 or 2 bits start from the lr
of float32; LPT chooses the initial range, ALPT the initial range and the learning rate of the step, out of as many
choices (in 2 bits with {SHARED["2"]}, for both models); then both try half the lr, as long as it helps. Rounding to
nearest and two passes take these options over. s/epoch is the median, on one thread of a shared machine: a rough size
only.

{table(cells, names, study.dim)}

{chr(10).join(goal + chr(10) for goal in goals if goal)}"""


def plot(cells: Cells, names: list[str], dim: int, path: Path) -> None:
    """AUC against bytes, a panel a model and a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = [name for name in dict.fromkeys(name for _, name, _ in cells) if (names[0], name, "32") not in cells]
    figure, panels = pyplot.subplots(1, len(names), figsize=(6.4 * len(names), 5.2), sharey=True, squeeze=False)
    colours = pyplot.get_cmap("tab20").colors
    markers = "osD^vP*Xhd<>"
    for panel, model in zip(panels[0], names, strict=True):
        base = cells.get((model, "float32", "32"))
        if base is not None:
            mean, deviation = base.mean("test_auc"), base.deviation("test_auc")
            panel.axhspan(mean - deviation, mean + deviation, color="0.85", label="float32, ± one standard deviation")
            panel.axhline(mean, color="0.4", linewidth=1)
        for number, name in enumerate(methods):
            points = [point for point in POINTS if (model, name, point) in cells]
            if not points:
                continue
            here = [cells[model, name, point] for point in points]
            panel.errorbar(
                [ratio(point, dim) for point in points],
                [cell.mean("test_auc") for cell in here],
                [cell.deviation("test_auc") for cell in here],
                label=name,
                color=colours[(2 * number) % 20 + (2 * number) // 20],
                marker=markers[number % len(markers)],
                markersize=5,
                linewidth=1.4,
                capsize=2,
                linestyle="--" if "nearest" in name or "largest" in name else "-",
            )
        shares = [ratio(point, dim) for point in POINTS[1:]]
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xticks(
            shares, [f"{share:.3g}\n{point} bits" for share, point in zip(shares, POINTS[1:], strict=True)]
        )
        panel.set_xlim(min(shares) * 0.9, max(shares) * 1.12)
        panel.set_xlabel("bytes to serve, as a share of float32 (and the format that takes them)")
        panel.set_title(model)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("test AUC, Frappe")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9, frameon=False)
    rows = -(-len(labels) // 4)
    figure.tight_layout(rect=(0, 0.02 + 0.045 * rows, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the folder of Frappe's files")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where runs, table and plot are written")
    parser.add_argument("--models", default="DeepFM,DCNv2", help="comma-separated")
    parser.add_argument("--methods", help="names of METHODS, separated by semicolons; all if left out")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every row")
    parser.add_argument("--dim", type=int, default=16, help="D")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=15, help="at most")
    parser.add_argument("--patience", type=int, default=2, help="epochs without a gain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="train nothing, write table and plot")
    arguments = parser.parse_args()
    known = [method.name for method in METHODS]
    wanted = arguments.methods.split(";") if arguments.methods else known
    for name in wanted:
        if name not in known:
            parser.error(f"--methods: {name!r} is none of {'; '.join(known)}")
    torch.set_num_threads(arguments.threads)
    names = arguments.models.split(",")
    dataset = data.load("frappe", arguments.data)
    study = Study(dataset, arguments.out, arguments.dim, arguments.batch_size, arguments.epochs, arguments.patience)
    if not arguments.report:
        study.everything(names, [method for method in METHODS if method.name in wanted], arguments.seeds)
    study.trains = False
    cells = collect(study, names, arguments.seeds)
    if not cells:
        parser.exit(1, "compression: no method has all its runs yet\n")
    write_text(arguments.out / "compression_frappe.md", markdown(cells, names, arguments.seeds, study))
    plot(cells, names, arguments.dim, arguments.out / "compression.png")


if __name__ == "__main__":
    main()
