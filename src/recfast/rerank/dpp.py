"""Determinantal point process: items that are good and span much."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recfast.errors import InputError
from recfast.ops import dpp_greedy
from recfast.rerank._base import Reranker, window_of

_POLICIES = ("relevance", "stop", "restart")


class DPP(Reranker):
    """Greedy lists of a determinantal point process, with a trade-off for each user.

    The kernel is `Diag(q) S Diag(q)`, S the cosines of the features with `gamma` on the diagonal, q the relevance as
    z-scores: see `ops.dpp_greedy`.

    Parameters
    ----------
    diversity, personal, normalize, standardize
        As for every re-ranker: 0.3 of the weight on diversity; the share of the trade-off that follows a user's
        propensity; unit features; z-scores over a user's candidates.
    gamma : float, in [0, 1]
        Share of the kernel that is private to each item. At 0 two items with equal features are never listed together
        before the features are spent; above 0 they may be, at a price that falls with gamma.
    window : int
        Each item is to differ from the `window - 1` before it only, which suits lists that are scrolled through.
    exhausted : {"relevance", "stop", "restart"}
        What to do when the features are spent: see `ops.dpp_greedy`.
    epsilon : float, in (0, 1]
        An item is spent when less than this share of its squared norm lies outside the span of the picks.
    exact : bool
        The lists of float64 arithmetic, whatever the machine; False trusts float32.

    Examples
    --------
    >>> import numpy as np
    >>> features = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> DPP(diversity=0.7).rank(features, np.array([3.0, 2.9, 1.0]), 2)
    array([0, 2])
    >>> DPP(diversity=0.0).rank(features, np.array([3.0, 2.9, 1.0]), 2)
    array([0, 1])

    References
    ----------
    Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point process to improve recommendation
    diversity", NeurIPS 2018; Wang et al., arXiv 2004.06390, 2020 (the personal trade-off).
    """

    def __init__(
        self,
        diversity: float = 0.3,
        *,
        gamma: float = 0.1,
        window: int | None = None,
        personal: float | bool | None = None,
        exhausted: str = "relevance",
        epsilon: float = 1e-10,
        exact: bool = True,
        normalize: bool = True,
        standardize: bool = True,
    ) -> None:
        super().__init__(diversity, personal=personal, normalize=normalize, standardize=standardize)
        self.gamma = self._unit("gamma", gamma)
        if exhausted not in _POLICIES:
            raise InputError(f"DPP: exhausted must be one of {', '.join(_POLICIES)}, got {exhausted!r}")
        if not 0 < epsilon <= 1:
            raise InputError(f"DPP: epsilon must be in (0, 1], got {epsilon}")
        self.window = window_of("DPP", window)
        self.exhausted = exhausted
        self.epsilon = float(epsilon)
        self.exact = bool(exact)

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "gamma": self.gamma,
            "window": self.window,
            "exhausted": self.exhausted,
            "epsilon": self.epsilon,
            "exact": self.exact,
        }

    def _pick(
        self, features: Tensor, relevance: Tensor, k: int, diversity: Tensor, options: dict[str, Any], **by_user: Tensor
    ) -> Tensor:
        return dpp_greedy(
            features,
            relevance,
            k,
            diversity=diversity,
            gamma=self.gamma,
            window=self.window,
            exhausted=self.exhausted,
            epsilon=self.epsilon,
            exact=self.exact,
            **options,
        ).indices
