"""Sums of table rows, the table in floats or in 8 bits: `embedding_bag`, `quantize`, `QuantizedTable`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recfast.ops import _check
from recfast.ops._library import define, kernel

MODES = ("sum", "mean", "none")
ROUNDINGS = ("nearest", "stochastic")
_FLOATS = (torch.float32, torch.float64)
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.int8: "int8"}
_KERNELS, _WEIGHT_GRADIENTS, _TABLE_GRADIENTS = (
    {
        (value, index): kernel(f"{stem}_{_NAMES[value]}_{str(index).removeprefix('torch.')}")
        for value in values
        for index in _check.INDEX_DTYPES
    }
    for stem, values in (
        ("embedding_bag", _NAMES),
        ("embedding_bag_weight_gradient", _NAMES),
        ("embedding_bag_table_gradient", _FLOATS),
    )
)


@dataclass(frozen=True)
class QuantizedTable:
    """A table of integers with one step size a row: row r stands for `step[r] * codes[r]`.

    Attributes
    ----------
    codes : Tensor [T, D], int8
    step : Tensor [T], float32, not negative
    bits : int
        Width of a code; 8 today.
    dim : int
        D.
    """

    codes: torch.Tensor
    step: torch.Tensor
    bits: int = 8
    dim: int = 0

    def __post_init__(self) -> None:
        _supported_bits("QuantizedTable", self.bits)
        _check.tensor("QuantizedTable", "codes", self.codes, dtypes=[torch.int8], shape=["T", "D"])
        rows, width = self.codes.shape
        _check.tensor("QuantizedTable", "step", self.step, dtypes=[torch.float32], shape=[rows])
        if self.dim not in (0, width):
            raise ValueError(f"QuantizedTable: dim must be {width}, the width of codes, got {self.dim}")
        object.__setattr__(self, "dim", width)

    def dequantize(self) -> torch.Tensor:
        """The rows as floats: Tensor [T, D], float32."""
        return self.step[:, None] * self.codes.float()

    def __len__(self) -> int:
        return self.codes.shape[0]


def _supported_bits(op: str, bits: object) -> None:
    if bits != 8 or isinstance(bits, bool):
        raise ValueError(f"{op}: bits must be 8, the only width that is supported today, got {bits!r}")


def quantize(
    weight: torch.Tensor,
    *,
    bits: int = 8,
    step: torch.Tensor | float | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> QuantizedTable:
    """Round a float table to 8-bit codes with one step size a row.

    .. math:: q_{rd} = \\mathrm{clip}(\\mathrm{round}(w_{rd} / \\Delta_r), -128, 127)

    Parameters
    ----------
    weight : Tensor [T, D], float32 or float64, finite
    bits : int
        8.
    step : Tensor [T], float or None
        The step sizes, positive. None: max |w_r| / 127, so that nothing is clipped (a row of zeros gets step 0).
    rounding : str
        "nearest" (ties to even), or "stochastic": up with the probability of the fraction, so that the mean is kept.
    seed : int
        Of the stochastic rounding.

    Returns
    -------
    QuantizedTable
        |dequantised - w| is at most step / 2 ("nearest") or below step ("stochastic") where nothing is clipped.

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape, NaN or infinity, a step that is not positive, bits other than 8.
    """
    op = "quantize"
    _supported_bits(op, bits)
    _check.choice(op, "rounding", rounding, ROUNDINGS)
    _check.tensor(op, "weight", weight, dtypes=_FLOATS, shape=["T", "D"])
    weight = weight.detach()
    _check.finite(op, "weight", weight)
    if step is None:
        largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
        steps = (largest / 127).float()
    else:
        steps = torch.as_tensor(step, dtype=torch.float32, device=weight.device).detach()
        steps = steps.expand(len(weight)).clone() if steps.dim() == 0 else steps
        _check.tensor(op, "step", steps, shape=[len(weight)])
        if not bool(((steps > 0) & torch.isfinite(steps)).all()):
            raise ValueError(f"{op}: step must be positive and finite, got {float(steps.min())}")
    scaled = torch.where(steps[:, None] > 0, weight / steps[:, None].to(weight.dtype), 0.0)
    if rounding == "nearest":
        rounded = scaled.round()
    else:
        generator = torch.Generator(weight.device).manual_seed(seed)
        floor = scaled.floor()
        draws = torch.rand(scaled.shape, generator=generator, dtype=scaled.dtype, device=scaled.device)
        rounded = floor + (draws < scaled - floor)
    return QuantizedTable(rounded.clamp(-128, 127).to(torch.int8), steps)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _widened(offsets: torch.Tensor | None) -> torch.Tensor | None:
    return None if offsets is None else offsets.to(torch.int64).contiguous()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def bad_offset(op: str, offsets: torch.Tensor, position: int, total: int) -> ValueError:
    """The error for the first wrong entry of `offsets`, as a kernel reports it."""
    value = int(offsets[position])
    if position == 0:
        return ValueError(f"{op}: offsets[0] must be 0, got {value}")
    if value < int(offsets[position - 1]):
        return ValueError(f"{op}: offsets[{position}] = {value} is below offsets[{position - 1}]")
    return ValueError(f"{op}: offsets[-1] must be {total}, the number of indices, got {value}")


def _cpu(
    table: torch.Tensor,
    step: torch.Tensor | None,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    mode: str,
    check: bool,
) -> torch.Tensor:
    table, indices = table.contiguous(), indices.contiguous()
    step, weights, wide = _contiguous(step), _contiguous(per_sample_weights), _widened(offsets)
    rows, width = table.shape
    total = indices.numel()
    bags = total if wide is None else wide.numel() - 1
    out = torch.empty(bags, width, dtype=torch.float32 if table.dtype == torch.int8 else table.dtype)
    wrong = _KERNELS[table.dtype, indices.dtype](
        table.data_ptr(), _pointer(step), rows, width, indices.data_ptr(), total,
        _pointer(wide), bags, _pointer(weights), mode == "mean", out.data_ptr(),
    )  # fmt: skip
    if wrong < -1:
        raise bad_offset("embedding_bag", wide, -2 - wrong, total)
    if wrong >= 0 and check:
        raise _check.outside("embedding_bag", "indices", wrong, int(indices[wrong]), rows)
    return out


def _fake(table, step, indices, offsets, per_sample_weights, mode, check):
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    dtype = torch.float32 if table.dtype == torch.int8 else table.dtype
    return table.new_empty((bags, table.shape[1]), dtype=dtype)


def _gradient_cpu(
    grad: torch.Tensor,
    table: torch.Tensor | None,
    step: torch.Tensor | None,
    rows: int,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    mode: str,
    of_table: bool,
    of_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, indices = grad.contiguous(), indices.contiguous()
    step, weights, wide = _contiguous(step), _contiguous(per_sample_weights), _widened(offsets)
    total, width = indices.numel(), grad.shape[1]
    bags = grad.shape[0]
    table_gradient, weight_gradient = grad.new_empty(0, width), grad.new_empty(0)
    if of_table:
        if total >= 2**31 or rows > 2**32:
            raise ValueError(f"embedding_bag: a gradient needs below 2^31 indices and 2^32 rows, got {total}, {rows}")
        table_gradient = grad.new_zeros(rows, width)
        keys = torch.empty(2 * total, dtype=torch.int64)
        starts = torch.empty(total + 1, dtype=torch.int64)
        bag_of = coefficient = None
        if wide is not None:
            bag_of = torch.empty(total, dtype=torch.int32)
            coefficient = grad.new_empty(total) if weights is not None or mode == "mean" else None
        wrong = _TABLE_GRADIENTS[grad.dtype, indices.dtype](
            grad.data_ptr(), rows, width, indices.data_ptr(), total, _pointer(wide), bags, _pointer(weights),
            mode == "mean", keys.data_ptr(), starts.data_ptr(), _pointer(bag_of), _pointer(coefficient),
            table_gradient.data_ptr(),
        )  # fmt: skip
        if wrong >= 0:
            raise _check.outside("embedding_bag", "indices", wrong, int(indices[wrong]), rows)
    if of_weights:
        table = table.contiguous()
        weight_gradient = grad.new_empty(total)
        _WEIGHT_GRADIENTS[table.dtype, indices.dtype](
            table.data_ptr(), _pointer(step), rows, width, indices.data_ptr(), total, _pointer(wide), bags,
            mode == "mean", grad.data_ptr(), weight_gradient.data_ptr(),
        )  # fmt: skip
    return table_gradient, weight_gradient


def _gradient_fake(grad, table, step, rows, indices, offsets, per_sample_weights, mode, of_table, of_weights):
    return (
        grad.new_empty((rows if of_table else 0, grad.shape[1])),
        grad.new_empty(indices.shape[0] if of_weights else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    table, step, indices, offsets, weights, mode, _ = inputs
    of_weights = weights is not None and weights.requires_grad
    # The table itself is only needed for the weights' gradient: saving it would forbid updating it in place.
    ctx.save_for_backward(table if of_weights else None, step if of_weights else None, indices, offsets, weights)
    ctx.rows, ctx.mode = table.shape[0], mode


def _backward(ctx, grad: torch.Tensor):
    table, step, indices, offsets, weights = ctx.saved_tensors
    of_table, of_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    table_gradient, weight_gradient = _gradient_op(
        grad, table, step, ctx.rows, indices, offsets, weights, ctx.mode, of_table, of_weights
    )
    return (
        table_gradient if of_table else None,
        None,
        None,
        None,
        weight_gradient if of_weights else None,
        None,
        None,
    )


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 5, generator=generator)
    quantized = quantize(table)
    indices = torch.tensor([3, 0, 8, 3, 3, 1])
    offsets = torch.tensor([0, 2, 2, 6])
    weights = torch.rand(6, generator=generator)
    yield table, None, indices, offsets, None, "sum", True
    yield table.clone().requires_grad_(), None, indices.int(), offsets.int(), None, "mean", True
    yield table.clone().requires_grad_(), None, indices, offsets, weights.clone().requires_grad_(), "sum", False
    yield table.double().requires_grad_(), None, indices, None, None, "none", True
    yield quantized.codes, quantized.step, indices, offsets, weights.clone().requires_grad_(), "mean", True
    yield quantized.codes, quantized.step, indices[:0], torch.tensor([0, 0]), None, "sum", True


def _gradient_samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 5, generator=generator)
    indices, offsets = torch.tensor([3, 0, 8, 3, 3, 1]), torch.tensor([0, 2, 2, 6])
    weights = torch.rand(6, generator=generator)
    grad = torch.randn(3, 5, generator=generator)
    yield grad, table, None, 9, indices, offsets, weights, "sum", True, True
    yield grad, None, None, 9, indices, offsets, None, "mean", True, False
    yield grad.double(), None, None, 9, indices[:3].int(), None, None, "none", True, False


def reference(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    check: bool = True,
) -> torch.Tensor:
    """The same in plain torch, in the dtype of the table (or of the step sizes)."""
    rows = table.step[:, None] * table.codes.to(table.step.dtype) if isinstance(table, QuantizedTable) else table
    inside = (indices >= 0) & (indices < len(rows))
    if check and not bool(inside.all()):
        position = int((~inside).reshape(-1).nonzero()[0])
        raise _check.outside("embedding_bag", "indices", position, int(indices.reshape(-1)[position]), len(rows))
    taken = rows[torch.where(inside, indices, 0).long()] * inside[..., None].to(rows.dtype)
    if per_sample_weights is not None:
        taken = taken * per_sample_weights[..., None].to(rows.dtype)
    if offsets is None:
        return taken
    lengths = (offsets[1:] - offsets[:-1]).long()
    bag_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    out = torch.zeros(len(lengths), rows.shape[1], dtype=rows.dtype).index_add(0, bag_of, taken)
    return out / lengths.clamp(min=1)[:, None].to(out.dtype) if mode == "mean" else out


def _raw_reference(table, step, indices, offsets, per_sample_weights, mode, check):
    whole = table if step is None else QuantizedTable(table, step)
    return reference(whole, indices, offsets, per_sample_weights=per_sample_weights, mode=mode, check=check)


_op = define(
    "embedding_bag(Tensor table, Tensor? step, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, "
    "str mode, bool check) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_raw_reference,
)
_gradient_op = define(
    "embedding_bag_backward(Tensor grad, Tensor? table, Tensor? step, SymInt rows, Tensor indices, Tensor? offsets, "
    "Tensor? per_sample_weights, str mode, bool of_table, bool of_weights) -> (Tensor, Tensor)",
    cpu=_gradient_cpu,
    fake=_gradient_fake,
    samples=_gradient_samples,
)


def check_lookups(
    op: str,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    mode: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check what every op over bags takes: dtypes, shapes and devices, but not the values of ids and offsets."""
    _check.choice(op, "mode", mode, MODES)
    _check.tensor(op, "indices", indices, dtypes=_check.INDEX_DTYPES, device=device)
    if offsets is not None:
        _check.tensor(op, "indices", indices, shape=["n"])
        _check.tensor(op, "offsets", offsets, dtypes=_check.INDEX_DTYPES, shape=["B + 1"], device=device)
        if mode == "none":
            raise ValueError(f"{op}: mode none gives a row for each index and takes no offsets")
        if offsets.shape[0] == 0:
            raise ValueError(f"{op}: offsets must have one entry more than there are bags, got none")
    if per_sample_weights is not None:
        _check.tensor(op, "per_sample_weights", per_sample_weights, dtypes=[dtype], shape=list(indices.shape))
        _check.tensor(op, "per_sample_weights", per_sample_weights, device=device)


