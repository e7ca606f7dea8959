"""Diverse lists for many users at once: the greatest sum of relevance and distances."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from recfast.ops import _greedy
from recfast.ops._greedy import GreedyResult
from recfast.ops._library import define, unwatched

_kernel = _greedy.Kernel("msd_greedy")


def _cpu(*arguments):
    *shared, mean = arguments
    return _kernel(_greedy.Problem(*shared), mean)


def _fake(features, relevance, k, *_):
    return _greedy.empty(relevance.shape[0], k, relevance)


def _reference(*arguments):
    *shared, mean = arguments

    def score(facts: _greedy.Seen) -> tuple[Tensor, float]:
        grades, d = facts.relevance, facts.diversity
        seen = facts.seen[facts.start :]
        scale = 1 / max(len(seen), 1) if mean else 1.0
        terms = (1 - d) * float(grades.abs().max()) + d * scale * len(seen) * (1 + facts.largest**2)
        return (1 - d) * grades + d * scale * (1 - facts.rows @ seen.T).sum(1), terms

    return tuple(_greedy.reference(_greedy.Problem(*shared), score))


def _samples() -> Iterator[tuple]:
    for arguments in _greedy.samples():
        yield *arguments, arguments[-2] > 0


_op = define(
    "msd_greedy(Tensor features, Tensor relevance, int k, Tensor diversity, Tensor? candidates, Tensor? lengths, "
    "Tensor? mask, Tensor? shown, int window, bool exact, bool mean) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_reference,
)


def _arguments(features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact, mean) -> tuple:
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    return *_greedy.problem("msd_greedy", "features", *shared), bool(mean)


def msd_greedy(
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
    mean: bool = False,
    exact: bool = True,
) -> GreedyResult:
    """Pick k items for each user, each good and far from the picked items together.

    .. math:: j = \\arg\\max_i\\; (1 - d)\\, r_i + d \\sum_{j \\in Y} (1 - f_i \\cdot f_j)

    with Y what was shown or picked. While Y is empty the most relevant item is picked.

    Parameters
    ----------
    features : Tensor [U, N, D], or [N, D] for all users; a table [T, D] with `candidates`
        float32, float64, bfloat16 or float16. Rows whose dot product says how alike two items are. Used as given:
        bring them to unit norm for cosines. (`rerank.MSD` does.)
    relevance : Tensor [U, N], float32 or float64
        How good each item is, higher is better. Used as given: bring it to one scale for all users, against which the
        dot products count. (`rerank.MSD` does.)
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
    mean : bool
        Divide the sum by the number of items in it, so that diversity counts as much at the end of a list as at its
        beginning. Without it the sum, which is the published form (and pyversity's), outgrows relevance as the list
        does.
    exact : bool
        True: a float32 scan, then float64 among all that could win by the error bound of float32. The indices equal
        those of `msd_greedy.reference` and depend on neither thread count, batch nor instruction set. False: trust
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
    Scores that differ by less than 1e-12 of (1 - d) max |r| + d n (1 + max |f|^2) are equal, with n items in
    the sum (1 with `mean`), and the lowest index wins; relevance alone is compared as it is. Numbers up to 1e200
    (squared norms too).

    O(N D) work a pick at most, with a window or without, less where old bounds settle it. Memory a thread: N D +
    K D numbers. Inference only: no gradient flows. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Borodin, Lee and Ye, "Max-sum diversification, monotone submodular functions and dynamic updates", PODS 2012.
    (Their greedy rule halves the relevance: diversity d' there is d = 2 d' / (1 + d') here.)
    """
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    arguments = _arguments(*shared, mean)
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
    mean: bool = False,
    exact: bool = True,
) -> GreedyResult:
    """The same in plain torch, always in float64: every score afresh for each pick."""
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    return GreedyResult(*_reference(*_arguments(*shared, mean)))


msd_greedy.reference = reference
