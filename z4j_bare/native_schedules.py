"""Stores an operator's changes to schedules that are defined in code (huey, arq, taskiq)."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from _thread import RLock
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

from z4j_core.errors import ConflictError, NotFoundError
from z4j_core.models import Schedule
from z4j_core.schedule_external import (
    canonical_external_json,
    external_schedule_configuration,
    normalize_external_schedule,
)
from zope.interface import implementer

from z4j_bare.concurrency.fork import ForkGuard, open_file
from z4j_bare.interfaces import INativeSchedules

#: SQLite ``application_id`` of the file.
APPLICATION_ID = 1513376334

#: SQLite ``user_version`` of the file: the version of its format.
VERSION = 1

#: Fields of a schedule that an operator can change.
EDITABLE = frozenset(
    {"name", "task_name", "kind", "expression", "timezone", "queue", "args", "kwargs", "is_enabled"}
)

#: Maximum size of one changed schedule, in bytes.
MAX_RECORD_BYTES = 1024 * 1024

#: Maximum size of all changed schedules together, in bytes.
MAX_TOTAL_BYTES = 64 * 1024 * 1024

#: Maximum number of changed schedules.
MAX_RECORDS = 10_000

#: Maximum seconds to wait while another process changes the file.
BUSY_TIMEOUT = 5.0

#: Mode bits that allow other users to access the file, which contains arguments of tasks.
_GROUP_AND_OTHERS = stat.S_IRWXG | stat.S_IRWXO

#: Guards every access to the file by an unpatched lock.
#: The lock is reentrant, because ``validate`` may call ``resolve``.
_fork_guard = ForkGuard(RLock)

_TABLES = (
    "CREATE TABLE identity (owner TEXT PRIMARY KEY)",
    "CREATE TABLE overrides (key TEXT PRIMARY KEY, body BLOB NOT NULL)",
)


@implementer(INativeSchedules)
class NativeScheduleControl:
    """Stores the changes of one scheduler's schedules in an SQLite file.

    Pass ``control=NativeScheduleControl(path)`` to the scheduler adapter. The file stores an
    operator's changes in the dashboard. They are merged into the schedules of the code each time
    the scheduler reads the schedules. The file has the format of z4j 1.13.

    Any thread and process may use the object, because each call opens a connection. The constructor
    and every method raise ``sqlite3.Error`` or ``OSError`` if the disk fails.

    :param path: path of the file, which is created with mode 0600.
    :raises ValueError: other users may access the file, or it is not a schedule file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self._create()
        with self._connected():
            pass

    def resolve(self, baseline: list[Schedule], *, owner: str) -> list[Schedule]:
        """Return the effective schedules: ``baseline`` with the stored changes applied.

        :param baseline: the schedules that are defined in code.
        :param owner: the scheduler's name.
        :raises ValueError: the file belongs to another scheduler.
        """
        with self._connected() as connection:
            _check_owner(connection, owner)
            return _effective(baseline, _changes(connection))

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
        :raises ConflictError: the schedule differs from ``expected``, or its name is taken.
        :raises NotFoundError: there is no such schedule.
        :raises ValueError: the change is not possible.
        """
        _check(operation, schedule_id, expected, definition)
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            _claim(connection, owner)
            current = {_key(each): each for each in _effective(baseline, _changes(connection))}
            before: Schedule | None = None
            after: Schedule | None = None
            if schedule_id is not None:
                before = _require_unchanged(current, schedule_id, expected, owner)
            if operation != "delete":
                after = _changed(before, definition, owner=owner, engine=engine)
                _reject_duplicate_name(after, current.values())
                validate(after)
            _write(connection, schedule_id or _key(after), after)
            connection.execute("COMMIT")
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
            _prepare(connection, self.path)
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Create the tables of a new file, or check that an existing file is a schedule file."""
    if _header(connection) == (0, 0):
        connection.execute("BEGIN IMMEDIATE")
        if (
            _header(connection) == (0, 0)
            and not connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        ):
            for table in _TABLES:
                connection.execute(table)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    if _header(connection) != (APPLICATION_ID, VERSION):
        raise ValueError(f"{path} is not a schedule file of version {VERSION}: choose another path")


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


def _changes(connection: sqlite3.Connection) -> dict[str, Schedule | None]:
    """Return the changed schedules by key; ``None`` stands for a deleted schedule."""
    return {key: _read(body) for key, body in connection.execute("SELECT key, body FROM overrides")}


def _read(body: bytes) -> Schedule | None:
    return None if json.loads(body) is None else Schedule.model_validate_json(body)


def _write(connection: sqlite3.Connection, key: str, schedule: Schedule | None) -> None:
    body = b"null"
    if schedule is not None:
        body = canonical_external_json(schedule.model_dump(mode="json"))
    if len(body) > MAX_RECORD_BYTES:
        raise ValueError(
            f"the schedule takes {len(body)} bytes, over the limit of {MAX_RECORD_BYTES}"
        )
    connection.execute("INSERT OR REPLACE INTO overrides VALUES (?, ?)", (key, body))
    number, size = connection.execute(
        "SELECT count(*), sum(length(body)) FROM overrides"
    ).fetchone()
    if number > MAX_RECORDS or size > MAX_TOTAL_BYTES:
        raise ValueError(
            f"{number} changed schedules of {size} bytes are over the limit of {MAX_RECORDS} "
            f"schedules or {MAX_TOTAL_BYTES} bytes"
        )


def _key(schedule: Schedule | None) -> str:
    """Return the key of a schedule, which the brain uses as well."""
    if schedule is None:
        raise ValueError("schedule_id is required")
    return schedule.external_id or schedule.name


def _effective(baseline: list[Schedule], changes: dict[str, Schedule | None]) -> list[Schedule]:
    schedules: dict[str, Schedule | None] = {_key(each): each for each in baseline}
    schedules.update(changes)
    return [each for each in schedules.values() if each is not None]


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
        raise NotFoundError(f"schedule {schedule_id!r} does not exist")
    present = normalize_external_schedule(schedule.model_dump(mode="json"), owner=owner)
    if external_schedule_configuration(present) != external_schedule_configuration(expected or {}):
        raise ConflictError(
            f"schedule {schedule_id!r} was changed in the meantime; reload it and try again"
        )
    return schedule


def _changed(
    before: Schedule | None, definition: dict[str, Any], *, owner: str, engine: str
) -> Schedule:
    """Return the changed or created schedule. Raises ``ValueError`` for an invalid definition."""
    now = datetime.now(UTC).isoformat()
    if before is not None:
        fields = before.model_dump(mode="json")
    else:
        identity = f"{owner}:z4j:{uuid4()}"
        fields = {
            "id": str(uuid5(NAMESPACE_URL, identity)),
            "project_id": str(uuid4()),
            "engine": engine,
            "scheduler": owner,
            "external_id": identity,
            "source": f"{owner}:dashboard"[:64],
            "created_at": now,
        }
    return Schedule.model_validate_json(json.dumps({**fields, **definition, "updated_at": now}))


def _reject_duplicate_name(schedule: Schedule, others: Iterable[Schedule]) -> None:
    """Raise ``ConflictError`` if another schedule has the same name."""
    if any(other.name == schedule.name and _key(other) != _key(schedule) for other in others):
        raise ConflictError(f"a schedule named {schedule.name!r} already exists")
