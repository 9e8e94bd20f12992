"""Counts rows, bytes, losses and acks of one store and of all stores of the process."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from z4j_bare.buffer import schema
from z4j_bare.buffer.batches import Batches
from z4j_bare.buffer.rows import EVENT, KIND, NO_STATS, PAYLOAD, BufferEntry, BufferStats, ranges
from z4j_bare.buffer.schema import scalar, transaction

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Sequence

    from z4j_bare.buffer.rows import Losses


@dataclass(slots=True)
class Counts:
    """Row counters of one store, or the changes that one transaction makes to the counters."""

    rows: int = 0
    #: Number of rows that are not events.
    non_events: int = 0
    payload_bytes: int = 0
    produced: int = 0
    confirmed: int = 0
    lost: Losses = field(default_factory=dict)

    def insert(self, rows: int, non_events: int, payload_bytes: int) -> None:
        """Count new rows."""
        self.produced += rows
        self.rows += rows
        self.non_events += non_events
        self.payload_bytes += payload_bytes

    def remove(self, kind: str, rows: int, payload_bytes: int, reason: str | None = None) -> None:
        """Subtract deleted rows of one kind; with ``reason``, count them as lost."""
        self.rows -= rows
        self.payload_bytes -= payload_bytes
        self.non_events -= 0 if kind == EVENT else rows
        if reason is not None and rows:
            self.record_loss(reason, kind, rows)

    def reject(self, kind: str, reason: str) -> None:
        """Count a row that cannot be stored as produced and as lost."""
        self.produced += 1
        self.record_loss(reason, kind, 1)

    def record_loss(self, reason: str, kind: str, rows: int) -> None:
        """Count lost rows of one kind."""
        self.lost[reason, kind] = self.lost.get((reason, kind), 0) + rows

    def import_losses(self, losses: Losses) -> None:
        """Count another store's losses, also in ``produced``, which includes lost rows."""
        for (reason, kind), rows in losses.items():
            self.produced += rows
            self.record_loss(reason, kind, rows)

    def add(self, change: Counts) -> None:
        """Add the changes made by a committed transaction."""
        self.rows += change.rows
        self.non_events += change.non_events
        self.payload_bytes += change.payload_bytes
        self.produced += change.produced
        self.confirmed += change.confirmed
        for (reason, kind), rows in change.lost.items():
            self.record_loss(reason, kind, rows)

    def stats(
        self, buffer_id: str, size: int, oldest_age: float | None, *, durable: bool
    ) -> BufferStats:
        """Return the counters as ``BufferStats``.

        ``size`` is in bytes, and ``oldest_age`` in seconds.
        """
        return BufferStats(
            rows=self.rows,
            bytes=size,
            payload_bytes=self.payload_bytes,
            oldest_age=oldest_age,
            lost=sum_losses(self.lost, 0),
            lost_kinds=sum_losses(self.lost, 1),
            produced=self.produced,
            confirmed=self.confirmed,
            buffer_id=buffer_id,
            durable=durable,
        )


class RowTransaction:
    """Changes rows in one transaction, and sums up the changes of the counters."""

    def __init__(self, connection: sqlite3.Connection, accounting: Accounting) -> None:
        self.change = Counts()
        self._connection = connection
        self._accounting = accounting

    def insert(self, entries: Sequence[BufferEntry]) -> None:
        """Insert each entry as a single row with a new id."""
        first = self._next_id()
        self._insert_rows(
            [entry._replace(id=identity) for identity, entry in enumerate(entries, first)]
        )
        non_events = len(entries) - list(map(KIND, entries)).count(EVENT)
        self.change.insert(len(entries), non_events, sum(map(len, map(PAYLOAD, entries))))

    def insert_events(self, payloads: Sequence[bytes], at: float) -> None:
        """Insert events created at ``at``: in batches, or singly if a payload has a newline."""
        if payloads:
            self._insert_rows(self._accounting.batches.insert(self._next_id(), payloads, at))
        self.change.insert(len(payloads), 0, sum(map(len, payloads)))

    def remove(self, ids: Iterable[int], reason: str | None = None) -> int:
        """Delete rows and return the number of deleted rows.

        With ``reason``, the deleted rows count as lost.
        """
        spans, before = ranges(ids), self.change.rows
        self.change.remove(EVENT, *self._accounting.batches.remove(spans), reason)
        if self._accounting.counts.rows + self.change.rows > self._accounting.batches.rows:
            # The store has rows outside of batches.
            for kind, rows, payload_bytes in self._count_by_kind(spans):
                self.change.remove(kind, rows, payload_bytes, reason)
            self._connection.executemany(schema.DELETE, spans)
        return before - self.change.rows

    def increment_attempts(self, ids: Iterable[int]) -> None:
        """Add 1 to ``attempts`` of each of these rows."""
        spans = ranges(ids)
        self._accounting.batches.split(spans)
        self._connection.executemany(schema.INCREMENT_ATTEMPTS, spans)

    def write_counters(self) -> None:
        """Add the changes to the counters in the file.

        Must be called in the transaction that changes the rows, so that counters and rows agree.
        """
        for key, more in (("next_id", self.change.produced), ("confirmed", self.change.confirmed)):
            if more:
                self._connection.execute(schema.ADD_TO_COUNTER, (more, key))
        for (reason, kind), rows in self.change.lost.items():
            self._connection.execute(schema.ADD_LOSSES, (reason, kind, rows))

    def _next_id(self) -> int:
        return self._accounting.counts.produced + self.change.produced + 1

    def _insert_rows(self, entries: Sequence[BufferEntry]) -> None:
        if entries:
            self._connection.executemany(schema.INSERT, entries)

    def _count_by_kind(self, spans: Iterable[tuple[int, int]]) -> list[tuple[str, int, int]]:
        return [
            row
            for span in spans
            for row in self._connection.execute(schema.COUNT_BY_KIND, span).fetchall()
        ]


