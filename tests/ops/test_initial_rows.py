"""The five tests of an op, and that the draws are what they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(
    ids=st.lists(INT64, max_size=20),
    dim=st.integers(1, 35),
    std=st.floats(0, 10),
    seed=st.integers(0, 2**63 - 1),
    distribution=st.sampled_from(["normal", "uniform"]),
)
def test_matches_reference(ids, dim, std, seed, distribution, poisoned_empty):
    ids = torch.tensor(ids, dtype=torch.int64)
    out = ops.initial_rows(ids, dim, std=std, seed=seed, distribution=distribution)
    assert out.shape == (len(ids), dim)
    assert torch.equal(out, ops.initial_rows.reference(ids, dim, std=std, seed=seed, distribution=distribution))


def test_depends_on_seed_and_id_alone():
    ids = torch.randint(-(2**63), 2**63 - 1, (3000,), generator=torch.Generator().manual_seed(0))
    whole = ops.initial_rows(ids, 9, seed=4)
    order = torch.randperm(3000)
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    other = ops.initial_rows(ids[order], 9, seed=4)
    torch.set_num_threads(before)
    assert torch.equal(other, whole[order])
    assert torch.equal(ops.initial_rows(ids[5:6], 9, seed=4), whole[5:6])
    assert torch.equal(ops.initial_rows(ids, 4, seed=4), whole[:, :4])  # a wider row begins like a narrow one
    assert not torch.equal(ops.initial_rows(ids, 9, seed=5), whole)
    assert len({tuple(row) for row in whole.tolist()}) == ids.unique().numel()


def test_known_values():
    from recfast import _C

    words = _C.philox4x32(11, 5, 0, 1, 0x494E4954)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    deviation = ((2**32 - 1) / 3) ** 0.5
    wanted = [(sum(halves[:4]) - 131070) / deviation, (sum(halves[4:]) - 131070) / deviation]
    assert ops.initial_rows(torch.tensor([5]), 4, seed=11)[0, 2:].tolist() == pytest.approx(wanted, rel=1e-6)
    assert ops.initial_rows(torch.tensor([5]), 3, std=0.0).tolist() == [[0.0] * 3]


@pytest.mark.parametrize(("distribution", "kurtosis", "limit"), [("normal", 2.7, 3.47), ("uniform", 1.8, 1.7321)])
def test_moments(distribution, kurtosis, limit):
    """640,000 draws: mean within 5 s.e. of 0, variance within 5 s.e. of 1, no correlation of columns or of ids."""
    draws = ops.initial_rows(torch.arange(10_000), 64, seed=1, distribution=distribution).double()
    count = draws.numel()
    assert abs(float(draws.mean())) < 5 / count**0.5
    assert abs(float(draws.var()) - 1) < 5 * ((kurtosis - 1) / count) ** 0.5
    assert abs(float((draws**4).mean()) - kurtosis) < 0.05
    assert float(draws.abs().max()) < limit
    off = torch.corrcoef(draws.T) - torch.eye(64, dtype=torch.float64)
    assert float(off.abs().max()) < 5.5 / 10_000**0.5
    assert abs(float((draws[1:] * draws[:-1]).mean())) < 5 / count**0.5
    other = ops.initial_rows(torch.arange(10_000), 64, seed=1, distribution="uniform").double()
    if distribution == "normal":
        assert abs(float((draws * other).mean())) < 5 / count**0.5


def test_opcheck(opcheck):
    opcheck(REGISTRY["initial_rows"])


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (([1], 3), TypeError, "initial_rows: ids must be a tensor, got list"),
        ((torch.ones(2, dtype=torch.int32), 3), TypeError, "ids must be int64, got int32"),
        ((torch.ones(2, 1, dtype=torch.int64), 3), ValueError, r"ids must have shape \[n\], got \[2, 1\]"),
        ((torch.arange(2), 0), ValueError, "dim must be at least 1, got 0"),
        ((torch.arange(2), 3, -1.0), ValueError, "std must be finite and not negative, got -1.0"),
        ((torch.arange(2), 3, float("nan")), ValueError, "std must be finite and not negative, got nan"),
        ((torch.arange(2), 3, 1.0, -1), ValueError, r"seed = -1 is outside \[0, "),
        (
            (torch.arange(2), 3, 1.0, 0, "cauchy"),
            ValueError,
            "distribution must be one of normal, uniform",
        ),
    ],
)
def test_rejects_bad_input(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        ops.initial_rows(*arguments[:2], **dict(zip(("std", "seed", "distribution"), arguments[2:], strict=False)))
