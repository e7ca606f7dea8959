"""Recommenders, one paper a file. A model is a plain `torch.nn.Module` with `forward(batch)` and `loss(output, batch)`.

Nothing is imported before it is asked for: `models.DeepFM` loads `models/ctr/deepfm.py` and no other model.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recfast.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from recfast.data import Schema

_PLACES = {
    "DARE": "recfast.models.ctr.dare",
    "DCNv2": "recfast.models.ctr.dcn_v2",
    "DeepFM": "recfast.models.ctr.deepfm",
    "DIN": "recfast.models.ctr.din",
    "DSSM": "recfast.models.retrieval.dssm",
    "EASE": "recfast.models.retrieval.ease",
    "ETA": "recfast.models.ctr.eta",
    "GFCF": "recfast.models.retrieval.gf_cf",
    "ItemKNN": "recfast.models.retrieval.baselines",
    "LightGCN": "recfast.models.retrieval.lightgcn",
    "MF": "recfast.models.retrieval.mf",
    "Popularity": "recfast.models.retrieval.baselines",
    "QIN": "recfast.models.ctr.qin",
    "SDIM": "recfast.models.ctr.sdim",
    "SIM": "recfast.models.ctr.sim",
    "SimpleX": "recfast.models.retrieval.simplex",
    "SparCode": "recfast.models.retrieval.sparcode",
    "TWIN": "recfast.models.ctr.twin",
    "TwoTower": "recfast.models.retrieval.two_tower",
}

__all__ = [
    "DARE",
    "DIN",
    "DSSM",
    "EASE",
    "ETA",
    "GFCF",
    "MF",
    "QIN",
    "SDIM",
    "SIM",
    "TWIN",
    "DCNv2",
    "DeepFM",
    "ItemKNN",
    "LightGCN",
    "Popularity",
    "SimpleX",
    "SparCode",
    "TwoTower",
    "build",
    "convert",
    "load",
    "names",
    "options",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'recfast.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


def names() -> list[str]:
    """Return the names that `build` knows, sorted."""
    return sorted(_PLACES)


def _nearest(name: str, known: list[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, or all of them."""
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1)
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    return f"expected one of {', '.join(known)}" if known else "expected none"


def build(name: str, schema: Schema, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Construct the model called `name`.

    Parameters
    ----------
    name
        One of `names()`.
    schema
        A fitted schema, as `Dataset.schema` gives it.
    config
        The model's keyword options, as `model.config()` gives them back; left out means its own default.

    Raises
    ------
    InputError
        The model or one of its options is unknown; the sentence names the nearest known one.
    """
    known = options(name)
    chosen = dict(config or {})
    for key in chosen:
        if key not in known:
            raise InputError(f"models.build: {name} has no option {key!r}, {_nearest(key, known)}")
    return __getattr__(name)(schema, **chosen)


def options(name: str) -> list[str]:
    """Return the names of the keyword options of the model called `name`, which `build` takes."""
    if name not in _PLACES:
        raise InputError(f"models.build: model {name!r} is unknown, {_nearest(name, names())}")
    parameters = inspect.signature(__getattr__(name)).parameters.values()
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "schema"]


def load(run: str | os.PathLike[str]) -> nn.Module:
    """Rebuild the model of a run folder, with its best weights, on the CPU and in evaluation mode.

    Parameters
    ----------
    run
        A folder that `train.fit(..., out=run)` wrote; `state.json`, `schema.json` and `model.safetensors` are read.

    Raises
    ------
    InputError
        A file is missing, damaged, of another format version or of another model; one sentence says which.
    """
    from recfast.models import storage

    return storage.load_model(run)


def convert(model: nn.Module, precision: str, **options: Any) -> nn.Module:
    """Return a copy of a trained model whose embedding tables have another precision.

    Parameters
    ----------
    model
        A model with the option `precision`.
    precision
        As `nn.EmbeddingTables` takes it.
    **options
        Options of the tables to change, for training on.

    Raises
    ------
    InputError
        The model has no such option.
    """
    from recfast.models import storage

    return storage.convert_model(model, precision, **options)
