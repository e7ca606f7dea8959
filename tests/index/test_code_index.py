import concurrent.futures
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.errors import InputError
from recfast.index import CodeIndex


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

    def search(self, table, k, n_codes, with_bias):
        ids = sorted(self.items)
        width = table.shape[1]
        codes = np.array([self.items[i][0] for i in ids], dtype=np.uint16).reshape(-1, width)
        bias = np.array([self.items[i][1] for i in ids], dtype=np.float32)
        index = ops.Codes(
            torch.from_numpy(codes), torch.from_numpy(bias) if with_bias else None, torch.tensor(ids).long()
        )
        return ops.code_search.reference(index, table, k)


@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.sampled_from([0, 1, 5, 40]),
    n_codes=st.sampled_from([3, 256, 300]),
    named=st.booleans(),
    with_bias=st.booleans(),
    steps=st.lists(st.sampled_from(["add", "add named", "update", "remove", "compact", "save", "mmap"]), max_size=8),
)
def test_changes_equal_a_rebuilt_index(seed, items, n_codes, named, with_bias, steps, tmp_path_factory):
    random = np.random.default_rng(seed)
    kind = np.uint8 if n_codes <= 256 else np.uint16

    def some_codes(n):
        return random.integers(0, n_codes, (n, 3)).astype(kind)

    def some_bias(n):
        return random.integers(-2, 3, n).astype(np.float32) if with_bias else np.zeros(n, dtype=np.float32)

    codes, bias = some_codes(items), some_bias(items)
    ids = random.permutation(1000)[:items] if named else None
    given_codes, given_bias = codes.copy(), bias.copy()
    index = CodeIndex(codes, n_codes, bias=bias if with_bias else None, ids=ids)
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
        else:
            path = tmp_path_factory.mktemp("index") / "index"
            index.save(path)
            index = CodeIndex.load(path, mmap=step == "mmap")
        table = table_for(index, seed=seed % 1000)
        assert len(index) == len(model.items)
        same(index.search(table, 12), model.search(table, 12, n_codes, with_bias))
        # Masks by id agree with masks of slots.
        allowed = sorted(model.items)[::2]
        _, found = index.search(table, 50, mask=index.allow(allowed))
        assert set(found[found >= 0].tolist()) == set(allowed)
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


def test_takes_arrays_without_a_copy():
    codes = np.zeros((10, 2), dtype=np.uint8)
    codes.flags.writeable = False
    index = CodeIndex(codes)
    assert index.codes.data_ptr() == codes.ctypes.data
    index.update([0], np.ones((1, 2), dtype=np.int64))
    assert codes.sum() == 0


def test_searches_at_the_same_time():
    random = np.random.default_rng(1)
    index = CodeIndex(random.integers(0, 256, (5000, 8)).astype(np.uint8))
    tables = torch.from_numpy(random.standard_normal((16, 4, 8, 256)).astype(np.float32))
    wanted = [index.search(table, 10) for table in tables]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for answer, right in zip(pool.map(lambda table: index.search(table, 10), tables), wanted, strict=True):
            same(answer, right)


CODES = np.zeros((3, 2), dtype=np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: CodeIndex([[0]]), TypeError, "codes must be a tensor or a numpy array, got list"),
        (lambda: CodeIndex(CODES + 0.5), TypeError, "codes must be integers, got float64"),
        (lambda: CodeIndex(CODES[0]), ValueError, r"codes must have shape \[N, M\], got \[2\]"),
        (lambda: CodeIndex(CODES + np.uint8(4), 4), IndexError, r"codes\[0, 0\] = 4 is outside \[0, 4\)"),
        (lambda: CodeIndex(CODES.astype(int) - 1), IndexError, r"codes\[0, 0\] = -1 is outside \[0, 256\)"),
        (lambda: CodeIndex(CODES, 0), ValueError, r"n_codes must be in \[1, 65536\], got 0"),
        (lambda: CodeIndex(CODES, order="lex"), ValueError, "order must be one of auto, none, got 'lex'"),
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


@pytest.fixture
def stored(tmp_path):
    random = np.random.default_rng(3)
    index = CodeIndex(
        random.integers(0, 300, (50, 3)).astype(np.uint16),
        300,
        bias=random.standard_normal(50).astype(np.float32),
        ids=random.permutation(500)[:50],
    )
    index.remove(index.ids[:4].clone())
    path = tmp_path / "items.codes"
    index.save(path)
    return index, path


@pytest.mark.parametrize("mmap", [False, True])
def test_save_and_load(stored, mmap):
    index, path = stored
    again = CodeIndex.load(path, mmap=mmap)
    table = table_for(index)
    same(again.search(table, 60), index.search(table, 60))
    assert again.n_slots == index.n_slots
    content = path.read_bytes()
    again.add(index.codes[:2].numpy(), bias=np.zeros(2, np.float32))
    again.update(index.ids[10:11], index.codes[:1].numpy())
    assert path.read_bytes() == content, "a change reached the file"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "something was left behind"


@pytest.mark.parametrize("mmap", [False, True])
def test_every_damaged_byte_is_refused(stored, mmap):
    _, path = stored
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    # Every byte of the header, and every seventh of the arrays.
    for place in [*range(header_end), *range(header_end, len(content), 7)]:
        for flip in (0x01, 0x80):
            content[place] ^= flip
            path.write_bytes(content)
            with pytest.raises(InputError, match=r"^CodeIndex\.load: "):
                CodeIndex.load(path, mmap=mmap)
            content[place] ^= flip
    path.write_bytes(content)
    CodeIndex.load(path)


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
        np.testing.assert_array_equal(file.get_tensor("codes"), index.codes.numpy())
