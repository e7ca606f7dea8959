"""The five tests of an op, and what a sequence owes to nobody but itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY

EPS = torch.finfo(torch.float32).eps


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def problem(lengths, heads, dim, value_dim=None, seed=0, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)

    def random(width):
        return torch.randn(rows, heads, width, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = random(dim), random(dim), random(dim if value_dim is None else value_dim)
    return spread * q, k, v, offsets_of(lengths)


def explicit(q, k, v, offsets, *, causal, scale=None):
    """Sequence by sequence, head by head, in the dtype of the arguments."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(v.shape, dtype=q.dtype)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for head in range(q.shape[1]):
            score = scale * q[first:last, head] @ k[first:last, head].T
            if causal:
                score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
            out[first:last, head] = torch.softmax(score, -1) @ v[first:last, head]
    return out


def error_bound(q, k, v, offsets, *, causal, scale=None):
    """What rounding can do to `out`: with E the error of a score, n keys and scores that span R, each weight is off by
    a factor of 2 E + (3 n + 3 R + 16) eps; the sum over the values is in that n."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bound = torch.zeros(v.shape, dtype=torch.float64)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        n = last - first
        if n == 0:
            continue
        for head in range(q.shape[1]):
            left, right = scale * q[first:last, head], k[first:last, head].T
            size = (left.abs() @ right.abs()).amax(-1, keepdim=True)
            score = left @ right
            span = score.amax(-1, keepdim=True) - score.amin(-1, keepdim=True)
            factor = 2 * (q.shape[-1] + 2) * EPS * size + (3 * n + 3 * span + 16) * EPS
            if causal:
                score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
            bound[first:last, head] = factor * (torch.softmax(score, -1) @ v[first:last, head].abs())
    return bound


def padded_form(x, offsets, length, fill=float("nan")):
    store = x.new_full((offsets.numel() - 1, length, *x.shape[1:]), fill)
    for b in range(offsets.numel() - 1):
        rows = x[offsets[b] : offsets[b + 1]]
        store[b, : len(rows)] = rows
    return store


lengths_drawn = st.lists(
    st.one_of(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 129]), st.integers(0, 150)), max_size=5
)
widths = st.one_of(st.sampled_from([1, 15, 16, 17, 33, 64]), st.integers(1, 70))


@given(
    lengths=lengths_drawn,
    heads=st.integers(1, 3),
    dim=widths,
    value_dim=widths,
    causal=st.booleans(),
    scale=st.sampled_from([None, 1.0, -0.3]),
    spread=st.sampled_from([1.0, 6.0]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60)
def test_matches_reference(lengths, heads, dim, value_dim, causal, scale, spread, index, isa_levels, poisoned_empty):
    q, k, v, offsets = problem(lengths, heads, dim, value_dim, spread=spread)
    options = {"causal": causal, "scale": scale}
    wanted = explicit(q.double(), k.double(), v.double(), offsets, **options)
    torch.testing.assert_close(
        ops.sequence_attention.reference(q.double(), k.double(), v.double(), offsets, **options), wanted
    )
    bound = error_bound(q, k, v, offsets, **options)
    answers = []
    for _ in isa_levels():
        answer = ops.sequence_attention(q, k, v, offsets.to(index), **options)
        assert answer.shape == wanted.shape
        assert torch.all((answer.double() - wanted).abs() <= bound)
        answers.append(answer)
    # The two forms with FMA agree bit by bit; the scalar one lies within the bound like they.
    assert all(torch.equal(answer, answers[1]) for answer in answers[2:])


def test_known_values(isa_levels):
    # Scores q k = 0, ln 3, ln 6 for q = 1: weights 1 : 3 : 6.
    q = torch.tensor([5.0, 1.0, 1.0]).view(3, 1, 1)
    k = torch.tensor([0.0, math.log(3), math.log(6)]).view(3, 1, 1)
    v = torch.tensor([[10.0, 1.0], [20.0, 0.0], [30.0, -1.0]]).view(3, 1, 2)
    for _ in isa_levels():
        causal = ops.sequence_attention(q, k, v, torch.tensor([0, 3]), causal=True, scale=1.0).flatten().tolist()
        # (10 + 3 * 20) / 4 and 1 / 4; (10 + 60 + 180) / 10 and (1 - 6) / 10
        assert causal == pytest.approx([10.0, 1.0, 17.5, 0.25, 25.0, -0.5], rel=1e-6)
        both = ops.sequence_attention(q, k, v, torch.tensor([0, 3]), causal=False, scale=1.0).flatten().tolist()
        # 1 : 3^5 : 6^5 for q = 5: (10 + 20 * 243 + 30 * 7776) / 8020 and (1 - 7776) / 8020
        assert both == pytest.approx([29.6945137, -0.9694514, 25.0, -0.5, 25.0, -0.5], rel=1e-6)
        # One key: its value, to the last bit, whatever the score.
        alone = ops.sequence_attention(1e20 * q, k + 1e10, v, torch.tensor([0, 1, 2, 3]), causal=False)
        assert torch.equal(alone, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(causal, dropout):
    q, k, v, offsets = problem([3, 0, 22, 1], 2, 3, 2, 1, torch.float64)

    def call(q, k, v):
        return ops.sequence_attention(q, k, v, offsets, causal=causal, dropout=dropout, seed=3)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (q, k, v)], fast_mode=True)


def test_gradcheck_every_entry():
    """Once without fast mode, padded, with a scale of its own."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, 4, 2, width, generator=generator, dtype=torch.float64, requires_grad=True) for width in (3, 3, 2)
    )

    def call(q, k, v):
        return ops.sequence_attention(q, k, v, torch.tensor([3, 2]), causal=True, scale=0.7)

    assert torch.autograd.gradcheck(call, (q, k, v))


