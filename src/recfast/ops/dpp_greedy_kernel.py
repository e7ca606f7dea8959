"""The greedy MAP list of a determinantal point process whose similarities are given as a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel
from recfast.ops.dpp_greedy import (
    _DTYPES,
    _NO_DIRECTION,
    _POLICIES,
    _TIE,
    _TIE_RELATIVE,
    DPPResult,
    _empty,
    _options,
)

_threads = kernel("max_threads")
_run = kernel("dpp_greedy_kernel")
# What is left of an item that the picks span is the rounding of its similarities.
_EPSILON = {torch.float32: 1e-5, torch.float64: 1e-10}


def _cpu(
    similarity: Tensor,
    relevance: Tensor,
    k: int,
    weight: Tensor,
    gamma: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    shown: Tensor | None,
    window: int,
    exhausted: str,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    users, items = relevance.shape
    similarity = similarity.contiguous()
    inputs = [relevance.double().contiguous(), weight.contiguous()]
    inputs += [None if value is None else value.contiguous() for value in (lengths, mask, shown)]
    outputs = _empty(users, k, relevance)
    fields = (
        users,
        items,
        k,
        0 if shown is None else shown.shape[1],
        window,
        gamma,
        epsilon,
        _POLICIES.index(exhausted),
        similarity.data_ptr(),
        similarity.dtype == torch.float64,
        similarity.dim() == 2,
        *(0 if value is None else value.data_ptr() for value in inputs),
        *(value.data_ptr() for value in outputs),
    )
    a_thread = _C.dpp_greedy_kernel_scratch(fields)
    scratch = torch.empty(a_thread * (_threads() if users > 1 else 1) + 64, dtype=torch.uint8)
    not_finite, negative, asymmetric, indefinite, wrong_relevance = _run(fields, scratch.data_ptr())
    if wrong_relevance >= 0:
        user, item = divmod(wrong_relevance, items)
        raise ValueError(
            f"dpp_greedy_kernel: relevance[{user}, {item}] must be a finite number, also when times 2 alpha, "
            f"got {float(relevance[user, item])}"
        )

    def entry(position: int, turned: bool = False) -> tuple[str, float]:
        place, column = divmod(position, items)
        user, row = divmod(place, items)
        if turned:
            row, column = column, row
        at = (row, column) if similarity.dim() == 2 else (user, row, column)
        return f"similarity[{', '.join(map(str, at))}]", float(similarity[at])

    if not_finite >= 0:
        name, value = entry(not_finite)
        raise ValueError(f"dpp_greedy_kernel: {name} must be a finite number, got {value}")
    if negative >= 0:
        name, value = entry(negative)
        raise ValueError(f"dpp_greedy_kernel: {name} must be at least 0, being on the diagonal, got {value}")
    if asymmetric >= 0:
        (name, value), (other, turned) = entry(asymmetric), entry(asymmetric, turned=True)
        raise ValueError(f"dpp_greedy_kernel: similarity must be symmetric, got {name} = {value}, {other} = {turned}")
    if indefinite >= 0:
        user, item = divmod(indefinite, items)
        raise ValueError(
            f"dpp_greedy_kernel: similarity must be positive semidefinite, got a negative determinant for user {user} "
            f"when item {item} joins the picks"
        )
    return outputs


def _fake(similarity, relevance, k, weight, gamma, lengths, mask, shown, window, exhausted, epsilon):
    return _empty(relevance.shape[0], k, relevance)


def _left(kernel_matrix: Tensor, members: list[int], least: float) -> Tensor:
    """The diagonal [N] of what is left of the kernel once `members` are taken out: their Schur complement."""
    left = kernel_matrix.clone()
    for member in members:
        row, rho = left[member].clone(), float(left[member, member])
        if rho <= least * float(kernel_matrix[member, member]):
            continue
        left -= torch.outer(row, row) / rho
    return left.diagonal()


def _reference(similarity, relevance, k, weight, gamma, lengths, mask, shown, window, exhausted, epsilon):
    users, items = relevance.shape
    result = DPPResult(*_empty(users, k, relevance))
    result.indices.fill_(-1)
    result.gains.fill_(-torch.inf)
    result.count.zero_()
    result.log_det.zero_()
    for user in range(users):
        free = torch.ones(items, dtype=torch.bool) if mask is None else mask[user].clone()
        if lengths is not None:
            free[int(lengths[user]) :] = False
        matrix = (similarity if similarity.dim() == 2 else similarity[user]).double()
        # What is no candidate may hold anything.
        matrix = torch.where(free[:, None] & free, matrix, 0.0)
        matrix = (1 - gamma) * matrix + gamma * torch.eye(items, dtype=torch.float64)
        scores = relevance[user].double()
        sequence = [] if shown is None else [i for i in dict.fromkeys(shown[user].tolist()) if i >= 0 and free[i]]
        free[sequence] = False
        start = 0
        while int(result.count[user]) < k and bool(free.any()):
            best = int(torch.where(free, scores, -torch.inf).argmax())
            item, gain = best, -math.inf
            if math.isinf(weight[user]):
                gain = float(scores[item])
            for attempt in ("as it is", "afresh") if gain == -math.inf else ():
                if attempt == "afresh":
                    if exhausted != "restart" or start == len(sequence):
                        break
                    start = len(sequence)
                if window > 0:
                    start = max(start, len(sequence) - (window - 1))
                left = _left(matrix, sequence[start:], min(epsilon, _NO_DIRECTION))
                diagonal = matrix.diagonal()
                eligible = free & (diagonal > 0) & (left >= epsilon * diagonal)
                score = torch.where(eligible, float(weight[user]) * scores + left.log(), -torch.inf)
                top = float(score.max())
                if top > -math.inf:
                    item = int((score >= top - (_TIE + _TIE_RELATIVE * abs(top))).nonzero()[0])
                    gain = float(score[item])
                    break
            if gain == -math.inf and exhausted == "stop":
                break
            n = int(result.count[user])
            result.indices[user, n], result.gains[user, n] = item, gain
            result.count[user] += 1
            result.log_det[user] += gain if gain > -math.inf else 0.0
            sequence.append(item)
            free[item] = False
    return tuple(result)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(3, 40, 6, generator=generator, dtype=torch.float64), dim=-1)
    similarity = torch.exp(rows @ rows.mT - 1)  # of full rank
    relevance = torch.randn(3, 40, generator=generator)
    weights = torch.tensor([0.0, 1.0, torch.inf], dtype=torch.float64)
    yield similarity, relevance, 9, weights, 0.0, None, None, None, 0, "relevance", 1e-10
    yield similarity[0].float(), relevance, 9, weights, 0.1, torch.tensor([40, 3, 0]), None, None, 0, "stop", 1e-5
    mask = torch.rand(3, 40, generator=generator) < 0.6
    shown = torch.tensor([[4, -1], [0, 1], [2, 2]])
    yield rows @ rows.mT, relevance, 9, weights, 0.0, None, mask, shown, 0, "restart", 1e-8
    yield similarity, relevance, 9, weights, 0.0, None, None, shown, 3, "relevance", 1e-10
    yield similarity[:0], relevance[:0], 2, weights[:0], 0.0, None, None, None, 0, "stop", 1e-10


_op = define(
    "dpp_greedy_kernel(Tensor similarity, Tensor relevance, int k, Tensor weight, float gamma, Tensor? lengths, "
    "Tensor? mask, Tensor? shown, int window, str exhausted, float epsilon) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_reference,
)


def _arguments(
    similarity, relevance, k, diversity, alpha, gamma, lengths, mask, shown, window, exhausted, epsilon
) -> tuple:
    op = "dpp_greedy_kernel"
    _check.tensor(op, "relevance", relevance, dtypes=_DTYPES, shape=["U", "N"])
    users, items = relevance.shape
    _check.tensor(op, "similarity", similarity, dtypes=_DTYPES, device=relevance.device)
    shape = [items, items] if similarity.dim() == 2 else [users, items, items]
    _check.tensor(op, "similarity", similarity, shape=shape)
    if not 0 <= gamma <= 1:
        raise ValueError(f"{op}: gamma must be in [0, 1], got {gamma}")
    epsilon = _EPSILON[similarity.dtype] if epsilon is None else epsilon
    weight, lengths, mask, shown, window = _options(
        op, relevance, k, diversity, alpha, lengths, mask, shown, items, window, exhausted, epsilon
    )
    return (
        similarity.detach(),
        relevance.detach(),
        int(k),
        weight,
        float(gamma),
        lengths,
        mask,
        shown,
        window,
        exhausted,
        float(epsilon),
    )


def dpp_greedy_kernel(
    similarity: Tensor,
    relevance: Tensor,
    k: int,
    *,
    diversity: float | Tensor | None = None,
    alpha: float | Tensor | None = None,
    gamma: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Tensor | None = None,
    window: int | None = None,
    exhausted: str = "relevance",
    epsilon: float | None = None,
) -> DPPResult:
    """Pick k items for each user so that they are relevant and unlike each other, by a matrix of similarities.

    As `dpp_greedy`, which is the one to use where similarities are dot products; this one is for what is not, such as a
    Gaussian of distances or the overlap of sets:

    .. math::
        j = \\arg\\max_i\\; 2 \\alpha r_i + \\log \\frac{\\det S'_{Y + i}}{\\det S'_Y}, \\quad
        S' = (1 - \\gamma) S + \\gamma I

    Parameters
    ----------
    similarity : Tensor [U, N, N], or [N, N] for all users, float32 or float64
        S, symmetric and positive semidefinite.
    relevance : Tensor [U, N], float32 or float64
        How good each item is, higher is better, on one scale for all users.
    k, diversity, alpha, gamma, lengths, mask, window, exhausted
        As in `dpp_greedy`.
    shown : Tensor [U, S], int32 or int64, -1 padded
        Candidates that the user has seen already.
    epsilon : float, in (0, 1]
        An item is spent when less than this share of its S'_ii is left. If it is not given: 1e-10 for float64, 1e-5
        for float32, whose similarities are no more exact than that allows.

    Returns
    -------
    DPPResult
        As of `dpp_greedy`.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes that do not fit, an option out of range; an entry among candidates that is NaN or infinite; a similarity
        that is not symmetric or not positive semidefinite. Of the matrix no more is read than is needed, and only that
        is checked: the diagonal, the rows of the picks, the first pick's column, all determinants of the picks with one
        item more.
    IndexError
        `lengths` or `shown` out of range.

    Notes
    -----
    Float64 throughout: what is left of a similarity known to u is known to about u over the smallest share of a pick.
    Ties as in `dpp_greedy`. Time O(N K^2 / 2), with a window O(N K window^2 / 2). Memory a thread: the N K numbers of
    Cholesky's rows (N min(K, window)), which `dpp_greedy` does without. Threaded over users. Inference only: no
    gradient flows. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point process to improve recommendation
    diversity", NeurIPS 2018.
    """
    arguments = _arguments(
        similarity, relevance, k, diversity, alpha, gamma, lengths, mask, shown, window, exhausted, epsilon
    )
    return DPPResult(*_op(*arguments))


def reference(
    similarity: Tensor,
    relevance: Tensor,
    k: int,
    *,
    diversity: float | Tensor | None = None,
    alpha: float | Tensor | None = None,
    gamma: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Tensor | None = None,
    window: int | None = None,
    exhausted: str = "relevance",
    epsilon: float | None = None,
) -> DPPResult:
    """The same in plain torch, in float64: the Schur complement of the picks, afresh for each pick."""
    arguments = _arguments(
        similarity, relevance, k, diversity, alpha, gamma, lengths, mask, shown, window, exhausted, epsilon
    )
    return DPPResult(*_reference(*arguments))


dpp_greedy_kernel.reference = reference
