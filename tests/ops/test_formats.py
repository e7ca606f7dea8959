"""How rows are stored: quantise and dequantise, rounding to 16 bits, FBGEMM's rows, memory for tables."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import _C, ops
from recfast.ops import formats

BITS = [8, 4, 2, "fp8"]
SOURCES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def every_way(call, isa_levels):
    """What `call` gives on every instruction set, and with two threads."""
    answers = [call() for _ in isa_levels()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        return [*answers, call()]
    finally:
        torch.set_num_threads(before)


@given(
    seed=st.integers(0, 2**63),
    rows=st.sampled_from([0, 1, 5, 33]),
    width=st.one_of(st.sampled_from([1, 2, 3, 8, 64, 127, 128, 129, 300]), st.integers(1, 150)),
    bits=st.sampled_from(BITS),
    source=st.sampled_from(SOURCES),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    size=st.sampled_from([None, 0.02, 1.0, 1e-4]),
)
def test_quantize_matches_reference(seed, rows, width, bits, source, rounding, size, isa_levels):
    """The same bytes as plain torch, padding included."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator).to(source)
    if rows > 4:
        weight[2] = 0
        weight[3] *= 1e-30 if source != torch.float16 else 1e-3
    step = None if size is None else size * (0.5 + torch.rand(rows, generator=generator))
    options = {"bits": bits, "step": step, "rounding": rounding, "seed": seed}
    wanted = ops.quantize.reference(weight, **options)
    for answer in every_way(lambda: ops.quantize(weight, **options), isa_levels):
        assert torch.equal(answer.rows, wanted.rows)
        assert answer.saturated == wanted.saturated
        assert (answer.bits, answer.dim, answer.header) == (bits, width, "step")


@given(
    seed=st.integers(0, 2**63),
    width=st.one_of(st.sampled_from([1, 8, 64, 129]), st.integers(1, 150)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    source=st.sampled_from(SOURCES),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    exponent=st.sampled_from([0, -8, -20, -30, 15, 100]),
)
def test_round_to_matches_reference(seed, width, dtype, source, rounding, exponent, isa_levels):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(5, width, generator=generator) * 2.0**exponent).to(source)
    weight = torch.nan_to_num(weight, posinf=6e4, neginf=-6e4)
    wanted = ops.round_to.reference(weight, dtype, rounding=rounding, seed=seed)
    for answer in every_way(lambda: ops.round_to(weight, dtype, rounding=rounding, seed=seed), isa_levels):
        assert answer.dtype == dtype
        assert torch.equal(answer.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 63, 64, 1030])
def test_dequantize(bits, width, isa_levels):
    generator = torch.Generator().manual_seed(0)
    table = ops.quantize(torch.randn(70, width, generator=generator), bits=bits)
    wanted = table.reference_values()
    some = torch.tensor([69, 0, 0, 5])
    for answer in every_way(table.dequantize, isa_levels):
        assert torch.equal(answer, wanted)
    for answer in every_way(lambda: table.dequantize(some), isa_levels):
        assert torch.equal(answer, wanted[some])
    assert torch.equal(table.dequantize(some.int()), wanted[some])
    with pytest.raises(IndexError, match=r"QuantizedTable.dequantize: rows\[1\] = 70 is outside \[0, 70\)"):
        table.dequantize(torch.tensor([3, 70]))


def test_quantize_known_values():
    weight = torch.tensor([[1.27, -0.635, 0.004], [0.0, 0.0, 0.0]])
    table = ops.quantize(weight)
    assert table.codes.tolist() == [[127, -64, 0], [0, 0, 0]]
    assert table.step.tolist() == pytest.approx([0.01, 0.0])
    assert (table.bits, table.dim, len(table), table.saturated) == (8, 3, 2, 0)
    clipped = ops.quantize(torch.tensor([[-9.0, 9.0]]), step=0.05)
    assert clipped.codes.tolist() == [[-128, 127]]
    assert clipped.saturated == 2
    four = ops.quantize(torch.tensor([[7.0, -8.0, 0.5, 1.5, -3.4]]), bits=4, step=1.0)
    assert four.codes.tolist() == [[7, -8, 0, 2, -3]]
    assert four.rows.tolist() == [[0, 0, 128, 63, 0x87, 0x20, 0x0D, 0]]
    two = ops.quantize(torch.tensor([[1.0, -2.0, 0.4, -0.6, 1.0]]), bits=2, step=1.0)
    assert two.codes.tolist() == [[1, -2, 0, -1, 1]]
    assert two.rows.tolist() == [[0, 0, 128, 63, 0b11001001, 0b01, 0, 0]]
    eight = ops.quantize(torch.tensor([[448.0, 1.0, -0.0078125, 17.0, 500.0, 0.0009]]), bits="fp8", step=1.0)
    assert eight.codes.float().tolist() == [[448.0, 1.0, -0.0078125, 16.0, 448.0, 0.0]]
    assert eight.saturated == 1
    half = ops.round_to(torch.tensor([[1e6, -1e6, 1.0, 2049.0, 1e-8]]), torch.float16)
    assert half.tolist() == [[65504.0, -65504.0, 1.0, 2048.0, 0.0]]
    assert ops.round_to(torch.tensor([[3.4e38]]), torch.bfloat16).tolist() == [[torch.finfo(torch.bfloat16).max]]


