"""SDIM: attention over long histories by hash collisions, through a table built once per user."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recfast import _C
from recfast.ops import _check
from recfast.ops._hashed import Lists, check_shared, check_users, cut_candidates, flat_rows, lists, users_of
from recfast.ops._histories import unit_rows
from recfast.ops._library import define, kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_LARGE = 4 << 20  # bytes
_EPSILON = 1e-12  # kEpsilon of sdim_attention.h


def _kernels(name: str) -> dict[torch.dtype, object]:
    return {dtype: kernel(f"{name}_{str(dtype).removeprefix('torch.')}") for dtype in _DTYPES}


_TABLE, _TABLE_BACKWARD = _kernels("sdim_table"), _kernels("sdim_table_backward")
_ATTENTION, _ATTENTION_BACKWARD = _kernels("sdim_attention"), _kernels("sdim_attention_backward")
_DIRECT, _DIRECT_BACKWARD = _kernels("sdim_direct"), _kernels("sdim_direct_backward")
_SCRATCH, _DIRECT_SCRATCH = kernel("sdim_attention_scratch"), kernel("sdim_direct_scratch")


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _room(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`like.new_empty`; what is large in huge pages, so that fresh memory costs fewer page faults."""
    room = like.new_empty(shape, dtype=dtype)
    if room.nbytes >= _LARGE:
        _C.advise_huge_pages(room.data_ptr(), room.nbytes)
    return room


# --- the table ---


def _events(codes: Lists, value_begin: torch.Tensor, bits: int, width: int) -> dict[str, int]:
    return {
        "users": codes.prefix.numel() - 1,
        "tables": codes.rows.shape[-1],
        "bits": bits,
        "width": width,
        "codes": codes.rows.data_ptr(),
        "codes_stride": codes.rows.stride(-2),
        "code_begin": codes.begin.data_ptr(),
        "value_begin": value_begin.data_ptr(),
        "prefix": codes.prefix.data_ptr(),
    }


def _cpu_table(codes, values, offsets, start, bits, op=None):
    op = op or ("sdim_table" if start is None else "sdim_append")
    code_rows, value_rows = lists(op, codes, offsets), lists(op, values, offsets)
    start = None if start is None else start.contiguous()
    shape = (code_rows.begin.numel(), codes.shape[-1], 2**bits, values.shape[-1])
    table = _room(values, *shape, dtype=_sum_dtype(values.dtype))
    wrong = _TABLE[values.dtype](
        **_events(code_rows, value_rows.begin, bits, values.shape[-1]),
        values=value_rows.rows.data_ptr(),
        values_stride=value_rows.rows.stride(-2),
        start=0 if start is None else start.data_ptr(),
        table=table.data_ptr(),
    )
    if wrong >= 0:
        raise _wrong_event(op, code_rows, wrong, bits)
    return table


def _wrong_event(op: str, codes: Lists, wrong: int, bits: int) -> Exception:
    row, j = divmod(wrong, codes.rows.shape[-1])
    flat = row if codes.step is None else divmod(row, codes.step)
    return _check.outside(op, "codes", f"{codes.place(row)}, {j}", int(codes.rows[flat][j]), 2**bits)


def _wrong_query(op: str, codes: torch.Tensor, wrong: int, bits: int) -> Exception:
    row, j = divmod(wrong, codes.shape[1])
    return _check.outside(op, "query_codes", f"{row}, {j}", int(codes[row, j]), 2**bits)


def _fake_table(codes, values, offsets, start, bits):
    users = offsets.shape[0] - (codes.dim() == 2)
    shape = (users, codes.shape[-1], 2**bits, values.shape[-1])
    return values.new_empty(shape, dtype=_sum_dtype(values.dtype))


def _gradient_rows(values: torch.Tensor, codes: Lists) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the gradient of `values`, and where each user's rows begin in it."""
    rows = _room(values, *values.shape)
    if values.dim() == 2:
        return rows, codes.prefix
    # The padding gets no gradient.
    return rows.zero_(), torch.arange(values.shape[0]) * values.shape[1]


def _cpu_table_backward(grad, codes, values, offsets, bits):
    code_rows = lists("sdim_table", codes, offsets)
    grad = grad.contiguous()
    dvalues, begin = _gradient_rows(values, code_rows)
    _TABLE_BACKWARD[values.dtype](
        **_events(code_rows, begin, bits, values.shape[-1]), dtable=grad.data_ptr(), dvalues=dvalues.data_ptr()
    )
    return dvalues


