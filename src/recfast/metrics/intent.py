"""Is the list right for whatever the user may be after? alpha-nDCG, ERR-IA and intent-aware MAP, a value for each user.

A topic (genre, category, aspect) stands for an intent. An item serves an intent if it is relevant to the user and has
the topic. `lists` and `relevant` are those of the metrics of ranking; `topics` [N, G] is above 0 where the item of that
id has the topic, such as `Dataset.item_features()`. A user none of whose relevant ids has a topic gets NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from recfast.errors import InputError
from recfast.metrics import _check
from recfast.metrics.diversity import _blocks, _table
from recfast.metrics.ranking import hits


class _Problem(NamedTuple):
    """Checked arguments."""

    ids: np.ndarray  # [U, K], -1 where there is no relevant item (or an earlier one again)
    length: int  # places a list may have
    topics: np.ndarray  # bool [N, G]
    relevant: _check.Jagged  # distinct ids of each user, ascending
    served: np.ndarray  # int64 [U, G]: the user's relevant items of each topic


def _problem(metric: str, lists: Any, relevant: Any, topics: Any, k: int | None) -> _Problem:
    found, _ = hits(lists, relevant, k, metric=metric)
    ids = np.where(found, _check.lists(metric, lists, k), -1)
    table = _table(metric, "topics", topics) > 0
    users = len(ids)
    wanted = _check.jagged(metric, "relevant", relevant, users)
    wrong = (wanted.values < 0) | (wanted.values >= len(table))
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(f"{metric}: relevant.values[{at}] = {wanted.values[at]} is outside [0, {len(table)})")
    owner = np.repeat(np.arange(users), np.diff(wanted.offsets))
    pairs = np.unique(owner * max(len(table), 1) + wanted.values)
    owner, values = np.divmod(pairs, max(len(table), 1))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=users))]).astype(np.int64)
    served = np.zeros((users, table.shape[1]), dtype=np.int64)
    for part in _blocks(len(values), table.shape[1]):
        rows = owner[part]
        first = np.flatnonzero(np.diff(rows, prepend=-1))  # no user is before user 0
        # A user that two blocks share is added to by both.
        served[rows[first]] += np.add.reduceat(table[values[part]], first, axis=0, dtype=np.int64)
    length = ids.shape[1] if k is None else k
    return _Problem(ids, length, table, _check.Jagged(values, offsets), served)


def _preferences(metric: str, value: Any, problem: _Problem) -> np.ndarray:
    """P(topic | user), float64 [U, G]."""
    users, count = problem.served.shape
    if value is None:
        served = problem.served > 0
        return served / np.maximum(served.sum(1, keepdims=True), 1)
    out = _check.array(value, np.float64)
    if out.shape not in ((count,), (users, count)):
        raise InputError(
            f"{metric}: preferences must have shape [{count}] or [{users}, {count}], got {list(out.shape)}"
        )
    wrong = ~((out >= 0) & np.isfinite(out))
    if wrong.any():
        place = tuple(int(x) for x in np.argwhere(wrong)[0])
        raise InputError(
            f"{metric}: preferences[{', '.join(map(str, place))}] must be at least 0 and finite, got {out[place]:g}"
        )
    total = out.sum(-1, keepdims=True)
    if (total == 0).any():
        raise InputError(f"{metric}: preferences must have a positive entry for each user")
    return np.broadcast_to(out / total, (users, count))


def _served_rows(problem: _Problem) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of users and what their lists' places serve, bool [users, K, G]."""
    if problem.topics.size == 0:
        return
    for part in _blocks(len(problem.ids), problem.ids.shape[1] * problem.topics.shape[1]):
        valid = problem.ids[part] >= 0
        yield part, problem.topics[np.where(valid, problem.ids[part], 0)] & valid[..., None]


def _gained(rows: np.ndarray, decay: float, weights: np.ndarray, discount: np.ndarray) -> np.ndarray:
    """sum_i discount_i sum_z rows_iz weights_z decay^(earlier rows with z); rows bool [U, K, G] -> [U]."""
    earlier = rows.cumsum(1) - rows
    gain = (rows * np.power(decay, earlier) * weights[:, None, :]).sum(2)
    return gain @ discount[: rows.shape[1]]


