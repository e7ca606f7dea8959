"""Log-determinants of many small kernels, with gradients: what a determinantal point process is learned by."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import define, kernel

_OP = "dpp_log_det"
_DTYPES = (torch.float32, torch.float64)
_threads = kernel("max_threads")
_KERNELS = {torch.float32: kernel("dpp_log_det_float32"), torch.float64: kernel("dpp_log_det_float64")}


def _empty(features: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape[:1]), features.new_empty(features.shape if gradient else (0,))


def _cpu(
    features: Tensor, gamma: float, lengths: Tensor | None, mask: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor]:
    lists, picks, width = features.shape
    features = features.contiguous()
    lengths, mask = (None if value is None else value.contiguous() for value in (lengths, mask))
    log_det, solved = outputs = _empty(features, gradient)
    # A loop over two lists may still number its threads up to the team's size.
    scratch = torch.empty(_C.dpp_log_det_scratch(picks, width) * max(1, _threads()) + 64, dtype=torch.uint8)
    _KERNELS[features.dtype](
        lists,
        picks,
        width,
        gamma,
        features.data_ptr(),
        0 if lengths is None else lengths.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        log_det.data_ptr(),
        solved.data_ptr() if gradient else 0,
        scratch.data_ptr(),
    )
    return outputs


def _fake(features, gamma, lengths, mask, gradient):
    return _empty(features, gradient)


def _valid(features: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which rows belong to their list, bool [B, K]."""
    valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask
    if lengths is not None:
        valid = valid & (torch.arange(features.shape[1], device=features.device) < lengths[:, None])
    return valid


