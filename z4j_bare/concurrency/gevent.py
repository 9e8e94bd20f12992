"""The backend for processes that gevent has patched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from selectors import BaseSelector
from types import FrameType, ModuleType
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

from z4j_bare.concurrency.base import BaseConcurrency, RuntimeLock, suspended_frame
from z4j_bare.concurrency.fork import ForkGuard
from z4j_bare.concurrency.timeslice import YIELD_SECONDS
from z4j_bare.interfaces import HasFileno, IConcurrency, IEvent

_store_guard = ForkGuard(_original("_thread", "allocate_lock"))


@implementer(IConcurrency)
class GeventConcurrency(BaseConcurrency):
    """Runs each task in a greenlet on the hub, and offloaded functions in one native thread.

    The hub belongs to the thread that starts the agent. The native thread belongs to a pool of the
    agent. The hub's pool of ten threads is not used. That pool resolves host names, and a hung disk
    must not occupy the threads of that pool.
    """

    name = "gevent"

    def __init__(self) -> None:
        super().__init__()
        self._pool: ThreadPool | None = None
        self._offload_lock = BoundedSemaphore(1)

    def event(self) -> IEvent:
        """Return a new ``gevent.event.Event``."""
        event: IEvent = Event()
        return event

    def selector(self) -> BaseSelector:
        """Return a new ``GeventSelector``."""
        selector: BaseSelector = GeventSelector()
        return selector

    def native_ident(self) -> int:
        """Return the ident of the hub's thread."""
        return int(_original("_thread", "get_ident")())

    def context_getter(self) -> Callable[[], object]:
        """Return ``greenlet.getcurrent``."""
        current: Callable[[], object] = getcurrent
        return current

    def frame_reader(self) -> Callable[[object], FrameType | None]:
        """Return a function that reads the frame of a suspended greenlet."""
        return suspended_frame

    def start_native_thread(self, function: Callable[..., object], *args: object) -> bool:
        """Run ``function(sleep, *args)`` in an unpatched daemon thread."""
        _original("_thread", "start_new_thread")(function, (_original("time", "sleep"), *args))
        return True

    def timer(
        self, seconds: float, function: Callable[[], object], *, once: bool = False
    ) -> Callable[[], object]:
        """Make the hub call ``function()`` every ``seconds`` seconds.

        The hub can end although the timer is active.
        """
        timer = gevent.get_hub().loop.timer(seconds, seconds, ref=False)

        def tick() -> None:
            if self._tick(function) and not once:
                timer.again(tick)  # the interval starts now, also after a late tick
            else:
                timer.close()

        timer.start(tick)
        cancel: Callable[[], object] = timer.close
        return cancel

    def import_module(self, module: str) -> ModuleType:
        """Import and return a module, yielding before each file."""
        return import_cooperatively(module, self.sleep)

    def close(self) -> None:
        """Stop the native thread if it runs no job, because ``kill`` would wait for the job."""
        pool, self._pool = self._pool, None
        if pool is not None and not self.forked() and not self._offload_lock.locked():
            pool.kill()

    def _lock(self) -> RuntimeLock:
        lock: RuntimeLock = BoundedSemaphore(1)
        return lock

    def _start(self, run: Callable[[], None], name: str) -> None:
        del name
        gevent.Greenlet(run).start()

    def _sleep(self, seconds: float) -> None:
        gevent.sleep(seconds or YIELD_SECONDS)

    def _offload(self, job: Callable[[], tuple[bool, Any]]) -> tuple[bool, Any]:
        with self._offload_lock:
            if self._pool is None:
                self._pool = ThreadPool(1)
            outcome: tuple[bool, Any] = self._pool.apply(_store_guard.run, (job,))
            return outcome

    def _wait_io(self, sock: HasFileno, timeout: float, write: bool) -> bool:
        wait = wait_write if write else wait_read
        try:
            wait(sock.fileno(), timeout=timeout, timeout_exc=TimeoutError)
        except TimeoutError:
            return False
        return True


class _YieldingFinder:
    """A meta-path finder that yields before each import of its greenlet and finds no module."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._greenlet = getcurrent()
        self._sleep = sleep

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Yield, and return ``None``, so that Python asks the next finder."""
        del name, path, target
        if getcurrent() is self._greenlet:
            self._sleep(0)
        return None


def import_cooperatively(module: str, sleep: Callable[[float], None]) -> ModuleType:
    """Import and return ``module``, yielding before each file.

    An import of ``requests`` without yields would block the hub for 100 to 200 ms.

    Another greenlet that imports one of these modules during a yield waits for the module's import
    lock. Only gevent replaces the locks and thread idents of importlib. Under eventlet, all
    greenlets have the native thread's ident and are one owner of the import lock. Therefore a
    second greenlet would import the module again, or get a half-initialised module.
    """
    finder = _YieldingFinder(sleep)
    sys.meta_path.insert(0, finder)
    try:
        return import_module(module)
    finally:
        sys.meta_path.remove(finder)
