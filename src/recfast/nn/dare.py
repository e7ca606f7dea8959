"""Attention and representation over embeddings of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recfast.ops import target_attention


class DARE(nn.Module):
    r"""Search and weigh with one embedding, represent with another.

    .. math::
        s_{cl} = \sum_i \frac{a_c^{(i)\top} a_l^{(i)}}{\sqrt{d_i}}, \qquad
        r_c = \sum_{l \in \mathrm{top}_k(s_c)} \mathrm{softmax}(s_c)_l \, e_l, \qquad
        f_c = [\,r_c,\; e_c \odot r_c\,]

    :math:`a` are attention embeddings, :math:`e` representation embeddings. They come from different tables, so that
    the two gradients, which point in different directions, do not share parameters; and :math:`a` may be narrower,
    which makes the search over a long history cheaper. The module owns no weights: the tables belong to the model.

    Parameters
    ----------
    attention_dim, representation_dim : int
        Widths of :math:`a` and :math:`e`.
    top_k : int, optional
        How many steps of the history are attended to; all of them when left out.
    parts : Sequence[int], optional
        Widths :math:`d_i` of the fields that :math:`a` consists of, such as item and time: the score of each is
        divided by the root of its own width, as the published code does. One field when left out.
    cross : bool
        Append :math:`e_c \odot r_c` ("target-aware representation"); False returns :math:`r_c` alone.

    References
    ----------
    Feng et al., "Long-sequence Recommendation Models Need Decoupled Embeddings", ICLR 2025, arXiv 2410.02604.

    Examples
    --------
    >>> unit = DARE(4, 16, top_k=2)
    >>> candidates = torch.randn(3, 4), torch.randn(3, 16)
    >>> history = torch.randn(5, 4), torch.randn(5, 16)
    >>> unit(*candidates, *history, torch.tensor([0, 4, 5]), torch.tensor([0, 1, 3])).shape
    torch.Size([3, 32])
    """

    def __init__(
        self,
        attention_dim: int,
        representation_dim: int,
        *,
        top_k: int | None = None,
        parts: Sequence[int] | None = None,
        cross: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("attention_dim", attention_dim), ("representation_dim", representation_dim)):
            if value < 1:
                raise ValueError(f"DARE: {name} must be at least 1, got {value}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"DARE: top_k must be at least 1, got {top_k}")
        parts = (attention_dim,) if parts is None else tuple(parts)
        if min(parts, default=0) < 1 or sum(parts) != attention_dim:
            raise ValueError(f"DARE: parts must be positive and add up to attention_dim = {attention_dim}, got {parts}")
        self.attention_dim, self.representation_dim, self.top_k = attention_dim, representation_dim, top_k
        self.parts, self.cross = parts, cross
        self.out_dim = (1 + cross) * representation_dim
        scales = torch.cat([torch.full((width,), width**-0.5, dtype=torch.float64) for width in parts])
        self.register_buffer("_scales", scales, persistent=False)

    def forward(
        self,
        query_attention: torch.Tensor,
        query_representation: torch.Tensor,
        keys_attention: torch.Tensor,
        keys_representation: torch.Tensor,
        offsets: torch.Tensor,
        candidate_offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the features of each candidate.

        Parameters
        ----------
        query_attention : Tensor [Nc, attention_dim]
        query_representation : Tensor [Nc, representation_dim]
        keys_attention : Tensor [T, attention_dim], or padded [B, L, attention_dim]
        keys_representation : Tensor [T, representation_dim], or padded [B, L, representation_dim]
        offsets : Tensor [B + 1], or the lengths [B] of padded keys
        candidate_offsets : Tensor [B + 1], optional
            Left out, each user has one candidate.

        Returns
        -------
        Tensor [Nc, 2 representation_dim], or [Nc, representation_dim] without `cross`; 0 where the history is empty.
        """
        single = len(self.parts) == 1
        query = query_attention if single else query_attention * self._scales.to(query_attention.dtype)
        r = target_attention(
            query.unsqueeze(1),
            keys_attention.unsqueeze(-2),
            keys_representation.unsqueeze(-2),
            offsets,
            candidate_offsets=candidate_offsets,
            scale=self.attention_dim**-0.5 if single else 1.0,
            top_k=self.top_k,
        ).squeeze(1)
        return torch.cat([r, query_representation * r], 1) if self.cross else r

    def extra_repr(self) -> str:
        return (
            f"attention_dim={self.attention_dim}, representation_dim={self.representation_dim}, top_k={self.top_k}, "
            f"parts={self.parts}, cross={self.cross}"
        )
