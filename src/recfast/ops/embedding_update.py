"""One optimiser step on the table rows of a batch, in place; rows of few bits learn their step size on the way (ALPT).

`embedding_update_` is one call a batch. `embedding_update_first_` and `embedding_update_second_` are ALPT in the order
of the paper, with a second forward and backward between them; `embedding_step_gradient` and `requantize_` serve one
step size for a whole table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel
from recfast.ops.formats import FORMATS, PLAIN, WITH_STEP, QuantizedTable, empty_table, philox_words, row_bytes

OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "rowwise_adam")
STEP_OPTIMIZERS = ("sgd", "adagrad", "adam")
STEP_SCALES = ("batch", "table", "none")
STEP_FLOORS = ("clamp", "abs", "none")
STEP_RANGES = ("clip", "grow")
DECAYS = ("l2", "decoupled")
ROUNDINGS = ("nearest", "stochastic")
MODES = ("sum", "mean", "none", "max")
FORMAT_NAMES = ("float32", "bfloat16", "float16", *WITH_STEP)
STEP_FLOOR = 1e-8
STEP_SHIFT = 1e-10
SMALLEST_STEP = 1e-30
STEP_EPS = 1e-12
PART = 256
_MOMENT_DOMAIN = 1 << 31
_PHASES = ("whole", "first", "second")
_STEP_RULES = ("fixed", *STEP_OPTIMIZERS)
_ROWWISE = ("rowwise_adagrad", "rowwise_adam")
_TINY = torch.finfo(torch.float32).tiny
_LARGEST = {"bfloat16": torch.finfo(torch.bfloat16).max, "float16": torch.finfo(torch.float16).max}
_update, _step_gradient, _requantize = (
    kernel(name) for name in ("embedding_update", "embedding_step_gradient", "requantize")
)
_DONE, _BAD_INDEX, _BAD_OFFSET, _BAD_GRADIENT, _BAD_WEIGHT, _BAD_FEATURE, _BAD_SPLIT = range(7)
_OP = "embedding_update_"
_FLOAT32 = (torch.float32,)


def _step_columns(step_optimizer: str | None) -> int:
    return {"adagrad": 1, "adam": 2}.get(step_optimizer or "", 0)


def _zeros(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """State of `size` bytes a row, in the kind of memory that tables are in."""
    if device.type != "cpu":
        return torch.zeros(rows, size // dtype.itemsize, dtype=dtype, device=device)
    return empty_table(rows, size, dtype).zero_()


@dataclass(frozen=True)
class UpdateState:
    """What the optimiser remembers of a table; written in place.

    Attributes
    ----------
    row : Tensor [T, R], float32, or None
        What there is once a row, side by side so that it takes one cache line: the second moment of the row-wise
        optimisers; the second moment of the step (step optimiser adagrad, adam); its first moment (adam).
    moment : Tensor or None
        First moment of adam (float32 [T, D]) and rowwise_adam (float32 [T, D], or in 8 bits: uint8, rows as in an int8
        `QuantizedTable`).
    second : Tensor [T, D], float32, or None
        Second moment of adagrad and adam.
    """

    row: torch.Tensor | None = None
    moment: torch.Tensor | None = None
    second: torch.Tensor | None = None

    @classmethod
    def zeros(
        cls,
        table: torch.Tensor | QuantizedTable,
        *,
        optimizer: str,
        step_optimizer: str | None = None,
        moment_bits: int = 32,
    ) -> UpdateState:
        """The state before the first update of `table`.

        Parameters
        ----------
        table : Tensor [T, D] or QuantizedTable
        optimizer : str
        step_optimizer : str or None
            None for fixed step sizes.
        moment_bits : int
            32, or 8 with rowwise_adam: the first moment in 8 bits and a step a row.
        """
        op = "UpdateState"
        _check.choice(op, "optimizer", optimizer, OPTIMIZERS)
        if step_optimizer is not None:
            _check.choice(op, "step_optimizer", step_optimizer, STEP_OPTIMIZERS)
        _check.choice(op, "moment_bits", moment_bits, (32, 8))
        if moment_bits == 8 and optimizer != "rowwise_adam":
            raise ValueError(f"{op}: moment_bits 8 goes with optimizer rowwise_adam, got {optimizer!r}")
        stored, _, width = _stored(op, table)
        rows, device = stored.shape[0], stored.device
        columns = int(optimizer in _ROWWISE) + _step_columns(step_optimizer)
        row = moment = second = None
        if columns:
            row = _zeros(rows, 4 * columns, torch.float32, device)
        if moment_bits == 8:
            moment = _zeros(rows, row_bytes("int8", width), torch.uint8, device)
        elif optimizer in ("adam", "rowwise_adam"):
            moment = _zeros(rows, 4 * width, torch.float32, device)
        if optimizer in ("adam", "adagrad"):
            second = _zeros(rows, 4 * width, torch.float32, device)
        return cls(row, moment, second)


@dataclass(frozen=True)
class Pending:
    """What `embedding_update_first_` leaves for the second phase: the lookups, grouped, and the float rows w'.

    Opaque; neither it nor the table may be changed before the second phase.
    """

    groups: torch.Tensor
    floats: torch.Tensor
    indices: torch.Tensor
    offsets: torch.Tensor | None
    per_sample_weights: torch.Tensor | None
    argmax: torch.Tensor | None
    features: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None
    skip_missing: bool
    mode: str
    table_rows: int

    def rows(self) -> torch.Tensor:
        """The rows that occurred, ascending: Tensor [runs], int64."""
        total = self.indices.numel()
        _, runs, half = self.groups[:3].tolist()
        starts = self.groups[3 + 2 * total :].view(torch.int32)[:runs]
        return (self.groups[3 + half * total :][starts.long()] >> 32) & 0xFFFFFFFF

    def values(self) -> torch.Tensor:
        """w' of those rows: Tensor [runs, D], float32."""
        return self.floats[: int(self.groups[1])]


def _stored(op: str, table: torch.Tensor | QuantizedTable) -> tuple[torch.Tensor, str, int]:
    """The tensor that holds the rows, their format, D."""
    if isinstance(table, QuantizedTable):
        if table.header != "step":
            raise ValueError(f"{op}: table has rows with header {table.header}, which are for inference alone")
        return table.rows, table.format, table.dim
    name = PLAIN.get(table.dtype) if isinstance(table, torch.Tensor) else None
    if name not in FORMAT_NAMES or table.dim() != 2:
        _check.tensor(op, "table", table, dtypes=[torch.float32, torch.bfloat16, torch.float16], shape=["T", "D"])
    return table, name, table.shape[1]


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _lookups(indices, offsets, bags, rows, first, sizes, splits, skip_missing) -> tuple:
    return (
        indices.data_ptr(), indices.dtype == torch.int64, indices.numel(), _pointer(offsets), bags, rows,
        0 if first is None else first.numel(), _pointer(first), _pointer(sizes), _pointer(splits), skip_missing,
    )  # fmt: skip


def _memory(groups: torch.Tensor | None, floats: torch.Tensor | None, total: int, scratch: torch.Tensor) -> tuple:
    if groups is None:
        return 0, 0, 0, 0, scratch.data_ptr()
    counts = groups.data_ptr()
    return counts + 24, counts + 24 + 16 * total, counts, floats.data_ptr(), scratch.data_ptr()


