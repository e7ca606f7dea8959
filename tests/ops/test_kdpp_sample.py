"""The five tests of kdpp_sample, then its distribution: frequencies of whole sets, inclusion, independence."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.nn.functional import normalize

from recfast import ops
from recfast.ops._library import REGISTRY
from recfast.ops.kdpp_sample import _draws


def make(users, items, width, seed, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(users, items, width, generator=generator, dtype=dtype), dim=-1)
    return rows, spread * torch.randn(users, items, generator=generator, dtype=dtype)


def kernel(features, quality=None, gamma=0.0):
    """L of one user, from the definition."""
    rows = features.double().numpy()
    similar = (1 - gamma) * rows @ rows.T + gamma * np.eye(len(rows))
    scale = np.ones(len(rows)) if quality is None else np.exp(quality.double().numpy())
    return scale[:, None] * similar * scale


def chances(matrix, k):
    """Every set of k items and its probability."""
    sets = list(itertools.combinations(range(len(matrix)), k))
    worth = np.array([max(np.linalg.det(matrix[np.ix_(s, s)]), 0.0) for s in sets])
    return sets, worth / worth.sum(), worth.sum()


@given(
    users=st.integers(0, 3),
    items=st.one_of(st.sampled_from([0, 1, 7, 8, 9]), st.integers(0, 40)),
    width=st.one_of(st.sampled_from([1, 7, 8, 9]), st.integers(1, 20)),
    k=st.integers(0, 12),
    samples=st.integers(0, 4),
    gamma=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_matches_reference(users, items, width, k, samples, gamma, dtype, seed, isa_levels, poisoned_empty):
    features, quality = make(users, items, width, seed, dtype, spread=0.5)
    options = {"quality": quality, "seed": seed, "samples": samples, "gamma": gamma}
    if seed % 3 == 0:
        options["lengths"] = torch.randint(0, items + 1, (users,), generator=torch.Generator().manual_seed(seed))
    if seed % 4 == 0:
        options["mask"] = torch.rand(users, items, generator=torch.Generator().manual_seed(seed)) < 0.5
    if seed % 5 == 0:
        options["users"] = torch.randint(0, 2**62, (users,), generator=torch.Generator().manual_seed(seed))
    wanted = ops.kdpp_sample.reference(features, k, **options)
    for _ in isa_levels():
        answer = ops.kdpp_sample(features, k, **options)
        assert torch.equal(answer.count, wanted.count)
        assert torch.equal(answer.indices, wanted.indices)
        # Both decompose in float64; the smallest of up to 12 eigenvalues is known to about 1e-8 of itself.
        torch.testing.assert_close(answer.log_normaliser, wanted.log_normaliser, rtol=1e-9, atol=1e-6)


def test_known_values():
    # Items 0 and 1 are equal, so are 2 and 3: one of each pair, items 1 and 3 with q = 2 four times as often.
    features = torch.eye(2)[[0, 0, 1, 1]]
    quality = torch.tensor([[0.0, math.log(2.0), 0.0, math.log(2.0)]])
    answer = ops.kdpp_sample(features, 2, quality=quality, seed=0, samples=4000)
    assert answer.count.tolist() == [2]
    assert answer.log_normaliser.tolist() == pytest.approx([math.log(25.0)])
    assert (answer.indices // 2 == torch.tensor([0, 1])).all()
    share = (answer.indices % 2).double().mean((0, 1))
    # Four standard deviations of a mean of 4000.
    assert share.tolist() == pytest.approx([0.8, 0.8], abs=4 * math.sqrt(0.16 / 4000))
    # All items of a kernel of full rank, in ascending order.
    assert ops.kdpp_sample(torch.eye(3)[[2, 0, 1]], 3, seed=1).indices.tolist() == [[[0, 1, 2]]]


def test_gradcheck():
    """Inference only: an input that asks for a gradient gets a result without one."""
    features, quality = make(2, 9, 4, 0)
    answer = ops.kdpp_sample(features.requires_grad_(), 3, quality=quality.requires_grad_(), seed=0)
    assert not any(value.requires_grad for value in answer)


def test_opcheck(opcheck):
    opcheck(REGISTRY["kdpp_sample"])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"features": [[1.0]]}, TypeError, "kdpp_sample: features must be a tensor, got list"),
        ({"features": torch.ones(2, 3, 4).half()}, TypeError, "features must be float32 or float64, got float16"),
        ({"features": torch.ones(2, 4, 4)}, ValueError, r"features must have shape \[2, 3, D\], got \[2, 4, 4\]"),
        ({"features": torch.ones(4, 4)}, ValueError, r"features must have shape \[3, D\], got \[4, 4\]"),
        ({"features": torch.ones(4), "quality": None}, ValueError, r"features must have shape \[U, N, D\] or"),
        ({"quality": torch.ones(3)}, ValueError, r"quality must have shape \[U, N\], got \[3\]"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"samples": -1}, ValueError, "samples must be at least 0, got -1"),
        ({"seed": -1}, ValueError, r"seed = -1 is outside \[0, 9223372036854775808\)"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({"gamma": math.nan}, ValueError, "gamma must be in"),
        ({"lengths": torch.tensor([1, 4])}, IndexError, r"lengths\[1\] = 4 is outside \[0, 4\)"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths must have shape \[2\], got \[1\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got float32"),
        ({"users": torch.ones(2)}, TypeError, "users must be int32 or int64, got float32"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments = {"features": torch.ones(2, 3, 4), "k": 2, "quality": torch.zeros(2, 3), "seed": 0} | change
    with pytest.raises(error, match=sentence):
        ops.kdpp_sample(arguments.pop("features"), arguments.pop("k"), **arguments)


def test_refuses_what_is_not_finite():
    features, quality = make(2, 5, 3, 0)
    features[1, 3, 2] = math.nan
    with pytest.raises(ValueError, match=r"features\[1, 3, 2\] must be a finite number .*, got nan"):
        ops.kdpp_sample(features, 2, seed=0, quality=quality)
    # What is no candidate is not read.
    ops.kdpp_sample(features, 2, seed=0, quality=quality, lengths=torch.tensor([5, 3]))
    features[1, 3, 2] = 0.0
    quality[0, 1] = -math.inf
    with pytest.raises(ValueError, match=r"quality\[0, 1\] must be finite, got -inf"):
        ops.kdpp_sample(features, 2, seed=0, quality=quality)


@pytest.mark.parametrize(
    ("width", "spread", "gamma"),
    [(3, 0.0, 0.0), (4, 1.0, 0.0), (9, 0.7, 0.0), (3, 0.7, 0.1), (2, 0.5, 0.3), (5, 3.0, 0.0)],
)
def test_frequencies_of_all_sets(width, spread, gamma):
    """Chi-squared over all 20 sets of 3 out of 6: by the dual (width below 6), by the kernel, regularised."""
    features, quality = make(1, 6, width, 10 * width, torch.float64, spread)
    matrix = kernel(features[0], quality[0], gamma)
    sets, chance, whole = chances(matrix, 3)
    samples = 20_000
    answer = ops.kdpp_sample(features, 3, quality=quality, seed=5, samples=samples, gamma=gamma)
    assert float(answer.log_normaliser[0]) == pytest.approx(math.log(whole), abs=1e-9)
    place = {s: n for n, s in enumerate(sets)}
    counts = np.bincount([place[tuple(s)] for s in answer.indices[0].tolist()], minlength=len(sets))
    # Sets that are expected less than five times are counted together.
    rare = chance * samples < 5
    seen, expected = counts[~rare], chance[~rare] * samples
    if rare.any():
        assert counts[rare].sum() <= 5 * rare.sum() + 20
        seen, expected = np.append(seen, counts[rare].sum()), np.append(expected, chance[rare].sum() * samples)
    if expected[-1] < 5:
        seen, expected = seen[:-1], expected[:-1] * seen[:-1].sum() / expected[:-1].sum()
    assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_one_sample_of_many_users():
    """As above, but one sample of each of many users: the eigenvectors are then taken one sample at a time."""
    features, quality = make(1, 6, 5, 3, torch.float64)
    sets, chance, _ = chances(kernel(features[0], quality[0]), 2)
    users = 20_000
    answer = ops.kdpp_sample(features[0], 2, quality=quality.expand(users, 6), seed=2)
    place = {s: n for n, s in enumerate(sets)}
    counts = np.bincount([place[tuple(s)] for s in answer.indices[:, 0].tolist()], minlength=len(sets))
    assert stats.chisquare(counts, chance * users).pvalue > 1e-3


@pytest.mark.parametrize(("items", "width", "k"), [(40, 12, 5), (40, 12, 11), (12, 30, 6)])
def test_inclusion(items, width, k):
    """How often each item is in a set: sum_n V_in^2 lambda_n e_(k-1)(without n) / e_k, by polynomials."""
    features, quality = make(1, items, width, 7, torch.float64, 0.5)
    values, vectors = np.linalg.eigh(kernel(features[0], quality[0]))
    values = np.clip(values, 0, None)

    def elementary(some, degree):
        return np.poly(-some)[degree] if degree <= len(some) else 0.0

    taken = np.array([v * elementary(np.delete(values, n), k - 1) for n, v in enumerate(values)]) / elementary(
        values, k
    )
    wanted = vectors**2 @ taken
    assert wanted.sum() == pytest.approx(k)
    samples = 20_000
    answer = ops.kdpp_sample(features, k, quality=quality, seed=1, samples=samples)
    share = np.bincount(answer.indices.flatten().numpy(), minlength=items) / samples
    # 5 standard deviations: 92 comparisons fail by chance once in 20,000 seeds.
    assert (np.abs(share - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / samples) + 1e-9).all()


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_same_sets_in_any_batch_and_by_any_number_of_threads(gamma, isa_levels):
    # Equal norms along the axes: eigenvalues are equal, so that any change in rounding would change the eigenvectors.
    features = torch.eye(9)[torch.arange(27) % 9].expand(12, 27, 9).clone()
    features[6:] = make(6, 27, 9, 4)[0]
    quality = make(12, 27, 9, 5)[1].round()
    ids = torch.arange(12) * 7 + 1
    options = {"seed": 3, "samples": 5, "gamma": gamma}
    whole = ops.kdpp_sample(features, 4, quality=quality, users=ids, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in isa_levels():
                again = ops.kdpp_sample(features, 4, quality=quality, users=ids, **options)
                assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    finally:
        torch.set_num_threads(before)
    for user in range(12):
        row = slice(user, user + 1)
        alone = ops.kdpp_sample(features[row], 4, quality=quality[row], users=ids[row], **options)
        assert all(torch.equal(a, b[row]) for a, b in zip(alone, whole, strict=True))
    # A sample is the same however many there are, and padding does not matter.
    first = ops.kdpp_sample(features, 4, quality=quality, users=ids, **options | {"samples": 1})
    assert torch.equal(first.indices, whole.indices[:, :1])
    longer = torch.cat([features, torch.full((12, 3, 9), math.nan)], dim=1)
    padded = ops.kdpp_sample(
        longer, 4, quality=torch.nn.functional.pad(quality, (0, 3)), users=ids, lengths=torch.full((12,), 27), **options
    )
    assert all(torch.equal(a, b) for a, b in zip(padded, whole, strict=True))
    # Other users, samples and seeds have other numbers.
    assert len({tuple(s) for s in whole.indices[0].tolist()}) > 1
    other = ops.kdpp_sample(features, 4, quality=quality, users=ids, **options | {"seed": 4})
    assert not torch.equal(other.indices, whole.indices)


def test_rank_and_duplicates():
    """k above the rank: as many as there are directions, never two of a kind, never noise."""
    for dtype in (torch.float32, torch.float64):
        rows, quality = make(4, 5, 30, 1, dtype)
        features = rows[:, torch.arange(40) % 5]
        options = {"quality": quality[:, torch.arange(40) % 5], "seed": 0, "samples": 50}
        answer = ops.kdpp_sample(features, 9, **options)
        assert answer.count.tolist() == [5] * 4
        assert (answer.indices[..., 5:] == -1).all()
        assert torch.equal(torch.sort(answer.indices[..., :5] % 5)[0], torch.arange(5).expand(4, 50, 5))
        # Twelve directions of width 30 (by the dual), the same twelve of width 12.
        low = make(1, 40, 12, 2, dtype)[0]
        wide = low @ make(1, 12, 30, 3, dtype)[0]
        assert ops.kdpp_sample(wide, 20, seed=0).count.tolist() == [12]
        assert ops.kdpp_sample(low, 20, seed=0).count.tolist() == [12]
        regular = ops.kdpp_sample(features, 9, gamma=0.05, **options)
        assert regular.count.tolist() == [9] * 4
        assert (regular.indices.sort()[0].diff() > 0).all()
    empty = ops.kdpp_sample(torch.zeros(2, 3, 4), 2, seed=0)
    assert empty.count.tolist() == [0, 0]
    assert empty.indices.tolist() == [[[-1, -1]]] * 2
    assert empty.log_normaliser.tolist() == [0.0, 0.0]


def test_far_apart_qualities():
    """Where the best few outweigh the rest by 1e60 the dual knows nothing of the rest, but the answer does."""
    features = make(1, 60, 8, 0, torch.float64)[0]
    quality = torch.zeros(1, 60, dtype=torch.float64)
    quality[0, :3] = torch.tensor([90.0, 70.0, 50.0])
    answer = ops.kdpp_sample(features, 4, quality=quality, seed=0, samples=20_000)
    assert answer.count.tolist() == [4]
    assert (answer.indices[0, :, :3] == torch.arange(3)).all()
    # The fourth is drawn by what it has left beside the first three.
    basis = np.linalg.qr(features[0, :3].numpy().T)[0]
    rest = (features[0].numpy() ** 2).sum(1) - ((features[0].numpy() @ basis) ** 2).sum(1)
    counts = np.bincount(answer.indices[0, :, 3], minlength=60)[3:]
    assert stats.chisquare(counts, rest[3:] / rest[3:].sum() * 20_000).pvalue > 1e-3
    first, fourth = np.linalg.slogdet(features[0, :3].numpy() @ features[0, :3].numpy().T)[1], math.log(rest[3:].sum())
    assert float(answer.log_normaliser) == pytest.approx(2 * 210 + first + fourth, abs=1e-8)
    # What is added to all of them changes nothing but the sum.
    more = ops.kdpp_sample(features, 4, quality=quality + 1000, seed=0, samples=100)
    assert torch.equal(more.indices, answer.indices[:, :100])
    assert float(more.log_normaliser - answer.log_normaliser) == pytest.approx(8000)
    # More than 300 below is out of the question.
    assert ops.kdpp_sample(features, 4, quality=quality * 10, seed=0).count.tolist() == [2]


def test_normaliser_gives_log_probabilities():
    features, quality = make(3, 7, 5, 8, torch.float64)
    answer = ops.kdpp_sample(features, 3, quality=quality, seed=0)
    for user in range(3):
        _, _, whole = chances(kernel(features[user], quality[user]), 3)
        assert float(answer.log_normaliser[user]) == pytest.approx(math.log(whole), abs=1e-10)


def test_numbers_are_even():
    """The generator's doubles, as the reference draws them: 53 bits, uniform, one stream a sample."""
    streams = [_draws(7, user, sample) for user in range(20) for sample in range(20)]
    values = np.array([[next(stream) for _ in range(25)] for stream in streams])
    assert (values >= 0).all()
    assert (values < 1).all()
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-3
    assert len(np.unique(values)) == values.size
