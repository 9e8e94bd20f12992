"""What a keeper has a store do in one trip off the hub. Pure, as everything in here: no logging, no patched lock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.rows import EVENT, PROJECTION, RESULT
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from z4j_bare.buffer.rows import BufferEntry, BufferStats, LedgerEntry

    #: ``(after, limit, kinds)``.
    Query = tuple[int, int, Sequence[str]]

    #: What other processes' stores know of a command, given our own store's path.
    Others = Callable[[Path, str], LedgerEntry | None]

#: Rows moved from one store to another in one transaction, and their bytes.
COPY_ROWS = 500
COPY_BYTES = 4 * 1024 * 1024


def append(store: Any, add: Callable[[Any], int], look: bool) -> BufferStats | None:
    """Call ``add(store)``; return the figures from before, if they are wanted."""
    stats = (
        store.stats() if look else None
    )  # first: if it fails, the call is repeated, and rows must not be
    add(store)
    return stats


def each(read: Callable[..., Any], queries: Sequence[Query], max_bytes: int) -> list[Any]:
    """Return what ``read`` does for each query, and nothing where none is wanted."""
    return [
        read(after, limit, max_bytes, kinds) if limit > 0 else [] for after, limit, kinds in queries
    ]


def drain(
    store: Any, results: Query, events: Query, max_bytes: int, look: bool
) -> tuple[BufferStats | None, list[BufferEntry], list[BufferEntry]]:
    """Read the next rows; with the figures, if they are wanted."""
    found = each(store.drain, (results, events), max_bytes)
    return store.stats() if look else None, found[0], found[1]


def claim(
    store: Any, key: str, now: float, provisional_result: bytes, others: Others | None
) -> LedgerEntry | None:
    """Enter a command, unless it is known here or to another process."""
    # On memory we are on the hub, where no file may be read.
    elsewhere = others(store.path, key) if others is not None and store.durable else None
    found: LedgerEntry | None = elsewhere or store.claim(key, now, provisional_result)
    return found


def settle(store: Any, key: str, result: bytes, now: float) -> None:
    """See ``IStore.settle``."""
    store.settle(key, result, now)


def answer(store: Any, key: str, result: bytes, now: float) -> None:
    """See ``IStore.answer``."""
    store.answer(key, result, now)


def vacuum_step(store: Any) -> bool:
    """Tidy a little; return whether nothing is left to do."""
    try:
        return bool(store.vacuum_step())
    except LocalStorageError:  # it costs no row; if it is serious, the next append says so
        return False


def stats(store: Any) -> BufferStats:
    """Return the store's figures."""
    found: BufferStats = store.stats()
    return found


def move(heir: Any, source: Any) -> int:
    """Move everything from one store to another, so that a failure on the way doubles rows at worst."""
    left, moved = source.export_state(), 0
    while rows := source.drain(0, COPY_ROWS, COPY_BYTES, (EVENT, RESULT, PROJECTION)):
        heir.import_rows(rows)
        source.confirm([row.id for row in rows])
        moved += len(rows)
    heir.import_state(left)
    return moved
