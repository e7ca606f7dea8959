"""The layer of HSTU: its formula, what a row may know, what a sequence owes to its batch-mates."""

import itertools

import pytest
import torch

from recfast.nn import HSTUBlock


def published(block, x, timestamps):
    """One sequence, [L, D], the layer step by step with the matrix of weights written out."""
    length = len(x)
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=block.eps)
    parts = torch.nn.functional.silu(normed @ block.uvqk)
    linear, attention = block.heads * block.linear_dim, block.heads * block.attention_dim
    u, v, q, k = parts.split([linear, linear, attention, attention], dim=-1)
    out = []
    for h in range(block.heads):
        mine = slice(h * block.attention_dim, (h + 1) * block.attention_dim)
        z = q[:, mine] @ k[:, mine].T
        for i in range(length):
            for j in range(length):
                z[i, j] = z[i, j] + block.position_bias[j - i + block.max_length - 1]
                gap = int(timestamps[min(i + 1, length - 1)] - timestamps[j])
                place = int(torch.log(torch.tensor(float(max(abs(gap), 1)), dtype=torch.float64)) / 0.301)
                z[i, j] = z[i, j] + block.time_bias[min(place, block.time_bias.numel() - 1)]
        weights = torch.nn.functional.silu(z).tril() / block.max_length
        out.append(weights @ v[:, h * block.linear_dim : (h + 1) * block.linear_dim])
    gated = torch.nn.functional.layer_norm(torch.cat(out, -1), (linear,), eps=block.eps) * u
    return x + gated @ block.output.weight.T + block.output.bias


def made(dtype=torch.float64, **options):
    torch.manual_seed(0)
    block = HSTUBlock(12, 3, **{"attention_dim": 5, "linear_dim": 4, "max_length": 20, **options}).to(dtype)
    with torch.no_grad():  # far from the small weights that training starts from, so that every part counts
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block


