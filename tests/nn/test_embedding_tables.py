"""The module over embedding_bag and embedding_update_."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from recfast.errors import InputError
from recfast.nn import EmbeddingTables, FrozenTables, second_pass

SPECS = [("user", 7), ("item", 30), ("city", 3)]


def make(precision="int8", dim=6, **options):
    return EmbeddingTables(SPECS, dim, precision, **{"seed": 5, "init_std": 0.1, **options})


def train(tables, steps, first=0):
    """Some steps on a loss that depends on all uses; ids and targets depend on the step alone."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        users, items = (torch.randint(0, rows, (8,), generator=generator) for rows in (7, 30))
        history = torch.randint(0, 30, (8, 4), generator=generator)
        target = torch.randn(8, generator=generator)
        user, item, past = tables.lookup([("user", users), ("item", items), ("item", history)])
        ((user * (item + past.sum(1))).sum(1) - target).square().mean().backward()


def state(tables):
    copied = tables.state_dict()
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in copied.items()}


def equal(a, b):
    same = (torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name] for name in a)
    return a.keys() == b.keys() and all(same)


PRECISIONS = ["float32", "bfloat16", "float16", "float8", "int8", "int4", "int2"]
MIXED = {"item": "int8", "city": "bfloat16"}


@pytest.mark.parametrize("precision", [*PRECISIONS, MIXED])
def test_lookups(precision):
    """Every way to look up gives the rows."""
    tables = make(precision)
    rows = [tables.dequantize(name) for name, _ in SPECS]
    ids = torch.tensor([[6, 29, 2], [0, 0, 0]])
    assert torch.equal(tables(ids), torch.stack([rows[f][ids[:, f]] for f in range(3)], 1))
    history = torch.tensor([[4, 4], [29, 0]], dtype=torch.int32)
    city, items = tables.lookup([("city", torch.tensor(2)), ("item", history)])
    assert city.shape == (6,)
    assert torch.equal(city, rows[2][2])
    assert torch.equal(items, rows[1][history.long()])
    bags = {
        "item": (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 2, 3])),
        "user": (torch.tensor([5]), torch.tensor([0, 1])),
    }
    pairs = {"sum": rows[1][1] + rows[1][2], "max": torch.maximum(rows[1][1], rows[1][2])}
    pairs["mean"] = pairs["sum"] / 2
    for mode, pair in pairs.items():
        for training in (True, False):
            pooled = tables.train(training)(bags, mode)
            torch.testing.assert_close(pooled["item"], torch.stack([pair, torch.zeros(6), rows[1][3]]))
            assert torch.equal(pooled["user"], rows[0][[5]])
    tables.train()
    weights = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    weighted = tables({"item": (*bags["item"], weights)})["item"]
    torch.testing.assert_close(weighted[0], 2 * rows[1][1] - rows[1][2])
    weighted.sum().backward()
    torch.testing.assert_close(weights.grad, rows[1][[1, 2, 3]].sum(1))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4", MIXED])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_matches_reference(precision, mode):
    """One update moves the rows as the op's reference does on each table's own ids."""
    tables = make(precision, lr=0.3, init_range=1.0, step_range="grow")
    generator = torch.Generator().manual_seed(0)
    bags = {
        "item": (torch.tensor([1, 2, 3, 1]), torch.tensor([0, 2, 2, 4])),
        "user": (torch.tensor([5]), torch.tensor([0, 1])),
    }
    before = copy.deepcopy(tables)
    pooled = tables(bags, mode)
    grads = {name: torch.randn(value.shape, generator=generator) for name, value in pooled.items()}
    sum((pooled[name] * grads[name]).sum() for name in pooled).backward()
    assert tables.counters.tolist() == [1, 0, 5]
    for name, (ids, offsets) in bags.items():
        plain = {"item": before.dequantize("item"), "user": before.dequantize("user")}[name]
        leaf = plain.clone().requires_grad_()
        out = torch.nn.functional.embedding_bag(ids, leaf, offsets, mode=mode, include_last_offset=True)
        if mode == "max":
            out = torch.where((offsets.diff() == 0)[:, None], 0.0, out)
        (out * grads[name]).sum().backward()
        rate = 0.3 / (leaf.grad.square().mean(1, keepdim=True).sqrt() + 1e-8)
        wanted = plain - torch.where(leaf.grad.abs().amax(1, keepdim=True) > 0, rate * leaf.grad, 0.0)
        kind = tables.precision(name)
        # A stochastic rounding is less than one step off.
        off = (tables.dequantize(name) - wanted).abs()
        if kind == "float32":
            assert float(off.max()) < 1e-5
        elif kind == "bfloat16":
            assert bool((off <= wanted.abs() * 2**-7 + 1e-6).all())
        else:
            assert bool((off <= tables.step_size(name)[:, None] * 1.001).all())
    assert torch.equal(tables.dequantize("city"), before.dequantize("city"))


