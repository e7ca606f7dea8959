"""Functions on tensors with a compiled kernel behind each. `<op>.reference` is the same call in plain torch."""

from recfast.ops.code_rows import RowsIndex, code_rows_search
from recfast.ops.code_search import Codes, code_search
from recfast.ops.din_attention import DINWeights, din_attention
from recfast.ops.dpp_greedy import DPPResult, dpp_greedy
from recfast.ops.embedding_bag import QuantizedTable, embedding_bag, quantize
from recfast.ops.embedding_update import UpdateState, embedding_update_
from recfast.ops.example_axpy import example_axpy
from recfast.ops.id_map import IdMap
from recfast.ops.initial_rows import initial_rows

__all__ = [
    "Codes",
    "DINWeights",
    "DPPResult",
    "IdMap",
    "QuantizedTable",
    "RowsIndex",
    "UpdateState",
    "code_rows_search",
    "code_search",
    "din_attention",
    "dpp_greedy",
    "embedding_bag",
    "embedding_update_",
    "example_axpy",
    "initial_rows",
    "quantize",
]
