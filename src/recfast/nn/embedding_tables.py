"""The embedding tables of a model: looked up together, updated inside backward, in floats or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from recfast import ops
from recfast.ops import _check
from recfast.ops.embedding_bag import ROUNDINGS, QuantizedTable
from recfast.ops.embedding_update import OPTIMIZERS, STEP_RANGES, UpdateState

PRECISIONS = ("float32", "int8")
_PLACE = "EmbeddingTables"


class _Lookup(torch.autograd.Function):
    """The lookup as autograd sees it: its backward updates the tables instead of returning a gradient.

    `anchor` requires a gradient, so that autograd comes here though no input of the lookup does.
    """

    @staticmethod
    def forward(ctx, anchor, tables, indices, offsets):
        ctx.tables = tables
        ctx.save_for_backward(indices, offsets)
        return ops.embedding_bag(tables.table, indices, offsets)

    @staticmethod
    def backward(ctx, grad):
        indices, offsets = ctx.saved_tensors
        ctx.tables._update(indices, offsets, grad)
        return None, None, None, None


class EmbeddingTables(nn.Module):
    """All embedding tables of a model as one table, trained by its own optimiser inside `backward`.

    There are no parameters: rows, step sizes and the optimiser's state are buffers, so a dense optimiser over
    `model.parameters()` does not see them, and `state_dict` holds all that an exact resume needs. In training mode,
    with gradients enabled, each call gathers once; when its gradient arrives, the rows that occurred are updated.
    Under `torch.no_grad`, `torch.inference_mode` or `eval()` nothing is updated. A module that is used several times
    before `backward` is updated once per use. Gradient clipping and accumulation of the dense optimiser do not reach
    the tables; for a scaled loss set `grad_scale` to the inverse of the scale.

    Parameters
    ----------
    schema_or_specs : list of (name, rows), or a fitted recfast.data.Schema
        Of a schema: the categorical columns in their order; a sequence column shares the table of its `of`.
    dim : int
        D.
    precision : str
        "float32", or "int8": one byte a weight and one float32 step size a row, no float copy.
    step : str
        int8 only. "learned": the step sizes are trained (ALPT in a single pass, see `ops.embedding_update_`);
        "fixed": they only change as `step_range` says.
    rounding : str
        int8 only. "stochastic" or "nearest" (which loses every change below half a step).
    optimizer : str
        "rowwise_adagrad" (4 bytes a row), "sgd", or "adagrad" (4 bytes a weight).
    lr : float
        Learning rate; can be set later (`tables.lr = ...`) and is part of the state.
    step_lr : float
        Learning rate of the step sizes, relative to the initial step: under their Adagrad the first change of a step is
        `step_lr` times `initial_step`.
    step_range : str
        "grow": a step is never smaller than max |w| / 127 of its row, so rows may outgrow the initial range and nothing
        is clipped. "clip": as published, weights outside the range are clipped and counted in `saturated`.
    init_std : float
        Rows start as N(0, init_std^2).
    init_range : float or None
        The initial step is `init_range` / 127 in every row. None: 4 * init_std.
    weight_decay : float
        L2 on the rows that a batch touches.
    eps : float
        Of Adagrad.
    seed : int
        Of the initial rows and of the stochastic rounding.

    Raises
    ------
    ValueError, TypeError
        Options out of range, repeated names, tables without rows.

    References
    ----------
    Li et al., "Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023.

    Examples
    --------
    >>> tables = EmbeddingTables([("user", 100), ("item", 1000)], 16, precision="int8")
    >>> tables(torch.tensor([[3, 14], [15, 92]])).shape
    torch.Size([2, 2, 16])
    """

    def __init__(
        self,
        schema_or_specs: Any,
        dim: int,
        precision: str = "float32",
        *,
        step: str = "learned",
        rounding: str = "stochastic",
        optimizer: str = "rowwise_adagrad",
        lr: float = 0.05,
        step_lr: float = 0.01,
        step_range: str = "grow",
        init_std: float = 0.01,
        init_range: float | None = None,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check.choice(_PLACE, "precision", precision, PRECISIONS)
        _check.choice(_PLACE, "step", step, ("learned", "fixed"))
        _check.choice(_PLACE, "rounding", rounding, ROUNDINGS)
        _check.choice(_PLACE, "optimizer", optimizer, OPTIMIZERS)
        _check.choice(_PLACE, "step_range", step_range, STEP_RANGES)
        _check.at_least(_PLACE, "dim", dim, 1)
        _check.at_least(_PLACE, "init_std", init_std, 0.0)
        self.specs, aliases = _specs(schema_or_specs)
        self.dim, self.precision, self.step, self.rounding = dim, precision, step, rounding
        self.optimizer, self.step_range, self.weight_decay, self.eps = optimizer, step_range, weight_decay, eps
        self.init_range = 4 * init_std if init_range is None else init_range
        if precision == "int8" and not self.init_range > 0:
            raise ValueError(f"{_PLACE}: init_range must be positive, got {self.init_range}")
        self.step_lr = step_lr
        self.grad_scale = 1.0
        self.check_finite = True
        self._first, total = {}, 0
        self._rows = dict(self.specs)
        for name, rows in self.specs:
            self._first[name] = total
            total += rows
        for name, of in aliases.items():
            self._first[name], self._rows[name] = self._first[of], self._rows[of]
        self._names = [name for name, _ in self.specs]

        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(total, dim).normal_(0.0, init_std, generator=generator)
        if precision == "int8":
            quantized = ops.quantize(weight, step=self.initial_step, rounding=rounding, seed=seed)
            self.register_buffer("codes", quantized.codes)
            self.register_buffer("steps", quantized.step)
        else:
            self.register_buffer("weight", weight)
        learned = precision == "int8" and step == "learned"
        state = UpdateState.zeros(self.table, optimizer=optimizer, step_optimizer="adagrad" if learned else None)
        self.register_buffer("moment", state.moment)
        self.register_buffer("step_moment", state.step_moment)
        # Updates done, codes clipped so far, seed: what the next draw depends on, and so part of a checkpoint.
        self.register_buffer("counters", torch.tensor([0, 0, seed], dtype=torch.int64))
        self.register_buffer("learning_rate", torch.tensor(float(lr), dtype=torch.float64))
        self.lr = lr
        starts = torch.tensor([self._first[name] for name in self._names], dtype=torch.int64)
        sizes = torch.tensor([self._rows[name] for name in self._names], dtype=torch.int64)
        self.register_buffer("_starts", starts, persistent=False)
        self.register_buffer("_sizes", sizes, persistent=False)

    @property
    def table(self) -> torch.Tensor | QuantizedTable:
        """All rows, as the ops take them; a view, not a copy."""
        return QuantizedTable(self.codes, self.steps) if self.precision == "int8" else self.weight

    @property
    def initial_step(self) -> float:
        """The step size that every row starts with."""
        return self.init_range / 127

    @property
    def lr(self) -> float:
        """Learning rate of the rows."""
        return float(self.learning_rate)

    @lr.setter
    def lr(self, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise ValueError(f"{_PLACE}: lr must be finite and not negative, got {value}")
        self.learning_rate.fill_(value)

    @property
    def updates(self) -> int:
        """How many updates have been done."""
        return int(self.counters[0])

    @property
    def saturated(self) -> int:
        """How many codes have been clipped in all updates."""
        return int(self.counters[1])

    def rows(self, name: str) -> int:
        """The number of rows of table `name`."""
        self._known(name)
        return self._rows[name]

    def dequantize(self, name: str) -> torch.Tensor:
        """The rows of table `name`: Tensor [T, D], float32, a copy."""
        part = self._part(name)
        if self.precision == "int8":
            return self.steps[part, None] * self.codes[part].float()
        return self.weight[part].clone()

    def step_size(self, name: str) -> torch.Tensor:
        """The step sizes of table `name`: Tensor [T], float32, a copy."""
        part = self._part(name)
        if self.precision != "int8":
            raise ValueError(f"{_PLACE}: tables of precision {self.precision} have no step sizes")
        return self.steps[part].clone()

    def memory_bytes(self) -> int:
        """Bytes of rows, step sizes and optimiser state."""
        parts = [getattr(self, name, None) for name in ("weight", "codes", "steps", "moment", "step_moment")]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def forward(
        self, inputs: torch.Tensor | Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Look up one id of every table, or sums over bags of some.

        Parameters
        ----------
        inputs : Tensor [B, F], int32 or int64, or {name: (indices [n], offsets [B + 1])}
            F is the number of tables, in the order of the specs.

        Returns
        -------
        Tensor [B, F, D], or {name: Tensor [B, D]}; float32. An empty bag gives zeros.

        Raises
        ------
        IndexError
            An id outside its table; the sentence names table, position and value.
        """
        if isinstance(inputs, Mapping):
            return self._bags(inputs)
        _check.tensor(_PLACE, "ids", inputs, dtypes=_check.INDEX_DTYPES, shape=["B", len(self.specs)])
        ids = inputs.to(torch.int64)
        if bool(((ids < 0) | (ids >= self._sizes)).any()):
            for column, name in enumerate(self._names):
                self._check_ids(name, ids[:, column])
        out = self._gather((ids + self._starts).reshape(-1), None)
        return out.reshape(*inputs.shape, self.dim)

    def lookup(self, requests: Sequence[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Look up any number of id tensors in one gather (and, in training, one update).

        Parameters
        ----------
        requests : list of (name, Tensor of any shape, int32 or int64)
            The name of a table, or of a sequence column that shares one. Names may repeat.

        Returns
        -------
        list of Tensor [*, D], float32
            One for each request, in order.

        Raises
        ------
        IndexError
            An id outside its table; the sentence names table, position (in the flattened ids) and value.
        """
        if not requests:
            return []
        flat = [self._global(name, ids) for name, ids in requests]
        out = self._gather(flat[0] if len(flat) == 1 else torch.cat(flat), None)
        parts = out.split([ids.numel() for _, ids in requests])
        return [part.reshape(*ids.shape, self.dim) for part, (_, ids) in zip(parts, requests, strict=True)]

    def extra_repr(self) -> str:
        rows = sum(rows for _, rows in self.specs)
        return (
            f"{len(self.specs)} tables, {rows} rows, dim={self.dim}, precision={self.precision}, "
            f"optimizer={self.optimizer}, lr={self.lr:g}"
        )

    def _bags(self, inputs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if not inputs:
            return {}
        indices, offsets, counts, total = [], [], [], 0
        for name, (ids, cuts) in inputs.items():
            flat = self._global(name, ids)
            _check.tensor(f"{_PLACE}: {name}", "offsets", cuts, dtypes=_check.INDEX_DTYPES, shape=["B + 1"])
            _check.offsets(f"{_PLACE}: {name}", "offsets", cuts, flat.numel())
            indices.append(flat)
            offsets.append(cuts[:-1].to(torch.int64) + total)
            counts.append(cuts.numel() - 1)
            total += flat.numel()
        offsets.append(torch.tensor([total], dtype=torch.int64, device=offsets[0].device))
        out = self._gather(torch.cat(indices), torch.cat(offsets))
        return dict(zip(inputs, out.split(counts), strict=True))

    def _gather(self, indices: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            anchor = torch.empty(0, device=indices.device, requires_grad=True)
            return _Lookup.apply(anchor, self, indices, offsets)
        return ops.embedding_bag(self.table, indices, offsets)

    @torch.no_grad()
    def _update(self, indices: torch.Tensor, offsets: torch.Tensor | None, grad: torch.Tensor) -> None:
        learned = self.step_moment is not None
        clipped = ops.embedding_update_(
            self.table,
            indices,
            offsets,
            grad.to(torch.float32),
            UpdateState(self.moment, self.step_moment),
            optimizer=self.optimizer,
            lr=self.lr,
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_scale=self.grad_scale,
            step_lr=self.step_lr * self.initial_step if learned else None,
            step_range=self.step_range,
            rounding=self.rounding,
            seed=int(self.counters[2]),
            step_count=self.updates,
            check=self.check_finite,
        )
        self.counters[0] += 1
        self.counters[1] += clipped

    def _known(self, name: str) -> None:
        if name not in self._first:
            raise KeyError(f"{_PLACE}: there is no table {name!r}; there are {', '.join(self._first)}")

    def _part(self, name: str) -> slice:
        self._known(name)
        return slice(self._first[name], self._first[name] + self._rows[name])

    def _check_ids(self, name: str, ids: torch.Tensor) -> None:
        _check.indices(_PLACE, name, ids, self._rows[name])

    def _global(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        self._known(name)
        _check.tensor(_PLACE, name, ids, dtypes=_check.INDEX_DTYPES)
        flat = ids.reshape(-1)
        self._check_ids(name, flat)
        return flat.to(torch.int64) + self._first[name]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> EmbeddingTables:
        # `.half()`, `.double()` and the like are for dense layers: the precision of the tables is their own.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep_dtype, recurse)


def _specs(given: Any) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """The tables as (name, rows), and the other names that share one."""
    if hasattr(given, "categorical"):
        specs = [(column.name, given.rows(column.name)) for column in given.categorical]
        aliases = {column.name: column.of for column in given.sequences}
    else:
        specs, aliases = [(str(name), int(rows)) for name, rows in given], {}
    names = [name for name, _ in specs]
    if not specs:
        raise ValueError(f"{_PLACE}: there must be at least one table")
    for position, (name, rows) in enumerate(specs):
        if name in names[:position]:
            raise ValueError(f"{_PLACE}: the name {name!r} stands twice")
        if rows < 1:
            raise ValueError(f"{_PLACE}: table {name!r} must have at least one row, got {rows}")
    for name, of in aliases.items():
        if of not in names:
            raise ValueError(f"{_PLACE}: sequence {name!r} shares the table of {of!r}, which is no categorical column")
    return specs, {name: of for name, of in aliases.items() if name not in names}
