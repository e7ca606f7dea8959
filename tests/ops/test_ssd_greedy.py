"""The five tests of ssd_greedy, then what the definition itself says."""

import itertools
import math

import greedy_problems as problems
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import _C, ops
from recfast.ops._library import REGISTRY


@given(**problems.problems, gamma=st.sampled_from([0.0, 0.3, 2.0]), paper=st.booleans(), volume=st.booleans())
def test_matches_reference(
    kind,
    users,
    items,
    width,
    k,
    diversity,
    window,
    gathered,
    dtype,
    seed,
    gamma,
    paper,
    volume,
    isa_levels,
    poisoned_empty,
):
    features, relevance = problems.make(kind, users, items, width, seed, dtype)
    features, options = problems.options_of(users, items, features, gathered, seed)
    options |= {"diversity": diversity, "window": window, "gamma": gamma, "volume": volume}
    options["mode"] = "paper" if paper else "exact"
    wanted = ops.ssd_greedy.reference(features, relevance, k, **options)
    answers = [ops.ssd_greedy(features, relevance, k, **options) for _ in isa_levels()]
    for answer in answers:
        problems.assert_same(answer, wanted)
        assert torch.equal(answer.gains, answers[0].gains)


def test_known_values():
    # Items 0 and 1 point the same way, item 2 at a right angle, item 3 in between (0.8 is left of it), item 4 away.
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]], dtype=torch.float64)
    relevance = torch.tensor([[1.0, 0.9, 0.2, 0.5, -0.5]], dtype=torch.float64)
    # Second pick: 1: .45; 2: .1 + .5; 3: .25 + .4; 4: -.25. Then nothing is left of any: by relevance.
    answer = ops.ssd_greedy(features, relevance, 5)
    assert answer.indices.tolist() == [[0, 3, 1, 2, 4]]
    assert answer.gains[0].tolist() == pytest.approx([1.0, 0.65, 0.45, 0.1, -0.25])
    # With a small gamma item 1 comes second.
    assert ops.ssd_greedy(features, relevance, 2, gamma=0.1).indices.tolist() == [[0, 1]]
    assert ops.ssd_greedy(features, relevance, 5, diversity=0).indices.tolist() == [[0, 1, 3, 2, 4]]
    # Features alone: the most relevant first, then the one at a right angle; then the lowest index.
    assert ops.ssd_greedy(features, relevance, 5, diversity=1).indices.tolist() == [[0, 2, 1, 3, 4]]
    # Rows of norm 2: the volume is 2 at the second pick, and 2 * 1.6 when nothing is left.
    answer = ops.ssd_greedy(2 * features, relevance, 3, volume=True)
    assert answer.indices.tolist() == [[0, 2, 1]]
    assert answer.gains[0].tolist() == pytest.approx([1.5, 2.1, 0.45])
    # A window of two: each pick sees the one before it. Exact: after 0 and 2 all is left of 1 and 4, 0.6 of 3.
    answer = ops.ssd_greedy(features, relevance, 4, diversity=1, window=2)
    assert answer.indices.tolist() == [[0, 2, 1, 3]]
    assert answer.gains[0].tolist() == pytest.approx([1.0, 1.0, 1.0, 0.8])


def test_paper_remembers_more_than_the_window():
    # Picks 0 (e1), 1 (.6, .8, 0): its direction is what is left of it, e2. When 0 has left a window of two, the item
    # (0, 0.6, 0.8) is compared with e2 (0.8 is left), not with (.6, .8, 0) (sqrt(1 - .48^2) is left).
    features = torch.tensor([[[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.6, 0.8]]], dtype=torch.float64)
    relevance = torch.tensor([[10.0, 5.0, 0.0]])
    for mode, left in (("paper", 0.8), ("exact", math.sqrt(1 - 0.48**2))):
        answer = ops.ssd_greedy(features, relevance, 3, window=2, mode=mode)
        assert answer.indices.tolist() == [[0, 1, 2]]
        assert float(answer.gains[0, 2]) == pytest.approx(0.5 * left)


def test_gradcheck():
    """Inference only: an input that asks for a gradient gets a result without one."""
    features, relevance = problems.make("random", 2, 9, 4, 0)
    answer = ops.ssd_greedy(features.requires_grad_(), relevance.requires_grad_(), 3)
    assert not any(value.requires_grad for value in answer)


