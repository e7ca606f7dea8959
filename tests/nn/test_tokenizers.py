"""What every tokeniser promises, and what each promises of its own."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recfast import nn
from recfast.index import CodeIndex
from recfast.nn.residual_quantizer import straight_through

MAKE = {
    "pq": lambda **more: nn.ProductQuantizer(12, 3, 16, **more),
    "kmeans": lambda **more: nn.ResidualKMeans(12, 3, 16, **more),
    "plain": lambda **more: nn.ResidualKMeans(12, 3, 16, normalize=False, **more),
    "ema": lambda **more: nn.ResidualQuantizer(12, 3, 16, latent_dim=12, hidden=(), **more),
    "gradient": lambda **more: nn.ResidualQuantizer(
        12, 3, 16, latent_dim=8, hidden=(24,), codebook="gradient", decoder_hidden=(), **more
    ),
}
EVERY = pytest.mark.parametrize("kind", list(MAKE))
KMEANS = pytest.mark.parametrize("kind", ["pq", "kmeans", "plain"])


def vectors(items=600, seed=0, dim=12):
    """Clusters, with noise of decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(items, dim, generator=generator) * torch.arange(1, dim + 1) ** -0.5
    return centres[torch.randint(40, (items,), generator=generator)] + 0.5 * noise


def fitted(kind, x, seed=0, **more):
    tokenizer = MAKE[kind](**more)
    epochs = {"epochs": 10, "batch_size": 128} if isinstance(tokenizer, nn.ResidualQuantizer) else {}
    return tokenizer.fit(x, seed=seed, **epochs)


# -- all of them -----------------------------------------------------------------------------------------------------


@EVERY
def test_config_makes_the_same_again(kind):
    x = vectors(200)
    tokenizer = fitted(kind, x, collisions="none")
    config = json.loads(json.dumps(tokenizer.config()))
    again = type(tokenizer)(**config)
    again.load_state_dict(tokenizer.state_dict())
    assert again.config() == tokenizer.config()
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert torch.equal(again.decode(again.encode(x)), tokenizer.decode(tokenizer.encode(x)))


@EVERY
def test_codes_and_report(kind):
    x = vectors()
    tokenizer = fitted(kind, x)
    codes = tokenizer.encode(x)
    assert codes.shape == (600, 3)
    assert codes.dtype == torch.uint8
    assert torch.equal(tokenizer.encode(x[100:200].numpy()), codes[100:200])
    report = tokenizer.report()
    table = codes.numpy()
    rows, counts = np.unique(table, axis=0, return_counts=True)
    assert report["items"] == 600
    assert report["unique_codes"] == len(rows)
    assert report["colliding_items"] == counts[counts > 1].sum()
    assert report["largest_group"] == counts.max()
    assert report["used_codes"] == [len(np.unique(table[:, book])) for book in range(3)]
    for perplexity, used in zip(report["perplexity"], report["used_codes"], strict=True):
        assert 1 <= perplexity <= used + 1e-9
    spread = (x - x.mean(0)).square().sum()
    wanted = float((tokenizer.decode(codes) - x).square().sum() / spread)
    assert report["reconstruction_error"] == pytest.approx(wanted, rel=1e-4)
    assert report["error_by_level"][-1] == report["reconstruction_error"]
    assert "assigned" not in report
    json.dumps(report, allow_nan=False)


@EVERY
def test_each_level_lessens_the_error(kind):
    errors = fitted(kind, vectors()).report()["error_by_level"]
    assert errors[0] < 1
    assert errors[2] < errors[1] < errors[0]


@EVERY
def test_same_seed_same_codes(kind):
    x = vectors()
    torch.manual_seed(1)
    first = fitted(kind, x, seed=3)
    torch.manual_seed(2)
    again, other = fitted(kind, x, seed=3), fitted(kind, x, seed=4)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.encode(x), again.encode(x))
    assert not torch.equal(first.centroids, other.centroids)


