"""What holds for every op, so that it cannot decay."""

import pytest
import torch

import recfast.ops
from recfast.ops._library import REGISTRY


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_opcheck(name, opcheck):
    opcheck(REGISTRY[name])


@pytest.mark.parametrize("name", sorted(name for name in REGISTRY if f"{name}_backward" in REGISTRY))
def test_a_second_derivative_is_refused(name):
    def leaves(arguments):
        return [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]

    arguments = next(x for x in REGISTRY[name].samples() if leaves(x))
    answer = REGISTRY[name].overload(*arguments)
    answers = answer if isinstance(answer, (tuple, list)) else [answer]
    total = sum(x.square().sum() for x in answers if x.requires_grad)
    first = torch.autograd.grad(total, leaves(arguments), create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: differentiable once only"):
        sum(x.sum() for x in first).backward()


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
