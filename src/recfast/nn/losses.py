"""Losses of retrieval: many negatives for each positive.

`NegativesLoss` takes vectors and never holds their scores; the functions take scores, and are the plain form of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast import ops
from recfast.ops.negatives_loss import LOSSES, NORMALIZE


class NegativesLoss(nn.Module):
    """A loss over many negatives straight from user and item vectors, without the scores of all pairs.

    Parameters
    ----------
    loss : {"softmax", "contrastive", "bpr", "bce"}
        `sampled_softmax`, `cosine_contrastive`, `pairwise_ranking`, or weighted binary cross-entropy (see
        `ops.negatives_loss`); for gBCE see `gbce_weights`.
    normalize : {"none", "table", "both"}
        Which vectors are taken at length 1.
    temperature : float
        Scores are divided by it.
    margin, weight, positive_weight, clamp
        As in `ops.negatives_loss`.
    skip_positive : bool
        A negative that is the row's own positive does not count there.
    reduction : {"mean", "sum", "none"}
        "mean" over the rows (0 rows: 0).

    Attributes
    ----------
    sparse : bool
        False. If set, the table's gradient is sparse where the negatives are ids, for optimisers that touch only the
        rows that have one (`train.LazyAdam`, `torch.optim.SparseAdam`).

    Examples
    --------
    >>> loss = NegativesLoss("softmax", normalize="both", temperature=0.05)
    >>> users, items = torch.randn(3, 8), torch.randn(100, 8)
    >>> loss(users, items, torch.tensor([5, 7, 9]), torch.randint(1, 100, (50,))).shape
    torch.Size([])
    """

    def __init__(
        self,
        loss: str = "softmax",
        *,
        normalize: str = "none",
        temperature: float = 1.0,
        margin: float = 0.5,
        weight: float = 1.0,
        positive_weight: float = 1.0,
        clamp: bool = False,
        skip_positive: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        for name, value, allowed in (("loss", loss, LOSSES), ("normalize", normalize, NORMALIZE)):
            if value not in allowed:
                raise ValueError(f"NegativesLoss: {name} = {value!r} is not one of {', '.join(map(repr, allowed))}")
        if not temperature > 0:
            raise ValueError(f"NegativesLoss: temperature = {temperature} is not above 0")
        self.loss, self.normalize, self.temperature, self.reduction = loss, normalize, temperature, reduction
        self.margin, self.weight, self.positive_weight = margin, weight, positive_weight
        self.clamp, self.skip_positive = clamp, skip_positive
        self.sparse = False

    def forward(
        self,
        queries: Tensor,
        table: Tensor,
        positives: Tensor,
        negatives: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        log_expected: Tensor | None = None,
        exclude: tuple[Tensor, Tensor] | None = None,
        first: int = 0,
    ) -> Tensor:
        """Return the loss of the rows.

        Parameters
        ----------
        queries
            float [M, D]; cast to the dtype of the table.
        table
            float [N, D].
        positives
            int64 [M].
        negatives
            int64 [K], one list for all rows, or [M, K]; None for every item from `first` on.
        bias, log_expected, exclude
            As in `ops.negatives_loss`: of an item; of a column; ids that do not count in a row.

        Returns
        -------
        Tensor
            A scalar, or [M] for "none"; float32, or float64 for float64. Differentiable in `queries`, `table`, `bias`.
        """
        # The kernels are the CPU's; elsewhere it is the plain form, with all scores.
        op = ops.negatives_loss if table.device.type == "cpu" else ops.negatives_loss.reference
        losses = op(
            queries.to(table.dtype),
            table,
            positives,
            negatives,
            loss=self.loss,
            bias=bias,
            log_expected=log_expected,
            exclude=exclude,
            first=first,
            normalize=self.normalize,
            scale=1.0 / self.temperature,
            margin=self.margin,
            weight=self.weight,
            positive_weight=self.positive_weight,
            clamp=self.clamp,
            skip_positive=self.skip_positive,
            sparse=self.sparse and negatives is not None,
        )
        return _reduce(losses, self.reduction)

    def extra_repr(self) -> str:
        return f"{self.loss!r}, normalize={self.normalize!r}, temperature={self.temperature:g}"


def gbce_weights(negatives: int, items: int, calibration: float) -> dict[str, float]:
    r"""Return what makes `NegativesLoss("bce", ...)` the generalised binary cross-entropy (gBCE) of gSASRec.

    .. math::
        L = -\frac{1}{K + 1}\Bigl(\beta \ln \sigma(s) + \sum_j \ln(1 - \sigma(s_j))\Bigr), \qquad
        \beta = \alpha \, \bigl(t (1 - 1/\alpha) + 1/\alpha\bigr), \qquad \alpha = \frac{K}{I - 1}

    Parameters
    ----------
    negatives
        K, drawn uniformly.
    items
        I, the size of the catalogue, above 1.
    calibration
        t in [0, 1]: 0 is plain binary cross-entropy, with 1 the sigmoid is calibrated as a probability.

    Returns
    -------
    dict
        ``weight`` and ``positive_weight``.

    Notes
    -----
    Petrov and Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
    Sampling", RecSys 2023, arXiv 2308.07192. Where columns collide with the positive, `weight` is shared by those that
    count.
    """
    if negatives < 1 or items < 2 or not 0 <= calibration <= 1:
        raise ValueError(
            f"gbce_weights: negatives = {negatives}, items = {items}, calibration = {calibration}; expected at least "
            "1, 2 and a number in [0, 1]"
        )
    alpha = negatives / (items - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    return {"weight": negatives / (negatives + 1), "positive_weight": beta / (negatives + 1)}


def collisions(positive_ids: Tensor, negative_ids: Tensor) -> Tensor:
    """Return which negatives are the row's own positive.

    Parameters
    ----------
    positive_ids
        int64 [B].
    negative_ids
        int64 [K], one list shared by all rows, or [B, K].

    Returns
    -------
    Tensor
        bool [B, K], true where ``negative_ids[..., j] == positive_ids[i]``.
    """
    return negative_ids == positive_ids[:, None]


def sampled_softmax(
    positive: Tensor,
    negatives: Tensor,
    *,
    log_expected: Tensor | None = None,
    collision: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy over the whole catalogue, estimated from a sample of it (logQ correction).

    .. math::
        L_i = \ln\Bigl(e^{s_i} + \sum_{j=1}^{K} [\neg c_{ij}] \, e^{s_{ij} - \ln E_j}\Bigr) - s_i

    :math:`E_j` is how often the item of column j is expected among the K columns. Then each sum over columns is, in
    expectation, the sum over all items but the positive, so that the sampled loss has the minimum of the full softmax.
    The positive is in every row with certainty, so it is not corrected; only the negatives are.

    Parameters
    ----------
    positive
        float [B], the score of each row's positive, :math:`s_i`.
    negatives
        float [B, K], scores :math:`s_{ij}`.
    log_expected
        float [K] or [B, K], :math:`\ln E_j`: ``ln(K q_j)`` for K draws with probability q. None corrects nothing, which
        for uniform draws is a constant factor on the negatives.
    collision
        bool [B, K], as `collisions` gives it: columns that do not count in a row.
    reduction
        "mean" over the rows (0 rows: 0), "sum" or "none".

    Returns
    -------
    Tensor
        A scalar, or [B] for "none". Each term is at least 0; a row whose columns all collide has the loss 0.
        Differentiable in `positive` and `negatives`.

    Notes
    -----
    Bengio and Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model",
    2008; Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019.
    """
    _check(positive, negatives, collision)
    if log_expected is not None:
        negatives = negatives - log_expected
    if collision is not None:
        negatives = negatives.masked_fill(collision, -torch.inf)
    logits = torch.cat([positive[:, None], negatives], dim=1)
    return _reduce(torch.logsumexp(logits, dim=1) - positive, reduction)


