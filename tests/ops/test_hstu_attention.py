"""The five tests of an op, the published mask pair by pair, buckets of time, and what a sequence owes to nobody."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY

EPS = torch.finfo(torch.float32).eps
BIASES = ["none", "shared", "own"]


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def problem(lengths, heads, dim, value_dim, max_length, position="none", time=None, seed=0, dtype=torch.float32):
    """`(q, k, v, offsets)` and the options; `time` is the number of buckets."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)

    def random(*size, dtype=dtype):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    parameter = torch.float32 if dtype == torch.bfloat16 else dtype
    q, k, v = random(rows, heads, dim), random(rows, heads, dim), random(rows, heads, value_dim)
    options = {"max_length": max_length}
    if position != "none":
        shape = (2 * max_length - 1,) if position == "shared" else (heads, 2 * max_length - 1)
        options["position_bias"] = random(*shape, dtype=parameter)
    if time is not None:
        options["time_bias"] = random(time + 1, dtype=parameter)
        gaps = torch.exp(torch.rand(rows, generator=generator) * 12).long()
        options["timestamps"] = gaps.cumsum(0)
    return (q, k, v, offsets_of(lengths)), options


def widened(arguments, options):
    def wide(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tuple(map(wide, arguments)), {name: wide(x) for name, x in options.items()}


def sees(i, j, length, targets, prefix, window, causal):
    """The published program's mask for one pair, in its own steps."""
    prefix = min(prefix, length - targets)

    def id_of(x):
        x = max(x - prefix + 1, 0) if prefix > 0 else x
        return min(x, highest)

    highest = length - targets - (prefix - 1 if prefix > 0 else 0)
    row, column = id_of(i), id_of(j)
    distance = row - column
    if not causal:
        distance = abs(distance)
    valid = i == j or distance > 0
    if window is not None:
        valid = valid and distance <= window
    if prefix > 0:
        valid = valid or (row == 0 and column < highest)
    return valid


def bucket_of(x, buckets, kind):
    x = abs(int(x))
    if kind == "log":
        return min(math.floor(math.log(max(x, 1)) / 0.301), buckets)
    return min(math.isqrt(x // 60), buckets)


def loops(
    q, k, v, offsets, *, max_length, alpha=1.0, causal=True, num_targets=None, window=None, contextual=None,
    timestamps=None, position_bias=None, time_bias=None, time_buckets="log",
):  # fmt: skip
    """The formula one pair at a time."""
    out = torch.zeros_like(v)
    for b in range(offsets.numel() - 1):
        first, last = int(offsets[b]), int(offsets[b + 1])
        length = last - first
        targets = 0 if num_targets is None else int(num_targets[b])
        prefix = 0 if contextual is None else contextual if isinstance(contextual, int) else int(contextual[b])
        for h, i, j in itertools.product(range(q.shape[1]), range(length), range(length)):
            if not sees(i, j, length, targets, prefix, window, causal):
                continue
            z = alpha * (q[first + i, h] * k[first + j, h]).sum()
            if position_bias is not None:
                own = position_bias if position_bias.dim() == 1 else position_bias[h]
                z = z + own[j - i + max_length - 1]
            if time_bias is not None:
                difference = int(timestamps[first + min(i + 1, length - 1)]) - int(timestamps[first + j])
                z = z + time_bias[bucket_of(difference, time_bias.numel() - 1, time_buckets)]
            out[first + i, h] += z * torch.sigmoid(z) / max_length * v[first + j, h]
    return out


def error_bound(q, k, v, offsets, *, max_length, alpha=1.0, position_bias=None, time_bias=None, **options):
    """What rounding can do to `out`: n * eps * sum of |terms|, in float64.

    The biases count with their largest entry. SiLU's slope is at most 1.1, and its own evaluation good to 8 eps of its
    argument, which bounds its value too.
    """
    lengths = offsets.diff()
    bounds = torch.zeros_like(v)
    biases = sum(float(x.abs().max()) for x in (position_bias, time_bias) if x is not None)
    masks = ("causal", "num_targets", "contextual", "window")
    seen = ops.hstu_attention.mask(
        lengths, int(lengths.max()) if len(lengths) else 0, **{name: options[name] for name in masks if name in options}
    )
    for b, length in enumerate(lengths.tolist()):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        size = alpha * torch.einsum("ihd,jhd->hij", q[rows].abs(), k[rows].abs()) + biases
        # The error of a weight, and what the sum over the row adds.
        error = (1.1 * (q.shape[2] + 4) + 8 + length + 3) * EPS * size / max_length
        bounds[rows] = torch.einsum("hij,jhd->ihd", error * seen[b, :length, :length], v[rows].abs())
    return bounds


sizes = st.one_of(st.sampled_from([1, 15, 16, 17, 33]), st.integers(1, 40))


@given(
    lengths=st.lists(
        st.tuples(
            st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65, 130]), st.integers(0, 90)),
            st.integers(0, 200),
            st.integers(0, 200),
        ),
        max_size=5,
    ),
    heads=st.integers(1, 3),
    dim=sizes,
    value_dim=sizes,
    causal=st.booleans(),
    targets=st.booleans(),
    prefix=st.one_of(st.none(), st.just("own"), st.integers(0, 9)),
    window=st.one_of(st.none(), st.integers(0, 100)),
    position=st.sampled_from(BIASES),
    time=st.one_of(st.none(), st.sampled_from([0, 1, 20, 128, 200])),
    kind=st.sampled_from(["log", "sqrt"]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_matches_reference(
    lengths, heads, dim, value_dim, causal, targets, prefix, window, position, time, kind, index, isa_levels,
    poisoned_empty,
):  # fmt: skip
    rows = [n for n, _, _ in lengths]
    arguments, options = problem(rows, heads, dim, value_dim, 131, position, time)
    options |= {"alpha": dim**-0.5, "causal": causal, "window": window, "time_buckets": kind}
    if targets:
        options["num_targets"] = torch.tensor([n % (length + 1) for length, n, _ in lengths], dtype=torch.int64)
    options["contextual"] = torch.tensor([n for _, _, n in lengths], dtype=index) if prefix == "own" else prefix
    wide_arguments, wide_options = widened(arguments, options)
    wanted = ops.hstu_attention.reference(*wide_arguments, **wide_options)
    bound = error_bound(*wide_arguments, **wide_options)
    q, k, v, offsets = arguments
    answers = []
    for _ in isa_levels():
        answer = ops.hstu_attention(q, k, v, offsets.to(index), **options)
        assert answer.shape == wanted.shape
        assert torch.all((answer.double() - wanted).abs() <= bound)
        answers.append(answer)
    # The two forms with FMA agree bit by bit; the scalar one lies within the bound like they.
    assert all(torch.equal(answer, answers[1]) for answer in answers[2:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("prefix", [None, 3, "own"])
@pytest.mark.parametrize("window", [None, 0, 2])
def test_reference_is_the_formula(causal, prefix, window):
    """The padded form that the other tests go by, against loops over pairs."""
    arguments, options = problem([4, 0, 7, 1], 2, 3, 2, 8, "own", 40, dtype=torch.float64)
    options |= {"causal": causal, "window": window, "num_targets": torch.tensor([1, 0, 3, 1])}
    options["contextual"] = torch.tensor([2, 4, 1, 1]) if prefix == "own" else prefix
    for kind in ("log", "sqrt"):
        options["time_buckets"] = kind
        wanted = loops(*arguments, **options)
        for form in (ops.hstu_attention.reference, ops.hstu_attention):
            torch.testing.assert_close(form(*arguments, **options), wanted, rtol=1e-13, atol=1e-13)


@given(
    length=st.integers(0, 20),
    targets=st.integers(0, 20),
    prefix=st.integers(0, 25),
    window=st.one_of(st.none(), st.integers(0, 20)),
    causal=st.booleans(),
)
def test_mask(length, targets, prefix, window, causal):
    """The mask that the references use and the one in the kernel, against the published one pair by pair."""
    targets = min(targets, length)
    wanted = [[sees(i, j, length, targets, prefix, window, causal) for j in range(length)] for i in range(length)]
    masks = {"causal": causal, "window": window, "contextual": prefix, "num_targets": torch.tensor([targets])}
    have = ops.hstu_attention.mask(torch.tensor([length]), length + 2, **masks)[0]
    assert have[:length, :length].tolist() == wanted
    assert not have[length:].any()
    assert not have[:, length:].any()
    # The kernel's own: with q = 0 every weight is silu(bias), and the values are the rows of a unit matrix.
    q, v = torch.zeros(length, 1, 2), torch.eye(max(length, 1))[:length].unsqueeze(1)
    bias = torch.full((2 * 25 - 1,), 5.0)
    out = ops.hstu_attention(q, q, v, offsets_of([length]), max_length=25, position_bias=bias, **masks)
    if length:
        assert (out.squeeze(1) > 0).tolist() == wanted


def test_known_values():
    """silu(0) = 0, silu(log 3) = log 3 * 3 / 4, over N = 2."""
    three = math.log(3.0)
    q = torch.tensor([[[1.0]], [[three]], [[7.0]]])
    k = torch.tensor([[[0.0]], [[1.0]], [[three / 7]]])
    v = torch.tensor([[[4.0, 0.0]], [[0.0, 8.0]], [[16.0, 1.0]]])
    out = ops.hstu_attention(q, k, v, torch.tensor([0, 2, 2, 3]), max_length=2)
    unit = three * 0.75 / 2
    wanted = [[0.0, 0.0], [0.0, 8 * unit], [16 * unit, unit]]
    torch.testing.assert_close(out.squeeze(1), torch.tensor(wanted))
    # alpha, a position and a time bias: z[1, 0] = 0 + p[-1] + w[bucket(t_1 - t_0 = 2)], floor(log 2 / .301) = 2.
    out = ops.hstu_attention(
        q[:2], k[:2], v[:2], torch.tensor([0, 2]), max_length=2, alpha=2.0, position_bias=torch.tensor([1.0, 0.0, 9.0]),
        timestamps=torch.tensor([10, 12]), time_bias=torch.tensor([0.0, 5.0, three - 1.0, 7.0]),
    )  # fmt: skip
    # Row 0: z = 0 + p[0] + w[bucket(t_1 - t_0)] = log 3 - 1. Row 1: itself 2 log 3, and row 0 log 3.
    silu = [z / (1 + math.exp(-z)) / 2 for z in (three - 1, 2 * three)]
    torch.testing.assert_close(out.squeeze(1), torch.tensor([[4 * silu[0], 0.0], [4 * unit, 8 * silu[1]]]))


@pytest.mark.parametrize("kind", ["log", "sqrt"])
@pytest.mark.parametrize("signs", [[1], [-1], [1, -1]], ids=["before", "after", "both"])
@pytest.mark.parametrize("spread", [1, 2**26, 2**40], ids=["near", "far", "wide"])
def test_buckets(kind, signs, spread, isa_levels):
    """Every border to the second, in both directions of the kernel: 80 queries `spread` apart ask for all of them."""
    borders = {int(math.exp(0.301 * b)) + d for b in range(142) for d in (-1, 0, 1, 2)}
    borders |= {60 * b * b + d for b in range(70) for d in (-1, 0, 1)}
    apart = sorted(x for x in borders if 0 <= x < 2**61)
    sign = torch.tensor(signs).repeat(len(apart))[: len(apart)]
    for buckets, base in ((128, 0), (3, -(2**40)), (200, 2**60)):
        times = torch.cat([base + sign * torch.tensor(apart), base + spread * torch.arange(80)])
        rows = len(times)
        following = torch.cat([times[1:], times[-1:]])
        options = {"max_length": 1, "timestamps": times, "time_buckets": kind}
        wanted = torch.tensor(
            [[bucket_of(int(after) - int(t), buckets, kind) for t in times[:-80]] for after in following[-80:]]
        )
        # With q = 0 each weight is silu(bias); the values are the rows of a unit matrix, so each pair shows its own.
        q, v = torch.zeros(rows, 1, 1), torch.eye(rows).unsqueeze(1)
        bias = torch.arange(buckets + 1, dtype=torch.float32) + 20
        # And with no bias yet every pair gives silu'(0) / 1 = 1/2 to its bucket, exact in any order.
        zero = torch.zeros(buckets + 1, requires_grad=True)
        rest = torch.zeros(rows, 1, 1)
        rest[-80:] = 1
        for _ in isa_levels():
            out = ops.hstu_attention(q, q, v, offsets_of([rows]), time_bias=bias, **options)[-80:, 0, :-80]
            assert torch.equal((out - 20).round().long(), wanted)
            one = torch.ones(rows, 1, 1)
            one[-80:] = 0
            answer = ops.hstu_attention(q, q, one, offsets_of([rows]), time_bias=zero, **options)
            (counts,) = torch.autograd.grad(answer, zero, rest)
            assert torch.equal(counts * 2, torch.bincount(wanted.flatten(), minlength=buckets + 1).float())


def test_buckets_across_the_whole_range():
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    times = torch.tensor([low, high - 5, low + 7, high])
    out = ops.hstu_attention(
        torch.zeros(4, 1, 1), torch.zeros(4, 1, 1), torch.eye(4).unsqueeze(1), offsets_of([4]), max_length=1,
        timestamps=times, time_bias=torch.arange(201.0) + 30,
    )[-1, 0]  # fmt: skip
    wanted = [bucket_of(high - int(t), 200, "log") for t in times]
    assert wanted[0] == 147
    assert (out - 30).round().tolist() == wanted


@pytest.mark.parametrize("position", BIASES)
@pytest.mark.parametrize("time", [None, 30])
@pytest.mark.parametrize("masks", ["causal", "full", "everything"])
def test_gradcheck(position, time, masks):
    arguments, options = problem([3, 0, 6, 1], 2, 3, 2, 7, position, time, 1, torch.float64)
    q, k, v, offsets = arguments
    options |= {"alpha": 0.7, "causal": masks != "full"}
    if masks == "everything":
        options |= {"num_targets": torch.tensor([1, 0, 2, 0]), "contextual": 2, "window": 2}
    names = [name for name in ("position_bias", "time_bias") if name in options]

    def call(q, k, v, *biases):
        return ops.hstu_attention(q, k, v, offsets, **{**options, **dict(zip(names, biases, strict=True))})

    inputs = [q, k, v, *(options[name] for name in names)]
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs])


def test_gradcheck_padded():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 1, 2, dtype=torch.float64, generator=generator) for _ in range(3))
    lengths, times = torch.tensor([3, 2]), torch.randint(0, 999, (2, 4), generator=generator)
    biases = [torch.randn(n, dtype=torch.float64, generator=generator) for n in (7, 21)]

    def call(q, k, v, position, time):
        return ops.hstu_attention(
            q, k, v, lengths, max_length=4, timestamps=times, position_bias=position, time_bias=time
        )

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (q, k, v, *biases)])


