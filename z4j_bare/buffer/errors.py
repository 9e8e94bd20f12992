"""Translates SQLite and file system errors to ``LocalStorageError`` and finds their causes."""

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

#: Causes of a ``LocalStorageError``, as :func:`classify` returns them.
BUSY = "busy"
FULL = "full"
CORRUPT = "corrupt"
READ_ONLY = "read-only"
DELETED = "gone"
OTHER = "other"

#: Causes by SQLite's primary result code.
_BY_PRIMARY_CODE = {
    sqlite3.SQLITE_BUSY: BUSY,
    sqlite3.SQLITE_LOCKED: BUSY,
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_CORRUPT: CORRUPT,
    sqlite3.SQLITE_NOTADB: CORRUPT,
    sqlite3.SQLITE_READONLY: READ_ONLY,
}
#: Causes by SQLite's extended result code, for errors whose primary code is ``SQLITE_IOERR``.
_BY_EXTENDED_CODE = {
    # SQLite's code for EFBIG (size limit) and EDQUOT (quota). SQLite reports ENOSPC as SQLITE_FULL.
    sqlite3.SQLITE_IOERR_WRITE: FULL,
    # The file was truncated: pages are missing at its end.
    sqlite3.SQLITE_IOERR_SHORT_READ: CORRUPT,
}
#: Causes by the error number of an ``OSError``.
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
    """Return the cause of an error: ``BUSY``, ``FULL`` or another constant of this module."""
    cause = error.__cause__
    if isinstance(cause, sqlite3.Error):
        # An error raised by Python's sqlite3 module itself has no SQLite result code.
        code = getattr(cause, "sqlite_errorcode", None)
        if code is None:
            return OTHER
        return _BY_EXTENDED_CODE.get(code) or _BY_PRIMARY_CODE.get(code & 0xFF, OTHER)
    if isinstance(cause, OSError):
        return _BY_ERRNO.get(cause.errno or 0, OTHER)
    return OTHER


@contextmanager
def translate_errors(path: Path, operation: str) -> Iterator[None]:
    """Translate SQLite and file system errors of the block to ``LocalStorageError``."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise LocalStorageError(f"cannot {operation} the store {path}: {error}") from error


def storage_call(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Decorate a method of a store: check that the store is open, and translate errors."""
    operation = f"run {method.__name__} on"

    @functools.wraps(method)
    def call(store: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        store.check()
        with translate_errors(store.path, operation):
            return method(store, *args, **kwargs)

    return call
