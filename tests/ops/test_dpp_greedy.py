"""The five tests of dpp_greedy, then what the definition itself says: determinants, policies, candidates."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from recfast import _C, ops
from recfast.ops._library import REGISTRY

POLICIES = ("relevance", "stop", "restart")


def make(kind: str, users: int, items: int, width: int, seed: int, dtype=torch.float32):
    """Features and relevance of a kind that is hard in its own way."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(users, items, width, generator=generator, dtype=dtype)
    relevance = torch.randn(users, items, generator=generator)
    if kind == "clustered":
        centres = torch.randn(users, 1 + items // 8, width, generator=generator, dtype=dtype)
        rows = 0.05 * rows + centres[:, torch.arange(items) % centres.shape[1]]
    elif kind == "duplicates":
        rows = rows[:, torch.randint(0, 1 + items // 3, (items,), generator=generator)]
    elif kind == "ties":
        # Few distinct rows and few distinct grades: most scores are equal to the last bit.
        rows = (rows > 0.5).to(dtype)
        relevance = relevance.round()
    elif kind == "low rank":
        rank = 1 + width // 3
        rows = rows[..., :rank] @ torch.randn(rank, width, generator=generator, dtype=dtype)
    return normalize(rows, dim=-1), relevance


def assert_same(answer, wanted):
    assert torch.equal(answer.indices, wanted.indices)
    assert torch.equal(answer.count, wanted.count)
    # A residual share of 1e-10 is known to about 1e-10 of itself; both sums run over at most k gains.
    torch.testing.assert_close(answer.gains, wanted.gains, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(answer.log_det, wanted.log_det, rtol=1e-9, atol=1e-7)


def log_det(features, relevance, weight, gamma, picks):
    """log det L_Y from the definition."""
    picks = list(picks)
    rows = features[picks].double()
    kernel = (1 - gamma) * rows @ rows.T + gamma * torch.eye(len(picks), dtype=torch.float64)
    scale = torch.exp(0.5 * weight * relevance[picks].double())
    sign, value = np.linalg.slogdet((scale[:, None] * kernel * scale).numpy())
    return value if sign > 0 else -math.inf


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@given(
    kind=st.sampled_from(["random", "clustered", "duplicates", "ties", "low rank"]),
    users=st.integers(0, 3),
    items=st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 129]), st.integers(0, 200)),
    width=st.one_of(st.sampled_from([1, 7, 8, 9, 64, 65]), st.integers(1, 24)),
    k=st.integers(0, 30),
    alpha=st.sampled_from([0.0, 0.25, 1.0, 40.0, math.inf]),
    gamma=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 1.0]),
    policy=st.sampled_from(POLICIES),
    window=st.sampled_from([None, None, 1, 2, 5]),
    dtype=st.sampled_from(DTYPES),
    epsilon=st.sampled_from([1e-10, 1e-10, 1e-8, 0.3]),
    table=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_matches_reference(
    kind, users, items, width, k, alpha, gamma, policy, window, dtype, epsilon, table, seed, isa_levels, poisoned_empty
):
    features, relevance = make(kind, users, items, width, seed)
    features = features.to(dtype)
    relevance = relevance.to([torch.float32, torch.float64][seed % 2])
    options = {"alpha": alpha, "gamma": gamma, "exhausted": policy, "window": window, "epsilon": epsilon}
    generator = torch.Generator().manual_seed(seed)
    rows = items
    if table and users:
        features = features[0]
        options["candidates"] = torch.randint(-1, max(items, 0), (users, items), generator=generator)
    if seed % 3 == 0:
        options["lengths"] = torch.randint(0, items + 1, (users,), generator=generator)
    if seed % 4 == 0:
        options["mask"] = torch.rand(users, items, generator=generator) < 0.5
    if seed % 5 == 0 and items:
        options["shown"] = torch.randint(-1, rows, (users, 3), generator=generator)
    wanted = ops.dpp_greedy.reference(features, relevance, k, **options)
    for _ in isa_levels():
        assert_same(ops.dpp_greedy(features, relevance, k, **options), wanted)


