"""The five tests of an op; the answer is whole numbers, so everything is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def random_categories(rows, kinds, dtype=torch.int64, seed=0):
    values = torch.randint(kinds, (rows,), generator=torch.Generator().manual_seed(seed)) - 1
    return (values * (2**40 + 1 if dtype == torch.int64 else 2**20 + 1)).to(dtype)


def brute_force(query, keys, offsets, k, candidate_offsets=None):
    candidates = candidate_offsets.tolist() if candidate_offsets is not None else list(range(len(query) + 1))
    starts, out = offsets.tolist(), []
    for user in range(len(starts) - 1):
        history = keys[starts[user] : starts[user + 1]].tolist()
        for category in query[candidates[user] : candidates[user + 1]].tolist():
            same = [position for position, other in enumerate(history) if other == category]
            latest = same[::-1][:k]
            out.append(latest + [-1] * (k - len(latest)))
    return torch.tensor(out, dtype=torch.int64).reshape(len(query), k)


@given(
    users=st.lists(
        st.tuples(st.one_of(st.sampled_from([0, 1, 31, 32, 33, 64, 65]), st.integers(0, 150)), st.integers(0, 4)),
        max_size=5,
    ),
    shared=st.booleans(),
    kinds=st.sampled_from([1, 2, 5, 40]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    k=st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 160)),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=80)
def test_matches_reference(users, shared, kinds, dtype, k, index, isa_levels, poisoned_empty):
    lengths = [length for length, _ in users]
    rows = offsets_of([n for _, n in users]) if shared else None
    query = random_categories(int(rows[-1]) if shared else len(users), kinds, dtype)
    keys = random_categories(sum(lengths), kinds, dtype, seed=1)
    offsets = offsets_of(lengths)
    wanted = brute_force(query, keys, offsets, k, rows)
    assert torch.equal(ops.category_top_k.reference(query, keys, offsets, k, candidate_offsets=rows), wanted)
    for _ in isa_levels():
        given_rows = None if rows is None else rows.to(index)
        assert torch.equal(ops.category_top_k(query, keys, offsets.to(index), k, candidate_offsets=given_rows), wanted)


def test_known_values(isa_levels):
    keys = torch.tensor([7, 3, 7, 7, 3, 9])
    query, rows = torch.tensor([7, 3, 4, 7]), torch.tensor([0, 3, 4])
    for _ in isa_levels():
        found = ops.category_top_k(query, keys, torch.tensor([0, 6, 6]), 2, candidate_offsets=rows)
        assert found.tolist() == [[3, 2], [4, 1], [-1, -1], [-1, -1]]


def test_an_op_without_gradient():
    assert not ops.category_top_k(torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([0, 2]), 3).requires_grad


def test_opcheck(opcheck):
    opcheck(REGISTRY["category_top_k"])


def test_compiles_in_one_graph():
    arguments = (random_categories(3, 4), random_categories(40, 4, seed=1), offsets_of([8, 0, 32]), 5)
    compiled = torch.compile(ops.category_top_k, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.category_top_k(*arguments))


def test_padded_and_strided_equal_jagged(isa_levels):
    lengths = [3, 0, 70, 5]
    query, keys = random_categories(7, 3), random_categories(78, 3, seed=1)
    offsets, rows = offsets_of(lengths), offsets_of([2, 1, 3, 1])
    store = random_categories(4 * 90, 3, seed=2).view(4, 90)
    for b, length in enumerate(lengths):
        store[b, :length] = keys[offsets[b] : offsets[b + 1]]
    columns = torch.stack([random_categories(78, 3, seed=3), keys], 1)  # one column of several features
    spread = torch.stack([query, query + 1], 1)
    for _ in isa_levels():
        wanted = ops.category_top_k(query, keys, offsets, 6, candidate_offsets=rows)
        assert torch.equal(ops.category_top_k(spread[:, 0], columns[:, 1], offsets, 6, candidate_offsets=rows), wanted)
        for padded in (store[:, :70], store, store.t().contiguous().t()):
            found = ops.category_top_k(query, padded, torch.tensor(lengths), 6, candidate_offsets=rows)
            assert torch.equal(found, wanted)


def test_neither_batch_mates_nor_threads():
    query, keys = random_categories(150, 6), random_categories(500, 6, seed=1)
    offsets, rows = offsets_of([400, 0, 60, 40]), offsets_of([100, 20, 0, 30])
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(ops.category_top_k(query, keys, offsets, 30, candidate_offsets=rows))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    users = torch.arange(4).repeat_interleave(rows.diff())
    for c, user in enumerate(users.tolist()):
        history = keys[offsets[user] : offsets[user + 1]]
        alone = ops.category_top_k(query[c : c + 1], history, offsets_of([len(history)]), 30)
        assert torch.equal(alone[0], answers[0][c])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"query_categories": torch.zeros(2)}, TypeError, "query_categories must be int32 or int64, got float32"),
        ({"query_categories": torch.zeros(2, 1).long()}, ValueError, r"query_categories must have shape \[Nc\]"),
        ({"key_categories": torch.zeros(9).int()}, TypeError, "key_categories must be int64, got int32"),
        ({"query_categories": torch.zeros(3).long()}, ValueError, r"one row a user \(2\)"),
        ({"k": -1}, ValueError, "category_top_k: k must be at least 0, got -1"),
        ({"offsets": torch.tensor([0, 4, 8])}, ValueError, r"offsets\[-1\] must be 9"),
        ({"candidate_offsets": torch.tensor([0, 1, 3])}, ValueError, r"candidate_offsets\[-1\] must be 2"),
        (
            {"key_categories": torch.zeros(2, 4).long(), "offsets": torch.tensor([3, 5])},
            IndexError,
            r"lengths\[1\] = 5 is outside \[0, 5\)",
        ),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    named = {
        "query_categories": torch.zeros(2).long(),
        "key_categories": torch.zeros(9).long(),
        "offsets": torch.tensor([0, 4, 9]),
        "k": 2,
        **change,
    }
    with pytest.raises(error, match=sentence):
        ops.category_top_k(**named)
