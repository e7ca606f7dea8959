"""Sparse rows in a layout that lets a search pass over most of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from recfast import _C
from recfast.ops import _check, _item_mask, _memory
from recfast.ops._library import define, kernel, unwatched

_NAME = "packed_rows_search"
_PACK = "pack_rows"
_NARROW = _C.PACKED_ROWS_NARROW
_GROUPS = _C.PACKED_ROWS_GROUPS
_PADDING = _C.PACKED_ROWS_PADDING
_COUNT = {torch.int32: kernel("packed_rows_count_int32"), torch.int64: kernel("packed_rows_count_int64")}
_FILL = {torch.int32: kernel("packed_rows_fill_int32"), torch.int64: kernel("packed_rows_fill_int64")}
_verify = kernel("packed_rows_verify")
_unpack = kernel("packed_rows_unpack")
_search = kernel("packed_rows_search")
_scratch = kernel("packed_rows_scratch")
_threads = kernel("max_threads")


class PackedRows(NamedTuple):
    """Sparse rows over items, as `pack_rows` lays them out: ids in groups of 2^shift, 64 groups a chunk.

    P is the number of chunks, G the number of groups that hold something, of all rows together, L the number of levels.

    Attributes
    ----------
    indptr : Tensor [R + 1], int64
    scores : Tensor [T], float32
        As in `RowsIndex`, shared with it.
    group_ptr : Tensor [R + 1], int64
        Row r has the groups `group_ptr[r]:group_ptr[r + 1]`.
    present : Tensor [R, P], int64
        Bit g of word p: the row holds something of group 64 p + g.
    starts : Tensor [R, P + 1, 2], int32
        The first posting and the first group of a chunk, counted from those of the row.
    levels : Tensor [G + 64], uint8
        1 + the lowest of the row's bounds that the group's highest score does not exceed.
    groups : Tensor [G + 1], int32 or uint16
        shift 4: 16 bits for the items and, above them, where in its chunk a group's postings begin; otherwise the
        latter alone (uint16 up to shift 8).
    locals : Tensor [T], uint8 or uint16, or None
        The place of a posting in its group (uint8 up to shift 8); None for shift 4.
    upper : Tensor [R, L], float32
        Rising bounds.
    lowest : Tensor [R], float32
        The lowest score of a row.
    n_items : int
        N.
    shift : int
    """

    indptr: torch.Tensor
    scores: torch.Tensor
    group_ptr: torch.Tensor
    present: torch.Tensor
    starts: torch.Tensor
    levels: torch.Tensor
    groups: torch.Tensor
    locals: torch.Tensor | None
    upper: torch.Tensor
    lowest: torch.Tensor
    n_items: int
    shift: int

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in self if isinstance(part, torch.Tensor))

    def item_ids(self) -> torch.Tensor:
        """The ids of all postings, int32 [T], as they were before packing."""
        ids = torch.empty(self.scores.shape, dtype=torch.int32)
        _unpack(fields_of(self), ids.data_ptr())
        return ids


def fields_of(packed: PackedRows) -> tuple[int, ...]:
    """What the kernels read; the tensors must stay alive as long as it is used."""
    addresses = (0 if part is None else part.data_ptr() for part in packed[:10])
    return (*addresses, packed.lowest.shape[0], packed.n_items, packed.upper.shape[1], packed.shift)


def shift_for(n_items: int, per_row: float) -> int:
    """Groups so wide that an average row has something in about every sixth."""
    return min(max(round(math.log2(max(n_items, 1) / max(per_row, 1) / 6)), _NARROW), _C.PACKED_ROWS_WIDEST)


def levels_for(per_row: float) -> int:
    """Bounds a row: few where a row is too short to pay for many."""
    return _C.PACKED_ROWS_LEVELS if per_row >= 512 else 15


def bytes_for(n_rows: int, n_items: int, per_row: float, shift: int) -> int:
    """The bytes of packed rows of `per_row` postings on average, at most: each posting in a group of its own."""
    groups, locals_ = _dtypes(shift)
    posting = 4 + 1 + groups.itemsize + (0 if locals_ is None else locals_.itemsize)
    chunks = -(-n_items // (_GROUPS << shift))
    row = 8 + 8 + 8 * chunks + 8 * (chunks + 1) + 4 * levels_for(per_row) + 4
    return int(n_rows * (row + per_row * posting)) + 16 + _PADDING + groups.itemsize


def _dtypes(shift: int) -> tuple[torch.dtype, torch.dtype | None]:
    """Of groups and locals."""
    if shift == _NARROW:
        return torch.int32, None
    return (torch.uint16, torch.uint8) if shift <= _C.PACKED_ROWS_BYTE_LOCALS else (torch.int32, torch.uint16)


def _checked_shift(shift: int | None, n_rows: int, n_items: int, postings: int) -> int:
    if n_items >= 2**31:
        raise ValueError(f"{_PACK}: n_items must be below 2**31, got {n_items}")
    if shift is None:
        return shift_for(n_items, postings / max(n_rows, 1))
    if not _NARROW <= shift <= _C.PACKED_ROWS_WIDEST:
        raise ValueError(f"{_PACK}: shift must lie in [{_NARROW}, {_C.PACKED_ROWS_WIDEST}], got {shift}")
    return shift


def pack_rows(rows_index: Any, *, shift: int | None = None, check: bool = True) -> PackedRows:
    """Lay out sparse rows so that `code_rows_search` can pass over most of them.

    Parameters
    ----------
    rows_index : RowsIndex, or an object with attributes indptr, item_ids, scores, n_items
        Its indptr and scores are shared, not copied; its item_ids are no longer needed afterwards.
    shift : int, optional
        2^shift ids a group, from 4 to 16. Chosen by how sparse the rows are where left out. No answer depends on it.
    check : bool
        False skips the checks of the matrix, which must have passed before.

    Returns
    -------
    PackedRows

    Raises
    ------
    TypeError, ValueError, IndexError
        What `code_rows_search` raises for such a matrix; N of 2^31 or more; a shift out of range.

    Notes
    -----
    Takes two passes over the postings and sorts the groups' highest scores of a row. Beside the four bytes of a score,
    a posting takes about four bytes where rows are dense and six where they are sparse. Backends: CPU.
    """
    from recfast.ops.code_rows import matrix_of

    matrix = matrix_of(_PACK, rows_index, check)
    indptr, item_ids, scores = (part.contiguous() for part in matrix[:3])
    n_rows, n_items, postings = len(indptr) - 1, matrix.n_items, len(scores)
    shift = _checked_shift(shift, n_rows, n_items, postings)
    chunks = -(-n_items // (_GROUPS << shift))
    per_row = postings / max(n_rows, 1)
    group_dtype, local_dtype = _dtypes(shift)
    group_ptr = torch.empty(n_rows + 1, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.uint8)
    packed = PackedRows(
        indptr=indptr,
        scores=scores,
        group_ptr=group_ptr,
        present=_memory.zeros(n_rows, chunks, dtype=torch.int64),
        starts=_memory.zeros(n_rows, chunks + 1, 2, dtype=torch.int32),
        levels=none,
        groups=none,
        locals=None if local_dtype is None else _memory.zeros(postings, dtype=local_dtype),
        upper=torch.empty((n_rows, levels_for(per_row)), dtype=torch.float32),
        lowest=torch.empty(n_rows, dtype=torch.float32),
        n_items=n_items,
        shift=shift,
    )
    _COUNT[item_ids.dtype](fields_of(packed), item_ids.data_ptr())
    groups = int(group_ptr[-1])
    packed = packed._replace(
        levels=_memory.zeros(groups + _PADDING, dtype=torch.uint8), groups=_memory.zeros(groups + 1, dtype=group_dtype)
    )
    longest = int((group_ptr[1:] - group_ptr[:-1]).max()) if n_rows else 0
    maxima = torch.empty(_threads() * 2 * longest, dtype=torch.float32)
    _FILL[item_ids.dtype](fields_of(packed), item_ids.data_ptr(), maxima.data_ptr(), longest)
    return packed


def _pack_reference(rows_index: Any, *, shift: int | None = None, check: bool = True) -> PackedRows:
    """The same in plain numpy, row by row."""
    from recfast.ops.code_rows import matrix_of

    matrix = matrix_of(_PACK, rows_index, check)
    indptr, item_ids, scores = (part.numpy() for part in matrix[:3])
    n_rows, n_items = len(indptr) - 1, matrix.n_items
    shift = _checked_shift(shift, n_rows, n_items, len(scores))
    chunks = -(-n_items // (_GROUPS << shift))
    level_count = levels_for(len(scores) / max(n_rows, 1))
    present = np.zeros((n_rows, chunks), dtype=np.uint64)
    starts = np.zeros((n_rows, chunks + 1, 2), dtype=np.int32)
    upper = np.zeros((n_rows, level_count), dtype=np.float32)
    lowest = np.zeros(n_rows, dtype=np.float32)
    groups_of_row, levels, records = [0], [], []
    for row in range(n_rows):
        part = slice(indptr[row], indptr[row + 1])
        ids, values = item_ids[part].astype(np.int64), scores[part]
        groups, first = np.unique(ids >> shift, return_index=True)
        edges = np.arange(chunks + 1) * _GROUPS
        starts[row, :, 1] = np.searchsorted(groups, edges)
        starts[row, :, 0] = np.searchsorted(ids, edges << shift)
        groups_of_row.append(len(groups))
        if not len(groups):
            continue
        np.bitwise_or.at(present[row], groups // _GROUPS, np.uint64(1) << (groups % _GROUPS).astype(np.uint64))
        record = first - starts[row, groups // _GROUPS, 0]
        if shift == _NARROW:
            record = record << 16 | np.bitwise_or.reduceat(1 << (ids & 15), first)
        records.append(record)
        maxima = np.maximum.reduceat(values, first)
        ranks = [min(2 ** min(i, 40) - 1, i * len(groups) // level_count) for i in range(level_count)]
        upper[row] = np.sort(maxima)[::-1][ranks][::-1]
        lowest[row] = values.min()
        levels.append(1 + np.searchsorted(upper[row], maxima))
    group_dtype, local_dtype = _dtypes(shift)
    as_numpy = {torch.int32: np.int32, torch.uint16: np.uint16, torch.uint8: np.uint8}
    locals_ = item_ids & ((1 << shift) - 1)
    return PackedRows(
        indptr=matrix.indptr,
        scores=matrix.scores,
        group_ptr=torch.from_numpy(np.cumsum(groups_of_row, dtype=np.int64)),
        present=torch.from_numpy(present.view(np.int64)),
        starts=torch.from_numpy(starts),
        levels=torch.from_numpy(np.concatenate([*levels, np.zeros(_PADDING)]).astype(np.uint8)),
        groups=torch.from_numpy(np.concatenate([*records, [0]]).astype(np.int64).astype(as_numpy[group_dtype])),
        locals=None if local_dtype is None else torch.from_numpy(locals_.astype(as_numpy[local_dtype])),
        upper=torch.from_numpy(upper),
        lowest=torch.from_numpy(lowest),
        n_items=n_items,
        shift=shift,
    )


pack_rows.reference = _pack_reference


def check_packed(op: str, packed: PackedRows) -> None:
    """Check that every number is such as `pack_rows` writes, so that a search can read nothing else than its arrays.

    Raises
    ------
    TypeError, ValueError
        What is not so.
    """
    n_items, shift = packed.n_items, packed.shift
    if not _NARROW <= shift <= _C.PACKED_ROWS_WIDEST:
        raise ValueError(f"{op}: shift must lie in [{_NARROW}, {_C.PACKED_ROWS_WIDEST}], got {shift}")
    if not 0 <= n_items < 2**31:
        raise ValueError(f"{op}: n_items must lie in [0, 2**31), got {n_items}")
    group_dtype, local_dtype = _dtypes(shift)
    _check.tensor(op, "indptr", packed.indptr, dtypes=[torch.int64], shape=["R + 1"])
    _check.tensor(op, "scores", packed.scores, dtypes=[torch.float32], shape=["T"])
    if len(packed.indptr) == 0:
        raise ValueError(f"{op}: indptr must have one entry more than there are rows, got none")
    rows, chunks = len(packed.indptr) - 1, -(-n_items // (_GROUPS << shift))
    _check.tensor(op, "group_ptr", packed.group_ptr, dtypes=[torch.int64], shape=[rows + 1])
    _check.tensor(op, "groups", packed.groups, dtypes=[group_dtype], shape=["G + 1"])
    groups = len(packed.groups) - 1
    _check.tensor(op, "present", packed.present, dtypes=[torch.int64], shape=[rows, chunks])
    _check.tensor(op, "starts", packed.starts, dtypes=[torch.int32], shape=[rows, chunks + 1, 2])
    _check.tensor(op, "levels", packed.levels, dtypes=[torch.uint8], shape=[groups + _PADDING])
    if local_dtype is not None:
        _check.tensor(op, "locals", packed.locals, dtypes=[local_dtype], shape=list(packed.scores.shape))
    _check.tensor(op, "upper", packed.upper, dtypes=[torch.float32], shape=[rows, "L"])
    if not 1 <= packed.upper.shape[1] <= _C.PACKED_ROWS_LEVELS:
        raise ValueError(f"{op}: upper must have 1 to {_C.PACKED_ROWS_LEVELS} columns, got {packed.upper.shape[1]}")
    _check.tensor(op, "lowest", packed.lowest, dtypes=[torch.float32], shape=[rows])
    _check.offsets(op, "indptr", packed.indptr, len(packed.scores))
    _check.offsets(op, "group_ptr", packed.group_ptr, groups)
    wrong = _verify(fields_of(packed))
    if wrong >= 0:
        raise ValueError(f"{op}: row {wrong} is not as pack_rows lays it out")


def search_packed(
    fields: tuple[int, ...],
    rows: torch.Tensor,
    k: int,
    weights: torch.Tensor | None,
    row_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The search itself, for arguments that have been checked (but rows and weights for what they hold)."""
    queries, width = rows.shape
    rows = rows.contiguous()
    weights = None if weights is None else weights.contiguous()
    row_bias = None if row_bias is None else row_bias.contiguous()
    mask = None if mask is None else mask.contiguous()
    out_scores = torch.empty((queries, k), dtype=torch.float32)
    out_ids = torch.empty((queries, k), dtype=torch.int64)
    scratch = torch.empty(_threads() * _scratch(fields, width, k) + 64, dtype=torch.uint8)
    query = (
        rows.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        0 if row_bias is None else row_bias.data_ptr(),
        *_item_mask.fields(mask),
        scratch.data_ptr(),
        out_scores.data_ptr(),
        out_ids.data_ptr(),
        queries,
        width,
        k,
    )
    in_rows, in_weights = _search(fields, query)
    if in_rows >= 0 or in_weights >= 0:
        raise wrong_query(rows, weights, in_rows, in_weights, fields[10])
    return out_scores, out_ids


