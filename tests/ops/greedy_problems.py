"""What the tests of mmr_greedy, msd_greedy, ssd_greedy and xquad_greedy share."""

import math

import pytest
import torch
from hypothesis import strategies as st
from torch.nn.functional import normalize

KINDS = ("random", "clustered", "duplicates", "ties", "zeros", "long")


def make(kind, users, items, width, seed, dtype=torch.float32):
    """Features and relevance of a kind that is hard in its own way."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(users, items, width, generator=generator, dtype=torch.float64)
    relevance = torch.randn(users, items, generator=generator, dtype=torch.float64)
    if kind == "clustered":
        centres = torch.randn(users, 1 + items // 8, width, generator=generator, dtype=torch.float64)
        rows = 0.05 * rows + centres[:, torch.arange(items) % centres.shape[1]]
    elif kind == "duplicates":
        rows = rows[:, torch.randint(0, 1 + items // 3, (items,), generator=generator)]
    elif kind == "ties":
        # Few distinct rows and few distinct grades: most scores are equal, some to all bits and some but for rounding.
        rows = (rows > 0.5).double()
        relevance = relevance.round()
    elif kind == "zeros":
        rows[:, ::2] = 0.0
    if kind == "long":
        # No unit norms, and grades of a size of their own.
        return (30 * rows).to(dtype), 1e3 + relevance
    return normalize(rows, dim=-1).to(dtype), relevance.to(torch.float32)


def topics(kind, users, items, width, seed, dtype=torch.float32):
    """Rows in [0, 1]."""
    rows, relevance = make(kind, users, items, width, seed, torch.float64)
    return (rows.abs() / rows.abs().amax().clamp(min=1e-30) if rows.numel() else rows).to(dtype), relevance


problems = {
    "kind": st.sampled_from(KINDS),
    "users": st.integers(0, 3),
    "items": st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 129]), st.integers(0, 200)),
    "width": st.one_of(st.sampled_from([0, 1, 15, 16, 17]), st.integers(1, 24)),
    "k": st.integers(0, 30),
    "diversity": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    "window": st.sampled_from([None, None, 1, 2, 5, 12]),
    "gathered": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    "seed": st.integers(0, 10**6),
}


def options_of(users, items, rows, gathered, seed):
    """Candidates, lengths, mask and shown items; `rows` is [U, N, D], of which the first user's are the table."""
    generator = torch.Generator().manual_seed(seed)
    options = {}
    if gathered and users and items:
        rows = rows[0]
        options["candidates"] = torch.randint(-1, items, (users, items), generator=generator)
    elif seed % 7 == 0 and users:
        rows = rows[0]
    if seed % 3 == 0:
        options["lengths"] = torch.randint(0, items + 1, (users,), generator=generator)
    if seed % 4 == 0:
        options["mask"] = torch.rand(users, items, generator=generator) < 0.5
    if seed % 5 == 0 and items:
        options["shown"] = torch.randint(-1, items, (users, 3), generator=generator, dtype=torch.int32)
    return rows, options


def assert_same(answer, wanted):
    assert torch.equal(answer.indices, wanted.indices)
    assert torch.equal(answer.count, wanted.count)
    # Both are float64 sums of at most some thirty terms of size up to some thousands, with dot products of 24.
    torch.testing.assert_close(answer.gains, wanted.gains, rtol=1e-11, atol=1e-11)


def brute_force(scores, relevance, k, d, *, shown=(), window=None, first_by_relevance=True):
    """The list of one user by a score written out: `scores(item, seen)`."""
    seen, picks, gains = list(shown), [], []
    for _ in range(min(k, len(relevance) - len(set(shown)))):
        free = [i for i in range(len(relevance)) if i not in picks and i not in shown]
        within = seen if window is None else seen[len(seen) - min(window - 1, len(seen)) :]
        blind = d == 0 or (first_by_relevance and not within)
        worth = [float(relevance[i]) if blind else scores(i, within) for i in free]
        best = max(worth)
        item = next(i for i, value in zip(free, worth, strict=True) if value >= best - 1e-12)
        picks.append(item)
        gains.append(scores(item, within))
        seen.append(item)
    return picks, gains


