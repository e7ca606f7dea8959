import gc
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.index import Bitmap
from recfast.index._arrays import as_mask
from recfast.ops import packed_codes

SIZES = st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 128, 1000])


@given(seed=st.integers(0, 2**32 - 1), size=SIZES, queries=st.sampled_from([None, 0, 1, 3]))
def test_is_the_set_that_the_mask_is(seed, size, queries):
    random = np.random.default_rng(seed)
    shape = (size,) if queries is None else (queries, size)
    mask, other = random.random(shape) < 0.4, random.random(size) < 0.5
    bitmap, second = Bitmap.from_mask(mask), Bitmap.from_mask(torch.from_numpy(other))
    assert bitmap.shape == shape
    assert len(bitmap) == size
    assert bitmap.queries == queries
    for made, wanted in (
        (bitmap, mask),
        (~bitmap, ~mask),
        (bitmap & second, mask & other),
        (second | bitmap, mask | other),
        (bitmap - second, mask & ~other),
        (second - bitmap, other & ~mask),
        (Bitmap.from_packed(np.packbits(mask, axis=-1, bitorder="little"), size), mask),
        (pickle.loads(pickle.dumps(bitmap)), mask),
    ):
        np.testing.assert_array_equal(made.to_mask().numpy(), wanted)
        np.testing.assert_array_equal(np.asarray(made.count()), wanted.sum(-1))
        assert made == Bitmap.from_mask(wanted)
    codes = torch.from_numpy(random.integers(0, 256, (size, 2)).astype(np.uint8))
    packed = ops.pack_codes(codes, n_codes=256, order="lex")
    words = bitmap.by_position(packed)
    np.testing.assert_array_equal(Bitmap(words, size).to_mask().numpy(), mask[..., packed.slots.numpy()])
    assert bitmap.by_position(packed) is words
    assert bitmap.by_position(ops.pack_codes(codes, n_codes=256)) is bitmap.words


def test_lists_of_slots():
    assert Bitmap.allow(70, [3, 69, 3]).to_mask().nonzero()[:, 0].tolist() == [3, 69]
    assert Bitmap.deny(4, np.array([1])).to_mask().tolist() == [True, False, True, True]
    each = Bitmap.allow(70, [5, 64, 1], offsets=[0, 2, 2, 3])
    assert [row.nonzero()[:, 0].tolist() for row in each.to_mask()] == [[5, 64], [], [1]]
    assert each[0] == Bitmap.allow(70, [5, 64])
    assert each[1:].shape == (2, 70)
    assert Bitmap.deny(70, [5, 64, 1], offsets=[0, 2, 2, 3]) == ~each
    assert Bitmap.allow(3, []).count() == 0
    assert repr(Bitmap.allow(3, [1])) == "Bitmap(1 of 3 slots)"


def test_a_new_order_is_permuted_anew():
    bitmap = Bitmap.allow(3, [0])
    for order in ([1, 0, 2], [2, 1, 0], [0, 1, 2]):
        codes = torch.tensor(order, dtype=torch.uint8)[:, None]
        packed = ops.pack_codes(codes, n_codes=4, order="lex")
        assert Bitmap(bitmap.by_position(packed), 3).to_mask().tolist() == [slot == 0 for slot in packed.slots]
        del packed
        gc.collect()


def test_a_kept_order_is_not_for_more_items():
    codes = torch.zeros((300, 1), dtype=torch.uint8)
    packed = packed_codes.packed_append(ops.pack_codes(codes, n_codes=4, order="lex"), codes)
    bitmap = Bitmap.allow(600, [0])
    assert len(bitmap.by_position(packed)) == 10
    longer = packed_codes.packed_append(packed, codes[:100])
    assert longer.slots is packed.slots
    with pytest.raises(ValueError, match="Bitmap: there must be 600 items, got 700"):
        bitmap.by_position(longer)


