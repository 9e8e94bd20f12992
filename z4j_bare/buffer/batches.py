"""Stores the events of one append as one table row. Such a row is called a batch."""

from __future__ import annotations

from collections import deque
from contextlib import closing
from itertools import count, repeat, takewhile
from typing import TYPE_CHECKING, NamedTuple

from z4j_bare.buffer import schema
from z4j_bare.buffer.rows import EVENT, PAYLOAD, BufferEntry, take_fitting

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Generator, Iterable, Sequence

#: Maximum bytes of a batch. The value equals the limit of a frame with several events.
#: The native thread splits a batch into events when it reads the file.
#: The split holds the interpreter's lock (GIL), so a larger batch would block the hub for longer.
MAX_BATCH_BYTES = 128 * 1024

#: Maximum number of cached events: twice the in-flight window.
#: The newest batches are cached, so that recent events are sent without a read from the file.
CACHE_ROWS = 2_000
#: Maximum total size of the cached events in bytes.
CACHE_BYTES = 1024 * 1024

_SEPARATOR = b"\n"  # canonical JSON contains no newline


class Batch(NamedTuple):
    """Events with the ids ``first`` to ``last`` and the same ``created_at``."""

    first: int
    last: int
    at: float
    payloads: list[bytes]

    def entries(self, after: int) -> list[BufferEntry]:
        """Return the events with ``id > after``."""
        start = max(self.first, after + 1)
        payloads = self.payloads[start - self.first :]
        fields = zip(count(start), repeat(EVENT), repeat(""), payloads, repeat(self.at), repeat(0))
        # ``map`` runs no Python bytecode per event, so it takes only 0.1 us per event.
        return list(map(tuple.__new__, repeat(BufferEntry), fields))

    def payload_bytes(self, start: int, last: int) -> int:
        """Return the total payload bytes of the events with ids from ``start`` to ``last``."""
        return sum(map(len, self.payloads[start - self.first : last + 1 - self.first]))


