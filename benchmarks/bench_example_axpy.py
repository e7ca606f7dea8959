"""example_axpy against `torch.add(y, x, alpha=...)` and against copying as many bytes."""

import pytest
import torch

from recfast import ops


@pytest.mark.parametrize("size", [10_000, 1_000_000, 30_000_000])
def test_example_axpy(race, size):
    x, y = torch.randn(2, size)
    out = torch.empty(3 * size // 2)
    source = torch.randn(3 * size // 2)
    wanted = ops.example_axpy.reference(x, y, 0.5)

    def check(answer, column):
        torch.testing.assert_close(answer, wanted, rtol=1e-6, atol=1e-6, msg=column)

    race(
        "example_axpy",
        f"N={size}",
        size,
        {
            "ours": lambda: ops.example_axpy(x, y, 0.5),
            "torch": lambda: torch.add(y, x, alpha=0.5),
            # Two reads and one write of N values move as many bytes as a copy of 1.5 N.
            "limit": lambda: out.copy_(source),
        },
        check=check,
    )
