"""The fork epoch, and guards that make ``os.fork`` wait for native threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import _bootstrap
from typing import Protocol, TypeVar, TypeVarTuple

if hasattr(os, "register_at_fork"):
    # Native threads must not call eventlet's ``os.open``, which creates a hub in the calling
    # thread. When such a thread ends, greenlet searches the whole heap for references to the hub.
    # The search blocks the main thread for 20 to 70 ms.
    from posix import open as open_file
else:
    raise ImportError(
        "z4j-bare needs a POSIX system (forks, record locks): on Windows use WSL 2 or a container"
    )

__all__ = ["ForkGuard", "ImportForkGuard", "epoch", "has_forked", "open_file"]

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

#: Maximum seconds that ``os.fork`` waits for a native thread inside SQLite.
#: Without a limit, a hung disk would block the host.
STORE_TIMEOUT = 0.25
#: Maximum seconds that ``os.fork`` waits for an import on a native thread.
#: Without a limit, an import that waits for a lock of the forking thread would deadlock.
IMPORT_TIMEOUT = 2.0
#: Seconds between two checks whether the import has ended.
IMPORT_POLL_INTERVAL = 0.001

_epoch = 0
_forked = False


def epoch() -> int:
    """Return the fork epoch. The epoch of a forked child is its parent's epoch plus one.

    ``os.fork`` copies greenlets into the child. Therefore the agent's loops compare the epoch at
    every wake-up, and end in a child. A comparison takes 30 ns, a fifth of the time of
    ``os.getpid``.
    """
    return _epoch


def has_forked() -> bool:
    """Return whether this process has called ``os.fork``, which ``subprocess`` does not do."""
    return _forked


# The hooks only assign variables.
# A hook that yields would run the parent's greenlets inside fork() (gevent #2204).


def _after_in_child() -> None:
    global _epoch
    _epoch += 1


def _after_in_parent() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_in_child, after_in_parent=_after_in_parent)


class NativeLock(AbstractContextManager[bool, None], Protocol):
    """An unpatched lock of the ``_thread`` module, or an ``RLock``."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Acquire the lock within ``timeout`` seconds; return whether this succeeded."""
        ...

    def release(self) -> None:
        """Release the lock."""
        ...


class ForkGuard:
    """Makes ``os.fork`` wait for the end of a short section of code. The section must not fork.

    SQLite does not reset its mutexes in a child. Of 200 children that were forked while another
    thread opened and closed databases, 33 deadlocked at their first use of SQLite.

    :param make_lock: returns a lock. The lock is unpatched, because no greenlet may run while the
        fork hook waits.
    """

    def __init__(self, make_lock: Callable[[], NativeLock]) -> None:
        self._make_lock = make_lock
        self._lock = make_lock()
        self._acquired = False
        os.register_at_fork(
            before=self._acquire,
            after_in_parent=self._release,
            after_in_child=self._release_in_child,
        )

    def run(self, function: Callable[[*Ts], R], *args: *Ts) -> R:
        """Call ``function`` on this native thread.

        Other guarded calls and forks wait for the call.
        """
        with self._lock:
            return function(*args)

    def held(self) -> NativeLock:
        """Return a context manager that guards a ``with`` block instead of a call."""
        return self._lock

    def _acquire(self) -> None:
        self._acquired = self._lock.acquire(timeout=STORE_TIMEOUT)

    def _release(self) -> None:
        if self._acquired:
            self._lock.release()

    def _release_in_child(self) -> None:
        if self._acquired:
            self._lock.release()
        else:  # the thread that holds the lock does not exist in the child
            self._lock = self._make_lock()


class ImportForkGuard:
    """Makes ``os.fork`` wait for imports on the agent's native threads.

    After a fork during an import, the child has a half-initialised module and an import lock that
    no thread releases. If the child imports that module, the child deadlocks. The imports of
    kombu's transport and of redis alone take 0.1 s.
    """

    def __init__(self) -> None:
        self._threads: set[int] = set()
        self._never_set = threading.Event()
        os.register_at_fork(before=self._wait, after_in_child=self._threads.clear)

    def run(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call ``function``. Forks wait for its imports on this native thread."""
        ident = threading.get_ident()
        self._threads.add(ident)
        try:
            function(*args)
        finally:
            self._threads.discard(ident)

    def _wait(self) -> None:
        deadline = time.monotonic() + IMPORT_TIMEOUT
        while self._importing() and time.monotonic() < deadline:
            self._never_set.wait(IMPORT_POLL_INTERVAL)

    def _importing(self) -> bool:
        """Return whether a registered thread owns the lock of a module that is being imported."""
        # Weak references to the locks of modules that are being imported.
        module_locks = getattr(_bootstrap, "_module_locks", {})
        try:
            locks = [reference() for reference in tuple(module_locks.values())]
        except RuntimeError:
            # The dict changed during the iteration, because an import began.
            return True
        return any(lock is not None and lock.owner in self._threads for lock in locks)
