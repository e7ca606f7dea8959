"""What is measured: whether lists are right (`recall`, `ndcg`, ...), scores tell apart (`auc`, `gauc`, `logloss`),
chances hold (`ece`, `pcoc`), lists are varied (`intra_list_diversity`, ...), and right for each thing that a user may
be after (`alpha_ndcg`, ...).

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
    serendipity,
    topic_count,
)
from recfast.metrics.intent import alpha_ndcg, err_ia, map_ia
from recfast.metrics.ranking import average_precision, hit_rate, hits, mrr, ndcg, precision, recall

__all__ = [
    "GAUC",
    "Reliability",
    "alpha_ndcg",
    "auc",
    "average_precision",
    "catalogue_coverage",
    "ece",
    "err_ia",
    "exposure",
    "exposure_entropy",
    "gauc",
    "gini",
    "hit_rate",
    "hits",
    "intra_list_diversity",
    "logloss",
    "map_ia",
    "mrr",
    "ndcg",
    "novelty",
    "pcoc",
    "precision",
    "recall",
    "reliability",
    "s_recall",
    "serendipity",
    "topic_count",
]
