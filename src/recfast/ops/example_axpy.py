"""`alpha * x + y`: the pattern of an op, to be copied (see CONTRIBUTING, "Add a kernel in six files")."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recfast.ops import _check
from recfast.ops._library import cuda_module, define, kernel, stream_of

_DTYPES = (torch.float32, torch.float64)
_KERNELS = {
    torch.float32: kernel("example_axpy_float32"),
    torch.float64: kernel("example_axpy_float64"),
}


def _cpu(x: torch.Tensor, y: torch.Tensor, alpha: float) -> torch.Tensor:
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    _KERNELS[x.dtype](x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel(), alpha)
    return out


def _cuda(x: torch.Tensor, y: torch.Tensor, alpha: float) -> torch.Tensor:
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    launch = getattr(cuda_module(), f"example_axpy_{str(x.dtype).removeprefix('torch.')}")
    with torch.cuda.device(x.device):
        launch(x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel(), alpha, stream_of(x))
    return out


def _fake(x: torch.Tensor, y: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.alpha = inputs[2]


def _backward(ctx, grad: torch.Tensor):
    return ctx.alpha * grad, grad, None


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 37):
        x, y = torch.randn(2, size, generator=generator)
        yield x, y, 0.5
        yield x.requires_grad_(), y.requires_grad_(), -2.0


def reference(x: torch.Tensor, y: torch.Tensor, alpha: float) -> torch.Tensor:
    """The same in plain torch, in the dtype of `x`."""
    return alpha * x + y


_op = define(
    "example_axpy(Tensor x, Tensor y, float alpha) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    backward=_backward,
    twice=True,
    setup_context=_setup_context,
    samples=_samples,
    expected=reference,
)


def example_axpy(x: torch.Tensor, y: torch.Tensor, alpha: float) -> torch.Tensor:
    """Scale and add.

    .. math:: out_i = \\alpha x_i + y_i

    Parameters
    ----------
    x : Tensor [N], float32 or float64
    y : Tensor [N], dtype and device of `x`
    alpha : float
        Rounded to the dtype of `x`.

    Returns
    -------
    Tensor [N], dtype of `x`. Empty for N = 0.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes or devices differ.

    Notes
    -----
    Product and sum are rounded apart: the error is at most eps * (2 |alpha x| + |y|), with equal bits on every
    instruction set and device. Differentiable in `x` and `y`. Backends: CPU (scalar, AVX2, AVX-512), CUDA.

    References
    ----------
    Lawson et al., "Basic linear algebra subprograms for Fortran usage", ACM TOMS 5, 1979.
    """
    _check.tensor("example_axpy", "x", x, dtypes=_DTYPES, shape=["N"])
    _check.tensor("example_axpy", "y", y, dtypes=[x.dtype], shape=list(x.shape), device=x.device)
    return _op(x, y, float(alpha))


example_axpy.reference = reference
