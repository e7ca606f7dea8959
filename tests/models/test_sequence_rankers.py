"""What is particular to each ranker over long histories: its formula, what its search finds, what its options do."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from recfast import data, models, train
from recfast.data import Batch, Categorical, Jagged, Schema, Sequence
from recfast.errors import InputError
from recfast.models.ctr import _inputs

ITEMS, GENRES = 41, 5


def make_schema(*extra):
    columns = [
        Categorical("user", role="user"),
        Categorical("item", role="item"),
        Categorical("genre", side="item"),
        Sequence("history", max_length=1000),
        *extra,
    ]
    rows = {"user": 7, "item": ITEMS, "genre": GENRES, "place": 3}
    return Schema(columns).fit({name: rows[name] for name in rows if name != "place" or extra})


def make_batch(lengths, candidates, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, *size):
        return torch.randint(1, rows, size, generator=generator)

    rows, items = sum(candidates), sum(lengths)
    return Batch(
        ids=torch.stack([draw(7, rows), draw(ITEMS, rows), draw(GENRES, rows)], dim=1),
        numeric=torch.zeros(rows, 0),
        sequences={"history": Jagged(draw(ITEMS, items), torch.tensor([0, *lengths]).cumsum(0))},
        label=(torch.rand(rows, generator=generator) < 0.5).float(),
        candidate_offsets=torch.tensor([0, *candidates]).cumsum(0),
    )


class Genres:
    """As much of a data set as `SIM.prepare` asks for: item i is of the genre i modulo 5, and 0 is unknown."""

    @staticmethod
    def side(role):
        assert role == "item"
        items = torch.arange(ITEMS)
        return {"columns": ["item", "genre"], "ids": torch.stack([items, items % GENRES], dim=1).numpy()}


def build(name, schema=None, **options):
    torch.manual_seed(0)
    options = {"dim": 8, "tables": {"init_std": 0.5, "lr": 0.1}, **options}
    if name != "QIN":
        options = {"hidden": (12, 6), **options}
    ranker = models.build(name, schema or make_schema(), options)
    if options.get("search") == "hard":
        ranker.prepare(Genres)
    return ranker.eval()


def seen_by(ranker, batch, user):
    """Which events of the user's history the logits of its candidates depend on: bool [candidates, length]."""
    before = ranker(batch).detach()
    values, offsets = batch.sequences["history"]
    mine = slice(*batch.candidate_offsets[user : user + 2].tolist())
    depends = []
    for place in range(*offsets[user : user + 2].tolist()):
        other = values.clone()
        # The genre, and so what a hard search finds, stays; 0 is no item.
        other[place] = (other[place] + GENRES - 1) % (ITEMS - 1) + 1
        changed = dataclasses.replace(batch, sequences={"history": Jagged(other, offsets)})
        depends.append(ranker(changed).detach()[mine] != before[mine])
    return torch.stack(depends, dim=1)


LONG_AND_SHORT = [("ETA", {}), ("TWIN", {}), ("SIM", {}), ("SIM", {"search": "hard", "category": "genre"})]


@pytest.mark.parametrize(("name", "options"), LONG_AND_SHORT)
def test_search_and_short_part(name, options):
    """Every candidate depends on its last S events and on at most k others."""
    batch = make_batch([4, 30, 0], [1, 5, 2])
    depends = seen_by(build(name, top_k=3, short=6, **options), batch, 1)
    assert depends[:, -6:].all()
    found = depends[:, :-6].sum(1)
    # Changing an event can also bring it in: a soft search depends on more than it keeps.
    assert (found <= (3 if "category" in options else 24)).all()
    long_only = seen_by(build(name, top_k=3, short=0, **options), batch, 1)
    assert not long_only[:, -6:].all(), "without the short part the latest events are like any others"
    assert long_only.any()
    assert build(name, top_k=3, short=0, **options)(batch).isfinite().all()


def test_the_hard_search_keeps_the_latest_of_the_category():
    batch = make_batch([40], [6])
    ranker = build("SIM", search="hard", category="genre", top_k=3, short=0)
    depends = seen_by(ranker, batch, 0)
    history = batch.sequences["history"].values
    for candidate, seen in zip(batch.ids[:, 1], depends, strict=True):
        alike = (history % GENRES == candidate % GENRES) & (candidate % GENRES != 0)
        assert seen.nonzero().flatten().tolist() == alike.nonzero().flatten().tolist()[-3:]


