"""The five tests of the op (it has no gradient of its own), and the two phases of ALPT as published."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import _C, ops
from recfast.ops._library import REGISTRY
from recfast.ops.embedding_update import UpdateState, philox_uniform
from recfast.ops.formats import FORMATS, QuantizedTable

BITS = {"int8": 8, "int4": 4, "int2": 2, "float8": "fp8"}
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMS = (*PLAIN, *BITS)
OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "rowwise_adam")


def make_table(form, rows, width, generator):
    """Random rows; a step is such that some values of most rows are clipped after an update."""
    weight = torch.randn(rows, width, generator=generator)
    if form in PLAIN:
        return weight.to(PLAIN[form])
    step = torch.rand(rows, generator=generator) * 0.02 + 0.01
    if form == "float8":
        return QuantizedTable.from_codes((weight * 100).clamp(-448, 448).to(torch.float8_e4m3fn), step, "fp8")
    info = FORMATS[form]
    codes = (weight * info.highest).round().clamp(info.lowest, info.highest).to(torch.int8)
    return QuantizedTable.from_codes(codes, step, BITS[form])


def int8_table(codes, step):
    return QuantizedTable.from_codes(torch.tensor(codes, dtype=torch.int8), torch.tensor(step))


def copy(table, state):
    clone = lambda x: None if x is None else x.clone()  # noqa: E731
    if isinstance(table, QuantizedTable):
        table = QuantizedTable(table.rows.clone(), table.bits, table.dim)
    else:
        table = table.clone()
    return table, UpdateState(clone(state.row), clone(state.moment), clone(state.second))


def tensors(table, state):
    """All bits that an update may change."""
    stored = table.rows if isinstance(table, QuantizedTable) else table
    return [part for part in (stored, state.row, state.moment, state.second) if part is not None]


def agree(got, want, label):
    """`got` may differ by one code where a value lies on a tie or a draw, and by rounding elsewhere."""
    for (a, s), (b, t) in ((got, want),):
        if isinstance(a, QuantizedTable):
            torch.testing.assert_close(a.step, b.step, rtol=2e-4, atol=1e-7, msg=lambda m: f"{label}: step: {m}")
            neighbours(a.codes, b.codes, label)
        elif a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
        else:
            neighbours(a, b, label)
        for name in ("row", "second", "moment"):
            x, y = getattr(s, name), getattr(t, name)
            if x is None:
                continue
            if x.dtype == torch.uint8:
                x, y = (QuantizedTable(z, 8, a.dim if isinstance(a, QuantizedTable) else a.shape[1]) for z in (x, y))
                torch.testing.assert_close(x.step, y.step, rtol=2e-4, atol=1e-7)
                neighbours(x.codes, y.codes, f"{label}: moment")
            else:
                torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{label}: {n}: {m}")


def neighbours(a, b, label):
    """Few entries differ, and those by one place of the format."""
    if a.dtype == torch.int8:
        places = a.int() - b.int()
    else:
        kind = torch.int8 if a.dtype == torch.float8_e4m3fn else torch.int16
        order = lambda x: torch.where(x < 0, -(x & torch.iinfo(kind).max), x)  # noqa: E731  sign and magnitude
        places = order(a.contiguous().view(kind).int()) - order(b.contiguous().view(kind).int())
    off = places.abs()
    if off.numel() == 0:
        return
    assert int(off.max()) <= 1, label
    assert int((off > 0).sum()) <= 3 + 4e-3 * off.numel(), label


OPTIONS = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(OPTIMIZERS),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "decay": st.sampled_from(["l2", "decoupled"]),
        "step_lr": st.sampled_from([None, 1e-4]),
        "step_optimizer": st.sampled_from(["sgd", "adagrad", "adam"]),
        "step_scale": st.sampled_from(["batch", "table", "none", 0.01]),
        "step_floor": st.sampled_from(["clamp", "abs", "none"]),
        "step_range": st.sampled_from(["clip", "grow"]),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
        "grad_scale": st.sampled_from([1.0, 0.5]),
        "table_id": st.sampled_from([0, 3, 2**31 - 1]),
    }
)


def make_lookups(generator, rows, bags, longest, mode, feature_kind, skip_missing, index_dtype):
    """Indices, offsets and features of a batch; the features share the table's rows unevenly."""
    lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    if mode == "none":
        lengths = torch.ones(bags, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    features, first, sizes = None, torch.zeros(1, dtype=torch.int64), torch.tensor([rows])
    feature = torch.zeros(bags, dtype=torch.int64)
    if feature_kind != "one":
        half = rows // 2
        first, sizes = torch.tensor([0, half, 0]), torch.tensor([max(half, 1), rows - half, rows])
        if feature_kind == "dealt":
            features, feature = (first, sizes, None), torch.arange(bags) % 3
        else:
            cut = bags // 3
            features = (first, sizes, torch.tensor([0, cut, cut, bags]))
            feature = torch.tensor([0] * cut + [2] * (bags - cut), dtype=torch.int64)
    limits = sizes[feature].repeat_interleave(lengths)
    indices = (torch.rand(len(limits), generator=generator) * limits).long().clamp(max=limits - 1)
    indices = torch.where(torch.rand(len(limits), generator=generator) < 0.3, indices // 50, indices)  # some hot rows
    if skip_missing:
        indices[torch.rand(len(limits), generator=generator) < 0.2] = -1
    return indices.to(index_dtype), None if mode == "none" else offsets.to(index_dtype), features


@given(
    seed=st.integers(0, 2**31),
    bags=st.sampled_from([0, 3, 6, 42]),
    longest=st.sampled_from([0, 1, 3, 30]),
    rows=st.sampled_from([1, 2, 300, 5000]),
    width=st.one_of(st.sampled_from([1, 7, 16, 17, 32, 64, 128, 130]), st.integers(1, 70)),
    form=st.sampled_from(FORMS),
    mode=st.sampled_from(["sum", "mean", "none", "max"]),
    weighted=st.booleans(),
    skip_missing=st.booleans(),
    feature_kind=st.sampled_from(["one", "dealt", "split"]),
    moment_bits=st.sampled_from([32, 8]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    options=OPTIONS,
)
def test_matches_reference(
    seed, bags, longest, rows, width, form, mode, weighted, skip_missing, feature_kind, moment_bits, index_dtype,
    options, isa_levels, poisoned_empty,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    table = make_table(form, rows, width, generator)
    options = dict(options, lr=0.05, seed=seed << 30 | 5, mode=mode, skip_missing=skip_missing)
    if form == "float8":
        options["step_lr"] = None
    state = UpdateState.zeros(
        table, optimizer=options["optimizer"], step_optimizer=options["step_optimizer"],
        moment_bits=moment_bits if options["optimizer"] == "rowwise_adam" else 32,
    )  # fmt: skip
    indices, offsets, options["features"] = make_lookups(
        generator, rows, bags, longest, mode, feature_kind, skip_missing, index_dtype
    )
    if weighted and mode != "max":
        options["per_sample_weights"] = torch.randn(len(indices), generator=generator)
    if mode == "max":
        high = offsets[1:, None].expand(-1, width).long()
        low = offsets[:-1, None].expand(-1, width).long()
        chosen = low + (torch.rand(bags, width, generator=generator) * (high - low)).long()
        options["argmax"] = torch.where(high > low, chosen, -1).int()
    grads = [torch.randn(bags, width, generator=generator) for _ in range(2)]
    wanted, answers, counts = copy(table, state), [], []
    expected = [
        int(ops.embedding_update_.reference(wanted[0], indices, offsets, grad, wanted[1], step_count=count, **options))
        for count, grad in enumerate(grads)
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in isa_levels():
                mine = copy(table, state)
                answers.append(mine)
                counts.append(
                    [
                        int(
                            ops.embedding_update_(mine[0], indices, offsets, grad, mine[1], step_count=count, **options)
                        )
                        for count, grad in enumerate(grads)
                    ]
                )
    finally:
        torch.set_num_threads(before)
    for answer, count in zip(answers[1:], counts[1:], strict=True):
        assert count == counts[0]
        assert all(torch.equal(a, b) for a, b in zip(tensors(*answer), tensors(*answers[0]), strict=True))
    agree(answers[0], wanted, f"{form} {options}")
    for count, want in zip(counts[0], expected, strict=True):
        assert abs(count - want) <= 2 + 0.01 * want


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
@pytest.mark.parametrize("width", [10, 64])
def test_hot_rows_give_the_same_bits_for_any_number_of_threads(form, width, isa_levels):
    """Rows with thousands of lookups, more than one piece of the sort, and row numbers of three digits."""
    generator = torch.Generator().manual_seed(0)
    rows, bags, length = 5_000_000, 4000, 20
    stored = torch.zeros(rows, 2 * width if form == "bfloat16" else -(-width // 4) * 4 + 4, dtype=torch.uint8)
    ids = torch.randint(0, rows, (bags * length,), generator=generator)
    hot = torch.rand(len(ids), generator=generator)
    ids[hot < 0.1] = 4_999_999
    ids[(hot >= 0.1) & (hot < 0.107)] = 77  # 560 or so
    offsets = torch.arange(0, len(ids) + 1, length)
    grad = torch.randn(bags, width, generator=generator)
    touched = ids.unique()
    answers = []
    before = torch.get_num_threads()
    row_state = torch.zeros(rows, 2)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in isa_levels():
                stored.zero_()
                row_state.zero_()
                table = stored.view(torch.bfloat16) if form == "bfloat16" else QuantizedTable(stored, 8, width)
                if form == "int8":
                    table.step.fill_(0.01)
                ops.embedding_update_(
                    table, ids, offsets, grad, UpdateState(row_state), optimizer="rowwise_adagrad", lr=0.1,
                    step_lr=1e-4 if form == "int8" else None, seed=5,
                )  # fmt: skip
                answers.append((stored[touched].clone(), row_state[touched].clone()))
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answer, answers[0], strict=True))
    bag_of = torch.arange(bags).repeat_interleave(length)
    for row in (4_999_999, 77):
        sums = grad.double()[bag_of[ids == row]].sum(0)
        found = answers[0][1][touched == row][0, 0]
        assert float(found) == pytest.approx(float(sums.square().mean()), rel=1e-5)


def test_known_values():
    table = int8_table([[10, -20], [5, 5]], [0.5, 1.0])
    state = UpdateState.zeros(table, optimizer="rowwise_adagrad")
    grad = torch.tensor([[3.0, 4.0]])
    # m = (9 + 16) / 2, rate = lr / sqrt(m); w = [5, -10] - [3, 4]
    ops.embedding_update_(
        table, torch.tensor([0]), None, grad, state, optimizer="rowwise_adagrad", lr=math.sqrt(12.5), rounding="nearest"
    )
    assert table.codes.tolist() == [[4, -28], [5, 5]]
    assert state.row.tolist() == [[12.5], [0.0]]
    # The step learns: w = [2, -14], x = [4, -28] exactly, so the gradient is none; then x = 4.4 gives 4 - 4.4 = -0.4.
    options = {"lr": 1.0, "rounding": "nearest", "step_optimizer": "sgd", "step_scale": "none", "step_lr": 0.1}
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


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (2, -2, 1)])
def test_known_values_of_short_codes(bits, low, high):
    table = QuantizedTable.from_codes(torch.zeros(1, 5, dtype=torch.int8), torch.ones(1), bits)
    grad = -torch.tensor([[0.4, 0.6, -100.0, 100.0, -1.0]])
    clipped = ops.embedding_update_(table, torch.tensor([0]), None, grad, lr=1.0, rounding="nearest")
    assert table.codes.tolist() == [[0, 1, low, high, -1]]
    assert int(clipped) == 2
    # Nothing but the codes of the row and its step is ever set: the last byte's unused bits and the padding are zero.
    assert QuantizedTable.from_codes(table.codes, table.step, bits).rows.tolist() == table.rows.tolist()


@pytest.mark.parametrize("form", ["bfloat16", "float16", "float8"])
def test_float_grids_saturate_and_keep_their_values(form, isa_levels):
    """With nothing to change, rounding changes nothing, on any value of the format; what is too large is clipped."""
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn}[form]
    bits = torch.arange(256 if form == "float8" else 65536)
    values = bits.to(torch.uint8).view(kind) if form == "float8" else bits.to(torch.int16).view(kind)
    values = values[torch.isfinite(values.float())][None]
    if form == "float8":
        make = lambda: QuantizedTable.from_codes(values, torch.full((1,), 0.5), "fp8")  # noqa: E731
        stored = lambda table: table.codes.float()  # noqa: E731
    else:
        make, stored = values.clone, torch.Tensor.float
    for _ in isa_levels():
        for rounding in ("nearest", "stochastic"):
            table = make()
            zero = torch.zeros(values.shape)
            assert int(ops.embedding_update_(table, torch.tensor([0]), None, zero, lr=1.0, rounding=rounding)) == 0
            assert torch.equal(stored(table), values.float())
            limit = float(values.float().max())
            far = torch.full(values.shape, 3e38)
            far[:, ::2] *= -1
            clipped = ops.embedding_update_(table, torch.tensor([0]), None, far, lr=1e6, rounding=rounding)
            assert int(clipped) == values.shape[1]
            assert torch.equal(stored(table), torch.where(far > 0, -limit, limit))


def test_draws_are_philox():
    draws = philox_uniform(0xABCDEF0123456789, 7, 2, torch.tensor([5, 2**32 - 1]), 19)
    for i, row in enumerate((5, 2**32 - 1)):
        for column in range(19):
            word = _C.philox4x32(0xABCDEF0123456789, 7, 2, row, column // 8)[column % 8 // 2]
            if column % 2:
                word = (word << 16 | word >> 16) & 0xFFFFFFFF
            assert draws[i, column] == (word >> 8) / 2**24


def test_duplicates_are_summed_before_rounding():
    """20 lookups of one row, each worth 0.1 of a step: rounded apart to the nearest they would all be lost."""
    table = int8_table([[0] * 4] * 2, [1.0, 1.0])
    ops.embedding_update_(table, torch.ones(20).long(), None, torch.full((20, 4), 0.1), lr=1.0, rounding="nearest")
    assert table.codes.tolist() == [[0] * 4, [-2] * 4]


def test_adam_is_sparse_adam():
    """torch.optim.SparseAdam over the same lookups, twenty steps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 12, generator=generator)
    leaf = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.SparseAdam([leaf], lr=0.05, betas=(0.8, 0.99), eps=1e-6)
    state = UpdateState.zeros(weight, optimizer="adam")
    for count in range(20):
        indices = torch.randint(0, 40, (30,), generator=generator)
        grad = torch.randn(30, 12, generator=generator)
        leaf.grad = torch.sparse_coo_tensor(indices[None], grad, (40, 12))
        theirs.step()
        ops.embedding_update_(
            weight, indices, None, grad, state, optimizer="adam", lr=0.05, betas=(0.8, 0.99), eps=1e-6, step_count=count
        )
        torch.testing.assert_close(weight, leaf.detach(), rtol=1e-5, atol=1e-6)


def test_adagrad_is_torch_adagrad():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 12, generator=generator)
    leaf = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.Adagrad([leaf], lr=0.05, eps=1e-10)
    state = UpdateState.zeros(weight, optimizer="adagrad")
    for _ in range(20):
        indices = torch.randint(0, 40, (30,), generator=generator)
        grad = torch.randn(30, 12, generator=generator)
        leaf.grad = torch.sparse_coo_tensor(indices[None], grad, (40, 12))
        theirs.step()
        ops.embedding_update_(weight, indices, None, grad, state, optimizer="adagrad", lr=0.05, eps=1e-10)
        torch.testing.assert_close(weight, leaf.detach(), rtol=1e-5, atol=1e-6)


def test_decoupled_decay_is_adamw():
    """All rows in every batch, so that lazy and dense are the same: torch.optim.AdamW."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 12, generator=generator)
    leaf = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([leaf], lr=0.05, weight_decay=0.1, eps=1e-12)
    state = UpdateState.zeros(weight, optimizer="adam")
    for count in range(10):
        leaf.grad = torch.randn(10, 12, generator=generator)
        theirs.step()
        ops.embedding_update_(
            weight, torch.arange(10), None, leaf.grad, state, optimizer="adam", lr=0.05, weight_decay=0.1, eps=1e-12,
            decay="decoupled", step_count=count,
        )  # fmt: skip
        torch.testing.assert_close(weight, leaf.detach(), rtol=1e-5, atol=1e-6)


def test_rowwise_adam_in_8_bits_follows_float():
    """The 8-bit first moment has no drift: over 100 steps the rows stay near those with a float one."""
    generator = torch.Generator().manual_seed(0)
    tables = {bits: torch.zeros(200, 32) for bits in (32, 8)}
    states = {bits: UpdateState.zeros(tables[bits], optimizer="rowwise_adam", moment_bits=bits) for bits in tables}
    assert states[8].moment.shape == (200, 36)
    assert states[8].row.shape == (200, 1)
    target = torch.randn(200, 32, generator=generator)
    for count in range(100):
        for bits, table in tables.items():
            ops.embedding_update_(
                table, torch.arange(200), None, table - target, states[bits], optimizer="rowwise_adam", lr=0.02,
                step_count=count, seed=1,
            )  # fmt: skip
    off = (tables[8] - tables[32]).abs()
    moved = tables[32].abs().mean()
    assert float(moved) > 0.5
    assert float(off.mean()) < 0.01 * float(moved)
    assert abs(float((tables[8] - tables[32]).mean())) < 4 * float(off.square().mean().sqrt()) / math.sqrt(200 * 32)


def paper_step(w, delta, first_grad, second_grad, rows, bags, *, lr, step_lr, bits, seed, count):
    """ALPT as its paper writes it, for SGD: dense, in float64, row by row. Returns the new (codes, delta)."""
    high, low = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    codes, delta = w.clone().double(), delta.clone().double()
    width = codes.shape[1]
    scale = 1 / math.sqrt(bags * width * high)
    for row in rows:
        moved = delta[row] * codes[row] - lr * first_grad[row]
        x = moved / delta[row]
        slope = 0.0
        for d in range(width):
            if x[d] <= low:
                factor = low
            elif x[d] >= high:
                factor = high
            else:
                factor = float(torch.round(x[d]) - x[d])
            slope += float(second_grad[row, d]) * factor
        delta[row] = max(float(delta[row]) - step_lr * scale * slope, 1e-8)
        x = moved / delta[row]
        u = philox_uniform(seed, count, 0, torch.tensor([row]), width)[0]
        codes[row] = (x.floor() + (u < x - x.floor())).clamp(low, high)  # floor(x + u), with 1 - u for u
    return codes, delta


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_two_phases_are_the_papers_algorithm(bits):
    """A bag-sum model with a quadratic loss, whose second forward and backward use the nearest codes of w'."""
    generator = torch.Generator().manual_seed(bits)
    high = 2 ** (bits - 1) - 1
    rows, width, bags, length = 30, 6, 12, 4
    codes = torch.randint(-high - 1, high + 1, (rows, width), generator=generator, dtype=torch.int8)
    delta = torch.rand(rows, generator=generator) * 0.1 + 0.05
    target = torch.randn(bags, width, generator=generator)
    table = QuantizedTable.from_codes(codes, delta, bits)
    offsets = torch.arange(0, bags * length + 1, length)
    bag_of = torch.arange(bags).repeat_interleave(length)

    def gradient(values, indices):
        """Of sum (e - target)^2 / 2 by bag, and by row."""
        bag = torch.zeros(bags, width, dtype=torch.float64).index_add(0, bag_of, values[indices]) - target
        return bag, torch.zeros(rows, width, dtype=torch.float64).index_add(0, indices, bag[bag_of])

    want_codes, want_delta = codes.double(), delta.double()
    for count in range(3):
        indices = torch.randint(0, rows, (bags * length,), generator=generator)
        seen = indices.unique().tolist()
        lr, step_lr = 0.05, 0.01
        bag, by_row = gradient(want_delta[:, None] * want_codes, indices)
        pending = ops.embedding_update_first_(table, indices, offsets, bag.float(), lr=lr)
        # Between the phases the table holds Q_D(w', delta).
        moved = want_delta[:, None] * want_codes - lr * by_row
        nearest = want_codes.clone()
        nearest[seen] = (moved / want_delta[:, None]).round().clamp(-high - 1, high)[seen]
        assert torch.equal(table.codes.double(), nearest)
        assert torch.equal(pending.rows(), torch.tensor(seen))
        torch.testing.assert_close(pending.values().double(), moved[seen], rtol=1e-5, atol=1e-6)
        second_bag, second = gradient(want_delta[:, None] * nearest, indices)
        ops.embedding_update_second_(
            table, pending, second_bag.float(), step_lr=step_lr, step_optimizer="sgd", seed=9, step_count=count
        )
        want_codes, want_delta = paper_step(
            want_codes, want_delta, by_row, second, seen, bags, lr=lr, step_lr=step_lr, bits=bits, seed=9,
            count=count,
        )  # fmt: skip
        torch.testing.assert_close(table.step.double(), want_delta, rtol=1e-5, atol=0)
        assert int((table.codes.double() != want_codes).sum()) <= 1
        want_codes, want_delta = table.codes.double(), table.step.double()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", ["int8", "int4", "int2"])
def test_two_phases_on_one_gradient_are_one_pass(form, optimizer, isa_levels):
    generator = torch.Generator().manual_seed(3)
    table = make_table(form, 50, 20, generator)
    indices, offsets, features = make_lookups(generator, 50, 9, 7, "mean", "split", True, torch.int32)
    grad = torch.randn(9, 20, generator=generator)
    state = UpdateState.zeros(table, optimizer=optimizer, step_optimizer="adam")
    keys = {"seed": 3, "step_count": 4, "table_id": 5}
    learn = {"step_lr": 1e-3, "step_optimizer": "adam"}
    lookups = {"mode": "mean", "features": features, "skip_missing": True}
    want = copy(table, state)
    counted = ops.embedding_update_(
        want[0], indices, offsets, grad, want[1], optimizer=optimizer, lr=0.1, **learn, **lookups, **keys
    )
    for _ in isa_levels():
        mine = copy(table, state)
        pending = ops.embedding_update_first_(
            mine[0], indices, offsets, grad, mine[1], optimizer=optimizer, lr=0.1, **lookups, **keys
        )
        again = ops.embedding_update_second_(mine[0], pending, grad, mine[1], optimizer=optimizer, **learn, **keys)
        assert int(again) == int(counted)
        assert all(torch.equal(a, b) for a, b in zip(tensors(*mine), tensors(*want), strict=True))


@pytest.mark.parametrize("form", ["int8", "int4", "int2"])
def test_phases_match_their_references(form):
    generator = torch.Generator().manual_seed(3)
    table = make_table(form, 50, 20, generator)
    indices, offsets, _ = make_lookups(generator, 50, 9, 7, "sum", "one", False, torch.int64)
    grads = torch.randn(2, 9, 20, generator=generator)
    state = UpdateState.zeros(table, optimizer="rowwise_adagrad", step_optimizer="adagrad")
    want = copy(table, state)
    first = {"optimizer": "rowwise_adagrad", "lr": 0.1}
    second = {"optimizer": "rowwise_adagrad", "step_lr": 1e-3, "seed": 8}
    pending = ops.embedding_update_first_(table, indices, offsets, grads[0], state, **first)
    rows, floats = ops.embedding_update_first_.reference(want[0], indices, offsets, grads[0], want[1], **first)
    assert torch.equal(pending.rows(), rows)
    torch.testing.assert_close(pending.values().double(), floats, rtol=1e-4, atol=1e-5)
    agree((table, state), want, form)
    gradient = ops.embedding_step_gradient(table, pending, grads[1])
    torch.testing.assert_close(
        gradient.double(), ops.embedding_step_gradient.reference(table, pending, grads[1]), rtol=1e-4, atol=1e-5
    )
    want = copy(table, state)
    ops.embedding_update_second_(table, pending, grads[1], state, **second)
    ops.embedding_update_second_.reference(want[0], pending, grads[1], want[1], **second)
    agree((table, state), want, form)


@pytest.mark.parametrize("form", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_requantize_matches_reference(form, rounding, isa_levels):
    generator = torch.Generator().manual_seed(4)
    table = make_table(form, 700, 21, generator)
    pending = None
    if form != "float8":
        indices = torch.randint(0, 700, (90,), generator=generator)
        pending = ops.embedding_update_first_(
            table, indices, None, torch.randn(90, 21, generator=generator), lr=0.05, mode="none"
        )
    none = UpdateState()
    want, _ = copy(table, none)
    options = {"pending": pending, "rounding": rounding, "seed": 6, "step_count": 7, "table_id": 8}
    wanted = ops.requantize_.reference(want, 0.013, **options)
    answers = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in isa_levels():
                mine, _ = copy(table, none)
                count = ops.requantize_(mine, torch.tensor(0.013), **options)
                answers.append((mine, int(count)))
    finally:
        torch.set_num_threads(before)
    for mine, count in answers[1:]:
        assert torch.equal(mine.rows, answers[0][0].rows)
        assert count == answers[0][1]
    agree((answers[0][0], none), (want, none), form)
    assert abs(answers[0][1] - int(wanted)) <= 2
    assert answers[0][0].step.unique().tolist() == [pytest.approx(0.013)]


def test_table_wide_step_learns():
    """mpe's form: one step for the table, by torch's own Adam, the whole table rounded again at each update."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 64, 16
    target = torch.randn(rows, width, generator=generator)
    table = QuantizedTable.from_codes(torch.zeros(rows, width, dtype=torch.int8), torch.full((rows,), 0.02), 4)
    step = torch.nn.Parameter(torch.tensor(0.02))
    adam = torch.optim.Adam([step], lr=5e-3)
    losses = []
    for count in range(150):
        indices = torch.randint(0, rows, (32,), generator=generator)
        values = table.dequantize()
        losses.append(float((values - target).square().mean()))
        grad = values[indices] - target[indices]
        pending = ops.embedding_update_first_(table, indices, None, grad, lr=0.2)
        again = table.dequantize()[indices] - target[indices]
        step.grad = ops.embedding_step_gradient(table, pending, again)
        adam.step()
        ops.requantize_(table, abs(float(step.detach())) + 1e-10, pending=pending, seed=1, step_count=count)
    assert float(step.detach()) > 0.1  # 8 steps of 0.02 cannot reach a target of unit variance
    assert losses[-1] < 0.1 * losses[0]


def test_learned_step_grows_where_weights_are_clipped_and_stays_positive():
    for floor in ("clamp", "abs", "none"):
        table = int8_table([[127] * 8], [0.01])
        state = UpdateState.zeros(table, optimizer="sgd", step_optimizer="adagrad")
        options = {"lr": 0.1, "step_lr": 1e-3, "seed": 0, "step_floor": floor}
        for count in range(20):
            ops.embedding_update_(table, torch.tensor([0]), None, -torch.ones(1, 8), state, step_count=count, **options)
        assert table.step[0] > 0.012
        for count in range(20):
            ops.embedding_update_(
                table, torch.tensor([0]), None, torch.ones(1, 8), lr=0.0, step_lr=1e3, step_optimizer="sgd",
                step_scale="none", step_floor=floor, step_count=count,
            )  # fmt: skip
            assert table.step[0] > 0


@pytest.mark.parametrize("step", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-42])
@pytest.mark.parametrize("form", ["int8", "int4", "int2", "float8"])
def test_steps_that_are_no_steps(form, step, isa_levels):
    """No crash, the same codes everywhere, and the other rows as if nothing were."""
    for range_ in ("clip", "grow"):
        found = []
        for _ in isa_levels():
            generator = torch.Generator().manual_seed(1)
            table = make_table(form, 4, 20, generator)
            other = QuantizedTable(table.rows.clone(), table.bits, table.dim)
            table.step[2] = step
            options = {"lr": 0.1, "step_range": range_, "seed": 2}
            if form != "float8":
                options.update(step_lr=0.01, step_optimizer="sgd")
            grad = torch.randn(4, 20, generator=generator)
            ops.embedding_update_(table, torch.arange(4), None, grad, **options)
            ops.embedding_update_(other, torch.arange(4), None, grad, **options)
            rest = torch.tensor([0, 1, 3])
            assert torch.equal(table.rows[rest], other.rows[rest])
            if form == "float8":
                assert not table.codes.float().isnan().any()
            assert math.isnan(step) == bool(table.step[2].isnan()) or not math.isfinite(step)
            found.append(table.rows[2, 4:].clone())
        assert all(torch.equal(codes, found[0]) for codes in found)


def test_nothing_to_do():
    table = int8_table([[1, 2], [3, 4]], [0.5, 0.5])
    before = table.rows.clone()
    empty = torch.tensor([], dtype=torch.int64)
    assert int(ops.embedding_update_(table, empty, None, torch.empty(0, 2), lr=1.0)) == 0
    ops.embedding_update_(table, empty, torch.tensor([0, 0, 0]), torch.ones(2, 2), lr=1.0)
    missing = torch.tensor([-1, -1])
    ops.embedding_update_(
        table, missing, torch.tensor([0, 2]), torch.ones(1, 2), lr=1.0, mode="mean", skip_missing=True
    )
    pending = ops.embedding_update_first_(table, empty, None, torch.empty(0, 2), lr=1.0)
    ops.embedding_update_second_(table, pending, torch.empty(0, 2))
    assert len(pending.rows()) == 0
    assert float(ops.embedding_step_gradient(table, pending, torch.empty(0, 2))) == 0.0
    nobody = QuantizedTable.from_codes(torch.zeros(0, 2, dtype=torch.int8), torch.zeros(0))
    ops.embedding_update_(nobody, empty, None, torch.empty(0, 2), lr=1.0)
    assert torch.equal(table.rows, before)


def test_gradcheck():
    """The op has no gradient; its SGD step must be the gradient of the sum over bags."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30, 6, generator=generator)
    leaf = table.clone().requires_grad_()
    indices, offsets = torch.randint(0, 30, (50,), generator=generator), torch.tensor([0, 20, 20, 50])
    weights = torch.rand(50, generator=generator)
    grad = torch.randn(3, 6, generator=generator)
    bag_of = torch.repeat_interleave(torch.arange(3), offsets.diff())
    taken = leaf[indices] * weights[:, None] / offsets.diff()[bag_of][:, None]
    torch.zeros(3, 6).index_add(0, bag_of, taken).backward(grad)
    options = {"per_sample_weights": weights, "mode": "mean"}
    ops.embedding_update_(table, indices, offsets, grad, lr=0.5, **options)
    torch.testing.assert_close(table, leaf.detach() - 0.5 * leaf.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["embedding_update_", "embedding_step_gradient", "requantize_"])
def test_opcheck(opcheck, name):
    opcheck(REGISTRY[name])


def test_more_than_2_to_the_31_values(tmp_path):
    """Rows at both ends of a table of 2.4e9 values, in a sparse file."""
    rows = 150_000_000
    path = tmp_path / "table"
    with open(path, "wb") as file:
        file.truncate(rows * 20)
    table = QuantizedTable(torch.from_file(str(path), shared=True, size=rows * 20, dtype=torch.uint8).view(rows, 20), 8)
    ids = torch.tensor([0, rows - 1, 2**27 + 5])
    table.step[ids] = 1.0
    ops.embedding_update_(table, ids, None, -torch.tensor([[1.0] * 16, [2.0] * 16, [3.0] * 16]), lr=1.0)
    assert table.rows[ids, 4:].tolist() == [[1] * 16, [2] * 16, [3] * 16]
    assert table.rows[ids - 1 + 2 * (ids == 0)].sum() == 0


REFUSED = [
    ({"indices": torch.tensor([0, 3])}, IndexError, r"indices\[1\] = 3 is outside \[0, 3\)"),
    ({"indices": torch.tensor([-1, 3])}, IndexError, r"indices\[0\] = -1 is outside \[0, 3\)"),
    ({"indices": torch.tensor([-1, -2]), "skip_missing": True}, IndexError, r"indices\[1\] = -2 is outside \[0, 3\)"),
    (
        {"features": (torch.tensor([0, 2]), torch.tensor([2, 1]), None), "indices": torch.tensor([0, 1])},
        IndexError,
        r"indices\[1\] = 1 is outside \[0, 1\)",
    ),
    (
        {"features": (torch.tensor([0, 2]), torch.tensor([2, 2]), None)},
        ValueError,
        r"features\[1\] is rows 2 to 4, outside the table's \[0, 3\)",
    ),
    (
        {"features": (torch.tensor([0, -1]), torch.tensor([2, 2]), None)},
        ValueError,
        r"features\[1\] is rows -1 to 1, outside the table's \[0, 3\)",
    ),
    (
        {"features": (torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1]), None)},
        ValueError,
        "2 bags cannot be dealt out to 3 features",
    ),
    (
        {"features": (torch.tensor([0]), torch.tensor([3]), torch.tensor([0, 1]))},
        ValueError,
        r"features.splits\[-1\] must be 2, the number of bags, got 1",
    ),
    ({"offsets": torch.tensor([0, 2, 1])}, ValueError, r"offsets\[2\] = 1 is below offsets\[1\]"),
    ({"offsets": torch.tensor([0, 1, 3])}, ValueError, r"offsets\[-1\] must be 2"),
    ({"offsets": torch.tensor([1, 1, 2])}, ValueError, r"offsets\[0\] must be 0, got 1"),
    ({"mode": "none"}, ValueError, "mode none gives a row for each index and takes no offsets"),
    ({"mode": "max"}, ValueError, "argmax goes with mode max"),
    (
        {"mode": "max", "argmax": torch.zeros(2, 2, dtype=torch.int64)},
        TypeError,
        "argmax must be int32, got int64",
    ),
    ({"grad": torch.tensor([[1.0, math.nan], [0, 0]])}, ValueError, "grad must be finite, got nan at .* 1"),
    ({"grad": torch.tensor([[1.0, 2.0], [-math.inf, 0]])}, ValueError, "grad must be finite, got -inf at .* 2"),
    ({"grad": torch.ones(3, 2)}, ValueError, r"grad must have shape \[2, 2\], got \[3, 2\]"),
    ({"grad": torch.ones(2, 2).double()}, TypeError, "grad must be float32, got float64"),
    ({"per_sample_weights": torch.tensor([1.0, math.nan])}, ValueError, "per_sample_weights must be finite"),
    ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
    ({"lr": math.nan}, ValueError, "lr must be finite and not negative, got nan"),
    ({"betas": (0.9, 1.0)}, ValueError, "betas must be two numbers in"),
    (
        {"optimizer": "lion"},
        ValueError,
        "optimizer must be one of sgd, rowwise_adagrad, adagrad, adam, rowwise_adam",
    ),
    ({"optimizer": "adagrad"}, ValueError, r"state.second must be a tensor of shape \[3, 2\] here, got None"),
    ({"optimizer": "adam"}, ValueError, r"state.moment must be a tensor of shape \[3, 2\] here, got None"),
    ({"step_lr": 1e-3}, ValueError, r"state.row must be a tensor of shape \[3, 1\] here, got None"),
    ({"rounding": "up"}, ValueError, "rounding must be one of nearest, stochastic"),
    ({"decay": "l1"}, ValueError, "decay must be one of l2, decoupled"),
    ({"step_range": "wrap"}, ValueError, "step_range must be one of clip, grow"),
    ({"step_floor": "relu"}, ValueError, "step_floor must be one of clamp, abs, none"),
    (
        {"step_lr": 1.0, "step_optimizer": "sgd", "step_scale": "x"},
        ValueError,
        "step_scale must be one of batch, table",
    ),
    ({"seed": -1}, ValueError, "seed = -1 is outside"),
    ({"step_count": 2**32}, ValueError, "step_count = 4294967296 is outside"),
    ({"table_id": 2**31}, ValueError, "table_id = 2147483648 is outside"),
]


@pytest.mark.parametrize(("change", "error", "sentence"), REFUSED)
@pytest.mark.parametrize("function", ["embedding_update_", "embedding_update_first_"])
def test_rejects_bad_input(function, change, error, sentence):
    table = int8_table([[1, 2], [3, 4], [5, 6]], [0.1, 0.2, 0.3])
    before = table.rows.clone()
    arguments = {
        "indices": torch.tensor([0, 1]), "offsets": torch.tensor([0, 1, 2]), "grad": torch.ones(2, 2), "lr": 0.1,
        **change,
    }  # fmt: skip
    if function == "embedding_update_first_" and any(name.startswith("step_") for name in set(change) - {"step_count"}):
        pytest.skip("an option of the second phase")
    with pytest.raises(error, match=f"{function}: .*{sentence}"):
        getattr(ops, function)(table, **arguments)
    assert torch.equal(table.rows, before)


@pytest.mark.parametrize("option", [{"eps": 0.0}, {"grad_scale": math.nan}, {"step_scale": math.inf, "step_lr": 0.1}])
def test_rejects_options_that_would_write_nan(option):
    table = int8_table([[1, 2], [3, 4]], [0.1, 0.2])
    before = table.rows.clone()
    state = UpdateState.zeros(table, optimizer="rowwise_adagrad", step_optimizer="adagrad")
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"embedding_update_: {name} must be"):
        ops.embedding_update_(
            table, torch.tensor([0]), None, torch.zeros(1, 2), state, optimizer="rowwise_adagrad", lr=0.1, **option
        )
    assert torch.equal(table.rows, before)


def test_rejects_tables_it_cannot_train():
    ids, grad = torch.tensor([0]), torch.zeros(1, 4)
    floats = torch.zeros(2, 4)
    table = make_table("int8", 2, 4, torch.Generator().manual_seed(0))
    short = make_table("float8", 2, 4, torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match="table must be float32 or bfloat16 or float16, got float64"):
        ops.embedding_update_(floats.double(), ids, None, grad, lr=0.1)
    with pytest.raises(ValueError, match="table is updated in place and must not require a gradient"):
        ops.embedding_update_(floats.clone().requires_grad_(), ids, None, grad, lr=0.1)
    with pytest.raises(ValueError, match="table must be contiguous"):
        ops.embedding_update_(torch.zeros(4, 2).T, ids, None, grad, lr=0.1)
    with pytest.raises(ValueError, match="step_lr must be None for float8 rows"):
        ops.embedding_update_(short, ids, None, grad, lr=0.1, step_lr=0.1)
    affine = QuantizedTable(torch.zeros(2, 8, dtype=torch.uint8), 8, 4, "affine")
    with pytest.raises(ValueError, match="header affine, which are for inference alone"):
        ops.embedding_update_(affine, ids, None, grad, lr=0.1)
    with pytest.raises(TypeError, match="embedding_update_first_: table must be a QuantizedTable of 8, 4 or 2 bits"):
        ops.embedding_update_first_(floats, ids, None, grad, lr=0.1)
    with pytest.raises(TypeError, match="embedding_update_second_: pending must be what"):
        ops.embedding_update_second_(table, None, grad)
    pending = ops.embedding_update_first_(table, ids, None, grad, lr=0.1)
    other = make_table("int8", 2, 9, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"embedding_update_second_: table must have shape \[T, 8\]"):
        ops.embedding_update_second_(other, pending, grad)
    with pytest.raises(ValueError, match=r"requantize_: step must be positive and finite, got 0\.0"):
        ops.requantize_(table, 0.0)
    with pytest.raises(TypeError, match="requantize_: table must be a QuantizedTable, got Tensor"):
        ops.requantize_(floats, 1.0)
    with pytest.raises(ValueError, match="moment_bits 8 goes with optimizer rowwise_adam"):
        UpdateState.zeros(table, optimizer="adam", moment_bits=8)


def test_memory_of_an_int8_table_in_training():
    """Rows and row-wise state: at most 1.2 bytes a weight at D = 64."""
    table = QuantizedTable.from_codes(torch.zeros(10, 64, dtype=torch.int8), torch.ones(10))
    state = UpdateState.zeros(table, optimizer="rowwise_adagrad", step_optimizer="adagrad")
    size = sum(part.numel() * part.element_size() for part in tensors(table, state))
    assert size / (10 * 64) <= 1.2
