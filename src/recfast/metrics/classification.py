"""Does the score tell a click from none? AUC, AUC within groups, logloss. Labels are 0 or 1, arrays [n]."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recfast.errors import InputError
from recfast.metrics import _check


class GAUC(NamedTuple):
    """What `gauc` returns: the weighted mean, the groups it is over, and those left out for having one label only."""

    value: float
    groups: int
    skipped: int


def auc(labels: Any, scores: Any) -> float:
    r"""Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    .. math:: \frac{\sum_{i: y_i = 1} \mathrm{rank}_i - P (P + 1) / 2}{P N}

    with mean ranks among equal scores. Exact, O(n log n).

    Raises
    ------
    InputError
        A NaN score, a label that is not 0 or 1, or labels of one class only.

    Examples
    --------
    >>> auc([0, 1, 0, 1], [0.1, 0.9, 0.9, 0.8])
    0.625
    """
    positive = _check.labels("auc", labels)
    score = _check.vector("auc", "scores", scores, size=len(positive))
    if positive.all() or not positive.any():
        raise InputError(f"auc: labels are all {int(positive[0])}, both classes are needed")
    values, _ = _grouped_auc(positive, score, np.zeros(len(score), dtype=np.int64))
    return float(values[0])


def gauc(labels: Any, scores: Any, groups: Any, *, weight: str = "rows") -> GAUC:
    r"""AUC within each group (usually a user), averaged: :math:`\sum_g w_g \mathrm{AUC}_g / \sum_g w_g`.

    Parameters
    ----------
    labels, scores : [n]
    groups : [n]
        Group of each row, in any order.
    weight : {"rows", "equal"}
        A group counts by its rows (Zhou et al., KDD 2018), or as one.

    Raises
    ------
    InputError
        As for `auc`; or no group has both classes.
    """
    positive = _check.labels("gauc", labels)
    score = _check.vector("gauc", "scores", scores, size=len(positive))
    group = _check.array(groups)
    if group.shape != score.shape:
        raise InputError(f"gauc: groups must have shape [{len(score)}], got {list(group.shape)}")
    if weight not in ("rows", "equal"):
        raise InputError(f"gauc: weight must be rows or equal, got {weight!r}")
    values, rows = _grouped_auc(positive, score, np.unique(group, return_inverse=True)[1])
    known = ~np.isnan(values)
    if not known.any():
        raise InputError(f"gauc: none of the {len(values)} groups has both classes")
    weights = rows[known] if weight == "rows" else None
    return GAUC(float(np.average(values[known], weights=weights)), int(known.sum()), int((~known).sum()))


def _grouped_auc(positive: np.ndarray, score: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The AUC of each group, NaN with one class only, and the rows of each. Groups are 0, 1, ..., none empty."""
    order = np.lexsort((score, group))
    group, score, positive = group[order], score[order], positive[order]
    rows = np.bincount(group)
    rank = np.arange(len(score)) - (np.cumsum(rows) - rows)[group] + 1.0
    new = np.ones(len(score), dtype=bool)
    new[1:] = (group[1:] != group[:-1]) | (score[1:] != score[:-1])
    tie = np.cumsum(new) - 1
    rank = (np.bincount(tie, rank) / np.bincount(tie))[tie]
    positives = np.bincount(group, positive)
    above = np.bincount(group, rank * positive) - positives * (positives + 1) / 2
    pairs = positives * (rows - positives)
    return np.where(pairs > 0, above / np.maximum(pairs, 1), np.nan), rows


def logloss(labels: Any, probabilities: Any, *, clip: float = 1e-7) -> float:
    r"""Mean negative log-likelihood in nats, probabilities clipped to [clip, 1 - clip].

    .. math:: -\frac{1}{n} \sum_i y_i \ln p_i + (1 - y_i) \ln(1 - p_i)

    Raises
    ------
    InputError
        A probability that is NaN or outside [0, 1]; a label that is not 0 or 1.
    """
    positive = _check.labels("logloss", labels)
    chance = _check.probabilities("logloss", probabilities, len(positive))
    if not 0 < clip < 0.5:
        raise InputError(f"logloss: clip must be in (0, 0.5), got {clip}")
    chance = np.clip(chance, clip, 1 - clip)
    return float(-np.mean(np.where(positive, np.log(chance), np.log1p(-chance))))
