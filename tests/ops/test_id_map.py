"""The map from ids to rows against a dict, in any sequence of calls."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast.errors import InputError
from recfast.ops import IdMap
from recfast.ops._library import REGISTRY
from recfast.ops.id_map import MAX_ROWS

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63)]


def unmix(x):
    """The id whose mix is `x`, so that a test can choose where ids want to stand."""
    mask = 2**64 - 1

    def unshift(y, by):
        z = y
        for _ in range(64 // by + 1):
            z = y ^ z >> by
        return z

    x = unshift(x, 31) * pow(0x94D049BB133111EB, -1, 2**64) & mask
    x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    x = unshift(x, 30)
    return x - 2**64 if x >= 2**63 else x


# Few ids, so that they meet again: extremes, equal low bits, and ids that all want the last slot (and so go around the
# end of the array) or the first.
POOL = [
    *EXTREMES,
    *(i << 32 for i in range(1, 12)),
    *(unmix(2**64 - 1 - i) for i in range(12)),
    *(unmix(i) for i in range(1, 9)),
]
BATCHES = st.lists(st.sampled_from(POOL), max_size=30)
CALLS = st.lists(
    st.one_of(BATCHES.map(lambda ids: ("observe", ids)), st.integers(1, 4).map(lambda age: ("expire", age))),
    max_size=12,
)


def tensor(ids):
    return torch.tensor(ids, dtype=torch.int64)


def check_invariants(map_):
    """Every id is found from its home on without a gap, sizes agree, and no two ids share a row."""
    taken = map_.slots[:, 2] != 0
    assert int(taken.sum()) == map_.known <= map_.slots.shape[0] // 4 * 3
    entries = map_.entries()
    assert torch.equal(map_.find(entries["ids"]), entries["rows"].long())
    rows = entries["rows"][entries["rows"] >= 0]
    assert rows.unique().numel() == rows.numel() == len(map_)
    assert torch.equal(entries["ids"], entries["ids"].unique())
    assert not map_.slots[~taken].any()


@given(
    calls=CALLS,
    min_count=st.integers(1, 3),
    first_row=st.integers(0, 2),
    room=st.sampled_from([0, 1, 5, 100]),
)
def test_matches_reference(calls, min_count, first_row, room, poisoned_empty):
    options = {"min_count": min_count, "first_row": first_row, "max_rows": first_row + room}
    map_, wanted = IdMap(**options), IdMap.reference(**options)
    for now, (call, value) in enumerate(calls):
        if call == "observe":
            got = map_.observe(tensor(value), now)
            rows, new = wanted.observe(value, now)
            assert got.rows.tolist() == rows
            assert got.new_ids.tolist() == new
            assert got.new_rows.tolist() == wanted.find(new)
        else:
            assert map_.expire(max(0, now - value)).tolist() == wanted.expire(now - value)
        check_invariants(map_)
        assert (map_.known, len(map_), map_.next_row) == (len(wanted.entries), len(wanted), wanted.next_row)
    assert map_.find(tensor(POOL)).tolist() == wanted.find(POOL)
    known = [wanted.entries.get(id_, [-1, 0, -1]) for id_ in POOL]
    assert map_.counts(tensor(POOL)).tolist() == [count for _, count, _ in known]
    assert map_.last_seen(tensor(POOL)).tolist() == [seen for _, _, seen in known]
    assert map_.ids().tolist() == sorted(id_ for id_, entry in wanted.entries.items() if entry[0] >= 0)


def test_unmix_is_the_inverse():
    """Ids chosen by it stand where they were meant to: at the end of the array, then around it."""
    map_ = IdMap()
    map_.observe(tensor([unmix(2**64 - 1 - i) for i in range(3)]), 0)
    assert [slot for slot in range(16) if map_.slots[slot, 2] != 0] == [0, 1, 15]
    check_invariants(map_)


def test_grows_and_loses_nothing():
    """200,000 ids in one batch and in many, with growth in the middle of both; then most of them go."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-(2**63), 2**63 - 1, (200_000,), generator=generator)
    ids = torch.cat([ids, ids[:50_000]])[torch.randperm(250_000, generator=generator)]
    one, many = IdMap(), IdMap()
    rows = one.observe(ids, 0).rows
    parts = torch.cat([many.observe(part, 0).rows for part in ids.split(999)])
    assert torch.equal(rows, parts)
    for map_ in (one, many):
        check_invariants(map_)
        assert torch.equal(map_.find(ids), rows)
        assert len(map_) == 200_000
    assert rows.tolist() == IdMap.reference().observe(ids.tolist(), 0)[0]
    assert one.memory_bytes() <= 54 * 200_000
    some = ids.unique()[:1000]
    kept = one.find(some)
    one.observe(some, 7)
    freed = one.expire(7)
    assert freed.numel() == 199_000
    assert torch.equal(one.find(some), kept)
    assert one.slots.shape[0] <= 4096
    check_invariants(one)
    new = ids[~torch.isin(ids, some)][:10]
    assert torch.equal(one.observe(new, 8).new_rows, freed[:10])  # the lowest first


