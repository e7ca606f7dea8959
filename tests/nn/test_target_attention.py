"""nn.TargetAttention and the interaction blocks."""

import pytest
import torch

from recfast import ops
from recfast.nn import MLP, Dice, TargetAttention, fm_interaction


@pytest.mark.parametrize("hidden", [(12, 7), (9,)])
@pytest.mark.parametrize("activation", ["prelu", "relu", "sigmoid", "silu"])
def test_module_is_the_op_over_its_weights(hidden, activation):
    torch.manual_seed(0)
    unit = TargetAttention(6, hidden, activation=activation, mode="softmax")
    query, keys, values = torch.randn(3, 6), torch.randn(8, 6), torch.randn(8, 2)
    offsets, rows = torch.tensor([0, 5, 8]), torch.tensor([0, 1, 3])
    answer = unit(query, keys, offsets, rows, values)
    weights = ops.DINWeights(unit.w1, unit.b1, unit.w2, unit.b2, unit.w3, unit.b3, unit.slope)
    wanted = ops.din_attention.reference(
        query, keys, offsets, weights, values=values, candidate_offsets=rows, activation=activation, mode="softmax"
    )
    torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)
    names = {name for name, _ in unit.named_parameters()}
    assert names == {"w1", "b1", "w3", "b3"} | ({"w2", "b2"} if len(hidden) == 2 else set()) | (
        {"slope"} if activation == "prelu" else set()
    )
    assert set(unit.state_dict()) == names


def test_it_learns_which_steps_match():
    """The target weighs each step by its dot product with the candidate: no weight that ignores either one fits it."""
    torch.manual_seed(0)
    unit = TargetAttention(4, (16, 8))
    optimizer = torch.optim.Adam(unit.parameters(), lr=0.01)
    offsets = torch.arange(65) * 6
    losses, sizes = [], []
    for _ in range(300):
        query, keys = torch.randn(64, 4), torch.randn(64 * 6, 4)
        weight = (query.repeat_interleave(6, 0) * keys).sum(1, keepdim=True)
        target = (weight * keys).view(64, 6, 4).sum(1)
        loss = (unit(query, keys, offsets) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        sizes.append(target.square().mean().item())
    assert sum(losses[-20:]) < 0.1 * sum(sizes[-20:])


def test_an_empty_history_gives_zero():
    unit = TargetAttention(4, mode="softmax")
    torch.nn.init.ones_(unit.b3)
    assert not unit(torch.randn(2, 4), torch.randn(0, 4), torch.tensor([0, 0, 0])).any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hidden": ()}, "one or two hidden widths must be positive"),
        ({"hidden": (4, 4, 4)}, "one or two hidden widths must be positive"),
        ({"hidden": (0,)}, "hidden widths must be positive"),
        ({"activation": "gelu"}, "activation must be one of prelu, relu, sigmoid, silu, dice, got 'gelu'"),
        ({"mode": "mean"}, "mode must be one of sum, sigmoid, softmax, got 'mean'"),
    ],
)
def test_rejects_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TargetAttention(4, **options)


def test_fm_interaction_is_the_sum_over_pairs():
    fields = torch.randn(5, 4, 3, dtype=torch.float64)
    wanted = sum((fields[:, i] * fields[:, j]).sum(-1) for i in range(4) for j in range(i))
    torch.testing.assert_close(fm_interaction(fields), wanted)


def test_dice_is_its_formula():
    dice = Dice(3).double()
    torch.nn.init.normal_(dice.alpha)
    x = torch.randn(50, 3, dtype=torch.float64)
    p = torch.sigmoid((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-8).sqrt())
    torch.testing.assert_close(dice(x), p * x + (1 - p) * dice.alpha * x)
    assert dice(x[:1]).isfinite().all()
    dice.eval()
    mean, variance = dice.norm.running_mean, dice.norm.running_var
    p = torch.sigmoid((x - mean) / (variance + 1e-8).sqrt())
    torch.testing.assert_close(dice(x), p * x + (1 - p) * dice.alpha * x)


def test_mlp_has_the_layers_it_was_asked_for():
    mlp = MLP(5, (7, 3), 2, activation="dice", dropout=0.1)
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "Dice", "Dropout"] * 2 + ["Linear"]
    assert mlp(torch.randn(4, 5)).shape == (4, 2)
    with pytest.raises(ValueError, match="activation must be one of relu, prelu, dice, got 'tanh'"):
        MLP(5, (7,), activation="tanh")
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        MLP(5, (7,), dropout=1)
