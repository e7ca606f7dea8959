"""The sentences that wrong arguments get: op, argument, rule, the value. Raised before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recfast.errors import OutOfRange

INDEX_DTYPES = (torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(
    op: str,
    name: str,
    value: Any,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    shape: Sequence[int | str] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Check that `value` is a tensor of one of `dtypes`, of `shape`, on `device`; return it.

    `shape` has a number where the size is known and a letter (for the message) where it is free; a tuple of numbers
    alone is the quickest.

    Raises
    ------
    TypeError
        Not a tensor, or another dtype.
    ValueError
        Another number of dimensions, another size, another device.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {_names(dtypes)}, got {_names([value.dtype])}")
    if shape is not None and value.shape != shape and not _agrees(value.shape, shape):
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the other arguments, got {value.device}")
    return value


def _agrees(sizes: torch.Size, shape: Sequence[int | str]) -> bool:
    if len(sizes) != len(shape):
        return False
    # Written out, without a generator: ops check ten tensors a call.
    for have, want in zip(sizes, shape, strict=True):  # noqa: SIM110
        if not isinstance(want, str) and have != want:
            return False
    return True


def index(
    op: str, name: str, value: Any, *, shape: Sequence[int | str], device: torch.device | None = None
) -> torch.Tensor:
    """Check that `value` is an int32 or int64 tensor as `tensor` does; return it as int64."""
    tensor(op, name, value, dtypes=INDEX_DTYPES, shape=shape, device=device)
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def choice(op: str, name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Check that `value` is one of `allowed`; return it."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def at_least(op: str, name: str, value: float, least: float) -> Any:
    """Check that `value >= least` (NaN is not); return it."""
    if not value >= least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    return value


def outside(op: str, name: str, position: int | str, value: int, rows: int) -> OutOfRange:
    """The error for `name[position] = value` where [0, rows) was expected."""
    return OutOfRange(f"{op}: {name}[{position}] = {value} is outside [0, {rows})")


def indices(op: str, name: str, value: torch.Tensor, rows: int) -> None:
    """Check that every id lies in [0, rows). For ops whose kernel does not check in its own pass."""
    if value.numel() == 0:
        return
    low, high = torch.aminmax(value)
    if int(low) < 0 or int(high) >= rows:
        flat = value.reshape(-1)
        position = int(((flat < 0) | (flat >= rows)).nonzero()[0])
        raise outside(op, name, position, int(flat[position]), rows)


def offsets(op: str, name: str, value: torch.Tensor, total: int) -> None:
    """Check that `value` starts at 0, never falls and ends at `total`."""
    if value.numel() == 0:
        raise ValueError(f"{op}: {name} must have one entry more than there are lists, got none")
    if int(value[0]) != 0:
        raise ValueError(f"{op}: {name}[0] must be 0, got {int(value[0])}")
    if value.numel() > 1:
        falls = value[1:] < value[:-1]
        if bool(falls.any()):
            at = int(falls.nonzero()[0]) + 1
            raise ValueError(f"{op}: {name}[{at}] = {int(value[at])} is below {name}[{at - 1}] = {int(value[at - 1])}")
    if int(value[-1]) != total:
        raise ValueError(f"{op}: {name}[-1] must be {total}, the number of rows it cuts, got {int(value[-1])}")


def finite(op: str, name: str, value: torch.Tensor) -> None:
    """Check that `value` holds neither NaN nor infinity."""
    flat = value.reshape(-1)
    wrong = ~torch.isfinite(flat)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: {name} must be finite, got {float(flat[at])} at flat position {at}")