def test_threads_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 40_000, (30_000,), generator=generator) for _ in range(4)]
    before = torch.get_num_threads()
    maps = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        map_ = IdMap(min_count=2)
        answers = [map_.observe(batch, now).rows for now, batch in enumerate(batches)]
        answers.append(map_.find(torch.arange(50_000)))
        maps.append((map_, answers))
    torch.set_num_threads(before)
    assert torch.equal(maps[0][0].slots, maps[1][0].slots)
    assert all(torch.equal(a, b) for a, b in zip(maps[0][1], maps[1][1], strict=True))


def test_order_within_a_batch_decides_row_numbers_alone():
    generator = torch.Generator().manual_seed(2)
    a, b = IdMap(min_count=3), IdMap(min_count=3)
    for now in range(5):
        ids = torch.randint(0, 500, (700,), generator=generator)
        order = torch.randperm(700, generator=generator)
        first, second = a.observe(ids, now), b.observe(ids[order], now)
        assert torch.equal((first.rows >= 0)[order], second.rows >= 0)
        assert set(first.new_ids.tolist()) == set(second.new_ids.tolist())
    assert torch.equal(a.ids(), b.ids())
    assert torch.equal(a.entries()["counts"], b.entries()["counts"])


def test_known_values():
    """Admission at the third occurrence, wherever the batches are cut."""
    map_ = IdMap(min_count=3)
    assert map_.observe(tensor([7, 7]), 0).rows.tolist() == [-1, -1]
    assert map_.observe(tensor([9, 9, 7]), 1).rows.tolist() == [-1, -1, 0]
    assert map_.observe(tensor([[9, 5], [5, 5]]), 2).rows.tolist() == [[1, 2], [2, 2]]
    assert map_.counts(tensor([7, 9, 5, 4])).tolist() == [3, 3, 3, 0]
    assert map_.last_seen(tensor([7, 9, 5, 4])).tolist() == [1, 2, 2, -1]
    assert (len(map_), map_.known, map_.next_row) == (3, 3, 3)
    map_.clear()
    assert (len(map_), map_.known, map_.next_row) == (0, 0, 0)
    assert map_.find(torch.tensor([7], dtype=torch.int32)).tolist() == [-1]


def test_counts_stop_at_the_end_of_their_type():
    map_ = IdMap(min_count=2**31 - 1)
    map_.observe(tensor([5]), 0)
    entries = map_.entries()
    entries["counts"][0] = 2**31 - 2
    map_.restore(entries, 0)
    assert map_.observe(tensor([5]), 0).rows.tolist() == [0]
    map_.observe(tensor([5, 5]), 0)
    assert map_.counts(tensor([5])).tolist() == [2**31 - 1]


def test_ids_wait_for_rows_that_become_free():
    map_ = IdMap(max_rows=2)
    assert map_.observe(tensor([1, 2, 3, 3]), 0).rows.tolist() == [0, 1, -1, -1]
    assert map_.observe(tensor([2, 3]), 1).rows.tolist() == [1, -1]
    assert map_.expire(1).tolist() == [0]
    assert map_.find(tensor([3])).tolist() == [-1]
    assert map_.observe(tensor([4, 3]), 2).rows.tolist() == [0, -1]
    assert map_.counts(tensor([3])).tolist() == [4]


def test_full_map_may_refuse():
    map_ = IdMap(max_rows=3, min_count=2, full="error")
    map_.observe(tensor([1, 1, 2, 3, 4, 5, 6]), 0)
    before = copy.deepcopy(map_)
    with pytest.raises(InputError, match="3 ids of the batch would get a row, and 2 rows are left"):
        map_.observe(tensor([2, 3, 7, 8, 8, 1]), 1)
    assert torch.equal(map_.slots, before.slots)
    assert (map_.known, len(map_)) == (before.known, len(before)) == (6, 1)
    assert map_.observe(tensor([2, 3, 7, 1, 1]), 1).rows.tolist() == [1, 2, -1, 0, 0]


