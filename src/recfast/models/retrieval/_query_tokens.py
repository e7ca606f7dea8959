"""A query's vector as a few coded tokens: SparCode's tokeniser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recfast.nn.vector_quantizer import VectorQuantizer


class QueryTokens(nn.Module):
    """K_u linear heads on a vector, each head's token quantised with M codebooks of K_c.

    Parameters
    ----------
    heads : nn.Linear
        From the vector to all tokens, K_u token_dim wide.
    tokens, token_dim : int
        K_u, and the width of a token.
    codebooks, codes : int
        M and K_c.
    shared : bool
        All tokens share the codebooks, as in the paper. Else each has M of its own, so that its codes need tell nothing
        but what this one head says; the scorer then gets the token at its own place among zeros, and so may treat the
        heads differently.
    **options
        Of `nn.VectorQuantizer`.

    Attributes
    ----------
    out : int
        Width of a token as the scorer gets it.
    first : Tensor [K_u] int64
        The first row of each token with codebooks of its own.
    n_composite : int
        How many different rows an index may have: K_c^M, and K_u times that for codebooks of one's own.
    """

    def __init__(
        self, heads: nn.Linear, tokens: int, token_dim: int, codebooks: int, codes: int, shared: bool, **options: Any
    ) -> None:
        super().__init__()
        self.tokens, self.token_dim, self.codebooks, self.shared = tokens, token_dim, codebooks, shared
        self.heads = heads
        # With codebooks of their own, all tokens of a user are one vector of K_u M parts.
        parts = 1 if shared else tokens
        self.quantizer = VectorQuantizer(parts * token_dim, parts * codebooks, codes, **options)
        self.out, self.per_token = parts * token_dim, codes**codebooks
        self.n_composite = parts * self.per_token
        self.register_buffer("first", torch.arange(parts) * self.per_token, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantised tokens of vectors [B, width], float32 [B, K_u, out], and the quantiser's loss."""
        quantized = self.quantizer(self.unquantized(x))
        return self.placed(quantized.vectors), quantized.loss

    def unquantized(self, x: Tensor) -> Tensor:
        """Return what is quantised: [B, K_u, token_dim], or [B, K_u token_dim] for codebooks of one's own."""
        tokens = self.heads(x)
        return tokens.unflatten(1, (self.tokens, self.token_dim)) if self.shared else tokens

    def placed(self, tokens: Tensor) -> Tensor:
        """Return the tokens as the scorer takes them, float32 [B, K_u, out]."""
        if self.shared:
            return tokens
        parts = tokens.unflatten(1, (self.tokens, self.token_dim))
        return (torch.eye(self.tokens, device=tokens.device)[:, :, None] * parts[:, None]).flatten(2)

    def encode(self, x: Tensor) -> Tensor:
        """Return the composite codes of vectors [B, width]: int64 [B, K_u] in [0, n_composite)."""
        codes = self.quantizer.encode(self.unquantized(x))
        if self.shared:
            return self.quantizer.composite(codes)
        return self.quantizer.composite(codes.unflatten(1, (self.tokens, self.codebooks))) + self.first

    @torch.no_grad()
    def decode(self, composite: Tensor) -> Tensor:
        """Return the tokens that composite codes [T] stand for, float32 [T, out]."""
        digits = self.quantizer.split(composite % self.per_token, self.codebooks)
        if self.shared:
            return self.quantizer.decode(digits)
        token = composite // self.per_token
        books = token[:, None] * self.codebooks + torch.arange(self.codebooks, device=composite.device)
        parts = torch.zeros(len(composite), self.tokens, self.token_dim, device=composite.device)
        parts[torch.arange(len(composite)), token] = self.quantizer.codebooks[books, digits].flatten(1)
        return parts.flatten(1)
