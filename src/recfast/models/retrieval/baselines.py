"""The retrievers that every other one has to beat: popularity, and neighbours of the items in the history.

Sarwar, Karypis, Konstan, Riedl, "Item-based Collaborative Filtering Recommendation Algorithms", WWW 2001.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval.base import Retriever
from recfast.nn.history import recent_events

if TYPE_CHECKING:
    from recfast.data import Batch, Dataset, Jagged, Schema

# Pairs of items counted at once: 64 MB for each of a few int64 arrays.
_PAIRS = 1 << 23


class Popularity(Retriever):
    """The same list for everyone: the score of an item is the number of its train positives.

    There is nothing to train; `prepare(dataset)` counts.

    Parameters
    ----------
    schema
        Fitted, with a column of the role "item".
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__(schema, None, {})

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        return torch.ones(histories.offsets.shape[0] - 1, 1, device=self.counts.device)

    def item_vectors(self) -> Tensor:
        return self.counts.float()[:, None]


class ItemKNN(Retriever):
    r"""Scores an item by its similarity to the items of the history.

    .. math::
        s_{ui} = \sum_{j \in u,\, j \in N_k(i)} \gamma^{\mathrm{age}(j)}\, \mathrm{sim}_{ij}, \qquad
        \mathrm{sim}_{ij} = \frac{n_{ij}}{\sqrt{n_i n_j} + \lambda}

    :math:`n_{ij}` is the number of users with both items among their train positives, :math:`N_k(i)` the k items most
    similar to i, ties by the lowest id. There is nothing to train; `prepare(dataset)` computes the neighbours.

    The score is a dot product here too: the user vector [rows(item)] holds :math:`\gamma^{\mathrm{age}}`, and the item
    vectors are the rows of a sparse matrix. So user vectors are wide: ask for a block of users at a time.

    Parameters
    ----------
    schema
        Fitted, with a column of the role "item".
    neighbors
        k. For each item to be scored, not for each item of the history.
    shrinkage
        :math:`\lambda`, at least 0; makes pairs seen together by few users less similar.
    decay
        :math:`\gamma` in (0, 1]; 1 forgets the order.
    max_length
        Only the last so many items of a history; None for all.

    Notes
    -----
    Time grows with the sum over users of the squared number of their positives; memory with the number of positives
    and `neighbors` times items.
    """

    neighbor_ids: Tensor
    """int64 [rows(item), k], 0 where an item has fewer neighbours."""
    similarity: Tensor
    """float32 [rows(item), k], falling along a row."""

    def __init__(
        self,
        schema: Schema,
        *,
        neighbors: int = 200,
        shrinkage: float = 0.0,
        decay: float = 0.9,
        max_length: int | None = None,
    ) -> None:
        options = {"neighbors": neighbors, "shrinkage": shrinkage, "decay": decay, "max_length": max_length}
        super().__init__(schema, None, options)
        if neighbors < 1 or shrinkage < 0 or not 0 < decay <= 1 or (max_length is not None and max_length < 1):
            raise InputError(
                f"ItemKNN: neighbors = {neighbors}, shrinkage = {shrinkage}, decay = {decay}, max_length = "
                f"{max_length}; expected at least 1, at least 0, a number in (0, 1], at least 1 or None"
            )
        self.shrinkage, self.decay, self.max_length = float(shrinkage), float(decay), max_length
        k = min(neighbors, self.rows)
        self.register_buffer("neighbor_ids", torch.zeros(self.rows, k, dtype=torch.int64))
        self.register_buffer("similarity", torch.zeros(self.rows, k))
        self._turned: tuple[tuple[int, int], tuple[Tensor, Tensor, Tensor]] | None = None

    def prepare(self, dataset: Dataset) -> None:
        """Count the items and find the neighbours of each."""
        super().prepare(dataset)
        ids, similarity = nearest_items(
            *dataset.history("train"), self.rows, self.neighbor_ids.shape[1], shrinkage=self.shrinkage
        )
        self.neighbor_ids.copy_(torch.from_numpy(ids))
        self.similarity.copy_(torch.from_numpy(similarity))

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        events = recent_events(histories.values, histories.offsets, self.max_length)
        vectors = torch.zeros(histories.offsets.shape[0] - 1, self.rows, device=self.similarity.device)
        weight = torch.pow(self.decay, events.age.to(vectors.dtype))
        # Of an item that comes twice, the later one counts.
        vectors.view(-1).scatter_reduce_(0, events.owner * self.rows + events.ids, weight, "amax")
        return vectors

    def item_vectors(self) -> Tensor:
        """Return the similarities, float32 sparse [rows(item), rows(item)]."""
        item, place = self.similarity.nonzero(as_tuple=True)
        index = torch.stack([item, self.neighbor_ids[item, place]])
        return torch.sparse_coo_tensor(
            index, self.similarity[item, place], (self.rows, self.rows), check_invariants=True
        ).coalesce()

    def scores(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        """Return the scores of all items, float32 [B, rows(item)], from the lists of whose neighbour an item is."""
        targets, similarity, offsets = self._by_neighbor()
        vectors = self.user_vectors(histories, users)
        owner, item = vectors.nonzero(as_tuple=True)
        count = offsets[item + 1] - offsets[item]
        inside = torch.arange(int(count.sum()), device=item.device) - (count.cumsum(0) - count).repeat_interleave(count)
        place = offsets[item].repeat_interleave(count) + inside
        scores = torch.zeros_like(vectors)
        cell = (owner * self.rows).repeat_interleave(count) + targets[place]
        scores.view(-1).index_add_(0, cell, vectors[owner, item].repeat_interleave(count) * similarity[place])
        scores[:, 0] = -torch.inf
        return scores

    def _by_neighbor(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return whose neighbour an item is: targets int64 [n], similarities float32 [n], offsets int64 [rows + 1]."""
        version = self.similarity._version, self.neighbor_ids._version
        if self._turned is None or self._turned[0] != version:
            item, place = self.similarity.nonzero(as_tuple=True)
            neighbor = self.neighbor_ids[item, place]
            order = torch.argsort(neighbor, stable=True)
            offsets = F.pad(torch.bincount(neighbor, minlength=self.rows).cumsum(0), (1, 0))
            self._turned = version, (item[order], self.similarity[item, place][order], offsets)
        return self._turned[1]

    def forward(self, batch: Batch) -> Tensor:
        """Return the user vectors of a batch, float32 [R, rows(item)]."""
        return self.user_vectors(self.histories(batch))


def nearest_items(
    values: Tensor, offsets: Tensor, rows: int, k: int, *, shrinkage: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return each item's `k` most similar items by shrunken cosine over users' lists.

    Parameters
    ----------
    values, offsets
        int64 [T] and [U + 1], the items of each user; repeats count once, id 0 not at all.
    rows
        Item ids are below it.
    k
        Neighbours kept.
    shrinkage
        Added to the denominator.

    Returns
    -------
    ids, similarity
        int64 and float32 [rows, k], most similar first, ties by the lowest id, padded with 0.
    """
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets.numpy()))
    pairs = np.unique(user * rows + values.numpy())
    pairs = pairs[pairs % rows != 0]
    user, item = pairs // rows, pairs % rows
    length = np.bincount(user, minlength=len(offsets) - 1)
    start = np.cumsum(length) - length
    root = np.sqrt(np.bincount(item, minlength=rows).astype(np.float64))
    by_item = np.argsort(item, kind="stable")
    owner, target = user[by_item], item[by_item]
    # An item is paired with everything its users have; blocks of whole items, each of a bounded number of pairs.
    work = np.concatenate([[0], np.cumsum(length[owner])])
    item_end = np.flatnonzero(np.append(np.diff(target) != 0, len(target) > 0)) + 1
    ids = np.zeros((rows, k), dtype=np.int64)
    similarity = np.zeros((rows, k), dtype=np.float32)
    begin = 0
    while begin < len(target):
        fitting = item_end[(item_end > begin) & (work[item_end] - work[begin] <= _PAIRS)]
        end = int(fitting[-1]) if len(fitting) else int(item_end[item_end > begin][0])
        size = length[owner[begin:end]]
        inside = np.arange(work[end] - work[begin]) - np.repeat(work[begin:end] - work[begin], size)
        other = item[np.repeat(start[owner[begin:end]], size) + inside]
        key, count = np.unique(np.repeat(target[begin:end], size) * rows + other, return_counts=True)
        i, j = key // rows, key % rows
        i, j, count = i[i != j], j[i != j], count[i != j]
        close = count / (root[i] * root[j] + shrinkage)
        order = np.lexsort((j, -close, i))
        i, j, close = i[order], j[order], close[order]
        rank = np.arange(len(i)) - np.searchsorted(i, i)
        kept = rank < k
        ids[i[kept], rank[kept]] = j[kept]
        similarity[i[kept], rank[kept]] = close[kept]
        begin = end
    return ids, similarity
