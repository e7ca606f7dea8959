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
