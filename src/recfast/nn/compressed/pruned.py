"""Magnitude pruning: small weights are dropped while the rest trains; what is left is stored sparsely."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recfast.nn.compressed._base import CompressedTables, bytes_of
from recfast.ops import _check

# Rows between two stored positions of the sparse form; those of the rows between are counted from their bitmaps.
_BLOCK_ROWS = 16
_BITS_OF_BYTE = torch.arange(256)[:, None] >> torch.arange(8) & 1


class PrunedTables(CompressedTables):
    """Tables whose smallest weights, over all tables together, become zero for good while training goes on.

    After step t the share of zeros is

    .. math:: s_t = s \\Big(1 - \\big(1 - \\tfrac{t - t_0}{t_1 - t_0}\\big)^3\\Big), \\qquad t_0 \\le t \\le t_1

    with s the share that meets the budget. A weight once pruned gets no gradient. In training mode, with gradients
    enabled, each call counts as a step; `compact()` gives the form to serve.

    Parameters
    ----------
    schema_or_specs, dim
        As in `nn.EmbeddingTables`.
    ratio : float in (0, 1]
        `memory_bytes()`, of the sparse form, is at most this share of the float32 tables from step `end` on.
    begin, end : int
        t_0 and t_1, in steps.
    every : int
        Steps between two prunings.
    init_std : float
        Rows start as N(0, init_std^2).
    seed : int

    Raises
    ------
    ValueError
        Options out of range, or a ratio below what the bitmaps of the sparse form take.

    References
    ----------
    Zhu and Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression", ICLR workshop
    2018, arXiv 1710.01878; of embeddings in CTR models: Deng et al., "DeepLight", WSDM 2021, arXiv 2002.06987.
    """

    def __init__(
        self,
        schema_or_specs: Any,
        dim: int,
        *,
        ratio: float,
        begin: int,
        end: int,
        every: int = 20,
        init_std: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(schema_or_specs, dim)
        place = type(self).__name__
        _check.at_least(place, "begin", begin, 0)
        _check.at_least(place, "end", end, begin + 1)
        _check.at_least(place, "every", every, 1)
        self.begin, self.end, self.every = begin, end, every
        overhead = _sparse_overhead(self.total_rows, dim)
        self.kept = min(self.total_rows * dim, (self._budget(ratio) - overhead) // 4)
        if self.kept < 1:
            raise self._short(ratio, overhead + 4)
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(self.total_rows, dim).normal_(0.0, init_std, generator=generator))
        self.register_buffer("mask", torch.ones(self.total_rows, dim, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def density(self) -> float:
        """The share of weights that are left."""
        return float(self.mask.float().mean())

    @property
    def finished(self) -> bool:
        """Whether the budget is met."""
        return int(self.steps) > self.end

    def scheduled(self, step: int) -> int:
        """The number of weights that are left after `step`."""
        whole = self.weight.numel()
        progress = min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return whole - round((whole - self.kept) * (1 - (1 - progress) ** 3))

    @torch.no_grad()
    def prune_(self, kept: int) -> None:
        """Keep the `kept` largest weights, or those that are left if there are fewer."""
        size = self.weight.abs().masked_fill_(~self.mask, -1.0).flatten()
        if kept >= int(self.mask.sum()):
            return
        chosen = torch.topk(size, kept, sorted=False).indices
        self.mask.zero_().view(-1)[chosen] = True
        self.weight.mul_(self.mask)

    def compact(self) -> SparseTables:
        """The same rows, stored sparsely, to serve."""
        return SparseTables(self.specs, (self.weight * self.mask).detach(), self.mask)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            step = int(self.steps)
            if self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end):
                self.prune_(self.scheduled(step))
            self.steps += 1
        return nn.functional.embedding(rows, self.weight) * self.mask[rows]

    def memory_bytes(self) -> int:
        """Bytes of the sparse form of the weights that are left now."""
        return 4 * int(self.mask.sum()) + _sparse_overhead(self.total_rows, self.dim)


class SparseTables(CompressedTables):
    """Tables with few weights, to serve: the weights in a row, and a bitmap of the columns they stand in.

    Bytes: 4 a weight, :math:`\\lceil D / 8 \\rceil` a row for the bitmap, 4 for every 16 rows for the position of
    their first weight (8 from 2^31 weights on).

    Parameters
    ----------
    specs : list of (name, rows)
    weight : Tensor [sum of rows, D], float32
    mask : Tensor [sum of rows, D], bool
        Which weights are stored; those that are not zero if left out.
    """

    def __init__(self, specs: Any, weight: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        place = type(self).__name__
        _check.tensor(place, "weight", weight, dtypes=[torch.float32], shape=["T", "D"])
        super().__init__(specs, weight.shape[1])
        _check.tensor(place, "weight", weight, shape=[self.total_rows, self.dim])
        mask = weight != 0 if mask is None else mask
        _check.tensor(place, "mask", mask, dtypes=[torch.bool], shape=list(weight.shape))
        padded = nn.functional.pad(mask, (0, -self.dim % 8)).view(len(weight), -1, 8)
        powers = 1 << torch.arange(8, device=mask.device)
        blocks = nn.functional.pad(mask.sum(1), (0, -len(weight) % _BLOCK_ROWS)).view(-1, _BLOCK_ROWS).sum(1)
        first = blocks.cumsum(0) - blocks
        self.register_buffer("values", weight.detach()[mask].clone())
        self.register_buffer("bitmap", (padded * powers).sum(2).to(torch.uint8))
        self.register_buffer("first", first.to(torch.int32 if len(self.values) < 2**31 else torch.int64))
        self.register_buffer("_bits", _BITS_OF_BYTE.to(weight.device), persistent=False)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        if not len(self.values):
            return self.values.new_zeros(len(rows), self.dim)
        place = rows % _BLOCK_ROWS
        # The rows of the block that stand before; those behind the last row of all are never before one.
        inside = torch.arange(_BLOCK_ROWS, device=rows.device)
        block = (rows - place)[:, None] + inside
        counts = self._bits.sum(1)[self.bitmap.long()].sum(1)
        before = torch.where(inside < place[:, None], counts[block.clamp(max=self.total_rows - 1)], 0).sum(1)
        bits = self._bits[self.bitmap[rows].long()].reshape(len(rows), -1)[:, : self.dim]
        position = (self.first[rows // _BLOCK_ROWS] + before)[:, None] + bits.cumsum(1) - bits
        return torch.where(bits.bool(), self.values[position.clamp(max=len(self.values) - 1)], 0.0)

    def memory_bytes(self) -> int:
        """Bytes of weights, bitmaps and positions."""
        return bytes_of(self.values, self.bitmap, self.first)


def _sparse_overhead(rows: int, dim: int) -> int:
    """Bytes of the sparse form beside the weights (of which there are below 2^31)."""
    return rows * -(-dim // 8) + 4 * -(-rows // _BLOCK_ROWS)
