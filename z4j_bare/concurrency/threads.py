"""The backend for processes without monkey-patching. Its tasks are operating system threads."""

from __future__ import annotations

import select
import selectors
import threading
from collections.abc import Callable
from typing import Any

from zope.interface import implementer

from z4j_bare.concurrency.base import BaseConcurrency, RuntimeLock
from z4j_bare.concurrency.fork import ForkGuard, ImportForkGuard
from z4j_bare.errors import InterpreterShutdownError
from z4j_bare.interfaces import HasFileno, IConcurrency, IEvent

_store_guard = ForkGuard(threading.Lock)
_import_guard = ImportForkGuard()


@implementer(IEvent)
class ThreadEvent(threading.Event):
    """A ``threading.Event`` that is declared to implement ``IEvent``."""


@implementer(IConcurrency)
class ThreadsConcurrency(BaseConcurrency):
    """Runs each task in a daemon thread, and offloaded functions in the calling thread."""

    name = "threads"

    def __init__(self) -> None:
        super().__init__()
        self._never_set = threading.Event()
        self._offload_lock = threading.Lock()

    def event(self) -> IEvent:
        """Return a new :class:`ThreadEvent`."""
        return ThreadEvent()

    def selector(self) -> selectors.BaseSelector:
        """Return a new selector of the most efficient kind that this platform has."""
        return selectors.DefaultSelector()

    def _lock(self) -> RuntimeLock:
        return threading.Lock()

    def _start(self, run: Callable[[], None], name: str) -> None:
        try:
            threading.Thread(target=_import_guard.run, args=(run,), name=name, daemon=True).start()
        except RuntimeError as error:
            raise InterpreterShutdownError(f"task {name} cannot be started: {error}") from None

    def _sleep(self, seconds: float) -> None:
        # ``time.sleep`` is not used, because it may be patched although threads are not.
        # A patched ``sleep`` would create a hub in this thread.
        self._never_set.wait(seconds)

    def _offload(self, job: Callable[[], tuple[bool, Any]]) -> tuple[bool, Any]:
        with self._offload_lock:
            return _store_guard.run(job)

    def _wait_io(self, sock: HasFileno, timeout: float, write: bool) -> bool:
        if not hasattr(select, "poll"):
            # eventlet removes poll() when it patches sockets. eventlet's select() accepts all
            # descriptors.
            return any(select.select([] if write else [sock], [sock] if write else [], [], timeout))
        poller = select.poll()  # the native select() rejects descriptors above 1023
        poller.register(sock, select.POLLOUT if write else select.POLLIN)
        return bool(poller.poll(max(0, int(timeout * 1000))))
