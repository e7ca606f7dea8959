"""DIN's activation unit over jagged histories that a user's candidates share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from recfast.ops import _check
from recfast.ops._histories import check_candidates, histories, unit_rows
from recfast.ops._library import define, kernel

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_ACTIVATIONS = ("prelu", "relu", "sigmoid", "silu", "dice")  # in the order of din_attention.h, like the modes
_MODES = ("sum", "sigmoid", "softmax")
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_FORWARD = {dtype: kernel(f"din_attention_forward_{name}") for dtype, name in _NAMES.items()}
_BACKWARD = {dtype: kernel(f"din_attention_backward_{name}") for dtype, name in _NAMES.items()}
_FORWARD_SCRATCH = {dtype: kernel(f"din_attention_forward_scratch_{name}") for dtype, name in _NAMES.items()}
_BACKWARD_SCRATCH = {dtype: kernel(f"din_attention_backward_scratch_{name}") for dtype, name in _NAMES.items()}
_SLOPE = 0.25  # what torch.nn.PReLU starts from
_MAX_HIDDEN = 256


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What weights, statistics and sums are held in beside rows of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class DINWeights(NamedTuple):
    """The MLP of an activation unit: `4D -> H1 [-> H2] -> 1`.

    Attributes
    ----------
    w1 : Tensor [4D, H1]
        Rows in the order `q, k, q - k, q * k`.
    b1 : Tensor [H1]
    w2 : Tensor [H1, H2] or None
        None for one hidden layer, and so is `b2`.
    b2 : Tensor [H2] or None
    w3 : Tensor [H2, 1], or [H1, 1] for one hidden layer
    b3 : Tensor [1]
    slope : Tensor [number of hidden layers], or [1] for one slope in all of them, or None
        PReLU's slope below zero, one a layer; None means 0.25. Other activations ignore it.
    """

    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor | None
    b2: torch.Tensor | None
    w3: torch.Tensor
    b3: torch.Tensor
    slope: torch.Tensor | None = None


class DiceWeights(NamedTuple):
    """Dice in every hidden layer; W channels, those of the first layer before those of the second.

    .. math:: y = z (p + \\alpha (1 - p)), \\qquad
        p = \\sigma\\big(\\gamma (z - \\mu) / \\sqrt{v + \\epsilon} + \\beta\\big)

    Attributes
    ----------
    alpha : Tensor [H1 + H2], or [H1] for one hidden layer, as the others
    mean, variance : Tensor [W]
        The statistics :math:`\\mu` and v outside training; training has the batch's own.
    gain, shift : Tensor [W], optional
        :math:`\\gamma` and :math:`\\beta`, the affine part of DeepCTR's Dice. Left out: 1 and 0, as in the paper,
        FuxiCTR and TorchEasyRec.
    eps : float
        1e-9 as in FuxiCTR; TorchEasyRec has 1e-5, DeepCTR 1e-8.
    """

    alpha: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    eps: float = 1e-9


class _Call:
    """What a kernel reads: `fields`, as din_args in csrc/bindings takes them, and the tensors they point into."""

    def __init__(
        self, query, keys, values, offsets, candidate_offsets, *weights, activation, mode, eps, training
    ) -> None:
        # weights: w1, b1, w2, b2, w3, b3, slope, dice, statistics
        self.query = unit_rows(query)
        self.offsets = offsets.contiguous()
        self.candidate_offsets = None if candidate_offsets is None else candidate_offsets.contiguous()
        check_candidates("din_attention", self.candidate_offsets, query.shape[0])
        self.history = history = histories("din_attention", keys, values, self.offsets)
        self.arithmetic = _arithmetic(query.dtype)
        self.weights = [None if x is None else x.contiguous() for x in weights]
        rows, dim = query.shape
        w1, w2 = weights[0], weights[2]
        self.fields = (
            history.begin.numel(),
            dim,
            history.values.shape[-1],
            w1.shape[1],
            0 if w2 is None else w2.shape[1],
            _ACTIVATIONS.index(activation),
            _MODES.index(mode),
            training,
            eps,
            self.query.data_ptr(),
            rows,
            self.query.stride(0),
            history.keys.data_ptr(),
            history.keys.stride(-2),
            history.values.data_ptr(),
            history.values.stride(-2),
            values is not None,
            history.begin.data_ptr(),
            history.end.data_ptr(),
            _address(self.candidate_offsets),
            *map(_address, self.weights),
        )


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _outputs(query, keys, values, weights, activation, mode, training):
    width = (keys if values is None else values).shape[-1]
    arithmetic = _arithmetic(query.dtype)
    channels = weights[0].shape[1] + (0 if weights[2] is None else weights[2].shape[1])
    return (
        query.new_empty(query.shape[0], width),
        query.new_empty(query.shape[0] if mode == "softmax" else 0, dtype=arithmetic),
        query.new_empty((2, channels) if activation == "dice" and training else 0, dtype=arithmetic),
    )


def _cpu(query, keys, values, offsets, candidate_offsets, *rest):
    *weights, activation, mode, eps, training = rest
    options = {"activation": activation, "mode": mode, "eps": eps, "training": training}
    call = _Call(query, keys, values, offsets, candidate_offsets, *weights, **options)
    out, lse, statistics = _outputs(query, keys, values, weights, activation, mode, training)
    fields = (*call.fields, out.data_ptr(), lse.data_ptr(), statistics.data_ptr())
    scratch = torch.empty(_FORWARD_SCRATCH[query.dtype](fields), dtype=call.arithmetic)
    _FORWARD[query.dtype](fields, scratch.data_ptr())
    return out, lse, statistics


def _fake(query, keys, values, offsets, candidate_offsets, *rest):
    *weights, activation, mode, _, training = rest
    return _outputs(query, keys, values, weights, activation, mode, training)


# What has a gradient, by its place among the arguments, and what it is called.
_LEAVES = {
    0: "dquery",
    1: "dkeys",
    2: "dvalues",
    5: "dw1",
    6: "db1",
    7: "dw2",
    8: "db2",
    9: "dw3",
    10: "db3",
    11: "dslope",
    12: "ddice",
}


def _cpu_backward(grad, out, lse, batch_statistics, *rest):
    *arguments, needs = rest
    *tensors, activation, mode, eps, training = arguments
    query, keys, values = tensors[:3]
    call = _Call(*tensors, activation=activation, mode=mode, eps=eps, training=training)
    history = call.history
    gradients: dict[str, torch.Tensor | None] = {}
    for (place, name), need in zip(_LEAVES.items(), needs, strict=True):
        x = tensors[place]
        if x is None or not need:
            gradients[name] = None
        elif place in (1, 2) and history.step is not None:
            # Padding lies outside every history, so no kernel writes it.
            gradients[name] = query.new_zeros(x.shape[0], history.step, x.shape[2])
        else:
            gradients[name] = torch.empty(x.shape, dtype=x.dtype)
    if values is None:
        gradients["dvalues"] = gradients["dkeys"]
    if activation != "prelu":
        gradients["dslope"] = None
    grad = grad.contiguous()
    saved = [out.contiguous(), lse.contiguous(), batch_statistics.contiguous()]
    fields = (*call.fields, *map(_address, saved))
    wanted = (grad.data_ptr(), *map(_address, gradients.values()))
    scratch = torch.empty(_BACKWARD_SCRATCH[query.dtype](fields, wanted), dtype=call.arithmetic)
    _BACKWARD[query.dtype](fields, wanted, scratch.data_ptr())
    if activation != "prelu" and needs[list(_LEAVES).index(11)]:
        gradients["dslope"] = torch.zeros_like(tensors[11], memory_format=torch.contiguous_format)
    if values is None:
        gradients["dvalues"] = None
    if history.step is not None:
        for name in ("dkeys", "dvalues"):
            if gradients[name] is not None:
                gradients[name] = gradients[name][:, : keys.shape[1]].contiguous()
    absent = {True: query.new_empty(0), False: query.new_empty(0, dtype=call.arithmetic)}
    # Each output is a tensor of its own, as torch demands of ops.
    return tuple(
        absent[place < 3].clone() if gradients[name] is None else gradients[name] for place, name in _LEAVES.items()
    )


def _fake_backward(grad, out, lse, batch_statistics, *rest):
    *arguments, needs = rest
    query = arguments[0]

    def like(place: int, need: bool) -> torch.Tensor:
        x = arguments[place]
        dtype = query.dtype if place < 3 else _arithmetic(query.dtype)
        return query.new_empty(0 if x is None or not need else x.shape, dtype=dtype)

    return tuple(like(place, need) for place, need in zip(_LEAVES, needs, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.mode, ctx.eps, ctx.training = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: torch.Tensor, *_):
    saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[place] for place in _LEAVES]
    gradients = _backward_op(grad, *saved, ctx.activation, ctx.mode, ctx.eps, ctx.training, needs)
    answer: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
    for place, need, gradient in zip(_LEAVES, needs, gradients, strict=True):
        if need and saved[3 + place] is not None:
            answer[place] = gradient
    return tuple(answer)


def _layer(z: torch.Tensor, activation: str, slope: torch.Tensor, dice: torch.Tensor | None, mean, variance, eps):
    if activation == "prelu":
        return torch.nn.functional.prelu(z, slope.reshape(1))
    if activation == "dice":
        p = torch.sigmoid((z - mean) / torch.sqrt(variance + eps) * dice[1] + dice[2])
        return z * (p + dice[0] * (1 - p))
    return {"relu": torch.relu, "sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu}[activation](z)


def _published(*arguments):
    """`(out, lse, statistics)` in plain torch: one row of four copies for each pair of a candidate and a position."""
    return unfused(*arguments)


def unfused(query, keys, values, offsets, candidate_offsets, *rest, normalize=None, drop=None):
    """What `din_attention` computes, written out: `(out, lse, statistics)` of prepared arguments.

    Takes what the fused form cannot: `normalize(layer, z)` before each activation and `drop(h)` after it.
    """
    w1, b1, w2, b2, w3, b3, slope, dice, statistics, activation, mode, eps, training = rest
    dtype = query.dtype
    wide = _arithmetic(dtype)
    query, keys, values = (None if x is None else x.to(wide) for x in (query, keys, values))
    values = keys if values is None else values
    if keys.dim() == 3:
        begin = torch.arange(keys.shape[0], device=keys.device) * keys.shape[1]
        lengths = offsets
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    else:
        begin, lengths = offsets[:-1], offsets[1:] - offsets[:-1]
    users = torch.arange(lengths.numel(), device=query.device)
    if candidate_offsets is not None:
        users = users.repeat_interleave(candidate_offsets[1:] - candidate_offsets[:-1])
    lengths = lengths[users].long()
    candidate = torch.arange(query.shape[0], device=query.device).repeat_interleave(lengths)
    within = torch.arange(candidate.numel(), device=query.device) - (lengths.cumsum(0) - lengths)[candidate]
    position = begin[users][candidate] + within

    q, k, v = query[candidate], keys[position], values[position]
    hidden = torch.cat([q, k, q - k, q * k], dim=-1)
    used = []
    first = 0
    for layer, (w, b) in enumerate([(w1, b1)] if w2 is None else [(w1, b1), (w2, b2)]):
        z = hidden @ w + b
        if normalize is not None:
            z = normalize(layer, z)
        own, mean, variance = None, None, None
        if activation == "dice":
            channels = slice(first, first + w.shape[1])
            own, (mean, variance) = dice[:, channels], statistics[:, channels]
            if training and len(z) >= 2:
                mean, variance = z.mean(0), z.var(0, unbiased=False)
            used.append(torch.stack([mean, variance]).detach())
            first += w.shape[1]
        hidden = _layer(z, activation, slope[layer], own, mean, variance, eps)
        if drop is not None:
            hidden = drop(hidden)
    score = (hidden @ w3.reshape(-1, 1) + b3).squeeze(-1)
    lse = query.new_empty(0)
    if mode == "sigmoid":
        score = torch.sigmoid(score)
    elif mode == "softmax":
        rows = query.shape[0]
        highest = torch.zeros(rows, dtype=score.dtype, device=score.device)
        highest = highest.scatter_reduce(0, candidate, score.detach(), "amax", include_self=False)
        total = torch.zeros_like(highest).index_add(0, candidate, torch.exp(score - highest[candidate]))
        lse = highest + torch.log(torch.where(lengths > 0, total, 1))
        score = torch.exp(score - lse[candidate])
    out = query.new_zeros(query.shape[0], v.shape[-1]).index_add(0, candidate, score.unsqueeze(-1) * v)
    return out.to(dtype), lse, torch.cat(used, dim=1) if used and training else query.new_empty(0)


def prepare(op_query, keys, offsets, weights, values, candidate_offsets, activation, mode, dice, training):
    """Check everything that can be known without reading data, and complete what was left out."""
    op = "din_attention"
    query = _check.tensor(op, "query", op_query, dtypes=_DTYPES, shape=["Nc", "D"])
    like = {"dtypes": [query.dtype], "device": query.device}
    inner = {"dtypes": [_arithmetic(query.dtype)], "device": query.device}
    dim = query.shape[1]
    padded = isinstance(keys, torch.Tensor) and keys.dim() == 3
    _check.tensor(op, "keys", keys, shape=["B", "L", dim] if padded else ["T", dim], **like)
    if values is not None:
        _check.tensor(op, "values", values, shape=[*keys.shape[:-1], "Dv"], **like)
    sizes = [keys.shape[0]] if padded else ["B + 1"]
    offsets = _check.index(op, "lengths" if padded else "offsets", offsets, shape=sizes, device=query.device)
    if not padded and offsets.numel() == 0:
        raise ValueError(f"{op}: offsets must have one entry more than there are lists, got none")
    users = offsets.numel() if padded else offsets.numel() - 1
    if candidate_offsets is not None:
        candidate_offsets = _check.index(
            op, "candidate_offsets", candidate_offsets, shape=(users + 1,), device=query.device
        )
    elif query.shape[0] != users:
        raise ValueError(
            f"{op}: query must have one row a user ({users}) when candidate_offsets is left out, got {query.shape[0]}"
        )
    _check.choice(op, "activation", activation, _ACTIVATIONS)
    _check.choice(op, "mode", mode, _MODES)

    weights = DINWeights(*weights)
    w1 = _check.tensor(op, "w1", weights.w1, shape=[4 * dim, "H1"], **inner)
    head, layers = w1.shape[1], 1
    _check.at_least(op, "w1.shape[1]", head, 1)
    _check.tensor(op, "b1", weights.b1, shape=(head,), **inner)
    channels = widest = head
    if weights.w2 is not None:
        w2 = _check.tensor(op, "w2", weights.w2, shape=[head, "H2"], **inner)
        _check.at_least(op, "w2.shape[1]", w2.shape[1], 1)
        head, layers = w2.shape[1], 2
        channels, widest = channels + head, max(widest, head)
        _check.tensor(op, "b2", weights.b2, shape=(head,), **inner)
    elif weights.b2 is not None:
        raise ValueError(f"{op}: b2 must be None where w2 is None")
    if widest > _MAX_HIDDEN:
        raise ValueError(f"{op}: hidden widths must be at most {_MAX_HIDDEN}, got {widest}")
    _check.tensor(op, "w3", weights.w3, shape=(head, 1), **inner)
    _check.tensor(op, "b3", weights.b3, shape=(1,), **inner)
    slope = weights.slope
    if slope is None:
        slope = w1.new_full((layers,), _SLOPE)
    elif isinstance(slope, torch.Tensor) and slope.numel() == 1:
        slope = slope.reshape(1).expand(layers)
    _check.tensor(op, "slope", slope, shape=(layers,), **inner)
    parameters = statistics = None
    eps = 0.0
    if activation == "dice":
        if dice is None:
            raise ValueError(f"{op}: activation 'dice' needs dice, a DiceWeights, got None")
        dice = DiceWeights(*dice)
        for name, value in zip(DiceWeights._fields[:5], dice[:5], strict=True):
            if value is not None or name in ("alpha", "mean", "variance"):
                _check.tensor(op, f"dice.{name}", value, shape=(channels,), **inner)
        eps = float(dice.eps)
        if not 0 <= eps < float("inf"):
            raise ValueError(f"{op}: dice.eps must be a finite number of at least 0, got {dice.eps}")
        gain = torch.ones_like(dice.alpha, requires_grad=False) if dice.gain is None else dice.gain
        shift = torch.zeros_like(dice.alpha, requires_grad=False) if dice.shift is None else dice.shift
        parameters = torch.stack([dice.alpha, gain, shift])
        statistics = torch.stack([dice.mean, dice.variance]).detach()
    elif dice is not None:
        raise ValueError(f"{op}: dice must be None where activation is not 'dice'")
    tensors = (query, keys, values, offsets, candidate_offsets, *weights[:6], slope, parameters)
    return *tensors, statistics, activation, mode, eps, bool(training)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, gradient: bool) -> torch.Tensor:
        return torch.randn(size, generator=generator).requires_grad_(gradient)

    cases = [
        ("sum", "prelu", True, torch.float32),
        ("softmax", "silu", False, torch.float32),
        ("sigmoid", "sigmoid", True, torch.float32),
        ("sum", "relu", False, torch.float32),
        ("softmax", "dice", True, torch.float32),
        ("sum", "dice", False, torch.float32),
        # Short histories and one layer: nothing inside is rounded to bfloat16, so it may be held against plain torch.
        ("sigmoid", "prelu", False, torch.bfloat16),
    ]
    for gradient in (False, True):
        for mode, activation, two, dtype in cases:
            dim, hidden1, hidden2 = 5, 6, 3
            offsets = torch.tensor([0, 2, 2, 4] if dtype == torch.bfloat16 else [0, 4, 4, 11])
            steps = int(offsets[-1])
            shared = mode != "sum"
            rows = 5 if shared else 3
            channels = hidden1 + two * hidden2
            dice = activation == "dice"
            yield (
                random(rows, dim, gradient=False).to(dtype).requires_grad_(gradient),
                random(steps, dim, gradient=False).to(dtype).requires_grad_(gradient),
                random(steps, 7, gradient=False).to(dtype).requires_grad_(gradient) if shared else None,
                offsets,
                torch.tensor([0, 2, 3, 5]) if shared else None,
                random(4 * dim, hidden1, gradient=gradient),
                random(hidden1, gradient=gradient),
                random(hidden1, hidden2, gradient=gradient) if two else None,
                random(hidden2, gradient=gradient) if two else None,
                random(hidden2 if two else hidden1, 1, gradient=gradient),
                random(1, gradient=gradient),
                torch.full((1 + two,), 0.25).requires_grad_(gradient),
                random(3, channels, gradient=gradient) if dice else None,
                random(2, channels, gradient=False).abs() if dice else None,
                activation,
                mode,
                1e-5 if dice else 0.0,
                two and dice,
            )


def _samples_backward() -> Iterator[tuple]:
    for arguments in _samples():
        inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        output = _op(*inputs)
        for needs in ([True] * len(_LEAVES), [place in (1, 5) for place in _LEAVES]):
            yield (torch.ones_like(output[0]), *output, *inputs, needs)


_ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor? values, Tensor offsets, Tensor? candidate_offsets, Tensor w1, Tensor b1, "
    "Tensor? w2, Tensor? b2, Tensor w3, Tensor b3, Tensor slope, Tensor? dice, Tensor? statistics, "
    "str activation, str mode, float eps, bool training"
)
_op = define(
    f"din_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_published,
)
_backward_op = define(
    f"din_attention_backward(Tensor grad, Tensor out, Tensor lse, Tensor batch_statistics, {_ARGUMENTS}, bool[] needs) "
    f"-> ({', '.join(['Tensor'] * len(_LEAVES))})",
    cpu=_cpu_backward,
    fake=_fake_backward,
    samples=_samples_backward,
)


def _answer(output: tuple[torch.Tensor, ...], activation: str, training: bool):
    return (output[0], output[2]) if activation == "dice" and training else output[0]


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    offsets: torch.Tensor,
    weights: DINWeights,
    *,
    values: torch.Tensor | None = None,
    candidate_offsets: torch.Tensor | None = None,
    activation: str = "prelu",
    mode: str = "sum",
    dice: DiceWeights | None = None,
    training: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The published form in plain torch, with `[q, k, q - k, q * k]` written out for every pair."""
    arguments = prepare(query, keys, offsets, weights, values, candidate_offsets, activation, mode, dice, training)
    return _answer(_published(*arguments), activation, training)


