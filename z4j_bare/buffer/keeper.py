"""Runs the store off the hub, and keeps going in memory while the disk fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.buffer.rows import EVENT, PROJECTION, RESULT, BufferEntry, BufferStats
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.buffer")

#: Seconds between attempts to return to the disk: first, and at most.
RETRY_FIRST = 5.0
RETRY_LONGEST = 300.0

#: Rows moved back to the disk in one transaction.
MOVE = 500

Query = tuple[int, int, Sequence[str]]

#: The figures of a store that has not been asked yet.
UNKNOWN = BufferStats(0, 0, 0, None, {}, {}, 0, 0, "unopened", durable=False)


class Keeper:
    """What the loops see of the store. Every call is one offloaded transaction; nothing here raises for a bad disk.

    :param open_store: opens the durable store; runs off the hub, at the first use.
    :param memory: makes the store that takes over when the disk fails.

    ``generation`` changes whenever row ids start over, because the rows now live somewhere else.
    """

    def __init__(
        self, open_store: Callable[[], Any], seam: BaseConcurrency, memory: Callable[[], MemoryStore] = MemoryStore
    ) -> None:
        self.generation = 0
        self.failures = 0
        self.last_stats = UNKNOWN
        self._open_store = open_store
        self._new_memory = memory
        self._seam = seam
        self._turn = seam.lock()
        self._disk: Any = None
        self._memory: MemoryStore | None = None
        self._retry_at = 0.0
        self._retry_delay = RETRY_FIRST
        self._looked_at = float("-inf")

    @property
    def durable(self) -> bool:
        """Whether rows survive the process just now."""
        return self._memory is None

    def append(self, rows: Sequence[tuple[str, str, bytes]]) -> None:
        """Commit rows; see ``IStore.append``."""
        self._run(_append, rows)

    def exchange(
        self, confirmed: Sequence[int], results: Query, events: Query, max_bytes: int, generation: int | None = None
    ) -> tuple[list[BufferEntry], list[BufferEntry]]:
        """Delete confirmed rows and read the next ones, results and events, in one trip.

        A query is ``(after, limit, kinds)``. ``generation`` is the one that the confirmed ids are of: in another one the
        same numbers are other rows, and nothing is deleted.
        """
        look = self._seam.now() - self._looked_at > 1.0

        def trip(store: Any) -> tuple[BufferStats | None, list[BufferEntry], list[BufferEntry]]:
            valid = confirmed if generation in (None, self.generation) else ()
            return _exchange(store, valid, results, events, max_bytes, look)

        stats, found_results, found_events = self._run(trip)
        if stats is not None:
            self.last_stats, self._looked_at = stats, self._seam.now()
        return found_results, found_events

    def discard(self, ids: Sequence[int], reason: str) -> None:
        """Delete undeliverable rows and count them."""
        self._run(_discard, ids, reason)

    def stats(self) -> BufferStats:
        """Ask the store for its figures now."""
        self.last_stats, self._looked_at = self._run(_stats), self._seam.now()
        return self.last_stats

    def close(self) -> None:
        """Close what is open."""
        with self._turn:
            for store in (self._disk, self._memory):
                if store is not None:
                    self._seam.offload(store.close)
            self._disk = self._memory = None

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._turn:
            if self._memory is not None and self._seam.now() >= self._retry_at:
                self._return_to_disk()
            if self._memory is None:
                ok, value = self._seam.offload(self._on_disk, function, args)
                if ok:
                    return value
                self._fall_back(value)
            return function(self._memory, *args)

    def _on_disk(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._disk is None:
            self._disk = self._open_store()
        return function(self._disk, *args)

    def _fall_back(self, error: BaseException) -> None:
        if not isinstance(error, LocalStorageError):
            raise error
        self.failures += 1
        self._memory = self._new_memory()
        self.generation += 1
        self._retry_at = self._seam.now() + self._retry_delay
        logger.warning("z4j: the buffer is in memory only, because the disk failed: %s", error)

    def _return_to_disk(self) -> None:
        memory = self._memory
        ok, value = self._seam.offload(self._on_disk, _move, (memory,))
        if ok:
            self._memory = None
            self.generation += 1
            self._retry_delay = RETRY_FIRST
            logger.warning("z4j: the buffer is on disk again; %d rows came along", value)
        else:
            self._retry_delay = min(self._retry_delay * 2, RETRY_LONGEST)
            self._retry_at = self._seam.now() + self._retry_delay


def _append(store: Any, rows: Sequence[tuple[str, str, bytes]]) -> int:
    evicted: int = store.append(rows)
    return evicted


def _exchange(
    store: Any, confirmed: Sequence[int], results: Query, events: Query, max_bytes: int, look: bool
) -> tuple[BufferStats | None, list[BufferEntry], list[BufferEntry]]:
    if confirmed:
        store.confirm(confirmed)
    found = [
        store.drain(after, limit, max_bytes, kinds) if limit > 0 else [] for after, limit, kinds in (results, events)
    ]
    return store.stats() if look else None, found[0], found[1]


def _discard(store: Any, ids: Sequence[int], reason: str) -> None:
    store.discard(ids, reason)


def _stats(store: Any) -> BufferStats:
    stats: BufferStats = store.stats()
    return stats


def _move(disk: Any, memory: MemoryStore) -> int:
    moved = 0
    while rows := memory.drain(0, MOVE, 1 << 30, (EVENT, RESULT, PROJECTION)):
        disk.append([(row.kind, row.key, row.payload) for row in rows])
        memory.confirm([row.id for row in rows])
        moved += len(rows)
    return moved
