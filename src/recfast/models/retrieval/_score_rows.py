"""Rows of a SparCode model's dense index, worked out when they are asked for and kept while the weights stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recfast.models.retrieval.sparcode import SparCode

# Bytes of rows that are kept.
_BUDGET = 1 << 29
# Codes scored at a time.
_BLOCK = 64


class ScoreRows:
    """`rows(codes)` gives a table and where in it each code's row is. Not part of the model's state, nor of its copies.

    At most 512 MB are kept, or what a single call asks for if that is more; when the next rows do not fit, the others
    are forgotten. Weights that have changed since, by whatever hand, make it forget everything.
    """

    def __init__(self, model: SparCode) -> None:
        # In a list, or the model would be a submodule of itself.
        self._model = [model]
        self._state: Any = None
        self._places: dict[int, int] = {}
        self._table = torch.empty(0, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScoreRows:
        return ScoreRows(memo.get(id(self._model[0]), self._model[0]))

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model, "_state": None, "_places": {}, "_table": torch.empty(0, 0)}

    def __call__(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(table float32 [S, rows(item)], places int64 like codes)`: row `places[x]` is that of `codes[x]`."""
        model = self._model[0]
        distinct, place = codes.unique(return_inverse=True)
        wanted = distinct.tolist()
        state = _state_of(model)
        missing = [code for code in wanted if code not in self._places]
        if state is None or state != self._state or len(self._places) + len(missing) > len(self._table):
            capacity = max(len(wanted), min(_BUDGET // (4 * model.rows), model.tokens.n_composite))
            if self._table.shape != (capacity, model.rows) or self._table.device != codes.device:
                # A tensor that is made in inference mode could not be written to outside of it later.
                with torch.inference_mode(False):
                    self._table = torch.empty(capacity, model.rows, device=codes.device)
            self._places, self._state, missing = {}, state, wanted
        for begin in range(0, len(missing), _BLOCK):
            block = missing[begin : begin + _BLOCK]
            first = len(self._places)
            self._table[first : first + len(block)] = model.code_scores(torch.tensor(block, device=codes.device))
            self._places.update(zip(block, range(first, first + len(block)), strict=True))
        rows = torch.tensor([self._places[code] for code in wanted], dtype=torch.int64, device=codes.device)
        return self._table, rows[place]


def _state_of(model: SparCode) -> Any:
    """Return what changes whenever a weight does; None where torch does not keep count."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
