"""SDIM: a long history as a table of sums, looked up by the hash of each candidate."""

from __future__ import annotations

import torch
from torch import nn

from recfast.ops import sdim_append, sdim_attention, sdim_history_attention, sdim_table, simhash


class SDIM(nn.Module):
    """Attention over a history of any length at a cost per candidate that does not depend on its length.

    Keys and candidates are hashed by the signs of fixed random projections; a candidate attends to the events it
    collides with, through a table of their sums. It has no parameters: gradients reach `values` (the keys, unless given
    apart), which is how the embeddings learn.

    Parameters
    ----------
    dim : int
        Width of queries and keys.
    tables : int
        Number of hashes M; each candidate looks up one bucket of each. The paper has 48 hash functions: 16 of 3 bits.
    bits : int
        Bits of a hash, 1 to 8. More bits mean fewer collisions: attention to nearer keys only.
    seed : int
        Of the projections (a buffer `projections` [dim, tables, bits], part of the state: a saved table fits only the
        projections that made it, so cast the module to another dtype before the first table, not after).
    normalize : bool
        Divide each bucket's sum by its length first, as the paper does.

    References
    ----------
    Cao et al., "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", CIKM 2022,
    arXiv 2205.10249.

    Examples
    --------
    >>> sdim = SDIM(8)
    >>> keys, offsets = torch.randn(5, 8), torch.tensor([0, 4, 5])
    >>> sdim(torch.randn(3, 8), keys, offsets, torch.tensor([0, 1, 3])).shape    # two users, 1 and 2 candidates
    torch.Size([3, 8])
    >>> table = sdim.table(keys, offsets)                                        # kept with the users
    >>> table = sdim.append(table, torch.randn(1, 8), torch.tensor([0, 0, 1]))   # the second one did something
    >>> sdim(torch.randn(2, 8), table=table).shape
    torch.Size([2, 8])
    """

    projections: torch.Tensor

    def __init__(self, dim: int, tables: int = 16, bits: int = 3, *, seed: int = 0, normalize: bool = True) -> None:
        super().__init__()
        if dim < 1 or tables < 1 or not 1 <= bits <= 8:
            raise ValueError(
                f"SDIM: dim and tables must be positive and bits 1 to 8, got dim={dim}, tables={tables}, bits={bits}"
            )
        self.dim, self.tables, self.bits, self.seed, self.normalize = dim, tables, bits, seed, normalize
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("projections", torch.randn(dim, tables, bits, generator=generator))

    def codes(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The hashes of rows [..., D], or padded [B, L, D] with `lengths`: uint8 [..., tables]. See `ops.simhash`."""
        return simhash(x, self.projections, lengths=lengths)

    def table(self, keys: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        """Sum each user's values by bucket; see `ops.sdim_table`.

        Parameters
        ----------
        keys : Tensor [T, D], or padded [B, L, D] (read in place)
        offsets : Tensor [B + 1], or the lengths [B] of padded keys
        values : Tensor like `keys` but for its width Dv, optional
            `keys` where left out.

        Returns
        -------
        Tensor [B, tables, 2**bits, Dv], float32 (float64 for float64 values)
        """
        values = keys if values is None else values
        return sdim_table(self._key_codes(keys, offsets), values, offsets, bits=self.bits)

    def append(
        self, table: torch.Tensor, keys: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Continue a saved table with new events, given like those of `table`; see `ops.sdim_append`."""
        values = keys if values is None else values
        return sdim_append(table, self._key_codes(keys, offsets), values, offsets)

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        candidate_offsets: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the interest in each candidate.

        Parameters
        ----------
        query : Tensor [Nc, D]
        keys, offsets, values
            The histories, as for `table`; not needed where that is given.
        candidate_offsets : Tensor [B + 1], optional
            Left out, each user has one candidate.
        table : Tensor [B, tables, 2**bits, Dv], optional
            Made before, from these or other histories of the same users.

        Returns
        -------
        Tensor [Nc, Dv], dtype of `query`; 0 where the history is empty.
        """
        codes, shared = self.codes(query), {"candidate_offsets": candidate_offsets, "normalize": self.normalize}
        if table is not None:
            if keys is not None or offsets is not None or values is not None:
                raise ValueError("SDIM: give keys, offsets and values, or a table of them, not both")
            return sdim_attention(codes, table, **shared).to(query.dtype)
        if keys is None or offsets is None:
            raise ValueError("SDIM: keys and offsets are needed where table is left out")
        values = keys if values is None else values
        if self._keeps_table(values, offsets, candidate_offsets):
            out = sdim_attention(codes, self.table(keys, offsets, values), **shared)
        else:
            key_codes = self._key_codes(keys, offsets)
            out = sdim_history_attention(codes, key_codes, values, offsets, bits=self.bits, **shared)
        return out.to(query.dtype)

    def _key_codes(self, keys: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.codes(keys, offsets if keys.dim() == 3 else None)

    def _keeps_table(self, values, offsets, candidate_offsets) -> bool:
        """Whether backward had better find the tables than sum them again; the answer is the same, bit by bit.

        It had where histories are several times longer than tables and most of a table is asked for.
        """
        if candidate_offsets is None or not (torch.is_grad_enabled() and values.requires_grad):
            return False
        users = offsets.shape[0] - (values.dim() == 2)
        return values[..., 0].numel() > 4 * users * self.tables * 2**self.bits

    def extra_repr(self) -> str:
        return f"dim={self.dim}, tables={self.tables}, bits={self.bits}, seed={self.seed}, normalize={self.normalize}"
