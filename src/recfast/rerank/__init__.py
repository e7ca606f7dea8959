"""Lists made diverse: objects over `ops.dpp_greedy` and its relatives, for arrays and tensors, one user or many.

All have one knob, `diversity` in [0, 1], and `personal`, which makes it the user's own. Which to take:

- `DPP` looks at the span of the whole list, so that many sorts of items come into it; with `window` at the latest ones
  alone, for lists that are scrolled through. Its knob is the gentlest at small values.
- `MMR` compares an item with its nearest in the list: the plain remedy for near-duplicates, and the baseline.
- `SSD` is between them: the span, but added to relevance.
- `MSD` seeks what is far from the list on average, and may come back to the same far corner.
- `XQuAD` covers the topics of the user's own history in their proportions, and asks for topics instead of features.
- `KDPP` draws lists by chance, other ones each time, so that more of the catalogue is shown.

At the same loss of relevance the greedy ones are close to each other, and the same knob costs very different amounts:
measure the curve on validation rows (`recfast run` does, and draws it) and choose by it. benchmarks/results/frontier.md
has figures.
"""

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