@pytest.mark.parametrize("part", range(10))
def test_a_thousand_problems(part, isa_levels):
    """Each is solved at another level and number of threads; together every one equals the float64 reference."""
    levels = list(isa_levels())
    threads = torch.get_num_threads()
    kinds = ["random", "clustered", "duplicates", "ties", "low rank"]
    try:
        for seed in range(100 * part, 100 * part + 100):
            rng = np.random.default_rng(seed)
            items, width = int(rng.integers(2, 150)), int(rng.integers(1, 40))
            features, relevance = make(kinds[seed % 5], 1, items, width, seed, DTYPES[seed // 5 % 2])
            k = int(rng.integers(1, 13))
            alpha, gamma = (0.0, 0.5, 2.0)[seed % 3], (0.0, 0.1)[seed // 3 % 2]
            wanted = ops.dpp_greedy.reference(features, relevance, k, alpha=alpha, gamma=gamma)
            _C.set_isa(levels[seed % len(levels)])
            torch.set_num_threads(1 + seed // 7 % 3)
            answer = ops.dpp_greedy(features, relevance, k, alpha=alpha, gamma=gamma)
            assert torch.equal(answer.indices, wanted.indices), seed
            assert torch.equal(answer.count, wanted.count), seed
    finally:
        _C.set_isa(levels[-1])
        torch.set_num_threads(threads)


def test_known_values():
    # Items 0 and 1 point the same way, item 2 is at a right angle to them, item 3 in between (cosine 0.6 and 0.8).
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]], dtype=torch.float64)
    relevance = torch.tensor([[3.0, 2.5, 0.0, 1.0]])
    answer = ops.dpp_greedy(features, relevance, 4, alpha=0.5)
    # Scores at the second pick: item 2: 0 + log 1 = 0; item 3: 1 + log 0.64 = 0.5537; then nothing spans anything new.
    assert answer.indices.tolist() == [[0, 3, 1, 2]]
    assert answer.gains[0, :2].tolist() == pytest.approx([3.0, 1.0 + math.log(0.64)])
    assert answer.gains[0, 2:].tolist() == [-math.inf, -math.inf]
    assert answer.count.tolist() == [4]
    assert answer.log_det.tolist() == pytest.approx([4.0 + math.log(0.64)])
    assert ops.dpp_greedy(features, relevance, 4, alpha=0.5, exhausted="stop").indices.tolist() == [[0, 3, -1, -1]]
    # Afresh: item 1 (2.5) before item 2, which is at a right angle to it.
    assert ops.dpp_greedy(features, relevance, 4, alpha=0.5, exhausted="restart").indices.tolist() == [[0, 3, 1, 2]]
    assert ops.dpp_greedy(features, relevance, 4, diversity=0).indices.tolist() == [[0, 1, 3, 2]]
    # Features alone: all norms are equal, so item 0 by its index, then the one at a right angle.
    assert ops.dpp_greedy(features, relevance, 2, diversity=1).indices.tolist() == [[0, 2]]


def test_gradcheck():
    """Inference only: an input that asks for a gradient gets a result without one."""
    features, relevance = make("random", 2, 9, 4, 0)
    answer = ops.dpp_greedy(features.requires_grad_(), relevance.requires_grad_(), 3)
    assert not any(value.requires_grad for value in answer)


def test_opcheck(opcheck):
    opcheck(REGISTRY["dpp_greedy"])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"features": [[1.0]]}, TypeError, "dpp_greedy: features must be a tensor, got list"),
        ({"features": torch.ones(2, 3, 4).int()}, TypeError, "features must be float32 or .* or float16, got int32"),
        ({"features": torch.ones(2, 4, 4)}, ValueError, r"features must have shape \[2, 3, D\], got \[2, 4, 4\]"),
        ({"features": torch.ones(2, 4)}, ValueError, r"features must have shape \[3, D\], got \[2, 4\]"),
        ({"relevance": torch.ones(3)}, ValueError, r"relevance must have shape \[U, N\], got \[3\]"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({"gamma": math.nan}, ValueError, "gamma must be in"),
        ({"diversity": 1.25}, ValueError, r"diversity must be in \[0, 1\], got 1.25"),
        ({"diversity": torch.tensor([0.5, math.nan])}, ValueError, r"diversity\[1\] must be in \[0, 1\], got nan"),
        ({"diversity": torch.ones(3)}, ValueError, r"diversity must be a number or have shape \[2\], got \[3\]"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0, got -1.0"),
        ({"alpha": 1.0, "diversity": 0.5}, ValueError, "give diversity or alpha, not both"),
        ({"lengths": torch.tensor([1, 4])}, IndexError, r"lengths\[1\] = 4 is outside \[0, 4\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got float32"),
        ({"shown": torch.tensor([[0], [3]])}, IndexError, r"shown\[1, 0\] = 3 is outside \[0, 3\)"),
        ({"shown": torch.tensor([[0], [-2]])}, IndexError, r"shown\[1, 0\] = -2 is outside \[0, 3\)"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"exhausted": "noise"}, ValueError, "exhausted must be one of relevance, stop, restart, got 'noise'"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {"features": torch.ones(2, 3, 4), "relevance": torch.ones(2, 3), "k": 2} | change
    with pytest.raises(error, match=sentence):
        ops.dpp_greedy(**arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rejects_what_is_not_finite(value):
    features, relevance = make("random", 3, 5, 4, 0)
    wrong = features.clone()
    wrong[1, 2, 3] = wrong[2, 0, 0] = value
    with pytest.raises(ValueError, match=r"dpp_greedy: features\[1, 2, 3\] must be a finite number .*, got (nan|inf)"):
        ops.dpp_greedy(wrong, relevance, 2)
    with pytest.raises(ValueError, match=r"features\[2, 3\] must be a finite number .*, got (nan|inf)"):
        ops.dpp_greedy(wrong[1], relevance, 2)
    wrong = relevance.clone()
    wrong[2, 4] = value
    for diversity in (0.0, 0.5):
        with pytest.raises(ValueError, match=r"relevance\[2, 4\] must be a finite number, .*, got (nan|inf)"):
            ops.dpp_greedy(features, wrong, 2, diversity=diversity)
    # What is no candidate may hold anything.
    mask = torch.isfinite(wrong)
    assert ops.dpp_greedy(features, wrong, 5, mask=mask).count.tolist() == [5, 5, 4]


@pytest.mark.parametrize("seed", range(12))
def test_each_pick_has_the_greatest_determinant(seed):
    items, width, gamma, weight = 4 + seed % 7, 6, (0.0, 0.2)[seed % 2], (0.0, 1.0, 3.0)[seed % 3]
    features, relevance = make("random", 1, items, width, seed, torch.float64)
    k = min(items, width)
    answer = ops.dpp_greedy(features, relevance, k, alpha=weight / 2, gamma=gamma)
    picks = answer.indices[0].tolist()
    for n in range(k):
        wanted = log_det(features[0], relevance[0], weight, gamma, picks[: n + 1])
        for other in set(range(items)) - set(picks[:n]):
            assert log_det(features[0], relevance[0], weight, gamma, [*picks[:n], other]) <= wanted + 1e-10
        assert float(answer.gains[0, : n + 1].sum()) == pytest.approx(wanted, abs=1e-9)
    # Greedy is within (1 - 1/e) of the best only up to monotonicity; but it can never beat the best.
    best = max(log_det(features[0], relevance[0], weight, gamma, y) for y in itertools.combinations(range(items), k))
    assert float(answer.log_det[0]) <= best + 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [1, 2, 4])
def test_window_equals_brute_force(seed, window):
    features, relevance = make("clustered", 1, 10, 6, seed, torch.float64)
    answer = ops.dpp_greedy(features, relevance, 9, alpha=0.5, window=window)
    picks = answer.indices[0].tolist()
    for n in range(9):
        seen = picks[max(0, n - window + 1) : n]
        before = log_det(features[0], relevance[0], 1.0, 0.0, seen) if seen else 0.0
        gains = {
            i: log_det(features[0], relevance[0], 1.0, 0.0, [*seen, i]) - before
            for i in set(range(10)) - set(picks[:n])
        }
        assert gains[picks[n]] == pytest.approx(max(gains.values()), abs=1e-8)
        assert float(answer.gains[0, n]) == pytest.approx(gains[picks[n]], abs=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_shown_items_are_a_seed(seed):
    features, relevance = make("random", 1, 10, 8, seed, torch.float64)
    shown = [3, 7]
    answer = ops.dpp_greedy(features, relevance, 4, alpha=0.5, shown=torch.tensor([[3, -1, 7, 3]]))
    picks = answer.indices[0].tolist()
    assert not set(picks) & set(shown)
    for n in range(4):
        so_far = shown + picks[:n]
        best = max(
            set(range(10)) - set(so_far), key=lambda i: log_det(features[0], relevance[0], 1.0, 0.0, [*so_far, i])
        )
        assert picks[n] == best
    conditional = log_det(features[0], relevance[0], 1.0, 0.0, shown + picks) - log_det(
        features[0], relevance[0], 1.0, 0.0, shown
    )
    assert float(answer.log_det[0]) == pytest.approx(conditional, abs=1e-9)


def test_gains_never_rise_and_add_up():
    features, relevance = make("clustered", 4, 300, 32, 1)
    weight = torch.tensor([0.0, 0.5, 2.0, 10.0])
    answer = ops.dpp_greedy(features, relevance, 30, alpha=weight / 2, gamma=0.1)
    # Each gain carries the rounding of float64 sums; 1e-10 is far above it.
    assert torch.all(answer.gains[:, 1:] <= answer.gains[:, :-1] + 1e-10)
    for user in range(4):
        wanted = log_det(features[user], relevance[user], float(weight[user]), 0.1, answer.indices[user].tolist())
        assert float(answer.log_det[user]) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_picks_than_the_rank(dtype):
    features, relevance = make("low rank", 3, 120, 24, 2, dtype)
    rank = 9
    stopped = ops.dpp_greedy(features, relevance, 30, alpha=0.5, exhausted="stop")
    assert stopped.count.tolist() == [rank] * 3
    assert torch.all(stopped.indices[:, rank:] == -1)
    filled = ops.dpp_greedy(features, relevance, 30, alpha=0.5)
    again = ops.dpp_greedy(features, relevance, 30, alpha=0.5, exhausted="restart")
    for user in range(3):
        picks = filled.indices[user].tolist()
        assert picks[:rank] == stopped.indices[user, :rank].tolist()
        rest = [i for i in relevance[user].argsort(descending=True, stable=True).tolist() if i not in picks[:rank]]
        assert picks[rank:] == rest[: 30 - rank]
        # A restart is the first call over again on what is left.
        mask = torch.ones(1, 120, dtype=torch.bool)
        mask[0, picks[:rank]] = False
        second = ops.dpp_greedy(features[user : user + 1], relevance[user : user + 1], rank, alpha=0.5, mask=mask)
        assert again.indices[user, : 2 * rank].tolist() == picks[:rank] + second.indices[0].tolist()
    assert torch.all(filled.gains[:, rank:] == -math.inf)
    assert torch.all(again.gains > -math.inf)


def test_zero_rows_come_last():
    features, relevance = make("random", 1, 8, 8, 3)
    features[0, 2] = 0
    relevance[0, 2] = 5.0
    for policy in ("relevance", "restart"):
        assert ops.dpp_greedy(features, relevance, 8, exhausted=policy).indices[0, -1] == 2
    assert ops.dpp_greedy(features, relevance, 8, exhausted="stop").count.tolist() == [7]
    nothing = ops.dpp_greedy(torch.zeros(1, 3, 4), torch.tensor([[1.0, 3.0, 2.0]]), 3, exhausted="restart")
    assert nothing.indices.tolist() == [[1, 2, 0]]


def test_few_candidates():
    features, relevance = make("random", 3, 70, 6, 4)
    answer = ops.dpp_greedy(features, relevance, 5, lengths=torch.tensor([70, 2, 0], dtype=torch.int32))
    assert answer.count.tolist() == [5, 2, 0]
    assert answer.indices[1, 2:].tolist() == [-1, -1, -1]
    assert answer.indices[2].tolist() == [-1] * 5
    assert answer.log_det[2] == 0
    assert ops.dpp_greedy(features, relevance, 5, mask=torch.zeros(3, 70, dtype=torch.bool)).count.tolist() == [0] * 3
    empty = ops.dpp_greedy(torch.zeros(2, 0, 4), torch.zeros(2, 0), 3)
    assert empty.indices.tolist() == [[-1] * 3] * 2
    assert ops.dpp_greedy(torch.zeros(2, 3, 0), torch.ones(2, 3), 2).indices.tolist() == [[0, 1]] * 2
    assert ops.dpp_greedy(torch.zeros(0, 3, 4), torch.zeros(0, 3), 2).indices.shape == (0, 2)


def test_alone_or_in_a_batch_with_any_threads():
    features, relevance = make("clustered", 17, 210, 12, 5)
    diversity = torch.linspace(0, 1, 17)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(ops.dpp_greedy(features, relevance, 20, diversity=diversity, gamma=0.05))
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, answers[0], strict=True))
    for user in range(17):
        part = slice(user, user + 1)
        alone = ops.dpp_greedy(features[part], relevance[part], 20, diversity=float(diversity[user]), gamma=0.05)
        assert torch.equal(alone.indices[0], answers[0].indices[user])
        assert torch.equal(alone.gains[0], answers[0].gains[user])


def test_shared_features():
    features, relevance = make("random", 1, 90, 8, 6)
    relevance = torch.randn(5, 90, generator=torch.Generator().manual_seed(6))
    shared = ops.dpp_greedy(features[0], relevance, 12, diversity=0.4)
    given_each = ops.dpp_greedy(features.expand(5, -1, -1), relevance, 12, diversity=0.4)
    assert all(torch.equal(a, b) for a, b in zip(shared, given_each, strict=True))


def test_ties_go_to_the_lowest_index():
    # Every pair is at the same angle and every relevance is the same: nothing but the index tells items apart.
    # (Rows made unit in float32 differ in norm by 1e-8, which is an answer, not a tie; in float64 by less than 1e-12.)
    features = normalize((torch.eye(40) + 0.3).double(), dim=-1)
    for alpha in (0.0, 1.0):
        answer = ops.dpp_greedy(features, torch.ones(1, 40), 20, alpha=alpha)
        assert answer.indices[0].tolist() == list(range(20))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e18])
