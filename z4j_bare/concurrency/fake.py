"""A backend with virtual time, for this package's tests and for users'.

Tasks are bare greenlets, run one at a time in a fixed order; ``sleep`` costs nothing. Works under any patching because it
never touches a hub::

    backend = FakeConcurrency()
    backend.spawn(my_loop, name="loop")
    backend.advance(600)          # ten minutes of loops, in milliseconds
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

from greenlet import getcurrent, greenlet
from zope.interface import implementer

from z4j_bare.concurrency.base import BaseConcurrency, Task
from z4j_bare.interfaces import IConcurrency, IEvent, ILock


@implementer(IEvent)
class FakeEvent:
    """An event whose waiters wake at the virtual instant it is set."""

    def __init__(self, backend: FakeConcurrency) -> None:
        self._backend = backend
        self._flag = False

    def set(self) -> None:
        """Raise the flag."""
        self._flag = True

    def clear(self) -> None:
        """Lower the flag."""
        self._flag = False

    def is_set(self) -> bool:
        """Whether the flag is up."""
        return self._flag

    def wait(self, timeout: float | None = None) -> bool:
        """Wait in virtual time."""
        return self._backend.wait_until(self.is_set, timeout)


@implementer(ILock)
class FakeLock:
    """A lock in virtual time."""

    def __init__(self, backend: FakeConcurrency) -> None:
        self._backend = backend
        self._free = True

    def __enter__(self) -> None:
        self._backend.wait_until(lambda: self._free, None)
        self._free = False

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        self._free = True


@implementer(IConcurrency)
class FakeConcurrency(BaseConcurrency):
    """Deterministic, single-threaded, virtual time that starts at ``start`` seconds since the epoch."""

    name = "fake"

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        super().__init__()
        self._clock = 0.0
        self._start_wall = start
        self._order = count()
        self._main = getcurrent()
        self._parked: list[tuple[float, int, greenlet, Callable[[], bool]]] = []

    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._clock

    def wall(self) -> float:
        """Virtual wall clock."""
        return self._start_wall + self._clock

    def event(self) -> FakeEvent:
        """Return a new event."""
        return FakeEvent(self)

    def lock(self) -> FakeLock:
        """Return a new lock."""
        return FakeLock(self)

    def advance(self, seconds: float) -> None:
        """Run every task for ``seconds`` of virtual time."""
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Run tasks until ``condition()`` holds or ``seconds`` have passed; return whether it holds."""
        deadline = self._clock + seconds
        while not condition():
            ready = self._next(deadline)
            if ready is None:
                self._clock = deadline
                return condition()
            ready.switch()
        return True

    def wait_until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Park the current task until ``condition()`` holds or ``timeout`` virtual seconds have passed."""
        if getcurrent() is self._main:
            return self.run_until(condition, timeout if timeout is not None else 3600.0)
        deadline = float("inf") if timeout is None else self._clock + timeout
        if not condition():
            heapq.heappush(self._parked, (deadline, next(self._order), getcurrent(), condition))
            self._main.switch()
        return condition()

    def _next(self, deadline: float) -> greenlet | None:
        """Take the task that may run now, else the one that wakes first, and move the clock there."""
        awake = [entry for entry in self._parked if entry[3]()]
        entry = (
            min(awake, key=lambda item: item[1])
            if awake
            else (self._parked[0] if self._parked else None)
        )
        if entry is None or (not awake and entry[0] > deadline):
            return None
        self._parked.remove(entry)
        heapq.heapify(self._parked)
        if not awake:
            self._clock = max(self._clock, entry[0])
        return entry[2]

    def _start(self, run: Callable[..., None], task: Task, *args: Any) -> None:
        child = greenlet(lambda: run(task, *args), parent=self._main)
        heapq.heappush(self._parked, (self._clock, next(self._order), child, lambda: True))

    def _sleep(self, seconds: float) -> None:
        self.wait_until(lambda: False, max(seconds, 1e-9))

    def _offload(self, job: Callable[..., Any], *args: Any) -> Any:
        return job(*args)

    def _wait_io(self, sock: Any, timeout: float, write: bool) -> bool:  # noqa: ARG002 - virtual time has no sockets
        return write or self.wait_until(lambda: False, timeout)


__all__ = ["FakeConcurrency", "FakeEvent", "FakeLock"]
