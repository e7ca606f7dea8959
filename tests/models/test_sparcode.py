"""SparCode: encoders, tokens, scorers, what it learns, and an index that answers what the model would."""

import copy
import itertools
import json
import math

import numpy as np
import polars as pl
import pytest
import torch

from recfast import data, models
from recfast.data import Batch, Jagged, Loader
from recfast.errors import InputError
from recfast.models import storage
from recfast.models.retrieval import _candidates, _score_rows, _scorers
from recfast.models.retrieval._sparcode_index import SparCodeIndex
from recfast.models.retrieval.baselines import Popularity
from recfast.models.retrieval.dssm import DSSM
from recfast.models.retrieval.sparcode import SparCode
from recfast.train import fit
from recfast.train.evaluate import evaluate, top_k

SMALL = {"dim": 8, "hidden": (8,), "tokens": 3, "token_dim": 4, "codes": 8, "dropout": 0.0}


def schema() -> data.Schema:
    columns = [
        data.Categorical("user", role="user"),
        data.Categorical("item", role="item"),
        data.Sequence("history", of="item", max_length=10),
    ]
    return data.Schema(columns, label="label", time="time")


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> data.Dataset:
    """60 users walk around rings of ten items: what comes next follows from the last items, not from popularity."""
    frames = []
    for begin, steps in ((0, 12), (12, 1), (13, 1)):
        user = np.repeat(np.arange(60), steps)
        step = begin + np.tile(np.arange(steps), 60)
        # Each ring has more items than a walk, so that the next one was never seen.
        item = user % 4 * 20 + (user // 4 * 7 + step) % 20
        frames.append(pl.DataFrame({"user": user, "item": item, "time": step, "label": 1}))
    return data.prepare(schema(), *frames, cache=tmp_path_factory.mktemp("walks"))


def lists(*rows: list[int]) -> Jagged:
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return Jagged(torch.tensor([x for row in rows for x in row], dtype=torch.int64), offsets)


def train(
    model: torch.nn.Module, dataset: data.Dataset, epochs: int, *, seed: int = 0, lr: float = 0.01
) -> list[float]:
    """Train, and return the mean loss of each epoch."""
    torch.manual_seed(seed)
    model.prepare(dataset)
    model.train()
    loader = Loader(dataset.train.positives(), 64, shuffle=True, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
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


@pytest.fixture(scope="module")
def trained(walks):
    """A model a sparsity, and one with codebooks of its own for each token; trained a little."""
    made = {}
    for name, options in (
        ("index", {}),
        ("train", {"sparsity": "train", "scorer": "mlp", "scorer_hidden": (8, 4)}),
        ("own", {"shared_codebooks": False, "codebooks": 1}),
    ):
        made[name] = SparCode(walks.schema, **SMALL | options)
        train(made[name], walks, 3)
    return made


def ask(walks: data.Dataset, number: int = 40) -> tuple[Jagged, torch.Tensor]:
    users = torch.arange(1, number + 1)
    return walks.history("valid").take(users), users


# -- scorers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
def test_a_first_layer_in_two_parts_is_the_joined_mlp(hidden, monkeypatch):
    torch.manual_seed(0)
    scorer = _scorers.MLPScorer(4, 3, 2, hidden)
    tokens, items = torch.randn(7, 4, requires_grad=True), torch.randn(5, 2, 3, requires_grad=True)
    joined = torch.cat([tokens[:, None].expand(7, 5, 4), items.flatten(1).expand(7, 5, 6)], dim=2)
    layers = [layer for layer in scorer.rest if isinstance(layer, torch.nn.Linear)]
    expected = torch.nn.functional.linear(joined, scorer.first.weight, scorer.first.bias)
    for layer in layers:
        expected = layer(torch.relu(expected))
    expected = expected.squeeze(-1)
    weight = torch.randn(7, 5)
    wanted = torch.autograd.grad((expected * weight).sum(), [tokens, items, *scorer.parameters()])
    for units in (1 << 23, 60, 1):
        monkeypatch.setattr(_scorers, "_PAIR_UNITS", units)
        found = scorer(tokens, items)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        given = torch.autograd.grad((found * weight).sum(), [tokens, items, *scorer.parameters()])
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "mlp", "dot"])
@pytest.mark.parametrize("item_tokens", [1, 3])
def test_pairs_are_cells_of_the_matrix(name, item_tokens):
    torch.manual_seed(0)
    scorer = _scorers.scorer_of(name, 4, 6, item_tokens, (5,))
    tokens, items = torch.randn(7, 4), torch.randn(9, item_tokens, 6)
    matrix = scorer(tokens, items)
    assert matrix.shape == (7, 9)
    a, b = torch.cartesian_prod(torch.arange(7), torch.arange(9)).T
    torch.testing.assert_close(scorer.pairs(tokens[a], items[b]).view(7, 9), matrix, rtol=1e-4, atol=1e-5)


