"""The block of a sequential recommender: attention within each history, then a layer for each event."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.nn._padding import padding_of
from recfast.ops import sequence_attention

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class _Projections(nn.Module):
    """The weights of `torch.nn.MultiheadAttention`, under its names."""

    def __init__(self, dim: int, bias: bool, output_projection: bool) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim)) if bias else None
        self.out_proj = nn.Linear(dim, dim, bias=bias) if output_projection else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
        if self.out_proj is not None:
            self.out_proj.reset_parameters()
            if self.out_proj.bias is not None:
                nn.init.zeros_(self.out_proj.bias)


class TransformerBlock(nn.Module):
    r"""Multi-head attention within each sequence and a feed-forward layer, each with a residual.

    .. math::
        \text{pre: } \quad & a = x + \mathrm{Att}(N_1(x)), & y &= a + \mathrm{FF}(N_2(a)) \\
        \text{post: } \quad & a = N_1(x + \mathrm{Att}(x)), & y &= N_2(a + \mathrm{FF}(a))

    with :math:`\mathrm{FF}(x) = W_2\, \phi(W_1 x + b_1) + b_2`. Sequences are jagged, so that padding costs
    nothing; a padded tensor is taken too. The weights have the names they have in `torch.nn.TransformerEncoderLayer`,
    whose state can be loaded.

    Parameters
    ----------
    dim : int
        Width of an event.
    heads : int
        Divides `dim`.
    hidden : int, optional
        Width inside the feed-forward layer; `4 * dim` when left out.
    causal : bool
        Whether an event sees only itself and earlier ones.
    norm : {"pre", "post"}
    activation : {"relu", "gelu"}
    dropout : float in [0, 1)
        In training, of what attention and the feed-forward layer add, and of the latter's hidden units.
    attention_dropout : float in [0, 1), optional
        In training, of attention weights; `dropout` when left out.
    normalize_keys : bool
        False, with `norm="pre"`: only the queries are normalised, keys and values are made of x itself, as in SASRec.
    residual : {"input", "normalized"}
        What is added to, with `norm="pre"`: x, as in the formula and in SASRec's paper, or N(x), as in SASRec's
        published code, in both halves of the block.
    output_projection : bool
        False leaves out the linear layer after the heads, as SASRec does.
    bias : bool
        Whether linear layers and layer norms have one.
    eps : float
        Of the layer norms.

    References
    ----------
    Vaswani et al., "Attention is all you need", NeurIPS 2017. Kang and McAuley, "Self-attentive sequential
    recommendation", ICDM 2018, arXiv 1808.09781. Sun et al., "BERT4Rec", CIKM 2019, arXiv 1904.06690.

    Examples
    --------
    >>> block = TransformerBlock(8, 2, causal=True)
    >>> block(torch.randn(5, 8), torch.tensor([0, 4, 5])).shape    # two histories, of 4 events and of 1
    torch.Size([5, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        hidden: int | None = None,
        causal: bool,
        norm: str = "pre",
        activation: str = "relu",
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        normalize_keys: bool = True,
        residual: str = "input",
        output_projection: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        if dim < 1 or heads < 1 or hidden < 1:
            raise ValueError(
                f"TransformerBlock: dim, heads and hidden must be positive, got dim={dim}, heads={heads}, "
                f"hidden={hidden}"
            )
        if dim % heads:
            raise ValueError(f"TransformerBlock: heads must divide dim, got dim={dim}, heads={heads}")
        for name, value, allowed in (
            ("norm", norm, ("pre", "post")),
            ("activation", activation, tuple(_ACTIVATIONS)),
            ("residual", residual, ("input", "normalized")),
        ):
            if value not in allowed:
                raise ValueError(f"TransformerBlock: {name} must be one of {', '.join(allowed)}, got {value!r}")
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        for name, value in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"TransformerBlock: {name} must lie in [0, 1), got {value}")
        if norm == "post" and (not normalize_keys or residual == "normalized"):
            raise ValueError('TransformerBlock: normalize_keys and residual are options of norm="pre" alone')
        self.dim, self.heads, self.hidden, self.causal, self.norm = dim, heads, hidden, bool(causal), norm
        self.activation, self.dropout, self.attention_dropout = activation, dropout, attention_dropout
        self.normalize_keys, self.residual = normalize_keys, residual
        self.self_attn = _Projections(dim, bias, output_projection)
        self.linear1 = nn.Linear(dim, hidden, bias=bias)
        self.linear2 = nn.Linear(hidden, dim, bias=bias)
        self.norm1 = nn.LayerNorm(dim, eps=eps, bias=bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps, bias=bias)

    @classmethod
    def sasrec(
        cls, dim: int, heads: int = 1, *, dropout: float = 0.0, published_code: bool = False
    ) -> TransformerBlock:
        """SASRec's block: causal, queries alone normalised, a feed-forward layer of width `dim` with ReLU.

        `published_code` adds to the normalised input, as its authors' code does and the paper does not.
        """
        residual = "normalized" if published_code else "input"
        options = {"normalize_keys": False, "output_projection": False, "residual": residual, "eps": 1e-8}
        return cls(dim, heads, hidden=dim, causal=True, dropout=dropout, **options)

    @classmethod
    def bert4rec(cls, dim: int, heads: int, *, dropout: float = 0.0, norm: str = "post") -> TransformerBlock:
        """BERT4Rec's block: both ways, a feed-forward layer of width `4 * dim` with GELU."""
        return cls(dim, heads, causal=False, norm=norm, activation="gelu", dropout=dropout, eps=1e-12)

    def _attention(self, queries: Tensor, keys: Tensor, offsets: Tensor) -> Tensor:
        weight, bias = self.self_attn.in_proj_weight, self.self_attn.in_proj_bias
        split = (self.heads, self.dim // self.heads)
        if queries is keys:
            q, k, v = F.linear(queries, weight, bias).unflatten(-1, (3, *split)).unbind(-3)
        else:
            first, rest = (None, None) if bias is None else (bias[: self.dim], bias[self.dim :])
            q = F.linear(queries, weight[: self.dim], first).unflatten(-1, split)
            k, v = F.linear(keys, weight[self.dim :], rest).unflatten(-1, (2, *split)).unbind(-3)
        dropout = self.attention_dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, ()) if dropout > 0 else None
        out = sequence_attention(q, k, v, offsets, causal=self.causal, dropout=dropout, seed=seed).flatten(-2)
        if self.self_attn.out_proj is not None:
            out = self.self_attn.out_proj(out)
        return F.dropout(out, self.dropout, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(_ACTIVATIONS[self.activation](self.linear1(x)), self.dropout, self.training)
        return F.dropout(self.linear2(inner), self.dropout, self.training)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return the events as their sequence changes them.

        Parameters
        ----------
        x : Tensor [T, D], or padded [B, L, D]
        offsets : Tensor [B + 1], int32 or int64, or the lengths [B] of a padded `x`
            What lies beyond a length is not looked at.

        Returns
        -------
        Tensor like `x`; padding is 0.
        """
        padding = padding_of("TransformerBlock", x, offsets)
        if padding is not None:  # 0 times what lies there is not 0 where that is NaN, not even in a gradient
            x = x.masked_fill(padding, 0)
        if self.norm == "post":
            x = self.norm1(x + self._attention(x, x, offsets))
            x = self.norm2(x + self._feed_forward(x))
        else:
            normal = self.norm1(x)
            base = normal if self.residual == "normalized" else x
            x = base + self._attention(normal, normal if self.normalize_keys else x, offsets)
            normal = self.norm2(x)
            x = (normal if self.residual == "normalized" else x) + self._feed_forward(normal)
        return x if padding is None else x.masked_fill(padding, 0)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, heads={self.heads}, hidden={self.hidden}, causal={self.causal}, norm={self.norm!r}, "
            f"activation={self.activation!r}, dropout={self.dropout}, attention_dropout={self.attention_dropout}, "
            f"normalize_keys={self.normalize_keys}, residual={self.residual!r}"
        )
