"""What a store has counted: rows and losses, kept in step with the transactions that change them."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from z4j_bare.buffer import queries
from z4j_bare.buffer.rows import EVENT, KIND, PAYLOAD, BufferEntry, BufferStats, losses_by, ranges
from z4j_bare.buffer.schema import number, transaction
from z4j_bare.buffer.tail import Weight

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(slots=True)
class Change:
    """One transaction: what it does to the rows, and how the counters will differ."""

    connection: sqlite3.Connection
    rows: int = 0
    kept: int = 0
    payload: int = 0
    produced: int = 0
    confirmed: int = 0
    lost: dict[tuple[str, str], int] = field(default_factory=dict)

    def insert(self, entries: Sequence[BufferEntry]) -> None:
        """Insert rows, whose ids follow the last one given out."""
        self.connection.executemany(queries.INSERT, entries)
        self.produced += len(entries)
        self.rows += len(entries)
        self.kept += len(entries) - list(map(KIND, entries)).count(EVENT)
        self.payload += sum(map(len, map(PAYLOAD, entries)))

    def remove(self, ids: Iterable[int], reason: str | None = None, weights: Iterable[Weight] | None = None) -> int:
        """Delete rows, as losses if there is a ``reason``; return how many there were.

        ``weights`` is what they weigh, if that is known: else they have to be read.
        """
        removed = 0
        spans = ranges(ids)
        for kind, count, length in self._weigh(spans) if weights is None else weights:
            removed += count
            self.payload -= length
            self.kept -= 0 if kind == EVENT else count
            if reason is not None:
                self.lose(reason, kind, count)
        self.connection.executemany(queries.DELETE, spans)
        self.rows -= removed
        return removed

    def _weigh(self, spans: Iterable[tuple[int, int]]) -> list[Weight]:
        return [weight for span in spans for weight in self.connection.execute(queries.WEIGH, span).fetchall()]

    def lose(self, reason: str, kind: str, count: int) -> None:
        """Count rows of a kind as lost."""
        self.lost[reason, kind] = self.lost.get((reason, kind), 0) + count

    def write(self) -> None:
        """Write the cumulative counters: in the same transaction, so that they cannot tell another story than the rows."""
        for key, more in (("next_id", self.produced), ("confirmed", self.confirmed)):
            if more:
                self.connection.execute(queries.COUNT, (more, key))
        for (reason, kind), count in self.lost.items():
            self.connection.execute(queries.LOSE, (reason, kind, count))


class Books:
    """The counters of one store, read once and then kept in memory: ``stats`` is asked every second."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        meta = dict(connection.execute("SELECT key, value FROM meta"))
        self.buffer_id: str = meta["buffer_id"]
        self.next_id: int = meta["next_id"]
        self.confirmed: int = meta["confirmed"]
        self.rows: int
        self.payload: int
        self.rows, self.payload = connection.execute(queries.TOTALS).fetchone()
        #: Rows that are no events.
        self.kept = number(connection, queries.KEPT)
        self.lost: dict[tuple[str, str], int] = {
            (reason, kind): count for reason, kind, count in connection.execute("SELECT * FROM losses")
        }

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Commit what the block does to the rows, with the counters that tell of it, or none of it."""
        change = Change(self._connection)
        with transaction(self._connection):
            yield change
            change.write()
        self.rows += change.rows
        self.kept += change.kept
        self.payload += change.payload
        self.next_id += change.produced
        self.confirmed += change.confirmed
        for pair, count in change.lost.items():
            self.lost[pair] = self.lost.get(pair, 0) + count

    def figures(self, disk_bytes: int, oldest_age: float | None) -> BufferStats:
        """Return the counters with two figures that only the disk knows."""
        return BufferStats(
            rows=self.rows,
            bytes=disk_bytes,
            payload_bytes=self.payload,
            oldest_age=oldest_age,
            lost=losses_by(self.lost, 0),
            lost_kinds=losses_by(self.lost, 1),
            produced=self.next_id - 1,
            confirmed=self.confirmed,
            buffer_id=self.buffer_id,
            durable=True,
        )
