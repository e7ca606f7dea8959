"""EASE: a linear autoencoder over items without a diagonal, in closed form.

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, arXiv 1905.03375.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from recfast.errors import InputError
from recfast.models.retrieval._interactions import COLUMNS, HistoryFilter, as_columns
from recfast.ops import embedding_bag

if TYPE_CHECKING:
    from recfast.data import Dataset, Jagged, Schema


class EASE(HistoryFilter):
    r"""Ridge regression of every item on all others.

    .. math::
        P = (X^T X + \lambda I)^{-1}, \qquad B_{ij} = -P_{ij} / P_{jj} \; (i \ne j), \quad B_{jj} = 0, \qquad s = x B

    Where there are fewer users than items, the matrix to invert is that of the users instead, and B is never formed:

    .. math::
        K = (X X^T + \lambda I)^{-1}, \qquad P = (I - X^T K X) / \lambda, \qquad
        x P = \begin{cases} K_u X & x \text{ is row } u \text{ of } X \\ (x - x X^T K X) / \lambda & \text{else}
        \end{cases}

    and :math:`s_j = x_j - (x P)_j / P_{jj}`. Both forms give the same scores. There is nothing to train;
    `prepare(dataset)` inverts the matrix.

    Any history is scored. The score is asked of `scores`: it is no dot product of narrow vectors, and `user_vectors`
    and `item_vectors` refuse.

    Parameters
    ----------
    schema
        Fitted, with columns of the roles "user" and "item".
    ridge
        :math:`\lambda`, above 0.
    form
        "primal" keeps B, "dual" keeps K; "auto", the smaller of the two.

    Notes
    -----
    On Gowalla (LightGCN's split) the published :math:`\lambda` is 80.

    With n the smaller number: n^2 floats of memory, in which the inverse is taken in place, and n^3 multiplications. A
    history other than the user's own train positives costs the dual form n^2 multiplications more.
    """

    weights: Tensor
    """float32 [rows(item), rows(item)], B; [0, 0] in the dual form."""
    inverse: Tensor
    """float32 [rows(user), rows(user)], K; [0, 0] in the primal form."""
    diagonal: Tensor
    """float32 [rows(item)], the P_jj; in the dual form."""

    def __init__(
        self, schema: Schema, *, ridge: float = 80.0, form: Literal["auto", "primal", "dual"] = "auto"
    ) -> None:
        super().__init__(schema, {"ridge": ridge, "form": form})
        if form not in ("auto", "primal", "dual"):
            raise InputError(f"EASE: form = {form!r} is not 'auto', 'primal' or 'dual'")
        if not 0 < ridge < float("inf"):
            raise InputError(f"EASE: ridge = {ridge} is not above 0")
        users, items = self.interactions.shape
        self.ridge, self.dual = float(ridge), form == "dual" or (form == "auto" and users < items)
        self.register_buffer("weights", torch.zeros(0 if self.dual else items, 0 if self.dual else items))
        self.register_buffer("inverse", torch.zeros(users if self.dual else 0, users if self.dual else 0))
        self.register_buffer("diagonal", torch.zeros(items if self.dual else 0))

    @torch.no_grad()
    def prepare(self, dataset: Dataset) -> None:
        """Read who has what, and invert the matrix.

        Raises
        ------
        InputError
            The inverse is not accurate enough in float32; a larger `ridge` helps. The model is unprepared then.
        """
        super().prepare(dataset)
        # What a model knows by its counts, it knows once the inverse is there.
        counts = self.counts.clone()
        self.counts.zero_()
        self._solve()
        self.counts.copy_(counts)

    def _solve(self) -> None:
        graph = self.interactions
        if self.dual:
            products = (lambda unit: graph.of_items(graph.of_users(unit)), self.inverse)
        else:
            products = (lambda unit: graph.of_users(graph.of_items(unit)), self.weights)
        self._invert(*products)
        if self.dual:
            self.diagonal.copy_((1.0 - self._quadratic()) / self.ridge)
            diagonal = self.diagonal
        else:
            diagonal = self.weights.diagonal().clone()
        # In exact arithmetic it lies in (0, 1 / ridge].
        if not (diagonal > 0).all():
            item = int((~(diagonal > 0)).nonzero()[0])
            raise InputError(
                f"EASE: the inverse lost its accuracy: P[{item}, {item}] = {float(diagonal[item]):g}, expected above "
                f"0; ridge = {self.ridge} is too small for these data"
            )
        if not self.dual:
            self.weights.div_(-diagonal)
            self.weights.diagonal().zero_()

    def _invert(self, product, out: Tensor) -> None:
        """Invert a Gram matrix plus the ridge within `out` [n, n]; `product` multiplies the matrix with columns."""
        n = len(out)
        for begin in range(0, n, COLUMNS):
            width = min(COLUMNS, n - begin)
            unit = torch.zeros(n, width, device=out.device)
            unit[torch.arange(begin, begin + width), torch.arange(width)] = 1.0
            out[begin : begin + width] = product(unit).T
        out.diagonal().add_(self.ridge)
        # The transpose of a symmetric matrix lies in memory as LAPACK wants it, so that nothing is copied.
        flipped, info = out.mT, torch.zeros((), dtype=torch.int32, device=out.device)
        torch.linalg.cholesky_ex(flipped, out=(flipped, info))
        if int(info):
            raise InputError(f"EASE: the matrix is not positive definite in float32; ridge = {self.ridge} is too small")
        torch.cholesky_inverse(flipped, out=flipped)

    def _quadratic(self) -> Tensor:
        """Return x_j' K x_j of every item's column, float32 [rows(item)]."""
        graph = self.interactions
        total = torch.zeros(self.rows, device=self.inverse.device)
        for begin in range(0, len(self.inverse), COLUMNS):
            block = self.inverse[begin : begin + COLUMNS]
            columns = graph.of_users(block.T)
            first, last = int(graph.user_offsets[begin]), int(graph.user_offsets[begin + len(block)])
            owner = torch.repeat_interleave(graph.user_offsets[begin : begin + len(block) + 1].diff())
            items = graph.items[first:last].long()
            total.index_add_(0, items, columns[items, owner])
        return total

    def _scores(self, histories: Jagged, users: Tensor) -> Tensor:
        if not self.dual:
            return embedding_bag(self.weights, histories.values, histories.offsets).T
        graph = self.interactions
        x = as_columns(histories, torch.ones_like(self.diagonal))
        shared = graph.of_items(x)
        degrees = graph.user_degrees()[users]
        count = histories.offsets.diff()
        own = (users > 0) & (degrees == count) & (shared[users, torch.arange(len(users))] == count)
        weight = self.inverse[users].T
        if not own.all():
            new = ~own
            weight = weight.contiguous()
            weight[:, new] = self.inverse @ shared[:, new]
        projected = graph.of_users(weight)
        if not own.all():
            projected[:, new] = (x[:, new] - projected[:, new]) / self.ridge
        return x - projected / self.diagonal[:, None]
