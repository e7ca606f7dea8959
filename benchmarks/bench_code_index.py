"""CodeIndex: from a file to the first answer, masks as bits and as bytes, lists against scans, changes."""

import numpy as np
import pytest
import torch

from recfast import ops
from recfast.index import Bitmap, CodeIndex

N, M, K, TOP = 1_000_000, 8, 256, 100


def uniform(items=N, seed=0):
    return np.random.default_rng(seed).integers(0, K, (items, M)).astype(np.uint8)


def clustered(items=N, seed=0):
    """Codes of 4096 clusters, each of six codes in every codebook."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, K, (4096, M, 6)).astype(np.uint8)
    cluster, pick = random.integers(0, 4096, items), random.integers(0, 6, (items, M))
    return codes[cluster[:, None], np.arange(M), pick]


def table_of(queries, seed=0):
    return torch.randn(queries, M, K, generator=torch.Generator().manual_seed(seed))


def same(answer, wanted):
    assert torch.equal(answer[0], wanted[0])
    assert torch.equal(answer[1], wanted[1])


@pytest.fixture(scope="module")
def indexes():
    return {"uniform": CodeIndex(uniform(), order="none"), "clustered": CodeIndex(clustered(), order="lex")}


@pytest.mark.parametrize("kind", ["uniform", "clustered"])
def test_from_a_file_to_the_first_answer(race, indexes, kind, tmp_path):
    index, table = indexes[kind], table_of(1)
    index.save(tmp_path / "index")
    np.save(tmp_path / "codes.npy", index.codes.numpy())
    wanted = index.search(table, TOP)

    def rebuild():
        return CodeIndex(np.load(tmp_path / "codes.npy"), order=index.order).search(table, TOP)

    race(
        "load, first query",
        f"N={N} {kind}, order {index.order}",
        1,
        {
            "ours": lambda: CodeIndex.load(tmp_path / "index", mmap=True).search(table, TOP),
            "ours, read": lambda: CodeIndex.load(tmp_path / "index").search(table, TOP),
            "ours, mapped, not verified": lambda: CodeIndex.load(tmp_path / "index", mmap=True, verify=False).search(
                table, TOP
            ),
            "rebuild from .npy": rebuild,
            "limit": lambda: (tmp_path / "index").read_bytes(),
        },
        check=lambda answer, _: same(answer, wanted),
    )


@pytest.mark.parametrize("kind", ["uniform", "clustered"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_masks(race, indexes, kind, share):
    index, queries = indexes[kind], 16
    table = table_of(queries)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(1)) < share
    slots = mask.nonzero()[:, 0].numpy()
    bitmap = Bitmap.from_mask(mask)
    wanted = index.search(table, TOP, mask=mask)
    race(
        "search under a mask",
        f"N={N} Q={queries} {kind}, {share:.0%} allowed",
        queries,
        {
            "ours": lambda: index.search(table, TOP, mask=bitmap),
            "bool mask": lambda: index.search(table, TOP, mask=mask),
            "new Bitmap of ids": lambda: index.search(table, TOP, mask=Bitmap.allow(N, slots)),
            "no mask": lambda: index.search(table, TOP),
        },
        check=lambda answer, column: column == "no mask" or same(answer, wanted),
    )


@pytest.mark.parametrize("kind", ["uniform", "clustered"])
@pytest.mark.parametrize("entries", [4, 8, 16, 32, 64, 128])
def test_lists_against_scans(race, indexes, kind, entries):
    """`entries` of the 2048 codes are named, so that about N / (256 / entries) items are touched."""
    index, queries = indexes[kind], 16
    random = np.random.default_rng(entries)
    codes = np.sort(np.stack([random.choice(M * K, entries, replace=False) for _ in range(queries)]), axis=1)
    table = ops.SparseTable(
        torch.from_numpy(codes.reshape(-1)),
        torch.from_numpy(random.random(queries * entries).astype(np.float32)),
        torch.arange(queries + 1) * entries,
    )
    index.search(table, TOP, plan="postings")  # the lists are there
    wanted = index.search(table, TOP, plan="scan")
    ways = {
        "ours": lambda: index.search(table, TOP),
        "postings": lambda: index.search(table, TOP, plan="postings"),
        "scan": lambda: index.search(table, TOP, plan="scan"),
    }
    if index.order == "lex":
        ways["block-max"] = lambda: index.search(table, TOP, plan="block_max")
    race(
        "few entries",
        f"N={N} {kind}, N / {round(256 / entries)} touched",
        queries,
        ways,
        check=lambda answer, _: same(answer, wanted),
        seconds=0.3,
    )


@pytest.mark.parametrize("kind", ["uniform", "clustered"])
def test_changes(race, indexes, kind):
    """A thousand items at a time; a change of all is a rebuild."""
    index, count = indexes[kind], 1000
    codes = uniform(count, seed=5)
    ids = np.random.default_rng(1).choice(N, count, replace=False)
    old = index.codes.numpy()[ids]

    def add():
        index.remove(index.add(codes))

    def update():
        index.update(ids, codes)
        index.update(ids, old)

    race(
        "changes",
        f"N={N} {kind}, {count} items",
        count,
        {"ours": update, "add and remove": add, "compact": index.compact},
        seconds=0.5,
    )
