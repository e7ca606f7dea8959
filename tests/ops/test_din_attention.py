"""The five tests of an op, and what a history owes to nobody but itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import ops
from recfast.ops import DINWeights
from recfast.ops._library import REGISTRY

EPS = torch.finfo(torch.float32).eps
ACTIVATIONS = ["prelu", "relu", "sigmoid", "silu"]
MODES = ["sum", "sigmoid", "softmax"]


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def problem(lengths, candidates, dim, value_dim=None, hidden=(6, 3), seed=0, dtype=torch.float32):
    """Arguments of the op; `candidates` None means one a user."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    rows = len(lengths) if candidates is None else sum(candidates)
    first, second = (*hidden, None)[:2]
    weights = DINWeights(
        random(4 * dim, first) / max(dim, 1) ** 0.5,
        random(first),
        None if second is None else random(first, second) / first**0.5,
        None if second is None else random(second),
        random(second or first, 1),
        random(1),
        random(1 if second is None else 2).abs() / 2,
    )
    options = {"candidate_offsets": None if candidates is None else offsets_of(candidates)}
    if value_dim is not None:
        options["values"] = random(sum(lengths), value_dim)
    return (random(rows, dim), random(sum(lengths), dim), offsets_of(lengths), weights), options


def widened(arguments, options):
    def wide(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    query, keys, offsets, weights = arguments
    wide_weights = DINWeights(*map(wide, weights))
    return (wide(query), wide(keys), offsets, wide_weights), {name: wide(x) for name, x in options.items()}


def error_bound(arguments, options, mode):
    """What rounding can do to `out`, followed through the layers: n * eps * sum of |terms|, in float64.

    Every activation here has a slope of at most 1.1, and its own evaluation is good to 8 eps.
    """
    (query, keys, offsets, w), options = widened(arguments, options)
    users = torch.arange(offsets.numel() - 1)
    if options["candidate_offsets"] is not None:
        users = users.repeat_interleave(options["candidate_offsets"].diff())
    values = options.get("values", keys)
    dim = query.shape[1]
    wq, wk, wd, wp = w.w1.abs().chunk(4)
    bounds = []
    for c, user in enumerate(users):
        k = keys[offsets[user] : offsets[user + 1]]
        v = values[offsets[user] : offsets[user + 1]].abs()
        q = query[c]
        terms = k.abs() @ (wk + wd + q.abs().unsqueeze(1) * wp) + q.abs() @ (wq + wd) + w.b1.abs()
        size, error = terms, (2 * dim + 6) * EPS * terms
        if w.w2 is not None:
            size, error = 1.1 * size + 1, 1.1 * error + 8 * EPS * (size + 1)
            terms = size @ w.w2.abs() + w.b2.abs()
            error = error @ w.w2.abs() + (w.w1.shape[1] + 2) * EPS * terms
            size = terms
        size, error = 1.1 * size + 1, 1.1 * error + 8 * EPS * (size + 1)
        terms = (size @ w.w3.abs() + w.b3.abs()).squeeze(1)
        error = (error @ w.w3.abs()).squeeze(1) + (w.w3.shape[0] + 3) * EPS * terms
        if mode == "sum":
            weight = terms
        elif mode == "sigmoid":
            weight, error = torch.ones_like(error), error / 4 + 8 * EPS
        else:
            # |dp| <= p (|ds| + max |ds|), and exp(s - lse) loses |s - lse| eps.
            weight = torch.ones_like(error)
            error = 2 * error.amax() + (len(k) + 16 + 4 * terms.amax()) * EPS if len(k) else error
            error = error * torch.ones_like(weight)
        bounds.append((error.unsqueeze(1) * v).sum(0) + (len(k) + 2) * EPS * (weight.unsqueeze(1) * v).sum(0))
    return torch.stack(bounds) if bounds else values.new_zeros(0, values.shape[1])


sizes = st.one_of(st.sampled_from([1, 15, 16, 17, 33]), st.integers(1, 40))


@given(
    users=st.lists(
        st.tuples(st.one_of(st.sampled_from([0, 1, 2, 19, 20, 21, 45]), st.integers(0, 60)), st.integers(0, 4)),
        max_size=6,
    ),
    shared=st.booleans(),
    dim=sizes,
    value_dim=st.one_of(st.none(), sizes),
    hidden=st.one_of(st.tuples(sizes), st.tuples(sizes, sizes), st.sampled_from([(80, 40), (256, 97)])),
    activation=st.sampled_from(ACTIVATIONS),
    mode=st.sampled_from(MODES),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60)
def test_matches_reference(users, shared, dim, value_dim, hidden, activation, mode, index, isa_levels, poisoned_empty):
    lengths = [length for length, _ in users]
    arguments, options = problem(lengths, [n for _, n in users] if shared else None, dim, value_dim, hidden)
    options |= {"activation": activation, "mode": mode}
    wide_arguments, wide_options = widened(arguments, options)
    wanted = ops.din_attention.reference(*wide_arguments, **wide_options)
    bound = error_bound(arguments, options, mode)
    query, keys, offsets, weights = arguments
    answers = []
    for _ in isa_levels():
        answer = ops.din_attention(query, keys, offsets.to(index), weights, **options)
        assert answer.shape == wanted.shape
        assert torch.all((answer.double() - wanted).abs() <= bound)
        answers.append(answer)
    # The two forms with FMA agree bit by bit; the scalar one lies within the bound like they.
    assert all(torch.equal(answer, answers[1]) for answer in answers[2:])


def test_known_values():
    # One hidden unit that sees w1 . [q, k, q - k, q k] = 1 q + 2 k + 3 (q - k) + 4 q k, relu, times 10, plus 1.
    weights = DINWeights(
        torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        torch.tensor([0.5]),
        None,
        None,
        torch.tensor([[10.0]]),
        torch.tensor([1.0]),
    )
    query, keys = torch.tensor([[2.0], [1.0], [5.0]]), torch.tensor([[1.0], [-2.0]])
    options = {"candidate_offsets": torch.tensor([0, 2, 3]), "activation": "relu"}
    offsets = torch.tensor([0, 2, 2])
    # q=2: k=1 gives 2+2+3+8+.5 = 15.5 -> 156; k=-2 gives 2-4+12-16+.5 < 0 -> 1.   156*1 + 1*-2 = 154
    # q=1: k=1 gives 1+2+0+4+.5 = 7.5 -> 76;   k=-2 gives 1-4+9-8+.5 < 0 -> 1.     76*1 + 1*-2 = 74
    assert ops.din_attention(query, keys, offsets, weights, **options).tolist() == [[154.0], [74.0], [0.0]]
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    softmax = ops.din_attention(query, keys, offsets, weights, values=values, mode="softmax", **options)
    # exp(1 - 156) is no float32, exp(1 - 76) is.
    assert softmax.flatten().tolist() == pytest.approx([1.0, 0.0, 1.0, 2.6786370e-33, 0.0, 0.0], rel=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("two", [False, True], ids=["one-layer", "two-layers"])
def test_gradcheck(mode, activation, two):
    hidden = (5, 3) if two else (5,)
    own_values = mode != "sigmoid"
    arguments, options = problem([3, 0, 22, 1], [2, 1, 2, 0], 3, 2 if own_values else None, hidden, 1, torch.float64)
    query, keys, offsets, weights = arguments
    values = options.pop("values", None)
    given_weights = [w for w in weights if w is not None]
    present = [w is not None for w in weights]
    if activation != "prelu":
        given_weights, present = given_weights[:-1], [*present[:-1], False]

    def call(query, keys, *rest):
        rest = list(rest)
        own = rest.pop(0) if values is not None else None
        filled = DINWeights(*(rest.pop(0) if there else None for there in present))
        return ops.din_attention(query, keys, offsets, filled, values=own, activation=activation, mode=mode, **options)

    inputs = [query, keys, *([] if values is None else [values]), *given_weights]
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_gradcheck_every_entry():
    """Once without fast mode, padded keys and all."""
    (query, _, _, weights), _ = problem([3, 2], None, 2, None, (3, 2), 2, torch.float64)
    keys = torch.randn(2, 4, 2, dtype=torch.float64)
    lengths = torch.tensor([3, 2])

    def call(query, keys, *w):
        return ops.din_attention(query, keys, lengths, DINWeights(*w))

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (query, keys, *weights)])


