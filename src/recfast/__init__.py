"""recfast: recommenders made fast where they are slow.

`recfast.ops` are functions on tensors, each with a compiled kernel; `nn`, `index` and `rerank` are modules and objects
over them; `models`, `data`, `train` and `Pipeline` make a whole recommender of it. Everything is imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recfast import data, index, metrics, models, nn, ops, rerank, train
    from recfast.doctor import show_config
    from recfast.errors import InputError
    from recfast.pipeline import Pipeline

__version__ = "0.1.0"

_MODULES = ("data", "index", "metrics", "models", "nn", "ops", "rerank", "train")
_NAMES = {
    "InputError": "recfast.errors",
    "Pipeline": "recfast.pipeline",
    "show_config": "recfast.doctor",
}

__all__ = [
    "InputError",
    "Pipeline",
    "__version__",
    "data",
    "index",
    "metrics",
    "models",
    "nn",
    "ops",
    "rerank",
    "show_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"recfast.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'recfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
