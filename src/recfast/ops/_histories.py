"""What the attention ops share: where the rows of each user lie, and which candidates are whose.

Histories are jagged, `keys [T, ...]` with `offsets [B + 1]`, or padded, `keys [B, L, ...]` with `lengths [B]`. A padded
tensor is read in place: user b's rows start at `b * step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from recfast import _C
from recfast.ops import _check


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with the values of a row (its last dimension) side by side; rows may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Histories(NamedTuple):
    """Where the rows of each user lie: user b's are `begin[b] <= l < end[b]`, counted in rows from the first.

    Attributes
    ----------
    keys, values : Tensor [T, D] or [B, L, D]
        `values` is `keys` where there are none of their own.
    begin, end : int64 [B]
    longest : int
        At least every `end[b] - begin[b]`.
    step : int or None
        Rows from one user to the next when padded, None when jagged.
    """

    keys: torch.Tensor
    values: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    longest: int
    step: int | None


def histories(op: str, keys: torch.Tensor, values: torch.Tensor | None, offsets: torch.Tensor) -> Histories:
    """Check `offsets` (or `lengths` of padded keys) and say where each user's rows lie.

    Nothing is copied where rows are evenly spaced.

    Parameters
    ----------
    op : str
        The op's name, for messages.
    keys : Tensor [T, D] or [B, L, D]
    values : Tensor like `keys` but for its width, or None
    offsets : int64 [B + 1], or the lengths [B] of padded keys; contiguous
    """
    keys = unit_rows(keys)
    own = values is not None
    values = unit_rows(values) if own else keys
    if keys.dim() == 2:
        longest = check_jagged(op, "offsets", offsets, keys.shape[0])
        return Histories(keys, values, offsets[:-1], offsets[1:], longest, None)
    batch, length = keys.shape[:2]
    _check.indices(op, "lengths", offsets, length + 1)

    def step_of(x: torch.Tensor) -> int | None:
        if x.stride(1) == 0:  # one row stands for the whole history: there is no step from row to row
            return None
        step, rest = divmod(x.stride(0), max(x.stride(1), 1))
        return step if rest == 0 and step >= length else None

    step = step_of(keys)
    if step is None or (own and step_of(values) != step):
        # The view puts right the strides of dimensions of one, which contiguous() leaves as they are.
        keys = keys.contiguous().view(-1).view(keys.shape)
        values = values.contiguous().view(-1).view(values.shape) if own else keys
        step = length
    begin = torch.arange(batch) * step
    return Histories(keys, values, begin, begin + offsets, int(offsets.max()) if batch else 0, step)


def place(name: str, x: torch.Tensor | None) -> dict[str, int]:
    """Address and strides of heads, `[T, H, ...]` or `[B, L, H, ...]`, for `heads_of` of csrc/bindings.

    A null address where there is none.
    """
    if x is None:
        return {name: 0, f"{name}_batch": 0, f"{name}_row": 0, f"{name}_head": 0}
    batch, row, head = (0, *x.stride())[-4:-1]
    return {name: x.data_ptr(), f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}


def sequences(op: str, rows: torch.Tensor, offsets: torch.Tensor) -> tuple[dict[str, int], int]:
    """Check `offsets` (or `lengths`) of `rows` [T, H, D] (or [B, L, H, D]).

    Returns what `sequences_of` of csrc/bindings wants, and the longest length. `offsets` (int64, contiguous) must live
    as long as the kernel runs.
    """
    if rows.dim() == 3:
        longest = check_jagged(op, "offsets", offsets, rows.shape[0])
        return {"sequences": offsets.numel() - 1, "offsets": offsets.data_ptr(), "lengths": 0}, longest
    _check.indices(op, "lengths", offsets, rows.shape[1] + 1)
    longest = int(offsets.max()) if offsets.numel() else 0
    return {"sequences": offsets.numel(), "offsets": 0, "lengths": offsets.data_ptr()}, longest


def empty_rows(x: torch.Tensor) -> torch.Tensor:
    """Room for an answer shaped like `x`, [T, H, D] or [B, L, H, D]; padding, which no kernel writes, is 0."""
    return x.new_empty(x.shape) if x.dim() == 3 else x.new_zeros(x.shape)


def check_jagged(op: str, name: str, offsets: torch.Tensor, total: int) -> int:
    """Check that `offsets` (int64, contiguous) starts at 0, never falls, ends at `total`; return its longest step."""
    wrong, longest = _C.check_offsets(offsets.data_ptr(), offsets.numel(), total)
    if wrong >= 0:
        _check.offsets(op, name, offsets, total)
    return longest


def check_candidates(op: str, candidate_offsets: torch.Tensor | None, rows: int) -> None:
    """Check that `candidate_offsets` (int64, contiguous), if any, cuts `rows` candidates."""
    if candidate_offsets is not None:
        check_jagged(op, "candidate_offsets", candidate_offsets, rows)
