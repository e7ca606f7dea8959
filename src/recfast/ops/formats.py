"""How rows of a table are stored: `QuantizedTable`, `quantize`, `round_to`, and what the formats are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from recfast import _C
from recfast.ops import _check
from recfast.ops._library import kernel

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")
HEADERS = {"none": 0, "step": 1, "affine": 2}  # the numbers that the kernels know them by
LAYOUTS = ("inference", "fused")
_HUGE_PAGE = 2 << 20
_quantize, _dequantize = kernel("quantize"), kernel("dequantize")
_embedding_bag = kernel("embedding_bag")


class Format(NamedTuple):
    """One way to store a row.

    Attributes
    ----------
    code
        The number that the kernels know it by (csrc/common/row_format.h).
    bits
        Of one column.
    dtype
        Of the tensor [T, D] that holds a plain table; None for rows with a header.
    lowest, highest
        The range of a code; 0 for plain formats.
    """

    code: int
    bits: int
    dtype: torch.dtype | None
    lowest: float
    highest: float


FORMATS = {
    "float32": Format(0, 32, torch.float32, 0, 0),
    "float64": Format(1, 64, torch.float64, 0, 0),
    "bfloat16": Format(2, 16, torch.bfloat16, 0, 0),
    "float16": Format(3, 16, torch.float16, 0, 0),
    "float8": Format(4, 8, None, -448.0, 448.0),
    "int8": Format(5, 8, None, -128, 127),
    "int4": Format(6, 4, None, -8, 7),
    "int2": Format(7, 2, None, -2, 1),
}
PLAIN = {info.dtype: name for name, info in FORMATS.items() if info.dtype is not None}
WITH_STEP = tuple(name for name, info in FORMATS.items() if info.dtype is None)
_BITS = {8: "int8", 4: "int4", 2: "int2", "fp8": "float8"}
HEADER_BYTES = 4


def format_of_bits(op: str, bits: object) -> str:
    """The format that `bits` (8, 4, 2 or "fp8") stands for."""
    if isinstance(bits, bool) or bits not in _BITS:
        raise ValueError(f"{op}: bits must be 8, 4, 2 or 'fp8', got {bits!r}")
    return _BITS[bits]


def code_bytes(name: str, dim: int) -> int:
    """Bytes of the codes of a row of `dim` columns, without header and padding."""
    return -(-dim * FORMATS[name].bits // 8)


def row_bytes(name: str, dim: int) -> int:
    """Bytes from one row of a table to the next; rows with a header are padded to a multiple of 4."""
    size = code_bytes(name, dim)
    return size if FORMATS[name].dtype is not None else -(-(HEADER_BYTES + size) // 4) * 4


def empty_table(rows: int, row_bytes: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Memory for a table: Tensor [rows, row_bytes / size of dtype], not initialised.

    From 4 MB on it begins at a multiple of 2 MB and the system is asked for pages of that size (where it has them), so
    that random rows miss fewer address translations.
    """
    item = dtype.itemsize
    if row_bytes % item:
        raise ValueError(f"empty_table: row_bytes must be a multiple of {item}, the size of {dtype}, got {row_bytes}")
    size = rows * row_bytes
    if size < 2 * _HUGE_PAGE:
        return torch.empty(rows, row_bytes // item, dtype=dtype)
    memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % _HUGE_PAGE
    _C.advise_huge_pages(memory.data_ptr() + first, -(-size // _HUGE_PAGE) * _HUGE_PAGE)
    return memory[first : first + size].view(dtype).view(rows, row_bytes // item)


def philox_words(seed: int, step_count: int, table_id: int, rows: torch.Tensor, width: int) -> torch.Tensor:
    """The 32-bit draws that the kernels make for `rows` int64 [R]: Tensor [R, width], int64.

    Philox-4x32-7 in int64 arithmetic: products wrap, which leaves their low and high words right. A block of four words
    serves eight columns, an odd column with the halves of its word exchanged.
    """
    low = 0xFFFFFFFF
    blocks = torch.arange(-(-width // 8))
    c2, c3 = (x.reshape(-1) for x in torch.meshgrid(rows.long() & low, blocks, indexing="ij"))
    c0, c1 = torch.full_like(c2, step_count), torch.full_like(c2, table_id)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(7):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 & low ^ c1 ^ k0, p1 & low, p0 >> 32 & low ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack([c0, c1, c2, c3], 1)
    both = torch.stack([words, (words << 16 | words >> 16) & low], 2)
    return both.reshape(len(rows), 8 * len(blocks))[:, :width]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer codes [T, D] (two's complement or unsigned) as bytes [T, ceil(D * bits / 8)], from the low bits up."""
    per_byte = 8 // bits
    rows, dim = codes.shape
    short = codes.to(torch.int32) & ((1 << bits) - 1)
    padded = torch.nn.functional.pad(short, (0, -dim % per_byte)).reshape(rows, -(-dim // per_byte), per_byte)
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * bits
    return (padded << shifts).sum(2).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, dim: int, *, signed: bool = True) -> torch.Tensor:
    """The inverse of `pack`: int8 [T, dim] (uint8 where not `signed`)."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=packed.device, dtype=torch.int32) * bits
    codes = (packed.to(torch.int32)[..., None] >> shifts) & ((1 << bits) - 1)
    codes = codes.flatten(1)[:, :dim]
    if not signed:
        return codes.to(torch.uint8)
    return torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes).to(torch.int8)


@dataclass(frozen=True)
class QuantizedTable:
    """A table of short codes, each row with a step size of its own before its codes: value = step * code.

    Attributes
    ----------
    rows : Tensor [T, row bytes], uint8
        Header `step`: float32 step, then the codes, then zeros up to a multiple of 4 bytes. Header `affine`: float16
        scale and bias, then unsigned codes, value = scale * code + bias (inference only).
    bits : 8, 4, 2, or "fp8"
        Width of a code: int8, int4 and int2 in two's complement, packed from the low bits up, or float8 e4m3fn.
    dim : int
        D.
    header : {"step", "affine"}
    saturated : int
        How many values `quantize` had to clamp to the range of the codes.
    """

    rows: torch.Tensor
    bits: int | str = 8
    dim: int = 0
    header: str = "step"
    saturated: int = 0

    def __post_init__(self) -> None:
        op = "QuantizedTable"
        name = format_of_bits(op, self.bits)
        _check.choice(op, "header", self.header, ("step", "affine"))
        _check.tensor(op, "rows", self.rows, dtypes=[torch.uint8], shape=["T", "row bytes"])
        if self.header == "affine" and self.bits == "fp8":
            raise ValueError(f"{op}: header affine goes with 8, 4 or 2 bits, got bits 'fp8'")
        size = self.rows.shape[1]
        dim = self.dim or max(0, size - HEADER_BYTES) * 8 // FORMATS[name].bits
        object.__setattr__(self, "dim", dim)
        if self.header == "step" and size != row_bytes(name, dim):
            raise ValueError(f"{op}: rows of {dim} columns in {name} take {row_bytes(name, dim)} bytes, got {size}")
        if self.header == "affine" and size < HEADER_BYTES + code_bytes(name, dim):
            raise ValueError(
                f"{op}: rows of {dim} columns in {name} take at least {HEADER_BYTES + code_bytes(name, dim)} bytes, "
                f"got {size}"
            )

    @classmethod
    def from_codes(cls, codes: torch.Tensor, step: torch.Tensor, bits: int | str = 8) -> QuantizedTable:
        """Put codes and step sizes together.

        Parameters
        ----------
        codes : Tensor [T, D], int8 (float8_e4m3fn for "fp8"), in the range of `bits`
        step : Tensor [T], float32
        """
        op = "QuantizedTable.from_codes"
        name = format_of_bits(op, bits)
        wanted = torch.float8_e4m3fn if bits == "fp8" else torch.int8
        _check.tensor(op, "codes", codes, dtypes=[wanted], shape=["T", "D"])
        count, dim = codes.shape
        _check.tensor(op, "step", step, dtypes=[torch.float32], shape=[count], device=codes.device)
        info = FORMATS[name]
        if isinstance(bits, int) and codes.numel():
            low, high = (int(x) for x in torch.aminmax(codes))
            if low < info.lowest or high > info.highest:
                raise ValueError(
                    f"{op}: codes must be in [{info.lowest}, {info.highest}], got values in [{low}, {high}]"
                )
        rows = torch.zeros(count, row_bytes(name, dim), dtype=torch.uint8, device=codes.device)
        table = cls(rows, bits, dim)
        table.step.copy_(step)
        packed = codes.contiguous().view(torch.uint8) if info.bits == 8 else pack(codes, info.bits)
        rows[:, HEADER_BYTES : HEADER_BYTES + packed.shape[1]] = packed
        return table

    @property
    def format(self) -> str:
        """Its name: "float8", "int8", "int4" or "int2"."""
        return _BITS[self.bits]

    @property
    def step(self) -> torch.Tensor:
        """The step sizes: Tensor [T], float32; a view of the rows, or (header `affine`) the scales as a copy."""
        if self.header == "affine":
            return self._halves()[:, 0].float()
        return self.rows.view(torch.float32)[:, 0]

    @property
    def bias(self) -> torch.Tensor:
        """What is added to a row: Tensor [T], float32; zeros with header `step`."""
        if self.header == "affine":
            return self._halves()[:, 1].float()
        return torch.zeros(len(self), device=self.rows.device)

    @property
    def codes(self) -> torch.Tensor:
        """The codes: Tensor [T, D], int8 (uint8 with header `affine`, float8_e4m3fn for "fp8").

        A view of the rows for 8 bits, an unpacked copy for 4 and 2.
        """
        packed = self.rows[:, HEADER_BYTES : HEADER_BYTES + code_bytes(self.format, self.dim)]
        if self.bits == "fp8":
            return packed.view(torch.float8_e4m3fn)
        if self.bits == 8:
            return packed if self.header == "affine" else packed.view(torch.int8)
        return unpack(packed, self.bits, self.dim, signed=self.header == "step")

    def reference_values(
        self, rows: torch.Tensor | slice = slice(None), dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The values of some rows in plain torch: Tensor [R, D], `dtype`."""
        part = QuantizedTable(self.rows[rows], self.bits, self.dim, self.header)
        values = part.step.to(dtype)[:, None] * part.codes.to(torch.float32).to(dtype)
        return values + part.bias.to(dtype)[:, None] if self.header == "affine" else values

    def dequantize(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The rows as floats.

        Parameters
        ----------
        rows : Tensor [R], int32 or int64, or None
            Which rows; None: all.

        Returns
        -------
        Tensor [T, D] or [R, D], float32

        Raises
        ------
        OutOfRange
            A row outside [0, T).
        """
        op = "QuantizedTable.dequantize"
        if rows is not None:
            _check.tensor(op, "rows", rows, dtypes=_check.INDEX_DTYPES, shape=["R"], device=self.rows.device)
        if self.rows.device.type != "cpu":
            return self.reference_values(slice(None) if rows is None else rows.long())
        table = self._table()
        out = torch.empty(len(self) if rows is None else len(rows), self.dim)
        if rows is None:
            _dequantize(*table, out.data_ptr())
            return out
        ids = rows.contiguous()
        wrong = _embedding_bag(
            *table, ids.data_ptr(), ids.dtype == torch.int64, len(ids), 0, len(ids), 0, 0, 0, 0, False, 0, 3,
            out.data_ptr(), 0,
        )  # fmt: skip
        if wrong is not None:
            raise _check.outside(op, "rows", wrong[1], int(ids[wrong[1]]), len(self))
        return out

    def _table(self) -> tuple[int, int, int, int, int, int]:
        """What kernels are told of the rows: address, number, D, stride in bytes, format, header."""
        stride = self.rows.stride(0) if self.rows.shape[0] > 1 else self.rows.shape[1]
        return self.rows.data_ptr(), len(self), self.dim, stride, FORMATS[self.format].code, HEADERS[self.header]

    @classmethod
    def from_fbgemm(cls, rows: torch.Tensor, bits: int, dim: int, *, layout: str = "inference") -> QuantizedTable:
        """Take over rows that FBGEMM (or `torch.ops.quantized.*_prepack`) has made.

        Parameters
        ----------
        rows : Tensor [T, row bytes], uint8
        bits : 8, 4 or 2
        dim : int
        layout : str
            "inference": `IntNBitTableBatchedEmbeddingBagsCodegen`, float16 scale and bias before the codes; the tensor
            is used as it is. "fused": `FloatToFusedNBitRowwiseQuantizedSBHalf` and torch's 4- and 2-bit rows, float16
            scale and bias after the codes; for 8 bits `FloatToFused8BitRowwiseQuantized` and torch's byte rows, float32
            scale and bias after the codes.

        Returns
        -------
        QuantizedTable
            With header `affine`. The values are exactly those of the rows, but for "fused" rows of 8 bits, whose scale
            and bias are rounded to float16 (each by at most 2^-11 of itself, or 2^-25 where it is below 2^-14).

        Raises
        ------
        ValueError, TypeError
            Other bits, too few bytes, an 8-bit scale or bias beyond float16.
        """
        op = "QuantizedTable.from_fbgemm"
        name = _integer_bits(op, bits)
        _check.choice(op, "layout", layout, LAYOUTS)
        _check.tensor(op, "rows", rows, dtypes=[torch.uint8], shape=["T", "row bytes"])
        if layout == "inference":
            return cls(rows, bits, dim, "affine")
        codes = code_bytes(name, dim)
        tail = 8 if bits == 8 else 4
        _check.tensor(op, "rows", rows, shape=["T", codes + tail])
        head = rows[:, codes:].clone(memory_format=torch.contiguous_format)
        if bits == 8:
            wide = head.view(torch.float32)
            halves = wide.half()
            if not bool(torch.isfinite(halves).all()):
                raise ValueError(f"{op}: scale and bias must be in the range of float16, got {float(wide.abs().max())}")
            head = halves.view(torch.uint8)
        return cls(torch.cat([head, rows[:, :codes]], 1), bits, dim, "affine")

    def to_fbgemm(self, *, layout: str = "inference") -> torch.Tensor:
        """The rows as FBGEMM stores them: Tensor [T, row bytes], uint8; `layout` as in `from_fbgemm`.

        Exact, but for these: with header `step` and a layout with float16 scales the step is rounded to float16; rows
        whose float16 bias (-2^(bits - 1) steps) would be infinite are refused. Into "fused" rows of 8 bits nothing is
        rounded.
        """
        op = "QuantizedTable.to_fbgemm"
        name = _integer_bits(op, self.bits)
        _check.choice(op, "layout", layout, LAYOUTS)
        size = code_bytes(name, self.dim)
        codes, scale, bias = self.rows[:, HEADER_BYTES : HEADER_BYTES + size], self.step, self.bias
        wide = layout == "fused" and self.bits == 8
        if self.header == "step":
            middle = 1 << (self.bits - 1)
            codes = pack(self.codes.to(torch.int32) + middle, self.bits)
            scale = scale if wide else scale.half().float()
            bias = -middle * scale
        head = torch.stack([scale, bias], 1)
        head = head if wide else head.half()
        if self.header == "step" and not bool(torch.isfinite(head).all()):
            raise ValueError(f"{op}: steps must be below 65504 / {middle}, got {float(self.step.max())}")
        parts = [head.view(torch.uint8), codes]
        return torch.cat(parts if layout == "inference" else parts[::-1], 1)

    def _halves(self) -> torch.Tensor:
        return self.rows[:, :HEADER_BYTES].clone(memory_format=torch.contiguous_format).view(torch.float16)

    def __len__(self) -> int:
        return self.rows.shape[0]


def _integer_bits(op: str, bits: object) -> str:
    name = format_of_bits(op, bits)
    if bits == "fp8":
        raise ValueError(f"{op}: bits must be 8, 4 or 2, got 'fp8'")
    return name


def _rounded(
    op: str, weight: torch.Tensor, name: str, target: torch.Tensor, step: torch.Tensor | None, rounding: str, seed: int
) -> int:
    """Rounds `weight` into `target` by the kernel; returns how many values were saturated."""
    wrong, saturated = _quantize(
        weight.data_ptr(), FORMATS[PLAIN[weight.dtype]].code, weight.shape[0], weight.shape[1], target.data_ptr(),
        target.stride(0) * target.element_size(), FORMATS[name].code, 0 if step is None else step.data_ptr(),
        rounding == "stochastic", seed % 2**64,
    )  # fmt: skip
    if wrong >= 0:
        value = float(weight.reshape(-1)[wrong])
        raise ValueError(f"{op}: weight must be finite, got {value} at flat position {wrong}")
    return saturated


def _checked(op: str, weight: torch.Tensor, rounding: str) -> torch.Tensor:
    _check.choice(op, "rounding", rounding, ROUNDINGS)
    _check.tensor(op, "weight", weight, dtypes=_FLOATS, shape=["T", "D"])
    if weight.device.type != "cpu":
        raise ValueError(f"{op}: weight must be on the CPU, got {weight.device}")
    return weight.detach().contiguous()


def quantize(
    weight: torch.Tensor,
    *,
    bits: int | str = 8,
    step: torch.Tensor | float | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> QuantizedTable:
    """Round a float table to short codes with one step size a row.

    .. math:: q_{rd} = \\mathrm{clip}(\\mathrm{round}(w_{rd} / \\Delta_r), q_{min}, q_{max})

    Parameters
    ----------
    weight : Tensor [T, D], float32, float64 (rounded to float32 first), bfloat16 or float16, finite
    bits : 8, 4, 2 or "fp8"
        Codes in -128 .. 127, -8 .. 7, -2 .. 1, or float8 e4m3fn up to 448.
    step : Tensor [T], float or None
        The step sizes, positive. None: max |w_r| over the highest code (127, 7, 1, 448), so that nothing is clipped (a
        row of zeros gets step 0).
    rounding : str
        "nearest" (ties to even), or "stochastic": up with the probability of the fraction, so that the mean is kept.
    seed : int
        Of the stochastic rounding. Its draws are a function of the seed and of the place in the table alone.

    Returns
    -------
    QuantizedTable
        For integers |dequantised - w| is at most step / 2 ("nearest") or below step ("stochastic") where nothing is
        clipped; `saturated` counts what is. w / step is rounded to float32 before it is rounded to a code, so that a
        value within 2^-24 of itself to a border may fall to either side.

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape, NaN or infinity, a step that is not positive, other bits.

    Notes
    -----
    The same codes on every instruction set and for any number of threads. Backend: CPU (scalar, AVX2, AVX-512).
    """
    op = "quantize"
    name = format_of_bits(op, bits)
    weight = _checked(op, weight, rounding)
    steps = None
    if step is not None:
        steps = torch.as_tensor(step, dtype=torch.float32).detach()
        steps = steps.expand(len(weight)).clone() if steps.dim() == 0 else steps.contiguous()
        _check.tensor(op, "step", steps, shape=[len(weight)], device=weight.device)
        if not bool(((steps > 0) & torch.isfinite(steps)).all()):
            raise ValueError(f"{op}: step must be positive and finite, got {float(steps.min())}")
    rows = empty_table(len(weight), row_bytes(name, weight.shape[1]))
    saturated = _rounded(op, weight, name, rows, steps, rounding, seed)
    return QuantizedTable(rows, bits, weight.shape[1], saturated=saturated)


def round_to(weight: torch.Tensor, dtype: torch.dtype, *, rounding: str = "nearest", seed: int = 0) -> torch.Tensor:
    """Round a float table to 16 bits.

    Parameters
    ----------
    weight : Tensor [T, D], float32, float64 (rounded to float32 first), bfloat16 or float16, finite
    dtype : torch.bfloat16 or torch.float16
    rounding : str
        "nearest" (ties to even), or "stochastic": up with the probability of the fraction.
    seed : int
        As in `quantize`.

    Returns
    -------
    Tensor [T, D], `dtype`
        Values beyond the largest finite one become that one.

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape, NaN or infinity.
    """
    op = "round_to"
    _check.choice(op, "dtype", dtype, (torch.bfloat16, torch.float16))
    weight = _checked(op, weight, rounding)
    out = empty_table(len(weight), 2 * weight.shape[1], dtype)
    _rounded(op, weight, PLAIN[dtype], out, None, rounding, seed)
    return out


def _integers(x: torch.Tensor, words: torch.Tensor | None) -> torch.Tensor:
    """x rounded to integers: ties to even, or stochastically by the draws."""
    if words is None:
        return x.round()
    return x.floor() + ((words >> 8).double() / 2**24 < x.double() - x.double().floor()).to(x.dtype)


def _on_grid(x: torch.Tensor, least: int, mantissa: int, words: torch.Tensor | None) -> torch.Tensor:
    spacing = torch.exp2((torch.frexp(x).exponent - 1).clamp(min=least).double() - mantissa)
    rounded = (_integers((x.double() / spacing).float(), words).double() * spacing).float()
    return torch.copysign(rounded.abs(), x)


def quantize_reference(
    weight: torch.Tensor,
    *,
    bits: int | str = 8,
    step: torch.Tensor | float | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> QuantizedTable:
    """`quantize` in plain torch: the same rows, bit for bit."""
    info = FORMATS[format_of_bits("quantize", bits)]
    weight = weight.detach().float()
    count, dim = weight.shape
    if step is None:
        steps = (weight.abs().amax(1) if dim else weight.new_zeros(count)) / info.highest
    else:
        steps = torch.as_tensor(step, dtype=torch.float32).expand(count)
    words = philox_words(seed, 0xFFFFFFFF, 0, torch.arange(count), dim) if rounding == "stochastic" else None
    scaled = torch.where(steps[:, None] > 0, weight / steps[:, None], 0.0)
    if bits == "fp8":
        codes = _on_grid(scaled.clamp(-1024, 1024), -6, 3, words)
    else:
        codes = _integers(scaled.clamp(info.lowest - 1, info.highest + 1), words)
    limited = codes.clamp(info.lowest, info.highest)
    table = QuantizedTable.from_codes(limited.to(torch.float8_e4m3fn if bits == "fp8" else torch.int8), steps, bits)
    return QuantizedTable(table.rows, bits, dim, saturated=int((codes != limited).sum()))


def round_to_reference(
    weight: torch.Tensor, dtype: torch.dtype, *, rounding: str = "nearest", seed: int = 0
) -> torch.Tensor:
    """`round_to` in plain torch: the same values, bit for bit."""
    weight = weight.detach().float()
    highest = torch.finfo(dtype).max
    if rounding == "nearest":
        return weight.to(dtype).clamp(-highest, highest)
    words = philox_words(seed, 0xFFFFFFFF, 0, torch.arange(weight.shape[0]), weight.shape[1])
    if dtype == torch.float16:
        return _on_grid(weight, -14, 10, words).clamp(-highest, highest).to(dtype)
    magnitude = (weight.abs().contiguous().view(torch.int32).long() + (words >> 16)) & ~0xFFFF
    rounded = magnitude.clamp(max=0x7F7F0000).to(torch.int32).view(torch.float32)
    return torch.copysign(rounded, weight).to(dtype)


quantize.reference = quantize_reference
round_to.reference = round_to_reference
