"""LightGCN: embeddings of users and items, smoothed over the graph of who has what.

He, Deng, Wang, Li, Zhang, Wang, "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
SIGIR 2020, arXiv 2002.02126.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval._interactions import Interactions, inverse_root
from recfast.models.retrieval.base import Retriever, trained_rows

if TYPE_CHECKING:
    from recfast.data import Batch, Dataset, Jagged, Schema


class LightGCN(Retriever):
    r"""Matrix factorisation whose vectors are means over layers of neighbours.

    .. math::
        E^{(k+1)} = D^{-1/2} A D^{-1/2} E^{(k)}, \qquad E = \frac{1}{K+1} \sum_{k=0}^{K} E^{(k)}, \qquad
        s_{ui} = E_u \cdot E_i

    :math:`A` is the adjacency of users and items by the train positives, without loops; layer 0 counts as much as any.
    Trained by BPR with one negative, and :math:`\frac{\lambda}{2B}\sum |E^{(0)}|^2` over the batch's rows of layer 0.

    The history given to `user_vectors` is not looked at: the graph is that of `prepare`. An unknown user has no scores
    but zeros.

    Parameters
    ----------
    schema
        Fitted, with columns of the roles "user" and "item".
    dim
        D, width of the vectors.
    layers
        K.
    l2
        :math:`\lambda`.
    sampling
        "users": as in the authors' program, a step draws as many users as the batch has rows, uniformly, one of the
        items of each, and an item the user does not have. "rows": the users and items of the batch itself, so that
        a user counts as often as it has items.
    init_std
        Standard deviation of the initial weights.
    seed
        Of the initial weights.

    Notes
    -----
    Settings of the published results: dim 64, 3 layers, lambda = 1e-4, Adam, lr 1e-3, batches of 2048, 1,000 epochs,
    no dropout.

    A step goes over the whole graph 2 K times: D-wide sums over the train positives, forward and backward.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 64,
        layers: int = 3,
        l2: float = 1e-4,
        sampling: Literal["users", "rows"] = "users",
        init_std: float = 0.1,
        seed: int = 0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "schema", "__class__")}
        super().__init__(schema, None, options)
        if self.user_column is None:
            raise InputError("LightGCN: the schema has no column with the role 'user', whose items are the graph")
        if sampling not in ("users", "rows"):
            raise InputError(f"LightGCN: sampling = {sampling!r} is not 'users' or 'rows'")
        if dim < 1 or layers < 0 or l2 < 0 or not init_std > 0:
            raise InputError(
                f"LightGCN: dim = {dim}, layers = {layers}, l2 = {l2}, init_std = {init_std}; expected at least 1, 0, "
                "0, and a number above 0"
            )
        self.layers, self.l2, self.sampling = layers, l2, sampling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.users = nn.Parameter(torch.randn(schema.rows(self.user_column), dim) * init_std)
            self.items = nn.Parameter(torch.randn(self.rows, dim) * init_std)
        with torch.no_grad():
            self.users[0] = 0.0
        self.interactions = Interactions(len(self.users), self.rows)
        self._known: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self._pairs: Tensor | None = None

    def prepare(self, dataset: Dataset) -> None:
        """Count the items, and read who has what in the train split."""
        super().prepare(dataset)
        self.interactions.fill(dataset)
        self._known = self._pairs = None

    def train(self, mode: bool = True) -> LightGCN:
        """As of any module; what is known of the vectors is forgotten."""
        # Not every optimiser counts up the version of a parameter: fused ones do not.
        self._known = None
        return super().train(mode)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Return the vectors of all users and all items, float32 [rows(user), D] and [rows(item), D]."""
        if len(self.interactions) == 0:
            raise InputError("LightGCN: it knows nobody's items yet: call prepare(dataset) first")
        if torch.is_grad_enabled():
            return _Smoothed.apply(self.users, self.items, self.interactions, self.layers)
        # Asked for once for each block of users, while the weights stay what they are.
        version = self.users._version, self.items._version
        if self._known is None or self._known[0] != version:
            self._known = version, smooth(self.users, self.items, self.interactions, self.layers)
        return self._known[1]

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        if users is None:
            users = torch.zeros(histories.offsets.shape[0] - 1, dtype=torch.int64, device=self.users.device)
        return self.vectors()[0].index_select(0, users)

    def item_vectors(self) -> Tensor:
        return self.vectors()[1]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the vectors of all users and all items: the graph mixes them, whatever the batch."""
        return self.vectors()

    def loss(self, output: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Return the mean BPR loss of as many triples as the batch has rows, with the penalty of their layer 0."""
        if self.sampling == "users":
            user, positive = self._draw_users(len(batch))
        else:
            user, positive = trained_rows(batch.column(self.user_column), batch.column(self.item_column))
            if len(positive) == 0:
                return output[0].sum() * 0.0
        negative = self._draw_negatives(user)
        both = torch.cat([positive, negative])
        u, (own, other) = output[0].index_select(0, user), output[1].index_select(0, both).chunk(2)
        ranking = F.softplus((u * other).sum(1) - (u * own).sum(1)).mean()
        start = self.users.index_select(0, user).square().sum() + self.items.index_select(0, both).square().sum()
        return ranking + 0.5 * self.l2 * start / len(user)

    def _draw_users(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw users who have items, uniformly, and one item of each."""
        graph = self.interactions
        having = graph.user_offsets.diff().nonzero()[:, 0]
        user = having[torch.randint(len(having), (count,), device=having.device)]
        begin, end = graph.user_offsets[user], graph.user_offsets[user + 1]
        place = begin + (torch.rand(count, device=user.device, dtype=torch.float64) * (end - begin)).long()
        return user, graph.items[torch.minimum(place, end - 1)].long()

    def _draw_negatives(self, user: Tensor) -> Tensor:
        """Draw an item for each user that the user does not have; one who has nearly all may get one of them."""
        graph = self.interactions
        if self._pairs is None:
            owner = torch.repeat_interleave(graph.user_offsets.diff())
            self._pairs = owner * self.rows + graph.items
        item = torch.randint(1, self.rows, user.shape, device=user.device)
        for _ in range(20):
            pair = user * self.rows + item
            place = torch.searchsorted(self._pairs, pair).clamp(max=len(self._pairs) - 1)
            again = (self._pairs[place] == pair).nonzero()[:, 0]
            if len(again) == 0:
                break
            item[again] = torch.randint(1, self.rows, again.shape, device=user.device)
        return item


def smooth(users: Tensor, items: Tensor, graph: Interactions, layers: int) -> tuple[Tensor, Tensor]:
    """Return the means over the layers, float32 [rows(user), D] and [rows(item), D]; no gradient."""
    by_user = inverse_root(graph.user_degrees())[:, None]
    by_item = inverse_root(graph.item_degrees())[:, None]
    total_users, total_items = users.detach().clone(), items.detach().clone()
    u, i = total_users, total_items
    for _ in range(layers):
        u, i = by_user * graph.of_items(by_item * i), by_item * graph.of_users(by_user * u)
        total_users += u
        total_items += i
    return total_users.div_(layers + 1), total_items.div_(layers + 1)


class _Smoothed(torch.autograd.Function):
    """`smooth` with its gradient, which is `smooth` of the gradient: a polynomial of a symmetric matrix."""

    @staticmethod
    def forward(ctx, users, items, graph, layers):
        ctx.graph, ctx.layers = graph, layers
        return smooth(users, items, graph, layers)

    @staticmethod
    def backward(ctx, users, items):
        return *smooth(users, items, ctx.graph, ctx.layers), None, None
