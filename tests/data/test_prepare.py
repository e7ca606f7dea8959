"""From raw logs to prepared folders: every source, the leak guard, the cache, and what is refused."""

from __future__ import annotations

import datetime
import errno
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import data
from recfast.data import Categorical, Numeric, Schema, Sequence, Vector, sources
from recfast.errors import InputError

LOG = pl.DataFrame(
    {
        "user": ["a", "a", "a", "b", "b", "a"],
        "item": [30, 10, 20, 10, 10, 40],
        "click": [1, 1, 0, 1, 1, 1],
        "ts": [5, 5, 6, 1, 2, 7],
        "price": [1.0, 2.0, 3.0, None, 5.0, float("nan")],
    }
)
LATER = pl.DataFrame(
    {"user": ["a", "b", "c"], "item": [10, 99, 10], "click": [0, 1, 1], "ts": [6, 9, 9], "price": [9.0, 1.0, 1.0]}
)
SCHEMA = Schema(
    [
        Categorical("user", role="user"),
        Categorical("item", role="item"),
        Sequence("history", max_length=2),
        Numeric("price"),
    ],
    label="click",
    time="ts",
    group="user",
)


def lists(split: data.Split, name: str = "history") -> list[list[int]]:
    jagged = split.gather(np.arange(len(split))).sequences[name]
    return [jagged.row(b).tolist() for b in range(len(split))]


def decoded(ds: data.Dataset, split: data.Split) -> list[list[int]]:
    return [ds.vocabulary["item"].decode(row) for row in lists(split)]


def test_leak_guard(tmp_path) -> None:
    """Equal times do not see each other, later rows of any split see every earlier positive, the last ones win."""
    ds = data.prepare(SCHEMA, LOG, LATER, cache=tmp_path)
    assert decoded(ds, ds.train) == [[], [], [30, 10], [], [10], [30, 10]]
    # User a at time 6 sees the train rows of time 5, and not the train row of time 7, though that is in train.
    # User c is unknown: nothing is known of c's past.
    assert decoded(ds, ds.valid) == [[30, 10], [10, 10], []]
    assert ds.valid.ids.tolist() == [[1, 1], [2, 0], [0, 1]]


def test_vocabulary_order_and_unknown(tmp_path) -> None:
    ds = data.prepare(SCHEMA, LOG, LATER, cache=tmp_path)
    assert ds.vocabulary["item"].decode([1, 2, 3, 4, 0]) == [10, 20, 30, 40, None]
    assert ds.vocabulary["item"].counts.tolist() == [3, 1, 1, 1]
    assert ds.vocabulary["item"].encode([99, None, 10]).tolist() == [0, 0, 1]
    assert ds.vocabulary["item"].encode(["20", "x", " 30"]).tolist() == [2, 0, 3]
    assert ds.vocabulary["item"].encode([10.0, 10.5]).tolist() == [1, 0]
    assert ds.vocabulary["user"].encode(["b", "zz", ""]).tolist() == [2, 0, 0]
    assert ds.vocabulary["user"].encode([]).tolist() == []
    assert ds.schema.rows("item") == 5
    assert ds.summary()["unknown"] == {"train": {"user": 0, "item": 0}, "valid": {"user": 1, "item": 1}}
    with pytest.raises(InputError, match=r"ids\[1\] = 5 is outside \[0, 4\]"):
        ds.vocabulary["item"].decode([0, 5])


