"""The activation unit of DIN as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recfast.ops import DINWeights, din_attention


class TargetAttention(nn.Module):
    """Weigh each step of a history by a small MLP of the candidate and the step, and add them up.

    Owns the weights of `ops.din_attention`; see there for the formula, the layout and what is stored.

    Parameters
    ----------
    dim : int
        Width of queries and keys.
    hidden : one or two widths
        Hidden layers of the MLP; the paper's code uses (80, 40).
    activation : {"prelu", "relu", "sigmoid", "silu"}
        PReLU learns one slope a layer, from 0.25 on.
    mode : {"sum", "sigmoid", "softmax"}
        How scores become weights; the paper leaves them as they are ("sum"), to keep the intensity of an interest.

    References
    ----------
    Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.

    Examples
    --------
    >>> unit = TargetAttention(8, hidden=(16,))
    >>> query, keys = torch.randn(3, 8), torch.randn(5, 8)
    >>> unit(query, keys, torch.tensor([0, 4, 5]), torch.tensor([0, 1, 3])).shape    # two users, 1 and 2 candidates
    torch.Size([3, 8])
    """

    def __init__(
        self, dim: int, hidden: Sequence[int] = (80, 40), *, activation: str = "prelu", mode: str = "sum"
    ) -> None:
        super().__init__()
        hidden = tuple(hidden)
        if not 1 <= len(hidden) <= 2 or min(hidden) < 1 or dim < 1:
            raise ValueError(
                f"TargetAttention: dim and one or two hidden widths must be positive, got dim={dim}, hidden={hidden}"
            )
        for name, value, allowed in (
            ("activation", activation, ("prelu", "relu", "sigmoid", "silu")),
            ("mode", mode, ("sum", "sigmoid", "softmax")),
        ):
            if value not in allowed:
                raise ValueError(f"TargetAttention: {name} must be one of {', '.join(allowed)}, got {value!r}")
        self.dim, self.hidden, self.activation, self.mode = dim, hidden, activation, mode
        first, last = hidden[0], hidden[-1]
        self.w1 = nn.Parameter(torch.empty(4 * dim, first))
        self.b1 = nn.Parameter(torch.empty(first))
        two = len(hidden) == 2
        self.w2 = nn.Parameter(torch.empty(first, last)) if two else None
        self.b2 = nn.Parameter(torch.empty(last)) if two else None
        self.w3 = nn.Parameter(torch.empty(last, 1))
        self.b3 = nn.Parameter(torch.empty(1))
        self.slope = nn.Parameter(torch.empty(len(hidden))) if activation == "prelu" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (Xavier), set biases to 0 and slopes to 0.25."""
        for weight in (self.w1, self.w2, self.w3):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.b1, self.b2, self.b3):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.slope is not None:
            nn.init.constant_(self.slope, 0.25)

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        offsets: torch.Tensor,
        candidate_offsets: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the interest in each candidate.

        Parameters
        ----------
        query : Tensor [Nc, D]
        keys : Tensor [T, D], or padded [B, L, D]
        offsets : Tensor [B + 1], or the lengths [B] of padded keys
        candidate_offsets : Tensor [B + 1], optional
            Left out, each user has one candidate.
        values : Tensor like `keys` but for its width Dv, optional

        Returns
        -------
        Tensor [Nc, Dv]; 0 where the history is empty.
        """
        weights = DINWeights(self.w1, self.b1, self.w2, self.b2, self.w3, self.b3, self.slope)
        return din_attention(
            query,
            keys,
            offsets,
            weights,
            values=values,
            candidate_offsets=candidate_offsets,
            activation=self.activation,
            mode=self.mode,
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}, activation={self.activation!r}, mode={self.mode!r}"