@pytest.mark.parametrize("kind", ["pq", "kmeans", "plain", "gradient"])
def test_score_table_sums_to_the_inner_product(kind):
    x, queries = vectors(), vectors(4, seed=1)
    tokenizer = fitted(kind, x)
    codes = tokenizer.encode(x)
    table = tokenizer.score_table(queries).detach()
    assert table.shape == (4, 3, 16)
    wanted = queries @ tokenizer.decode(codes).T
    scores, ids = CodeIndex(codes, 16).search(table, 600)
    torch.testing.assert_close(scores, wanted.gather(1, ids), rtol=1e-4, atol=1e-4)
    assert torch.autograd.gradcheck(tokenizer.double().score_table, (queries[:1].double().requires_grad_(),))


@EVERY
@pytest.mark.parametrize("collisions", ["digit", "sinkhorn", "none"])
def test_state_travels_as_safetensors(kind, collisions, tmp_path):
    x, later = vectors(), vectors(50, seed=5)
    tokenizer = fitted(kind, x, collisions=collisions)
    tokenizer.assign(x)
    save_file(tokenizer.state_dict(), tmp_path / "tokenizer.safetensors")
    again = MAKE[kind](collisions=collisions)
    with pytest.raises(RuntimeError, match=r"encode: the centroids must be fitted or loaded first"):
        again.encode(x)
    again.load_state_dict(load_file(tmp_path / "tokenizer.safetensors"))
    again.eval()
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert again.report(x) == tokenizer.report(x)
    with pytest.raises(RuntimeError, match="x must be given"):
        again.report()
    # What was given out is known, so the same comes next.
    assert np.array_equal(again.assign(later).numpy(), tokenizer.assign(later).numpy())
    assert len(again.assignment) == 650


@KMEANS
def test_state_of_an_earlier_release(kind):
    """Without what was remembered later: codes are the same, drift is unknown."""
    x = vectors()
    tokenizer = fitted(kind, x)
    state = {name: value for name, value in tokenizer.state_dict().items() if name in ("centroids", "values", "n_used")}
    again = MAKE[kind]()
    again.load_state_dict(state)
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert again.report(x)["drift"] is None
    assert len(again.assignment) == 0


@EVERY
@pytest.mark.parametrize("items", [1, 5])
def test_few_and_equal_rows(kind, items):
    x = vectors(1).repeat(items, 1)
    tokenizer = fitted(kind, x)
    report = tokenizer.report()
    assert report["unique_codes"] == 1
    assert report["largest_group"] == items
    assert report["perplexity"] == pytest.approx([1.0] * 3)
    assert report["reconstruction_error"] is None
    json.dumps(report, allow_nan=False)
    assert sorted(tokenizer.assign(x)[:, -1].tolist()) == list(range(items))
    if kind not in ("ema", "gradient"):
        assert torch.equal(tokenizer.decode(tokenizer.encode(x)), x)


@KMEANS
@pytest.mark.parametrize("items", [2, 7, 16])
def test_no_more_items_than_codes_are_recovered(kind, items):
    x = vectors(items).repeat(2, 1)
    # Same direction, another length; nothing at all.
    x[-1], x[-2] = 2 * x[0], 0.0
    x = x[: items + 2] if items < 16 else x[:items]
    tokenizer = fitted(kind, x)
    assert torch.equal(tokenizer.decode(tokenizer.encode(x)), x)
    assert tokenizer.report()["unique_codes"] == len(np.unique(x.numpy(), axis=0))
    assert torch.isfinite(tokenizer.score_table(x)).all()


