"""Losses of retrieval against loops over their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from recfast.nn.losses import (
    NegativesLoss,
    collisions,
    cosine_contrastive,
    gbce_weights,
    pairwise_ranking,
    sampled_softmax,
)


def scores(rows: int, columns: int, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(rows, columns + 1, generator=generator, dtype=torch.float64) * 2 - 1
    return draw[:, 0] * scale, draw[:, 1:] * scale


def naive_sampled_softmax(positive, negatives, log_expected, collision):
    terms = []
    for i in range(len(positive)):
        total = math.exp(positive[i])
        for j in range(negatives.shape[1]):
            if not collision[i, j]:
                total += math.exp(negatives[i, j]) / math.exp(log_expected[j])
        terms.append(math.log(total) - float(positive[i]))
    return terms


def naive_cosine_contrastive(positive, negatives, margin, weight, collision):
    terms = []
    for i in range(len(positive)):
        counted = [float(negatives[i, j]) for j in range(negatives.shape[1]) if not collision[i, j]]
        mean = sum(max(0.0, s - margin) for s in counted) / max(len(counted), 1)
        terms.append(1.0 - float(positive[i]) + weight * mean)
    return terms


@given(st.integers(0, 5), st.integers(0, 7), st.integers(0, 10_000))
def test_losses_match_their_formulas(rows, columns, seed):
    positive, negatives = scores(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    collision = torch.rand(rows, columns, generator=generator) < 0.3
    log_expected = torch.randn(columns, generator=generator, dtype=torch.float64)
    softmax = sampled_softmax(positive, negatives, log_expected=log_expected, collision=collision, reduction="none")
    contrastive = cosine_contrastive(positive, negatives, margin=0.2, weight=3.0, collision=collision, reduction="none")
    wanted = naive_sampled_softmax(positive, negatives, log_expected, collision)
    torch.testing.assert_close(softmax, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    wanted = naive_cosine_contrastive(positive, negatives, 0.2, 3.0, collision)
    torch.testing.assert_close(contrastive, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_known_values():
    positive, negatives = torch.tensor([0.5]), torch.tensor([[0.7, 0.1]])
    assert cosine_contrastive(positive, negatives, margin=0.5, weight=10.0).item() == pytest.approx(0.5 + 5 * 0.2)
    # The second negative costs nothing, and is not counted when it is the positive itself.
    collision = torch.tensor([[False, True]])
    assert cosine_contrastive(positive, negatives, collision=collision).item() == pytest.approx(0.5 + 10 * 0.2)
    zeros = torch.zeros(1, 3)
    assert sampled_softmax(torch.zeros(1), zeros).item() == pytest.approx(math.log(4))


def test_gradients():
    positive, negatives = scores(4, 6, seed=3)
    positive.requires_grad_()
    negatives.requires_grad_()
    collision = torch.zeros(4, 6, dtype=torch.bool)
    collision[0] = True
    collision[1, 2] = True
    log_expected = torch.linspace(-1, 1, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p, n: sampled_softmax(p, n, log_expected=log_expected, collision=collision), (positive, negatives)
    )
    assert torch.autograd.gradcheck(
        lambda p, n: cosine_contrastive(p, n, margin=0.25, weight=4.0, collision=collision), (positive, negatives)
    )


def test_every_item_once_is_the_full_softmax():
    """With each item of the catalogue as one column and the own one masked, nothing is estimated any more."""
    catalogue = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([0, 8, 3, 3, 1, 5])
    own = catalogue.gather(1, target[:, None])[:, 0]
    loss = sampled_softmax(own, catalogue, collision=collisions(target, torch.arange(9)))
    torch.testing.assert_close(loss, F.cross_entropy(catalogue, target))


def test_correction_makes_the_partition_sum_unbiased():
    """The mean over many samples of the sum of exponentials is the sum over the catalogue, whatever is drawn from."""
    generator = torch.Generator().manual_seed(1)
    catalogue = torch.randn(20, generator=generator, dtype=torch.float64)
    share = torch.softmax(2 * torch.randn(20, generator=generator, dtype=torch.float64), 0)
    positive, draws, columns = 4, 20_000, 8
    ids = torch.multinomial(share, draws * columns, replacement=True, generator=generator).view(draws, columns)
    terms = sampled_softmax(
        catalogue[positive].expand(draws),
        catalogue[ids],
        log_expected=(columns * share[ids]).log(),
        collision=ids == positive,
        reduction="none",
    )
    partition = (terms + catalogue[positive]).exp()
    error = 4 * partition.std() / draws**0.5
    assert abs(partition.mean() - catalogue.exp().sum()) < error
    uncorrected = sampled_softmax(
        catalogue[positive].expand(draws), catalogue[ids], collision=ids == positive, reduction="none"
    )
    assert abs((uncorrected + catalogue[positive]).exp().mean() - catalogue.exp().sum()) > error


def test_large_scores_stay_finite():
    positive, negatives = torch.tensor([200.0, -200.0]), torch.tensor([[-200.0, 190.0], [200.0, 0.0]])
    assert torch.isfinite(sampled_softmax(positive, negatives, reduction="none")).all()


def test_reductions_and_no_rows():
    positive, negatives = scores(3, 4, seed=5)
    for loss in (sampled_softmax, cosine_contrastive):
        each = loss(positive, negatives, reduction="none")
        assert each.shape == (3,)
        torch.testing.assert_close(loss(positive, negatives), each.mean())
        torch.testing.assert_close(loss(positive, negatives, reduction="sum"), each.sum())
        assert loss(positive[:0], negatives[:0]).item() == 0.0


def test_rejects_bad_input():
    positive, negatives = scores(3, 4, seed=5)
    with pytest.raises(ValueError, match=r"positive is \[2\] and negatives \[3, 4\]"):
        sampled_softmax(positive[:2], negatives)
    with pytest.raises(ValueError, match=r"expected bool \[3, 4\]"):
        cosine_contrastive(positive, negatives, collision=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="reduction = 'max'"):
        sampled_softmax(positive, negatives, reduction="max")


def drawn(seed: int, rows: int = 7, items: int = 20, columns: int = 9, dim: int = 6):
    generator = torch.Generator().manual_seed(seed)
    queries, table = (torch.randn(n, dim, generator=generator) for n in (rows, items))
    positives = torch.randint(0, items, (rows,), generator=generator)
    return queries, table, positives, torch.randint(0, items, (columns,), generator=generator), generator


def test_negatives_loss_is_the_functions_of_its_scores():
    queries, table, positives, negatives, generator = drawn(0)
    log_expected = torch.randn(9, generator=generator)
    collision = collisions(positives, negatives)
    own, others = (queries * table[positives]).sum(1), queries @ table[negatives].T
    for temperature in (1.0, 0.25):
        loss = NegativesLoss(temperature=temperature)(queries, table, positives, negatives, log_expected=log_expected)
        scores = own / temperature, others / temperature
        torch.testing.assert_close(loss, sampled_softmax(*scores, log_expected=log_expected, collision=collision))
    pairwise = NegativesLoss("bpr", reduction="sum")(queries, table, positives, negatives)
    torch.testing.assert_close(pairwise, pairwise_ranking(own, others, collision=collision, reduction="sum"))
    length = table.norm(dim=1)
    own, others = own / length[positives], others / length[negatives]
    for skip in (True, False):
        options = {"margin": 0.1, "weight": 3.0, "reduction": "none"}
        loss = NegativesLoss("contrastive", normalize="table", skip_positive=skip, **options)
        wanted = cosine_contrastive(own, others, collision=collision if skip else None, **options)
        torch.testing.assert_close(loss(queries, table, positives, negatives), wanted)
    everything = NegativesLoss()(queries, table, positives)
    torch.testing.assert_close(everything, F.cross_entropy(queries @ table.T, positives))
    assert NegativesLoss()(queries[:0], table, positives[:0]).item() == 0.0


def test_negatives_loss_gives_sparse_gradients_where_asked():
    queries, table, positives, negatives, _ = drawn(1)
    loss = NegativesLoss()
    dense, rows = table.requires_grad_(), table.detach().requires_grad_()
    loss(queries, dense, positives, negatives).backward()
    loss.sparse = True
    loss(queries, rows, positives, negatives).backward()
    assert rows.grad.is_sparse
    assert torch.equal(rows.grad.to_dense(), dense.grad)
    rows.grad = None
    loss(queries, rows, positives).backward()
    assert not rows.grad.is_sparse


def test_negatives_loss_takes_half_precision_queries_of_autocast():
    queries, table, positives, negatives, _ = drawn(2)
    loss = NegativesLoss()(queries.bfloat16(), table, positives, negatives)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, NegativesLoss()(queries.bfloat16().float(), table, positives, negatives))


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 100))
def test_gbce(columns, calibration, seed):
    queries, table, positives, negatives, _ = drawn(seed, columns=columns)
    loss = NegativesLoss("bce", skip_positive=False, **gbce_weights(columns, len(table), calibration))
    own, others = (queries * table[positives]).sum(1).double(), (queries @ table[negatives].T).double()
    alpha = columns / (len(table) - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    wanted = -(beta * F.logsigmoid(own) + F.logsigmoid(-others).sum(1)) / (columns + 1)
    torch.testing.assert_close(loss(queries, table, positives, negatives).double(), wanted.mean(), rtol=1e-5, atol=1e-6)


def test_gbce_between_its_ends():
    assert gbce_weights(4, 11, 0.0) == pytest.approx({"weight": 0.8, "positive_weight": 0.2})
    assert gbce_weights(4, 11, 1.0) == pytest.approx({"weight": 0.8, "positive_weight": 0.4 * 0.2})
    with pytest.raises(ValueError, match="gbce_weights: negatives = 0"):
        gbce_weights(0, 11, 0.5)


def test_negatives_loss_rejects_bad_options():
    with pytest.raises(ValueError, match="NegativesLoss: loss = 'hinge' is not one of 'softmax'"):
        NegativesLoss("hinge")
    with pytest.raises(ValueError, match="NegativesLoss: normalize = 'queries'"):
        NegativesLoss(normalize="queries")
    with pytest.raises(ValueError, match="NegativesLoss: temperature = 0 is not above 0"):
        NegativesLoss(temperature=0)