def gradients(arguments, options, form=ops.din_attention):
    query, keys, offsets, weights = arguments
    leaves = [x.detach().clone().requires_grad_() for x in (query, keys, *(w for w in weights if w is not None))]
    rest = iter(leaves[2:])
    weights = DINWeights(*(None if w is None else next(rest) for w in weights))
    values = options.get("values")
    if values is not None:
        leaves.append(values.detach().clone().requires_grad_())
        options = {**options, "values": leaves[-1]}
    out = form(leaves[0], leaves[1], offsets, weights, **options)
    coefficients = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, coefficients, materialize_grads=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(33, 17, (80, 40)), (16, None, (97,)), (5, 3, (130, 7))])
def test_float32_gradients(mode, shape, isa_levels, poisoned_empty):
    """As near to float64 as plain torch in float32 is, within a factor for the order of its sums."""
    dim, value_dim, hidden = shape
    arguments, options = problem([70, 0, 1, 33, 21], [3, 2, 0, 1, 5], dim, value_dim, hidden)
    options |= {"mode": mode, "activation": "silu"}
    exact = gradients(*widened(arguments, options), form=ops.din_attention.reference)
    plain = gradients(arguments, options, form=ops.din_attention.reference)
    for _ in isa_levels():
        for have, torch_has, want in zip(gradients(arguments, options), plain, exact, strict=True):
            ours, theirs = (have - want).norm(), (torch_has - want).norm()
            assert ours <= 8 * theirs + 8 * EPS * want.norm()


