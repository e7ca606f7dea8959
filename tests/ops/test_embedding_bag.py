"""The five tests of the op, and of `quantize`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY


def make_bags(generator, bags, rows, longest):
    lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(0, rows, (int(offsets[-1]),), generator=generator), offsets


@given(
    seed=st.integers(0, 2**31),
    bags=st.sampled_from([0, 1, 2, 7, 40]),
    longest=st.sampled_from([0, 1, 3, 50]),
    rows=st.sampled_from([1, 2, 300]),
    width=st.one_of(st.sampled_from([1, 7, 8, 16, 17, 64, 128, 129, 300]), st.integers(1, 150)),
    kind=st.sampled_from(["int8", "float32", "float64"]),
    mode=st.sampled_from(["sum", "mean", "none"]),
    weighted=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    offset_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_matches_reference(
    seed, bags, longest, rows, width, kind, mode, weighted, index_dtype, offset_dtype, isa_levels, poisoned_empty
):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if kind == "float64" else torch.float32
    table = torch.randn(rows, width, generator=generator, dtype=dtype)
    exact = table.double()
    if kind == "int8":
        table = ops.quantize(table, rounding="stochastic", seed=seed)
        exact = table.step.double()[:, None] * table.codes.double()
    indices, offsets = make_bags(generator, bags, rows, longest)
    indices, offsets = indices.to(index_dtype), None if mode == "none" else offsets.to(offset_dtype)
    weights = torch.randn(len(indices), generator=generator, dtype=dtype) if weighted else None
    doubles = None if weights is None else weights.double()
    wanted = ops.embedding_bag.reference(exact, indices, offsets, per_sample_weights=doubles, mode=mode)
    sizes = None if weights is None else doubles.abs()
    terms = ops.embedding_bag.reference(exact.abs(), indices, offsets, per_sample_weights=sizes, mode=mode)
    bound = (longest + 3) * torch.finfo(dtype).eps * terms
    if kind == "float64":
        bound *= 2  # the reference rounds as often
    answers = []
    for _ in isa_levels():
        answer = ops.embedding_bag(table, indices, offsets, per_sample_weights=weights, mode=mode)
        assert answer.dtype == dtype
        assert torch.all((answer.double() - wanted).abs() <= bound)
        answers.append(answer)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(ops.embedding_bag(table, indices, offsets, per_sample_weights=weights, mode=mode))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_threads_and_prefetch_across_bags(isa_levels):
    """Large enough that two threads share the bags."""
    generator = torch.Generator().manual_seed(0)
    table = ops.quantize(torch.randn(5000, 24, generator=generator))
    indices, offsets = make_bags(generator, 3000, 5000, 20)
    answers = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers += [ops.embedding_bag(table, indices, offsets) for _ in isa_levels()]
    torch.set_num_threads(before)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_known_values():
    table = ops.QuantizedTable(
        torch.tensor([[1, -2], [127, -128], [3, 0]], dtype=torch.int8), torch.tensor([0.5, 0.25, 2.0])
    )
    indices, offsets = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 4])
    assert ops.embedding_bag(table, indices, offsets).tolist() == [[32.25, -33.0], [0, 0], [12, 0]]
    assert ops.embedding_bag(table, indices, offsets, mode="mean").tolist() == [[16.125, -16.5], [0, 0], [6, 0]]
    weights = torch.tensor([2.0, 0.0, -1.0, 0.5])
    answer = ops.embedding_bag(table, indices, offsets, per_sample_weights=weights)
    assert answer.tolist() == [[1.0, -2.0], [0, 0], [-3.0, 0]]
    assert ops.embedding_bag(table, torch.tensor([[2], [0]])).tolist() == [[[6.0, 0.0]], [[0.5, -1.0]]]
    assert ops.embedding_bag(table, torch.tensor([0, -1, 3]), check=False).tolist() == [[0.5, -1.0], [0, 0], [0, 0]]


def test_quantize():
    weight = torch.tensor([[1.27, -0.635, 0.004], [0.0, 0.0, 0.0]])
    table = ops.quantize(weight)
    assert table.codes.tolist() == [[127, -64, 0], [0, 0, 0]]
    assert table.step.tolist() == pytest.approx([0.01, 0.0])
    assert (table.dequantize() - weight).abs().max() <= 0.005
    assert (table.bits, table.dim, len(table)) == (8, 3, 2)
    clipped = ops.quantize(torch.tensor([[-9.0, 9.0]]), step=0.05)
    assert clipped.codes.tolist() == [[-128, 127]]
    # Stochastic rounding keeps the mean: z-test of 40,000 draws of the fraction 0.3.
    many = ops.quantize(torch.full((1, 40_000), 5.3), step=1.0, rounding="stochastic", seed=3).codes.double()
    assert set(many.unique().tolist()) == {5.0, 6.0}
    assert abs(many.mean() - 5.3) < 4 * math.sqrt(0.3 * 0.7 / 40_000)


@pytest.mark.parametrize("mode", ["sum", "mean", "none"])
def test_gradcheck(mode):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    indices = torch.tensor([1, 1, 5, 0, 1, 2, 5])
    offsets = None if mode == "none" else torch.tensor([0, 3, 3, 7])

    def bag(t, w):
        return ops.embedding_bag(t, indices, offsets, per_sample_weights=w, mode=mode)

    assert torch.autograd.gradcheck(bag, (table, weights))
    assert torch.autograd.gradcheck(lambda t: ops.embedding_bag(t, indices, offsets, mode=mode), (table,))


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


def test_gradient_of_quantized_weights():
    table = ops.quantize(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    weights = torch.ones(4, requires_grad=True)
    indices, offsets = torch.tensor([5, 0, 0, 2]), torch.tensor([0, 1, 4])
    ops.embedding_bag(table, indices, offsets, per_sample_weights=weights, mode="mean").sum().backward()
    wanted = table.dequantize().sum(1)[indices] / torch.tensor([1.0, 3.0, 3.0, 3.0])
    torch.testing.assert_close(weights.grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["embedding_bag", "embedding_bag_backward"])
def test_opcheck(opcheck, name):
    opcheck(REGISTRY[name])


def test_compiles_in_one_graph():
    table = torch.randn(9, 4, requires_grad=True)
    indices, offsets = torch.tensor([3, 0, 8]), torch.tensor([0, 2, 3])
    bag = torch.compile(lambda t: ops.embedding_bag(t, indices, offsets).relu(), fullgraph=True, backend="aot_eager")
    assert torch.equal(bag(table), ops.embedding_bag(table, indices, offsets).relu())


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_bad_ids_are_named(kind, isa_levels):
    table = torch.randn(90, 4)
    table = ops.quantize(table) if kind == "int8" else table
    for _ in isa_levels():
        for value in (90, -1, 2**40, -(2**62)):
            indices = torch.zeros(30, dtype=torch.int64)
            indices[[17, 20]] = value
            sentence = rf"embedding_bag: indices\[17\] = {value} is outside \[0, 90\)"
            with pytest.raises(IndexError, match=sentence):
                ops.embedding_bag(table, indices, torch.tensor([0, 10, 30]))
    with pytest.raises(IndexError, match=r"indices\[0\] = 0 is outside \[0, 0\)"):
        ops.embedding_bag(torch.empty(0, 4), torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"table": [1.0]}, TypeError, "table must be a tensor, got list"),
        ({"table": torch.ones(3, 2).half()}, TypeError, "table must be float32 or float64, got float16"),
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
        ({"mode": "max"}, ValueError, "mode must be one of sum, mean, none, got 'max'"),
        ({"mode": "none"}, ValueError, "mode none gives a row for each index and takes no offsets"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {"table": torch.ones(3, 2), "indices": torch.tensor([0, 1]), "offsets": torch.tensor([0, 2]), **change}
    with pytest.raises(error, match=f"embedding_bag: .*{sentence}"):
        ops.embedding_bag(**arguments)


def test_quantize_rejects_bad_input():
    with pytest.raises(ValueError, match="bits must be 8, the only width that is supported today, got 4"):
        ops.quantize(torch.ones(2, 2), bits=4)
    with pytest.raises(ValueError, match="rounding must be one of nearest, stochastic, got 'up'"):
        ops.quantize(torch.ones(2, 2), rounding="up")
    with pytest.raises(ValueError, match="weight must be finite, got nan at flat position 1"):
        ops.quantize(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="step must be positive and finite"):
        ops.quantize(torch.ones(2, 2), step=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"step must have shape \[2\], got \[3\]"):
        ops.quantize(torch.ones(2, 2), step=torch.ones(3))
    with pytest.raises(ValueError, match=r"QuantizedTable: step must have shape \[2\]"):
        ops.QuantizedTable(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3))
