"""Diverse lists for many users at once: sliding spectrum decomposition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recfast.ops import _check, _greedy
from recfast.ops._greedy import GreedyResult
from recfast.ops._library import define, unwatched

_MODES = ("exact", "paper")
# Equal to kSpent and kMostVolume of csrc/greedy/greedy.h.
_SPENT = 1e-10
_MOST_VOLUME = 1e100
# Times the greatest volume and the greatest norm it is a number still.
_MOST_GAMMA = 1e100


_kernel = _greedy.Kernel("ssd_greedy")


def _cpu(*arguments):
    *shared, gamma, mode, volume = arguments
    return _kernel(_greedy.Problem(*shared), gamma, mode == "paper", volume)


def _fake(features, relevance, k, *_):
    return _greedy.empty(relevance.shape[0], k, relevance)


def _left(rows: Tensor, directions: list[Tensor]) -> Tensor:
    """Rows [N, D] without their parts along orthonormal directions; zero where 1e-10 of the square is not left."""
    left = rows.clone()
    for direction in [*directions, *directions]:
        left -= torch.outer(left @ direction, direction)
    spent = left.square().sum(1) < _SPENT * rows.square().sum(1)
    return left.masked_fill(spent[:, None], 0.0)


def _directions(seen: Tensor, start: int, within: int, mode: str) -> list[Tensor]:
    """What the next pick is compared with: `within` (0: all) directions at most."""
    directions: list[Tensor] = []
    for row in seen[start:] if mode == "exact" else seen:
        # As published, the part along a direction that is about to leave the window is taken out all the same.
        left = _left(row[None], directions)[0]
        norm = left.norm()
        directions.append(left / norm if norm > 0 else left)
        if within > 0:
            directions = directions[-(within - 1) :] if within > 1 else []
    return directions


def _reference(*arguments):
    *shared, gamma, mode, volume = arguments
    window = shared[-2]
    latest: dict[int, tuple[Tensor, float]] = {}

    def score(facts: _greedy.Seen) -> tuple[Tensor, float]:
        grades, d = facts.relevance, facts.diversity
        norms = _left(facts.rows, _directions(facts.seen, facts.start, window, mode)).norm(dim=1)
        running = 1.0
        if volume and facts.picks:
            before, running = latest[facts.user]
            running = min(running * float(before[facts.picks[-1]]), _MOST_VOLUME)
        latest[facts.user] = norms, running
        weight = d * gamma * running
        terms = (1 - d) * float(grades.abs().max()) + weight * facts.largest
        return (1 - d) * grades + weight * norms, terms

    return tuple(_greedy.reference(_greedy.Problem(*shared), score))


def _samples() -> Iterator[tuple]:
    for arguments in _greedy.samples():
        for mode, volume in (("exact", False), ("paper", True)):
            yield *arguments, 0.8, mode, volume


_op = define(
    "ssd_greedy(Tensor features, Tensor relevance, int k, Tensor diversity, Tensor? candidates, Tensor? lengths, "
    "Tensor? mask, Tensor? shown, int window, bool exact, float gamma, str mode, bool volume) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_reference,
)


def _arguments(features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact, *options) -> tuple:
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    gamma, mode, volume = options
    if not 0 <= gamma <= _MOST_GAMMA:
        raise ValueError(f"ssd_greedy: gamma must be in [0, {_MOST_GAMMA:g}], got {gamma}")
    _check.choice("ssd_greedy", "mode", mode, _MODES)
    return *_greedy.problem("ssd_greedy", "features", *shared), float(gamma), mode, bool(volume)


def ssd_greedy(
    features: Tensor,
    relevance: Tensor,
    k: int,
    *,
    candidates: Tensor | None = None,
    diversity: float | Tensor = 0.5,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Tensor | None = None,
    window: int | None = None,
    gamma: float = 1.0,
    mode: str = "exact",
    volume: bool = False,
    exact: bool = True,
) -> GreedyResult:
    """Pick k items for each user, each good and partly outside the span of the picks before it.

    .. math:: j = \\arg\\max_i\\; (1 - d)\\, r_i + d\\, \\gamma \\sqrt{\\rho_i}

    with :math:`\\rho_i` the squared norm of what is left of :math:`f_i` when its projection on the span of what was
    shown or picked (within the window) is taken away. While there is nothing to compare with the most relevant item is
    picked.

    Parameters
    ----------
    features : Tensor [U, N, D], or [N, D] for all users; a table [T, D] with `candidates`
        float32, float64, bfloat16 or float16. Rows whose dot product says how alike two items are. Used as given:
        bring them to unit norm for cosines. (`rerank.SSD` does.)
    relevance : Tensor [U, N], float32 or float64
        How good each item is, higher is better. Used as given: bring it to one scale for all users, against which the
        dot products count. (`rerank.SSD` does.)
    k : int
        Length of the lists.
    candidates : Tensor [U, N], int32 or int64
        The rows of the table that are a user's items; -1: none.
    diversity : float or Tensor [U], in [0, 1]
        d, one for all or one a user. 0 is the order of relevance, 1 looks at the features alone (after the first pick).
    lengths : Tensor [U], int32 or int64
        The user's candidates are the first `lengths[u]`.
    mask : Tensor [U, N], bool
        False: not a candidate. What is no candidate is not read.
    shown : Tensor [U, S], int32 or int64, -1 padded
        What the user has seen already, in that order: it is not picked again, and the picks are unlike it too.
        Positions among the candidates (those that are no candidates are passed over); with `candidates`, rows of the
        table, candidates or not.
    window : int, at least 1
        Each pick is compared with the `window - 1` before it only; None: with all.
    gamma : float, in [0, 1e100]
        The weight of the norm against relevance, beside `diversity`: d = 1/2 is the published r + gamma sqrt(rho).
    mode : {"exact", "paper"}
        What the window forgets. "exact": rho is what the items in the window leave, no matter what was there before.
        "paper": the direction of each pick is what was left of it when it was picked, and stays so when items that it
        was compared with have left the window ("restore on evict", as in pyversity, whose window is one smaller).
        Without a window both are the same.
    volume : bool
        The running volume: the norm counts times the product of sqrt(rho) of all picks so far (at most 1e100), which
        for unit rows makes diversity fade along the list.
    exact : bool
        True: a float32 scan, then float64 among all that could win by the error bound of float32. The indices equal
        those of `ssd_greedy.reference` and depend on neither thread count, batch nor instruction set. False: trust
        float32.

    Returns
    -------
    GreedyResult
        `indices` int64 [U, K], `count` int64 [U], `gains` float64 [U, K], the scores of the picks.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes that do not fit, an option out of range, a candidate's NaN or infinity (named by position).
    IndexError
        `candidates`, `lengths` or `shown` out of range.

    Notes
    -----
    An item with less than 1e-10 of its squared norm left has rho = 0. Scores that differ by less than 1e-12 of (1 - d)
    max |r| + d gamma max |f| (times the volume) are equal, and the lowest index wins; relevance alone is
    compared as it is. The running volume was not checked against the paper's text; without a window it agrees with
    rsdiv. Numbers up to 1e200 (squared norms too).

    O(N D) work a pick at most (O(N D window) with a window), less where old bounds settle it. Memory a thread: N D +
    K D numbers. Inference only: no gradient flows. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Huang, Wang, Zhang and Xu, "Sliding spectrum decomposition for diversified recommendation", KDD 2021.
    """
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    arguments = _arguments(*shared, gamma, mode, volume)
    call = _cpu if unwatched(*arguments[:2]) else _op
    return GreedyResult(*call(*arguments))


def reference(
    features: Tensor,
    relevance: Tensor,
    k: int,
    *,
    candidates: Tensor | None = None,
    diversity: float | Tensor = 0.5,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Tensor | None = None,
    window: int | None = None,
    gamma: float = 1.0,
    mode: str = "exact",
    volume: bool = False,
    exact: bool = True,
) -> GreedyResult:
    """The same in plain torch, always in float64: every score afresh for each pick."""
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    return GreedyResult(*_reference(*_arguments(*shared, gamma, mode, volume)))


ssd_greedy.reference = reference
