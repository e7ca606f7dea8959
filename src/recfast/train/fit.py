"""The training loop: short, exact to resume, on Lightning Fabric for devices and precision."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from recfast.data import Loader
from recfast.errors import InputError
from recfast.nn.embedding_tables import second_pass, takes_two_passes
from recfast.train import checkpoint
from recfast.train.checkpoint import State
from recfast.train.config import TrainConfig
from recfast.train.evaluate import check_monitor, evaluate, lower_is_better
from recfast.train.lazy_adam import LazyAdam

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from recfast.data import Dataset

# Steps between two looks at the loss: each is a wait for the device.
_LOOK = 50


@dataclass
class Run:
    """What came of a training.

    Attributes
    ----------
    model
        The model, with its best weights (the last ones where nothing was monitored).
    history
        One entry for each evaluation: epoch, step, loss, rows, seconds, rows_per_second, and `valid`, the metrics.
    best
        The entry whose weights the model has.
    stopped
        Why training ended: "epochs", "steps", "patience", "callback" or "signal".
    out
        The run folder, if one was asked for.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    stopped: Literal["epochs", "steps", "patience", "callback", "signal"]
    epochs: int
    steps: int
    out: Path | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The best evaluation's metrics on the validation split; empty without one."""
        return dict((self.best or {}).get("valid", {}))


def fit(
    model: nn.Module,
    data: Dataset,
    *,
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: Literal["auto"] | str | os.PathLike[str] | None = "auto",
    progress: bool | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], object]] = (),
    fabric: Fabric | None = None,
    **settings: Any,
) -> Run:
    """Train `model` on `data.train`, and leave it with the weights that did best on `data.valid`.

    Parameters
    ----------
    model
        `model(batch)` gives an output, `model.loss(output, batch)` a scalar; `model.task` is "ranking" (trained on all
        rows) or "retrieval" (on the rows with label 1). If it has `prepare(data)`, that is called first. The dense
        weights are given to the optimiser; embedding tables update themselves inside backward.
    config, **settings
        The fields of `TrainConfig`, together or by name: `epochs=3, lr=5e-4`; a name wins over `config`.
    out
        The run folder; see `recfast.train.checkpoint`. Without one nothing is written.
    resume
        "auto" goes on from the checkpoint in `out` if there is one; None begins anew and replaces it; a path goes on
        from that run, and writes to `out`. On the CPU a training that was stopped after any step and resumed gives the
        same weights, bit for bit, as one that was not.
    progress
        Show on standard error a bar (on a terminal) and a line for each evaluation; only on a terminal if left out.
    callbacks
        Called with the entry of each evaluation; one that returns True ends the training.
    fabric
        A `lightning_fabric.Fabric` of one's own, instead of `accelerator` and `precision`.

    Returns
    -------
    Run

    Raises
    ------
    InputError
        A setting is unknown or out of range, the split is empty, the loss is not finite, the checkpoint does not fit,
        or the disk is full.

    Notes
    -----
    SIGTERM and Ctrl-C write a checkpoint after the running step, and then do what they do otherwise.
    """
    known = config.model_dump() if config is not None else {}
    options = TrainConfig.parse({**known, **settings}, place="fit")
    if model.task not in ("ranking", "retrieval"):
        raise InputError(f"fit: {type(model).__name__}.task = {model.task!r}, expected 'ranking' or 'retrieval'")
    if options.shared_histories and model.task != "ranking":
        raise InputError(f"fit: shared_histories is for rankers, and {type(model).__name__} is a retriever")
    if options.clip_norm is not None and options.optimizer == "lazy_adam":
        raise InputError("fit: clip_norm is not for optimizer = 'lazy_adam', whose gradients are sparse")
    options.monitor = check_monitor(options.monitor, model.task, data)
    options.seed = options.seed or 0
    rows = data.train if model.task == "ranking" else data.train.positives()
    if len(rows) == 0:
        what = "rows" if model.task == "ranking" else "rows with label 1"
        raise InputError(f"fit: the train split has no {what}")
    if fabric is None:
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator=options.accelerator, devices=1, precision=options.precision)
    if fabric.world_size != 1:
        raise InputError(f"fit: {fabric.world_size} processes, expected 1: training in several is not supported yet")
    folder = Path(out) if out is not None else None
    _seed(options.seed)
    return _Training(model, data, rows, options, folder, fabric, tuple(callbacks)).run(resume, progress)


