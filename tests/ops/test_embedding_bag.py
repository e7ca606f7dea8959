"""The five tests of the op, and what it promises of many tables, missing ids, memory and large tables."""

import ctypes
import math
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import _C, ops
from recfast.errors import OutOfRange
from recfast.ops._library import REGISTRY
from recfast.ops.embedding_bag import MODES
from recfast.ops.formats import FORMATS, HEADER_BYTES, code_bytes, row_bytes

PLAIN = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STEPS = {"int8": 8, "int4": 4, "int2": 2, "float8": "fp8"}
KINDS = [*PLAIN, *STEPS, "affine int8", "affine int4", "affine int2"]


def make_bags(generator, bags, rows, longest):
    lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(0, rows, (int(offsets[-1]),), generator=generator), offsets


def make_table(kind, rows, width, generator, seed=0):
    """A table, its values in float64, and the size of what makes them up (scale * code and bias apart)."""
    weight = torch.randn(rows, width, generator=generator)
    if kind in PLAIN:
        table = weight.to(PLAIN[kind])
        return table, table.double(), table.double().abs()
    bits = STEPS[kind.removeprefix("affine ")]
    table = ops.quantize(weight, bits=bits, rounding="stochastic", seed=seed)
    if kind.startswith("affine"):
        packed = table.to_fbgemm()
        packed[:, 2:4] = torch.randn(rows, generator=generator).half()[:, None].view(torch.uint8)
        # One byte more than a row takes: rows at odd addresses.
        padded = torch.nn.functional.pad(packed, (0, 1), value=255)
        table = ops.QuantizedTable.from_fbgemm(padded, bits, width)
    exact = table.reference_values(dtype=torch.float64)
    sizes = (table.step.double()[:, None] * table.codes.double()).abs() + table.bias.double().abs()[:, None]
    return table, exact, sizes


def all_answers(call, isa_levels, threads=(1, 2)):
    """What `call` gives on every instruction set and for several numbers of threads."""
    answers = [call() for _ in isa_levels()]
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            answers.append(call())
    finally:
        torch.set_num_threads(before)
    return answers


def same_bits(a, b):
    return torch.equal(torch.nan_to_num(a, 123.0), torch.nan_to_num(b, 123.0))


