"""SDIM: ours, the forms that recompute per candidate, the table in torch, and the sgemm of its hash.

A unit of work is one candidate. `fuxictr` is that library's layout: one batch row per (user, candidate), each with its
own copy of the history (copying it is not timed), which it hashes, compares, and sums by nonzero and embedding_bag.
`mask` hashes a user's history once and forms one collision mask per candidate and hash. `saved` is ours with the table
of the user kept from before. The limit is an sgemm as large as the hash of keys and candidates.
"""

import pytest
import torch
from torch.nn import functional as F

from recfast import nn, ops

TABLES, BITS, DIM = 16, 3, 64
# Users, history, candidates.
SHAPES = [(64, 1000, 1), (16, 1000, 20), (16, 200, 20), (4, 10_000, 20)]


def hashes(x, projections):
    """Bits as the larger of (-p, p), the way FuxiCTR finds them; x [R, L, D], one set of projections a row."""
    rotated = torch.einsum("rld,rdmt->rlmt", x, projections)
    bits = torch.stack([-rotated, rotated], -1).argmax(-1).float()
    return bits @ (2.0 ** torch.arange(bits.shape[-1]))


def per_row(query, history, projections):
    """[R, D], [R, L, D] -> [R, D]: each row on its own."""
    rows, _, dim = history.shape
    each = projections.expand(rows, -1, -1, -1)
    collide = (hashes(history, each) == hashes(query.unsqueeze(1), each)).permute(2, 0, 1)  # [M, R, L]
    event = collide.flatten(1).nonzero()[:, 1]
    bags = F.pad(collide.sum(-1).flatten().cumsum(0), (1, 0))
    sums = F.embedding_bag(event, history.reshape(-1, dim), bags, mode="sum", include_last_offset=True)
    return F.normalize(sums, dim=-1).view(-1, rows, dim).mean(0)


def codes_of(x, projections):
    bits = (x @ projections.flatten(1)).unflatten(-1, projections.shape[1:]) > 0
    return (bits * (1 << torch.arange(bits.shape[-1]))).sum(-1)


def by_mask(query, history, projections):
    """[B, C, D], [B, L, D] -> [B, C, D]: histories hashed once, one mask per candidate and hash."""
    collide = codes_of(history, projections).unsqueeze(1) == codes_of(query, projections).unsqueeze(2)  # [B, C, L, M]
    sums = collide.permute(0, 1, 3, 2).flatten(1, 2).to(history.dtype) @ history
    return F.normalize(sums.unflatten(1, (-1, TABLES)), dim=-1).mean(2)


def by_table(query, history, projections):
    """The kernel's own algebra in torch: one scatter a hash, one gather."""
    users, _, dim = history.shape
    code, asked = codes_of(history, projections), codes_of(query, projections)
    first = torch.arange(users).view(-1, 1) * 2**BITS
    parts = []
    for j in range(TABLES):
        table = history.new_zeros(users * 2**BITS, dim).index_add(
            0, (first + code[..., j]).flatten(), history.flatten(0, 1)
        )
        parts.append(F.normalize(table[first + asked[..., j]], dim=-1))
    return torch.stack(parts).mean(0)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(("users", "length", "candidates"), SHAPES)
def test_sdim(race, users, length, candidates, backward):
    torch.manual_seed(0)
    sdim = nn.SDIM(DIM, TABLES, BITS)
    projections = sdim.projections
    history, query = torch.randn(users, length, DIM), torch.randn(users, candidates, DIM)
    copies = history.repeat_interleave(candidates, 0)
    for leaf in (history, copies):
        leaf.requires_grad_(backward)
    lengths = torch.full((users,), length)
    rows = torch.arange(users + 1) * candidates

    def ours():
        return sdim(query.flatten(0, 1), history, lengths, rows).view_as(query)

    def work(form, leaf):
        if not backward:
            return form(), None
        out = form()
        (gradient,) = torch.autograd.grad(out, leaf, out.detach())
        return out, gradient

    weights = projections.flatten(1)
    flat = torch.cat([history.detach().flatten(0, 1), query.flatten(0, 1)])
    product = torch.empty(len(flat), TABLES * BITS)
    ways = {
        "ours": lambda: work(ours, history),
        "fuxictr": lambda: work(lambda: per_row(query.flatten(0, 1), copies, projections).view_as(query), copies),
        "mask": lambda: work(lambda: by_mask(query, history, projections), history),
        "table": lambda: work(lambda: by_table(query, history, projections), history),
        "limit": lambda: torch.mm(flat, weights, out=product),
    }
    if not backward:
        table = sdim.table(history, lengths)
        ways["saved"] = lambda: (sdim(query.flatten(0, 1), candidate_offsets=rows, table=table).view_as(query), None)
    exact = work(lambda: by_mask(query.double(), history.double(), projections.double()), history)

    def check(answer, column):
        for have, want in zip(answer, exact, strict=True):
            if want is None:
                continue
            if have.shape != want.shape:  # one gradient for each copy of a history
                have = have.unflatten(0, (users, candidates)).sum(1)
            # In norm: a sign within rounding of 0 moves one event to another bucket where sums run in another order.
            assert (have - want).norm() <= 2e-3 * want.norm(), column

    shape = f"{'fwd+bwd' if backward else 'forward'} B={users} L={length} C={candidates}"
    race("sdim_attention", shape, users * candidates, ways, check=check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [200, 1000])
def test_sdim_table(race, length, dtype):
    """The sums alone, from given codes; a unit of work is one event. The limit reads the values once."""
    torch.manual_seed(0)
    users, name = 64, "fp32" if dtype == torch.float32 else "bf16"
    values = torch.randn(users * length, DIM).to(dtype)
    codes = torch.randint(2**BITS, (users * length, TABLES)).to(torch.uint8)
    offsets = torch.arange(users + 1) * length
    first = torch.arange(users).repeat_interleave(length).unsqueeze(1) * TABLES + torch.arange(TABLES)
    bucket = first * 2**BITS + codes.long()

    def scattered():
        table = torch.zeros(users * TABLES * 2**BITS, DIM)
        for j in range(TABLES):
            table.index_add_(0, bucket[:, j], values.float())
        return table.view(users, TABLES, 2**BITS, DIM)

    wanted = ops.sdim_table.reference(codes, values.double(), offsets, bits=BITS)

    def check(answer, column):
        assert (answer - wanted).norm() <= 1e-5 * wanted.norm(), column

    ways = {
        "ours": lambda: ops.sdim_table(codes, values, offsets, bits=BITS),
        "torch": scattered,
        "limit": values.sum,
    }
    race("sdim_table", f"{name} B={users} L={length}", users * length, ways, check=check)