@EVERY
@pytest.mark.parametrize("collisions", ["digit", "sinkhorn"])
def test_assigned_codes_are_unique_and_stay(kind, collisions):
    x, later = vectors(), vectors(300, seed=5)
    later[:100] = x[:100]  # copies of old items collide for certain
    tokenizer = fitted(kind, x, collisions=collisions)
    first = tokenizer.assign(x)
    second = tokenizer.assign(later)
    both = np.concatenate([first.numpy(), second.numpy()])
    plain = tokenizer.encode(torch.cat([x, later])).numpy()
    # A prefix has room for 16 items, one a last code.
    room = np.minimum(np.unique(plain[:, :2], axis=0, return_counts=True)[1], 16).sum()
    unique = 900 if collisions == "digit" else room
    assert unique > 600
    assert len(np.unique(both, axis=0)) == unique
    assert torch.equal(tokenizer.assignment.codes[:600], first.int())
    assigned = tokenizer.report()["assigned"]
    assert (assigned["items"], assigned["unique_codes"]) == (900, unique)
    assert (assigned["colliding_items"] == 0) == (unique == 900)
    if collisions == "digit":
        assert np.array_equal(both[:, :3], plain)
        assert assigned["n_codes"] == [16, 16, 16, both[:, 3].max() + 1]
    else:
        assert np.array_equal(both[:, :2], plain[:, :2])
        # Items alone with their codes keep them.
        _, group, counts = np.unique(plain[:600], axis=0, return_inverse=True, return_counts=True)
        alone = counts[group.ravel()] == 1
        assert alone.any()
        assert np.array_equal(first.numpy()[alone], plain[:600][alone])
    fresh = fitted(kind, x, collisions=collisions)
    assert np.array_equal(fresh.assign(x).numpy(), first.numpy())


@EVERY
def test_sinkhorn_makes_all_unique_where_prefixes_have_room(kind):
    x, later = vectors(120), vectors(40, seed=5)
    tokenizer = fitted(kind, torch.cat([x, x + 0.01]), collisions="sinkhorn")
    assert tokenizer.report(torch.cat([x, later]))["colliding_items"] > 20
    tokenizer.assign(x)
    tokenizer.assign(later)
    assigned = tokenizer.assignment.report()
    assert (assigned["items"], assigned["unique_codes"], assigned["largest_group"]) == (160, 160, 1)


def test_fit_forgets_what_was_given_out():
    x = vectors()
    tokenizer = fitted("pq", x)
    tokenizer.assign(x)
    tokenizer.fit(x)
    assert len(tokenizer.assignment) == 0
    assert "assigned" not in tokenizer.report()


@EVERY
def test_drift(kind):
    x = vectors(2000)
    tokenizer = fitted(kind, x)
    assert tokenizer.report()["drift"] == 1.0
    assert tokenizer.report(x)["drift"] == pytest.approx(1.0)
    same, other = (
        tokenizer.report(rows)["drift"] for rows in (vectors(2000, seed=7), 2 * vectors(2000, seed=7).flip(1))
    )
    assert 0.8 < same < 1.4
    assert other > 1.5 * same


@EVERY
@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda t, x: t.fit(x[:0]), ValueError, "fit: x must have at least one row, got none"),
        (lambda t, x: t.fit(x[:, :5]), ValueError, r"fit: x must have shape \[N, 12\], got \[20, 5\]"),
        (lambda t, x: t.fit(x.double()), TypeError, "fit: x must be float32, got float64"),
        (lambda t, x: t.fit(x.tolist()), TypeError, "fit: x must be a tensor or a numpy array, got list"),
        (lambda t, x: t.fit(x / 0), ValueError, r"fit: x\[0\] must be finite"),
        (lambda t, x: t.encode(x[0]), ValueError, r"encode: x must have shape \[N, 12\], got \[12\]"),
        (lambda t, x: t.assign(x[0]), ValueError, r"encode: x must have shape \[N, 12\], got \[12\]"),
        (lambda t, x: t.decode(torch.full((2, 3), 16)), IndexError, r"codes\[0, 0\] = 16 is outside \[0, 16\)"),
        (lambda t, x: t.decode(torch.zeros(2, 2)), ValueError, r"codes must have shape \[N, 3\], got \[2, 2\]"),
        (lambda t, x: t.score_table(x[0]), ValueError, r"queries must have shape \[Q, 12\], got \[12\]"),
        (lambda t, x: t.report(x[:0]), ValueError, "report: x must have at least one row, got none"),
        (lambda t, x: type(t)(12, 3, 0), ValueError, r"n_codes must be in \[1, 65536\], got 0"),
        (lambda t, x: type(t)(12, 0), ValueError, "must be at least 1|of 0 codebooks"),
        (lambda t, x: type(t)(12, 3, 4, collisions="luck"), ValueError, "method must be one of digit, sinkhorn, none"),
    ],
)
def test_rejects_bad_input(kind, call, error, sentence):
    x = vectors(20)
    tokenizer = fitted(kind, x)
    with pytest.raises(error, match=sentence):
        call(tokenizer, x)


