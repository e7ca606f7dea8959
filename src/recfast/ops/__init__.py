"""Functions on tensors with a compiled kernel behind each. `<op>.reference` is the same call in plain torch."""

from recfast.ops.embedding_bag import QuantizedTable, embedding_bag, quantize
from recfast.ops.embedding_update import UpdateState, embedding_update_
from recfast.ops.example_axpy import example_axpy

__all__ = ["QuantizedTable", "UpdateState", "embedding_bag", "embedding_update_", "example_axpy", "quantize"]