def _fake_table_backward(grad, codes, values, offsets, bits):
    return values.new_empty(values.shape)


def _setup_table(ctx, inputs, output) -> None:
    codes, values, offsets, start, ctx.bits = inputs
    ctx.save_for_backward(codes, values, offsets)
    ctx.started = start is not None


def _backward_table(ctx, grad):
    dvalues = _table_backward_op(grad, *ctx.saved_tensors, ctx.bits) if ctx.needs_input_grad[1] else None
    return None, dvalues, None, grad if ctx.started and ctx.needs_input_grad[3] else None, None


def _expected_table(codes, values, offsets, start, bits):
    table = table_reference(codes, values, offsets, bits=bits)
    return table if start is None else start + table


def _codes(rows: tuple[int, ...], bits: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2**bits, rows, generator=generator).to(torch.uint8)


def _samples_table() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    offsets, lengths = torch.tensor([0, 4, 4, 9]), torch.tensor([4, 0, 3])
    for dtype in _DTYPES:
        for gradient in (False, True):
            for tables, bits, width in ((2, 3, 5), (5, 1, 17)):
                values = torch.randn(9, width, generator=generator).to(dtype).requires_grad_(gradient)
                yield _codes((9, tables), bits, generator), values, offsets, None, bits
                start = torch.randn(3, tables, 2**bits, width, generator=generator).to(_sum_dtype(dtype))
                values = torch.randn(3, 4, width, generator=generator).to(dtype).requires_grad_(gradient)
                start.requires_grad_(gradient)
                yield _codes((3, 4, tables), bits, generator), values, lengths, start, bits


def _samples_table_backward() -> Iterator[tuple]:
    for codes, values, offsets, start, bits in _samples_table():
        values = values.detach()
        start = None if start is None else start.detach()
        yield torch.ones_like(_table_op(codes, values, offsets, start, bits)), codes, values, offsets, bits


_table_op = define(
    "sdim_table(Tensor codes, Tensor values, Tensor offsets, Tensor? start, int bits) -> Tensor",
    cpu=_cpu_table,
    fake=_fake_table,
    backward=_backward_table,
    setup_context=_setup_table,
    samples=_samples_table,
    expected=_expected_table,
)
_table_backward_op = define(
    "sdim_table_backward(Tensor grad, Tensor codes, Tensor values, Tensor offsets, int bits) -> Tensor",
    cpu=_cpu_table_backward,
    fake=_fake_table_backward,
    samples=_samples_table_backward,
)


def _prepare_table(op, codes, values, offsets, bits):
    values = _check.tensor(op, "values", values, dtypes=_DTYPES)
    padded = values.dim() == 3
    _check.tensor(op, "values", values, shape=["B", "L", "Dv"] if padded else ["T", "Dv"])
    shape = [*values.shape[:-1], "M"]
    _check.tensor(op, "codes", codes, dtypes=(torch.uint8,), shape=shape, device=values.device)
    users = check_users(op, offsets, values.shape[0] if padded else None, values.device)
    _check.at_least(op, "codes.shape[-1]", codes.shape[-1], 1)
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"{op}: bits must be an integer from 1 to 8, got {bits!r}")
    return users, offsets.to(torch.int64)


def table_reference(codes: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, *, bits: int) -> torch.Tensor:
    """The same in plain torch: one scatter of all events."""
    values, flat_offsets = flat_rows(values, offsets)
    codes, _ = flat_rows(codes, offsets)
    users = flat_offsets.numel() - 1
    tables = codes.shape[1]
    user = torch.arange(users).repeat_interleave(flat_offsets.diff())
    bucket = (user.unsqueeze(1) * tables + torch.arange(tables)) * 2**bits + codes.long()
    rows = values.to(_sum_dtype(values.dtype)).unsqueeze(1).expand(-1, tables, -1).flatten(0, 1)
    table = rows.new_zeros(users * tables * 2**bits, values.shape[1]).index_add(0, bucket.flatten(), rows)
    return table.view(users, tables, 2**bits, values.shape[1])


