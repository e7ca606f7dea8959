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
from recfast.models.ctr._sequence import (
    History,
    SequenceRanker,
    check_least,
    long_and_short,
    long_and_short_interests,
)
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

    The exact search is multi-head attention over those, :math:`u_c`; another over the last S events gives :math:`v_c`;
    both, and their products with :math:`e_c`, enter the MLP beside the fields. :math:`W_a` and :math:`W_b` learn from a
    loss of their own, added with the factor `auxiliary`: that of an MLP over :math:`[U, U \\odot e_c, e_c]`,
    :math:`U = \\frac1n \\sum_l r_{cl} e_l` (n, the schema's `max_length`, is not in the paper; it keeps long sums in
    bounds). The paper's time intervals have no place here, for histories carry no times.

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
        "hard" only: the column of the items that must be equal; unknown values are not. `prepare`, which `train.fit`
        calls, reads the items' values from the data set; they are part of the weights.
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
        if not auxiliary >= 0:
            raise ValueError(f"SIM: auxiliary must be at least 0, got {auxiliary!r}")
        rows = _check_category(schema, category) if search == "hard" else 0
        self.search, self.category, self.top_k, self.short, self.auxiliary = search, category, top_k, short, auxiliary

        def unit() -> nn.Module:
            parts = long_and_short(MultiHeadTargetAttention(dim, heads, fold=True), dim, heads, short)
            if search == "soft":
                for name in ("query", "key"):
                    parts[name] = nn.Linear(dim, search_dim or dim, bias=False)
                    nn.init.eye_(parts[name].weight)  # as `SequenceRanker` does with the attention's
                parts["auxiliary"] = MLP(3 * dim, hidden, activation=activation, dropout=dropout)
            return parts

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
        self._prepared = False
        # In training, the soft searches' own logits of the last forward pass.
        self._searches: list[torch.Tensor] = []

    def prepare(self, dataset: Dataset) -> None:
        """Learn the items' categories, for the hard search."""
        if self.search == "hard":
            side, self._prepared = dataset.side("item"), True
            self.categories.copy_(torch.as_tensor(side["ids"][:, side["columns"].index(self.category)]))

    def embed(self, batch: Batch) -> tuple[list[torch.Tensor], list[Any]]:
        """Return the fields, and for each history beside it the ids of candidates and events."""
        fields, histories = super().embed(batch)
        columns = zip(self.schema.sequences, self.targets, histories, strict=True)
        return fields, [(h, batch.ids[:, target], batch.sequences[c.name].values) for c, target, h in columns]

    def interests(self, index: int, history: tuple[History, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Return u_c and v_c [R, D] of one history."""
        whole, unit = history[0], self.attention[index]
        chosen = self._hard(index, *history) if self.search == "hard" else self._soft(index, whole)
        return long_and_short_interests(unit, whole, self.short, positions=chosen)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logit of each row, float32 [R]; candidates of one user share that user's histories."""
        self._searches = []
        return super().forward(batch)

    def _hard(self, index: int, history: History, query_ids: torch.Tensor, key_ids: torch.Tensor) -> torch.Tensor:
        if self.schema.sequences[index].of == self.category:
            wanted, there = query_ids, key_ids
        elif self._prepared:
            wanted, there = self.categories[query_ids], self.categories[key_ids]
        else:
            raise InputError("SIM: the categories of the items are not known, call prepare(dataset) first")
        # 0 is "unknown", which is not alike.
        wanted = wanted.masked_fill(wanted == 0, -1)
        return category_top_k(wanted, there, history.offsets, self.top_k, candidate_offsets=history.candidate_offsets)

    def _soft(self, index: int, history: History) -> torch.Tensor:
        unit = self.attention[index]
        query, keys = unit["query"](history.query).unsqueeze(1), unit["key"](history.keys).unsqueeze(1)
        shared = {"candidate_offsets": history.candidate_offsets, "scale": 1 / self.schema.sequences[index].max_length}
        if self.training:
            values, e = history.keys.unsqueeze(1), history.query
            u = target_attention(query, keys, values, history.offsets, score="none", **shared).squeeze(1)
            self._searches.append(unit["auxiliary"](torch.cat([u, u * e, e], dim=1)).squeeze(1))
        return attention_top_k(query.detach(), keys.detach(), history.offsets, self.top_k, **shared)

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean negative log-likelihood of the labels, in training with that of the search's own answer."""
        searches = sum(_inputs.binary_cross_entropy(logit, batch) for logit in self._searches)
        return _inputs.binary_cross_entropy(output, batch) + self.auxiliary * searches

    def __getstate__(self) -> dict[str, Any]:
        # A copy is of the model: the last batch's logits, and the graph behind them, stay here.
        return {**self.__dict__, "_searches": []}

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self._prepared = self.search == "hard" and bool((self.categories >= 0).all())


def _check_category(schema: Schema, category: str | None) -> int:
    """The rows of the items' table, once it is clear that every sequence can be searched by the category."""
    names = [column.name for column in schema.categorical if column.side == "item" and column.role is None]
    if category not in names:
        known = ", ".join(names) or "none"
        raise InputError(f"SIM: search = 'hard' needs category, a column of the items ({known}), got {category!r}")
    for column in schema.sequences:
        if column.of not in (schema.item, category):
            expected = f"expected {schema.item!r} or {category!r}, which have a category"
            raise InputError(f"SIM: the sequence {column.name!r} lists {column.of!r}, {expected}")
    return schema.rows(schema.item)
