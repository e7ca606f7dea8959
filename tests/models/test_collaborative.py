"""Retrievers of who has what, without a time: closed forms and graphs against dense references, on small data."""

import json

import faiss
import numpy as np
import polars as pl
import pytest
import torch

from recfast import data, metrics, models, train
from recfast.data import Jagged, Loader
from recfast.errors import InputError
from recfast.models import storage
from recfast.models.retrieval import _interactions
from recfast.models.retrieval.ease import EASE
from recfast.models.retrieval.gf_cf import GFCF
from recfast.models.retrieval.knn_embed import KNNEmbed, shares
from recfast.models.retrieval.lightgcn import LightGCN, smooth
from recfast.models.retrieval.mf import MF
from recfast.models.retrieval.simplex import SimpleX
from recfast.models.retrieval.two_tower import TwoTower
from recfast.pipeline import Pipeline
from recfast.train.evaluate import held_out, top_items

FILTERS = {
    "gf_cf": lambda schema: GFCF(schema, rank=5, iterations=60),
    "ease_primal": lambda schema: EASE(schema, ridge=3.0, form="primal"),
    "ease_dual": lambda schema: EASE(schema, ridge=3.0, form="dual"),
}
TRAINED = {
    "mf_ccl": lambda schema: MF(schema, dim=8, num_negatives=20, margin=0.4, weight=5.0, init_std=0.1),
    "mf_bpr": lambda schema: MF(schema, dim=8, loss="bpr", num_negatives=20, init_std=0.1),
    "mf_own_negatives": lambda schema: MF(
        schema, dim=8, num_negatives=20, shared_by=1, margin=0.4, weight=5.0, init_std=0.1
    ),
    "mf_in_groups": lambda schema: MF(
        schema, dim=8, num_negatives=20, shared_by=7, margin=0.4, weight=5.0, init_std=0.1
    ),
    "simplex": lambda schema: SimpleX(
        schema, dim=8, history="others", aggregation="user_attention", num_negatives=20, shared_items=False
    ),
    "lightgcn": lambda schema: LightGCN(schema, dim=8, layers=2),
    "lightgcn_rows": lambda schema: LightGCN(schema, dim=8, sampling="rows"),
    "two_tower": lambda schema: TwoTower(schema, dim=8, user_id=False),
}


@pytest.fixture(scope="module")
def clubs(tmp_path_factory) -> data.Dataset:
    """90 users in three clubs of 30 items each have 8 of them, and 1 of any; no time, no labels."""
    random = np.random.default_rng(0)
    rows = {"train": [], "valid": [], "test": []}
    for user in range(90):
        items = user % 3 * 30 + random.permutation(30)[:12]
        parts = {"train": [*items[:8], random.integers(0, 90)], "valid": items[8:10], "test": items[10:]}
        for name, part in parts.items():
            rows[name] += [(user, int(item)) for item in part]
    frames = [
        pl.DataFrame(part, schema=["user", "item"], orient="row").unique(maintain_order=True) for part in rows.values()
    ]
    schema = data.Schema([data.Categorical("user", role="user"), data.Categorical("item", role="item")], label=None)
    return data.prepare(schema, *frames, cache=tmp_path_factory.mktemp("clubs"))


def dense(dataset: data.Dataset) -> torch.Tensor:
    """Who has what in train, float64 [rows(user), rows(item)]."""
    lists = dataset.history("train")
    x = torch.zeros(dataset.schema.rows("user"), dataset.schema.rows("item"), dtype=torch.float64)
    x[torch.repeat_interleave(lists.lengths()), lists.values] = 1.0
    x[:, 0] = 0.0
    return x


def lists(*rows: list[int]) -> Jagged:
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return Jagged(torch.tensor([x for row in rows for x in row], dtype=torch.int64), offsets)


def fitted(name: str, dataset: data.Dataset) -> torch.nn.Module:
    model = (FILTERS | TRAINED)[name](dataset.schema)
    model.prepare(dataset)
    return model.eval()


