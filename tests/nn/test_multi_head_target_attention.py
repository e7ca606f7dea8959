"""nn.MultiHeadTargetAttention against the layers it stands for, written as they were published."""

import pytest
import torch

from recfast.nn import MultiHeadTargetAttention


def batch(query_dim=12, dim=12, dtype=torch.float64):
    """Three users with 5, 0 and 9 steps and 2, 1 and 3 candidates: (query, keys, offsets, candidate_offsets)."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, query_dim, generator=generator, dtype=dtype)
    keys = torch.randn(14, dim, generator=generator, dtype=dtype)
    return query, keys, torch.tensor([0, 5, 5, 14]), torch.tensor([0, 2, 3, 6])


def expanded(query, keys, offsets, rows):
    """The layout of the libraries: one row a candidate, histories padded and copied, a mask."""
    users = torch.arange(3).repeat_interleave(rows.diff())
    padded, mask = keys.new_zeros(6, 9, keys.shape[1]), torch.zeros(6, 9)
    for c, user in enumerate(users):
        history = keys[offsets[user] : offsets[user + 1]]
        padded[c, : len(history)] = history
        mask[c, : len(history)] = 1
    return query, padded, mask


def fuxictr(layer, target_item, history_sequence, mask):
    """FuxiCTR's MultiHeadTargetAttention.forward, with its own names."""
    query, key, value = layer.w_q(target_item), layer.w_k(history_sequence), layer.w_v(history_sequence)
    batch_size, heads, head_dim = query.size(0), layer.heads, layer.attention_dim // layer.heads
    query = query.view(batch_size, 1, heads, head_dim).transpose(1, 2)
    key = key.view(batch_size, -1, heads, head_dim).transpose(1, 2)
    value = value.view(batch_size, -1, heads, head_dim).transpose(1, 2)
    scores = torch.matmul(query, key.transpose(-1, -2)) / head_dim**0.5
    scores = scores.masked_fill_(mask.view(batch_size, 1, 1, -1).expand_as(scores).float() == 0, -1.0e9)
    output = torch.matmul(scores.softmax(dim=-1), value)
    return layer.w_o(output.transpose(1, 2).contiguous().view(-1, heads * head_dim))


def qin(layer, target, history, mask):
    """QIN: one head, no softmax, the target added."""
    q, k, v = layer.w_q(target).unsqueeze(1), layer.w_k(history), layer.w_v(history)
    weights = torch.relu(torch.bmm(q, k.transpose(1, 2)) / q.shape[-1] ** 0.5 * mask.unsqueeze(1))
    return layer.w_o(torch.bmm(weights, v).squeeze(1)) + target


@pytest.mark.parametrize("fold", [False, True])
def test_it_is_the_layer_of_fuxictr(fold):
    torch.manual_seed(0)
    layer = MultiHeadTargetAttention(12, 3, attention_dim=6, fold=fold).double()
    arguments = batch()
    answer = layer(*arguments)
    wanted = fuxictr(layer, *expanded(*arguments))
    some = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(answer[some], wanted[some])
    # Theirs is the mean of the padding for a history without steps, ours is 0.
    assert not answer[2].any()
    assert {name for name, _ in layer.named_parameters()} == {f"w_{x}.weight" for x in "qkvo"}


@pytest.mark.parametrize("fold", [False, True])
def test_it_is_the_layer_of_qin(fold):
    torch.manual_seed(0)
    layer = MultiHeadTargetAttention(12, 1, score="relu", residual=True, fold=fold).double()
    arguments = batch()
    answer = layer(*arguments)
    torch.testing.assert_close(answer, qin(layer, *expanded(*arguments)))
    assert torch.equal(answer[2], arguments[0][2])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"score": "silu"}, {"scale": False}, {"scale": 0.3}])
