"""The five tests of the op (it has no gradient of its own), and what stochastic rounding is for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import _C, ops
from recfast.ops._library import REGISTRY
from recfast.ops.embedding_update import philox_uniform


def copy(table, state):
    clone = lambda x: None if x is None else x.clone()  # noqa: E731
    if isinstance(table, ops.QuantizedTable):
        table = ops.QuantizedTable(table.codes.clone(), table.step.clone())
    else:
        table = table.clone()
    return table, ops.UpdateState(clone(state.moment), clone(state.step_moment))


def tensors(table, state):
    parts = [table.codes, table.step] if isinstance(table, ops.QuantizedTable) else [table]
    return [part for part in (*parts, state.moment, state.step_moment) if part is not None]


@given(
    seed=st.integers(0, 2**31),
    bags=st.sampled_from([0, 1, 2, 7, 40]),
    longest=st.sampled_from([0, 1, 3, 30]),
    rows=st.sampled_from([1, 2, 300, 5000]),
    width=st.one_of(st.sampled_from([1, 7, 16, 17, 64, 130]), st.integers(1, 70)),
    kind=st.sampled_from(["int8", "float32"]),
    mode=st.sampled_from(["sum", "mean", "none"]),
    weighted=st.booleans(),
    optimizer=st.sampled_from(["sgd", "rowwise_adagrad", "adagrad"]),
    step_lr=st.sampled_from([None, 1e-4]),
    step_optimizer=st.sampled_from(["sgd", "adagrad"]),
    step_range=st.sampled_from(["clip", "grow"]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_matches_reference(
    seed, bags, longest, rows, width, kind, mode, weighted, optimizer, step_lr, step_optimizer, step_range, rounding,
    weight_decay, index_dtype, isa_levels, poisoned_empty,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, width, generator=generator)
    if kind == "int8":
        # Half the range, so that some rows are clipped and some are not.
        table = ops.quantize(table, step=table.abs().amax(1).clamp(min=0.1) / 64)
    state = ops.UpdateState.zeros(table, optimizer=optimizer, step_optimizer=step_optimizer)
    lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(index_dtype)
    indices = torch.randint(0, rows, (int(offsets[-1]),), generator=generator).to(index_dtype)
    offsets = None if mode == "none" else offsets
    weights = torch.randn(len(indices), generator=generator) if weighted else None
    options = {
        "optimizer": optimizer, "lr": 0.3, "weight_decay": weight_decay, "grad_scale": 0.5, "step_lr": step_lr,
        "step_optimizer": step_optimizer, "step_range": step_range, "rounding": rounding, "seed": seed << 30 | 5,
        "table_id": 3, "per_sample_weights": weights, "mode": mode,
    }  # fmt: skip
    wanted = copy(table, state)
    answers = []
    before = torch.get_num_threads()
    grads = [torch.randn(len(indices) if offsets is None else bags, width, generator=generator) for _ in range(2)]
    for count, grad in enumerate(grads):
        ops.embedding_update_.reference(wanted[0], indices, offsets, grad, wanted[1], step_count=count, **options)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in isa_levels():
                answers.append(copy(table, state))
                for count, grad in enumerate(grads):
                    ops.embedding_update_(
                        answers[-1][0], indices, offsets, grad, answers[-1][1], step_count=count, **options
                    )
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors(*answer), tensors(*answers[0]), strict=True))
    for got, want in zip(tensors(*answers[0]), tensors(*wanted), strict=True):
        if got.dtype == torch.int8:
            # A code may fall to the other side of a tie or a draw, once in many.
            off = (got.int() - want.int()).abs()
            assert int(off.max()) <= 1
            assert int((off > 0).sum()) <= 2 + 2e-3 * off.numel()
        else:
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_known_values():
    table = ops.QuantizedTable(torch.tensor([[10, -20], [5, 5]], dtype=torch.int8), torch.tensor([0.5, 1.0]))
    state = ops.UpdateState.zeros(table, optimizer="rowwise_adagrad")
    grad = torch.tensor([[3.0, 4.0]])
    # m = (9 + 16) / 2, rate = lr / sqrt(m); w = [5, -10] - [3, 4]
    ops.embedding_update_(
        table, torch.tensor([0]), None, grad, state, optimizer="rowwise_adagrad", lr=math.sqrt(12.5), rounding="nearest"
    )
    assert table.codes.tolist() == [[4, -28], [5, 5]]
    assert state.moment.tolist() == [12.5, 0.0]
    # The step learns: w = [2, -14], x = [4, -28] exactly, so the gradient is none; then x = 4.4 gives 4 - 4.4 = -0.4.
    options = {"lr": 1.0, "rounding": "nearest", "step_optimizer": "sgd", "step_scale": 1.0, "step_lr": 0.1}
    ops.embedding_update_(table, torch.tensor([0]), None, torch.tensor([[-0.2, 0.0]]), **options)
    assert table.step.tolist() == pytest.approx([0.5 - 0.1 * (-0.2 * -0.4), 1.0])
    # Clipping: w = 5 + 1000 in a range of 127.
    clipped = ops.embedding_update_(table, torch.tensor([1]), None, torch.tensor([[-1000.0, 0.0]]), lr=1.0)
    assert int(clipped) == 1
    assert table.codes[1].tolist() == [127, 5]
    grown = ops.embedding_update_(
        table, torch.tensor([1]), None, torch.tensor([[-1000.0, 0.0]]), lr=1.0, step_range="grow", rounding="nearest"
    )
    assert int(grown) == 0
    assert table.step[1] == pytest.approx(1127 / 127)
    assert table.codes[1].tolist() == [127, 1]


def test_draws_are_philox():
    draws = philox_uniform(0xABCDEF0123456789, 7, 2, torch.tensor([5, 2**32 - 1]), 9)
    for i, row in enumerate((5, 2**32 - 1)):
        for column in range(9):
            word = _C.philox4x32(0xABCDEF0123456789, 7, 2, row, column // 4)[column % 4]
            assert draws[i, column] == (word >> 8) / 2**24


def test_duplicates_are_summed_before_rounding():
    """20 lookups of one row, each worth 0.1 of a step: rounded apart to the nearest they would all be lost."""
    table = ops.QuantizedTable(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2))
    ops.embedding_update_(table, torch.ones(20).long(), None, torch.full((20, 4), 0.1), lr=1.0, rounding="nearest")
    assert table.codes.tolist() == [[0] * 4, [-2] * 4]


def test_small_updates_are_not_stuck():
    """200 updates of 1/100 of a step move the mean by two steps; rounded to the nearest, by nothing."""
    width = 4096
    moved = {}
    for rounding in ("stochastic", "nearest"):
        table = ops.QuantizedTable(torch.zeros(1, width, dtype=torch.int8), torch.ones(1))
        for count in range(200):
            ops.embedding_update_(
                table, torch.tensor([0]), None, torch.full((1, width), -0.01), lr=1.0, rounding=rounding, seed=1,
                step_count=count,
            )  # fmt: skip
        moved[rounding] = float(table.codes.double().mean())
    assert moved["nearest"] == 0.0
    # Each update goes up with probability 0.01, so 200 give 2 with variance 200 * 0.01 * 0.99 a column.
    assert abs(moved["stochastic"] - 2.0) < 4 * math.sqrt(200 * 0.01 * 0.99 / width)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.97])
def test_rounding_has_no_bias(fraction):
    rows, width = 400, 50
    table = ops.QuantizedTable(torch.full((rows, width), -7, dtype=torch.int8), torch.ones(rows))
    ops.embedding_update_(
        table, torch.arange(rows), None, torch.full((rows, width), -fraction), lr=1.0, seed=11, step_count=4
    )
    ups = (table.codes + 7).double()
    assert set(ups.unique().tolist()) <= {0.0, 1.0}
    n = rows * width
    spread = math.sqrt(fraction * (1 - fraction))
    assert abs(ups.mean() - fraction) < 4 * spread / math.sqrt(n)
    # Rows and columns draw independently: their means spread as binomials do (chi-square, 4 standard deviations).
    for axis, (count, size) in ((0, (width, rows)), (1, (rows, width))):
        chi_square = float(((ups.mean(axis) - fraction) ** 2).sum() / (spread**2 / size))
        assert abs(chi_square - count) < 4 * math.sqrt(2 * count) + 2


def test_learned_step_grows_where_weights_are_clipped_and_stays_positive():
    table = ops.QuantizedTable(torch.full((1, 8), 127, dtype=torch.int8), torch.full((1,), 0.01))
    state = ops.UpdateState.zeros(table, optimizer="sgd", step_optimizer="adagrad")
    options = {"lr": 0.1, "step_lr": 1e-3, "seed": 0}
    for count in range(20):
        ops.embedding_update_(table, torch.tensor([0]), None, -torch.ones(1, 8), state, step_count=count, **options)
    assert table.step[0] > 0.012
    for count in range(20):
        ops.embedding_update_(
            table, torch.tensor([0]), None, torch.ones(1, 8), lr=0.0, step_lr=1e3, step_optimizer="sgd",
            step_scale=1.0, step_count=count,
        )  # fmt: skip
    assert table.step[0] >= 1e-8


def test_nothing_to_do():
    table = ops.quantize(torch.randn(3, 4))
    codes, step = table.codes.clone(), table.step.clone()
    empty = torch.tensor([], dtype=torch.int64)
    assert int(ops.embedding_update_(table, empty, None, torch.empty(0, 4), lr=1.0)) == 0
    ops.embedding_update_(table, empty, torch.tensor([0, 0, 0]), torch.ones(2, 4), lr=1.0)
    assert torch.equal(table.codes, codes)
    assert torch.equal(table.step, step)


def test_gradcheck():
    """The op has no gradient; its SGD step must be the gradient of embedding_bag."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30, 6, generator=generator)
    leaf = table.clone().requires_grad_()
    indices, offsets = torch.randint(0, 30, (50,), generator=generator), torch.tensor([0, 20, 20, 50])
    weights = torch.rand(50, generator=generator)
    grad = torch.randn(3, 6, generator=generator)
    options = {"per_sample_weights": weights, "mode": "mean"}
    ops.embedding_bag(leaf, indices, offsets, **options).backward(grad)
    ops.embedding_update_(table, indices, offsets, grad, lr=0.5, **options)
    assert torch.equal(table, leaf.detach() - 0.5 * leaf.grad)


