"""Re-rankers as objects: scaling, the trade-off of each user, candidates, kinds of input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from recfast import InputError, metrics, ops
from recfast.rerank import (
    DPP,
    KDPP,
    KINDS,
    MMR,
    MSD,
    SSD,
    XQuAD,
    build,
    entropy_propensity,
    history_entropy,
)

# Those that read cosines of features and draw nothing.
GREEDY = [DPP, MMR, MSD, SSD]


def candidates(users=6, items=60, width=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, width))
    # The best items crowd into one cluster, as rankers have it.
    group = (np.arange(items) // 10) % 6
    features = centres[group] + 0.2 * rng.normal(size=(users, items, width))
    relevance = np.sort(rng.normal(size=(users, items)) * 3 + 40)[:, ::-1].copy()
    return features.astype(np.float32), relevance.astype(np.float32)


def test_dpp_is_the_op_on_unit_features_and_z_scores():
    features, relevance = candidates()
    answer = DPP(diversity=0.4, gamma=0.05).rank(features, relevance, 10)
    unit = normalize(torch.from_numpy(features).double(), dim=-1)
    wide = torch.from_numpy(relevance).double()
    z = (wide - wide.mean(1, keepdim=True)) / wide.std(1, correction=0, keepdim=True)
    wanted = ops.dpp_greedy.reference(unit, z, 10, diversity=0.4, gamma=0.05).indices
    np.testing.assert_array_equal(answer, wanted.numpy())


@pytest.mark.parametrize("kind", GREEDY)
def test_scale_of_the_scores_does_not_matter(kind):
    features, relevance = candidates()
    wanted = kind(0.5).rank(features, relevance, 10)
    np.testing.assert_array_equal(kind(0.5).rank(features * 7, relevance * 4 - 100, 10), wanted)


@pytest.mark.parametrize("kind", GREEDY)
def test_diversity_zero_keeps_the_order(kind):
    features, relevance = candidates()
    relevance[:, 5:9] = relevance[:, 5:6]  # ties by the lowest position
    answer = kind(0.0).rank(features, relevance, 12)
    np.testing.assert_array_equal(answer, np.argsort(-relevance, axis=1, kind="stable")[:, :12])


@pytest.mark.parametrize("kind", GREEDY)
def test_more_diversity_makes_lists_more_varied_and_less_relevant(kind):
    features, relevance = candidates(users=20)
    table = features.reshape(-1, features.shape[-1])
    base = np.arange(20)[:, None] * features.shape[1]
    ild, worth = [], []
    for diversity in (0.0, 0.3, 0.6, 0.9):
        picks = kind(diversity).rank(features, relevance, 10)
        ild.append(metrics.intra_list_diversity(picks + base, table).mean())
        worth.append(np.take_along_axis(relevance, picks, 1).mean())
    assert ild == sorted(ild)
    assert ild[-1] > ild[0] + 0.3
    assert worth == sorted(worth, reverse=True)


def mmr_by_hand(features, relevance, k, diversity):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scaled = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    picks = [int(scaled.argmax())]
    while len(picks) < k:
        worth = {
            i: (1 - diversity) * scaled[i] - diversity * max(unit[i] @ unit[j] for j in picks)
            for i in range(len(scaled))
            if i not in picks
        }
        picks.append(max(worth, key=worth.get))
    return picks


def test_mmr_by_hand():
    features, relevance = (value.astype(np.float64) for value in candidates())
    answer = MMR(0.6).rank(features, relevance, 10)
    for user in range(len(answer)):
        assert answer[user].tolist() == mmr_by_hand(features[user], relevance[user], 10, 0.6)


@pytest.mark.parametrize("kind", GREEDY)
def test_one_user_and_many_and_kinds_of_input(kind):
    features, relevance = candidates()
    reranker = kind(0.5)
    wanted = reranker.rank(features, relevance, 7)
    assert isinstance(wanted, np.ndarray)
    assert wanted.dtype == np.int64
    tensors = reranker.rank(torch.from_numpy(features), torch.from_numpy(relevance), 7)
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_array_equal(tensors.numpy(), wanted)
    for user in range(len(wanted)):
        np.testing.assert_array_equal(reranker.rank(features[user], relevance[user], 7), wanted[user])
    shared = reranker.rank(features[0], relevance, 7)
    np.testing.assert_array_equal(shared, reranker.rank(np.repeat(features[:1], 6, 0), relevance, 7))
    relevance.flags.writeable = False
    np.testing.assert_array_equal(reranker.rank(features[:, ::-1][:, ::-1], relevance, 7), wanted)


@pytest.mark.parametrize("kind", GREEDY)
def test_what_is_no_candidate_may_hold_anything(kind):
    features, relevance = candidates()
    lengths = np.array([60, 30, 4, 1, 0, 60])
    wanted = [kind(0.5).rank(features[u, :n], relevance[u, :n], 7) for u, n in enumerate(lengths)]
    for u, n in enumerate(lengths):
        relevance[u, n:] = (-np.inf, np.nan)[u % 2]
        features[u, n:] = np.nan
    answer = kind(0.5).rank(features, relevance, 7, lengths=lengths)
    np.testing.assert_array_equal(answer, np.stack(wanted))
    assert answer[2, 4:].tolist() == [-1, -1, -1]
    mask = np.arange(60) < lengths[:, None]
    np.testing.assert_array_equal(kind(0.5).rank(features, relevance, 7, mask=mask), answer)
    assert kind(0.5).rank(np.zeros((0, 5, 2)), np.zeros((0, 5)), 3).shape == (0, 3)
    assert kind(0.5).rank(np.zeros((2, 0, 2)), np.zeros((2, 0)), 3).tolist() == [[-1] * 3] * 2


def test_equal_scores_and_equal_features():
    assert DPP(0.5).rank(np.ones((5, 3)), np.full(5, 0.1), 5).tolist() == [0, 1, 2, 3, 4]


def test_blocks_of_users_give_the_same(monkeypatch):
    features, relevance = candidates(users=9)
    wanted = DPP(0.5).rank(features, relevance, 7)
    monkeypatch.setattr("recfast.rerank._base._CELLS", 1000)
    np.testing.assert_array_equal(DPP(0.5).rank(features, relevance, 7), wanted)


def test_window_reaches_the_op():
    features, relevance = candidates()
    assert not np.array_equal(DPP(0.6, window=2).rank(features, relevance, 12), DPP(0.6).rank(features, relevance, 12))


def test_a_wider_taste_gets_a_more_varied_list():
    """The sign of the personal trade-off, which is easy to get wrong."""
    features, relevance = candidates(users=2)
    features[1], relevance[1] = features[0], relevance[0]
    propensity = entropy_propensity(np.array([[9, 1, 0, 0], [3, 3, 2, 2]]))
    assert propensity[0] < propensity[1]
    picks = DPP(diversity=0.7, personal=True).rank(features, relevance, 10, propensity=propensity)
    ild = metrics.intra_list_diversity(picks, features[0])
    assert ild[0] < ild[1]
    # Each is what that user would get with the trade-off of their own.
    for user in range(2):
        own = DPP(diversity=0.7 * propensity[user]).rank(features[user], relevance[user], 10)
        np.testing.assert_array_equal(picks[user], own)
    # At strength 0 nobody differs, and a propensity of 1 changes nothing.
    half = DPP(diversity=0.7, personal=0.5).rank(features, relevance, 10, propensity=np.array([0.0, 1.0]))
    np.testing.assert_array_equal(half[0], DPP(diversity=0.35).rank(features[0], relevance[0], 10))
    np.testing.assert_array_equal(half[1], DPP(diversity=0.7).rank(features[0], relevance[0], 10))


@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=6),
    dampening=st.sampled_from([0.0, 0.5, 100.0]),
)
def test_entropy_propensity_follows_its_formula(counts, dampening):
    answer = entropy_propensity(np.array(counts), dampening)
    for row, value in zip(counts, answer, strict=True):
        total = sum(row)
        entropy = -sum(c / total * math.log(c / total) for c in row if c)
        wanted = (entropy + dampening) / (math.log(3) + dampening) if total else 1.0
        assert value == pytest.approx(wanted, abs=1e-12)
        assert 0 <= value <= 1
    # The same histories as lists of genre ids.
    values = [genre for row in counts for genre, count in enumerate(row) for _ in range(count)]
    offsets = np.cumsum([0] + [sum(row) for row in counts])
    jagged = entropy_propensity((np.array(values, dtype=np.int64), offsets), dampening, genres=3)
    np.testing.assert_array_equal(jagged, answer)


def test_entropy_propensity_known_values():
    counts = torch.tensor([[4.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(history_entropy(counts), [0.0, math.log(2), np.nan], atol=1e-15)
    np.testing.assert_allclose(entropy_propensity(counts), [0, 1, 1])
    np.testing.assert_allclose(entropy_propensity(counts, unknown=0.5), [0, 1, 0.5])
    np.testing.assert_allclose(entropy_propensity(counts, bounds=(0.5 * math.log(2), math.log(2))), [0, 1, 1])
    np.testing.assert_allclose(entropy_propensity(counts, math.log(2)), [0.5, 1, 1])
    np.testing.assert_allclose(entropy_propensity(counts[:, :1]), [1, 1, 1])


def test_config_makes_the_same_again():
    rerankers = (
        DPP(0.2, gamma=0.3, window=4, personal=True, exhausted="restart", epsilon=1e-6, exact=False),
        KDPP(0.2, seed=7, gamma=0.3, personal=True),
        MMR(0.7, personal=0.25, clip=True, window=3),
        MSD(0.4, mean=False, exact=False),
        SSD(0.4, mode="paper", window=5, volume=True, standardize=False),
        XQuAD(0.6, normalize=False, window=9),
    )
    assert {type(reranker) for reranker in rerankers} == set(KINDS.values())
    for reranker in rerankers:
        default = type(reranker)().config()
        # Each of these options is told apart from its default by at least one of the re-rankers above.
        assert reranker.config().keys() == default.keys()
        again = build(type(reranker).__name__, **reranker.config())
        assert type(again) is type(reranker)
        assert again.config() == reranker.config() != default
        assert repr(again) == repr(reranker)
    assert not DPP(personal=False).personal
    assert DPP(personal=True).personal == 1.0


def near_duplicates(seed=0):
    """A table of 40 items, and 30 of them (some users have fewer) for each of 5 users."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(10, 6)).repeat(4, axis=0) + 0.1 * rng.normal(size=(40, 6))
    ids = np.stack([rng.permutation(40)[:30] for _ in range(5)])
    ids[3, 25:] = -1
    ids[4, ::2] = -1
    return table.astype(np.float32), ids, rng.normal(size=ids.shape)


