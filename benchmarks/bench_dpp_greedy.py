"""dpp_greedy against the forms that people write in numpy and torch, pyversity, and reading the features.

A unit of work is one item looked at for one pick: U * N * k of them. The limit is one matrix-vector product a pick over
each user's features, which is what a greedy step that looks at every item must at least do; where relevance has weight,
bounds let most items be passed over, and ours may be below it. numpy has a thread pool of its own: set
OPENBLAS_NUM_THREADS=1 for the rows of one thread.
"""

import numpy as np
import pytest
import torch

from recfast import ops
from rerank_problem import WIDTH, problem, reading

GAMMA = 0.1


def numpy_a(rows, relevance, k, weight):
    """Cholesky rows of all items (Chen et al., 2018), kernel rows on the fly, float32, one user after the other."""
    users, items, _ = rows.shape
    picks = np.empty((users, k), dtype=np.int64)
    for user in range(users):
        base = rows[user] * np.float32(np.sqrt(1 - GAMMA))
        left = np.ones(items, dtype=np.float32)
        score = np.float32(weight) * relevance[user]
        cholesky = np.empty((k, items), dtype=np.float32)
        item = int(score.argmax())
        for n in range(k):
            picks[user, n] = item
            if n + 1 == k:
                break
            row = base @ base[item]
            row -= cholesky[:n, item] @ cholesky[:n]
            row /= np.sqrt(left[item])
            cholesky[n] = row
            left -= row * row
            left[item] = -np.inf
            item = int((score + np.log(np.maximum(left, 1e-30)) + np.where(left > 0, 0, -np.inf)).argmax())
    return picks


def numpy_b(rows, relevance, k, weight):
    """Gram-Schmidt on the picks (one matrix-vector product a pick), float32, one user after the other."""
    users, items, width = rows.shape
    picks = np.empty((users, k), dtype=np.int64)
    for user in range(users):
        base = rows[user] * np.float32(np.sqrt(1 - GAMMA))
        left = np.ones(items, dtype=np.float32)
        score = np.float32(weight) * relevance[user]
        directions = np.empty((k, width), dtype=np.float32)
        item = int(score.argmax())
        for n in range(k):
            picks[user, n] = item
            if n + 1 == k:
                break
            direction = base[item] - (directions[:n] @ base[item]) @ directions[:n]
            direction /= np.sqrt(left[item])
            directions[n] = direction
            part = base @ direction
            left -= part * part
            score[item] = -np.inf
            item = int((score + np.log(np.maximum(left, 1e-30))).argmax())
    return picks


def numpy_window(rows, relevance, k, weight, window):
    """The published sliding window on Cholesky rows (Chen et al., 2018), float64 as there, kernel rows on the fly."""
    users, items, _ = rows.shape
    picks = np.empty((users, k), dtype=np.int64)
    for user in range(users):
        base = rows[user].astype(np.float64) * np.sqrt(1 - GAMMA)
        score = weight * relevance[user].astype(np.float64)
        left = np.ones(items)
        cholesky = np.empty((window - 1, items))
        seen = []
        item = int(score.argmax())
        for n in range(k):
            picks[user, n] = item
            score[item] = -np.inf
            if n + 1 == k:
                break
            if len(seen) == window - 1:
                # Rotations take the oldest row out of the others, and its column out of the window's own triangle.
                oldest = cholesky[0].copy()
                for at in range(1, window - 1):
                    own = cholesky[at, seen[at]]
                    length = np.hypot(own, oldest[seen[at]])
                    cosine, sine = own / length, oldest[seen[at]] / length
                    turned = cosine * cholesky[at] + sine * oldest
                    oldest = cosine * oldest - sine * cholesky[at]
                    cholesky[at - 1] = turned
                left += oldest * oldest
                seen.pop(0)
            m = len(seen)
            row = base @ base[item]
            row[item] += GAMMA
            row -= cholesky[:m, item] @ cholesky[:m]
            row /= np.sqrt(row[item])
            cholesky[m] = row
            left -= row * row
            seen.append(item)
            item = int((score + np.log(np.maximum(left, 1e-300))).argmax())
    return picks


def torch_b(rows, relevance, k, weight):
    """The same for all users at once."""
    users, items, width = rows.shape
    base = rows * (1 - GAMMA) ** 0.5
    left = torch.ones(users, items)
    score = weight * relevance
    directions = torch.zeros(users, k, width)
    picks = torch.empty(users, k, dtype=torch.int64)
    everyone = torch.arange(users)
    for n in range(k):
        item = (score + left.clamp(min=1e-30).log()).argmax(1)
        picks[:, n] = item
        row = base[everyone, item]
        parts = torch.bmm(directions[:, :n], row[:, :, None])
        direction = row - torch.bmm(parts.transpose(1, 2), directions[:, :n])[:, 0]
        direction /= left[everyone, item].sqrt()[:, None]
        directions[:, n] = direction
        left -= torch.bmm(base, direction[:, :, None])[:, :, 0].square()
        score[everyone, item] = -torch.inf
    return picks


