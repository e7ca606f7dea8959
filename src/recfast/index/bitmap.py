"""Sets of items as bits: what a search may return."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch

from recfast.ops import permute_mask


class Epoch:
    """The time from one renumbering of an index's slots to the next; `over` once they have been renumbered."""

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over = False


class BySlot(NamedTuple):
    """The words of a bitmap for a search that is to look bits up by slot."""

    words: torch.Tensor


# Bits are few where they are at most one in this many.
_FEW = 32


class Bitmap:
    """A set of slots, or one a query, as bits: the `mask` of every index's search.

    It is made once and used for many searches: an eighth of a bool mask's memory, and what a search makes of it (its
    bits in the order in which an index lays out its items) is kept from call to call. A slot is an item's place in an
    index; see `CodeIndex`. A bitmap never changes; the operators `~`, `&`, `|` and `-` make new ones.

    Parameters
    ----------
    words : Tensor [P] or [Q, P], int64
        Bit j of word p says whether slot 64 p + j is in the set; P is `size` / 64, rounded up. Not copied, and not to
        be written to afterwards. Bits from `size` on must be 0.
    size : int
        Slots, in the set or not.

    Raises
    ------
    TypeError, ValueError
        Another dtype; a shape that does not fit; a bit set at or above `size`.
    """

    __slots__ = ("_asked", "_permuted", "epoch", "size", "words")

    def __init__(self, words: torch.Tensor, size: int):
        if not isinstance(words, torch.Tensor) or words.dtype != torch.int64:
            found = str(words.dtype).removeprefix("torch.") if isinstance(words, torch.Tensor) else type(words).__name__
            raise TypeError(f"Bitmap: words must be a tensor of int64, got {found}")
        if size < 0:
            raise ValueError(f"Bitmap: size must be at least 0, got {size}")
        wide = -(-size // 64)
        if words.dim() not in (1, 2) or words.shape[-1] != wide:
            raise ValueError(f"Bitmap: words must have shape [{wide}] or [Q, {wide}], got {list(words.shape)}")
        if size % 64 and bool((words[..., -1] & -(1 << size % 64)).any()):
            raise ValueError(f"Bitmap: words must have no bit at or above size = {size}")
        self.words = words.contiguous()
        self.size = int(size)
        # Where it was made from ids: an index that has renumbered its slots since refuses it.
        self.epoch: Epoch | None = None
        self._permuted: tuple[Any, torch.Tensor] | None = None
        self._asked = False

    @classmethod
    def allow(cls, index: Any, ids: Any, offsets: Any = None) -> Bitmap:
        """The set of the items `ids` alone.

        Parameters
        ----------
        index : int or index
            The number of slots, where `ids` are slots; or an index (something with `n_slots` and `slots_of(ids)`),
            where they are its external ids.
        ids : integers [T]
            May repeat.
        offsets : integers [Q + 1], optional
            One set a query: `ids[offsets[q]:offsets[q + 1]]`.

        Raises
        ------
        IndexError
            A slot outside [0, size).
        ValueError
            An id that is not in the index; offsets that do not start at 0, fall, or do not end at T.
        TypeError
            Something else than integers.
        """
        from recfast.index._arrays import as_ids

        place = "Bitmap.allow"
        ids = as_ids(place, ids)
        if isinstance(index, int | np.integer):
            size, slots, epoch = int(index), ids, None
            if size < 0:
                raise ValueError(f"{place}: size must be at least 0, got {size}")
            if len(slots) and int(slots.max()) >= size:
                at = int((slots >= size).argmax())
                raise IndexError(f"{place}: slots[{at}] = {slots[at]} is outside [0, {size})")
        else:
            while True:
                epoch = getattr(index, "epoch", None)
                slots = np.asarray(index.slots_of(ids))
                size = index.n_slots
                # Slots that another thread's `compact` gave to other items meanwhile are looked up again.
                if epoch is None or not epoch.over:
                    break
        wide = -(-size // 64)
        if offsets is not None:
            offsets = as_ids(place, offsets)
            if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(slots) or (np.diff(offsets) < 0).any():
                raise ValueError(f"{place}: offsets must rise from 0 to {len(slots)}")
            words = (slots >> 6) + np.repeat(np.arange(len(offsets) - 1) * wide, np.diff(offsets))
            bits = np.zeros((len(offsets) - 1, wide), dtype=np.uint64)
            np.bitwise_or.at(bits.reshape(-1), words, np.uint64(1) << (slots & 63).astype(np.uint64))
            bitmap = cls(torch.from_numpy(bits.view(np.int64)), size)
        else:
            mask = np.zeros(size, dtype=np.bool_)
            mask[slots] = True
            bitmap = cls._from_bytes(np.packbits(mask, bitorder="little"), size)
        bitmap.epoch = epoch
        return bitmap

    @classmethod
    def deny(cls, index: Any, ids: Any, offsets: Any = None) -> Bitmap:
        """The set of all slots but those of `ids`; arguments and errors are those of `allow`."""
        return ~cls.allow(index, ids, offsets)

    @classmethod
    def from_mask(cls, mask: Any) -> Bitmap:
        """The set of the places where `mask`, bool [N] or [Q, N] (array or tensor), is True.

        Raises
        ------
        TypeError, ValueError
            Another dtype; another number of dimensions.
        """
        from recfast.index._arrays import as_tensor

        mask = as_tensor("Bitmap.from_mask", "mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"Bitmap.from_mask: mask must be bool, got {str(mask.dtype).removeprefix('torch.')}")
        if mask.dim() not in (1, 2):
            raise ValueError(f"Bitmap.from_mask: mask must have shape [N] or [Q, N], got {list(mask.shape)}")
        packed = np.packbits(mask.numpy(), axis=-1, bitorder="little")
        return cls._from_bytes(packed, mask.shape[-1])

    @classmethod
    def from_packed(cls, packed: Any, size: int) -> Bitmap:
        """The set of the bits of `packed`, uint8 [ceil(size / 8)] or [Q, ceil(size / 8)], lowest bit first.

        Bits at or above `size`, which the last byte may have, are left out.

        Raises
        ------
        TypeError, ValueError
            Another dtype; a shape that does not fit.
        """
        from recfast.index._arrays import as_tensor

        packed = as_tensor("Bitmap.from_packed", "packed", packed)
        if packed.dtype != torch.uint8:
            raise TypeError(f"Bitmap.from_packed: packed must be uint8, got {str(packed.dtype).removeprefix('torch.')}")
        wide = -(-size // 8)
        if size < 0 or packed.dim() not in (1, 2) or packed.shape[-1] != wide:
            raise ValueError(
                f"Bitmap.from_packed: packed must have shape [{wide}] or [Q, {wide}] for {size} slots,"
                f" got {list(packed.shape)}"
            )
        return cls._from_bytes(packed.numpy(), size)

    @classmethod
    def _from_bytes(cls, packed: np.ndarray, size: int) -> Bitmap:
        words = np.zeros((*packed.shape[:-1], 8 * -(-size // 64)), dtype=np.uint8)
        words[..., : packed.shape[-1]] = packed
        if size % 8:
            words[..., size // 8] &= (1 << size % 8) - 1
        return cls(torch.from_numpy(words.view("<i8").astype(np.int64, copy=False)), size)

    def __len__(self) -> int:
        """The number of slots, in the set or not."""
        return self.size

    @property
    def queries(self) -> int | None:
        """Q, where there is a set for each query, or None."""
        return None if self.words.dim() == 1 else self.words.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the bool mask: (size,) or (Q, size)."""
        return (*self.words.shape[:-1], self.size)

    def __repr__(self) -> str:
        if self.queries is not None:
            return f"Bitmap({self.queries} sets of {self.size} slots)"
        return f"Bitmap({self.count()} of {self.size} slots)"

    def to_mask(self) -> torch.Tensor:
        """The bool mask [size] or [Q, size]."""
        packed = self.words.numpy().astype("<i8", copy=False).view(np.uint8)
        bits = np.unpackbits(packed, axis=-1, count=self.size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))

    def count(self) -> Any:
        """How many slots are in the set: an int, or an int64 tensor [Q]."""
        counts = _popcount(self.words.numpy())
        return int(counts) if self.words.dim() == 1 else torch.from_numpy(counts)

    def __getitem__(self, queries: int | slice) -> Bitmap:
        """The set of one query, or the sets of some, where there is one for each."""
        if self.words.dim() == 1:
            raise IndexError("Bitmap: it holds one set for all queries, which has no rows")
        return self._like(self.words[queries])

    def __invert__(self) -> Bitmap:
        words = ~self.words
        if self.size % 64:
            words[..., -1] &= (1 << self.size % 64) - 1
        return self._like(words)

    def __and__(self, other: Bitmap) -> Bitmap:
        return self._with(other, torch.bitwise_and)

    def __or__(self, other: Bitmap) -> Bitmap:
        return self._with(other, torch.bitwise_or)

    def __sub__(self, other: Bitmap) -> Bitmap:
        return self._with(other, lambda mine, others: mine & ~others)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self.size == other.size and torch.equal(self.words, other.words)

    __hash__ = None

    def by_position(self, packed: Any) -> torch.Tensor:
        """The words in the order in which a `PackedCodes` lays out its items: bit p is that of slot `packed.slots[p]`.

        What was made last is kept for as long as the same `slots` come, which nobody writes to below `size`: whoever
        lays items out anew makes a new tensor.
        """
        # Before what is kept: items may have been appended where `slots` had room.
        if packed.size != self.size:
            raise ValueError(f"Bitmap: there must be {self.size} items, got {packed.size}")
        slots = packed.slots
        if slots is None:
            return self.words
        kept = self._permuted
        if kept is not None and kept[0]() is slots:
            return kept[1]
        # What it costs is the bits that are set, so the smaller side is permuted.
        total = self.size * (1 if self.queries is None else self.queries)
        inverted = 2 * int(torch.as_tensor(self.count()).sum()) > total
        words = permute_mask((~self).words, packed) if inverted else permute_mask(self.words, packed)
        words = (~Bitmap(words, self.size)).words if inverted else words
        # One assignment, so that threads that come at the same time see the old pair or the new one.
        self._permuted = (weakref.ref(slots), words)
        return words

    def serving(self, packed: Any) -> Bitmap | BySlot:
        """What a search of `packed` is given: this bitmap, or its words by slot alone where these serve better.

        To lay the bits out by position takes about as long for each bit as a search takes for each item, so it is done
        where few bits are set or few are not, and otherwise when the bitmap comes a second time.
        """
        if packed.slots is None or self._asked:
            return self
        self._asked = True
        count = torch.as_tensor(self.count())
        few = torch.minimum(count, self.size - count)
        return self if bool((few * _FEW <= self.size).all()) else BySlot(self.words)

    def _like(self, words: torch.Tensor) -> Bitmap:
        made = Bitmap(words, self.size)
        made.epoch = self.epoch
        return made

    def _with(self, other: Any, operation: Any) -> Bitmap:
        if not isinstance(other, Bitmap):
            return NotImplemented
        if self.size != other.size:
            raise ValueError(f"Bitmap: both must have {self.size} slots, got {other.size}")
        rows = {self.queries, other.queries} - {None}
        if len(rows) == 2:
            raise ValueError(f"Bitmap: both must have {self.queries} sets, got {other.queries}")
        made = self._like(operation(self.words, other.words))
        # The older of two: it says that the set must be made again.
        if other.epoch is not None and (made.epoch is None or other.epoch.over):
            made.epoch = other.epoch
        return made

    def __getstate__(self) -> tuple[torch.Tensor, int]:
        return self.words, self.size

    def __setstate__(self, state: tuple[torch.Tensor, int]) -> None:
        self.words, self.size = state
        self.epoch, self._permuted, self._asked = None, None, False


def _popcount(words: np.ndarray) -> np.ndarray:
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(words.view(np.uint64)).sum(axis=-1, dtype=np.int64)
    table = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
    return table[words.view(np.uint8)].sum(axis=-1, dtype=np.int64)
