"""Lists made diverse: objects over `ops.dpp_greedy` and its relatives, for arrays and tensors, one user or many."""

from recfast.rerank._base import Reranker, entropy_propensity, history_entropy
from recfast.rerank.dpp import DPP
from recfast.rerank.mmr import MMR

__all__ = ["DPP", "MMR", "Reranker", "entropy_propensity", "history_entropy"]