@given(
    seed=st.integers(0, 2**31),
    bags=st.sampled_from([0, 1, 2, 7, 40]),
    longest=st.sampled_from([0, 1, 3, 50]),
    rows=st.sampled_from([1, 2, 300]),
    width=st.one_of(st.sampled_from([1, 7, 8, 16, 17, 64, 128, 129, 300, 1100]), st.integers(1, 150)),
    kind=st.sampled_from(KINDS),
    mode=st.sampled_from(["sum", "mean", "max", "none"]),
    weighted=st.booleans(),
    missing=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    offset_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_matches_reference(
    seed, bags, longest, rows, width, kind, mode, weighted, missing, index_dtype, offset_dtype, isa_levels,
    poisoned_empty,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    table, exact, sizes = make_table(kind, rows, width, generator, seed)
    dtype = torch.float64 if kind == "float64" else torch.float32
    indices, offsets = make_bags(generator, bags, rows, longest)
    if missing:
        indices[torch.rand(len(indices), generator=generator) < 0.3] = -1
    indices, offsets = indices.to(index_dtype), None if mode == "none" else offsets.to(offset_dtype)
    weights = torch.randn(len(indices), generator=generator, dtype=dtype) if weighted and mode != "max" else None
    options = {"mode": mode, "skip_missing": missing}
    doubles, absolute = (None, None) if weights is None else (weights.double(), weights.double().abs())
    wanted = ops.embedding_bag.reference(exact, indices, offsets, per_sample_weights=doubles, **options)
    if mode == "max":
        options_of_terms = {**options, "mode": "sum"}
    else:
        options_of_terms = options
    terms = ops.embedding_bag.reference(sizes, indices, offsets, per_sample_weights=absolute, **options_of_terms)
    bound = (longest + 3) * torch.finfo(dtype).eps * terms
    if kind == "float64":
        bound *= 2  # the reference rounds as often
    answers = all_answers(
        lambda: ops.embedding_bag(table, indices, offsets, per_sample_weights=weights, **options), isa_levels
    )
    assert answers[0].dtype == dtype
    assert torch.all((answers[0].double() - wanted).abs() <= bound)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_threads_and_prefetch_across_bags(kind, mode, isa_levels):
    """Large enough that two threads share the bags, which are of very different lengths."""
    generator = torch.Generator().manual_seed(0)
    table, _, _ = make_table(kind, 5000, 24, generator)
    indices, offsets = make_bags(generator, 3000, 5000, 20)
    offsets[1:2000] = offsets[1]
    answers = all_answers(lambda: ops.embedding_bag(table, indices, offsets, mode=mode), isa_levels)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 5),
    batch=st.integers(0, 9),
    kind=st.sampled_from(["float32", "int8", "int2"]),
    how=st.sampled_from(["interleaved", "interleaved bags", "splits", "split bags"]),
    missing=st.booleans(),
)
def test_many_tables_in_one_call(seed, count, batch, kind, how, missing, isa_levels):
    """The same as one call a table, whichever way the features come."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 40, (count,), generator=generator)
    first = sizes.cumsum(0) - sizes
    table, _, _ = make_table(kind, int(sizes.sum()), 20, generator)
    jagged = how.endswith("bags")
    longest = 4 if jagged else 1
    lengths = torch.randint(0 if jagged else 1, longest + 1, (count, batch), generator=generator)
    ids = [torch.randint(0, int(n), (int(k.sum()),), generator=generator) for n, k in zip(sizes, lengths, strict=True)]
    if missing:
        ids = [torch.where(torch.rand(x.shape, generator=generator) < 0.3, -1, x) for x in ids]
    wanted = []
    for f in range(count):
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[f].cumsum(0)])
        rows = torch.where(ids[f] < 0, -1, ids[f] + first[f])
        wanted.append(ops.embedding_bag(table, rows, offsets, skip_missing=missing))
    if how.startswith("interleaved"):
        parts = [x.split(k.tolist()) for x, k in zip(ids, lengths, strict=True)]
        indices = torch.cat([parts[f][b] for b in range(batch) for f in range(count)] + [ids[0][:0]])
        features = ops.Features(first, sizes)
        bag_lengths, wanted = lengths.t().reshape(-1), torch.stack(wanted, 1).reshape(-1, 20)
    else:
        indices = torch.cat(ids)
        features = ops.Features(first, sizes, torch.arange(count + 1) * batch)
        bag_lengths, wanted = lengths.reshape(-1), torch.cat(wanted)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), bag_lengths.cumsum(0)]) if jagged else None
    if how == "interleaved":
        indices = indices.reshape(batch, count)
    for _ in isa_levels():
        for dtype in (torch.int32, torch.int64):
            answer = ops.embedding_bag(
                table, indices.to(dtype), offsets, features=features, skip_missing=missing,
                mode="sum" if jagged else "none",
            )  # fmt: skip
            assert torch.equal(answer.reshape(-1, 20), wanted)


def test_known_values():
    codes = torch.tensor([[1, -2], [127, -128], [3, 0]], dtype=torch.int8)
    table = ops.QuantizedTable.from_codes(codes, torch.tensor([0.5, 0.25, 2.0]))
    indices, offsets = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 4])
    assert ops.embedding_bag(table, indices, offsets).tolist() == [[32.25, -33.0], [0, 0], [12, 0]]
    assert ops.embedding_bag(table, indices, offsets, mode="mean").tolist() == [[16.125, -16.5], [0, 0], [6, 0]]
    assert ops.embedding_bag(table, indices, offsets, mode="max").tolist() == [[31.75, -1.0], [0, 0], [6, 0]]
    weights = torch.tensor([2.0, 0.0, -1.0, 0.5])
    answer = ops.embedding_bag(table, indices, offsets, per_sample_weights=weights)
    assert answer.tolist() == [[1.0, -2.0], [0, 0], [-3.0, 0]]
    assert ops.embedding_bag(table, torch.tensor([[2], [0]])).tolist() == [[[6.0, 0.0]], [[0.5, -1.0]]]
    assert ops.embedding_bag(table, torch.tensor([0, -1, 3]), check=False).tolist() == [[0.5, -1.0], [0, 0], [0, 0]]
    missing, ends = torch.tensor([0, -1, -1, 2]), torch.tensor([0, 2, 3, 4])
    answer = ops.embedding_bag(table, missing, ends, mode="mean", skip_missing=True)
    assert answer.tolist() == [[0.5, -1.0], [0, 0], [6, 0]]
    four = ops.QuantizedTable.from_codes(torch.tensor([[-8, 7, 1]], dtype=torch.int8), torch.tensor([0.5]), 4)
    assert four.rows.tolist() == [[0, 0, 0, 63, 0x78, 0x01, 0, 0]]
    assert ops.embedding_bag(four, torch.tensor([0])).tolist() == [[-4.0, 3.5, 0.5]]
    affine = ops.QuantizedTable(torch.tensor([[0, 0x3C, 0, 0xC0, 255, 3]], dtype=torch.uint8), 8, 2, "affine")
    assert ops.embedding_bag(affine, torch.tensor([0, 0]), torch.tensor([0, 2])).tolist() == [[506.0, 2.0]]
    features = ops.Features(torch.tensor([0, 2]), torch.tensor([2, 1]))
    answer = ops.embedding_bag(table, torch.tensor([[1, 0], [0, 0]]), features=features)
    assert answer.tolist() == [[[31.75, -32.0], [6, 0]], [[0.5, -1.0], [6, 0]]]


@pytest.mark.parametrize("width", [5, 64, 300])
def test_products_are_added_fused(width, isa_levels):
    """step * code is not rounded before it is added: what cancels leaves exactly the rounding of the first sum."""
    codes = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, width).contiguous()
    step = torch.tensor([1.1, 1.1])
    table = ops.QuantizedTable.from_codes(codes, step)
    exact = step[0].double() * 127
    wanted = (exact.float().double() - exact).float()
    assert wanted != 0
    floats = torch.full((2, width), 0.1) * torch.tensor([[1.0], [-1.0]])
    weights = torch.tensor([3.0, 3.0])
    exact_float = floats[0, 0].double() * 3
    wanted_float = (exact_float.float().double() - exact_float).float()
    assert wanted_float != 0
    ids, offsets = torch.tensor([0, 1]), torch.tensor([0, 2])
    for _ in isa_levels():
        assert torch.equal(ops.embedding_bag(table, ids, offsets), wanted.expand(1, width))
        answer = ops.embedding_bag(floats, ids, offsets, per_sample_weights=weights)
        assert torch.equal(answer, wanted_float.expand(1, width))


def test_ids_outside_are_found_wherever_they_stand(isa_levels):
    """Ids are looked through many bags at a time; every place in such a group, and both widths of ids."""
    table = ops.quantize(torch.randn(10, 16, generator=torch.Generator().manual_seed(0)))
    offsets = torch.cat([torch.arange(0, 150, 3), torch.tensor([150, 200])])
    for dtype in (torch.int32, torch.int64):
        ids = (torch.arange(200) % 10).to(dtype)
        highest = torch.iinfo(dtype).max
        for _ in isa_levels():
            for position in [*range(0, 200, 7), 199]:
                for value in (10, -1, highest, -highest - 1):
                    wrong = ids.clone()
                    wrong[position] = value
                    with pytest.raises(OutOfRange, match=rf"indices\[{position}\] = {value} is outside \[0, 10\)"):
                        ops.embedding_bag(table, wrong, offsets)
                    known = ops.embedding_bag(table, wrong, offsets, check=False)
                    bag = int(torch.searchsorted(offsets, position, right=True)) - 1
                    others = torch.arange(51) != bag
                    assert torch.equal(known[others], ops.embedding_bag(table, ids, offsets)[others])


def test_float8_codes_and_nan(isa_levels):
    """Every code of float8 decodes to what torch says, the NaN codes to NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(1, 256)
    for width in (256, 37):
        table = ops.QuantizedTable.from_codes(codes[:, -width:].contiguous(), torch.tensor([0.5]), "fp8")
        for _ in isa_levels():
            answer = ops.embedding_bag(table, torch.tensor([0]))
            torch.testing.assert_close(answer, 0.5 * codes[:, -width:].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["float16", "int8", "int4", "float8", "affine int8"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_nan_and_infinite_steps_stay_in_their_row(kind, mode, isa_levels):
    generator = torch.Generator().manual_seed(0)
    table, _, _ = make_table(kind, 9, 33, generator)
    if kind == "float16":
        table[2], table[5] = math.nan, math.inf
    elif kind.startswith("affine"):
        table.rows[2, :2] = torch.tensor([math.nan]).half().view(torch.uint8)
        table.rows[5, 2:4] = torch.tensor([math.inf]).half().view(torch.uint8)
    else:
        table.step[2], table.step[5] = math.nan, math.inf
    indices, offsets = torch.tensor([0, 1, 1, 2, 5, 5, 2, 8]), torch.tensor([0, 2, 4, 6, 7, 8])
    answers = all_answers(lambda: ops.embedding_bag(table, indices, offsets, mode=mode), isa_levels)
    assert all(same_bits(answer, answers[0]) for answer in answers)
    assert torch.isfinite(answers[0][[0, 4]]).all()
    assert torch.isnan(answers[0][[1, 3]]).all()
    assert not torch.isfinite(answers[0][2]).any()


def test_max_ties_and_positions(isa_levels):
    """The first position wins, and the gradient goes where the value came from."""
    table = torch.tensor([[1.0, 5.0], [1.0, 7.0], [0.0, 7.0]], requires_grad=True)
    indices, offsets = torch.tensor([2, 0, 1, -1, -1, 2]), torch.tensor([0, 3, 5, 6])
    for _ in isa_levels():
        out = ops.embedding_bag(table, indices, offsets, mode="max", skip_missing=True)
        assert out.tolist() == [[1.0, 7.0], [0.0, 0.0], [0.0, 7.0]]
        (grad,) = torch.autograd.grad(out, table, torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]))
        assert grad.tolist() == [[1.0, 0.0], [0.0, 0.0], [16.0, 34.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 3, 16, 61, 64, 130])
