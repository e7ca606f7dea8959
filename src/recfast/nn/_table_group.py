"""The storage behind embedding tables: tables of one precision, one after the other, and their optimiser's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from recfast import ops
from recfast.ops import formats

PRECISIONS = ("float32", "bfloat16", "float16", "float8", "int8", "int4", "int2")
BITS = {"float8": "fp8", "int8": 8, "int4": 4, "int2": 2}
# What rows of few bits begin with at least; it did best on Frappe's validation rows.
_LEAST_RANGE = {"int4": 0.25, "int2": 0.15}
# Rows are drawn, rounded and converted in pieces of about so many weights: no float copy of a whole table is made.
_PIECE = 1 << 22


def default_range(precision: str, init_std: float) -> float:
    """The largest weight that the initial step of a row allows for, where nothing else is asked for."""
    return max(4 * init_std, _LEAST_RANGE.get(precision, 0.0))


def range_rule(step_range: str, precision: str) -> str:
    """What `step_range` "auto" stands for.

    A step that suits the largest weight of a row leaves the others hardly any of 4 or 16 codes.
    """
    if step_range != "auto":
        return step_range
    return "clip" if precision in ("int4", "int2") else "grow"


class TableGroup(nn.Module):
    """Tables of one precision.

    Attributes
    ----------
    names, sizes
        Of the tables, in order, and how many rows each has.
    rows : Tensor [T, D] of the precision's dtype, or uint8 [T, row bytes]
    row_state, moment, second
        See `ops.UpdateState`; None where the optimiser has no such part.
    """

    PARTS = ("rows", "row_state", "moment", "second")

    def __init__(
        self,
        specs: Sequence[tuple[str, int]],
        dim: int,
        precision: str,
        rows: torch.Tensor | None = None,
        *,
        one_step: bool = False,
    ) -> None:
        super().__init__()
        self.names = [name for name, _ in specs]
        self.sizes = [rows for _, rows in specs]
        self.dim, self.precision = dim, precision
        self.bits = BITS.get(precision)
        self.first: dict[str, int] = {}
        total = 0
        for name, count in specs:
            self.first[name] = total
            total += count
        self.total = total
        info = formats.FORMATS[precision]
        dtype = info.dtype or torch.uint8
        size = formats.row_bytes(precision, dim)
        if rows is None:
            rows = formats.empty_table(total, size, dtype)
        elif list(rows.shape) != [total, size // dtype.itemsize] or rows.dtype != dtype:
            wanted = [total, size // dtype.itemsize]
            raise ValueError(f"rows must be {dtype} {wanted}, got {rows.dtype} {list(rows.shape)}")
        # Buffers, so that they move with the module; not persistent, since the module writes them table by table.
        self.register_buffer("rows", rows, persistent=False)
        for name in self.PARTS[1:]:
            self.register_buffer(name, None, persistent=False)
        # The moments of a step size that all rows share.
        self.one_step = one_step
        self.register_buffer("step_state", torch.zeros(2) if one_step else None, persistent=False)

    def add_state(self, **options: Any) -> None:
        """Make the state of an optimiser, all zeros; `options` as `ops.UpdateState.zeros` takes them."""
        state = ops.UpdateState.zeros(self.table, **options)
        self.row_state, self.moment, self.second = state.row, state.moment, state.second

    @property
    def table(self) -> torch.Tensor | ops.QuantizedTable:
        """The rows as the ops take them; a view."""
        return self.rows if self.bits is None else ops.QuantizedTable(self.rows, self.bits, self.dim)

    @property
    def state(self) -> ops.UpdateState:
        """The optimiser's state as the ops take it; views."""
        return ops.UpdateState(self.row_state, self.moment, self.second)

    def part(self, name: str) -> slice:
        """Where table `name` lies."""
        first = self.first[name]
        return slice(first, first + self.sizes[self.names.index(name)])

    def draw(self, std: float, step: float | None, generator: torch.Generator, rounding: str, seed: int) -> None:
        """Fill all rows with N(0, std^2); `step` None gives each row the smallest step that clips nothing."""
        self._fill(
            lambda count, _: torch.empty(count, self.dim).normal_(0.0, std, generator=generator),
            slice(0, self.total), step, rounding, seed,
        )  # fmt: skip

    def write(
        self,
        name: str,
        values: torch.Tensor,
        *,
        step: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        """Round `values` [rows, D] into table `name`."""
        self._fill(lambda count, at: values[at : at + count], self.part(name), step, rounding, seed)

    def _fill(self, source: Any, part: slice, step: float | None, rounding: str, seed: int) -> None:
        piece = max(1, _PIECE // self.dim)
        for begin in range(part.start, part.stop, piece):
            end = min(begin + piece, part.stop)
            values = source(end - begin, begin - part.start).detach().to(torch.float32)
            if self.bits is None:
                dtype = self.rows.dtype
                if dtype == torch.float32:
                    self.rows[begin:end] = values
                else:
                    self.rows[begin:end] = ops.round_to(values, dtype, rounding=rounding, seed=seed + begin)
            else:
                self.rows[begin:end] = ops.quantize(
                    values, bits=self.bits, step=step, rounding=rounding, seed=seed + begin
                ).rows

    def dequantize(self, name: str) -> torch.Tensor:
        """The rows of table `name`: Tensor [T, D], float32, a copy."""
        part = self.rows[self.part(name)]
        if self.bits is None:
            return part.to(torch.float32, copy=True)
        return ops.QuantizedTable(part, self.bits, self.dim).dequantize()

    def copy_rows(self, name: str, other: TableGroup, *, rounding: str = "nearest", seed: int = 0) -> None:
        """Take table `name` over from `other`: the bytes where the precision is the same, else rounded anew."""
        if other.precision == self.precision:
            self.rows[self.part(name)] = other.rows[other.part(name)]
            return
        begin = other.part(name).start

        def source(count: int, at: int) -> torch.Tensor:
            rows = other.rows[begin + at : begin + at + count]
            return rows if other.bits is None else ops.QuantizedTable(rows, other.bits, other.dim).dequantize()

        self._fill(source, self.part(name), None, rounding, seed)

    def copy_state(self, name: str, other: TableGroup) -> bool:
        """Take the optimiser's state of table `name` over where it has the same form; say whether it did."""
        mine, theirs = self.part(name), other.part(name)
        names = self.PARTS[1:]
        pairs = [(getattr(self, part), getattr(other, part)) for part in names]
        same = all(
            (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and a.shape[1:] == b.shape[1:]))
            for a, b in pairs
        )
        if same:
            for a, b in pairs:
                if a is not None:
                    a[mine] = b[theirs]
            if self.one_step and other.one_step:
                self.step_state.copy_(other.step_state)
        return same

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What belongs to table `name`: views by part."""
        part = self.part(name)
        whole = {key: getattr(self, key) for key in self.PARTS}
        found = {key: tensor[part] for key, tensor in whole.items() if tensor is not None}
        return found | {"step_state": self.step_state} if self.one_step else found

    def memory_bytes(self) -> int:
        """Bytes of rows (with their step sizes) and optimiser state."""
        whole = (getattr(self, key) for key in self.PARTS)
        return sum(tensor.numel() * tensor.element_size() for tensor in whole if tensor is not None)


class Names:
    """Tables and the sequence columns that share one, in the shape of a schema."""

    def __init__(self, specs: Sequence[tuple[str, int]], aliases: Mapping[str, str]) -> None:
        self.categorical = [Column(name) for name, _ in specs]
        self.sequences = [Column(name, of) for name, of in aliases.items()]
        self.rows = dict(specs).__getitem__


class Column(NamedTuple):
    """A column of `Names`."""

    name: str
    of: str | None = None


def names_and_aliases(given: Any, place: str) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """The tables as (name, rows), and the other names that share one.

    Raises
    ------
    ValueError
        Repeated names, tables without rows, a sequence whose column is missing, no table at all.
    """
    if hasattr(given, "categorical"):
        specs = [(column.name, given.rows(column.name)) for column in given.categorical]
        aliases = {column.name: column.of for column in given.sequences}
    else:
        specs, aliases = [(str(name), int(rows)) for name, rows in given], {}
    names = [name for name, _ in specs]
    if not specs:
        raise ValueError(f"{place}: there must be at least one table")
    for position, (name, rows) in enumerate(specs):
        if name in names[:position]:
            raise ValueError(f"{place}: the name {name!r} stands twice")
        if rows < 1:
            raise ValueError(f"{place}: table {name!r} must have at least one row, got {rows}")
    for name, of in aliases.items():
        if of not in names:
            raise ValueError(f"{place}: sequence {name!r} shares the table of {of!r}, which is no categorical column")
    return specs, {name: of for name, of in aliases.items() if name not in names}


def precisions_of(given: Any, specs: Sequence[tuple[str, int]], place: str) -> dict[str, str]:
    """The precision of each table: one for all, or a mapping in which tables that are not named are float32."""
    names = [name for name, _ in specs]
    if isinstance(given, str):
        chosen = dict.fromkeys(names, given)
    else:
        for name in given:
            if name not in names:
                raise ValueError(f"{place}: precision names {name!r}, there are {', '.join(names)}")
        chosen = {name: given.get(name, "float32") for name in names}
    for name, precision in chosen.items():
        if precision not in PRECISIONS:
            of = "" if isinstance(given, str) else f" of table {name!r}"
            raise ValueError(f"{place}: precision{of} must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return chosen
