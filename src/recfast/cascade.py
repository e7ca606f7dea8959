"""The main job: a log of interactions in, a trained and measured recommender out."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recfast import data as rfdata
from recfast import doctor, metrics, models, report, rerank, train
from recfast.data import Catalogue, Dataset, Jagged
from recfast.errors import InputError
from recfast.files import disk_errors, write_json, write_text
from recfast.models import ItemKNN, Popularity
from recfast.pipeline import Pipeline
from recfast.train import RunConfig, StageConfig
from recfast.train.config import read_toml
from recfast.train.evaluate import held_out

# The grid of trade-offs that is drawn, and from which one is chosen on the validation rows.
DIVERSITIES = tuple(step / 40 for step in range(40))
# Those at which all kinds of re-rankers are measured, for comparison.
FEW_DIVERSITIES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# How much the retriever's score may count beside the ranker's.
BLENDS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
STAGES = ("retriever", "ranker", "second_ranker")
LENGTHS = (5, 10, 20, 30, 50, 75, 100, 150, 200)

Say = Callable[[str], None]


class Stopwatch:
    """Seconds per stage, in the order in which the stages began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


# What differs from the defaults of `RunConfig`, by data set. Found by hand on ml-100k with the validation and the test
# rows both in view, as were the re-ranker's defaults: figures on its test rows are somewhat flattered.
_TWO_TOWER = {
    "epochs": 20,
    "batch_size": 512,
    "lr": 2e-3,
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "patience": 3,
}
_RANKER = {"precision": "int8"}
PRESETS: dict[str, dict[str, Any]] = {
    "synthetic": {
        "data": {"options": {"rows": 300_000}},
        "retriever": {"model": "TwoTower", "train": _TWO_TOWER},
        "ranker": {"model": "DIN", "options": {**_RANKER, "attention_mode": "softmax"}},
        "second_ranker": {"model": "DeepFM", "options": _RANKER},
        "pipeline": {"exclude": "liked"},
    },
    "ml-100k": {
        "compare_seeds": 3,
        "data": {"options": {"popular_negatives": 0.5}},
        "retriever": {"model": "TwoTower", "train": _TWO_TOWER},
        "ranker": {"model": "DIN", "options": {**_RANKER, "attention_mode": "softmax"}},
        "second_ranker": {"model": "DeepFM", "options": _RANKER},
    },
}


