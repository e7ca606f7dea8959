"""nn.TransformerBlock against torch's own layers, with the same weights."""

import pytest
import torch
from torch import nn

from recfast.nn import TransformerBlock


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def filled(store, lengths):
    """[B, L, D] -> the rows that count, [T, D]."""
    return torch.cat([row[:length] for row, length in zip(store, lengths, strict=True)])


@pytest.mark.parametrize("lengths", [[12, 12, 12], [12, 1, 7]], ids=["full", "ragged"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_torchs_encoder_layer(lengths, norm, activation, causal):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0.0, activation=activation, norm_first=norm == "pre", batch_first=True
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    block = TransformerBlock(16, 4, hidden=24, causal=causal, norm=norm, activation=activation)
    block.load_state_dict(layer.state_dict())
    x = torch.randn(3, 12, 16)
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1) if causal else None
    padding = torch.arange(12) >= torch.tensor(lengths).unsqueeze(1)
    leaf = x.clone().requires_grad_()
    wanted = layer(leaf, src_mask=mask, src_key_padding_mask=padding)
    wanted = filled(wanted, lengths)
    coefficients = torch.randn_like(wanted)
    wanted_gradients = torch.autograd.grad(wanted, [leaf, *layer.parameters()], coefficients)

    own = filled(x, lengths).requires_grad_()
    answer = block(own, offsets_of(lengths))
    torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)
    parameters = dict(block.named_parameters())
    gradients = torch.autograd.grad(
        answer, [own, *(parameters[name] for name, _ in layer.named_parameters())], coefficients
    )
    torch.testing.assert_close(gradients[0], filled(wanted_gradients[0], lengths), rtol=1e-3, atol=1e-4)
    for have, want in zip(gradients[1:], wanted_gradients[1:], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)

    store = torch.where(padding.unsqueeze(2), float("nan"), x).requires_grad_()
    padded = block(store, torch.tensor(lengths))
    assert not padded[padding].any()
    torch.testing.assert_close(filled(padded, lengths), answer, rtol=1e-5, atol=1e-6)
    padded_gradients = torch.autograd.grad(filled(padded, lengths), [store, *block.parameters()], coefficients)
    assert not padded_gradients[0][padding].any()
    assert all(x.isfinite().all() for x in padded_gradients)


class PublishedSASRec(nn.Module):
    """SASRec's block over torch.nn.MultiheadAttention: queries normalised, keys and values not."""

    def __init__(self, dim, heads, published_code):
        super().__init__()
        self.attention_norm, self.forward_norm = nn.LayerNorm(dim, eps=1e-8), nn.LayerNorm(dim, eps=1e-8)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.first, self.second = nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, dim, 1)
        self.published_code = published_code

    def forward(self, x):
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        queries = self.attention_norm(x)
        x = (queries if self.published_code else x) + self.attention(queries, x, x, attn_mask=mask)[0]
        normal = self.forward_norm(x)
        inner = self.second(torch.relu(self.first(normal.transpose(1, 2)))).transpose(1, 2)
        return (normal if self.published_code else x) + inner


@pytest.mark.parametrize("published_code", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_it_is_sasrecs_block(published_code, heads):
    torch.manual_seed(0)
    theirs = PublishedSASRec(10, heads, published_code)
    # The paper's heads are side by side, without a linear layer after them.
    nn.init.eye_(theirs.attention.out_proj.weight)
    nn.init.zeros_(theirs.attention.out_proj.bias)
    nn.init.normal_(theirs.attention.in_proj_bias)
    for norm in (theirs.attention_norm, theirs.forward_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    ours = TransformerBlock.sasrec(10, heads, published_code=published_code)
    pairs = [
        (ours.self_attn.in_proj_weight, theirs.attention.in_proj_weight),
        (ours.self_attn.in_proj_bias, theirs.attention.in_proj_bias),
        (ours.linear1.weight, theirs.first.weight.squeeze(2)),
        (ours.linear1.bias, theirs.first.bias),
        (ours.linear2.weight, theirs.second.weight.squeeze(2)),
        (ours.linear2.bias, theirs.second.bias),
        (ours.norm1.weight, theirs.attention_norm.weight),
        (ours.norm1.bias, theirs.attention_norm.bias),
        (ours.norm2.weight, theirs.forward_norm.weight),
        (ours.norm2.bias, theirs.forward_norm.bias),
    ]
    assert len(pairs) == len(list(ours.parameters()))
    for mine, other in pairs:
        mine.data.copy_(other.data)
    lengths = [9, 1, 5]
    sequences = [torch.randn(1, length, 10) for length in lengths]
    wanted = torch.cat([theirs(x)[0] for x in sequences])
    answer = ours(torch.cat([x[0] for x in sequences]), offsets_of(lengths))
    torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)


def test_it_is_bert4recs_block():
    """What the publication fixes: both ways, post-norm, GELU, an inner width of 4 D."""
    block = TransformerBlock.bert4rec(8, 2)
    assert not block.causal
    assert (block.norm, block.activation, block.hidden, block.heads) == ("post", "gelu", 32, 2)
    assert TransformerBlock.bert4rec(8, 2, norm="pre").norm == "pre"
    layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True)
    block.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(block(x, torch.tensor([5, 5])), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make", [TransformerBlock.sasrec, lambda dim, heads: TransformerBlock(dim, heads, causal=True)]
)
def test_a_later_event_changes_no_earlier_one(make):
    torch.manual_seed(0)
    block = make(12, 2)
    x = torch.randn(40, 12)
    changed = x.clone()
    changed[25:] = torch.randn(15, 12)
    offsets = torch.tensor([0, 40])
    assert torch.equal(block(x, offsets)[:25], block(changed, offsets)[:25])
    assert not torch.equal(block(x, offsets)[25:], block(changed, offsets)[25:])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_batch_mates_do_not_matter(norm):
    torch.manual_seed(0)
    block = TransformerBlock(12, 3, causal=False, norm=norm)
    x, offsets = torch.randn(30, 12), torch.tensor([0, 11, 11, 30])
    changed = x.clone()
    changed[11:] = torch.randn(19, 12)
    assert torch.equal(block(x, offsets)[:11], block(changed, offsets)[:11])
    # Alone, the matrix products of torch may take another order of sums.
    torch.testing.assert_close(block(x[:11], torch.tensor([0, 11])), block(x, offsets)[:11], rtol=1e-5, atol=1e-6)


