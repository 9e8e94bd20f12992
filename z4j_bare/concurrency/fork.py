"""The fork epoch, by which a copied greenlet learns that it is a copy, and the gate, which keeps forks out of SQLite.

Greenlets survive ``os.fork`` in the child, threads do not. Comparing an integer costs 30 ns, ``os.getpid`` five times that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

if not hasattr(os, "register_at_fork"):
    raise ImportError(
        "z4j-bare needs a POSIX system (forks, record locks): on Windows use WSL 2 or a container"
    )

#: Longest time in seconds that a fork waits for a native thread of ours: a disk that hangs must not hold up the host.
PATIENCE = 0.25

_epoch = 0
_children = False


def epoch() -> int:
    """Return a number that is different in every forked child."""
    return _epoch


def parental() -> bool:
    """Whether this process has ever forked a child that may run Python; ``subprocess`` as a rule forks none."""
    return _children


# Both assign and do nothing else: a hook that yields would run the parent's greenlets inside fork() (gevent #2204).


def _bump() -> None:
    global _epoch
    _epoch += 1


def _bear() -> None:
    global _children
    _children = True


os.register_at_fork(after_in_child=_bump, after_in_parent=_bear)


class ForkGuard:
    """Keeps ``os.fork`` away from what runs inside, which must be short and must not fork.

    SQLite does not reset its mutexes in a child: of 200 that were forked while another thread opened and closed files, 33
    waited for ever at their first use of SQLite, ours or the host's.

    :param make_lock: returns a lock that nobody has patched, so that waiting for it in the hook runs no greenlet.
    """

    def __init__(self, make_lock: Callable[[], Any]) -> None:
        self._make_lock = make_lock
        self._lock = make_lock()
        self._shut = False
        os.register_at_fork(
            before=self._close, after_in_parent=self._open, after_in_child=self._open_in_child
        )

    def run(self, job: Callable[..., Any], *args: Any) -> Any:
        """Call ``job(*args)`` on a native thread; other such calls and forks wait."""
        with self._lock:
            return job(*args)

    def inside(self) -> Any:
        """Return what to hold, by ``with``, for the time of a stay that is no call."""
        return self._lock

    def _close(self) -> None:
        self._shut = self._lock.acquire(timeout=PATIENCE)

    def _open(self) -> None:
        if self._shut:
            self._lock.release()

    def _open_in_child(self) -> None:
        if self._shut:
            self._lock.release()
        else:  # whoever is inside does not exist here
            self._lock = self._make_lock()