def batch(lengths=(6, 0, 11, 1), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    rows = sum(lengths)
    x = torch.randn(rows, 12, generator=generator, dtype=torch.float64).to(dtype)
    times = torch.exp(torch.rand(rows, generator=generator) * 10).long().cumsum(0)
    return x, torch.tensor([0, *lengths]).cumsum(0), times


def test_is_the_published_layer():
    block, (x, offsets, times) = made(), batch()
    wanted = [published(block, x[a:b], times[a:b]) for a, b in itertools.pairwise(offsets) if a < b]
    torch.testing.assert_close(block(x, offsets, timestamps=times), torch.cat(wanted), rtol=1e-11, atol=1e-11)


def test_padded_rows_give_the_same():
    block, (x, offsets, times) = made(torch.float32), batch(dtype=torch.float32)
    lengths = offsets.diff()
    inside = torch.arange(13) < lengths.unsqueeze(1)
    rows, whole_times = torch.zeros(4, 13, 12), torch.full((4, 13), 5)
    rows[inside], whole_times[inside] = x, times
    jagged, padded = block(x, offsets, timestamps=times), block(rows, lengths, timestamps=whole_times)
    torch.testing.assert_close(padded[inside], jagged, rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything():
    block, (x, offsets, times) = made(torch.float32), batch(dtype=torch.float32)
    lengths = offsets.diff()
    inside = torch.arange(13) < lengths.unsqueeze(1)
    answers = []
    for fill, time in ((0.0, 5), (float("nan"), -(2**60))):
        rows, whole_times = torch.full((4, 13, 12), fill), torch.full((4, 13), time)
        rows[inside], whole_times[inside] = x, times
        out = block(rows.requires_grad_(), lengths.int(), timestamps=whole_times)
        assert torch.all(out[~inside] == 0)
        answers.append([out, *torch.autograd.grad(out.square().sum(), [rows, *block.parameters()])])
        assert torch.all(answers[-1][1][~inside] == 0)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    with pytest.raises(ValueError, match=r"HSTUBlock: lengths must have shape \[4\], got \[5\]"):
        block(rows, offsets, timestamps=whole_times)


def test_a_later_event_changes_no_earlier_output():
    """The values of later rows may be anything; of their times, row i knows that of row i + 1 and no more."""
    block = made(torch.float32)
    x, offsets, times = batch((15,), torch.float32)
    before = block(x, offsets, timestamps=times)
    changed, later = x.clone(), times.clone()
    changed[9:] = 100 * torch.randn(6, 12, generator=torch.Generator().manual_seed(7))
    later[10:] += 10**6
    after = block(changed, offsets, timestamps=later)
    assert torch.equal(after[:9], before[:9])
    assert not torch.equal(after[9:], before[9:])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(block(x, offsets, timestamps=times)[:9].sum(), x)
    assert torch.all(gradient[9:] == 0)
    assert torch.all(gradient[:9].abs().sum(1) > 0)


def test_batch_mates_do_not_matter():
    block = made(torch.float64)
    x, offsets, times = batch()
    together = block(x, offsets, timestamps=times)
    for a, b in itertools.pairwise(offsets.tolist()):
        alone = block(x[a:b], torch.tensor([0, b - a]), timestamps=times[a:b])
        torch.testing.assert_close(alone, together[a:b], rtol=1e-12, atol=1e-12)


def test_candidates_do_not_see_each_other():
    block = made(torch.float32)
    x, offsets, times = batch((12,), torch.float32)
    times[8:] = times[8]
    targets = torch.tensor([4])
    together = block(x, offsets, timestamps=times, num_targets=targets)
    for candidate in range(8, 12):
        rows = [*range(8), candidate]
        alone = block(x[rows], torch.tensor([0, 9]), timestamps=times[rows], num_targets=torch.tensor([1]))
        torch.testing.assert_close(alone[:8], together[:8], rtol=1e-5, atol=1e-5)
        # Their places differ, so only without a position bias would the candidate's own row be the same.
    block = made(torch.float32, position_bias=False)
    together = block(x, offsets, timestamps=times, num_targets=targets)
    for candidate in range(8, 12):
        rows = [*range(8), candidate]
        alone = block(x[rows], torch.tensor([0, 9]), timestamps=times[rows], num_targets=torch.tensor([1]))
        torch.testing.assert_close(alone[8], together[candidate], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_everything(dtype):
    block = HSTUBlock(12, 3, max_length=20, dropout=0.1).to(dtype)
    x, offsets, times = batch(dtype=dtype)
    x.requires_grad_()
    out = block(x, offsets, timestamps=times)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for name, parameter in [("x", x), *block.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    # Distances of a sequence of up to 11 rows, looking back.
    reached = block.position_bias.grad != 0
    assert reached.nonzero().flatten().tolist() == list(range(9, 20))


def test_gradcheck():
    block = made(time_bias_buckets=30, contextual=1, window=4)
    x, offsets, times = batch((4, 0, 6))
    names = [name for name, _ in block.named_parameters()]

    def call(x, *parameters):
        parts = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(block, parts, (x, offsets), {"timestamps": times})

    inputs = [x, *(p.detach().clone() for p in block.parameters())]
    assert torch.autograd.gradcheck(call, [p.requires_grad_() for p in inputs], fast_mode=True)


def test_learns_from_time_alone():
    """Rows that are all alike: only the time bias can tell which sequence answered at once."""
    torch.manual_seed(0)
    block = HSTUBlock(4, 1, max_length=8, position_bias=False)
    head = torch.nn.Linear(4, 1)
    x, offsets = torch.ones(64 * 4, 4) * torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.arange(65) * 4
    label = torch.arange(64) % 2
    gaps = torch.where(label == 1, 2, 5000).repeat_interleave(4)
    times = gaps.view(64, 4).cumsum(1).flatten()
    parameters = [*block.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(150):
        logits = head(block(x, offsets, timestamps=times)[3::4]).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, label.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_state_and_compile():
    block = made(torch.float32)
    other = HSTUBlock(12, 3, attention_dim=5, linear_dim=4, max_length=20)
    other.load_state_dict(block.state_dict())
    x, offsets, times = batch(dtype=torch.float32)
    assert torch.equal(block(x, offsets, timestamps=times), other(x, offsets, timestamps=times))
    answers = []
    for form in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
        out = form(x, offsets, timestamps=times)
        answers.append([out, *torch.autograd.grad(out.square().sum(), block.parameters())])
    torch.testing.assert_close(*answers)


def test_autocast():
    block, (x, offsets, times) = made(torch.float32), batch(dtype=torch.float32)
    exact = block(x, offsets, timestamps=times)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x, offsets, timestamps=times)
    assert out.dtype == torch.float32
    assert not torch.equal(out, exact)
    assert (out - exact).norm() <= 0.02 * exact.norm()
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in block.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"dim": 2, "heads": 3}, "attention_dim and linear_dim must be at least 1, got 0 and 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"time_bias_buckets": -1}, "time_bias_buckets must be at least 0, got -1"),
        ({"time_buckets": "day"}, "time_buckets must be one of log, sqrt, got 'day'"),
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"contextual": -1}, "contextual must be at least 0, got -1"),
    ],
)
def test_rejects_bad_options(change, sentence):
    options = {"dim": 12, "heads": 3, "max_length": 20, **change}
    with pytest.raises(ValueError, match=sentence):
        HSTUBlock(options.pop("dim"), options.pop("heads"), **options)


def test_needs_timestamps():
    x, offsets, times = batch(dtype=torch.float32)
    with pytest.raises(ValueError, match="timestamps must be given"):
        made(torch.float32)(x, offsets)
    without = made(torch.float32, time_bias_buckets=None)
    assert torch.equal(without(x, offsets), without(x, offsets, timestamps=times))