def test_float_tables_are_plain_sgd():
    """One SGD step of the module is one of torch.optim.SGD on nn.Embedding, repeated ids summed."""
    tables = make("float32", optimizer="sgd", lr=0.1)
    weight = tables.groups[0].rows.clone().requires_grad_()
    ids = torch.tensor([[1, 3, 0], [1, 3, 2], [6, 3, 0]])
    out = tables(ids)
    wanted = torch.nn.functional.embedding(ids + torch.tensor([0, 7, 37]), weight)
    out.pow(3).sum().backward()
    wanted.pow(3).sum().backward()
    torch.testing.assert_close(tables.groups[0].rows, (weight - 0.1 * weight.grad).detach())


def test_known_values():
    tables = EmbeddingTables([("a", 2), ("b", 1)], 2, optimizer="sgd", lr=0.5, init_std=0.0)
    tables(torch.tensor([[1, 0]])).sum().backward()
    assert tables.groups[0].rows.tolist() == [[0.0, 0.0], [-0.5, -0.5], [-0.5, -0.5]]
    assert tables.updates == 1
    assert [tables.rows(name) for name in "ab"] == [2, 1]
    assert make().memory_bytes() == 40 * (4 + 8 + 4 + 4)  # step, 6 codes and padding, two moments a row
    assert make("int8", dim=64).memory_bytes() <= 1.2 * 40 * 64
    assert make("int4", dim=64).memory_bytes() == 40 * (4 + 32 + 8)
    assert make("float32").memory_bytes() == 40 * (6 * 4 + 4)
    assert make(init_range=12.7).step_size("city").tolist() == pytest.approx([0.1] * 3)
    assert not list(make().parameters())


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_no_update_without_training(precision):
    tables = make(precision)
    before = state(tables)
    ids = torch.tensor([[1, 2, 0]])
    with torch.no_grad():
        assert not tables(ids).requires_grad
    with torch.inference_mode():
        tables(ids)
    tables.eval()
    assert not tables(ids).requires_grad
    tables.train()
    tables(ids)  # a lookup whose gradient never arrives
    assert equal(state(tables), before)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int2", MIXED])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam", "rowwise_adam"])
def test_resumes_exactly(precision, optimizer):
    options = {"optimizer": optimizer, "weight_decay": 1e-3, "moment_bits": 8 if optimizer == "rowwise_adam" else 32}
    whole = make(precision, **options)
    train(whole, 3)
    whole.lr = 0.01
    train(whole, 3, first=3)

    first = make(precision, **options)
    train(first, 3)
    first.lr = 0.01
    second = make(precision, **{**options, "seed": 99})
    second.load_state_dict(state(first))
    train(second, 3, first=3)
    assert equal(state(second), state(whole))

    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    again = make(precision, **options)
    train(again, 3)
    again.lr = 0.01
    train(again, 3, first=3)
    torch.set_num_threads(threads)
    assert equal(state(again), state(whole))


def test_deepcopy_is_independent():
    tables = make()
    train(tables, 1)
    other = copy.deepcopy(tables)
    train(other, 1)
    assert other.updates == 2
    assert tables.updates == 1
    train(tables, 1)
    assert equal(state(tables), state(other))


