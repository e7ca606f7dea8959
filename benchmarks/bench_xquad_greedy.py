"""xquad_greedy against the forms that people write in numpy and torch, and reading the topics.

A unit of work is one item looked at for one pick: U * N * k of them. The limit is one matrix-vector product a pick over
each user's topics, which is what a greedy step that looks at every item must at least do; bounds let items be passed
over, and ours may be below it. numpy has a thread pool of its own: set OPENBLAS_NUM_THREADS=1 for the rows of one
thread.
"""

import numpy as np
import pytest
import torch

from recfast import ops
from rerank_problem import reading

WIDTH = 20  # topics


def problem(users, items, seed=0):
    """Three topics of twenty an item, users who ask for some more than others, candidates in the order of relevance."""
    rng = np.random.default_rng(seed)
    topics = rng.random((users, items, WIDTH)) * (rng.random((users, items, WIDTH)) < 3 / WIDTH)
    relevance = -np.sort(-rng.random((users, items)), axis=1)
    preferences = rng.dirichlet(np.full(WIDTH, 0.5), users)
    return topics.astype(np.float32), relevance.astype(np.float32), preferences.astype(np.float32)


def by_numpy(topics, relevance, preferences, k, d):
    """One matrix-vector product a pick, float32, one user after the other."""
    picks = np.empty((len(topics), k), dtype=np.int64)
    for user in range(len(topics)):
        base = np.float32(1 - d) * relevance[user]
        wanted = np.float32(d) * preferences[user]
        for n in range(k):
            item = int((base + topics[user] @ wanted).argmax())
            picks[user, n] = item
            base[item] = -np.inf
            wanted *= 1 - topics[user, item]
    return picks


def by_torch(topics, relevance, preferences, k, d):
    """The same for all users at once."""
    users = len(topics)
    everyone = torch.arange(users)
    base = (1 - d) * relevance
    wanted = d * preferences
    picks = torch.empty(users, k, dtype=torch.int64)
    for n in range(k):
        item = (base + torch.bmm(topics, wanted[:, :, None])[:, :, 0]).argmax(1)
        picks[:, n] = item
        base[everyone, item] = -torch.inf
        wanted = wanted * (1 - topics[everyone, item])
    return picks


def regret(topics, relevance, preferences, picks, d):
    """By how much a pick's score was below the best at its step, at most, in float64."""
    wanted, most = preferences.astype(np.float64), 0.0
    free = np.ones(len(topics), dtype=bool)
    for item in picks:
        scores = (1 - d) * relevance + d * (topics.astype(np.float64) @ wanted)
        assert free[item]
        most = max(most, scores[free].max() - scores[item])
        free[item] = False
        wanted *= 1 - topics[item].astype(np.float64)
    return most


@pytest.mark.parametrize("d", [0.5, 1.0], ids=["d0.5", "d1"])
@pytest.mark.parametrize(
    ("users", "items", "k"), [(1, 1000, 50), (1, 10_000, 50), (64, 1000, 50), (1024, 100, 10)], ids=str
)
def test_xquad_greedy(race, users, items, k, d):
    topics, relevance, preferences = problem(users, items)
    tensors = [torch.from_numpy(value) for value in (topics, relevance)]
    wanted = torch.from_numpy(preferences)
    ways = {
        "ours": lambda: ops.xquad_greedy(*tensors, k, preferences=wanted, diversity=d).indices,
        "numpy": lambda: by_numpy(topics, relevance, preferences, k, d),
        "torch": lambda: by_torch(*tensors, wanted, k, d),
        "limit": lambda: reading(topics, k),
    }

    def check(answer, column):
        picks = np.asarray(answer)
        assert picks.shape == (users, k), column
        for user in range(min(users, 3)):
            # float32 against float64; ours decides in float64.
            limit = 1e-9 if column == "ours" else 1e-5
            assert regret(topics[user], relevance[user], preferences[user], picks[user], d) <= limit, column

    race(
        "xquad_greedy",
        f"U={users} N={items} k={k} Z={WIDTH} d={d:g}",
        users * items * k,
        ways,
        check=check,
        settle=3 if users == 1 else 0,
    )
