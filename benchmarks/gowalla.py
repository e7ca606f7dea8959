"""Collaborative filtering on Gowalla, LightGCN's split, beside the published results.

    python benchmarks/gowalla.py --data PATH/gowalla --out results

Every finished run is an entry of OUT/gowalla.json and is not done again, and a training that was stopped goes on from
its last checkpoint in OUT/runs; OUT/gowalla.md is written after each run (`--report` writes it from what is there).

Two protocols. "published": all train pairs are trained on, and the epoch is chosen on the test pairs, as it was for the
published table; compare with that. "held-out": a tenth of each user's train pairs is drawn for validation, the epoch is
chosen on these, and the test pairs are looked at once, at the end; compare with the other rows of this one, for a model
has a tenth less to learn from.

Recall@20 is the share of a user's test items among the 20 best of all items but those of train (and validation);
NDCG@20 has the ideal of min(20, number of test items); both are means over the 29,858 users.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recfast import data, metrics, models, train
from recfast.files import write_json, write_text
from recfast.models.retrieval.knn_embed import KNNEmbed
from recfast.train.evaluate import held_out, top_items

RESULTS, TABLE = "gowalla.json", "gowalla.md"
PROTOCOLS = ("published", "held-out")
VALID_SHARE = 0.1


@dataclass(frozen=True)
class Model:
    """A row of the table; `settings` None: there is nothing to train."""

    name: str
    build: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] | None = None
    # Recall@20 and NDCG@20 of the published table, and of which row.
    published: tuple[float | None, float | None] = (None, None)
    note: str = ""


# Adam at 1e-4, divided by 10 after two epochs in a row without a gain. The published runs waited for one: here a loss
# of .0003 after one epoch then cut the rate a second time, and the training stood still from there on.
CCL = {
    "epochs": 100,
    "batch_size": 256,
    "lr": 1e-4,
    "lr_plateau": 0.1,
    "lr_patience": 1,
    "patience": 4,
}
AT_ONCE = {"lr_patience": 0, "patience": 3}
# With "padded" the empty places of a short history take part in the attention, as in the authors' code.
SIMPLEX = {
    "aggregation": "user_attention",
    "padded": True,
    "recency": False,
    "history": "others",
    "max_length": 100,
    "gamma": 0.8,
    "margin": 0.9,
    "weight": 250.0,
    "num_negatives": 2000,
    "shared_by": 1,
    "dropout": 0.1,
    "shared_items": False,
    "init_std": 1e-3,
}
MODELS = [
    Model("popularity", "Popularity"),
    Model("ItemKNN", "ItemKNN", {"decay": 1.0}, published=(0.1570, 0.1214), note="their rule of k is not known"),
    Model("GF-CF", "GFCF", published=(0.1849, 0.1518)),
    Model(
        "MF-CCL",
        "MF",
        {"shared_by": 1},
        {**CCL, "weight_decay": 1e-8, "monitor": "recall@20"},
        published=(0.1837, 0.1493),
        note="800 negatives for each row",
    ),
    Model(
        "MF-CCL, rate cut at once",
        "MF",
        {"shared_by": 1},
        {**CCL, **AT_ONCE, "weight_decay": 1e-8, "monitor": "recall@20"},
        published=(0.1837, 0.1493),
        note="after one epoch without a gain",
    ),
    Model(
        "MF-CCL, shared negatives",
        "MF",
        {},
        {**CCL, "weight_decay": 1e-8, "monitor": "recall@20"},
        published=(0.1837, 0.1493),
        note="800 for a batch",
    ),
    Model(
        "SimpleX",
        "SimpleX",
        SIMPLEX,
        {**CCL, "weight_decay": 1e-7, "monitor": "ndcg@20"},
        published=(0.1872, 0.1557),
        note="2,000 negatives for each row, the last 100 items",
    ),
    Model(
        "SimpleX, plain attention",
        "SimpleX",
        {**SIMPLEX, "padded": False},
        {**CCL, **AT_ONCE, "weight_decay": 1e-7, "monitor": "ndcg@20"},
        published=(0.1872, 0.1557),
        note="the same without empty places; the rate cut after one epoch",
    ),
    Model("EASE", "EASE", published=(0.1765, 0.1467), note="dual form"),
    Model(
        "LightGCN, 5 epochs",
        "LightGCN",
        {},
        {"epochs": 5, "batch_size": 2048, "lr": 1e-3, "patience": 0, "monitor": "recall@20"},
        published=(0.1071, 0.0894),
        note="of 1,000, which end at .1824 and .1547",
    ),
    Model(
        "two-tower",
        "TwoTower",
        {
            "user_id": False,
            "recency": False,
            "history_dropout": 0.0,
            "item_bias": False,
            "shared_items": True,
            "max_length": 500,
            "negatives": "uniform",
            "num_negatives": 800,
        },
        {"epochs": 40, "batch_size": 512, "lr": 1e-3, "lr_plateau": 0.1, "patience": 3, "monitor": "recall@20"},
        published=(0.1754, 0.1473),
        note="mean of the other items, one table, softmax with 800 negatives",
    ),
]


# What kNN-Embed is chosen from; how many users choose, and of how many others it is told; candidates.
INTERESTS = [
    {"own": own, "clusters": clusters, "components": 20}
    for own, clusters in ((0.0, 64), (0.5, 64), (0.7, 64), (0.8, 64), (0.7, 256))
]
INTEREST_USERS = (6000, 8000)
INTEREST_SIZES = (50, 200)


@dataclass
class Study:
    """Trains what is not yet trained, and remembers it."""

    out: Path
    path: Path | None
    cache: Path | None = None

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.dataset = cache(self._dataset)

    @property
    def runs(self) -> list[dict[str, Any]]:
        place = self.out / RESULTS
        return json.loads(place.read_text(encoding="utf-8")) if place.exists() else []

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run.get(key) == value for key, value in wanted.items())]

    def remember(self, run: dict[str, Any]) -> None:
        write_json(self.out / RESULTS, [*self.runs, run])
        print({key: value for key, value in run.items() if key != "curve"}, flush=True)

    def _dataset(self, protocol: str, seed: int) -> data.Dataset:
        option = {"select_on_test": True} if protocol == "published" else {"valid_share": VALID_SHARE, "seed": seed}
        return data.load("gowalla", self.path, cache=self.cache, **option)

    def folder(self, model: Model, protocol: str, seed: int) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in model.name.lower())
        return self.out / "runs" / f"{name}-{protocol}-{seed}"

    def run(self, model: Model, protocol: str, seed: int) -> None:
        wanted = {"model": model.name, "protocol": protocol, "seed": seed}
        if self.find(**wanted):
            return
        dataset = self.dataset(protocol, seed)
        split = dataset.valid if protocol == "published" else dataset.test
        options = {**model.options, **({"seed": seed} if "seed" in models.options(model.build) else {})}
        retriever = models.build(model.build, dataset.schema, options)
        result: dict[str, Any] = {**wanted, "train_rows": len(dataset.train)}
        result["parameters"] = sum(p.numel() for p in retriever.parameters())
        if model.settings is None:
            started, cpu = time.perf_counter(), time.process_time()
            retriever.prepare(dataset)
            result |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        else:
            folder = self.folder(model, protocol, seed)
            run = train.fit(retriever, dataset, out=folder, seed=seed, progress=True, **model.settings)
            curve = [entry["valid"][model.settings["monitor"]] for entry in run.history]
            result |= {
                "epochs": run.epochs,
                "best_epoch": run.best["epoch"] + 1,
                "seconds": sum(entry["seconds"] for entry in run.history),
                "valid_seconds": sum(entry["valid_seconds"] for entry in run.history),
                "stopped": run.stopped,
                "curve": [round(value, 4) for value in curve],
            }
        started = time.perf_counter()
        measured = train.evaluate(retriever, split, dataset=dataset, k=(20, 50))
        result |= {**measured, "evaluation_seconds": time.perf_counter() - started}
        self.remember({**result, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]})

    def interests(
        self, model: Model, protocol: str, seed: int, grid: Sequence[dict[str, Any]] = INTERESTS,
        users: tuple[int, int] = INTEREST_USERS,
    ) -> None:  # fmt: skip
        """Candidates of `KNNEmbed` and of the one query of a trained model, at equal length.

        The options are chosen from `grid` by Recall@50 on some users, drawn at random; what is told is of others.
        """
        wanted = {"model": f"{model.name} with kNN-Embed", "protocol": protocol, "seed": seed, "kind": "interests"}
        if self.find(**wanted) or not self.find(model=model.name, protocol=protocol, seed=seed):
            return
        dataset = self.dataset(protocol, seed)
        before, split = ("train", dataset.valid) if protocol == "published" else ("valid", dataset.test)
        retriever = models.load(self.folder(model, protocol, seed))
        retriever.prepare(dataset)
        seen = dataset.seen(before)
        ids, truth = held_out(split, seen)
        drawn = np.random.default_rng(seed).permutation(len(ids))
        choosing, told = drawn[: users[0]], drawn[users[0] : sum(users)]

        @cache
        def clustered(clusters: int, components: int) -> KNNEmbed:
            return KNNEmbed(retriever, dataset, upto=before, clusters=clusters, components=components, seed=seed)

        def found(rows: np.ndarray, size: int, options: dict[str, Any] | None) -> torch.Tensor:
            asked = torch.from_numpy(ids[rows])
            if options is None:
                return top_items(retriever, asked, size, history=dataset.history(before), masked=seen)
            mixed = clustered(options["clusters"], options["components"])
            mixed.own = options["own"]
            return mixed.candidates(asked, size, masked=seen)

        def recalls(rows: np.ndarray, candidates: torch.Tensor) -> np.ndarray:
            return metrics.recall(candidates.numpy(), truth.take(rows), candidates.shape[1])

        tried = []
        for options in grid:
            value = float(recalls(choosing, found(choosing, 50, options)).mean())
            tried.append({**options, "recall@50": value})
            print(f"  {tried[-1]}", flush=True)
        one = float(recalls(choosing, found(choosing, 50, None)).mean())
        best = max(tried, key=lambda entry: entry["recall@50"])
        options = {name: best[name] for name in ("own", "clusters", "components")}
        result = {**wanted, "options": options, "tried": tried, "tried_one": one, "users": [len(choosing), len(told)]}
        cluster = clustered(options["clusters"], options["components"]).cluster
        for size in INTEREST_SIZES:
            values = {}
            for name, chosen in (("one", None), ("mixture", options)):
                candidates = found(told, size, chosen)
                values[name] = recalls(told, candidates)
                result[f"{name}_recall@{size}"] = float(values[name].mean())
                rows = cluster[candidates.clamp(min=0)].numpy()
                result[f"{name}_clusters@{size}"] = float(np.mean([len(np.unique(row)) for row in rows]))
            # Of the difference, user by user.
            gain = values["mixture"] - values["one"]
            result[f"gain_error@{size}"] = float(gain.std(ddof=1) / len(gain) ** 0.5)
        self.remember({**result, "load": os.getloadavg()[0]})


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def table(study: Study) -> str:
    head = ["model", "published R@20 / N@20", "ours, published protocol", "R@50", "held-out protocol"]
    head += ["epochs (best)", "training", "parameters", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for model in MODELS:
        found = {protocol: study.find(model=model.name, protocol=protocol) for protocol in PROTOCOLS}
        if not any(found.values()):
            continue
        first = (found["published"] or found["held-out"])[0]
        both = [
            f"{spread([r['recall@20'] for r in f])} / {spread([r['ndcg@20'] for r in f])}" * bool(f)
            for f in found.values()
        ]
        recall, ndcg = model.published
        lines.append(
            "| "
            + " | ".join(
                [
                    f"{model.name} ({model.note})" if model.note else model.name,
                    f"{recall:.4f} / {ndcg:.4f}" if recall else "",
                    both[0],
                    spread([r["recall@50"] for r in found["published"]]),
                    both[1],
                    f"{first['epochs']} ({first['best_epoch']})" if "epochs" in first else "",
                    duration(first["seconds"]),
                    f"{first['parameters']:,}" if first["parameters"] else "closed form",
                    str(max(map(len, found.values()))),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def interests_table(study: Study) -> str:
    found = study.find(kind="interests")
    if not found:
        return ""
    head = ["candidates", "chosen", "users", "N", "Recall@N, one query", "Recall@N, mixture", "gain"]
    head += ["clusters, one query", "clusters, mixture"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    tried = ["| candidates | clusters | m | own | Recall@50 |", "|---" * 5 + "|"]
    for run in found:
        name = f"{run['model']}, {run['protocol']}"
        options = ", ".join(f"{key} {value}" for key, value in run["options"].items())
        for n in INTEREST_SIZES:
            one, mixture = run[f"one_recall@{n}"], run[f"mixture_recall@{n}"]
            cells = [name, options, f"{run['users'][1]:,}", str(n), f"{one:.4f}", f"{mixture:.4f}"]
            cells += [f"{mixture - one:+.4f} ± {run[f'gain_error@{n}']:.4f}"]
            cells += [f"{run[f'{way}_clusters@{n}']:.1f}" for way in ("one", "mixture")]
            lines.append("| " + " | ".join(cells) + " |")
        tried.append(f"| {name} | one query | | | {run['tried_one']:.4f} |")
        for entry in run["tried"]:
            cells = [name, *(str(entry[key]) for key in ("clusters", "components", "own"))]
            tried.append("| " + " | ".join([*cells, f"{entry['recall@50']:.4f}"]) + " |")
    about = (
        "kNN-Embed splits the candidates of a user over interests; `own` is the share of the user's own vector in each "
        "interest's query, 0 as in the paper. The options are chosen by Recall@50 on the test items of some users, "
        "drawn at random; the table is of others. The gain has the standard error of the difference user by user. It "
        "is the second choice: a first one by 1,500 users among ten, on an earlier training, lost .0018 ± .0015 of "
        "Recall@50 on others, whereupon more users were to choose among fewer. "
        "Clusters: how many clusters of items a user's candidates come from."
    )
    choice = f"What was to choose from, on the {found[0]['users'][0]:,} users who chose:"
    parts = [textwrap.fill(about, 118), "\n".join(lines), choice, "\n".join(tried)]
    return "\n\n## Several interests\n\n" + "\n\n".join(parts)


def report(study: Study) -> None:
    load = [run["load"] for run in study.runs if "load" in run]
    threads = [run["threads"] for run in study.runs if "threads" in run]
    paragraphs = (
        "29,858 users, 40,981 items, 810,128 train and 217,242 test pairs. Each cell is Recall@20 / NDCG@20. In the "
        "published protocol the epoch is chosen on the test pairs, as it was for the published numbers; in the "
        f"held-out one on {VALID_SHARE:.0%} of each user's train pairs, which the model then lacks. Mean ± standard "
        "deviation where there are several seeds.",
        "The trainings of MF-CCL and SimpleX have the published settings, except that a row's own positive is none of "
        "its negatives, that weights begin at 1e-3, not at 1e-4, and that the rate is cut after two epochs without a "
        "gain, not one, where the table does not say otherwise. Times are of training alone, evaluation left out, "
        f"threads: {max(threads, default=1)}. The "
        f"machine's load while it ran was {min(load, default=0):.1f} to {max(load, default=0):.1f}: above 1 they say "
        "little.",
    )
    told = "\n\n".join(textwrap.fill(paragraph, 118) for paragraph in paragraphs)
    command = "    python benchmarks/gowalla.py --data PATH/gowalla --out results"
    write_text(
        study.out / TABLE,
        f"# Collaborative filtering on Gowalla\n\n{command}\n\n{told}\n\n{table(study)}{interests_table(study)}\n",
    )


def keep_memory() -> None:
    """Ask the C library to keep what is freed: fresh pages for every gradient of a table cost more than the sums."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    known = [model.name for model in MODELS]
    parser.add_argument("--data", type=Path, help="the folder of train.txt and test.txt")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where runs, results and table are written")
    parser.add_argument("--models", help="names of MODELS, separated by semicolons; all if left out")
    parser.add_argument("--protocols", default=PROTOCOLS[0], help=f"of {', '.join(PROTOCOLS)}, comma-separated")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... of every training")
    parser.add_argument("--cache", type=Path, help="where prepared data are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="train nothing, write the table")
    arguments = parser.parse_args()
    wanted = arguments.models.split(";") if arguments.models else known
    for name in wanted:
        if name not in known:
            parser.error(f"--models: {name!r} is none of {'; '.join(known)}")
    protocols = arguments.protocols.split(",")
    for name in protocols:
        if name not in PROTOCOLS:
            parser.error(f"--protocols: {name!r} is none of {', '.join(PROTOCOLS)}")
    torch.set_num_threads(arguments.threads)
    keep_memory()
    study = Study(arguments.out, arguments.data, arguments.cache)
    for seed in range(0 if arguments.report else arguments.seeds):
        for protocol in protocols:
            for model in MODELS:
                if model.name in wanted and (seed == 0 or model.settings is not None):
                    study.run(model, protocol, seed)
                    if model.name == "MF-CCL":
                        study.interests(model, protocol, seed)
                    report(study)
    report(study)


if __name__ == "__main__":
    main()