class Accounting:
    """The counters of one file.

    The constructor reads the counters from the file. Each transaction updates them.
    """

    def __init__(self, connection: sqlite3.Connection, max_batch_bytes: int) -> None:
        self._connection = connection
        self.batches = Batches(connection, max_batch_bytes)
        meta = dict(connection.execute("SELECT key, value FROM meta"))
        self.buffer_id: str = meta["buffer_id"]
        rows, payload_bytes = connection.execute(schema.TOTALS).fetchone()
        self.counts = Counts(
            rows=rows + self.batches.rows,
            non_events=scalar(connection, schema.COUNT_NON_EVENTS),
            payload_bytes=payload_bytes + self.batches.payload_bytes,
            produced=meta["next_id"] - 1,
            confirmed=meta["confirmed"],
            lost={
                (reason, kind): lost
                for reason, kind, lost in connection.execute("SELECT * FROM losses")
            },
        )

    @property
    def unbatched_events(self) -> int:
        """Number of events that are not in a batch."""
        return self.counts.rows - self.counts.non_events - self.batches.rows

    def oldest(self) -> float | None:
        """Return ``created_at`` of the oldest row."""
        first: tuple[int, float] | None = self._connection.execute(schema.OLDEST_ROW).fetchone()
        batch = self.batches.oldest()
        if batch is None or (first is not None and first[0] < batch[1]):
            return None if first is None else first[1]
        return batch[2]

    @contextmanager
    def transaction(self) -> Iterator[RowTransaction]:
        """Commit all changes of the block to rows and counters, or none."""
        rows = RowTransaction(self._connection, self)
        try:
            with transaction(self._connection):
                yield rows
                rows.write_counters()
        except BaseException:
            self.batches.invalidate()
            raise
        self.counts.add(rows.change)

    def stats(self, disk_bytes: int, oldest_age: float | None) -> BufferStats:
        """Return the counters as ``BufferStats``; see :meth:`Counts.stats`."""
        return self.counts.stats(self.buffer_id, disk_bytes, oldest_age, durable=True)


class ProcessAccounting:
    """The counters of this process over all its stores, for use on the hub.

    While a store in memory replaces a failed disk, ``latest`` counts the rows on the disk and in
    memory.
    """

    def __init__(self) -> None:
        #: The stats that were read last.
        self.latest = NO_STATS
        #: Number of events that were deleted because the brain acknowledged them.
        self.acked_events = 0
        #: Losses of the previous file that are not recorded in the new file yet.
        self.unrecorded_losses: Losses = {}
        #: Whether rows were appended after ``latest`` was read.
        self.outdated = False
        self._failed_disk: BufferStats | None = None
        self._read_at = float("-inf")

    def is_due(self, now: float, interval: float) -> bool:
        """Whether the stats are older than ``interval`` seconds."""
        return now - self._read_at > interval

    def expire(self) -> None:
        """Make :meth:`is_due` return ``True`` until the next :meth:`update`."""
        self._read_at = float("-inf")

    def update(self, stats: BufferStats, now: float) -> None:
        """Record the current store's stats that were read at ``now``."""
        self.latest = merge_stats(self._failed_disk, stats) if self._failed_disk else stats
        self._read_at, self.outdated = now, False

    def record_later(self, losses: Losses) -> None:
        """Add losses to ``unrecorded_losses``. The next call to the store records them."""
        pending = Counts(lost=dict(self.unrecorded_losses))
        for (reason, kind), rows in losses.items():
            pending.record_loss(reason, kind, rows)
        self.unrecorded_losses = pending.lost

    def disk_failed(self, stats: BufferStats | None) -> None:
        """Add the stats of the failed disk to ``latest`` until the disk works again.

        :param stats: the last known stats of the disk; ``None`` to use ``latest``.
        """
        stats = stats or self.latest
        self._failed_disk = replace(
            stats,
            lost=merge_counts(stats.lost, sum_losses(self.unrecorded_losses, 0)),
            lost_kinds=merge_counts(stats.lost_kinds, sum_losses(self.unrecorded_losses, 1)),
        )

    def disk_returned(self) -> None:
        """Stop adding the stats of the failed disk, because the disk works again."""
        self._failed_disk = None
        self.expire()


def sum_losses(losses: Losses, field: int) -> dict[str, int]:
    """Sum ``(reason, kind)`` counters by reason (``field`` 0) or by kind (``field`` 1)."""
    sums: dict[str, int] = {}
    for pair, rows in losses.items():
        sums[pair[field]] = sums.get(pair[field], 0) + rows
    return sums


def merge_counts(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """Return the sum of two counters for each key."""
    return {key: first.get(key, 0) + second.get(key, 0) for key in {**first, **second}}


def merge_stats(disk: BufferStats, memory: BufferStats) -> BufferStats:
    """Return the combined stats of a failed disk and of the store in memory that replaces it."""
    return replace(
        memory,
        rows=disk.rows + memory.rows,
        bytes=disk.bytes + memory.bytes,
        payload_bytes=disk.payload_bytes + memory.payload_bytes,
        oldest_age=memory.oldest_age if disk.oldest_age is None else disk.oldest_age,
        lost=merge_counts(disk.lost, memory.lost),
        lost_kinds=merge_counts(disk.lost_kinds, memory.lost_kinds),
        produced=disk.produced + memory.produced,
        confirmed=disk.confirmed + memory.confirmed,
        buffer_id=memory.buffer_id if disk.buffer_id == NO_STATS.buffer_id else disk.buffer_id,
    )