def test_the_hard_search_needs_a_category():
    schema = make_schema()
    with pytest.raises(InputError, match=r"needs category, a column of the items \(genre\), got None"):
        models.build("SIM", schema, {"search": "hard"})
    with pytest.raises(InputError, match=r"\(genre\), got 'user'"):
        models.build("SIM", schema, {"search": "hard", "category": "user"})
    places = make_schema(Categorical("place"), Sequence("places", of="place"))
    with pytest.raises(InputError, match="SIM: the sequence 'places' lists 'place', expected 'item' or 'genre'"):
        models.build("SIM", places, {"search": "hard", "category": "genre"})
    ranker = models.build("SIM", schema, {"search": "hard", "category": "genre"})
    with pytest.raises(InputError, match=r"SIM: the categories of the items are not known, call prepare\(dataset\)"):
        ranker(make_batch([3], [1]))
    # They are part of the weights.
    prepared = build("SIM", schema, search="hard", category="genre")
    again = models.build("SIM", schema, prepared.config()).eval()
    again.load_state_dict(prepared.state_dict())
    batch = make_batch([20, 3], [2, 2])
    assert torch.equal(again(batch), prepared(batch))


def test_the_soft_search_has_a_loss_of_its_own():
    batch = make_batch([30, 0, 8], [3, 2, 1])
    ranker = build("SIM", auxiliary=0.5).train()
    ranker.tables.eval()  # so that nothing is updated between two passes
    logits = ranker(batch)
    searched = functional.binary_cross_entropy_with_logits(ranker._searches[0], batch.label)
    expected = _inputs.binary_cross_entropy(logits, batch) + 0.5 * searched
    torch.testing.assert_close(ranker.loss(logits, batch), expected)
    ranker.loss(logits, batch).backward()
    unit = ranker.attention[0]
    assert unit["query"].weight.grad.any()
    assert unit["key"].weight.grad.any()
    # Its answer, written out.
    rows = ranker.tables.dequantize("item")
    e, keys = rows[batch.ids[:, 1]], rows[batch.sequences["history"].values]
    u = torch.zeros(6, 8)
    for row, user in enumerate([0, 0, 0, 1, 1, 2]):
        mine = keys[slice(*batch.sequences["history"].offsets[user : user + 2].tolist())]
        u[row] = (unit["key"](mine) @ unit["query"](e[row]) / 1000) @ mine
    expected = unit["auxiliary"](torch.cat([u, u * e, e], dim=1)).squeeze(1)
    torch.testing.assert_close(ranker._searches[0], expected, rtol=1e-4, atol=1e-5)
    ranker.eval()
    logits = ranker(batch)
    torch.testing.assert_close(ranker.loss(logits, batch), _inputs.binary_cross_entropy(logits, batch))


def test_dare_weighs_with_one_table_and_represents_with_the_other():
    batch = make_batch([9, 4], [2, 2])
    ranker = build("DARE", attention_dim=4, top_k=3)
    assert ranker.attention_tables.dim == 4
    attention, rows = ranker.attention_tables.dequantize("item"), ranker.tables.dequantize("item")
    values, offsets = batch.sequences["history"]
    parts = [ranker.tables.dequantize(c.name)[batch.ids[:, j]] for j, c in enumerate(ranker.schema.categorical)]
    r = torch.zeros(4, 8)
    for row, user in enumerate([0, 0, 1, 1]):
        mine = values[offsets[user] : offsets[user + 1]]
        score = attention[mine] @ attention[batch.ids[row, 1]] / 2
        best = score.topk(3).indices
        r[row] = score[best].softmax(0) @ rows[mine[best]]
    expected = ranker.mlp(torch.cat([*parts, r, r * parts[1]], dim=1)).squeeze(1)
    torch.testing.assert_close(ranker(batch), expected, rtol=1e-4, atol=1e-5)
    everything = build("DARE", attention_dim=4, top_k=None)
    assert seen_by(everything, batch, 0).all()
    # Both tables learn, and in the precision asked for.
    small = build("DARE", precision={"item": "int8", "user": "float32"}).train()
    before = [t.dequantize("item").clone() for t in (small.tables, small.attention_tables)]
    small.loss(small(batch), batch).backward()
    for table, old in zip((small.tables, small.attention_tables), before, strict=True):
        assert table.precision("item") == "int8"
        assert not torch.equal(table.dequantize("item"), old)


@pytest.mark.parametrize("divisor", [1.0, 50.0])
def test_qin_is_its_formula(divisor):
    batch = make_batch([9, 0], [2, 1])
    ranker = build("QIN", attention_dim=6, layers=2, rank=3, divisor=divisor)
    unit, rows = ranker.attention[0], ranker.tables.dequantize("item")
    parts = [ranker.tables.dequantize(c.name)[batch.ids[:, j]] for j, c in enumerate(ranker.schema.categorical)]
    e, keys = parts[1], rows[batch.sequences["history"].values]
    u = e.clone()
    weights = (unit.w_q(e[:2]) @ unit.w_k(keys).T / (6**0.5 * divisor)).relu()
    u[:2] += unit.w_o(weights @ unit.w_v(keys))
    x = torch.cat([*parts, u], dim=1)
    *layers, last = ranker.mlp
    assert len(layers) == 2
    for layer in layers:
        h = layer.linear(x).view(3, 3, -1)
        x = x + layer.activation(torch.einsum("bd,brd->bd", x, h))
    torch.testing.assert_close(ranker(batch), last(x).squeeze(1), rtol=1e-4, atol=1e-5)


