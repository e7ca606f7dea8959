"""The five tests of `code_trie_step` (no gradient: the third says what happens to logits that ask for one)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recfast import ops
from recfast.index import CodeTrie
from recfast.ops._library import REGISTRY

F = np.float32


def fma(a, b, c):
    """a b + c rounded to float32; in between exact but for what 64 bits of a long double leave out."""
    return np.asarray(np.longdouble(a) * np.longdouble(b) + np.longdouble(c), dtype=F)


def exponential(x):
    """The kernel's own, each operation rounded to float32 as there."""
    x = np.maximum(x.astype(F), F(-87))
    n = fma(x, F(1.44269504088896341), F(12582912)) - F(12582912)
    r = fma(n, F(2.12194440e-4), fma(n, F(-0.693359375), x))
    y = F(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = fma(y, r, F(c))
    return np.ldexp(fma(y, r * r, r) + F(1), n.astype(np.int32)).astype(F)


def normaliser(x):
    largest = x.max(initial=-np.inf)
    if largest == -np.inf:
        return F(np.inf)
    padded = np.full(-(-len(x) // 16) * 16, -np.inf, dtype=F)
    padded[: len(x)] = x
    sums = np.zeros(16, dtype=F)
    for part in exponential(padded - largest).reshape(-1, 16):
        sums = sums + part
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return F(np.float64(largest) + np.log(np.float64(sums[0])))


def oracle(trie, states, logits, scores, width, renormalise):
    """Every candidate, then a full sort by (score descending, parent, code)."""
    out = []
    for row in range(len(states)):
        found = []
        for beam, state in enumerate(states[row].tolist()):
            if state < 0 or scores[row, beam] == -torch.inf:
                continue
            nodes, codes = trie.children(state)
            x = logits[row, beam].float().numpy()
            z = normaliser(x[codes.numpy()] if renormalise else x)
            for node, code in zip(nodes.tolist(), codes.tolist(), strict=True):
                total = F(scores[row, beam]) + (x[code] - z)
                if total > -np.inf:
                    found.append((-total, beam, code, node))
        found = sorted(found)[:width]
        found += [(np.inf, 0, 0, -1)] * (width - len(found))
        out.append([(node, code, F(-total), beam) for total, beam, code, node in found])
    parts = list(zip(*[zip(*row, strict=True) for row in out], strict=True)) if out and width else [[], [], [], []]
    kinds = (np.int64, np.int64, F, np.int64)
    return [np.array(part, dtype=kind).reshape(len(states), width) for part, kind in zip(parts, kinds, strict=True)]


def equal_bits(step, wanted):
    for name, have, want in zip(step._fields, step, wanted, strict=True):
        if want.dtype == F:
            np.testing.assert_array_equal(have.numpy().view(np.int32), want.view(np.int32), err_msg=name)
        else:
            np.testing.assert_array_equal(have.numpy(), want, err_msg=name)


@given(
    seed=st.integers(0, 2**32 - 1),
    n_items=st.sampled_from([0, 1, 2, 40, 3000]),
    n_codes=st.sampled_from([1, 2, 15, 16, 17, 64, 300]),
    batch=st.integers(0, 3),
    beams=st.integers(0, 5),
    width=st.sampled_from([0, 1, 3, 40, 2000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    values=st.sampled_from(["normal", "few", "equal", "wide", "impossible"]),
    extra=st.sampled_from([0, 5]),
    renormalise=st.booleans(),
)
def test_matches_reference(
    seed, n_items, n_codes, batch, beams, width, dtype, values, extra, renormalise, isa_levels, poisoned_empty
):
    random = np.random.default_rng(seed)
    trie = CodeTrie.from_codes(random.integers(0, n_codes, (n_items, 2)), n_codes)
    inner = len(trie.first_child) - 1
    states = torch.from_numpy(random.integers(-1, inner, (batch, beams)))
    logits = random.standard_normal((batch, beams, n_codes + extra))
    scores = random.standard_normal((batch, beams))
    if values == "few":
        logits, scores = random.integers(0, 2, logits.shape), random.integers(0, 2, scores.shape)
    elif values == "equal":
        logits, scores = np.zeros(logits.shape), np.zeros(scores.shape)
    elif values == "wide":
        logits = logits * 100
    elif values == "impossible":
        logits[random.random(logits.shape) < 0.5] = -np.inf
        scores[random.random(scores.shape) < 0.3] = -np.inf
    logits, scores = torch.from_numpy(logits).to(dtype), torch.from_numpy(scores).float()
    wanted = oracle(trie, states, logits, scores, width, renormalise)
    plain = ops.code_trie_step.reference(trie, states, logits, scores, width, renormalise=renormalise)
    torch.testing.assert_close(plain.scores, torch.from_numpy(wanted[2]), rtol=1e-5, atol=1e-5)
    for _ in isa_levels():
        equal_bits(ops.code_trie_step(trie, states, logits, scores, width, renormalise=renormalise), wanted)


# Root -> codes 1 and 4; below 1 the codes 0 and 2, below 4 the code 3.
TRIE = CodeTrie.from_codes(np.array([[1, 0], [4, 3], [1, 2]]), 5)


def test_known_values():
    assert TRIE.first_child.tolist() == [1, 3, 5, 6]
    assert TRIE.node_codes.tolist() == [0, 1, 4, 0, 2, 3]
    probabilities = torch.tensor([[[0.5, 0.125, 0.125, 0.125, 0.125], [0.2, 0.2, 0.2, 0.2, 0.2]]])
    states, scores = torch.tensor([[1, 2]]), torch.tensor([[0.25, 0.5]]).log()
    step = ops.code_trie_step(TRIE, states, probabilities.log(), scores, 4, renormalise=False)
    assert step.states.tolist() == [[3, 5, 4, -1]]
    assert step.codes.tolist() == [[0, 3, 2, 0]]
    assert step.parents.tolist() == [[0, 1, 0, 0]]
    torch.testing.assert_close(step.scores.exp(), torch.tensor([[0.125, 0.1, 0.03125, 0.0]]))
    step = ops.code_trie_step(TRIE, states, probabilities.log(), scores, 4, renormalise=True)
    assert step.states.tolist() == [[5, 3, 4, -1]]
    torch.testing.assert_close(step.scores.exp(), torch.tensor([[0.5, 0.2, 0.05, 0.0]]))
    # One beam a batch row may be given without its dimension.
    alone = ops.code_trie_step(TRIE, states[0], probabilities[0].log(), scores[0], 1, renormalise=False)
    assert alone.states.tolist() == [[3], [5]]


def test_zeros_of_both_signs_are_a_tie(isa_levels):
    chain = ops.TrieArrays(torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.uint8))
    zeros = torch.tensor([[-0.0, 0.0, -0.0]])
    for _ in isa_levels():
        for width in (1, 2, 3):
            step = ops.code_trie_step(
                chain, torch.zeros(1, 3, dtype=torch.int64), zeros[..., None], zeros, width, renormalise=False
            )
            assert step.parents.tolist() == [list(range(width))]


def test_gradient_is_cut():
    """Inference only: logits that require a gradient are detached, and the answer asks for none."""
    logits = torch.zeros(1, 1, 5, requires_grad=True)
    step = ops.code_trie_step(TRIE, torch.tensor([[0]]), logits, torch.zeros(1, 1), 2, renormalise=True)
    assert not step.scores.requires_grad


def test_opcheck(opcheck):
    opcheck(REGISTRY["code_trie_step"])


STATES, LOGITS, SCORES = torch.tensor([[0, 1]]), torch.zeros(1, 2, 5), torch.zeros(1, 2)


def with_value(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"trie": STATES}, TypeError, "trie must have attributes first_child, node_codes, got Tensor without first"),
        ({"states": STATES.int()}, TypeError, "states must be int64, got int32"),
        ({"states": STATES[None]}, ValueError, r"states must have shape \[B, W\], got \[1, 1, 2\]"),
        (
            {"states": torch.tensor([[0, 3]])},
            IndexError,
            r"states\[0, 1\] = 3 is outside \[-1, 3\), nodes above leaves",
        ),
        ({"states": torch.tensor([[-2, 0]])}, IndexError, r"states\[0, 0\] = -2 is outside \[-1, 3\)"),
        ({"logits": LOGITS.double()}, TypeError, "logits must be float32 or bfloat16, got float64"),
        ({"logits": LOGITS[:, :1]}, ValueError, r"logits must have shape \[1, 2, K\], got \[1, 1, 5\]"),
        ({"logits": LOGITS[..., :4]}, ValueError, "a column for each code, got 4 for node 0, which goes on by code 4"),
        ({"logits": with_value(LOGITS, (0, 1, 2), torch.nan)}, ValueError, r"logits\[0, 1, 2\] must be .* got nan"),
        ({"logits": with_value(LOGITS, (0, 1, 2), torch.inf)}, ValueError, r"logits\[0, 1, 2\] must be .* got inf"),
        ({"scores": SCORES[:, :1]}, ValueError, r"scores must have shape \[1, 2\], got \[1, 1\]"),
        (
            {"scores": with_value(SCORES, (0, 1), torch.nan)},
            ValueError,
            r"scores\[0, 1\] must be finite or -inf, got nan",
        ),
        ({"width": -1}, ValueError, "width must be at least 0, got -1"),
    ],
)
@pytest.mark.parametrize("renormalise", [False, True])
def test_rejects_bad_input(change, error, sentence, renormalise):
    arguments = {"trie": TRIE, "states": STATES, "logits": LOGITS, "scores": SCORES, "width": 2, **change}
    with pytest.raises(error, match=sentence):
        ops.code_trie_step(*arguments.values(), renormalise=renormalise)


def test_what_is_not_read_may_be_anything():
    logits = with_value(LOGITS, (0, 0), torch.nan)
    dead = ops.code_trie_step(TRIE, torch.tensor([[-1, 1]]), logits, SCORES, 2, renormalise=False)
    assert dead.parents.tolist() == [[1, 1]]
    logits = with_value(LOGITS, (0, 1, 1), torch.nan)
    step = ops.code_trie_step(TRIE, STATES, logits, SCORES, 9, renormalise=True)
    assert sorted(step.states[0, :4].tolist()) == [1, 2, 3, 4]


def test_same_for_any_width_batch_and_threads():
    random = np.random.default_rng(0)
    trie = CodeTrie.from_codes(random.integers(0, 64, (20_000, 3)), 64)
    states = torch.from_numpy(random.integers(-1, len(trie.first_child) - 1, (7, 50)))
    logits, scores = torch.from_numpy(random.integers(0, 4, (7, 50, 64))).float(), torch.zeros(7, 50)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = ops.code_trie_step(trie, states, logits, scores, 300, renormalise=False)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for width in (1, 10, 300):
                step = ops.code_trie_step(trie, states, logits, scores, width, renormalise=False)
                assert all(torch.equal(one, other[:, :width]) for one, other in zip(step, whole, strict=True))
        for row in range(7):
            part = slice(row, row + 1)
            step = ops.code_trie_step(trie, states[part], logits[part], scores[part], 300, renormalise=False)
            assert all(torch.equal(one, other[part]) for one, other in zip(step, whole, strict=True))
    finally:
        torch.set_num_threads(before)
