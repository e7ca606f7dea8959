"""What holds for every op, so that it cannot decay."""

import pytest
import torch

import recfast.ops
from recfast.ops._library import REGISTRY


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_opcheck(name, opcheck):
    opcheck(REGISTRY[name])


def test_public_ops_have_a_reference():
    for name in recfast.ops.__all__:
        function = getattr(recfast.ops, name)
        if not isinstance(function, type):
            assert callable(getattr(function, "reference", None)), f"ops.{name} has no reference beside it"


@pytest.mark.parametrize("name", sorted(name for name, op in REGISTRY.items() if op.expected is not None))
def test_samples_match_expected(name):
    op = REGISTRY[name]
    for arguments in op.samples():
        answer, wanted = op.overload(*arguments), op.expected(*arguments)
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)


def differentiable(tensors):
    return [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]


@pytest.mark.parametrize(
    "name",
    [
        "din_attention", "embedding_bag", "hstu_attention", "sdim_attention", "sdim_table", "sequence_attention",
        "target_attention",
    ],
)  # fmt: skip
def test_a_second_derivative_raises(name):
    """torch itself would warn and give zeros for what comes through an op's own backward."""
    arguments = next(arguments for arguments in REGISTRY[name].samples() if differentiable(arguments))
    answer = REGISTRY[name].overload(*arguments)
    out = answer[0] if isinstance(answer, tuple) else answer
    inputs = differentiable(arguments)
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True, allow_unused=True)
    assert any(x is not None and x.abs().sum() > 0 for x in first)
    for gradient in first:
        if gradient is not None:
            with pytest.raises(RuntimeError, match=f"{name}: is differentiable once, but its gradient"):
                torch.autograd.grad(gradient.sum(), inputs, allow_unused=True)
