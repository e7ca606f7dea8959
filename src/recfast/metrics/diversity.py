"""Is the list varied, and does the catalogue get its turn? `lists` are ids int64 [U, K], -1 where a list is shorter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from recfast.errors import InputError
from recfast.metrics import _check
from recfast.metrics.ranking import hits

# Float64 values of list items held at once.
_CELLS = 4_000_000


def _table(metric: str, name: str, value: Any) -> np.ndarray:
    table = _check.array(value)
    if table.ndim != 2:
        raise InputError(f"{metric}: {name} must have shape [N, G], got {list(table.shape)}")
    if np.issubdtype(table.dtype, np.floating) and np.isnan(table).any():
        row, column = np.argwhere(np.isnan(table))[0]
        raise InputError(f"{metric}: {name}[{row}, {column}] is NaN")
    return table


def _blocks(users: int, cells: int) -> Iterator[slice]:
    step = max(1, _CELLS // max(cells, 1))
    for first in range(0, users, step):
        yield slice(first, first + step)


def intra_list_diversity(lists: Any, features: Any, *, statistic: str = "mean") -> np.ndarray:
    r"""Mean (or least) cosine distance between two items of a list, float64 [U].

    .. math:: \frac{2}{n (n - 1)} \sum_{i < j} \left(1 - \frac{f_i \cdot f_j}{|f_i| |f_j|}\right)

    Parameters
    ----------
    lists : int64 [U, K]
    features : [N, G]
        Row of each id. A zero row is at distance 1 from everything.
    statistic : {"mean", "min"}

    Returns
    -------
    float64 [U]; 0 for a list of fewer than two items, which has no pair.

    Raises
    ------
    InputError
        An id outside [0, N), or NaN in the features.

    References
    ----------
    Ziegler et al., "Improving recommendation lists through topic diversification", WWW 2005.
    """
    if statistic not in ("mean", "min"):
        raise InputError(f"intra_list_diversity: statistic must be mean or min, got {statistic!r}")
    ids = _check.lists("intra_list_diversity", lists)
    table = _table("intra_list_diversity", "features", features)
    _check.rows("intra_list_diversity", ids, len(table))
    users, width = ids.shape
    out = np.zeros(users)
    for part in _blocks(users, width * max(table.shape[1], width)):
        valid = ids[part] >= 0
        unit = table[np.where(valid, ids[part], 0)].astype(np.float64) * valid[..., None]
        norm = np.linalg.norm(unit, axis=2, keepdims=True)
        unit /= np.where(norm > 0, norm, 1.0)
        count = valid.sum(1)
        pairs = count * (count - 1)
        if statistic == "mean":
            # sum_{i != j} f_i . f_j = |sum f_i|^2 - sum |f_i|^2: no matrix of pairs.
            alike = np.square(unit.sum(1)).sum(1) - np.square(unit).sum((1, 2))
            # Rounding may leave a list of equal items at -1e-16.
            out[part] = np.where(pairs > 0, np.clip(1.0 - alike / np.maximum(pairs, 1), 0.0, None), 0.0)
        else:
            alike = unit @ unit.transpose(0, 2, 1)
            pair = valid[:, :, None] & valid[:, None, :] & ~np.eye(width, dtype=bool)
            most = np.where(pair, alike, -np.inf).max((1, 2), initial=-np.inf)
            out[part] = np.where(pairs > 0, np.clip(1.0 - most, 0.0, None), 0.0)
    return out


def topic_count(lists: Any, topics: Any) -> np.ndarray:
    """How many topics the items of each list have together, int64 [U].

    Parameters
    ----------
    lists : int64 [U, K]
    topics : [N, G]
        Above 0 where the item of that id has the topic, such as `Dataset.item_features()`.
    """
    ids = _check.lists("topic_count", lists)
    table = _table("topic_count", "topics", topics) > 0
    _check.rows("topic_count", ids, len(table))
    out = np.zeros(len(ids), dtype=np.int64)
    for part in _blocks(len(ids), ids.shape[1] * table.shape[1]):
        valid = ids[part] >= 0
        out[part] = (table[np.where(valid, ids[part], 0)] & valid[..., None]).any(1).sum(1)
    return out


def s_recall(lists: Any, topics: Any) -> np.ndarray:
    r"""Share of the catalogue's topics that a list covers: :math:`|\bigcup_{i \in L} T_i| / |\bigcup_i T_i|`, [U].

    References
    ----------
    Zhai, Cohen and Lafferty, "Beyond independent relevance: methods and evaluation metrics for subtopic retrieval",
    SIGIR 2003.
    """
    table = _table("s_recall", "topics", topics) > 0
    total = int(table.any(0).sum())
    if total == 0:
        raise InputError("s_recall: topics has no positive entry, there is nothing to cover")
    return topic_count(lists, table) / total


def catalogue_coverage(lists: Any, items: int) -> float:
    """Share of the catalogue that comes up in any list: distinct ids / `items`, the number of items there are."""
    ids = _check.lists("catalogue_coverage", lists)
    distinct = len(np.unique(ids[ids >= 0]))
    if items < 1 or distinct > items:
        raise InputError(f"catalogue_coverage: items must be at least {max(distinct, 1)}, got {items}")
    return distinct / items


def exposure(lists: Any, rows: int) -> np.ndarray:
    """How often each id in [0, rows) comes up in the lists, int64 [rows]."""
    ids = _check.lists("exposure", lists)
    _check.rows("exposure", ids, rows)
    return np.bincount(ids[ids >= 0], minlength=rows)


def _counts(metric: str, value: Any) -> np.ndarray:
    counts = _check.vector(metric, "counts", value)
    wrong = ~np.isfinite(counts) | (counts < 0)
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(f"{metric}: counts[{at}] must be at least 0 and finite, got {counts[at]:g}")
    if counts.sum() == 0:
        raise InputError(f"{metric}: counts must have a positive entry")
    return counts


def gini(counts: Any) -> float:
    r"""Gini coefficient of exposure over items: 0 when all get the same, (N - 1) / N when one gets everything.

    .. math:: \frac{\sum_{i=1}^{N} (2 i - N - 1) c_{(i)}}{N \sum_i c_i}, \quad c_{(1)} \le \dots \le c_{(N)}

    Parameters
    ----------
    counts : [N]
        Exposure of each item, zeros included, as from `exposure` (without row 0 where that is the unknown item).
    """
    ordered = np.sort(_counts("gini", counts))
    n = len(ordered)
    return float(((2 * np.arange(1, n + 1) - n - 1) @ ordered) / (n * ordered.sum()))


def exposure_entropy(counts: Any) -> float:
    r"""Shannon entropy of exposure in bits: :math:`-\sum_i p_i \log_2 p_i`, :math:`p_i = c_i / \sum_j c_j`."""
    counts = _counts("exposure_entropy", counts)
    share = counts[counts > 0] / counts.sum()
    # Adding 0 turns -0.0 into 0.0.
    return float(-(share @ np.log2(share)) + 0.0)


def novelty(lists: Any, counts: Any) -> np.ndarray:
    r"""Mean self-information of a list's items in bits, float64 [U]; 0 for an empty list.

    .. math:: \frac{1}{n} \sum_{i \in L} -\log_2 \frac{c_i + 1}{\sum_j (c_j + 1)}

    Parameters
    ----------
    lists : int64 [U, K]
    counts : [N]
        Interactions of each id in the training data. One is added to each, so that new items stay finite.

    References
    ----------
    Zhou et al., "Solving the apparent diversity-accuracy dilemma of recommender systems", PNAS 107, 2010.
    """
    ids = _check.lists("novelty", lists)
    smoothed = _counts("novelty", counts) + 1.0
    _check.rows("novelty", ids, len(smoothed))
    bits = -np.log2(smoothed / smoothed.sum())
    valid = ids >= 0
    total = np.where(valid, bits[np.where(valid, ids, 0)], 0.0).sum(1)
    return total / np.maximum(valid.sum(1), 1)


def _mean_directions(table: np.ndarray, members: _check.Jagged) -> np.ndarray:
    """The mean of the unit rows of each user's members, float64 [U, G]; NaN without members."""
    counts = np.diff(members.offsets)
    norm = np.linalg.norm(table, axis=1, keepdims=True)
    unit = table / np.where(norm > 0, norm, 1.0)
    out = np.zeros((len(counts), table.shape[1]))
    owner = np.repeat(np.arange(len(counts)), counts)
    for part in _blocks(len(owner), table.shape[1]):
        first = np.flatnonzero(np.diff(owner[part], prepend=-1))
        # A user that two blocks share is added to by both.
        out[owner[part][first]] += np.add.reduceat(unit[members.values[part]], first, axis=0)
    return out / np.where(counts > 0, counts, np.nan)[:, None]


