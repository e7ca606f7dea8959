"""The five tests of dpp_log_det, then what it has to do with dpp_greedy and what a second derivative is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from recfast import ops
from recfast.ops._library import REGISTRY


def make(lists, picks, width, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(lists, picks, width, generator=generator, dtype=dtype)
    return normalize(rows, dim=-1), torch.randn(lists, picks, generator=generator, dtype=dtype)


@given(
    lists=st.integers(0, 4),
    picks=st.one_of(st.sampled_from([0, 1, 7, 8, 9]), st.integers(0, 20)),
    width=st.one_of(st.sampled_from([1, 8, 31, 32, 33]), st.integers(1, 40)),
    gamma=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_matches_reference(lists, picks, width, gamma, dtype, seed, isa_levels, poisoned_empty):
    if gamma == 0:
        picks = min(picks, (width + 1) // 2)  # well away from singular; those that are have a test of their own
    features, relevance = make(lists, picks, width, seed, dtype)
    features, relevance = features.requires_grad_(), relevance.requires_grad_()
    options = {"alpha": 0.8, "gamma": gamma}
    if seed % 3 == 0:
        options["lengths"] = torch.randint(0, picks + 1, (lists,), generator=torch.Generator().manual_seed(seed))
    if seed % 4 == 0:
        options["mask"] = torch.rand(lists, picks, generator=torch.Generator().manual_seed(seed)) < 0.5
    wanted = ops.dpp_log_det.reference(features, relevance, **options)
    weight = torch.arange(1, lists + 1, dtype=dtype)
    gradients = torch.autograd.grad((wanted * weight).sum(), (features, relevance))
    # Both work in float64 and round once; the condition of S multiplies what float64 rounds.
    kernels = (1 - gamma) * features.detach().double() @ features.detach().double().mT + gamma * torch.eye(picks)
    condition = float(torch.linalg.cond(kernels).max()) if kernels.numel() else 1.0
    eps = 4 * torch.finfo(dtype).eps + 1e-15 * (picks + width) * condition
    for _ in isa_levels():
        answer = ops.dpp_log_det(features, relevance, **options)
        assert answer.dtype == dtype
        torch.testing.assert_close(answer, wanted, rtol=eps, atol=eps * (1 + picks))
        ours = torch.autograd.grad((answer * weight).sum(), (features, relevance))
        for mine, theirs in zip(ours, gradients, strict=True):
            scale = float(theirs.abs().max()) if theirs.numel() else 1.0
            torch.testing.assert_close(mine, theirs, rtol=eps, atol=eps * (1 + scale))
        with torch.no_grad():
            assert torch.equal(ops.dpp_log_det(features, relevance, **options), answer)


def test_known_values():
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)[None]
    relevance = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    assert float(ops.dpp_log_det(rows)) == pytest.approx(2 * math.log(0.8))
    assert float(ops.dpp_log_det(rows, relevance)) == pytest.approx(4 + 2 * math.log(0.8))
    assert float(ops.dpp_log_det(rows, relevance, alpha=0.25)) == pytest.approx(2 + 2 * math.log(0.8))
    # (1 - gamma)^2 times a cosine of 0.6: 1 - 0.25 * 0.36.
    assert float(ops.dpp_log_det(rows, gamma=0.5)) == pytest.approx(math.log(1 - 0.09))
    assert float(ops.dpp_log_det(rows, gamma=1.0)) == 0.0
    assert ops.dpp_log_det(rows, lengths=torch.tensor([1])).tolist() == [0.0]
    assert ops.dpp_log_det(rows, relevance, lengths=torch.tensor([0])).tolist() == [0.0]
    assert float(ops.dpp_log_det(rows, relevance, mask=torch.tensor([[False, True]]))) == pytest.approx(1.0)


@pytest.mark.parametrize("gamma", [0.0, 0.2])
@pytest.mark.parametrize("part", ["all", "lengths", "mask"])
def test_gradcheck(gamma, part):
    features, relevance = make(3, 4, 6, 0, torch.float64)
    alpha = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    options = {"gamma": gamma}
    if part == "lengths":
        options["lengths"] = torch.tensor([4, 2, 0])
    if part == "mask":
        options["mask"] = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])

    def call(f, r, a):
        return ops.dpp_log_det(f, r, alpha=a, **options)

    inputs = features.requires_grad_(), relevance.requires_grad_(), alpha
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_opcheck(opcheck):
    opcheck(REGISTRY["dpp_log_det"])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"features": [[1.0]]}, TypeError, "dpp_log_det: features must be a tensor, got list"),
        ({"features": torch.ones(2, 3, 4).half()}, TypeError, "features must be float32 or float64, got float16"),
        ({"features": torch.ones(3, 4)}, ValueError, r"features must have shape \[B, K, D\], got \[3, 4\]"),
        ({"relevance": torch.ones(2)}, ValueError, r"relevance must have shape \[2, 3\], got \[2\]"),
        ({"alpha": math.inf}, ValueError, "alpha must be finite, got inf"),
        ({"alpha": torch.ones(3)}, ValueError, r"alpha must be a number or have shape \[2\], got \[3\]"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({"lengths": torch.tensor([1, 4])}, IndexError, r"lengths\[1\] = 4 is outside \[0, 4\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got float32"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {"features": torch.ones(2, 3, 4), "relevance": torch.zeros(2, 3)} | change
    with pytest.raises(error, match=sentence):
        ops.dpp_log_det(arguments.pop("features"), arguments.pop("relevance"), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_lists(dtype):
    """-inf and no gradient; their neighbours are as they are alone."""
    features, _ = make(5, 4, 3, 1, dtype)
    features = torch.cat([features, torch.zeros(5, 4, 9, dtype=dtype)], dim=2)
    features[1] = make(1, 4, 12, 2, dtype)[0]
    features[2] = features[1]
    features[2, 3] = features[2, 0]
    features[3] = features[1]
    features[3, 2] = 0
    features[4, 2] = math.nan
    features.requires_grad_()
    mask = torch.ones(5, 4, dtype=torch.bool)
    answer = ops.dpp_log_det(features, mask=mask)
    finite = float(torch.linalg.slogdet((features[1] @ features[1].T).detach().double())[1])
    assert answer[1].item() == pytest.approx(finite, rel=1e-5)
    # Four rows of width 3, a duplicate, a zero row; a NaN goes through.
    assert answer[[0, 2, 3]].tolist() == [-math.inf] * 3
    assert math.isnan(answer[4].item())
    for twice in (False, True):
        (gradient,) = torch.autograd.grad(ops.dpp_log_det(features[:4]).sum(), features, create_graph=twice)
        assert (gradient[[0, 2, 3]] == 0).all()
        assert bool(gradient[1].abs().sum() > 0)
    # What is not in the list is not read.
    mask[4, 2] = mask[2, 3] = mask[3, 2] = False
    mask[0, 3] = False
    assert ops.dpp_log_det(features.detach(), mask=mask).isfinite().all()
    # With gamma nothing is singular, duplicates are log(gamma (2 - gamma)) for a pair of unit rows.
    pair = features[1:2, [0, 0]].detach()
    assert float(ops.dpp_log_det(pair, gamma=0.1)) == pytest.approx(math.log(0.1 * 1.9), rel=1e-5)


def test_is_what_dpp_greedy_reports():
    features, relevance = make(6, 40, 16, 3, torch.float64)
    for diversity, gamma in ((0.3, 0.0), (0.7, 0.05)):
        answer = ops.dpp_greedy(features, relevance, 8, diversity=diversity, gamma=gamma)
        rows = features.gather(1, answer.indices[..., None].expand(-1, -1, 16))
        mine = ops.dpp_log_det(
            rows, relevance.gather(1, answer.indices), alpha=(1 - diversity) / (2 * diversity), gamma=gamma
        )
        torch.testing.assert_close(mine, answer.log_det, rtol=1e-9, atol=1e-9)


def test_same_alone_and_by_any_number_of_threads(isa_levels):
    features, _ = make(9, 7, 20, 4)
    features.requires_grad_()
    whole = ops.dpp_log_det(features, gamma=0.1)
    (gradient,) = torch.autograd.grad(whole.sum(), features)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in isa_levels():
                again = ops.dpp_log_det(features, gamma=0.1)
                assert torch.equal(again, whole)
                assert torch.equal(torch.autograd.grad(again.sum(), features)[0], gradient)
    finally:
        torch.set_num_threads(before)
    for row in range(9):
        assert torch.equal(ops.dpp_log_det(features[row : row + 1], gamma=0.1)[0], whole[row])
