"""The five tests of an op, and what a history owes to nobody but itself."""

import mmap
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recfast import _C, ops
from recfast.nn import Dice
from recfast.ops import DiceWeights, DINWeights
from recfast.ops._library import REGISTRY

EPS = torch.finfo(torch.float32).eps
BFLOAT16_UNIT = 2.0**-8  # rounding to the nearest bfloat16 changes a number by at most this much of it
ACTIVATIONS = ["prelu", "relu", "sigmoid", "silu", "dice"]
MODES = ["sum", "sigmoid", "softmax"]


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def problem(lengths, candidates, dim, value_dim=None, hidden=(6, 3), seed=0, dtype=torch.float32, dice=False):
    """Arguments of the op; `candidates` None means one a user. Weights beside bfloat16 rows are float32."""
    rows_dtype, dtype = dtype, torch.float32 if dtype == torch.bfloat16 else dtype
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    rows = len(lengths) if candidates is None else sum(candidates)
    first, second = (*hidden, None)[:2]
    weights = DINWeights(
        random(4 * dim, first) / max(dim, 1) ** 0.5,
        random(first),
        None if second is None else random(first, second) / first**0.5,
        None if second is None else random(second),
        random(second or first, 1),
        random(1),
        random(1 if second is None else 2).abs() / 2,
    )
    options = {"candidate_offsets": None if candidates is None else offsets_of(candidates)}
    if value_dim is not None:
        options["values"] = random(sum(lengths), value_dim).to(rows_dtype)
    query, keys = (random(n, dim).to(rows_dtype) for n in (rows, sum(lengths)))
    if dice:
        channels = sum(hidden)
        alpha, mean, spread, gain, shift = (random(channels) for _ in range(5))
        options |= {"activation": "dice", "dice": DiceWeights(alpha / 4, mean / 2, spread.square() + 0.5, gain, shift)}
    return (query, keys, offsets_of(lengths), weights), options


