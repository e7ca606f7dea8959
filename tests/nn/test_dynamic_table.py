"""The table without a vocabulary: who gets a row, what is trained, what is forgotten, what is saved."""

import copy
import doctest
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from recfast import ops
from recfast.errors import InputError
from recfast.models.storage import read_tensors, restore_state, split_state, write_tensors
from recfast.nn import DynamicTable, EmbeddingTables
from recfast.nn.dynamic_table import PRECISIONS
from recfast.ops.embedding_update import OPTIMIZERS

EXTREMES = [0, -1, 2**63 - 1, -(2**63)]


def tensor(ids):
    return torch.tensor(ids, dtype=torch.int64)


def make(precision="float32", dim=5, **options):
    return DynamicTable(dim, precision, **{"seed": 5, "init_std": 0.1, "capacity": 2, **options})


def train(table, steps, first=0, ids=60):
    """Some steps on ids that drift, in two forms of lookup; ids and targets depend on the step alone."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        items = torch.randint(3 * step, 3 * step + ids, (16,), generator=generator) << 40
        bags = torch.randint(3 * step, 3 * step + ids, (30,), generator=generator) << 40
        offsets = torch.tensor([0, 2, 2, *range(4, 29, 2), 30])
        target = torch.randn(16, generator=generator)
        ((table(items) * table(bags, offsets, mode="mean")).sum(1) - target).square().mean().backward()


def state(table):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in table.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_embedding_tables_do(precision, optimizer):
    """On ids 0 .. 29, rows set equal: the same gradients give the same bits as nn.EmbeddingTables."""
    options = {"optimizer": optimizer, "lr": 0.3, "weight_decay": 1e-3, "rounding": "nearest"}
    if optimizer == "rowwise_adam":
        options["moment_bits"] = 8
    static = EmbeddingTables([("id", 30)], 5, precision, **{"seed": 5, "init_std": 0.1, **options})
    table = make(precision, **options)
    table(torch.arange(30))
    rows = table.rows_of(torch.arange(30))
    for name, own in table._rows.tensors.items():
        getattr(static.groups[0], name).copy_(own[rows])
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids, offsets = torch.randint(0, 30, (40,), generator=generator), torch.tensor([0, 7, 7, 30, 40])
        target = torch.randn(4, 5, generator=generator)
        for out in (table(ids, offsets), static({"id": (ids, offsets)})["id"]):
            (out - target).square().sum().backward()
        assert torch.equal(table.dequantize(torch.arange(30)), static.dequantize("id"))
    assert table.updates == static.updates == 5


def test_float_rows_are_plain_sgd():
    """Bags of known and unknown ids against torch.nn.functional.embedding_bag with a row of zeros for the unknown."""
    for mode in ("sum", "mean"):
        table = make(optimizer="sgd", lr=0.1, min_count=2)
        ids = tensor([*EXTREMES, 7, 8])
        table(ids[:5].repeat(2))
        weight = torch.cat([table.dequantize(ids[:5]), torch.zeros(1, 5)]).requires_grad_()
        places, offsets = torch.tensor([0, 5, 1, 1, 2, 3, 4, 5, 0]), torch.tensor([0, 3, 3, 8, 9])
        dense = torch.nn.functional.embedding_bag(places, weight, offsets, mode=mode, include_last_offset=True)
        table.eval()
        torch.testing.assert_close(table(ids[places], offsets, mode=mode), dense)
        table.train()
        known = places != 5
        cuts = torch.cat([torch.zeros(1, dtype=torch.int64), known.cumsum(0)])[offsets]
        out = table(ids[places[known]], cuts, mode=mode)
        wanted = torch.nn.functional.embedding_bag(places[known], weight, cuts, mode=mode, include_last_offset=True)
        for answer in (out, wanted):
            answer.pow(3).sum().backward()
        torch.testing.assert_close(table.dequantize(ids[:5]), (weight - 0.1 * weight.grad).detach()[:5])


def test_default_row():
    """Ids below min_count read zeros for ever, or one row that all of them train."""
    for default in ("zeros", "trained"):
        table = make(optimizer="sgd", lr=0.5, min_count=3, default=default)
        out = table(tensor([4, 5, 4]))
        assert not out.any()
        out.sum().backward()
        moved = -1.5 if default == "trained" else 0.0
        assert table.dequantize(tensor([4, 5, 77])).tolist() == [[moved] * 5] * 3
        assert (len(table), table.waiting) == (0, 2)
        first = table(tensor([4, 5]))
        assert torch.equal(first[0], ops.initial_rows(tensor([4]), 5, std=0.1, seed=5)[0])
        assert first[1].tolist() == [moved] * 5
        assert (table.rows_of(tensor([4, 5, 77])) >= 0).tolist() == [True, False, False]
        assert table.counts(tensor([4, 5, 77])).tolist() == [3, 2, 0]


def test_admitted_within_a_batch():
    """The third occurrence admits, and all places of that batch read the row and train it."""
    table = make(optimizer="sgd", lr=1.0, min_count=3)
    table(tensor([9]))
    assert len(table) == 0
    ids = tensor([[9, 1], [9, 9]])
    out = table(ids)
    row = ops.initial_rows(tensor([9]), 5, std=0.1, seed=5)[0]
    assert torch.equal(out, torch.stack([torch.stack([row, 0 * row]), torch.stack([row, row])]))
    out.sum().backward()
    torch.testing.assert_close(table.dequantize(tensor([9]))[0], row - 3)
    assert table.ids().tolist() == [9]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_new_rows_depend_on_seed_and_id_alone(precision):
    ids = tensor([*EXTREMES, *range(100, 200)])
    a, b = make(precision), make(precision, capacity=500)
    a(ids)
    for part in ids.flip(0).split(7):
        b(part)
    assert torch.equal(a.dequantize(ids), b.dequantize(ids))
    assert not torch.equal(a.rows_of(ids), b.rows_of(ids))
    drawn = ops.initial_rows(ids, 5, std=0.1, seed=5)
    step = a._rows.initial_step
    bound = {
        "float32": 0 * drawn,
        "bfloat16": 2**-8 * drawn.abs(),
        "float16": 2**-11 * drawn.abs() + 2**-25,
        "float8": 2**-4 * drawn.abs() + 2**-10 * step,
    }.get(precision, torch.tensor(step))
    assert ((a.dequantize(ids) - drawn).abs() <= bound * 1.001).all()
    assert not torch.equal(make(precision, seed=6)(ids), a(ids))


@pytest.mark.parametrize("precision", ["int8", "int4", "int2"])
def test_new_rows_of_few_bits_keep_their_mean(precision):
    """Rounded by draws of their ids: 64,000 weights have the mean of floats, the large ones among them too."""
    ids = torch.arange(4000)
    table = make(precision, dim=16)
    table(ids)
    drawn = ops.initial_rows(ids, 16, std=0.1, seed=5)
    off = (table.dequantize(ids) - drawn).double()
    step = table._rows.initial_step
    assert float(off.abs().max()) <= step * 1.001
    for part in (off, off[drawn > 0.15]):
        assert abs(float(part.mean())) < 5 * step / 2 / part.numel() ** 0.5
    nearest = make(precision, dim=16, rounding="nearest")
    nearest(ids)
    assert float((nearest.dequantize(ids) - drawn).abs().max()) <= step / 2 * 1.001


@pytest.mark.parametrize("precision", PRECISIONS)
def test_freed_rows_start_anew(precision):
    """A row that changes hands brings nothing along: value, step size and moments are those of a new one."""
    table = make(precision, optimizer="adagrad", lr=0.3, expire_after=2, expire_every=1)
    fresh = make(precision, optimizer="adagrad", lr=0.3)
    for _ in range(3):
        (table(tensor([1, 2])) * 9).sum().backward()
    for _ in range(3):
        table(tensor([2])).sum().backward()
    row = table.rows_of(tensor([2]))
    old = int(table._map.next_row)
    table(tensor([2, 77]))
    fresh(tensor([77]))
    assert table.rows_of(tensor([1])).tolist() == [-1]
    assert torch.equal(table.rows_of(tensor([2])), row)
    assert int(table._map.next_row) == old  # 77 has the row of 1
    for name, own in table._rows.tensors.items():
        assert torch.equal(own[table.rows_of(tensor([77]))], fresh._rows.tensors[name][fresh.rows_of(tensor([77]))])
    assert table.counts(tensor([1])).tolist() == [0]


def test_expires_after_the_updates_it_says():
    """Seen in update 1: there through update 1 + n, gone at the next search; a lookup in eval is no sign of life."""
    for after in (1, 3):
        table = make(expire_after=after, expire_every=1)
        table(tensor([1])).sum().backward()
        for _ in range(after):
            assert table.rows_of(tensor([1])).tolist() != [-1]
            table.eval()(tensor([1]))
            table.train()(tensor([2])).sum().backward()
        table(tensor([2]))
        assert table.rows_of(tensor([1])).tolist() == [-1]
    table = make()
    table(tensor([1, 2])).sum().backward()
    table(tensor([2])).sum().backward()
    assert table.expire(older_than=5) == 0
    assert table.expire(older_than=1) == 1
    assert table.ids().tolist() == [2]
    with pytest.raises(ValueError, match="expire needs older_than, since the table has no expire_after"):
        table.expire()


def test_expiry_between_forward_and_backward():
    """Rows of others may go; a row that waits for its gradient may not change hands unnoticed."""
    table = make(optimizer="sgd", lr=1.0)
    table(tensor([1, 2])).sum().backward()
    pending = table(tensor([2]))
    for _ in range(2):
        table(tensor([3])).sum().backward()
    before = table.dequantize(tensor([2]))
    table.expire(older_than=2)
    assert table.rows_of(tensor([1, 2])).tolist()[0] == -1
    pending.sum().backward()
    torch.testing.assert_close(table.dequantize(tensor([2])), before - 1)
    pending = table(tensor([2]))
    table(tensor([3])).sum().backward()
    table(tensor([3])).sum().backward()
    table.expire(older_than=1)
    held = state(table)
    with pytest.raises(ValueError, match="id 2 lost its row between a forward pass and its backward"):
        pending.sum().backward()
    assert equal(state(table), held)


def test_searches_as_often_as_it_says():
    """expire_every=3: what is due goes at the forward passes after 3, 6, ... updates, the state says when that was."""
    table = make(expire_after=1, expire_every=3)
    sizes = []
    for step in range(8):
        table(tensor([step])).sum().backward()
        sizes.append(len(table))
    assert sizes == [1, 2, 3, 2, 3, 4, 2, 3]
    other = make(expire_after=1, expire_every=3)
    other.load_state_dict(state(table))
    for step in range(8, 11):
        for each in (table, other):
            each(tensor([step])).sum().backward()
        assert len(other) == len(table) == {8: 4, 9: 2, 10: 3}[step]


def test_loading_between_forward_and_backward():
    table, other = make(optimizer="sgd"), make(optimizer="sgd")
    other(tensor([8, 9]))
    pending = table(tensor([9]))
    table.load_state_dict(state(other))
    with pytest.raises(ValueError, match="id 9 lost its row between"):
        pending.sum().backward()
    assert equal(state(table), state(other))


def test_memory_is_bounded_while_ids_drift():
    """150 batches of 200 new ids each, 30,000 in all: rows and slots stay those of the last few batches."""
    table = DynamicTable(4, expire_after=4, capacity=16)
    sizes = []
    for step in range(150):
        table(torch.arange(200 * step, 200 * step + 200) * 2**33).sum().backward()
        sizes.append((len(table), table._map.next_row, len(table._rows), table.memory_bytes()))
    assert max(size[0] for size in sizes) <= 7 * 200
    assert max(size[1] for size in sizes) <= 7 * 200 + 1
    assert len({size[2] for size in sizes[10:]}) == 1
    assert max(size[3] for size in sizes[10:]) == max(size[3] for size in sizes[10:30])


def test_capacity_doubles():
    table = make(capacity=1)
    sizes = set()
    for step in range(300):
        table(tensor([step]))
        sizes.add(len(table._rows))
    assert len(table) == 300
    assert sizes == {2, 4, 8, 16, 32, 64, 128, 256, 512}
    assert all(len(tensor) == 512 for tensor in table._rows.tensors.values())
    wanted = ops.initial_rows(torch.arange(300), 5, std=0.1, seed=5)
    assert torch.equal(table.dequantize(torch.arange(300)), wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_written_without_training(precision):
    table = make(precision, min_count=2)
    train(table, 2)
    before = state(table)
    ids = tensor([5, 1 << 40, -3])
    with torch.no_grad():
        assert not table(ids).requires_grad
    with torch.inference_mode():
        table(ids)
    table.eval()
    out = table(ids, torch.tensor([0, 3]))
    assert not out.requires_grad
    assert torch.equal(out[0], table.dequantize(ids).sum(0))
    assert equal(state(table), before)
    table.train()
    table(tensor([1 << 40]))  # a lookup whose gradient never arrives counts, and trains nothing
    after = state(table)
    assert {name for name in before if not equal({0: before[name]}, {0: after[name]})} <= {
        "map.counts",
        "map.last_seen",
        "map.rows",
        "rows",
        "row_state",
    }
    assert table.updates == 4


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumes_exactly(precision, optimizer, tmp_path):
    """Half of the training, a file, and a module of other sizes that goes on: the bits of the whole training."""
    options = {"optimizer": optimizer, "weight_decay": 1e-3, "min_count": 2, "expire_after": 3, "default": "trained"}
    whole = make(precision, **options)
    train(whole, 9)
    whole.lr = 0.01
    train(whole, 9, first=9)

    first = make(precision, **options)
    train(first, 9)
    first.lr = 0.01
    path = tmp_path / "table.safetensors"
    tensors, extra = split_state(first)
    save_file(tensors, path)
    second = make(precision, **{**options, "seed": 99, "capacity": 300})
    second(torch.arange(1000, 1200).repeat(2))  # what it held before is forgotten
    second.load_state_dict({**load_file(path), **extra})
    assert equal(state(second), state(first))
    train(second, 9, first=9)
    assert equal(state(second), state(whole))

    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    again = make(precision, **options)
    train(again, 9)
    again.lr = 0.01
    train(again, 9, first=9)
    torch.set_num_threads(threads)
    assert equal(state(again), state(whole))
    assert len(whole) > 10
    assert whole._freed > 10


def test_in_a_saved_model(tmp_path):
    """Inside a model, through the files of `recfast.models`: another number of rows fits, another width does not."""

    class Model(torch.nn.Module):
        def __init__(self, dim=5):
            super().__init__()
            self.table, self.head = make(dim=dim), torch.nn.Linear(dim, 1)

    model, other = Model(), Model()
    train(model.table, 3)
    tensors, extra = split_state(model)
    write_tensors(tmp_path / "m.safetensors", tensors, {"extra": extra})
    tensors, metadata = read_tensors(tmp_path / "m.safetensors")
    restore_state(other, tensors, metadata["extra"], tmp_path)
    assert equal(state(other), state(model))
    with pytest.raises(InputError, match="does not fit: DynamicTable: the state has dim = 5, expected 6"):
        restore_state(Model(6), tensors, metadata["extra"], tmp_path)
    for name, wrong, sentence in (
        ("head.weight", torch.zeros(2, 5), r"has the shape \[2, 5\], expected \[1, 5\]"),
        ("table.row_state", torch.zeros(7, 3), r"has the shape \[7, 3\], expected \[7, 1\]"),
    ):
        with pytest.raises(InputError, match=f"does not fit: '{name}' {sentence}"):
            restore_state(Model(), {**tensors, name: wrong}, metadata["extra"], tmp_path)


def test_states_of_other_rows_are_refused():
    table = make("int8")
    train(table, 1)
    good = state(table)
    for options, sentence in (
        ({"dim": 6}, "the state has dim = 5, expected 6"),
        ({"precision": "float32"}, "the state has precision = 'int8', expected 'float32'"),
        ({"optimizer": "sgd"}, "the state has optimizer = 'rowwise_adagrad', expected 'sgd'"),
        ({"step": "fixed"}, "the state has step = 'learned', expected 'fixed'"),
        ({"step_optimizer": "adam"}, "the state has step_optimizer = 'adagrad', expected 'adam'"),
        ({"default": "trained"}, "the state has default = 'zeros', expected 'trained'"),
    ):
        other = make(**{"precision": "int8", **options})
        before = state(other)
        with pytest.raises(InputError, match=f"^DynamicTable: {sentence}$"):
            other.load_state_dict(good)
        assert equal(state(other), before)
    other = make("int8")
    before = state(other)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: value for name, value in good.items() if name != "row_state"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**good, "extra": torch.zeros(1)})
    with pytest.raises(InputError, match="the state is of another module"):
        other.load_state_dict({**good, "_extra_state": None})
    with pytest.raises(ValueError, match="lr must be finite and not negative, got nan"):
        other.load_state_dict({**good, "learning_rate": torch.tensor(torch.nan)})
    with pytest.raises(InputError, match="rows must differ"):
        other.load_state_dict({**good, "map.rows": torch.ones_like(good["map.rows"])})
    short = {name: value[:3] if name in ("rows", "row_state") else value for name, value in good.items()}
    with pytest.raises(InputError, match=r"rows must be -1 or in \[1, next_row = 3\)"):
        other.load_state_dict(short)
    assert equal(state(other), before)


def test_state_is_a_copy():
    table = make()
    train(table, 2)
    taken = table.state_dict()
    held = state(table)
    train(table, 2, first=2)
    assert equal(dict(taken), held)
    other = copy.deepcopy(table)
    train(other, 1, first=4)
    assert (other.updates, table.updates) == (10, 8)
    train(table, 1, first=4)
    assert equal(state(table), state(other))


def test_max_rows():
    table = make(max_rows=2)
    rows = table(tensor([1, 2, 3]))
    assert (len(table), table.waiting) == (2, 1)
    assert not rows[2].any()
    assert rows[:2].any(1).all()
    table = make(max_rows=2, full="error")
    table(tensor([1]))
    before = state(table)
    with pytest.raises(InputError, match="2 ids of the batch would get a row, and 1 rows are left"):
        table(tensor([1, 2, 3]))
    assert equal(state(table), before)


@given(
    batches=st.lists(st.lists(st.sampled_from([*EXTREMES, 5, 6, 1 << 32]), max_size=12), max_size=8),
    min_count=st.integers(1, 3),
    after=st.sampled_from([None, 1, 2]),
)
def test_against_a_dict(batches, min_count, after):
    """Plain SGD on a dict of rows, with counts and ages kept by hand."""
    table = make(dim=3, optimizer="sgd", lr=0.5, min_count=min_count, expire_after=after, expire_every=1)
    rows, counts, seen = {}, {}, {}
    for now, ids in enumerate(batches):
        for id_ in [] if after is None else [id_ for id_ in counts if seen[id_] < now - after]:
            del counts[id_]
            rows.pop(id_, None)
        for id_ in ids:
            counts[id_], seen[id_] = counts.get(id_, 0) + 1, now
            if counts[id_] == min_count:
                rows[id_] = ops.initial_rows(tensor([id_]), 3, std=0.1, seed=5)[0]
        out = table(tensor(ids))
        zeros = torch.zeros(3)
        torch.testing.assert_close(out, torch.stack([rows.get(i, zeros) for i in ids]) if ids else torch.zeros(0, 3))
        scale = torch.arange(1.0, len(ids) + 1)
        (out.sum(1) * scale).sum().backward()
        for id_, factor in zip(ids, scale.tolist(), strict=True):
            if id_ in rows:
                rows[id_] = rows[id_] - 0.5 * factor
    assert table.ids().tolist() == sorted(rows)
    assert table.updates == len(batches)
    if rows:
        torch.testing.assert_close(table.dequantize(table.ids()), torch.stack([rows[i] for i in sorted(rows)]))


def test_memory_bytes():
    table = DynamicTable(16, "int8", capacity=1023)
    assert table.memory_bytes() == 1024 * (16 + 4 + 4 + 4) + 16 * 20  # codes, step, two moments; 16 slots
    assert DynamicTable(16, "int2", capacity=1023, optimizer="sgd", step="fixed").memory_bytes() == 1024 * 8 + 16 * 20
    assert DynamicTable(16, "bfloat16", capacity=1023, optimizer="sgd").memory_bytes() == 1024 * 32 + 16 * 20
    assert DynamicTable(16, capacity=1023, optimizer="sgd").memory_bytes() == 1024 * 64 + 16 * 20
    assert not list(table.parameters())
    assert "0 ids, dim=16, precision=int8" in repr(table)
    assert table  # an empty table is a module all the same


@pytest.mark.parametrize("precision", PRECISIONS)
def test_learns(precision):
    """Ids that are hashes, half of them new in the second half: the loss falls for old and new ones."""
    generator = torch.Generator().manual_seed(0)
    truth = {}
    # The rows outgrow what they begin with.
    table = DynamicTable(4, precision, lr=0.3, init_std=0.3, optimizer="rowwise_adagrad", step_range="grow")
    losses = []
    for step in range(300):
        names = torch.randint(0, 40, (128,), generator=generator) + 20 * (step >= 150)
        ids = names * 0x9E3779B97F4A7C15 % 2**62
        for name in names.tolist():
            truth.setdefault(name, torch.randn(4, generator=generator))
        loss = (table(ids) - torch.stack([truth[name] for name in names.tolist()])).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert len(table) == 60
    limit = 0.35 if precision == "int2" else 0.02  # of a variance of 1; four levels can say no more
    assert max(losses[140], losses[299]) < limit < losses[150]


@pytest.mark.parametrize("documented", [DynamicTable, ops.IdMap])
def test_docstring(documented):
    found = doctest.testmod(sys.modules[documented.__module__], extraglobs={"torch": torch})
    assert found.attempted >= 3
    assert found.failed == 0


def test_evaluation_compiles():
    table = make()
    train(table, 2)
    table.eval()
    ids = tensor([1 << 40, 2 << 40, -9, 12 << 40])
    with torch.no_grad():
        compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids), table(ids))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_training_with_a_compiled_model():
    """The graph breaks at the table; what comes out is what comes out without a compiler."""
    plain, other = (torch.nn.Sequential(make(min_count=2), torch.nn.Linear(5, 1)) for _ in range(2))
    other[1].load_state_dict(plain[1].state_dict())
    compiled = torch.compile(other, backend="aot_eager")
    for step in range(3):
        ids = torch.randint(0, 20, (30,), generator=torch.Generator().manual_seed(step)) << 40
        for model in (plain, compiled):
            model(ids).square().sum().backward()
    assert equal(state(plain[0]), state(other[0]))
    assert plain[0].updates == 3
    assert torch.equal(plain[1].weight.grad, other[1].weight.grad)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda t: t([1]), TypeError, "ids must be a tensor, got list"),
        (lambda t: t(torch.ones(2)), TypeError, "ids must be int32 or int64, got float32"),
        (lambda t: t(tensor([[1]]), torch.tensor([0, 1])), ValueError, r"ids must have shape \[n\], got \[1, 1\]"),
        (lambda t: t(tensor([1]), torch.tensor([0, 2])), ValueError, r"offsets\[-1\] must be 1"),
        (lambda t: t(tensor([1]), torch.tensor([1.0])), TypeError, "offsets must be int32 or int64, got float32"),
        (lambda t: t(tensor([1]), mode="max"), ValueError, "mode must be one of sum, mean, got 'max'"),
        (lambda t: t.expire(0), ValueError, "older_than must be at least 1, got 0"),
        (lambda t: t.dequantize(torch.ones(1)), TypeError, "ids must be int32 or int64, got float32"),
        (lambda t: t.rows_of(None), TypeError, "ids must be a tensor, got NoneType"),
        (lambda t: setattr(t, "lr", float("nan")), ValueError, "lr must be finite and not negative, got nan"),
        (lambda t: make("int3"), ValueError, "precision must be one of float32, .*, got 'int3'"),
        (lambda t: make(dim=0), ValueError, "dim must be at least 1, got 0"),
        (lambda t: make(default="mean"), ValueError, "default must be one of zeros, trained, got 'mean'"),
        (lambda t: make(expire_after=0), ValueError, "expire_after must be at least 1, got 0"),
        (lambda t: make(max_rows=0), ValueError, "max_rows must be at least 1, got 0"),
        (lambda t: make(seed=-1), ValueError, r"seed = -1 is outside \[0, "),
        (lambda t: make("int8", init_std=0.0), ValueError, "init_range must be positive, got 0.0"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    table = make()
    before = state(table)
    with pytest.raises(error, match=f"DynamicTable: .*{sentence}"):
        call(table)
    assert equal(state(table), before)


def test_refuses_gradients_that_are_not_finite():
    table = make()
    out = table(tensor([1, 2]))
    before = state(table)
    with pytest.raises(ValueError, match="grad must be finite, got nan"):
        (out * torch.nan).sum().backward()
    assert equal(state(table), before)


def test_a_state_of_negative_counters_is_refused():
    table = make()
    given = table.state_dict()
    given["counters"] = torch.tensor([-5, 0, 0, 0])
    with pytest.raises(InputError, match="counters must not be negative"):
        table.load_state_dict(given)
