"""The five tests of xquad_greedy, then what the definition itself says."""

import math

import greedy_problems as problems
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import _C, ops
from recfast.ops._library import REGISTRY


def preferences_of(users, width, seed):
    return torch.rand(users, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(**problems.problems, uniform=st.booleans())
def test_matches_reference(
    kind, users, items, width, k, diversity, window, gathered, dtype, seed, uniform, isa_levels, poisoned_empty
):
    topics, relevance = problems.topics(kind, users, items, width, seed, dtype)
    topics, options = problems.options_of(users, items, topics, gathered, seed)
    options |= {"diversity": diversity, "window": window}
    options["preferences"] = None if uniform else preferences_of(users, width, seed)
    wanted = ops.xquad_greedy.reference(topics, relevance, k, **options)
    answers = [ops.xquad_greedy(topics, relevance, k, **options) for _ in isa_levels()]
    for answer in answers:
        problems.assert_same(answer, wanted)
        assert torch.equal(answer.gains, answers[0].gains)


def test_known_values():
    # Two topics; items 0 and 1 serve the first wholly, item 2 the second, item 3 both by half.
    topics = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    relevance = torch.tensor([[0.6, 0.5, 0.1, 0.3]] * 2, dtype=torch.float64)
    preferences = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64)
    answer = ops.xquad_greedy(topics, relevance, 4, preferences=preferences)
    # First user: 0: .3 + .4; then the first topic is served: 1: .25; 2: .05 + .1; 3: .15 + .05; then 3: .2, 2: .15.
    # Second user: 0: .3 + .1; 1: .35; 2: .05 + .4; 3: .15 + .25; then 0: .4, then 1: .25 and 3: .15.
    assert answer.indices.tolist() == [[0, 1, 3, 2], [2, 0, 1, 3]]
    assert answer.gains[0].tolist() == pytest.approx([0.7, 0.25, 0.2, 0.1])
    assert answer.gains[1].tolist() == pytest.approx([0.45, 0.4, 0.25, 0.15])
    assert ops.xquad_greedy(topics, relevance, 4, diversity=0).indices.tolist() == [[0, 1, 3, 2]] * 2
    # Topics alone, uniform: 0, 1 and 2 tie at .5, also with item 3.
    assert ops.xquad_greedy(topics, relevance, 3, diversity=1).indices.tolist() == [[0, 2, 1]] * 2


def test_gradcheck():
    """Inference only: an input that asks for a gradient gets a result without one."""
    features, relevance = problems.topics("random", 2, 9, 4, 0)
    answer = ops.xquad_greedy(features.requires_grad_(), relevance.requires_grad_(), 3)
    assert not any(value.requires_grad for value in answer)


