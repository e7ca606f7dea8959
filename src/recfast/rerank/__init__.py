"""Lists made diverse: objects over `ops.dpp_greedy` and its relatives, for arrays and tensors, one user or many."""

from typing import Any

from recfast.errors import InputError
from recfast.rerank._base import Reranker, entropy_propensity, history_entropy
from recfast.rerank.dpp import DPP
from recfast.rerank.kdpp import KDPP
from recfast.rerank.mmr import MMR
from recfast.rerank.msd import MSD
from recfast.rerank.ssd import SSD
from recfast.rerank.xquad import XQuAD

__all__ = [
    "DPP",
    "KDPP",
    "KINDS",
    "MMR",
    "MSD",
    "SSD",
    "Reranker",
    "XQuAD",
    "build",
    "entropy_propensity",
    "history_entropy",
]

KINDS = {kind.__name__: kind for kind in (DPP, KDPP, MMR, MSD, SSD, XQuAD)}


def build(kind: str, **options: Any) -> Reranker:
    """The re-ranker of a name with its options, such as `build("MMR", diversity=0.5)`.

    Raises
    ------
    InputError
        An unknown name, an option that it does not have, or a value out of range.
    """
    if kind not in KINDS:
        raise InputError(f"rerank: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    known = KINDS[kind]().config()
    for name in options:
        if name not in known:
            raise InputError(f"rerank: {kind} has no option {name!r}, expected one of {', '.join(known)}")
    return KINDS[kind](**options)
