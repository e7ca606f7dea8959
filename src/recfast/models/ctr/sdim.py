"""SDIM: a history of any length, read by hash collisions with the candidate.

Cao et al., "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", CIKM 2022,
arXiv 2205.10249.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recfast.models.ctr._sequence import History, SequenceRanker
from recfast.nn import MLP
from recfast.nn import SDIM as HashAttention

if TYPE_CHECKING:
    import torch

    from recfast.data import Schema


class SDIM(SequenceRanker):
    """Sampling-based deep interest model.

    The embeddings of candidate and events are hashed by the signs of random projections, in M tables of :math:`\\tau`
    bits; the candidate attends to the events it collides with:

    .. math::
        T_{j,b} = \\sum_{l:\\, h_j(e_l) = b} e_l, \\qquad
        u_c = \\frac1M \\sum_{j=1}^M \\frac{T_{j,h_j(e_c)}}{\\|T_{j,h_j(e_c)}\\|}, \\qquad
        \\hat y = \\mathrm{MLP}([e_1, \\dots, e_F,\\; u_c,\\; u_c \\odot e_c,\\; x])

    The sums are made once a user; a candidate costs the same whatever the length of the history. The projections are
    drawn once and stay, so nothing is learned but the embeddings and the MLP.

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
    hashes : int
        Tables M of sums; the paper's 48 hash functions are 16 of 3 bits.
    bits : int
        :math:`\\tau`, 1 to 8; more bits collide with nearer events only.
    normalize : bool
        Divide each sum by its length, as the paper does.
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
        hashes: int = 16,
        bits: int = 3,
        normalize: bool = True,
        seed: int = 0,
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            schema,
            dim=dim,
            precision=precision,
            tables=tables,
            unit=lambda: HashAttention(dim, hashes, bits, seed=seed, normalize=normalize),
            head=lambda width: MLP(width, hidden, activation=activation, dropout=dropout),
            hidden=list(hidden),
            activation=activation,
            dropout=dropout,
            hashes=hashes,
            bits=bits,
            normalize=normalize,
            seed=seed,
        )

    def interests(self, index: int, history: History) -> list[torch.Tensor]:
        """Return u_c [R, D] of one history."""
        return [self.attention[index](*history)]