@pytest.mark.parametrize(("bits", "highest"), [(8, 127), (4, 7), (2, 1)])
def test_quantize_error_bounds(bits, highest):
    weight = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    slack = 1 + 2**-20  # of the division and of the product
    for rounding, share in (("nearest", 0.5), ("stochastic", 1.0)):
        table = ops.quantize(weight, bits=bits, rounding=rounding, seed=1)
        assert torch.all((table.dequantize() - weight).abs() <= share * slack * table.step[:, None])
        assert torch.equal(table.step, weight.abs().amax(1) / highest)
        assert table.saturated == 0


def test_float8_error_bound():
    """Half a unit in the last of four bits: 2^-4 of the value, or 2^-10 steps where it is small."""
    weight = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    table = ops.quantize(weight, bits="fp8")
    bound = torch.maximum(weight.abs() * 2**-4, table.step[:, None] * 2**-10) * (1 + 2**-20)
    assert torch.all((table.dequantize() - weight).abs() <= bound)


@pytest.mark.parametrize(
    ("target", "value", "below", "above"),
    [
        (8, 5.3, 5.0, 6.0),
        (4, -2.7, -3.0, -2.0),
        (2, 0.15, 0.0, 1.0),
        ("fp8", 17.5, 16.0, 18.0),
        ("fp8", 0.0025, 2**-9, 2**-8),
        (torch.bfloat16, 1.003, 1.0, 1.0078125),
        (torch.float16, 1.0004, 1.0, 1.0009765625),
        (torch.float16, 1e-7, 2**-24, 2**-23),
    ],
)
def test_stochastic_rounding_is_unbiased(target, value, below, above):
    """z-tests of mean and variance over 40,000 draws, of all columns and of the odd ones, which share their words."""
    weight = torch.full((40, 1000), value)
    if isinstance(target, torch.dtype):
        rounded = ops.round_to(weight, target, rounding="stochastic", seed=3).double()
    else:
        rounded = ops.quantize(weight, bits=target, step=1.0, rounding="stochastic", seed=3).dequantize().double()
    assert set(rounded.unique().tolist()) == {below, above}
    p = (float(torch.tensor(value)) - below) / (above - below)
    up = (rounded == above).double()
    for some in (up, up[:, 1::2], up[:, ::2]):
        assert abs(float(some.mean()) - p) < 4 * math.sqrt(p * (1 - p) / some.numel())
    # The number of ups in a row has a binomial variance, and neighbours are independent.
    variance = float(up.sum(1).var())
    assert abs(variance / (1000 * p * (1 - p)) - 1) < 4 * math.sqrt(2 / 39)
    both = float((up[:, ::2] * up[:, 1::2]).mean())
    assert abs(both - p * p) < 4 * math.sqrt(p * p * (1 - p * p) / 20_000)


def test_draws_are_a_function_of_seed_and_place():
    weight = torch.rand(30, 20, generator=torch.Generator().manual_seed(0))
    options = {"step": 0.1, "rounding": "stochastic"}
    whole = ops.quantize(weight, seed=5, **options)
    assert torch.equal(ops.quantize(weight[:7], seed=5, **options).rows, whole.rows[:7])
    assert not torch.equal(ops.quantize(weight, seed=6, **options).rows, whole.rows)


