"""Metrics against answers worked out by hand and by brute force."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
import recfast_tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recfast import train
from recfast.errors import InputError
from recfast.train.evaluate import top_k


class Fixed(nn.Module):
    """A ranker that knows its answers."""

    task = "ranking"

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, batch):
        return self.answer(batch)


class Dot(nn.Module):
    """A retriever of given vectors."""

    task = "retrieval"

    def __init__(self, users, items):
        super().__init__()
        self.users, self.items = users, items
        self.histories = {}

    def user_vectors(self, histories, users):
        for position, user in enumerate(users.tolist()):
            self.histories[user] = histories.row(position).tolist()
        return self.users[users]

    def item_vectors(self):
        return self.items


def pairs_auc(label, score):
    good, bad = score[label == 1], score[label == 0]
    return ((good[:, None] > bad).sum() + 0.5 * (good[:, None] == bad).sum()) / (len(good) * len(bad))


@pytest.mark.parametrize("batch_size", [None, 1, 7, 90])
def test_ranking_matches_brute_force(tiny_data, batch_size):
    valid = tiny_data.valid
    # Rounded, so that ties are many.
    model = Fixed(lambda batch: (batch.numeric[:, 0] * 2).round() / 2 + (batch.column("item") % 2) / 4)
    found = train.evaluate(model, valid, batch_size=batch_size)
    score = np.round(valid.numeric[:, 0] * 2) / 2 + (valid.column("item") % 2) / 4
    label, user = valid.label.astype(np.float64), valid.column("user")
    assert found["auc"] == pytest.approx(pairs_auc(label, score), abs=1e-12)
    probability = 1 / (1 + np.exp(-score.astype(np.float64)))
    likely = np.where(label == 1, probability, 1 - probability)
    assert found["logloss"] == pytest.approx(-np.log(likely).mean(), rel=1e-9)
    assert found["pcoc"] == pytest.approx(probability.mean() / label.mean(), rel=1e-9)
    total = weight = 0.0
    for u in np.unique(user):
        mine = user == u
        if 0 < label[mine].sum() < mine.sum():
            total, weight = total + mine.sum() * pairs_auc(label[mine], score[mine]), weight + mine.sum()
    assert weight > 0
    assert found["gauc"] == pytest.approx(total / weight, abs=1e-12)


def test_without_a_group_of_both_kinds_there_is_no_gauc(tiny_data, tmp_path):
    """Users who like everything and users who like nothing."""
    from recfast import data

    rows = [(f"u{u}", f"i{(u * 3 + i) % 20}", u % 2, i) for u in range(8) for i in range(9)]
    log = pl.DataFrame(rows, schema=["user", "item", "label", "time"], orient="row")
    schema = data.Schema([data.Categorical("user", role="user"), data.Categorical("item", role="item")], time="time")
    dataset = data.prepare(schema, log.filter(pl.col("time") < 6), log.filter(pl.col("time") >= 6), cache=tmp_path)
    found = train.evaluate(Fixed(lambda batch: (batch.column("item") % 3).float()), dataset.valid)
    assert found.keys() == {"auc", "logloss", "pcoc"}
    model = recfast_tiny.TinyRetriever(dataset.schema)
    model.task = "ranking"
    model.forward = lambda batch: (model.user(batch.column("user")) * model.item(batch.column("item"))).sum(1)
    model.loss = lambda output, batch: nn.functional.binary_cross_entropy_with_logits(output, batch.label)
    with pytest.raises(InputError, match="fit: monitor = 'gauc' cannot be measured: no group of the valid split has"):
        train.fit(model, dataset, epochs=1, monitor="gauc")


def test_a_sure_model_has_a_finite_logloss(tiny_data):
    label = torch.from_numpy(np.array(tiny_data.valid.label))
    model = Fixed(lambda batch: (batch.label * 2 - 1) * -200)
    assert train.evaluate(model, tiny_data.valid)["logloss"] == pytest.approx(200)
    assert train.evaluate(model, tiny_data.valid)["auc"] == 0.0
    assert label.unique().numel() == 2


def test_the_mode_of_the_model_is_kept(tiny_data):
    model = recfast_tiny.TinyRanker(tiny_data.schema)
    first = train.evaluate(model.train(), tiny_data.valid)
    assert model.training
    assert train.evaluate(model.eval(), tiny_data.valid) == first
    assert not model.training


@pytest.mark.parametrize("batch_size", [None, 1, 7])
@pytest.mark.parametrize("name", ["valid", "test"])
def test_retrieval_matches_brute_force(tiny_data, name, batch_size):
    torch.manual_seed(3)
    schema = tiny_data.schema
    # Small integers: ties are many, and every product is exact.
    users = torch.randint(-2, 3, (schema.rows("user"), 3)).float()
    items = torch.randint(-2, 3, (schema.rows("item"), 3)).float()
    model, split = Dot(users, items), getattr(tiny_data, name)
    found = train.evaluate(model, split, dataset=tiny_data, k=(3, 10), batch_size=batch_size)
    before = "train" if name == "valid" else "valid"
    history, seen = tiny_data.history(before), tiny_data.seen(before)
    recall, ndcg, count = {3: 0.0, 10: 0.0}, {3: 0.0, 10: 0.0}, 0
    for user in range(1, schema.rows("user")):
        mine = (split.column("user") == user) & (split.label == 1)
        old = set(seen.row(user).tolist())
        truth = set(split.column("item")[mine].tolist()) - old - {0}
        if not truth:
            continue
        count += 1
        scores = (users[user] @ items.T).tolist()
        order = sorted((i for i in range(1, len(scores)) if i not in old), key=lambda i: (-scores[i], i))
        for k in (3, 10):
            hits = [i in truth for i in order[:k]]
            recall[k] += sum(hits) / len(truth)
            best = sum(1 / math.log2(p + 2) for p in range(min(k, len(truth))))
            ndcg[k] += sum(h / math.log2(p + 2) for p, h in enumerate(hits)) / best
        assert model.histories[user] == history.row(user).tolist()
    assert found["users"] == count > 20
    for k in (3, 10):
        assert found[f"recall@{k}"] == pytest.approx(recall[k] / count, abs=1e-12)
        assert found[f"ndcg@{k}"] == pytest.approx(ndcg[k] / count, abs=1e-12)


def test_a_retriever_with_scores_of_its_own(tiny_data):
    schema = tiny_data.schema

    class Parity(nn.Module):
        task = "retrieval"

        def scores(self, histories, users):
            chosen = torch.zeros(len(users), schema.rows("item"))
            for row, user in enumerate(users.tolist()):
                liked = tiny_data.valid.column("item")[
                    (tiny_data.valid.column("user") == user) & (tiny_data.valid.label == 1)
                ]
                chosen[row, torch.from_numpy(liked).long()] = 1.0
            return chosen

    found = train.evaluate(Parity(), tiny_data.valid, dataset=tiny_data, k=[5])
    assert (found["recall@5"], found["ndcg@5"]) == (1.0, 1.0)


def test_more_places_than_items(tiny_data):
    schema = tiny_data.schema
    model = Dot(torch.ones(schema.rows("user"), 1), torch.ones(schema.rows("item"), 1))
    assert train.evaluate(model, tiny_data, k=[1000])["recall@1000"] == 1.0


@given(
    st.lists(
        st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=6), min_size=1, max_size=4
    ),
    st.integers(1, 9),
)
def test_top_k_takes_the_lowest_ids_of_equal_scores(rows, k):
    scores, ids = top_k(torch.tensor(rows), k)
    for row, found_scores, found_ids in zip(rows, scores.tolist(), ids.tolist(), strict=True):
        order = sorted((i for i in range(6) if row[i] > -math.inf), key=lambda i: (-row[i], i))[:k]
        assert found_ids == order + [-1] * (k - len(order))
        assert found_scores == [row[i] for i in order] + [-math.inf] * (k - len(order))


def test_rejects_bad_input(tiny_data):
    schema = tiny_data.schema
    ranker, retriever = recfast_tiny.TinyRanker(schema), recfast_tiny.TinyRetriever(schema)
    with pytest.raises(InputError, match="evaluate: the valid split has no rows"):
        train.evaluate(ranker, tiny_data.valid.take([]))
    with pytest.raises(InputError, match="all labels of the valid split are 1, AUC needs both kinds"):
        train.evaluate(ranker, tiny_data.valid.positives())
    with pytest.raises(InputError, match="pass dataset= beside the split"):
        train.evaluate(retriever, tiny_data.valid)
    with pytest.raises(InputError, match="measured on the valid or the test split, not on 'train'"):
        train.evaluate(retriever, tiny_data.train, dataset=tiny_data)
    with pytest.raises(InputError, match="no known user has a new, known item with label 1"):
        train.evaluate(retriever, tiny_data.valid.take(tiny_data.valid.label == 0), dataset=tiny_data)
    with pytest.raises(InputError, match=r"evaluate: k = \[0\], expected lengths of 1 or more"):
        train.evaluate(retriever, tiny_data, k=[0])
    with torch.no_grad():
        retriever.user.weight[5, 0] = float("nan")
    with pytest.raises(InputError, match="a score of the user with the id 5 is NaN"):
        train.evaluate(retriever, tiny_data.valid, dataset=tiny_data)
    model = Fixed(lambda batch: torch.where(torch.arange(len(batch)) == 3, torch.nan, 0.0))
    with pytest.raises(InputError, match="the score of row 3 of the valid split is nan"):
        train.evaluate(model, tiny_data.valid)
    tiny_data.test = None
    with pytest.raises(InputError, match="the data set 'tiny' has no test split"):
        train.evaluate(ranker, tiny_data)