def coefficients_like(out):
    """A gradient that every dtype holds exactly."""
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().bfloat16().to(out.dtype).view_as(out)


def gradients(arguments, options, form=ops.hstu_attention):
    q, k, v, offsets = arguments
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    options = dict(options)
    for name in ("position_bias", "time_bias"):
        if name in options:
            options[name] = options[name].detach().clone().requires_grad_()
            leaves.append(options[name])
    out = form(*leaves[:3], offsets, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, coefficients_like(out), materialize_grads=True)]


@pytest.mark.parametrize("position", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 17, 3), (16, 64, 1), (5, 3, 2), (130, 97, 1)])
def test_gradients(position, dtype, shape, isa_levels, poisoned_empty):
    """As near to float64 as plain torch is, within a factor for the order of its sums; bfloat16 within its rounding."""
    dim, value_dim, heads = shape
    arguments, options = problem([70, 0, 1, 33, 150], heads, dim, value_dim, 150, position, 128, dtype=dtype)
    options |= {"alpha": dim**-0.5, "num_targets": torch.tensor([2, 0, 0, 5, 30]), "contextual": 2, "window": 90}
    exact = gradients(*widened(arguments, options), form=ops.hstu_attention.reference)
    plain = gradients(arguments, options, form=ops.hstu_attention.reference)
    answers = []
    for _ in isa_levels():
        answers.append(gradients(arguments, options))
        for have, torch_has, want in zip(answers[-1], plain, exact, strict=True):
            assert have.dtype == torch_has.dtype
            ours, theirs = (have.double() - want).norm(), (torch_has.double() - want).norm()
            assert ours <= 8 * theirs + 8 * EPS * want.norm()
            if dtype == torch.bfloat16 and have.dtype == torch.bfloat16:  # each entry rounded once
                assert torch.all((have.double() - want).abs() <= 2**-8 * want.abs() + 1e-4 * want.abs().max())
    for later in answers[2:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[1], later, strict=True))


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4], [0, 4], [1, 2], [2, 3]])
def test_only_wanted_gradients(wanted, poisoned_empty):
    (q, k, v, offsets), options = problem([70, 5], 2, 8, 4, 70, "shared", 64)
    all_of_them = gradients((q, k, v, offsets), options)[1:]
    leaves = [x.clone() for x in (q, k, v, options["position_bias"], options["time_bias"])]
    for i in wanted:
        leaves[i].requires_grad_()
    out = ops.hstu_attention(*leaves[:3], offsets, **{**options, "position_bias": leaves[3], "time_bias": leaves[4]})
    out.backward(coefficients_like(out))
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, all_of_them[i])


