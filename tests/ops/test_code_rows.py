"""The five tests of `code_rows_search` on plain and on packed rows (no gradient: the third says what happens to weights
that ask for one), and those of `pack_rows`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY


def oracle(indptr, item_ids, scores, n_items, rows, k, weights=None, row_bias=None, allowed=None):
    """float32 products and sums in the order of the rows, then a full sort by (score descending, id ascending)."""
    out_scores = np.full((len(rows), k), -np.inf, dtype=np.float32)
    out_ids = np.full((len(rows), k), -1, dtype=np.int64)
    for query, named in enumerate(rows):
        total = np.zeros(n_items, dtype=np.float32)
        held = np.zeros(n_items, dtype=bool)
        for slot, row in enumerate(named):
            if row < 0:
                continue
            part = slice(indptr[row], indptr[row + 1])
            weight = np.float32(1) if weights is None else weights[query, slot]
            term = weight * scores[part]
            total[item_ids[part]] += term if row_bias is None else term + row_bias[row]
            held[item_ids[part]] = True
        if allowed is not None:
            held &= np.broadcast_to(allowed, (len(rows), n_items))[query]
        kept = held.nonzero()[0]
        order = kept[np.lexsort((kept, -total[kept]))][:k]
        out_scores[query, : len(order)], out_ids[query, : len(order)] = total[order], order
    return out_scores, out_ids


def equal_bits(answer, wanted):
    scores, ids = (part.numpy() for part in answer)
    np.testing.assert_array_equal(ids, wanted[1])
    np.testing.assert_array_equal(scores.view(np.int32), wanted[0].view(np.int32))


def as_tensor(array):
    return None if array is None else torch.from_numpy(array)


def problem(seed, n_rows, n_items, mean, kind=np.int64, values="normal"):
    """Rows of about `mean` items; some are empty."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.integers(0, 2 * mean + 1, n_rows), n_items)
    indptr = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    lists = [np.sort(random.choice(n_items, length, replace=False)) for length in lengths]
    item_ids = np.concatenate([*lists, []]).astype(kind)
    scores = random.standard_normal(len(item_ids)).astype(np.float32)
    if values == "positive":
        scores = random.random(len(item_ids)).astype(np.float32)
    elif values == "skewed":
        scores = np.exp(5 * random.standard_normal(len(item_ids))).astype(np.float32)
    elif values == "equal":
        scores = np.ones(len(item_ids), dtype=np.float32)
    elif values == "few":
        scores = random.integers(-1, 2, len(item_ids)).astype(np.float32)
    return random, ops.RowsIndex(*map(torch.from_numpy, (indptr, item_ids, scores)), n_items)


def raw(index):
    return (index.indptr.numpy(), index.item_ids.numpy(), index.scores.numpy(), index.n_items)


