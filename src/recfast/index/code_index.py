"""Items coded by M codebooks: exact search over a table of scores, with adds, updates and deletes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from recfast import ops
from recfast.errors import InputError
from recfast.index import _file
from recfast.index._arrays import as_ids, as_tensor, refuse_repeats

_ORDERS = ("auto", "none")


class CodeIndex:
    """Items coded by M codebooks of K codes each, searched exactly under a table of scores.

    .. math:: y_{q,i} = \\sum_{m=0}^{M-1} T_{q,m,c_{i,m}} + b_i

    Every item stands in a *slot*: its place in `codes`, then in the order of `add`. A removed item leaves its slot
    empty until `compact` closes the gaps. Masks speak of slots; answers, `update` and `remove` of external ids.

    Parameters
    ----------
    codes : array or Tensor [N, M] of integers in [0, K)
        uint8 and uint16 are taken without a copy where contiguous, and never written to; others are converted.
    n_codes : int
        K, in [1, 65536]. A table must have as many entries per codebook.
    bias : array or Tensor [N], float32, optional
        Added to the score of each item; -inf hides it.
    ids : array or Tensor [N] of distinct integers, at least 0, optional
        What an item is called outside; its slot where left out. Ties go to the lowest.
    order : "auto" or "none"
        The order in which items are laid out. It never changes an answer; both keep the order given.

    Raises
    ------
    TypeError, ValueError, IndexError
        A wrong dtype; a shape that does not fit, a repeated or negative id, NaN or +inf in `bias`; a code outside
        [0, K).

    Notes
    -----
    Searches may run at the same time in many threads. A change (`add`, `update`, `remove`, `compact`) must not run at
    the same time as anything else.
    """

    def __init__(self, codes: Any, n_codes: int = 256, *, bias: Any = None, ids: Any = None, order: str = "auto"):
        if order not in _ORDERS:
            raise ValueError(f"CodeIndex: order must be one of {', '.join(_ORDERS)}, got {order!r}")
        if not 1 <= n_codes <= 65536:
            raise ValueError(f"CodeIndex: n_codes must be in [1, 65536], got {n_codes}")
        self._n_codes = int(n_codes)
        self._order = order
        self._codes = self._as_codes("CodeIndex", codes, None)
        self._size = len(self._codes)
        self._bias = None if bias is None else as_tensor("CodeIndex", "bias", bias)
        self._ids = None if ids is None else as_ids("CodeIndex", ids)
        if self._ids is not None and len(self._ids) != self._size:
            raise ValueError(f"CodeIndex: ids must have shape [{self._size}], got [{len(self._ids)}]")
        self._live: torch.Tensor | None = None
        self._removed = 0
        self._next_id = self._size if self._ids is None else int(self._ids.max(initial=-1)) + 1
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        # Memory that came from outside is copied before the first change.
        self._owned = False
        if self._ids is not None:
            refuse_repeats("CodeIndex", self._ids)
        self._check_parts()

    def _check_parts(self) -> None:
        """Let the kernel read every code and bias once, so that searches need not."""
        ops.code_search(self._parts(), torch.empty((0, self._codes.shape[1], self._n_codes)), 0)

    def _as_codes(self, place: str, codes: Any, width: int | None) -> torch.Tensor:
        """Codes as a tensor of uint8 or uint16; `width` is M where the index exists already."""
        codes = as_tensor(place, "codes", codes)
        if codes.dim() != 2 or codes.shape[1] == 0 or (width is not None and codes.shape[1] != width):
            raise ValueError(f"{place}: codes must have shape [N, {width or 'M'}], got {list(codes.shape)}")
        if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
            raise TypeError(f"{place}: codes must be integers, got {str(codes.dtype).removeprefix('torch.')}")
        if width is None and codes.dtype in (torch.uint8, torch.uint16):
            return codes
        wanted = (torch.uint8 if self._n_codes <= 256 else torch.uint16) if width is None else self._codes.dtype
        # Through numpy here and below, since torch has few functions for uint16.
        array = codes.numpy()
        if array.size and (int(array.min()) < 0 or int(array.max()) >= self._n_codes):
            item, book = map(int, np.argwhere((array < 0) | (array >= self._n_codes))[0])
            raise IndexError(f"{place}: codes[{item}, {book}] = {array[item, book]} is outside [0, {self._n_codes})")
        return codes.to(wanted)

    def __len__(self) -> int:
        """The number of items, without the removed ones."""
        return self._size - self._removed

    def __repr__(self) -> str:
        return f"CodeIndex({len(self)} items, {self._codes.shape[1]} codebooks of {self._n_codes} codes)"

    @property
    def n_codes(self) -> int:
        """K, the number of codes of each codebook."""
        return self._n_codes

    @property
    def n_slots(self) -> int:
        """Items and removed ones: the length of a mask."""
        return self._size

    @property
    def codes(self) -> torch.Tensor:
        """The codes of each slot, [n_slots, M]. Not to be written to."""
        return self._codes[: self._size]

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of each slot, [n_slots] float32, or None. Not to be written to."""
        return None if self._bias is None else self._bias[: self._size]

    @property
    def ids(self) -> torch.Tensor:
        """The external id of each slot, [n_slots] int64. Not to be written to."""
        return torch.arange(self._size) if self._ids is None else torch.from_numpy(self._ids[: self._size])

    @property
    def live(self) -> torch.Tensor | None:
        """Which slots hold an item, [n_slots] bool, or None where all do. Not to be written to."""
        return None if self._live is None else self._live[: self._size]

    def _parts(self) -> ops.Codes:
        return ops.Codes(self.codes, self.bias, None if self._ids is None else self.ids, self.live)

    def search(self, table: Any, k: int, mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k best items for each query, exactly.

        Parameters
        ----------
        table : array or Tensor [Q, M, K], float32 (a tensor may be bfloat16 or float16)
            The score of each code for each query; -inf forbids every item that has the code.
        k : int
            May exceed the number of items, may be 0.
        mask : array or Tensor [n_slots] or [Q, n_slots], bool, optional
            The slots allowed, for all queries or for each (see `allow`).

        Returns
        -------
        scores : Tensor [Q, k], float32
        ids : Tensor [Q, k], int64
            Sorted by score descending, ties by lowest id, padded with (-inf, -1).

        Raises
        ------
        TypeError, ValueError
            A wrong dtype or shape; NaN or +inf in the table; a negative k.
        """
        table = as_tensor("CodeIndex.search", "table", table)
        mask = None if mask is None else as_tensor("CodeIndex.search", "mask", mask)
        # Unchecked codes below would be read outside a smaller table.
        if table.dim() != 3 or tuple(table.shape[1:]) != (self._codes.shape[1], self._n_codes):
            wanted = f"[Q, {self._codes.shape[1]}, {self._n_codes}]"
            raise ValueError(f"CodeIndex.search: table must have shape {wanted}, got {list(table.shape)}")
        return ops.code_search(self._parts(), table, k, mask=mask, check=False)

    def allow(self, ids: Any) -> torch.Tensor:
        """Make the mask [n_slots] that allows the items `ids` alone.

        Raises
        ------
        ValueError
            An id that is not in the index.
        """
        mask = torch.zeros(self._size, dtype=torch.bool)
        mask[torch.from_numpy(self._slots("CodeIndex.allow", as_ids("CodeIndex.allow", ids)))] = True
        return mask

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
        codes = self._as_codes(place, codes, self._codes.shape[1])
        bias = self._as_bias(place, bias, len(codes), required=self._bias is not None)
        automatic = ids is None
        if automatic and self._next_id + len(codes) > 2**63:
            raise ValueError(f"{place}: ids must be given, since the highest id there can be is taken")
        ids = np.arange(self._next_id, self._next_id + len(codes)) if automatic else as_ids(place, ids)
        if len(ids) != len(codes):
            raise ValueError(f"{place}: ids must have shape [{len(codes)}], got [{len(ids)}]")
        if not automatic:
            refuse_repeats(place, ids)
            present = self._find(ids) >= 0
            if present.any():
                at = int(present.argmax())
                raise ValueError(f"{place}: ids[{at}] = {ids[at]} is in the index already")
        start, end = self._size, self._size + len(codes)
        named = self._ids is not None or not np.array_equal(ids, np.arange(start, end))
        if self._sorted is None and named:
            self._sorted = self._sort()
        self._reserve(end)
        self._codes.numpy()[start:end] = codes.numpy()
        if self._bias is not None:
            self._bias[start:end] = bias
        if named:
            if self._ids is None:
                self._ids = np.arange(len(self._codes))
            self._ids[start:end] = ids
            by_id = np.argsort(ids, kind="stable")
            known, slots = self._sorted
            places = np.searchsorted(known, ids[by_id])
            self._sorted = np.insert(known, places, ids[by_id]), np.insert(slots, places, start + by_id)
        if self._live is not None:
            self._live[start:end] = True
        self._size = end
        self._next_id = max(self._next_id, int(ids.max(initial=-1)) + 1)
        return torch.from_numpy(ids)

    def update(self, ids: Any, codes: Any, *, bias: Any = None) -> None:
        """Give the items `ids` other codes, and another bias where one is given.

        Raises
        ------
        TypeError, ValueError, IndexError
            An id that is not in the index or given twice; codes or bias that do not fit. The index is unchanged then.
        """
        place = "CodeIndex.update"
        ids = as_ids(place, ids)
        codes = self._as_codes(place, codes, self._codes.shape[1])
        if len(ids) != len(codes):
            raise ValueError(f"{place}: codes must have shape [{len(ids)}, M], got {list(codes.shape)}")
        bias = self._as_bias(place, bias, len(codes), required=False)
        refuse_repeats(place, ids)
        slots = self._slots(place, ids)
        self._reserve(self._size)
        self._codes.numpy()[slots] = codes.numpy()
        if bias is not None:
            self._bias.numpy()[slots] = bias.numpy()

    def remove(self, ids: Any) -> None:
        """Take the items `ids` out; their slots stay empty until `compact`.

        Raises
        ------
        TypeError, ValueError
            An id that is not in the index or given twice. The index is unchanged then.
        """
        place = "CodeIndex.remove"
        ids = as_ids(place, ids)
        refuse_repeats(place, ids)
        slots = self._slots(place, ids)
        self._reserve(self._size)
        if self._live is None:
            self._live = torch.ones(len(self._codes), dtype=torch.bool)
        self._live[torch.from_numpy(slots)] = False
        self._removed += len(slots)
        if self._sorted is not None:
            known, order = self._sorted
            places = np.searchsorted(known, ids)
            self._sorted = np.delete(known, places), np.delete(order, places)

    def compact(self) -> None:
        """Close the gaps that `remove` left and give spare memory back. Ids stay, slots change."""
        keep = np.arange(self._size) if self._live is None else self.live.numpy().nonzero()[0]
        if self._ids is not None or self._removed:
            self._ids = self.ids.numpy()[keep]
        self._codes = torch.from_numpy(self.codes.numpy()[keep])
        self._bias = None if self._bias is None else torch.from_numpy(self.bias.numpy()[keep])
        self._live, self._removed, self._size = None, 0, len(keep)
        self._sorted = None
        self._owned = True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file (safetensors), whole or not at all, with a checksum over every byte."""
        arrays = {"codes": self.codes.numpy()}
        if self._bias is not None:
            arrays["bias"] = self.bias.numpy()
        if self._ids is not None:
            arrays["ids"] = self._ids[: self._size]
        if self._live is not None:
            arrays["live"] = self.live.numpy()
        config = {"n_codes": self._n_codes, "order": self._order, "next_id": self._next_id}
        _file.save(path, "CodeIndex", config, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False) -> CodeIndex:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path
        mmap : bool
            Map the file instead of reading it: processes share its memory. The file is still read through once, since
            its checksum is always verified. Changes stay in memory and never reach the file.

        Raises
        ------
        InputError
            No such file; truncated, corrupt, or not such a file.
        """
        config, arrays = _file.load(path, "CodeIndex", mmap=mmap)
        try:
            index = cls(arrays["codes"], config["n_codes"], bias=arrays.get("bias"), order=config["order"])
            index._restore(arrays.get("ids"), arrays.get("live"), config["next_id"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"CodeIndex.load: {path} is corrupt: {error}") from error
        return index

    def _restore(self, ids: np.ndarray | None, live: np.ndarray | None, next_id: int) -> None:
        if live is not None:
            if live.shape != (self._size,) or live.dtype != np.bool_:
                raise ValueError(f"live must be bool [{self._size}]")
            self._live = torch.from_numpy(live)
            self._removed = self._size - int(live.sum())
        if ids is not None:
            self._ids = as_ids("CodeIndex", ids)
            if len(self._ids) != self._size:
                raise ValueError(f"ids must have shape [{self._size}], got [{len(self._ids)}]")
            # Among live items only: a removed one may have come back in another slot.
            refuse_repeats("CodeIndex", self._ids if live is None else self._ids[live])
        self._next_id = int(next_id)

    def _as_bias(self, place: str, bias: Any, size: int, *, required: bool) -> torch.Tensor | None:
        if bias is None:
            if required:
                raise ValueError(f"{place}: bias must be given, since the index has one")
            return None
        if self._bias is None:
            raise ValueError(f"{place}: bias must be left out, since the index has none")
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

    def _sort(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the items in rising order, and their slots."""
        slots = np.arange(self._size) if self._live is None else self.live.numpy().nonzero()[0]
        ids = self.ids.numpy()[slots]
        order = np.argsort(ids, kind="stable")
        return ids[order], slots[order]

    def _find(self, ids: np.ndarray) -> np.ndarray:
        """The slot of each id, or -1."""
        if self._ids is None:
            inside = ids < self._size
            if self._live is not None:
                inside[inside] &= self.live.numpy()[ids[inside]]
            return np.where(inside, ids, -1)
        if self._sorted is None:
            self._sorted = self._sort()
        known, slots = self._sorted
        places = np.searchsorted(known, ids)
        found = places < len(known)
        found[found] &= known[places[found]] == ids[found]
        return np.where(found, slots[np.where(found, places, 0)] if len(slots) else -1, -1)

    def _slots(self, place: str, ids: np.ndarray) -> np.ndarray:
        slots = self._find(ids)
        if (slots < 0).any():
            at = int((slots < 0).argmax())
            raise ValueError(f"{place}: ids[{at}] = {ids[at]} is not in the index")
        return slots

    def _reserve(self, size: int) -> None:
        """Make room for `size` slots, twice as much as there was, in memory of our own."""
        capacity = len(self._codes)
        if self._owned and capacity >= size:
            return
        capacity = capacity if capacity >= size else max(size, 2 * capacity)

        def grown(old: np.ndarray) -> np.ndarray:
            new = np.empty((capacity, *old.shape[1:]), dtype=old.dtype)
            new[: self._size] = old[: self._size]
            return new

        self._codes = torch.from_numpy(grown(self._codes.numpy()))
        if self._bias is not None:
            self._bias = torch.from_numpy(grown(self._bias.numpy()))
        if self._ids is not None:
            self._ids = grown(self._ids)
        if self._live is not None:
            self._live = torch.from_numpy(grown(self._live.numpy()))
        self._owned = True