def test_opcheck(opcheck):
    opcheck(REGISTRY["din_attention"])
    opcheck(REGISTRY["din_attention_backward"])


def test_compiles_in_one_graph():
    arguments, options = problem([4, 0, 9], None, 4, None)
    compiled = torch.compile(ops.din_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments, **options), ops.din_attention(*arguments, **options))


@pytest.mark.parametrize("mode", MODES)
def test_threads_change_no_bit(mode):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 90, (70,), generator=generator).tolist()
    arguments, options = problem(lengths, None, 24, 10, (31, 19))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(arguments, {**options, "mode": mode})
        torch.set_num_threads(3)
        three = gradients(arguments, {**options, "mode": mode})
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_answer_knows_no_batch_mates(mode, isa_levels):
    (query, keys, offsets, weights), options = problem([23, 40, 7], [2, 3, 1], 17, None, (33, 9))
    for _ in isa_levels():
        together = ops.din_attention(query, keys, offsets, weights, mode=mode, **options)
        users = torch.arange(3).repeat_interleave(options["candidate_offsets"].diff())
        for c, user in enumerate(users):
            history = keys[offsets[user] : offsets[user + 1]]
            alone = ops.din_attention(query[c : c + 1], history, offsets_of([len(history)]), weights, mode=mode)
            assert torch.equal(alone[0], together[c])


