"""The best of a row, ties decided."""

from __future__ import annotations

import torch


def top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `k` best of each row: `(scores [B, k], ids int64 [B, k])`, ties by the lowest id, padded (-inf, -1).

    An entry of minus infinity is no candidate. Unlike `torch.topk`, which of equal scores are taken is defined.
    """
    width = scores.shape[1]
    taken = min(k, width)
    # One more than asked for tells where scores that are level go on beyond the end of the list.
    best, ids = torch.topk(scores, min(taken + 1, width))
    last = best[:, taken - 1]
    crossing = (best[:, taken] == last).nonzero()[:, 0] if width > taken else ids.new_zeros(0)
    best, ids = best[:, :taken], ids[:, :taken]
    if len(crossing):
        # Of those that are level with the last place, the lowest ids fill what is left.
        row, level = (scores[crossing] == last[crossing, None]).nonzero().T
        count = torch.bincount(row, minlength=len(crossing))
        ends = best[crossing] == last[crossing, None]
        left = ends.sum(1)
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        chosen = ids[crossing]
        chosen[ends] = level[place < left[row]]
        ids = ids.index_copy(0, crossing, chosen)
    ids = ids.sort(dim=1).values
    best, order = scores.gather(1, ids).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order).masked_fill_(best == -torch.inf, -1)
    missing = k - taken
    return (
        torch.nn.functional.pad(best, (0, missing), value=-torch.inf),
        torch.nn.functional.pad(ids, (0, missing), value=-1),
    )