# -- residual k-means ------------------------------------------------------------------------------------------------


def test_values_are_the_means_of_what_they_stand_for():
    x = vectors(400)
    tokenizer = fitted("kmeans", x)
    codes = tokenizer.encode(x).long()
    residual = x.double()
    for level in range(3):
        for code in codes[:, level].unique():
            rows = codes[:, level] == code
            torch.testing.assert_close(
                tokenizer.values[level, code].double(), residual[rows].mean(0), rtol=1e-5, atol=1e-6
            )
        residual = residual - tokenizer.values[level][codes[:, level]].double()


@pytest.mark.filterwarnings("ignore:ResidualKMeans.fit. the codes of level")
def test_normalising_tells_near_items_apart():
    """Most items sit close to a centroid, a few far off: without normalisation the far ones take the second level."""
    generator = torch.Generator().manual_seed(0)
    far = torch.rand(2000, 1, generator=generator) < 0.05
    x = vectors(2000) * 0 + torch.randn(8, 12, generator=generator)[torch.randint(8, (2000,), generator=generator)]
    x += torch.where(far, 2.0, 0.02) * torch.randn(2000, 12, generator=generator)
    with_it, without = (fitted(kind, x).report() for kind in ("kmeans", "plain"))
    assert with_it["unique_codes"] > 1.5 * without["unique_codes"]
    assert with_it["perplexity"][1] > 1.5 * without["perplexity"][1]


def test_collapse_is_told():
    x = torch.zeros(1000, 12)
    x[:100] = vectors(100)
    with pytest.warns(RuntimeWarning, match=r"ResidualKMeans\.fit: the codes of level 0 have collapsed"):
        nn.ResidualKMeans(12, 1, 64).fit(x)


# -- RQ-VAE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_rq_vae_learns(codebook):
    x = vectors(1500)

    def train(levels):
        model = nn.ResidualQuantizer(12, levels, 16, latent_dim=8, hidden=(32,), codebook=codebook)
        return model.fit(x, epochs=25, batch_size=250, lr=3e-3)

    one, three = train(1), train(3)
    assert three.history[-1] < 0.6 * three.history[0]
    assert three.report()["reconstruction_error"] < 0.7 * one.report()["reconstruction_error"]
    assert min(three.report()["perplexity"]) > 8
    assert not three.training


