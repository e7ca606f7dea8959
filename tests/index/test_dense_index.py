import numpy as np
import pytest
import torch

from recfast.index import DenseIndex


def problem(items=500, width=8, queries=5, whole=True):
    """Whole numbers make inner products exact in float32, and ties many."""
    random = np.random.default_rng(0)
    if whole:
        draw = lambda n: random.integers(-2, 3, (n, width)).astype(np.float32)  # noqa: E731
    else:
        draw = lambda n: random.standard_normal((n, width)).astype(np.float32)  # noqa: E731
    return draw(items), draw(queries), random


def oracle(vectors, queries, k, ids, allowed):
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    found = np.full((len(queries), k), -1, dtype=np.int64)
    for row, total in enumerate(queries @ vectors.T):
        kept = np.broadcast_to(allowed, (len(queries), len(vectors)))[row].nonzero()[0]
        order = kept[np.lexsort((ids[kept], -total[kept]))][:k]
        scores[row, : len(order)], found[row, : len(order)] = total[order], ids[order]
    return scores, found


@pytest.mark.parametrize("k", [0, 1, 7, 100, 600])
@pytest.mark.parametrize("masks", ["none", "shared", "each", "nothing"])
@pytest.mark.parametrize("named", [False, True])
def test_flat_is_exact_with_ties_by_lowest_id(k, masks, named):
    vectors, queries, random = problem()
    ids = random.permutation(10_000)[:500] if named else np.arange(500)
    mask = {
        "none": None,
        "shared": random.random(500) < 0.3,
        "each": random.random((5, 500)) < 0.3,
        "nothing": np.zeros(500, dtype=bool),
    }[masks]
    scores, found = DenseIndex(vectors, ids=ids if named else None).search(queries, k, mask=mask)
    wanted = oracle(vectors, queries, k, ids, np.ones(500, dtype=bool) if mask is None else mask)
    np.testing.assert_array_equal(found.numpy(), wanted[1])
    np.testing.assert_array_equal(scores.numpy(), wanted[0])


def test_all_scores_equal():
    index = DenseIndex(np.ones((100, 4), dtype=np.float32), ids=np.arange(100)[::-1])
    assert index.search(torch.ones(3, 4), 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_kinds_find_most(kind):
    vectors, queries, random = problem(2000, 16, 50, whole=False)
    exact = DenseIndex(torch.from_numpy(vectors))
    index = DenseIndex(vectors, kind, n_probe=64, ef_search=200)
    mask = random.random(2000) < 0.5
    for allowed in (None, mask, np.broadcast_to(mask, (50, 2000))):
        wanted = exact.search(queries, 10, mask=allowed)[1]
        scores, ids = index.search(queries, 10, mask=allowed)
        recall = np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(ids, wanted, strict=True)])
        assert recall > 0.9
        assert bool((scores.diff(dim=1) <= 0).all())
        assert allowed is None or mask[ids.numpy()].all()


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("items", [0, 1, 3])
def test_few_items(kind, items):
    vectors, queries, _ = problem(items)
    scores, ids = DenseIndex(vectors, kind).search(queries, 4)
    assert sorted(ids[0].tolist()) == sorted([*range(items), *[-1] * (4 - items)])
    assert torch.equal(scores == -torch.inf, ids == -1)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda v: DenseIndex(v, "tree"), ValueError, "kind must be one of flat, ivf, hnsw, got 'tree'"),
        (lambda v: DenseIndex(v.astype(np.float64)), TypeError, "vectors must be float32, got float64"),
        (lambda v: DenseIndex(v * np.float32("nan")), ValueError, r"vectors\[0\] must be finite"),
        (lambda v: DenseIndex(v[0]), ValueError, r"vectors must have shape \[N, D\], got \[8\]"),
        (lambda v: DenseIndex(v, ids=[1]), ValueError, r"ids must have shape \[500\], got \[1\]"),
        (lambda v: DenseIndex(v, ids=[1] * 500), ValueError, r"ids\[1\] = 1 is given twice"),
        (lambda v: DenseIndex(v).search(v[:, :4], 1), ValueError, r"queries must have shape \[N, 8\], got \[500, 4\]"),
        (lambda v: DenseIndex(v).search(v, -1), ValueError, "k must be at least 0, got -1"),
        (lambda v: DenseIndex(v).search(v[:2], 1, mask=np.ones(3, bool)), ValueError, "mask must have shape"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(problem()[0])
