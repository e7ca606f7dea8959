import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast.errors import InputError
from recfast.index import CodeRows, CodeTrie, _file, constrained_beam


def model(seed, n_codes, dtype=torch.float32):
    """Logits that depend on the batch row and on the whole prefix, as an autoregressive model's do."""

    def step(codes, parents):
        batch, beams, length = codes.shape
        assert (parents is None) == (length == 0)
        out = torch.empty(batch, beams, n_codes)
        for row, beam in itertools.product(range(batch), range(beams)):
            key = [seed, row, *codes[row, beam].tolist()]
            out[row, beam] = torch.from_numpy(np.random.default_rng(key).standard_normal(n_codes) * 2)
        return out.to(dtype)

    return step


def all_items(step, codes, ids, batch, renormalise):
    """The score of every item in float64: [B, N], by adding the log-probability of each of its codes."""
    scores = np.zeros((batch, len(codes)))
    for level in range(codes.shape[1]):
        for item, row_codes in enumerate(codes):
            prefix = torch.from_numpy(row_codes[:level].astype(np.int64)).expand(batch, 1, level)
            logits = step(prefix, None if level == 0 else torch.zeros(batch, 1, dtype=torch.int64))[:, 0].double()
            if renormalise:
                same = (codes[:, :level] == row_codes[:level]).all(1)
                legal = np.unique(codes[same, level])
                logits = logits - logits[:, legal].logsumexp(1, keepdim=True)
            else:
                logits = logits.log_softmax(1)
            scores[:, item] += logits[:, row_codes[level]].numpy()
    return scores


@given(
    seed=st.integers(0, 2**32 - 1),
    n_items=st.sampled_from([0, 1, 3, 25]),
    levels=st.integers(1, 3),
    n_codes=st.sampled_from([1, 3, 20]),
    batch=st.integers(0, 2),
    k=st.sampled_from([0, 1, 5, 60]),
    renormalise=st.booleans(),
)
def test_a_wide_beam_is_exact_scoring(seed, n_items, levels, n_codes, batch, k, renormalise):
    random = np.random.default_rng(seed)
    codes = random.integers(0, n_codes, (n_items, levels))
    ids = random.permutation(1000)[:n_items]
    trie = CodeTrie.from_codes(torch.from_numpy(codes), n_codes, ids)
    step = model(seed, n_codes)
    answer = constrained_beam(step, trie, max(n_items, 1), batch=batch, renormalise=renormalise, k=k)
    wanted = all_items(step, codes, ids, batch, renormalise)
    by_id = {int(item): place for place, item in enumerate(ids)}
    kept = min(k, n_items)
    for row in range(batch):
        found = answer.ids[row].tolist()
        assert found[kept:] == [-1] * (k - kept)
        assert len(set(found[:kept])) == kept
        scores = answer.scores[row, :kept].double().numpy()
        places = [by_id[item] for item in found[:kept]]
        np.testing.assert_allclose(scores, wanted[row, places], atol=1e-4)
        np.testing.assert_allclose(scores, np.sort(wanted[row])[::-1][:kept], atol=1e-4)
        np.testing.assert_array_equal(answer.codes[row, :kept].numpy(), codes[places])
        # Items of one leaf: the same bits, lowest id first.
        for i in range(kept - 1):
            assert scores[i] > scores[i + 1] or (scores[i] == scores[i + 1] and found[i] < found[i + 1])


def test_probabilities_sum_to_one_over_leaves():
    random = np.random.default_rng(1)
    codes = np.unique(random.integers(0, 6, (40, 3)), axis=0)
    trie = CodeTrie.from_codes(codes, 6)
    for renormalise in (True, False):
        answer = constrained_beam(model(3, 6), trie, 200, batch=2, renormalise=renormalise)
        total = answer.scores.exp().sum(1)
        if renormalise:
            torch.testing.assert_close(total, torch.ones(2))
        else:
            assert bool((total < 0.9).all())


def test_bfloat16_and_a_narrow_beam():
    codes = np.random.default_rng(2).integers(0, 8, (60, 3))
    trie = CodeTrie.from_codes(codes, 8)
    step = model(4, 8, torch.bfloat16)
    wide = constrained_beam(step, trie, 60, batch=3, renormalise=False, k=5)
    narrow = constrained_beam(step, trie, 4, batch=3, renormalise=False)
    assert narrow.ids.shape == (3, 4)
    # What a narrow beam finds is scored as a wide one scores it, and never better.
    assert bool((narrow.scores <= wide.scores[:, :4]).all())


def test_caches_are_reordered_by_parents():
    """A step that keeps its own prefix by parents alone sees the codes it is given."""
    codes = np.random.default_rng(5).integers(0, 5, (50, 3))
    trie = CodeTrie.from_codes(codes, 5)
    plain = model(6, 5)
    cache = []

    def step(prefix, parents):
        batch = len(prefix)
        if parents is not None:
            cache[0] = torch.cat([cache[0][torch.arange(batch)[:, None], parents], prefix[..., -1:]], dim=2)
            assert torch.equal(cache[0], prefix)
        else:
            cache.append(prefix)
        return plain(prefix, parents)

    constrained_beam(step, trie, 7, batch=2, renormalise=True)


