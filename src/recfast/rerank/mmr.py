"""Maximal marginal relevance: items that are good and unlike the one they resemble most."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recfast.ops import mmr_greedy
from recfast.rerank._base import RangeScaled, window_of


class MMR(RangeScaled):
    r"""Maximal marginal relevance, the baseline that others are compared with.

    .. math:: j = \arg\max_i\; (1 - d) r_i - d \max_{j \in Y} f_i \cdot f_j

    with d the diversity itself and r brought to [0, 1] within a user's candidates; the first pick is the most relevant,
    and ties go to the lowest position: see `ops.mmr_greedy`.

    Parameters
    ----------
    diversity, personal, normalize, standardize
        As for every re-ranker.
    clip : bool
        Take a negative cosine for 0, so that to be opposite is worth no more than to be unrelated.
    window : int
        Compare with the `window - 1` items before only, which suits lists that are scrolled through.

    References
    ----------
    Carbonell and Goldstein, "The use of MMR, diversity-based reranking for reordering documents and producing
    summaries", SIGIR 1998.
    """

    def __init__(
        self,
        diversity: float = 0.3,
        *,
        clip: bool = False,
        window: int | None = None,
        personal: float | bool | None = None,
        normalize: bool = True,
        standardize: bool = True,
    ) -> None:
        super().__init__(diversity, personal=personal, normalize=normalize, standardize=standardize)
        self.clip = bool(clip)
        self.window = window_of(self._name, window)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "clip": self.clip, "window": self.window}

    def _pick(
        self, features: Tensor, relevance: Tensor, k: int, diversity: Tensor, options: dict[str, Any], **by_user: Tensor
    ) -> Tensor:
        found = mmr_greedy(
            features, relevance, k, diversity=diversity, clip=self.clip, window=self.window, **options
        )
        return found.indices