def cosine_contrastive(
    positive: Tensor,
    negatives: Tensor,
    *,
    margin: float = 0.5,
    weight: float = 10.0,
    collision: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cosine contrastive loss (CCL): pull the positive up, push back only negatives above a margin.

    .. math::
        L_i = 1 - s_i + \frac{w}{K_i} \sum_{j} [\neg c_{ij}] \max(0,\, s_{ij} - m)

    :math:`K_i` is the number of columns that count in row i, so `weight` does not depend on how many are drawn.

    Parameters
    ----------
    positive
        float [B], the cosine of user and positive, in [-1, 1].
    negatives
        float [B, K], cosines of user and negatives.
    margin
        m, in [-1, 1]: a negative below it costs nothing and has no gradient.
    weight
        w, at least 0.
    collision
        bool [B, K]: columns that do not count in a row.
    reduction
        "mean" over the rows (0 rows: 0), "sum" or "none".

    Returns
    -------
    Tensor
        A scalar, or [B] for "none". Differentiable in `positive` and `negatives` (at a negative that equals the margin
        the gradient is 0).

    Notes
    -----
    Mao et al., "SimpleX: A Simple and Strong Baseline for Collaborative Filtering", CIKM 2021, arXiv 2109.12613.
    """
    _check(positive, negatives, collision)
    excess = F.relu(negatives - margin)
    if collision is None:
        count = negatives.shape[1]
    else:
        excess = excess.masked_fill(collision, 0.0)
        count = (~collision).sum(1)
    penalty = excess.sum(1) / torch.as_tensor(count, device=negatives.device).clamp(min=1)
    return _reduce(1.0 - positive + weight * penalty, reduction)


def pairwise_ranking(
    positive: Tensor, negatives: Tensor, *, collision: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Bayesian personalised ranking (BPR) against many negatives: the positive shall score above each of them.

    .. math::
        L_i = \frac{1}{K_i} \sum_{j} [\neg c_{ij}] \, \bigl(-\ln \sigma(s_i - s_{ij})\bigr)

    Parameters
    ----------
    positive
        float [B], the score of each row's positive.
    negatives
        float [B, K].
    collision
        bool [B, K]: columns that do not count in a row; :math:`K_i` is the number of those that do.
    reduction
        "mean" over the rows (0 rows: 0), "sum" or "none".

    Returns
    -------
    Tensor
        A scalar, or [B] for "none". Differentiable in `positive` and `negatives`.

    Notes
    -----
    Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009, arXiv 1205.2618.
    """
    _check(positive, negatives, collision)
    terms = F.softplus(negatives - positive[:, None])
    if collision is None:
        return _reduce(terms.sum(1) / max(terms.shape[1], 1), reduction)
    return _reduce(terms.masked_fill(collision, 0.0).sum(1) / (~collision).sum(1).clamp(min=1), reduction)


def _check(positive: Tensor, negatives: Tensor, collision: Tensor | None) -> None:
    if positive.dim() != 1 or negatives.dim() != 2 or negatives.shape[0] != positive.shape[0]:
        raise ValueError(
            f"losses: positive is {list(positive.shape)} and negatives {list(negatives.shape)}, expected [B] and [B, K]"
        )
    if collision is not None and (collision.dtype != torch.bool or collision.shape != negatives.shape):
        raise ValueError(
            f"losses: collision is {collision.dtype} {list(collision.shape)}, expected bool {list(negatives.shape)}"
        )


def _reduce(terms: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return terms
    if reduction == "sum":
        return terms.sum()
    if reduction == "mean":
        return terms.sum() / max(terms.numel(), 1)
    raise ValueError(f"losses: reduction = {reduction!r} is not one of 'mean', 'sum', 'none'")
