"""k-DPP samples: lists that are good and varied, and other ones each time."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from recfast.errors import InputError
from recfast.ops import kdpp_sample
from recfast.rerank._base import Reranker, shape_of


class KDPP(Reranker):
    r"""Samples of a determinantal point process: a set of k items is drawn with a chance of its determinant.

    .. math:: P(Y) \propto \det L_Y, \quad L = \mathrm{Diag}(q)\, S\, \mathrm{Diag}(q), \quad
        S = (1 - \gamma) F F^\top + \gamma I

    The kernel is that of `DPP`, with :math:`q_i = e^{\alpha r_i}`, r as z-scores and
    :math:`\alpha = (1 - d) / (2 d)` of the diversity d, so that the list of `DPP` is a likely draw; at d = 0 the most
    relevant are listed. Every user, and every call of `rank`, draws afresh: items below the first k get their turn,
    which a log to learn from needs, at a price in relevance. The list is in order of relevance, and filled up by
    relevance where the features are spent (`gamma` = 0 and k above their rank).

    Parameters
    ----------
    diversity, personal, normalize, standardize, gamma
        As for `DPP`.
    seed : int, at least 0
        Of the draws. The same seed gives the same lists, call by call: see `rank`.

    References
    ----------
    Kulesza and Taskar, "k-DPPs: fixed-size determinantal point processes", ICML 2011.
    """

    # `Pipeline` is to say which users they are.
    draws = True

    def __init__(
        self,
        diversity: float = 0.3,
        *,
        seed: int = 0,
        gamma: float = 0.1,
        personal: float | bool | None = None,
        normalize: bool = True,
        standardize: bool = True,
    ) -> None:
        super().__init__(diversity, personal=personal, normalize=normalize, standardize=standardize)
        self.gamma = self._unit("gamma", gamma)
        if not 0 <= seed < 2**63:
            raise InputError(f"KDPP: seed must be in [0, 2^63), got {seed}")
        self.seed = int(seed)
        self._calls = itertools.count()

    def config(self) -> dict[str, Any]:
        return {**super().config(), "seed": self.seed, "gamma": self.gamma}

    def rank(
        self,
        features: Any,
        relevance: Any,
        k: int,
        *,
        users: Any = None,
        draw: int | None = None,
        candidates: Any = None,
        propensity: Any = None,
        lengths: Any = None,
        mask: Any = None,
        shown: Any = None,
    ) -> Any:
        """Choose k candidates of each user: `Reranker.rank`, by chance.

        Parameters
        ----------
        users : int [U]
            Ids, so that a user's draw is the same in any batch; the place in the batch if left out.
        draw : int, at least 0
            Which draw of these users; if left out the first call makes draw 0, the second draw 1, and so on.
        shown
            Must be left out: nothing is drawn against what was shown. Leave it out of the candidates by `mask`.
        """
        if shown is not None:
            raise InputError("KDPP.rank: shown is not for samples, leave such items out by mask")
        if draw is not None and draw < 0:
            raise InputError(f"KDPP.rank: draw must be at least 0, got {draw}")
        count = len(relevance) if len(shape_of(relevance)) == 2 else 1
        keys = torch.arange(count) if users is None else self._indices("users", users, [count], 2**63 - 1)
        call = next(self._calls) if draw is None else int(draw)
        seed = torch.full((count,), _mixed(self.seed, call), dtype=torch.int64)
        return self._rank(features, relevance, k, candidates, propensity, lengths, mask, None, keys=keys, seed=seed)

    def _pick(
        self, features: Tensor, relevance: Tensor, k: int, diversity: Tensor, options: dict[str, Any], **by_user: Tensor
    ) -> Tensor:
        valid, candidates = options["mask"], options["candidates"]
        if candidates is not None:
            features = features[candidates.clamp(min=0)] if len(features) else features.new_zeros(*valid.shape, 0)
        # At 0 nothing is left to chance: such users' lists are all filled up.
        drawn = diversity > 0
        alpha = torch.where(drawn, (1 - diversity) / (2 * diversity), torch.zeros_like(diversity))
        sampled = kdpp_sample(
            features,
            k,
            quality=alpha[:, None] * relevance,
            seed=int(by_user["seed"][0]) if len(valid) else 0,
            gamma=self.gamma,
            mask=valid & drawn[:, None],
            users=by_user["keys"],
        ).indices.reshape(len(valid), -1)
        chosen = torch.zeros(valid.shape[0], valid.shape[1] + 1, dtype=torch.bool)
        chosen.scatter_(1, sampled.where(sampled >= 0, valid.shape[1]), True)
        order = torch.argsort(relevance.masked_fill(~valid, -torch.inf), dim=1, descending=True, stable=True)
        # What was drawn, then the others, each by relevance; of these the first k, by relevance.
        place = torch.argsort((~chosen[:, :-1]).gather(1, order).byte(), dim=1, stable=True)[:, :k].sort(1).values
        picked = order.gather(1, place)
        picked = picked.masked_fill(~valid.gather(1, picked), -1)
        # Those that are none stand last already, for relevance puts them there.
        return torch.nn.functional.pad(picked, (0, k - picked.shape[1]), value=-1)


def _mixed(seed: int, call: int) -> int:
    """The seed of a call: SplitMix64 of both, in [0, 2^63)."""
    value = (seed + (call + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor % 2**64
    return (value ^ (value >> 31)) >> 1
