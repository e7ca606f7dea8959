import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recfast.index import CodeIndex
from recfast.nn import ProductQuantizer


def vectors(items=600, dim=12, seed=0):
    return torch.randn(items, dim, generator=torch.Generator().manual_seed(seed))


def test_codes_are_the_nearest_centroids():
    x = vectors()
    quantizer = ProductQuantizer(12, n_codebooks=3, n_codes=16).fit(x)
    codes = quantizer.encode(x)
    assert codes.dtype == torch.uint8
    for book in range(3):
        distance = torch.cdist(x[:, 4 * book : 4 * book + 4].double(), quantizer.centroids[book].double())
        chosen = distance.gather(1, codes[:, book : book + 1].long())[:, 0]
        assert torch.all(chosen <= distance.min(1).values + 1e-5)
    # k-means is at a fixed point, or near it: each centroid is about the mean of its part.
    means = torch.stack([x[codes[:, 0] == code, :4].mean(0) for code in range(16)])
    assert (means - quantizer.centroids[0]).abs().max() < 0.3
    assert quantizer.report()["reconstruction_error"] < 0.6


def test_score_table_sums_to_the_inner_product():
    x, queries = vectors(), vectors(4, seed=1)
    quantizer = ProductQuantizer(12, n_codebooks=4, n_codes=16).fit(x)
    codes = quantizer.encode(x)
    table = quantizer.score_table(queries)
    assert table.shape == (4, 4, 16)
    wanted = queries @ quantizer.decode(codes).T
    scores, ids = CodeIndex(codes, 16).search(table, 600)
    torch.testing.assert_close(scores, wanted.gather(1, ids), rtol=1e-5, atol=1e-5)
    assert torch.all(ids.sort(dim=1).values == torch.arange(600))
    assert torch.autograd.gradcheck(quantizer.double().score_table, (queries[:1].double().requires_grad_(),))


def test_same_seed_same_centroids():
    x = vectors(3000)
    first, again, other = (ProductQuantizer(12, 2, 8).fit(x, seed=seed).centroids for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("items", [1, 5, 16])
def test_fewer_items_than_codes(items):
    x = vectors(items).repeat(2, 1)
    quantizer = ProductQuantizer(12, n_codebooks=3, n_codes=16).fit(x)
    codes = quantizer.encode(x)
    assert quantizer.n_used.tolist() == [items] * 3
    assert int(codes.max()) == items - 1
    torch.testing.assert_close(quantizer.decode(codes), x)
    assert torch.isfinite(quantizer.score_table(x)).all()
    report = quantizer.report()
    assert report["unique_codes"] == items
    assert report["perplexity"] == pytest.approx([items] * 3)


def test_report():
    x = torch.tensor([[0.0, 1.0]] * 3 + [[5.0, 1.0]])
    quantizer = ProductQuantizer(2, n_codebooks=2, n_codes=4).fit(x)
    report = quantizer.report()
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert report["items"] == 4
    assert report["unique_codes"] == 2
    assert report["used_codes"] == [2, 1]
    assert report["perplexity"] == pytest.approx([np.exp(entropy), 1.0])
    assert report["reconstruction_error"] == pytest.approx(0.0)
    assert quantizer.report(torch.tensor([[1.0, 1.0], [5.0, 1.0]]))["reconstruction_error"] == pytest.approx(1 / 8)


def test_state_travels_as_safetensors(tmp_path):
    x = vectors()
    quantizer = ProductQuantizer(12, 3, 300).fit(x.numpy())
    assert quantizer.encode(x).dtype == torch.uint16
    save_file(quantizer.state_dict(), tmp_path / "quantizer.safetensors")
    again = ProductQuantizer(12, 3, 300)
    with pytest.raises(RuntimeError, match=r"encode: the centroids must be fitted or loaded first"):
        again.encode(x)
    again.load_state_dict(load_file(tmp_path / "quantizer.safetensors"))
    assert np.array_equal(again.encode(x).numpy(), quantizer.encode(x).numpy())
    assert again.report(x) == quantizer.report()
    with pytest.raises(RuntimeError, match="x must be given"):
        again.report()


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda q, x: ProductQuantizer(12, 5), ValueError, "dim must be a positive multiple of 5 codebooks, got 12"),
        (lambda q, x: ProductQuantizer(12, 3, 0), ValueError, r"n_codes must be in \[1, 65536\], got 0"),
        (lambda q, x: q.fit(x[:0]), ValueError, "fit: x must have at least one row, got none"),
        (lambda q, x: q.fit(x[:, :5]), ValueError, r"fit: x must have shape \[N, 12\], got \[600, 5\]"),
        (lambda q, x: q.fit(x.double()), TypeError, "fit: x must be float32, got float64"),
        (lambda q, x: q.fit(x / 0), ValueError, r"fit: x\[0\] must be finite"),
        (lambda q, x: q.fit(x).decode(torch.full((2, 3), 16)), IndexError, r"codes\[0, 0\] = 16 is outside \[0, 16\)"),
        (lambda q, x: q.fit(x).decode(torch.zeros(2, 2)), ValueError, r"codes must have shape \[N, 3\], got \[2, 2\]"),
        (lambda q, x: q.fit(x).score_table(x[0]), ValueError, r"queries must have shape \[Q, 12\], got \[12\]"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(ProductQuantizer(12, 3, 16), vectors())
