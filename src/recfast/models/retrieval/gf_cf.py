"""GF-CF: collaborative filtering as a filter of graph signals, in closed form.

Shen, Wu, Zhang, Shan, Zhang, Letaief, Li, "How Powerful is Graph Convolution for Recommendation?", CIKM 2021,
arXiv 2108.07567.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recfast.errors import InputError
from recfast.models.retrieval._interactions import HistoryFilter, as_columns, inverse_root
from recfast.nn.history import segment_sum

if TYPE_CHECKING:
    from recfast.data import Dataset, Jagged, Schema

# Directions beside those asked for: the last ones wanted come out as fast as their distance from the first unwanted.
_BESIDE = 64


class GFCF(HistoryFilter):
    r"""A linear low-pass filter and an ideal one, over the graph of who has what.

    .. math::
        \tilde R = D_u^{-1/2} X D_i^{-1/2}, \qquad
        s = x\, \tilde R^T \tilde R + a\, x\, D_i^{-1/2} V V^T D_i^{1/2}

    :math:`x` is a history as zeros and ones, :math:`V` holds the first singular vectors of :math:`\tilde R` on the side
    of the items. The first term stands as in the authors' program, with :math:`x` and not its row of
    :math:`\tilde R`. There is nothing to train; `prepare(dataset)` finds V.

    Any history is scored, that of a new user as well. The score is asked of `scores`: it is no dot product of narrow
    vectors, and `user_vectors` and `item_vectors` refuse.

    Parameters
    ----------
    schema
        Fitted, with columns of the roles "user" and "item".
    rank
        Columns of V.
    ideal
        a, the weight of the ideal filter; 0 leaves it out.
    iterations
        Steps of the subspace iteration that finds V.
    seed
        Of its start.

    Notes
    -----
    On Gowalla (LightGCN's split) rank 256 and a = 0.3, as published; the authors took a = 0 for Amazon-Books.

    The item-item matrix of the linear filter is never formed: memory is that of the train positives, rank times items,
    and, while scoring, 64 times users and items.
    """

    basis: Tensor
    """float32 [rows(item), rank], V."""

    def __init__(
        self, schema: Schema, *, rank: int = 256, ideal: float = 0.3, iterations: int = 30, seed: int = 0
    ) -> None:
        super().__init__(schema, {"rank": rank, "ideal": ideal, "iterations": iterations, "seed": seed})
        if rank < 1 or not 0 <= ideal < float("inf") or iterations < 1:
            raise InputError(
                f"GFCF: rank = {rank}, ideal = {ideal}, iterations = {iterations}; expected at least 1, 0, 1"
            )
        self.ideal, self.iterations, self.seed = float(ideal), iterations, seed
        self.register_buffer("basis", torch.zeros(self.rows, min(rank, *self.interactions.shape)))

    @torch.no_grad()
    def prepare(self, dataset: Dataset) -> None:
        """Read who has what, and find the singular vectors."""
        super().prepare(dataset)
        if self.ideal > 0:
            self.basis.copy_(self._singular_vectors(self.basis.shape[1]))

    def _singular_vectors(self, rank: int) -> Tensor:
        """Return the first right singular vectors of the normalised matrix, float32 [rows(item), rank]."""
        graph = self.interactions
        by_item = inverse_root(graph.item_degrees())[:, None]
        by_user = inverse_root(graph.user_degrees())[:, None] ** 2
        width = min(rank + _BESIDE, *graph.shape)
        generator = torch.Generator().manual_seed(self.seed)
        basis = torch.randn(self.rows, width, generator=generator).to(by_item.device)
        for _ in range(self.iterations):
            basis = torch.linalg.qr(basis).Q
            image = by_item * graph.of_users(by_user * graph.of_items(by_item * basis))
            # Within the subspace the directions are those of its own small problem.
            _, turn = torch.linalg.eigh(basis.T @ image)
            basis = image @ turn.flip(1)
        return torch.linalg.qr(basis).Q[:, :rank].contiguous()

    def _scores(self, histories: Jagged, users: Tensor) -> Tensor:
        graph = self.interactions
        degrees = graph.item_degrees()
        by_item = inverse_root(degrees)
        by_user = inverse_root(graph.user_degrees())[:, None] ** 2
        linear = by_item[:, None] * graph.of_users(by_user * graph.of_items(as_columns(histories, by_item)))
        if self.ideal == 0:
            return linear
        owner = torch.repeat_interleave(histories.offsets.diff())
        rows = by_item[histories.values, None] * self.basis[histories.values]
        place = segment_sum(rows, owner, len(users))
        return linear.addmm_(degrees.sqrt()[:, None] * self.basis, place.T, alpha=self.ideal)

    def similarity_vectors(self) -> Tensor:
        """Return V, whose rows are alike for items that the ideal filter takes for one another."""
        return self.basis
