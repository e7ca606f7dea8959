"""Post-training quantisation: a trained float table rounded once, with the step that loses least."""

from __future__ import annotations

from typing import Any

import torch

from recfast import ops
from recfast.nn.compressed._base import CompressedTables
from recfast.ops import _check
from recfast.ops.formats import FORMATS, QuantizedTable

STEPS = ("max", "mse")


class PostTrainingTables(CompressedTables):
    """The rows of trained tables in 8, 4 or 2 bits, each with a step size of its own; to serve, not to train.

    Parameters
    ----------
    tables : nn.EmbeddingTables, or other tables with `specs`, `dim` and `dequantize(name)`
        A copy of their rows is taken. Names of sequence columns that share a table are not taken over.
    bits : {8, 4, 2}
    step : {"mse", "max"}
        Of a row: the one with the least squared error (`best_step`), or the one whose largest code is its largest
        weight, so that nothing is clipped.

    Raises
    ------
    ValueError
        Options that are not among these.
    """

    def __init__(self, tables: Any, bits: int = 8, *, step: str = "mse") -> None:
        super().__init__(tables.specs, tables.dim)
        place = type(self).__name__
        _check.choice(place, "bits", bits, (8, 4, 2))
        _check.choice(place, "step", step, STEPS)
        self.bits, self.step = bits, step
        weight = torch.cat([tables.dequantize(name) for name, _ in self.specs])
        steps = best_step(weight, bits) if step == "mse" else _largest_step(weight, bits)
        codes = _rounded(weight, steps, bits).to(torch.int8)
        self.register_buffer("stored", QuantizedTable.from_codes(codes, steps, bits).rows)

    @property
    def table(self) -> QuantizedTable:
        """All rows, as the ops take them; a view, not a copy."""
        return QuantizedTable(self.stored, self.bits, self.dim)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        return ops.embedding_bag(self.table, rows)

    def memory_bytes(self) -> int:
        """Bytes of the rows: step size, codes and padding."""
        return self.stored.numel()


def best_step(weight: torch.Tensor, bits: int, *, candidates: int = 120, rounds: int = 5) -> torch.Tensor:
    """The step size of each row with the least squared rounding error, clipping included.

    .. math:: \\Delta_r = \\arg\\min_\\Delta \\sum_d \\big(w_{rd} - \\Delta \\,\\mathrm{clip}(\\mathrm{round}(
        w_{rd} / \\Delta))\\big)^2

    The best of a grid, never worse than the step max |w| / (2^{b-1} - 1) that clips nothing; then improved by turns:
    codes for the step, and the step :math:`\\langle w, q \\rangle / \\langle q, q \\rangle` for the codes.

    Parameters
    ----------
    weight : Tensor [T, D], float32
    bits : {8, 4, 2}
    candidates : int
        Of the grid: half of them spread below the step that clips nothing, half close to it, where the codes of the
        large weights change from one to the next.
    rounds : int
        Of the improvement.

    Returns
    -------
    Tensor [T], float32
        0 for a row of zeros.
    """
    _check.choice("best_step", "bits", bits, (8, 4, 2))
    _check.tensor("best_step", "weight", weight, dtypes=[torch.float32], shape=["T", "D"])
    _check.at_least("best_step", "candidates", candidates, 1)
    _check.finite("best_step", "weight", weight)
    largest = _largest_step(weight, bits)
    best, least = largest, _squared_error(weight, largest, bits)

    def keep_better(steps: torch.Tensor) -> None:
        nonlocal best, least
        error = _squared_error(weight, steps, bits)
        better = error < least
        best, least = torch.where(better, steps, best), torch.where(better, error, least)

    highest = FORMATS[f"int{bits}"].highest
    wide = torch.linspace(0.0, 1.0, candidates // 2 + 1)[1:]
    close = torch.linspace(max(0.0, 1 - 2 / highest), 1 + 0.5 / highest, candidates - len(wide) + 1)[1:]
    for share in (*wide.tolist(), *close.tolist()):
        keep_better(largest * share)
    for _ in range(rounds):
        codes = _rounded(weight, best, bits)
        length = codes.square().sum(1)
        improved = (weight * codes).sum(1) / length.clamp(min=1.0)
        keep_better(torch.where((length > 0) & (improved > 0), improved, best))
    return best


def _largest_step(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return weight.abs().amax(1) / FORMATS[f"int{bits}"].highest


def _rounded(weight: torch.Tensor, steps: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes, as floats; ties to even; 0 where the step is 0."""
    form = FORMATS[f"int{bits}"]
    scaled = torch.where(steps[:, None] > 0, weight / steps[:, None], 0.0)
    return scaled.round().clamp(form.lowest, form.highest)


def _squared_error(weight: torch.Tensor, steps: torch.Tensor, bits: int) -> torch.Tensor:
    return (weight - steps[:, None] * _rounded(weight, steps, bits)).square().sum(1)
