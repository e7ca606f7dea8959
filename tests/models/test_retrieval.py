"""Retrievers: what their vectors are, what they learn, and what they have to beat."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from recfast import data
from recfast.data import Jagged, Loader
from recfast.errors import InputError
from recfast.models.retrieval import baselines
from recfast.models.retrieval.baselines import ItemKNN, Popularity, nearest_items
from recfast.models.retrieval.simplex import SimpleX
from recfast.models.retrieval.two_tower import TwoTower
from recfast.nn import losses

TRAINED = {
    "two_tower": lambda schema, **options: TwoTower(schema, dim=16, **options),
    "simplex": lambda schema, **options: SimpleX(schema, dim=16, num_negatives=40, **options),
}
EVERY = TRAINED | {
    "popularity": lambda schema: Popularity(schema),
    "item_knn": lambda schema: ItemKNN(schema, neighbors=5),
}


def schema() -> data.Schema:
    columns = [
        data.Categorical("user", role="user"),
        data.Categorical("item", role="item"),
        data.Sequence("history", of="item", max_length=10),
    ]
    return data.Schema(columns, label="label", time="time")


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> data.Dataset:
    """60 users walk around rings of ten items: what comes next follows from the last item, not from popularity."""
    random = np.random.default_rng(0)
    frames = []
    for split, begin, steps in (("train", 0, 12), ("valid", 12, 1), ("test", 13, 1)):
        user = np.repeat(np.arange(60), steps)
        step = begin + np.tile(np.arange(steps), 60)
        ring, start = user % 4, user // 4 * 7
        frame = pl.DataFrame({"user": user, "item": ring * 10 + (start + step) % 10, "time": step, "label": 1})
        if split == "train":
            # A few disliked items: no retriever may learn from them.
            other = pl.DataFrame({"user": np.arange(60), "item": random.integers(0, 40, 60), "time": 100, "label": 0})
            frame = pl.concat([frame, other.cast(frame.schema)])
        frames.append(frame)
    return data.prepare(schema(), *frames, cache=tmp_path_factory.mktemp("walks"))


def lists(*rows: list[int]) -> Jagged:
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return Jagged(torch.tensor([x for row in rows for x in row], dtype=torch.int64), offsets)


def train(model: torch.nn.Module, dataset: data.Dataset, epochs: int, *, seed: int = 0) -> list[float]:
    """Train, and return the mean loss of each epoch."""
    torch.manual_seed(seed)
    model.prepare(dataset)
    model.train()
    loader = Loader(dataset.train.positives(), 64, shuffle=True, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    means = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            loss = model.loss(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        means.append(total / len(loader.split))
    model.eval()
    return means


@torch.no_grad()
def recall(model: torch.nn.Module, dataset: data.Dataset, k: int, *, only_new: bool = True) -> float:
    """Mean share of a user's test positives among the first k; histories end before the test split."""
    rows = dataset.test.positives()
    user, item = rows.column("user").astype(np.int64), rows.column("item").astype(np.int64)
    users, place = np.unique(user, return_inverse=True)
    scores = model.scores(dataset.history("valid").take(users), torch.from_numpy(users))
    if only_new:
        seen = dataset.seen("valid").take(users)
        scores[torch.repeat_interleave(torch.arange(len(users)), seen.lengths()), seen.values] = -torch.inf
    top = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k].numpy()
    hit = (top[place] == item[:, None]).any(1)
    return float((np.bincount(place, hit) / np.bincount(place)).mean())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two_tower", {}),
        ("two_tower", {"negatives": "batch"}),
        ("two_tower", {"negatives": "uniform", "num_negatives": 30}),
        ("two_tower", {"negatives": "mixed", "num_negatives": 10}),
        ("two_tower", {"hidden": (8,), "item_bias": False, "user_id": False, "shared_items": True}),
        ("two_tower", {"temperature": 0.1}),
        ("simplex", {}),
        ("simplex", {"aggregation": "self_attention", "shared_items": False}),
        ("simplex", {"aggregation": "user_attention", "gamma": 0.3}),
        ("simplex", {"aggregation": "user_attention", "gamma": 0.3, "padded": True}),
    ],
)
def test_learns_what_comes_next(walks, name, options):
    model = TRAINED[name](walks.schema, **options)
    means = train(model, walks, 25)
    assert means[-1] < 0.75 * means[0]
    popular = Popularity(walks.schema)
    popular.prepare(walks)
    # Items repeat on a ring, so nothing is excluded; of 40 items the best five hold the next one by chance 1 in 8.
    assert recall(model, walks, 5, only_new=False) > 0.8
    assert recall(popular, walks, 5, only_new=False) < 0.4