def test_attention_is_its_formula_and_with_one_item_token_the_dot_product():
    torch.manual_seed(0)
    scorer = _scorers.AttentionScorer(4, 6, 8)
    torch.nn.init.normal_(scorer.expand.mlp[-1].weight)
    tokens = torch.randn(3, 4)
    for count in (1, 2, 3):
        items = torch.randn(5, count, 6)
        for t, i in itertools.product(range(3), range(5)):
            token = scorer.expand(tokens[t])
            weights = torch.softmax(items[i] @ scorer.query(token), dim=0)
            expected = token @ (weights[:, None] * items[i]).sum(0)
            torch.testing.assert_close(scorer(tokens, items)[t, i], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scorer(tokens, items[:, :1]), scorer.expand(tokens) @ items[:, 0].T)


# -- loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    positives = _candidates.Positives(torch.tensor([0, 0, 1]), torch.tensor([2, 3, 5]))
    candidates = _candidates.Candidates(torch.tensor([1, 2, 4, 5]), torch.tensor([0.0, 0.5, -0.25, 1.0]))
    own, others = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    w = candidates.log_weight.exp().tolist()
    first = (
        w[0] * math.exp(0.1) + w[2] * math.exp(0.3) + w[3] * math.exp(0.4)
    )  # without item 2, a positive of history 0
    second = w[0] * math.exp(0.5) + w[1] * math.exp(0.6) + w[2] * math.exp(0.7)
    expected = [math.log(math.exp(s) + n) - s for s, n in ((1.0, first), (2.0, first), (0.5, second))]
    found = _candidates.softmax_loss(own, others, candidates, positives)
    assert float(found) == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_the_loss_of_private_negatives_by_hand(monkeypatch):
    """Each positive has its own; one that is the positive itself does not count."""
    positives = _candidates.Positives(torch.tensor([0, 1, 1]), torch.tensor([2, 3, 1]))
    drawn = torch.tensor([[1, 4, 4], [2, 3, 1], [1, 1, 1]])
    monkeypatch.setattr(_candidates.torch, "randint", lambda low, high, shape, **_: drawn)
    scores = torch.tensor([[9.0, 0.1, 0.2, 0.3, 0.4], [9.0, 0.5, 0.6, 0.7, 0.8]])
    own = torch.tensor([1.0, 2.0, 0.5])
    found = _candidates.private_loss(own, lambda owner, items: scores[owner, items], positives, 5, 3)
    sums = (math.exp(0.1) + 2 * math.exp(0.4), math.exp(0.6) + math.exp(0.5), 0.0)
    expected = [math.log(math.exp(s) + n) - s for s, n in zip((1.0, 2.0, 0.5), sums, strict=True)]
    assert float(found) == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_private_negatives_are_uniform():
    positives = _candidates.Positives(torch.zeros(3000, dtype=torch.int64), torch.full((3000,), 7))
    counts = torch.zeros(8)

    def pairs(owner, items):
        counts.add_(torch.bincount(items, minlength=8))
        return torch.zeros(len(items))

    # Without the positive itself 10 times 6/7 are left on average, of score 0 like the positive.
    loss = _candidates.private_loss(torch.zeros(3000), pairs, positives, 8, 10)
    assert counts[0] == 0
    torch.testing.assert_close(counts[1:] / 30000, torch.full((7,), 1 / 7), rtol=0.1, atol=0)
    assert math.log(1 + 8) < float(loss) < math.log(1 + 10 * 6 / 7)
    empty = _candidates.Positives(*torch.zeros(2, 0, dtype=torch.int64))
    assert _candidates.private_loss(torch.zeros(0), pairs, empty, 8, 10) == 0


@pytest.mark.parametrize("model", [SparCode, DSSM])
def test_without_an_item_bias_there_is_none(walks, model):
    options = {"dim": 8, "hidden": (8,), "item_bias": False}
    made = model(walks.schema, **options)
    train(made, walks, 1)
    assert not made.bias.any()
    assert made.config()["item_bias"] is False


