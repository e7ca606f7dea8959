"""Torch modules over `recfast.ops`."""

from recfast.nn.blocks import MLP, Dice, fm_interaction
from recfast.nn.dynamic_table import DynamicTable
from recfast.nn.embedding_tables import EmbeddingTables, second_pass
from recfast.nn.frozen_tables import FrozenTables
from recfast.nn.quantizer import ProductQuantizer
from recfast.nn.target_attention import TargetAttention

__all__ = [
    "MLP",
    "Dice",
    "DynamicTable",
    "EmbeddingTables",
    "FrozenTables",
    "ProductQuantizer",
    "TargetAttention",
    "fm_interaction",
    "second_pass",
]
