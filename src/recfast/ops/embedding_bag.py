"""Sums of table rows over bags of ids, for tables in eight formats and many tables in one call: `embedding_bag`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from recfast.errors import InputError, OutOfRange
from recfast.ops import _check
from recfast.ops._library import define, kernel
from recfast.ops.formats import FORMATS, HEADERS, PLAIN, ROUNDINGS, QuantizedTable, quantize, round_to

__all__ = ["MODES", "ROUNDINGS", "Features", "QuantizedTable", "embedding_bag", "quantize", "round_to"]

MODES = ("sum", "mean", "max", "none")
_MODE = {name: number for number, name in enumerate(MODES)}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLAIN_CODE = {dtype: FORMATS[name].code for dtype, name in PLAIN.items()}
_kernel = kernel("embedding_bag")
_weight_gradient = kernel("embedding_bag_weight_gradient")
_table_gradients = {
    torch.float32: kernel("embedding_bag_table_gradient_float32"),
    torch.float64: kernel("embedding_bag_table_gradient_float64"),
}
_EAGER_TYPES = (torch.Tensor, torch.nn.Parameter)
_INDEX, _OFFSET, _SPLIT = 1, 2, 3  # what a kernel may find wrong


class Features(NamedTuple):
    """Several tables that lie one after the other in one: feature f has rows first[f] .. first[f] + rows[f].

    Attributes
    ----------
    first : Tensor [F], int64
        The row that id 0 of the feature stands for. Features may share rows.
    rows : Tensor [F], int64
        Ids of the feature lie in [0, rows[f]).
    splits : Tensor [F + 1], int64, or None
        Bags of feature f are splits[f] .. splits[f + 1]. None: bag b belongs to feature b % F.
    """

    first: torch.Tensor
    rows: torch.Tensor
    splits: torch.Tensor | None = None


_NO_FEATURES = Features(None, None, None)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _widened(offsets: torch.Tensor | None) -> torch.Tensor | None:
    return None if offsets is None else offsets.to(torch.int64).contiguous()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dense_rows(table: torch.Tensor) -> torch.Tensor:
    """The table with its columns next to each other; rows may be any distance apart."""
    return table if table.stride(1) == 1 and table.stride(0) >= table.shape[1] else table.contiguous()


def bad_offset(op: str, offsets: torch.Tensor, position: int, total: int, name: str = "offsets") -> ValueError:
    """The error for the first wrong entry of `offsets`, as a kernel reports it."""
    value = int(offsets[position])
    if position == 0:
        return ValueError(f"{op}: {name}[0] must be 0, got {value}")
    if value < int(offsets[position - 1]):
        return ValueError(f"{op}: {name}[{position}] = {value} is below {name}[{position - 1}]")
    what = "indices" if name == "offsets" else "bags"
    return ValueError(f"{op}: {name}[-1] must be {total}, the number of {what}, got {value}")


def feature_at(position: int, offsets: torch.Tensor | None, features: int, splits: torch.Tensor | None) -> int:
    """The feature that a flat position belongs to."""
    bag = position if offsets is None else int(torch.searchsorted(offsets, position, right=True)) - 1
    return bag % features if splits is None else int(torch.searchsorted(splits, bag, right=True)) - 1


def lookup_error(
    op: str,
    status: tuple[int, int],
    rows: int,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    features: Features | None,
) -> InputError | ValueError:
    """The error for what a kernel over lookups found wrong; `offsets` int64, `status` = (kind, position)."""
    kind, position = status
    features = features or _NO_FEATURES
    if kind == _OFFSET:
        return bad_offset(op, offsets, position, indices.numel())
    bags = indices.numel() if offsets is None else offsets.numel() - 1
    if kind == _SPLIT:
        return bad_offset(op, features.splits, position, bags, "features.splits")
    if kind != _INDEX:
        first, count = int(features.first[position]), int(features.rows[position])
        return ValueError(
            f"{op}: features must lie in the {rows} rows of the table, got rows {first} .. {first + count} for feature "
            f"{position}"
        )
    value, feature = int(indices.reshape(-1)[position]), None
    if features.first is None:
        error = _check.outside(op, "indices", position, value, rows)
    else:
        feature = feature_at(position, offsets, features.first.numel(), features.splits)
        rows = int(features.rows[feature])
        error = OutOfRange(f"{op}: indices[{position}] = {value} is outside [0, {rows}) of feature {feature}")
    error.position, error.value, error.rows, error.feature = position, value, rows, feature
    return error


def _lookups(indices, offsets, first, feature_rows, splits, skip_missing) -> tuple:
    """What the kernels are told of the ids; the tensors must be contiguous and outlive the call."""
    total = indices.numel()
    bags = total if offsets is None else offsets.numel() - 1
    count = 0 if first is None else first.numel()
    return (
        indices.data_ptr(), indices.dtype == torch.int64, total, _pointer(offsets), bags, count, _pointer(first),
        _pointer(feature_rows), _pointer(splits), skip_missing,
    )  # fmt: skip


def _out_dtype(table: torch.Tensor) -> torch.dtype:
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def _run(
    table: torch.Tensor,
    format: int,
    header: int,
    dim: int,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    first: torch.Tensor | None,
    feature_rows: torch.Tensor | None,
    splits: torch.Tensor | None,
    mode: str,
    skip_missing: bool,
    check: bool,
    argmax: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel on tensors of the CPU; fills `argmax` if given."""
    if table.stride(1) != 1 or table.stride(0) < table.shape[1]:  # rows may be any distance apart, columns may not
        table = table.contiguous()
    if not indices.is_contiguous():
        indices = indices.contiguous()
    weights = _contiguous(weights)
    if offsets is not None and (offsets.dtype != torch.int64 or not offsets.is_contiguous()):
        offsets = _widened(offsets)
    if first is not None:
        first, feature_rows, splits = first.contiguous(), feature_rows.contiguous(), _contiguous(splits)
    rows = table.shape[0]
    bags = indices.numel() if offsets is None else offsets.shape[0] - 1
    out = torch.empty(bags, dim, dtype=_out_dtype(table))
    wrong = _kernel(
        table.data_ptr(), rows, dim, table.stride(0) * table.element_size(), format, header,
        *_lookups(indices, offsets, first, feature_rows, splits, skip_missing), _pointer(weights), _MODE[mode],
        out.data_ptr(), _pointer(argmax),
    )  # fmt: skip
    if wrong is not None and (check or wrong[0] != _INDEX):
        raise lookup_error("embedding_bag", wrong, rows, indices, offsets, Features(first, feature_rows, splits))
    return out


