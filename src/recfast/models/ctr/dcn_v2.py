"""DCN V2: explicit feature crosses of bounded degree beside, or below, a deep network.

Wang et al., "DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems",
WWW 2021, arXiv 2008.13535.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recfast.models.ctr import _inputs
from recfast.nn import MLP, CrossNetV2, EmbeddingTables

if TYPE_CHECKING:
    from recfast.data import Batch, Schema


class DCNv2(nn.Module):
    """Deep and cross network, second version.

    .. math::
        x_0 = [e_1, \\dots, e_F, x], \\qquad x_{l+1} = x_0 \\odot (W_l x_l + b_l) + x_l

    and, in parallel, :math:`\\hat y = \\langle w, [x_L, h(x_0)] \\rangle + b` with h the last hidden layer of an MLP;
    stacked, :math:`\\hat y = \\mathrm{MLP}(x_L)`.

    A field is a categorical column or a sequence (the mean of its embeddings); numeric and vector columns stand in
    x_0 as they are.

    Parameters
    ----------
    schema : Schema
        Fitted.
    dim : int
        Width of every embedding.
    hidden : widths of the MLP
        None at all, stacked, is the cross network alone.
    activation : {"relu", "prelu", "dice"}
        Of the MLP.
    structure : {"parallel", "stacked"}
    cross_layers : int
        L.
    rank : int, optional
        Of the matrices W; full if left out.
    experts : int
        With `rank`: low-rank matrices a layer, mixed by a gate; see `nn.CrossNetV2`.
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
        activation: str = "relu",
        structure: str = "parallel",
        cross_layers: int = 3,
        rank: int | None = None,
        experts: int = 1,
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "stacked"):
            raise ValueError(f"DCNv2: structure must be one of parallel, stacked, got {structure!r}")
        self.schema = schema
        self._config = {
            "dim": dim,
            "hidden": list(hidden),
            "activation": activation,
            "structure": structure,
            "cross_layers": cross_layers,
            "rank": rank,
            "experts": experts,
            "precision": precision if isinstance(precision, str) else dict(precision),
            "tables": dict(tables or {}),
            "dropout": dropout,
        }
        self.structure = structure
        self.tables = EmbeddingTables(schema, dim, precision=precision, **(tables or {}))
        width = dim * (len(schema.categorical) + len(schema.sequences))
        width += len(schema.numeric) + sum(column.dim for column in schema.vectors)
        self.cross = CrossNetV2(width, cross_layers, rank=rank, experts=experts)
        self.mlp = MLP(width, hidden, activation=activation, dropout=dropout)
        # One linear layer over [x_L, h] is this one over x_L and the MLP's last over h, which has the bias.
        self.head = None
        if structure == "parallel":
            self.head = nn.Linear(width, 1, bias=False)
            nn.init.xavier_uniform_(self.head.weight)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logit of each row, float32 [R]; candidates of one user share that user's histories."""
        looked_up = self.tables.lookup(_inputs.requests(self.schema, batch))
        count = len(self.schema.categorical)
        parts = looked_up[:count]
        for column, values in zip(self.schema.sequences, looked_up[count:], strict=True):
            parts.append(_inputs.per_row(_inputs.mean_pool(values, batch.sequences[column.name].offsets), batch))
        if self.schema.numeric:
            parts.append(batch.numeric)
        parts += [batch.vectors[column.name] for column in self.schema.vectors]
        x = torch.cat(parts, dim=1)
        crossed = self.cross(x)
        if self.head is None:
            return self.mlp(crossed).squeeze(1)
        return (self.head(crossed) + self.mlp(x)).squeeze(1)

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean negative log-likelihood of the labels."""
        return _inputs.binary_cross_entropy(output, batch)

    def config(self) -> dict[str, Any]:
        """Return the options that rebuild this model with `models.build`."""
        return dict(self._config)
