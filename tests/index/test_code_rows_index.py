import numpy as np
import pytest
import torch

from recfast import ops
from recfast.errors import InputError
from recfast.index import CodeIndex, CodeRows


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
    assert index.item_ids.data_ptr() == arrays[1].ctypes.data


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
    for place in range(0, len(content), 5):
        content[place] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"^CodeRows\.load: "):
            CodeRows.load(path)
        content[place] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"must hold a recfast\.CodeIndex, found recfast\.CodeRows"):
        CodeIndex.load(path)
