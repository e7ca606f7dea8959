"""kNN-Embed: a user as a mixture of interests, each of which asks for its share of the candidates.

El-Kishky, Markovich, Leung, Portman, Haghighi, Xiao, "kNN-Embed: Locally Smoothed Embedding Mixtures for Multi-interest
Candidate Retrieval", arXiv 2205.06205.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval._interactions import distinct
from recfast.nn.top_k import top_k

if TYPE_CHECKING:
    from recfast.data import Dataset, Jagged
    from recfast.models.retrieval.base import Retriever

_BLOCK = 256


class Mixture(NamedTuple):
    """The interests of B users, heaviest first.

    clusters
        int64 [B, m].
    weight
        float32 [B, m], falling, the sum of a row is 1; 0 where a user has fewer interests.
    centres
        float32 [B, m, D], of length 1.
    """

    clusters: Tensor
    weight: Tensor
    centres: Tensor


class KNNEmbed:
    r"""Candidates for many interests of a user, from the vectors of any trained retriever; there is nothing to train.

    Items are clustered (spherical k-means, FAISS). A user is a mixture of clusters, smoothed over the k nearest users:

    .. math::
        \tilde p(i|u) = (1 - \lambda) \frac{[i \in u]}{n_u} + \frac{\lambda}{k} \sum_{u' \in kNN(u)}
        \frac{[i \in u']}{n_{u'}}, \qquad
        \tilde p(c|u) = \sum_{i \in c} \tilde p(i|u), \qquad
        \mu_{u,c} = \sum_{i \in c} \frac{\tilde p(i|u)}{\tilde p(c|u)}\, v_i

    Of N candidates, each of the m heaviest clusters finds :math:`N \tilde p(c|u)` (the shares made to sum to 1, rounded
    by largest remainder), by an exact search of all items with its centre; an item is taken once.

    Parameters
    ----------
    model
        A trained retriever with `user_vectors` and `item_vectors` of one width. A column of biases among them (as of
        `TwoTower` with `item_bias`) would be averaged like any other: train without.
    dataset
        Its data.
    clusters
        Of the items.
    components
        m.
    neighbors
        k; the nearest by the cosine of user vectors.
    smoothing
        :math:`\lambda` in [0, 1].
    own
        Share of the user's own vector in each centre, in [0, 1]: 0 as in the paper, 1 asks the model's own query in
        every component. With the vectors of an MF trained on Gowalla 0 and 0.5 found fewer of the users' items than
        the one query does, 0.7 and 0.8 more: on users other than those who chose, Recall@50 of .2871 against .2844
        (the difference has a standard error of .0009), and at 200 candidates no more than noise.
    upto
        The splits whose positives are the users' items, as `Dataset.history` takes it.
    iterations, seed
        Of the k-means.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Retriever,
        dataset: Dataset,
        *,
        clusters: int = 64,
        components: int = 20,
        neighbors: int = 10,
        smoothing: float = 0.5,
        own: float = 0.7,
        upto: str = "train",
        iterations: int = 20,
        seed: int = 0,
    ) -> None:
        import faiss

        rows = dataset.schema.rows(dataset.schema.item)
        if min(clusters, components, neighbors, iterations) < 1 or not 0 <= smoothing <= 1 or not 0 <= own <= 1:
            raise InputError(
                f"KNNEmbed: clusters = {clusters}, components = {components}, neighbors = {neighbors}, iterations = "
                f"{iterations}, smoothing = {smoothing}, own = {own}; expected four of at least 1 and two in [0, 1]"
            )
        if clusters > rows - 1:
            raise InputError(f"KNNEmbed: clusters = {clusters}, and there are {rows - 1} items")
        was_training = model.training
        model.eval()
        self.items = model.item_vectors().float().cpu()
        self.history = distinct(dataset.history(upto), rows, place="KNNEmbed")
        everyone = torch.arange(self.history.offsets.shape[0] - 1)
        self.users = torch.cat(
            [
                F.normalize(model.user_vectors(self.history.take(part), part).float().cpu(), dim=1)
                for part in everyone.split(_BLOCK)
            ]
        )
        model.train(was_training)
        if self.users.shape[1] != self.items.shape[1]:
            raise InputError(
                f"KNNEmbed: user vectors are {self.users.shape[1]} wide and item vectors {self.items.shape[1]}"
            )
        self.n_clusters, self.components = clusters, min(components, clusters)
        self.neighbors = min(neighbors, max(len(everyone) - 2, 1))
        self.smoothing, self.own = smoothing, own
        directions = F.normalize(self.items, dim=1)
        options = {"niter": iterations, "seed": seed, "spherical": True, "min_points_per_centroid": 1}
        kmeans = faiss.Kmeans(directions.shape[1], clusters, max_points_per_centroid=rows, **options)
        # FAISS has one number of threads for the whole process, which is somebody else's.
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            kmeans.train(directions[1:].numpy())
        finally:
            faiss.omp_set_num_threads(before)
        self.cluster = (directions @ torch.from_numpy(kmeans.centroids).T).argmax(1)
        """int64 [rows(item)], the cluster of each item."""

    @torch.no_grad()
    def mixture(self, users: Tensor) -> Mixture:
        """Return the interests of users, int64 [B]; weights are 0 where neither the user nor a neighbour has items."""
        asked = self.users[users]
        nearness = asked @ self.users.T
        nearness[:, 0] = -torch.inf
        nearness[torch.arange(len(users)), users] = -torch.inf
        near = nearness.topk(min(self.neighbors, nearness.shape[1]), dim=1).indices
        sources = torch.cat([users[:, None], near], dim=1)
        share = torch.full(sources.shape, self.smoothing / near.shape[1])
        share[:, 0] = 1.0 - self.smoothing
        taken = self.history.take(sources.flatten())
        counts = taken.lengths()
        weight = (share.flatten() / counts.clamp(min=1)).repeat_interleave(counts)
        owner = torch.arange(len(users)).repeat_interleave(sources.shape[1]).repeat_interleave(counts)
        cell = owner * self.n_clusters + self.cluster[taken.values]
        cells = len(users) * self.n_clusters
        mass = weight.new_zeros(cells).index_add(0, cell, weight).view(len(users), self.n_clusters)
        heaviest, clusters = top_k(mass, self.components)
        # Only the clusters that are kept get a centre.
        slot = torch.full((cells,), -1)
        slot[(torch.arange(len(users))[:, None] * self.n_clusters + clusters).flatten()] = torch.arange(
            clusters.numel()
        )
        kept = (slot[cell] >= 0).nonzero()[:, 0]
        rows = weight[kept, None] * self.items[taken.values[kept]]
        centres = rows.new_zeros(clusters.numel(), rows.shape[1]).index_add(0, slot[cell[kept]], rows)
        centres = F.normalize(centres, dim=1).view(*clusters.shape, self.items.shape[1])
        centres = F.normalize(self.own * asked[:, None] + (1.0 - self.own) * centres, dim=2)
        total = heaviest.sum(1, keepdim=True)
        return Mixture(clusters, heaviest / torch.where(total > 0, total, 1.0), centres)

    @torch.no_grad()
    def candidates(self, users: Tensor, k: int, *, masked: Jagged | None = None) -> Tensor:
        """Return the k candidates of each user, int64 [B, k], padded with -1.

        Parameters
        ----------
        users
            int64 [B]. One without any interest is asked for by the model's own vector.
        k
            N.
        masked
            By user id, items that are no candidates, such as `dataset.seen("train")`.

        Notes
        -----
        The candidates of the interests are interleaved by how far each has got through its share, heavier ones first.
        Memory: 256 users times m times items.
        """
        found = [self._candidates(part, k, masked) for part in users.split(_BLOCK)]
        return torch.cat(found) if found else torch.zeros(0, k, dtype=torch.int64)

    def _candidates(self, users: Tensor, k: int, masked: Jagged | None) -> Tensor:
        mixture = self.mixture(users)
        weight, centres = mixture.weight.clone(), mixture.centres.clone()
        lost = weight.sum(1) == 0
        weight[lost, 0] = 1.0
        centres[lost, 0] = self.users[users[lost]]
        quota = shares(weight, k)
        barred = torch.zeros(len(users), len(self.items), dtype=torch.bool)
        barred[:, 0] = True
        if masked is not None:
            old = masked.take(users)
            barred[torch.arange(len(users)).repeat_interleave(old.lengths()), old.values] = True
        ids, progress = [], []
        for j in range(weight.shape[1]):
            # Light interests ask for nothing for most users.
            rows = quota[:, j].nonzero()[:, 0]
            if len(rows) == 0:
                continue
            wanted = quota[rows, j]
            most = int(wanted.max())
            scores = (centres[rows, j] @ self.items.T).masked_fill_(barred[rows], -torch.inf)
            found = top_k(scores, most)[1]
            rank = torch.arange(most)
            found = found.masked_fill(rank >= wanted[:, None], -1)
            user, place = (found >= 0).nonzero().T
            barred[rows[user], found[user, place]] = True
            best = torch.full((len(users), most), -1)
            best[rows] = found
            ids.append(best)
            progress.append(((rank + 1.0) / quota[:, j, None].clamp(min=1)).masked_fill(best < 0, torch.inf))
        if not ids:
            return torch.full((len(users), k), -1)
        order = torch.cat(progress, dim=1).argsort(dim=1, stable=True)[:, :k]
        merged = torch.cat(ids, dim=1).gather(1, order)
        return F.pad(merged, (0, k - merged.shape[1]), value=-1)


def shares(weight: Tensor, total: int) -> Tensor:
    """Split `total` by rows of weights that sum to 1, float [B, m], rounded by largest remainder: int64 [B, m]."""
    exact = weight.double() * total
    whole = exact.floor()
    left = (total - whole.sum(1)).round().long()
    # Ties go to the heavier interest, which comes first.
    place = (exact - whole).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (whole + (place < left[:, None])).long()
