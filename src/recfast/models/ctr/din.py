"""DIN: a user's interest, as this candidate calls it up.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recfast.models.ctr._sequence import History, SequenceRanker
from recfast.nn import MLP, TargetAttention

if TYPE_CHECKING:
    import torch

    from recfast.data import Schema


class DIN(SequenceRanker):
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
        super().__init__(
            schema,
            dim=dim,
            precision=precision,
            tables=tables,
            unit=lambda: TargetAttention(dim, attention_hidden, activation=attention_activation, mode=attention_mode),
            head=lambda width: MLP(width, hidden, activation=activation, dropout=dropout),
            hidden=list(hidden),
            activation=activation,
            dropout=dropout,
            attention_hidden=list(attention_hidden),
            attention_activation=attention_activation,
            attention_mode=attention_mode,
        )

    def interests(self, index: int, history: History) -> list[torch.Tensor]:
        """Return u_c [R, D] of one history."""
        return [self.attention[index](*history)]
