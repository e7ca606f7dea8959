"""The five tests of mmr_greedy, then what the definition itself says."""

import greedy_problems as problems
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import _C, ops
from recfast.ops._library import REGISTRY


@given(**problems.problems, clip=st.booleans())
def test_matches_reference(
    kind, users, items, width, k, diversity, window, gathered, dtype, seed, clip, isa_levels, poisoned_empty
):
    features, relevance = problems.make(kind, users, items, width, seed, dtype)
    features, options = problems.options_of(users, items, features, gathered, seed)
    options |= {"diversity": diversity, "window": window, "clip": clip}
    wanted = ops.mmr_greedy.reference(features, relevance, k, **options)
    answers = [ops.mmr_greedy(features, relevance, k, **options) for _ in isa_levels()]
    for answer in answers:
        problems.assert_same(answer, wanted)
        assert torch.equal(answer.gains, answers[0].gains)


def test_known_values():
    # Items 0 and 1 point the same way, item 2 at a right angle, item 3 in between (cosine 0.6), item 4 away.
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]], dtype=torch.float64)
    relevance = torch.tensor([[1.0, 0.9, 0.2, 0.4, -0.5]])
    # Second pick: 1: .45 - .5 = -.05; 2: .1 - 0 = .1; 3: .2 - .3 = -.1; 4: -.25 + .5 = .25
    answer = ops.mmr_greedy(features, relevance, 3)
    assert answer.indices.tolist() == [[0, 4, 2]]
    assert answer.gains[0].tolist() == pytest.approx([0.5, 0.25, 0.1])
    # Clipped, item 4 is no better than one at a right angle: -.25.
    answer = ops.mmr_greedy(features, relevance, 3, clip=True)
    assert answer.indices.tolist() == [[0, 2, 1]]
    assert answer.gains[0].tolist() == pytest.approx([0.5, 0.1, -0.05])
    assert ops.mmr_greedy(features, relevance, 5, diversity=0).indices.tolist() == [[0, 1, 3, 2, 4]]
    # Features alone: the most relevant first, then the one that points away, then 2 (products 0, 0), 3 (0.8), 1 (1).
    answer = ops.mmr_greedy(features, relevance, 5, diversity=1)
    assert answer.indices.tolist() == [[0, 4, 2, 3, 1]]
    assert answer.gains[0].tolist() == pytest.approx([0.0, 1.0, 0.0, -0.8, -1.0])


def test_gradcheck():
    """Inference only: an input that asks for a gradient gets a result without one."""
    features, relevance = problems.make("random", 2, 9, 4, 0)
    answer = ops.mmr_greedy(features.requires_grad_(), relevance.requires_grad_(), 3)
    assert not any(value.requires_grad for value in answer)


def test_opcheck(opcheck):
    opcheck(REGISTRY["mmr_greedy"])


@pytest.mark.parametrize(("change", "error", "sentence"), problems.common_rejections("features"))
def test_rejects_bad_input(change, error, sentence):
    arguments = {"features": torch.ones(2, 3, 4), "relevance": torch.ones(2, 3), "k": 2} | change
    with pytest.raises(error, match="mmr_greedy: " + sentence):
        ops.mmr_greedy(**arguments)


