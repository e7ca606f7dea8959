"""k-DPP samples: lists that are good and varied, and other ones each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recfast.errors import InputError
from recfast.ops import kdpp_sample
from recfast.rerank._base import Reranker


class KDPP(Reranker):
    """x"""

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
        self.seed = seed
        self.gamma = self._unit("gamma", gamma)
