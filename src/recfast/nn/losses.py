"""Losses of retrieval: many negatives for each positive."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
