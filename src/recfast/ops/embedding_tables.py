"""The lookup of a module that trains its own tables: autograd sees an op, and its backward updates the tables.

`torch.compile` and `torch.export` must see plain ops with plain arguments, while the tables, their optimiser state and
their counters belong to a module and change in place, gigabytes that no graph should copy. So the op carries a number,
and the number names the module.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from recfast.ops._library import define


class Owner(Protocol):
    """What a module must offer to stand behind a number."""

    def gather(
        self,
        indices: Sequence[torch.Tensor],
        offsets: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
        features: Sequence[int],
        pooling: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows or pooled rows, and the positions of maxima (empty unless `pooling` is "max")."""

    def update(
        self,
        grad: torch.Tensor,
        indices: Sequence[torch.Tensor],
        offsets: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
        argmax: torch.Tensor,
        features: Sequence[int],
        pooling: str,
        of_weights: bool,
    ) -> torch.Tensor:
        """Update the rows in place; return the gradient of `weights` (empty unless `of_weights`)."""


_OWNERS: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


def register(owner: Owner) -> int:
    """Give `owner` a number for the op; it is forgotten with its owner."""
    number = next(_NUMBERS)
    _OWNERS[number] = owner
    return number


def _owner(number: int) -> Owner:
    owner = _OWNERS.get(number)
    if owner is None:
        raise RuntimeError(f"embedding_tables: owner = {number} is no module of this process")
    return owner


def _cpu(anchor, indices, offsets, weights, features, dim, pooling, owner):
    return _owner(owner).gather(indices, offsets, weights, features, pooling)


def _fake(anchor, indices, offsets, weights, features, dim, pooling, owner):
    first = indices[0]
    none = first.new_empty(0, dtype=torch.int32)
    if not features:
        return first.new_empty((*first.shape, dim), dtype=torch.float32), none
    bags = sum(o.shape[0] - 1 for o in offsets) if offsets else sum(i.shape[0] for i in indices)
    argmax = first.new_empty((bags, dim), dtype=torch.int32) if pooling == "max" else none
    return first.new_empty((bags, dim), dtype=torch.float32), argmax


def _backward_cpu(grad, indices, offsets, weights, argmax, features, pooling, of_weights, owner):
    return grad.new_empty(0), _owner(owner).update(
        grad, indices, offsets, weights, argmax, features, pooling, of_weights
    )


def _backward_fake(grad, indices, offsets, weights, argmax, features, pooling, of_weights, owner):
    return grad.new_empty(0), torch.empty_like(weights) if of_weights else grad.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    _, indices, offsets, weights, features, _, pooling, owner = inputs
    _, argmax = output
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(*indices, *offsets, argmax, weights)
    ctx.count, ctx.features, ctx.pooling, ctx.owner = len(indices), list(features), pooling, owner
    ctx.offsets = len(offsets)


def _backward(ctx, grad, _):
    *lists, argmax, weights = ctx.saved_tensors
    indices, offsets = lists[: ctx.count], lists[ctx.count :]
    of_weights = weights is not None and ctx.needs_input_grad[3]
    anchor, weight_gradient = _backward_op(
        grad, indices, offsets, weights, argmax, ctx.features, ctx.pooling, of_weights, ctx.owner
    )
    # The empty gradient is what keeps a compiler from dropping the update as work without a result.
    nothing = [None] * ctx.count, [None] * ctx.offsets
    # torch takes an empty list for a list of tensors, and wants one back.
    features = None if ctx.features else []
    return anchor, *nothing, weight_gradient if of_weights else None, features, None, None, None


class _SampleOwner:
    """A float table that learns nothing, for opcheck."""

    def __init__(self) -> None:
        self.table = torch.arange(12, dtype=torch.float32).reshape(4, 3)

    def gather(self, indices, offsets, weights, features, pooling):
        none = torch.empty(0, dtype=torch.int32)
        if not features:
            return self.table[indices[0]], none
        rows = self.table[torch.cat(list(indices))]
        return (rows if weights is None else rows * weights[:, None]), none

    def update(self, grad, indices, offsets, weights, argmax, features, pooling, of_weights):
        if not of_weights:
            return grad.new_empty(0)
        return (self.table[torch.cat(list(indices))] * grad).sum(1)


_SAMPLE = _SampleOwner()
_SAMPLE_NUMBER = register(_SAMPLE)


def _samples() -> Iterator[tuple]:
    def anchor() -> torch.Tensor:
        return torch.empty(0, requires_grad=True)

    ids = torch.tensor([[0, 3], [1, 1]])
    yield anchor(), [ids], [], None, [], 3, "none", _SAMPLE_NUMBER
    yield torch.empty(0), [ids], [], None, [], 3, "none", _SAMPLE_NUMBER
    yield anchor(), [ids[0], ids[1]], [], None, [0, 0], 3, "none", _SAMPLE_NUMBER
    yield anchor(), [ids[0]], [], torch.rand(2, requires_grad=True), [0], 3, "none", _SAMPLE_NUMBER


def _backward_samples() -> Iterator[tuple]:
    ids, none = torch.tensor([0, 3]), torch.empty(0, dtype=torch.int32)
    yield torch.rand(2, 3), [ids], [], None, none, [0], "none", False, _SAMPLE_NUMBER
    yield torch.rand(2, 3), [ids], [], torch.rand(2), none, [0], "none", True, _SAMPLE_NUMBER


lookup = define(
    "embedding_tables(Tensor anchor, Tensor[] indices, Tensor[] offsets, Tensor? weights, int[] features, SymInt dim, "
    "str pooling, int owner) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
)
_backward_op = define(
    "embedding_tables_backward(Tensor grad, Tensor[] indices, Tensor[] offsets, Tensor? weights, Tensor argmax, "
    "int[] features, str pooling, bool of_weights, int owner) -> (Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    samples=_backward_samples,
)