def widened(arguments, options):
    def wide(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    query, keys, offsets, weights = arguments
    wide_weights = DINWeights(*map(wide, weights))
    options = {name: wide(x) for name, x in options.items()}
    if options.get("dice") is not None:
        options["dice"] = DiceWeights(*map(wide, options["dice"]))
    return (wide(query), wide(keys), offsets, wide_weights), options


def error_bound(arguments, options, mode, unit=0.0):
    """What rounding can do to `out`, followed through the layers: n * eps * sum of |terms|, in float64.

    Every activation here has a slope of at most 1.1, and its own evaluation is good to 8 eps; Dice's slope is bounded
    from its parameters. `unit`: by how much the folded weights, w2, the first activations and the answer are rounded.
    """
    dice = options.get("dice")
    steep = 1.1
    if dice is not None:
        # |dy/dz| <= |a| + |1 - a| (1 + |z| scale / 4), and |z| scale p (1 - p) <= |t| p (1 - p) + |offset| / 4.
        scale = dice.gain.abs() * (dice.variance + dice.eps).rsqrt()
        offset = dice.shift.abs() + dice.mean.abs() * scale
        steep = float((dice.alpha.abs() + (1 - dice.alpha).abs() * (1.25 + offset / 4)).max())
        own = float((4 * (1 - dice.alpha).abs() * (2 + offset)).max())
    (query, keys, offsets, w), options = widened(arguments, options)
    users = torch.arange(offsets.numel() - 1)
    if options["candidate_offsets"] is not None:
        users = users.repeat_interleave(options["candidate_offsets"].diff())
    values = options.get("values", keys)
    dim = query.shape[1]
    wq, wk, wd, wp = w.w1.abs().chunk(4)
    bounds = []
    for c, user in enumerate(users):
        k = keys[offsets[user] : offsets[user + 1]]
        v = values[offsets[user] : offsets[user + 1]].abs()
        q = query[c]
        terms = k.abs() @ (wk + wd + q.abs().unsqueeze(1) * wp) + q.abs() @ (wq + wd) + w.b1.abs()
        size, error = terms, ((2 * dim + 6) * EPS + unit) * terms

        def active(size, error):
            if dice is not None:  # what p loses counts times |z|
                return steep * size, steep * error + (8 + own) * EPS * (size + 1) * (1 + size)
            return 1.1 * size + 1, 1.1 * error + 8 * EPS * (size + 1)

        if w.w2 is not None:
            size, error = active(size, error)
            terms = size @ w.w2.abs() + w.b2.abs()
            error = error @ w.w2.abs() + ((w.w1.shape[1] + 2) * EPS + 2 * unit + unit**2) * terms
            size = terms
        size, error = active(size, error)
        terms = (size @ w.w3.abs() + w.b3.abs()).squeeze(1)
        error = (error @ w.w3.abs()).squeeze(1) + (w.w3.shape[0] + 3) * EPS * terms
        if mode == "sum":
            weight = terms
        elif mode == "sigmoid":
            weight, error = torch.ones_like(error), error / 4 + 8 * EPS
        else:
            # |dp| <= p (|ds| + max |ds|), and exp(s - lse) loses |s - lse| eps.
            weight = torch.ones_like(error)
            error = torch.expm1(2 * error.amax()) + (len(k) + 16 + 4 * terms.amax()) * EPS if len(k) else error
            error = error * torch.ones_like(weight)
        summed = (weight.unsqueeze(1) * v).sum(0)
        bound = (error.unsqueeze(1) * v).sum(0) + (len(k) + 2) * EPS * summed
        bounds.append(bound + unit * (summed + bound))
    return torch.stack(bounds) if bounds else values.new_zeros(0, values.shape[1])


sizes = st.one_of(st.sampled_from([1, 15, 16, 17, 33]), st.integers(1, 40))


@given(
    users=st.lists(
        st.tuples(st.one_of(st.sampled_from([0, 1, 2, 19, 20, 21, 45]), st.integers(0, 60)), st.integers(0, 4)),
        max_size=6,
    ),
    shared=st.booleans(),
    dim=sizes,
    value_dim=st.one_of(st.none(), sizes),
    hidden=st.one_of(st.tuples(sizes), st.tuples(sizes, sizes), st.sampled_from([(80, 40), (256, 97)])),
    activation=st.sampled_from(ACTIVATIONS),
    mode=st.sampled_from(MODES),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60)
def test_matches_reference(users, shared, dim, value_dim, hidden, activation, mode, index, isa_levels, poisoned_empty):
    lengths = [length for length, _ in users]
    candidates = [n for _, n in users] if shared else None
    arguments, options = problem(lengths, candidates, dim, value_dim, hidden, dice=activation == "dice")
    options |= {"activation": activation, "mode": mode}
    wide_arguments, wide_options = widened(arguments, options)
    wanted = ops.din_attention.reference(*wide_arguments, **wide_options)
    bound = error_bound(arguments, options, mode)
    query, keys, offsets, weights = arguments
    answers = []
    for _ in isa_levels():
        answer = ops.din_attention(query, keys, offsets.to(index), weights, **options)
        assert answer.shape == wanted.shape
        assert torch.all((answer.double() - wanted).abs() <= bound)
        answers.append(answer)
    # The two forms with FMA agree bit by bit; the scalar one lies within the bound like they.
    assert all(torch.equal(answer, answers[1]) for answer in answers[2:])


@given(
    users=st.lists(
        st.tuples(st.one_of(st.sampled_from([0, 1, 2, 3, 39, 40, 41]), st.integers(0, 90)), st.integers(0, 3)),
        max_size=5,
    ),
    dim=sizes,
    value_dim=st.one_of(st.none(), sizes),
    hidden=st.one_of(st.tuples(sizes), st.tuples(sizes, sizes), st.sampled_from([(80, 40), (256, 97)])),
    activation=st.sampled_from(ACTIVATIONS),
    mode=st.sampled_from(MODES),
)
@settings(max_examples=40)
def test_bfloat16_matches_reference(users, dim, value_dim, hidden, activation, mode, isa_levels, poisoned_empty):
    lengths = [length for length, _ in users]
    arguments, options = problem(
        lengths, [n for _, n in users], dim, value_dim, hidden, dtype=torch.bfloat16, dice=activation == "dice"
    )
    options |= {"activation": activation, "mode": mode}
    wide_arguments, wide_options = widened(arguments, options)
    wanted = ops.din_attention.reference(*wide_arguments, **wide_options)
    bound = error_bound(arguments, options, mode, BFLOAT16_UNIT)
    for _ in isa_levels():
        answer = ops.din_attention(*arguments, **options)
        assert answer.dtype == torch.bfloat16
        assert answer.shape == wanted.shape
        assert torch.all((answer.double() - wanted).abs() <= bound)


def test_bfloat16_known_values():
    """Numbers that bfloat16 holds exactly all the way, so that every form must give the same."""
    weights = DINWeights(
        torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        torch.tensor([0.5]),
        torch.tensor([[2.0, -1.0]]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([[1.0], [4.0]]),
        torch.tensor([1.0]),
    )
    query, keys = torch.tensor([[2.0]]).bfloat16(), torch.tensor([[1.0], [-2.0], [0.5]]).bfloat16()
    # z1 = q + 2 k + 3 (q - k) + 4 q k + .5: k=1 15.5, k=-2 -5.5, k=.5 12. Relu, then [31, -14.5], [0, 1], [24, -11];
    # relu, then s = 32, 5, 25; out = 32 - 10 + 12.5 = 34.5, which bfloat16 holds.
    answer = ops.din_attention(query, keys, torch.tensor([0, 3]), weights, activation="relu")
    assert answer.item() == 34.5


def test_known_values():
    # One hidden unit that sees w1 . [q, k, q - k, q k] = 1 q + 2 k + 3 (q - k) + 4 q k, relu, times 10, plus 1.
    weights = DINWeights(
        torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        torch.tensor([0.5]),
        None,
        None,
        torch.tensor([[10.0]]),
        torch.tensor([1.0]),
    )
    query, keys = torch.tensor([[2.0], [1.0], [5.0]]), torch.tensor([[1.0], [-2.0]])
    options = {"candidate_offsets": torch.tensor([0, 2, 3]), "activation": "relu"}
    offsets = torch.tensor([0, 2, 2])
    # q=2: k=1 gives 2+2+3+8+.5 = 15.5 -> 156; k=-2 gives 2-4+12-16+.5 < 0 -> 1.   156*1 + 1*-2 = 154
    # q=1: k=1 gives 1+2+0+4+.5 = 7.5 -> 76;   k=-2 gives 1-4+9-8+.5 < 0 -> 1.     76*1 + 1*-2 = 74
    assert ops.din_attention(query, keys, offsets, weights, **options).tolist() == [[154.0], [74.0], [0.0]]
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    softmax = ops.din_attention(query, keys, offsets, weights, values=values, mode="softmax", **options)
    # exp(1 - 156) is no float32, exp(1 - 76) is.
    assert softmax.flatten().tolist() == pytest.approx([1.0, 0.0, 1.0, 2.6786370e-33, 0.0, 0.0], rel=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("two", [False, True], ids=["one-layer", "two-layers"])
def test_gradcheck(mode, activation, two):
    hidden = (5, 3) if two else (5,)
    own_values = mode != "sigmoid"
    arguments, options = problem(
        [3, 0, 22, 1], [2, 1, 2, 0], 3, 2 if own_values else None, hidden, 1, torch.float64, dice=activation == "dice"
    )
    query, keys, offsets, weights = arguments
    values = options.pop("values", None)
    options["activation"] = activation
    given_weights = [w for w in weights if w is not None]
    present = [w is not None for w in weights]
    if activation != "prelu":
        given_weights, present = given_weights[:-1], [*present[:-1], False]

    def call(query, keys, *rest):
        rest = list(rest)
        own = rest.pop(0) if values is not None else None
        filled = DINWeights(*(rest.pop(0) if there else None for there in present))
        return ops.din_attention(query, keys, offsets, filled, values=own, mode=mode, **options)

    inputs = [query, keys, *([] if values is None else [values]), *given_weights]
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_gradcheck_every_entry():
    """Once without fast mode, padded keys and all."""
    (query, _, _, weights), _ = problem([3, 2], None, 2, None, (3, 2), 2, torch.float64)
    keys = torch.randn(2, 4, 2, dtype=torch.float64)
    lengths = torch.tensor([3, 2])

    def call(query, keys, *w):
        return ops.din_attention(query, keys, lengths, DINWeights(*w))

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (query, keys, *weights)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("two", [False, True], ids=["one-layer", "two-layers"])
def test_dice_gradcheck(mode, training, two):
    """In everything that learns; in training through the statistics too."""
    arguments, options = problem(
        [3, 0, 43, 1], [2, 1, 2, 0], 3, 2, (5, 3) if two else (5,), 1, torch.float64, dice=True
    )
    query, keys, offsets, weights = arguments
    values, dice = options.pop("values"), options.pop("dice")
    present = [w is not None for w in weights[:6]]

    def call(query, keys, values, alpha, gain, shift, *rest):
        rest = list(rest)
        filled = DINWeights(*(rest.pop(0) if there else None for there in present))
        own = dice._replace(alpha=alpha, gain=gain, shift=shift)
        options.update(mode=mode, training=training, values=values, dice=own)
        answer = ops.din_attention(query, keys, offsets, filled, **options)
        return answer[0] if training else answer

    inputs = [query, keys, values, dice.alpha, dice.gain, dice.shift, *(w for w in weights[:6] if w is not None)]
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.parametrize("candidates", [None, [2, 1, 3]])
def test_dice_in_training_is_the_published_layer(candidates):
    """Full-length rows: `nn.Dice` over the concatenation, as libraries run it, gives the same, and its gradients."""
    torch.manual_seed(0)
    rows, length, dim, hidden = 3 if candidates is None else sum(candidates), 7, 4, (6, 5)
    (query, keys, offsets, weights), options = problem([length] * 3, candidates, dim, None, hidden, dtype=torch.float64)
    layers = [Dice(width, eps=1e-9).double() for width in hidden]
    for layer in layers:
        torch.nn.init.normal_(layer.alpha)
    leaves = [query, keys, *weights[:6], *(layer.alpha for layer in layers)]
    for leaf in leaves:
        leaf.requires_grad_()
    users = torch.arange(3).repeat_interleave(torch.tensor([1, 1, 1] if candidates is None else candidates))
    k = keys.view(3, length, dim)[users]
    q = query.unsqueeze(1).expand(rows, length, dim)
    hidden1 = layers[0]((torch.cat([q, k, q - k, q * k], -1) @ weights.w1 + weights.b1).flatten(0, 1))
    hidden2 = layers[1](hidden1 @ weights.w2 + weights.b2)
    wanted = ((hidden2 @ weights.w3 + weights.b3).view(rows, length, 1) * k).sum(1)
    channels = sum(hidden)
    dice = DiceWeights(
        torch.cat([layer.alpha for layer in layers]), torch.zeros(channels).double(), torch.ones(channels).double()
    )
    answer, statistics = ops.din_attention(
        query, keys, offsets, weights, activation="dice", dice=dice, training=True, **options
    )
    torch.testing.assert_close(answer, wanted, rtol=1e-10, atol=1e-10)
    # From 0 and 1, momentum .01 leaves a hundredth of the batch in nn.Dice's running statistics; variance unbiased.
    pairs = rows * length
    for layer, own in zip(layers, statistics.split(list(hidden), dim=1), strict=True):
        torch.testing.assert_close(layer.norm.running_mean, own[0] / 100)
        torch.testing.assert_close(layer.norm.running_var, 0.99 + own[1] / 100 * pairs / (pairs - 1))
    coefficients = torch.randn_like(wanted)
    for have, want in zip(
        torch.autograd.grad(answer, leaves, coefficients),
        torch.autograd.grad(wanted, leaves, coefficients),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [(80, 40), (33,), (256, 130)])
def test_dice_statistics_are_those_of_the_valid_pairs(hidden, dtype, isa_levels, poisoned_empty):
    arguments, options = problem([70, 0, 1, 33, 21], [3, 2, 0, 1, 5], 17, None, hidden, dtype=dtype, dice=True)
    options["training"] = True
    wide_arguments, wide_options = widened(arguments, options)
    wanted, statistics = ops.din_attention.reference(*wide_arguments, **wide_options)
    unit = EPS if dtype == torch.float32 else BFLOAT16_UNIT
    for _ in isa_levels():
        answer, own = ops.din_attention(*arguments, **options)
        # In norm: how far a mean may be off depends on all that went before it.
        assert (answer.double() - wanted).norm() <= 40 * unit * wanted.norm()
        assert (own[0] - statistics[0]).norm() <= 40 * unit * statistics[1].sqrt().norm()
        assert (own[1] - statistics[1]).norm() <= 40 * unit * statistics[1].norm()


def test_dice_statistics_far_from_zero():
    """A mean a thousand times the spread: the sum of squares less the squared mean would have lost the variance."""
    (query, keys, offsets, weights), options = problem([900], [3], 4, None, (5,), dice=True)
    weights = weights._replace(b1=weights.b1 + 4000)
    options["training"] = True
    _, own = ops.din_attention(query, keys, offsets, weights, **options)
    wide_arguments, wide_options = widened((query, keys, offsets, weights), options)
    _, statistics = ops.din_attention.reference(*wide_arguments, **wide_options)
    assert float(statistics[1].max()) < 40
    # What rounding z to float32 does: each z by 4000 eps, a step of the variance each.
    assert torch.all((own[1] - statistics[1]).abs() <= 8 * 4000 * EPS * statistics[1].sqrt() + 1e-6)


def test_dice_with_fewer_than_two_pairs_uses_the_given_statistics():
    for lengths in ([1, 0], [0, 0]):
        arguments, options = problem(lengths, None, 3, None, (4, 2), dice=True)
        answer, statistics = ops.din_attention(*arguments, training=True, **options)
        assert torch.equal(answer, ops.din_attention(*arguments, **options))
        assert torch.equal(statistics, torch.stack([options["dice"].mean, options["dice"].variance]))


def test_dice_depends_on_batch_mates_in_training_only():
    (query, keys, offsets, weights), options = problem([9, 8], None, 3, None, (4, 2), dice=True)
    alone = (query[:1], keys[:9], offsets[:2], weights)
    both = ops.din_attention(query, keys, offsets, weights, **options)
    assert torch.equal(both[:1], ops.din_attention(*alone, **options))
    both, _ = ops.din_attention(query, keys, offsets, weights, training=True, **options)
    assert not torch.equal(both[:1], ops.din_attention(*alone, training=True, **options)[0])


def gradients(arguments, options, form=ops.din_attention):
    query, keys, offsets, weights = arguments
    leaves = [x.detach().clone().requires_grad_() for x in (query, keys, *(w for w in weights if w is not None))]
    rest = iter(leaves[2:])
    weights = DINWeights(*(None if w is None else next(rest) for w in weights))
    values = options.get("values")
    if values is not None:
        leaves.append(values.detach().clone().requires_grad_())
        options = {**options, "values": leaves[-1]}
    dice = options.get("dice")
    if dice is not None:
        leaves += [x.detach().clone().requires_grad_() for x in (dice.alpha, dice.gain, dice.shift)]
        options = {**options, "dice": dice._replace(alpha=leaves[-3], gain=leaves[-2], shift=leaves[-1])}
    out = form(leaves[0], leaves[1], offsets, weights, **options)
    if options.get("training") and dice is not None:
        out = out[0]
    coefficients = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, coefficients, materialize_grads=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(33, 17, (80, 40)), (16, None, (97,)), (5, 3, (130, 7))])
def test_float32_gradients(mode, shape, isa_levels, poisoned_empty):
    """As near to float64 as plain torch in float32 is, within a factor for the order of its sums."""
    dim, value_dim, hidden = shape
    arguments, options = problem([70, 0, 1, 33, 21], [3, 2, 0, 1, 5], dim, value_dim, hidden)
    options |= {"mode": mode, "activation": "silu"}
    exact = gradients(*widened(arguments, options), form=ops.din_attention.reference)
    plain = gradients(arguments, options, form=ops.din_attention.reference)
    for _ in isa_levels():
        for have, torch_has, want in zip(gradients(arguments, options), plain, exact, strict=True):
            ours, theirs = (have - want).norm(), (torch_has - want).norm()
            assert ours <= 8 * theirs + 8 * EPS * want.norm()


@pytest.mark.parametrize("training", [False, True])
def test_float32_gradients_of_dice(training, isa_levels, poisoned_empty):
    arguments, options = problem([70, 0, 1, 33, 21], [3, 2, 0, 1, 5], 33, 17, (80, 40), dice=True)
    options["training"] = training
    exact = gradients(*widened(arguments, options), form=ops.din_attention.reference)
    plain = gradients(arguments, options, form=ops.din_attention.reference)
    for _ in isa_levels():
        for have, torch_has, want in zip(gradients(arguments, options), plain, exact, strict=True):
            ours, theirs = (have - want).norm(), (torch_has - want).norm()
            assert ours <= 8 * theirs + 8 * EPS * want.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(33, 17, (80, 40)), (64, None, (80, 40)), (5, 3, (130, 7)), (16, None, (97,))])
