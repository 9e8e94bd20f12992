"""Greenlets of gevent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from gevent.monkey import get_original as _original
from gevent.selectors import GeventSelector
from gevent.socket import wait_read, wait_write
from gevent.threadpool import ThreadPool
from zope.interface import implementer

from z4j_bare.concurrency.base import BaseConcurrency, Task
from z4j_bare.concurrency.bites import load_in_bites
from z4j_bare.concurrency.fork import ForkGuard
from z4j_bare.interfaces import IConcurrency

#: Seconds to sleep instead of none: gevent's ``sleep(0)`` lets only those run who wait for nothing, fifty times in a row,
#: before a timer or a socket has its turn.
BREATH = 1e-5

_gate = ForkGuard(_original("_thread", "allocate_lock"))


@implementer(IConcurrency)
class GeventConcurrency(BaseConcurrency):
    """One greenlet per task on the hub of the thread that starts the agent; one native thread for the store.

    The thread pool is our own: the hub's ten threads also resolve names, and a hung disk must not take one of those.
    """

    name = "gevent"

    def __init__(self) -> None:
        super().__init__()
        self._pool: ThreadPool | None = None
        self._slot = BoundedSemaphore(1)

    def event(self) -> Any:
        """Return a new ``gevent.event.Event``."""
        return Event()

    def selector(self) -> Any:
        """Return a selector that parks on the hub."""
        return GeventSelector()

    def native_ident(self) -> int:
        """Return the hub's thread."""
        return int(_original("_thread", "get_ident")())

    def native(self, function: Callable[..., object], *args: object) -> bool:
        """Start an unpatched daemon thread."""
        _original("_thread", "start_new_thread")(function, (_original("time", "sleep"), *args))
        return True

    def timer(
        self, seconds: float, function: Callable[[], object], *, once: bool = False
    ) -> Callable[[], object]:
        """Start a timer of libev's, which keeps nothing alive."""
        timer = gevent.get_hub().loop.timer(seconds, seconds, ref=False)

        def tick() -> None:
            if self._tick(function) and not once:
                timer.again(tick)  # from now on, not from when this one was due
            else:
                timer.close()

        timer.start(tick)
        end: Callable[[], object] = timer.close
        return end

    def load(self, module: str) -> Any:
        """Import and return a module, yielding between files."""
        return load_in_bites(module, self.sleep)

    def close(self) -> None:
        """End the native thread."""
        pool, self._pool = self._pool, None
        # kill() waits for the thread: never for one that hangs in the disk, stop() is bounded.
        if pool is not None and not self.forked() and not self._slot.locked():
            pool.kill()

    def _lock(self) -> Any:
        return BoundedSemaphore(1)

    def _start(self, run: Callable[..., None], task: Task, *args: Any) -> None:
        gevent.Greenlet(run, task, *args).start()

    def _sleep(self, seconds: float) -> None:
        gevent.sleep(seconds or BREATH)

    def _offload(self, job: Callable[..., Any], *args: Any) -> Any:
        with self._slot:
            if self._pool is None:
                self._pool = ThreadPool(1)
            return self._pool.apply(_gate.run, (job, *args))

    def _wait_io(self, sock: Any, timeout: float, write: bool) -> bool:
        wait = wait_write if write else wait_read
        try:
            wait(sock.fileno(), timeout=timeout, timeout_exc=TimeoutError)
        except TimeoutError:
            return False
        return True