@pytest.mark.parametrize("name", list(TRAINED))
def test_same_seed_same_weights(walks, name):
    def weights(seed):
        model = TRAINED[name](walks.schema, seed=seed)
        train(model, walks, 2, seed=seed)
        return model.state_dict()

    torch.manual_seed(17)
    first = weights(3)
    torch.manual_seed(18)
    again, other = weights(3), weights(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["events"], other["events"])


@pytest.mark.parametrize("name", list(EVERY))
def test_vectors_are_finite_and_of_one_width(walks, name):
    """Empty histories, histories of unknown items, unknown users, no users at all."""
    model = EVERY[name](walks.schema)
    model.prepare(walks)
    model.eval()
    histories = lists([], [0, 0], [1, 2], list(range(1, 31)))
    items = model.item_vectors()
    assert items.shape[0] == walks.schema.rows("item")
    for users in (None, torch.tensor([0, 0, 1, 2])):
        vectors = model.user_vectors(histories, users)
        assert vectors.shape == (4, items.shape[1])
        assert vectors.dtype == torch.float32
        assert torch.isfinite(vectors).all()
        torch.testing.assert_close(vectors[0], vectors[1])
        scores = model.scores(histories, users)
        assert (scores[:, 0] == -torch.inf).all()
        torch.testing.assert_close(scores[:, 1:], (vectors @ items.T)[:, 1:])
    none = model.user_vectors(lists(), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, items.shape[1])


@pytest.mark.parametrize("name", list(EVERY))
def test_config_and_weights_rebuild_the_model(walks, name):
    model = EVERY[name](walks.schema)
    if name in TRAINED:
        train(model, walks, 1)
    else:
        model.prepare(walks)
    model.eval()
    config = json.loads(json.dumps(model.config()))
    rebuilt = type(model)(walks.schema, **config)
    assert rebuilt.config() == config
    rebuilt.load_state_dict(model.state_dict())
    rebuilt.eval()
    histories, users = walks.history("train").take(range(1, 9)), torch.arange(1, 9)
    assert torch.equal(model.scores(histories, users), rebuilt.scores(histories, users))


def test_two_tower_scores_are_the_formula(walks):
    model = TwoTower(walks.schema, dim=8, max_length=3).eval()
    model.prepare(walks)
    with torch.no_grad():
        model.recency.copy_(torch.tensor([0.5, -0.1, 0.2]))
        # The oldest item is beyond max_length; a is indexed by age.
        user = model.user_vectors(lists([9, 5, 6, 7]), torch.tensor([4]))[0]
        weight = torch.softmax(torch.tensor([0.2, -0.1, 0.5]), 0)
        wanted = weight @ model.events[[5, 6, 7]] + model.users.weight[4]
        torch.testing.assert_close(user, torch.cat([wanted, torch.ones(1)]))
        score = model.scores(lists([9, 5, 6, 7]), torch.tensor([4]))[0, 11]
        torch.testing.assert_close(score, wanted @ model.items[11] + model.bias[11])
        share = (walks.popularity("train")[11] + 1) / (walks.popularity("train") + 1).sum()
        assert model.bias[11].item() == pytest.approx(np.log(share), abs=1e-5)
    assert model.item_vectors().shape == (walks.schema.rows("item"), 8)


def test_prepare_keeps_trained_biases(walks):
    model = TwoTower(walks.schema, dim=8)
    train(model, walks, 1)
    trained = model.bias.detach().clone()
    model.prepare(walks)
    assert torch.equal(model.bias, trained)


