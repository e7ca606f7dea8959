"""Who has what: the users x items matrix of the train positives, and its products with dense matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recfast.ops import embedding_bag

if TYPE_CHECKING:
    from recfast.data import Dataset, Jagged

# Columns of a dense matrix multiplied at once: wider rows would fall out of the cache between two of their uses.
COLUMNS = 64


class Interactions(nn.Module):
    r"""The matrix :math:`X` [U, I] of zeros and ones, stored by users and by items.

    Row and column 0 ("unknown") are empty. Empty until `fill`; what is filled in is part of the model's state, of
    whatever length.

    Parameters
    ----------
    users, items
        U and I.
    """

    items: Tensor
    """int32 [T], the items of user 0, of user 1, ..., ascending."""
    user_offsets: Tensor
    """int64 [U + 1]."""
    users: Tensor
    """int32 [T], the users of item 0, of item 1, ..., ascending."""
    item_offsets: Tensor
    """int64 [I + 1]."""

    # What a checkpoint has may be longer than what a new model has.
    resizable_state = True

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.shape = users, items
        self.register_buffer("items", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("users", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("user_offsets", torch.zeros(users + 1, dtype=torch.int64))
        self.register_buffer("item_offsets", torch.zeros(items + 1, dtype=torch.int64))

    def fill(self, dataset: Dataset) -> None:
        """Take the train positives; a pair that comes twice counts once, an unknown user or item not at all."""
        lists, (users, items) = dataset.history("train"), self.shape
        owner = torch.repeat_interleave(torch.arange(lists.offsets.shape[0] - 1), lists.lengths())
        known = (owner > 0) & (lists.values > 0)
        pairs = torch.unique(owner[known] * items + lists.values[known])
        owner, item = pairs // items, pairs % items
        device = self.items.device
        self.items = item.to(device, torch.int32)
        self.users = owner[torch.argsort(item, stable=True)].to(device, torch.int32)
        for offsets, ids, rows in ((self.user_offsets, owner, users), (self.item_offsets, item, items)):
            offsets[1:] = torch.bincount(ids, minlength=rows).cumsum(0)

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self.items)

    def user_degrees(self) -> Tensor:
        """How many items each user has, float32 [U]."""
        return self.user_offsets.diff().float()

    def item_degrees(self) -> Tensor:
        """How many users each item has, float32 [I]."""
        return self.item_offsets.diff().float()

    def of_items(self, dense: Tensor) -> Tensor:
        """Return :math:`X E`, float32 [U, n], of `dense` [I, n]: to each user the sum of the rows of its items."""
        return _product(dense, self.items, self.user_offsets)

    def of_users(self, dense: Tensor) -> Tensor:
        """Return :math:`X^T E`, float32 [I, n], of `dense` [U, n]: to each item the sum of the rows of its users."""
        return _product(dense, self.users, self.item_offsets)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for name in ("items", "users"):
            if (saved := state_dict.get(prefix + name)) is not None:
                own = getattr(self, name)
                setattr(self, name, torch.zeros(saved.shape, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _product(dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    parts = [
        embedding_bag(part.contiguous(), ids, offsets.to(ids.dtype), check=False)
        for part in dense.split(COLUMNS, dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def columns_of(histories: Jagged, weight: Tensor) -> Tensor:
    """Return histories as the columns of a dense matrix, float32 [I, B].

    Parameters
    ----------
    histories
        B lists of item ids; an item that comes twice counts once, id 0 not at all.
    weight
        float32 [I], the entry of each item.
    """
    lengths = histories.offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=weight.device), lengths)
    dense = weight.new_zeros(weight.shape[0], len(lengths))
    dense[histories.values, owner] = weight[histories.values]
    dense[0] = 0.0
    return dense


def inverse_root(degrees: Tensor) -> Tensor:
    """Return degrees to the power -1/2, and 0 where nothing is."""
    return torch.where(degrees > 0, degrees.clamp(min=1e-12).rsqrt(), 0.0)
