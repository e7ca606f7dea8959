"""Compressed tables: each against its formula, its gradient and its bytes."""

import math

import pytest
import torch

from recfast.data import Categorical, Schema, Sequence
from recfast.nn import (
    EmbeddingTables,
    HashedTables,
    PostTrainingTables,
    PrunedTables,
    QuotientRemainderTables,
    RobeTables,
    SparseTables,
    best_step,
)
from recfast.nn.compressed._base import divide, hashed
from recfast.ops.formats import QuantizedTable

SPECS = [("user", 300), ("city", 5), ("item", 1001), ("day", 7)]
DIM = 8
FLOATS = 4 * DIM * sum(rows for _, rows in SPECS)


def pruned(specs, dim, **options):
    return PrunedTables(specs, dim, begin=0, end=4, every=1, **options)


METHODS = {
    "hashed": HashedTables,
    "mult": lambda *a, **o: QuotientRemainderTables(*a, operation="mult", **o),
    "add": lambda *a, **o: QuotientRemainderTables(*a, operation="add", **o),
    "concat": lambda *a, **o: QuotientRemainderTables(*a, operation="concat", **o),
    "robe": lambda *a, **o: RobeTables(*a, block=4, **o),
    "pruned": pruned,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def some_ids(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, rows, (count,), generator=generator) for _, rows in SPECS], 1)


def trained(tables, steps=6, lr=0.5, seed=3):
    """Some steps of Adagrad towards random targets, so that no two weights are alike."""
    optimizer = torch.optim.Adagrad(tables.parameters(), lr=lr)
    for step in range(steps):
        ids = some_ids(seed=seed + step)
        target = torch.randn(64, 4, tables.dim, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (tables(ids) - target).square().sum().backward()
        optimizer.step()
    return tables


@every_method
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.21])
def test_lookups_agree_and_bytes_are_within_the_ratio(method, ratio):
    tables = trained(method(SPECS, DIM, ratio=ratio)).eval()
    assert tables.float_bytes == FLOATS
    assert tables.memory_bytes() <= ratio * FLOATS
    assert tables.memory_bytes() > 0.95 * ratio * FLOATS
    rows = [tables.dequantize(name) for name, _ in SPECS]
    ids = some_ids()
    out = tables(ids)
    assert out.shape == (64, 4, DIM)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.stack([rows[f][ids[:, f]] for f in range(4)], 1))
    history = torch.tensor([[0, 1000], [7, 7]], dtype=torch.int32)
    day, items, none = tables.lookup([("day", torch.tensor(6)), ("item", history), ("user", torch.empty(0).long())])
    assert torch.equal(day, rows[3][6])
    assert torch.equal(items, rows[2][history.long()])
    assert none.shape == (0, DIM)
    assert tables.lookup([]) == []
    assert tables.rows("item") == 1001


@every_method
def test_bytes_are_those_of_what_is_served(method):
    """What `state_dict` holds, less what only training needs, is what is counted."""
    tables = trained(method(SPECS, DIM, ratio=0.3))
    stored = tables.compact() if isinstance(tables, PrunedTables) else tables
    held = sum(value.numel() * value.element_size() for value in stored.state_dict().values())
    assert stored.memory_bytes() == tables.memory_bytes() == held


