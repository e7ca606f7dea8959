"""What stochastic rounding is for, and how random it is: stuck weights, bias, variance, correlation."""

import math

import pytest
import torch

from recfast import ops
from recfast.ops.formats import QuantizedTable


def ones(form, rows, width):
    """Rows of value 1, in a format whose step or unit in the last place there is `unit`: (table, unit, read)."""
    if form in ("bfloat16", "float16"):
        kind = getattr(torch, form)
        table = torch.ones(rows, width, dtype=kind)
        return table, torch.finfo(kind).eps, lambda: table.double()
    if form == "float8":
        table = QuantizedTable.from_codes(
            torch.full((rows, width), 8.0).to(torch.float8_e4m3fn), torch.full((rows,), 0.125), "fp8"
        )
        return table, 0.125, lambda: table.codes.double() * 0.125
    unit = {"int8": 1 / 64, "int4": 1 / 4, "int2": 1.0}[form]
    table = QuantizedTable.from_codes(
        torch.full((rows, width), round(1 / unit), dtype=torch.int8),
        torch.full((rows,), unit),
        {"int8": 8, "int4": 4, "int2": 2}[form],
    )
    return table, unit, lambda: table.codes.double() * unit


@pytest.mark.parametrize("form", ["int8", "int4", "bfloat16", "float16", "float8"])
def test_small_updates_are_not_stuck(form):
    """200 updates of 1/100 of a step move the mean by two steps; rounded to the nearest, by nothing."""
    width = 4096
    for rounding in ("stochastic", "nearest"):
        table, unit, read = ones(form, 1, width)
        move = (-0.01 if form == "int4" else 0.01) * unit  # int4 has more room below
        for count in range(200):
            ops.embedding_update_(
                table, torch.tensor([0]), None, torch.full((1, width), -move), lr=1.0, rounding=rounding, seed=1,
                step_count=count,
            )  # fmt: skip
        moved = float((read() - 1).mean()) / (100 * move)
        if rounding == "nearest":
            assert moved == 0.0
        else:
            # Each update goes up with probability 0.01, so 200 give 2 with variance 200 * 0.01 * 0.99 a column.
            assert abs(moved - 2.0) < 4 * math.sqrt(200 * 0.01 * 0.99 / width)


@pytest.mark.parametrize("form", ["int8", "int4", "int2", "bfloat16", "float16", "float8"])
@pytest.mark.parametrize("fraction", [0.0625, 0.3125, 0.5, 0.96875])
def test_rounding_has_no_bias(form, fraction):
    """Mean and variance of every column and of every row, the same downwards: z-tests and chi-squares."""
    rows, width = 2000, 50
    for direction in (1, -1):
        table, unit, read = ones(form, rows, width)
        if form == "int2" and direction == 1:
            continue  # 1 is its highest code
        # Below 1 the grid of a float is twice as fine.
        fine = unit / 2 if direction == -1 and form in ("bfloat16", "float16", "float8") else unit
        grad = torch.full((rows, width), -direction * fraction * fine)
        ops.embedding_update_(table, torch.arange(rows), None, grad, lr=1.0, seed=11, step_count=4)
        ups = (read() - 1) * direction / fine
        assert set(ups.unique().tolist()) <= {0.0, 1.0}
        spread = math.sqrt(fraction * (1 - fraction))
        assert abs(float(ups.mean()) - fraction) < 4 * spread / math.sqrt(rows * width)
        # Rows and columns draw independently: their means spread as binomials do (chi-square, 4 standard deviations).
        for axis, (count, size) in ((0, (width, rows)), (1, (rows, width))):
            chi_square = float(((ups.mean(axis) - fraction) ** 2).sum() / (spread**2 / size))
            assert abs(chi_square - count) < 4 * math.sqrt(2 * count) + 2
        # Neighbours share a word of the generator: even and odd columns, alone and together.
        even, odd = ups[:, 0::2], ups[:, 1::2]
        for part in (even, odd):
            assert abs(float(part.mean()) - fraction) < 4 * spread / math.sqrt(part.numel())
            variance = float((part - fraction).square().mean())
            fourth = fraction * (1 - fraction) * (1 - 3 * fraction * (1 - fraction))
            assert abs(variance - spread**2) < 4 * math.sqrt(max(fourth - spread**4, 1e-9) / part.numel()) + 1e-3
        for other in (odd, odd.roll(1, 1), odd.roll(1, 0)):
            correlation = float(((even - fraction) * (other - fraction)).mean()) / spread**2
            assert abs(correlation) < 4 / math.sqrt(even.numel())


def test_updates_and_tables_draw_apart():
    """Draws of another step, table or seed have nothing to do with these; the same key gives the same codes."""
    rows, width, fraction = 500, 64, 0.5

    def ups(**key):
        table, unit, read = ones("int8", rows, width)
        grad = torch.full((rows, width), -fraction * unit)
        ops.embedding_update_(table, torch.arange(rows), None, grad, lr=1.0, **key)
        return (read() - 1) / unit

    base = ups(seed=1, step_count=2, table_id=3)
    assert torch.equal(base, ups(seed=1, step_count=2, table_id=3))
    for key in ({"seed": 2}, {"step_count": 3}, {"table_id": 4}, {"seed": 1 + (1 << 40)}):
        other = ups(**{"seed": 1, "step_count": 2, "table_id": 3, **key})
        correlation = float(((base - 0.5) * (other - 0.5)).mean()) * 4
        assert abs(correlation) < 4 / math.sqrt(rows * width)


def test_8_bit_moment_draws_apart_from_the_weights():
    """The first moment is rounded with draws of its own: its rounding errors do not go with those of the codes."""
    rows, width = 500, 64
    table = QuantizedTable.from_codes(torch.zeros(rows, width, dtype=torch.int8), torch.ones(rows))
    state = ops.UpdateState.zeros(table, optimizer="rowwise_adam", moment_bits=8)
    grad = torch.full((rows, width), 0.5)
    grad[:, 0] = 63.5 * 2 / 1.000001  # m is 1/254 of the largest: half a step up in all other columns
    ops.embedding_update_(
        table, torch.arange(rows), None, grad, state, optimizer="rowwise_adam", lr=1e9, betas=(0.0, 0.0), seed=5
    )
    moment = QuantizedTable(state.moment, 8, width)
    ups = moment.codes[:, 1:].double()
    assert set(ups.unique().tolist()) == {0.0, 1.0}
    assert abs(float(ups.mean()) - 0.5) < 4 * 0.5 / math.sqrt(ups.numel())
    again = QuantizedTable.from_codes(torch.zeros(rows, width, dtype=torch.int8), torch.ones(rows))
    ops.embedding_update_(again, torch.arange(rows), None, torch.full((rows, width), -0.5), lr=1.0, seed=5)
    codes = again.codes[:, 1:].double()
    correlation = float(((ups - 0.5) * (codes - 0.5)).mean()) * 4
    assert abs(correlation) < 4 / math.sqrt(ups.numel())