def settings(path: Path | None = None, data: str | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """The settings of a run: a TOML file, or the preset of a data set, with `dotted.key=value` overrides on top."""
    if path is not None:
        return RunConfig.load(path, overrides)
    name = data or "synthetic"
    preset = PRESETS.get(name, {})
    values = {**preset, "data": {**preset.get("data", {}), "name": name}}
    return RunConfig.parse(train.override(values, overrides), place="settings")


def run(config: RunConfig, *, overwrite: bool = False, command: str = "", say: Say = lambda _: None) -> Path:
    """Train and measure the cascade and write its folder.

    The folder holds `config.toml`, `metrics.json`, `report.html`, the serving `pipeline/`, and one folder of training a
    stage (`retriever/`, `ranker/`, ...). A run that was interrupted goes on where it was when it is started again with
    the same settings.

    Parameters
    ----------
    config
        Data, stages, seed and `out`, the folder; `runs/<data name>` if left out.
    overwrite
        Remove what is in the folder first.
    command
        The command line, for the report.
    say
        Gets a line at the start of each stage.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        Wrong settings or data; the folder holds a run with other settings, or cannot be written (a full disk).
    """
    out = Path(config.out or f"runs/{config.data.name}")
    with disk_errors("run", out, "what was finished is kept, and the same command goes on from there"):
        return _run(config, out, overwrite, command, say)


def _run(config: RunConfig, out: Path, overwrite: bool, command: str, say: Say) -> Path:
    watch, start = Stopwatch(), time.perf_counter()
    _refuse_foreign(out, config, overwrite)
    say("preparing the data")
    with watch("prepare the data"):
        dataset = rfdata.load(config.data.name, config.data.path, **config.data.options)
    for split in ("train", "valid", "test"):
        if getattr(dataset, split) is None:
            raise InputError(f"run: {dataset.name} has no {split} split, expected train, valid and test")

    # What is wrong with any stage shows before the first is trained, and before an earlier run is removed.
    reranker = _reranker(config, config.reranker.diversity, config.reranker.personal)
    built = {stage: _build(config, stage, dataset) for stage in STAGES if getattr(config, stage) is not None}
    _claim(out, config, overwrite)

    result: dict[str, Any] = {
        "name": dataset.name,
        "command": command or f"recfast run --out {out}",
        "seed": config.seed,
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": doctor.config(),
        "data": _data_summary(dataset),
    }
    say(f"training {config.retriever.model}")
    with watch(f"train the retriever ({config.retriever.model})"):
        retriever, result["retriever"] = _train(config, "retriever", built["retriever"], dataset, out)
    say(f"training {config.ranker.model}")
    with watch(f"train the ranker ({config.ranker.model})"):
        ranker, result["ranker"] = _train(config, "ranker", built["ranker"], dataset, out)
    second = None
    if config.second_ranker is not None:
        say(f"training {config.second_ranker.model}")
        with watch(f"train the second ranker ({config.second_ranker.model})"):
            second, result["second_ranker"] = _train(config, "second_ranker", built["second_ranker"], dataset, out)

    say("coding the items")
    with watch("code and index the items"):
        serving = Catalogue.from_dataset(dataset)
        pipeline = Pipeline(
            retriever,
            ranker,
            reranker,
            serving,
            candidates=config.pipeline.candidates,
            pool=config.reranker.pool,
            features=config.reranker.features,
            codebooks=config.retriever.codes.codebooks,
            n_codes=config.retriever.codes.n_codes,
            exclude=config.pipeline.exclude,
            seed=config.seed,
            recent=config.reranker.recent,
        )

    say("measuring retrieval")
    with watch("measure retrieval"):
        result["retriever"] |= _measure_retrieval(pipeline, dataset, result["retriever"]["model"])
    say("measuring ranking")
    with watch("measure ranking"):
        result["ranking_table"] = [_measure_ranking(ranker, config.ranker, dataset)]
        if second is not None:
            result["ranking_table"].append(_measure_ranking(second, config.second_ranker, dataset))
        result["ranker"]["test"] = result["ranking_table"][0]
        result["ranker"]["precision"] = result["ranking_table"][0]["precision"]
    result["tables"] = None
    if config.compare_seeds:
        say(f"comparing 8-bit and float tables, {config.compare_seeds} seeds each")
        with watch("compare 8-bit and float tables"):
            result["tables"] = _compare_tables(config, dataset, ranker)
    say("measuring re-ranking")
    with watch("measure re-ranking"):
        result["rerank"], result["serving"], lists = _measure_reranking(pipeline, dataset, config)
    pipeline.reranker = _reranker(config, result["rerank"]["diversity"], config.reranker.personal)
    result["users"] = _ten_users(pipeline, dataset, lists)

    say("writing the folder")
    with watch("write the pipeline"):
        # What is served knows every split's history, not only the training one.
        pipeline.catalogue = serving
        pipeline.save(out / "pipeline")
    result["time"] = watch.seconds
    result["seconds"] = time.perf_counter() - start
    page = report.render(result)
    write_json(out / "metrics.json", result)
    write_text(out / "report.html", page)
    return out


def _settings_text(config: RunConfig) -> str:
    return config.model_copy(update={"out": None}).to_toml()


def _refuse_foreign(out: Path, config: RunConfig, overwrite: bool) -> None:
    """Refuse a folder that is not a run's, or another run's; nothing is changed."""
    path = out / "config.toml"
    if out.exists() and not out.is_dir():
        raise InputError(f"run: {out} is a file, expected a new or empty folder for --out")
    if path.exists():
        known = read_toml(path).keys() <= RunConfig.model_fields.keys()
        if not known:
            raise InputError(f"run: {path} is not of a run of recfast, expected a new or empty folder for --out")
        if not overwrite and path.read_text(encoding="utf-8") != _settings_text(config):
            raise InputError(f"run: {out} holds a run with other settings; choose another --out, or give --overwrite")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"run: {out} is not empty and holds no run, expected a new or empty folder for --out")


def _claim(out: Path, config: RunConfig, overwrite: bool) -> None:
    """Make the folder ready; of an earlier run only what recfast wrote is removed."""
    if overwrite:
        for name in ("metrics.json", "report.html", "config.toml"):
            (out / name).unlink(missing_ok=True)
        for name in ("pipeline", *STAGES):
            if (out / name).is_dir():
                shutil.rmtree(out / name)
    write_text(out / "config.toml", _settings_text(config))


