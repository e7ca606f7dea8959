"""The five tests of an op, and the bits that must be the same everywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float64: 2.0**-53}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def projections_for(x, tables, bits, seed=1):
    return random(
        x.shape[-1], tables, bits, seed=seed, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )


def bits_of(codes, bits):
    """bool [..., M * bits]."""
    return ((codes.long().unsqueeze(-1) >> torch.arange(bits)) & 1).bool().flatten(-2)


widths = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 64]), st.integers(1, 70))


@given(
    rows=st.one_of(st.sampled_from([0, 1, 7, 8, 9, 24, 25]), st.integers(0, 60)),
    dim=widths,
    tables=st.integers(1, 20),
    bits=st.one_of(st.integers(1, 8), st.sampled_from([9, 31, 33, 63, 64])),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=80)
def test_matches_reference(rows, dim, tables, bits, dtype, isa_levels, poisoned_empty):
    x = random(rows, dim, dtype=dtype)
    if rows > 2:
        x[1] = 0
    projections = projections_for(x, tables, bits)
    flat = projections.double().flatten(1)
    exact = x.double() @ flat
    # Terms of the sum, each with its own rounding and that of the sums after it.
    sure = exact.abs() > (dim + 1) * EPS[dtype] * (x.double().abs() @ flat.abs())
    answers = []
    for _ in isa_levels():
        codes = ops.simhash(x, projections)
        assert codes.dtype == (torch.uint8 if bits <= 8 else torch.int64)
        assert codes.shape == (rows, tables)
        have = bits_of(codes, bits)
        assert torch.equal(have[sure], (exact > 0)[sure])
        if bits < 8:
            assert not (codes >> bits).any()
        answers.append(codes)
    # On every instruction set the same bits, those within rounding of 0 too.
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    if rows > 2:
        assert not answers[0][1].any()


def test_known_values():
    x = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0], [math.nan, 1.0], [3.0, 4.0]])
    # Hash 0: signs of x0, x1, -x0. Hash 1: of x0 - x1, x0 + x1, x1.
    projections = torch.tensor([[[1.0, 0.0, -1.0], [1.0, 1.0, 0.0]], [[0.0, 1.0, 0.0], [-1.0, 1.0, 1.0]]])
    assert ops.simhash(x, projections).tolist() == [[1, 3], [0, 1], [0, 0], [0, 0], [3, 6]]
    # Exactly 0 is not above 0; bit 63 is the sign of an int64.
    one = torch.zeros(1, 1, 64)
    one[0, 0, 63] = 1
    assert ops.simhash(torch.tensor([[1.0], [-1.0]]), one).tolist() == [[-(2**63)], [0]]
    one[0, 0, 0] = 1
    assert ops.simhash(torch.tensor([[1.0]]), one).tolist() == [[-(2**63) + 1]]


def near_zero(rows=4000, dim=64):
    """Rows whose projections sit within rounding of 0, where any other order of sums gives other signs."""
    x = random(rows, dim)
    projections = random(dim, 3, 8, seed=2)
    # Turn each row until its first projection is nothing but rounding.
    direction = projections[:, 0, 0].double()
    x = x.double() - (x.double() @ direction / direction.dot(direction)).unsqueeze(1) * direction
    return x.float(), projections


def test_signs_within_rounding_of_zero_are_equal_too(isa_levels):
    x, projections = near_zero()
    answers = [ops.simhash(x, projections) for _ in isa_levels()]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    # The case is what it claims to be: plain torch does not agree with these signs everywhere.
    other = (x @ projections[:, 0, 0]) > 0
    assert (bits_of(answers[0], 8)[:, 0] != other).any()


def test_an_input_that_requires_a_gradient_gives_codes_without():
    x = random(4, 6).requires_grad_()
    codes = ops.simhash(x, random(6, 2, 3, seed=1).requires_grad_())
    assert not codes.requires_grad
    assert torch.equal(codes, ops.simhash(x.detach(), random(6, 2, 3, seed=1)))


def test_opcheck(opcheck):
    opcheck(REGISTRY["simhash"])


def test_compiles_in_one_graph():
    x, projections = random(5, 9), random(9, 4, 3, seed=1)
    compiled = torch.compile(ops.simhash, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, projections), ops.simhash(x, projections))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_code_depends_on_its_row_alone(dtype, isa_levels):
    x = random(3, 41, 17, dtype=dtype)
    projections = projections_for(x, 5, 3)
    wide = torch.full((4, 50, 40), math.nan, dtype=dtype)
    wide[:3, 4:45, 9:26] = x
    for _ in isa_levels():
        together = ops.simhash(x, projections)
        alone = torch.stack([torch.stack([ops.simhash(row, projections) for row in user]) for user in x])
        assert torch.equal(together, alone)
        strided = wide[:3, 4:45, 9:26]
        assert torch.equal(ops.simhash(strided, projections), together)
        assert torch.equal(ops.simhash(strided.transpose(0, 1), projections), together.transpose(0, 1))
        assert torch.equal(ops.simhash(x.transpose(1, 2).contiguous().transpose(1, 2), projections), together)
    four = x[:, :40].reshape(3, 4, 10, 17)[:, ::2, ::3]  # three levels of strides
    assert torch.equal(ops.simhash(four, projections), ops.simhash(four.contiguous(), projections))
    assert ops.simhash(x[:0], projections).shape == (0, 41, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 20])
def test_padding_is_not_read(dtype, bits, isa_levels, poisoned_empty):
    lengths = [0, 41, 1, 7, 30]
    x = random(5, 41, 17, dtype=dtype)
    projections = projections_for(x, 5, bits)
    whole = ops.simhash(x, projections)
    for b, length in enumerate(lengths):
        x[b, length:] = 1e30  # if read, it would give other codes than 0
        whole[b, length:] = 0
    for _ in isa_levels():
        for index in (torch.int32, torch.int64):
            assert torch.equal(ops.simhash(x, projections, lengths=torch.tensor(lengths, dtype=index)), whole)
        short = ops.simhash(x[:, :9], projections, lengths=torch.tensor(lengths).clamp(max=9))
        assert torch.equal(short, whole[:, :9])
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(ops.simhash(turned, projections, lengths=torch.tensor(lengths)), whole)
    assert torch.equal(ops.simhash.reference(x, projections, torch.tensor(lengths)), whole)


def test_bfloat16_equals_its_widening(isa_levels):
    x, projections = random(100, 33, dtype=torch.bfloat16), random(33, 6, 5, seed=1)
    for _ in isa_levels():
        assert torch.equal(ops.simhash(x, projections), ops.simhash(x.float(), projections))
        rounded = projections.bfloat16()
        assert torch.equal(ops.simhash(x, rounded), ops.simhash(x.float(), rounded.float()))


def test_threads_change_no_bit():
    x, projections = near_zero()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.simhash(x, projections)
        torch.set_num_threads(2)
        two = ops.simhash(x, projections)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"x": [1.0]}, TypeError, "simhash: x must be a tensor, got list"),
        ({"x": torch.zeros(3, 4, dtype=torch.float16)}, TypeError, "simhash: x must be float32 or bfloat16 or float64"),
        ({"x": torch.zeros(())}, ValueError, r"simhash: x must have shape \[..., D\], got \[\]"),
        ({"x": torch.zeros(3, 5)}, ValueError, r"projections must have shape \[5, M, bits\], got \[4, 2, 3\]"),
        ({"projections": torch.zeros(4, 6)}, ValueError, r"projections must have shape \[4, M, bits\], got \[4, 6\]"),
        ({"projections": torch.zeros(4, 2, 3).double()}, TypeError, "projections must be float32, got float64"),
        ({"projections": torch.zeros(4, 2, 65)}, ValueError, r"1 to 64 bits a code \(its last dimension\), got 65"),
        ({"projections": torch.zeros(4, 2, 0)}, ValueError, "1 to 64 bits a code"),
        ({"lengths": torch.tensor([3])}, ValueError, r"x must have shape \[B, L, D\], got \[3, 4\]"),
        (
            {"x": torch.zeros(2, 3, 4), "lengths": torch.tensor([3])},
            ValueError,
            r"lengths must have shape \[2\], got \[1\]",
        ),
        (
            {"x": torch.zeros(2, 3, 4), "lengths": torch.tensor([3, 4])},
            IndexError,
            r"lengths\[1\] = 4 is outside \[0, 4\)",
        ),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    named = {"x": torch.zeros(3, 4), "projections": torch.zeros(4, 2, 3), **change}
    with pytest.raises(error, match=sentence):
        ops.simhash(**named)
