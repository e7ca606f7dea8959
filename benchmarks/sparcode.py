"""SparCode against two towers with the same query encoder: what each finds, and what a query costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recfast import data, metrics, models
from recfast.data import Batch, Jagged
from recfast.train.evaluate import held_out, top_items


@dataclass
class Task:
    """What is trained on and what is to be found.

    positives
        By user id, the positives to train on; in time order where `ordered`.
    known, seen
        By user id, the history that is given when the model is asked, and what it may not answer.
    users, truth
        int64 [U] who is asked, and what each likes.
    """

    name: str
    schema: data.Schema
    positives: Jagged
    known: Jagged
    seen: Jagged
    users: np.ndarray
    truth: Jagged
    ordered: bool
    dataset: Any = None


class SharedPositives:
    """Batches in which several positives share one history.

    Of a user in time order: each next `window` positives, with what came before them. Of a user without order: a random
    `share` of the positives, with the others. Every epoch is drawn anew.
    """

    def __init__(self, task: Task, rows: int, seed: int, *, window: int = 5, share: float = 0.2) -> None:
        self.task, self.rows, self.window, self.share = task, rows, window, share
        self.random = np.random.default_rng(seed)
        self.offsets = task.positives.offsets.numpy()
        self.values = task.positives.values.numpy()
        self.columns = tuple(column.name for column in task.schema.categorical)
        self.sequence = next((column.name for column in task.schema.sequences), "history")

    def __iter__(self) -> Iterator[Batch]:
        random, offsets = self.random, self.offsets
        lengths = np.diff(offsets)
        if self.task.ordered:
            values = self.values
            first = 1 + random.integers(0, self.window, len(lengths))
            pieces = np.maximum(0, -(-(lengths - first) // self.window))
            user = np.repeat(np.arange(len(lengths)), pieces)
            step = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            begin = offsets[user] + first[user] + step * self.window
            end = np.minimum(begin + self.window, offsets[user + 1])
        else:
            # Shuffled within each user: the last ones are the targets.
            owner = np.repeat(np.arange(len(lengths)), lengths)
            values = self.values[np.lexsort((random.random(len(owner)), owner))]
            targets = np.minimum(np.maximum(1, random.binomial(lengths, self.share)), lengths)
            user = np.flatnonzero(lengths > 0)
            begin, end = offsets[user + 1] - targets[user], offsets[user + 1]
        order = random.permutation(len(user))
        for start in range(0, len(order), self.rows):
            rows = order[start : start + self.rows]
            who, a, b = user[rows], begin[rows], end[rows]
            starts, counts = offsets[who], b - a
            history = _slices(values, starts, a)
            target = _slices(values, a, b)
            ids = np.zeros((len(target.values), len(self.columns)), dtype=np.int64)
            ids[:, self.columns.index(self.task.schema.user)] = np.repeat(who, counts)
            ids[:, self.columns.index(self.task.schema.item)] = target.values
            yield Batch(
                ids=torch.from_numpy(ids),
                numeric=torch.zeros(len(ids), 0),
                sequences={self.sequence: history},
                candidate_offsets=target.offsets,
                columns=self.columns,
            )


def _slices(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Jagged:
    from recfast.data.dataset import gather_jagged

    return Jagged(*map(torch.from_numpy, gather_jagged(values, starts, ends, None)))


@torch.inference_mode()
def measured(model: torch.nn.Module, task: Task, users: int | None = None) -> dict[str, float]:
    chosen = slice(None) if users is None or users >= len(task.users) else slice(None, None, -(-len(task.users) // users))
    asked = torch.from_numpy(task.users)[chosen]
    ids = top_items(model, asked, 50, history=task.known, masked=task.seen).numpy()
    truth = task.truth.take(np.arange(len(task.users))[chosen])
    return found(ids, truth)


def found(ids: np.ndarray, truth: Jagged) -> dict[str, float]:
    return {
        f"{name}@{k}": float(getattr(metrics, name)(ids, truth, k).mean()) for k in (20, 50) for name in ("recall", "ndcg")
    }


def train(model, task, *, epochs, rows, lr, decay=0.0, seed=0, window=5, share=0.2, check=None, say=print, users=None, final_lr=1.0):
    torch.manual_seed(seed)
    model.counts.copy_(torch.bincount(task.positives.values, minlength=model.rows))
    model.counts[0] = 0
    from recfast.models.retrieval._candidates import start_biases
    start_biases(model.bias, model.counts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    batches = SharedPositives(task, rows, seed, window=window, share=share)
    history, seconds = [], 0.0
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (1 - final_lr) * epoch / max(1, epochs - 1))
        model.train()
        started, total, n = time.perf_counter(), 0.0, 0
        for batch in batches:
            loss = model.loss(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
            n += len(batch)
        seconds += time.perf_counter() - started
        if check and (epoch + 1) % check == 0:
            t = time.perf_counter()
            got = measured(model.eval(), task, users)
            history.append({"epoch": epoch + 1, "loss": total / n, "seconds": seconds, **got})
            extra = model.tokens.quantizer.report()["perplexity"][:4] if hasattr(model, "tokens") else ""
            say(f"  {epoch + 1:3d} loss {total / n:.4f} r20 {got['recall@20']:.4f} r50 {got['recall@50']:.4f} n20 {got['ndcg@20']:.4f} n50 {got['ndcg@50']:.4f} {seconds:.1f}s eval {time.perf_counter()-t:.1f}s", extra, flush=True)
    return history, seconds


def movielens(path, split="valid", cache=None) -> Task:
    d = data.load("ml-100k", path, negatives=0, cache=cache)
    before = {"valid": "train", "test": "valid"}[split]
    users, truth = held_out(getattr(d, split), d.seen(before))
    return Task("ml-100k", d.schema, d.history("train"), d.history(before), d.seen(before), users, truth, True, d)


def gowalla(path, split="valid", cache=None) -> Task:
    d = data.load("gowalla", path, cache=cache, **({"valid_share": 0.1} if split == "valid" else {}))
    part = getattr(d, split)
    known = d.history("train")
    users, truth = held_out(part, known)
    return Task("gowalla", d.schema, known, known, known, users, truth, False, d)


def pretrained(task: Task, dim: int, item_count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of items in a history, and as candidates, by the truncated SVD of the normalised interactions."""
    import scipy.sparse as sp

    h = task.positives
    x = sp.csr_matrix(
        (np.ones(len(h.values), dtype=np.float32), h.values.numpy(), h.offsets.numpy()), shape=(len(h.offsets) - 1, item_count)
    )
    of_user = np.maximum(np.asarray(x.sum(1)).ravel(), 1)
    of_item = np.maximum(np.asarray(x.sum(0)).ravel(), 1)
    r = (sp.diags(of_user**-0.5) @ x @ sp.diags(of_item**-0.5)).tocsr().astype(np.float32)
    q = np.random.default_rng(0).standard_normal((item_count, dim + 16)).astype(np.float32)
    for _ in range(4):
        q, _ = np.linalg.qr(r.T @ (r @ q))
    _, _, vt = np.linalg.svd(r @ q, full_matrices=False)
    v = (q @ vt.T)[:, :dim]
    tables = (v * of_item[:, None] ** -0.5, v * of_item[:, None] ** 0.3)
    return tuple(torch.from_numpy((t / np.linalg.norm(t, axis=1).mean()).astype(np.float32)) for t in tables)
