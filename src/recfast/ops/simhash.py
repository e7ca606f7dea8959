"""Signs of random projections, packed into codes: the hash of SDIM and ETA."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recfast.ops import _check
from recfast.ops._histories import unit_rows
from recfast.ops._library import define, kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_KERNELS = {
    torch.float32: kernel("simhash_float32"),
    torch.bfloat16: kernel("simhash_bfloat16"),
    torch.float64: kernel("simhash_float64"),
}
_SCRATCH = kernel("simhash_scratch")


def code_dtype(bits: int) -> torch.dtype:
    """uint8 for codes of up to 8 bits, int64 above."""
    return torch.uint8 if bits <= 8 else torch.int64


def _two_levels(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """`x` [..., D] and its rows as (outer, outer stride, inner, inner stride); a copy only where two levels fail."""
    x = unit_rows(x)
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first, neighbours merged where evenly spaced
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return _two_levels(x.contiguous())
    (outer, outer_stride), (inner, inner_stride) = [*[(1, 0)] * (2 - len(levels)), *levels]
    return x, (outer, outer_stride, inner, inner_stride)


def _cpu(x, projections, lengths):
    dim, tables, bits = projections.shape
    codes = x.new_empty((*x.shape[:-1], tables), dtype=code_dtype(bits))
    if codes.numel() == 0:
        return codes
    if lengths is None:
        x, (outer, outer_stride, inner, inner_stride) = _two_levels(x)
    else:
        x, lengths = unit_rows(x), lengths.contiguous()
        _check.indices("simhash", "lengths", lengths, x.shape[1] + 1)
        outer, outer_stride, inner, inner_stride = x.shape[0], x.stride(0), x.shape[1], x.stride(1)
    projections = projections.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    scratch = projections.new_empty(_SCRATCH(dim, tables * bits, x.dtype == torch.bfloat16))
    _KERNELS[x.dtype](
        x=x.data_ptr(),
        outer=outer,
        outer_stride=outer_stride,
        inner=inner,
        inner_stride=inner_stride,
        lengths=0 if lengths is None else lengths.data_ptr(),
        dim=dim,
        projections=projections.data_ptr(),
        tables=tables,
        bits=bits,
        codes=codes.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    return codes


def _fake(x, projections, lengths):
    return x.new_empty((*x.shape[:-1], projections.shape[1]), dtype=code_dtype(projections.shape[2]))


def _samples() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for shape, tables, bits in (((3, 5), 2, 3), ((2, 4, 17), 16, 4), ((0, 3), 1, 8), ((4, 6), 1, 64), ((5, 9), 3, 33)):
        for dtype in _DTYPES:
            x = torch.randn(shape, generator=generator).to(dtype)
            projections = torch.randn(shape[-1], tables, bits, generator=generator)
            yield x, projections.to(torch.float64 if dtype == torch.float64 else torch.float32), None
    x = torch.randn(4, 5, 6, generator=generator, requires_grad=True)
    yield x, torch.randn(6, 3, 5, generator=generator), torch.tensor([5, 0, 3, 1])


def reference(x: torch.Tensor, projections: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain torch; sums in float64."""
    dim, tables, bits = projections.shape
    positive = (x.detach().double() @ projections.detach().double().reshape(dim, -1)) > 0
    weight = 2 ** torch.arange(min(bits, 63), device=x.device)
    if bits == 64:
        weight = torch.cat([weight, weight.new_tensor([-(2**63)])])
    codes = (positive.unflatten(-1, (tables, bits)) * weight).sum(-1).to(code_dtype(bits))
    if lengths is not None:
        codes = codes * (torch.arange(x.shape[1]) < lengths.unsqueeze(1)).unsqueeze(-1)
    return codes


_op = define(
    "simhash(Tensor x, Tensor projections, Tensor? lengths) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    samples=_samples,
    expected=reference,
)


def simhash(x: torch.Tensor, projections: torch.Tensor, *, lengths: torch.Tensor | None = None) -> torch.Tensor:
    r"""Hash rows by the signs of their projections, :math:`c_j(x) = \sum_t 2^t\,[x \cdot R_{:,j,t} > 0]`.

    Two rows agree in one bit with probability :math:`1 - \arccos(\cos(x, y)) / \pi` when the projections are drawn from
    a normal distribution, so codes collide the more often the smaller the angle.

    Parameters
    ----------
    x : Tensor [..., D], float32, bfloat16 or float64
        Rows; a strided view is read in place.
    projections : Tensor [D, M, bits]
        `M` hashes of 1 to 64 bits each. float32, or bfloat16 with a bfloat16 `x`, or float64 with a float64 `x`.
    lengths : Tensor [B], int32 or int64, optional
        For padded rows `x` [B, L, D]: those from `lengths[b]` on are not read and get code 0.

    Returns
    -------
    codes : Tensor [..., M], uint8 for `bits <= 8`, int64 above
        Bit t is set where the projection is strictly above 0; so a row of zeros (or NaN) has code 0. With 64 bits the
        last one is the sign.

    Raises
    ------
    IndexError
        A length outside [0, L].
    TypeError, ValueError
        Wrong dtypes or shapes.

    Notes
    -----
    Not differentiable: an `x` that requires a gradient gives codes without one. Sums have one order and one FMA a term
    on every instruction set, so the codes are equal bit by bit everywhere; they depend on nothing but the row, and may
    be stored. A bit can differ from the exact sign only where the projection is within `D eps` of 0, relative to the
    sum of its absolute terms. bfloat16 is widened, which is exact. Backends: CPU (scalar, AVX2, AVX-512).

    References
    ----------
    Charikar, "Similarity Estimation Techniques from Rounding Algorithms", STOC 2002.
    """
    x = _check.tensor("simhash", "x", x, dtypes=_DTYPES)
    if x.dim() == 0:
        raise ValueError("simhash: x must have shape [..., D], got []")
    dtypes = {torch.bfloat16: (torch.float32, torch.bfloat16)}.get(x.dtype, (x.dtype,))
    shape = [x.shape[-1], "M", "bits"]
    _check.tensor("simhash", "projections", projections, dtypes=dtypes, shape=shape, device=x.device)
    bits = projections.shape[2]
    if not 1 <= bits <= 64:
        raise ValueError(f"simhash: projections must have 1 to 64 bits a code (its last dimension), got {bits}")
    if lengths is not None:
        _check.tensor("simhash", "x", x, shape=["B", "L", "D"])
        index = {"dtypes": _check.INDEX_DTYPES, "device": x.device}
        lengths = _check.tensor("simhash", "lengths", lengths, shape=[x.shape[0]], **index).to(torch.int64)
    return _op(x, projections, lengths)


simhash.reference = reference
