"""The store in memory, which replaces a failed disk. Its rows are lost with the process."""

from __future__ import annotations

import heapq
import time
import uuid
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from zope.interface import implementer

from z4j_bare.buffer.accounting import Counts
from z4j_bare.buffer.rows import (
    CAPACITY,
    DONE,
    EVENT,
    EVICTION_ORDER,
    FAILED,
    LEDGER_CAP,
    RESULT,
    STARTED,
    BufferEntry,
    BufferStats,
    LedgerEntry,
    Row,
    StoreState,
    reject_unknown_kinds,
    replace_surrogates,
    take_fitting,
)
from z4j_bare.errors import LocalStorageError
from z4j_bare.interfaces import IStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: Default maximum number of rows. The cap on disk is higher.
MAX_ROWS = 10_000
#: Default maximum size in bytes.
MAX_BYTES = 16 * 1024 * 1024

#: Measured bytes of memory of a row's objects, without the content of key and payload.
ROW_OVERHEAD = 204


@implementer(IStore)
class MemoryStore:
    """A store with one deque for each kind of row. See ``BufferStore`` for the methods.

    :param max_bytes: maximum bytes of memory of all rows. Results in the ledger may take a
        sixteenth of this number in addition.
    """

    durable = False

    def __init__(
        self,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.buffer_id = str(uuid.uuid4())
        self.closed = False
        self._max_rows = max(1, max_rows)
        self._max_bytes = max_bytes
        self._clock = clock
        self._queues: dict[str, deque[BufferEntry]] = {kind: deque() for kind in EVICTION_ORDER}
        self._counts = Counts()
        self._bytes = 0
        self._ledger: dict[str, LedgerEntry] = {}
        self._ledger_bytes = 0

    def append(self, rows: Sequence[Row]) -> int:
        """Append rows; return how many rows were lost."""
        self._check()
        reject_unknown_kinds(rows)
        now = self._clock()
        return self._append(
            [
                BufferEntry(
                    0, kind, key if key.isascii() else replace_surrogates(key), payload, now, 0
                )
                for kind, key, payload in rows
            ]
        )

    def append_events(self, payloads: Sequence[bytes]) -> int:
        """Append events without keys; return how many rows were lost."""
        return self.append([(EVENT, "", payload) for payload in payloads])

    def import_rows(self, rows: Sequence[BufferEntry]) -> int:
        """Append rows of another store; return how many rows were lost."""
        self._check()
        return self._append(rows)

    def import_state(self, state: StoreState) -> None:
        """Add another store's losses and ledger entries to this store."""
        self._check()
        self._counts.import_losses(state.losses)
        for entry in state.ledger:
            earlier = self._ledger.get(entry.key)
            if entry.supersedes(earlier):
                self._insert(entry)

    def export_state(self) -> StoreState:
        """Return the losses and all ledger entries."""
        self._check()
        return StoreState(dict(self._counts.lost), tuple(self._ledger.values()))

    def _append(self, rows: Sequence[BufferEntry]) -> int:
        rejected = 0
        for row in rows:
            if _size(row) > self._max_bytes:
                self._counts.reject(row.kind, CAPACITY)
                rejected += 1
                continue
            entry = row._replace(id=self._counts.produced + 1)
            self._queues[row.kind].append(entry)
            self._counts.insert(1, 0 if row.kind == EVENT else 1, len(row.payload))
            self._bytes += _size(row)
        return rejected + self._evict()

    def drain(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry]:
        """Return the oldest rows of ``kinds`` with ``id > after`` without deleting them."""
        self._check()
        queues = [self._queues[kind] for kind in EVICTION_ORDER if kind in kinds]
        rows = heapq.merge(*queues, key=lambda entry: entry.id)
        return take_fitting((entry for entry in rows if entry.id > after), limit, max_bytes)

    def read_cached(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry] | None:
        """Call :meth:`drain`, because a store in memory needs no I/O."""
        return self.drain(after, limit, max_bytes, kinds)

    def confirm(self, ids: Sequence[int]) -> int:
        """Delete delivered rows; return the number of deleted rows."""
        self._check()
        removed = len(self._remove(ids))
        self._counts.confirmed += removed
        return removed

    def discard(self, ids: Sequence[int], reason: str) -> int:
        """Delete undeliverable rows and count them as lost for ``reason``."""
        self._check()
        return len(self._remove(ids, reason))

    def increment_attempts(self, ids: Sequence[int]) -> None:
        """Add 1 to ``attempts`` of each of these rows."""
        self._check()
        wanted = frozenset(ids)
        for kind, queue in self._queues.items():
            self._queues[kind] = deque(
                entry._replace(attempts=entry.attempts + 1) if entry.id in wanted else entry
                for entry in queue
            )

    def stats(self) -> BufferStats:
        """Return the counters, the size in bytes and the age of the oldest row."""
        self._check()
        oldest = min(
            (queue[0] for queue in self._queues.values() if queue),
            key=lambda entry: entry.id,
            default=None,
        )
        age = None if oldest is None else max(0.0, self._clock() - oldest.created_at)
        return self._counts.stats(self.buffer_id, self._bytes, age, durable=False)

    def cached_stats(self) -> BufferStats:
        """Call :meth:`stats`, because a store in memory needs no I/O."""
        return self.stats()

    def size(self) -> int:
        """Return the number of rows."""
        return self._counts.rows

    def byte_size(self) -> int:
        """Return the size of all payloads in bytes."""
        return self._counts.payload_bytes

    def claim(self, key: str, now: float, provisional_result: bytes = b"") -> LedgerEntry | None:
        """Insert command ``key`` as started, or return its existing entry."""
        self._check()
        key = replace_surrogates(key)
        earlier = self._ledger.get(key)
        if earlier is None or earlier.state == FAILED:
            self._insert(LedgerEntry(key, STARTED, provisional_result, now))
            return None
        return earlier

    def settle(self, key: str, result: bytes, now: float, state: str = DONE) -> None:
        """Mark command ``key`` as done and store its result in case the command is redelivered.

        :param state: ``failed`` if a later claim may start the command again.
        """
        self._check()
        self._insert(LedgerEntry(replace_surrogates(key), state, result, now))

    def settle_and_queue(self, key: str, result: bytes, now: float) -> None:
        """Mark command ``key`` as done and append its result as a row."""
        self.settle(key, result, now)
        self.append([(RESULT, key, result)])

    def vacuum_step(self) -> bool:
        """Return ``True``, because memory needs no vacuum."""
        self._check()
        return True

    def close(self) -> None:
        """Drop all rows and ledger entries. Idempotent."""
        self.closed = True
        self._ledger.clear()
        for queue in self._queues.values():
            queue.clear()
        self._counts.rows = self._counts.non_events = self._counts.payload_bytes = self._bytes = 0

    def _check(self) -> None:
        if self.closed:
            raise LocalStorageError("the store in memory is closed")

    def _delete(self, entry: BufferEntry, reason: str | None) -> None:
        self._counts.remove(entry.kind, 1, len(entry.payload), reason)
        self._bytes -= _size(entry)

    def _evict(self) -> int:
        evicted = 0
        for queue in self._queues.values():
            while queue and (self.size() > self._max_rows or self._bytes > self._max_bytes):
                self._delete(queue.popleft(), CAPACITY)
                evicted += 1
        return evicted

    def _remove(self, ids: Iterable[int], reason: str | None = None) -> list[BufferEntry]:
        """Delete rows and return them.

        Acks arrive oldest first, so most of the rows are at the heads of the queues.
        """
        wanted = set(ids)
        removed: list[BufferEntry] = []
        for queue in self._queues.values():
            while queue and queue[0].id in wanted:
                removed.append(queue.popleft())
            if len(removed) < len(wanted):
                removed += [entry for entry in queue if entry.id in wanted]
                remaining = [entry for entry in queue if entry.id not in wanted]
                queue.clear()
                queue.extend(remaining)
        for entry in removed:
            self._delete(entry, reason)
        return removed

    def _insert(self, entry: LedgerEntry) -> None:
        earlier = self._ledger.get(entry.key)
        self._ledger[entry.key] = entry
        self._ledger_bytes += len(entry.result) - (len(earlier.result) if earlier else 0)
        while len(self._ledger) > LEDGER_CAP:
            self._ledger_bytes -= len(self._ledger.pop(next(iter(self._ledger))).result)
        if self._ledger_bytes > self._max_bytes // 16:
            self._trim_results()

    def _trim_results(self) -> None:
        for key, entry in self._ledger.items():
            if self._ledger_bytes <= self._max_bytes // 16:
                return
            self._ledger_bytes -= len(entry.result)
            self._ledger[key] = replace(entry, result=b"")


def _size(entry: BufferEntry) -> int:
    """Return how many bytes of memory a row takes."""
    return len(entry.payload) + len(entry.key) + ROW_OVERHEAD
