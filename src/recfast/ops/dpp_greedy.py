"""Diverse lists for many users at once: greedy MAP of a determinantal point process on a low-rank kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel, unwatched

_DTYPES = (torch.float32, torch.float64)
# As csrc/common/row_format.h numbers them.
_FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FEATURE_DTYPES = tuple(_FORMATS)
_POLICIES = ("relevance", "stop", "restart")
_threads = kernel("max_threads")
_run = kernel("dpp_greedy")
# Equal to kMaxWidth, kNoDirection, kTie and kTieRelative of csrc/dpp_greedy/dpp_greedy.h.
_MAX_WIDTH = 65536
_NO_DIRECTION = 1e-10
_TIE = 1e-12
_TIE_RELATIVE = 1e-15


class DPPResult(NamedTuple):
    """What `dpp_greedy` returns.

    Attributes
    ----------
    indices
        int64 [U, K]: positions in the user's candidates in the order of picking, -1 where there are no more.
    count
        int64 [U]: how many indices are not -1.
    gains
        float64 [U, K]: by how much each pick raised the log-determinant; -inf for a pick that the greedy rule did not
        make (spent features filled up by relevance) and for padding.
    log_det
        float64 [U]: the sum of the gains that are not -inf.
    """

    indices: Tensor
    count: Tensor
    gains: Tensor
    log_det: Tensor


def _empty(users: int, picks: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        like.new_empty((users, picks), dtype=torch.int64),
        like.new_empty((users,), dtype=torch.int64),
        like.new_empty((users, picks), dtype=torch.float64),
        like.new_empty((users,), dtype=torch.float64),
    )


def _cpu(
    features: Tensor,
    relevance: Tensor,
    k: int,
    weight: Tensor,
    gamma: float,
    candidates: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    shown: Tensor | None,
    window: int,
    exhausted: str,
    epsilon: float,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    users, items = relevance.shape
    width = features.shape[-1]
    features = features.contiguous()
    inputs = [
        None if value is None else value.contiguous() for value in (candidates, relevance, weight, lengths, mask, shown)
    ]
    outputs = _empty(users, k, relevance)
    shape = _C.DppShape(
        users,
        items,
        width,
        k,
        0 if shown is None else shown.shape[1],
        candidates is not None,
        window,
        gamma,
        epsilon,
        _POLICIES.index(exhausted),
        exact,
        _FORMATS[features.dtype],
        0 if features.dim() == 2 else items,
        relevance.dtype == torch.float64,
    )
    # A loop over two users may still number its threads up to the team's size.
    scratch = torch.empty(shape.scratch() * (_threads() if users > 1 else 1) + 64, dtype=torch.uint8)
    wrong_feature, wrong_shown, wrong_relevance = _run(
        shape,
        features.data_ptr(),
        *(0 if value is None else value.data_ptr() for value in inputs),
        *(value.data_ptr() for value in outputs),
        scratch.data_ptr(),
    )
    if wrong_relevance >= 0:
        user, item = divmod(wrong_relevance, items)
        value = float(relevance[user, item])
        raise ValueError(
            f"dpp_greedy: relevance[{user}, {item}] must be a finite number, also when times 2 alpha, got {value}"
        )
    if wrong_feature >= 0:
        user, item = divmod(wrong_feature, items)
        if candidates is not None:
            raise _wrong_row(features, (int(candidates[user, item]),))
        raise _wrong_row(features, (item,) if features.dim() == 2 else (user, item))
    if wrong_shown >= 0:
        raise _wrong_row(features, (int(shown.reshape(-1)[wrong_shown]),))
    return outputs


def _wrong_row(features: Tensor, row: tuple[int, ...]) -> ValueError:
    values = features[row].double()
    alone = ~torch.isfinite(values)
    # In a row of numbers whose squared norm is too large, the greatest.
    column = int(alone.nonzero()[0]) if bool(alone.any()) else int(values.abs().argmax())
    return ValueError(
        f"dpp_greedy: features[{', '.join(map(str, (*row, column)))}] must be a finite number with a finite squared "
        f"norm, got {float(values[column])}"
    )


def _fake(features, relevance, k, weight, gamma, candidates, lengths, mask, shown, window, exhausted, epsilon, exact):
    return _empty(relevance.shape[0], k, relevance)


def _residual_share(rows: Tensor, members: list[int], least: float) -> Tensor:
    """The squared norm that is left of unit rows [N, D] once the directions of `members` are taken out."""
    left = rows.clone()
    for member in members:
        direction = left[member].clone()
        squared = direction.dot(direction)
        if squared < least:
            continue
        direction /= squared.sqrt()
        for _ in range(2):
            left -= torch.outer(left @ direction, direction)
    return left.square().sum(1)


def _user_reference(
    features: Tensor,
    relevance: Tensor,
    k: int,
    weight: float,
    gamma: float,
    free: Tensor,
    shown: list[int],
    window: int,
    exhausted: str,
    epsilon: float,
) -> tuple[list[int], list[float]]:
    rows = features.double()
    if gamma > 0:
        # S = (1 - gamma) F F^T + gamma I is the Gram matrix of these longer rows.
        private = math.sqrt(gamma) * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        rows = torch.cat([math.sqrt(1 - gamma) * rows, private], dim=1)
    relevance = relevance.double()
    diagonal = rows.square().sum(1)
    # A subnormal number does not hold all digits.
    unit = rows / diagonal.sqrt().where(diagonal >= torch.finfo(rows.dtype).tiny, torch.ones_like(diagonal))[:, None]
    sequence, start = shown, 0
    free = free.clone()
    free[sequence] = False
    picks: list[int] = []
    gains: list[float] = []
    while len(picks) < k and bool(free.any()):
        by_relevance = int(torch.where(free, relevance, -torch.inf).argmax())
        if math.isinf(weight):
            item, gain = by_relevance, float(relevance[by_relevance])
        else:
            item, gain = by_relevance, -math.inf
            for attempt in ("as it is", "afresh"):
                if attempt == "afresh":
                    if exhausted != "restart" or start == len(sequence):
                        break
                    start = len(sequence)
                if window > 0:
                    start = max(start, len(sequence) - (window - 1))
                share = _residual_share(unit, sequence[start:], min(epsilon, _NO_DIRECTION))
                score = torch.where(
                    free & (share >= epsilon), weight * relevance + diagonal.log() + share.log(), -torch.inf
                )
                best = float(score.max())
                if best > -math.inf:
                    tied = score >= best - (_TIE + _TIE_RELATIVE * abs(best))
                    item = int(tied.nonzero()[0])
                    gain = float(score[item])
                    break
            if gain == -math.inf and exhausted == "stop":
                break
        picks.append(item)
        gains.append(gain)
        sequence.append(item)
        free[item] = False
    return picks, gains


def _reference(
    features, relevance, k, weight, gamma, candidates, lengths, mask, shown, window, exhausted, epsilon, exact
):
    users, items = relevance.shape
    result = DPPResult(*_empty(users, k, relevance))
    result.indices.fill_(-1)
    result.gains.fill_(-torch.inf)
    for user in range(users):
        free = torch.ones(items, dtype=torch.bool) if mask is None else mask[user].clone()
        if lengths is not None:
            free[int(lengths[user]) :] = False
        seen = [] if shown is None else [row for row in dict.fromkeys(shown[user].tolist()) if row >= 0]
        scores = relevance[user]
        if candidates is None:
            rows = features if features.dim() == 2 else features[user]
            seen = [item for item in seen if free[item]]
        else:
            free &= candidates[user] >= 0
            for row in seen:
                free &= candidates[user] != row
            # The rows that were shown stand after the candidates, and cannot be picked.
            rows = features[torch.cat([candidates[user].clamp(min=0), torch.tensor(seen, dtype=torch.int64)])]
            free = torch.cat([free, torch.zeros(len(seen), dtype=torch.bool)])
            scores = torch.cat([scores, torch.zeros(len(seen), dtype=scores.dtype)])
            seen = list(range(items, items + len(seen)))
        picks, gains = _user_reference(
            rows, scores, k, float(weight[user]), gamma, free, seen, window, exhausted, epsilon
        )
        result.count[user] = len(picks)
        result.indices[user, : len(picks)] = torch.tensor(picks, dtype=torch.int64)
        result.gains[user, : len(gains)] = torch.tensor(gains, dtype=torch.float64)
        result.log_det[user] = sum(gain for gain in gains if gain > -math.inf)
    return tuple(result)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def problem(users: int, items: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        rows = torch.randn(users, items, width, generator=generator, dtype=dtype)
        return torch.nn.functional.normalize(rows, dim=-1), torch.randn(users, items, generator=generator)

    weights = torch.tensor([0.0, 1.0, torch.inf], dtype=torch.float64)
    features, relevance = problem(3, 70, 5)
    yield features, relevance, 9, weights, 0.1, None, None, None, None, 0, "relevance", 1e-10, True
    lengths = torch.tensor([70, 3, 0])
    mask = torch.rand(3, 70, generator=generator) < 0.6
    yield features, relevance, 9, weights, 0.0, None, lengths, None, None, 0, "relevance", 1e-10, True
    yield features, relevance, 9, weights, 0.0, None, None, mask, None, 0, "stop", 0.1, True
    yield features[0], relevance, 9, weights, 0.0, None, lengths, mask, None, 0, "restart", 1e-10, True
    shown = torch.tensor([[4, -1], [0, 1], [2, 2]])
    rows = torch.randint(-1, 70, (3, 70), generator=generator)
    yield features[0].bfloat16(), relevance, 9, weights, 0.0, rows, None, None, shown, 3, "stop", 1e-10, True
    features, relevance = problem(3, 20, 6, torch.float64)
    yield features, relevance, 8, weights, 0.0, None, None, None, shown, 4, "relevance", 1e-10, True
    yield features[:0], relevance[:0], 2, weights[:0], 0.0, None, None, None, None, 0, "stop", 1e-10, True


_op = define(
    "dpp_greedy(Tensor features, Tensor relevance, int k, Tensor weight, float gamma, Tensor? candidates, "
    "Tensor? lengths, Tensor? mask, Tensor? shown, int window, str exhausted, float epsilon, bool exact) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_reference,
)


def _weights(
    op: str, diversity: float | Tensor | None, alpha: float | Tensor | None, users: int, device: torch.device
) -> Tensor:
    """2 alpha of each user, float64 [U]; infinity for relevance alone."""
    if diversity is not None and alpha is not None:
        raise ValueError(f"{op}: give diversity or alpha, not both")
    if diversity is None and alpha is None:
        diversity = 0.5
    name, given = ("alpha", alpha) if diversity is None else ("diversity", diversity)
    highest = math.inf if name == "alpha" else 1.0
    limit = "at least 0" if name == "alpha" else "in [0, 1]"
    if not isinstance(given, Tensor):
        try:
            given = float(given)
        except TypeError:
            given = torch.as_tensor(given)
    if isinstance(given, float):  # what tensors of one number would take ten times as long for
        if not 0 <= given <= highest:
            raise ValueError(f"{op}: {name} must be {limit}, got {given}")
        weight = 2 * given if name == "alpha" else (1 - given) / given if given > 0 else math.inf
        return torch.full((users,), weight, dtype=torch.float64, device=device)
    value = given.detach().to(device, torch.float64)
    if value.dim() > 1 or (value.dim() == 1 and len(value) != users):
        raise ValueError(f"{op}: {name} must be a number or have shape [{users}], got {list(value.shape)}")
    wrong = ~((value >= 0) & (value <= highest))
    if bool(wrong.any()):
        at = int(wrong.reshape(-1).nonzero()[0])
        place = f"{name}[{at}]" if value.dim() == 1 else name
        raise ValueError(f"{op}: {place} must be {limit}, got {float(value.reshape(-1)[at])}")
    # theta = 1 - diversity weights the relevance, 2 alpha = theta / (1 - theta); 1 / 0 is the infinity that is meant.
    weight = 2 * value if name == "alpha" else (1 - value) / value
    return weight.expand(users)


def _places(op: str, name: str, value: Tensor, rows: int) -> None:
    """Check that every id of [U, n] lies in [0, rows), or is -1."""
    if value.numel() == 0:
        return
    low, high = torch.aminmax(value)
    if int(low) < -1 or int(high) >= rows:
        user, place = ((value < -1) | (value >= rows)).nonzero()[0].tolist()
        raise _check.outside(op, name, f"{user}, {place}", int(value[user, place]), rows)


def _options(
    op: str,
    relevance: Tensor,
    k: int,
    diversity: float | Tensor | None,
    alpha: float | Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    shown: Tensor | None,
    shown_rows: int,
    window: int | None,
    exhausted: str,
    epsilon: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """Check what both forms of the op take: weight, lengths, mask, shown, window."""
    users, items = relevance.shape
    device = relevance.device
    _check.at_least(op, "k", k, 0)
    if not 0 < epsilon <= 1:
        raise ValueError(f"{op}: epsilon must be in (0, 1], got {epsilon}")
    if lengths is not None:
        _check.tensor(op, "lengths", lengths, dtypes=_check.INDEX_DTYPES, shape=[users], device=device)
        _check.indices(op, "lengths", lengths, items + 1)
        lengths = lengths.long()
    if mask is not None:
        _check.tensor(op, "mask", mask, dtypes=[torch.bool], shape=[users, items], device=device)
    if shown is not None:
        _check.tensor(op, "shown", shown, dtypes=_check.INDEX_DTYPES, shape=[users, "S"], device=device)
        _places(op, "shown", shown, shown_rows)
        shown = shown.long()
    if window is not None:
        _check.at_least(op, "window", window, 1)
    _check.choice(op, "exhausted", exhausted, _POLICIES)
    weight = _weights(op, diversity, alpha, users, device)
    return weight, lengths, mask, shown, 0 if window is None else int(window)


def _arguments(
    features,
    relevance,
    k,
    candidates,
    diversity,
    alpha,
    gamma,
    lengths,
    mask,
    shown,
    window,
    exhausted,
    epsilon,
    exact,
) -> tuple:
    op = "dpp_greedy"
    _check.tensor(op, "relevance", relevance, dtypes=_DTYPES, shape=["U", "N"])
    users, items = relevance.shape
    device = relevance.device
    _check.tensor(op, "features", features, dtypes=_FEATURE_DTYPES, device=device)
    rows = items
    if candidates is not None:
        _check.tensor(op, "features", features, shape=["T", "D"])
        rows = features.shape[0]
        candidates = _check.index(op, "candidates", candidates, shape=[users, items], device=device)
        _places(op, "candidates", candidates, rows)
    elif features.dim() == 2:
        _check.tensor(op, "features", features, shape=[items, "D"])
    else:
        _check.tensor(op, "features", features, shape=[users, items, "D"])
    if features.shape[-1] > _MAX_WIDTH:
        raise ValueError(f"{op}: features must have at most {_MAX_WIDTH} columns, got {features.shape[-1]}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"{op}: gamma must be in [0, 1], got {gamma}")
    weight, lengths, mask, shown, window = _options(
        op, relevance, k, diversity, alpha, lengths, mask, shown, rows, window, exhausted, epsilon
    )
    return (
        features.detach() if features.requires_grad else features,
        relevance.detach() if relevance.requires_grad else relevance,
        int(k),
        weight,
        float(gamma),
        candidates,
        lengths,
        mask,
        shown,
        window,
        exhausted,
        float(epsilon),
        bool(exact),
    )


def dpp_greedy(
    features: Tensor,
    relevance: Tensor,
    k: int,
    *,
    candidates: Tensor | None = None,
    diversity: float | Tensor | None = None,
    alpha: float | Tensor | None = None,
    gamma: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Tensor | None = None,
    window: int | None = None,
    exhausted: str = "relevance",
    epsilon: float = 1e-10,
    exact: bool = True,
) -> DPPResult:
    """Pick k items for each user so that they are relevant and unlike each other.

    The list grows by the item that raises the log-determinant of the kernel most:

    .. math::
        L = \\mathrm{Diag}(q)\\, S\\, \\mathrm{Diag}(q), \\quad q_i = e^{\\alpha r_i}, \\quad
        S = (1 - \\gamma) F F^\\top + \\gamma I

    .. math:: j = \\arg\\max_i\\; 2 \\alpha r_i + \\log \\frac{\\det S_{Y + i}}{\\det S_Y}

    Parameters
    ----------
    features : Tensor [U, N, D], [N, D] for all users, or a table [T, D]; float32, float64, bfloat16 or float16
        Rows whose dot product says how alike two items are. Used as given: unit norm is expected, for a longer row
        counts as a better item. (`rerank.DPP` normalises.)
    relevance : Tensor [U, N], float32 or float64
        How good each item is, higher is better, on one scale for all users. (`rerank.DPP` makes z-scores.)
    k : int
        Length of the lists.
    candidates : Tensor [U, N], int32 or int64, -1 for none
        Rows of `features`, then a table, that are the user's candidates. They are read where they lie: nothing of
        size [U, N, D] is made.
    diversity : float or Tensor [U], in [0, 1]
        The trade-off, one for all or one a user: with theta = 1 - diversity, `alpha = theta / (2 (1 - theta))`.
        0 is the order of relevance, 1 looks at the features alone. 0.5 if neither it nor `alpha` is given.
    alpha : float or Tensor [U], at least 0
        The weight of relevance itself, instead of `diversity`; infinity is allowed.
    gamma : float, in [0, 1]
        Regulariser. Above 0 the kernel has full rank: lists longer than D stay well defined, and duplicates may follow
        each other at a low gain.
    lengths : Tensor [U], int32 or int64
        The user's candidates are the first `lengths[u]`.
    mask : Tensor [U, N], bool
        False: not a candidate. What is no candidate is not read.
    shown : Tensor [U, S], int32 or int64, -1 padded
        Candidates that the user has seen already, in that order: they are not picked again, and the picks are diverse
        against them too. Gains are conditional on them. Those that are no candidates are passed over. With
        `candidates` these are rows of the table, which need not be among them; a candidate with that row is not picked.
    window : int, at least 1
        Each pick is diverse against the `window - 1` before it only; None: against all.
    exhausted : {"relevance", "stop", "restart"}
        When every item is spent (more picks than the rank, duplicates; see `epsilon`): go on by relevance (ties by
        lowest index), stop short, or forget the picks so far and begin afresh. A restart that finds nothing (zero rows)
        goes on by relevance.
    epsilon : float, in (0, 1]
        An item is spent when no more than this share of its own S_ii is left, that is of the squared norm of its row
        outside the span of the picks (gamma above 0 always leaves some).
    exact : bool
        True: a scan of upper bounds, then float64 among all items that could win by them. The indices equal
        those of `dpp_greedy.reference` and depend on neither thread count, batch nor instruction set. False: an item is
        passed over unless its bound is 5e-5 above the best gain so far: each gain is at most 5e-5 below the greatest.

    Returns
    -------
    DPPResult
        `indices` int64 [U, K], `count` int64 [U], `gains` float64 [U, K], `log_det` float64 [U]. Without a window and
        before anything is exhausted `log_det` is the log-determinant of the picks' kernel, and the gains never rise.
        For diversity 0, where that is infinite, gains are the relevance of the picks. N = 0 gives -1 and count 0.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes that do not fit, an option out of range, a candidate's NaN or infinity (named by position).
    IndexError
        `lengths` or `shown` out of range.

    Notes
    -----
    Scores that differ by less than 1e-12 + 1e-15 |score| are equal, and the lowest index wins. The scan works on codes
    of 8 bits, with a bound that is rigorous (csrc/dpp_greedy/dpp_greedy.h); every decision, gain and log-determinant
    is float64. O(N D) work a pick at most, less where stale bounds settle it. Rows of which one value is very much
    larger than all others have loose bounds, and more of them are looked at in float64. Memory a thread: N (D + 90)
    bytes and K D numbers, and K^2 more with gamma above 0. Threads share the users; one user alone, the candidates.
    D is at most 65536. Inference only: no gradient flows. Backend: CPU (scalar, AVX2, AVX-512 with VNNI).

    References
    ----------
    Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point process to improve recommendation
    diversity", NeurIPS 2018.
    """
    arguments = _arguments(
        features,
        relevance,
        k,
        candidates,
        diversity,
        alpha,
        gamma,
        lengths,
        mask,
        shown,
        window,
        exhausted,
        epsilon,
        exact,
    )
    call = _cpu if unwatched(features, relevance) else _op
    return DPPResult(*call(*arguments))


def reference(
    features: Tensor,
    relevance: Tensor,
    k: int,
    *,
    candidates: Tensor | None = None,
    diversity: float | Tensor | None = None,
    alpha: float | Tensor | None = None,
    gamma: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Tensor | None = None,
    window: int | None = None,
    exhausted: str = "relevance",
    epsilon: float = 1e-10,
    exact: bool = True,
) -> DPPResult:
    """The same in plain torch, always in float64: the residual of every row, by Gram-Schmidt, afresh for each pick."""
    arguments = _arguments(
        features,
        relevance,
        k,
        candidates,
        diversity,
        alpha,
        gamma,
        lengths,
        mask,
        shown,
        window,
        exhausted,
        epsilon,
        exact,
    )
    return DPPResult(*_reference(*arguments))


dpp_greedy.reference = reference