def test_numeric(tmp_path) -> None:
    """Statistics come from the train split; missing values are the mean, and counted."""
    ds = data.prepare(SCHEMA, LOG, LATER, cache=tmp_path)
    seen = np.array([1.0, 2.0, 3.0, 5.0])
    mean, std = seen.mean(), seen.std()
    expected = (np.array([1, 2, 3, mean, 5, mean]) - mean) / std
    np.testing.assert_allclose(ds.train.numeric[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(ds.valid.numeric[:, 0], (np.array([9, 1, 1]) - mean) / std, rtol=1e-6)
    assert ds.summary()["missing"] == {"train": {"price": 2}, "valid": {"price": 0}}


def test_numeric_transforms(tmp_path) -> None:
    frame = pl.DataFrame(
        {"item": [1, 1, 1], "label": [0, 1, 1], "a": [-1, 0, 7], "b": [2.0, 2.0, 2.0], "c": [1, None, 3]}
    )
    schema = Schema([Categorical("item"), Numeric("a", "log"), Numeric("b"), Numeric("c", None)])
    ds = data.prepare(schema, frame, cache=tmp_path)
    logs = np.sign([-1, 0, 7]) * np.log1p([1, 0, 7])
    np.testing.assert_allclose(ds.train.numeric[:, 0], (logs - logs.mean()) / logs.std(), rtol=1e-6)
    assert ds.train.numeric[:, 1].tolist() == [0, 0, 0], "a constant column is not divided by zero"
    assert ds.train.numeric[:, 2].tolist() == [1, 0, 3]


def test_min_count(tmp_path) -> None:
    schema = Schema([Categorical("item", role="item", min_count=2)], label="click")
    ds = data.prepare(schema, LOG, cache=tmp_path)
    assert ds.schema.rows("item") == 2
    assert ds.train.ids[:, 0].tolist() == [0, 1, 0, 1, 1, 0]


def test_history_and_seen(tmp_path) -> None:
    drawn = LOG.with_columns(drawn=pl.Series([False, False, True, False, False, False]))
    ds = data.prepare(SCHEMA, drawn, LATER.with_columns(drawn=pl.lit(False)), sampled="drawn", cache=tmp_path)
    history, seen = ds.history("train"), ds.seen("train")
    assert history.offsets.tolist() == [0, 0, 3, 5]
    assert [ds.vocabulary["item"].decode(history.row(u)) for u in range(3)] == [[], [30, 10, 40], [10, 10]]
    assert ds.vocabulary["item"].decode(seen.row(1)) == [30, 10, 40], "the drawn negative is left out"
    assert ds.vocabulary["item"].decode(ds.seen("all").row(1)) == [30, 10, 10, 40], "in time order over the splits"
    assert ds.history("all").row(2).tolist() == [1, 1, 0], "an item that train does not have is 0"
    assert ds.popularity("train").tolist() == [0, 3, 0, 1, 1]
    assert ds.train.sampled.tolist() == drawn["drawn"].to_list()
    taken = history.take([2, 0, 1, 1], last=2)
    assert taken.offsets.tolist() == [0, 2, 2, 4, 6]
    assert taken.values.tolist() == [1, 1, 1, 4, 1, 4]


@st.composite
def logs(draw: st.DrawFn) -> list[pl.DataFrame]:
    def split(least: int) -> pl.DataFrame:
        row = st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 1), st.integers(0, 4))
        rows = draw(st.lists(row, min_size=least, max_size=30))
        return pl.DataFrame(rows, schema=dict.fromkeys(("user", "item", "label", "time"), pl.Int64), orient="row")

    return [split(1) for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(1, 4), st.integers(1, 7), st.booleans())
def test_histories_match_a_plain_loop(parts, max_length, rows_at_a_time, floats) -> None:
    """Any log, in tiny batches and user ranges, gives what reading it row by row would."""
    if floats:
        parts = [part.with_columns(pl.col("time").cast(pl.Float64) / 3) for part in parts]
    schema = Schema(
        [
            Categorical("user", role="user"),
            Categorical("item", role="item"),
            Sequence("history", max_length=max_length),
        ],
        time="time",
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(sources, "BATCH_ROWS", rows_at_a_time),
        mock.patch.object(_module("prepare"), "_SORT_ROWS", rows_at_a_time),
        mock.patch.object(_module("prepare"), "_CHUNK_ROWS", rows_at_a_time + 1),
    ):
        ds = data.prepare(schema, *parts, cache=folder)
        known_users = set(parts[0]["user"])
        encode = {raw: int(ds.vocabulary["item"].encode([raw])[0]) for raw in range(7)}
        whole = [row for part in parts for row in part.iter_rows()]
        for split, part in zip(("train", "valid", "test"), parts, strict=False):
            expected = []
            for user, _, _, time in part.iter_rows():
                past = [row for row in whole if row[0] == user and row[2] == 1 and row[3] < time]
                past.sort(key=lambda row: row[3])
                items = [encode[row[1]] for row in past][-max_length:]
                expected.append(items if user in known_users else [])
            assert lists(ds.split(split)) == expected
        likes = [row for row in whole if row[2] == 1]
        for user in known_users:
            u = int(ds.vocabulary["user"].encode([user])[0])
            mine = sorted((row for row in likes if row[0] == user), key=lambda row: row[3])
            assert ds.history("all").row(u).tolist() == [encode[row[1]] for row in mine]


def _module(name: str):
    import importlib

    # `recfast.data.prepare` the attribute is the function.
    return importlib.import_module(f"recfast.data.{name}")


