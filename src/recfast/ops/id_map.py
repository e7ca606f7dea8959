"""A map from 64-bit ids to table rows that grows: `IdMap`.

Looking up is an op of torch like any other (`torch.ops.recfast.id_map_find`), so that it can be traced and compiled.
Observing and expiring are methods over `recfast._C`: they replace the map's arrays when it grows or shrinks, and a
schema of torch can declare that a tensor is written, but not that it becomes another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from recfast import _C
from recfast.errors import InputError
from recfast.ops import _check
from recfast.ops._library import define, kernel
from recfast.ops._memory import zeros

MAX_ROWS = _C.ID_MAP_MAX_ROWS
_LEAST_SLOTS = 16
_WAITING = 1  # `state` of a slot whose id has no row; 0: free, 2 + r: row r
_MAX_STEP = 2**31
_FIND = kernel("id_map_find")


def _find(slots: torch.Tensor, ids: torch.Tensor, slot_numbers: bool) -> torch.Tensor:
    ids = ids.contiguous()
    out = torch.empty_like(ids)
    _FIND(slots.data_ptr(), slots.shape[0], ids.data_ptr(), ids.numel(), slot_numbers, out.data_ptr())
    return out


def _find_cpu(slots: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return _find(slots.contiguous(), ids, False)


def _find_fake(slots, ids):
    return torch.empty_like(ids, memory_format=torch.contiguous_format)


def _samples() -> Iterator[tuple]:
    ids = torch.tensor([0, -1, 2**63 - 1, -(2**63), 16, 32, 48])
    map_ = IdMap(min_count=2)
    map_.observe(torch.cat([ids, ids[:4]]), 0)
    yield map_.slots, ids
    yield map_.slots, torch.tensor([[5, 0], [-1, 16]])
    yield IdMap().slots, ids[:0]


def _find_expected(slots: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    known = {int(key): int(state) - 2 for key, state in zip(_keys(slots), slots[:, 2], strict=True) if state}
    rows = [max(known.get(id_, -1), -1) for id_ in ids.reshape(-1).tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(ids.shape)


_find_op = define(
    "id_map_find(Tensor slots, Tensor ids) -> Tensor",
    cpu=_find_cpu,
    fake=_find_fake,
    samples=_samples,
    expected=_find_expected,
)


def _keys(slots: torch.Tensor) -> torch.Tensor:
    return slots.view(torch.int64)[:, 0]


def _slots_for(size: int, share: float) -> int:
    """The least number of slots of which `size` take at most `share`."""
    return max(_LEAST_SLOTS, 1 << (max(size, 1) / share).__ceil__().bit_length())


class Observed(NamedTuple):
    """What a batch of ids brought.

    Attributes
    ----------
    rows : Tensor, shape of the ids, int64
        Their rows after the batch; -1 for ids without one.
    new_ids, new_rows : Tensor [m], int64
        The ids that got a row, in the order in which they did, and these rows.
    """

    rows: torch.Tensor
    new_ids: torch.Tensor
    new_rows: torch.Tensor


class IdMap:
    """A collisionless hash table from 64-bit ids to rows of a table; it counts, admits, forgets and grows.

    Every int64 is an id (0, -1 and the smallest too; ids without sign are to be viewed as int64). An id is counted from
    its first occurrence on and gets a row at its `min_count`-th: the lowest free one, or the next that was never used.
    Rows are given in the order of the batch, so that the outcome depends on the calls alone, not on threads.

    An id takes 20 bytes a slot, and of the slots between 3/8 and 3/4 are taken while the map grows: 27 to 53 bytes.

    Parameters
    ----------
    min_count : int
        Occurrences at which an id gets a row, in [1, 2^31).
    first_row : int
        Rows below it are never given.
    max_rows : int or None
        Rows are below it. None: 2^31 - 3.
    full : str
        With no row left: "default" lets new ids wait (they go on being counted and get rows that become free), "error"
        refuses the batch before anything is written.

    References
    ----------
    Liu et al., "Monolith: Real Time Recommendation System With Collisionless Embedding Table", 2022 (arXiv:2209.07663).

    Examples
    --------
    >>> map_ = IdMap(min_count=2)
    >>> map_.observe(torch.tensor([70, -1, 70, 8]), 0).rows
    tensor([ 0, -1,  0, -1])
    >>> map_.find(torch.tensor([8, 70]))
    tensor([-1,  0])
    """

    def __init__(
        self, *, min_count: int = 1, first_row: int = 0, max_rows: int | None = None, full: str = "default"
    ) -> None:
        max_rows = MAX_ROWS if max_rows is None else max_rows
        if not 1 <= min_count < 2**31:
            raise ValueError(f"IdMap: min_count = {min_count} is outside [1, {2**31})")
        if not 0 <= first_row <= max_rows <= MAX_ROWS:
            raise ValueError(f"IdMap: max_rows = {max_rows} is outside [{max(first_row, 0)}, {MAX_ROWS}]")
        _check.choice("IdMap", "full", full, ("default", "error"))
        self.min_count, self.first_row, self.max_rows, self.full = min_count, first_row, max_rows, full
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        # int32 [C, 4]: the id in the first two columns, then state and count. Zeros are a free slot.
        self.slots, self.seen = self._empty(_LEAST_SLOTS)
        self._size = 0
        self._free = torch.empty(0, dtype=torch.int64)  # descending: its end is given first
        self.next_row = self.first_row

    @staticmethod
    def _empty(slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        return zeros(slots, 4, dtype=torch.int32), zeros(slots, dtype=torch.int32)

    def __len__(self) -> int:
        """The number of ids with a row."""
        return self.next_row - self.first_row - self._free.numel()

    @property
    def known(self) -> int:
        """The number of ids that are counted, with a row or without."""
        return self._size

    def memory_bytes(self) -> int:
        """Bytes of the slots and of the list of free rows."""
        return sum(x.numel() * x.element_size() for x in (self.slots, self.seen, self._free))

    def find(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of ids; nothing is written.

        Parameters
        ----------
        ids : Tensor of any shape, int32 or int64

        Returns
        -------
        Tensor, shape of `ids`, int64; -1 for ids without a row.

        Raises
        ------
        TypeError
            Another dtype.
        """
        return _find_op(self.slots, self._checked("find", ids))

    def observe(self, ids: torch.Tensor, now: int) -> Observed:
        """Count ids, let those in that have come often enough, and find their rows.

        A batch is one event: an id that gets its row in it has that row at all its places, also those before.

        Parameters
        ----------
        ids : Tensor of any shape, int32 or int64
            Counted as often as they occur.
        now : int
            The time of the batch, in [0, 2^31), for `expire`.

        Raises
        ------
        TypeError, ValueError
            Another dtype; `now` out of range.
        InputError
            No row left, with full="error". In every case nothing was written.

        Notes
        -----
        One thread: the order of arrival decides which row an id gets.
        """
        op = "IdMap.observe"
        flat = self._checked("observe", ids).reshape(-1).contiguous()
        self._check_time(op, "now", now)
        room = self._free.numel() + self.max_rows - self.next_row
        if self.full == "error" and flat.numel() > room:
            self._check_room(op, flat, room)
        out, admitted = torch.empty_like(flat), torch.empty_like(flat)
        reached = count = 0
        late = False
        while True:
            limit = self.slots.shape[0] // 4 * 3
            reached, self._size, free, self.next_row, more, was_late = _C.id_map_observe(
                self.slots.data_ptr(), self.seen.data_ptr(), self.slots.shape[0], flat.data_ptr(), flat.numel(),
                reached, now, self.min_count, self._size, limit, self._free.data_ptr(), self._free.numel(),
                self.next_row, self.max_rows, out.data_ptr(), admitted[count:].data_ptr(),
            )  # fmt: skip
            self._free = self._free[:free]
            count += more
            late |= was_late
            if reached == flat.numel():
                break
            self._rebuild(2 * self.slots.shape[0], before=0)
        if late:
            without = (out < 0).nonzero().squeeze(1)
            out[without] = _find(self.slots, flat[without], False)
        places = admitted[:count]
        return Observed(out.reshape(ids.shape), flat[places], out[places])

    def expire(self, before: int) -> torch.Tensor:
        """Forget the ids that were last seen before a time, and free their rows.

        Parameters
        ----------
        before : int
            In [0, 2^31).

        Returns
        -------
        Tensor [m], int64
            The rows that became free, ascending.
        """
        self._check_time("IdMap.expire", "before", before)
        gone = int(((self.seen < before) & (self.slots[:, 2] != 0)).sum())
        if gone == 0:
            return torch.empty(0, dtype=torch.int64)
        slots = self.slots.shape[0]
        if self._size - gone <= slots // 8:
            slots = _slots_for(self._size - gone, 3 / 8)
        freed = self._rebuild(slots, before)
        self._free = torch.cat([self._free, freed]).sort(descending=True).values
        return freed.sort().values

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        """How often ids have occurred (up to 2^31 - 1): Tensor, shape of `ids`, int64; 0 for unknown ones."""
        return self._entry("counts", ids, self.slots[:, 3], 0)

    def last_seen(self, ids: torch.Tensor) -> torch.Tensor:
        """When ids last occurred: Tensor, shape of `ids`, int64; -1 for unknown ones."""
        return self._entry("last_seen", ids, self.seen, -1)

    def ids(self) -> torch.Tensor:
        """The ids with a row, ascending: Tensor [len], int64."""
        return _keys(self.slots)[self.slots[:, 2] > _WAITING].sort().values

    def entries(self) -> dict[str, torch.Tensor]:
        """All that is known, ordered by id: `ids` int64, `rows` (-1: waiting), `counts`, `last_seen`, int32, [known].

        With `next_row`, this is the whole state: `restore` makes a map from it that behaves alike from then on.
        """
        taken = (self.slots[:, 2] != 0).nonzero().squeeze(1)
        taken = taken[_keys(self.slots)[taken].argsort()]
        return {
            "ids": _keys(self.slots)[taken],
            "rows": (self.slots[taken, 2] - 2).clamp(min=-1),
            "counts": self.slots[taken, 3],
            "last_seen": self.seen[taken],
        }

    def restore(self, entries: dict[str, torch.Tensor], next_row: int) -> None:
        """Become the map that `entries` and `next_row` were taken from.

        Raises
        ------
        InputError
            Entries that no map has: ids twice, rows twice or outside, negative counts. Nothing was written.
        """
        place = "IdMap.restore"
        size = entries["ids"].shape[0]
        for name in ("ids", "rows", "counts", "last_seen"):
            dtype = torch.int64 if name == "ids" else torch.int32
            _check.tensor(place, name, entries[name], dtypes=[dtype], shape=[size], device=torch.device("cpu"))
        ids, rows = entries["ids"], entries["rows"]
        if size and not bool((ids[1:] > ids[:-1]).all()):
            raise InputError(f"{place}: ids must ascend, each standing once")
        used = rows[rows >= 0].long()
        outside = (used < self.first_row) | (used >= next_row)
        if not self.first_row <= next_row <= MAX_ROWS or bool(outside.any()) or bool((rows < -1).any()):
            raise InputError(f"{place}: rows must be -1 or in [{self.first_row}, next_row = {next_row})")
        given = torch.zeros(next_row, dtype=torch.bool)
        given[: self.first_row] = True
        given[used] = True
        if int(given.sum()) != self.first_row + used.numel():
            raise InputError(f"{place}: rows must differ, since no two ids share one")
        if bool((entries["counts"] < 1).any()) or bool((entries["last_seen"] < 0).any()):
            raise InputError(f"{place}: counts must be positive and last_seen not negative")
        packed = torch.empty(size, 4, dtype=torch.int32)
        _keys(packed).copy_(ids)
        packed[:, 2] = rows + 2
        packed[:, 3] = entries["counts"]
        self.slots, self.seen, self._size = packed, entries["last_seen"].contiguous(), size
        self._rebuild(_slots_for(size, 3 / 4), before=0)
        self.next_row = next_row
        self._free = (~given).nonzero().squeeze(1).flip(0).contiguous()

    def _rebuild(self, slots: int, before: int) -> torch.Tensor:
        """Move to arrays of another size without what was last seen before a time; give the rows of what is gone."""
        new_slots, new_seen = self._empty(slots)
        freed = torch.empty(self._size if before else 0, dtype=torch.int64)
        self._size, count = _C.id_map_rebuild(
            self.slots.data_ptr(), self.seen.data_ptr(), self.slots.shape[0],
            new_slots.data_ptr(), new_seen.data_ptr(), slots, before, freed.data_ptr(),
        )  # fmt: skip
        self.slots, self.seen = new_slots, new_seen
        return freed[:count]

    def _entry(self, method: str, ids: torch.Tensor, column: torch.Tensor, missing: int) -> torch.Tensor:
        at = _find(self.slots, self._checked(method, ids), True)
        return torch.where(at >= 0, column[at.clamp(min=0)].long(), missing)

    def _check_room(self, op: str, flat: torch.Tensor, room: int) -> None:
        ids, occurrences = flat.unique(return_counts=True)
        wanted = (self.find(ids) < 0) & (self.counts(ids) + occurrences >= self.min_count)
        needed = int(wanted.sum())
        if needed > room:
            raise InputError(
                f"{op}: {needed} ids of the batch would get a row, and {room} rows are left; expire ids, raise "
                "max_rows, or let new ids wait with full='default'"
            )

    @staticmethod
    def _check_time(op: str, name: str, value: int) -> None:
        if not 0 <= value < _MAX_STEP:
            raise ValueError(f"{op}: {name} = {value} is outside [0, {_MAX_STEP})")

    @staticmethod
    def _checked(method: str, ids: torch.Tensor) -> torch.Tensor:
        op = f"IdMap.{method}"
        _check.tensor(op, "ids", ids, dtypes=_check.INDEX_DTYPES, device=torch.device("cpu"))
        return ids.to(torch.int64)


