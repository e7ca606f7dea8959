"""What the rankers over long histories share: embeddings, the place of the candidate, what stands on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from recfast.errors import InputError
from recfast.models.ctr import _inputs
from recfast.nn import EmbeddingTables, MultiHeadTargetAttention

if TYPE_CHECKING:
    from recfast.data import Batch, Schema


class History(NamedTuple):
    """One history of a batch beside its candidates, in the order in which attention takes them.

    query [R, D], keys [T, D]
        Embeddings of the candidates and of the events, out of one table.
    offsets [B + 1], candidate_offsets [B + 1] or None
        Which events are a user's, and which candidates; None: every user has one.
    """

    query: torch.Tensor
    keys: torch.Tensor
    offsets: torch.Tensor
    candidate_offsets: torch.Tensor | None

    def last(self, count: int) -> History:
        """The same with the latest `count` events of each user."""
        keys, offsets = _inputs.last(self.keys, self.offsets, count)
        return self._replace(keys=keys, offsets=offsets)


class SequenceRanker(nn.Module):
    """Fields, and what each history says of the candidate, under one head.

    .. math::
        \\hat y = \\mathrm{head}([e_1, \\dots, e_F,\\; u_1,\\; u_1 \\odot e_c,\\; u_2, \\dots,\\; x])

    A model says what :math:`u_1, u_2, \\dots` are: `interests` gives one or more vectors [R, D] for a history. A
    sequence of items meets the candidate item; a sequence of another column meets that column. How much of a history
    there is, the schema says (`max_length` of the sequence).

    The projections of every `nn.MultiHeadTargetAttention` start as the identity: attention is at first that of the
    embeddings themselves, so that alike events score high and come out as they are. Drawn at random, as published,
    a search would first learn from events taken at random.

    Parameters
    ----------
    schema : Schema
        Fitted, with at least one sequence.
    dim, precision, tables
        Of the embeddings, as the models have them.
    unit : () -> Module
        What reads one history; made once for each, in `self.attention`.
    head : width -> Module
        From all features [R, width] to a logit [R, 1]; `self.mlp`.
    parts : int
        How many vectors `interests` gives.
    crossed : bool
        Their products with the candidate are features too.
    **options
        The model's other options, for `config`.
    """

    task = "ranking"

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int,
        precision: str | Mapping[str, str],
        tables: Mapping[str, Any] | None,
        unit: Callable[[], nn.Module],
        head: Callable[[int], nn.Module],
        parts: int = 1,
        crossed: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if not schema.sequences:
            name = type(self).__name__
            raise InputError(f"{name}: the schema has no Sequence column; at least one history is needed")
        self.schema, self.crossed = schema, crossed
        self._config = {
            "dim": dim,
            "precision": precision if isinstance(precision, str) else dict(precision),
            "tables": dict(tables or {}),
            **options,
        }
        self.tables = EmbeddingTables(schema, dim, precision=precision, **(tables or {}))
        # One unit a sequence, and where its candidate stands among the categorical columns.
        names = [column.name for column in schema.categorical]
        self.targets = [names.index(column.of) for column in schema.sequences]
        self.attention = nn.ModuleList(unit() for _ in schema.sequences)
        for module in self.attention.modules():
            if isinstance(module, MultiHeadTargetAttention):
                for projection in (module.w_q, module.w_k, module.w_v, module.w_o):
                    nn.init.eye_(projection.weight)
        width = dim * (len(names) + (1 + crossed) * parts * len(schema.sequences))
        self.mlp = head(width + len(schema.numeric) + sum(column.dim for column in schema.vectors))

    def embed(self, batch: Batch) -> tuple[list[torch.Tensor], list[Any]]:
        """Return the fields [R, D], and for each history what `interests` takes: here a `History`."""
        looked_up = self.tables.lookup(_inputs.requests(self.schema, batch))
        fields = list(looked_up[: len(self.schema.categorical)])
        histories = [
            History(fields[target], keys, batch.sequences[column.name].offsets, batch.candidate_offsets)
            for column, keys, target in zip(self.schema.sequences, looked_up[len(fields) :], self.targets, strict=True)
        ]
        return fields, histories

    def interests(self, index: int, history: Any) -> list[torch.Tensor]:
        """Return the vectors [R, D] that history number `index` of the schema gives."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logit of each row, float32 [R]; candidates of one user share that user's histories."""
        fields, histories = self.embed(batch)
        parts = list(fields)
        for index, history in enumerate(histories):
            for interest in self.interests(index, history):
                parts += [interest, fields[self.targets[index]] * interest] if self.crossed else [interest]
        if self.schema.numeric:
            parts.append(batch.numeric)
        parts += [batch.vectors[column.name] for column in self.schema.vectors]
        return self.mlp(torch.cat(parts, dim=1)).squeeze(1)

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean negative log-likelihood of the labels."""
        return _inputs.binary_cross_entropy(output, batch)

    def config(self) -> dict[str, Any]:
        """Return the options that rebuild this model with `models.build`."""
        return dict(self._config)


def long_and_short(long: nn.Module, dim: int, heads: int, short: int) -> nn.ModuleDict:
    """Return the unit of a model that searches the whole history and attends to its latest events beside it.

    `long` reads the whole; the attention called `short` is left out where `short` is 0.
    """
    return nn.ModuleDict({"long": long, "short": MultiHeadTargetAttention(dim, heads)} if short else {"long": long})


def long_and_short_interests(unit: nn.ModuleDict, history: History, short: int, **search: Any) -> list[torch.Tensor]:
    """Return the interests [R, D] of such a unit: u_c of the whole history, then v_c of its `short` latest events.

    `search` are further arguments of the part that reads the whole.
    """
    found = [unit["long"](*history, **search)]
    return [*found, unit["short"](*history.last(short))] if short else found


def check_least(model: str, least: Mapping[str, int], **values: int) -> None:
    """Refuse options that are not whole numbers, or are below what `least` says."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
            raise ValueError(f"{model}: {name} must be a whole number of at least {least[name]}, got {value!r}")
