"""Greenlets of gevent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import gevent
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from gevent.monkey import get_original as _original
from gevent.selectors import GeventSelector
from gevent.socket import wait_read, wait_write
from gevent.threadpool import ThreadPool
from greenlet import getcurrent
from zope.interface import implementer

from z4j_bare.concurrency.base import BaseConcurrency, Task
from z4j_bare.concurrency.fork import ForkGuard
from z4j_bare.concurrency.timeslice import YIELD_SECONDS
from z4j_bare.interfaces import IConcurrency

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

    def start_native_thread(self, function: Callable[..., object], *args: object) -> bool:
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

    def import_module(self, module: str) -> Any:
        """Import and return a module, yielding between files."""
        return import_cooperatively(module, self.sleep)

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
        gevent.sleep(seconds or YIELD_SECONDS)

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


class _YieldingFinder:
    """A meta-path finder that finds nothing and yields before each module that its own greenlet imports."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._greenlet = getcurrent()
        self._sleep = sleep

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Yield; return ``None``, so that the next finder is asked."""
        del name, path, target
        if getcurrent() is self._greenlet:
            self._sleep(0)
        return None


def import_cooperatively(module: str, sleep: Callable[[float], None]) -> ModuleType:
    """Import and return ``module``, yielding before each file. Without yields ``requests`` takes 100 to 200 ms.

    Another greenlet that imports one of these modules meanwhile waits for its import lock. This is only safe under
    gevent, whose locks and thread idents importlib uses. Under eventlet importlib keeps the native ones, so all greenlets
    count as one owner of a module's lock: a second greenlet would import the module again or get it half initialised.
    """
    finder = _YieldingFinder(sleep)
    sys.meta_path.insert(0, finder)
    try:
        return import_module(module)
    finally:
        sys.meta_path.remove(finder)
