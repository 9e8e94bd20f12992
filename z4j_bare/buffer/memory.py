"""The store for a disk that fails: the same contract in memory, lost with the process."""

from __future__ import annotations

import heapq
import time
import uuid
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from zope.interface import implementer

from z4j_bare.buffer.rows import (
    CAPACITY,
    DONE,
    EVENT,
    EVICTION_ORDER,
    LEDGER_CAP,
    RESULT,
    STARTED,
    BufferEntry,
    BufferStats,
    LedgerEntry,
    Row,
    StoreState,
    losses_by,
    refuse_unknown_kinds,
    replace_surrogates,
    take_fitting,
)
from z4j_bare.errors import LocalStorageError
from z4j_bare.interfaces import IStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: Far below the caps on disk: this is the memory of somebody's worker.
MAX_ROWS = 10_000
MAX_BYTES = 16 * 1024 * 1024

#: What a row costs besides key and payload: the entry, its number, the headers of its strings (measured).
OVERHEAD = 204


@implementer(IStore)
class MemoryStore:
    """Rows in one deque per kind; everything else as ``BufferStore`` promises it."""

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
        self._rows = self._bytes = self._payload = self._produced = self._confirmed = 0
        self._lost: dict[tuple[str, str], int] = {}
        self._ledger: dict[str, LedgerEntry] = {}
        self._ledger_bytes = 0

    def append(self, rows: Sequence[Row]) -> int:
        """Take rows in; return how many rows the caps cost, as ``BufferStore.append`` does."""
        self._check()
        refuse_unknown_kinds(rows)
        now = self._clock()
        return self._commit(
            [
                BufferEntry(
                    0, kind, key if key.isascii() else replace_surrogates(key), payload, now, 0
                )
                for kind, key, payload in rows
            ]
        )

    def append_events(self, payloads: Sequence[bytes]) -> int:
        """Take events without keys in, as ``append`` does."""
        return self.append([(EVENT, "", payload) for payload in payloads])

    def import_rows(self, rows: Sequence[BufferEntry]) -> int:
        """Take rows of another store; they get new ids and keep their age and attempts."""
        self._check()
        return self._commit(rows)

    def import_state(self, export_state: StoreState) -> None:
        """Take another store's losses for its own, and learn of its commands."""
        self._check()
        for (reason, kind), count in export_state.losses.items():
            self._produced += count
            self._lose(reason, kind, count)
        for entry in export_state.ledger:
            earlier = self._ledger.get(entry.key)
            if earlier is None or (earlier.state == STARTED and entry.state == DONE):
                self._insert(entry)

    def export_state(self) -> StoreState:
        """Return what an heir has to know besides the rows."""
        self._check()
        return StoreState(dict(self._lost), tuple(self._ledger.values()))

    def _commit(self, rows: Sequence[BufferEntry]) -> int:
        lost = 0
        for row in rows:
            self._produced += 1
            kind, entry = row.kind, row._replace(id=self._produced)
            if _weight(entry) > self._max_bytes:
                self._lose(CAPACITY, kind, 1)
                lost += 1
                continue
            self._queues[kind].append(entry)
            self._count(entry, 1)
        return lost + self._evict()

    def drain(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry]:
        """Return the oldest rows with ``id > after``: at most ``limit``, of ``max_bytes`` together or one."""
        self._check()
        queues = [self._queues[kind] for kind in EVICTION_ORDER if kind in kinds]
        rows = heapq.merge(*queues, key=lambda entry: entry.id)
        return take_fitting((entry for entry in rows if entry.id > after), limit, max_bytes)

    def read_cached(
        self, after: int, limit: int, max_bytes: int, kinds: Sequence[str]
    ) -> list[BufferEntry] | None:
        """Return what ``drain`` does: nothing here takes I/O."""
        return self.drain(after, limit, max_bytes, kinds)

    def confirm(self, ids: Sequence[int]) -> int:
        """Delete delivered rows; return how many there were."""
        self._check()
        removed = len(self._remove(ids))
        self._confirmed += removed
        return removed

    def discard(self, ids: Sequence[int], reason: str) -> int:
        """Delete undeliverable rows and count them under ``reason``."""
        self._check()
        removed = self._remove(ids)
        for entry in removed:
            self._lose(reason, entry.kind, 1)
        return len(removed)

    def increment_attempts(self, ids: Sequence[int]) -> None:
        """Note that these rows were on the wire when a session died."""
        self._check()
        wanted = frozenset(ids)
        for kind, queue in self._queues.items():
            self._queues[kind] = deque(
                entry._replace(attempts=entry.attempts + 1) if entry.id in wanted else entry
                for entry in queue
            )

    def stats(self) -> BufferStats:
        """Return rows, bytes, age of the oldest row and the counters."""
        self._check()
        oldest = min(
            (queue[0] for queue in self._queues.values() if queue),
            key=lambda entry: entry.id,
            default=None,
        )
        return BufferStats(
            rows=self._rows,
            bytes=self._bytes,
            payload_bytes=self._payload,
            oldest_age=None if oldest is None else max(0.0, self._clock() - oldest.created_at),
            lost=losses_by(self._lost, 0),
            lost_kinds=losses_by(self._lost, 1),
            produced=self._produced,
            confirmed=self._confirmed,
            buffer_id=self.buffer_id,
            durable=False,
        )

    def cached_stats(self) -> BufferStats:
        """Return the figures; memory does not fail."""
        return self.stats()

    def size(self) -> int:
        """Return the number of rows."""
        return self._rows

    def byte_size(self) -> int:
        """Return the bytes of all payloads."""
        return self._payload

    def claim(self, key: str, now: float, provisional_result: bytes = b"") -> LedgerEntry | None:
        """Enter command ``key`` as started; return the earlier entry if it was there already."""
        self._check()
        key = replace_surrogates(key)
        earlier = self._ledger.get(key)
        if earlier is None:
            self._insert(LedgerEntry(key, STARTED, provisional_result, now))
        return earlier

    def settle(self, key: str, result: bytes, now: float) -> None:
        """Mark command ``key`` done and keep its result for redeliveries."""
        self._check()
        self._insert(LedgerEntry(replace_surrogates(key), DONE, result, now))

    def answer(self, key: str, result: bytes, now: float) -> None:
        """Mark command ``key`` done and append its result as a row."""
        self.settle(key, result, now)
        self.append([(RESULT, key, result)])

    def vacuum_step(self) -> bool:
        """Do nothing: memory needs no tidying."""
        self._check()
        return True

    def close(self) -> None:
        """Forget everything. Idempotent."""
        self.closed = True
        self._ledger.clear()
        for queue in self._queues.values():
            queue.clear()
        self._rows = self._bytes = self._payload = 0

    def _check(self) -> None:
        if self.closed:
            raise LocalStorageError("the store in memory is closed")

    def _count(self, entry: BufferEntry, sign: int) -> None:
        self._rows += sign
        self._payload += sign * len(entry.payload)
        self._bytes += sign * _weight(entry)

    def _lose(self, reason: str, kind: str, count: int) -> None:
        self._lost[reason, kind] = self._lost.get((reason, kind), 0) + count

    def _evict(self) -> int:
        evicted = 0
        for kind, queue in self._queues.items():
            while queue and (self._rows > self._max_rows or self._bytes > self._max_bytes):
                self._count(queue.popleft(), -1)
                self._lose(CAPACITY, kind, 1)
                evicted += 1
        return evicted

    def _remove(self, ids: Iterable[int]) -> list[BufferEntry]:
        """Take rows out; acks come oldest first, so that most of them stand at the head of their queue."""
        wanted = set(ids)
        removed: list[BufferEntry] = []
        for queue in self._queues.values():
            while queue and queue[0].id in wanted:
                removed.append(queue.popleft())
            if len(removed) < len(wanted):
                removed += [entry for entry in queue if entry.id in wanted]
                kept = [entry for entry in queue if entry.id not in wanted]
                queue.clear()
                queue.extend(kept)
        for entry in removed:
            self._count(entry, -1)
        return removed

    def _insert(self, entry: LedgerEntry) -> None:
        earlier = self._ledger.get(entry.key)
        self._ledger[entry.key] = entry
        self._ledger_bytes += len(entry.result) - (len(earlier.result) if earlier else 0)
        while len(self._ledger) > LEDGER_CAP:
            self._ledger_bytes -= len(self._ledger.pop(next(iter(self._ledger))).result)
        if self._ledger_bytes > self._max_bytes // 16:
            self._forget_results()

    def _forget_results(self) -> None:
        for key, entry in self._ledger.items():
            if self._ledger_bytes <= self._max_bytes // 16:
                return
            self._ledger_bytes -= len(entry.result)
            self._ledger[key] = replace(entry, result=b"")


def _weight(entry: BufferEntry) -> int:
    return len(entry.payload) + len(entry.key) + OVERHEAD
