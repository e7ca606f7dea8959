"""kdpp_sample against the textbook's algorithm in numpy, DPPy, and the algebra that each exact sampler must do.

A unit of work is one sample. With one sample the time is that of the eigenvectors: the limit is the float64 product
B^T B and its eigendecomposition by the library. With many it is that of drawing items: the limit is one product of k
rows of k numbers with k directions a sample, which Gram-Schmidt must at least do. numpy has a thread pool of its own:
set OPENBLAS_NUM_THREADS=1 for the rows of one thread.
"""

import contextlib
import io

import numpy as np
import pytest
import torch

from recfast import ops

WIDTH = 64


def problem(users, items, seed=0):
    """Unit rows in 50 clusters, times exp(relevance / 2)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, WIDTH))
    rows = centres[rng.integers(0, 50, (users, items))] + 0.5 * rng.normal(size=(users, items, WIDTH))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows.astype(np.float32), 0.5 * rng.normal(size=(users, items)).astype(np.float32)


def by_numpy(rows, quality, k, samples, rng):
    """Kulesza and Taskar (2011) by the dual: eigenvectors by elementary symmetric polynomials, then item by item."""
    out = []
    for user in range(len(rows)):
        base = rows[user].astype(np.float64) * np.exp(quality[user].astype(np.float64))[:, None]
        values, vectors = np.linalg.eigh(base.T @ base)
        count = len(values)
        table = np.zeros((k + 1, count + 1))
        table[0] = 1.0
        for m in range(1, k + 1):
            for n in range(1, count + 1):
                table[m, n] = table[m, n - 1] + values[n - 1] * table[m - 1, n - 1]
        everything = base @ (vectors / np.sqrt(values))
        for _ in range(samples):
            chosen, missing = [], k
            for n in range(count, 0, -1):
                if missing == 0:
                    break
                if rng.random() < values[n - 1] * table[missing - 1, n - 1] / table[missing, n]:
                    chosen.append(n - 1)
                    missing -= 1
            left = everything[:, chosen]
            rest = np.square(left).sum(1)
            directions = np.zeros((k, k))
            picks = []
            for n in range(k):
                weight = np.maximum(rest, 0.0)
                item = int(rng.choice(len(rest), p=weight / weight.sum()))
                picks.append(item)
                direction = left[item] - (directions[:n] @ left[item]) @ directions[:n]
                directions[n] = direction / np.linalg.norm(direction)
                rest -= np.square(left @ directions[n])
                rest[item] = 0.0
            out.append(sorted(picks))
    return np.array(out).reshape(len(rows), samples, k)


@pytest.mark.parametrize(
    ("users", "items", "k", "samples"),
    [(1, 1000, 10, 1), (1, 1000, 50, 1), (1, 1000, 10, 100), (1, 1000, 50, 100), (64, 100, 10, 1)],
    ids=str,
)
def test_kdpp_sample(race, users, items, k, samples):
    rows, quality = problem(users, items)
    rows_t, quality_t = torch.from_numpy(rows), torch.from_numpy(quality)
    rng = np.random.RandomState(0)  # what DPPy takes
    base = rows.astype(np.float64) * np.exp(quality.astype(np.float64))[..., None]
    base_t = torch.from_numpy(base)
    some, directions = np.ones((samples, k, k)), np.ones((k, k))

    def limit():
        if samples > 1:
            return [one @ directions for one in some]
        return [torch.linalg.eigh(user.T @ user) for user in base_t]

    ways = {
        "ours": lambda: ops.kdpp_sample(rows_t, k, quality=quality_t, seed=0, samples=samples).indices,
        "numpy": lambda: by_numpy(rows, quality, k, samples, rng),
        "limit": limit,
    }
    try:
        from dppy.finite_dpps import FiniteDPP
    except ImportError:
        FiniteDPP = None
    if FiniteDPP is not None:

        def by_dppy():
            out = []
            with contextlib.redirect_stdout(io.StringIO()):  # it prints at each call
                for user in base:
                    process = FiniteDPP("likelihood", L_gram_factor=user.T)
                    out += [process.sample_exact_k_dpp(size=k, random_state=rng) for _ in range(samples)]
            return np.array(out).reshape(users, samples, k)

        ways["rival: dppy"] = by_dppy

    def check(answer, column):
        sets = np.sort(np.asarray(answer), axis=2)
        assert sets.shape == (users, samples, k), column
        assert (np.diff(sets, axis=2) > 0).all(), column
        assert sets.min() >= 0, column
        assert sets.max() < items, column

    race("kdpp_sample", f"U={users} N={items} D={WIDTH} k={k} S={samples}", users * samples, ways, check=check)
