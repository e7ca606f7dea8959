"""Raw logs read in bounded batches: CSV, Parquet, libfm, polars and pandas frames behind one face."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import importlib.util
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import zstandard

from recfast.data.schema import nearest
from recfast.errors import InputError

BATCH_ROWS = 1 << 18
_CHUNK_BYTES = 32 << 20
_CSV = {".csv": ",", ".tsv": "\t"}
_PARQUET = (".parquet", ".pq")
_LIBFM = (".libfm", ".svm", ".libsvm")
_COMPRESSED = (".zst", ".gz")

# polars reports a broken file through several classes; a Rust panic is a BaseException.
_READ_ERRORS: tuple[type[BaseException], ...] = (
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    OSError,
    EOFError,
    UnicodeDecodeError,
    zlib.error,
    zstandard.ZstdError,
)


class Widened(Exception):
    """A CSV column needs a wider type than its first rows showed: the reading starts again with that type."""


def kind_of(dtype: pl.DataType) -> str:
    """Return what a raw type counts as when two files are compared."""
    if dtype == pl.Null:
        return "null"
    if dtype.is_integer():
        return "integer"
    if dtype.is_float() or dtype.is_decimal():
        return "float"
    if dtype == pl.Boolean:
        return "boolean"
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return "text"
    if dtype in (pl.Date, pl.Datetime, pl.Time, pl.Duration):
        return "time"
    if dtype in (pl.List, pl.Array):
        return "list"
    return "other"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, which is what a sentence has room for."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


class Source:
    """A raw table that can be read more than once, in batches of bounded size.

    `place` names it in error sentences, `dtypes` maps its columns to their types.
    """

    place: str
    dtypes: dict[str, pl.DataType]

    def batches(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Yield the rows in order as frames of the given columns."""
        raise NotImplementedError

    def digest(self, hasher: hashlib.blake2b) -> None:
        """Feed the content, and nothing else, to the hasher."""
        raise NotImplementedError

    def require(self, columns: Iterable[str]) -> None:
        """Raise unless every column is there."""
        for column in columns:
            if column not in self.dtypes:
                raise InputError(f"prepare: {self.place} has no column {column!r}; " + nearest(column, self.dtypes))


