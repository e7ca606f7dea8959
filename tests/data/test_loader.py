"""The loader: every row once, in an order that a resume repeats bit by bit."""

from __future__ import annotations

import threading
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import data
from recfast.data import Categorical, Loader, Numeric, Schema, Sequence, loader
from recfast.data.dataset import gather_jagged
from recfast.errors import InputError


@pytest.fixture(scope="module")
def ds(tmp_path_factory) -> data.Dataset:
    rng = np.random.default_rng(3)
    rows = 1003
    frame = pl.DataFrame(
        {
            "user": rng.integers(0, 40, rows),
            "item": np.arange(rows),
            "label": rng.integers(0, 2, rows),
            "ts": rng.integers(0, 300, rows),
            "price": rng.normal(size=rows),
        }
    )
    schema = Schema(
        [Categorical("user", role="user"), Categorical("item", role="item"), Sequence("history", max_length=7),
         Numeric("price")],
        time="ts",
        group="user",
    )  # fmt: skip
    return data.prepare(schema, frame, cache=tmp_path_factory.mktemp("cache"))


def same(a: data.Batch, b: data.Batch) -> bool:
    parts = [
        torch.equal(a.ids, b.ids),
        torch.equal(a.numeric, b.numeric),
        torch.equal(a.label, b.label),
        torch.equal(a.group, b.group),
        *(torch.equal(x, y) for name in a.sequences for x, y in zip(a.sequences[name], b.sequences[name], strict=True)),
    ]
    return all(parts)


def test_batch_contract(ds) -> None:
    batch = next(iter(Loader(ds.train, 64)))
    assert (batch.ids.dtype, batch.ids.shape) == (torch.int64, (64, 2))
    assert (batch.numeric.dtype, batch.numeric.shape) == (torch.float32, (64, 1))
    assert (batch.label.dtype, batch.group.dtype) == (torch.float32, torch.int64)
    history = batch.sequences["history"]
    assert history.values.dtype == history.offsets.dtype == torch.int64
    assert history.offsets.shape == (65,)
    assert history.offsets[-1] == len(history.values)
    assert history.lengths().max() <= 7
    assert torch.equal(batch.column("item"), batch.ids[:, 1])
    assert batch.candidate_offsets is None
    assert len(batch.to("cpu")) == 64
    with pytest.raises(InputError, match="no column 'itm'"):
        batch.column("itm")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 100, 1003, 5000])
def test_every_row_once(ds, shuffle, drop_last, batch_size) -> None:
    batches = Loader(ds.train, batch_size, shuffle=shuffle, drop_last=drop_last)
    found = [batch.column("item") for batch in batches]
    assert len(found) == len(batches)
    items = torch.cat(found).tolist() if found else []
    assert len(items) == len(set(items)) == (1003 // batch_size * batch_size if drop_last else 1003)
    if not shuffle:
        assert items == ds.train.column("item").tolist()[: len(items)]


def test_rows_stay_together(ds) -> None:
    """A shuffled row carries its own label, number, group and history."""
    whole = ds.train.gather(np.arange(len(ds.train)))
    row_of = {int(item): i for i, item in enumerate(whole.column("item"))}
    for batch in Loader(ds.train, 97, shuffle=True, seed=5):
        rows = [row_of[int(item)] for item in batch.column("item")]
        assert torch.equal(batch.label, whole.label[rows])
        assert torch.equal(batch.numeric, whole.numeric[rows])
        assert torch.equal(batch.group, whole.group[rows])
        for b, row in enumerate(rows):
            assert torch.equal(batch.sequences["history"].row(b), whole.sequences["history"].row(row))


def test_order_depends_on_seed_and_epoch(ds) -> None:
    def items(seed: int, epoch: int) -> list[int]:
        batches = Loader(ds.train, 100, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return torch.cat([batch.column("item") for batch in batches]).tolist()

    assert items(1, 0) == items(1, 0)
    assert items(1, 0) != items(1, 1)
    assert items(1, 0) != items(2, 0)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 6, 11])
