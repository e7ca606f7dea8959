"""nn.ETA against its definition: search by hashes, then softmax attention over what was found."""

import pytest
import torch

from recfast import nn, ops


def problem(seed=0, dim=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    lengths, candidates = [30, 0, 1, 12], [2, 1, 0, 3]
    query = torch.randn(6, dim, generator=generator).to(dtype)
    keys = torch.randn(43, dim, generator=generator).to(dtype)
    return query, keys, torch.tensor([0, *lengths]).cumsum(0), torch.tensor([0, *candidates]).cumsum(0)


def published(eta, query, keys, offsets, rows):
    """Candidate by candidate in float64, the chosen events gathered and projected."""
    layer, heads = eta.attention, eta.attention.heads
    users = torch.arange(len(offsets) - 1).repeat_interleave(rows.diff())
    flat = eta.projections.double().flatten(1)
    out = []
    for c, user in enumerate(users.tolist()):
        history = keys[offsets[user] : offsets[user + 1]].double()
        if not len(history):
            out.append(torch.zeros(query.shape[1], dtype=torch.float64))
            continue
        asked, held = query[c].detach().double() @ flat > 0, history.detach() @ flat > 0
        distance = (asked != held).sum(-1)
        order = sorted(range(len(history)), key=lambda position: (int(distance[position]), -position))
        chosen = history[order[: eta.k]]
        q = layer.w_q.weight.double() @ query[c].double()
        k, v = chosen @ layer.w_k.weight.double().T, chosen @ layer.w_v.weight.double().T
        parts = [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
        weight = torch.softmax(torch.einsum("ha,lha->hl", *parts[:2]) / parts[0].shape[-1] ** 0.5, -1)
        out.append(layer.w_o.weight.double() @ torch.einsum("hl,lha->ha", weight, parts[2]).flatten())
    return torch.stack(out)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("bits", "k"), [(6, 3), (40, 8), (64, 50), (128, 5)])
def test_equals_the_published_form(bits, k, fold):
    query, keys, offsets, rows = problem()
    eta = nn.ETA(12, heads=3, bits=bits, k=k, fold=fold)
    keys.requires_grad_()
    have, wanted = eta(query, keys, offsets, rows), published(eta, query, keys, offsets, rows)
    torch.testing.assert_close(have.double(), wanted, rtol=2e-4, atol=2e-5)
    assert not have[2].any()
    weight = torch.linspace(-1, 1, have.numel()).view_as(have)
    leaves = [keys, *eta.parameters()]
    grads = torch.autograd.grad(have, leaves, weight)
    exact = torch.autograd.grad(wanted, leaves, weight.double())
    for grad, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad, other.to(grad.dtype), rtol=1e-3, atol=1e-4)
    # Only what was found gets a gradient.
    found = eta.search(query, keys, offsets, rows)
    users = torch.arange(4).repeat_interleave(rows.diff()).unsqueeze(1)
    reached = torch.zeros(43, dtype=torch.bool)
    reached[(offsets[users] + found)[found >= 0]] = True
    assert torch.equal(grads[0].abs().sum(1) > 0, reached)


def test_kept_codes_and_padding():
    query, keys, offsets, rows = problem()
    eta = nn.ETA(12, heads=2, bits=64, k=4)
    wanted = eta(query, keys, offsets, rows)
    assert torch.equal(eta(query, keys, offsets, rows, eta.codes(keys)), wanted)
    store = torch.full((4, 40, 12), float("nan"))
    for b in range(4):
        store[b, : offsets[b + 1] - offsets[b]] = keys[offsets[b] : offsets[b + 1]]
    for padded in (store, store[:, :31]):
        assert torch.equal(eta(query, padded, offsets.diff(), rows), wanted)


def test_nearest_by_hash_are_near():
    """With many bits the hash finds what the cosine finds."""
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 16, generator=generator), torch.randn(200, 16, generator=generator)
    keys[[5, 77, 150]] = query * torch.tensor([[1.0], [2.0], [0.1]]) + 0.01 * torch.randn(3, 16, generator=generator)
    eta = nn.ETA(16, bits=256, k=3)
    found = eta.search(query, keys, torch.tensor([0, 200]))
    assert sorted(found[0].tolist()) == [5, 77, 150]


def test_state_and_seed():
    one, same, other = nn.ETA(8, seed=1), nn.ETA(8, seed=1), nn.ETA(8, seed=2)
    assert torch.equal(one.projections, same.projections)
    assert not torch.equal(one.projections, other.projections)
    other.load_state_dict(one.state_dict())
    query, keys = torch.randn(2, 8), torch.randn(9, 8)
    offsets = torch.tensor([0, 4, 9])
    assert torch.equal(one(query, keys, offsets), other(query, keys, offsets))


def test_compiles_in_one_graph():
    query, keys, offsets, rows = problem()
    eta = nn.ETA(12, heads=3, k=4)
    compiled = torch.compile(eta, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, keys, offsets, rows), eta(query, keys, offsets, rows))


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 65}, {"k": 0}, {"dim": 0}])
def test_rejects_bad_options(options):
    with pytest.raises(ValueError, match="ETA: dim and k must be positive and bits 1 to 64 or a multiple of 64"):
        nn.ETA(**{"dim": 8, **options})


def test_codes_of_other_bits_are_refused():
    query, keys, offsets, rows = problem()
    with pytest.raises(TypeError, match="hamming_top_k: key_codes must be int64, got uint8"):
        nn.ETA(12)(query, keys, offsets, rows, ops.simhash(keys, torch.randn(12, 1, 8)))
