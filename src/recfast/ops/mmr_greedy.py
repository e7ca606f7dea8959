"""Diverse lists for many users at once: maximal marginal relevance."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from recfast.ops import _greedy
from recfast.ops._greedy import GreedyResult
from recfast.ops._library import define, unwatched

_kernel = _greedy.Kernel("mmr_greedy")


def _cpu(*arguments):
    *shared, clip = arguments
    return _kernel(_greedy.Problem(*shared), clip)


def _fake(features, relevance, k, *_):
    return _greedy.empty(relevance.shape[0], k, relevance)


def _reference(*arguments):
    *shared, clip = arguments

    def score(facts: _greedy.Seen) -> tuple[Tensor, float]:
        grades, d = facts.relevance, facts.diversity
        terms = (1 - d) * float(grades.abs().max()) + d * facts.largest**2
        seen = facts.seen[facts.start :]
        if len(seen) == 0:
            return (1 - d) * grades, terms
        closest = (facts.rows @ seen.T).amax(1)
        if clip:
            closest = closest.clamp(0.0, 1.0)
        return (1 - d) * grades - d * closest, terms

    return tuple(_greedy.reference(_greedy.Problem(*shared), score))


def _samples() -> Iterator[tuple]:
    for arguments in _greedy.samples():
        yield *arguments, arguments[-2] > 0


_op = define(
    "mmr_greedy(Tensor features, Tensor relevance, int k, Tensor diversity, Tensor? candidates, Tensor? lengths, "
    "Tensor? mask, Tensor? shown, int window, bool exact, bool clip) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_reference,
)


def _arguments(features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact, clip) -> tuple:
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    return *_greedy.problem("mmr_greedy", "features", *shared), bool(clip)


def mmr_greedy(
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
    clip: bool = False,
    exact: bool = True,
) -> GreedyResult:
    """Pick k items for each user, each good and unlike the picked item that it resembles most.

    .. math:: j = \\arg\\max_i\\; (1 - d)\\, r_i - d \\max_{j \\in Y} f_i \\cdot f_j

    with Y what was shown or picked. While Y is empty the most relevant item is picked.

    Parameters
    ----------
    features : Tensor [U, N, D], or [N, D] for all users; a table [T, D] with `candidates`
        float32, float64, bfloat16 or float16. Rows whose dot product says how alike two items are. Used as given:
        bring them to unit norm for cosines. (`rerank.MMR` does.)
    relevance : Tensor [U, N], float32 or float64
        How good each item is, higher is better. Used as given: bring it to one scale for all users, against which the
        dot products count. (`rerank.MMR` does.)
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
    clip : bool
        Bring dot products to [0, 1] first, so that items that point away from all picks are not preferred to those at
        a right angle.
    exact : bool
        True: a float32 scan, then float64 among all that could win by the error bound of float32. The indices equal
        those of `mmr_greedy.reference` and depend on neither thread count, batch nor instruction set. False: trust
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
    Scores that differ by less than 1e-12 of (1 - d) max |r| + d max |f|^2 are equal, and the lowest index wins;
    relevance alone is compared as it is. Numbers up to 1e200 (squared norms too).

    O(N D) work a pick at most (O(N D window) with a window), less where old bounds settle it. Memory a thread: N D +
    K D numbers. Inference only: no gradient flows. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Carbonell and Goldstein, "The use of MMR, diversity-based reranking for reordering documents and producing
    summaries", SIGIR 1998.
    """
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    arguments = _arguments(*shared, clip)
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
    clip: bool = False,
    exact: bool = True,
) -> GreedyResult:
    """The same in plain torch, always in float64: every score afresh for each pick."""
    shared = (features, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    return GreedyResult(*_reference(*_arguments(*shared, clip)))


mmr_greedy.reference = reference
