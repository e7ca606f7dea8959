"""What the ops over hash codes and categories share: checks of jagged or padded rows, and where they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch

from recfast.ops import _check
from recfast.ops._histories import check_candidates, check_jagged, histories, unit_rows


def check_users(op: str, offsets: torch.Tensor, padded_batch: int | None, device: torch.device) -> int:
    """Check `offsets` (or, with a padded batch, `lengths`) as far as shapes go; return the number of users."""
    name, sizes = ("offsets", ["B + 1"]) if padded_batch is None else ("lengths", [padded_batch])
    _check.tensor(op, name, offsets, dtypes=_check.INDEX_DTYPES, shape=sizes, device=device)
    if padded_batch is None and offsets.numel() == 0:
        raise ValueError(f"{op}: offsets must have one entry more than there are lists, got none")
    return offsets.numel() - (padded_batch is None)


def check_shared(
    op: str, name: str, rows: int, candidate_offsets: torch.Tensor | None, users: int, device: torch.device
) -> torch.Tensor | None:
    """Check `candidate_offsets` as far as shapes go, or that there is one row a user without; return them as int64."""
    if candidate_offsets is None:
        if rows != users:
            raise ValueError(
                f"{op}: {name} must have one row a user ({users}) when candidate_offsets is left out, got {rows}"
            )
        return None
    index = {"dtypes": _check.INDEX_DTYPES, "device": device}
    _check.tensor(op, "candidate_offsets", candidate_offsets, shape=[users + 1], **index)
    return candidate_offsets.to(torch.int64)


def cut_candidates(op: str, candidate_offsets: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Contiguous and checked `candidate_offsets`, ready for a kernel."""
    if candidate_offsets is not None:
        candidate_offsets = candidate_offsets.contiguous()
        check_candidates(op, candidate_offsets, rows)
    return candidate_offsets


def users_of(candidate_offsets: torch.Tensor | None, rows: int) -> torch.Tensor:
    """int64 [Nc], the user of each candidate; for references."""
    if candidate_offsets is None:
        return torch.arange(rows)
    return torch.arange(candidate_offsets.numel() - 1).repeat_interleave(candidate_offsets.diff())


class Lists(NamedTuple):
    """Rows of each user, read in place: user b's are `begin[b] <= row < begin[b] + prefix[b + 1] - prefix[b]`.

    Attributes
    ----------
    rows : Tensor [T, W] or [B, L, W], as given or made evenly spaced
    begin : int64 [B]
    prefix : int64 [B + 1]
        Offsets, or the running sum of lengths.
    longest : int
    step : int or None
        Rows from one user to the next when padded, None when jagged.
    """

    rows: torch.Tensor
    begin: torch.Tensor
    prefix: torch.Tensor
    longest: int
    step: int | None

    def place(self, row: int) -> str:
        """`row`, counted as the kernel does, in the indices of the tensor."""
        return f"{row}" if self.step is None else f"{row // self.step}, {row % self.step}"


def lists(op: str, rows: torch.Tensor, offsets: torch.Tensor) -> Lists:
    """Check `offsets` [B + 1] (or `lengths` [B] of padded rows), int64, and say where each user's rows lie."""
    offsets = offsets.contiguous()
    if rows.dim() == 2:
        rows = unit_rows(rows)
        longest = check_jagged(op, "offsets", offsets, rows.shape[0])
        return Lists(rows, offsets[:-1], offsets, longest, None)
    found = histories(op, rows, None, offsets)
    prefix = torch.nn.functional.pad(offsets.cumsum(0), (1, 0))
    return Lists(found.keys, found.begin, prefix, found.longest, found.step)


def flat_rows(rows: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rows [T, ...], offsets [B + 1])` of jagged or padded rows, by copying; for references."""
    if rows.dim() == 2:
        return rows, offsets
    kept = torch.arange(rows.shape[1]) < offsets.unsqueeze(1)
    return rows[kept], torch.nn.functional.pad(offsets.cumsum(0), (1, 0))