def test_resume_is_bit_equal(ds, stop, prefetch) -> None:
    """State taken after `stop` batches, with batches prefetched or not, goes on at the very next one."""
    first = Loader(ds.train, 100, shuffle=True, seed=9, prefetch=prefetch)
    first.set_epoch(2)
    rest, state = [], first.state_dict()
    for i, batch in enumerate(first):
        if i + 1 == stop:
            state = first.state_dict()
        if i >= stop:
            rest.append(batch)
    second = Loader(ds.train, 100, shuffle=True, seed=9, prefetch=prefetch)
    second.load_state_dict(state)
    second.set_epoch(state["epoch"])
    resumed = list(second)
    assert len(resumed) == len(rest) == 11 - stop
    assert all(same(a, b) for a, b in zip(resumed, rest, strict=True))
    assert len(list(second)) == 11, "the epoch after a resumed one is whole"


def test_prefetch_is_the_same_and_stops(ds) -> None:
    plain, ahead = Loader(ds.train, 50, shuffle=True), Loader(ds.train, 50, shuffle=True, prefetch=2)
    assert all(same(a, b) for a, b in zip(plain, ahead, strict=True))
    for _ in ahead:
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "recfast-loader"]


def test_prefetch_passes_errors_on(ds) -> None:
    with (
        mock.patch.object(data.Split, "gather", side_effect=RuntimeError("broken")),
        pytest.raises(RuntimeError, match="broken"),
    ):
        list(Loader(ds.train, 50, prefetch=2))


def test_rejects_bad_input(ds) -> None:
    for options, sentence in [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 2.5}, "batch_size = 2.5"),
        ({"batch_size": 1, "seed": -1}, "seed = -1"),
        ({"batch_size": 1, "prefetch": -1}, "prefetch = -1"),
    ]:
        with pytest.raises(InputError, match=sentence):
            Loader(ds.train, **options)
    state = Loader(ds.train, 10).state_dict()
    for change, sentence in [
        ({"batch_size": 11}, "batch_size = 11, this loader has 10"),
        ({"rows": 5}, "rows = 5"),
        ({"batch": 999}, "batch 999 of 101"),
    ]:
        with pytest.raises(InputError, match=sentence):
            Loader(ds.train, 10).load_state_dict({**state, **change})
    with pytest.raises(InputError, match="the state has no 'epoch'"):
        Loader(ds.train, 10).load_state_dict({"batch": 1})


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 400), st.integers(1, 9), st.integers(1, 5), st.integers(1, 60))
def test_block_shuffle(rows, block, window, batch) -> None:
    """Beyond the limit, the order is still a permutation, however it is cut, and the same on each reading."""
    with mock.patch.multiple(loader, FULL_SHUFFLE_ROWS=1, BLOCK_ROWS=block, WINDOW_BLOCKS=window):
        order = loader._Order(rows, True, 3, 1)
        whole = order.rows(0, rows)
        assert sorted(whole) == list(range(rows))
        again = loader._Order(rows, True, 3, 1)
        cut = [again.rows(start, min(start + batch, rows)) for start in range(0, rows, batch)]
        assert np.concatenate(cut).tolist() == whole.tolist()
        middle = loader._Order(rows, True, 3, 1).rows(rows // 2, rows)
        assert middle.tolist() == whole[rows // 2 :].tolist()


@given(st.lists(st.integers(0, 6), max_size=12), st.none() | st.integers(1, 4), st.data())
def test_gather_jagged(lengths, last, more) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    values = np.arange(offsets[-1], dtype=np.int32)
    rows = np.array(
        more.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9) if lengths else st.just([])), dtype=np.int64
    )
    out, ends = gather_jagged(values, offsets[rows], offsets[rows + 1], last)
    for i, row in enumerate(rows):
        expected = values[offsets[row] : offsets[row + 1]]
        assert out[ends[i] : ends[i + 1]].tolist() == (expected if last is None else expected[-last:]).tolist()
    assert ends[-1] == len(out)


