"""Logs in, batches out: the schema, the preparation, the loader, known data sets."""

from recfast.data.catalogue import Catalogue
from recfast.data.dataset import Batch, Dataset, Jagged, Split, Vocabulary, open
from recfast.data.datasets import load
from recfast.data.loader import Loader
from recfast.data.prepare import cache_folder, prepare, prepare_libfm
from recfast.data.schema import Categorical, Numeric, Schema, Sequence, Vector

__all__ = [
    "Batch",
    "Catalogue",
    "Categorical",
    "Dataset",
    "Jagged",
    "Loader",
    "Numeric",
    "Schema",
    "Sequence",
    "Split",
    "Vector",
    "Vocabulary",
    "cache_folder",
    "load",
    "open",
    "prepare",
    "prepare_libfm",
]
