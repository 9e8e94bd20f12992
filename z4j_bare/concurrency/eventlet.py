"""Green threads of eventlet. Legacy: eventlet has announced its retirement, so this file stays thin."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import eventlet
from eventlet import hubs, patcher, tpool
from eventlet.green import selectors
from eventlet.semaphore import Semaphore
from zope.interface import implementer

from z4j_bare.concurrency.base import BaseConcurrency, Task
from z4j_bare.concurrency.fork import Gate
from z4j_bare.interfaces import IConcurrency, IEvent

_native_thread = patcher.original("_thread").get_ident
_gate = Gate(patcher.original("_thread").allocate_lock)

#: Seconds after which a waiter looks at its flag by itself, for those raised in another native thread.
LOOK = 1.0

#: Seconds after which a wait for a socket is entered anew: a forked child shares the hub's epoll set, and what it closes
#: there is no longer waited for in the parent either.
LONGEST_WAIT = 1.0


@implementer(IEvent)
class Event:
    """A flag over a semaphore: eventlet's own event fires once, and a patched ``threading.Event`` switches in ``set``."""

    def __init__(self) -> None:
        self._flag = False
        self._waiters = 0
        self._gate = Semaphore(0)
        self._thread = _native_thread()

    def set(self) -> None:
        """Raise the flag and schedule every waiter; the semaphore hands that to the hub, so nothing switches here."""
        self._flag = True
        if _native_thread() != self._thread:
            return  # a hub can only be woken from its own thread; the waiter sees the flag at its next look
        for _ in range(self._waiters):
            self._gate.release()
        self._waiters = 0

    def clear(self) -> None:
        """Lower the flag."""
        self._flag = False

    def is_set(self) -> bool:
        """Whether the flag is up."""
        return self._flag

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds."""
        deadline = None if timeout is None else monotonic() + timeout
        while not self._flag:
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                return False
            self._waiters += 1
            # A permit left over by a waiter that timed out just then costs one more turn of this loop, no more.
            if not self._gate.acquire(timeout=LOOK if left is None else min(left, LOOK)):
                self._waiters = max(0, self._waiters - 1)
        return True


@implementer(IConcurrency)
class EventletConcurrency(BaseConcurrency):
    """One green thread per task; offloaded work goes to eventlet's native pool, one call at a time."""

    name = "eventlet"

    def __init__(self) -> None:
        super().__init__()
        self._slot = Semaphore(1)

    def event(self) -> Event:
        """Return a new event."""
        return Event()

    def selector(self) -> Any:
        """Return a selector that parks on the hub."""
        return selectors.DefaultSelector()

    def native_ident(self) -> int:
        """Return the hub's thread."""
        return int(_native_thread())

    def native(self, function: Callable[..., object], *args: object) -> bool:
        """Start an unpatched daemon thread."""
        patcher.original("_thread").start_new_thread(function, (patcher.original("time").sleep, *args))
        return True

    def _lock(self) -> Any:
        return Semaphore(1)

    def _start(self, run: Callable[..., None], task: Task, *args: Any) -> None:
        eventlet.spawn_n(run, task, *args)

    def _sleep(self, seconds: float) -> None:
        eventlet.sleep(seconds)

    def _offload(self, job: Callable[..., Any], *args: Any) -> Any:
        with self._slot:
            return tpool.execute(_gate.run, job, *args)

    def _wait_io(self, sock: Any, timeout: float, write: bool) -> bool:
        while not self._wait_part(sock, min(timeout, LONGEST_WAIT), write):
            timeout -= LONGEST_WAIT
            if timeout <= 0 or self.forked():
                return False
        return True

    @staticmethod
    def _wait_part(sock: Any, timeout: float, write: bool) -> bool:
        try:
            hubs.trampoline(sock.fileno(), read=not write, write=write, timeout=timeout, timeout_exc=TimeoutError)
        except TimeoutError:
            return False
        return True