@pytest.mark.parametrize("kind", [*GREEDY, XQuAD])
def test_a_table_with_candidates_is_their_features(kind, monkeypatch):
    table, ids, relevance = near_duplicates()
    if kind is XQuAD:
        table = np.abs(table)
    wanted = kind(0.6).rank(table[ids], relevance, 9, mask=ids >= 0)
    relevance[ids < 0] = np.nan
    np.testing.assert_array_equal(kind(0.6).rank(table, relevance, 9, candidates=ids), wanted)
    for user in range(len(ids)):
        alone = kind(0.6).rank(table, relevance[user], 9, candidates=ids[user])
        np.testing.assert_array_equal(alone, wanted[user])
    unread = np.concatenate([table, np.full((1, table.shape[1]), np.nan, dtype=np.float32)])
    np.testing.assert_array_equal(kind(0.6).rank(unread, relevance, 9, candidates=ids), wanted)
    half = torch.from_numpy(table).bfloat16()
    np.testing.assert_array_equal(
        kind(0.6).rank(half, relevance, 9, candidates=ids),
        kind(0.6).rank(half.float(), relevance, 9, candidates=ids),
    )
    monkeypatch.setattr("recfast.rerank._base._CELLS", 400)
    np.testing.assert_array_equal(kind(0.6).rank(table, relevance, 9, candidates=ids), wanted)


