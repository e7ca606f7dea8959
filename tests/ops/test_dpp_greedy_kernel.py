"""The five tests of dpp_greedy_kernel, then what makes it one with dpp_greedy, and matrices that are no kernels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from recfast import ops
from recfast.ops._library import REGISTRY

POLICIES = ("relevance", "stop", "restart")


def make(kind: str, users: int, items: int, seed: int, dtype=torch.float64):
    """Similarities and relevance of a kind that is hard in its own way."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(users, items, 5, generator=generator, dtype=torch.float64)
    if kind == "duplicates":
        rows = rows[:, torch.randint(0, 1 + items // 3, (items,), generator=generator)]
    if kind == "dot":
        rows = normalize(rows, dim=-1)
        similarity = rows @ rows.mT
    else:
        similarity = torch.exp(-0.25 * torch.cdist(rows, rows).square())
        similarity = 0.5 * (similarity + similarity.mT)
    return similarity.to(dtype), torch.randn(users, items, generator=generator)


@given(
    kind=st.sampled_from(["gaussian", "duplicates", "dot"]),
    users=st.integers(0, 3),
    items=st.one_of(st.sampled_from([0, 1, 16, 17]), st.integers(0, 60)),
    k=st.integers(0, 12),
    alpha=st.sampled_from([0.0, 0.25, 1.0, 40.0, math.inf]),
    gamma=st.sampled_from([0.0, 0.05, 1.0]),
    policy=st.sampled_from(POLICIES),
    window=st.sampled_from([None, None, 1, 2, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_matches_reference(
    kind, users, items, k, alpha, gamma, policy, window, dtype, seed, isa_levels, poisoned_empty
):
    similarity, relevance = make(kind, users, items, seed, dtype)
    # Far from what rounding leaves of duplicates, which is about 1e-16 (float32: 1e-7) over the shares of the picks.
    options = {"alpha": alpha, "gamma": gamma, "exhausted": policy, "window": window, "epsilon": 1e-3}
    generator = torch.Generator().manual_seed(seed)
    if seed % 3 == 0:
        options["lengths"] = torch.randint(0, items + 1, (users,), generator=generator)
    if seed % 4 == 0:
        options["mask"] = torch.rand(users, items, generator=generator) < 0.5
    if seed % 5 == 0 and items:
        options["shown"] = torch.randint(-1, items, (users, 3), generator=generator)
    wanted = ops.dpp_greedy_kernel.reference(similarity, relevance, k, **options)
    for _ in isa_levels():
        answer = ops.dpp_greedy_kernel(similarity, relevance, k, **options)
        assert torch.equal(answer.indices, wanted.indices)
        assert torch.equal(answer.count, wanted.count)
        # Float64's rounding over a share of 1e-3, by 12 picks.
        torch.testing.assert_close(answer.gains, wanted.gains, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(answer.log_det, wanted.log_det, rtol=1e-9, atol=1e-9)


def test_known_values():
    similarity = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.1], [0.0, 0.1, 1.0]], dtype=torch.float64)
    relevance = torch.tensor([[3.0, 2.5, 2.0]])
    answer = ops.dpp_greedy_kernel(similarity, relevance, 3, alpha=0.5)
    # Second pick: item 1: 2.5 + log 0.19 = 0.839; item 2: 2 + log 1 = 2.
    assert answer.indices.tolist() == [[0, 2, 1]]
    assert answer.gains[0].tolist() == pytest.approx([3.0, 2.0, 2.5 + math.log(1 - 0.81 - 0.01)])
    assert answer.log_det.tolist() == pytest.approx([7.5 + math.log(0.18)])
    assert ops.dpp_greedy_kernel(similarity, relevance, 2, diversity=0).indices.tolist() == [[0, 1]]


def test_gradcheck():
    """Inference only: an input that asks for a gradient gets a result without one."""
    similarity, relevance = make("gaussian", 2, 9, 0)
    answer = ops.dpp_greedy_kernel(similarity.requires_grad_(), relevance.requires_grad_(), 3)
    assert not any(value.requires_grad for value in answer)


def test_opcheck(opcheck):
    opcheck(REGISTRY["dpp_greedy_kernel"])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"similarity": [[1.0]]}, TypeError, "dpp_greedy_kernel: similarity must be a tensor, got list"),
        ({"similarity": torch.ones(2, 3, 3).half()}, TypeError, "must be float32 or float64, got float16"),
        ({"similarity": torch.ones(2, 3, 4)}, ValueError, r"must have shape \[2, 3, 3\], got \[2, 3, 4\]"),
        ({"similarity": torch.ones(2, 2)}, ValueError, r"must have shape \[3, 3\], got \[2, 2\]"),
        ({"relevance": torch.ones(3)}, ValueError, r"relevance must have shape \[U, N\], got \[3\]"),
        ({"relevance": torch.full((2, 3), math.nan)}, ValueError, r"relevance\[0, 0\] must be a finite number"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({"diversity": 1.25}, ValueError, r"dpp_greedy_kernel: diversity must be in \[0, 1\], got 1.25"),
        ({"lengths": torch.tensor([1, 4])}, IndexError, r"lengths\[1\] = 4 is outside \[0, 4\)"),
        ({"shown": torch.tensor([[0], [3]])}, IndexError, r"shown\[1, 0\] = 3 is outside \[0, 3\)"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"epsilon": 2.0}, ValueError, r"epsilon must be in \(0, 1\], got 2.0"),
        ({"exhausted": "noise"}, ValueError, "exhausted must be one of relevance, stop, restart, got 'noise'"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {"similarity": torch.eye(3).expand(2, 3, 3), "relevance": torch.ones(2, 3), "k": 2} | change
    with pytest.raises(error, match=sentence):
        ops.dpp_greedy_kernel(**arguments)


def test_says_what_is_no_kernel():
    relevance = torch.tensor([[3.0, 2.0, 1.0]])

    def of(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    with pytest.raises(ValueError, match=r"similarity\[0, 2\] must be a finite number, got nan"):
        ops.dpp_greedy_kernel(of([1, 0, math.nan], [0, 1, 0], [math.nan, 0, 1]), relevance, 2)
    with pytest.raises(ValueError, match=r"similarity\[0, 1, 1\] must be a finite number, got inf"):
        ops.dpp_greedy_kernel(of([1, 0, 0], [0, math.inf, 0], [0, 0, 1])[None], relevance, 2, alpha=1.0)
    with pytest.raises(ValueError, match=r"similarity\[1, 1\] must be at least 0, being on the diagonal, got -1.0"):
        ops.dpp_greedy_kernel(of([1, 0, 0], [0, -1, 0], [0, 0, 1]), relevance, 2)
    with pytest.raises(ValueError, match=r"must be symmetric, got similarity\[0, 1\] = 0.5, similarity\[1, 0\] = 0.2"):
        ops.dpp_greedy_kernel(of([1, 0.5, 0], [0.2, 1, 0], [0, 0, 1]), relevance, 2)
    # Each pair is fine, but not the three: cosines of 0.9, 0.9 and -0.9 cannot be.
    with pytest.raises(
        ValueError, match="must be positive semidefinite, got a negative determinant for user 0 when item"
    ):
        ops.dpp_greedy_kernel(of([1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]), relevance, 3)
    # What is no candidate may hold anything.
    mask = torch.tensor([[True, True, False]])
    matrix = of([1, 0.5, math.nan], [0.5, 1, 7], [math.inf, 3, -1])
    assert ops.dpp_greedy_kernel(matrix, relevance, 3, mask=mask).indices.tolist() == [[0, 1, -1]]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_dpp_greedy_on_dot_products(policy, window):
    generator = torch.Generator().manual_seed(1)
    rows = normalize(torch.randn(3, 80, 8, generator=generator, dtype=torch.float64), dim=-1)
    relevance = torch.randn(3, 80, generator=generator)
    for gamma in (0.0, 0.1):
        options = {"alpha": 0.5, "gamma": gamma, "exhausted": policy, "window": window}
        by_rows = ops.dpp_greedy(rows, relevance, 20, **options)
        by_matrix = ops.dpp_greedy_kernel(rows @ rows.mT, relevance, 20, **options)
        assert torch.equal(by_rows.indices, by_matrix.indices)
        assert torch.equal(by_rows.count, by_matrix.count)
        torch.testing.assert_close(by_rows.gains, by_matrix.gains, rtol=1e-9, atol=1e-9)


def test_each_pick_has_the_greatest_determinant():
    similarity, relevance = make("gaussian", 1, 10, 3)
    picks = ops.dpp_greedy_kernel(similarity, relevance, 6, alpha=0.5).indices[0].tolist()

    def value(chosen):
        matrix = similarity[0][chosen][:, chosen].numpy()
        return np.linalg.slogdet(matrix)[1] + float(relevance[0, chosen].sum())

    for n in range(6):
        others = set(range(10)) - set(picks[:n])
        assert picks[n] == max(others, key=lambda item: value([*picks[:n], item]))


def test_threads_and_batch():
    similarity, relevance = make("gaussian", 9, 50, 4)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 3):
            torch.set_num_threads(count)
            answers.append(ops.dpp_greedy_kernel(similarity, relevance, 12))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    alone = ops.dpp_greedy_kernel(similarity[5], relevance[5:6], 12)
    assert torch.equal(alone.indices[0], answers[0].indices[5])
    assert torch.equal(alone.gains[0], answers[0].gains[5])
