"""Exact top-k over coded items for tables of few entries, through a list of items for each code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel

_NAME = "code_postings"
_CODES = (torch.uint8, torch.uint16)
_KERNELS = {torch.uint8: kernel("code_postings_uint8"), torch.uint16: kernel("code_postings_uint16")}
_BUILD = {torch.uint8: kernel("code_postings_build_uint8"), torch.uint16: kernel("code_postings_build_uint16")}
_COUNT = {torch.uint8: kernel("code_postings_count_uint8"), torch.uint16: kernel("code_postings_count_uint16")}
_check_entries = kernel("code_postings_check")
_TILE = _C.code_postings_tile


class PostingLists(NamedTuple):
    """For each code of each codebook the positions of the items that have it; made by `posting_lists`.

    They take 4 M bytes an item, and 4 more where there is an `order`.

    Attributes
    ----------
    indptr : Tensor [M K + 1], int64
        The list of code c of codebook m is `positions[indptr[m K + c]:indptr[m K + c + 1]]`.
    positions : Tensor [M N], int32
        Rising within a list.
    order : Tensor [N], int32, or None
        The positions by (bias descending, id); None where they are in this order anyway.
    """

    indptr: torch.Tensor
    positions: torch.Tensor
    order: torch.Tensor | None


def _refuse_fewer(op: str, packed: Any, n_codes: int) -> None:
    # A count or a list is written to for every code there is.
    least = getattr(packed, "n_codes", n_codes)
    if n_codes < least:
        raise ValueError(f"{op}: n_codes must be at least {least}, as the items have, got {n_codes}")


def posting_counts(packed: Any, n_codes: int) -> torch.Tensor:
    """How many items have each code: int64 [M K]. What a query's entries add up to is what `code_postings` reads."""
    _refuse_fewer("posting_counts", packed, n_codes)
    planes, size, books = packed.planes, packed.size, packed.planes.shape[1]
    counts = torch.empty(books * n_codes, dtype=torch.int64)
    _COUNT[planes.dtype](planes.data_ptr(), size, books, n_codes, counts.data_ptr())
    return counts


def posting_lists(packed: Any, n_codes: int) -> PostingLists:
    """The lists of `packed` (a `PackedCodes`), whose codes must all be below `n_codes`."""
    _refuse_fewer("posting_lists", packed, n_codes)
    planes, size, books = packed.planes, packed.size, packed.planes.shape[1]
    if size >= 2**31:
        raise ValueError(f"posting_lists: there must be fewer than 2**31 items, got {size}")
    indptr = torch.empty(books * n_codes + 1, dtype=torch.int64)
    positions = torch.empty(books * size, dtype=torch.int32)
    starts = torch.empty(books * n_codes, dtype=torch.int64)
    _BUILD[planes.dtype](
        planes.data_ptr(), size, books, n_codes, indptr.data_ptr(), positions.data_ptr(), starts.data_ptr()
    )
    return PostingLists(indptr, positions, _order(packed))