class _Training:
    """The parts of one training, and the loop over them."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        rows: Any,
        options: TrainConfig,
        out: Path | None,
        fabric: Fabric,
        callbacks: tuple[Callable[[dict[str, Any]], object], ...],
    ) -> None:
        if hasattr(model, "prepare"):
            model.prepare(data)
        self.model, self.data, self.options, self.out = model, data, options, out
        self.fabric, self.callbacks = fabric, callbacks
        self.loader = Loader(rows, options.batch_size, shuffle=True, seed=options.seed, shared=options.shared_histories)
        self.facts = checkpoint.facts_of(data, len(rows))
        self.optimizer = _optimizer(model, options)
        # Fabric moves the model in place; `module` is the same model behind its precision.
        self.module, self.stepper = model, None
        if self.optimizer is not None:
            self.module, self.stepper = fabric.setup(model, self.optimizer)
        else:
            model.to(fabric.device)
        self.two_passes = takes_two_passes(model)
        self.state, self.tally = State(), _Tally(fabric.device)
        self.loader_state: dict[str, Any] | None = None
        self.best_weights: dict[str, torch.Tensor] | None = None

    def run(self, resume: Any, progress: bool | None) -> Run:
        self._open(resume)
        total = len(self.loader) if self.optimizer is not None else 0
        stopped = None if total else "epochs"
        with _signals(self.out is not None) as caught, _bar(progress) as bar:
            while (stopped := stopped or self._reason(caught)) is None:
                reason = self._epoch(total, caught, bar)
                if (reason is not None and self.state.batch < total) or reason == "signal":
                    stopped = reason
                    break
                stopped = self._evaluate(bar) or reason
            if stopped == "steps" and self.state.batch:
                self._evaluate_inside(bar)
            elif not self.state.history and stopped != "signal":
                self._evaluate(bar)
        # Where the signal is ignored by its owner, the training returns, with what it has.
        if caught:
            os.kill(os.getpid(), caught[0])
        self._restore_best()
        self.model.eval()
        state = self.state
        return Run(self.model, state.history, state.best, stopped, state.epoch, state.step, self.out)

    def _open(self, resume: Any) -> None:
        """Begin anew or go on, as `resume` says."""
        source = self.out if resume == "auto" else Path(resume) if resume is not None else None
        if self.out is None and source is not None:
            raise InputError(f"fit: resume = {str(resume)!r} needs out=, the folder to go on in")
        going_on = source is not None and (resume != "auto" or checkpoint.exists(source))
        if going_on:
            self.state, tally, self.loader_state = checkpoint.restore(
                source, self.model, self.optimizer, settings=self.options, facts=self.facts
            )
            self.tally.load(tally)
        if self.out is None:
            return
        checkpoint.begin(self.out, self.model, self.data, self.options)
        if not going_on:
            checkpoint.clear(self.out)
        elif source.resolve() != self.out.resolve():
            checkpoint.adopt(source, self.out)

    def _reason(self, caught: list[int]) -> str | None:
        """Return why training is over, or None when it is not."""
        state, options = self.state, self.options
        if caught:
            return "signal"
        if state.epoch >= options.epochs:
            return "epochs"
        if options.steps and state.step >= options.steps:
            return "steps"
        if options.patience and state.stale >= options.patience:
            return "patience"
        return None

    def _epoch(self, total: int, caught: list[int], bar: _Bar) -> str | None:
        """Train to the end of the epoch, or until there is a reason to stop, which is returned."""
        state, options = self.state, self.options
        if self.loader_state is not None and state.batch:
            self.loader.load_state_dict(self.loader_state)
        else:
            self.loader.set_epoch(state.epoch)
        self.loader_state = None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        bar.start(f"epoch {state.epoch + 1}/{options.epochs}", state.batch, total)
        self.model.train()
        started, before = time.perf_counter(), state.seconds
        for batch in self.loader:
            batch = batch.to(self.fabric.device)
            output = self.module(batch)
            with self.fabric.autocast():
                loss = self.model.loss(output, batch)
            self._backward(loss)
            if options.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
            self.stepper.step()
            if self.two_passes:
                with second_pass(self.model):
                    output = self.module(batch)
                    with self.fabric.autocast():
                        again = self.model.loss(output, batch)
                    self._backward(again)
            self.stepper.zero_grad()
            state.step += 1
            state.batch += 1
            state.rows += len(batch)
            self.tally.add(loss.detach(), len(batch), state.step)
            state.seconds = before + time.perf_counter() - started
            if state.batch % _LOOK == 0 or state.batch == total:
                self.tally.check(state)
                bar.show(state, self.tally)
            if caught or (options.steps and state.step >= options.steps):
                break
            if options.checkpoint_every_steps and state.step % options.checkpoint_every_steps == 0:
                self.tally.check(state)
                self._save(best=state.best is None)
        self.tally.check(state)
        if caught:
            self._save(best=state.best is None)
            return "signal"
        return "steps" if options.steps and state.step >= options.steps else None

    def _backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients; the embedding tables update themselves, and refuse one that is not finite."""
        try:
            self.fabric.backward(loss)
        except ValueError as error:
            step = self.state.step + 1
            self.tally.add(loss.detach(), 1, step)
            self.tally.check(self.state)
            raise InputError(f"fit: step {step} (epoch {self.state.epoch + 1}): {error}") from error

    def _evaluate_inside(self, bar: _Bar) -> None:
        """Measure a training that `steps` ended inside an epoch, for whoever reads the run.

        The checkpoint knows nothing of it, so that going on is as if nothing had stopped: a plateau is counted in
        epochs. The weights are the ones to use only where no epoch was finished, or nothing is monitored.
        """
        state = self.state
        best = state.best is None or self.options.monitor is None
        self._save(best=best)
        entry = self._entry(bar)
        self.state = replace(state, history=[*state.history, entry], best=entry if best else state.best)
        if self.out is not None:
            checkpoint.tell(self.out, self.state, self.options)
        for callback in self.callbacks:
            callback(entry)

    def _entry(self, bar: _Bar) -> dict[str, Any]:
        """Measure the model as it is."""
        state, options = self.state, self.options
        entry: dict[str, Any] = {"epoch": state.epoch, "step": state.step}
        if state.rows:
            entry |= {"loss": self.tally.mean(), "rows": state.rows}
            entry["rows_per_second"] = round(state.rows / max(state.seconds, 1e-9), 1)
        entry["seconds"] = round(state.seconds, 4)
        if self.data.valid is not None and len(self.data.valid):
            started = time.perf_counter()
            k = sorted({10, 50, *_k_of(options.monitor)})
            entry["valid"] = evaluate(
                self.model,
                self.data.valid,
                dataset=self.data,
                k=k,
                batch_size=options.eval_batch_size,
                shared=options.shared_histories,
            )
            entry["valid_seconds"] = round(time.perf_counter() - started, 4)
            if options.monitor == "gauc" and "gauc" not in entry["valid"]:
                raise InputError(
                    "fit: monitor = 'gauc' cannot be measured: no group of the valid split has labels of both kinds"
                )
        bar.line(f"epoch {state.epoch + 1}/{options.epochs}", entry)
        return entry

    def _evaluate(self, bar: _Bar) -> str | None:
        """Close an epoch: measure, compare with the best, write a checkpoint."""
        state, options = self.state, self.options
        entry = self._entry(bar)
        state.history.append(entry)
        best = self._is_best(entry)
        if best:
            state.best, state.stale = entry, 0
            # A model without anything to train has but one state, which may be large.
            if self.out is None and self.optimizer is not None:
                self.best_weights = {
                    k: v.detach().clone() if isinstance(v, torch.Tensor) else v
                    for k, v in self.model.state_dict().items()
                }
        else:
            state.stale += 1
            due = state.stale % (options.lr_patience + 1) == 0
            if due and options.lr_plateau is not None and self.optimizer is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] *= options.lr_plateau
        if state.batch >= len(self.loader):
            state.epoch, state.batch = state.epoch + 1, 0
        state.rows, state.seconds = 0, 0.0
        self.tally = _Tally(self.fabric.device)
        self._save(best=best)
        asked = [callback(entry) for callback in self.callbacks]
        return "callback" if any(answer is True for answer in asked) else None

    def _is_best(self, entry: dict[str, Any]) -> bool:
        monitor, best = self.options.monitor, self.state.best
        if monitor is None or best is None:
            return True
        new, old = (e.get("loss", math.inf) if monitor == "loss" else e["valid"][monitor] for e in (entry, best))
        return new < old if lower_is_better(monitor) else new > old

    def _save(self, *, best: bool) -> None:
        if self.out is not None:
            checkpoint.save(
                self.out,
                self.state,
                self.model,
                self.optimizer,
                self.tally.tensors(),
                # Where nothing was trained since, the place is still the one that was read.
                loader=self.loader.state_dict() if self.loader_state is None else self.loader_state,
                settings=self.options,
                facts=self.facts,
                best=best,
            )

    def _restore_best(self) -> None:
        best = self.state.best
        if best is None or best["step"] == self.state.step:
            return
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        elif self.out is not None:
            checkpoint.restore_best(self.out, self.model)


