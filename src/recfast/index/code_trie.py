"""A prefix tree of item codes, and beam search over it: retrieval by a model that writes codes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from recfast import ops
from recfast.errors import InputError
from recfast.index import _file
from recfast.index._arrays import as_ids, as_tensor

_MOST_CODES = 1 << 16
_MOST_NODES = 2**31


class CodeTrie:
    """The distinct codes of items as a prefix tree, made by `from_codes`.

    Nodes are numbered level after level, within a level in the order of their prefixes; node 0 is the root, the leaves
    come last. A node takes 1 byte for its code (2 where a level has more than 256 codes), one with children 4 bytes
    more, a leaf 4 bytes more, an item 8 bytes.

    Attributes
    ----------
    first_child : Tensor [V + 1], int32
        The children of node v, one of the V above the leaves, are the nodes `first_child[v]:first_child[v + 1]`.
    node_codes : Tensor [nodes], uint8 or uint16
        The last code of each node's prefix, strictly rising among the children of a node; of the root 0.
    leaf_items : Tensor [leaves + 1], int32
        Where the items of each leaf begin in `ids`.
    ids : Tensor [N], int64
        Items leaf after leaf, lowest first.
    n_codes : tuple of int
        Codes a level.
    """

    first_child: torch.Tensor
    node_codes: torch.Tensor
    leaf_items: torch.Tensor
    ids: torch.Tensor
    n_codes: tuple[int, ...]

    def __init__(self) -> None:
        raise TypeError("CodeTrie: is made by CodeTrie.from_codes or CodeTrie.load")

    @classmethod
    def _make(cls, first_child: Any, node_codes: Any, leaf_items: Any, ids: Any, n_codes: Sequence[int]) -> CodeTrie:
        trie = cls.__new__(cls)
        trie.first_child, trie.node_codes = as_tensor("", "", first_child), as_tensor("", "", node_codes)
        trie.leaf_items, trie.ids = as_tensor("", "", leaf_items), as_tensor("", "", ids)
        trie.n_codes = tuple(int(count) for count in n_codes)
        return trie

    @classmethod
    def from_codes(cls, codes: Any, n_codes: int | Sequence[int] = 256, ids: Any = None) -> CodeTrie:
        """Make the tree of the rows of `codes`.

        Parameters
        ----------
        codes : array or Tensor [N, M], integers
            Row i has the codes of item i. Items may share all their codes, and one item may stand in several rows.
        n_codes : int or M of them
            K: codes lie in [0, K). At most 65,536.
        ids : integers [N], at least 0, optional
            What items are called; the number of the row where left out.

        Raises
        ------
        TypeError, ValueError, IndexError
            Something else than integers; a shape that does not fit; a code out of range.
        """
        place = "CodeTrie.from_codes"
        codes = as_tensor(place, "codes", codes).numpy()
        if codes.dtype.kind not in "iu":
            raise TypeError(f"{place}: codes must be integers, got {codes.dtype}")
        if codes.ndim != 2 or codes.shape[1] == 0:
            raise ValueError(f"{place}: codes must have shape [N, M] with M at least 1, got {list(codes.shape)}")
        n_items, levels = codes.shape
        counts = [n_codes] * levels if isinstance(n_codes, int) else [int(count) for count in n_codes]
        if len(counts) != levels:
            raise ValueError(f"{place}: n_codes must be one number or {levels}, got {len(counts)}")
        for level, count in enumerate(counts):
            if not 1 <= count <= _MOST_CODES:
                raise ValueError(f"{place}: n_codes must lie in [1, {_MOST_CODES}], got {count}")
            wrong = (codes[:, level] < 0) | (codes[:, level] >= count)
            if wrong.any():
                at = int(wrong.argmax())
                raise IndexError(f"{place}: codes[{at}, {level}] = {codes[at, level]} is outside [0, {count})")
        if n_items * levels >= _MOST_NODES:
            raise ValueError(f"{place}: codes must have fewer than 2**31 entries, got {list(codes.shape)}")
        names = np.arange(n_items, dtype=np.int64) if ids is None else as_ids(place, ids)
        if len(names) != n_items:
            raise ValueError(f"{place}: ids must have shape [{n_items}], got [{len(names)}]")

        order = _sorted_rows(codes, counts, None if ids is None else names)
        codes, names = codes[order], names[order]
        # Where a prefix of each length differs from that of the row before.
        fresh = np.zeros((n_items, levels), dtype=bool)
        if n_items:
            np.not_equal(codes[1:], codes[:-1], out=fresh[1:])
            np.logical_or.accumulate(fresh, axis=1, out=fresh)
            fresh[0] = True
        kind = np.uint8 if max(counts) <= 256 else np.uint16
        parts = [np.zeros(1, dtype=kind)]
        children = []
        size = 1
        parents = np.zeros(min(n_items, 1), dtype=np.int64)  # the first row of each node of the level before
        for level in range(levels):
            rows = fresh[:, level].nonzero()[0]
            parts.append(codes[rows, level].astype(kind))
            children.append(size + np.searchsorted(rows, parents))
            size += len(rows)
            parents = rows
        if n_items == 0:
            children = [np.ones(1, dtype=np.int64)]
        return cls._make(
            np.concatenate([*children, [size]]).astype(np.int32),
            np.concatenate(parts),
            np.append(parents, n_items).astype(np.int32),
            names,
            counts,
        )

    def __len__(self) -> int:
        """The number of nodes."""
        return len(self.node_codes)

    def __repr__(self) -> str:
        return f"CodeTrie({len(self.ids)} items, {self.n_leaves} leaves, {len(self)} nodes, {self.levels} levels)"

    @property
    def levels(self) -> int:
        """M: codes an item."""
        return len(self.n_codes)

    @property
    def n_leaves(self) -> int:
        """Distinct rows of codes."""
        return len(self.leaf_items) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in (self.first_child, self.node_codes, self.leaf_items, self.ids))

    def children(self, node: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The nodes below a node, int64 [n], and their codes, int64 [n]; none for a leaf.

        Raises
        ------
        IndexError
            No such node.
        """
        if not 0 <= node < len(self):
            raise IndexError(f"CodeTrie.children: node = {node} is outside [0, {len(self)})")
        if node >= len(self.first_child) - 1:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        first, last = int(self.first_child[node]), int(self.first_child[node + 1])
        return torch.arange(first, last), self.node_codes[first:last].long()

    def items(self, leaves: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The items of leaves.

        Parameters
        ----------
        leaves : array or Tensor [n], int64
            Nodes, as beam search ends with; -1 has no items.

        Returns
        -------
        ids : Tensor [T], int64
            Leaf after leaf, lowest first.
        offsets : Tensor [n + 1], int64

        Raises
        ------
        TypeError, ValueError, IndexError
            Not such a vector; a node that is no leaf.
        """
        place = "CodeTrie.items"
        leaves = as_tensor(place, "leaves", leaves)
        if leaves.dtype != torch.int64 or leaves.dim() != 1:
            raise ValueError(f"{place}: leaves must be int64 [n], got {leaves.dtype} {list(leaves.shape)}")
        first = len(self) - self.n_leaves
        wrong = (leaves != -1) & ((leaves < first) | (leaves >= len(self)))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise IndexError(f"{place}: leaves[{at}] = {int(leaves[at])} is outside [{first}, {len(self)}), the leaves")
        place_of = (leaves - first).clamp(min=0)
        bounds = self.leaf_items.long()
        begin = bounds[place_of] if self.n_leaves else torch.zeros_like(leaves)
        lengths = torch.where(leaves < 0, 0, bounds[(place_of + 1).clamp(max=self.n_leaves)] - begin)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(lengths)
        return self.ids[begin.repeat_interleave(lengths) + within], offsets

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tree to one file (safetensors), whole or not at all, with checksums over every byte."""
        arrays = {name: getattr(self, name).numpy() for name in ("first_child", "node_codes", "leaf_items", "ids")}
        _file.save(path, "CodeTrie", {"n_codes": list(self.n_codes)}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False) -> CodeTrie:
        """Read what `save` wrote; with `mmap` the file is mapped, so that processes share its memory.

        Raises
        ------
        InputError
            No such file; truncated, corrupt, or not such a file.
        """
        config, arrays = _file.load(path, "CodeTrie", mmap=mmap)
        try:
            parts = [arrays[name] for name in ("first_child", "node_codes", "leaf_items", "ids")]
            trie = cls._make(*parts, config["n_codes"])
            trie._check()
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"CodeTrie.load: {path} is corrupt: {error}") from error
        return trie

    def _check(self) -> None:
        """Raise ValueError unless the arrays are such as `from_codes` makes."""
        first_child, codes, leaf_items, ids = (
            part.numpy() for part in (self.first_child, self.node_codes, self.leaf_items, self.ids)
        )
        kinds = (np.int32, np.uint8 if max(self.n_codes) <= 256 else np.uint16, np.int32, np.int64)
        for part, kind in zip((first_child, codes, leaf_items, ids), kinds, strict=True):
            if part.ndim != 1 or part.dtype != kind:
                raise ValueError("an array has another shape or dtype")
        if len(first_child) < 2 or len(leaf_items) < 1 or len(codes) < 1:
            raise ValueError("an array is too short")
        if leaf_items[0] != 0 or leaf_items[-1] != len(ids) or (leaf_items[1:] <= leaf_items[:-1]).any():
            raise ValueError("the items of leaves do not follow each other")
        if first_child[0] != 1 or first_child[-1] != len(codes) or (first_child[1:] < first_child[:-1]).any():
            raise ValueError("the children of nodes do not follow each other")
        if len(ids) and (first_child[1:] == first_child[:-1]).any():
            raise ValueError("a node above the leaves has no children")
        if len(codes) - (len(leaf_items) - 1) != len(first_child) - 1:
            raise ValueError("the leaves are not the nodes without children")
        siblings = np.ones(len(codes), dtype=bool)
        siblings[first_child[first_child < len(codes)]] = False
        siblings[0] = False
        if (codes[1:][siblings[1:]] <= codes[:-1][siblings[1:]]).any():
            raise ValueError("the codes of a node's children do not rise")
        begin = 0
        end = 1
        for count in self.n_codes:
            if len(ids) and not 0 <= begin < end <= len(first_child) - 1:
                raise ValueError("the levels are not as many as n_codes has entries")
            if not len(ids):
                break
            begin, end = int(first_child[begin]), int(first_child[end])
            if int(codes[begin:end].max()) >= count:
                raise ValueError("a code is out of its level's range")
        if len(ids) and end != len(codes):
            raise ValueError("the levels are not as many as n_codes has entries")


