"""The five tests of the table, of attention over it and of both at once; the published form is the reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float64: 2.0**-53}


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def problem(lengths, candidates, tables, bits, width, seed=0, dtype=torch.float32):
    """`(codes, values, offsets, query codes, candidate offsets)`; `candidates` None means one a user."""
    generator = torch.Generator().manual_seed(seed)
    events = sum(lengths)
    rows = len(lengths) if candidates is None else sum(candidates)
    codes = torch.randint(2**bits, (events, tables), generator=generator).to(torch.uint8)
    values = torch.randn(events, width, generator=generator, dtype=torch.float64).to(dtype)
    query_codes = torch.randint(2**bits, (rows, tables), generator=generator).to(torch.uint8)
    return codes, values, offsets_of(lengths), query_codes, None if candidates is None else offsets_of(candidates)


def collision_mask(codes, values, offsets, query_codes, candidate_offsets, normalize=True):
    """The published form in float64, no table: for each candidate a mask of the events it collides with."""
    values = values.double()
    users = torch.arange(len(query_codes))
    if candidate_offsets is not None:
        users = torch.arange(len(offsets) - 1).repeat_interleave(candidate_offsets.diff())
    out = []
    for c, user in enumerate(users.tolist()):
        own = slice(int(offsets[user]), int(offsets[user + 1]))
        mask = (codes[own] == query_codes[c]).double()  # [L, M]
        sums = mask.T @ values[own]
        if normalize:
            sums = torch.nn.functional.normalize(sums, dim=-1, eps=1e-12)
        out.append(sums.mean(0))
    return torch.stack(out) if out else values.new_zeros(0, values.shape[1])


def bounds(codes, values, offsets, query_codes, candidate_offsets, normalize):
    """What rounding can do to the published form, followed through its two steps: n * unit * sum |terms|."""
    unit = UNIT[values.dtype]
    users = torch.arange(len(query_codes))
    if candidate_offsets is not None:
        users = torch.arange(len(offsets) - 1).repeat_interleave(candidate_offsets.diff())
    width, tables = values.shape[1], codes.shape[1]
    out = []
    for c, user in enumerate(users.tolist()):
        own = slice(int(offsets[user]), int(offsets[user + 1]))
        mask = (codes[own] == query_codes[c]).double()
        sums = mask.T @ values[own].double()
        error = mask.sum(0).unsqueeze(1) * unit * (mask.T @ values[own].double().abs())
        if normalize:
            norm = sums.norm(dim=-1, keepdim=True)
            live = norm > 1e-6
            # d(x / |x|) <= 2 |dx| / |x|, and the norm itself is good to (Dv / 16 + 8) units.
            error = 2 * error.norm(dim=-1, keepdim=True) / norm + (width + 8) * unit * sums.abs() / norm
            error = torch.where(live, error, 0)
            sums = torch.where(live, sums / norm, 0)
        out.append((error + (tables + 2) * unit * sums.abs()).mean(0))
    return torch.stack(out) if out else values.new_zeros(0, width).double()


widths = st.one_of(st.sampled_from([1, 4, 8, 15, 16, 17, 64, 65]), st.integers(1, 150))


@given(
    users=st.lists(
        st.tuples(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 50)), st.integers(0, 12)), max_size=6
    ),
    shared=st.booleans(),
    tables=st.integers(1, 17),
    bits=st.integers(1, 8),
    width=widths,
    normalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60)
def test_matches_reference(users, shared, tables, bits, width, normalize, dtype, index, isa_levels, poisoned_empty):
    lengths = [length for length, _ in users]
    problem_of = problem(lengths, [n for _, n in users] if shared else None, tables, bits, width, dtype=dtype)
    codes, values, offsets, query_codes, candidate_offsets = problem_of
    wanted = collision_mask(*problem_of, normalize)
    bound = bounds(*problem_of, normalize)
    wanted_table = ops.sdim_table.reference(codes, values.double(), offsets, bits=bits)
    size = ops.sdim_table.reference(codes, values.double().abs(), offsets, bits=bits)
    answers = []
    for _ in isa_levels():
        table = ops.sdim_table(codes, values, offsets.to(index), bits=bits)
        assert table.shape == (len(users), tables, 2**bits, width)
        assert table.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.all((table.double() - wanted_table).abs() <= max(lengths, default=0) * UNIT[dtype] * size)
        rows = None if candidate_offsets is None else candidate_offsets.to(index)
        out = ops.sdim_attention(query_codes, table, candidate_offsets=rows, normalize=normalize)
        assert out.dtype == table.dtype
        assert torch.all((out.double() - wanted).abs() <= bound)
        answers.append((table, out))
    assert all(torch.equal(a, b) for answer in answers for a, b in zip(answer, answers[0], strict=True))


def test_known_values(isa_levels):
    codes = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0]], dtype=torch.uint8)
    values = torch.tensor([[3.0, 0.0], [0.0, 4.0], [5.0, 12.0], [100.0, 100.0]])
    offsets = torch.tensor([0, 3, 3, 4])
    for _ in isa_levels():
        table = ops.sdim_table(codes, values, offsets, bits=1)
        assert table[0].tolist() == [[[3, 4], [5, 12]], [[0, 4], [8, 12]]]
        assert table[1].tolist() == [[[0, 0], [0, 0]], [[0, 0], [0, 0]]]
        assert table[2].tolist() == [[[100, 100], [0, 0]], [[100, 100], [0, 0]]]
        query = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]], dtype=torch.uint8)
        rows = torch.tensor([0, 2, 3, 4])
        plain = ops.sdim_attention(query, table, candidate_offsets=rows, normalize=False)
        assert plain.tolist() == [[1.5, 4.0], [6.5, 12.0], [0.0, 0.0], [0.0, 0.0]]
        unit = ops.sdim_attention(query, table, candidate_offsets=rows)
        length = math.hypot(8, 12)
        expected = [0.3, 0.9, (5 / 13 + 8 / length) / 2, (12 / 13 + 12 / length) / 2, 0, 0, 0, 0]
        assert unit.flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize):
    codes, values, offsets, query_codes, rows = problem([5, 0, 9, 1], [2, 1, 3, 0], 3, 2, 5, dtype=torch.float64)

    def both(values, start):
        table = ops.sdim_append(start, codes, values, offsets)
        return ops.sdim_attention(query_codes, table, candidate_offsets=rows, normalize=normalize)

    start = torch.randn(4, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.autograd.gradcheck(both, [values.requires_grad_(), start.requires_grad_()])
    table = ops.sdim_table(codes, values.detach(), offsets, bits=2)
    # Finite differences do not see that an empty bucket has no gradient, so its entries are filled.
    table = torch.where(table == 0, 1.5, table).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ops.sdim_attention(query_codes, x, candidate_offsets=rows, normalize=normalize), [table]
    )
    assert torch.autograd.gradcheck(
        lambda x: ops.sdim_table(codes, x, offsets, bits=2), [values.detach().requires_grad_()]
    )


def test_padded_gradcheck():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (3, 5, 2), generator=generator).to(torch.uint8)
    values = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    lengths = torch.tensor([5, 0, 2])
    assert torch.autograd.gradcheck(lambda x: ops.sdim_table(codes, x, lengths, bits=2), [values])


def test_empty_buckets_have_no_gradient(isa_levels):
    table = torch.zeros(1, 1, 2, 3)
    table[0, 0, 1] = torch.tensor([1e-13, 0.0, 0.0])
    for _ in isa_levels():
        leaf = table.clone().requires_grad_()
        out = ops.sdim_attention(
            torch.tensor([[0], [1]], dtype=torch.uint8), leaf, candidate_offsets=torch.tensor([0, 2])
        )
        assert not out.any()
        out.sum().backward()
        assert not leaf.grad.any()


def gradients(values, codes, offsets, query_codes, candidate_offsets, bits, normalize, table_of, attention_of):
    leaf = values.detach().clone().requires_grad_()
    table = table_of(codes, leaf, offsets, bits=bits)
    out = attention_of(query_codes, table, candidate_offsets=candidate_offsets, normalize=normalize)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (grad,) = torch.autograd.grad(out, leaf, weight)
    return out.detach(), grad


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_gradients(normalize, dtype, isa_levels, poisoned_empty):
    """As near to float64 as plain torch in float32 is, within a factor for the order of its sums."""
    codes, values, offsets, query_codes, rows = problem([70, 0, 1, 33], [3, 2, 1, 40], 9, 3, 37, dtype=dtype)
    arguments = (codes, offsets, query_codes, rows, 3, normalize)
    reference = (ops.sdim_table.reference, ops.sdim_attention.reference)
    _, exact = gradients(values.double(), *arguments, *reference)
    _, plain = gradients(values.float(), *arguments, *reference)
    answers = []
    for _ in isa_levels():
        out, grad = gradients(values, *arguments, ops.sdim_table, ops.sdim_attention)
        assert grad.dtype == dtype
        error = (grad.double() - exact).norm()
        rounding = 2.0**-8 * exact.norm() if dtype == torch.bfloat16 else 0
        assert error <= 8 * (plain - exact).norm() + 8 * UNIT[dtype] * exact.norm() + rounding
        answers.append((out, grad))
    assert all(torch.equal(a, b) for answer in answers for a, b in zip(answer, answers[0], strict=True))


def test_bfloat16_rounds_once(isa_levels):
    """Sums of bfloat16 values are float32 ones; gradients are rounded to nearest, ties to even."""
    codes, values, offsets, query_codes, rows = problem([300], [5], 3, 2, 20, dtype=torch.bfloat16)
    for _ in isa_levels():
        table = ops.sdim_table(codes, values, offsets, bits=2)
        assert torch.equal(table, ops.sdim_table(codes, values.float(), offsets, bits=2))
        out = ops.sdim_attention(query_codes, table.bfloat16(), candidate_offsets=rows)
        wide = ops.sdim_attention(query_codes, table.bfloat16().float(), candidate_offsets=rows)
        assert torch.equal(out, wide.bfloat16())
        grad = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
        (narrow,) = torch.autograd.grad(
            ops.sdim_table(codes, leaf := values.clone().requires_grad_(), offsets, bits=2), leaf, grad
        )
        (full,) = torch.autograd.grad(
            ops.sdim_table(codes, leaf := values.float().requires_grad_(), offsets, bits=2), leaf, grad
        )
        assert torch.equal(narrow, full.bfloat16())


def test_opcheck(opcheck):
    for name in ("sdim_table", "sdim_attention", "sdim_history_attention"):
        opcheck(REGISTRY[name])
        opcheck(REGISTRY[f"{name}_backward"])


def test_compiles_in_one_graph():
    codes, values, offsets, query_codes, rows = problem([4, 0, 9], [2, 1, 1], 3, 2, 5)

    def both(values):
        table = ops.sdim_table(codes, values, offsets, bits=2)
        return ops.sdim_attention(query_codes, table, candidate_offsets=rows)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), both(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_continued_table_equals_one_built_anew(dtype, isa_levels):
    lengths, later = [5, 0, 40], [3, 2, 0]
    codes, values, offsets, *_ = problem(lengths, None, 4, 3, 21, dtype=dtype)
    new_codes, new_values, new_offsets, *_ = problem(later, None, 4, 3, 21, seed=9, dtype=dtype)

    def joined(old, new):
        parts = [[old[offsets[b] : offsets[b + 1]], new[new_offsets[b] : new_offsets[b + 1]]] for b in range(3)]
        return torch.cat([x for part in parts for x in part])

    whole = ops.sdim_table(joined(codes, new_codes), joined(values, new_values), offsets + new_offsets, bits=3)
    for _ in isa_levels():
        table = ops.sdim_table(codes, values, offsets, bits=3)
        kept = table.clone()
        assert torch.equal(ops.sdim_append(table, new_codes, new_values, new_offsets), whole)
        assert torch.equal(table, kept)
    reference = ops.sdim_append.reference(table, new_codes, new_values, new_offsets)
    torch.testing.assert_close(reference, whole, rtol=1e-5, atol=1e-5)


def test_threads_change_no_bit():
    # One user with most of the events and candidates: its tables are cut among the threads.
    problem_of = problem([3000, 5, 0, 300], [700, 1, 2, 3], 9, 3, 20)
    codes, values, offsets, query_codes, rows = problem_of
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(
                gradients(values, codes, offsets, query_codes, rows, 3, True, ops.sdim_table, ops.sdim_attention)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for answer in answers for a, b in zip(answer, answers[0], strict=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_answer_knows_no_batch_mates(normalize, isa_levels):
    codes, values, offsets, query_codes, rows = problem([23, 40, 7], [2, 300, 1], 5, 3, 17)
    users = torch.arange(3).repeat_interleave(rows.diff())
    for _ in isa_levels():
        table = ops.sdim_table(codes, values, offsets, bits=3)
        together = ops.sdim_attention(query_codes, table, candidate_offsets=rows, normalize=normalize)
        for user in range(3):
            own = slice(int(offsets[user]), int(offsets[user + 1]))
            alone = ops.sdim_table(codes[own], values[own], offsets_of([own.stop - own.start]), bits=3)
            assert torch.equal(alone[0], table[user])
        # Also where the number of candidates decides how norms are found.
        one_each = ops.sdim_attention(query_codes, table[users], normalize=normalize)
        assert torch.equal(one_each, together)


def test_order_of_a_history_is_rounding():
    codes, values, offsets, *_ = problem([500], None, 6, 2, 12)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    plain = ops.sdim_table(codes, values, offsets, bits=2)
    mixed = ops.sdim_table(codes[order], values[order], offsets, bits=2)
    size = ops.sdim_table.reference(codes, values.double().abs(), offsets, bits=2)
    assert torch.all((plain - mixed).abs() <= 2 * 500 * UNIT[torch.float32] * size)
    assert not torch.equal(plain, mixed)
    # Whole numbers have no rounding: there the order changes nothing at all.
    whole = (values * 8).round()
    assert torch.equal(
        ops.sdim_table(codes, whole, offsets, bits=2), ops.sdim_table(codes[order], whole[order], offsets, bits=2)
    )


def test_padded_and_strided_equal_jagged(isa_levels, poisoned_empty):
    lengths = [3, 0, 7, 5]
    codes, values, offsets, *_ = problem(lengths, None, 4, 3, 10)
    store = torch.full((4, 9, 30), math.nan)
    code_store = torch.full((4, 9, 6), 255, dtype=torch.uint8)  # padding that is out of range is never read
    for b, length in enumerate(lengths):
        store[b, :length, 10:20] = values[offsets[b] : offsets[b + 1]]
        code_store[b, :length, 1:5] = codes[offsets[b] : offsets[b + 1]]
    grad = torch.randn(4, 4, 8, 10, generator=torch.Generator().manual_seed(3))
    for _ in isa_levels():
        jagged_leaf = values.clone().requires_grad_()
        jagged = ops.sdim_table(codes, jagged_leaf, offsets, bits=3)
        (jagged_grad,) = torch.autograd.grad(jagged, jagged_leaf, grad)
        for columns in (7, 9):
            padded_leaf = store[:, :columns, 10:20].detach().requires_grad_()
            for some_codes in (code_store[:, :columns, 1:5], code_store[:, :columns, 1:5].contiguous()):
                padded = ops.sdim_table(some_codes, padded_leaf, torch.tensor(lengths), bits=3)
                assert torch.equal(padded, jagged)
                (padded_grad,) = torch.autograd.grad(padded, padded_leaf, grad)
                for b, length in enumerate(lengths):
                    assert torch.equal(padded_grad[b, :length], jagged_grad[offsets[b] : offsets[b + 1]])
                    assert not padded_grad[b, length:].any()


def test_strided_rows_are_read_in_place():
    codes, values, offsets, query_codes, rows = problem([8, 6], [3, 2], 4, 3, 10)
    table = ops.sdim_table(codes, values, offsets, bits=3)
    wide_values, wide_codes = torch.full((14, 25), math.nan), torch.full((14, 9), 255, dtype=torch.uint8)
    wide_values[:, 5:15], wide_codes[:, 2:6] = values, codes
    assert torch.equal(ops.sdim_table(wide_codes[:, 2:6], wide_values[:, 5:15], offsets, bits=3), table)
    wide_query = torch.full((5, 7), 255, dtype=torch.uint8)
    wide_query[:, 3:] = query_codes
    assert torch.equal(
        ops.sdim_attention(wide_query[:, 3:], table, candidate_offsets=rows),
        ops.sdim_attention(query_codes, table, candidate_offsets=rows),
    )


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows 2^31 bytes apart, in memory that is mostly never touched."""
    step = 2**31 + 8
    try:
        store = torch.from_numpy(np.zeros(step * len(rows), dtype=np.uint8))
    except MemoryError:
        pytest.skip("this machine does not lend so much address space")
    spread = store.as_strided(rows.shape, (step, 1))
    spread.copy_(rows)
    return spread


