"""What rankers read from a batch, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from recfast.data import Batch, Schema


def requests(schema: Schema, batch: Batch) -> list[tuple[str, torch.Tensor]]:
    """What to look up: the ids of each categorical column [R], then the values of each sequence [T].

    A sequence reads the table of the column it lists.
    """
    columns = [(column.name, batch.ids[:, j]) for j, column in enumerate(schema.categorical)]
    return columns + [(column.of, batch.sequences[column.name].values) for column in schema.sequences]


def per_row(pooled: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B, D] per user -> [R, D] per row: the candidates of a user share what is the user's."""
    if batch.candidate_offsets is None:
        return pooled
    return pooled.repeat_interleave(batch.candidate_offsets.diff(), dim=0)


def mean_pool(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[T, D] -> [B, D], the mean of each list; 0 for an empty one."""
    lengths = offsets.diff()
    owners = torch.arange(lengths.numel(), device=values.device).repeat_interleave(lengths)
    total = values.new_zeros(lengths.numel(), values.shape[1]).index_add(0, owners, values)
    return total / lengths.clamp(min=1).unsqueeze(1)


def last(values: torch.Tensor, offsets: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [T, ...] and offsets [B + 1] of the last `count` of each list."""
    lengths = offsets.diff().clamp(max=count)
    kept = torch.cat([offsets.new_zeros(1), lengths.cumsum(0)])
    first = (offsets[1:] - lengths - kept[:-1]).repeat_interleave(lengths)
    return values[first + torch.arange(first.numel(), device=first.device)], kept


def binary_cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of the labels."""
    if batch.label is None:
        raise ValueError("loss: the batch has no label")
    return functional.binary_cross_entropy_with_logits(logits, batch.label)
