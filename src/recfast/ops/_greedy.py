"""What the greedy re-rankers by a score share: their arguments, candidates, ties, and the loop of the references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recfast import _C
from recfast.errors import OutOfRange
from recfast.ops import _check
from recfast.ops._library import kernel
from recfast.ops.formats import FORMATS

ROW_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCORE_DTYPES = (torch.float32, torch.float64)
# Equal to kTie and kLargest of csrc/greedy/greedy.h.
TIE = 1e-12
LARGEST = 1e200
_threads = kernel("max_threads")
_FORMATS = {form.dtype: form.code for form in FORMATS.values() if form.dtype is not None}


class GreedyResult(NamedTuple):
    """What `mmr_greedy`, `msd_greedy`, `ssd_greedy` and `xquad_greedy` return.

    Attributes
    ----------
    indices
        int64 [U, K]: positions in the user's candidates in the order of picking, -1 where there are no more.
    count
        int64 [U]: how many indices are not -1.
    gains
        float64 [U, K]: the score that each pick had when it was picked; -inf for padding.
    """

    indices: Tensor
    count: Tensor
    gains: Tensor


class Problem(NamedTuple):
    """Checked arguments that all four ops have."""

    features: Tensor
    relevance: Tensor
    k: int
    diversity: Tensor  # float64 [U]
    candidates: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    shown: Tensor | None
    window: int  # 0: none
    exact: bool


def empty(users: int, picks: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((users, picks), dtype=torch.int64),
        like.new_empty((users,), dtype=torch.int64),
        like.new_empty((users, picks), dtype=torch.float64),
    )


def problem(
    op: str,
    name: str,
    features: Tensor,
    relevance: Tensor,
    k: int,
    candidates: Tensor | None,
    diversity: float | Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    shown: Tensor | None,
    window: int | None,
    exact: bool,
) -> Problem:
    """Check what all four ops take; `name` is what the op calls its rows."""
    _check.tensor(op, "relevance", relevance, dtypes=SCORE_DTYPES, shape=["U", "N"])
    users, items = relevance.shape
    device = relevance.device
    _check.tensor(op, name, features, dtypes=ROW_DTYPES, device=device)
    if candidates is not None:
        _check.tensor(op, name, features, shape=["T", "D"])
        candidates = _check.index(op, "candidates", candidates, shape=(users, items), device=device)
        low, high = (0, 0) if candidates.numel() == 0 else torch.aminmax(candidates)
        if int(low) < -1 or (candidates.numel() > 0 and int(high) >= len(features)):
            wrong = ((candidates < -1) | (candidates >= len(features))).nonzero()[0].tolist()
            raise outside(op, "candidates", wrong, int(candidates[tuple(wrong)]), len(features))
    elif features.dim() == 2:
        _check.tensor(op, name, features, shape=[items, "D"])
    else:
        _check.tensor(op, name, features, shape=[users, items, "D"])
    _check.at_least(op, "k", k, 0)
    if lengths is not None:
        lengths = _check.index(op, "lengths", lengths, shape=(users,), device=device)
        _check.indices(op, "lengths", lengths, items + 1)
    if mask is not None:
        _check.tensor(op, "mask", mask, dtypes=[torch.bool], shape=(users, items), device=device)
    if shown is not None:
        shown = _check.index(op, "shown", shown, shape=[users, "S"], device=device)
        rows = items if candidates is None else len(features)
        wrong = (shown < -1) | (shown >= rows)
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise outside(op, "shown", at, int(shown[tuple(at)]), rows)
    if window is not None:
        _check.at_least(op, "window", window, 1)
    return Problem(
        features.detach() if features.requires_grad else features,
        relevance.detach() if relevance.requires_grad else relevance,
        int(k),
        trade_off(op, diversity, users, device),
        candidates,
        lengths,
        mask,
        shown,
        0 if window is None else int(window),
        bool(exact),
    )


class Kernel:
    """The compiled form of an op.

    Parameters
    ----------
    op
        Its name.
    name, expected
        What its rows are called, and what they must be.
    """

    def __init__(self, op: str, name: str = "features", expected: str | None = None) -> None:
        self._op, self._name = op, name
        self._expected = expected or f"finite, its row's square at most {LARGEST:g}"
        self._run, self._scratch = kernel(op), getattr(_C, f"{op}_scratch")

    def __call__(self, problem: Problem, *options: object) -> tuple[Tensor, Tensor, Tensor]:
        features, relevance, k, diversity, *indices, window, exact = problem
        users, items = relevance.shape
        width = features.shape[-1]
        shown = problem.shown
        features = features.contiguous()
        inputs = [features, relevance.double().contiguous(), diversity.contiguous()]
        inputs += [None if value is None else value.contiguous() for value in indices]
        outputs = empty(users, k, relevance)
        arguments = (
            users,
            items,
            width,
            k,
            0 if shown is None else shown.shape[1],
            window,
            exact,
            _FORMATS[features.dtype],
            0 if features.dim() == 2 else items * width * features.element_size(),
            *(0 if value is None else value.data_ptr() for value in inputs),
            *(value.data_ptr() for value in outputs),
        )
        # A loop over two users may still number its threads up to the team's size.
        scratch = torch.empty(self._scratch(arguments, options) * max(1, _threads()) + 64, dtype=torch.uint8)
        item, seen, grade = self._run(arguments, options, scratch.data_ptr())
        if item >= 0:
            raise self._wrong_row(problem, problem.candidates, item, items)
        if seen >= 0:
            raise self._wrong_row(problem, shown, seen, shown.shape[1])
        if grade >= 0:
            raise not_allowed(self._op, "relevance", relevance, grade, f"finite and at most {LARGEST:g}")
        return outputs

    def _wrong_row(self, problem: Problem, ids: Tensor | None, position: int, each: int) -> ValueError:
        features = problem.features
        if ids is not None:
            row = int(ids.reshape(-1)[position])
        else:
            row = position if features.dim() == 3 else position % each
        values = features.reshape(-1, features.shape[-1])[row].double()
        # The first that is not allowed by itself; in a row whose square is too large, its greatest.
        alone = ~torch.isfinite(values)
        if self._name == "topics":
            alone |= (values < 0) | (values > 1)
        column = int(alone.nonzero()[0]) if bool(alone.any()) else int(values.abs().argmax())
        return not_allowed(self._op, self._name, features, row * len(values) + column, self._expected)


def outside(op: str, name: str, place: list[int], value: int, rows: int) -> OutOfRange:
    return _check.outside(op, name, ", ".join(map(str, place)), value, rows)


def trade_off(op: str, diversity: float | Tensor, users: int, device: torch.device) -> Tensor:
    """`diversity` as float64 [U]."""
    if not isinstance(diversity, Tensor):
        if not 0 <= diversity <= 1:
            raise ValueError(f"{op}: diversity must be in [0, 1], got {diversity}")
        return torch.full((users,), float(diversity), dtype=torch.float64, device=device)
    value = diversity.detach().to(device=device, dtype=torch.float64)
    if value.dim() > 1 or (value.dim() == 1 and len(value) != users):
        raise ValueError(f"{op}: diversity must be a number or have shape [{users}], got {list(value.shape)}")
    wrong = ~((value >= 0) & (value <= 1))
    if bool(wrong.any()):
        at = int(wrong.reshape(-1).nonzero()[0])
        place = f"diversity[{at}]" if value.dim() == 1 else "diversity"
        raise ValueError(f"{op}: {place} must be in [0, 1], got {float(value.reshape(-1)[at])}")
    return value.expand(users)


def not_allowed(op: str, name: str, value: Tensor, position: int, expected: str) -> ValueError:
    """The error for the element at a flat position."""
    place, rest = [], position
    for size in reversed(value.shape):
        place.insert(0, rest % size)
        rest //= size
    where = ", ".join(map(str, place))
    return ValueError(f"{op}: {name}[{where}] must be {expected}, got {float(value[tuple(place)])}")


# The references.
class Seen(NamedTuple):
    """What a reference scores the items of one user by."""

    rows: Tensor  # [N, D] float64; rows of what is no candidate are zero
    seen: Tensor  # [n, D]: shown items and picks, the oldest first
    start: int  # those from here on are within the window
    picks: list[int]
    relevance: Tensor  # [N]
    diversity: float
    largest: float  # the greatest norm of candidates and shown rows
    user: int


def reference(
    problem: Problem,
    score: Callable[[Seen], tuple[Tensor, float]],
    *,
    first_by_relevance: bool = True,
) -> GreedyResult:
    """The greedy loop in plain torch: every score afresh for each pick, in float64.

    `score` gives the scores [N] and the greatest magnitude of their terms; scores closer than 1e-12 of that are equal.
    """
    features, relevance, k, diversity, candidates, lengths, mask, shown, window, _ = problem
    users, items = relevance.shape
    result = GreedyResult(*empty(users, k, relevance))
    result.indices.fill_(-1)
    result.count.zero_()
    result.gains.fill_(-torch.inf)
    for user in range(users):
        free = torch.ones(items, dtype=torch.bool) if mask is None else mask[user].clone()
        if lengths is not None:
            free[int(lengths[user]) :] = False
        if candidates is not None:
            free &= candidates[user] >= 0
            rows = features[candidates[user].clamp(min=0)] if len(features) else features.new_zeros(items, 0)
        else:
            rows = features if features.dim() == 2 else features[user]
        rows = rows.double().masked_fill(~free[:, None], 0.0)
        grades = relevance[user].double().masked_fill(~free, 0.0)
        seen: list[Tensor] = []
        picks: list[int] = []
        for row in [] if shown is None else dict.fromkeys(shown[user].tolist()):
            if row < 0:
                continue
            if candidates is not None:
                seen.append(features[row].double())
                free &= candidates[user] != row
            elif bool(free[row]):
                seen.append(rows[row])
                free[row] = False
        norms = torch.stack([*rows, *seen]).norm(dim=1) if items + len(seen) else rows.new_zeros(1)
        d = float(diversity[user])
        for n in range(min(k, int(free.sum()))):
            start = max(0, len(seen) - (window - 1)) if window > 0 else 0
            facts = Seen(
                rows,
                torch.stack(seen) if seen else rows.new_zeros(0, rows.shape[1]),
                start,
                picks,
                grades,
                d,
                float(norms.max()),
                user,
            )
            scores, terms = score(facts)
            by_relevance = d == 0 or (first_by_relevance and start == len(seen))
            wanted = (grades if by_relevance else scores).masked_fill(~free, -torch.inf)
            best = float(wanted.max())
            tie = 0.0 if by_relevance else TIE * terms
            item = int((wanted >= best - tie).nonzero()[0])
            result.indices[user, n] = item
            result.gains[user, n] = scores[item]
            result.count[user] = n + 1
            picks.append(item)
            seen.append(rows[item])
            free[item] = False
    return result


def samples() -> Iterator[tuple]:
    """Arguments of the ops up to `exact`, for rows in [0, 1] that serve as features and as topics."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        value = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(value, dim=-1).to(dtype), torch.randn(3, shape[-2], generator=generator)

    weights = torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64)
    features, relevance = rows(3, 70, 5)
    lengths = torch.tensor([70, 3, 0])
    mask = torch.rand(3, 70, generator=generator) < 0.6
    shown = torch.tensor([[4, -1], [0, 1], [2, 2]])
    yield features, relevance, 9, weights, None, None, None, None, 0, True
    yield features, relevance.double(), 9, weights, None, lengths, mask, None, 0, True
    yield features[0], relevance, 9, weights, None, lengths, mask, shown, 3, True
    table = rows(40, 6, dtype=torch.float64)[0]
    candidates = torch.randint(-1, 40, (3, 70), generator=generator)
    yield table, relevance, 8, weights, candidates, None, None, shown, 4, True
    yield table.bfloat16(), relevance, 8, weights, candidates, None, None, None, 0, True
    yield features[:0], relevance[:0], 2, weights[:0], None, None, None, None, 0, True