def _scratch(total, bags, width, offsets, coefficients, groups) -> torch.Tensor:
    threads = max(_C.max_threads(), torch.get_num_threads())
    size = _C.embedding_update_scratch(total, bags, width, offsets is not None, coefficients, groups is None, threads)
    return torch.empty(size, dtype=torch.uint8)


def _raise(op, outcome, at, rows, indices, offsets, grad, weights, first, sizes, splits) -> None:
    if outcome == _BAD_INDEX:
        bags = at if offsets is None else int(torch.searchsorted(offsets, at, right=True)) - 1
        limit = rows
        if first is not None:
            feature = bags % len(first) if splits is None else int(torch.searchsorted(splits, bags, right=True)) - 1
            limit = int(sizes[feature])
        raise _check.outside(op, "indices", at, int(indices[at]), limit)
    if outcome in (_BAD_OFFSET, _BAD_SPLIT):
        is_offset = outcome == _BAD_OFFSET
        name, cuts = ("offsets", offsets) if is_offset else ("features.splits", splits)
        total = indices.numel() if is_offset else grad.shape[0]
        value = int(cuts[at])
        if at == 0:
            raise ValueError(f"{op}: {name}[0] must be 0, got {value}")
        if value < int(cuts[at - 1]):
            raise ValueError(f"{op}: {name}[{at}] = {value} is below {name}[{at - 1}]")
        what = "indices" if is_offset else "bags"
        raise ValueError(f"{op}: {name}[-1] must be {total}, the number of {what}, got {value}")
    if outcome == _BAD_FEATURE:
        low, count = int(first[at]), int(sizes[at])
        raise ValueError(f"{op}: features[{at}] is rows {low} to {low + count}, outside the table's [0, {rows})")
    if outcome in (_BAD_GRADIENT, _BAD_WEIGHT):
        name, tensor = ("grad", grad) if outcome == _BAD_GRADIENT else ("per_sample_weights", weights)
        found = float(tensor.reshape(-1)[at])
        raise ValueError(f"{op}: {name} must be finite, got {found} at flat position {at}; nothing was updated")


def _cpu(
    table: torch.Tensor,
    form: str,
    width: int,
    row_state: torch.Tensor | None,
    moment: torch.Tensor | None,
    second: torch.Tensor | None,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    weights: torch.Tensor | None,
    argmax: torch.Tensor | None,
    first: torch.Tensor | None,
    sizes: torch.Tensor | None,
    splits: torch.Tensor | None,
    skip_missing: bool,
    pooling: str,
    check: bool,
    phase: str,
    groups: torch.Tensor | None,
    floats: torch.Tensor | None,
    optimizer: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    decoupled: bool,
    grad_scale: float,
    step_rule: str,
    step_lr: float,
    step_scale: float,
    step_floor: str,
    grow: bool,
    stochastic: bool,
    seed: int,
    step_count: int,
    table_id: int,
) -> torch.Tensor:
    indices, grad = indices.contiguous(), grad.contiguous()
    if weights is not None:
        weights = weights.contiguous()
    if argmax is not None:
        argmax = argmax.contiguous()
    if offsets is not None:
        offsets = offsets.to(torch.int64).contiguous()
    if first is not None:
        first, sizes = first.contiguous(), sizes.contiguous()
        splits = None if splits is None else splits.contiguous()
    rows, total, bags = table.shape[0], indices.numel(), grad.shape[0]
    mean = pooling == "mean"
    scratch = _scratch(total, bags, width, offsets, mean or weights is not None, groups)
    column = 1 if optimizer in _ROWWISE else 0
    state = (
        (0, 0, -1, -1, -1) if row_state is None else (row_state.data_ptr(), row_state.shape[1], 0, column, column + 1)
    )
    outcome, value = _update(
        (table.data_ptr(), rows, width, table.stride(0) * table.element_size(), FORMATS[form].code),
        (
            *state, _pointer(moment), 0 if moment is None else moment.stride(0) * moment.element_size(),
            moment is not None and moment.dtype == torch.uint8, _pointer(second),
        ),
        _lookups(indices, offsets, bags, rows, first, sizes, splits, skip_missing),
        (grad.data_ptr(), _pointer(weights), _pointer(argmax), mean, check, _PHASES.index(phase)),
        (
            OPTIMIZERS.index(optimizer), lr, beta1, beta2, eps, decay, decoupled, grad_scale,
            _STEP_RULES.index(step_rule), step_lr, step_scale, STEP_FLOORS.index(step_floor), grow, stochastic,
            seed, step_count, table_id,
        ),
        _memory(groups, floats, total, scratch),
    )  # fmt: skip
    if outcome != _DONE:
        op = _OP if phase == "whole" else f"embedding_update_{phase}_"
        _raise(op, outcome, value, rows, indices, offsets, grad, weights, first, sizes, splits)
    return torch.tensor(value)


def _fake(table, *_):
    return table.new_empty((), dtype=torch.int64)


def _gradient_cpu(
    table: torch.Tensor,
    form: str,
    width: int,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    weights: torch.Tensor | None,
    argmax: torch.Tensor | None,
    first: torch.Tensor | None,
    sizes: torch.Tensor | None,
    splits: torch.Tensor | None,
    skip_missing: bool,
    pooling: str,
    check: bool,
    groups: torch.Tensor,
    floats: torch.Tensor,
    grad_scale: float,
    step_scale: float,
) -> torch.Tensor:
    grad = grad.contiguous()
    rows, total, bags = table.shape[0], indices.numel(), grad.shape[0]
    mean = pooling == "mean"
    scratch = _scratch(total, bags, width, offsets, mean or weights is not None, groups)
    outcome, at, value = _step_gradient(
        (table.data_ptr(), rows, width, table.stride(0) * table.element_size(), FORMATS[form].code),
        _lookups(indices, offsets, bags, rows, first, sizes, splits, skip_missing),
        (grad.data_ptr(), _pointer(weights), _pointer(argmax), mean, check, _PHASES.index("second")),
        (0, 0.0, 0.9, 0.999, 1e-8, 0.0, False, grad_scale, 0, 0.0, step_scale, 0, False, False, 0, 0, 0),
        _memory(groups, floats, total, scratch),
    )
    if outcome != _DONE:
        _raise("embedding_step_gradient", outcome, at, rows, indices, offsets, grad, weights, first, sizes, splits)
    return torch.tensor(value, dtype=torch.float32)


def _gradient_fake(table, *_):
    return table.new_empty((), dtype=torch.float32)


def _requantize_cpu(
    table: torch.Tensor,
    form: str,
    width: int,
    groups: torch.Tensor | None,
    floats: torch.Tensor | None,
    total: int,
    step: float,
    stochastic: bool,
    seed: int,
    step_count: int,
    table_id: int,
) -> torch.Tensor:
    threads = max(_C.max_threads(), torch.get_num_threads())
    scratch = torch.empty(threads * _C.embedding_update_buffer(width))
    clipped = _requantize(
        (table.data_ptr(), table.shape[0], width, table.stride(0) * table.element_size(), FORMATS[form].code),
        (0, True, total, 0, 0, table.shape[0], 0, 0, 0, 0, False),
        (0, 0, 0, False, False, 0),
        (0, 0.0, 0.9, 0.999, 1e-8, 0.0, False, 1.0, 0, 0.0, 1.0, 0, False, stochastic, seed, step_count, table_id),
        _memory(groups, floats, total, scratch),
        step,
    )
    return torch.tensor(clipped)


