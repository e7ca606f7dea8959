"""The embedding tables of a model: looked up together, updated inside backward, in floats or in 8, 4 or 2 bits."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from recfast import ops
from recfast.errors import InputError
from recfast.nn import _table_files
from recfast.nn._table_group import Names, TableGroup, default_range, range_rule
from recfast.nn._table_lookups import Lookups, TableLookups
from recfast.nn.frozen_tables import FrozenTables
from recfast.ops import _check, embedding_tables, formats
from recfast.ops.embedding_bag import weight_gradient
from recfast.ops.embedding_update import OPTIMIZERS, STEP_FLOOR, STEP_FLOORS, STEP_OPTIMIZERS, STEP_RANGES
from recfast.ops.formats import ROUNDINGS

_PLACE = "EmbeddingTables"
_STATE_VERSION = 2


class _Lookup(torch.autograd.Function):
    """What the op `embedding_tables` is to a compiler, without the way through the dispatcher."""

    @staticmethod
    def forward(ctx, anchor, weights, tables, indices, offsets, features, pooling):
        out, argmax = tables.gather(indices, offsets, weights, features, pooling)
        ctx.save_for_backward(*indices, *offsets, weights, argmax)
        ctx.call = tables, len(indices), features, pooling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        tables, count, features, pooling = ctx.call
        *lists, weights, argmax = ctx.saved_tensors
        of_weights = ctx.needs_input_grad[1]
        of_weight = tables.update(grad, lists[:count], lists[count:], weights, argmax, features, pooling, of_weights)
        return None, of_weight if of_weights else None, None, None, None, None, None


class EmbeddingTables(TableLookups):
    """All embedding tables of a model, trained by an optimiser of their own inside `backward`.

    There are no parameters: rows, step sizes and the optimiser's state are buffers, so a dense optimiser over
    `model.parameters()` does not see them, and `state_dict` holds all that an exact resume needs, table by table. In
    training mode, with gradients enabled, each call gathers once; when its gradient arrives, the rows that occurred are
    updated. Under `torch.no_grad`, `torch.inference_mode` or `eval()` nothing is updated. A module that is used several
    times before `backward` is updated once per use. Gradient clipping and accumulation of the dense optimiser do not
    reach the tables; for a scaled loss set `grad_scale` to the inverse of the scale. `torch.compile` takes a model with
    these tables as one graph.

    Parameters
    ----------
    schema_or_specs : list of (name, rows), or a fitted recfast.data.Schema
        Of a schema: the categorical columns in their order; a sequence column shares the table of its `of`.
    dim : int
        D.
    precision : str, or {name: str}
        Of all tables, or of those named (the others are float32): "float32"; "bfloat16", "float16"; "float8" (e4m3 with
        a step size a row); "int8", "int4", "int2": integers with one float32 step size a row. No float copy is kept.
    step : {"learned", "fixed"}
        int8, int4, int2. "learned": the step sizes are trained (ALPT, see `ops.embedding_update_`); "fixed": they only
        change as `step_range` says (LPT).
    rounding : {"stochastic", "nearest"}
        Of everything but float32. "nearest" loses every change below half a step.
    optimizer : str
        "rowwise_adagrad" (4 bytes a row), "sgd" (nothing), "adagrad" (4 bytes a weight), "adam" (8 bytes a weight),
        "rowwise_adam": one first moment a weight, one second moment a row.
    moment_bits : {32, 8}
        Of the first moment of "rowwise_adam": 4 bytes a weight, or 1 byte a weight and 4 a row.
    lr : float
        Learning rate; can be set later (`tables.lr = ...`) and is part of the state.
    betas, eps : floats
        Of Adam; `eps` of Adagrad too.
    weight_decay : float
        On the rows that a batch touches.
    decay : {"l2", "decoupled"}
        `weight_decay` is added to the gradient, or taken off the row (times `lr`) as in AdamW.
    step_lr : float
        Learning rate of the step sizes: under "adagrad" and "adam" relative to `initial_step`, so that the first change
        of a step is `step_lr` times the initial step; under "sgd" absolute.
    step_optimizer : {"adagrad", "sgd", "adam"}
    step_scale : {"batch", "table", "none"} or float
        What a step's gradient is multiplied with, see `ops.embedding_update_`; of no effect under "adagrad" and "adam".
    step_floor : {"clamp", "abs", "none"}
        How steps stay positive.
    step_range : {"auto", "grow", "clip"}
        "grow": a step is never smaller than what its row needs, so rows may outgrow the initial range and nothing is
        clipped. "clip": as published, weights outside the range are clipped and counted in `saturated`. "auto": "clip"
        for int4 and int2, where a step that suits the largest weight leaves the others no codes, "grow" for int8 and
        float8.
    step_per : {"row", "table"}
        "table": all rows of a table share one step, and the whole table is rounded anew whenever it changes, which is
        in every update; for comparison with publications that do so, not for large tables. Takes "clip".
    passes : {1, 2}
        2: ALPT in the published order. The backward pass moves the rows; the step sizes are learned, and the rows
        rounded, in a second forward and backward on the same batch inside `with nn.second_pass(model):`, after the step
        of the dense optimiser. Takes one lookup a forward pass. 1: both in one pass.
    init_std : float
        Rows start as N(0, init_std^2).
    init_step : {"range", "lsq", "max"} or float
        The initial step of every row: `init_range` over the highest code; 2 E|w| / sqrt(2^(bits - 1)), the rule of LSQ;
        each row's own max |w| over the highest code; or a number.
    init_range : float or None
        None: 4 * init_std, but at least 0.25 for int4 and 0.15 for int2, which did best on Frappe's validation rows.
    skip_missing : bool
        An id of -1 stands for nothing: it gives zeros, and pooling passes over it. False: it is refused.
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

    place = _PLACE

    def __init__(
        self,
        schema_or_specs: Any,
        dim: int,
        precision: str | Mapping[str, str] = "float32",
        *,
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
        step_per: str = "row",
        passes: int = 1,
        init_std: float = 0.01,
        init_step: str | float = "range",
        init_range: float | None = None,
        skip_missing: bool = False,
        seed: int = 0,
    ) -> None:
        _check.choice(_PLACE, "step", step, ("learned", "fixed"))
        _check.choice(_PLACE, "rounding", rounding, ROUNDINGS)
        _check.choice(_PLACE, "optimizer", optimizer, OPTIMIZERS)
        _check.choice(_PLACE, "moment_bits", moment_bits, (32, 8))
        _check.choice(_PLACE, "decay", decay, ("l2", "decoupled"))
        _check.choice(_PLACE, "step_optimizer", step_optimizer, STEP_OPTIMIZERS)
        _check.choice(_PLACE, "step_floor", step_floor, STEP_FLOORS)
        _check.choice(_PLACE, "step_range", step_range, ("auto", *STEP_RANGES))
        _check.choice(_PLACE, "step_per", step_per, ("row", "table"))
        _check.choice(_PLACE, "passes", passes, (1, 2))
        if step_per == "table" and step == "learned" and step_range == "grow":
            raise ValueError(f"{_PLACE}: step_per='table' goes with step_range='clip', got {step_range!r}")
        _check.at_least(_PLACE, "init_std", init_std, 0.0)
        _check.at_least(_PLACE, "step_lr", step_lr, 0.0)
        if isinstance(init_step, str):
            _check.choice(_PLACE, "init_step", init_step, ("range", "lsq", "max"))
        elif not 0 < init_step < math.inf:
            raise ValueError(f"{_PLACE}: init_step must be positive and finite, got {init_step}")
        one_step = ("int8", "int4", "int2") if step_per == "table" and step == "learned" else ()
        super().__init__(schema_or_specs, dim, precision, skip_missing=skip_missing, apart=one_step)
        self.step, self.rounding, self.optimizer, self.moment_bits = step, rounding, optimizer, moment_bits
        self.betas, self.eps, self.weight_decay, self.decay = betas, eps, weight_decay, decay
        self.step_lr, self.step_optimizer, self.step_scale = step_lr, step_optimizer, step_scale
        self.step_floor, self.step_range, self.step_per, self.passes = step_floor, step_range, step_per, passes
        self.init_std, self.init_step = init_std, init_step
        self.init_range = init_range
        with_steps = [group for group in self.groups if group.bits is not None]
        if (
            with_steps
            and init_step == "range"
            and not 0 < (4 * init_std if init_range is None else init_range) < math.inf
        ):
            raise ValueError(f"{_PLACE}: init_range must be positive and finite, got {init_range}, init_std {init_std}")
        self.grad_scale = 1.0
        self.check_finite = True

        generator = torch.Generator().manual_seed(seed)
        for number, group in enumerate(self.groups):
            start = None if group.bits is None or init_step == "max" else self.initial_step(group.precision)
            group.draw(init_std, start, generator, "nearest" if group.bits is None else rounding, seed + number)
            group.add_state(
                optimizer=optimizer,
                step_optimizer=step_optimizer if self._learns(group) and step_per == "row" else None,
                moment_bits=moment_bits,
            )
        # Updates done, codes clipped so far, seed: what the next draw depends on, and so part of a checkpoint.
        self.register_buffer("counters", torch.tensor([0, 0, seed], dtype=torch.int64))
        self.register_buffer("learning_rate", torch.tensor(float(lr), dtype=torch.float64))
        self.lr = lr
        self._second = False
        self._pending: list[tuple[int, Any]] = []
        self._join()

    def _join(self) -> None:
        """What belongs to this very object: its number, and the tensor that makes autograd come here."""
        self._owner = embedding_tables.register(self)
        self._anchor = torch.empty(0, device=self.counters.device, requires_grad=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()  # a copy must not update the tables of the original

    def __getstate__(self) -> dict[str, Any]:
        if self._pending:
            raise RuntimeError(f"{_PLACE}: cannot be copied between the two passes of a step")
        return {name: value for name, value in self.__dict__.items() if name != "_anchor"}

    # ------------------------------------------------------------------ what is there

    def initial_step(self, precision: str) -> float:
        """The step size that the rows of a precision start with (with `init_step="max"`: the average)."""
        info = formats.FORMATS[precision]
        if not isinstance(self.init_step, str):
            return float(self.init_step)
        if self.init_step == "lsq":
            # The mean size of a normal number; the rule as the authors of ALPT use it.
            return 2 * self.init_std * math.sqrt(2 / math.pi) / math.sqrt(2 ** (info.bits - 1))
        if self.init_step == "max":
            # The expected largest of D normal numbers, closely enough for what depends on it, the scale of `step_lr`.
            return max(self.init_std, 1e-12) * math.sqrt(2 * math.log(2 * self.dim + 1)) / info.highest
        if self.init_range is None:
            return default_range(precision, self.init_std) / info.highest
        return self.init_range / info.highest

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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, optimizer={self.optimizer}, lr={self.lr:g}"

    # ------------------------------------------------------------------ training

    def _look(self, indices, offsets, weights, features, pooling):
        trains = self.training and torch.is_grad_enabled() and not (self._second and self.passes == 1)
        if trains or torch.compiler.is_compiling():
            anchor = self._anchor if trains else self._anchor.detach()
            return embedding_tables.lookup(anchor, indices, offsets, weights, features, self.dim, pooling, self._owner)[
                0
            ]
        return super()._look(indices, offsets, weights, features, pooling)

    def gather(self, indices, offsets, weights, features, pooling, *, argmax=None):
        # Called by the op, with its arguments: an update needs to know where maxima came from.
        return super().gather(
            indices, offsets, weights, features, pooling, argmax=pooling == "max" if argmax is None else argmax
        )

    @torch.no_grad()
    def update(
        self,
        grad: torch.Tensor,
        indices: Sequence[torch.Tensor],
        offsets: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
        argmax: torch.Tensor,
        features: Sequence[int],
        pooling: str,
        of_weights: bool,
    ) -> torch.Tensor:
        """Called by the op in backward: update the rows, and return the gradient of the weights if it is asked for."""
        grad = grad.to(torch.float32)
        if self.passes == 2 and not self._second and self._pending:
            self._pending.clear()
            raise RuntimeError(
                f"{_PLACE}: passes=2 takes one lookup a step, and a second pass after it: "
                "use `with nn.second_pass(model):` and one call of lookup or forward"
            )
        if not features:
            plan, call, bags = self._whole, None, None
        else:
            plan = self._plan(tuple(features))
            names = [self.specs[number][0] for number in features]
            call = Lookups(self.place, names, indices, offsets, weights)
            bags = call.bags
        if self.check_finite and len(plan) > 1:
            # Each group's update refuses what is not finite in its own part, when those before it have been written.
            self._check_finite("grad", grad)
            if weights is not None:
                self._check_finite("weights", weights)
        of_weight = grad.new_empty(0)
        if of_weights:
            of_weight = self._weight_gradient(grad, plan, call, pooling)
        waiting = len(self._pending)
        for number, part in enumerate(plan):
            if call is None:
                ids = indices[0] if len(plan) == 1 else indices[0][:, part.index].contiguous()
                part_grad = grad if len(plan) == 1 else grad[:, part.index]
                arguments = (ids, None, part_grad.reshape(-1, self.dim), None, part.features, None)
            else:
                ids, cuts, factors, splits = call.joined(part.places)
                pieces = [grad, argmax]
                if len(plan) > 1:
                    pieces = [
                        torch.cat([whole.split(bags)[i] for i in part.places]) if whole.shape[0] else whole
                        for whole in pieces
                    ]
                arguments = (ids, cuts, pieces[0], factors, part.features._replace(splits=splits), pieces[1])
            self._update_group(number, part.group, pooling if offsets else "none", *arguments)
        # An update in two passes is one update: draws and Adam's correction of its moments go by their number.
        if len(self._pending) < waiting if self._second else not self._pending:
            self.counters[0] += 1
        return of_weight

    @staticmethod
    def _check_finite(name: str, tensor: torch.Tensor) -> None:
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            at = int((~finite).reshape(-1).nonzero()[0])
            found = float(tensor.reshape(-1)[at])
            raise ValueError(f"{_PLACE}: {name} must be finite, got {found} at flat position {at}; nothing was updated")

    def _update_group(self, number, group: TableGroup, mode, ids, offsets, grad, weights, features, argmax) -> None:
        learns = self._learns(group)
        relative = self.step_optimizer != "sgd"
        check = {"grad_scale": self.grad_scale, "check": self.check_finite}
        draws = {
            "rounding": self.rounding,
            "seed": int(self.counters[2]),
            "step_count": self.updates,
            "table_id": self._group_of[group.names[0]],
        }
        rows = {
            "optimizer": self.optimizer,
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "decay": self.decay,
            "per_sample_weights": weights,
            "mode": mode,
            "features": features,
            "skip_missing": self.skip_missing,
            "argmax": argmax if mode == "max" else None,
        }
        steps = {
            "step_lr": self.step_lr * (self.initial_step(group.precision) if relative else 1.0) if learns else None,
            "step_optimizer": self.step_optimizer,
            "step_scale": self.step_scale,
            "step_floor": self.step_floor,
            "step_range": "clip" if group.one_step else range_rule(self.step_range, group.precision),
        }
        table, state, ids = group.table, group.state, ids.reshape(-1)
        in_two = self.passes == 2 and learns
        if not in_two and self._second:
            return
        if not in_two and not group.one_step:
            clipped = ops.embedding_update_(table, ids, offsets, grad, state, **rows, **steps, **draws, **check)
            self.counters[1] += clipped
            return
        if not self._second:
            pending = ops.embedding_update_first_(table, ids, offsets, grad, state, **rows, **draws, **check)
            if in_two:
                self._pending.append((number, pending))
                return
        else:
            known = self._pending and self._pending[0][0] == number
            if not known or not _same_lookup(self._pending[0][1], ids, offsets, features):
                raise RuntimeError(f"{_PLACE}: the second pass has another lookup than the first")
            _, pending = self._pending.pop(0)
        if group.one_step:
            slope = ops.embedding_step_gradient(table, pending, grad, step_scale=self.step_scale, **check)
            step = self._table_step(group, float(slope), steps["step_lr"])
            self.counters[1] += ops.requantize_(table, step, pending=pending, **draws)
        else:
            about = {"optimizer": self.optimizer, "betas": self.betas}
            self.counters[1] += ops.embedding_update_second_(
                table, pending, grad, state, **about, **steps, **draws, **check
            )

    def _table_step(self, group: TableGroup, slope: float, lr: float) -> float:
        """The next step size of a table that has one for all rows."""
        first, second = group.step_state.tolist()
        if self.step_optimizer == "adagrad":
            second += slope * slope
            slope /= math.sqrt(second) + 1e-12
        elif self.step_optimizer == "adam":
            first = self.betas[0] * first + (1 - self.betas[0]) * slope
            second = self.betas[1] * second + (1 - self.betas[1]) * slope * slope
            count = self.updates + 1
            slope = first / (1 - self.betas[0] ** count)
            slope /= math.sqrt(second / (1 - self.betas[1] ** count)) + 1e-12
        group.step_state.copy_(torch.tensor([first, second]))
        step = float(group.table.step[0]) - lr * slope
        if self.step_floor == "abs":
            return abs(step) + 1e-10
        return max(step, STEP_FLOOR) if self.step_floor == "clamp" else step

    def _weight_gradient(self, grad, plan, call: Lookups, pooling) -> torch.Tensor:
        out = grad.new_empty(sum(call.lengths))
        pieces = out.split(call.lengths)
        for part in plan:
            ids, offsets, weights, splits = call.joined(part.places)
            bags = grad if len(plan) == 1 else torch.cat([grad.split(call.bags)[i] for i in part.places])
            found = weight_gradient(
                bags, part.group.table, ids, offsets, weights, mode=pooling if call.offsets else "none",
                features=part.features._replace(splits=splits), skip_missing=self.skip_missing,
            )  # fmt: skip
            for i, piece in zip(part.places, found.split([call.lengths[i] for i in part.places]), strict=True):
                pieces[i].copy_(piece)
        return out

    def _learns(self, group: TableGroup) -> bool:
        """Whether the step sizes of a group are trained; those of float8 are scales and only grow."""
        return self.step == "learned" and group.bits in (8, 4, 2)

    def _step_rule(self, group: TableGroup) -> str | None:
        return self.step_optimizer if self._learns(group) else None

    # ------------------------------------------------------------------ other forms

    def convert(
        self, precision: str | Mapping[str, str], *, rounding: str = "nearest", **options: Any
    ) -> EmbeddingTables:
        """The same tables in another precision, to be trained further.

        Rows that change their precision are rounded, each with the smallest step that clips nothing. The optimiser's
        state goes along where it has the same form, and begins anew elsewhere.

        Parameters
        ----------
        precision
            As in the constructor.
        rounding : {"nearest", "stochastic"}
            Of the conversion.
        **options
            Options of the constructor to change.
        """
        new = EmbeddingTables(self.names(), self.dim, precision, **{**self.options(), **options})
        new.take(self, rounding)
        new.grad_scale, new.check_finite = self.grad_scale, self.check_finite
        return new.train(self.training)

    @classmethod
    def from_embeddings(
        cls, embeddings: Mapping[str, Any], precision: str | Mapping[str, str] = "float32", **options: Any
    ) -> EmbeddingTables:
        """Tables out of trained float ones.

        Parameters
        ----------
        embeddings : {name: nn.Embedding, nn.EmbeddingBag or Tensor [T, D]}
            All of one width.
        precision, **options
            As in the constructor. Steps are the smallest that clip nothing.

        Raises
        ------
        ValueError
            Different widths, or a layer with `padding_idx`, `max_norm` or `scale_grad_by_freq`.
        """
        for name, given in embeddings.items():
            for option, plain in (("padding_idx", None), ("max_norm", None), ("scale_grad_by_freq", False)):
                if (found := getattr(given, option, plain)) != plain:
                    raise ValueError(
                        f"{_PLACE}: {name!r} has {option} = {found}, which these tables do not have: clear it, and see "
                        "`skip_missing` for ids that stand for nothing"
                    )
        weights = {
            name: (given if isinstance(given, torch.Tensor) else given.weight).detach()
            for name, given in embeddings.items()
        }
        for name, weight in weights.items():
            _check.tensor(_PLACE, name, weight, dtypes=list(formats.PLAIN), shape=["T", "D"])
        widths = {name: weight.shape[1] for name, weight in weights.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"{_PLACE}: all tables must have one width, got {widths}")
        tables = cls(
            [(name, len(weight)) for name, weight in weights.items()],
            next(iter(widths.values()), 1),
            precision,
            **options,
        )
        for name, weight in weights.items():
            group, own = tables._group(name)
            group.write(own, weight)
        return tables

    def freeze(self, precision: str | Mapping[str, str] | None = None) -> FrozenTables:
        """The tables for serving: rows and step sizes alone, by default in the precision they have.

        See Also
        --------
        FrozenTables.save, FrozenTables.load
        """
        frozen = FrozenTables(
            self.names(), self.dim, self.precisions if precision is None else precision, skip_missing=self.skip_missing
        )
        for name, _ in self.specs:
            group, _ = frozen._group(name)
            group.copy_rows(name, self._group(name)[0])
        return frozen

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tables, optimiser state and options to one safetensors file, whole or not at all.

        Raises
        ------
        InputError
            The disk is full or the folder may not be written.
        """
        tensors = {name: value for name, value in self.state_dict().items() if isinstance(value, torch.Tensor)}
        facts = {
            "layout": self._layout(),
            "options": self.options(),
            "tables": [[name, rows] for name, rows in self.specs],
            "aliases": self.aliases,
        }
        _table_files.write(self.place, path, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EmbeddingTables:
        """Read what `save` wrote; training goes on exactly where it was.

        Raises
        ------
        InputError
            The file is missing, truncated, damaged or of another kind.
        """
        tensors, facts = _table_files.read(cls.place, path, mmap=True, verify=True)
        try:
            layout, options = facts["layout"], facts["options"]
            for name, rows in facts["tables"]:
                if len(tensors[f"{name}.rows"]) != rows:  # before memory is asked for
                    raise InputError(f"table {name!r} has {len(tensors[f'{name}.rows'])} rows, expected {rows}")
            tables = cls(
                Names(facts["tables"], facts["aliases"]),
                layout["dim"],
                {name: table["precision"] for name, table in layout["tables"].items()},
                # The rows come from the file: none need to be drawn.
                **{**options, "betas": tuple(options["betas"]), "init_std": 0.0, "init_step": 1.0},
            )
            tables.init_std, tables.init_step = options["init_std"], options["init_step"]
            tables.load_state_dict({**tensors, "_extra_state": layout})
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{cls.place}: {path} is damaged, its header does not fit its tensors ({error})") from None
        return tables

    def options(self) -> dict[str, Any]:
        """The constructor's options."""
        names = (
            "step", "rounding", "optimizer", "moment_bits", "lr", "betas", "eps", "weight_decay", "decay", "step_lr",
            "step_optimizer", "step_scale", "step_floor", "step_range", "step_per", "passes", "init_std", "init_step",
            "init_range", "skip_missing",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"seed": int(self.counters[2])}

    def take(self, other: EmbeddingTables, rounding: str = "nearest") -> None:
        """Take over the rows of tables of the same names and sizes, rounding what has another precision."""
        seed = int(self.counters[2])
        for name, _ in self.specs:
            mine, theirs = self._group(name)[0], other._group(name)[0]
            mine.copy_rows(name, theirs, rounding=rounding, seed=seed)
            if (self.optimizer, self._step_rule(mine)) == (other.optimizer, other._step_rule(theirs)):
                mine.copy_state(name, theirs)
        self.counters[:2] = other.counters[:2]

    # ------------------------------------------------------------------ state

    def _layout(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "dim": self.dim,
            "optimizer": self.optimizer,
            "tables": {name: {"precision": self.precisions[name], "rows": rows} for name, rows in self.specs},
        }

    def get_extra_state(self) -> dict[str, Any]:
        """What the tensors of the state are; JSON-able."""
        return self._layout()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse a state of other tables."""
        self.check_state(state)

    def check_state(self, state: Any) -> None:
        """Compare what a state says of itself with these tables.

        Raises
        ------
        InputError
            Other tables, another precision, width or number of rows; the sentence names the table and says what to
            call where it can be converted.
        """
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            found = state.get("version") if isinstance(state, dict) else None
            raise InputError(f"{_PLACE}: the state has the version {found}, expected {_STATE_VERSION}")
        mine = self._layout()
        missing = sorted(key for key, value in mine.items() if not isinstance(state.get(key), type(value)))
        for name, found in {} if missing else state["tables"].items():
            if not isinstance(found, dict) or not {"rows", "precision"} <= found.keys():
                missing = [f"tables.{name}"]
        if missing:
            raise InputError(f"{_PLACE}: the state says nothing, or something of another kind, of {', '.join(missing)}")
        for name in mine["tables"].keys() - state["tables"].keys():
            raise InputError(f"{_PLACE}: the state has no table {name!r}, it has {', '.join(state['tables'])}")
        for name in state["tables"].keys() - mine["tables"].keys():
            raise InputError(f"{_PLACE}: the state has a table {name!r}, expected {', '.join(mine['tables'])}")
        for name, wanted in mine["tables"].items():
            found = state["tables"][name]
            if state["dim"] != self.dim:
                raise InputError(
                    f"{_PLACE}: table {name!r} has {state['dim']} columns in the state, expected {self.dim}: "
                    f"a width cannot be converted, build the module with dim={state['dim']}"
                )
            if found["rows"] != wanted["rows"]:
                raise InputError(
                    f"{_PLACE}: table {name!r} has {found['rows']} rows in the state, expected {wanted['rows']}: "
                    "it is of another vocabulary"
                )
            if found["precision"] != wanted["precision"]:
                raise InputError(
                    f"{_PLACE}: table {name!r} is {found['precision']} in the state, expected {wanted['precision']}: "
                    f"load it into tables of that precision and call convert({wanted['precision']!r}) on them "
                    "(models.convert for a whole model)"
                )
        if state["optimizer"] != self.optimizer:
            raise InputError(
                f"{_PLACE}: the state is of optimizer {state['optimizer']!r}, expected {self.optimizer!r}: load it "
                f"into tables with that optimizer and call convert(precision, optimizer={self.optimizer!r}) on them"
            )

    def _named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, _ in self.specs:
            for part, tensor in self._group(name)[0].tensors(name).items():
                yield f"{name}.{part}", tensor

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._named_tensors():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Also the buffers of this module itself: all is compared before anything is written.
        own = {prefix + name: x for name, x in (*self._named_tensors(), *self.named_buffers(recurse=False))}
        try:
            if (extra := state_dict.get(prefix + "_extra_state")) is not None:
                self.check_state(extra)
        except InputError as error:
            error_msgs.append(str(error))
            return
        for name, tensor in own.items():
            if name in state_dict and state_dict[name].shape != tensor.shape:
                error_msgs.append(
                    f"{_PLACE}: {name!r} has the shape {list(state_dict[name].shape)}, expected {list(tensor.shape)}"
                )
            elif name in state_dict and state_dict[name].dtype != tensor.dtype:
                error_msgs.append(f"{_PLACE}: {name!r} is {state_dict[name].dtype}, expected {tensor.dtype}")
        expected = {*own, prefix + "_extra_state"}
        given = {name for name in state_dict if name.startswith(prefix)}
        if strict:
            missing_keys.extend(sorted(expected - given))
            unexpected_keys.extend(sorted(given - expected))
        if error_msgs or (strict and expected != given):
            return
        with torch.no_grad():
            for name in own.keys() & given:
                own[name].copy_(state_dict[name])
        # What a table of the name "groups" has is nothing of the modules in `self.groups`.
        for name in given:
            if name.startswith(f"{prefix}groups."):
                del state_dict[name]
        self._pending.clear()

    def _apply(self, fn, recurse=True):
        applied = super()._apply(fn, recurse)
        self._anchor = torch.empty(0, device=self.counters.device, requires_grad=True)
        return applied


def _same_lookup(pending: Any, ids: torch.Tensor, offsets: torch.Tensor | None, features: ops.Features) -> bool:
    """Whether the first pass was over these very ids."""
    pairs = [(pending.indices, ids), (pending.offsets, offsets), *zip(pending.features, features, strict=True)]
    return all(
        a is b or (a is not None and b is not None and a.shape == b.shape and bool((a == b).all())) for a, b in pairs
    )


def takes_two_passes(model: nn.Module) -> bool:
    """Whether any tables of `model` are trained in two passes."""
    return any(isinstance(module, EmbeddingTables) and module.passes == 2 for module in model.modules())


@contextlib.contextmanager
def second_pass(model: nn.Module) -> Iterator[None]:
    """The second pass of a training step, for tables with `passes=2`: forward and backward on the same batch again.

    Inside, step sizes are learned and rows rounded; other tables of the model are left alone. What the backward pass
    leaves in the gradients of dense weights is the caller's to clear.

    Examples
    --------
    >>> loss(model(batch)).backward()
    >>> optimizer.step()
    >>> with nn.second_pass(model):
    ...     loss(model(batch)).backward()
    >>> optimizer.zero_grad()
    """
    tables = [module for module in model.modules() if isinstance(module, EmbeddingTables)]
    for each in tables:
        each._second = True
    try:
        yield
    finally:
        left = any(each._pending for each in tables)
        for each in tables:
            each._second = False
            each._pending.clear()
    if left:
        raise RuntimeError(f"{_PLACE}: the second pass did not come to every lookup of the first")
