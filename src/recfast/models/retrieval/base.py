"""What every retriever has: names of its columns, item counts, scores as dot products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.nn.losses import NegativesLoss

if TYPE_CHECKING:
    from recfast.data import Batch, Dataset, Jagged, Schema


class Retriever(nn.Module):
    """Base of the retrievers: the score of user u and item i is ``user_vectors(...)[u] @ item_vectors()[i]``.

    Trained on rows with label 1: the item of a row is the positive. `prepare(dataset)` is called once before training.
    A row's history is the sequence of the batch; where the schema has none, for want of a time, it is the user's other
    train positives.

    Parameters
    ----------
    schema
        Fitted, with a column of the role "item".
    sequence
        The name of the sequence of items that is the user's history; the schema's first one if None.
    options
        The constructor's keyword options, as `config` gives them back.
    """

    task = "retrieval"

    sparse_gradients = False
    """Whether tables that a batch reads by id get sparse gradients; `train.fit` sets it for "lazy_adam"."""

    counts: Tensor
    """int64 [rows(item)], train positives of each item; zeros before `prepare`."""

    def __init__(self, schema: Schema, sequence: str | None, options: dict[str, Any]) -> None:
        super().__init__()
        name = type(self).__name__
        if schema.item is None:
            raise InputError(f"{name}: the schema has no column with the role 'item', which is what it retrieves")
        known = [column.name for column in schema.sequences if column.of in ("item", schema.item)]
        if sequence is not None and sequence not in known:
            raise InputError(f"{name}: sequence = {sequence!r} is not a sequence of items, expected one of {known}")
        self.user_column, self.item_column = schema.user, schema.item
        self.sequence = sequence or (known[0] if known else None)
        self.rows = schema.rows(schema.item)
        self._options = options
        self.register_buffer("counts", torch.zeros(self.rows, dtype=torch.int64))
        self._positives: Jagged | None = None

    def config(self) -> dict[str, Any]:
        """Return the constructor's keyword options, JSON-able."""
        return dict(self._options)

    def prepare(self, dataset: Dataset) -> None:
        """Learn from the train split what is no weight: here how many positives each item has."""
        counts = torch.bincount(dataset.history("train").values, minlength=self.rows)
        if counts.shape[0] != self.rows:
            raise InputError(
                f"{type(self).__name__}.prepare: the data set has {counts.shape[0]} item rows, the schema {self.rows}"
            )
        counts[0] = 0
        self.counts.copy_(counts)
        if self.sequence is None and self.user_column is not None:
            self._positives = dataset.history("train")

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        """Return one vector per history, float32 [B, D].

        Parameters
        ----------
        histories
            B lists of item ids in time order, latest last; only as much of each as the model looks at counts, and
            unknown items (id 0) do not. An empty list is allowed.
        users
            int64 [B], user ids; None, or an id 0, is an unknown user.
        """
        raise NotImplementedError

    def item_vectors(self) -> Tensor:
        """Return the vector of each item id, float32 [rows(item), D]; row 0 ("unknown") is never to be recommended."""
        raise NotImplementedError

    def similarity_vectors(self) -> Tensor:
        """Return vectors whose cosine says how alike two items are, float32 [rows(item), D]; without a bias."""
        return self.item_vectors()

    def scores(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        """Return the scores of all items, float32 [B, rows(item)]; minus infinity for item 0."""
        scores = self.user_vectors(histories, users) @ self.item_vectors().T
        scores[:, 0] = -torch.inf
        return scores

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """Return the rows `ids` of a table, with a gradient as `sparse_gradients` says."""
        return F.embedding(ids, table, sparse=True) if self.sparse_gradients else table.index_select(0, ids)

    def histories(self, batch: Batch) -> Jagged:
        """Return the histories of a batch of positive rows, one for each row."""
        name = type(self).__name__
        if self.sequence is None:
            if self.user_column is None:
                raise InputError(f"{name}: the schema has no sequence of items to learn from; add a Sequence column")
            if self._positives is None:
                raise InputError(f"{name}: the users' positives are their histories: call prepare(dataset) first")
            users, positive = batch.column(self.user_column), batch.column(self.item_column)
            return without(self._positives.take(users.cpu()).to(positive.device), positive)
        histories = batch.sequences[self.sequence]
        if histories.offsets.shape[0] != len(batch) + 1:
            raise ValueError(
                f"{name}: the batch has {len(batch)} rows and {histories.offsets.shape[0] - 1} histories, "
                "expected one history for each row"
            )
        return histories


def without(lists: Jagged, ids: Tensor) -> Jagged:
    """Return the lists without one id each, int64 [B]."""
    lengths = lists.lengths()
    keep = (lists.values != ids.repeat_interleave(lengths)).nonzero()[:, 0]
    owner = torch.repeat_interleave(lengths)[keep]
    offsets = F.pad(torch.bincount(owner, minlength=len(lengths)).cumsum(0), (1, 0))
    return type(lists)(lists.values[keep], offsets)


def trained_rows(output: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return the user vectors and positives without the rows whose item is unknown (id 0)."""
    known = positive != 0
    return output[known], positive[known]


def against_uniform(
    criterion: NegativesLoss, user: Tensor, positive: Tensor, table: Tensor, count: int, shared_by: int | None
) -> Tensor:
    """Return the mean loss of each row's positive against `count` items drawn uniformly (never item 0).

    Parameters
    ----------
    criterion
        With ``reduction="none"``.
    user
        float [B, D].
    positive
        int64 [B].
    table
        float [rows(item), D].
    count
        K.
    shared_by
        So many rows one after another have the same K items; None: all rows of the batch. Drawn with torch's generator.
    """
    rows = len(positive)
    size = rows if shared_by is None else min(shared_by, rows)
    drawn = torch.randint(1, table.shape[0], (-(-rows // size), count), device=positive.device)
    if len(drawn) == 1:
        return criterion(user, table, positive, drawn[0]).mean()
    # Lists that few rows share are as good as private ones.
    return criterion(user, table, positive, drawn.repeat_interleave(size, 0)[:rows]).mean()