def test_scale_of_the_features_does_not_matter(scale):
    features, relevance = make("clustered", 2, 100, 8, 7)
    wanted = ops.dpp_greedy(features.double(), relevance, 20, diversity=0.6)
    # A power of two would be exact; these are not, so ask float64 to hold them.
    answer = ops.dpp_greedy(features.double() * scale, relevance, 20, diversity=0.6)
    assert torch.equal(answer.indices, wanted.indices)


def test_fast_selection_is_nearly_greedy():
    features, relevance = make("random", 4, 300, 16, 8)
    fast = ops.dpp_greedy(features, relevance, 12, alpha=0.5, gamma=0.1, exact=False)
    exact = ops.dpp_greedy(features, relevance, 12, alpha=0.5, gamma=0.1)
    # float32 is off by the slack of dpp_greedy.h over a share of at least gamma: 2 (D + 4) sqrt(k) 2^-24 / 0.1 a pick.
    torch.testing.assert_close(fast.log_det, exact.log_det, rtol=0, atol=12 * 8e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_large_problem(alpha):
    features, relevance = make("clustered", 2, 1500, 48, 9)
    assert_same(
        ops.dpp_greedy(features, relevance, 40, alpha=alpha),
        ops.dpp_greedy.reference(features, relevance, 40, alpha=alpha),
    )


def scratch_bytes(items, width, k, gamma=0.0, window=0):
    shape = _C.DppShape(1, items, width, k, 0, False, window, gamma, 1e-10, 0, True, 0, 0, False)
    return shape.scratch()


def test_memory_grows_with_neither_items_squared_nor_items_times_picks():
    items, width = 100_000, 64
    for gamma in (0.0, 0.1):
        few = scratch_bytes(items, width, 10, gamma)
        many = scratch_bytes(items, width, 500, gamma)
        # Codes of the rows, a byte a value, and some ninety bytes an item; the picks' directions.
        assert few < items * (width + 90) + 100_000
        assert many - few < 500 * 12 * (width + 520)
        assert scratch_bytes(items, width, 500, gamma, window=10) - few < 100_000 + 16 * items / 64


def test_fewer_users_than_threads():
    """A team may number its threads beyond the users; the scratch memory must reach that far."""
    generator = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(2, 2000, 32, generator=generator), dim=2)
    relevance = torch.randn(2, 2000, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = ops.dpp_greedy(features, relevance, 40, diversity=0.5)
        torch.set_num_threads(8)
        for _ in range(20):
            found = ops.dpp_greedy(features, relevance, 40, diversity=0.5)
            assert torch.equal(found.indices, wanted.indices)
    finally:
        torch.set_num_threads(threads)


def any_way(*arguments, isa_levels, **options):
    """The answers of every instruction set with one and three threads."""
    threads = torch.get_num_threads()
    try:
        for _ in isa_levels():
            for count in (1, 3):
                torch.set_num_threads(count)
                yield ops.dpp_greedy(*arguments, **options)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("exact", [True, False])
def test_one_large_user_by_many_threads(exact, window, isa_levels):
    features, relevance = make("clustered", 1, 5000, 56, 11)
    answers = list(
        any_way(features, relevance, 12, alpha=0.25, gamma=0.05, exact=exact, window=window, isa_levels=isa_levels)
    )
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, answers[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_of_a_table(dtype, isa_levels):
    generator = torch.Generator().manual_seed(12)
    table = normalize(torch.randn(500, 40, generator=generator), dim=-1).to(dtype)
    rows = torch.stack([torch.randperm(500, generator=generator)[:150] for _ in range(5)])
    relevance = torch.randn(5, 150, generator=generator)
    wanted = ops.dpp_greedy(table[rows], relevance, 20, diversity=0.6)
    for answer in any_way(table, relevance, 20, candidates=rows.int(), diversity=0.6, isa_levels=isa_levels):
        assert_same(answer, wanted)
    shown = torch.stack([rows[:, 3], rows[:, 60], torch.tensor([-1, 0, 1, 2, 3])], dim=1)
    answer = ops.dpp_greedy(table, relevance, 20, candidates=rows, shown=shown, diversity=0.6)
    picked = rows.gather(1, answer.indices)
    assert not (picked[:, :, None] == shown[:, None]).any()
    # -1 is no candidate, and what the table holds elsewhere is not read.
    rows[:, ::2] = -1
    used = torch.zeros(500, dtype=torch.bool)
    used[rows[rows >= 0]] = True
    table[~used] = math.nan
    answer = ops.dpp_greedy(table, relevance, 100, candidates=rows)
    assert answer.count.tolist() == [75] * 5
    table[int(rows[2, 7]), 5] = math.inf
    with pytest.raises(ValueError, match=rf"features\[{int(rows[2, 7])}, 5\] must be a finite number .*, got inf"):
        ops.dpp_greedy(table, relevance, 3, candidates=rows)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"candidates": torch.tensor([[0, 4]])}, IndexError, r"candidates\[0, 1\] = 4 is outside \[0, 4\)"),
        ({"candidates": torch.tensor([[-2, 1]])}, IndexError, r"candidates\[0, 0\] = -2 is outside \[0, 4\)"),
        ({"candidates": torch.tensor([[0]])}, ValueError, r"candidates must have shape \[1, 2\], got \[1, 1\]"),
        ({"candidates": torch.ones(1, 2)}, TypeError, "candidates must be int32 or int64, got float32"),
        ({"features": torch.ones(1, 2, 3)}, ValueError, r"features must have shape \[T, D\], got \[1, 2, 3\]"),
        ({"shown": torch.tensor([[4]])}, IndexError, r"shown\[0, 0\] = 4 is outside \[0, 4\)"),
        ({"features": torch.ones(0, 3)}, IndexError, r"candidates\[0, 0\] = 0 is outside \[0, 0\)"),
        ({"epsilon": 0.0}, ValueError, r"epsilon must be in \(0, 1\], got 0.0"),
        ({"epsilon": math.nan}, ValueError, r"epsilon must be in \(0, 1\], got nan"),
        ({"features": torch.ones(4, 65537)}, ValueError, "features must have at most 65536 columns, got 65537"),
    ],
)
def test_rejects_bad_candidates(change, error, sentence):
    arguments = {"features": torch.ones(4, 3), "candidates": torch.tensor([[0, 3]]), "relevance": torch.ones(1, 2)}
    with pytest.raises(error, match=sentence):
        ops.dpp_greedy(k=1, **arguments | change)


