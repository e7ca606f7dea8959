"""code_search over 1 M items of 8 codes of 256: what it is compared with, and reading the codes once.

Each row is one claim: the plain scan, block-max on codes that cluster and on codes that do not, a sparse table, a mask,
a batch, the form without VBMI. FAISS IndexPQ scans the same codes, exactly; its fast scan has 16 codes of 4 bits
instead, the same bytes an item, and is approximate. Each form is called some times before it is timed, as a server
calls it again and again: some rivals' arrays are larger than the cache, and leave none of the codes in it for the next.
"""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch

from recfast import _C, ops

N, M, K, TOP, WIDTH = 1_000_000, 8, 256, 100, 64


@functools.cache
def uniform():
    """Codes without any order to profit from, random centroids, and the parts of random queries."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(K, (N, M), generator=generator, dtype=torch.uint8)
    centroids = torch.randn(M, K, WIDTH // M, generator=generator)
    return codes, centroids, torch.randn(256, WIDTH, generator=generator)


@functools.cache
def clustered():
    """Codes of vectors in 4096 Gaussian clusters of uneven size, by a product quantiser that FAISS trains."""
    faiss = pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    share = np.arange(1, 4097) ** -0.8
    spread = np.arange(1, WIDTH + 1, dtype=np.float32) ** -0.5
    centres = random.standard_normal((4096, WIDTH), dtype=np.float32) * spread

    def draw(count, sigma):
        near = random.choice(4096, count, p=share / share.sum())
        vectors = centres[near] + sigma * random.standard_normal((count, WIDTH), dtype=np.float32) * spread
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    items = draw(N, 0.7) * random.lognormal(0, 0.1, (N, 1)).astype(np.float32)
    quantiser = faiss.ProductQuantizer(WIDTH, M, 8)
    quantiser.train(items[:20_000])
    codes = torch.from_numpy(quantiser.compute_codes(items))
    centroids = torch.from_numpy(faiss.vector_to_array(quantiser.centroids).reshape(M, K, WIDTH // M).copy())
    return codes, centroids, torch.from_numpy(draw(256, 0.9))


DATA = {"uniform": uniform, "clustered": clustered}


def tables(name: str, queries: int) -> torch.Tensor:
    _, centroids, vectors = DATA[name]()
    return torch.einsum("qmd,mkd->qmk", vectors[:queries].view(queries, M, -1), centroids)


@functools.cache
def packed(name: str, order: str) -> ops.PackedCodes:
    return ops.pack_codes(DATA[name]()[0], n_codes=K, order=order)


def faiss_pq(name: str, queries: int):
    """IndexPQ on the same codes and centroids."""
    faiss = pytest.importorskip("faiss")
    codes, centroids, vectors = DATA[name]()
    index = faiss.IndexPQ(WIDTH, M, 8, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(centroids.flatten().numpy(), index.pq.centroids)
    faiss.copy_array_to_vector(codes.flatten().numpy(), index.codes)
    index.ntotal, index.is_trained = N, True
    return searcher(index, vectors[:queries].numpy())


def faiss_fast_scan(queries: int):
    """IndexPQFastScan with random codes of its own: 16 of 4 bits."""
    faiss = pytest.importorskip("faiss")
    random = np.random.default_rng(1)
    slow = faiss.IndexPQ(WIDTH, 16, 4, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(random.standard_normal(16 * WIDTH, dtype=np.float32), slow.pq.centroids)
    faiss.copy_array_to_vector(random.integers(0, 256, N * 8, dtype=np.uint8), slow.codes)
    slow.ntotal, slow.is_trained = N, True
    index = faiss.IndexPQFastScan(slow)
    return searcher(index, uniform()[2][:queries].numpy())


def searcher(index, vectors):
    import faiss

    def search():
        faiss.omp_set_num_threads(torch.get_num_threads())
        return index.search(vectors, TOP)

    return search


def numpy_gather(codes, table):
    by_book = np.ascontiguousarray(codes.numpy().T)

    def search():
        found = []
        for entry in table.numpy():
            total = entry[0][by_book[0]]
            for book in range(1, M):
                total += entry[book][by_book[book]]
            best = np.argpartition(total, N - TOP)[N - TOP :]
            found.append(best[np.argsort(-total[best])])
        return None, np.stack(found)

    return search


def torch_bags(codes, table):
    places = (codes.int() + torch.arange(M, dtype=torch.int32) * K).contiguous()

    def search():
        sums = [torch.nn.functional.embedding_bag(places, entry.view(-1, 1), mode="sum") for entry in table]
        return None, torch.stack([total[:, 0].topk(TOP).indices for total in sums])

    return search


def scipy_product(codes, table):
    """A row of scores times the matrix (codes x items), which holds a 1 for each code of each item."""
    sparse = pytest.importorskip("scipy.sparse")
    places = (codes.numpy().astype(np.int32) + np.arange(M, dtype=np.int32) * K).ravel()
    ones = np.ones(N * M, dtype=np.float32)
    postings = sparse.csr_matrix((ones, places, np.arange(0, N * M + 1, M)), shape=(N, M * K)).T.tocsr()
    flat = table.flatten(1).numpy()

    def search():
        product = sparse.csr_matrix(flat) @ postings
        found = []
        for row in range(len(flat)):
            scores = product.data[product.indptr[row] : product.indptr[row + 1]]
            ids = product.indices[product.indptr[row] : product.indptr[row + 1]]
            best = np.argpartition(scores, len(scores) - TOP)[len(scores) - TOP :]
            found.append(ids[best[np.argsort(-scores[best])]])
        return None, np.stack(found)

    return search


def reading(queries: int):
    words = uniform()[0].flatten().view(torch.int64)

    def read():
        for _ in range(queries):
            words.sum()

    return read


def sparse_tables(table: torch.Tensor, kept: int) -> tuple[torch.Tensor, ops.SparseTable]:
    """What each codebook's `kept` best codes have above the next, dense and sparse; all else is 0."""
    edge = table.topk(kept + 1, dim=2).values[:, :, -1:]
    table = (table - edge).clamp(min=0)
    flat = table.flatten(1)
    rows, codes = flat.nonzero(as_tuple=True)
    offsets = torch.zeros(len(flat) + 1, dtype=torch.int64)
    offsets[1:] = rows.bincount(minlength=len(flat)).cumsum(0)
    return table, ops.SparseTable(codes, flat[rows, codes], offsets)


