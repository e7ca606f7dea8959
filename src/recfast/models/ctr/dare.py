"""DARE: one embedding to search and weigh a history, another to represent it.

Feng et al., "Long-sequence Recommendation Models Need Decoupled Embeddings", ICLR 2025, arXiv 2410.02604.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recfast.models.ctr._sequence import History, SequenceRanker, check_least
from recfast.nn import DARE as DecoupledAttention
from recfast.nn import MLP, EmbeddingTables

if TYPE_CHECKING:
    import torch

    from recfast.data import Batch, Schema


class DARE(SequenceRanker):
    """Decoupled attention and representation embeddings.

    With two tables a column, :math:`a` narrow and :math:`e` as wide as the other fields:

    .. math::
        s_{cl} = a_c^\\top a_l / \\sqrt{d_a}, \\qquad
        r_c = \\sum_{l \\in \\mathrm{top}_k(s_c)} \\mathrm{softmax}(s_c)_l\\, e_l, \\qquad
        \\hat y = \\mathrm{MLP}([e_1, \\dots, e_F,\\; r_c,\\; r_c \\odot e_c,\\; x])

    The gradients of weighing and of representing pull a shared embedding in different directions; apart they do not,
    and the search is cheap because :math:`a` is narrow. The paper's embeddings of time have no place here, for
    histories carry no times.

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
    attention_dim : int
        Width :math:`d_a`.
    top_k : int or None
        Events that a candidate attends to; None: all of them.
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
        attention_dim: int = 8,
        top_k: int | None = 50,
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        if top_k is not None:
            check_least("DARE", {"top_k": 1}, top_k=top_k)
        super().__init__(
            schema,
            dim=dim,
            precision=precision,
            tables=tables,
            unit=lambda: DecoupledAttention(attention_dim, dim, top_k=top_k, cross=False),
            head=lambda width: MLP(width, hidden, activation=activation, dropout=dropout),
            hidden=list(hidden),
            activation=activation,
            dropout=dropout,
            attention_dim=attention_dim,
            top_k=top_k,
        )
        listed = list(dict.fromkeys(column.of for column in schema.sequences))
        chosen = precision if isinstance(precision, str) else {n: precision[n] for n in listed if n in precision}
        self.attention_tables = EmbeddingTables(
            [(name, schema.rows(name)) for name in listed], attention_dim, precision=chosen, **(tables or {})
        )

    def embed(self, batch: Batch) -> tuple[list[torch.Tensor], list[Any]]:
        """Return the fields, and for each history its embeddings :math:`e` and the two sorts of :math:`a`."""
        fields, histories = super().embed(batch)
        columns = list(zip(self.schema.sequences, self.targets, strict=True))
        asked = [(column.of, batch.ids[:, target]) for column, target in columns]
        asked += [(column.of, batch.sequences[column.name].values) for column, _ in columns]
        found = self.attention_tables.lookup(asked)
        return fields, list(zip(histories, found[: len(columns)], found[len(columns) :], strict=True))

    def interests(self, index: int, history: tuple[History, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Return r_c [R, D] of one history."""
        represented, query, keys = history
        unit = self.attention[index]
        return [unit(query, represented.query, keys, *represented[1:])]
