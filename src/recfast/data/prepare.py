"""From a raw log to a prepared folder: vocabularies, statistics, columns, histories, in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recfast.data.dataset import FORMAT, SPLITS, Dataset, Vocabulary, file_name
from recfast.data.schema import Categorical, Numeric, Schema, nearest
from recfast.data.sources import (
    FrameSource,
    LibfmSource,
    Source,
    Widened,
    first_line,
    kind_of,
    open_sources,
    paths_of,
    read_all,
)
from recfast.errors import InputError
from recfast.files import atomic_path, disk_errors, write_json

# Rows of the log whose events are sorted in memory at a time.
_SORT_ROWS = 4 << 20
_CHUNK_ROWS = 1 << 20
_NUMBERS = {"integer", "float", "boolean", "null"}
# The events before the log are encoded in a folder of this name, which is removed once they are in the histories.
_BEFORE = "before"


_ADVICE = "nothing half-written was kept; free some space, or name another folder in cache= or RECFAST_CACHE"


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return where prepared data are kept: `cache`, else $RECFAST_CACHE, else ~/.cache/recfast."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("RECFAST_CACHE") or Path.home() / ".cache" / "recfast")


def prepare(
    schema: Schema,
    train: Any,
    valid: Any = None,
    test: Any = None,
    *,
    before: Any = None,
    items: Any = None,
    users: Any = None,
    sampled: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    name: str = "data",
    about: str = "",
) -> Dataset:
    """Prepare a log for training, or find it prepared already.

    Vocabularies and statistics are fitted on the train split only. Ids are ordered by count, ties by value;
    id 0 is "unknown": a value that the train split does not have, has fewer than `min_count` times, or that
    is missing. The log is read in batches, so memory grows with the number of distinct values and not with
    the rows.

    The result is kept in a folder named by a digest of the schema and of the *content* of everything given
    (all bytes of a file, all values of a frame), so the same content is prepared once, wherever it lies, and
    a changed file is prepared anew. It appears whole or not at all.

    Parameters
    ----------
    schema
        What the columns are. A column with side "item" or "user" may stand in the log or in `items` /
        `users`.
    train, valid, test
        A path to CSV, TSV (plain, .gz, .zst) or Parquet, a folder of such files, a glob, a polars frame (also
        lazy), a pandas frame, or a list of these. Valid and test may be left out.
    before
        What users liked before the splits begin, in any of the forms of `train`: rows of user, item and time (and of
        what else a derived `Sequence` lists, unless `items` tells it), positives all. They stand in the histories, in
        `Dataset.history` and in `Dataset.seen` as part of the train split; they are no rows of it, and nothing is
        fitted on them: an item that only they have is unknown.
    items, users
        Side information, one row per raw id, in a column named as the schema's item or user column; other
        columns are kept: "title" and "genres" (a list, or text with "|" between) are known to the reports.
    sampled
        A boolean column that marks negatives which were drawn and not shown; `Dataset.seen` leaves them out.
    cache
        The folder that holds prepared data; see `cache_folder`.
    name
        What reports call the data.
    about
        A sentence about the data for reports; kept as ``meta["about"]``.

    Raises
    ------
    InputError
        A file or column that is missing, an unreadable or truncated file, a label outside {0, 1}, an empty
        split, a column whose type differs between files, no space left. Nothing half-written stays behind.

    Examples
    --------
    >>> import polars as pl, tempfile
    >>> from recfast.data import Categorical, Schema
    >>> log = pl.DataFrame({"user": ["a", "a", "b"], "item": [7, 9, 7], "label": [1, 0, 1]})
    >>> schema = Schema([Categorical("user", role="user"), Categorical("item", role="item")])
    >>> ds = prepare(schema, log, cache=tempfile.mkdtemp())
    >>> ds.train.ids.tolist(), ds.vocabulary["item"].decode([2, 1, 0])
    ([[1, 1], [1, 2], [2, 1]], [9, 7, None])
    """
    if not isinstance(schema, Schema):
        raise InputError(f"prepare: schema is a {type(schema).__name__}, expected a data.Schema")
    if schema.fitted is not None:
        schema = Schema(schema.columns, label=schema.label, time=schema.time, group=schema.group)
    root = cache_folder(cache)
    spill = root / f".spill.{secrets.token_hex(4)}"

    def spilled() -> Path:
        spill.mkdir(parents=True, exist_ok=True)
        return spill / f"{secrets.token_hex(4)}.parquet"

    with disk_errors("prepare", root, _ADVICE):
        try:
            text = [c.name for c in (*schema.sequences, *schema.vectors)]
            splits = {
                split: open_sources(raw, split, text=text, spill=spilled)
                for split, raw in zip(SPLITS, (train, valid, test), strict=True)
                if raw is not None
            }
            if "train" not in splits:
                raise InputError("prepare: train is None; it is the split that everything is fitted on")
            sides = {
                role: _SideTable(read_all(raw, what, text=text, spill=spilled), role, what, schema)
                for role, what, raw in (("item", "items", items), ("user", "users", users))
                if raw is not None
            }
            earlier = [] if before is None else open_sources(before, _BEFORE, text=text, spill=spilled)
            key = _key(schema, splits | ({_BEFORE: earlier} if earlier else {}), sides, sampled, [name, about])
            target = root / f"{file_name(name)}-{key}"
            if target.exists():
                # A folder that someone damaged is prepared again.
                with contextlib.suppress(InputError):
                    return Dataset(target)
            while True:
                try:
                    with atomic_path(target, directory=True) as folder:
                        _Preparation(schema, splits, earlier, sides, sampled, name, about, folder).run()
                    return Dataset(target)
                except Widened:
                    continue
        finally:
            shutil.rmtree(spill, ignore_errors=True)


def prepare_libfm(
    train: Any,
    valid: Any = None,
    test: Any = None,
    field_names: Iterable[str] = (),
    *,
    schema: Schema | None = None,
    items: Any = None,
    users: Any = None,
    cache: str | os.PathLike[str] | None = None,
    name: str = "data",
    about: str = "",
) -> Dataset:
    """Prepare libfm lines ``label i:1 j:1 ...`` with one active index per field (plain, .gz or .zst).

    Parameters
    ----------
    train, valid, test
        A path, a folder's files by a glob, or a list of these. A label of -1 is read as 0.
    field_names
        The names of the fields in the order of a line; the index is the raw value of its field.
    schema
        What the fields are; left out, all are categorical, "user" and "item" have those roles, and the label
        is "label".
    items, users, cache, name, about
        As in `prepare`.

    Raises
    ------
    InputError
        As `prepare`; also a line with another number of features, or a feature that is not ``index:1``.
    """
    fields = list(field_names)
    if not fields or len(set(fields)) != len(fields):
        raise InputError(f"prepare_libfm: field_names = {fields!r} is not a list of distinct names")
    if schema is None:
        schema = Schema([Categorical(f, role=f if f in ("user", "item") else None) for f in fields])
    label = schema.label or "label"

    def sources(raw: Any) -> list[Source] | None:
        return None if raw is None else [LibfmSource(path, fields, label) for path in paths_of(raw)]

    return prepare(
        schema,
        sources(train),
        sources(valid),
        sources(test),
        items=items,
        users=users,
        cache=cache,
        name=name,
        about=about,
    )


def _key(
    schema: Schema,
    splits: dict[str, list[Source]],
    sides: dict[str, _SideTable],
    sampled: str | None,
    names: list[str],
) -> str:
    hasher = hashlib.blake2b(digest_size=10)
    # The types that a reader inferred are not part of it: they follow from the content.
    hasher.update(json.dumps([FORMAT, schema.to_dict(), sampled, names], sort_keys=True).encode())
    for split, sources in splits.items():
        hasher.update(f"{split}:{len(sources)}".encode())
        for source in sources:
            source.digest(hasher)
    for role, side in sides.items():
        hasher.update(role.encode())
        FrameSource(side.frame, role).digest(hasher)
    return hasher.hexdigest()


class _SideTable:
    """The items or users table, looked up by raw id."""

    def __init__(self, frame: pl.DataFrame, role: str, what: str, schema: Schema) -> None:
        self.key = getattr(schema, role)
        self.what = what
        if self.key is None:
            raise InputError(f"prepare: {what} are given, but no column of the schema has the role {role!r}")
        if self.key not in frame.columns:
            raise InputError(f"prepare: {what} has no column {self.key!r}; " + nearest(self.key, frame.columns))
        keys = frame[self.key]
        if keys.null_count():
            raise InputError(f"prepare: {what} has a row without {self.key!r}")
        if keys.n_unique() != frame.height:
            twice = keys.filter(keys.is_duplicated())[0]
            raise InputError(f"prepare: {what} has more than one row with {self.key} = {twice!r}")
        if "genres" in frame.columns and frame.schema["genres"] == pl.String:
            frame = frame.with_columns(pl.col("genres").str.split("|"))
        self.frame = frame
        self._rows = Vocabulary(_canonical(keys), name=self.key)

    def __contains__(self, column: str) -> bool:
        return column in self.frame.columns

    def lookup(self, keys: pl.Series, columns: Iterable[str]) -> pl.DataFrame:
        """Return the rows of raw ids, null where an id is not in the table."""
        row = pl.Series(self._rows.encode_series(keys) - 1)
        row = pl.select(pl.when(row >= 0).then(row)).to_series()
        return pl.DataFrame([self.frame[column].gather(row) for column in columns])


def _canonical_type(dtype: pl.DataType) -> pl.DataType:
    """Return the type that a categorical column's values have in its vocabulary."""
    kind = kind_of(dtype)
    if kind == "integer":
        return pl.UInt64() if dtype == pl.UInt64 else pl.Int64()
    if kind == "float":
        return pl.Float64()
    if kind == "text":
        return pl.String()
    return dtype


