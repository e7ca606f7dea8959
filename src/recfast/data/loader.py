"""Batches of a split: shuffled, resumable, without a loop over rows."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from recfast.data.dataset import Batch, Split
from recfast.errors import InputError

# A whole permutation up to this many rows; beyond, blocks of rows are shuffled, then the rows of a window of
# blocks.
FULL_SHUFFLE_ROWS = 20_000_000
BLOCK_ROWS = 1 << 14
WINDOW_BLOCKS = 1 << 9


class _Order:
    """The order of an epoch, computed window by window so that its memory is bounded.

    It depends on seed, epoch and the number of rows alone (numpy's Philox).
    """

    def __init__(self, rows: int, shuffle: bool, seed: int, epoch: int) -> None:
        self._rows, self._shuffle, self._key = rows, shuffle, (seed, epoch)
        self._window: tuple[int, np.ndarray] | None = None
        self._blocks: np.ndarray | None = None
        self._starts = np.array([0, rows])
        if shuffle and rows > FULL_SHUFFLE_ROWS:
            blocks = -(-rows // BLOCK_ROWS)
            self._blocks = self._random(0).permutation(blocks)
            sizes = np.minimum(BLOCK_ROWS, rows - self._blocks * BLOCK_ROWS)
            ends = np.cumsum(sizes)[WINDOW_BLOCKS - 1 :: WINDOW_BLOCKS]
            self._starts = np.unique(np.concatenate([[0], ends, [rows]]))

    def _random(self, window: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._key, window])))

    def _permutation(self, window: int) -> np.ndarray:
        if self._window is None or self._window[0] != window:
            if self._blocks is None:
                rows = np.arange(self._rows)
            else:
                blocks = self._blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
                rows = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).ravel()
                rows = rows[rows < self._rows]
            self._window = (window, self._random(window + 1).permutation(rows))
        return self._window[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return positions start to stop of the order, int64."""
        if not self._shuffle:
            return np.arange(start, stop)
        parts = []
        while start < stop:
            window = int(np.searchsorted(self._starts, start, side="right")) - 1
            low, high = int(self._starts[window]), int(self._starts[window + 1])
            end = min(stop, high)
            parts.append(self._permutation(window)[start - low : end - low])
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Loader:
    """Batches of a split, epoch after epoch.

    Parameters
    ----------
    split
        `Split`.
    batch_size
        Rows per batch; the last batch of an epoch may be smaller.
    shuffle
        A new order each epoch: a full permutation up to 20 million rows; beyond that blocks of 16,384 rows in
        random order, and the rows of 512 blocks at a time permuted, which bounds the memory.
    seed
        Order = f(seed, epoch, number of rows): the same in every process and after a resume.
    drop_last
        Leave out a last batch that is not full.
    prefetch
        Batches a thread prepares ahead; 0 for none.
    shared
        Rows one after another of one user with one history stay together, and share it (`Split.requests`,
        `Batch.candidate_offsets`): `batch_size` then counts such requests, and requests are shuffled.

    Notes
    -----
    `iter` starts an epoch at its first batch, save after `load_state_dict`, when it goes on at the very next
    one. `set_epoch` names the epoch; it does not count up by itself.

    Examples
    --------
    >>> loader = Loader(ds.train, 4096, shuffle=True, seed=1)      # doctest: +SKIP
    >>> for epoch in range(3):                                     # doctest: +SKIP
    ...     loader.set_epoch(epoch)
    ...     for batch in loader:
    ...         ...
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 0,
        shared: bool = False,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise InputError(f"Loader: batch_size = {batch_size!r} is not a positive integer")
        if seed < 0:
            raise InputError(f"Loader: seed = {seed} is negative")
        if prefetch < 0:
            raise InputError(f"Loader: prefetch = {prefetch} is negative")
        self.split = split
        self.batch_size = int(batch_size)
        self.shuffle = bool(shuffle)
        self.seed = int(seed)
        self.drop_last = bool(drop_last)
        self.prefetch = int(prefetch)
        self._requests = split.requests() if shared else None
        self._epoch = 0
        self._batch = 0
        self._resume = False

    def __len__(self) -> int:
        """Return the batches of an epoch."""
        rows = self._count_rows()
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def _count_rows(self) -> int:
        """What an epoch orders: rows, or requests."""
        return len(self.split) if self._requests is None else len(self._requests) - 1

    @property
    def epoch(self) -> int:
        """The epoch whose order `iter` follows."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; a resume position is kept only for the epoch it belongs to."""
        if epoch < 0:
            raise InputError(f"Loader: epoch = {epoch} is negative")
        if epoch != self._epoch:
            self._epoch, self._batch, self._resume = int(epoch), 0, False

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands: "batch" counts the batches handed out in this epoch."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "rows": self._count_rows(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the batch `state` was taken at.

        Raises
        ------
        InputError
            The state belongs to another seed, batch size, order or number of rows, or lacks a key.
        """
        own = self.state_dict()
        for key in own:
            if key not in state:
                raise InputError(f"Loader: the state has no {key!r}")
            if key not in ("epoch", "batch") and state[key] != own[key]:
                raise InputError(f"Loader: the state has {key} = {state[key]!r}, this loader has {own[key]!r}")
        if not 0 <= state["batch"] <= len(self) or state["epoch"] < 0:
            raise InputError(
                f"Loader: the state stands at epoch {state['epoch']}, batch {state['batch']} of {len(self)}"
            )
        self._epoch, self._batch, self._resume = int(state["epoch"]), int(state["batch"]), True

    def _batches(self, first: int) -> Iterator[Batch]:
        rows = self._count_rows()
        order = _Order(rows, self.shuffle, self.seed, self._epoch)
        for b in range(first, len(self)):
            start = b * self.batch_size
            chosen = order.rows(start, min(start + self.batch_size, rows))
            if self._requests is None:
                yield self.split.gather(chosen)
            else:
                begins = self._requests[chosen]
                counts = self._requests[chosen + 1] - begins
                before = np.cumsum(counts) - counts
                yield self.split.gather(np.repeat(begins - before, counts) + np.arange(counts.sum()), shared=True)

    def __iter__(self) -> Iterator[Batch]:
        first = self._batch if self._resume else 0
        self._batch, self._resume = first, False
        batches = self._batches(first)
        if self.prefetch:
            batches = _ahead(batches, self.prefetch)
        return self._count(batches)

    def _count(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        try:
            for batch in batches:
                self._batch += 1
                yield batch
        finally:
            batches.close()


def _ahead(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Run an iterator in a thread, `depth` items ahead; its exception is raised here."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(("batch", batch)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, name="recfast-loader", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
