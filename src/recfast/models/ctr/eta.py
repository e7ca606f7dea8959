"""ETA: search a life-long history by the bits in which hashes differ.

Chen et al., "End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model", 2021, arXiv 2108.04468.
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
from recfast.nn import ETA as HashSearch
from recfast.nn import MLP

if TYPE_CHECKING:
    import torch

    from recfast.data import Schema


class ETA(SequenceRanker):
    """End-to-end target attention.

    Candidate and events are hashed by the signs of fixed random projections R; the k events whose hashes differ from
    the candidate's in the fewest bits are attended to:

    .. math::
        h(e) = [\\mathrm{sign}(R^\\top e)], \\qquad
        u_c = \\mathrm{MHTA}\\big(e_c,\\; \\{e_l : l \\in \\mathrm{top}_k(-|h(e_c) \\oplus h(e_l)|)\\}\\big)

    and :math:`v_c`, multi-head attention over the last S events directly; both, and their products with :math:`e_c`,
    enter the MLP beside the fields. The hashes follow the embeddings as these learn, so search and attention never
    disagree, and comparing two takes a few instructions.

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
    bits : int
        Of a hash: 1 to 64, or a multiple of 64.
    short : int
        Latest events S that are attended to directly; 0 leaves that part out.
    seed : int
        Of the projections, which are part of the weights.
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
        bits: int = 64,
        short: int = 50,
        seed: int = 0,
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_least("ETA", {"top_k": 1, "bits": 1, "short": 0}, top_k=top_k, bits=bits, short=short)
        self.short = short
        super().__init__(
            schema,
            dim=dim,
            precision=precision,
            tables=tables,
            unit=lambda: long_and_short(HashSearch(dim, heads, bits, top_k, seed=seed), dim, heads, short),
            head=lambda width: MLP(width, hidden, activation=activation, dropout=dropout),
            parts=1 + bool(short),
            hidden=list(hidden),
            activation=activation,
            dropout=dropout,
            heads=heads,
            top_k=top_k,
            bits=bits,
            short=short,
            seed=seed,
        )

    def interests(self, index: int, history: History) -> list[torch.Tensor]:
        """Return u_c and v_c [R, D] of one history."""
        return long_and_short_interests(self.attention[index], history, self.short)
