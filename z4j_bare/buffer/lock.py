"""The owner's mark on a store: a POSIX record lock on ``<store>.lock``.

``flock`` passes to forked children, so a child that outlives its parent would keep a dead owner's store
locked (measured); a record lock belongs to one process. Its two traps are handled here: closing *any*
descriptor of the file drops the lock, so nothing else may open it, and it never excludes its own process, so
a table of this process does.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from z4j_bare.buffer.files import remove
from z4j_bare.concurrency.fork import open_file
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from pathlib import Path

#: Lock files this process holds, and those its parents held when it was forked. The latter stay refused for
#: good: SQLite's own table of open files came along through the fork and would take locks for held that this
#: process has not.
_held: dict[str, object] = {}


class OwnerLock:
    """Ownership of one store; taken by the constructor without waiting, else ``LocalStorageError``."""

    def __init__(self, path: Path) -> None:
        #: Kept alive with the lock, so that a forked child which drops the store does not close its
        #: connection.
        self.pinned: object = None
        self._path = path
        self._name = os.path.realpath(path)
        if _held.setdefault(self._name, self) is not self:
            raise LocalStorageError(
                f"the store of {path} is open in this process, or was in the one that forked it"
            )
        try:
            self._descriptor = _locked(path)
        except BaseException:
            del _held[self._name]
            raise

    def release(self, *, delete: bool = False) -> None:
        """Let the store go, once; ``delete`` removes the lock file while it is still held. Not in a forked child."""
        if _held.get(self._name) is not self:
            return
        try:
            if delete:
                remove(self._path)
        finally:
            del _held[self._name]
            os.close(self._descriptor)


def is_owned(path: Path) -> bool:
    """Whether a living process, be it this one, has the lock ``path``. It is taken for a moment to find out.

    Raises ``LocalStorageError`` where that cannot be told.
    """
    if os.path.realpath(path) in _held:  # closing a descriptor of it here would drop the lock
        return True
    try:
        descriptor = open_file(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise LocalStorageError(
            f"cannot look at {path} as uid {os.geteuid()}: {error.strerror}"
        ) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _locked(path: Path) -> int:
    try:
        descriptor = open_file(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalStorageError(
            f"cannot make {path} as uid {os.geteuid()}: {error.strerror}; point Z4J_HOME at a writable directory"
        ) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _still_named(path, descriptor):
            raise LocalStorageError(f"the store of {path} has just been deleted by its owner")
    except OSError as error:
        os.close(descriptor)
        if error.errno not in {
            errno.EAGAIN,
            errno.EACCES,
        }:  # ENOLCK, EOPNOTSUPP: some network file systems
            raise LocalStorageError(
                f"no record locks for {path}: {error.strerror}; move Z4J_HOME"
            ) from error
        raise LocalStorageError(
            f"the store of {path} belongs to a living process: {error.strerror}"
        ) from error
    except LocalStorageError:
        os.close(descriptor)
        raise
    return descriptor


def _still_named(path: Path, descriptor: int) -> bool:
    """Whether the file still bears its name: its owner may have deleted it between our open and our lock."""
    try:
        return os.fstat(descriptor).st_ino == path.lstat().st_ino
    except FileNotFoundError:
        return False
