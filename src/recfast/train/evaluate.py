"""How good a model is: a ranker by its probabilities, a retriever by what it finds among all items."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from recfast import metrics
from recfast.data import Jagged, Loader
from recfast.errors import InputError
from recfast.nn.top_k import top_k

if TYPE_CHECKING:
    from recfast.data import Dataset
    from recfast.data.dataset import Split

_RANKING = ("auc", "gauc", "logloss", "pcoc")
_RETRIEVAL = ("recall", "ndcg")

# Scores held at once by a retrieval evaluation: 64 MB in float32.
_BLOCK_SCORES = 1 << 24


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of `metric` is the better one."""
    return metric in ("loss", "logloss")


def check_monitor(monitor: str | None, task: str, data: Dataset) -> str | None:
    """Return the metric to watch: the task's usual one if None; None where there is no validation split to watch.

    Raises
    ------
    InputError
        The metric is not one that can tell better from worse, or needs a validation split that is not there.
    """
    measured = data.valid is not None and len(data.valid) > 0
    if monitor is None:
        return ("auc" if task == "ranking" else "recall@50") if measured else None
    if task == "ranking":
        usable, known = monitor in ("auc", "gauc", "logloss"), "auc, gauc, logloss"
    else:
        usable = re.fullmatch(rf"({'|'.join(_RETRIEVAL)})@[1-9]\d*", monitor) is not None
        known = ", ".join(f"{name}@K" for name in _RETRIEVAL)
    if monitor != "loss" and not usable:
        raise InputError(f"fit: monitor = {monitor!r}, expected loss, {known}")
    if monitor == "gauc" and _group_column(data.valid if measured else data.train) is None:
        raise InputError("fit: monitor = 'gauc' needs a schema with group= or a column with the role 'user'")
    if monitor != "loss" and not measured:
        raise InputError(f"fit: monitor = {monitor!r} needs a validation split with rows, and this data set has none")
    return monitor


def evaluate(
    model: nn.Module,
    data: Split | Dataset,
    *,
    dataset: Dataset | None = None,
    k: Sequence[int] = (10, 50),
    batch_size: int | None = None,
    shared: bool = False,
) -> dict[str, float]:
    r"""Measure `model` on a split.

    Parameters
    ----------
    model
        Of the task "ranking", or "retrieval" with `scores(histories, users)` or `user_vectors` and `item_vectors`.
    data
        The split; of a whole data set its test split.
    dataset
        The data set of the split: a retriever is given the users' histories from it.
    k
        Lengths of the list, for retrieval.
    batch_size
        Rows (ranking; 8192 if left out) or users (retrieval; as many as make 64 MB of scores, at most 1024) at a time.

    shared
        Ranking: the rows of one moment are given their user's history once (`data.Loader(shared=True)`), and
        `batch_size` counts such requests (512 if left out).

    Returns
    -------
    dict
        Ranking: "auc", "logloss" (natural logarithm), "pcoc" (mean of the predictions over mean of the labels), and
        "gauc", AUC within each group weighted by its rows, over groups with both labels (the schema's group, or else
        the user); left out where there is no such group.

        Retrieval: "recall@k" :math:`= |L_k \cap P| / |P|` and "ndcg@k" (gain 1, the ideal list as long as
        :math:`\min(k, |P|)`), means over "users", the number of users who have a positive in the split. The history
        is what came in the splits before; items a user has seen in those are neither recommended nor counted as
        positives. Unknown users and items (id 0) are left out. Of equal scores the lowest id comes first.

    Raises
    ------
    InputError
        The split is empty or has labels of one kind only, no user has a positive, or a score is NaN.

    Notes
    -----
    Memory: ranking keeps a score for each row; retrieval one block of users x items.
    """
    split = data
    if not hasattr(data, "gather"):
        dataset, split = data, data.test
        if split is None:
            raise InputError(f"evaluate: the data set {data.name!r} has no test split")
    if len(split) == 0:
        raise InputError(f"evaluate: the {split.name} split has no rows")
    if model.task == "retrieval" and (not k or min(k) < 1):
        raise InputError(f"evaluate: k = {list(k)}, expected lengths of 1 or more")
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if model.task == "ranking":
                return _ranking(model, split, batch_size or (512 if shared else 8192), shared)
            if dataset is None:
                raise InputError("evaluate: a retriever needs the users' histories: pass dataset= beside the split")
            return _retrieval(model, split, dataset, sorted(set(k)), batch_size)
    finally:
        model.train(was_training)


def _ranking(model: nn.Module, split: Split, batch_size: int, shared: bool) -> dict[str, float]:
    logits, labels, groups = [], [], []
    device, column = _device(model), _group_column(split)
    for batch in Loader(split, batch_size, shared=shared):
        logits.append(model(batch.to(device)).float().cpu())
        labels.append(batch.label)
        if column is not None:
            groups.append(batch.group if batch.group is not None else batch.column(column))
    if labels[0] is None:
        raise InputError(f"evaluate: the {split.name} split has no labels, which a ranking model is measured by")
    logit, label = torch.cat(logits).numpy(), torch.cat(labels).numpy()
    if not np.isfinite(logit).all():
        row = int(np.flatnonzero(~np.isfinite(logit))[0])
        raise InputError(f"evaluate: the score of row {row} of the {split.name} split is {logit[row]}, not a number")
    if label.min() == label.max():
        raise InputError(f"evaluate: all labels of the {split.name} split are {label[0]:g}, AUC needs both kinds")
    wide = torch.from_numpy(logit).double()
    probability = torch.sigmoid(wide).numpy()
    # From the logit: the logarithm of a rounded probability would be infinite where the model is sure.
    loss = torch.nn.functional.binary_cross_entropy_with_logits(wide, torch.from_numpy(label).double())
    result = {
        "auc": metrics.auc(label, logit),
        "logloss": loss.item(),
        "pcoc": metrics.pcoc(label, probability),
    }
    if column is not None:
        # The only thing that can still be wrong: no group has both kinds of labels.
        with contextlib.suppress(InputError):
            result["gauc"] = metrics.gauc(label, logit, torch.cat(groups)).value
    return result