def test_addresses_beyond_32_bits():
    codes, values, offsets, query_codes, _ = problem([1, 3], None, 4, 3, 10)
    table = ops.sdim_table(codes, values, offsets, bits=3)
    assert torch.equal(ops.sdim_table(far_apart(codes), values, offsets, bits=3), table)
    assert torch.equal(ops.sdim_attention(far_apart(query_codes), table), ops.sdim_attention(query_codes, table))


def at_once(values, codes, offsets, query_codes, candidate_offsets, bits, normalize):
    leaf = values.detach().clone().requires_grad_()
    out = ops.sdim_history_attention(
        query_codes, codes, leaf, offsets, bits=bits, candidate_offsets=candidate_offsets, normalize=normalize
    )
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (grad,) = torch.autograd.grad(out, leaf, weight)
    return out.detach(), grad


@given(
    users=st.lists(
        st.tuples(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 40)), st.sampled_from([0, 1, 1, 2, 9, 30])),
        min_size=1,
        max_size=5,
    ),
    shared=st.booleans(),
    tables=st.sampled_from([1, 3, 15, 16, 17, 33]),
    bits=st.integers(1, 8),
    width=widths,
    normalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_at_once_equals_table_and_attention(
    users, shared, tables, bits, width, normalize, dtype, isa_levels, poisoned_empty
):
    lengths = [length for length, _ in users]
    candidates = [n for _, n in users] if shared else None
    codes, values, offsets, query_codes, rows = problem(lengths, candidates, tables, bits, width, dtype=dtype)
    arguments = (values, codes, offsets, query_codes, rows, bits, normalize)
    wanted = gradients(*arguments, ops.sdim_table, ops.sdim_attention)
    for _ in isa_levels():
        answer = at_once(*arguments)
        assert answer[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(answer, wanted, strict=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_at_once_gradcheck(normalize):
    codes, values, offsets, query_codes, rows = problem([5, 0, 9, 1, 7], [2, 1, 1, 0, 1], 3, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: ops.sdim_history_attention(
            query_codes, codes, x, offsets, bits=2, candidate_offsets=rows, normalize=normalize
        ),
        [values.requires_grad_()],
    )


def test_at_once_padded_threads_and_large_tables(poisoned_empty):
    lengths = [300, 0, 2, 40]
    for candidates, bits, width in (([3, 1, 1, 1], 3, 10), ([2, 1, 1, 2], 8, 130)):
        codes, values, offsets, query_codes, rows = problem(lengths, candidates, 9, bits, width)
        wanted = gradients(values, codes, offsets, query_codes, rows, bits, True, ops.sdim_table, ops.sdim_attention)
        store = torch.full((4, 310, width + 3), math.nan)
        code_store = torch.full((4, 310, 9), 255, dtype=torch.uint8)
        for b, length in enumerate(lengths):
            store[b, :length, 2:-1] = values[offsets[b] : offsets[b + 1]]
            code_store[b, :length] = codes[offsets[b] : offsets[b + 1]]
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 5):  # with more than one, the first user's tables are cut among them
                torch.set_num_threads(threads)
                answer = at_once(values, codes, offsets, query_codes, rows, bits, True)
                assert all(torch.equal(a, b) for a, b in zip(answer, wanted, strict=True))
                padded = (store[:, :, 2:-1], code_store, torch.tensor(lengths))
                out, grad = at_once(*padded, query_codes, rows, bits, True)
                assert torch.equal(out, wanted[0])
                for b, length in enumerate(lengths):
                    assert torch.equal(grad[b, :length], wanted[1][offsets[b] : offsets[b + 1]])
                    assert not grad[b, length:].any()
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("candidates", [[1, 1], [2, 3]])
def test_at_once_names_wrong_codes(candidates, threads, isa_levels):
    codes, values, offsets, query_codes, rows = problem([4, 6], candidates, 3, 2, 20)
    wrong, wrong_query = codes.clone(), query_codes.clone()
    wrong[3, 1], wrong[8, 0] = 4, 255
    wrong_query[-1, 2] = 7
    last = len(query_codes) - 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in isa_levels():
            with pytest.raises(IndexError, match=r"sdim_history_attention: codes\[3, 1\] = 4 is outside \[0, 4\)"):
                at_once(values, wrong, offsets, query_codes, rows, 2, True)
            sentence = rf"sdim_history_attention: query_codes\[{last}, 2\] = 7 is outside \[0, 4\)"
            with pytest.raises(IndexError, match=sentence):
                at_once(values, codes, offsets, wrong_query, rows, 2, True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"query_codes": torch.zeros(2, 4, dtype=torch.uint8)}, ValueError, r"query_codes must have shape \[Nc, 3\]"),
        ({"query_codes": torch.zeros(3, 3, dtype=torch.uint8)}, ValueError, r"one row a user \(2\)"),
        ({"candidate_offsets": torch.tensor([0, 1, 3])}, ValueError, r"candidate_offsets\[-1\] must be 2"),
        ({"offsets": torch.tensor([0, 2, 6])}, ValueError, r"sdim_history_attention: offsets\[-1\] must be 5"),
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
    ],
)
def test_at_once_rejects_bad_input(change, error, sentence):
    named = {
        "query_codes": torch.zeros(2, 3, dtype=torch.uint8),
        "codes": torch.zeros(5, 3, dtype=torch.uint8),
        "values": torch.zeros(5, 4),
        "offsets": torch.tensor([0, 2, 5]),
        "bits": 3,
        **change,
    }
    with pytest.raises(error, match=sentence):
        ops.sdim_history_attention(**named)