def gradients(q, k, v, offsets, form=ops.sequence_attention, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = form(*leaves, offsets, **options)
    coefficients = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, coefficients)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [(33, 17), (16, 16), (5, 3), (64, 130)])
def test_float32_gradients(causal, widths, isa_levels, poisoned_empty):
    """As near to float64 as plain torch in float32 is, within a factor for the order of its sums."""
    q, k, v, offsets = problem([170, 0, 1, 33, 64], 2, *widths)
    exact = gradients(q.double(), k.double(), v.double(), offsets, form=explicit, causal=causal)
    plain = gradients(q, k, v, offsets, form=explicit, causal=causal)
    answers = []
    for _ in isa_levels():
        answers.append(gradients(q, k, v, offsets, causal=causal))
        for have, torch_has, want in zip(answers[-1], plain, exact, strict=True):
            assert (have - want).norm() <= 4 * (torch_has - want).norm() + 4 * EPS * want.norm()
    for other in answers[2:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[1], other, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_float32_inside(causal, isa_levels, poisoned_empty):
    """The answer is that of the widened inputs, rounded once; gradients too, but for the rounded answer they read."""
    q, k, v, offsets = problem([130, 1, 0, 40], 2, 24, 9, dtype=torch.bfloat16)
    wide = (q.float(), k.float(), v.float(), offsets)
    for _ in isa_levels():
        answers, wanted = gradients(q, k, v, offsets, causal=causal), gradients(*wide, causal=causal)
        assert answers[0].dtype == torch.bfloat16
        assert torch.equal(answers[0], wanted[0].bfloat16())
        for have, want in zip(answers[1:], wanted[1:], strict=True):
            assert (have - want).norm() <= 2**-7 * want.norm()


def test_opcheck(opcheck):
    opcheck(REGISTRY["sequence_attention"])
    opcheck(REGISTRY["sequence_attention_backward"])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_in_one_graph(dropout):
    q, k, v, offsets = problem([4, 0, 20], 2, 6)
    options = {"causal": True, "dropout": dropout}

    def train(q, k, v, seed):
        return ops.sequence_attention(q, k, v, offsets, seed=seed, **options).square().sum()

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    answers = []
    for form in (train, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        form(*leaves, torch.tensor(9)).backward()
        answers.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[700, 3, 0, 40], [513], [90, 17, 64, 1, 33] * 9], ids=["one-long", "one", "many"])
