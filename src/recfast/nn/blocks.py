"""Blocks that ranking models are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Dice(nn.Module):
    """DIN's data-adaptive activation: PReLU whose step sits at the mean of the batch and is as soft as its spread.

    .. math:: y = p x + (1 - p) \\alpha x, \\qquad p = \\sigma\\big((x - \\mu) / \\sqrt{\\sigma^2 + \\epsilon}\\big)

    with mean and variance of each channel over the batch in training, and their running averages afterwards. A batch
    of one row, which has no variance, uses the running averages too.

    Parameters
    ----------
    width : int
    eps, momentum : float
        As in `torch.nn.BatchNorm1d`.

    References
    ----------
    Zhou et al., KDD 2018, arXiv 1706.06978, section 5.3.
    """

    def __init__(self, width: int, *, eps: float = 1e-8, momentum: float = 0.01) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=eps, momentum=momentum, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, width] -> [R, width]."""
        norm = self.norm
        if norm.training and x.shape[0] == 1:
            normal = (x - norm.running_mean) * torch.rsqrt(norm.running_var + norm.eps)
        else:
            normal = norm(x)
        p = torch.sigmoid(normal)
        return x * (p + self.alpha * (1 - p))


_ACTIVATIONS = {"relu": lambda width: nn.ReLU(), "prelu": lambda width: nn.PReLU(width), "dice": Dice}


class MLP(nn.Sequential):
    """Linear layers with an activation and dropout after each but the last.

    Parameters
    ----------
    width : int
        Of the input.
    hidden : widths of the hidden layers, any number
    out : int
        Width of the output; 1 for a logit.
    activation : {"relu", "prelu", "dice"}
    dropout : float in [0, 1)
    """

    def __init__(
        self, width: int, hidden: Sequence[int], out: int = 1, *, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"MLP: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"MLP: dropout must lie in [0, 1), got {dropout}")
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), _ACTIVATIONS[activation](size)]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = size
        layers.append(nn.Linear(width, out))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        super().__init__(*layers)


def fm_interaction(fields: torch.Tensor) -> torch.Tensor:
    """Second-order interactions of a factorisation machine: the sum of dot products over all pairs of fields.

    .. math::
        \\sum_{i<j} \\langle v_i, v_j \\rangle = \\tfrac12 \\sum_d \\big[(\\sum_i v_{id})^2 -
        \\sum_i v_{id}^2\\big]

    Parameters
    ----------
    fields : Tensor [R, F, D]

    Returns
    -------
    Tensor [R]

    References
    ----------
    Rendle, "Factorization Machines", ICDM 2010.
    """
    return 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(-1)
