"""Exact top-k over items coded by M codebooks, given a table of scores per query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from recfast.ops import _check
from recfast.ops._library import define, kernel, unwatched
from recfast.ops.packed_codes import (
    CODE_DTYPES,
    PackedCodes,
    SparseTable,
    check_words,
    mask_words,
    pack_codes,
    pack_mask,
    permute_mask,
    unpack_codes,
    unpack_live,
    worth_permuting,
)

_NAME = "code_search"
_TABLES = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = {torch.uint8: kernel("code_search_uint8"), torch.uint16: kernel("code_search_uint16")}
_heaps = kernel("code_search_heaps")
_PACKED = {torch.uint8: kernel("code_search_packed_uint8"), torch.uint16: kernel("code_search_packed_uint16")}
_SCRATCH = {
    torch.uint8: kernel("code_search_packed_scratch_uint8"),
    torch.uint16: kernel("code_search_packed_scratch_uint16"),
}
# As numbered in packed.h.
_PLANS = {"scan": 0, "block_max": 1, "scalar": 2}
# What is wrong with a table, as numbered in packed.h.
_OFFSET, _ENTRY, _UNORDERED, _VALUE = 1, 2, 3, 4
_LINE = 64


class Codes(NamedTuple):
    """Items as `code_search` reads them. Any object with these four attributes serves as well.

    Attributes
    ----------
    codes : Tensor [N, M], uint8 or uint16
    bias : Tensor [N], float32, optional
        Added to the score of each item after the codebooks' terms.
    ids : Tensor [N], int64, optional
        What an item is called in the answer, at least 0; its position where left out.
    live : Tensor [N], bool, optional
        Items that are False do not exist (a tombstone), whatever a mask says.
    """

    codes: torch.Tensor
    bias: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    live: torch.Tensor | None = None


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _cpu(codes, table, k, bias, ids, live, mask, check):
    codes, table, bias, ids, live, mask = map(_contiguous, (codes, table, bias, ids, live, mask))
    queries, books, entries = table.shape
    items = codes.shape[0]
    scores = torch.empty((queries, k), dtype=torch.float32)
    found = torch.empty((queries, k), dtype=torch.int64)
    heaps = _heaps(queries, items)
    # An entry of a heap is a score and an id, 16 bytes.
    scratch = torch.empty((heaps * min(k, items), 2), dtype=torch.int64)
    in_table, in_codes, in_bias = _KERNELS[codes.dtype](
        codes.data_ptr(),
        table.data_ptr(),
        _address(bias),
        _address(ids),
        _address(live),
        _address(mask),
        0 if mask is None or mask.dim() == 1 else items,
        scratch.data_ptr(),
        heaps,
        scores.data_ptr(),
        found.data_ptr(),
        queries,
        items,
        books,
        entries,
        k,
        check,
    )
    if in_table >= 0:
        rest, entry = divmod(in_table, entries)
        query, book = divmod(rest, books)
        raise ValueError(_not_a_score(f"table[{query}, {book}, {entry}]", table[query, book, entry]))
    if in_codes >= 0:
        item, book = divmod(in_codes, books)
        raise _check.outside(_NAME, "codes", f"{item}, {book}", int(codes[item, book]), entries)
    if in_bias >= 0:
        raise ValueError(_not_a_score(f"bias[{in_bias}]", bias[in_bias]))
    return scores, found


def _not_a_score(place: str, value: torch.Tensor) -> str:
    return f"{_NAME}: {place} must be finite or -inf, got {float(value)}"


def _fake(codes, table, k, bias, ids, live, mask, check):
    shape = (table.shape[0], k)
    return table.new_empty(shape, dtype=torch.float32), table.new_empty(shape, dtype=torch.int64)


def _expected(codes, table, k, bias, ids, live, mask, check):
    return reference(Codes(codes, bias, ids, live), table, k, mask=mask)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for queries, items, books, entries in ((0, 3, 2, 4), (2, 0, 2, 4), (1, 1, 1, 1), (3, 70, 5, 16)):
        codes = torch.randint(entries, (items, books), generator=generator).to(torch.uint8)
        table = torch.randn(queries, books, entries, generator=generator)
        bias = torch.randn(items, generator=generator)
        ids = torch.randperm(items, generator=generator) + 100
        live = torch.rand(items, generator=generator) < 0.9
        mask = torch.rand(queries, items, generator=generator) < 0.5
        yield codes, table, 4, None, None, None, None, True
        yield codes, table, 4, bias, ids, live, mask, True
        yield codes, table, 0, None, None, None, mask.any(0), False


def _parts(index: Any) -> Codes:
    if isinstance(index, PackedCodes):
        bias = index.bias
        if bias is not None:
            bias = bias[: index.size]
            bias = bias if index.positions is None else bias[index.positions[: index.size].long()]
        ids = None if index.ids is None else index.ids[: index.size]
        return Codes(unpack_codes(index), bias, ids, unpack_live(index))
    if isinstance(index, torch.Tensor):
        return Codes(index)
    if isinstance(index, Codes):
        return index
    if hasattr(index, "codes"):
        return Codes(index.codes, *(getattr(index, name, None) for name in ("bias", "ids", "live")))
    raise TypeError(f"{_NAME}: index must be a tensor of codes or have an attribute codes, got {type(index).__name__}")


def reference(
    index: Any,
    table: torch.Tensor | SparseTable,
    k: int,
    *,
    mask: torch.Tensor | None = None,
    plan: str = "auto",
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, in the dtype of `table`; `mask` is bool."""
    codes, bias, ids, live = _parts(index)
    items, books = codes.shape
    if isinstance(table, SparseTable):
        entries, queries = index.n_codes, len(table.offsets) - 1
        dense = torch.zeros(queries, books * entries)
        dense[torch.arange(queries).repeat_interleave(table.offsets.diff()), table.codes] = table.values
        table = dense.view(queries, books, entries)
    places = codes.long()
    total = table[:, 0, places[:, 0]]
    for book in range(1, books):
        total = total + table[:, book, places[:, book]]
    if bias is not None:
        total = total + bias.to(total.dtype)
    ids = torch.arange(items) if ids is None else ids
    allowed = total > -torch.inf
    for one in (live, mask):
        if one is not None:
            allowed = allowed & one
    total = total.masked_fill(~allowed, -torch.inf)
    # Stable: among equal scores the order of ids stays.
    by_id = ids.argsort()
    total, order = total[:, by_id].sort(dim=1, descending=True, stable=True)
    found = ids[by_id][order].masked_fill(total == -torch.inf, -1)
    pad = (0, max(k - items, 0))
    return (
        torch.nn.functional.pad(total[:, :k], pad, value=-torch.inf),
        torch.nn.functional.pad(found[:, :k], pad, value=-1),
    )


