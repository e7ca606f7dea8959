import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recfast import ops
from recfast.errors import InputError
from recfast.index import CodeIndex, CodeRows, _file
from recfast.ops import packed_rows


def problem(kind=np.int32):
    random = np.random.default_rng(0)
    held = random.random((20, 300)) < 0.1
    indptr = np.concatenate([[0], held.sum(1).cumsum()]).astype(np.int64)
    item_ids = held.nonzero()[1].astype(kind)
    scores = random.standard_normal(len(item_ids)).astype(np.float32)
    rows = random.integers(-1, 20, (6, 4))
    weights = random.standard_normal((6, 4)).astype(np.float32)
    mask = random.random((6, 300)) < 0.5
    return (indptr, item_ids, scores), rows, weights, mask


def same(answer, wanted):
    assert torch.equal(answer[1], wanted[1])
    assert torch.equal(answer[0], wanted[0])


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("mmap", [False, True])
def test_numpy_torch_and_stored_agree(kind, mmap, tmp_path):
    arrays, rows, weights, mask = problem(kind)
    index = CodeRows(*arrays, 300)
    wanted = index.search(rows, 25, weights=weights, mask=mask)
    tensors = [torch.from_numpy(array) for array in arrays]
    reference = ops.code_rows_search.reference(
        ops.RowsIndex(*tensors, 300),
        torch.from_numpy(rows),
        25,
        weights=torch.from_numpy(weights),
        mask=torch.from_numpy(mask),
    )
    same(wanted, reference)
    same(
        CodeRows(*tensors, 300).search(torch.from_numpy(rows), 25, torch.from_numpy(weights), torch.from_numpy(mask)),
        wanted,
    )
    index.save(tmp_path / "rows")
    same(CodeRows.load(tmp_path / "rows", mmap=mmap).search(rows, 25, weights=weights, mask=mask), wanted)
    assert len(index) == 20
    assert index.scores.data_ptr() == arrays[2].ctypes.data
    assert torch.equal(index.item_ids, tensors[1].int())


def test_masks_and_row_bias():
    arrays, rows, weights, mask = problem()
    index = CodeRows(*arrays, 300)
    bias = np.random.default_rng(5).standard_normal(20).astype(np.float32)
    plain = ops.RowsIndex(*map(torch.from_numpy, arrays), 300)
    wanted = ops.code_rows_search.reference(
        plain,
        torch.from_numpy(rows),
        25,
        weights=torch.from_numpy(weights),
        row_bias=torch.from_numpy(bias),
        mask=torch.from_numpy(mask),
    )
    bits = np.packbits(mask, axis=1, bitorder="little")
    words = np.zeros((6, 40), np.uint8)
    words[:, : bits.shape[1]] = bits
    bitmap = SimpleNamespace(words=torch.from_numpy(words).view(torch.int64), size=300)
    for one in (mask, torch.from_numpy(mask), bits, bitmap):
        same(index.search(rows, 25, weights=weights, mask=one, row_bias=bias), wanted)
    with pytest.raises(ValueError, match="mask must be a bitmap of 300 items, got one of 299"):
        index.search(rows, 25, mask=SimpleNamespace(words=bitmap.words, size=299))


def test_copies_read_their_own_arrays():
    arrays, rows, weights, _ = problem()
    index = CodeRows(*arrays, 300)
    wanted = index.search(rows, 25, weights=weights)
    for copied in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        # What a search reads through must be where the copy's arrays are, not the original's.
        assert copied._fields == packed_rows.fields_of(copied.packed) != index._fields
        same(copied.search(rows, 25, weights=weights), wanted)


def test_expected_bytes():
    for n_items, per_row in ((300, 30), (5000, 10), (200_000, 40)):
        random = np.random.default_rng(0)
        ids = np.concatenate([np.sort(random.choice(n_items, per_row, replace=False)) for _ in range(20)])
        indptr = np.arange(21) * per_row
        index = CodeRows(indptr, ids, np.ones(len(ids), np.float32), n_items)
        expected = CodeRows.expected_bytes(20, n_items, per_row)
        assert 0.6 * expected < index.nbytes <= expected


def test_a_file_from_before_rows_were_packed(tmp_path):
    arrays, rows, weights, _ = problem()
    _file.save(
        tmp_path / "rows",
        "CodeRows",
        {"n_items": 300},
        dict(zip(("indptr", "item_ids", "scores"), arrays, strict=True)),
    )
    same(CodeRows.load(tmp_path / "rows").search(rows, 9, weights), CodeRows(*arrays, 300).search(rows, 9, weights))


def test_a_file_that_was_written_with_wrong_numbers(tmp_path):
    """Its checksum is right, so only reading the arrays tells that a search would leave them."""
    arrays, _, _, _ = problem()
    path = tmp_path / "rows"
    index = CodeRows(*arrays, 300)
    parts = {name: part.numpy() for name, part in index.packed._asdict().items() if isinstance(part, torch.Tensor)}
    config = {"n_items": 300, "shift": index.packed.shift}
    random = np.random.default_rng(2)
    for name, array in parts.items():
        for at in random.integers(0, array.size - (64 if name == "levels" else name == "groups"), 5):
            wrong = array.copy()
            flat = wrong.reshape(-1).view(np.uint8)
            at = int(at) * array.itemsize
            if name in ("scores", "upper", "lowest"):
                wrong.reshape(-1)[at // 4] = np.nan
            elif name == "levels":  # a level too high is no fault: its bound is only less tight
                flat[at] = random.choice([0, 16, 255])
            else:
                flat[at] ^= 1
            _file.save(path, "CodeRows", config, {**parts, name: wrong})
            with pytest.raises(InputError, match=r"^CodeRows\.load: .* is corrupt"):
                CodeRows.load(path)


def test_an_empty_index(tmp_path):
    index = CodeRows(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), 0)
    index.save(tmp_path / "rows")
    for one in (index, CodeRows.load(tmp_path / "rows"), CodeRows.load(tmp_path / "rows", mmap=True)):
        scores, ids = one.search(np.full((2, 1), -1), 2)
        assert ids.tolist() == [[-1, -1], [-1, -1]]
        assert bool((scores == -torch.inf).all())


