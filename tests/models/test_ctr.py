"""The rankers on batches made by hand: what they read, share, learn and remember."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from recfast import models
from recfast.data import Batch, Categorical, Jagged, Numeric, Schema, Sequence, Vector
from recfast.errors import InputError
from recfast.models.ctr.dare import DARE
from recfast.models.ctr.dcn_v2 import DCNv2
from recfast.models.ctr.deepfm import DeepFM
from recfast.models.ctr.din import DIN
from recfast.models.ctr.eta import ETA
from recfast.models.ctr.qin import QIN
from recfast.models.ctr.sdim import SDIM
from recfast.models.ctr.sim import SIM
from recfast.models.ctr.twin import TWIN

ROWS = {"user": 9, "item": 21, "genre": 4}


def SIM_hard(schema, **options):
    ranker = SIM(schema, **{"search": "hard", "category": "genre", **options})
    genre = torch.arange(ROWS["item"]) % ROWS["genre"]
    ids = torch.stack([torch.arange(ROWS["item"]), genre], dim=1).numpy()
    ranker.prepare(SimpleNamespace(side=lambda role: {"ids": ids, "columns": ["item", "genre"]}))
    return ranker


def QIN_(schema, hidden=None, activation=None, tables=None, **options):
    """Without the options of an MLP, which it does not have; products of three small numbers learn slowly."""
    return QIN(schema, tables=tables and {"init_std": 0.1, **tables}, **options)


HISTORIES = [DIN, SDIM, ETA, SIM, TWIN, DARE, QIN_]
MODELS = [*HISTORIES, DeepFM, DCNv2]


def make_schema(full=True):
    columns = [Categorical("user", role="user"), Categorical("item", role="item"), Sequence("history")]
    if full:
        columns += [
            Categorical("genre", side="item"),
            Sequence("genres", of="genre"),
            Numeric("price"),
            Vector("text", dim=3),
        ]
    return Schema(columns).fit({c.name: ROWS[c.name] for c in columns if isinstance(c, Categorical)})


def make_batch(schema, lengths, candidates=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths) if candidates is None else sum(candidates)

    def ids(name, count):
        return torch.randint(0, schema.rows(name), (count,), generator=generator)

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Batch(
        ids=torch.stack([ids(column.name, rows) for column in schema.categorical], dim=1),
        numeric=torch.randn(rows, len(schema.numeric), generator=generator),
        sequences={column.name: Jagged(ids(column.of, sum(lengths)), offsets) for column in schema.sequences},
        vectors={column.name: torch.randn(rows, column.dim, generator=generator) for column in schema.vectors},
        label=(torch.rand(rows, generator=generator) < 0.5).float(),
        group=None,
        candidate_offsets=None if candidates is None else torch.tensor([0, *candidates]).cumsum(0),
    )


def expand(batch):
    """The same rows, each with a copy of its user's histories."""
    users = torch.arange(batch.candidate_offsets.numel() - 1).repeat_interleave(batch.candidate_offsets.diff())
    sequences = {}
    for name, (values, offsets) in batch.sequences.items():
        lists = [values[offsets[user] : offsets[user + 1]] for user in users]
        lengths = torch.tensor([0, *map(len, lists)])
        sequences[name] = Jagged(torch.cat(lists), lengths.cumsum(0))
    return dataclasses.replace(batch, sequences=sequences, candidate_offsets=None)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_one_logit_a_row(model, full, precision):
    schema = make_schema(full)
    ranker = model(schema, dim=8, hidden=(12, 6), precision=precision).eval()
    for lengths, candidates in [([3, 0, 5], None), ([3, 0, 5], [2, 1, 4]), ([4], [0]), ([0], None)]:
        batch = make_batch(schema, lengths, candidates)
        logits = ranker(batch)
        assert logits.shape == (len(batch),)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()
    assert ranker.task == "ranking"


