"""A backend with virtual time for the tests of this package and of its users."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

from greenlet import getcurrent, greenlet
from zope.interface import implementer

from z4j_bare.concurrency.base import BaseConcurrency
from z4j_bare.interfaces import HasFileno, IConcurrency, IEvent, ILock

__all__ = ["FakeConcurrency", "FakeEvent", "FakeLock"]

#: Maximum virtual seconds of a wait of the main greenlet without a timeout.
#: Without a limit, such a wait could last for ever.
MAX_MAIN_WAIT = 3600.0


@implementer(IEvent)
class FakeEvent:
    """An event in virtual time. The waiters wake without delay when the event is set."""

    def __init__(self, backend: FakeConcurrency) -> None:
        self._backend = backend
        self._flag = False

    def set(self) -> None:
        """Set the flag."""
        self._flag = True

    def clear(self) -> None:
        """Clear the flag."""
        self._flag = False

    def is_set(self) -> bool:
        """Return whether the flag is set."""
        return self._flag

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the flag and return ``True``, or ``False`` after ``timeout`` virtual seconds."""
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
    """A deterministic backend in one thread.

    Tasks are greenlets that run in a fixed order, and ``sleep`` takes no real time. The backend has
    no hub, so it works with every monkey patch::

        backend = FakeConcurrency()
        backend.spawn(my_loop, name="loop")
        backend.advance(600)  # runs ten virtual minutes in milliseconds

    :param start: the time of the wall clock at the start, in seconds since the epoch.
    """

    name = "fake"

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        super().__init__()
        self._clock = 0.0
        self._start_wall = start
        self._order = count()
        self._main = getcurrent()
        self._parked: list[tuple[float, int, greenlet, Callable[[], bool]]] = []

    def now(self) -> float:
        """Return the virtual seconds since the creation of the backend."""
        return self._clock

    def wall(self) -> float:
        """Return the virtual seconds since the epoch."""
        return self._start_wall + self._clock

    def event(self) -> IEvent:
        """Return a new :class:`FakeEvent`."""
        return FakeEvent(self)

    def lock(self) -> ILock:
        """Return a new :class:`FakeLock`."""
        return FakeLock(self)

    def advance(self, seconds: float) -> None:
        """Run all tasks for ``seconds`` of virtual time."""
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Run tasks until ``condition()`` is true; return ``False`` if it does not become true.

        :param seconds: maximum virtual time.
        """
        deadline = self._clock + seconds
        while not condition():
            task = self._next(deadline)
            if task is None:
                self._clock = deadline
                return condition()
            task.switch()
        return True

    def wait_until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Suspend the current task until ``condition()`` is true; return ``False`` on timeout.

        If the caller is not a task, this method runs the tasks until the condition is true.

        :param timeout: maximum virtual seconds.
        """
        if getcurrent() is self._main:
            return self.run_until(condition, timeout if timeout is not None else MAX_MAIN_WAIT)
        deadline = float("inf") if timeout is None else self._clock + timeout
        if not condition():
            heapq.heappush(self._parked, (deadline, next(self._order), getcurrent(), condition))
            self._main.switch()
        return condition()

    def _next(self, deadline: float) -> greenlet | None:
        """Remove and return the next task to run; ``None`` if no task runs before ``deadline``.

        Tasks whose condition is true run first. If there are none, the task with the earliest
        timeout runs, and the clock advances to that timeout.
        """
        ready = [entry for entry in self._parked if entry[3]()]
        if ready:
            entry = min(ready, key=lambda item: item[1])
        elif self._parked and self._parked[0][0] <= deadline:
            entry = self._parked[0]
        else:
            return None
        self._parked.remove(entry)
        heapq.heapify(self._parked)
        if not ready:
            self._clock = max(self._clock, entry[0])
        return entry[2]

    def _start(self, run: Callable[[], None], name: str) -> None:
        del name
        child = greenlet(run, parent=self._main)
        heapq.heappush(self._parked, (self._clock, next(self._order), child, lambda: True))

    def _sleep(self, seconds: float) -> None:
        self.wait_until(lambda: False, max(seconds, 1e-9))

    def _offload(self, job: Callable[[], tuple[bool, Any]]) -> tuple[bool, Any]:
        return job()

    def _wait_io(self, sock: HasFileno, timeout: float, write: bool) -> bool:
        del sock
        return write or self.wait_until(lambda: False, timeout)
