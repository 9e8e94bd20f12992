"""Stores an operator's changes to schedules that are defined in code (huey, arq, taskiq)."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sqlite3
import stat
from _thread import RLock
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

from z4j_core.models import Schedule
from z4j_core.schedule_external import external_schedule_configuration, normalize_external_schedule
from zope.interface import implementer

from z4j_bare.concurrency.fork import ForkGuard, open_file
from z4j_bare.errors import ScheduleConflictError, ScheduleNotFoundError
from z4j_bare.interfaces import INativeSchedules
from z4j_bare.native_schedules.overrides import EDITABLE, Fields, Override, changes, decode, key_of
from z4j_bare.native_schedules.refusals import Refusals

logger = logging.getLogger("z4j.runtime.native_schedules")

#: SQLite ``application_id`` of the file.
APPLICATION_ID = 1513376334

#: SQLite ``user_version`` of the file: the version of its format.
VERSION = 1

#: Maximum size of one row, in bytes.
MAX_RECORD_BYTES = 1024 * 1024

#: Maximum size of all rows together, in bytes.
MAX_TOTAL_BYTES = 64 * 1024 * 1024

#: Maximum number of rows.
MAX_RECORDS = 10_000

#: Maximum seconds to wait while another process changes the file.
BUSY_TIMEOUT = 5.0

#: Mode bits that must not be set, because the file contains arguments of tasks.
_GROUP_AND_OTHERS = stat.S_IRWXG | stat.S_IRWXO

#: Guards every access to the file. The lock is unpatched, because no greenlet may run while the
#: fork hook waits. It is reentrant, because ``validate`` may call ``resolve``.
_fork_guard = ForkGuard(RLock)

_TABLES = {
    "identity": "CREATE TABLE IF NOT EXISTS identity (owner TEXT PRIMARY KEY)",
    "overrides": "CREATE TABLE IF NOT EXISTS overrides (key TEXT PRIMARY KEY, body TEXT NOT NULL)",
}

#: What an operator can do about an error of SQLite, by its primary result code.
_CURES = {
    **dict.fromkeys(
        (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB),
        "the file is damaged: restore it from a backup, or delete it, which undoes all changes "
        "that operators made to schedules",
    ),
    **dict.fromkeys(
        (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
        "give the user of this process write access to the file and to its directory",
    ),
    **dict.fromkeys(
        (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED),
        f"another process has locked the file for more than {BUSY_TIMEOUT:g} s: try again",
    ),
    sqlite3.SQLITE_FULL: "free disk space",
}

#: Reads all rows as BLOB, because Python's sqlite3 module cannot read TEXT that is not UTF-8.
_READ = "SELECT CAST(key AS BLOB), CAST(body AS BLOB) FROM overrides ORDER BY rowid"


@implementer(INativeSchedules)
class NativeScheduleControl:
    """Stores the changes of one scheduler's schedules in an SQLite file.

    Pass ``control=NativeScheduleControl(path)`` to the scheduler adapter. The file stores the
    changes that an operator makes in the dashboard. The changes are merged into the schedules of
    the code each time the scheduler reads the schedules. Only fields that differ from the code are
    stored, so every other field follows the code. The file has the format of z4j 1.13.

    A row is logged once and ignored if it cannot be read, or if the adapter refuses its schedule,
    for example because the schedule's task is no longer in code.

    Any thread may use the object, and any process may use the file, because each call opens a
    connection. The constructor and every method raise ``sqlite3.Error`` or ``OSError`` if the file
    is damaged or the disk fails.

    :param path: path of the file. A missing file is created with mode 0600.
    :raises ValueError: other users may access the file, or it is not a schedule file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self._reported: set[tuple[str, str]] = set()
        self._refusals = Refusals()
        self._create()
        with self._connected():
            pass

    def resolve(self, baseline: list[Schedule], *, owner: str) -> list[Schedule]:
        """Return the effective schedules: ``baseline`` with the stored changes applied.

        :param baseline: the schedules that are defined in code.
        :param owner: the scheduler's name.
        :raises ValueError: the file belongs to another scheduler.
        """
        frame = inspect.currentframe()
        self._refusals.learn(self, owner, frame and frame.f_back)
        with self._connected() as connection:
            _check_owner(connection, owner)
            stored = _StoredSchedules(connection, baseline, owner, self._refusals)
            if stored.rows_to_migrate():
                _try_migrate(connection, baseline, owner)
        self._report(stored.problems, stored.effective)
        return list(stored.effective.values())

    def mutate(
        self,
        *,
        owner: str,
        operation: str,
        schedule_id: str | None,
        expected: dict[str, Any] | None,
        definition: dict[str, Any],
        baseline: list[Schedule],
        validate: Callable[[Schedule], None],
        engine: str,
    ) -> Schedule | None:
        """Commit one change and return the changed schedule, ``None`` after a deletion.

        An error leaves the file unchanged. Raises every exception of ``validate``.

        :param owner: the scheduler's name.
        :param operation: ``create``, ``update`` or ``delete``.
        :param schedule_id: the schedule to update or delete, ``None`` for ``create``.
        :param expected: the schedule that the operator saw, ``None`` for ``create``.
        :param definition: new values of the fields in :data:`EDITABLE`.
        :param baseline: the schedules that are defined in code.
        :param validate: called with the new schedule before it is stored.
        :param engine: the engine of a created schedule.
        :raises ScheduleConflictError: the schedule differs from ``expected``, or its name is taken.
        :raises ScheduleNotFoundError: there is no such schedule.
        :raises ValueError: the change is not possible. The two other exceptions are subclasses.
        """
        _check(operation, schedule_id, expected, definition)
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            _claim(connection, owner)
            stored = _StoredSchedules(connection, baseline, owner, self._refusals)
            before: Schedule | None = None
            after: Schedule | None = None
            if schedule_id is not None:
                before = _require_unchanged(stored.effective, schedule_id, expected, owner)
            if operation == "delete":
                key, override = stored.deleted(schedule_id or "")
            else:
                fields = _definition(before, definition, baseline, owner=owner, engine=engine)
                key, override, after = stored.changed(fields)
                _reject_duplicate_name(after, stored.effective.values())
                validate(after)
                stored.delete_refused(after.name)
            stored.migrate()
            _write(connection, key, override)
            _check_limits(connection)
            connection.execute("COMMIT")
        self._report(stored.problems, stored.effective)
        return after

    def _create(self) -> None:
        """Create a missing file with mode 0600, so that no other user can ever read it."""
        try:
            os.close(open_file(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            status = self.path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{self.path} is not a regular file") from None
            if os.name == "posix" and status.st_mode & _GROUP_AND_OTHERS:
                raise ValueError(
                    f"{self.path} can be read or written by others: run chmod 600 {self.path}"
                ) from None

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with (
            _fork_guard.held(),
            closing(
                sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
            ) as connection,
        ):
            try:
                _prepare(connection, self.path)
                yield connection
            except sqlite3.Error as error:
                raise _explained(error, self.path) from error
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _report(self, problems: Iterable[tuple[str, str]], effective: Collection[str]) -> None:
        """Log each problem of a row once; log when a row without problems is effective again.

        Must be called without the fork guard, because a log handler may wait for a lock of the hub.
        """
        present = set(problems)
        for key in {key for key, _ in self._reported} - {key for key, _ in present}:
            self._reported = {each for each in self._reported if each[0] != key}
            if key in effective:
                logger.warning("z4j: %s: schedule %r has an effect again", self.path, key)
        for key, problem in problems:
            if (key, problem) not in self._reported:
                self._reported.add((key, problem))
                logger.warning("z4j: %s: %s", self.path, problem)


class _StoredSchedules:
    """The rows of the file, merged with the schedules in code."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        baseline: list[Schedule],
        owner: str,
        refusals: Refusals,
    ) -> None:
        self._connection = connection
        self._owner = owner
        self._refusals = refusals
        self._baseline = {key_of(each): each for each in baseline}
        #: The effective schedules by key.
        self.effective = dict(self._baseline)
        #: Key and problem of each row that is ignored as a whole or in part.
        self.problems: list[tuple[str, str]] = []
        self._refused: dict[str, Schedule] = {}
        self._overrides = dict(self._read())

    def _read(self) -> Iterator[tuple[str, Override]]:
        for raw, body in self._connection.execute(_READ).fetchall():
            key = raw.decode(errors="backslashreplace")
            base = self._baseline.get(key)
            try:
                override = decode(body, key, base, self._owner)
                if override.is_effective(base):
                    self._add(key, override.apply(base, key, self._owner))
                else:
                    self.effective.pop(key, None)
            except (ValueError, RecursionError) as error:
                problem = f"cannot be read and is ignored: {_describe(error):.200}"
                self._add_problem(key, problem, "change" if base else "create")
                continue
            if override.ignored:
                names = ", ".join(override.ignored)
                problem = f"has unknown fields, which are ignored: {names:.200}"
                self._add_problem(key, problem, "change")
            yield key, override

    def _add(self, key: str, schedule: Schedule) -> None:
        """Make a changed or created schedule effective, unless the adapter refuses it."""
        error = self._refusals.reason(schedule)
        if error is None:
            self.effective[key] = schedule
            return
        self._refused[key] = schedule
        reason = f"because {self._owner} refuses it: {_describe(error):.200}"
        if key in self._baseline:
            self._add_problem(key, f"has no effect, {reason}", "change")
        else:
            problem = (
                f"schedule {schedule.name!r} ({key}) of task {schedule.task_name!r} has no effect, "
                f"{reason}; define the task again, or create the schedule with the same name and "
                "another task in the dashboard"
            )
            self.problems.append((key, problem))

    def _add_problem(self, key: str, problem: str, cure: str) -> None:
        row = f"the stored change of schedule {key!r}"
        self.problems.append((key, f"{row} {problem}; {cure} the schedule again in the dashboard"))

    def rows_to_migrate(self) -> bool:
        """Return whether an earlier release of this package has written some of the rows."""
        return any(override.migrate for override in self._overrides.values())

    def migrate(self) -> None:
        """Rewrite the rows of earlier releases, in the caller's transaction."""
        for key, override in self._overrides.items():
            if override.migrate:
                empty = not (override.patch or override.created or override.deleted)
                _write(self._connection, key, None if empty else override)

    def delete_refused(self, name: str) -> None:
        """Delete the created schedules with this name that the adapter refuses.

        They would be effective again, beside the new schedule, as soon as the adapter accepts them.
        """
        for key, schedule in self._refused.items():
            if schedule.name == name and key not in self._baseline:
                _write(self._connection, key, None)
                del self._overrides[key]

    def deleted(self, key: str) -> tuple[str, Override | None]:
        """Return key and override of a deletion. A schedule that is not in code leaves no row."""
        return key, Override(deleted=True) if key in self._baseline else None

    def changed(self, fields: Fields) -> tuple[str, Override | None, Schedule]:
        """Return key, override and effective schedule of new or changed fields.

        :raises ValueError: the schedule is invalid.
        """
        schedule = Schedule.model_validate_json(json.dumps(fields))
        key, fields = key_of(schedule), schedule.model_dump(mode="json")
        base = self._baseline.get(key)
        if base is None:
            override = Override(created=fields)
        else:
            override = Override(patch=changes(base.model_dump(mode="json"), fields))
            if not override.patch:
                return key, None, base
        return key, override, override.apply(base, key, self._owner)


def _describe(error: Exception) -> str:
    """Return an error on one line. Omits the arguments of tasks, which pydantic's text contains."""
    if not hasattr(error, "errors"):
        return " ".join(str(error).split())
    problems = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in problems)


def _try_migrate(connection: sqlite3.Connection, baseline: list[Schedule], owner: str) -> None:
    """Rewrite the rows of earlier releases, unless the file is locked or read-only.

    The file is locked if ``resolve`` runs inside ``validate``, because the transaction of
    ``mutate`` is still open then.
    """
    connection.execute("PRAGMA busy_timeout = 0")
    with suppress(sqlite3.OperationalError):
        connection.execute("BEGIN IMMEDIATE")
        _StoredSchedules(connection, baseline, owner, Refusals()).migrate()
        connection.execute("COMMIT")


def _write(connection: sqlite3.Connection, key: str, override: Override | None) -> None:
    """Store an override, or delete it if ``override`` is ``None``."""
    if override is None:
        connection.execute("DELETE FROM overrides WHERE key = ?", (key,))
    else:
        row = key, override.encode()
        connection.execute("INSERT OR REPLACE INTO overrides VALUES (?, ?)", row)


def _check_limits(connection: sqlite3.Connection) -> None:
    length = "length(CAST(body AS BLOB))"
    number, size, largest = connection.execute(
        f"SELECT count(*), total({length}), coalesce(max({length}), 0) FROM overrides"  # noqa: S608
    ).fetchone()
    if largest > MAX_RECORD_BYTES:
        raise ValueError(
            f"the changed schedule takes {largest} bytes, over the limit of {MAX_RECORD_BYTES}"
        )
    if number > MAX_RECORDS or size > MAX_TOTAL_BYTES:
        raise ValueError(
            f"{number} changed schedules of {size:.0f} bytes are over the limit of {MAX_RECORDS} "
            f"schedules or {MAX_TOTAL_BYTES} bytes"
        )


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Create the missing tables, or raise ``ValueError`` if the file is not a schedule file.

    Tables are missing if a process of z4j 1.13 was killed when it first used the file.
    """
    if _header(connection) == (0, 0) or not _has_tables(connection):
        connection.execute("BEGIN IMMEDIATE")
        if _header(connection) == (0, 0) and not _tables(connection):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        if _header(connection) == (APPLICATION_ID, VERSION):
            for table in _TABLES.values():
                connection.execute(table)
        connection.execute("COMMIT")
    if _header(connection) != (APPLICATION_ID, VERSION):
        raise ValueError(f"{path} is not a schedule file of version {VERSION}: choose another path")


def _has_tables(connection: sqlite3.Connection) -> bool:
    return _tables(connection) >= _TABLES.keys()


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}


def _explained(error: sqlite3.Error, path: Path) -> sqlite3.Error:
    """Return the error with the path of the file, and what an operator can do about it."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF  # the primary result code
    cure = _CURES.get(code, "check the file and its directory")
    return type(error)(f"schedule file {path}: {error}; {cure}")


def _header(connection: sqlite3.Connection) -> tuple[int, int]:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    return application, connection.execute("PRAGMA user_version").fetchone()[0]


def _check_owner(connection: sqlite3.Connection, owner: str) -> None:
    """Raise ``ValueError`` if the file belongs to another scheduler."""
    row = connection.execute("SELECT owner FROM identity").fetchone()
    if row is not None and row[0] != owner:
        raise ValueError(f"the file holds schedules of {row[0]}, not of {owner}")


def _claim(connection: sqlite3.Connection, owner: str) -> None:
    _check_owner(connection, owner)
    connection.execute("INSERT OR IGNORE INTO identity VALUES (?)", (owner,))


def _check(
    operation: str, schedule_id: str | None, expected: object, definition: dict[str, Any]
) -> None:
    if operation not in {"create", "update", "delete"}:
        raise ValueError(f"{operation} is not an operation on a schedule")
    if (operation == "create") != (schedule_id is None) or (operation == "create") != (
        expected is None
    ):
        raise ValueError(
            "schedule_id and expected are required for update and delete, not allowed for create"
        )
    unknown = sorted(set(definition) - EDITABLE)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be changed")
    if operation == "delete" and definition:
        raise ValueError("delete takes no definition")


def _require_unchanged(
    current: dict[str, Schedule], schedule_id: str, expected: dict[str, Any] | None, owner: str
) -> Schedule:
    schedule = current.get(schedule_id)
    if schedule is None:
        raise ScheduleNotFoundError(f"schedule {schedule_id!r} does not exist")
    present = normalize_external_schedule(schedule.model_dump(mode="json"), owner=owner)
    if external_schedule_configuration(present) != external_schedule_configuration(expected or {}):
        raise ScheduleConflictError(
            f"schedule {schedule_id!r} was changed in the meantime; reload it and try again"
        )
    return schedule


def _definition(
    before: Schedule | None,
    definition: dict[str, Any],
    baseline: list[Schedule],
    *,
    owner: str,
    engine: str,
) -> Fields:
    """Return the fields of the changed schedule, or of a new schedule."""
    now = datetime.now(UTC).isoformat()
    if before is not None:
        return {**before.model_dump(mode="json"), **definition, "updated_at": now}
    identity = f"managed:{uuid4()}"
    project = baseline[0].project_id if baseline else uuid4()
    return {
        "id": str(uuid5(NAMESPACE_URL, identity)),
        "project_id": str(project),
        "engine": engine,
        "scheduler": owner,
        "external_id": identity,
        "created_at": now,
        **definition,
        "updated_at": now,
    }


def _reject_duplicate_name(schedule: Schedule, others: Iterable[Schedule]) -> None:
    """Raise ``ScheduleConflictError`` if another schedule has the same name."""
    if any(other.name == schedule.name and key_of(other) != key_of(schedule) for other in others):
        raise ScheduleConflictError(f"a schedule named {schedule.name!r} already exists")
