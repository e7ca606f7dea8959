"""Sliding spectrum decomposition: items that are good and add a direction to the latest ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recfast.errors import InputError
from recfast.ops import ssd_greedy
from recfast.rerank._base import RangeScaled, window_of

_MODES = ("exact", "paper")


class SSD(RangeScaled):
    r"""Sliding spectrum decomposition, made for feeds that are scrolled through.

    .. math:: j = \arg\max_i\; (1 - d) r_i + d \sqrt{\rho_i}

    with d the diversity itself, r brought to [0, 1] within a user's candidates, and :math:`\sqrt{\rho_i}` the length of
    what is left of item i outside the span of the `window - 1` items before it: see `ops.ssd_greedy`.

    Parameters
    ----------
    diversity, personal, normalize, standardize
        As for every re-ranker.
    window : int
        Each item is to differ from the `window - 1` before it only; None: from all.
    mode : {"exact", "paper"}
        How an item that leaves the window is forgotten: wholly, or as published, which keeps a trace of it.

    References
    ----------
    Huang et al., "Sliding spectrum decomposition for diversified recommendation", KDD 2021.
    """

    def __init__(
        self,
        diversity: float = 0.3,
        *,
        window: int | None = None,
        mode: str = "exact",
        personal: float | bool | None = None,
        normalize: bool = True,
        standardize: bool = True,
    ) -> None:
        super().__init__(diversity, personal=personal, normalize=normalize, standardize=standardize)
        self.window = window_of("SSD", window)
        if mode not in _MODES:
            raise InputError(f"SSD: mode must be one of {', '.join(_MODES)}, got {mode!r}")
        self.mode = mode

    def config(self) -> dict[str, Any]:
        return {**super().config(), "window": self.window, "mode": self.mode}

    def _pick(
        self, features: Tensor, relevance: Tensor, k: int, diversity: Tensor, options: dict[str, Any], **by_user: Tensor
    ) -> Tensor:
        return ssd_greedy(
            features, relevance, k, diversity=diversity, window=self.window, mode=self.mode, **options
        ).indices
