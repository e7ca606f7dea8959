"""nn.DARE against the published steps: scores, search, softmax, features."""

import pytest
import torch

from recfast.nn import DARE


def batch():
    """Two users with 7 and 0 steps, 2 and 1 candidates; the attention embedding is an item's 4 and a time's 2."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 6), (3, 5), (7, 6), (7, 5)]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return *tensors, torch.tensor([0, 7, 7]), torch.tensor([0, 2, 3])


@pytest.mark.parametrize("top_k", [None, 3, 20])
@pytest.mark.parametrize("parts", [None, (4, 2)])
def test_it_is_the_published_form(top_k, parts):
    query_a, query_r, keys_a, keys_r, offsets, rows = batch()
    features = DARE(6, 5, top_k=top_k, parts=parts).double()(query_a, query_r, keys_a, keys_r, offsets, rows)
    assert features.shape == (3, 10)
    for c in range(2):
        if parts is None:
            s = keys_a @ query_a[c] / 6**0.5
        else:
            s = keys_a[:, :4] @ query_a[c, :4] / 4**0.5 + keys_a[:, 4:] @ query_a[c, 4:] / 2**0.5
        best = s.topk(min(top_k or 7, 7)).indices
        r = torch.softmax(s[best], 0) @ keys_r[best]
        torch.testing.assert_close(features[c], torch.cat([r, query_r[c] * r]))
    assert not features[2].any()


def test_attention_and_representation_learn_apart():
    arguments = batch()
    leaves = [x.requires_grad_() for x in arguments[:4]]
    unit = DARE(6, 5, top_k=3, cross=False)
    r = unit(*leaves, *arguments[4:])
    assert r.shape == (3, unit.out_dim)
    gradients = torch.autograd.grad(r.sum(), leaves, allow_unused=True)
    assert gradients[1] is None  # without the product, the candidate's representation plays no part
    assert gradients[0][:2].any(1).all()
    # The candidates chose three rows each: the others get nothing.
    assert 3 <= int(gradients[3].any(1).sum()) <= 6
    assert torch.equal(gradients[2].any(1), gradients[3].any(1))
    assert torch.autograd.gradcheck(lambda *x: DARE(6, 5, top_k=3)(*x, *arguments[4:]), leaves)


def test_padded_equals_jagged():
    query_a, query_r, keys_a, keys_r, offsets, rows = batch()
    padded = [torch.full((2, 8, x.shape[1]), float("nan"), dtype=x.dtype) for x in (keys_a, keys_r)]
    for store, x in zip(padded, (keys_a, keys_r), strict=True):
        store[0, :7] = x
    unit = DARE(6, 5, top_k=3)
    jagged = unit(query_a, query_r, keys_a, keys_r, offsets, rows)
    assert torch.equal(unit(query_a, query_r, *padded, offsets.diff(), rows), jagged)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attention_dim": 0}, "attention_dim must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"parts": (4, 1)}, r"parts must be positive and add up to attention_dim = 6, got \(4, 1\)"),
        ({"parts": ()}, r"parts must be positive and add up to attention_dim = 6, got \(\)"),
    ],
)
def test_rejects_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DARE(**{"attention_dim": 6, "representation_dim": 5, **options})
