"""sequence_attention against torch's fused attention on padded batches, the written-out form, and an sgemm.

A unit of work is one pair of a query and a key of one head, counted without padding, and half of the square if causal.
"full": every sequence has length L. "ragged": lengths are uniform in [L / 2, L], as recommenders have them, and torch
gets them padded with a mask; its padded copies are not timed. SDPA with `is_causal` takes no mask besides on CPU, and
needs none: padding lies behind, where no event looks. `torch.compile` is given the written-out form (one thread, one
shape), and FlexAttention, which has no backward on CPU, runs forward, compiled, with a block mask; both are left out
where they fail.
"""

import functools

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from recfast import ops

SHAPES = [(50, 64, 2, 32), (200, 16, 1, 64), (200, 16, 4, 16), (1000, 2, 2, 32)]


def written_out(q, k, v, seen):
    """[B, H, L, D] and a mask."""
    score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(score.masked_fill(~seen, -torch.inf), -1) @ v


@functools.cache
def compiled(form):
    return torch.compile(form, dynamic=False)


def runs(way):
    """Whether `torch.compile` can do it here; it may lack a compiler or a backend."""
    try:
        way()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(("length", "users", "heads", "dim"), SHAPES)
def test_sequence_attention(race, threads, length, users, heads, dim, ragged, causal, backward):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((users,), length)
    if ragged:
        lengths = torch.randint(length // 2, length + 1, (users,), generator=generator)
        lengths[0] = length
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    there = torch.arange(length) < lengths.unsqueeze(1)
    stores = [torch.randn(users, length, heads, dim, generator=generator) for _ in range(3)]
    rows = [x[there].requires_grad_(backward) for x in stores]
    padded = [x.transpose(1, 2).contiguous().requires_grad_(backward) for x in stores]
    seen = there[:, None, None, :]
    if causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    coefficients = torch.randn(users, length, heads, dim, generator=generator)
    row_coefficients = coefficients[there]
    # Nothing flows back from padding.
    padded_coefficients = torch.where(there[..., None, None], coefficients, 0).transpose(1, 2).contiguous()

    def work(form, leaves, weights):
        out = form(*leaves)
        return [out, *torch.autograd.grad(out, leaves, weights)] if backward else [out]

    def sdpa(q, k, v):
        if causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen if ragged else None)

    def plain(q, k, v):
        return written_out(q, k, v, seen)

    pairs = heads * int((lengths * (lengths + 1) // 2 if causal else lengths**2).sum())
    # Two products forward; backward computes the scores again and has four more.
    flops = pairs * 4 * dim * (7 if backward else 2) // 2
    a, b = torch.randn(max(flops // (2 * 512 * 512), 1), 512), torch.randn(512, 512)
    c = torch.empty(a.shape[0], 512)
    ways = {
        "ours": lambda: work(
            lambda q, k, v: ops.sequence_attention(q, k, v, offsets, causal=causal), rows, row_coefficients
        ),
        "torch": lambda: work(plain, padded, padded_coefficients),
        "sdpa": lambda: work(sdpa, padded, padded_coefficients),
        "limit": lambda: torch.mm(a, b, out=c),
    }
    if threads == 1 and (length, heads) == (200, 1) and not ragged:
        inductor = compiled(written_out)
        ways["compiled"] = lambda: work(lambda q, k, v: inductor(q, k, v, seen), padded, padded_coefficients)
        if not backward:

            def mask(b, _h, i, j):
                return (j < lengths[b]) & (i >= j) if causal else j < lengths[b]

            blocks = flex_attention.create_block_mask(mask, users, None, length, length, device="cpu")
            flex = compiled(flex_attention.flex_attention)
            ways["flex"] = lambda: [flex(*padded, block_mask=blocks)]
        for column in ("compiled", "flex"):
            if column in ways and not runs(ways[column]):
                del ways[column]

    wanted = ways["torch"]()
    wanted = [x.transpose(1, 2)[there] for x in wanted]

    def check(answer, column):
        if column != "ours":
            answer = [x.transpose(1, 2)[there] for x in answer]
        for have, want in zip(answer, wanted, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4 * float(want.detach().abs().max()))

    name = f"{'both   ' if backward else 'forward'} {'causal' if causal else 'bidir.'} {'ragged' if ragged else 'full'}"
    race(
        "sequence_attention",
        f"{name} L={length} H={heads} D={dim}",
        pairs,
        ways,
        check=check,
        seconds=0.3,
        settle=True,
    )
