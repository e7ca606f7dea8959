"""Maximal marginal relevance: items that are good and unlike the one they resemble most."""

from __future__ import annotations

from typing import Any

from recfast.ops import mmr_greedy
from recfast.rerank._base import Additive


class MMR(Additive):
    r"""Maximal marginal relevance, the baseline that others are compared with.

    .. math:: j = \arg\max_i\; (1 - d) r_i - d \max_{j \in Y} f_i \cdot f_j

    with d the diversity itself and r brought to [0, 1] within a user's candidates; the first pick is the most relevant,
    and ties go to the lowest position: see `ops.mmr_greedy`.

    Parameters
    ----------
    diversity, personal, normalize, standardize, window, exact
        As for `DPP`.
    clip : bool
        Take a negative cosine for 0, so that to be opposite is worth no more than to be unrelated.

    References
    ----------
    Carbonell and Goldstein, "The use of MMR, diversity-based reranking for reordering documents and producing
    summaries", SIGIR 1998.
    """

    _op = staticmethod(mmr_greedy)

    def __init__(self, diversity: float = 0.3, *, clip: bool = False, **options: Any) -> None:
        super().__init__(diversity, **options)
        self.clip = bool(clip)

    def _own(self) -> dict[str, Any]:
        return {"clip": self.clip}
