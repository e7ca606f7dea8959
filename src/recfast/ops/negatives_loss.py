"""The loss of rows with one positive and many negatives each, without a matrix of their scores."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from recfast import _C
from recfast.ops import _check
from recfast.ops._histories import unit_rows
from recfast.ops._library import define, kernel

LOSSES = ("softmax", "contrastive", "bpr", "bce")  # in the order of negatives_loss.h
NORMALIZE = ("none", "table", "both")
_OP = "negatives_loss"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_KERNELS = {
    what: {dtype: kernel(f"negatives_loss_{what}_{name}") for dtype, name in _NAMES.items()}
    for what in ("forward_scratch", "backward_scratch", "entries", "forward", "group", "backward")
}
_ALL, _SHARED, _PRIVATE = range(3)
_TILE = 120  # columns that are scored together: whole tiles of 5, 6 and 8 rows
_MOST = 2**31
_SMALLEST_NORM = 1e-12


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What losses, biases and sums are held in beside rows of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def _words(size: int) -> int:
    return (size + 15) // 16


class _Call:
    """What a kernel reads: `fields`, as loss_args in csrc/bindings takes them, and the tensors they point into."""

    def __init__(
        self, queries, table, positives, negatives, bias, log_expected, excluded, exclude_offsets,
        first, loss, normalize, scale, margin, weight, positive_weight, clamp, skip_positive,
    ) -> None:  # fmt: skip
        self.queries, self.table = unit_rows(queries), unit_rows(table)
        self.positives = positives.contiguous()
        self.negatives = None if negatives is None else negatives.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.log_expected = None if log_expected is None else log_expected.contiguous()
        rows, dim = queries.shape
        self.form = _ALL if negatives is None else _SHARED if negatives.dim() == 1 else _PRIVATE
        self.columns = table.shape[0] - first if negatives is None else negatives.shape[-1]
        self.arithmetic = _arithmetic(queries.dtype)
        _check.indices(_OP, "positives", self.positives, table.shape[0])
        if self.negatives is not None:
            _check.indices(_OP, "negatives", self.negatives, table.shape[0])
        self.excluded = self.exclude_offsets = None
        if excluded is not None:
            self._exclude(excluded, exclude_offsets, first)
        self.fields = (
            LOSSES.index(loss),
            self.form,
            self.columns,
            first,
            _TILE,
            self.queries.data_ptr(),
            rows,
            dim,
            self.queries.stride(0),
            self.table.data_ptr(),
            table.shape[0],
            self.table.stride(0),
            self.positives.data_ptr(),
            _address(self.negatives),
            _address(self.bias),
            _address(self.log_expected),
            _address(self.excluded),
            _address(self.exclude_offsets),
            normalize == "both",
            normalize != "none",
            skip_positive,
            clamp,
            scale,
            margin,
            weight,
            positive_weight,
        )

    def _exclude(self, ids: torch.Tensor, offsets: torch.Tensor, first: int) -> None:
        """What rows leave out, ascending in each row: ids of private lists, columns of others."""
        rows, table_rows = self.queries.shape[0], self.table.shape[0]
        _check.offsets(_OP, "exclude[1]", offsets, ids.numel())
        _check.indices(_OP, "exclude[0]", ids, table_rows)
        owner = torch.arange(rows).repeat_interleave(offsets[1:] - offsets[:-1])
        size = table_rows
        if self.form == _ALL:
            owner, ids = owner[ids >= first], ids[ids >= first] - first
        elif self.form == _SHARED:
            ordered, column = self.negatives.sort(stable=True)
            low = torch.searchsorted(ordered, ids)
            count = torch.searchsorted(ordered, ids, right=True) - low
            owner = owner.repeat_interleave(count)
            within = torch.arange(owner.numel()) - (count.cumsum(0) - count).repeat_interleave(count)
            ids, size = column[low.repeat_interleave(count) + within], max(self.columns, 1)
        keys = (owner * size + ids).sort().values
        self.excluded = keys % size
        self.exclude_offsets = torch.searchsorted(keys, torch.arange(rows + 1) * size)


def _outputs(queries, table, negatives, first, loss, gradient):
    rows, dim = queries.shape
    wide = _arithmetic(queries.dtype)
    bits = (0,)
    if gradient and loss == "contrastive":
        if negatives is not None and negatives.dim() == 2:
            bits = (rows, 2 * _words(negatives.shape[1]))
        else:
            bits = (table.shape[0] - first if negatives is None else negatives.shape[0], 2 * _words(rows))
    return (
        queries.new_empty(rows, dtype=wide),
        queries.new_empty((3, rows), dtype=wide),
        queries.new_empty((rows, dim) if gradient else (0,), dtype=wide),
        queries.new_empty(bits, dtype=torch.uint8),
    )


def _cpu(queries, table, positives, negatives, bias, log_expected, excluded, exclude_offsets, *rest):
    *options, gradient = rest
    call = _Call(queries, table, positives, negatives, bias, log_expected, excluded, exclude_offsets, *options)
    outputs = _outputs(queries, table, negatives, options[0], options[1], gradient)
    fields = (*call.fields, *map(_address, outputs))
    scratch = torch.empty(_KERNELS["forward_scratch"][queries.dtype](fields), dtype=call.arithmetic)
    _KERNELS["forward"][queries.dtype](fields, scratch.data_ptr())
    return outputs


def _fake(queries, table, positives, negatives, bias, log_expected, excluded, exclude_offsets, first, loss, *rest):
    return _outputs(queries, table, negatives, first, loss, rest[-1])


def _gradients(grad, statistic, active, needs, sparse, *arguments):
    """`(rows, dtable, dbias)`: of the table rows named, or of all of them where `rows` is None."""
    call = _Call(*arguments)
    dtype, table, first = call.queries.dtype, call.table, arguments[8]
    grad, statistic, active = grad.contiguous(), statistic.contiguous(), active.contiguous()
    fields = (*call.fields, 0, _address(statistic), 0, _address(active))
    entries = _KERNELS["entries"][dtype](fields)
    order = torch.empty(entries, dtype=torch.int32)
    starts = torch.empty(entries + 1, dtype=torch.int32)
    # The kernel writes one further, to where no row has come yet.
    ids = torch.empty(min(entries, table.shape[0]) + 1, dtype=torch.int64)
    words = torch.empty(_C.negatives_loss_group_scratch(entries, table.shape[0]), dtype=torch.int64)
    places = (order.data_ptr(), starts.data_ptr(), ids.data_ptr())
    runs = _KERNELS["group"][dtype](fields, entries, *places, words.data_ptr())
    del words
    if sparse:
        dtable = torch.empty(runs, table.shape[1], dtype=dtype)
    elif call.form == _ALL:
        dtable = torch.empty(table.shape, dtype=dtype)
        dtable[:first] = 0
    else:
        dtable = torch.zeros(table.shape, dtype=dtype)
    dbias = torch.zeros(table.shape[0] if needs[1] and call.bias is not None else 0, dtype=call.arithmetic)
    wanted = (grad.data_ptr(), dtable.data_ptr(), sparse, _address(dbias), *places, runs)
    scratch = torch.empty(_KERNELS["backward_scratch"][dtype](fields), dtype=call.arithmetic)
    _KERNELS["backward"][dtype](fields, wanted, scratch.data_ptr())
    return ids[:runs], dtable, dbias


def _cpu_backward(grad, statistic, active, queries, table, positives, negatives, bias, *rest):
    *options, needs = rest
    _, dtable, dbias = _gradients(
        grad, statistic, active, needs, False, queries, table, positives, negatives, bias, *options
    )
    return dtable, dbias


def _fake_backward(grad, statistic, active, queries, table, positives, negatives, bias, *rest):
    size = table.shape[0] if rest[-1][1] and bias is not None else 0
    return torch.empty_like(table, memory_format=torch.contiguous_format), grad.new_empty(size)


_TENSORS = 8


def _setup_context(ctx, inputs, output) -> None:
    *arguments, gradient = inputs
    ctx.options = arguments[_TENSORS:]
    ctx.gradient = gradient
    ctx.save_for_backward(*output[1:], *arguments[:_TENSORS])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: torch.Tensor, *_):
    statistic, direction, active, *tensors = ctx.saved_tensors
    if not ctx.gradient:
        _, statistic, direction, active = _op(*(x if x is None else x.detach() for x in tensors), *ctx.options, True)
    needs = [ctx.needs_input_grad[1], ctx.needs_input_grad[4] and tensors[4] is not None]
    answer: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[0]:
        answer[0] = (grad.unsqueeze(1) * direction).to(tensors[0].dtype)
    if any(needs):
        dtable, dbias = _backward_op(grad, statistic, active, *tensors, *ctx.options, needs)
        answer[1] = dtable if needs[0] else None
        answer[4] = dbias if needs[1] else None
    return tuple(answer)


class _Sparse(torch.autograd.Function):
    """The op with a sparse gradient for the table, which no op of torch.library may return."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _cpu(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.needs = ctx.needs_input_grad
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        statistic, direction, active, *tensors = ctx.saved_tensors
        needs = [ctx.needs[1], ctx.needs[4]]
        answer: list[torch.Tensor | None] = [None] * len(ctx.needs)
        if ctx.needs[0]:
            answer[0] = (grad.unsqueeze(1) * direction).to(tensors[0].dtype)
        if any(needs):
            ids, dtable, dbias = _gradients(grad, statistic, active, needs, True, *tensors, *ctx.options)
            if needs[0]:
                answer[1] = torch.sparse_coo_tensor(
                    ids.unsqueeze(0), dtable, tensors[1].shape, is_coalesced=True, check_invariants=False
                )
            answer[4] = dbias if needs[1] else None
        return tuple(answer)


