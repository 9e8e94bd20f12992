"""SQL over the rows; text is built from constants of ours only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from z4j_bare.buffer.rows import EVENT, KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable

INSERT = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)"
DELETE = "DELETE FROM entries WHERE id BETWEEN ? AND ?"
ATTEMPT = "UPDATE entries SET attempts = attempts + 1 WHERE id BETWEEN ? AND ?"
WEIGH = "SELECT kind, count(*), sum(length(payload)) FROM entries WHERE id BETWEEN ? AND ? GROUP BY kind"
TOTALS = "SELECT count(*), coalesce(sum(length(payload)), 0) FROM entries"
KEPT = "SELECT count(*) FROM entries INDEXED BY entries_kept WHERE kind <> 'event'"
FIRST = "SELECT id, created_at FROM entries ORDER BY id LIMIT 1"
INSERT_BATCH = "INSERT INTO batches VALUES (?, ?, ?, ?)"
DELETE_BATCH = "DELETE FROM batches WHERE last = ?"
BATCHES = "SELECT last, count, created_at, payloads FROM batches WHERE last > ? ORDER BY last"
OLDEST_BATCH = "SELECT last, last - count + 1, created_at FROM batches ORDER BY last LIMIT 1"
BATCH_TOTALS = "SELECT count(*), coalesce(sum(count), 0), coalesce(sum(length(payloads) - count + 1), 0) FROM batches"
DONE = "UPDATE meta SET value = ? WHERE key = 'done'"
DONE_SO_FAR = "SELECT value FROM meta WHERE key = 'done'"
LOSE = "INSERT INTO losses VALUES (?, ?, ?) ON CONFLICT (reason, kind) DO UPDATE SET rows = losses.rows + excluded.rows"
COUNT = "UPDATE meta SET value = value + ? WHERE key = ?"


def drain(kinds: Iterable[str]) -> str:
    """Select the oldest entries of some kinds; takes ``after`` and ``limit``."""
    wanted = sorted(KINDS.intersection(kinds))
    where = f"kind IN ({', '.join(map(repr, wanted))}) AND " if len(wanted) < len(KINDS) else ""
    index = ""
    if wanted and EVENT not in wanted:
        index, where = "INDEXED BY entries_kept", where + "kind <> 'event' AND "
    return (
        "SELECT id, kind, key, payload, created_at, attempts "  # noqa: S608
        f"FROM entries {index} WHERE {where}id > ? ORDER BY id LIMIT ?"
    )


def oldest(kind: str) -> str:
    """Select id and payload length of the oldest rows of a kind; takes ``limit``."""
    index, also = ("", "") if kind == EVENT else ("INDEXED BY entries_kept", "AND kind <> 'event' ")
    return (
        f"SELECT id, length(payload) FROM entries {index} "  # noqa: S608
        f"WHERE kind = '{kind}' {also}ORDER BY id LIMIT ?"
    )
