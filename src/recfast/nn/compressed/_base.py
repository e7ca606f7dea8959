"""What the compressed tables share: names, checks, lookups, hashing, and how a budget is divided."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from recfast.nn._table_group import names_and_aliases
from recfast.ops import _check


class CompressedTables(nn.Module, abc.ABC):
    """Tables of (name, rows), looked up by name or all together; a method says what a row is.

    Rows of all tables are numbered through: row `id` of a table is row `start + id` of the whole.

    Parameters
    ----------
    schema_or_specs : list of (name, rows), or a fitted recfast.data.Schema
        Of a schema: the categorical columns in their order; a sequence column shares the table of its `of`.
    dim : int
        D.
    """

    def __init__(self, schema_or_specs: Any, dim: int) -> None:
        super().__init__()
        place = type(self).__name__
        _check.at_least(place, "dim", dim, 1)
        self.specs, aliases = names_and_aliases(schema_or_specs, place)
        self.dim = dim
        sizes = [rows for _, rows in self.specs]
        starts = [sum(sizes[:table]) for table in range(len(sizes))]
        self._table = {name: table for table, (name, _) in enumerate(self.specs)}
        self._table.update({name: self._table[of] for name, of in aliases.items()})
        self.total_rows = sum(sizes)
        self.register_buffer("_sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("_starts", torch.tensor(starts), persistent=False)

    def rows(self, name: str) -> int:
        """The number of rows of table `name`."""
        return self.specs[self._known(name)][1]

    @property
    def float_bytes(self) -> int:
        """Bytes of the same tables in float32."""
        return 4 * self.total_rows * self.dim

    @abc.abstractmethod
    def memory_bytes(self) -> int:
        """Bytes needed to serve: what the rows are made of, and what finds it (hash seeds, sizes, masks, offsets)."""

    @abc.abstractmethod
    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows int64 [n], numbered through, checked -> their values float32 [n, D]."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up one id of every table.

        Parameters
        ----------
        ids : Tensor [B, F], int32 or int64
            F is the number of tables, in the order of the specs.

        Returns
        -------
        Tensor [B, F, D], float32

        Raises
        ------
        IndexError
            An id outside its table; the sentence names table, position and value.
        """
        place = type(self).__name__
        _check.tensor(place, "ids", ids, dtypes=_check.INDEX_DTYPES, shape=["B", len(self.specs)])
        ids = ids.to(torch.int64)
        if bool(((ids < 0) | (ids >= self._sizes)).any()):
            for column, (name, rows) in enumerate(self.specs):
                _check.indices(place, name, ids[:, column], rows)
        return self._gather((ids + self._starts).reshape(-1)).reshape(*ids.shape, self.dim)

    def lookup(self, requests: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Look up any number of id tensors at once.

        Parameters
        ----------
        requests : list of (name, Tensor of any shape, int32 or int64)
            The name of a table, or of a sequence column that shares one. Names may repeat.

        Returns
        -------
        list of Tensor [*, D], float32
            One for each request, in order.

        Raises
        ------
        IndexError
            An id outside its table; the sentence names table, position (in the flattened ids) and value.
        """
        if not requests:
            return []
        flat = []
        for name, ids in requests:
            table = self._known(name)
            _check.tensor(type(self).__name__, name, ids, dtypes=_check.INDEX_DTYPES)
            _check.indices(type(self).__name__, name, ids, self.specs[table][1])
            flat.append(ids.reshape(-1).to(torch.int64) + self._starts[table])
        parts = self._gather(torch.cat(flat)).split([ids.numel() for _, ids in requests])
        return [part.reshape(*ids.shape, self.dim) for part, (_, ids) in zip(parts, requests, strict=True)]

    @torch.no_grad()
    def dequantize(self, name: str) -> torch.Tensor:
        """The rows of table `name` as they are served: Tensor [T, D], float32, a copy."""
        table = self._known(name)
        start = int(self._starts[table])
        was_training = self.training
        self.eval()
        try:
            return self._gather(torch.arange(start, start + self.specs[table][1], device=self._starts.device)).clone()
        finally:
            self.train(was_training)

    def extra_repr(self) -> str:
        return (
            f"{len(self.specs)} tables, {self.total_rows} rows, dim={self.dim}, "
            f"{self.memory_bytes()} of {self.float_bytes} bytes"
        )

    def _known(self, name: str) -> int:
        if name not in self._table:
            place = type(self).__name__
            raise KeyError(f"{place}: there is no table {name!r}; there are {', '.join(self._table)}")
        return self._table[name]

    def _which(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows numbered through -> (their table, their id in it), int64 [n] each."""
        table = torch.bucketize(rows, self._starts, right=True) - 1
        return table, rows - self._starts[table]

    def _budget(self, ratio: float) -> int:
        """Bytes that `ratio` of the float32 tables allows."""
        place = type(self).__name__
        if not 0 < ratio <= 1:
            raise ValueError(f"{place}: ratio must lie in (0, 1], got {ratio}")
        return math.floor(ratio * self.float_bytes + 1e-6)

    def _short(self, ratio: float, needed: float) -> ValueError:
        place = type(self).__name__
        return ValueError(
            f"{place}: ratio = {ratio} leaves {self._budget(ratio)} bytes, at least {math.ceil(needed)} are needed"
        )


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes of the values of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# A table of at most so many rows stays whole: there, two ids in one row cost much and save nothing.
WHOLE_ROWS = 16


def divide(wanted: Sequence[int], total: int, least: Sequence[int]) -> list[int] | None:
    """Divide `total` rows among tables, in proportion to what they would have.

    Parameters
    ----------
    wanted
        Rows that each table would have.
    total
        Rows there are.
    least
        Rows that each must have.

    Returns
    -------
    list of int, or None
        Between `least` and `wanted` each, together at most `total` and, where tables are cut, hardly less. None where
        `least` is too much.
    """

    def shares(parts: int) -> list[int]:
        return [min(want, max(few, want * parts >> 30)) for want, few in zip(wanted, least, strict=True)]

    if sum(shares(0)) > total:
        return None
    # The share that all keep, in units of 2^-30.
    low, high = 0, 1 << 30
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(shares(middle)) <= total else (low, middle - 1)
    return shares(low)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hashed(x: torch.Tensor, salt: torch.Tensor | int, ranges: torch.Tensor | int) -> torch.Tensor:
    """Hash integers into [0, ranges), evenly: the finaliser of SplitMix64, its top 31 bits scaled to the range.

    Parameters
    ----------
    x : Tensor, int64
    salt : int64, broadcast against x
        Another salt is another hash function.
    ranges : int64, broadcast against x
        At most 2^32.

    References
    ----------
    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    # Products wrap modulo 2^64, as they shall.
    x = x + (torch.as_tensor(salt) + 1) * _GOLDEN
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return (_shift(x ^ _shift(x, 31), 33) * ranges) >> 31
