"""ETA: attention over the events of a long history whose hash codes are nearest to the candidate's."""

from __future__ import annotations

import torch
from torch import nn

from recfast.nn.multi_head_target_attention import MultiHeadTargetAttention
from recfast.ops import hamming_top_k, simhash


class ETA(nn.Module):
    """Find the `k` events nearest to a candidate by their hashes, and attend to those in several heads.

    The search reads one word an event (for 64 bits) instead of its embedding. Hashes are the signs of fixed random
    projections of the present embeddings, so that the search follows them as they learn; gradients go through the
    events that were found, not through the choice.

    Parameters
    ----------
    dim : int
        Width of queries and keys.
    heads : int
        Heads of the attention; must divide `attention_dim`.
    bits : int
        Length of a hash: 1 to 64, or a multiple of 64.
    k : int
        Events that a candidate attends to; all where the history is shorter.
    attention_dim : int, optional
        Width of all heads together; `dim` when left out.
    seed : int
        Of the projections (a buffer `projections` [dim, words, bits of a word], part of the state: saved codes fit only
        the projections that made them).
    fold : bool
        As in `MultiHeadTargetAttention`: read keys as they are, so that only the events found are ever projected.

    Attributes
    ----------
    attention : MultiHeadTargetAttention

    References
    ----------
    Chen et al., "Efficient Long Sequential User Data Modeling for Click-Through Rate Prediction", arXiv 2108.04468
    (first as "End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model").

    Examples
    --------
    >>> eta = ETA(8, heads=2, bits=16, k=2)
    >>> keys, offsets = torch.randn(5, 8), torch.tensor([0, 4, 5])
    >>> eta(torch.randn(3, 8), keys, offsets, torch.tensor([0, 1, 3])).shape    # two users, 1 and 2 candidates
    torch.Size([3, 8])
    """

    projections: torch.Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        bits: int = 64,
        k: int = 50,
        *,
        attention_dim: int | None = None,
        seed: int = 0,
        fold: bool = True,
    ) -> None:
        super().__init__()
        if dim < 1 or k < 1 or bits < 1 or (bits > 64 and bits % 64):
            raise ValueError(
                "ETA: dim and k must be positive and bits 1 to 64 or a multiple of 64, "
                f"got dim={dim}, k={k}, bits={bits}"
            )
        self.dim, self.bits, self.k, self.seed = dim, bits, k, seed
        words = max(bits // 64, 1)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("projections", torch.randn(dim, words, bits // words, generator=generator))
        self.attention = MultiHeadTargetAttention(dim, heads, attention_dim=attention_dim, fold=fold)

    def codes(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The hashes of rows [..., D], or padded [B, L, D] with `lengths`: [..., words]. See `ops.simhash`.

        int64, or uint8 for `bits <= 8`.
        """
        return simhash(x, self.projections, lengths=lengths)

    def search(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        offsets: torch.Tensor,
        candidate_offsets: torch.Tensor | None = None,
        key_codes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The positions [Nc, k] that each candidate attends to, nearest first; see `ops.hamming_top_k`."""
        key_codes = self.codes(keys, offsets if keys.dim() == 3 else None) if key_codes is None else key_codes
        return hamming_top_k(self.codes(query), key_codes, offsets, self.k, candidate_offsets=candidate_offsets)

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        offsets: torch.Tensor,
        candidate_offsets: torch.Tensor | None = None,
        key_codes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the interest in each candidate.

        Parameters
        ----------
        query : Tensor [Nc, D]
        keys : Tensor [T, D], or padded [B, L, D] (read in place)
        offsets : Tensor [B + 1], or the lengths [B] of padded keys
        candidate_offsets : Tensor [B + 1], optional
            Left out, each user has one candidate.
        key_codes : Tensor [T, words] or [B, L, words], optional
            What `codes` gave for these keys, if kept.

        Returns
        -------
        Tensor [Nc, D]; 0 where the history is empty.
        """
        positions = self.search(query, keys, offsets, candidate_offsets, key_codes)
        return self.attention(query, keys, offsets, candidate_offsets, positions=positions)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bits={self.bits}, k={self.k}, seed={self.seed}"