class _Tally:
    """The running loss, kept on the device: reading it in every step would make the device wait for Python."""

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.rows = torch.zeros((), dtype=torch.int64, device=device)
        self.bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, loss: torch.Tensor, rows: int, step: int) -> None:
        self.loss += loss.to(self.loss.dtype) * rows
        self.rows += rows
        self.bad = torch.where((self.bad < 0) & ~torch.isfinite(loss), step, self.bad)

    def mean(self) -> float:
        return (self.loss / self.rows.clamp(min=1)).item()

    def check(self, state: State) -> None:
        """Refuse to go on after a loss that is not a number."""
        if (step := int(self.bad)) >= 0:
            raise InputError(
                f"fit: the loss is not finite at step {step} (epoch {state.epoch + 1}), expected a number: lower lr, "
                "set clip_norm, or look for values in the data that are not finite"
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"loss": self.loss, "rows": self.rows, "bad": self.bad}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            getattr(self, name).copy_(tensor)


def _optimizer(model: nn.Module, options: TrainConfig) -> torch.optim.Optimizer | None:
    """Return the optimiser of the dense weights; None for a model that has nothing to train."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return None
    if hasattr(model, "sparse_gradients"):
        model.sparse_gradients = options.optimizer == "lazy_adam"
    classes = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
        "lazy_adam": LazyAdam,
    }
    # One pass over parameter, gradient and moments: the other forms go over tables of millions of weights many times.
    fusible = options.optimizer in ("adam", "adamw", "sgd") and all(p.device.type == "cpu" for p in parameters)
    fused = {"fused": True} if fusible else {}
    return classes[options.optimizer](parameters, lr=options.lr, weight_decay=options.weight_decay, **fused)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (models may draw from the global generator)
    random.seed(seed)


def _k_of(monitor: str | None) -> list[int]:
    return [int(monitor.split("@")[1])] if monitor and "@" in monitor else []


@contextlib.contextmanager
def _signals(active: bool) -> Iterator[list[int]]:
    """Collect the first SIGTERM or Ctrl-C, for a checkpoint to be written before it acts; a second one acts at once."""
    caught: list[int] = []
    # Python lets only the main thread set handlers.
    if not active or threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        restore()


class _Bar:
    """What a person sees of a training: nothing, a line for each evaluation, or a bar between the lines as well."""

    def __init__(self, console: Any = None, progress: Any = None) -> None:
        self.console, self.progress, self.task = console, progress, None

    def start(self, title: str, done: int, total: int) -> None:
        if self.progress is not None:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task = self.progress.add_task(title, total=total, completed=done, note="")

    def show(self, state: State, tally: _Tally) -> None:
        if self.progress is not None:
            note = f"loss {tally.mean():.4f}  {state.rows / max(state.seconds, 1e-9):,.0f} rows/s"
            self.progress.update(self.task, completed=state.batch, note=note)

    def line(self, title: str, entry: dict[str, Any]) -> None:
        if self.console is not None:
            parts = [f"{title}  loss {entry['loss']:.4f}"] if "loss" in entry else ["evaluated"]
            parts += [f"{name} {value:.4f}" for name, value in entry.get("valid", {}).items() if name != "users"]
            parts += [f"{entry['rows_per_second']:,.0f} rows/s"] if "rows_per_second" in entry else []
            self.console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _bar(progress: bool | None) -> Iterator[_Bar]:
    if not (sys.stderr.isatty() if progress is None else progress):
        yield _Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Bar(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as drawn:
        yield _Bar(console, drawn)
