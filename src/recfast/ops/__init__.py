"""Functions on tensors with a compiled kernel behind each. `<op>.reference` is the same call in plain torch."""

from recfast.ops.din_attention import DINWeights, din_attention
from recfast.ops.example_axpy import example_axpy

__all__ = ["DINWeights", "din_attention", "example_axpy"]
