"""Exact top-k under a weighted sum of a few sparse rows: SparCode's serving op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel

_NAME = "code_rows_search"
_KERNELS = {torch.int32: kernel("code_rows_int32"), torch.int64: kernel("code_rows_int64")}
_threads = kernel("max_threads")


class RowsIndex(NamedTuple):
    """Sparse rows over items. Any object with these four attributes serves as well.

    Attributes
    ----------
    indptr : Tensor [R + 1], int64
        Row r is `item_ids[indptr[r]:indptr[r + 1]]`.
    item_ids : Tensor [T], int32 or int64, in [0, N)
        Strictly rising within a row.
    scores : Tensor [T], float32, finite
    n_items : int
        N.
    """

    indptr: torch.Tensor
    item_ids: torch.Tensor
    scores: torch.Tensor
    n_items: int


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _cpu(indptr, item_ids, scores, rows, n_items, k, weights, mask, check):
    indptr, item_ids, scores, rows, weights, mask = map(_contiguous, (indptr, item_ids, scores, rows, weights, mask))
    if check:
        _check.offsets(_NAME, "indptr", indptr, item_ids.shape[0])
    queries, width = rows.shape
    out_scores = torch.empty((queries, k), dtype=torch.float32)
    out_ids = torch.empty((queries, k), dtype=torch.int64)
    threads = _threads()
    sums = torch.zeros(threads * _C.CODE_ROWS_TILE, dtype=torch.float32)
    touched = torch.zeros(threads * _C.CODE_ROWS_TILE // 64, dtype=torch.int64)
    cursors = torch.empty(threads * width, dtype=torch.int64)
    # An entry of a heap is a score and an id, 16 bytes.
    heaps = torch.empty((threads * min(k, n_items), 2), dtype=torch.int64)
    in_rows, in_weights, outside, unsorted, in_scores = _KERNELS[item_ids.dtype](
        indptr.data_ptr(),
        item_ids.data_ptr(),
        scores.data_ptr(),
        rows.data_ptr(),
        _address(weights),
        _address(mask),
        0 if mask is None or mask.dim() == 1 else n_items,
        sums.data_ptr(),
        touched.data_ptr(),
        cursors.data_ptr(),
        heaps.data_ptr(),
        threads,
        out_scores.data_ptr(),
        out_ids.data_ptr(),
        queries,
        width,
        indptr.shape[0] - 1,
        n_items,
        k,
        check,
    )
    if outside >= 0:
        raise _check.outside(_NAME, "item_ids", outside, int(item_ids[outside]), n_items)
    if unsorted >= 0:
        raise ValueError(
            f"{_NAME}: item_ids must rise strictly within a row, got {int(item_ids[unsorted])}"
            f" after {int(item_ids[unsorted - 1])} at position {unsorted}"
        )
    if in_scores >= 0:
        raise ValueError(f"{_NAME}: scores[{in_scores}] must be finite, got {float(scores[in_scores])}")
    if in_rows >= 0:
        query, slot = divmod(in_rows, width)
        raise IndexError(
            f"{_NAME}: rows[{query}, {slot}] = {int(rows[query, slot])} is outside [-1, {indptr.shape[0] - 1})"
        )
    if in_weights >= 0:
        query, slot = divmod(in_weights, width)
        raise ValueError(f"{_NAME}: weights[{query}, {slot}] must be finite, got {float(weights[query, slot])}")
    return out_scores, out_ids


def _fake(indptr, item_ids, scores, rows, n_items, k, weights, mask, check):
    shape = (rows.shape[0], k)
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int64)


def _expected(indptr, item_ids, scores, rows, n_items, k, weights, mask, check):
    return reference(RowsIndex(indptr, item_ids, scores, n_items), rows, k, weights=weights, mask=mask)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for queries, width, n_rows, n_items in ((0, 2, 3, 4), (2, 0, 3, 4), (1, 1, 1, 0), (3, 4, 6, 70)):
        held = torch.rand(n_rows, n_items, generator=generator) < 0.3
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), held.sum(1).cumsum(0)])
        item_ids = held.nonzero()[:, 1]
        scores = torch.randn(item_ids.shape[0], generator=generator)
        rows = torch.randint(-1, n_rows, (queries, width), generator=generator)
        weights = torch.randn(queries, width, generator=generator)
        mask = torch.rand(queries, n_items, generator=generator) < 0.5
        yield indptr, item_ids, scores, rows, n_items, 5, None, None, True
        yield indptr, item_ids.int(), scores, rows, n_items, 5, weights, mask, True
        yield indptr, item_ids, scores, rows, n_items, 0, weights, mask.any(0), False


def reference(
    index: Any,
    rows: torch.Tensor,
    k: int,
    *,
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, in the dtype of the index's scores."""
    queries, width = rows.shape
    total = torch.zeros((queries, index.n_items), dtype=index.scores.dtype)
    allowed = torch.zeros((queries, index.n_items), dtype=torch.bool)
    for query in range(queries):
        for slot in range(width):
            row = int(rows[query, slot])
            if row < 0:
                continue
            part = slice(int(index.indptr[row]), int(index.indptr[row + 1]))
            terms = index.scores[part]
            if weights is not None:
                terms = terms * weights[query, slot].to(terms.dtype)
            held = index.item_ids[part].long()
            total[query, held] += terms  # ids of a row are distinct, so this adds each once
            allowed[query, held] = True
    allowed &= total > -torch.inf
    if mask is not None:
        allowed &= mask
    total, found = total.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True)
    found = found.masked_fill(total == -torch.inf, -1)
    pad = (0, max(k - index.n_items, 0))
    return (
        torch.nn.functional.pad(total[:, :k], pad, value=-torch.inf),
        torch.nn.functional.pad(found[:, :k], pad, value=-1),
    )