def test_rejects_what_is_not_finite():
    problems.assert_refuses_what_is_not_finite(ops.mmr_greedy, "features", *problems.make("random", 3, 5, 4, 0))
    with pytest.raises(ValueError, match=r"features\[0, 0, 0\] must be finite, its row's square at most 1e\+200"):
        ops.mmr_greedy(torch.full((1, 1, 1), 1e120, dtype=torch.float64), torch.ones(1, 1), 1)


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("d", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_every_step_by_brute_force(window, d, clip):
    for seed in range(6):
        features, relevance = problems.make(("random", "clustered", "ties")[seed % 3], 1, 11, 4, seed, torch.float64)
        similar, grades = (features[0] @ features[0].T).tolist(), relevance[0].tolist()
        shown = [] if seed % 2 else [3, 7]

        def score(item, seen, similar=similar, grades=grades):
            closest = max((min(max(similar[item][j], 0.0), 1.0) if clip else similar[item][j] for j in seen), default=0)
            return (1 - d) * grades[item] - d * closest

        picks, gains = problems.brute_force(score, relevance[0], 12, d, shown=shown, window=window)
        given_shown = torch.tensor([[3, -1, 7, 3]]) if shown else None
        answer = ops.mmr_greedy(features, relevance, 12, diversity=d, window=window, clip=clip, shown=given_shown)
        assert answer.indices[0, : len(picks)].tolist() == picks
        assert answer.count.tolist() == [len(picks)]
        assert answer.gains[0, : len(picks)].tolist() == pytest.approx(gains, abs=1e-12)


def test_few_candidates():
    problems.assert_few_candidates(ops.mmr_greedy, *problems.make("random", 3, 70, 6, 4))


@pytest.mark.parametrize("window", [None, 4])
def test_alone_or_in_a_batch_with_any_threads(window):
    rows, relevance = problems.make("clustered", 9, 210, 12, 5)
    problems.assert_same_alone_or_in_a_batch(ops.mmr_greedy, rows, relevance, window=window)


def test_diversity_0_is_the_order_of_relevance():
    problems.assert_diversity_0_is_relevance(ops.mmr_greedy, problems.make("random", 1, 6, 4, 0)[0])


def test_shown_rows_need_not_be_candidates():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    candidates = torch.tensor([[1, 2, 1]])
    relevance = torch.tensor([[0.1, 0.2, 0.0]])
    answer = ops.mmr_greedy(table, relevance, 3, candidates=candidates, shown=torch.tensor([[0]]))
    # Against row 0: item 0 (row 1) .05 - 0, item 1 (row 2) .1 - .3.
    assert answer.indices.tolist() == [[0, 1, 2]]
    # A shown row takes all its candidates with it.
    answer = ops.mmr_greedy(table, relevance, 3, candidates=candidates, shown=torch.tensor([[1]]))
    assert answer.indices.tolist() == [[1, -1, -1]]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e18, 1e90])
def test_any_scale(scale):
    features, relevance = problems.make("clustered", 2, 150, 8, 7, torch.float64)
    wanted = ops.mmr_greedy(features, relevance.double(), 20, diversity=0.6)
    answer = ops.mmr_greedy(features * scale, relevance.double() * scale**2, 20, diversity=0.6)
    assert torch.equal(answer.indices, wanted.indices)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("d", [0.3, 0.8, 1.0])
def test_large_problem(d, window):
    features, relevance = problems.make("clustered", 1, 1500, 48, 9)
    relevance = relevance.sort(descending=True).values
    options = {"diversity": d, "window": window}
    wanted = ops.mmr_greedy.reference(features, relevance, 40, **options)
    problems.assert_same(ops.mmr_greedy(features, relevance, 40, **options), wanted)


def test_fast_selection_is_nearly_greedy():
    features, relevance = problems.make("random", 4, 300, 16, 8)
    fast = ops.mmr_greedy(features, relevance, 12, diversity=0.7, exact=False)
    scores = torch.full((4, 300), torch.nan)
    for user in range(4):
        for n in range(1, 12):
            seen = features[user, fast.indices[user, :n]].double()
            scores = 0.3 * relevance[user].double() - 0.7 * (features[user].double() @ seen.T).amax(1)
            scores[fast.indices[user, :n]] = -torch.inf
            # The float32 bound of mmr_greedy.h, twice, over a span of relevance below 8.
            assert float(scores[fast.indices[user, n]]) >= float(scores.max()) - 8 * 2 * 40 * 2**-24


def test_memory_grows_with_neither_items_squared_nor_items_times_picks():
    def scratch(items, k):
        args = (1, items, 64, k, 0, 0, True, 0, 0, *[0] * 10)
        return _C.mmr_greedy_scratch(args, (False,))

    # The rows in float32 and some sixty bytes an item; the picks' rows.
    assert scratch(100_000, 10) < 100_000 * (4 * 64 + 64)
    assert scratch(100_000, 500) - scratch(100_000, 10) < 500 * 13 * 64


def test_equals_pyversity():
    pyversity = pytest.importorskip("pyversity", reason="pyversity is not installed")
    for seed in range(5):
        features, relevance = problems.make("clustered", 1, 120, 16, seed)
        for d in (0.2, 0.5, 0.9):
            wanted = pyversity.diversify(
                features[0].numpy(), relevance[0].numpy(), 20, strategy=pyversity.Strategy.MMR, diversity=d
            )
            answer = ops.mmr_greedy(features, relevance, 20, diversity=d, clip=True)
            assert np.array_equal(answer.indices[0].numpy(), wanted.indices)
            np.testing.assert_allclose(answer.gains[0].numpy(), wanted.selection_scores, rtol=1e-5, atol=1e-5)