def test_opcheck(opcheck):
    opcheck(REGISTRY["xquad_greedy"])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        *problems.common_rejections("topics"),
        ({"preferences": torch.ones(2, 3)}, ValueError, r"preferences must have shape \[2, 4\], got \[2, 3\]"),
        ({"preferences": torch.ones(2, 4).int()}, TypeError, "preferences must be float32 or float64, got int32"),
        (
            {"preferences": -torch.ones(2, 4)},
            ValueError,
            r"preferences\[0, 0\] must be finite and at least 0, got -1.0",
        ),
        ({"preferences": torch.full((2, 4), math.nan)}, ValueError, r"preferences\[0, 0\] must be finite .*, got nan"),
        ({"topics": torch.full((2, 3, 4), 1.5)}, ValueError, r"topics\[0, 0, 0\] must be in \[0, 1\], got 1.5"),
        ({"topics": torch.full((2, 3, 4), -0.5)}, ValueError, r"topics\[0, 0, 0\] must be in \[0, 1\], got -0.5"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {"topics": torch.ones(2, 3, 4), "relevance": torch.ones(2, 3), "k": 2} | change
    with pytest.raises(error, match="xquad_greedy: " + sentence):
        ops.xquad_greedy(**arguments)


def test_rejects_what_is_not_finite():
    problems.assert_refuses_what_is_not_finite(ops.xquad_greedy, "topics", *problems.topics("random", 3, 5, 4, 0))


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("d", [0.0, 0.3, 1.0])
def test_every_step_by_brute_force(window, d):
    for seed in range(6):
        topics, relevance = problems.topics(("random", "clustered", "ties")[seed % 3], 1, 11, 4, seed, torch.float64)
        preferences = preferences_of(1, 4, seed)
        rows, grades, wanted = topics[0].tolist(), relevance[0].tolist(), preferences[0].tolist()
        shown = [] if seed % 2 else [3, 7]

        def score(item, seen, rows=rows, grades=grades, wanted=wanted):
            gain = sum(wanted[z] * rows[item][z] * math.prod(1 - rows[j][z] for j in seen) for z in range(4))
            return (1 - d) * grades[item] + d * gain

        picks, gains = problems.brute_force(
            score, relevance[0], 12, d, shown=shown, window=window, first_by_relevance=False
        )
        given_shown = torch.tensor([[3, -1, 7, 3]]) if shown else None
        answer = ops.xquad_greedy(
            topics, relevance, 12, preferences=preferences, diversity=d, window=window, shown=given_shown
        )
        assert answer.indices[0, : len(picks)].tolist() == picks
        assert answer.count.tolist() == [len(picks)]
        assert answer.gains[0, : len(picks)].tolist() == pytest.approx(gains, abs=1e-12)


def test_few_candidates():
    problems.assert_few_candidates(ops.xquad_greedy, *problems.topics("random", 3, 70, 6, 4))


@pytest.mark.parametrize("window", [None, 4])
def test_alone_or_in_a_batch_with_any_threads(window):
    rows, relevance = problems.topics("clustered", 9, 210, 12, 5)
    problems.assert_same_alone_or_in_a_batch(ops.xquad_greedy, rows, relevance, window=window)


def test_diversity_0_is_the_order_of_relevance():
    problems.assert_diversity_0_is_relevance(ops.xquad_greedy, problems.topics("random", 1, 6, 4, 0)[0])


def test_shown_rows_need_not_be_candidates():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    candidates = torch.tensor([[1, 2, 1]])
    relevance = torch.tensor([[0.2, 0.2, 0.0]])
    answer = ops.xquad_greedy(table, relevance, 3, candidates=candidates, shown=torch.tensor([[0]]))
    # Topic 0 is served: item 0 (row 1) .1 + .25, item 1 (row 2) .1 + .2; then item 1 .1 before the copy of item 0.
    assert answer.indices.tolist() == [[0, 1, 2]]
    # A shown row takes all its candidates with it.
    answer = ops.xquad_greedy(table, relevance, 3, candidates=candidates, shown=torch.tensor([[1]]))
    assert answer.indices.tolist() == [[1, -1, -1]]


@pytest.mark.parametrize("scale", [1e-90, 1e18, 1e190])
def test_any_scale(scale):
    topics, relevance = problems.topics("clustered", 2, 150, 8, 7, torch.float64)
    relevance, preferences = relevance.double(), preferences_of(2, 8, 7)
    options = {"diversity": 0.6}
    wanted = ops.xquad_greedy(topics, relevance, 20, preferences=preferences, **options)
    answer = ops.xquad_greedy(topics, relevance * scale, 20, preferences=preferences * scale, **options)
    assert torch.equal(answer.indices, wanted.indices)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("d", [0.3, 0.8, 1.0])
def test_large_problem(d, window):
    features, relevance = problems.topics("clustered", 1, 1500, 48, 9)
    relevance = relevance.sort(descending=True).values
    options = {"diversity": d, "window": window}
    wanted = ops.xquad_greedy.reference(features, relevance, 40, **options)
    problems.assert_same(ops.xquad_greedy(features, relevance, 40, **options), wanted)


def test_fast_selection_is_nearly_greedy():
    topics, relevance = problems.topics("random", 4, 300, 16, 8)
    fast = ops.xquad_greedy(topics, relevance, 12, diversity=0.7, exact=False)
    for user in range(4):
        for n in range(12):
            seen = topics[user, fast.indices[user, :n]].double()
            scores = 0.3 * relevance[user] + 0.7 * topics[user].double() @ (1 - seen).prod(0) / 16
            scores[fast.indices[user, :n]] = -torch.inf
            # The float32 bound of xquad_greedy.h, twice, over a span of relevance below 8.
            assert float(scores[fast.indices[user, n]]) >= float(scores.max()) - 8 * 2 * 40 * 2**-24


def test_memory_grows_with_neither_items_squared_nor_items_times_picks():
    def scratch(items, k):
        args = (1, items, 64, k, 0, 0, True, 0, 0, *[0] * 10)
        return _C.xquad_greedy_scratch(args, (0,))

    # The rows in float32 and some forty bytes an item; a vector a pick.
    assert scratch(100_000, 10) < 100_000 * (4 * 64 + 40)
    assert scratch(100_000, 500) - scratch(100_000, 10) < 500 * 13 * 64
