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


class CrossNetV2(nn.Module):
    """Cross layers of DCN V2: each multiplies its input's linear map by x_0, element by element.

    .. math::
        x_{l+1} = x_0 \\odot f_l(x_l) + x_l, \\qquad f_l(x) = W_l x + b_l

    or, with a rank, :math:`f_l(x) = U_l V_l^\\top x + b_l`; or, with a rank and K experts,

    .. math::
        f_l(x) = \\sum_k g_k(x) \\big(U_{lk} \\tanh(C_{lk} \\tanh(V_{lk}^\\top x)) + b_l\\big)

    with g the softmax of a linear map that all layers share.

    Parameters
    ----------
    width : int
        d, of the input and the output.
    layers : int
        L; the output is a polynomial of degree L + 1 in the input (with experts it is none).
    rank : int, optional
        r, below d; the matrices are full if it is left out.
    experts : int
        K; more than one needs a rank.

    References
    ----------
    Wang et al., WWW 2021, arXiv 2008.13535, equations 1 to 4. Weights start as Xavier uniform, biases at 0.
    """

    def __init__(self, width: int, layers: int, *, rank: int | None = None, experts: int = 1) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"CrossNetV2: layers must be at least 1, got {layers}")
        if rank is not None and not 1 <= rank < width:
            raise ValueError(f"CrossNetV2: rank must lie in [1, {width}), below the width, got {rank}")
        if experts < 1:
            raise ValueError(f"CrossNetV2: experts must be at least 1, got {experts}")
        if experts > 1 and rank is None:
            raise ValueError(f"CrossNetV2: {experts} experts need a rank")
        self.width, self.layers, self.rank, self.experts = width, layers, rank, experts
        self.bias = nn.Parameter(torch.zeros(layers, width))
        self.full = self.down = self.core = self.up = self.gate = None
        if rank is None:
            self.full = _stacked(layers, width, width)
        else:
            self.down = _stacked(layers, experts, width, rank)
            self.up = _stacked(layers, experts, rank, width)
        if experts > 1:
            self.core = _stacked(layers, experts, rank, rank)
            self.gate = nn.Linear(width, experts)
            nn.init.xavier_uniform_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, width] -> [R, width]."""
        first = x
        for layer in range(self.layers):
            if self.full is not None:
                x = first * torch.addmm(self.bias[layer], x, self.full[layer]) + x
            elif self.gate is None:
                x = first * torch.addmm(self.bias[layer], x @ self.down[layer, 0], self.up[layer, 0]) + x
            else:
                # [K, R, r] -> [K, R, d]
                inner = torch.tanh(torch.tanh(x @ self.down[layer]) @ self.core[layer])
                mapped = inner @ self.up[layer] + self.bias[layer]
                share = torch.softmax(self.gate(x), dim=1)
                x = first * torch.einsum("rk,krd->rd", share, mapped) + x
        return x


def _stacked(*shape: int) -> nn.Parameter:
    """Matrices [..., in, out], each started by itself: torch would take the leading sizes for a receptive field."""
    stack = torch.empty(shape)
    for matrix in stack.view(-1, *shape[-2:]):
        nn.init.xavier_uniform_(matrix)
    return nn.Parameter(stack)


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
