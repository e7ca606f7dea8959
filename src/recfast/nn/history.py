"""A user's history as one vector: a weighted mean of item embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Events(NamedTuple):
    """The entries of B histories that count, in order.

    ids
        int64 [T], none of them 0 ("unknown").
    owner
        int64 [T], the history each belongs to, never falling.
    age
        int64 [T], 0 for the last entry of the given history.
    offsets
        int64 [B + 1].
    """

    ids: Tensor
    owner: Tensor
    age: Tensor
    offsets: Tensor


def recent_events(
    values: Tensor,
    offsets: Tensor,
    max_length: int | None,
    *,
    exclude: Tensor | None = None,
    dropout: float = 0.0,
) -> Events:
    """Return what counts of jagged histories.

    Parameters
    ----------
    values, offsets
        int64 [T] and [B + 1]; each history is in time order, latest last.
    max_length
        Only the last so many entries of each history; None for all.
    exclude
        int64 [B]: an item that is taken out of each row's history, such as the one to be predicted.
    dropout
        Each entry is left out with this probability (torch's generator).
    """
    rows = offsets.shape[0] - 1
    lengths = offsets[1:] - offsets[:-1]
    owner = torch.repeat_interleave(torch.arange(rows, device=values.device), lengths)
    age = torch.repeat_interleave(offsets[1:] - 1, lengths) - torch.arange(values.shape[0], device=values.device)
    keep = values != 0
    if max_length is not None:
        keep &= age < max_length
    if exclude is not None:
        keep &= values != torch.repeat_interleave(exclude, lengths)
    if dropout > 0.0:
        keep &= torch.rand(values.shape, device=values.device) >= dropout
    place = keep.nonzero()[:, 0]
    owner = owner[place]
    kept = F.pad(torch.bincount(owner, minlength=rows).cumsum(0), (1, 0))
    return Events(values[place], owner, age[place], kept)


def segment_softmax(logits: Tensor, owner: Tensor, rows: int, *, empty: Tensor | None = None) -> Tensor:
    r"""Return :math:`e^{z_t} / (n_{o_t} + \sum_{t' : o_{t'} = o_t} e^{z_{t'}})`, float [T]; softmax in each history.

    Parameters
    ----------
    logits
        float [T].
    owner
        int64 [T], the history of each entry, in ``[0, rows)``.
    rows
        How many histories there are.
    empty
        n, int64 [rows]: so many entries of logit 0 take part in each history beside its own; none if None.
    """
    # The shift changes no value, so it needs no gradient.
    highest = logits.new_full((rows,), -torch.inf).scatter_reduce(0, owner, logits.detach(), "amax")
    rest = logits.new_zeros(rows)
    if empty is not None:
        highest = torch.where(empty > 0, highest.clamp(min=0.0), highest)
        rest = torch.where(empty > 0, empty * torch.exp(-highest), rest)
    weight = torch.exp(logits - highest.index_select(0, owner))
    return weight / rest.index_add(0, owner, weight).index_select(0, owner)


def segment_sum(rows: Tensor, owner: Tensor, count: int) -> Tensor:
    """Return the sum of the `rows` [T, D] of each owner in ``[0, count)``, float [count, D]; zeros for no rows."""
    return rows.new_zeros(count, rows.shape[1]).index_add(0, owner, rows)


def weighted_sum(table: Tensor, events: Events, weight: Tensor, *, sparse: bool = False) -> Tensor:
    """Return ``sum_t weight[t] * table[ids[t]]`` over each history's entries, float [B, D]; zeros for an empty one.

    The gradient of the table is a sparse tensor if asked for.
    """
    return F.embedding_bag(
        events.ids,
        table,
        events.offsets,
        mode="sum",
        per_sample_weights=weight,
        include_last_offset=True,
        sparse=sparse,
    )
