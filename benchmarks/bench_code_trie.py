"""code_trie_step against a dictionary of prefixes, a gather of bitmaps and a binary search.

A million items of 4 codes of 256, random; 800 beams, which are what a search over random logits arrives at. Level 1 has
256 nodes of 256 children, level 2 65,536 of about 15, level 3 a million of about 1. The unit of work is one beam.

`rival: dict` is what generation libraries do: one dictionary look-up and one masked row a beam, then torch's
log-softmax and top-k. Its dictionary has only the prefixes of this step's beams, so that it is as fast as it can be.
"""

import numpy as np
import pytest
import torch

from recfast import ops
from recfast.index import CodeTrie

N, M, K = 1_000_000, 4, 256


@pytest.fixture(scope="module")
def trie():
    codes = np.random.default_rng(0).integers(0, K, (N, M)).astype(np.uint8)
    return CodeTrie.from_codes(codes, K)


@pytest.fixture(scope="module")
def bitmaps(trie):
    """Which codes go on from each node above the leaves, 32 bytes a node."""
    nodes = np.repeat(np.arange(len(trie.first_child) - 1), trie.first_child.diff().numpy())
    codes = trie.node_codes.numpy()[1:].astype(np.int64)
    bits = np.zeros((len(trie.first_child) - 1, K // 8), np.uint8)
    np.bitwise_or.at(bits, (nodes, codes // 8), (1 << codes % 8).astype(np.uint8))
    return torch.from_numpy(bits)


@pytest.fixture(scope="module")
def keys(trie):
    """Node and code of every edge, rising."""
    nodes = torch.arange(len(trie.first_child) - 1).repeat_interleave(trie.first_child.diff().long())
    return nodes * K + trie.node_codes[1:].long()


def beams_at(trie, level, batch, width):
    """States, scores and codes of beams that have come so far, and the next logits."""
    random = torch.Generator().manual_seed(level)
    states, scores = torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, 1)
    codes = torch.zeros(batch, 1, 0, dtype=torch.int64)
    for _ in range(level):
        logits = torch.randn(*states.shape, K, generator=random)
        states, chosen, scores, parents = ops.code_trie_step(trie, states, logits, scores, width, renormalise=False)
        codes = torch.cat([codes[torch.arange(batch)[:, None], parents], chosen[..., None]], 2)
    # Few beams come of a few candidates: the same ones again, so that there are always as many.
    alive = int((states >= 0).sum(1).min())
    again = torch.arange(width) % alive
    states, scores, codes = states[:, again], scores[:, again], codes[:, again]
    return states, scores, codes, torch.randn(batch, width, K, generator=random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("batch", "width"), [(8, 100), (1, 800)])
def test_code_trie_step(race, trie, bitmaps, keys, batch, width, level, dtype):
    states, scores, codes, logits = beams_at(trie, level, batch, width)
    logits = logits.to(dtype)
    continued = {
        tuple(prefix): trie.children(int(state))[1].tolist()
        for prefix, state in zip(codes.flatten(0, 1).tolist(), states.flatten().tolist(), strict=True)
    }
    shifts = torch.arange(8, dtype=torch.uint8)

    def best(total):
        found, place = total.flatten(1).topk(width, dim=1)
        return found, place // K, place % K

    def log_probabilities():
        return logits.float().log_softmax(-1) + scores[..., None]

    def dictionary():
        mask = torch.full(logits.shape, -torch.inf)
        for b, row in enumerate(codes):
            for w, prefix in enumerate(row):
                mask[b, w, continued[tuple(prefix.tolist())]] = 0
        return best(log_probabilities() + mask)

    def gathered_bits():
        allowed = (bitmaps[states][..., None] >> shifts & 1).flatten(-2).bool()
        return best(log_probabilities().masked_fill(~allowed, -torch.inf))

    def binary_search():
        wanted = (states * K)[..., None] + torch.arange(K)
        at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return best(log_probabilities().masked_fill(keys[at] != wanted, -torch.inf))

    def limit():
        return logits.sum()

    right = ops.code_trie_step.reference(trie, states, logits, scores, width, renormalise=False)

    def check(answer, column):
        found = answer.scores if column == "ours" else answer[0]
        torch.testing.assert_close(found, right.scores, rtol=1e-5, atol=1e-5)

    race(
        "code_trie_step",
        f"B={batch} W={width} level {level} {str(dtype)[6:]}",
        batch * width,
        {
            "ours": lambda: ops.code_trie_step(trie, states, logits, scores, width, renormalise=False),
            "renormalised": lambda: ops.code_trie_step(trie, states, logits, scores, width, renormalise=True),
            "torch": gathered_bits,
            "rival: dict": dictionary,
            "rival: binary search": binary_search,
            "limit": limit,
        },
        check=lambda answer, column: None if column == "renormalised" else check(answer, column),
        settle=True,
    )


def test_build(race):
    codes = np.random.default_rng(0).integers(0, K, (N, M)).astype(np.uint8)
    wide = codes.astype(np.int64)

    def unique():
        return [np.unique(wide[:, : level + 1] @ (K ** np.arange(level, -1, -1))) for level in range(M)]

    trie = CodeTrie.from_codes(codes, K)
    print(f"{trie}: {trie.nbytes / len(trie):.1f} bytes a node, {trie.nbytes / N:.1f} an item")
    race(
        "CodeTrie.from_codes",
        f"N={N} M={M} K={K}",
        N,
        {"ours": lambda: CodeTrie.from_codes(codes, K), "numpy: sort each level": unique},
        seconds=0.1,
    )
