"""An embedding table over ids that are not known beforehand: rows come with their ids and go with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from recfast import ops
from recfast.errors import InputError
from recfast.nn._table_group import BITS, PRECISIONS, default_range, range_rule
from recfast.ops import UpdateState, _check, formats
from recfast.ops._memory import zeros
from recfast.ops.embedding_update import OPTIMIZERS, STEP_FLOORS, STEP_OPTIMIZERS, STEP_RANGES
from recfast.ops.formats import ROUNDINGS

DEFAULTS = ("zeros", "trained")
_PLACE = "DynamicTable"
_DEFAULT_ROW = 0
_ENTRIES = ("ids", "rows", "counts", "last_seen")


class _Rows:
    """Rows in one precision and what their optimiser remembers, in tensors that grow together.

    `tensors` has the rows ([T, D], or uint8 [T, row bytes] for precisions with a step size a row) under "rows", and the
    parts of `ops.UpdateState` that the optimiser has.
    """

    def __init__(
        self,
        dim: int,
        precision: str,
        *,
        optimizer: str,
        step_optimizer: str | None,
        moment_bits: int,
        initial_step: float,
        dither: bool,
    ) -> None:
        self.dim, self.initial_step, self.dither = dim, initial_step, dither
        info = formats.FORMATS[precision]
        self.dtype, self.bits = info.dtype, None if info.dtype is not None else BITS[precision]
        if self.bits is None:
            self.tensors = {"rows": torch.zeros(0, dim, dtype=self.dtype)}
        else:
            self.tensors = {"rows": torch.zeros(0, formats.row_bytes(precision, dim), dtype=torch.uint8)}
        state = UpdateState.zeros(
            self.table, optimizer=optimizer, step_optimizer=step_optimizer, moment_bits=moment_bits
        )
        parts = {"row_state": state.row, "moment": state.moment, "second": state.second}
        self.tensors |= {name: part for name, part in parts.items() if part is not None}

    def __len__(self) -> int:
        return self.tensors["rows"].shape[0]

    @property
    def table(self) -> torch.Tensor | ops.QuantizedTable:
        rows = self.tensors["rows"]
        return rows if self.bits is None else ops.QuantizedTable(rows, self.bits, self.dim)

    def gather(self, rows: torch.Tensor, offsets: torch.Tensor | None, mode: str) -> torch.Tensor:
        return ops.embedding_bag(self.table, rows, offsets, mode=mode)

    def update(
        self, rows: torch.Tensor, offsets: torch.Tensor | None, grad: torch.Tensor, mode: str, **options: Any
    ) -> int:
        state = UpdateState(*(self.tensors.get(name) for name in ("row_state", "moment", "second")))
        return int(ops.embedding_update_(self.table, rows, offsets, grad, state, mode=mode, **options))

    def grow(self, count: int) -> None:
        """Room for at least `count` rows, doubling, so that a row is moved once or twice in its life."""
        if count <= len(self):
            return
        size = max(count, 2 * len(self))
        self.tensors = {name: _longer(tensor, size) for name, tensor in self.tensors.items()}

    def draw(self, rows: torch.Tensor, ids: torch.Tensor, std: float, seed: int) -> None:
        """Give rows to new ids."""
        values = ops.initial_rows(ids, self.dim, std=std, seed=seed)
        if self.dither:
            # Rounding w + u to the nearest, u uniform over a step, is rounding w stochastically, by draws of the id:
            # rows of 2 bits, whose step is above most of their weights, would be all zeros without.
            deviation = self.initial_step / math.sqrt(12)
            values += ops.initial_rows(ids, self.dim, std=deviation, seed=seed, distribution="uniform")
        self.reset(rows, values)

    def reset(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Write values over whatever stood in some rows, and forget what the optimiser knew of them."""
        for name, tensor in self.tensors.items():
            if name != "rows":
                tensor[rows] = 0
        if self.bits is not None:
            values = ops.quantize(values, bits=self.bits, step=self.initial_step).rows
        elif self.dtype != torch.float32:
            values = ops.round_to(values, self.dtype)
        self.tensors["rows"][rows] = values


def _longer(tensor: torch.Tensor, size: int) -> torch.Tensor:
    grown = zeros(size, *tensor.shape[1:], dtype=tensor.dtype)
    grown[: tensor.shape[0]] = tensor
    return grown