def strangers(x: torch.Tensor) -> tuple[Jagged, torch.Tensor, torch.Tensor]:
    """Histories of every kind, whose they are, and the same as zeros and ones."""
    own = [x[u].nonzero()[:, 0].tolist() for u in (1, 2, 3)]
    histories = [own[0], own[1][:-1], [5, 9, 5, 0, 2], [], own[2], own[2]]
    users = torch.tensor([1, 2, 0, 4, 0, 3])
    wanted = torch.zeros(len(histories), x.shape[1], dtype=x.dtype)
    for b, history in enumerate(histories):
        wanted[b, [i for i in history if i]] = 1.0
    return lists(*histories), users, wanted


def test_products_with_interactions(clubs, monkeypatch):
    x = dense(clubs)
    graph = _interactions.Interactions(*x.shape)
    graph.fill(clubs)
    assert len(graph) == x.sum()
    assert torch.equal(graph.user_degrees(), x.sum(1).float())
    assert torch.equal(graph.item_degrees(), x.sum(0).float())
    for width in (1, 64, 100):
        right = torch.randn(x.shape[1], width, generator=torch.Generator().manual_seed(0))
        left = torch.randn(x.shape[0], width, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(graph.of_items(right), (x @ right.double()).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(graph.of_users(left), (x.T @ left.double()).float(), rtol=1e-5, atol=1e-5)


def test_gf_cf_is_the_formula(clubs):
    x = dense(clubs)
    # An item and a user that nobody and nothing has: their degrees are 0.
    root_u, root_i = x.sum(1).clamp(min=1).sqrt(), x.sum(0).clamp(min=1).sqrt()
    normal = x / root_u[:, None] / root_i
    basis = torch.linalg.svd(normal).Vh[:5].T
    for ideal in (0.0, 0.3):
        model = GFCF(clubs.schema, rank=5, ideal=ideal, iterations=60)
        model.prepare(clubs)
        histories, users, h = strangers(x)
        wanted = (h / root_i) @ x.T / x.sum(1).clamp(min=1) @ x / root_i
        wanted += ideal * (h / root_i) @ basis @ basis.T * root_i
        for asked in (users, None):
            scores = model.scores(histories, asked)
            assert (scores[:, 0] == -torch.inf).all()
            torch.testing.assert_close(scores[:, 1:], wanted[:, 1:].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_ease_is_the_formula(clubs, form):
    x = dense(clubs)
    model = EASE(clubs.schema, ridge=3.0, form=form)
    model.prepare(clubs)
    inverse = torch.linalg.inv(x.T @ x + 3.0 * torch.eye(x.shape[1], dtype=x.dtype))
    weights = (-inverse / inverse.diagonal()).fill_diagonal_(0.0)
    histories, users, h = strangers(x)
    for asked in (users, None):
        scores = model.scores(histories, asked)
        assert (scores[:, 0] == -torch.inf).all()
        torch.testing.assert_close(scores[:, 1:], (h @ weights)[:, 1:].float(), rtol=1e-4, atol=1e-5)


def test_ease_takes_the_smaller_form(clubs):
    few = clubs.schema.fit({"user": 5, "item": 9})
    assert EASE(few).dual
    assert not EASE(clubs.schema.fit({"user": 9, "item": 5})).dual


def test_ease_refuses_an_inverse_that_is_none(tmp_path):
    """Three users cannot tell eight items apart: without a ridge to speak of, there is no inverse in float32."""
    pairs = pl.DataFrame({"user": [0] * 6 + [1] * 6 + [2] * 6, "item": [*range(6), *range(1, 7), *range(2, 8)]})
    schema = data.Schema([data.Categorical("user", role="user"), data.Categorical("item", role="item")], label=None)
    dataset = data.prepare(schema, pairs, cache=tmp_path)
    model = EASE(dataset.schema, ridge=1e-12, form="primal")
    with pytest.raises(InputError, match=r"ridge = 1e-12 is too small"):
        model.prepare(dataset)
    with pytest.raises(InputError, match=r"call prepare\(dataset\) first"):
        model.scores(lists([1]))


@pytest.mark.parametrize("name", list(FILTERS))
def test_filters_refuse_items_that_are_none(clubs, name):
    model = fitted(name, clubs)
    for wrong in (-1, model.rows):
        place = rf"{type(model).__name__}\.scores: histories\.values\[2\] = {wrong} is outside \[0, {model.rows}\)"
        with pytest.raises(IndexError, match=place):
            model.scores(lists([1, 2], [wrong], [3]))


@pytest.mark.parametrize("name", list(FILTERS))
def test_blocks_of_histories_change_nothing(clubs, name, monkeypatch):
    model = fitted(name, clubs)
    histories, users, _ = strangers(dense(clubs))
    whole = model.scores(histories, users)
    monkeypatch.setattr(_interactions, "COLUMNS", 2)
    torch.testing.assert_close(model.scores(histories, users), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(FILTERS))
def test_filters_have_no_vectors(clubs, name):
    model = FILTERS[name](clubs.schema)
    for ask in (lambda: model.user_vectors(lists([1])), model.item_vectors):
        with pytest.raises(InputError, match=r"ask scores\(histories, users\)"):
            ask()
    with pytest.raises(InputError, match=r"call prepare\(dataset\) first"):
        model.scores(lists([1]))


@pytest.mark.parametrize("name", [*FILTERS, "sparcode"])
def test_a_pipeline_refuses_them_at_once(clubs, name):
    """Not at the first request."""
    model = models.SparCode(clubs.schema, dim=8, codes=4) if name == "sparcode" else FILTERS[name](clubs.schema)
    with pytest.raises(InputError, match="no dot product"):
        Pipeline(model, None, None, clubs, codebooks=2, n_codes=4)


def test_lightgcn_is_the_formula(clubs):
    x = dense(clubs)
    users, items = x.shape
    model = LightGCN(clubs.schema, dim=6, layers=3).eval()
    model.prepare(clubs)
    adjacency = torch.zeros(users + items, users + items, dtype=x.dtype)
    adjacency[:users, users:], adjacency[users:, :users] = x, x.T
    root = adjacency.sum(1).clamp(min=1).rsqrt()
    step = root[:, None] * adjacency * root
    mean = sum(torch.matrix_power(step, k) for k in range(4)) / 4
    start = torch.cat([model.users, model.items]).double()
    with torch.no_grad():
        wanted = (mean @ start).float()
        torch.testing.assert_close(model.item_vectors(), wanted[users:])
        found = model.user_vectors(lists([], [3]), torch.tensor([0, 7]))
        torch.testing.assert_close(found, wanted[[0, 7]])
    # The gradient is that of the same matrix.
    weight = torch.randn(users + items, 6, generator=torch.Generator().manual_seed(0))
    out_users, out_items = model.vectors()
    (torch.cat([out_users, out_items]) * weight).sum().backward()
    torch.testing.assert_close(torch.cat([model.users.grad, model.items.grad]), (mean @ weight.double()).float())
    with torch.no_grad():
        same = smooth(model.users, model.items, model.interactions, 0)
    assert torch.equal(same[0], model.users)


def test_lightgcn_vectors_follow_the_weights(clubs):
    model = fitted("lightgcn", clubs)
    with torch.no_grad():
        before = model.item_vectors()
        assert model.item_vectors() is before
        model.items.mul_(2.0)
        assert not torch.equal(model.item_vectors(), before)


def test_lightgcn_is_measured_anew_after_each_epoch(clubs):
    """The optimiser that `train.fit` takes does not count up the version of a parameter."""
    run = train.fit(LightGCN(clubs.schema, dim=8), clubs, epochs=3, batch_size=64, lr=0.03, monitor="ndcg@10")
    assert len({entry["valid"]["ndcg@10"] for entry in run.history}) == 3
    assert train.evaluate(run.model, clubs.valid, dataset=clubs, k=(10,))["ndcg@10"] == run.metrics["ndcg@10"]


def test_lightgcn_draws_users_evenly_and_no_false_negatives(clubs):
    model = fitted("lightgcn", clubs)
    x = dense(clubs)
    torch.manual_seed(0)
    user, positive = model._draw_users(20_000)
    negative = model._draw_negatives(user)
    assert (x[user, positive] == 1).all()
    assert (x[user, negative] == 0).all()
    assert (negative > 0).all()
    share = torch.bincount(user, minlength=91)[1:] / 20_000
    assert share.sub(1 / 90).abs().max() < 6 * (1 / 90 / 20_000) ** 0.5
    # Each of a user's items is as likely as the others.
    drawn = torch.bincount(positive[user == 1], minlength=91)[x[1] == 1].float()
    assert drawn.std() < 3 * drawn.mean().sqrt()


def test_lightgcn_loss_is_the_formula(clubs):
    model = LightGCN(clubs.schema, dim=8, sampling="rows", l2=0.5)
    model.prepare(clubs)
    batch = next(iter(Loader(clubs.train, 40)))
    torch.manual_seed(3)
    loss = model.loss(model(batch), batch)
    torch.manual_seed(3)
    user, positive = batch.column("user"), batch.column("item")
    negative = model._draw_negatives(user)
    u, i = model.vectors()
    margin = (u[user] * (i[positive] - i[negative])).sum(1)
    rows = torch.cat([model.users[user], model.items[positive], model.items[negative]])
    torch.testing.assert_close(loss, -torch.log(torch.sigmoid(margin)).mean() + 0.25 * rows.square().sum() / 40)
    nothing = data.Batch(batch.ids * 0, batch.numeric, columns=batch.columns)
    assert model.loss(model(nothing), nothing).item() == 0.0


@pytest.mark.parametrize("name", list(TRAINED))
def test_learns_clubs_without_time(clubs, name):
    """Train, and find the club: of 90 items the best ten hold a test item by chance 1 in 9."""
    torch.manual_seed(0)
    model = TRAINED[name](clubs.schema)
    run = train.fit(model, clubs, epochs=25, batch_size=64, lr=0.03, monitor="recall@10", patience=0)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    found = train.evaluate(model, clubs.test, dataset=clubs, k=(10,))
    assert found["recall@10"] > 0.3
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()


@pytest.mark.parametrize("name", list(FILTERS))
def test_filters_find_clubs(clubs, name):
    run = train.fit(FILTERS[name](clubs.schema), clubs, epochs=3)
    assert train.evaluate(run.model, clubs.test, dataset=clubs, k=(10,))["recall@10"] > 0.35


@pytest.mark.parametrize("name", list(FILTERS | TRAINED))
def test_saved_and_loaded(clubs, name, tmp_path):
    model = fitted(name, clubs)
    storage.save_model(model, clubs.schema, tmp_path)
    again = models.load(tmp_path)
    assert again.config() == json.loads(json.dumps(model.config()))
    histories, users = clubs.history("train").take([1, 2, 3]), torch.tensor([1, 2, 0])
    with torch.no_grad():
        assert torch.equal(again.scores(histories, users), model.scores(histories, users))


@pytest.fixture(scope="module")
def rare(tmp_path_factory) -> data.Dataset:
    """Twenty users, three of them with too few items to be known."""
    random = np.random.default_rng(0)
    pairs = [(u, int(i)) for u in range(20) for i in random.permutation(30)[: 2 if u < 3 else 10]]
    columns = [data.Categorical("user", role="user", min_count=5), data.Categorical("item", role="item")]
    frame = pl.DataFrame(pairs, schema=["user", "item"], orient="row")
    return data.prepare(data.Schema(columns, label=None), frame, cache=tmp_path_factory.mktemp("rare"))


@pytest.mark.parametrize("optimizer", ["adam", "lazy_adam"])
@pytest.mark.parametrize("name", ["mf_ccl", "mf_bpr", "simplex", "lightgcn_rows"])
def test_the_unknown_user_is_not_trained(rare, name, optimizer):
    assert (rare.train.column("user") == 0).sum() == 6
    run = train.fit(TRAINED[name](rare.schema), rare, epochs=2, batch_size=32, lr=0.01, optimizer=optimizer)
    users = run.model.users
    assert (getattr(users, "weight", users)[0] == 0).all()
    assert (getattr(users, "weight", users)[1:] != 0).any(1).all()


def test_simplex_reads_the_latest_of_the_other_items(clubs):
    """A full history beside the positive, wherever in it the positive stands; and no hole in the ages."""
    model = SimpleX(clubs.schema, dim=8, history="others", max_length=4, shared_items=False).eval()
    with torch.no_grad():
        model.recency.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    model.prepare(clubs)
    batch = next(iter(Loader(clubs.train, 60)))
    every = clubs.history("train")
    others = [[i for i in every.row(u).tolist() if i != item] for u, item in batch.ids.tolist()]
    wanted = model.user_vectors(lists(*others), batch.column("user"))
    torch.testing.assert_close(model(batch), wanted)


def test_what_does_not_fit_the_interactions_is_refused(clubs, rare, tmp_path):
    model = fitted("gf_cf", clubs)
    state = dict(zip(("tensors", "extra"), storage.split_state(model), strict=True))
    tensors = {name: value.clone() for name, value in state["tensors"].items()}

    def load(changed, schema=clubs.schema):
        storage.restore_state(GFCF(schema, rank=5), tensors | changed, state["extra"], tmp_path)

    load({})
    for name, message in (
        ("items", r"interactions.items has an id outside \[1, 91\)"),
        ("users", r"interactions.users has an id outside \[1, 91\)"),
    ):
        for wrong in (91, 0, -1):
            ids = tensors[f"interactions.{name}"].clone()
            ids[3] = wrong
            with pytest.raises(InputError, match=message):
                load({f"interactions.{name}": ids})
        with pytest.raises(InputError, match="does not rise from 0 to the"):
            load({f"interactions.{name}": tensors[f"interactions.{name}"][:-1]})
    with pytest.raises(InputError, match=r"'interactions.user_offsets' has the shape \[92\], expected \[93\]"):
        load({}, clubs.schema.fit({"user": 92, "item": 91}))


def test_no_second_copy_of_what_is_not_trained(clubs):
    """Of a closed form there is but one state, and it can be gigabytes."""
    copied = []

    class Watched(EASE):
        def state_dict(self, *args, **kwargs):
            copied.append(True)
            return super().state_dict(*args, **kwargs)

    train.fit(Watched(clubs.schema), clubs, epochs=2)
    assert not copied


def test_every_parameter_has_a_gradient(clubs):
    batch = next(iter(Loader(clubs.train, 32)))
    for name, build in TRAINED.items():
        model = build(clubs.schema)
        model.prepare(clubs)
        model.loss(model(batch), batch).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), name


def test_a_row_without_time_is_given_the_other_items(clubs):
    model = fitted("two_tower", clubs)
    batch = next(iter(Loader(clubs.train, 30)))
    every = clubs.history("train")
    histories = model.histories(batch)
    for b, (user, item) in enumerate(batch.ids.tolist()):
        assert histories.row(b).tolist() == [i for i in every.row(user).tolist() if i != item]
    fresh = TRAINED["two_tower"](clubs.schema)
    with pytest.raises(InputError, match=r"call prepare\(dataset\) first"):
        fresh(batch)


def test_negatives_of_groups_of_rows(clubs):
    """The loss is the mean over rows, whoever shares a list; a list for each row is not one for all."""
    batch = next(iter(Loader(clubs.train, 30)))
    losses = {}
    for shared_by in (None, 1, 7, 30, 100):
        torch.manual_seed(5)
        model = MF(clubs.schema, dim=8, num_negatives=4, shared_by=shared_by, margin=-1.0, init_std=0.1).eval()
        losses[shared_by] = model.loss(model(batch), batch).item()
    assert losses[None] == losses[30] == losses[100]
    assert len({losses[None], losses[1], losses[7]}) == 3


def test_knn_embed_leaves_the_threads_of_faiss_alone(clubs):
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        KNNEmbed(fitted("mf_ccl", clubs), clubs, clusters=6)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


def test_knn_embed_mixture_is_the_formula(clubs):
    model = fitted("mf_ccl", clubs)
    mixed = KNNEmbed(model, clubs, clusters=6, components=6, neighbors=4, smoothing=0.7, own=0.0)
    x = dense(clubs)
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model.user_vectors(clubs.history("train"), torch.arange(91)), dim=1)
    near = vectors @ vectors.T
    near[:, 0] = -torch.inf
    near.fill_diagonal_(-torch.inf)
    share = x / x.sum(1, keepdim=True).clamp(min=1)
    found = mixed.mixture(torch.arange(1, 91))
    assert (found.weight.diff(dim=1) <= 0).all()
    torch.testing.assert_close(found.weight.sum(1), torch.ones(90))
    for user in (1, 40):
        smoothed = 0.3 * share[user] + 0.7 * share[near[user].topk(4).indices].mean(0)
        for slot in range(6):
            inside = (mixed.cluster == found.clusters[user - 1, slot]) * smoothed
            torch.testing.assert_close(found.weight[user - 1, slot].double(), inside.sum())
            if inside.sum() > 0:
                centre = inside @ model.item_vectors().double()
                wanted = (centre / centre.norm()).float()
                torch.testing.assert_close(found.centres[user - 1, slot], wanted, rtol=1e-4, atol=1e-5)


def test_knn_embed_candidates(clubs):
    model = fitted("mf_ccl", clubs)
    users, seen = torch.arange(1, 91), clubs.seen("train")
    # One query in one component is the model's own search.
    one = KNNEmbed(model, clubs, clusters=4, components=1, own=1.0).candidates(users, 12, masked=seen)
    wanted = top_items(model, users, 12, history=clubs.history("train"), masked=seen)
    assert torch.equal(one, wanted)
    mixed = KNNEmbed(model, clubs, clusters=10, components=5)
    ids = mixed.candidates(users, 30, masked=seen)
    for user, row in zip(users.tolist(), ids.tolist(), strict=True):
        assert len(set(row)) == 30
        assert min(row) > 0
        assert not set(row) & set(seen.row(user).tolist())
    # Twice the same, and fewer candidates than asked for where there are no more.
    assert torch.equal(mixed.candidates(users, 30, masked=seen), ids)
    short = mixed.candidates(users[:2], 200)
    assert (short >= 0).sum(1).max() <= 90
    assert mixed.candidates(users[:0], 5).shape == (0, 5)
    # The unknown user is asked for by its own vector, here zeros: the lowest ids.
    assert mixed.candidates(torch.tensor([0]), 3).shape == (1, 3)


def test_knn_embed_finds_more_interests(tmp_path):
    """Users of two clubs: the single query, between the clubs, finds fewer of what they are to find."""
    random = np.random.default_rng(0)
    rows = {"train": [], "test": []}
    for user in range(120):
        first, second = user % 6, (user // 6 + user % 6 + 1) % 6
        for club, count in ((first, 9), (second, 3)):
            items = club * 20 + random.permutation(20)
            rows["train"] += [(user, int(i)) for i in items[:count]]
            rows["test"] += [(user, int(i)) for i in items[count : count + 3]]
    frames = {name: pl.DataFrame(part, schema=["user", "item"], orient="row").unique() for name, part in rows.items()}
    schema = data.Schema([data.Categorical("user", role="user"), data.Categorical("item", role="item")], label=None)
    dataset = data.prepare(schema, frames["train"], None, frames["test"], cache=tmp_path)
    model = MF(dataset.schema, dim=8, num_negatives=40, margin=0.3, weight=5.0, init_std=0.1)
    train.fit(model, dataset, epochs=30, batch_size=128, lr=0.02)
    seen = dataset.seen("train")
    ids, truth = held_out(dataset.test, seen)
    users = torch.from_numpy(ids)
    mixed = KNNEmbed(model, dataset, clusters=6, components=4, neighbors=5, smoothing=0.5)
    one = top_items(model, users, 20, history=dataset.history("train"), masked=seen)
    many = mixed.candidates(users, 20, masked=seen)
    recall = [metrics.recall(found.numpy(), truth).mean() for found in (one, many)]
    assert recall[1] >= recall[0]


def test_shares_are_rounded_by_largest_remainder():
    weight = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.34, 0.33, 0.33], [0.0, 0.0, 0.0]])
    assert shares(weight[:3], 10).tolist() == [[5, 3, 2], [10, 0, 0], [4, 3, 3]]
    assert shares(weight[:1], 4).tolist() == [[2, 1, 1]]
    assert shares(torch.rand(50, 7).softmax(1), 33).sum(1).tolist() == [33] * 50


