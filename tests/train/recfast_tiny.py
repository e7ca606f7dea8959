"""Small real models and a small log, for the tests of the training loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn

from recfast import data


def prepare(cache: Path, *, users: int = 30, items: int = 40, seed: int = 0) -> data.Dataset:
    """Write a log in which a user clicks the items of the same parity, with some noise, and prepare it."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for time, item in enumerate(random.permutation(items)[:20]):
            click = int((user % 2 == item % 2) != (random.random() < 0.1))
            rows.append((f"u{user}", f"i{item}", click, time, float(random.normal())))
    log = pl.DataFrame(rows, schema=["user", "item", "click", "time", "price"], orient="row")
    schema = data.Schema(
        [
            data.Categorical("user", role="user"),
            data.Categorical("item", role="item"),
            data.Numeric("price"),
            data.Sequence("history", of="item", max_length=10),
        ],
        label="click",
        time="time",
    )
    parts = [log.filter(pl.col("time").is_between(a, b)) for a, b in ((0, 13), (14, 16), (17, 19))]
    return data.prepare(schema, parts[0], parts[1], parts[2], cache=cache, name="tiny")


class TinyRanker(nn.Module):
    """Two layers with dropout over the sum of embeddings: every global source of randomness is used."""

    task = "ranking"

    def __init__(self, schema, *, dim: int = 8, dropout: float = 0.2, fail_at: int | None = None):
        super().__init__()
        self.options = {"dim": dim, "dropout": dropout}
        self.tables = nn.ModuleList(nn.Embedding(schema.rows(c.name), dim) for c in schema.categorical)
        self.item = schema.position(schema.item)
        self.net = nn.Sequential(
            nn.Linear(2 * dim + 1, 16), nn.ReLU(), nn.Dropout(dropout), nn.BatchNorm1d(16), nn.Linear(16, 1)
        )
        self.fail_at, self.losses = fail_at, 0

    def config(self):
        return dict(self.options)

    def forward(self, batch):
        rows = torch.stack([table(batch.ids[:, j]) for j, table in enumerate(self.tables)])
        history = batch.sequences["history"]
        past = nn.functional.embedding_bag(
            history.values, self.tables[self.item].weight, history.offsets, include_last_offset=True, mode="mean"
        )
        return self.net(torch.cat([rows.prod(0), past, batch.numeric], 1)).squeeze(1)

    def loss(self, output, batch):
        self.losses += 1
        if self.losses == self.fail_at:
            raise KeyboardInterrupt
        return nn.functional.binary_cross_entropy_with_logits(output, batch.label)


class TinyRetriever(nn.Module):
    """Matrix factorisation with drawn negatives."""

    task = "retrieval"

    def __init__(self, schema, *, dim: int = 8):
        super().__init__()
        self.options = {"dim": dim}
        self.user = nn.Embedding(schema.rows(schema.user), dim)
        self.item = nn.Embedding(schema.rows(schema.item), dim)
        self.names = schema.user, schema.item
        self.prepared = 0

    def prepare(self, dataset):
        self.prepared += len(dataset.train)

    def config(self):
        return dict(self.options)

    def forward(self, batch):
        user = self.user(batch.column(self.names[0]))
        negative = torch.randint(1, self.item.num_embeddings, (len(batch), 5))
        positive = (user * self.item(batch.column(self.names[1]))).sum(1, keepdim=True)
        return torch.cat([positive, torch.einsum("bd,bkd->bk", user, self.item(negative))], 1)

    def loss(self, output, batch):
        return nn.functional.cross_entropy(output, torch.zeros(len(batch), dtype=torch.int64))

    def user_vectors(self, histories, users):
        return self.user(users)

    def item_vectors(self):
        return self.item.weight