def din_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    offsets: torch.Tensor,
    weights: DINWeights,
    *,
    values: torch.Tensor | None = None,
    candidate_offsets: torch.Tensor | None = None,
    activation: str = "prelu",
    mode: str = "sum",
    dice: DiceWeights | None = None,
    training: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """DIN's activation unit: weigh what a user did by how it bears on a candidate, and add it up.

    .. math::
        s_{cl} = \\mathrm{MLP}([q_c, k_l, q_c - k_l, q_c \\odot k_l]), \\qquad
        o_c = \\sum_l p_{cl} v_l, \\qquad p = s,\\ \\sigma(s)\\ \\text{or}\\ \\mathrm{softmax}_l(s)

    The candidate is folded into the first layer, so nothing of size candidates x history x width is ever stored;
    backward computes the layers again.

    Parameters
    ----------
    query : Tensor [Nc, D], float32, float64 or bfloat16
        The candidates.
    keys : Tensor [T, D], or padded [B, L, D]
        The histories. Rows may lie apart (a strided view is not copied).
    offsets : Tensor [B + 1], int32 or int64
        User b owns rows `offsets[b] : offsets[b + 1]`. For padded keys: the lengths, [B], each in [0, L].
    weights : DINWeights
        One or two hidden layers of at most 256 units. float32 beside bfloat16 rows, else of their dtype.
    values : Tensor [T, Dv] or [B, L, Dv], optional
        What is added up; the keys themselves when left out.
    candidate_offsets : Tensor [B + 1], int32 or int64, optional
        User b's candidates are rows `candidate_offsets[b] : candidate_offsets[b + 1]` of `query`; left out, each user
        has one (Nc = B).
    activation : {"prelu", "relu", "sigmoid", "silu", "dice"}
        Of the hidden layers.
    mode : {"sum", "sigmoid", "softmax"}
        How scores become weights. The paper uses "sum".
    dice : DiceWeights, only with activation "dice"
    training : bool
        Dice takes mean and biased variance from all (candidate, position) pairs of this call, and gradients flow
        through them; padding is not counted, unlike in the libraries that run the unit over padded tensors. The answer
        for a candidate then does depend on the rest of the batch. With fewer than two pairs the given statistics
        serve. Other activations ignore it.

    Returns
    -------
    Tensor [Nc, Dv], dtype of `query`. Rows of 0 where the history is empty, in every mode. With Dice in training a
    pair: that, and the statistics used, [2, H1 + H2]: mean and biased variance.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes or devices differ, a hidden width above 256, offsets that do not start at 0, fall, or do not end at the
        number of rows.
    IndexError
        A length outside [0, L].

    Notes
    -----
    Accumulates in the dtype of the weights, every sum in one fixed order: the answer for a candidate does not depend
    on the rest of the batch (but for Dice in training) or on the number of threads, and AVX2 and AVX-512 give equal
    bits; the scalar form rounds products and sums apart (no FMA) and differs in the last bits. Folding
    `Wk - Wd + diag(q) Wp` first changes the rounding of layer 1: its error is at most `(2 D + 6) eps` times the sum of
    the absolute terms. Histories of up to four rows (two in bfloat16) are not folded, since that would cost more than
    it saves.
    bfloat16: float32 inside; where the processor has AVX-512 BF16 the folded weights, `w2` and the first layer's
    activations are rounded to bfloat16 once, which costs up to 2^-8 of each term; elsewhere only the answer is rounded.
    Dice in training goes through the histories once more for each layer forward, and once more for each backward.
    Differentiable (once) in `query`, `keys`, `values`, all weights, and Dice's alpha, gain and shift; what needs no
    gradient costs none. Memory beside the gradients: at most 32 bytes a pair of a candidate and a position once there
    are many, and less than a MB a thread and a part of the batch (at most 64 parts); where rows are bfloat16 or their
    width is no multiple of 16, also one copy a thread of the longest history that candidates share.
    Backends: CPU (scalar, AVX2, AVX-512, AVX-512 BF16).

    References
    ----------
    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.
    """
    arguments = prepare(query, keys, offsets, weights, values, candidate_offsets, activation, mode, dice, training)
    return _answer(_op(*arguments), activation, training)


din_attention.reference = reference
