"""What users hand to an index: numpy arrays or tensors, taken without a copy where contiguous."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch


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


def refuse_repeats(place: str, ids: np.ndarray) -> None:
    """Raise ValueError where an id occurs twice."""
    order = np.argsort(ids, kind="stable")
    repeated = ids[order[1:]] == ids[order[:-1]]
    if repeated.any():
        at = int(order[1:][repeated].min())
        raise ValueError(f"{place}: ids[{at}] = {ids[at]} is given twice")
