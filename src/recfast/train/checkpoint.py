"""A run is a folder, written so that stopping at any moment loses at most the steps since the last checkpoint.

==========================  ==========================================================================================
`config.toml`               the model's name and options, and the training settings
`schema.json`               the fitted schema; `vocabulary/` the raw ids behind each column's numbers
`model.safetensors`         the weights to use: the best so far by the monitored metric, or the first written before
                            any evaluation
`optimizer.safetensors`     all that resuming needs, in one file so that one rename commits it: the latest weights, the
                            optimiser, the random states, the running loss, and in its header the state
`state.json`                the same state for people and programs: epoch, step, loader position, best, history, model
`metrics.json`, `log.jsonl` the best evaluation; one line for each evaluation
==========================  ==========================================================================================

Every file is first written in full beside its place; only when all are there are they renamed, the best weights first
and then `optimizer.safetensors`. A crash between the two leaves the previous state beside newer best weights: the
resumed run passes the same evaluation again and writes the same weights again. Nothing in a run is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tomli_w
import torch
from torch import nn

from recfast.data.dataset import file_name
from recfast.errors import InputError
from recfast.files import atomic_path, disk_errors, write_json, write_text
from recfast.models import storage
from recfast.train.config import TrainConfig

RESUME = "optimizer.safetensors"
WEIGHTS = "model.safetensors"

# What may be changed between two parts of one training; all else would make it another training.
_FREE = {"epochs", "steps", "patience", "eval_batch_size", "checkpoint_every_steps", "accelerator"}


@dataclass
class State:
    """Where a training stands.

    Attributes
    ----------
    epoch, batch, step
        Finished epochs; batches done of the running one; updates in all.
    stale
        Evaluations since the best one.
    best
        The entry of `history` whose weights are in `model.safetensors`; None before the first evaluation.
    history
        One entry for each evaluation: epoch, step, loss, rows, seconds, rows_per_second, and `valid`, the metrics.
    rows, seconds
        Trained in the running epoch so far.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    stale: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    seconds: float = 0.0


def begin(folder: Path, model: nn.Module, data: Any, settings: TrainConfig) -> None:
    """Write what stays the same over a run: its configuration, the schema and the vocabularies."""
    with disk_errors("checkpoint", folder):
        folder.mkdir(parents=True, exist_ok=True)
        described = {"name": type(model).__name__, "options": _without_none(_config_of(model))}
        text = tomli_w.dumps({"model": described, "train": settings.model_dump(mode="json", exclude_none=True)})
        write_text(folder / "config.toml", text)
        data.schema.save(folder / "schema.json")
        with atomic_path(folder / "vocabulary", directory=True) as temporary:
            for name, vocabulary in data.vocabulary.items():
                vocabulary.save(temporary / f"{file_name(name)}.parquet")


def clear(folder: Path) -> None:
    """Remove an earlier training from `folder`, and nothing that recfast did not write there."""
    for name in (RESUME, "state.json", WEIGHTS, "metrics.json", "log.jsonl"):
        (folder / name).unlink(missing_ok=True)


def adopt(source: Path, folder: Path) -> None:
    """Bring the best weights of another run here, for a training that goes on from it."""
    clear(folder)
    if (source / WEIGHTS).exists():
        with disk_errors("checkpoint", folder), atomic_path(folder / WEIGHTS) as temporary:
            shutil.copyfile(source / WEIGHTS, temporary)


