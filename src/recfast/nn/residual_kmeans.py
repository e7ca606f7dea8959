"""Codes for vectors: k-means, and k-means again of what the level before left over."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from recfast.nn._tokenizer import Tokenizer, kmeans, sample, squared_distances
from recfast.nn.collisions import Method

# A residual of this share of its vector is rounding, and counts as nothing.
_RESOLUTION = 1e-6


class ResidualKMeans(Tokenizer):
    """Replace a vector by the nearest of K centroids, then what is left by the nearest of K others, and so on.

    .. math::
        r_{i,0} = x_i, \\qquad
        c_{i,m} = \\arg\\min_j \\lVert r_{i,m} / s_{i,m} - \\mu_{m,j} \\rVert^2, \\qquad
        r_{i,m+1} = r_{i,m} - v_{m,c_{i,m}}, \\qquad
        \\hat x_i = \\sum_m v_{m,c_{i,m}}

    With `normalize`, s is the length of the residual at every level but the first, and mu has length 1 there: residuals
    are told apart by their direction (spherical k-means), so that the many items near their centroid, whose residuals
    are short, do not all fall to one code. Otherwise s is 1. A common factor for a whole level would change nothing,
    since k-means does not depend on the unit.
    v is the mean of the residuals that have the code, in the vectors' own unit: the best it can be for these codes,
    so that no level makes the squared error of `fit` larger, and scores stay sums over codes (`score_table`).

    Ties go to the lowest code. The state holds mu (`centroids`) and v (`values`).

    Parameters
    ----------
    dim : int
        Width of the vectors.
    n_levels : int
        M.
    n_codes : int
        K, in [1, 65536].
    normalize : bool
        True for codes that tell items apart, as generative retrieval needs; False for the least error, as
        `CodeIndex` wants.
    collisions : "digit", "sinkhorn" or "none"
        How `assign` tells items of equal codes apart; see `resolve_collisions`.

    References
    ----------
    Rajput et al., "Recommender Systems with Generative Retrieval" (TIGER), NeurIPS 2023; Ju et al., "Generative
    Recommendation with Semantic IDs: A Practitioner's Handbook" (GRID), arXiv 2507.22224. There the norms of residuals
    are given up; here v keeps what of them the codes can say.

    Examples
    --------
    >>> x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    >>> tokenizer = ResidualKMeans(32, n_levels=3, n_codes=16).fit(x)
    >>> tokenizer.assign(x).shape     # three levels and a digit
    torch.Size([1000, 4])
    """

    def __init__(
        self,
        dim: int,
        n_levels: int = 3,
        n_codes: int = 256,
        normalize: bool = True,
        *,
        collisions: Method = "digit",
    ):
        super().__init__(dim, n_levels, n_codes, collisions)
        self.normalize = normalize
        self.register_buffer("centroids", torch.zeros(n_levels, n_codes, dim))
        self.register_buffer("values", torch.zeros(n_levels, n_codes, dim))
        # As in ProductQuantizer: the rest are padding. 0 before fit.
        self.register_buffer("n_used", torch.zeros(n_levels, dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_levels={self.n_codebooks}, n_codes={self.n_codes}, normalize={self.normalize}"

    def _options(self) -> dict[str, int | bool]:
        return {"n_levels": self.n_codebooks, "normalize": self.normalize}

    @torch.no_grad()
    def fit(self, x: torch.Tensor | np.ndarray, seed: int = 0, *, iterations: int = 25) -> ResidualKMeans:
        """Learn the levels one after the other: the centroids by k-means (FAISS) from at most 256 K rows, the values
        from all.

        Where there are no more than K distinct rows, the first level is these rows, and coding them loses nothing but
        rounding; places left over repeat the first centroid, as in `ProductQuantizer`. Warns where a level has
        collapsed and items share their codes: a perplexity below a quarter of K (or of the items, if fewer).

        Parameters
        ----------
        x : Tensor or array [N, D], float32, N >= 1
        seed : int
            Of the sample and of k-means: the same seed gives the same centroids.
        iterations : int
            Of k-means.

        Returns
        -------
        The tokeniser itself.

        Raises
        ------
        TypeError, ValueError
            Another dtype or shape, no rows, NaN or infinity.
        """
        x = self._rows_to_fit(x)
        device = self._device
        residual, lengths = x.clone(), x.norm(dim=1)
        for level in range(self.n_codebooks):
            scaled = self._scaled(level, residual, lengths)
            centroids, used = kmeans(
                sample(scaled, self.n_codes, seed).numpy(),
                self.n_codes,
                seed + level,
                iterations,
                spherical=self.normalize and level > 0,
            )
            self.centroids[level] = torch.from_numpy(centroids)
            self.n_used[level] = used
            codes = torch.empty(len(x), dtype=torch.int64)
            totals = torch.zeros(self.n_codes, self.dim, dtype=torch.float64)
            for rows in self._pieces(len(x)):
                codes[rows] = self._nearest(level, scaled[rows].to(device)).cpu()
                totals.index_add_(0, codes[rows], residual[rows].double())
            counts = torch.bincount(codes, minlength=self.n_codes)[:, None]
            # A code that no row has says its direction at the common length.
            scale = (residual.norm(dim=1).mean() / scaled.norm(dim=1).mean()).nan_to_num(0.0, posinf=0.0)
            values = torch.where(counts > 0, (totals / counts).float(), scale * torch.from_numpy(centroids))
            values[used:] = values[0]
            self.values[level] = values
            residual -= values[codes]
        self._after_fit(x)
        self._warn_of_collapse(len(x))
        return self

    def _score_table(self, queries: torch.Tensor) -> torch.Tensor:
        return torch.einsum("qd,mkd->qmk", queries, self.values)

    def _fitted(self) -> bool:
        return bool(self.n_used.all())

    def _scaled(self, level: int, residual: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if level == 0 or not self.normalize:
            return residual
        norm = residual.norm(dim=1)
        return torch.where(norm > _RESOLUTION * lengths, 1 / norm, 0.0)[:, None] * residual

    def _nearest(self, level: int, scaled: torch.Tensor) -> torch.Tensor:
        return squared_distances(scaled, self.centroids[level], self.n_used[level]).argmin(1)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        residual, lengths = x.clone(), x.norm(dim=1)
        codes = []
        for level in range(self.n_codebooks):
            codes.append(self._nearest(level, self._scaled(level, residual, lengths)))
            residual -= self.values[level][codes[-1]]
        return torch.stack(codes, dim=1)

    def _decodings(self, codes: torch.Tensor, mean: torch.Tensor) -> Iterator[torch.Tensor]:
        out = self.values[0][codes[:, 0]]
        yield out
        for level in range(1, self.n_codebooks):
            out += self.values[level][codes[:, level]]
            yield out

    def _last_distances(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        residual = x.clone()
        for level in range(self.n_codebooks - 1):
            residual -= self.values[level][codes[:, level]]
        scaled = self._scaled(self.n_codebooks - 1, residual, x.norm(dim=1))
        return squared_distances(scaled, self.centroids[-1], self.n_codes) + scaled.square().sum(1, keepdim=True)