def sdim_table(codes: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, *, bits: int) -> torch.Tensor:
    r"""Sum each user's values by bucket, :math:`T_{u,j,b} = \sum_{l:\,c_j(k_l) = b} v_l`.

    The table knows no candidate: it is built once per user, shared by all candidates, may be kept between requests (it
    is a plain tensor) and continued with `sdim_append`.

    Parameters
    ----------
    codes : Tensor [T, M] or padded [B, L, M], uint8
        What `simhash` gives for the keys, `M` codes of `bits` bits each.
    values : Tensor [T, Dv] or [B, L, Dv], float32, bfloat16 or float64
        Rows may be strided.
    offsets : Tensor [B + 1], int32 or int64; or the lengths [B] of padded rows
        User b's events are rows `offsets[b]:offsets[b + 1]`. Padding is never read.
    bits : int
        1 to 8.

    Returns
    -------
    table : Tensor [B, M, 2**bits, Dv], float32 (float64 for float64 values)
        0 in empty buckets. bfloat16 values are summed in float32 as well.

    Raises
    ------
    IndexError
        A code outside [0, 2**bits).
    TypeError, ValueError
        Wrong dtypes, shapes or offsets.

    Notes
    -----
    A bucket adds its events in their order, so the answer is equal bit by bit on every instruction set and thread
    count; a bucket of n events is off by at most `n eps` times the sum of |v|. Differentiable (once) in
    `values`. Backends: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Cao et al., "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", CIKM 2022,
    arXiv 2205.10249.
    """
    _, offsets = _prepare_table("sdim_table", codes, values, offsets, bits)
    return _table_op(codes, values, offsets, None, bits)


sdim_table.reference = table_reference