def _order(packed: Any) -> torch.Tensor | None:
    size = packed.size
    if packed.bias is None and packed.ids is None:
        if packed.slots is None:
            return None
        order = torch.empty(size, dtype=torch.int32)
        order[packed.slots[:size].long()] = torch.arange(size, dtype=torch.int32)
        return order
    names = np.arange(size) if packed.slots is None else packed.slots.numpy()[:size]
    if packed.ids is not None:
        names = packed.ids.numpy()[names]
    keys = (names,) if packed.bias is None else (names, -packed.bias.numpy()[:size])
    return torch.from_numpy(np.lexsort(keys).astype(np.int32))


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _cpu(planes, indptr, positions, order, codes, values, offsets, k, size, slots, bias, ids, live, mask):
    tensors = (planes, indptr, positions, order, codes, values, offsets, slots, bias, ids, live, mask)
    planes, indptr, positions, order, codes, values, offsets, slots, bias, ids, live, mask = map(_contiguous, tensors)
    queries, books = offsets.shape[0] - 1, planes.shape[1]
    entries = (indptr.shape[0] - 1) // books
    scores = torch.empty((queries, k), dtype=torch.float32)
    found = torch.empty((queries, k), dtype=torch.int64)
    longest = int((offsets[1:] - offsets[:-1]).max()) if queries else 0
    threads = _C.max_threads()
    tile = min(_TILE, -(-size // 64) * 64)
    # Sums, which of them were touched, and the codes named: 4 bytes, a bit, and a bit each.
    zeros = torch.zeros(threads * (4 * tile + tile // 8 + -(-books * entries // 64) * 8), dtype=torch.uint8)
    cursors = torch.empty(threads * longest, dtype=torch.int64)
    heaps = torch.empty((threads * min(k, size), 2), dtype=torch.int64)
    _KERNELS[planes.dtype](
        planes=planes.data_ptr(),
        indptr=indptr.data_ptr(),
        positions=positions.data_ptr(),
        order=_address(order),
        slots=_address(slots),
        bias=_address(bias),
        ids=_address(ids),
        live=_address(live),
        mask=_address(mask),
        mask_stride=0 if mask is None or mask.dim() == 1 else mask.shape[1],
        codes=codes.data_ptr(),
        values=values.data_ptr(),
        offsets=offsets.data_ptr(),
        zeros=zeros.data_ptr(),
        cursors=cursors.data_ptr(),
        heaps=heaps.data_ptr(),
        scores=scores.data_ptr(),
        found=found.data_ptr(),
        threads=threads,
        tile=tile,
        queries=queries,
        items=size,
        books=books,
        entries=entries,
        longest=longest,
        k=k,
    )
    return scores, found


def _fake(planes, indptr, positions, order, codes, values, offsets, k, size, slots, bias, ids, live, mask):
    shape = (offsets.shape[0] - 1, k)
    return values.new_empty(shape, dtype=torch.float32), values.new_empty(shape, dtype=torch.int64)


def _bits(words: torch.Tensor, size: int) -> torch.Tensor:
    """Bit words [..., W] as bool [..., size]."""
    places = torch.arange(size)
    return (words[..., places >> 6] >> (places & 63) & 1).bool()


def _expected(planes, indptr, positions, order, codes, values, offsets, k, size, slots, bias, ids, live, mask):
    books = planes.shape[1]
    entries = (indptr.shape[0] - 1) // books
    queries = offsets.shape[0] - 1
    table = values.new_zeros((queries, books * entries))
    for query in range(queries):
        own = slice(int(offsets[query]), int(offsets[query + 1]))
        table[query, codes[own]] = values[own]
    rows = planes.long().permute(0, 2, 1).reshape(-1, books)[:size]
    total = table[:, rows[:, 0]]
    for book in range(1, books):
        total = total + table[:, book * entries + rows[:, book]]
    if bias is not None:
        total = total + bias
    names = torch.arange(size) if slots is None else slots.long()
    allowed = total > -torch.inf
    if live is not None:
        allowed = allowed & _bits(live, size)
    if mask is not None:
        allowed = allowed & _bits(mask, size)[..., names]
    names = names if ids is None else ids[names]
    total = total.masked_fill(~allowed, -torch.inf)
    by_id = names.argsort()
    total, best = total[:, by_id].sort(dim=1, descending=True, stable=True)
    found = names[by_id][best].masked_fill(total == -torch.inf, -1)
    pad = (0, max(k - size, 0))
    return (
        torch.nn.functional.pad(total[:, :k], pad, value=-torch.inf),
        torch.nn.functional.pad(found[:, :k], pad, value=-1),
    )


class _Packed(NamedTuple):
    planes: torch.Tensor
    size: int
    slots: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    live: torch.Tensor | None = None


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for queries, size, books, entries in ((0, 3, 2, 4), (2, 0, 2, 4), (1, 1, 1, 1), (3, 70, 5, 16)):
        blocks = -(-size // 64)
        planes = torch.randint(entries, (blocks, books, 64), generator=generator).to(torch.uint8)
        bias = torch.randn(size, generator=generator)
        slots = torch.randperm(size, generator=generator).to(torch.int32)
        ids = torch.randperm(size, generator=generator) + 100
        live = torch.randint(-(2**62), 2**62, (blocks,), generator=generator)
        mask = torch.randint(-(2**62), 2**62, (queries, blocks), generator=generator)
        codes = torch.arange(0, books * entries, 3).repeat(queries)
        offsets = torch.arange(queries + 1) * len(range(0, books * entries, 3))
        values = torch.randn(len(codes), generator=generator)
        for packed in (_Packed(planes, size), _Packed(planes, size, slots, bias, ids, live)):
            lists = posting_lists(packed, entries)
            yield (packed.planes, *lists, codes, values, offsets, 4, *packed[1:], None)
            yield (packed.planes, *lists, codes, values, offsets, 90, *packed[1:], mask)


_op = define(
    "code_postings(Tensor planes, Tensor indptr, Tensor positions, Tensor? order, Tensor codes, Tensor values,"
    " Tensor offsets, SymInt k, SymInt size, Tensor? slots, Tensor? bias, Tensor? ids, Tensor? live, Tensor? mask)"
    " -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
)


def _mask_words(mask: Any, queries: int, size: int) -> torch.Tensor | None:
    if mask is None:
        return None
    words = getattr(mask, "words", mask)
    if words is not mask and getattr(mask, "size", size) != size:
        raise ValueError(f"{_NAME}: mask must be a bitmap of {size} items, got one of {mask.size}")
    wide = -(-size // 64)
    shape = [wide] if isinstance(words, torch.Tensor) and words.dim() == 1 else [queries, wide]
    return _check.tensor(_NAME, "mask", words, dtypes=[torch.int64], shape=shape)


def code_postings(
    lists: PostingLists, packed: Any, table: Any, k: int, *, mask: Any = None, check: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k best coded items for each query whose table has few entries, exactly.

    .. math:: y_{q,i} = \\sum_{m=0}^{M-1} t_{q,m,c_{i,m}} + b_i

    where t is 0 for a code that the query does not name. Reads only the lists of the codes it names.

    Parameters
    ----------
    lists : PostingLists
        Of `packed` as it is now, bias and order of items included.
    packed : PackedCodes
        The items, with slots, bias, ids and live bits as `code_search` reads them.
    table : SparseTable
        Entries of each query, `codes` = m K + c rising within a query, values finite or -inf.
    k : int
        Results a query; may exceed the number of items, may be 0.
    mask : Bitmap, or int64 words [W] or [Q, W], optional
        The slots allowed, one bit each, for all queries or for each.
    check : bool
        False leaves the entries unchecked, which must have been checked before: a wrong one would be read outside the
        lists.

    Returns
    -------
    scores : Tensor [Q, k], float32
    ids : Tensor [Q, k], int64
        As `code_search` over the same table, bit for bit, whatever the signs of the values.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        A shape that does not fit; entries that do not rise within a query; NaN or +inf among the values; a negative k.
    IndexError
        An entry outside [0, M K).

    Notes
    -----
    Items that no list holds score 0, plus their bias: the best of these are found through `lists.order`, which is
    quick unless a mask allows few of them. Backends: CPU. No gradient.

    References
    ----------
    Moffat, Zobel, "Self-indexing inverted files for fast text retrieval", TOIS 14, 1996.
    """
    planes, size = packed.planes, packed.size
    _check.tensor(_NAME, "planes", planes, dtypes=_CODES, shape=["P", "M", 64])
    blocks, books = planes.shape[:2]
    codes, values, offsets = table
    _check.tensor(_NAME, "offsets", offsets, dtypes=[torch.int64], shape=["Q + 1"])
    _check.tensor(_NAME, "codes", codes, dtypes=[torch.int64], shape=["T"])
    _check.tensor(_NAME, "values", values, dtypes=[torch.float32], shape=[len(codes)])
    _check.at_least(_NAME, "k", k, 0)
    _check.tensor(_NAME, "indptr", lists.indptr, dtypes=[torch.int64], shape=["M K + 1"])
    _check.tensor(_NAME, "positions", lists.positions, dtypes=[torch.int32], shape=[books * size])
    if size > 64 * blocks or (len(lists.indptr) - 1) % books:
        raise ValueError(f"{_NAME}: planes must have {-(-size // 64)} blocks, got shape {list(planes.shape)}")
    parts = []
    for name, value, kind, length in (
        ("order", lists.order, torch.int32, size),
        ("slots", packed.slots, torch.int32, size),
        ("bias", packed.bias, torch.float32, size),
        ("ids", packed.ids, torch.int64, size),
        ("live", packed.live, torch.int64, -(-size // 64)),
    ):
        if value is not None:
            value = value[:length]  # there may be room for more
            _check.tensor(_NAME, name, value, dtypes=[kind], shape=[length])
        parts.append(value)
    order, *rest = parts
    if check:
        refuse_faults(_NAME, table, len(lists.indptr) - 1)
    words = _mask_words(mask, len(offsets) - 1, size)
    return _op(planes, lists.indptr, lists.positions, order, codes, values.detach(), offsets, k, size, *rest, words)


def refuse_faults(op: str, table: Any, limit: int, owner: str = "") -> None:
    """Raise where a sparse table has an entry outside [0, limit) or out of order, NaN or +inf, or wrong offsets."""
    codes, values, offsets = (part.contiguous() for part in table)
    wrong, _ = _C.check_offsets(offsets.data_ptr(), len(offsets), len(codes))
    if wrong >= 0 or len(offsets) == 0:
        raise ValueError(f"{op}: {owner}offsets must rise from 0 to {len(codes)}")
    outside, unsorted, bad = _check_entries(
        codes.data_ptr(), values.data_ptr(), len(codes), offsets.data_ptr(), len(offsets) - 1, limit
    )
    if outside >= 0:
        raise _check.outside(op, f"{owner}codes", outside, int(codes[outside]), limit)
    if unsorted >= 0:
        raise ValueError(
            f"{op}: {owner}codes[{unsorted}] must be above {int(codes[unsorted - 1])}, the one before it,"
            f" got {int(codes[unsorted])}"
        )
    if bad >= 0:
        raise ValueError(f"{op}: {owner}values[{bad}] must be finite or -inf, got {float(values[bad])}")


def reference(
    lists: PostingLists, packed: Any, table: Any, k: int, *, mask: Any = None, check: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    codes, values, offsets = table
    words = None if mask is None else getattr(mask, "words", mask)
    size = packed.size
    parts = (None if part is None else part[:size] for part in (packed.slots, packed.bias, packed.ids))
    return _expected(packed.planes, *lists, codes, values, offsets, k, size, *parts, packed.live, words)


code_postings.reference = reference


def _reference_counts(packed: Any, n_codes: int) -> torch.Tensor:
    """The same in plain torch."""
    codes = packed.planes.long().transpose(1, 2).flatten(0, 1)[: packed.size]
    return torch.cat([torch.bincount(column, minlength=n_codes) for column in codes.T])


def _reference_lists(packed: Any, n_codes: int) -> PostingLists:
    """The same in plain torch."""
    codes = packed.planes.long().transpose(1, 2).flatten(0, 1)[: packed.size]
    # A stable sort keeps the positions of a list ascending.
    positions = torch.cat([column.argsort(stable=True) for column in codes.T]).int()
    ends = _reference_counts(packed, n_codes).cumsum(0)
    return PostingLists(torch.nn.functional.pad(ends, (1, 0)), positions, _order(packed))


posting_counts.reference = _reference_counts
posting_lists.reference = _reference_lists
