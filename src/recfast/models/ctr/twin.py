"""TWIN: the attention that weighs the events also finds them.

Chang et al., "TWIN: TWo-stage Interest Network for Lifelong User Behavior Modeling in CTR Prediction at Kuaishou",
KDD 2023, arXiv 2302.02352.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recfast.models.ctr._sequence import (
    History,
    SequenceRanker,
    check_least,
    long_and_short,
    long_and_short_interests,
)
from recfast.nn import MLP, MultiHeadTargetAttention

if TYPE_CHECKING:
    import torch

    from recfast.data import Schema


class TWIN(SequenceRanker):
    """Two-stage interest network.

    Both stages, the search over the whole history and the attention to what it found, score by the same weights, so
    that the search keeps what the attention would have weighed most:

    .. math::
        s_{cl} = \\sum_h (W^q_h e_c)^\\top (W^k_h e_l) / \\sqrt{d}, \\qquad
        u_c = W^o\\big[\\mathrm{softmax}_{l \\in \\mathrm{top}_k(s_c)}(s_{chl})\\, W^v_h e_l\\big]_h

    and :math:`v_c`, another such attention over the last S events directly; both, and their products with
    :math:`e_c`, enter the MLP beside the fields.

    The paper splits an event's features into those of the item, whose projections are kept, and those of the user's
    meeting with it, which become a bias of the score; a history here has item features only, so there is no bias.

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
    heads : int
        Must divide `dim`.
    top_k : int
        Events that the search keeps for a candidate.
    short : int
        Latest events S that are attended to directly; 0 leaves that part out.
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
        heads: int = 2,
        top_k: int = 50,
        short: int = 50,
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_least("TWIN", {"top_k": 1, "short": 0}, top_k=top_k, short=short)
        self.short = short
        super().__init__(
            schema,
            dim=dim,
            precision=precision,
            tables=tables,
            unit=lambda: long_and_short(MultiHeadTargetAttention(dim, heads, top_k=top_k), dim, heads, short),
            head=lambda width: MLP(width, hidden, activation=activation, dropout=dropout),
            parts=1 + bool(short),
            hidden=list(hidden),
            activation=activation,
            dropout=dropout,
            heads=heads,
            top_k=top_k,
            short=short,
        )

    def interests(self, index: int, history: History) -> list[torch.Tensor]:
        """Return u_c and v_c [R, D] of one history."""
        return long_and_short_interests(self.attention[index], history, self.short)
