"""The five tests of `code_rows_search` (no gradient: the third says what happens to weights that ask for one)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY


def oracle(indptr, item_ids, scores, n_items, rows, k, weights=None, allowed=None):
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
            total[item_ids[part]] += weight * scores[part]
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
    if values == "few":
        scores = random.integers(-1, 2, len(item_ids)).astype(np.float32)
    return random, ops.RowsIndex(*map(torch.from_numpy, (indptr, item_ids, scores)), n_items)


def raw(index):
    return (index.indptr.numpy(), index.item_ids.numpy(), index.scores.numpy(), index.n_items)


@given(
    seed=st.integers(0, 2**32 - 1),
    n_items=st.sampled_from([0, 1, 63, 64, 65, 500, 32_768, 32_769, 100_000]),
    n_rows=st.integers(1, 9),
    queries=st.integers(0, 3),
    width=st.integers(0, 6),
    mean=st.sampled_from([0, 1, 20, 200]),
    k=st.sampled_from([0, 1, 10, 1000]),
    kind=st.sampled_from([np.int32, np.int64]),
    values=st.sampled_from(["normal", "few"]),
    masks=st.sampled_from(["none", "all", "nothing", "one", "shared", "each"]),
    weighted=st.booleans(),
)
def test_matches_reference(
    seed, n_items, n_rows, queries, width, mean, k, kind, values, masks, weighted, isa_levels, poisoned_empty
):
    random, index = problem(seed, n_rows, n_items, mean, kind, values)
    rows = random.integers(-1, n_rows, (queries, width))
    weights = random.standard_normal((queries, width)).astype(np.float32) if weighted else None
    mask = {
        "none": None,
        "all": np.ones(n_items, dtype=bool),
        "nothing": np.zeros((queries, n_items), dtype=bool),
        "one": np.arange(n_items) == n_items // 2,
        "shared": random.random(n_items) < 0.05,
        "each": random.random((queries, n_items)) < 0.5,
    }[masks]
    wanted = oracle(*raw(index), rows, k, weights, mask)
    options = {"weights": as_tensor(weights), "mask": as_tensor(mask)}
    equal_bits(ops.code_rows_search.reference(index, as_tensor(rows), k, **options), wanted)
    for _ in isa_levels():
        equal_bits(ops.code_rows_search(index, as_tensor(rows), k, **options), wanted)


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


@pytest.mark.parametrize("values", ["normal", "few"])
def test_same_for_any_k_batch_and_threads(values):
    random, index = problem(3, 50, 200_000, 2000, values=values)
    rows = torch.from_numpy(random.integers(-1, 50, (40, 4)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        scores, ids = ops.code_rows_search(index, rows, 100)
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            for k in (1, 10, 100):
                answer = ops.code_rows_search(index, rows, k)
                assert torch.equal(answer[0], scores[:, :k])
                assert torch.equal(answer[1], ids[:, :k])
        single = torch.cat([ops.code_rows_search(index, rows[q : q + 1], 100)[1] for q in range(40)])
        assert torch.equal(single, ids)
    finally:
        torch.set_num_threads(before)