def test_expected_collisions_are_those_of_the_angle():
    """Each event weighs in as often as key and candidate collide: (1 - angle / pi)^bits, by a z-test per angle."""
    tables, bits, dim = 20_000, 3, 6
    projections = torch.randn(dim, tables, bits, generator=torch.Generator().manual_seed(11))
    for angle in (0.3, 1.0, math.pi / 2, 2.5):
        query, key = torch.zeros(1, dim), torch.zeros(1, dim)
        query[0, 0] = 2.0
        key[0, :2] = 0.7 * torch.tensor([math.cos(angle), math.sin(angle)])
        table = ops.sdim_table(ops.simhash(key, projections), torch.ones(1, 1), torch.tensor([0, 1]), bits=bits)
        weight = ops.sdim_attention(ops.simhash(query, projections), table, normalize=False).item()
        p = (1 - angle / math.pi) ** bits
        z = (weight - p) / math.sqrt(p * (1 - p) / tables)
        assert abs(z) < 4.5


def test_large_tables_are_cut_into_passes():
    """256 buckets of 20 hashes, 130 wide: over ten megabytes a user."""
    codes, values, offsets, query_codes, rows = problem([90, 30], [3, 2], 20, 8, 130)
    table = ops.sdim_table(codes, values, offsets, bits=8)
    exact = ops.sdim_table.reference(codes, values.double(), offsets, bits=8)
    torch.testing.assert_close(table.double(), exact, rtol=1e-5, atol=1e-5)
    out = ops.sdim_attention(query_codes, table, candidate_offsets=rows)
    torch.testing.assert_close(
        out.double(), collision_mask(codes, values, offsets, query_codes, rows), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"bits": 0}, ValueError, "sdim_table: bits must be an integer from 1 to 8, got 0"),
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
        ({"codes": torch.zeros(5, 2)}, TypeError, "codes must be uint8, got float32"),
        ({"codes": torch.zeros(4, 2, dtype=torch.uint8)}, ValueError, r"codes must have shape \[5, M\], got \[4, 2\]"),
        ({"codes": torch.zeros(5, 0, dtype=torch.uint8)}, ValueError, r"codes.shape\[-1\] must be at least 1, got 0"),
        ({"values": torch.zeros(5)}, ValueError, r"values must have shape \[T, Dv\], got \[5\]"),
        ({"values": torch.zeros(5, 3).half()}, TypeError, "values must be float32 or bfloat16 or float64, got float16"),
        ({"offsets": torch.tensor([0, 2, 6])}, ValueError, r"offsets\[-1\] must be 5"),
        ({"offsets": torch.tensor([0, 3, 2, 5])}, ValueError, r"offsets\[2\] = 2 is below offsets\[1\] = 3"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, ValueError, "offsets must have one entry more"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    codes = torch.zeros(5, 2, dtype=torch.uint8)
    named = {"codes": codes, "values": torch.zeros(5, 3), "offsets": torch.tensor([0, 2, 5]), "bits": 3, **change}
    with pytest.raises(error, match=sentence):
        ops.sdim_table(**named)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"table": torch.zeros(2, 3, 6, 4)}, ValueError, "table must have 2, 4, ... or 256 buckets .* got 6"),
        (
            {"table": torch.zeros(2, 3, 4)},
            ValueError,
            r"table must have shape \[B, M, 2\*\*bits, Dv\], got \[2, 3, 4\]",
        ),
        ({"table": torch.zeros(2, 3, 8, 4).half()}, TypeError, "table must be float32 or bfloat16 or float64"),
        ({"query_codes": torch.zeros(2, 4, dtype=torch.uint8)}, ValueError, r"query_codes must have shape \[Nc, 3\]"),
        ({"query_codes": torch.zeros(3, 3, dtype=torch.uint8)}, ValueError, r"one row a user \(2\)"),
        ({"candidate_offsets": torch.tensor([0, 1, 3])}, ValueError, r"candidate_offsets\[-1\] must be 2"),
        (
            {"candidate_offsets": torch.tensor([0, 2])},
            ValueError,
            r"candidate_offsets must have shape \[3\], got \[2\]",
        ),
    ],
)
def test_attention_rejects_bad_input(change, error, sentence):
    named = {"query_codes": torch.zeros(2, 3, dtype=torch.uint8), "table": torch.zeros(2, 3, 8, 4), **change}
    with pytest.raises(error, match=sentence):
        ops.sdim_attention(**named)