def agreement(name: str, table, mask=None, approximate=()):
    """Ours to the bit. Others add in another order, or make their own table: what they find must score as much.

    At most 8 queries are compared.
    """
    codes, table = DATA[name]()[0], table[:8]
    wanted = ops.code_search.reference(codes, table, TOP, mask=mask)
    # Of two sums of 2 M terms each (a term of FAISS is itself a sum of 8 products), in units of the largest term.
    slack = 4 * M * WIDTH * torch.finfo(torch.float32).eps * float(table.abs().max())

    def check(answer, column):
        if column in approximate:
            return
        found = torch.as_tensor(answer[1])[: len(table)].long()
        if column.startswith(("rival", "torch", "numpy")):
            for entry, ids, least in zip(table, found, wanted[0][:, -1], strict=True):
                scores = entry[torch.arange(M), codes[ids].long()].sum(1)
                assert len(set(ids.tolist())) == TOP, column
                assert float(scores.min()) >= float(least) - slack, column
        else:
            assert torch.equal(found, wanted[1]), column
            assert torch.equal(answer[0][: len(table)], wanted[0]), column

    return check


@pytest.mark.parametrize("queries", [1, 16])
def test_plain_scan(race, queries):
    codes, table = uniform()[0], tables("uniform", queries)
    items = packed("uniform", "none")
    ways = {
        "ours": lambda: ops.code_search(items, table, TOP, plan="scan"),
        "scalar": lambda: ops.code_search(items, table, TOP, plan="scalar"),
        "rival: FAISS IndexPQ": faiss_pq("uniform", queries),
        "rival: FAISS IndexPQFastScan 16x4": faiss_fast_scan(queries),
        "limit": reading(queries),
    }
    if queries == 1:
        ways["torch"] = torch_bags(codes, table)
        ways["numpy"] = numpy_gather(codes, table)
        ways["rival: scipy"] = scipy_product(codes, table)
    check = agreement("uniform", table, approximate=["rival: FAISS IndexPQFastScan 16x4"])
    race("code_search", f"plain scan, Q={queries}", N * queries, ways, check=check, settle=6 if queries == 1 else 1)


