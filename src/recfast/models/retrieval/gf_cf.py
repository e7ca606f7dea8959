"""GF-CF: collaborative filtering as a filter of graph signals, in closed form.

Shen, Wu, Zhang, Shan, Zhang, Letaief, Li, "How Powerful is Graph Convolution for Recommendation?", CIKM 2021,
arXiv 2108.07567.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recfast.errors import InputError
from recfast.models.retrieval._interactions import COLUMNS, Interactions, columns_of, inverse_root
from recfast.models.retrieval.base import Retriever

if TYPE_CHECKING:
    from recfast.data import Dataset, Jagged, Schema

# Directions beside those asked for: the last ones wanted come out as fast as their distance from the first unwanted.
_BESIDE = 64


class GFCF(Retriever):
    r"""A linear low-pass filter and an ideal one, over the graph of who has what.

    .. math::
        \tilde R = D_u^{-1/2} X D_i^{-1/2}, \qquad
        s = x\, \tilde R^T \tilde R + a\, x\, D_i^{-1/2} V V^T D_i^{1/2}

    :math:`x` is a history as zeros and ones, :math:`V` holds the first singular vectors of :math:`\tilde R` on the side
    of the items. The first term stands as in the authors' program, with :math:`x` and not its row of
    :math:`\tilde R`. There is nothing to train; `prepare(dataset)` finds V.

    Any history is scored, that of a new user as well. The score is no dot product of narrow vectors: it is asked of
    `scores`, and `user_vectors` and `item_vectors` refuse.

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
        options = {"rank": rank, "ideal": ideal, "iterations": iterations, "seed": seed}
        super().__init__(schema, None, options)
        if self.user_column is None:
            raise InputError("GFCF: the schema has no column with the role 'user', whose items are the graph")
        if rank < 1 or not 0 <= ideal < float("inf") or iterations < 1:
            raise InputError(
                f"GFCF: rank = {rank}, ideal = {ideal}, iterations = {iterations}; expected at least 1, 0, 1"
            )
        users = schema.rows(self.user_column)
        self.ideal, self.iterations, self.seed = float(ideal), iterations, seed
        self.interactions = Interactions(users, self.rows)
        self.register_buffer("basis", torch.zeros(self.rows, min(rank, users, self.rows)))

    @torch.no_grad()
    def prepare(self, dataset: Dataset) -> None:
        """Read who has what, and find the singular vectors."""
        super().prepare(dataset)
        self.interactions.fill(dataset)
        if self.ideal > 0:
            self.basis.copy_(self._singular_vectors(self.basis.shape[1]))

    def _singular_vectors(self, rank: int) -> Tensor:
        """Return the first right singular vectors of the normalised matrix by subspace iteration, [rows(item), rank]."""
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
            values, turn = torch.linalg.eigh(basis.T @ image)
            basis = image @ turn.flip(1)
        return torch.linalg.qr(basis).Q[:, :rank].contiguous()

    def scores(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        graph = self.interactions
        if len(graph) == 0:
            raise InputError("GFCF: it knows nobody's items yet: call prepare(dataset) first")
        degrees = graph.item_degrees()
        by_item = inverse_root(degrees)
        by_user = inverse_root(graph.user_degrees())[:, None] ** 2
        rows = histories.offsets.shape[0] - 1
        scores = torch.empty(rows, self.rows, device=by_item.device)
        back = degrees.sqrt()[:, None] * self.basis
        for begin in range(0, rows, COLUMNS):
            end = min(begin + COLUMNS, rows)
            part = histories.take(torch.arange(begin, end)).to(by_item.device)
            history = columns_of(part, by_item)
            found = by_item[:, None] * graph.of_users(by_user * graph.of_items(history))
            scores[begin:end] = found.T
            if self.ideal > 0:
                scores[begin:end].addmm_((self.basis.T @ history).T, back.T, alpha=self.ideal)
        scores[:, 0] = -torch.inf
        return scores

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        raise InputError("GFCF: its score is no dot product of narrow vectors; ask scores(histories, users)")

    def item_vectors(self) -> Tensor:
        raise InputError("GFCF: its score is no dot product of narrow vectors; ask scores(histories, users)")

    def similarity_vectors(self) -> Tensor:
        """Return V, whose rows are alike for items that the ideal filter takes for one another."""
        return self.basis
