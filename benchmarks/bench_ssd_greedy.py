"""ssd_greedy against the forms that people write in numpy and torch, pyversity, and reading the features.

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
    """Gram-Schmidt on the picks, one matrix-vector product a pick, float32, one user after the other."""
    users, items, width = rows.shape
    picks = np.empty((users, k), dtype=np.int64)
    for user in range(users):
        left = np.ones(items, dtype=np.float32)
        base = np.float32(1 - d) * relevance[user]
        directions = np.empty((k, width), dtype=np.float32)
        item = int(relevance[user].argmax())
        for n in range(k):
            picks[user, n] = item
            if n + 1 == k:
                break
            base[item] = -np.inf
            row = rows[user, item]
            direction = row - (directions[:n] @ row) @ directions[:n]
            direction /= max(np.linalg.norm(direction), 1e-6)
            directions[n] = direction
            part = rows[user] @ direction
            left -= part * part
            item = int((base + np.float32(d) * np.sqrt(np.maximum(left, 0))).argmax())
    return picks


def by_torch(rows, relevance, k, d):
    """The same for all users at once."""
    users, items, width = rows.shape
    everyone = torch.arange(users)
    base = (1 - d) * relevance
    left = torch.ones(users, items)
    directions = torch.zeros(users, k, width)
    picks = torch.empty(users, k, dtype=torch.int64)
    item = relevance.argmax(1)
    for n in range(k):
        picks[:, n] = item
        base[everyone, item] = -torch.inf
        row = rows[everyone, item]
        parts = torch.bmm(directions[:, :n], row[:, :, None])
        direction = row - torch.bmm(parts.transpose(1, 2), directions[:, :n])[:, 0]
        direction /= direction.norm(dim=1, keepdim=True).clamp(min=1e-6)
        directions[:, n] = direction
        left -= torch.bmm(rows, direction[:, :, None])[:, :, 0].square()
        item = (base + d * left.clamp(min=0).sqrt()).argmax(1)
    return picks


def regret(rows, relevance, picks, d):
    """By how much a pick's score was below the best at its step, at most, in float64."""
    left, most = rows.astype(np.float64), 0.0
    free = np.ones(len(rows), dtype=bool)
    for n, item in enumerate(picks):
        scores = (1 - d) * relevance + d * np.linalg.norm(left, axis=1) if n else relevance.astype(np.float64)
        assert free[item]
        most = max(most, scores[free].max() - scores[item])
        free[item] = False
        direction = left[item] / np.linalg.norm(left[item])
        left -= np.outer(left @ direction, direction)
    return most


@pytest.mark.parametrize("d", [0.5, 1.0], ids=["d0.5", "d1"])
@pytest.mark.parametrize(("users", "items", "k"), [(1, 1000, 50), (1, 10_000, 50), (64, 1000, 50)], ids=str)
def test_ssd_greedy(race, users, items, k, d):
    rows, relevance = problem(users, items)
    rows_t, relevance_t = torch.from_numpy(rows), torch.from_numpy(relevance)
    ways = {
        "ours": lambda: ops.ssd_greedy(rows_t, relevance_t, k, diversity=d).indices,
        "numpy": lambda: by_numpy(rows, relevance, k, d),
        "torch": lambda: by_torch(rows_t, relevance_t, k, d),
        "limit": lambda: reading(rows, k),
    }
    try:
        import pyversity
    except ImportError:
        pyversity = None
    if pyversity is not None:
        options = {"normalize": False, "append_bias": False, "normalize_scores": False}
        ways["rival: pyversity"] = lambda: [
            pyversity.ssd(rows[user], relevance[user], k, diversity=d, **options).indices for user in range(users)
        ]

    def check(answer, column):
        picks = np.asarray(answer)
        assert picks.shape == (users, k), column
        for user in range(min(users, 3)):
            # float32 against float64; ours decides in float64.
            limit = 1e-9 if column == "ours" else 1e-3
            assert regret(rows[user], relevance[user], picks[user], d) <= limit, column

    race(
        "ssd_greedy",
        f"U={users} N={items} k={k} D={WIDTH} d={d:g}",
        users * items * k,
        ways,
        check=check,
        settle=3 if users == 1 else 0,
    )


@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize(("users", "items", "k"), [(1, 1000, 50), (64, 1000, 50)], ids=str)
def test_window(race, users, items, k, mode):
    """Each pick sees the nine before it."""
    rows, relevance = problem(users, items)
    rows_t, relevance_t = torch.from_numpy(rows), torch.from_numpy(relevance)
    ways = {
        "ours": lambda: ops.ssd_greedy(rows_t, relevance_t, k, diversity=0.5, window=10, mode=mode).indices,
        "limit": lambda: reading(rows, k),
    }
    pyversity = pytest.importorskip("pyversity", reason="pyversity is not installed")
    options = {"normalize": False, "append_bias": False, "normalize_scores": False, "window": 9}
    ways["rival: pyversity"] = lambda: [
        pyversity.ssd(rows[user], relevance[user], k, diversity=0.5, **options).indices for user in range(users)
    ]
    wanted = ops.ssd_greedy.reference(rows_t[:1], relevance_t[:1], k, diversity=0.5, window=10, mode=mode).indices[0]

    def check(answer, column):
        picks = np.asarray(answer)
        assert picks.shape == (users, k), column
        # pyversity has the published form alone, in float32.
        if column == "ours" or mode == "paper":
            assert np.array_equal(picks[0], wanted.numpy()), column

    race(
        "ssd_greedy",
        f"U={users} N={items} k={k} D={WIDTH} window=10 {mode}",
        users * items * k,
        ways,
        check=check,
        settle=3 if users == 1 else 0,
    )
