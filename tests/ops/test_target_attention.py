"""The five tests of an op, the selection of rows, and what a history owes to nobody but itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfast import ops
from recfast.ops._library import REGISTRY

EPS = torch.finfo(torch.float32).eps
SCORES = ["softmax", "relu", "silu", "none"]


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def problem(lengths, candidates, heads, dim, value_dim, seed=0, dtype=torch.float32):
    """Arguments of the op and its options; `candidates` None means one a user."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    rows = len(lengths) if candidates is None else sum(candidates)
    options = {"candidate_offsets": None if candidates is None else offsets_of(candidates)}
    keys, values = random(sum(lengths), heads, dim), random(sum(lengths), heads, value_dim)
    return (random(rows, heads, dim), keys, values, offsets_of(lengths)), options


def random_positions(arguments, options, columns, seed=0):
    """Some rows of each candidate's history, in any order, some twice, and holes of -1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths_of(arguments, options)
    share = torch.rand(lengths.numel(), columns, generator=generator, dtype=torch.float64)
    positions = (share * lengths.unsqueeze(1)).long()
    hole = torch.rand(positions.shape, generator=generator) < 0.2
    return torch.where(hole | (lengths == 0).unsqueeze(1), -1, positions)


def lengths_of(arguments, options):
    """How long the history of each candidate is."""
    lengths = arguments[3].diff().long()
    if options.get("candidate_offsets") is not None:
        lengths = lengths.repeat_interleave(options["candidate_offsets"].diff())
    return lengths


def wide(arguments):
    return [x.double() if x.is_floating_point() else x for x in arguments]


def published(arguments, options):
    """The form of FuxiCTR and QIN, candidate by candidate: matmul, scale, softmax or another weight, matmul."""
    query, keys, values, offsets = wide(arguments)
    scale = options.get("scale") or query.shape[2] ** -0.5
    users = torch.arange(offsets.numel() - 1)
    if options.get("candidate_offsets") is not None:
        users = users.repeat_interleave(options["candidate_offsets"].diff())
    outs, bounds = [], []
    for c, user in enumerate(users):
        k, v = (x[offsets[user] : offsets[user + 1]].transpose(0, 1) for x in (keys, values))
        positions = options.get("positions")
        if positions is not None:
            chosen = positions[c][positions[c] >= 0].long()
            k, v = k[:, chosen], v[:, chosen]
        s = scale * (k @ query[c].unsqueeze(2)).squeeze(2)
        length = s.shape[1]
        if length == 0:
            outs.append(v.new_zeros(v.shape[0], v.shape[2]))
            bounds.append(outs[-1])
            continue
        # n * eps * sum |terms| of each step, as the header has it.
        error = (query.shape[2] + 3) * EPS * abs(scale) * (k.abs() @ query[c].abs().unsqueeze(2)).squeeze(2)
        score = options.get("score", "softmax")
        if score == "softmax":
            p = torch.softmax(s, 1)
            highest = s.abs().amax(1, keepdim=True)
            error = p * (2 * error.amax(1, keepdim=True) + (length / 16 + 24 + 4 * highest) * EPS)
        else:
            p = {"relu": torch.relu, "silu": torch.nn.functional.silu, "none": lambda x: x}[score](s)
            error = 1.1 * error + 8 * EPS * s.abs()
        outs.append((p.unsqueeze(1) @ v).squeeze(1))
        # The sum of values, and what it shrinks by with each tile of 64 rows.
        terms = error + (1.1 * length + 8) * EPS * p.abs()
        bounds.append((terms.unsqueeze(1) @ v.abs()).squeeze(1))
    shape = (0, *values.shape[1:])
    return (torch.stack(outs), torch.stack(bounds)) if outs else (values.new_zeros(shape), values.new_zeros(shape))


sizes = st.one_of(st.sampled_from([1, 15, 16, 17, 32, 33]), st.integers(1, 40))


@given(
    users=st.lists(
        st.tuples(
            st.one_of(st.sampled_from([0, 1, 2, 15, 63, 64, 65, 130]), st.integers(0, 80)),
            st.one_of(st.integers(0, 4), st.sampled_from([12, 13, 41])),
        ),
        max_size=5,
    ),
    shared=st.booleans(),
    heads=st.integers(1, 3),
    dim=sizes,
    value_dim=sizes,
    score=st.sampled_from(SCORES),
    listed=st.one_of(st.none(), st.integers(0, 70)),
    scale=st.sampled_from([None, 0.3, -1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60)
def test_matches_reference(
    users, shared, heads, dim, value_dim, score, listed, scale, dtype, index, isa_levels, poisoned_empty
):
    candidates = [n for _, n in users] if shared else None
    arguments, options = problem([length for length, _ in users], candidates, heads, dim, value_dim, dtype=dtype)
    options |= {"score": score, "scale": scale}
    if listed is not None:
        options["positions"] = random_positions(arguments, options, listed).to(index)
    wanted, bound = published(arguments, options)
    if dtype == torch.bfloat16:
        bound = bound + torch.finfo(dtype).eps / 2 * (wanted.abs() + bound)
    answers = []
    for _ in isa_levels():
        answer = ops.target_attention(*arguments[:3], arguments[3].to(index), **options)
        assert answer.dtype == dtype
        assert answer.shape == wanted.shape
        assert torch.all((answer.double() - wanted).abs() <= bound)
        answers.append(answer)
    # The two forms with FMA agree bit by bit; the scalar one lies within the bound like they.
    assert all(torch.equal(answer, answers[1]) for answer in answers[2:])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("length", [1024, 1025, 2500])
def test_long_histories_are_merged(score, length, isa_levels, poisoned_empty):
    """Histories of more than 1024 rows are summed in parts; scores of very different size meet in the merge."""
    arguments, options = problem([length, 3], [3, 1], 2, 8, 5)
    arguments[1][: length // 2] *= 6
    options |= {"score": score}
    wanted, bound = published(arguments, options)
    for _ in isa_levels():
        answer = ops.target_attention(*arguments, **options)
        assert torch.all((answer.double() - wanted).abs() <= bound)


def test_known_values():
    # Scores 2 * q . k of user 0: q = (1, 0): 2, -4, 0; q = (0, 1): 0, 2, 4. User 1 has no history.
    query = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[5.0, 5.0]]])
    keys = torch.tensor([[[1.0, 0.0]], [[-2.0, 1.0]], [[0.0, 2.0]]])
    values = torch.tensor([[[1.0, 0.0, 3.0]], [[0.0, 1.0, 3.0]], [[10.0, 10.0, 3.0]]])
    offsets, rows = torch.tensor([0, 3, 3]), torch.tensor([0, 2, 3])

    def call(**options):
        return ops.target_attention(query, keys, values, offsets, candidate_offsets=rows, scale=2.0, **options)

    assert call(score="none").tolist() == [[[2.0, -4.0, -6.0]], [[40.0, 42.0, 18.0]], [[0.0, 0.0, 0.0]]]
    assert call(score="relu").tolist() == [[[2.0, 0.0, 6.0]], [[40.0, 42.0, 18.0]], [[0.0, 0.0, 0.0]]]
    # softmax of (2, -4, 0): 0.878878, 0.002179, 0.118943; of (0, 2, 4): 0.015876, 0.117310, 0.866813
    softmax = [0.878878 + 1.18943, 0.002179 + 1.18943, 3.0, 0.015876 + 8.66813, 0.117310 + 8.66813, 3.0, 0.0, 0.0, 0.0]
    assert call().flatten().tolist() == pytest.approx(softmax, abs=2e-5)
    # x sigmoid(x): 2 -> 1.761594, -4 -> -0.071945, 4 -> 3.928055
    silu = [1.761594, -0.071945, 3 * (1.761594 - 0.071945), 39.28055, 1.761594 + 39.28055, 3 * (1.761594 + 3.928055)]
    assert call(score="silu").flatten().tolist() == pytest.approx([*silu, 0.0, 0.0, 0.0], abs=2e-5)
    # The best row alone has weight 1 in a softmax.
    assert call(top_k=1).tolist() == [[[1.0, 0.0, 3.0]], [[10.0, 10.0, 3.0]], [[0.0, 0.0, 0.0]]]
    listed = torch.tensor([[-1, 2, -1], [0, 0, -1], [-1, -1, -1]])
    assert call(score="none", positions=listed).tolist() == [[[0.0] * 3], [[0.0] * 3], [[0.0] * 3]]
    listed = torch.tensor([[1, 0, 1], [-1, 2, 1], [-1, -1, -1]])
    assert call(score="none", positions=listed).tolist() == [[[2.0, -8.0, -18.0]], [[40.0, 42.0, 18.0]], [[0.0] * 3]]
    best = ops.attention_top_k(query, keys, offsets, 2, candidate_offsets=rows, scale=2.0)
    assert best.tolist() == [[0, 2], [2, 1], [-1, -1]]


def test_no_position_at_all(isa_levels, poisoned_empty):
    arguments, options = problem([3, 1], [2, 1], 2, 4, 3)
    for positions in (torch.empty(3, 0, dtype=torch.int64), torch.full((3, 2), -1)):
        for _ in isa_levels():
            answers = gradients(arguments, {**options, "positions": positions})
            assert not any(answer.any() for answer in answers)


def test_far_scores_get_no_weight(isa_levels):
    query, values = torch.ones(1, 1, 1), torch.tensor([[[1.0]], [[7.0]], [[float(2**20)]]])
    keys = torch.tensor([[[200.0]], [[200.0]], [[-200.0]]])
    for _ in isa_levels():
        assert ops.target_attention(query, keys, values, torch.tensor([0, 3]), scale=1.0).item() == 4.0


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ["all", "listed", "top_k"])
def test_gradcheck(score, rows):
    arguments, options = problem([3, 0, 66, 1], [2, 1, 2, 0], 2, 3, 2, 1, torch.float64)
    if rows == "listed":
        options["positions"] = random_positions(arguments, options, 5)
    elif rows == "top_k":
        options["top_k"] = 4

    def call(query, keys, values):
        return ops.target_attention(query, keys, values, arguments[3], score=score, **options)

    inputs = [x.requires_grad_() for x in arguments[:3]]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_gradcheck_every_entry():
    """Once without fast mode, padded keys and all."""
    query, keys, values = (torch.randn(*size, dtype=torch.float64) for size in [(2, 2, 3), (2, 4, 2, 3), (2, 4, 2, 2)])
    lengths = torch.tensor([3, 2])

    def call(*inputs):
        return ops.target_attention(*inputs, lengths, scale=-0.7)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (query, keys, values)])


def coefficients_of(out):
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)


def gradients(arguments, options, form=ops.target_attention):
    *inputs, offsets = arguments
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = form(*leaves, offsets, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, coefficients_of(out), materialize_grads=True)]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ["all", "listed", "top_k"])
@pytest.mark.parametrize("shape", [(1, 33, 17), (4, 16, 16), (2, 5, 32)])
def test_float32_gradients(score, rows, shape, isa_levels, poisoned_empty):
    """As near to float64 as plain torch in float32 is, within a factor for the order of its sums."""
    arguments, options = problem([70, 0, 1, 1100, 21], [43, 2, 0, 13, 5], *shape)
    options |= {"score": score}
    if rows != "all":
        # The choice itself may differ between float32 and float64, so it is made once.
        options["positions"] = random_positions(arguments, options, 9)
        if rows == "top_k":
            options["positions"] = ops.attention_top_k(
                arguments[0], arguments[1], arguments[3], 9, **{"candidate_offsets": options["candidate_offsets"]}
            )
    exact = gradients(wide(arguments), options, form=ops.target_attention.reference)
    plain = gradients(arguments, options, form=ops.target_attention.reference)
    answers = []
    for _ in isa_levels():
        answers.append(gradients(arguments, options))
        for have, torch_has, want in zip(answers[-1], plain, exact, strict=True):
            ours, theirs = (have - want).norm(), (torch_has - want).norm()
            assert ours <= 8 * theirs + 8 * EPS * want.norm()
    for answer in answers[2:]:
        assert all(torch.equal(a, b) for a, b in zip(answer, answers[1], strict=True))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("listed", [False, True])
def test_bfloat16_gradients(score, listed, isa_levels):
    """Sums are kept in float32: the gradient of the widened inputs, but for two roundings, of `out` and of itself."""
    arguments, options = problem([70, 0, 1100], [3, 2, 5], 2, 16, 9, dtype=torch.bfloat16)
    options |= {"score": score}
    if listed:
        options["positions"] = random_positions(arguments, options, 30)
    exact = gradients(wide(arguments), options, form=ops.target_attention.reference)
    for _ in isa_levels():
        for have, want in zip(gradients(arguments, options), exact, strict=True):
            assert have.dtype == torch.bfloat16
            assert (have.double() - want).norm() <= 2 * torch.finfo(torch.bfloat16).eps * want.norm()


def test_only_wanted_gradients():
    arguments, options = problem([70, 3], [2, 1], 2, 8, 5)
    full = gradients(arguments, options)[1:]
    for wanted in range(3):
        inputs = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(arguments[:3])]
        out = ops.target_attention(*inputs, arguments[3], **options)
        (gradient,) = torch.autograd.grad(out, inputs[wanted], coefficients_of(out))
        assert torch.equal(gradient, full[wanted])


def test_opcheck(opcheck):
    for name in ("target_attention", "target_attention_backward", "attention_top_k"):
        opcheck(REGISTRY[name])


def test_compiles_in_one_graph():
    arguments, options = problem([4, 0, 9], None, 2, 4, 3)
    for rows in ({}, {"top_k": 2}):
        compiled = torch.compile(ops.target_attention, fullgraph=True, backend="aot_eager")
        wanted = gradients(arguments, {**options, **rows})
        assert all(
            torch.equal(a, b) for a, b in zip(gradients(arguments, {**options, **rows}, compiled), wanted, strict=True)
        )


@given(
    users=st.lists(
        st.tuples(st.one_of(st.sampled_from([0, 1, 64, 65, 400]), st.integers(0, 90)), st.integers(0, 3)), max_size=4
    ),
    heads=st.integers(1, 2),
    dim=st.sampled_from([1, 3, 16, 18]),
    k=st.one_of(st.integers(1, 8), st.sampled_from([63, 64, 100])),
    few=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=50)
def test_top_k_is_a_stable_sort(users, heads, dim, k, few, dtype, isa_levels, poisoned_empty):
    """Small whole numbers give exact scores, and with few of them most scores are equal: the later row goes first."""
    arguments, options = problem([length for length, _ in users], [n for _, n in users], heads, dim, 3, dtype=dtype)
    query, keys, values, offsets = [x.round().clamp(-2, 2) if x.is_floating_point() else x for x in arguments]
    keys = keys.clamp(-1, 0) if few else keys
    wanted = ops.attention_top_k.reference(query, keys, offsets, k, scale=0.5, **options)
    for _ in isa_levels():
        best = ops.attention_top_k(query, keys, offsets, k, scale=0.5, **options)
        assert torch.equal(best, wanted)
        one_pass = ops.target_attention(query, keys, values, offsets, scale=0.5, top_k=k, **options)
        assert torch.equal(
            one_pass, ops.target_attention(query, keys, values, offsets, scale=0.5, positions=best, **options)
        )


def test_top_k_against_a_loop():
    """The reference itself, by sorting pairs in Python."""
    arguments, options = problem([7, 0, 40], [2, 1, 3], 2, 3, 1)
    query, keys, _, offsets = [x.round() if x.is_floating_point() else x for x in arguments]
    best = ops.attention_top_k.reference(query, keys, offsets, 9, **options)
    users = torch.arange(3).repeat_interleave(options["candidate_offsets"].diff())
    for c, user in enumerate(users):
        scores = (keys[offsets[user] : offsets[user + 1]] * query[c]).sum((1, 2)).tolist()
        order = sorted(range(len(scores)), key=lambda l: (scores[l], l), reverse=True)[:9]
        assert best[c].tolist() == order + [-1] * (9 - len(order))


def test_top_k_of_real_numbers(isa_levels):
    """No row that was left out scores higher than one that was kept, but for the rounding of the scores."""
    arguments, options = problem([700], [4], 2, 19, 1)
    query, keys, _, offsets = arguments
    scores = torch.einsum("chd,lhd->cl", query.double(), keys.double())
    bound = 2 * 41 * EPS * torch.einsum("chd,lhd->cl", query.double().abs(), keys.double().abs()).amax()
    for _ in isa_levels():
        best = ops.attention_top_k(query, keys, offsets, 50, **options)
        kept = scores.gather(1, best)
        assert all(row.unique().numel() == 50 for row in best)
        assert torch.all(kept.diff(dim=1) <= bound)
        left = scores.scatter(1, best, -torch.inf).amax(1)
        assert torch.all(left <= kept.amin(1) + bound)


@pytest.mark.parametrize("k", [5, 300])
def test_top_k_of_a_very_long_history(k, isa_levels):
    """More rows than one list is kept for: lists are merged. Runs of equal scores cross the borders."""
    length = 40_000
    keys = (torch.arange(length) // 700 % 13).float().view(length, 1, 1)
    query = torch.tensor([[[1.0]], [[-1.0]], [[0.0]]])
    wanted = torch.stack(
        [
            (length - 1 - (sign * keys.flatten()).flip(0).argsort(descending=True, stable=True))[:k]
            for sign in (1.0, -1.0, 0.0)
        ]
    )
    for _ in isa_levels():
        rows = {"candidate_offsets": torch.tensor([0, 3])}
        best = ops.attention_top_k(query, keys, torch.tensor([0, length]), k, **rows)
        assert torch.equal(best, wanted)
        one_pass = ops.target_attention(query, keys, keys, torch.tensor([0, length]), top_k=k, **rows)
        listed = ops.target_attention(query, keys, keys, torch.tensor([0, length]), positions=best, **rows)
        assert torch.equal(one_pass, listed)


def test_nan_scores_rank_first():
    keys = torch.tensor([1.0, float("nan"), 3.0, float("nan"), 2.0]).view(5, 1, 1)
    best = ops.attention_top_k(torch.ones(1, 1, 1), keys, torch.tensor([0, 5]), 4)
    assert best.tolist() == [[3, 1, 2, 4]]


def test_no_gradient_through_the_choice():
    arguments, options = problem([30, 4], [2, 1], 2, 6, 3)
    best = ops.attention_top_k(arguments[0], arguments[1], arguments[3], 5, **options)
    chosen = gradients(arguments, {**options, "top_k": 5})
    assert all(
        torch.equal(a, b) for a, b in zip(chosen, gradients(arguments, {**options, "positions": best}), strict=True)
    )
    untouched = torch.ones(34, dtype=torch.bool)
    untouched[best[:2][best[:2] >= 0]] = False
    untouched[30 + best[2][best[2] >= 0]] = False
    assert untouched.any()
    assert not chosen[2][untouched].any()
    assert chosen[2][~untouched].any(-1).any(-1).all()


def both_threads(call):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call()
        torch.set_num_threads(3)
        return one, call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ["all", "listed", "top_k"])
def test_threads_change_no_bit(score, rows):
    generator = torch.Generator().manual_seed(3)
    lengths = [*torch.randint(0, 90, (30,), generator=generator).tolist(), 5000]
    arguments, options = problem(lengths, [*torch.randint(0, 9, (30,), generator=generator).tolist(), 50], 2, 9, 10)
    options |= {"score": score}
    if rows == "listed":
        options["positions"] = random_positions(arguments, options, 40)
    elif rows == "top_k":
        options["top_k"] = 20
    one, three = both_threads(lambda: gradients(arguments, options))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_threads_change_no_selection():
    arguments, options = problem([40_000, 7], [5, 2], 1, 4, 1)
    query, keys, _, offsets = arguments
    one, three = both_threads(lambda: ops.attention_top_k(query, keys, offsets, 30, **options))
    assert torch.equal(one, three)
    one, three = both_threads(lambda: ops.target_attention(*arguments, top_k=30, **options))
    assert torch.equal(one, three)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ["all", "listed", "top_k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answer_knows_no_batch_mates(score, rows, dtype, isa_levels):
    arguments, options = problem([230, 1500, 7], [2, 43, 1], 2, 17, 5, dtype=dtype)
    query, keys, values, offsets = arguments
    options |= {"score": score}
    if rows == "listed":
        options["positions"] = random_positions(arguments, options, 40)
    elif rows == "top_k":
        options["top_k"] = 20
    for _ in isa_levels():
        together = ops.target_attention(*arguments, **options)
        users = torch.arange(3).repeat_interleave(options["candidate_offsets"].diff())
        for c in (0, 1, 2, 3, 20, 44, 45):
            own = slice(offsets[users[c]], offsets[users[c] + 1])
            alone = {name: options[name] for name in ("score", "top_k") if name in options}
            if rows == "listed":
                alone["positions"] = options["positions"][c : c + 1]
            k, v = keys[own], values[own]
            answer = ops.target_attention(query[c : c + 1], k, v, offsets_of([len(k)]), **alone)
            assert torch.equal(answer[0], together[c])


@pytest.mark.parametrize("score", SCORES)
def test_order_of_a_history_is_rounding(score):
    arguments, options = problem([500], [3], 2, 12, 5)
    query, keys, values, offsets = arguments
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    options["score"] = score
    plain = ops.target_attention(*arguments, **options)
    mixed = ops.target_attention(query, keys[order], values[order], offsets, **options)
    assert torch.all((plain - mixed).abs() <= 2 * published(arguments, options)[1])


@pytest.mark.parametrize("score", SCORES)
def test_shared_history_equals_copies(score):
    arguments, options = problem([90, 0, 31], [2, 1, 4], 2, 8, 5)
    query, keys, values, offsets = arguments
    shared = gradients(arguments, {**options, "score": score})
    users = torch.arange(3).repeat_interleave(options["candidate_offsets"].diff())
    rows = torch.cat([torch.arange(offsets[user], offsets[user + 1]) for user in users])
    lengths = offsets.diff()[users].tolist()
    copied = gradients((query, keys[rows], values[rows], offsets_of(lengths)), {"score": score})
    assert torch.equal(shared[0], copied[0])
    assert torch.equal(shared[1], copied[1])
    for a, b in zip(shared[2:], copied[2:], strict=True):
        back = torch.zeros_like(a).index_add(0, rows, b)
        torch.testing.assert_close(a, back, rtol=1e-5, atol=1e-5 * float(back.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_equals_jagged(dtype, poisoned_empty):
    lengths = [3, 0, 7, 5]
    arguments, options = problem(lengths, [1, 2, 0, 3], 2, 6, 4, dtype=dtype)
    query, keys, values, offsets = arguments
    stores = [torch.full((4, 9, *x.shape[1:]), float("nan"), dtype=dtype) for x in (keys, values)]
    for b, length in enumerate(lengths):
        for store, x in zip(stores, (keys, values), strict=True):
            store[b, :length] = x[offsets[b] : offsets[b + 1]]
    jagged = gradients(arguments, options)
    # A view of the first 7 columns: not contiguous, and its padding is never read.
    for columns in (7, 9):
        views = [store[:, :columns] for store in stores]
        padded = gradients((query, *views, torch.tensor(lengths)), options)
        strided = ops.target_attention(query, *views, torch.tensor(lengths), **options)
        assert torch.equal(jagged[0], padded[0])
        assert torch.equal(jagged[0], strided)
        assert torch.equal(jagged[1], padded[1])
        for b, length in enumerate(lengths):
            for i in (2, 3):
                assert torch.equal(padded[i][b, :length], jagged[i][offsets[b] : offsets[b + 1]])
                assert not padded[i][b, length:].any()
        top = ops.attention_top_k(query, views[0], torch.tensor(lengths), 3, **options)
        assert torch.equal(top, ops.attention_top_k(query, keys, offsets, 3, **options))


@pytest.mark.parametrize("dim", [5, 16])
def test_strided_rows_are_read_in_place(dim):
    """Queries, keys and values as parts of one fused projection, and layouts that must be copied, not misread."""
    arguments, options = problem([4, 80], None, 3, dim, dim)
    query, keys, values, offsets = arguments
    wanted = gradients(arguments, options)
    fused = torch.cat([keys.flatten(1), values.flatten(1), torch.randn(84, 7)], 1)
    own = fused[:, : 3 * dim].unflatten(1, (3, dim)), fused[:, 3 * dim : 6 * dim].unflatten(1, (3, dim))
    assert own[0].data_ptr() == fused.data_ptr()
    wide_query = torch.randn(2, 3 * dim + 4)
    wide_query[:, 1:-3] = query.flatten(1)
    strided = wide_query[:, 1:-3].unflatten(1, (3, dim)), *own, offsets
    assert torch.equal(ops.target_attention(*strided, **options), wanted[0])
    leaf = fused.requires_grad_()
    views = leaf[:, : 3 * dim].unflatten(1, (3, dim)), leaf[:, 3 * dim : 6 * dim].unflatten(1, (3, dim))
    out = ops.target_attention(query, *views, offsets, **options)
    (gradient,) = torch.autograd.grad(out, leaf, coefficients_of(out))
    assert torch.equal(gradient, torch.cat([*(x.flatten(1) for x in wanted[2:]), torch.zeros(84, 7)], 1))
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in arguments[:3]]
    assert all(torch.equal(a, b) for a, b in zip(gradients((*turned, offsets), options), wanted, strict=True))
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[:3]]
    assert torch.equal(ops.target_attention(*heads_first, offsets, **options), wanted[0])


def test_one_row_expanded_over_the_history():
    """Padded keys whose rows all are one row in memory."""
    row, query = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    keys, lengths = row[:, None].expand(3, 4, 2, 8), torch.tensor([4, 0, 3])
    answer = ops.target_attention(query, keys, keys, lengths)
    assert torch.equal(answer, ops.target_attention(query, keys.contiguous(), keys.contiguous(), lengths))
    torch.testing.assert_close(answer[::2], row[::2])


def test_nothing_of_candidates_by_history_is_stored():
    """Saved for backward: the arguments, the answer, its statistics and the chosen rows, for any number of pairs."""
    arguments, options = problem([400], [50], 2, 8, 8)
    for top_k in (None, 7):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            ops.target_attention(arguments[0].requires_grad_(), *arguments[1:], top_k=top_k, **options)
        inputs = sum(x.numel() for x in (*arguments, options["candidate_offsets"]))
        assert 0 < sum(saved) <= inputs + arguments[0].numel() + 200 + 50 * (top_k or 0)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"query": [1.0]}, TypeError, "target_attention: query must be a tensor, got list"),
        (
            {"query": torch.ones(2, 1, 3, dtype=torch.int64)},
            TypeError,
            "query must be float32 or bfloat16 or float64, got int64",
        ),
        ({"query": torch.ones(2, 3)}, ValueError, r"query must have shape \[Nc, H, Dq\], got \[2, 3\]"),
        ({"query": torch.ones(2, 1, 0)}, ValueError, r"query.shape\[2\] must be at least 1, got 0"),
        ({"query": torch.ones(3, 1, 3)}, ValueError, r"query must have one row a user \(2\) when candidate_offsets"),
        ({"keys": torch.ones(5, 2, 3)}, ValueError, r"keys must have shape \[T, 1, 3\], got \[5, 2, 3\]"),
        ({"keys": torch.ones(5, 1, 3).double()}, TypeError, "keys must be float32, got float64"),
        ({"values": torch.ones(4, 1, 3)}, ValueError, r"values must have shape \[5, 1, Dv\], got \[4, 1, 3\]"),
        ({"values": torch.ones(5, 1, 0)}, ValueError, r"values.shape\[2\] must be at least 1, got 0"),
        ({"values": torch.ones(5, 1, 2).bfloat16()}, TypeError, "values must be float32, got bfloat16"),
        ({"offsets": torch.tensor([0, 7, 5])}, ValueError, r"offsets\[2\] = 5 is below offsets\[1\] = 7"),
        ({"offsets": torch.tensor([1, 2, 5])}, ValueError, r"offsets\[0\] must be 0, got 1"),
        (
            {"offsets": torch.tensor([0, 2, 4])},
            ValueError,
            r"offsets\[-1\] must be 5, the number of rows it cuts, got 4",
        ),
        ({"offsets": torch.tensor([0.0, 2, 5])}, TypeError, "offsets must be int32 or int64, got float32"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must have one entry more"),
        ({"candidate_offsets": torch.tensor([0, 1, 3])}, ValueError, r"candidate_offsets\[-1\] must be 2"),
        ({"candidate_offsets": torch.tensor([0, 2])}, ValueError, r"candidate_offsets must have shape \[3\]"),
        (
            {"keys": torch.ones(2, 4, 1, 3), "values": torch.ones(2, 4, 1, 3), "offsets": torch.tensor([4, 5])},
            IndexError,
            r"lengths\[1\] = 5 is outside \[0, 5\)",
        ),
        ({"score": "max"}, ValueError, "score must be one of softmax, relu, silu, none, got 'max'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 1, "positions": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "exclude each other, got both"),
        ({"positions": torch.zeros(2, 1)}, TypeError, "positions must be int32 or int64, got float32"),
        ({"positions": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"positions must have shape \[2, K\]"),
        (
            {"positions": torch.tensor([[0, 1], [-1, 3]])},
            IndexError,
            r"positions\[1, 1\] = 3 is neither -1 nor in \[0, 3\), the history of candidate 1",
        ),
        ({"positions": torch.tensor([[0, -2], [-1, 3]])}, IndexError, r"positions\[0, 1\] = -2 is neither"),
        (
            {"positions": torch.tensor([[0], [2]]), "candidate_offsets": torch.tensor([0, 2, 2])},
            IndexError,
            r"positions\[1, 0\] = 2 is neither -1 nor in \[0, 2\), the history of candidate 1",
        ),
    ],
)
def test_rejects_bad_input(change, error, sentence):
    arguments, _ = problem([2, 3], None, 1, 3, 2)
    named = dict(zip(("query", "keys", "values", "offsets"), arguments, strict=True)) | change
    with pytest.raises(error, match=sentence):
        ops.target_attention(**named)


def test_top_k_rejects_bad_input():
    query, keys, _, offsets = problem([2, 3], None, 1, 3, 2)[0]
    with pytest.raises(ValueError, match="attention_top_k: k must be at least 1, got 0"):
        ops.attention_top_k(query, keys, offsets, 0)
    with pytest.raises(ValueError, match=r"attention_top_k: offsets\[-1\] must be 4"):
        ops.attention_top_k(query, keys[:4], offsets, 1)


def test_pairs_beyond_2_31():
    """47,000 candidates of one user with 47,000 rows are 2.2e9 pairs; each candidate lists its own last rows."""
    n = 47_000
    keys = torch.arange(n).float().view(n, 1, 1)
    listed = torch.tensor([n - 1, 0]).repeat(n, 1)
    rows = torch.tensor([0, n])
    out = ops.target_attention(
        torch.ones(n, 1, 1), keys, keys, torch.tensor([0, n]), candidate_offsets=rows, positions=listed, score="none"
    )
    assert torch.equal(out, torch.full((n, 1, 1), float(n - 1) ** 2))