def masks_of(random, kind, queries, n_items):
    """A mask, and the same as bool."""
    if kind == "none":
        return None, None
    mask = {
        "all": lambda: np.ones(n_items, dtype=bool),
        "nothing": lambda: np.zeros((queries, n_items), dtype=bool),
        "one": lambda: np.arange(n_items) == n_items // 2,
        "shared": lambda: random.random(n_items) < 0.05,
        "each": lambda: random.random((queries, n_items)) < 0.5,
    }[kind]()
    form = random.integers(3)
    if form == 0:
        return torch.from_numpy(mask), mask
    bits = np.packbits(mask, axis=-1, bitorder="little")
    if form == 1:
        return torch.from_numpy(bits), mask
    padded = np.zeros((*mask.shape[:-1], -(-n_items // 64) * 8), dtype=np.uint8)
    padded[..., : bits.shape[-1]] = bits
    return SimpleNamespace(words=torch.from_numpy(padded.view(np.int64))), mask


@given(
    seed=st.integers(0, 2**32 - 1),
    n_items=st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 500, 1024, 1025, 32_768, 32_769, 100_000]),
    n_rows=st.integers(1, 9),
    queries=st.integers(0, 3),
    width=st.integers(0, 9),
    mean=st.sampled_from([0, 1, 20, 200, 3000]),
    k=st.sampled_from([0, 1, 3, 10, 1000]),
    kind=st.sampled_from([np.int32, np.int64]),
    values=st.sampled_from(["normal", "few", "positive", "skewed", "equal"]),
    masks=st.sampled_from(["none", "none", "all", "nothing", "one", "shared", "each"]),
    weighted=st.sampled_from(["no", "normal", "positive"]),
    biased=st.booleans(),
    shift=st.sampled_from([None, 4, 4, 5, 8, 9, 16]),
)
def test_matches_reference(
    seed, n_items, n_rows, queries, width, mean, k, kind, values, masks, weighted, biased, shift, isa_levels,
    poisoned_empty,
):  # fmt: skip
    random, index = problem(seed, n_rows, n_items, mean, kind, values)
    rows = random.integers(-1, n_rows, (queries, width))
    weights = random.standard_normal((queries, width)).astype(np.float32)
    weights = {"no": None, "normal": weights, "positive": np.abs(weights)}[weighted]
    row_bias = random.standard_normal(n_rows).astype(np.float32) if biased else None
    mask, allowed = masks_of(random, masks, queries, n_items)
    wanted = oracle(*raw(index), rows, k, weights, row_bias, allowed)
    options = {"weights": as_tensor(weights), "row_bias": as_tensor(row_bias), "mask": mask}
    equal_bits(ops.code_rows_search.reference(index, as_tensor(rows), k, **options), wanted)
    packed = ops.pack_rows(index, shift=shift)
    for _ in isa_levels():
        equal_bits(ops.code_rows_search(index, as_tensor(rows), k, **options), wanted)
        equal_bits(ops.code_rows_search(packed, as_tensor(rows), k, **options), wanted)


@given(
    seed=st.integers(0, 2**32 - 1),
    n_items=st.sampled_from([0, 1, 64, 65, 1024, 5000, 100_000]),
    n_rows=st.integers(0, 9),
    mean=st.sampled_from([0, 1, 20, 700]),
    kind=st.sampled_from([np.int32, np.int64]),
    values=st.sampled_from(["normal", "few"]),
    shift=st.sampled_from([None, 4, 5, 8, 9, 16]),
)
def test_packing_matches_its_reference(seed, n_items, n_rows, mean, kind, values, shift, poisoned_empty):
    _, index = problem(seed, n_rows, n_items, mean, kind, values)
    packed, wanted = ops.pack_rows(index, shift=shift), ops.pack_rows.reference(index, shift=shift)
    for name, one, other in zip(packed._fields, packed, wanted, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
    assert torch.equal(packed.item_ids(), index.item_ids.int())


@pytest.mark.parametrize("masks", ["none", "bool", "bits"])
@pytest.mark.parametrize("shift", [5, 8])
def test_full_chunks_are_added_up(shift, masks, isa_levels):
    """Groups with many postings of a row, and chunks with more of them than are noted at a time."""
    random, index = problem(3, 5, 30_000, 20_000, np.int32)
    packed = ops.pack_rows(index, shift=shift)
    rows = random.integers(-1, 5, (3, 6))
    allowed = None if masks == "none" else random.random(30_000) < 0.4
    mask = as_tensor(allowed if masks != "bits" else np.packbits(allowed, bitorder="little"))
    wanted = oracle(*raw(index), rows, 700, allowed=allowed)
    for _ in isa_levels():
        equal_bits(ops.code_rows_search(packed, torch.from_numpy(rows), 700, mask=mask), wanted)


@pytest.mark.parametrize("values", ["positive", "normal", "skewed", "equal", "few"])
@pytest.mark.parametrize("shift", [4, 6, 10])
def test_bounds_leave_nothing_out(values, shift, isa_levels):
    """Rows long enough that most groups are passed over; every k, so that every threshold is met."""
    random, index = problem(11, 30, 60_000, 1500, np.int32, values)
    packed = ops.pack_rows(index, shift=shift)
    rows = random.integers(-1, 30, (12, 5))
    mask = random.random(60_000) < 0.02
    for k, allowed in ((1, None), (10, None), (100, None), (100, mask), (3000, None)):
        wanted = oracle(*raw(index), rows, k, None, None, allowed)
        for _ in isa_levels():
            equal_bits(ops.code_rows_search(packed, as_tensor(rows), k, mask=as_tensor(allowed), check=False), wanted)


INDEX = ops.RowsIndex(
    torch.tensor([0, 2, 2, 5]), torch.tensor([1, 3, 0, 1, 4]), torch.tensor([2.0, -1.0, 5.0, 1.0, -1.0]), 6
)


def test_known_values():
    # Row 0: item 1 +2, item 3 -1; row 1 is empty; row 2: item 0 +5, item 1 +1, item 4 -1.
    scores, ids = ops.code_rows_search(INDEX, torch.tensor([[0, 2], [1, -1], [0, 0]]), 5)
    assert ids.tolist() == [[0, 1, 3, 4, -1], [-1] * 5, [1, 3, -1, -1, -1]]
    assert scores[0].tolist() == [5.0, 3.0, -1.0, -1.0, -torch.inf]
    assert scores[2, :2].tolist() == [4.0, -2.0]
    weights = torch.tensor([[3.0, -1.0]])
    scores, ids = ops.code_rows_search(INDEX, torch.tensor([[0, 2]]), 2, weights=weights)
    assert (scores.tolist(), ids.tolist()) == ([[5.0, 1.0]], [[1, 4]])


def test_gradient_is_cut():
    """Inference only: weights that require a gradient are detached, and the answer asks for none."""
    weights = torch.ones(1, 1, requires_grad=True)
    scores, _ = ops.code_rows_search(INDEX, torch.tensor([[0]]), 1, weights=weights)
    assert not scores.requires_grad


def test_opcheck(opcheck):
    opcheck(REGISTRY["code_rows_search"])


ROWS = torch.tensor([[0, 2]])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"index": ROWS}, TypeError, "rows_index must have attributes indptr, .* got Tensor without indptr"),
        ({"rows": ROWS.int()}, TypeError, "rows must be int64, got int32"),
        ({"rows": ROWS[0]}, ValueError, r"rows must have shape \[Q, Ku\], got \[2\]"),
        ({"rows": torch.tensor([[0, 1], [2, 3]])}, IndexError, r"rows\[1, 1\] = 3 is outside \[-1, 3\)"),
        ({"rows": torch.tensor([[0, -2]])}, IndexError, r"rows\[0, 1\] = -2 is outside \[-1, 3\)"),
        ({"weights": torch.ones(1, 3)}, ValueError, r"weights must have shape \[1, 2\], got \[1, 3\]"),
        ({"weights": torch.tensor([[1.0, torch.nan]])}, ValueError, r"weights\[0, 1\] must be finite, got nan"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must have shape \[6\], got \[5\]"),
        ({"mask": torch.ones(2, dtype=torch.uint8)}, ValueError, r"mask must have shape \[1\], got \[2\]"),
        ({"mask": torch.ones(6, dtype=torch.int32)}, TypeError, "mask must be bool, got int32"),
        ({"row_bias": torch.ones(2)}, ValueError, r"row_bias must have shape \[3\], got \[2\]"),
        ({"row_bias": torch.tensor([0.0, torch.inf, 0.0])}, ValueError, "row_bias must be finite, got inf"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"index": INDEX._replace(n_items=4)}, IndexError, r"item_ids\[4\] = 4 is outside \[0, 4\)"),
        ({"index": INDEX._replace(indptr=torch.tensor([0, 2, 1, 5]))}, ValueError, r"indptr\[2\] = 1 is below"),
        ({"index": INDEX._replace(indptr=torch.tensor([0, 2, 4]))}, ValueError, r"indptr\[-1\] must be 5"),
        (
            {"index": INDEX._replace(item_ids=torch.tensor([3, 1, 0, 1, 4]))},
            ValueError,
            "item_ids must rise strictly within a row, got 1 after 3 at position 1",
        ),
        (
            {"index": INDEX._replace(item_ids=torch.tensor([1, 3, 0, 0, 4]))},
            ValueError,
            "got 0 after 0 at position 3",
        ),
        (
            {"index": INDEX._replace(scores=torch.tensor([0.0, torch.inf, 0.0, 0.0, 0.0]))},
            ValueError,
            r"scores\[1\] must be finite, got inf",
        ),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {"index": INDEX, "rows": ROWS, "k": 2, **change}
    index, rows, k = (arguments.pop(name) for name in ("index", "rows", "k"))
    with pytest.raises(error, match=sentence):
        ops.code_rows_search(index, rows, k, **arguments)


