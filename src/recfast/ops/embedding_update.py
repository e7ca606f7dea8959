"""One optimiser step on the table rows of a batch, in place; 8-bit rows learn their step size on the way (ALPT)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel
from recfast.ops.embedding_bag import ROUNDINGS, QuantizedTable, bad_offset, check_lookups, quantize

OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad")
STEP_OPTIMIZERS = ("sgd", "adagrad")
STEP_RANGES = ("clip", "grow")
STEP_FLOOR = 1e-8
STEP_EPS = 1e-12
_KERNELS = {
    (value, index): kernel(f"embedding_update_{name}_{str(index).removeprefix('torch.')}")
    for value, name in ((torch.float32, "float32"), (torch.int8, "int8"))
    for index in _check.INDEX_DTYPES
}
_UPDATED, _BAD_INDEX, _BAD_OFFSET, _BAD_GRADIENT, _BAD_WEIGHT = range(5)


@dataclass(frozen=True)
class UpdateState:
    """What the optimiser remembers of a table; written in place.

    Attributes
    ----------
    moment : Tensor float32 or None
        [T] for row-wise Adagrad, [T, D] for Adagrad, None for SGD.
    step_moment : Tensor [T] float32 or None
        For step sizes learned by Adagrad.
    """

    moment: torch.Tensor | None = None
    step_moment: torch.Tensor | None = None

    @classmethod
    def zeros(
        cls, table: torch.Tensor | QuantizedTable, *, optimizer: str, step_optimizer: str | None = None
    ) -> UpdateState:
        """The state before the first update of `table`; `step_optimizer` None for fixed step sizes."""
        _check.choice("UpdateState", "optimizer", optimizer, OPTIMIZERS)
        codes = table.codes if isinstance(table, QuantizedTable) else table
        shape = {"sgd": None, "rowwise_adagrad": codes.shape[:1], "adagrad": codes.shape}[optimizer]
        zeros = {"dtype": torch.float32, "device": codes.device}
        return cls(
            None if shape is None else torch.zeros(shape, **zeros),
            torch.zeros(codes.shape[:1], **zeros) if step_optimizer == "adagrad" else None,
        )


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cpu(
    table: torch.Tensor,
    step: torch.Tensor | None,
    moment: torch.Tensor | None,
    step_moment: torch.Tensor | None,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    per_sample_weights: torch.Tensor | None,
    mode: str,
    optimizer: str,
    lr: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    step_rule: str,
    step_lr: float,
    step_scale: float,
    grow: bool,
    rounding: str,
    seed: int,
    step_count: int,
    table_id: int,
    check: bool,
) -> torch.Tensor:
    indices, grad = indices.contiguous(), grad.contiguous()
    weights = None if per_sample_weights is None else per_sample_weights.contiguous()
    wide = None if offsets is None else offsets.to(torch.int64).contiguous()
    rows, width = table.shape
    total = indices.numel()
    keys = torch.empty(2 * total, dtype=torch.int64)
    starts = torch.empty(total + 1, dtype=torch.int64)
    bag_of = coefficient = None
    if wide is not None:
        bag_of = torch.empty(total, dtype=torch.int32)
        coefficient = torch.empty(total) if weights is not None or mode == "mean" else None
    scratch = torch.empty(max(_C.max_threads(), torch.get_num_threads()), 2, -(-width // 16) * 16)
    outcome, value = _KERNELS[table.dtype, indices.dtype](
        table.data_ptr(), _pointer(step), _pointer(moment), _pointer(step_moment), rows, width,
        indices.data_ptr(), total, _pointer(wide), grad.shape[0], grad.data_ptr(), _pointer(weights), mode == "mean",
        OPTIMIZERS.index(optimizer), lr, eps, weight_decay, grad_scale,
        ("fixed", *STEP_OPTIMIZERS).index(step_rule), step_lr, step_scale, grow, rounding == "stochastic",
        seed, step_count, table_id, check, keys.data_ptr(), starts.data_ptr(), _pointer(bag_of),
        _pointer(coefficient), scratch.data_ptr(),
    )  # fmt: skip
    op = "embedding_update_"
    if outcome == _BAD_INDEX:
        raise _check.outside(op, "indices", value, int(indices[value]), rows)
    if outcome == _BAD_OFFSET:
        raise bad_offset(op, wide, value, total)
    if outcome in (_BAD_GRADIENT, _BAD_WEIGHT):
        name, tensor = ("grad", grad) if outcome == _BAD_GRADIENT else ("per_sample_weights", weights)
        found = float(tensor.reshape(-1)[value])
        raise ValueError(f"{op}: {name} must be finite, got {found} at flat position {value}; nothing was updated")
    return torch.tensor(value)


def _fake(table, *_):
    return table.new_empty((), dtype=torch.int64)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 5, generator=generator)
    quantized = quantize(table)
    indices, offsets = torch.tensor([3, 0, 8, 3, 3, 1]), torch.tensor([0, 2, 2, 6])
    grad = torch.randn(3, 5, generator=generator)
    tail = (0.1, 1e-8, 0.01, 0.5)
    state = UpdateState.zeros(quantized, optimizer="rowwise_adagrad", step_optimizer="adagrad")
    yield (
        quantized.codes, quantized.step, state.moment, state.step_moment, indices, offsets, grad, torch.rand(6),
        "mean", "rowwise_adagrad", *tail, "adagrad", 1e-4, 0.1, True, "stochastic", 7, 3, 0, True,
    )  # fmt: skip
    yield (
        quantized.codes, quantized.step, None, None, indices.int(), offsets.int(), grad, None,
        "sum", "sgd", *tail, "fixed", 0.0, 1.0, False, "nearest", 7, 3, 0, True,
    )  # fmt: skip
    yield (
        table, None, torch.zeros(9, 5), None, indices[:3], None, grad, None,
        "none", "adagrad", *tail, "fixed", 0.0, 1.0, False, "nearest", 7, 3, 0, False,
    )  # fmt: skip


# `pooling`, not `mode`: torch's functionalisation has an argument of that name and passes ours by keyword.
_op = define(
    "embedding_update_(Tensor(a!) table, Tensor(b!)? step, Tensor(c!)? moment, Tensor(d!)? step_moment, "
    "Tensor indices, Tensor? offsets, Tensor grad, Tensor? per_sample_weights, str pooling, str optimizer, float lr, "
    "float eps, float weight_decay, float grad_scale, str step_rule, float step_lr, float step_scale, bool grow, "
    "str rounding, int seed, int step_count, int table_id, bool check) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
)


def philox_uniform(seed: int, step_count: int, table_id: int, rows: torch.Tensor, width: int) -> torch.Tensor:
    """The draws in [0, 1) that the kernel makes for `rows` int64 [R]: Tensor [R, width], float64 (24 bits each).

    Philox-4x32-10 in int64 arithmetic: products wrap, which leaves their low and high words right.
    """
    low = 0xFFFFFFFF
    blocks = torch.arange(-(-width // 4))
    c2, c3 = (x.reshape(-1) for x in torch.meshgrid(rows.long(), blocks, indexing="ij"))
    c0, c1 = torch.full_like(c2, step_count), torch.full_like(c2, table_id)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 & low ^ c1 ^ k0, p1 & low, p0 >> 32 & low ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack([c0, c1, c2, c3], 1).reshape(len(rows), 4 * len(blocks))[:, :width]
    return (words >> 8).double() / 2**24


def reference(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    state: UpdateState | None = None,
    *,
    optimizer: str = "sgd",
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    step_lr: float | None = None,
    step_optimizer: str = "adagrad",
    step_scale: float | None = None,
    step_range: str = "clip",
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    check: bool = True,
) -> torch.Tensor:
    """The same in plain torch, in float64 between reading and writing the rows."""
    state = state or UpdateState()
    quantized = isinstance(table, QuantizedTable)
    stored = table.codes if quantized else table
    if offsets is None:
        bag_of, lengths = torch.arange(len(indices)), torch.ones(len(indices))
    else:
        lengths = offsets.diff().double()
        bag_of = torch.repeat_interleave(torch.arange(len(lengths)), offsets.diff())
    terms = grad.double()[bag_of]
    if per_sample_weights is not None:
        terms = terms * per_sample_weights.double()[:, None]
    if mode == "mean":
        terms = terms / lengths[bag_of][:, None]
    rows, run = torch.unique(indices.long(), return_inverse=True)
    g = torch.zeros(len(rows), stored.shape[1], dtype=torch.float64).index_add(0, run, terms) * grad_scale
    w = stored[rows].double()
    if quantized:
        step = table.step[rows].double().clamp(min=STEP_FLOOR)
        w = w * step[:, None]
    h = g + weight_decay * w
    if optimizer == "sgd":
        w = w - lr * h
    elif optimizer == "rowwise_adagrad":
        moment = state.moment[rows].double() + h.square().mean(1)
        w = w - (lr / (moment.sqrt() + eps))[:, None] * h
    else:
        moment = state.moment[rows].double() + h.square()
        w = w - lr * h / (moment.sqrt() + eps)
    if optimizer != "sgd":
        state.moment[rows] = moment.float()
    if not quantized:
        stored[rows] = w.to(stored.dtype)
        return torch.tensor(0)
    if step_lr is not None:
        x = w / step[:, None]
        factor = torch.where(x <= -128, -128.0, torch.where(x >= 127, 127.0, x.round() - x))
        scale = _default_step_scale(len(grad), stored.shape[1]) if step_scale is None else step_scale
        slope = scale * (g * factor).sum(1)
        if step_optimizer == "adagrad":
            step_moment = state.step_moment[rows].double() + slope.square()
            state.step_moment[rows] = step_moment.float()
            slope = slope / (step_moment.sqrt() + STEP_EPS)
        step = (step - step_lr * slope).clamp(min=STEP_FLOOR)
    if step_range == "grow":
        step = torch.maximum(step, w.abs().amax(1) / 127)
    table.step[rows] = step.float()
    x = w / step.float().double()[:, None]
    limited = x.clamp(-128, 127)
    if rounding == "nearest":
        rounded = limited.round()
    else:
        floor = limited.floor()
        rounded = floor + (philox_uniform(seed, step_count, table_id, rows, stored.shape[1]) < limited - floor)
    stored[rows] = rounded.to(torch.int8)
    return (x.float() != limited.float()).sum()


def _default_step_scale(bags: int, width: int) -> float:
    return 1 / math.sqrt(max(bags, 1) * width * 127)


def embedding_update_(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    state: UpdateState | None = None,
    *,
    optimizer: str = "sgd",
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    step_lr: float | None = None,
    step_optimizer: str = "adagrad",
    step_scale: float | None = None,
    step_range: str = "clip",
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    check: bool = True,
) -> torch.Tensor:
    """Update the rows that a batch looked up, in place; no float copy of an 8-bit table ever exists.

    For each row that occurs, with g the sum of its gradients over the batch (before anything is rounded):

    .. math::
        w' &= \\Delta q - \\eta\\,\\mathrm{opt}(g + \\lambda w) \\\\
        \\Delta' &= \\Delta - \\eta_\\Delta\\,\\mathrm{opt}\\Big(s \\sum_d g_d\\, c(w'_d / \\Delta)\\Big), \\qquad
            c(x) = -128,\\ \\lfloor x \\rceil - x,\\ 127 \\text{ below, inside, above the range} \\\\
        q' &= \\mathrm{clip}(\\lfloor w' / \\Delta' + u \\rfloor, -128, 127), \\qquad u \\sim U[0, 1)

    A float table takes the first line alone.

    Parameters
    ----------
    table : Tensor [T, D] float32, or QuantizedTable; contiguous, written in place
    indices, offsets, per_sample_weights, mode
        As they went into `embedding_bag`. Ids may repeat; -1 is refused.
    grad : Tensor [B, D], float32
        The gradient of the bags ([n, D] without offsets).
    state : UpdateState or None
        Written in place; `UpdateState.zeros` makes it. None for SGD with a fixed step.
    optimizer : str
        "sgd"; "rowwise_adagrad" (one float a row); "adagrad" (one float a weight).
    lr : float
        Learning rate of the weights.
    eps : float
        Added to the root of the moment.
    weight_decay : float
        L2 on the rows that occur, added to the gradient.
    grad_scale : float
        Multiplies the summed gradient, as where a loss was scaled.
    step_lr : float or None
        Learning rate of the step sizes. None: they are fixed.
    step_optimizer : str
        "adagrad": one float a row; its first change of a step is `step_lr`, whatever the scale of the gradient, so
        `step_lr` wants to be well below the step. "sgd": as plain as LSQ.
    step_scale : float or None
        The factor s on a step's gradient. None: 1 / sqrt(B * D * 127), as the paper has it. It cancels out under
        "adagrad".
    step_range : str
        "clip" as in the paper: weights outside the range are clipped. "grow": a step is never smaller than
        max |w'| / 127, so that nothing is clipped.
    rounding : str
        "stochastic" or "nearest". To the nearest, a change below half a step is lost for good.
    seed, step_count, table_id : int
        With row and column, the key of the draws: count `step_count` up at each update.
    check : bool
        Refuse NaN and infinity in `grad` and `per_sample_weights`. Ids and offsets are always checked.

    Returns
    -------
    Tensor [], int64
        How many codes were clipped.

    Raises
    ------
    IndexError
        An id outside [0, T).
    TypeError, ValueError
        Wrong dtypes, shapes, options, offsets; NaN or infinity in the gradient. In every case nothing was written.

    Notes
    -----
    This is ALPT in a single pass: the gradient of the one backward pass stands for the gradient at w', where the paper
    runs a second forward and backward. The outcome depends on the arguments alone, not on threads, instruction set or
    (but for the order of equal ids) the order of the batch. Backend: CPU.

    References
    ----------
    Li et al., "Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023.
    Esser et al., "Learned Step Size Quantization", ICLR 2020.
    """
    op = "embedding_update_"
    state = state or UpdateState()
    quantized = isinstance(table, QuantizedTable)
    stored, step = (table.codes, table.step) if quantized else (table, None)
    _check.tensor(op, "table", stored, dtypes=[torch.int8 if quantized else torch.float32], shape=["T", "D"])
    rows, width = stored.shape
    device = stored.device
    _check.choice(op, "optimizer", optimizer, OPTIMIZERS)
    _check.choice(op, "step_optimizer", step_optimizer, STEP_OPTIMIZERS)
    _check.choice(op, "step_range", step_range, STEP_RANGES)
    _check.choice(op, "rounding", rounding, ROUNDINGS)
    check_lookups(op, indices, offsets, per_sample_weights, mode, dtype=torch.float32, device=device)
    _check.tensor(op, "indices", indices, shape=["n"])
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    _check.tensor(op, "grad", grad, dtypes=[torch.float32], shape=[bags, width], device=device)
    step_rule = "fixed" if step_lr is None or not quantized else step_optimizer
    moment_shape = {"sgd": None, "rowwise_adagrad": [rows], "adagrad": [rows, width]}[optimizer]
    step_shape = [rows] if step_rule == "adagrad" else None
    for name, tensor, shape in (("moment", state.moment, moment_shape), ("step_moment", state.step_moment, step_shape)):
        if shape is None:
            continue
        if tensor is None:
            raise ValueError(f"{op}: state.{name} must be a tensor of shape {shape} here, got None")
        _check.tensor(op, f"state.{name}", tensor, dtypes=[torch.float32], shape=shape, device=device)
    written = {"table": stored, "step": step, "state.moment": state.moment, "state.step_moment": state.step_moment}
    for name, tensor in written.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, since it is written in place")
    if stored.requires_grad:
        raise ValueError(f"{op}: table is updated in place and must not require a gradient")
    if optimizer != "sgd" and not eps > 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}: a row without gradients would be divided by it")
    for name, value in (("grad_scale", grad_scale), ("step_scale", 0.0 if step_scale is None else step_scale)):
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be finite, got {value}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("step_lr", step_lr or 0.0)):
        if not (0 <= value < math.inf):
            raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")
    for name, value, limit in (("seed", seed, 2**63), ("step_count", step_count, 2**32), ("table_id", table_id, 2**32)):
        if not 0 <= value < limit:
            raise ValueError(f"{op}: {name} = {value} is outside [0, {limit})")
    if indices.numel() >= 2**31 or rows > 2**32:
        raise ValueError(f"{op}: needs below 2^31 indices and at most 2^32 rows, got {indices.numel()} and {rows}")
    if width == 0:
        raise ValueError(f"{op}: table must have at least one column, got shape {list(stored.shape)}")
    return _op(
        stored, step, state.moment if moment_shape else None, state.step_moment if step_shape else None,
        indices, offsets, grad.detach(), None if per_sample_weights is None else per_sample_weights.detach(),
        mode, optimizer, float(lr), float(eps), float(weight_decay), float(grad_scale),
        step_rule, float(step_lr or 0.0), _default_step_scale(bags, width) if step_scale is None else float(step_scale),
        step_range == "grow", rounding, seed, step_count, table_id, check,
    )  # fmt: skip


embedding_update_.reference = reference
