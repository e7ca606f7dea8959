"""Diverse lists for many users at once: xQuAD, coverage of explicit topics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recfast.ops import _check, _greedy
from recfast.ops._greedy import GreedyResult
from recfast.ops._library import define, unwatched

_kernel = _greedy.Kernel("xquad_greedy", "topics", "in [0, 1]")


def _cpu(*arguments):
    *shared, preferences = arguments
    preferences = preferences.contiguous()
    return _kernel(_greedy.Problem(*shared), preferences.data_ptr())


def _fake(features, relevance, k, *_):
    return _greedy.empty(relevance.shape[0], k, relevance)


def _reference(*arguments):
    *shared, preferences = arguments

    def score(facts: _greedy.Seen) -> tuple[Tensor, float]:
        grades, d = facts.relevance, facts.diversity
        wanted = preferences[facts.user] * (1 - facts.seen[facts.start :]).prod(0)
        terms = (1 - d) * float(grades.abs().max()) + d * float(preferences[facts.user].sum())
        return (1 - d) * grades + d * (facts.rows @ wanted), terms

    return tuple(_greedy.reference(_greedy.Problem(*shared), score, first_by_relevance=False))


def _samples() -> Iterator[tuple]:
    for arguments in _greedy.samples():
        users, topics = len(arguments[1]), arguments[0].shape[-1]
        yield *arguments, torch.arange(1.0, users * topics + 1, dtype=torch.float64).reshape(users, topics) / 20


_op = define(
    "xquad_greedy(Tensor topics, Tensor relevance, int k, Tensor diversity, Tensor? candidates, Tensor? lengths, "
    "Tensor? mask, Tensor? shown, int window, bool exact, Tensor preferences) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_reference,
)


def _arguments(topics, relevance, k, candidates, diversity, lengths, mask, shown, window, exact, preferences) -> tuple:
    shared = (topics, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    problem = _greedy.problem("xquad_greedy", "topics", *shared)
    shape = (problem.relevance.shape[0], problem.features.shape[-1])
    if preferences is None:
        preferences = torch.full(shape, 1 / max(shape[1], 1), dtype=torch.float64, device=topics.device)
    else:
        _check.tensor("xquad_greedy", "preferences", preferences, dtypes=_greedy.SCORE_DTYPES, device=topics.device)
        _check.tensor("xquad_greedy", "preferences", preferences, shape=shape)
        preferences = preferences.detach().double()
        wrong = ~((preferences >= 0) & (preferences <= _greedy.LARGEST))
        if bool(wrong.any()):
            at = int(wrong.reshape(-1).nonzero()[0])
            raise _greedy.not_allowed("xquad_greedy", "preferences", preferences, at, "finite and at least 0")
    return *problem, preferences


def xquad_greedy(
    topics: Tensor,
    relevance: Tensor,
    k: int,
    *,
    preferences: Tensor | None = None,
    candidates: Tensor | None = None,
    diversity: float | Tensor = 0.5,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Tensor | None = None,
    window: int | None = None,
    exact: bool = True,
) -> GreedyResult:
    """Pick k items for each user, each good and serving topics that the picks before it do not serve.

    .. math::
        j = \\arg\\max_i\\; (1 - d)\\, r_i + d \\sum_z P(z \\mid u)\\, P(i \\mid z) \\prod_{j \\in Y} (1 - P(j \\mid z))

    with Y what was shown or picked.

    Parameters
    ----------
    topics : Tensor [U, N, Z], or [N, Z] for all users; a table [T, Z] with `candidates`
        float32, float64, bfloat16 or float16, in [0, 1]. P(i | z), how far each item serves each topic.
    relevance : Tensor [U, N], float32 or float64
        How good each item is, higher is better. Used as given: bring it to one scale for all users, against which the
        sum counts; the paper has P(i | u). (`rerank.XQuAD` scales it.)
    k : int
        Length of the lists.
    preferences : Tensor [U, Z], float32 or float64, at least 0
        P(z | u), how much the user asks for topic z; None: 1 / Z each. They need not add up to 1.
    candidates : Tensor [U, N], int32 or int64
        The rows of the table that are a user's items; -1: none.
    diversity : float or Tensor [U], in [0, 1]
        d, one for all or one a user. 0 is the order of relevance, 1 looks at the topics alone.
    lengths : Tensor [U], int32 or int64
        The user's candidates are the first `lengths[u]`.
    mask : Tensor [U, N], bool
        False: not a candidate. What is no candidate is not read.
    shown : Tensor [U, S], int32 or int64, -1 padded
        What the user has seen already, in that order: it is not picked again, and its topics count as served.
        Positions among the candidates (those that are no candidates are passed over); with `candidates`, rows of the
        table, candidates or not.
    window : int, at least 1
        Topics are served by the `window - 1` before the pick only; None: by all.
    exact : bool
        True: a float32 scan, then float64 among all that could win by the error bound of float32. The indices equal
        those of `xquad_greedy.reference` and depend on neither thread count, batch nor instruction set. False: trust
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
        Shapes that do not fit, an option out of range, a candidate's relevance that is not finite, a candidate's topic
        outside [0, 1] (named by position).
    IndexError
        `candidates`, `lengths` or `shown` out of range.

    Notes
    -----
    Scores that differ by less than 1e-12 of (1 - d) max |r| + d sum P(z | u) are equal, and the lowest index wins;
    relevance alone is compared as it is. Numbers up to 1e200.

    O(N Z) work a pick at most, with a window or without, less where old bounds settle it. Memory a thread: N Z + K Z
    numbers. Inference only: no gradient flows. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Santos, Macdonald and Ounis, "Exploiting query reformulations for web search result diversification", WWW 2010.
    """
    shared = (topics, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    arguments = _arguments(*shared, preferences)
    call = _cpu if unwatched(*arguments[:2]) else _op
    return GreedyResult(*call(*arguments))


def reference(
    topics: Tensor,
    relevance: Tensor,
    k: int,
    *,
    preferences: Tensor | None = None,
    candidates: Tensor | None = None,
    diversity: float | Tensor = 0.5,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    shown: Tensor | None = None,
    window: int | None = None,
    exact: bool = True,
) -> GreedyResult:
    """The same in plain torch, always in float64: every score afresh for each pick."""
    shared = (topics, relevance, k, candidates, diversity, lengths, mask, shown, window, exact)
    return GreedyResult(*_reference(*_arguments(*shared, preferences)))


xquad_greedy.reference = reference
