"""The ledger, a record of started and finished commands. It prevents a second run of a command."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import astuple
from typing import TYPE_CHECKING

from z4j_bare.buffer import files
from z4j_bare.buffer.rows import (
    DONE,
    FAILED,
    IN_OTHER_PROCESS,
    LEDGER_CAP,
    STARTED,
    LedgerEntry,
    replace_surrogates,
)
from z4j_bare.buffer.schema import read_only, scalar, transaction
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    import os
    from pathlib import Path

#: Seconds for which an entry counts as recent: five times the brain's timeout of a command.
#: When a store without rows is closed, it is deleted, unless its ledger has a recent entry.
RETENTION = 300.0

_FIND = "SELECT key, state, result, at FROM ledger WHERE key = ?"


class Ledger:
    """The ledger table of one store.

    The table contains the newest 10,000 commands and at most ``max_bytes`` of results. Above this
    limit, the oldest results are dropped. The entries of these results stay, so that the commands
    do not run again.
    """

    def __init__(self, connection: sqlite3.Connection, max_bytes: int) -> None:
        self._connection = connection
        self._max_bytes = max_bytes
        self._bytes = scalar(connection, "SELECT coalesce(sum(length(result)), 0) FROM ledger")

    def find(self, key: str) -> LedgerEntry | None:
        """Return the entry of command ``key``, or ``None``."""
        return _find(self._connection, key)

    def claim(self, key: str, now: float, provisional_result: bytes) -> LedgerEntry | None:
        """Insert command ``key`` as started, with its provisional result, and return ``None``.

        If the command already has an entry, change nothing and return that entry. But an entry with
        the state ``failed`` is replaced, so that the command can run again.
        """
        if not key.isascii():
            key = replace_surrogates(key)
        earlier = self.find(key)
        if earlier is None or earlier.state == FAILED:
            self._replace(earlier, LedgerEntry(key, STARTED, provisional_result, now))
            return None
        return earlier

    def settle(self, key: str, result: bytes, now: float, state: str = DONE) -> None:
        """Mark command ``key`` as done, or with another ``state``, and store its ``result``.

        Inserts a new entry if the old entry was removed because of ``LEDGER_CAP``.
        """
        if not key.isascii():
            key = replace_surrogates(key)
        self._replace(self.find(key), LedgerEntry(key, state, result, now))

    def count_recent(self, now: float) -> int:
        """Return the number of entries younger than ``RETENTION``."""
        query = "SELECT count(*) FROM ledger WHERE at > ?"
        return int(self._connection.execute(query, (now - RETENTION,)).fetchone()[0])

    def recent_entries(self, now: float) -> tuple[LedgerEntry, ...]:
        """Return the entries younger than ``RETENTION``, oldest first."""
        query = "SELECT key, state, result, at FROM ledger WHERE at > ? ORDER BY seq"
        return tuple(
            LedgerEntry(*row)
            for row in self._connection.execute(query, (now - RETENTION,)).fetchall()
        )

    def import_entry(self, entry: LedgerEntry) -> None:
        """Insert another store's entry if it supersedes the existing entry."""
        earlier = self.find(entry.key)
        if entry.supersedes(earlier):
            self._replace(earlier, entry)

    def _replace(self, earlier: LedgerEntry | None, entry: LedgerEntry) -> None:
        if earlier is None:
            self._insert(*astuple(entry))
            return
        with transaction(self._connection):
            self._connection.execute(
                "UPDATE ledger SET state = ?, result = ?, at = ? WHERE key = ?",
                (entry.state, entry.result, entry.at, entry.key),
            )
            size = self._trim_results(self._bytes + len(entry.result) - len(earlier.result))
        self._bytes = size

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
        """Drop the oldest results until the remaining results fit; return their total bytes."""
        if size <= self._max_bytes:
            return size
        last = 0
        query = "SELECT seq, length(result) FROM ledger WHERE length(result) > 0 ORDER BY seq"
        with closing(self._connection.execute(query)) as cursor:
            for last, length in cursor:  # noqa: B007
                size -= length
                if size <= self._max_bytes:
                    break
        self._connection.execute(
            "UPDATE ledger SET result = x'' WHERE seq <= ? AND length(result) > 0", (last,)
        )
        return size


def find_in_other_stores(
    buffer_path: str | os.PathLike[str], own: Path, key: str
) -> LedgerEntry | None:
    """Return the entry of command ``key`` in the stores of other processes, running or dead.

    The brain may deliver a command to any process of an agent. An unfinished command is returned
    with the state ``elsewhere``, because another process sends its result. An entry with the
    state ``failed`` is not returned, because the command may run again.

    The function runs on the native thread and never raises.

    :param own: path of this process's store, which is skipped.
    """
    if not key.isascii():
        key = replace_surrogates(key)
    unfinished = None
    try:
        for directory in files.candidate_directories(buffer_path):
            for path in files.list_stores(directory):
                entry = _find_in_file(path, key) if path != own else None
                if entry is not None and entry.state == DONE:
                    return entry
                if entry is not None and entry.state != FAILED:
                    unfinished = unfinished or entry
    except (OSError, LocalStorageError):  # use the entries that were read before the error
        pass
    return unfinished and LedgerEntry(key, IN_OTHER_PROCESS, b"", unfinished.at)


def _find_in_file(path: Path, key: str) -> LedgerEntry | None:
    try:
        with read_only(path) as connection:
            return _find(connection, key)
    except sqlite3.Error:
        return None


def _find(connection: sqlite3.Connection, key: str) -> LedgerEntry | None:
    row = connection.execute(_FIND, (key,)).fetchone()
    return None if row is None else LedgerEntry(*row)