def _kernels(features: Tensor, gamma: float, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The valid rows in float64, and S with rows and columns of the unit matrix in place of those that are not."""
    rows = features.double().masked_fill(~valid[..., None], 0.0)
    unit = torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
    pair = valid[:, :, None] & valid[:, None, :]
    return rows, torch.where(pair, (1 - gamma) * (rows @ rows.mT) + gamma * unit, unit)


def _setup_context(ctx, inputs, output):
    features, ctx.gamma, lengths, mask, ctx.gradient = inputs
    ctx.save_for_backward(features, lengths, mask, *output)


def _backward(ctx, grad, _grad_solved):
    features, lengths, mask, log_det, solved = ctx.saved_tensors
    if not ctx.gradient or torch.is_grad_enabled():
        # In plain torch, which can differentiate it again.
        valid = _valid(features, lengths, mask)
        rows, kernels = _kernels(features, ctx.gamma, valid)
        singular = (log_det.detach() == -torch.inf)[:, None, None]
        unit = torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
        solved = torch.linalg.solve(torch.where(singular, unit, kernels), rows).masked_fill(singular, 0.0)
    gradient = (2 * (1 - ctx.gamma)) * grad[:, None, None] * solved
    return gradient.to(features.dtype), None, None, None, None


def _expected(features, gamma, lengths, mask, gradient):
    valid = _valid(features, lengths, mask)
    rows, kernels = _kernels(features, gamma, valid)
    sign, log_det = torch.linalg.slogdet(kernels)
    log_det = torch.where(sign > 0, log_det, -torch.inf).to(features.dtype)
    if not gradient:
        return log_det, features.new_empty(0)
    return log_det, torch.linalg.solve(kernels, rows).to(features.dtype)


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 9, generator=generator)
    yield features.requires_grad_(), 0.0, None, None, True
    yield features.detach().double().requires_grad_(), 0.3, torch.tensor([5, 2, 0]), None, True
    mask = torch.rand(3, 5, generator=generator) < 0.6
    yield features.detach()[..., :3].contiguous(), 0.1, torch.tensor([5, 2, 0]), mask, False
    yield features.detach()[:0], 0.0, None, None, False


_op = define(
    "dpp_log_det(Tensor features, float gamma, Tensor? lengths, Tensor? mask, bool gradient) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=_expected,
    backward=_backward,
    setup_context=_setup_context,
    twice=True,
)


def _arguments(features, relevance, alpha, gamma, lengths, mask) -> tuple:
    _check.tensor(_OP, "features", features, dtypes=_DTYPES, shape=["B", "K", "D"])
    lists, picks, _ = features.shape
    device = features.device
    if relevance is not None:
        _check.tensor(_OP, "relevance", relevance, dtypes=_DTYPES, shape=[lists, picks], device=device)
        if isinstance(alpha, Tensor):
            _check.tensor(_OP, "alpha", alpha, dtypes=_DTYPES, device=device)
            if alpha.dim() > 1 or (alpha.dim() == 1 and len(alpha) != lists):
                raise ValueError(f"{_OP}: alpha must be a number or have shape [{lists}], got {list(alpha.shape)}")
        elif not math.isfinite(alpha):
            raise ValueError(f"{_OP}: alpha must be finite, got {alpha}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"{_OP}: gamma must be in [0, 1], got {gamma}")
    if lengths is not None:
        lengths = _check.index(_OP, "lengths", lengths, shape=[lists], device=device)
        _check.indices(_OP, "lengths", lengths, picks + 1)
    if mask is not None:
        _check.tensor(_OP, "mask", mask, dtypes=[torch.bool], shape=[lists, picks], device=device)
    return float(gamma), lengths, mask


def _with_relevance(log_det, features, relevance, alpha, lengths, mask) -> Tensor:
    if relevance is None:
        return log_det
    valid = _valid(features, lengths, mask)
    quality = relevance.to(features.dtype).masked_fill(~valid, 0.0).sum(1)
    return log_det + (2 * alpha * quality).to(log_det.dtype)


def dpp_log_det(
    features: Tensor,
    relevance: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.5,
    gamma: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Log-determinant of the kernel of each list: how good and how varied its items are together.

    .. math::
        \\log \\det L = 2 \\alpha \\sum_i r_i + \\log \\det S, \\quad S = (1 - \\gamma) F F^\\top + \\gamma I

    It is what `dpp_greedy` raises pick by pick, as a loss's part for features, relevance or alpha that are learned.

    Parameters
    ----------
    features : Tensor [B, K, D], float32 or float64
        The rows of each list's items. Used as given, like those of `dpp_greedy`.
    relevance : Tensor [B, K], float32 or float64
        How good each item is; None: 0.
    alpha : float or Tensor [B]
        The weight of relevance. 0.5 is `diversity=0.5` of `dpp_greedy`; in general (1 - diversity) / (2 diversity).
    gamma : float, in [0, 1]
        Regulariser. Above 0 no list is singular.
    lengths : Tensor [B], int32 or int64
        List b is its first `lengths[b]` rows; None: all K.
    mask : Tensor [B, K], bool
        False: not in the list. What is not in it is not read and has gradient 0.

    Returns
    -------
    Tensor [B] of features' dtype; 0 for a list of no items. -inf for a singular one (more items than D with gamma 0,
    duplicates, zero rows: a pivot of at most 2^-50 (D + K) S_ii), whose features have gradient 0.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes that do not fit, an option out of range.
    IndexError
        `lengths` out of range.

    Notes
    -----
    Work is in float64. Differentiable in features, relevance and alpha, also a second time: the gradient of S is
    `2 (1 - gamma) S^-1 F`, from the same factorisation, and where a graph of it is asked for, in torch operations.
    A NaN goes through. Independent of batch, thread count and instruction set. Backend: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Gartrell, Paquet and Koenigstein, "Low-rank factorization of determinantal point processes", AAAI 2017.

    Examples
    --------
    >>> rows = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [1.0, 0.0]]])
    >>> dpp_log_det(rows)  # 2 log 0.8, and two equal items
    tensor([-0.4463,    -inf])
    """
    gamma, lengths, mask = _arguments(features, relevance, alpha, gamma, lengths, mask)
    gradient = features.requires_grad and torch.is_grad_enabled()
    log_det, _ = _op(features, gamma, lengths, mask, gradient)
    return _with_relevance(log_det, features, relevance, alpha, lengths, mask)


def reference(
    features: Tensor,
    relevance: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.5,
    gamma: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, by `torch.linalg.slogdet` in float64."""
    gamma, lengths, mask = _arguments(features, relevance, alpha, gamma, lengths, mask)
    log_det, _ = _expected(features, gamma, lengths, mask, False)
    return _with_relevance(log_det, features, relevance, alpha, lengths, mask)


dpp_log_det.reference = reference
