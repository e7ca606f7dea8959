"""The known data sets, read from their publishers' files where these are at hand."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

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