class _Lookup(torch.autograd.Function):
    """The lookup as autograd sees it: its backward updates the rows instead of returning a gradient.

    `anchor` requires a gradient, so that autograd comes here though no input of the lookup does.
    """

    @staticmethod
    def forward(ctx, anchor, table, ids, rows, offsets, mode):
        ctx.table, ctx.mode, ctx.freed = table, mode, table._freed
        ctx.save_for_backward(ids, rows, offsets)
        return table._rows.gather(rows, offsets, mode)

    @staticmethod
    def backward(ctx, grad):
        ids, rows, offsets = ctx.saved_tensors
        if ctx.freed != ctx.table._freed:
            ctx.table._check_still_there(ids, rows)
        ctx.table._update(rows, offsets, grad, ctx.mode)
        return None, None, None, None, None, None


class DynamicTable(nn.Module):
    """Embedding rows for any 64-bit ids, without a vocabulary: rows come with their ids, train, and go with them.

    No two ids share a row. An id is counted from its first occurrence on and gets a row at its `min_count`-th; until
    then, and where `max_rows` are in use, it reads the default row that all such ids share. Ids not seen for
    `expire_after` updates are forgotten with their counts, and their rows go to the ids that come next.

    As in `EmbeddingTables` there are no parameters: in training mode with gradients enabled, `forward` counts and
    admits, and when the gradient arrives the rows that occurred are updated by the table's own optimiser, in the
    precision they are stored in. Under `eval()`, `torch.no_grad` or `torch.inference_mode` nothing is written.

    Parameters
    ----------
    dim : int
        D.
    precision : str
        "float32"; "bfloat16", "float16"; "float8" (e4m3 with a step size a row); "int8", "int4", "int2": integers with
        one float32 step size a row. No float copy is kept.
    capacity : int
        Rows to make room for at first; room is doubled as ids come.
    max_rows : int or None
        The most ids that have a row at one time.
    full : str
        What happens at `max_rows`. "default": further ids read the default row, are counted, and get a row when one has
        become free and they occur again. "error": the batch is refused with `InputError` before anything is written.
    min_count : int
        Occurrences at which an id gets a row (frequency admission). All places of the batch in which that happens read
        the row.
    default : str
        The default row: "zeros" for ever, or "trained", from zeros, by the gradients of all lookups that read it.
    expire_after : int or None
        Updates after which an id that did not occur in them is forgotten. None: never.
    expire_every : int or None
        Updates between two searches for such ids, made at the start of a forward pass. None: a quarter of
        `expire_after`.
    step, rounding, optimizer, moment_bits, lr, betas, eps, weight_decay, decay, step_lr, step_optimizer, step_scale, \
step_floor, step_range
        As of `EmbeddingTables`; `lr` and `grad_scale` can be set at any time.
    init_std : float
        Standard deviation of new rows, which depend on `seed` and the id alone (`ops.initial_rows`).
    init_range : float or None
        New rows have the step size `init_range` over the highest code. None: as `EmbeddingTables`.
    seed : int
        Of new rows and of stochastic rounding. Tables of one model want different ones, or equal ids start equal.

    Raises
    ------
    ValueError, TypeError
        Options out of range.

    Notes
    -----
    The state (`state_dict`) is a copy, of as many rows as were ever in use, ids in ascending order; it is the same
    for the same history, whatever the threads, and loading it restores the sizes too. The table works on the CPU.
    `torch.compile` takes a lookup in evaluation into its graph; in training it breaks the graph there, with equal
    results.

    References
    ----------
    Liu et al., "Monolith: Real Time Recommendation System With Collisionless Embedding Table", 2022 (arXiv:2209.07663).

    Examples
    --------
    >>> table = DynamicTable(4, min_count=2, lr=0.1)
    >>> ids = torch.tensor([[2**40, -1], [2**40, 7]])
    >>> table(ids).shape, len(table), table.ids().tolist()
    (torch.Size([2, 2, 4]), 1, [1099511627776])
    >>> table(ids).sum().backward()  # -1 and 7 come for the second time
    >>> len(table), table.updates, table.counts(torch.tensor([-1, 8])).tolist()
    (3, 1, [2, 0])
    >>> bags = table(torch.tensor([7, -1, 7]), torch.tensor([0, 2, 2, 3]), mode="mean")
    >>> bags.shape
    torch.Size([3, 4])
    """

    resizable_state = True  # for `models.load`: a state of another number of rows fits

    def __init__(
        self,
        dim: int,
        precision: str = "float32",
        *,
        capacity: int = 1024,
        max_rows: int | None = None,
        full: str = "default",
        min_count: int = 1,
        default: str = "zeros",
        expire_after: int | None = None,
        expire_every: int | None = None,
        step: str = "learned",
        rounding: str = "stochastic",
        optimizer: str = "rowwise_adagrad",
        moment_bits: int = 32,
        lr: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay: str = "l2",
        step_lr: float = 0.01,
        step_optimizer: str = "adagrad",
        step_scale: str | float = "batch",
        step_floor: str = "clamp",
        step_range: str = "auto",
        init_std: float = 0.01,
        init_range: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check.at_least(_PLACE, "dim", dim, 1)
        _check.choice(_PLACE, "precision", precision, PRECISIONS)
        _check.at_least(_PLACE, "capacity", capacity, 0)
        if max_rows is not None:
            _check.at_least(_PLACE, "max_rows", max_rows, 1)
        _check.choice(_PLACE, "full", full, ("default", "error"))
        _check.choice(_PLACE, "default", default, DEFAULTS)
        if expire_after is not None:
            _check.at_least(_PLACE, "expire_after", expire_after, 1)
        expire_every = max(1, (expire_after or 1) // 4) if expire_every is None else expire_every
        _check.at_least(_PLACE, "expire_every", expire_every, 1)
        _check.choice(_PLACE, "step", step, ("learned", "fixed"))
        _check.choice(_PLACE, "rounding", rounding, ROUNDINGS)
        _check.choice(_PLACE, "optimizer", optimizer, OPTIMIZERS)
        _check.choice(_PLACE, "moment_bits", moment_bits, (32, 8))
        _check.choice(_PLACE, "decay", decay, ("l2", "decoupled"))
        _check.choice(_PLACE, "step_optimizer", step_optimizer, STEP_OPTIMIZERS)
        _check.choice(_PLACE, "step_floor", step_floor, STEP_FLOORS)
        _check.choice(_PLACE, "step_range", step_range, ("auto", *STEP_RANGES))
        for name, value in (("init_std", init_std), ("step_lr", step_lr)):
            _check.at_least(_PLACE, name, value, 0.0)
        init_range = default_range(precision, init_std) if init_range is None else init_range
        highest = formats.FORMATS[precision].highest  # of a code; 0 without a step size
        if highest and not 0 < init_range < math.inf:
            raise ValueError(f"{_PLACE}: init_range must be positive, got {init_range}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"{_PLACE}: seed = {seed} is outside [0, {2**63})")
        learned = precision in ("int8", "int4", "int2") and step == "learned"
        initial_step = init_range / highest if highest else 0.0
        self.dim, self.precision, self.default = dim, precision, default
        self.expire_after, self.expire_every = expire_after, expire_every
        self.optimizer, self.moment_bits = optimizer, moment_bits
        self.step = "learned" if learned else "fixed"
        self.step_optimizer = step_optimizer if learned else None
        self.init_std, self.seed = init_std, seed
        relative = 1.0 if step_optimizer == "sgd" else initial_step
        self._options = {
            "optimizer": optimizer, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay": decay,
            "step_lr": step_lr * relative if learned else None, "step_optimizer": step_optimizer,
            "step_scale": step_scale, "step_floor": step_floor, "step_range": range_rule(step_range, precision),
            "rounding": rounding,
        }  # fmt: skip
        self.grad_scale = 1.0
        self.check_finite = True
        self.lr = lr
        self.updates = 0
        """How many updates have been done."""
        self.saturated = 0
        """How many codes have been clipped in all updates."""
        self._last_expiry = 0
        self._freed = 0  # rows taken back so far: whether a row may have changed hands since a forward pass
        self._map = ops.IdMap(
            min_count=min_count, first_row=1, max_rows=None if max_rows is None else max_rows + 1, full=full
        )
        self._rows = _Rows(
            dim,
            precision,
            optimizer=optimizer,
            step_optimizer=self.step_optimizer,
            moment_bits=moment_bits,
            initial_step=initial_step,
            dither=precision.startswith("int") and rounding == "stochastic",
        )
        self._rows.grow(1 + capacity)
        self._reset_default()

    @property
    def lr(self) -> float:
        """Learning rate of the rows; part of the state."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = self._checked_lr(value)

    def __len__(self) -> int:
        """The number of ids with a row."""
        return len(self._map)

    def __bool__(self) -> bool:
        return True  # a module is one even while it has no rows

    @property
    def waiting(self) -> int:
        """The number of ids that are counted and have no row yet."""
        return self._map.known - len(self._map)

    def ids(self) -> torch.Tensor:
        """The ids with a row, ascending: Tensor [len], int64."""
        return self._map.ids()

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Where ids are stored: Tensor, shape of `ids`, int64; -1 for those that read the default row."""
        return self._map.find(self._checked(ids))

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        """How often ids occurred in training since they were last unknown: Tensor, shape of `ids`, int64."""
        return self._map.counts(self._checked(ids))

    def dequantize(self, ids: torch.Tensor) -> torch.Tensor:
        """What ids read, as floats: Tensor [*, D], float32, a copy. Nothing is counted."""
        with torch.no_grad():
            return self._rows.gather(self._find(self._checked(ids)), None, "sum")

    def memory_bytes(self) -> int:
        """Bytes of rows (with those not yet in use), optimiser state and map."""
        tensors = self._rows.tensors.values()
        return self._map.memory_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor | None = None, *, mode: str = "sum") -> torch.Tensor:
        """Look ids up, each for itself or in bags; in training, count and admit them.

        Parameters
        ----------
        ids : Tensor of any shape ([n] with `offsets`), int64 or int32
            Any values.
        offsets : Tensor [B + 1], int32 or int64, or None
            Where bags begin; the last entry is n.
        mode : str
            "sum" or "mean" of a bag; ids that read the default row count in a mean like all others.

        Returns
        -------
        Tensor [*, D], or [B, D] with `offsets`, where an empty bag gives zeros; float32.

        Raises
        ------
        TypeError, ValueError
            Wrong dtypes, shapes, offsets, mode.
        InputError
            No row left, with full="error". In every case nothing was written; but where it was time to search for
            ids that have expired, they are forgotten, which comes before.
        """
        self._checked(ids)
        _check.choice(_PLACE, "mode", mode, ("sum", "mean"))
        if offsets is not None:
            _check.tensor(_PLACE, "ids", ids, shape=["n"])
            _check.tensor(_PLACE, "offsets", offsets, dtypes=_check.INDEX_DTYPES, shape=["B + 1"], device=ids.device)
        if not (self.training and torch.is_grad_enabled()):
            return self._rows.gather(self._find(ids), offsets, mode)
        if offsets is not None:
            _check.offsets(_PLACE, "offsets", offsets, ids.numel())
        rows = self._observe(ids)
        anchor = torch.empty(0, requires_grad=True)
        return _Lookup.apply(anchor, self, ids, rows, offsets, mode)

    @torch.no_grad()
    def expire(self, older_than: int | None = None) -> int:
        """Forget ids that did not occur in the last updates, and free their rows.

        Parameters
        ----------
        older_than : int or None
            As `expire_after`, which None stands for; at least 1, so that ids which wait for their gradient stay.

        Returns
        -------
        int
            The number of rows that became free.

        Raises
        ------
        ValueError
            `older_than` below 1, or None where the table has no `expire_after`.
        """
        older_than = self.expire_after if older_than is None else older_than
        if older_than is None:
            raise ValueError(f"{_PLACE}: expire needs older_than, since the table has no expire_after")
        _check.at_least(_PLACE, "older_than", older_than, 1)
        # An id seen after s updates takes part in update s + 1; u - (s + 1) have passed without it.
        freed = self._map.expire(max(0, self.updates - older_than)).numel()
        self._freed += freed
        self._last_expiry = self.updates
        return freed

    def extra_repr(self) -> str:
        return (
            f"{len(self)} ids, dim={self.dim}, precision={self.precision}, min_count={self._map.min_count}, "
            f"expire_after={self.expire_after}, optimizer={self.optimizer}, lr={self.lr:g}"
        )

    def get_extra_state(self) -> dict[str, Any]:
        """What a state must agree with the module in."""
        return {
            "dim": self.dim,
            "precision": self.precision,
            "step": self.step,
            "step_optimizer": self.step_optimizer,
            "optimizer": self.optimizer,
            "moment_bits": self.moment_bits,
            "default": self.default,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse a state of other rows; there is nothing to set."""
        self.check_state(state)

    def check_state(self, state: Any) -> None:
        """Refuse a state of other rows, by what `get_extra_state` gave for it.

        Raises
        ------
        InputError
            Another width, precision, optimizer, kind of step or of default row.
        """
        if not isinstance(state, dict):
            raise InputError(f"{_PLACE}: the state is of another module, expected that of a DynamicTable")
        for name, wanted in self.get_extra_state().items():
            if state.get(name) != wanted:
                raise InputError(f"{_PLACE}: the state has {name} = {state.get(name)!r}, expected {wanted!r}")

    def _find(self, ids: torch.Tensor) -> torch.Tensor:
        return self._map.find(ids).clamp(min=_DEFAULT_ROW)

    @torch.no_grad()
    def _observe(self, ids: torch.Tensor) -> torch.Tensor:
        if self.expire_after is not None and self.updates - self._last_expiry >= self.expire_every:
            self.expire()
        seen = self._map.observe(ids, self.updates)
        if seen.new_ids.numel():
            self._rows.grow(self._map.next_row)
            self._rows.draw(seen.new_rows, seen.new_ids, self.init_std, self.seed)
        return seen.rows.clamp(min=_DEFAULT_ROW)

    @torch.no_grad()
    def _update(self, rows: torch.Tensor, offsets: torch.Tensor | None, grad: torch.Tensor, mode: str) -> None:
        self.saturated += self._rows.update(
            rows.reshape(-1),
            offsets,
            grad.to(torch.float32).reshape(-1, self.dim),
            mode,
            **self._options,
            lr=self.lr,
            grad_scale=self.grad_scale,
            seed=self.seed,
            step_count=self.updates,
            check=self.check_finite,
        )
        self.updates += 1
        if self.default == "zeros":
            self._reset_default()

    def _reset_default(self) -> None:
        self._rows.reset(torch.tensor([_DEFAULT_ROW]), torch.zeros(1, self.dim))

    def _check_still_there(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        gone = (rows != _DEFAULT_ROW) & (self._map.find(ids) != rows)
        if bool(gone.any()):
            raise ValueError(
                f"{_PLACE}: id {int(ids[gone][0])} lost its row between a forward pass and its backward; expire and "
                "load before a forward pass or after its backward"
            )

    @staticmethod
    def _checked_lr(value: float) -> float:
        if not 0 <= value < math.inf:
            raise ValueError(f"{_PLACE}: lr must be finite and not negative, got {value}")
        return float(value)

    @staticmethod
    def _checked(ids: torch.Tensor) -> torch.Tensor:
        return _check.tensor(_PLACE, "ids", ids, dtypes=_check.INDEX_DTYPES, device=torch.device("cpu"))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._state().items():
            destination[prefix + name] = tensor

    def _state(self) -> dict[str, torch.Tensor]:
        used = self._map.next_row
        state = {f"map.{name}": tensor for name, tensor in self._map.entries().items()}
        state |= {name: tensor[:used].clone() for name, tensor in self._rows.tensors.items()}
        counters = [self.updates, self.saturated, self._last_expiry, self.seed]
        state["counters"] = torch.tensor(counters, dtype=torch.int64)
        state["learning_rate"] = torch.tensor(self.lr, dtype=torch.float64)
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        extra = prefix + "_extra_state"
        if extra in state_dict:
            self.check_state(state_dict[extra])
        found = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        found.pop("_extra_state", None)
        expected = self._state().keys()
        missing = [prefix + name for name in sorted(expected - found.keys())]
        missing += [] if extra in state_dict else [extra]
        unexpected = [prefix + name for name in sorted(found.keys() - expected)]
        missing_keys.extend(missing)
        unexpected_keys.extend(unexpected if strict else [])
        if missing or (strict and unexpected):
            return
        rows = {name: found[name] for name in self._rows.tensors}
        used = rows["rows"].shape[0]
        for name, tensor in rows.items():
            own = self._rows.tensors[name]
            _check.tensor(_PLACE, name, tensor, dtypes=[own.dtype], shape=[used, *own.shape[1:]])
        if used < 1:
            raise InputError(f"{_PLACE}: the state must have the default row, got no rows")
        _check.tensor(_PLACE, "counters", found["counters"], dtypes=[torch.int64], shape=[4])
        if int(found["counters"].min()) < 0:
            raise InputError(f"{_PLACE}: counters must not be negative, got {found['counters'].tolist()}")
        lr = self._checked_lr(float(found["learning_rate"]))
        self._map.restore({name: found[f"map.{name}"].cpu() for name in _ENTRIES}, used)
        self._rows.grow(used)
        for name, tensor in rows.items():
            self._rows.tensors[name][:used] = tensor
        self.updates, self.saturated, self._last_expiry, self.seed = found["counters"].tolist()
        self._lr = lr
        self._freed += 1  # what went forward before has no rows here
