"""What tables that train and tables that only serve have in common: names, storage, lookups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from recfast import ops
from recfast.errors import OutOfRange
from recfast.nn._table_group import Names, TableGroup, names_and_aliases, precisions_of
from recfast.ops import _check
from recfast.ops.embedding_bag import bag_with_argmax

POOLINGS = ("sum", "mean", "max")


class Part(NamedTuple):
    """What one group contributes to a call.

    Attributes
    ----------
    group
    places
        Which of the call's tables (columns, requests) it holds.
    index : Tensor int64
        The same, for indexing.
    features : ops.Features
        Where each of them lies in the group.
    """

    group: TableGroup
    places: list[int]
    index: torch.Tensor
    features: ops.Features


class Lookups:
    """One call's ids, as one jagged batch a group."""

    def __init__(
        self,
        place: str,
        names: Sequence[str],
        indices: Sequence[torch.Tensor],
        offsets: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
    ) -> None:
        self.names, self.indices, self.offsets = names, indices, offsets
        self.lengths = [ids.shape[0] for ids in indices]
        self.bags = [cuts.shape[0] - 1 for cuts in offsets] or self.lengths
        self.weights = None if weights is None else weights.split(self.lengths)
        for name, cuts, length in zip(names, offsets, self.lengths, strict=bool(offsets)):
            ends = cuts[[0, -1]].tolist()
            if ends != [0, length]:
                _check.offsets(f"{place}: {name}", "offsets", cuts, length)

    def joined(
        self, places: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Ids, offsets, weights and splits (see `ops.Features`) of some of the requests."""
        chosen = [self.indices[i] for i in places]
        ids = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
        splits, total = [0], 0
        for i in places:
            total += self.bags[i]
            splits.append(total)
        offsets = weights = None
        if self.offsets:
            cuts, base = [], 0
            for i in places:
                cuts.append(self.offsets[i][:-1].to(torch.int64) + base)
                base += self.lengths[i]
            offsets = torch.cat([*cuts, torch.tensor([base])])
        if self.weights is not None:
            weights = torch.cat([self.weights[i] for i in places])
        return ids, offsets, weights, torch.tensor(splits)


class TableView:
    """One table in the face of `torch.nn.Embedding`: call it with ids of any shape.

    Attributes
    ----------
    name, num_embeddings, embedding_dim
    weight : Tensor [T, D], float32
        The rows as floats, a copy.
    """

    def __init__(self, tables: TableLookups, name: str) -> None:
        self.tables, self.name = tables, name
        self.num_embeddings, self.embedding_dim = tables.rows(name), tables.dim

    @property
    def weight(self) -> torch.Tensor:
        return self.tables.dequantize(self.name)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tables.lookup([(self.name, ids)])[0]

    def __repr__(self) -> str:
        kind = self.tables.precision(self.name)
        return f"TableView({self.name!r}, {self.num_embeddings}, {self.embedding_dim}, {kind})"


class TableLookups(nn.Module):
    """Tables by name, in groups of one precision, and every way to look something up in them."""

    place = "EmbeddingTables"

    def __init__(
        self,
        schema_or_specs: Any,
        dim: int,
        precision: str | Mapping[str, str],
        *,
        skip_missing: bool = False,
        storage: Mapping[str, torch.Tensor] | None = None,
        apart: Sequence[str] = (),
    ) -> None:
        super().__init__()
        _check.at_least(self.place, "dim", dim, 1)
        self.specs, self.aliases = names_and_aliases(schema_or_specs, self.place)
        self.dim, self.skip_missing = dim, skip_missing
        self.precisions = precisions_of(precision, self.specs, self.place)
        self._numbers = {name: number for number, (name, _) in enumerate(self.specs)}
        self._numbers |= {name: self._numbers[of] for name, of in self.aliases.items()}
        # One group a precision; tables of the precisions in `apart` have a group, and a step size, of their own.
        grouped: dict[tuple[str, str | None], list[tuple[str, int]]] = {}
        for name, rows in self.specs:
            kind = self.precisions[name]
            grouped.setdefault((kind, name if kind in apart else None), []).append((name, rows))
        self.groups = nn.ModuleList(
            TableGroup(specs, dim, kind, None if storage is None else storage[kind], one_step=alone is not None)
            for (kind, alone), specs in grouped.items()
        )
        self._group_of = {name: number for number, group in enumerate(self.groups) for name in group.names}
        self._plans: dict[tuple[int, ...], list[Part]] = {}
        # All columns in order, made now so that a compiled graph finds it.
        self._whole = self._plan(tuple(range(len(self.specs))))

    def names(self) -> Names:
        """Tables and aliases as a constructor takes them."""
        return Names(self.specs, self.aliases)

    # ------------------------------------------------------------------ what is there

    def __getitem__(self, which: str | int) -> TableView:
        """Table `which`, by name or by place, to be called as an `nn.Embedding` is."""
        return TableView(self, self.specs[which][0] if isinstance(which, int) else which)

    def __len__(self) -> int:
        return len(self.specs)

    def __iter__(self) -> Iterator[TableView]:
        return (TableView(self, name) for name, _ in self.specs)

    def rows(self, name: str) -> int:
        """The number of rows of table `name`."""
        return self.specs[self._number(name)][1]

    def precision(self, name: str) -> str:
        """How table `name` is stored."""
        return self.precisions[self.specs[self._number(name)][0]]

    def dequantize(self, name: str) -> torch.Tensor:
        """The rows of table `name`: Tensor [T, D], float32, a copy."""
        group, own = self._group(name)
        return group.dequantize(own)

    def step_size(self, name: str) -> torch.Tensor:
        """The step sizes of table `name`: Tensor [T], float32, a copy."""
        group, own = self._group(name)
        if group.bits is None:
            raise ValueError(f"{self.place}: table {own!r} is {group.precision} and has no step sizes")
        return group.table.step[group.part(own)].clone()

    def codes(self, name: str) -> torch.Tensor:
        """The codes of table `name`: Tensor [T, D], int8 (float8_e4m3fn for float8), a copy."""
        group, own = self._group(name)
        if group.bits is None:
            raise ValueError(f"{self.place}: table {own!r} is {group.precision} and has no codes")
        return ops.QuantizedTable(group.rows[group.part(own)], group.bits, self.dim).codes.clone()

    def memory_bytes(self) -> int:
        """Bytes of rows, step sizes and optimiser state."""
        return sum(group.memory_bytes() for group in self.groups)

    def extra_repr(self) -> str:
        rows = sum(rows for _, rows in self.specs)
        kinds = ", ".join(dict.fromkeys(self.precisions.values()))
        return f"{len(self.specs)} tables, {rows} rows, dim={self.dim}, precision={kinds}"

    # ------------------------------------------------------------------ lookups

    def forward(
        self, inputs: torch.Tensor | Mapping[str, tuple[torch.Tensor, ...]], mode: str = "sum"
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Look up one id of every table, or pool bags of some.

        Parameters
        ----------
        inputs : Tensor [B, F], int32 or int64, or {name: (indices [n], offsets [B + 1][, weights [n]])}
            F is the number of tables, in the order of the specs. `weights` float32, in every entry or in none.
        mode : {"sum", "mean", "max"}
            How bags are pooled.

        Returns
        -------
        Tensor [B, F, D], or {name: Tensor [B, D]}; float32. An empty bag gives zeros.

        Raises
        ------
        IndexError
            An id outside its table; the sentence names table, position and value.
        """
        if isinstance(inputs, Mapping):
            return self._bags(inputs, mode)
        _check.tensor(self.place, "ids", inputs, dtypes=_check.INDEX_DTYPES, shape=["B", len(self.specs)])
        return self._look([inputs], [], None, [], "none")

    def lookup(self, requests: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Look up any number of id tensors in one gather (and, in training, one update).

        Parameters
        ----------
        requests : list of (name, Tensor of any shape, int32 or int64)
            The name of a table, or of a sequence column that shares one. Names may repeat.

        Returns
        -------
        list of Tensor [*, D], float32
            One for each request, in order.

        Raises
        ------
        IndexError
            An id outside its table; the sentence names table, position (in the flattened ids) and value.
        """
        if not requests:
            return []
        for name, ids in requests:
            self._number(name)
            _check.tensor(self.place, name, ids, dtypes=_check.INDEX_DTYPES)
        indices = [ids.reshape(-1) for _, ids in requests]
        out = self._look(indices, [], None, [self._number(name) for name, _ in requests], "none")
        parts = out.split([ids.shape[0] for ids in indices])
        return [part.reshape(*ids.shape, self.dim) for part, (_, ids) in zip(parts, requests, strict=True)]

    def _bags(self, inputs: Mapping[str, tuple[torch.Tensor, ...]], mode: str) -> dict[str, torch.Tensor]:
        _check.choice(self.place, "mode", mode, POOLINGS)
        if not inputs:
            return {}
        with_weights = {len(entry) for entry in inputs.values()}
        if not with_weights <= {2, 3} or len(with_weights) > 1:
            raise ValueError(
                f"{self.place}: every entry must be (indices, offsets) or every one (indices, offsets, weights), "
                f"got entries of {sorted(with_weights)} tensors"
            )
        for name, (ids, cuts, *weights) in inputs.items():
            self._number(name)
            place = f"{self.place}: {name}"
            _check.tensor(place, "indices", ids, dtypes=_check.INDEX_DTYPES, shape=["n"])
            _check.tensor(place, "offsets", cuts, dtypes=_check.INDEX_DTYPES, shape=["B + 1"])
            if cuts.shape[0] == 0:
                raise ValueError(f"{place}: offsets must have one entry more than there are bags, got none")
            for each in weights:
                _check.tensor(place, "weights", each, dtypes=[torch.float32], shape=list(ids.shape))
        indices = [entry[0] for entry in inputs.values()]
        offsets = [entry[1] for entry in inputs.values()]
        weights = torch.cat([entry[2] for entry in inputs.values()]) if with_weights == {3} else None
        out = self._look(indices, offsets, weights, [self._number(name) for name in inputs], mode)
        return dict(zip(inputs, out.split([cuts.shape[0] - 1 for cuts in offsets]), strict=True))

    def _look(
        self,
        indices: Sequence[torch.Tensor],
        offsets: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
        features: Sequence[int],
        pooling: str,
    ) -> torch.Tensor:
        """The lookup without any update; `indices` is one tensor [B, F], or one of each of `features`."""
        return self.gather(indices, offsets, weights, features, pooling)[0]

    def gather(
        self,
        indices: Sequence[torch.Tensor],
        offsets: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
        features: Sequence[int],
        pooling: str,
        *,
        argmax: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled rows [bags, D] ([B, F, D] without `features`), and where maxima came from if asked for."""
        if not features:
            (ids,) = indices
            if len(self._whole) == 1:
                return self._pool(self._whole[0], ids, None, None, None, "none", argmax=False)
            out = torch.empty(*ids.shape, self.dim, device=ids.device)
            for part in self._whole:
                columns = ids[:, part.index].contiguous()
                out[:, part.index] = self._pool(part, columns, None, None, None, "none", argmax=False)[0]
            return out, ids.new_empty(0, dtype=torch.int32)
        plan = self._plan(tuple(features))
        names = [self.specs[number][0] for number in features]
        call = Lookups(self.place, names, indices, offsets, weights)
        if len(plan) == 1:
            return self._pool(plan[0], *call.joined(plan[0].places), pooling, argmax=argmax, call=call)
        total = sum(call.bags)
        out = torch.empty(total, self.dim, device=indices[0].device)
        where = torch.empty(total if argmax else 0, self.dim, dtype=torch.int32, device=indices[0].device)
        outs, wheres = out.split(call.bags), where.split(call.bags if argmax else 0)
        for part in plan:
            values, positions = self._pool(part, *call.joined(part.places), pooling, argmax=argmax, call=call)
            counts = [call.bags[i] for i in part.places]
            for i, piece in zip(part.places, values.split(counts), strict=True):
                outs[i].copy_(piece)
            if argmax:
                for i, piece in zip(part.places, positions.split(counts), strict=True):
                    wheres[i].copy_(piece)
        return out, where

    def _pool(
        self,
        part: Part,
        ids: torch.Tensor,
        offsets: torch.Tensor | None,
        weights: torch.Tensor | None,
        splits: torch.Tensor | None,
        pooling: str,
        *,
        argmax: bool,
        call: Lookups | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One group's part of a call."""
        features = part.features if splits is None else part.features._replace(splits=splits)
        mode = "none" if offsets is None else pooling
        try:
            if argmax:
                return bag_with_argmax(
                    part.group.table, ids, offsets, features=features, skip_missing=self.skip_missing
                )
            out = ops.embedding_bag(
                part.group.table, ids, offsets, per_sample_weights=weights, mode=mode, features=features,
                skip_missing=self.skip_missing,
            )  # fmt: skip
            return out, ids.new_empty(0, dtype=torch.int32)
        except OutOfRange as error:
            raise self._outside(error, part, call) from None

    def _outside(self, error: OutOfRange, part: Part, call: Lookups | None) -> OutOfRange:
        """The same error in the words of the caller: which table, and where in its own ids."""
        if error.position is None:
            return error
        if call is None:
            position, column = divmod(error.position, len(part.places))
            name = self.specs[part.places[column]][0]
        else:
            position, which = error.position, 0
            while position >= call.lengths[part.places[which]]:
                position -= call.lengths[part.places[which]]
                which += 1
            name = call.names[part.places[which]]
        return _check.outside(self.place, name, position, error.value, self.rows(name))

    def _plan(self, features: tuple[int, ...]) -> list[Part]:
        """The groups that a call on these tables needs."""
        plan = self._plans.get(features)
        if plan is None:
            by_group: dict[int, list[int]] = {}
            for place, number in enumerate(features):
                by_group.setdefault(self._group_of[self.specs[number][0]], []).append(place)
            plan = []
            for number, places in by_group.items():
                group = self.groups[number]
                names = [self.specs[features[place]][0] for place in places]
                device = group.rows.device
                first = torch.tensor([group.first[name] for name in names], device=device)
                sizes = torch.tensor([self.specs[self._numbers[name]][1] for name in names], device=device)
                plan.append(Part(group, places, torch.tensor(places, device=device), ops.Features(first, sizes)))
            if len(self._plans) >= 64:  # a model asks for a few sets of tables; any more come from a changing caller
                self._plans.clear()
            self._plans[features] = plan
        return plan

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            raise KeyError(f"{self.place}: there is no table {name!r}; there are {', '.join(self._numbers)}")
        return self._numbers[name]

    def _group(self, name: str) -> tuple[TableGroup, str]:
        own = self.specs[self._number(name)][0]
        return self.groups[self._group_of[own]], own

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TableLookups:
        # `.half()`, `.double()` and the like are for dense layers: the precision of the tables is their own.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        applied = super()._apply(keep_dtype, recurse)
        self._plans = {}
        self._whole = self._plan(tuple(range(len(self.specs))))
        return applied
