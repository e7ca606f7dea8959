"""DIN's activation unit over jagged histories that a user's candidates share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from recfast.ops import _check
from recfast.ops._histories import Histories, check_candidates, histories, unit_rows
from recfast.ops._library import define, kernel

_DTYPES = (torch.float32, torch.float64)
_ACTIVATIONS = ("prelu", "relu", "sigmoid", "silu")  # in the order of din_attention.h, like the modes
_MODES = ("sum", "sigmoid", "softmax")
_FORWARD = {
    torch.float32: kernel("din_attention_forward_float32"),
    torch.float64: kernel("din_attention_forward_float64"),
}
_BACKWARD = {
    torch.float32: kernel("din_attention_backward_float32"),
    torch.float64: kernel("din_attention_backward_float64"),
}
_SCRATCH = kernel("din_attention_scratch")
_SLOPE = 0.25  # what torch.nn.PReLU starts from


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


def _arguments(
    query, history: Histories, candidate_offsets, w1, b1, w2, b2, w3, b3, slope, activation, mode, out, lse, backward
) -> tuple[dict[str, int], list[torch.Tensor]]:
    """Addresses and sizes for the kernel, and the tensors that must live as long as it runs."""
    weights = [None if x is None else x.contiguous() for x in (w1, b1, w2, b2, w3, b3, slope)]
    address = [0 if x is None else x.data_ptr() for x in weights]
    sizes = {
        "users": history.begin.numel(),
        "dim": query.shape[1],
        "value_dim": history.values.shape[-1],
        "hidden1": w1.shape[1],
        "hidden2": 0 if w2 is None else w2.shape[1],
        "longest": history.longest,
    }
    scratch = query.new_empty(_SCRATCH(backward, **sizes))
    names = dict(zip(("w1", "b1", "w2", "b2", "w3", "b3", "slope"), address, strict=True))
    return {
        **sizes,
        **names,
        "activation": _ACTIVATIONS.index(activation),
        "mode": _MODES.index(mode),
        "candidate_rows": query.shape[0],
        "query": query.data_ptr(),
        "query_stride": query.stride(0),
        "keys": history.keys.data_ptr(),
        "keys_stride": history.keys.stride(-2),
        "values": history.values.data_ptr(),
        "values_stride": history.values.stride(-2),
        "begin": history.begin.data_ptr(),
        "end": history.end.data_ptr(),
        "candidates": 0 if candidate_offsets is None else candidate_offsets.data_ptr(),
        "out": out.data_ptr(),
        "lse": lse.data_ptr(),
        "scratch": scratch.data_ptr(),
    }, [*weights, scratch]


def _cpu(query, keys, values, offsets, candidate_offsets, w1, b1, w2, b2, w3, b3, slope, activation, mode):
    query, offsets = unit_rows(query), offsets.contiguous()
    candidate_offsets = None if candidate_offsets is None else candidate_offsets.contiguous()
    check_candidates("din_attention", candidate_offsets, query.shape[0])
    history = histories("din_attention", keys, values, offsets)
    out = query.new_empty(query.shape[0], history.values.shape[-1])
    lse = query.new_empty(query.shape[0] if mode == "softmax" else 0)
    arguments, _alive = _arguments(
        query, history, candidate_offsets, w1, b1, w2, b2, w3, b3, slope, activation, mode, out, lse, False
    )
    _FORWARD[query.dtype](**arguments)
    return out, lse


def _fake(query, keys, values, offsets, candidate_offsets, w1, b1, w2, b2, w3, b3, slope, activation, mode):
    width = (keys if values is None else values).shape[-1]
    return query.new_empty(query.shape[0], width), query.new_empty(query.shape[0] if mode == "softmax" else 0)


def _cpu_backward(
    grad, out, lse, query, keys, values, offsets, candidate_offsets, w1, b1, w2, b2, w3, b3, slope, activation, mode
):
    query, offsets, grad = unit_rows(query), offsets.contiguous(), grad.contiguous()
    candidate_offsets = None if candidate_offsets is None else candidate_offsets.contiguous()
    check_candidates("din_attention", candidate_offsets, query.shape[0])
    history = histories("din_attention", keys, values, offsets)
    arguments, _alive = _arguments(
        query,
        history,
        candidate_offsets,
        *(w1, b1, w2, b2, w3, b3, slope, activation, mode),
        *(out.contiguous(), lse.contiguous(), True),
    )

    def like_rows(x: torch.Tensor) -> torch.Tensor:
        if history.step is None:
            return query.new_empty(x.shape)
        # Padding lies outside every history, so no kernel writes it.
        return query.new_zeros(x.shape[0], history.step, x.shape[2])

    dquery = query.new_empty(query.shape)
    dkeys = like_rows(history.keys)
    dvalues = query.new_empty(0) if values is None else like_rows(history.values)
    none = query.new_empty(0)
    dw1, db1, dw3, db3 = (query.new_empty(x.shape) for x in (w1, b1, w3, b3))
    dw2, db2 = (none if x is None else query.new_empty(x.shape) for x in (w2, b2))
    dslope = query.new_empty(slope.shape)
    _BACKWARD[query.dtype](
        **arguments,
        grad=grad.data_ptr(),
        dquery=dquery.data_ptr(),
        dkeys=dkeys.data_ptr(),
        dvalues=(dkeys if values is None else dvalues).data_ptr(),
        dw1=dw1.data_ptr(),
        db1=db1.data_ptr(),
        dw2=dw2.data_ptr(),
        db2=db2.data_ptr(),
        dw3=dw3.data_ptr(),
        db3=db3.data_ptr(),
        dslope=dslope.data_ptr(),
    )
    if history.step is not None:
        dkeys = dkeys[:, : keys.shape[1]].contiguous()
        dvalues = dvalues if values is None else dvalues[:, : keys.shape[1]].contiguous()
    if w2 is None:
        dw2, db2 = query.new_empty(0), query.new_empty(0)
    return dquery, dkeys, dvalues, dw1, db1, dw2, db2, dw3, db3, dslope


def _fake_backward(
    grad, out, lse, query, keys, values, offsets, candidate_offsets, w1, b1, w2, b2, w3, b3, slope, activation, mode
):
    def like(x: torch.Tensor | None) -> torch.Tensor:
        return query.new_empty(0 if x is None else x.shape)

    return tuple(like(x) for x in (query, keys, values, w1, b1, w2, b2, w3, b3, slope))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.mode = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: torch.Tensor, _grad_lse):
    saved = ctx.saved_tensors
    values, w2 = saved[4], saved[9]
    dquery, dkeys, dvalues, dw1, db1, dw2, db2, dw3, db3, dslope = _backward_op(grad, *saved, ctx.activation, ctx.mode)
    if values is None:
        dvalues = None
    if w2 is None:
        dw2 = db2 = None
    return dquery, dkeys, dvalues, None, None, dw1, db1, dw2, db2, dw3, db3, dslope, None, None


def _layer(x: torch.Tensor, activation: str, slope: torch.Tensor) -> torch.Tensor:
    if activation == "prelu":
        return torch.nn.functional.prelu(x, slope.reshape(1))
    return {"relu": torch.relu, "sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu}[activation](x)


def _published(query, keys, values, offsets, candidate_offsets, w1, b1, w2, b2, w3, b3, slope, activation, mode):
    """`(out, lse)` in plain torch: one row of four copies for each pair of a candidate and a position."""
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
    hidden = _layer(torch.cat([q, k, q - k, q * k], dim=-1) @ w1 + b1, activation, slope[0])
    if w2 is not None:
        hidden = _layer(hidden @ w2 + b2, activation, slope[1])
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
    return out, lse


def _prepare(op_query, keys, offsets, weights, values, candidate_offsets, activation, mode):
    """Check everything that can be known without reading data, and complete what was left out."""
    op = "din_attention"
    query = _check.tensor(op, "query", op_query, dtypes=_DTYPES, shape=["Nc", "D"])
    like = {"dtypes": [query.dtype], "device": query.device}
    dim = query.shape[1]
    padded = isinstance(keys, torch.Tensor) and keys.dim() == 3
    _check.tensor(op, "keys", keys, shape=["B", "L", dim] if padded else ["T", dim], **like)
    if values is not None:
        _check.tensor(op, "values", values, shape=[*keys.shape[:-1], "Dv"], **like)
    sizes = [keys.shape[0]] if padded else ["B + 1"]
    index = {"dtypes": _check.INDEX_DTYPES, "device": query.device}
    _check.tensor(op, "lengths" if padded else "offsets", offsets, shape=sizes, **index)
    if not padded and offsets.numel() == 0:
        raise ValueError(f"{op}: offsets must have one entry more than there are lists, got none")
    users = offsets.numel() if padded else offsets.numel() - 1
    if candidate_offsets is not None:
        _check.tensor(op, "candidate_offsets", candidate_offsets, shape=[users + 1], **index)
        candidate_offsets = candidate_offsets.to(torch.int64)
    elif query.shape[0] != users:
        raise ValueError(
            f"{op}: query must have one row a user ({users}) when candidate_offsets is left out, got {query.shape[0]}"
        )
    _check.choice(op, "activation", activation, _ACTIVATIONS)
    _check.choice(op, "mode", mode, _MODES)

    weights = DINWeights(*weights)
    w1 = _check.tensor(op, "w1", weights.w1, shape=[4 * dim, "H1"], **like)
    _check.at_least(op, "w1.shape[1]", w1.shape[1], 1)
    _check.tensor(op, "b1", weights.b1, shape=[w1.shape[1]], **like)
    head, layers = w1.shape[1], 1
    if weights.w2 is not None:
        w2 = _check.tensor(op, "w2", weights.w2, shape=[head, "H2"], **like)
        _check.at_least(op, "w2.shape[1]", w2.shape[1], 1)
        head, layers = w2.shape[1], 2
        _check.tensor(op, "b2", weights.b2, shape=[head], **like)
    elif weights.b2 is not None:
        raise ValueError(f"{op}: b2 must be None where w2 is None")
    _check.tensor(op, "w3", weights.w3, shape=[head, 1], **like)
    _check.tensor(op, "b3", weights.b3, shape=[1], **like)
    slope = weights.slope
    if slope is None:
        slope = query.new_full((layers,), _SLOPE)
    elif isinstance(slope, torch.Tensor) and slope.numel() == 1:
        slope = slope.reshape(1).expand(layers)
    _check.tensor(op, "slope", slope, shape=[layers], **like)
    return query, keys, values, offsets.to(torch.int64), candidate_offsets, *weights[:6], slope, activation, mode


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, gradient: bool) -> torch.Tensor:
        return torch.randn(size, generator=generator).requires_grad_(gradient)

    cases = [("sum", "prelu", True), ("softmax", "silu", False), ("sigmoid", "sigmoid", True), ("sum", "relu", False)]
    for gradient in (False, True):
        for mode, activation, two in cases:
            dim, hidden1, hidden2, offsets = 5, 6, 3, torch.tensor([0, 4, 4, 11])
            shared = mode != "sum"
            rows = 5 if shared else 3
            yield (
                random(rows, dim, gradient=gradient),
                random(11, dim, gradient=gradient),
                random(11, 7, gradient=gradient) if shared else None,
                offsets,
                torch.tensor([0, 2, 3, 5]) if shared else None,
                random(4 * dim, hidden1, gradient=gradient),
                random(hidden1, gradient=gradient),
                random(hidden1, hidden2, gradient=gradient) if two else None,
                random(hidden2, gradient=gradient) if two else None,
                random(hidden2 if two else hidden1, 1, gradient=gradient),
                random(1, gradient=gradient),
                torch.full((1 + two,), 0.25).requires_grad_(gradient),
                activation,
                mode,
            )


def _samples_backward() -> Iterator[tuple]:
    for arguments in _samples():
        inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        out, lse = _op(*inputs)
        yield (torch.ones_like(out), out, lse, *inputs)


_TENSORS = (
    "Tensor query, Tensor keys, Tensor? values, Tensor offsets, Tensor? candidate_offsets, Tensor w1, Tensor b1, "
    "Tensor? w2, Tensor? b2, Tensor w3, Tensor b3, Tensor slope, str activation, str mode"
)
_op = define(
    f"din_attention({_TENSORS}) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_published,
)
_backward_op = define(
    f"din_attention_backward(Tensor grad, Tensor out, Tensor lse, {_TENSORS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    fake=_fake_backward,
    samples=_samples_backward,
)


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
) -> torch.Tensor:
    """The published form in plain torch, with `[q, k, q - k, q * k]` written out for every pair."""
    return _published(*_prepare(query, keys, offsets, weights, values, candidate_offsets, activation, mode))[0]


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
) -> torch.Tensor:
    """DIN's activation unit: weigh what a user did by how it bears on a candidate, and add it up.

    .. math::
        s_{cl} = \\mathrm{MLP}([q_c, k_l, q_c - k_l, q_c \\odot k_l]), \\qquad
        o_c = \\sum_l p_{cl} v_l, \\qquad p = s,\\ \\sigma(s)\\ \\text{or}\\ \\mathrm{softmax}_l(s)

    The candidate is folded into the first layer, so nothing of size candidates x history x width is ever stored;
    backward computes the layers again.

    Parameters
    ----------
    query : Tensor [Nc, D], float32 or float64
        The candidates.
    keys : Tensor [T, D], or padded [B, L, D]
        The histories. Rows may lie apart (a strided view is not copied).
    offsets : Tensor [B + 1], int32 or int64
        User b owns rows `offsets[b] : offsets[b + 1]`. For padded keys: the lengths, [B], each in [0, L].
    weights : DINWeights
        One or two hidden layers of any width.
    values : Tensor [T, Dv] or [B, L, Dv], optional
        What is added up; the keys themselves when left out.
    candidate_offsets : Tensor [B + 1], int32 or int64, optional
        User b's candidates are rows `candidate_offsets[b] : candidate_offsets[b + 1]` of `query`; left out, each user
        has one (Nc = B).
    activation : {"prelu", "relu", "sigmoid", "silu"}
        Of the hidden layers.
    mode : {"sum", "sigmoid", "softmax"}
        How scores become weights. The paper uses "sum".

    Returns
    -------
    Tensor [Nc, Dv], dtype of `query`. Rows of 0 where the history is empty, in every mode.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes or devices differ, offsets that do not start at 0, fall, or do not end at the number of rows.
    IndexError
        A length outside [0, L].

    Notes
    -----
    Accumulates in the dtype of `query`, every sum in one fixed order: the answer for a candidate does not depend on
    the rest of the batch or on the number of threads, and AVX2 and AVX-512 give equal bits; the scalar form rounds
    products and sums apart (no FMA) and differs in the last bits. Folding `Wk - Wd + diag(q) Wp` first changes the
    rounding of layer 1: its error is at most `(2 D + 6) eps` times the sum of the absolute terms.
    Differentiable (once) in `query`, `keys`, `values` and all weights. Backends: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.
    """
    return _op(*_prepare(query, keys, offsets, weights, values, candidate_offsets, activation, mode))[0]


din_attention.reference = reference
