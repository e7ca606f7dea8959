"""nn.TargetAttention and the interaction blocks."""

import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
        ({"hidden": (4, 257)}, "hidden widths must be at most 256, got 257"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dice_momentum": 2.0}, r"dice_momentum must lie in \[0, 1\], got 2.0"),
        ({"mode": "mean"}, "mode must be one of sum, sigmoid, softmax, got 'mean'"),
    ],
)
def test_rejects_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TargetAttention(4, **options)


def arguments(seed=0, lengths=(5, 0, 8), candidates=(2, 1, 3), dim=6):
    generator = torch.Generator().manual_seed(seed)
    offsets, rows = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (lengths, candidates))
    query, keys = (torch.randn(n, dim, generator=generator) for n in (sum(candidates), sum(lengths)))
    return query, keys, offsets, rows


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("hidden", [(12, 7), (9,)])
def test_dice_follows_the_batches_and_evaluates_by_them(hidden, affine):
    torch.manual_seed(0)
    unit = TargetAttention(6, hidden, activation="dice", dice_affine=affine, dice_momentum=0.25, dice_eps=1e-5)
    norm = torch.nn.BatchNorm1d(sum(hidden), momentum=0.25, affine=False)
    learned = {name for name, _ in unit.named_parameters()}
    assert learned >= {"alpha"} | ({"gain", "shift"} if affine else set())
    for seed in range(4):
        batch = arguments(seed)
        out = unit(*batch)
        weights = ops.DINWeights(unit.w1, unit.b1, unit.w2, unit.b2, unit.w3, unit.b3)
        dice = ops.DiceWeights(
            unit.alpha, torch.zeros(sum(hidden)), torch.ones(sum(hidden)), unit.gain, unit.shift, 1e-5
        )
        wanted, statistics = ops.din_attention.reference(
            *batch[:3], weights, candidate_offsets=batch[3], activation="dice", dice=dice, training=True
        )
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
        # What batch norm would have learned from rows with these statistics: 5 * 2 + 8 * 3 pairs.
        mean, variance = statistics
        norm.running_mean.lerp_(mean, 0.25)
        norm.running_var.lerp_(variance * 34 / 33, 0.25)
    torch.testing.assert_close(unit.running_mean, norm.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unit.running_variance, norm.running_var, rtol=1e-4, atol=1e-5)
    unit.eval()
    before = {name: value.clone() for name, value in unit.state_dict().items()}
    dice = dice._replace(mean=unit.running_mean, variance=unit.running_variance)
    wanted = ops.din_attention.reference(*batch[:3], weights, candidate_offsets=batch[3], activation="dice", dice=dice)
    torch.testing.assert_close(unit(*batch), wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in unit.state_dict().items())


def test_a_batch_of_one_pair_leaves_the_running_statistics():
    unit = TargetAttention(6, (4,), activation="dice")
    torch.nn.init.ones_(unit.running_mean)
    query, keys, _, _ = arguments()
    unit(query[:1], keys[:1], torch.tensor([0, 1])).sum().backward()
    assert torch.equal(unit.running_mean, torch.ones(4))
    assert torch.equal(unit.running_variance, torch.ones(4))
    assert unit.alpha.grad.isfinite().all()


def layered(unit, batch):
    """The unit as libraries write it: torch's own layers over the concatenation, user by user."""
    query, keys, offsets, rows = batch
    users = torch.arange(len(rows) - 1).repeat_interleave(rows.diff())
    k = torch.cat([keys[offsets[user] : offsets[user + 1]] for user in users])
    lengths = offsets.diff()[users]
    q = query.repeat_interleave(lengths, 0)
    hidden = torch.cat([q, k, q - k, q * k], 1)
    layers = [(unit.w1, unit.b1), (unit.w2, unit.b2)][: len(unit.hidden)]
    for layer, (w, b) in enumerate(layers):
        hidden = hidden @ w + b
        if unit.batch_norm:
            hidden = unit.norms[layer](hidden)
        hidden = torch.nn.functional.prelu(hidden, unit.slope[layer : layer + 1])
        hidden = torch.nn.functional.dropout(hidden, unit.dropout, unit.training)
    score = hidden @ unit.w3 + unit.b3
    owner = torch.arange(len(query)).repeat_interleave(lengths)
    return torch.zeros(len(query), keys.shape[1]).index_add(0, owner, score * k)


class Recorder(TorchDispatchMode):
    """The ops that are called."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"batch_norm": True}, {"dropout": 0.25, "batch_norm": True}])
@pytest.mark.parametrize("hidden", [(12, 7), (9,)])
def test_dropout_and_batch_norm_run_unfused_and_say_so(hidden, options):
    torch.manual_seed(0)
    unit = TargetAttention(6, hidden, **options)
    twin = copy.deepcopy(unit)
    batch = arguments()
    torch.manual_seed(1)
    sentence = r"unfused form in training, which holds about \d+ bytes for each pair .* 34 pairs"
    with pytest.warns(UserWarning, match=sentence):
        out = unit(*batch)
    torch.manual_seed(1)
    wanted = layered(twin, batch)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in unit.named_parameters()]
    ours = torch.autograd.grad(out.square().sum(), list(unit.parameters()))
    theirs = torch.autograd.grad(wanted.square().sum(), list(twin.parameters()))
    for name, have, want in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4 * float(want.abs().max() + 1), msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in (unit, lambda *same: layered(twin, same)):  # said once; the same dropout for both
            torch.manual_seed(2)
            run(*batch)
        # Outside training dropout does nothing and batch norm is folded into the weights: fused, without a word.
        unit.eval()
        twin.eval()
        calls = []
        with Recorder(calls):
            out = unit(*batch)
        assert torch.ops.recfast.din_attention.default in calls
        torch.testing.assert_close(out, layered(twin, batch), rtol=1e-4, atol=1e-5)


def test_unfused_arguments_are_checked_too():
    unit = TargetAttention(6, (4,), dropout=0.5)
    query, keys, offsets, rows = arguments()
    with pytest.raises(ValueError, match=r"offsets\[-1\] must be 12, the number of rows it cuts, got 13"):
        unit(query, keys[:-1], offsets, rows)


def test_bfloat16_rows_meet_float32_weights():
    torch.manual_seed(0)
    unit = TargetAttention(6, (12, 7))
    query, keys, offsets, rows = arguments()
    out = unit(query.bfloat16(), keys.bfloat16(), offsets, rows)
    assert out.dtype == torch.bfloat16
    assert (out.float() - unit(query, keys, offsets, rows)).norm() <= 0.05 * out.float().norm()
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in unit.parameters())


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


@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_it_compiles_in_one_graph(activation):
    torch.manual_seed(0)
    unit = TargetAttention(6, (12, 7), activation=activation)
    twin = copy.deepcopy(unit)
    batch = arguments()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    out, wanted = compiled(*batch), unit(*batch)
    assert torch.equal(out, wanted)
    ours, theirs = (
        torch.autograd.grad(x.square().sum(), list(m.parameters())) for x, m in ((out, twin), (wanted, unit))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), unit.buffers(), strict=True))
