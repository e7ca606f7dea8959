"""hamming_top_k against torch (xor, bits by lookup, topk), faiss's search over binary codes, and a read of the codes.

A unit of work is one candidate. The limit adds up the 64-bit codes as often as candidates read them.
"""

import pytest
import torch

from recfast import ops

# Users, history, candidates, words of 64 bits.
SHAPES = [(64, 1000, 1, 1), (16, 1000, 20, 1), (4, 10_000, 20, 1), (16, 1000, 20, 2)]
K = 50
_BITS = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def in_torch(query, keys):
    """[B, C, W], [B, L, W] -> positions [B, C, K]; ties as torch.topk leaves them."""
    differ = query.unsqueeze(2) ^ keys.unsqueeze(1)
    distance = _BITS[differ.view(torch.uint8).int()].sum(-1, dtype=torch.int32)
    return distance.topk(K, largest=False).indices


@pytest.mark.parametrize(("users", "length", "candidates", "words"), SHAPES)
def test_hamming_top_k(race, threads, users, length, candidates, words):
    torch.manual_seed(0)
    query = torch.randint(-(2**63), 2**63 - 1, (users, candidates, words))
    keys = torch.randint(-(2**63), 2**63 - 1, (users, length, words))
    flat_query, flat_keys = query.flatten(0, 1), keys.flatten(0, 1)
    offsets, rows = torch.arange(users + 1) * length, torch.arange(users + 1) * candidates

    def ours():
        found = ops.hamming_top_k(flat_query, flat_keys, offsets, K, candidate_offsets=rows)
        return found.view(users, candidates, K)

    def distances(positions):
        user = torch.arange(users).view(-1, 1, 1)
        differ = (keys[user, positions] ^ query.unsqueeze(2)).contiguous()
        return _BITS[differ.view(torch.uint8).int()].sum(-1, dtype=torch.int32).sort(-1).values

    wanted = distances(in_torch(query, keys))

    def check(answer, column):
        assert torch.equal(distances(answer), wanted), column  # which of equal ones is for each to say

    ways = {"ours": ours, "torch": lambda: in_torch(query, keys)}
    try:
        import faiss
    except ImportError:
        pass
    else:
        faiss.omp_set_num_threads(threads)
        asked, held = query.view(torch.uint8).numpy(), keys.view(torch.uint8).numpy()

        def by_faiss():
            found = [torch.from_numpy(faiss.knn_hamming(asked[u], held[u], K)[1]) for u in range(users)]
            return torch.stack(found)

        ways["rival: faiss"] = by_faiss
    ways["limit"] = lambda: [keys.sum() for _ in range(candidates)]
    race(
        "hamming_top_k", f"B={users} L={length} C={candidates} bits={64 * words}", users * candidates, ways, check=check
    )


def test_category_top_k(race):
    """The latest 50 of one category in a hundred; torch compares, keeps the latest by topk over positions."""
    torch.manual_seed(0)
    users, length, candidates = 16, 1000, 20
    query, keys = torch.randint(100, (users, candidates)), torch.randint(100, (users, length))
    offsets, rows = torch.arange(users + 1) * length, torch.arange(users + 1) * candidates
    position = torch.arange(length)

    def in_torch_form():
        same = query.unsqueeze(2) == keys.unsqueeze(1)
        return torch.where(same, position, -1).topk(K).values

    def ours():
        found = ops.category_top_k(query.flatten(), keys.flatten(), offsets, K, candidate_offsets=rows)
        return found.view(users, candidates, K)

    wanted = in_torch_form()

    def check(answer, column):
        assert torch.equal(answer, wanted), column

    ways = {"ours": ours, "torch": in_torch_form, "limit": lambda: [keys.sum() for _ in range(candidates)]}
    race("category_top_k", f"B={users} L={length} C={candidates}", users * candidates, ways, check=check)