def test_reads_stop_at_the_last_byte(kind, width, isa_levels):
    """A table that ends where its page ends, the next page being closed to all access."""
    if kind == "float64":
        pytest.skip("float64 has no vector form")
    table, _, _ = make_table(kind, 5, width, torch.Generator().manual_seed(0))
    rows = table if kind in PLAIN else table.rows
    stride = rows.shape[1] * rows.element_size()
    used = stride if kind in PLAIN else HEADER_BYTES + code_bytes(table.format, width)  # without the padding
    data = bytes(rows.view(torch.uint8).reshape(-1).tolist())[: 4 * stride + used]
    page = mmap.PAGESIZE
    border = -(-len(data) // page) * page
    memory = mmap.mmap(-1, border + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + border), page, 0) == 0
    memory[border - len(data) : border] = data
    indices, offsets = torch.tensor([0, 4, 4, 3, 4]), torch.tensor([0, 2, 4, 5])
    for _ in isa_levels():
        for mode in ("sum", "max"):
            wanted = ops.embedding_bag(table, indices, offsets, mode=mode)
            answer = _raw_call(rows, start + border - len(data), kind, width, indices, offsets, mode)
            assert torch.equal(answer, wanted)


def _raw_call(rows, address, kind, width, indices, offsets, mode):
    """The kernel on memory that is no tensor."""
    header = 2 if kind.startswith("affine") else 1 if kind in STEPS else 0
    out = torch.empty(len(offsets) - 1, width)
    wrong = _C.embedding_bag(
        address, len(rows), width, rows.stride(0) * rows.element_size(), FORMATS[kind.removeprefix("affine ")].code,
        header, indices.data_ptr(), True, len(indices), offsets.data_ptr(), len(offsets) - 1, 0, 0, 0, 0, False, 0,
        MODES.index(mode), out.data_ptr(), 0,
    )  # fmt: skip
    assert wrong is None
    return out


