"""Determines the directory of the agents' state, ``Z4J_HOME``, and replaces it if it is unusable.

``z4j_home()`` of z4j_core raises ``RuntimeError`` for a user with neither HOME nor an entry in the
password database, and does not check whether the directory can be written. Therefore every module
of this package gets the directory from this module. A replacement is exported as ``Z4J_HOME``, so
that z4j_core, adapters and child processes use it too.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from z4j_core.paths import z4j_home

from z4j_bare.errors import LocalStorageError

#: The values that determine the result of :func:`settle_home`: Z4J_HOME, HOME and user.
_Key = tuple[str | None, str | None, int]

#: Maximum bytes of the path of a state directory. SQLite opens no file whose path has more than 511
#: bytes, and the names of the files take up to 60.
MAX_PATH_BYTES = 440

#: Temporary directories of all users. They are tried after ``TMPDIR``.
SHARED_TEMPORARY_DIRECTORIES = ("/tmp", "/var/tmp")  # noqa: S108

#: What to do if a directory is unusable.
HINT = "set Z4J_HOME to a private directory of that user"
_EFFECTIVE = os.access in os.supports_effective_ids
_FOREIGN_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Replacement:
    """A directory that is used instead of the configured directory.

    :param directory: the directory that is used.
    :param configured: the configured directory; ``None`` if the user has no home directory.
    :param notice: the reason and what to do, for the operator.
    """

    directory: Path
    configured: Path | None
    notice: str


_replacement: Replacement | None = None
_noticed = False

#: The key and the last result of ``settle_home``. A directory that becomes unusable later is not
#: replaced, because the agent's control socket is in that directory.
_settled: tuple[_Key, Path] | None = None


def settle_home(*, create: bool = True) -> Path:
    """Determine the state directory, and set ``Z4J_HOME`` if the configured one is unusable.

    The configured directory is not created. It is unusable if this user can neither write to it
    nor create it. Its replacement is ``z4j-<uid>`` in a temporary directory. If no directory can be
    written, the configured directory is returned. Never raises.

    :param create: create the replacement if it is missing.
    """
    global _settled
    if _settled is not None and _settled[0] == _key():
        return _settled[1]
    configured, problem = _configured()
    if configured is not None and not problem:
        _export_if_relative(configured)
        _settled = _key(), configured
        return configured
    for directory in _usable_replacements(create):
        _replace(configured, problem, directory)
        _settled = _key(), directory
        return directory
    if configured is None:
        configured = next(replacements())
        os.environ["Z4J_HOME"] = str(configured)
    return configured


def ensure_home(*, create: bool = True) -> Path:
    """Return the state directory; create it with mode 0700 if it is missing. Raises ``OSError``."""
    home = settle_home(create=create)
    create_directory(home)
    return home


def settle_home_of_user() -> None:
    """Set ``Z4J_HOME`` if z4j_core cannot determine a home directory.

    This function is called at import, because some adapters call z4j_core before they call this
    package. It makes no system call if HOME is set, or if Z4J_HOME is a path without ``~``.
    """
    if "HOME" not in os.environ and os.environ.get("Z4J_HOME", "~")[:1] in ("~", ""):
        settle_home()


def replacement() -> Replacement | None:
    """Return the replacement of the configured directory, if it is in use."""
    current = _replacement
    if current is None or os.environ.get("Z4J_HOME") != str(current.directory):
        return None
    return current


def take_notice() -> str:
    """Return the notice about the replacement; ``""`` without a replacement and after a first call.

    A forked child does not return the notice that its parent has returned.
    """
    global _noticed
    current = replacement()
    if current is None or _noticed:
        return ""
    _noticed = True
    return current.notice


def move_from_replaced(path: Path) -> Path:
    """Return ``path``, moved to the replacement if the directory of ``path`` was replaced."""
    current = replacement()
    if current is not None and path.parent == current.configured:
        return current.directory / path.name
    return path


def replacements() -> Iterator[Path]:
    """Yield the directories of this user in temporary directories.

    Predictable names come first. Random names follow, in case another user occupies the predictable
    names.
    """
    predictable = temporary_directories()
    yield from predictable
    yield from (path.with_name(f"{path.name}-{os.urandom(8).hex()}") for path in predictable)


def temporary_directories() -> list[Path]:
    """Return the predictable names of this user's directories in temporary directories."""
    every = (os.environ.get("TMPDIR"), *SHARED_TEMPORARY_DIRECTORIES)
    bases = dict.fromkeys(filter(None, every))
    return [Path(base).absolute() / f"z4j-{os.geteuid()}" for base in bases]


