"""Where a store lives, and who may look at it: a directory of ours alone (0700), files of ours alone (0600).

Task arguments pass through these files, and whoever may write the directory could put another file in their
place.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from z4j_bare.concurrency.fork import open_file
from z4j_bare.errors import LocalStorageError

#: Different from ``buffer-*.sqlite``, so that stores of the asyncio agent (another schema) are left alone.
PREFIX = "z4j-green-"
SUFFIX = ".sqlite"
#: What follows the name of a file that could not be read.
CORRUPT_MARK = ".corrupt-"

_HINT = "point Z4J_HOME at a private directory of that user"
_FOREIGN_WRITE = stat.S_IWGRP | stat.S_IWOTH


def new_store_path(buffer_path: str | os.PathLike[str]) -> Path:
    """Return an unused name for this process's store, in the directory of the configured ``buffer_path``.

    The directory is created (0700) or checked first; raises ``LocalStorageError`` when it is no private
    directory.
    """
    directory = private_directory(absolute(buffer_path).parent)
    return directory / f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}{SUFFIX}"


def private_directory(directory: Path) -> Path:
    """Return ``directory``, made if missing; raise ``LocalStorageError`` unless it is ours alone."""
    try:
        _make(directory)
        found = directory.lstat()
    except OSError as error:
        raise LocalStorageError(
            f"cannot make the buffer directory {directory} as uid {os.geteuid()}: {error.strerror}; {_HINT}"
        ) from error
    trouble = _problem(found)
    if trouble:
        raise LocalStorageError(
            f"the buffer directory {directory} {trouble}; this process runs as uid {os.geteuid()}: {_HINT}"
        )
    return directory


def _make(directory: Path) -> None:
    """Make ``directory`` and its missing parents, each 0700: ``mkdir`` leaves parents to the umask."""
    if os.path.lexists(directory):
        return
    _make(directory.parent)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:  # a sibling worker was faster
        pass


def _problem(found: os.stat_result) -> str:
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a directory"
    if found.st_uid != os.geteuid():
        return f"belongs to uid {found.st_uid}"
    if found.st_mode & _FOREIGN_WRITE:
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def candidate_directories(buffer_path: str | os.PathLike[str]) -> list[Path]:
    """Return the directories where stores of this user may lie: the configured one, then those it is replaced by."""
    name = f"z4j-{os.geteuid()}"
    temporary = dict.fromkeys(filter(None, (os.environ.get("TMPDIR"), "/tmp", "/var/tmp")))  # noqa: S108
    return [absolute(buffer_path).parent, *(absolute(base) / name for base in temporary)]


def is_private(directory: Path) -> bool:
    """Whether ``directory`` is there and ours alone."""
    try:
        return not _problem(directory.lstat())
    except OSError:
        return False


def list_stores(directory: Path) -> list[Path]:
    """Return the files in a private directory that bear the name of a store of ours, longest untouched first."""
    if not is_private(directory):
        return []
    with os.scandir(directory) as entries:
        found = [(_changed(entry), entry.name) for entry in entries if _is_store(entry.name)]
    return [directory / name for _, name in sorted(found)]


def _is_store(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith(SUFFIX)


def _changed(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return 0.0


def quarantine(path: Path, now: float) -> None:
    """Rename a corrupt store's file and log to ``<name>.corrupt-<seconds>``; the directory keeps one such store."""
    main, log, index = store_files(path)
    for earlier in path.parent.glob(f"{PREFIX}*{CORRUPT_MARK}*"):
        remove(earlier)
    aside = main.with_name(f"{main.name}{CORRUPT_MARK}{int(now)}")
    main.rename(aside)
    if log.exists():
        log.rename(aside.with_name(aside.name + "-wal"))
    remove(index)


def create_file(path: Path) -> None:
    """Create ``path`` empty, 0600; raise ``OSError`` if anything bears that name, be it a dangling link."""
    # SQLite gives its log and index the mode of this file. Closing any descriptor of a file drops the record
    # locks of this process on it, SQLite's included; hence this happens before SQLite opens it, and never
    # again.
    os.close(
        open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    )


def check_file(path: Path) -> None:
    """Raise ``LocalStorageError`` unless ``path`` is a regular file that only we can read and write."""
    try:
        found = path.lstat()
    except OSError as error:
        raise LocalStorageError(f"cannot open the store {path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise LocalStorageError(f"the store {path} is not a regular file")
    if found.st_uid != os.geteuid():
        raise LocalStorageError(
            f"the store {path} belongs to uid {found.st_uid}, this process is uid {os.geteuid()}"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise LocalStorageError(
            f"the store {path} is open to others (mode {stat.S_IMODE(found.st_mode):04o})"
        )


def store_files(path: Path) -> tuple[Path, Path, Path]:
    """Return the main file, the write-ahead log and its index."""
    return path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def lock_path(path: Path) -> Path:
    """Return the file whose record lock says that the store has a living owner."""
    return path.with_name(path.name + ".lock")


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def remove(path: Path) -> None:
    """Unlink ``path`` if it is there."""
    path.unlink(missing_ok=True)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Resolve ``~`` and the working directory, but no links; raise ``LocalStorageError`` if it cannot."""
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no home directory, no working directory
        raise LocalStorageError(
            f"cannot resolve the buffer path {path}: {error}; {_HINT}"
        ) from error