@pytest.mark.parametrize("model", [*MODELS, SIM_hard])
def test_candidates_share_a_history(model):
    schema = make_schema()
    torch.manual_seed(0)
    ranker = model(schema, dim=8, hidden=(12, 6)).eval()
    batch = make_batch(schema, [3, 0, 5, 1], [2, 1, 4, 0])
    torch.testing.assert_close(ranker(batch), ranker(expand(batch)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [*MODELS, SIM_hard])
def test_every_input_matters(model):
    """Changing one column of one row changes that row's logit and, histories aside, no other's."""
    schema = make_schema()
    torch.manual_seed(0)
    # In hashes of three bits a candidate may meet none of its user's events.
    own = {"bits": 1} if model is SDIM else {}
    ranker = model(schema, dim=8, hidden=(12, 6), **own).eval()
    batch = make_batch(schema, [3, 2, 5])
    before = ranker(batch).detach()

    def changes(**fields):
        after = ranker(dataclasses.replace(batch, **fields)).detach()
        assert after[0] != before[0]
        assert torch.equal(after[1:], before[1:])

    for j, column in enumerate(schema.categorical):
        ids = batch.ids.clone()
        ids[0, j] = (ids[0, j] + 1) % schema.rows(column.name)
        changes(ids=ids)
    for name, (values, offsets) in batch.sequences.items():
        other = values.clone()
        other[0] = (other[0] + 1) % schema.rows(name)
        changes(sequences={**batch.sequences, name: Jagged(other, offsets)})
    bump = torch.zeros(3, 1)
    bump[0] = 1
    changes(numeric=batch.numeric + bump)
    changes(vectors={"text": batch.vectors["text"] + bump})


@pytest.mark.parametrize("model", [*MODELS, SIM_hard])
def test_gradient_reaches_every_parameter(model):
    schema = make_schema()
    torch.manual_seed(0)
    ranker = model(schema, dim=8, hidden=(12, 6))
    batch = make_batch(schema, [6] * 16)
    ranker.loss(ranker(batch), batch).backward()
    for name, parameter in ranker.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def separable(schema, rows, generator):
    """Label 1 where the candidate's id has the parity of the history's: the history decides, no column alone."""
    parity = torch.randint(0, 2, (rows,), generator=generator)
    label = torch.randint(0, 2, (rows,), generator=generator)
    item = 1 + 2 * torch.randint(0, 10, (rows,), generator=generator) + (parity ^ (1 - label))
    history = 1 + 2 * torch.randint(0, 10, (rows, 4), generator=generator) + parity.unsqueeze(1)
    user = torch.randint(0, schema.rows("user"), (rows,), generator=generator)
    return Batch(
        ids=torch.stack([user, item], dim=1),
        numeric=torch.zeros(rows, 0),
        sequences={"history": Jagged(history.flatten(), torch.arange(rows + 1) * 4)},
        vectors={},
        label=label.float(),
        group=None,
        candidate_offsets=None,
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_it_learns_from_the_history(model, precision):
    schema = make_schema(full=False)
    torch.manual_seed(0)
    ranker = model(schema, dim=8, hidden=(32,), precision=precision, tables={"lr": 0.1})
    optimizer = torch.optim.Adam([p for p in ranker.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(200):
        batch = separable(schema, 128, generator)
        loss = ranker.loss(ranker(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.6
    # log 2 = 0.69 is what a model gets that ignores the history.
    assert sum(losses[-10:]) / 10 < 0.2


@pytest.mark.parametrize("model", [*MODELS, SIM_hard])
def test_config_rebuilds_the_model(model):
    import json

    schema = make_schema()
    options = {
        "dim": 4,
        "hidden": (6,),
        "activation": "dice",
        "precision": "int8",
        "tables": {"lr": 0.02},
        "dropout": 0.1,
    }
    ranker = model(schema, **options).eval()
    config = json.loads(json.dumps(ranker.config()))
    twin = model(schema, **config).eval()
    assert twin.config() == ranker.config()
    twin.load_state_dict(ranker.state_dict())
    batch = make_batch(schema, [3, 2])
    assert torch.equal(twin(batch), ranker(batch))


def test_din_has_the_options_of_its_unit():
    schema = make_schema(full=False)
    ranker = DIN(schema, dim=4, attention_hidden=(5,), attention_activation="silu", attention_mode="softmax")
    assert (ranker.attention[0].hidden, ranker.attention[0].mode) == ((5,), "softmax")
    assert ranker.config()["attention_hidden"] == [5]


def test_din_learns_the_dice_of_its_unit():
    schema = make_schema(full=False)
    torch.manual_seed(0)
    ranker = DIN(schema, dim=4, attention_hidden=(5, 3), attention_activation="dice")
    batch = make_batch(schema, [3, 2])
    ranker.loss(ranker(batch), batch).backward()
    unit = ranker.attention[0]
    assert unit.alpha.grad.abs().sum() > 0
    assert unit.running_mean.abs().sum() > 0
    assert ranker.config()["attention_activation"] == "dice"
    before = unit.running_mean.clone()
    ranker.eval()(batch)
    assert torch.equal(unit.running_mean, before)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("structure", ["parallel", "stacked"])
def test_dcn_v2_is_its_formula(structure, full):
    """The logit, written out from the parameters: crosses of x_0, then one linear layer over [x_L, h(x_0)]."""
    schema = make_schema(full)
    torch.manual_seed(0)
    ranker = DCNv2(schema, dim=8, hidden=(12, 6), structure=structure, cross_layers=2, tables={"init_std": 0.5}).eval()
    batch = make_batch(schema, [3, 2, 5])
    parts = [ranker.tables.dequantize(c.name)[batch.ids[:, j]] for j, c in enumerate(schema.categorical)]
    for column in schema.sequences:
        values, offsets = batch.sequences[column.name]
        rows = ranker.tables.dequantize(column.of)[values]
        parts.append(torch.stack([part.mean(0) for part in rows.split(offsets.diff().tolist())]))
    if full:
        parts += [batch.numeric, batch.vectors["text"]]
    first = torch.cat(parts, 1)
    crossed = first
    for layer in range(2):
        crossed = first * (crossed @ ranker.cross.full[layer] + ranker.cross.bias[layer]) + crossed
    one, _, two, _, last = ranker.mlp
    hidden = crossed if structure == "stacked" else first
    for linear in (one, two):
        hidden = (hidden @ linear.weight.T + linear.bias).relu()
    expected = hidden @ last.weight[0] + last.bias
    if structure == "parallel":
        both = torch.cat([ranker.head.weight[0], last.weight[0]])
        expected = torch.cat([crossed, hidden], 1) @ both + last.bias
    assert expected.std() > 0.1
    torch.testing.assert_close(ranker(batch), expected, rtol=1e-4, atol=1e-5)


def test_dcn_v2_has_as_many_parameters_as_published():
    """Wang et al. on Frappe: 458,391 in BARS (D = 10, four full crosses, 400-400-400), 2,400 of them batch norms."""
    rows = (955, 4083, 8, 8, 3, 4, 3, 10, 81, 234)
    schema = Schema([Categorical(f"c{j}") for j in range(10)]).fit({f"c{j}": count for j, count in enumerate(rows)})
    ranker = DCNv2(schema, dim=10, hidden=(400, 400, 400), cross_layers=4)
    table = sum(rows) * 10
    assert sum(p.numel() for p in ranker.parameters()) + table == 458_391 - 2_400


def test_dcn_v2_has_the_options_of_its_cross():
    schema = make_schema(full=False)
    ranker = DCNv2(schema, dim=4, cross_layers=2, rank=3, experts=5, structure="stacked")
    assert (ranker.cross.layers, ranker.cross.rank, ranker.cross.experts, ranker.head) == (2, 3, 5, None)
    assert {ranker.config()[name] for name in ("rank", "structure")} == {3, "stacked"}
    with pytest.raises(ValueError, match="DCNv2: structure must be one of parallel, stacked, got 'serial'"):
        DCNv2(schema, structure="serial")


def test_bad_input():
    without = Schema([Categorical("user", role="user"), Categorical("item", role="item")]).fit({"user": 3, "item": 3})
    for model in (DIN, SDIM, ETA, SIM, TWIN, DARE, QIN):
        with pytest.raises(InputError, match=f"{model.__name__}: the schema has no Sequence column"):
            model(without)
    DeepFM(without)
    schema = make_schema(full=False)
    batch = dataclasses.replace(make_batch(schema, [2]), label=None)
    ranker = DeepFM(schema)
    with pytest.raises(ValueError, match="the batch has no label"):
        ranker.loss(ranker(batch), batch)


@pytest.mark.parametrize("model", [*MODELS, SIM_hard])
def test_convert(model):
    """A trained float model in 8 bits answers nearly the same, and a state of the other precision is refused."""
    schema = make_schema()
    trained = model(schema, dim=8)
    batch = make_batch(schema, [3, 0, 5], [2, 1, 4])
    for _ in range(3):
        trained.loss(trained(batch), batch).backward()
    trained.eval()
    converted = models.convert(trained, "int8", lr=0.02)
    assert not converted.training
    assert converted.config() == {**trained.config(), "precision": "int8", "tables": {"lr": 0.02}}
    assert converted.tables.lr == 0.02
    with torch.no_grad():
        torch.testing.assert_close(converted(batch), trained(batch), rtol=0.02, atol=2e-3)
    with pytest.raises((InputError, RuntimeError), match=r"'user' is int8 in the state, expected float32: .*convert"):
        trained.load_state_dict(converted.state_dict())
    trained.tables.lr, trained.tables.grad_scale = 0.125, 0.5  # as a schedule and a scaler set them
    kept = models.convert(trained, "int8").tables
    assert (kept.lr, kept.grad_scale) == (0.125, 0.5)
    with pytest.raises(InputError, match="has no option 'precision'"):
        models.convert(models.build("SimpleX", schema), "int8")
