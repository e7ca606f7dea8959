"""Softmax over the catalogue, or a sample of it, where several positives may share one history."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.data import Batch, Jagged
from recfast.errors import InputError
from recfast.models.retrieval.base import Retriever

if TYPE_CHECKING:
    from recfast.data import Dataset

NEGATIVES = ("auto", "all", "uniform", "sampled", "batch", "mixed", "private")
# Up to so many items the softmax over all of them is taken where nothing else is asked for.
_ALL = 5_000
# Minus infinity that leaves gradients finite where nothing else is in the sum.
_NEVER = -1e30


class Positives(NamedTuple):
    """The positives of a batch: positive r belongs to history `owner[r]`; both int64 [R], unknown items left out."""

    owner: Tensor
    items: Tensor


class Candidates(NamedTuple):
    """Items that stand for the catalogue.

    ids
        int64 [K], ascending, without repeats.
    log_weight
        float32 [K]: how many items of the catalogue this one stands for.
    """

    ids: Tensor
    log_weight: Tensor


def known_negatives(place: str, negatives: str) -> str:
    """Return the name, or raise InputError."""
    if negatives not in NEGATIVES:
        raise InputError(f"{place}: negatives = {negatives!r} is not one of {', '.join(map(repr, NEGATIVES))}")
    return negatives


def positives_of(model: Retriever, batch: Batch) -> tuple[Jagged, Tensor | None, Positives]:
    """Return the histories [B], their users int64 [B] and the positives of a batch whose rows may share histories."""
    items, offsets = batch.column(model.item_column), batch.candidate_offsets
    if offsets is None:
        histories = model.histories(batch)
    else:
        # A log without time has no sequence in its schema, but whoever makes such a batch may have drawn one.
        histories = batch.sequences[model.sequence or next(iter(batch.sequences))]
    owner = torch.arange(len(items), device=items.device)
    users = None if model.user_column is None else batch.column(model.user_column)
    if offsets is not None:
        owner = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=items.device), offsets.diff())
        if users is not None:
            # A history without positives has no row to say whose it is.
            first = offsets[:-1].clamp(max=max(len(items) - 1, 0))
            users = users[first] if len(items) else users.new_zeros(len(first))
    known = items != 0
    return histories, users, Positives(owner[known], items[known])


def draw(positives: Positives, counts: Tensor, negatives: str, number: int) -> Candidates:
    r"""Return the candidates of a batch.

    Parameters
    ----------
    positives
        Of the batch.
    counts
        int64 [rows(item)], train positives of each item.
    negatives
        "all" items; `number` "uniform" ones; "sampled", half of them uniform and half in proportion to the counts;
        those of the "batch"; "mixed", those of the batch and `number` uniform ones. An item that comes m times where E
        times are expected stands for m / E items (Yi et al., RecSys 2019).
    """
    rows, items = len(counts), positives.items
    if negatives == "auto":
        negatives = "all" if rows <= _ALL else "sampled"
    if negatives == "all":
        return Candidates(torch.arange(1, rows, device=items.device), torch.zeros(rows - 1, device=items.device))
    seen, expected = torch.zeros(rows, device=items.device), torch.zeros(rows, device=items.device)
    if negatives != "uniform" and not counts.any():
        raise InputError(f"negatives = {negatives!r} need item counts: call prepare(dataset) first")
    if negatives in ("batch", "mixed"):
        seen += torch.bincount(items, minlength=rows)
        # A row sees the positives of the others.
        expected += (len(items) - 1) * counts / counts.sum()
    popular = number // 2 if negatives == "sampled" else 0
    if popular:
        ends = counts.cumsum(0)
        drawn = torch.randint(int(ends[-1]), (popular,), device=items.device)
        seen += torch.bincount(torch.searchsorted(ends, drawn, right=True), minlength=rows)
        expected += popular * counts / counts.sum()
    uniform = 0 if negatives == "batch" else number - popular
    if uniform:
        seen += torch.bincount(torch.randint(1, rows, (uniform,), device=items.device), minlength=rows)
        expected += uniform / (rows - 1)
    ids = seen.nonzero()[:, 0]
    return Candidates(ids, (seen[ids] / expected[ids].clamp(min=1e-12)).log())


def softmax_loss(own: Tensor, others: Tensor, candidates: Candidates, positives: Positives) -> Tensor:
    r"""Return the mean over the positives of their cross-entropy against the candidates, by the scores of both.

    .. math::
        L_r = \ln\Bigl(e^{s_{r}} + \sum_{j \notin P_{o(r)}} w_j e^{s_{o(r) j}}\Bigr) - s_{r}

    P is what is positive for the history in this batch: one positive is no negative of another.

    Parameters
    ----------
    own
        float32 [R], of each positive for its history.
    others
        float32 [B, K], of each history and candidate.
    """
    if len(own) == 0:
        return others.sum() * 0.0
    ids = candidates.ids
    column = torch.searchsorted(ids, positives.items).clamp(max=len(ids) - 1)
    here = ids[column] == positives.items
    excluded = torch.zeros(others.shape, dtype=torch.bool, device=others.device)
    excluded[positives.owner[here], column[here]] = True
    weighed = (others + candidates.log_weight).masked_fill(excluded, _NEVER)
    return F.softplus(torch.logsumexp(weighed, dim=1)[positives.owner] - own).mean()


def private_loss(
    own: Tensor, pairs: Callable[[Tensor, Tensor], Tensor], positives: Positives, rows: int, number: int
) -> Tensor:
    r"""Return the mean cross-entropy of each positive against uniform items of its own.

    .. math::
        L_r = \ln\Bigl(e^{s_{r}} + \sum_{j \in N_r} e^{s_{o(r) j}}\Bigr) - s_{r}

    N has `number` items, drawn anew for each positive and counted once each; the positive itself is left out of it.

    Parameters
    ----------
    own
        float32 [R], of each positive for its history.
    pairs
        `pairs(owner, items)`, both int64 [P], gives the score of each pair, float32 [P].
    """
    if len(own) == 0:
        return own.sum()
    ids = torch.randint(1, rows, (len(own), number), device=own.device)
    theirs = pairs(positives.owner.repeat_interleave(number), ids.flatten()).view(ids.shape)
    theirs = theirs.masked_fill(ids == positives.items[:, None], _NEVER)
    return F.softplus(torch.logsumexp(theirs, dim=1) - own).mean()


class SoftmaxRetriever(Retriever):
    """Base of retrievers with `bias` [rows(item)], trained by `softmax_loss` or `private_loss`."""

    bias: nn.Parameter

    def prepare(self, dataset: Dataset) -> None:
        """Count the items; before the first training, let the biases begin at the logarithm of the items' share.

        The rarest is at 0, so that a sum of terms that are cut at 0 begins whole.
        """
        first = not self.counts.any()
        super().prepare(dataset)
        if first and self.bias.requires_grad:
            share = (self.counts + 1.0).log()
            with torch.no_grad():
                self.bias.copy_(share - share[1:].min())
