"""Exact top-k over items coded by M codebooks, given a table of scores per query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from recfast.ops import _check
from recfast.ops._library import define, kernel

_NAME = "code_search"
_CODES = (torch.uint8, torch.uint16)
_TABLES = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = {torch.uint8: kernel("code_search_uint8"), torch.uint16: kernel("code_search_uint16")}
_heaps = kernel("code_search_heaps")


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
    if isinstance(index, torch.Tensor):
        return Codes(index)
    if isinstance(index, Codes):
        return index
    if hasattr(index, "codes"):
        return Codes(index.codes, *(getattr(index, name, None) for name in ("bias", "ids", "live")))
    raise TypeError(f"{_NAME}: index must be a tensor of codes or have an attribute codes, got {type(index).__name__}")


def reference(
    index: Any, table: torch.Tensor, k: int, *, mask: torch.Tensor | None = None, check: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, in the dtype of `table`."""
    codes, bias, ids, live = _parts(index)
    items, books = codes.shape
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


def code_search(
    index: Any, table: torch.Tensor, k: int, *, mask: torch.Tensor | None = None, check: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k best coded items for each query, exactly.

    .. math:: y_{q,i} = \\sum_{m=0}^{M-1} T_{q,m,c_{i,m}} + b_i

    Parameters
    ----------
    index : Tensor [N, M] of uint8 or uint16, `Codes`, or an object with attributes codes, bias, ids, live
        The items: each has one code in [0, K) per codebook, and perhaps a bias and an id of its own.
    table : Tensor [Q, M, K], float32 (bfloat16 and float16 are widened first, which is exact)
        The score of each code for each query; -inf forbids every item that has the code.
    k : int
        Results a query; may exceed N, may be 0.
    mask : Tensor [N] or [Q, N], bool, optional
        The items allowed, by position, for all queries or for each. Tested inside the scan.
    check : bool
        False skips the checks of the index (codes, bias, ids), which must have passed before: a code at or above K
        would be read outside the table. The table is always checked.

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
        A shape that does not fit; NaN or +inf in table or bias; a negative id; a negative k.
    IndexError
        A code outside [0, K).

    Notes
    -----
    The score is the float32 sum in the order of the codebooks, then plus the bias, each addition rounded: bit for bit
    that of a plain loop. Scores and ids never depend on k, Q, the number of threads or the instruction set. An item
    whose sum is -inf is not allowed, and so is never returned. Inference only: a table that requires a gradient is
    detached. Backends: CPU.

    References
    ----------
    Jégou, Douze, Schmid, "Product quantization for nearest neighbor search", PAMI 33, 2011.
    """
    codes, bias, ids, live = _parts(index)
    _check.tensor(_NAME, "codes", codes, dtypes=_CODES, shape=["N", "M"])
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
    _check.at_least(_NAME, "k", k, 0)
    bias = None if bias is None else bias.detach()
    return _op(codes, table.detach().float(), k, bias, ids, live, mask, bool(check))


code_search.reference = reference
