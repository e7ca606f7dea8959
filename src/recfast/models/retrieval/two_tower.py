"""Two towers: a user vector from history and id, an item vector, their dot product; softmax over the catalogue.

Covington, Adams, Sargin, "Deep Neural Networks for YouTube Recommendations", RecSys 2016; the correction of sampled
negatives after Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019;
in-batch and uniform negatives together after Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural
Networks in Recommendations", WWW 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval.base import Retriever, trained_rows
from recfast.nn.history import recent_events, segment_softmax, weighted_sum
from recfast.nn.losses import NegativesLoss

if TYPE_CHECKING:
    from recfast.data import Batch, Dataset, Jagged, Schema

# Up to so many items the softmax over all of them costs less than drawing a sample.
_ALL = 20_000
_NEGATIVES = ("auto", "all", "batch", "uniform", "mixed")


class TwoTower(Retriever):
    r"""Retriever with a user tower over the history and a table of items.

    .. math::
        h_u = \sum_j \mathrm{softmax}_j(a_{\mathrm{age}(j)})\, e_j + p_u, \qquad
        s_{ui} = (h_u + \mathrm{MLP}(h_u)) \cdot v_i + b_i

    The last coordinate of an item vector is its bias b, that of a user vector is 1: the score is one dot product of
    `dim` numbers, which every index of inner products understands.

    Parameters
    ----------
    schema
        Fitted; needs a column with the role "item" and a `Sequence` of items.
    dim
        D, width of the vectors, bias included.
    sequence
        Name of the sequence; the first one if None.
    max_length
        The last so many items of a history count.
    user_id
        Add an embedding p of the user id (zero for unknown users).
    recency
        Learn the weight of an item from its age in the history, a [max_length]; else a plain mean.
    history_dropout
        Each item of a history is left out with this probability in training.
    item_bias
        Learn b, from the logarithm of the item's share of the positives on; without, D coordinates are free.
    shared_items
        One table for e and v, which halves the memory.
    hidden
        Widths of the MLP's hidden layers (ReLU); empty for none.
    temperature
        Both vectors (bias aside) at length 1, and the product divided by this; None for the plain product.
    negatives
        "all" items; those of the "batch"; `num_negatives` "uniform" ones for the whole batch; "mixed", both of the
        latter; "auto", all up to 20,000 items and mixed beyond. Sampled ones are corrected by how often they come.
    seed
        Of the initial weights.

    Notes
    -----
    Settings that did well on ml-100k: AdamW, lr 2e-3, weight decay 0.05, batches of 512, best after 12 or 13 epochs.
    A training row's history is the items before it, as the batch has them. Trained on the items after it as well, the
    model finds a seventh fewer of the items that follow.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 64,
        sequence: str | None = None,
        max_length: int = 50,
        user_id: bool = True,
        recency: bool = True,
        history_dropout: float = 0.3,
        item_bias: bool = True,
        shared_items: bool = False,
        hidden: Sequence[int] = (),
        temperature: float | None = None,
        negatives: Literal["auto", "all", "batch", "uniform", "mixed"] = "auto",
        num_negatives: int = 2048,
        seed: int = 0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "schema", "__class__")}
        super().__init__(schema, sequence, options | {"hidden": list(hidden)})
        if negatives not in _NEGATIVES:
            raise InputError(f"TwoTower: negatives = {negatives!r} is not one of {', '.join(map(repr, _NEGATIVES))}")
        if dim < 2 or max_length < 1 or num_negatives < 1 or not 0 <= history_dropout < 1:
            raise InputError(
                f"TwoTower: dim = {dim}, max_length = {max_length}, num_negatives = {num_negatives}, history_dropout = "
                f"{history_dropout}; expected at least 2, 1, 1, and a probability below 1"
            )
        if temperature is not None and not temperature > 0:
            raise InputError(f"TwoTower: temperature = {temperature} is not above 0")
        self.max_length, self.history_dropout, self.temperature = max_length, history_dropout, temperature
        self.negatives = ("all" if self.rows <= _ALL else "mixed") if negatives == "auto" else negatives
        self.num_negatives = num_negatives
        # User vectors come divided by the temperature.
        self.criterion = NegativesLoss("softmax", normalize="none" if temperature is None else "table")
        width = dim - 1 if item_bias else dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.events = nn.Parameter(torch.randn(self.rows, width) * 0.4 / width**0.5)
            self.items = self.events if shared_items else nn.Parameter(torch.randn(self.rows, width) * 0.4 / width**0.5)
            self.users = None
            if user_id and self.user_column is not None:
                self.users = nn.Embedding(schema.rows(self.user_column), width, padding_idx=0)
                nn.init.normal_(self.users.weight[1:], std=0.4 / width**0.5)
            widths = [width, *hidden]
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
            self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], width)) if hidden else None
        self.recency = nn.Parameter(torch.zeros(max_length)) if recency else None
        self.bias = nn.Parameter(torch.zeros(self.rows)) if item_bias else None

    def prepare(self, dataset: Dataset) -> None:
        """Count the items; before the first training, begin the biases at the popularity."""
        first = not self.counts.any()
        super().prepare(dataset)
        if first and self.bias is not None:
            share = (self.counts + 1.0) / (self.counts + 1.0).sum()
            with torch.no_grad():
                self.bias.copy_(share.log())

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        dropout = self.history_dropout if self.training else 0.0
        events = recent_events(histories.values, histories.offsets, self.max_length, dropout=dropout)
        rows = histories.offsets.shape[0] - 1
        logits = self.events.new_zeros(events.age.shape) if self.recency is None else self.recency[events.age]
        weight = segment_softmax(logits, events.owner, rows)
        user = weighted_sum(self.events, events, weight, sparse=self.sparse_gradients)
        if self.users is not None and users is not None:
            user = user + F.embedding(users, self.users.weight, padding_idx=0, sparse=self.sparse_gradients)
        if self.mlp is not None:
            user = user + self.mlp(user)
        if self.temperature is not None:
            user = F.normalize(user, dim=1) / self.temperature
        return user if self.bias is None else F.pad(user, (0, 1), value=1.0)

    def item_vectors(self) -> Tensor:
        items = self.items if self.temperature is None else F.normalize(self.items, dim=1)
        return items if self.bias is None else torch.cat([items, self.bias[:, None]], dim=1)

    def similarity_vectors(self) -> Tensor:
        return self.items.detach()

    def forward(self, batch: Batch) -> Tensor:
        """Return the user vectors of a batch of positive rows, float32 [R, D]."""
        users = None if self.users is None else batch.column(self.user_column)
        return self.user_vectors(self.histories(batch), users)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the rows' items, over all items or corrected for a sample of them."""
        user, positive = trained_rows(output, batch.column(self.item_column))
        if len(positive) == 0:
            return user.sum()
        if self.bias is not None:
            user = user[:, :-1]
        if self.negatives == "all":
            return self.criterion(user, self.items, positive, bias=self.bias, first=1)
        self.criterion.sparse = self.sparse_gradients
        ids, log_expected = self._sample(positive)
        return self.criterion(user, self.items, positive, ids, bias=self.bias, log_expected=log_expected)

    def _sample(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids int64 [K] that stand for the catalogue, and the logarithm of each one's expected number."""
        parts, in_batch, uniform = [], 0, 0
        if self.negatives in ("batch", "mixed"):
            if not self.counts.any():
                raise InputError("TwoTower: negatives of the batch need item counts: call prepare(dataset) first")
            parts.append(positive)
            # A row sees the positives of the others.
            in_batch = len(positive) - 1
        if self.negatives in ("uniform", "mixed"):
            uniform = self.num_negatives
            parts.append(torch.randint(1, self.rows, (uniform,), device=positive.device))
        ids = torch.cat(parts)
        share = self.counts[ids] / self.counts.sum().clamp(min=1)
        return ids, (in_batch * share + uniform / (self.rows - 1)).clamp(min=1e-12).log()
