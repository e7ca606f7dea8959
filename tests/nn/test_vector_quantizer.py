"""Vectors replaced by learnt codes: what the gradient sees, how codebooks move, what comes back."""

import pytest
import torch

from recfast.nn import VectorQuantizer, vector_quantizer


def blobs(n: int, dim: int = 4, centres: int = 6, seed: int = 0) -> torch.Tensor:
    """Points close around a few far centres."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, dim, generator=generator) * 5
    return middle[torch.randint(centres, (n,), generator=generator)] + 0.05 * torch.randn(n, dim, generator=generator)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_gradient_passes_as_if_nothing_had_happened(update):
    """Straight-through: d f(q) / d x = f'(q), and the loss adds 2 beta (x - q) / n by itself."""
    quantizer = VectorQuantizer(4, 2, 8, update=update, commitment=0.5)
    x = blobs(50).requires_grad_()
    out = quantizer(x)
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    (given,) = torch.autograd.grad((out.vectors.square() * weight).sum(), x, retain_graph=True)
    torch.testing.assert_close(given, 2 * out.vectors.detach() * weight, rtol=1e-6, atol=0)
    (pulled,) = torch.autograd.grad(out.loss, x, retain_graph=True)
    torch.testing.assert_close(pulled, 0.5 * 2 * (x - out.vectors).detach() / x.numel(), rtol=1e-5, atol=1e-8)
    if update == "gradient":
        (books,) = torch.autograd.grad(out.loss, quantizer.codebooks)
        expected = torch.zeros_like(books)
        for book in range(2):
            part = slice(2 * book, 2 * book + 2)
            pull = 2 * (out.vectors - x).detach()[:, part] / x.numel()
            expected[book].index_add_(0, out.codes[:, book], pull)
        torch.testing.assert_close(books, expected, rtol=1e-5, atol=1e-8)
    else:
        assert not list(quantizer.parameters())


def test_values_are_the_code_vectors_to_the_last_bit():
    quantizer = VectorQuantizer(6, 3, 5)
    x = blobs(40, 6)
    for out in (quantizer(x), quantizer.eval()(x)):
        # The first call moved the averages after the codes were chosen, but decoded with what it returned.
        assert torch.equal(out.codes, out.codes.clamp(0, 4))
    again = quantizer(x)
    assert torch.equal(again.vectors, quantizer.decode(again.codes))
    assert torch.equal(again.codes, quantizer.encode(x))


@pytest.mark.parametrize("held", [1 << 24, 14 * 7])
def test_nearest_code_by_brute_force_ties_to_the_lowest(held, monkeypatch):
    monkeypatch.setattr(vector_quantizer, "_DISTANCES", held)
    quantizer = VectorQuantizer(4, 2, 7)
    x = blobs(30)
    quantizer(x)
    quantizer.codebooks[0, 3] = quantizer.codebooks[0, 5]
    codes = quantizer.encode(x.view(5, 6, 4))
    assert codes.shape == (5, 6, 2)
    for book in range(2):
        distance = (x[:, None, 2 * book : 2 * book + 2] - quantizer.codebooks[book]).square().sum(-1)
        chosen = distance.gather(1, codes.view(30, 2)[:, book : book + 1])[:, 0]
        torch.testing.assert_close(chosen, distance.min(1).values, rtol=1e-3, atol=1e-4)
    assert 5 not in codes[..., 0]


