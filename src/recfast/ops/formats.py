"""How rows of a table are stored: `QuantizedTable`, and what the formats are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from recfast.ops import _check


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
    """

    rows: torch.Tensor
    bits: int | str = 8
    dim: int = 0
    header: str = "step"

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

    def dequantize(self) -> torch.Tensor:
        """The rows as floats: Tensor [T, D], float32."""
        return self.reference_values()

    def _halves(self) -> torch.Tensor:
        return self.rows[:, :HEADER_BYTES].contiguous().view(torch.float16)

    def __len__(self) -> int:
        return self.rows.shape[0]