@every_method
def test_the_seed_decides(method):
    first, twin, other = (trained(method(SPECS, DIM, ratio=0.4, seed=seed)) for seed in (5, 5, 6))
    states = [tables.state_dict() for tables in (first, twin, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(first.dequantize("item"), other.dequantize("item"))
    other.load_state_dict(states[0])
    assert torch.equal(first.dequantize("item"), other.dequantize("item"))


@every_method
def test_rows_start_as_asked(method):
    tables = method([("item", 20000)], 16, ratio=0.5, init_std=0.2).eval()
    rows = tables.dequantize("item")
    # Some hold few distinct numbers: the two quotients of `concat` are the right half of every row.
    assert abs(rows.mean()) < 0.1
    assert 0.17 < rows.std() < 0.23


def gradient_of(tables, ids, upstream):
    tables.weight.grad = None
    (tables(ids) * upstream).sum().backward()
    return tables.weight.grad.clone()


def summed(shape, parts):
    """Gradients put in their places one by one."""
    out = torch.zeros(shape, dtype=torch.float64)
    for place, value in parts:
        out[place] += value.double()
    return out


def every_lookup(tables, ids):
    """(batch row, field, row numbered through), as Python numbers."""
    starts = [0, 300, 305, 1306]
    for b, row in enumerate(ids.tolist()):
        for f, value in enumerate(row):
            yield b, f, starts[f] + value


def test_hashed_gradient_and_collisions():
    tables = trained(HashedTables(SPECS, DIM, ratio=0.2, seed=4))
    # 20 % of 1313 rows are 262, less 72 bytes 260: 12 whole, and 19 % of each of the two large tables.
    assert tables.layout.tolist() == [[0, 57, 62, 253], [57, 5, 191, 7]]
    places = tables.positions(torch.arange(1313))
    assert torch.equal(places[300:305], torch.arange(57, 62))
    assert torch.equal(places[1306:], torch.arange(253, 260))
    assert set(places[:300].tolist()) <= set(range(57))
    assert set(places[305:1306].tolist()) <= set(range(62, 253))
    assert len(places[305:1306].unique()) > 180
    # Ids of one row have one embedding, and it is that row's.
    rows = torch.cat([tables.dequantize(name) for name, _ in SPECS])
    assert torch.equal(rows, tables.weight[places])
    ids, upstream = some_ids(), torch.randn(64, 4, DIM)
    expected = summed(tables.weight.shape, ((places[g], upstream[b, f]) for b, f, g in every_lookup(tables, ids)))
    torch.testing.assert_close(gradient_of(tables, ids, upstream).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_quotient_remainder_gradient(operation):
    tables = trained(QuotientRemainderTables(SPECS, DIM, ratio=0.2, operation=operation))
    weight, ids, upstream = tables.weight.detach(), some_ids(), torch.randn(64, 4, DIM)
    first, m, q = tables.layout.tolist()
    half = DIM // 2

    def parts():
        for b, f, g in every_lookup(tables, ids):
            i, grad = g - [0, 300, 305, 1306][f], upstream[b, f]
            if not q[f]:
                # A whole table: the row itself, or its two halves one after the other.
                if operation == "concat":
                    yield first[f] + 2 * i, grad[:half]
                    yield first[f] + 2 * i + 1, grad[half:]
                else:
                    yield first[f] + i, grad
                continue
            left, right = first[f] + i % m[f], q[f] + i // m[f]
            if operation == "mult":
                yield left, grad * weight[right]
                yield right, grad * weight[left]
            elif operation == "add":
                yield left, grad
                yield right, grad
            else:
                yield left, grad[:half]
                yield right, grad[half:]

    expected = summed(weight.shape, parts())
    torch.testing.assert_close(gradient_of(tables, ids, upstream).double(), expected, rtol=1e-4, atol=1e-4)
    assert [bool(x) for x in q] == [True, False, True, False]


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_quotient_remainder_tells_every_id_from_every_other(operation, ratio):
    tables = trained(QuotientRemainderTables(SPECS, DIM, ratio=ratio, operation=operation))
    left, right, _ = tables.positions(torch.arange(1313))
    pairs = set(zip(left.tolist(), right.tolist(), strict=True))
    assert len(pairs) == 1313
    assert max(left.max(), right.max()) == len(tables.weight) - 1
    for name, rows in SPECS:
        assert len(tables.dequantize(name).unique(dim=0)) == rows
    # Of every table either all of it, or the fewest collisions that its share of the budget allows.
    for (_, rows), (_, m, q) in zip(SPECS, tables.layout.T.tolist(), strict=True):
        assert m == rows if q == 0 else m < rows


def test_quotient_remainder_starts_at_the_identity():
    tables = QuotientRemainderTables([("item", 1000)], DIM, ratio=0.2)
    first, m, q = tables.layout[:, 0].tolist()
    assert bool((tables.weight[q:] == 1).all())
    assert torch.equal(tables.dequantize("item"), tables.weight.detach()[first + torch.arange(1000) % m])


def test_robe_gradient():
    tables = trained(RobeTables(SPECS, DIM, ratio=0.1, block=2))
    size = len(tables.weight)
    assert size == (math.floor(0.1 * FLOATS) - 8) // 4
    places = tables.positions(torch.arange(1313))
    # Blocks of two neighbours on a ring, begun anywhere.
    assert torch.equal((places[:, 0::2] + 1) % size, places[:, 1::2])
    assert len((places[:, ::2] % 2).unique()) == 2
    rows = torch.cat([tables.dequantize(name) for name, _ in SPECS])
    assert torch.equal(rows, tables.weight[places])
    ids, upstream = some_ids(), torch.randn(64, 4, DIM)
    expected = summed(
        tables.weight.shape,
        ((places[g, d], upstream[b, f, d]) for b, f, g in every_lookup(tables, ids) for d in range(DIM)),
    )
    torch.testing.assert_close(gradient_of(tables, ids, upstream).double(), expected, rtol=1e-5, atol=1e-5)


def test_robe_wraps_around():
    """An array hardly longer than a block: every block but one goes over its end."""
    tables = RobeTables([("item", 50)], 4, ratio=0.04, init_std=1.0)
    assert len(tables.weight) == 6
    weight = tables.weight.detach().tolist()
    allowed = [[weight[(start + k) % 6] for k in range(4)] for start in range(6)]
    rows = tables.dequantize("item").tolist()
    assert all(row in allowed for row in rows)
    assert all(row in rows for row in allowed)


def test_pruning_follows_its_schedule():
    tables = PrunedTables(SPECS, DIM, ratio=0.3, begin=2, end=10, every=3)
    whole = 1313 * DIM
    assert tables.kept == (math.floor(0.3 * FLOATS) - 1313 - 4 * 83) // 4
    ids, left = some_ids(), []
    for _ in range(13):
        tables(ids).sum().backward()
        left.append(int(tables.mask.sum()))
        assert tables.density == pytest.approx(left[-1] / whole)
    for step, count in enumerate(left):
        # Pruned at steps 2, 5, 8 and, to end there, 10.
        last = max((s for s in (2, 5, 8, 10) if s <= step), default=0)
        assert count == whole - round((whole - tables.kept) * (1 - (1 - max(0, last - 2) / 8) ** 3))
    assert left[-1] == tables.kept
    assert tables.finished
    # Neither evaluation nor a call without gradients is a step.
    steps = int(tables.steps)
    tables.eval()(ids)
    with torch.no_grad():
        tables.train()(ids)
    assert int(tables.steps) == steps == 13


def test_pruning_keeps_the_largest_and_drops_for_good():
    tables = PrunedTables(SPECS, DIM, ratio=0.3, begin=0, end=1, every=1)
    before = tables.weight.detach().clone()
    ids = torch.stack([torch.arange(rows).repeat(1001 // rows + 1)[:1001] for _, rows in SPECS], 1)
    tables(ids)
    assert bool(tables.mask.all())
    optimizer = torch.optim.Adam(tables.parameters(), lr=0.1)
    for _ in range(3):
        tables(ids).square().sum().backward()
        optimizer.step()
    limit = before.abs().flatten().topk(tables.kept).values[-1]
    assert torch.equal(tables.mask, before.abs() >= limit)
    assert bool((tables.weight.grad[~tables.mask] == 0).all())
    assert bool((tables.weight.grad[tables.mask] != 0).all())
    # Adam's momentum may move a dropped weight, but what is served is 0, and it does not come back.
    rows = torch.cat([tables.dequantize(name) for name, _ in SPECS])
    assert bool((rows[~tables.mask] == 0).all())
    with torch.no_grad():
        tables.weight[~tables.mask] = 100.0
    tables.prune_(tables.kept - 1)
    assert int(tables.mask.sum()) == tables.kept - 1
    assert bool((before[tables.mask].abs() >= limit).all())


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 16])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_sparse_form_is_the_dense_one(dim, density):
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randn(1313, dim, generator=generator)
    weight *= torch.rand(1313, dim, generator=generator) < density
    sparse = SparseTables(SPECS, weight)
    parts = weight.split([rows for _, rows in SPECS])
    for (name, _), part in zip(SPECS, parts, strict=True):
        assert torch.equal(sparse.dequantize(name), part)
    ids = some_ids()
    assert torch.equal(sparse(ids), torch.stack([part[ids[:, f]] for f, part in enumerate(parts)], 1))
    assert sparse.memory_bytes() == 4 * int((weight != 0).sum()) + 1313 * math.ceil(dim / 8) + 4 * 83
    assert not list(sparse.parameters())


def test_pruned_tables_are_served_as_they_were_trained():
    tables = trained(pruned(SPECS, DIM, ratio=0.2), steps=8).eval()
    assert tables.finished
    sparse = tables.compact()
    assert torch.equal(sparse(some_ids()), tables(some_ids()))
    assert sparse.memory_bytes() <= 0.2 * FLOATS


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("step", ["max", "mse"])
def test_post_training(bits, step):
    tables = EmbeddingTables(SPECS, DIM, init_std=0.3)
    tables.groups[0].table[17] = 0.0
    before = tables.dequantize("item")
    served = PostTrainingTables(tables, bits, step=step)
    assert served.memory_bytes() == 1313 * {8: 12, 4: 8, 2: 8}[bits]
    assert isinstance(served.table, QuantizedTable)
    worst = 0.0
    highest = 2 ** (bits - 1) - 1
    for name, _ in SPECS:
        rows, exact = served.dequantize(name), tables.dequantize(name)
        error = (rows - exact).square().sum(1)
        largest = exact.abs().amax(1) / highest
        if step == "max":
            # Nothing is clipped, so no weight moves by more than half a step.
            assert bool(((rows - exact).abs() <= largest[:, None] * (0.5 + 1e-5)).all())
        else:
            plain = PostTrainingTables(tables, bits, step="max").dequantize(name)
            assert bool((error <= (plain - exact).square().sum(1)).all())
        worst = max(worst, float(error.max()))
    assert worst > 0
    assert not served.dequantize("user")[17].any()
    ids = some_ids()
    rows = [served.dequantize(name) for name, _ in SPECS]
    assert torch.equal(served(ids), torch.stack([rows[f][ids[:, f]] for f in range(4)], 1))
    assert not list(served.parameters())
    tables.groups[0].table.zero_()
    assert not torch.equal(tables.dequantize("item"), before)
    assert torch.equal(served(ids), torch.stack([rows[f][ids[:, f]] for f in range(4)], 1))


def test_best_step_is_the_best():
    """Against a fine grid of steps, by the squared error after rounding and clipping, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, generator=generator)
    for bits in (2, 4, 8):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

        def error(steps, low=low, high=high):
            codes = (weight.double() / steps[:, None]).round().clamp(low, high)
            return (weight.double() - steps[:, None] * codes).square().sum(1)

        largest = weight.double().abs().amax(1) / high
        finest = torch.stack([error(largest * k / 5000) for k in range(100, 5001)]).amin(0)
        found = error(best_step(weight, bits).double())
        assert bool((found <= finest * 1.01 + 1e-12).all()), (found / finest).max()
    assert best_step(torch.zeros(2, 3), 4).tolist() == [0.0, 0.0]
    # A row of one column has a step that hits it.
    tables = EmbeddingTables([("a", 9)], 1)
    torch.testing.assert_close(PostTrainingTables(tables, 2).dequantize("a"), tables.dequantize("a"))


def test_hash_is_even_and_salted():
    x = torch.arange(200_000)
    for salt, size in ((0, 1000), (7, 937)):
        counts = torch.bincount(hashed(x, salt, size), minlength=size).double()
        assert len(counts) == size
        # Chi squared over size - 1 degrees of freedom: mean size, standard deviation sqrt(2 size).
        expected = 200_000 / size
        assert abs(((counts - expected) ** 2 / expected).sum() - size) < 5 * (2 * size) ** 0.5
    # Two salts agree as often as chance has it.
    same = (hashed(x, 0, 1000) == hashed(x, 1, 1000)).double().mean()
    assert abs(same - 1e-3) < 5 * (1e-3 / 200_000) ** 0.5
    large = torch.tensor([2**62, -1, 0])
    assert bool(((hashed(large, 3, 2**31) >= 0) & (hashed(large, 3, 2**31) < 2**31)).all())
    # Literal values, so that a saved table is read alike by every version.
    assert hashed(torch.tensor([0, 1, 2, 3]), 0, 1000).tolist() == [883, 566, 591, 113]


def test_divide():
    """The same share of every table, but for the least: by hand, 262 = 12 + floor(300 s) + floor(1001 s)."""
    sizes, least = [300, 5, 1001, 7], [16, 5, 16, 7]
    assert divide(sizes, 262, least) == [57, 5, 193, 7]
    assert divide(sizes, 2000, least) == sizes
    assert divide(sizes, 44, least) == [16, 5, 16, 7]
    assert divide(sizes, 43, least) is None
    # The second table gets what the first, kept at its least, leaves.
    assert divide([300, 1001], 130, [35, 64]) == [35, 95]


def test_schema_and_shared_tables():
    schema = Schema([Categorical("user", role="user"), Categorical("item", role="item"), Sequence("history")])
    schema = schema.fit({"user": 30, "item": 50})
    tables = HashedTables(schema, 4, ratio=0.5)
    assert tables.specs == [("user", 30), ("item", 50)]
    ids = torch.tensor([3, 49])
    past, items = tables.lookup([("history", ids), ("item", ids)])
    assert torch.equal(past, items)


@every_method
def test_rejects_bad_ids(method):
    tables = method(SPECS, DIM, ratio=0.5)
    place = type(tables).__name__
    before = {name: value.clone() for name, value in tables.state_dict().items()}
    ids = some_ids()
    ids[3, 2] = 1001
    with pytest.raises(IndexError, match=rf"{place}: item\[3\] = 1001 is outside \[0, 1001\)"):
        tables(ids)
    with pytest.raises(IndexError, match=rf"{place}: city\[1\] = -1 is outside \[0, 5\)"):
        tables.lookup([("city", torch.tensor([0, -1]))])
    with pytest.raises(KeyError, match=f"{place}: there is no table 'town'; there are user, city, item, day"):
        tables.lookup([("town", torch.tensor([0]))])
    with pytest.raises(TypeError, match=f"{place}: ids must be int32 or int64, got float32"):
        tables(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=rf"{place}: ids must have shape \[B, 4\], got \[2, 3\]"):
        tables(torch.zeros(2, 3, dtype=torch.int64))
    assert all(torch.equal(before[name], value) for name, value in tables.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HashedTables(SPECS, 8, ratio=0.0), r"HashedTables: ratio must lie in \(0, 1\], got 0.0"),
        (lambda: RobeTables(SPECS, 8, ratio=1.5), r"RobeTables: ratio must lie in \(0, 1\], got 1.5"),
        (lambda: HashedTables([], 8, ratio=0.5), "HashedTables: there must be at least one table"),
        (lambda: HashedTables([("a", 2), ("a", 3)], 8, ratio=0.5), "HashedTables: the name 'a' stands twice"),
        (lambda: HashedTables([("a", 0)], 8, ratio=0.5), "HashedTables: table 'a' must have at least one row, got 0"),
        (lambda: HashedTables(SPECS, 0, ratio=0.5), "HashedTables: dim must be at least 1, got 0"),
        (
            lambda: HashedTables(SPECS, 8, ratio=0.004),
            "HashedTables: ratio = 0.004 leaves 168 bytes, at least 1480 are needed",
        ),
        (
            lambda: QuotientRemainderTables(SPECS, 8, ratio=0.05),
            "QuotientRemainderTables: ratio = 0.05 leaves 2100 bytes, at least 3648 are needed",
        ),
        (
            lambda: QuotientRemainderTables(SPECS, 7, ratio=0.5, operation="concat"),
            "QuotientRemainderTables: operation concat needs an even dim, got 7",
        ),
        (
            lambda: QuotientRemainderTables(SPECS, 8, ratio=0.5, operation="max"),
            "QuotientRemainderTables: operation must be one of mult, add, concat, got 'max'",
        ),
        (lambda: RobeTables(SPECS, 8, ratio=0.5, block=3), "RobeTables: block must divide dim = 8, got 3"),
        (lambda: RobeTables(SPECS, 8, ratio=0.0005), "RobeTables: ratio = 0.0005 leaves 21 bytes, at least 40 are"),
        (
            lambda: PrunedTables(SPECS, 8, ratio=0.5, begin=5, end=5),
            "PrunedTables: end must be at least 6, got 5",
        ),
        (
            lambda: PrunedTables(SPECS, 8, ratio=0.03, begin=0, end=5),
            "PrunedTables: ratio = 0.03 leaves 1260 bytes, at least 1649 are needed",
        ),
        (
            lambda: PostTrainingTables(EmbeddingTables(SPECS, 8), 3),
            "PostTrainingTables: bits must be one of 8, 4, 2, got 3",
        ),
        (
            lambda: PostTrainingTables(EmbeddingTables(SPECS, 8), 8, step="mean"),
            "PostTrainingTables: step must be one of max, mse, got 'mean'",
        ),
        (
            lambda: SparseTables(SPECS, torch.zeros(1312, 8)),
            r"SparseTables: weight must have shape \[1313, 8\], got \[1312, 8\]",
        ),
        (lambda: best_step(torch.tensor([[float("nan")]]), 4), "best_step: weight must be finite, got nan"),
    ],
)
def test_rejects_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_method
def test_a_model_takes_them(method):
    """In the place of a ranker's tables: gradients reach every weight that a batch reads, the loss falls."""
    from recfast.data import Batch
    from recfast.models import DeepFM

    schema = Schema([Categorical("user", role="user"), Categorical("item", role="item")])
    schema = schema.fit({"user": 60, "item": 80})
    torch.manual_seed(0)
    model = DeepFM(schema, dim=8, hidden=(16,))
    model.tables = method(schema, 8, ratio=0.7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        ids = torch.stack([torch.randint(0, n, (256,), generator=generator) for n in (60, 80)], 1)
        label = ((ids.sum(1) % 2) == 0).float()
        batch = Batch(
            ids=ids,
            numeric=torch.zeros(256, 0),
            sequences={},
            vectors={},
            label=label,
            group=None,
            candidate_offsets=None,
        )
        loss = model.loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.6
    assert sum(losses[-5:]) / 5 < 0.62
