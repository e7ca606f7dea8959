import concurrent.futures
import copy
import json
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.errors import InputError
from recfast.index import Bitmap, CodeIndex, _file, _guard, code_index
from recfast.index._guard import Guard

OLD_FILE = Path(__file__).parent / "files" / "code_index_1.safetensors"


def same(answer, wanted):
    assert torch.equal(answer[1], wanted[1])
    assert torch.equal(answer[0], wanted[0])


def table_for(index, queries=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that ties are many.
    return torch.randint(-2, 3, (queries, index.codes.shape[1], index.n_codes), generator=generator) / 2


class Model:
    """The slow twin: a dict from id to (codes, bias), searched through an index built anew."""

    def __init__(self, codes, ids, bias):
        self.items = {int(i): (row, b) for i, row, b in zip(ids, codes, bias, strict=True)}

    def only(self, ids):
        model = Model([], [], [])
        model.items = {i: self.items[i] for i in ids}
        return model

    def search(self, table, k, n_codes, with_bias):
        ids = sorted(self.items)
        width = table.shape[1]
        codes = np.array([self.items[i][0] for i in ids], dtype=np.uint16).reshape(-1, width)
        bias = np.array([self.items[i][1] for i in ids], dtype=np.float32)
        index = ops.Codes(
            torch.from_numpy(codes), torch.from_numpy(bias) if with_bias else None, torch.tensor(ids).long()
        )
        return ops.code_search.reference(index, table, k)


def sparse(table):
    """A dense table by its entries that are not 0."""
    flat = table.reshape(len(table), table.shape[1] * table.shape[2])
    rows, codes = flat.nonzero(as_tuple=True)
    offsets = torch.zeros(len(flat) + 1, dtype=torch.int64)
    offsets[1:] = rows.bincount(minlength=len(flat)).cumsum(0)
    return ops.SparseTable(codes, flat[rows, codes], offsets)


@pytest.fixture(scope="module")
def ids_are_sorted_often():
    """After every few new ids, as a large index does after many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_index, "_MOST_RECENT", 2)
        yield


STEPS = ["add", "add named", "update", "remove", "compact", "save", "mmap", "copy"]


@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.sampled_from([0, 1, 5, 40, 400]),
    order=st.sampled_from(["auto", "none", "lex"]),
    n_codes=st.sampled_from([3, 256, 300]),
    named=st.booleans(),
    with_bias=st.booleans(),
    steps=st.lists(st.sampled_from(STEPS), max_size=8),
)
def test_changes_equal_a_rebuilt_index(
    seed, items, order, n_codes, named, with_bias, steps, tmp_path_factory, ids_are_sorted_often
):
    random = np.random.default_rng(seed)
    kind = np.uint8 if n_codes <= 256 else np.uint16

    def some_codes(n):
        return random.integers(0, n_codes, (n, 3)).astype(kind)

    def some_bias(n):
        return random.integers(-2, 3, n).astype(np.float32) if with_bias else np.zeros(n, dtype=np.float32)

    codes, bias = some_codes(items), some_bias(items)
    ids = random.permutation(1000)[:items] if named else None
    given_codes, given_bias = codes.copy(), bias.copy()
    index = CodeIndex(codes, n_codes, bias=bias if with_bias else None, ids=ids, order=order)
    model = Model(codes, range(items) if ids is None else ids, bias)
    for step in steps:
        some = random.permutation(sorted(model.items))[: random.integers(0, 6)]
        n = len(some)
        if step.startswith("add"):
            n = int(random.integers(0, 6))
            new = some_codes(n), some_bias(n)
            names = None
            if step == "add named":
                names = np.setdiff1d(random.permutation(2000), sorted(model.items))[:n]
            names = index.add(new[0], names, bias=new[1] if with_bias else None)
            assert not set(names.tolist()) & set(model.items)
            model.items.update({int(i): (c, b) for i, c, b in zip(names, *new, strict=True)})
        elif step == "update":
            new = some_codes(n), some_bias(n)
            index.update(some, new[0], bias=new[1] if with_bias else None)
            model.items.update({int(i): (c, b) for i, c, b in zip(some, *new, strict=True)})
        elif step == "remove":
            index.remove(torch.from_numpy(some) if n else [])
            for one in some:
                del model.items[int(one)]
        elif step == "compact":
            index.compact()
            assert index.n_slots == len(index)
        elif step == "copy":
            index = copy.deepcopy(index) if seed % 2 else pickle.loads(pickle.dumps(index))
        else:
            path = tmp_path_factory.mktemp("index") / "index"
            index.save(path)
            index = CodeIndex.load(path, mmap=step == "mmap")
        table = table_for(index, seed=seed % 1000)
        few = table * (torch.rand(table.shape, generator=torch.Generator().manual_seed(seed % 1000)) < 0.2)
        assert len(index) == len(model.items)
        wanted = model.search(table, 12, n_codes, with_bias)
        for plan in ("auto", "scan", "scalar") + ("block_max",) * (order == "lex"):
            same(index.search(table, 12, plan=plan), wanted)
        # The first ten are the first of many, and k may exceed N.
        longer = index.search(table, 1000)
        same((longer[0][:, :12], longer[1][:, :12]), wanted)
        wanted = model.search(few, 12, n_codes, with_bias)
        for plan in ("auto", "scan", "postings"):
            same(index.search(sparse(few), 12, plan=plan), wanted)
        # Masks by id agree with masks of slots.
        allowed = sorted(model.items)[::2]
        mask = index.allow(allowed)
        assert ~mask == index.deny(allowed)
        both = model.only(allowed).search(table, 12, n_codes, with_bias)
        for one in (mask, mask, mask.to_mask(), ~index.deny(allowed)):
            same(index.search(table, 12, mask=one), both)
        same(
            index.search(sparse(few), 12, mask=mask, plan="postings"),
            model.only(allowed).search(few, 12, n_codes, with_bias),
        )
        if items and model.items:
            np.testing.assert_array_equal(
                index.codes.numpy()[index.slots_of(sorted(model.items))],
                [model.items[i][0] for i in sorted(model.items)],
            )
    # What the index was built from is still as it was.
    np.testing.assert_array_equal(codes, given_codes)
    np.testing.assert_array_equal(bias, given_bias)


def test_known_values():
    index = CodeIndex(np.array([[0, 1], [1, 1], [1, 0]], dtype=np.uint8), 2, ids=[30, 20, 10])
    table = np.array([[[0, 1], [0, 10]]], dtype=np.float32)
    scores, ids = index.search(table, 4)
    assert (scores.tolist(), ids.tolist()) == ([[11.0, 10.0, 1.0, -torch.inf]], [[20, 30, 10, -1]])
    index.remove([20])
    index.update([10], np.array([[0, 1]]))
    assert index.search(table, 3)[1].tolist() == [[10, 30, -1]]
    assert index.add(np.array([[1, 1]])).tolist() == [31]
    assert index.search(table, 3)[1].tolist() == [[31, 10, 30]]
    assert index.ids.tolist() == [30, 20, 10, 31]
    assert index.live.tolist() == [True, False, True, True]
    assert index.search(table, 3, mask=np.array([True, True, False, False]))[1].tolist() == [[30, -1, -1]]


def test_a_removed_id_may_return(tmp_path):
    index = CodeIndex(np.zeros((3, 1), dtype=np.uint8), 2)
    index.remove([1])
    assert index.add(np.ones((1, 1), dtype=np.uint8), [1]).tolist() == [1]
    index.save(tmp_path / "index")
    for one in (index, CodeIndex.load(tmp_path / "index")):
        _, ids = one.search(torch.tensor([[[0.0, 1.0]]]), 4)
        assert ids.tolist() == [[1, 0, 2, -1]]
        assert one.n_slots == 4
        assert one.add(np.ones((1, 1), dtype=np.uint8)).tolist() == [3]


def test_numpy_and_torch_agree():
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (100, 4))
    bias = random.standard_normal(100).astype(np.float32)
    table = random.standard_normal((2, 4, 16)).astype(np.float32)
    mask = random.random((2, 100)) < 0.5
    wanted = CodeIndex(codes.astype(np.uint8), 16, bias=bias).search(table, 20, mask=mask)
    for kind in (torch.uint8, torch.int64, torch.int32):
        index = CodeIndex(torch.from_numpy(codes).to(kind), 16, bias=torch.from_numpy(bias))
        same(index.search(torch.from_numpy(table), 20, mask=torch.from_numpy(mask)), wanted)
    same(ops.code_search(index, torch.from_numpy(table), 20, mask=torch.from_numpy(mask)), wanted)


def test_arrays_given_are_left_alone_and_not_looked_at_again():
    codes, bias, ids = np.zeros((10, 2), np.uint8), np.zeros(10, np.float32), np.arange(10)
    for array in (codes, bias, ids):
        array.flags.writeable = False
    index = CodeIndex(codes, bias=bias, ids=ids)
    index.update([0], np.ones((1, 2), dtype=np.int64), bias=np.ones(1, np.float32))
    index.add(np.ones((1, 2), np.uint8), bias=np.ones(1, np.float32))
    assert codes.sum() == bias.sum() == 0
    for array in (codes, bias, ids):
        array.flags.writeable = True
        array[:] = 7
    assert index.ids.tolist() == [*range(11)]
    assert index.bias.tolist() == [1.0] + [0.0] * 9 + [1.0]
    assert index.codes.sum() == 4


@pytest.mark.parametrize("order", ["none", "lex"])
def test_masks_of_none_one_and_all(order):
    random = np.random.default_rng(2)
    index = CodeIndex(random.integers(0, 16, (300, 3)).astype(np.uint8), 16, order=order)
    table = table_for(index)
    everything = index.search(table, 300)
    one = np.arange(300) == 77
    assert index.search(table, 4, mask=one)[1].tolist() == [[77, -1, -1, -1]] * 3
    for mask in (np.zeros(300, bool), index.allow([]), index.deny(range(300)), np.zeros((3, 38), np.uint8)):
        scores, ids = index.search(table, 4, mask=mask)
        assert (ids == -1).all()
        assert (scores == -torch.inf).all()
    for mask in (np.ones(300, bool), index.deny([]), np.full(38, 255, np.uint8)):
        same(index.search(table, 300, mask=mask), everything)
    each = np.stack([one, ~one, random.random(300) < 0.5])
    wanted = [index.search(table[q : q + 1], 300, mask=each[q]) for q in range(3)]
    # The second call of a bitmap is answered by its bits laid out by position.
    bits = Bitmap.from_mask(each)
    for mask in (each, bits, bits, np.packbits(each, axis=1, bitorder="little")):
        same(index.search(table, 300, mask=mask), tuple(map(torch.cat, zip(*wanted, strict=True))))


def test_order_is_chosen_by_the_codes():
    random = np.random.default_rng(0)
    uniform = random.integers(0, 256, (40_000, 8)).astype(np.uint8)
    # 300 clusters, each of few codes in every codebook.
    clusters = random.integers(0, 256, (300, 8, 4))
    picks = clusters[random.integers(0, 300, 40_000)]
    clustered = np.take_along_axis(picks, random.integers(0, 4, (40_000, 8, 1)), axis=2)[:, :, 0].astype(np.uint8)
    assert CodeIndex(uniform).order == "none"
    assert CodeIndex(uniform, order="lex").order == "lex"
    assert CodeIndex(clustered, order="none").order == "none"
    assert CodeIndex(clustered[:1000]).order == "none"
    index = CodeIndex(clustered)
    assert index.order == "lex"
    table = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0))
    same(index.search(table, 100), CodeIndex(clustered, order="none").search(table, 100))
    wide = CodeIndex(clustered.astype(np.uint16) * 16, 4096)
    assert wide.order == "lex"
    assert CodeIndex(random.integers(0, 4096, (40_000, 8)), 4096).order == "none"


def test_the_tail_is_counted():
    random = np.random.default_rng(0)
    index = CodeIndex(random.integers(0, 256, (75, 4)).astype(np.uint8), order="lex")
    assert index.tail == 0
    assert repr(index) == "CodeIndex(75 items, 4 codebooks of 256 codes, in lexicographic order)"
    before = index.nbytes
    index.add(random.integers(0, 256, (20, 4)).astype(np.uint8))
    index.update([0, 1, 2, 3, 4, 80], random.integers(0, 256, (6, 4)).astype(np.uint8))
    assert index.tail == 25 / 95
    assert repr(index).endswith("in lexicographic order but for 26.3%)")
    assert index.nbytes > before
    index.remove(range(10))
    index.compact()
    assert index.tail == 0
    assert (len(index), index.n_slots) == (85, 85)
    assert index.ids.tolist() == [*range(10, 95)]
    assert CodeIndex(np.zeros((3, 1), np.uint8)).tail == 0


def test_memory_is_one_copy_of_the_codes():
    index = CodeIndex(np.zeros((64_000, 8), np.uint8), order="none")
    assert index.nbytes == 64_000 * 8
    sorted_too = CodeIndex(np.zeros((64_000, 8), np.uint8), order="lex")
    assert sorted_too.nbytes <= 64_000 * (8 + 8 + 8 / 7) + 1000


def test_lists_are_built_when_they_pay_and_dropped_on_a_change():
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (5000, 4)).astype(np.uint8)
    index = CodeIndex(codes)
    table = torch.zeros(40, 4, 256)
    table[torch.arange(40), 1, torch.arange(40)] = torch.rand(40, generator=torch.Generator().manual_seed(1)) - 0.2
    few = sparse(table)
    wanted = CodeIndex(codes).search(table, 10)
    same(index.search(few, 10), wanted)
    assert index._lists is None
    same(index.search(few, 10), wanted)
    lists = index._lists
    assert lists is not None
    index.remove(wanted[1][0, :3].tolist())
    assert index._lists is lists
    table_too = CodeIndex(codes)
    table_too.remove(wanted[1][0, :3].tolist())
    same(index.search(few, 10), table_too.search(table, 10))
    index.update([4000], codes[:1])
    assert index._lists is None
    table_too.update([4000], codes[:1])
    same(index.search(few, 10, plan="postings"), table_too.search(table, 10))
    # Counts are kept up to date, not taken anew.
    index.add(codes[:7])
    fresh = ops.posting_counts(index._packed, 256).numpy()
    np.testing.assert_array_equal(index._counts, fresh)


def test_a_batch_of_few_and_many_entries_is_split():
    random = np.random.default_rng(0)
    index = CodeIndex(random.integers(0, 256, (5000, 4)).astype(np.uint8), ids=random.permutation(9000)[:5000])
    table = torch.randn(6, 4, 256, generator=torch.Generator().manual_seed(1))
    table[1::2, :, 1:] = 0
    mask = random.random((6, 5000)) < 0.9
    few = sparse(table)
    index.search(few, 10, plan="postings")
    by_lists = index._is_cheap(few, 10, Bitmap.from_mask(mask))
    assert by_lists.tolist() == [False, True] * 3
    same(index.search(few, 10, mask=mask), index.search(table, 10, mask=mask))
    # A mask that leaves few items makes lists dear: most items in no list would be tried in vain.
    assert not index._is_cheap(few, 10, index.allow(index.ids[:5].tolist())).any()


def test_sparse_tables_of_all_kinds():
    index = CodeIndex(np.array([[0, 1], [1, 1], [1, 0]], dtype=np.uint8), 2)
    wanted = ([[2.0, 1.0, 0.0]], [[2, 1, 0]])
    codes, values, offsets = [1, 3], [2.0, -1.0], [0, 2]
    wanted = [[2.0, 1.0, -1.0]], [[2, 1, 0]]
    for table in (
        (np.array(codes), np.array(values, np.float32), np.array(offsets)),
        (torch.tensor(codes).int(), torch.tensor(values).bfloat16(), torch.tensor(offsets)),
        ops.SparseTable(torch.tensor(codes), torch.tensor(values), torch.tensor(offsets)),
    ):
        for plan in ("auto", "scan", "postings"):
            scores, ids = index.search(table, 3, plan=plan)
            assert (scores.tolist(), ids.tolist()) == wanted


def test_a_mask_from_before_compact_is_refused():
    index = CodeIndex(np.zeros((5, 1), dtype=np.uint8), 2)
    table = np.zeros((1, 1, 2), np.float32)
    mask = index.deny([3])
    assert index.search(table, 5, mask=mask)[1].tolist() == [[0, 1, 2, 4, -1]]
    index.compact()
    with pytest.raises(ValueError, match="mask was made before compact gave the items other slots"):
        index.search(table, 5, mask=mask & index.allow([1]))
    index.add(np.zeros((1, 1), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"mask must have shape \[6\], got \[5\]"):
        index.search(table, 5, mask=mask)


def test_searches_at_the_same_time():
    random = np.random.default_rng(1)
    index = CodeIndex(random.integers(0, 256, (5000, 8)).astype(np.uint8), ids=random.permutation(5000))
    tables = torch.from_numpy(random.standard_normal((16, 4, 8, 256)).astype(np.float32))
    masks = [Bitmap.from_mask(random.random(5000) < 0.5) for _ in range(3)] + [None]
    few = [sparse(table * (torch.rand(table.shape) < 0.01)) for table in tables]

    def work(i):
        mask = masks[i % 4]
        allowed = index.allow(range(i, 5000, 7))
        return [
            index.search(tables[i], 10, mask=mask),
            index.search(few[i], 10, mask=mask, plan="postings"),
            index.search(tables[i], 10, mask=allowed),
        ]

    wanted = [work(i) for i in range(16)]
    index._forget()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for answers, right in zip(pool.map(work, range(16)), wanted, strict=True):
            for answer, one in zip(answers, right, strict=True):
                same(answer, one)


def test_a_search_sees_the_items_before_or_after_a_change():
    """One thread changes the index all the time; whatever the others find is the answer of one of its states."""
    random = np.random.default_rng(1)
    codes = random.integers(0, 64, (3000, 4)).astype(np.uint8)
    table = torch.from_numpy(random.standard_normal((2, 4, 64)).astype(np.float32))
    few = sparse(table * (torch.from_numpy(random.random((2, 4, 64)) < 0.1)))
    index = CodeIndex(codes, 64)
    best = index.search(table, 40)[1].unique().tolist()
    moves = [
        lambda: index.remove(best[:20]),
        lambda: index.add(codes[best[:20]], best[:20]),
        lambda: index.update(best, codes[: len(best)]),
        lambda: index.compact(),
        lambda: index.update(best, codes[best]),
    ]

    def answers():
        return [index.search(table, 40), index.search(few, 40, plan="postings"), index.search(few, 40)]

    def key(answer):
        return answer[0].numpy().tobytes() + answer[1].numpy().tobytes()

    states = []
    for move in moves:
        move()
        states.append([key(answer) for answer in answers()])
    possible = [{state[i] for state in states} for i in range(3)]
    assert len(possible[0]) >= 3
    stop, seen, wrong = threading.Event(), [set(), set(), set()], []

    def search():
        while not stop.is_set():
            for i, answer in enumerate(answers()):
                seen[i].add(key(answer))
                if key(answer) not in possible[i]:
                    wrong.append(answer)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 1.0
    rounds = 0
    while time.monotonic() < end or rounds < 2:
        for move in moves:
            move()
        rounds += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(seen[0]) >= 1


def test_a_change_waits_for_reads_and_later_reads_for_the_change():
    guard, events = Guard(), []
    reading, release = threading.Event(), threading.Event()

    def read():
        with guard.reading:
            reading.set()
            release.wait(10)
            events.append("read")

    def change():
        with guard.changing:
            events.append("change")

    def read_later():
        with guard.reading:
            events.append("read later")

    threads = [threading.Thread(target=read)]
    threads[0].start()
    assert reading.wait(10)
    for work, asked in ((change, lambda: guard._asked == 1), (read_later, lambda: guard._waiting == {1: 1})):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        while not asked():
            time.sleep(0.001)
    assert events == []
    release.set()
    for thread in threads:
        thread.join(10)
    assert events == ["read", "change", "read later"]


CODES = np.zeros((3, 2), dtype=np.uint8)
TABLE = np.zeros((1, 2, 256), dtype=np.float32)


def few(codes, value=1.0, offsets=None):
    values = np.full(len(codes), value, dtype=np.float32)
    table = np.array(codes), values, np.array([0, len(codes)] if offsets is None else offsets)
    return CodeIndex(CODES).search(table, 1)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: CodeIndex([[0]]), TypeError, "codes must be a tensor or a numpy array, got list"),
        (lambda: CodeIndex(CODES + 0.5), TypeError, "codes must be integers, got float64"),
        (lambda: CodeIndex(CODES[0]), ValueError, r"codes must have shape \[N, M\], got \[2\]"),
        (lambda: CodeIndex(CODES + np.uint8(4), 4), IndexError, r"codes\[0, 0\] = 4 is outside \[0, 4\)"),
        (lambda: CodeIndex(CODES.astype(int) - 1), IndexError, r"codes\[0, 0\] = -1 is outside \[0, 256\)"),
        (lambda: CodeIndex(CODES, 0), ValueError, r"n_codes must be in \[1, 65536\], got 0"),
        (lambda: CodeIndex(CODES, order="up"), ValueError, "order must be one of auto, none, lex, got 'up'"),
        (lambda: CodeIndex(CODES[:, :0]), ValueError, r"codes must have shape \[N, M\], got \[3, 0\]"),
        (lambda: CodeIndex(CODES).search(TABLE, 1, plan="fast"), ValueError, "plan must be one of auto, scan, .*fast"),
        (lambda: CodeIndex(CODES).search(TABLE, 1, plan="postings"), ValueError, "needs a sparse table, got"),
        (lambda: CodeIndex(CODES).search(TABLE, 1, plan="block_max"), ValueError, "block_max needs"),
        (lambda: CodeIndex(CODES).search((TABLE, TABLE), 1), ValueError, "codes, values and offsets, got 2 parts"),
        (lambda: few([512]), IndexError, r"search: table.codes\[0\] = 512 is outside \[0, 512\)"),
        (lambda: few([3, 3]), ValueError, r"search: table.codes\[1\] must be above 3, the one before it, got 3"),
        (lambda: few([3], np.nan), ValueError, r"search: table.values\[0\] must be finite or -inf, got nan"),
        (lambda: few([3], offsets=[0, 2]), ValueError, r"search: table.offsets must rise from 0 to 1"),
        (lambda: few([0.5]), TypeError, "table.codes must be int64 or int32, got float64"),
        (lambda: CodeIndex(CODES).search(TABLE, 1, mask=np.ones(2, bool)), ValueError, r"mask must have shape \[3\]"),
        (lambda: CodeIndex(CODES, ids=[1, 2]), ValueError, r"ids must have shape \[3\], got \[2\]"),
        (lambda: CodeIndex(CODES, ids=[1, 2, 1]), ValueError, r"ids\[2\] = 1 is given twice"),
        (lambda: CodeIndex(CODES, ids=[1, -2, 3]), ValueError, r"ids\[1\] must be at least 0, got -2"),
        (lambda: CodeIndex(CODES, ids=[1.0, 2.0, 3.0]), TypeError, "ids must be integers, got float64"),
        (lambda: CodeIndex(CODES, bias=np.full(3, np.nan, np.float32)), ValueError, r"bias\[0\] must be finite"),
        (lambda: CodeIndex(CODES).search(np.zeros((1, 2, 16), np.float32), 1), ValueError, r"\[Q, 2, 256\]"),
        (lambda: CodeIndex(CODES).search(np.zeros((1, 2, 256)), 1), TypeError, "got float64"),
        (lambda: CodeIndex(CODES).search(np.full((1, 2, 256), np.nan, np.float32), 1), ValueError, "got nan"),
        (lambda: CodeIndex(CODES).add(CODES[:, :1]), ValueError, r"codes must have shape \[N, 2\], got \[3, 1\]"),
        (lambda: CodeIndex(CODES).add(CODES, [5, 1, 6]), ValueError, r"ids\[1\] = 1 is in the index already"),
        (lambda: CodeIndex(CODES).add(CODES, bias=np.zeros(3, np.float32)), ValueError, "bias must be left out"),
        (lambda: CodeIndex(CODES, bias=np.zeros(3, np.float32)).add(CODES), ValueError, "bias must be given"),
        (lambda: CodeIndex(CODES).update([3], CODES[:1]), ValueError, r"update: ids\[0\] = 3 is not in the index"),
        (lambda: CodeIndex(CODES).update([1, 1], CODES[:2]), ValueError, r"ids\[1\] = 1 is given twice"),
        (lambda: CodeIndex(CODES).remove([0, 7]), ValueError, r"remove: ids\[1\] = 7 is not in the index"),
        (lambda: CodeIndex(CODES).allow([7]), ValueError, r"allow: ids\[0\] = 7 is not in the index"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_a_refused_change_changes_nothing():
    index = CodeIndex(CODES, ids=[5, 6, 7])
    before = (index.codes.clone(), index.ids.clone())
    for change in (
        lambda: index.remove([5, 9]),
        lambda: index.add(CODES, [8, 9, 5]),
        lambda: index.update([5, 9], CODES[:2] + np.uint8(1)),
    ):
        with pytest.raises(ValueError, match="in the index"):
            change()
    assert len(index) == 3
    assert torch.equal(index.codes, before[0])
    assert torch.equal(index.ids, before[1])
    assert index.live is None


@pytest.fixture(params=["none", "lex"])
def stored(tmp_path, request):
    random = np.random.default_rng(3)
    index = CodeIndex(
        random.integers(0, 300, (50, 3)).astype(np.uint16),
        300,
        bias=random.standard_normal(50).astype(np.float32),
        ids=random.permutation(500)[:50],
        order=request.param,
    )
    index.remove(index.ids[:4].clone())
    index.add(random.integers(0, 300, (3, 3)), bias=np.zeros(3, np.float32))
    path = tmp_path / "items.codes"
    index.save(path)
    return index, path


@pytest.mark.parametrize("mmap", [False, True])
def test_save_and_load(stored, mmap):
    index, path = stored
    again = CodeIndex.load(path, mmap=mmap)
    table = table_for(index)
    same(again.search(table, 60), index.search(table, 60))
    assert (again.n_slots, again.order, again.tail) == (index.n_slots, index.order, index.tail)
    assert all(part.data_ptr() % 64 == 0 for part in again._packed if isinstance(part, torch.Tensor))
    content = path.read_bytes()
    for one in (index, again):
        one.add(one.codes[:2].numpy(), bias=np.zeros(2, np.float32))
        one.update(one.ids[10:11], one.codes[:1].numpy(), bias=np.ones(1, np.float32))
        one.remove(one.ids[20:22].clone())
    same(again.search(table, 60), index.search(table, 60))
    assert path.read_bytes() == content, "a change reached the file"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "something was left behind"


@pytest.mark.parametrize("stored", ["lex"], indirect=True)
def test_bitmaps_by_group_are_read_as_they_were_written_once(stored):
    """A file with the codes that each group and each superblock hold, instead of the groups that hold each code."""
    index, path = stored
    config, arrays = _file.load(path, "CodeIndex", mmap=False)
    held = arrays.pop("held")
    bits = np.unpackbits(np.ascontiguousarray(held).view(np.uint8), bitorder="little").reshape(*held.shape, 64)
    groups = bits.transpose(0, 3, 4, 1, 2).reshape(-1, held.shape[1], 256)[: -(-index.n_slots // 256)]
    blocks = np.packbits(groups, axis=-1, bitorder="little").view(np.int64)
    _file.save(path, "CodeIndex", config, {**arrays, "blocks": blocks, "superblocks": blocks})
    again = CodeIndex.load(path)
    assert torch.equal(again._packed.held, index._packed.held)
    table = table_for(index)
    same(again.search(table, 60), index.search(table, 60))
    _file.save(path, "CodeIndex", config, {**arrays, "blocks": blocks[:, :-1], "superblocks": blocks})
    with pytest.raises(InputError, match=r"is corrupt: blocks must be int64 \[1, 4, 4\]"):
        CodeIndex.load(path)


@pytest.mark.parametrize("mmap", [False, True])
def test_every_damaged_byte_is_refused(stored, mmap):
    index, path = stored
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    regions = {
        name: place["data_offsets"]
        for name, place in json.loads(content[8:header_end]).items()
        if name != "__metadata__"
    }
    assert {"planes", "bias", "levels", "edges", "ids", "live"} <= set(regions)
    # Every byte of one header; the others differ little.
    places = [*range(0, header_end, 1 if index.order == "lex" and not mmap else 9)]
    for begin, end in regions.values():
        places += [header_end + at for at in {begin, end - 1, *range(begin, end, 41)}]
    for place in places:
        for flip in (0x01, 0x80):
            content[place] ^= flip
            path.write_bytes(content)
            with pytest.raises(InputError, match=r"^CodeIndex\.load: "):
                CodeIndex.load(path, mmap=mmap)
            content[place] ^= flip
    path.write_bytes(content)
    CodeIndex.load(path)
    # Without verification only the header is looked at.
    content[-1] ^= 1
    path.write_bytes(content)
    CodeIndex.load(path, mmap=mmap, verify=False)


def test_the_sentence_names_the_damaged_array(stored):
    _, path = stored
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    content[header_end + json.loads(content[8:header_end])["levels"]["data_offsets"][0]] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="is corrupt: levels does not match its checksum"):
        CodeIndex.load(path)


@pytest.mark.parametrize("stored", ["lex"], indirect=True)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"slots": lambda a: a + 1}, r"slots are outside \[0, 53\)"),
        ({"slots": lambda a: a * 0}, "slots and positions are not each other's inverse"),
        ({"positions": lambda a: a[:-1]}, r"positions must be int32 \[53\]"),
        ({"planes": lambda a: a + np.uint16(300)}, r"a code is outside \[0, 300\)"),
        ({"planes": lambda a: a.astype(np.uint8)}, "planes must be uint16"),
        ({"ids": lambda a: a - 500}, "an id is below 0"),
        ({"live": lambda a: a[:0]}, r"live must be int64 \[1\]"),
        ({"levels": None}, "only some of bias, levels, edges are there"),
        ({"held": None}, "only some of slots, positions, held are there"),
        ({"more": lambda a: np.zeros(1)}, "'more'"),
    ],
)
def test_a_file_of_good_checksums_and_wild_values_is_refused(stored, change, sentence, tmp_path):
    _, path = stored
    config, arrays = _file.load(path, "CodeIndex", mmap=False)
    for name, how in change.items():
        if how is None:
            del arrays[name]
        else:
            arrays[name] = how(arrays.get(name)).astype(np.int64) if name == "more" else how(arrays[name])
    _file.save(path, "CodeIndex", config, arrays)
    with pytest.raises(InputError, match=rf"is corrupt: .*{sentence}"):
        CodeIndex.load(path)


def test_files_of_version_1_are_read():
    """Written by the release before: 70 items, five of them removed, with bias and ids."""
    random = np.random.default_rng(7)
    codes, bias = random.integers(0, 300, (70, 3)), random.standard_normal(70).astype(np.float32)
    ids = random.permutation(500)[:70]
    wanted = CodeIndex(codes, 300, bias=bias, ids=ids)
    wanted.remove(ids[:5])
    for mmap in (False, True):
        index = CodeIndex.load(OLD_FILE, mmap=mmap)
        assert (len(index), index.n_slots) == (65, 70)
        table = table_for(index)
        same(index.search(table, 80), wanted.search(table, 80))
        index.add(codes[:1], ids[:1], bias=bias[:1])
        assert len(index) == 66


def test_a_damaged_file_of_version_1_is_refused(tmp_path):
    content = bytearray(OLD_FILE.read_bytes())
    for place in range(0, len(content), 5):
        content[place] ^= 0x10
        (tmp_path / "old").write_bytes(content)
        with pytest.raises(InputError, match=r"^CodeIndex\.load: "):
            CodeIndex.load(tmp_path / "old")
        content[place] ^= 0x10


def test_truncated_and_foreign_files_are_refused(stored, tmp_path):
    _, path = stored
    content = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"not a recfast index|damaged"):
            CodeIndex.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(InputError, match=rf"must have {len(content)} bytes, found {len(content) + 1}"):
        CodeIndex.load(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        CodeIndex.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        CodeIndex.load(tmp_path)
    path.write_bytes(b"PAR1" + bytes(500))
    with pytest.raises(InputError, match="is not a recfast index"):
        CodeIndex.load(path)
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"must hold a recfast\.CodeIndex, found pt"):
        CodeIndex.load(path)
    header = json.dumps({"__metadata__": {"format": "recfast.CodeIndex", "version": "3"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="has format version 3, this recfast reads versions 1 and 2"):
        CodeIndex.load(path)


def test_the_file_is_plain_safetensors(stored):
    from safetensors import safe_open

    index, path = stored
    with safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "recfast.CodeIndex"
        np.testing.assert_array_equal(file.get_tensor("planes"), index._packed.planes.numpy())
        np.testing.assert_array_equal(file.get_tensor("ids"), index.ids.numpy())


def test_reads_come_between_changes_that_follow_each_other():
    """A read waits for the changes that asked before it and for no others, though there is always one that waits."""
    guard, events = Guard(), []
    first = guard.changing
    first.__enter__()

    def read():
        with guard.reading:
            events.append("read")

    def change():
        with guard.changing:
            events.append("change")

    threads = []
    for work, asked in ((read, lambda: guard._waiting == {1: 1}), (change, lambda: guard._asked == 2)):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        end = time.monotonic() + 10
        while not asked():
            assert time.monotonic() < end
            time.sleep(0.001)
    first.__exit__()
    for thread in threads:
        thread.join(10)
    assert events == ["read", "change"]


@pytest.mark.parametrize("given_up", ["read", "first change", "second change"])
def test_whoever_gives_up_waiting_holds_nobody_up(given_up, monkeypatch):
    guard = Guard()
    waits = {"read": guard.reading, "first change": guard.changing, "second change": guard.changing}
    begun = threading.Event()

    def interrupted(*_):
        begun.set()
        raise KeyboardInterrupt

    holder = guard.reading if given_up == "first change" else guard.changing
    holder.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(guard._condition, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            waits[given_up].__enter__()
    assert begun.is_set()
    holder.__exit__()
    done = []

    def work():
        with guard.changing:
            done.append("change")
        with guard.reading:
            done.append("read")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert done == ["change", "read"]
    assert guard._readers == 0


def test_a_pickle_is_of_one_moment():
    """What is pickled was copied under the lock: changes that come while it is written out do not show."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (300, 4))
    index = CodeIndex(codes, 16, order="lex", bias=np.zeros(300, dtype=np.float32))
    state = index.__getstate__()
    index.update(np.arange(300), 15 - codes, bias=np.ones(300, dtype=np.float32))
    other = CodeIndex.__new__(CodeIndex)
    other.__setstate__(state)
    assert np.array_equal(other.codes.numpy(), codes)
    assert bool((other.bias == 0).all())
    # And one that came with read-only buffers can be changed.
    other.__setstate__({**state, "_packed": (*state["_packed"][:2], _read_only(state["_packed"][2]))})
    other.update([0], 15 - codes[:1])
    assert np.array_equal(other.codes[0].numpy(), 15 - codes[0])


def _read_only(parts):
    parts = {name: part.copy() for name, part in parts.items()}
    for part in parts.values():
        part.flags.writeable = False
    return parts


def test_adding_nothing_behind_the_highest_id():
    index = CodeIndex(CODES, ids=[1, 2, 2**63 - 1])
    made = index.add(CODES[:0])
    assert made.dtype == torch.int64
    assert len(made) == 0
    with pytest.raises(ValueError, match="the highest id there can be is taken"):
        index.add(CODES[:1])


def test_a_child_builds_lists_though_a_thread_of_its_parent_was_building():
    index = CodeIndex(CODES, 256)
    table = (np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.float32), np.arange(2))
    found = []
    with index._guard.building:
        _guard._forget()  # what a child does first
        thread = threading.Thread(target=lambda: found.append(index.search(table, 1, plan="postings")), daemon=True)
        thread.start()
        thread.join(10)
    assert [ids.tolist() for _, ids in found] == [[[0]]]


def test_a_bitmap_made_while_compact_renumbers_speaks_of_the_new_slots():
    index = CodeIndex(np.arange(100)[:, None].astype(np.uint8), 256)
    index.remove([0, 1, 2])
    find, calls = index.slots_of, []

    class Racing:
        """Another thread's `compact` comes right after the slots were looked up."""

        epoch = property(lambda self: index.epoch)
        n_slots = property(lambda self: index.n_slots)

        def slots_of(self, ids):
            slots = find(ids)
            calls.append(len(calls))
            if len(calls) == 1:
                index.compact()
            return slots

    bitmap = Bitmap.allow(Racing(), [50, 99])
    table = np.zeros((1, 1, 256), dtype=np.float32)
    assert index.search(table, 3, bitmap)[1].tolist() == [[50, 99, -1]]


def test_a_header_of_endless_brackets_is_refused(tmp_path):
    path = tmp_path / "index"
    path.write_bytes((10**6).to_bytes(8, "little") + b"[" * 10**6)
    with pytest.raises(InputError, match="is not a recfast index"):
        CodeIndex.load(path)
