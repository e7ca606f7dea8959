"""What every metric takes: numpy arrays, tensors or lists; and the sentences for what is wrong with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from recfast.errors import InputError


def array(value: Any, dtype: Any = None) -> np.ndarray:
    """`value` as a numpy array; a tensor is detached and brought to the CPU."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=dtype)


def vector(metric: str, name: str, value: Any, *, size: int | None = None) -> np.ndarray:
    """A float64 array [n] without NaN."""
    out = array(value, np.float64)
    if out.ndim != 1:
        raise InputError(f"{metric}: {name} must have shape [n], got {list(out.shape)}")
    if size is not None and len(out) != size:
        raise InputError(f"{metric}: {name} must have {size} entries like labels, got {len(out)}")
    wrong = np.isnan(out)
    if wrong.any():
        raise InputError(f"{metric}: {name}[{int(wrong.argmax())}] is NaN")
    return out


def labels(metric: str, value: Any) -> np.ndarray:
    """A bool array [n] out of zeros and ones, not empty."""
    out = vector(metric, "labels", value)
    if len(out) == 0:
        raise InputError(f"{metric}: labels must not be empty")
    wrong = (out != 0) & (out != 1)
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(f"{metric}: labels[{at}] must be 0 or 1, got {out[at]:g}")
    return out == 1


def probabilities(metric: str, value: Any, size: int) -> np.ndarray:
    """A float64 array [n] in [0, 1]."""
    out = vector(metric, "probabilities", value, size=size)
    wrong = (out < 0) | (out > 1)
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(f"{metric}: probabilities[{at}] must be in [0, 1], got {out[at]:g}")
    return out


def lists(metric: str, value: Any, k: int | None = None) -> np.ndarray:
    """An int64 array [U, K] of ids, -1 padded, its first `k` columns."""
    out = array(value)
    if out.ndim != 2:
        raise InputError(f"{metric}: lists must have shape [U, K], got {list(out.shape)}")
    if out.size and not np.issubdtype(out.dtype, np.integer):
        raise InputError(f"{metric}: lists must hold integer ids, got {out.dtype}")
    if k is not None:
        if k < 1:
            raise InputError(f"{metric}: k must be at least 1, got {k}")
        out = out[:, :k]
    return out.astype(np.int64, copy=False)


class Jagged(NamedTuple):
    """List u is `values[offsets[u]:offsets[u + 1]]`; int64 both."""

    values: np.ndarray
    offsets: np.ndarray


def jagged(metric: str, name: str, value: Any, size: int) -> Jagged:
    """`size` jagged lists, from a pair (values, offsets)."""
    values, offsets = value
    values, offsets = array(values, np.int64), array(offsets, np.int64)
    if len(offsets) != size + 1:
        raise InputError(f"{metric}: {name} must hold {size} lists like lists, got {len(offsets) - 1}")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != len(values):
        raise InputError(f"{metric}: {name}.offsets must rise from 0 to {len(values)}, the number of values")
    return Jagged(values, offsets)


def rows(metric: str, ids: np.ndarray, size: int) -> None:
    """Check that the ids that are not padding name rows of a table of `size`."""
    wrong = (ids >= size) | (ids < -1)
    if wrong.any():
        u, place = np.argwhere(wrong)[0]
        raise InputError(f"{metric}: lists[{u}, {place}] = {ids[u, place]} is outside [0, {size})")
