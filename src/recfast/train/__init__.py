"""Training: `fit`, `evaluate`, settings, and runs that stop and resume exactly."""

# Not lazy: the functions `fit` and `evaluate` must stand before the modules of the same names. Fabric is imported by
# the first call of `fit`.
from recfast.train.checkpoint import add_metrics
from recfast.train.config import RunConfig, StageConfig, TrainConfig, override
from recfast.train.evaluate import evaluate, top_items
from recfast.train.fit import Run, fit
from recfast.train.lazy_adam import LazyAdam

__all__ = [
    "LazyAdam",
    "Run",
    "RunConfig",
    "StageConfig",
    "TrainConfig",
    "add_metrics",
    "evaluate",
    "fit",
    "override",
    "top_items",
]