@pytest.mark.parametrize("kind", ["int8", "float32", "bfloat16"])
def test_tables_above_two_to_the_31(kind, isa_levels):
    """Rows near the end of a table of more than 2^31 elements; untouched pages of the mapping cost no memory."""
    width = 64
    size = row_bytes(kind, width)
    rows = 2**31 // (width if kind != "int8" else size) + 1000
    no_reserve = 0x4000  # MAP_NORESERVE, which the module has no name for before Python 3.13
    memory = mmap.mmap(-1, rows * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    stored = torch.frombuffer(memory, dtype=torch.uint8).view(rows, size)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, width, generator=generator)
    if kind == "int8":
        small = ops.quantize(weight)
        stored[-3:] = small.rows
        table = ops.QuantizedTable(stored, 8, width)
    else:
        small = weight.to(PLAIN[kind])
        table = stored.view(PLAIN[kind])
        table[-3:] = small
    assert stored.numel() > 2**31
    indices = torch.tensor([rows - 1, rows - 3, 0, rows - 2])
    wanted = ops.embedding_bag(small, torch.tensor([2, 0, 0, 1]))
    wanted[2] = 0
    weights = torch.ones(4, requires_grad=True)
    for _ in isa_levels():
        assert torch.equal(ops.embedding_bag(table, indices), wanted)
        with pytest.raises(OutOfRange, match=rf"indices\[0\] = {rows} is outside \[0, {rows}\)"):
            ops.embedding_bag(table, torch.tensor([rows]))
    ops.embedding_bag(table, indices, per_sample_weights=weights).sum().backward()
    torch.testing.assert_close(weights.grad, wanted.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "none"])