def test_all_items_give_the_softmax_over_the_catalogue():
    positives = _candidates.Positives(torch.arange(4), torch.tensor([1, 5, 5, 2]))
    candidates = _candidates.draw(positives, torch.ones(7, dtype=torch.int64), "all", 0)
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    own = scores[torch.arange(4), positives.items - 1]
    found = _candidates.softmax_loss(own, scores, candidates, positives)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(scores, positives.items - 1))


@pytest.mark.parametrize("negatives", ["uniform", "sampled", "batch", "mixed"])
def test_drawn_negatives_stand_for_the_catalogue(negatives):
    """The mean weight of an item over many draws is 1: the sums over candidates are right in expectation."""
    torch.manual_seed(0)
    counts = torch.tensor([0, 50, 30, 10, 5, 5])
    total = torch.zeros(6)
    for _ in range(4000):
        rows = torch.multinomial(counts.float(), 9, replacement=True)
        candidates = _candidates.draw(_candidates.Positives(torch.arange(9), rows), counts, negatives, 8)
        total.index_add_(0, candidates.ids, candidates.log_weight.exp())
        assert (candidates.ids > 0).all()
    # In a batch of R rows each sees R - 1 others, so with its own left out the factor is R / (R - 1) before.
    expected = {"batch": 9 / 8}.get(negatives, 1.0)
    if negatives != "mixed":
        torch.testing.assert_close(total[1:] / 4000, torch.full((5,), expected), rtol=0.1, atol=0)
    else:
        assert ((total[1:] / 4000 > 0.95) & (total[1:] / 4000 < 1.2)).all()


def test_rows_that_share_a_history_lose_what_they_lose_apart(walks):
    """With all items as candidates, and one positive a history, the loss does not know how rows are batched."""
    model = SparCode(walks.schema, **SMALL | {"history_dropout": 0.0})
    model.prepare(walks)
    model.eval()
    model.tokens.quantizer._begin(torch.randn(50, 4))
    model.tokens.quantizer.begun.fill_(True)
    histories = lists([1, 2], [3], [4, 5, 6])
    ids = torch.tensor([[1, 7], [1, 8], [2, 9], [2, 0], [3, 10]])  # user, item; an unknown item trains nothing

    def batch(rows, offsets, chosen):
        return Batch(
            ids=ids[rows], numeric=torch.zeros(len(rows), 0), sequences={"history": histories.take(chosen)},
            candidate_offsets=None if offsets is None else torch.tensor(offsets), columns=("user", "item"),
        )  # fmt: skip

    def loss(*of):
        made = batch(*of)
        return model.loss(model(made), made) - model(made)[1]

    apart = loss([0, 2, 4], None, [0, 1, 2])
    torch.testing.assert_close(loss([0, 2, 4], [0, 1, 2, 3], [0, 1, 2]), apart)
    # Two positives of one history: neither is the other's negative.
    both, one, other = loss([0, 1], [0, 2], [0]), loss([0], None, [0]), loss([1], None, [0])
    assert both < (one + other) / 2
    torch.testing.assert_close(loss([2, 3], [0, 2], [1]), loss([2], None, [1]))


# -- encoders and tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SparCode, DSSM])
@pytest.mark.parametrize("encoder", ["mean", "gru", "attention"])
@pytest.mark.parametrize("recency", [True, False])
def test_encoders(walks, model, encoder, recency):
    """Any history, an empty one and unknown users too; the same alone and in company; a gradient in every weight."""
    options = {"dim": 8, "hidden": (8,), "encoder": encoder, "recency": recency, "history_dropout": 0.0, "dropout": 0.0}
    built = model(walks.schema, **options)
    histories = lists([], [0, 0], [1, 2], list(range(1, 31)), [5])
    users = torch.tensor([0, 3, 0, 2, 1])
    built.eval()
    with torch.no_grad():
        vectors = built.encoder(histories, users)
        assert vectors.shape == (5, 16)
        assert torch.isfinite(vectors).all()
        alone = torch.cat([built.encoder(histories.take([row]), users[row : row + 1]) for row in range(5)])
        torch.testing.assert_close(alone, vectors, rtol=1e-4, atol=1e-6)
        shorter = lists([], [], [1, 2], list(range(1, 31)), [5])
        assert torch.equal(built.encoder(shorter, users), vectors)  # unknown items do not count
        # Only the last 50 items matter.
        long = lists([7] * 30 + list(range(1, 51)))
        assert torch.equal(built.encoder(long, None), built.encoder(lists(list(range(1, 51))), None))
    built.train()
    train(built, walks, 1)
    batch = next(iter(Loader(walks.train.positives(), 200, shuffle=True)))
    built.train().zero_grad()
    built.loss(built(batch), batch).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_order_matters_to_gru_and_attention_only(walks):
    for encoder, same in (("mean", True), ("gru", False), ("attention", False)):
        model = SparCode(walks.schema, **SMALL | {"encoder": encoder, "recency": False}).eval()
        with torch.no_grad():
            one, other = model.encoder(lists([1, 2, 3]), None), model.encoder(lists([3, 1, 2]), None)
        assert torch.allclose(one, other, atol=1e-6) == same


