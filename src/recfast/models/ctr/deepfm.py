"""DeepFM: a factorisation machine and a deep network over the same embeddings.

Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", IJCAI 2017, arXiv 1703.04247.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recfast.models.ctr import _inputs
from recfast.nn import MLP, EmbeddingTables, fm_interaction

if TYPE_CHECKING:
    from recfast.data import Batch, Schema


class DeepFM(nn.Module):
    """Low- and high-order feature interactions from one set of embeddings.

    .. math::
        \\hat y = w_0 + \\langle w, x \\rangle + \\sum_{i<j} \\langle v_i, v_j \\rangle x_i x_j
        + \\mathrm{MLP}([v_1 x_1, \\dots, v_F x_F])

    A field is a categorical column, a sequence (the mean of its embeddings), a numeric column (its value times a
    learned vector) or a vector column (a linear map of it).

    Parameters
    ----------
    schema : Schema
        Fitted.
    dim : int
        Width of every field.
    hidden : widths of the MLP
    activation : {"relu", "prelu", "dice"}
        Of the MLP.
    precision : str or {column: str}
        How the tables are stored and trained, see `nn.EmbeddingTables`. The weights of the linear part, one number an
        id, stay float32.
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
        activation: str = "relu",
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.schema = schema
        self._config = {
            "dim": dim,
            "hidden": list(hidden),
            "activation": activation,
            "precision": precision if isinstance(precision, str) else dict(precision),
            "tables": dict(tables or {}),
            "dropout": dropout,
        }
        self.tables = EmbeddingTables(schema, dim, precision=precision, **(tables or {}))
        self.linear = EmbeddingTables(schema, 1, **(tables or {}))
        dense = len(schema.numeric) + sum(column.dim for column in schema.vectors)
        self.linear_dense = nn.Linear(dense, 1, bias=False) if dense else None
        self.numeric = nn.Parameter(torch.randn(len(schema.numeric), dim) * 0.01) if schema.numeric else None
        self.vectors = nn.ModuleList(nn.Linear(column.dim, dim, bias=False) for column in schema.vectors)
        fields = len(schema.categorical) + len(schema.sequences) + len(schema.numeric) + len(schema.vectors)
        # Its last bias is the model's w_0.
        self.mlp = MLP(fields * dim, hidden, activation=activation, dropout=dropout)

    def _id_fields(self, tables: EmbeddingTables, batch: Batch) -> list[torch.Tensor]:
        """Categorical columns and pooled sequences out of `tables`, each [R, its width]."""
        looked_up = tables.lookup(_inputs.requests(self.schema, batch))
        count = len(self.schema.categorical)
        pooled = [
            _inputs.per_row(_inputs.mean_pool(values, batch.sequences[column.name].offsets), batch)
            for column, values in zip(self.schema.sequences, looked_up[count:], strict=True)
        ]
        return [*looked_up[:count], *pooled]

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logit of each row, float32 [R]; candidates of one user share that user's histories."""
        fields = torch.stack(self._id_fields(self.tables, batch), dim=1)
        vectors = [batch.vectors[column.name] for column in self.schema.vectors]
        if self.numeric is not None:
            fields = torch.cat([fields, batch.numeric.unsqueeze(2) * self.numeric], dim=1)
        if vectors:
            mapped = [layer(x) for layer, x in zip(self.vectors, vectors, strict=True)]
            fields = torch.cat([fields, torch.stack(mapped, dim=1)], dim=1)

        linear = torch.cat(self._id_fields(self.linear, batch), dim=1).sum(1)
        if self.linear_dense is not None:
            dense = [batch.numeric, *vectors] if self.schema.numeric else vectors
            linear = linear + self.linear_dense(torch.cat(dense, dim=1)).squeeze(1)
        return linear + fm_interaction(fields) + self.mlp(fields.flatten(1)).squeeze(1)

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean negative log-likelihood of the labels."""
        return _inputs.binary_cross_entropy(output, batch)

    def config(self) -> dict[str, Any]:
        """Return the options that rebuild this model with `models.build`."""
        return dict(self._config)