_op = define(
    "code_search(Tensor codes, Tensor table, SymInt k, Tensor? bias, Tensor? ids, Tensor? live, Tensor? mask,"
    " bool check) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
)


def _cpu_packed(
    planes, size, n_codes, slots, positions, bias, levels, edges, ids, live, held,
    table, codes, values, offsets, mask, by_position, k, plan,
):  # fmt: skip
    books = planes.shape[1]
    queries = len(offsets) - 1 if table is None else table.shape[0]
    table, codes, values, offsets, mask = map(_contiguous, (table, codes, values, offsets, mask))
    scores = torch.empty((queries, k), dtype=torch.float32)
    found = torch.empty((queries, k), dtype=torch.int64)
    items = (
        *map(_address, (planes, slots, bias, levels, edges, ids, live, held)),
        0 if held is None else held.shape[3],
        size,
        books,
        n_codes,
    )
    request = (
        *map(_address, (table, codes, values, offsets, mask)),
        0 if mask is None or mask.dim() == 1 else mask.shape[1],
        by_position,
        queries,
        k,
        plan,
    )
    scratch = torch.empty(_SCRATCH[planes.dtype](items, request) + _LINE, dtype=torch.uint8)
    base = scratch.data_ptr()
    kind, position = _PACKED[planes.dtype](
        items, request, 0 if codes is None else len(codes), base + -base % _LINE, scores.data_ptr(), found.data_ptr()
    )
    if kind:
        raise _fault(kind, position, table, codes, values, offsets, books * n_codes)
    return scores, found