def test_two_uses_are_two_updates():
    tables = make("float32", optimizer="sgd", lr=1.0, init_std=0.0)
    ids = torch.tensor([[0, 0, 0]])
    (tables(ids).sum() + 2 * tables(ids).sum()).backward()
    assert tables.updates == 2
    assert tables.dequantize("user")[0].tolist() == [-3.0] * 6


def test_gradcheck():
    """Gradients of what stands above the tables pass through; grad_scale undoes a scaled loss."""
    tables, scaled = (make("float32", optimizer="sgd", lr=0.1) for _ in range(2))
    scaled.grad_scale = 1 / 1024
    layer = torch.nn.Linear(6, 1)
    ids = torch.tensor([[1, 2, 0], [3, 2, 1]])
    rows = tables(ids).detach()
    layer(tables(ids)).square().sum().backward()
    got = layer.weight.grad.clone()
    layer.zero_grad()
    layer(rows).square().sum().backward()
    assert torch.equal(layer.weight.grad, got)
    (layer(scaled(ids)).square().sum() * 1024).backward()
    torch.testing.assert_close(scaled.groups[0].rows, tables.groups[0].rows, rtol=1e-6, atol=1e-7)


def test_dtype_is_kept():
    tables = make().double().half()
    assert tables.groups[0].rows.dtype == torch.uint8
    assert tables.groups[0].row_state.dtype == torch.float32
    assert tables.learning_rate.dtype == torch.float64
    assert tables(torch.tensor([[0, 0, 0]])).dtype == torch.float32


def test_of_a_schema():
    columns = [SimpleNamespace(name="user"), SimpleNamespace(name="item")]
    schema = SimpleNamespace(
        categorical=columns, sequences=[SimpleNamespace(name="history", of="item")], rows={"user": 4, "item": 9}.get
    )
    tables = EmbeddingTables(schema, 5)
    assert tables.specs == [("user", 4), ("item", 9)]
    item, past = tables.lookup([("item", torch.tensor([8])), ("history", torch.tensor([[8, 0]]))])
    assert torch.equal(item[0], past[0, 0])
    assert torch.equal(tables.dequantize("history"), tables.dequantize("item"))
    schema.sequences[0].of = "shop"
    with pytest.raises(ValueError, match="sequence 'history' shares the table of 'shop'"):
        EmbeddingTables(schema, 5)


def test_empty_requests():
    tables = make()
    assert tables.lookup([]) == []
    assert tables({}) == {}
    out = tables(torch.empty(0, 3, dtype=torch.int64))
    assert out.shape == (0, 3, 6)
    out.sum().backward()
    (past,) = tables.lookup([("item", torch.empty(4, 0, dtype=torch.int64))])
    assert past.shape == (4, 0, 6)


def test_clipped_codes_are_counted():
    tables = make(step_range="clip", step="fixed", optimizer="sgd", lr=1.0, init_std=0.01)
    (tables(torch.tensor([[0, 0, 0]])) * 100).sum().backward()
    assert tables.saturated == 18
    assert tables.codes("user")[0].tolist() == [-128] * 6