def _append_reference(
    table: torch.Tensor, codes: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """The same in plain torch."""
    return table + table_reference(codes, values, offsets, bits=table.shape[2].bit_length() - 1)


def sdim_append(table: torch.Tensor, codes: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Continue saved tables with new events: `sdim_table` that starts from `table` instead of 0.

    Equal bit by bit to a table built anew from the old events followed by the new ones.

    Parameters
    ----------
    table : Tensor [B, M, 2**bits, Dv], float32 (float64 for float64 values)
        What `sdim_table` or `sdim_append` returned; left as it is.
    codes, values, offsets
        The new events of the same B users; see `sdim_table`.

    Returns
    -------
    table : Tensor like `table`

    Raises
    ------
    IndexError
        A code outside [0, 2**bits).
    TypeError, ValueError
        Wrong dtypes, shapes or offsets.

    Notes
    -----
    Differentiable (once) in `table` and `values`. Backends: CPU (scalar, AVX2, AVX-512).
    """
    op = "sdim_append"
    _check.tensor(op, "values", values, dtypes=_DTYPES)
    like = {"dtypes": [_sum_dtype(values.dtype)], "device": values.device}
    bits = _bits_of(op, table)
    users, offsets = _prepare_table(op, codes, values, offsets, bits)
    _check.tensor(op, "table", table, shape=[users, codes.shape[-1], 2**bits, values.shape[-1]], **like)
    return _table_op(codes, values, offsets, table, bits)


sdim_append.reference = _append_reference


def _bits_of(op: str, table: torch.Tensor) -> int:
    _check.tensor(op, "table", table, shape=["B", "M", "2**bits", "Dv"])
    buckets = table.shape[2]
    bits = buckets.bit_length() - 1
    if not 1 <= bits <= 8 or buckets != 2**bits:
        raise ValueError(f"{op}: table must have 2, 4, ... or 256 buckets (its third dimension), got {buckets}")
    return bits


# --- attention ---


def _lookup(op, codes, table, candidate_offsets, normalize) -> tuple[dict[str, int], list[torch.Tensor | None]]:
    codes, table = unit_rows(codes), table.contiguous()
    candidate_offsets = cut_candidates(op, candidate_offsets, codes.shape[0])
    sizes = {
        "users": table.shape[0],
        "tables": table.shape[1],
        "bits": table.shape[2].bit_length() - 1,
        "width": table.shape[3],
    }
    return {
        **sizes,
        "rows": codes.shape[0],
        "codes": codes.data_ptr(),
        "codes_stride": codes.stride(0),
        "table": table.data_ptr(),
        "candidates": 0 if candidate_offsets is None else candidate_offsets.data_ptr(),
        "normalize": int(normalize),
    }, [codes, table, candidate_offsets]


def _cpu(query_codes, table, candidate_offsets, normalize, op="sdim_attention"):
    arguments, alive = _lookup(op, query_codes, table, candidate_offsets, normalize)
    sizes = {name: arguments[name] for name in ("users", "tables", "bits", "width")}
    out = table.new_empty(query_codes.shape[0], table.shape[3])
    scratch = table.new_empty(_SCRATCH(**sizes), dtype=_sum_dtype(table.dtype))
    wrong = _ATTENTION[table.dtype](**arguments, out=out.data_ptr(), scratch=scratch.data_ptr())
    if wrong >= 0:
        raise _wrong_query(op, alive[0], wrong, sizes["bits"])
    return out


def _fake(query_codes, table, candidate_offsets, normalize):
    return table.new_empty(query_codes.shape[0], table.shape[3])


def _cpu_backward(grad, query_codes, table, candidate_offsets, normalize):
    arguments, _alive = _lookup("sdim_attention", query_codes, table, candidate_offsets, normalize)
    grad = grad.to(_sum_dtype(table.dtype)).contiguous()
    dtable = _room(table, *table.shape, dtype=grad.dtype)
    _ATTENTION_BACKWARD[table.dtype](**arguments, grad=grad.data_ptr(), dtable=dtable.data_ptr())
    return dtable.to(table.dtype)


def _fake_backward(grad, query_codes, table, candidate_offsets, normalize):
    return table.new_empty(table.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return None, _backward_op(grad, *ctx.saved_tensors, ctx.normalize), None, None


def _expected(query_codes, table, candidate_offsets, normalize):
    return reference(query_codes, table, candidate_offsets=candidate_offsets, normalize=normalize)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for dtype in _DTYPES:
        for gradient in (False, True):
            for tables, bits, width, shared in ((2, 3, 5, True), (5, 1, 17, False)):
                table = torch.randn(3, tables, 2**bits, width, generator=generator)
                table[0, 0] = 0
                table = table.to(dtype).requires_grad_(gradient)
                rows = 6 if shared else 3
                candidate_offsets = torch.tensor([0, 2, 2, 6]) if shared else None
                yield _codes((rows, tables), bits, generator), table, candidate_offsets, gradient or shared


def _samples_backward() -> Iterator[tuple]:
    for codes, table, candidate_offsets, normalize in _samples():
        table = table.detach()
        yield (
            torch.ones_like(_op(codes, table, candidate_offsets, normalize)),
            codes,
            table,
            candidate_offsets,
            normalize,
        )


_op = define(
    "sdim_attention(Tensor query_codes, Tensor table, Tensor? candidate_offsets, bool normalize) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_expected,
)
_backward_op = define(
    "sdim_attention_backward(Tensor grad, Tensor query_codes, Tensor table, Tensor? candidate_offsets, "
    "bool normalize) -> Tensor",
    cpu=_cpu_backward,
    fake=_fake_backward,
    samples=_samples_backward,
)


def reference(
    query_codes: torch.Tensor,
    table: torch.Tensor,
    *,
    candidate_offsets: torch.Tensor | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    """The same in plain torch."""
    users = users_of(candidate_offsets, query_codes.shape[0]).unsqueeze(1)
    wide = table.to(_sum_dtype(table.dtype))
    rows = wide[users, torch.arange(table.shape[1]), query_codes.long()]  # [Nc, M, Dv]
    if normalize:
        norm = (rows * rows).sum(-1, keepdim=True)
        counts = norm > _EPSILON**2
        rows = torch.where(counts, rows / torch.where(counts, norm, 1).sqrt(), 0)
    return rows.mean(1).to(table.dtype)


def sdim_attention(
    query_codes: torch.Tensor,
    table: torch.Tensor,
    *,
    candidate_offsets: torch.Tensor | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    r"""Mean over the hashes of the bucket a candidate falls into, :math:`o_c = \frac1M \sum_j n(T_{u,j,c_j(q_c)})`.

    Its expectation weighs each event of the history by the probability that key and candidate collide,
    :math:`(1 - \arccos(\cos(q, k)) / \pi)^{bits}`: like softmax attention, largest for the nearest keys.

    Parameters
    ----------
    query_codes : Tensor [Nc, M], uint8
        What `simhash` gives for the candidates.
    table : Tensor [B, M, 2**bits, Dv], float32, bfloat16 or float64
        What `sdim_table` gave; a saved one may have been rounded to bfloat16.
    candidate_offsets : Tensor [B + 1], int32 or int64, optional
        User b's candidates are rows `candidate_offsets[b]:candidate_offsets[b + 1]`; left out, each user has one.
    normalize : bool
        Divide each bucket's sum by its length |x| first (the paper's form): n(x) = x / |x|, but 0 where |x| <= 1e-12,
        as in an empty bucket. Otherwise n(x) = x.

    Returns
    -------
    out : Tensor [Nc, Dv], dtype of `table`; 0 where the history is empty.

    Raises
    ------
    IndexError
        A code outside [0, 2**bits).
    TypeError, ValueError
        Wrong dtypes, shapes or offsets.

    Notes
    -----
    float32 arithmetic for bfloat16. Sums have one order: equal bits on every instruction set and thread count; the
    error is at most `(Dv + M + 8) eps` times the mean of |n|. Where |x| <= 1e-12 the gradient is 0 as well. |x| must be
    below 1e19 where it is normalised. Differentiable (once) in `table`. Backends: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Cao et al., "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", CIKM 2022,
    arXiv 2205.10249.
    """
    op = "sdim_attention"
    _check.tensor(op, "table", table, dtypes=_DTYPES)
    _bits_of(op, table)
    _check.at_least(op, "table.shape[1]", table.shape[1], 1)
    shape = ["Nc", table.shape[1]]
    _check.tensor(op, "query_codes", query_codes, dtypes=(torch.uint8,), shape=shape, device=table.device)
    offsets = check_shared(op, "query_codes", query_codes.shape[0], candidate_offsets, table.shape[0], table.device)
    return _op(query_codes, table, offsets, bool(normalize))


sdim_attention.reference = reference


# --- both at once ---

_HISTORY = "sdim_history_attention"


def _skewed(history: Lists, threads: int) -> bool:
    """Whether one user has so many events that its tables had better be cut among the threads."""
    return threads > 1 and history.longest * threads * 4 > int(history.prefix[-1])


def _direct(query_codes, codes: Lists, values: Lists, candidate_offsets, bits, normalize):
    query_codes = unit_rows(query_codes)
    candidate_offsets = cut_candidates(_HISTORY, candidate_offsets, query_codes.shape[0])
    events = _events(codes, values.begin, bits, values.rows.shape[-1])
    sizes = {name: events[name] for name in ("users", "tables", "bits", "width")}
    scratch = values.rows.new_empty(_DIRECT_SCRATCH(**sizes), dtype=_sum_dtype(values.rows.dtype))
    return {
        **events,
        "values": values.rows.data_ptr(),
        "values_stride": values.rows.stride(-2),
        "rows": query_codes.shape[0],
        "query": query_codes.data_ptr(),
        "query_stride": query_codes.stride(0),
        "candidates": 0 if candidate_offsets is None else candidate_offsets.data_ptr(),
        "normalize": int(normalize),
        "scratch": scratch.data_ptr(),
    }, [query_codes, candidate_offsets, scratch]


def _cpu_history(query_codes, codes, values, offsets, candidate_offsets, bits, normalize):
    code_rows, value_rows = lists(_HISTORY, codes, offsets), lists(_HISTORY, values, offsets)
    if _skewed(code_rows, torch.get_num_threads()):
        table = _cpu_table(codes, values, offsets, None, bits, _HISTORY)
        return _cpu(query_codes, table, candidate_offsets, normalize, _HISTORY)
    arguments, alive = _direct(query_codes, code_rows, value_rows, candidate_offsets, bits, normalize)
    out = _fake_history(query_codes, codes, values, offsets, candidate_offsets, bits, normalize)
    wrong, wrong_query = _DIRECT[values.dtype](**arguments, out=out.data_ptr())
    if wrong >= 0:
        raise _wrong_event(_HISTORY, code_rows, wrong, bits)
    if wrong_query >= 0:
        raise _wrong_query(_HISTORY, alive[0], wrong_query, bits)
    return out


def _fake_history(query_codes, codes, values, offsets, candidate_offsets, bits, normalize):
    return values.new_empty((query_codes.shape[0], values.shape[-1]), dtype=_sum_dtype(values.dtype))


def _cpu_history_backward(grad, query_codes, codes, values, offsets, candidate_offsets, bits, normalize):
    code_rows, value_rows = lists(_HISTORY, codes, offsets), lists(_HISTORY, values, offsets)
    if _skewed(code_rows, torch.get_num_threads()):
        table = _cpu_table(codes, values, offsets, None, bits)
        dtable = _cpu_backward(grad, query_codes, table, candidate_offsets, normalize)
        return _cpu_table_backward(dtable, codes, values, offsets, bits)
    arguments, _alive = _direct(query_codes, code_rows, value_rows, candidate_offsets, bits, normalize)
    grad = grad.contiguous()
    dvalues, begin = _gradient_rows(values, code_rows)
    _DIRECT_BACKWARD[values.dtype](
        **arguments, grad=grad.data_ptr(), dvalues=dvalues.data_ptr(), dvalue_begin=begin.data_ptr()
    )
    return dvalues


def _fake_history_backward(grad, query_codes, codes, values, offsets, candidate_offsets, bits, normalize):
    return values.new_empty(values.shape)


def _setup_history(ctx, inputs, output) -> None:
    *tensors, ctx.bits, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _backward_history(ctx, grad):
    dvalues = _history_backward_op(grad, *ctx.saved_tensors, ctx.bits, ctx.normalize)
    return None, None, dvalues, None, None, None, None


def _expected_history(query_codes, codes, values, offsets, candidate_offsets, bits, normalize):
    return history_reference(
        query_codes, codes, values, offsets, bits=bits, candidate_offsets=candidate_offsets, normalize=normalize
    )


def _samples_history() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(1)
    for codes, values, offsets, start, bits in _samples_table():
        shared = start is None
        rows = torch.tensor([0, 2, 2, 6]) if shared else None
        yield _codes((6 if shared else 3, codes.shape[-1]), bits, generator), codes, values, offsets, rows, bits, shared


def _samples_history_backward() -> Iterator[tuple]:
    for query_codes, codes, values, *rest in _samples_history():
        values = values.detach()
        yield torch.ones_like(_history_op(query_codes, codes, values, *rest)), query_codes, codes, values, *rest


_history_op = define(
    "sdim_history_attention(Tensor query_codes, Tensor codes, Tensor values, Tensor offsets, "
    "Tensor? candidate_offsets, int bits, bool normalize) -> Tensor",
    cpu=_cpu_history,
    fake=_fake_history,
    backward=_backward_history,
    setup_context=_setup_history,
    samples=_samples_history,
    expected=_expected_history,
)
_history_backward_op = define(
    "sdim_history_attention_backward(Tensor grad, Tensor query_codes, Tensor codes, Tensor values, Tensor offsets, "
    "Tensor? candidate_offsets, int bits, bool normalize) -> Tensor",
    cpu=_cpu_history_backward,
    fake=_fake_history_backward,
    samples=_samples_history_backward,
)


def history_reference(
    query_codes: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    *,
    bits: int,
    candidate_offsets: torch.Tensor | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    """The same in plain torch."""
    table = table_reference(codes, values, offsets, bits=bits)
    return reference(query_codes, table, candidate_offsets=candidate_offsets, normalize=normalize)


def sdim_history_attention(
    query_codes: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    *,
    bits: int,
    candidate_offsets: torch.Tensor | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    """`sdim_attention` over `sdim_table` without a table to keep, for training: equal to the two bit by bit.

    The table of a user exists only while its candidates are answered, and again in backward, so that nothing of size
    users x hashes x buckets x width is ever stored. For a user with one candidate only the M buckets it asks for are
    summed at all.

    Parameters
    ----------
    query_codes
        See `sdim_attention`.
    codes, values, offsets, bits
        See `sdim_table`.
    candidate_offsets, normalize
        See `sdim_attention`.

    Returns
    -------
    out : Tensor [Nc, Dv], float32 (float64 for float64 values); 0 where the history is empty.

    Raises
    ------
    IndexError
        A code outside [0, 2**bits), of a candidate or of an event. (Events of users without a candidate are not read.)
    TypeError, ValueError
        Wrong dtypes, shapes or offsets.

    Notes
    -----
    Rounding as in the two ops. Differentiable (once) in `values`. Backends: CPU (scalar, AVX2, AVX-512).
    """
    users, offsets = _prepare_table(_HISTORY, codes, values, offsets, bits)
    shape = ["Nc", codes.shape[-1]]
    _check.tensor(_HISTORY, "query_codes", query_codes, dtypes=(torch.uint8,), shape=shape, device=values.device)
    rows = check_shared(_HISTORY, "query_codes", query_codes.shape[0], candidate_offsets, users, values.device)
    return _history_op(query_codes, codes, values, offsets, rows, bits, bool(normalize))


sdim_history_attention.reference = history_reference