def test_sampled_columns_stand_for_the_catalogue(walks):
    """Each column counts 1 / expected: summed over columns, each item counts once on average."""
    model = TwoTower(walks.schema, negatives="mixed", num_negatives=20)
    model.prepare(walks)
    torch.manual_seed(0)
    draws, rows = 4000, walks.schema.rows("item")
    seen = torch.zeros(draws, rows)
    for draw in range(draws):
        # The first positive of the batch is the row that looks; the 30 others are drawn by popularity.
        others = torch.multinomial(model.counts.float(), 30, replacement=True)
        ids, log_expected = model._sample(torch.cat([torch.ones(1, dtype=torch.int64), others]))
        seen[draw].index_add_(0, ids[1:], (-log_expected[1:]).exp())
    assert (seen[:, 0] == 0).all()
    error = seen[:, 1:].std(0) / draws**0.5
    assert ((seen[:, 1:].mean(0) - 1).abs() < 5 * error).all()


def test_simplex_is_the_formula(walks):
    model = SimpleX(walks.schema, dim=8, gamma=0.3, recency=False, shared_items=False).eval()
    with torch.no_grad():
        model.transform.weight.normal_(generator=torch.Generator().manual_seed(0))
        user = model.user_vectors(lists([5, 6, 7]), torch.tensor([4]))[0]
        mixed = 0.3 * model.users.weight[4] + 0.7 * model.transform.weight @ model.events[[5, 6, 7]].mean(0)
        torch.testing.assert_close(user, mixed / mixed.norm())
        torch.testing.assert_close(model.item_vectors().norm(dim=1), torch.ones(walks.schema.rows("item")))


def test_simplex_others_leaves_out_the_positive(walks):
    model = SimpleX(walks.schema, dim=8, history="others", max_length=6, recency=False).eval()
    batch = next(iter(Loader(walks.train.positives(), 50)))
    with pytest.raises(InputError, match="prepare"):
        model(batch)
    model.prepare(walks)
    users, positive = batch.column("user"), batch.column("item")
    every = walks.history("train")
    # Six others, where there are as many: the seventh stands in for the positive.
    recent = [every.row(u)[-7:].tolist() for u in users.tolist()]
    without = [[i for i in row if i != p][-6:] for row, p in zip(recent, positive.tolist(), strict=True)]
    torch.testing.assert_close(model(batch), model.user_vectors(lists(*without), users))


@pytest.mark.parametrize("name", list(TRAINED))
def test_rows_of_unknown_items_teach_nothing(walks, name):
    model = TRAINED[name](walks.schema)
    model.prepare(walks)
    model.eval()
    batch = next(iter(Loader(walks.train.positives(), 8)))
    wanted = []
    for rows in (batch.ids, torch.cat([batch.ids, batch.ids * torch.tensor([1, 0])])):
        copies = len(rows) // 8
        history = lists(*[batch.sequences["history"].row(b).tolist() for b in range(8)] * copies)
        rows = data.Batch(rows, torch.zeros(len(rows), 0), {"history": history}, columns=batch.columns)
        torch.manual_seed(0)
        wanted.append(model.loss(model(rows), rows))
    torch.testing.assert_close(*wanted)
    none = data.Batch(batch.ids * 0, batch.numeric, batch.sequences, columns=batch.columns)
    loss = model.loss(model(none), none)
    assert loss.item() == 0.0
    loss.backward()


def test_a_positive_is_no_negative_of_its_own_row(walks):
    batch = next(iter(Loader(walks.train.positives(), 8)))
    same = data.Batch(batch.ids.clone(), batch.numeric, batch.sequences, columns=batch.columns)
    same.ids[:, batch.columns.index("item")] = 5
    model = TwoTower(walks.schema, dim=8, negatives="batch")
    model.prepare(walks)
    # Every column is the row's own item: there is nothing left to tell it from.
    assert model.loss(model(same), same).item() == 0.0
    assert model.loss(model(batch), batch).item() > 0.0
    one_item = walks.schema.fit({"user": walks.schema.rows("user"), "item": 2})
    model = SimpleX(one_item, dim=8, margin=-1.0).eval()
    alone = data.Batch(batch.ids.clamp(max=1), batch.numeric, {"history": lists(*[[]] * 8)}, columns=batch.columns)
    cosine = model(alone) @ model.item_vectors()[1]
    torch.testing.assert_close(model.loss(model(alone), alone), (1 - cosine).mean())


