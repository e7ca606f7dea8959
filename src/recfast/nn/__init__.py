"""Torch modules over the ops."""

from recfast.nn.embedding_tables import EmbeddingTables

__all__ = ["EmbeddingTables"]
