"""The module over embedding_bag and embedding_update_."""

import copy
from types import SimpleNamespace

import pytest
import torch

from recfast import ops
from recfast.nn import EmbeddingTables

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
    return {name: value.clone() for name, value in tables.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_matches_reference(precision):
    """Every way to look up gives the rows; one update equals the op's reference on the concatenated ids."""
    tables = make(precision, lr=0.3)
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
    pooled = tables(bags)
    torch.testing.assert_close(pooled["item"], torch.stack([rows[1][1] + rows[1][2], torch.zeros(6), rows[1][3]]))
    assert torch.equal(pooled["user"], rows[0][[5]])

    wanted = copy.deepcopy(tables)
    grads = {name: torch.randn(value.shape) for name, value in pooled.items()}
    sum((pooled[name] * grads[name]).sum() for name in pooled).backward()
    ops.embedding_update_.reference(
        wanted.table, torch.tensor([8, 9, 10, 5]), torch.tensor([0, 2, 2, 3, 4]),
        torch.cat([grads["item"], grads["user"]]), ops.UpdateState(wanted.moment, wanted.step_moment),
        optimizer="rowwise_adagrad", lr=0.3, step_range="grow", seed=5,
        step_lr=wanted.step_lr * wanted.initial_step if precision == "int8" else None,
    )  # fmt: skip
    for name, value in wanted.state_dict().items():
        if name == "counters":
            assert tables.counters.tolist() == [1, 0, 5]
        elif name == "codes":
            assert int((tables.codes.int() - value.int()).abs().max()) <= 1
        else:
            torch.testing.assert_close(tables.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(tables.dequantize("item")[1], rows[1][1])
    assert torch.equal(tables.dequantize("item")[3:][4], rows[1][7])


def test_float_tables_are_plain_sgd():
    """One SGD step of the module is one of torch.optim.SGD on nn.Embedding, repeated ids summed."""
    tables = make("float32", optimizer="sgd", lr=0.1)
    weight = tables.weight.clone().requires_grad_()
    ids = torch.tensor([[1, 3, 0], [1, 3, 2], [6, 3, 0]])
    out = tables(ids)
    wanted = torch.nn.functional.embedding(ids + torch.tensor([0, 7, 37]), weight)
    out.pow(3).sum().backward()
    wanted.pow(3).sum().backward()
    torch.testing.assert_close(tables.weight, (weight - 0.1 * weight.grad).detach())


def test_known_values():
    tables = EmbeddingTables([("a", 2), ("b", 1)], 2, optimizer="sgd", lr=0.5, init_std=0.0)
    tables(torch.tensor([[1, 0]])).sum().backward()
    assert tables.weight.tolist() == [[0.0, 0.0], [-0.5, -0.5], [-0.5, -0.5]]
    assert tables.updates == 1
    assert [tables.rows(name) for name in "ab"] == [2, 1]
    assert make().memory_bytes() == 40 * (6 + 4 + 4 + 4)
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


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad"])
def test_resumes_exactly(precision, optimizer):
    options = {"optimizer": optimizer, "weight_decay": 1e-3}
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
    assert tables.weight[0].tolist() == [-3.0] * 6


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
    torch.testing.assert_close(scaled.weight, tables.weight, rtol=1e-6, atol=1e-7)


def test_dtype_is_kept():
    tables = make().double().half()
    assert tables.codes.dtype == torch.int8
    assert tables.steps.dtype == torch.float32
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
    assert tables.codes[0].tolist() == [-128] * 6


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
    with pytest.raises(ValueError, match="precision must be one of float32, int8, got 'int3'"):
        make("int3")
    with pytest.raises(ValueError, match="the name 'a' stands twice"):
        EmbeddingTables([("a", 2), ("a", 3)], 4)
    with pytest.raises(ValueError, match="table 'a' must have at least one row, got 0"):
        EmbeddingTables([("a", 0)], 4)
    with pytest.raises(ValueError, match="have no step sizes"):
        make("float32").step_size("user")
    tables = make()
    before = state(tables)
    with pytest.raises(ValueError, match="grad must be finite, got nan"):
        (tables(torch.tensor([[0, 0, 0]])) * torch.nan).sum().backward()
    assert equal(state(tables), before)
