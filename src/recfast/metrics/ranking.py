"""Is the list right? Recall, precision, NDCG, hit rate, MRR and MAP of top-k lists, a value for each user.

`lists` are ids int64 [U, K], best first, -1 where a list is shorter; an id that comes twice counts at its first place.
`relevant` is a pair (values, offsets), such as `data.Jagged`: the distinct relevant ids of each user. A user without
relevant ids gets NaN, for nothing is defined there. Memory is O(U K + T): there is no users x items matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recfast.errors import InputError
from recfast.metrics import _check


def hits(lists: Any, relevant: Any, k: int | None = None, *, metric: str = "hits") -> tuple[np.ndarray, np.ndarray]:
    """Which places of each list are hits.

    Returns
    -------
    (bool [U, min(k, K)], int64 [U])
        And the number of distinct relevant ids of each user.
    """
    ids = _check.lists(metric, lists, k)
    users, width = ids.shape
    wanted = _check.jagged(metric, "relevant", relevant, users)
    owner = np.repeat(np.arange(users), np.diff(wanted.offsets))
    # Ids are renumbered by rank, so that user and id fit into one number whatever the ids are.
    distinct, code = np.unique(np.concatenate([ids.ravel(), wanted.values]), return_inverse=True)
    span = max(len(distinct), 1)
    key = np.arange(users).repeat(width) * span + code[: ids.size]
    truth = np.unique(owner * span + code[ids.size :])
    counts = np.bincount(truth // span, minlength=users)
    place = np.minimum(np.searchsorted(truth, key), max(len(truth) - 1, 0))
    found = truth[place] == key if len(truth) else np.zeros(len(key), dtype=bool)
    first = np.zeros(len(key), dtype=bool)
    first[np.unique(key, return_index=True)[1]] = True
    return (found & first).reshape(users, width) & (ids >= 0), counts


def _ratio(value: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.where(total > 0, value / np.maximum(total, 1), np.nan)


def recall(lists: Any, relevant: Any, k: int | None = None) -> np.ndarray:
    r"""Share of the relevant ids that the list holds: :math:`|L_k \cap R| / |R|`, float64 [U].

    Examples
    --------
    >>> recall([[4, 7, 9]], ([7, 8], [0, 2]), k=2)
    array([0.5])
    """
    found, counts = hits(lists, relevant, k, metric="recall")
    return _ratio(found.sum(1), counts)


def precision(lists: Any, relevant: Any, k: int | None = None) -> np.ndarray:
    r"""Share of the k places that hold a relevant id: :math:`|L_k \cap R| / k`, float64 [U].

    A list that is shorter than k is not let off: its empty places count as wrong.
    """
    found, counts = hits(lists, relevant, k, metric="precision")
    length = found.shape[1] if k is None else k
    return np.where(counts > 0, found.sum(1) / max(length, 1), np.nan)


def ndcg(lists: Any, relevant: Any, k: int | None = None, *, gains: Any = None) -> np.ndarray:
    r"""Normalised discounted cumulative gain, float64 [U].

    .. math::
        \frac{\sum_{i \le k} g(l_i) / \log_2(i + 1)}{\sum_{i \le \min(|R|, k)} g_{(i)} / \log_2(i + 1)}

    with the gain g of an id that is not relevant 0 and :math:`g_{(1)} \ge g_{(2)} \ge \dots` those of the user's
    relevant ids. The best possible list is as long as k, whatever the width of `lists`.

    Parameters
    ----------
    gains : [T]
        The gain of each value of `relevant`, at least 0: grades, or `2**grade - 1`. None: 1 each. Of an id that comes
        twice with a user the greatest counts. A user whose gains are all 0 gets NaN.

    References
    ----------
    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 20, 2002.

    Examples
    --------
    >>> ndcg([[7, 8]], ([7, 8], [0, 2]), gains=[1, 3]).round(4)
    array([0.7967])
    """
    found, counts = hits(lists, relevant, k, metric="ndcg")
    length = found.shape[1] if k is None else k
    discount = 1.0 / np.log2(np.arange(length) + 2.0)
    if gains is None:
        ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(counts, length)]
        gained = found @ discount[: found.shape[1]]
        return np.where(counts > 0, gained / np.where(ideal > 0, ideal, 1.0), np.nan)
    ids = _check.lists("ndcg", lists, k)
    wanted = _check.jagged("ndcg", "relevant", relevant, len(ids))
    gain = _check.vector("ndcg", "gains", gains)
    if len(gain) != len(wanted.values):
        raise InputError(f"ndcg: gains must have {len(wanted.values)} entries like relevant.values, got {len(gain)}")
    wrong = ~((gain >= 0) & np.isfinite(gain))
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(f"ndcg: gains[{at}] must be at least 0 and finite, got {gain[at]:g}")
    owner = np.repeat(np.arange(len(ids)), np.diff(wanted.offsets))
    # Greatest first within a user: what is kept of an id is the first, and the ideal is what is kept in that order.
    order = np.lexsort((-gain, owner))
    owner, values, gain = owner[order], wanted.values[order], gain[order]
    _, first = np.unique(np.stack([owner, values], 1), axis=0, return_index=True)
    kept = np.sort(first)
    rank = np.arange(len(kept)) - (np.cumsum(counts) - counts)[owner[kept]]
    place = discount[np.minimum(rank, length - 1)] * (rank < length) if length else np.zeros(len(kept))
    ideal = np.bincount(owner[kept], gain[kept] * place, minlength=len(ids))
    # Hits are few: each is looked up among the user's values, which are put in the order of (user, id).
    user, at = np.nonzero(found)
    owner, values, gain = owner[first], values[first], gain[first]
    distinct = np.unique(values)
    key = owner * max(len(distinct), 1) + np.searchsorted(distinct, values)
    hit = user * max(len(distinct), 1) + np.searchsorted(distinct, ids[user, at])
    gained = np.bincount(user, gain[np.searchsorted(key, hit)] * discount[at], minlength=len(ids))
    defined = np.bincount(owner, gain, minlength=len(ids)) > 0
    return np.where(defined, gained / np.where(ideal > 0, ideal, 1.0), np.nan)


def hit_rate(lists: Any, relevant: Any, k: int | None = None) -> np.ndarray:
    """1 where the list holds a relevant id, else 0; float64 [U]."""
    found, counts = hits(lists, relevant, k, metric="hit_rate")
    return np.where(counts > 0, found.any(1), np.nan)


def mrr(lists: Any, relevant: Any, k: int | None = None) -> np.ndarray:
    """1 / place (from 1) of the first relevant id, 0 without one; float64 [U]."""
    found, counts = hits(lists, relevant, k, metric="mrr")
    reciprocal = found / np.arange(1, found.shape[1] + 1)
    return np.where(counts > 0, reciprocal.max(1, initial=0.0), np.nan)


def average_precision(lists: Any, relevant: Any, k: int | None = None) -> np.ndarray:
    r"""Average precision, whose mean over users is MAP@k; float64 [U].

    .. math:: \frac{1}{\min(|R|, k)} \sum_{i \le k} [l_i \in R] \frac{|L_i \cap R|}{i}
    """
    found, counts = hits(lists, relevant, k, metric="average_precision")
    length = found.shape[1] if k is None else k
    precision = found.cumsum(1) / np.arange(1, found.shape[1] + 1)
    return _ratio((precision * found).sum(1), np.minimum(counts, length))
