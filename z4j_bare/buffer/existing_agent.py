"""Sends the events that remain in buffers of the existing agent (z4j-bare on the package index).

The layout of a buffer file is known from files that z4j-bare 1.13.0 wrote. A file contains frames
with whole events, and a digest of the project's key. A running process of that agent holds an
exclusive ``flock`` on its buffer file. A file with another layout is reported and not changed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from z4j_bare.buffer import files
from z4j_bare.buffer.errors import translate_errors
from z4j_bare.buffer.recovery import DONE, MOVED, WAIT
from z4j_bare.buffer.rows import EVENT, BufferEntry
from z4j_bare.buffer.schema import scalar, transaction
from z4j_bare.concurrency.fork import open_file
from z4j_bare.errors import LocalStorageError
from z4j_bare.home import is_private
from z4j_bare.wire.frames import encode_fields

if TYPE_CHECKING:
    from pathlib import Path

    from z4j_bare.buffer.store import BufferStore

PREFIX = "buffer-"

#: Kind of the rows that contain events. Rows of other kinds are not sent, because the deadlines of
#: command results have passed, and the next agent publishes the schedules again.
EVENT_KIND = "event_batch"

#: A file is not touched until this many seconds after its last change. The existing agent creates a
#: file before it locks the file, so an unlocked new file may belong to a running process.
MIN_AGE = 5.0

#: Maximum number of rows per step. Parsing and encoding 100 events takes 3 ms.
STEP_ROWS = 100

#: Number of characters of the key's digest in a file.
_DIGEST_CHARS = 16

#: Fields of an event whose values must be text.
_FIELDS = ("id", "kind", "engine", "task_id", "occurred_at")

_COUNTS = "SELECT coalesce(sum(kind = ?), 0), count(*), min(created_at) FROM entries"
_COUNT_EVENTS = "SELECT count(*) FROM entries WHERE kind = ?"
_READ = "SELECT id, payload, created_at FROM entries WHERE kind = ? AND id > ? ORDER BY id LIMIT ?"


class NoEventsError(LocalStorageError):
    """A buffer of the existing agent contains no event."""


@dataclass(frozen=True, slots=True)
class ExistingBufferReport:
    """A buffer of the existing agent at one moment.

    ``running`` says whether the process that owns the buffer runs. ``events`` is the number of rows
    with events, and ``others`` the number of other rows. ``oldest_age`` is in seconds. ``problem``
    says why this agent cannot send the events.
    """

    path: Path
    running: bool
    disk_bytes: int
    pid: int = 0
    events: int = 0
    others: int = 0
    oldest_age: float | None = None
    problem: str = ""

    @property
    def total(self) -> int:
        """Total number of rows."""
        return self.events + self.others


def is_existing_buffer(path: Path) -> bool:
    """Return whether a file has the name of a buffer of the existing agent."""
    return path.name.startswith(PREFIX) and path.name.endswith(files.SUFFIX)


def list_existing_buffers(buffer_path: str | os.PathLike[str]) -> list[Path]:
    """Return the buffers of the existing agent, including those of running processes."""
    found = []
    for directory in files.candidate_directories(buffer_path):
        if is_private(directory):
            found += sorted(path for path in directory.iterdir() if is_existing_buffer(path))
    return found


def key_digest(key: bytes) -> str:
    """Return the digest of a project's key that the existing agent stores in its files."""
    return sha256(key).hexdigest()[:_DIGEST_CHARS]


