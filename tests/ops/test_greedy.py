"""Exact selection of the greedy re-rankers on a thousand random problems, instruction sets and threads varied."""

import greedy_problems as problems
import pytest
import torch

from recfast import _C, ops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmr_greedy", "msd_greedy", "ssd_greedy", "xquad_greedy"])
def test_equal_to_the_reference_on_every_problem(name):
    generator = torch.Generator().manual_seed(1)
    levels = ["scalar", "avx2", "avx512"]
    levels = levels[: levels.index(_C.detected_isa()) + 1]

    def one_of(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    op, threads = getattr(ops, name), torch.get_num_threads()
    try:
        for number in range(250):
            kind, users = one_of(*problems.KINDS), one_of(1, 2)
            items, width = one_of(*range(1, 260)), one_of(*range(1, 40))
            make = problems.topics if name == "xquad_greedy" else problems.make
            dtype = one_of(torch.float32, torch.float64, torch.bfloat16)
            rows, relevance = make(kind, users, items, width, number, dtype)
            rows, options = problems.options_of(users, items, rows, one_of(False, True), number)
            options |= {"diversity": one_of(0.0, 0.2, 0.5, 0.8, 1.0), "window": one_of(None, None, 2, 4, 9)}
            if name == "mmr_greedy":
                options["clip"] = one_of(False, True)
            elif name == "msd_greedy":
                options["mean"] = one_of(False, True)
            elif name == "ssd_greedy":
                options |= {"mode": one_of("exact", "paper"), "volume": one_of(False, False, True)}
                options["gamma"] = one_of(0.5, 1.0, 3.0)
            k = one_of(*range(1, 25))
            wanted = op.reference(rows, relevance, k, **options)
            _C.set_isa(levels[number % len(levels)])
            torch.set_num_threads(1 + number % 3)
            answer = op(rows, relevance, k, **options)
            torch.set_num_threads(threads)
            problems.assert_same(answer, wanted)
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(levels[-1])


@pytest.mark.parametrize("op", [ops.mmr_greedy, ops.msd_greedy, ops.ssd_greedy, ops.xquad_greedy])
def test_subnormal_scores(op):
    """Scores so small that nothing divides by them."""
    grades = torch.tensor([[0.0, 1e-310, 2e-310, 3e-310, 1e-312]], dtype=torch.float64)
    nothing = torch.zeros(1, 5, 4, dtype=torch.float64)
    for exact in (True, False):
        # msd_greedy adds a distance of 1 to every one, next to which these are ties.
        found = op(nothing, grades, 5, exact=exact)
        assert sorted(found.indices[0].tolist()) == list(range(5))
    assert op(nothing, grades, 5, diversity=0.0).indices.tolist() == [[3, 2, 1, 4, 0]]
    rows = torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-157
    found = op(rows, torch.zeros(1, 5, dtype=torch.float64), 5, diversity=1.0)
    assert sorted(found.indices[0].tolist()) == list(range(5))
