"""What users hand to an index: numpy arrays or tensors, taken without a copy where contiguous."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from recfast.index.bitmap import Bitmap


def as_tensor(place: str, name: str, value: Any) -> torch.Tensor:
    """`value` as a contiguous CPU tensor without a gradient, sharing memory where it can.

    Raises
    ------
    TypeError
        Neither a numpy array nor a tensor.
    """
    if isinstance(value, np.ndarray):
        with warnings.catch_warnings():
            # A read-only array: indexes never write to what they were given.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous()
    raise TypeError(f"{place}: {name} must be a tensor or a numpy array, got {type(value).__name__}")


def as_ids(place: str, value: Any) -> np.ndarray:
    """External ids as an int64 vector: a tensor, an array or a list of integers, each at least 0.

    Raises
    ------
    TypeError
        Something else than integers.
    ValueError
        Not one-dimensional, or an id below 0, which the padding of answers is.
    """
    ids = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if ids.size == 0:
        ids = ids.astype(np.int64)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{place}: ids must be integers, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"{place}: ids must have shape [N], got {list(ids.shape)}")
    if ids.dtype == np.uint64 and (ids > np.iinfo(np.int64).max).any():
        at = int((ids > np.iinfo(np.int64).max).argmax())
        raise ValueError(f"{place}: ids[{at}] must be below 2**63, got {ids[at]}")
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    if (ids < 0).any():
        at = int((ids < 0).argmax())
        raise ValueError(f"{place}: ids[{at}] must be at least 0, got {ids[at]}")
    return ids


def following(first: int, count: int) -> np.ndarray:
    """The ids `first`, `first` + 1, ...; int64 also where there are none and `first` is 2**63."""
    return np.arange(count) + min(first, np.iinfo(np.int64).max)


def refuse_repeats(place: str, ids: np.ndarray) -> None:
    """Raise ValueError where an id occurs twice."""
    order = np.argsort(ids, kind="stable")
    repeated = ids[order[1:]] == ids[order[:-1]]
    if repeated.any():
        at = int(order[1:][repeated].min())
        raise ValueError(f"{place}: ids[{at}] = {ids[at]} is given twice")


def as_mask(
    place: str, mask: Any, queries: int, slots: int, form: str = "any", epoch: Any = None
) -> torch.Tensor | Bitmap | None:
    """What a user gave as `mask`, checked against the number of queries and of slots.

    An index's search takes `mask=None` and says ``mask = as_mask("CodeRows.search", mask, len(rows), self.n_items)``,
    adding `form="bool"` where its kernel reads bytes and `form="bits"` where it reads bits. Users may give bool
    [slots] or [queries, slots]; the same packed, uint8 [ceil(slots / 8)] or [queries, ceil(slots / 8)], lowest bit
    first; or a `Bitmap` (an index with external ids offers `n_slots` and `slots_of(ids) -> int64 [n]`, and
    `Bitmap.allow(index, ids)` and `.deny` work on it). True is allowed.

    Parameters
    ----------
    place : str
        The first word of an error.
    form : "any", "bool" or "bits"
        "bool": a bool tensor [slots] or [queries, slots]; "bits": a `Bitmap`; "any": whichever was given, packed bytes
        as a `Bitmap`.
    epoch : Epoch, optional
        The present one of an index that renumbers its slots.

    Returns
    -------
    bool tensor or Bitmap, or None for None

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        A shape that does not fit; a bitmap from before the slots were renumbered.
    """
    if mask is None:
        return None
    if not isinstance(mask, Bitmap):
        mask = as_tensor(place, "mask", mask)
        packed = mask.dtype == torch.uint8
        if not packed and mask.dtype != torch.bool:
            raise TypeError(f"{place}: mask must be bool, packed uint8 or a Bitmap, got {_name(mask.dtype)}")
        _fits(place, tuple(mask.shape), queries, -(-slots // 8) if packed else slots)
        if packed:
            mask = Bitmap.from_packed(mask, slots)
        elif form == "bits":
            mask = Bitmap.from_mask(mask)
        return mask.to_mask() if form == "bool" and isinstance(mask, Bitmap) else mask
    _fits(place, mask.shape, queries, slots)
    if mask.epoch is not None and mask.epoch.over and mask.epoch is not epoch:
        raise ValueError(f"{place}: mask was made before compact gave the items other slots; make it again from ids")
    return mask.to_mask() if form == "bool" else mask


def _fits(place: str, shape: tuple[int, ...], queries: int, width: int) -> None:
    if shape not in ((width,), (queries, width)):
        wanted = f"[{width}]" if len(shape) == 1 else f"[{queries}, {width}]"
        raise ValueError(f"{place}: mask must have shape {wanted}, got {list(shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
