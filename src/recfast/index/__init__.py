"""Indexes of items: exact search over codes and sparse rows, and FAISS for dense vectors, all behind one `search`."""

from recfast.index.bitmap import Bitmap
from recfast.index.code_index import CodeIndex
from recfast.index.code_rows import CodeRows
from recfast.index.code_trie import BeamResult, CodeTrie, constrained_beam
from recfast.index.dense_index import DenseIndex

__all__ = ["BeamResult", "Bitmap", "CodeIndex", "CodeRows", "CodeTrie", "DenseIndex", "constrained_beam"]