def common_rejections(name):
    """(change, error, sentence) of what all four ops refuse; `name` is what they call their rows."""
    table = {name: torch.ones(5, 4), "candidates": torch.zeros(2, 3, dtype=torch.int64)}
    return [
        ({name: [[1.0]]}, TypeError, f"{name} must be a tensor, got list"),
        ({name: torch.ones(2, 3, 4).int()}, TypeError, f"{name} must be float32 or float64 or bfloat16 or float16"),
        ({name: torch.ones(2, 4, 4)}, ValueError, rf"{name} must have shape \[2, 3, D\], got \[2, 4, 4\]"),
        ({name: torch.ones(2, 4)}, ValueError, rf"{name} must have shape \[3, D\], got \[2, 4\]"),
        ({"relevance": torch.ones(3)}, ValueError, r"relevance must have shape \[U, N\], got \[3\]"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"diversity": 1.25}, ValueError, r"diversity must be in \[0, 1\], got 1.25"),
        ({"diversity": torch.tensor([0.5, math.nan])}, ValueError, r"diversity\[1\] must be in \[0, 1\], got nan"),
        ({"diversity": torch.ones(3)}, ValueError, r"diversity must be a number or have shape \[2\], got \[3\]"),
        ({"lengths": torch.tensor([1, 4])}, IndexError, r"lengths\[1\] = 4 is outside \[0, 4\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got float32"),
        ({"shown": torch.tensor([[0], [3]])}, IndexError, r"shown\[1, 0\] = 3 is outside \[0, 3\)"),
        ({"shown": torch.tensor([[0], [-2]])}, IndexError, r"shown\[1, 0\] = -2 is outside \[0, 3\)"),
        ({**table, "shown": torch.tensor([[0], [5]])}, IndexError, r"shown\[1, 0\] = 5 is outside \[0, 5\)"),
        ({**table, "candidates": torch.full((2, 3), 5)}, IndexError, r"candidates\[0, 0\] = 5 is outside \[0, 5\)"),
        ({**table, "candidates": torch.full((2, 3), -2)}, IndexError, r"candidates\[0, 0\] = -2 is outside \[0, 5\)"),
        ({"candidates": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, rf"{name} must have shape \[T, D\]"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    ]


def assert_refuses_what_is_not_finite(op, name, rows, relevance):
    """A candidate's NaN or infinity is named; what is no candidate may hold anything."""
    users, items, _ = rows.shape
    assert users == 3
    assert items == 5
    for value in (math.nan, math.inf):
        for d in (0.0, 0.5):
            wrong = rows.clone()
            wrong[1, 2, 3] = wrong[2, 0, 0] = value
            with pytest.raises(ValueError, match=rf"{name}\[1, 2, 3\] must be .*, got (nan|inf)"):
                op(wrong, relevance, 2, diversity=d)
            with pytest.raises(ValueError, match=rf"{name}\[2, 3\] must be .*, got (nan|inf)"):
                op(wrong[1], relevance, 2, diversity=d)
            ids = torch.tensor([[0, 1, 3, 4, -1], [0, 1, 3, 2, 2], [0, 0, 0, 0, 0]])
            with pytest.raises(ValueError, match=rf"{name}\[2, 3\] must be .*, got (nan|inf)"):
                op(wrong[1], relevance, 2, diversity=d, candidates=ids)
            with pytest.raises(ValueError, match=rf"{name}\[2, 3\] must be .*, got (nan|inf)"):
                op(wrong[1], relevance, 2, diversity=d, candidates=ids[[0, 0, 2]], shown=torch.tensor([[1], [2], [0]]))
            grades = relevance.clone()
            grades[2, 4] = value
            with pytest.raises(ValueError, match=r"relevance\[2, 4\] must be finite .*, got (nan|inf)"):
                op(rows, grades, 2, diversity=d)
            mask = torch.isfinite(wrong).all(2) & torch.isfinite(grades)
            assert op(wrong, grades, 5, mask=mask, diversity=d).count.tolist() == [5, 4, 3]
            assert op(wrong, grades, 5, lengths=torch.tensor([5, 2, 0]), diversity=d).count.tolist() == [5, 2, 0]


def assert_same_alone_or_in_a_batch(op, rows, relevance, **options):
    """One thread or many, alone or in a batch, shared or given to each."""
    users = len(relevance)
    diversity = torch.linspace(0, 1, users)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(op(rows, relevance, 20, diversity=diversity, **options))
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, answers[0], strict=True))
    for user in range(users):
        part = slice(user, user + 1)
        alone = op(rows[part], relevance[part], 20, diversity=float(diversity[user]), **options)
        assert torch.equal(alone.indices[0], answers[0].indices[user])
        assert torch.equal(alone.gains[0], answers[0].gains[user])
    shared = op(rows[0], relevance, 20, diversity=diversity, **options)
    each = op(rows[:1].expand_as(rows), relevance, 20, diversity=diversity, **options)
    assert all(torch.equal(a, b) for a, b in zip(shared, each, strict=True))
    ids = torch.arange(relevance.shape[1]).expand_as(relevance)
    gathered = op(rows[0], relevance, 20, diversity=diversity, candidates=ids, **options)
    assert all(torch.equal(a, b) for a, b in zip(shared, gathered, strict=True))


def assert_few_candidates(op, rows, relevance):
    """rows [3, 70, D]"""
    answer = op(rows, relevance, 5, lengths=torch.tensor([70, 2, 0], dtype=torch.int32))
    assert answer.count.tolist() == [5, 2, 0]
    assert answer.indices[1, 2:].tolist() == [-1] * 3
    assert answer.indices[2].tolist() == [-1] * 5
    assert answer.gains[1, 2:].tolist() == [-math.inf] * 3
    assert op(rows, relevance, 5, mask=torch.zeros(3, 70, dtype=torch.bool)).count.tolist() == [0] * 3
    assert sorted(op(rows, relevance, 100).indices[0, :70].tolist()) == list(range(70))
    assert op(rows, relevance, 0).indices.shape == (3, 0)
    empty = op(torch.zeros(2, 0, 4), torch.zeros(2, 0), 3)
    assert empty.indices.tolist() == [[-1] * 3] * 2
    assert op(torch.zeros(0, 3, 4), torch.zeros(0, 3), 2).indices.shape == (0, 2)
    assert op(torch.zeros(2, 3, 0), torch.ones(2, 3), 2).indices.tolist() == [[0, 1]] * 2


def assert_diversity_0_is_relevance(op, rows, **options):
    # Grades closer than any tolerance are still in order.
    grades = torch.tensor([[0.0, 1e-30, 1.0, 1.0 + 2**-52, -1.0, 1e-30]], dtype=torch.float64)
    answer = op(rows[:1, :6], grades, 6, diversity=0, **options)
    assert answer.indices.tolist() == [[3, 2, 1, 5, 0, 4]]
    assert torch.equal(answer.gains[0], grades[0, answer.indices[0]])