def test_append_rejects_bad_input():
    codes, values, offsets = torch.zeros(5, 2, dtype=torch.uint8), torch.zeros(5, 3), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"sdim_append: table must have shape \[1, 2, 8, 3\], got \[2, 2, 8, 3\]"):
        ops.sdim_append(torch.zeros(2, 2, 8, 3), codes, values, offsets)
    with pytest.raises(TypeError, match="sdim_append: table must be float32, got bfloat16"):
        ops.sdim_append(torch.zeros(1, 2, 8, 3).bfloat16(), codes, values.bfloat16(), offsets)


@pytest.mark.parametrize("width", [3, 40])
def test_codes_out_of_range_are_named(width, isa_levels):
    codes, values, offsets, query_codes, rows = problem([4, 6], [2, 3], 3, 2, width)
    table = ops.sdim_table(codes, values, offsets, bits=2)
    codes[3, 1], codes[8, 0] = 4, 255
    query_codes[4, 2] = 7
    for _ in isa_levels():
        with pytest.raises(IndexError, match=r"sdim_table: codes\[3, 1\] = 4 is outside \[0, 4\)"):
            ops.sdim_table(codes, values, offsets, bits=2)
        with pytest.raises(IndexError, match=r"sdim_append: codes\[3, 1\] = 4 is outside \[0, 4\)"):
            ops.sdim_append(table, codes, values, offsets)
        with pytest.raises(IndexError, match=r"sdim_attention: query_codes\[4, 2\] = 7 is outside \[0, 4\)"):
            ops.sdim_attention(query_codes, table, candidate_offsets=rows)
        padded = codes[:8].view(2, 4, 3).clone()
        padded[1, 2, 0] = 9
        with pytest.raises(IndexError, match=r"sdim_table: codes\[1, 2, 0\] = 9 is outside \[0, 4\)"):
            ops.sdim_table(padded, values[:8].view(2, 4, width), torch.tensor([2, 3]), bits=2)