def test_bfloat16_gradients(mode, shape, isa_levels, poisoned_empty):
    """As near to float64 as float64 itself is with w1 and w2 rounded to bfloat16, within a factor for what else is."""
    dim, value_dim, hidden = shape
    arguments, options = problem([70, 0, 1, 33, 21], [3, 2, 0, 1, 5], dim, value_dim, hidden, dtype=torch.bfloat16)
    options |= {"mode": mode, "activation": "silu"}
    query, keys, offsets, weights = arguments
    coarse = weights._replace(
        w1=weights.w1.bfloat16().float(), w2=None if weights.w2 is None else weights.w2.bfloat16().float()
    )
    exact = gradients(*widened(arguments, options), form=ops.din_attention.reference)
    moved = gradients(*widened((query, keys, offsets, coarse), options), form=ops.din_attention.reference)
    for _ in isa_levels():
        for have, other, want in zip(gradients(arguments, options), moved, exact, strict=True):
            ours, theirs = (have.double() - want).norm(), (other - want).norm()
            assert ours <= 8 * theirs + 4 * BFLOAT16_UNIT * want.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["prelu", "dice"])
@pytest.mark.parametrize("own_values", [False, True])
def test_gradients_only_where_needed(mode, activation, own_values, poisoned_empty):
    """Any one leaf alone gets the bits that it gets together with all others, and the others get nothing."""
    arguments, options = problem(
        [45, 3, 0], [3, 0, 2], 5, 7 if own_values else None, (9, 6), dice=activation == "dice", dtype=torch.float32
    )
    query, keys, offsets, weights = arguments
    dice, training = options.pop("dice", None), activation == "dice"
    values = options.pop("values", None)
    names = ["query", "keys", *DINWeights._fields]
    tensors = dict(zip(names, (query, keys, *weights), strict=True))
    if own_values:
        tensors["values"] = values
    if dice is not None:
        del tensors["slope"]
        tensors |= {"alpha": dice.alpha, "gain": dice.gain, "shift": dice.shift}

    def run(wanted):
        leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in tensors.items()}
        own = DINWeights(*(leaves.get(name) for name in DINWeights._fields))
        given = None if dice is None else dice._replace(**{name: leaves[name] for name in ("alpha", "gain", "shift")})
        call = {**options, "mode": mode, "activation": activation, "dice": given, "training": training}
        out = ops.din_attention(leaves["query"], leaves["keys"], offsets, own, values=leaves.get("values"), **call)
        out = out[0] if training else out
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        return {name: x.grad for name, x in leaves.items()}

    together = run(list(tensors))
    for name in tensors:
        alone = run([name])
        assert torch.equal(alone.pop(name), together[name]), name
        assert all(gradient is None for gradient in alone.values())