def test_as_mask():
    mask = torch.tensor([True, False, True])
    bitmap = Bitmap.from_mask(mask)
    packed = torch.tensor([5 + 8], dtype=torch.uint8)  # a bit beyond the size
    for given_ in (mask, mask.numpy(), bitmap, packed):
        assert torch.equal(as_mask("here", given_, 2, 3, "bool"), mask)
        assert as_mask("here", given_, 2, 3, "bits") == bitmap
    assert as_mask("here", mask, 2, 3).data_ptr() == mask.data_ptr()
    assert as_mask("here", None, 2, 3, "bool") is None
    assert as_mask("here", packed.expand(2, 1), 2, 3, "bool").tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: Bitmap(torch.zeros(1), 3), TypeError, "words must be a tensor of int64, got float32"),
        (lambda: Bitmap(torch.zeros(2, dtype=torch.int64), 64), ValueError, r"must have shape \[1\] or \[Q, 1\], got"),
        (lambda: Bitmap(torch.tensor([8]), 3), ValueError, "no bit at or above size = 3"),
        (lambda: Bitmap(torch.tensor([-(2**63)]), 63), ValueError, "no bit at or above size = 63"),
        (lambda: Bitmap.allow(3, [3]), IndexError, r"allow: slots\[0\] = 3 is outside \[0, 3\)"),
        (lambda: Bitmap.allow(3, [-1]), ValueError, r"ids\[0\] must be at least 0, got -1"),
        (lambda: Bitmap.allow(3, [0.5]), TypeError, "ids must be integers, got float64"),
        (lambda: Bitmap.allow(3, [0, 1], [0, 1]), ValueError, "offsets must rise from 0 to 2"),
        (lambda: Bitmap.from_mask(torch.zeros(3)), TypeError, "mask must be bool, got float32"),
        (lambda: Bitmap.from_packed(torch.zeros(1, dtype=torch.uint8), 9), ValueError, r"\[2\] or \[Q, 2\] for 9"),
        (lambda: Bitmap.allow(3, [1]) & Bitmap.allow(4, [1]), ValueError, "both must have 3 slots, got 4"),
        (lambda: Bitmap.allow(3, [1])[0], IndexError, "one set for all queries"),
        (lambda: as_mask("here", torch.zeros(3), 1, 3), TypeError, "here: mask must be bool, packed uint8 or a Bitmap"),
        (lambda: as_mask("here", Bitmap.allow(4, []), 1, 3), ValueError, r"mask must have shape \[3\], got \[4\]"),
        (lambda: as_mask("here", np.ones((2, 3), bool), 1, 3), ValueError, r"shape \[1, 3\], got \[2, 3\]"),
        (lambda: as_mask("here", np.ones(3, np.uint8), 1, 3), ValueError, r"shape \[1\], got \[3\]"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_code_search_refuses_a_bitmap_of_other_queries_or_items():
    """Also where its words by position are kept: they would be read beyond their end."""
    codes = torch.randint(16, (500, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = packed_codes.packed_append(ops.pack_codes(codes, n_codes=16, order="lex"), codes[:5])
    grown, further = (packed_codes.packed_append(packed, codes[:items]) for items in (70, 3))
    assert grown.slots is packed.slots
    table = torch.zeros(3, 3, 16)
    with pytest.raises(ValueError, match=r"mask.words must have shape \[3, 8\], got \[2, 8\]"):
        ops.code_search(packed, table, 4, mask=Bitmap.from_mask(torch.ones(2, 505, dtype=torch.bool)))
    whole = Bitmap.from_mask(torch.ones(505, dtype=torch.bool))
    assert ops.code_search(packed, table, 4, mask=whole)[1].tolist() == [[0, 1, 2, 3]] * 3
    with pytest.raises(ValueError, match="must be a bitmap of 575 items, got one of 505"):
        ops.code_search(grown, table, 4, mask=whole)
    with pytest.raises(ValueError, match="must be a bitmap of 508 items, got one of 505"):
        ops.code_search(further, table, 4, mask=whole)