def private_directory(directory: Path) -> Path:
    """Return ``directory``, created if it was missing.

    Raises ``LocalStorageError`` if ``directory`` cannot be created, is not a directory, is a
    symbolic link, belongs to another user or is writable by others.
    """
    try:
        create_directory(directory)
        status = directory.lstat()
    except OSError as error:
        raise LocalStorageError(
            f"cannot create the buffer directory {directory} as uid {os.geteuid()}: "
            f"{error.strerror}; {HINT}"
        ) from error
    problem = _problem(status)
    if problem:
        raise LocalStorageError(
            f"the buffer directory {directory} {problem}; "
            f"this process runs as uid {os.geteuid()}: {HINT}"
        )
    return directory


def is_private(directory: Path) -> bool:
    """Whether ``directory`` exists and is private."""
    try:
        return not _problem(directory.lstat())
    except OSError:
        return False


def create_directory(directory: Path) -> None:
    """Create ``directory`` and its missing parents with mode 0700. Raises ``OSError``.

    ``mkdir(parents=True)`` is not used, because it ignores ``mode`` for the parents.
    """
    if os.path.lexists(directory):
        return
    create_directory(directory.parent)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:  # another process has created it
        pass


def _key() -> _Key:
    return os.environ.get("Z4J_HOME"), os.environ.get("HOME"), os.geteuid()


def _configured() -> tuple[Path | None, str]:
    """Return the configured directory, and the reason if it is unusable."""
    uid, variable = os.geteuid(), os.environ.get("Z4J_HOME")
    try:
        home = z4j_home()
    except RuntimeError as error:
        if variable:
            return None, f"Z4J_HOME={variable} cannot be resolved for uid {uid} ({error})"
        if os.environ.get("HOME"):  # a loop of symbolic links
            return None, f"HOME={os.environ['HOME']} cannot be resolved for uid {uid} ({error})"
        return None, (
            f"Z4J_HOME is not set, and uid {uid} has no home directory (neither HOME nor an entry "
            "in the password database)"
        )
    too_long = len(os.fsencode(home)) > MAX_PATH_BYTES
    obstacle = os.strerror(errno.ENAMETOOLONG) if too_long else _obstacle(home)
    if not obstacle:
        return home, ""
    return home, f"uid {uid} cannot write to {'Z4J_HOME=' if variable else ''}{home} ({obstacle})"


def _export_if_relative(home: Path) -> None:
    """Set ``Z4J_HOME`` to the absolute path if the setting is relative.

    A relative path would name another directory after a change of the working directory, or in a
    child that starts in another one.
    """
    # pathlib would raise RuntimeError for the home of an unknown user.
    path = os.environ.get("Z4J_HOME") or "~"
    if not os.path.isabs(os.path.expanduser(path)):  # noqa: PTH111, PTH117
        os.environ["Z4J_HOME"] = str(home)


def _replace(configured: Path | None, problem: str, directory: Path) -> None:
    global _replacement
    notice = (
        f"{problem}: the agent keeps its buffer and its control socket in {directory}. Set "
        "Z4J_HOME to a private directory of this user outside the temporary directory; unsent "
        "events are lost if the temporary directory is deleted"
    )
    _replacement = Replacement(directory, configured, notice)
    os.environ["Z4J_HOME"] = str(directory)


def _usable_replacements(create: bool) -> Iterator[Path]:
    for directory in replacements():
        if not create and not is_private(directory):
            continue
        try:
            private_directory(directory)
        except LocalStorageError:
            continue
        if not _obstacle(directory):
            yield directory


def _obstacle(directory: Path) -> str:
    """Return why this user cannot write to ``directory`` or create it; ``""`` if the user can."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return _obstacle(directory.parent)
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(status.st_mode):
        return os.strerror(errno.ENOTDIR)
    if os.access(directory, os.W_OK | os.X_OK, effective_ids=_EFFECTIVE):
        return ""
    read_only = os.statvfs(directory).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if read_only else errno.EACCES)


def _problem(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a directory"
    if status.st_uid != os.geteuid():
        return f"belongs to uid {status.st_uid}"
    if status.st_mode & _FOREIGN_WRITE:
        return f"is writable by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""
