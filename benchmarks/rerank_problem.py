"""What the benchmarks of re-rankers by features share: the candidates, and reading them as the limit."""

import numpy as np

WIDTH = 64


def problem(users, items, seed=0):
    """Unit rows in 50 clusters, candidates in the order of relevance, as rankers hand them over."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, WIDTH))
    rows = centres[rng.integers(0, 50, (users, items))] + 0.5 * rng.normal(size=(users, items, WIDTH))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    relevance = -np.sort(-rng.normal(size=(users, items)), axis=1)
    return rows.astype(np.float32), relevance.astype(np.float32)


def reading(rows, k):
    """One matrix-vector product a pick and user."""
    vector = rows[0, 0].copy()
    for user in rows:
        for _ in range(k):
            user @ vector
