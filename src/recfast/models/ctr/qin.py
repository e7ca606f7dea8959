"""QIN: attention that cuts off instead of normalising, under layers of products.

Li et al., "Quadratic Interest Network for Multimodal Click-Through Rate Prediction", 2025, with the published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recfast.models.ctr._sequence import History, SequenceRanker, check_least
from recfast.nn import MultiHeadTargetAttention

if TYPE_CHECKING:
    from recfast.data import Schema


class QuadraticLayer(nn.Module):
    """:math:`x + \\mathrm{PReLU}(\\sum_{r} x \\odot (W_r x + b_r))` over R rows of W.

    Parameters
    ----------
    width : int
    rank : int
        R.
    dropout : float
        On the products' second factor and on the layer's answer, as in the published code.
    """

    def __init__(self, width: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, rank * width)
        self.activation = nn.PReLU()
        self.dropout = nn.Dropout(dropout)
        self.rank = rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, width] -> [R, width]."""
        factor = self.dropout(self.linear(x)).unflatten(1, (self.rank, -1)).sum(1)
        return x + self.dropout(self.activation(x * factor))


class QIN(SequenceRanker):
    """Quadratic interest network.

    One head of attention whose weights are cut off at zero and not normalised, so that events that do not suit the
    candidate leave no trace, and the number of those that do is kept:

    .. math::
        u_c = e_c + W^o \\sum_l \\mathrm{ReLU}\\big((W^q e_c)^\\top W^k e_l / (\\sqrt d\\, n)\\big)\\, W^v e_l

    Fields and :math:`u_c` go through layers :math:`x + \\mathrm{PReLU}(\\sum_r x \\odot (W_r x + b_r))`, whose products
    take the place of an MLP's hidden layers, and one linear layer.

    Parameters
    ----------
    schema : Schema
        Fitted, with at least one sequence. A sequence of items meets the candidate item; a sequence of another column
        meets that column.
    dim : int
        Width of every embedding.
    attention_dim : int or None
        Width d of query, key and value; twice `dim`, as in the published code, if None.
    layers, rank : int
        Quadratic layers, and the rows r of W in each.
    divisor : float
        n, a fixed number; 1 in the publication, whose histories are short. A sum over thousands of events wants one of
        the order of their number.
    precision : str or {column: str}
        How the tables are stored and trained, see `nn.EmbeddingTables`.
    tables : dict, optional
        Further options of `nn.EmbeddingTables`.
    dropout : float
        In the quadratic layers.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 16,
        attention_dim: int | None = None,
        layers: int = 3,
        rank: int = 2,
        divisor: float = 1.0,
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_least("QIN", {"layers": 1, "rank": 1}, layers=layers, rank=rank)
        if not divisor > 0:
            raise ValueError(f"QIN: divisor must be positive, got {divisor!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"QIN: dropout must lie in [0, 1), got {dropout}")
        width_of_attention = 2 * dim if attention_dim is None else attention_dim
        super().__init__(
            schema,
            dim=dim,
            precision=precision,
            tables=tables,
            # ReLU lets a positive factor through: what divides the scores divides the sum.
            unit=lambda: MultiHeadTargetAttention(
                dim,
                1,
                attention_dim=width_of_attention,
                score="relu",
                residual=True,
                scale=width_of_attention**-0.5 / divisor,
            ),
            head=lambda width: nn.Sequential(
                *(QuadraticLayer(width, rank, dropout) for _ in range(layers)), nn.Linear(width, 1)
            ),
            crossed=False,
            attention_dim=attention_dim,
            layers=layers,
            rank=rank,
            divisor=divisor,
            dropout=dropout,
        )

    def interests(self, index: int, history: History) -> list[torch.Tensor]:
        """Return u_c [R, D] of one history."""
        return [self.attention[index](*history)]
