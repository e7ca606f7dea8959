"""DSSM: the query encoder of SparCode with one vector instead of tokens, and its dot product with an item vector.

Huang, He, Gao, Deng, Acero, Heck, "Learning Deep Structured Semantic Models for Web Search using Clickthrough Data",
CIKM 2013. It is what SparCode is to be compared with: same encoder, same negatives, same loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval._candidates import (
    Positives,
    SoftmaxRetriever,
    draw,
    known_negatives,
    positives_of,
    private_loss,
    softmax_loss,
)
from recfast.models.retrieval._history_encoder import encoder_of, head

if TYPE_CHECKING:
    from recfast.data import Batch, Jagged, Schema


class DSSM(SoftmaxRetriever):
    r"""Two towers: :math:`y_{ui} = W\,\mathrm{encoder}(u) \cdot v_i + b_i`.

    The last coordinate of an item vector is its bias, that of a user vector is 1.

    Parameters
    ----------
    schema
        Fitted; needs a column with the role "item" and a `Sequence` of items.
    dim
        Width of the vectors, without the bias.
    event_dim
        Width of the embeddings of the history; `dim` if None.
    sequence, max_length, encoder, hidden, user_id, recency, history_dropout, dropout, negatives, num_negatives
        As `SparCode` has them.
    item_bias, seed
        Also.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 64,
        event_dim: int | None = None,
        sequence: str | None = None,
        max_length: int = 50,
        encoder: Literal["mean", "gru", "attention"] = "mean",
        hidden: Sequence[int] = (128,),
        user_id: bool = True,
        recency: bool = True,
        history_dropout: float = 0.3,
        dropout: float = 0.3,
        negatives: Literal["auto", "all", "uniform", "sampled", "batch", "mixed", "private"] = "auto",
        num_negatives: int = 2048,
        item_bias: bool = True,
        seed: int = 0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "schema", "__class__")}
        super().__init__(schema, sequence, options | {"hidden": list(hidden)})
        if dim < 1 or num_negatives < 1:
            raise InputError(f"DSSM: dim = {dim}, num_negatives = {num_negatives}; expected at least 1 and 1")
        self.negatives, self.num_negatives = known_negatives("DSSM", negatives), num_negatives
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = encoder_of(self, schema, options, event_dim or dim)
            self.head = head(self.encoder, dim)
            self.items = nn.Parameter(torch.randn(self.rows, dim) * 0.4 / dim**0.5)
        self.bias = nn.Parameter(torch.zeros(self.rows), requires_grad=item_bias)

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        return F.pad(self.head(self.encoder(histories, users)), (0, 1), value=1.0)

    def item_vectors(self) -> Tensor:
        return self._vectors(slice(None))

    def similarity_vectors(self) -> Tensor:
        return self.items.detach()

    def forward(self, batch: Batch) -> tuple[Tensor, Positives]:
        """Return the user vectors float32 [B, D + 1] and the positives; rows of a batch may share histories."""
        histories, users, positives = positives_of(self, batch)
        return self.user_vectors(histories, users), positives

    def loss(self, output: tuple[Tensor, Positives], batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the positives, over all items or a sample of them."""
        user, positives = output

        def pairs(owner: Tensor, items: Tensor) -> Tensor:
            return (user[owner] * self._vectors(items)).sum(1)

        own = pairs(positives.owner, positives.items)
        if self.negatives == "private":
            return private_loss(own, pairs, positives, self.rows, self.num_negatives)
        candidates = draw(positives, self.counts, self.negatives, self.num_negatives)
        return softmax_loss(own, user @ self._vectors(candidates.ids).T, candidates, positives)

    def _vectors(self, ids: Tensor | slice) -> Tensor:
        return torch.cat([self.items[ids], self.bias[ids, None]], dim=1)
