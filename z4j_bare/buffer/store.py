"""The durable store: one SQLite file of one running process."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from heapq import merge
from itertools import groupby, islice
from typing import TYPE_CHECKING, NamedTuple

from zope.interface import implementer

from z4j_bare.buffer import batches, files, schema
from z4j_bare.buffer.accounting import Accounting, RowTransaction
from z4j_bare.buffer.disk_usage import ROW_OVERHEAD, DiskUsage
from z4j_bare.buffer.errors import storage_call, translate_errors
from z4j_bare.buffer.files import OwnerLock
from z4j_bare.buffer.ledger import Ledger
from z4j_bare.buffer.rows import (
    CAPACITY,
    CORRUPTION,
    DONE,
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
    reject_unknown_kinds,
    replace_surrogates,
    take_fitting,
)
from z4j_bare.buffer.schema import connect, migrate, transaction
from z4j_bare.errors import LocalStorageError
from z4j_bare.home import private_directory
from z4j_bare.interfaces import IStore

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

#: Default maximum number of rows.
MAX_ROWS = 100_000
#: Default maximum size in bytes.
MAX_BYTES = 256 * 1024 * 1024
#: Smallest size cap in bytes. An empty store with WAL and SHM takes 0.1 MiB.
MIN_BYTES = 1024 * 1024
#: Minimum number of events that one eviction on a full disk removes.
#: An eviction removes a tenth of all rows if that is more.
FULL_DISK_EVICTION = 500
#: If truncating free pages and the WAL on a full disk frees this many bytes, no event is evicted.
#: The next flush needs less: it writes at most 256 events and the pages that they change.
ENOUGH_SPACE = 512 * 1024


class InsertGroup(NamedTuple):
    """Rows to insert: entries without ids, or payloads of events with the same ``created_at``."""

    entries: Sequence[BufferEntry] = ()
    payloads: Sequence[bytes] = ()
    #: ``created_at`` of the ``payloads``.
    at: float = 0.0


@implementer(IStore)
class BufferStore:
    """A file with rows, loss counters and the ledger, with caps on rows and bytes.

    The constructor takes the owner lock of ``path`` (``files.OwnerLock``) and opens the file.

    :param max_bytes: maximum size in bytes with WAL and SHM. The tables get seven eighths, and the
        WAL gets the rest. A sixteenth of the tables' share is for results in the ledger. If the
        files exceed ``max_bytes`` because another process reads the WAL, ``append`` raises an
        error.
    :param deployment: the deployment id. A store of another deployment is refused, because the rows
        of such a store must not reach this brain.
    :param busy_timeout: seconds to wait for a locked file.
    :param create: whether to create a missing file; ``False`` to adopt a store.
    """

    durable = True
    #: A warning about the location of this store; empty if it is in the configured directory.
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
        self.path = files.absolute(path)
        self._max_rows = max(1, max_rows)
        self._max_bytes = max(MIN_BYTES, max_bytes)
        self._budget = self._max_bytes - self._max_bytes // 8
        self._clock = clock
        self._pid = os.getpid()
        self._closed = False
        private_directory(self.path.parent)
        self._lock = OwnerLock(files.lock_path(self.path))
        created = False
        try:
            with translate_errors(self.path, "open"):
                if create and not os.path.lexists(self.path):
                    files.create_file(self.path)
                    created = True
                self._open(deployment, busy_timeout)
        except BaseException:
            self._release(delete=created)
            raise
        self._lock.pinned = self._connection

    # -- rows

    @storage_call
    def append(self, rows: Sequence[Row]) -> int:
        """Commit ``(kind, key, payload)`` rows in one transaction; return how many rows were lost.

        If the store exceeds a cap, the oldest events are evicted, and then the oldest rows of other
        kinds. A row that is larger than the tables' share of the bytes counts as lost. A new event
        counts as lost if rows of other kinds fill the store.
        """
        reject_unknown_kinds(rows)
        if all(kind == EVENT and not key for kind, key, _ in rows):
            payloads = [payload for _, _, payload in rows]
            return self._commit([InsertGroup(payloads=payloads, at=self._clock())])
        now = self._clock()
        safe = [
            (kind, key if key.isascii() else replace_surrogates(key), payload)
            for kind, key, payload in rows
        ]
        return self._commit([InsertGroup([BufferEntry(0, *row, now, 0) for row in safe])])

    @storage_call
    def append_events(self, payloads: Sequence[bytes]) -> int:
        """Commit events without keys; return how many rows were lost."""
        return self._commit([InsertGroup(payloads=payloads, at=self._clock())])

    @storage_call
    def import_rows(self, rows: Sequence[BufferEntry]) -> int:
        """Commit rows of another store; return how many rows were lost."""
        groups = []
        for at, group in groupby(rows, batch_timestamp):
            entries = list(group)
            if at is None:
                groups.append(InsertGroup(entries))
            else:
                groups.append(InsertGroup(payloads=list(map(PAYLOAD, entries)), at=at))
        return self._commit(groups)

    @storage_call
    def import_state(self, state: StoreState) -> None:
        """Add another store's losses and ledger entries to this store."""
        with self._accounting.transaction() as rows:
            rows.change.import_losses(state.losses)
        for entry in state.ledger:
            self._ledger.import_entry(entry)

    @storage_call
    def export_state(self) -> StoreState:
        """Return the losses and the recent ledger entries."""
        return StoreState(
            dict(self._accounting.counts.lost), self._ledger.recent_entries(self._clock())
        )

    @storage_call
    def free_space(self) -> int:
        """Shrink the files on a full disk; if this frees too little, evict the oldest events.

        Returns the number of evicted events.
        """
        size = self._space.disk_bytes()
        self._space.reclaim_all()
        if size - self._space.disk_bytes() >= ENOUGH_SPACE:
            return 0
        number = max(FULL_DISK_EVICTION, self.size() // 10)
        with self._accounting.transaction() as rows:
            rows.remove(self._oldest(EVENT, number, 0), CAPACITY)
        self._space.reclaim_all()
        return sum(rows.change.lost.values())

    @storage_call
    def drain(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry]:
        """Return the oldest rows of ``kinds`` with ``id > after`` without deleting them.

        See ``IStore.drain`` for the limits.
        """
        cached = self.read_cached(after, limit, max_bytes, kinds)
        return self._read(after, limit, max_bytes, kinds) if cached is None else cached

    def read_cached(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry] | None:
        """Do the same as :meth:`drain`, but without I/O; return ``None`` if I/O is needed."""
        if EVENT not in kinds and not self._accounting.counts.non_events:
            return []
        if tuple(kinds) != (EVENT,) or self._accounting.unbatched_events:
            return None
        return self._accounting.batches.read_cached(after, limit, max_bytes)

    def _read(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry]:
        query = schema.select_rows(kinds)
        # Close the cursors, because an open cursor keeps a snapshot and blocks truncation of the
        # WAL.
        with (
            closing(self._connection.execute(query, (after, max(0, limit)))) as cursor,
            closing(self._batched(after, kinds)) as batched,
        ):
            # Ids are unique, so ``merge`` never compares other fields.
            return take_fitting(merge(map(BufferEntry._make, cursor), batched), limit, max_bytes)

    def _batched(self, after: int, kinds: Sequence[str]) -> Generator[BufferEntry, None, None]:
        """Return a generator of the events in batches, if ``kinds`` contains events."""
        if EVENT in kinds:
            return self._accounting.batches.read(after)
        return empty_iterator()

    @storage_call
    def confirm(self, ids: Sequence[int]) -> int:
        """Delete delivered rows; return the number of deleted rows."""
        with self._accounting.transaction() as rows:
            rows.change.confirmed = rows.remove(ids)
        self._shrink_files()  # the deletion has made the WAL larger
        return rows.change.confirmed

    @storage_call
    def discard(self, ids: Sequence[int], reason: str) -> int:
        """Delete undeliverable rows and count the rows as lost, in one transaction."""
        with self._accounting.transaction() as rows:
            removed = rows.remove(ids, reason)
        self._shrink_files()
        return removed

    @storage_call
    def increment_attempts(self, ids: Sequence[int]) -> None:
        """Add 1 to ``attempts`` of each of these rows."""
        with self._accounting.transaction() as rows:
            rows.increment_attempts(ids)
        self._shrink_files()  # the update has made the WAL larger

    @storage_call
    def stats(self) -> BufferStats:
        """Return the counters, the size of the files and the age of the oldest row.

        Raises an error if the file was deleted. SQLite would write to the deleted file without an
        error, and the rows would be lost with the process.
        """
        self.path.lstat()
        oldest = self._accounting.oldest()
        age = None if oldest is None else max(0.0, self._clock() - oldest)
        return self._accounting.stats(self._space.disk_bytes(), age)

    def cached_stats(self) -> BufferStats:
        """Return the counters without disk access. The size is 0 and the age is ``None``."""
        return self._accounting.stats(0, None)

    @storage_call
    def integrity_ok(self) -> bool:
        """Return whether the whole file is readable. The check is slow."""
        try:
            return bool(self._connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
        except sqlite3.DatabaseError:
            return False

    def state_if_abandoned(self) -> StoreState:
        """Return the losses after the file is abandoned: all its rows count as lost events.

        The kinds of the rows may be unreadable in a corrupt file, and most rows are events.
        """
        lost = dict(self._accounting.counts.lost)
        lost[CORRUPTION, EVENT] = lost.get((CORRUPTION, EVENT), 0) + self.size()
        return StoreState(lost)

    def size(self) -> int:
        """Return the number of rows."""
        return self._accounting.counts.rows

    def byte_size(self) -> int:
        """Return the size of all payloads in bytes."""
        return self._accounting.counts.payload_bytes

    # -- the ledger of commands

    @storage_call
    def claim(self, key: str, now: float, provisional_result: bytes = b"") -> LedgerEntry | None:
        """Insert command ``key`` as started, or return its existing entry."""
        return self._ledger.claim(key, now, provisional_result)

    @storage_call
    def settle(self, key: str, result: bytes, now: float, state: str = DONE) -> None:
        """Mark command ``key`` as done and store its result in case the command is redelivered.

        :param state: ``failed`` if a later claim may start the command again.
        """
        self._ledger.settle(key, result, now, state)

    @storage_call
    def settle_and_queue(self, key: str, result: bytes, now: float) -> None:
        """Mark command ``key`` as done and append its result as a row, in one transaction."""
        row_key = key if key.isascii() else replace_surrogates(key)
        row = BufferEntry(0, RESULT, row_key, result, now, 0)
        self._commit([InsertGroup([row])], lambda: self._ledger.settle(key, result, now))

    # -- the file

    @property
    def closed(self) -> bool:
        """Whether the store is closed, or belongs to the parent of this forked process."""
        return self._closed or self._pid != os.getpid()

    @storage_call
    def vacuum_step(self) -> bool:
        """Release some unused pages to the file system; return whether the vacuum is complete."""
        return self._space.vacuum_step()

    def close(self, *, ledger_transferred: bool = False) -> None:
        """Close the file; delete it if it has neither rows nor recent ledger entries. Idempotent.

        :param ledger_transferred: whether another store has imported the ledger entries.
        """
        # A forked child must not close its parent's connection, because closing could delete the
        # WAL.
        if self.closed:
            return
        self._closed = True
        delete = False
        try:
            with translate_errors(self.path, "close"):
                delete = self.size() == 0 and (
                    ledger_transferred or self._ledger.count_recent(self._clock()) == 0
                )
                # Closing the last connection runs a checkpoint and deletes WAL and SHM.
                self._connection.close()
        finally:
            self._release(delete=delete)

    def quarantine(self) -> None:
        """Close a corrupt store and rename its file; see ``files.quarantine``."""
        self.check()
        self._closed = True
        with translate_errors(self.path, "quarantine"):
            try:
                self._connection.close()
            finally:
                try:
                    files.quarantine(self.path, self._clock())
                finally:
                    self._lock.release(delete=not os.path.lexists(self.path))

    def check(self) -> None:
        """Raise ``LocalStorageError`` if the store is :attr:`closed`."""
        if self.closed:
            state = "closed" if self._closed else "owned by the parent of this forked process"
            raise LocalStorageError(f"the store {self.path} is {state}")

    # -- internals

    def _open(self, deployment: str, busy_timeout: float) -> None:
        files.check_file(self.path)
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
        # After the death of the owner, opening the store copies the rows of the WAL into the file.
        # The rows take twice their space until the WAL is truncated.
        self._space.shrink_if_over_cap()
        self._ledger = Ledger(self._connection, self._budget // 16)

    def _release(self, *, delete: bool) -> None:
        connection: sqlite3.Connection | None = getattr(self, "_connection", None)
        with translate_errors(self.path, "close"):
            try:
                if connection is not None:
                    connection.close()
                for file in files.store_files(self.path) if delete else ():
                    files.remove(file)
            finally:
                self._lock.release(delete=not os.path.lexists(self.path))

    def _commit(
        self, groups: Sequence[InsertGroup], extra: Callable[[], None] = lambda: None
    ) -> int:
        """Commit rows and the changes that ``extra`` makes; return how many rows were lost."""
        if not any(group.entries or group.payloads for group in groups):
            return 0
        self._space.check_capacity()
        with self._accounting.transaction() as rows:
            for group in groups:
                self._insert(group, rows)
            self._evict(rows)
            extra()
        self._shrink_files()
        return sum(rows.change.lost.values())

    def _insert(self, group: InsertGroup, rows: RowTransaction) -> None:
        """Insert a group. A row that is larger than the budget counts as lost."""
        entries, payloads = group.entries, group.payloads
        if payloads:
            if max(map(len, payloads)) > self._budget:
                payloads = [payload for payload in payloads if len(payload) <= self._budget]
                for _ in range(len(group.payloads) - len(payloads)):
                    rows.change.reject(EVENT, CAPACITY)
            rows.insert_events(payloads, group.at)
            return
        if max(map(len, map(PAYLOAD, entries))) > self._budget:
            entries = [entry for entry in entries if len(entry.payload) <= self._budget]
            for entry in group.entries:
                if len(entry.payload) > self._budget:
                    rows.change.reject(entry.kind, CAPACITY)
        rows.insert(entries)

    def _shrink_files(self) -> None:
        try:
            self._space.shrink_if_over_cap()
        except (sqlite3.Error, OSError):
            # The rows are committed. The next append raises if the error persists.
            pass

    def _evict(self, rows: RowTransaction) -> None:
        for kind in EVICTION_ORDER:
            while True:
                excess_rows = self.size() + rows.change.rows - self._max_rows
                excess_bytes = self._space.live_bytes() - self._budget
                if excess_rows <= 0 and excess_bytes <= 0:
                    return
                evicted = self._oldest(kind, excess_rows, excess_bytes)
                if not evicted:
                    break
                rows.remove(evicted, CAPACITY)

    def _oldest(self, kind: str, excess_rows: int, excess_bytes: int) -> list[int]:
        """Return the ids of the oldest rows of ``kind`` whose deletion ends the excess.

        Returns at most 1,000 ids, or ``excess_rows`` if that is more.
        """
        ids: list[int] = []
        limit = max(excess_rows, 1000)
        with (
            closing(self._connection.execute(schema.select_oldest(kind), (limit,))) as cursor,
            closing(self._batched(0, (kind,))) as batched,
        ):
            events = ((entry.id, len(entry.payload)) for entry in batched)
            for identity, length in islice(merge(cursor, events), limit):
                if len(ids) >= excess_rows and excess_bytes <= 0:
                    break
                ids.append(identity)
                excess_bytes -= length + ROW_OVERHEAD
        return ids


def empty_iterator() -> Generator[BufferEntry, None, None]:
    """Return an empty iterator that has a method ``close``, unlike ``iter(())``."""
    yield from ()
