"""What a store has counted: rows and losses, kept in step with the transactions that change them."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from z4j_bare.buffer import queries
from z4j_bare.buffer.batches import Batches
from z4j_bare.buffer.rows import EVENT, KIND, PAYLOAD, BufferEntry, BufferStats, losses_by, ranges
from z4j_bare.buffer.schema import scalar, transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(slots=True)
class RowTransaction:
    """One transaction: what it does to the rows, and how the counters will differ."""

    connection: sqlite3.Connection
    accounting: Accounting
    rows: int = 0
    non_events: int = 0
    payload_bytes: int = 0
    produced: int = 0
    confirmed: int = 0
    lost: dict[tuple[str, str], int] = field(default_factory=dict)

    def insert(self, entries: Sequence[BufferEntry]) -> None:
        """Insert rows, each by itself, under ids that follow the last one given out."""
        first = self.accounting.next_id + self.produced
        self._single([entry._replace(id=identity) for identity, entry in enumerate(entries, first)])
        self._note(len(entries), sum(map(len, map(PAYLOAD, entries))))
        self.non_events += len(entries) - list(map(KIND, entries)).count(EVENT)

    def insert_events(self, payloads: Sequence[bytes], at: float) -> None:
        """Insert events that came together at ``at``, likewise."""
        self._single(
            self.accounting.batches.insert(self.accounting.next_id + self.produced, payloads, at)
            if payloads
            else ()
        )
        self._note(len(payloads), sum(map(len, payloads)))

    def remove(self, ids: Iterable[int], reason: str | None = None) -> int:
        """Delete rows, as losses if there is a ``reason``; return how many there were."""
        spans, before = ranges(ids), self.rows
        self._removed(EVENT, *self.accounting.batches.remove(spans), reason)
        if self.accounting.rows + self.rows > self.accounting.batches.rows:  # there are others
            for kind, count, length in self._count_by_kind(spans):
                self._removed(kind, count, length, reason)
            self.connection.executemany(queries.DELETE, spans)
        return before - self.rows

    def increment_attempts(self, ids: Iterable[int]) -> None:
        """Count an attempt for each of these rows."""
        spans = ranges(ids)
        self.accounting.batches.split(spans)
        self.connection.executemany(queries.ATTEMPT, spans)

    def reject(self, kind: str, reason: str) -> None:
        """Count a row that is not even inserted as produced and lost."""
        self.produced += 1
        self.record_loss(reason, kind, 1)

    def _single(self, entries: Sequence[BufferEntry]) -> None:
        if entries:
            self.connection.executemany(queries.INSERT, entries)

    def _note(self, count: int, payload_bytes: int) -> None:
        self.produced += count
        self.rows += count
        self.payload_bytes += payload_bytes

    def _removed(self, kind: str, count: int, length: int, reason: str | None) -> None:
        self.rows -= count
        self.payload_bytes -= length
        self.non_events -= 0 if kind == EVENT else count
        if reason is not None and count:
            self.record_loss(reason, kind, count)

    def _count_by_kind(self, spans: Iterable[tuple[int, int]]) -> list[tuple[str, int, int]]:
        return [
            payload_bytes
            for span in spans
            for payload_bytes in self.connection.execute(queries.WEIGH, span).fetchall()
        ]

    def record_loss(self, reason: str, kind: str, count: int) -> None:
        """Count rows of a kind as lost."""
        self.lost[reason, kind] = self.lost.get((reason, kind), 0) + count

    def write(self) -> None:
        """Write the cumulative counters: in the same transaction, so that they cannot tell another story than the rows."""
        for key, more in (("next_id", self.produced), ("confirmed", self.confirmed)):
            if more:
                self.connection.execute(queries.COUNT, (more, key))
        for (reason, kind), count in self.lost.items():
            self.connection.execute(queries.LOSE, (reason, kind, count))


class Accounting:
    """The counters of one store, read once and then kept in memory: ``stats`` is asked every second."""

    def __init__(self, connection: sqlite3.Connection, largest_batch: int) -> None:
        self._connection = connection
        self.batches = Batches(connection, largest_batch)
        meta = dict(connection.execute("SELECT key, value FROM meta"))
        self.buffer_id: str = meta["buffer_id"]
        self.next_id: int = meta["next_id"]
        self.confirmed: int = meta["confirmed"]
        self.rows: int
        self.payload_bytes: int
        self.rows, self.payload_bytes = connection.execute(queries.TOTALS).fetchone()
        self.rows += self.batches.rows
        self.payload_bytes += self.batches.payload_bytes
        #: Rows that are no events.
        self.non_events = scalar(connection, queries.KEPT)
        self.lost: dict[tuple[str, str], int] = {
            (reason, kind): count
            for reason, kind, count in connection.execute("SELECT * FROM losses")
        }

    @property
    def unbatched_events(self) -> int:
        """Events that are not in a batch."""
        return self.rows - self.non_events - self.batches.rows

    def oldest(self) -> float | None:
        """Return when the oldest row came."""
        first: tuple[int, float] | None = self._connection.execute(queries.FIRST).fetchone()
        batch = self.batches.oldest()
        if batch is None or (first is not None and first[0] < batch[1]):
            return None if first is None else first[1]
        return batch[2]

    @contextmanager
    def change(self) -> Iterator[RowTransaction]:
        """Commit what the block does to the rows, with the counters that tell of it, or none of it."""
        change = RowTransaction(self._connection, self)
        try:
            with transaction(self._connection):
                yield change
                change.write()
        except BaseException:
            self.batches.invalidate()
            raise
        self.rows += change.rows
        self.non_events += change.non_events
        self.payload_bytes += change.payload_bytes
        self.next_id += change.produced
        self.confirmed += change.confirmed
        for pair, count in change.lost.items():
            self.lost[pair] = self.lost.get(pair, 0) + count

    def stats(self, disk_bytes: int, oldest_age: float | None) -> BufferStats:
        """Return the counters with two figures that only the disk knows."""
        return BufferStats(
            rows=self.rows,
            bytes=disk_bytes,
            payload_bytes=self.payload_bytes,
            oldest_age=oldest_age,
            lost=losses_by(self.lost, 0),
            lost_kinds=losses_by(self.lost, 1),
            produced=self.next_id - 1,
            confirmed=self.confirmed,
            buffer_id=self.buffer_id,
            durable=True,
        )
