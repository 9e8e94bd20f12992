"""Looking at stores from outside: those of the living, which go on meanwhile, and what the dead have left."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import merge
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer import files as paths
from z4j_bare.buffer.batches import Batches
from z4j_bare.buffer.lock import OwnerLock, is_owned
from z4j_bare.buffer.rows import EVENT, BufferEntry, losses_by
from z4j_bare.buffer.schema import read_only
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from pathlib import Path

_ROWS = "SELECT id, kind, key, payload, created_at, attempts FROM entries ORDER BY id"
_HAS_BATCHES = "SELECT count(*) FROM sqlite_master WHERE name = 'batches'"


@dataclass(frozen=True, slots=True)
class StoreReport:
    """One store at one moment. ``owner_alive`` says that its process runs, ``error`` why it cannot be read."""

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
        """All rows."""
        return sum(self.rows.values())


def stores(buffer_path: str | os.PathLike[str]) -> list[Path]:
    """Return all stores of this user, wherever they may lie, longest untouched first."""
    return [
        path
        for place in paths.candidate_directories(buffer_path)
        for path in paths.list_stores(place)
    ]


def read_report(path: Path) -> StoreReport:
    """Return how a store is; never raises for one that cannot be read."""
    size, owner_alive = (
        sum(map(paths.file_size, paths.store_files(path))),
        is_owned(paths.lock_path(path)),
    )
    try:
        with read_only(path) as connection:
            return StoreReport(path, owner_alive, size, **_figures(connection))
    except (sqlite3.Error, KeyError, TypeError) as error:
        return StoreReport(path, owner_alive, size, error=f"cannot be read: {error}")


def _figures(connection: sqlite3.Connection) -> dict[str, Any]:
    meta = dict(connection.execute("SELECT key, value FROM meta"))
    rows = dict(connection.execute("SELECT kind, count(*) FROM entries GROUP BY kind"))
    size, first = connection.execute(
        "SELECT coalesce(sum(length(payload)), 0), min(created_at) FROM entries"
    ).fetchone()
    batches = _batches(connection)
    if batches is not None and (oldest := batches.oldest()) is not None:
        rows[EVENT] = rows.get(EVENT, 0) + batches.rows
        size += batches.payload_bytes
        first = oldest[2] if first is None else min(first, oldest[2])
    losses = {
        (reason, kind): number
        for reason, kind, number in connection.execute("SELECT * FROM losses")
    }
    return {
        "pid": int(meta["pid"]),
        "rows": rows,
        "payload_bytes": size,
        "oldest_age": None if first is None else max(0.0, time.time() - first),
        "lost": losses_by(losses, 0),
        "commands": connection.execute("SELECT count(*) FROM ledger").fetchone()[0],
        "deployment": str(meta["deployment"]),
    }


def _batches(connection: sqlite3.Connection) -> Batches | None:
    """Return the batches of a store, unless it is of an agent that knew none."""
    return Batches(connection, 0) if connection.execute(_HAS_BATCHES).fetchone()[0] else None


@contextmanager
def claim_orphan(path: Path) -> Iterator[OwnerLock]:
    """Own a dead process's store meanwhile. Raises ``LocalStorageError`` when its process lives."""
    lock = OwnerLock(paths.lock_path(path))
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
                map(BufferEntry._make, connection.execute(_ROWS)),
                batches.read(0) if batches else (),
            )
    except sqlite3.Error as error:
        raise LocalStorageError(f"the store {path} cannot be read: {error}") from error


def delete_store(path: Path) -> None:
    """Delete a dead process's store with everything in it. Raises ``LocalStorageError`` when its process lives."""
    with claim_orphan(path):
        for file in paths.store_files(path):
            paths.remove(file)
