"""Torch modules over `recfast.ops`."""

from recfast.nn.blocks import MLP, CrossNetV2, Dice, fm_interaction
from recfast.nn.compressed import (
    HashedTables,
    PostTrainingTables,
    PrunedTables,
    QuotientRemainderTables,
    RobeTables,
    SparseTables,
    best_step,
)
from recfast.nn.dare import DARE
from recfast.nn.dynamic_table import DynamicTable
from recfast.nn.embedding_tables import EmbeddingTables, second_pass
from recfast.nn.eta import ETA
from recfast.nn.frozen_tables import FrozenTables
from recfast.nn.hstu import HSTUBlock
from recfast.nn.multi_head_target_attention import MultiHeadTargetAttention
from recfast.nn.quantizer import ProductQuantizer
from recfast.nn.sdim import SDIM
from recfast.nn.target_attention import TargetAttention
from recfast.nn.transformer_block import TransformerBlock
from recfast.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "DARE",
    "ETA",
    "MLP",
    "SDIM",
    "CrossNetV2",
    "Dice",
    "DynamicTable",
    "EmbeddingTables",
    "FrozenTables",
    "HSTUBlock",
    "HashedTables",
    "MultiHeadTargetAttention",
    "PostTrainingTables",
    "ProductQuantizer",
    "PrunedTables",
    "QuotientRemainderTables",
    "RobeTables",
    "SparseTables",
    "TargetAttention",
    "TransformerBlock",
    "VectorQuantizer",
    "best_step",
    "fm_interaction",
    "second_pass",
]
