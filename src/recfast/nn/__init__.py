"""Torch modules over `recfast.ops`."""

from recfast.nn._tokenizer import Tokenizer
from recfast.nn.blocks import MLP, CrossNetV2, Dice, fm_interaction
from recfast.nn.collisions import Assignment, Resolution, resolve_collisions
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
from recfast.nn.dpp_loss import DPPLoss, dpp_log_normaliser
from recfast.nn.dynamic_table import DynamicTable
from recfast.nn.embedding_tables import EmbeddingTables, second_pass
from recfast.nn.eta import ETA
from recfast.nn.frozen_tables import FrozenTables
from recfast.nn.hstu import HSTUBlock
from recfast.nn.losses import NegativesLoss
from recfast.nn.multi_head_target_attention import MultiHeadTargetAttention
from recfast.nn.muvera import FixedDimensionalEncoding, chamfer
from recfast.nn.quantizer import ProductQuantizer
from recfast.nn.residual_kmeans import ResidualKMeans
from recfast.nn.residual_quantizer import ResidualQuantizer
from recfast.nn.sdim import SDIM
from recfast.nn.target_attention import TargetAttention
from recfast.nn.transformer_block import TransformerBlock
from recfast.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "DARE",
    "ETA",
    "MLP",
    "SDIM",
    "Assignment",
    "CrossNetV2",
    "DPPLoss",
    "Dice",
    "DynamicTable",
    "EmbeddingTables",
    "FixedDimensionalEncoding",
    "FrozenTables",
    "HSTUBlock",
    "HashedTables",
    "MultiHeadTargetAttention",
    "NegativesLoss",
    "PostTrainingTables",
    "ProductQuantizer",
    "PrunedTables",
    "QuotientRemainderTables",
    "ResidualKMeans",
    "ResidualQuantizer",
    "Resolution",
    "RobeTables",
    "SparseTables",
    "TargetAttention",
    "Tokenizer",
    "TransformerBlock",
    "VectorQuantizer",
    "best_step",
    "chamfer",
    "dpp_log_normaliser",
    "fm_interaction",
    "resolve_collisions",
    "second_pass",
]