def test_threads_change_no_bit(causal, lengths, isa_levels):
    """Also where one head is more than a thread's share, and backward cuts it."""
    q, k, v, offsets = problem(lengths, 1, 20, 11, 3)
    before = torch.get_num_threads()
    for _ in isa_levels():
        try:
            torch.set_num_threads(1)
            one = gradients(q, k, v, offsets, causal=causal, dropout=0.1, seed=1)
            torch.set_num_threads(2)
            two = gradients(q, k, v, offsets, causal=causal, dropout=0.1, seed=1)
            torch.set_num_threads(5)
            five = gradients(q, k, v, offsets, causal=causal, dropout=0.1, seed=1)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[300], [70, 5]])
@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_nobody_needs_are_left_out(causal, lengths, threads):
    q, k, v, offsets = problem(lengths, 1, 20, 11)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        every = gradients(q, k, v, offsets, causal=causal)
        for needs in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
            leaves = [x.clone().requires_grad_(need) for x, need in zip((q, k, v), needs, strict=True)]
            out = ops.sequence_attention(*leaves, offsets, causal=causal)
            out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).float())
            for x, need, wanted in zip(leaves, needs, every[1:], strict=True):
                assert torch.equal(x.grad, wanted) if need else x.grad is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("causal", [False, True])
def test_answer_knows_no_batch_mates(causal, isa_levels):
    lengths = [23, 140, 7]
    q, k, v, offsets = problem(lengths, 2, 17, 9)
    for _ in isa_levels():
        together = gradients(q, k, v, offsets, causal=causal)
        for b, length in enumerate(lengths):
            rows = slice(int(offsets[b]), int(offsets[b + 1]))
            alone = ops.sequence_attention(q[rows], k[rows], v[rows], offsets_of([length]), causal=causal)
            assert torch.equal(alone, together[0][rows])


def test_later_events_change_no_earlier_answer(isa_levels):
    q, k, v, offsets = problem([150], 2, 17, 9)
    for _ in isa_levels():
        whole = ops.sequence_attention(q, k, v, offsets, causal=True)
        for length in (1, 15, 16, 17, 64, 65, 100, 149):
            cut = ops.sequence_attention(q[:length], k[:length], v[:length], offsets_of([length]), causal=True)
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[length:] *= -30
            other = ops.sequence_attention(*changed, offsets, causal=True)
            assert torch.equal(whole[:length], other[:length])
            # The shorter sequence may be cut in other blocks of queries, never in other blocks of keys.
            assert torch.equal(whole[:length], cut)


def test_earlier_answers_send_no_gradient_to_later_events():
    q, k, v, offsets = problem([90], 1, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ops.sequence_attention(*leaves, offsets, causal=True)[:50].square().sum().backward()
    for x in leaves:
        assert x.grad[:50].abs().sum() > 0
        assert not x.grad[50:].any()


def test_order_of_a_sequence_is_rounding():
    q, k, v, offsets = problem([150], 2, 12, 5)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    plain = ops.sequence_attention(q, k, v, offsets, causal=False)
    mixed = ops.sequence_attention(q[order], k[order], v[order], offsets, causal=False)
    assert torch.all((plain[order] - mixed).abs() <= 2 * error_bound(q, k, v, offsets, causal=False)[order])


@pytest.mark.parametrize("causal", [False, True])
def test_padded_equals_jagged(causal, poisoned_empty):
    lengths = [3, 0, 70, 65]
    q, k, v, offsets = problem(lengths, 2, 6, 4)
    jagged = gradients(q, k, v, offsets, causal=causal, dropout=0.2, seed=4)
    # A view of the first columns: not contiguous, and its padding is never read.
    stores = [padded_form(x, offsets, 80) for x in (q, k, v)]
    for columns in (70, 80):
        views = [store[:, :columns].detach().requires_grad_() for store in stores]
        out = ops.sequence_attention(*views, torch.tensor(lengths), causal=causal, dropout=0.2, seed=4)
        coefficients = torch.linspace(-1, 1, jagged[0].numel(), dtype=torch.float64).view_as(jagged[0]).float()
        out.backward(padded_form(coefficients, offsets, columns))
        for have, want in zip((out, *(x.grad for x in views)), jagged, strict=True):
            assert torch.equal(have, padded_form(want, offsets, columns, 0.0))


def test_views_of_a_fused_buffer_are_read_in_place(monkeypatch):
    q, k, v, offsets = problem([40, 75], 3, 8)
    wanted = gradients(q, k, v, offsets, causal=True)
    fused = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
    views = [x.unflatten(1, (3, 8)) for x in fused.split(24, 1)]
    assert not any(x.is_contiguous() for x in views)
    # Heads outermost in memory, too.
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    copies = []
    contiguous = torch.Tensor.contiguous
    for inputs in (views, swapped):
        monkeypatch.setattr(
            torch.Tensor, "contiguous", lambda x: contiguous(x) if x.dim() == 1 else copies.append(x) or contiguous(x)
        )
        out = ops.sequence_attention(*inputs, offsets, causal=True)
        monkeypatch.undo()
        assert torch.equal(out, wanted[0])
    assert not copies
    leaf = fused.clone().requires_grad_()
    out = ops.sequence_attention(*(x.unflatten(1, (3, 8)) for x in leaf.split(24, 1)), offsets, causal=True)
    coefficients = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).float()
    (gradient,) = torch.autograd.grad(out, leaf, coefficients)
    assert torch.equal(gradient, torch.cat([x.flatten(1) for x in wanted[1:]], 1))
    # Columns side by side: copied, not misread.
    turned = q.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.sequence_attention(turned, k, v, offsets, causal=True), wanted[0])


