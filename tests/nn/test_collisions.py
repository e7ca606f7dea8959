import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast.nn import Assignment, resolve_collisions


def problem(items, books, entries, seed):
    random = np.random.default_rng(seed)
    return random.integers(entries, size=(items, books)), random.random((items, entries))


def test_known_digits():
    codes = torch.tensor([[1, 2], [0, 0], [1, 2], [1, 2], [0, 0]], dtype=torch.uint8)
    resolved = resolve_collisions(codes, "digit", n_codes=4)
    assert resolved.codes.tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [1, 2, 2], [0, 0, 1]]
    assert resolved.codes.dtype == torch.uint16
    assert resolved.n_codes == (4, 4, 3)
    assert resolved.report == {
        "method": "digit",
        "items": 5,
        "colliding_items": 5,
        "largest_group": 3,
        "moved": 0,
        "left": 0,
    }


def test_known_balance():
    """Two items want code 0; the one that loses less moves, to its next best."""
    codes = np.array([[7, 0], [7, 0], [7, 3], [5, 1]])
    distances = np.array([[0.0, 9.0, 9.0, 1.0], [0.0, 2.0, 3.0, 1.0]])
    resolved = resolve_collisions(codes, "sinkhorn", n_codes=8, distances=lambda rows: _wide(distances[rows]))
    # Code 3 is another's, so the second item takes code 1.
    assert resolved.codes.tolist() == [[7, 0], [7, 1], [7, 3], [5, 1]]
    assert (resolved.report["moved"], resolved.report["left"]) == (1, 0)


def _wide(distances):
    return np.pad(distances, ((0, 0), (0, 4)), constant_values=50.0)


@settings(max_examples=60, deadline=None)
@given(
    items=st.integers(0, 60),
    books=st.integers(1, 3),
    entries=st.sampled_from([1, 2, 5, 64]),
    first=st.integers(0, 60),
    seed=st.integers(0, 10**6),
)
def test_unique_where_there_is_room(items, books, entries, first, seed):
    codes, distances = problem(items, books, entries, seed)
    digits = resolve_collisions(codes, "digit", n_codes=entries)
    assert len(np.unique(digits.codes.numpy(), axis=0)) == items
    assert np.array_equal(digits.codes.numpy()[:, :books], codes)
    moved = resolve_collisions(codes, "sinkhorn", n_codes=entries, distances=lambda rows: distances[rows])
    got = moved.codes.numpy().astype(np.int64)
    assert np.array_equal(got[:, :-1], codes[:, :-1])
    sizes = np.unique(codes[:, :-1], axis=0, return_counts=True)[1]
    # As many of a prefix are unique as it has codes.
    assert len(np.unique(got, axis=0)) == np.minimum(sizes, entries).sum() if items else True
    assert (moved.report["left"] == 0) == bool((sizes <= entries).all())
    # The same again, in two parts: the first part's codes stand, and nothing is shared that need not be.
    split = min(first, items)
    for method in ("digit", "sinkhorn"):
        assignment = Assignment(books, entries, method)
        old = assignment.add(codes[:split], lambda rows: distances[rows])
        assignment.add(codes[split:], lambda rows: distances[split:][rows])
        assert torch.equal(assignment.codes[:split], old.int())
        unique = items if method == "digit" else int(np.minimum(sizes, entries).sum())
        assert assignment.report()["unique_codes"] == (unique if items else 0)


def test_balance_is_near_the_best():
    """Against the optimal assignment: total distance within a tenth of it, and far below that of a random one."""
    optimize = pytest.importorskip("scipy.optimize")
    codes, distances = problem(40, 1, 64, 0)
    codes[:] = 3
    resolved = resolve_collisions(codes, "sinkhorn", n_codes=64, distances=lambda rows: distances[rows])
    chosen = resolved.codes.numpy()[:, 0]
    assert len(set(chosen.tolist())) == 40
    rows, best = optimize.linear_sum_assignment(distances)
    assert distances[np.arange(40), chosen].sum() <= 1.1 * distances[rows, best].sum()


