"""Diverse sets for many users at once: exact samples of a k-DPP on a low-rank kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel

_OP = "kdpp_sample"
_DTYPES = (torch.float32, torch.float64)
_threads = kernel("max_threads")
_KERNELS = {torch.float32: kernel("kdpp_sample_float32"), torch.float64: kernel("kdpp_sample_float64")}
# Equal to kSpent, kRange and kRejections of csrc/kdpp_sample/kdpp_sample.h.
_SPENT = 1e-10
_RANGE = 300.0
_REJECTIONS = 8


class KDPPResult(NamedTuple):
    """What `kdpp_sample` returns.

    Attributes
    ----------
    indices
        int64 [U, S, K]: for each sample its positions among the user's candidates, ascending, then -1.
    count
        int64 [U]: items in each of the user's samples, the smaller of k and the rank of the user's kernel.
    log_normaliser
        float64 [U]: log e_count(L), the sum of det L_Y over all sets of `count` items: `log det L_Y - log_normaliser`
        is the log-probability of a sample.
    """

    indices: Tensor
    count: Tensor
    log_normaliser: Tensor


def _empty(users: int, samples: int, picks: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((users, samples, picks), dtype=torch.int64),
        like.new_empty((users,), dtype=torch.int64),
        like.new_empty((users,), dtype=torch.float64),
    )


def _cpu(
    features: Tensor,
    quality: Tensor,
    k: int,
    seed: int,
    samples: int,
    gamma: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    users: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, items = quality.shape
    width = features.shape[-1]
    features = features.contiguous()
    inputs = {"quality": quality.double(), "lengths": lengths, "mask": mask, "keys": users}
    inputs = {name: None if value is None else value.contiguous() for name, value in inputs.items()}
    indices, count, log_normaliser = outputs = _empty(batch, samples, k, quality)
    a_thread = _C.kdpp_sample_scratch(items, width, k, gamma > 0)
    # A loop over two users may still number its threads up to the team's size.
    scratch = torch.empty(a_thread * max(1, _threads()) + 64, dtype=torch.uint8)
    wrong_feature, wrong_quality = _KERNELS[features.dtype](
        users=batch,
        items=items,
        width=width,
        picks=k,
        samples=samples,
        gamma=gamma,
        seed=seed,
        features=features.data_ptr(),
        user_stride=0 if features.dim() == 2 else items * width,
        indices=indices.data_ptr(),
        count=count.data_ptr(),
        log_normaliser=log_normaliser.data_ptr(),
        scratch=scratch.data_ptr(),
        **{name: 0 if value is None else value.data_ptr() for name, value in inputs.items()},
    )
    if wrong_feature >= 0:
        raise _not_finite("features", features, wrong_feature, "a finite number with a finite squared norm")
    if wrong_quality >= 0:
        raise _not_finite("quality", quality, wrong_quality, "finite")
    return outputs


def _not_finite(name: str, value: Tensor, position: int, expected: str) -> ValueError:
    place, rest = [], position
    for size in reversed(value.shape):
        place.insert(0, rest % size)
        rest //= size
    where = ", ".join(map(str, place))
    return ValueError(f"{_OP}: {name}[{where}] must be {expected}, got {float(value[tuple(place)])}")


def _fake(features, quality, k, seed, samples, gamma, lengths, mask, users):
    return _empty(quality.shape[0], samples, k, quality)


def _philox(seed: int, key: int, sample: int, block: int) -> list[int]:
    low = 0xFFFFFFFF
    k0, k1 = seed & low, seed >> 32 & low
    c0, c1, c2, c3 = key & low, key >> 32 & low, sample, block
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & low, p0 >> 32 ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return [c0, c1, c2, c3]


def _draws(seed: int, key: int, sample: int) -> Iterator[float]:
    block = 0
    while True:
        words = _philox(seed, key, sample, block)
        for high, low in (words[:2], words[2:]):
            yield ((high >> 5) * 2**26 + (low >> 6)) / 2**53
        block += 1


def _ratios(values: list[float], k: int) -> list[list[float]]:
    """e_m / e_(m-1) of the first n values, for n = 0, 1, ... and m = 1 ... k."""
    table = [[0.0] * k]
    for n, value in enumerate(values):
        before = table[-1]
        row = [before[0] + value]
        row += [(before[m] + value) / (1 + value / before[m - 1]) if m <= n else 0.0 for m in range(1, k)]
        table.append(row)
    return table


def _draw_items(vectors: Tensor, draws: Iterator[float]) -> list[int]:
    """A sample of the projection DPP on the orthonormal columns of `vectors` [N, K]."""
    items, k = vectors.shape
    cumulative = vectors.square().cumsum(0).T.contiguous()
    basis = vectors.new_zeros(0, k)
    picks: list[int] = []

    def at(sums: Tensor, uniform: float) -> int:
        return min(int(torch.searchsorted(sums, uniform * sums[-1], right=True)), items - 1)

    while len(picks) < k:
        chosen = None
        for _ in range(_REJECTIONS * k):
            column = cumulative[min(int(next(draws) * k), k - 1)]
            item = at(column, next(draws))
            uniform = next(draws)
            row = vectors[item]
            whole = row.square().sum()
            if item not in picks and bool(whole - (basis @ row).square().sum() > uniform * whole):
                chosen = item
                break
        if chosen is None:
            rest = (vectors.square().sum(1) - (vectors @ basis.T).square().sum(1)).clamp(min=0)
            rest[picks] = 0.0
            chosen = at(rest.cumsum(0), next(draws))
        picks.append(chosen)
        row = vectors[chosen]
        for _ in range(2):
            row = row - (basis @ row) @ basis
        basis = torch.cat([basis, (row / row.norm())[None]])
    return sorted(picks)


def _reference(features, quality, k, seed, samples, gamma, lengths, mask, users):
    batch, items = quality.shape
    result = KDPPResult(*_empty(batch, samples, k, quality))
    result.indices.fill_(-1)
    result.count.zero_()
    result.log_normaliser.zero_()
    for user in range(batch):
        free = torch.ones(items, dtype=torch.bool) if mask is None else mask[user].clone()
        if lengths is not None:
            free[int(lengths[user]) :] = False
        if not bool(free.any()):
            continue
        value = quality[user].double()
        greatest = float(value[free].max())
        free &= value >= greatest - _RANGE
        rows = (features if features.dim() == 2 else features[user])[free].double()
        weight = torch.exp(value[free] - greatest)
        similar = (1 - gamma) * rows @ rows.T + gamma * torch.eye(len(rows), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(weight[:, None] * similar * weight)
        values, vectors = values.flip(0), vectors.flip(1)
        rank = int((values > _SPENT * values[0]).sum())
        count = min(k, rank)
        result.count[user] = count
        if count == 0:
            continue
        scaled = (values[:rank] / values[0]).tolist()
        table = _ratios(scaled, count)
        result.log_normaliser[user] = (
            sum(math.log(ratio) for ratio in table[-1]) + count * math.log(float(values[0])) + 2 * greatest * count
        )
        positions = free.nonzero()[:, 0]
        for sample in range(samples):
            draws = _draws(seed, user if users is None else int(users[user]), sample)
            chosen: list[int] = []
            for n in reversed(range(rank)):
                missing = count - len(chosen)
                if missing > 0 and next(draws) * (table[n][missing - 1] + scaled[n]) < scaled[n]:
                    chosen.append(n)
            result.indices[user, sample, :count] = positions[_draw_items(vectors[:, sorted(chosen)], draws)]
    return tuple(result)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, 5, generator=generator)
    quality = torch.randn(3, 20, generator=generator)
    yield features, quality, 3, 1, 2, 0.0, None, None, None
    lengths = torch.tensor([20, 3, 0])
    mask = torch.rand(3, 20, generator=generator) < 0.6
    yield features, quality, 7, 2, 3, 0.0, lengths, None, torch.tensor([5, 2**40, 7])
    yield features[0], quality.double(), 4, 3, 1, 0.1, lengths, mask, None
    yield features[:, :4].double(), quality[:, :4], 4, 4, 9, 0.0, None, None, None
    yield features[:0], quality[:0], 2, 5, 1, 0.0, None, None, None


_op = define(
    "kdpp_sample(Tensor features, Tensor quality, int k, int seed, int samples, float gamma, Tensor? lengths, "
    "Tensor? mask, Tensor? users) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_reference,
)


def _arguments(features, k, quality, seed, samples, gamma, lengths, mask, users) -> tuple:
    _check.tensor(_OP, "features", features, dtypes=_DTYPES)
    device = features.device
    if quality is None:
        if features.dim() not in (2, 3):
            raise ValueError(f"{_OP}: features must have shape [U, N, D] or [N, D], got {list(features.shape)}")
        batch = 1
        for value in (users, lengths, mask, *([features] if features.dim() == 3 else [])):
            if isinstance(value, Tensor) and value.dim() > 0:
                batch = len(value)
        quality = features.new_zeros(()).expand(batch, features.shape[-2])
    _check.tensor(_OP, "quality", quality, dtypes=_DTYPES, shape=["U", "N"], device=device)
    batch, items = quality.shape
    _check.tensor(_OP, "features", features, shape=[items, "D"] if features.dim() == 2 else [batch, items, "D"])
    _check.at_least(_OP, "k", k, 0)
    _check.at_least(_OP, "samples", samples, 0)
    if not 0 <= seed < 2**63:
        raise ValueError(f"{_OP}: seed = {seed} is outside [0, {2**63})")
    if not 0 <= gamma <= 1:
        raise ValueError(f"{_OP}: gamma must be in [0, 1], got {gamma}")
    if lengths is not None:
        lengths = _check.index(_OP, "lengths", lengths, shape=[batch], device=device)
        _check.indices(_OP, "lengths", lengths, items + 1)
    if mask is not None:
        _check.tensor(_OP, "mask", mask, dtypes=[torch.bool], shape=[batch, items], device=device)
    if users is not None:
        users = _check.index(_OP, "users", users, shape=[batch], device=device)
    options = (int(k), int(seed), int(samples), float(gamma))
    return features.detach(), quality.detach(), *options, lengths, mask, users


def kdpp_sample(
    features: Tensor,
    k: int,
    *,
    seed: int,
    quality: Tensor | None = None,
    samples: int = 1,
    gamma: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    users: Tensor | None = None,
) -> KDPPResult:
    """Draw sets of k items for each user, likelier the better and the less alike their items are.

    A set Y of k items comes with probability proportional to its determinant, exactly (a k-DPP):

    .. math::
        P(Y) = \\frac{\\det L_Y}{\\sum_{|Z| = k} \\det L_Z}, \\quad L = \\mathrm{Diag}(q)\\, S\\, \\mathrm{Diag}(q),
        \\quad q_i = e^{\\mathrm{quality}_i}, \\quad S = (1 - \\gamma) F F^\\top + \\gamma I

    Parameters
    ----------
    features : Tensor [U, N, D], or [N, D] for all users, float32 or float64
        Rows whose dot product says how alike two items are. Used as given, like those of `dpp_greedy`.
    k : int
        Items of a set. Where a kernel's rank is less, sets are as large as the rank, and `count` tells.
    seed : int, in [0, 2**63)
        The same seed gives the same sets.
    quality : Tensor [U, N], float32 or float64
        Log of q: `alpha * relevance` for the kernel of `dpp_greedy`. A constant added changes nothing, and an item more
        than 300 below the user's best is never drawn. None: 0 (one user, if nothing else tells how many there are).
    samples : int
        Sets a user, independent of each other.
    gamma : float, in [0, 1]
        Regulariser. Above 0 the kernel has full rank N, and its N eigenvectors are needed: O(N^3) work, which is meant
        for some hundred candidates. At 0 it is O(N D^2 + D^3).
    lengths : Tensor [U], int32 or int64
        The user's candidates are the first `lengths[u]`.
    mask : Tensor [U, N], bool
        False: not a candidate. What is no candidate is not read.
    users : Tensor [U], int32 or int64
        Whose random numbers to use. None: 0, 1, ... by row. With ids of one's own a user gets the same sets in any
        batch.

    Returns
    -------
    KDPPResult
        `indices` int64 [U, S, K], each set ascending, -1 where it is shorter than k; `count` int64 [U];
        `log_normaliser` float64 [U].

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes that do not fit, an option out of range, a candidate's NaN or infinity (named by position).
    IndexError
        `lengths` out of range.

    Notes
    -----
    All work is in float64. The random numbers are a function of (seed, user, sample) alone (Philox), so that the sets
    depend on neither thread count, batch nor instruction set. A direction of an item counts towards the rank where more
    than 1e-10 of its squared norm lies outside those before it. Items are drawn by rejection, so that after the
    eigenvectors a further sample costs O(K^3 log K + K log K log N) on average, whatever D is. Memory is O(N D) a
    thread (O(N^2) with gamma above 0). Inference only: no gradient flows. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Kulesza and Taskar, "k-DPPs: fixed-size determinantal point processes", ICML 2011.
    Barthelmé, Tremblay and Amblard, "A faster sampler for discrete determinantal point processes", AISTATS 2023.

    Examples
    --------
    >>> apart = torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    >>> sets = kdpp_sample(apart, 3, seed=0, samples=4).indices[0]
    >>> (sets // 2).tolist()  # one of each pair of equal items
    [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    return KDPPResult(*_op(*_arguments(features, k, quality, seed, samples, gamma, lengths, mask, users)))


def reference(
    features: Tensor,
    k: int,
    *,
    seed: int,
    quality: Tensor | None = None,
    samples: int = 1,
    gamma: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    users: Tensor | None = None,
) -> KDPPResult:
    """The same in plain torch, from the eigenvectors of the N x N kernel.

    The same sets as long as eigenvalues differ: of equal ones the eigenvectors are a matter of choice, and other sets
    of the same distribution come out. Its rank counts eigenvalues above 1e-10 of the greatest.
    """
    return KDPPResult(*_reference(*_arguments(features, k, quality, seed, samples, gamma, lengths, mask, users)))


kdpp_sample.reference = reference
