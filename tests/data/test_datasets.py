"""The known data sets, read from their publishers' files where these are at hand."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch

from recfast import data
from recfast.data import datasets
from recfast.errors import InputError


@pytest.fixture(scope="module")
def films(shared_data, tmp_path_factory) -> data.Dataset:
    return data.load("ml-100k", shared_data / "ml-100k", cache=tmp_path_factory.mktemp("cache"))


def test_ml_100k_facts(films) -> None:
    summary = films.summary()
    json.dumps(summary)
    assert (summary["users"], summary["items"]) == (943, 1682)
    seen = films.seen("all")
    assert len(seen.values) == 100_000, "every rating is a seen item, no drawn negative is"
    assert len(films.history("all").values) == 55_375, "ratings of 4 and 5"
    rows = sum(len(films.split(name)) for name in ("train", "valid", "test"))
    assert rows == 100_000 + 4 * 55_375
    assert films.genre_names == sorted(datasets.ML_GENRES)
    star_wars = int(films.vocabulary["item"].encode([50])[0])
    assert films.title(star_wars) == "Star Wars (1977)"
    genres = films.item_features()[star_wars]
    assert {films.genre_names[g] for g in np.flatnonzero(genres)} == {"Action", "Adventure", "Romance", "Sci-Fi", "War"}
    person = films.users.filter(pl.col("user") == 1).row(0, named=True)
    assert person == {"user": 1, "age": "18-24", "gender": "M", "occupation": "technician"}


def test_ml_100k_split_is_by_time(films) -> None:
    """Within each user no train rating is later than a valid one, and no valid one later than a test one."""
    last = np.full(944, -np.inf)
    for name in ("train", "valid", "test"):
        split = films.split(name)
        users, times = split.column("user"), split.time
        assert (times >= last[users]).all()
        np.maximum.at(last, users, times)
    observed = [int((~films.split(name).sampled).sum()) for name in ("train", "valid", "test")]
    assert sum(observed) == 100_000
    assert abs(observed[0] - 80_000) < 943
    assert abs(observed[1] - 10_000) < 943


def test_ml_100k_negatives(films, shared_data, tmp_path) -> None:
    """Drawn negatives are items that the user never rated, four to a positive, the same for the same seed."""
    rated = {(u, int(i)) for u in range(944) for i in films.seen("all").row(u)}
    for name in ("train", "valid", "test"):
        split = films.split(name)
        drawn = split.take(np.asarray(split.sampled))
        assert (drawn.label == 0).all()
        assert len(drawn) == 4 * len(split.positives())
        pairs = set(zip(drawn.column("user").tolist(), drawn.column("item").tolist(), strict=True))
        assert not pairs & rated
        moments = set(zip(split.positives().column("user").tolist(), split.positives().time.tolist(), strict=True))
        assert set(zip(drawn.column("user").tolist(), drawn.time.tolist(), strict=True)) == moments
    again = data.load("ml-100k", shared_data / "ml-100k", cache=tmp_path)
    assert np.array_equal(again.train.ids, films.train.ids)
    other = data.load("ml-100k", shared_data / "ml-100k", seed=1, cache=tmp_path)
    assert not np.array_equal(other.train.ids, films.train.ids)
    none = data.load("ml-100k", shared_data / "ml-100k", negatives=0, cache=tmp_path)
    assert not none.train.sampled.any()
    assert sum(none.meta["rows"].values()) == 100_000


def test_ml_100k_histories(films) -> None:
    """Spot check of the leak guard on real timestamps, many of which are equal."""
    whole = films.history("all")
    times = {}
    for name in ("train", "valid", "test"):
        liked = films.split(name).positives()
        for user, item, time in zip(liked.column("user"), liked.column("item"), liked.time, strict=True):
            times[int(user), int(item)] = int(time)
    rows = np.random.default_rng(0).integers(0, len(films.test), 300)
    batch = films.test.gather(rows)
    for b, row in enumerate(rows):
        user, now = int(batch.column("user")[b]), int(films.test.time[row])
        expected = [int(i) for i in whole.row(user) if times[user, int(i)] < now][-50:]
        assert batch.sequences["history"].row(b).tolist() == expected


def test_frappe(shared_data, tmp_path) -> None:
    ds = data.load("frappe", shared_data / "frappe", cache=tmp_path)
    assert ds.meta["rows"] == {"train": 202_027, "valid": 57_722, "test": 28_860}
    assert ds.train.columns == datasets.FRAPPE_FIELDS
    assert abs(float(ds.train.label.mean()) - 1 / 3) < 0.01
    assert ds.vocabulary["user"].size <= 957
    assert set(np.unique(ds.test.label)) == {0.0, 1.0}
    assert "re-drawn" in ds.meta["about"]


def gowalla_files(folder, train: str, test: str):
    folder.mkdir(exist_ok=True)
    (folder / "train.txt").write_text(train)
    (folder / "test.txt").write_text(test)
    return folder


def pairs(dataset: data.Dataset, name: str) -> list[tuple[int, int]]:
    ids = dataset.split(name).ids
    return list(zip(*(dataset.vocabulary[c].decode(ids[:, j]) for j, c in enumerate(("user", "item"))), strict=True))


def test_gowalla_lines(tmp_path) -> None:
    """Users without items, an item twice, a line of nothing; every row is a positive."""
    path = gowalla_files(tmp_path / "g", "0 5 3 3\n1\n\n7 5\n0 9\n", "0 7\n2 5\n1 \n")
    ds = data.load("gowalla", path, cache=tmp_path / "c")
    assert pairs(ds, "train") == [(0, 5), (0, 3), (7, 5), (0, 9)]
    # Item 7 and user 2 are not in train.
    assert pairs(ds, "test") == [(0, None), (None, 5)]
    assert (ds.schema.label, ds.schema.time, ds.valid) == (None, None, None)
    user = int(ds.vocabulary["user"].encode([0])[0])
    assert ds.vocabulary["item"].decode(ds.history("valid").row(user)) == [5, 3, 9]
    assert torch.equal(ds.seen("train").values, ds.history("train").values)
    assert len(ds.train.positives()) == 4
    again = data.load("gowalla", path, cache=tmp_path / "c")
    assert again.path == ds.path
    selected = data.load("gowalla", path, select_on_test=True, cache=tmp_path / "c")
    assert pairs(selected, "valid") == pairs(ds, "test")
    assert selected.test is None


def test_gowalla_valid_share(tmp_path) -> None:
    random = np.random.default_rng(0)
    lines = "".join(f"{u} {' '.join(map(str, random.permutation(50)[: u % 30 + 1]))}\n" for u in range(60))
    path = gowalla_files(tmp_path / "g", lines + "60 50\n", "0 1\n")
    whole = data.load("gowalla", path, cache=tmp_path)
    held = data.load("gowalla", path, valid_share=0.3, seed=4, cache=tmp_path)
    train, valid = set(pairs(held, "train")), set(pairs(held, "valid"))
    assert not train & valid
    assert train | valid == set(pairs(whole, "train"))
    for user in range(60):
        count, expected = sum(u == user for u, _ in valid), round(0.3 * (user % 30 + 1))
        assert expected - 1 <= count <= expected
    # No user and no item is lost to train.
    assert held.schema.rows("user") == whole.schema.rows("user")
    assert held.schema.rows("item") == whole.schema.rows("item")
    assert set(pairs(data.load("gowalla", path, valid_share=0.3, seed=4, cache=tmp_path / "b"), "valid")) == valid
    assert set(pairs(data.load("gowalla", path, valid_share=0.3, seed=5, cache=tmp_path), "valid")) != valid


def test_gowalla_rejects_bad_input(tmp_path) -> None:
    for train, sentence in (
        ("0 1\n1 x\n", r"train\.txt, line 2 is not a user and items"),
        ("0 1 -3\n", r"line 1 is not a user and items"),
        ("0\n", r"has no line with a user and items"),
    ):
        with pytest.raises(InputError, match=sentence):
            data.load("gowalla", gowalla_files(tmp_path / "g", train, "0 1\n"), cache=tmp_path)
    path = gowalla_files(tmp_path / "g", "0 1 2\n", "0 3\n")
    for options, sentence in (
        ({"valid_share": 1.0}, "valid_share = 1.0 is not a share in"),
        ({"valid_share": 0.1, "select_on_test": True}, "both say what the valid split is"),
        ({"share": 0.1}, "no option 'share'"),
    ):
        with pytest.raises(InputError, match=sentence):
            data.load("gowalla", path, cache=tmp_path, **options)
    with pytest.raises(InputError, match=r"has no train\.txt or train\.txt\.zst"):
        data.load("gowalla", tmp_path)


def test_gowalla_facts(shared_data, tmp_path) -> None:
    """The split of the papers, and popularity as they measure it."""
    if not (shared_data / "gowalla").is_dir():
        pytest.skip("there is no gowalla among the real data sets")
    ds = data.load("gowalla", shared_data / "gowalla", cache=tmp_path)
    assert ds.meta["rows"] == {"train": 810_128, "test": 217_242}
    assert (ds.vocabulary["user"].size, ds.vocabulary["item"].size) == (29_858, 40_981)
    assert ds.meta["unknown"]["test"] == {"user": 0, "item": 0}
    assert (ds.history("train").lengths()[1:] > 0).all()
    from recfast import models, train

    popular = models.build("Popularity", ds.schema)
    popular.prepare(ds)
    found = train.evaluate(popular, ds, k=(20,))
    assert found["users"] == 29_858
    assert found["recall@20"] == pytest.approx(0.0416, abs=5e-5)
    assert found["ndcg@20"] == pytest.approx(0.0317, abs=5e-5)


def test_missing_files(tmp_path) -> None:
    for name, options, sentence in [
        ("ml-100k", {}, "needs path=; expected a folder with u.data, u.item, u.user"),
        ("ml-100k", {"path": tmp_path / "nowhere"}, "is not a folder; expected a folder with u.data"),
        ("ml-100k", {"path": tmp_path}, "has no u.data or u.data.zst"),
        ("frappe", {"path": tmp_path}, "has no frappe.train.rebuilt.libfm"),
        ("ml100k", {}, "there is no data set 'ml100k'.*'ml-100k'"),
        ("ml-100k", {"path": tmp_path, "negative": 3}, "no option 'negative'.*'negatives'"),
        ("ml-100k", {"path": tmp_path, "negatives": -1}, "negatives = -1"),
    ]:
        with pytest.raises(InputError, match=sentence):
            data.load(name, **options)
    for file in ("u.data", "u.item", "u.user"):
        (tmp_path / file).write_text("not\ta table\n")
    with pytest.raises(InputError, match=r"u\.data is not what it should be"):
        data.load("ml-100k", tmp_path)
