"""What the re-rankers share: one user or many, arrays or tensors, checks, scaling, the trade-off of each user."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recfast.errors import InputError
from recfast.ops._greedy import LARGEST

# Float64 feature values held at once.
_CELLS = 8_000_000


class Reranker:
    """Reorders each user's candidates so that the list is good and varied.

    Parameters
    ----------
    diversity : float, in [0, 1]
        d: 0 keeps the order of relevance, 1 looks at the features alone (but for the first item of those that add
        scores up, which is the most relevant). What is between differs by kind: `DPP` and `KDPP` weigh relevance, as
        z-scores, by (1 - d) / d against the log-determinant; `MMR`, `MSD`, `SSD` and `XQuAD` add (1 - d) times
        relevance, in [0, 1], and d times what the item brings to the list. The same d does not cost the same: measure.
    personal : None, bool or float in [0, 1]
        How far a user's `propensity` for diversity counts (None or False: not at all, True: 1).
        `diversity_u = diversity * (1 - personal + personal * propensity_u)`: a higher propensity never means less
        diversity, and `diversity` is what a user of propensity 1 gets.
    normalize : bool
        Bring features to unit norm (in float64: unit rows of float32 differ in norm, which would decide ties). A zero
        row stays zero.
    standardize : bool
        Bring each user's relevance to one scale, so that `diversity` means the same for all.
    """

    def __init__(
        self,
        diversity: float = 0.3,
        *,
        personal: float | bool | None = None,
        normalize: bool = True,
        standardize: bool = True,
    ) -> None:
        self._name = type(self).__name__
        self.diversity = self._unit("diversity", diversity)
        self.personal = self._unit("personal", 0.0 if personal is None else float(personal))
        self.normalize = bool(normalize)
        self.standardize = bool(standardize)

    def _unit(self, name: str, value: float) -> float:
        if not 0 <= value <= 1:
            raise InputError(f"{self._name}: {name} must be in [0, 1], got {value}")
        return float(value)

    def config(self) -> dict[str, Any]:
        """The constructor's options, fit for JSON: `type(r)(**r.config())` is the same re-ranker."""
        return {
            "diversity": self.diversity,
            "personal": self.personal,
            "normalize": self.normalize,
            "standardize": self.standardize,
        }

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(f'{key}={value!r}' for key, value in self.config().items())})"

    def rank(
        self,
        features: Any,
        relevance: Any,
        k: int,
        *,
        candidates: Any = None,
        propensity: Any = None,
        lengths: Any = None,
        mask: Any = None,
        shown: Any = None,
    ) -> Any:
        """Choose and order k candidates of each user.

        Parameters
        ----------
        features : [U, N, D]; [N, D] for all users, or with one user's relevance; [T, D] with `candidates`
            Array or tensor of any float type.
        relevance : [U, N], or [N] for one user
            The ranker's scores, higher is better.
        k : int
            Length of the lists.
        candidates : int [U, N], or [N] for one user
            Rows of the table `features`, -1 where a user has fewer.
        propensity : [U] in [0, 1]
            Each user's appetite for diversity, such as `entropy_propensity`; needed when `personal` is above 0. A
            number will do for one user.
        lengths : int [U]
            The user's candidates are the first `lengths[u]`.
        mask : bool [U, N]
            False: not a candidate. What is no candidate may hold anything.
        shown : int [U, S], or [S] for one user, -1 padded
            What the user has seen already, oldest first: it is not picked, and the list is diverse against it too.
            Positions in the candidates; with `candidates` rows of the table, which need not be among them.

        Returns
        -------
        int64 [U, k], or [k] for one user
            Positions in the candidates, best first, -1 where there are too few. An array if relevance was one.

        Raises
        ------
        InputError
            Shapes that do not fit; a candidate's NaN or infinity; a propensity that is missing, out of range, or not
            wanted.
        """
        return self._rank(features, relevance, k, candidates, propensity, lengths, mask, shown)

    def _rank(
        self,
        features: Any,
        relevance: Any,
        k: int,
        candidates: Any,
        propensity: Any,
        lengths: Any,
        mask: Any,
        shown: Any,
        **by_user: Any,
    ) -> Any:
        """What `rank` does; of each tensor [U, ...] in `by_user`, `_pick` gets its users' part."""
        is_tensor = isinstance(relevance, Tensor)
        device = relevance.device if is_tensor else None
        scores = self._tensor(relevance).double()
        rows = self._tensor(features, halves=True)
        alone = scores.dim() == 1
        if alone:
            scores = scores[None]
            lengths = None if lengths is None else torch.as_tensor(lengths).reshape(1)
            mask, candidates, shown = (
                None if value is None else torch.as_tensor(value)[None] for value in (mask, candidates, shown)
            )
        if scores.dim() != 2:
            raise InputError(f"{self._name}.rank: relevance must have shape [U, N] or [N], got {list(scores.shape)}")
        users, items = scores.shape
        if candidates is not None:
            if rows.dim() != 2:
                raise InputError(
                    f"{self._name}.rank: features must be a table [T, D] with candidates, got {list(rows.shape)}"
                )
            candidates = self._indices("candidates", candidates, [users, items], len(rows))
        elif rows.dim() not in (2, 3) or list(rows.shape[:-1]) not in ([items], [users, items]):
            wanted = f"[{users}, {items}, D] or [{items}, D]"
            raise InputError(f"{self._name}.rank: features must have shape {wanted}, got {list(rows.shape)}")
        if k < 0:
            raise InputError(f"{self._name}.rank: k must be at least 0, got {k}")
        if shown is not None:
            shown = self._indices("shown", shown, [users, "S"], items if candidates is None else len(rows))
        valid = self._valid(users, items, lengths, mask)
        if candidates is not None:
            valid &= candidates >= 0
        wrong = valid & ~torch.isfinite(scores)
        if bool(wrong.any()):
            user, item = wrong.nonzero()[0].tolist()
            raise InputError(
                f"{self._name}.rank: relevance[{user}, {item}] = {float(scores[user, item])}, expected a finite number"
            )
        diversity = self._per_user(users, propensity)
        scores = scores.masked_fill(~valid, 0.0)
        if self.standardize:
            # Next to an outlier, such as the least float32, scaled scores run together: order alone needs none of it.
            as_given = (diversity[:, None] == 0) & (scores.abs() <= LARGEST).all(1, keepdim=True)
            scores = torch.where(as_given, scores, self._scaled(scores, valid))
        out = torch.full((users, k), -1, dtype=torch.int64)
        shared = self._rows(rows, valid.any(0), 0) if rows.dim() == 2 and candidates is None else None
        step = max(1, _CELLS // max(items * rows.shape[-1], 1))
        for first in range(0, users, step):
            part = slice(first, first + step)
            some = None if candidates is None else candidates[part].masked_fill(~valid[part], -1)
            met = None if shown is None else shown[part]
            if some is not None:
                block, some, met = self._gathered(rows, some, met)
            else:
                block = shared if shared is not None else self._rows(rows[part], valid[part], first)
            options = {"mask": valid[part], "candidates": some, "shown": met}
            own = {name: value[part] for name, value in by_user.items()}
            out[part] = self._pick(block, scores[part], k, diversity[part], options, **own)
        out = out[0] if alone else out
        return out.to(device) if is_tensor else out.numpy()

    def _tensor(self, value: Any, halves: bool = False) -> Tensor:
        if isinstance(value, Tensor):
            tensor = value.detach().cpu()
            if halves and tensor.dtype in (torch.bfloat16, torch.float16):
                return tensor  # a table need not be widened where a few of its rows are read
        else:
            array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
            # torch can not know that nothing is written, and warns about an array that may not be.
            tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        # Relevance may be counts, features may be genre flags.
        return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.double()

    def _indices(self, name: str, value: Any, shape: list, rows: int) -> Tensor:
        """Ids in [-1, rows) as int64; a size of the shape may be a letter."""
        given = torch.as_tensor(value).detach().cpu()
        fits = given.dim() == len(shape) and all(
            isinstance(want, str) or want == got for want, got in zip(shape, given.shape, strict=True)
        )
        if not fits or given.dtype.is_floating_point or given.dtype == torch.bool:
            kind = str(given.dtype).removeprefix("torch.")
            wanted = f"[{', '.join(map(str, shape))}]"
            raise InputError(f"{self._name}.rank: {name} must be int {wanted}, got {kind} {list(given.shape)}")
        wrong = (given < -1) | (given >= rows)
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            where = ", ".join(map(str, place))
            raise InputError(f"{self._name}.rank: {name}[{where}] = {int(given[tuple(place)])} is outside [-1, {rows})")
        return given.long()

    def _gathered(
        self, table: Tensor, candidates: Tensor, shown: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows that are named, each once, and the ids as rows of that smaller table."""
        used = torch.zeros(len(table), dtype=torch.bool)
        for ids in (candidates, shown):
            if ids is not None:
                used[ids[ids >= 0]] = True
        kept = used.nonzero()[:, 0]
        rows = table[kept]
        self._refuse(rows, None, kept)
        place = torch.full((len(table) + 1,), -1, dtype=torch.int64)  # the last entry is what -1 leads to
        place[kept] = torch.arange(len(kept))
        return self._brought(rows), place[candidates], None if shown is None else place[shown]

    def _valid(self, users: int, items: int, lengths: Any, mask: Any) -> Tensor:
        valid = torch.ones(users, items, dtype=torch.bool)
        if mask is not None:
            given = torch.as_tensor(mask).cpu()
            if given.dtype != torch.bool or list(given.shape) != [users, items]:
                kind = str(given.dtype).removeprefix("torch.")
                raise InputError(
                    f"{self._name}.rank: mask must be bool [{users}, {items}], got {kind} {list(given.shape)}"
                )
            valid &= given
        if lengths is not None:
            given = torch.as_tensor(lengths).cpu()
            if list(given.shape) != [users]:
                raise InputError(f"{self._name}.rank: lengths must have shape [{users}], got {list(given.shape)}")
            wrong = (given < 0) | (given > items)
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                raise InputError(f"{self._name}.rank: lengths[{at}] = {int(given[at])} is outside [0, {items}]")
            valid &= torch.arange(items) < given[:, None]
        return valid

    def _per_user(self, users: int, propensity: Any) -> Tensor:
        diversity = torch.full((users,), self.diversity, dtype=torch.float64)
        if self.personal == 0:
            if propensity is not None:
                raise InputError(f"{self._name}.rank: propensity has no effect with personal = 0, leave it out")
            return diversity
        if propensity is None:
            raise InputError(f"{self._name}.rank: personal = {self.personal:g} needs propensity, a value for each user")
        value = torch.as_tensor(propensity, dtype=torch.float64).detach().cpu().reshape(-1)
        if len(value) != users:
            raise InputError(f"{self._name}.rank: propensity must have shape [{users}], got [{len(value)}]")
        wrong = ~((value >= 0) & (value <= 1))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise InputError(f"{self._name}.rank: propensity[{at}] must be in [0, 1], got {float(value[at])}")
        return diversity * (1 - self.personal + self.personal * value)

    def _rows(self, rows: Tensor, valid: Tensor, first: int) -> Tensor:
        self._refuse(rows, valid, first)
        return self._brought(rows)

    def _refuse(self, rows: Tensor, valid: Tensor | None, first: int | Tensor) -> None:
        """Name the first value that may not be; `first` is the first row's place in the argument, or all rows' are."""
        unfit = self._unfit(rows)
        wrong = unfit.any(-1) if valid is None else valid & unfit.any(-1)
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            column = int(unfit[tuple(place)].nonzero()[0])
            value = float(rows[(*place, column)])
            place[0] = int(first[place[0]]) if isinstance(first, Tensor) else place[0] + first
            where = ", ".join(map(str, [*place, column]))
            raise InputError(f"{self._name}.rank: features[{where}] {self._expected(value)}")

    def _unfit(self, rows: Tensor) -> Tensor:
        return ~torch.isfinite(rows)

    def _expected(self, value: float) -> str:
        return "is not finite, expected a number"

    def _brought(self, rows: Tensor) -> Tensor:
        if rows.dtype in (torch.bfloat16, torch.float16):
            rows = rows.float()
        return self._unit_rows(rows.double()) if self.normalize else rows.contiguous()

    def _unit_rows(self, wide: Tensor) -> Tensor:
        norm = wide.norm(dim=-1, keepdim=True)
        return wide / norm.where(norm > 0, torch.ones_like(norm))

    def _scaled(self, scores: Tensor, valid: Tensor) -> Tensor:
        """z-scores over the user's candidates; zeros where all are equal."""
        count = valid.sum(1, keepdim=True).clamp(min=1)
        centred = (scores - scores.sum(1, keepdim=True) / count).masked_fill(~valid, 0.0)
        spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
        # Equal scores leave rounding noise, which must not be blown up to a spread of 1.
        flat = spread <= 1e-12 * scores.abs().amax(1, keepdim=True) if scores.shape[1] else spread == 0
        return torch.where(flat, torch.zeros_like(centred), centred / spread.where(~flat, torch.ones_like(spread)))

    def _pick(
        self, features: Tensor, relevance: Tensor, k: int, diversity: Tensor, options: dict[str, Any], **by_user: Tensor
    ) -> Tensor:
        """Positions [U, k], -1 padded; `options` are the op's `mask`, `candidates` and `shown`."""
        raise NotImplementedError


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an array, a tensor or nested lists."""
    return tuple(value.shape) if hasattr(value, "shape") else np.shape(value)


def window_of(name: str, window: int | None) -> int | None:
    """The option `window`, checked."""
    if window is not None and window < 1:
        raise InputError(f"{name}: window must be at least 1, got {window}")
    return None if window is None else int(window)


class Additive(Reranker):
    """What adds relevance, brought to [0, 1] within a user's candidates, to something of that range.

    Parameters
    ----------
    diversity, personal, normalize, standardize
        As for every re-ranker.
    window : int
        Each item is compared with the `window - 1` before it only, which suits lists that are scrolled through; None:
        with all.
    exact : bool
        The lists of float64 arithmetic, whatever the machine; False trusts float32.
    """

    _op: Callable[..., Any]

    def __init__(
        self,
        diversity: float = 0.3,
        *,
        window: int | None = None,
        exact: bool = True,
        personal: float | bool | None = None,
        normalize: bool = True,
        standardize: bool = True,
    ) -> None:
        super().__init__(diversity, personal=personal, normalize=normalize, standardize=standardize)
        self.window = window_of(self._name, window)
        self.exact = bool(exact)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "window": self.window, "exact": self.exact, **self._own()}

    def _own(self) -> dict[str, Any]:
        """The options of the op that this re-ranker alone has, by the names that both give them."""
        return {}

    def _scaled(self, scores: Tensor, valid: Tensor) -> Tensor:
        if scores.shape[1] == 0:
            return scores
        low = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        span = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True) - low
        scaled = (scores - low) / span.where(span > 0, torch.ones_like(span))
        return scaled.masked_fill(~valid, 0.0)

    def _pick(
        self, features: Tensor, relevance: Tensor, k: int, diversity: Tensor, options: dict[str, Any], **by_user: Tensor
    ) -> Tensor:
        wanted = {"diversity": diversity, "window": self.window, "exact": self.exact}
        return self._op(features, relevance, k, **wanted, **self._own(), **options, **by_user).indices


def history_entropy(history: Any, genres: int | None = None) -> np.ndarray:
    r"""Entropy of each user's history over genres, in nats: :math:`H_u = -\sum_g P(g | u) \ln P(g | u)`.

    Parameters
    ----------
    history : [U, G], or a pair (values, offsets)
        How often each genre occurs in each history; or, jagged, the genre ids of each history, in [0, genres).
    genres : int
        The number of genres, needed for a jagged history.

    Returns
    -------
    float64 [U]; NaN for an empty history.

    Raises
    ------
    InputError
        A count that is negative or not finite; a genre id out of range.
    """
    counts = _genre_counts(history, genres)
    total = counts.sum(1, keepdims=True)
    share = counts / np.where(total > 0, total, 1.0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1) + 0.0
    return np.where(total[:, 0] > 0, entropy, np.nan)


def _genre_counts(history: Any, genres: int | None) -> np.ndarray:
    if isinstance(history, tuple):
        values, offsets = (np.asarray(part, dtype=np.int64) for part in history)
        if genres is None:
            raise InputError("entropy_propensity: a jagged history needs genres, their number")
        wrong = (values < 0) | (values >= genres)
        if wrong.any():
            at = int(wrong.argmax())
            raise InputError(f"entropy_propensity: history.values[{at}] = {values[at]} is outside [0, {genres})")
        users = len(offsets) - 1
        owner = np.arange(users).repeat(np.diff(offsets))
        return np.bincount(owner * genres + values, minlength=users * genres).reshape(users, genres).astype(np.float64)
    if isinstance(history, Tensor):
        history = history.detach().cpu().numpy()
    counts = np.asarray(history, dtype=np.float64)
    if counts.ndim != 2:
        raise InputError(f"entropy_propensity: history must have shape [U, G], got {list(counts.shape)}")
    wrong = ~((counts >= 0) & np.isfinite(counts))
    if wrong.any():
        user, genre = np.argwhere(wrong)[0]
        raise InputError(
            f"entropy_propensity: history[{user}, {genre}] must be at least 0 and finite, got {counts[user, genre]}"
        )
    return counts


def entropy_propensity(
    history: Any,
    dampening: float = 0.0,
    *,
    genres: int | None = None,
    bounds: tuple[float, float] | None = None,
    unknown: float = 1.0,
) -> np.ndarray:
    r"""How wide each user's taste is, from 0 (one genre only) to 1 (all genres alike).

    .. math:: f_u = \frac{H_u - H_{\min} + l}{H_{\max} - H_{\min} + l}

    Parameters
    ----------
    history : [U, G], or a pair (values, offsets)
        As for `history_entropy`, which is :math:`H_u`.
    dampening : float, at least 0
        :math:`l`: the larger, the less users differ; all are 1 in the limit.
    genres : int
        The number of genres, needed for a jagged history.
    bounds : (H_min, H_max)
        The least and the greatest entropy of the users the system knows (the paper's choice), from `history_entropy`
        of all of them; beyond them f_u is clipped. By default (0, ln G), so that a user's value does not depend on who
        else is in the batch.
    unknown : float, in [0, 1]
        The value of an empty history. 1 makes no personal change to the trade-off.

    Returns
    -------
    float64 [U]

    References
    ----------
    Wang et al., "Personalized re-ranking for improving diversity in live recommender systems", arXiv 2004.06390, 2020.
    """
    counts = _genre_counts(history, genres)
    if not dampening >= 0:
        raise InputError(f"entropy_propensity: dampening must be at least 0, got {dampening}")
    if not 0 <= unknown <= 1:
        raise InputError(f"entropy_propensity: unknown must be in [0, 1], got {unknown}")
    low, high = (0.0, math.log(max(counts.shape[1], 1))) if bounds is None else map(float, bounds)
    if not low <= high:
        raise InputError(f"entropy_propensity: bounds must be (least, greatest), got ({low}, {high})")
    entropy = history_entropy(counts)
    span = high - low + dampening
    # All users alike: nothing to personalise by.
    value = np.clip((entropy - low + dampening) / span, 0.0, 1.0) if span > 0 else np.ones(len(entropy))
    return np.where(np.isnan(entropy), unknown, value)