def _sample_state(table, optimizer, step_optimizer, moment_bits=32):
    state = UpdateState.zeros(table, optimizer=optimizer, step_optimizer=step_optimizer, moment_bits=moment_bits)
    return state.row, state.moment, state.second


def _sample_parts():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 5, generator=generator)
    codes = torch.randint(-8, 8, (9, 5), generator=generator, dtype=torch.int8)
    quantized = QuantizedTable.from_codes(codes, torch.full((9,), 0.125), 4)
    indices, offsets = torch.tensor([3, 0, 8, 3, 3, 1]), torch.tensor([0, 2, 2, 6])
    return weight, quantized, indices, offsets, torch.randn(3, 5, generator=generator)


def _samples() -> Iterator[tuple]:
    weight, quantized, indices, offsets, grad = _sample_parts()
    rule = (0.1, 0.9, 0.999, 1e-8, 0.01)
    fixed = ("fixed", 0.0, 1.0, "clamp", False)
    end = (7, 3, 0)
    yield (
        quantized.rows, "int4", 5, *_sample_state(quantized, "rowwise_adagrad", "adagrad"), indices, offsets, grad,
        torch.rand(6), None, None, None, None, False, "mean", True, "whole", None, None,
        "rowwise_adagrad", *rule, False, 0.5, "adagrad", 1e-4, 0.1, "clamp", True, True, *end,
    )  # fmt: skip
    yield (
        weight.clone(), "float32", 5, *_sample_state(weight, "adagrad", None), indices[:3].int(), None, grad,
        None, None, None, None, None, False, "none", False, "whole", None, None,
        "adagrad", *rule, True, 1.0, *fixed, False, *end,
    )  # fmt: skip
    half = weight.bfloat16()
    first, sizes = torch.tensor([0, 4, 0]), torch.tensor([4, 5, 4])
    yield (
        half, "bfloat16", 5, *_sample_state(half, "rowwise_adam", None, 8), torch.tensor([3, 0, -1, 3, 3, 1]),
        offsets.int(), grad, None, torch.tensor([[0] * 5, [-1] * 5, [3, 4, 5, 5, 5]], dtype=torch.int32),
        first, sizes, None, True, "max", True, "whole", None, None,
        "rowwise_adam", *rule, False, 1.0, *fixed, True, *end,
    )  # fmt: skip
    groups, floats = _pending_memory(6, 5)
    yield (
        quantized.rows.clone(), "int4", 5, *_sample_state(quantized, "adam", "adam"), indices, offsets, grad,
        None, None, None, None, None, False, "sum", True, "first", groups, floats,
        "adam", *rule, False, 1.0, "adam", 1e-4, 1.0, "abs", False, True, *end,
    )  # fmt: skip


def _sample_pending():
    _, quantized, indices, offsets, grad = _sample_parts()
    return quantized, embedding_update_first_(quantized, indices, offsets, grad, lr=0.1), grad


def _gradient_samples() -> Iterator[tuple]:
    quantized, pending, grad = _sample_pending()
    yield (
        quantized.rows, "int4", 5, pending.indices, pending.offsets, grad, None, None, None, None, None, False, "sum",
        True, pending.groups, pending.floats, 1.0, 0.1,
    )  # fmt: skip


def _requantize_samples() -> Iterator[tuple]:
    quantized, pending, _ = _sample_pending()
    yield quantized.rows, "int4", 5, pending.groups, pending.floats, 6, 0.25, True, 7, 3, 0
    yield quantized.rows.clone(), "int4", 5, None, None, 0, 0.25, False, 7, 3, 0


_LOOKUPS = (
    "Tensor indices, Tensor? offsets, Tensor grad, Tensor? per_sample_weights, Tensor? argmax, Tensor? feature_first, "
    "Tensor? feature_rows, Tensor? bag_splits, bool skip_missing, str pooling, bool check"
)
# `pooling`, not `mode`: torch's functionalisation has an argument of that name and passes ours by keyword.
_op = define(
    "embedding_update_(Tensor(a!) table, str format, int width, Tensor(b!)? row_state, Tensor(c!)? moment, "
    f"Tensor(d!)? second, {_LOOKUPS}, str phase, Tensor(e!)? groups, Tensor(f!)? floats, str optimizer, float lr, "
    "float beta1, float beta2, float eps, float decay, bool decoupled, float grad_scale, str step_rule, float step_lr, "
    "float step_scale, str step_floor, bool grow, bool stochastic, int seed, int step_count, int table_id) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
)
_gradient_op = define(
    f"embedding_step_gradient(Tensor table, str format, int width, {_LOOKUPS}, Tensor groups, Tensor floats, "
    "float grad_scale, float step_scale) -> Tensor",
    cpu=_gradient_cpu,
    fake=_gradient_fake,
    samples=_gradient_samples,
)
_requantize_op = define(
    "requantize_(Tensor(a!) table, str format, int width, Tensor? groups, Tensor? floats, int total, float step, "
    "bool stochastic, int seed, int step_count, int table_id) -> Tensor",
    cpu=_requantize_cpu,
    fake=_fake,
    samples=_requantize_samples,
)


