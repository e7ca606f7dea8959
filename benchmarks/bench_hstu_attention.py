"""hstu_attention against the published padded form in torch, the same compiled, and an sgemm of as many operations.

A unit of work is one pair of rows and one head that the causal mask lets through. The torch forms pad to max_length and
write out [B, H, N, N], as the published program does, with its float32 logarithm of the differences in time; columns
compiled run where `torch.compile` does, on the shapes marked for it (its compilation takes long). FlexAttention has no
column: its scores go through a softmax, which this attention does not have, and it has no backward on the CPU.
"""

import pytest
import torch

from recfast import ops

# sequences, max_length, heads, width of a head, whether lengths are uniform in [N / 2, N], biases, compiled
SHAPES = [
    (4, 1000, 4, 16, False, True, False),
    (4, 1000, 4, 32, True, True, False),
    (4, 1000, 4, 32, False, True, True),
    (2, 1000, 8, 64, False, True, False),
    (4, 1000, 4, 32, False, False, False),
    (32, 200, 4, 32, True, True, False),
    (32, 200, 8, 16, False, True, False),
]


def eager(q, k, v, mask, timestamps, position, time, size, exact=False):
    """[B, N, H, D] and the published steps; `exact`: the logarithm in float64."""
    z = torch.einsum("bnhd,bmhd->bhnm", q, k)
    if position is not None:
        turned = torch.nn.functional.pad(position, [0, size]).repeat(size)
        z = z + turned[:-size].view(size, 3 * size - 2)[:, size - 1 : 1 - size]
    if time is not None:
        following = torch.cat([timestamps[:, 1:], timestamps[:, -1:]], dim=1)
        apart = (following.unsqueeze(2) - timestamps.unsqueeze(1)).abs().clamp(min=1)
        bucket = (torch.log(apart.double() if exact else apart) / 0.301).long().clamp(0, time.numel() - 1)
        z = z + time[bucket.view(-1)].view(bucket.shape).unsqueeze(1)
    return torch.einsum("bhnm,bmhd->bnhd", torch.nn.functional.silu(z) / size * mask, v)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(("sequences", "size", "heads", "dim", "uniform", "biases", "compiled"), SHAPES)
def test_hstu_attention(race, sequences, size, heads, dim, uniform, biases, compiled, backward):
    torch.manual_seed(0)
    lengths = torch.randint(size // 2, size + 1, (sequences,)) if uniform else torch.full((sequences,), size)
    inside = torch.arange(size) < lengths.unsqueeze(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = int(lengths.sum())
    # Seconds between events from one to half a day; past the end the last event's time, for both forms.
    gaps = torch.exp(torch.rand(sequences, size) * 10.7).long() * inside
    padded_times = gaps.cumsum(1)
    times = padded_times[inside]
    q, k, v = (torch.randn(rows, heads, dim) / dim**0.25 for _ in range(3))
    position = torch.randn(2 * size - 1) / 4 if biases else None
    time = torch.randn(129) / 4 if biases else None
    mask = torch.ones(size, size).tril() * inside.view(sequences, 1, 1, size)
    leaves = [x.requires_grad_(backward) for x in (q, k, v, position, time) if x is not None]

    def ours():
        return ops.hstu_attention(
            q, k, v, offsets, max_length=size, position_bias=position, time_bias=time,
            timestamps=times if biases else None,
        )  # fmt: skip

    def padded(form, **options):
        whole = [x.new_zeros(sequences, size, heads, dim).index_put((inside,), x) for x in (q, k, v)]
        return form(*whole, mask, padded_times, position, time, size, **options)[inside]

    def work(form):
        out = form()
        return [out, *torch.autograd.grad(out, leaves, out.detach())] if backward else [out]

    wanted = work(lambda: padded(eager, exact=True))

    def check(answer, column):
        # In norm; a float32 logarithm puts the few differences beside a border into the next bucket.
        allowed = 2e-4 if column == "ours" else 2e-2
        for have, want in zip(answer, wanted, strict=True):
            assert (have - want).norm() <= allowed * want.norm(), column

    pairs = heads * int((lengths * (lengths + 1) // 2).sum())
    # Two products forward, four backward; computing the weights again is ours to answer for.
    flops = pairs * 2 * dim * (6 if backward else 2)
    a, b = torch.randn(max(flops // (2 * 512 * 512), 1), 512), torch.randn(512, 512)
    c = torch.empty(a.shape[0], 512)
    columns = {
        "ours": lambda: work(ours),
        "torch": lambda: work(lambda: padded(eager)),
        "limit": lambda: torch.mm(a, b, out=c),
    }
    if compiled:
        fused = torch.compile(eager)
        try:
            work(lambda: padded(fused))
        except Exception as error:  # without a compiler there is no such column
            print(f"torch.compile does not run here: {type(error).__name__}")
        else:
            columns["rival: compiled"] = lambda: work(lambda: padded(fused))
    shape = f"B={sequences} N={size}{' jagged' if uniform else ''} H={heads} d={dim}{'' if biases else ' no bias'}"
    race("hstu_attention", f"{'both' if backward else 'forward'} {shape}", pairs, columns, check=check)
