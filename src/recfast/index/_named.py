"""Indexes whose items have ids outside and slots inside: what is the same whatever an item is made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from recfast.index._arrays import as_ids, following, refuse_repeats
from recfast.index._guard import Guard
from recfast.index.bitmap import Bitmap, Epoch


class NamedItems:
    """Base of indexes with `add`, `update` and `remove`: ids, slots, masks, and the lock between reads and changes."""

    epoch: Epoch
    """Of the slots there are: `compact` begins another."""
    _guard: Guard
    _next_id: int

    @property
    def n_slots(self) -> int:
        """Items and removed ones: the length of a mask."""
        raise NotImplementedError

    def _find(self, ids: np.ndarray) -> np.ndarray:
        """The slot of each id, int64 [n], or -1. The lock is held."""
        raise NotImplementedError

    def _named(self, ids: Any, count: int) -> np.ndarray | None:
        """The distinct ids of the first `count` items, None where slots are ids; later ones follow the highest."""
        if ids is not None:
            place = type(self).__name__
            ids = as_ids(place, ids)
            if len(ids) != count:
                raise ValueError(f"{place}: ids must have shape [{count}], got [{len(ids)}]")
            refuse_repeats(place, ids)
        self._next_id = count if ids is None else int(ids.max(initial=-1)) + 1
        return None if ids is None else ids.copy()

    def _begin(self) -> None:
        self.epoch = Epoch()
        self._guard = Guard()

    def _next_epoch(self) -> None:
        """Make masks of before void."""
        self.epoch.over = True
        self.epoch = Epoch()

    def slots_of(self, ids: Any) -> np.ndarray:
        """The slot of each of the items `ids`, int64 [n].

        Raises
        ------
        TypeError, ValueError
            An id that is not in the index; something else than integers.
        """
        place = f"{type(self).__name__}.slots_of"
        with self._guard.reading:
            return self._slots_of(place, as_ids(place, ids))

    def allow(self, ids: Any) -> Bitmap:
        """The mask that allows the items `ids` alone. `compact` makes it void, `add` too: it has as many slots as now.

        Raises
        ------
        TypeError, ValueError
            An id that is not in the index.
        """
        return self._bitmap(f"{type(self).__name__}.allow", ids)

    def deny(self, ids: Any) -> Bitmap:
        """The mask that allows all items but `ids`; see `allow`."""
        return ~self._bitmap(f"{type(self).__name__}.deny", ids)

    def _bitmap(self, place: str, ids: Any) -> Bitmap:
        with self._guard.reading:
            bitmap = Bitmap.allow(self.n_slots, self._slots_of(place, as_ids(place, ids)))
            bitmap.epoch = self.epoch
            return bitmap

    def _slots_of(self, place: str, ids: np.ndarray) -> np.ndarray:
        slots = self._find(ids)
        if (slots < 0).any():
            at = int((slots < 0).argmax())
            raise ValueError(f"{place}: ids[{at}] = {ids[at]} is not in the index")
        return slots

    def _new_ids(self, place: str, ids: Any, count: int) -> np.ndarray:
        """The ids of `count` items to be added: those given, which must be new, or the next ones. The lock is held."""
        if ids is None:
            if self._next_id + count > 2**63:
                raise ValueError(f"{place}: ids must be given, since the highest id there can be is taken")
            return following(self._next_id, count)
        ids = as_ids(place, ids)
        if len(ids) != count:
            raise ValueError(f"{place}: ids must have shape [{count}], got [{len(ids)}]")
        refuse_repeats(place, ids)
        present = self._find(ids) >= 0
        if present.any():
            at = int(present.argmax())
            raise ValueError(f"{place}: ids[{at}] = {ids[at]} is in the index already")
        return ids