def test_learns_as_float_tables_do():
    """A factorisation of known rank: 8-bit rows reach the float rows' loss; rounded to the nearest they lag."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 4, generator=generator), torch.randn(50, 4, generator=generator)
    users, items = (torch.randint(0, n, (60, 256), generator=generator) for n in (40, 50))
    losses = {}
    for precision in ("float32", "int8"):
        tables = EmbeddingTables([("user", 40), ("item", 50)], 4, precision, lr=0.1, init_std=0.3, seed=1)
        tail = []
        for epoch in range(8):
            for user, item in zip(users, items, strict=True):
                a, b = tables.lookup([("user", user), ("item", item)])
                loss = ((a * b).sum(1) - (left[user] * right[item]).sum(1)).square().mean()
                loss.backward()
                if epoch == 7:
                    tail.append(loss.item())
        losses[precision] = sum(tail) / len(tail)
    start = float(((left[users] * right[items]).sum(-1)).square().mean())
    assert losses["float32"] < 0.02 * start
    assert losses["int8"] < losses["float32"] + 0.01 * start


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda t: t(torch.tensor([[0, 0, 0], [0, 30, 0]])), IndexError, r"item\[1\] = 30 is outside \[0, 30\)"),
        (lambda t: t(torch.tensor([[0, -1, 0]])), IndexError, r"item\[0\] = -1 is outside \[0, 30\)"),
        (lambda t: t.lookup([("city", torch.tensor([0, 3]))]), IndexError, r"city\[1\] = 3 is outside \[0, 3\)"),
        (
            lambda t: t({"user": (torch.tensor([7]), torch.tensor([0, 1]))}),
            IndexError,
            r"user\[0\] = 7 is outside \[0, 7\)",
        ),
        (
            lambda t: t({"user": (torch.tensor([1]), torch.tensor([0, 2]))}),
            ValueError,
            r"user: offsets\[-1\] must be 1",
        ),
        (lambda t: t(torch.zeros(2, 2, dtype=torch.int64)), ValueError, r"ids must have shape \[B, 3\], got \[2, 2\]"),
        (lambda t: t(torch.zeros(2, 3)), TypeError, "ids must be int32 or int64, got float32"),
        (lambda t: t.lookup([("shop", torch.tensor([0]))]), KeyError, "there is no table 'shop'"),
        (lambda t: setattr(t, "lr", -1.0), ValueError, "lr must be finite and not negative"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    with pytest.raises(error, match=f"EmbeddingTables: .*{sentence}"):
        call(make())


def test_refuses_wrong_options_and_gradients():
    with pytest.raises(ValueError, match=r"precision must be one of float32, bfloat16, .*, got 'int3'"):
        make("int3")
    with pytest.raises(ValueError, match="the name 'a' stands twice"):
        EmbeddingTables([("a", 2), ("a", 3)], 4)
    with pytest.raises(ValueError, match="table 'a' must have at least one row, got 0"):
        EmbeddingTables([("a", 0)], 4)
    with pytest.raises(ValueError, match="is float32 and has no step sizes"):
        make("float32").step_size("user")
    tables = make()
    before = state(tables)
    with pytest.raises(ValueError, match="grad must be finite, got nan"):
        (tables(torch.tensor([[0, 0, 0]])) * torch.nan).sum().backward()
    assert equal(state(tables), before)


def test_missing_ids_are_skipped():
    tables = make(skip_missing=True)
    rows = tables.dequantize("item")
    out = tables(torch.tensor([[0, -1, 2]]))
    assert torch.equal(out[0, 1], torch.zeros(6))
    bags = {"item": (torch.tensor([-1, 3, 4]), torch.tensor([0, 3]))}
    torch.testing.assert_close(tables(bags, "mean")["item"][0], (rows[3] + rows[4]) / 2)
    before = tables.dequantize("item")
    tables({"item": (torch.tensor([-1]), torch.tensor([0, 1]))})["item"].sum().backward()
    assert torch.equal(tables.dequantize("item"), before)
    with pytest.raises(IndexError, match=r"item\[0\] = -2 is outside \[0, 30\)"):
        tables(torch.tensor([[0, -2, 0]]))


@pytest.mark.parametrize("precision", ["float32", "int4", MIXED])
def test_compiles_as_one_graph(precision):
    """A model with these tables is one graph, and trains to the same bits as it does eagerly."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tables = make(precision)
            self.out = torch.nn.Linear(18, 1)

        def forward(self, ids, history):
            past = self.tables.lookup([("item", history)])[0].mean(1)
            pooled = self.tables({"city": (ids[:, 2], torch.arange(len(ids) + 1))})["city"]
            return self.out((self.tables(ids) + (past + pooled)[:, None]).flatten(1)).squeeze(1)

    results = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")):
        torch.compiler.reset()
        model = Model()
        run = wrap(model)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            ids = torch.stack([torch.randint(0, rows, (5,), generator=generator) for _, rows in SPECS], 1)
            loss = run(ids, torch.randint(0, 30, (5, 4), generator=generator)).square().sum()
            loss.backward()
        assert model.tables.updates == 9
        model.eval()
        with torch.no_grad():
            results.append((run(ids, ids[:, :1]), state(model.tables)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert equal(results[0][1], results[1][1])


def test_copies_and_their_originals_update_themselves():
    tables = make("float32")
    other = copy.deepcopy(tables)
    before = state(tables)
    other(torch.tensor([[0, 0, 0]])).sum().backward()
    assert equal(state(tables), before)
    assert other.updates == 1


@pytest.mark.parametrize("source", ["float32", "int8", MIXED])
@pytest.mark.parametrize("target", ["float32", "int8", "int4", "float16", MIXED])
def test_convert(source, target):
    tables = make(source)
    train(tables, 3)
    converted = tables.convert(target)
    assert converted.lr == tables.lr
    assert converted.updates == 3
    for name, _ in SPECS:
        mine, theirs = converted.dequantize(name), tables.dequantize(name)
        kind = converted.precision(name)
        if kind in ("float32", tables.precision(name)):
            assert torch.equal(mine, theirs)
        elif kind in ("int8", "int4"):
            assert bool(((mine - theirs).abs() <= converted.step_size(name)[:, None] * 0.50001).all())
        else:
            torch.testing.assert_close(mine, theirs, rtol=2**-8, atol=1e-7)
    train(converted, 1)
    assert converted.updates == 4


def test_from_embeddings():
    layers = {"a": torch.nn.Embedding(9, 5), "b": torch.nn.EmbeddingBag(4, 5)}
    tables = EmbeddingTables.from_embeddings(layers, "int8", lr=0.1)
    for name, layer in layers.items():
        off = (tables.dequantize(name) - layer.weight).abs()
        assert bool((off <= tables.step_size(name)[:, None] * 0.50001).all())
    exact = EmbeddingTables.from_embeddings(layers)
    ids = torch.tensor([[8, 3], [0, 0]])
    assert torch.equal(exact(ids)[:, 0], layers["a"](ids[:, 0]))
    with pytest.raises(ValueError, match="'a' has padding_idx = 0, which these tables do not have"):
        EmbeddingTables.from_embeddings({"a": torch.nn.Embedding(3, 5, padding_idx=0)})
    with pytest.raises(ValueError, match="all tables must have one width"):
        EmbeddingTables.from_embeddings({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)})


@pytest.mark.parametrize("precision", ["float32", "int2", MIXED])
@pytest.mark.parametrize("mmap", [True, False])
def test_freeze(precision, mmap, tmp_path):
    tables = make(precision)
    train(tables, 2)
    frozen = tables.freeze()
    frozen.save(tmp_path / "tables.safetensors")
    read = FrozenTables.load(tmp_path / "tables.safetensors", mmap=mmap)
    ids = torch.tensor([[6, 29, 2], [1, 0, 0]])
    assert torch.equal(read(ids), tables(ids))
    assert read.memory_bytes() == sum(group.rows.numel() * group.rows.element_size() for group in tables.groups)
    assert not read(ids).requires_grad
    halved = tables.freeze("int4")
    assert halved.precisions == dict.fromkeys(tables.precisions, "int4")
    path = tmp_path / "tables.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="is truncated or damaged"):
        FrozenTables.load(path)
    with pytest.raises(InputError, match="is missing"):
        FrozenTables.load(tmp_path / "none")


def test_refuses_another_state():
    saved = state(make("int8"))
    cases = [
        (make("int4"), r"table 'user' is int8 in the state, expected int4: .*convert\('int4'\)"),
        (make(dim=8), "table 'user' has 6 columns in the state, expected 8: a width cannot be converted"),
        (EmbeddingTables([("user", 8), *SPECS[1:]], 6, "int8"), "table 'user' has 7 rows in the state, expected 8"),
        (EmbeddingTables(SPECS[:2], 6, "int8"), "the state has a table 'city'"),
        (make(optimizer="adam"), "the state is of optimizer 'rowwise_adagrad', expected 'adam'"),
    ]
    for tables, sentence in cases:
        before = state(tables)
        with pytest.raises((InputError, RuntimeError), match=sentence):
            tables.load_state_dict(saved)
        assert equal(state(tables), before)


@pytest.mark.parametrize("precision", ["int8", "int2", MIXED])
def test_two_passes(precision):
    """The first pass moves the rows (to the nearest codes, old steps), the second learns the steps and rounds."""
    tables = make(precision, passes=2, lr=0.3, step_range="clip", init_range=0.5)
    ids = torch.tensor([[1, 2, 0], [1, 3, 2]])
    steps, before = tables.step_size("item"), tables.dequantize("item")
    target = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    (tables(ids) * target).sum().backward()
    assert torch.equal(tables.step_size("item"), steps)
    assert not torch.equal(tables.dequantize("item")[2], before[2])
    with second_pass(tables):
        (tables(ids) * target).sum().backward()
    changed = (tables.step_size("item") != steps).nonzero().flatten().tolist()
    assert changed == [2, 3]
    assert torch.equal(tables.dequantize("item")[4:], before[4:])
    tables(ids).sum().backward()
    with pytest.raises(RuntimeError, match="passes=2 takes one lookup a step"):
        tables(ids).sum().backward()
    tables(ids).sum().backward()
    with pytest.raises(RuntimeError, match="did not come to every lookup"), second_pass(tables):
        pass


def test_second_pass_leaves_other_tables_alone():
    two, one = make(passes=2), make()
    model = torch.nn.ModuleList([two, one])
    ids = torch.tensor([[1, 2, 0]])
    (two(ids) + one(ids)).sum().backward()
    before = state(one)
    with second_pass(model):
        (two(ids) + one(ids)).sum().backward()
    assert equal(state(one), before)
    assert two.updates == 1  # a step in two passes is one update


@pytest.mark.parametrize("precision", ["float32", "int4", MIXED])
def test_saved_and_loaded_training_goes_on_exactly(precision, tmp_path):
    whole = make(precision, optimizer="rowwise_adam", moment_bits=8)
    train(whole, 3)
    whole.save(tmp_path / "tables.safetensors")
    read = EmbeddingTables.load(tmp_path / "tables.safetensors")
    assert read.options() == whole.options()
    for tables in (whole, read):
        train(tables, 2, first=3)
    assert equal(state(read), state(whole))
    with pytest.raises(InputError, match=r"holds EmbeddingTables, expected FrozenTables"):
        FrozenTables.load(tmp_path / "tables.safetensors")


def test_a_list_of_embeddings():
    tables = make("float32", optimizer="sgd", lr=1.0)
    assert len(tables) == 3
    assert [(view.name, view.num_embeddings) for view in tables] == SPECS
    ids = torch.tensor([[0, 2], [2, 1]])
    out = tables["city"](ids)
    assert torch.equal(out, tables[2].weight[ids])
    before = tables[2].weight
    out.sum().backward()
    torch.testing.assert_close(before - tables["city"].weight, torch.tensor([1.0, 1.0, 2.0])[:, None].expand(3, 6))
    with pytest.raises(KeyError, match="there is no table 'shop'"):
        tables["shop"](ids)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("step_optimizer", ["sgd", "adagrad", "adam"])
def test_one_step_for_a_table(passes, step_optimizer):
    """All rows of a table keep one step, learned from all of the batch; each table has its own."""
    options = {"step_per": "table", "step_range": "clip", "passes": passes, "step_optimizer": step_optimizer}
    tables = make("int4", init_range=0.4, lr=0.2, **options)
    ids = torch.tensor([[1, 2, 0], [1, 3, 2]])
    target = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    start, before = tables.step_size("item")[0], tables.dequantize("item")
    for _ in range(3):
        (tables(ids) * target).sum().backward()
        if passes == 2:
            with second_pass(tables):
                (tables(ids) * target).sum().backward()
    steps = [tables.step_size(name) for name, _ in SPECS]
    assert all(float(each.min()) == float(each.max()) for each in steps)
    assert len({float(each[0]) for each in (*steps, start[None])}) == 4
    # Rows outside the batch stand for what they stood for, but for a rounding in each update.
    assert float((tables.dequantize("item")[4:] - before[4:]).abs().max()) <= 3.01 * float(steps[1][0])
    other = make("int4", init_range=0.4, lr=0.2, **options)
    other.load_state_dict(state(tables))
    for each in (tables, other):
        (each(ids) * target).sum().backward()
    assert equal(state(tables), state(other))
    with pytest.raises(ValueError, match="step_per='table' goes with step_range='clip', got 'grow'"):
        make("int4", step_per="table", step_range="grow")


@pytest.mark.parametrize("step_per", ["row", "table"])
def test_two_passes_count_as_one_update(step_per):
    # Adam's correction goes by that number: on one gradient both forms are the same.
    options = {"step_optimizer": "adam", "optimizer": "adam", "step_range": "clip", "rounding": "nearest"}
    one, two = (make(passes=passes, step_per=step_per, **options) for passes in (1, 2))
    ids, grad = torch.tensor([[1, 2, 0], [1, 3, 2]]), torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    for number in range(1, 4):
        (one(ids) * grad).sum().backward()
        (two(ids) * grad).sum().backward()
        with second_pass(two):
            (two(ids) * grad).sum().backward()
        assert two.updates == number
    assert equal(state(one), state(two))


def test_second_pass_refuses_other_ids():
    tables = make(passes=2)
    for ids in ([[2, 2, 0]], [[1, 2, 1]]):
        tables(torch.tensor([[1, 2, 0]])).sum().backward()
        with pytest.raises(RuntimeError, match="another lookup than the first"), second_pass(tables):
            tables(torch.tensor(ids)).sum().backward()
    tables.lookup([("user", torch.tensor([1]))])[0].sum().backward()
    with pytest.raises(RuntimeError, match="another lookup than the first"), second_pass(tables):
        tables.lookup([("city", torch.tensor([1]))])[0].sum().backward()


def test_second_pass_that_failed_is_forgotten():
    tables = make(passes=2)
    tables(torch.tensor([[1, 2, 0]])).sum().backward()
    with pytest.raises(KeyError), second_pass(tables):
        raise KeyError
    tables(torch.tensor([[1, 2, 0]])).sum().backward()
    with second_pass(tables):
        tables(torch.tensor([[1, 2, 0]])).sum().backward()
    assert tables.updates == 1


def test_a_refused_gradient_writes_no_group():
    tables = make(MIXED)
    before = state(tables)
    for place in range(3):
        grad = torch.ones(1, 3, 6)
        grad[0, place, 2] = float("nan")
        with pytest.raises(ValueError, match=f"must be finite, got nan at flat position {6 * place + 2}; nothing was"):
            tables(torch.tensor([[1, 2, 0]])).backward(grad)
        assert equal(state(tables), before)


@pytest.mark.parametrize("change", ["missing", "unexpected", "dtype", "counters"])
def test_a_refused_state_writes_nothing(change):
    tables, other = make(), make(seed=6)
    train(other, 1)
    given = state(other)
    if change == "missing":
        del given["city.rows"]
    elif change == "unexpected":
        given["town.rows"] = torch.zeros(3)
    elif change == "dtype":
        given["city.rows"] = given["city.rows"].float()
    else:
        given["counters"] = torch.zeros(4, dtype=torch.int64)
    before = state(tables)
    with pytest.raises(RuntimeError, match=r"city\.rows|town\.rows|counters"):
        tables.load_state_dict(given)
    assert equal(state(tables), before)


@pytest.mark.parametrize("name", ["groups", "groups.0", "counters", "_extra_state", "a.b", ""])
def test_any_name_will_do(name, tmp_path):
    tables, other = (EmbeddingTables([(name, 3), ("city", 4)], 5, seed=seed) for seed in (0, 1))
    other.load_state_dict(tables.state_dict())
    nested = torch.nn.Sequential(EmbeddingTables([(name, 3), ("city", 4)], 5, seed=2))
    nested.load_state_dict(torch.nn.Sequential(tables).state_dict())
    tables.save(tmp_path / "tables.safetensors")
    for copied in (other, nested[0], EmbeddingTables.load(tmp_path / "tables.safetensors")):
        assert equal(state(copied), state(tables))


def edit(path, change):
    """Change what the header of a file says."""
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
        facts = json.loads(handle.metadata()["recfast.tables"])
    text = change if isinstance(change, str) else json.dumps(change(facts))
    save_file(tensors, path, metadata={"recfast.tables": text})


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[1]",
        lambda facts: {k: v for k, v in facts.items() if k not in ("layout", "dim")},
        lambda facts: facts | {"aliases": [1]},
        lambda facts: facts | {"tables": 3},
        lambda facts: (
            facts | {"tables": [["user", 2**60, "int8"] if len(t) == 3 else ["user", 2**60] for t in facts["tables"]]}
        ),
        lambda facts: facts | {"dim": "6", "options": {"zz": 1}},
        lambda facts: facts | {"dim": [6], "options": facts.get("options", {}) | {"optimizer": "zz"}},
        lambda facts: facts | {"dim": None, "options": facts.get("options", {}) | {"betas": 3}},
    ],
)
@pytest.mark.parametrize("kind", [EmbeddingTables, FrozenTables])
def test_an_edited_header_is_refused(kind, change, tmp_path):
    path = tmp_path / "tables.safetensors"
    tables = EmbeddingTables([("user", 7)], 6, "int8")
    (tables if kind is EmbeddingTables else tables.freeze()).save(path)
    edit(path, change)
    with pytest.raises(InputError, match="damaged"):
        kind.load(path)