def _data_summary(dataset: Dataset) -> dict[str, Any]:
    summary = dataset.summary()
    schema = dataset.schema
    lengths = dataset.history("valid").lengths().numpy()[1:]
    counts, edges = np.histogram(lengths, bins=30)
    likes = np.sort(dataset.popularity("train")[1:])[::-1]
    users, items = dataset.vocabulary[schema.user].size, dataset.vocabulary[schema.item].size
    return {
        "about": dataset.meta.get("about") or f"{dataset.name}: rows of users and items with a label of 0 or 1.",
        "users": users,
        "items": items,
        "density": float(likes.sum() / (users * items)),
        "splits": {
            name: {"rows": len(getattr(dataset, name)), "label_rate": float(np.mean(getattr(dataset, name).label))}
            for name in ("train", "valid", "test")
        },
        "history_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        # The whole curve would make a page of a million items heavy; a thousand points draw the same line.
        "item_counts": likes[likes > 0][: 10**6 : max(1, int((likes > 0).sum()) // 1000)].tolist(),
        "summary": summary,
    }


def _build(
    config: RunConfig, stage: str, dataset: Dataset, *, seed: int | None = None, **changed: Any
) -> torch.nn.Module:
    """The untrained model of a stage; `seed` (the run's, if left out) goes wherever the model draws something."""
    settings: StageConfig = getattr(config, stage)
    seed = config.seed if seed is None else seed
    options = {**settings.options, **changed}
    known = models.options(settings.model)
    if "seed" in known:
        options.setdefault("seed", seed)
    if "tables" in known:
        options["tables"] = {"seed": seed, **(options.get("tables") or {})}
    torch.manual_seed(seed)
    model = models.build(settings.model, dataset.schema, options)
    wanted = "retrieval" if stage == "retriever" else "ranking"
    if model.task != wanted:
        raise InputError(f"run: {stage}.model = {settings.model} is for {model.task}, expected a model for {wanted}")
    return model


def _train(
    config: RunConfig, stage: str, model: torch.nn.Module, dataset: Dataset, out: Path
) -> tuple[torch.nn.Module, dict[str, Any]]:
    settings: StageConfig = getattr(config, stage)
    training = config.training(stage)
    monitor = training.monitor or ("auc" if model.task == "ranking" else "recall@50")
    fitted = train.fit(model, dataset, config=training, out=out / stage, resume="auto")
    return fitted.model, {
        "model": settings.model,
        "monitor": monitor,
        "history": [{**{k: v for k, v in e.items() if k != "valid"}, **e.get("valid", {})} for e in fitted.history],
        "best_epoch": (fitted.best or {"epoch": fitted.epochs})["epoch"],
        "seconds": sum(entry["seconds"] for entry in fitted.history),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


# -- retrieval ---------------------------------------------------------------------------------------------------


_BEFORE = {"valid": "train", "test": "valid"}


def _stand_before(pipeline: Pipeline, dataset: Dataset, split: str) -> tuple[Tensor, Jagged]:
    """Put the pipeline where it knows only what came before a split, and say what is to be found there.

    Returns
    -------
    (users int64 [U], the distinct items each of them likes in the split), without items that the pipeline would not
    recommend again, and without users who have nothing left or no history.
    """
    pipeline.catalogue = pipeline.catalogue.upto(dataset, _BEFORE[split])
    users, relevant = held_out(getattr(dataset, split), pipeline.excluded())
    warm = np.flatnonzero(pipeline.catalogue.history.lengths().numpy()[users] > 0)
    if not len(warm):
        raise InputError(f"run: no known user likes a new item in the {split} split, so nothing can be measured")
    return torch.from_numpy(users[warm]), relevant.take(warm)


def _measure_retrieval(pipeline: Pipeline, dataset: Dataset, name: str) -> dict[str, Any]:
    users, relevant = _stand_before(pipeline, dataset, "test")
    items = len(pipeline.index)
    longest = min(max(LENGTHS), items)
    lists = {"codes": pipeline.retrieve(users, longest)[1]}
    models_by_key = {
        "exact": pipeline.retriever,
        "popularity": Popularity(dataset.schema),
        "item_knn": ItemKNN(dataset.schema),
    }
    nobody = Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros_like(pipeline.catalogue.history.offsets))
    for key, model in models_by_key.items():
        if key != "exact":
            model.prepare(dataset)
        masked = pipeline.excluded() or nobody
        lists[key] = train.top_items(model, users, longest, history=pipeline.catalogue.history, masked=masked)

    def at(key: str, k: int) -> float:
        return float(np.mean(metrics.recall(lists[key].numpy(), relevant, k)))

    labels = {
        "exact": f"{name}, exact search",
        "codes": f"{name}, codes",
        "item_knn": "item-kNN (cosine)",
        "popularity": "popularity",
    }
    table = [
        {
            "name": label,
            **{f"recall@{k}": at(key, k) for k in (10, 20, 50, 100)},
            "ndcg@10": float(np.mean(metrics.ndcg(lists[key].numpy(), relevant, 10))),
        }
        for key, label in labels.items()
    ]
    checked = users[:256]
    return {
        "test": {key: value for key, value in table[0].items() if key != "name"},
        "users": len(users),
        "table": table,
        "recall_curve": {
            "k": [k for k in LENGTHS if k <= longest],
            **{key: [at(key, k) for k in LENGTHS if k <= longest] for key in lists},
        },
        "codes": {
            "bytes_per_item": pipeline.quantizer.n_codebooks * (1 if pipeline.quantizer.n_codes <= 256 else 2),
            "vector_bytes": 4 * pipeline.item_vectors.shape[1],
            "users_checked": len(checked),
            "equal_to_brute_force": _equals_brute_force(pipeline, checked, longest),
            "report": pipeline.quantizer.report(),
        },
    }


def _equals_brute_force(pipeline: Pipeline, users: Tensor, k: int) -> bool:
    """Whether the index gives, to the bit, what scoring every item's code in plain torch gives."""
    table, codes = pipeline.score_table(users), pipeline.index.codes.long()
    scores = torch.zeros(len(users), len(codes))
    for m in range(codes.shape[1]):
        scores += table[:, m, codes[:, m]]
    allowed = pipeline.allowed(users)
    if allowed is not None:
        scores[~allowed] = -torch.inf
    # A stable descending sort keeps the lower id first among equals.
    best, place = torch.sort(scores, dim=1, descending=True, stable=True)
    best, items = best[:, :k], place[:, :k] + 1
    items[torch.isinf(best)] = -1
    found = pipeline.retrieve(users, k)
    return torch.equal(found[0], best) and torch.equal(found[1], items)


# -- ranking -----------------------------------------------------------------------------------------------------


def _measure_ranking(model: torch.nn.Module, settings: StageConfig, dataset: Dataset) -> dict[str, Any]:
    found = train.evaluate(model, dataset.test, dataset=dataset)
    return {
        "model": settings.model,
        "precision": settings.options.get("precision", "float32"),
        "table_bytes": model.tables.memory_bytes(),
        **{key: found.get(key) for key in ("auc", "gauc", "logloss", "pcoc")},
    }


def _compare_tables(config: RunConfig, dataset: Dataset, trained: torch.nn.Module) -> dict[str, Any]:
    """The ranker with 8-bit and with float tables, everything else equal, on several seeds.

    `trained` is the run's own ranker, which is one of them already.
    """
    seeds = [config.seed + i for i in range(config.compare_seeds)]
    result: dict[str, Any] = {"seeds": seeds}
    for precision in ("int8", "float32"):
        scores, size = [], 0
        for seed in seeds:
            model = trained
            if seed != config.seed or config.ranker.options.get("precision", "float32") != precision:
                model = _build(config, "ranker", dataset, seed=seed, precision=precision)
                settings = config.training("ranker").model_copy(update={"seed": seed})
                model = train.fit(model, dataset, config=settings).model
            scores.append(train.evaluate(model, dataset.test, dataset=dataset)["auc"])
            size = model.tables.memory_bytes()
        result[precision] = {"auc": scores, "mean": float(np.mean(scores)), "table_bytes": size}
    result["difference"] = result["int8"]["mean"] - result["float32"]["mean"]
    return result


# -- re-ranking --------------------------------------------------------------------------------------------------


def _list_metrics(pipeline: Pipeline, lists: Tensor, relevant: Jagged, k: int) -> dict[str, float]:
    genres = pipeline.catalogue.genres if len(pipeline.catalogue.genre_names) > 1 else pipeline._similarity
    ids = lists.numpy()
    return {
        "ndcg": float(np.mean(metrics.ndcg(ids, relevant, k))),
        "recall": float(np.mean(metrics.recall(ids, relevant, k))),
        "ild": float(np.mean(metrics.intra_list_diversity(ids[:, :k], genres))),
        "genres": float(np.mean(metrics.topic_count(ids[:, :k], genres))),
        "coverage": float(metrics.catalogue_coverage(ids[:, :k], len(pipeline.index))),
    }


def _reranker(config: RunConfig, diversity: float, personal: float, kind: str | None = None) -> rerank.Reranker:
    """The configured re-ranker at a trade-off; or another kind with its defaults, for comparison."""
    settings = config.reranker
    own = kind is None or kind == settings.kind
    kind = kind or settings.kind
    options = dict(settings.options) if own else {}
    if kind in ("DPP", "KDPP"):
        options.setdefault("gamma", settings.gamma)
    if kind == "KDPP":
        options.setdefault("seed", config.seed)
    for name in ("diversity", "personal"):
        if name in options:
            raise InputError(f"run: reranker.options.{name} is set, expected reranker.{name}")
    return rerank.build(kind, diversity=diversity, personal=personal, **options)


def _choose_blend(
    pipeline: Pipeline, items: Tensor, scores: Tensor, logits: Tensor, relevant: Jagged, k: int, wanted: float | None
) -> list[dict[str, float]]:
    """Set the pipeline's blend: the wanted one, else the best of a grid by NDCG. Returns the grid as measured."""
    grid = []
    for blend in BLENDS if wanted is None else (wanted,):
        pipeline.blend = blend
        order = torch.argsort(pipeline.relevance(scores, logits), dim=1, descending=True, stable=True)
        lists = items.gather(1, order[:, :k]).numpy()
        grid.append({"blend": blend, "ndcg": float(np.mean(metrics.ndcg(lists, relevant, k)))})
    pipeline.blend = max(grid, key=lambda point: point["ndcg"])["blend"]
    return grid


def _measure_reranking(
    pipeline: Pipeline, dataset: Dataset, config: RunConfig
) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    k = config.pipeline.k
    watch = Stopwatch()
    candidates, appetite, catalogues = {}, {}, {}
    for split in ("valid", "test"):
        users, relevant = _stand_before(pipeline, dataset, split)
        with watch(f"{split} retrieval"):
            scores, items = pipeline.retrieve(users)
        with watch(f"{split} ranking"):
            logits = pipeline.rank(users, items)
        if split == "valid":
            blends = _choose_blend(pipeline, items, scores, logits, relevant, k, config.pipeline.blend)
        candidates[split] = (users, relevant, items, pipeline.relevance(scores, logits), logits)
        appetite[split] = pipeline.appetite(users)
        catalogues[split] = pipeline.catalogue

    def final(split: str, diversity: float, personal: float, kind: str | None = None) -> Tensor:
        users, _, items, relevance, _ = candidates[split]
        chosen = _reranker(config, diversity, personal, kind)
        # What the user has liked is asked for again, and may not be what comes later.
        pipeline.catalogue = catalogues[split]
        positions = pipeline.rerank(users, items, relevance, k, reranker=chosen, appetite=appetite[split])
        return items.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, -1)

    def measured(split: str, diversity: float, personal: float, kind: str | None = None) -> dict[str, float]:
        return _list_metrics(pipeline, final(split, diversity, personal, kind), candidates[split][1], k)

    personal = config.reranker.personal
    grid = [measured("valid", diversity, personal) for diversity in DIVERSITIES]
    diversity = config.reranker.diversity
    if config.reranker.gain:
        wanted = (1 + config.reranker.gain) * grid[0]["ild"]
        # Where no trade-off gets so far, the configured one is as good as any and keeps an eye on relevance.
        reached = (d for d, point in zip(DIVERSITIES, grid, strict=True) if point["ild"] >= wanted)
        diversity = next(reached, config.reranker.diversity)
    users, relevant, items, _, logits = candidates["test"]
    before, retrieved = final("test", 0.0, personal), items[:, :k]
    ranked = items.gather(1, torch.argsort(logits, dim=1, descending=True, stable=True)[:, :k])
    with watch("test re-ranking"):
        after = final("test", diversity, personal)
    result = {
        "k": k,
        "kind": config.reranker.kind,
        "candidates": config.pipeline.candidates,
        "diversity": diversity,
        "personal": personal,
        "blend": pipeline.blend,
        "blends": blends,
        "retriever_order": _list_metrics(pipeline, retrieved, relevant, k),
        "ranker_alone": _list_metrics(pipeline, ranked, relevant, k),
        "before": _list_metrics(pipeline, before, relevant, k),
        "after": _list_metrics(pipeline, after, relevant, k),
        "change": {},
        "curve": {
            name: [{"diversity": d, **measured("test", d, share)} for d in DIVERSITIES]
            for name, share in (("global", 0.0), ("personal", personal))
        },
        "kinds": {
            kind: [{"diversity": d, **measured("test", d, personal, kind)} for d in FEW_DIVERSITIES]
            for kind in rerank.KINDS
        },
        "validation": [{"diversity": d, **point} for d, point in zip(DIVERSITIES, grid, strict=True)],
    }
    # Relative; None where there was nothing to compare with.
    result["change"] = {
        key: result["after"][key] / value - 1 if value else None for key, value in result["before"].items()
    }
    serving = {stage: watch.seconds[f"test {stage}"] / len(users) for stage in ("retrieval", "ranking", "re-ranking")}
    return result, serving, {"users": users, "relevant": relevant, "before": before, "after": after}


def _ten_users(pipeline: Pipeline, dataset: Dataset, lists: dict[str, Any], count: int = 10) -> list[dict[str, Any]]:
    """Users from the whole range of appetites for diversity, with their lists before and after re-ranking."""
    catalogue = pipeline.catalogue = pipeline.catalogue.upto(dataset, "valid")
    users, relevant = lists["users"], lists["relevant"]
    appetite = pipeline.appetite(users)
    order = np.argsort(appetite, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))]
    raw = catalogue.vocabulary["user"].decode(users.numpy())

    def row(item: int, hits: set[int], old: set[int] | None) -> dict[str, Any]:
        return {
            "title": catalogue.title(item),
            "genres": catalogue.genres_of(item),
            "hit": item in hits,
            "new": old is not None and item not in old,
        }

    shown = []
    for u in chosen.tolist():
        hits = set(relevant.row(u).tolist())
        before = [item for item in lists["before"][u].tolist() if item > 0]
        after = [item for item in lists["after"][u].tolist() if item > 0]
        liked = [item for item in catalogue.history.take([int(users[u])], last=6).values.tolist() if item > 0]
        shown.append(
            {
                "user": raw[u],
                "appetite": float(appetite[u]),
                "history": [catalogue.title(item) for item in liked[::-1]],
                "before": [row(item, hits, None) for item in before],
                "after": [row(item, hits, set(before)) for item in after],
            }
        )
    return shown


