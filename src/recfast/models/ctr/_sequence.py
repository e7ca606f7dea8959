"""What the rankers over long histories share: embeddings, the place of the candidate, the MLP on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from recfast.errors import InputError
from recfast.models.ctr import _inputs
from recfast.nn import MLP, EmbeddingTables

if TYPE_CHECKING:
    from recfast.data import Batch, Schema


class History(NamedTuple):
    """One history of a batch beside its candidates.

    query [R, D], keys [T, D]
        Embeddings of the candidates and of the events, out of one table.
    offsets [B + 1], candidate_offsets [B + 1] or None
        Which events are a user's, and which candidates; None: every user has one.
    """

    query: torch.Tensor
    keys: torch.Tensor
    offsets: torch.Tensor
    candidate_offsets: torch.Tensor | None

    def last(self, count: int) -> History:
        """The same with the latest `count` events of each user."""
        return self._replace(**dict(zip(("keys", "offsets"), _inputs.last(*self[1:3], count), strict=True)))


class SequenceRanker(nn.Module):
    """Fields, and what each history says of the candidate, in one MLP.

    .. math::
        \\hat y = \\mathrm{MLP}([e_1, \\dots, e_F,\\; u_1,\\; u_1 \\odot e_c,\\; u_2, \\dots,\\; x])

    A model says what :math:`u_1, u_2, \\dots` are: `interests` gives one or more vectors [R, D] for a history. A
    sequence of items meets the candidate item; a sequence of another column meets that column.

    Parameters
    ----------
    schema : Schema
        Fitted, with at least one sequence, whose `max_length` bounds the history.
    dim, hidden, activation, precision, tables, dropout
        As the models have them.
    unit : () -> Module
        What reads one history; made once for each, in `self.attention`.
    parts : int
        How many vectors `interests` gives.
    **own
        The model's own options, for `config`.
    """

    task = "ranking"

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int,
        hidden: Sequence[int],
        activation: str,
        precision: str | Mapping[str, str],
        tables: Mapping[str, Any] | None,
        dropout: float,
        unit: Callable[[], nn.Module],
        parts: int = 1,
        **own: Any,
    ) -> None:
        super().__init__()
        if not schema.sequences:
            raise InputError(
                f"{type(self).__name__}: the schema has no Sequence column; at least one history is needed"
            )
        self.schema = schema
        self._config = {
            "dim": dim,
            "hidden": list(hidden),
            "activation": activation,
            "precision": precision if isinstance(precision, str) else dict(precision),
            "tables": dict(tables or {}),
            "dropout": dropout,
            **own,
        }
        self.tables = EmbeddingTables(schema, dim, precision=precision, **(tables or {}))
        # One unit a sequence, and where its candidate stands among the categorical columns.
        names = [column.name for column in schema.categorical]
        self.targets = [names.index(column.of) for column in schema.sequences]
        self.attention = nn.ModuleList(unit() for _ in schema.sequences)
        width = dim * (len(names) + 2 * parts * len(schema.sequences))
        width += len(schema.numeric) + sum(column.dim for column in schema.vectors)
        self.mlp = self.head(width, hidden, activation, dropout)

    def head(self, width: int, hidden: Sequence[int], activation: str, dropout: float) -> nn.Module:
        """What turns all the features [R, width] into a logit [R, 1]."""
        return MLP(width, hidden, activation=activation, dropout=dropout)

    def interests(self, index: int, history: History, batch: Batch) -> list[torch.Tensor]:
        """Return the vectors [R, D] that history number `index` of the schema gives."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logit of each row, float32 [R]; candidates of one user share that user's histories."""
        looked_up = self.tables.lookup(_inputs.requests(self.schema, batch))
        count = len(self.schema.categorical)
        parts = list(looked_up[:count])
        for index, (column, keys) in enumerate(zip(self.schema.sequences, looked_up[count:], strict=True)):
            query = looked_up[self.targets[index]]
            history = History(query, keys, batch.sequences[column.name].offsets, batch.candidate_offsets)
            for interest in self.interests(index, history, batch):
                parts += [interest, query * interest]
        if self.schema.numeric:
            parts.append(batch.numeric)
        parts += [batch.vectors[column.name] for column in self.schema.vectors]
        return self.mlp(torch.cat(parts, dim=1)).squeeze(1)

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean negative log-likelihood of the labels."""
        return _inputs.binary_cross_entropy(output, batch)

    def config(self) -> dict[str, Any]:
        """Return the options that rebuild this model with `models.build`."""
        return dict(self._config)
