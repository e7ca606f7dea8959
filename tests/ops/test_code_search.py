"""The five tests of `code_search` (no gradient: the third says what happens to a table that asks for one)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY


def oracle(codes, table, k, bias=None, ids=None, allowed=None):
    """float32 sums in the order of the codebooks, then a full sort by (score descending, id ascending)."""
    items, books = codes.shape
    ids = np.arange(items) if ids is None else ids
    scores = np.full((len(table), k), -np.inf, dtype=np.float32)
    found = np.full((len(table), k), -1, dtype=np.int64)
    for query, entry in enumerate(table):
        total = entry[0, codes[:, 0]].astype(np.float32)
        for book in range(1, books):
            total = total + entry[book, codes[:, book]]
        if bias is not None:
            total = total + bias
        keep = total > -np.inf
        if allowed is not None:
            keep &= np.broadcast_to(allowed, (len(table), items))[query]
        kept = keep.nonzero()[0]
        order = kept[np.lexsort((ids[kept], -total[kept]))][:k]
        scores[query, : len(order)], found[query, : len(order)] = total[order], ids[order]
    return scores, found


def equal_bits(answer, wanted):
    scores, found = (part.numpy() for part in answer)
    np.testing.assert_array_equal(found, wanted[1])
    np.testing.assert_array_equal(scores.view(np.int32), wanted[0].view(np.int32))


def as_tensor(array):
    return None if array is None else torch.from_numpy(array)


def problem(seed, items, books, entries, queries, values="normal"):
    random = np.random.default_rng(seed)
    kind = np.uint8 if entries <= 256 else np.uint16
    codes = random.integers(0, entries, (items, books)).astype(kind)
    table = random.standard_normal((queries, books, entries)).astype(np.float32)
    if values == "equal":
        table[:] = 0.1
    elif values == "few":
        table = random.integers(-1, 2, table.shape).astype(np.float32)
    elif values == "wide":
        table *= (10.0 ** random.integers(-44, 37, table.shape)).astype(np.float32)
    elif values == "forbidden":
        table[random.random(table.shape) < 0.2] = -np.inf
    return random, codes, table


@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 1000]), st.integers(0, 300)),
    books=st.one_of(st.sampled_from([1, 4, 8, 16, 32]), st.integers(1, 32)),
    entries=st.sampled_from([1, 2, 16, 255, 256, 257, 4096]),
    queries=st.integers(0, 3),
    k=st.sampled_from([0, 1, 7, 100, 2000]),
    values=st.sampled_from(["normal", "equal", "few", "wide", "forbidden"]),
    masks=st.sampled_from(["none", "all", "nothing", "one", "shared", "each"]),
    extras=st.booleans(),
)
def test_matches_reference(seed, items, books, entries, queries, k, values, masks, extras, isa_levels, poisoned_empty):
    random, codes, table = problem(seed, items, books, entries, queries, values)
    bias = random.standard_normal(items).astype(np.float32) if extras else None
    ids = random.permutation(items).astype(np.int64) * 2**33 if extras else None
    live = random.random(items) < 0.8 if extras else None
    mask = {
        "none": None,
        "all": np.ones(items, dtype=bool),
        "nothing": np.zeros((queries, items), dtype=bool),
        "one": np.arange(items) == items // 2,
        "shared": random.random(items) < 0.05,
        "each": random.random((queries, items)) < 0.5,
    }[masks]
    allowed = np.ones(items, dtype=bool)
    for one in (live, mask):
        allowed = allowed if one is None else allowed & one
    with np.errstate(over="ignore"):
        wanted = oracle(codes, table, k, bias, ids, allowed)
    index = ops.Codes(*map(as_tensor, (codes, bias, ids, live)))
    equal_bits(ops.code_search.reference(index, as_tensor(table), k, mask=as_tensor(mask)), wanted)
    for _ in isa_levels():
        equal_bits(ops.code_search(index, as_tensor(table), k, mask=as_tensor(mask)), wanted)


def test_known_values():
    codes = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.uint8)
    table = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])
    scores, ids = ops.code_search(codes, table, 4)
    assert scores.tolist() == [[22.0, 21.0, 21.0, 12.0]]
    assert ids.tolist() == [[1, 0, 4, 3]]
    named = ops.Codes(codes, bias=torch.tensor([0.0, -5.0, 0.0, 0.0, 0.0]), ids=torch.tensor([9, 8, 7, 6, 5]))
    scores, ids = ops.code_search(named, table, 7, mask=torch.tensor([True, True, False, False, True]))
    assert scores.tolist() == [[21.0, 21.0, 17.0, *[-torch.inf] * 4]]
    assert ids.tolist() == [[5, 9, 8, -1, -1, -1, -1]]


def test_gradient_is_cut():
    """Inference only: a table that requires a gradient is detached, and the answer asks for none."""
    codes = torch.zeros((3, 2), dtype=torch.uint8)
    table = torch.zeros(1, 2, 4, requires_grad=True)
    scores, ids = ops.code_search(codes, table, 2)
    assert not scores.requires_grad
    assert ids.tolist() == [[0, 1]]


def test_opcheck(opcheck):
    opcheck(REGISTRY["code_search"])


BASE = {"codes": torch.zeros((3, 2), dtype=torch.uint8), "table": torch.zeros(2, 2, 4), "k": 2}


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"codes": [[0]]}, TypeError, "index must be a tensor of codes or have an attribute codes, got list"),
        ({"codes": torch.zeros(3, 2)}, TypeError, "codes must be uint8 or uint16, got float32"),
        ({"codes": torch.zeros(3, dtype=torch.uint8)}, ValueError, r"codes must have shape \[N, M\], got \[3\]"),
        ({"codes": torch.zeros((3, 0), dtype=torch.uint8)}, ValueError, "at least one codebook"),
        ({"table": torch.zeros(2, 3, 4)}, ValueError, r"table must have shape \[Q, 2, K\], got \[2, 3, 4\]"),
        ({"table": torch.zeros(2, 2, 4, dtype=torch.float64)}, TypeError, "got float64"),
        ({"table": torch.tensor([[[0.0, 1.0], [0.0, torch.nan]]])}, ValueError, r"table\[0, 1, 1\] must .* got nan"),
        ({"table": torch.full((1, 2, 4), torch.inf)}, ValueError, r"table\[0, 0, 0\] must be finite or -inf, got inf"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must have shape \[3\], got \[4\]"),
        ({"mask": torch.ones((1, 3), dtype=torch.bool)}, ValueError, r"mask must have shape \[2, 3\], got \[1, 3\]"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool, got float32"),
        (
            {"codes": torch.tensor([[0, 3], [1, 4]], dtype=torch.uint8)},
            IndexError,
            r"code_search: codes\[1, 1\] = 4 is outside \[0, 4\)",
        ),
        (
            {"codes": torch.tensor([[0, 3], [1, 4096]], dtype=torch.int32).to(torch.uint16)},
            IndexError,
            r"codes\[1, 1\] = 4096 is outside \[0, 4\)",
        ),
        (
            {"codes": ops.Codes(BASE["codes"], bias=torch.tensor([0.0, torch.nan, 0.0]))},
            ValueError,
            r"bias\[1\] must be finite or -inf, got nan",
        ),
        (
            {"codes": ops.Codes(BASE["codes"], ids=torch.tensor([3, -7, 1]))},
            ValueError,
            r"ids\[1\] must be at least 0, got -7",
        ),
        ({"codes": ops.Codes(BASE["codes"], ids=torch.zeros(2).long())}, ValueError, r"ids must have shape \[3\]"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {**BASE, **change}
    with pytest.raises(error, match=sentence):
        ops.code_search(arguments["codes"], arguments["table"], arguments["k"], mask=arguments.get("mask"))


@pytest.mark.parametrize("values", ["normal", "few", "equal"])
def test_same_for_any_k_batch_and_threads(values):
    """50,000 items, so that few queries are cut into pieces and merged."""
    random, codes, table = problem(5, 50_000, 8, 256, 5, values)
    index = ops.Codes(torch.from_numpy(codes), ids=torch.from_numpy(random.permutation(50_000)))
    table = torch.from_numpy(table)
    mask = torch.from_numpy(random.random((5, 50_000)) < 0.3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        scores, ids = ops.code_search(index, table, 100, mask=mask)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for k in (1, 10, 100):
                answer = ops.code_search(index, table, k, mask=mask)
                assert torch.equal(answer[0], scores[:, :k])
                assert torch.equal(answer[1], ids[:, :k])
            single = [ops.code_search(index, table[q : q + 1], 100, mask=mask[q]) for q in range(5)]
            assert torch.equal(torch.cat([one[1] for one in single]), ids)
            assert torch.equal(torch.cat([one[0] for one in single]), scores)
    finally:
        torch.set_num_threads(before)


def test_pieces_with_too_few_items_are_merged(monkeypatch):
    """With two threads each half of the items is searched apart; here both have fewer than k allowed items."""
    # Scratch that looks like entries of score 0 and id 0.
    monkeypatch.setattr(torch, "empty", torch.zeros)
    _, codes, table = problem(1, 40_000, 2, 16, 1)
    mask = torch.zeros(40_000, dtype=torch.bool)
    mask[[3, 39_990, 39_991, 39_992]] = True
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        answer = ops.code_search(torch.from_numpy(codes), torch.from_numpy(table), 6, mask=mask)
    finally:
        torch.set_num_threads(before)
    equal_bits(answer, oracle(codes, table, 6, allowed=mask.numpy()))


def test_minus_infinity_wins_over_overflow():
    """3e38 + 3e38 is inf; inf + -inf is NaN: a forbidden code forbids the item all the same."""
    codes = torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=torch.uint8)
    table = torch.tensor([[[3e38, 0.0], [3e38, 0.0], [-torch.inf, 1.0]]])
    scores, ids = ops.code_search(codes, table, 2)
    assert ids.tolist() == [[1, -1]]
    assert scores.tolist() == [[torch.inf, -torch.inf]]


def test_half_tables_are_widened():
    _, codes, table = problem(2, 100, 3, 16, 2)
    half = torch.from_numpy(table).bfloat16()
    wanted = ops.code_search(torch.from_numpy(codes), half.float(), 5)
    answer = ops.code_search(torch.from_numpy(codes), half, 5)
    assert all(map(torch.equal, answer, wanted))