def test_opcheck(opcheck):
    opcheck(REGISTRY["din_attention"])
    opcheck(REGISTRY["din_attention_backward"])


def test_compiles_in_one_graph():
    arguments, options = problem([4, 0, 9], None, 4, None)
    compiled = torch.compile(ops.din_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments, **options), ops.din_attention(*arguments, **options))


@pytest.mark.parametrize("mode", MODES)
def test_threads_change_no_bit(mode):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 90, (70,), generator=generator).tolist()
    arguments, options = problem(lengths, None, 24, 10, (31, 19))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(arguments, {**options, "mode": mode})
        torch.set_num_threads(3)
        three = gradients(arguments, {**options, "mode": mode})
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("own_values", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [16, 21])
def test_one_user_with_many_candidates_spreads_over_threads(dim, dtype, own_values, poisoned_empty):
    """Backward cuts such a user, in a way that changes no bit with the threads and only rounding with the cut."""
    arguments, options = problem(
        [3, 60, 2], [2, 900, 1], dim, 10 if own_values else None, (15, 6), dtype=dtype, dice=True
    )
    options["training"] = True
    before = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(gradients(arguments, options))
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))
    if dtype == torch.float64:
        exact = gradients(arguments, options, form=ops.din_attention.reference)
        for have, want in zip(answers[0], exact, strict=True):
            assert (have - want).norm() <= 1e-10 * (1 + want.norm())