def serendipity(
    lists: Any,
    relevant: Any,
    k: int | None = None,
    *,
    expected: Any = None,
    history: Any = None,
    features: Any = None,
) -> np.ndarray:
    r"""Mean over a list's items of being relevant and unexpected, float64 [U]; 0 for an empty list.

    .. math::
        \frac{1}{n} \sum_{i \in L_k} [i \in R]\, [i \notin E] \left(1 - \frac{1}{|H|} \sum_{h \in H}
        \frac{f_i \cdot f_h}{|f_i| |f_h|}\right)

    There is no one definition; this is one form of the two that are in use. With `expected` alone it is the share of
    items that are of use and that a plain method would not have found (Ge et al.); with `history` and `features` alone
    the mean distance from what the user knows (Zhang et al.), of relevant items. Both together multiply.

    Parameters
    ----------
    lists : int64 [U, K]
        An id that comes twice counts at its first place.
    relevant : (values, offsets), or None
        The relevant ids of each user; None: all are.
    k : int
        The first k places; None: all.
    expected : int64 [U, M], -1 padded
        E, what a plain method gives, such as the most popular items.
    history : (values, offsets)
        H, the ids that each user knows, rows of `features`.
    features : [N, G]
        Row of each id. A zero row is at distance 1 from everything.

    Returns
    -------
    float64 [U]; NaN for a user without relevant ids, or without history where that is given.

    Raises
    ------
    InputError
        Neither `expected` nor `history` is given, or one of `history` and `features` only; an id of the lists or the
        history outside [0, N); NaN in the features.

    References
    ----------
    Ge, Delgado-Battenfeld and Jannach, "Beyond accuracy: evaluating recommender systems by coverage and serendipity",
    RecSys 2010. Zhang et al., "Auralist: introducing serendipity into music recommendation", WSDM 2012.

    Examples
    --------
    >>> serendipity([[4, 7, 9]], ([7, 9], [0, 2]), expected=[[9, 1]])  # 7 alone is right and no matter of course
    array([0.33333333])
    """
    metric = "serendipity"
    if (history is None) != (features is None):
        raise InputError(f"{metric}: history and features must be given together")
    if expected is None and history is None:
        raise InputError(f"{metric}: expected, or history and features, must be given")
    ids = _check.lists(metric, lists, k)
    users = len(ids)
    valid = ids >= 0
    if relevant is None:
        # Every id of the list, so that one that comes twice counts once here too.
        relevant = (ids[valid], np.concatenate([[0], np.cumsum(valid.sum(1))]))
        defined = np.ones(users, dtype=bool)
        worth = hits(lists, relevant, k, metric=metric)[0].astype(np.float64)
    else:
        found, counts = hits(lists, relevant, k, metric=metric)
        worth, defined = found.astype(np.float64), counts > 0
    if expected is not None:
        plain = _check.lists(metric, expected)
        if len(plain) != users:
            raise InputError(f"{metric}: expected must hold {users} lists like lists, got {len(plain)}")
        kept = plain >= 0
        plain = (plain[kept], np.concatenate([[0], np.cumsum(kept.sum(1))]))
        worth *= ~hits(lists, plain, k, metric=metric)[0]
    if history is not None:
        table = _table(metric, "features", features).astype(np.float64)
        _check.rows(metric, ids, len(table))
        known = _check.jagged(metric, "history", history, users)
        wrong = (known.values < 0) | (known.values >= len(table))
        if wrong.any():
            at = int(wrong.argmax())
            raise InputError(f"{metric}: history.values[{at}] = {known.values[at]} is outside [0, {len(table)})")
        mean = _mean_directions(table, known)
        # Without rows all lists are empty, and there is nothing to look up.
        for part in _blocks(users if len(table) else 0, ids.shape[1] * table.shape[1]):
            rows = table[np.where(valid[part], ids[part], 0)]
            norm = np.linalg.norm(rows, axis=2)
            alike = np.einsum("ukg,ug->uk", rows, mean[part]) / np.where(norm > 0, norm, 1.0)
            worth[part] *= 1.0 - alike
        defined &= np.diff(known.offsets) > 0
    return np.where(defined, np.where(valid, worth, 0.0).sum(1) / np.maximum(valid.sum(1), 1), np.nan)
