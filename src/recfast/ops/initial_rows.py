"""What new rows of a dynamic table start with: `initial_rows`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from recfast.ops import _check
from recfast.ops._library import define, kernel

_KERNEL = kernel("initial_rows")
DISTRIBUTIONS = ("normal", "uniform")
_LAST_WORD = {"normal": 0x494E4954, "uniform": 0x494E4955}
_DEVIATION = {"normal": math.sqrt((2**32 - 1) / 3), "uniform": 2**24 / math.sqrt(3)}


def _cpu(ids: torch.Tensor, dim: int, std: float, seed: int, distribution: str) -> torch.Tensor:
    ids = ids.contiguous()
    out = torch.empty(ids.numel(), dim)
    _KERNEL(ids.data_ptr(), ids.numel(), dim, std, seed, distribution == "uniform", out.data_ptr())
    return out


def _fake(ids, dim, std, seed, distribution):
    return ids.new_empty((ids.shape[0], dim), dtype=torch.float32)


def _samples() -> Iterator[tuple]:
    yield torch.tensor([0, -1, 2**63 - 1, -(2**63), 7]), 5, 0.01, 3, "normal"
    yield torch.arange(3), 8, 1.0, 0, "uniform"
    yield torch.empty(0, dtype=torch.int64), 4, 1.0, 0, "normal"


def reference(
    ids: torch.Tensor, dim: int, *, std: float = 1.0, seed: int = 0, distribution: str = "normal"
) -> torch.Tensor:
    """The same in plain torch, bit for bit: Philox-4x32-7 in int64 arithmetic, where products wrap."""
    low = 0xFFFFFFFF
    pairs = torch.arange(-(-dim // 2))
    id_, c2 = (x.reshape(-1) for x in torch.meshgrid(ids, pairs, indexing="ij"))
    c0, c1, c3 = id_ & low, id_ >> 32 & low, torch.full_like(c2, _LAST_WORD[distribution])
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(7):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 & low ^ c1 ^ k0, p1 & low, p0 >> 32 & low ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack([c0, c1, c2, c3], 1).reshape(len(ids), 2 * len(pairs), 2)[:, :dim]
    if distribution == "normal":
        whole = ((words & 0xFFFF) + (words >> 16)).sum(2) - 131070
    else:
        whole = 2 * (words[:, :, 0] >> 8) + 1 - 2**24
    return whole.float() * torch.tensor(std / _DEVIATION[distribution])


_op = define(
    "initial_rows(Tensor ids, SymInt dim, float std, int seed, str distribution) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=lambda ids, dim, std, seed, distribution: reference(
        ids, dim, std=std, seed=seed, distribution=distribution
    ),
)


def initial_rows(
    ids: torch.Tensor, dim: int, *, std: float = 1.0, seed: int = 0, distribution: str = "normal"
) -> torch.Tensor:
    """Draw a row for each id, which depends on `seed` and the id alone.

    .. math:: w_{id} = \\sigma \\sqrt{3 / (2^{32} - 1)} \\; (h_0 + h_1 + h_2 + h_3 - 131070)

    with h four draws of 16 bits: mean 0, standard deviation `std`, all values within 3.47 `std`. An id gets the same
    bits on every machine, and in whatever company.

    Parameters
    ----------
    ids : Tensor [n], int64, any values
    dim : int
        D.
    std : float
        Standard deviation, finite and not negative.
    seed : int
        In [0, 2^63).
    distribution : str
        "normal", as above; "uniform": inside +-sqrt(3) `std`, draws of 24 bits that are independent of the normal ones.

    Returns
    -------
    Tensor [n, D], float32.

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape; options out of range.

    Notes
    -----
    The integer sum is exact and the product rounded once. Not differentiable (ids have no gradient). Backend: CPU.

    References
    ----------
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    """
    op = "initial_rows"
    _check.tensor(op, "ids", ids, dtypes=[torch.int64], shape=["n"])
    _check.at_least(op, "dim", dim, 1)
    if not 0 <= std < math.inf:
        raise ValueError(f"{op}: std must be finite and not negative, got {std}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed = {seed} is outside [0, {2**63})")
    _check.choice(op, "distribution", distribution, DISTRIBUTIONS)
    return _op(ids, dim, float(std), seed, distribution)


initial_rows.reference = reference
