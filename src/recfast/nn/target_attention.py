"""The activation unit of DIN as a module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from recfast.ops import DiceWeights, DINWeights, din_attention
from recfast.ops._histories import check_candidates, histories
from recfast.ops.din_attention import prepare, unfused


class TargetAttention(nn.Module):
    """Weigh each step of a history by a small MLP of the candidate and the step, and add them up.

    Owns the weights of `ops.din_attention`; see there for the formula, the layout and what is stored.

    Parameters
    ----------
    dim : int
        Width of queries and keys.
    hidden : one or two widths
        Hidden layers of the MLP, at most 256 units each; the paper's code uses (80, 40).
    activation : {"prelu", "relu", "sigmoid", "silu", "dice"}
        PReLU learns one slope a layer, from 0.25 on. Dice learns one alpha a unit, from 0 on; in training its mean and
        variance are those of the batch, over all valid (candidate, step) pairs, so that an answer depends on the batch.
    mode : {"sum", "sigmoid", "softmax"}
        How scores become weights; the paper leaves them as they are ("sum"), to keep the intensity of an interest.
    dropout : float
        After each hidden layer, in training.
    batch_norm : bool
        Before each activation, over all valid pairs. Outside training it is folded into the weights.
    dice_eps, dice_momentum : float
        FuxiCTR has 1e-9 and 0.01, TorchEasyRec 1e-5 and 0.1, DeepCTR 1e-8. `dice_momentum` is the share of the new
        batch in the running statistics, as in `torch.nn.BatchNorm1d`, and the running variance is the unbiased one.
    dice_affine : bool
        Let Dice learn a gain and a shift of its normalised input, as DeepCTR does.

    Notes
    -----
    Dropout and batch norm cannot be fused. In training they run in the unfused form, which holds about
    `4 (4 D + 3 (H1 + H2))` bytes and more for each pair of a candidate and a step; the first such call warns with a
    `UserWarning` that names the sum. Its sizes depend on the offsets' values, so that `torch.compile` breaks the graph
    there, and refuses with `fullgraph=True`. Outside training every option is fused, and compiles in one graph.

    For bfloat16, cast queries, keys and values, not the module: its parameters stay float32 beside them.

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
        self,
        dim: int,
        hidden: Sequence[int] = (80, 40),
        *,
        activation: str = "prelu",
        mode: str = "sum",
        dropout: float = 0.0,
        batch_norm: bool = False,
        dice_eps: float = 1e-9,
        dice_momentum: float = 0.01,
        dice_affine: bool = False,
    ) -> None:
        super().__init__()
        hidden = tuple(hidden)
        if not 1 <= len(hidden) <= 2 or min(hidden) < 1 or dim < 1:
            raise ValueError(
                f"TargetAttention: dim and one or two hidden widths must be positive, got dim={dim}, hidden={hidden}"
            )
        if max(hidden) > 256:
            raise ValueError(f"TargetAttention: hidden widths must be at most 256, got {max(hidden)}")
        for name, value, allowed in (
            ("activation", activation, ("prelu", "relu", "sigmoid", "silu", "dice")),
            ("mode", mode, ("sum", "sigmoid", "softmax")),
        ):
            if value not in allowed:
                raise ValueError(f"TargetAttention: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"TargetAttention: dropout must lie in [0, 1), got {dropout}")
        if not 0 <= dice_momentum <= 1:
            raise ValueError(f"TargetAttention: dice_momentum must lie in [0, 1], got {dice_momentum}")
        self.dim, self.hidden, self.activation, self.mode = dim, hidden, activation, mode
        self.dropout, self.batch_norm = dropout, batch_norm
        self.dice_eps, self.dice_momentum = dice_eps, dice_momentum
        first, last, channels = hidden[0], hidden[-1], sum(hidden)
        self.w1 = nn.Parameter(torch.empty(4 * dim, first))
        self.b1 = nn.Parameter(torch.empty(first))
        two = len(hidden) == 2
        self.w2 = nn.Parameter(torch.empty(first, last)) if two else None
        self.b2 = nn.Parameter(torch.empty(last)) if two else None
        self.w3 = nn.Parameter(torch.empty(last, 1))
        self.b3 = nn.Parameter(torch.empty(1))
        self.slope = nn.Parameter(torch.empty(len(hidden))) if activation == "prelu" else None
        dice = activation == "dice"
        self.alpha = nn.Parameter(torch.empty(channels)) if dice else None
        self.gain = nn.Parameter(torch.empty(channels)) if dice and dice_affine else None
        self.shift = nn.Parameter(torch.empty(channels)) if dice and dice_affine else None
        if dice:
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_variance", torch.ones(channels))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in hidden) if batch_norm else None
        self._warned = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (Xavier), set biases to 0, slopes to 0.25, Dice and batch norm to where they start."""
        for weight in (self.w1, self.w2, self.w3):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.b1, self.b2, self.b3):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.slope is not None:
            nn.init.constant_(self.slope, 0.25)
        for start, values in ((0.0, (self.alpha, self.shift)), (1.0, (self.gain,))):
            for value in values:
                if value is not None:
                    nn.init.constant_(value, start)
        if self.alpha is not None:
            self.running_mean.zero_()
            self.running_variance.fill_(1)
        for norm in self.norms or ():
            norm.reset_parameters()

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
        dice = None
        if self.alpha is not None:
            dice = DiceWeights(
                self.alpha, self.running_mean, self.running_variance, self.gain, self.shift, self.dice_eps
            )
        options = {
            "values": values,
            "candidate_offsets": candidate_offsets,
            "activation": self.activation,
            "mode": self.mode,
            "dice": dice,
            "training": self.training,
        }
        if self.training and (self.dropout > 0 or self.batch_norm):
            out, statistics = self._unfused(query, keys, offsets, weights, **options)
        else:
            if self.batch_norm:
                weights = self._with_norms(weights)
            answer = din_attention(query, keys, offsets, weights, **options)
            out, statistics = answer if dice is not None and self.training else (answer, None)
        if dice is not None and self.training:
            self._follow(statistics, keys, offsets, candidate_offsets)
        return out

    def _unfused(self, query, keys, offsets, weights, *, values, candidate_offsets, **options):
        arguments = prepare(
            query, keys, offsets, weights, values=values, candidate_offsets=candidate_offsets, **options
        )
        candidate_offsets = arguments[4]
        check_candidates("TargetAttention", candidate_offsets, query.shape[0])
        histories("TargetAttention", keys, values, arguments[3].contiguous())
        if not self._warned:
            self._warned = True
            pairs = int(_pairs(keys, offsets, candidate_offsets))
            each = 4 * (4 * self.dim + 3 * sum(self.hidden))
            warnings.warn(
                "TargetAttention: dropout and batch norm inside the activation unit run in the unfused form in "
                f"training, which holds about {each} bytes for each pair of a candidate and a step "
                f"({pairs * each / 2**20:.1f} MiB for the {pairs} pairs of this call); the fused form holds none",
                UserWarning,
                stacklevel=3,
            )
        norms, dropout = self.norms, self.dropout
        out, _, statistics = unfused(
            *arguments,
            # Batch norm refuses a batch of one row, which has no variance; its running statistics serve, as in Dice.
            normalize=None if norms is None else lambda layer, z: _normalized(norms[layer], z),
            drop=(lambda hidden: nn.functional.dropout(hidden, dropout)) if dropout > 0 else None,
        )
        return out, statistics

    def _with_norms(self, weights: DINWeights) -> DINWeights:
        """Fold what batch norm does outside training into the layers before it."""
        parts = weights._asdict()
        for norm, w, b in zip(self.norms, ("w1", "w2"), ("b1", "b2"), strict=False):
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            parts[w] = parts[w] * scale
            parts[b] = (parts[b] - norm.running_mean) * scale + norm.bias
        return DINWeights(**parts)

    @torch.no_grad()
    def _follow(self, statistics, keys, offsets, candidate_offsets) -> None:
        """Move the running statistics towards those of a batch; one without two pairs has none."""
        mean, variance = statistics
        pairs = _pairs(keys, offsets, candidate_offsets)
        share = self.dice_momentum * (pairs > 1).to(mean.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_variance.lerp_(variance * (pairs / (pairs - 1).clamp_min(1)).to(mean.dtype), share)

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, hidden={self.hidden}, activation={self.activation!r}, mode={self.mode!r}"
        if self.dropout > 0:
            text += f", dropout={self.dropout}"
        return text + (", batch_norm=True" if self.batch_norm else "")


def _pairs(keys: torch.Tensor, offsets: torch.Tensor, candidate_offsets: torch.Tensor | None) -> torch.Tensor:
    """How many pairs of a candidate and a step there are."""
    lengths = (offsets if keys.dim() == 3 else offsets.diff()).long()
    return lengths.sum() if candidate_offsets is None else (lengths * candidate_offsets.diff()).sum()


def _normalized(norm: nn.BatchNorm1d, z: torch.Tensor) -> torch.Tensor:
    if len(z) >= 2:
        return norm(z)
    return nn.functional.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
