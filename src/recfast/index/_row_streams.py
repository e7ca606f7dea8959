"""Sparse rows collected from a stream, in no more memory than the finished rows take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

Posting = tuple[int, np.ndarray, np.ndarray]


class RowCollector:
    """Takes rows in rising order and makes (indptr, item_ids, scores) of them.

    With `most`, the longest that a row may become, the arrays are made at once at their largest; the system gives
    memory only to the part that is written. Without, parts are kept and joined at the end.
    """

    def __init__(self, n_rows: int, most: int | None):
        self.lengths = np.zeros(n_rows + 1, dtype=np.int64)
        self.size = 0
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.room = None
        if most is not None:
            self.room = (np.empty(n_rows * most, dtype=np.int32), np.empty(n_rows * most, dtype=np.float32))

    def add(self, first: int, lengths: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> None:
        """Rows `first`, `first + 1`, ... of these lengths, one after the other in `ids` and `scores`."""
        self.lengths[first + 1 : first + 1 + len(lengths)] = lengths
        if self.room is None:
            self.parts.append((ids.astype(np.int32), scores.astype(np.float32)))
        else:
            for to, values in zip(self.room, (ids, scores), strict=True):
                to[self.size : self.size + len(values)] = values
        self.size += len(ids)

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.room is not None:
            ids, scores = (array[: self.size] for array in self.room)
        else:
            ids = np.concatenate([np.zeros(0, np.int32), *(part[0] for part in self.parts)])
            scores = np.concatenate([np.zeros(0, np.float32), *(part[1] for part in self.parts)])
        return self.lengths.cumsum(), ids, scores


def kept_of_block(block: torch.Tensor, top: int | None, threshold: float) -> torch.Tensor:
    """Which entries of [rows, N] stay: those above `threshold`, at most `top` a row, ties by lowest id."""
    keep = block > threshold
    if top is None or top >= block.shape[1]:
        return keep
    if top == 0:
        return torch.zeros_like(keep)
    crowded = (keep.sum(1) > top).nonzero()[:, 0]
    if len(crowded):
        rows = block[crowded]
        least = rows.topk(top, dim=1).values[:, -1:]  # above the threshold, as more than `top` are
        above = rows > least
        ties = rows == least
        room = top - above.sum(1, keepdim=True)
        keep[crowded] = above | (ties & (ties.cumsum(1) <= room))
    return keep


def rows_of_blocks(
    place: str, n_rows: int, n_items: int, blocks: Iterable[Any], top: int | None, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows from dense blocks [rows, N] in the order of the rows."""
    collector = RowCollector(n_rows, None if top is None else min(top, n_items))
    first = 0
    for number, block in enumerate(blocks):
        block = torch.from_numpy(block) if isinstance(block, np.ndarray) else block
        if not isinstance(block, torch.Tensor) or not block.dtype.is_floating_point:
            found = block.dtype if isinstance(block, torch.Tensor) else type(block).__name__
            raise TypeError(f"{place}: blocks[{number}] must be floating point numbers, got {found}")
        if block.dim() != 2 or block.shape[1] != n_items:
            raise ValueError(f"{place}: blocks[{number}] must have shape [rows, {n_items}], got {list(block.shape)}")
        if first + len(block) > n_rows:
            raise ValueError(f"{place}: blocks must have {n_rows} rows together, got {first + len(block)} or more")
        block = block.detach().float().cpu()
        # One pass in the usual case; -inf is what a masked pair has, and never kept.
        if not bool(torch.isfinite(block.sum())):
            wrong = (block.isnan() | (block == torch.inf)).nonzero()
            if len(wrong):
                row, item = wrong[0].tolist()
                raise ValueError(f"{place}: the score of row {first + row}, item {item} is {float(block[row, item])}")
        keep = kept_of_block(block, top, threshold)
        collector.add(
            first,
            keep.sum(1).numpy(),
            keep.nonzero()[:, 1].numpy(),
            block[keep].numpy(),
        )
        first += len(block)
    if first != n_rows:
        raise ValueError(f"{place}: blocks must have {n_rows} rows together, got {first}")
    return collector.finish()


def rows_of_postings(
    place: str, n_rows: int, n_items: int, rows: Iterable[tuple[int, Any, Any]], top: int | None, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows from (row, ids, scores), rows rising, ids of a row in any order."""
    collector = RowCollector(n_rows, None if top is None else min(top, n_items))
    for row, ids, scores in _checked(place, n_rows, n_items, rows):
        keep = scores > threshold
        ids, scores = ids[keep], scores[keep]
        if top is not None and len(ids) > top:
            best = np.lexsort((ids, -scores))[:top]
            ids, scores = ids[best], scores[best]
        order = np.argsort(ids, kind="stable")
        collector.add(row, np.array([len(ids)]), ids[order], scores[order])
    return collector.finish()


def _checked(place: str, n_rows: int, n_items: int, rows: Iterable[tuple[int, Any, Any]]) -> Iterator[Posting]:
    before = -1
    for row, ids, scores in rows:
        row = int(row)
        if not before < row < n_rows:
            raise ValueError(f"{place}: rows must rise and stay below {n_rows}, got {row} after {before}")
        before = row
        ids = np.asarray(ids)
        scores = np.asarray(scores, dtype=np.float32)
        if ids.size == 0:
            ids = ids.astype(np.int64)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"{place}: the ids of row {row} must be integers, got {ids.dtype}")
        if ids.ndim != 1 or ids.shape != scores.shape:
            raise ValueError(
                f"{place}: row {row} must have as many scores as ids, got {list(scores.shape)} and {list(ids.shape)}"
            )
        if not np.isfinite(scores).all():
            at = int((~np.isfinite(scores)).argmax())
            raise ValueError(f"{place}: the score of row {row}, item {ids[at]} is {scores[at]}")
        if len(ids):
            wrong = (ids < 0) | (ids >= n_items)
            if wrong.any():
                raise IndexError(f"{place}: item {ids[wrong.argmax()]} of row {row} is outside [0, {n_items})")
            distinct, count = np.unique(ids, return_counts=True)
            if (count > 1).any():
                raise ValueError(f"{place}: row {row} names item {distinct[count.argmax()]} twice")
        yield row, ids, scores