def test_options_reach_the_units():
    sdim = build("SDIM", hashes=5, bits=2, normalize=False, seed=3).attention[0]
    assert (sdim.tables, sdim.bits, sdim.normalize, sdim.seed) == (5, 2, False, 3)
    eta = build("ETA", bits=16, top_k=7, heads=4, seed=3).attention[0]["long"]
    assert (eta.bits, eta.k, eta.attention.heads, eta.seed) == (16, 7, 4, 3)
    twin = build("TWIN", heads=4, top_k=9).attention[0]
    assert (twin["long"].top_k, twin["short"].top_k, twin["long"].heads) == (9, None, 4)
    sim = build("SIM", search_dim=3, heads=4).attention[0]
    assert (sim["query"].out_features, sim["long"].heads) == (3, 4)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("TWIN", {"top_k": 0}, "TWIN: top_k must be a whole number of at least 1, got 0"),
        ("TWIN", {"short": -1}, "TWIN: short must be a whole number of at least 0, got -1"),
        ("TWIN", {"heads": 3}, "heads must divide attention_dim = 8, got 3"),
        ("ETA", {"top_k": 2.5}, "ETA: top_k must be a whole number of at least 1, got 2.5"),
        ("ETA", {"bits": 100}, "ETA: .* multiple of 64"),
        ("SDIM", {"bits": 9}, "SDIM: .*bits=9"),
        ("SIM", {"search": "firm"}, "SIM: search must be one of soft, hard, got 'firm'"),
        ("SIM", {"auxiliary": -1.0}, "SIM: auxiliary must be at least 0, got -1.0"),
        ("DARE", {"top_k": 0}, "DARE: top_k must be a whole number of at least 1, got 0"),
        ("DARE", {"attention_dim": 0}, "DARE: attention_dim must be"),
        ("QIN", {"divisor": 0.0}, "QIN: divisor must be positive, got 0.0"),
        ("QIN", {"rank": 0}, "QIN: rank must be a whole number of at least 1, got 0"),
        ("QIN", {"dropout": 1.0}, r"QIN: dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(name, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build(name, **options)
    assert "\n" not in str(caught.value)


def test_last_of_each_list():
    values, offsets = torch.arange(10), torch.tensor([0, 4, 4, 5, 10])
    kept, ends = _inputs.last(values, offsets, 2)
    assert kept.tolist() == [2, 3, 4, 8, 9]
    assert ends.tolist() == [0, 2, 2, 3, 5]
    assert _inputs.last(values, offsets, 0)[1].tolist() == [0] * 5
    whole, same = _inputs.last(values, offsets, 99)
    assert torch.equal(whole, values)
    assert torch.equal(same, offsets)


@pytest.mark.parametrize("name", ["TWIN", "SDIM"])
def test_compiled(name):
    """One graph, and the answers and gradients of the model as it is."""
    batch = make_batch([12, 0, 7], [3, 1, 2])
    plain, other = build(name).train(), build(name).train()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        logits, expected = compiled(batch), plain(batch)
        torch.testing.assert_close(logits, expected)
        for model, answer in ((other, logits), (plain, expected)):
            model.loss(answer, batch).backward()
    for (name, mine), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    torch.testing.assert_close(other.tables.dequantize("item"), plain.tables.dequantize("item"))


def test_fit_on_users_with_a_past(tmp_path):
    """From generated histories to a trained run that is read back; the categories come from the data set."""
    dataset = data.load(
        "synthetic",
        rows=2000,
        n_users=20,
        n_items=100,
        list_length=20,
        history_length=300,
        cache=tmp_path,
        max_length=300,
    )
    model = models.SIM(dataset.schema, dim=4, hidden=(8,), search="hard", category="topic", top_k=10, short=5)
    run = train.fit(model, dataset, epochs=2, batch_size=16, shared_histories=True, lr=5e-3, out=tmp_path / "run")
    assert [entry["loss"] for entry in run.history][1] < run.history[0]["loss"]
    assert run.steps == 2 * -(-len(dataset.train.requests()[1:]) // 16)
    again = models.load(tmp_path / "run")
    batch = next(iter(data.Loader(dataset.test, 4, shared=True)))
    assert batch.sequences["history"].lengths().max() == 300
    assert torch.equal(again(batch), run.model(batch))
    # Rows that share a history, and rows with a copy each, are measured alike; so is the validation in `fit`.
    together, apart = (train.evaluate(again, dataset.valid, shared=shared) for shared in (True, False))
    assert together == pytest.approx(apart, rel=1e-5)
    assert together == pytest.approx(run.metrics, rel=1e-5)
    with pytest.raises(InputError, match="shared_histories is for rankers, and TwoTower is a retriever"):
        train.fit(models.TwoTower(dataset.schema), dataset, shared_histories=True)
