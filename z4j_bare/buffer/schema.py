"""SQL of a store: tables, versions, pragmas and queries."""

from __future__ import annotations

import os
import sqlite3
import uuid
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from z4j_bare.buffer import files
from z4j_bare.buffer.rows import CORRUPTION, EVENT, KINDS
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from z4j_bare.buffer.rows import Losses

#: SQLite's application id in the header of a store ("z4gb" in ASCII).
#: A file with tables and another application id is not opened.
APPLICATION_ID = 0x7A346762

#: ``MIGRATIONS[n]`` contains the statements that migrate a file from version ``n`` to ``n + 1``.
#: Version 0 is an empty file. Never change an item; append new ones.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # The store assigns the ids and keeps the next id in ``meta``.
        # AUTOINCREMENT would write a counter for each row. These writes take a fifth of an append's
        # time.
        """CREATE TABLE entries (
            id INTEGER PRIMARY KEY,
            kind TEXT NOT NULL,
            key TEXT NOT NULL,
            payload BLOB NOT NULL,
            created_at REAL NOT NULL,
            attempts INTEGER NOT NULL DEFAULT 0
        )""",
        # A partial index without events, for finding a result quickly among 100,000 events.
        "CREATE INDEX entries_kept ON entries (id, kind) WHERE kind <> 'event'",
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
        """CREATE TABLE losses (
            reason TEXT NOT NULL,
            kind TEXT NOT NULL,
            rows INTEGER NOT NULL,
            PRIMARY KEY (reason, kind)
        ) WITHOUT ROWID""",
        """CREATE TABLE ledger (
            seq INTEGER PRIMARY KEY,
            key TEXT NOT NULL UNIQUE,
            state TEXT NOT NULL,
            result BLOB NOT NULL,
            at REAL NOT NULL
        )""",
    ),
    (
        # A row contains the events of one append, with the ids ``last - count + 1`` to ``last``. A
        # newline separates the payloads. In ``meta``, ``done`` is the id of the last deleted event.
        # The oldest row may still contain deleted events.
        """CREATE TABLE batches (
            last INTEGER PRIMARY KEY,
            count INTEGER NOT NULL,
            created_at REAL NOT NULL,
            payloads BLOB NOT NULL
        )""",
    ),
)
VERSION = len(MIGRATIONS)

#: Page size in bytes.
PAGE = 4096

INSERT = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)"
DELETE = "DELETE FROM entries WHERE id BETWEEN ? AND ?"
INCREMENT_ATTEMPTS = "UPDATE entries SET attempts = attempts + 1 WHERE id BETWEEN ? AND ?"
COUNT_BY_KIND = (
    "SELECT kind, count(*), sum(length(payload)) FROM entries "
    "WHERE id BETWEEN ? AND ? GROUP BY kind"
)
TOTALS = "SELECT count(*), coalesce(sum(length(payload)), 0) FROM entries"
COUNT_NON_EVENTS = "SELECT count(*) FROM entries INDEXED BY entries_kept WHERE kind <> 'event'"
OLDEST_ROW = "SELECT id, created_at FROM entries ORDER BY id LIMIT 1"
ALL_ROWS = "SELECT id, kind, key, payload, created_at, attempts FROM entries ORDER BY id"
INSERT_BATCH = "INSERT INTO batches VALUES (?, ?, ?, ?)"
DELETE_BATCH = "DELETE FROM batches WHERE last = ?"
BATCHES = "SELECT last, count, created_at, payloads FROM batches WHERE last > ? ORDER BY last"
OLDEST_BATCH = "SELECT last, last - count + 1, created_at FROM batches ORDER BY last LIMIT 1"
BATCH_TOTALS = (
    "SELECT count(*), coalesce(sum(count), 0), coalesce(sum(length(payloads) - count + 1), 0) "
    "FROM batches"
)
SET_ACKED_THROUGH = "UPDATE meta SET value = ? WHERE key = 'done'"
READ_ACKED_THROUGH = "SELECT value FROM meta WHERE key = 'done'"
ADD_LOSSES = (
    "INSERT INTO losses VALUES (?, ?, ?) "
    "ON CONFLICT (reason, kind) DO UPDATE SET rows = losses.rows + excluded.rows"
)
ADD_TO_COUNTER = "UPDATE meta SET value = value + ? WHERE key = ?"


# S608 (SQL injection) does not apply to queries that contain only constants of this package.


def select_rows(kinds: Iterable[str]) -> str:
    """Return a query for the oldest entries of ``kinds``; parameters: ``after``, ``limit``."""
    wanted = sorted(KINDS.intersection(kinds))
    where = f"kind IN ({', '.join(map(repr, wanted))}) AND " if len(wanted) < len(KINDS) else ""
    index = ""
    if wanted and EVENT not in wanted:
        index, where = "INDEXED BY entries_kept", where + "kind <> 'event' AND "
    return (
        "SELECT id, kind, key, payload, created_at, attempts "  # noqa: S608
        f"FROM entries {index} WHERE {where}id > ? ORDER BY id LIMIT ?"
    )


def select_oldest(kind: str) -> str:
    """Return a query for id and payload length of a kind's oldest rows; parameter: ``limit``."""
    index = condition = ""
    if kind != EVENT:
        index, condition = "INDEXED BY entries_kept", "AND kind <> 'event' "
    return (
        f"SELECT id, length(payload) FROM entries {index} "  # noqa: S608
        f"WHERE kind = '{kind}' {condition}ORDER BY id LIMIT ?"
    )