def dense_neighbors(rows: list[list[int]], n: int, k: int, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    x = np.zeros((len(rows), n))
    for u, row in enumerate(rows):
        x[u, [i for i in row if i != 0]] = 1
    common = x.T @ x
    root = np.sqrt(np.diag(common))
    sim = np.divide(common, np.outer(root, root) + shrinkage, out=np.zeros_like(common), where=common > 0)
    np.fill_diagonal(sim, 0)
    order = np.argsort(-sim, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(sim, order, 1)
    return np.where(best > 0, order, 0), best.astype(np.float32)


@pytest.mark.parametrize("pairs", [1, 50, 1 << 23])
@pytest.mark.parametrize("shrinkage", [0.0, 3.0])
def test_nearest_items_match_a_dense_reference(monkeypatch, pairs, shrinkage):
    monkeypatch.setattr(baselines, "_PAIRS", pairs)
    random = np.random.default_rng(0)
    for users, n, k in ((0, 4, 3), (1, 1, 1), (1, 5, 2), (30, 12, 4), (40, 25, 25)):
        rows = [random.integers(0, n, random.integers(0, 9)).tolist() for _ in range(users)]
        ids, similarity = nearest_items(*lists(*rows), n, k, shrinkage=shrinkage)
        wanted_ids, wanted = dense_neighbors(rows, n, k, shrinkage)
        np.testing.assert_array_equal(ids, wanted_ids)
        np.testing.assert_allclose(similarity, wanted, rtol=1e-6)


def test_item_knn_scores_are_the_formula(walks):
    model = ItemKNN(walks.schema, neighbors=6, shrinkage=2.0, decay=0.5)
    model.prepare(walks)
    n = walks.schema.rows("item")
    every = walks.history("train")
    ids, similarity = dense_neighbors([every.row(u).tolist() for u in range(len(every.offsets) - 1)], n, 6, 2.0)
    wanted = np.zeros(n)
    # Item 3 comes twice: its later place, of age 0, counts.
    for item, age in ((3, 0), (8, 1), (5, 2)):
        for i in range(n):
            wanted[i] += 0.5**age * similarity[i][ids[i] == item].sum()
    scores = model.scores(lists([3, 5, 8, 3]))[0].numpy()
    np.testing.assert_allclose(scores[1:], wanted[1:], rtol=1e-5)


def test_popularity_counts_train_positives(walks):
    model = Popularity(walks.schema)
    model.prepare(walks)
    train = walks.train.positives()
    counts = np.bincount(train.column("item"), minlength=walks.schema.rows("item"))
    np.testing.assert_array_equal(model.scores(lists([], [3]))[1, 1:].numpy(), counts[1:])


def test_rejects_bad_input(walks):
    fitted = walks.schema
    with pytest.raises(InputError, match="negatives = 'none' is not one of 'auto'"):
        TwoTower(fitted, negatives="none")
    with pytest.raises(InputError, match="history_dropout = 1"):
        TwoTower(fitted, history_dropout=1.0)
    with pytest.raises(InputError, match=r"sequence = 'clicks' is not .* expected one of \['history'\]"):
        TwoTower(fitted, sequence="clicks")
    with pytest.raises(InputError, match="aggregation = 'max'"):
        SimpleX(fitted, aggregation="max")
    with pytest.raises(InputError, match="decay = 0"):
        ItemKNN(fitted, decay=0.0)
    without_item = data.Schema([data.Categorical("user", role="user")]).fit({"user": 3})
    with pytest.raises(InputError, match="no column with the role 'item'"):
        Popularity(without_item)
    batch = next(iter(Loader(walks.train, 4)))
    model = TwoTower(fitted, negatives="batch")
    vectors = model(batch)
    with pytest.raises(InputError, match=r"call prepare\(dataset\) first"):
        model.loss(vectors, batch)
    short = data.Batch(batch.ids, batch.numeric, {"history": lists([1])}, columns=batch.columns)
    with pytest.raises(ValueError, match="4 rows and 1 histories"):
        TwoTower(fitted)(short)


@pytest.mark.slow
def test_beats_popularity_and_neighbors_on_movielens(shared_data, tmp_path):
    """Settings were chosen on the valid split; the bars leave room for several times what three seeds vary."""
    films = data.load("ml-100k", shared_data / "ml-100k", negatives=0, cache=tmp_path)
    baseline = {}
    for name, model in (("popularity", Popularity(films.schema)), ("item_knn", ItemKNN(films.schema))):
        model.prepare(films)
        baseline[name] = recall(model, films, 50)
    assert baseline["popularity"] == pytest.approx(0.249, abs=0.01)
    assert baseline["item_knn"] == pytest.approx(0.406, abs=0.01)
    for model, lr, bar in ((TwoTower(films.schema), 2e-3, 0.44), (SimpleX(films.schema), 5e-3, 0.425)):
        torch.manual_seed(0)
        model.prepare(films)
        loader = Loader(films.train.positives(), 512, shuffle=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for epoch in range(11):
            loader.set_epoch(epoch)
            model.train()
            for batch in loader:
                optimizer.zero_grad()
                model.loss(model(batch), batch).backward()
                optimizer.step()
        model.eval()
        found = recall(model, films, 50)
        assert found > max(bar, baseline["item_knn"], baseline["popularity"]), type(model).__name__


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two_tower", {"negatives": "all"}),
        ("two_tower", {"negatives": "mixed", "num_negatives": 30, "temperature": 0.1}),
        ("two_tower", {"negatives": "uniform", "num_negatives": 30, "item_bias": False}),
        ("simplex", {}),
        ("simplex", {"shared_by": 16}),
    ],
)
def test_loss_is_that_of_all_scores(walks, name, options):
    """The models never hold the scores of a batch; here are all of them, and the losses of the papers over them."""
    model = TRAINED[name](walks.schema, **options)
    model.prepare(walks)
    batch = next(iter(Loader(walks.train.positives(), 64)))
    positive = batch.column("item")
    torch.manual_seed(0)
    output = model(batch)
    loss = model.loss(output, batch)
    torch.manual_seed(0)
    output = model(batch)
    scores = output @ model.item_vectors().T
    own = scores.gather(1, positive[:, None])[:, 0]
    if name == "simplex":
        drawn = torch.randint(1, model.rows, (4 if options else 1, model.num_negatives))
        ids = drawn.repeat_interleave(64 // len(drawn), 0)
        collision = ids == positive[:, None]
        wanted = losses.cosine_contrastive(own, scores.gather(1, ids), collision=collision)
    elif options["negatives"] == "all":
        wanted = torch.nn.functional.cross_entropy(scores[:, 1:], positive - 1)
    else:
        ids, log_expected = model._sample(positive)
        collision = losses.collisions(positive, ids)
        wanted = losses.sampled_softmax(own, scores[:, ids], log_expected=log_expected, collision=collision)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    weights = list(model.parameters())
    have, want = torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize(
    ("name", "options"),
    [("two_tower", {"negatives": "mixed"}), ("simplex", {}), ("simplex", {"shared_items": False})],
)
def test_sparse_gradients_are_the_dense_ones(walks, name, options):
    gradients = []
    for sparse in (False, True):
        model = TRAINED[name](walks.schema, **options)
        model.prepare(walks)
        model.sparse_gradients = sparse
        batch = next(iter(Loader(walks.train.positives(), 64)))
        torch.manual_seed(0)
        model.loss(model(batch), batch).backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    dense, rows = gradients
    assert {name for name in rows if rows[name].is_sparse} == {"events", "items", "users.weight"} & set(rows)
    for key in dense:
        torch.testing.assert_close(rows[key].to_dense(), dense[key], rtol=1e-5, atol=1e-7)