def worth(rows, relevance, weight, picks):
    """Mean log-determinant of the lists."""
    total = 0.0
    for user, list_ in enumerate(np.asarray(picks)):
        chosen = rows[user, list_].astype(np.float64)
        kernel = (1 - GAMMA) * chosen @ chosen.T + GAMMA * np.eye(len(list_))
        total += np.linalg.slogdet(kernel)[1] + weight * relevance[user, list_].astype(np.float64).sum()
    return total / len(rows)


@pytest.mark.parametrize("weight", [1.0, 0.0], ids=["weight1", "weight0"])
@pytest.mark.parametrize(
    ("users", "items", "k"), [(1, 1000, 50), (1, 10_000, 50), (64, 1000, 50), (1024, 100, 10)], ids=str
)
def test_dpp_greedy(race, users, items, k, weight):
    rows, relevance = problem(users, items)
    rows_t, relevance_t = torch.from_numpy(rows), torch.from_numpy(relevance)
    wanted = worth(rows, relevance, weight, ops.dpp_greedy(rows_t, relevance_t, k, alpha=weight / 2, gamma=GAMMA)[0])
    ways = {
        "ours": lambda: ops.dpp_greedy(rows_t, relevance_t, k, alpha=weight / 2, gamma=GAMMA).indices,
        "numpy A": lambda: numpy_a(rows, relevance, k, weight),
        "numpy B": lambda: numpy_b(rows, relevance, k, weight),
        "torch B": lambda: torch_b(rows_t, relevance_t, k, weight),
        "limit": lambda: reading(rows, k),
    }
    try:
        import pyversity
    except ImportError:
        pyversity = None
    if pyversity is not None:

        def by_pyversity():
            strategy = pyversity.Strategy.DPP
            return [
                pyversity.diversify(rows[user], relevance[user], k, strategy=strategy, diversity=0.5).indices
                for user in range(users)
            ]

        ways["rival: pyversity"] = by_pyversity

    def check(answer, column):
        assert np.asarray(answer).shape == (users, k), column
        if column != "rival: pyversity":  # which weighs relevance in its own way
            # Without relevance all first picks are equal but for the rounding of the norms, and float32 starts
            # elsewhere: the lists are others, of like worth. (The first k items are worth 14 nats less for k = 50.)
            tolerance = 1e-4 * abs(wanted) if weight else 0.02 * k
            assert worth(rows, relevance, weight, answer) == pytest.approx(wanted, abs=tolerance), column

    race(
        "dpp_greedy",
        f"U={users} N={items} k={k} D={WIDTH} w={weight:g}",
        users * items * k,
        ways,
        check=check,
        settle=3 if users == 1 else 0,
    )


@pytest.mark.parametrize("weight", [1.0, 0.0], ids=["weight1", "weight0"])
def test_candidates_of_a_table(race, weight):
    """Rows of a table, read where they lie, against copying them out first."""
    users, items, k = 64, 1000, 50
    rng = np.random.default_rng(1)
    table = problem(1, 20_000)[0][0]
    chosen = np.stack([rng.permutation(len(table))[:items] for _ in range(users)])
    relevance = -np.sort(-rng.normal(size=(users, items)), axis=1).astype(np.float32)
    table_t, chosen_t, relevance_t = (torch.from_numpy(x) for x in (table, chosen, relevance))
    options = {"alpha": weight / 2, "gamma": GAMMA}
    wanted = ops.dpp_greedy(table_t[chosen_t], relevance_t, k, **options).indices

    def check(answer, column):
        if not column.startswith("numpy"):
            assert torch.equal(answer, wanted), column

    ways = {
        "ours": lambda: ops.dpp_greedy(table_t, relevance_t, k, candidates=chosen_t, **options).indices,
        "ours, rows copied": lambda: ops.dpp_greedy(table_t[chosen_t], relevance_t, k, **options).indices,
        "numpy A": lambda: numpy_a(table[chosen], relevance, k, weight),
        "numpy B": lambda: numpy_b(table[chosen], relevance, k, weight),
    }
    race(
        "dpp_greedy",
        f"table U={users} N={items} k={k} w={weight:g}",
        users * items * k,
        ways,
        check=check,
        settle=3 if users == 1 else 0,
    )


@pytest.mark.parametrize("weight", [1.0, 0.0], ids=["weight1", "weight0"])
@pytest.mark.parametrize(("users", "items", "k"), [(1, 1000, 100), (1, 10_000, 100), (64, 1000, 50)], ids=str)
def test_window(race, users, items, k, weight):
    window = 10
    rows, relevance = problem(users, items)
    rows_t, relevance_t = torch.from_numpy(rows), torch.from_numpy(relevance)
    options = {"alpha": weight / 2, "gamma": GAMMA, "window": window}
    wanted = ops.dpp_greedy(rows_t, relevance_t, k, **options).indices.numpy()

    def check(answer, column):
        # Without relevance the norms' rounding decides the first pick, which the rival takes to be 1.
        assert weight == 0 or np.array_equal(np.asarray(answer), wanted), column

    ways = {
        "ours": lambda: ops.dpp_greedy(rows_t, relevance_t, k, **options).indices,
        "rival: numpy, as published": lambda: numpy_window(rows, relevance, k, weight, window),
    }
    shape = f"window={window} U={users} N={items} k={k} w={weight:g}"
    race("dpp_greedy", shape, users * items * k, ways, check=check, settle=3 if users == 1 else 0)
