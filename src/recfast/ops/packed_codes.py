"""Coded items as the fast kernels of `code_search` read them: packing, edits in place, masks as bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from recfast.ops import _check
from recfast.ops._library import kernel

CODE_DTYPES = (torch.uint8, torch.uint16)
ORDERS = ("none", "lex")
_ITEMS = 64  # of a block
_GROUP = 4  # blocks of a group
_WORD = 64  # groups of a word
_LANES = 8  # words of a line, at most
_LEVELS = 256
_PLANES = {
    torch.uint8: kernel("code_search_pack_planes_uint8"),
    torch.uint16: kernel("code_search_pack_planes_uint16"),
}
_pack_mask = kernel("code_search_pack_mask")
_order_mask = kernel("code_search_order_mask")
_count_bits = kernel("code_search_count_bits")
# Masks that allow at most one item in so many are put in the order of positions for one search; with more, a bit is
# looked up for each candidate instead, and there are few of these.
_SPARSE = 32


class PackedCodes(NamedTuple):
    """Coded items in blocks of 64, made by `pack_codes`.

    An item lies at a *position*, in the order of packing; its *slot* is the row it had in the codes that were packed,
    which is what masks speak of. Arrays may be longer than `size` says, so that items can be appended.

    Attributes
    ----------
    planes : Tensor [P, M, 64], uint8 or uint16
        `planes[p, m, j]` is code m of position 64 p + j.
    size : int
        N, the positions in use.
    n_codes : int
        K; every code is below it.
    slots : Tensor [N], int32, optional
        The slot at each position; left out, the same number.
    positions : Tensor [N], int32, optional
        The position of each slot, where `slots` is given.
    bias : Tensor [N], float32, optional
        By position.
    levels : Tensor [P, 64], uint8, optional
        By position, where `bias` is given: a level whose edge is at least the bias.
    edges : Tensor [256], float32, optional
        The upper edges of the levels, ascending.
    ids : Tensor [N], int64, optional
        By slot: what an item is called. Left out, the slot.
    live : Tensor [P], int64, optional
        Bit j of word p says whether position 64 p + j holds an item. Left out, all do.
    held : Tensor [ceil(P / (256 W)), M or M + 1, 256, W], int64, optional
        Which groups of 256 positions hold a code (or, in the last row, a level): at least these. Bit j of
        `held[s, m, b, w]` speaks of group 64 (s W + w) + j and the codes c of codebook m with c >> s = b, with the
        smallest s that makes 256 of b enough. W is 8, or the smallest power of two that makes one s enough.
    """

    planes: torch.Tensor
    size: int
    n_codes: int
    slots: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    edges: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    live: torch.Tensor | None = None
    held: torch.Tensor | None = None


class SparseTable(NamedTuple):
    """Scores per query of a few codes each; a code that is not named scores 0.

    Attributes
    ----------
    codes : Tensor [nnz], int64
        `m * K + c`, ascending within a query.
    values : Tensor [nnz], float32
        Finite or -inf.
    offsets : Tensor [Q + 1], int64
        Query q has entries `offsets[q]:offsets[q + 1]`.
    """

    codes: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor


def _blocks_of(size: int) -> int:
    return -(-size // _ITEMS)


def _shift(packed: PackedCodes) -> int:
    return 0 if packed.planes.dtype == torch.uint8 else max((packed.n_codes - 1).bit_length() - 8, 0)


def pack_codes(
    codes: torch.Tensor,
    *,
    n_codes: int,
    bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
    order: str = "none",
) -> PackedCodes:
    """Lay coded items out for `code_search`.

    Parameters
    ----------
    codes : Tensor [N, M], uint8 or uint16
    n_codes : int
        K, in [1, 65536].
    bias : Tensor [N], float32, optional
        Finite or -inf.
    ids : Tensor [N], int64, optional
        At least 0.
    live : Tensor [N], bool, optional
    order : "none" or "lex"
        "lex" sorts positions by code (the first codebook first) and makes the bitmaps of `plan="block_max"`, by which
        whole groups of items are passed over. It never changes an answer.

    Returns
    -------
    PackedCodes

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        A shape that does not fit, an unknown order, NaN or +inf in `bias`, a negative id.
    IndexError
        A code outside [0, K).

    Notes
    -----
    Backends: CPU. `code_search` trusts what is packed: nothing is checked again.
    """
    op = "pack_codes"
    _check.tensor(op, "codes", codes, dtypes=CODE_DTYPES, shape=["N", "M"])
    _check.choice(op, "order", order, ORDERS)
    size, books = codes.shape
    if books == 0:
        raise ValueError(f"{op}: codes must have at least one codebook, got shape {list(codes.shape)}")
    if not 1 <= n_codes <= 65536:
        raise ValueError(f"{op}: n_codes must be in [1, 65536], got {n_codes}")
    if size >= 2**31:
        raise ValueError(f"{op}: codes must have fewer than 2**31 rows, got {size}")
    codes = codes.contiguous()
    rows = codes.numpy()
    _refuse_codes(op, rows, n_codes)
    if bias is not None:
        _check.tensor(op, "bias", bias, dtypes=[torch.float32], shape=[size])
        _refuse_bias(op, bias.detach().numpy())
    if ids is not None:
        _check.tensor(op, "ids", ids, dtypes=[torch.int64], shape=[size])
        if size and int(ids.min()) < 0:
            at = int((ids < 0).nonzero()[0])
            raise ValueError(f"{op}: ids[{at}] must be at least 0, got {int(ids[at])}")
        ids = ids.contiguous()
    if live is not None:
        _check.tensor(op, "live", live, dtypes=[torch.bool], shape=[size])
    slots = positions = None
    if order == "lex":
        slots, positions = _lexicographic(rows)
    blocks = _blocks_of(size)
    planes = torch.empty((blocks, books, _ITEMS), dtype=codes.dtype)
    _PLANES[codes.dtype](codes.data_ptr(), 0 if slots is None else slots.data_ptr(), size, books, planes.data_ptr())
    levels = edges = None
    if bias is not None:
        bias = (bias.detach() if slots is None else bias.detach()[slots.long()]).clone()
        edges = torch.from_numpy(_edges(bias.numpy()))
        levels = torch.zeros((blocks, _ITEMS), dtype=torch.uint8)
        levels.view(-1)[:size] = torch.from_numpy(_levels(bias.numpy(), edges.numpy()))
    if live is not None:
        live = pack_mask(live if slots is None else live[slots.long()])
    packed = PackedCodes(planes, size, int(n_codes), slots, positions, bias, levels, edges, ids, live)
    if order == "lex":
        packed = packed._replace(held=_held(packed))
    return packed


def _pack_reference(
    codes: torch.Tensor,
    *,
    n_codes: int,
    bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
    order: str = "none",
) -> PackedCodes:
    """The same item by item."""
    rows = codes.tolist()
    size, books = codes.shape
    slots = sorted(range(size), key=lambda slot: rows[slot]) if order == "lex" else list(range(size))
    blocks = _blocks_of(size)
    planes = torch.zeros((blocks, books, _ITEMS), dtype=torch.int32)
    rows_of_bits = books + (bias is not None)
    lanes = lanes_of(blocks)
    spans = spans_of(blocks)
    held = torch.zeros((spans, rows_of_bits, _LEVELS, lanes, _WORD), dtype=torch.bool)
    edges = levels = lives = None
    if bias is not None:
        edges, levels = torch.from_numpy(_edges(bias.numpy())), torch.zeros((blocks, _ITEMS), dtype=torch.uint8)
    if live is not None:
        lives = torch.zeros((blocks, _ITEMS), dtype=torch.bool)
    shift = 0 if codes.dtype == torch.uint8 else max((n_codes - 1).bit_length() - 8, 0)
    for position, slot in enumerate(slots):
        block, lane = divmod(position, _ITEMS)
        planes[block, :, lane] = torch.tensor(rows[slot], dtype=torch.int32)
        bits = [code >> shift for code in rows[slot]]
        if bias is not None:
            levels[block, lane] = int((edges < bias[slot]).sum())
            bits.append(int(levels[block, lane]))
        if live is not None:
            lives[block, lane] = live[slot]
        span, rest = divmod(block // _GROUP, lanes * _WORD)
        held[span, range(rows_of_bits), bits, rest // _WORD, rest % _WORD] = True
    as_slots = torch.tensor(slots, dtype=torch.int32)
    lex = order == "lex"
    return PackedCodes(
        planes.to(codes.dtype),
        size,
        n_codes,
        as_slots if lex else None,
        as_slots.argsort().int() if lex else None,
        None if bias is None else bias[as_slots.long()],
        levels,
        edges,
        ids,
        None if live is None else _mask_reference(lives).flatten(),
        _mask_reference(held).flatten(3) if lex else None,
    )


pack_codes.reference = _pack_reference


def _refuse_codes(op: str, rows: np.ndarray, n_codes: int) -> None:
    if rows.size and n_codes <= np.iinfo(rows.dtype).max and int(rows.max()) >= n_codes:
        item, book = map(int, np.argwhere(rows >= n_codes)[0])
        raise _check.outside(op, "codes", f"{item}, {book}", int(rows[item, book]), n_codes)


def _refuse_bias(op: str, bias: np.ndarray) -> None:
    wrong = ~(bias < np.inf)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"{op}: bias[{at}] must be finite or -inf, got {float(bias[at])}")


def _lexicographic(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots in the order of their codes, stable, and the inverse."""
    size = len(rows)
    slots = np.lexsort(rows.T[::-1]).astype(np.int32) if size else np.empty(0, np.int32)
    positions = np.empty_like(slots)
    positions[slots] = np.arange(size, dtype=np.int32)
    return torch.from_numpy(slots), torch.from_numpy(positions)