def wal_pages(max_bytes: int) -> int:
    """Return the number of WAL pages after which SQLite runs a checkpoint.

    The number is below SQLite's default of 1000 (4 MiB) if the store is smaller than 250 MiB.
    """
    return max(8, min(1000, max_bytes // 64 // PAGE))


def connect(
    path: Path, *, busy_timeout: float, max_bytes: int, deployment: str
) -> sqlite3.Connection:
    """Open an existing file and set the pragmas, without changing the tables.

    ``busy_timeout`` is the number of seconds to wait for a locked file. Raises ``sqlite3.Error``.
    Raises ``LocalStorageError`` for a file of another program, of another deployment or of a newer
    agent, and for a file system without WAL.
    """
    connection = sqlite3.connect(
        path.as_uri() + "?mode=rw",
        uri=True,
        timeout=busy_timeout,
        isolation_level=None,
        check_same_thread=False,  # the next call may run on another native thread
    )
    try:
        _reject_foreign(connection, path, deployment)
        _configure(connection, path, wal_pages(max_bytes))
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit all statements of the block, or none. A nested block joins the outer transaction.

    ``BEGIN IMMEDIATE`` waits for the write lock at once. A transaction that starts with a read
    could not wait for the write lock later.
    """
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:  # also an exception that the host throws into the greenlet or thread
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:  # SQLite has already rolled back (disk full, I/O error)
            pass
        raise


def scalar(connection: sqlite3.Connection, query: str) -> int:
    """Return the single integer result of ``query``."""
    return int(connection.execute(query).fetchone()[0])


def _reject_foreign(connection: sqlite3.Connection, path: Path, deployment: str) -> None:
    application_id = scalar(connection, "PRAGMA application_id")
    if application_id != APPLICATION_ID and (
        application_id or scalar(connection, "SELECT count(*) FROM sqlite_master")
    ):
        raise LocalStorageError(
            f"{path} is not a store of this agent (application id {application_id:#x})"
        )
    version = scalar(connection, "PRAGMA user_version")
    if version > VERSION:
        raise LocalStorageError(
            f"{path} was written by a newer agent (schema {version}, this agent supports {VERSION})"
        )
    if version and not _is_of_deployment(connection, deployment):
        raise LocalStorageError(f"the store {path} belongs to another deployment")


def _is_of_deployment(connection: sqlite3.Connection, deployment: str) -> bool:
    """Whether the file's deployment id shares a part with ``deployment``, or both are empty."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'deployment'").fetchone()
    return row is not None and (
        row[0] == deployment or not set(row[0].split()).isdisjoint(deployment.split())
    )


def _configure(connection: sqlite3.Connection, path: Path, pages: int) -> None:
    # auto_vacuum must be set before the switch to WAL mode.
    # The switch writes the first page, and then auto_vacuum cannot be changed.
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        raise LocalStorageError(
            f"{path}: this file system supports journal mode {mode} but not WAL; "
            "move Z4J_HOME to a local file system"
        )
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA temp_store=MEMORY")
    # Some distributions build SQLite with secure_delete on, which doubles the writes of a deletion.
    connection.execute("PRAGMA secure_delete=OFF")
    connection.execute(f"PRAGMA wal_autocheckpoint={pages}")
    connection.execute(f"PRAGMA journal_size_limit={pages * PAGE}")


def migrate(connection: sqlite3.Connection, *, deployment: str, now: float) -> None:
    """Migrate the tables to ``VERSION`` and fill ``meta``, in the caller's transaction."""
    version = scalar(connection, "PRAGMA user_version")
    for step in MIGRATIONS[version:]:
        for statement in step:
            connection.execute(statement)
    if version < VERSION:
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={VERSION}")
    connection.executemany(
        "INSERT OR IGNORE INTO meta VALUES (?, ?)",
        (
            ("buffer_id", str(uuid.uuid4())),
            ("deployment", deployment),
            ("created_at", now),
            ("pid", os.getpid()),
            ("next_id", 1),
            ("confirmed", 0),
            ("done", 0),
        ),
    )


@contextmanager
def read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a store for reading, without its owner lock.

    A store that was closed properly has no WAL, and this function creates none.
    """
    mode = "mode=ro" if files.store_files(path)[2].exists() else "immutable=1"
    with closing(
        sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, timeout=0.1, isolation_level=None)
    ) as connection:
        connection.execute("BEGIN")  # one snapshot for all reads, while the owner writes
        yield connection


def read_losses(path: Path) -> Losses:
    """Return the losses of a file whose rows are unreadable, including these rows.

    The result is empty if the counters are unreadable.
    """
    try:
        with closing(sqlite3.connect(path.as_uri() + "?mode=ro", uri=True)) as connection:
            meta = dict(connection.execute("SELECT key, value FROM meta"))
            losses = {
                (reason, kind): rows
                for reason, kind, rows in connection.execute("SELECT * FROM losses")
            }
            left = meta["next_id"] - 1 - meta["confirmed"] - sum(losses.values())
            return {**losses, (CORRUPTION, EVENT): losses.get((CORRUPTION, EVENT), 0) + left}
    except (sqlite3.Error, KeyError, TypeError):
        return {}