def test_ease_forms_agree_on_movielens(shared_data, tmp_path):
    films = data.load("ml-100k", shared_data / "ml-100k", negatives=0, cache=tmp_path)
    forms = [EASE(films.schema, form=form) for form in ("primal", "dual")]
    for model in forms:
        model.prepare(films)
    users = torch.arange(0, 944, 13)
    for upto in ("train", "valid"):
        primal, dual = (model.scores(films.history(upto).take(users), users)[:, 1:] for model in forms)
        assert (primal - dual).abs().max() < 2e-5 * primal.abs().max()
    assert train.evaluate(forms[0], films, dataset=films)["recall@50"] == pytest.approx(0.413, abs=0.005)


@pytest.mark.slow
def test_gf_cf_reaches_the_published_result_on_gowalla(shared_data, tmp_path):
    """Nothing is trained here: it proves reader, masking and metric."""
    if not (shared_data / "gowalla").is_dir():
        pytest.skip("there is no gowalla among the real data sets")
    dataset = data.load("gowalla", shared_data / "gowalla", cache=tmp_path)
    model = GFCF(dataset.schema)
    model.prepare(dataset)
    found = train.evaluate(model, dataset, k=(20,))
    assert found["recall@20"] == pytest.approx(0.1849, abs=0.0003)
    assert found["ndcg@20"] == pytest.approx(0.1518, abs=0.0003)