def _edges(bias: np.ndarray) -> np.ndarray:
    """256 ascending upper edges, so that about as many biases lie in each level; -inf has a level of its own."""
    edges = np.full(_LEVELS, -np.inf, dtype=np.float32)
    finite = np.sort(bias[bias > -np.inf])
    if finite.size:
        places = np.arange(1, _LEVELS) * finite.size // (_LEVELS - 1) - 1
        edges[1:] = finite[np.maximum(places, 0)]
    return edges


def _levels(bias: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The first level whose edge is not below the bias. The last edge must be at least every bias."""
    return np.searchsorted(edges, bias, side="left").astype(np.uint8)


def lanes_of(blocks: int) -> int:
    """The words of a line of `held`, for so many blocks."""
    words = -(-blocks // (_GROUP * _WORD))
    return min(1 << max(words - 1, 0).bit_length(), _LANES)


def spans_of(blocks: int) -> int:
    """The length of `held` for so many blocks."""
    return -(-blocks // (_GROUP * _WORD * lanes_of(blocks)))


def lines_of(present: np.ndarray, blocks: int) -> torch.Tensor:
    """`held` from which codes each group has, bool [groups, rows, 256]."""
    spans, lanes = spans_of(blocks), lanes_of(blocks)
    groups, rows, _ = present.shape
    lines = np.zeros((spans, lanes, _WORD, rows, _LEVELS), dtype=bool)
    lines.reshape(spans * lanes * _WORD, rows, _LEVELS)[:groups] = present
    # The order of bits in memory that comes of a transposed array is numpy's own affair.
    bits = np.ascontiguousarray(np.packbits(lines.transpose(0, 3, 4, 1, 2), axis=-1, bitorder="little"))
    return torch.from_numpy(bits.view(np.int64).reshape(spans, rows, _LEVELS, lanes))


def _held(packed: PackedCodes) -> torch.Tensor:
    """Which groups hold which codes and levels."""
    blocks, books, _ = packed.planes.shape
    rows = books + (packed.levels is not None)
    present = np.zeros((-(-blocks // _GROUP), rows, _LEVELS), dtype=bool)
    of = np.arange(packed.size) // (_ITEMS * _GROUP)
    planes, shift = packed.planes.numpy(), _shift(packed)
    for book in range(books):
        present[of, book, planes[:, book].reshape(-1)[: packed.size] >> shift] = True
    if packed.levels is not None:
        present[of, books, packed.levels.numpy().reshape(-1)[: packed.size]] = True
    return lines_of(present, blocks)


def unpack_codes(packed: PackedCodes) -> torch.Tensor:
    """The codes [N, M] by slot: what `pack_codes` was given, with the edits since."""
    rows = packed.planes.numpy().transpose(0, 2, 1).reshape(-1, packed.planes.shape[1])[: packed.size]
    if packed.positions is not None:
        rows = rows[packed.positions.numpy()[: packed.size]]
    return torch.from_numpy(np.ascontiguousarray(rows))


def unpack_live(packed: PackedCodes) -> torch.Tensor | None:
    """Which slots hold an item, [N] bool, or None where all do."""
    if packed.live is None:
        return None
    bits = np.unpackbits(packed.live.numpy().view(np.uint8), bitorder="little")[: packed.size].astype(bool)
    if packed.positions is not None:
        bits = bits[packed.positions.numpy()[: packed.size]]
    return torch.from_numpy(bits)


# --- edits ---


def _places(op: str, packed: PackedCodes, positions: torch.Tensor) -> np.ndarray:
    _check.tensor(op, "positions", positions, dtypes=[torch.int64], shape=["n"])
    _check.indices(op, "positions", positions, packed.size)
    return positions.numpy()


def packed_write(
    packed: PackedCodes, positions: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Give the items at `positions` other codes, in place; bitmaps keep what they had and gain the new.

    Parameters
    ----------
    packed : PackedCodes
        Its arrays must be writable, and nobody may search them meanwhile.
    positions : Tensor [n], int64
        In [0, N); of a repeated one the last stands.
    codes : Tensor [n, M], dtype of `planes`
    bias : Tensor [n], float32
        Where `packed` has a bias, optional; it stays as it is where left out.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `pack_codes` does. Nothing has been written then.
    """
    op = "packed_write"
    places = _places(op, packed, positions)
    books = packed.planes.shape[1]
    _check.tensor(op, "codes", codes, dtypes=[packed.planes.dtype], shape=[len(places), books])
    rows = codes.numpy()
    _refuse_codes(op, rows, packed.n_codes)
    if bias is not None:
        if packed.bias is None:
            raise ValueError(f"{op}: bias must be left out, since the items have none")
        _check.tensor(op, "bias", bias, dtypes=[torch.float32], shape=[len(places)])
        _refuse_bias(op, bias.detach().numpy())
    _write(packed, places, rows, None if bias is None else bias.detach().numpy())


def _write(packed: PackedCodes, places: np.ndarray, rows: np.ndarray, bias: np.ndarray | None) -> None:
    if not len(places):
        return
    books = packed.planes.shape[1]
    blocks, lanes = places // _ITEMS, places % _ITEMS
    packed.planes.numpy()[blocks, :, lanes] = rows
    if bias is not None:
        packed.bias.numpy()[places] = bias
        edges = packed.edges.numpy()
        # A bias above all edges lifts the last one, which stays an upper edge of what the level had.
        edges[-1] = max(edges[-1], bias.max())
        levels = _levels(bias, edges)
        packed.levels.numpy()[blocks, lanes] = levels
    if packed.held is None:
        return
    words = packed.held.numpy().view(np.uint64)
    shifted = rows >> _shift(packed)
    for book in range(books):
        _set_bits(words[:, book], blocks, shifted[:, book])
    if bias is not None:
        _set_bits(words[:, books], blocks, levels)


def _set_bits(lines: np.ndarray, blocks: np.ndarray, codes: np.ndarray) -> None:
    """Notes in `lines` [spans, 256, lanes] that each of `blocks` has a code."""
    words, bits = np.divmod(blocks // _GROUP, _WORD)
    spans, lanes = np.divmod(words, lines.shape[2])
    np.bitwise_or.at(lines, (spans, codes, lanes), np.uint64(1) << bits.astype(np.uint64))


def packed_remove(packed: PackedCodes, positions: torch.Tensor) -> PackedCodes:
    """Clear the live bits of `positions` (Tensor [n], int64), in place; `live` is made where there is none yet.

    Returns
    -------
    PackedCodes
        The same arrays, with `live`.
    """
    places = _places("packed_remove", packed, positions)
    packed = _with_live(packed)
    words = packed.live.numpy().view(np.uint64)
    np.bitwise_and.at(words, places // _ITEMS, ~(np.uint64(1) << (places % _ITEMS).astype(np.uint64)))
    return packed


def packed_restore(packed: PackedCodes, positions: torch.Tensor) -> PackedCodes:
    """Set the live bits of `positions` (Tensor [n], int64), in place."""
    places = _places("packed_restore", packed, positions)
    if packed.live is not None:
        words = packed.live.numpy().view(np.uint64)
        np.bitwise_or.at(words, places // _ITEMS, np.uint64(1) << (places % _ITEMS).astype(np.uint64))
    return packed


def _with_live(packed: PackedCodes) -> PackedCodes:
    if packed.live is not None:
        return packed
    words = torch.full((packed.planes.shape[0],), -1, dtype=torch.int64)
    return packed._replace(live=words)


def packed_append(
    packed: PackedCodes,
    codes: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> PackedCodes:
    """Append items after the last position, in the order given; their slots are the next ones.

    Parameters
    ----------
    packed : PackedCodes
    codes : Tensor [n, M], dtype of `planes`
    bias : Tensor [n], float32
        Where `packed` has a bias, and only there.
    ids : Tensor [n], int64
        Where `packed` has ids, and only there.

    Returns
    -------
    PackedCodes
        With n items more. Arrays are shared with `packed` where they had room, and are a quarter longer than they must
        be where they are new: many small appends cost as much as one large one.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `pack_codes` does. Nothing has been written then.
    """
    op = "packed_append"
    books = packed.planes.shape[1]
    _check.tensor(op, "codes", codes, dtypes=[packed.planes.dtype], shape=["n", books])
    rows = codes.numpy()
    _refuse_codes(op, rows, packed.n_codes)
    count, start = len(rows), packed.size
    for name, value, dtype in (("bias", bias, torch.float32), ("ids", ids, torch.int64)):
        if (value is None) != (getattr(packed, name) is None):
            word = "given" if value is None else "left out"
            raise ValueError(f"{op}: {name} must be {word}, as the items had {'some' if value is None else 'none'}")
        if value is not None:
            _check.tensor(op, name, value, dtypes=[dtype], shape=[count])
    if bias is not None:
        _refuse_bias(op, bias.detach().numpy())
    if ids is not None and count and int(ids.min()) < 0:
        at = int((ids < 0).nonzero()[0])
        raise ValueError(f"{op}: ids[{at}] must be at least 0, got {int(ids[at])}")
    end = start + count
    if end >= 2**31:
        raise ValueError(f"{op}: codes must leave fewer than 2**31 items in all, got {end}")
    blocks = _blocks_of(end)
    packed = packed._replace(
        size=end,
        planes=_grown(packed.planes, blocks),
        slots=_grown(packed.slots, end),
        positions=_grown(packed.positions, end),
        bias=_grown(packed.bias, end),
        levels=_grown(packed.levels, blocks),
        ids=_grown(packed.ids, end),
        live=_grown(packed.live, blocks),
        held=_more_lines(packed.held, blocks),
    )
    for name in ("slots", "positions"):
        if getattr(packed, name) is not None:
            getattr(packed, name)[start:end] = torch.arange(start, end, dtype=torch.int32)
    if ids is not None:
        packed.ids[start:end] = ids
    places = np.arange(start, end)
    _write(packed, places, rows, None if bias is None else bias.detach().numpy())
    packed_restore(packed, torch.from_numpy(places))
    return packed


def _grown(array: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """`array` where it has `rows` rows, else a longer copy; new rows are 0."""
    if array is None or len(array) >= rows:
        return array
    longer = torch.zeros((rows + rows // 4, *array.shape[1:]), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


def _more_lines(held: torch.Tensor | None, blocks: int) -> torch.Tensor | None:
    """`held` where it has room for `blocks`, else a longer copy, of wider lines while one span is enough."""
    if held is None or held.shape[3] == lanes_of(blocks):
        return _grown(held, spans_of(blocks))
    wider = torch.zeros((spans_of(blocks), *held.shape[1:3], lanes_of(blocks)), dtype=torch.int64)
    wider[: len(held), :, :, : held.shape[3]] = held
    return wider


# --- masks ---


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask [..., N] of bool as words [..., ceil(N / 64)] of int64: bit j of word p speaks of slot 64 p + j."""
    mask = mask.contiguous()
    items = mask.shape[-1]
    words = torch.empty((*mask.shape[:-1], _blocks_of(items)), dtype=torch.int64)
    _pack_mask(mask.data_ptr(), mask.numel() // max(items, 1), items, words.data_ptr())
    return words


def _mask_reference(mask: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    padded = torch.nn.functional.pad(mask.long(), (0, -mask.shape[-1] % _ITEMS))
    return (padded.unflatten(-1, (-1, _ITEMS)) << torch.arange(_ITEMS)).sum(-1)


pack_mask.reference = _mask_reference


def permute_mask(words: torch.Tensor, packed: PackedCodes) -> torch.Tensor:
    """Words of a mask by slot, int64 [..., ceil(N / 64)], as words by position.

    The same where `packed` keeps the order of slots.
    """
    _check.tensor("permute_mask", "words", words, dtypes=[torch.int64])
    if words.dim() == 0 or words.shape[-1] != _blocks_of(packed.size):
        raise ValueError(
            f"permute_mask: words must have shape [..., {_blocks_of(packed.size)}], got {list(words.shape)}"
        )
    if packed.slots is None:
        return words
    words = words.contiguous()
    ordered = torch.empty_like(words)
    rows = words.numel() // max(words.shape[-1], 1)
    _order_mask(
        words.data_ptr(), rows, packed.size, packed.slots.data_ptr(), packed.positions.data_ptr(), ordered.data_ptr()
    )
    return ordered


def _permute_reference(words: torch.Tensor, packed: PackedCodes) -> torch.Tensor:
    """The same in plain torch."""
    if packed.slots is None:
        return words
    bits = (words.unsqueeze(-1) >> torch.arange(_ITEMS) & 1).flatten(-2)
    return _mask_reference(bits[..., packed.slots[: packed.size].long()])


permute_mask.reference = _permute_reference


def worth_permuting(words: torch.Tensor, packed: PackedCodes) -> bool:
    """Whether a mask that serves one search is worth `permute_mask`."""
    allowed = _count_bits(words.data_ptr(), words.numel())
    return allowed * _SPARSE <= packed.size * (words.shape[0] if words.dim() == 2 else 1)


def check_words(op: str, mask: Any, words: Any, queries: int, size: int) -> None:
    """Refuse `words` of `mask` that are not int64 [W] or [Q, W], W = ceil(N / 64), or made for another N."""
    # As many words do not make as many items.
    if getattr(mask, "size", size) != size:
        raise ValueError(f"{op}: mask must be a bitmap of {size} items, got one of {mask.size}")
    _check.tensor(op, "mask.words", words, dtypes=[torch.int64])
    shape = [_blocks_of(size)] if words.dim() == 1 else [queries, _blocks_of(size)]
    _check.tensor(op, "mask.words", words, shape=shape)


def mask_words(op: str, mask: Any, queries: int, size: int) -> torch.Tensor:
    """Any kind of mask as words [W] or [Q, W] of int64 by slot, W = ceil(N / 64)."""
    if hasattr(mask, "words"):
        check_words(op, mask, mask.words, queries, size)
        return mask.words.contiguous()
    width = _blocks_of(size)
    _check.tensor(op, "mask", mask, dtypes=[torch.bool, torch.uint8])
    length = size if mask.dtype == torch.bool else -(-size // 8)
    _check.tensor(op, "mask", mask, shape=[length] if mask.dim() == 1 else [queries, length])
    if mask.dtype == torch.bool:
        return pack_mask(mask)
    words = torch.zeros((*mask.shape[:-1], width * 8), dtype=torch.uint8)
    words[..., :length] = mask
    return words.view(torch.int64) if size else words.new_empty(words.shape, dtype=torch.int64)