def _canonical(series: pl.Series, dtype: pl.DataType | None = None) -> pl.Series:
    series = series.cast(dtype or _canonical_type(series.dtype))
    return series.fill_nan(None) if series.dtype.is_float() else series


class _Counter:
    """Counts of a column's values; what it holds grows with the distinct values."""

    def __init__(self, dtype: pl.DataType) -> None:
        self.dtype = dtype
        self._merged = self._empty()
        self._parts: list[pl.DataFrame] = []
        self._pending = 0

    def _empty(self) -> pl.DataFrame:
        return pl.DataFrame(schema={"value": self.dtype, "count": pl.Int64})

    def add(self, series: pl.Series) -> None:
        part = (
            series.drop_nulls().alias("value").to_frame().group_by("value").agg(pl.len().cast(pl.Int64).alias("count"))
        )
        self._parts.append(part)
        self._pending += part.height
        if self._pending > max(1 << 19, self._merged.height):
            self._merge()

    def _merge(self) -> None:
        self._merged = pl.concat([self._merged, *self._parts]).group_by("value").agg(pl.col("count").sum())
        self._parts, self._pending = [], 0

    def vocabulary(self, min_count: int, name: str) -> Vocabulary:
        self._merge()
        frame = self._merged.filter(pl.col("count") >= min_count).sort(["count", "value"], descending=[True, False])
        return Vocabulary(frame["value"].rechunk(), frame["count"].to_numpy(), name)


