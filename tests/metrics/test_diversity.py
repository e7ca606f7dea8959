"""Diversity of lists against loops over pairs, and of exposure against hand values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recfast import InputError, metrics
from recfast.metrics import diversity


def distance(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return 1 - a @ b / norms if norms > 0 else 1.0


@given(users=st.integers(0, 4), width=st.integers(0, 6), genres=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_intra_list_diversity_and_topics(users, width, genres, seed):
    rng = np.random.default_rng(seed)
    table = (rng.random((9, genres)) < 0.4).astype(np.float32) * rng.integers(1, 3, (9, 1))
    lists = rng.integers(-1, 9, (users, width))
    mean, least = (metrics.intra_list_diversity(lists, table, statistic=s) for s in ("mean", "min"))
    topics = metrics.topic_count(lists, table)
    for u in range(users):
        ids = [i for i in lists[u].tolist() if i >= 0]
        pairs = [distance(table[a], table[b]) for n, a in enumerate(ids) for b in ids[n + 1 :]]
        assert mean[u] == pytest.approx(np.mean(pairs) if pairs else 0.0, abs=1e-6)
        assert least[u] == pytest.approx(min(pairs) if pairs else 0.0, abs=1e-6)
        assert topics[u] == len({g for i in ids for g in range(genres) if table[i, g] > 0})


def test_blocks_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    table, lists = rng.random((50, 7)), rng.integers(-1, 50, (33, 10))
    whole = [metrics.intra_list_diversity(lists, table, statistic=s) for s in ("mean", "min")]
    whole.append(metrics.topic_count(lists, table))
    monkeypatch.setattr(diversity, "_CELLS", 200)
    parts = [metrics.intra_list_diversity(lists, table, statistic=s) for s in ("mean", "min")]
    parts.append(metrics.topic_count(lists, table))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_known_values():
    table = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    lists = np.array([[1, 2, 3], [1, 1, -1], [1, -1, -1]])
    root = 1 / math.sqrt(2)
    np.testing.assert_allclose(metrics.intra_list_diversity(lists, table), [(3 - 2 * root) / 3, 0, 0], atol=1e-12)
    np.testing.assert_allclose(
        metrics.intra_list_diversity(lists, table, statistic="min"), [1 - root, 0, 0], atol=1e-12
    )
    # The third topic belongs to no item, so covering two is covering all.
    np.testing.assert_allclose(metrics.s_recall(lists, table), [1.0, 0.5, 0.5])
    assert metrics.catalogue_coverage(lists, 4) == 0.75
    assert metrics.exposure(lists, 4).tolist() == [0, 4, 1, 1]
    assert metrics.gini([1, 1, 1, 1]) == 0.0
    assert metrics.gini([0, 0, 0, 5]) == 0.75
    assert metrics.gini([1, 3]) == pytest.approx(0.25)
    assert metrics.exposure_entropy([2, 2, 0, 2, 2]) == pytest.approx(2.0)
    assert metrics.exposure_entropy([9]) == 0.0
    # (c + 1) / sum: 4/8, 1/8, 3/8.
    wanted = [(1 + 3) / 2, -math.log2(3 / 8), 0.0]
    np.testing.assert_allclose(metrics.novelty([[0, 1], [2, -1], [-1, -1]], [3, 0, 2]), wanted)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(sum))
def test_gini_is_the_mean_difference(counts):
    n, total = len(counts), sum(counts)
    wanted = sum(abs(a - b) for a in counts for b in counts) / (2 * n * total)
    assert metrics.gini(counts) == pytest.approx(wanted, abs=1e-12)


@given(
    users=st.integers(0, 4),
    width=st.integers(0, 6),
    genres=st.integers(1, 5),
    k=st.one_of(st.none(), st.integers(1, 7)),
    ways=st.sampled_from(["expected", "history", "both"]),
    every=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_serendipity(users, width, genres, k, ways, every, seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(-1, 2, (9, genres)).astype(np.float32)
    lists, plain = rng.integers(-1, 9, (users, width)), rng.integers(-1, 9, (users, 3))

    def jagged():
        sizes = rng.integers(0, 6, users)
        return rng.integers(0, 9, sizes.sum()), np.concatenate([[0], np.cumsum(sizes)])

    relevant, known = jagged(), jagged()
    options = {"expected": plain} if ways != "history" else {}
    if ways != "expected":
        options |= {"history": known, "features": table}
    answer = metrics.serendipity(lists, None if every else relevant, k, **options)
    for u in range(users):
        ids = lists[u].tolist()[:k]
        wanted = set(relevant[0][relevant[1][u] : relevant[1][u + 1]].tolist())
        history = known[0][known[1][u] : known[1][u + 1]].tolist()
        total = 0.0
        for place, i in enumerate(ids):
            if i < 0 or i in ids[:place] or not (every or i in wanted):
                continue
            worth = 1.0
            if ways != "history":
                worth *= i not in plain[u]
            if ways != "expected" and history:
                worth *= np.mean([distance(table[i], table[h]) for h in history])
            total += worth
        defined = (every or wanted) and (ways == "expected" or history)
        count = sum(i >= 0 for i in ids)
        assert answer[u] == pytest.approx(total / max(count, 1) if defined else math.nan, nan_ok=True, abs=1e-6)


def test_serendipity_known_values(monkeypatch):
    table = np.array([[1, 0], [0, 1], [1, 1]])
    root = 1 / math.sqrt(2)
    # The user knows item 0 twice and item 1 once: item 1 is 2/3 away, item 2 1 - root from both.
    arguments = {"history": ([0, 0, 1], [0, 3]), "features": table}
    np.testing.assert_allclose(metrics.serendipity([[1, 2]], None, **arguments), [(2 / 3 + 1 - root) / 2])
    np.testing.assert_allclose(metrics.serendipity([[1, 2]], ([2], [0, 1]), **arguments), [(1 - root) / 2])
    np.testing.assert_allclose(metrics.serendipity([[1, 2]], ([2], [0, 1]), expected=[[2]], **arguments), [0.0])
    np.testing.assert_allclose(metrics.serendipity([[1, 2], [-1, -1]], None, expected=[[2], [0]]), [0.5, 0.0])
    nothing = metrics.serendipity([[-1]], None, history=([], [0, 0]), features=np.zeros((0, 2)))
    assert np.isnan(nothing).all()
    rng = np.random.default_rng(0)
    lists, features = rng.integers(-1, 30, (20, 5)), rng.random((30, 4))
    known = rng.integers(0, 30, 60), np.arange(21) * 3
    whole = metrics.serendipity(lists, None, history=known, features=features)
    monkeypatch.setattr(diversity, "_CELLS", 30)
    np.testing.assert_allclose(metrics.serendipity(lists, None, history=known, features=features), whole, rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: metrics.intra_list_diversity([[0, 3]], np.ones((3, 2))),
            r"intra_list_diversity: lists\[0, 1\] = 3 is outside \[0, 3\)",
        ),
        (
            lambda: metrics.intra_list_diversity([[0]], np.array([[1.0, np.nan]])),
            r"intra_list_diversity: features\[0, 1\] is NaN",
        ),
        (
            lambda: metrics.intra_list_diversity([[0]], np.ones((1, 1)), statistic="max"),
            "statistic must be mean or min, got 'max'",
        ),
        (lambda: metrics.s_recall([[0]], np.zeros((1, 2))), "s_recall: topics has no positive entry"),
        (lambda: metrics.catalogue_coverage([[0, 1]], 1), "catalogue_coverage: items must be at least 2, got 1"),
        (lambda: metrics.gini([0, 0]), "gini: counts must have a positive entry"),
        (lambda: metrics.gini([1, -1]), r"gini: counts\[1\] must be at least 0 and finite, got -1"),
        (lambda: metrics.serendipity([[0]], None), "serendipity: expected, or history and features, must be given"),
        (
            lambda: metrics.serendipity([[0]], None, history=([0], [0, 1])),
            "serendipity: history and features must be given together",
        ),
        (
            lambda: metrics.serendipity([[0]], None, history=([3], [0, 1]), features=np.eye(3)),
            r"serendipity: history.values\[0\] = 3 is outside \[0, 3\)",
        ),
        (
            lambda: metrics.serendipity([[0]], None, expected=[[0], [1]]),
            "serendipity: expected must hold 1 lists like lists",
        ),
        (lambda: metrics.exposure([[-2]], 3), r"exposure: lists\[0, 0\] = -2 is outside \[0, 3\)"),
    ],
)
def test_rejects_bad_input(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