def cut(lengths, candidates, partial, block):
    end = torch.tensor(lengths).cumsum(0)
    begin = end - torch.tensor(lengths)
    rows = offsets_of(candidates)
    return _C.din_attention_cut(len(lengths), begin.data_ptr(), end.data_ptr(), rows.data_ptr(), partial, block)


def test_cut_of_more_pairs_than_32_bits_count():
    pairs, borders = cut([2**21, 5, 2**20], [2**20, 7, 2**21], 20_000, 16)
    assert pairs == 2**42 + 35
    assert len(borders) == 65
    assert borders[0] == 0
    assert borders[-1] == 2**20 + 7 + 2**21
    first, last = 2**20, 2**20 + 7
    costs = [((2**21 + 4) * min(b, first) + (2**20 + 4) * max(b - last, 0)) / 2**42 for b in borders]
    assert all(abs(b - a - 1 / 64) < 1e-4 for a, b in pairwise(costs))
    assert all(b % 16 == 0 for b in borders if b <= first)
    assert all((b - last) % 16 == 0 for b in borders if last <= b)


@given(
    users=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40)), max_size=20),
    partial=st.integers(1, 40_000),
    block=st.integers(1, 30),
)
@example(users=[(438, 3)], partial=329, block=1)  # 329 / 4, rounded down, allowed one part too many
@settings(max_examples=60)
def test_cut_covers_all_candidates(users, partial, block):
    lengths, candidates = [n for n, _ in users], [c for _, c in users]
    pairs, borders = cut(lengths, candidates, partial, block) if users else (0, [0, 0])
    assert pairs == sum(n * c for n, c in users)
    assert borders == sorted(borders)
    assert (borders[0], borders[-1]) == (0, sum(candidates))
    # Memory: at most eight parts, or 16 bytes a pair in what the parts hold.
    assert len(borders) - 1 <= max(8, pairs * 16 / (partial * 4), 1)
    starts = offsets_of(candidates).tolist()
    for border in borders:
        user = max(i for i, start in enumerate(starts) if start <= border)
        # Within a user every piece has at least a block.
        inside = border - starts[user]
        assert inside == 0 or (inside >= block and starts[user + 1] - border >= block)


