"""Maximal marginal relevance: items that are good and unlike the one they resemble most."""

from __future__ import annotations

import torch
from torch import Tensor

from recfast.rerank._base import Reranker


class MMR(Reranker):
    r"""Maximal marginal relevance, the baseline that others are compared with.

    .. math:: j = \arg\max_i\; (1 - d) r_i - d \max_{j \in Y} f_i \cdot f_j

    with d the diversity and r brought to [0, 1] within a user's candidates; the first pick is the most relevant, and
    ties go to the lowest position.

    References
    ----------
    Carbonell and Goldstein, "The use of MMR, diversity-based reranking for reordering documents and producing
    summaries", SIGIR 1998.
    """

    def _scaled(self, scores: Tensor, valid: Tensor) -> Tensor:
        if scores.shape[1] == 0:
            return scores
        low = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        span = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True) - low
        scaled = (scores - low) / span.where(span > 0, torch.ones_like(span))
        return scaled.masked_fill(~valid, 0.0)

    def _pick(self, features: Tensor, relevance: Tensor, k: int, diversity: Tensor, valid: Tensor) -> Tensor:
        users, items = relevance.shape
        out = torch.full((users, k), -1, dtype=torch.int64)
        rows = torch.arange(users)
        features = features.double().nan_to_num(0.0, 0.0, 0.0)  # what is no candidate may hold anything
        free = valid.clone()
        closest = torch.full((users, items), -torch.inf, dtype=torch.float64)
        weight = diversity[:, None]
        for n in range(min(k, items)):
            worth = relevance if n == 0 else (1 - weight) * relevance - weight * closest
            # torch does not say which of equal values argmax takes, so the first is asked for.
            worth = worth.masked_fill(~free, -torch.inf)
            best = (worth == worth.amax(1, keepdim=True)).int().argmax(1)
            found = free[rows, best]
            out[:, n] = best.where(found, -1)
            free[rows, best] = False
            if features.dim() == 2:
                alike = features[best] @ features.T
            else:
                alike = torch.einsum("und,ud->un", features, features[rows, best])
            closest = torch.maximum(closest, alike)
        return out