def read_existing_buffer(path: Path, digest: str | None = None) -> ExistingBufferReport:
    """Return the report on a buffer of the existing agent.

    :param digest: the digest of the project's key. Without the digest, the report does not say
        whether the file belongs to another project.
    """
    running, problem = False, ""
    size = sum(map(files.file_size, files.store_files(path)))
    try:
        lock = _FileLock(path, fcntl.LOCK_SH)
    except LocalStorageError as error:
        running = isinstance(error.__cause__, BlockingIOError)
        problem = "" if running else str(error)
    else:
        lock.release()
    if path.is_symlink() or not path.is_file():  # on a FIFO, SQLite would wait for a writer
        return ExistingBufferReport(path, running, size, problem=problem)
    mode = "mode=ro" if files.store_files(path)[2].exists() else "immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, timeout=0.1)) as database:
            problem = problem or _mismatch(database, digest)
            pid = database.execute("SELECT value FROM _meta WHERE key = 'owner_pid'").fetchone()
            events, rows, oldest = database.execute(_COUNTS, (EVENT_KIND,)).fetchone()
    except sqlite3.Error as error:
        return ExistingBufferReport(path, running, size, problem=problem or f"{_UNKNOWN}: {error}")
    return ExistingBufferReport(
        path,
        running,
        size,
        pid=int(pid[0]) if pid and str(pid[0]).isdigit() else 0,
        events=events,
        others=rows - events,
        oldest_age=None if oldest is None else max(0.0, time.time() - _seconds(oldest)),
        problem=problem,
    )


def delete_existing_buffer(path: Path) -> None:
    """Delete a buffer of the existing agent.

    Raises ``LocalStorageError`` if the process that owns the buffer runs.
    """
    lock = _FileLock(path, fcntl.LOCK_EX)
    try:
        with translate_errors(path, "delete"):
            for file in files.store_files(path):
                files.remove(file)
    finally:
        lock.release()


class ExistingBuffer:
    """A buffer that a dead process of the existing agent has left.

    The constructor locks the file. The constructor raises ``LocalStorageError`` if the process runs
    (``busy``), and if the file is not private, has another layout or belongs to another project.

    A step appends events to the target before it deletes their rows. If this process dies
    between the two actions, the events are sent twice. The brain recognises a repeated event by its
    id and time. When no row is left, the file is deleted.

    :param path: the file.
    :param digest: the digest of the project's key.
    :param max_target_rows: a step moves no rows while the target has at least this number of rows.
    """

    #: Empty, because the file is never renamed.
    quarantine_reason = ""

    def __init__(self, path: Path, digest: str, max_target_rows: int) -> None:
        self.path = path
        #: Number of events moved so far.
        self.moved = 0
        #: Number of rows with events that cannot be read. They stay in the file.
        self.unreadable = 0
        self._max_target_rows = max_target_rows
        #: Ids of rows whose events were copied to the target, but which are not deleted yet.
        self._pending: list[int] = []
        #: Id of the last row that was read. The next step reads the rows after it.
        self._last_id = 0
        if time.time() - _changed_at(path) < MIN_AGE:
            raise LocalStorageError(f"{path} was just changed") from BlockingIOError(
                errno.EAGAIN, "too new"
            )
        self._lock = _FileLock(path, fcntl.LOCK_EX)
        try:
            with translate_errors(path, "open"):
                self._database = sqlite3.connect(
                    f"{path.as_uri()}?mode=rw",
                    uri=True,
                    timeout=0.1,
                    isolation_level=None,
                    check_same_thread=False,  # another native thread may run the next call
                )
                self._check(digest)
        except BaseException:
            self.close()
            raise

    def rows_left(self) -> int:
        """Return the number of rows with events that are not deleted yet."""
        with translate_errors(self.path, "read"):
            return int(self._database.execute(_COUNT_EVENTS, (EVENT_KIND,)).fetchone()[0])

    def step(self, target: BufferStore) -> str:
        """Move some events to ``target``.

        Returns ``moved``, ``wait`` (the target is too full), or ``done`` (no more events can be
        moved). Raises ``LocalStorageError`` if either file fails. The method may be called again
        after an error. A repeated call does not move an event twice to the same target.
        """
        self._delete_pending()
        if target.size() >= self._max_target_rows:
            return WAIT
        with translate_errors(self.path, "read"):
            arguments = (EVENT_KIND, self._last_id, STEP_ROWS)
            rows = self._database.execute(_READ, arguments).fetchall()
        if not rows:
            self._finish()
            return DONE
        entries, ids = _entries(rows)
        target.import_rows(entries)
        self.moved += len(entries)
        self.unreadable += len(rows) - len(ids)
        self._last_id, self._pending = rows[-1][0], ids
        self._delete_pending()
        return MOVED

    def quarantine_if_corrupt(self, target: BufferStore) -> bool:  # noqa: ARG002
        """Return ``False``: the file stays as it is."""
        return False

    def close(self) -> None:
        """Close the file and release the lock. Idempotent."""
        database: sqlite3.Connection | None = getattr(self, "_database", None)
        try:
            if database is not None:
                database.close()
        finally:
            # The lock's descriptor is closed last: closing it drops SQLite's locks on the file.
            self._lock.release()

    def _check(self, digest: str) -> None:
        problem = _mismatch(self._database, digest)
        if problem:
            raise LocalStorageError(f"{self.path}: {problem}")
        if not self.rows_left():
            raise NoEventsError(f"{self.path} contains no event")

    def _delete_pending(self) -> None:
        if self._pending:
            with translate_errors(self.path, "write"), transaction(self._database):
                ids = [(identity,) for identity in self._pending]
                self._database.executemany("DELETE FROM entries WHERE id = ?", ids)
            self._pending = []

    def _finish(self) -> None:
        """Delete the file if it has no rows."""
        with translate_errors(self.path, "delete"):
            empty = not scalar(self._database, "SELECT count(*) FROM entries")
            self._database.close()
            for file in files.store_files(self.path) if empty else ():
                files.remove(file)