def test_not_finite_weights_are_named(isa_levels):
    weight = torch.ones(3000, 50)
    weight[1700, 3], weight[2900, 2] = math.nan, math.inf
    sentence = f"weight must be finite, got nan at flat position {1700 * 50 + 3}"
    for bits in BITS:
        for _ in isa_levels():
            with pytest.raises(ValueError, match=f"quantize: {sentence}"):
                ops.quantize(weight, bits=bits)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match=f"round_to: {sentence}"):
        ops.round_to(weight, torch.bfloat16)
    torch.set_num_threads(before)
    with pytest.raises(ValueError, match="weight must be finite, got 1e"):
        ops.quantize(torch.full((1, 1), 1e300, dtype=torch.float64))


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="bits must be 8, 4, 2 or 'fp8', got 3"):
        ops.quantize(torch.ones(2, 2), bits=3)
    with pytest.raises(ValueError, match="rounding must be one of nearest, stochastic, got 'up'"):
        ops.quantize(torch.ones(2, 2), rounding="up")
    with pytest.raises(ValueError, match="step must be positive and finite"):
        ops.quantize(torch.ones(2, 2), step=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"step must have shape \[2\], got \[3\]"):
        ops.quantize(torch.ones(2, 2), step=torch.ones(3))
    with pytest.raises(TypeError, match="weight must be float32 or float64 or bfloat16 or float16, got int32"):
        ops.quantize(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"dtype must be one of torch.bfloat16, torch.float16, got torch.float32"):
        ops.round_to(torch.ones(2, 2), torch.float32)
    with pytest.raises(ValueError, match=r"QuantizedTable.from_codes: step must have shape \[2\]"):
        ops.QuantizedTable.from_codes(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3))
    with pytest.raises(ValueError, match=r"codes must be in \[-8, 7\], got values in \[-9, 0\]"):
        ops.QuantizedTable.from_codes(torch.tensor([[0, -9]], dtype=torch.int8), torch.ones(1), 4)
    with pytest.raises(ValueError, match="rows of 3 columns in int8 take 8 bytes, got 9"):
        ops.QuantizedTable(torch.zeros(2, 9, dtype=torch.uint8), 8, 3)
    with pytest.raises(ValueError, match=r"QuantizedTable.to_fbgemm: bits must be 8, 4 or 2, got 'fp8'"):
        ops.quantize(torch.ones(2, 2), bits="fp8").to_fbgemm()
    with pytest.raises(ValueError, match=r"QuantizedTable.to_fbgemm: steps must be below 65504 / 128, got"):
        ops.quantize(torch.full((2, 2), 1e6)).to_fbgemm()
    with pytest.raises(ValueError, match=r"from_fbgemm: rows must have shape \[T, 10\], got \[1, 12\]"):
        ops.QuantizedTable.from_fbgemm(torch.zeros(1, 12, dtype=torch.uint8), 8, 2, layout="fused")


PREPACK = {8: "byte", 4: "4bit", 2: "2bit"}


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim", [4, 32, 100])
def test_rows_of_torch(bits, dim):
    """torch's rows are FBGEMM's fused ones: taken over, they stand for the same numbers, and come back the same."""
    weight = torch.randn(50, dim, generator=torch.Generator().manual_seed(0))
    packed = getattr(torch.ops.quantized, f"embedding_bag_{PREPACK[bits]}_prepack")(weight)
    unpacked = getattr(torch.ops.quantized, f"embedding_bag_{PREPACK[bits]}_unpack")(packed)
    table = ops.QuantizedTable.from_fbgemm(packed, bits, dim, layout="fused")
    values = table.dequantize()
    if bits == 8:  # scale and bias rounded to float16
        bound = (weight.amax(1) - weight.amin(1) + weight.amin(1).abs()) * 2**-11 + 1e-6
        assert torch.all((values - unpacked).abs() <= bound[:, None])
    else:
        # The same scale, bias and code; torch rounds scale * code + bias once, we twice.
        torch.testing.assert_close(values, unpacked, rtol=0, atol=2**-23 * float(weight.abs().max()) * 2)
        assert torch.equal(table.to_fbgemm(layout="fused"), packed)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("layout", ["inference", "fused"])