def exists(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, whole or damaged."""
    return (folder / RESUME).exists() or (folder / "state.json").exists()


def save(
    folder: Path,
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    tally: Mapping[str, torch.Tensor],
    *,
    loader: Mapping[str, Any],
    settings: TrainConfig,
    facts: Mapping[str, Any],
    best: bool,
) -> None:
    """Write a checkpoint, and the weights as the ones to use if they are the `best`.

    Raises
    ------
    InputError
        The disk is full or the folder may not be written; the previous checkpoint is as it was.
    """
    weights, extra = storage.split_state(model)
    moments, groups = _flatten(model, optimizer)
    drawn, drawn_header = _random_state()
    tensors = {
        **{f"model.{name}": tensor for name, tensor in weights.items()},
        **{f"optimizer.{name}": tensor for name, tensor in moments.items()},
        **{f"random.{name}": tensor for name, tensor in drawn.items()},
        **{f"tally.{name}": tensor for name, tensor in tally.items()},
    }
    record = {
        "format": storage.FORMAT,
        "model": {"name": type(model).__name__, "config": _config_of(model)},
        "train": settings.model_dump(mode="json"),
        "data": dict(facts),
        "torch": torch.__version__,
        "loader": dict(loader),
        **asdict(state),
    }
    with disk_errors("checkpoint", folder), contextlib.ExitStack() as files:
        # Renamed in the reverse of this order, once all are written.
        told = {**_told(state, settings), "state.json": json.dumps(record, indent=2, allow_nan=False) + "\n"}
        for name, text in told.items():
            files.enter_context(atomic_path(folder / name)).write_text(text, encoding="utf-8")
        path = files.enter_context(atomic_path(folder / RESUME))
        header = {"state": record, "extra": extra, "optimizer": groups, "random": drawn_header}
        storage.write_tensors(path, tensors, header)
        if best:
            path = files.enter_context(atomic_path(folder / WEIGHTS))
            storage.write_tensors(path, weights, {"extra": extra, "model": type(model).__name__, "step": state.step})


def tell(folder: Path, state: State, settings: TrainConfig) -> None:
    """Write `metrics.json` and `log.jsonl` of a state that is not the checkpoint's.

    Raises
    ------
    InputError
        As `save`.
    """
    with disk_errors("checkpoint", folder), contextlib.ExitStack() as files:
        for name, text in _told(state, settings).items():
            files.enter_context(atomic_path(folder / name)).write_text(text, encoding="utf-8")


def _told(state: State, settings: TrainConfig) -> dict[str, str]:
    return {
        "metrics.json": json.dumps(summary(state, settings), indent=2, allow_nan=False) + "\n",
        "log.jsonl": "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in state.history),
    }


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    settings: TrainConfig,
    facts: Mapping[str, Any],
) -> tuple[State, dict[str, torch.Tensor], dict[str, Any]]:
    """Bring a training back to its last checkpoint: `(state, tally, loader state)`.

    Raises
    ------
    InputError
        The checkpoint is damaged, of another format version, model, configuration or data set.
    """
    path = folder / RESUME
    tensors, header = storage.read_tensors(path)
    record = header.get("state")
    if not isinstance(record, dict):
        raise InputError(f"checkpoint: {path} holds no training state, expected what train.fit writes")
    _compare(path, record, model, settings, facts)
    if record["best"] is not None:
        # Found out now rather than after hours, when the best weights are to be restored.
        storage.read_tensors(folder / WEIGHTS)
    part = {prefix: _below(tensors, prefix) for prefix in ("model", "optimizer", "random", "tally")}
    storage.restore_state(model, part["model"], header["extra"], path)
    _unflatten(model, optimizer, part["optimizer"], header["optimizer"])
    _set_random_state(part["random"], header["random"])
    return State(**{f.name: record[f.name] for f in fields(State)}), part["tally"], record["loader"]


def restore_best(folder: Path, model: nn.Module) -> None:
    """Put the weights of `model.safetensors` into the model."""
    tensors, header = storage.read_tensors(folder / WEIGHTS)
    storage.restore_state(model, tensors, header["extra"], folder / WEIGHTS)


def summary(state: State, settings: TrainConfig) -> dict[str, Any]:
    """Return what `metrics.json` says."""
    return {
        "monitor": settings.monitor,
        "best": state.best,
        "epochs": state.epoch,
        "steps": state.step,
        "seconds": sum(entry["seconds"] for entry in state.history),
    }


def add_metrics(folder: Path | str, **metrics: Any) -> None:
    """Add results to a run's `metrics.json`, such as `test=train.evaluate(model, data.test)`."""
    path = Path(folder) / "metrics.json"
    write_json(path, {**(storage.read_json(path) if path.exists() else {}), **metrics})


def facts_of(data: Any, rows: int) -> dict[str, Any]:
    """Return what a data set must have in common with the one a checkpoint was trained on."""
    tables = {column.name: data.schema.rows(column.name) for column in data.schema.categorical}
    # Two vocabularies may be of one size: the raw ids, in order, tell them apart.
    ids = {name: _fingerprint(data.vocabulary[name].values) for name in tables}
    return {"rows": rows, "tables": tables, "ids": ids}


def _fingerprint(values: pl.Series) -> int:
    text, crc = values.cast(pl.String), 0
    for start in range(0, len(text), 1 << 16):
        crc = zlib.crc32("\0".join(text.slice(start, 1 << 16).to_list()).encode(), crc)
    return crc


def _compare(
    path: Path, record: Mapping[str, Any], model: nn.Module, settings: TrainConfig, facts: Mapping[str, Any]
) -> None:
    """Refuse to go on with anything but the same training."""
    found, name = record["model"], type(model).__name__
    if found["name"] != name:
        raise InputError(f"checkpoint: {path} is of the model {found['name']}, expected {name}")
    tables = record["data"]["tables"]
    for column, size in facts["tables"].items():
        if tables.get(column) != size:
            had = f"{tables[column]} ids" if column in tables else "no column of that name"
            raise InputError(
                f"checkpoint: {path} has another vocabulary, expected {size} ids in {column!r} as in the data at hand, "
                f"found {had}"
            )
        if record["data"]["ids"].get(column) != facts["ids"][column]:
            raise InputError(
                f"checkpoint: {path} has another vocabulary, expected the raw ids of {column!r} in the data at hand, "
                "found others, or another order"
            )
    for option, value in _jsonable(_config_of(model)).items():
        if found["config"].get(option) != value:
            raise InputError(
                f"checkpoint: {path} is of a {name} with {option} = {found['config'].get(option)!r}, expected {value!r}"
            )
    if record["data"]["rows"] != facts["rows"]:
        raise InputError(
            f"checkpoint: {path} was trained on {record['data']['rows']} rows, expected {facts['rows']} as in the "
            "data at hand"
        )
    for key, value in settings.model_dump(mode="json").items():
        # A setting that is younger than the checkpoint was at its default.
        had = record["train"].get(key, TrainConfig.model_fields[key].default)
        if key not in _FREE and had != value:
            raise InputError(
                f"checkpoint: {path} was trained with {key} = {had!r}, expected {value!r}; "
                "choose another folder, or resume=None to begin anew"
            )


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return _jsonable(config()) if callable(config) else {}


def _jsonable(value: Any) -> Any:
    """Return `value` as JSON gives it back, so that (1, 2) and [1, 2] compare equal."""
    return json.loads(json.dumps(value, allow_nan=False))


def _without_none(value: Any) -> Any:
    """TOML has no word for None."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value if v is not None] if isinstance(value, list) else value


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimiser's parameters, in its own order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _flatten(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the optimiser's tensors by parameter name, and the rest of its state as JSON."""
    if optimizer is None:
        return {}, {}
    names, state = _names(model, optimizer), optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for position, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[position]}:{key}"] = value
            else:
                plain.setdefault(names[position], {})[key] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return tensors, {"type": type(optimizer).__name__, "names": names, "plain": plain, "groups": groups}


def _unflatten(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
) -> None:
    if optimizer is None:
        return
    names, fresh = _names(model, optimizer), optimizer.state_dict()
    position = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for name, values in header["plain"].items():
        state.setdefault(position[name], {}).update(values)
    for path, tensor in tensors.items():
        name, key = path.rsplit(":", 1)
        state.setdefault(position[name], {})[key] = tensor
    groups = [
        # JSON knows no tuples; the fresh optimiser says where they belong.
        {k: tuple(saved[k]) if isinstance(v, tuple) else saved.get(k, v) for k, v in group.items()}
        for group, saved in zip(fresh["param_groups"], header["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state of every global random generator that a model may draw from."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002  (the global generator is what must be carried over)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    header = {
        "python": [version, gauss],
        "numpy": [legacy["bit_generator"], legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]],
    }
    return tensors, header


def _set_random_state(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    version, gauss = header["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, pos, has_gauss, cached = header["numpy"]
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        {"bit_generator": name, "state": {"key": key, "pos": pos}, "has_gauss": has_gauss, "gauss": cached}
    )
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
