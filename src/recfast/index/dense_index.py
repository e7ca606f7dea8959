"""Dense vectors under the inner product, by FAISS, behind the same search as the other indexes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from recfast.index._arrays import as_ids, as_tensor, refuse_repeats

_KINDS = ("flat", "ivf", "hnsw")


class DenseIndex:
    """Vectors of items, searched by inner product with FAISS.

    Parameters
    ----------
    vectors : array or Tensor [N, D], float32, finite
    kind : "flat", "ivf" or "hnsw"
        Exact; inverted lists; a graph. The last two are approximate and need not find every one of the k best.
    ids : array or Tensor [N] of distinct integers, at least 0, optional
        What an item is called in the answer; its position where left out.
    n_lists : int, optional
        Lists of "ivf": 4 sqrt(N), at most N / 39, where left out.
    n_probe : int
        Lists that a search of "ivf" visits.
    n_links : int
        Links a node of "hnsw".
    ef_construction, ef_search : int
        Candidates that "hnsw" keeps while building and while searching; a search keeps k at least.

    Raises
    ------
    TypeError, ValueError
        A wrong dtype or shape, a vector that is not finite, a repeated or negative id.

    Notes
    -----
    Scores are FAISS's: float32, in an order of summation that may depend on the number of queries, so that a score may
    differ in its last bits from batch to batch. "flat" returns the k best of these scores, ties by lowest id, also
    where a tie crosses the k-th place. FAISS keeps its own copy of the vectors.
    """

    def __init__(
        self,
        vectors: Any,
        kind: str = "flat",
        ids: Any = None,
        *,
        n_lists: int | None = None,
        n_probe: int = 32,
        n_links: int = 32,
        ef_construction: int = 128,
        ef_search: int = 128,
    ):
        import faiss

        if kind not in _KINDS:
            raise ValueError(f"DenseIndex: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
        vectors = _vectors("DenseIndex", "vectors", vectors, None)
        size, width = vectors.shape
        self.kind = kind
        self._ids = None if ids is None else as_ids("DenseIndex", ids)
        if self._ids is not None:
            if len(self._ids) != size:
                raise ValueError(f"DenseIndex: ids must have shape [{size}], got [{len(self._ids)}]")
            refuse_repeats("DenseIndex", self._ids)
        self._n_probe, self._ef_search = n_probe, ef_search
        faiss.omp_set_num_threads(torch.get_num_threads())
        if kind == "flat" or size == 0:
            self._index = faiss.IndexFlatIP(width)
        elif kind == "ivf":
            lists = n_lists or max(1, min(round(4 * math.sqrt(size)), size // 39))
            self._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
            self._index.cp.seed = 0
            self._index.cp.min_points_per_centroid = 1
            self._index.train(vectors)
        else:
            self._index = faiss.IndexHNSWFlat(width, n_links, faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efConstruction = ef_construction
        self._index.add(vectors)

    def __len__(self) -> int:
        """The number of items."""
        return self._index.ntotal

    def __repr__(self) -> str:
        return f"DenseIndex({len(self)} items of {self._index.d} dimensions, {self.kind})"

    def search(self, queries: Any, k: int, mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k items of highest inner product with each query.

        Parameters
        ----------
        queries : array or Tensor [Q, D], float32, finite
        k : int
            May exceed N, may be 0.
        mask : array or Tensor [N] or [Q, N], bool, optional
            The items allowed, by position, for all queries or for each (one FAISS call a query then).

        Returns
        -------
        scores : Tensor [Q, k], float32
        ids : Tensor [Q, k], int64
            Sorted by score descending, ties by lowest id, padded with (-inf, -1).

        Raises
        ------
        TypeError, ValueError
            A wrong dtype or shape, a query that is not finite, a negative k.
        """
        import faiss

        queries = _vectors("DenseIndex.search", "queries", queries, self._index.d)
        if k < 0:
            raise ValueError(f"DenseIndex.search: k must be at least 0, got {k}")
        if mask is not None:
            mask = as_tensor("DenseIndex.search", "mask", mask).numpy()
            if mask.dtype != np.bool_:
                raise TypeError(f"DenseIndex.search: mask must be bool, got {mask.dtype}")
            if mask.shape not in ((len(self),), (len(queries), len(self))):
                raise ValueError(
                    f"DenseIndex.search: mask must have shape [{len(self)}] or [{len(queries)}, {len(self)}],"
                    f" got {list(mask.shape)}"
                )
        faiss.omp_set_num_threads(torch.get_num_threads())
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        if len(queries) and k and len(self):
            if mask is not None and mask.ndim == 2:
                for row in range(len(queries)):
                    self._best(queries[row : row + 1], scores[row : row + 1], ids[row : row + 1], mask[row])
            else:
                self._best(queries, scores, ids, mask)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    def _best(self, queries: np.ndarray, scores: np.ndarray, ids: np.ndarray, mask: np.ndarray | None) -> None:
        """Fill `scores` and `ids` in place."""
        k = scores.shape[1]
        todo = np.arange(len(queries))
        # One more than asked for shows whether a tie crosses the k-th place.
        depth = min(k + 1, len(self))
        while len(todo):
            found_scores, places = self._faiss_search(queries[todo], depth, mask)
            # FAISS pads with -1 and the lowest float.
            found_scores = np.where(places < 0, -np.inf, found_scores)
            tied = np.zeros(len(todo), dtype=bool)
            if self.kind == "flat" and depth < len(self):
                tied = (places[:, -1] >= 0) & (found_scores[:, k - 1] == found_scores[:, -1])
            names = places if self._ids is None else np.where(places < 0, -1, self._ids[places])
            order = np.lexsort((names, -found_scores), axis=1)[:, :k]
            # A tie that goes on below what was fetched may hold a lower id: fetch deeper.
            done = ~tied
            width = order.shape[1]
            scores[todo[done], :width] = np.take_along_axis(found_scores, order, axis=1)[done]
            ids[todo[done], :width] = np.take_along_axis(names, order, axis=1)[done]
            todo = todo[tied]
            depth = min(4 * depth, len(self))

    def _faiss_search(self, queries: np.ndarray, depth: int, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        options: dict[str, Any] = {}
        if mask is not None:
            # The selector reads this memory while it searches, so it must outlive the call below.
            bits = np.packbits(mask, bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(bits)
        if isinstance(self._index, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(nprobe=self._n_probe, **options)
        elif isinstance(self._index, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(efSearch=max(self._ef_search, depth), **options)
        else:
            parameters = faiss.SearchParameters(**options) if options else None
        return self._index.search(queries, depth, params=parameters)


def _vectors(place: str, name: str, value: Any, width: int | None) -> np.ndarray:
    tensor = as_tensor(place, name, value)
    if tensor.dtype != torch.float32:
        raise TypeError(f"{place}: {name} must be float32, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != 2 or tensor.shape[1] == 0 or (width is not None and tensor.shape[1] != width):
        raise ValueError(f"{place}: {name} must have shape [N, {width or 'D'}], got {list(tensor.shape)}")
    wrong = ~torch.isfinite(tensor).all(dim=1)
    if bool(wrong.any()):
        raise ValueError(f"{place}: {name}[{int(wrong.nonzero()[0])}] must be finite, got NaN or infinity")
    return tensor.numpy()
