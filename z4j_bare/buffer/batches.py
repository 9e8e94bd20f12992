"""Events that came together, as one row of the file until they have gone.

A row for each event cost three times the CPU, most of it SQLite's: a batch of 256 is one insertion and one deletion. Acks
come in order, so that what has gone of the oldest batch is one number; whatever else happens to an event (it is doubted,
dropped, or acknowledged before its elders) loosens its batch into rows of its own, in the table that all other rows are in.
"""

from __future__ import annotations

from collections import deque
from contextlib import closing
from itertools import count, repeat, takewhile
from typing import TYPE_CHECKING, NamedTuple

from z4j_bare.buffer import queries
from z4j_bare.buffer.rows import EVENT, PAYLOAD, BufferEntry, take_fitting

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Generator, Iterable, Sequence

#: Bytes of one batch at most, as many as a frame has: a look at a backlog reads and takes apart whole batches, with the
#: interpreter's lock in the native thread's hands.
MAX_BATCH_BYTES = 128 * 1024

#: Events, and their bytes, that are kept in memory, the newest: what was written a moment ago is sent without being read
#: back. The in-flight window takes 1,000.
ROWS = 2_000
BYTES = 1024 * 1024

_SEPARATOR = b"\n"  # canonical JSON has none


class Batch(NamedTuple):
    """Events ``first`` to ``last``, all of the same time."""

    first: int
    last: int
    at: float
    payloads: list[bytes]

    def entries(self, after: int) -> list[BufferEntry]:
        """Return the events with ``id > after``."""
        start = max(self.first, after + 1)
        payloads = self.payloads[start - self.first :]
        fields = zip(count(start), repeat(EVENT), repeat(""), payloads, repeat(self.at), repeat(0))
        return list(map(tuple.__new__, repeat(BufferEntry), fields))  # all in C: 0.1 us each

    def payload_bytes(self, start: int, last: int) -> int:
        """Return the bytes of the events from ``start`` to ``last``."""
        return sum(map(len, self.payloads[start - self.first : last + 1 - self.first]))


