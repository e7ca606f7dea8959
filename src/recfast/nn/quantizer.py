"""Codes for vectors: product quantisation by k-means."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from recfast.nn._tokenizer import Tokenizer, kmeans, sample, squared_distances
from recfast.nn.collisions import Method


class ProductQuantizer(Tokenizer):
    """Cut a vector in M parts and replace each by the nearest of K centroids.

    .. math:: c_{i,m} = \\arg\\min_j \\lVert x_i^{(m)} - \\mu_{m,j} \\rVert^2

    Ties go to the lowest code. The centroids are a buffer, so they travel with `state_dict`.

    Parameters
    ----------
    dim : int
        Width of the vectors; a multiple of `n_codebooks`.
    n_codebooks : int
        M.
    n_codes : int
        K, in [1, 65536].
    collisions : "digit", "sinkhorn" or "none"
        How `assign` tells items of equal codes apart; see `resolve_collisions`.

    Raises
    ------
    ValueError
        A width that cannot be cut into equal parts, K out of range.

    References
    ----------
    Jégou, Douze, Schmid, "Product quantization for nearest neighbor search", PAMI 33, 2011.

    Examples
    --------
    >>> x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    >>> quantizer = ProductQuantizer(32, n_codebooks=4, n_codes=16).fit(x)
    >>> codes = quantizer.encode(x)
    >>> codes.shape, codes.dtype
    (torch.Size([1000, 4]), torch.uint8)
    """

    def __init__(self, dim: int, n_codebooks: int = 8, n_codes: int = 256, *, collisions: Method = "digit"):
        if n_codebooks < 1 or dim < 1 or dim % n_codebooks:
            raise ValueError(f"ProductQuantizer: dim must be a positive multiple of {n_codebooks} codebooks, got {dim}")
        super().__init__(dim, n_codebooks, n_codes, collisions)
        self.register_buffer("centroids", torch.zeros(n_codebooks, n_codes, dim // n_codebooks))
        # Centroids in use, per codebook; those after them are padding. 0 before fit.
        self.register_buffer("n_used", torch.zeros(n_codebooks, dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_codebooks={self.n_codebooks}, n_codes={self.n_codes}"

    @torch.no_grad()
    def fit(self, x: torch.Tensor | np.ndarray, seed: int = 0, *, iterations: int = 25) -> ProductQuantizer:
        """Learn the centroids by k-means in each sub-space (FAISS), from at most 256 K rows of `x`.

        Where a sub-space has no more than K distinct parts among these rows, as when there are fewer items than codes,
        they become the centroids themselves, in lexicographic order, so that coding them loses nothing but rounding.
        The places left over repeat the first centroid and `encode` never gives them (`n_used` counts the others): K,
        and with it the shape of every table, stays as asked for.

        Parameters
        ----------
        x : Tensor or array [N, D], float32, N >= 1
        seed : int
            Of the sample and of k-means: the same seed gives the same centroids.
        iterations : int
            Of k-means.

        Returns
        -------
        The quantiser itself.

        Raises
        ------
        TypeError, ValueError
            Another dtype or shape, no rows, NaN or infinity.
        """
        x = self._rows_to_fit(x)
        parts = sample(x, self.n_codes, seed).unflatten(1, (self.n_codebooks, -1)).numpy()
        for book in range(self.n_codebooks):
            centroids, used = kmeans(parts[:, book], self.n_codes, seed + book, iterations)
            self.centroids[book] = torch.from_numpy(centroids)
            self.n_used[book] = used
        self._after_fit(x)
        return self

    def _options(self) -> dict[str, int]:
        return {"n_codebooks": self.n_codebooks}

    def _score_table(self, queries: torch.Tensor) -> torch.Tensor:
        parts = queries.unflatten(1, (self.n_codebooks, -1))
        return torch.einsum("qmd,mkd->qmk", parts, self.centroids)

    def _fitted(self) -> bool:
        return bool(self.n_used.all())

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(1, (self.n_codebooks, -1))
        return torch.stack(
            [
                squared_distances(parts[:, book], self.centroids[book], self.n_used[book]).argmin(1)
                for book in range(self.n_codebooks)
            ],
            dim=1,
        )

    def _decodings(self, codes: torch.Tensor, mean: torch.Tensor) -> Iterator[torch.Tensor]:
        out = mean.expand(len(codes), -1).clone()
        parts = out.unflatten(1, (self.n_codebooks, -1))
        for book in range(self.n_codebooks):
            parts[:, book] = self.centroids[book][codes[:, book]]
            yield out

    def _last_distances(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        part = x[:, -self.centroids.shape[2] :]
        return squared_distances(part, self.centroids[-1], self.n_codes) + part.square().sum(1, keepdim=True)