@pytest.mark.parametrize("kind", [*GREEDY, XQuAD])
def test_what_was_shown_is_neither_listed_nor_repeated(kind):
    table, ids, relevance = near_duplicates()
    if kind is XQuAD:
        table = np.eye(10, dtype=np.float32).repeat(4, axis=0)
    # Items whose near-duplicates (the same tenth of the table) are the most relevant candidates.
    shown = np.array([[0, 9], [4, -1], [21, 30], [39, 2], [-1, -1]])
    for user, row in enumerate(shown):
        relevance[user, np.isin(ids[user] // 4, row[row >= 0] // 4)] += 3
    plain = kind(0.9).rank(table, relevance, 3, candidates=ids)
    answer = kind(0.9).rank(table, relevance, 3, candidates=ids, shown=shown)
    alike = np.zeros(2, dtype=int)
    for user in range(4):
        listed, before = (np.take(ids[user], picks[user]) for picks in (answer, plain))
        group = shown[user][shown[user] >= 0] // 4
        assert not np.isin(listed, shown[user]).any()
        alike += [np.isin(before // 4, group).sum(), np.isin(listed // 4, group).sum()]
    assert alike[1] < alike[0]
    np.testing.assert_array_equal(answer[4], plain[4])
    # In positions, where there is no table: of those that are candidates themselves.
    positions = np.where(np.arange(5)[:, None] % 2 == 0, [[2, 0]], [[6, -1]])
    dense = kind(0.9).rank(table[ids], relevance, 6, mask=ids >= 0, shown=positions)
    assert not (dense[:, :, None] == positions[:, None]).any(axis=(1, 2))[[0, 2]].any()


@pytest.mark.parametrize("kind", [*GREEDY, XQuAD])
def test_diversity_one_looks_at_the_features_alone(kind):
    table, ids, relevance = near_duplicates()
    table = np.abs(table)
    first = relevance.argmax(1)
    other = np.random.default_rng(1).normal(size=relevance.shape)
    other[np.arange(5), first] = 9  # the first pick is the most relevant for most methods
    valid = ids >= 0
    relevance[~valid] = other[~valid] = np.nan
    first = np.nanargmax(relevance, 1)
    other[np.arange(5), first] = 9
    answers = [kind(1.0).rank(table, scores, 8, candidates=ids) for scores in (relevance, other)]
    np.testing.assert_array_equal(*answers)


def test_the_windowed_kinds_hand_their_window_on():
    table, ids, relevance = near_duplicates()
    for kind in (MMR, MSD, SSD, XQuAD):
        rows = np.abs(table) if kind is XQuAD else table
        wide, narrow = (kind(0.9, window=w).rank(rows, relevance, 20, candidates=ids) for w in (None, 2))
        assert not np.array_equal(wide, narrow), kind


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def spans_by_hand(features, relevance, k, d):
    """SSD by projections, afresh for each pick."""
    rows, scaled = unit(features), (relevance - relevance.min()) / (relevance.max() - relevance.min())
    picks = [int(scaled.argmax())]
    while len(picks) < k:
        basis = np.linalg.qr(rows[picks].T)[0]
        left = np.linalg.norm(rows - rows @ basis @ basis.T, axis=1)
        worth = (1 - d) * scaled + d * left
        worth[picks] = -np.inf
        picks.append(int(worth.argmax()))
    return picks


def distances_by_hand(features, relevance, k, d, mean):
    rows, scaled = unit(features), (relevance - relevance.min()) / (relevance.max() - relevance.min())
    picks = [int(scaled.argmax())]
    while len(picks) < k:
        away = (1 - rows @ rows[picks].T).sum(1) / (len(picks) if mean else 1)
        worth = (1 - d) * scaled + d * away
        worth[picks] = -np.inf
        picks.append(int(worth.argmax()))
    return picks


def test_msd_and_ssd_by_hand():
    features, relevance = (value.astype(np.float64) for value in candidates())
    for user in range(len(relevance)):
        rows, scores = features[user], relevance[user]
        for mean in (True, False):
            answer = MSD(0.4, mean=mean).rank(rows, scores, 10)
            assert answer.tolist() == distances_by_hand(rows, scores, 10, 0.4, mean)
        assert SSD(0.7).rank(rows, scores, 7).tolist() == spans_by_hand(rows, scores, 7, 0.7)


def coverage_by_hand(topics, relevance, preferences, k, d):
    scaled = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    picks, open_ = [], np.array(preferences, dtype=float)
    while len(picks) < k:
        worth = (1 - d) * scaled + d * (topics @ open_)
        worth[picks] = -np.inf
        picks.append(int(worth.argmax()))
        open_ *= 1 - topics[picks[-1]]
    return picks


def test_xquad_by_hand():
    rng = np.random.default_rng(0)
    flags = (rng.random((40, 6)) < 0.3).astype(np.float32)
    relevance, counts = rng.normal(size=(4, 40)), rng.integers(0, 9, size=(4, 6))
    counts[3] = 0
    shares = np.where(counts.sum(1, keepdims=True) > 0, counts / np.maximum(counts.sum(1, keepdims=True), 1), 1 / 6)
    chances = flags / np.maximum(flags.sum(1, keepdims=True), 1)
    for topics, shares_out in ((chances, True), (flags, False)):
        reranker = XQuAD(0.8, normalize=shares_out)
        answer = reranker.rank(flags, relevance, 12, preferences=counts)
        for user in range(4):
            wanted = coverage_by_hand(topics.astype(float), relevance[user], shares[user], 12, 0.8)
            assert answer[user].tolist() == wanted
            alone = reranker.rank(flags, relevance[user], 12, preferences=counts[user])
            assert alone.tolist() == wanted
    even = XQuAD(0.8).rank(flags, relevance, 12)
    np.testing.assert_array_equal(even[3], XQuAD(0.8).rank(flags, relevance, 12, preferences=counts)[3])
    # Only what a user likes is worth covering.
    picks = XQuAD(1.0).rank(flags, relevance, 5, preferences=np.eye(6)[[2] * 4])
    assert flags[picks[:, 0], 2].all()


@pytest.mark.parametrize("kind", KINDS.values())
def test_lists_and_arrays_are_the_same(kind):
    table, ids, relevance = near_duplicates()
    ids = ids[:3]
    table = np.abs(table)
    wanted = kind(0.5).rank(table, relevance[:3], 4, candidates=ids)
    answer = kind(0.5).rank(table.tolist(), relevance[:3].tolist(), 4, candidates=ids.tolist())
    np.testing.assert_array_equal(answer, wanted)


def test_samples_are_those_of_the_kernel():
    """Frequencies of the object's lists against determinants, by chi-squared."""
    rng = np.random.default_rng(3)
    features, relevance, d, gamma = rng.normal(size=(5, 3)), rng.normal(size=5), 0.6, 0.2
    z = (relevance - relevance.mean()) / relevance.std()
    q = np.exp((1 - d) / (2 * d) * z)
    rows = unit(features)
    kernel = q[:, None] * ((1 - gamma) * rows @ rows.T + gamma * np.eye(5)) * q
    pairs = [(i, j) for i in range(5) for j in range(i)]
    weight = np.array([np.linalg.det(kernel[np.ix_(pair, pair)]) for pair in pairs])
    draws = 20_000
    lists = KDPP(d, gamma=gamma, seed=5).rank(features, np.tile(relevance, (draws, 1)), 2)
    assert (relevance[lists[:, 0]] >= relevance[lists[:, 1]]).all()
    found = dict.fromkeys(pairs, 0)
    for a, b in np.sort(lists, axis=1).tolist():
        found[b, a] += 1
    expected = draws * weight / weight.sum()
    statistic = sum((found[pair] - e) ** 2 / e for pair, e in zip(pairs, expected, strict=True))
    assert statistic < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


def test_draws_of_users_and_calls():
    table, ids, relevance = near_duplicates()
    reranker = KDPP(0.9, seed=4)
    first, second = (reranker.rank(table, relevance, 6, candidates=ids) for _ in range(2))
    assert not np.array_equal(first, second)
    again = KDPP(0.9, seed=4)
    np.testing.assert_array_equal(again.rank(table, relevance, 6, candidates=ids), first)
    np.testing.assert_array_equal(again.rank(table, relevance, 6, candidates=ids), second)
    assert not np.array_equal(KDPP(0.9, seed=5).rank(table, relevance, 6, candidates=ids), first)
    # The same problem for two users is drawn apart, and a user's draw is the same in any batch.
    users = np.array([8, 3, 5, 1, 9])
    whole = reranker.rank(table, relevance, 6, candidates=ids, users=users, draw=2)
    part = [2, 0]
    answer = reranker.rank(table, relevance[part], 6, candidates=ids[part], users=users[part], draw=2)
    np.testing.assert_array_equal(answer, whole[part])
    alone = reranker.rank(table, relevance[3], 6, candidates=ids[3], users=[1], draw=2)
    np.testing.assert_array_equal(alone, whole[3])
    twins = KDPP(0.9).rank(table[:30], np.tile(relevance[:1], (40, 1)), 6)
    assert len(np.unique(twins, axis=0)) > 20


def test_samples_are_whole_lists(monkeypatch):
    table, ids, relevance = near_duplicates()
    valid = ids >= 0
    relevance[~valid] = np.nan
    answer = KDPP(0.5).rank(table, relevance, 20, candidates=ids)
    kept = answer >= 0
    np.testing.assert_array_equal(kept.sum(1), np.minimum(valid.sum(1), 20))
    for user in range(len(ids)):
        picks = answer[user][kept[user]]
        assert len(set(picks.tolist())) == len(picks)
        assert valid[user, picks].all()
        assert (np.diff(relevance[user, picks]) <= 0).all()
    np.testing.assert_array_equal(
        KDPP(0.0).rank(table, relevance, 8, candidates=ids), DPP(0.0).rank(table, relevance, 8, candidates=ids)
    )
    # Six coordinates hold six items; what is left of the list is filled up by relevance.
    spent = KDPP(0.5, gamma=0.0).rank(table, relevance, 20, candidates=ids)
    np.testing.assert_array_equal((spent >= 0).sum(1), np.minimum(valid.sum(1), 20))
    monkeypatch.setattr("recfast.rerank._base._CELLS", 400)
    np.testing.assert_array_equal(KDPP(0.5).rank(table, relevance, 20, candidates=ids), answer)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda f, r: DPP(1.5), r"DPP: diversity must be in \[0, 1\], got 1.5"),
        (lambda f, r: DPP(personal=2), r"DPP: personal must be in \[0, 1\], got 2.0"),
        (lambda f, r: DPP(gamma=-1), r"DPP: gamma must be in \[0, 1\], got -1"),
        (lambda f, r: DPP(window=0), "DPP: window must be at least 1, got 0"),
        (lambda f, r: DPP(exhausted="x"), "DPP: exhausted must be one of relevance, stop, restart, got 'x'"),
        (
            lambda f, r: DPP().rank(f, r[:, :-1], 3),
            r"DPP.rank: features must have shape \[6, 59, D\] or \[59, D\], got",
        ),
        (lambda f, r: DPP().rank(f, r[..., None], 3), r"DPP.rank: relevance must have shape \[U, N\] or \[N\], got"),
        (lambda f, r: MMR().rank(f, r, -1), "MMR.rank: k must be at least 0, got -1"),
        (lambda f, r: DPP().rank(f, r, 3, lengths=[1, 2]), r"DPP.rank: lengths must have shape \[6\], got \[2\]"),
        (lambda f, r: DPP().rank(f, r, 3, lengths=[61] * 6), r"DPP.rank: lengths\[0\] = 61 is outside \[0, 60\]"),
        (lambda f, r: DPP().rank(f, r, 3, mask=r), r"DPP.rank: mask must be bool \[6, 60\], got float32"),
        (lambda f, r: DPP(epsilon=0.0), r"DPP: epsilon must be in \(0, 1\], got 0.0"),
        (lambda f, r: MSD(window=0), "MSD: window must be at least 1, got 0"),
        (lambda f, r: SSD(mode="x"), "SSD: mode must be one of exact, paper, got 'x'"),
        (lambda f, r: KDPP(seed=-1), r"KDPP: seed must be in \[0, 2\^63\), got -1"),
        (lambda f, r: KDPP().rank(f, r, 3, shown=[[1]] * 6), "KDPP.rank: shown is not for samples"),
        (lambda f, r: KDPP().rank(f, r, 3, draw=-1), "KDPP.rank: draw must be at least 0, got -1"),
        (lambda f, r: KDPP().rank(f, r, 3, users=[1]), r"KDPP.rank: users must be int \[6\], got int64 \[1\]"),
        (lambda f, r: build("DDP"), "rerank: kind must be one of DPP, KDPP, MMR, MSD, SSD, XQuAD, got 'DDP'"),
        (lambda f, r: build("MMR", gamma=1), "rerank: MMR has no option 'gamma', expected one of diversity, "),
        (
            lambda f, r: DPP().rank(f, r, 3, candidates=np.zeros((6, 60), dtype=int)),
            r"DPP.rank: features must be a table \[T, D\] with candidates, got \[6, 60, 8\]",
        ),
        (
            lambda f, r: DPP().rank(f[0], r, 3, candidates=np.full((6, 60), 60)),
            r"DPP.rank: candidates\[0, 0\] = 60 is outside \[-1, 60\)",
        ),
        (
            lambda f, r: DPP().rank(f[0], r, 3, candidates=np.zeros((6, 60))),
            r"DPP.rank: candidates must be int \[6, 60\], got float64 \[6, 60\]",
        ),
        (lambda f, r: DPP().rank(f, r, 3, shown=[[60]] * 6), r"DPP.rank: shown\[0, 0\] = 60 is outside \[-1, 60\)"),
        (lambda f, r: DPP().rank(f, r, 3, shown=[1, 2]), r"DPP.rank: shown must be int \[6, S\], got int64 \[2\]"),
        (lambda f, r: XQuAD().rank(-abs(f), r, 3), r"XQuAD.rank: features\[0, 0, 0\] must be at least 0 and finite"),
        (lambda f, r: XQuAD(normalize=False).rank(f**2 + 1, r, 3), r"XQuAD.rank: features\[0, 0, 0\] must be in \["),
        (
            lambda f, r: XQuAD().rank(abs(f), r, 3, preferences=np.ones((6, 7))),
            r"XQuAD.rank: preferences must have shape \[6, 8\] or \[8\], got \[6, 7\]",
        ),
        (
            lambda f, r: XQuAD().rank(abs(f), r, 3, preferences=-np.ones(8)),
            r"XQuAD.rank: preferences\[0, 0\] must be at least 0 and finite, got -1.0",
        ),
        (lambda f, r: DPP(personal=1).rank(f, r, 3), "DPP.rank: personal = 1 needs propensity"),
        (lambda f, r: DPP().rank(f, r, 3, propensity=[1] * 6), "DPP.rank: propensity has no effect with personal = 0"),
        (
            lambda f, r: DPP(personal=1).rank(f, r, 3, propensity=[1, 2, 1, 1, 1, 1]),
            r"DPP.rank: propensity\[1\] must be in \[0, 1\], got 2.0",
        ),
        (lambda f, r: entropy_propensity([[1, -1]]), r"entropy_propensity: history\[0, 1\] must be at least 0"),
        (lambda f, r: entropy_propensity(([0, 5], [0, 2]), genres=3), r"history.values\[1\] = 5 is outside \[0, 3\)"),
        (lambda f, r: entropy_propensity(([0], [0, 1])), "a jagged history needs genres"),
        (lambda f, r: entropy_propensity([[1]], -1), "dampening must be at least 0, got -1"),
    ],
)
def test_rejects_bad_input(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(*candidates())


def test_names_what_is_not_finite():
    features, relevance = candidates()
    relevance[3, 2] = np.nan
    with pytest.raises(InputError, match=r"DPP.rank: relevance\[3, 2\] = nan, expected a finite number"):
        DPP().rank(features, relevance, 3)
    relevance[3, 2] = 0
    features[4, 1, 5] = np.inf
    with pytest.raises(InputError, match=r"DPP.rank: features\[4, 1, 5\] is not finite"):
        DPP().rank(features, relevance, 3)
    with pytest.raises(InputError, match=r"DPP.rank: features\[1, 5\] is not finite"):
        DPP().rank(features[4], relevance, 3)


@pytest.mark.parametrize("kind", [*GREEDY, KDPP])
@pytest.mark.parametrize("outlier", [-3.4e38, 1e160, 1e-200])
def test_order_of_relevance_beside_an_outlier(kind, outlier):
    relevance = np.array([2.9, 3.0, outlier, 2.8]) if abs(outlier) > 1 else np.array([2.9, 3.0, 1.0, 2.8]) * outlier
    wanted = relevance.argsort()[::-1]
    np.testing.assert_array_equal(kind(diversity=0.0).rank(np.eye(4), relevance, 4), wanted)
    both = kind(diversity=0.5, personal=True)
    found = both.rank(np.eye(4), np.stack([relevance, relevance]), 4, propensity=np.array([0.0, 1.0]))
    np.testing.assert_array_equal(found[0], wanted)