def test_gradcheck(mode, missing):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    indices = torch.tensor([1, 1, 5, 0, -1 if missing else 1, 2, 5])
    offsets = None if mode == "none" else torch.tensor([0, 3, 3, 7])
    options = {"mode": mode, "skip_missing": missing}

    def bag(t, w):
        return ops.embedding_bag(t, indices, offsets, per_sample_weights=w, **options)

    if mode != "max":
        assert torch.autograd.gradcheck(bag, (table, weights))
    assert torch.autograd.gradcheck(lambda t: ops.embedding_bag(t, indices, offsets, **options), (table,))


def test_gradcheck_with_features():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    features = ops.Features(torch.tensor([0, 4]), torch.tensor([4, 2]))
    indices = torch.tensor([[3, 1], [0, 1]])

    def bag(t, w):
        return ops.embedding_bag(t, indices, per_sample_weights=w, features=features, mode="none")

    assert torch.autograd.gradcheck(bag, (table, weights))


def test_gradient_sums_repeated_rows_in_order():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 9, generator=generator, requires_grad=True)
    indices, offsets = make_bags(generator, 400, 50, 9)
    grad = torch.randn(400, 9, generator=generator)
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers += torch.autograd.grad(ops.embedding_bag(table, indices, offsets), table, grad)
    torch.set_num_threads(before)
    wanted = torch.zeros(50, 9)
    bag_of = torch.repeat_interleave(torch.arange(400), offsets.diff())
    for id_, bag in zip(indices.tolist(), bag_of.tolist(), strict=True):
        wanted[id_] += grad[bag]
    assert torch.equal(answers[0], wanted)
    assert torch.equal(answers[1], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_16_bit_table_is_summed_in_float32(dtype):
    """300 gradients of 1: bfloat16 sums would stop at 256."""
    table = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    ops.embedding_bag(table, torch.zeros(300, dtype=torch.int64)).sum().backward()
    assert table.grad.dtype == dtype
    assert torch.equal(table.grad, torch.tensor([[300.0] * 3, [0.0] * 3]).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [3, 70, 300])
def test_gradient_of_weights(kind, width, isa_levels):
    """Of every format, alike on every instruction set, and within the error of a sum of `width` products."""
    generator = torch.Generator().manual_seed(0)
    table, exact, sizes = make_table(kind, 6, width, generator)
    dtype = torch.float64 if kind == "float64" else torch.float32
    indices, offsets = torch.tensor([5, 0, -1, 0, 2]), torch.tensor([0, 1, 5])
    grad = torch.randn(2, width, generator=generator, dtype=dtype)

    def gradient():
        weights = torch.ones(5, dtype=dtype, requires_grad=True)
        out = ops.embedding_bag(table, indices, offsets, per_sample_weights=weights, mode="mean", skip_missing=True)
        return torch.autograd.grad(out, weights, grad)[0]

    answers = all_answers(gradient, isa_levels)
    bags, counts = torch.tensor([0, 1, 1, 1, 1]), torch.tensor([1.0, 3, 3, 3, 3]).double()
    there = (indices >= 0).double()
    wanted = (exact[indices] * grad.double()[bags]).sum(1) / counts * there
    terms = (sizes[indices] * grad.double().abs()[bags]).sum(1) / counts * there
    assert torch.all((answers[0].double() - wanted).abs() <= (width + 3) * torch.finfo(dtype).eps * terms)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("name", ["embedding_bag", "embedding_bag_backward"])
def test_opcheck(opcheck, name):
    opcheck(REGISTRY[name])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4", "affine int8"])
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_compiles_in_one_graph(kind, mode):
    table, _, _ = make_table(kind, 9, 4, torch.Generator().manual_seed(0))
    if kind in PLAIN:
        table.requires_grad_()
    indices, offsets = torch.tensor([3, 0, 8]), torch.tensor([0, 2, 3])
    features = ops.Features(torch.tensor([0, 4]), torch.tensor([4, 9 - 4]), torch.tensor([0, 1, 2]))

    def call(t):
        return ops.embedding_bag(t, indices.clamp(max=3), offsets, features=features, mode=mode).relu()

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(table), call(table))


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_bad_ids_are_named(kind, isa_levels):
    table, _, _ = make_table(kind, 90, 4, torch.Generator().manual_seed(0))
    for _ in isa_levels():
        for value in (90, -1, 2**40, -(2**62)):
            indices = torch.zeros(30, dtype=torch.int64)
            indices[[17, 20]] = value
            sentence = rf"embedding_bag: indices\[17\] = {value} is outside \[0, 90\)"
            with pytest.raises(IndexError, match=sentence):
                ops.embedding_bag(table, indices, torch.tensor([0, 10, 30]))
            if value != -1:
                with pytest.raises(IndexError, match=sentence):
                    ops.embedding_bag(table, indices, torch.tensor([0, 10, 30]), skip_missing=True)
    with pytest.raises(IndexError, match=r"indices\[0\] = 0 is outside \[0, 0\)"):
        ops.embedding_bag(torch.empty(0, 4), torch.tensor([0]))