def test_epsilon_is_a_share_of_the_items_own():
    # Items at 30 degrees to each other: the second keeps sin^2 = 1/4 of its norm, however long it is.
    features = torch.tensor([[[3.0, 0.0], [math.sqrt(3) / 200, 1 / 200]]], dtype=torch.float64)
    for epsilon, count in ((0.24, 2), (0.26, 1)):
        answer = ops.dpp_greedy(features, torch.zeros(1, 2), 2, epsilon=epsilon, exhausted="stop", diversity=1)
        assert answer.count.tolist() == [count]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_long_list_in_a_window(alpha, isa_levels):
    """Long enough for panels and rotations to be made afresh several times."""
    features, relevance = make("clustered", 1, 400, 16, 13)
    for gamma in (0.0, 0.1):
        wanted = ops.dpp_greedy.reference(features, relevance, 250, alpha=alpha, gamma=gamma, window=7)
        for _ in isa_levels():
            assert_same(ops.dpp_greedy(features, relevance, 250, alpha=alpha, gamma=gamma, window=7), wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_rows_with_one_great_value(alpha, isa_levels):
    """Codes of 8 bits say little about such rows; the answer is exact all the same."""
    features, relevance = make("random", 1, 300, 24, 14)
    features[..., 3] = 40.0
    features[..., 4] *= 1e-30
    wanted = ops.dpp_greedy.reference(features, relevance, 20, alpha=alpha)
    for answer in any_way(features, relevance, 20, alpha=alpha, isa_levels=isa_levels):
        assert_same(answer, wanted)


def test_fast_gains_are_nearly_the_greatest():
    features, relevance = make("clustered", 1, 300, 16, 15)
    answer = ops.dpp_greedy(features, relevance, 12, alpha=0.0, gamma=0.1, exact=False)
    picks = answer.indices[0].tolist()
    for n in range(12):
        seen = torch.tensor([picks[:n]], dtype=torch.int64)
        best = ops.dpp_greedy(features, relevance, 1, alpha=0.0, gamma=0.1, shown=seen)
        assert float(answer.gains[0, n]) >= float(best.gains[0, 0]) - 5e-5


def test_order_of_the_candidates_does_not_matter():
    """Laziness depends on it; the answer does not."""
    features, relevance = make("random", 1, 700, 32, 16)
    order = relevance[0].argsort(descending=True)
    plain = ops.dpp_greedy(features, relevance, 40, alpha=0.5)
    sorted_ = ops.dpp_greedy(features[:, order], relevance[:, order], 40, alpha=0.5)
    assert torch.equal(order[sorted_.indices[0]], plain.indices[0])
    assert torch.equal(sorted_.gains, plain.gains)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 20.0), (torch.float64, 170.0)])
