"""Blocks against their formulas, written plainly."""

import pytest
import torch

from recfast.nn import CrossNetV2


def plain(net, x):
    """Equations 1 to 4 of the paper for one row, in loops over layers and experts."""
    first, layer_input = x, x
    for layer in range(net.layers):
        bias = net.bias[layer]
        if net.rank is None:
            mapped = net.full[layer].T @ layer_input + bias
        elif net.experts == 1:
            mapped = net.up[layer, 0].T @ (net.down[layer, 0].T @ layer_input) + bias
        else:
            gates = torch.exp(net.gate.weight @ layer_input + net.gate.bias)
            mapped = torch.zeros_like(first)
            for expert in range(net.experts):
                inner = torch.tanh(net.down[layer, expert].T @ layer_input)
                inner = torch.tanh(net.core[layer, expert].T @ inner)
                mapped = mapped + gates[expert] / gates.sum() * (net.up[layer, expert].T @ inner + bias)
        layer_input = first * mapped + layer_input
    return layer_input


OPTIONS = [{}, {"rank": 2}, {"rank": 3, "experts": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layers", [1, 3])
def test_cross_net_matches_formula(options, layers):
    torch.manual_seed(1)
    net = CrossNetV2(5, layers, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.5)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([plain(net, row) for row in x])
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(7, 5, dtype=torch.float64)
    leaves = [x, *net.parameters()]
    ours = torch.autograd.grad((net(x) * upstream).sum(), leaves)
    theirs = torch.autograd.grad((expected * upstream).sum(), leaves)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    assert net(x[:0]).shape == (0, 5)


def test_cross_net_known_values():
    """One layer with W = [[0, 1], [0, 0]] and b = (1, 0): (x1, x2) -> (x1 (x2 + 1) + x1, x2)."""
    net = CrossNetV2(2, 1)
    with torch.no_grad():
        net.full.copy_(torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]))
        net.bias.copy_(torch.tensor([[1.0, 0.0]]))
    assert net(torch.tensor([[2.0, 3.0], [-1.0, 0.5]])).tolist() == [[10.0, 3.0], [-2.5, 0.5]]


def test_cross_net_starts_as_xavier():
    """Every matrix by itself: the bound is that of d x r, not of the whole stack."""
    torch.manual_seed(0)
    net = CrossNetV2(60, 2, rank=40, experts=3)
    for stack, fan in ((net.down, 100), (net.up, 100), (net.core, 80)):
        bound = (6 / fan) ** 0.5
        assert 0.95 * bound < stack.abs().max() <= bound
    assert not net.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "CrossNetV2: layers must be at least 1, got 0"),
        ({"rank": 0}, r"CrossNetV2: rank must lie in \[1, 4\), below the width, got 0"),
        ({"rank": 4}, "below the width, got 4"),
        ({"experts": 0}, "CrossNetV2: experts must be at least 1, got 0"),
        ({"experts": 2}, "CrossNetV2: 2 experts need a rank"),
    ],
)
def test_cross_net_rejects_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        CrossNetV2(4, **{"layers": 1, **options})