def test_export_and_import(bits, layout):
    """Exact where the step is a float16; "fused" rows of 8 bits keep the float32 step."""
    weight = torch.randn(50, 36, generator=torch.Generator().manual_seed(0))
    step = (weight.abs().amax(1) / 20).half().float()
    table = ops.quantize(weight, bits=bits, step=step)
    rows = table.to_fbgemm(layout=layout)
    head = 8 if bits == 8 and layout == "fused" else 4
    assert rows.shape == (50, head + formats.code_bytes(table.format, 36))
    again = ops.QuantizedTable.from_fbgemm(rows, bits, 36, layout=layout)
    torch.testing.assert_close(again.dequantize(), table.dequantize(), rtol=0, atol=2**-22 * float(weight.abs().max()))
    assert torch.equal(again.to_fbgemm(layout=layout), rows)
    if layout == "inference":
        assert again.rows.data_ptr() == rows.data_ptr()


@pytest.fixture
def fbgemm():
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError) as error:
        pytest.skip(f"there is no FBGEMM for this torch: {error}")
    return torch.ops.fbgemm


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fused_rows_of_fbgemm(bits, fbgemm):
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    if bits == 8:
        packed = fbgemm.FloatToFused8BitRowwiseQuantized(weight)
        wanted = fbgemm.Fused8BitRowwiseQuantizedToFloat(packed)
        bound = (weight.amax(1) - weight.amin(1) + weight.amin(1).abs()) * 2**-11 + 1e-6
    else:
        packed = fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weight, bits)
        wanted = fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, bits)
        bound = torch.full((50,), 2**-22 * float(weight.abs().max()))
    table = ops.QuantizedTable.from_fbgemm(packed, bits, 64, layout="fused")
    assert torch.all((table.dequantize() - wanted).abs() <= bound[:, None])
    # And back: FBGEMM reads our rows.
    own = ops.quantize(weight, bits=bits)
    rows = own.to_fbgemm(layout="fused")
    if bits == 8:
        read = fbgemm.Fused8BitRowwiseQuantizedToFloat(rows)
    else:
        read = fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, bits)
    half_step = own.step[:, None] * 2**-11 * 2 ** (bits - 1)
    assert torch.all((read - own.dequantize()).abs() <= half_step + 1e-6)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_inference_rows_of_fbgemm(bits, fbgemm):
    """A bag of FBGEMM's own tables on our rows, and ours on its."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen as Bags

    generator = torch.Generator().manual_seed(0)
    precision = {8: SparseType.INT8, 4: SparseType.INT4, 2: SparseType.INT2}[bits]
    bags = Bags([("t", 50, 64, precision, EmbeddingLocation.HOST)], device="cpu", output_dtype=SparseType.FP32)
    bags.fill_random_weights()
    table = ops.quantize(torch.randn(50, 64, generator=generator), bits=bits)
    rows = table.to_fbgemm()
    stored = bags.split_embedding_weights(split_scale_shifts=False)[0][0]
    stored[:, : rows.shape[1]].copy_(rows)
    affine = ops.QuantizedTable.from_fbgemm(stored, bits, 64)
    indices = torch.randint(0, 50, (200,), generator=generator)
    offsets = torch.arange(0, 201, 20)
    wanted = bags(indices.int(), offsets.int())
    answer = ops.embedding_bag(affine, indices, offsets)
    terms = ops.embedding_bag.reference(table.dequantize().abs() + affine.bias.abs()[:, None], indices, offsets)
    assert torch.all((answer - wanted).abs() <= 30 * 2**-23 * terms)


def test_memory_for_tables():
    small = formats.empty_table(10, 12)
    assert (small.shape, small.dtype) == ((10, 12), torch.uint8)
    for dtype in (torch.uint8, torch.float32):
        large = formats.empty_table(30_000, 256, dtype)
        assert large.shape == (30_000, 256 // dtype.itemsize)
        assert large.is_contiguous()
        assert large.data_ptr() % 2**21 == 0
        large.zero_()
        large[-1, -1] = 7
        assert torch.equal(large.clone()[-1], large[-1])
    with pytest.raises(ValueError, match="row_bytes must be a multiple of 4"):
        formats.empty_table(3, 6, torch.float32)
    assert _C.advise_huge_pages(large.data_ptr(), 100) == 0  # no whole page inside


def test_draws_match_the_kernels():
    """philox_words against the words of the compiled generator."""
    words = formats.philox_words(2**40 + 7, 3, 5, torch.tensor([11]), 20)[0].tolist()
    for d, word in enumerate(words):
        plain = _C.philox4x32(2**40 + 7, 3, 5, 11, d // 8)[d % 8 // 2]
        assert word == (plain if d % 2 == 0 else (plain << 16 | plain >> 16) & 0xFFFFFFFF)