class FrameSource(Source):
    """A polars frame in memory."""

    def __init__(self, frame: pl.DataFrame, place: str) -> None:
        self.frame = frame
        self.place = place
        self.dtypes = dict(frame.schema)

    def batches(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        frame = self.frame.select(columns)
        for start in range(0, frame.height, BATCH_ROWS):
            yield frame.slice(start, BATCH_ROWS)

    def digest(self, hasher: hashlib.blake2b) -> None:
        hasher.update(b"frame")
        for name, dtype in self.dtypes.items():
            hasher.update(f"{name}:{dtype}:{self.frame.height}".encode())
            for start in range(0, self.frame.height, BATCH_ROWS):
                _digest_series(self.frame[name].slice(start, BATCH_ROWS), hasher)


def _digest_series(series: pl.Series, hasher: hashlib.blake2b) -> None:
    # polars' row hash is the same between runs of one polars version; another version costs at most one more
    # preparation. Nested values are hashed by their lengths and their items.
    while series.dtype in (pl.List, pl.Array):
        if series.dtype == pl.Array:
            series = series.arr.to_list()
        hasher.update(series.list.len().fill_null(2**32 - 1).to_numpy().tobytes())
        series = series.explode()
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if kind_of(series.dtype) == "other":
        hasher.update(repr(series.to_list()).encode())
    else:
        hasher.update(series.hash(seed=0).to_numpy().tobytes())


class FileSource(Source):
    """A file; its digest is that of all its bytes, so that no kept date or size can deceive it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = str(path)

    def digest(self, hasher: hashlib.blake2b) -> None:
        hasher.update(b"file")
        try:
            with open(self.path, "rb") as handle:
                while chunk := handle.read(8 << 20):
                    hasher.update(chunk)
        except OSError as error:
            raise InputError(f"prepare: {self.place} cannot be read ({first_line(error)})") from None

    def _unreadable(self, what: str, error: BaseException) -> InputError:
        return InputError(f"prepare: {self.place} is not a whole, readable {what} ({first_line(error)})")


class ParquetSource(FileSource):
    """A Parquet file, read by row ranges."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
            self.dtypes = dict(self._frame.collect_schema())
            self.rows = int(self._frame.select(pl.len()).collect().item())
        except _READ_ERRORS as error:
            raise self._unreadable("Parquet file", error) from None

    def batches(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        frame = self._frame.select(columns)
        for start in range(0, self.rows, BATCH_ROWS):
            try:
                batch = frame.slice(start, BATCH_ROWS).collect()
            except _READ_ERRORS as error:
                raise self._unreadable("Parquet file", error) from None
            yield batch


class CsvSource(FileSource):
    """A CSV or TSV file with a header, plain or compressed, read in pieces that end at a line's end.

    Types are inferred from the first piece; where a later piece does not fit, the column's type is widened
    (whole numbers to floats, anything else to text) and `Widened` asks the caller to start again.
    """

    def __init__(self, path: Path, separator: str, text: Iterable[str] = ()) -> None:
        super().__init__(path)
        self._separator = separator
        self._text = set(text)
        head = next(self._pieces(), b"")
        if not head.strip():
            raise InputError(f"prepare: {self.place} is empty; a header line and rows are expected")
        end = head.find(b"\n") + 1
        while end and head.count(b'"', 0, end) % 2:
            end = head.find(b"\n", end) + 1
        self._header = head[:end] or head + b"\n"
        self.dtypes = self._infer(head)

    def _infer(self, piece: bytes) -> dict[str, pl.DataType]:
        try:
            frame = pl.read_csv(
                io.BytesIO(piece),
                separator=self._separator,
                infer_schema_length=None,
                try_parse_dates=True,
            )
        except _READ_ERRORS as error:
            raise self._unreadable("CSV file", error) from None
        dtypes = dict(frame.schema)
        for name, dtype in dtypes.items():
            if name in self._text:
                dtypes[name] = pl.String()
            elif frame[name].null_count() == frame.height and dtype == pl.String:
                dtypes[name] = pl.Null()
        return dtypes

    def _pieces(self) -> Iterator[bytes]:
        try:
            yield from whole_lines(byte_chunks(self.path))
        except _READ_ERRORS as error:
            raise self._unreadable("CSV file", error) from None

    def batches(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        for i, piece in enumerate(self._pieces()):
            if i > 0:
                piece = self._header + piece
            # A column without any value so far may hold anything later on, so polars is left to say what.
            known = {name: dtype for name, dtype in self.dtypes.items() if dtype != pl.Null}
            try:
                frame = pl.read_csv(
                    io.BytesIO(piece),
                    separator=self._separator,
                    columns=list(columns),
                    schema_overrides=known,
                    infer_schema_length=None if len(known) < len(self.dtypes) else 0,
                    try_parse_dates=True,
                )
            except _READ_ERRORS as error:
                self._widen(piece, error)
                raise Widened from None
            for name in columns:
                if self.dtypes[name] == pl.Null and frame[name].null_count() < frame.height:
                    self.dtypes[name] = frame.schema[name]
                    raise Widened
            # The order of the header, not of the request, is what read_csv returns.
            frame = frame.select(columns)
            for start in range(0, frame.height, BATCH_ROWS):
                yield frame.slice(start, BATCH_ROWS)

    def _widen(self, piece: bytes, error: BaseException) -> None:
        found = self._infer(piece)
        changed = False
        for name, dtype in found.items():
            old = self.dtypes.get(name)
            if old is None or old == dtype or dtype == pl.Null or old == pl.String:
                continue
            kinds = {kind_of(old), kind_of(dtype)}
            if kinds <= {"integer", "float"}:
                wider = pl.Float64() if "float" in kinds else pl.Int64()
            else:
                wider = pl.String()
            if wider != old:
                self.dtypes[name] = wider
                changed = True
        if not changed:
            raise self._unreadable("CSV file", error) from None


class LibfmSource(FileSource):
    """Lines ``label i:1 j:1 ...`` with one active index per field, in the order of `field_names`.

    The index is the raw value of its field; label -1 is read as 0.
    """

    def __init__(self, path: Path, field_names: Sequence[str], label: str = "label") -> None:
        super().__init__(path)
        self._names = [label, *field_names]
        self.dtypes = dict.fromkeys(self._names, pl.Int64())

    def batches(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        line = 0
        schema = dict.fromkeys(self._names, pl.String)
        try:
            for piece in whole_lines(byte_chunks(self.path)):
                piece = piece.replace(b"\r\n", b"\n").replace(b" \n", b"\n")
                wrong = np.flatnonzero(_fields_per_line(piece) != len(self._names))
                if wrong.size:
                    i = int(wrong[0])
                    raise InputError(
                        f"prepare_libfm: {self.place}, line {line + i + 1} has "
                        f"{_fields_per_line(piece)[i] - 1} features, expected {len(self._names) - 1}"
                    )
                frame = pl.read_csv(io.BytesIO(piece), separator=" ", has_header=False, schema=schema, quote_char=None)
                for start in range(0, frame.height, BATCH_ROWS):
                    yield self._parse(frame.slice(start, BATCH_ROWS), line + start).select(columns)
                line += frame.height
        except _READ_ERRORS as error:
            raise self._unreadable("libfm file", error) from None

    def _parse(self, frame: pl.DataFrame, line: int) -> pl.DataFrame:
        label, *fields = self._names
        text = frame[label]
        values = text.cast(pl.Float64, strict=False)
        bad = (values.is_null() | ~values.is_in([-1.0, 0.0, 1.0])).to_numpy().nonzero()[0]
        if bad.size:
            i = int(bad[0])
            raise InputError(f"prepare_libfm: {self.place}, line {line + i + 1}: label {text[i]!r} is not -1, 0 or 1")
        out = {label: (values > 0).cast(pl.Int64)}
        for name in fields:
            index = frame[name].str.extract(r"^(\d+):1(?:\.0*)?$", 1).cast(pl.Int64, strict=False)
            if index.null_count():
                i = int(index.is_null().to_numpy().nonzero()[0][0])
                raise InputError(
                    f"prepare_libfm: {self.place}, line {line + i + 1}: field {name!r} holds "
                    f"{frame[name][i]!r}, expected index:1"
                )
            out[name] = index
        return pl.DataFrame(out)


def _fields_per_line(piece: bytes) -> np.ndarray:
    """Return the number of space-separated fields of each line that is not empty, int64 [lines]."""
    raw = np.frombuffer(piece.strip(b"\n") + b"\n", dtype=np.uint8)
    ends = np.flatnonzero(raw == ord("\n"))
    spaces = np.concatenate([[0], np.cumsum(raw == ord(" "))])
    starts = np.concatenate([[0], ends[:-1] + 1])
    return spaces[ends] - spaces[starts] + 1


def byte_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a plain, .gz or .zst file in pieces; EOFError where compressed data are cut."""
    with open(path, "rb") as raw:
        if path.suffix == ".zst":
            frame = None
            while piece := raw.read(1 << 20):
                while piece:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(piece)
                    piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            if frame is not None:
                raise EOFError("the compressed data end too early")
            return
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(gzip.open(raw, "rb")) if path.suffix == ".gz" else raw
            while piece := handle.read(_CHUNK_BYTES):
                yield piece


def whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield pieces of 32 MiB or more (but the last) that end at a line's end outside double quotes."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        if len(rest) < _CHUNK_BYTES:
            continue
        cut = rest.rfind(b"\n") + 1
        # An odd number of quotes before the cut means that it lies inside a quoted field.
        while cut and rest.count(b'"', 0, cut) % 2:
            cut = rest.rfind(b"\n", 0, cut - 1) + 1
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def paths_of(where: Any) -> list[Path]:
    """Expand a path, a folder, a glob or a list of these to files, in sorted order within each.

    Raises
    ------
    InputError
        A file that does not exist, a pattern or folder that holds none.
    """
    if isinstance(where, list | tuple):
        return [path for part in where for path in paths_of(part)]
    path = Path(where)
    if path.is_dir():
        found = table_files(path)
        if not found:
            raise InputError(f"prepare: the folder {path} holds no CSV or Parquet file")
        return found
    if path.exists():
        return [path]
    if glob.has_magic(str(where)):
        found = sorted(Path(p) for p in glob.glob(str(where), recursive=True))
        if not found:
            raise InputError(f"prepare: no file matches {str(where)!r}")
        return found
    raise InputError(f"prepare: the file {path} does not exist")


def table_files(folder: Path) -> list[Path]:
    """Return the CSV, TSV and Parquet files of a folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.is_file() and _format(p) is not None)


def _format(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        suffix = Path(path.stem).suffix.lower()
    if suffix in _CSV:
        return suffix
    if suffix in _PARQUET:
        return "parquet"
    return None


def open_sources(raw: Any, split: str, *, text: Iterable[str], spill: Callable[[], Path]) -> list[Source]:
    """Return the sources of one split.

    Parameters
    ----------
    raw
        A path, a folder, a glob, a polars or pandas frame, a lazy frame, or a list of these.
    split
        How to name a frame in error sentences.
    text
        Columns that a CSV reader must not take for numbers.
    spill
        Gives a temporary path, into which a lazy frame is written (streaming) so that it can be read by
        ranges.
    """
    if isinstance(raw, list | tuple):
        if not raw:
            raise InputError(f"prepare: {split} is an empty list")
        return [source for part in raw for source in open_sources(part, split, text=text, spill=spill)]
    if isinstance(raw, Source):
        return [raw]
    if isinstance(raw, pl.DataFrame):
        return [FrameSource(raw, f"the {split} frame")]
    if isinstance(raw, pl.LazyFrame):
        path = spill()
        try:
            raw.sink_parquet(path)
        except pl.exceptions.PolarsError as error:
            raise InputError(f"prepare: the lazy {split} frame cannot be collected ({first_line(error)})") from None
        source = ParquetSource(path)
        source.place = f"the {split} frame"
        return [source]
    if type(raw).__module__.split(".")[0] == "pandas" and hasattr(raw, "columns"):
        return [FrameSource(from_pandas(raw), f"the {split} frame")]
    if isinstance(raw, str | os.PathLike):
        sources: list[Source] = []
        for path in paths_of(raw):
            form = _format(path)
            if form is None:
                raise InputError(
                    f"prepare: {path} is neither .csv, .tsv (plain, .gz, .zst) nor .parquet; for libfm lines "
                    "call data.prepare_libfm"
                )
            sources.append(ParquetSource(path) if form == "parquet" else CsvSource(path, _CSV[form], text))
        return sources
    raise InputError(
        f"prepare: {split} is a {type(raw).__name__}; expected a path, a glob, a polars or pandas "
        "frame, or a list of these"
    )


def from_pandas(frame: Any) -> pl.DataFrame:
    """Turn a pandas frame into a polars one, with or without pyarrow; NaN in a column of objects is null."""
    frame = frame.reset_index(drop=True)
    frame.columns = [str(name) for name in frame.columns]
    if importlib.util.find_spec("pyarrow") is not None:
        return pl.from_pandas(frame)
    columns = {}
    for name in frame.columns:
        series = frame[name]
        if isinstance(series.dtype, np.dtype) and series.dtype.kind in "biufM":
            columns[name] = pl.Series(name, series.to_numpy())
        else:
            values = series.astype(object).where(series.notna(), None).tolist()
            columns[name] = pl.Series(name, [v.tolist() if isinstance(v, np.ndarray) else v for v in values])
    return pl.DataFrame(columns)


def settled(source: Source) -> list[pl.DataFrame]:
    """Return all batches of a source with the types it ends up with."""
    while True:
        try:
            return list(source.batches(list(source.dtypes)))
        except Widened:
            continue


def read_all(raw: Any, what: str, *, text: Iterable[str], spill: Callable[[], Path]) -> pl.DataFrame:
    """Read a small side table (items, users) whole."""
    sources = open_sources(raw, what, text=text, spill=spill)
    frames = [batch for source in sources for batch in settled(source)]
    if not frames:
        raise InputError(f"prepare: {what} has no rows")
    try:
        return pl.concat(frames, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise InputError(f"prepare: the files of {what} do not have the same columns ({first_line(error)})") from None