def test_the_lowest_bad_position_is_named_for_any_number_of_threads(isa_levels):
    table = torch.randn(90, 4)
    indices = torch.zeros(40_000, dtype=torch.int32)
    indices[[39_000, 20_003, 20_001, 25_000]] = 90
    offsets = torch.arange(0, 40_001, 4)

    def position():
        with pytest.raises(OutOfRange) as caught:
            ops.embedding_bag(table, indices, offsets)
        return caught.value.position

    assert set(all_answers(position, isa_levels)) == {20_001}


def test_bad_ids_of_a_feature_are_named():
    table = torch.randn(9, 4)
    features = ops.Features(torch.tensor([0, 4]), torch.tensor([4, 5]))
    with pytest.raises(OutOfRange, match=r"indices\[2\] = 4 is outside \[0, 4\) of feature 0") as caught:
        ops.embedding_bag(table, torch.tensor([[3, 4], [4, 4]]), features=features)
    error = caught.value
    assert (error.position, error.value, error.rows, error.feature) == (2, 4, 4, 0)
    split = features._replace(splits=torch.tensor([0, 1, 3]))
    with pytest.raises(OutOfRange, match=r"indices\[3\] = 5 is outside \[0, 5\) of feature 1"):
        ops.embedding_bag(table, torch.tensor([3, 1, 2, 5]), torch.tensor([0, 2, 2, 4]), features=split)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"table": [1.0]}, TypeError, "table must be a tensor, got list"),
        ({"table": torch.ones(3, 2).int()}, TypeError, "table must be float32 or float64 or bfloat16 or float16"),
        ({"table": torch.ones(3)}, ValueError, r"table must have shape \[T, D\], got \[3\]"),
        ({"table": torch.ones(3, 0)}, ValueError, "at least one column"),
        ({"indices": torch.ones(2)}, TypeError, "indices must be int32 or int64, got float32"),
        ({"indices": torch.ones(2, 1, dtype=torch.int64)}, ValueError, r"indices must have shape \[n\]"),
        ({"offsets": torch.tensor([0.0])}, TypeError, "offsets must be int32 or int64, got float32"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must have one entry more"),
        ({"offsets": torch.tensor([1, 2])}, ValueError, r"offsets\[0\] must be 0, got 1"),
        ({"offsets": torch.tensor([0, 2, 1, 2])}, ValueError, r"offsets\[2\] = 1 is below offsets\[1\]"),
        ({"offsets": torch.tensor([0, 1])}, ValueError, r"offsets\[-1\] must be 2, the number of indices, got 1"),
        ({"per_sample_weights": torch.ones(3)}, ValueError, r"per_sample_weights must have shape \[2\], got \[3\]"),
        ({"per_sample_weights": torch.ones(2).double()}, TypeError, "per_sample_weights must be float32"),
        ({"per_sample_weights": torch.ones(2), "mode": "max"}, ValueError, "mode max takes no per_sample_weights"),
        ({"mode": "median"}, ValueError, "mode must be one of sum, mean, max, none, got 'median'"),
        ({"mode": "none"}, ValueError, "mode none gives a row for each index and takes no offsets"),
        ({"features": (1, 2)}, TypeError, "features must be ops.Features, got tuple"),
        ({"features": ops.Features(torch.tensor([0]), torch.tensor([4]))}, ValueError, "got rows 0 .. 4 for"),
        (
            {"features": ops.Features(torch.tensor([0]), torch.tensor([3]), torch.tensor([0, 2]))},
            ValueError,
            r"features.splits\[-1\] must be 1, the number of bags, got 2",
        ),
        (
            {"features": ops.Features(torch.tensor([0, 0]), torch.tensor([3, 3]))},
            ValueError,
            "offsets must make a multiple of 2 bags, the number of features, got 1",
        ),
        (
            {"features": ops.Features(torch.tensor([0, 0]), torch.tensor([3, 3])), "offsets": None,
             "indices": torch.tensor([0, 1, 2])},
            ValueError,
            r"indices must have shape \[..., 2\], got \[3\]",
        ),
    ],
)  # fmt: skip
def test_rejects_bad_input(change, error, sentence):
    arguments = {"table": torch.ones(3, 2), "indices": torch.tensor([0, 1]), "offsets": torch.tensor([0, 2]), **change}
    with pytest.raises(error, match=f"embedding_bag: .*{sentence}"):
        ops.embedding_bag(**arguments)