def test_sources_agree(tmp_path) -> None:
    """CSV (plain, .gz, .zst, TSV), Parquet, a glob, a folder, a list, polars and pandas frames give the same rows."""
    frame = LOG.with_columns(pl.col("price").fill_nan(None))
    frame.write_csv(tmp_path / "log.csv")
    frame.write_csv(tmp_path / "log.tsv", separator="\t")
    text = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text))
    # Two frames in one .zst, as `cat a.zst b.zst` makes.
    half = text.index(b"\n", 20) + 1
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "log.csv.zst").write_bytes(compress(text[:half]) + compress(text[half:]))
    frame.write_parquet(tmp_path / "log.parquet")
    (tmp_path / "parts").mkdir()
    frame[:2].write_parquet(tmp_path / "parts" / "part-0.parquet")
    frame[2:].write_parquet(tmp_path / "parts" / "part-1.parquet")
    raws = {
        "csv": tmp_path / "log.csv",
        "tsv": str(tmp_path / "log.tsv"),
        "gz": tmp_path / "log.csv.gz",
        "zst": tmp_path / "log.csv.zst",
        "parquet": tmp_path / "log.parquet",
        "glob": str(tmp_path / "parts" / "*.parquet"),
        "folder": tmp_path / "parts",
        "list": [tmp_path / "parts" / "part-0.parquet", frame[2:]],
        "lazy": frame.lazy().filter(pl.col("item") > 0),
        "frame": frame,
    }
    if _has("pandas"):
        raws["pandas"] = _pandas(frame)
    for what, raw in raws.items():
        ds = data.prepare(SCHEMA, raw, cache=tmp_path / "cache" / what)
        assert ds.train.ids.tolist() == [[1, 3], [1, 1], [1, 2], [2, 1], [2, 1], [1, 4]], what
        assert ds.train.time.tolist() == [5, 5, 6, 1, 2, 7], what
        np.testing.assert_allclose(ds.train.numeric[:, 0], data_numeric(frame), rtol=1e-6, err_msg=what)
        assert os.listdir(tmp_path / "cache" / what) == [ds.path.name], f"{what} left something behind"


def data_numeric(frame: pl.DataFrame) -> np.ndarray:
    values = frame["price"].fill_null(frame["price"].mean()).to_numpy()
    known = frame["price"].drop_nulls().to_numpy()
    return (values - known.mean()) / known.std()


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _pandas(frame: pl.DataFrame):
    import pandas as pd

    return pd.DataFrame({name: frame[name].to_list() for name in frame.columns})


@pytest.mark.skipif(not _has("pandas"), reason="pandas is not installed")
def test_pandas_without_pyarrow(tmp_path) -> None:
    """A pandas frame needs no pyarrow; lists, text with gaps and dates come through."""
    import pandas as pd

    frame = pd.DataFrame(
        {
            "user": ["a", None, "b"],
            "item": [[1, 2], [3], []],
            "when": pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-03"]),
            "n": [1.5, float("nan"), 2.0],
        },
        index=[5, 5, 7],
    )
    with mock.patch.object(sources.importlib.util, "find_spec", return_value=None):
        polars = sources.from_pandas(frame)
    assert polars["user"].to_list() == ["a", None, "b"]
    assert polars["item"].to_list() == [[1, 2], [3], []]
    assert polars["when"].to_list()[0] == datetime.datetime(2024, 1, 1)
    assert polars["n"].null_count() + polars["n"].is_nan().sum() == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=6),
            st.integers(-(2**40), 2**40),
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 40),
)
def test_csv_in_pieces(rows, size) -> None:
    """However a CSV file is cut, quotes, commas and line breaks inside a field survive."""
    frame = pl.DataFrame(rows, schema={"text": pl.String, "number": pl.Int64}, orient="row")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sources, "_CHUNK_BYTES", size):
        path = Path(folder) / "log.csv"
        frame.write_csv(path, quote_style="always")
        source = sources.CsvSource(path, ",", text=["text"])
        read = pl.concat(sources.settled(source))
    assert read["text"].to_list() == frame["text"].to_list()
    assert read["number"].to_list() == frame["number"].to_list()


def test_csv_type_widens(tmp_path, monkeypatch) -> None:
    """A column that looks like numbers in the first pieces and is text later on is text throughout."""
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 1 << 14)
    items = [str(i % 50) for i in range(12_000)] + ["x7"]
    (tmp_path / "log.csv").write_text("item,label\n" + "".join(f"{item},{i % 2}\n" for i, item in enumerate(items)))
    ds = data.prepare(Schema([Categorical("item", role="item")]), tmp_path / "log.csv", cache=tmp_path / "cache")
    assert ds.vocabulary["item"].values.dtype == pl.String
    assert ds.vocabulary["item"].decode(ds.train.ids[:, 0]) == items
    (tmp_path / "late.csv").write_text("item,label,price\n" + "1,0,\n" * 12_000 + "1,1,2.5\n")
    schema = Schema([Categorical("item"), Numeric("price", None)])
    ds = data.prepare(schema, tmp_path / "late.csv", cache=tmp_path / "cache")
    assert ds.train.numeric[:, 0].tolist() == [0.0] * 12_000 + [2.5]