@pytest.mark.parametrize("mode", MODES)
def test_order_of_a_history_is_rounding(mode):
    (query, keys, offsets, weights), options = problem([50], [3], 12, 5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    options["mode"] = mode
    plain = ops.din_attention(query, keys, offsets, weights, **options)
    values = options.pop("values")
    mixed = ops.din_attention(query, keys[order], offsets, weights, values=values[order], **options)
    arguments = (query, keys, offsets, weights)
    bound = 2 * error_bound(arguments, {**options, "values": values}, mode)
    assert torch.all((plain - mixed).abs() <= bound)


@pytest.mark.parametrize("mode", MODES)
def test_shared_history_equals_copies(mode):
    (query, keys, offsets, weights), options = problem([9, 0, 31], [2, 1, 4], 8, None)
    shared = gradients((query, keys, offsets, weights), {**options, "mode": mode})
    users = torch.arange(3).repeat_interleave(options["candidate_offsets"].diff())
    copies = torch.cat([keys[offsets[user] : offsets[user + 1]] for user in users])
    lengths = offsets.diff()[users].tolist()
    copied = gradients((query, copies, offsets_of(lengths), weights), {"mode": mode})
    assert torch.equal(shared[0], copied[0])
    assert torch.equal(shared[1], copied[1])
    for a, b in zip(shared[3:], copied[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    back = torch.zeros_like(keys)
    position = torch.cat([torch.arange(offsets[user], offsets[user + 1]) for user in users])
    torch.testing.assert_close(shared[2], back.index_add(0, position, copied[2]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("own_values", [False, True])
def test_padded_equals_jagged(own_values, poisoned_empty):
    lengths = [3, 0, 7, 5]
    (query, keys, offsets, weights), options = problem(lengths, None, 6, 4 if own_values else None)
    store = torch.full((4, 9, 6), float("nan"))
    value_store = torch.full((4, 9, 4), float("nan"))
    for b, length in enumerate(lengths):
        store[b, :length] = keys[offsets[b] : offsets[b + 1]]
        if own_values:
            value_store[b, :length] = options["values"][offsets[b] : offsets[b + 1]]
    jagged = gradients((query, keys, offsets, weights), options)
    # A view of the first 7 columns: not contiguous, and its padding is never read.
    for columns in (7, 9):
        padded_options = {"values": value_store[:, :columns]} if own_values else {}
        padded = gradients((query, store[:, :columns], torch.tensor(lengths), weights), padded_options)
        strided = ops.din_attention(query, store[:, :columns], torch.tensor(lengths), weights, **padded_options)
        assert torch.equal(jagged[0], padded[0])
        assert torch.equal(jagged[0], strided)
        for b, length in enumerate(lengths):
            assert torch.equal(padded[2][b, :length], jagged[2][offsets[b] : offsets[b + 1]])
            assert not padded[2][b, length:].any()
        # The query and every weight; keys (and values) have another shape.
        same = range(1, len(jagged) - own_values)
        assert all(torch.equal(jagged[i], padded[i]) for i in same if i != 2)


def test_strided_rows_are_read_in_place():
    (query, keys, offsets, weights), options = problem([4, 8], None, 5, 3)
    wide_keys, wide_query = torch.randn(12, 11), torch.randn(2, 9)
    wide_keys[:, 2:7], wide_query[:, 1:6] = keys, query
    values = options["values"].t().contiguous().t()  # columns side by side: copied, not misread
    answer = ops.din_attention(wide_query[:, 1:6], wide_keys[:, 2:7], offsets, weights, values=values)
    assert torch.equal(answer, ops.din_attention(query, keys, offsets, weights, values=options["values"]))


def test_nothing_of_candidates_by_history_is_stored():
    """Saved for backward: the arguments and the answer, no matter how many pairs there are."""
    arguments, options = problem([400], [50], 8, None)
    query, keys, offsets, weights = arguments
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ops.din_attention(query.requires_grad_(), keys, offsets, weights, **options)
    inputs = sum(x.numel() for x in (query, keys, offsets, *weights, options["candidate_offsets"]))
    assert 0 < sum(saved) <= inputs + query.numel()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"query": [1.0]}, TypeError, "din_attention: query must be a tensor, got list"),
        ({"query": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "query must be float32 or float64 or bfloat16, got int64"),
        (
            {"query": torch.ones(3, 3)},
            ValueError,
            r"query must have one row a user \(2\) when candidate_offsets is left",
        ),
        ({"keys": torch.ones(5, 4)}, ValueError, r"keys must have shape \[T, 3\], got \[5, 4\]"),
        ({"keys": torch.ones(5, 3).double()}, TypeError, "keys must be float32, got float64"),
        ({"keys": torch.ones(4, 3)}, ValueError, r"offsets\[-1\] must be 4, the number of rows it cuts, got 5"),
        ({"values": torch.ones(4, 3)}, ValueError, r"values must have shape \[5, Dv\], got \[4, 3\]"),
        ({"offsets": torch.tensor([0, 7, 5])}, ValueError, r"offsets\[2\] = 5 is below offsets\[1\] = 7"),
        ({"offsets": torch.tensor([1, 2, 5])}, ValueError, r"offsets\[0\] must be 0, got 1"),
        ({"offsets": torch.tensor([0.0, 2, 5])}, TypeError, "offsets must be int32 or int64, got float32"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must have one entry more"),
        ({"candidate_offsets": torch.tensor([0, 1, 3])}, ValueError, r"candidate_offsets\[-1\] must be 2"),
        ({"candidate_offsets": torch.tensor([0, 2])}, ValueError, r"candidate_offsets must have shape \[3\]"),
        (
            {"keys": torch.ones(2, 4, 3), "offsets": torch.tensor([4, 5])},
            IndexError,
            r"lengths\[1\] = 5 is outside \[0, 5\)",
        ),
        ({"keys": torch.ones(2, 4, 3), "offsets": torch.tensor([4, -1])}, IndexError, r"lengths\[1\] = -1 is outside"),
        ({"activation": "gelu"}, ValueError, "activation must be one of prelu, relu, sigmoid, silu, dice, got 'gelu'"),
        ({"mode": "mean"}, ValueError, "mode must be one of sum, sigmoid, softmax, got 'mean'"),
        ({"w1": torch.ones(9, 6)}, ValueError, r"w1 must have shape \[12, H1\], got \[9, 6\]"),
        ({"b1": torch.ones(5)}, ValueError, r"b1 must have shape \[6\], got \[5\]"),
        ({"w2": None}, ValueError, "b2 must be None where w2 is None"),
        ({"b2": None}, TypeError, "b2 must be a tensor, got NoneType"),
        ({"w3": torch.ones(3)}, ValueError, r"w3 must have shape \[3, 1\], got \[3\]"),
        ({"slope": torch.ones(3)}, ValueError, r"slope must have shape \[2\], got \[3\]"),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    (query, keys, offsets, weights), _ = problem([2, 3], None, 3, None)
    named = {"query": query, "keys": keys, "offsets": offsets, **weights._asdict(), **change}
    weights = DINWeights(*(named.pop(name) for name in DINWeights._fields))
    with pytest.raises(error, match=sentence):
        ops.din_attention(named.pop("query"), named.pop("keys"), named.pop("offsets"), weights, **named)


def test_one_row_expanded_over_the_history():
    """Padded keys whose rows all are one row in memory."""
    generator = torch.Generator().manual_seed(4)
    row = torch.randn(3, 8, generator=generator)
    query = torch.randn(3, 8, generator=generator)
    weights = ops.DINWeights(
        torch.randn(32, 5, generator=generator), torch.zeros(5), None, None, torch.randn(5, 1, generator=generator),
        torch.zeros(1),
    )  # fmt: skip
    keys, lengths = row[:, None, :].expand(3, 4, 8), torch.tensor([4, 0, 3])
    assert torch.equal(
        ops.din_attention(query, keys, lengths, weights), ops.din_attention(query, keys.contiguous(), lengths, weights)
    )