def test_folding_changes_only_the_rounding(options):
    torch.manual_seed(0)
    plain = MultiHeadTargetAttention(12, 2, query_dim=5, attention_dim=8, out_dim=7, **options).double()
    folded = MultiHeadTargetAttention(12, 2, query_dim=5, attention_dim=8, out_dim=7, fold=True, **options).double()
    folded.load_state_dict(plain.state_dict())
    query, keys, offsets, rows = batch(query_dim=5)
    answers = []
    for layer in (plain, folded):
        leaves = [query.clone().requires_grad_(), keys.clone().requires_grad_(), *layer.parameters()]
        answer = layer(leaves[0], leaves[1], offsets, rows)
        assert answer.shape == (6, 7)
        answers.append([answer, *torch.autograd.grad(answer.square().sum(), leaves)])
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b)
    one_each = [layer(query[:3], keys, offsets) for layer in (plain, folded)]
    torch.testing.assert_close(*one_each)


def test_padded_equals_jagged():
    torch.manual_seed(0)
    query, keys, offsets, rows = batch()
    lengths = offsets.diff()
    padded = torch.full((3, 9, 12), float("nan"), dtype=torch.float64)
    for user in range(3):
        padded[user, : lengths[user]] = keys[offsets[user] : offsets[user + 1]]
    for options in ({}, {"top_k": 2}, {"projections": False}, {"fold": True}, {"fold": True, "top_k": 2}):
        layer = MultiHeadTargetAttention(12, 3, **options).double()
        torch.testing.assert_close(layer(query, padded, lengths, rows), layer(query, keys, offsets, rows))


def test_without_projections_keys_and_values_are_read_as_they_are():
    query, keys, offsets, rows = batch()
    values = torch.randn(14, 6, dtype=torch.float64)
    layer = MultiHeadTargetAttention(12, 2, value_dim=6, projections=False)
    assert not list(layer.parameters())
    answer = layer(query, keys, offsets, rows, values)
    split = (x.unflatten(1, (2, -1)).transpose(0, 1) for x in (query[3:], keys[5:], values[5:]))
    wanted = torch.nn.functional.scaled_dot_product_attention(*split).transpose(0, 1).flatten(1)
    torch.testing.assert_close(answer[3:], wanted)


def test_positions_and_biases():
    torch.manual_seed(0)
    query, keys, offsets, rows = batch()
    layer = MultiHeadTargetAttention(12, 2, bias=True).double()
    positions = torch.tensor([[0, 3], [4, -1], [-1, -1], [8, 0], [1, 2], [5, -1]])
    answer = layer(query, keys, offsets, rows, positions=positions)
    torch.testing.assert_close(answer[2], layer.w_o.bias)
    # One row alone has weight 1, whatever its score.
    torch.testing.assert_close(answer[1], layer.w_o(layer.w_v(keys[4])))
    torch.testing.assert_close(answer[5], layer.w_o(layer.w_v(keys[5 + 5])))
    alone = layer(query[:1], keys[[0, 3]], torch.tensor([0, 2]))
    torch.testing.assert_close(answer[:1], alone)


@pytest.mark.parametrize("options", [{}, {"score": "relu", "residual": True}, {"top_k": 2}, {"fold": True}])
def test_every_parameter_learns(options):
    torch.manual_seed(0)
    layer = MultiHeadTargetAttention(12, 2, **options)
    query, keys, offsets, rows = batch(dtype=torch.float32)
    target = torch.randn(6, 12)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = (layer(query, keys, offsets, rows) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 5}, "heads must divide attention_dim = 12, got 5"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"score": "max"}, "score must be one of softmax, relu, silu, none, got 'max'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"projections": False, "query_dim": 6}, "query_dim must be 12 without projections, got 6"),
        ({"projections": False, "out_dim": 6}, "out_dim must be 12 without projections, got 6"),
        ({"projections": False, "value_dim": 7}, "heads must divide value_dim = 7, got 2"),
        ({"residual": True, "query_dim": 6}, "out_dim must be query_dim = 6 with residual, got 12"),
        ({"fold": True, "bias": True}, "fold needs projections without bias"),
    ],
)
def test_rejects_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MultiHeadTargetAttention(12, **{"heads": 2, **options})


def test_rejects_bad_arguments():
    query, keys, offsets, rows = batch()
    with pytest.raises(ValueError, match="values must be left out, since value_dim was"):
        MultiHeadTargetAttention(12, 2, projections=False)(query, keys, offsets, rows, keys)
    with pytest.raises(ValueError, match="values must be given, since value_dim was"):
        MultiHeadTargetAttention(12, 2, value_dim=12, projections=False)(query, keys, offsets, rows)
