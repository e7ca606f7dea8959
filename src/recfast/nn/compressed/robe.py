"""ROBE: every embedding is cut out of one shared array."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recfast.nn.compressed._base import CompressedTables, bytes_of, hashed
from recfast.ops import _check


class RobeTables(CompressedTables):
    """Random offset block embeddings: a row is D / Z blocks of Z neighbours in one array that all tables share.

    .. math:: e_{t,i}[zZ + k] = a\\big[(h(t, i, z) + k) \\bmod M\\big], \\qquad 0 \\le k < Z

    Blocks begin anywhere, so they overlap; the array is a ring.

    Parameters
    ----------
    schema_or_specs, dim
        As in `nn.EmbeddingTables`.
    ratio : float in (0, 1]
        `memory_bytes()` is at most this share of the float32 tables.
    block : int
        Z, a divisor of D; D if left out. The larger, the fewer cache lines a row touches.
    init_std : float
        The array starts as N(0, init_std^2).
    seed : int
        Of the array and of the hash function.

    Raises
    ------
    ValueError
        Options out of range, or a ratio that leaves less than a block.

    References
    ----------
    Desai, Chou and Shrivastava, "Random Offset Block Embedding (ROBE) for compressed embedding tables in deep learning
    recommendation systems", MLSys 2022, arXiv 2108.02191.
    """

    def __init__(
        self,
        schema_or_specs: Any,
        dim: int,
        *,
        ratio: float,
        block: int | None = None,
        init_std: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(schema_or_specs, dim)
        self.block = dim if block is None else block
        place = type(self).__name__
        _check.at_least(place, "block", self.block, 1)
        if dim % self.block:
            raise ValueError(f"{place}: block must divide dim = {dim}, got {self.block}")
        size = (self._budget(ratio) - 8) // 4
        if size < self.block:
            raise self._short(ratio, 8 + 4 * self.block)
        self.register_buffer("hash_seed", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("_inside", torch.arange(self.block), persistent=False)
        self.register_buffer("_blocks", torch.arange(dim // self.block), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(size).normal_(0.0, init_std, generator=generator))

    def positions(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows int64 [n], numbered through -> the places in `weight` of their columns, int64 [n, D]."""
        # A row's number stands for its table and id.
        keys = rows[:, None] * len(self._blocks) + self._blocks
        starts = hashed(keys, self.hash_seed, len(self.weight))
        return ((starts[:, :, None] + self._inside) % len(self.weight)).reshape(len(rows), self.dim)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        # Its backward is index_add, several times quicker than that of indexing.
        return self.weight.index_select(0, self.positions(rows).reshape(-1)).view(len(rows), self.dim)

    def memory_bytes(self) -> int:
        """Bytes needed to serve: the array and the seed."""
        return bytes_of(self.weight, self.hash_seed)
