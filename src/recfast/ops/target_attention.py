"""Dot-product attention of candidates over jagged histories that they share, over all rows or the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from recfast import _C
from recfast.errors import OutOfRange
from recfast.ops import _check
from recfast.ops._histories import Histories, check_candidates, histories, unit_rows
from recfast.ops._library import define, kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_SCORES = ("softmax", "relu", "silu", "none")  # in the order of target_attention.h, like the passes
_FORWARD_PASS, _BACKWARD_PASS, _SELECT_PASS, _SEARCH_PASS = range(4)


def _kernels(what: str):
    return {dtype: kernel(f"target_attention_{what}_{str(dtype).removeprefix('torch.')}") for dtype in _DTYPES}


_FORWARD, _BACKWARD, _SELECT, _SEARCH = map(_kernels, ("forward", "backward", "select", "search"))
_SIZES = kernel("target_attention_sizes")
_CHECK_LISTED = kernel("target_attention_check_listed")
_LARGE = 32 << 20  # bytes from which on malloc always maps fresh memory
_LOG2_E = 1.4426950408889634


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Call:
    """The arguments of one call as the kernels take them, checked; it holds what must live as long as they run."""

    def __init__(self, op: str, query, keys, values, offsets, candidate_offsets, *, scale=0.0, score="none", kept=0):
        self.op = op
        self.dtype = query.dtype
        self.heads = query.shape[1]
        self.rows = query.shape[0]
        self.query = unit_rows(query.flatten(-2))
        self.candidates = None if candidate_offsets is None else candidate_offsets.contiguous()
        check_candidates(op, self.candidates, self.rows)
        flat_values = None if values is None else values.flatten(-2)
        self.history: Histories = histories(op, keys.flatten(-2), flat_values, offsets.contiguous())
        self.widths = (query.shape[2], 0 if values is None else values.shape[-1])
        self.score, self.scale, self.kept = score, scale, kept
        self.listed: torch.Tensor | None = None

    def _shape(self) -> dict[str, int]:
        return {
            "users": self.history.begin.numel(),
            "heads": self.heads,
            "dim": self.widths[0],
            "value_dim": self.widths[1],
            "listed_columns": -1 if self.listed is None else self.listed.shape[1],
            "kept": self.kept,
            "begin": self.history.begin.data_ptr(),
            "end": self.history.end.data_ptr(),
            "candidates": 0 if self.candidates is None else self.candidates.data_ptr(),
        }

    def list_rows(self, positions: torch.Tensor | None) -> None:
        """Attend to `positions` only."""
        if positions is None:
            return
        self.listed = positions.contiguous()
        at = _CHECK_LISTED(self.listed.data_ptr(), **self._shape())
        if at >= 0:
            candidate, column = divmod(at, self.listed.shape[1])
            user = candidate
            if self.candidates is not None:
                user = int(torch.searchsorted(self.candidates, candidate, right=True)) - 1
            length = int(self.history.end[user] - self.history.begin[user])
            value = int(self.listed[candidate, column])
            error = OutOfRange(
                f"{self.op}: positions[{candidate}, {column}] = {value} is neither -1 nor in [0, {length}), "
                f"the history of candidate {candidate}"
            )
            error.position, error.value, error.rows = at, value, length
            raise error

    def arguments(self, which: int, out: torch.Tensor | None, statistics: torch.Tensor | None) -> dict[str, float]:
        shape = self._shape()
        wide = _wide(self.dtype)
        scratch, table = _SIZES(which, wide.itemsize, **shape)
        self.scratch = torch.empty(scratch, dtype=wide)
        self.table = torch.empty(table, dtype=torch.int64)
        return {
            **shape,
            "score": _SCORES.index(self.score),
            "scale": self.scale,
            "candidate_rows": self.rows,
            "query": self.query.data_ptr(),
            "query_stride": self.query.stride(0),
            "keys": self.history.keys.data_ptr(),
            "keys_stride": self.history.keys.stride(-2),
            "values": self.history.values.data_ptr(),
            "values_stride": self.history.values.stride(-2),
            "listed": 0 if self.listed is None else self.listed.data_ptr(),
            "out": 0 if out is None else out.data_ptr(),
            "statistics": 0 if statistics is None else statistics.data_ptr(),
            "scratch": self.scratch.data_ptr(),
            "table": self.table.data_ptr(),
        }

    def select(self) -> torch.Tensor:
        positions = torch.empty(self.rows, self.kept, dtype=torch.int64)
        arguments = self.arguments(_SELECT_PASS, None, None)
        _SELECT[self.dtype](**arguments, positions=positions.data_ptr())
        return positions

    def attend(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The answer, its statistics and, for `kept` rows, which they are."""
        out = self.query.new_empty(self.rows, self.heads, self.widths[1])
        shape = (self.rows, self.heads, 2) if self.score == "softmax" else (0, 0, 0)
        statistics = torch.empty(shape, dtype=_wide(self.dtype))
        positions = torch.empty((self.rows, self.kept) if self.kept else (0, 0), dtype=torch.int64)
        if self.kept:
            _SEARCH[self.dtype](**self.arguments(_SEARCH_PASS, out, statistics), positions=positions.data_ptr())
        else:
            _FORWARD[self.dtype](**self.arguments(_FORWARD_PASS, out, statistics))
        return out, statistics, positions

    def differentiate(
        self, grad, out, statistics, keys, values, wanted: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of query, keys and values; an empty tensor for each that is not wanted."""

        def like_rows(x: torch.Tensor, asked: bool) -> torch.Tensor:
            if not asked:
                return x.new_empty(0)
            if self.history.step is None:
                rows = x.new_empty(x.shape)
                if rows.nbytes >= _LARGE:  # fresh memory with a five-hundredth of the page faults
                    _C.advise_huge_pages(rows.data_ptr(), rows.nbytes)
                return rows
            # Padding lies outside every history, so no kernel writes it.
            return x.new_zeros(x.shape[0], self.history.step, *x.shape[2:])

        dquery = grad.new_empty((self.rows, self.heads, self.widths[0]) if wanted[0] else 0)
        dkeys, dvalues = like_rows(keys, wanted[1]), like_rows(values, wanted[2])
        grad, out = grad.contiguous(), out.contiguous()
        _BACKWARD[self.dtype](
            **self.arguments(_BACKWARD_PASS, out, statistics.contiguous()),
            grad=grad.data_ptr(),
            dquery=dquery.data_ptr() if wanted[0] else 0,
            dkeys=dkeys.data_ptr() if wanted[1] else 0,
            dvalues=dvalues.data_ptr() if wanted[2] else 0,
        )
        if self.history.step is not None:
            dkeys = dkeys[:, : keys.shape[1]].contiguous() if wanted[1] else dkeys
            dvalues = dvalues[:, : keys.shape[1]].contiguous() if wanted[2] else dvalues
        return dquery, dkeys, dvalues


def _cpu(query, keys, values, offsets, candidate_offsets, positions, scale, score, top_k):
    call = _Call(
        "target_attention", query, keys, values, offsets, candidate_offsets, scale=scale, score=score, kept=top_k or 0
    )
    call.list_rows(positions)
    return call.attend()


def _fake(query, keys, values, offsets, candidate_offsets, positions, scale, score, top_k):
    rows, heads, _ = query.shape
    return (
        query.new_empty(rows, heads, values.shape[-1]),
        query.new_empty((rows, heads, 2) if score == "softmax" else (0, 0, 0), dtype=_wide(query.dtype)),
        query.new_empty((0, 0) if top_k is None else (rows, top_k), dtype=torch.int64),
    )


def _cpu_backward(
    grad,
    out,
    statistics,
    query,
    keys,
    values,
    offsets,
    candidate_offsets,
    positions,
    scale,
    score,
    to_query,
    to_keys,
    to_values,
):
    call = _Call("target_attention", query, keys, values, offsets, candidate_offsets, scale=scale, score=score)
    call.list_rows(positions)
    return call.differentiate(grad, out, statistics, keys, values, (to_query, to_keys, to_values))


def _fake_backward(
    grad,
    out,
    statistics,
    query,
    keys,
    values,
    offsets,
    candidate_offsets,
    positions,
    scale,
    score,
    to_query,
    to_keys,
    to_values,
):
    return tuple(
        query.new_empty(x.shape if asked else 0)
        for x, asked in ((query, to_query), (keys, to_keys), (values, to_values))
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, positions, ctx.scale, ctx.score, top_k = inputs
    out, statistics, selected = output
    ctx.save_for_backward(out, statistics, *tensors, positions if top_k is None else selected)
    ctx.mark_non_differentiable(statistics, selected)


def _backward(ctx, grad: torch.Tensor, _grad_statistics, _grad_positions):
    wanted = [bool(x) for x in ctx.needs_input_grad[:3]]
    gradients = _backward_op(grad, *ctx.saved_tensors, ctx.scale, ctx.score, *wanted)
    return *(x if asked else None for x, asked in zip(gradients, wanted, strict=True)), *([None] * 6)


def _spread(keys, offsets, candidate_offsets):
    """The first row of each candidate's history among all rows, its length, and the rows themselves, flat."""
    if keys.dim() == 4:
        begin, lengths = torch.arange(keys.shape[0], device=keys.device) * keys.shape[1], offsets
    else:
        begin, lengths = offsets[:-1], offsets[1:] - offsets[:-1]
    if candidate_offsets is not None:
        users = torch.arange(lengths.numel(), device=keys.device)
        users = users.repeat_interleave(candidate_offsets[1:] - candidate_offsets[:-1])
        begin, lengths = begin[users], lengths[users]
    return begin, lengths.long()


def _padded(x: torch.Tensor, begin: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`[Nc, K, H, D]`: a copy of rows for each candidate, 0 where not valid."""
    x = x.flatten(0, 1) if x.dim() == 4 else x
    rows = torch.where(valid, begin.unsqueeze(1) + positions, 0)
    if x.shape[0] == 0:
        return x.new_zeros(*rows.shape, *x.shape[1:])
    return x[rows] * valid[..., None, None]


def _select_published(query, keys, offsets, candidate_offsets, k, scale):
    begin, lengths = _spread(keys, offsets, candidate_offsets)
    longest = int(lengths.max()) if lengths.numel() else 0
    positions = torch.arange(longest, device=query.device).expand(lengths.numel(), longest)
    valid = positions < lengths.unsqueeze(1)
    copies = _padded(keys, begin, positions, valid)
    wide = _wide(query.dtype)
    scores = torch.einsum("chd,clhd->cl", query.to(wide), copies.to(wide)) * scale
    scores = torch.where(valid, scores, -torch.inf)
    # The later of equal scores goes first: a stable sort of the reversed list.
    order = longest - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)
    order = torch.where(torch.arange(longest, device=query.device) < lengths.unsqueeze(1), order, -1)[:, :k]
    return torch.nn.functional.pad(order, (0, max(k - longest, 0)), value=-1)


def _published(query, keys, values, offsets, candidate_offsets, positions, scale, score, top_k):
    """`(out, statistics, selected)` in plain torch: a padded copy of the history for each candidate."""
    selected = query.new_empty((0, 0), dtype=torch.int64)
    if top_k is not None:
        positions = selected = _select_published(query, keys, offsets, candidate_offsets, top_k, scale)
    begin, lengths = _spread(keys, offsets, candidate_offsets)
    if positions is None:
        longest = int(lengths.max()) if lengths.numel() else 0
        positions = torch.arange(longest, device=query.device).expand(lengths.numel(), longest)
        positions = torch.where(positions < lengths.unsqueeze(1), positions, -1)
    valid = positions >= 0
    wide = _wide(query.dtype)
    k, v = (_padded(x.to(wide), begin, positions, valid) for x in (keys, values))
    s = torch.einsum("chd,clhd->chl", query.to(wide), k) * scale
    statistics = s.new_empty(0, 0, 0)
    if score == "softmax":
        some = valid.any(1)[:, None, None]
        masked = torch.where(some, torch.where(valid.unsqueeze(1), s, -torch.inf), 0.0)
        p = torch.softmax(masked, -1) * some
        highest = masked.amax(-1) if s.shape[-1] else s.sum(-1)
        total = torch.exp(masked - highest.unsqueeze(-1)).sum(-1)
        statistics = torch.stack([highest * _LOG2_E, torch.where(some.squeeze(-1), 1 / total, 0.0)], -1)
    else:
        p = {"relu": torch.relu, "silu": torch.nn.functional.silu, "none": lambda x: x}[score](s) * valid.unsqueeze(1)
    return torch.einsum("chl,clhd->chd", p, v).to(query.dtype), statistics, selected


def _select_cpu(query, keys, offsets, candidate_offsets, k, scale):
    return _Call("attention_top_k", query, keys, None, offsets, candidate_offsets, scale=scale, kept=k).select()


def _select_fake(query, keys, offsets, candidate_offsets, k, scale):
    return query.new_empty((query.shape[0], k), dtype=torch.int64)


def _check_rows(op: str, query, keys, offsets, candidate_offsets, scale):
    """Check everything that can be known without reading data; returns offsets as int64 and the scale."""
    _check.tensor(op, "query", query, dtypes=_DTYPES, shape=["Nc", "H", "Dq"])
    like = {"dtypes": [query.dtype], "device": query.device}
    heads, dim = query.shape[1:]
    _check.at_least(op, "query.shape[1]", heads, 1)
    _check.at_least(op, "query.shape[2]", dim, 1)
    padded = isinstance(keys, torch.Tensor) and keys.dim() == 4
    _check.tensor(op, "keys", keys, shape=["B", "L", heads, dim] if padded else ["T", heads, dim], **like)
    index = {"dtypes": _check.INDEX_DTYPES, "device": query.device}
    sizes = [keys.shape[0]] if padded else ["B + 1"]
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
    scale = dim**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return offsets.to(torch.int64), candidate_offsets, scale


def _prepare(query, keys, values, offsets, candidate_offsets, scale, score, top_k, positions):
    op = "target_attention"
    offsets, candidate_offsets, scale = _check_rows(op, query, keys, offsets, candidate_offsets, scale)
    like = {"dtypes": [query.dtype], "device": query.device}
    _check.tensor(op, "values", values, shape=[*keys.shape[:-1], "Dv"], **like)
    _check.at_least(op, f"values.shape[{values.dim() - 1}]", values.shape[-1], 1)
    _check.choice(op, "score", score, _SCORES)
    if top_k is not None:
        if positions is not None:
            raise ValueError(f"{op}: top_k and positions exclude each other, got both")
        _check.at_least(op, "top_k", top_k, 1)
    if positions is not None:
        shape = [query.shape[0], "K"]
        _check.tensor(op, "positions", positions, dtypes=_check.INDEX_DTYPES, shape=shape, device=query.device)
        positions = positions.to(torch.int64)
    return query, keys, values, offsets, candidate_offsets, positions, scale, score, top_k


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, gradient: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_(gradient)

    offsets, rows = torch.tensor([0, 4, 4, 11]), torch.tensor([0, 2, 3, 5])
    listed = torch.tensor([[0, 3, -1], [2, -1, 2], [-1, -1, -1], [6, 0, 5], [1, -1, -1]])
    for gradient in (False, True):
        for score, positions, top_k in [("softmax", None, None), ("relu", listed, None), ("softmax", None, 3)]:
            shared = score != "relu"
            query, keys = random(5, 2, 3, gradient=gradient), random(11, 2, 3, gradient=gradient)
            values = random(11, 2, 4, gradient=gradient and shared)
            yield query, keys, values, offsets, rows, positions, 0.5, score, top_k
        dense = [random(3, 1, 17, gradient=gradient), random(3, 4, 1, 17, gradient=gradient)]
        yield *dense, random(3, 4, 1, 2, gradient=gradient), torch.tensor([3, 0, 4]), None, None, 1.0, "silu", None


def _samples_backward() -> Iterator[tuple]:
    for arguments in _samples():
        *inputs, positions, scale, score, top_k = (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        out, statistics, selected = _op(*inputs, positions, scale, score, top_k)
        positions = positions if top_k is None else selected
        for wanted in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
            yield (torch.ones_like(out), out, statistics, *inputs, positions, scale, score, *wanted)


def _samples_select() -> Iterator[tuple]:
    for query, keys, _, offsets, rows, _, scale, _, _ in _samples():
        for k in (1, 5):
            yield query.detach(), keys.detach(), offsets, rows, k, scale


_TENSORS = (
    "Tensor query, Tensor keys, Tensor values, Tensor offsets, Tensor? candidate_offsets, Tensor? positions, "
    "float scale, str score"
)
_op = define(
    f"target_attention({_TENSORS}, int? top_k) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_published,
)
_backward_op = define(
    f"target_attention_backward(Tensor grad, Tensor out, Tensor statistics, {_TENSORS}, bool to_query, bool to_keys, "
    "bool to_values) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    fake=_fake_backward,
    samples=_samples_backward,
)
_select_op = define(
    "attention_top_k(Tensor query, Tensor keys, Tensor offsets, Tensor? candidate_offsets, int k, float scale) "
    "-> Tensor",
    cpu=_select_cpu,
    fake=_select_fake,
    samples=_samples_select,
    expected=_select_published,
)


def _reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    *,
    candidate_offsets: torch.Tensor | None = None,
    scale: float | None = None,
    score: str = "softmax",
    top_k: int | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """The published form in plain torch, with a padded copy of the history for each candidate."""
    return _published(*_prepare(query, keys, values, offsets, candidate_offsets, scale, score, top_k, positions))[0]


def target_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    *,
    candidate_offsets: torch.Tensor | None = None,
    scale: float | None = None,
    score: str = "softmax",
    top_k: int | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head attention of each candidate over what its user did.

    .. math::
        s_{chl} = \\mathrm{scale} \\cdot q_{ch}^\\top k_{lh}, \\qquad
        o_{ch} = \\sum_l p_{chl} v_{lh}, \\qquad
        p = \\mathrm{softmax}_l(s),\\ \\max(s, 0),\\ s\\,\\sigma(s)\\ \\text{or}\\ s

    The candidates of a user read its history together, and nothing of size candidates x history is stored; backward
    computes the scores again.

    Parameters
    ----------
    query : Tensor [Nc, H, Dq], float32, bfloat16 or float64
        The candidates.
    keys : Tensor [T, H, Dq], or padded [B, L, H, Dq]
        The histories. Rows may lie apart: a view of some columns of a wider tensor, such as one part of a fused
        projection, is read in place where the H heads of a row lie side by side.
    values : Tensor [T, H, Dv], or padded [B, L, H, Dv]
        What is added up; Dv need not be Dq.
    offsets : Tensor [B + 1], int32 or int64
        User b owns rows `offsets[b] : offsets[b + 1]`. For padded keys: the lengths, [B], each in [0, L].
    candidate_offsets : Tensor [B + 1], int32 or int64, optional
        User b's candidates are rows `candidate_offsets[b] : candidate_offsets[b + 1]` of `query`; left out, each user
        has one (Nc = B).
    scale : float, optional
        1 / sqrt(Dq) when left out.
    score : {"softmax", "relu", "silu", "none"}
        How scores become weights. Only the softmax is normalised.
    top_k : int, optional
        Attend only to the so many rows with the highest scores, summed over the heads, so that one list serves all of
        them; of equal scores the later row goes first. All rows where the history is shorter. Gradients flow through
        the rows chosen, not through the choice. Same as `positions=attention_top_k(...)`.
    positions : Tensor [Nc, K], int32 or int64, optional
        Attend only to these rows, counted from the first row of the user's history; -1 stands for none. A row that is
        listed twice counts twice.

    Returns
    -------
    Tensor [Nc, H, Dv], dtype of `query`. Rows of 0 where the history is empty or no position is given, for every
    `score`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes or devices differ, offsets that do not start at 0, fall, or do not end at the number of rows; both
        `top_k` and `positions`.
    IndexError
        A length outside [0, L]; a position outside its user's history.

    Notes
    -----
    Accumulates in float32 (float64 for float64), every sum in one fixed order: the answer for a candidate does not
    depend on its user's other candidates, on the rest of the batch or on the number of threads, and for float32 AVX2
    and AVX-512 give equal bits; the scalar form rounds products and sums apart (no FMA) and differs in the last bits.
    Error of a score: (Dq + 3) eps |scale| sum |q k|. Histories that are longer than 1024 rows are summed in parts of
    1024. bfloat16 inputs are widened, and the answer is rounded once.
    Differentiable (once) in `query`, `keys` and `values`. Backends: CPU (scalar, AVX2, AVX-512; float64 scalar only).

    References
    ----------
    Vaswani et al., "Attention is all you need", NeurIPS 2017, arXiv 1706.03762 (softmax);
    Qi et al., "Search-based User Interest Modeling (SIM)", CIKM 2020, arXiv 2006.05639 (top_k, positions);
    Chang et al., "TWIN", KDD 2023, arXiv 2302.02352 (top_k of the attention's own scores);
    Feng et al., "Long-sequence Recommendation Models Need Decoupled Embeddings (DARE)", ICLR 2025,
    arXiv 2410.02604 (Dq != Dv).
    """
    return _op(*_prepare(query, keys, values, offsets, candidate_offsets, scale, score, top_k, positions))[0]


target_attention.reference = _reference


def _reference_top_k(
    query: torch.Tensor,
    keys: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
    *,
    candidate_offsets: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The same in plain torch: a padded copy of the keys for each candidate, and a stable sort."""
    _check.at_least("attention_top_k", "k", k, 1)
    offsets, candidate_offsets, scale = _check_rows("attention_top_k", query, keys, offsets, candidate_offsets, scale)
    return _select_published(query, keys, offsets, candidate_offsets, k, scale)


def attention_top_k(
    query: torch.Tensor,
    keys: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
    *,
    candidate_offsets: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The rows of a user's history that score highest for each candidate: the search stage of SIM and TWIN.

    .. math:: s_{cl} = \\mathrm{scale} \\cdot \\sum_h q_{ch}^\\top k_{lh}

    Parameters
    ----------
    query, keys, offsets, candidate_offsets, scale
        As for `target_attention`.
    k : int
        How many rows, at least 1.

    Returns
    -------
    int64 [Nc, k]
        Counted from the first row of the user's history, highest score first, of equal scores the later row first;
        -1 past the end of a history with fewer rows. A NaN ranks like infinity.

    Raises
    ------
    TypeError, ValueError, IndexError
        As for `target_attention`; `k` below 1.

    Notes
    -----
    The selection is exact for scores as rounded to float32 (float64 for float64); scores of other ISA levels may
    differ in the last bits, and near-ties with them. The keys are read once for up to 48 candidates, and no scores are
    stored. Without gradient. Backends: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    As for `target_attention`.
    """
    _check.at_least("attention_top_k", "k", k, 1)
    offsets, candidate_offsets, scale = _check_rows("attention_top_k", query, keys, offsets, candidate_offsets, scale)
    return _select_op(query, keys, offsets, candidate_offsets, k, scale)


attention_top_k.reference = _reference_top_k
