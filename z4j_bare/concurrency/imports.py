"""Keeps ``os.fork`` out of imports on native threads of ours.

A thread that imports is not there in the child, but the module is, half done, and so is its lock, shut for ever: whoever
imports it there waits. At a start that is a tenth of a second for kombu's transport and redis alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from importlib import _bootstrap
from typing import Any

#: Longest time in seconds that a fork waits: ours may itself wait for an import of the thread that forks.
PATIENCE = 2.0
#: Seconds between two looks.
LOOK = 0.001


class ImportForkGuard:
    """The native threads of ours, and the wait for what they import."""

    def __init__(self) -> None:
        self._threads: set[int] = set()
        self._never = threading.Event()
        os.register_at_fork(before=self._wait, after_in_child=self._threads.clear)

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Call ``function(*args)`` on a native thread of its own."""
        ident = threading.get_ident()
        self._threads.add(ident)
        try:
            function(*args)
        finally:
            self._threads.discard(ident)

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._going_on() and time.monotonic() < deadline:
            self._never.wait(LOOK)

    def _going_on(self) -> bool:
        try:
            locks = [reference() for reference in tuple(_locks().values())]
        except RuntimeError:  # one began just now
            return True
        return any(lock is not None and lock.owner in self._threads for lock in locks)


def _locks() -> dict[str, Any]:
    """Return importlib's weak references to the locks of modules that are being imported."""
    return getattr(_bootstrap, "_module_locks", {})