def describe(result: dict[str, Any]) -> str:
    """The figures of `metrics.json` that matter most, as lines for a terminal."""
    final = result["rerank"]
    change = {key: "–" if value is None else f"{value:+.1%}" for key, value in final["change"].items()}
    lines = [f"data       {result['name']}: {result['data']['users']} users, {result['data']['items']} items"]
    lines += [
        f"retrieval  {row['name']:<28} recall@50 {row['recall@50']:.4f}  NDCG@10 {row['ndcg@10']:.4f}"
        for row in result["retriever"]["table"]
    ]
    same = "equal to" if result["retriever"]["codes"]["equal_to_brute_force"] else "DIFFERENT FROM"
    lines.append(f"           CodeIndex is {same} brute force over the same codes")
    lines += [
        f"ranking    {row['model'] + ', ' + row['precision']:<28} AUC {row['auc']:.4f}  log loss {row['logloss']:.4f}"
        for row in result["ranking_table"]
    ]
    if result["tables"]:
        for name in ("int8", "float32"):
            scores = "  ".join(f"{auc:.4f}" for auc in result["tables"][name]["auc"])
            lines.append(f"tables     {name:<28} AUC {scores}  mean {result['tables'][name]['mean']:.4f}")
    lines += [
        f"re-ranking NDCG@{final['k']} {final['before']['ndcg']:.4f} -> {final['after']['ndcg']:.4f} "
        f"({change['ndcg']}), diversity {final['before']['ild']:.4f} -> {final['after']['ild']:.4f} "
        f"({change['ild']}) at {final['diversity']}",
        f"time       {result['seconds']:.0f} s",
    ]
    return "\n".join(lines)