def test_take(ds) -> None:
    some = ds.train.take([5, 3, 5])
    assert some.ids.tolist() == ds.train.ids[[5, 3, 5]].tolist()
    assert some.take(np.array([False, True, False])).column("item").tolist() == [ds.train.column("item")[3]]
    assert len(ds.train.positives()) == int(ds.train.label.sum())
    assert (ds.train.positives().label == 1).all()
    assert sum(len(batch) for batch in Loader(some, 2)) == 3
    with pytest.raises(InputError, match=r"rows\[0\] = 1003 is outside \[0, 1003\)"):
        ds.train.take([1003])
    with pytest.raises(InputError, match="a mask of shape"):
        ds.train.take(np.ones(3, dtype=bool))


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> data.Dataset:
    """Users who are shown several items at a moment, and liked some of them."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 6, 60)
    frame = pl.DataFrame(
        {
            "user": np.repeat(rng.integers(0, 9, 60), sizes),
            "item": rng.integers(0, 50, sizes.sum()),
            "label": rng.integers(0, 2, sizes.sum()),
            "ts": np.repeat(np.arange(60), sizes),
        }
    )
    schema = Schema(
        [Categorical("user", role="user"), Categorical("item", role="item"), Sequence("history", max_length=7)],
        time="ts",
    )
    return data.prepare(schema, frame, cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("shuffle", [False, True])
def test_shared_histories_are_those_of_the_rows(requests, shuffle) -> None:
    split = requests.train
    begins = split.requests()
    assert begins[0] == 0
    assert begins[-1] == len(split)
    assert (np.diff(begins) > 1).any()
    loader = Loader(split, 7, shuffle=shuffle, seed=1, shared=True)
    assert len(loader) == -(-(len(begins) - 1) // 7)
    found = []
    for batch in loader:
        offsets, history = batch.candidate_offsets, batch.sequences["history"]
        assert offsets[0] == 0
        assert offsets[-1] == len(batch)
        assert len(history.offsets) == len(offsets) <= 8
        for b in range(len(offsets) - 1):
            rows = slice(int(offsets[b]), int(offsets[b + 1]))
            for ids, label in zip(batch.ids[rows].tolist(), batch.label[rows].tolist(), strict=True):
                found.append((ids, label, history.row(b).tolist()))
    plain = next(iter(Loader(split, len(split))))
    rows = [
        (plain.ids[r].tolist(), plain.label[r].item(), plain.sequences["history"].row(r).tolist())
        for r in range(len(split))
    ]
    assert sorted(found) == sorted(rows)
    assert (found == rows) != shuffle


def test_shared_batches_resume(requests) -> None:
    first = Loader(requests.train, 5, shuffle=True, seed=2, shared=True)
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    second = Loader(requests.train, 5, shuffle=True, seed=2, shared=True)
    second.load_state_dict(state)
    for one, other in zip(batches, second, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.candidate_offsets, other.candidate_offsets)
    with pytest.raises(InputError, match="Loader: the state has rows"):
        Loader(requests.train, 5, shuffle=True, seed=2).load_state_dict(state)


def test_histories_cut_shorter(requests) -> None:
    short = requests.limited(2)
    assert (short.schema.sequences[0].max_length, requests.schema.sequences[0].max_length) == (2, 7)
    assert short.schema.rows("item") == requests.schema.rows("item")
    long, cut = (next(iter(Loader(d.train, 200))).sequences["history"] for d in (requests, short))
    for b in range(len(long.offsets) - 1):
        assert cut.row(b).tolist() == long.row(b).tolist()[-2:]
    with pytest.raises(InputError, match=r"Dataset.limited: max_length = 0 is outside \[1, any length\]"):
        requests.limited(0)


def test_raw_lists_are_not_shared(tmp_path) -> None:
    frame = pl.DataFrame({"user": [1, 1], "item": [1, 2], "label": [0, 1], "history": [[1], [1, 2]]})
    schema = Schema([Categorical("user", role="user"), Categorical("item", role="item"), Sequence("history")])
    with pytest.raises(InputError, match="the rows of train share no histories"):
        Loader(data.prepare(schema, frame, cache=tmp_path).train, 2, shared=True)
