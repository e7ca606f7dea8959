"""Dense vectors under the inner product, by FAISS, behind the same search as the other indexes."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch

from recfast.errors import InputError
from recfast.index import _file
from recfast.index._arrays import as_ids, as_mask, as_tensor, refuse_repeats
from recfast.index._named import NamedItems
from recfast.index.bitmap import Bitmap

_KINDS = ("flat", "ivf", "hnsw", "pq", "ivfpq")
_CODED = ("pq", "ivfpq")
# Products and squared distances of shorter vectors are finite; FAISS ends the process where one is not.
_LONGEST = 2.0**60


class DenseIndex(NamedItems):
    """Vectors of items, searched by inner product with FAISS.

    Every item stands in a *slot*: its place in `vectors`, then in the order of `add`. A removed item leaves its slot
    empty until `compact` closes the gaps. Masks speak of slots; answers, `update` and `remove` of external ids.

    Parameters
    ----------
    vectors : array or Tensor [N, D], float32, finite, shorter than 2**60
    kind : "flat", "ivf", "hnsw", "pq" or "ivfpq"
        Exact; inverted lists; a graph; product quantisation (FAISS IndexPQ, codes of 8 bits); inverted lists of product
        codes. All but the first are approximate and need not find every one of the k best.
    ids : array or Tensor [N] of distinct integers, at least 0, optional
        What an item is called in the answer; its slot where left out.
    n_lists : int, optional
        Lists of "ivf" and "ivfpq": 4 sqrt(N), at most N / 39, where left out.
    n_probe : int
        Lists that a search of "ivf" and "ivfpq" visits. The attribute of this name may be changed between searches.
    n_links : int
        Links a node of "hnsw".
    ef_construction, ef_search : int
        Candidates that "hnsw" keeps while building and while searching; a search keeps k at least. `ef_search` may be
        changed between searches.
    n_codebooks : int
        Bytes of an item's code in "pq" and "ivfpq"; must divide D. Learning them takes 256 items at least.
    refine : int
        For "pq" and "ivfpq": keep the vectors too and score the best `refine` times k candidates exactly. 0 does not.

    Raises
    ------
    TypeError, ValueError
        A wrong dtype or shape, a vector that is not finite or too long, a repeated or negative id.

    Notes
    -----
    Scores are FAISS's: float32, in an order of summation that may depend on the number of queries, so that a score may
    differ in its last bits from batch to batch. "flat" returns the k best of these scores, ties by lowest id, also
    where a tie crosses the k-th place; the others order equal scores by id but may choose any of those at the k-th
    place. FAISS keeps its own copy of the vectors.

    What `remove` does depends on the kind. "flat", "ivf", "pq" and "ivfpq" give the vectors up at once. A graph cannot:
    "hnsw" keeps the node to walk over, marks it as gone, and never returns it; the share of nodes that a search may
    not return, removed or masked, widens `ef_search` accordingly. `compact` builds the graph again without them.

    An index of one of the learned kinds that starts empty, or has lost all its items, learns from the first `add`.

    Any number of threads may search at the same time. A change (`add`, `update`, `remove`, `compact`) waits until the
    searches under way have ended, and what is called meanwhile waits for the change.
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
        n_codebooks: int = 8,
        refine: int = 0,
    ):
        if kind not in _KINDS:
            raise ValueError(f"DenseIndex: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
        options = {
            "n_probe": n_probe,
            "n_links": n_links,
            "ef_construction": ef_construction,
            "ef_search": ef_search,
            "n_codebooks": n_codebooks,
            "n_lists": 1 if n_lists is None else n_lists,
        }
        for name, value in options.items():
            if value < 1:
                raise ValueError(f"DenseIndex: {name} must be at least 1, got {value}")
        if refine < 0 or (refine and kind not in _CODED):
            raise ValueError(f"DenseIndex: refine must be 0 for {kind}, and at least 0 for codes, got {refine}")
        vectors = _vectors("DenseIndex", "vectors", vectors, None)
        size, self._width = vectors.shape
        if kind in _CODED and self._width % n_codebooks:
            raise ValueError(f"DenseIndex: n_codebooks must divide the width {self._width}, got {n_codebooks}")
        self.kind = kind
        self.n_probe, self.ef_search = n_probe, ef_search
        self._n_lists, self._n_links, self._ef_construction = n_lists, n_links, ef_construction
        self._n_codebooks, self._refine = n_codebooks, refine
        self._ids = self._named(ids, size)
        self._live = np.ones(size, dtype=bool)
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._begin()
        # A mapped file that the FAISS index looks into, and must not be changed through.
        self._mapped: np.ndarray | None = None
        # Of the kinds without ids of their own: the slot of each vector, rising; None where it is the position.
        self._slots: np.ndarray | None = None
        self._vectors = vectors.copy() if refine else None
        self._index = self._built(vectors)

    def _built(self, vectors: np.ndarray) -> Any:
        """A FAISS index of these vectors, in slots 0, 1, ...; one that has learned nothing where there are none."""
        import faiss

        size, width = vectors.shape
        _threads(faiss)
        inner = faiss.METRIC_INNER_PRODUCT
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, self._n_links, inner)
            index.hnsw.efConstruction = self._ef_construction
        elif self.kind == "flat" or size == 0:
            index = faiss.IndexFlatIP(width)
        elif self.kind == "pq":
            self._enough(size)
            index = faiss.IndexPQ(width, self._n_codebooks, 8, inner)
        else:
            lists = self._n_lists or max(1, min(round(4 * math.sqrt(size)), size // 39))
            if lists > size:
                raise ValueError(f"DenseIndex: n_lists must be at most the number of items, {size}, got {lists}")
            coarse = faiss.IndexFlatIP(width)
            if self.kind == "ivf":
                index = faiss.IndexIVFFlat(coarse, width, lists, inner)
            else:
                self._enough(size)
                index = faiss.IndexIVFPQ(coarse, width, lists, self._n_codebooks, 8, inner)
            index.cp.seed = 0
            index.cp.min_points_per_centroid = 1
        if isinstance(index, faiss.IndexPQ | faiss.IndexIVFPQ):
            index.pq.cp.min_points_per_centroid = 1
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
        return index

    def _enough(self, size: int) -> None:
        if size < 256:
            raise ValueError(f"DenseIndex: {self.kind} needs at least 256 items to learn its codes, got {size}")

    def __getstate__(self) -> dict[str, Any]:
        import faiss

        # Everything is copied while no change can come between: what is pickled is one moment of the index, and a
        # shallow copy shares nothing with it. Of a mapped file the vectors travel, not the map; locks stay behind.
        with self._guard.reading:
            left_out = ("_guard", "epoch", "_index", "_mapped", "_sorted")
            state = {name: value for name, value in self.__dict__.items() if name not in left_out}
            for name in ("_live", "_ids", "_slots", "_vectors"):
                if state[name] is not None:
                    state[name] = np.array(state[name])
            return {**state, "_written": faiss.serialize_index(self._index)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import faiss

        self.__dict__.update(state)
        self._index = faiss.deserialize_index(self.__dict__.pop("_written"))
        self._mapped, self._sorted = None, None
        self._begin()

    def __len__(self) -> int:
        """The number of items, without the removed ones."""
        return int(np.count_nonzero(self._live))

    def __repr__(self) -> str:
        return f"DenseIndex({len(self)} items of {self._width} dimensions, {self.kind})"

    @property
    def n_slots(self) -> int:
        """Items and removed ones: the length of a mask."""
        return len(self._live)

    @property
    def ids(self) -> torch.Tensor:
        """The external id of each slot, [n_slots] int64. Not to be written to."""
        return torch.arange(self.n_slots) if self._ids is None else torch.from_numpy(self._ids)

    @property
    def nbytes(self) -> int:
        """Memory of vectors, codes, lists and links, and of what is kept beside them."""
        import faiss

        index, total = self._index, self._live.nbytes
        total += sum(array.nbytes for array in (self._ids, self._slots, self._vectors) if array is not None)
        if isinstance(index, faiss.IndexHNSW):
            graph = index.hnsw
            total += 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
            return total + 4 * self._width * index.ntotal
        if isinstance(index, faiss.IndexIVF):
            total += (index.code_size + 8) * index.ntotal + 4 * self._width * index.nlist
        else:
            total += index.code_size * index.ntotal
        if isinstance(index, faiss.IndexPQ | faiss.IndexIVFPQ):
            total += 4 * index.pq.centroids.size()
        return total

    def search(self, queries: Any, k: int, mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k items of highest inner product with each query.

        Parameters
        ----------
        queries : array or Tensor [Q, D], float32, finite, shorter than 2**60
        k : int
            May exceed N, may be 0.
        mask : array or Tensor [n_slots] or [Q, n_slots], bool; the same packed in uint8; or a Bitmap; optional
            The slots allowed, for all queries or for each (one FAISS call a query then).

        Returns
        -------
        scores : Tensor [Q, k], float32
        ids : Tensor [Q, k], int64
            Sorted by score descending, ties by lowest id, padded with (-inf, -1).

        Raises
        ------
        TypeError, ValueError
            A wrong dtype or shape, a query that is not finite or too long, a negative k.
        """
        import faiss

        place = "DenseIndex.search"
        queries = _vectors(place, "queries", queries, self._width)
        if k < 0:
            raise ValueError(f"{place}: k must be at least 0, got {k}")
        with self._guard.reading:
            allowed = as_mask(place, mask, len(queries), self.n_slots, epoch=self.epoch)
            scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
            ids = np.full((len(queries), k), -1, dtype=np.int64)
            if len(queries) and k and len(self):
                _threads(faiss)
                if allowed is not None and len(allowed.shape) == 2:
                    for row in range(len(queries)):
                        one = slice(row, row + 1)
                        self._best(queries[one], scores[one], ids[one], _as_bools(allowed[row]))
                else:
                    self._best(queries, scores, ids, None if allowed is None else _as_bools(allowed))
            return torch.from_numpy(scores), torch.from_numpy(ids)

    def _best(self, queries: np.ndarray, scores: np.ndarray, ids: np.ndarray, allowed: np.ndarray | None) -> None:
        """Fill `scores` and `ids` in place."""
        k = scores.shape[1]
        todo = np.arange(len(queries))
        # One more than asked for shows whether a tie crosses the k-th place.
        depth = min((k + 1) * max(self._refine, 1), self.n_slots)
        while len(todo):
            found_scores, slots = self._find_slots(queries[todo], depth, allowed, k + 1)
            # FAISS pads with -1 and the lowest float.
            found_scores = np.where(slots < 0, -np.inf, found_scores)
            tied = np.zeros(len(todo), dtype=bool)
            if self.kind == "flat" and depth < self.n_slots:
                tied = (slots[:, -1] >= 0) & (found_scores[:, k - 1] == found_scores[:, -1])
            names = slots if self._ids is None else np.where(slots < 0, -1, self._ids[slots])
            order = np.lexsort((names, -found_scores), axis=1)[:, :k]
            # A tie that goes on below what was fetched may hold a lower id: fetch deeper.
            done = ~tied
            width = order.shape[1]
            scores[todo[done], :width] = np.take_along_axis(found_scores, order, axis=1)[done]
            ids[todo[done], :width] = np.take_along_axis(names, order, axis=1)[done]
            todo = todo[tied]
            depth = min(4 * depth, self.n_slots)

    def _find_slots(
        self, queries: np.ndarray, depth: int, allowed: np.ndarray | None, keep: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and slots of the best, padded with slot -1; those refined are the best `keep` of `depth`."""
        import faiss

        index = self._index
        if isinstance(index, faiss.IndexHNSW) and not self._live.all():
            allowed = self._live if allowed is None else allowed & self._live
        if allowed is not None and self._slots is not None:
            allowed = allowed[self._slots]
        options: dict[str, Any] = {}
        if allowed is not None and not isinstance(index, faiss.IndexPQ):
            # The selector reads this memory while it searches, so it must outlive the call below.
            bits = np.packbits(allowed, bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(bits)
        if isinstance(index, faiss.IndexPQ):
            scores, found = self._search_codes(index, queries, depth, allowed)
        elif isinstance(index, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(nprobe=min(self.n_probe, index.nlist), **options)
            scores, found = index.search(queries, depth, params=parameters)
        elif isinstance(index, faiss.IndexHNSW):
            wanted, share = max(self.ef_search, depth), index.ntotal
            if allowed is not None:
                # Nodes that may not be returned take places among the candidates all the same.
                wanted = -(-wanted * share // max(int(np.count_nonzero(allowed)), 1))
            parameters = faiss.SearchParametersHNSW(efSearch=min(wanted, max(share, depth)), **options)
            scores, found = index.search(queries, depth, params=parameters)
        else:
            parameters = faiss.SearchParameters(**options) if options else None
            scores, found = index.search(queries, depth, params=parameters)
        if self._slots is not None:
            found = np.where(found < 0, -1, self._slots[found])
        if self._vectors is not None:
            return self._refined(queries, found, keep)
        return scores, found

    def _refined(self, queries: np.ndarray, found: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
        """The candidates by their exact scores, the best `keep` of them; padded with slot -1."""
        keep = min(keep, found.shape[1])
        scores, slots = [], []
        # A few queries at a time, whose candidates stay in the cache.
        for begin in range(0, len(queries), 8):
            part = torch.from_numpy(found[begin : begin + 8])
            vectors = torch.from_numpy(self._vectors)[part.clamp(min=0)]
            exact = torch.bmm(vectors, torch.from_numpy(queries[begin : begin + 8, :, None]))[..., 0]
            best = exact.masked_fill_(part < 0, -torch.inf).topk(keep, dim=1)
            scores.append(best.values)
            slots.append(part.gather(1, best.indices))
        return torch.cat(scores).numpy(), torch.cat(slots).numpy()

    def _search_codes(
        self, index: Any, queries: np.ndarray, depth: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """IndexPQ knows no filter: the codes allowed are searched as an index of their own."""
        if allowed is None:
            return index.search(queries, depth)
        import faiss

        places = allowed.nonzero()[0]
        part = faiss.IndexPQ(self._width, self._n_codebooks, 8, faiss.METRIC_INNER_PRODUCT)
        part.pq = index.pq
        part.is_trained = True
        codes = np.ascontiguousarray(self._codes_view()[places])
        part.add_sa_codes(codes)
        scores, found = part.search(queries, depth)
        return scores, np.where(found < 0, -1, places[found] if len(places) else -1)

    def add(self, vectors: Any, ids: Any = None) -> torch.Tensor:
        """Append items. What "ivf", "pq" and "ivfpq" have learned stays as it is.

        Parameters
        ----------
        vectors : array or Tensor [n, D], float32, finite, shorter than 2**60
        ids : integers [n], optional
            Distinct and not in the index. Left out, they go on from the highest id the index has ever had.

        Returns
        -------
        Tensor [n], int64: the ids.

        Raises
        ------
        TypeError, ValueError
            As the constructor does. The index is unchanged then.
        """
        place = "DenseIndex.add"
        vectors = _vectors(place, "vectors", vectors, self._width)
        with self._guard.changing:
            return self._add(place, vectors, ids)

    def _add(self, place: str, vectors: np.ndarray, ids: Any) -> torch.Tensor:
        ids = self._new_ids(place, ids, len(vectors))
        start = self.n_slots
        self._append(vectors, np.arange(start, start + len(vectors)))
        if self._ids is not None or not np.array_equal(ids, np.arange(start, start + len(ids))):
            self._ids = np.concatenate([self.ids.numpy(), ids])
        self._live = np.concatenate([self._live, np.ones(len(ids), dtype=bool)])
        self._sorted = None
        self._next_id = max(self._next_id, int(ids.max(initial=-1)) + 1)
        return torch.from_numpy(ids)

    def update(self, ids: Any, vectors: Any) -> None:
        """Give the items `ids` other vectors. With "hnsw" they move to new slots, at the end.

        Raises
        ------
        TypeError, ValueError
            An id that is not in the index or given twice; vectors that do not fit. The index is unchanged then.
        """
        place = "DenseIndex.update"
        ids = as_ids(place, ids)
        vectors = _vectors(place, "vectors", vectors, self._width)
        if len(ids) != len(vectors):
            raise ValueError(f"{place}: vectors must have shape [{len(ids)}, D], got {list(vectors.shape)}")
        refuse_repeats(place, ids)
        with self._guard.changing:
            self._update(place, ids, vectors)

    def _update(self, place: str, ids: np.ndarray, vectors: np.ndarray) -> None:
        slots = self._slots_of(place, ids)
        if self.kind == "hnsw":
            self._live[slots] = False
            self._sorted = None
            self._add(place, vectors, ids)
            return
        self._own()
        if self._lists():
            self._discard(slots)
            self._index.add_with_ids(vectors, slots)
        else:
            places = slots if self._slots is None else np.searchsorted(self._slots, slots)
            self._codes_view()[places] = self._index.sa_encode(vectors)
        if self._vectors is not None:
            self._vectors[slots] = vectors

    def remove(self, ids: Any) -> None:
        """Take the items `ids` out; their slots stay empty until `compact`.

        Raises
        ------
        TypeError, ValueError
            An id that is not in the index or given twice. The index is unchanged then.
        """
        place = "DenseIndex.remove"
        ids = as_ids(place, ids)
        refuse_repeats(place, ids)
        with self._guard.changing:
            slots = self._slots_of(place, ids)
            if self.kind != "hnsw":
                self._own()
                self._discard(slots)
            self._live[slots] = False
            self._sorted = None

    def compact(self) -> None:
        """Close the gaps that `remove` left. Ids stay, slots change. "hnsw" is built again where it has gaps."""
        with self._guard.changing:
            self._compact()

    def _compact(self) -> None:
        keep = self._live.nonzero()[0]
        if len(keep) == self.n_slots:
            return
        if self.kind == "hnsw":
            self._index = self._built(self._index.reconstruct_n(0, self._index.ntotal)[keep])
            self._mapped = None
        elif self._lists():
            import faiss

            self._own()
            number = np.cumsum(self._live) - 1
            for which in range(self._index.nlist):
                held = self._index.invlists.list_size(which)
                if held:
                    names = faiss.rev_swig_ptr(self._index.invlists.get_ids(which), held)
                    names[:] = number[names]
        self._ids = self.ids.numpy()[keep].copy()
        if self._vectors is not None:
            self._vectors = self._vectors[keep]
        self._live, self._slots, self._sorted = np.ones(len(keep), dtype=bool), None, None
        self._next_epoch()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file, whole or not at all: what FAISS writes, with checksums over every byte."""
        import faiss

        with self._guard.reading:
            arrays = {"faiss": faiss.serialize_index(self._index), "live": self._live}
            for name, array in (("ids", self._ids), ("slots", self._slots), ("vectors", self._vectors)):
                if array is not None:
                    arrays[name] = array
            config = {
                "kind": self.kind,
                "width": self._width,
                "n_lists": self._n_lists,
                "n_probe": self.n_probe,
                "n_links": self._n_links,
                "ef_construction": self._ef_construction,
                "ef_search": self.ef_search,
                "n_codebooks": self._n_codebooks,
                "refine": self._refine,
                "next_id": self._next_id,
            }
            _file.save(path, "DenseIndex", config, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False, verify: bool = True) -> DenseIndex:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path
        mmap : bool
            Map the file instead of reading it, so that processes share the memory of vectors, codes and links
            ("ivf" and "ivfpq" copy their lists all the same). The first change copies what it must; the file itself
            never changes.
        verify : bool
            Compare the checksums, for which the file is read through once. False is for files that are known to be
            whole: a damaged one could give wrong answers or end the process.

        Raises
        ------
        InputError
            No such file; truncated, corrupt, or not such a file.
        """
        import faiss

        config, arrays = _file.load(path, "DenseIndex", mmap=mmap, verify=verify)
        try:
            options = {name: value for name, value in config.items() if name not in ("width", "next_id")}
            index = cls(np.empty((0, config["width"]), dtype=np.float32), **options)
            written = arrays["faiss"]
            if mmap:
                index._index = faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(written), written.size))
                index._mapped = written
            else:
                index._index = faiss.deserialize_index(written)
            index._restore(arrays, config["next_id"])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            raise InputError(f"DenseIndex.load: {path} is corrupt: {str(error).splitlines()[0]}") from error
        return index

    def _restore(self, arrays: dict[str, np.ndarray], next_id: int) -> None:
        live = arrays["live"]
        held = len(live) if self.kind == "hnsw" else int(np.count_nonzero(live))
        if live.dtype != np.bool_ or live.ndim != 1 or (self._index.ntotal, self._index.d) != (held, self._width):
            raise ValueError("the vectors do not fit the items")
        ids, slots, vectors = (arrays.get(name) for name in ("ids", "slots", "vectors"))
        if ids is not None:
            ids = as_ids("DenseIndex", ids)
            if len(ids) != len(live):
                raise ValueError(f"ids must have shape [{len(live)}], got [{len(ids)}]")
            refuse_repeats("DenseIndex", ids[live])
        if slots is not None and not np.array_equal(slots, live.nonzero()[0]):
            raise ValueError("the slots do not fit the items")
        if (vectors is not None) != bool(self._refine) or (
            vectors is not None and vectors.shape != (len(live), self._width)
        ):
            raise ValueError("the vectors kept for refining do not fit the items")
        # Changes write to these.
        self._live = live.copy()
        self._ids = None if ids is None else ids.copy()
        self._slots, self._vectors, self._next_id = slots, vectors, int(next_id)

    def _append(self, vectors: np.ndarray, slots: np.ndarray) -> None:
        if len(vectors) == 0:
            return
        if self._index.ntotal == 0:
            # Nothing is there, and perhaps nothing learned.
            self._index, self._mapped, start = self._built(vectors), None, int(slots[0])
            if self._lists() and start:
                self._index.remove_ids(_selector(np.arange(len(vectors))))
                self._index.add_with_ids(vectors, slots)
            self._slots = slots if start and not self._lists() else None
        else:
            self._own()
            if self._lists():
                self._index.add_with_ids(vectors, slots)
            else:
                self._index.add(vectors)
                if self._slots is not None:
                    self._slots = np.concatenate([self._slots, slots])
        if self._vectors is not None:
            self._vectors = np.concatenate([self._vectors, vectors])

    def _discard(self, slots: np.ndarray) -> None:
        """Take vectors out of FAISS."""
        if self._lists():
            self._index.remove_ids(_selector(slots))
            return
        if self._slots is None:
            self._slots = np.arange(self._index.ntotal)
        places = np.searchsorted(self._slots, slots)
        self._index.remove_ids(_selector(places))
        self._slots = np.delete(self._slots, places)

    def _lists(self) -> bool:
        import faiss

        return isinstance(self._index, faiss.IndexIVF)

    def _codes_view(self) -> np.ndarray:
        """The bytes of each vector, [ntotal, code_size], in FAISS's own memory."""
        import faiss

        size = self._index.code_size
        if self._index.ntotal == 0:
            return np.empty((0, size), dtype=np.uint8)
        return faiss.rev_swig_ptr(self._index.codes.data(), self._index.ntotal * size).reshape(-1, size)

    def _own(self) -> None:
        """Before a change: memory of our own instead of a mapped file, which FAISS must not try to grow."""
        if self._mapped is not None:
            import faiss

            self._index = faiss.deserialize_index(faiss.serialize_index(self._index))
            if self._vectors is not None:
                self._vectors = self._vectors.copy()
            self._mapped = None

    def _find(self, ids: np.ndarray) -> np.ndarray:
        """The slot of each id, or -1."""
        if self._ids is None:
            inside = ids < self.n_slots
            inside[inside] &= self._live[ids[inside]]
            return np.where(inside, ids, -1)
        if self._sorted is None:
            slots = self._live.nonzero()[0]
            order = np.argsort(self._ids[slots], kind="stable")
            self._sorted = self._ids[slots][order], slots[order]
        known, slots = self._sorted
        places = np.searchsorted(known, ids)
        found = places < len(known)
        found[found] &= known[places[found]] == ids[found]
        return np.where(found, slots[np.where(found, places, 0)] if len(slots) else -1, -1)


def _as_bools(mask: torch.Tensor | Bitmap) -> np.ndarray:
    """The mask [n_slots] of one query or of all: bits are spread out one query at a time."""
    return (mask.to_mask() if isinstance(mask, Bitmap) else mask).numpy()


def _threads(faiss: Any) -> None:
    faiss.omp_set_num_threads(torch.get_num_threads())


def _selector(ids: np.ndarray) -> Any:
    import faiss

    return faiss.IDSelectorBatch(np.ascontiguousarray(ids, dtype=np.int64))


def _vectors(place: str, name: str, value: Any, width: int | None) -> np.ndarray:
    tensor = as_tensor(place, name, value)
    if tensor.dtype != torch.float32:
        raise TypeError(f"{place}: {name} must be float32, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != 2 or tensor.shape[1] == 0 or (width is not None and tensor.shape[1] != width):
        raise ValueError(f"{place}: {name} must have shape [N, {width or 'D'}], got {list(tensor.shape)}")
    length = torch.linalg.vector_norm(tensor, dim=1)
    wrong = ~(length < _LONGEST)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        found = f"length {float(length[at]):.3g}" if bool(torch.isfinite(tensor[at]).all()) else "NaN or infinity"
        raise ValueError(f"{place}: {name}[{at}] must be finite and shorter than 2**60, got {found}")
    return tensor.numpy()