def _pending_memory(total: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the groups of `total` lookups (3 counts, 2n keys, n + 1 starts of 32 bits) and for w' of their rows."""
    return torch.zeros(3 + 2 * total + total // 2 + 1, dtype=torch.int64), torch.empty(total, width)


def philox_uniform(seed: int, step_count: int, table_id: int, rows: torch.Tensor, width: int) -> torch.Tensor:
    """The draws in [0, 1) that the kernel makes for `rows` int64 [R]: Tensor [R, width], float64 (24 bits each)."""
    return (philox_words(seed, step_count, table_id, rows, width) >> 8).double() / 2**24


def _row_gradients(rows, width, indices, offsets, grad, weights, mode, features, skip_missing, argmax, grad_scale):
    """The rows that occur, ascending, and the sums of their gradients: int64 [R], float64 [R, width]."""
    total = len(indices)
    bags = grad.shape[0]
    lengths = torch.ones(total, dtype=torch.int64) if offsets is None else offsets.diff().long()
    bag_of = torch.repeat_interleave(torch.arange(bags), lengths)
    kept = indices != -1 if skip_missing else torch.ones(total, dtype=torch.bool)
    ids = indices.long()
    if features is not None:
        first, _, splits = features
        feature = torch.arange(bags) % len(first) if splits is None else torch.repeat_interleave(splits.diff())
        ids = ids + first[feature[bag_of]]
    terms = grad.double()[bag_of]
    if weights is not None:
        terms = terms * weights.double()[:, None]
    if mode == "mean":
        counted = torch.zeros(bags, dtype=torch.float64).index_add(0, bag_of, kept.double())
        terms = terms / counted.clamp(min=1)[bag_of][:, None]
    if mode == "max":
        terms = terms * (argmax.long()[bag_of] == torch.arange(total)[:, None])
    found, run = torch.unique(ids[kept], return_inverse=True)
    sums = torch.zeros(len(found), width, dtype=torch.float64).index_add(0, run, terms[kept])
    return found, sums * grad_scale


def _draw(x, rows, rounding, seed, step_count, table_id):
    """Whole numbers around x [R, D], float64."""
    if rounding == "nearest":
        return x.round()
    floor = x.floor()
    return floor + (philox_uniform(seed, step_count, table_id, rows, x.shape[1]) < x - floor)


def _optimised(w, g, rows, state, optimizer, lr, betas, eps, weight_decay, decay, rounding, seed, step_count, table_id):
    """w' in float64; writes the state."""
    h = g + weight_decay * w if decay == "l2" else g
    if decay == "decoupled":
        w = w * (1 - lr * weight_decay)
    if optimizer == "sgd":
        return w - lr * h
    if optimizer == "rowwise_adagrad":
        second = state.row[rows, 0].double() + h.square().mean(1)
        state.row[rows, 0] = second.float()
        return w - (lr / (second.sqrt() + eps))[:, None] * h
    if optimizer == "adagrad":
        second = state.second[rows].double() + h.square()
        state.second[rows] = second.float()
        return w - lr * h / (second.sqrt() + eps)
    time = step_count + 1
    rate = lr * math.sqrt(1 - betas[1] ** time) / (1 - betas[0] ** time)
    short = state.moment.dtype == torch.uint8
    if short:
        old = QuantizedTable(state.moment, 8, w.shape[1]).reference_values(rows, torch.float64)
    else:
        old = state.moment[rows].double()
    first = betas[0] * old + (1 - betas[0]) * h
    if short:
        step = (first.abs().amax(1) * (1.000001 / 127)).float()
        step = torch.where(step >= SMALLEST_STEP, step, 0.0)
        scaled = torch.where(step[:, None] > 0, first / step.double()[:, None], 0.0)
        codes = _draw(scaled, rows, rounding, seed, step_count, table_id ^ _MOMENT_DOMAIN)
        state.moment[rows] = QuantizedTable.from_codes(codes.to(torch.int8), step).rows
    else:
        state.moment[rows] = first.float()
    if optimizer == "adam":
        second = betas[1] * state.second[rows].double() + (1 - betas[1]) * h.square()
        state.second[rows] = second.float()
        return w - rate * first / (second.sqrt() + eps)
    second = betas[1] * state.row[rows, 0].double() + (1 - betas[1]) * h.square().mean(1)
    state.row[rows, 0] = second.float()
    return w - (rate / (second.sqrt() + eps))[:, None] * first


def _codes(table, rows):
    return QuantizedTable(table.rows[rows], table.bits, table.dim).codes.float().double()


def _read_steps(table, rows):
    step = table.step[rows].double()
    return torch.where(step < SMALLEST_STEP, STEP_FLOOR, step)


def _slopes(w, g, step, info):
    x = w / step[:, None]
    factor = torch.where(x <= info.lowest, info.lowest, torch.where(x >= info.highest, info.highest, x.round() - x))
    return (g * factor).sum(1)


def _learned(
    step, w, g, rows, state, column, info, step_lr, step_optimizer, scale, step_floor, step_range, betas, time
):  # fmt: skip
    """The new step sizes in float64; writes the state."""
    if step_lr is not None:
        move = scale * _slopes(w, g, step, info)
        if step_optimizer == "adagrad":
            second = state.row[rows, column].double() + move.square()
            state.row[rows, column] = second.float()
            move = move / (second.sqrt() + STEP_EPS)
        elif step_optimizer == "adam":
            second = betas[1] * state.row[rows, column].double() + (1 - betas[1]) * move.square()
            first = betas[0] * state.row[rows, column + 1].double() + (1 - betas[0]) * move
            state.row[rows, column], state.row[rows, column + 1] = second.float(), first.float()
            second = second / (1 - betas[1] ** time)
            move = first / (1 - betas[0] ** time) / (second.sqrt() + STEP_EPS)
        moved = step - step_lr * move
        if step_floor == "clamp":
            step = moved.clamp(min=STEP_FLOOR)
        elif step_floor == "abs":
            step = moved.abs() + STEP_SHIFT
        else:
            step = torch.where(moved > SMALLEST_STEP, moved, step)
    if step_range == "grow":
        step = torch.maximum(step, w.abs().amax(1) * (1.000001 / info.highest))
    return step


def _write(table, rows, w, step, rounding, seed, step_count, table_id):
    """Write w [R, D] to rows of `table`; returns how many values lay outside the range."""
    stored, name, _ = _stored(_OP, table)
    info = FORMATS[name]
    if name == "float32":
        stored[rows] = w.float()
        return torch.tensor(0)
    x, limit = w, _LARGEST.get(name, info.highest)
    if step is not None:
        step = step.float()
        x = w / step.double()[:, None]
    low = info.lowest if step is not None else -limit
    limited = x.clamp(low, limit)
    mantissa, smallest = {"bfloat16": (7, -126), "float16": (10, -14), "float8": (3, -6)}.get(name, (None, None))
    unit = 1.0
    if mantissa is not None:
        exponent = torch.frexp(limited).exponent - 1
        unit = torch.ldexp(torch.ones_like(limited), torch.clamp(exponent, min=smallest) - mantissa)
    if name == "bfloat16" and rounding == "stochastic":  # the magnitude goes up with the upper 16 bits of the draw
        draws = (philox_uniform(seed, step_count, table_id, rows, x.shape[1]) * 2**16).floor() / 2**16
        parts = limited.float().double().abs() / unit
        rounded = limited.sign() * (parts + draws).floor() * unit
    else:
        rounded = _draw(limited / unit, rows, rounding, seed, step_count, table_id) * unit
    if step is None:
        stored[rows] = rounded.to(stored.dtype)
    else:
        codes = rounded.float().to(torch.float8_e4m3fn) if name == "float8" else rounded.to(torch.int8)
        stored[rows] = QuantizedTable.from_codes(codes, step, table.bits).rows
    return (x.float() != limited.float()).sum()


def reference(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    state: UpdateState | None = None,
    *,
    optimizer: str = "sgd",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = "l2",
    grad_scale: float = 1.0,
    step_lr: float | None = None,
    step_optimizer: str = "adagrad",
    step_scale: str | float = "batch",
    step_floor: str = "clamp",
    step_range: str = "clip",
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    features: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    skip_missing: bool = False,
    argmax: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """The same in plain torch, in float64 between reading and writing the rows."""
    state = state or UpdateState()
    stored, name, width = _stored(_OP, table)
    rows, g = _row_gradients(
        len(stored), width, indices, offsets, grad, per_sample_weights, mode, features, skip_missing, argmax, grad_scale
    )
    step = None
    if isinstance(table, QuantizedTable):
        step = _read_steps(table, rows)
        w = _codes(table, rows) * step[:, None]
    else:
        w = stored[rows].double()
    w = _optimised(
        w, g, rows, state, optimizer, lr, betas, eps, weight_decay, decay, rounding, seed, step_count, table_id
    )
    if step is not None:
        scale = _step_scale(_OP, step_scale, name, len(grad), width, len(stored), features)
        step = _learned(
            step, w, g, rows, state, int(optimizer in _ROWWISE), FORMATS[name], step_lr, step_optimizer, scale,
            step_floor, step_range, betas, step_count + 1,
        )  # fmt: skip
    return _write(table, rows, w, step, rounding, seed, step_count, table_id)


def reference_first(
    table: QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    state: UpdateState | None = None,
    *,
    optimizer: str = "sgd",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = "l2",
    grad_scale: float = 1.0,
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    features: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    skip_missing: bool = False,
    argmax: torch.Tensor | None = None,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first phase in plain torch: (rows that occur int64 [R], w' float64 [R, D]). Writes the nearest codes."""
    rows, g = _row_gradients(
        len(table), table.dim, indices, offsets, grad, per_sample_weights, mode, features, skip_missing, argmax,
        grad_scale,
    )  # fmt: skip
    step = _read_steps(table, rows)
    w = _optimised(
        _codes(table, rows) * step[:, None], g, rows, state or UpdateState(), optimizer, lr, betas, eps,
        weight_decay, decay, rounding, seed, step_count, table_id,
    )  # fmt: skip
    _write(table, rows, w, step, "nearest", 0, 0, 0)
    return rows, w


def _pending_gradients(table, pending, grad, grad_scale):
    return _row_gradients(
        len(table), table.dim, pending.indices, pending.offsets, grad, pending.per_sample_weights, pending.mode,
        pending.features, pending.skip_missing, pending.argmax, grad_scale,
    )  # fmt: skip


def reference_second(
    table: QuantizedTable,
    pending: Pending,
    grad: torch.Tensor,
    state: UpdateState | None = None,
    *,
    optimizer: str = "sgd",
    betas: tuple[float, float] = (0.9, 0.999),
    grad_scale: float = 1.0,
    step_lr: float | None = None,
    step_optimizer: str = "adagrad",
    step_scale: str | float = "batch",
    step_floor: str = "clamp",
    step_range: str = "clip",
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
    check: bool = True,
) -> torch.Tensor:
    """The second phase in plain torch, float64, from the w' of `pending`."""
    rows, g = _pending_gradients(table, pending, grad, grad_scale)
    w = pending.values().double()
    scale = _step_scale(_OP, step_scale, table.format, len(grad), table.dim, len(table), pending.features)
    step = _learned(
        _read_steps(table, rows), w, g, rows, state, int(optimizer in _ROWWISE), FORMATS[table.format], step_lr,
        step_optimizer, scale, step_floor, step_range, betas, step_count + 1,
    )  # fmt: skip
    return _write(table, rows, w, step, rounding, seed, step_count, table_id)


def reference_step_gradient(
    table: QuantizedTable,
    pending: Pending,
    grad: torch.Tensor,
    *,
    grad_scale: float = 1.0,
    step_scale: str | float = "table",
    check: bool = True,
) -> torch.Tensor:
    """`embedding_step_gradient` in plain torch, float64."""
    rows, g = _pending_gradients(table, pending, grad, grad_scale)
    scale = _step_scale(_OP, step_scale, table.format, len(grad), table.dim, len(table), pending.features)
    return scale * _slopes(pending.values().double(), g, _read_steps(table, rows), FORMATS[table.format]).sum()


def reference_requantize(
    table: QuantizedTable,
    step: float | torch.Tensor,
    *,
    pending: Pending | None = None,
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
) -> torch.Tensor:
    """`requantize_` in plain torch, float64."""
    rows = torch.arange(len(table))
    w = _codes(table, rows) * _read_steps(table, rows)[:, None]
    if pending is not None:
        w[pending.rows()] = pending.values().double()
    return _write(table, rows, w, torch.full((len(table),), float(step)), rounding, seed, step_count, table_id)


def _step_scale(op, step_scale, name, bags, width, rows, features) -> float:
    if not isinstance(step_scale, str):
        if not math.isfinite(step_scale):
            raise ValueError(f"{op}: step_scale must be finite, got {step_scale}")
        return float(step_scale)
    if step_scale == "batch":
        tables = 1 if features is None else max(1, len(features[0]))
        return 1 / math.sqrt(max(bags / tables, 1) * width * max(FORMATS[name].highest, 1))
    if step_scale == "table":
        return 1 / math.sqrt(2.0 ** (FORMATS[name].bits - 1)) / math.sqrt(max(rows, 1) * width)
    if step_scale == "none":
        return 1.0
    raise ValueError(f"{op}: step_scale must be one of {', '.join(STEP_SCALES)} or a number, got {step_scale!r}")


def _check_tensor(op, name, tensor, dtypes, shape, device) -> None:
    """As `_check.tensor`, quick where nothing is wrong; `shape` None stands for any vector."""
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.dtype not in dtypes
        or (tensor.dim() != 1 if shape is None else tensor.shape != shape)
        or tensor.device != device
    ):
        _check.tensor(op, name, tensor, dtypes=dtypes, shape=["n"] if shape is None else shape, device=device)


def _check_lookups(op, indices, offsets, grad, weights, mode, features, argmax, width, device) -> None:
    if mode not in MODES:
        _check.choice(op, "mode", mode, MODES)
    _check_tensor(op, "indices", indices, _check.INDEX_DTYPES, None, device)
    bags = indices.shape[0]
    if offsets is not None:
        _check_tensor(op, "offsets", offsets, _check.INDEX_DTYPES, None, device)
        if mode == "none":
            raise ValueError(f"{op}: mode none gives a row for each index and takes no offsets")
        bags = offsets.shape[0] - 1
        if bags < 0:
            raise ValueError(f"{op}: offsets must have one entry more than there are bags, got none")
    _check_tensor(op, "grad", grad, _FLOAT32, (bags, width), device)
    if weights is not None:
        if mode == "max":
            raise ValueError(f"{op}: per_sample_weights do not go with mode max")
        _check_tensor(op, "per_sample_weights", weights, _FLOAT32, indices.shape, device)
    if (mode == "max") != (argmax is not None):
        raise ValueError(f"{op}: argmax goes with mode max, got mode {mode} and argmax {type(argmax).__name__}")
    if argmax is not None:
        _check_tensor(op, "argmax", argmax, (torch.int32,), (bags, width), device)
    if features is not None:
        first, sizes, splits = features
        _check_tensor(op, "features.first", first, (torch.int64,), None, device)
        count = first.shape[0]
        _check_tensor(op, "features.rows", sizes, (torch.int64,), (count,), device)
        if splits is not None:
            _check_tensor(op, "features.splits", splits, (torch.int64,), (count + 1,), device)
        elif count == 0 or bags % count != 0:
            raise ValueError(f"{op}: {bags} bags cannot be dealt out to {count} features")
        if count == 0:
            raise ValueError(f"{op}: features must name at least one feature")
    if indices.shape[0] >= 2**31:
        raise ValueError(f"{op}: needs below 2^31 indices, got {indices.shape[0]}")


def _check_table(op, stored, width) -> None:
    if width == 0:
        raise ValueError(f"{op}: table must have at least one column, got shape {list(stored.shape)}")
    if stored.shape[0] > 2**32:
        raise ValueError(f"{op}: needs at most 2^32 rows, got {stored.shape[0]}")
    if not stored.is_contiguous():
        raise ValueError(f"{op}: table must be contiguous, since it is written in place")
    if stored.requires_grad:
        raise ValueError(f"{op}: table is updated in place and must not require a gradient")


def _check_numbers(op, lr, betas, eps, weight_decay, grad_scale, step_lr, optimizer) -> None:
    inf = math.inf
    if not (0 <= lr < inf and 0 <= weight_decay < inf and 0 <= step_lr < inf):
        name, value = next(
            (name, value)
            for name, value in (("lr", lr), ("weight_decay", weight_decay), ("step_lr", step_lr))
            if not 0 <= value < inf
        )
        raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")
    if not 0 <= eps < inf or (optimizer != "sgd" and eps < _TINY):
        raise ValueError(f"{op}: eps must be positive, got {eps}: a row without gradients would be divided by it")
    if not -inf < grad_scale < inf:
        raise ValueError(f"{op}: grad_scale must be finite, got {grad_scale}")
    if not (len(betas) == 2 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(f"{op}: betas must be two numbers in [0, 1), got {betas}")


def _check_key(op, seed, step_count, table_id) -> None:
    if not (0 <= seed < 2**63 and 0 <= step_count < 2**32 and 0 <= table_id < 2**31):
        for name, value, bits in (("seed", seed, 63), ("step_count", step_count, 32), ("table_id", table_id, 31)):
            if not 0 <= value < 2**bits:
                raise ValueError(f"{op}: {name} = {value} is outside [0, {2**bits})")


def _check_state_tensor(op, name, tensor, shape, dtype, device) -> None:
    if tensor is None:
        raise ValueError(f"{op}: state.{name} must be a tensor of shape {list(shape)} here, got None")
    _check_tensor(op, f"state.{name}", tensor, (dtype,), shape, device)
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: state.{name} must be contiguous, since it is written in place")


def _checked_state(op, state, optimizer, step_rule, rows, width, device):
    """The tensors of `state` that the optimiser uses."""
    row = moment = second = None
    columns = (1 if optimizer in _ROWWISE else 0) + _step_columns(step_rule)
    if columns:
        row = state.row
        if row is None or row.dim() != 2 or row.shape[1] < columns:
            found = "None" if row is None else list(row.shape)
            raise ValueError(f"{op}: state.row must be a tensor of shape {[rows, columns]} here, got {found}")
        _check_state_tensor(op, "row", row, (rows, row.shape[1]), torch.float32, device)
    if optimizer == "adam" or optimizer == "rowwise_adam":
        moment = state.moment
        if moment is not None and moment.dtype == torch.uint8 and optimizer == "rowwise_adam":
            _check_state_tensor(op, "moment", moment, (rows, row_bytes("int8", width)), torch.uint8, device)
        else:
            _check_state_tensor(op, "moment", moment, (rows, width), torch.float32, device)
    if optimizer == "adam" or optimizer == "adagrad":
        second = state.second
        _check_state_tensor(op, "second", second, (rows, width), torch.float32, device)
    return row, moment, second


def _check_options(op, optimizer, decay, step_optimizer, step_floor, step_range, rounding) -> None:
    if (
        optimizer in OPTIMIZERS
        and decay in DECAYS
        and step_optimizer in STEP_OPTIMIZERS
        and step_floor in STEP_FLOORS
        and step_range in STEP_RANGES
        and rounding in ROUNDINGS
    ):
        return
    for name, value, allowed in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("decay", decay, DECAYS),
        ("step_optimizer", step_optimizer, STEP_OPTIMIZERS),
        ("step_floor", step_floor, STEP_FLOORS),
        ("step_range", step_range, STEP_RANGES),
        ("rounding", rounding, ROUNDINGS),
    ):
        _check.choice(op, name, value, allowed)


def _call(
    op, phase, pending, table, indices, offsets, grad, state, *, optimizer, lr, betas, eps, weight_decay, decay,
    grad_scale, step_lr, step_optimizer, step_scale, step_floor, step_range, rounding, seed, step_count, table_id,
    per_sample_weights, mode, features, skip_missing, argmax, check,
) -> torch.Tensor:  # fmt: skip
    stored, form, width = _stored(op, table)
    _check_table(op, stored, width)
    device, rows = stored.device, stored.shape[0]
    _check_options(op, optimizer, decay, step_optimizer, step_floor, step_range, rounding)
    _check_lookups(op, indices, offsets, grad, per_sample_weights, mode, features, argmax, width, device)
    step_rule = "fixed"
    if step_lr is not None and phase != "first":
        if form == "float8":
            raise ValueError(f"{op}: step_lr must be None for float8 rows, whose step is fixed or grows, got {step_lr}")
        if isinstance(table, QuantizedTable):
            step_rule = step_optimizer
    _check_numbers(op, lr, betas, eps, weight_decay, grad_scale, step_lr or 0.0, optimizer)
    _check_key(op, seed, step_count, table_id)
    row, moment, second = _checked_state(op, state or UpdateState(), optimizer, step_rule, rows, width, device)
    scale = _step_scale(op, step_scale, form, grad.shape[0], width, rows, features) if step_rule != "fixed" else 1.0
    first, sizes, splits = (None, None, None) if features is None else features
    groups, floats = (None, None) if pending is None else (pending.groups, pending.floats)
    return _op(
        stored, form, width, row, moment, second, indices, offsets, grad.detach(),
        None if per_sample_weights is None else per_sample_weights.detach(), argmax, first, sizes, splits,
        skip_missing, mode, check, phase, groups, floats, optimizer, float(lr), float(betas[0]), float(betas[1]),
        float(eps), float(weight_decay), decay == "decoupled", float(grad_scale), step_rule, float(step_lr or 0.0),
        scale, step_floor, step_range == "grow" and form in WITH_STEP, rounding == "stochastic",
        int(seed), int(step_count), int(table_id),
    )  # fmt: skip


def embedding_update_(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    state: UpdateState | None = None,
    *,
    optimizer: str = "sgd",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = "l2",
    grad_scale: float = 1.0,
    step_lr: float | None = None,
    step_optimizer: str = "adagrad",
    step_scale: str | float = "batch",
    step_floor: str = "clamp",
    step_range: str = "clip",
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    features: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    skip_missing: bool = False,
    argmax: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """Update the rows that a batch looked up, in place; no float copy of a table of few bits ever exists.

    For each row that occurs, with g the sum of its gradients over the batch (before anything is rounded):

    .. math::
        w' &= \\Delta q - \\eta\\,\\mathrm{opt}(g + \\lambda w) \\\\
        \\Delta' &= \\Delta - \\eta_\\Delta\\,\\mathrm{opt}\\Big(s \\sum_d g_d\\, c(w'_d / \\Delta)\\Big), \\qquad
            c(x) = l,\\ \\lfloor x \\rceil - x,\\ h \\text{ below, inside, above the range } [l, h] \\\\
        q' &= \\mathrm{clip}(\\lfloor w' / \\Delta' + u \\rfloor, l, h), \\qquad u \\sim U[0, 1)

    A float32 table takes the first line alone; bfloat16 and float16 ones take the first, and are then rounded to the
    grid of their format.

    Parameters
    ----------
    table : Tensor [T, D] float32, bfloat16 or float16, or QuantizedTable; contiguous, written in place
    indices, offsets, per_sample_weights, mode, features, skip_missing
        As they went into `embedding_bag`. Ids may repeat.
    grad : Tensor [B, D], float32
        The gradient of the bags ([n, D] without offsets).
    state : UpdateState or None
        Written in place; `UpdateState.zeros` makes it. None for SGD with a fixed step.
    optimizer : str
        "sgd"; "rowwise_adagrad" (one float a row); "adagrad" (one float a weight); "adam" (two floats a weight);
        "rowwise_adam" (a first moment per weight, in float32 or 8 bits as `state.moment` is, and one second moment a
        row). Adam's moments and its correction by `step_count` + 1 are lazy: rows that do not occur stay as they are,
        as in `torch.optim.SparseAdam`.
    lr : float
        Learning rate of the weights.
    betas : (float, float)
        Of adam and rowwise_adam, and of the step optimiser adam.
    eps : float
        Added to the root of the second moment.
    weight_decay : float
        Of the rows that occur.
    decay : str
        "l2": added to the gradient. "decoupled": the row shrinks by 1 - lr * weight_decay first (as AdamW).
    grad_scale : float
        Multiplies the summed gradient, as where a loss was scaled.
    step_lr : float or None
        Learning rate of the step sizes of int8, int4 and int2 rows. None: they are fixed. float8 rows only take None.
    step_optimizer : str
        "adagrad": one float a row; its first change of a step is `step_lr`, whatever the scale of the gradient, so
        `step_lr` wants to be well below the step. "adam" (mpe): two floats a row. "sgd": as plain as LSQ.
    step_scale : str or float
        The factor s on a step's gradient. "batch" (the paper and Hetu): 1 / sqrt(B * D * (2^(bits - 1) - 1)), B the
        bags of a feature. "table" (mpe): 1 / sqrt(2^(bits - 1)) / sqrt(T * D). "none": 1. It cancels out under
        "adagrad" and "adam".
    step_floor : str
        What keeps a step positive. "clamp": max(step, 1e-8). "abs" (mpe): |step| + 1e-10. "none" (the paper and Hetu
        have nothing): a change that would leave a step of 1e-30 or less is not made.
    step_range : str
        "clip" as in the paper: weights outside the range are clipped. "grow": a step is never smaller than max |w'| /
        the highest code (448 for float8), so that nothing is clipped.
    rounding : str
        "stochastic" or "nearest". To the nearest, a change below half a step (or unit in the last place) is lost.
    seed, step_count, table_id : int
        With row and column, the key of the draws: count `step_count` up at each update. `table_id` < 2^31.
    argmax : Tensor [B, D], int32, or None
        With mode "max": for each bag and column, the position in `indices` whose row won; -1 for an empty bag.
    check : bool
        Refuse NaN and infinity in `grad` and `per_sample_weights`. Ids and offsets are always checked.

    Returns
    -------
    Tensor [], int64
        How many values were clipped: codes out of range, or values beyond the largest of bfloat16 and float16.

    Raises
    ------
    IndexError
        An id outside its table.
    TypeError, ValueError
        Wrong dtypes, shapes, options, offsets; NaN or infinity in the gradient. In every case nothing was written.

    Notes
    -----
    This is ALPT in a single pass: the gradient of the one backward pass stands for the gradient at w', where the paper
    runs a second forward and backward (`embedding_update_first_`). A row's gradients are summed in float32 in the order
    of the batch, in parts of 256. The outcome depends on the arguments alone, not on threads or instruction set. A step
    of NaN or infinity stays so; one below 1e-30 is read as 1e-8. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Li et al., "Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023.
    Esser et al., "Learned Step Size Quantization", ICLR 2020.
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022.
    """
    return _call(
        _OP, "whole", None, table, indices, offsets, grad, state, optimizer=optimizer, lr=lr, betas=betas, eps=eps,
        weight_decay=weight_decay, decay=decay, grad_scale=grad_scale, step_lr=step_lr, step_optimizer=step_optimizer,
        step_scale=step_scale, step_floor=step_floor, step_range=step_range, rounding=rounding, seed=seed,
        step_count=step_count, table_id=table_id, per_sample_weights=per_sample_weights, mode=mode, features=features,
        skip_missing=skip_missing, argmax=argmax, check=check,
    )  # fmt: skip


def _integer_table(op: str, table: object) -> QuantizedTable:
    if not isinstance(table, QuantizedTable) or table.bits == "fp8":
        found = table.format if isinstance(table, QuantizedTable) else type(table).__name__
        raise TypeError(f"{op}: table must be a QuantizedTable of 8, 4 or 2 bits, got {found}")
    return table


def _check_pending(op: str, table: QuantizedTable, pending: Pending) -> None:
    """Refuse what was left by the first phase of another table: its rows would lie outside this one."""
    if not isinstance(pending, Pending):
        raise TypeError(f"{op}: pending must be what embedding_update_first_ gave, got {type(pending).__name__}")
    _check.tensor(op, "table", table.rows, shape=["T", row_bytes(table.format, pending.floats.shape[1])])
    for what, wanted, found in (
        ("rows", pending.table_rows, len(table)),
        ("columns", pending.floats.shape[1], table.dim),
    ):
        if found != wanted:
            raise ValueError(f"{op}: table must have the {wanted} {what} of the one pending is of, got {found}")


def embedding_update_first_(
    table: QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    grad: torch.Tensor,
    state: UpdateState | None = None,
    *,
    optimizer: str = "sgd",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = "l2",
    grad_scale: float = 1.0,
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    features: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    skip_missing: bool = False,
    argmax: torch.Tensor | None = None,
    check: bool = True,
) -> Pending:
    """The first phase of ALPT as published: the weights' step in float.

    w' goes to a float32 buffer, and the table gets its nearest codes with the old step sizes, so that an ordinary
    forward pass over the same batch gives Q_D(w', step). `embedding_update_second_` does the rest; between the two the
    table and the lookups must stay as they are. With both phases on the same gradient, the outcome is that of
    `embedding_update_`.

    Parameters
    ----------
    table : QuantizedTable of 8, 4 or 2 bits
    rounding, seed, step_count, table_id
        Of a first moment in 8 bits.
    others
        As in `embedding_update_`.

    Returns
    -------
    Pending
        For the second phase: the lookups, grouped, and w'; 4 * D bytes a lookup.

    Raises
    ------
    As `embedding_update_`; TypeError for a table without integer codes.
    """
    op = "embedding_update_first_"
    _integer_table(op, table)
    _check.tensor(op, "indices", indices, dtypes=_check.INDEX_DTYPES, shape=["n"])
    groups, floats = _pending_memory(indices.shape[0], table.dim)
    features = None if features is None else tuple(None if part is None else part.contiguous() for part in features)
    pending = Pending(
        groups, floats, indices.contiguous(), None if offsets is None else offsets.to(torch.int64).contiguous(),
        None if per_sample_weights is None else per_sample_weights.detach().contiguous(),
        None if argmax is None else argmax.contiguous(), features, skip_missing, mode, len(table),
    )  # fmt: skip
    _call(
        op, "first", pending, table, pending.indices, pending.offsets, grad, state, optimizer=optimizer, lr=lr,
        betas=betas, eps=eps, weight_decay=weight_decay, decay=decay, grad_scale=grad_scale, step_lr=None,
        step_optimizer="sgd", step_scale="none", step_floor="clamp", step_range="clip", rounding=rounding, seed=seed,
        step_count=step_count, table_id=table_id, per_sample_weights=pending.per_sample_weights, mode=mode,
        features=features, skip_missing=skip_missing, argmax=pending.argmax, check=check,
    )  # fmt: skip
    return pending


def embedding_update_second_(
    table: QuantizedTable,
    pending: Pending,
    grad: torch.Tensor,
    state: UpdateState | None = None,
    *,
    optimizer: str = "sgd",
    betas: tuple[float, float] = (0.9, 0.999),
    grad_scale: float = 1.0,
    step_lr: float | None = None,
    step_optimizer: str = "adagrad",
    step_scale: str | float = "batch",
    step_floor: str = "clamp",
    step_range: str = "clip",
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
    check: bool = True,
) -> torch.Tensor:
    """The second phase of ALPT as published: the steps' step, then the rows rounded from w' with the new step sizes.

    Parameters
    ----------
    table, state
        As in the first phase.
    pending : Pending
        What the first phase gave.
    grad : Tensor [B, D], float32
        The gradient of the second backward pass.
    optimizer : str
        As in the first phase: where in `state.row` the step's moments are depends on it.
    others
        As in `embedding_update_`.

    Returns
    -------
    Tensor [], int64
        How many codes were clipped.

    Raises
    ------
    As `embedding_update_`.
    """
    op = "embedding_update_second_"
    _integer_table(op, table)
    _check_pending(op, table, pending)
    # The weights' optimiser has done its work; of its state only the place of the step's moments still counts.
    ahead = int(optimizer in _ROWWISE)
    columns = ahead + (_step_columns(step_optimizer) if step_lr is not None else 0)
    _check.choice(op, "optimizer", optimizer, OPTIMIZERS)
    state = state or UpdateState()
    if columns > ahead and (state.row is None or state.row.dim() != 2 or state.row.shape[1] < columns):
        found = "None" if state.row is None else list(state.row.shape)
        raise ValueError(f"{op}: state.row must be a tensor of shape {[len(table), columns]} here, got {found}")
    stand_in = "rowwise_adagrad" if ahead and columns > ahead else "sgd"
    return _call(
        op, "second", pending, table, pending.indices, pending.offsets, grad, state, optimizer=stand_in, lr=0.0,
        betas=betas, eps=1e-8, weight_decay=0.0, decay="l2", grad_scale=grad_scale, step_lr=step_lr,
        step_optimizer=step_optimizer, step_scale=step_scale, step_floor=step_floor, step_range=step_range,
        rounding=rounding, seed=seed, step_count=step_count, table_id=table_id,
        per_sample_weights=pending.per_sample_weights, mode=pending.mode, features=pending.features,
        skip_missing=pending.skip_missing, argmax=pending.argmax, check=check,
    )  # fmt: skip


def embedding_step_gradient(
    table: QuantizedTable,
    pending: Pending,
    grad: torch.Tensor,
    *,
    grad_scale: float = 1.0,
    step_scale: str | float = "table",
    check: bool = True,
) -> torch.Tensor:
    """The gradient of one step size for the whole table (as in mpe): the rows' step gradients at w', summed.

    .. math:: t = s \\sum_r \\sum_d g_{rd}\\, c(w'_{rd} / \\Delta_r)

    Give the new step, by an optimiser of your choice, to `requantize_` with the same `pending`.

    Parameters
    ----------
    table : QuantizedTable of 8, 4 or 2 bits
    pending : Pending
        Of `embedding_update_first_`.
    grad : Tensor [B, D], float32
        Of the second backward pass, or of the first again (single pass).
    grad_scale, step_scale, check
        As in `embedding_update_`.

    Returns
    -------
    Tensor [], float32
        Summed in float64, in one order.

    Raises
    ------
    As `embedding_update_`.
    """
    op = "embedding_step_gradient"
    _integer_table(op, table)
    _check_pending(op, table, pending)
    _check_table(op, table.rows, table.dim)
    _check_lookups(
        op, pending.indices, pending.offsets, grad, pending.per_sample_weights, pending.mode, pending.features,
        pending.argmax, table.dim, table.rows.device,
    )  # fmt: skip
    _check_numbers(op, 0.0, (0.0, 0.0), 1.0, 0.0, grad_scale, 0.0, "sgd")
    scale = _step_scale(op, step_scale, table.format, grad.shape[0], table.dim, len(table), pending.features)
    first, sizes, splits = (None, None, None) if pending.features is None else pending.features
    return _gradient_op(
        table.rows, table.format, table.dim, pending.indices, pending.offsets, grad.detach(),
        pending.per_sample_weights, pending.argmax, first, sizes, splits, pending.skip_missing, pending.mode, check,
        pending.groups, pending.floats, float(grad_scale), scale,
    )  # fmt: skip


def requantize_(
    table: QuantizedTable,
    step: float | torch.Tensor,
    *,
    pending: Pending | None = None,
    rounding: str = "stochastic",
    seed: int = 0,
    step_count: int = 0,
    table_id: int = 0,
) -> torch.Tensor:
    """Give every row of a table the same step size, and round all of them again, in place.

    .. math:: q'_{rd} = \\mathrm{clip}(\\lfloor w_{rd} / \\Delta' + u \\rfloor)

    Parameters
    ----------
    table : QuantizedTable
    step : float or Tensor []
        The new step size, positive.
    pending : Pending or None
        Of `embedding_update_first_`: the rows that occurred are rounded from their float w', the others from their old
        codes.
    rounding, seed, step_count, table_id
        As in `embedding_update_`.

    Returns
    -------
    Tensor [], int64
        How many values were clipped.

    Raises
    ------
    TypeError, ValueError
        A table without steps; a step that is not positive and finite; wrong options.
    """
    op = "requantize_"
    if not isinstance(table, QuantizedTable):
        raise TypeError(f"{op}: table must be a QuantizedTable, got {type(table).__name__}")
    stored, form, width = _stored(op, table)
    _check_table(op, stored, width)
    _check.choice(op, "rounding", rounding, ROUNDINGS)
    value = float(step)
    if not SMALLEST_STEP < value <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: step must be positive and finite, got {value}")
    _check_key(op, seed, step_count, table_id)
    groups = floats = None
    if pending is not None:
        _check_pending(op, table, pending)
        groups, floats = pending.groups, pending.floats
    total = 0 if pending is None else pending.indices.numel()
    return _requantize_op(
        stored, form, width, groups, floats, total, value, rounding == "stochastic", int(seed), int(step_count),
        int(table_id),
    )  # fmt: skip


embedding_update_.reference = reference
embedding_update_first_.reference = reference_first
embedding_update_second_.reference = reference_second
embedding_step_gradient.reference = reference_step_gradient
requantize_.reference = reference_requantize
