"""Quotient and remainder: two short tables, and no two ids with the same pair of rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from recfast.nn.compressed._base import WHOLE_ROWS, CompressedTables, bytes_of, divide
from recfast.ops import _check

OPERATIONS = ("mult", "add", "concat")


class QuotientRemainderTables(CompressedTables):
    """Compositional embeddings: id i reads row :math:`i \\bmod m` of one table and row
    :math:`\\lfloor i / m \\rfloor` of another, and every id still has an embedding of its own.

    .. math:: e_i = r_{i \\bmod m} \\circ q_{\\lfloor i / m \\rfloor}

    A table of n rows costs :math:`m + \\lceil n / m \\rceil` rows, which is least near :math:`2 \\sqrt n`. All tables
    keep the same share of their rows, the largest that fits the budget, but none less than that; those of 16 rows or
    fewer stay whole.

    Parameters
    ----------
    schema_or_specs, dim
        As in `nn.EmbeddingTables`.
    ratio : float in (0, 1]
        `memory_bytes()` is at most this share of the float32 tables.
    operation : {"mult", "add", "concat"}
        Element by element product, sum, or concatenation of two rows of D / 2 columns (D even).
    init_std : float
        e starts with this standard deviation: for "mult" r as N(0, init_std^2) and q at 1, so that both learn at
        once; for "add" each with init_std^2 / 2.
    seed : int

    Raises
    ------
    ValueError
        Options out of range, or a ratio below what the split into quotient and remainder needs.

    References
    ----------
    Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems",
    KDD 2020, arXiv 1909.02107.
    """

    def __init__(
        self,
        schema_or_specs: Any,
        dim: int,
        *,
        ratio: float,
        operation: str = "mult",
        init_std: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(schema_or_specs, dim)
        place = type(self).__name__
        _check.choice(place, "operation", operation, OPERATIONS)
        if operation == "concat" and dim % 2:
            raise ValueError(f"{place}: operation concat needs an even dim, got {dim}")
        self.operation = operation
        # Costs are counted in rows of `width` columns. A whole table of D columns is `pieces` such rows an id.
        pieces = 2 if operation == "concat" else 1
        width = dim // pieces
        sizes = [rows for _, rows in self.specs]
        whole = [pieces * rows for rows in sizes]
        least = [
            full if rows <= WHOLE_ROWS else min(full, _least_cost(rows))
            for full, rows in zip(whole, sizes, strict=True)
        ]
        # Of each table: first row of the remainders, m, first row of the quotients (0: kept whole).
        overhead = 24 * len(sizes)
        costs = divide(whole, max(0, self._budget(ratio) - overhead) // (4 * width), least)
        if costs is None:
            raise self._short(ratio, overhead + 4 * width * sum(least))
        layout, total = [], 0
        for rows, cost, full in zip(sizes, costs, whole, strict=True):
            if cost == full:
                layout.append((total, rows, 0))
                total += full
                continue
            remainders = _most_remainders(rows, cost)
            layout.append((total, remainders, total + remainders))
            total += remainders + -(-rows // remainders)
        self.register_buffer("layout", torch.tensor(layout, dtype=torch.int64).T.contiguous())
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(total, width)
        weight.normal_(0.0, init_std, generator=generator)
        for rows, (first, remainders, quotients) in zip(sizes, layout, strict=True):
            if quotients and operation == "mult":
                weight[quotients : quotients + -(-rows // remainders)] = 1.0
            elif quotients and operation == "add":
                weight[first : quotients + -(-rows // remainders)] *= math.sqrt(0.5)
        self.weight = nn.Parameter(weight)

    def positions(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows int64 [n], numbered through -> (remainder's row, quotient's row in `weight`, bool: table kept whole).

        Of a whole table the two are the row itself or, for "concat", its two halves.
        """
        table, ids = self._which(rows)
        first, remainders, quotients = self.layout[:, table]
        whole = quotients == 0
        if self.operation == "concat":
            left = torch.where(whole, first + 2 * ids, first + ids % remainders)
            return left, torch.where(whole, left + 1, quotients + ids // remainders), whole
        left = first + ids % remainders
        return left, torch.where(whole, left, quotients + ids // remainders), whole

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        left, right, whole = self.positions(rows)
        remainder, quotient = (nn.functional.embedding(at, self.weight) for at in (left, right))
        if self.operation == "concat":
            return torch.cat([remainder, quotient], dim=1)
        if self.operation == "mult":
            return remainder * quotient.masked_fill(whole[:, None], 1.0)
        return remainder + quotient.masked_fill(whole[:, None], 0.0)

    def memory_bytes(self) -> int:
        """Bytes needed to serve: the rows of both kinds, and three numbers a table that find them."""
        return bytes_of(self.weight, self.layout)


def _least_cost(rows: int) -> int:
    """The least m + ceil(rows / m)."""
    root = math.isqrt(rows)
    return min(m + -(-rows // m) for m in (max(1, root), root + 1))


def _most_remainders(rows: int, cost: int) -> int:
    """The largest m with m + ceil(rows / m) <= cost: the more remainders, the fewer ids share one."""
    m = cost - 1
    while m + -(-rows // m) > cost:
        m -= 1
    return m
