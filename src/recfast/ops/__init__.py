"""Functions on tensors with a compiled kernel behind each. `<op>.reference` is the same call in plain torch."""

from recfast.ops.dpp_greedy import DPPResult, dpp_greedy
from recfast.ops.example_axpy import example_axpy

__all__ = ["DPPResult", "dpp_greedy", "example_axpy"]
