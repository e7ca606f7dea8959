"""HSTU's pointwise attention over jagged sequences, with biases of position and of time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from recfast.ops import _check
from recfast.ops._histories import empty_rows, place, sequences, unit_rows
from recfast.ops._library import define, kernel

_OP = "hstu_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
_FORWARD = {dtype: kernel(f"hstu_attention_forward_{name}") for dtype, name in _NAMES.items()}
_BACKWARD = {dtype: kernel(f"hstu_attention_backward_{name}") for dtype, name in _NAMES.items()}
_FORWARD_SCRATCH = kernel("hstu_attention_forward_scratch")
_BACKWARD_SCRATCH = kernel("hstu_attention_backward_scratch")
_BUCKETS = ("log", "sqrt")
_LOG_STEP = 0.301  # of the natural logarithm, as published
_SQRT_UNIT = 60  # seconds, as in the production program
_MOST_BUCKETS = 65535


@functools.cache
def _thresholds(kind: str, buckets: int) -> torch.Tensor:
    """Where each bucket begins, [at most buckets + 1] of uint64 kept in int64: the least integer of that bucket.

    Buckets that no difference of two int64 reaches are left out.
    """
    if kind == "sqrt":
        least = [_SQRT_UNIT * bucket**2 for bucket in range(buckets + 1)]
    else:
        least = [0]
        for bucket in range(1, min(buckets, 148) + 1):
            # Near the border, the first integer that the float64 formula puts into the bucket or beyond.
            x = max(int(math.exp(bucket * _LOG_STEP) * (1 - 1e-12)) - 2, 1)
            high = int(math.exp(bucket * _LOG_STEP) * (1 + 1e-12)) + 2
            while x < high:
                middle = (x + high) // 2
                if math.floor(math.log(middle) / _LOG_STEP) >= bucket:
                    high = middle
                else:
                    x = middle + 1
            least.append(x)
    return torch.tensor([x - 2**64 if x >= 2**63 else x for x in least if x < 2**64], dtype=torch.int64)


def _check_values(lengths: torch.Tensor, num_targets, contextual, covered: int | None) -> None:
    """Check what only the data can tell; `covered`: rows that a position bias, if any, covers."""
    if num_targets is not None:
        wrong = (num_targets < 0) | (num_targets > lengths)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise _check.outside(_OP, "num_targets", at, int(num_targets[at]), int(lengths[at]) + 1)
    if contextual is not None and bool((contextual < 0).any()):
        at = int((contextual < 0).nonzero()[0])
        raise ValueError(f"{_OP}: contextual[{at}] must be at least 0, got {int(contextual[at])}")
    if covered is not None and bool((lengths > covered).any()):
        at = int((lengths > covered).nonzero()[0])
        raise ValueError(
            f"{_OP}: sequence {at} must have at most max_length = {covered} rows, which the position bias covers, "
            f"got {int(lengths[at])}"
        )


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _arguments(
    q, k, v, offsets, num_targets, contextual, timestamps, position_bias, time_bias, buckets, max_length, alpha, causal,
    window,
):  # fmt: skip
    """Addresses and sizes for the kernel, and the tensors that must live as long as it runs."""
    q, k, v, offsets = unit_rows(q), unit_rows(k), unit_rows(v), offsets.contiguous()
    where, _ = sequences(_OP, q, offsets)
    lengths = offsets.diff() if q.dim() == 3 else offsets
    _check_values(lengths, num_targets, contextual, None if position_bias is None else max_length)
    tensors = {
        "num_targets": num_targets,
        "contextual": contextual,
        "position_bias": position_bias,
        "time_bias": time_bias,
        "thresholds": None if time_bias is None else _thresholds(buckets, time_bias.numel() - 1),
        "tasks": offsets.new_empty(2 * (lengths.numel() + 1)),
    }
    tensors = {name: None if x is None else x.contiguous() for name, x in tensors.items()}
    numbers = {
        "heads": q.shape[-2],
        "dim": q.shape[-1],
        "value_dim": v.shape[-1],
        "max_length": max_length,
        "buckets": -1 if time_bias is None else time_bias.numel() - 1,
        "borders": 0 if time_bias is None else tensors["thresholds"].numel(),
        "position_heads": 0 if position_bias is None else position_bias.numel() // (2 * max_length - 1),
        "causal": int(causal),
        "window": window,
        "alpha": alpha,
    }
    addresses = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}
    # A time is one value of the only head.
    times = None if timestamps is None else timestamps[..., None, None]
    places = {**place("q", q), **place("k", k), **place("v", v), **place("timestamps", times)}
    return {**where, **numbers, **addresses, **places}, (q, k, v, offsets, timestamps, *tensors.values())


def _cpu(q, k, v, *rest):
    arguments, _alive = _arguments(q, k, v, *rest)
    out = empty_rows(v)
    scratch = q.new_empty(_FORWARD_SCRATCH(**arguments), dtype=_computed_in(q.dtype))
    _FORWARD[q.dtype](**arguments, **place("out", out), scratch=scratch.data_ptr())
    return out


def _fake(q, k, v, *_rest):
    return v.new_empty(v.shape)


def _cpu_backward(grad, wanted, q, k, v, *rest):
    arguments, _alive = _arguments(q, k, v, *rest)
    grad = unit_rows(grad)
    position_bias, time_bias = rest[4:6]
    rows = zip((q, k, v), wanted[:3], strict=True)
    biases = zip((position_bias, time_bias), wanted[3:], strict=True)
    gradients = [
        *(empty_rows(x) if want else None for x, want in rows),
        *(x.new_empty(x.shape) if want else None for x, want in biases),
    ]
    dq, dk, dv, dposition, dtime = gradients
    scratch = q.new_empty(_BACKWARD_SCRATCH(q.dtype == torch.bfloat16, **arguments), dtype=_computed_in(q.dtype))
    places = {**place("grad", grad), **place("out", None), **place("dq", dq), **place("dk", dk), **place("dv", dv)}
    _BACKWARD[q.dtype](
        **arguments,
        **places,
        dposition=0 if dposition is None else dposition.data_ptr(),
        dtime=0 if dtime is None else dtime.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    return tuple(q.new_empty(0) if x is None else x for x in gradients)


def _fake_backward(grad, wanted, q, k, v, offsets, num_targets, contextual, timestamps, position_bias, time_bias, *_):
    tensors = (q, k, v, position_bias, time_bias)
    return tuple(x.new_empty(x.shape) if want else q.new_empty(0) for x, want in zip(tensors, wanted, strict=True))


_DIFFERENTIABLE = (0, 1, 2, 7, 8)  # which arguments of the op


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _backward(ctx, grad: torch.Tensor):
    wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    gradients = _backward_op(grad, wanted, *ctx.saved_tensors, *ctx.options)
    answer: list[torch.Tensor | None] = [None] * 14
    for i, want, gradient in zip(_DIFFERENTIABLE, wanted, gradients, strict=True):
        answer[i] = gradient if want else None
    return tuple(answer)


def mask(
    lengths: torch.Tensor,
    size: int,
    *,
    causal: bool = True,
    num_targets: torch.Tensor | None = None,
    contextual: torch.Tensor | int | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """What each row sees, as the published program works it out.

    Parameters
    ----------
    lengths : int64 [B]
    size : int
        At least the longest length.
    causal, num_targets, contextual, window
        As for `hstu_attention`.

    Returns
    -------
    bool Tensor [B, size, size], False outside the sequences.
    """
    place = torch.arange(size, device=lengths.device)
    targets = torch.zeros_like(lengths) if num_targets is None else num_targets
    if contextual is None:
        contextual = 0
    prefix = torch.minimum(torch.as_tensor(contextual, device=lengths.device), lengths - targets)
    shift = (prefix - 1).clamp(min=0)
    highest = lengths - targets - shift
    ids = torch.minimum((place - shift.unsqueeze(1)).clamp(min=0), highest.unsqueeze(1))
    row, column = ids.unsqueeze(2), ids.unsqueeze(1)
    distance = row - column if causal else (row - column).abs()
    seen = distance > 0
    if window is not None:
        seen &= distance <= window
    seen = seen | torch.eye(size, dtype=torch.bool, device=lengths.device)
    seen |= (prefix > 0).view(-1, 1, 1) & (row == 0) & (column < highest.view(-1, 1, 1))
    inside = place < lengths.unsqueeze(1)
    return seen & inside.unsqueeze(1) & inside.unsqueeze(2)


def bucket(difference: torch.Tensor, buckets: int, kind: str = "log") -> torch.Tensor:
    """The bucket of each difference in time, by the formula of `hstu_attention` in float64."""
    x = difference.abs().double()
    place = torch.log(x.clamp(min=1)) / _LOG_STEP if kind == "log" else torch.sqrt(x / _SQRT_UNIT)
    return place.long().clamp(0, buckets)


def _published(
    q, k, v, offsets, num_targets, contextual, timestamps, position_bias, time_bias, buckets, max_length, alpha, causal,
    window,
):  # fmt: skip
    """The padded form in plain torch, with [B, H, L, L] written out."""
    dtype = q.dtype
    if dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    jagged = q.dim() == 3
    lengths = offsets[1:] - offsets[:-1] if jagged else offsets
    size = q.shape[1] if not jagged else int(lengths.max()) if lengths.numel() else 0
    place = torch.arange(size, device=q.device)
    inside = place < lengths.unsqueeze(1)
    if jagged:

        def padded(x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(lengths.numel(), size, *x.shape[1:]).index_put((inside,), x)

        q, k, v = padded(q), padded(k), padded(v)
        timestamps = None if timestamps is None else padded(timestamps)
    else:  # padding may hold anything, and 0 times anything is not 0
        q, k, v = (torch.where(inside[:, :, None, None], x, 0) for x in (q, k, v))
    z = alpha * torch.einsum("bihd,bjhd->bhij", q, k)
    if position_bias is not None:
        index = (place.unsqueeze(0) - place.unsqueeze(1) + max_length - 1).clamp(0, 2 * max_length - 2)
        z = z + position_bias[..., index]
    if time_bias is not None:
        following = torch.minimum(place + 1, (lengths - 1).clamp(min=0).unsqueeze(1))
        difference = timestamps.gather(1, following).unsqueeze(2) - timestamps.unsqueeze(1)
        z = z + time_bias[bucket(difference, time_bias.numel() - 1, buckets)].unsqueeze(1)
    seen = mask(
        lengths, size, causal=causal, num_targets=num_targets, contextual=contextual,
        window=None if window < 0 else window,
    )  # fmt: skip
    weights = torch.where(seen.unsqueeze(1), torch.nn.functional.silu(z) / max_length, 0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).to(dtype)
    return out[inside] if jagged else out


def _prepare(
    q, k, v, offsets, *, max_length, alpha, causal, num_targets, window, contextual, timestamps, position_bias,
    time_bias, time_buckets,
):  # fmt: skip
    """Check everything that can be known without reading data, and complete what was left out."""
    padded = isinstance(q, torch.Tensor) and q.dim() == 4
    _check.tensor(_OP, "q", q, dtypes=_DTYPES, shape=["B", "L", "H", "Dq"] if padded else ["T", "H", "Dq"])
    like = {"dtypes": [q.dtype], "device": q.device}
    _check.tensor(_OP, "k", k, shape=q.shape, **like)
    _check.tensor(_OP, "v", v, shape=[*q.shape[:-1], "Dv"], **like)
    heads = q.shape[-2]
    index = {"dtypes": _check.INDEX_DTYPES, "device": q.device}
    _check.tensor(_OP, "lengths" if padded else "offsets", offsets, shape=[q.shape[0] if padded else "B + 1"], **index)
    if not padded and offsets.numel() == 0:
        raise ValueError(f"{_OP}: offsets must have one entry more than there are sequences, got none")
    sequences = offsets.numel() if padded else offsets.numel() - 1
    for name, size in (("q.shape[-2]", heads), ("q.shape[-1]", q.shape[-1]), ("v.shape[-1]", v.shape[-1])):
        _check.at_least(_OP, name, size, 1)
    for name, value, least in (("max_length", max_length, 1), ("window", 0 if window is None else window, 0)):
        if not isinstance(value, int):
            raise TypeError(f"{_OP}: {name} must be an integer, got {value!r}")
        _check.at_least(_OP, name, value, least)
    if num_targets is not None:
        num_targets = _check.tensor(_OP, "num_targets", num_targets, shape=[sequences], **index).to(torch.int64)
    if isinstance(contextual, int):
        _check.at_least(_OP, "contextual", contextual, 0)
        contextual = offsets.new_full((sequences,), contextual, dtype=torch.int64) if contextual > 0 else None
    elif contextual is not None:
        contextual = _check.tensor(_OP, "contextual", contextual, shape=[sequences], **index).to(torch.int64)
    parameters = {"dtypes": [_computed_in(q.dtype)], "device": q.device}
    if position_bias is not None:
        _check.tensor(_OP, "position_bias", position_bias, **parameters)
        places = 2 * max_length - 1
        if tuple(position_bias.shape) not in ((places,), (heads, places)):
            raise ValueError(
                f"{_OP}: position_bias must have shape [{places}] or [{heads}, {places}] (2 max_length - 1 places), "
                f"got {list(position_bias.shape)}"
            )
    _check.choice(_OP, "time_buckets", time_buckets, _BUCKETS)
    if (time_bias is None) != (timestamps is None):
        raise ValueError(f"{_OP}: timestamps and time_bias must be given together")
    if time_bias is not None:
        _check.tensor(_OP, "time_bias", time_bias, shape=["buckets + 1"], **parameters)
        if not 1 <= time_bias.numel() <= _MOST_BUCKETS + 1:
            raise ValueError(
                f"{_OP}: time_bias must have between 1 and {_MOST_BUCKETS + 1} entries, got {time_bias.numel()}"
            )
        _check.tensor(_OP, "timestamps", timestamps, dtypes=[torch.int64], shape=list(q.shape[:-2]), device=q.device)
    return (
        q, k, v, offsets.to(torch.int64), num_targets, contextual, timestamps, position_bias, time_bias, time_buckets,
        max_length, 1.0 if alpha is None else float(alpha), bool(causal), -1 if window is None else min(window, 2**62),
    )  # fmt: skip


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, gradient: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_(gradient)

    offsets = torch.tensor([0, 4, 4, 11])
    times = torch.randint(0, 5000, (11,), generator=generator)
    targets, contextual = torch.tensor([1, 0, 2]), torch.tensor([2, 0, 1])
    for gradient in (False, True):
        g = {"gradient": gradient}

        def rows(*size: int, g=g, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
            return (
                random(*size, 5, **g, dtype=dtype),
                random(*size, 5, **g, dtype=dtype),
                random(*size, 3, **g, dtype=dtype),
            )

        yield (*rows(11, 2), offsets, None, None, None, None, None, "log", 8, 1.0, True, -1)
        bias = (random(15, **g), random(7, **g))
        yield (*rows(11, 2), offsets, targets, contextual, times, *bias, "log", 8, 0.5, True, 2)
        bias = (random(2, 15, **g), random(40, **g))
        yield (*rows(11, 2), offsets, targets, None, times, *bias, "sqrt", 8, 1.0, False, -1)
        lengths = torch.tensor([4, 0, 3])
        bias = (random(9, **g), None)
        yield (*rows(3, 4, 2), lengths, None, contextual, None, *bias, "log", 5, 1.0, False, 1)


def _samples_backward() -> Iterator[tuple]:
    for arguments in _samples():
        inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        out = _op(*inputs)
        there = [inputs[i] is not None for i in _DIFFERENTIABLE]
        yield (torch.ones_like(out), there, *inputs)
    yield (torch.ones_like(out), [False, True, False, False, False], *inputs)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? num_targets, Tensor? contextual, Tensor? timestamps, "
    "Tensor? position_bias, Tensor? time_bias, str time_buckets, int max_length, float alpha, bool causal, int window"
)
_op = define(
    f"hstu_attention({_ARGUMENTS}) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_published,
)
_backward_op = define(
    f"hstu_attention_backward(Tensor grad, bool[] wanted, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    fake=_fake_backward,
    samples=_samples_backward,
)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    *,
    max_length: int,
    alpha: float | None = None,
    causal: bool = True,
    num_targets: torch.Tensor | None = None,
    window: int | None = None,
    contextual: torch.Tensor | int | None = None,
    timestamps: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    time_buckets: str = "log",
) -> torch.Tensor:
    """The published form in plain torch: padded, with `[B, H, L, L]` written out."""
    return _published(
        *_prepare(
            q, k, v, offsets, max_length=max_length, alpha=alpha, causal=causal, num_targets=num_targets, window=window,
            contextual=contextual, timestamps=timestamps, position_bias=position_bias, time_bias=time_bias,
            time_buckets=time_buckets,
        )
    )  # fmt: skip


def hstu_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    *,
    max_length: int,
    alpha: float | None = None,
    causal: bool = True,
    num_targets: torch.Tensor | None = None,
    window: int | None = None,
    contextual: torch.Tensor | int | None = None,
    timestamps: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    time_bias: torch.Tensor | None = None,
    time_buckets: str = "log",
) -> torch.Tensor:
    """HSTU's pointwise attention: SiLU instead of softmax, with biases of position and of time.

    .. math::
        o_i = \\frac{1}{N} \\sum_j m_{ij}\\, \\mathrm{silu}(\\alpha\\, q_i \\cdot k_j + p_{j - i + N - 1}
              + w_{\\mathrm{bucket}(t_{i+1} - t_j)})\\, v_j, \\qquad N = \\text{max\\_length}

    Nothing of size rows x rows is ever stored: backward makes the weights again, tile by tile, and sums the biases'
    gradients in tables of its own, without sorting.

    Parameters
    ----------
    q, k : Tensor [T, H, Dq], or padded [B, L, H, Dq], float32, bfloat16 or float64
        Rows and heads may lie apart: the parts of one fused buffer are read in place.
    v : Tensor [T, H, Dv], or padded [B, L, H, Dv]
    offsets : Tensor [B + 1], int32 or int64
        Sequence b owns rows `offsets[b] : offsets[b + 1]`. For padded rows: the lengths, [B], each in [0, L].
    max_length : int
        The N above: a constant of the model, never a batch's longest, so that an answer does not depend on its
        batch-mates. Sequences may be longer than that unless there is a position bias.
    alpha : float, optional
        1 when left out, as in the published research program; its production program has `1 / sqrt(Dq)`.
    causal : bool
        A row sees itself and those before it; otherwise all rows see each other.
    num_targets : Tensor [B], int32 or int64, optional
        The last rows of each sequence are candidates: each sees the rows before the candidates and itself, and counts
        as the place right after the history. In [0, rows of the sequence]. Not causal, the history sees them too, as
        in the published program.
    window : int, optional
        How many places back (not causal: in either direction) a row sees. Places count the prefix as one and all
        candidates as one.
    contextual : int or Tensor [B], optional
        The first rows of each sequence are a prefix: they see the whole history, candidates excepted, and lie at one
        place. Cut to the rows that there are before the candidates.
    timestamps : Tensor [T] or [B, L], int64, optional
        The query side takes the time of the next row of the sequence, that of the last row its own. Need not be
        sorted; differences are exact in 64 bits.
    position_bias : Tensor [2 N - 1] or [H, 2 N - 1], optional
        One for all heads, or one each; entry `j - i + N - 1`. float32 (float64 for float64 rows), like `time_bias`.
    time_bias : Tensor [buckets + 1], optional
        One for all heads.
    time_buckets : {"log", "sqrt"}
        `clamp(floor(log(max(|x|, 1)) / 0.301), 0, buckets)`, evaluated as in float64 (the published program does so in
        float32, which may differ for |x| beside a border), or `clamp(floor(sqrt(|x| / 60)), 0, buckets)`.

    Returns
    -------
    Tensor [T, H, Dv] or [B, L, H, Dv], dtype of `q`; rows of padding are 0.

    Raises
    ------
    TypeError
        Another dtype; a length or window that is not an integer.
    ValueError
        Shapes or devices differ; offsets that do not start at 0, fall, or do not end at the number of rows; a sequence
        longer than a position bias covers; a prefix below 0; a time bias without timestamps, or the other way round.
    IndexError
        A length outside [0, L], or a number of targets outside [0, rows].

    Notes
    -----
    Accumulates in float32 (float64 for float64), every sum in one fixed order: the answer for a sequence depends
    neither on the rest of the batch nor on the number of threads, nor on the layout, and AVX2 and AVX-512 give equal
    bits; the scalar form rounds products and sums apart. The gradients of the biases are summed over a cut of the batch
    that depends on its lengths alone. Differentiable (once) in `q`, `k`, `v` and both biases, each only where wanted.
    Memory is linear in rows: backward keeps up to three more of q, only for sequences of 2048 rows and more (bfloat16:
    one to four, in float32). Backends: CPU (scalar, AVX2, AVX-512; bfloat16 rows are widened).

    References
    ----------
    Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations", ICML 2024, arXiv 2402.17152.
    """
    return _op(
        *_prepare(
            q, k, v, offsets, max_length=max_length, alpha=alpha, causal=causal, num_targets=num_targets, window=window,
            contextual=contextual, timestamps=timestamps, position_bias=position_bias, time_bias=time_bias,
            time_buckets=time_buckets,
        )
    )  # fmt: skip


hstu_attention.reference = reference
hstu_attention.mask = mask