def _unfused(
    queries, table, positives, negatives, bias, log_expected, excluded, exclude_offsets,
    first, loss, normalize, scale, margin, weight, positive_weight, clamp, skip_positive,
):  # fmt: skip
    """All scores at once, of prepared arguments: losses [M], statistic [3, M], what is above the margin bool [M, K]."""
    wide = _arithmetic(queries.dtype)
    queries, table = queries.to(wide), table.to(wide)
    if normalize == "both":
        queries = F.normalize(queries, dim=1, eps=_SMALLEST_NORM)
    if normalize != "none":
        table = F.normalize(table, dim=1, eps=_SMALLEST_NORM)
    own = scale * (queries * table[positives]).sum(1)
    ids = torch.arange(first, table.shape[0], device=table.device) if negatives is None else negatives
    scores = scale * (queries @ table[ids].T if ids.dim() == 1 else (table[ids] @ queries.unsqueeze(2)).squeeze(2))
    if bias is not None:
        own, scores = own + bias[positives], scores + bias[ids]
    if log_expected is not None:
        scores = scores - log_expected
    ids = ids.expand(scores.shape)
    out = (ids == positives.unsqueeze(1)) & skip_positive
    if excluded is not None:
        owner = torch.arange(len(positives), device=table.device)
        owner = owner.repeat_interleave(exclude_offsets[1:] - exclude_offsets[:-1])
        banned = torch.zeros(len(positives), table.shape[0], dtype=torch.bool, device=table.device)
        banned[owner, excluded] = True
        out = out | banned.gather(1, ids)
    above = (scores > margin) & ~out
    if loss == "softmax":
        level = torch.logsumexp(torch.cat([own.unsqueeze(1), scores.masked_fill(out, -torch.inf)], dim=1), 1)
        losses = level - own
        slope = torch.expm1(-losses)
    else:
        level = weight / (~out).sum(1).clamp(min=1).to(wide)
        if loss == "contrastive":
            losses = (F.relu(1 - own) if clamp else 1 - own) + level * torch.where(above, scores - margin, 0).sum(1)
            slope = torch.where((own < 1) | (not clamp), -1.0, 0.0).to(wide)
        elif loss == "bpr":
            gap = own.unsqueeze(1) - scores
            losses = -level * F.logsigmoid(gap).masked_fill(out, 0).sum(1)
            slope = -level * torch.sigmoid(-gap).masked_fill(out, 0).sum(1)
        else:
            losses = -positive_weight * F.logsigmoid(own) - level * F.logsigmoid(-scores).masked_fill(out, 0).sum(1)
            slope = -positive_weight * torch.sigmoid(-own)
    return losses, torch.stack([level, own, slope]), above


