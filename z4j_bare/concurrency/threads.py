"""Real threads, for processes that nobody has patched."""

from __future__ import annotations

import select
import selectors
import threading
from collections.abc import Callable
from typing import Any

from zope.interface import implementer

from z4j_bare.concurrency.base import BaseConcurrency, Task
from z4j_bare.concurrency.fork import ForkGuard, ImportForkGuard
from z4j_bare.errors import InterpreterShutdownError
from z4j_bare.interfaces import IConcurrency

_gate = ForkGuard(threading.Lock)
_imports = ImportForkGuard()


@implementer(IConcurrency)
class ThreadsConcurrency(BaseConcurrency):
    """One daemon thread per task; offloaded work runs in the calling loop's own thread."""

    name = "threads"

    def __init__(self) -> None:
        super().__init__()
        self._never = threading.Event()
        self._slot = threading.Lock()

    def event(self) -> threading.Event:
        """Return a new ``threading.Event``."""
        return threading.Event()

    def selector(self) -> selectors.BaseSelector:
        """Return the best selector of this platform."""
        return selectors.DefaultSelector()

    def _lock(self) -> Any:
        return threading.Lock()

    def _start(self, run: Callable[..., None], task: Task, *args: Any) -> None:
        try:
            threading.Thread(
                target=_imports.run, args=(run, task, *args), name=task.name, daemon=True
            ).start()
        except RuntimeError as error:
            raise InterpreterShutdownError(f"task {task.name} cannot be started: {error}") from None

    def _sleep(self, seconds: float) -> None:
        # Not time.sleep: where only sockets are patched, that one builds a hub of its own in this thread.
        self._never.wait(seconds)

    def _offload(self, job: Callable[..., Any], *args: Any) -> Any:
        with self._slot:
            return _gate.run(job, *args)

    def _wait_io(self, sock: Any, timeout: float, write: bool) -> bool:
        if not hasattr(
            select, "poll"
        ):  # eventlet takes it away where it patches sockets; its select() knows no 1024
            return any(select.select([] if write else [sock], [sock] if write else [], [], timeout))
        poller = select.poll()  # not select(): file descriptors above 1024
        poller.register(sock, select.POLLOUT if write else select.POLLIN)
        return bool(poller.poll(max(0, int(timeout * 1000))))
