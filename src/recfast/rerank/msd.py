"""Max-sum dispersion: items that are good and far from all the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recfast.ops import msd_greedy
from recfast.rerank._base import RangeScaled


class MSD(RangeScaled):
    r"""Max-sum dispersion: the distance to every pick counts, so far corners are sought.

    .. math:: j = \arg\max_i\; (1 - d) r_i + d \sum_{j \in Y} (1 - f_i \cdot f_j)

    with d the diversity itself and r brought to [0, 1] within a user's candidates: see `ops.msd_greedy`. The sum grows
    with the list while r does not, so the same d asks for more diversity further down.

    Parameters
    ----------
    diversity, personal, normalize, standardize
        As for every re-ranker.

    References
    ----------
    Gollapudi and Sharma, "An axiomatic approach for result diversification", WWW 2009; Borodin, Lee and Ye, "Max-sum
    diversification, monotone submodular functions and dynamic updates", PODS 2012.
    """

    def _pick(
        self, features: Tensor, relevance: Tensor, k: int, diversity: Tensor, options: dict[str, Any], **by_user: Tensor
    ) -> Tensor:
        return msd_greedy(features, relevance, k, diversity=diversity, **options).indices
