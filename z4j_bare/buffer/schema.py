"""Tables, versions and pragmas of a store."""

from __future__ import annotations

import os
import sqlite3
import uuid
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from z4j_bare.buffer import files as paths
from z4j_bare.buffer.rows import CORRUPTION, EVENT
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Says "a store of ours" in the file's header ("z4gb"); a file with tables and another mark is never touched.
APPLICATION_ID = 0x7A346762

#: ``MIGRATIONS[n]`` leads from version ``n`` to ``n + 1``; version 0 is an empty file. Append, never edit.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # Ids are given out by the store, which keeps the next one in ``meta``: AUTOINCREMENT would write its
        # own counter once per row (a fifth of the cost of an append) to promise the same.
        """CREATE TABLE entries (
            id INTEGER PRIMARY KEY,
            kind TEXT NOT NULL,
            key TEXT NOT NULL,
            payload BLOB NOT NULL,
            created_at REAL NOT NULL,
            attempts INTEGER NOT NULL DEFAULT 0
        )""",
        # Results are sought among 100,000 events; partial, so that an event costs nothing.
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
        # Events of one append, ``last - count + 1`` to ``last``, their payloads with a newline between each two. Those up
        # to ``done`` in ``meta`` have gone.
        """CREATE TABLE batches (
            last INTEGER PRIMARY KEY,
            count INTEGER NOT NULL,
            created_at REAL NOT NULL,
            payloads BLOB NOT NULL
        )""",
    ),
)
VERSION = len(MIGRATIONS)

PAGE = 4096


def wal_pages(max_bytes: int) -> int:
    """Return after how many pages the WAL is checkpointed: SQLite's 1000 (4 MiB), less for a small store."""
    return max(8, min(1000, max_bytes // 64 // PAGE))


def connect(
    path: Path, *, busy_timeout: float, max_bytes: int, deployment: str
) -> sqlite3.Connection:
    """Open an existing file with every pragma set, but leave its tables alone.

    ``busy_timeout`` is in seconds, 0 fails at once. Raises ``sqlite3.Error``, or ``LocalStorageError`` for a
    file which is not ours, of another deployment, newer than we are, or lies where WAL does not work.
    """
    connection = sqlite3.connect(
        path.as_uri() + "?mode=rw",
        uri=True,
        timeout=busy_timeout,
        isolation_level=None,
        check_same_thread=False,  # any worker of a thread pool may carry the next call
    )
    try:
        _refuse_foreign(connection, path, deployment)
        _configure(connection, path, wal_pages(max_bytes))
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block writes, or none of it; inside another such block, together with that.

    IMMEDIATE, because a transaction that starts by reading and is then refused the write lock cannot wait for
    it.
    """
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:  # also what a host throws into a greenlet or a main thread
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:  # SQLite has rolled back by itself (disk full, I/O error)
            pass
        raise


def scalar(connection: sqlite3.Connection, query: str) -> int:
    """Return the one integer that ``query`` yields."""
    return int(connection.execute(query).fetchone()[0])


def _refuse_foreign(connection: sqlite3.Connection, path: Path, deployment: str) -> None:
    mark = scalar(connection, "PRAGMA application_id")
    if mark != APPLICATION_ID and (
        mark or scalar(connection, "SELECT count(*) FROM sqlite_master")
    ):
        raise LocalStorageError(f"{path} is not a store of this agent (application id {mark:#x})")
    version = scalar(connection, "PRAGMA user_version")
    if version > VERSION:
        raise LocalStorageError(
            f"{path} was written by a newer agent (schema {version}, this one knows {VERSION})"
        )
    if version and not _of_deployment(connection, deployment):
        raise LocalStorageError(f"the store {path} belongs to another deployment")


def _of_deployment(connection: sqlite3.Connection, deployment: str) -> bool:
    """Whether the store bears one of the deployment's names, or neither has any."""
    found = connection.execute("SELECT value FROM meta WHERE key = 'deployment'").fetchone()
    return found is not None and (
        found[0] == deployment or not set(found[0].split()).isdisjoint(deployment.split())
    )


def _configure(connection: sqlite3.Connection, path: Path, pages: int) -> None:
    connection.execute(
        "PRAGMA auto_vacuum=INCREMENTAL"
    )  # before WAL, which writes the first page and settles it
    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        raise LocalStorageError(
            f"{path}: this file system offers journal mode {mode}, not WAL; move Z4J_HOME"
        )
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.execute(
        "PRAGMA secure_delete=OFF"
    )  # some distributions build it in: twice the writes per delete
    connection.execute(f"PRAGMA wal_autocheckpoint={pages}")
    connection.execute(f"PRAGMA journal_size_limit={pages * PAGE}")


def migrate(connection: sqlite3.Connection, *, deployment: str, now: float) -> None:
    """Bring the tables up to ``VERSION`` and name a new store; the caller holds the transaction."""
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
    """Open a store without becoming its owner; for a file that was closed in order, no log and no index are made."""
    mode = "mode=ro" if paths.store_files(path)[2].exists() else "immutable=1"
    with closing(
        sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, timeout=0.1, isolation_level=None)
    ) as connection:
        connection.execute("BEGIN")  # one moment, whatever its owner does meanwhile
        yield connection


def read_losses(path: Path) -> dict[tuple[str, str], int]:
    """Return the losses of a file whose rows cannot be read, those rows among them; none if it cannot say."""
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