def test_norms_that_make_up_for_relevance(dtype, largest, isa_levels):
    """Relevance and the logarithm of the norm cancel: what rounding either takes away is much of what is left."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        size = largest * torch.rand(400, 1, generator=generator, dtype=torch.float64)
        rows = normalize(torch.randn(400, 24, generator=generator, dtype=torch.float64), dim=-1) * size.exp()
        rows = rows.to(dtype)
        relevance = 1e-5 * torch.rand(1, 400, generator=generator) - rows.double().square().sum(1).log()
        wanted = ops.dpp_greedy.reference(rows, relevance, 3, alpha=0.5)
        for _ in isa_levels():
            assert_same(ops.dpp_greedy(rows, relevance, 3, alpha=0.5), wanted)


@pytest.mark.parametrize("gamma", [0.0, 0.1])
@pytest.mark.parametrize("step", [1, 2])
def test_norms_that_float64_does_not_hold_are_none(step, gamma, isa_levels):
    features, relevance = make("random", 1, 9, 4, 18, torch.float64)
    features[:, ::step] *= 1e-157
    wanted = ops.dpp_greedy.reference(features, relevance, 9, gamma=gamma)
    for answer in any_way(features, relevance, 9, gamma=gamma, isa_levels=isa_levels):
        assert_same(answer, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_what_was_shown_must_be_finite(value):
    table, relevance = make("random", 1, 7, 3, 19, torch.float64)
    table, candidates = table[0], torch.tensor([[0, 1, 2, 3]])
    table[5, 0] = value
    with pytest.raises(ValueError, match=r"features\[5, 0\] must be a finite number with a finite squared norm, got"):
        ops.dpp_greedy(table, relevance[:, :4], 2, candidates=candidates, shown=torch.tensor([[-1, 4, 5]]))
    # What is neither is not read.
    ops.dpp_greedy(table, relevance[:, :4], 2, candidates=candidates, shown=torch.tensor([[-1, 4, 6]]))
    with pytest.raises(
        ValueError, match=r"features\[0, 5, 0\] must be a finite number with a finite squared norm, got"
    ):
        ops.dpp_greedy(table[None], relevance, 2)
