"""Reads the stores of other processes, and deletes the stores of dead processes."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import merge
from typing import TYPE_CHECKING

from z4j_bare.buffer import files, schema
from z4j_bare.buffer.accounting import sum_losses
from z4j_bare.buffer.batches import Batches
from z4j_bare.buffer.files import OwnerLock, is_owned
from z4j_bare.buffer.open_runs import runs_path
from z4j_bare.buffer.rows import EVENT, BufferEntry
from z4j_bare.buffer.schema import read_only, scalar
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from pathlib import Path

_HAS_BATCHES = "SELECT count(*) FROM sqlite_master WHERE name = 'batches'"


@dataclass(frozen=True, slots=True)
class StoreReport:
    """The content of one store at one moment.

    ``error`` says why the store is unreadable. ``rows`` is the number of rows by kind, and ``lost``
    the number of lost rows by reason. ``oldest_age`` is in seconds. ``commands`` is the number of
    ledger entries.
    """

    path: Path
    owner_alive: bool
    disk_bytes: int
    error: str = ""
    pid: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    payload_bytes: int = 0
    oldest_age: float | None = None
    lost: dict[str, int] = field(default_factory=dict)
    commands: int = 0
    deployment: str = ""

    @property
    def total(self) -> int:
        """Total number of rows of all kinds."""
        return sum(self.rows.values())


def stores(buffer_path: str | os.PathLike[str]) -> list[Path]:
    """Return the stores of this user in all directories.

    Within a directory, the least recently modified store comes first.
    """
    return [
        path
        for directory in files.candidate_directories(buffer_path)
        for path in files.list_stores(directory)
    ]


def read_report(path: Path) -> StoreReport:
    """Return the report on a store; ``error`` is set when the store is unreadable."""
    size = sum(map(files.file_size, files.store_files(path)))
    owner_alive = is_owned(files.lock_path(path))
    try:
        with read_only(path) as connection:
            return _read(connection, path, size, owner_alive=owner_alive)
    except (sqlite3.Error, KeyError, TypeError) as error:
        return StoreReport(path, owner_alive, size, error=f"cannot be read: {error}")


def _read(
    connection: sqlite3.Connection, path: Path, size: int, *, owner_alive: bool
) -> StoreReport:
    meta = dict(connection.execute("SELECT key, value FROM meta"))
    by_kind = dict(connection.execute("SELECT kind, count(*) FROM entries GROUP BY kind"))
    payload_bytes, first = connection.execute(
        "SELECT coalesce(sum(length(payload)), 0), min(created_at) FROM entries"
    ).fetchone()
    batches = _batches(connection)
    if batches is not None and (oldest := batches.oldest()) is not None:
        by_kind[EVENT] = by_kind.get(EVENT, 0) + batches.rows
        payload_bytes += batches.payload_bytes
        first = oldest[2] if first is None else min(first, oldest[2])
    losses = {
        (reason, kind): lost for reason, kind, lost in connection.execute("SELECT * FROM losses")
    }
    return StoreReport(
        path,
        owner_alive,
        size,
        pid=int(meta["pid"]),
        rows=by_kind,
        payload_bytes=payload_bytes,
        oldest_age=None if first is None else max(0.0, time.time() - first),
        lost=sum_losses(losses, 0),
        commands=scalar(connection, "SELECT count(*) FROM ledger"),
        deployment=str(meta["deployment"]),
    )


def _batches(connection: sqlite3.Connection) -> Batches | None:
    """Return the batches of a store; ``None`` for schema version 1, which has no batches."""
    return Batches(connection, 0) if scalar(connection, _HAS_BATCHES) else None


@contextmanager
def claim_orphan(path: Path) -> Iterator[OwnerLock]:
    """Hold the owner lock of a dead process's store during the block.

    Raises ``LocalStorageError`` if the process runs.
    """
    lock = OwnerLock(files.lock_path(path))
    try:
        yield lock
    finally:
        lock.release(delete=not path.exists())


def rows(path: Path) -> Iterator[BufferEntry]:
    """Yield the rows of a store, oldest first. Raises ``LocalStorageError``."""
    try:
        with read_only(path) as connection:
            batches = _batches(connection)
            yield from merge(
                map(BufferEntry._make, connection.execute(schema.ALL_ROWS)),
                batches.read(0) if batches else (),
            )
    except sqlite3.Error as error:
        raise LocalStorageError(f"the store {path} cannot be read: {error}") from error


def delete_store(path: Path) -> None:
    """Delete the store of a dead process, including its rows and its open runs.

    Raises ``LocalStorageError`` if the process runs.
    """
    with claim_orphan(path):
        for file in (*files.store_files(path), runs_path(path)):
            files.remove(file)