def _fault(kind, position, table, codes, values, offsets, entries) -> Exception:
    """The error for what the kernel found wrong with a table."""
    if kind == _OFFSET:
        if position == 0:
            return ValueError(f"{_NAME}: table.offsets[0] must be 0, got {int(offsets[0])}")
        here = f"table.offsets[{position}] = {int(offsets[position])}"
        if int(offsets[position]) < int(offsets[position - 1]):
            return ValueError(f"{_NAME}: {here} is below the entry before it, {int(offsets[position - 1])}")
        return ValueError(f"{_NAME}: {here} must be {len(codes)}, the number of entries")
    if kind == _ENTRY:
        return _check.outside(_NAME, "table.codes", position, int(codes[position]), entries)
    if kind == _UNORDERED:
        here = f"table.codes[{position}] = {int(codes[position])}"
        return ValueError(f"{_NAME}: {here} must be above the entry before it, {int(codes[position - 1])}")
    if table is None:
        return ValueError(_not_a_score(f"table.values[{position}]", values[position]))
    rest, entry = divmod(position, table.shape[2])
    query, book = divmod(rest, table.shape[1])
    return ValueError(_not_a_score(f"table[{query}, {book}, {entry}]", table[query, book, entry]))


def _fake_packed(
    planes, size, n_codes, slots, positions, bias, levels, edges, ids, live, held,
    table, codes, values, offsets, mask, by_position, k, plan,
):  # fmt: skip
    queries = offsets.shape[0] - 1 if table is None else table.shape[0]
    return planes.new_empty((queries, k), dtype=torch.float32), planes.new_empty((queries, k), dtype=torch.int64)


def _expected_packed(
    planes, size, n_codes, slots, positions, bias, levels, edges, ids, live, held,
    table, codes, values, offsets, mask, by_position, k, plan,
):  # fmt: skip
    packed = PackedCodes(
        planes, size, n_codes, slots, positions, bias, levels, edges, ids, live, held
    )  # fmt: skip
    if mask is not None:
        bits = (mask.unsqueeze(-1) >> torch.arange(64) & 1).flatten(-2)[..., :size].bool()
        mask = bits if not by_position or positions is None else bits[..., positions[:size].long()]
    return reference(packed, SparseTable(codes, values, offsets) if table is None else table, k, mask=mask)


def _samples_packed() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(1)
    for queries, items, books, entries in ((0, 3, 2, 4), (2, 0, 2, 4), (3, 70, 5, 16), (2, 1000, 8, 256)):
        codes = torch.randint(entries, (items, books), generator=generator).to(torch.uint8)
        table = torch.randn(queries, books, entries, generator=generator)
        bias = torch.randn(items, generator=generator)
        ids = torch.randperm(items, generator=generator) + 100
        live = torch.rand(items, generator=generator) < 0.9
        mask = pack_mask(torch.rand(queries, items, generator=generator) < 0.5)
        sparse = _sparse(table.where(torch.rand(table.shape, generator=generator) < 0.2, 0.0))
        plain = pack_codes(codes, n_codes=entries)
        full = pack_codes(codes, n_codes=entries, bias=bias, ids=ids, live=live, order="lex")
        yield *plain, table, None, None, None, None, False, 4, _PLANS["scan"]
        yield *full, table, None, None, None, mask, False, 4, _PLANS["block_max"]
        yield *full, None, *sparse, permute_mask(mask, full), True, 4, _PLANS["scalar"]


def _sparse(table: torch.Tensor) -> SparseTable:
    """A dense table [Q, M, K] by its entries that are not 0."""
    flat = table.flatten(1)
    rows, codes = flat.nonzero(as_tuple=True)
    offsets = torch.zeros(len(flat) + 1, dtype=torch.int64)
    offsets[1:] = rows.bincount(minlength=len(flat)).cumsum(0)
    return SparseTable(codes, flat[rows, codes], offsets)


