"""Many may read at the same time, or one may change."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class Guard:
    """A lock with two sides: `with guard.reading:` in any number of threads, `with guard.changing:` in one alone.

    A change waits for the reads under way, and later reads wait for the change, so that neither starves. Not reentrant:
    a thread that reads must not ask to change.
    """

    def __init__(self) -> None:
        self.reset()
        _GUARDS.add(self)

    def reset(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._readers = 0
        self._changes = 0  # under way or waiting
        self._changing = False
        self.reading = _Reading(self)
        self.changing = _Changing(self)


class _Reading:
    def __init__(self, guard: Guard):
        self._guard = weakref.proxy(guard)

    def __enter__(self) -> None:
        guard = self._guard
        with guard._condition:
            while guard._changes:
                guard._condition.wait()
            guard._readers += 1

    def __exit__(self, *_error: type[BaseException] | BaseException | TracebackType | None) -> None:
        guard = self._guard
        with guard._condition:
            guard._readers -= 1
            if guard._changes and not guard._readers:
                guard._condition.notify_all()


class _Changing:
    def __init__(self, guard: Guard):
        self._guard = weakref.proxy(guard)

    def __enter__(self) -> None:
        guard = self._guard
        with guard._condition:
            guard._changes += 1
            try:
                while guard._readers or guard._changing:
                    guard._condition.wait()
            except BaseException:  # interrupted while it waits: nobody must wait for it
                guard._changes -= 1
                guard._condition.notify_all()
                raise
            guard._changing = True

    def __exit__(self, *_error: type[BaseException] | BaseException | TracebackType | None) -> None:
        guard = self._guard
        with guard._condition:
            guard._changing = False
            guard._changes -= 1
            guard._condition.notify_all()


_GUARDS: weakref.WeakSet[Guard] = weakref.WeakSet()


def _forget() -> None:
    """In a forked child the threads that read or changed do not exist."""
    for guard in list(_GUARDS):
        guard.reset()


os.register_at_fork(after_in_child=_forget)
