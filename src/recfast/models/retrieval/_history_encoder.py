"""The query side that SparCode and the two towers it is compared with have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.data import Jagged
from recfast.errors import InputError
from recfast.nn.history import recent_events, segment_softmax, weighted_sum
from recfast.nn.transformer_block import TransformerBlock

if TYPE_CHECKING:
    from recfast.data import Schema
    from recfast.models.retrieval.base import Retriever

ENCODERS = ("mean", "gru", "attention")


class HistoryEncoder(nn.Module):
    """A history, and the user's id where it is known, as one vector.

    Parameters
    ----------
    rows, user_rows : int
        Of the tables of items and users; `user_rows` 0 for no user table.
    dim : int
        D, width of the embeddings.
    kind : {"mean", "gru", "attention"}
        The (learnably weighted) mean of the embeddings; the last state of a GRU; the last event after two blocks of
        causal self-attention.
    hidden : widths
        Of the ReLU layers after that. The vector is [z; MLP(z)], so that what goes in straight is not lost.
    max_length : int
        The last so many items count.
    recency : bool
        "mean": learn the weight of an item by its age. The others: "attention" has position embeddings where this is
        set.
    history_dropout, dropout : float
        In training: of whole events; of the units of MLP and blocks.
    """

    def __init__(
        self,
        rows: int,
        user_rows: int,
        dim: int,
        *,
        kind: str,
        hidden: Sequence[int],
        max_length: int,
        recency: bool,
        history_dropout: float,
        dropout: float,
    ) -> None:
        super().__init__()
        if kind not in ENCODERS:
            raise InputError(f"HistoryEncoder: encoder = {kind!r} is not one of {', '.join(map(repr, ENCODERS))}")
        if dim < 1 or max_length < 1 or not 0 <= history_dropout < 1 or not 0 <= dropout < 1:
            raise InputError(
                f"HistoryEncoder: dim = {dim}, max_length = {max_length}, history_dropout = {history_dropout}, dropout "
                f"= {dropout}; expected at least 1, 1, and probabilities below 1"
            )
        self.dim, self.kind, self.max_length, self.history_dropout = dim, kind, max_length, history_dropout
        self.events = nn.Parameter(torch.randn(rows, dim) * 0.4 / dim**0.5)
        self.users = None
        if user_rows:
            self.users = nn.Embedding(user_rows, dim, padding_idx=0)
            nn.init.normal_(self.users.weight[1:], std=0.4 / dim**0.5)
        # The weight of an age, or its embedding.
        shape = {"mean": (max_length,), "attention": (max_length, dim)}.get(kind)
        self.age = nn.Parameter(torch.zeros(shape)) if recency and shape else None
        self.gru = nn.GRU(dim, dim, batch_first=True) if kind == "gru" else None
        blocks = 2 if kind == "attention" else 0
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, 1, hidden=dim, causal=True, dropout=dropout) for _ in range(blocks)
        )
        widths = [dim, *hidden]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))]
        self.mlp = nn.Sequential(*layers) if hidden else None
        self.width = dim + (widths[-1] if hidden else 0)

    def forward(self, histories: Jagged, users: Tensor | None) -> Tensor:
        """Return one vector a history, float32 [B, width]; an empty history is a zero vector (plus the user's)."""
        dropout = self.history_dropout if self.training else 0.0
        events = recent_events(histories.values, histories.offsets, self.max_length, dropout=dropout)
        rows = histories.offsets.shape[0] - 1
        if self.kind == "mean":
            logits = self.events.new_zeros(events.age.shape) if self.age is None else self.age[events.age]
            user = weighted_sum(self.events, events, segment_softmax(logits, events.owner, rows))
        else:
            steps = F.embedding(events.ids, self.events)
            lengths = events.offsets.diff()
            if self.kind == "attention":
                steps = steps if self.age is None else steps + self.age[events.age]
                for block in self.blocks:
                    steps = block(steps, events.offsets)
            else:
                steps = self._recurrent(steps, events.owner, events.offsets, lengths)
            last = steps[(events.offsets[1:] - 1).clamp(min=0)] if len(steps) else steps.new_zeros(rows, steps.shape[1])
            user = last.masked_fill(lengths[:, None] == 0, 0.0)
        if self.users is not None and users is not None:
            user = user + self.users(users)
        return user if self.mlp is None else torch.cat([user, self.mlp(user)], dim=1)

    def _recurrent(self, steps: Tensor, owner: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
        """Run the GRU over each history, float32 [T, D]."""
        if not len(steps):
            return steps
        place = torch.arange(len(owner), device=owner.device) - offsets[owner]
        padded = steps.new_zeros(len(lengths), int(lengths.max()), steps.shape[1]).index_put((owner, place), steps)
        return self.gru(padded)[0][owner, place]


def encoder_of(model: Retriever, schema: Schema, options: dict[str, Any], dim: int) -> HistoryEncoder:
    """Return the encoder that a model's options ask for."""
    users = schema.rows(model.user_column) if options["user_id"] and model.user_column is not None else 0
    names = ("hidden", "max_length", "recency", "history_dropout", "dropout")
    return HistoryEncoder(model.rows, users, dim, kind=options["encoder"], **{name: options[name] for name in names})


def head(encoder: HistoryEncoder, out: int) -> nn.Linear:
    """Return a linear layer on the encoder's vector [z; MLP(z)] that begins near z, as far as the widths go."""
    linear = nn.Linear(encoder.width, out)
    with torch.no_grad():
        linear.weight.mul_(0.3)
        linear.weight.diagonal()[: encoder.dim] += 1.0
        linear.bias.zero_()
    return linear
