"""One place where ops meet torch: the library, the registry, the compiled modules.

The compiled modules know nothing of torch. An op is declared here with `torch.library.Library.define/impl`, which costs
about a quarter of what the `custom_op` decorator costs per call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch  # before _C: its libgomp must be the one that _C binds to

from recfast import _C

LIBRARY = torch.library.Library("recfast", "DEF")


@dataclass(frozen=True)
class Op:
    """What the registry knows of an op, for opcheck, `recfast doctor` and the tests.

    Attributes
    ----------
    name
        As in `torch.ops.recfast.<name>`.
    samples
        Gives small argument tuples for `torch.ops.recfast.<name>`; every one must pass opcheck.
    expected
        The same call in plain torch, or None where an op only belongs to another one (a backward).
    """

    name: str
    samples: Callable[[], Iterable[tuple[Any, ...]]]
    expected: Callable[..., Any] | None

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.recfast, self.name).default


REGISTRY: dict[str, Op] = {}


class _Once(torch.autograd.Function):
    """Lets a gradient through and raises where it is differentiated: torch itself would warn and go on with zeros."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: torch.Tensor, *_made_of: torch.Tensor) -> torch.Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _grad: torch.Tensor) -> None:
        raise RuntimeError(f"{ctx.name}: is differentiable once, but its gradient was to be differentiated again")


class _Unpacked:
    """The context of a backward whose saved tensors have been taken out, which checkpointing allows once."""

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # no create_graph: nothing can be differentiated again
            return backward(ctx, *grads)
        unpacked = _Unpacked(ctx)
        with torch.no_grad():
            gradients = backward(unpacked, *grads)
        made_of = [x for x in (*grads, *unpacked.saved_tensors) if isinstance(x, torch.Tensor) and x.requires_grad]
        return tuple(_Once.apply(name, x, *made_of) if isinstance(x, torch.Tensor) else x for x in gradients)

    return guarded


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Callable[[], Iterable[tuple[Any, ...]]],
    expected: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    twice: bool = False,
) -> Callable[..., Any]:
    """Declare `torch.ops.recfast.<name>` and return the callable that reaches it fastest.

    Parameters
    ----------
    schema
        `name(Tensor x, ...) -> Tensor`, in the syntax of `torch.library`.
    cpu, cuda
        The implementations. They get checked arguments and allocate through torch.
    fake
        The same without data: shapes and dtypes only.
    samples, expected
        See `Op`.
    backward, setup_context
        As for `torch.library.register_autograd`; left out for ops without a gradient.
    twice
        Whether `backward` is made of what torch can differentiate; otherwise a second derivative raises.
    """
    name = schema.partition("(")[0].strip()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"recfast::{name}", fake, lib=LIBRARY)
    if backward is not None:
        backward = backward if twice else _once(name, backward)
        torch.library.register_autograd(f"recfast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    op = Op(name, samples, expected)
    REGISTRY[name] = op
    return op.overload


@functools.cache
def cuda_module() -> ModuleType:
    """The module `recfast._cuda`.

    Raises
    ------
    RuntimeError
        When this build of recfast has none.
    """
    try:
        return importlib.import_module("recfast._cuda")
    except ImportError as error:
        raise RuntimeError(
            "recfast: tensors are on a CUDA device, but this build has no recfast._cuda; "
            "build with nvcc on PATH (RECFAST_CUDA=ON), or move the tensors to the CPU"
        ) from error


_EAGER_TYPES = (torch.Tensor, torch.nn.Parameter)


def unwatched(*tensors: torch.Tensor) -> bool:
    """Whether nobody watches a call on these tensors: no compiler, no mode, no transform, nothing but the CPU.

    Then an op without gradient may call its implementation itself: torch's dispatcher costs as much as a short search.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(tensor) in _EAGER_TYPES and tensor.is_cpu for tensor in tensors)
    )


def stream_of(tensor: torch.Tensor) -> int:
    """The address of the current CUDA stream of `tensor`'s device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


@functools.cache
def shares_openmp() -> bool:
    """Whether torch and `_C` use the same OpenMP runtime, so that `torch.set_num_threads` reaches the kernels."""
    before = torch.get_num_threads()
    probe = 1 if before != 1 else 2
    try:
        torch.set_num_threads(probe)
        return _C.max_threads() == probe
    finally:
        torch.set_num_threads(before)


def kernel(name: str) -> Callable[..., Any]:
    """The compiled function `name` of `_C`, obeying `torch.set_num_threads`.

    Where torch brings an OpenMP runtime of another name, `_C` has one of its own and is told the number at each call.
    """
    function = getattr(_C, name)
    if shares_openmp():
        return function

    @functools.wraps(function)
    def with_threads(*arguments: Any, **named: Any) -> Any:
        _C.set_threads(torch.get_num_threads())
        return function(*arguments, **named)

    return with_threads