def test_opcheck(opcheck):
    opcheck(REGISTRY["hstu_attention"])
    opcheck(REGISTRY["hstu_attention_backward"])


def test_compiles_in_one_graph():
    arguments, options = problem([4, 0, 9], 2, 4, 4, 9, "own", 20)
    compiled = torch.compile(ops.hstu_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments, **options), ops.hstu_attention(*arguments, **options))


@pytest.mark.parametrize("position", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(position, dtype):
    """Many sequences, and one that is cut into chunks (2048 rows and more)."""
    generator = torch.Generator().manual_seed(3)
    for lengths in (torch.randint(0, 90, (70,), generator=generator).tolist(), [2100, 3]):
        arguments, options = problem(lengths, 2, 8, 10, 2100, position, 64, dtype=dtype)
        options["window"] = 300
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = gradients(arguments, options)
            torch.set_num_threads(3)
            three = gradients(arguments, options)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_chunks_of_a_long_sequence(causal, isa_levels):
    """Sequences long enough that several parts share their dq; float64, so that only the algebra counts."""
    arguments, options = problem([2500], 1, 3, 2, 2500, "shared", 64, dtype=torch.float64)
    options |= {"causal": causal, "alpha": 0.5}
    have = gradients(arguments, options)
    for a, b in zip(have, gradients(arguments, options, form=ops.hstu_attention.reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_more_pairs_than_32_bits_count():
    """One sequence of 50,000 rows, against the band that its window leaves."""
    rows, window = 50_000, 3
    (q, k, v, offsets), options = problem([rows], 1, 2, 3, rows, "shared", 64, dtype=torch.float64)

    def banded(q, k, v, offsets, *, max_length, window, position_bias, time_bias, timestamps):
        out = torch.zeros_like(v)
        after = torch.cat([timestamps[1:], timestamps[-1:]])
        for back in range(window + 1):
            late, early = slice(back, rows), slice(0, rows - back)
            place = (torch.log((after[late] - timestamps[early]).abs().clamp(min=1).double()) / 0.301).long()
            z = (q[late] * k[early]).sum(-1) + position_bias[max_length - 1 - back] + time_bias[place].unsqueeze(1)
            moved = torch.nn.functional.silu(z).unsqueeze(-1) * v[early] / max_length
            out = out + torch.nn.functional.pad(moved, (0, 0, 0, 0, back, 0))
        return out

    options["window"] = window
    have = gradients((q, k, v, offsets), options)
    for a, b in zip(have, gradients((q, k, v, offsets), options, form=banded), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("position", BIASES)
def test_answer_knows_no_batch_mates(position, isa_levels):
    arguments, options = problem([23, 140, 7], 2, 17, 9, 140, position, 64)
    q, k, v, offsets = arguments
    for _ in isa_levels():
        together = gradients(arguments, options)[:4]
        for b in range(3):
            rows = slice(int(offsets[b]), int(offsets[b + 1]))
            own = {**options, "timestamps": options["timestamps"][rows]}
            alone = ops.hstu_attention(q[rows], k[rows], v[rows], offsets_of([rows.stop - rows.start]), **own)
            assert torch.equal(alone, together[0][rows])


def test_what_comes_later_changes_nothing(isa_levels):
    """Causal: a row's answer with and without the rows after it, whose gradient it does not feel either."""
    (q, k, v, offsets), options = problem([150], 2, 16, 16, 150, "shared", 128)
    for _ in isa_levels():
        whole = ops.hstu_attention(q, k, v, offsets, **options)
        for rows in (1, 63, 64, 65, 149):
            # The last row asks with the next one's time, which the shorter sequence does not know.
            short = ops.hstu_attention(
                q[:rows], k[:rows], v[:rows], offsets_of([rows]),
                **{**options, "timestamps": options["timestamps"][:rows]},
            )  # fmt: skip
            assert torch.equal(short[:-1], whole[: rows - 1])
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[100:] = 1e30
        later = ops.hstu_attention(*changed, offsets, **options)
        assert torch.equal(later[:100], whole[:100])


def test_layouts_are_read_in_place(poisoned_empty):
    """Parts of one fused buffer, heads apart, padded rows in a longer buffer: the same bits."""
    lengths, heads, dim, value_dim = [30, 0, 70], 3, 16, 12
    (q, k, v, offsets), options = problem(lengths, heads, dim, value_dim, 70, "own", 64)
    wanted = gradients((q, k, v, offsets), options)

    fused = torch.full((100, heads * (2 * dim + value_dim) + 5), float("nan"))
    width = heads * dim
    parts = [fused[:, :width], fused[:, width : 2 * width], fused[:, 2 * width : 2 * width + heads * value_dim]]
    views = [part.unflatten(1, (heads, -1)) for part in parts]
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    assert torch.equal(ops.hstu_attention(*views, offsets, **options), wanted[0])

    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    for have, want in zip(gradients((*by_head, offsets), options), wanted, strict=True):
        assert torch.equal(have, want)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]  # the values of a head lie apart
    assert torch.equal(ops.hstu_attention(*turned, offsets, **options), wanted[0])

    inside = torch.arange(80) < torch.tensor(lengths).unsqueeze(1)
    for room in (80, 90):

        def padded(x, room=room):
            fill = float("nan") if x.is_floating_point() else 10**15
            whole = torch.full((3, room, *x.shape[1:]), fill, dtype=x.dtype)
            whole[:, :80][inside] = x
            return whole[:, :80]

        own = {**options, "timestamps": padded(options["timestamps"])}
        rows = [padded(x) for x in (q, k, v)]
        out = ops.hstu_attention(*rows, torch.tensor(lengths), **own)
        assert torch.equal(out[inside], wanted[0])
        assert torch.all(out[~inside] == 0)
        leaves = [x.detach().requires_grad_() for x in rows]
        biases = {name: own[name].clone().requires_grad_() for name in ("position_bias", "time_bias")}
        out = ops.hstu_attention(*leaves, torch.tensor(lengths), **{**own, **biases})
        coefficients = torch.full_like(out, float("nan"))
        coefficients[inside] = coefficients_like(wanted[0])
        have = torch.autograd.grad(out, [*leaves, *biases.values()], coefficients)
        for i in range(3):
            assert torch.equal(have[i][inside], wanted[i + 1])
            assert torch.all(have[i][~inside] == 0)
        # A batch of another layout is cut alike, so the biases agree to the bit as well.
        assert torch.equal(have[3], wanted[4])
        assert torch.equal(have[4], wanted[5])


def test_heads_outermost_are_padded_in_place(monkeypatch, poisoned_empty):
    """[B, H, L, D] turned, as other attention wants it: the same bits, and room for the answer's own rows alone."""
    heads, length, dim = 6, 40, 8
    generator = torch.Generator().manual_seed(1)
    wide = [torch.randn(3, heads, length, dim, generator=generator) for _ in range(3)]
    lengths, coefficients = torch.tensor([40, 0, 17]), torch.randn(3, length, heads, dim, generator=generator)
    room = []
    new_zeros = torch.Tensor.new_zeros

    def counted(x, *size, **options):
        answer = new_zeros(x, *size, **options)
        room.append(answer.numel())
        return answer

    answers = []
    for turn in (lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2).contiguous()):
        leaves = [turn(x).requires_grad_() for x in wide]
        monkeypatch.setattr(torch.Tensor, "new_zeros", counted)
        out = ops.hstu_attention(*leaves, lengths, max_length=length)
        answers.append([out, *torch.autograd.grad(out, leaves, coefficients)])
        monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert room == [3 * length * heads * dim] * 8


@pytest.mark.parametrize("kind", ["expanded", "apart", "every other"])
def test_any_strides_of_the_gradient(kind):
    (q, k, v, offsets), options = problem([30, 3], 2, 8, 5, 30)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ops.hstu_attention(*leaves, offsets, **options)
    values = coefficients_like(out)
    coefficients = {
        "expanded": torch.tensor(0.5).expand(out.shape),
        "apart": values.transpose(0, 2).contiguous().transpose(0, 2),
        "every other": torch.stack([values, values * float("nan")], 1).flatten(0, 1)[::2],
    }[kind]
    have = torch.autograd.grad(out, leaves, coefficients, retain_graph=True)
    want = torch.autograd.grad(out, leaves, coefficients.clone(memory_format=torch.contiguous_format))
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [2**63 - 1, 2**70])
def test_a_window_beyond_everything_is_none(window, causal):
    (q, k, v, offsets), options = problem([70, 9], 2, 8, 8, 70)
    options |= {"causal": causal, "contextual": 3, "num_targets": torch.tensor([4, 0])}
    wide = ops.hstu_attention(q, k, v, offsets, window=window, **options)
    assert torch.equal(wide, ops.hstu_attention(q, k, v, offsets, **options))


def test_order_of_time_does_not_matter_to_the_mask(isa_levels):
    """Unsorted and equal timestamps are legal."""
    (q, k, v, offsets), options = problem([90], 2, 8, 8, 90, "none", 100)
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.full((90,), 7), options["timestamps"].flip(0), torch.randint(-(2**40), 2**40, (90,), generator=generator),
    ]  # fmt: skip
    for times in tables:
        options["timestamps"] = times
        exact = gradients(*widened((q, k, v, offsets), options), form=ops.hstu_attention.reference)
        for _ in isa_levels():
            for have, want in zip(gradients((q, k, v, offsets), options), exact, strict=True):
                assert (have - want).norm() <= 200 * EPS * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_empty(dtype):
    for lengths in ([], [0, 0]):
        arguments, options = problem(lengths, 2, 3, 4, 5, "own", 6, dtype=dtype)
        have = gradients(arguments, options)
        assert have[0].shape == (0, 2, 4)
        assert all(torch.all(x == 0) for x in have[4:])


