"""Softmax attention within jagged sequences: causal for SASRec, both ways for BERT4Rec."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recfast.ops import _check
from recfast.ops._histories import empty_rows, place, sequences, unit_rows
from recfast.ops._library import define, kernel
from recfast.ops.formats import philox_words

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
_FORWARD = {dtype: kernel(f"sequence_attention_forward_{name}") for dtype, name in _NAMES.items()}
_BACKWARD = {dtype: kernel(f"sequence_attention_backward_{name}") for dtype, name in _NAMES.items()}
_SCRATCH = kernel("sequence_attention_scratch")
_DRAWS = 2**24  # a weight stays where its draw, 24 bits, is not below dropout * _DRAWS


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _threshold(dropout: float) -> int:
    return round(dropout * _DRAWS)


def _arguments(q, k, v, offsets, causal, scale, dropout, seed, out, statistics, backward):
    """Addresses and sizes for the kernel, and the tensors that must live as long as it runs."""
    q, k, v, offsets = unit_rows(q), unit_rows(k), unit_rows(v), offsets.contiguous()
    where, longest = sequences("sequence_attention", q, offsets)
    sizes = {"heads": q.shape[-2], "dim": q.shape[-1], "value_dim": v.shape[-1], "longest": longest}
    if statistics is None:
        new = q.new_empty if q.dim() == 3 else q.new_zeros
        out, statistics = empty_rows(v), new((2, *q.shape[:-1]), dtype=_statistics_dtype(q.dtype))
    scratch = statistics.new_empty(_SCRATCH(backward, **sizes))
    sums = offsets.new_empty(where["sequences"] + 1)
    # Strides as if each statistic were a row of one value.
    highest, inverse = (x.unsqueeze(-1) for x in statistics)
    arguments = {
        **sizes,
        **where,
        **place("q", q),
        **place("k", k),
        **place("v", v),
        **place("out", out),
        **place("highest", highest),
        **place("inverse", inverse),
        "causal": int(causal),
        "scale": scale,
        "seed": 0 if seed is None else int(seed),
        "threshold": _threshold(dropout),
        "kept": 1 / (1 - dropout),
        "sums": sums.data_ptr(),
        "scratch": scratch.data_ptr(),
    }
    return arguments, (q, k, v, offsets, scratch, sums), out, statistics


def _cpu(q, k, v, offsets, causal, scale, dropout, seed):
    arguments, _alive, out, statistics = _arguments(q, k, v, offsets, causal, scale, dropout, seed, None, None, False)
    _FORWARD[q.dtype](**arguments)
    return out, statistics


def _fake(q, k, v, offsets, causal, scale, dropout, seed):
    return q.new_empty(v.shape), q.new_empty((2, *q.shape[:-1]), dtype=_statistics_dtype(q.dtype))


def _cpu_backward(grad, out, statistics, q, k, v, offsets, causal, scale, dropout, seed, need_q, need_k, need_v):
    grad, out, statistics = unit_rows(grad), unit_rows(out), statistics.contiguous()
    arguments, _alive, *_ = _arguments(q, k, v, offsets, causal, scale, dropout, seed, out, statistics, True)
    needs = zip((q, k, v), (need_q, need_k, need_v), strict=True)
    dq, dk, dv = gradients = [empty_rows(x) if needed else None for x, needed in needs]
    places = {**place("dout", grad), **place("dq", dq), **place("dk", dk), **place("dv", dv)}
    _BACKWARD[q.dtype](**arguments, **places)
    return tuple(q.new_empty(0) if x is None else x for x in gradients)


def _fake_backward(grad, out, statistics, q, k, v, offsets, causal, scale, dropout, seed, need_q, need_k, need_v):
    needs = zip((q, k, v), (need_q, need_k, need_v), strict=True)
    return tuple(q.new_empty(x.shape if needed else 0) for x, needed in needs)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, offsets, ctx.causal, ctx.scale, ctx.dropout, seed = inputs
    ctx.save_for_backward(*output, q, k, v, offsets, seed)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: torch.Tensor, _grad_statistics):
    *tensors, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = _backward_op(grad, *tensors, ctx.causal, ctx.scale, ctx.dropout, seed, *needs)
    return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), None, None, None, None, None


def _published(q, k, v, offsets, causal, scale, dropout, seed):
    """`(out, statistics)` in plain torch: padded scores written out, masked, softmax."""
    jagged = q.dim() == 3
    lengths = offsets.diff() if jagged else offsets
    longest = int(lengths.max()) if jagged and lengths.numel() else 0 if jagged else q.shape[1]
    there = torch.arange(longest, device=q.device) < lengths.unsqueeze(1)  # [B, L]

    def padded(x: torch.Tensor) -> torch.Tensor:
        if jagged:
            x = x.new_zeros(*there.shape, *x.shape[1:]).index_put((there,), x)
        else:
            x = torch.where(there[..., None, None], x, 0)
        return x.transpose(1, 2).to(_statistics_dtype(x.dtype))  # [B, H, L, D]

    score = scale * padded(q) @ padded(k).transpose(-1, -2)
    seen = there[:, None, None, :]
    if causal:
        seen = seen & torch.ones(longest, longest, dtype=torch.bool, device=q.device).tril()
    seen = seen & there[:, None, :, None]
    score = torch.where(seen, score, -torch.inf)
    if longest == 0:
        highest = score.new_zeros(score.shape[:-1])
    else:
        highest = score.detach().amax(-1)
    highest = torch.where(there.unsqueeze(1), highest, 0)
    weight = torch.exp(score - highest.unsqueeze(-1))
    inverse = torch.where(there.unsqueeze(1), 1 / weight.sum(-1).clamp(min=1), 0)
    weight = weight * inverse.unsqueeze(-1)
    if dropout > 0:
        for b in range(weight.shape[0]):
            drawn = [philox_words(int(seed), b, h, torch.arange(longest), longest) for h in range(weight.shape[1])]
            kept = (torch.stack(drawn) >> 8 >= _threshold(dropout)).to(weight.dtype) / (1 - dropout)
            weight = torch.cat([weight[:b], (weight[b] * kept).unsqueeze(0), weight[b + 1 :]])
    out = (weight @ padded(v)).transpose(1, 2).to(q.dtype)
    statistics = torch.stack([highest, inverse]).transpose(2, 3)
    return (out[there], statistics[:, there]) if jagged else (out, statistics.contiguous())


def _prepare(q, k, v, offsets, causal, scale, dropout, seed):
    """Check everything that can be known without reading data, and complete what was left out."""
    op = "sequence_attention"
    padded = isinstance(q, torch.Tensor) and q.dim() == 4
    rows = ["B", "L"] if padded else ["T"]
    _check.tensor(op, "q", q, dtypes=_DTYPES, shape=[*rows, "H", "D"])
    like = {"dtypes": [q.dtype], "device": q.device}
    _check.tensor(op, "k", k, shape=list(q.shape), **like)
    _check.tensor(op, "v", v, shape=[*q.shape[:-1], "Dv"], **like)
    for name, size in (("q.shape[-2]", q.shape[-2]), ("q.shape[-1]", q.shape[-1]), ("v.shape[-1]", v.shape[-1])):
        _check.at_least(op, name, size, 1)
    sizes = [q.shape[0]] if padded else ["B + 1"]
    name = "lengths" if padded else "offsets"
    _check.tensor(op, name, offsets, shape=sizes, dtypes=_check.INDEX_DTYPES, device=q.device)
    if not padded and offsets.numel() == 0:
        raise ValueError(f"{op}: offsets must have one entry more than there are lists, got none")
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be True or False, got {causal!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must lie in [0, 1), got {dropout}")
    if dropout > 0 and seed is None:
        raise ValueError(f"{op}: dropout needs a seed, got None")
    if isinstance(seed, int):
        if not 0 <= seed < 2**63:
            raise ValueError(f"{op}: seed must lie in [0, 2**63), got {seed}")
        seed = torch.tensor(seed)
    elif seed is not None:
        _check.tensor(op, "seed", seed, shape=[], dtypes=[torch.int64])
        if seed.device.type != "cpu":
            raise ValueError(f"{op}: seed must be on cpu, where it is read, got {seed.device}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return q, k, v, offsets.to(torch.int64), causal, float(scale), float(dropout), seed if dropout > 0 else None


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, gradient: bool) -> torch.Tensor:
        return torch.randn(size, generator=generator).requires_grad_(gradient)

    for gradient in (False, True):
        for causal, padded, dropout in ((True, False, 0.0), (False, False, 0.25), (True, True, 0.0)):
            rows = (3, 21) if padded else (24,)
            yield (
                *(random(*rows, 2, width, gradient=gradient) for width in (5, 5, 7)),
                torch.tensor([4, 0, 20] if padded else [0, 4, 4, 24]),
                causal,
                0.5,
                dropout,
                torch.tensor(11) if dropout else None,
            )


def _samples_backward() -> Iterator[tuple]:
    for arguments in _samples():
        inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        out, statistics = _op(*inputs)
        for needs in ((True, True, True), (False, True, False)):
            yield (torch.ones_like(out), out, statistics, *inputs, *needs)


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor offsets, bool causal, float scale, float dropout, Tensor? seed"
_op = define(
    f"sequence_attention({_TENSORS}) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_published,
)
_backward_op = define(
    f"sequence_attention_backward(Tensor grad, Tensor out, Tensor statistics, {_TENSORS}, "
    "bool need_q, bool need_k, bool need_v) -> (Tensor, Tensor, Tensor)",
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
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The padded form in plain torch, with every score written out."""
    return _published(*_prepare(q, k, v, offsets, causal, scale, dropout, seed))[0]