def wrong_query(
    rows: torch.Tensor, weights: torch.Tensor | None, in_rows: int, in_weights: int, n_rows: int
) -> Exception:
    """The error for the flat position of a wrong row or weight."""
    name = "code_rows_search"
    if in_rows >= 0:
        query, slot = divmod(in_rows, rows.shape[1])
        return IndexError(f"{name}: rows[{query}, {slot}] = {int(rows[query, slot])} is outside [-1, {n_rows})")
    query, slot = divmod(in_weights, rows.shape[1])
    return ValueError(f"{name}: weights[{query}, {slot}] must be finite, got {float(weights[query, slot])}")


def _cpu(*arguments):
    packed = PackedRows(*(None if part is None else part.contiguous() for part in arguments[:10]), *arguments[10:12])
    rows, k, weights, row_bias, mask, check = arguments[12:]
    if check:
        check_packed("code_rows_search", packed)
    return search_packed(fields_of(packed), rows, k, weights, row_bias, mask)


def _fake(*arguments):
    scores, rows, k = arguments[1], arguments[12], arguments[13]
    shape = (rows.shape[0], k)
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int64)


def _expected(*arguments):
    from recfast.ops.code_rows import code_rows_search

    packed = PackedRows(*arguments[:12])
    rows, k, weights, row_bias, mask, _ = arguments[12:]
    mask = _item_mask.allowed(mask, rows.shape[0], packed.n_items)
    return code_rows_search.reference(packed, rows, k, weights=weights, row_bias=row_bias, mask=mask)