class Batches:
    """The batches of one store. A batch contains the events of one append in one table row.

    One row for each event would take three times the CPU time, mostly in SQLite. Acks arrive in
    order, so one number records which events of the oldest batch were deleted. Any other change of
    an event (another attempt, a discard, an ack out of order) splits the batch into single rows of
    the ``entries`` table.

    Methods that write must be called in a transaction. After a rollback, :meth:`invalidate` must be
    called.
    """

    def __init__(self, connection: sqlite3.Connection, max_bytes: int) -> None:
        self._connection = connection
        self._max_bytes = max_bytes
        #: Consecutive batches up to the newest, oldest first.
        self._cache: deque[Batch] = deque()
        self._cached_rows = self._cached_bytes = self._count = 0
        #: Number of events in batches, total bytes of their payloads, id of the last deleted event.
        self.rows = self.payload_bytes = self.acked_through = 0
        self._loaded = False
        self._ensure_loaded()

    def invalidate(self) -> None:
        """Mark totals and cache as invalid after a rollback.

        The next change then reads the totals from the file and empties the cache.
        """
        self._loaded = False

    def oldest(self) -> tuple[int, int, float] | None:
        """Return last id, first id and ``created_at`` of the oldest batch, or ``None``."""
        if len(self._cache) < self._count:
            row: tuple[int, int, float] = self._connection.execute(schema.OLDEST_BATCH).fetchone()
            return row
        if not self._cache:
            return None
        batch = self._cache[0]
        return batch.last, batch.first, batch.at

    # -- changes

    def insert(self, first: int, payloads: Sequence[bytes], at: float) -> list[BufferEntry]:
        """Insert events as batches. The first event gets the id ``first``.

        A newline separates the payloads of a batch. If a payload itself contains a newline, the
        events are returned, and the caller inserts the events as single rows.
        """
        self._ensure_loaded()
        joined = _SEPARATOR.join(payloads)
        if joined.count(_SEPARATOR) >= len(payloads):
            return [
                BufferEntry(identity, EVENT, "", payload, at, 0)
                for identity, payload in enumerate(payloads, first)
            ]
        if len(joined) > self._max_bytes and len(payloads) > 1:
            half = len(payloads) // 2
            return self.insert(first, payloads[:half], at) + self.insert(
                first + half, payloads[half:], at
            )
        batch = Batch(first, first + len(payloads) - 1, at, list(payloads))
        self._connection.execute(schema.INSERT_BATCH, (batch.last, len(payloads), at, joined))
        self._adjust(1, len(payloads), len(joined) - len(payloads) + 1)
        self._cache_batch(batch)
        return []

    def remove(self, spans: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Delete the events in ``spans``; return the number and payload bytes of deleted events.

        A span is ``(first id, last id)``. A batch that is only partly in a span is split into
        single rows, and the caller must delete the single rows in the span. The oldest batch is not
        split if the span contains its oldest remaining event.
        """
        self._ensure_loaded()
        rows, payload_bytes, acked_through = self.rows, self.payload_bytes, self.acked_through
        split_rows = split_bytes = 0
        for first, last in spans:
            for batch in self._overlapping(first, last):
                start, end = max(batch.first, self.acked_through + 1), min(batch.last, last)
                if first <= start and end == batch.last:
                    self._drop(batch, start)
                elif first <= start and (oldest := self.oldest()) and batch.last == oldest[0]:
                    self._adjust(0, start - end - 1, -batch.payload_bytes(start, end))
                    self.acked_through = end
                else:
                    events, size = self._split(batch)
                    split_rows += events
                    split_bytes += size
        if self.acked_through != acked_through:
            self._connection.execute(schema.SET_ACKED_THROUGH, (self.acked_through,))
        return rows - self.rows - split_rows, payload_bytes - self.payload_bytes - split_bytes

    def split(self, spans: Iterable[tuple[int, int]]) -> None:
        """Split the batches that overlap with ``spans`` into single rows."""
        self._ensure_loaded()
        for first, last in spans:
            for batch in self._overlapping(first, last):
                self._split(batch)

    # -- reading

    def read_cached(self, after: int, limit: int, max_bytes: int) -> list[BufferEntry] | None:
        """Return events as ``IStore.drain`` does, or ``None`` if some of them are not cached."""
        after = max(after, self.acked_through)
        cache = self._cache
        if not self._loaded or (
            len(cache) < self._count and (not cache or after + 1 < cache[0].first)
        ):
            return None
        taken: list[BufferEntry] = []
        for batch in cache:
            if batch.last <= after:
                continue
            entries = batch.entries(after)
            payload_bytes = sum(map(len, map(PAYLOAD, entries)))
            if len(taken) + len(entries) > limit or payload_bytes > max_bytes:
                return taken + take_fitting(
                    entries, limit - len(taken), max_bytes, allow_oversized=not taken
                )
            taken += entries
            max_bytes -= payload_bytes
        return taken

    def read(self, after: int) -> Generator[BufferEntry, None, None]:
        """Yield the events with ``id > after`` from the file, oldest first."""
        after = max(after, self.acked_through)
        with closing(self._query(schema.BATCHES, after)) as batches:
            for batch in batches:
                yield from batch.entries(after)

    # -- internals

    def _ensure_loaded(self) -> None:
        if self._loaded:
            return
        self._cache.clear()
        self._cached_rows = self._cached_bytes = 0
        self.acked_through = self._connection.execute(schema.READ_ACKED_THROUGH).fetchone()[0]
        self._count, self.rows, self.payload_bytes = self._connection.execute(
            schema.BATCH_TOTALS
        ).fetchone()
        oldest = next(self._query(schema.BATCHES, self.acked_through), None)
        if oldest is not None and oldest.first <= self.acked_through:
            self._adjust(
                0,
                oldest.first - self.acked_through - 1,
                -oldest.payload_bytes(oldest.first, self.acked_through),
            )
        self._loaded = True

    def _query(self, query: str, *values: int) -> Generator[Batch, None, None]:
        with closing(self._connection.execute(query, values)) as cursor:
            for last, events, at, joined in cursor:
                yield Batch(last - events + 1, last, at, joined.split(_SEPARATOR))

    def _overlapping(self, first: int, last: int) -> list[Batch]:
        cache = self._cache
        if len(cache) == self._count or (cache and first >= cache[0].first):
            return [batch for batch in cache if batch.first <= last and batch.last >= first]
        with closing(self._query(schema.BATCHES, first - 1)) as batches:
            return list(takewhile(lambda batch: batch.first <= last, batches))

    def _adjust(self, number: int, rows: int, payload_bytes: int) -> None:
        self._count += number
        self.rows += rows
        self.payload_bytes += payload_bytes

    def _split(self, batch: Batch) -> tuple[int, int]:
        """Replace a batch by single rows; return the number of rows and their payload bytes."""
        start = max(batch.first, self.acked_through + 1)
        self._connection.executemany(schema.INSERT, batch.entries(self.acked_through))
        self._drop(batch, start)
        return batch.last + 1 - start, batch.payload_bytes(start, batch.last)

    def _drop(self, batch: Batch, start: int) -> None:
        """Delete a batch whose events with ids below ``start`` were deleted earlier."""
        self._connection.execute(schema.DELETE_BATCH, (batch.last,))
        self._adjust(-1, start - batch.last - 1, -batch.payload_bytes(start, batch.last))
        if self._cache and batch.last >= self._cache[0].last:
            self._cache.remove(batch)
            self._uncache(batch)

    def _cache_batch(self, batch: Batch) -> None:
        self._cache.append(batch)
        self._cached_rows += len(batch.payloads)
        self._cached_bytes += batch.payload_bytes(batch.first, batch.last)
        while self._cache and (self._cached_rows > CACHE_ROWS or self._cached_bytes > CACHE_BYTES):
            self._uncache(self._cache.popleft())

    def _uncache(self, batch: Batch) -> None:
        self._cached_rows -= len(batch.payloads)
        self._cached_bytes -= batch.payload_bytes(batch.first, batch.last)
