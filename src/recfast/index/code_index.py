"""Items coded by M codebooks: exact search over a table of scores, with adds, updates and deletes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from recfast import ops
from recfast.errors import InputError
from recfast.index import _file
from recfast.index._arrays import as_ids, as_mask, as_tensor, refuse_repeats
from recfast.index._named import NamedItems
from recfast.index.bitmap import Bitmap
from recfast.ops import PackedCodes, SparseTable, pack_codes
from recfast.ops.code_postings import refuse_faults
from recfast.ops.packed_codes import (
    lanes_of,
    lines_of,
    packed_append,
    packed_remove,
    packed_write,
    spans_of,
    unpack_codes,
)

_ORDERS = ("auto", "none", "lex")
_INTEGERS = (torch.int64, torch.int32)
_PLANS = ("auto", "scan", "block_max", "scalar", "postings")

# Below this many items there are too few groups to skip.
_LEAST_SORTED = 16384
# "auto" sorts where groups of 256 neighbours hold at most this share of the different codes that they would hold if
# codebooks had nothing to do with each other. Measured: independent codes come to 1.00 and above, the product-quantised
# vectors of clusters to 0.90 and below.
_CLUSTERED = 0.95
# So many ids may have come since ids were last sorted, or an eighth of all.
_MOST_RECENT = 4096
# Lists are read where they hold fewer than one in this many of the items; see benchmarks/bench_code_index.py.
_POSTINGS_SHARE = 20
# So many queries of few entries are scanned before "auto" builds lists for those that follow.
_POSTINGS_AFTER = 64


class CodeIndex(NamedItems):
    """Items coded by M codebooks of K codes each, searched exactly under a table of scores.

    .. math:: y_{q,i} = \\sum_{m=0}^{M-1} T_{q,m,c_{i,m}} + b_i

    Every item has a *slot*: its place in `codes`, then in the order of `add`. A removed item leaves its slot empty
    until `compact` closes the gaps. Masks speak of slots; answers, `update` and `remove` of external ids. Where items
    lie in memory is a third thing, `order`, and never changes an answer.

    Parameters
    ----------
    codes : array or Tensor [N, M] of integers in [0, K)
        Copied into the index's own layout and not kept.
    n_codes : int
        K, in [1, 65536]. A table must have as many entries per codebook.
    bias : array or Tensor [N], float32, optional
        Added to the score of each item; -inf hides it.
    ids : array or Tensor [N] of distinct integers, at least 0, optional
        What an item is called outside; its slot where left out. Ties go to the lowest.
    order : "auto", "none" or "lex"
        "lex" lays items out in lexicographic order of their codes, so that neighbours share codes and a search can
        skip groups of items that cannot reach the answer; it costs the sort and 8 + M / 8 bytes an item. "none" keeps
        the order given. "auto" sorts where items cluster, which it measures: there are 16,384 items or more, and groups
        of 256 neighbours in sorted order hold at most 0.95 of the different codes that they would hold were the
        codebooks independent of each other, with codes as frequent as they are. Decided when the index is made and
        again by `compact`.

    Raises
    ------
    TypeError, ValueError, IndexError
        A wrong dtype; a shape that does not fit, a repeated or negative id, NaN or +inf in `bias`; a code outside
        [0, K).

    Notes
    -----
    Any number of threads may search at the same time. A change (`add`, `update`, `remove`, `compact`) waits until the
    searches under way have ended, and what is called meanwhile waits for the change, so that every search sees the
    items as they are before or after it. Processes that map the same file each have an index of their own.

    `add` appends items in the order given, whatever `order` is: searches read this unsorted tail in full (`tail` says
    how large a share it is), until `compact` sorts everything anew. When that pays is for the user to decide; with a
    tenth of the items in the tail it is time.

    Memory, bytes an item (`nbytes` has the sum): M (2 M where K > 256) for the codes, of which there is one copy; 5 for
    a bias, 8 for ids, 1/8 after a removal; in lexicographic order 8 for slots and their inverse and M / 8 for the
    bitmaps of what groups hold; 4 M + 4 where sparse tables have made it build lists; 16 for finding items by their
    ids, where there are ids, from the first call on that does. Room for a quarter more items after `add`.
    """

    def __init__(self, codes: Any, n_codes: int = 256, *, bias: Any = None, ids: Any = None, order: str = "auto"):
        place = "CodeIndex"
        if order not in _ORDERS:
            raise ValueError(f"{place}: order must be one of {', '.join(_ORDERS)}, got {order!r}")
        if not 1 <= n_codes <= 65536:
            raise ValueError(f"{place}: n_codes must be in [1, 65536], got {n_codes}")
        self._n_codes = int(n_codes)
        self._wanted = order
        codes = self._as_codes(place, codes, None)
        size = len(codes)
        bias = None if bias is None else _as_bias(place, bias, size)
        names = self._named(ids, size)
        self._pack(codes, bias, None if names is None else torch.from_numpy(names))
        self._start()

    def _start(self) -> None:
        """What is not part of the items."""
        self._begin()
        self._forget()

    def _forget(self) -> None:
        """Drop what was made from the items and is made again where it is wanted."""
        self._forget_ids()
        self._counts: np.ndarray | None = None
        self._lists: ops.PostingLists | None = None
        self._sparse_queries = 0

    def _forget_ids(self) -> None:
        # The ids in rising order with their slots, as they were once; and what has been added since, by id.
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._recent: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        with self._guard.reading:
            left_out = (
                "_guard", "epoch", "_sorted", "_recent", "_counts", "_lists", "_sparse_queries",
            )  # fmt: skip
            state = {name: value for name, value in self.__dict__.items() if name not in left_out}
            # As arrays: torch does not pickle all dtypes. Copied while no change can come between, since they are
            # written out after this.
            parts = {name: part.numpy().copy() for name, part in self._trimmed().items()}
            return {**state, "_packed": (self._packed.size, self._packed.n_codes, parts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        size, n_codes, parts = state["_packed"]
        # Buffers that came beside the pickle may be read-only.
        tensors = {name: torch.from_numpy(np.require(part, requirements="W")) for name, part in parts.items()}
        self._packed = PackedCodes(size=size, n_codes=n_codes, **tensors)
        self._start()

    def _pack(
        self, codes: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None, live: torch.Tensor | None = None
    ) -> None:
        """Lay the items out anew, in the order that the user asked for."""

        def pack(order: str) -> PackedCodes:
            return pack_codes(codes, n_codes=self._n_codes, bias=bias, ids=ids, live=live, order=order)

        sort = self._wanted == "lex" or (self._wanted == "auto" and len(codes) >= _LEAST_SORTED)
        packed = pack("lex" if sort else "none")
        if sort and self._wanted == "auto" and not _clusters(packed):
            packed = pack("none")
        self._packed = packed
        self._removed = 0 if live is None else int((~live).sum())
        # Positions below this one were sorted, and this many of them have changed since.
        self._ordered, self._moved = packed.size, 0

    def _as_codes(self, place: str, codes: Any, width: int | None) -> torch.Tensor:
        """Codes as a tensor of uint8 or uint16; `width` is M where the index exists already."""
        codes = as_tensor(place, "codes", codes)
        if codes.dim() != 2 or codes.shape[1] == 0 or (width is not None and codes.shape[1] != width):
            raise ValueError(f"{place}: codes must have shape [N, {width or 'M'}], got {list(codes.shape)}")
        if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
            raise TypeError(f"{place}: codes must be integers, got {str(codes.dtype).removeprefix('torch.')}")
        # Through numpy, since torch has few functions for uint16.
        array = codes.numpy()
        within = array.dtype.kind == "u" and np.iinfo(array.dtype).max < self._n_codes
        if not within and array.size and (int(array.min()) < 0 or int(array.max()) >= self._n_codes):
            item, book = map(int, np.argwhere((array < 0) | (array >= self._n_codes))[0])
            raise IndexError(f"{place}: codes[{item}, {book}] = {array[item, book]} is outside [0, {self._n_codes})")
        return torch.from_numpy(array.astype(np.uint8 if self._n_codes <= 256 else np.uint16, copy=False))

    # -- what it holds -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of items, without the removed ones."""
        return self._packed.size - self._removed

    def __repr__(self) -> str:
        order = "in the order given" if self.order == "none" else "in lexicographic order"
        if self.tail:
            order += f" but for {self.tail:.1%}"
        return f"CodeIndex({len(self)} items, {self._books} codebooks of {self._n_codes} codes, {order})"

    @property
    def _books(self) -> int:
        return self._packed.planes.shape[1]

    @property
    def n_codes(self) -> int:
        """K, the number of codes of each codebook."""
        return self._n_codes

    @property
    def n_slots(self) -> int:
        """Items and removed ones: the length of a mask."""
        return self._packed.size

    @property
    def order(self) -> str:
        """How the items lie: "none" or "lex"."""
        return "none" if self._packed.slots is None else "lex"

    @property
    def tail(self) -> float:
        """The share of the items that came or changed since the items were sorted; 0 where they are not sorted.

        An item that changes twice counts twice.
        """
        if self.order == "none" or not self._packed.size:
            return 0.0
        return min(1.0, (self._packed.size - self._ordered + self._moved) / self._packed.size)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the items take, with room for more and with posting lists where there are some."""
        with self._guard.reading:
            parts = [*self._packed, *(self._lists or ()), *(self._sorted or ()), self._counts]
            return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor | np.ndarray))

    @property
    def codes(self) -> torch.Tensor:
        """The codes of each slot, [n_slots, M], gathered at each call."""
        with self._guard.reading:
            return unpack_codes(self._packed)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of each slot, [n_slots] float32, or None; gathered at each call."""
        with self._guard.reading:
            if self._packed.bias is None:
                return None
            return self._packed.bias[self._positions(np.arange(self._packed.size))]

    @property
    def ids(self) -> torch.Tensor:
        """The external id of each slot, [n_slots] int64. Not to be written to."""
        packed = self._packed
        return torch.arange(packed.size) if packed.ids is None else packed.ids[: packed.size]

    @property
    def live(self) -> torch.Tensor | None:
        """Which slots hold an item, [n_slots] bool, or None where all do; gathered at each call."""
        with self._guard.reading:
            return self._live()

    def _live(self) -> torch.Tensor | None:
        return torch.from_numpy(self._alive(np.arange(self._packed.size))) if self._removed else None

    def _alive(self, slots: np.ndarray) -> np.ndarray:
        """Which of `slots` hold an item, bool."""
        if not self._removed:
            return np.ones(len(slots), dtype=np.bool_)
        words = self._packed.live.numpy().view(np.uint64)
        places = self._positions(slots).numpy()
        return (words[places >> 6] >> (places & 63).astype(np.uint64) & np.uint64(1)).astype(np.bool_)

    def _positions(self, slots: np.ndarray) -> torch.Tensor:
        """Where the items of `slots` lie, int64."""
        if self._packed.positions is None:
            return torch.from_numpy(slots.astype(np.int64, copy=False))
        return torch.from_numpy(self._packed.positions.numpy()[slots].astype(np.int64))

    # -- search --------------------------------------------------------------------------------------------------

    def search(self, table: Any, k: int, mask: Any = None, plan: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k best items for each query, exactly.

        Parameters
        ----------
        table : array or Tensor [Q, M, K], float32 (a tensor may be bfloat16 or float16)
            The score of each code for each query; -inf forbids every item that has the code. Or a sparse one, where a
            code that is not named scores 0: an `ops.SparseTable`, or its parts (codes, values, offsets) as arrays or
            tensors.
        k : int
            May exceed the number of items, may be 0.
        mask : Bitmap, or array or Tensor [n_slots] or [Q, n_slots] of bool (or packed in bytes), optional
            The slots allowed, for all queries or for each (see `allow` and `deny`).
        plan : "auto", "scan", "block_max", "scalar" or "postings"
            How, which never changes the answer. "scan" reads all codes; "block_max" skips groups that cannot reach the
            answer, where the items are in lexicographic order; "scalar" is the plain loop. "postings" (for sparse
            tables) reads the lists of items of the codes named, and builds them first where there are none. "auto"
            reads lists for queries whose codes are those of fewer than N / 20 items; it builds them once 64 such
            queries have come since the items last changed.

        Returns
        -------
        scores : Tensor [Q, k], float32
        ids : Tensor [Q, k], int64
            Sorted by score descending, ties by lowest id, padded with (-inf, -1).

        Raises
        ------
        TypeError, ValueError, IndexError
            A wrong dtype or shape; NaN or +inf in the table; a negative k; a plan that does not fit the table; an
            entry of a sparse table outside [0, M K).
        """
        place = "CodeIndex.search"
        if plan not in _PLANS:
            raise ValueError(f"{place}: plan must be one of {', '.join(_PLANS)}, got {plan!r}")
        if isinstance(table, tuple | list):
            table = _as_sparse(place, table, self._books * self._n_codes)
            queries = len(table.offsets) - 1
        else:
            if plan == "postings":
                raise ValueError(f"{place}: plan 'postings' needs a sparse table, got a dense one")
            table = as_tensor(place, "table", table)
            if table.dim() != 3 or tuple(table.shape[1:]) != (self._books, self._n_codes):
                wanted = f"[Q, {self._books}, {self._n_codes}]"
                raise ValueError(f"{place}: table must have shape {wanted}, got {list(table.shape)}")
            queries = len(table)
        with self._guard.reading:
            mask = as_mask(place, mask, queries, self._packed.size, epoch=self.epoch)
            if isinstance(table, SparseTable) and plan in ("auto", "postings"):
                return self._search_sparse(table, k, mask, plan)
            return self._scan(table, k, mask, plan)

    def _scan(self, table: Any, k: int, mask: Any, plan: str) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(mask, Bitmap):
            mask = mask.serving(self._packed)
        return ops.code_search(self._packed, table, k, mask=mask, plan=plan, check=False)

    def _search_sparse(self, table: SparseTable, k: int, mask: Any, plan: str) -> tuple[torch.Tensor, torch.Tensor]:
        if mask is not None and not isinstance(mask, Bitmap):
            mask = Bitmap.from_mask(mask)
        queries = len(table.offsets) - 1
        if plan == "postings":
            by_lists = np.ones(queries, dtype=bool)
        else:
            by_lists = self._is_cheap(table, k, mask)
            if self._lists is None:
                self._sparse_queries += int(by_lists.sum())
                if self._sparse_queries < _POSTINGS_AFTER:
                    by_lists[:] = False
        if not by_lists.any():
            return self._scan(table, k, mask, "auto")
        lists = self._posting_lists()
        if by_lists.all():
            return ops.code_postings(lists, self._packed, table, k, mask=mask, check=False)
        scores = torch.empty((queries, k), dtype=torch.float32)
        ids = torch.empty((queries, k), dtype=torch.int64)
        for chosen in (by_lists, ~by_lists):
            rows = torch.from_numpy(chosen.nonzero()[0])
            part = _rows_of(table, rows)
            only = mask if mask is None or mask.queries is None else mask[rows]
            if chosen is by_lists:
                found = ops.code_postings(lists, self._packed, part, k, mask=only, check=False)
            else:
                found = self._scan(part, k, only, "auto")
            scores[rows], ids[rows] = found
        return scores, ids

    def _is_cheap(self, table: SparseTable, k: int, mask: Bitmap | None) -> np.ndarray:
        """For which queries the lists are shorter than a scan is worth."""
        size = self._packed.size
        counts = self._counts
        if counts is None:
            counts = self._counts = ops.posting_counts(self._packed, self._n_codes).numpy()
        sums = np.concatenate([[0], np.cumsum(counts[table.codes.numpy()])])
        offsets = table.offsets.numpy()
        touched = sums[offsets[1:]] - sums[offsets[:-1]]
        # Items in no list are tried in turn until k of them are allowed.
        allowed = np.asarray(len(self) if mask is None else mask.count())
        touched = touched + np.minimum(min(k, size) * (size / np.maximum(allowed, 1)), size)
        return touched * _POSTINGS_SHARE < size

    def _posting_lists(self) -> ops.PostingLists:
        # Searches that come meanwhile wait for these lists, and no change can come between.
        with self._guard.building:
            if self._lists is None:
                self._lists = ops.posting_lists(self._packed, self._n_codes)
            return self._lists

    # -- changes -------------------------------------------------------------------------------------------------

    def add(self, codes: Any, ids: Any = None, *, bias: Any = None) -> torch.Tensor:
        """Append items.

        Parameters
        ----------
        codes : array or Tensor [n, M] of integers in [0, K)
        ids : integers [n], optional
            Distinct and not in the index. Left out, they go on from the highest id the index has ever had.
        bias : array or Tensor [n], float32
            Where the index has a bias, and only there.

        Returns
        -------
        Tensor [n], int64: the ids.

        Raises
        ------
        TypeError, ValueError, IndexError
            As the constructor does. The index is unchanged then.
        """
        place = "CodeIndex.add"
        codes = self._as_codes(place, codes, self._books)
        bias = self._given_bias(place, bias, len(codes), required=True)
        with self._guard.changing:
            names = self._new_ids(place, ids, len(codes))
            packed = self._packed
            start, end = packed.size, packed.size + len(codes)
            if packed.ids is None and not np.array_equal(names, np.arange(start, end)):
                self._forget_ids()
                packed = packed._replace(ids=torch.arange(start))
            given = None if packed.ids is None else torch.from_numpy(names)
            self._packed = packed_append(packed, codes, bias=bias, ids=given)
            if self._sorted is not None:
                self._recent.update(zip(names.tolist(), range(start, end), strict=True))
                if len(self._recent) > max(_MOST_RECENT, end // 8):
                    self._forget_ids()
            self._recount(codes, 1)
            self._drop_lists()
            self._next_id = max(self._next_id, int(names.max(initial=-1)) + 1)
        return torch.from_numpy(names)

    def update(self, ids: Any, codes: Any, *, bias: Any = None) -> None:
        """Give the items `ids` other codes, in place, and another bias where one is given.

        Raises
        ------
        TypeError, ValueError, IndexError
            An id that is not in the index or given twice; codes or bias that do not fit. The index is unchanged then.
        """
        place = "CodeIndex.update"
        names = as_ids(place, ids)
        codes = self._as_codes(place, codes, self._books)
        if len(names) != len(codes):
            raise ValueError(f"{place}: codes must have shape [{len(names)}, M], got {list(codes.shape)}")
        bias = self._given_bias(place, bias, len(codes), required=False)
        refuse_repeats(place, names)
        with self._guard.changing:
            positions = self._positions(self._slots_of(place, names))
            if self._counts is not None:
                at = positions.numpy()
                before = torch.from_numpy(self._packed.planes.numpy()[at >> 6, :, at & 63])
                self._recount(before, -1)
            packed_write(self._packed, positions, codes, bias)
            self._recount(codes, 1)
            self._drop_lists()
            self._moved += int((positions < self._ordered).sum())

    def remove(self, ids: Any) -> None:
        """Take the items `ids` out; their slots stay empty until `compact`.

        Raises
        ------
        TypeError, ValueError
            An id that is not in the index or given twice. The index is unchanged then.
        """
        place = "CodeIndex.remove"
        names = as_ids(place, ids)
        refuse_repeats(place, names)
        with self._guard.changing:
            slots = self._slots_of(place, names)
            # Lists keep their removed items, which searches leave out by the same bits.
            self._packed = packed_remove(self._packed, self._positions(slots))
            self._removed += len(slots)
            for name in names.tolist() if self._recent else ():
                self._recent.pop(name, None)

    def compact(self) -> None:
        """Close the gaps that `remove` left, sort anew and give spare memory back. Ids stay, slots change.

        Masks made before by `allow` or `deny` are refused afterwards. It needs twice the memory for a moment.
        """
        with self._guard.changing:
            packed, size = self._packed, self._packed.size
            live = self._live()
            keep = np.arange(size) if live is None else live.numpy().nonzero()[0]
            positions = self._positions(keep)
            ids = None if packed.ids is None else packed.ids[:size][torch.from_numpy(keep)]
            if self._removed and packed.ids is None:
                ids = torch.from_numpy(keep)
            codes = torch.from_numpy(unpack_codes(packed).numpy()[keep])
            bias = None if packed.bias is None else packed.bias[positions]
            self._pack(codes, bias, ids)
            self._forget()
            self._next_epoch()

    def _recount(self, codes: torch.Tensor, sign: int) -> None:
        """Keep the number of items of each code, where they have been counted."""
        if self._counts is not None:
            flat = codes.numpy().astype(np.int64) + np.arange(self._books) * self._n_codes
            self._counts += sign * np.bincount(flat.reshape(-1), minlength=len(self._counts))

    def _drop_lists(self) -> None:
        self._lists, self._sparse_queries = None, 0

    def _given_bias(self, place: str, bias: Any, size: int, *, required: bool) -> torch.Tensor | None:
        if bias is None:
            if required and self._packed.bias is not None:
                raise ValueError(f"{place}: bias must be given, since the index has one")
            return None
        if self._packed.bias is None:
            raise ValueError(f"{place}: bias must be left out, since the index has none")
        return _as_bias(place, bias, size)

    # -- ids -----------------------------------------------------------------------------------------------------

    def _find(self, ids: np.ndarray) -> np.ndarray:
        """The slot of each id, or -1."""
        size = self._packed.size
        if self._packed.ids is None:
            return self._if_alive(np.where(ids < size, ids, -1))
        if self._sorted is None:
            slots = np.arange(size) if not self._removed else self._live().numpy().nonzero()[0]
            names = self._packed.ids.numpy()[slots]
            order = np.argsort(names, kind="stable")
            # One assignment: searches that make it at the same time make the same.
            self._sorted = names[order], slots[order]
        known, slots = self._sorted
        places = np.searchsorted(known, ids)
        found = places < len(known)
        found[found] &= known[places[found]] == ids[found]
        answer = np.full(len(ids), -1)
        answer[found] = slots[places[found]]
        # A removed item is still among the sorted ones, and may have come back under another slot since.
        answer = self._if_alive(answer)
        if self._recent:
            for at in (answer < 0).nonzero()[0].tolist():
                answer[at] = self._recent.get(int(ids[at]), -1)
        return answer

    def _if_alive(self, slots: np.ndarray) -> np.ndarray:
        """`slots`, -1 in place of those that hold no item."""
        if self._removed:
            some = (slots >= 0).nonzero()[0]
            slots[some[~self._alive(slots[some])]] = -1
        return slots

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file (safetensors), whole or not at all, with checksums over every byte.

        The file holds all that a search reads, as it lies in memory. Posting lists are not kept.
        """
        with self._guard.reading:
            arrays = {name: array.numpy() for name, array in self._trimmed().items()}
            config = {
                "n_codes": self._n_codes,
                "order": self._wanted,
                "next_id": self._next_id,
                "size": self._packed.size,
                "ordered": self._ordered,
                "moved": self._moved,
            }
            _file.save(path, "CodeIndex", config, arrays)

    def _trimmed(self) -> dict[str, torch.Tensor]:
        """The arrays without the room for more items."""
        packed = self._packed
        lengths = _lengths(packed.size)
        parts = {name: getattr(packed, name) for name in lengths}
        return {name: part[: lengths[name]] for name, part in parts.items() if part is not None}

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False, verify: bool = True) -> CodeIndex:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path
        mmap : bool
            Map the file instead of reading it: processes share its memory, and a search starts at once, since nothing
            is built. Changes stay in this process's memory and never reach the file.
        verify : bool
            Compare the checksums of the arrays, for which the file is read through once. False is for files that are
            known to be whole and larger than what one likes to read: a damaged one could give wrong answers or end the
            process.

        Raises
        ------
        InputError
            No such file; truncated, corrupt, or not such a file.
        """
        config, arrays = _file.load(path, "CodeIndex", mmap=mmap, verify=verify)
        try:
            if "planes" in arrays:
                return cls._restored(config, arrays, verify)
            return cls._from_first(config, arrays)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"CodeIndex.load: {path} is corrupt: {error}") from error

    @classmethod
    def _from_first(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> CodeIndex:
        """Version 1 held codes by slot, and bias, ids and live beside them."""
        index = cls(arrays["codes"], config["n_codes"], bias=arrays.get("bias"), order=config["order"])
        size, ids, live = index.n_slots, arrays.get("ids"), arrays.get("live")
        if live is not None and (live.shape != (size,) or live.dtype != np.bool_):
            raise ValueError(f"live must be bool [{size}]")
        if ids is not None:
            ids = as_ids("CodeIndex", ids)
            if len(ids) != size:
                raise ValueError(f"ids must have shape [{size}], got [{len(ids)}]")
            # Among live items only: a removed one may have come back in another slot.
            refuse_repeats("CodeIndex", ids if live is None else ids[live])
            index._packed = index._packed._replace(ids=torch.from_numpy(ids.copy()))
        if live is not None:
            gone = (~live).nonzero()[0]
            index._packed = packed_remove(index._packed, index._positions(gone))
            index._removed = len(gone)
        index._next_id = int(config["next_id"])
        return index

    @classmethod
    def _restored(cls, config: dict[str, Any], arrays: dict[str, np.ndarray], verify: bool) -> CodeIndex:
        index = cls.__new__(cls)
        size, index._n_codes, index._wanted = int(config["size"]), int(config["n_codes"]), config["order"]
        books = arrays["planes"].shape[1]
        arrays = _with_lines(arrays, size, books + ("bias" in arrays))
        _refuse_shapes(arrays, size, books, index._n_codes)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        packed = PackedCodes(size=size, n_codes=index._n_codes, **tensors)
        if verify:
            _refuse_values(packed)
        index._packed = packed
        index._removed = 0
        if packed.live is not None:
            words = packed.live.clone()
            if size % 64:
                words[-1] &= (1 << size % 64) - 1
            index._removed = size - Bitmap(words, size).count()
        index._next_id = int(config["next_id"])
        index._ordered, index._moved = int(config["ordered"]), int(config["moved"])
        if index._wanted not in _ORDERS:
            raise ValueError(f"order is {index._wanted!r}")
        index._start()
        return index


def _lengths(size: int) -> dict[str, int]:
    """The rows of each array of a `PackedCodes` that `size` items fill."""
    blocks = -(-size // 64)
    return {
        "planes": blocks,
        "held": spans_of(blocks),
        "levels": blocks,
        "edges": 256,
        "live": blocks,
        "slots": size,
        "positions": size,
        "bias": size,
        "ids": size,
    }


def _with_lines(arrays: dict[str, np.ndarray], size: int, rows: int) -> dict[str, np.ndarray]:
    """Bitmaps as they are now, from those of a file that has the codes of each group (`blocks`) instead."""
    if "blocks" not in arrays or "held" in arrays:
        return arrays
    arrays = dict(arrays)
    arrays.pop("superblocks", None)
    codes = arrays.pop("blocks")
    blocks = -(-size // 64)
    if codes.shape != (-(-blocks // 4), rows, 4) or codes.dtype != np.int64:
        raise ValueError(f"blocks must be int64 {[-(-blocks // 4), rows, 4]}")
    present = np.unpackbits(codes.view(np.uint8), axis=-1, bitorder="little").astype(bool)
    return {**arrays, "held": lines_of(present, blocks).numpy()}


def _refuse_shapes(arrays: dict[str, np.ndarray], size: int, books: int, n_codes: int) -> None:
    """Raise ValueError unless every array is as long as `size` items need, of its dtype, and beside those it needs."""
    if not 1 <= n_codes <= 65536 or books < 1:
        raise ValueError(f"there are {books} codebooks of {n_codes} codes")
    rows = books + ("bias" in arrays)
    wanted = {
        "planes": ((books, 64), np.uint8 if n_codes <= 256 else np.uint16),
        "held": ((rows, 256, lanes_of(-(-size // 64))), np.int64),
        "levels": ((64,), np.uint8),
        "edges": ((), np.float32),
        "live": ((), np.int64),
        "slots": ((), np.int32),
        "positions": ((), np.int32),
        "bias": ((), np.float32),
        "ids": ((), np.int64),
    }
    lengths = _lengths(size)
    for name, array in arrays.items():
        shape, kind = wanted[name]
        if array.shape != (lengths[name], *shape) or array.dtype != kind:
            raise ValueError(f"{name} must be {np.dtype(kind)} {[lengths[name], *shape]}")
    for together in (("slots", "positions", "held"), ("bias", "levels", "edges")):
        if len({name in arrays for name in together}) == 2:
            raise ValueError(f"only some of {', '.join(together)} are there")


def _refuse_values(packed: PackedCodes) -> None:
    """Raise ValueError where a value would make a search read outside the arrays."""
    planes = packed.planes.numpy()
    if packed.n_codes <= np.iinfo(planes.dtype).max and planes.size and int(planes.max()) >= packed.n_codes:
        raise ValueError(f"a code is outside [0, {packed.n_codes})")
    if packed.slots is not None and packed.size:
        for name in ("slots", "positions"):
            array = getattr(packed, name).numpy()
            if int(array.min()) < 0 or int(array.max()) >= packed.size:
                raise ValueError(f"{name} are outside [0, {packed.size})")
        if not np.array_equal(packed.positions.numpy()[packed.slots.numpy()], np.arange(packed.size, dtype=np.int32)):
            raise ValueError("slots and positions are not each other's inverse")
    if packed.ids is not None and packed.size and int(packed.ids.min()) < 0:
        raise ValueError("an id is below 0")


def _clusters(packed: PackedCodes) -> bool:
    """Whether groups of neighbours hold few different codes; `packed` is in lexicographic order. See `CodeIndex`."""
    books = packed.planes.shape[1]
    groups = packed.size // 256  # full ones
    lines = packed.held[:, :books].permute(0, 3, 1, 2).flatten(0, 1).flatten(1)  # a row for 64 groups
    full = Bitmap.from_mask(torch.arange(len(lines) * 64) < groups).words
    held = Bitmap((lines & full[:, None]).flatten(), 64 * lines.numel()).count() / groups
    counts = ops.posting_counts(packed, packed.n_codes).view(books, -1).double()
    # Bitmaps have 256 bits: neighbouring codes share one where there are more.
    share = 1 << max((packed.n_codes - 1).bit_length() - 8, 0)
    shared = torch.nn.functional.pad(counts, (0, -packed.n_codes % share)).view(books, -1, share).sum(2)
    drawn = (1 - (1 - shared / packed.size) ** 256).sum(1)
    # Sorting walks through the codes of the first codebooks: a group passes `span` of them, and draws from the others.
    often = counts / packed.size
    perplexity = torch.exp(-torch.special.xlogy(often, often).sum(1))
    span = 256 / packed.size * perplexity.cumprod(0) / share
    expected = (drawn * (1 - torch.exp(-span / drawn))).clamp(min=1).sum()
    return bool(held <= _CLUSTERED * expected)


def _as_bias(place: str, bias: Any, size: int) -> torch.Tensor:
    bias = as_tensor(place, "bias", bias)
    if bias.dtype != torch.float32:
        raise TypeError(f"{place}: bias must be float32, got {str(bias.dtype).removeprefix('torch.')}")
    if tuple(bias.shape) != (size,):
        raise ValueError(f"{place}: bias must have shape [{size}], got {list(bias.shape)}")
    wrong = ~(bias < torch.inf)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{place}: bias[{at}] must be finite or -inf, got {float(bias[at])}")
    return bias


def _as_sparse(place: str, table: Any, limit: int) -> SparseTable:
    if len(table) != 3:
        raise ValueError(f"{place}: a sparse table must have codes, values and offsets, got {len(table)} parts")
    parts = []
    for name, kinds, value in zip(
        ("codes", "values", "offsets"),
        (_INTEGERS, (torch.float32, torch.bfloat16, torch.float16), _INTEGERS),
        table,
        strict=True,
    ):
        part = as_tensor(place, f"table.{name}", value)
        if part.dtype not in kinds:
            wanted = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
            raise TypeError(f"{place}: table.{name} must be {wanted}, got {str(part.dtype).removeprefix('torch.')}")
        if part.dim() != 1:
            raise ValueError(f"{place}: table.{name} must have one dimension, got shape {list(part.shape)}")
        parts.append(part.float() if name == "values" else part.long())
    table = SparseTable(*parts)
    if len(table.values) != len(table.codes):
        raise ValueError(f"{place}: table.values must have shape [{len(table.codes)}], got [{len(table.values)}]")
    refuse_faults(place, table, limit, "table.")
    return table


def _rows_of(table: SparseTable, rows: torch.Tensor) -> SparseTable:
    """The queries `rows` of a sparse table."""
    begin, length = table.offsets[rows], (table.offsets[1:] - table.offsets[:-1])[rows]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    entries = torch.arange(int(offsets[-1])) + (begin - offsets[:-1]).repeat_interleave(length)
    return SparseTable(table.codes[entries], table.values[entries], offsets)
