"""MF: a vector for each user and each item, and the loss that decides how good that is.

Rendle, Freudenthaler, Gantner, Schmidt-Thieme, "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009,
arXiv 1205.2618; the cosine contrastive loss after Mao et al., "SimpleX: A Simple and Strong Baseline for Collaborative
Filtering", CIKM 2021, arXiv 2109.12613, who call this model MF-CCL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval.base import Retriever, against_uniform, trained_rows
from recfast.nn.losses import NegativesLoss

if TYPE_CHECKING:
    from recfast.data import Batch, Jagged, Schema


class MF(Retriever):
    r"""Matrix factorisation with many uniform negatives.

    .. math::
        \text{"bpr"}: \; s_{ui} = p_u \cdot q_i, \quad L = \frac{1}{K} \sum_{j=1}^{K} -\ln \sigma(s_{ui} - s_{uj})
        \qquad
        \text{"ccl"}: \; s_{ui} = \cos(p_u, q_i), \quad
        L = 1 - s_{ui} + \frac{w}{K} \sum_{j=1}^{K} \max(0, s_{uj} - m)

    The history of a user is not looked at: an unknown user has no scores but zeros.

    Parameters
    ----------
    schema
        Fitted, with columns of the roles "user" and "item".
    dim
        D, width of the vectors.
    loss
        "bpr" or "ccl".
    num_negatives
        K.
    shared_by
        The K items are drawn for so many rows of a batch together, which turns their scores into a matrix product; 1
        draws for each row, as published, and None for the whole batch at once.
    margin, weight
        m and w of "ccl", which belong together.
    dropout
        Of the coordinates of the user vector, in training.
    init_std
        Standard deviation of the initial weights. With "ccl", which sees directions alone, and Adam, which sees no
        scale, what counts is its ratio to the learning rate.
    seed
        Of the initial weights.

    Notes
    -----
    Settings of the published results on Gowalla: "ccl", 800 negatives, m = 0.9, w = 150, dropout 0.1, Adam, lr 1e-4,
    divided by 10 after each epoch without a gain, batches of 256, weight decay 1e-8; weights of 1e-4 to begin with,
    where 1e-3 was most of an epoch ahead here.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 64,
        loss: Literal["bpr", "ccl"] = "ccl",
        num_negatives: int = 800,
        shared_by: int | None = None,
        margin: float = 0.9,
        weight: float = 150.0,
        dropout: float = 0.1,
        init_std: float = 1e-3,
        seed: int = 0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "schema", "__class__")}
        super().__init__(schema, None, options)
        if self.user_column is None:
            raise InputError("MF: the schema has no column with the role 'user'; TwoTower does without one")
        if loss not in ("bpr", "ccl"):
            raise InputError(f"MF: loss = {loss!r} is not 'bpr' or 'ccl'")
        if (
            min(dim, num_negatives, 1 if shared_by is None else shared_by) < 1
            or not 0 <= dropout < 1
            or not init_std > 0
        ):
            raise InputError(
                f"MF: dim = {dim}, num_negatives = {num_negatives}, shared_by = {shared_by}, dropout = {dropout}, "
                f"init_std = {init_std}; expected at least 1, 1, 1 or None, a probability below 1, a number above 0"
            )
        self.kind, self.num_negatives, self.shared_by, self.dropout = loss, num_negatives, shared_by, dropout
        if loss == "bpr":
            self.criterion = NegativesLoss("bpr", reduction="none")
        else:
            # User vectors are at length 1 before dropout.
            self.criterion = NegativesLoss(
                "contrastive", normalize="table", margin=margin, weight=weight, reduction="none"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.users = nn.Parameter(torch.randn(schema.rows(self.user_column), dim) * init_std)
            self.items = nn.Parameter(torch.randn(self.rows, dim) * init_std)
        with torch.no_grad():
            self.users[0] = 0.0

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.kind == "ccl" else vectors

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        if users is None:
            users = torch.zeros(histories.offsets.shape[0] - 1, dtype=torch.int64, device=self.users.device)
        return self._scaled(self.look_up(self.users, users))

    def item_vectors(self) -> Tensor:
        return self._scaled(self.items)

    def forward(self, batch: Batch) -> Tensor:
        """Return the user vectors of a batch of positive rows, float32 [R, D]; in training with dropout."""
        vectors = self._scaled(self.look_up(self.users, batch.column(self.user_column)))
        return F.dropout(vectors, self.dropout, self.training)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of the rows' items against `num_negatives` uniform ones."""
        user, positive = trained_rows(output, batch.column(self.item_column))
        if len(positive) == 0:
            return user.sum()
        self.criterion.sparse = self.sparse_gradients
        return against_uniform(self.criterion, user, positive, self.items, self.num_negatives, self.shared_by)
