"""All-to-all scorers: one number for any token of a query and any item, where towers have only a dot product.

A scorer takes tokens float32 [T, C] and the tokens of items float32 [N, K_i, D] and gives scores float32 [T, N]; its
`pairs` takes as many items as tokens and gives the score of each pair, float32 [T].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recfast.errors import InputError

# Hidden units of the expansion of a token.
_EXPANSION = 128
# Hidden units of pairs that are held at once: 32 MiB in float32.
_PAIR_UNITS = 1 << 23


class Expansion(nn.Module):
    r"""A token of few numbers, which quantise well, as a vector of the items' width: :math:`W t + \mathrm{MLP}(t)`.

    It begins as the token itself where the widths are the same, and the MLP with nothing to add.
    """

    def __init__(self, token_dim: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.straight = nn.Linear(token_dim, dim)
        self.mlp = nn.Sequential(nn.Linear(token_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        if token_dim == dim:
            nn.init.eye_(self.straight.weight)
            nn.init.zeros_(self.straight.bias)
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.straight(tokens) + self.mlp(tokens)


class DotScorer(nn.Module):
    """The expanded token's inner product with the sum of the item's tokens: no cross-interaction beyond two towers."""

    def __init__(self, token_dim: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = Expansion(token_dim, dim, hidden)

    def forward(self, tokens: Tensor, items: Tensor) -> Tensor:
        return self.expand(tokens) @ items.sum(1).T

    def pairs(self, tokens: Tensor, items: Tensor) -> Tensor:
        return (self.expand(tokens) * items.sum(1)).sum(1)


class MLPScorer(nn.Module):
    r"""An MLP over the token and all tokens of the item, joined.

    .. math:: s = \mathrm{MLP}([t; v_1; \ldots; v_{K_i}])

    Its first layer is a sum of a part that knows only the token and one that knows only the item:
    :math:`W[t; v] + b = W_t t + (W_v v + b)`. Each part is computed once for each token and each item, so that a pair
    costs an addition and what comes after the first layer. It is the same function with the same weights.

    Parameters
    ----------
    dim, item_tokens : int
        D and K_i.
    hidden : widths
        Of the hidden layers, at least one.
    """

    def __init__(self, token_dim: int, dim: int, item_tokens: int, hidden: Sequence[int]) -> None:
        super().__init__()
        if not hidden:
            raise InputError("MLPScorer: scorer_hidden must name at least one hidden layer, got none")
        self.token_dim = token_dim
        self.first = nn.Linear(token_dim + dim * item_tokens, hidden[0])
        layers = [m for a, b in pairwise(hidden) for m in (nn.Linear(a, b), nn.ReLU())]
        self.rest = nn.Sequential(nn.ReLU(), *layers, nn.Linear(hidden[-1], 1))
        self.widest = max(hidden)

    def forward(self, tokens: Tensor, items: Tensor) -> Tensor:
        weight = self.first.weight
        of_token = tokens @ weight[:, : self.token_dim].T
        of_item = F.linear(items.flatten(1), weight[:, self.token_dim :], self.first.bias)
        step = max(1, _PAIR_UNITS // max(1, len(items) * self.widest))
        blocks = of_token.split(step)
        if len(blocks) > 1 and torch.is_grad_enabled():
            # What is inside the pairs is computed again in the backward pass, not kept.
            scores = [checkpoint(self._all, block, of_item, use_reentrant=False) for block in blocks]
        else:
            scores = [self._all(block, of_item) for block in blocks]
        return torch.cat(scores)

    def _all(self, of_token: Tensor, of_item: Tensor) -> Tensor:
        return self.rest(of_token[:, None] + of_item).squeeze(-1)

    def pairs(self, tokens: Tensor, items: Tensor) -> Tensor:
        return self.rest(self.first(torch.cat([tokens, items.flatten(1)], dim=1))).squeeze(-1)


class AttentionScorer(nn.Module):
    r"""The token attends to the item's tokens and is compared with what it finds.

    .. math:: s = t \cdot \sum_j \mathrm{softmax}_j\bigl(Q t \cdot v_j\bigr)\, v_j

    A pair costs 2 K_i D multiplications, all of them in two matrix products. With one item token it is the dot product.

    Parameters
    ----------
    dim : int
        D.
    """

    def __init__(self, token_dim: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = Expansion(token_dim, dim, hidden)
        self.query = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.query.weight)

    def forward(self, tokens: Tensor, items: Tensor) -> Tensor:
        # One matrix product for each token of the items; written out, since a softmax over a short first axis is slow.
        parts, tokens = items.unbind(1), self.expand(tokens)
        if len(parts) == 1:
            return tokens @ parts[0].T
        queries = self.query(tokens)
        if len(parts) == 2:
            # A softmax over two is a sigmoid of their difference.
            apart = (parts[0] - parts[1]).T
            return torch.addcmul(tokens @ parts[1].T, torch.sigmoid(queries @ apart), tokens @ apart)
        logits = [queries @ part.T for part in parts]
        highest = torch.stack([part.detach() for part in logits]).amax(0)
        weights = [torch.exp(part - highest) for part in logits]
        found = sum(weight * (tokens @ part.T) for weight, part in zip(weights, parts, strict=True))
        return found / sum(weights)

    def pairs(self, tokens: Tensor, items: Tensor) -> Tensor:
        tokens = self.expand(tokens)
        weights = torch.softmax(torch.einsum("td,tjd->tj", self.query(tokens), items), dim=1)
        return (weights * torch.einsum("td,tjd->tj", tokens, items)).sum(1)


def scorer_of(name: str, token_dim: int, dim: int, item_tokens: int, hidden: Sequence[int]) -> nn.Module:
    """Return the scorer called `name` for tokens of width `token_dim` and items of K_i tokens of width `dim`."""
    known = {
        "attention": lambda: AttentionScorer(token_dim, dim, _EXPANSION),
        "mlp": lambda: MLPScorer(token_dim, dim, item_tokens, hidden),
        "dot": lambda: DotScorer(token_dim, dim, _EXPANSION),
    }
    if name not in known:
        raise InputError(f"SparCode: scorer = {name!r} is not one of {', '.join(map(repr, known))}")
    return known[name]()
