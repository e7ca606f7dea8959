"""One level of a beam search over a prefix tree of codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel, unwatched

_NAME = "code_trie_step"
_KERNELS = {
    (code, logit): kernel(f"code_trie_step_{str(code)[6:]}_{str(logit)[6:]}")
    for code in (torch.uint8, torch.uint16)
    for logit in (torch.float32, torch.bfloat16)
}
_CODES = (torch.uint8, torch.uint16)
_LOGITS = (torch.float32, torch.bfloat16)


class TrieArrays(NamedTuple):
    """A prefix tree of codes. Any object with these two attributes serves as well, `index.CodeTrie` for one.

    Nodes are numbered level after level, within a level in the order of their prefixes; node 0 is the root.

    Attributes
    ----------
    first_child : Tensor [V + 1], int32
        The children of node v, one of the V above the leaves, are the nodes `first_child[v]:first_child[v + 1]`.
    node_codes : Tensor [nodes], uint8 or uint16
        The last code of each node's prefix, strictly rising among the children of a node; of the root 0.
    """

    first_child: torch.Tensor
    node_codes: torch.Tensor


class TrieStep(NamedTuple):
    """What `code_trie_step` returns: the next beams of each batch row, best first.

    Attributes
    ----------
    states : Tensor [B, width], int64
        Nodes, -1 for a dead beam.
    codes : Tensor [B, width], int64
        The code by which each beam goes on; 0 for a dead one.
    scores : Tensor [B, width], float32
        -inf for a dead beam.
    parents : Tensor [B, width], int64
        The beam that each comes from, by which caches are reordered; 0 for a dead one.
    """

    states: torch.Tensor
    codes: torch.Tensor
    scores: torch.Tensor
    parents: torch.Tensor


def _cpu(first_child, node_codes, states, logits, scores, width, renormalise):
    first_child, node_codes, states, logits, scores = (
        part.contiguous() for part in (first_child, node_codes, states, logits, scores)
    )
    batch, beams = states.shape
    n_codes = logits.shape[2]
    inner = first_child.shape[0] - 1
    out = TrieStep(
        torch.empty((batch, width), dtype=torch.int64),
        torch.empty((batch, width), dtype=torch.int64),
        torch.empty((batch, width), dtype=torch.float32),
        torch.empty((batch, width), dtype=torch.int64),
    )
    scratch = torch.empty(_C.code_trie_scratch(batch, beams, n_codes, width) + 64, dtype=torch.uint8)
    in_states, in_scores, in_codes, in_logits = _KERNELS[node_codes.dtype, logits.dtype](
        (
            *(part.data_ptr() for part in (first_child, node_codes, states, logits, scores, scratch)),
            *(part.data_ptr() for part in out),
            inner,
            batch,
            beams,
            n_codes,
            width,
            renormalise,
        )
    )
    if in_states >= 0:
        row, beam = divmod(in_states, beams)
        raise IndexError(
            f"{_NAME}: states[{row}, {beam}] = {int(states[row, beam])} is outside [-1, {inner}), nodes above leaves"
        )
    if in_scores >= 0:
        row, beam = divmod(in_scores, beams)
        raise ValueError(f"{_NAME}: scores[{row}, {beam}] must be finite or -inf, got {float(scores[row, beam])}")
    if in_codes >= 0:
        row, beam = divmod(in_codes, beams)
        last = int(node_codes[int(first_child[int(states[row, beam]) + 1]) - 1])
        raise ValueError(
            f"{_NAME}: logits must have a column for each code, got {n_codes} for node {int(states[row, beam])}, which"
            f" goes on by code {last}"
        )
    if in_logits >= 0:
        beam, code = divmod(in_logits, n_codes)
        row, beam = divmod(beam, beams)
        raise ValueError(
            f"{_NAME}: logits[{row}, {beam}, {code}] must be finite or -inf, got {float(logits[row, beam, code])}"
        )
    return tuple(out)


def _fake(first_child, node_codes, states, logits, scores, width, renormalise):
    shape = (states.shape[0], width)
    whole = states.new_empty(shape, dtype=torch.int64)
    return whole, torch.empty_like(whole), states.new_empty(shape, dtype=torch.float32), torch.empty_like(whole)


def _expected(first_child, node_codes, states, logits, scores, width, renormalise):
    return tuple(reference(TrieArrays(first_child, node_codes), states, logits, scores, width, renormalise=renormalise))


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    first_child = torch.tensor([1, 3, 5, 6, 8], dtype=torch.int32)  # a root, two and then one node with children
    codes = torch.tensor([0, 1, 4, 0, 2, 3, 1, 4])
    for dtype, kind in ((torch.float32, torch.uint8), (torch.bfloat16, torch.uint16)):
        for batch, beams, width in ((0, 2, 3), (2, 1, 4), (3, 4, 2), (1, 0, 2), (2, 3, 0)):
            states = torch.randint(-1, 4, (batch, beams), generator=generator)
            logits = torch.randn(batch, beams, 5, generator=generator).to(dtype)
            scores = torch.randn(batch, beams, generator=generator)
            for renormalise in (False, True):
                yield first_child, codes.to(kind), states, logits, scores, width, renormalise


def reference(
    trie: Any,
    states: torch.Tensor,
    logits: torch.Tensor,
    scores: torch.Tensor,
    width: int,
    *,
    renormalise: bool,
) -> TrieStep:
    """The same in plain torch: every code's score, -inf where it does not continue the prefix, and a stable sort."""
    if states.dim() == 1:
        states, logits, scores = states[:, None], logits[:, None], scores[:, None]
    batch, beams, n_codes = logits.shape
    first_child, node_codes = trie.first_child.long(), trie.node_codes.long()
    allowed = torch.zeros(logits.shape, dtype=torch.bool)
    children = torch.full(logits.shape, -1, dtype=torch.int64)
    for row in range(batch):
        for beam in range(beams):
            state = int(states[row, beam])
            if state >= 0:
                nodes = torch.arange(int(first_child[state]), int(first_child[state + 1]))
                allowed[row, beam, node_codes[nodes]] = True
                children[row, beam, node_codes[nodes]] = nodes
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if renormalise:
        wide = wide.masked_fill(~allowed, -torch.inf)
    total = scores[..., None] + (wide - wide.logsumexp(-1, keepdim=True))
    total = total.masked_fill(~allowed | total.isnan(), -torch.inf).reshape(batch, beams * n_codes)
    order = total.argsort(dim=1, descending=True, stable=True)[:, :width]
    best = total.gather(1, order)
    alive = best > -torch.inf
    found = TrieStep(
        children.reshape(batch, beams * n_codes).gather(1, order).masked_fill(~alive, -1),
        (order % max(n_codes, 1)).masked_fill(~alive, 0),
        best,
        (order // max(n_codes, 1)).masked_fill(~alive, 0),
    )
    missing = (0, width - order.shape[1])
    return TrieStep(
        *(
            torch.nn.functional.pad(part, missing, value=value)
            for part, value in zip(found, (-1, 0, -torch.inf, 0), strict=True)
        )
    )


_op = define(
    "code_trie_step(Tensor first_child, Tensor node_codes, Tensor states, Tensor logits, Tensor scores, SymInt width,"
    " bool renormalise) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
)


def code_trie_step(
    trie: Any,
    states: torch.Tensor,
    logits: torch.Tensor,
    scores: torch.Tensor,
    width: int,
    *,
    renormalise: bool,
) -> TrieStep:
    """Extend every beam by every code that continues its prefix, and keep the best of each batch row.

    .. math:: s_{b,w,c} = \\text{scores}_{b,w} + x_{b,w,c} - \\log \\sum_{c'} \\exp x_{b,w,c'}

    Parameters
    ----------
    trie : TrieArrays, or an object with attributes first_child and node_codes
        Its arrays are trusted: `index.CodeTrie` makes and checks them.
    states : Tensor [B, W] or [B], int64
        The node of each beam, in [0, V), or -1 for a dead one. The root is 0.
    logits : Tensor [B, W, K] or [B, K], float32 or bfloat16
        x: what the model gives for each code; -inf for an impossible one. Not read for dead beams.
    scores : Tensor [B, W] or [B], float32
        The log-probability of each beam so far, 0 at the root; -inf makes a beam dead.
    width : int
        Beams a batch row to return; may exceed the candidates.
    renormalise : bool
        Which distribution a step has. False: the model's own softmax over all K codes; the score of a path is its joint
        probability under the model, and the probabilities of all paths in the tree sum to less than 1, by what the
        model gives to codes that no item has. True: the softmax over the codes that continue the prefix, the others not
        even read; then the probabilities of all paths in the tree sum to 1. The two rank differently.

    Returns
    -------
    TrieStep
        states, codes, scores, parents [B, width], sorted by score descending, ties by lowest parent, then lowest code.
        What is missing is dead: state -1, score -inf, code and parent 0.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        A shape that does not fit; logits that are read and are NaN or +inf; scores that are; a child whose code is K or
        more.
    IndexError
        A state out of range; leaves, which have no children, are.

    Notes
    -----
    The log-softmax is part of the step: no log-probabilities are stored. z, the logarithm of the sum, is the same to
    the last bit on every instruction set, for any B and number of threads; it differs from the exact one by at most
    (K / 16 + 8) 2^-24 + 2^-24 |z|. Inference only: logits and scores that require a gradient are detached.
    Backends: CPU.

    References
    ----------
    Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023; STATIC, arXiv 2602.22647 (the tree as
    flat arrays).
    """
    missing = [name for name in TrieArrays._fields if not hasattr(trie, name)]
    if missing:
        raise TypeError(
            f"{_NAME}: trie must have attributes {', '.join(TrieArrays._fields)},"
            f" got {type(trie).__name__} without {missing[0]}"
        )
    _check.tensor(_NAME, "states", states, dtypes=[torch.int64])
    device = states.device
    alone = states.dim() == 1
    shape = ["B"] if alone else ["B", "W"]
    _check.tensor(_NAME, "states", states, shape=shape)
    _check.tensor(_NAME, "logits", logits, dtypes=_LOGITS, shape=[*states.shape, "K"], device=device)
    _check.tensor(_NAME, "scores", scores, dtypes=[torch.float32], shape=list(states.shape), device=device)
    _check.tensor(_NAME, "first_child", trie.first_child, dtypes=[torch.int32], shape=["V + 1"], device=device)
    _check.tensor(_NAME, "node_codes", trie.node_codes, dtypes=_CODES, shape=["nodes"], device=device)
    _check.at_least(_NAME, "width", width, 0)
    if logits.shape[-1] * (1 if alone else states.shape[1]) >= 2**31:
        raise ValueError(f"{_NAME}: W K must be below 2**31, got logits of shape {list(logits.shape)}")
    if alone:
        states, logits, scores = states[:, None], logits[:, None], scores[:, None]
    call = _cpu if unwatched(states, logits, scores) else _op
    return TrieStep(
        *call(trie.first_child, trie.node_codes, states, logits.detach(), scores.detach(), width, bool(renormalise))
    )


code_trie_step.reference = reference