def test_moving_averages_by_hand():
    quantizer = VectorQuantizer(2, 1, 2, decay=0.9, init="sample", revive=0.0)
    first = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    quantizer(first)
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    left = int(quantizer.encode(torch.zeros(1, 2))[0, 0])
    quantizer(torch.tensor([[1.0, 0.0], [1.0, 2.0], [11.0, 0.0]]))
    count = 0.9 * counts[0, left] + 0.1 * 2
    total = 0.9 * sums[0, left] + 0.1 * torch.tensor([2.0, 2.0])
    torch.testing.assert_close(quantizer.codebooks[0, left], total / count)
    torch.testing.assert_close(quantizer.counts[0].sum(), 0.9 * counts.sum() + 0.1 * 3)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_learns_clusters_and_revives_dead_codes(update):
    """All codes begin in one place; the data have six centres, so five of eight codes must come to life elsewhere."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 1, 8, update=update, decay=0.8, init="sample", revive=0.1)
    quantizer(torch.zeros(20, 4))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.2) if update == "gradient" else None
    x = blobs(400)
    for _ in range(150):
        out = quantizer(x)
        if optimizer:
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
    report = quantizer.report(x)
    assert report["reconstruction_error"] < 0.01
    assert report["unique_codes"] >= 6
    asleep = VectorQuantizer(4, 1, 8, update=update, decay=0.8, init="sample", revive=0.0)
    asleep(torch.zeros(20, 4))
    for _ in range(60):
        asleep(x)
    assert asleep.report(x)["unique_codes"] < 6


def test_warm_up_passes_and_then_begins_anew():
    quantizer = VectorQuantizer(4, 2, 8, warm_up=2)
    far = blobs(60, seed=3) + 100
    for _ in range(2):
        out = quantizer(far)
        assert out.vectors is far
        assert out.loss == 0
    # Evaluation quantises all the same.
    assert not torch.equal(quantizer.eval()(far).vectors, far)
    # The codebooks begin from the vectors of all three batches, not from those of the last alone.
    near = blobs(60)
    out = quantizer.train()(near)
    assert not torch.equal(out.vectors, near)
    assert quantizer.report(torch.cat([far, near]))["reconstruction_error"] < 0.01
    assert int(quantizer.n_recent) == 180
    before = quantizer.codebooks.clone()
    quantizer(near)
    assert not torch.equal(before, quantizer.codebooks)
    assert int(quantizer.n_recent) == 180


def test_composite_numbers():
    quantizer = VectorQuantizer(6, 3, 5)
    codes = torch.cartesian_prod(*[torch.arange(5)] * 3)
    assert torch.equal(quantizer.composite(codes), torch.arange(125))
    assert torch.equal(quantizer.split(torch.arange(125)), codes)


@pytest.mark.parametrize("init", ["kmeans", "sample"])
def test_same_seed_same_codebooks(init):
    def trained(seed, global_seed):
        torch.manual_seed(global_seed)
        quantizer = VectorQuantizer(4, 2, 8, init=init, seed=seed)
        for step in range(5):
            quantizer(blobs(60, seed=step))
        return quantizer

    first, again, other = trained(0, 5), trained(0, 5), trained(1, 5)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.codebooks, other.codebooks)


def test_state_comes_back_and_training_goes_on_from_it():
    first = VectorQuantizer(4, 2, 8)
    x = blobs(60)
    first(x)
    second = VectorQuantizer(4, 2, 8)
    with pytest.raises(RuntimeError, match="must be trained or loaded first"):
        second.encode(x)
    second.load_state_dict(first.state_dict())
    torch.manual_seed(1)
    one = first(x)
    torch.manual_seed(1)
    two = second(x)
    assert torch.equal(one.vectors, two.vectors)
    assert torch.equal(first.sums, second.sums)


def test_report():
    quantizer = VectorQuantizer(2, 1, 4, init="sample")
    quantizer(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))
    said = quantizer.report(torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [3.0, 0.0]]))
    assert said["used_codes"] == [2]
    assert said["perplexity"] == pytest.approx([2.0])
    assert said["unique_codes"] == 2
    assert said["reconstruction_error"] == pytest.approx(0.0)
    assert quantizer.report()["perplexity"] == pytest.approx([4.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 5}, "dim must be a positive multiple of 2 codebooks, got 5"),
        ({"n_codes": 0}, "n_codes and warm_up must be at least 1 and 0, got 0 and 0"),
        ({"update": "adam"}, "update must be 'ema' or 'gradient', got 'adam'"),
        ({"init": "zeros"}, "init must be 'kmeans' or 'sample', got 'zeros'"),
        ({"decay": 1.0}, "decay must lie in"),
        ({"commitment": -1.0}, "commitment be at least 0, got 0.99, 0.03 and -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**{"dim": 4, "n_codebooks": 2, "n_codes": 8, **options})


def test_bad_vectors():
    quantizer = VectorQuantizer(4, 2, 8)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 4\], got \[3, 5\]"):
        quantizer(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="must be finite"):
        quantizer(torch.full((3, 4), float("nan")))
    quantizer(blobs(10))
    assert quantizer(torch.zeros(0, 3, 4)).vectors.shape == (0, 3, 4)
