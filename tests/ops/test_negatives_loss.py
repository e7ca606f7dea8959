"""The fused loss over many negatives against plain torch and loops over its formulas."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from recfast import ops
from recfast.errors import OutOfRange
from recfast.ops import negatives_loss as public
from recfast.ops._library import REGISTRY
from recfast.ops.negatives_loss import LOSSES, NORMALIZE

module = sys.modules[public.__module__]
FORMS = ("all", "shared", "private")
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-23}


class Case:
    """Random arguments of one call."""

    def __init__(
        self, form, rows, items, columns, dim, seed, *, dtype=torch.float64, bias=True, correction=True, exclude=True
    ):
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def random(*size):
            # Not near 0: gradients of a normalised row grow with the inverse of its length.
            x = torch.randn(size, generator=generator, dtype=torch.float64)
            return x + torch.where(x < 0, -0.5, 0.5)

        def draw(*size):
            return torch.randint(0, items, size, generator=generator)

        self.queries, self.table = random(rows, dim).to(dtype), random(items, dim).to(dtype)
        self.positives = draw(rows)
        self.negatives = {"all": None, "shared": draw(columns), "private": draw(rows, columns)}[form]
        self.options = {"first": 1} if form == "all" else {}
        if bias:
            self.options["bias"] = random(items).to(wide)
        if correction and self.negatives is not None:
            self.options["log_expected"] = random(*self.negatives.shape).to(wide)
        if exclude:
            lengths = torch.randint(0, 5, (rows,), generator=generator)
            self.options["exclude"] = draw(int(lengths.sum())), F.pad(lengths.cumsum(0), (1, 0))

    def leaves(self):
        return [self.queries, self.table] + ([self.options["bias"]] if "bias" in self.options else [])

    def run(self, op, leaves=None, **options):
        queries, table, *bias = leaves or self.leaves()
        options = self.options | options
        if bias:
            options["bias"] = bias[0]
        return op(queries, table, self.positives, self.negatives, **options)

    def gradients(self, op, **options):
        """The losses and the gradient of their weighted sum in every leaf; `table`'s dense."""
        leaves = [x.detach().clone().requires_grad_() for x in self.leaves()]
        losses = self.run(op, leaves, **options)
        losses.backward(torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype))
        gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]
        return [losses.detach(), *(x.to_dense() if x.is_sparse else x for x in gradients)]


def close(have, want, *, dtype, terms, scale=1.0):
    """Within the error of sums of `terms` terms that together may be `scale` times what is left of them."""
    for a, b in zip(have, want, strict=True):
        room = terms * EPS[dtype] * scale * max(float(b.detach().abs().max()) if b.numel() else 0.0, 1.0)
        torch.testing.assert_close(a.to(b.dtype), b, rtol=terms * EPS[dtype], atol=room)


