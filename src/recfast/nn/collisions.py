"""Items that got the same codes: told apart by one more digit, by a balanced last level, or left as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

Method = Literal["digit", "sinkhorn", "none"]
Distances = Callable[[np.ndarray], Any]

METHODS = ("digit", "sinkhorn", "none")
# Cells [items, codes] of the assignment problems that are solved at once: 32 MiB of float64.
_CELLS = 1 << 22


class Resolution(NamedTuple):
    """What `resolve_collisions` makes of codes.

    Attributes
    ----------
    codes : Tensor [N, M], or [N, M + 1] uint16 with a digit
    n_codes : tuple of int
        How many codes each codebook needs; the digit's is the largest group of items that shared their codes.
    report : dict
        method; items; colliding_items: that shared their codes with another, before; largest_group: of those, before;
        moved: items whose codes were changed; left: items that still share theirs.
    """

    codes: torch.Tensor
    n_codes: tuple[int, ...]
    report: dict[str, Any]


def resolve_collisions(
    codes: torch.Tensor | np.ndarray,
    method: Method = "digit",
    *,
    n_codes: int = 256,
    distances: Distances | None = None,
    epsilon: float = 0.003,
    iterations: int = 50,
) -> Resolution:
    """Give items of equal codes different ones.

    Parameters
    ----------
    codes : Tensor or array [N, M] of integers in [0, K)
    method : "digit", "sinkhorn" or "none"
        "digit" appends a codebook that counts the items of equal codes, in their order: 0, 1, 2, ... (TIGER). Always
        unique; `n_codes[-1]` says how many values the digit takes.
        "sinkhorn" gives the colliding items, and only these, another last code: those of one prefix are assigned to
        the codes of the last level that no other item of the prefix has, each code once at most, at little total
        distance (LC-Rec's balanced assignment, by Sinkhorn iterations). Unique as long as no prefix has more than K
        items; the items above that keep their codes and are counted in `left`.
        "none" only counts.
    n_codes : int
        K.
    distances : callable, for "sinkhorn"
        `distances(rows)`: of the items `rows` (int64 array [n]) to each code of the last level, [n, K]; +inf for a code
        that must not be used.
    epsilon : float
        Entropy of the Sinkhorn assignment, on distances scaled to [-1, 1].
    iterations : int
        Of Sinkhorn.

    Returns
    -------
    Resolution. The same input gives the same codes.

    Raises
    ------
    TypeError, ValueError, IndexError
        An unknown method, a wrong dtype or shape, a code out of range, `distances` left out where needed.

    Notes
    -----
    The published rule asks of every code of the last level that equally much falls on it, and draws the colliding items
    of a batch again, for at most 20 rounds. Fewer items than codes collide as a rule, and then that rule sends items
    far away to fill every code. Here the codes left over are filled by a slack row instead, the items of a prefix are
    assigned together, and codes that others have are barred, so that one round is enough.

    References
    ----------
    Rajput et al., "Recommender Systems with Generative Retrieval" (TIGER), NeurIPS 2023. Zheng et al., "Adapting Large
    Language Models by Integrating Collaborative Semantics for Recommendation" (LC-Rec), ICDE 2024.

    Examples
    --------
    >>> codes = torch.tensor([[1, 2], [1, 2], [3, 0]], dtype=torch.uint8)
    >>> resolve_collisions(codes, "digit").codes.tolist()
    [[1, 2, 0], [1, 2, 1], [3, 0, 0]]
    """
    table = _as_codes("resolve_collisions", codes, None, n_codes)
    assignment = Assignment(table.shape[1], n_codes, method, epsilon=epsilon, iterations=iterations)
    before = group_sizes(_keys(table))
    resolved = assignment._resolve("resolve_collisions", table, distances)
    after = group_sizes(_keys(resolved))
    report = {
        "method": method,
        "items": len(table),
        **shared(before),
        "moved": int((resolved[:, : table.shape[1]] != table).any(1).sum()),
        "left": shared(after)["colliding_items"],
    }
    sizes = (n_codes,) * table.shape[1]
    if method == "digit":
        sizes += (int(resolved[:, -1].max(initial=-1)) + 1,)
    return Resolution(torch.from_numpy(resolved).to(assignment.dtype), sizes, report)


class Assignment(nn.Module):
    """The codes that items have been given, so that new ones get others and the old ones keep theirs.

    A part of every tokeniser (`assignment`), saved and loaded with it; also of use alone, for codes from elsewhere.

    Parameters
    ----------
    n_codebooks : int
        M.
    n_codes : int
        K.
    method : "digit", "sinkhorn" or "none"
        As in `resolve_collisions`. A new item's digit is the number of items that have its codes already.
    epsilon, iterations
        As in `resolve_collisions`.
    """

    def __init__(
        self,
        n_codebooks: int,
        n_codes: int = 256,
        method: Method = "digit",
        *,
        epsilon: float = 0.003,
        iterations: int = 50,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"collisions: method must be one of {', '.join(METHODS)}, got {method!r}")
        if not epsilon > 0 or iterations < 1:
            raise ValueError(
                f"collisions: epsilon must be positive and iterations at least 1, got {epsilon} and {iterations}"
            )
        self.n_codebooks, self.n_codes, self.method = n_codebooks, n_codes, method
        self.epsilon, self.iterations = epsilon, iterations
        width = n_codebooks + (method == "digit")
        self.register_buffer("codes", torch.empty((0, width), dtype=torch.int32))
        # The same without digits, in rising order; made when needed.
        self._sorted: np.ndarray | None = None

    def extra_repr(self) -> str:
        return f"{len(self)} items, method={self.method!r}"

    def __len__(self) -> int:
        """The number of items that have codes."""
        return len(self.codes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes that `add` gives: always uint16 with a digit, since digits may outgrow a byte at any time."""
        return torch.uint8 if self.method != "digit" and self.n_codes <= 256 else torch.uint16

    def clear(self) -> None:
        """Forget every item."""
        self.codes = self.codes[:0].clone()
        self._sorted = None

    def add(self, codes: torch.Tensor | np.ndarray, distances: Distances | None = None) -> torch.Tensor:
        """Give new items codes that nobody has, and remember them.

        Parameters
        ----------
        codes : Tensor or array [n, M] of integers in [0, K)
        distances : callable, for "sinkhorn"
            As in `resolve_collisions`.

        Returns
        -------
        Tensor [n, M] or [n, M + 1], uint8 or uint16 (see `dtype`).

        Raises
        ------
        TypeError, ValueError, IndexError
            As `resolve_collisions`; a digit above 65535. Nothing is remembered then.
        """
        table = _as_codes("Assignment.add", codes, self.n_codebooks, self.n_codes)
        resolved = self._resolve("Assignment.add", table, distances)
        keys = np.sort(_keys(resolved[:, : self.n_codebooks]))
        known = self._known()
        new = torch.from_numpy(resolved)
        self.codes = torch.cat([self.codes, new.to(self.codes.device)])
        self._sorted = np.insert(known, np.searchsorted(known, keys), keys)
        return new.to(self.dtype)

    def report(self) -> dict[str, Any]:
        """What has been given out.

        Returns
        -------
        dict
            method; items; unique_codes; colliding_items: that share their codes with another in spite of all;
            largest_group: of those (1 where all codes are unique); n_codes: how many codes each codebook needs.
        """
        table = self.codes.cpu().numpy()
        sizes = group_sizes(_keys(table))
        return {
            "method": self.method,
            "items": len(table),
            "unique_codes": len(sizes),
            **shared(sizes),
            "n_codes": [self.n_codes] * self.n_codebooks
            + ([int(table[:, -1].max(initial=-1)) + 1] if self.method == "digit" else []),
        }

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        # Saved before there was such a thing: nothing had been given out. The number of rows is the saved one's.
        saved = state_dict.setdefault(prefix + "codes", self.codes[:0])
        if len(saved) == 0:
            # Saved with another method, perhaps: no codes are as wide as one likes.
            saved = state_dict[prefix + "codes"] = self.codes[:0]
        if saved.dim() == 2 and saved.shape[1] == self.codes.shape[1]:
            self.codes = self.codes.new_empty(saved.shape)
        self._sorted = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _known(self) -> np.ndarray:
        if self._sorted is None:
            self._sorted = np.sort(_keys(self.codes[:, : self.n_codebooks].cpu().numpy()))
        return self._sorted

    def _taken(self, keys: np.ndarray) -> np.ndarray:
        """How many items have each of these codes already."""
        known = self._known()
        return np.searchsorted(known, keys, side="right") - np.searchsorted(known, keys, side="left")

    def _resolve(self, place: str, table: np.ndarray, distances: Distances | None) -> np.ndarray:
        """The codes for new items, int32, beside what is remembered, which stays as it is."""
        if self.method == "digit":
            keys = _keys(table)
            digits = self._taken(keys) + _ranks(keys)
            if digits.max(initial=0) > 65535:
                at = int(digits.argmax())
                raise ValueError(
                    f"{place}: codes[{at}] is shared by {digits[at] + 1} items, more than a digit can tell"
                )
            return np.column_stack([table, digits.astype(np.int32)])
        if self.method == "sinkhorn":
            if distances is None:
                raise ValueError(f"{place}: distances must be given for the method 'sinkhorn'")
            return self._balance(place, table, distances)
        return table

    def _balance(self, place: str, table: np.ndarray, distances: Distances) -> np.ndarray:
        keys = _keys(table)
        _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
        # Of new items, all that share their codes are up for another; of old ones none.
        moving = (counts[group] > 1) | (self._taken(keys) > 0)
        if not moving.any():
            return table
        _, prefix = np.unique(_keys(table[:, :-1]), return_inverse=True)
        rows = np.flatnonzero(moving)
        rows = rows[np.argsort(prefix[rows], kind="stable")]
        starts = np.flatnonzero(np.r_[True, np.diff(prefix[rows]) != 0])
        staying = np.flatnonzero(~moving)
        staying = staying[np.argsort(prefix[staying], kind="stable")]
        stays = prefix[staying]
        blocks = []
        for block in np.split(rows, starts[1:]):
            used = np.zeros(self.n_codes, dtype=bool)
            used[self._last_codes_taken(table[block[0], :-1])] = True
            first, end = (np.searchsorted(stays, prefix[block[0]], side) for side in ("left", "right"))
            used[table[staying[first:end], -1]] = True
            # Who came later goes without where there are too few codes. Left out here, since such items can be many:
            # all that have no features, say.
            block = block[: self.n_codes - int(used.sum())]
            if len(block):
                blocks.append((block, used))
        # Alike in size, so that little of a batch is padding.
        blocks.sort(key=lambda pair: len(pair[0]))
        resolved = table.copy()
        first = 0
        while first < len(blocks):
            end, rows = first + 1, len(blocks[first][0])
            while end < len(blocks) and self._cells(end + 1 - first, len(blocks[end][0]), rows) <= _CELLS:
                rows += len(blocks[end][0])
                end += 1
            for block, chosen in self._assign(place, blocks[first:end], distances):
                resolved[block[chosen >= 0], -1] = chosen[chosen >= 0]
            first = end
        return resolved

    def _cells(self, blocks: int, size: int, rows: int) -> int:
        """Numbers held at once for so many blocks, the largest of `size` items, `rows` items in all."""
        return max((rows + size) * self.n_codes, blocks * (size + 1) * min(size**2, self.n_codes))

    def _last_codes_taken(self, prefix: np.ndarray) -> np.ndarray:
        known = self._known()
        low, high = (_keys(np.r_[prefix, last].astype(np.int32)[None])[0] for last in (0, 65535))
        found = known[np.searchsorted(known, low, "left") : np.searchsorted(known, high, "right")]
        return np.ascontiguousarray(found).view(">u2").reshape(-1, self.n_codebooks)[:, -1].astype(np.int64)

    def _assign(self, place: str, blocks: list[tuple[np.ndarray, np.ndarray]], distances: Distances):
        """The last codes of the items of each block, distinct and unused; -1 where none is left."""
        rows = np.concatenate([block for block, _ in blocks])
        found = np.asarray(torch.as_tensor(distances(rows)).detach().cpu(), dtype=np.float64)
        if found.shape != (len(rows), self.n_codes):
            raise ValueError(
                f"{place}: distances must have shape [{len(rows)}, {self.n_codes}], got {list(found.shape)}"
            )
        problems, begin = [], 0
        for block, used in blocks:
            here = np.where(used, np.inf, found[begin : begin + len(block)])
            begin += len(block)
            # As above, where codes are forbidden by their distance.
            here = here[: int(np.isfinite(here[0]).sum())]
            # The best assignment of n items never sends one further than to its n-th nearest code.
            columns = np.unique(np.argsort(here, axis=1, kind="stable")[:, : len(here)])
            problems.append((here[:, columns], columns))
        size, width = (max(max(cost.shape[axis] for cost, _ in problems), 1) for axis in (0, 1))
        cost = np.full((len(blocks), size, width), np.inf)
        for index, (here, columns) in enumerate(problems):
            cost[index, : len(here), : len(columns)] = here
        weights = _sinkhorn(torch.from_numpy(cost), self.epsilon, self.iterations).numpy()
        chosen = np.full((len(blocks), size), -1, dtype=np.int32)
        places = np.arange(len(blocks))[:, None]
        waiting = np.isfinite(weights).any(2)
        while waiting.any():
            # Each item that waits names its best code; the one that wants it most gets it, of equals the first.
            weights[~waiting] = -np.inf
            best = weights.argmax(2)
            wish = np.take_along_axis(weights, best[..., None], 2)[..., 0]
            order = np.argsort(-wish, axis=1, kind="stable")
            named = np.take_along_axis(best, order, 1)
            hopeful = np.isfinite(np.take_along_axis(wish, order, 1))
            wanted = np.where(hopeful, named + places * width, -1)
            _, winners = np.unique(wanted, return_index=True)
            winners = winners[hopeful.ravel()[winners]]
            block, item = winners // size, order.ravel()[winners]
            chosen[block, item] = best[block, item]
            weights[block, :, best[block, item]] = -np.inf
            waiting[block, item] = False
            waiting &= np.isfinite(weights).any(2)
        for index, (block, _) in enumerate(blocks):
            mine = np.full(len(block), -1, dtype=np.int32)
            columns = problems[index][1]
            got = chosen[index, : len(block)]
            mine[: len(got)] = np.where(got >= 0, columns[got] if len(columns) else -1, -1)
            yield block, mine


def _sinkhorn(cost: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """The logarithm of the entropic assignment: rows sum to one, columns to one at most.

    cost : [G, B, W] float64, +inf where forbidden; a row that is forbidden altogether is no row. Each of G problems has
    as many codes allowed as rows, or more.
    """
    allowed = torch.isfinite(cost)
    low = cost.masked_fill(~allowed, torch.inf).amin((1, 2), keepdim=True)
    high = cost.masked_fill(~allowed, -torch.inf).amax((1, 2), keepdim=True)
    scale = (high - low).clamp(min=1e-12) / 2
    plan = (-((cost - low) / scale - 1) / epsilon).masked_fill(~allowed, -torch.inf)
    codes, items = allowed.any(1, keepdim=True), allowed.any(2, keepdim=True)
    rest = codes.sum(2, keepdim=True) - items.sum(1, keepdim=True)
    # Each column must be full: what the items leave of it belongs to one more row, which costs the same everywhere.
    slack = torch.zeros_like(plan[:, :1]).masked_fill(~codes, -torch.inf)
    plan = torch.cat([plan, slack], dim=1)
    mass = torch.cat([items.to(plan), rest.to(plan)], dim=1).log()

    def normalised(plan: torch.Tensor, dim: int, target: torch.Tensor | float) -> torch.Tensor:
        total = plan.logsumexp(dim, keepdim=True)
        return torch.where(torch.isfinite(total), plan - total, -torch.inf) + target

    for _ in range(iterations):
        plan = normalised(plan, 1, 0.0)
        plan = normalised(plan, 2, mass)
    return plan[:, :-1]


def group_sizes(keys: np.ndarray) -> np.ndarray:
    """How many items have each code that occurs."""
    return np.unique(keys, return_counts=True)[1]


def shared(sizes: np.ndarray) -> dict[str, int]:
    """The figures of collisions, from the sizes of groups of equal codes."""
    return {"colliding_items": int(sizes[sizes > 1].sum()), "largest_group": int(sizes.max(initial=0))}


def _keys(table: np.ndarray) -> np.ndarray:
    """One comparable key a row, in the order of the rows' codes."""
    if table.shape[1] == 0:
        return np.zeros(len(table), dtype="S1")
    return np.ascontiguousarray(table, dtype=">u2").view(f"S{2 * table.shape[1]}")[:, 0]


def _ranks(keys: np.ndarray) -> np.ndarray:
    """The place of each item among those of its key, in their order."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    start = np.r_[True, ordered[1:] != ordered[:-1]]
    place = np.arange(len(keys))
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = place - np.maximum.accumulate(np.where(start, place, 0)) if len(keys) else place
    return ranks


def _as_codes(place: str, codes: torch.Tensor | np.ndarray, width: int | None, n_codes: int) -> np.ndarray:
    if not isinstance(codes, (torch.Tensor, np.ndarray)):
        raise TypeError(f"{place}: codes must be a tensor or a numpy array, got {type(codes).__name__}")
    table = codes.detach().cpu().numpy() if isinstance(codes, torch.Tensor) else codes
    if table.dtype.kind not in "iu":
        raise TypeError(f"{place}: codes must be integers, got {table.dtype}")
    if table.ndim != 2 or table.shape[1] == 0 or (width is not None and table.shape[1] != width):
        raise ValueError(f"{place}: codes must have shape [N, {width or 'M'}], got {list(table.shape)}")
    if not 1 <= n_codes <= 65536:
        raise ValueError(f"{place}: n_codes must be in [1, 65536], got {n_codes}")
    wrong = (table < 0) | (table >= n_codes)
    if wrong.any():
        item, book = map(int, np.argwhere(wrong)[0])
        raise IndexError(f"{place}: codes[{item}, {book}] = {table[item, book]} is outside [0, {n_codes})")
    return table.astype(np.int32)
