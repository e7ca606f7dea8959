"""SIM: search a life-long history first, attend to what was found.

Pi et al., "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
Prediction", CIKM 2020, arXiv 2006.05639.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recfast.errors import InputError
from recfast.models.ctr import _inputs
from recfast.models.ctr._sequence import History, SequenceRanker, check_least
from recfast.nn import MLP, MultiHeadTargetAttention
from recfast.ops import attention_top_k, category_top_k, target_attention

if TYPE_CHECKING:
    from recfast.data import Batch, Dataset, Schema


class SIM(SequenceRanker):
    """Search-based interest model.

    The general search keeps k events of the whole history for each candidate:

    .. math::
        \\text{hard: the latest k with } \\mathrm{category}(l) = \\mathrm{category}(c), \\qquad
        \\text{soft: top-}k \\text{ of } r_{cl} = (W_a e_c)^\\top (W_b e_l)

    The exact search is multi-head attention over those, :math:`u_c`; a second one over the last S events gives
    :math:`v_c`; both, and their products with :math:`e_c`, enter the MLP beside the fields. The weights of the soft search
    learn from a loss of their own, added with the factor `auxiliary`: that of an MLP over
    :math:`[U, U \\odot e_c, e_c]`, :math:`U = \\frac1n \\sum_l r_{cl} e_l` (n, the schema's `max_length`, is not in the
    paper; it keeps long sums in bounds). The paper's time intervals have no place here, for histories carry no times.

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
    search : {"soft", "hard"}
    category : str or None
        "hard" only: the column of the items that must be equal; items whose value is unknown are not found. What value
        an item has is learned from the data set by `prepare`, which `train.fit` calls, and is part of the weights.
    heads : int
        Must divide `dim`.
    top_k : int
        Events k that the search keeps for a candidate.
    short : int
        Latest events S that are attended to directly; 0 leaves that part out.
    search_dim : int or None
        "soft" only: rows of W_a and W_b; `dim` if None.
    auxiliary : float
        "soft" only: the factor of the search's own loss.
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
        search: str = "soft",
        category: str | None = None,
        heads: int = 2,
        top_k: int = 50,
        short: int = 50,
        search_dim: int | None = None,
        auxiliary: float = 1.0,
        precision: str | Mapping[str, str] = "float32",
        tables: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        if search not in ("soft", "hard"):
            raise ValueError(f"SIM: search must be one of soft, hard, got {search!r}")
        check_least("SIM", {"top_k": 1, "short": 0}, top_k=top_k, short=short)
        rows = _check_category(schema, category) if search == "hard" else 0
        self.search, self.category, self.top_k, self.short, self.auxiliary = search, category, top_k, short, auxiliary

        def unit() -> nn.Module:
            parts: dict[str, nn.Module] = {"long": MultiHeadTargetAttention(dim, heads)}
            if short:
                parts["short"] = MultiHeadTargetAttention(dim, heads)
            if search == "soft":
                parts["query"] = nn.Linear(dim, search_dim or dim, bias=False)
                parts["key"] = nn.Linear(dim, search_dim or dim, bias=False)
                parts["auxiliary"] = MLP(3 * dim, hidden, activation=activation, dropout=dropout)
            return nn.ModuleDict(parts)

        super().__init__(
            schema,
            dim=dim,
            precision=precision,
            tables=tables,
            unit=unit,
            head=lambda width: MLP(width, hidden, activation=activation, dropout=dropout),
            parts=1 + bool(short),
            hidden=list(hidden),
            activation=activation,
            dropout=dropout,
            search=search,
            category=category,
            heads=heads,
            top_k=top_k,
            short=short,
            search_dim=search_dim,
            auxiliary=auxiliary,
        )
        if search == "hard":
            # The category of each item; -1 until `prepare` says it.
            self.register_buffer("categories", torch.full((rows,), -1))
        self._searches: list[torch.Tensor] = []

    def prepare(self, dataset: Dataset) -> None:
        """Learn the items' categories, for the hard search."""
        if self.search == "hard":
            side = dataset.side("item")
            ids = torch.as_tensor(side["ids"][:, side["columns"].index(self.category)])
            self.categories.copy_(ids)

    def embed(self, batch: Batch) -> tuple[list[torch.Tensor], list[Any]]:
        """Return the fields, and for each history beside it the ids of candidates and events."""
        fields, histories = super().embed(batch)
        columns = zip(self.schema.sequences, self.targets, histories, strict=True)
        return fields, [(h, batch.ids[:, target], batch.sequences[c.name].values) for c, target, h in columns]

    def interests(self, index: int, history: tuple[History, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Return u_c and v_c [R, D] of one history."""
        whole, query_ids, key_ids = history
        unit = self.attention[index]
        search = self._hard if self.search == "hard" else self._soft
        found = [unit["long"](*whole, positions=search(index, whole, query_ids, key_ids))]
        return [*found, unit["short"](*whole.last(self.short))] if self.short else found