def test_column_without_values(tmp_path) -> None:
    """A column that is empty throughout the train split is unknown everywhere, also where another split has values."""
    frame = LOG.with_columns(item=pl.lit(None))
    ds = data.prepare(SCHEMA, frame, LATER, cache=tmp_path)
    assert ds.schema.rows("item") == 1
    assert not ds.train.column("item").any()
    assert not ds.valid.column("item").any()
    assert ds.items.height == 0


DAY = datetime.date(2024, 1, 2)


@pytest.mark.parametrize(
    ("values", "queries"),
    [
        ([True, False, True, None], [True, False, None]),
        ([2**63 + 5, 7, 2**63 + 5, None], [2**63 + 5, 7, 8, None]),
        ([-5, 10**12, -5, None], [-5, 10**12, 0, None]),
        ([1.5, -2.0, 1.5, float("nan")], [1.5, -2.0, float("nan"), None]),
        ([DAY, datetime.date(1960, 1, 1), DAY, None], [datetime.date(1960, 1, 1), None]),
        (["b", "ä", "b", ""], ["b", "ä", "", None, "zz"]),
    ],
)  # fmt: skip
def test_any_type_of_id(tmp_path, values, queries) -> None:
    frame = pl.DataFrame({"item": values, "label": [0, 1, 1, 1]})
    ds = data.prepare(Schema([Categorical("item", role="item")]), frame, cache=tmp_path)
    vocabulary = ds.vocabulary["item"]
    assert vocabulary.decode(ds.train.ids[:, 0]) == [None if v is None or v != v else v for v in values]
    known = vocabulary.values.to_list()
    assert vocabulary.encode(queries).tolist() == [known.index(q) + 1 if q in known else 0 for q in queries]


@given(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 50), max_size=40), st.data())
def test_vocabulary_round_trip(values, more) -> None:
    distinct = list(dict.fromkeys(values))
    vocabulary = data.Vocabulary(pl.Series("x", distinct, dtype=pl.Int64))
    assert vocabulary.decode(vocabulary.encode(values)) == values
    other = more.draw(st.lists(st.integers(-(2**62), 2**62), max_size=10))
    expected = [distinct.index(v) + 1 if v in distinct else 0 for v in other]
    assert vocabulary.encode(other).tolist() == expected


@pytest.mark.parametrize("form", ["frame", "parquet", "csv"])
def test_raw_sequences_and_vectors(tmp_path, form) -> None:
    """Lists in the raw log are stored jagged; those of a sequence add to the vocabulary they share."""
    frame = pl.DataFrame(
        {
            "item": [5, 6, 5],
            "label": [1, 0, 1],
            "hist": [[6, 5, 7], [], [9]],
            "text": [[0.5, 1.0], [0.0, -1.0], [2.0, 2.5]],
        }
    )
    valid = frame.with_columns(pl.Series("hist", [[8, 5], None, [7]]))
    schema = Schema([Categorical("item", role="item"), Sequence("hist", max_length=2), Vector("text", dim=2)])
    raw = {"train": frame, "valid": valid}
    if form != "frame":
        for name, part in list(raw.items()):
            raw[name] = tmp_path / f"{name}.{form}"
            if form == "parquet":
                part.write_parquet(raw[name])
            else:
                bars = [pl.col(c).cast(pl.List(pl.String)).list.join("|") for c in ("hist", "text")]
                part.with_columns(bars).write_csv(raw[name])
    ds = data.prepare(schema, **raw, cache=tmp_path / "cache")
    vocabulary = ds.vocabulary["item"]
    assert [vocabulary.decode(row) for row in lists(ds.train, "hist")] == [[5, 7], [], [9]]
    assert [vocabulary.decode(row) for row in lists(ds.valid, "hist")] == [[None, 5], [], [7]]
    batch = ds.train.gather(np.array([2, 0]))
    assert batch.vectors["text"].tolist() == [[2.0, 2.5], [0.5, 1.0]]
    assert ds.side("item")["vectors"]["text"][vocabulary.encode([5])[0]].tolist() == [2.0, 2.5]


