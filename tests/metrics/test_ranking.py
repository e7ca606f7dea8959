"""List metrics against a loop over users that follows the definitions word by word."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import InputError, metrics
from recfast.data import Jagged


def by_hand(ids, relevant, k):
    """recall, ndcg, hit_rate, mrr, average_precision of one user."""
    relevant, seen, found = set(relevant), set(), []
    for item in ids[:k]:
        found.append(item >= 0 and item in relevant and item not in seen)
        seen.add(item)
    if not relevant:
        return [math.nan] * 5
    places = [i + 1 for i, hit in enumerate(found) if hit]
    gain = sum(1 / math.log2(i + 1) for i in places)
    ideal = sum(1 / math.log2(i + 1) for i in range(1, min(len(relevant), k) + 1))
    precision = sum((n + 1) / i for n, i in enumerate(places))
    return [
        len(places) / len(relevant),
        gain / ideal,
        float(bool(places)),
        1 / places[0] if places else 0.0,
        precision / min(len(relevant), k),
    ]


@given(
    users=st.integers(0, 5),
    width=st.integers(0, 8),
    k=st.integers(1, 10),
    span=st.sampled_from([3, 12, 2**62]),
    data=st.data(),
)
def test_lists_match_the_definitions(users, width, k, span, data):
    item = st.integers(-1, min(span, 12) - 1)
    shift = span - min(span, 12)  # huge ids must not overflow
    draw = data.draw(st.lists(st.lists(item, min_size=width, max_size=width), min_size=users, max_size=users))
    ids = np.array(draw, dtype=np.int64).reshape(users, width)
    ids = np.where(ids >= 0, ids + shift, -1)
    wanted = [
        [value + shift for value in data.draw(st.lists(st.integers(0, min(span, 12) - 1), max_size=6))]
        for _ in range(users)
    ]
    values = np.array([value for row in wanted for value in row], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, wanted)])
    expected = np.array([by_hand(row.tolist(), truth, k) for row, truth in zip(ids, wanted, strict=True)])
    names = ["recall", "ndcg", "hit_rate", "mrr", "average_precision"]
    for at, name in enumerate(names):
        answer = getattr(metrics, name)(ids, (values, offsets), k)
        assert answer.shape == (users,)
        np.testing.assert_allclose(answer, expected.reshape(users, 5)[:, at], rtol=1e-12, err_msg=name)


def test_known_values():
    lists = torch.tensor([[5, 2, 9], [1, -1, -1], [3, 4, 5]])
    relevant = Jagged(torch.tensor([2, 7, 1]), torch.tensor([0, 2, 3, 3]))
    half = 1 / math.log2(3)
    np.testing.assert_allclose(metrics.recall(lists, relevant), [0.5, 1.0, np.nan])
    np.testing.assert_allclose(metrics.ndcg(lists, relevant), [half / (1 + half), 1.0, np.nan])
    np.testing.assert_allclose(metrics.mrr(lists, relevant), [0.5, 1.0, np.nan])
    np.testing.assert_allclose(metrics.average_precision(lists, relevant), [0.25, 1.0, np.nan])
    np.testing.assert_allclose(metrics.hit_rate(lists, relevant, 1), [0.0, 1.0, np.nan])
    # A list shorter than k is judged against the best list of length k.
    np.testing.assert_allclose(metrics.ndcg([[1]], ([1, 2], [0, 2]), k=5), [1 / (1 + half)])
    # The same id again is no second hit.
    np.testing.assert_allclose(metrics.recall([[2, 2]], ([2, 7], [0, 2])), [0.5])


@pytest.mark.parametrize(
    ("lists", "relevant", "k", "sentence"),
    [
        ([1, 2], ([1], [0, 1]), 1, r"recall: lists must have shape \[U, K\], got \[2\]"),
        ([[0.5]], ([1], [0, 1]), 1, "recall: lists must hold integer ids, got float64"),
        ([[1]], ([1], [0, 1]), 0, "recall: k must be at least 1, got 0"),
        ([[1]], ([1], [0, 1, 1]), 1, "recall: relevant must hold 1 lists like lists, got 2"),
        ([[1]], ([1], [0, 2]), 1, "recall: relevant.offsets must rise from 0 to 1"),
    ],
)
def test_rejects_bad_input(lists, relevant, k, sentence):
    with pytest.raises(InputError, match=sentence):
        metrics.recall(lists, relevant, k)


@given(
    users=st.integers(0, 5),
    width=st.integers(0, 8),
    k=st.one_of(st.none(), st.integers(1, 10)),
    seed=st.integers(0, 10**6),
)
def test_graded_ndcg_and_precision(users, width, k, seed):
    rng = np.random.default_rng(seed)
    lists = rng.integers(-1, 9, (users, width))
    sizes = rng.integers(0, 7, users)
    values, offsets = rng.integers(0, 9, sizes.sum()), np.concatenate([[0], np.cumsum(sizes)])
    gains = rng.integers(0, 4, sizes.sum()).astype(float)
    answer = metrics.ndcg(lists, (values, offsets), k, gains=gains)
    share = metrics.precision(lists, (values, offsets), k)
    length = width if k is None else k
    for u in range(users):
        grade = {}
        for at in range(offsets[u], offsets[u + 1]):
            grade[values[at]] = max(grade.get(values[at], 0.0), gains[at])
        ids = lists[u].tolist()[:length]
        ids = [i if i not in ids[:place] else -1 for place, i in enumerate(ids)]
        gained = sum(grade.get(i, 0.0) / math.log2(place + 2) for place, i in enumerate(ids))
        best = sorted(grade.values(), reverse=True)[:length]
        ideal = sum(g / math.log2(place + 2) for place, g in enumerate(best))
        assert answer[u] == pytest.approx(gained / (ideal or 1.0) if sum(grade.values()) else math.nan, nan_ok=True)
        found = sum(i in grade for i in ids) / max(length, 1)
        assert share[u] == pytest.approx(found if grade else math.nan, nan_ok=True)
    # Equal gains are no gains.
    plain = metrics.ndcg(lists, (values, offsets), k)
    np.testing.assert_allclose(metrics.ndcg(lists, (values, offsets), k, gains=np.full(len(values), 2.0)), plain)


def test_graded_known_values():
    # 3 and 1 out of 3, 2, 1: (3 + 1 / log2 3) / (3 + 2 / log2 3 + 1 / 2).
    second = 1 / math.log2(3)
    answer = metrics.ndcg([[5, 9, 8]], ([9, 5, 7], [0, 3]), gains=[1, 3, 2])
    np.testing.assert_allclose(answer, [(3 + second) / (3 + 2 * second + 0.5)])
    assert metrics.precision([[5, 9, -1, -1]], ([9, 5, 7], [0, 3])).tolist() == [0.5]
    with pytest.raises(InputError, match=r"ndcg: gains must have 3 entries like relevant.values, got 2"):
        metrics.ndcg([[5]], ([9, 5, 7], [0, 3]), gains=[1, 2])
    with pytest.raises(InputError, match=r"ndcg: gains\[1\] must be at least 0 and finite, got -1"):
        metrics.ndcg([[5]], ([9, 5, 7], [0, 3]), gains=[1, -1, 0])