def _greedy(problem: _Problem, decay: float, weights: np.ndarray, discount: np.ndarray) -> np.ndarray:
    """The same of lists made of each user's relevant items, by taking what gains most (ties: lowest id)."""
    values, offsets = problem.relevant
    sizes = np.diff(offsets)
    out = np.zeros(len(sizes))
    # Users with many relevant items first: those of a block have about as many, and little is filled up.
    order = np.argsort(-sizes, kind="stable")
    start = 0
    while start < len(order) and sizes[order[start]] > 0:
        widest = int(sizes[order[start]])
        (part, *_) = _blocks(len(order) - start, widest * problem.topics.shape[1])
        some = order[start : start + part.stop]
        start += len(some)
        place = offsets[some][:, None] + np.arange(widest)
        free = np.arange(widest) < sizes[some][:, None]
        rows = problem.topics[values[np.where(free, place, 0)]] & free[..., None]
        worth = weights[some].copy()
        everyone = np.arange(len(some))
        for rank in range(min(problem.length, widest)):
            gain = np.where(free, np.matmul(rows, worth[..., None])[..., 0], -1.0)
            best = gain.argmax(1)
            out[some] += discount[rank] * np.maximum(gain[everyone, best], 0.0)
            worth *= np.where(rows[everyone, best], decay, 1.0)
            free[everyone, best] = False
    return out


def _ratio_to_greedy(problem: _Problem, decay: float, weights: np.ndarray, discount: np.ndarray) -> np.ndarray:
    ideal = _greedy(problem, decay, weights, discount)
    ratio = _of_lists(problem, decay, weights, discount) / np.where(ideal > 0, ideal, 1.0)
    return np.where(problem.served.any(1), ratio, np.nan)


def _of_lists(problem: _Problem, decay: float, weights: np.ndarray, discount: np.ndarray) -> np.ndarray:
    out = np.zeros(len(problem.ids))
    for part, rows in _served_rows(problem):
        out[part] = _gained(rows, decay, weights[part], discount)
    return out