def test_rows_with_steps_are_aligned_in_memory(tmp_path):
    frozen = EmbeddingTables([("user", 3), ("item", 5)], 3, {"user": "float16", "item": "int8"}).freeze()
    frozen.save(tmp_path / "tables.safetensors")
    loaded = FrozenTables.load(tmp_path / "tables.safetensors")
    assert all(group.rows.data_ptr() % 4 == 0 for group in loaded.groups if group.bits)
    assert torch.equal(loaded(torch.tensor([[2, 4]])), frozen(torch.tensor([[2, 4]])))


@pytest.mark.parametrize("options", [{}, {"step_per": "table", "step_range": "clip"}, {"optimizer": "adam"}])
def test_convert_to_the_same_precision_goes_on_exactly(options):
    tables = make(**options)
    tables.grad_scale = 0.5
    train(tables, 3)
    converted = tables.convert("int8")
    assert converted.grad_scale == 0.5
    for each in (tables, converted):
        train(each, 2, first=3)
    assert equal(state(converted), state(tables))
    assert not tables.eval().convert("int8").training


def test_convert_tells_states_of_one_form_apart():
    # One float a row both times: of the step sizes before, of the rows after.
    tables = make(optimizer="sgd")
    train(tables, 2)
    assert not tables.convert("int8", optimizer="rowwise_adagrad", step="fixed").state_dict()["user.row_state"].any()


@pytest.mark.parametrize("kind", [EmbeddingTables, FrozenTables])
def test_a_flipped_bit_is_told(kind, tmp_path):
    path = tmp_path / "tables.safetensors"
    tables = make("int8")
    (tables if kind is EmbeddingTables else tables.freeze()).save(path)
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)
    with pytest.raises(InputError, match=f"{kind.__name__}: .* is damaged, expected the checksum"):
        kind.load(path, **({} if kind is EmbeddingTables else {"verify": True}))


@pytest.mark.parametrize("damage", ["tables", "dim", "optimizer", "rows"])
def test_state_that_says_too_little_is_refused(damage):
    tables = make()
    state = tables.state_dict()
    extra = copy.deepcopy(state["_extra_state"])
    if damage == "rows":
        del next(iter(extra["tables"].values()))["rows"]
    else:
        extra[damage] = None
    before = {name: x.clone() for name, x in state.items() if isinstance(x, torch.Tensor)}
    with pytest.raises((InputError, RuntimeError), match="the state says nothing, or something of another kind, of"):
        tables.load_state_dict({**{name: torch.zeros_like(x) for name, x in before.items()}, "_extra_state": extra})
    for name, x in tables.state_dict().items():
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, before[name], rtol=0, atol=0)
