"""Many may read at the same time, or one may change."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class Guard:
    """A lock with two sides: `with guard.reading:` in any number of threads, `with guard.changing:` in one alone.

    In the order in which they ask: a change waits for the reads and changes that asked before it, a read for the
    changes that did, so that neither starves however many there are of the other. Not reentrant: a thread that reads
    must not ask to change.
    """

    def __init__(self) -> None:
        self.reset()
        _GUARDS.add(self)

    def reset(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._readers = 0  # under way, or let in and about to wake up
        # Changes are numbered as they ask: the next number; how many are over; those given up before their turn.
        self._asked, self._over = 0, 0
        self._given_up: set[int] = set()
        # How many reads wait for all changes below a number.
        self._waiting: dict[int, int] = {}
        self.reading = _Reading(self)
        self.changing = _Changing(self)
        # Of reads alone: one makes what the others wait for.
        self.building = threading.Lock()

    def _next(self) -> None:
        """A change is over: let in the reads that waited for it, and wake everybody up."""
        while True:
            self._over += 1
            self._readers += self._waiting.pop(self._over, 0)
            if self._over not in self._given_up:
                break
            self._given_up.remove(self._over)
        self._condition.notify_all()


class _Reading:
    def __init__(self, guard: Guard):
        self._guard = weakref.proxy(guard)

    def __enter__(self) -> None:
        guard = self._guard
        with guard._condition:
            turn = guard._asked
            if guard._over == turn:
                guard._readers += 1
                return
            guard._waiting[turn] = guard._waiting.get(turn, 0) + 1
            try:
                while guard._over < turn:
                    guard._condition.wait()
            except BaseException:  # interrupted while it waits: nobody must wait for it
                if guard._over < turn:
                    guard._waiting[turn] -= 1
                else:
                    guard._readers -= 1
                    guard._condition.notify_all()
                raise

    def __exit__(self, *_error: type[BaseException] | BaseException | TracebackType | None) -> None:
        guard = self._guard
        with guard._condition:
            guard._readers -= 1
            if guard._over != guard._asked and not guard._readers:
                guard._condition.notify_all()


class _Changing:
    def __init__(self, guard: Guard):
        self._guard = weakref.proxy(guard)

    def __enter__(self) -> None:
        guard = self._guard
        with guard._condition:
            turn = guard._asked
            guard._asked += 1
            try:
                while guard._over != turn or guard._readers:
                    guard._condition.wait()
            except BaseException:  # interrupted while it waits: nobody must wait for it
                if guard._over == turn:
                    guard._next()
                else:
                    guard._given_up.add(turn)
                raise

    def __exit__(self, *_error: type[BaseException] | BaseException | TracebackType | None) -> None:
        guard = self._guard
        with guard._condition:
            guard._next()


_GUARDS: weakref.WeakSet[Guard] = weakref.WeakSet()


def _forget() -> None:
    """In a forked child the threads that read or changed do not exist."""
    for guard in list(_GUARDS):
        guard.reset()


os.register_at_fork(after_in_child=_forget)
