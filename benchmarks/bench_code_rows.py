"""code_rows_search against bm25s, scipy's sparse product, numpy and torch, and against reading the postings once.

Rows hold popular items more often, as posting lists do. The unit of work is one posting. `ours` searches packed rows
through the op, `index.CodeRows` the same through the index, `unpacked` the plain rows; the last case is a mask of one
item in a hundred.
"""

import numpy as np
import pytest
import torch

from recfast import index, ops

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


def bm25(matrix, rows):
    """bm25s has the same index (its eager scores) and the same sum, weights all 1."""
    bm25s = pytest.importorskip("bm25s")
    pytest.importorskip("numba")
    searcher = bm25s.BM25(backend="numba")
    by_row = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "num_docs": N}
    searcher.scores = by_row
    searcher.nonoccurrence_array = None
    searcher.vocab_dict = {str(row): row for row in range(matrix.shape[0])}
    searcher.unique_token_ids_set = set(searcher.vocab_dict.values())
    tokens = rows.tolist()
    return lambda: searcher.retrieve(tokens, k=TOP, n_threads=torch.get_num_threads(), show_progress=False).documents


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("mean", [1_000, 10_000])
def test_code_rows(race, mean, queries):
    sparse = pytest.importorskip("scipy.sparse")
    plain, rows = problem(mean, queries)
    indptr, item_ids, scores = (part.numpy() for part in plain[:3])
    postings = int((plain.indptr[rows + 1] - plain.indptr[rows]).sum())
    wanted = ops.code_rows_search.reference(plain, rows[:4], TOP)
    packed = ops.pack_rows(plain)
    searched = index.CodeRows(*plain)
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
                total.index_add_(0, plain.item_ids[part], plain.scores[part])
            answers.append(total.topk(TOP).indices)
        return answers

    # As many words as the postings of one query have, 8 bytes each.
    words = torch.zeros(postings // queries, dtype=torch.int64)

    def limit():
        for _ in range(queries):
            words.sum()

    def check(answer, column):
        exact = column in ("ours", "index.CodeRows", "unpacked")
        found = answer[1] if exact else answer
        for row, right in enumerate(wanted[1]):
            ids = np.asarray(found[row])
            if exact:
                assert np.array_equal(ids, right.numpy())
            else:  # other orders of addition may change the last place
                assert len(set(ids.tolist()) & set(right.tolist())) >= TOP - 2, column

    race(
        "code_rows",
        f"N={N} Ku={KU} Q={queries}, {postings // queries} postings",
        postings,
        {
            "ours": lambda: ops.code_rows_search(packed, rows, TOP, check=False),
            "index.CodeRows": lambda: searched.search(rows, TOP),
            "unpacked": lambda: ops.code_rows_search(plain, rows, TOP, check=False),
            "torch": torch_index_add,
            "numpy": numpy_unique,
            "rival: scipy": scipy_product,
            "rival: bm25s": bm25(matrix, rows),
            "limit": limit,
        },
        check=check,
        settle=True,
    )


@pytest.mark.parametrize("mean", [1_000, 10_000])
def test_code_rows_with_a_mask(race, mean):
    plain, rows = problem(mean, 64)
    postings = int((plain.indptr[rows + 1] - plain.indptr[rows]).sum())
    packed = ops.pack_rows(plain)
    mask = torch.from_numpy(np.random.default_rng(1).random(N) < 0.01)
    bits = torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    wanted = ops.code_rows_search.reference(plain, rows[:4], TOP, mask=mask)

    def check(answer, column):
        if column != "without":
            assert torch.equal(answer[1][:4], wanted[1]), column

    race(
        "code_rows, 1 % of items",
        f"N={N} Ku={KU} Q=64, {postings // 64} postings",
        postings,
        {
            "ours": lambda: ops.code_rows_search(packed, rows, TOP, mask=bits, check=False),
            "bool mask": lambda: ops.code_rows_search(packed, rows, TOP, mask=mask, check=False),
            "without": lambda: ops.code_rows_search(packed, rows, TOP, check=False),
        },
        check=check,
        settle=True,
    )
