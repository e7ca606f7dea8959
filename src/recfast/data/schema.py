"""What each column of a log is: the schema that data, models and serving share."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from recfast.errors import InputError
from recfast.files import write_json

Side = Literal["user", "item", "context"]
_SIDES = ("user", "item", "context")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause that names the known names closest to `name`, for the end of an error sentence."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"the nearest known: {', '.join(map(repr, close))}"
    shown = ", ".join(map(repr, known[:12])) + (", ..." if len(known) > 12 else "")
    return f"known: {shown}" if known else "there are none"


def _check_name(kind: str, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise InputError(f"{kind}: name = {name!r} is not a non-empty string")


def _check_positive(kind: str, column: str, what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{kind} {column!r}: {what} = {value!r} is not a positive integer")


def _check_side(kind: str, column: str, side: object) -> None:
    if side not in _SIDES:
        raise InputError(f"{kind} {column!r}: side = {side!r} is not one of 'user', 'item', 'context'")


@dataclass(frozen=True)
class Categorical:
    """A column of ids: one row of an embedding table for each value seen in the train split.

    Parameters
    ----------
    name
        The raw column; integers, text, booleans, floats or dates.
    role
        "user" or "item" for the two columns that identify who and what; at most one of each in a schema.
    side
        What the value belongs to: "user" and "item" columns are known once their id is known (so a candidate
        row can be built at serving time), "context" columns belong to the row. A role implies the side.
    min_count
        Values seen fewer times than this in the train split become id 0, "unknown".
    """

    name: str
    role: Literal["user", "item"] | None = None
    side: Side | None = None
    min_count: int = 1
    kind: ClassVar[str] = "categorical"

    def __post_init__(self) -> None:
        _check_name("Categorical", self.name)
        if self.role not in (None, "user", "item"):
            raise InputError(f"Categorical {self.name!r}: role = {self.role!r} is not None, 'user' or 'item'")
        if self.side is None:
            object.__setattr__(self, "side", self.role or "context")
        _check_side("Categorical", self.name, self.side)
        if self.role is not None and self.side != self.role:
            raise InputError(
                f"Categorical {self.name!r}: role {self.role!r} implies that side, got side = {self.side!r}"
            )
        _check_positive("Categorical", self.name, "min_count", self.min_count)


@dataclass(frozen=True)
class Sequence:
    """A history: a jagged list of ids of another column, whose embedding table it shares.

    If the raw frame has a column of this name, it is read (a list, or text with "|" between the values,
    oldest first). If not, the history is derived from the log: the same user's earlier rows with label 1 in
    any split, strictly earlier in time, so that no row sees itself, its own moment or its future.

    Parameters
    ----------
    name
        The feature.
    of
        The categorical column whose values it lists; "item" also stands for the column with that role.
    max_length
        The most recent this many are kept.
    """

    name: str
    of: str = "item"
    max_length: int = 50
    kind: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        _check_name("Sequence", self.name)
        _check_name("Sequence", self.of)
        _check_positive("Sequence", self.name, "max_length", self.max_length)


@dataclass(frozen=True)
class Numeric:
    """A real number per row.

    Parameters
    ----------
    name
        The raw column; numbers or booleans.
    transform
        "standard": ``(x - mean) / std``, with the mean and standard deviation of the train split.
        "log": ``sign(x) * log(1 + |x|)``, then standardised likewise, for heavy tails. None: as it is.
        A missing value (null or NaN) becomes 0 after the transform, that is, the train mean;
        `Dataset.summary` counts them.
    side
        As in `Categorical`.
    """

    name: str
    transform: Literal["standard", "log"] | None = "standard"
    side: Side = "context"
    kind: ClassVar[str] = "numeric"

    def __post_init__(self) -> None:
        _check_name("Numeric", self.name)
        if self.transform not in (None, "standard", "log"):
            raise InputError(f"Numeric {self.name!r}: transform = {self.transform!r} is not 'standard', 'log' or None")
        _check_side("Numeric", self.name, self.side)


@dataclass(frozen=True)
class Vector:
    """A vector of `dim` floats per row or per id, say of a text or an image; never transformed.

    Parameters
    ----------
    name
        The raw column: a list or array of numbers, or text with "|" between them.
    dim
        Its length, the same in every row.
    side
        As in `Categorical`.
    """

    name: str
    dim: int
    side: Side = "item"
    kind: ClassVar[str] = "vector"

    def __post_init__(self) -> None:
        _check_name("Vector", self.name)
        _check_positive("Vector", self.name, "dim", self.dim)
        _check_side("Vector", self.name, self.side)


Column = Categorical | Sequence | Numeric | Vector
_KINDS: dict[str, type] = {kind.kind: kind for kind in (Categorical, Sequence, Numeric, Vector)}


@dataclass(frozen=True)
class Schema:
    """What the columns of a log are.

    Parameters
    ----------
    columns
        `Categorical`, `Sequence`, `Numeric` and `Vector` in any order; the order of the categorical columns
        is the order of `Batch.ids`.
    label
        The column of 0 and 1; None for implicit feedback, where every row is a positive.
    time
        The column that orders the rows of a user: integers, floats, dates or date-times.
    group
        The column by which grouped metrics group, usually the user.
    fitted
        Rows of each categorical column's table, as `Dataset.schema` has them; leave it out when writing a
        schema.

    Raises
    ------
    InputError
        Two columns of one name, two columns of one role, a sequence of an unknown column, a label that is a
        feature.

    Examples
    --------
    >>> schema = Schema([Categorical("user", role="user"), Categorical("item", role="item"),
    ...                  Sequence("history", of="item", max_length=50)], label="click", time="ts")
    >>> schema.user, schema.item, schema.names
    ('user', 'item', ['user', 'item', 'history'])
    """

    columns: tuple[Column, ...]
    label: str | None = dataclasses.field(default="label", kw_only=True)
    time: str | None = dataclasses.field(default=None, kw_only=True)
    group: str | None = dataclasses.field(default=None, kw_only=True)
    fitted: tuple[tuple[str, int], ...] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        columns = tuple(self.columns)
        seen: set[str] = set()
        for i, column in enumerate(columns):
            if not isinstance(column, Categorical | Sequence | Numeric | Vector):
                raise InputError(f"Schema: columns[{i}] = {column!r} is not a Categorical, Sequence, Numeric or Vector")
            if column.name in seen:
                raise InputError(f"Schema: two columns are named {column.name!r}; a name may stand once")
            seen.add(column.name)
        if not any(isinstance(column, Categorical) for column in columns):
            raise InputError("Schema: there is no Categorical column; at least one is needed")
        categorical = [column for column in columns if isinstance(column, Categorical)]
        for role in ("user", "item"):
            holders = [column.name for column in categorical if column.role == role]
            if len(holders) > 1:
                raise InputError(f"Schema: columns {holders[0]!r} and {holders[1]!r} both have the role {role!r}")
        names = [column.name for column in categorical]
        item = next((column.name for column in categorical if column.role == "item"), None)
        resolved: list[Column] = []
        for column in columns:
            if isinstance(column, Sequence) and column.of not in names:
                if column.of != "item" or item is None:
                    raise InputError(
                        f"Sequence {column.name!r}: of = {column.of!r} is not a categorical column; "
                        + nearest(column.of, names)
                    )
                column = dataclasses.replace(column, of=item)
            resolved.append(column)
        object.__setattr__(self, "columns", tuple(resolved))
        for what in ("label", "time", "group"):
            value = getattr(self, what)
            if value is not None:
                _check_name(f"Schema: {what}", value)
        if self.label is not None and self.label in seen:
            raise InputError(f"Schema: the label {self.label!r} is also a feature column, which would give it away")
        if self.fitted is not None:
            fitted = tuple((str(name), int(rows)) for name, rows in dict(self.fitted).items())
            object.__setattr__(self, "fitted", fitted)
            for name in names:
                if dict(fitted).get(name, 0) < 1:
                    raise InputError(f"Schema: fitted has no row count for the categorical column {name!r}")

    @property
    def categorical(self) -> list[Categorical]:
        """The categorical columns, in order: column j of `Batch.ids` is ``categorical[j]``."""
        return [column for column in self.columns if isinstance(column, Categorical)]

    @property
    def numeric(self) -> list[Numeric]:
        """The numeric columns, in the order of `Batch.numeric`."""
        return [column for column in self.columns if isinstance(column, Numeric)]

    @property
    def sequences(self) -> list[Sequence]:
        """The sequence columns, in order."""
        return [column for column in self.columns if isinstance(column, Sequence)]

    @property
    def vectors(self) -> list[Vector]:
        """The vector columns, in order."""
        return [column for column in self.columns if isinstance(column, Vector)]

    @property
    def names(self) -> list[str]:
        """All column names, in order; label, time and group are not among them unless they are features."""
        return [column.name for column in self.columns]

    @property
    def user(self) -> str | None:
        """The name of the column with the role "user", or None."""
        return next((column.name for column in self.categorical if column.role == "user"), None)

    @property
    def item(self) -> str | None:
        """The name of the column with the role "item", or None."""
        return next((column.name for column in self.categorical if column.role == "item"), None)

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise InputError(f"Schema: there is no column {name!r}; " + nearest(name, self.names))

    def position(self, name: str) -> int:
        """Return j such that ``categorical[j].name == name``."""
        names = [column.name for column in self.categorical]
        if name not in names:
            raise InputError(f"Schema: there is no categorical column {name!r}; " + nearest(name, names))
        return names.index(name)

    def rows(self, name: str) -> int:
        """Return the rows of a column's embedding table: its vocabulary and row 0, "unknown".

        For a sequence, the rows of the column it lists.
        """
        column = self[name]
        if isinstance(column, Sequence):
            name = column.of
        self.position(name)
        if self.fitted is None:
            raise InputError(f"Schema: rows({name!r}) is known after data.prepare, as in Dataset.schema")
        return dict(self.fitted)[name]

    def fit(self, rows: Mapping[str, int]) -> Schema:
        """Return a copy that knows the table rows of each categorical column."""
        return dataclasses.replace(self, fitted=tuple((c.name, int(rows[c.name])) for c in self.categorical))

    def to_dict(self) -> dict[str, Any]:
        """Return the schema as JSON-able values; `from_dict` reads it back."""
        columns = [{"kind": column.kind, **dataclasses.asdict(column)} for column in self.columns]
        value: dict[str, Any] = {
            "columns": columns,
            "label": self.label,
            "time": self.time,
            "group": self.group,
        }
        if self.fitted is not None:
            value["rows"] = dict(self.fitted)
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Schema:
        """Read what `to_dict` returns.

        Raises
        ------
        InputError
            An unknown key, an unknown kind of column, or anything `Schema` itself refuses.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("columns"), list):
            raise InputError("Schema: a JSON object with a list 'columns' is expected")
        known = ["columns", "label", "time", "group", "rows"]
        for key in value:
            if key not in known:
                raise InputError(f"Schema: unknown key {key!r}; " + nearest(key, known))
        columns = []
        for i, entry in enumerate(value["columns"]):
            if not isinstance(entry, Mapping) or entry.get("kind") not in _KINDS:
                raise InputError(f"Schema: columns[{i}] has no 'kind' out of {', '.join(map(repr, _KINDS))}")
            kind = _KINDS[entry["kind"]]
            fields = [field.name for field in dataclasses.fields(kind)]
            options = {key: option for key, option in entry.items() if key != "kind"}
            for key in options:
                if key not in fields:
                    raise InputError(f"Schema: columns[{i}] has an unknown key {key!r}; " + nearest(key, fields))
            try:
                columns.append(kind(**options))
            except TypeError as error:
                raise InputError(f"Schema: columns[{i}] is incomplete: {error}") from None
        rows = value.get("rows")
        return cls(
            tuple(columns),
            label=value.get("label", "label"),
            time=value.get("time"),
            group=value.get("group"),
            fitted=None if rows is None else tuple(rows.items()),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schema as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schema:
        """Read a schema written by `save`."""
        path = Path(path)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"Schema: {path} does not exist") from None
        except (ValueError, OSError) as error:
            raise InputError(f"Schema: {path} is not a readable JSON file ({error})") from None
        return cls.from_dict(value)
