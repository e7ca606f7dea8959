"""code_rows_search against scipy's sparse product, numpy and torch, and against reading the postings once.

Rows hold popular items more often, as posting lists do. The unit of work is one posting.
"""

import numpy as np
import pytest
import torch

from recfast import ops

N, KU, TOP = 1_000_000, 4, 100


def problem(mean, queries, n_rows=512, seed=0):
    random = np.random.default_rng(seed)
    lists = []
    for _ in range(n_rows):
        # Popularity ~ rank^-0.6: the inverse of its distribution function.
        drawn = np.unique((N * random.random(int(mean * random.uniform(0.5, 1.6))) ** 2.5).astype(np.int64))
        lists.append(drawn)
    indptr = np.concatenate([[0], np.cumsum([len(one) for one in lists])])
    item_ids = np.concatenate(lists).astype(np.int32)
    scores = random.random(len(item_ids)).astype(np.float32)
    index = ops.RowsIndex(torch.from_numpy(indptr), torch.from_numpy(item_ids), torch.from_numpy(scores), N)
    return index, torch.from_numpy(random.integers(0, n_rows, (queries, KU)))


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("mean", [1_000, 10_000])
def test_code_rows(race, mean, queries):
    sparse = pytest.importorskip("scipy.sparse")
    index, rows = problem(mean, queries)
    indptr, item_ids, scores = (part.numpy() for part in index[:3])
    postings = int((index.indptr[rows + 1] - index.indptr[rows]).sum())
    wanted = ops.code_rows_search.reference(index, rows[:4], TOP)
    matrix = sparse.csr_matrix((scores, item_ids, indptr), shape=(len(indptr) - 1, N))
    starts = np.arange(queries + 1) * KU

    def best(ids, totals):
        kept = np.argpartition(totals, len(totals) - TOP)[len(totals) - TOP :] if len(totals) > TOP else slice(None)
        ids, totals = ids[kept], totals[kept]
        return ids[np.lexsort((ids, -totals))]

    def scipy_product():
        named = sparse.csr_matrix(
            (np.ones(queries * KU, np.float32), rows.numpy().ravel(), starts), shape=(queries, len(indptr) - 1)
        )
        product = named @ matrix
        return [
            best(product.indices[a:b], product.data[a:b])
            for a, b in zip(product.indptr[:-1], product.indptr[1:], strict=True)
        ]

    def numpy_unique():
        answers = []
        for named in rows.numpy():
            parts = [slice(indptr[row], indptr[row + 1]) for row in named]
            ids, places = np.unique(np.concatenate([item_ids[part] for part in parts]), return_inverse=True)
            answers.append(best(ids, np.bincount(places, np.concatenate([scores[part] for part in parts]))))
        return answers

    def torch_index_add():
        answers = []
        for named in rows:
            total = torch.zeros(N)
            for row in named.tolist():
                part = slice(indptr[row], indptr[row + 1])
                total.index_add_(0, index.item_ids[part], index.scores[part])
            answers.append(total.topk(TOP).indices)
        return answers

    # As many words as the postings of one query have, 8 bytes each.
    words = torch.zeros(postings // queries, dtype=torch.int64)

    def limit():
        for _ in range(queries):
            words.sum()

    def check(answer, column):
        found = answer[1] if column == "ours" else answer
        for row, right in enumerate(wanted[1]):
            ids = np.asarray(found[row])
            if column == "ours":
                assert np.array_equal(ids, right.numpy())
            else:  # other orders of addition may change the last place
                assert len(set(ids.tolist()) & set(right.tolist())) >= TOP - 2, column

    race(
        "code_rows",
        f"N={N} Ku={KU} Q={queries}, {postings // queries} postings",
        postings,
        {
            "ours": lambda: ops.code_rows_search(index, rows, TOP, check=False),
            "torch": torch_index_add,
            "numpy": numpy_unique,
            "rival: scipy": scipy_product,
            "limit": limit,
        },
        check=check,
    )