@given(
    st.sampled_from(FORMS),
    st.sampled_from(LOSSES),
    st.sampled_from(NORMALIZE),
    st.sampled_from([0, 1, 2, 15, 16, 17, 33, 65, 130]),
    st.sampled_from([1, 2, 7, 40]),
    st.sampled_from([0, 1, 5, 16, 120, 121, 250]),
    st.sampled_from([1, 3, 16, 17, 32]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_matches_reference(isa_levels, poisoned_empty, form, loss, normalize, rows, items, columns, dim, plain, seed):
    case = Case(form, rows, items, columns, dim, seed, bias=not plain, correction=not plain, exclude=not plain)
    options = {"loss": loss, "normalize": normalize, "scale": 1.5, "margin": 0.3, "weight": 2.0, "clamp": plain}
    wanted = case.gradients(ops.negatives_loss.reference, **options)
    close(case.gradients(ops.negatives_loss, **options), wanted, dtype=torch.float64, terms=200, scale=1 + rows)
    single = Case(
        form, rows, items, columns, dim, seed, dtype=torch.float32, bias=not plain, correction=not plain,
        exclude=not plain,
    )  # fmt: skip
    # Scores near the margin may fall to either side of it: the loss hardly changes, its gradient jumps.
    jumps = loss == "contrastive"
    for level in isa_levels():
        have = single.gradients(ops.negatives_loss, **options)
        close(
            have[: 1 if jumps else None], wanted[: 1 if jumps else None], dtype=torch.float32, terms=200, scale=1 + rows
        )
        sparse = [] if form == "all" else single.gradients(ops.negatives_loss, sparse=True, **options)
        for a, b in zip(sparse, have, strict=False):
            assert torch.equal(a, b), level


def test_known_values():
    queries, table = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.7, 3.0], [0.1, 0.0]])
    positives, negatives = torch.tensor([1]), torch.tensor([2, 3, 1])
    loss = ops.negatives_loss(queries, table, positives, negatives)
    assert loss.item() == pytest.approx(math.log(math.exp(0.5) + math.exp(0.7) + math.exp(0.1)) - 0.5)
    loss = ops.negatives_loss(queries, table, positives, negatives, loss="contrastive", margin=0.5, weight=10.0)
    assert loss.item() == pytest.approx(0.5 + 5 * 0.2)
    loss = ops.negatives_loss(queries, table, positives, negatives, loss="bpr", skip_positive=False)
    wanted = (math.log1p(math.exp(0.2)) + math.log1p(math.exp(-0.4)) + math.log(2)) / 3
    assert loss.item() == pytest.approx(wanted)
    loss = ops.negatives_loss(queries, table, positives, negatives[:1], loss="bce", positive_weight=3.0, weight=2.0)
    assert loss.item() == pytest.approx(3 * math.log1p(math.exp(-0.5)) + 2 * math.log1p(math.exp(0.7)))
    loss = ops.negatives_loss(queries, table, positives, negatives[:1], loss="contrastive", normalize="both", margin=0)
    assert loss.item() == pytest.approx(0.7 / math.hypot(0.7, 3.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_gradcheck(form, loss, normalize):
    case = Case(form, 3, 7, 5, 4, 5)
    leaves = [x.requires_grad_() for x in case.leaves()]
    options = {"loss": loss, "normalize": normalize, "scale": 0.7, "margin": 0.21, "weight": 3.0, "clamp": True}
    assert torch.autograd.gradcheck(lambda *x: case.run(ops.negatives_loss, x, **options), leaves)


def test_is_differentiable_once():
    case = Case("shared", 3, 7, 5, 4, 5)
    queries = case.queries.requires_grad_()
    (gradient,) = torch.autograd.grad(case.run(ops.negatives_loss).sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="negatives_loss: is differentiable once"):
        gradient.sum().backward()


def test_opcheck(opcheck):
    opcheck(REGISTRY["negatives_loss"])
    opcheck(REGISTRY["negatives_loss_backward"])


def test_a_graph_that_did_not_expect_a_gradient():
    """The op itself, told that no gradient is wanted, and then asked for one."""
    case = Case("shared", 5, 9, 7, 4, 1, exclude=False, bias=False, correction=False)
    arguments = [case.positives, case.negatives, None, None, None, None, 0]
    for loss in LOSSES:
        answers = []
        for gradient in (False, True):
            leaves = [x.detach().clone().requires_grad_() for x in case.leaves()]
            options = (loss, "both", 1.0, 0.1, 1.0, 1.0, False, True, gradient)
            torch.ops.recfast.negatives_loss(*leaves, *arguments, *options)[0].sum().backward()
            answers.append([x.grad for x in leaves])
        assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_is_cross_entropy_over_the_catalogue():
    case = Case("all", 40, 300, 0, 24, 2, dtype=torch.float32, bias=False, exclude=False)
    table = case.table.requires_grad_()
    queries = case.queries.requires_grad_()
    wanted = F.cross_entropy(queries.double() @ table.double().T, case.positives, reduction="none")
    want = torch.autograd.grad(wanted.sum(), [queries, table])
    have = ops.negatives_loss(queries, table, case.positives)
    got = torch.autograd.grad(have.sum(), [queries, table])
    close([have, *got], [wanted, *want], dtype=torch.float32, terms=100)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["shared", "private"])
def test_rows_in_which_nothing_counts(loss, form):
    """Every column is the positive or excluded, or there is none: only the positive is left."""
    own = torch.tensor([3, 4])
    negatives = torch.tensor([3, 4, 4, 3])
    exclude = torch.tensor([4, 3]), torch.tensor([0, 1, 2])
    for ids, options in ((negatives, {"exclude": exclude}), (negatives[:0], {})):
        ids = ids if form == "shared" else ids.expand(2, -1)
        case = Case("shared", 2, 6, 1, 8, 3, dtype=torch.float32, bias=False, correction=False, exclude=False)
        leaves = [x.requires_grad_() for x in case.leaves()]
        losses = ops.negatives_loss(*leaves, own, ids, loss=loss, positive_weight=2.0, **options)
        score = (leaves[0] * leaves[1][own]).sum(1)
        wanted = {
            "softmax": 0 * score,
            "contrastive": 1 - score,
            "bpr": 0 * score,
            "bce": 2 * F.softplus(-score),
        }[loss]
        want = torch.autograd.grad(wanted.sum(), leaves)
        have = torch.autograd.grad(losses.sum(), leaves)
        if loss in ("softmax", "bpr"):
            assert not losses.any()
            assert not any(x.any() for x in have)
        close([losses, *have], [wanted, *want], dtype=torch.float32, terms=20)


def test_rows_of_no_length():
    """A zero vector has score 0 and gradient 0 where lengths are taken out; nothing becomes infinite."""
    for form in FORMS:
        case = Case(form, 4, 9, 6, 5, 0, dtype=torch.float32, bias=False, correction=False, exclude=False)
        case.queries[1] = 0
        case.table[case.positives[0]] = 0
        for loss in LOSSES:
            losses, dqueries, dtable = case.gradients(ops.negatives_loss, loss=loss, normalize="both", margin=-0.5)
            assert torch.isfinite(losses).all()
            assert torch.isfinite(dtable).all()
            assert not dqueries[1].any()
            assert not dtable[case.positives[0]].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16(form, loss):
    """Cosines over a temperature of 0.05: scores up to 20, summed in float32. Gradients are rounded once, to 2^-9."""
    case = Case(form, 40, 60, 150, 32, 4, dtype=torch.bfloat16, bias=False, correction=False)
    options = {"loss": loss, "normalize": "both", "scale": 20.0, "margin": 5.0, "weight": 3.0}
    losses, *gradients = case.gradients(ops.negatives_loss, **options)
    wide = Case(form, 40, 60, 150, 32, 4, bias=False, correction=False)
    wide.queries, wide.table = case.queries.double(), case.table.double()
    wanted, *want = wide.gradients(ops.negatives_loss.reference, **options)
    assert losses.dtype == torch.float32
    # A score of 20 is wrong by (D + 6) eps 20 at most, and so is a loss (times w).
    torch.testing.assert_close(losses.double(), wanted, rtol=0, atol=3 * 38 * 2.0**-24 * 20 * 2)
    for a, b in zip(gradients, want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2.0**-8, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_tiles_and_rows_beside_do_not_matter(form, loss, monkeypatch):
    case = Case(form, 70, 500, 700, 16, 6, dtype=torch.float32)
    options = {"loss": loss, "normalize": "both", "margin": 0.1}
    wanted = case.gradients(ops.negatives_loss, **options)
    alone = Case(form, 70, 500, 700, 16, 6, dtype=torch.float32)
    for name in ("queries", "positives"):
        setattr(alone, name, getattr(alone, name)[20:60])
    if form == "private":
        alone.negatives = alone.negatives[20:60]
        alone.options["log_expected"] = alone.options["log_expected"][20:60]
    values, offsets = alone.options["exclude"]
    alone.options["exclude"] = values[offsets[20] : offsets[60]], offsets[20:61] - offsets[20]
    assert torch.equal(alone.run(ops.negatives_loss, **options), wanted[0][20:60])
    for tile in (64, 512):
        monkeypatch.setattr(module, "_TILE", tile)
        close(case.gradients(ops.negatives_loss, **options), wanted, dtype=torch.float32, terms=50)


@pytest.mark.parametrize("form", FORMS)
def test_threads_do_not_matter(form, isa_levels):
    case = Case(form, 300, 400, 500, 16, 7, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        for _, loss, sparse in itertools.product(isa_levels(), LOSSES, (False, form != "all")):
            answers = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                options = {"loss": loss, "normalize": "both", "margin": 0.1, "sparse": sparse}
                answers.append(case.gradients(ops.negatives_loss, **options))
            for other in answers[1:]:
                assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_few_and_many_active_pairs_take_ways_of_the_same_answer():
    """CCL goes through its active pairs one by one, or multiplies matrices: whole batches of either."""
    case = Case("shared", 64, 50, 240, 16, 8, bias=False, correction=False, exclude=False)
    for margin in (-0.9, -0.1, 0.3, 0.8):
        options = {"loss": "contrastive", "normalize": "both", "margin": margin, "weight": 5.0}
        wanted = case.gradients(ops.negatives_loss.reference, **options)
        close(case.gradients(ops.negatives_loss, **options), wanted, dtype=torch.float64, terms=100)


def test_rows_that_lie_apart_and_small_tables_and_large():
    """Strided queries and tables; ids grouped by a histogram and by sorting."""
    generator = torch.Generator().manual_seed(0)
    for items, columns in ((40, 30), (5000, 3)):
        wide = torch.randn(items, 40, generator=generator)
        table, queries = wide[:, 8:24], torch.randn(20, 9, 16, generator=generator)[:, 4]
        positives = torch.randint(0, items, (20,), generator=generator)
        for shape in ((columns,), (20, columns)):
            ids = torch.randint(0, items, shape, generator=generator)
            have, want = queries.detach().requires_grad_(), queries.detach().contiguous().requires_grad_()
            apart, beside = table.detach().requires_grad_(), table.detach().contiguous().requires_grad_()
            ops.negatives_loss(have, apart, positives, ids).sum().backward()
            ops.negatives_loss(want, beside, positives, ids).sum().backward()
            assert torch.equal(have.grad, want.grad)
            assert torch.equal(apart.grad, beside.grad)
            plain = beside.detach().requires_grad_()
            ops.negatives_loss.reference(queries, plain, positives, ids).sum().backward()
            close([beside.grad], [plain.grad], dtype=torch.float32, terms=100)


def test_sparse_gradient():
    """Rows in ascending order, each once; SparseAdam takes it. Without a wish for a gradient there is none."""
    case = Case("shared", 6, 1000, 9, 4, 9, dtype=torch.float32)
    table = torch.nn.Parameter(case.table.clone())
    losses = case.run(ops.negatives_loss, [case.queries, table, case.options["bias"]], sparse=True)
    losses.sum().backward()
    assert table.grad.is_sparse
    assert torch.equal(table.grad._indices()[0], torch.cat([case.negatives, case.positives]).unique())
    before = table.detach().clone()
    torch.optim.SparseAdam([table], lr=0.1).step()
    moved = (table.detach() != before).any(1).nonzero()[:, 0]
    assert set(moved.tolist()) <= set(table.grad._indices()[0].tolist())
    assert not case.run(ops.negatives_loss, sparse=True).requires_grad
    with pytest.raises(ValueError, match="sparse must be False"):
        Case("all", 2, 3, 0, 4, 9).run(ops.negatives_loss, sparse=True)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(form):
    case = Case(form, 5, 9, 7, 4, 1, dtype=torch.float32)
    options = {"loss": "softmax", "normalize": "both", "scale": 2.0}
    compiled = torch.compile(lambda *x: case.run(ops.negatives_loss, x, **options), fullgraph=True, backend="aot_eager")
    answers = []
    for form_of in (compiled, lambda *x: case.run(ops.negatives_loss, x, **options)):
        leaves = [x.detach().clone().requires_grad_() for x in case.leaves()]
        losses = form_of(*leaves)
        losses.sum().backward()
        answers.append([losses, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


_LARGE = """
import resource, sys, torch
from recfast import ops
torch.manual_seed(0)
queries, table = torch.randn(16384, 16, requires_grad=True), torch.randn(100_000, 16, requires_grad=True)
positives = torch.randint(1, 100_000, (16384,))
few = torch.randint(1, 100_000, (64, 8))
ops.negatives_loss(queries[:64], table, positives[:64], few[0], scale=0.1).sum().backward()  # all that is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.negatives_loss(queries, table, positives, first=1, scale=0.1).mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory():
    """16,384 rows against 100,000 items: their scores alone would be 6.6 GB. The gradients of both are 7.5 MB."""
    ran = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 64 * 1024


def test_rejects_bad_input():
    queries, table = torch.randn(3, 4), torch.randn(5, 4)
    positives, negatives = torch.tensor([0, 1, 2]), torch.tensor([3, 4])
    call = ops.negatives_loss

    def refuses(error, words, *arguments, **options):
        with pytest.raises(error, match=words):
            call(*arguments, **options)

    refuses(TypeError, "queries must be float32", queries.half(), table.half(), positives)
    refuses(TypeError, "table must be float32, got float64", queries, table.double(), positives)
    refuses(ValueError, r"table must have shape \[N, 4\]", queries, table[:, :3], positives)
    refuses(ValueError, r"positives must have shape \[3\]", queries, table, positives[:2])
    refuses(ValueError, r"negatives must have shape \[3, K\]", queries, table, positives, negatives.expand(2, 2))
    refuses(TypeError, "negatives must be int32 or int64", queries, table, positives, negatives.float())
    refuses(OutOfRange, r"positives\[1\] = 5 is outside \[0, 5\)", queries, table, torch.tensor([0, 5, 2]))
    refuses(OutOfRange, r"negatives\[0\] = -1 is outside", queries, table, positives, torch.tensor([-1]))
    refuses(ValueError, "first must be in", queries, table, positives, first=6)
    refuses(ValueError, "first must be 0", queries, table, positives, negatives, first=1)
    refuses(ValueError, r"bias must have shape \[5\]", queries, table, positives, bias=torch.zeros(4))
    refuses(ValueError, "log_expected must be None", queries, table, positives, log_expected=torch.zeros(5))
    shape = r"log_expected must have shape \[2\]"
    refuses(ValueError, shape, queries, table, positives, negatives, log_expected=torch.zeros(3, 2))
    learnt = torch.zeros(2, requires_grad=True)
    refuses(ValueError, "must not require", queries, table, positives, negatives, log_expected=learnt)
    refuses(ValueError, "loss must be one of softmax", queries, table, positives, loss="hinge")
    refuses(ValueError, "normalize must be one of", queries, table, positives, normalize="queries")
    refuses(ValueError, "scale must be finite", queries, table, positives, scale=math.inf)
    refuses(ValueError, "weight must be finite and at least 0", queries, table, positives, weight=-1.0)
    wrong = torch.tensor([1]), torch.tensor([0, 1, 1, 2])
    refuses(ValueError, r"exclude\[1\]\[-1\] must be 1", queries, table, positives, exclude=wrong)
    wrong = torch.tensor([9]), torch.tensor([0, 1, 1, 1])
    refuses(OutOfRange, r"exclude\[0\]\[0\] = 9", queries, table, positives, exclude=wrong)
