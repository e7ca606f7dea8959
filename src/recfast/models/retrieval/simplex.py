"""SimpleX: user id and aggregated history against item vectors by cosine, many negatives, one contrastive loss.

Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong Baseline for Collaborative Filtering", CIKM 2021,
arXiv 2109.12613.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval.base import Retriever, against_uniform, trained_rows, without
from recfast.nn.history import Events, recent_events, segment_softmax, segment_sum
from recfast.nn.losses import NegativesLoss

if TYPE_CHECKING:
    from recfast.data import Batch, Dataset, Jagged, Schema

_AGGREGATIONS = ("mean", "self_attention", "user_attention")


class SimpleX(Retriever):
    r"""Retriever trained by the cosine contrastive loss.

    .. math::
        h_u = g\, e_u + (1 - g)\, V \sum_j \alpha_j e_j, \qquad s_{ui} = \cos(h_u, e_i), \qquad
        L = 1 - s_{ui} + \frac{w}{K} \sum_{k=1}^{K} \max(0, s_{uk} - m)

    with :math:`\alpha = \mathrm{softmax}(z + a_{\mathrm{age}})`, where z is 0 ("mean"),
    :math:`q \cdot \tanh(W e_j + b)` ("self_attention") or :math:`e_u \cdot \tanh(W e_j + b)` ("user_attention"); with
    `padded`, :math:`\alpha_j = e^{z_j} / (n + \sum_i e^{z_i})`.
    User vectors, item vectors and so the scores come at length 1.

    Parameters
    ----------
    schema
        Fitted; needs columns with the roles "user" and "item" and a `Sequence` of items.
    dim
        D, width of the vectors.
    sequence
        Name of the sequence; the first one if None.
    max_length
        The last so many items of a history count.
    gamma
        g, the weight of the user's id against the history, in [0, 1].
    aggregation
        How the history becomes one vector.
    padded
        Let the n empty places of a history shorter than `max_length` take part in the softmax with logit 0, as the
        authors' code has it: short histories then count less against the user's id.
    recency
        Learn a, the weight of an item by its age in the history; the paper has none (a = 0).
    history
        What a training row's history is. "earlier": the items before the positive, as in the batch; "others": all
        of the user's train positives but this one, as in the paper, which lets the future explain the past. Where the
        model is to predict what comes next, "earlier" found a sixth more on ml-100k.
    margin, weight, num_negatives
        m, w and K of the loss. The K items are drawn uniformly; a row's own positive among them does not count.
    shared_by
        They are drawn for so many rows of a batch together, which turns their scores into a matrix product; None draws
        once for the whole batch, and 1 for each row, as in the paper.
    dropout
        Of the coordinates of the user vector.
    shared_items
        One table for items in the history and as candidates; else two.
    init_std
        Standard deviation of the initial embeddings.
    seed
        Of the initial weights.

    Notes
    -----
    Settings that did well on ml-100k: Adam, lr 5e-3, batches of 512, 20 epochs.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 64,
        sequence: str | None = None,
        max_length: int = 50,
        gamma: float = 0.8,
        aggregation: Literal["mean", "self_attention", "user_attention"] = "mean",
        padded: bool = False,
        recency: bool = True,
        history: Literal["earlier", "others"] = "earlier",
        margin: float = 0.5,
        weight: float = 10.0,
        num_negatives: int = 1000,
        shared_by: int | None = None,
        dropout: float = 0.3,
        shared_items: bool = True,
        init_std: float = 0.1,
        seed: int = 0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "schema", "__class__")}
        super().__init__(schema, sequence, options)
        if self.user_column is None:
            raise InputError("SimpleX: the schema has no column with the role 'user'; TwoTower does without one")
        if aggregation not in _AGGREGATIONS:
            raise InputError(
                f"SimpleX: aggregation = {aggregation!r} is not one of {', '.join(map(repr, _AGGREGATIONS))}"
            )
        if history not in ("earlier", "others"):
            raise InputError(f"SimpleX: history = {history!r} is not 'earlier' or 'others'")
        if (
            min(dim, max_length, num_negatives, 1 if shared_by is None else shared_by) < 1
            or not 0 <= gamma <= 1
            or not 0 <= dropout < 1
        ):
            raise InputError(
                f"SimpleX: dim = {dim}, max_length = {max_length}, num_negatives = {num_negatives}, gamma = {gamma}, "
                f"dropout = {dropout}; expected at least 1, 1, 1, a number in [0, 1] and a probability below 1"
            )
        self.max_length, self.gamma, self.aggregation, self.history = max_length, gamma, aggregation, history
        self.num_negatives, self.shared_by, self.dropout = num_negatives, shared_by, dropout
        self.padded = padded
        # User vectors are at length 1 before dropout.
        self.criterion = NegativesLoss("contrastive", normalize="table", margin=margin, weight=weight, reduction="none")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.events = nn.Parameter(torch.randn(self.rows, dim) * init_std)
            self.items = self.events if shared_items else nn.Parameter(torch.randn(self.rows, dim) * init_std)
            self.users = nn.Embedding(schema.rows(self.user_column), dim, padding_idx=0)
            nn.init.normal_(self.users.weight[1:], std=init_std)
            # W and b of the attention; q is the user in "user_attention".
            self.key = None if aggregation == "mean" else nn.Linear(dim, dim)
            self.query = nn.Parameter(torch.randn(dim) / dim**0.5) if aggregation == "self_attention" else None
        self.transform = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.transform.weight)
        self.recency = nn.Parameter(torch.zeros(max_length)) if recency else None
        self._all_positives: Jagged | None = None

    def prepare(self, dataset: Dataset) -> None:
        """Count the items, and keep the users' train positives where `history` is "others"."""
        super().prepare(dataset)
        self._all_positives = dataset.history("train") if self.history == "others" else None

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        events = recent_events(histories.values, histories.offsets, self.max_length)
        count = histories.offsets.shape[0] - 1
        if users is None:
            users = torch.zeros(count, dtype=torch.int64, device=histories.offsets.device)
        user = self.look_up(self.users.weight, users, padding_idx=0)
        # Read once: each look-up would leave a gradient as large as the table.
        rows = self.look_up(self.events, events.ids)
        empty = self.max_length - events.offsets.diff() if self.padded else None
        weight = segment_softmax(self._logits(events, rows, user), events.owner, count, empty=empty)
        aggregated = segment_sum(weight[:, None] * rows, events.owner, count)
        mixed = self.gamma * user + (1.0 - self.gamma) * self.transform(aggregated)
        return F.normalize(mixed, dim=1)

    def _logits(self, events: Events, rows: Tensor, user: Tensor) -> Tensor:
        logits = user.new_zeros(events.ids.shape) if self.recency is None else self.recency[events.age]
        if self.key is not None:
            query = self.query if self.query is not None else user.index_select(0, events.owner)
            # tanh x = 2 sigmoid 2x - 1; of the two torch has the sigmoid vectorised.
            logits = logits + ((2.0 * torch.sigmoid(2.0 * self.key(rows)) - 1.0) * query).sum(1)
        return logits

    def item_vectors(self) -> Tensor:
        return F.normalize(self.items, dim=1)

    def forward(self, batch: Batch) -> Tensor:
        """Return the user vectors of a batch of positive rows, float32 [R, D]; in training with dropout."""
        users, positive = batch.column(self.user_column), batch.column(self.item_column)
        if self.history == "earlier":
            vectors = self.user_vectors(self.histories(batch), users)
        elif self._all_positives is None:
            raise InputError("SimpleX: history = 'others' needs the users' positives: call prepare(dataset) first")
        else:
            # One item more than count, for the positive may be among them.
            others = self._all_positives.take(users.cpu(), last=self.max_length + 1).to(users.device)
            vectors = self.user_vectors(without(others, positive), users)
        return F.dropout(vectors, self.dropout, self.training)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cosine contrastive loss of the rows' items against `num_negatives` uniform ones."""
        user, positive = trained_rows(output, batch.column(self.item_column))
        if len(positive) == 0:
            return user.sum()
        self.criterion.sparse = self.sparse_gradients
        return against_uniform(self.criterion, user, positive, self.items, self.num_negatives, self.shared_by)
