"""Which commands were begun and finished, so that none runs twice: not after a restart either."""

from __future__ import annotations

from contextlib import closing
from dataclasses import astuple
from typing import TYPE_CHECKING

from z4j_bare.buffer.rows import DONE, LEDGER_CAP, STARTED, LedgerEntry, replace_surrogates
from z4j_bare.buffer.schema import scalar, transaction

if TYPE_CHECKING:
    import sqlite3

#: Seconds for which an entry justifies keeping an otherwise empty file: the existing agent's memory of
#: command ids, five times the brain's own deadline for a command.
RETENTION = 300.0


class Ledger:
    """The ledger table of one store: at most 10,000 entries, the newest; at most ``max_bytes`` of results.

    An entry outlives its result: a command must not run again only because its old answer took too much room.
    """

    def __init__(self, connection: sqlite3.Connection, max_bytes: int) -> None:
        self._connection = connection
        self._max_bytes = max_bytes
        self._bytes = scalar(connection, "SELECT coalesce(sum(length(result)), 0) FROM ledger")

    def find(self, key: str) -> LedgerEntry | None:
        """Return what is known of command ``key``."""
        row = self._connection.execute(
            "SELECT key, state, result, at FROM ledger WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else LedgerEntry(*row)

    def claim(self, key: str, now: float, provisional_result: bytes) -> LedgerEntry | None:
        """Enter ``key`` as started with its ``provisional_result``, or return the earlier entry."""
        key = replace_surrogates(key)
        earlier = self.find(key)
        if earlier is None:
            self._insert(key, STARTED, provisional_result, now)
        return earlier

    def settle(self, key: str, result: bytes, now: float) -> None:
        """Mark ``key`` done with its ``result``; a key that the cap has pushed out is entered again."""
        key = replace_surrogates(key)
        earlier = self.find(key)
        if earlier is None:
            self._insert(key, DONE, result, now)
            return
        with transaction(self._connection):
            self._connection.execute(
                "UPDATE ledger SET state = ?, result = ?, at = ? WHERE key = ?",
                (DONE, result, now, key),
            )
            size = self._trim_results(self._bytes + len(result) - len(earlier.result))
        self._bytes = size

    def count_recent(self, now: float) -> int:
        """Return how many entries are younger than the retention."""
        query = "SELECT count(*) FROM ledger WHERE at > ?"
        return int(self._connection.execute(query, (now - RETENTION,)).fetchone()[0])

    def recent_entries(self, now: float) -> tuple[LedgerEntry, ...]:
        """Return the entries younger than the retention, oldest first."""
        query = "SELECT key, state, result, at FROM ledger WHERE at > ? ORDER BY seq"
        return tuple(
            LedgerEntry(*row)
            for row in self._connection.execute(query, (now - RETENTION,)).fetchall()
        )

    def import_state(self, entry: LedgerEntry) -> None:
        """Enter what another store knows, unless more is known here."""
        earlier = self.find(entry.key)
        if earlier is None:
            self._insert(*astuple(entry))
        elif earlier.state == STARTED and entry.state == DONE:
            self.settle(entry.key, entry.result, entry.at)

    def _insert(self, key: str, state: str, result: bytes, now: float) -> None:
        with transaction(self._connection):
            cursor = self._connection.execute(
                "INSERT INTO ledger (key, state, result, at) VALUES (?, ?, ?, ?)",
                (key, state, result, now),
            )
            last = ((cursor.lastrowid or 0) - LEDGER_CAP,)
            freed = self._connection.execute(
                "SELECT coalesce(sum(length(result)), 0) FROM ledger WHERE seq <= ?", last
            ).fetchone()[0]
            self._connection.execute("DELETE FROM ledger WHERE seq <= ?", last)
            size = self._trim_results(self._bytes + len(result) - freed)
        self._bytes = size

    def _trim_results(self, size: int) -> int:
        """Drop the oldest results until they fit; return the bytes left."""
        if size <= self._max_bytes:
            return size
        last = 0
        query = "SELECT seq, length(result) FROM ledger WHERE length(result) > 0 ORDER BY seq"
        with closing(self._connection.execute(query)) as cursor:
            for last, length in cursor:  # noqa: B007  (the last one seen is the boundary)
                size -= length
                if size <= self._max_bytes:
                    break
        self._connection.execute(
            "UPDATE ledger SET result = x'' WHERE seq <= ? AND length(result) > 0", (last,)
        )
        return size
