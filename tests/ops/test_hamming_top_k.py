"""The five tests of an op; the answer is whole numbers, so everything is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def random_codes(rows, words, dtype, *, alike=False, seed=0):
    """`alike`: few bits differ, so that distances tie."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 4 if alike else 256, (rows, words), generator=generator).to(dtype)
    if alike:
        return torch.randint(-2, 2, (rows, words), generator=generator) * (2**62 + 5)
    return torch.randint(-(2**63), 2**63 - 1, (rows, words), generator=generator)


def brute_force(query_codes, key_codes, offsets, k, candidate_offsets=None):
    """Python's own integers and its stable sort."""
    width = 8 * query_codes.element_size()
    candidates = candidate_offsets.tolist() if candidate_offsets is not None else list(range(len(query_codes) + 1))
    starts, keys, out = offsets.tolist(), key_codes.tolist(), []
    for user in range(len(starts) - 1):
        history = keys[starts[user] : starts[user + 1]]
        for c in range(candidates[user], candidates[user + 1]):
            asked = query_codes[c].tolist()

            def distance(position, history=history, asked=asked):
                pairs = zip(asked, history[position], strict=True)
                return sum(((a ^ b) % 2**width).bit_count() for a, b in pairs)

            latest_first = range(len(history) - 1, -1, -1)
            found = sorted(latest_first, key=distance)[:k]
            out.append(found + [-1] * (k - len(found)))
    return torch.tensor(out, dtype=torch.int64).reshape(len(query_codes), k)


@given(
    users=st.lists(
        st.tuples(st.one_of(st.sampled_from([0, 1, 2, 16, 31, 32, 33, 64]), st.integers(0, 120)), st.integers(0, 4)),
        max_size=5,
    ),
    shared=st.booleans(),
    words=st.sampled_from([1, 2, 3, 5, 8, 9]),
    dtype=st.sampled_from([torch.uint8, torch.int64]),
    alike=st.booleans(),
    k=st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 150)),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=80)
def test_matches_reference(users, shared, words, dtype, alike, k, index, isa_levels, poisoned_empty):
    lengths = [length for length, _ in users]
    rows = offsets_of([n for _, n in users]) if shared else None
    query = random_codes(int(rows[-1]) if shared else len(users), words, dtype, alike=alike)
    keys = random_codes(sum(lengths), words, dtype, alike=alike, seed=1)
    offsets = offsets_of(lengths)
    wanted = brute_force(query, keys, offsets, k, rows)
    assert torch.equal(ops.hamming_top_k.reference(query, keys, offsets, k, candidate_offsets=rows), wanted)
    for _ in isa_levels():
        given_rows = None if rows is None else rows.to(index)
        assert torch.equal(ops.hamming_top_k(query, keys, offsets.to(index), k, candidate_offsets=given_rows), wanted)


def test_known_values(isa_levels):
    query = torch.tensor([[0b1011], [-1], [0]])
    keys = torch.tensor([[0b1011], [0b0011], [0b1010], [-1], [0b1111]])
    offsets, rows = torch.tensor([0, 5, 5]), torch.tensor([0, 2, 3])
    for _ in isa_levels():
        found = ops.hamming_top_k(query, keys, offsets, 4, candidate_offsets=rows)
        # Distances of the first: 0, 1, 1, 61, 1; of the second: 61, 62, 62, 0, 60.
        assert found.tolist() == [[0, 4, 2, 1], [3, 4, 0, 2], [-1, -1, -1, -1]]


def test_an_op_without_gradient():
    x = torch.randn(6, 4, requires_grad=True)
    codes = ops.simhash(x, torch.randn(4, 1, 16))
    assert not ops.hamming_top_k(codes[:1], codes, torch.tensor([0, 6]), 3).requires_grad


def test_opcheck(opcheck):
    opcheck(REGISTRY["hamming_top_k"])


def test_compiles_in_one_graph():
    query, keys, offsets = random_codes(3, 1, torch.int64), random_codes(20, 1, torch.int64), offsets_of([8, 0, 12])
    compiled = torch.compile(ops.hamming_top_k, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, keys, offsets, 5), ops.hamming_top_k(query, keys, offsets, 5))


