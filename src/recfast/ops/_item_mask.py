"""Which items a query may return, in the forms that searches take."""

from __future__ import annotations

from typing import Any

import torch

from recfast.ops import _check

_NONE, _BYTES, _BITS = 0, 1, 2


def tensor_of(op: str, mask: Any, queries: int, n_items: int, device: torch.device) -> torch.Tensor | None:
    """The mask as one tensor: bool, packed uint8, or a bitmap's int64 words; one row or one a query.

    Raises
    ------
    TypeError, ValueError
        Another dtype, another shape, another device.
    """
    if mask is None:
        return None
    words = getattr(mask, "words", None)
    if words is not None:
        size = getattr(mask, "size", n_items)
        if size != n_items:
            raise ValueError(f"{op}: mask must be a bitmap of {n_items} items, got one of {size}")
        wide, dtype, what, mask = -(-n_items // 64), torch.int64, "mask.words", words
    elif isinstance(mask, torch.Tensor) and mask.dtype == torch.uint8:
        wide, dtype, what = -(-n_items // 8), torch.uint8, "mask"
    else:
        wide, dtype, what = n_items, torch.bool, "mask"
    shape = [wide] if isinstance(mask, torch.Tensor) and mask.dim() == 1 else [queries, wide]
    return _check.tensor(op, what, mask, dtypes=[dtype], shape=shape, device=device)


def fields(mask: torch.Tensor | None) -> tuple[int, int, int]:
    """For the kernels: kind, address, bytes from one query to the next. The tensor must be contiguous."""
    if mask is None:
        return _NONE, 0, 0
    kind = _BYTES if mask.dtype == torch.bool else _BITS
    return kind, mask.data_ptr(), 0 if mask.dim() == 1 else mask.shape[1] * mask.element_size()


def allowed(mask: torch.Tensor | None, queries: int, n_items: int) -> torch.Tensor | None:
    """The same as bool [N] or [Q, N], in plain torch."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    bits = mask.contiguous().view(torch.uint8) if mask.dtype == torch.int64 else mask
    spread = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return spread.flatten(-2)[..., :n_items].bool()