@pytest.mark.parametrize("name", ["index", "own"])
def test_codes_name_the_tokens(walks, trained, name):
    model = trained[name]
    histories, users = ask(walks)
    codes = model.encode(histories, users)
    assert codes.shape == (40, 3)
    assert codes.min() >= 0
    assert codes.max() < model.tokens.n_composite == {"index": 64, "own": 24}[name]
    with torch.no_grad():
        tokens, _ = model.tokens(model.encoder(histories, users))
    assert torch.equal(model.tokens.decode(codes.flatten()).view(tokens.shape), tokens)
    if name == "own":
        assert torch.equal(codes // 8, torch.arange(3).expand(40, 3))
        # Token k stands at place k among zeros.
        assert torch.equal(
            tokens.unflatten(2, (3, 4)).abs().sum(3) > 0, torch.eye(3, dtype=torch.bool).expand(40, 3, 3)
        )


# -- what it learns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scorer": "mlp", "scorer_hidden": (16,)},
        {"sparsity": "train"},
        {"shared_codebooks": False, "warm_up": 60},
        {"encoder": "gru", "codebook_update": "gradient"},
        {"negatives": "sampled", "num_negatives": 60},
        {"negatives": "private", "num_negatives": 10, "item_bias": False},
    ],
    ids=str,
)
def test_learns_what_comes_next(walks, options):
    base = {
        "dim": 16,
        "hidden": (16,),
        "token_dim": 8,
        "codes": 16,
        "decay": 0.9,
        "dropout": 0.0,
        "history_dropout": 0.1,
    }
    model = SparCode(walks.schema, **base | options)
    means = train(model, walks, 15)
    assert means[-1] < 0.8 * means[0]
    popular = Popularity(walks.schema)
    popular.prepare(walks)
    beaten = evaluate(popular, walks.test, dataset=walks, k=[5])["recall@5"]
    assert evaluate(model, walks.test, dataset=walks, k=[5])["recall@5"] > max(0.4, 2 * beaten)


def test_same_seed_same_weights(walks):
    def state(seed, outer):
        torch.manual_seed(outer)
        model = SparCode(walks.schema, **SMALL, seed=seed)
        train(model, walks, 2, seed=seed)
        return model.state_dict()

    first, again, other = state(3, 17), state(3, 18), state(4, 18)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["items"], other["items"])


def test_fit_trains_it_and_its_run_can_be_loaded(walks, tmp_path):
    model = SparCode(walks.schema, **SMALL)
    run = fit(model, walks, epochs=2, batch_size=128, lr=0.01, out=tmp_path / "run", progress=False)
    assert set(run.metrics) >= {"recall@10", "ndcg@50"}
    histories, users = ask(walks)
    assert torch.equal(models.load(tmp_path / "run").scores(histories, users), model.scores(histories, users))


# -- scores and index ------------------------------------------------------------------------------------------------


def dense(model, histories, users) -> torch.Tensor:
    """The scores by the formula: each token's code on its own."""
    codes = model.encode(histories, users)
    scores = sum(model.code_scores(codes[:, token]) for token in range(codes.shape[1]))
    scores[:, 0] = -torch.inf
    return scores


@pytest.mark.parametrize("name", ["index", "train", "own"])
def test_scores_are_the_sum_of_the_rows(walks, trained, name, monkeypatch):
    model = trained[name]
    histories, users = ask(walks)
    expected = dense(model, histories, users)
    for budget in (1 << 29, 0):
        monkeypatch.setattr(_score_rows, "_BUDGET", budget)
        model._score_rows = _score_rows.ScoreRows(model)
        for part in (slice(None), slice(0, 7), slice(30, 40), slice(0, 40)):
            found = model.scores(histories.take(torch.arange(40)[part]), users[part])
            torch.testing.assert_close(found, expected[part], rtol=1e-5, atol=1e-5)


