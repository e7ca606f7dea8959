"""The layer of HSTU as a module."""

from __future__ import annotations

import torch
from torch import nn

from recfast.nn._padding import padding_of
from recfast.ops import hstu_attention


class HSTUBlock(nn.Module):
    """One layer of HSTU: pointwise attention gated by what its own input says.

    .. math::
        U, V, Q, K = \\mathrm{split}(\\mathrm{silu}(\\mathrm{LN}(X)\\, W_{uvqk})), \\qquad
        Y = X + \\mathrm{dropout}(\\mathrm{LN}(O) \\odot U)\\, W_o + b_o

    where O is `ops.hstu_attention` of Q, K and V, and neither normalisation has weights. There is no padded matrix of
    attention weights anywhere: memory is linear in the number of rows.

    Parameters
    ----------
    dim : int
        Width D of the rows.
    heads : int
    attention_dim : int, optional
        Width of a head of Q and K; `dim // heads` when left out.
    linear_dim : int, optional
        Width of a head of U and V; as `attention_dim` when left out.
    max_length : int
        The constant by which attention is divided, and, with a position bias, the longest sequence there may be.
    position_bias : bool
        Learn one number for each distance between rows, shared by the heads.
    time_bias_buckets : int or None
        Learn one number for each bucket of the time between rows; None leaves time out. Row i then asks with the
        *time* of row i + 1, as published: when the prediction is asked for. That time is all it knows of it.
    time_buckets : {"log", "sqrt"}
        See `ops.hstu_attention`.
    alpha : float, optional
        Factor of the scores; 1 when left out (the research program), `attention_dim ** -0.5` in the production one.
    causal : bool
    window : int, optional
        How many places back a row sees.
    contextual : int
        Rows at the front of every sequence that see the whole history.
    dropout : float
    eps : float
        Of both normalisations.

    References
    ----------
    Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations", ICML 2024, arXiv 2402.17152.

    Examples
    --------
    >>> block = HSTUBlock(16, 2, max_length=50)
    >>> x, times = torch.randn(7, 16), torch.arange(7) * 3600
    >>> block(x, torch.tensor([0, 4, 7]), timestamps=times).shape    # two sequences, of 4 and 3 rows
    torch.Size([7, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        attention_dim: int | None = None,
        linear_dim: int | None = None,
        max_length: int,
        position_bias: bool = True,
        time_bias_buckets: int | None = 128,
        time_buckets: str = "log",
        alpha: float | None = None,
        causal: bool = True,
        window: int | None = None,
        contextual: int = 0,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"HSTUBlock: {name} must be at least 1, got {value}")
        attention_dim = dim // heads if attention_dim is None else attention_dim
        linear_dim = attention_dim if linear_dim is None else linear_dim
        if attention_dim < 1 or linear_dim < 1:
            raise ValueError(
                f"HSTUBlock: attention_dim and linear_dim must be at least 1, got {attention_dim} and {linear_dim} "
                f"(dim={dim}, heads={heads})"
            )
        if time_bias_buckets is not None and time_bias_buckets < 0:
            raise ValueError(f"HSTUBlock: time_bias_buckets must be at least 0, got {time_bias_buckets}")
        if time_buckets not in ("log", "sqrt"):
            raise ValueError(f"HSTUBlock: time_buckets must be one of log, sqrt, got {time_buckets!r}")
        if window is not None and window < 0:
            raise ValueError(f"HSTUBlock: window must be at least 0, got {window}")
        if contextual < 0:
            raise ValueError(f"HSTUBlock: contextual must be at least 0, got {contextual}")
        if not 0 <= dropout < 1:
            raise ValueError(f"HSTUBlock: dropout must lie in [0, 1), got {dropout}")
        self.dim, self.heads, self.attention_dim, self.linear_dim = dim, heads, attention_dim, linear_dim
        self.max_length, self.time_buckets, self.alpha = max_length, time_buckets, alpha
        self.causal, self.window, self.contextual, self.eps = causal, window, contextual, eps
        self.uvqk = nn.Parameter(torch.empty(dim, 2 * heads * (linear_dim + attention_dim)))
        self.output = nn.Linear(heads * linear_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.position_bias = nn.Parameter(torch.empty(2 * max_length - 1)) if position_bias else None
        self.time_bias = None if time_bias_buckets is None else nn.Parameter(torch.empty(time_bias_buckets + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as published: normal of 0.02, and Xavier for the output."""
        for weight in (self.uvqk, self.position_bias, self.time_bias):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        x: torch.Tensor,
        offsets: torch.Tensor,
        *,
        timestamps: torch.Tensor | None = None,
        num_targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the rows after this layer.

        Parameters
        ----------
        x : Tensor [T, D], or padded [B, L, D]
        offsets : Tensor [B + 1], int32 or int64, or the lengths [B] of padded rows
            What lies beyond a length is not looked at.
        timestamps : Tensor [T] or [B, L], int64
            In seconds; needed where there is a time bias, ignored where there is none.
        num_targets : Tensor [B], optional
            How many rows at the end of each sequence are candidates, which see the history and themselves.

        Returns
        -------
        Tensor like `x`; padding is 0.
        """
        if self.time_bias is not None and timestamps is None:
            raise ValueError("HSTUBlock: timestamps must be given, since the layer has a time bias")
        padding = padding_of("HSTUBlock", x, offsets)
        if padding is not None:  # 0 times what lies there is not 0 where that is NaN, not even in a gradient
            x = x.masked_fill(padding, 0)
        normed = nn.functional.layer_norm(x, (self.dim,), eps=self.eps)
        parts = nn.functional.silu(normed @ self.uvqk)
        linear, attention = self.heads * self.linear_dim, self.heads * self.attention_dim
        u, v, q, k = parts.split([linear, linear, attention, attention], dim=-1)
        # The op keeps biases in float32 where rows are bfloat16.
        computed = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        out = hstu_attention(
            *(part.unflatten(-1, (self.heads, -1)) for part in (q, k, v)),
            offsets,
            max_length=self.max_length,
            alpha=self.alpha,
            causal=self.causal,
            num_targets=num_targets,
            window=self.window,
            contextual=self.contextual,
            timestamps=timestamps if self.time_bias is not None else None,
            position_bias=None if self.position_bias is None else self.position_bias.to(computed),
            time_bias=None if self.time_bias is None else self.time_bias.to(computed),
            time_buckets=self.time_buckets,
        )
        gated = nn.functional.layer_norm(out.flatten(-2), (linear,), eps=self.eps) * u
        x = x + self.output(self.dropout(gated))
        return x if padding is None else x.masked_fill(padding, 0)

    def extra_repr(self) -> str:
        time = None if self.time_bias is None else self.time_bias.numel() - 1
        return (
            f"dim={self.dim}, heads={self.heads}, attention_dim={self.attention_dim}, linear_dim={self.linear_dim}, "
            f"max_length={self.max_length}, position_bias={self.position_bias is not None}, time_bias_buckets={time}, "
            f"causal={self.causal}"
        )