@given(calls=CALLS, min_count=st.integers(1, 2))
def test_restored_maps_go_on_alike(calls, min_count):
    map_ = IdMap(min_count=min_count, first_row=1)
    other = IdMap(min_count=min_count, first_row=1)
    for now, (call, value) in enumerate(calls):
        argument = tensor(value) if call == "observe" else max(0, now - value)
        answers = [getattr(m, call)(argument, *([now] if call == "observe" else [])) for m in (map_, other)]
        for a, b in zip(*answers, strict=True):
            assert torch.equal(a, b)
        fresh = IdMap(min_count=min_count, first_row=1)
        fresh.observe(tensor([3, 4, 4]), 0)  # to be forgotten
        fresh.restore(other.entries(), other.next_row)
        check_invariants(fresh)
        other = fresh
    assert all(torch.equal(map_.entries()[name], other.entries()[name]) for name in map_.entries())


def test_restore_refuses_what_no_map_has():
    map_ = IdMap(first_row=1)
    map_.observe(tensor([5, 6, 7]), 3)
    good, next_row = map_.entries(), map_.next_row
    for name, value, sentence in (
        ("ids", tensor([5, 6, 6]), "ids must ascend"),
        ("ids", tensor([6, 5, 7]), "ids must ascend"),
        ("rows", torch.tensor([1, 2, 2], dtype=torch.int32), "rows must differ"),
        ("rows", torch.tensor([1, 2, 4], dtype=torch.int32), r"rows must be -1 or in \[1, next_row = 4\)"),
        ("rows", torch.tensor([0, 2, 3], dtype=torch.int32), r"rows must be -1 or in \[1, next_row = 4\)"),
        ("rows", torch.tensor([-2, 2, 3], dtype=torch.int32), r"rows must be -1 or in \[1, next_row = 4\)"),
        ("counts", torch.tensor([1, 0, 1], dtype=torch.int32), "counts must be positive"),
        ("last_seen", torch.tensor([1, -1, 1], dtype=torch.int32), "last_seen not negative"),
    ):
        with pytest.raises(InputError, match=f"IdMap.restore: .*{sentence}"):
            map_.restore({**good, name: value}, next_row)
    with pytest.raises(ValueError, match=r"rows must have shape \[3\], got \[2\]"):
        map_.restore({**good, "rows": good["rows"][:2]}, next_row)
    assert map_.find(tensor([5, 6, 7])).tolist() == [1, 2, 3]


def test_find_writes_nothing():
    map_ = IdMap()
    map_.observe(tensor(POOL), 0)
    slots, seen = map_.slots.clone(), map_.seen.clone()
    map_.find(torch.arange(10_000))
    map_.counts(tensor(POOL))
    assert torch.equal(map_.slots, slots)
    assert torch.equal(map_.seen, seen)
    assert map_.find(tensor([])).shape == (0,)
    assert map_.find(torch.zeros(2, 0, 3, dtype=torch.int64)).shape == (2, 0, 3)
    assert map_.find(tensor(POOL).reshape(2, -1).T).tolist() == map_.find(tensor(POOL)).reshape(2, -1).T.tolist()


def test_opcheck(opcheck):
    opcheck(REGISTRY["id_map_find"])


def test_ids_without_sign_are_viewed():
    """What a hash function of 64 bits gives: the upper half of uint64 as negative ids."""
    import numpy as np

    ids = np.array([2**64 - 1, 2**63, 5], dtype=np.uint64)
    map_ = IdMap()
    map_.observe(torch.from_numpy(ids.view(np.int64)), 0)
    assert map_.find(tensor([-1, -(2**63), 5])).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda m: m.find([1]), TypeError, "IdMap.find: ids must be a tensor, got list"),
        (lambda m: m.observe(torch.ones(2), 0), TypeError, "IdMap.observe: ids must be int32 or int64, got float32"),
        (lambda m: m.counts(torch.ones(2)), TypeError, "IdMap.counts: ids must be int32 or int64, got float32"),
        (lambda m: m.observe(tensor([1]), -1), ValueError, r"IdMap.observe: now = -1 is outside \[0, 2147483648\)"),
        (lambda m: m.expire(2**31), ValueError, r"IdMap.expire: before = 2147483648 is outside"),
        (lambda m: IdMap(min_count=0), ValueError, r"min_count = 0 is outside \[1, 2147483648\)"),
        (lambda m: IdMap(max_rows=-1), ValueError, r"max_rows = -1 is outside \[0, "),
        (lambda m: IdMap(max_rows=MAX_ROWS + 1), ValueError, "max_rows = .* is outside"),
        (lambda m: IdMap(full="drop"), ValueError, "full must be one of default, error, got 'drop'"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    map_ = IdMap()
    with pytest.raises(error, match=sentence):
        call(map_)
    assert map_.known == 0
