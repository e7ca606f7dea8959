"""Rows of sequences that may be padded."""

from __future__ import annotations

import torch


def padding_of(place: str, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor | None:
    """Which rows of a padded `x` [B, L, D] lie beyond `lengths`, bool [B, L, 1]; None for jagged rows [T, D]."""
    if x.dim() != 3:
        return None
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"{place}: lengths must have shape [{x.shape[0]}], got {list(lengths.shape)}")
    return (torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)).unsqueeze(2)
