"""The five tests of `code_search` (no gradient: the third says what happens to a table that asks for one), and more.

Every plan, layout, instruction set and number of threads must give the bits of one oracle.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recfast_oracle import equal_bits, oracle

from recfast import ops
from recfast.index import Bitmap
from recfast.ops import packed_codes
from recfast.ops._library import REGISTRY


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
    elif values == "soft":
        table[random.random(table.shape) < 0.2] = -1e30
    elif values == "tiny":
        table *= np.float32(1e-42)
    elif values == "huge":
        table = np.clip(table, -5, 5) * np.float32(6e37)
    elif values == "one wide":
        table[:, random.integers(books)] *= 1e6
    elif values == "mostly zero":
        table[random.random(table.shape) < 0.9] = -0.0
    return random, codes, table


VALUES = [
    "normal",
    "equal",
    "few",
    "wide",
    "forbidden",
    "soft",
    "tiny",
    "huge",
    "one wide",
    "mostly zero",
]


def masks_of(kind, random, queries, items):
    return {
        "none": None,
        "all": np.ones(items, dtype=bool),
        "nothing": np.zeros((queries, items), dtype=bool),
        "one": np.arange(items) == items // 2,
        "shared": random.random(items) < 0.05,
        "each": random.random((queries, items)) < 0.5,
    }[kind]


@contextlib.contextmanager
def threads_set(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sparse_of(table):
    """The entries of a table [Q, M, K] that are not 0."""
    flat = table.reshape(len(table), table.shape[1] * table.shape[2])
    rows, codes = flat.nonzero()
    offsets = np.concatenate([[0], np.bincount(rows, minlength=len(flat)).cumsum()]).astype(np.int64)
    return ops.SparseTable(*map(torch.from_numpy, (codes, flat[rows, codes], offsets)))


@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 1000]), st.integers(0, 300)),
    books=st.one_of(st.sampled_from([1, 4, 8, 16, 32]), st.integers(1, 32)),
    entries=st.sampled_from([1, 2, 16, 255, 256, 257, 4096]),
    queries=st.integers(0, 3),
    k=st.sampled_from([0, 1, 7, 100, 2000]),
    values=st.sampled_from(VALUES),
    masks=st.sampled_from(["none", "all", "nothing", "one", "shared", "each"]),
    extras=st.booleans(),
)
def test_matches_reference(seed, items, books, entries, queries, k, values, masks, extras, isa_levels, poisoned_empty):
    random, codes, table = problem(seed, items, books, entries, queries, values)
    bias = random.standard_normal(items).astype(np.float32) if extras else None
    ids = random.permutation(items).astype(np.int64) * 2**33 if extras else None
    live = random.random(items) < 0.8 if extras else None
    mask = masks_of(masks, random, queries, items)
    allowed = np.ones(items, dtype=bool)
    for one in (live, mask):
        allowed = allowed if one is None else allowed & one
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = oracle(codes, table, k, bias, ids, allowed)
    index = ops.Codes(*map(as_tensor, (codes, bias, ids, live)))
    equal_bits(ops.code_search.reference(index, as_tensor(table), k, mask=as_tensor(mask)), wanted)
    for _ in isa_levels():
        equal_bits(ops.code_search(index, as_tensor(table), k, mask=as_tensor(mask)), wanted)


class Words:
    """What an index's own set of slots looks like to the op."""

    def __init__(self, mask, ordered):
        self.words = ops.pack_mask(torch.from_numpy(mask))
        if ordered:
            self.by_position = lambda packed: ops.permute_mask(self.words, packed)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    items=st.one_of(
        st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 257, 4095, 4097, 6000, 9000]), st.integers(0, 700)
    ),
    books=st.one_of(st.sampled_from([1, 4, 8, 16, 32]), st.integers(1, 32)),
    entries=st.sampled_from([1, 2, 16, 64, 100, 255, 256, 300, 4096]),
    queries=st.integers(0, 3),
    k=st.sampled_from([0, 1, 7, 100, 2000]),
    values=st.sampled_from(VALUES),
    masks=st.sampled_from(["none", "all", "nothing", "one", "shared", "each"]),
    form=st.sampled_from(["bool", "bits", "words", "ordered"]),
    wide=st.booleans(),
    clustered=st.booleans(),
    bias=st.sampled_from([None, "normal", "forbidding", "few", "huge"]),
    extras=st.booleans(),
)
def test_packed_matches_reference(
    seed, items, books, entries, queries, k, values, masks, form, wide, clustered, bias, extras, isa_levels
):
    random, codes, table = problem(seed, items, books, entries, queries, values)
    if clustered:  # runs of items that differ in few codes
        codes = codes[random.integers(0, max(items // 50, 1), items)] if items else codes
        change = random.random(codes.shape) < 0.1
        codes[change] = random.integers(0, entries, codes.shape)[change]
    if wide:
        codes = codes.astype(np.uint16)
    shift = {"normal": 1, "forbidding": 1, "few": 1, "huge": 1e37}.get(bias, 0)
    bias_of = random.standard_normal(items).astype(np.float32) * np.float32(shift)
    if bias == "forbidding":
        bias_of[random.random(items) < 0.3] = -np.inf
    elif bias == "few":
        bias_of = np.round(bias_of)
    bias = None if bias is None else bias_of
    ids = random.permutation(items).astype(np.int64) * 2**33 if extras else None
    live = random.random(items) < 0.8 if extras else None
    mask = masks_of(masks, random, queries, items)
    allowed = np.ones(items, dtype=bool)
    for one in (live, mask):
        allowed = allowed if one is None else allowed & one
    with np.errstate(over="ignore", invalid="ignore"):
        # What a sparse table does not name is +0, and so is what a dense one has -0 for then.
        wanted = [oracle(codes, values, k, bias, ids, allowed) for values in (table, table + np.float32(0))]
    given_mask = None
    if mask is not None:
        given_mask = {
            "bool": lambda: torch.from_numpy(mask),
            "bits": lambda: torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little")),
            "words": lambda: Words(mask, False),
            "ordered": lambda: Words(mask, True),
        }[form]()
    arguments = {"n_codes": entries} | {
        name: as_tensor(value) for name, value in (("bias", bias), ("ids", ids), ("live", live))
    }
    tables = [as_tensor(table), sparse_of(table)]
    for order in ("none", "lex"):
        packed = ops.pack_codes(as_tensor(codes), order=order, **arguments)
        assert np.array_equal(packed_codes.unpack_codes(packed).numpy(), codes)
        plans = ["auto", "scan", "scalar"] + ["block_max"] * (order == "lex")
        for _ in isa_levels():
            for at, plan in enumerate(plans):
                with threads_set(1 + at % 3):
                    sparse = (at + seed) % 2
                    answer = ops.code_search(packed, tables[sparse], k, mask=given_mask, plan=plan)
                equal_bits(answer, wanted[sparse])


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
    opcheck(REGISTRY["code_search_packed"])


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


@pytest.mark.parametrize("values", ["normal", "few", "equal", "one wide"])
@pytest.mark.parametrize("order", ["none", "lex"])
def test_packed_same_for_any_k_batch_and_threads(values, order, isa_levels):
    """50,000 items: bounds bite, queries take turns on superblocks, or are cut into pieces that share their theta."""
    random, codes, table = problem(6, 50_000, 8, 256, 5, values)
    if values != "normal":  # so that groups can be passed over; else bounds turn out to be of no use
        codes[:, :3] //= 64
    ids = random.permutation(50_000)
    mask = random.random((5, 50_000)) < 0.02
    packed = ops.pack_codes(
        torch.from_numpy(codes), n_codes=256, ids=torch.from_numpy(ids), order=order, bias=torch.ones(50_000)
    )
    table = torch.from_numpy(table)
    for allowed in (None, mask):
        wanted = oracle(codes, table.numpy(), 100, np.ones(50_000, np.float32), ids, allowed)
        given_mask = as_tensor(allowed)
        for _ in isa_levels():
            for threads in (1, 2, 3):
                with threads_set(threads):
                    for plan in ("scan", "auto"):
                        equal_bits(ops.code_search(packed, table, 100, mask=given_mask, plan=plan), wanted)
                        equal_bits(
                            ops.code_search(packed, table, 10, mask=given_mask, plan=plan),
                            (wanted[0][:, :10], wanted[1][:, :10]),
                        )
                        one = None if allowed is None else given_mask[3:4]
                        equal_bits(
                            ops.code_search(packed, table[3:4], 100, mask=one, plan=plan),
                            (wanted[0][3:4], wanted[1][3:4]),
                        )


@pytest.mark.parametrize("items", [0, 1, 64, 130, 4100])
@pytest.mark.parametrize("entries", [7, 256, 257, 1000])
def test_packing_matches_reference(items, entries):
    random, codes, _ = problem(items, items, 3, entries, 0)
    bias = torch.from_numpy(random.standard_normal(items).astype(np.float32))
    bias[::7] = -torch.inf
    live = torch.from_numpy(random.random(items) < 0.5)
    for order in ("none", "lex"):
        for extras in ({}, {"bias": bias, "ids": torch.arange(items), "live": live}):
            arguments = {"n_codes": entries, "order": order, **extras}
            packed = ops.pack_codes(torch.from_numpy(codes), **arguments)
            for have, want in zip(packed, ops.pack_codes.reference(torch.from_numpy(codes), **arguments), strict=True):
                # Through numpy: torch compares no uint16.
                assert (have is None) == (want is None)
                np.testing.assert_array_equal(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in (have, want)))
    mask = torch.from_numpy(random.random((2, items)) < 0.3)
    words = ops.pack_mask(mask)
    assert torch.equal(words, ops.pack_mask.reference(mask))
    for some in (words, ~words, words[0]):
        # What lies beyond the last item means nothing.
        have, want = ops.permute_mask(some, packed), ops.permute_mask.reference(some, packed)
        last = torch.full(some.shape[-1:], -1)
        if items % 64:
            last[-1] = 2 ** (items % 64) - 1
        assert torch.equal(have & last, want & last)


def test_lines_of_bitmaps_widen_as_items_come(isa_levels):
    """From one word a line to eight and a second span, by appends; the bits are those that packing anew would set."""
    random = np.random.default_rng(5)
    codes = np.sort(random.integers(0, 256, (300_000, 2)).astype(np.uint8), axis=0)
    packed = ops.pack_codes(torch.from_numpy(codes[:100]), n_codes=256, order="lex")
    table = torch.from_numpy(random.standard_normal((2, 2, 256)).astype(np.float32))
    widths = []
    for end in (16_384, 16_385, 40_000, 131_072, 300_000):
        packed = packed_codes.packed_append(packed, torch.from_numpy(codes[packed.size : end]))
        widths.append(packed.held.shape[3])
        spans = packed_codes.spans_of(-(-end // 64))
        assert torch.equal(
            packed.held[:spans], packed_codes._held(packed._replace(planes=packed.planes[: -(-end // 64)]))
        )
        wanted = [part.numpy() for part in ops.code_search.reference(torch.from_numpy(codes[:end]), table, 50)]
        for _ in isa_levels():
            equal_bits(ops.code_search(packed, table, 50, plan="block_max"), wanted)
    assert widths == [1, 2, 4, 8, 8]


def test_sparse_zeros_are_positive():
    """What a sparse table does not name is +0: where all of an item's terms are -0 or absent, absent wins."""
    packed = ops.pack_codes(torch.tensor([[0, 0], [1, 1]], dtype=torch.uint8), n_codes=2)
    sparse = ops.SparseTable(torch.tensor([0]), torch.tensor([-0.0]), torch.tensor([0, 1]))
    scores, ids = ops.code_search(packed, sparse, 2)
    assert ids.tolist() == [[0, 1]]
    assert not scores.signbit().any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("order", ["none", "lex"])
def test_edits_equal_packing_anew(order, dtype, isa_levels):
    """Appends, updates, removals and restorals; the answer is that of the items as they stand, on every plan."""
    random = np.random.default_rng(4)
    entries, books = (256, 4) if dtype == torch.uint8 else (1000, 3)
    kind = np.uint8 if dtype == torch.uint8 else np.uint16

    def draw(count):
        codes = random.integers(0, entries, (count, books)).astype(kind)
        codes[:, 0] //= 32
        return codes, random.standard_normal(count).astype(np.float32)

    codes, bias = draw(5000)
    ids = random.permutation(20_000)
    live = np.ones(5000, dtype=bool)
    packed = ops.pack_codes(
        torch.from_numpy(codes),
        n_codes=entries,
        bias=torch.from_numpy(bias),
        ids=torch.from_numpy(ids[:5000]),
        order=order,
    )
    table = random.standard_normal((2, books, entries)).astype(np.float32)
    mask = random.random(20_000) < 0.3
    for step in range(6):
        if step % 3 != 1:
            new, more = draw([1, 63, 700, 0, 3000, 1][step])
            start = len(codes)
            packed = packed_codes.packed_append(
                packed,
                torch.from_numpy(new),
                bias=torch.from_numpy(more),
                ids=torch.from_numpy(ids[start : start + len(new)]),
            )
            codes, bias = np.concatenate([codes, new]), np.concatenate([bias, more])
            live = np.concatenate([live, np.ones(len(new), dtype=bool)])
        slots = random.choice(len(codes), 200, replace=False)
        positions = torch.from_numpy(slots) if packed.positions is None else packed.positions[slots].long()
        codes[slots], bias[slots] = draw(200)
        bias[slots[:3]] = 3.0 + step  # above every level
        packed_codes.packed_write(packed, positions, torch.from_numpy(codes[slots]), torch.from_numpy(bias[slots]))
        codes[slots[:9]] = draw(9)[0]
        packed_codes.packed_write(packed, positions[:9], torch.from_numpy(codes[slots[:9]]))
        packed = packed_codes.packed_remove(packed, positions[100:])
        packed = packed_codes.packed_restore(packed, positions[150:])
        live[slots[100:150]], live[slots[150:]] = False, True
        count = len(codes)
        assert packed.size == count
        assert np.array_equal(packed_codes.unpack_codes(packed).numpy(), codes)
        for allowed in (live, live & mask[:count]):
            wanted = oracle(codes, table, 50, bias, ids[:count], allowed)
            given_mask = None if allowed is live else torch.from_numpy(mask[:count])
            for _ in isa_levels():
                for plan in ("auto", "scan", "scalar"):
                    equal_bits(ops.code_search(packed, torch.from_numpy(table), 50, mask=given_mask, plan=plan), wanted)


def test_edits_refuse_before_writing():
    packed = ops.pack_codes(torch.zeros((70, 2), dtype=torch.uint8), n_codes=4, ids=torch.arange(70))
    one, row = torch.tensor([3]), torch.zeros((1, 2), dtype=torch.uint8)
    with pytest.raises(IndexError, match=r"packed_write: positions\[0\] = 70 is outside \[0, 70\)"):
        packed_codes.packed_write(packed, torch.tensor([70]), row)
    with pytest.raises(IndexError, match=r"packed_write: codes\[0, 1\] = 4 is outside \[0, 4\)"):
        packed_codes.packed_write(packed, one, torch.tensor([[0, 4]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="packed_write: bias must be left out"):
        packed_codes.packed_write(packed, one, row, torch.zeros(1))
    with pytest.raises(ValueError, match="packed_append: ids must be given"):
        packed_codes.packed_append(packed, row)
    with pytest.raises(ValueError, match=r"packed_append: ids\[0\] must be at least 0, got -1"):
        packed_codes.packed_append(packed, row, ids=torch.tensor([-1]))
    with pytest.raises(IndexError, match=r"packed_remove: positions\[0\] = -1"):
        packed_codes.packed_remove(packed, torch.tensor([-1]))
    assert not packed.planes.any()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"order": "random"}, ValueError, "order must be one of none, lex, got 'random'"),
        ({"n_codes": 0}, ValueError, r"n_codes must be in \[1, 65536\], got 0"),
        ({"n_codes": 2}, IndexError, r"pack_codes: codes\[1, 0\] = 2 is outside \[0, 2\)"),
        ({"bias": torch.tensor([0.0, torch.inf])}, ValueError, r"bias\[1\] must be finite or -inf, got inf"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \[2\], got \[3\]"),
        ({"ids": torch.tensor([0, -1])}, ValueError, r"ids\[1\] must be at least 0, got -1"),
        ({"live": torch.ones(2)}, TypeError, "live must be bool, got float32"),
    ],
)
def test_packing_refuses(change, error, sentence):
    with pytest.raises(error, match=sentence):
        ops.pack_codes(torch.tensor([[0], [2]], dtype=torch.uint8), **({"n_codes": 3} | change))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"table": torch.zeros(1, 2, 5)}, ValueError, r"table must have shape \[Q, 2, 4\], got \[1, 2, 5\]"),
        ({"table": torch.full((1, 2, 4), torch.nan)}, ValueError, r"table\[0, 0, 0\] must be finite or -inf, got nan"),
        ({"table": ([0, 8], [1.0, 1.0], [0, 2])}, IndexError, r"table.codes\[1\] = 8 is outside \[0, 8\)"),
        ({"table": ([3, 3], [1.0, 1.0], [0, 2])}, ValueError, r"table.codes\[1\] = 3 must be above the entry before"),
        ({"table": ([3], [torch.inf], [0, 1])}, ValueError, r"table.values\[0\] must be finite or -inf, got inf"),
        ({"table": ([3], [1.0], [1, 1])}, ValueError, r"table.offsets\[0\] must be 0, got 1"),
        ({"table": ([3], [1.0], [0, 1, 0])}, ValueError, r"table.offsets\[2\] = 0 is below the entry before it, 1"),
        ({"table": ([3], [1.0], [0, 2])}, ValueError, r"table.offsets\[1\] = 2 must be 1, the number of entries"),
        ({"table": ([3], [1.0], [])}, ValueError, "one entry more than there are queries"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must have shape \[70\], got \[4\]"),
        ({"mask": torch.ones(70, dtype=torch.uint8)}, ValueError, r"mask must have shape \[9\], got \[70\]"),
        ({"mask": torch.ones(70)}, TypeError, "mask must be bool or uint8, got float32"),
        ({"mask": Bitmap.allow(69, [0])}, ValueError, "mask must be a bitmap of 70 items, got one of 69"),
        ({"plan": "block_max"}, ValueError, "plan block_max needs the bitmaps"),
        ({"plan": "fast"}, ValueError, "plan must be one of auto, scan, block_max, scalar, got 'fast'"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
    ],
)
def test_packed_rejects_bad_input(change, error, sentence):
    packed = ops.pack_codes(torch.zeros((70, 2), dtype=torch.uint8), n_codes=4)
    arguments = {"table": torch.zeros(1, 2, 4), "k": 1} | change
    if isinstance(arguments["table"], tuple):
        codes, values, offsets = arguments["table"]
        arguments["table"] = ops.SparseTable(
            torch.tensor(codes, dtype=torch.int64), torch.tensor(values), torch.tensor(offsets, dtype=torch.int64)
        )
    with pytest.raises(error, match=sentence):
        ops.code_search(packed, **arguments)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), r"mask.words must have shape \[3, 2\], got \[1, 2\]"),
        (torch.zeros(1, dtype=torch.int64), r"mask.words must have shape \[2\], got \[1\]"),
    ],
)
def test_words_by_position_are_checked(words, sentence):
    packed = ops.pack_codes(torch.zeros((70, 2), dtype=torch.uint8), n_codes=4, order="lex")
    mask = SimpleNamespace(words=torch.zeros(2, dtype=torch.int64), by_position=lambda packed: words)
    with pytest.raises(ValueError, match=sentence):
        ops.code_search(packed, torch.zeros(3, 2, 4), 1, mask=mask)
    with pytest.raises(ValueError, match=r"permute_mask: words must have shape \[..., 2\], got \[1\]"):
        ops.permute_mask(torch.zeros(1, dtype=torch.int64), packed)


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