class _FileLock:
    """The kind of ``flock`` that a running process of the existing agent holds on its buffer.

    :param mode: ``LOCK_EX`` or ``LOCK_SH``.
    :raises LocalStorageError: the process runs, or the file is not a private file of this user.
    """

    def __init__(self, path: Path, mode: int) -> None:
        try:
            # Without O_NONBLOCK, open() would wait for a writer if the file is a FIFO.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor: int | None = open_file(path, flags)
        except OSError as error:
            raise LocalStorageError(f"cannot open {path}: {error.strerror}") from error
        try:
            self._acquire(path, mode)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a copy in a forked child would keep the lock
            os.close(descriptor)

    def _acquire(self, path: Path, mode: int) -> None:
        descriptor = self._descriptor or 0
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise LocalStorageError(f"{path} is not a regular file of uid {os.geteuid()}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise LocalStorageError(f"{path} is writable by others")
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except OSError as error:
            raise LocalStorageError(f"{path} belongs to a running process: {error}") from error


#: The problem of a file with an unknown layout.
_UNKNOWN = "the layout is unknown; only the agent that wrote it can send its events"


def _mismatch(database: sqlite3.Connection, digest: str | None) -> str:
    """Return why the events in a file cannot be sent; empty if they can."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(entries)")}
    meta = dict(database.execute("SELECT key, value FROM _meta"))
    if not columns >= {"id", "kind", "payload", "created_at"} or not meta.get("deployment"):
        return _UNKNOWN
    if digest is not None and meta["deployment"] != digest:
        return "it belongs to a project with another key"
    return ""


def _entries(rows: list[tuple[int, bytes, float]]) -> tuple[list[BufferEntry], list[int]]:
    """Return the events of rows, and the ids of the rows. A row that cannot be read is left out.

    All events get the time of the first row, so that the store can keep them in one batch.
    """
    entries: list[BufferEntry] = []
    at, ids = _seconds(rows[0][2]), []
    for identity, payload, _ in rows:
        try:
            events = list(_events(payload))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        entries += [BufferEntry(0, EVENT, "", event, at, 0) for event in events]
        ids.append(identity)
    return entries, ids


def _seconds(value: object) -> float:
    """Return a time from a file in seconds since the epoch; now, if the value is not a number."""
    return float(value) if isinstance(value, int | float) else time.time()


def _events(payload: bytes) -> Iterator[bytes]:
    for event in json.loads(payload)["payload"]["events"]:
        if not all(isinstance(event[name], str) for name in _FIELDS):
            raise TypeError("an identifying field is not text")
        yield encode_fields(event, trusted=True)


def _changed_at(path: Path) -> float:
    """Return when the file or its WAL was changed last, in seconds since the epoch."""
    times = [0.0]
    for file in files.store_files(path)[:2]:
        with suppress(FileNotFoundError):
            times.append(file.stat().st_mtime)
    return max(times)
