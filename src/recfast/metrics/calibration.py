"""Is a predicted chance of 10 % a click in ten? Expected calibration error and predicted over observed clicks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recfast.errors import InputError
from recfast.metrics import _check


class Reliability(NamedTuple):
    """What `reliability` returns, by bin: mean prediction, mean label, rows; arrays [bins]."""

    predicted: np.ndarray
    observed: np.ndarray
    rows: np.ndarray


def reliability(labels: Any, probabilities: Any, *, bins: int = 10) -> Reliability:
    """Mean prediction and mean label in bins of equal mass.

    Rows are cut by their prediction into `bins` parts of equal size (up to one row; n parts if there are fewer rows).
    Rows of equal prediction share their mean label, so that the order of the rows does not matter.
    """
    return _reliability("reliability", labels, probabilities, bins)


def _reliability(metric: str, labels: Any, probabilities: Any, bins: int) -> Reliability:
    positive = _check.labels(metric, labels)
    chance = _check.probabilities(metric, probabilities, len(positive))
    if bins < 1:
        raise InputError(f"{metric}: bins must be at least 1, got {bins}")
    distinct, which, rows = np.unique(chance, return_inverse=True, return_counts=True)
    label = np.bincount(which, positive) / rows
    edges = np.linspace(0, len(chance), min(bins, len(chance)) + 1).astype(np.int64)
    size = np.diff(edges)
    predicted = np.add.reduceat(np.repeat(distinct, rows), edges[:-1]) / size
    observed = np.add.reduceat(np.repeat(label, rows), edges[:-1]) / size
    return Reliability(predicted, observed, size)


def ece(labels: Any, probabilities: Any, *, bins: int = 10) -> float:
    r"""Expected calibration error in bins of equal mass: :math:`\sum_b \frac{n_b}{n} |\bar p_b - \bar y_b|`.

    Raises
    ------
    InputError
        A probability that is NaN or outside [0, 1]; a label that is not 0 or 1; bins below 1.

    References
    ----------
    Nixon et al., "Measuring calibration in deep learning", CVPR workshops 2019 (adaptive bins).
    """
    predicted, observed, rows = _reliability("ece", labels, probabilities, bins)
    return float(np.average(np.abs(predicted - observed), weights=rows))


def pcoc(labels: Any, probabilities: Any) -> float:
    r"""Predicted clicks over clicks: :math:`\sum_i p_i / \sum_i y_i`; 1 is right on average.

    Raises
    ------
    InputError
        No positive label, where it is not defined; or as for `ece`.
    """
    positive = _check.labels("pcoc", labels)
    chance = _check.probabilities("pcoc", probabilities, len(positive))
    if not positive.any():
        raise InputError("pcoc: labels are all 0, a positive one is needed")
    return float(chance.sum() / positive.sum())
