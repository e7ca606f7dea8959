"""The probabilities of all sets of a few items sum to 1, and the loss is what it says."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import nn, ops


def make(users, items, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(users, items, width, generator=generator, dtype=dtype)
    return rows, torch.randn(users, items, generator=generator, dtype=dtype)


@given(
    items=st.integers(0, 8),
    width=st.integers(1, 10),
    gamma=st.sampled_from([0.0, 0.1, 1.0]),
    alpha=st.sampled_from([0.0, 0.5, 1.5]),
    with_relevance=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_sums_to_one(items, width, gamma, alpha, with_relevance, masked, seed):
    features, relevance = make(1, items, width, seed)
    mask = torch.rand(1, items, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    some = range(items) if mask is None else mask[0].nonzero()[:, 0].tolist()
    sets = [s for size in range(len(some) + 1) for s in itertools.combinations(some, size)]
    padded = torch.tensor([[*s, *[-1] * (items - len(s))] for s in sets], dtype=torch.int64).reshape(len(sets), items)
    loss = nn.DPPLoss(alpha=alpha, gamma=gamma, reduction="none")
    count = len(sets)
    value = loss(
        features.expand(count, -1, -1),
        padded,
        relevance.expand(count, -1) if with_relevance else None,
        None if mask is None else mask.expand(count, -1),
    )
    assert value.shape == (count,)
    assert float(torch.exp(-value).sum()) == pytest.approx(1.0, abs=1e-9)


def test_known_values():
    # Two items at a right angle, q^2 = 1 and e^2: (1 + 1)(1 + e^2).
    features = torch.eye(2, dtype=torch.float64)[None]
    relevance = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    whole = math.log(2 * (1 + math.e**2))
    assert float(nn.dpp_log_normaliser(features, relevance)) == pytest.approx(whole)
    assert float(nn.DPPLoss()(features, torch.tensor([[1, -1]]), relevance)) == pytest.approx(whole - 2)
    assert float(nn.DPPLoss()(features, torch.tensor([[0, 0]]), relevance)) == math.inf
    assert float(nn.DPPLoss()(features[:0], torch.zeros(0, 2, dtype=torch.int64))) == 0.0
    both = nn.DPPLoss(reduction="sum")(features.expand(2, 2, 2), torch.tensor([[1], [0]]), relevance.expand(2, 2))
    assert float(both) == pytest.approx(2 * whole - 2)


@pytest.mark.parametrize("gamma", [0.0, 0.2])
@pytest.mark.parametrize("width", [3, 8])
def test_gradcheck(width, gamma):
    features, relevance = make(2, 5, width, 1)
    sets = torch.tensor([[0, 3, -1], [4, 1, 2]])
    mask = torch.tensor([[True] * 5, [False, *[True] * 4]])
    loss = nn.DPPLoss(alpha=0.7, gamma=gamma)
    inputs = features.requires_grad_(), relevance.requires_grad_()
    assert torch.autograd.gradcheck(lambda f, r: loss(f, sets, r, mask), inputs)
    assert torch.autograd.gradgradcheck(lambda f, r: loss(f, sets, r, mask), inputs)


def test_learns_what_goes_together():
    """Sets drawn from a known kernel: the likelihood of the learned one comes near that of the true one."""
    truth, _ = make(1, 10, 4, 3)
    truth = torch.nn.functional.normalize(truth, dim=-1)
    drawn = ops.kdpp_sample(truth, 3, seed=0, samples=400).indices[0]
    loss = nn.DPPLoss()
    features = torch.nn.Parameter(0.5 * make(1, 10, 4, 4)[0])
    optimizer = torch.optim.Adam([features], lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(features.expand(400, -1, -1), drawn)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0] - 1
    # The true kernel, scaled to sets of three: the best of its scales.
    best = min(float(loss(scale * truth.expand(400, -1, -1), drawn)) for scale in (1.0, 1.5, 2.0, 3.0, 4.0))
    assert losses[-1] < best + 0.1


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: nn.DPPLoss(gamma=2), ValueError, r"DPPLoss: gamma must be in \[0, 1\], got 2"),
        (
            lambda x: nn.DPPLoss(reduction="max"),
            ValueError,
            "DPPLoss: reduction must be one of mean, sum, none, got 'max'",
        ),
        (lambda x: nn.DPPLoss()(x, torch.tensor([[3]])), IndexError, r"DPPLoss: sets\[0\] = 3 is outside \[0, 3\)"),
        (lambda x: nn.DPPLoss()(x[0], torch.tensor([[0]])), ValueError, r"features must have shape \[U, N, D\]"),
        (
            lambda x: nn.DPPLoss()(x, torch.tensor([[0, 2]]), mask=torch.tensor([[True, True, False]])),
            ValueError,
            r"DPPLoss: sets\[0, 1\] = 2 is not a candidate by mask",
        ),
        (lambda x: nn.dpp_log_normaliser(x, gamma=-1.0), ValueError, r"dpp_log_normaliser: gamma must be in \[0, 1\]"),
        (
            lambda x: nn.dpp_log_normaliser(x, x[..., 0, 0]),
            ValueError,
            r"relevance must have shape \[1, 3\], got \[1\]",
        ),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.ones(1, 3, 2))