def sequence_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of each event of a sequence to the others, or to those before it and itself.

    .. math::
        o_i = \\sum_j p_{ij} v_j, \\qquad p_{ij} = \\mathrm{softmax}_j(s\\, q_i^\\top k_j),
        \\qquad j \\le i \\text{ if causal}

    Scores are computed block by block and never stored; backward computes them again. Memory grows with the length,
    not with its square, and padding costs nothing.

    Parameters
    ----------
    q, k : Tensor [T, H, D], or padded [B, L, H, D]; float32, bfloat16 or float64
        Views of a fused buffer are read in place; only the D values of a head must lie side by side.
    v : Tensor [T, H, Dv], or [B, L, H, Dv]
        Dv may differ from D.
    offsets : Tensor [B + 1], int32 or int64
        Sequence b is rows `offsets[b] : offsets[b + 1]`. For padded tensors: the lengths, [B], each in [0, L]; what
        lies beyond them is not read.
    causal : bool
        Whether an event sees only itself and earlier ones.
    scale : float, optional
        `D ** -0.5` when left out.
    dropout : float in [0, 1)
        Each weight is dropped with this probability (to 24 bits), the others divided by `1 - dropout`.
    seed : int in [0, 2**63) or int64 Tensor [] on the CPU, needed with dropout
        What is dropped depends on the seed, the sequence's number in the batch, the head and the two positions alone:
        not on threads, instruction set or layout.

    Returns
    -------
    Tensor [T, H, Dv] or [B, L, H, Dv], dtype of `q`. An empty sequence has no rows; padding is 0.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes or devices differ, offsets that do not start at 0, fall, or do not end at the number of rows; dropout
        outside [0, 1) or without a seed.
    IndexError
        A length outside [0, L].

    Notes
    -----
    Accumulates in float32 (float64 for float64), each sum in one order: an answer depends on its own sequence alone,
    not on the rest of the batch, later events (if causal), the number of threads or the layout. AVX2 and AVX-512 give
    equal bits; the scalar form rounds products and sums apart. With E the largest error of a score, at most
    `(D + 2) eps` times its absolute terms, n keys and scores that span R, a weight is off by a factor of at most
    `2 E + (3 n + 3 R + 16) eps`; one below exp(-87) of the largest counts as exp(-87) of it (float32 and bfloat16).
    If causal, an infinite or NaN value of v may reach the 15 answers before it, as a product with a weight of 0.
    Differentiable (once) in q, k and v; gradients nobody needs are not computed. Saved for backward: the arguments, the
    answer, and for each row the highest score and the inverse of the sum, apart rather than as one logarithm, which
    would lose digits where scores are large. Backends: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Kang and McAuley, "Self-attentive sequential recommendation", ICDM 2018, arXiv 1808.09781; Sun et al., "BERT4Rec",
    CIKM 2019, arXiv 1904.06690; Dao et al., "FlashAttention", NeurIPS 2022, arXiv 2205.14135.
    """
    return _op(*_prepare(q, k, v, offsets, causal, scale, dropout, seed))[0]


sequence_attention.reference = reference