_op_packed = define(
    "code_search_packed(Tensor planes, SymInt size, SymInt n_codes, Tensor? slots, Tensor? positions, Tensor? bias,"
    " Tensor? levels, Tensor? edges, Tensor? ids, Tensor? live, Tensor? held, Tensor? table,"
    " Tensor? codes, Tensor? values, Tensor? offsets, Tensor? mask, bool by_position, SymInt k, int plan)"
    " -> (Tensor, Tensor)",
    cpu=_cpu_packed,
    fake=_fake_packed,
    samples=_samples_packed,
    expected=_expected_packed,
)


def code_search(
    index: Any,
    table: torch.Tensor | SparseTable,
    k: int,
    *,
    mask: Any = None,
    plan: str = "auto",
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k best coded items for each query, exactly.

    .. math:: y_{q,i} = \\sum_{m=0}^{M-1} T_{q,m,c_{i,m}} + b_i

    Parameters
    ----------
    index : PackedCodes, Tensor [N, M] of uint8 or uint16, `Codes`, or an object with attributes codes, bias, ids, live
        The items: each has one code in [0, K) per codebook, and perhaps a bias and an id of its own. `pack_codes`
        makes a `PackedCodes`, which the fast kernels read; rows of codes are summed one by one.
    table : Tensor [Q, M, K], float32 (bfloat16 and float16 are widened first, which is exact), or SparseTable
        The score of each code for each query; -inf forbids every item that has the code. A sparse one needs
        `PackedCodes`.
    k : int
        Results a query; may exceed N, may be 0.
    mask : Tensor [N] or [Q, N], bool, optional
        The items allowed, by slot (the row of the codes given), for all queries or for each. With `PackedCodes` also
        uint8 [ceil(N / 8)] or [Q, ceil(N / 8)], one bit a slot, the lowest first; or an object with `words`, int64
        [ceil(N / 64)] or [Q, ceil(N / 64)], and perhaps a method `by_position(packed)` that returns the words by
        position (as `permute_mask` makes them) where it keeps them. Tested inside the scan.
    plan : "auto", "scan", "block_max" or "scalar"
        How to go about it; the answer is the same. "scan" bounds every item in 8 bits and sums those within reach
        (rows of codes are packed first); "block_max" passes over whole groups by their bitmaps, where
        `pack_codes(order="lex")` has made them, and scans the rest; "scalar" sums every item.
    check : bool
        False skips the checks of rows of codes (codes, bias, ids), which must have passed before: a code at or above K
        would be read outside the table. The table is always checked, `PackedCodes` never.

    Returns
    -------
    scores : Tensor [Q, k], float32
    ids : Tensor [Q, k], int64
        Sorted by score descending, ties by lowest id, padded with (-inf, -1): all of it where nothing is allowed.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        A shape that does not fit; NaN or +inf in table or bias; a negative id; a negative k; entries of a sparse table
        out of order; a plan that the index does not allow.
    IndexError
        A code outside [0, K); an entry of a sparse table outside [0, M K).

    Notes
    -----
    The score is the float32 sum in the order of the codebooks, then plus the bias, each addition rounded: bit for bit
    that of a plain loop. Scores and ids never depend on k, Q, the number of threads, the layout, the plan or the
    instruction set. An item whose sum is -inf is not allowed, and so is never returned. Inference only: a table that
    requires a gradient is detached. Backends: CPU (scalar, AVX2, AVX-512 with VBMI).

    References
    ----------
    Jégou, Douze, Schmid, "Product quantization for nearest neighbor search", PAMI 33, 2011. André, Kermarrec, Le
    Scouarnec, "Cache locality is not enough: high-performance nearest neighbor search with product quantization fast
    scan", VLDB 2015, has the bound in 8 bits.
    """
    _check.at_least(_NAME, "k", k, 0)
    if plan != "auto":
        _check.choice(_NAME, "plan", plan, ("auto", *_PLANS))
    if isinstance(index, PackedCodes):
        return _search_packed(index, table, k, mask, plan)
    codes, bias, ids, live = _parts(index)
    _check.tensor(_NAME, "codes", codes, dtypes=CODE_DTYPES, shape=["N", "M"])
    items, books = codes.shape
    if books == 0:
        raise ValueError(f"{_NAME}: codes must have at least one codebook, got shape {list(codes.shape)}")
    device = codes.device
    _check.tensor(_NAME, "table", table, dtypes=_TABLES, shape=["Q", books, "K"], device=device)
    if bias is not None:
        _check.tensor(_NAME, "bias", bias, dtypes=[torch.float32], shape=[items], device=device)
    if ids is not None:
        _check.tensor(_NAME, "ids", ids, dtypes=[torch.int64], shape=[items], device=device)
        if check and items and int(ids.min()) < 0:
            at = int((ids < 0).nonzero()[0])
            raise ValueError(f"{_NAME}: ids[{at}] must be at least 0, got {int(ids[at])}")
    if live is not None:
        _check.tensor(_NAME, "live", live, dtypes=[torch.bool], shape=[items], device=device)
    if mask is not None:
        shape = [items] if isinstance(mask, torch.Tensor) and mask.dim() == 1 else [table.shape[0], items]
        _check.tensor(_NAME, "mask", mask, dtypes=[torch.bool], shape=shape, device=device)
    if plan == "block_max":
        raise ValueError(f"{_NAME}: plan block_max needs the bitmaps of pack_codes(order='lex'), and rows have none")
    if plan == "scan" and 1 <= table.shape[2] <= 65536:
        packed = pack_codes(codes, n_codes=table.shape[2], bias=bias, ids=ids, live=live)
        return _search_packed(packed, table, k, mask, plan)
    bias = None if bias is None else bias.detach()
    return _op(codes, table.detach().float(), k, bias, ids, live, mask, bool(check))


def _search_packed(packed: PackedCodes, table: Any, k: int, mask: Any, plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    books = packed.planes.shape[1]
    if isinstance(table, SparseTable):
        dense, (codes, values, offsets) = None, table
        _check.tensor(_NAME, "table.codes", codes, dtypes=[torch.int64], shape=["nnz"])
        _check.tensor(_NAME, "table.values", values, dtypes=[torch.float32], shape=[len(codes)])
        _check.tensor(_NAME, "table.offsets", offsets, dtypes=[torch.int64], shape=["Q + 1"])
        if not len(offsets):
            raise ValueError(f"{_NAME}: table.offsets must have one entry more than there are queries, got none")
        values = values.detach()
        queries = len(offsets) - 1
    else:
        _check.tensor(_NAME, "table", table, dtypes=_TABLES, shape=["Q", books, packed.n_codes])
        dense, codes, values, offsets = table.detach().float(), None, None, None
        queries = table.shape[0]
    by_position = packed.slots is None
    words = None
    if mask is not None:
        ordered = getattr(mask, "by_position", None)
        if not by_position and ordered is not None:
            # The shape first: what a mask keeps may be of a time when there were fewer items.
            mask_words(_NAME, mask, queries, packed.size)
            words, by_position = ordered(packed), True
            check_words(_NAME, mask, words, queries, packed.size)
        else:
            words = mask_words(_NAME, mask, queries, packed.size)
            if not by_position and worth_permuting(words, packed):
                words, by_position = permute_mask(words, packed), True
    if packed.held is None and plan == "block_max":
        raise ValueError(f"{_NAME}: plan block_max needs the bitmaps of pack_codes(order='lex'), and these have none")
    if plan == "auto":
        plan = "scan" if packed.held is None else "block_max"
    call = _cpu_packed if unwatched(packed.planes, values if dense is None else dense) else _op_packed
    return call(*packed, dense, codes, values, offsets, words, by_position, k, _PLANS[plan])


code_search.reference = reference
