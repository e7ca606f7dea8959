"""What serving knows: a candidate's row is the row that training would have made of the same moment."""

from __future__ import annotations

import os
import shutil

import numpy as np
import polars as pl
import pytest
import torch

from recfast import data
from recfast.data import Catalogue
from recfast.errors import InputError, OutOfRange

USERS, ITEMS, DAYS = 12, 15, 10


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Every kind and side of column. The last train row of a user is no like, so its history is all likes before."""
    random = np.random.default_rng(0)
    kind = random.integers(0, 4, ITEMS)
    price, text = random.normal(size=ITEMS), random.normal(size=(ITEMS, 3))
    age, face = random.normal(size=USERS), random.normal(size=(USERS, 2))
    rows = []
    for user in range(USERS):
        for day in range(DAYS):
            item = int(random.integers(ITEMS))
            rows.append(
                {
                    "user": f"u{user}",
                    "item": f"i{item}",
                    "kind": f"k{kind[item]}",
                    "device": f"d{random.integers(3)}",
                    "age": age[user],
                    "price": price[item],
                    "hour": float(random.normal()),
                    "text": text[item].tolist(),
                    "face": face[user].tolist(),
                    "mood": random.normal(size=2).tolist(),
                    "basket": [f"i{i}" for i in random.integers(ITEMS, size=random.integers(0, 5))],
                    "label": int(day < DAYS - 3 and random.random() < 0.6),
                    "time": day,
                }
            )
    rows = [row for row in rows if not (row["user"] == "u11" and row["time"] < DAYS - 2)]  # known later, not in train
    log = pl.DataFrame(rows)
    schema = data.Schema(
        [
            data.Categorical("user", role="user"),
            data.Categorical("item", role="item"),
            data.Categorical("kind", side="item"),
            data.Categorical("device"),
            data.Numeric("age", side="user"),
            data.Numeric("hour"),
            data.Numeric("price", side="item"),
            data.Vector("text", dim=3, side="item"),
            data.Vector("face", dim=2, side="user"),
            data.Vector("mood", dim=2, side="context"),
            data.Sequence("history", of="item", max_length=4),
            data.Sequence("kinds", of="kind", max_length=5),
            data.Sequence("basket", of="item", max_length=3),
        ],
        label="label",
        time="time",
    )
    parts = [log.filter(pl.col("time").is_between(a, b)) for a, b in ((0, 7), (8, 8), (9, 9))]
    items = pl.DataFrame({"item": [f"i{i}" for i in range(ITEMS)], "title": [f"Title {i}" for i in range(ITEMS)]})
    items = items.with_columns(genres=pl.Series([["a", "b"] if i % 2 else ["c"] for i in range(ITEMS)]))
    return data.prepare(schema, *parts, items=items, cache=tmp_path_factory.mktemp("cache"))


def last_rows(dataset):
    users, time = dataset.train.column("user"), dataset.train.time
    return np.array([max(np.flatnonzero(users == u), key=lambda row: time[row]) for u in np.unique(users[users > 0])])


def equal(a, b):
    return type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_candidate_row_is_the_training_row(dataset):
    catalogue = Catalogue.from_dataset(dataset, "train")
    rows = last_rows(dataset)
    expected = dataset.train.gather(rows)
    users, items = expected.column("user"), expected.column("item")
    batch, valid = catalogue.candidates(users, items[:, None])
    assert valid.all()
    assert batch.columns == expected.columns
    assert torch.equal(batch.ids, expected.ids)
    assert torch.equal(batch.numeric, expected.numeric)
    assert batch.vectors.keys() == expected.vectors.keys() == {"text", "face", "mood"}
    for name, vector in expected.vectors.items():
        assert torch.equal(batch.vectors[name], vector), name
    assert batch.sequences.keys() == {"history", "kinds", "basket"}
    for name, lists in expected.sequences.items():
        assert equal(batch.sequences[name], lists), name
    assert len(expected.sequences["kinds"].values) > 0
    assert not torch.equal(expected.sequences["kinds"].values, expected.sequences["history"].values)


def test_candidates_share_a_history_and_padding_has_no_row(dataset):
    catalogue = Catalogue.from_dataset(dataset)
    users = torch.tensor([3, 1, 3])
    items = torch.tensor([[4, 2, -1], [-1, -1, -1], [7, 1, 2]])
    batch, valid = catalogue.candidates(users, items)
    assert torch.equal(valid, items >= 0)
    assert batch.candidate_offsets.tolist() == [0, 2, 2, 5]
    assert batch.column("user").tolist() == [3, 3, 3, 3, 3]
    assert batch.column("item").tolist() == [4, 2, 7, 1, 2]
    history = dataset.history("all")
    for b, user in enumerate(users.tolist()):
        assert batch.sequences["history"].row(b).tolist() == history.row(user).tolist()[-4:]
    side = dataset.side("item")
    kind = side["columns"].index("kind")
    assert torch.equal(batch.column("kind"), torch.from_numpy(side["ids"][[4, 2, 7, 1, 2], kind]))
    assert torch.equal(batch.vectors["text"], torch.from_numpy(side["vectors"]["text"][[4, 2, 7, 1, 2]]))


def test_nobody_and_nothing(dataset):
    catalogue = Catalogue.from_dataset(dataset)
    for users, items in ((torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)), ([1, 2], None)):
        users = torch.as_tensor(users)
        items = torch.zeros(2, 0, dtype=torch.int64) if items is None else items
        batch, valid = catalogue.candidates(users, items)
        assert len(batch) == 0
        assert valid.shape == items.shape
        assert len(batch.candidate_offsets) == len(users) + 1


def test_a_user_without_a_training_row_has_no_context(dataset):
    catalogue = Catalogue.from_dataset(dataset)
    rows = last_rows(dataset)
    known = set(dataset.train.column("user")[rows].tolist())
    unknown = [u for u in range(dataset.schema.rows("user")) if u not in known]
    assert 0 in unknown
    batch, _ = catalogue.candidates(torch.tensor(unknown), torch.ones(len(unknown), 1, dtype=torch.int64))
    assert not batch.column("device").any()
    assert not batch.vectors["mood"].any()
    assert not batch.sequences["basket"].values.any()


def test_ids_out_of_range_are_refused(dataset):
    catalogue = Catalogue.from_dataset(dataset)
    one = torch.tensor([1])
    rows = dataset.schema.rows("item")
    with pytest.raises(OutOfRange, match=rf"candidates: items\[0, 1\] = {rows} is outside \[0, {rows}\), .*'item'"):
        catalogue.candidates(one, torch.tensor([[1, rows]]))
    with pytest.raises(OutOfRange, match=r"candidates: items\[0, 0\] = -2 is outside"):
        catalogue.candidates(one, torch.tensor([[-2]]))
    with pytest.raises(OutOfRange, match=r"candidates: users\[1\] = -1 is outside"):
        catalogue.candidates(torch.tensor([1, -1]), torch.ones(2, 1, dtype=torch.int64))


def test_histories_move_with_the_split(dataset):
    catalogue = Catalogue.from_dataset(dataset, "all")
    before = catalogue.upto(dataset, "train")
    assert equal(before.history, dataset.history("train"))
    assert equal(before.seen, dataset.seen("train"))
    assert equal(before.sequences["kinds"], dataset.history("train", of="kind"))
    assert equal(before.sequences["basket"], catalogue.sequences["basket"])


def same(a: Catalogue, b: Catalogue) -> None:
    assert a.schema == b.schema
    for role in ("user", "item"):
        assert a.vocabulary[role].values.equals(b.vocabulary[role].values)
    for side, values in a.features.items():
        assert np.array_equal(values["ids"], b.features[side]["ids"])
        assert np.array_equal(values["numeric"], b.features[side]["numeric"])
        assert values["vectors"].keys() == b.features[side]["vectors"].keys()
        for name, vectors in values["vectors"].items():
            assert np.array_equal(vectors, b.features[side]["vectors"][name])
    assert equal(a.history, b.history)
    assert equal(a.seen, b.seen)
    assert a.sequences.keys() == b.sequences.keys() == {"basket", "kinds"}
    assert all(equal(a.sequences[name], b.sequences[name]) for name in a.sequences)
    assert np.array_equal(a.genres, b.genres)
    assert a.genre_names == b.genre_names == ["a", "b", "c"]
    assert a.items.equals(b.items)


def test_round_trip(dataset, tmp_path):
    catalogue = Catalogue.from_dataset(dataset)
    catalogue.save(tmp_path / "catalogue")
    loaded = Catalogue.load(tmp_path / "catalogue")
    same(catalogue, loaded)
    assert loaded.title(1) == dataset.title(1)
    assert loaded.genres_of(1) in (["a", "b"], ["c"])
    loaded.save(tmp_path / "again")
    same(catalogue, Catalogue.load(tmp_path / "again"))


def test_a_damaged_folder_is_refused(dataset, tmp_path):
    folder = tmp_path / "catalogue"
    Catalogue.from_dataset(dataset).save(folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(InputError, match=rf"Catalogue\.load: .*{path.name} is truncated or damaged"):
            Catalogue.load(folder)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
        with pytest.raises(InputError, match=rf"Catalogue\.load: .*{path.name} is (truncated or )?damaged"):
            Catalogue.load(folder)
        path.write_bytes(content)
    Catalogue.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="is not a folder"):
        Catalogue.load(folder)


def test_a_full_disk_keeps_the_earlier_one(dataset, tmp_path, monkeypatch):
    catalogue = Catalogue.from_dataset(dataset)
    catalogue.save(tmp_path / "catalogue")
    calls, real = [], np.save

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError("100000 requested and 8176 written")
        return real(*arguments, **options)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"Catalogue\.save: .*catalogue cannot be written, the disk is full"):
        catalogue.save(tmp_path / "catalogue")
    assert os.listdir(tmp_path) == ["catalogue"]
    same(catalogue, Catalogue.load(tmp_path / "catalogue"))


def test_roles_are_needed(tmp_path):
    log = pl.DataFrame({"user": ["a", "b"], "label": [0, 1]})
    schema = data.Schema([data.Categorical("user", role="user")])
    with pytest.raises(InputError, match="no column with the role 'item'"):
        Catalogue.from_dataset(data.prepare(schema, log, cache=tmp_path))
