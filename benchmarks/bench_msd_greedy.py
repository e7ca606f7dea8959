"""msd_greedy against the forms that people write in numpy and torch, pyversity, and reading the features.

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
        score = np.float32(1 - d) * relevance[user]
        item = int(relevance[user].argmax())
        for n in range(k):
            picks[user, n] = item
            if n + 1 == k:
                break
            score[item] = -np.inf
            # The 1 of each distance is the same for all items.
            score -= rows[user] @ (np.float32(d) * rows[user, item])
            item = int(score.argmax())
    return picks


def by_torch(rows, relevance, k, d):
    """The same for all users at once."""
    users = len(rows)
    everyone = torch.arange(users)
    score = (1 - d) * relevance
    picks = torch.empty(users, k, dtype=torch.int64)
    item = relevance.argmax(1)
    for n in range(k):
        picks[:, n] = item
        score[everyone, item] = -torch.inf
        score -= torch.bmm(rows, d * rows[everyone, item][:, :, None])[:, :, 0]
        item = score.argmax(1)
    return picks


def regret(rows, relevance, picks, d):
    """By how much a pick's score was below the best at its step, at most, in float64."""
    wide, most = rows.astype(np.float64), 0.0
    distance = np.zeros(len(rows))
    free = np.ones(len(rows), dtype=bool)
    for n, item in enumerate(picks):
        scores = (1 - d) * relevance + d * distance if n else relevance.astype(np.float64)
        assert free[item]
        most = max(most, scores[free].max() - scores[item])
        free[item] = False
        distance += 1 - wide @ wide[item]
    return most


@pytest.mark.parametrize("d", [0.5, 1.0], ids=["d0.5", "d1"])
@pytest.mark.parametrize(
    ("users", "items", "k"), [(1, 1000, 50), (1, 10_000, 50), (64, 1000, 50), (1024, 100, 10)], ids=str
)
def test_msd_greedy(race, users, items, k, d):
    rows, relevance = problem(users, items)
    rows_t, relevance_t = torch.from_numpy(rows), torch.from_numpy(relevance)
    ways = {
        "ours": lambda: ops.msd_greedy(rows_t, relevance_t, k, diversity=d).indices,
        "numpy": lambda: by_numpy(rows, relevance, k, d),
        "torch": lambda: by_torch(rows_t, relevance_t, k, d),
        "limit": lambda: reading(rows, k),
    }
    try:
        import pyversity
    except ImportError:
        pyversity = None
    if pyversity is not None:
        strategy = pyversity.Strategy.MSD
        ways["rival: pyversity"] = lambda: [
            pyversity.diversify(rows[user], relevance[user], k, strategy=strategy, diversity=d).indices
            for user in range(users)
        ]

    def check(answer, column):
        picks = np.asarray(answer)
        assert picks.shape == (users, k), column
        for user in range(min(users, 3)):
            # float32 against float64; ours decides in float64.
            limit = 1e-9 if column == "ours" else 1e-4
            assert regret(rows[user], relevance[user], picks[user], d) <= limit, column

    race(
        "msd_greedy",
        f"U={users} N={items} k={k} D={WIDTH} d={d:g}",
        users * items * k,
        ways,
        check=check,
        settle=3 if users == 1 else 0,
    )
