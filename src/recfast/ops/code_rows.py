"""Exact top-k under a weighted sum of a few sparse rows: SparCode's serving op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from recfast import _C
from recfast.ops import _check, _item_mask, packed_rows
from recfast.ops._library import define, kernel
from recfast.ops.packed_rows import PackedRows

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


def _cpu(indptr, item_ids, scores, rows, n_items, k, weights, row_bias, mask, check):
    indptr, item_ids, scores, rows = map(_contiguous, (indptr, item_ids, scores, rows))
    weights, row_bias, mask = map(_contiguous, (weights, row_bias, mask))
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
        _address(row_bias),
        *_item_mask.fields(mask),
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
    if in_rows >= 0 or in_weights >= 0:
        raise packed_rows.wrong_query(rows, weights, in_rows, in_weights, indptr.shape[0] - 1)
    return out_scores, out_ids


def _fake(indptr, item_ids, scores, rows, n_items, k, weights, row_bias, mask, check):
    shape = (rows.shape[0], k)
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int64)


def _expected(indptr, item_ids, scores, rows, n_items, k, weights, row_bias, mask, check):
    mask = _item_mask.allowed(mask, rows.shape[0], n_items)
    matrix = RowsIndex(indptr, item_ids, scores, n_items)
    return reference(matrix, rows, k, weights=weights, row_bias=row_bias, mask=mask)


def sample_matrices() -> Iterator[tuple]:
    """Small problems: matrix, rows, weights, row_bias, mask."""
    generator = torch.Generator().manual_seed(0)
    for queries, width, n_rows, n_items in ((0, 2, 3, 4), (2, 0, 3, 4), (1, 1, 1, 0), (3, 4, 6, 70)):
        held = torch.rand(n_rows, n_items, generator=generator) < 0.3
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), held.sum(1).cumsum(0)])
        item_ids = held.nonzero()[:, 1]
        scores = torch.randn(item_ids.shape[0], generator=generator)
        rows = torch.randint(-1, n_rows, (queries, width), generator=generator)
        weights = torch.randn(queries, width, generator=generator)
        row_bias = torch.randn(n_rows, generator=generator)
        mask = torch.rand(queries, n_items, generator=generator) < 0.5
        yield RowsIndex(indptr, item_ids, scores, n_items), rows, weights, row_bias, mask


def _samples() -> Iterator[tuple]:
    for matrix, rows, weights, row_bias, mask in sample_matrices():
        indptr, item_ids, scores, n_items = matrix
        yield indptr, item_ids, scores, rows, n_items, 5, None, None, None, True
        yield indptr, item_ids.int(), scores, rows, n_items, 5, weights, row_bias, mask, True
        yield indptr, item_ids, scores, rows, n_items, 0, weights, None, mask.any(0), False


def reference(
    rows_index: Any,
    rows: torch.Tensor,
    k: int,
    *,
    weights: torch.Tensor | None = None,
    row_bias: torch.Tensor | None = None,
    mask: Any = None,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, in the dtype of the matrix's scores."""
    index = _unpacked(rows_index)
    queries, width = rows.shape
    mask = _item_mask.tensor_of(_NAME, mask, queries, index.n_items, rows.device)
    mask = _item_mask.allowed(mask, queries, index.n_items)
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
            if row_bias is not None:
                terms = terms + row_bias[row].to(terms.dtype)
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
    " Tensor? weights, Tensor? row_bias, Tensor? mask, bool check) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
)


def _unpacked(rows_index: Any) -> Any:
    packed = getattr(rows_index, "packed", rows_index)
    if not isinstance(packed, PackedRows):
        return rows_index
    return RowsIndex(packed.indptr, packed.item_ids(), packed.scores, packed.n_items)


def matrix_of(op: str, rows_index: Any, check: bool) -> RowsIndex:
    """The four attributes of a matrix, with dtypes and shapes checked; with `check`, all that a search checks.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `code_rows_search`.
    """
    missing = [name for name in RowsIndex._fields if not hasattr(rows_index, name)]
    if missing:
        raise TypeError(
            f"{op}: rows_index must have attributes {', '.join(RowsIndex._fields)},"
            f" got {type(rows_index).__name__} without {missing[0]}"
        )
    indptr, item_ids, scores, n_items = (getattr(rows_index, name) for name in RowsIndex._fields)
    _check.tensor(op, "item_ids", item_ids, dtypes=_check.INDEX_DTYPES, shape=["T"])
    device = item_ids.device
    _check.tensor(op, "indptr", indptr, dtypes=[torch.int64], shape=["R + 1"], device=device)
    _check.tensor(op, "scores", scores, dtypes=[torch.float32], shape=list(item_ids.shape), device=device)
    _check.at_least(op, "n_items", n_items, 0)
    if indptr.shape[0] == 0:
        raise ValueError(f"{op}: indptr must have one entry more than there are rows, got none")
    matrix = RowsIndex(indptr, item_ids, scores.detach(), n_items)
    if check:
        code_rows_search(matrix, torch.empty((0, 0), dtype=torch.int64), 0)
    return matrix


