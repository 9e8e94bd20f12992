"""Opens the store on disk and runs the store's operations, on the native thread.

No function logs or takes a patched lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, TypeVarTuple

from z4j_bare.buffer.rows import (
    EVENT,
    PROJECTION,
    RESULT,
    BufferEntry,
    BufferStats,
    LedgerEntry,
    Losses,
    StoreState,
)
from z4j_bare.buffer.store import BufferStore
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from z4j_bare.buffer.memory import MemoryStore

    #: A store on disk or in memory.
    Store = BufferStore | MemoryStore

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

#: A query for rows: ``(after, limit, kinds)``; see ``IStore.drain``.
RowQuery = tuple[int, int, Sequence[str]]

#: A function that searches the stores of other processes for the ledger entry of a command.
#: Its arguments are the path of this process's store and the command's key.
LedgerLookup = Callable[[Path, str], LedgerEntry | None]

#: Maximum number of rows copied from one store to another in one transaction.
COPY_ROWS = 500
#: Maximum payload bytes copied in one transaction.
COPY_BYTES = 4 * 1024 * 1024


class Progress(IntEnum):
    """The last completed part of a call. Each part is a separate transaction."""

    CLOSED = 0
    OPEN = 1
    LOSSES_RECORDED = 2
    ACKED_ROWS_DELETED = 3
    DONE = 4


class CallResult(NamedTuple, Generic[T]):
    """The result of a call: a ``value`` if ``progress`` is ``DONE``, else an ``error``."""

    progress: Progress
    value: T | None = None
    error: Exception | None = None
    #: A warning about the location of a store that this call opened.
    notice: str = ""


class ReadResult(NamedTuple):
    """Rows of a read, with the stats and the outcome of a vacuum step if requested."""

    results: list[BufferEntry]
    events: list[BufferEntry]
    stats: BufferStats | None = None
    vacuumed: bool | None = None


class StoreWorker:
    """Owns the store on disk. Only one call may run at a time.

    All methods run on the native thread. :meth:`read_cached` may also run on the hub.
    """

    def __init__(self, open_store: Callable[[], BufferStore]) -> None:
        self._open_store = open_store
        self._store: BufferStore | None = None

    def call(
        self,
        losses: Losses,
        acked: Sequence[int],
        operation: Callable[[BufferStore, *Ts], T],
        /,
        *args: *Ts,
    ) -> CallResult[T]:
        """Open the store if needed, record ``losses``, delete ``acked`` rows, run ``operation``.

        Acked rows are deleted before the operation. If they were still in a full store, an append
        would evict these rows and count them as lost.
        """
        notice = ""
        progress = Progress.CLOSED
        try:
            if self._store is None:
                self._store = self._open_store()
                notice = getattr(self._store, "notice", "")
            progress = Progress.OPEN
            if losses:
                self._store.import_state(StoreState(losses))
            progress = Progress.LOSSES_RECORDED
            if acked:
                self._store.confirm(acked)
            progress = Progress.ACKED_ROWS_DELETED
            value = operation(self._store, *args)
        except Exception as error:
            return CallResult(progress, None, error, notice)
        return CallResult(Progress.DONE, value, None, notice)

    def read_cached(self, results: RowQuery, events: RowQuery, max_bytes: int) -> ReadResult | None:
        """Do the same as :func:`read_next`, but without I/O; return ``None`` if I/O is needed."""
        if self._store is None:
            return None
        rows_by_query = run_queries(self._store.read_cached, (results, events), max_bytes)
        if rows_by_query[0] is None or rows_by_query[1] is None:
            return None
        return ReadResult(rows_by_query[0], rows_by_query[1])

    def cached_stats(self) -> BufferStats | None:
        """Return the counters without disk access; ``None`` if no store is open."""
        return None if self._store is None else self._store.cached_stats()

    def free_space(self) -> int:
        """Free space on a full disk; return the number of evicted events."""
        return 0 if self._store is None else self._store.free_space()

    def quarantine(self) -> Losses:
        """Rename the file of a corrupt store; return its losses, including all its rows."""
        store, self._store = self._store, None
        if store is None:
            return {}
        losses = store.state_if_abandoned().losses
        try:
            store.quarantine()
        except LocalStorageError:  # the file keeps its name; the next store gets another name
            pass
        return losses

    def replace_deleted(self, losses: Losses) -> tuple[CallResult[int], int]:
        """Copy the rows of a deleted file to a new one.

        A deleted file stays readable while it is open. Returns the number of copied rows as a
        ``CallResult``, and the number of lost rows.
        """
        old, self._store = self._store, None
        if old is None:
            return CallResult(Progress.CLOSED), 0
        result = self.call(losses, (), copy_rows, old)
        left = old.size()
        try:
            old.close()
        except LocalStorageError:  # ``left`` counts its rows
            pass
        return result, left

    def close(self, acked: Sequence[int]) -> bool:
        """Delete ``acked`` rows and close the store; return whether the rows were deleted."""
        store, self._store = self._store, None
        return store is not None and delete_and_close(store, acked)


# -- operations on a store


def append(
    store: Store, rows: Sequence[tuple[str, str, bytes]], want_stats: bool
) -> BufferStats | None:
    """Append rows; with ``want_stats``, return the stats from before the append.

    A call whose read of the stats fails is repeated. If the read came after the append, the
    repeated call would append the rows again.
    """
    stats = store.stats() if want_stats else None
    store.append(rows)
    return stats


def append_events(store: Store, payloads: Sequence[bytes], want_stats: bool) -> BufferStats | None:
    """Append events without keys; with ``want_stats``, return the stats from before the append."""
    stats = store.stats() if want_stats else None
    store.append_events(payloads)
    return stats


def run_queries(
    read: Callable[[int, int, int, Sequence[str]], T], queries: Sequence[RowQuery], max_bytes: int
) -> list[T | list[BufferEntry]]:
    """Return the rows for each query. A query with a limit of 0 returns no rows."""
    return [
        read(after, limit, max_bytes, kinds) if limit > 0 else [] for after, limit, kinds in queries
    ]


def read_next(
    store: Store,
    results: RowQuery,
    events: RowQuery,
    max_bytes: int,
    want_stats: bool,
    vacuum: bool,
) -> ReadResult:
    """Read the next rows; with ``vacuum``, run a vacuum step if there are no rows."""
    rows_by_query = run_queries(store.drain, (results, events), max_bytes)
    stats = store.stats() if want_stats else None
    vacuumed = vacuum_step(store) if vacuum and not any(rows_by_query) else None
    return ReadResult(rows_by_query[0], rows_by_query[1], stats, vacuumed)


def claim(
    store: Store, key: str, now: float, provisional_result: bytes, lookup: LedgerLookup | None
) -> LedgerEntry | None:
    """Insert a command as started, or return its entry if any process's store has one."""
    elsewhere = None
    if lookup is not None and isinstance(store, BufferStore):
        # Not for a store in memory: its calls run on the hub, where no file may be read.
        elsewhere = lookup(store.path, key)
    return elsewhere or store.claim(key, now, provisional_result)


def vacuum_step(store: Store) -> bool:
    """Run one vacuum step; return whether the vacuum is complete."""
    try:
        return store.vacuum_step()
    except LocalStorageError:  # the next append raises if the error persists
        return False


def copy_rows(target: Store, source: Store) -> int:
    """Move rows, losses and ledger entries to another store; return the number of rows.

    After an error, some rows may be in both stores.
    """
    state, copied = source.export_state(), 0
    while rows := source.drain(0, COPY_ROWS, COPY_BYTES, (EVENT, RESULT, PROJECTION)):
        target.import_rows(rows)
        source.confirm([row.id for row in rows])
        copied += len(rows)
    target.import_state(state)
    return copied


def delete_and_close(store: Store, acked: Sequence[int]) -> bool:
    """Delete ``acked`` rows and close the store; return whether the rows were deleted."""
    try:
        if acked:
            store.confirm(acked)
        deleted = True
    except LocalStorageError:  # the process that adopts the file sends these rows again
        deleted = False
    try:
        store.close()
    except LocalStorageError:  # the file stays, and another process adopts it
        pass
    return deleted