class Batches:
    """The batches of one store.

    Everything that writes is to be called inside a transaction; after one that failed, :meth:`invalidate`.

    :param largest: bytes of one batch at most.
    """

    def __init__(self, connection: sqlite3.Connection, largest: int) -> None:
        self._connection = connection
        self._largest = largest
        #: The newest batches, all that there are from the first of these on.
        self._cache: deque[Batch] = deque()
        self._cached_rows = self._cached_bytes = self._count = 0
        #: Events, the bytes of their payloads, and the last event that has gone of those in batches.
        self.rows = self.payload_bytes = self.acked_through = 0
        self._loaded = False
        self._ensure_loaded()

    def invalidate(self) -> None:
        """Note that the file may have changed in another way than it looked: it is read again at the next change."""
        self._loaded = False

    def oldest(self) -> tuple[int, int, float] | None:
        """Return the last and the first id of the oldest batch, and when it came."""
        if len(self._cache) < self._count:
            found: tuple[int, int, float] = self._connection.execute(
                queries.OLDEST_BATCH
            ).fetchone()
            return found
        return (
            (self._cache[0].last, self._cache[0].first, self._cache[0].at) if self._cache else None
        )

    # -- changes

    def insert(self, first: int, payloads: Sequence[bytes], at: float) -> list[BufferEntry]:
        """Insert events whose ids begin with ``first``; return those that cannot be in a batch."""
        self._ensure_loaded()
        joined = _SEPARATOR.join(payloads)
        if joined.count(_SEPARATOR) >= len(payloads):
            return [
                BufferEntry(identity, EVENT, "", payload, at, 0)
                for identity, payload in enumerate(payloads, first)
            ]
        if len(joined) > self._largest and len(payloads) > 1:
            half = len(payloads) // 2
            return self.insert(first, payloads[:half], at) + self.insert(
                first + half, payloads[half:], at
            )
        batch = Batch(first, first + len(payloads) - 1, at, list(payloads))
        self._connection.execute(queries.INSERT_BATCH, (batch.last, len(payloads), at, joined))
        self._adjust(1, len(payloads), len(joined) - len(payloads) + 1)
        self._cache_batch(batch)
        return []

    def remove(self, spans: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Delete the events within ``spans``, each ``(first, last)``; return how many that were, and their bytes.

        A batch that loses others than its oldest events, or that is not the oldest, is loosened instead, and keeps them.
        """
        self._ensure_loaded()
        rows, payload_bytes, acked_through = self.rows, self.payload_bytes, self.acked_through
        loosened = [0, 0]
        for first, last in spans:
            for batch in self._overlapping(first, last):
                start, end = max(batch.first, self.acked_through + 1), min(batch.last, last)
                if first <= start and end == batch.last:
                    self._drop(batch, start)
                elif first <= start and (oldest := self.oldest()) and batch.last == oldest[0]:
                    self._adjust(0, start - end - 1, -batch.payload_bytes(start, end))
                    self.acked_through = end
                else:
                    loosened = [
                        sum(pair) for pair in zip(loosened, self._split(batch), strict=True)
                    ]
        if self.acked_through != acked_through:
            self._connection.execute(queries.DONE, (self.acked_through,))
        return rows - self.rows - loosened[0], payload_bytes - self.payload_bytes - loosened[1]

    def split(self, spans: Iterable[tuple[int, int]]) -> None:
        """Turn the batches that touch ``spans`` into rows of their own."""
        self._ensure_loaded()
        for first, last in spans:
            for batch in self._overlapping(first, last):
                self._split(batch)

    # -- looks

    def read_cached(self, after: int, limit: int, max_bytes: int) -> list[BufferEntry] | None:
        """Return the oldest events with ``id > after`` as ``IStore.drain`` does; ``None`` if that takes the file."""
        after = max(after, self.acked_through)
        kept = self._cache
        if not self._loaded or (
            len(kept) < self._count and (not kept or after + 1 < kept[0].first)
        ):
            return None
        found: list[BufferEntry] = []
        for batch in kept:
            if batch.last <= after:
                continue
            entries = batch.entries(after)
            payload_bytes = sum(map(len, map(PAYLOAD, entries)))
            if len(found) + len(entries) > limit or payload_bytes > max_bytes:
                return found + take_fitting(entries, limit - len(found), max_bytes, alone=not found)
            found += entries
            max_bytes -= payload_bytes
        return found

    def read(self, after: int) -> Generator[BufferEntry, None, None]:
        """Yield the events with ``id > after`` from the file, oldest first."""
        after = max(after, self.acked_through)
        with closing(self._found(queries.BATCHES, after)) as batches:
            for batch in batches:
                yield from batch.entries(after)

    # -- how

    def _ensure_loaded(self) -> None:
        if self._loaded:
            return
        self._cache.clear()
        self._cached_rows = self._cached_bytes = 0
        self.acked_through = self._connection.execute(queries.DONE_SO_FAR).fetchone()[0]
        self._count, self.rows, self.payload_bytes = self._connection.execute(
            queries.BATCH_TOTALS
        ).fetchone()
        oldest = next(self._found(queries.BATCHES, self.acked_through), None)
        if oldest is not None and oldest.first <= self.acked_through:
            self._adjust(
                0,
                oldest.first - self.acked_through - 1,
                -oldest.payload_bytes(oldest.first, self.acked_through),
            )
        self._loaded = True

    def _found(self, query: str, *values: int) -> Generator[Batch, None, None]:
        with closing(self._connection.execute(query, values)) as cursor:
            for last, number, at, joined in cursor:
                yield Batch(last - number + 1, last, at, joined.split(_SEPARATOR))

    def _overlapping(self, first: int, last: int) -> list[Batch]:
        kept = self._cache
        if len(kept) == self._count or (kept and first >= kept[0].first):
            return [batch for batch in kept if batch.first <= last and batch.last >= first]
        with closing(self._found(queries.BATCHES, first - 1)) as batches:
            return list(takewhile(lambda batch: batch.first <= last, batches))

    def _adjust(self, number: int, rows: int, payload_bytes: int) -> None:
        self._count += number
        self.rows += rows
        self.payload_bytes += payload_bytes

    def _split(self, batch: Batch) -> tuple[int, int]:
        """Give each event of a batch a row of its own; return how many, and their bytes."""
        start = max(batch.first, self.acked_through + 1)
        self._connection.executemany(queries.INSERT, batch.entries(self.acked_through))
        self._drop(batch, start)
        return batch.last + 1 - start, batch.payload_bytes(start, batch.last)

    def _drop(self, batch: Batch, start: int) -> None:
        """Delete a batch of which the events from ``start`` on were left."""
        self._connection.execute(queries.DELETE_BATCH, (batch.last,))
        self._adjust(-1, start - batch.last - 1, -batch.payload_bytes(start, batch.last))
        if self._cache and batch.last >= self._cache[0].last:
            self._cache.remove(batch)
            self._uncache(batch)

    def _cache_batch(self, batch: Batch) -> None:
        self._cache.append(batch)
        self._cached_rows += len(batch.payloads)
        self._cached_bytes += batch.payload_bytes(batch.first, batch.last)
        while self._cache and (self._cached_rows > ROWS or self._cached_bytes > BYTES):
            self._uncache(self._cache.popleft())

    def _uncache(self, batch: Batch) -> None:
        self._cached_rows -= len(batch.payloads)
        self._cached_bytes -= batch.payload_bytes(batch.first, batch.last)