def test_opcheck(opcheck):
    opcheck(REGISTRY["embedding_update_"])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"indices": torch.tensor([0, 3])}, IndexError, r"indices\[1\] = 3 is outside \[0, 3\)"),
        ({"indices": torch.tensor([-1, 3])}, IndexError, r"indices\[0\] = -1 is outside \[0, 3\)"),
        ({"offsets": torch.tensor([0, 2, 1])}, ValueError, r"offsets\[2\] = 1 is below offsets\[1\]"),
        ({"offsets": torch.tensor([0, 1, 3])}, ValueError, r"offsets\[-1\] must be 2"),
        (
            {"grad": torch.tensor([[1.0, math.nan], [0, 0]])},
            ValueError,
            "grad must be finite, got nan at .* 1",
        ),
        (
            {"grad": torch.tensor([[1.0, 2.0], [-math.inf, 0]])},
            ValueError,
            "grad must be finite, got -inf at .* 2",
        ),
        ({"grad": torch.ones(3, 2)}, ValueError, r"grad must have shape \[2, 2\], got \[3, 2\]"),
        ({"grad": torch.ones(2, 2).double()}, TypeError, "grad must be float32, got float64"),
        ({"per_sample_weights": torch.tensor([1.0, math.nan])}, ValueError, "per_sample_weights must be finite"),
        ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite and not negative, got nan"),
        ({"optimizer": "adam"}, ValueError, "optimizer must be one of sgd, rowwise_adagrad, adagrad, got 'adam'"),
        ({"optimizer": "adagrad"}, ValueError, r"state.moment must be a tensor of shape \[3, 2\] here, got None"),
        ({"step_lr": 1e-3}, ValueError, r"state.step_moment must be a tensor of shape \[3\] here, got None"),
        ({"rounding": "up"}, ValueError, "rounding must be one of nearest, stochastic"),
        ({"step_range": "wrap"}, ValueError, "step_range must be one of clip, grow"),
        ({"seed": -1}, ValueError, "seed = -1 is outside"),
        ({"step_count": 2**32}, ValueError, "step_count = 4294967296 is outside"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    table = ops.quantize(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    codes, step = table.codes.clone(), table.step.clone()
    arguments = {
        "indices": torch.tensor([0, 1]), "offsets": torch.tensor([0, 1, 2]), "grad": torch.ones(2, 2), "lr": 0.1,
        **change,
    }  # fmt: skip
    with pytest.raises(error, match=f"embedding_update_: .*{sentence}"):
        ops.embedding_update_(table, **arguments)
    assert torch.equal(table.codes, codes)
    assert torch.equal(table.step, step)


@pytest.mark.parametrize("option", [{"eps": 0.0}, {"grad_scale": float("nan")}, {"step_scale": float("inf")}])
def test_rejects_options_that_would_write_nan(option):
    table = ops.quantize(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    codes = table.codes.clone()
    state = ops.UpdateState.zeros(table, optimizer="rowwise_adagrad")
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"embedding_update_: {name} must be"):
        ops.embedding_update_(
            table, torch.tensor([0]), None, torch.zeros(1, 2), state, optimizer="rowwise_adagrad", lr=0.1, **option
        )
    assert torch.equal(table.codes, codes)