def _cpu(
    table, format, header, dim, indices, offsets, per_sample_weights, first, feature_rows, splits, mode, skip_missing,
    check,
):  # fmt: skip
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    argmax = torch.empty(bags if mode == "max" else 0, dim, dtype=torch.int32)
    out = _run(
        table, format, header, dim, indices, offsets, per_sample_weights, first, feature_rows, splits, mode,
        skip_missing, check, argmax if mode == "max" else None,
    )  # fmt: skip
    return out, argmax


def _plain_call(table: torch.Tensor, weights: torch.Tensor | None, device: torch.device) -> bool:
    """Whether nobody watches: no gradient, no tracing, no transform. Then the dispatcher may be left out, which costs
    more than the kernel does for a small batch.
    """
    return (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not ((table.requires_grad or (weights is not None and weights.requires_grad)) and torch.is_grad_enabled())
        and type(table) in _EAGER_TYPES
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _fake(
    table, format, header, dim, indices, offsets, per_sample_weights, first, feature_rows, splits, mode, skip_missing,
    check,
):  # fmt: skip
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    return (
        table.new_empty((bags, dim), dtype=_out_dtype(table)),
        table.new_empty((bags if mode == "max" else 0, dim), dtype=torch.int32),
    )


def _gradient_cpu(
    grad: torch.Tensor,
    table: torch.Tensor | None,
    format: int,
    header: int,
    rows: int,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
    first: torch.Tensor | None,
    feature_rows: torch.Tensor | None,
    splits: torch.Tensor | None,
    argmax: torch.Tensor | None,
    mode: str,
    skip_missing: bool,
    of_table: bool,
    of_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, indices = grad.contiguous(), indices.contiguous()
    weights, wide = _contiguous(per_sample_weights), _widened(offsets)
    first, feature_rows, splits = _contiguous(first), _contiguous(feature_rows), _contiguous(splits)
    lookups = _lookups(indices, wide, first, feature_rows, splits, skip_missing)
    total, width = indices.numel(), grad.shape[1]
    table_gradient, weight_gradient = grad.new_empty(0, width), grad.new_empty(0)
    if of_table:
        if total >= 2**31 or rows >= 2**32:
            raise ValueError(f"embedding_bag: a gradient needs below 2^31 indices and 2^32 rows, got {total}, {rows}")
        table_gradient = grad.new_zeros(rows, width)
        row_of = torch.empty(total, dtype=torch.int64)
        keys = starts = bag_of = coefficient = None
        if mode != "max":
            keys = torch.empty(2 * total, dtype=torch.int64)
            starts = torch.empty(total + 1, dtype=torch.int64)
            if wide is not None:
                bag_of = torch.empty(total, dtype=torch.int32)
                coefficient = grad.new_empty(total) if weights is not None or mode == "mean" else None
        wrong = _table_gradients[grad.dtype](
            grad.data_ptr(), rows, width, *lookups, _pointer(weights), _MODE[mode], _pointer(_contiguous(argmax)),
            row_of.data_ptr(), _pointer(keys), _pointer(starts), _pointer(bag_of), _pointer(coefficient),
            table_gradient.data_ptr(),
        )  # fmt: skip
        if wrong is not None:
            raise lookup_error("embedding_bag", wrong, rows, indices, wide, Features(first, feature_rows, splits))
    if of_weights:
        table = _dense_rows(table)
        weight_gradient = grad.new_empty(total)
        _weight_gradient(
            table.data_ptr(), rows, width, table.stride(0) * table.element_size(), format, header, *lookups,
            _MODE[mode], grad.data_ptr(), weight_gradient.data_ptr(),
        )  # fmt: skip
    return table_gradient, weight_gradient


def _gradient_fake(
    grad, table, format, header, rows, indices, offsets, per_sample_weights, first, feature_rows, splits, argmax, mode,
    skip_missing, of_table, of_weights,
):  # fmt: skip
    return (
        grad.new_empty((rows if of_table else 0, grad.shape[1])),
        grad.new_empty(indices.shape[0] if of_weights else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    table, format, header, _, indices, offsets, weights, first, feature_rows, splits, mode, skip_missing, _ = inputs
    of_weights = weights is not None and weights.requires_grad
    # The table itself is only needed for the weights' gradient: saving it would forbid updating it in place.
    ctx.save_for_backward(
        table if of_weights else None, indices, offsets, weights, first, feature_rows, splits,
        output[1] if mode == "max" else None,
    )  # fmt: skip
    ctx.rows, ctx.dtype, ctx.options = table.shape[0], table.dtype, (format, header, mode, skip_missing)


def _backward(ctx, grad: torch.Tensor, _):
    table, indices, offsets, weights, first, feature_rows, splits, argmax = ctx.saved_tensors
    format, header, mode, skip_missing = ctx.options
    of_table, of_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
    table_gradient, weight_gradient = _gradient_op(
        grad, table, format, header, ctx.rows, indices, offsets, weights, first, feature_rows, splits, argmax, mode,
        skip_missing, of_table, of_weights,
    )  # fmt: skip
    gradients = [None] * 13
    if of_table:
        gradients[0] = table_gradient.to(ctx.dtype)
    if of_weights:
        gradients[6] = weight_gradient
    return tuple(gradients)


def _raw(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    features: Features | None = None,
    mode: str = "sum",
    skip_missing: bool = False,
    check: bool = True,
) -> tuple:
    """The arguments of the internal op."""
    if isinstance(table, QuantizedTable):
        stored = table.rows, FORMATS[table.format].code, HEADERS[table.header], table.dim
    else:
        stored = table, _PLAIN_CODE[table.dtype], 0, table.shape[1]
    return (*stored, indices, offsets, weights, *(features or _NO_FEATURES), mode, skip_missing, check)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 5, generator=generator)
    indices = torch.tensor([3, 0, 8, 3, 3, 1])
    missing = torch.tensor([3, -1, 8, 3, -1, 1])
    offsets = torch.tensor([0, 2, 2, 6])
    weights = torch.rand(6, generator=generator)
    features = Features(torch.tensor([0, 4]), torch.tensor([4, 5]))
    small = torch.tensor([3, 0, 2, 3, 1, 1])
    yield _raw(table, indices, offsets)
    yield _raw(table.clone().requires_grad_(), indices.int(), offsets.int(), mode="mean")
    yield _raw(table.clone().requires_grad_(), indices, offsets, weights.clone().requires_grad_(), check=False)
    yield _raw(table.double().requires_grad_(), indices, mode="none")
    yield _raw(table.clone().requires_grad_(), missing, offsets, mode="max", skip_missing=True)
    yield _raw(table.clone().requires_grad_(), missing, offsets, mode="mean", skip_missing=True)
    yield _raw(table.clone().requires_grad_(), small, features=features, mode="none")
    split = features._replace(splits=torch.tensor([0, 1, 3]))
    yield _raw(table, small.int(), offsets, features=split)
    yield _raw(table.bfloat16().requires_grad_(), indices, offsets, weights.clone().requires_grad_())
    yield _raw(table.half().requires_grad_(), indices, offsets, mode="max")
    for bits in (8, 4, 2, "fp8"):
        quantized = quantize(table, bits=bits)
        yield _raw(quantized, indices, offsets, weights.clone().requires_grad_(), mode="mean")
        yield _raw(quantized, indices[:0], torch.tensor([0, 0]))
        if bits != "fp8":
            affine = QuantizedTable.from_fbgemm(quantized.to_fbgemm(), bits, 5)
            yield _raw(affine, indices, offsets, weights.clone().requires_grad_())
            yield _raw(affine, indices, offsets, mode="max")


def _gradient_samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 5, generator=generator)
    indices, offsets = torch.tensor([3, 0, 8, 3, 3, 1]), torch.tensor([0, 2, 2, 6])
    weights = torch.rand(6, generator=generator)
    grad = torch.randn(3, 5, generator=generator)
    argmax = torch.randint(0, 6, (3, 5), generator=generator, dtype=torch.int32)
    no = (None, None, None)
    yield grad, table, 0, 0, 9, indices, offsets, weights, *no, None, "sum", False, True, True
    yield grad, None, 0, 0, 9, indices, offsets, None, *no, None, "mean", False, True, False
    yield grad.double(), None, 1, 0, 9, indices[:3].int(), None, None, *no, None, "none", False, True, False
    yield grad, None, 0, 0, 9, indices, offsets, None, *no, argmax, "max", False, True, False


def _resolve(indices, offsets, features, rows, skip_missing, check) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the table, and which ids stand for one: (int64, bool), flat."""
    ids = indices.reshape(-1).long()
    total = len(ids)
    bag_of = torch.arange(total)
    if offsets is not None:
        lengths = (offsets[1:] - offsets[:-1]).long()
        bag_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    limit, base = torch.full((total,), rows), torch.zeros(total, dtype=torch.int64)
    if features is not None and features.first is not None:
        if features.splits is None:
            feature = bag_of % len(features.first)
        else:
            feature = torch.searchsorted(features.splits, bag_of, right=True) - 1
        limit, base = features.rows[feature], features.first[feature]
    inside = (ids >= 0) & (ids < limit)
    wrong = ~inside & ~((ids == -1) & skip_missing)
    if check and bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        raise lookup_error("embedding_bag", (_INDEX, position), rows, ids, offsets, features)
    return torch.where(inside, base + ids, 0), inside


def reference(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    features: Features | None = None,
    skip_missing: bool = False,
    check: bool = True,
) -> torch.Tensor:
    """The same in plain torch, in float64 for a float64 table and else in float32."""
    if isinstance(table, QuantizedTable):
        values = table.reference_values()
    else:
        values = table if table.dtype == torch.float64 else table.float()
    rows, inside = _resolve(indices, offsets, features, len(values), skip_missing, check)
    taken = torch.where(inside[:, None], values[rows], 0.0)
    if per_sample_weights is not None:
        factors = per_sample_weights.reshape(-1, 1).to(values.dtype)
        taken = torch.where(inside[:, None], taken * factors, 0.0)
    if offsets is None:
        return taken.reshape(*indices.shape, values.shape[1])
    lengths = (offsets[1:] - offsets[:-1]).long()
    if mode == "max":
        cuts = lengths.tolist()
        bags = [part[there] for part, there in zip(taken.split(cuts), inside.split(cuts), strict=True)]
        return torch.stack(
            [bag.amax(0) if len(bag) else bag.new_zeros(values.shape[1]) for bag in bags]
            or [values.new_empty(0, values.shape[1])]
        ).reshape(len(lengths), values.shape[1])
    bag_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    out = torch.zeros(len(lengths), values.shape[1], dtype=values.dtype).index_add(0, bag_of, taken)
    if mode == "mean":
        counted = torch.ones(len(rows), dtype=values.dtype)
        if skip_missing:
            counted = (indices.reshape(-1) != -1).to(values.dtype)
        counts = torch.zeros(len(lengths), dtype=values.dtype).index_add(0, bag_of, counted)
        out = out / counts.clamp(min=1)[:, None]
    return out


def _raw_reference(
    table, format, header, dim, indices, offsets, per_sample_weights, first, feature_rows, splits, mode, skip_missing,
    check,
):  # fmt: skip
    if header:
        bits = {4: "fp8", 5: 8, 6: 4, 7: 2}[format]
        table = QuantizedTable(table, bits, dim, "step" if header == HEADERS["step"] else "affine")
    out = reference(
        table, indices, offsets, per_sample_weights=per_sample_weights, mode=mode,
        features=Features(first, feature_rows, splits), skip_missing=skip_missing, check=check,
    )  # fmt: skip
    if mode != "max":
        return out, torch.empty(0, dim, dtype=torch.int32)
    values = table.reference_values() if header else table.float()
    rows, inside = _resolve(indices, offsets, Features(first, feature_rows, splits), len(values), skip_missing, check)
    argmax = torch.full(out.shape, -1, dtype=torch.int32)
    for bag in range(len(out)):
        for i in reversed(range(int(offsets[bag]), int(offsets[bag + 1]))):
            if inside[i]:
                argmax[bag] = torch.where(values[rows[i]] == out[bag], i, argmax[bag])
    return out, argmax


_op = define(
    "embedding_bag(Tensor table, int format, int header, SymInt dim, Tensor indices, Tensor? offsets, "
    "Tensor? per_sample_weights, Tensor? first, Tensor? feature_rows, Tensor? splits, str mode, bool skip_missing, "
    "bool check) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_raw_reference,
)
_gradient_op = define(
    "embedding_bag_backward(Tensor grad, Tensor? table, int format, int header, SymInt rows, Tensor indices, "
    "Tensor? offsets, Tensor? per_sample_weights, Tensor? first, Tensor? feature_rows, Tensor? splits, Tensor? argmax, "
    "str mode, bool skip_missing, bool of_table, bool of_weights) -> (Tensor, Tensor)",
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
    features: Features | None = None,
    modes: tuple[str, ...] = MODES,
) -> None:
    """Check what every op over bags takes: dtypes, shapes and devices, but not the values of ids and offsets."""
    _check.choice(op, "mode", mode, modes)
    _check.tensor(op, "indices", indices, dtypes=_check.INDEX_DTYPES, device=device)
    if offsets is not None:
        _check.tensor(op, "indices", indices, shape=["n"])
        _check.tensor(op, "offsets", offsets, dtypes=_check.INDEX_DTYPES, shape=["B + 1"], device=device)
        if mode == "none":
            raise ValueError(f"{op}: mode none gives a row for each index and takes no offsets")
        if offsets.shape[0] == 0:
            raise ValueError(f"{op}: offsets must have one entry more than there are bags, got none")
    if features is not None:
        _check_features(op, indices, offsets, features, device)
    if per_sample_weights is not None:
        _check.tensor(op, "per_sample_weights", per_sample_weights, dtypes=[dtype], shape=list(indices.shape))
        _check.tensor(op, "per_sample_weights", per_sample_weights, device=device)
        if mode == "max":
            raise ValueError(f"{op}: mode max takes no per_sample_weights")


def _check_features(op, indices, offsets, features, device) -> None:
    if not isinstance(features, Features):
        raise TypeError(f"{op}: features must be ops.Features, got {type(features).__name__}")
    _check.tensor(op, "features.first", features.first, dtypes=[torch.int64], shape=["F"], device=device)
    count = features.first.shape[0]
    if count == 0:
        raise ValueError(f"{op}: features must have at least one feature, got none")
    _check.tensor(op, "features.rows", features.rows, dtypes=[torch.int64], shape=[count], device=device)
    if features.splits is not None:
        _check.tensor(op, "features.splits", features.splits, dtypes=[torch.int64], shape=[count + 1], device=device)
        _check.tensor(op, "indices", indices, shape=["n"])
    elif offsets is None:
        if indices.dim() == 0 or indices.shape[-1] != count:
            raise ValueError(f"{op}: indices must have shape [..., {count}], got {list(indices.shape)}")
    elif (offsets.shape[0] - 1) % count:
        raise ValueError(
            f"{op}: offsets must make a multiple of {count} bags, the number of features, got {offsets.shape[0] - 1}"
        )


def embedding_bag(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    per_sample_weights: torch.Tensor | None = None,
    mode: str = "sum",
    features: Features | None = None,
    skip_missing: bool = False,
    check: bool = True,
) -> torch.Tensor:
    """Sums, means or maxima of table rows over bags of ids, of one table or of many in one call.

    .. math:: e_b = \\sum_{i = o_b}^{o_{b+1} - 1} c_i\\, w_{x_i}

    Parameters
    ----------
    table : Tensor [T, D], float32, float64, bfloat16 or float16, or QuantizedTable
        float64 serves gradcheck, not speed.
    indices : Tensor, int32 or int64
        Ids in [0, T), or [0, rows of the feature). [n] with `offsets`; any shape without.
    offsets : Tensor [B + 1], int32 or int64, or None
        Where bags begin; the last entry is n. None: each index is a bag.
    per_sample_weights : Tensor, shape of `indices`, float32 (float64 for a float64 table), or None
        The factors c; not with "max".
    mode : str
        "sum"; "mean": the sum over the number of ids in the bag (weighted or not); "max": the largest value of each
        column (the first position wins among equals, NaN is larger than anything); "none": a row for each index.
    features : Features or None
        Many tables that lie one after the other in `table`. Without `offsets` and `splits`, `indices` is [..., F].
    skip_missing : bool
        True: an id of -1 stands for nothing: no row, not counted by "mean", zeros in mode "none". False: it is refused
        like any other id outside.
    check : bool
        True: refuse ids outside the table. False: such ids count as rows of zeros, and "max" leaves them out (in the
        forward pass; the gradient refuses them all the same).

    Returns
    -------
    Tensor [B, D] ([*, D] without offsets), float32 (float64 for a float64 table; sums of 16-bit rows are not rounded
    back). A bag without rows gives zeros.

    Raises
    ------
    OutOfRange
        An id outside, the first of them, with its position, value and feature (an IndexError).
    TypeError, ValueError
        Wrong dtypes, shapes, devices, mode, offsets, features.

    Notes
    -----
    Accumulates in the output's type in the order of the ids, each product being added by a fused multiply-add: the
    error is at most (k + 3) * eps * sum |terms| for a bag of k ids, with equal bits on every instruction set and for
    any number of threads. Differentiable in a float `table` (a dense gradient of its dtype, summed per row in the order
    of the ids, in float32 for 16-bit tables) and in `per_sample_weights`; a QuantizedTable trains through
    `recfast.ops.embedding_update_`. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
    arXiv:1906.00091.
    """
    op = "embedding_bag"
    if isinstance(table, QuantizedTable):
        stored, dtype, width = table.rows, torch.float32, table.dim
        arguments = stored, FORMATS[table.format].code, HEADERS[table.header], width
    else:
        _check.tensor(op, "table", table, dtypes=_FLOATS, shape=["T", "D"])
        stored, dtype, width = table, _out_dtype(table), table.shape[1]
        arguments = table, _PLAIN_CODE[table.dtype], 0, width
    if width == 0:
        raise ValueError(f"{op}: table must have at least one column, got shape {list(stored.shape)}")
    check_lookups(op, indices, offsets, per_sample_weights, mode, dtype=dtype, device=stored.device, features=features)
    weights, shape = per_sample_weights, None
    if offsets is None and indices.dim() != 1:
        shape, indices = (*indices.shape, width), indices.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
    arguments = *arguments, indices, offsets, weights, *(features or _NO_FEATURES), mode, skip_missing, check
    out = _run(*arguments) if _plain_call(stored, weights, stored.device) else _op(*arguments)[0]
    return out if shape is None else out.reshape(shape)


embedding_bag.reference = reference


def bag_with_argmax(
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    *,
    features: Features | None = None,
    skip_missing: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`embedding_bag(mode="max")` and the positions of the maxima, int32 [B, D] (-1 for an empty bag).

    For modules that update the rows themselves; the arguments are theirs and not checked again.
    """
    return _op(*_raw(table, indices, offsets, None, features, "max", skip_missing))


def weight_gradient(
    grad: torch.Tensor,
    table: torch.Tensor | QuantizedTable,
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor,
    *,
    mode: str,
    features: Features | None = None,
    skip_missing: bool = False,
) -> torch.Tensor:
    """The gradient of `per_sample_weights` alone, [n]; for modules, as `bag_with_argmax`."""
    stored, form, header, _, *lookups, _, _, _ = _raw(table, indices, offsets, weights, features, mode, skip_missing)
    return _gradient_op(grad, stored, form, header, stored.shape[0], *lookups, None, mode, skip_missing, False, True)[1]
