"""Paths, permissions and owner locks of stores.

The files have mode 0600, because they contain task arguments. The directory has mode 0700, because
a user with write access to the directory can replace files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from z4j_bare.concurrency.fork import open_file
from z4j_bare.errors import LocalStorageError
from z4j_bare.home import HINT, is_private, private_directory, temporary_directories

#: Prefix of a store's file name.
#: It differs from ``buffer-``, the existing agent's prefix, because that agent has another schema.
PREFIX = "z4j-green-"
SUFFIX = ".sqlite"
#: Separates the original name of a renamed corrupt file from the time of the renaming.
CORRUPT_MARK = ".corrupt-"

#: Owner locks by the real path of the lock file.
#: A forked child keeps its parent's entries, so that the child cannot open the parent's store.
#: SQLite in the child would assume that the child holds the parent's record locks.
_held: dict[str, object] = {}


def new_store_path(buffer_path: str | os.PathLike[str]) -> Path:
    """Return an unused path for a new store in the directory of ``buffer_path``.

    Creates a missing directory. Raises ``LocalStorageError`` if the directory is not private.
    """
    directory = private_directory(absolute(buffer_path).parent)
    return directory / f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}{SUFFIX}"


def candidate_directories(buffer_path: str | os.PathLike[str]) -> list[Path]:
    """Return the possible directories of this user's stores, the configured directory first."""
    return [absolute(buffer_path).parent, *temporary_directories()]


def list_stores(directory: Path) -> list[Path]:
    """Return the stores in a private directory, least recently modified first."""
    if not is_private(directory):
        return []
    with os.scandir(directory) as entries:
        by_age = [(_modified_at(entry), entry.name) for entry in entries if _is_store(entry.name)]
    return [directory / name for _, name in sorted(by_age)]


def _is_store(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith(SUFFIX)


def _modified_at(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return 0.0


def quarantine(path: Path, now: float) -> None:
    """Rename a corrupt store to ``<name>.corrupt-<seconds>``; delete earlier corrupt stores."""
    main, log, index = store_files(path)
    for earlier in path.parent.glob(f"{PREFIX}*{CORRUPT_MARK}*"):
        remove(earlier)
    target = main.with_name(f"{main.name}{CORRUPT_MARK}{int(now)}")
    main.rename(target)
    if log.exists():
        log.rename(target.with_name(target.name + "-wal"))
    remove(index)


def create_file(path: Path) -> None:
    """Create an empty file with mode 0600; raise ``OSError`` if ``path`` exists, even as a link."""
    # SQLite creates the log and its index with the mode of this file.
    # Closing any descriptor of a file drops all record locks of the process on the file. Therefore
    # this function must run before SQLite opens the file.
    os.close(
        open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    )


def check_file(path: Path) -> None:
    """Raise ``LocalStorageError`` unless ``path`` is a regular file of mode 0600 of this user."""
    try:
        status = path.lstat()
    except OSError as error:
        raise LocalStorageError(f"cannot open the store {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise LocalStorageError(f"the store {path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise LocalStorageError(
            f"the store {path} belongs to uid {status.st_uid}, this process is uid {os.geteuid()}"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise LocalStorageError(
            f"the store {path} is accessible to others (mode {stat.S_IMODE(status.st_mode):04o})"
        )


def store_files(path: Path) -> tuple[Path, Path, Path]:
    """Return the paths of the main file, the write-ahead log and its index."""
    return path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def lock_path(path: Path) -> Path:
    """Return the path of a store's lock file, on which its owner holds a record lock."""
    return path.with_name(path.name + ".lock")


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it is missing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def remove(path: Path) -> None:
    """Delete ``path`` if it exists."""
    path.unlink(missing_ok=True)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path with ``~`` expanded, without resolving symbolic links.

    Raises ``LocalStorageError`` if there is no home or working directory.
    """
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no home directory, no working directory
        raise LocalStorageError(
            f"cannot resolve the buffer path {path}: {error}; {HINT}"
        ) from error


class OwnerLock:
    """Ownership of one store: a POSIX record lock on ``<store>.lock``.

    The constructor takes the lock without waiting, or raises ``LocalStorageError``.

    ``flock`` is not used, because forked children inherit such a lock and would keep the store of a
    dead owner locked. A record lock belongs to one process. Closing any descriptor of the lock file
    drops the lock, so no other code may open the file. A record lock does not exclude its own
    process, so ``_held`` prevents a second owner in the same process.
    """

    def __init__(self, path: Path) -> None:
        #: SQLite's connection or a mapped file, which must stay open while the lock exists.
        #: In a forked child, ``_held`` refers to the lock, so this object is not closed.
        self.pinned: object = None
        self._path = path
        self._name = os.path.realpath(path)
        if _held.setdefault(self._name, self) is not self:
            raise LocalStorageError(
                f"the store of {path} is open in this process or was open in its parent at the fork"
            )
        try:
            self._descriptor = _lock(path)
        except BaseException:
            del _held[self._name]
            raise

    @property
    def descriptor(self) -> int:
        """The open descriptor of the lock file."""
        return self._descriptor

    def release(self, *, delete: bool = False) -> None:
        """Release the lock, after deleting the lock file if ``delete`` is true.

        Idempotent. A forked child must not call this method.
        """
        if _held.get(self._name) is not self:
            return
        try:
            if delete:
                remove(self._path)
        finally:
            del _held[self._name]
            os.close(self._descriptor)


def is_owned(path: Path) -> bool:
    """Whether any process, including this process, holds the lock on the file ``path``.

    Tries to take the lock. Raises ``LocalStorageError`` if the lock file cannot be opened.
    """
    if os.path.realpath(path) in _held:  # a check would drop this process's own lock
        return True
    try:
        descriptor = open_file(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise LocalStorageError(
            f"cannot check {path} as uid {os.geteuid()}: {error.strerror}"
        ) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock(path: Path) -> int:
    try:
        descriptor = open_file(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalStorageError(
            f"cannot create {path} as uid {os.geteuid()}: {error.strerror}; "
            "set Z4J_HOME to a writable directory"
        ) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_same_file(path, descriptor):
            raise LocalStorageError(f"the store of {path} was just deleted by its owner")
    except OSError as error:
        os.close(descriptor)
        if error.errno not in {errno.EAGAIN, errno.EACCES}:
            # ENOLCK or EOPNOTSUPP: some network file systems have no record locks.
            raise LocalStorageError(
                f"cannot lock {path}, the file system has no record locks ({error.strerror}): "
                "move Z4J_HOME to a local file system"
            ) from error
        raise LocalStorageError(
            f"the store of {path} belongs to a running process: {error.strerror}"
        ) from error
    except LocalStorageError:
        os.close(descriptor)
        raise
    return descriptor


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Whether ``path`` names the open file. The file's previous owner may have just deleted it."""
    try:
        return os.fstat(descriptor).st_ino == path.lstat().st_ino
    except FileNotFoundError:
        return False