def test_packed_rows_refuse_bad_input():
    packed = ops.pack_rows(INDEX)
    for rows, error, sentence in (
        (torch.tensor([[0, 3]]), IndexError, r"rows\[0, 1\] = 3 is outside \[-1, 3\)"),
        (ROWS[0], ValueError, r"rows must have shape \[Q, Ku\]"),
    ):
        with pytest.raises(error, match=sentence):
            ops.code_rows_search(packed, rows, 2)
    with pytest.raises(ValueError, match=r"weights\[0, 1\] must be finite, got nan"):
        ops.code_rows_search(packed, ROWS, 2, weights=torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="row 2 is not as pack_rows lays it out"):
        ops.code_rows_search(packed._replace(lowest=torch.tensor([-1.0, 0.0, 0.0])), ROWS, 2)
    with pytest.raises(ValueError, match=r"present must have shape \[3, 1\], got \[3, 0\]"):
        ops.code_rows_search(packed._replace(present=packed.present[:, :0]), ROWS, 2)
    with pytest.raises(ValueError, match=r"shift must lie in \[4, 16\], got 3"):
        ops.pack_rows(INDEX, shift=3)
    with pytest.raises(IndexError, match=r"item_ids\[4\] = 4 is outside \[0, 4\)"):
        ops.pack_rows(INDEX._replace(n_items=4))
    with pytest.raises(ValueError, match=r"pack_rows: n_items must be below 2\*\*31"):
        ops.pack_rows(INDEX._replace(n_items=2**31))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("values", ["normal", "few"])
def test_same_for_any_k_batch_and_threads(values, packed):
    random, index = problem(3, 50, 200_000, 2000, values=values)
    index = ops.pack_rows(index) if packed else index
    rows = torch.from_numpy(random.integers(-1, 50, (40, 4)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        scores, ids = ops.code_rows_search(index, rows, 100)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for k in (1, 10, 100):
                answer = ops.code_rows_search(index, rows, k)
                assert torch.equal(answer[0], scores[:, :k])
                assert torch.equal(answer[1], ids[:, :k])
        single = torch.cat([ops.code_rows_search(index, rows[q : q + 1], 100)[1] for q in range(40)])
        assert torch.equal(single, ids)
    finally:
        torch.set_num_threads(before)