def test_side_tables(tmp_path) -> None:
    """Columns of the items table are joined by id, also for ids that the log has and the table has not."""
    items = pl.DataFrame(
        {
            "item": [40, 10, 20, 77],
            "title": ["forty", "ten", "twenty", "other"],
            "genres": ["x|y", "y", "", "z"],
            "kind": ["k2", "k1", "k1", "k3"],
            "cost": [4.0, 1.0, 2.0, 9.0],
            "text": [[4.0, 0.0], [1.0, 0.0], [2.0, 0.0], [9.0, 0.0]],
        }
    )
    users = pl.DataFrame({"user": ["a", "b"], "land": ["p", "q"]})
    schema = Schema(
        [*SCHEMA.columns, Categorical("kind", side="item"), Categorical("land", side="user"),
         Numeric("cost", None, side="item"), Vector("text", dim=2)],
        label="click", time="ts",
    )  # fmt: skip
    ds = data.prepare(schema, LOG, LATER, items=items, users=users, cache=tmp_path)
    assert ds.items["item"].to_list() == [10, 20, 30, 40]
    assert ds.items["kind"].to_list() == ["k1", "k1", None, "k2"]
    assert [ds.title(i) for i in range(5)] == ["unknown", "ten", "twenty", "30", "forty"]
    assert ds.genre_names == ["", "x", "y"]
    assert ds.item_features()[:, 1:].tolist() == [[0, 0], [0, 1], [0, 0], [0, 0], [1, 1]]
    assert ds.vocabulary["kind"].decode(ds.train.column("kind")) == [None, "k1", "k1", "k1", "k1", "k2"]
    assert ds.vocabulary["land"].decode(ds.valid.column("land")) == ["p", "q", None]
    side = ds.side("item")
    assert side["columns"] == ["item", "kind"]
    assert side["ids"].tolist() == [[0, 0], [1, 1], [2, 1], [3, 0], [4, 2]]
    assert side["numeric"][:, 0].tolist() == [0, 1, 2, 0, 4]
    assert side["vectors"]["text"][:, 0].tolist() == [0, 1, 2, 0, 4]
    assert ds.train.gather(np.array([5, 0])).vectors["text"].tolist() == [[4, 0], [0, 0]]
    assert ds.side("user")["ids"].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_side_from_the_log(tmp_path) -> None:
    """Without an items table the last train row of an item says what its features are."""
    frame = LOG.with_columns(kind=pl.Series(["p", "q", "r", "q", "s", "t"]))
    ds = data.prepare(
        Schema([*SCHEMA.columns, Categorical("kind", side="item")], label="click", time="ts"), frame, cache=tmp_path
    )
    kinds = ds.vocabulary["kind"].decode(ds.side("item")["ids"][1:, 1])
    assert dict(zip(ds.items["item"], kinds, strict=True)) == {10: "s", 20: "r", 30: "p", 40: "t"}
    assert ds.items["kind"].to_list() == kinds


def test_implicit_feedback(tmp_path) -> None:
    """Without a label every row is a positive; without a time the rows' order is the time."""
    schema = Schema([Categorical("user", role="user"), Categorical("item", role="item")], label=None)
    ds = data.prepare(schema, LOG, cache=tmp_path)
    assert ds.train.label is None
    assert ds.train.gather(np.arange(2)).label is None
    assert ds.vocabulary["item"].decode(ds.history().row(1)) == [30, 10, 20, 40]
    assert len(ds.train.positives()) == 6


def test_group(tmp_path) -> None:
    """Groups are equal where the raw values are, also of users that train does not know."""
    later = pl.concat([LATER, LATER.with_columns(user=pl.lit("d"))])
    ds = data.prepare(SCHEMA, LOG, later, cache=tmp_path)
    groups = ds.valid.group
    assert groups[2] not in groups[3:]
    assert (groups[3:] == groups[3]).all()
    assert groups[0] == ds.train.group[0]


@pytest.mark.parametrize("dtype", [pl.Date, pl.Datetime("ms"), pl.Datetime("ns", "UTC")])
def test_dates(tmp_path, dtype) -> None:
    days = pl.Series([datetime.datetime(2024, 1, day) for day in (5, 5, 6, 1, 2, 7)])
    if dtype != pl.Date:
        days = days.dt.replace_time_zone(dtype.time_zone)
    frame = LOG.with_columns(ts=days.cast(dtype))
    ds = data.prepare(SCHEMA, frame, cache=tmp_path)
    assert decoded(ds, ds.train) == [[], [], [30, 10], [], [10], [30, 10]]
    assert ds.train.time[2] - ds.train.time[1] == 86_400_000_000, "microseconds"
    json.dumps(ds.summary())


