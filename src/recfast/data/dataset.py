"""A prepared data set: columns on disk, vocabularies, histories, batches."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recfast.data.schema import Schema, nearest
from recfast.errors import InputError, OutOfRange

FORMAT = 1
SPLITS = ("train", "valid", "test")
Upto = Literal["train", "valid", "test", "all"]


def file_name(column: str) -> str:
    """Return a column's name as a file name, whatever characters it has."""
    return quote(column, safe=" ")


def load_array(path: Path) -> np.ndarray:
    """Map a .npy file into memory, read-only, as a plain array; an empty one cannot be mapped and is read."""
    try:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except ValueError:
            array = np.load(path, allow_pickle=False)
            array.flags.writeable = False
            return array
    except FileNotFoundError:
        raise InputError(f"data.open: {path} is missing; prepare the data again") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"data.open: {path} is damaged ({error}); prepare the data again") from None


class Jagged(NamedTuple):
    """Lists of different lengths end to end: list b is ``values[offsets[b]:offsets[b + 1]]``.

    values
        int64 [T].
    offsets
        int64 [B + 1], from 0 to T, never falling.
    """

    values: Tensor
    offsets: Tensor

    def lengths(self) -> Tensor:
        """Return the length of each list, int64 [B]."""
        return self.offsets[1:] - self.offsets[:-1]

    def row(self, b: int) -> Tensor:
        """Return list b, a view."""
        return self.values[int(self.offsets[b]) : int(self.offsets[b + 1])]

    def take(self, rows: Tensor | np.ndarray | Iterable[int], *, last: int | None = None) -> Jagged:
        """Return the lists `rows` (int64 [n], repeats allowed), of each its `last` values if given."""
        index = torch.as_tensor(np.asarray(rows) if not isinstance(rows, Tensor) else rows, dtype=torch.int64)
        offsets = self.offsets.numpy()
        values, out = gather_jagged(self.values.numpy(), offsets[index.numpy()], offsets[index.numpy() + 1], last)
        return Jagged(torch.from_numpy(values), torch.from_numpy(out))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Jagged:
        """Move both tensors."""
        return Jagged(*(t.to(device, non_blocking=non_blocking) for t in self))