@pytest.mark.parametrize("name", ["clustered", "uniform"])
def test_block_max(race, name):
    """Sixteen queries one by one, since how much is passed over differs between them."""
    table = tables(name, 16)
    lex, plain = packed(name, "lex"), packed(name, "none")

    def each(items, plan):
        answers = [ops.code_search(items, table[q : q + 1], TOP, plan=plan) for q in range(16)]
        return tuple(torch.cat(part) for part in zip(*answers, strict=True))

    ways = {
        "ours": lambda: each(lex, "auto"),
        "plain scan": lambda: each(plain, "scan"),
        "rival: FAISS IndexPQ": faiss_pq(name, 16),
        "limit": reading(16),
    }
    race("code_search", f"block-max, {name} codes", N * 16, ways, check=agreement(name, table), settle=6)


@pytest.mark.parametrize("order", ["none", "lex"])
def test_sparse_table(race, order):
    codes = clustered()[0]
    table, sparse = sparse_tables(tables("clustered", 1), 16)
    items = packed("clustered", order)
    ways = {
        "ours": lambda: ops.code_search(items, sparse, TOP),
        "as a dense table": lambda: ops.code_search(items, table, TOP),
        "rival: scipy": scipy_product(codes, table),
        "limit": reading(1),
    }
    plan = "plain scan" if order == "none" else "block-max"
    race("code_search", f"16 of 256, clustered, {plan}", N, ways, check=agreement("clustered", table), settle=6)


class Bitmap:
    """Bits by slot, and by position once they have been asked for: a mask that serves many searches."""

    def __init__(self, mask, items):
        self.words = ops.pack_mask(mask)
        self.ordered = ops.permute_mask(self.words, items)

    def by_position(self, _items):
        return self.ordered


@pytest.mark.parametrize("order", ["none", "lex"])
def test_mask(race, order):
    """A mask that allows one item in a hundred, against the same search without one."""
    name = "uniform" if order == "none" else "clustered"
    table = tables(name, 1)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.01
    items = packed(name, order)
    bitmap = Bitmap(mask, items)
    masked, free = agreement(name, table, mask), agreement(name, table)

    def check(answer, column):
        (free if column == "without a mask" else masked)(answer, column)

    ways = {
        "ours": lambda: ops.code_search(items, table, TOP, mask=bitmap),
        "as bool": lambda: ops.code_search(items, table, TOP, mask=mask),
        "without a mask": lambda: ops.code_search(items, table, TOP),
    }
    plan = "plain scan, uniform" if order == "none" else "block-max, clustered"
    race("code_search", f"mask 1 %, {plan}", N, ways, check=check, settle=6)


def test_batch(race):
    table = tables("uniform", 256)
    items = packed("uniform", "none")
    ways = {
        "ours": lambda: ops.code_search(items, table, TOP),
        "rival: FAISS IndexPQFastScan 16x4": faiss_fast_scan(256),
        "limit": reading(256),
    }
    check = agreement("uniform", table, approximate=["rival: FAISS IndexPQFastScan 16x4"])
    race("code_search", "plain scan, Q=256", N * 256, ways, check=check)


@contextlib.contextmanager
def without_vbmi():
    before = _C.isa()
    _C.set_isa("avx2")
    try:
        yield
    finally:
        _C.set_isa(before)


def test_without_vbmi(race):
    if _C.isa() == "scalar":
        pytest.skip("this processor has no AVX2")
    table = tables("uniform", 1)
    items = packed("uniform", "none")

    def ours():
        with without_vbmi():
            return ops.code_search(items, table, TOP)

    ways = {
        "ours": ours,
        "scalar": lambda: ops.code_search(items, table, TOP, plan="scalar"),
        "rival: FAISS IndexPQ": faiss_pq("uniform", 1),
        "limit": reading(1),
    }
    race("code_search", "plain scan, AVX2, Q=1", N, ways, check=agreement("uniform", table), settle=6)