def test_cache_follows_content(tmp_path) -> None:
    """The same content is prepared once, wherever it lies; another byte, schema or name is prepared anew."""
    path = tmp_path / "log.csv"
    LOG.write_csv(path)
    stat = path.stat()
    ran = mock.Mock(wraps=_module("prepare")._Preparation)
    with mock.patch.object(_module("prepare"), "_Preparation", ran):
        first = data.prepare(SCHEMA, path, cache=tmp_path / "cache")
        assert ran.call_count == 1
        path.rename(tmp_path / "moved.csv")
        assert data.prepare(SCHEMA, tmp_path / "moved.csv", cache=tmp_path / "cache").path == first.path
        assert ran.call_count == 1
        # Same size, same date, another price.
        text = (tmp_path / "moved.csv").read_bytes()
        path.write_bytes(text.replace(b"5.0", b"6.0"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert len(text) == path.stat().st_size
        changed = data.prepare(SCHEMA, path, cache=tmp_path / "cache")
        assert ran.call_count == 2
        assert changed.train.numeric.tolist() != first.train.numeric.tolist()
        data.prepare(SCHEMA, path, cache=tmp_path / "cache", name="other")
        data.prepare(Schema(SCHEMA.columns, label="click", time="ts"), path, cache=tmp_path / "cache")
        assert ran.call_count == 4
        frame = data.prepare(SCHEMA, LOG, cache=tmp_path / "cache")
        assert data.prepare(SCHEMA, LOG.clone(), cache=tmp_path / "cache").path == frame.path
        assert ran.call_count == 5
        data.prepare(SCHEMA, LOG.with_columns(item=pl.Series([30, 10, 20, 10, 10, 41])), cache=tmp_path / "cache")
        assert ran.call_count == 6
        # A damaged folder is prepared again.
        (frame.path / "train" / "ids.npy").unlink()
        assert len(data.prepare(SCHEMA, LOG, cache=tmp_path / "cache").train) == 6
        assert ran.call_count == 7


def test_cache_place(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RECFAST_CACHE", str(tmp_path / "here"))
    assert data.prepare(SCHEMA, LOG).path.parent == tmp_path / "here"


def test_open(tmp_path) -> None:
    ds = data.prepare(SCHEMA, LOG, LATER, cache=tmp_path)
    again = data.open(ds.path)
    assert again.schema == ds.schema
    assert again.test is None
    assert again.valid.ids.tolist() == ds.valid.ids.tolist()
    with pytest.raises(InputError, match="not a folder of prepared data"):
        data.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no split 'test'"):
        again.split("test")
    ids = ds.path / "train" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"ids\.npy is damaged"):
        data.open(ds.path)
    (ds.path / "meta.json").write_text('{"format": 0}')
    with pytest.raises(InputError, match="has format 0"):
        data.open(ds.path)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_rejects_bad_input(tmp_path) -> None:
    """One sentence each, and nothing is left in the cache."""
    cache = tmp_path / "cache"

    def refused(sentence: str, *raw, schema: Schema = SCHEMA, **options) -> None:
        with pytest.raises(InputError, match=sentence) as caught:
            data.prepare(schema, *raw, cache=cache, **options)
        assert "\n" not in str(caught.value)
        assert not cache.exists() or os.listdir(cache) == []

    refused("train frame has no column 'click'.*'clik'", LOG.rename({"click": "clik"}))
    refused("valid frame has no column 'item'", LOG, LATER.drop("item"))
    refused("no column 'price'", LOG.drop("price"))
    refused("row 4: label 'click' = 3 is outside {0, 1}", LOG.with_columns(click=pl.Series([1, 0, 1, 3, 0, 0])))
    refused("row 1: label 'click' = None", LOG.with_columns(click=pl.Series([None, 0, 1, 1, 0, 0])))
    refused("'click' of the train frame is text", LOG.with_columns(click=pl.lit("yes")))
    refused("train split has no rows", LOG.clear())
    refused("valid split has no rows", LOG, LATER.clear())
    refused(
        "row 3: 'price' = inf is not finite", LOG.with_columns(price=pl.Series([1, 2, np.inf, 1, 1, 1], strict=False))
    )
    refused("'price' of the train frame is text", LOG.with_columns(price=pl.lit("1")))
    refused("row 2: the time 'ts' is missing", LOG.with_columns(ts=pl.Series([1, None, 2, 3, 4, 5])))
    refused("time column 'ts' is text", LOG.with_columns(ts=pl.lit("noon")))
    refused(
        "'item' changes its type: whole numbers in the train.*text in the valid",
        LOG,
        LATER.with_columns(item=pl.lit("x")),
    )
    refused("'item' holds lists", LOG.with_columns(item=pl.Series([[1]] * 6)))
    refused(
        "cannot be derived from the log, because the schema has no time",
        LOG,
        schema=Schema(SCHEMA.columns, label="click"),
    )
    refused("train is None", None)
    refused("train is a int", 7)
    refused("train is an empty list", [])
    refused("nowhere.csv does not exist", tmp_path / "nowhere.csv")
    refused("no file matches", str(tmp_path / "part-*.parquet"))
    refused("is neither .csv", _write(tmp_path / "log.txt", "x"))
    refused("empty.csv is empty", _write(tmp_path / "empty.csv", ""))
    refused("is a dict, expected a data.Schema", LOG, schema={})
    refused("items has no column 'item'", LOG, items=pl.DataFrame({"id": [1]}))
    refused("more than one row with item = 10", LOG, items=pl.DataFrame({"item": [10, 10]}))
    refused("holds no CSV", tmp_path.joinpath("hollow").mkdir() or tmp_path / "hollow")

    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    LOG.write_csv(a)
    LOG.with_columns(item=pl.Series([f"i{i}" for i in range(6)])).write_csv(b)
    refused("'item' changes its type: whole numbers in .*a.csv, text in .*b.csv", [a, b])

    whole = tmp_path / "log.parquet"
    LOG.write_parquet(whole)
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-40])
    refused("cut.parquet is not a whole, readable Parquet file", tmp_path / "cut.parquet")
    bytes_ = bytearray(whole.read_bytes())
    bytes_[4:200] = bytes(196)
    (tmp_path / "bad.parquet").write_bytes(bytes_)
    refused("bad.parquet is not a whole, readable Parquet file", tmp_path / "bad.parquet")
    packed = zstandard.ZstdCompressor().compress(a.read_bytes() * 50)
    (tmp_path / "cut.csv.zst").write_bytes(packed[: len(packed) // 2])
    refused("cut.csv.zst is not a whole, readable CSV file", tmp_path / "cut.csv.zst")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(os.urandom(500) + a.read_bytes())[:300])
    refused("cut.csv.gz is not a whole, readable CSV file", tmp_path / "cut.csv.gz")
    vector = Schema([Categorical("item"), Vector("v", dim=2)])
    refused(
        "vector 'v' has 3 numbers in row 2",
        pl.DataFrame({"item": [1, 2], "label": [0, 1], "v": [[1.0, 2.0], [1.0, 2.0, 3.0]]}),
        schema=vector,
    )


@pytest.mark.parametrize("after", [0, 1, 5, 12])
def test_full_disk(tmp_path, after) -> None:
    """Wherever the space runs out, the sentence is one and nothing is left behind."""
    writer = _module("prepare").NpyWriter
    write, count = writer.write, [0]

    def failing(self, array) -> None:
        count[0] += 1
        if count[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, array)

    with mock.patch.object(writer, "write", failing), pytest.raises(InputError, match="the disk is full"):
        data.prepare(SCHEMA, LOG, LATER, cache=tmp_path)
    assert os.listdir(tmp_path) == []


def test_full_disk_while_writing_parquet(tmp_path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch.object(pl.DataFrame, "write_parquet", side_effect=full),
        pytest.raises(InputError, match="the disk is full"),
    ):
        data.prepare(SCHEMA, LOG, cache=tmp_path)
    assert os.listdir(tmp_path) == []


def test_unwritable_cache(tmp_path) -> None:
    _write(tmp_path / "file", "")
    with pytest.raises(InputError, match=r"cannot be written.*RECFAST_CACHE"):
        data.prepare(SCHEMA, LOG, cache=tmp_path / "file")


def test_libfm(tmp_path) -> None:
    train = _write(tmp_path / "train.libfm", "-1 3:1 7:1\n1 3:1 8:1.0 \n1 4:1 7:1\r\n")
    packed = tmp_path / "test.libfm.zst"
    packed.write_bytes(zstandard.ZstdCompressor().compress(b"1 3:1 99:1"))
    ds = data.prepare_libfm(train, None, packed, ["user", "item"], cache=tmp_path / "cache")
    assert ds.train.label.tolist() == [0, 1, 1]
    assert ds.train.ids.tolist() == [[1, 1], [1, 2], [2, 1]]
    assert ds.test.ids.tolist() == [[1, 0]]
    assert (ds.schema.user, ds.schema.item) == ("user", "item")
    for text, sentence in [
        ("1 3:1\n", "line 1 has 1 features, expected 2"),
        ("1 3:1 4:1\n1 3:1 4:1 5:1\n", "line 2 has 3 features, expected 2"),
        ("2 3:1 4:1\n", "line 1: label '2' is not -1, 0 or 1"),
        ("1 3:1 4:0.5\n", "line 1: field 'item' holds '4:0.5', expected index:1"),
    ]:
        bad = _write(tmp_path / "bad.libfm", text)
        with pytest.raises(InputError, match=sentence):
            data.prepare_libfm(bad, None, None, ["user", "item"], cache=tmp_path / "cache")
    with pytest.raises(InputError, match="distinct names"):
        data.prepare_libfm(train, field_names=["a", "a"], cache=tmp_path / "cache")


_MEMORY = """
import sys
from recfast import data
from recfast.data import Categorical, Numeric, Schema, Sequence
# Not ru_maxrss, which a child inherits from the process that forked it.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
before = peak()
schema = Schema([Categorical("user", role="user"), Categorical("item", role="item"),
                 Categorical("place"), Categorical("hour"),
                 Sequence("history"), Numeric("price", "log"), Numeric("score")],
                label="click", time="ts", group="user")
ds = data.prepare(schema, sys.argv[1], cache=sys.argv[2])
print(len(ds.train), before, peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_memory_is_bounded(tmp_path, form) -> None:
    """Ten million rows are prepared within 2 GB, all of the process counted."""
    rng, part = np.random.default_rng(0), 1_000_000
    rows = 10 * part if form == "parquet" else 3 * part
    limit = 2000 if form == "parquet" else 1500
    for i in range(rows // part):
        frame = pl.DataFrame(
            {
                "user": (500_000 * rng.random(part) ** 2).astype(np.int64),
                "item": (100_000 * rng.random(part) ** 2).astype(np.int64),
                "ts": rng.integers(0, 10**7, part),
                "click": (rng.random(part) < 0.3).astype(np.int8),
                "place": pl.Series([f"place {p}" for p in range(300)])[rng.integers(0, 300, part)],
                "hour": rng.integers(0, 24, part),
                "price": rng.lognormal(size=part),
                "score": rng.normal(size=part),
            }
        )
        if form == "parquet":
            frame.write_parquet(tmp_path / f"part-{i}.parquet")
        else:
            with open(tmp_path / "log.csv", "ab") as handle:
                frame.write_csv(handle, include_header=i == 0)
    raw = str(tmp_path / ("part-*.parquet" if form == "parquet" else "log.csv"))
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, raw, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    found, before, peak = map(int, done.stdout.split())
    print(f"{form}: {found} rows, {before} MB before, {peak} MB at the peak")
    assert found == rows
    assert peak < limit


def test_events_before_the_log_are_history_and_no_rows(tmp_path) -> None:
    log = pl.DataFrame({"user": ["a", "a", "b"], "item": [7, 9, 7], "genre": ["x", "y", "x"], "label": [1, 0, 1]})
    log = log.with_columns(time=pl.Series([10, 11, 12]))
    before = pl.DataFrame({"user": ["b", "a", "a", "c"], "item": [9, 7, 5, 7], "time": [3, 2, 1, 1]})
    items = pl.DataFrame({"item": [5, 7, 9], "genre": ["y", "x", "y"]})
    schema = Schema(
        [
            Categorical("user", role="user"),
            Categorical("item", role="item"),
            Categorical("genre", side="item"),
            Sequence("history"),
            Sequence("genres", of="genre"),
        ],
        time="time",
    )
    frame = log.drop("genre")
    ds = data.prepare(schema, frame, before=before, items=items, cache=tmp_path)
    without = data.prepare(schema, frame, items=items, cache=tmp_path)
    assert ds.path != without.path
    assert ds.meta["rows"] == without.meta["rows"] == {"train": 3}
    assert not (ds.path / "before").exists()
    assert [ds.vocabulary[c].values.to_list() for c in ("user", "item")] == [["a", "b"], [7, 9]], "of the train split"
    batch = ds.train.gather(np.arange(3))
    read = ds.vocabulary["item"].decode
    assert [read(batch.sequences["history"].row(r)) for r in range(3)] == [[None, 7], [None, 7, 7], [9]]
    genres = ds.vocabulary["genre"].decode
    assert [genres(batch.sequences["genres"].row(r)) for r in range(3)] == [["y", "x"], ["y", "x", "x"], ["y"]]
    assert read(ds.history("train").row(1)) == [None, 7, 7]
    assert read(ds.seen("train").row(2)) == [9, 7]
    with pytest.raises(InputError, match="the before frame has no column 'time'"):
        data.prepare(schema, frame, before=before.drop("time"), items=items, cache=tmp_path)
    with pytest.raises(InputError, match="'item' changes its type: whole numbers in the train split, text"):
        data.prepare(
            schema, frame, before=before.with_columns(pl.col("item").cast(pl.String)), items=items, cache=tmp_path
        )
    timeless = Schema([Categorical("user", role="user"), Categorical("item", role="item")])
    with pytest.raises(InputError, match="before is given, but the schema has no time column"):
        data.prepare(timeless, frame, before=before, cache=tmp_path)
