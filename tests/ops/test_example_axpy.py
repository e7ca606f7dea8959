"""The five tests of an op."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY


@given(
    size=st.one_of(st.sampled_from([0, 1, 7, 8, 9, 15, 16, 17, 33, 40_000]), st.integers(0, 300)),
    alpha=st.floats(-4, 4, width=32),
)
def test_matches_reference(size, alpha, isa_levels, poisoned_empty):
    generator = torch.Generator().manual_seed(size)
    x, y = torch.randn(2, size, generator=generator)
    wanted = ops.example_axpy.reference(x.double(), y.double(), alpha)
    # One rounding of the product, one of the sum.
    bound = torch.finfo(torch.float32).eps * (2 * (alpha * x).abs() + y.abs()).double()
    answers = []
    for _ in isa_levels():
        answer = ops.example_axpy(x, y, alpha)
        assert torch.all((answer.double() - wanted).abs() <= bound)
        answers.append(answer)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_known_values():
    answer = ops.example_axpy(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([10.0, 20.0, 30.0]), 2.0)
    assert answer.tolist() == [12.0, 24.0, 24.0]


def test_gradcheck():
    x, y = torch.randn(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: ops.example_axpy(a, b, 0.7), (x.requires_grad_(), y.requires_grad_()))


def test_opcheck(opcheck):
    opcheck(REGISTRY["example_axpy"])


@pytest.mark.parametrize(
    ("x", "y", "error", "sentence"),
    [
        ([1.0], torch.ones(1), TypeError, "example_axpy: x must be a tensor, got list"),
        (
            torch.ones(2, dtype=torch.int64),
            torch.ones(2),
            TypeError,
            "x must be float32 or float64, got int64",
        ),
        (torch.ones(2, 1), torch.ones(2), ValueError, r"x must have shape \[N\], got \[2, 1\]"),
        (torch.ones(2), torch.ones(3), ValueError, r"y must have shape \[2\], got \[3\]"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), TypeError, "y must be float32, got float64"),
    ],
)
def test_rejects_bad_input(x, y, error, sentence):
    with pytest.raises(error, match=sentence):
        ops.example_axpy(x, y, 1.0)


@pytest.mark.gpu
def test_gpu_equals_cpu(cuda):
    x, y = torch.randn(2, 1001)
    assert torch.equal(ops.example_axpy(x.to(cuda), y.to(cuda), 0.3).cpu(), ops.example_axpy(x, y, 0.3))
