"""The durable store: one SQLite file of one living process."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from heapq import merge
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from z4j_bare.buffer import batches, queries
from z4j_bare.buffer import files as paths
from z4j_bare.buffer.accounting import Accounting, RowTransaction
from z4j_bare.buffer.disk_usage import ROW_OVERHEAD, DiskUsage
from z4j_bare.buffer.errors import storage_call, translate_errors
from z4j_bare.buffer.ledger import Ledger
from z4j_bare.buffer.lock import OwnerLock
from z4j_bare.buffer.rows import (
    CAPACITY,
    CORRUPTION,
    EVENT,
    EVICTION_ORDER,
    PAYLOAD,
    RESULT,
    BufferEntry,
    BufferStats,
    LedgerEntry,
    Row,
    StoreState,
    batch_timestamp,
    refuse_unknown_kinds,
    replace_surrogates,
    take_fitting,
)
from z4j_bare.buffer.schema import connect, migrate, transaction
from z4j_bare.errors import LocalStorageError
from z4j_bare.interfaces import IStore

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

MAX_ROWS = 100_000
MAX_BYTES = 256 * 1024 * 1024
#: An empty store takes 0.1 MiB with WAL and SHM; a cap below this one would be a store that can hold nothing.
MIN_BYTES = 1024 * 1024
#: Events that a full disk costs at a time: this many, or a tenth if that is more.
FULL_DISK_EVICTION = 500

#: Rows to take: of ``None``, entries whose ids are still to be given; of a time, the payloads of events that came together.
InsertGroup = tuple[float | None, "Sequence[Any]"]


@implementer(IStore)
class BufferStore:
    """Rows, loss counters and the ledger of commands in one file, bounded in rows and in bytes on disk.

    The constructor takes ownership (see ``lock``) and opens ``path``, or creates it unless ``create`` is
    false (which is for adopting what another process left). ``busy_timeout`` is in seconds, 0 fails at once.
    ``deployment`` says whose rows these are, in one name or several: a store that shares none of them is refused,
    its rows must not reach our brain.

    ``max_bytes`` bounds the file with WAL and SHM: rows get seven eighths of it, results of the ledger a
    sixteenth of that, and the rest is for the WAL. When a foreign reader keeps the WAL from being shortened,
    ``append`` raises as soon as the cap is passed.
    """

    durable = True
    #: What the user should know about where this store lies; empty when it lies where it was wanted.
    notice = ""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        deployment: str = "",
        busy_timeout: float = 1.0,
        create: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = paths.absolute(path)
        self._max_rows = max(1, max_rows)
        self._max_bytes = max(MIN_BYTES, max_bytes)
        self._budget = self._max_bytes - self._max_bytes // 8
        self._clock = clock
        self._pid = os.getpid()
        self._closed = False
        paths.private_directory(self.path.parent)
        self._lock = OwnerLock(paths.lock_path(self.path))
        created = False
        try:
            with translate_errors(self.path, "open"):
                if create and not os.path.lexists(self.path):
                    paths.create_file(self.path)
                    created = True
                self._open(deployment, busy_timeout)
        except BaseException:
            self._release(delete=created)
            raise
        self._lock.pinned = self._connection

    # -- the queue

    @storage_call
    def append(self, rows: Sequence[Row]) -> int:
        """Commit ``(kind, key, payload)`` rows in one transaction; return how many rows the caps cost.

        The oldest leave first, events before anything else. A row that is larger than all the room there is,
        or an event that finds only rows more precious than itself, is counted as lost at once.
        """
        refuse_unknown_kinds(rows)
        if all(kind == EVENT and not key for kind, key, _ in rows):
            return self._commit([(self._clock(), [payload for _, _, payload in rows])])
        now = self._clock()
        safe = [
            (kind, key if key.isascii() else replace_surrogates(key), payload)
            for kind, key, payload in rows
        ]
        return self._commit([(None, [BufferEntry(0, *row, now, 0) for row in safe])])

    @storage_call
    def append_events(self, payloads: Sequence[bytes]) -> int:
        """Commit events without keys as ``append`` does."""
        return self._commit([(self._clock(), payloads)])

    @storage_call
    def import_rows(self, rows: Sequence[BufferEntry]) -> int:
        """Commit rows of another store as ``append`` does; they get new ids and keep their age and attempts."""
        groups = ((at, list(group)) for at, group in groupby(rows, batch_timestamp))
        return self._commit(
            [(at, rows if at is None else list(map(PAYLOAD, rows))) for at, rows in groups]
        )

    @storage_call
    def import_state(self, export_state: StoreState) -> None:
        """Take another store's losses for its own, as produced here and lost, and learn of its commands."""
        with self._accounting.change() as change:
            change.lost.update(export_state.losses)
            change.produced = sum(export_state.losses.values())
        for entry in export_state.ledger:
            self._ledger.import_state(entry)

    @storage_call
    def export_state(self) -> StoreState:
        """Return what an heir has to know besides the rows."""
        return StoreState(dict(self._accounting.lost), self._ledger.recent_entries(self._clock()))

    @storage_call
    def free_space(self) -> int:
        """Make room on a full disk: shorten the files, drop the oldest events; return how many that cost."""
        self._space.reclaim_all()
        with self._accounting.change() as change:
            change.remove(
                self._oldest(EVENT, max(FULL_DISK_EVICTION, self._accounting.rows // 10), 0),
                CAPACITY,
            )
        self._space.reclaim_all()
        return sum(change.lost.values())

    @storage_call
    def drain(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry]:
        """Return the oldest rows with ``id > after``: at most ``limit``, of ``max_bytes`` together or one."""
        found = self.read_cached(after, limit, max_bytes, kinds)
        return self._read(after, limit, max_bytes, kinds) if found is None else found

    def read_cached(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry] | None:
        """Return what ``drain`` does, or ``None`` if that takes a look at the file. On any thread, between other calls."""
        if EVENT not in kinds and not self._accounting.non_events:
            return []
        alone = tuple(kinds) == (EVENT,) and not self._accounting.unbatched_events
        return self._accounting.batches.read_cached(after, limit, max_bytes) if alone else None

    def _read(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry]:
        # An open cursor would hold a snapshot, and with it the WAL.
        with (
            closing(
                self._connection.execute(queries.drain(kinds), (after, max(0, limit)))
            ) as cursor,
            closing(
                self._accounting.batches.read(after) if EVENT in kinds else empty_iterator()
            ) as batched,
        ):
            # Ids differ: nothing else is compared.
            return take_fitting(merge(map(BufferEntry._make, cursor), batched), limit, max_bytes)

    @storage_call
    def confirm(self, ids: Sequence[int]) -> int:
        """Delete delivered rows; return how many there were."""
        with self._accounting.change() as change:
            change.confirmed = change.remove(ids)
        self._shrink_files()  # a deletion, too, is written to the log first
        return change.confirmed

    @storage_call
    def discard(self, ids: Sequence[int], reason: str) -> int:
        """Delete undeliverable rows and count them under ``reason`` in the same transaction."""
        with self._accounting.change() as change:
            removed = change.remove(ids, reason)
        self._shrink_files()
        return removed

    @storage_call
    def increment_attempts(self, ids: Sequence[int]) -> None:
        """Note that these rows were on the wire when a session died."""
        with self._accounting.change() as change:
            change.increment_attempts(ids)
        self._shrink_files()  # a number changed, and the log holds the whole row once more

    @storage_call
    def stats(self) -> BufferStats:
        """Return rows, bytes, age of the oldest row and the counters.

        Raises when the file has lost its name: what SQLite goes on writing would vanish with this process.
        """
        self.path.lstat()
        oldest = self._accounting.oldest()
        age = None if oldest is None else max(0.0, self._clock() - oldest)
        return self._accounting.stats(self._space.disk_bytes(), age)

    def cached_stats(self) -> BufferStats:
        """Return what ``stats`` would, without asking a disk that has failed: neither bytes nor age."""
        return self._accounting.stats(0, None)

    @storage_call
    def integrity_ok(self) -> bool:
        """Return whether the file can be read from end to end; slow, for one that is suspected."""
        try:
            return bool(self._connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
        except sqlite3.DatabaseError:
            return False

    def state_if_abandoned(self) -> StoreState:
        """Return the losses when nothing here can be read any more; most rows are events, and the others cannot be told."""
        lost = dict(self._accounting.lost)
        lost[CORRUPTION, EVENT] = lost.get((CORRUPTION, EVENT), 0) + self._accounting.rows
        return StoreState(lost)

    def size(self) -> int:
        """Return the number of rows."""
        return self._accounting.rows

    def byte_size(self) -> int:
        """Return the bytes of all payloads."""
        return self._accounting.payload_bytes

    # -- the ledger of commands

    @storage_call
    def claim(self, key: str, now: float, provisional_result: bytes = b"") -> LedgerEntry | None:
        """Enter command ``key`` as started; return the earlier entry if it was there already."""
        return self._ledger.claim(key, now, provisional_result)

    @storage_call
    def settle(self, key: str, result: bytes, now: float) -> None:
        """Mark command ``key`` done and keep its result for redeliveries."""
        self._ledger.settle(key, result, now)

    @storage_call
    def answer(self, key: str, result: bytes, now: float) -> None:
        """Mark command ``key`` done and append its result as a row, both or neither."""
        row = BufferEntry(0, RESULT, replace_surrogates(key), result, now, 0)
        self._commit([(None, [row])], lambda: self._ledger.settle(key, result, now))

    # -- the file

    @property
    def closed(self) -> bool:
        """Whether it is of no use: closed, or inherited through a fork."""
        return self._closed or self._pid != os.getpid()

    @storage_call
    def vacuum_step(self) -> bool:
        """Give some unused pages back to the file system, when idle; return whether nothing is left to do."""
        return self._space.vacuum_step()

    def close(self, *, ledger_transferred: bool = False) -> None:
        """Release the file; delete it when it holds neither rows nor young ledger entries. Idempotent.

        ``ledger_transferred`` says that an heir knows the commands.
        """
        if (
            self.closed
        ):  # a forked child must not close its parent's connection: that could remove the WAL
            return
        self._closed = True
        delete = False
        try:
            with translate_errors(self.path, "close"):
                delete = self._accounting.rows == 0 and (
                    ledger_transferred or self._ledger.count_recent(self._clock()) == 0
                )
                self._connection.close()  # the last connection checkpoints, and removes -wal and -shm
        finally:
            self._release(delete=delete)

    def quarantine(self) -> None:
        """Close a corrupt store without deleting it, and rename its file; see ``paths.quarantine``."""
        self.check()
        self._closed = True
        with translate_errors(self.path, "set aside"):
            try:
                self._connection.close()
            finally:
                try:
                    paths.quarantine(self.path, self._clock())
                finally:
                    self._lock.release(delete=not os.path.lexists(self.path))

    def check(self) -> None:
        """Raise ``LocalStorageError`` if the store is closed or was inherited through a fork."""
        if self.closed:
            state = "closed" if self._closed else "of the process that forked this one"
            raise LocalStorageError(f"the store {self.path} is {state}")

    # -- how

    def _open(self, deployment: str, busy_timeout: float) -> None:
        paths.check_file(self.path)
        self._connection = connect(
            self.path, busy_timeout=busy_timeout, max_bytes=self._max_bytes, deployment=deployment
        )
        with transaction(self._connection):
            migrate(self._connection, deployment=deployment, now=self._clock())
        self._load()

    def _load(self) -> None:
        self._accounting = Accounting(
            self._connection, min(batches.MAX_BATCH_BYTES, self._budget // 32)
        )
        self.buffer_id = self._accounting.buffer_id
        self._space = DiskUsage(self._connection, self.path, self._max_bytes)
        self._space.shrink_if_over_cap()  # a dead owner's log, just moved into the file, takes its room twice
        self._ledger = Ledger(self._connection, self._budget // 16)

    def _release(self, *, delete: bool) -> None:
        connection: sqlite3.Connection | None = getattr(self, "_connection", None)
        with translate_errors(self.path, "close"):
            try:
                if connection is not None:
                    connection.close()
                for file in paths.store_files(self.path) if delete else ():
                    paths.remove(file)
            finally:
                self._lock.release(delete=not os.path.lexists(self.path))

    def _commit(self, lots: Sequence[InsertGroup], also: Callable[[], None] = lambda: None) -> int:
        """Commit rows, and what ``also`` writes, in one transaction; return how many rows the caps cost."""
        if not any(rows for _, rows in lots):
            return 0
        self._space.check_capacity()
        with self._accounting.change() as change:
            for at, rows in lots:
                self._insert(at, rows, change)
            self._evict(change)
            also()
        self._shrink_files()
        return sum(change.lost.values())

    def _insert(self, at: float | None, rows: Sequence[Any], change: RowTransaction) -> None:
        length = len if at is not None else _payload_length
        admitted = rows
        if max(map(length, rows)) > self._budget:
            admitted = [row for row in rows if length(row) <= self._budget]
            for row in rows:
                if length(row) > self._budget:
                    change.reject(EVENT if at is not None else row.kind, CAPACITY)
        if at is not None:
            change.insert_events(admitted, at)
        else:
            change.insert(admitted)

    def _shrink_files(self) -> None:
        try:
            self._space.shrink_if_over_cap()
        except (
            sqlite3.Error,
            OSError,
        ):  # the rows are safe; if this is serious, the next append says so
            pass

    def _evict(self, change: RowTransaction) -> None:
        for kind in EVICTION_ORDER:
            while True:
                excess_rows = self._accounting.rows + change.rows - self._max_rows
                excess_bytes = self._space.live_bytes() - self._budget
                if excess_rows <= 0 and excess_bytes <= 0:
                    return
                victims = self._oldest(kind, excess_rows, excess_bytes)
                if not victims:
                    break
                change.remove(victims, CAPACITY)

    def _oldest(self, kind: str, excess_rows: int, excess_bytes: int) -> list[int]:
        """Return the oldest rows of a kind that make up the excess, as far as one step goes."""
        victims: list[int] = []
        limit = max(excess_rows, 1000)
        with (
            closing(self._connection.execute(queries.oldest(kind), (limit,))) as cursor,
            closing(
                self._accounting.batches.read(0) if kind == EVENT else empty_iterator()
            ) as batched,
        ):
            events = ((entry.id, len(entry.payload)) for entry in batched)
            for identity, length in islice(merge(cursor, events), limit):
                if len(victims) >= excess_rows and excess_bytes <= 0:
                    break
                victims.append(identity)
                excess_bytes -= length + ROW_OVERHEAD
        return victims


def empty_iterator() -> Generator[BufferEntry, None, None]:
    """Yield nothing, closeable."""
    yield from ()


def _payload_length(entry: BufferEntry) -> int:
    return len(entry.payload)