def test_rejects_bad_input(clubs):
    fitted_schema = clubs.schema
    no_user = data.Schema([data.Categorical("item", role="item")], label=None).fit({"item": 4})
    for build in (GFCF, EASE, LightGCN, MF):
        with pytest.raises(InputError, match="no column with the role 'user'"):
            build(no_user)
    for build, message in (
        (lambda: GFCF(fitted_schema, rank=0), "rank = 0"),
        (lambda: EASE(fitted_schema, ridge=0.0), "ridge = 0.0 is not above 0"),
        (lambda: EASE(fitted_schema, form="both"), "form = 'both'"),
        (lambda: LightGCN(fitted_schema, sampling="items"), "sampling = 'items'"),
        (lambda: LightGCN(fitted_schema, layers=-1), "layers = -1"),
        (lambda: MF(fitted_schema, loss="hinge"), "loss = 'hinge'"),
        (lambda: MF(fitted_schema, shared_by=0), "shared_by = 0"),
        (lambda: KNNEmbed(MF(fitted_schema), clubs, clusters=1000), "clusters = 1000, and there are 90 items"),
        (lambda: KNNEmbed(MF(fitted_schema), clubs, smoothing=2.0), "smoothing = 2.0"),
    ):
        with pytest.raises(InputError, match=message):
            build()
    with pytest.raises(InputError, match=r"call prepare\(dataset\) first"):
        LightGCN(fitted_schema).item_vectors()