def _expected(queries, *rest):
    *options, gradient = rest
    with torch.enable_grad():
        wide = queries.detach().to(_arithmetic(queries.dtype)).requires_grad_()
        table = options[0].to(wide.dtype)
        losses, statistic, above = _unfused(wide, table, *options[1:])
        # A loss is that of its own query alone.
        direction = torch.autograd.grad(losses.sum(), wide)[0] if gradient else wide.new_empty(0)
    bits = queries.new_empty(0, dtype=torch.uint8)
    if gradient and options[8] == "contrastive":
        above = above.T if options[2] is None or options[2].dim() == 1 else above
        above = F.pad(above, (0, 16 * _words(above.shape[1]) - above.shape[1]))
        bits = (above.reshape(len(above), -1, 8) * 2 ** torch.arange(8)).sum(2).to(torch.uint8)
    return losses, statistic, direction, bits


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def draw(*size: int) -> torch.Tensor:
        return torch.randint(0, 11, size, generator=generator)

    cases = [
        ("softmax", None, "none", torch.float32),
        ("contrastive", (6,), "both", torch.float32),
        ("bpr", (4, 5), "table", torch.float32),
        ("bce", (6,), "none", torch.bfloat16),
        ("contrastive", (4, 5), "both", torch.float32),
        ("softmax", (4, 5), "both", torch.float64),
    ]
    for gradient in (False, True):
        for loss, shape, normalize, dtype in cases if gradient else cases[:2]:
            wide = _arithmetic(dtype)
            extra = loss in ("softmax", "bce")
            yield (
                random(4, 5).to(dtype).requires_grad_(gradient),
                random(11, 5).to(dtype).requires_grad_(gradient),
                draw(4),
                None if shape is None else draw(*shape),
                random(11).to(wide).requires_grad_(gradient) if extra else None,
                random(*shape).to(wide) if extra and shape is not None else None,
                draw(7) if extra else None,
                torch.tensor([0, 3, 3, 5, 7]) if extra else None,
                1 if shape is None else 0,
                loss,
                normalize,
                1.5,
                0.1,
                2.0,
                0.5,
                True,
                True,
                gradient,
            )


