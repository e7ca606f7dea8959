"""What all tokenisers share: checks, coding piece by piece, the report, and codes for new items."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from recfast.nn.collisions import Assignment, Method, _keys, group_sizes, shared

# Distances [rows, K] of a piece of the rows: 1 MiB of float32, which stays in the cache.
_CELLS = 1 << 18
# Squared distances of shorter vectors are finite; FAISS ends the process where one is not.
_LONGEST = 2.0**60


class Tokenizer(nn.Module):
    """Vectors of items turned into M codes of K values each: the face of every tokeniser.

    Parameters
    ----------
    dim : int
        Width D of the vectors.
    n_codebooks : int
        M.
    n_codes : int
        K, in [1, 65536].
    collisions : "digit", "sinkhorn" or "none"
        How `assign` tells items of equal codes apart; see `resolve_collisions`.

    Attributes
    ----------
    assignment : Assignment
        What `assign` has given out; `len(assignment)` items.

    Notes
    -----
    The centroids, and what `assign` has given out, are in `state_dict` as plain tensors.
    """

    def __init__(self, dim: int, n_codebooks: int, n_codes: int, collisions: Method):
        super().__init__()
        name = type(self).__name__
        if dim < 1 or n_codebooks < 1:
            raise ValueError(f"{name}: dim and the number of codebooks must be at least 1, got {dim} and {n_codebooks}")
        if not 1 <= n_codes <= 65536:
            raise ValueError(f"{name}: n_codes must be in [1, 65536], got {n_codes}")
        self.dim, self.n_codebooks, self.n_codes = dim, n_codebooks, n_codes
        self.assignment = Assignment(n_codebooks, n_codes, collisions)
        # Mean squared error of the rows of `fit`: what new items are compared with.
        self.register_buffer("fit_error", torch.full((), torch.nan, dtype=torch.float64))
        self._report: dict[str, Any] | None = None

    # What a tokeniser has to say. Codes are int64 here.

    def _options(self) -> dict[str, Any]:
        """The constructor's arguments beside those that all have, JSON-able."""
        return {}

    def _fitted(self) -> bool:
        raise NotImplementedError

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """The codes [n, M] of a piece of the rows."""
        raise NotImplementedError

    def _decodings(self, codes: torch.Tensor, mean: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the first code says, the first two, ..., all of them; `mean` [D] stands for what is not said at all.

        Each [n, D], and may be the same memory as the one before.
        """
        raise NotImplementedError

    def _last_distances(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """What the last code is chosen by, [n, K]; +inf for codes that may not be used."""
        raise NotImplementedError

    def _score_table(self, queries: torch.Tensor) -> torch.Tensor:
        """`score_table` of queries that are right."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name, JSON-able: `type(self)(**config)` with this `state_dict` is the same."""
        shared = {"dim": self.dim, "n_codes": self.n_codes, "collisions": self.assignment.method}
        return shared | self._options()

    def score_table(self, queries: torch.Tensor) -> torch.Tensor:
        """What each code adds to the inner product with each query: what `CodeIndex.search` takes.

        The sum over an item's codes is <q, decode(codes)>.

        Parameters
        ----------
        queries : Tensor [Q, D], float32

        Returns
        -------
        Tensor [Q, M, K], float32. Differentiable in `queries`.

        Raises
        ------
        RuntimeError
            Before `fit` or `load_state_dict`.
        ValueError
            Another shape; a tokeniser whose scores are no sums over codes (a decoder with hidden layers).
        """
        return self._score_table(self._queries(queries))

    @torch.no_grad()
    def encode(self, x: torch.Tensor | np.ndarray) -> torch.Tensor:
        """The codes of vectors.

        Parameters
        ----------
        x : Tensor or array [N, D], float32

        Returns
        -------
        Tensor [N, M], uint8 where K <= 256, else uint16; on the device of the tokeniser.

        Raises
        ------
        RuntimeError
            Before `fit` or `load_state_dict`.
        TypeError, ValueError
            Another dtype or shape, NaN or infinity, a vector of length 2**60 or more.
        """
        self._require_fitted("encode")
        x = self._vectors("encode", x).to(self._device)
        codes = torch.empty((len(x), self.n_codebooks), dtype=torch.int32, device=x.device)
        for rows in self._pieces(len(x)):
            codes[rows] = self._encode(x[rows]).int()
        return codes.to(torch.uint8 if self.n_codes <= 256 else torch.uint16)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor | np.ndarray) -> torch.Tensor:
        """The vectors that codes stand for.

        Parameters
        ----------
        codes : Tensor or array [N, M] of integers in [0, K)

        Returns
        -------
        Tensor [N, D], float32.

        Raises
        ------
        RuntimeError
            Before `fit` or `load_state_dict`.
        TypeError, ValueError, IndexError
            Something else than integers, another shape, a code out of range.
        """
        self._require_fitted("decode")
        place = f"{type(self).__name__}.decode"
        codes = torch.as_tensor(codes)
        if codes.dim() != 2 or codes.shape[1] != self.n_codebooks:
            raise ValueError(f"{place}: codes must have shape [N, {self.n_codebooks}], got {list(codes.shape)}")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise TypeError(f"{place}: codes must be integers, got {str(codes.dtype).removeprefix('torch.')}")
        codes = codes.long().to(self._device)
        wrong = (codes < 0) | (codes >= self.n_codes)
        if bool(wrong.any()):
            item, book = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"{place}: codes[{item}, {book}] = {int(codes[item, book])} is outside [0, {self.n_codes})"
            )
        return self._decode(codes)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return deque(self._decodings(codes, torch.zeros(self.dim, device=codes.device)), maxlen=1)[0]

    def assign(self, x: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Give items codes of their own, and remember them: at first all items, then new ones as they come.

        Codes given out before never change, whatever comes later. `fit` forgets them all.

        Parameters
        ----------
        x : Tensor or array [N, D], float32

        Returns
        -------
        Tensor [N, M], or [N, M + 1] uint16 with `collisions="digit"`: unique among all items given out, except for what
        `assignment.report()` counts as colliding.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As `encode`. Nothing is remembered then.
        """
        codes = self.encode(x).cpu()
        x, table = torch.as_tensor(x).detach(), codes.long()

        @torch.no_grad()
        def distances(rows: np.ndarray) -> torch.Tensor:
            return self._last_distances(x[rows].to(self._device), table[rows].to(self._device))

        return self.assignment.add(codes, distances)

    def report(self, x: torch.Tensor | np.ndarray | None = None) -> dict[str, Any]:
        """How good the codes are, for `x`, or for what `fit` was given.

        Returns
        -------
        dict, JSON-able
            items
            unique_codes
                Distinct rows of codes.
            colliding_items, largest_group
                Items that share their codes with another; the most items that share one row of codes.
            used_codes
                Codes in use, per codebook.
            perplexity
                exp of the entropy of the codes (natural logarithm), per codebook: from 1 to the number of codes in use,
                which it reaches where all of them are used alike.
            error_by_level
                The error after the first, the first two, ... codebooks: sum of squared errors over the sum of squared
                deviations from the mean of `x`, 0 for perfect and 1 for what the mean alone gives (None where all
                vectors are equal).
            reconstruction_error
                The last of them.
            drift
                Mean squared error of these vectors over that of the vectors of `fit`: about 1 for more of the same,
                more for items the codes were not made for (None where the codes of `fit` lose nothing, or their
                error is not known).
            assigned
                `assignment.report()`, once `assign` has been called.

        Raises
        ------
        RuntimeError
            Before `fit`; or without `x` after `load_state_dict`, which does not bring the vectors of `fit` along.
        """
        self._require_fitted("report")
        if x is not None:
            report, error = self._measure(self._vectors("report", x).cpu())
            before = float(self.fit_error)
            report["drift"] = error / before if before > 0 else None
        elif self._report is not None:
            report = dict(self._report)
        else:
            raise RuntimeError(
                f"{type(self).__name__}.report: x must be given, since these centroids were loaded, not fitted"
            )
        if len(self.assignment):
            report["assigned"] = self.assignment.report()
        return report

    @torch.no_grad()
    def _measure(self, x: torch.Tensor) -> tuple[dict[str, Any], float]:
        """The report, but for what concerns other vectors, and the mean squared error."""
        if len(x) == 0:
            raise ValueError(f"{type(self).__name__}.report: x must have at least one row, got none")
        codes = self.encode(x).cpu()
        table = codes.numpy().astype(np.int64)
        counts = [np.bincount(table[:, book], minlength=self.n_codes) for book in range(self.n_codebooks)]
        sizes = group_sizes(_keys(table))
        mean = x.double().mean(0)
        filler = mean.float().to(self._device)
        errors, spread = np.zeros(self.n_codebooks), 0.0
        for rows in self._pieces(len(x)):
            said = codes[rows].long().to(self._device)
            spread += float((x[rows] - mean).square_().sum())
            for level, found in enumerate(self._decodings(said, filler)):
                errors[level] += float((found.cpu() - x[rows]).square_().sum(dtype=torch.float64))
        relative = [float(error) / spread if spread > 0 else None for error in errors]
        report = {
            "items": len(x),
            "unique_codes": len(sizes),
            **shared(sizes),
            "used_codes": [int((count > 0).sum()) for count in counts],
            "perplexity": [_perplexity(count) for count in counts],
            "error_by_level": relative,
            "reconstruction_error": relative[-1],
        }
        return report, float(errors[-1]) / len(x)

    def _after_fit(self, x: torch.Tensor) -> None:
        """Measure what was fitted; earlier assignments are void."""
        self.assignment.clear()
        report, error = self._measure(x)
        self.fit_error.fill_(error)
        self._report = {**report, "drift": 1.0 if error > 0 else None}

    def _warn_of_collapse(self, items: int) -> None:
        """Say so where a level uses few of its codes, and items share theirs."""
        if self._report["colliding_items"] == 0:
            return
        for level, (perplexity, used) in enumerate(
            zip(self._report["perplexity"], self._report["used_codes"], strict=True)
        ):
            expected = min(self.n_codes, items)
            if used > 1 and perplexity < expected / 4:
                warnings.warn(
                    f"{type(self).__name__}.fit: the codes of level {level} have collapsed, perplexity {perplexity:.1f}"
                    f" of {expected}; items of equal codes will be many",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        # Saved before errors were remembered: drift is not known.
        state_dict.setdefault(prefix + "fit_error", torch.full_like(self.fit_error, torch.nan))
        self._report = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def _device(self) -> torch.device:
        return self.fit_error.device

    def _pieces(self, items: int) -> Iterator[slice]:
        rows = max(1, _CELLS // max(self.n_codes, self.dim))
        return (slice(start, start + rows) for start in range(0, items, rows))

    def _require_fitted(self, method: str) -> None:
        if not self._fitted():
            raise RuntimeError(f"{type(self).__name__}.{method}: the centroids must be fitted or loaded first")

    def _queries(self, queries: torch.Tensor) -> torch.Tensor:
        self._require_fitted("score_table")
        if queries.dim() != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}.score_table: queries must have shape [Q, {self.dim}], got {list(queries.shape)}"
            )
        return queries

    def _vectors(self, method: str, x: torch.Tensor | np.ndarray) -> torch.Tensor:
        place = f"{type(self).__name__}.{method}"
        if not isinstance(x, (torch.Tensor, np.ndarray)):
            raise TypeError(f"{place}: x must be a tensor or a numpy array, got {type(x).__name__}")
        x = torch.as_tensor(x).detach()
        if x.dtype != torch.float32:
            raise TypeError(f"{place}: x must be float32, got {str(x.dtype).removeprefix('torch.')}")
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"{place}: x must have shape [N, {self.dim}], got {list(x.shape)}")
        length = torch.linalg.vector_norm(x, dim=1)
        wrong = ~(length < _LONGEST)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            found = f"length {float(length[at]):.3g}" if bool(torch.isfinite(x[at]).all()) else "NaN or infinity"
            raise ValueError(f"{place}: x[{at}] must be finite and shorter than 2**60, got {found}")
        return x

    def _rows_to_fit(self, x: torch.Tensor | np.ndarray) -> torch.Tensor:
        x = self._vectors("fit", x).cpu()
        if len(x) == 0:
            raise ValueError(f"{type(self).__name__}.fit: x must have at least one row, got none")
        return x


def kmeans(
    x: np.ndarray, n_codes: int, seed: int, iterations: int, *, spherical: bool = False
) -> tuple[np.ndarray, int]:
    """Centroids [K, D] of the rows of `x`, by FAISS, and how many of them are in use.

    Where there are no more than K distinct rows, they are the centroids themselves, in lexicographic order; the places
    left over repeat the first. `spherical` keeps the centroids at length 1: the mean of scattered directions is short,
    near to all of them, and would draw everything to itself.
    """
    import faiss

    # Adding 0 makes -0 and 0 the same.
    x = np.ascontiguousarray(x, dtype=np.float32) + np.float32(0)
    distinct = np.unique(x, axis=0)
    if len(distinct) <= n_codes:
        return np.concatenate([distinct, np.repeat(distinct[:1], n_codes - len(distinct), axis=0)]), len(distinct)
    # FAISS's way with fewer than eight dimensions takes ten times as long as that with eight: zeros change nothing.
    width = x.shape[1]
    x = np.pad(x, ((0, 0), (0, max(8 - width, 0))))
    work = faiss.Kmeans(
        x.shape[1],
        n_codes,
        niter=iterations,
        seed=seed % 2**31,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, -(-len(x) // n_codes)),
    )
    work.train(x)
    return work.centroids[:, :width], n_codes


def sample(x: torch.Tensor, n_codes: int, seed: int) -> torch.Tensor:
    """At most 256 K rows, in their order: as many as k-means needs."""
    most = 256 * n_codes
    if len(x) <= most:
        return x
    return x[np.sort(np.random.default_rng(seed % 2**63).permutation(len(x))[:most])]


def squared_distances(x: torch.Tensor, centroids: torch.Tensor, n_used: torch.Tensor | int) -> torch.Tensor:
    """Of rows [n, D] to centroids [K, D], less |x|^2, the same for every centroid; +inf for those not in use."""
    norms = centroids.square().sum(1)
    norms = norms.masked_fill(torch.arange(len(centroids), device=x.device) >= n_used, torch.inf)
    return torch.addmm(norms, x, centroids.T, alpha=-2)


def _perplexity(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
