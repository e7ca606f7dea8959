"""Embedding tables in less memory than a row of floats for every id, with the face of `nn.EmbeddingTables`.

They are the rivals of low-precision training: fewer rows (`HashedTables`, `QuotientRemainderTables`), shared weights
(`RobeTables`), fewer weights (`PrunedTables`), fewer bits after training (`PostTrainingTables`). The first four are
ordinary modules: their weights are parameters, trained by the optimiser that is given them.
"""

from recfast.nn.compressed.hashed import HashedTables
from recfast.nn.compressed.post_training import PostTrainingTables, best_step
from recfast.nn.compressed.pruned import PrunedTables, SparseTables
from recfast.nn.compressed.quotient_remainder import QuotientRemainderTables
from recfast.nn.compressed.robe import RobeTables

__all__ = [
    "HashedTables",
    "PostTrainingTables",
    "PrunedTables",
    "QuotientRemainderTables",
    "RobeTables",
    "SparseTables",
    "best_step",
]
