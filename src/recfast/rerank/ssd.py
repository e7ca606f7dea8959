"""Sliding spectrum decomposition: items that are good and add a direction to the latest ones."""

from __future__ import annotations

from typing import Any

from recfast.errors import InputError
from recfast.ops import ssd_greedy
from recfast.rerank._base import Additive

_MODES = ("exact", "paper")


class SSD(Additive):
    r"""Sliding spectrum decomposition, made for feeds that are scrolled through.

    .. math:: j = \arg\max_i\; (1 - d) r_i + d \sqrt{\rho_i}

    with d the diversity itself, r brought to [0, 1] within a user's candidates, and :math:`\sqrt{\rho_i}` the length of
    what is left of item i outside the span of the `window - 1` items before it; the first pick is the most relevant:
    see `ops.ssd_greedy`.

    Parameters
    ----------
    diversity, personal, normalize, standardize, window, exact
        As for `DPP`.
    mode : {"exact", "paper"}
        How an item that leaves the window is forgotten: wholly, or as published, which keeps a trace of it.
    volume : bool
        Let what is left count by the volume that the picks span so far, which fades along the list.

    References
    ----------
    Huang, Wang, Zhang and Xu, "Sliding spectrum decomposition for diversified recommendation", KDD 2021.
    """

    _op = staticmethod(ssd_greedy)

    def __init__(self, diversity: float = 0.3, *, mode: str = "exact", volume: bool = False, **options: Any) -> None:
        super().__init__(diversity, **options)
        if mode not in _MODES:
            raise InputError(f"SSD: mode must be one of {', '.join(_MODES)}, got {mode!r}")
        self.mode = mode
        self.volume = bool(volume)

    def _own(self) -> dict[str, Any]:
        return {"mode": self.mode, "volume": self.volume}
