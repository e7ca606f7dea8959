"""Codes for vectors: product quantisation by k-means."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn


class ProductQuantizer(nn.Module):
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

    def __init__(self, dim: int, n_codebooks: int = 8, n_codes: int = 256):
        super().__init__()
        if n_codebooks < 1 or dim < 1 or dim % n_codebooks:
            raise ValueError(f"ProductQuantizer: dim must be a positive multiple of {n_codebooks} codebooks, got {dim}")
        if not 1 <= n_codes <= 65536:
            raise ValueError(f"ProductQuantizer: n_codes must be in [1, 65536], got {n_codes}")
        self.dim, self.n_codebooks, self.n_codes = dim, n_codebooks, n_codes
        self.register_buffer("centroids", torch.zeros(n_codebooks, n_codes, dim // n_codebooks))
        # Centroids in use, per codebook; those after them are padding. 0 before fit.
        self.register_buffer("n_used", torch.zeros(n_codebooks, dtype=torch.int64))
        self._report: dict[str, Any] | None = None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_codebooks={self.n_codebooks}, n_codes={self.n_codes}"

    @torch.no_grad()
    def fit(self, x: torch.Tensor | np.ndarray, seed: int = 0, *, iterations: int = 25) -> ProductQuantizer:
        """Learn the centroids by k-means in each sub-space (FAISS), from at most 256 K rows of `x`.

        Where a sub-space has no more than K distinct parts among these rows, as when there are fewer items than codes,
        they become the centroids themselves, in lexicographic order, so that coding them loses nothing but rounding.
        The places left over repeat the first centroid and are never coded (`n_used` counts the others): K, and with it
        the shape of every table, stays as asked for.

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
        import faiss

        x = self._vectors("fit", x).cpu()
        if len(x) == 0:
            raise ValueError("ProductQuantizer.fit: x must have at least one row, got none")
        sample = x.numpy()
        most = 256 * self.n_codes
        if len(sample) > most:
            sample = sample[np.sort(np.random.default_rng(seed).permutation(len(sample))[:most])]
        width = self.dim // self.n_codebooks
        used = torch.full((self.n_codebooks,), self.n_codes)
        centroids = np.empty((self.n_codebooks, self.n_codes, width), dtype=np.float32)
        for book in range(self.n_codebooks):
            # Adding 0 makes -0 and 0 the same part.
            parts = np.ascontiguousarray(sample[:, book * width : (book + 1) * width]) + np.float32(0)
            distinct = np.unique(parts, axis=0)
            if len(distinct) <= self.n_codes:
                centroids[book] = distinct[0]
                centroids[book, : len(distinct)] = distinct
                used[book] = len(distinct)
                continue
            kmeans = faiss.Kmeans(
                width,
                self.n_codes,
                niter=iterations,
                seed=seed + book,
                min_points_per_centroid=1,
                max_points_per_centroid=max(256, -(-len(parts) // self.n_codes)),
            )
            kmeans.train(parts)
            centroids[book] = kmeans.centroids
        self.centroids.copy_(torch.from_numpy(centroids))
        self.n_used.copy_(used)
        self._report = self._measure(x)
        return self

    @torch.no_grad()
    def encode(self, x: torch.Tensor | np.ndarray) -> torch.Tensor:
        """The codes of vectors.

        Parameters
        ----------
        x : Tensor or array [N, D], float32

        Returns
        -------
        Tensor [N, M], uint8 where K <= 256, else uint16; on the device of the centroids.

        Raises
        ------
        RuntimeError
            Before `fit` or `load_state_dict`.
        TypeError, ValueError
            Another dtype or shape, NaN or infinity.
        """
        self._require_fitted("encode")
        x = self._vectors("encode", x).to(self.centroids.device)
        codes = torch.empty((len(x), self.n_codebooks), dtype=torch.int32, device=x.device)
        padding = torch.arange(self.n_codes, device=x.device) >= self.n_used[:, None]
        norms = self.centroids.square().sum(-1).masked_fill(padding, torch.inf)
        width = self.dim // self.n_codebooks
        # Rows are cut so that the distances of a piece stay near 16 MiB.
        rows = max(1, 2**22 // self.n_codes)
        for start in range(0, len(x), rows):
            piece = x[start : start + rows]
            for book in range(self.n_codebooks):
                part = piece[:, book * width : (book + 1) * width]
                # |x|^2 is the same for every centroid and left out.
                distance = torch.addmm(norms[book], part, self.centroids[book].T, alpha=-2)
                codes[start : start + rows, book] = distance.argmin(1).int()
        return codes.to(torch.uint8 if self.n_codes <= 256 else torch.uint16)

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
        ValueError, IndexError
            Another shape, a code out of range.
        """
        self._require_fitted("decode")
        codes = torch.as_tensor(codes)
        if codes.dim() != 2 or codes.shape[1] != self.n_codebooks:
            raise ValueError(
                f"ProductQuantizer.decode: codes must have shape [N, {self.n_codebooks}], got {list(codes.shape)}"
            )
        codes = codes.long().to(self.centroids.device)
        wrong = (codes < 0) | (codes >= self.n_codes)
        if bool(wrong.any()):
            item, book = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"ProductQuantizer.decode: codes[{item}, {book}] = {int(codes[item, book])}"
                f" is outside [0, {self.n_codes})"
            )
        books = torch.arange(self.n_codebooks, device=codes.device)
        return self.centroids[books, codes].flatten(1)

    def score_table(self, queries: torch.Tensor) -> torch.Tensor:
        """The inner product of each part of each query with each centroid: what `CodeIndex.search` takes.

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
            Another shape.
        """
        self._require_fitted("score_table")
        if queries.dim() != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"ProductQuantizer.score_table: queries must have shape [Q, {self.dim}], got {list(queries.shape)}"
            )
        parts = queries.unflatten(1, (self.n_codebooks, -1))
        return torch.einsum("qmd,mkd->qmk", parts, self.centroids)

    def report(self, x: torch.Tensor | np.ndarray | None = None) -> dict[str, Any]:
        """How good the codes are, for `x`, or for what `fit` was given.

        Returns
        -------
        dict
            items; unique_codes: distinct rows of codes; used_codes: codes in use, per codebook; perplexity: exp of the
            entropy of the codes (natural logarithm), per codebook, at most K; reconstruction_error: sum of squared
            errors over the sum of squared deviations from the mean, 0 for perfect and 1 for what the mean alone gives
            (nan where all vectors are equal).

        Raises
        ------
        RuntimeError
            Before `fit`; or without `x` after `load_state_dict`, which does not bring the vectors of `fit` along.
        """
        self._require_fitted("report")
        if x is not None:
            return self._measure(self._vectors("report", x).cpu())
        if self._report is None:
            raise RuntimeError(
                "ProductQuantizer.report: x must be given, since these centroids were loaded, not fitted"
            )
        return dict(self._report)

    @torch.no_grad()
    def _measure(self, x: torch.Tensor) -> dict[str, Any]:
        if len(x) == 0:
            raise ValueError("ProductQuantizer.report: x must have at least one row, got none")
        codes = self.encode(x).cpu()
        table = codes.numpy().astype(np.int64)
        counts = [np.bincount(table[:, book], minlength=self.n_codes) for book in range(self.n_codebooks)]
        perplexity = []
        for count in counts:
            share = count[count > 0] / len(x)
            perplexity.append(float(np.exp(-(share * np.log(share)).sum())))
        error = float((self.decode(codes).cpu() - x).double().square().sum())
        spread = float((x - x.double().mean(0)).square().sum())
        return {
            "items": len(x),
            "unique_codes": len(np.unique(codes.numpy(), axis=0)),
            "used_codes": [int((count > 0).sum()) for count in counts],
            "perplexity": perplexity,
            "reconstruction_error": error / spread if spread > 0 else float("nan"),
        }

    def _require_fitted(self, method: str) -> None:
        if not bool(self.n_used.all()):
            raise RuntimeError(f"ProductQuantizer.{method}: the centroids must be fitted or loaded first")

    def _vectors(self, method: str, x: torch.Tensor | np.ndarray) -> torch.Tensor:
        place = f"ProductQuantizer.{method}"
        if not isinstance(x, (torch.Tensor, np.ndarray)):
            raise TypeError(f"{place}: x must be a tensor or a numpy array, got {type(x).__name__}")
        x = torch.as_tensor(x).detach()
        if x.dtype != torch.float32:
            raise TypeError(f"{place}: x must be float32, got {str(x.dtype).removeprefix('torch.')}")
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"{place}: x must have shape [N, {self.dim}], got {list(x.shape)}")
        wrong = ~torch.isfinite(x).all(1)
        if bool(wrong.any()):
            raise ValueError(f"{place}: x[{int(wrong.nonzero()[0])}] must be finite, got NaN or infinity")
        return x
