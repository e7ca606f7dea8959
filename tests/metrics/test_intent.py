"""alpha-nDCG, ERR-IA and intent-aware MAP against loops over places and topics, and values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recfast import InputError, metrics
from recfast.metrics import diversity

ITEMS = 8


def problem(users, width, topics, seed):
    rng = np.random.default_rng(seed)
    table = (rng.random((ITEMS, topics)) < 0.4).astype(np.float32)
    lists = rng.integers(-1, ITEMS, (users, width))
    sizes = rng.integers(0, 7, users)
    relevant = (rng.integers(0, ITEMS, sizes.sum()), np.concatenate([[0], np.cumsum(sizes)]))
    return lists, relevant, table


def parts(lists, relevant, user, k):
    """The list's ids with -1 for those that come again, and the user's relevant ids."""
    values, offsets = relevant
    ids = lists[user].tolist()[:k]
    ids = [i if i not in ids[:place] else -1 for place, i in enumerate(ids)]
    return ids, sorted(set(values[offsets[user] : offsets[user + 1]].tolist()))


def novelty_gain(ids, wanted, table, decay, weights, discount):
    seen, out = [0] * table.shape[1], 0.0
    for place, item in enumerate(ids):
        if item in wanted:
            for z in range(table.shape[1]):
                if table[item, z] > 0:
                    out += discount(place) * weights[z] * decay ** seen[z]
                    seen[z] += 1
    return out


def greedy_list(wanted, table, decay, weights, k):
    left, ids, seen = list(wanted), [], [0] * table.shape[1]
    while left and len(ids) < k:
        gains = [sum(weights[z] * decay ** seen[z] for z in range(table.shape[1]) if table[i, z] > 0) for i in left]
        # Sums of powers in another order may differ in the last bit: what is that close is a tie.
        item = left[next(n for n, gain in enumerate(gains) if gain >= max(gains) - 1e-12)]
        ids.append(item)
        left.remove(item)
        for z in range(table.shape[1]):
            seen[z] += table[item, z] > 0
    return ids


def even(wanted, table):
    served = [any(table[i, z] > 0 for i in wanted) for z in range(table.shape[1])]
    return [s / max(sum(served), 1) for s in served]


sizes = {
    "users": st.integers(0, 4),
    "width": st.integers(0, 6),
    "topics": st.integers(0, 5),
    "k": st.one_of(st.none(), st.integers(1, 8)),
    "seed": st.integers(0, 10**6),
}


@given(**sizes, alpha=st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_alpha_ndcg(users, width, topics, k, seed, alpha):
    lists, relevant, table = problem(users, width, topics, seed)
    answer = metrics.alpha_ndcg(lists, relevant, table, k, alpha=alpha)
    for u in range(users):
        ids, wanted = parts(lists, relevant, u, k)
        ones = [1.0] * topics

        def gain(some, wanted=wanted, ones=ones):
            return novelty_gain(some, wanted, table, 1 - alpha, ones, lambda place: 1 / math.log2(place + 2))

        ideal = gain(greedy_list(wanted, table, 1 - alpha, ones, width if k is None else k))
        # A list of no places has no ideal, and is worth 0.
        wanted_value = gain(ids) / (ideal or 1.0) if any(table[i].any() for i in wanted) else math.nan
        assert answer[u] == pytest.approx(wanted_value, nan_ok=True, abs=1e-12)


@given(**sizes, stop=st.sampled_from([0.25, 0.5, 1.0]), given_preferences=st.booleans())
def test_err_ia(users, width, topics, k, seed, stop, given_preferences):
    lists, relevant, table = problem(users, width, topics, seed)
    preferences = np.random.default_rng(seed).integers(1, 4, (users, topics)) if given_preferences and topics else None
    plain, scaled = (
        metrics.err_ia(lists, relevant, table, k, stop=stop, preferences=preferences, normalise=normalise)
        for normalise in (False, True)
    )
    for u in range(users):
        ids, wanted = parts(lists, relevant, u, k)
        weights = even(wanted, table) if preferences is None else list(preferences[u] / preferences[u].sum())
        wanted_value = 0.0
        for z in range(topics):
            unsatisfied = 1.0
            for place, item in enumerate(ids):
                if item in wanted and table[item, z] > 0:
                    wanted_value += weights[z] * unsatisfied * stop / (place + 1)
                    unsatisfied *= 1 - stop
        if not any(table[i].any() for i in wanted):
            assert math.isnan(plain[u])
            assert math.isnan(scaled[u])
            continue
        assert plain[u] == pytest.approx(wanted_value, abs=1e-12)
        assert 0 <= plain[u] <= 1
        chosen = greedy_list(wanted, table, 1 - stop, [stop * w for w in weights], width if k is None else k)
        ideal = novelty_gain(chosen, wanted, table, 1 - stop, weights, lambda place: stop / (place + 1))
        assert scaled[u] == pytest.approx(wanted_value / (ideal or 1.0), abs=1e-9)


@given(**sizes, given_preferences=st.booleans())
def test_map_ia(users, width, topics, k, seed, given_preferences):
    """A topic at a time, by `average_precision` of the topic's relevant items."""
    lists, relevant, table = problem(users, width, topics, seed)
    preferences = np.random.default_rng(seed).integers(1, 4, topics) if given_preferences and topics else None
    answer = metrics.map_ia(lists, relevant, table, k, preferences=preferences)
    for u in range(users):
        _, wanted = parts(lists, relevant, u, k)
        weights = even(wanted, table) if preferences is None else preferences / preferences.sum()
        total = 0.0
        for z in range(topics):
            of_topic = [i for i in wanted if table[i, z] > 0]
            if of_topic:
                (value,) = metrics.average_precision(lists[u : u + 1], (of_topic, [0, len(of_topic)]), k)
                # A list of no places has no precision.
                total += weights[z] * (0.0 if math.isnan(value) else value)
        defined = any(table[i].any() for i in wanted)
        assert answer[u] == pytest.approx(total if defined else math.nan, nan_ok=True, abs=1e-12)
        assert not answer[u] > 1 + 1e-12


