"""What holds for every op, so that it cannot decay."""

from types import SimpleNamespace

import pytest
import torch

import recfast.ops
from recfast.ops import _library
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


def test_kernels_without_torchs_openmp_take_every_argument(monkeypatch):
    """Where torch has an OpenMP runtime of its own: the number of threads is told first, the call passed on whole."""
    told = []
    module = SimpleNamespace(some=lambda *arguments, **named: (arguments, named), set_threads=told.append)
    monkeypatch.setattr(_library, "_C", module)
    monkeypatch.setattr(_library, "shares_openmp", lambda: False)
    assert _library.kernel("some")(1, 2, rows=3) == ((1, 2), {"rows": 3})
    assert told == [torch.get_num_threads()]