class ReferenceIdMap:
    """The same over a dict, one id at a time: what `IdMap` must agree with. `observe` gives the rows as a list."""

    def __init__(self, *, min_count: int = 1, first_row: int = 0, max_rows: int = MAX_ROWS) -> None:
        self.min_count, self.first_row, self.max_rows = min_count, first_row, max_rows
        self.entries: dict[int, list[int]] = {}  # id: [row or -1, count, last seen]
        self.free: set[int] = set()
        self.next_row = first_row

    def __len__(self) -> int:
        return sum(row >= 0 for row, _, _ in self.entries.values())

    def observe(self, ids: list[int], now: int) -> tuple[list[int], list[int]]:
        new = []
        for id_ in ids:
            entry = self.entries.setdefault(id_, [-1, 0, 0])
            entry[1] += 1
            entry[2] = now
            if entry[0] < 0 and entry[1] >= self.min_count:
                if self.free:
                    entry[0] = min(self.free)
                    self.free.remove(entry[0])
                elif self.next_row < self.max_rows:
                    entry[0] = self.next_row
                    self.next_row += 1
                if entry[0] >= 0:
                    new.append(id_)
        return self.find(ids), new

    def find(self, ids: list[int]) -> list[int]:
        return [self.entries[id_][0] if id_ in self.entries else -1 for id_ in ids]

    def expire(self, before: int) -> list[int]:
        gone = [id_ for id_, entry in self.entries.items() if entry[2] < before]
        freed = sorted(row for row in (self.entries.pop(id_)[0] for id_ in gone) if row >= 0)
        self.free |= set(freed)
        return freed


IdMap.reference = ReferenceIdMap