@pytest.mark.parametrize("words", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_padded_and_strided_equal_jagged(words, dtype, isa_levels):
    lengths = [3, 0, 70, 5]
    query, keys = random_codes(7, words, dtype), random_codes(78, words, dtype, seed=1)
    offsets, rows = offsets_of(lengths), offsets_of([2, 1, 3, 1])
    store = random_codes(4 * 90 * (words + 3), 1, dtype, seed=2).view(4, 90, words + 3)
    for b, length in enumerate(lengths):
        store[b, :length, 2 : 2 + words] = keys[offsets[b] : offsets[b + 1]]
    wide = random_codes(78, words + 4, dtype, seed=3)
    wide[:, 1 : 1 + words] = keys
    for _ in isa_levels():
        wanted = ops.hamming_top_k(query, keys, offsets, 6, candidate_offsets=rows)
        assert torch.equal(ops.hamming_top_k(query, wide[:, 1 : 1 + words], offsets, 6, candidate_offsets=rows), wanted)
        for padded in (store[:, :70, 2 : 2 + words], store[..., 2 : 2 + words], store[..., 2 : 2 + words].contiguous()):
            found = ops.hamming_top_k(query, padded, torch.tensor(lengths), 6, candidate_offsets=rows)
            assert torch.equal(found, wanted)


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows 2^31 bytes apart, in memory that is mostly never touched."""
    step = 2**31 + 8
    try:
        store = torch.from_numpy(np.zeros(step * len(rows), dtype=np.uint8))
    except MemoryError:
        pytest.skip("this machine does not lend so much address space")
    spread = store.as_strided(rows.shape, (step, 1))
    spread.copy_(rows)
    return spread


def test_addresses_beyond_32_bits():
    query, keys = random_codes(2, 3, torch.uint8), random_codes(4, 3, torch.uint8, seed=1)
    offsets = torch.tensor([0, 1, 4])
    assert torch.equal(
        ops.hamming_top_k(far_apart(query), far_apart(keys), offsets, 3), ops.hamming_top_k(query, keys, offsets, 3)
    )


@pytest.mark.parametrize("words", [1, 2])
def test_neither_batch_mates_nor_threads(words):
    query, keys = random_codes(150, words, torch.int64, alike=True), random_codes(500, words, torch.int64, alike=True)
    offsets, rows = offsets_of([400, 0, 60, 40]), offsets_of([100, 20, 0, 30])
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(ops.hamming_top_k(query, keys, offsets, 30, candidate_offsets=rows))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    users = torch.arange(4).repeat_interleave(rows.diff())
    for c, user in enumerate(users.tolist()):
        history = keys[offsets[user] : offsets[user + 1]]
        alone = ops.hamming_top_k(query[c : c + 1], history, offsets_of([len(history)]), 30)
        assert torch.equal(alone[0], answers[0][c])


def test_many_words():
    """More than 255 bits, so that a distance is no byte; and the most that is allowed."""
    for words in (5, 1023):
        query, keys = random_codes(2, words, torch.int64), random_codes(40, words, torch.int64, seed=1)
        keys[3], keys[9] = ~query[0], query[0]
        wanted = brute_force(query, keys, torch.tensor([0, 40]), 40, torch.tensor([0, 2]))
        found = ops.hamming_top_k(query, keys, torch.tensor([0, 40]), 40, candidate_offsets=torch.tensor([0, 2]))
        assert torch.equal(found, wanted)
        assert found[0, 0] == 9
        assert found[0, -1] == 3


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"query_codes": torch.zeros(2, 3)}, TypeError, "query_codes must be uint8 or int64, got float32"),
        ({"query_codes": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"key_codes must have shape \[T, 2\]"),
        ({"key_codes": torch.zeros(9, 3, dtype=torch.uint8)}, TypeError, "key_codes must be int64, got uint8"),
        ({"query_codes": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, r"one row a user \(2\)"),
        ({"query_codes": torch.zeros(2, 1024, dtype=torch.int64)}, ValueError, "fewer than 65536 bits"),
        ({"k": -1}, ValueError, "hamming_top_k: k must be at least 0, got -1"),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, r"offsets\[-1\] must be 9"),
        ({"candidate_offsets": torch.tensor([0, 1, 3])}, ValueError, r"candidate_offsets\[-1\] must be 2"),
        (
            {"key_codes": torch.zeros(2, 4, 3, dtype=torch.int64), "offsets": torch.tensor([3, 5])},
            IndexError,
            r"lengths\[1\] = 5 is outside \[0, 5\)",
        ),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    named = {
        "query_codes": torch.zeros(2, 3, dtype=torch.int64),
        "key_codes": torch.zeros(9, 3, dtype=torch.int64),
        "offsets": torch.tensor([0, 4, 9]),
        "k": 2,
        **change,
    }
    with pytest.raises(error, match=sentence):
        ops.hamming_top_k(**named)
