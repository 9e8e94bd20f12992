"""Durable changes of schedules that are defined in code (huey, arq, taskiq): ``control=NativeScheduleControl(path)``.

What an operator changes in the dashboard is kept in a file of the application's own and laid over the code's definitions
each time that the scheduler looks. The file is z4j's since 1.13; this module reads and writes the same one.
"""

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

#: What the file says it is.
APPLICATION_ID = 1513376334
VERSION = 1

#: What an operator can change.
EDITABLE = frozenset(
    {"name", "task_name", "kind", "expression", "timezone", "queue", "args", "kwargs", "is_enabled"}
)

#: Bytes of one change and of all, and how many there may be.
MAX_RECORD_BYTES = 1024 * 1024
MAX_TOTAL_BYTES = 64 * 1024 * 1024
MAX_RECORDS = 10_000

#: Seconds to wait for another process's change.
BUSY_TIMEOUT = 5.0

#: Bits of the file's mode that would let others read what arguments hold.
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

#: Nobody patches this lock. Whoever validates a change may look at the schedules, so that it has to be one to enter twice.
_fork_guard = ForkGuard(RLock)

_TABLES = (
    "CREATE TABLE identity (owner TEXT PRIMARY KEY)",
    "CREATE TABLE overrides (key TEXT PRIMARY KEY, body BLOB NOT NULL)",
)


@implementer(INativeSchedules)
class NativeScheduleControl:
    """Changes of one scheduler's schedules, in the SQLite file ``path``, mode 0600.

    Safe to use from any thread and process: each call has a connection of its own. ``ValueError`` for a file that others
    may read, is of another kind or another scheduler's; ``sqlite3.Error`` and ``OSError`` for a disk that fails.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self._create()
        with self._connected():
            pass

    def resolve(self, baseline: list[Schedule], *, owner: str) -> list[Schedule]:
        """Return the schedules in force: those of the code, with what was changed, deleted and added."""
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
        """Commit one change if the schedule is still as ``expected``; return it as it is now, ``None`` when deleted.

        Raises ``ConflictError`` when it is not, ``NotFoundError`` when there is none, ``ValueError`` for what cannot be
        done and whatever ``validate`` raises; nothing is changed then.
        """
        _check(operation, schedule_id, expected, definition)
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            _claim(connection, owner)
            current = {_key(each): each for each in _effective(baseline, _changes(connection))}
            before = (
                None
                if schedule_id is None
                else _require_unchanged(current, schedule_id, expected, owner)
            )
            after = (
                None
                if operation == "delete"
                else _changed(before, definition, owner=owner, engine=engine)
            )
            if after is not None:
                _reject_duplicate_name(after, current.values())
                validate(after)
            _write(connection, schedule_id or _key(after), after)
            connection.execute("COMMIT")
        return after

    def _create(self) -> None:
        """Create the file if there is none, with a mode that nobody else can read from the beginning."""
        try:
            os.close(open_file(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            found = self.path.lstat()
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{self.path} is no regular file") from None
            if os.name == "posix" and found.st_mode & _OTHERS:
                raise ValueError(
                    f"{self.path} can be read or written by others: chmod 600 {self.path}"
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
    """Make the tables of a new file, or check that the file is ours."""
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
        raise ValueError(f"{path} holds something else than schedules, or those of another version")


def _header(connection: sqlite3.Connection) -> tuple[int, int]:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    return application, connection.execute("PRAGMA user_version").fetchone()[0]


def _check_owner(connection: sqlite3.Connection, owner: str) -> None:
    """Raise ``ValueError`` for a file with another scheduler's changes."""
    row = connection.execute("SELECT owner FROM identity").fetchone()
    if row is not None and row[0] != owner:
        raise ValueError(f"the file holds schedules of {row[0]}, not of {owner}")


def _claim(connection: sqlite3.Connection, owner: str) -> None:
    _check_owner(connection, owner)
    connection.execute("INSERT OR IGNORE INTO identity VALUES (?)", (owner,))


def _changes(connection: sqlite3.Connection) -> dict[str, Schedule | None]:
    """Return what was changed, by key; ``None`` is a deletion."""
    return {key: _read(body) for key, body in connection.execute("SELECT key, body FROM overrides")}


def _read(body: bytes) -> Schedule | None:
    return None if json.loads(body) is None else Schedule.model_validate_json(body)


def _write(connection: sqlite3.Connection, key: str, schedule: Schedule | None) -> None:
    body = (
        b"null" if schedule is None else canonical_external_json(schedule.model_dump(mode="json"))
    )
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
            f"{number} changed schedules of {size} bytes are over the limit of {MAX_RECORDS} and {MAX_TOTAL_BYTES}"
        )


def _key(schedule: Schedule | None) -> str:
    """Return by what a schedule is known, to the brain as well."""
    if schedule is None:
        raise ValueError("schedule_id is required")
    return schedule.external_id or schedule.name


def _effective(baseline: list[Schedule], changes: dict[str, Schedule | None]) -> list[Schedule]:
    found: dict[str, Schedule | None] = {_key(each): each for each in baseline}
    found.update(changes)
    return [each for each in found.values() if each is not None]


def _check(
    operation: str, schedule_id: str | None, expected: Any, definition: dict[str, Any]
) -> None:
    if operation not in {"create", "update", "delete"}:
        raise ValueError(f"{operation} is no change of a schedule")
    if (operation == "create") != (schedule_id is None) or (operation == "create") != (
        expected is None
    ):
        raise ValueError(
            "schedule_id and expected come with an update or a deletion, and with nothing else"
        )
    unknown = sorted(set(definition) - EDITABLE)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be changed")
    if operation == "delete" and definition:
        raise ValueError("a deletion has no definition")


def _require_unchanged(
    current: dict[str, Schedule], schedule_id: str, expected: dict[str, Any] | None, owner: str
) -> Schedule:
    found = current.get(schedule_id)
    if found is None:
        raise NotFoundError(f"there is no schedule {schedule_id!r}")
    present = normalize_external_schedule(found.model_dump(mode="json"), owner=owner)
    if external_schedule_configuration(present) != external_schedule_configuration(expected or {}):
        raise ConflictError(
            f"schedule {schedule_id!r} was changed meanwhile; look again before you change it"
        )
    return found


def _changed(
    before: Schedule | None, definition: dict[str, Any], *, owner: str, engine: str
) -> Schedule:
    """Return the schedule after the change, validated by the model. Raises ``ValueError`` for a bad definition."""
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
    """Raise ``ConflictError`` if another schedule has the name: the brain knows them by it."""
    if any(other.name == schedule.name and _key(other) != _key(schedule) for other in others):
        raise ConflictError(f"there is a schedule {schedule.name!r} already")
