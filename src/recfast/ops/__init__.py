"""Functions on tensors with a compiled kernel behind each. `<op>.reference` is the same call in plain torch."""

from recfast.ops import embedding_tables  # noqa: F401  (its op is for modules)
from recfast.ops.category_top_k import category_top_k
from recfast.ops.code_postings import PostingLists, code_postings, posting_counts, posting_lists
from recfast.ops.code_rows import RowsIndex, code_rows_search
from recfast.ops.code_search import Codes, code_search
from recfast.ops.code_trie import TrieArrays, TrieStep, code_trie_step
from recfast.ops.din_attention import DiceWeights, DINWeights, din_attention
from recfast.ops.dpp_greedy import DPPResult, dpp_greedy
from recfast.ops.dpp_greedy_kernel import dpp_greedy_kernel
from recfast.ops.dpp_log_det import dpp_log_det
from recfast.ops.embedding_bag import Features, embedding_bag
from recfast.ops.embedding_update import (
    Pending,
    UpdateState,
    embedding_step_gradient,
    embedding_update_,
    embedding_update_first_,
    embedding_update_second_,
    requantize_,
)
from recfast.ops.example_axpy import example_axpy
from recfast.ops.formats import QuantizedTable, quantize, round_to
from recfast.ops.hamming_top_k import hamming_top_k
from recfast.ops.hstu_attention import hstu_attention
from recfast.ops.id_map import IdMap
from recfast.ops.initial_rows import initial_rows
from recfast.ops.kdpp_sample import KDPPResult, kdpp_sample
from recfast.ops.mmr_greedy import GreedyResult, mmr_greedy
from recfast.ops.msd_greedy import msd_greedy
from recfast.ops.negatives_loss import negatives_loss
from recfast.ops.packed_codes import (  # the edits of what is packed, which are no ops, are for index
    PackedCodes,
    SparseTable,
    pack_codes,
    pack_mask,
    permute_mask,
)
from recfast.ops.packed_rows import PackedRows, pack_rows
from recfast.ops.sdim_attention import sdim_append, sdim_attention, sdim_history_attention, sdim_table
from recfast.ops.sequence_attention import sequence_attention
from recfast.ops.simhash import simhash
from recfast.ops.ssd_greedy import ssd_greedy
from recfast.ops.target_attention import attention_top_k, target_attention
from recfast.ops.xquad_greedy import xquad_greedy

__all__ = [
    "Codes",
    "DINWeights",
    "DPPResult",
    "DiceWeights",
    "Features",
    "GreedyResult",
    "IdMap",
    "KDPPResult",
    "PackedCodes",
    "PackedRows",
    "Pending",
    "PostingLists",
    "QuantizedTable",
    "RowsIndex",
    "SparseTable",
    "TrieArrays",
    "TrieStep",
    "UpdateState",
    "attention_top_k",
    "category_top_k",
    "code_postings",
    "code_rows_search",
    "code_search",
    "code_trie_step",
    "din_attention",
    "dpp_greedy",
    "dpp_greedy_kernel",
    "dpp_log_det",
    "embedding_bag",
    "embedding_step_gradient",
    "embedding_update_",
    "embedding_update_first_",
    "embedding_update_second_",
    "example_axpy",
    "hamming_top_k",
    "hstu_attention",
    "initial_rows",
    "kdpp_sample",
    "mmr_greedy",
    "msd_greedy",
    "negatives_loss",
    "pack_codes",
    "pack_mask",
    "pack_rows",
    "permute_mask",
    "posting_counts",
    "posting_lists",
    "quantize",
    "requantize_",
    "round_to",
    "sdim_append",
    "sdim_attention",
    "sdim_history_attention",
    "sdim_table",
    "sequence_attention",
    "simhash",
    "ssd_greedy",
    "target_attention",
    "xquad_greedy",
]
