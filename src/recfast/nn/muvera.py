"""Sets of vectors as one vector each, whose inner product stands for the Chamfer similarity of the sets.

Dhulipala, Hadian, Jayaram, Lee, Mirrokni, "MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings",
NeurIPS 2024, arXiv 2405.19504.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Point and cell pairs looked at once: 32 MB of int64.
_PAIRS = 1 << 22


class FixedDimensionalEncoding(nn.Module):
    r"""Turn a query's vectors Q and a document's vectors P into one vector each.

    .. math::
        \langle F_q(Q), F_d(P) \rangle \approx \mathrm{Chamfer}(Q, P) = \sum_{q \in Q} \max_{p \in P} q \cdot p

    In each of R repetitions, `bits` random hyperplanes cut space into :math:`2^{bits}` cells. A cell of the query's
    encoding holds the sum of its points there, a cell of the document's the mean of its points there, or, where it has
    none, the point whose cell differs in the fewest bits (ties: the first). So a query's point meets the point of the
    document that shares its cell. The repetitions stand one after the other; their products add up, so that a score is
    about R times the similarity.

    Queries and documents must be encoded by the same module, or by one of the same options and seed. Any index of inner
    products takes the encodings; re-rank what it finds by `chamfer`.

    Parameters
    ----------
    dim
        D, width of the points.
    repetitions
        R.
    bits
        Hyperplanes of a repetition, in [0, 16].
    projection
        d', to which points are projected by random signs in each repetition; None keeps all D coordinates.
    final_dim
        Length of the encodings in the end, by a count sketch: each coordinate is added, with a random sign, to a random
        one of these. None for all :math:`R\, 2^{bits} d'` of them.
    seed
        Of everything random here.

    Notes
    -----
    The authors use 20 repetitions, 4 to 6 bits and projections to 8 to 16. The encodings of n sets take n times
    `width` floats.
    """

    planes: Tensor
    """float32 [R, D, bits]."""

    def __init__(
        self,
        dim: int,
        repetitions: int = 20,
        bits: int = 5,
        projection: int | None = None,
        final_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (
            dim < 1
            or repetitions < 1
            or not 0 <= bits <= 16
            or min(1 if v is None else v for v in (projection, final_dim)) < 1
        ):
            raise ValueError(
                f"FixedDimensionalEncoding: dim = {dim}, repetitions = {repetitions}, bits = {bits}, projection = "
                f"{projection}, final_dim = {final_dim}; expected at least 1, 1, a number in [0, 16], and at least 1 "
                "or None twice"
            )
        self.dim, self.repetitions, self.bits, self.final_dim = dim, repetitions, bits, final_dim
        self.cells = 1 << bits
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("planes", torch.randn(repetitions, dim, bits, generator=generator))
        signs = None
        if projection is not None:
            signs = torch.randint(0, 2, (repetitions, dim, projection), generator=generator) * 2.0 - 1.0
            signs /= projection**0.5
        self.register_buffer("signs", signs)
        self.full_width = repetitions * self.cells * (projection or dim)
        target, flip = None, None
        if final_dim is not None:
            target = torch.randint(0, final_dim, (self.full_width,), generator=generator)
            flip = torch.randint(0, 2, (self.full_width,), generator=generator) * 2.0 - 1.0
        self.register_buffer("sketch_target", target)
        self.register_buffer("sketch_sign", flip)

    @property
    def width(self) -> int:
        """Length of an encoding."""
        return self.final_dim or self.full_width

    def encode_queries(self, vectors: Tensor, offsets: Tensor) -> Tensor:
        """Encode queries: sums over cells, cells without a point are zero.

        Parameters
        ----------
        vectors
            float32 [T, D], the points of the first query, of the second, ...
        offsets
            int64 [B + 1].

        Returns
        -------
        Tensor
            float32 [B, width]; differentiable in `vectors`, within the cells.
        """
        return self._encode(vectors, offsets, mean=False)

    def encode_documents(self, vectors: Tensor, offsets: Tensor) -> Tensor:
        """Encode documents: means over cells, cells without a point are filled; one without any point is zeros.

        Parameters and result as of `encode_queries`.
        """
        return self._encode(vectors, offsets, mean=True)

    def _encode(self, vectors: Tensor, offsets: Tensor, *, mean: bool) -> Tensor:
        owner = _owners("FixedDimensionalEncoding", vectors, offsets, self.dim)
        sets = len(offsets) - 1
        parts = []
        for r in range(self.repetitions):
            powers = 1 << torch.arange(self.bits, device=vectors.device)
            code = ((vectors @ self.planes[r] > 0) * powers).sum(1)
            points = vectors if self.signs is None else vectors @ self.signs[r]
            cell = owner * self.cells + code
            encoded = points.new_zeros(sets * self.cells, points.shape[1]).index_add(0, cell, points)
            if mean:
                count = torch.bincount(cell, minlength=sets * self.cells)
                encoded = encoded / count.clamp(min=1)[:, None]
                encoded = self._filled(encoded, count, points, code, offsets)
            parts.append(encoded.view(sets, -1))
        encoded = torch.cat(parts, dim=1)
        if self.final_dim is None:
            return encoded
        return encoded.new_zeros(sets, self.final_dim).index_add(1, self.sketch_target, encoded * self.sketch_sign)

    def _filled(self, encoded: Tensor, count: Tensor, points: Tensor, code: Tensor, offsets: Tensor) -> Tensor:
        """Put into each empty cell of a document the point whose cell is nearest."""
        having = offsets.diff().repeat_interleave(self.cells) > 0
        empty = ((count == 0) & having).nonzero()[:, 0]
        if len(empty) == 0:
            return encoded
        cells = torch.arange(self.cells, device=code.device)
        nearest = torch.empty(len(offsets) - 1, self.cells, dtype=torch.int64, device=code.device)
        begin, most = 0, max(1, _PAIRS // self.cells)
        while begin < len(nearest):
            # As many documents as the memory is for, and one at least.
            limit = int(torch.searchsorted(offsets, int(offsets[begin]) + most, right=True)) - 1
            end = min(max(begin + 1, limit), len(nearest))
            first, last = int(offsets[begin]), int(offsets[end])
            differing = code[first:last, None] ^ cells
            distance = sum((differing >> bit) & 1 for bit in range(max(self.bits, 1)))
            # Least distance, then first position, in one number.
            key = distance * len(code) + torch.arange(first, last, device=code.device)[:, None]
            owner = torch.repeat_interleave(offsets[begin : end + 1].diff())
            best = key.new_full((end - begin, self.cells), torch.iinfo(torch.int64).max)
            best.scatter_reduce_(0, owner[:, None].expand_as(key), key, "amin")
            nearest[begin:end] = best % max(len(code), 1)
            begin = end
        return encoded.index_copy(0, empty, points.index_select(0, nearest.view(-1)[empty]))


def chamfer(
    queries: Tensor, query_offsets: Tensor, documents: Tensor, document_offsets: Tensor, candidates: Tensor
) -> Tensor:
    r"""Return the exact similarity of queries and their candidates, float32 [B, C].

    .. math:: \sum_{q \in Q_b} \max_{p \in P_c} q \cdot p

    Parameters
    ----------
    queries, query_offsets
        float32 [T, D] and int64 [B + 1].
    documents, document_offsets
        float32 [S, D] and int64 [N + 1].
    candidates
        int64 [B, C], documents of each query; -1 pads and scores minus infinity, as does a document without points.

    Notes
    -----
    Memory: the points of one query times those of its candidates.
    """
    width = queries.shape[1]
    _owners("chamfer", queries, query_offsets, width)
    _owners("chamfer", documents, document_offsets, width)
    wrong = ((candidates < -1) | (candidates >= len(document_offsets) - 1)).nonzero()
    if len(wrong):
        b, c = wrong[0].tolist()
        raise IndexError(
            f"chamfer: candidates[{b}, {c}] = {int(candidates[b, c])} is outside [-1, {len(document_offsets) - 1})"
        )
    scores = queries.new_full(candidates.shape, -torch.inf)
    lengths = document_offsets.diff()
    for b in range(len(candidates)):
        place = (candidates[b] >= 0).nonzero()[:, 0]
        chosen = candidates[b, place]
        place, chosen = place[lengths[chosen] > 0], chosen[lengths[chosen] > 0]
        count = lengths[chosen]
        inside = torch.arange(int(count.sum()), device=count.device) - (count.cumsum(0) - count).repeat_interleave(
            count
        )
        points = documents.index_select(0, document_offsets[chosen].repeat_interleave(count) + inside)
        asked = queries[query_offsets[b] : query_offsets[b + 1]]
        owner = torch.repeat_interleave(count)
        best = queries.new_full((len(asked), len(chosen)), -torch.inf)
        best.scatter_reduce_(1, owner.expand(len(asked), -1), asked @ points.T, "amax")
        scores[b, place] = best.sum(0)
    return scores


def _owners(name: str, vectors: Tensor, offsets: Tensor, dim: int) -> Tensor:
    """Check jagged sets, and return the set of each point, int64 [T]."""
    if vectors.dim() != 2 or vectors.shape[1] != dim:
        raise ValueError(f"{name}: vectors must have shape [T, {dim}], got {list(vectors.shape)}")
    if offsets.dim() != 1 or len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(vectors):
        raise ValueError(f"{name}: offsets must go from 0 to {len(vectors)}, one more than there are sets")
    if (offsets.diff() < 0).any():
        raise ValueError(f"{name}: offsets must never fall")
    return torch.repeat_interleave(offsets.diff())
