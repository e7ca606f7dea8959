"""DIN: a user's interest, as this candidate calls it up.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recfast.errors import InputError
from recfast.models.ctr import _inputs
from recfast.nn import MLP, EmbeddingTables, TargetAttention

if TYPE_CHECKING:
    from recfast.data import Batch, Schema


class DIN(nn.Module):
    """Deep interest network.

    Each history is weighed by an activation unit against the candidate's embedding in the same table:

    .. math::
        u_c = \\sum_l a(e_c, e_l)\\, e_l, \\qquad
        \\hat y = \\mathrm{MLP}([e_1, \\dots, e_F,\\; u_c,\\; u_c \\odot e_c,\\; x])

    Parameters
    ----------
    schema : Schema
        Fitted, with at least one sequence. A sequence of items meets the candidate item; a sequence of another column
        meets that column.
    dim : int
        Width of every embedding.
    hidden : widths of the MLP
    activation : {"prelu", "dice", "relu"}
        Of the MLP.
    attention_hidden : one or two widths
        Of the activation unit.
    attention_activation : {"prelu", "dice", "relu", "sigmoid", "silu"}
        The paper's is "dice".
    attention_mode : {"sum", "sigmoid", "softmax"}
        The paper's is "sum".
    precision : str or {column: str}
        How the tables are stored and trained, see `nn.EmbeddingTables`.
    tables : dict, optional
        Further options of `nn.EmbeddingTables`.
    dropout : float
        In the MLP.
    """

    task = "ranking"

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 16,
        hidden: Sequence[int] = (200, 80),
        activation: str = "prelu",
        attention_hidden: Sequence[int] = (80, 40),
        attention_activation: str = "prelu",
        attention_mode: str = "sum",
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not schema.sequences:
            raise InputError("DIN: the schema has no Sequence column; at least one history is needed")
        self.schema = schema
        self._config = {
            "dim": dim,
            "hidden": list(hidden),
            "activation": activation,
            "attention_hidden": list(attention_hidden),
            "attention_activation": attention_activation,
            "attention_mode": attention_mode,
            "precision": precision if isinstance(precision, str) else dict(precision),
            "tables": dict(tables or {}),
            "dropout": dropout,
        }
        self.tables = EmbeddingTables(schema, dim, precision=precision, **(tables or {}))
        # One activation unit a sequence, and where its candidate stands among the categorical columns.
        names = [column.name for column in schema.categorical]
        self.targets = [names.index(column.of) for column in schema.sequences]
        self.attention = nn.ModuleList(
            TargetAttention(dim, attention_hidden, activation=attention_activation, mode=attention_mode)
            for _ in schema.sequences
        )
        width = dim * (len(names) + 2 * len(schema.sequences))
        width += len(schema.numeric) + sum(column.dim for column in schema.vectors)
        self.mlp = MLP(width, hidden, activation=activation, dropout=dropout)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logit of each row, float32 [R]; candidates of one user share that user's histories."""
        looked_up = self.tables.lookup(_inputs.requests(self.schema, batch))
        fields, histories = looked_up[: len(self.schema.categorical)], looked_up[len(self.schema.categorical) :]
        parts = list(fields)
        for column, keys, target, attention in zip(
            self.schema.sequences, histories, self.targets, self.attention, strict=True
        ):
            query = fields[target]
            interest = attention(query, keys, batch.sequences[column.name].offsets, batch.candidate_offsets)
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
