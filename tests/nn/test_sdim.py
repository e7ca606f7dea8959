"""nn.SDIM against its definition, and the tables that it lets a caller keep."""

import pytest
import torch

from recfast import nn, ops


def problem(seed=0, dim=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    lengths, candidates = [30, 0, 1, 12], [2, 1, 0, 3]
    query = torch.randn(6, dim, generator=generator).to(dtype)
    keys = torch.randn(43, dim, generator=generator).to(dtype)
    return query, keys, torch.tensor([0, *lengths]).cumsum(0), torch.tensor([0, *candidates]).cumsum(0)


def test_equals_one_mask_per_candidate():
    query, keys, offsets, rows = problem()
    sdim = nn.SDIM(12, tables=5, bits=2)
    users = torch.arange(4).repeat_interleave(rows.diff())
    have = sdim(query, keys, offsets, rows)
    for c, user in enumerate(users.tolist()):
        history = keys[offsets[user] : offsets[user + 1]].double()
        projections = sdim.projections.double()

        def signs(x, projections=projections):
            return torch.einsum("ld,dmt->lmt", x, projections) > 0

        collide = (signs(history) == signs(query[c : c + 1].double())).all(-1)  # [L, M]
        sums = collide.double().T @ history
        wanted = torch.nn.functional.normalize(sums, dim=-1).mean(0)
        torch.testing.assert_close(have[c].double(), wanted, rtol=1e-5, atol=1e-6)
    assert not have[2].any()


def test_a_saved_table_gives_the_same_answer():
    query, keys, offsets, rows = problem()
    sdim = nn.SDIM(12)
    wanted = sdim(query, keys, offsets, rows)
    table = sdim.table(keys, offsets)
    assert table.shape == (4, 16, 8, 12)
    assert torch.equal(sdim(query, candidate_offsets=rows, table=table), wanted)
    # Event by event: the first half saved, the rest appended.
    cut = offsets[:-1] + offsets.diff() // 2
    old = torch.cat([torch.arange(a, b) for a, b in zip(offsets[:-1], cut, strict=True)])
    new = torch.cat([torch.arange(a, b) for a, b in zip(cut, offsets[1:], strict=True)])
    old_offsets = torch.nn.functional.pad((cut - offsets[:-1]).cumsum(0), (1, 0))
    table = sdim.table(keys[old], old_offsets)
    table = sdim.append(table, keys[new], offsets - old_offsets)
    assert torch.equal(sdim(query, candidate_offsets=rows, table=table), wanted)


def test_padded_equals_jagged_without_reading_the_padding():
    query, keys, offsets, rows = problem()
    store = torch.full((4, 40, 12), float("nan"))
    for b in range(4):
        store[b, : offsets[b + 1] - offsets[b]] = keys[offsets[b] : offsets[b + 1]]
    sdim = nn.SDIM(12, tables=3, bits=4)
    assert torch.equal(sdim(query, store, offsets.diff(), rows), sdim(query, keys, offsets, rows))
    assert torch.equal(sdim(query, store[:, :31], offsets.diff(), rows), sdim(query, keys, offsets, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_reach_the_values_alone(dtype):
    query, keys, offsets, rows = problem(dtype=dtype)
    sdim = nn.SDIM(12, tables=4, bits=2)
    if dtype == torch.float64:
        sdim = sdim.double()
    leaves = [query.requires_grad_(), keys.requires_grad_()]
    out = sdim(*leaves[:2], offsets, rows)
    assert out.dtype == dtype
    out.sum().backward()
    assert query.grad is None
    assert keys.grad.dtype == dtype
    assert keys.grad.abs().sum() > 0
    values = torch.randn(43, 5, dtype=dtype, requires_grad=True)
    out = sdim(query, keys.detach(), offsets, rows, values)
    assert out.shape == (6, 5)
    out.sum().backward()
    assert values.grad.abs().sum() > 0


def test_a_kept_table_changes_no_gradient():
    """Long histories keep their tables for backward, short ones do not."""
    query, keys, offsets, rows = problem()
    for tables, bits in ((1, 1), (7, 4)):
        sdim = nn.SDIM(12, tables=tables, bits=bits)
        grads = []
        for at_once in (False, True):
            leaf = keys.clone().requires_grad_()
            if at_once:
                codes = (sdim.codes(query), sdim.codes(keys))
                out = ops.sdim_history_attention(*codes, leaf, offsets, bits=bits, candidate_offsets=rows)
            else:
                out = sdim(query, leaf, offsets, rows)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_the_seed_makes_the_hash_and_the_state_keeps_it():
    one, same, other = nn.SDIM(4, seed=1), nn.SDIM(4, seed=1), nn.SDIM(4, seed=2)
    assert torch.equal(one.projections, same.projections)
    assert not torch.equal(one.projections, other.projections)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.projections, other.projections)
    assert not list(one.parameters())


def test_rejects_bad_options():
    query, keys, offsets, rows = problem()
    sdim = nn.SDIM(12)
    for options in ({"tables": 0}, {"bits": 0}, {"bits": 9}):
        with pytest.raises(ValueError, match="SDIM: dim and tables must be positive and bits 1 to 8"):
            nn.SDIM(12, **options)
    with pytest.raises(ValueError, match="keys and offsets are needed"):
        sdim(query)
    with pytest.raises(ValueError, match="not both"):
        sdim(query, keys, offsets, rows, table=sdim.table(keys, offsets))
    with pytest.raises(ValueError, match="simhash: projections must have shape"):
        sdim(query[:, :5], keys, offsets, rows)


def test_compiles_in_one_graph():
    query, keys, offsets, rows = problem()
    sdim = nn.SDIM(12, tables=4, bits=2)
    compiled = torch.compile(sdim, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(query, keys, offsets, rows),
        ops.sdim_attention(sdim.codes(query), sdim.table(keys, offsets), candidate_offsets=rows),
    )
