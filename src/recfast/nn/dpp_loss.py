"""Learning a determinantal point process from the sets that people chose."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast import ops
from recfast.ops import _check


def dpp_log_normaliser(
    features: Tensor,
    relevance: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.5,
    gamma: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Log of the sum of det L_Y over all sets Y of a user's candidates, the empty one included.

    .. math::
        \\log \\det(I + L) = \\sum_i \\log(1 + \\gamma q_i^2) + \\log \\det\\Bigl(I_D + (1 - \\gamma) \\sum_i
        \\frac{q_i^2}{1 + \\gamma q_i^2} f_i f_i^\\top\\Bigr), \\quad q_i = e^{\\alpha r_i}

    for the kernel L of `ops.dpp_log_det`: no N x N matrix where D is below N (and no D x D one where N is).

    Parameters
    ----------
    features : Tensor [U, N, D], float32 or float64
    relevance : Tensor [U, N], float32 or float64
        None: 0. `2 alpha relevance` must stay below 700, where q^2 leaves float64.
    alpha : float or Tensor [U]
    gamma : float, in [0, 1]
    mask : Tensor [U, N], bool
        False: not a candidate.

    Returns
    -------
    Tensor [U] of features' dtype, in plain torch (work in float64): differentiable in features, relevance and alpha as
    often as torch's Cholesky is.
    """
    op = "dpp_log_normaliser"
    _check.tensor(op, "features", features, dtypes=(torch.float32, torch.float64), shape=["U", "N", "D"])
    users, items, width = features.shape
    if not 0 <= gamma <= 1:
        raise ValueError(f"{op}: gamma must be in [0, 1], got {gamma}")
    if relevance is None:
        log_squared = features.new_zeros((users, items), dtype=torch.float64)
    else:
        _check.tensor(op, "relevance", relevance, shape=[users, items], device=features.device)
        weight = alpha[:, None] if isinstance(alpha, Tensor) and alpha.dim() == 1 else alpha
        log_squared = 2 * weight * relevance.double()
    rows = features.double()
    if mask is not None:
        _check.tensor(op, "mask", mask, dtypes=[torch.bool], shape=[users, items], device=features.device)
        rows = rows.masked_fill(~mask[..., None], 0.0)
        log_squared = log_squared.masked_fill(~mask, 0.0)
    out = rows.new_zeros(users)
    if gamma > 0:
        own = F.softplus(log_squared + math.log(gamma))
        log_squared = log_squared - own
        out = out + (own if mask is None else own.masked_fill(~mask, 0.0)).sum(1)
    rows = rows * ((1 - gamma) ** 0.5 * torch.exp(0.5 * log_squared))[..., None]
    small = rows.mT @ rows if width < items else rows @ rows.mT
    unit = torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)
    factor = torch.linalg.cholesky(unit + small)
    return (out + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)).to(features.dtype)


class DPPLoss(nn.Module):
    """Negative log-likelihood of chosen sets under a determinantal point process over each user's candidates.

    .. math:: -\\log P(Y) = \\log \\det(I + L) - \\log \\det L_Y

    Features and relevance may be the outputs of a model: what people took together is drawn apart in the features, and
    what they took is raised in relevance. The features then serve `ops.dpp_greedy` and `ops.kdpp_sample`.

    Parameters
    ----------
    alpha : float
        The weight of relevance, as in `ops.dpp_log_det`.
    gamma : float, in [0, 1]
        Regulariser, as there. At 0 a set that is larger than D, or holds one item twice, has probability 0: its loss is
        infinite.
    reduction : {"mean", "sum", "none"}
        "mean" over the users (0 users: 0).

    References
    ----------
    Gartrell, Paquet and Koenigstein, "Low-rank factorization of determinantal point processes", AAAI 2017. Wilhelm et
    al., "Practical diversified recommendations on YouTube with determinantal point processes", CIKM 2018.

    Examples
    --------
    >>> loss = DPPLoss(gamma=0.05)
    >>> features = torch.randn(2, 30, 8, requires_grad=True)
    >>> loss(features, torch.tensor([[3, 7, -1], [0, 1, 2]])).backward()
    >>> features.grad.shape
    torch.Size([2, 30, 8])
    """

    def __init__(self, *, alpha: float = 0.5, gamma: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"DPPLoss: gamma must be in [0, 1], got {gamma}")
        self.alpha = float(alpha)
        self.gamma = float(gamma)
        self.reduction = _check.choice("DPPLoss", "reduction", reduction, ("mean", "sum", "none"))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, gamma={self.gamma:g}, reduction={self.reduction!r}"

    def forward(
        self, features: Tensor, sets: Tensor, relevance: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of `sets`.

        Parameters
        ----------
        features : Tensor [U, N, D], float32 or float64
        sets : Tensor [U, K], int32 or int64, -1 padded
            Positions of the chosen items among the user's candidates, in any order.
        relevance : Tensor [U, N], float32 or float64
        mask : Tensor [U, N], bool
            False: not a candidate.
        """
        _check.tensor("DPPLoss", "features", features, shape=["U", "N", "D"])
        users, items, width = features.shape
        sets = _check.index("DPPLoss", "sets", sets, shape=[users, "K"], device=features.device)
        chosen = sets >= 0
        _check.indices("DPPLoss", "sets", sets.masked_fill(sets == -1, 0), max(items, 1))
        place = sets.clamp(min=0)
        if mask is not None:
            _check.tensor("DPPLoss", "mask", mask, dtypes=[torch.bool], shape=[users, items], device=features.device)
            wrong = chosen & ~mask.gather(1, place)
            if bool(wrong.any()):
                user, at = wrong.nonzero()[0].tolist()
                raise ValueError(f"DPPLoss: sets[{user}, {at}] = {int(sets[user, at])} is not a candidate by mask")
        rows = features.gather(1, place[..., None].expand(-1, -1, width))
        theirs = None if relevance is None else relevance.gather(1, place)
        log_det = ops.dpp_log_det(rows, theirs, alpha=self.alpha, gamma=self.gamma, mask=chosen)
        loss = dpp_log_normaliser(features, relevance, alpha=self.alpha, gamma=self.gamma, mask=mask) - log_det
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.sum() / max(users, 1)
