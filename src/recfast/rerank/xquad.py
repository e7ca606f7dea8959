"""xQuAD: items that are good and belong to what the user likes and the list does not have yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recfast.errors import InputError
from recfast.ops import xquad_greedy
from recfast.rerank._base import Additive, shape_of


class XQuAD(Additive):
    r"""Explicit query aspect diversification: a list that covers the user's topics in their proportions.

    .. math:: j = \arg\max_i\; (1 - d) r_i + d \sum_z P(z | u)\, P(z | i) \prod_{j \in Y} (1 - P(z | j))

    with d the diversity itself and r brought to [0, 1] within a user's candidates: see `ops.xquad_greedy`. The only
    re-ranker here that asks what the user likes: a list for a user of one topic stays in it at any diversity.

    Parameters
    ----------
    diversity, personal, standardize, window, exact
        As for `DPP`.
    normalize : bool
        Make each item's topics a distribution P(z | i), so that an item of many topics is not one of all of them. False
        takes them as chances in [0, 1], such as the flags themselves: one item of a topic is then enough of it.

    Examples
    --------
    >>> import numpy as np
    >>> topics = np.array([[1, 0], [1, 0], [0, 1]])
    >>> XQuAD(diversity=0.9).rank(topics, np.array([3.0, 2.9, 1.0]), 2, preferences=np.array([0.6, 0.4]))
    array([0, 2])

    References
    ----------
    Santos, Macdonald and Ounis, "Exploiting query reformulations for web search result diversification", WWW 2010.
    """

    # What `Pipeline` is to hand as features.
    reads = "topics"
    _op = staticmethod(xquad_greedy)

    def rank(
        self,
        features: Any,
        relevance: Any,
        k: int,
        *,
        preferences: Any = None,
        candidates: Any = None,
        propensity: Any = None,
        lengths: Any = None,
        mask: Any = None,
        shown: Any = None,
    ) -> Any:
        """Choose and order k candidates of each user: `Reranker.rank`, with topics for features, and preferences.

        Parameters
        ----------
        features : [U, N, Z] or [N, Z]; [T, Z] with `candidates`
            How much an item is of each topic, at least 0, such as genre flags.
        preferences : [U, Z], or [Z] for all users
            How much each user likes each topic, at least 0, such as the counts of genres in the history; brought to a
            sum of 1. All topics alike if left out, or where all are 0.
        """
        users = len(relevance) if len(shape_of(relevance)) == 2 else 1
        given = self._preferences(preferences, users, shape_of(features)[-1] if shape_of(features) else 0)
        return self._rank(features, relevance, k, candidates, propensity, lengths, mask, shown, preferences=given)

    def _preferences(self, preferences: Any, users: int, topics: int) -> Tensor:
        if preferences is None:
            value = torch.ones(users, topics, dtype=torch.float64)
        else:
            value = torch.as_tensor(preferences).detach().cpu().double()
            value = value.expand(users, -1) if value.dim() == 1 else value
        if list(value.shape) != [users, topics]:
            raise InputError(
                f"XQuAD.rank: preferences must have shape [{users}, {topics}] or [{topics}], got {list(value.shape)}"
            )
        wrong = ~((value >= 0) & torch.isfinite(value))
        if bool(wrong.any()):
            user, topic = wrong.nonzero()[0].tolist()
            raise InputError(
                f"XQuAD.rank: preferences[{user}, {topic}] must be at least 0 and finite, "
                f"got {float(value[user, topic])}"
            )
        value = torch.where(value.sum(1, keepdim=True) > 0, value, torch.ones_like(value))
        return value / value.sum(1, keepdim=True)

    def _unfit(self, rows: Tensor) -> Tensor:
        return ~((rows >= 0) & (rows <= (torch.finfo(rows.dtype).max if self.normalize else 1)))

    def _expected(self, value: float) -> str:
        return f"must be {'at least 0 and finite' if self.normalize else 'in [0, 1]'}, got {value}"

    def _unit_rows(self, wide: Tensor) -> Tensor:
        total = wide.sum(-1, keepdim=True)
        return wide / total.where(total > 0, torch.ones_like(total))
