"""mmr_greedy against the forms that people write in numpy and torch, pyversity, and reading the features.

A unit of work is one item looked at for one pick: U * N * k of them. The limit is one matrix-vector product a pick over
each user's features, which is what a greedy step that looks at every item must at least do; bounds let items be passed
over, and ours may be below it. numpy has a thread pool of its own: set OPENBLAS_NUM_THREADS=1 for the rows of one
thread.
"""

import numpy as np
import pytest
import torch

from recfast import ops
from rerank_problem import WIDTH, problem, reading


def by_numpy(rows, relevance, k, d):
    """One matrix-vector product a pick, float32, one user after the other."""
    picks = np.empty((len(rows), k), dtype=np.int64)
    for user in range(len(rows)):
        base = np.float32(1 - d) * relevance[user]
        item = int(relevance[user].argmax())
        closest = np.full(len(base), -np.inf, dtype=np.float32)
        for n in range(k):
            picks[user, n] = item
            if n + 1 == k:
                break
            base[item] = -np.inf
            np.maximum(closest, rows[user] @ rows[user, item], out=closest)
            item = int((base - np.float32(d) * closest).argmax())
    return picks


def by_torch(rows, relevance, k, d):
    """The same for all users at once."""
    users = len(rows)
    everyone = torch.arange(users)
    base = (1 - d) * relevance
    closest = torch.full_like(relevance, -torch.inf)
    picks = torch.empty(users, k, dtype=torch.int64)
    item = relevance.argmax(1)
    for n in range(k):
        picks[:, n] = item
        base[everyone, item] = -torch.inf
        similar = torch.bmm(rows, rows[everyone, item][:, :, None])[:, :, 0]
        closest = torch.maximum(closest, similar)
        item = (base - d * closest).argmax(1)
    return picks


def regret(rows, relevance, picks, d, clip):
    """By how much a pick's score was below the best at its step, at most, in float64."""
    wide, most = rows.astype(np.float64), 0.0
    closest = np.full(len(rows), -np.inf)
    free = np.ones(len(rows), dtype=bool)
    for n, item in enumerate(picks):
        scores = (1 - d) * relevance - d * closest if n else relevance.astype(np.float64)
        assert free[item]
        most = max(most, scores[free].max() - scores[item])
        free[item] = False
        similar = wide @ wide[item]
        closest = np.maximum(closest, similar.clip(0, 1) if clip else similar)
    return most


@pytest.mark.parametrize("d", [0.5, 1.0], ids=["d0.5", "d1"])
@pytest.mark.parametrize(
    ("users", "items", "k"), [(1, 1000, 50), (1, 10_000, 50), (64, 1000, 50), (1024, 100, 10)], ids=str
)
def test_mmr_greedy(race, users, items, k, d):
    rows, relevance = problem(users, items)
    rows_t, relevance_t = torch.from_numpy(rows), torch.from_numpy(relevance)
    ways = {
        "ours": lambda: ops.mmr_greedy(rows_t, relevance_t, k, diversity=d).indices,
        "numpy": lambda: by_numpy(rows, relevance, k, d),
        "torch": lambda: by_torch(rows_t, relevance_t, k, d),
        "limit": lambda: reading(rows, k),
    }
    try:
        import pyversity
    except ImportError:
        pyversity = None
    if pyversity is not None:
        strategy = pyversity.Strategy.MMR
        ways["rival: pyversity"] = lambda: [
            pyversity.diversify(rows[user], relevance[user], k, strategy=strategy, diversity=d).indices
            for user in range(users)
        ]

    def check(answer, column):
        picks = np.asarray(answer)
        assert picks.shape == (users, k), column
        for user in range(min(users, 3)):
            # float32 against float64; ours decides in float64.
            limit = 1e-9 if column == "ours" else 1e-5
            assert regret(rows[user], relevance[user], picks[user], d, column == "rival: pyversity") <= limit, column

    race(
        "mmr_greedy",
        f"U={users} N={items} k={k} D={WIDTH} d={d:g}",
        users * items * k,
        ways,
        check=check,
        settle=3 if users == 1 else 0,
    )
