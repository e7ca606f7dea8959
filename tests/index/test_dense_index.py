import copy
import pickle
import threading

import numpy as np
import pytest
import torch

from recfast import InputError
from recfast.index import Bitmap, DenseIndex

KINDS = ("flat", "ivf", "hnsw", "pq", "ivfpq")
# Wide enough to find everything: what is left is the bookkeeping.
WIDE = {
    "flat": {},
    "ivf": {"n_lists": 5, "n_probe": 5},
    "hnsw": {"ef_search": 2000, "ef_construction": 200},
    "pq": {"n_codebooks": 4, "refine": 1000},
    "ivfpq": {"n_lists": 5, "n_probe": 5, "n_codebooks": 4, "refine": 1000},
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def make(kind, vectors, ids=None, **more):
    return DenseIndex(vectors, kind, ids, **{**WIDE[kind], **more})


def same_answers(index, items, queries, k=10, mask=None):
    """The answers are the best of `items` (id -> vector); ids may differ where scores are equal."""
    scores, found = index.search(queries, k, mask=mask)
    ids = np.array(sorted(items), dtype=np.int64)
    total = queries @ np.array([items[name] for name in ids.tolist()]).reshape(len(ids), -1).T
    best = -np.sort(-total, axis=1)[:, :k]
    np.testing.assert_allclose(scores.numpy()[:, : best.shape[1]], best, rtol=1e-5, atol=1e-5)
    assert bool((scores[:, best.shape[1] :] == -torch.inf).all())
    for row, names in enumerate(found.tolist()):
        kept = [name for name in names if name >= 0]
        assert len(set(kept)) == len(kept) == best.shape[1]
        np.testing.assert_allclose(
            [queries[row] @ items[name] for name in kept], scores.numpy()[row, : len(kept)], rtol=1e-5, atol=1e-5
        )


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


@EVERY
@pytest.mark.parametrize("named", [False, True])
def test_changes_equal_a_plain_dictionary(kind, named):
    vectors, queries, random = problem(600, 8, 4, whole=False)
    ids = random.permutation(5000)[:600] if named else None
    index = make(kind, vectors[:400], None if ids is None else ids[:400])
    items = dict(zip(range(400) if ids is None else ids[:400].tolist(), vectors, strict=False))
    same_answers(index, items, queries)
    new = index.add(vectors[400:500], None if ids is None else ids[400:500])
    items.update(zip(new.tolist(), vectors[400:500], strict=True))
    same_answers(index, items, queries)
    gone = random.permutation(sorted(items))[:150]
    index.remove(gone)
    for name in gone.tolist():
        del items[name]
    assert (len(index), index.n_slots) == (350, 500)
    same_answers(index, items, queries)
    changed = random.permutation(sorted(items))[:60]
    index.update(changed, vectors[500:560])
    items.update(zip(changed.tolist(), vectors[500:560], strict=True))
    same_answers(index, items, queries)
    # A removed id may come back; without one the numbers go on.
    index.add(vectors[560:561], [int(gone[0])])
    items[int(gone[0])] = vectors[560]
    (fresh,) = index.add(vectors[561:562]).tolist()
    assert fresh == (5000 if ids is not None and ids[:500].max() == 4999 else max([*items, *gone]) + 1)
    items[fresh] = vectors[561]
    same_answers(index, items, queries)
    # Masks speak of slots, before compacting and after.
    for _ in range(2):
        some = random.permutation(sorted(items))[:40]
        part = {name: items[name] for name in some.tolist()}
        same_answers(index, part, queries, mask=index.allow(some))
        same_answers(index, part, queries, mask=Bitmap.allow(index, some))
        index.compact()
        assert (len(index), index.n_slots) == (352, 352)
        same_answers(index, items, queries, k=360)
    index.remove(sorted(items))
    assert len(index) == 0
    assert index.search(queries, 3)[1].tolist() == [[-1] * 3] * 4
    index.compact()
    again = index.add(vectors[:300])
    assert int(again[0]) == fresh + 1
    same_answers(index, dict(zip(again.tolist(), vectors, strict=False)), queries)


@EVERY
def test_everything_removed_then_added(kind):
    """Slots go on where items were, without compacting."""
    vectors, queries, _ = problem(600, 8, 4, whole=False)
    index = make(kind, vectors[:300])
    index.remove(np.arange(300))
    index.add(vectors[300:])
    assert index.n_slots == 600
    items = dict(zip(range(300, 600), vectors[300:], strict=True))
    same_answers(index, items, queries)
    mask = torch.zeros(600, dtype=torch.bool)
    mask[310:320] = True
    same_answers(index, {name: items[name] for name in range(310, 320)}, queries, mask=mask)


@EVERY
def test_a_bitmap_from_before_compact_is_refused(kind):
    vectors, queries, _ = problem(300, 8, whole=False)
    index = make(kind, vectors)
    bitmap = Bitmap.allow(index, [5, 6])
    index.remove([5])
    assert index.search(queries, 2, mask=bitmap)[1].tolist() == [[6, -1]] * 5
    index.compact()
    index.add(vectors[:1])
    with pytest.raises(ValueError, match="mask was made before compact"):
        index.search(queries, 2, mask=bitmap)


@EVERY
def test_allow_and_deny(kind):
    vectors, queries, _ = problem(300, 8, whole=False)
    index = make(kind, vectors, np.arange(300) + 1000)
    items = dict(zip(range(1000, 1300), vectors, strict=True))
    same_answers(index, {name: items[name] for name in (1003, 1200)}, queries, mask=index.allow([1003, 1200]))
    kept = {name: items[name] for name in items if name not in (1003, 1200)}
    same_answers(index, kept, queries, mask=index.deny([1003, 1200]))
    packed = np.packbits(index.allow([1003]).to_mask().numpy(), bitorder="little")
    same_answers(index, {1003: items[1003]}, queries, mask=packed)
    with pytest.raises(ValueError, match=r"DenseIndex\.allow: ids\[1\] = 3 is not in the index"):
        index.allow([1003, 3])


def test_searches_see_items_before_or_after_a_change():
    """Threads search while others add and remove: every answer is the first item, which never leaves."""
    vectors, _, _ = problem(400, 8, whole=False)
    vectors[0] = 100.0
    index = make("ivf", vectors[:100])
    failures = []

    def look():
        for _ in range(100):
            scores, found = index.search(vectors[:1], 3)
            if found[0, 0] != 0 or not bool(torch.isfinite(scores).all()):
                failures.append(found)

    def change():
        for start in range(100, 400, 20):
            index.remove(index.add(vectors[start : start + 20])[:10])
        index.compact()

    threads = [threading.Thread(target=work) for work in (look, look, look, change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (len(index), index.n_slots) == (250, 250)


@EVERY
def test_pickles(kind, tmp_path):
    vectors, queries, _ = problem(300, 8, whole=False)
    make(kind, vectors).save(tmp_path / "index")
    index = DenseIndex.load(tmp_path / "index", mmap=True)
    again = pickle.loads(pickle.dumps(index))
    for got, wanted in zip(again.search(queries, 5), index.search(queries, 5), strict=True):
        assert torch.equal(got, wanted)
    again.remove([3])
    assert (len(again), len(index)) == (299, 300)


@EVERY
@pytest.mark.parametrize("mmap", [False, True])
def test_save_and_load(kind, mmap, tmp_path):
    vectors, queries, random = problem(400, 8, 4, whole=False)
    index = make(kind, vectors, random.permutation(1000)[:400])
    index.remove(index.ids[10:50])
    index.save(tmp_path / "index")
    before = (tmp_path / "index").read_bytes()
    again = DenseIndex.load(tmp_path / "index", mmap=mmap)
    assert (again.kind, len(again), again.n_slots, again.n_probe) == (kind, 360, 400, index.n_probe)
    mask = random.random(400) < 0.3
    for allowed in (None, mask):
        for got, wanted in zip(
            again.search(queries, 20, mask=allowed), index.search(queries, 20, mask=allowed), strict=True
        ):
            assert torch.equal(got, wanted)
    # A loaded index may be changed; the file may not.
    for one in (index, again):
        one.update(one.ids[:3], vectors[10:13])
        one.remove(one.ids[100:120])
        one.add(vectors[:5])
        one.compact()
    assert torch.equal(again.ids, index.ids)
    for got, wanted in zip(again.search(queries, 20), index.search(queries, 20), strict=True):
        torch.testing.assert_close(got, wanted)
    assert (tmp_path / "index").read_bytes() == before
    again.save(tmp_path / "again")
    assert len(DenseIndex.load(tmp_path / "again")) == 345


@EVERY
def test_an_empty_index_travels(kind, tmp_path):
    vectors, queries, _ = problem(300, 8, whole=False)
    make(kind, vectors[:0]).save(tmp_path / "index")
    index = DenseIndex.load(tmp_path / "index", mmap=True)
    assert len(index) == 0
    index.add(vectors)
    same_answers(index, dict(enumerate(vectors)), queries)


def test_refuses_broken_files(tmp_path):
    vectors, _, random = problem(300, 8, whole=False)
    path = tmp_path / "index"
    DenseIndex(vectors, "hnsw").save(path)
    whole = path.read_bytes()
    for place in random.permutation(len(whole))[:60]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"DenseIndex\.load: .*index"):
            DenseIndex.load(path, mmap=bool(place % 2))
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            DenseIndex.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(InputError, match="truncated or damaged"):
        DenseIndex.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        DenseIndex.load(tmp_path / "nothing")
    from recfast.index import CodeIndex

    CodeIndex(np.zeros((3, 2), dtype=np.uint8)).save(path)
    with pytest.raises(InputError, match=r"must hold a recfast\.DenseIndex, found recfast\.CodeIndex"):
        DenseIndex.load(path)


def test_a_failed_change_changes_nothing():
    vectors, queries, _ = problem(300, 8, whole=False)
    for kind in KINDS:
        index = make(kind, vectors)
        wanted = index.search(queries, 5)
        for call in (
            lambda i: i.add(vectors[:2], [7, 8]),
            lambda i: i.add(vectors[:2], [400, 400]),
            lambda i: i.add(vectors[:2] * np.float32("nan")),
            lambda i: i.add(vectors[:2, :3]),
            lambda i: i.remove([1, 400]),
            lambda i: i.remove([1, 1]),
            lambda i: i.update([1, 400], vectors[:2]),
            lambda i: i.update([1], vectors[:2]),
        ):
            with pytest.raises(ValueError, match=r"DenseIndex\.(add|remove|update): "):
                call(index)
        assert (len(index), index.n_slots) == (300, 300)
        assert all(torch.equal(a, b) for a, b in zip(index.search(queries, 5), wanted, strict=True))


@EVERY
def test_nbytes(kind):
    vectors, _, _ = problem(2000, 8, whole=False)
    bytes_ = make(kind, vectors, **({"refine": 0} if "pq" in kind else {})).nbytes / 2000
    # Vectors of 32 bytes or codes of 4, a byte of life, 8 of a name in a list, 4 * 2 * 32 of links at the lowest level.
    low = {"flat": 33, "ivf": 41, "hnsw": 33 + 256, "pq": 5, "ivfpq": 13}[kind]
    assert low <= bytes_ <= low + {"flat": 0, "ivf": 0.2, "hnsw": 30, "pq": 4.1, "ivfpq": 4.3}[kind]


def test_refining_finds_more():
    vectors, queries, _ = problem(3000, 16, 50, whole=False)
    exact = DenseIndex(vectors).search(queries, 10)[1].numpy()

    def recall(**options):
        found = DenseIndex(vectors, "pq", n_codebooks=4, **options).search(queries, 10)[1].numpy()
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])

    plain, refined = recall(), recall(refine=10)
    assert plain < 0.8
    assert refined > plain + 0.15


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda v: DenseIndex(v, "tree"), ValueError, "kind must be one of flat, ivf, hnsw, pq, ivfpq, got 'tree'"),
        (lambda v: DenseIndex(v.astype(np.float64)), TypeError, "vectors must be float32, got float64"),
        (lambda v: DenseIndex(v * np.float32("nan")), ValueError, r"vectors\[0\] must be finite"),
        (lambda v: DenseIndex(v[0]), ValueError, r"vectors must have shape \[N, D\], got \[8\]"),
        (lambda v: DenseIndex(v, ids=[1]), ValueError, r"ids must have shape \[500\], got \[1\]"),
        (lambda v: DenseIndex(v, ids=[1] * 500), ValueError, r"ids\[1\] = 1 is given twice"),
        (lambda v: DenseIndex(v, "ivf", n_probe=0), ValueError, "n_probe must be at least 1, got 0"),
        (lambda v: DenseIndex(v, "ivf", n_lists=501), ValueError, "n_lists must be at most the number of items, 500"),
        (lambda v: DenseIndex(v, "pq", n_codebooks=3), ValueError, "n_codebooks must divide the width 8, got 3"),
        (lambda v: DenseIndex(v[:100], "pq"), ValueError, "pq needs at least 256 items to learn its codes, got 100"),
        (lambda v: DenseIndex(v, refine=2), ValueError, "refine must be 0 for flat"),
        (lambda v: DenseIndex(v).search(v[:, :4], 1), ValueError, r"queries must have shape \[N, 8\], got \[500, 4\]"),
        (lambda v: DenseIndex(v).search(v, -1), ValueError, "k must be at least 0, got -1"),
        (lambda v: DenseIndex(v).search(v[:2], 1, mask=np.ones(3, bool)), ValueError, "mask must have shape"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(problem()[0])


@EVERY
def test_a_copy_shares_nothing(kind):
    vectors, queries, _ = problem(whole=False)
    index = make(kind, vectors)
    before = index.search(queries, 5)
    for made in (copy.copy, copy.deepcopy):
        other = made(index)
        other.update([0, 1], vectors[:2] + 9)
        other.remove(before[1].flatten().unique().numpy())
        assert len(index) == len(vectors)
        assert all(torch.equal(*pair) for pair in zip(index.search(queries, 5), before, strict=True))


@EVERY
def test_a_pickle_is_of_one_moment(kind):
    """What is pickled was copied under the lock: changes that come while it is written out do not show."""
    vectors, queries, _ = problem(whole=False)
    index = make(kind, vectors)
    before = index.search(queries, 5)
    state = index.__getstate__()
    index.update(np.arange(100), vectors[100:200])
    index.remove(before[1].flatten().unique().numpy())
    other = DenseIndex.__new__(DenseIndex)
    other.__setstate__(state)
    assert all(torch.equal(*pair) for pair in zip(other.search(queries, 5), before, strict=True))


@EVERY
def test_vectors_too_long_to_multiply_are_refused(kind):
    vectors, queries, _ = problem(whole=False)
    index = make(kind, vectors)
    vectors[3] *= 1e19
    # FAISS would end the process, or return NaN.
    with pytest.raises(ValueError, match=r"vectors\[3\] must be finite and shorter than 2\*\*60, got length "):
        make(kind, vectors)
    with pytest.raises(ValueError, match=r"queries\[0\] must be finite and shorter than 2\*\*60"):
        index.search(queries * np.float32(1e30), 3)


def test_adding_nothing_behind_the_highest_id():
    vectors, _, _ = problem(3)
    index = DenseIndex(vectors, ids=[1, 2, 2**63 - 1])
    made = index.add(vectors[:0])
    assert made.dtype == torch.int64
    assert len(made) == 0


def test_bits_are_spread_out_one_query_at_a_time(monkeypatch):
    vectors, queries, random = problem()
    mask = random.random((len(queries), len(vectors))) < 0.5
    index, bits, shapes = DenseIndex(vectors), Bitmap.from_mask(mask), []
    spread = Bitmap.to_mask
    monkeypatch.setattr(Bitmap, "to_mask", lambda self: shapes.append(self.shape) or spread(self))
    for answer, wanted in zip(index.search(queries, 5, bits), index.search(queries, 5, mask), strict=True):
        assert torch.equal(answer, wanted)
    assert shapes == [(len(vectors),)] * len(queries)
