"""Who has what: the users x items matrix of the train positives, and its products with dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recfast.errors import InputError
from recfast.models.retrieval.base import Retriever
from recfast.ops import _check, embedding_bag

if TYPE_CHECKING:
    from recfast.data import Dataset, Jagged, Schema

# Columns of a dense matrix multiplied at once: wider rows would fall out of the cache between two of their uses.
COLUMNS = 64
_NO_VECTORS = "its score is no dot product of narrow vectors; ask scores(histories, users)"


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

    # What a checkpoint has of these may be longer than what a new model has.
    resizable_state = ("items", "users")

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

    def check_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse saved tensors that are no matrix of this shape: what multiplies with them does not look again."""
        for ids, offsets, rows in (("items", "user_offsets", self.shape[1]), ("users", "item_offsets", self.shape[0])):
            values, ends = saved[ids], saved[offsets]
            if len(values) and not 0 < int(values.min()) <= int(values.max()) < rows:
                raise InputError(f"{ids} has an id outside [1, {rows})")
            if ends[0] != 0 or ends[-1] != len(values) or (ends.diff() < 0).any():
                raise InputError(f"{offsets} does not rise from 0 to the {len(values)} {ids}")

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


def inverse_root(degrees: Tensor) -> Tensor:
    """Return degrees to the power -1/2, and 0 where nothing is."""
    return torch.where(degrees > 0, degrees.clamp(min=1e-12).rsqrt(), 0.0)


class HistoryFilter(Retriever):
    """Base of the retrievers that score by a linear function of the history's items, which is nowhere stored whole.

    Such a score is no dot product of narrow vectors: it is asked of `scores`; `user_vectors` and `item_vectors` refuse.
    """

    def __init__(self, schema: Schema, options: dict[str, Any]) -> None:
        super().__init__(schema, None, options)
        if self.user_column is None:
            raise InputError(
                f"{type(self).__name__}: the schema has no column with the role 'user', whose items it learns from"
            )
        self.interactions = Interactions(schema.rows(self.user_column), self.rows)

    def prepare(self, dataset: Dataset) -> None:
        """Read who has what in the train split."""
        super().prepare(dataset)
        self.interactions.fill(dataset)

    def _scores(self, histories: Jagged, users: Tensor) -> Tensor:
        """Return the scores of all items as columns, float32 [rows(item), B]; histories have distinct, known items."""
        raise NotImplementedError

    @torch.no_grad()
    def scores(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        """Return the scores of all items, float32 [B, rows(item)]; minus infinity for item 0.

        An item that comes twice in a history counts once. Memory: a block of 64 histories at a time.
        """
        if not self.counts.any():
            raise InputError(f"{type(self).__name__}: it knows nobody's items yet: call prepare(dataset) first")
        device = self.counts.device
        rows, place = histories.offsets.shape[0] - 1, f"{type(self).__name__}.scores"
        histories = distinct(histories.to(device), self.rows, place=place)
        users = torch.zeros(rows, dtype=torch.int64, device=device) if users is None else users.to(device)
        scores = torch.empty(rows, self.rows, device=device)
        for begin in range(0, rows, COLUMNS):
            end = min(begin + COLUMNS, rows)
            first, last = int(histories.offsets[begin]), int(histories.offsets[end])
            part = type(histories)(histories.values[first:last], histories.offsets[begin : end + 1] - first)
            scores[begin:end] = self._scores(part, users[begin:end]).T
        scores[:, 0] = -torch.inf
        return scores

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        raise InputError(f"{type(self).__name__}: {_NO_VECTORS}")

    def item_vectors(self) -> Tensor:
        raise InputError(f"{type(self).__name__}: {_NO_VECTORS}")


def distinct(histories: Jagged, rows: int, *, place: str = "distinct") -> Jagged:
    """Return the distinct known items of each history, ascending; an id outside [0, rows) is an IndexError."""
    # It would count as an item of another history.
    _check.indices(place, "histories.values", histories.values, rows)
    lengths = histories.offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    pairs = torch.unique((owner * rows + histories.values)[histories.values > 0])
    count = torch.bincount(pairs // rows, minlength=len(lengths))
    return type(histories)(pairs % rows, torch.nn.functional.pad(count.cumsum(0), (1, 0)))


def as_columns(histories: Jagged, weight: Tensor) -> Tensor:
    """Return histories of distinct items as the columns of a dense matrix of the items' `weight`, float32 [I, B]."""
    lengths = histories.offsets.diff()
    dense = weight.new_zeros(weight.shape[0], len(lengths))
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=weight.device), lengths)
    dense[histories.values, owner] = weight[histories.values]
    return dense
