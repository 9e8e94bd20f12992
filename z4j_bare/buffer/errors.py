"""The one border where errors of SQLite and of the file system become ``LocalStorageError``."""

from __future__ import annotations

import errno
import functools
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BUSY = "busy"
FULL = "full"
CORRUPT = "corrupt"
READ_ONLY = "read-only"
DELETED = "gone"
OTHER = "other"

_BY_SQLITE = {
    sqlite3.SQLITE_BUSY: BUSY,
    sqlite3.SQLITE_LOCKED: BUSY,
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_CORRUPT: CORRUPT,
    sqlite3.SQLITE_NOTADB: CORRUPT,
    sqlite3.SQLITE_READONLY: READ_ONLY,
}
#: Extended codes that say more than their family, "I/O error".
_BY_DETAIL = {
    sqlite3.SQLITE_IOERR_WRITE: FULL,  # a write that failed, but not of ENOSPC: EFBIG (a size limit), EDQUOT (a quota)
    sqlite3.SQLITE_IOERR_SHORT_READ: CORRUPT,  # the file ends before its last page
}
_BY_ERRNO = {
    errno.EAGAIN: BUSY,
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EROFS: READ_ONLY,
    errno.EACCES: READ_ONLY,
    errno.ENOENT: DELETED,
}


class _Checked(Protocol):
    path: Path

    def check(self) -> None: ...


_P = ParamSpec("_P")
_S = TypeVar("_S", bound=_Checked)
_T = TypeVar("_T")


def classify(error: LocalStorageError) -> str:
    """Sort an error by its remedy: ``busy`` (soon again), ``full``, ``corrupt``, ``read-only``, ``gone``, ``other``."""
    cause = error.__cause__
    if isinstance(cause, sqlite3.Error):
        code = getattr(
            cause, "sqlite_errorcode", None
        )  # absent on errors of the sqlite3 module itself
        return OTHER if code is None else _BY_DETAIL.get(code) or _BY_SQLITE.get(code & 0xFF, OTHER)
    if isinstance(cause, OSError):
        return _BY_ERRNO.get(cause.errno or 0, OTHER)
    return OTHER


@contextmanager
def translate_errors(path: Path, doing: str) -> Iterator[None]:
    """Raise what the block throws at us as ``LocalStorageError`` that names the file."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise LocalStorageError(f"cannot {doing} the store {path}: {error}") from error


def storage_call(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Wrap a store's public method: check that the store is usable, translate its errors."""

    @functools.wraps(method)
    def call(store: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        store.check()
        with translate_errors(store.path, method.__name__):
            return method(store, *args, **kwargs)

    return call
