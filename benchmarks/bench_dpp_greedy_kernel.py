"""dpp_greedy_kernel against the published numpy form and its float32 twin, on Gaussian similarities.

A unit of work is one item looked at for one pick. numpy has a thread pool of its own: set OPENBLAS_NUM_THREADS=1 for
the rows of one thread.
"""

import numpy as np
import pytest
import torch

from recfast import ops


def problem(users, items, seed=0):
    """Gaussian similarities of points in 50 clusters, candidates in the order of relevance."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, 8))
    points = centres[rng.integers(0, 50, (users, items))] + 0.5 * rng.normal(size=(users, items, 8))
    points = torch.from_numpy(points)
    similarity = torch.exp(-0.25 * torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square())
    relevance = -np.sort(-rng.normal(size=(users, items)), axis=1)
    return similarity.numpy(), relevance


def published(similarity, relevance, k, weight):
    """laming-chen/fast-map-dpp on log scores, one user after the other, in the dtype that it is given."""
    users, items = relevance.shape
    picks = np.empty((users, k), dtype=np.int64)
    for user in range(users):
        score = (weight * relevance[user]).astype(similarity.dtype)
        left = similarity[user].diagonal().copy()
        cholesky = np.empty((k, items), dtype=similarity.dtype)
        item = int((score + np.log(left)).argmax())
        for n in range(k):
            picks[user, n] = item
            row = similarity[user, item] - cholesky[:n, item] @ cholesky[:n]
            row /= np.sqrt(left[item])
            cholesky[n] = row
            left -= row * row
            score[item] = -np.inf
            item = int((score + np.log(np.maximum(left, 1e-30))).argmax())
    return picks


@pytest.mark.parametrize(("users", "items", "k"), [(1, 1000, 50), (64, 300, 20)], ids=str)
def test_dpp_greedy_kernel(race, users, items, k):
    similarity, relevance = problem(users, items)
    similarity32 = similarity.astype(np.float32)
    relevance_t = torch.from_numpy(relevance)
    wanted = published(similarity, relevance, k, 1.0)

    def check(answer, column):
        if not column.endswith("float32"):
            assert np.array_equal(np.asarray(answer), wanted), column

    ways = {
        "ours": lambda: ops.dpp_greedy_kernel(torch.from_numpy(similarity), relevance_t, k, alpha=0.5).indices,
        "ours, float32": lambda: (
            ops.dpp_greedy_kernel(torch.from_numpy(similarity32), relevance_t, k, alpha=0.5).indices
        ),
        "rival: numpy, as published": lambda: published(similarity, relevance, k, 1.0),
        "numpy float32": lambda: published(similarity32, relevance, k, 1.0),
    }
    race(
        "dpp_greedy_kernel",
        f"U={users} N={items} k={k}",
        users * items * k,
        ways,
        check=check,
        settle=3 if users == 1 else 0,
    )