class _Moments:
    """Mean and variance of a stream, merged batch by batch (Chan, Golub and LeVeque 1983), in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self._m2 = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        values = values[~np.isnan(values)]
        if not values.size:
            return
        mean = float(values.mean())
        m2 = float(np.square(values - mean).sum())
        total = self.count + values.size
        delta = mean - self.mean
        self._m2 += m2 + delta * delta * self.count * values.size / total
        self.mean += delta * values.size / total
        self.count = total

    @property
    def std(self) -> float:
        """The population standard deviation; 1 for a constant column, so that it can be divided by."""
        std = float(np.sqrt(self._m2 / self.count)) if self.count else 0.0
        return std if std > 1e-12 * max(1.0, abs(self.mean)) else 1.0


class NpyWriter:
    """A .npy file of unknown length, written row by row in order.

    Plain writes, no memory map: on a full disk a write fails with an error, where a map would kill the
    process.
    """

    _HEADER = 128

    def __init__(self, path: Path, dtype: Any, width: int | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self.width = width
        self.rows = 0
        self._handle = open(path, "wb")  # noqa: SIM115
        self._handle.write(b"\0" * self._HEADER)

    def write(self, array: np.ndarray) -> None:
        """Append rows."""
        array = np.ascontiguousarray(array, dtype=self.dtype)
        self._handle.write(array.data if array.size else b"")
        self.rows += len(array)

    def close(self) -> None:
        """Write the header, now that the length is known, and bring the file to the disk."""
        shape = (self.rows,) if self.width is None else (self.rows, self.width)
        text = repr({"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape})
        body = text.encode("latin1").ljust(self._HEADER - 11) + b"\n"
        self._handle.seek(0)
        self._handle.write(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body)
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._handle.close()


class NpyReader:
    """Rows of a .npy file by plain reads, which do not count as memory of the process as a map's pages do."""

    def __init__(self, path: Path) -> None:
        array = np.load(path, mmap_mode="r") if path.stat().st_size > NpyWriter._HEADER else np.load(path)
        self.shape, self.dtype = array.shape, array.dtype
        self._path = path
        self._row = array.dtype.itemsize * int(np.prod(array.shape[1:]))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start to stop."""
        stop = min(stop, self.shape[0])
        count = (stop - start) * int(np.prod(self.shape[1:]))
        flat = np.fromfile(self._path, self.dtype, count=count, offset=NpyWriter._HEADER + start * self._row)
        return flat.reshape(stop - start, *self.shape[1:])


def _write_array(path: Path, array: np.ndarray) -> None:
    with NpyWriter(path, array.dtype, array.shape[1] if array.ndim == 2 else None) as writer:
        writer.write(array)


class _Preparation:
    """One run from sources to a folder; its steps in the order of `run`."""

    def __init__(
        self,
        schema: Schema,
        splits: dict[str, list[Source]],
        before: list[Source],
        sides: dict[str, _SideTable],
        sampled: str | None,
        name: str,
        about: str,
        folder: Path,
    ) -> None:
        self.schema, self.splits, self.before, self.sides = schema, splits, before, sides
        self.sampled, self.name, self.about, self.folder = sampled, name, about, folder
        self.vocabulary: dict[str, Vocabulary] = {}
        self.moments: dict[str, _Moments] = {}
        self.rows: dict[str, int] = {}
        self.label_rate: dict[str, float | None] = {}
        self.sampled_rows: dict[str, int] = {}
        self.unknown: dict[str, dict[str, int]] = {}
        self.missing: dict[str, dict[str, int]] = {}

    def run(self) -> None:
        self._plan()
        self._check_types()
        self._fit()
        for split in self.splits:
            self._transform(split)
        if self.before:
            self._transform_before()
        schema = self.schema.fit({name: vocabulary.size + 1 for name, vocabulary in self.vocabulary.items()})
        time_span = self._time_span()
        if schema.user and schema.item:
            self._log()
        if self.before:
            shutil.rmtree(self.folder / _BEFORE)
        for role in ("user", "item"):
            if getattr(schema, role):
                self._side(role)
        (self.folder / "vocabulary").mkdir()
        for name, vocabulary in self.vocabulary.items():
            vocabulary.save(self.folder / "vocabulary" / f"{file_name(name)}.parquet")
        schema.save(self.folder / "schema.json")
        meta = {
            "format": FORMAT,
            "name": self.name,
            "about": self.about,
            "rows": {split: self.rows[split] for split in self.splits},
            "derived": self.derived,
            "vectors_by_id": self.vectors_by_id,
            "label_rate": self.label_rate,
            "sampled": self.sampled_rows,
            "unknown": self.unknown,
            "missing": self.missing,
            "time": time_span,
            "numeric": {name: {"mean": m.mean, "std": m.std} for name, m in self.moments.items()},
        }
        # Last, so that a folder with it is whole.
        write_json(self.folder / "meta.json", meta)

    def _plan(self) -> None:
        """Decide for every column where it comes from, and check that it is there in every file."""
        schema, first = self.schema, self.splits["train"][0]
        self.from_side: dict[str, str] = {}
        self.derived: list[str] = []
        self.vectors_by_id: list[str] = []
        needed: list[str] = []
        for column in schema.columns:
            role = getattr(column, "side", "context")
            if column.name in first.dtypes:
                needed.append(column.name)
            elif column.kind == "sequence":
                for what in ("user", "item", "time"):
                    if getattr(schema, what) is None:
                        raise InputError(
                            f"prepare: Sequence {column.name!r} is not a column of {first.place} and cannot be "
                            f"derived from the log, because the schema has no {what} column"
                        )
                self.derived.append(column.name)
            elif role in self.sides and column.name in self.sides[role] and column.name != self.sides[role].key:
                if column.kind == "vector":
                    self.vectors_by_id.append(column.name)
                else:
                    self.from_side[column.name] = role
            else:
                known = [*first.dtypes, *(c for side in self.sides.values() for c in side.frame.columns)]
                where = " and ".join([first.place, *(side.what for side in self.sides.values())])
                raise InputError(f"prepare: {where} has no column {column.name!r}; " + nearest(column.name, known))
        for name in (schema.label, schema.time, schema.group, self.sampled):
            if name is not None and name not in needed:
                needed.append(name)
        self.raw_sequences = [c for c in schema.sequences if c.name not in self.derived]
        self.log_columns = needed
        for sources in self.splits.values():
            for source in sources:
                source.require(needed)
        if self.before:
            self._plan_before()

    def _plan_before(self) -> None:
        """Name the columns that the events before the log need: what `_log` lists, and when it was."""
        schema = self.schema
        for what in ("user", "item", "time"):
            if getattr(schema, what) is None:
                raise InputError(f"prepare: before is given, but the schema has no {what} column")
        listed = [schema.user, schema.item, *(c.of for c in schema.sequences if c.name in self.derived)]
        self.listed_before = list(dict.fromkeys(listed))
        for source in self.before:
            source.require([name for name in (*self.listed_before, schema.time) if name not in self.from_side])

    def _check_types(self) -> None:
        """Fix each column's type by the train split, and refuse a file where it is another."""
        self.types: dict[str, pl.DataType] = {}
        numeric = {column.name for column in self.schema.numeric} | {self.schema.label, self.sampled}
        for name in self.log_columns:
            known: tuple[pl.DataType, str] | None = None
            for sources in self.splits.values():
                for source in sources:
                    dtype = source.dtypes[name]
                    kind = kind_of(dtype)
                    if kind == "other":
                        raise InputError(
                            f"prepare: column {name!r} of {source.place} has the type {dtype}, which is not "
                            "a number, text, a time or a list"
                        )
                    if name in numeric and kind not in _NUMBERS:
                        raise InputError(
                            f"prepare: column {name!r} of {source.place} is {_spoken(dtype)}, expected numbers"
                        )
                    if name in numeric or kind == "null":
                        continue
                    if known is not None and kind_of(known[0]) != kind:
                        raise InputError(
                            f"prepare: column {name!r} changes its type: {_spoken(known[0])} in {known[1]}, "
                            f"{_spoken(dtype)} in {source.place}"
                        )
                    known = known or (dtype, source.place)
            self.types[name] = known[0] if known else pl.Null()
        for name, role in self.from_side.items():
            self.types[name] = self.sides[role].frame.schema[name]
            if name in numeric and kind_of(self.types[name]) not in _NUMBERS:
                raise InputError(
                    f"prepare: column {name!r} of {self.sides[role].what} is "
                    f"{_spoken(self.types[name])}, expected numbers"
                )
        for column in self.schema.categorical:
            if kind_of(self.types[column.name]) == "list":
                raise InputError(
                    f"prepare: column {column.name!r} holds lists; declare it as Sequence or Vector, not as Categorical"
                )
        if self.schema.time is not None and kind_of(self.types[self.schema.time]) not in (
            "integer",
            "float",
            "time",
        ):
            raise InputError(
                f"prepare: the time column {self.schema.time!r} is {_spoken(self.types[self.schema.time])}, "
                "expected numbers, dates or date-times"
            )

    def _batches(self, split: str, columns: list[str]) -> Iterator[tuple[Source, int, pl.DataFrame]]:
        """Yield source, its rows before the batch, and the batch, joined with the side tables' columns."""
        wanted = {role: [n for n in columns if self.from_side.get(n) == role] for role in self.sides}
        raw = [name for name in columns if name not in self.from_side]
        for role, names in wanted.items():
            key = self.sides[role].key
            if names and key not in raw:
                raw.append(key)
        for source in self.before if split == _BEFORE else self.splits[split]:
            before = 0
            for batch in source.batches(raw):
                for role, names in wanted.items():
                    if names:
                        batch = batch.hstack(self.sides[role].lookup(batch[self.sides[role].key], names))
                yield source, before, batch
                before += batch.height

    def _cast(self, series: pl.Series, dtype: pl.DataType, place: str) -> pl.Series:
        try:
            return _canonical(series, dtype)
        except pl.exceptions.PolarsError as error:
            raise InputError(
                f"prepare: column {series.name!r} of {place} holds values that are not {_spoken(dtype)} "
                f"({first_line(error)})"
            ) from None

    def _numbers(self, column: Numeric, series: pl.Series, place: str, before: int) -> np.ndarray:
        """Return the values before standardising, float64 [n], NaN where missing."""
        values = series.cast(pl.Float64).fill_null(float("nan")).to_numpy()
        infinite = np.flatnonzero(np.isinf(values))
        if infinite.size:
            i = int(infinite[0])
            raise InputError(f"prepare: {place}, row {before + i + 1}: {column.name!r} = {values[i]} is not finite")
        if column.transform == "log":
            return np.sign(values) * np.log1p(np.abs(values))
        return values

    def _lists(self, series: pl.Series, inner: pl.DataType, last: int, place: str) -> tuple[np.ndarray, pl.Series]:
        """Return the lengths of a column of lists, int64 [n], and their values end to end."""
        if kind_of(series.dtype) == "text":
            series = series.cast(pl.String)
            empty = series.is_null() | (series == "")
            series = series.str.split("|").zip_with(
                ~empty, pl.Series([None], dtype=pl.List(pl.String)).new_from_index(0, len(series))
            )
        elif series.dtype == pl.Array:
            series = series.arr.to_list()
        elif series.dtype == pl.Null:
            return np.zeros(len(series), dtype=np.int64), pl.Series(series.name, [], dtype=inner)
        elif series.dtype != pl.List:
            raise InputError(
                f"prepare: column {series.name!r} of {place} is {_spoken(series.dtype)}, "
                "expected lists, or text with '|'"
            )
        series = series.list.tail(last)
        lengths = series.list.len().fill_null(0).cast(pl.Int64)
        flat = series.filter(lengths > 0).explode()
        if flat.dtype == pl.String and inner.is_numeric():
            flat = flat.str.strip_chars()
        return lengths.to_numpy(), self._cast(flat, inner, place)

    def _fit(self) -> None:
        schema = self.schema
        counters = {c.name: _Counter(_canonical_type(self.types[c.name])) for c in schema.categorical}
        self.moments = {c.name: _Moments() for c in schema.numeric}
        columns = [*counters, *self.moments, *(c.name for c in self.raw_sequences)]
        for source, before, batch in self._batches("train", columns):
            for name, counter in counters.items():
                counter.add(self._cast(batch[name], counter.dtype, source.place))
            for column in schema.numeric:
                self.moments[column.name].add(self._numbers(column, batch[column.name], source.place, before))
            for column in self.raw_sequences:
                # An item that occurs in histories only has an embedding too.
                counter = counters[column.of]
                counter.add(self._lists(batch[column.name], counter.dtype, column.max_length, source.place)[1])
        self.vocabulary = {c.name: counters[c.name].vocabulary(c.min_count, c.name) for c in schema.categorical}

    def _transform(self, split: str) -> None:
        schema = self.schema
        folder = self.folder / split
        folder.mkdir()
        vectors = [c for c in schema.vectors if c.name not in self.vectors_by_id]
        columns = list(dict.fromkeys([*self.log_columns, *self.from_side]))
        unknown = dict.fromkeys((c.name for c in schema.categorical), 0)
        missing = dict.fromkeys((c.name for c in schema.numeric), 0)
        positives, drawn, rows = 0, 0, 0
        with contextlib.ExitStack() as stack:

            def writer(stem: str, dtype: Any, width: int | None = None) -> NpyWriter:
                return stack.enter_context(NpyWriter(folder / f"{stem}.npy", dtype, width))

            ids_out = writer("ids", np.int32, len(schema.categorical))
            numeric_out = writer("numeric", np.float32, len(schema.numeric)) if schema.numeric else None
            label_out = writer("label", np.float32) if schema.label is not None else None
            group_out = writer("group", np.int64) if schema.group is not None else None
            time_out = None
            if schema.time is not None:
                is_float = kind_of(self.types[schema.time]) == "float"
                time_out = writer("time", np.float64 if is_float else np.int64)
            sampled_out = writer("sampled", np.bool_) if self.sampled is not None else None
            lists_out = {
                c.name: (
                    writer(f"{file_name(c.name)}.values", np.int32),
                    writer(f"{file_name(c.name)}.offsets", np.int64),
                )
                for c in self.raw_sequences
            }
            list_ends = dict.fromkeys(lists_out, 0)
            for _, offsets_out in lists_out.values():
                offsets_out.write(np.zeros(1, dtype=np.int64))
            vectors_out = {c.name: writer(file_name(c.name), np.float32, c.dim) for c in vectors}

            for source, before, batch in self._batches(split, columns):
                rows += batch.height
                ids = np.empty((batch.height, len(schema.categorical)), dtype=np.int32)
                for j, column in enumerate(schema.categorical):
                    ids[:, j] = self.vocabulary[column.name].encode_series(batch[column.name])
                    unknown[column.name] += int((ids[:, j] == 0).sum())
                ids_out.write(ids)
                if numeric_out is not None:
                    numeric = np.empty((batch.height, len(schema.numeric)), dtype=np.float32)
                    for j, column in enumerate(schema.numeric):
                        values = self._numbers(column, batch[column.name], source.place, before)
                        missing[column.name] += int(np.isnan(values).sum())
                        numeric[:, j] = self._standardised(column, values)
                    numeric_out.write(numeric)
                if label_out is not None:
                    label = self._label(batch[schema.label], source.place, before)
                    positives += int(label.sum())
                    label_out.write(label)
                if group_out is not None:
                    group_out.write(_group(batch[schema.group]))
                if time_out is not None:
                    time_out.write(self._time(batch[schema.time], source.place, before))
                if sampled_out is not None:
                    flags = batch[self.sampled].cast(pl.Boolean).fill_null(False).to_numpy()
                    drawn += int(flags.sum())
                    sampled_out.write(flags)
                for column in self.raw_sequences:
                    vocabulary = self.vocabulary[column.of]
                    lengths, flat = self._lists(
                        batch[column.name], vocabulary.values.dtype, column.max_length, source.place
                    )
                    values_out, offsets_out = lists_out[column.name]
                    values_out.write(vocabulary.encode_series(flat))
                    offsets_out.write(list_ends[column.name] + np.cumsum(lengths))
                    list_ends[column.name] += int(lengths.sum())
                for column in vectors:
                    place = f"{source.place}, from row {before + 1} on"
                    vectors_out[column.name].write(self._vectors(batch[column.name], column.dim, place, required=True))
        if rows == 0:
            place = ", ".join(source.place for source in self.splits[split][:3])
            raise InputError(f"prepare: the {split} split has no rows ({place})")
        self.rows[split] = rows
        self.label_rate[split] = positives / rows if schema.label is not None else None
        self.sampled_rows[split] = drawn
        self.unknown[split] = unknown
        self.missing[split] = missing

    def _transform_before(self) -> None:
        """Encode the events before the log as a split that has nothing but ids and time."""
        schema, rows = self.schema, 0
        folder = self.folder / _BEFORE
        folder.mkdir()
        for source in self.before:
            for name in (n for n in (*self.listed_before, schema.time) if n not in self.from_side):
                if kind_of(source.dtypes[name]) not in (kind_of(self.types[name]), "null"):
                    raise InputError(
                        f"prepare: column {name!r} changes its type: {_spoken(self.types[name])} in the train split, "
                        f"{_spoken(source.dtypes[name])} in {source.place}"
                    )
        is_float = kind_of(self.types[schema.time]) == "float"
        with (
            NpyWriter(folder / "ids.npy", np.int32, len(schema.categorical)) as ids_out,
            NpyWriter(folder / "time.npy", np.float64 if is_float else np.int64) as time_out,
        ):
            for source, start, batch in self._batches(_BEFORE, [*self.listed_before, schema.time]):
                ids = np.zeros((batch.height, len(schema.categorical)), dtype=np.int32)
                for name in self.listed_before:
                    ids[:, schema.position(name)] = self.vocabulary[name].encode_series(batch[name])
                ids_out.write(ids)
                time_out.write(self._time(batch[schema.time], source.place, start))
                rows += batch.height
        self.rows[_BEFORE] = rows

    def _standardised(self, column: Numeric, values: np.ndarray) -> np.ndarray:
        if column.transform is not None:
            moments = self.moments[column.name]
            values = (values - moments.mean) / moments.std
        return np.nan_to_num(values, nan=0.0)

    def _label(self, series: pl.Series, place: str, before: int) -> np.ndarray:
        values = series.cast(pl.Float64).fill_null(float("nan")).to_numpy()
        wrong = np.flatnonzero((values != 0.0) & (values != 1.0))
        if wrong.size:
            i = int(wrong[0])
            raise InputError(
                f"prepare: {place}, row {before + i + 1}: label {series.name!r} = {series[i]!r} is outside {{0, 1}}"
            )
        return values.astype(np.float32)

    def _time(self, series: pl.Series, place: str, before: int) -> np.ndarray:
        if series.dtype.is_float():
            series = series.fill_nan(None)
        if series.null_count():
            i = int(np.flatnonzero(series.is_null().to_numpy())[0])
            raise InputError(f"prepare: {place}, row {before + i + 1}: the time {series.name!r} is missing")
        if series.dtype in (pl.Date, pl.Datetime):
            series = series.cast(pl.Datetime("us"))
        if series.dtype.is_temporal():
            series = series.to_physical()
        return series.cast(pl.Float64 if series.dtype.is_float() else pl.Int64).to_numpy()

    def _vectors(self, series: pl.Series, dim: int, place: str, *, required: bool) -> np.ndarray:
        """Return float32 [n, dim]; a missing row is zeros unless it is required."""
        lengths, flat = self._lists(series, pl.Float32(), 1 << 31, place)
        table = np.zeros((len(series), dim), dtype=np.float32)
        wrong = np.flatnonzero((lengths != dim) & (required | (lengths != 0)))
        if wrong.size:
            raise InputError(
                f"prepare: {place}: vector {series.name!r} has {lengths[wrong[0]]} numbers in row "
                f"{wrong[0] + 1}, expected {dim}"
            )
        values = flat.fill_null(float("nan")).to_numpy()
        if not np.isfinite(values).all():
            raise InputError(f"prepare: {place}: vector {series.name!r} holds a number that is missing or not finite")
        table[lengths == dim] = values.reshape(-1, dim)
        return table

    def _time_span(self) -> dict[str, Any] | None:
        if self.schema.time is None:
            return None
        low, high = [], []
        for split in self.splits:
            reader = NpyReader(self.folder / split / "time.npy")
            for start in range(0, self.rows[split], _CHUNK_ROWS):
                chunk = reader.rows(start, start + _CHUNK_ROWS)
                low.append(chunk.min().item())
                high.append(chunk.max().item())
        return {"first": min(low), "last": max(high), "type": str(self.types[self.schema.time])}

    def _log(self) -> None:
        """Store each user's events once, in time order, and where each row's history ends in them.

        Users are taken in ranges of at most `_SORT_ROWS` rows, so the memory of the sort is bounded.
        """
        schema = self.schema
        user_at, item_at = schema.position(schema.user), schema.position(schema.item)
        listed = [schema.item, *(c.of for c in schema.sequences if c.name in self.derived)]
        listed = list(dict.fromkeys(listed))
        users = self.vocabulary[schema.user].size + 1
        per_user = np.zeros(users, dtype=np.int64)
        for split in (*self.splits, *([_BEFORE] if self.before else [])):
            for chunk in self._chunks(split, ("ids",)):
                per_user += np.bincount(chunk["ids"][:, user_at], minlength=users)
        # User 0 stands for everyone unknown, who have no common history.
        per_user[0] = 0
        (self.folder / "log").mkdir()
        (self.folder / "seen").mkdir()
        if self.derived:
            for split in self.splits:
                with NpyWriter(self.folder / split / "history_end.npy", np.int64) as writer:
                    for start in range(0, self.rows[split], _CHUNK_ROWS):
                        writer.write(np.zeros(min(_CHUNK_ROWS, self.rows[split] - start), dtype=np.int64))
        positive_counts = np.zeros(users, dtype=np.int64)
        seen_counts = np.zeros(users, dtype=np.int64)
        with contextlib.ExitStack() as stack:

            def writer(path: str, dtype: Any) -> NpyWriter:
                return stack.enter_context(NpyWriter(self.folder / path, dtype))

            listed_out = {name: writer(f"log/{file_name(name)}.npy", np.int32) for name in listed}
            split_out = writer("log/split.npy", np.uint8)
            seen_out = writer(f"seen/{file_name(schema.item)}.npy", np.int32)
            seen_split_out = writer("seen/split.npy", np.uint8)
            for low, high in _ranges(per_user, _SORT_ROWS):
                user, time, ids, split, positive = self._events(low, high, user_at, item_at, listed)
                # lexsort is stable: rows of one user and moment keep their order.
                order = np.lexsort((time, user))
                user, split, positive = user[order], split[order], positive[order]
                seen_out.write(ids[schema.item][order])
                seen_split_out.write(split)
                seen_counts[low:high] = np.bincount(user - low, minlength=high - low)
                kept = order[positive]
                for name in listed:
                    listed_out[name].write(ids[name][kept])
                split_out.write(split[positive])
                counts = np.bincount(user[positive] - low, minlength=high - low)
                if self.derived:
                    first = int(positive_counts[:low].sum())
                    self._history_ends(low, high, user_at, user[positive], time[kept], first)
                positive_counts[low:high] = counts
        for name, counts in (("log", positive_counts), ("seen", seen_counts)):
            _write_array(self.folder / name / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))

    def _chunks(self, split: str, stems: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the columns of a split in pieces; those that are not there are left out."""
        folder = self.folder / split
        readers = {stem: NpyReader(folder / f"{stem}.npy") for stem in stems if (folder / f"{stem}.npy").exists()}
        for start in range(0, self.rows[split], _CHUNK_ROWS):
            yield {stem: reader.rows(start, start + _CHUNK_ROWS) for stem, reader in readers.items()}

    def _events(
        self, low: int, high: int, user_at: int, item_at: int, listed: list[str]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Return the events, not the sampled negatives, of users low to high in the order of the rows."""
        positions = {name: self.schema.position(name) for name in listed}
        parts: dict[str, list[np.ndarray]] = {key: [] for key in ("user", "time", "split", "positive", *listed)}
        # What was before the log counts as train; it has no label, so all of it is positive.
        for code, split in ((0, _BEFORE), *enumerate(SPLITS)):
            if split not in self.rows:
                continue
            for chunk in self._chunks(split, ("ids", "time", "label", "sampled")):
                user = chunk["ids"][:, user_at]
                inside = (user >= low) & (user < high)
                if "sampled" in chunk:
                    inside &= ~chunk["sampled"]
                row = np.flatnonzero(inside)
                parts["user"].append(user[row])
                parts["time"].append(chunk["time"][row] if "time" in chunk else np.zeros(len(row), dtype=np.int64))
                parts["split"].append(np.full(len(row), code, dtype=np.uint8))
                parts["positive"].append(chunk["label"][row] > 0.5 if "label" in chunk else np.ones(len(row), bool))
                for name, position in positions.items():
                    parts[name].append(chunk["ids"][row, position])
        whole = {key: np.concatenate(arrays) for key, arrays in parts.items()}
        return whole["user"], whole["time"], {n: whole[n] for n in listed}, whole["split"], whole["positive"]

    def _history_ends(self, low: int, high: int, user_at: int, user: np.ndarray, time: np.ndarray, first: int) -> None:
        """For the rows of users low to high, write where the positives strictly earlier than the row end.

        `user` and `time` [P] are the positives of these users in order; the first of them has index `first`.
        User and rank of the time make one key, which is sorted as they are, so one binary search answers all
        rows.
        """
        moments = np.unique(time)
        span = len(moments) + 1
        keys = (user.astype(np.int64) - low) * span + np.searchsorted(moments, time)
        for split in self.splits:
            ends = np.load(self.folder / split / "history_end.npy", mmap_mode="r+")
            start = 0
            for chunk in self._chunks(split, ("ids", "time")):
                row_user = chunk["ids"][:, user_at]
                row = np.flatnonzero((row_user >= low) & (row_user < high))
                rank = np.searchsorted(moments, chunk["time"][row])
                wanted = (row_user[row].astype(np.int64) - low) * span + rank
                ends[start + row] = first + np.searchsorted(keys, wanted)
                start += len(row_user)
            ends.flush()
            del ends

    def _side(self, role: str) -> None:
        """Store the features that the id of a user or an item determines, and its frame in id order."""
        schema, key = self.schema, getattr(self.schema, role)
        folder = self.folder / "side"
        folder.mkdir(exist_ok=True)
        vocabulary = self.vocabulary[key]
        rows = vocabulary.size + 1
        key_at = schema.position(key)
        categorical = [c for c in schema.categorical if c.side == role]
        numeric = [c for c in schema.numeric if c.side == role]
        table = self.sides.get(role)
        known = (
            table.lookup(vocabulary.values, [c for c in table.frame.columns if c != key])
            if table is not None
            else pl.DataFrame()
        )

        ids = np.zeros((rows, len(categorical)), dtype=np.int32)
        numbers = np.zeros((rows, len(numeric)), dtype=np.float32)
        at = [schema.position(c.name) for c in categorical]
        number_at = [i for i, c in enumerate(schema.numeric) if c.side == role]
        for chunk in self._chunks("train", ("ids", "numeric")):
            # Of repeated ids the last assignment stands: the last row of the train split.
            ids[chunk["ids"][:, key_at]] = chunk["ids"][:, at]
            if number_at:
                numbers[chunk["ids"][:, key_at]] = chunk["numeric"][:, number_at]
        what = f"{role}s"
        for j, column in enumerate(categorical):
            if column.name in known.columns:
                found = known[column.name]
                values = self.vocabulary[column.name].encode_series(found)
                ids[1:, j] = np.where(found.is_not_null().to_numpy(), values, ids[1:, j])
        for j, column in enumerate(numeric):
            if column.name in known.columns:
                values = self._standardised(column, self._numbers(column, known[column.name], what, 0))
                numbers[1:, j] = np.where(known[column.name].is_not_null().to_numpy(), values, numbers[1:, j])
        ids[0], numbers[0] = 0, 0
        ids[:, [c.name for c in categorical].index(key)] = np.arange(rows)
        _write_array(folder / f"{role}_ids.npy", ids)
        _write_array(folder / f"{role}_numeric.npy", numbers)
        for column in schema.vectors:
            if column.side != role:
                continue
            vectors = np.zeros((rows, column.dim), dtype=np.float32)
            if column.name in known.columns:
                vectors[1:] = self._vectors(known[column.name], column.dim, what, required=False)
            else:
                stem = file_name(column.name)
                for chunk in self._chunks("train", ("ids", stem)):
                    vectors[chunk["ids"][:, key_at]] = chunk[stem]
                vectors[0] = 0
            _write_array(folder / f"{role}.{file_name(column.name)}.npy", vectors)

        frame = pl.DataFrame([vocabulary.values.alias(key)])
        if known.width:
            frame = frame.hstack(known)
        for j, column in enumerate(categorical):
            if column.name not in frame.columns:
                frame = frame.with_columns(self.vocabulary[column.name].decode_series(ids[1:, j]).alias(column.name))
        frame.write_parquet(self.folder / f"{role}s.parquet")


def _ranges(counts: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of users from 1 on whose rows together stay within the limit, or that hold one user."""
    ends = np.cumsum(counts)
    low = 1
    while low < len(counts):
        before = ends[low - 1]
        high = max(low + 1, int(np.searchsorted(ends, before + limit, side="right")))
        yield low, high
        low = high


def _group(series: pl.Series) -> np.ndarray:
    """Return int64 [n] that are equal where the raw values are: whole numbers as they are, others hashed."""
    if series.dtype.is_integer() and series.dtype != pl.UInt64:
        return series.cast(pl.Int64).fill_null(-1).to_numpy()
    if kind_of(series.dtype) == "text":
        series = series.cast(pl.String)
    return series.hash(seed=0).to_numpy().view(np.int64)


def _spoken(dtype: pl.DataType) -> str:
    kind = kind_of(dtype)
    return {
        "integer": "whole numbers",
        "float": "decimal numbers",
        "boolean": "true/false",
        "text": "text",
        "time": "dates or times",
        "list": "lists",
        "null": "empty",
    }.get(kind, str(dtype))