def _samples() -> Iterator[tuple]:
    from recfast.ops.code_rows import sample_matrices

    for (matrix, rows, weights, row_bias, mask), shift in zip(sample_matrices(), (4, 5, 9, 4), strict=True):
        packed = pack_rows(matrix, shift=shift)
        bits = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
        yield *packed, rows, 5, None, None, None, True
        yield *packed, rows, 5, weights, row_bias, mask, False
        yield *packed, rows, 0, weights, None, bits, True


_op = define(
    "packed_rows_search(Tensor indptr, Tensor scores, Tensor group_ptr, Tensor present, Tensor starts, Tensor levels,"
    " Tensor groups, Tensor? locals, Tensor upper, Tensor lowest, SymInt n_items, int shift, Tensor rows, SymInt k,"
    " Tensor? weights, Tensor? row_bias, Tensor? mask, bool check) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
)


def search(
    packed: PackedRows,
    rows: torch.Tensor,
    k: int,
    weights: torch.Tensor | None,
    row_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    check: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.ops.recfast.packed_rows_search`."""
    if (
        not check
        and unwatched(packed.scores, rows)
        and all(part is None or part.is_contiguous() for part in packed[:10])
    ):
        return search_packed(fields_of(packed), rows, k, weights, row_bias, mask)
    return _op(*packed, rows, k, weights, row_bias, mask, check)
