"""What is measured: whether lists are right (`recall`, `ndcg`, ...), scores tell apart (`auc`, `gauc`, `logloss`),
chances hold (`ece`, `pcoc`), and lists are varied (`intra_list_diversity`, ...).

Arrays, tensors or plain lists in; float64 out, of top-k lists one value a user, so that the mean, its error and a
comparison by user can be made of them. Wrong input is a `recfast.InputError`.
"""

from recfast.metrics.calibration import Reliability, ece, pcoc, reliability
from recfast.metrics.classification import GAUC, auc, gauc, logloss
from recfast.metrics.diversity import (
    catalogue_coverage,
    exposure,
    exposure_entropy,
    gini,
    intra_list_diversity,
    novelty,
    s_recall,
    topic_count,
)
from recfast.metrics.ranking import average_precision, hit_rate, hits, mrr, ndcg, recall

__all__ = [
    "GAUC",
    "Reliability",
    "auc",
    "average_precision",
    "catalogue_coverage",
    "ece",
    "exposure",
    "exposure_entropy",
    "gauc",
    "gini",
    "hit_rate",
    "hits",
    "intra_list_diversity",
    "logloss",
    "mrr",
    "ndcg",
    "novelty",
    "pcoc",
    "recall",
    "reliability",
    "s_recall",
    "topic_count",
]