def alpha_ndcg(lists: Any, relevant: Any, topics: Any, k: int | None = None, *, alpha: float = 0.5) -> np.ndarray:
    r"""Discounted cumulative gain where a topic is worth less each time it comes again, float64 [U].

    .. math::
        \frac{1}{\mathrm{ideal}} \sum_{i \le k} \frac{1}{\log_2(i + 1)} \sum_z J(l_i, z) (1 - \alpha)^{c_z(i)}, \quad
        c_z(i) = \sum_{j < i} J(l_j, z)

    J(l, z) is 1 if item l is relevant to the user and has topic z, else 0. The ideal is the same sum of the list that
    takes, of the user's relevant items, the one that gains most, again and again (ties: lowest id). To find the very
    best list is NP-hard; where the greedy one is not the best, a value may be a little above 1, as in other
    implementations. With alpha = 0 each item's gain is its number of topics, and the ideal is exact.

    Parameters
    ----------
    lists : int64 [U, K]
    relevant : (values, offsets)
    topics : [N, G]
    k : int
        The first k places; None: the width of `lists`.
    alpha : float, in [0, 1]
        How likely a user who has seen a topic is to have had enough of it.

    Raises
    ------
    InputError
        A relevant id outside [0, N), alpha outside [0, 1], NaN in the topics.

    References
    ----------
    Clarke et al., "Novelty and diversity in information retrieval evaluation", SIGIR 2008.

    Examples
    --------
    >>> topics = [[1, 0], [1, 0], [0, 1]]
    >>> alpha_ndcg([[0, 2], [0, 1]], ([0, 1, 2, 0, 1, 2], [0, 3, 6]), topics).round(4)
    array([1.    , 0.8066])
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha_ndcg: alpha must be in [0, 1], got {alpha}")
    problem = _problem("alpha_ndcg", lists, relevant, topics, k)
    discount = 1.0 / np.log2(np.arange(problem.length) + 2.0)
    return _ratio_to_greedy(problem, 1.0 - alpha, np.ones(problem.served.shape), discount)


def err_ia(
    lists: Any,
    relevant: Any,
    topics: Any,
    k: int | None = None,
    *,
    preferences: Any = None,
    stop: float = 0.5,
    normalise: bool = False,
) -> np.ndarray:
    r"""Intent-aware expected reciprocal rank: how soon a user of one of the intents is satisfied, float64 [U].

    .. math::
        \sum_z P(z \mid u) \sum_{i \le k} \frac{1}{i}\, s\, J(l_i, z) \prod_{j < i} \bigl(1 - s\, J(l_j, z)\bigr)

    J(l, z) is 1 if item l is relevant to the user and has topic z, else 0; s is `stop`.

    Parameters
    ----------
    lists : int64 [U, K]
    relevant : (values, offsets)
    topics : [N, G]
    k : int
        The first k places; None: the width of `lists`.
    preferences : [G] or [U, G]
        P(z | u), scaled to the sum 1. None: evenly over the topics of the user's relevant items.
    stop : float, in (0, 1]
        The chance that an item that serves the intent satisfies: (2^g - 1) / 2^g_max of the paper, 1/2 for two grades.
    normalise : bool
        Divide by the value of the list that takes the relevant item that gains most, again and again.

    Returns
    -------
    float64 [U], in [0, 1]; if normalised, 1 for the greedy list (another may be a little above, see `alpha_ndcg`).

    Raises
    ------
    InputError
        A relevant id outside [0, N), preferences that are negative or all 0, stop outside (0, 1], NaN in the topics.

    References
    ----------
    Chapelle et al., "Expected reciprocal rank for graded relevance", CIKM 2009; "Intent-based diversification of web
    search results: metrics and algorithms", Information Retrieval 14, 2011.

    Examples
    --------
    >>> topics = [[1, 0], [1, 0], [0, 1]]
    >>> err_ia([[0, 2], [0, 1]], ([0, 1, 2, 0, 1, 2], [0, 3, 6]), topics)
    array([0.375 , 0.3125])
    """
    if not 0 < stop <= 1:
        raise InputError(f"err_ia: stop must be in (0, 1], got {stop}")
    problem = _problem("err_ia", lists, relevant, topics, k)
    weights = stop * _preferences("err_ia", preferences, problem)
    discount = 1.0 / np.arange(1, problem.length + 1)
    if normalise:
        return _ratio_to_greedy(problem, 1.0 - stop, weights, discount)
    defined = problem.served.any(1)
    return np.where(defined, _of_lists(problem, 1.0 - stop, weights, discount), np.nan)


def map_ia(lists: Any, relevant: Any, topics: Any, k: int | None = None, *, preferences: Any = None) -> np.ndarray:
    r"""Intent-aware average precision, whose mean over users is MAP-IA; float64 [U], in [0, 1].

    .. math:: \sum_z P(z \mid u)\, \mathrm{AP}_k(L, R_z), \quad R_z = \{i \in R : i \text{ has topic } z\}

    with AP as in `average_precision`. A topic that none of the user's relevant items has adds 0.

    Parameters
    ----------
    lists : int64 [U, K]
    relevant : (values, offsets)
    topics : [N, G]
    k : int
        The first k places; None: the width of `lists`.
    preferences : [G] or [U, G]
        P(z | u), scaled to the sum 1. None: evenly over the topics of the user's relevant items.

    Raises
    ------
    InputError
        A relevant id outside [0, N), preferences that are negative or all 0, NaN in the topics.

    References
    ----------
    Agrawal et al., "Diversifying search results", WSDM 2009.

    Examples
    --------
    >>> topics = [[1, 0], [1, 0], [0, 1]]
    >>> map_ia([[0, 2], [0, 1]], ([0, 1, 2, 0, 1, 2], [0, 3, 6]), topics)
    array([0.5, 0.5])
    """
    problem = _problem("map_ia", lists, relevant, topics, k)
    weights = _preferences("map_ia", preferences, problem)
    most = np.minimum(problem.served, problem.length)
    out = np.zeros(len(problem.ids))
    for part, rows in _served_rows(problem):
        precision = rows.cumsum(1) / np.arange(1, rows.shape[1] + 1)[:, None]
        average = (precision * rows).sum(1) / np.maximum(most[part], 1)
        out[part] = (weights[part] * average).sum(1)
    return np.where(problem.served.any(1), out, np.nan)