def embedding_bag(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    check: bool = True,
) -> torch.Tensor:
    """Sums (or means) of table rows over bags of ids.

    .. math:: e_b = \\sum_{i = o_b}^{o_{b+1} - 1} c_i\\, w_{x_i}, \\qquad w_r = \\Delta_r q_r \\text{ for 8-bit rows}

    Parameters
    ----------
    table : Tensor [T, D], float32 or float64, or QuantizedTable
        float64 serves gradcheck, not speed.
    indices : Tensor, int32 or int64
        Ids in [0, T). [n] with `offsets`; any shape without. -1 is no padding: it is refused like any other id outside.
    offsets : Tensor [B + 1], int32 or int64, or None
        Where bags begin; the last entry is n. None: each index is a bag.
    per_sample_weights : Tensor, shape of `indices`, float32 (float64 for a float64 table), or None
        The factors c.
    mode : str
        "sum"; "mean": the sum over the number of ids in the bag (weighted or not); "none": a row for each index.
    check : bool
        True: refuse ids outside the table. False: such ids count as rows of zeros (in the forward pass; the gradient
        refuses them all the same).

    Returns
    -------
    Tensor [B, D] ([*, D] without offsets), float32 or the table's dtype. An empty bag gives zeros.

    Raises
    ------
    IndexError
        An id outside [0, T).
    TypeError, ValueError
        Wrong dtypes, shapes, devices, mode, offsets.

    Notes
    -----
    Accumulates in the output's type in the order of the ids, products and sums rounded apart: the error is at most
    (k + 3) * eps * sum |terms| for a bag of k ids, with equal bits on every instruction set and for any number of
    threads. Differentiable in a float `table` (a dense gradient, summed per row in the order of the ids) and in
    `per_sample_weights`; a QuantizedTable trains through `recfast.ops.embedding_update_`. Backend: CPU (scalar, AVX2,
    AVX-512).

    References
    ----------
    Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
    arXiv:1906.00091.
    """
    op = "embedding_bag"
    if isinstance(table, QuantizedTable):
        codes, step, dtype = table.codes, table.step, torch.float32
        if step.requires_grad:
            raise ValueError(f"{op}: step takes no gradient; train 8-bit rows with embedding_update_")
    else:
        _check.tensor(op, "table", table, dtypes=_FLOATS, shape=["T", "D"])
        codes, step, dtype = table, None, table.dtype
    if codes.shape[1] == 0:
        raise ValueError(f"{op}: table must have at least one column, got shape {list(codes.shape)}")
    check_lookups(op, indices, offsets, per_sample_weights, mode, dtype=dtype, device=codes.device)
    if offsets is not None or indices.dim() == 1:
        return _op(codes, step, indices, offsets, per_sample_weights, mode, check)
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    out = _op(codes, step, indices.reshape(-1), None, weights, mode, check)
    return out.reshape(*indices.shape, codes.shape[1])


embedding_bag.reference = reference
quantize.reference = quantize  # plain torch itself
