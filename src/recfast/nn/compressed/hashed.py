"""The hashing trick: ids share rows by chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recfast.nn.compressed._base import WHOLE_ROWS, CompressedTables, bytes_of, divide, hashed


class HashedTables(CompressedTables):
    """Tables of fewer rows than ids: id i of table t reads row :math:`h_t(i) \\in [0, m_t)`, whoever else does.

    All tables keep the same share of their rows, the largest that fits the budget, but none fewer than 16 or all of its
    own, so that tables of a few ids stay whole.

    Parameters
    ----------
    schema_or_specs, dim
        As in `nn.EmbeddingTables`.
    ratio : float in (0, 1]
        `memory_bytes()` is at most this share of the float32 tables.
    init_std : float
        Rows start as N(0, init_std^2).
    seed : int
        Of the rows and of the hash functions.

    Raises
    ------
    ValueError
        Options out of range, or a ratio that leaves fewer rows than that.

    References
    ----------
    Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009, arXiv 0902.2206.

    Examples
    --------
    >>> tables = HashedTables([("user", 1000), ("city", 10)], 16, ratio=0.25)
    >>> tables(torch.tensor([[999, 9]])).shape
    torch.Size([1, 2, 16])
    """

    def __init__(self, schema_or_specs: Any, dim: int, *, ratio: float, init_std: float = 0.01, seed: int = 0) -> None:
        super().__init__(schema_or_specs, dim)
        # First row and number of rows of each table, and the seed: what serving needs beside the weights.
        overhead = 16 * len(self.specs) + 8
        sizes = [rows for _, rows in self.specs]
        least = [min(rows, WHOLE_ROWS) for rows in sizes]
        shares = divide(sizes, max(0, self._budget(ratio) - overhead) // (4 * dim), least)
        if shares is None:
            raise self._short(ratio, overhead + 4 * dim * sum(least))
        first = [sum(shares[:table]) for table in range(len(shares))]
        self.register_buffer("layout", torch.tensor([first, shares], dtype=torch.int64))
        self.register_buffer("hash_seed", torch.tensor(seed, dtype=torch.int64))
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(sum(shares), dim).normal_(0.0, init_std, generator=generator))

    def positions(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows int64 [n], numbered through -> the rows of `weight` that they read, int64 [n]."""
        table, ids = self._which(rows)
        first, size = self.layout[:, table]
        salt = self.hash_seed * len(self.specs) + table
        return first + torch.where(self._sizes[table] == size, ids, hashed(ids, salt, size))

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(self.positions(rows), self.weight)

    def memory_bytes(self) -> int:
        """Bytes needed to serve: the rows, where those of a table begin and how many they are, and the seed."""
        return bytes_of(self.weight, self.layout, self.hash_seed)