def test_memory_is_linear_in_length():
    """A sequence four times as long takes about four times the scratch; [H, L, L] would be sixteen times."""
    from recfast import _C

    def scratch(rows):
        lengths = torch.tensor([rows])
        sizes = {
            "sequences": 1, "offsets": 0, "lengths": lengths.data_ptr(), "heads": 4, "dim": 32, "value_dim": 32,
            "max_length": rows, "buckets": 128, "borders": 129, "position_heads": 1,
        }  # fmt: skip
        return _C.hstu_attention_forward_scratch(**sizes), _C.hstu_attention_backward_scratch(False, **sizes)

    forward, backward = zip(scratch(8000), scratch(32000), strict=True)
    assert forward[1] <= 4 * forward[0]
    assert backward[1] <= 4.1 * backward[0]
    assert backward[1] < 32000 * (3 * 4 * 32 + 200) + 2_000_000


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"q": torch.ones(5, 6)}, ValueError, r"q must have shape \[T, H, Dq\], got \[5, 6\]"),
        ({"q": torch.ones(5, 2, 3).half()}, TypeError, "q must be float32 or bfloat16 or float64, got float16"),
        ({"k": torch.ones(5, 2, 4)}, ValueError, r"k must have shape \[5, 2, 3\], got \[5, 2, 4\]"),
        ({"k": torch.ones(5, 2, 3).double()}, TypeError, "k must be float32, got float64"),
        ({"v": torch.ones(4, 2, 3)}, ValueError, r"v must have shape \[5, 2, Dv\], got \[4, 2, 3\]"),
        ({"offsets": torch.tensor([0, 2, 6])}, ValueError, r"offsets\[-1\] must be 5"),
        ({"offsets": torch.tensor([0, 6, 5])}, ValueError, r"offsets\[2\] = 5 is below offsets\[1\] = 6"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "one entry more than there are sequences"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"max_length": 4.5}, TypeError, "max_length must be an integer, got 4.5"),
        ({"window": 1.5}, TypeError, "window must be an integer, got 1.5"),
        ({name: torch.ones(5, 0, 3) for name in "qkv"}, ValueError, r"q.shape\[-2\] must be at least 1, got 0"),
        ({name: torch.ones(5, 2, 0) for name in "qkv"}, ValueError, r"q.shape\[-1\] must be at least 1, got 0"),
        ({"v": torch.ones(5, 2, 0)}, ValueError, r"v.shape\[-1\] must be at least 1, got 0"),
        ({"max_length": 2, "position_bias": torch.ones(3)}, ValueError, "sequence 1 must have at most max_length = 2"),
        ({"position_bias": torch.ones(8)}, ValueError, r"position_bias must have shape \[7\] or \[2, 7\].*got \[8\]"),
        ({"position_bias": torch.ones(7).double()}, TypeError, "position_bias must be float32, got float64"),
        ({"window": -1}, ValueError, "window must be at least 0, got -1"),
        ({"contextual": -2}, ValueError, "contextual must be at least 0, got -2"),
        ({"contextual": torch.tensor([0, -1])}, ValueError, r"contextual\[1\] must be at least 0, got -1"),
        ({"contextual": torch.tensor([0])}, ValueError, r"contextual must have shape \[2\]"),
        ({"num_targets": torch.tensor([3, 0])}, IndexError, r"num_targets\[0\] = 3 is outside \[0, 3\)"),
        ({"num_targets": torch.tensor([-1, 0])}, IndexError, r"num_targets\[0\] = -1 is outside"),
        ({"num_targets": torch.tensor([1.0, 0.0])}, TypeError, "num_targets must be int32 or int64, got float32"),
        ({"time_bias": torch.ones(3)}, ValueError, "timestamps and time_bias must be given together"),
        ({"timestamps": torch.arange(5)}, ValueError, "timestamps and time_bias must be given together"),
        (
            {"timestamps": torch.arange(5).int(), "time_bias": torch.ones(3)},
            TypeError,
            "timestamps must be int64, got int32",
        ),
        (
            {"timestamps": torch.arange(4), "time_bias": torch.ones(3)},
            ValueError,
            r"timestamps must have shape \[5\], got \[4\]",
        ),
        ({"timestamps": torch.arange(5), "time_bias": torch.ones(0)}, ValueError, "time_bias must have between 1 and"),
        ({"time_buckets": "linear"}, ValueError, "time_buckets must be one of log, sqrt, got 'linear'"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    (q, k, v, offsets), options = problem([2, 3], 2, 3, 3, 4)
    named = {"q": q, "k": k, "v": v, "offsets": offsets, **options, **change}
    with pytest.raises(error, match=sentence):
        ops.hstu_attention(**named)


def test_rejects_bad_lengths():
    x = torch.ones(2, 4, 1, 3)
    with pytest.raises(IndexError, match=r"lengths\[1\] = 5 is outside \[0, 5\)"):
        ops.hstu_attention(x, x, x, torch.tensor([4, 5]), max_length=4)