@pytest.mark.parametrize("kind", ["expanded", "apart", "every other"])
def test_any_strides_of_the_gradient(kind):
    q, k, v, offsets = problem([30, 3], 2, 8, 5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ops.sequence_attention(*leaves, offsets, causal=False)
    values = torch.linspace(-1, 1, out.numel()).view_as(out)
    coefficients = {
        "expanded": torch.tensor(0.5).expand(out.shape),
        "apart": values.transpose(0, 2).contiguous().transpose(0, 2),
        "every other": torch.stack([values, values * float("nan")], 1).flatten(0, 1)[::2],
    }[kind]
    have = torch.autograd.grad(out, leaves, coefficients, retain_graph=True)
    want = torch.autograd.grad(out, leaves, coefficients.clone(memory_format=torch.contiguous_format))
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_scores_beyond_any_exponential(isa_levels):
    """Scores up to 1e36 in size: the largest takes all, and nothing overflows, forward or backward."""
    q, k, v, offsets = problem([100, 20], 1, 8, 4)
    for _ in isa_levels():
        for causal in (False, True):
            out, *grads = gradients(1e18 * q, 1e17 * k, v, offsets, causal=causal)
            assert torch.equal(out, explicit(1e18 * q.double(), 1e17 * k.double(), v.double(), offsets, causal=causal))
            assert all(x.isfinite().all() for x in grads)


def test_long_sequence_far_from_its_maximum(isa_levels):
    """The maximum rises with every block: what was gathered before is scaled down again and again."""
    q, k, v, offsets = problem([400], 1, 4)
    k = k * 0.1 + torch.linspace(0, 12, 400).view(-1, 1, 1)
    q = q.abs()
    for _ in isa_levels():
        for causal in (False, True):
            wanted = explicit(q.double(), k.double(), v.double(), offsets, causal=causal)
            answer = ops.sequence_attention(q, k, v, offsets, causal=causal)
            assert torch.all((answer - wanted).abs() <= error_bound(q, k, v, offsets, causal=causal))


def test_dropout_drops_what_it_should(isa_levels):
    lengths, heads, rate = [90, 0, 300], 2, 0.25
    q, k, _, offsets = problem(lengths, heads, 4)
    rows = sum(lengths)
    # Values that name their key: what comes back are the weights themselves.
    v = torch.zeros(rows, heads, 300)
    for b in range(3):
        v[offsets[b] : offsets[b + 1], :, : lengths[b]] = torch.eye(lengths[b]).unsqueeze(1)
    whole = ops.sequence_attention(q, k, v, offsets, causal=False)
    for _ in isa_levels():
        dropped = ops.sequence_attention(q, k, v, offsets, causal=False, dropout=rate, seed=7)
        there = (v.sum(-1, keepdim=True) > 0) & (whole > 0)
        share = ((dropped == 0) & there).sum() / there.sum()
        # Six deviations of a binomial share.
        assert abs(share - rate) < 6 * (rate * (1 - rate) / there.sum()) ** 0.5
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], whole[kept] / (1 - rate), rtol=1e-4, atol=0)
        again = ops.sequence_attention(q, k, v, offsets, causal=False, dropout=rate, seed=torch.tensor(7))
        assert torch.equal(dropped, again)
        other = ops.sequence_attention(q, k, v, offsets, causal=False, dropout=rate, seed=8)
        assert not torch.equal(dropped == 0, other == 0)
        reference = ops.sequence_attention.reference(q, k, v, offsets, causal=False, dropout=rate, seed=7)
        assert torch.equal(reference == 0, dropped == 0)
    # Heads, sequences, queries and keys draw apart.
    first, second = (dropped[:90, head, :90] == 0 for head in (0, 1))
    long = dropped[90:180, 0, :90] == 0
    for a, b in ((first, second), (first, long), (first[1:], first[:-1]), (first[:, 8:], first[:, :-8])):
        assert abs((a == b).float().mean() - (rate**2 + (1 - rate) ** 2)) < 6 * 0.5 / a.numel() ** 0.5