def test_dropout_follows_torchs_generator_and_stops_in_evaluation():
    block = TransformerBlock(8, 2, causal=True, dropout=0.3)
    x, offsets = torch.randn(20, 8), torch.tensor([0, 20])
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(block(x, offsets))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    block.eval()
    assert torch.equal(block(x, offsets), block(x, offsets))
    # Only attention weights are dropped: the first event sees itself alone, so it is as in evaluation or is dropped.
    weights = TransformerBlock(8, 1, causal=True, dropout=0.0, attention_dropout=0.5)
    assert not torch.equal(weights(x, offsets), weights(x, offsets))
    # Evaluation is what training gives on average.
    many = torch.stack([weights._attention(x, x, offsets) for _ in range(2000)])
    weights.eval()
    error = (many.mean(0) - weights._attention(x, x, offsets)).abs()
    assert torch.all(error <= 6 * many.std(0) / 2000**0.5 + 1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_compiles_in_one_graph(padded):
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, causal=True, dropout=0.5)
    x, offsets = (
        (torch.randn(2, 6, 8), torch.tensor([6, 2])) if padded else (torch.randn(9, 8), torch.tensor([0, 4, 9]))
    )
    answers = []
    for form in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
        torch.manual_seed(1)  # the same units drop out
        out = form(x, offsets)
        answers.append([out, *torch.autograd.grad(out.square().sum(), block.parameters())])
    torch.testing.assert_close(*answers)


def test_bfloat16():
    torch.manual_seed(0)
    block = TransformerBlock(16, 2, causal=True)
    x, offsets = torch.randn(30, 16), torch.tensor([0, 12, 30])
    wanted = block(x, offsets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = block(x, offsets)
    assert cast.dtype == torch.float32
    assert 0 < (cast - wanted).norm() <= 0.02 * wanted.norm()
    answer = block.bfloat16()(x.bfloat16(), offsets)
    assert answer.dtype == torch.bfloat16
    assert (answer - wanted).norm() <= 0.02 * wanted.norm()


def test_it_learns_to_look_back():
    """The target of an event is its predecessor's first value: nothing but causal attention can know it."""
    torch.manual_seed(0)
    length = 6
    place = torch.eye(length).repeat(32, 1)
    block = TransformerBlock(16, 2, causal=True, hidden=32)
    head = nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*block.parameters(), *head.parameters()], lr=5e-3)
    offsets = torch.arange(33) * length
    losses = []
    for _ in range(300):
        value = torch.randn(32, length, 1)
        x = torch.cat([value.view(-1, 1), place, torch.zeros(32 * length, 16 - 1 - length)], 1)
        target = torch.cat([torch.zeros(32, 1, 1), value[:, :-1]], 1).view(-1, 1)
        loss = (head(block(x, offsets)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.25 * 5 / 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dim": 0}, "dim, heads and hidden must be positive, got dim=0"),
        ({"heads": 3}, "heads must divide dim, got dim=8, heads=3"),
        ({"hidden": 0}, "must be positive"),
        ({"norm": "both"}, "norm must be one of pre, post, got 'both'"),
        ({"activation": "silu"}, "activation must be one of relu, gelu, got 'silu'"),
        ({"residual": "none"}, "residual must be one of input, normalized, got 'none'"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must lie in \[0, 1\), got -0.1"),
        ({"norm": "post", "normalize_keys": False}, 'options of norm="pre" alone'),
        ({"norm": "post", "residual": "normalized"}, 'options of norm="pre" alone'),
    ],
)
def test_rejects_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TransformerBlock(**{"dim": 8, "heads": 2, "causal": True, **options})