def test_kept_rows_are_forgotten_when_a_weight_changes(walks, trained):
    model = copy.deepcopy(trained["index"])
    histories, users = ask(walks)
    before = model.scores(histories, users)
    assert torch.equal(trained["index"].scores(histories, users), before)
    with torch.no_grad():
        model.bias[3] += 5.0
    after = model.scores(histories, users)
    torch.testing.assert_close(after[:, 3], before[:, 3] + 5.0)
    assert torch.equal(trained["index"].scores(histories, users), before)


@pytest.mark.parametrize("name", ["index", "train", "own"])
def test_an_index_that_cuts_nothing_answers_what_the_model_does(walks, trained, name):
    model = trained[name]
    histories, users = ask(walks)
    index = model.build_index(top=model.rows)
    scores, ids = index.retrieve(histories, users, 10)
    expected = dense(model, histories, users)
    assert torch.equal(scores, scores.sort(dim=1, descending=True).values)
    torch.testing.assert_close(scores, expected.gather(1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, top_k(expected, 10)[0], rtol=1e-5, atol=1e-5)
    # One user at a time, and longer lists: the same.
    few = index.retrieve(histories.take([5]), users[5:6], 5)
    assert torch.equal(few[1][0], ids[5, :5])
    excluded = walks.seen("valid").take(users)
    _, new = index.retrieve(histories, users, 10, exclude=excluded)
    for row in range(40):
        assert not set(new[row].tolist()) & set(excluded.row(row).tolist())
        left = [i for i in index.retrieve(histories, users, model.rows)[1][row].tolist() if i not in excluded.row(row)]
        assert new[row].tolist() == left[:10]


@pytest.mark.parametrize("name", ["index", "train"])
def test_a_bias_is_added_before_what_is_not_positive_is_dropped(walks, trained, name):
    model = trained[name]
    histories, users = ask(walks)
    codes = model.encode(histories, users)
    bias = -float(model.code_scores(codes.flatten()).median())
    index = model.build_index(top=model.rows, bias=bias)
    terms = torch.relu(model.code_scores(codes.flatten()) + bias)
    terms[:, 0] = 0
    expected = terms.unflatten(0, codes.shape).sum(1)
    scores, ids = index.retrieve(histories, users, model.rows)
    assert 0 < len(index.rows.scores) < model.tokens.n_composite * (model.rows - 1)
    held = torch.zeros_like(expected).scatter_(1, ids.clamp(min=0), scores.clamp(min=0))
    torch.testing.assert_close(held, expected, rtol=1e-5, atol=1e-5)


def test_train_sparsity_drops_zeros(walks, trained):
    model = trained["train"]
    scores = model.code_scores(torch.arange(model.tokens.n_composite))
    assert scores.min() == 0
    index = model.build_index(top=model.rows)
    assert len(index.rows.scores) == int((scores[:, 1:] > 0).sum())


def test_the_cut_keeps_the_best_and_measures_from_what_just_missed(walks, trained):
    model = trained["index"]
    rows = model.code_scores(torch.arange(model.tokens.n_composite))
    index = model.build_index(top=6)
    for code in range(0, 64, 9):
        held = slice(int(index.rows.indptr[code]), int(index.rows.indptr[code + 1]))
        best = rows[code, 1:].sort(descending=True, stable=True)
        ids = (best.indices[:6] + 1).sort().values
        assert torch.equal(index.rows.item_ids[held].long(), ids)
        torch.testing.assert_close(index.rows.scores[held], rows[code, ids] - best.values[6])


def test_ties_at_the_cut_go_to_the_lowest_id(walks):
    model = SparCode(walks.schema, **SMALL)
    train(model, walks, 1)
    with torch.no_grad():
        model.items[10:20] = model.items[10]
        model.bias[10:20] = 50.0
    index = model.build_index(top=4, bias=1000.0)
    for code in range(64):
        assert index.rows.item_ids[4 * code : 4 * code + 4].tolist() == [10, 11, 12, 13]


def test_only_codes_in_use(walks, trained):
    model = trained["index"]
    histories, users = ask(walks)
    said = []
    small = model.build_index(top=20, codes=model.encode(histories, users), say=said.append)
    whole = model.build_index(top=20)
    assert len(small.rows) == len(model.encode(histories, users).unique()) < len(whole.rows) == 64
    for a, b in zip(small.retrieve(histories, users, 9), whole.retrieve(histories, users, 9), strict=True):
        assert torch.equal(a, b)
    assert len(said) == 1
    assert f"{len(small.rows)} codes x 80 items" in said[0]
    # A user whose codes have no row gets nothing.
    none = model.build_index(top=20, codes=torch.zeros(0, dtype=torch.int64))
    scores, ids = none.retrieve(histories, users, 3)
    assert (ids == -1).all()
    assert (scores == -torch.inf).all()


def test_evaluate_through_scores(walks, trained):
    found = evaluate(trained["index"], walks.test, dataset=walks, k=[5, 80])
    assert found["recall@80"] == 1.0
    assert 0 <= found["recall@5"] <= 1


# -- disk and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index", "train", "own"])
def test_saved_and_loaded(walks, trained, name, tmp_path):
    model = trained[name]
    histories, users = ask(walks)
    storage.save_model(model, walks.schema, tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    assert torch.equal(loaded.scores(histories, users), model.scores(histories, users))
    index = model.build_index(top=10)
    index.save(tmp_path / "index")
    for mmap in (False, True):
        again = SparCodeIndex.load(tmp_path / "index", mmap=mmap)
        for a, b in zip(again.retrieve(histories, users, 9), index.retrieve(histories, users, 9), strict=True):
            assert torch.equal(a, b)
    assert index.nbytes() == 8 * len(index.rows.scores) + 8 * (len(index.rows) + 1) + 8 * model.tokens.n_composite
    damaged = tmp_path / "index" / "codes.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"SparCodeIndex.load"):
        SparCodeIndex.load(tmp_path / "index")
    with pytest.raises(InputError, match="is not a folder"):
        SparCodeIndex.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["SparCode", "DSSM"])
def test_config_and_back(walks, name):
    model = models.build(name, walks.schema, {"dim": 8, "hidden": (4, 4), "seed": 5})
    config = json.loads(json.dumps(model.config()))
    again = models.build(name, walks.schema, config)
    assert again.config() == model.config()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "cosine"}, "SparCode: scorer = 'cosine' is not one of 'attention', 'mlp', 'dot'"),
        ({"encoder": "lstm"}, "encoder = 'lstm' is not one of 'mean', 'gru', 'attention'"),
        ({"sparsity": "both"}, "SparCode: sparsity = 'both' is not 'index' or 'train'"),
        ({"negatives": "none"}, "SparCode: negatives = 'none' is not one of"),
        ({"tokens": 0}, "SparCode: tokens = 0, token_dim = 16"),
        ({"token_dim": 5}, "SparCode: VectorQuantizer: dim must be a positive multiple of 2 codebooks, got 5"),
        ({"codebook_update": "sgd"}, "SparCode: VectorQuantizer: update must be"),
        ({"scorer": "mlp", "scorer_hidden": ()}, "scorer_hidden must name at least one hidden layer"),
        ({"dropout": 1.0}, "expected at least 1, 1, and probabilities below 1"),
    ],
)
def test_bad_options(walks, options, message):
    with pytest.raises(InputError, match=message):
        SparCode(walks.schema, **options)


def test_bad_requests(walks, trained):
    model = trained["index"]
    histories, users = ask(walks)
    with pytest.raises(InputError, match="top = 0, expected at least 1"):
        model.build_index(top=0)
    with pytest.raises(InputError, match="bias = 'ceiling' is not a number or 'floor'"):
        model.build_index(bias="ceiling")
    with pytest.raises(InputError, match=r"codes holds 64, which is outside \[0, 64\)"):
        model.build_index(codes=torch.tensor([1, 64]))
    with pytest.raises(InputError, match="the model's codebooks have not begun"):
        SparCode(walks.schema).build_index()
    with pytest.raises(InputError, match="expected at most 134217728"):
        SparCode(walks.schema, codes=65536).build_index()
    with pytest.raises(InputError, match="exclude has 1 lists, expected 40"):
        model.build_index(top=5).retrieve(histories, users, 3, exclude=lists([1]))
    with pytest.raises(InputError, match="its score is no dot product"):
        model.user_vectors(histories, users)