_op = define(
    "code_rows_search(Tensor indptr, Tensor item_ids, Tensor scores, Tensor rows, SymInt n_items, SymInt k,"
    " Tensor? weights, Tensor? mask, bool check) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
)


def code_rows_search(
    rows_index: Any,
    rows: torch.Tensor,
    k: int,
    *,
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a few sparse rows for each query and find the k best items, exactly.

    .. math:: y_{q,i} = \\sum_{j=0}^{K_u-1} w_{q,j} S_{r_{q,j},i}

    Parameters
    ----------
    rows_index : RowsIndex, or an object with attributes indptr, item_ids, scores, n_items
        The sparse matrix S [R, N].
    rows : Tensor [Q, Ku], int64
        The rows to add, in [0, R), or -1 for an absent one. A row named twice counts twice.
    k : int
        Results a query; may exceed N, may be 0.
    weights : Tensor [Q, Ku], float32, optional
        1 where left out. Weights of absent rows are not used but must be finite.
    mask : Tensor [N] or [Q, N], bool, optional
        The items allowed, for all queries or for each. Tested inside the search.
    check : bool
        False skips the checks of the index, which must have passed before. Rows and weights are always checked.

    Returns
    -------
    scores : Tensor [Q, k], float32
    ids : Tensor [Q, k], int64
        Sorted by score descending, ties by lowest id, padded with (-inf, -1). Only items that a named row holds are
        candidates, whatever their sum; a query without rows gets padding alone.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        A shape that does not fit; ids that do not rise within a row; a score or a weight that is not finite.
    IndexError
        A row or an item id out of range.

    Notes
    -----
    Each product and each sum is rounded to float32, in the order of the rows. Scores and ids never depend on k, Q or
    the number of threads. Work is proportional to the length of the named rows, never to N: ids are visited in tiles of
    32,768, those only that a row reaches, and the scratch of a thread is one tile. Inference only: weights and scores
    that require a gradient are detached. Backends: CPU.

    References
    ----------
    Su et al., "Beyond Two-Tower Matching: Learning Sparse Retrievable Cross-Interactions for Recommendation", SIGIR
    2023.
    """
    missing = [name for name in RowsIndex._fields if not hasattr(rows_index, name)]
    if missing:
        raise TypeError(
            f"{_NAME}: rows_index must have attributes {', '.join(RowsIndex._fields)},"
            f" got {type(rows_index).__name__} without {missing[0]}"
        )
    indptr, item_ids, scores, n_items = (getattr(rows_index, name) for name in RowsIndex._fields)
    _check.tensor(_NAME, "item_ids", item_ids, dtypes=_check.INDEX_DTYPES, shape=["T"])
    device = item_ids.device
    _check.tensor(_NAME, "indptr", indptr, dtypes=[torch.int64], shape=["R + 1"], device=device)
    _check.tensor(_NAME, "scores", scores, dtypes=[torch.float32], shape=list(item_ids.shape), device=device)
    _check.at_least(_NAME, "n_items", n_items, 0)
    if indptr.shape[0] == 0:
        raise ValueError(f"{_NAME}: indptr must have one entry more than there are rows, got none")
    _check.tensor(_NAME, "rows", rows, dtypes=[torch.int64], shape=["Q", "Ku"], device=device)
    if weights is not None:
        _check.tensor(_NAME, "weights", weights, dtypes=[torch.float32], shape=list(rows.shape), device=device)
        weights = weights.detach()
    if mask is not None:
        shape = [n_items] if isinstance(mask, torch.Tensor) and mask.dim() == 1 else [rows.shape[0], n_items]
        _check.tensor(_NAME, "mask", mask, dtypes=[torch.bool], shape=shape, device=device)
    _check.at_least(_NAME, "k", k, 0)
    return _op(indptr, item_ids, scores.detach(), rows, n_items, k, weights, mask, bool(check))


code_rows_search.reference = reference