def test_positions_beyond_32_bits():
    """Rows of one bfloat16, 2^31 of them before the ones that are read; memory that nobody touches is not there."""
    total = 2**31 + 100
    try:
        unreserved = getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, 2 * total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)
    except (OSError, AttributeError) as error:
        pytest.skip(f"4 GiB of address space cannot be had: {error}")
    keys = torch.frombuffer(memory, dtype=torch.bfloat16)[:total].view(total, 1)
    (query, tail, _, weights), _ = problem([100], [3], 1, None, (5, 3), dtype=torch.bfloat16)
    keys[-100:] = tail
    offsets, rows = torch.tensor([0, total - 100, total]), torch.tensor([0, 0, 3])
    weights = DINWeights(*(w.requires_grad_() for w in weights))

    def run(keys, offsets, rows):
        out = ops.din_attention(query, keys, offsets, weights, candidate_offsets=rows)
        return [out, *torch.autograd.grad(out.float().square().sum(), list(weights))]

    wanted = run(tail, torch.tensor([0, 100]), torch.tensor([0, 3]))
    assert all(torch.equal(a, b) for a, b in zip(run(keys, offsets, rows), wanted, strict=True))


MEMORY = """
import resource, sys
import torch
from recfast import ops

torch.set_num_threads(2)
torch.manual_seed(0)
users, length, candidates, dim = (int(x) for x in sys.argv[1:5])
dtype = getattr(torch, sys.argv[5])
shapes = [(4 * dim, 80), (80,), (80, 40), (40,), (40, 1), (1,)]
weights = ops.DINWeights(*(torch.randn(s).requires_grad_() for s in shapes), torch.tensor([0.25, 0.1]).requires_grad_())

def step(users, length, candidates):
    query = torch.randn(users * candidates, dim).to(dtype).requires_grad_()
    keys = torch.randn(users * length, dim).to(dtype).requires_grad_()
    offsets, rows = torch.arange(users + 1) * length, torch.arange(users + 1) * candidates
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = ops.din_attention(query, keys, offsets, weights, candidate_offsets=rows, mode="softmax")
    out.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

step(2, 50, 40)
step(1, 50, 40)
print(step(users, length, candidates) * 1024 / (users * length * candidates))
"""