def test_known_values():
    # Topics: item 0 {a, b}, item 1 {a}, item 2 {b}, item 3 none, item 4 {c}.
    table = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    relevant = (np.array([0, 1, 2, 3]), np.array([0, 4]))
    third = 1 / math.log2(4)
    second = 1 / math.log2(3)
    # Gains of 0, 1, 2: 2, then 1/2 each: the greedy list. Of 1, 2, 0: 1, 1, then 1/2 + 1/2.
    ideal = 2 + 0.5 * second + 0.5 * third
    np.testing.assert_allclose(metrics.alpha_ndcg([[0, 1, 2]], relevant, table), [1.0])
    np.testing.assert_allclose(metrics.alpha_ndcg([[1, 2, 0]], relevant, table), [(1 + second + third) / ideal])
    # Item 4 is not relevant, item 3 has no topic: only item 2, at the third place.
    np.testing.assert_allclose(metrics.alpha_ndcg([[4, 3, 2]], relevant, table), [third / ideal])
    # ERR-IA, P(a) = P(b) = 1/2. List 0: both at once: 1/2. Then 1 adds 1/2 * 1/2 * 1/4, 2 adds 1/2 * 1/3 * 1/4.
    np.testing.assert_allclose(metrics.err_ia([[0, 1, 2]], relevant, table), [0.5 + 1 / 16 + 1 / 24])
    np.testing.assert_allclose(
        metrics.err_ia([[0, 1, 2]], relevant, table, preferences=[3, 1, 0]), [0.5 + 3 / 32 + 1 / 48]
    )
    np.testing.assert_allclose(metrics.err_ia([[0, 1, 2]], relevant, table, normalise=True), [1.0])
    # MAP-IA: a: relevant {0, 1} at 1 and 2: AP 1. b: {0, 2} at 1 and 3: (1 + 2/3) / 2.
    np.testing.assert_allclose(metrics.map_ia([[0, 1, 2]], relevant, table), [(1 + 5 / 6) / 2])
    np.testing.assert_allclose(metrics.map_ia([[0, 1, 2]], relevant, table, k=1), [1.0])
    # c is wanted as well, and nothing relevant has it.
    np.testing.assert_allclose(metrics.map_ia([[0, 1, 2]], relevant, table, preferences=[1, 1, 2]), [(1 + 5 / 6) / 4])


@pytest.mark.parametrize("metric", [metrics.alpha_ndcg, metrics.err_ia, metrics.map_ia])
def test_nothing_to_find(metric):
    table = np.array([[1, 0], [0, 1], [0, 0]])
    # No relevant id; a relevant one without a topic; an empty list; nothing of the list is relevant.
    lists = np.array([[0, 1], [0, 2], [-1, -1], [0, -1]])
    answer = metric(lists, ([2, 0, 1, 1], [0, 0, 1, 3, 4]), table)
    assert np.isnan(answer[:2]).all()
    assert answer[2:].tolist() == [0.0, 0.0]
    assert metric(np.zeros((0, 3), dtype=int), ([], [0]), table).shape == (0,)
    assert np.isnan(metric(lists, ([2, 0, 1, 1], [0, 0, 1, 3, 4]), np.zeros((3, 0)))).all()