def _retrieval(
    model: nn.Module, split: Split, dataset: Dataset, k: list[int], batch_size: int | None
) -> dict[str, float]:
    before = {"valid": "train", "test": "valid"}.get(split.name)
    if before is None:
        raise InputError(f"evaluate: a retriever is measured on the valid or the test split, not on {split.name!r}")
    schema = dataset.schema
    history, seen = dataset.history(before), dataset.seen(before)
    rows = schema.rows(schema.item)
    users, truth = held_out(split, seen)
    if users.size == 0:
        raise InputError(f"evaluate: no known user has a new, known item with label 1 in the {split.name} split")
    measured = {f"{name}@{size}": (getattr(metrics, name), size, []) for size in k for name in _RETRIEVAL}
    for begin, ids in _recommend(model, history, seen, users, k[-1], rows, batch_size):
        relevant = truth.take(np.arange(begin, begin + len(ids)))
        for metric, size, values in measured.values():
            values.append(metric(ids, relevant, size))
    result = {name: float(np.concatenate(values).mean()) for name, (_, _, values) in measured.items()}
    return {**result, "users": len(users)}


def held_out(split: Split, excluded: Jagged | None) -> tuple[np.ndarray, Jagged]:
    """Return what there is to be found in a split.

    Parameters
    ----------
    split
        Rows after those that the model knows.
    excluded
        By user id, items that do not count, such as those the user has seen before.

    Returns
    -------
    (users int64 [U], ascending; the distinct items that each of them likes in the split), unknown ones left out.
    """
    chosen, rows = split.positives(), split.schema.rows(split.schema.item)
    user = chosen.column(split.schema.user).astype(np.int64)
    item = chosen.column(split.schema.item).astype(np.int64)
    known = (user > 0) & (item > 0)
    pairs = np.unique(user[known] * rows + item[known])
    if excluded is not None:
        owner = np.repeat(np.arange(len(excluded.offsets) - 1), np.diff(excluded.offsets.numpy()))
        pairs = pairs[~np.isin(pairs, owner * rows + excluded.values.numpy())]
    users, counts = np.unique(pairs // rows, return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return users, Jagged(torch.from_numpy(pairs % rows), torch.from_numpy(offsets))


def top_items(
    model: nn.Module,
    users: torch.Tensor,
    k: int,
    *,
    history: Jagged,
    masked: Jagged,
    batch_size: int | None = None,
) -> torch.Tensor:
    """Return the `k` best items of each user by the model's own scores, exactly; int64 [U, k], -1 padded.

    Parameters
    ----------
    model
        A retriever: `scores(histories, users)`, or `user_vectors` and `item_vectors`.
    users
        int64 [U], ids.
    k
        Length of the list.
    history, masked
        By user id: what the model is given, and what is not to be recommended.
    batch_size
        Users at a time; as many as make 64 MB of scores, at most 1024, if left out.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            # Not every model has vectors of its items.
            rows = getattr(model, "rows", None) or len(model.item_vectors())
            blocks = _recommend(model, history, masked, users.numpy(), k, rows, batch_size)
            found = [torch.from_numpy(ids) for _, ids in blocks]
    finally:
        model.train(was_training)
    return torch.cat(found) if found else torch.zeros(0, k, dtype=torch.int64)


def _recommend(
    model: nn.Module,
    history: Jagged,
    seen: Jagged,
    users: np.ndarray,
    k: int,
    rows: int,
    batch_size: int | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, block of users by block, the first user's position and the best `k` new items int64 [b, k], -1 padded."""
    device = _device(model)
    # A model may score in a way of its own, such as by neighbours; else the score is the dot product.
    items = None if hasattr(model, "scores") else model.item_vectors()
    size = batch_size or max(1, min(1024, _BLOCK_SCORES // rows))
    for begin in range(0, len(users), size):
        block = torch.from_numpy(users[begin : begin + size])
        asked = history.take(block).to(device), block.to(device)
        scores = (model.scores(*asked) if items is None else model.user_vectors(*asked) @ items.T).float()
        old = seen.take(block)
        owner = torch.repeat_interleave(torch.arange(len(block)), old.lengths())
        scores[owner.to(device), old.values.to(device)] = -torch.inf
        scores[:, 0] = -torch.inf
        best, found = top_k(scores, k)
        # To torch.topk what is not a number is more than any number.
        if (wrong := torch.isnan(best)).any():
            row = int(wrong.any(1).nonzero()[0])
            raise InputError(f"evaluate: a score of the user with the id {users[begin + row]} is NaN, not a number")
        yield begin, found.cpu().numpy()


def _group_column(split: Split) -> str | None:
    return split.schema.group or split.schema.user


def _device(model: nn.Module) -> torch.device:
    tensor: Any = next(model.parameters(), None)
    if tensor is None:
        tensor = next(model.buffers(), None)
    return torch.device("cpu") if tensor is None else tensor.device