def test_equal_items_and_forbidden_codes():
    codes = np.zeros((6, 2), dtype=np.int64)
    distances = np.tile([0.0, 1.0, 2.0, np.inf, 3.0], (6, 1))
    resolved = resolve_collisions(codes, "sinkhorn", n_codes=5, distances=lambda rows: distances[rows])
    # Four codes for six items: the first four get them, the last two keep theirs and are counted.
    assert sorted(resolved.codes[:4, 1].tolist()) == [0, 1, 2, 4]
    assert resolved.codes[4:].tolist() == [[0, 0], [0, 0]]
    assert resolved.report["left"] == 3


def test_large_groups_are_quick():
    codes = np.zeros((256, 3), dtype=np.int64)
    resolved = resolve_collisions(codes, "sinkhorn", distances=lambda rows: np.zeros((len(rows), 256)))
    assert sorted(resolved.codes[:, 2].tolist()) == list(range(256))


def test_none_only_counts():
    codes = torch.tensor([[1, 2], [1, 2], [0, 1]], dtype=torch.uint8)
    resolved = resolve_collisions(codes, "none", n_codes=4)
    assert torch.equal(resolved.codes, codes)
    assert (resolved.report["colliding_items"], resolved.report["left"]) == (2, 2)


def test_codes_of_two_bytes_in_order():
    """Codes with zero bytes at either end are told apart, new and old."""
    codes = np.array([[0, 256], [256, 0], [1, 0], [0, 1], [0, 0], [0, 256]])
    assignment = Assignment(2, 65536, "digit")
    assert assignment.add(codes[:5])[:, 2].tolist() == [0] * 5
    assert assignment.add(codes[5:])[:, 2].tolist() == [1]


def test_state_of_an_empty_assignment_fits_any_method():
    again = Assignment(2, 8, "sinkhorn")
    again.load_state_dict(Assignment(2, 8, "digit").state_dict())
    assert len(again) == 0
    full = Assignment(2, 8, "digit")
    full.add(np.array([[1, 2]]))
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        again.load_state_dict(full.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda c: resolve_collisions(c, "luck"),
            ValueError,
            "method must be one of digit, sinkhorn, none, got 'luck'",
        ),
        (lambda c: resolve_collisions(c, "sinkhorn"), ValueError, "distances must be given for the method 'sinkhorn'"),
        (lambda c: resolve_collisions(c.float()), TypeError, "codes must be integers, got float32"),
        (lambda c: resolve_collisions(c[0]), ValueError, r"codes must have shape \[N, M\], got \[2\]"),
        (lambda c: resolve_collisions(c, n_codes=2), IndexError, r"codes\[0, 0\] = 3 is outside \[0, 2\)"),
        (lambda c: resolve_collisions(c.tolist()), TypeError, "codes must be a tensor or a numpy array, got list"),
        (
            lambda c: resolve_collisions(c, "sinkhorn", n_codes=4, distances=lambda rows: np.zeros((1, 4))),
            ValueError,
            r"distances must have shape \[2, 4\], got \[1, 4\]",
        ),
        (lambda c: resolve_collisions(c, epsilon=0), ValueError, "epsilon must be positive"),
        (
            lambda c: resolve_collisions(np.zeros((65537, 1), dtype=np.int64)),
            ValueError,
            r"codes\[65536\] is shared by 65537 items, more than a digit can tell",
        ),
        (lambda c: Assignment(3, 4).add(c), ValueError, r"codes must have shape \[N, 3\], got \[2, 2\]"),
    ],
)
def test_rejects_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.tensor([[3, 1], [3, 1]]))


@pytest.mark.parametrize("first", [0, 3])
def test_more_equal_items_than_codes_are_not_looked_at(first):
    """Of many equal items only as many as there are codes left take part: the others keep theirs."""
    asked = []

    def distances(rows):
        asked.append(len(rows))
        return np.tile(np.arange(8.0), (len(rows), 1))

    assignment = Assignment(2, 8, "sinkhorn")
    assignment.add(np.zeros((first, 2), dtype=np.int64), distances)
    asked.clear()
    codes = assignment.add(np.zeros((100_000, 2), dtype=np.int64), distances).numpy()
    assert sum(asked) == 8 - first
    # Nothing is left for those after them.
    assignment.add(np.zeros((10, 2), dtype=np.int64), distances)
    assert sum(asked) == 8 - first
    assert len(np.unique(codes[: 8 - first, 1])) == 8 - first
    assert not codes[8 - first :].any()
    assert assignment.report()["unique_codes"] == 8
