"""Max-sum dispersion: items that are good and far from all the others."""

from __future__ import annotations

from typing import Any

from recfast.ops import msd_greedy
from recfast.rerank._base import Additive


class MSD(Additive):
    r"""Max-sum dispersion: the distance to every pick counts, so that the far corners are sought.

    .. math:: j = \arg\max_i\; (1 - d) r_i + \frac{d}{|Y|} \sum_{j \in Y} (1 - f_i \cdot f_j)

    with d the diversity itself and r brought to [0, 1] within a user's candidates; the first pick is the most relevant:
    see `ops.msd_greedy`.

    Parameters
    ----------
    diversity, personal, normalize, standardize, window, exact
        As for `DPP`.
    mean : bool
        Divide the sum by the number of picks, as above, so that d means the same at the end of a list as at its
        beginning. False is the published form, whose sum outgrows relevance as the list grows.

    References
    ----------
    Gollapudi and Sharma, "An axiomatic approach for result diversification", WWW 2009; Borodin, Lee and Ye, "Max-sum
    diversification, monotone submodular functions and dynamic updates", PODS 2012.
    """

    _op = staticmethod(msd_greedy)

    def __init__(self, diversity: float = 0.3, *, mean: bool = True, **options: Any) -> None:
        super().__init__(diversity, **options)
        self.mean = bool(mean)

    def _own(self) -> dict[str, Any]:
        return {"mean": self.mean}