def check_query(
    n_rows: int,
    n_items: int,
    device: torch.device,
    rows: torch.Tensor,
    k: int,
    weights: torch.Tensor | None,
    row_bias: torch.Tensor | None,
    mask: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Check dtypes and shapes of a query; give back weights and row_bias without gradient, and the mask as a tensor."""
    _check.tensor(_NAME, "rows", rows, dtypes=[torch.int64], shape=["Q", "Ku"], device=device)
    if weights is not None:
        _check.tensor(_NAME, "weights", weights, dtypes=[torch.float32], shape=list(rows.shape), device=device)
        weights = weights.detach()
    if row_bias is not None:
        _check.tensor(_NAME, "row_bias", row_bias, dtypes=[torch.float32], shape=[n_rows], device=device)
        row_bias = row_bias.detach()
        _check.finite(_NAME, "row_bias", row_bias)
    if mask is not None:
        mask = _item_mask.tensor_of(_NAME, mask, rows.shape[0], n_items, device)
    _check.at_least(_NAME, "k", k, 0)
    return weights, row_bias, mask


def code_rows_search(
    rows_index: Any,
    rows: torch.Tensor,
    k: int,
    *,
    weights: torch.Tensor | None = None,
    row_bias: torch.Tensor | None = None,
    mask: Any = None,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a few sparse rows for each query and find the k best items, exactly.

    .. math:: y_{q,i} = \\sum_{j=0}^{K_u-1} w_{q,j} S_{r_{q,j},i} + c_{r_{q,j}} \\quad (\\text{rows that hold } i)

    Parameters
    ----------
    rows_index : PackedRows, RowsIndex, or an object with a `packed` or with indptr, item_ids, scores, n_items
        The sparse matrix S [R, N]. A packed one (`pack_rows`) lets the search pass over most of the named rows.
    rows : Tensor [Q, Ku], int64
        The rows to add, in [0, R), or -1 for an absent one. A row named twice counts twice.
    k : int
        Results a query; may exceed N, may be 0.
    weights : Tensor [Q, Ku], float32, optional
        1 where left out. Weights of absent rows are not used but must be finite.
    row_bias : Tensor [R], float32, optional
        c, added once for each naming of a row to each of its items, not multiplied by the weight: with one row a
        cluster, items' own biases as scores and the cluster's score as c, this is the merge sort of streaming VQ.
    mask : optional
        The items allowed, for all queries or for each; tested inside the search. bool [N] or [Q, N]; bits, lowest
        first, uint8 [ceil(N / 8)] or [Q, ceil(N / 8)]; or a bitmap, whose `words` are int64 [ceil(N / 64)] or one row a
        query.
    check : bool
        False skips the checks of the matrix, which must have passed before. The query is always checked.

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
        A shape that does not fit; ids that do not rise within a row; a score, a weight or a bias that is not finite; a
        packed matrix that is not as `pack_rows` makes it.
    IndexError
        A row or an item id out of range.

    Notes
    -----
    Each product, each bias and each sum is rounded to float32, in the order of the rows. Scores and ids never depend on
    k, Q, the number of threads, the instruction set, or on whether the matrix is packed. Work is proportional to the
    length of rows, never to N. In a packed matrix groups of items whose bound, a sum of 8-bit upper bounds, stays
    below the k-th best are not added up; in an unpacked one all postings are, in tiles of 32,768 ids. Inference only:
    weights and scores that require a gradient are detached. Backends: CPU.

    References
    ----------
    Su et al., "Beyond Two-Tower Matching: Learning Sparse Retrievable Cross-Interactions for Recommendation", SIGIR
    2023. Mallia, Suel, Tonellotto, "Faster Learned Sparse Retrieval with Block-Max Pruning", SIGIR 2024.
    """
    packed = getattr(rows_index, "packed", rows_index)
    if isinstance(packed, PackedRows):
        query = check_query(
            packed.lowest.shape[0], packed.n_items, packed.scores.device, rows, k, weights, row_bias, mask
        )
        return packed_rows.search(packed, rows, k, *query, bool(check))
    matrix = matrix_of(_NAME, rows_index, False)
    query = check_query(len(matrix.indptr) - 1, matrix.n_items, matrix.scores.device, rows, k, weights, row_bias, mask)
    return _op(*matrix[:3], rows, matrix.n_items, k, *query, bool(check))


code_rows_search.reference = reference
