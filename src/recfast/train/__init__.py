"""Training: `fit`, `evaluate`, settings, and runs that stop and resume exactly."""

# Not lazy: the functions `fit` and `evaluate` must stand before the modules of the same names. Fabric is imported by
# the first call of `fit`.
from recfast.train.checkpoint import add_metrics
from recfast.train.config import RunConfig, TrainConfig
from recfast.train.evaluate import evaluate
from recfast.train.fit import Run, fit

__all__ = ["Run", "RunConfig", "TrainConfig", "add_metrics", "evaluate", "fit"]
