"""code_search against gathers in numpy and torch, FAISS IndexPQ on the same codes, and reading the code bytes once."""

import numpy as np
import pytest
import torch

from recfast import ops

N, M, K, TOP = 1_000_000, 8, 256, 100


def problem(items, queries, seed=0):
    """Uniform codes (no order to profit from) and the tables of random queries over random centroids."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(K, (items, M), generator=generator, dtype=torch.uint8)
    centroids = torch.randn(M, K, 8, generator=generator)
    parts = torch.randn(queries, M, 8, generator=generator)
    return codes, centroids, parts, torch.einsum("qmd,mkd->qmk", parts, centroids)


@pytest.mark.parametrize(("items", "queries"), [(1_000_000, 1), (1_000_000, 8), (20_000, 64)])
@pytest.mark.parametrize("masked", [None, 0.01], ids=["all", "1%"])
def test_code_search(race, items, queries, masked):
    faiss = pytest.importorskip("faiss")
    codes, centroids, parts, table = problem(items, queries)
    mask = None if masked is None else torch.rand(items, generator=torch.Generator().manual_seed(1)) < masked
    wanted = ops.code_search.reference(codes, table, TOP, mask=mask)
    by_book = np.ascontiguousarray(codes.numpy().T)
    places = codes.T.long().contiguous()

    def numpy_gather():
        found = np.empty((queries, TOP), dtype=np.int64)
        for query, entry in enumerate(table.numpy()):
            total = entry[0][by_book[0]]
            for book in range(1, M):
                total += entry[book][by_book[book]]
            if mask is not None:
                total[~mask.numpy()] = -np.inf
            best = np.argpartition(total, items - TOP)[items - TOP :]
            found[query] = best[np.argsort(-total[best])]
        return None, found

    def torch_gather():
        answers = []
        for entry in table:
            total = entry[0][places[0]]
            for book in range(1, M):
                total += entry[book][places[book]]
            if mask is not None:
                total.masked_fill_(~mask, -torch.inf)
            answers.append(total.topk(TOP))
        return None, torch.stack([answer.indices for answer in answers])

    index = faiss.IndexPQ(centroids.shape[2] * M, M, 8, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(centroids.flatten().numpy(), index.pq.centroids)
    faiss.copy_array_to_vector(codes.flatten().numpy(), index.codes)
    index.ntotal, index.is_trained = items, True
    vectors = parts.flatten(1).numpy()

    def faiss_pq():
        faiss.omp_set_num_threads(torch.get_num_threads())
        return index.search(vectors, TOP)

    def check(answer, column):
        found = torch.as_tensor(answer[1])
        if column == "ours":
            assert torch.equal(found, wanted[1])
            assert torch.equal(answer[0], wanted[0])
        else:  # ties may go either way, and FAISS makes its own table
            shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, wanted[1], strict=True)]
            assert min(shared) >= TOP - 1, column

    words = codes.flatten().view(torch.int64)

    def limit():
        for _ in range(queries):
            words.sum()

    ways = {
        "ours": lambda: ops.code_search(codes, table, TOP, mask=mask, check=False),
        "torch": torch_gather,
        "numpy": numpy_gather,
        "limit": limit,
    }
    if mask is None:  # IndexPQ takes no selector
        ways["rival: FAISS IndexPQ"] = faiss_pq
    shape = f"N={items} Q={queries} M={M} K={K} k={TOP}" + ("" if mask is None else " mask 1%")
    race("code_search", shape, items * queries, ways, check=check)