def test_opcheck(opcheck):
    opcheck(REGISTRY["ssd_greedy"])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        *problems.common_rejections("features"),
        ({"gamma": -1.0}, ValueError, r"gamma must be in \[0, 1e\+100\], got -1.0"),
        ({"gamma": 1e101}, ValueError, "gamma must be in"),
        ({"gamma": math.nan}, ValueError, "gamma must be in"),
        ({"mode": "fast"}, ValueError, "mode must be one of exact, paper, got 'fast'"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {"features": torch.ones(2, 3, 4), "relevance": torch.ones(2, 3), "k": 2} | change
    with pytest.raises(error, match="ssd_greedy: " + sentence):
        ops.ssd_greedy(**arguments)


def test_rejects_what_is_not_finite():
    problems.assert_refuses_what_is_not_finite(ops.ssd_greedy, "features", *problems.make("random", 3, 5, 4, 0))
    with pytest.raises(ValueError, match=r"features\[0, 0, 0\] must be finite, its row's square at most 1e\+200"):
        ops.ssd_greedy(torch.full((1, 1, 1), 1e120, dtype=torch.float64), torch.ones(1, 1), 1)


def left_of(rows, item, seen):
    """The distance of a row from the span of others, by least squares; 0 below 1e-5 of its norm."""
    norm = np.linalg.norm(rows[item])
    if not seen:
        return norm
    basis = rows[seen].T
    left = np.linalg.norm(rows[item] - basis @ np.linalg.lstsq(basis, rows[item], rcond=1e-12)[0])
    return left if left > 1e-5 * norm else 0.0


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("d", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("volume", [False, True])
def test_every_step_by_brute_force(window, d, volume):
    for seed in range(6):
        features, relevance = problems.make(("random", "clustered", "long")[seed % 3], 1, 11, 6, seed, torch.float64)
        rows, grades = features[0].numpy(), relevance[0].tolist()
        shown = [] if seed % 2 else [3, 7]
        # The product so far belongs to the picks, which brute force makes known by what it asks about.
        picked = []

        def score(item, seen, rows=rows, grades=grades, picked=picked, shown=tuple(shown)):
            running = 1.0
            if volume:
                for n in range(len(picked)):
                    before = [*shown, *picked[:n]]
                    before = before if window is None else before[len(before) - min(window - 1, len(before)) :]
                    running *= left_of(rows, picked[n], before)
            return (1 - d) * grades[item] + d * running * left_of(rows, item, seen)

        answer = ops.ssd_greedy(
            features,
            relevance,
            9,
            diversity=d,
            window=window,
            volume=volume,
            shown=torch.tensor([[3, -1, 7, 3]]) if shown else None,
        )
        for n in range(9):
            seen = [*shown, *picked]
            within = seen if window is None else seen[len(seen) - min(window - 1, len(seen)) :]
            item = int(answer.indices[0, n])
            worth = {i: score(i, within) for i in range(11) if i not in seen}
            judged = {i: grades[i] for i in worth} if d == 0 or not within else worth
            assert judged[item] >= max(judged.values()) - 1e-7 * max(1.0, *map(abs, worth.values()))
            assert float(answer.gains[0, n]) == pytest.approx(worth[item], rel=1e-7, abs=1e-7)
            picked.append(item)


def test_few_candidates():
    problems.assert_few_candidates(ops.ssd_greedy, *problems.make("random", 3, 70, 6, 4))


@pytest.mark.parametrize(("window", "mode"), [(None, "exact"), (4, "exact"), (4, "paper")])
def test_alone_or_in_a_batch_with_any_threads(window, mode):
    rows, relevance = problems.make("clustered", 9, 210, 12, 5)
    problems.assert_same_alone_or_in_a_batch(ops.ssd_greedy, rows, relevance, window=window, mode=mode)


def test_diversity_0_is_the_order_of_relevance():
    problems.assert_diversity_0_is_relevance(ops.ssd_greedy, problems.make("random", 1, 6, 4, 0)[0])


def test_shown_rows_need_not_be_candidates():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    candidates = torch.tensor([[1, 2, 1]])
    relevance = torch.tensor([[0.1, 0.2, 0.0]])
    answer = ops.ssd_greedy(table, relevance, 3, candidates=candidates, shown=torch.tensor([[0]]))
    # Against row 0: item 0 (row 1) .05 + .5, item 1 (row 2) .1 + .4.
    assert answer.indices.tolist() == [[0, 1, 2]]
    # A shown row takes all its candidates with it.
    answer = ops.ssd_greedy(table, relevance, 3, candidates=candidates, shown=torch.tensor([[1]]))
    assert answer.indices.tolist() == [[1, -1, -1]]


@pytest.mark.parametrize("scale", [1e-90, 1e-3, 1e18, 1e90])
def test_any_scale(scale):
    features, relevance = problems.make("clustered", 2, 150, 8, 7, torch.float64)
    wanted = ops.ssd_greedy(features, relevance.double(), 20, diversity=0.6)
    answer = ops.ssd_greedy(features * scale, relevance.double() * scale, 20, diversity=0.6)
    assert torch.equal(answer.indices, wanted.indices)


@pytest.mark.parametrize(("window", "mode"), [(None, "exact"), (6, "exact"), (6, "paper")])
@pytest.mark.parametrize("d", [0.3, 0.8, 1.0])
def test_large_problem(d, window, mode):
    features, relevance = problems.make("clustered", 1, 1500, 48, 9)
    relevance = relevance.sort(descending=True).values
    options = {"diversity": d, "window": window, "mode": mode}
    wanted = ops.ssd_greedy.reference(features, relevance, 40, **options)
    problems.assert_same(ops.ssd_greedy(features, relevance, 40, **options), wanted)


def test_fast_selection_is_nearly_greedy():
    features, relevance = problems.make("random", 4, 300, 16, 8)
    fast = ops.ssd_greedy(features, relevance, 12, diversity=0.7, exact=False)
    for user in range(4):
        for n in range(1, 12):
            seen = features[user, fast.indices[user, :n]].double()
            basis = torch.linalg.qr(seen.T).Q
            left = (features[user].double() - features[user].double() @ basis @ basis.T).norm(dim=1)
            scores = 0.3 * relevance[user].double() + 0.7 * left
            scores[fast.indices[user, :n]] = -torch.inf
            # The float32 share of ssd_greedy.h is off by less than 1.4e-5, its root (here above 0.1) by 1e-4.
            assert float(scores[fast.indices[user, n]]) >= float(scores.max()) - 2e-4


def test_memory_grows_with_neither_items_squared_nor_items_times_picks():
    def scratch(items, k):
        args = (1, items, 64, k, 0, 0, True, 0, 0, *[0] * 10)
        return _C.ssd_greedy_scratch(args, (1.0, True, False))

    # The rows in float32 and some sixty bytes an item; the picks' directions.
    assert scratch(100_000, 10) < 100_000 * (4 * 64 + 68)
    assert scratch(100_000, 500) - scratch(100_000, 10) < 500 * 13 * 64


def test_equals_pyversity():
    pyversity = pytest.importorskip("pyversity", reason="pyversity is not installed")
    for seed in range(4):
        features, relevance = problems.make("clustered", 1, 120, 16, seed)
        rows, grades = features[0].numpy(), relevance[0].numpy()
        for window, d in itertools.product((None, 1, 3, 8), (0.3, 0.6)):
            wanted = pyversity.diversify(
                rows,
                grades,
                14,
                strategy=pyversity.Strategy.SSD,
                diversity=d,
                window=window,
                gamma=1.5,
                normalize=False,
                append_bias=False,
                normalize_scores=False,
            )
            # Its window is the number of bases, ours counts the item to be picked too.
            ours = None if window is None else window + 1
            answer = ops.ssd_greedy(features, relevance, 14, diversity=d, window=ours, gamma=1.5, mode="paper")
            assert np.array_equal(answer.indices[0].numpy(), wanted.indices)
            np.testing.assert_allclose(answer.gains[0].numpy(), wanted.selection_scores, rtol=1e-3, atol=1e-3)


def test_volume_equals_its_plain_form():
    """The loop that rsdiv has: rows lose their parts, norms are multiplied by the norm of the pick before."""
    features, relevance = problems.make("random", 1, 60, 12, 3, torch.float64)
    rows, grades, gamma = features[0].numpy().copy(), relevance[0].double().numpy(), 3.0
    picks = [int(grades.argmax())]
    volume = gamma * np.linalg.norm(rows[picks[0]])
    for _ in range(9):
        direction = rows[picks[-1]] / np.linalg.norm(rows[picks[-1]])
        rows -= np.outer(rows @ direction, direction)
        norms = np.linalg.norm(rows, axis=1) * volume
        scores = norms + grades
        scores[picks] = -np.inf
        picks.append(int(scores.argmax()))
        volume = norms[picks[-1]]
    answer = ops.ssd_greedy(features, relevance, 10, gamma=gamma, volume=True)
    assert answer.indices[0].tolist() == picks
