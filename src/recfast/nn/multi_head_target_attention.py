"""Multi-head attention of a candidate over its user's history, with the projections around it."""

from __future__ import annotations

import torch
from torch import nn

from recfast.ops import attention_top_k, target_attention

_SCORES = ("softmax", "relu", "silu", "none")


class MultiHeadTargetAttention(nn.Module):
    r"""Attend from each candidate to what its user did, in several heads.

    .. math::
        s_{chl} = (W_q q_c)_h^\top (W_k k_l)_h / \sqrt{d_h}, \qquad
        o_c = W_o\,\big[\textstyle\sum_l p_{chl}\,(W_v v_l)_h\big]_{h=1..H} \;(+\; q_c)

    with :math:`p` as in `ops.target_attention`. FuxiCTR's layer of the same name is the default (softmax, no biases);
    QIN's is ``heads=1, score="relu", residual=True``; TWIN's second stage has `top_k`.

    Parameters
    ----------
    dim : int
        Width of the keys.
    heads : int
        Must divide `attention_dim` (and `value_dim`, without projections).
    query_dim : int, optional
        Width of the candidates; `dim` when left out.
    value_dim : int, optional
        Width of values given apart from the keys; the keys themselves are the values when left out.
    attention_dim : int, optional
        Width of all heads together after the projections; `dim` when left out.
    out_dim : int, optional
        Width of the answer; `dim` when left out (without projections it is that of the values).
    score : {"softmax", "relu", "silu", "none"}
        How scores become weights.
    top_k : int, optional
        Attend only to the so many rows that score highest over all heads together.
    bias : bool
        Biases in the projections.
    projections : bool
        False leaves all four out: queries and keys must have one width, and the answer is the values'.
    residual : bool
        Add the candidate to the answer; `out_dim` must then be `query_dim`.
    scale : bool or float
        True divides scores by the root of a head's width, False does not; a number multiplies them.
    fold : bool
        Fold `W_k` into the queries and `W_v` into the answer, so that keys are read as they are and their projections
        (two rows of `attention_dim` a step of history, kept for backward) never exist. The same function but for
        rounding, with `heads` times `dim` instead of `attention_dim` products a step and candidate: it pays below
        about ``attention_dim / heads`` candidates a user. Not with biases.

    Attributes
    ----------
    w_q, w_k, w_v, w_o : nn.Linear, or None without projections

    References
    ----------
    Vaswani et al., "Attention is all you need", NeurIPS 2017, arXiv 1706.03762.

    Examples
    --------
    >>> layer = MultiHeadTargetAttention(8, 2)
    >>> query, keys = torch.randn(3, 8), torch.randn(5, 8)
    >>> layer(query, keys, torch.tensor([0, 4, 5]), torch.tensor([0, 1, 3])).shape    # two users, 1 and 2 candidates
    torch.Size([3, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        query_dim: int | None = None,
        value_dim: int | None = None,
        attention_dim: int | None = None,
        out_dim: int | None = None,
        score: str = "softmax",
        top_k: int | None = None,
        bias: bool = False,
        projections: bool = True,
        residual: bool = False,
        scale: bool | float = True,
        fold: bool = False,
    ) -> None:
        super().__init__()
        own_values = value_dim is not None
        query_dim = dim if query_dim is None else query_dim
        value_dim = dim if value_dim is None else value_dim
        attention_dim = dim if attention_dim is None else attention_dim
        if out_dim is None:
            out_dim = dim if projections else value_dim
        widths = {
            "dim": dim,
            "heads": heads,
            "query_dim": query_dim,
            "value_dim": value_dim,
            "attention_dim": attention_dim,
            "out_dim": out_dim,
        }
        for name, value in widths.items():
            if value < 1:
                raise ValueError(f"MultiHeadTargetAttention: {name} must be at least 1, got {value}")
        if attention_dim % heads:
            raise ValueError(
                f"MultiHeadTargetAttention: heads must divide attention_dim = {attention_dim}, got {heads}"
            )
        if score not in _SCORES:
            raise ValueError(f"MultiHeadTargetAttention: score must be one of {', '.join(_SCORES)}, got {score!r}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"MultiHeadTargetAttention: top_k must be at least 1, got {top_k}")
        if not projections:
            for name, value, wanted in (
                ("query_dim", query_dim, dim),
                ("attention_dim", attention_dim, dim),
                ("out_dim", out_dim, value_dim),
            ):
                if value != wanted:
                    raise ValueError(
                        f"MultiHeadTargetAttention: {name} must be {wanted} without projections, got {value}"
                    )
            if value_dim % heads:
                raise ValueError(f"MultiHeadTargetAttention: heads must divide value_dim = {value_dim}, got {heads}")
        if residual and out_dim != query_dim:
            raise ValueError(
                f"MultiHeadTargetAttention: out_dim must be query_dim = {query_dim} with residual, got {out_dim}"
            )
        if fold and (bias or not projections):
            raise ValueError("MultiHeadTargetAttention: fold needs projections without bias")
        self.dim, self.heads, self.query_dim, self.value_dim = dim, heads, query_dim, value_dim
        self.attention_dim, self.out_dim, self.score, self.top_k = attention_dim, out_dim, score, top_k
        self.own_values, self.residual, self.fold = own_values, residual, fold
        head_dim = attention_dim // heads
        self.scale = head_dim**-0.5 if scale is True else 1.0 if scale is False else float(scale)
        self.w_q = nn.Linear(query_dim, attention_dim, bias=bias) if projections else None
        self.w_k = nn.Linear(dim, attention_dim, bias=bias) if projections else None
        self.w_v = nn.Linear(value_dim, attention_dim, bias=bias) if projections else None
        self.w_o = nn.Linear(attention_dim, out_dim, bias=bias) if projections else None

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        offsets: torch.Tensor,
        candidate_offsets: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what each candidate finds in its user's history.

        Parameters
        ----------
        query : Tensor [Nc, query_dim]
        keys : Tensor [T, dim], or padded [B, L, dim]
        offsets : Tensor [B + 1], or the lengths [B] of padded keys
        candidate_offsets : Tensor [B + 1], optional
            Left out, each user has one candidate.
        values : Tensor like `keys` but for its width `value_dim`
            Given if and only if `value_dim` was.
        positions : Tensor [Nc, K], optional
            As in `ops.target_attention`; not together with `top_k`.

        Returns
        -------
        Tensor [Nc, out_dim]. Where the history is empty, the attention is 0: what is left are the bias of `w_o` and the
        residual.
        """
        if (values is not None) != self.own_values:
            raise ValueError(
                "MultiHeadTargetAttention: values must be "
                + ("given, since value_dim was" if self.own_values else "left out, since value_dim was")
            )
        values = keys if values is None else values
        if self.fold:
            answer = self._folded(query, keys, offsets, candidate_offsets, values, positions)
        else:
            parts = (query, keys, values)
            if self.w_q is not None:
                parts = (self.w_q(query), self.w_k(keys), self.w_v(values))
            attended = target_attention(
                *map(self._split, parts),
                offsets,
                candidate_offsets=candidate_offsets,
                scale=self.scale,
                score=self.score,
                top_k=self.top_k,
                positions=positions,
            )
            answer = attended.flatten(1)
            if self.w_o is not None:
                answer = self.w_o(answer)
        return answer + query if self.residual else answer

    def _folded(self, query, keys, offsets, candidate_offsets, values, positions) -> torch.Tensor:
        """Each head is a candidate of its own, with the query W_k^T (W_q q) of the keys' width."""
        heads = self.heads
        w_k, w_v = (layer.weight.unflatten(0, (heads, -1)) for layer in (self.w_k, self.w_v))
        folded = torch.einsum("cha,had->chd", self._split(self.w_q(query)), w_k)
        keys, values = keys.unsqueeze(-2), values.unsqueeze(-2)
        if self.top_k is not None:
            if positions is not None:
                raise ValueError("MultiHeadTargetAttention: top_k and positions exclude each other, got both")
            # One list serves all heads: that of the scores' sum.
            total = folded.detach().sum(1, keepdim=True)
            positions = attention_top_k(
                total, keys.detach(), offsets, self.top_k, candidate_offsets=candidate_offsets, scale=self.scale
            )
        if positions is not None:
            positions = positions.repeat_interleave(heads, 0)
        if candidate_offsets is None:
            users = offsets.numel() - (keys.dim() == 3)
            candidate_offsets = torch.arange(users + 1, device=offsets.device)
        attended = target_attention(
            folded.flatten(0, 1).unsqueeze(1),
            keys,
            values,
            offsets,
            candidate_offsets=candidate_offsets * heads,
            scale=self.scale,
            score=self.score,
            positions=positions,
        )
        attended = attended.view(query.shape[0], heads, self.value_dim)
        return self.w_o(torch.einsum("chd,had->cha", attended, w_v).flatten(1))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, score={self.score!r}, top_k={self.top_k}, fold={self.fold}"