def _sorted_rows(codes: np.ndarray, counts: Sequence[int], ids: np.ndarray | None) -> np.ndarray:
    """The order of rows by their codes, and of equal ones by id."""
    bits = [max(int(count - 1).bit_length(), 1) for count in counts]
    if sum(bits) <= 64:
        keys = np.zeros(len(codes), dtype=np.uint64)
        for level, width in enumerate(bits):
            keys = keys << np.uint64(width) | codes[:, level].astype(np.uint64)
        return np.argsort(keys, kind="stable") if ids is None else np.lexsort((ids, keys))
    columns = [codes[:, level] for level in reversed(range(codes.shape[1]))]
    return np.lexsort(columns if ids is None else [ids, *columns])


class BeamResult(NamedTuple):
    """What `constrained_beam` returns, best first.

    Attributes
    ----------
    scores : Tensor [B, k], float32
        Log-probabilities; -inf where there are fewer items.
    ids : Tensor [B, k], int64
        -1 where there are fewer.
    codes : Tensor [B, k, M], int64
        -1 where there are fewer.
    """

    scores: torch.Tensor
    ids: torch.Tensor
    codes: torch.Tensor


def constrained_beam(
    step: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    trie: CodeTrie,
    width: int,
    *,
    batch: int,
    renormalise: bool,
    k: int | None = None,
) -> BeamResult:
    """Find the items whose codes a model finds most probable, by a beam search that never leaves the tree.

    Parameters
    ----------
    step : callable (codes [B, W, t] int64, parents [B, W] int64 or None) -> logits [B, W, K] float32 or bfloat16
        The model: called for t = 0 .. M - 1 with the codes of each beam so far; W is 1 at first, then `width`.
        `parents` (None at first) say which beam of the call before each one continues: a cache `c [B, W, ...]` is
        reordered by `c[torch.arange(B)[:, None], parents]`. Dead beams have parent and codes 0; their logits are not
        read. K may be larger than the number of codes of a level.
    trie : CodeTrie
    width : int
        Beams a batch row, at least 1. Answers are exact where no beam that leads to one of them is ever dropped, for
        certain where `width` is no less than the number of prefixes of each length.
    batch : int
        B.
    renormalise : bool
        Which distribution the scores are of. False: the joint probability of an item's codes under the model, whose
        softmax is over all K codes at each step; what it gives to codes that no item has is lost, so that the items'
        probabilities sum to less than 1. True: at each step the softmax over the codes that some item has, so that
        those of all distinct rows of codes sum to 1. See `ops.code_trie_step`.
    k : int, optional
        Items a batch row; `width` where left out.

    Returns
    -------
    BeamResult
        scores [B, k], ids [B, k], codes [B, k, M]: by score descending, ties by lowest id. Items that share all codes
        share the score of their leaf; they are listed one by one.

    Raises
    ------
    TypeError, ValueError, IndexError
        Width or k out of range; logits of another dtype or shape, NaN or +inf.
    """
    place = "constrained_beam"
    for name, value, least in (("width", width, 1), ("batch", batch, 0), ("k", width if k is None else k, 0)):
        if value < least:
            raise ValueError(f"{place}: {name} must be at least {least}, got {value}")
    k = width if k is None else k
    states = torch.zeros((batch, 1), dtype=torch.int64)
    scores = torch.zeros((batch, 1), dtype=torch.float32)
    codes = torch.zeros((batch, 1, 0), dtype=torch.int64)
    parents = None
    every = torch.arange(batch)[:, None]
    for _ in range(trie.levels):
        logits = step(codes, parents)
        states, chosen, scores, parents = ops.code_trie_step(
            trie, states, logits, scores, width, renormalise=renormalise
        )
        codes = torch.cat([codes[every, parents], chosen[..., None]], dim=2)
        codes = codes.masked_fill((states < 0)[..., None], 0)
    return _best_items(trie, states, scores, codes, k)


def _best_items(trie: CodeTrie, states: torch.Tensor, scores: torch.Tensor, codes: torch.Tensor, k: int) -> BeamResult:
    batch, width = states.shape
    ids, offsets = trie.items(states.reshape(-1))
    beams = torch.arange(batch * width).repeat_interleave(offsets.diff())
    found = scores.reshape(-1)[beams]
    order = torch.from_numpy(np.lexsort((ids.numpy(), -found.numpy(), (beams // max(width, 1)).numpy())))
    ids, found, beams = ids[order], found[order], beams[order]
    rows = beams // max(width, 1)
    # The place of each among those of its batch row.
    firsts = torch.searchsorted(rows, torch.arange(batch))
    places = torch.arange(len(rows)) - firsts[rows]
    kept = places < k
    out = BeamResult(
        torch.full((batch, k), -torch.inf),
        torch.full((batch, k), -1, dtype=torch.int64),
        torch.full((batch, k, trie.levels), -1, dtype=torch.int64),
    )
    at = rows[kept], places[kept]
    out.scores[at], out.ids[at] = found[kept], ids[kept]
    out.codes[at] = codes.reshape(batch * width, trie.levels)[beams[kept]]
    return out
