"""The five tests of `code_postings` (no gradient: the third says what happens to values that ask for one)."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recfast_oracle import equal_bits, oracle

from recfast import ops
from recfast.index import Bitmap
from recfast.ops._library import REGISTRY


class Packed(NamedTuple):
    """What `code_postings` reads of a `PackedCodes`."""

    planes: torch.Tensor
    size: int
    slots: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    live: torch.Tensor | None = None


def packed_codes(codes, slots=None, bias=None, ids=None, live=None):
    """Codes, bias, ids and live by slot, laid out in the order of `slots`."""
    size, books = codes.shape
    places = np.arange(size) if slots is None else slots
    rows = np.zeros((-(-size // 64) * 64, books), dtype=codes.dtype)
    rows[:size] = codes[places]
    planes = rows.reshape(-1, 64, books).transpose(0, 2, 1)
    return Packed(
        torch.from_numpy(np.ascontiguousarray(planes)),
        size,
        None if slots is None else torch.from_numpy(slots.astype(np.int32)),
        None if bias is None else torch.from_numpy(bias[places]),
        None if ids is None else torch.from_numpy(ids),
        None if live is None else words(live[places]),
    )


def words(mask):
    """Bool [..., N] as int64 bit words."""
    size = mask.shape[-1]
    packed = np.zeros((*mask.shape[:-1], -(-size // 64) * 8), dtype=np.uint8)
    bits = np.packbits(mask, axis=-1, bitorder="little")
    packed[..., : bits.shape[-1]] = bits
    return torch.from_numpy(packed.view(np.int64))


def sparse(table):
    """The entries of a dense table [Q, M, K] that are not 0."""
    flat = table.reshape(len(table), table.shape[1] * table.shape[2])
    rows, codes = flat.nonzero()
    offsets = np.concatenate([[0], np.bincount(rows, minlength=len(table)).cumsum()])
    return tuple(map(torch.from_numpy, (codes.astype(np.int64), flat[rows, codes], offsets.astype(np.int64))))


@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65, 1000]), st.integers(0, 300)),
    books=st.integers(1, 9),
    entries=st.sampled_from([1, 2, 16, 255, 256, 257, 4096]),
    queries=st.integers(0, 3),
    k=st.sampled_from([0, 1, 7, 100, 2000]),
    values=st.sampled_from(["normal", "positive", "negative", "few", "wide", "forbidden", "nothing"]),
    masks=st.sampled_from(["none", "nothing", "one", "shared", "each"]),
    extras=st.lists(st.sampled_from(["slots", "bias", "ids", "live"]), unique=True),
)
def test_matches_reference(seed, items, books, entries, queries, k, values, masks, extras, poisoned_empty):
    random = np.random.default_rng(seed)
    codes = random.integers(0, entries, (items, books)).astype(np.uint8 if entries <= 256 else np.uint16)
    table = random.standard_normal((queries, books, entries)).astype(np.float32)
    table[random.random(table.shape) > random.choice([0.02, 0.3, 1.0])] = 0
    if values == "positive":
        table = np.abs(table)
    elif values == "negative":
        table = -np.abs(table) + np.float32(0)  # a zero without a sign
    elif values == "few":
        table = np.sign(table)
    elif values == "wide":
        table *= (10.0 ** random.integers(-44, 38, table.shape)).astype(np.float32)
        table = np.maximum(table, np.float32(-3e38)).clip(max=np.float32(3e38)) + np.float32(0)
    elif values == "forbidden":
        table[(table != 0) & (random.random(table.shape) < 0.3)] = -np.inf
    elif values == "nothing":
        table[:] = 0
    bias = random.integers(-2, 3, items).astype(np.float32) / 2 if "bias" in extras else None
    if bias is not None and seed % 2:
        bias[random.random(items) < 0.2] = -np.inf
    ids = random.permutation(items).astype(np.int64) * 2**33 if "ids" in extras else None
    live = random.random(items) < 0.8 if "live" in extras else None
    slots = random.permutation(items) if "slots" in extras else None
    mask = {
        "none": None,
        "nothing": np.zeros((queries, items), dtype=bool),
        "one": np.arange(items) == items // 2,
        "shared": random.random(items) < 0.05,
        "each": random.random((queries, items)) < 0.5,
    }[masks]
    allowed = np.ones(items, dtype=bool)
    for one in (live, mask):
        allowed = allowed if one is None else allowed & one
    wanted = oracle(codes, table, k, bias, ids, allowed)
    packed = packed_codes(codes, slots, bias, ids, live)
    lists = ops.posting_lists(packed, entries)
    bits = None if mask is None else words(mask)
    equal_bits(ops.code_postings.reference(lists, packed, sparse(table), k, mask=bits), wanted)
    equal_bits(ops.code_postings(lists, packed, sparse(table), k, mask=bits), wanted)


def test_known_values():
    codes = np.array([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]], dtype=np.uint8)
    packed = packed_codes(codes)
    lists = ops.posting_lists(packed, 2)
    assert lists.indptr.tolist() == [0, 3, 5, 7, 10]
    assert lists.positions.tolist() == [0, 2, 4, 1, 3, 2, 3, 0, 1, 4]
    assert lists.order is None
    assert ops.posting_counts(packed, 2).tolist() == [3, 2, 2, 3]
    # Code 1 of codebook 0 counts 2; code 1 of codebook 1 counts -1.
    table = torch.tensor([1, 3]), torch.tensor([2.0, -1.0]), torch.tensor([0, 2])
    scores, ids = ops.code_postings(lists, packed, table, 7)
    assert scores.tolist() == [[2.0, 1.0, 0.0, -1.0, -1.0, -torch.inf, -torch.inf]]
    assert ids.tolist() == [[3, 1, 2, 0, 4, -1, -1]]
    # Nothing but a bias: the highest first, among equals the lowest id.
    biased = packed_codes(codes, bias=np.array([0, 3, 1, 3, -np.inf], dtype=np.float32), ids=np.array([9, 8, 7, 6, 5]))
    lists = ops.posting_lists(biased, 2)
    assert lists.order.tolist() == [3, 1, 2, 0, 4]
    empty = torch.tensor([], dtype=torch.int64), torch.tensor([]), torch.tensor([0, 0])
    assert ops.code_postings(lists, biased, empty, 5)[1].tolist() == [[6, 8, 7, 9, -1]]


@pytest.mark.parametrize("items", [32768, 100_000])
@pytest.mark.parametrize("extras", [False, True])
def test_several_tiles(items, extras):
    random = np.random.default_rng(items)
    codes = random.integers(0, 200, (items, 4)).astype(np.uint8)
    table = np.where(random.random((5, 4, 200)) < 0.02, random.integers(-1, 3, (5, 4, 200)), 0).astype(np.float32)
    table[0, 0, 7] = 5
    table[1] = np.abs(table[1]) * random.random(table[1].shape, dtype=np.float32)
    live = random.random(items) < 0.9 if extras else None
    mask = random.random((5, items)) < 0.5 if extras else None
    packed = packed_codes(codes, slots=random.permutation(items), live=live)
    bits = words(mask) if extras else None
    answer = ops.code_postings(ops.posting_lists(packed, 200), packed, sparse(table), 500, mask=bits)
    equal_bits(answer, oracle(codes, table, 500, allowed=mask & live if extras else None))


def test_same_for_any_batch_and_threads():
    random = np.random.default_rng(0)
    codes = random.integers(0, 64, (5000, 4)).astype(np.uint8)
    table = np.where(random.random((7, 4, 64)) < 0.05, random.integers(-2, 3, (7, 4, 64)), 0).astype(np.float32)
    packed = packed_codes(codes)
    lists = ops.posting_lists(packed, 64)
    wanted = oracle(codes, table, 50)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = ops.posting_lists(packed, 64)
            assert torch.equal(again.positions, lists.positions)
            equal_bits(ops.code_postings(lists, packed, sparse(table), 50), wanted)
            single = [ops.code_postings(lists, packed, sparse(table[q : q + 1]), 50) for q in range(7)]
            equal_bits([torch.cat(parts) for parts in zip(*single, strict=True)], wanted)
    finally:
        torch.set_num_threads(before)


def test_gradient_is_cut():
    """Inference only: values that require a gradient are detached, and the answer asks for none."""
    packed = packed_codes(np.zeros((3, 2), dtype=np.uint8))
    table = torch.tensor([0]), torch.ones(1, requires_grad=True), torch.tensor([0, 1])
    scores, ids = ops.code_postings(ops.posting_lists(packed, 4), packed, table, 2)
    assert not scores.requires_grad
    assert (scores.tolist(), ids.tolist()) == ([[1.0, 1.0]], [[0, 1]])


def test_opcheck(opcheck):
    opcheck(REGISTRY["code_postings"])


PACKED = packed_codes(np.zeros((3, 2), dtype=np.uint8))
TABLE = {"codes": torch.tensor([0, 5]), "values": torch.tensor([1.0, 2.0]), "offsets": torch.tensor([0, 2])}


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"codes": torch.tensor([0, 8])}, IndexError, r"code_postings: codes\[1\] = 8 is outside \[0, 8\)"),
        ({"codes": torch.tensor([-1, 5])}, IndexError, r"codes\[0\] = -1 is outside"),
        ({"codes": torch.tensor([5, 5])}, ValueError, r"codes\[1\] must be above 5, the one before it, got 5"),
        ({"codes": torch.tensor([0, 5]).int()}, TypeError, "codes must be int64, got int32"),
        ({"values": torch.tensor([1.0, torch.nan])}, ValueError, r"values\[1\] must be finite or -inf, got nan"),
        ({"values": torch.tensor([torch.inf, 1.0])}, ValueError, r"values\[0\] must be finite or -inf, got inf"),
        ({"values": torch.tensor([1.0])}, ValueError, r"values must have shape \[2\], got \[1\]"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, "offsets must rise from 0 to 2"),
        ({"offsets": torch.tensor([0, 3, 2])}, ValueError, "offsets must rise from 0 to 2"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must rise from 0 to 2"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"mask": torch.zeros(2, dtype=torch.int64)}, ValueError, r"mask must have shape \[1\], got \[2\]"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, TypeError, "mask must be int64, got bool"),
        ({"mask": Bitmap.allow(4, [0])}, ValueError, "mask must be a bitmap of 3 items, got one of 4"),
        ({"packed": PACKED._replace(size=65)}, ValueError, r"positions must have shape \[130\], got \[6\]"),
        ({"packed": PACKED._replace(ids=torch.zeros(2).long())}, ValueError, r"ids must have shape \[3\], got \[2\]"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    table = tuple(change.get(name, value) for name, value in TABLE.items())
    lists = ops.posting_lists(PACKED, 4)
    with pytest.raises(error, match=sentence):
        ops.code_postings(lists, change.get("packed", PACKED), table, change.get("k", 2), mask=change.get("mask"))


@pytest.mark.parametrize(("items", "books", "entries"), [(1, 1, 1), (64, 2, 7), (1000, 3, 256), (300, 2, 700)])
def test_lists_equal_their_plain_form(items, books, entries):
    generator = torch.Generator().manual_seed(items)
    dtype = torch.uint8 if entries <= 256 else torch.uint16
    codes = torch.randint(entries, (items, books), generator=generator).to(dtype)
    for order in ("none", "lex"):
        packed = ops.pack_codes(codes, n_codes=entries, order=order)
        assert torch.equal(ops.posting_counts(packed, entries), ops.posting_counts.reference(packed, entries))
        found, wanted = ops.posting_lists(packed, entries), ops.posting_lists.reference(packed, entries)
        assert torch.equal(found.indptr, wanted.indptr)
        assert torch.equal(found.positions, wanted.positions)


@pytest.mark.parametrize("op", [ops.posting_counts, ops.posting_lists])
def test_lists_for_fewer_codes_are_refused(op):
    packed = ops.pack_codes(torch.tensor([[3]], dtype=torch.uint8), n_codes=4)
    with pytest.raises(ValueError, match=f"{op.__name__}: n_codes must be at least 4, as the items have, got 2"):
        op(packed, 2)