@given(
    seed=st.integers(0, 2**32 - 1),
    n_items=st.sampled_from([0, 1, 2, 300]),
    levels=st.integers(1, 9),
    n_codes=st.sampled_from([1, 2, 16, 256, 257, 65_536]),
    named=st.booleans(),
)
def test_the_tree_holds_the_codes(seed, n_items, levels, n_codes, named):
    random = np.random.default_rng(seed)
    codes = random.integers(0, n_codes, (n_items, levels)).astype(np.int32)
    codes[: n_items // 3] = codes[n_items // 3 : 2 * (n_items // 3)]  # items that share all codes
    ids = random.integers(0, 10**12, n_items) if named else None
    trie = CodeTrie.from_codes(codes, n_codes, ids)
    assert trie.levels == levels
    names = np.arange(n_items) if ids is None else ids
    prefixes = [set(map(tuple, codes[:, :length].tolist())) for length in range(levels + 1)]
    assert len(trie) == max(sum(map(len, prefixes)), 1)
    for row in codes[random.permutation(n_items)[:20]]:
        node = 0
        for code in row:
            nodes, of_children = trie.children(node)
            assert bool((of_children.diff() > 0).all())
            node = int(nodes[of_children.tolist().index(code)])
        found, offsets = trie.items(torch.tensor([node, -1]))
        assert found.tolist() == sorted(names[(codes == row).all(1)].tolist())
        assert offsets.tolist() == [0, len(found), len(found)]
        assert len(trie.children(node)[0]) == 0


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("n_items", [0, 1, 200])
def test_stored_and_read_again(n_items, mmap, tmp_path):
    random = np.random.default_rng(0)
    trie = CodeTrie.from_codes(random.integers(0, 300, (n_items, 3)), [300, 300, 400], random.permutation(n_items))
    trie.save(tmp_path / "trie")
    again = CodeTrie.load(tmp_path / "trie", mmap=mmap)
    assert again.n_codes == (300, 300, 400)
    for name in ("first_child", "node_codes", "leaf_items", "ids"):
        assert torch.equal(getattr(again, name), getattr(trie, name))
    assert again.nbytes == trie.nbytes


def test_damaged_files_are_refused(tmp_path):
    random = np.random.default_rng(0)
    trie = CodeTrie.from_codes(random.integers(0, 20, (50, 3)), 20)
    path = tmp_path / "trie"
    trie.save(path)
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 13):
        content[place] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"^CodeTrie\.load: "):
            CodeTrie.load(path)
        content[place] ^= 0x10
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"^CodeTrie\.load: "):
        CodeTrie.load(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"must hold a recfast\.CodeRows, found recfast\.CodeTrie"):
        CodeRows.load(path)
    # A right checksum over wrong numbers.
    arrays = {name: getattr(trie, name).numpy() for name in ("first_child", "node_codes", "leaf_items", "ids")}
    for name in ("first_child", "node_codes", "leaf_items"):
        for wrong in (arrays[name][:-1], np.roll(arrays[name], 1), arrays[name].astype(np.int64)):
            _file.save(path, "CodeTrie", {"n_codes": [20] * 3}, {**arrays, name: wrong})
            with pytest.raises(InputError, match="is corrupt"):
                CodeTrie.load(path)
    for counts in ([20, 20], [20] * 4, [20, 20, 10]):
        _file.save(path, "CodeTrie", {"n_codes": counts}, arrays)
        with pytest.raises(InputError, match="is corrupt"):
            CodeTrie.load(path)


def test_rejects_bad_input():
    codes = np.array([[1, 0], [4, 3]])
    for arguments, error, sentence in (
        (([[0]],), TypeError, "codes must be a tensor or a numpy array, got list"),
        ((codes.astype(float),), TypeError, "codes must be integers, got float64"),
        ((codes[0],), ValueError, r"codes must have shape \[N, M\] with M at least 1, got \[2\]"),
        ((codes, 4), IndexError, r"codes\[1, 0\] = 4 is outside \[0, 4\)"),
        ((-codes, 5), IndexError, r"codes\[0, 0\] = -1 is outside \[0, 5\)"),
        ((codes, [5]), ValueError, "n_codes must be one number or 2, got 1"),
        ((codes, 0), ValueError, r"n_codes must lie in \[1, 65536\], got 0"),
        ((codes, 5, [1]), ValueError, r"ids must have shape \[2\], got \[1\]"),
    ):
        with pytest.raises(error, match=sentence):
            CodeTrie.from_codes(*arguments)
    trie = CodeTrie.from_codes(codes, 5)
    with pytest.raises(IndexError, match=r"leaves\[0\] = 2 is outside \[3, 5\), the leaves"):
        trie.items(torch.tensor([2]))
    with pytest.raises(IndexError, match=r"node = 5 is outside \[0, 5\)"):
        trie.children(5)
    with pytest.raises(TypeError, match=r"is made by CodeTrie\.from_codes"):
        CodeTrie()
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        constrained_beam(model(0, 5), trie, 0, batch=1, renormalise=True)
    with pytest.raises(ValueError, match=r"logits must have shape \[1, 1, K\], got \[1, 2, 5\]"):
        constrained_beam(lambda codes, parents: torch.zeros(1, 2, 5), trie, 2, batch=1, renormalise=True)
    nan = torch.tensor([[[0, 0, 0, torch.nan, 0]]])
    with pytest.raises(ValueError, match=r"logits\[0, 0, 3\] must be finite or -inf, got nan"):
        constrained_beam(lambda codes, parents: nan, trie, 2, batch=1, renormalise=False)
