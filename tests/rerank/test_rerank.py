"""DPP and MMR as objects: scaling, the trade-off of each user, candidates, kinds of input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from recfast import InputError, metrics, ops
from recfast.rerank import DPP, MMR, entropy_propensity, history_entropy


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


@pytest.mark.parametrize("kind", [DPP, MMR])
def test_scale_of_the_scores_does_not_matter(kind):
    features, relevance = candidates()
    wanted = kind(0.5).rank(features, relevance, 10)
    np.testing.assert_array_equal(kind(0.5).rank(features * 7, relevance * 4 - 100, 10), wanted)


@pytest.mark.parametrize("kind", [DPP, MMR])
def test_diversity_zero_keeps_the_order(kind):
    features, relevance = candidates()
    relevance[:, 5:9] = relevance[:, 5:6]  # ties by the lowest position
    answer = kind(0.0).rank(features, relevance, 12)
    np.testing.assert_array_equal(answer, np.argsort(-relevance, axis=1, kind="stable")[:, :12])


@pytest.mark.parametrize("kind", [DPP, MMR])
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


@pytest.mark.parametrize("kind", [DPP, MMR])
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


@pytest.mark.parametrize("kind", [DPP, MMR])
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
    for reranker in (DPP(0.2, gamma=0.3, window=4, personal=True, exhausted="restart"), MMR(0.7, personal=0.25)):
        again = type(reranker)(**reranker.config())
        assert again.config() == reranker.config()
        assert repr(again) == repr(reranker)
    assert not DPP(personal=False).personal
    assert DPP(personal=True).personal == 1.0


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