def gather_jagged(
    values: np.ndarray, starts: np.ndarray, ends: np.ndarray, last: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the slices ``values[starts[b]:ends[b]]``, each cut to its `last` values."""
    if last is not None:
        starts = np.maximum(starts, ends - last)
    offsets = np.zeros(len(starts) + 1, dtype=np.int64)
    np.cumsum(ends - starts, out=offsets[1:])
    index = np.repeat(starts - offsets[:-1], ends - starts)
    index += np.arange(offsets[-1])
    return values[index].astype(np.int64), offsets


@dataclass
class Batch:
    """Rows of a split as tensors.

    ids
        int64 [R, F]; column j is ``schema.categorical[j]``; 0 is "unknown".
    numeric
        float32 [R, n], transformed, nothing missing.
    sequences
        name -> `Jagged`; R lists, or B of them where `candidate_offsets` is given.
    vectors
        name -> float32 [R, dim].
    label
        float32 [R] of 0 and 1, or None.
    group
        int64 [R], equal where the rows belong together, or None.
    candidate_offsets
        None: R == B, every row has its own history. Else int64 [B + 1]: rows
        ``candidate_offsets[b]:candidate_offsets[b + 1]`` share history b.
    columns
        The names of the columns of `ids`.
    """

    ids: Tensor
    numeric: Tensor
    sequences: dict[str, Jagged] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    label: Tensor | None = None
    group: Tensor | None = None
    candidate_offsets: Tensor | None = None
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.ids.shape[0]

    def column(self, name: str) -> Tensor:
        """Return the ids of one categorical column, int64 [R]."""
        if name not in self.columns:
            raise InputError(f"Batch: there is no column {name!r}; " + nearest(name, self.columns))
        return self.ids[:, self.columns.index(name)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return Batch(
            ids=self.ids.to(device, non_blocking=non_blocking),
            numeric=self.numeric.to(device, non_blocking=non_blocking),
            sequences={name: jagged.to(device, non_blocking) for name, jagged in self.sequences.items()},
            vectors={name: vector.to(device, non_blocking=non_blocking) for name, vector in self.vectors.items()},
            label=move(self.label),
            group=move(self.group),
            candidate_offsets=move(self.candidate_offsets),
            columns=self.columns,
        )


class Vocabulary:
    """The values of a column and their ids: value i (from 0) has id i + 1, and id 0 is "unknown".

    Ids are ordered by the count in the train split, most frequent first, ties by value, so they are the same
    in every run.

    Parameters
    ----------
    values
        Distinct values without null, in id order.
    counts
        int64 [size], occurrences in the train split.
    name
        For error sentences.
    """

    def __init__(self, values: pl.Series, counts: np.ndarray | None = None, name: str = "values") -> None:
        self.values = values
        self.counts = np.zeros(len(values), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
        self.name = name
        self._lock = threading.Lock()
        self._text: Any = None
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._direct: tuple[int, np.ndarray] | None = None

    @property
    def size(self) -> int:
        """How many values are known; the table has one row more."""
        return len(self.values)

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Vocabulary({self.name!r}, size={self.size}, dtype={self.values.dtype})"

    def encode(self, values: Any) -> np.ndarray:
        """Return the ids of raw values (list, array or Series), int64 [n]; unknown and missing ones are 0.

        Numbers given as text, and text given as numbers, are understood.
        """
        if isinstance(values, pl.Series):
            series = values
        else:
            if isinstance(values, np.ndarray):
                values = values.ravel()
            else:
                values = list(values)
            try:
                series = pl.Series(self.name, values)
            except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
                series = pl.Series(self.name, [None if v is None else str(v) for v in values], dtype=pl.String)
        return self.encode_series(series)

    def encode_series(self, series: pl.Series) -> np.ndarray:
        """`encode` for a polars Series; int64 [n]."""
        if self.size == 0 or len(series) == 0:
            return np.zeros(len(series), dtype=np.int64)
        if series.dtype != self.values.dtype:
            if series.dtype == pl.String and self.values.dtype.is_integer():
                series = series.str.strip_chars()
            if series.dtype.is_float() and self.values.dtype.is_integer():
                # 1.5 is not the id 1.
                series = pl.select(pl.when(series == series.floor()).then(series)).to_series()
            try:
                series = series.cast(self.values.dtype, strict=False)
            except pl.exceptions.PolarsError:
                return np.zeros(len(series), dtype=np.int64)
        with self._lock:
            if self._text is None and self._sorted is None and self._direct is None:
                self._build()
        if self._text is not None:
            codes = series.cast(self._text, strict=False).to_physical().cast(pl.Int64)
            return (codes + 1).fill_null(0).to_numpy()
        keys = _keys(series)
        missing = series.is_null().to_numpy() if series.null_count() else None
        if self._direct is not None:
            low, table = self._direct
            inside = (keys >= low) & (keys < low + len(table))
            ids = table[np.where(inside, keys - low, 0)].astype(np.int64)
            ids[~inside] = 0
        else:
            known, order = self._sorted
            place = np.searchsorted(known, keys)
            place[place == len(known)] = 0
            ids = np.where(known[place] == keys, order[place].astype(np.int64) + 1, 0)
        if missing is not None:
            ids[missing] = 0
        return ids

    def _build(self) -> None:
        if self.values.dtype == pl.String:
            # A cast to an Enum is polars' own hashed look-up, without a loop in Python.
            self._text = pl.Enum(self.values)
            return
        keys = _keys(self.values)
        if keys.dtype == np.int64:
            low, high = int(keys.min()), int(keys.max())
            if high - low < max(4 * len(keys), 1 << 20):
                table = np.zeros(high - low + 1, dtype=np.int32)
                table[keys - low] = np.arange(1, len(keys) + 1, dtype=np.int32)
                self._direct = (low, table)
                return
        order = np.argsort(keys, kind="stable")
        self._sorted = (keys[order], order.astype(np.int32))

    def decode_series(self, ids: Any) -> pl.Series:
        """`decode` as a polars Series of the raw type; id 0 is null."""
        if isinstance(ids, Tensor):
            ids = ids.detach().cpu().numpy()
        array = np.asarray(ids, dtype=np.int64).ravel()
        wrong = np.flatnonzero((array < 0) | (array > self.size))
        if wrong.size:
            i = int(wrong[0])
            raise InputError(f"Vocabulary {self.name!r}: ids[{i}] = {array[i]} is outside [0, {self.size}]")
        index = pl.Series(array - 1)
        return self.values.gather(pl.select(pl.when(index >= 0).then(index)).to_series())

    def decode(self, ids: Any) -> list[Any]:
        """Return the raw values of ids (any integer array or tensor, flattened); None for id 0.

        Raises
        ------
        InputError
            An id outside ``[0, size]``.
        """
        return self.decode_series(ids).to_list()

    def save(self, path: Path) -> None:
        """Write values and counts as Parquet."""
        pl.DataFrame({"value": self.values, "count": pl.Series(self.counts)}).write_parquet(path)

    @classmethod
    def load(cls, path: Path, name: str) -> Vocabulary:
        """Read what `save` wrote."""
        frame = read_frame(path)
        return cls(frame["value"], frame["count"].to_numpy(), name)


def _keys(series: pl.Series) -> np.ndarray:
    """Return values that compare like the raw ones as a numpy array; null is some value."""
    if series.dtype == pl.Boolean:
        series = series.cast(pl.UInt8)
    elif series.dtype.is_temporal():
        series = series.to_physical()
    if series.dtype.is_integer() and series.dtype != pl.UInt64:
        series = series.cast(pl.Int64)
    return series.fill_null(0).to_numpy()


def read_frame(path: Path) -> pl.DataFrame:
    """Read a Parquet file of a prepared folder."""
    try:
        return pl.read_parquet(path, glob=False)
    except FileNotFoundError:
        raise InputError(f"data.open: {path} is missing; prepare the data again") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise InputError(f"data.open: {path} is damaged ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class _Stored:
    """The arrays of one split; everything per row has R rows."""

    ids: np.ndarray
    numeric: np.ndarray | None
    label: np.ndarray | None
    group: np.ndarray | None
    time: np.ndarray | None
    sampled: np.ndarray | None
    # Where a derived history ends: an index into the log's positives, which begin at log_offsets[user id].
    history_end: np.ndarray | None
    log_offsets: np.ndarray | None
    log_values: Mapping[str, np.ndarray]
    # Sequences that the raw frame had: values and offsets [R + 1].
    sequences: Mapping[str, tuple[np.ndarray, np.ndarray]]
    # Vectors per row, or per id with the position of the id's column.
    vectors: Mapping[str, tuple[np.ndarray, int | None]]


class Split:
    """Rows of the train, valid or test part, or a selection of them.

    The arrays are mapped from disk and read-only. `Loader` turns a split into batches.
    """

    def __init__(self, name: str, schema: Schema, stored: _Stored, rows: np.ndarray | None = None) -> None:
        self.name = name
        self.schema = schema
        self._stored = stored
        self._rows = rows
        self._tables = dict(schema.fitted or ())

    def __len__(self) -> int:
        return len(self._stored.ids) if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        return f"Split({self.name!r}, rows={len(self)})"

    def _select(self, array: np.ndarray | None) -> np.ndarray | None:
        return array if array is None or self._rows is None else array[self._rows]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of `ids`."""
        return tuple(column.name for column in self.schema.categorical)

    @property
    def ids(self) -> np.ndarray:
        """int32 [R, F] in the order of `columns`."""
        return self._select(self._stored.ids)

    @property
    def numeric(self) -> np.ndarray | None:
        """float32 [R, n], transformed; None without numeric columns."""
        return self._select(self._stored.numeric)

    @property
    def label(self) -> np.ndarray | None:
        """float32 [R] of 0 and 1; None for implicit feedback, where every row is a positive."""
        return self._select(self._stored.label)

    @property
    def group(self) -> np.ndarray | None:
        """int64 [R]; None without a group column."""
        return self._select(self._stored.group)

    @property
    def time(self) -> np.ndarray | None:
        """int64 or float64 [R] (dates as microseconds since 1970); None without a time column."""
        return self._select(self._stored.time)

    @property
    def sampled(self) -> np.ndarray:
        """bool [R], true for negatives that were drawn, not seen."""
        sampled = self._select(self._stored.sampled)
        return np.zeros(len(self), dtype=bool) if sampled is None else sampled

    def column(self, name: str) -> np.ndarray:
        """Return the ids of one categorical column, int32 [R]."""
        ids = self._stored.ids[:, self.schema.position(name)]
        return ids if self._rows is None else ids[self._rows]

    def take(self, rows: Any) -> Split:
        """Return the rows of the given positions (integers [n]) or of a mask (bool [R])."""
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise InputError(f"Split.take: a mask of shape {index.shape} does not fit {len(self)} rows")
            index = np.flatnonzero(index)
        index = index.astype(np.int64).ravel()
        wrong = np.flatnonzero((index < 0) | (index >= len(self)))
        if wrong.size:
            i = int(wrong[0])
            raise InputError(f"Split.take: rows[{i}] = {index[i]} is outside [0, {len(self)})")
        return Split(self.name, self.schema, self._stored, index if self._rows is None else self._rows[index])

    def positives(self) -> Split:
        """Return the rows with label 1; all of them without a label."""
        label = self.label
        return self if label is None else self.take(label > 0.5)

    def _inside(self, name: str, table: str, ids: np.ndarray) -> None:
        rows = self._tables.get(table)
        if rows is None or not ids.size:
            return
        # Negative numbers are large ones without their sign.
        worst = int(ids[ids.view(np.uint64).argmax()])
        if not 0 <= worst < rows:
            raise OutOfRange(
                f"data: the {self.name} split holds the id {worst} in {name!r}, which is outside [0, {rows}); "
                "the prepared folder is damaged: remove it and prepare the data again"
            )

    def requests(self) -> np.ndarray:
        """Return where the requests of the split begin, int64 [N + 1], from 0 to R.

        A request is a run of rows, one after another, of one user with one history: the candidates of one moment.

        Raises
        ------
        InputError
            The sequences are columns of the raw data, which every row has for itself.
        """
        stored = self._stored
        if stored.history_end is None or stored.sequences:
            raise InputError(f"Split: the rows of {self.name} share no histories, only derived sequences can be shared")
        begins = self._begins(self.column(self.schema.user), self._select(stored.history_end))
        return np.append(begins, len(self))

    @staticmethod
    def _begins(user: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Where another user or another history begins than in the row before."""
        new = np.ones(len(user), dtype=bool)
        new[1:] = (user[1:] != user[:-1]) | (end[1:] != end[:-1])
        return np.flatnonzero(new)

    def gather(self, index: np.ndarray, *, shared: bool = False) -> Batch:
        """Return the rows `index` (int64 [R]) as a batch; no loop over rows.

        Parameters
        ----------
        index
            Positions.
        shared
            Rows one after another of one user with one history are given it once, and the batch has
            `candidate_offsets`; see `requests`.

        Raises
        ------
        OutOfRange
            An id that its table has no row for: the prepared folder is damaged.
        """
        if self._rows is not None:
            index = self._rows[index]
        stored = self._stored
        rows = len(index)
        ids = np.take(stored.ids, index, axis=0).astype(np.int64)
        # What a damaged folder holds must not reach a table: torch would say little of it.
        for j, column in enumerate(self.schema.categorical):
            self._inside(column.name, column.name, ids[:, j])
        if stored.numeric is None:
            numeric = np.zeros((rows, 0), dtype=np.float32)
        else:
            numeric = np.take(stored.numeric, index, axis=0)
        sequences, owner, candidate_offsets = {}, index, None
        if shared:
            begins = self._begins(ids[:, self.schema.position(self.schema.user)], stored.history_end[index])
            owner, candidate_offsets = index[begins], torch.from_numpy(np.append(begins, rows))
        for column in self.schema.sequences:
            if column.name in stored.sequences:
                values, offsets = stored.sequences[column.name]
                gathered = gather_jagged(values, offsets[index], offsets[index + 1], column.max_length)
            else:
                user = stored.ids[owner, self.schema.position(self.schema.user)]
                gathered = gather_jagged(
                    stored.log_values[column.of],
                    stored.log_offsets[user],
                    stored.history_end[owner],
                    column.max_length,
                )
            self._inside(column.name, column.of, gathered[0])
            sequences[column.name] = Jagged(*map(torch.from_numpy, gathered))
        vectors = {}
        for name, (table, position) in stored.vectors.items():
            vectors[name] = torch.from_numpy(table[index if position is None else ids[:, position]])
        return Batch(
            ids=torch.from_numpy(ids),
            numeric=torch.from_numpy(numeric),
            sequences=sequences,
            vectors=vectors,
            label=None if stored.label is None else torch.from_numpy(stored.label[index]),
            group=None if stored.group is None else torch.from_numpy(stored.group[index]),
            candidate_offsets=candidate_offsets,
            columns=self.columns,
        )


class Dataset:
    """A prepared folder, read.

    Attributes
    ----------
    schema
        `Schema` with the rows of every table.
    train, valid, test
        `Split`; None where the split was not given.
    vocabulary
        column name -> `Vocabulary`.
    items, users
        Frames in id order (row i is id i + 1): the raw id, and whatever side information was given, such as
        "title" and "genres". None without the role.
    name, path, meta
        As prepared.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        meta_path = self.path / "meta.json"
        try:
            self.meta: dict[str, Any] = json.loads(meta_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"data.open: {self.path} is not a folder of prepared data (it has no meta.json); "
                "call data.prepare first"
            ) from None
        except (ValueError, OSError) as error:
            raise InputError(f"data.open: {meta_path} is damaged ({error}); prepare the data again") from None
        if self.meta.get("format") != FORMAT:
            raise InputError(
                f"data.open: {self.path} has format {self.meta.get('format')!r}, this version reads "
                f"{FORMAT}; prepare the data again"
            )
        self.name: str = self.meta["name"]
        self.schema = Schema.load(self.path / "schema.json")
        self.vocabulary = {
            column.name: Vocabulary.load(self.path / "vocabulary" / f"{file_name(column.name)}.parquet", column.name)
            for column in self.schema.categorical
        }
        self.items = self._side_frame("item")
        self.users = self._side_frame("user")
        self._titles: list[Any] | None = None
        self._side: dict[str, dict[str, Any]] = {}
        splits = {name: self._open_split(name) if name in self.meta["rows"] else None for name in SPLITS}
        self.train: Split = splits["train"]
        self.valid: Split | None = splits["valid"]
        self.test: Split | None = splits["test"]

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}={count}" for name, count in self.meta["rows"].items())
        return f"Dataset({self.name!r}, {rows})"

    def _side_frame(self, role: str) -> pl.DataFrame | None:
        if getattr(self.schema, role) is None:
            return None
        return read_frame(self.path / f"{role}s.parquet")

    def _open_split(self, name: str) -> Split:
        folder = self.path / name
        schema = self.schema

        def optional(stem: str) -> np.ndarray | None:
            path = folder / f"{stem}.npy"
            return load_array(path) if path.exists() else None

        sequences, log_values = {}, {}
        for column in schema.sequences:
            if column.name in self.meta["derived"]:
                log_values[column.of] = load_array(self.path / "log" / f"{file_name(column.of)}.npy")
            else:
                stem = file_name(column.name)
                sequences[column.name] = (
                    load_array(folder / f"{stem}.values.npy"),
                    load_array(folder / f"{stem}.offsets.npy"),
                )
        vectors: dict[str, tuple[np.ndarray, int | None]] = {}
        for column in schema.vectors:
            stem = file_name(column.name)
            if column.name in self.meta["vectors_by_id"]:
                table = load_array(self.path / "side" / f"{column.side}.{stem}.npy")
                vectors[column.name] = (table, schema.position(getattr(schema, column.side)))
            else:
                vectors[column.name] = (load_array(folder / f"{stem}.npy"), None)
        ids = load_array(folder / "ids.npy")
        if ids.shape != (self.meta["rows"][name], len(schema.categorical)):
            raise InputError(
                f"data.open: {folder / 'ids.npy'} has shape {ids.shape}, "
                f"expected {(self.meta['rows'][name], len(schema.categorical))}; prepare the data again"
            )
        stored = _Stored(
            ids=ids,
            numeric=load_array(folder / "numeric.npy") if schema.numeric else None,
            label=load_array(folder / "label.npy") if schema.label is not None else None,
            group=load_array(folder / "group.npy") if schema.group is not None else None,
            time=load_array(folder / "time.npy") if schema.time is not None else None,
            sampled=optional("sampled"),
            history_end=load_array(folder / "history_end.npy") if log_values else None,
            log_offsets=load_array(self.path / "log" / "offsets.npy") if log_values else None,
            log_values=log_values,
            sequences=sequences,
            vectors=vectors,
        )
        return Split(name, schema, stored)

    def limited(self, max_length: int) -> Dataset:
        """Return the same data with histories cut to their last `max_length` events, nothing prepared anew.

        Raises
        ------
        InputError
            `max_length` is not positive, or longer than what was prepared for a sequence of the raw data.
        """
        for column in self.schema.sequences:
            kept = None if column.name in self.meta["derived"] else column.max_length
            if max_length < 1 or (kept is not None and max_length > kept):
                raise InputError(
                    f"Dataset.limited: max_length = {max_length} is outside [1, {kept or 'any length'}] for "
                    f"{column.name!r}"
                )
        columns = [replace(c, max_length=max_length) if c.kind == "sequence" else c for c in self.schema.columns]
        new = copy.copy(self)
        new.schema = replace(self.schema, columns=tuple(columns))
        for name in SPLITS:
            split = getattr(self, name)
            if split is not None:
                setattr(new, name, Split(name, new.schema, split._stored, split._rows))
        return new

    def split(self, name: str) -> Split:
        """Return the split "train", "valid" or "test"."""
        found = getattr(self, name) if name in SPLITS else None
        if found is None:
            raise InputError(f"Dataset: there is no split {name!r}; " + nearest(name, self.meta["rows"]))
        return found

    def _jagged(self, folder: str, values: str, upto: Upto) -> Jagged:
        if upto not in (*SPLITS, "all"):
            raise InputError(f"Dataset: upto = {upto!r} is not 'train', 'valid', 'test' or 'all'")
        if self.schema.user is None or self.schema.item is None:
            raise InputError("Dataset: a history needs a column with the role 'user' and one with the role 'item'")
        root = self.path / folder
        offsets = load_array(root / "offsets.npy")
        items = load_array(root / f"{file_name(values)}.npy")
        last = SPLITS.index(upto) if upto != "all" else len(SPLITS)
        keep = load_array(root / "split.npy") <= last
        if keep.all():
            return Jagged(torch.from_numpy(items.astype(np.int64)), torch.from_numpy(offsets.astype(np.int64)))
        kept = np.zeros(len(keep) + 1, dtype=np.int64)
        np.cumsum(keep, out=kept[1:])
        return Jagged(torch.from_numpy(items[keep].astype(np.int64)), torch.from_numpy(kept[offsets]))

    def history(self, upto: Upto = "all", *, of: str | None = None) -> Jagged:
        """Return each user's positives in time order, from the splits up to and including `upto`.

        Parameters
        ----------
        upto
            "train", "valid", "test" or "all".
        of
            The column listed; the item column unless a derived `Sequence` lists another.

        Returns
        -------
        Jagged
            offsets int64 [rows(user) + 1]: list u belongs to user id u, list 0 ("unknown") is empty. An item
            that the train split does not have is 0. Ties in time keep the order of the rows.
        """
        return self._jagged("log", of or self.schema.item or "", upto)

    def seen(self, upto: Upto = "all") -> Jagged:
        """Return each user's items as `history` does, but with any label; sampled negatives excluded."""
        return self._jagged("seen", self.schema.item or "", upto)

    def popularity(self, upto: Upto = "train") -> np.ndarray:
        """Return how many positives each item has, int64 [rows(item)]; entry 0 counts unknown items."""
        return np.bincount(self.history(upto).values.numpy(), minlength=self.schema.rows(self.schema.item))

    def title(self, item_id: int) -> str:
        """Return the title of an item id, or its raw id where there is no title, or "unknown" for 0."""
        if self.items is None:
            raise InputError("Dataset.title: no column has the role 'item'")
        if self._titles is None:
            raw = self.items[self.schema.item].cast(pl.String)
            titles = self.items["title"].cast(pl.String) if "title" in self.items.columns else raw
            self._titles = ["unknown", *titles.zip_with(titles.is_not_null(), raw).to_list()]
        if not 0 <= int(item_id) < len(self._titles):
            raise InputError(f"Dataset.title: item_id = {int(item_id)} is outside [0, {len(self._titles)})")
        return self._titles[int(item_id)]

    def side(self, role: Literal["user", "item"]) -> dict[str, Any]:
        """Return the features that an id alone determines, for building rows at serving time.

        Values come from the `items` or `users` table given to `prepare`; what is not there comes from the
        last train row of the id. Row 0 is all zeros.

        Returns
        -------
        dict
            "columns": names of the side's categorical columns; "ids": int64 [rows(role), len(columns)];
            "numeric_columns" and "numeric": float32 [rows(role), n]; "vectors": name -> float32 [rows(role),
            dim].
        """
        if role not in ("user", "item") or getattr(self.schema, role) is None:
            raise InputError(f"Dataset.side: no column has the role {role!r}")
        if role not in self._side:
            schema, folder = self.schema, self.path / "side"
            self._side[role] = {
                "columns": [c.name for c in schema.categorical if c.side == role],
                "ids": load_array(folder / f"{role}_ids.npy").astype(np.int64),
                "numeric_columns": [c.name for c in schema.numeric if c.side == role],
                "numeric": load_array(folder / f"{role}_numeric.npy"),
                "vectors": {
                    c.name: load_array(folder / f"{role}.{file_name(c.name)}.npy")
                    for c in schema.vectors
                    if c.side == role
                },
            }
        return self._side[role]

    @property
    def genre_names(self) -> list[str]:
        """The genres of the items, sorted; empty where they are not known."""
        if self.items is None or "genres" not in self.items.columns:
            return []
        return self.items["genres"].drop_nulls().explode().drop_nulls().unique().sort().to_list()

    def item_features(self) -> np.ndarray:
        """Return the genres as 0 and 1, float32 [rows(item), G], columns `genre_names`; row 0 is zeros."""
        names = self.genre_names
        rows = self.schema.rows(self.schema.item) if self.schema.item else 0
        features = np.zeros((rows, len(names)), dtype=np.float32)
        if names:
            pairs = (
                self.items.select(pl.int_range(1, pl.len() + 1).alias("id"), "genres").explode("genres").drop_nulls()
            )
            features[pairs["id"].to_numpy(), Vocabulary(pl.Series(names)).encode_series(pairs["genres"]) - 1] = 1.0
        return features

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know of the data, as JSON-able values.

        Keys: name, rows, users, items, density (seen pairs over users x items), label_rate, sampled, unknown
        (rows with id 0, by column) and missing (numeric values, by column), each by split; time (first and
        last), popularity (of the train positives), history_length (of the users, edges and counts).
        """
        schema, meta = self.schema, self.meta
        summary: dict[str, Any] = {
            "name": self.name,
            "rows": dict(meta["rows"]),
            "columns": {column.name: column.kind for column in schema.columns},
            "table_rows": {column.name: schema.rows(column.name) for column in schema.categorical},
            "label_rate": meta["label_rate"],
            "sampled": meta["sampled"],
            "unknown": meta["unknown"],
            "missing": meta["missing"],
            "time": meta["time"],
            "users": self.vocabulary[schema.user].size if schema.user else None,
            "items": self.vocabulary[schema.item].size if schema.item else None,
            "density": None,
            "popularity": None,
            "history_length": None,
        }
        if schema.user and schema.item:
            cells = summary["users"] * summary["items"]
            summary["density"] = float(len(load_array(self.path / "seen" / "split.npy")) / cells) if cells else 0.0
            counts = np.sort(self.popularity("train")[1:])[::-1]
            total = int(counts.sum())
            summary["popularity"] = {
                "positives": total,
                "max": int(counts[0]) if len(counts) else 0,
                "median": float(np.median(counts)) if len(counts) else 0.0,
                "never": int((counts == 0).sum()),
                "share_of_top_1_percent": float(counts[: max(1, len(counts) // 100)].sum() / max(total, 1)),
                "share_of_top_10_percent": float(counts[: max(1, len(counts) // 10)].sum() / max(total, 1)),
                "quantiles": {
                    str(q): float(np.quantile(counts, q)) if len(counts) else 0.0 for q in (0.1, 0.25, 0.5, 0.75, 0.9)
                },
            }
            lengths = self.history("train").lengths().numpy()[1:]
            edges = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
            histogram = np.histogram(lengths, bins=[*edges, np.inf])[0]
            summary["history_length"] = {
                "edges": edges,
                "counts": histogram.tolist(),
                "mean": float(lengths.mean()) if len(lengths) else 0.0,
                "max": int(lengths.max()) if len(lengths) else 0,
            }
        return summary


def open(path: str | os.PathLike[str]) -> Dataset:
    """Open a folder that `prepare` wrote.

    Raises
    ------
    InputError
        The folder is not there, is damaged, or has another format.
    """
    return Dataset(path)