@pytest.mark.parametrize("shape", [(4, 1000, 100), (1, 1000, 500), (40, 500, 20)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extra_memory_is_a_few_bytes_a_pair(shape, dtype):
    """Peak of a process over its inputs, the gradients it returns among it; the concatenation takes 2000 bytes."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", MEMORY, *map(str, shape), "64", dtype]
    bytes_a_pair = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert bytes_a_pair <= 32


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_histories_too_short_to_fold(length, isa_levels):
    """On both sides of the border: within rounding of the published form, and the same for one and many candidates."""
    arguments, options = problem([length] * 3, [1, 4, 2], 24, None, (80, 40))
    wanted = ops.din_attention.reference(*widened(arguments, options)[0], **options)
    bound = error_bound(arguments, options, "sum")
    for _ in isa_levels():
        assert torch.all((ops.din_attention(*arguments, **options) - wanted).abs() <= bound)


@pytest.mark.parametrize("mode", MODES)
def test_answer_knows_no_batch_mates(mode, isa_levels):
    (query, keys, offsets, weights), options = problem([23, 90, 2], [2, 3, 1], 17, None, (33, 9))
    for _ in isa_levels():
        together = ops.din_attention(query, keys, offsets, weights, mode=mode, **options)
        users = torch.arange(3).repeat_interleave(options["candidate_offsets"].diff())
        for c, user in enumerate(users):
            history = keys[offsets[user] : offsets[user + 1]]
            alone = ops.din_attention(query[c : c + 1], history, offsets_of([len(history)]), weights, mode=mode)
            assert torch.equal(alone[0], together[c])


@pytest.mark.parametrize("mode", MODES)
def test_order_of_a_history_is_rounding(mode):
    (query, keys, offsets, weights), options = problem([50], [3], 12, 5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    options["mode"] = mode
    plain = ops.din_attention(query, keys, offsets, weights, **options)
    values = options.pop("values")
    mixed = ops.din_attention(query, keys[order], offsets, weights, values=values[order], **options)
    arguments = (query, keys, offsets, weights)
    bound = 2 * error_bound(arguments, {**options, "values": values}, mode)
    assert torch.all((plain - mixed).abs() <= bound)


@pytest.mark.parametrize("mode", MODES)
def test_shared_history_equals_copies(mode):
    (query, keys, offsets, weights), options = problem([9, 0, 31], [2, 1, 4], 8, None)
    shared = gradients((query, keys, offsets, weights), {**options, "mode": mode})
    users = torch.arange(3).repeat_interleave(options["candidate_offsets"].diff())
    copies = torch.cat([keys[offsets[user] : offsets[user + 1]] for user in users])
    lengths = offsets.diff()[users].tolist()
    copied = gradients((query, copies, offsets_of(lengths), weights), {"mode": mode})
    assert torch.equal(shared[0], copied[0])
    assert torch.equal(shared[1], copied[1])
    for a, b in zip(shared[3:], copied[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    back = torch.zeros_like(keys)
    position = torch.cat([torch.arange(offsets[user], offsets[user + 1]) for user in users])
    torch.testing.assert_close(shared[2], back.index_add(0, position, copied[2]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("own_values", [False, True])
def test_padded_equals_jagged(own_values, poisoned_empty):
    lengths = [3, 0, 7, 5]
    (query, keys, offsets, weights), options = problem(lengths, None, 6, 4 if own_values else None)
    store = torch.full((4, 9, 6), float("nan"))
    value_store = torch.full((4, 9, 4), float("nan"))
    for b, length in enumerate(lengths):
        store[b, :length] = keys[offsets[b] : offsets[b + 1]]
        if own_values:
            value_store[b, :length] = options["values"][offsets[b] : offsets[b + 1]]
    jagged = gradients((query, keys, offsets, weights), options)
    # A view of the first 7 columns: not contiguous, and its padding is never read.
    for columns in (7, 9):
        padded_options = {"values": value_store[:, :columns]} if own_values else {}
        padded = gradients((query, store[:, :columns], torch.tensor(lengths), weights), padded_options)
        strided = ops.din_attention(query, store[:, :columns], torch.tensor(lengths), weights, **padded_options)
        assert torch.equal(jagged[0], padded[0])
        assert torch.equal(jagged[0], strided)
        for b, length in enumerate(lengths):
            assert torch.equal(padded[2][b, :length], jagged[2][offsets[b] : offsets[b + 1]])
            assert not padded[2][b, length:].any()
        # The query and every weight; keys (and values) have another shape.
        same = range(1, len(jagged) - own_values)
        assert all(torch.equal(jagged[i], padded[i]) for i in same if i != 2)


def test_strided_rows_are_read_in_place():
    (query, keys, offsets, weights), options = problem([4, 8], None, 5, 3)
    wide_keys, wide_query = torch.randn(12, 11), torch.randn(2, 9)
    wide_keys[:, 2:7], wide_query[:, 1:6] = keys, query
    values = options["values"].t().contiguous().t()  # columns side by side: copied, not misread
    answer = ops.din_attention(wide_query[:, 1:6], wide_keys[:, 2:7], offsets, weights, values=values)
    assert torch.equal(answer, ops.din_attention(query, keys, offsets, weights, values=options["values"]))


def test_nothing_of_candidates_by_history_is_stored():
    """Saved for backward: the arguments and the answer, no matter how many pairs there are."""
    arguments, options = problem([400], [50], 8, None)
    query, keys, offsets, weights = arguments
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ops.din_attention(query.requires_grad_(), keys, offsets, weights, **options)
    inputs = sum(x.numel() for x in (query, keys, offsets, *weights, options["candidate_offsets"]))
    assert 0 < sum(saved) <= inputs + query.numel()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"query": [1.0]}, TypeError, "din_attention: query must be a tensor, got list"),
        (
            {"query": torch.ones(2, 3, dtype=torch.int64)},
            TypeError,
            "query must be float32 or float64 or bfloat16, got int64",
        ),
        (
            {"query": torch.ones(3, 3)},
            ValueError,
            r"query must have one row a user \(2\) when candidate_offsets is left",
        ),
        ({"keys": torch.ones(5, 4)}, ValueError, r"keys must have shape \[T, 3\], got \[5, 4\]"),
        ({"keys": torch.ones(5, 3).double()}, TypeError, "keys must be float32, got float64"),
        ({"keys": torch.ones(4, 3)}, ValueError, r"offsets\[-1\] must be 4, the number of rows it cuts, got 5"),
        ({"values": torch.ones(4, 3)}, ValueError, r"values must have shape \[5, Dv\], got \[4, 3\]"),
        ({"offsets": torch.tensor([0, 7, 5])}, ValueError, r"offsets\[2\] = 5 is below offsets\[1\] = 7"),
        ({"offsets": torch.tensor([1, 2, 5])}, ValueError, r"offsets\[0\] must be 0, got 1"),
        ({"offsets": torch.tensor([0.0, 2, 5])}, TypeError, "offsets must be int32 or int64, got float32"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must have one entry more"),
        ({"candidate_offsets": torch.tensor([0, 1, 3])}, ValueError, r"candidate_offsets\[-1\] must be 2"),
        ({"candidate_offsets": torch.tensor([0, 2])}, ValueError, r"candidate_offsets must have shape \[3\]"),
        (
            {"keys": torch.ones(2, 4, 3), "offsets": torch.tensor([4, 5])},
            IndexError,
            r"lengths\[1\] = 5 is outside \[0, 5\)",
        ),
        ({"keys": torch.ones(2, 4, 3), "offsets": torch.tensor([4, -1])}, IndexError, r"lengths\[1\] = -1 is outside"),
        ({"activation": "gelu"}, ValueError, "activation must be one of prelu, relu, sigmoid, silu, dice, got 'gelu'"),
        ({"mode": "mean"}, ValueError, "mode must be one of sum, sigmoid, softmax, got 'mean'"),
        ({"w1": torch.ones(9, 6)}, ValueError, r"w1 must have shape \[12, H1\], got \[9, 6\]"),
        ({"b1": torch.ones(5)}, ValueError, r"b1 must have shape \[6\], got \[5\]"),
        ({"w2": None}, ValueError, "b2 must be None where w2 is None"),
        ({"b2": None}, TypeError, "b2 must be a tensor, got NoneType"),
        ({"w3": torch.ones(3)}, ValueError, r"w3 must have shape \[3, 1\], got \[3\]"),
        ({"slope": torch.ones(3)}, ValueError, r"slope must have shape \[2\], got \[3\]"),
        ({"w1": torch.ones(12, 257)}, ValueError, r"b1 must have shape \[257\], got \[6\]"),
        (
            {"w1": torch.ones(12, 257), "b1": torch.ones(257), "w2": None, "b2": None},
            ValueError,
            "din_attention: hidden widths must be at most 256, got 257",
        ),
        ({"query": torch.ones(2, 3).bfloat16()}, TypeError, "keys must be bfloat16, got float32"),
        ({"activation": "dice"}, ValueError, "activation 'dice' needs dice, a DiceWeights, got None"),
        ({"dice": DiceWeights(*[torch.ones(9)] * 3)}, ValueError, "dice must be None where activation is not 'dice'"),
        (
            {"activation": "dice", "dice": DiceWeights(*[torch.ones(8)] * 3)},
            ValueError,
            r"dice.alpha must have shape \[9\], got \[8\]",
        ),
        (
            {"activation": "dice", "dice": DiceWeights(*[torch.ones(9)] * 3, eps=-1.0)},
            ValueError,
            "dice.eps must be a finite number of at least 0, got -1.0",
        ),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    (query, keys, offsets, weights), _ = problem([2, 3], None, 3, None)
    named = {"query": query, "keys": keys, "offsets": offsets, **weights._asdict(), **change}
    weights = DINWeights(*(named.pop(name) for name in DINWeights._fields))
    with pytest.raises(error, match=sentence):
        ops.din_attention(named.pop("query"), named.pop("keys"), named.pop("offsets"), weights, **named)


def test_one_row_expanded_over_the_history():
    """Padded keys whose rows all are one row in memory."""
    generator = torch.Generator().manual_seed(4)
    row = torch.randn(3, 8, generator=generator)
    query = torch.randn(3, 8, generator=generator)
    weights = ops.DINWeights(
        torch.randn(32, 5, generator=generator), torch.zeros(5), None, None, torch.randn(5, 1, generator=generator),
        torch.zeros(1),
    )  # fmt: skip
    keys, lengths = row[:, None, :].expand(3, 4, 8), torch.tensor([4, 0, 3])
    assert torch.equal(
        ops.din_attention(query, keys, lengths, weights), ops.din_attention(query, keys.contiguous(), lengths, weights)
    )


def test_histories_of_one_row_with_any_strides():
    """A dimension of one may have any stride, 0 among them, in a tensor that torch calls contiguous."""
    (query, keys, _, weights), _ = problem([1, 1, 1], None, 8, None)
    lengths = torch.tensor([1, 0, 1])
    wanted = ops.din_attention(query, keys.view(3, 1, 8).clone(), lengths, weights)
    for view in (keys[:, None].expand(3, 4, 8)[:, :1], keys.as_strided((3, 1, 8), (8, 5, 1))):
        assert view.is_contiguous()
        assert torch.equal(ops.din_attention(query, view, lengths, weights), wanted)
        mixed = ops.din_attention(query, keys.view(3, 1, 8).clone(), lengths, weights, values=view)
        assert torch.equal(mixed, wanted)


@pytest.mark.parametrize("name", ["offsets", "candidate_offsets"])
def test_wild_offsets_are_seen(name):
    """Offsets whose steps pass 2^63 and come back as small positive numbers."""
    (query, keys, _, weights), _ = problem([5, 0, 0, 0], [5, 0, 0, 0], 3, None)
    wild = torch.tensor([0, 2**63 - 1, -(2**63), -1, 5])
    offsets = {"offsets": torch.tensor([0, 5, 5, 5, 5]), "candidate_offsets": torch.tensor([0, 5, 5, 5, 5]), name: wild}
    with pytest.raises(ValueError, match=rf"{name}\[2\] = -9223372036854775808 is below {name}\[1\]"):
        ops.din_attention(query, keys, offsets.pop("offsets"), weights, **offsets)