def test_rejects_bad_input():
    (indptr, item_ids, scores), _, _, _ = problem()
    with pytest.raises(IndexError, match=r"is outside \[0, 3\)"):
        CodeRows(indptr, item_ids, scores, 3)
    with pytest.raises(ValueError, match="must rise strictly within a row"):
        CodeRows(indptr, item_ids[::-1].copy(), scores, 300)
    with pytest.raises(ValueError, match=r"scores\[0\] must be finite, got nan"):
        CodeRows(indptr, item_ids, scores * np.float32("nan"), 300)
    with pytest.raises(IndexError, match=r"rows\[0, 0\] = 20 is outside \[-1, 20\)"):
        CodeRows(indptr, item_ids, scores, 300).search(np.full((1, 1), 20), 1)
    with pytest.raises(TypeError, match="rows must be a tensor or a numpy array, got list"):
        CodeRows(indptr, item_ids, scores, 300).search([[0]], 1)


def test_damaged_files_are_refused(tmp_path):
    arrays, _, _, _ = problem()
    path = tmp_path / "rows"
    CodeRows(*arrays, 300).save(path)
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 31):
        content[place] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"^CodeRows\.load: "):
            CodeRows.load(path)
        content[place] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"must hold a recfast\.CodeIndex, found recfast\.CodeRows"):
        CodeIndex.load(path)


@pytest.mark.parametrize("values", ["normal", "few"])
@pytest.mark.parametrize("top", [None, 0, 1, 7, 1000])
def test_building_from_blocks_and_from_rows(values, top):
    random = np.random.default_rng(1)
    dense = random.standard_normal((13, 90)).astype(np.float32)
    if values == "few":
        dense = random.integers(-1, 3, (13, 90)).astype(np.float32)
    dense[3] = -1.0
    dense[4, 10:] = -np.inf
    wanted = np.zeros_like(dense)
    for row, scores in enumerate(dense):
        order = np.lexsort((np.arange(90), -scores))
        order = [item for item in order if scores[item] > 0.25][:top]
        wanted[row, order] = scores[order]

    def equal(index):
        assert len(index) == 13
        for row in range(13):
            part = slice(int(index.indptr[row]), int(index.indptr[row + 1]))
            assert index.item_ids[part].tolist() == wanted[row].nonzero()[0].tolist()
            np.testing.assert_array_equal(index.scores[part].numpy(), wanted[row][wanted[row] != 0])

    blocks = (dense[0:5], torch.from_numpy(dense[5:5]), torch.from_numpy(dense[5:12]).double(), dense[12:])
    equal(CodeRows.build(13, 90, iter(blocks), top, threshold=0.25))

    def stream():
        for row, scores in enumerate(dense):
            ids = random.permutation(np.isfinite(scores).nonzero()[0])
            if row != 3:
                yield row, ids, scores[ids]

    equal(CodeRows.from_rows(13, 90, stream(), top, threshold=0.25))


def test_building_refuses():
    ones = np.ones((2, 4), np.float32)
    bad = ones.copy()
    bad[1, 2] = np.nan
    for blocks, error, sentence in (
        ([ones, ones], ValueError, "blocks must have 3 rows together, got 4 or more"),
        ([ones], ValueError, "blocks must have 3 rows together, got 2"),
        ([ones[:, :3]], ValueError, r"blocks\[0\] must have shape \[rows, 4\], got \[2, 3\]"),
        ([ones.astype(np.int64)], TypeError, r"blocks\[0\] must be floating point numbers, got torch.int64"),
        ([bad], ValueError, "the score of row 1, item 2 is nan"),
    ):
        with pytest.raises(error, match=sentence):
            CodeRows.build(3, 4, iter(blocks))
    for rows, error, sentence in (
        ([(0, [1], [1.0]), (0, [2], [1.0])], ValueError, "rows must rise and stay below 3, got 0 after 0"),
        ([(3, [1], [1.0])], ValueError, "rows must rise and stay below 3, got 3 after -1"),
        ([(0, [4], [1.0])], IndexError, r"item 4 of row 0 is outside \[0, 4\)"),
        ([(0, [1, 1], [1.0, 2.0])], ValueError, "row 0 names item 1 twice"),
        ([(0, [1], [np.inf])], ValueError, "the score of row 0, item 1 is inf"),
        ([(0, [0.5], [1.0])], TypeError, "the ids of row 0 must be integers, got float64"),
        ([(0, [1, 2], [1.0])], ValueError, "row 0 must have as many scores as ids"),
    ):
        with pytest.raises(error, match=sentence):
            CodeRows.from_rows(3, 4, iter(rows))
    with pytest.raises(ValueError, match="top must be at least 0, got -1"):
        CodeRows.build(3, 4, [], -1)