@given(users=st.integers(1, 4), topics=st.integers(1, 5), k=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_of_the_greedy_list_is_one(users, topics, k, seed):
    _, relevant, table = problem(users, 3, topics, seed)
    lists = np.full((users, k), -1)
    for u in range(users):
        _, wanted = parts(lists, relevant, u, k)
        chosen = greedy_list(wanted, table, 0.5, [1.0] * topics, k)
        lists[u, : len(chosen)] = chosen
    answers = metrics.alpha_ndcg(lists, relevant, table), metrics.err_ia(lists, relevant, table, normalise=True)
    for answer in answers:
        assert answer[~np.isnan(answer)] == pytest.approx(1.0)


def test_without_discount_for_topics_it_is_graded_ndcg():
    lists, relevant, table = problem(50, 6, 4, 1)
    grades = table.sum(1)[relevant[0]]
    wanted = metrics.ndcg(lists, relevant, gains=grades)
    np.testing.assert_allclose(metrics.alpha_ndcg(lists, relevant, table, alpha=0.0), wanted)
    # And with one topic that all items have, plain NDCG, ERR and average precision.
    one = np.ones((ITEMS, 1))
    np.testing.assert_allclose(metrics.alpha_ndcg(lists, relevant, one, alpha=0.0), metrics.ndcg(lists, relevant))
    np.testing.assert_allclose(metrics.map_ia(lists, relevant, one), metrics.average_precision(lists, relevant))
    np.testing.assert_allclose(metrics.err_ia(lists, relevant, one, stop=1.0), metrics.mrr(lists, relevant))


def test_the_best_of_all_lists_is_hardly_above_the_greedy_one():
    """The ideal is greedy, so a value may exceed 1: never by more than the guarantee of the greedy rule."""
    for seed in range(20):
        _, (values, _), table = problem(1, 3, 4, seed)
        wanted = np.unique(values)
        if not table[wanted].any() or len(wanted) < 3:
            continue
        lists = np.array(list(itertools.permutations(wanted.tolist(), 3)))
        relevant = (np.tile(wanted, len(lists)), np.arange(len(lists) + 1) * len(wanted))
        answer = metrics.alpha_ndcg(lists, relevant, table)
        assert 1.0 - 1e-12 <= answer.max() <= 1.0 / (1.0 - 1.0 / math.e)


def test_users_topics_and_ids_may_be_renamed():
    lists, relevant, table = problem(30, 6, 5, 2)
    rng = np.random.default_rng(0)
    renamed, order = rng.permutation(ITEMS), rng.permutation(5)
    other = np.zeros_like(table)
    other[renamed] = table[:, order]
    for metric in (metrics.err_ia, metrics.map_ia):
        whole = metric(lists, relevant, table)
        again = metric(np.where(lists >= 0, renamed[lists], -1), (renamed[relevant[0]], relevant[1]), other)
        np.testing.assert_allclose(again, whole)
        # User by user, and shorter lists with padding.
        for u in range(30):
            mine = relevant[0][relevant[1][u] : relevant[1][u + 1]]
            alone = metric(
                np.pad(lists[u : u + 1], ((0, 0), (0, 2)), constant_values=-1), (mine, [0, len(mine)]), table, k=6
            )
            np.testing.assert_allclose(alone, whole[u : u + 1])


def test_blocks_give_the_same(monkeypatch):
    lists, relevant, table = problem(40, 6, 5, 3)
    ways = [
        lambda: metrics.alpha_ndcg(lists, relevant, table),
        lambda: metrics.err_ia(lists, relevant, table, normalise=True),
        lambda: metrics.map_ia(lists, relevant, table),
    ]
    whole = [way() for way in ways]
    monkeypatch.setattr(diversity, "_CELLS", 70)
    for way, wanted in zip(ways, whole, strict=True):
        np.testing.assert_allclose(way(), wanted, rtol=1e-14)


TABLE = np.eye(3)
RELEVANT = ([0, 1], [0, 2])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: metrics.alpha_ndcg([[0]], ([0, 3], [0, 2]), TABLE),
            r"alpha_ndcg: relevant.values\[1\] = 3 is outside \[0, 3\)",
        ),
        (
            lambda: metrics.alpha_ndcg([[0]], RELEVANT, TABLE, alpha=1.5),
            r"alpha_ndcg: alpha must be in \[0, 1\], got 1.5",
        ),
        (lambda: metrics.alpha_ndcg([[0]], RELEVANT, TABLE, 0), "alpha_ndcg: k must be at least 1, got 0"),
        (lambda: metrics.alpha_ndcg([[0]], RELEVANT, np.ones(3)), r"alpha_ndcg: topics must have shape \[N, G\]"),
        (lambda: metrics.err_ia([[0]], RELEVANT, TABLE, stop=0), r"err_ia: stop must be in \(0, 1\], got 0"),
        (lambda: metrics.err_ia([[0]], RELEVANT, TABLE * np.nan), r"err_ia: topics\[0, 0\] is NaN"),
        (
            lambda: metrics.err_ia([[0]], RELEVANT, TABLE, preferences=[1, 2]),
            r"err_ia: preferences must have shape \[3\] or \[1, 3\], got \[2\]",
        ),
        (
            lambda: metrics.map_ia([[0]], RELEVANT, TABLE, preferences=[[1, -2, 0]]),
            r"map_ia: preferences\[0, 1\] must be at least 0 and finite, got -2",
        ),
        (
            lambda: metrics.map_ia([[0]], RELEVANT, TABLE, preferences=[0, 0, 0]),
            "map_ia: preferences must have a positive entry for each user",
        ),
        (
            lambda: metrics.map_ia([[0]], ([0], [0, 1, 1]), TABLE),
            "map_ia: relevant must hold 1 lists like lists, got 2",
        ),
    ],
)
def test_rejects_bad_input(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