def _samples_backward() -> Iterator[tuple]:
    for *arguments, gradient in _samples():
        if not gradient:
            continue
        inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        losses, statistic, _, active = _op(*inputs, True)
        yield (torch.ones_like(losses), statistic, active, *inputs, [True, True])


_ARGUMENTS = (
    "Tensor queries, Tensor table, Tensor positives, Tensor? negatives, Tensor? bias, Tensor? log_expected, "
    "Tensor? excluded, Tensor? exclude_offsets, int first, str loss, str normalize, float scale, float margin, "
    "float weight, float positive_weight, bool clamp, bool skip_positive"
)
_op = define(
    f"negatives_loss({_ARGUMENTS}, bool gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    samples=_samples,
    expected=_expected,
)
_backward_op = define(
    f"negatives_loss_backward(Tensor grad, Tensor statistic, Tensor active, {_ARGUMENTS}, bool[] needs) "
    "-> (Tensor, Tensor)",
    cpu=_cpu_backward,
    fake=_fake_backward,
    samples=_samples_backward,
)


def _prepare(
    queries, table, positives, negatives, loss, bias, log_expected, exclude, first, normalize, scale, margin, weight,
    positive_weight, clamp, skip_positive,
):  # fmt: skip
    """Check everything that can be known without reading data; the arguments of the op, but for the last."""
    _check.tensor(_OP, "queries", queries, dtypes=_DTYPES, shape=["M", "D"])
    rows, dim = queries.shape
    device = queries.device
    _check.at_least(_OP, "queries.shape[1]", dim, 1)
    _check.tensor(_OP, "table", table, dtypes=[queries.dtype], shape=["N", dim], device=device)
    items = table.shape[0]
    if items >= _MOST:
        raise ValueError(f"{_OP}: table must have fewer than 2^31 rows, got {items}")
    inner = {"dtypes": [_arithmetic(queries.dtype)], "device": device}
    positives = _check.index(_OP, "positives", positives, shape=(rows,), device=device)
    if negatives is not None:
        shape = (rows, "K") if isinstance(negatives, torch.Tensor) and negatives.dim() == 2 else ("K",)
        negatives = _check.index(_OP, "negatives", negatives, shape=shape, device=device)
        if negatives.dim() == 2 and negatives.numel() + rows >= _MOST:
            raise ValueError(f"{_OP}: negatives must be fewer than 2^31 ids, got {negatives.numel()}")
        if first != 0:
            raise ValueError(f"{_OP}: first must be 0 where negatives are given, got {first}")
    elif not 0 <= first <= items:
        raise ValueError(f"{_OP}: first must be in [0, {items}], got {first}")
    if bias is not None:
        _check.tensor(_OP, "bias", bias, shape=(items,), **inner)
    if log_expected is not None:
        if negatives is None:
            raise ValueError(f"{_OP}: log_expected must be None where the negatives are the whole table")
        _check.tensor(_OP, "log_expected", log_expected, shape=tuple(negatives.shape), **inner)
        if log_expected.requires_grad:
            raise ValueError(f"{_OP}: log_expected must not require a gradient, which it does not get")
    excluded = exclude_offsets = None
    if exclude is not None:
        excluded, exclude_offsets = exclude
        excluded = _check.index(_OP, "exclude[0]", excluded, shape=["T"], device=device)
        exclude_offsets = _check.index(_OP, "exclude[1]", exclude_offsets, shape=(rows + 1,), device=device)
    _check.choice(_OP, "loss", loss, LOSSES)
    _check.choice(_OP, "normalize", normalize, NORMALIZE)
    for name, value in (("scale", scale), ("margin", margin)):
        if not math.isfinite(value):
            raise ValueError(f"{_OP}: {name} must be finite, got {value}")
    for name, value in (("weight", weight), ("positive_weight", positive_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{_OP}: {name} must be finite and at least 0, got {value}")
    numbers = (float(scale), float(margin), float(weight), float(positive_weight), bool(clamp), bool(skip_positive))
    tensors = (queries, table, positives, negatives, bias, log_expected, excluded, exclude_offsets)
    return *tensors, first, loss, normalize, *numbers


def reference(
    queries: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor | None = None,
    *,
    loss: str = "softmax",
    bias: torch.Tensor | None = None,
    log_expected: torch.Tensor | None = None,
    exclude: tuple[torch.Tensor, torch.Tensor] | None = None,
    first: int = 0,
    normalize: str = "none",
    scale: float = 1.0,
    margin: float = 0.5,
    weight: float = 1.0,
    positive_weight: float = 1.0,
    clamp: bool = False,
    skip_positive: bool = True,
    sparse: bool = False,
) -> torch.Tensor:
    """`negatives_loss` in plain torch: all scores, and private lists' rows, side by side."""
    del sparse
    arguments = _prepare(
        queries, table, positives, negatives, loss, bias, log_expected, exclude, first, normalize, scale, margin,
        weight, positive_weight, clamp, skip_positive,
    )  # fmt: skip
    return _unfused(*arguments)[0]


def negatives_loss(
    queries: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor | None = None,
    *,
    loss: str = "softmax",
    bias: torch.Tensor | None = None,
    log_expected: torch.Tensor | None = None,
    exclude: tuple[torch.Tensor, torch.Tensor] | None = None,
    first: int = 0,
    normalize: str = "none",
    scale: float = 1.0,
    margin: float = 0.5,
    weight: float = 1.0,
    positive_weight: float = 1.0,
    clamp: bool = False,
    skip_positive: bool = True,
    sparse: bool = False,
) -> torch.Tensor:
    r"""The loss of each row against one positive and many negatives; scores are made and used up tile by tile.

    .. math::
        z_{ij} = s\, \langle q_i, w_j \rangle + b_j \;(- \ln E_j \text{ for negatives})

    With :math:`N_i` the columns that count in row i, :math:`K_i` their number, p its positive:

    ============= =====================================================================================================
    "softmax"     :math:`\ln(e^{z_{ip}} + \sum_{N_i} e^{z_{ij}}) - z_{ip}`
    "contrastive" :math:`1 - z_{ip} + \frac{w}{K_i} \sum_{N_i} \max(0, z_{ij} - m)`; with `clamp` the positive's part is
                  :math:`\max(0, 1 - z_{ip})`, which is the same on cosines
    "bpr"         :math:`\frac{w}{K_i} \sum_{N_i} \mathrm{softplus}(z_{ij} - z_{ip})`
    "bce"         :math:`w_+\, \mathrm{softplus}(-z_{ip}) + \frac{w}{K_i} \sum_{N_i} \mathrm{softplus}(z_{ij})`
    ============= =====================================================================================================

    Parameters
    ----------
    queries : Tensor [M, D], float32, bfloat16 or float64
    table : Tensor [N, D], dtype of `queries`
    positives : Tensor [M], int64 or int32
        Rows of `table`.
    negatives : Tensor [K] (one list for all rows) or [M, K] (a list for each row), int64 or int32, or None
        None: every row of the table from `first` on.
    loss : {"softmax", "contrastive", "bpr", "bce"}
    bias : Tensor [N], float32 (float64 with float64), optional
        b, of positives and negatives.
    log_expected : Tensor like `negatives`, dtype of `bias`, optional
        :math:`\ln E_j`: how often the item of a column is expected among the columns (logQ correction).
    exclude : (values Tensor [T], offsets Tensor [M + 1]), optional
        Row i also leaves out the ids `values[offsets[i] : offsets[i + 1]]`.
    first : int
        Where the whole table is meant: its first column, 1 to pass over row 0, "unknown".
    normalize : {"none", "table", "both"}
        Which rows are taken at length 1, :math:`x / \max(|x|, 10^{-12})`: the score is the cosine (times s) with
        "both". Shorter rows have no direction, and the gradient 0.
    scale : float
        s, one over the temperature.
    margin, weight, positive_weight : float
        m, w, w+.
    clamp : bool
    skip_positive : bool
        A column that has the row's own positive does not count there.
    sparse : bool
        The gradient of `table` is a sparse tensor of the rows that occurred, ascending and each once, for
        `torch.optim.SparseAdam` and its like; not with the whole table. Under `torch.compile` it is dense all the same.

    Returns
    -------
    Tensor [M], float32 (float64 for float64). A row in which no column counts has what its positive costs alone; the
    softmax 0, with gradient 0.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes or devices that do not fit, numbers that are not finite.
    IndexError
        An id outside [0, N).

    Notes
    -----
    Nothing of size M x K is held beside what was given, but one bit a pair for "contrastive" with a gradient, and for
    private lists the grouping of the pairs by id in backward: 8 bytes a pair, 24 where the table has over eight times
    as many rows as there are pairs. Differentiable (once) in `queries`, `table` and `bias`; forward makes the gradient
    of `queries` on the way.
    Every sum runs in a fixed order, in float32 (float64 for float64): the answer does not depend on the number of
    threads, nor the loss of a row on the others. Instruction sets differ in the last bits: the error of a score is at
    most `(D + 6) eps` times the sum of its absolute terms, and losses have slope at most 1 (w) in them.
    Backends: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Bengio and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model",
    2008 ("softmax" with `log_expected`). Mao et al., "SimpleX: A Simple and Strong Baseline for Collaborative
    Filtering", CIKM 2021 ("contrastive"). Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback",
    UAI 2009. Petrov and Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
    Sampling", RecSys 2023 (weights of "bce").
    """
    arguments = _prepare(
        queries, table, positives, negatives, loss, bias, log_expected, exclude, first, normalize, scale, margin,
        weight, positive_weight, clamp, skip_positive,
    )  # fmt: skip
    gradient = torch.is_grad_enabled() and (
        queries.requires_grad or table.requires_grad or (bias is not None and bias.requires_grad)
    )
    if sparse:
        if negatives is None:
            raise ValueError(f"{_OP}: sparse must be False where the negatives are the whole table")
        if gradient and not torch.compiler.is_compiling():
            return _Sparse.apply(*arguments, gradient)[0]
    return _op(*arguments, gradient)[0]


negatives_loss.reference = reference