def test_straight_through_is_the_identity_to_gradients():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    coded = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 3, dtype=torch.float64)
    out = straight_through(x, coded)
    torch.testing.assert_close(out, coded)
    (out * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    assert coded.grad is None


def test_gradients_pass_the_codes():
    """The gradient of the decoded vectors is that of an auto-encoder whose codes are a constant added to z."""
    x = vectors(50)
    model = fitted("gradient", x)
    out, codes = model(x)
    assert torch.equal(codes, model.encode(x).long())
    torch.testing.assert_close(out.detach(), model.decode(codes))
    grads = torch.autograd.grad(out.square().sum(), list(model.encoder.parameters()))
    z = model.encoder((x - model.mean) / model.scale)
    said = sum(model.centroids[level][codes[:, level]] for level in range(3))
    plain = model.decoder(z + (said - z).detach()) * model.scale + model.mean
    for got, wanted in zip(
        grads, torch.autograd.grad(plain.square().sum(), list(model.encoder.parameters())), strict=True
    ):
        torch.testing.assert_close(got, wanted)
        assert got.abs().sum() > 0


def test_joint_training_reaches_what_is_below():
    """`loss` beside another model: it initialises itself, and its gradient reaches every weight and the input."""
    below = torch.nn.Linear(12, 12)
    model = MAKE["gradient"]()
    loss = model.loss(below(vectors(200)))
    loss.backward()
    for name, parameter in [*below.named_parameters(), *model.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert int(model.steps) == 2


def test_loss_is_its_formula():
    x = vectors(64)
    model = fitted("gradient", x)
    with torch.no_grad():
        z = model.encoder((x - model.mean) / model.scale)
        residual, wanted, said = z, 0.0, 0.0
        for level in range(3):
            distance = torch.cdist(residual, model.centroids[level])
            chosen = model.centroids[level][distance.argmin(1)]
            wanted = wanted + 1.25 * (residual - chosen).square().mean()
            residual, said = residual - chosen, said + chosen
        wanted = wanted + (model.decoder(said) - (x - model.mean) / model.scale).square().mean()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        torch.testing.assert_close(model.loss(x), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "evaluation changes none"
    )


def test_dead_codes_come_back():
    x = vectors(500)
    model = fitted("ema", x)
    with torch.no_grad():
        model.centroids[0, 5] = 1e3
        model.sums[0, 5] = 0.0
        model.counts[0, 5] = 0.0
    assert 5 not in model.encode(x)[:, 0].tolist()
    model.train()
    model.loss(x)
    assert 5 in model.encode(x)[:, 0].tolist()


def test_a_nonlinear_decoder_has_no_score_table():
    model = nn.ResidualQuantizer(12, 2, 4, latent_dim=4, hidden=(8,)).fit(vectors(50), epochs=1)
    with pytest.raises(ValueError, match=r"the decoder must be affine \(decoder_hidden=\(\)\)"):
        model.score_table(vectors(3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"codebook": "magic"}, "codebook must be ema or gradient, got 'magic'"),
        ({"latent_dim": 0}, "latent_dim and the widths of hidden layers must be at least 1"),
        ({"decay": 1.0}, r"decay and revive must be in \[0, 1\)"),
        ({"commitment": -1.0}, "commitment at least 0"),
    ],
)
def test_rejects_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        nn.ResidualQuantizer(12, **options)


def test_rejects_bad_training():
    model = MAKE["ema"]()
    with pytest.raises(ValueError, match="epochs and batch_size must be at least 1, got 0 and 8"):
        model.fit(vectors(20), epochs=0, batch_size=8)
    with pytest.raises(ValueError, match="loss: x must have at least one row"):
        model.loss(vectors(20)[:0])
    with pytest.raises(RuntimeError, match="loss: the centroids must be fitted"):
        model.eval().loss(vectors(20))


@EVERY
def test_decode_refuses_what_is_no_code(kind):
    tokenizer = fitted(kind, vectors())
    for dtype, name in ((torch.float32, "float32"), (torch.bool, "bool")):
        with pytest.raises(TypeError, match=f"decode: codes must be integers, got {name}"):
            tokenizer.decode(torch.zeros(2, 3, dtype=dtype))


@EVERY
def test_vectors_too_long_to_measure_are_refused(kind):
    """FAISS would end the process."""
    x = torch.as_tensor(vectors()).clone()
    tokenizer = fitted(kind, x)
    x[7] *= 1e25
    for method in ("fit", "encode", "assign", "report"):
        with pytest.raises(ValueError, match=r"x\[7\] must be finite and shorter than 2\*\*60, got length "):
            getattr(tokenizer, method)(x)


@EVERY
@pytest.mark.parametrize("seed", [-1, 2**31, 2**40])
def test_any_seed_will_do(kind, seed):
    x = vectors()
    one, other = fitted(kind, x, seed), fitted(kind, x, seed)
    assert torch.equal(one.encode(x), other.encode(x))


@EVERY
def test_rows_are_measured_piece_by_piece(kind, monkeypatch):
    """Never distances of all items at once; a batch of the training is one of 128."""
    from recfast.nn import _tokenizer

    monkeypatch.setattr(_tokenizer, "_CELLS", 16 * 64)
    shapes, measure = [], _tokenizer.squared_distances

    def measured(x, *rest):
        shapes.append(len(x))
        return measure(x, *rest)

    for module in ("quantizer", "residual_kmeans", "residual_quantizer"):
        monkeypatch.setattr(f"recfast.nn.{module}.squared_distances", measured)
    fitted(kind, vectors())
    assert max(shapes) <= 128