def test_memory_grows_with_the_length_alone():
    """Saved: the arguments, the answer and two numbers a row; scratch: a copy of one head and its blocks."""
    from recfast import _C

    q, k, v, offsets = problem([900], 2, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ops.sequence_attention(*(x.requires_grad_() for x in (q, k, v)), offsets, causal=True)
    assert 0 < sum(saved) <= 4 * q.numel() + 2 * 2 * 900 + offsets.numel()
    sizes = {"users": 1, "heads": 2, "dim": 16, "value_dim": 16}
    for backward in (False, True):
        one, two, three = (
            _C.sequence_attention_scratch(backward, longest=n, **sizes) for n in (10**6, 2 * 10**6, 3 * 10**6)
        )
        assert two - one == three - two <= 4 * 16 * 10**6 * _C.max_threads()


def test_rows_beyond_31_bits():
    """Two sequences 2^31 values apart; the memory between them is never touched, so it costs nothing."""
    apart = 2**31 + 40
    store = torch.from_numpy(np.empty(apart + 100, dtype=np.int16)).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(2, 20, 1, 4, generator=generator).bfloat16()
    far = store.as_strided((2, 20, 1, 4), (apart, 4, 4, 1))
    far.copy_(near)
    lengths = torch.tensor([20, 13])
    answers = []
    for x in (near, far):
        leaves = [x.detach().requires_grad_() for _ in range(3)]
        out = ops.sequence_attention(*leaves, lengths, causal=True)
        answers.append([out, *torch.autograd.grad(out, leaves, near)])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_pairs_beyond_31_bits():
    """More than 2^31 scores, dealt to two threads."""
    length = 66_000
    q, k, v, offsets = problem([length], 1, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        answer = ops.sequence_attention(q, k, v, offsets, causal=True)
    finally:
        torch.set_num_threads(before)
    for row in (0, 1, 40_000, length - 1):
        weight = torch.softmax(q[row, 0].double() * k[: row + 1, 0, 0].double(), 0)
        # Scores of one product below 20 in size: 2 E <= 120 eps, R <= 40.
        bound = (120 + 3 * (row + 1) + 3 * 40 + 16) * EPS * (weight @ v[: row + 1, 0].double().abs())
        assert (answer[row, 0] - weight @ v[: row + 1, 0].double()).abs() <= bound


def test_no_rows_at_all():
    none = torch.empty(0, 2, 4, requires_grad=True)
    out = ops.sequence_attention(none, none, none, torch.tensor([0, 0]), causal=True)
    assert out.shape == (0, 2, 4)
    out.sum().backward()
    assert ops.sequence_attention(none, none, none, torch.tensor([0]), causal=False).shape == (0, 2, 4)
    padded = torch.randn(2, 3, 2, 4)
    assert not ops.sequence_attention(padded, padded, padded, torch.tensor([0, 0]), causal=True).any()
    for shape in ((0, 3, 2, 4), (2, 0, 2, 4)):
        x = torch.empty(shape, requires_grad=True)
        out = ops.sequence_attention(x, x, x, torch.zeros(shape[0], dtype=torch.int32), causal=True)
        assert out.shape == shape
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_stays_where_it_belongs(dtype, isa_levels):
    """A query's NaN in its own answer; a key's in those of its sequence that see it."""
    clean = problem([20, 40, 5], 2, 6, dtype=dtype)
    offsets = clean[3]
    for _ in isa_levels():
        for causal in (False, True):
            wanted = ops.sequence_attention(*clean, causal=causal)
            q, k, v = (x.clone() for x in clean[:3])
            q[30, 1, 2] = torch.nan
            answer = ops.sequence_attention(q, k, v, offsets, causal=causal)
            assert answer[30, 1].isnan().all()
            answer[30, 1] = wanted[30, 1]
            assert torch.equal(answer, wanted)
            q, k, v = (x.clone() for x in clean[:3])
            k[30, 1, 2] = torch.nan
            answer = ops.sequence_attention(q, k, v, offsets, causal=causal)
            seen = slice(30 if causal else 20, 60)
            assert answer[seen, 1].isnan().all()
            answer[seen, 1] = wanted[seen, 1]
            assert torch.equal(answer, wanted)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"q": [1.0]}, TypeError, "sequence_attention: q must be a tensor, got list"),
        ({"q": torch.ones(5, 2, 3).half()}, TypeError, "q must be float32 or bfloat16 or float64, got float16"),
        ({"q": torch.ones(5, 3)}, ValueError, r"q must have shape \[T, H, D\], got \[5, 3\]"),
        ({"k": torch.ones(5, 2, 4)}, ValueError, r"k must have shape \[5, 2, 3\], got \[5, 2, 4\]"),
        ({"k": torch.ones(5, 2, 3).double()}, TypeError, "k must be float32, got float64"),
        ({"v": torch.ones(4, 2, 3)}, ValueError, r"v must have shape \[5, 2, Dv\], got \[4, 2, 3\]"),
        ({"v": torch.ones(5, 2, 0)}, ValueError, r"v.shape\[-1\] must be at least 1, got 0"),
        ({"offsets": torch.tensor([0, 7, 5])}, ValueError, r"offsets\[2\] = 5 is below offsets\[1\] = 7"),
        ({"offsets": torch.tensor([1, 2, 5])}, ValueError, r"offsets\[0\] must be 0, got 1"),
        ({"offsets": torch.tensor([0, 4])}, ValueError, r"offsets\[-1\] must be 5, the number of rows it cuts, got 4"),
        ({"offsets": torch.tensor([0.0, 2, 5])}, TypeError, "offsets must be int32 or int64, got float32"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must have one entry more"),
        (
            {name: torch.ones(2, 4, 2, 3) for name in "qkv"} | {"offsets": torch.tensor([4, 5])},
            IndexError,
            r"lengths\[1\] = 5 is outside \[0, 5\)",
        ),
        (
            {name: torch.ones(2, 4, 2, 3) for name in "qkv"} | {"offsets": torch.tensor([4, -1])},
            IndexError,
            r"lengths\[1\] = -1 is outside",
        ),
        ({name: torch.ones(2, 4, 2, 3) for name in "qkv"}, ValueError, r"lengths must have shape \[2\], got \[3\]"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"dropout": 1.0, "seed": 1}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": 0.5}, ValueError, "dropout needs a seed, got None"),
        ({"dropout": 0.5, "seed": -1}, ValueError, r"seed must lie in \[0, 2\*\*63\), got -1"),
        ({"dropout": 0.5, "seed": torch.tensor(1.0)}, TypeError, "seed must be int64, got float32"),
        (
            {"dropout": 0.5, "seed": torch.tensor(1, device="meta")},
            ValueError,
            "seed must be on cpu, where it is read, got meta",
        ),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    q, k, v, offsets = problem([2, 3], 2, 3)
    named = {"q": q, "k": k, "v": v, "offsets": offsets, "causal": True, **change}
    with pytest.raises(error, match=sentence):
        ops.sequence_attention(**named)
