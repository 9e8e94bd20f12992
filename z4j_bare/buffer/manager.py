"""Runs the store off the hub, and keeps going in memory while the disk fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from z4j_bare.buffer import trips
from z4j_bare.buffer.errors import BUSY, CORRUPT, DELETED, FULL, classify
from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.buffer.receipts import Receipt, Receipts
from z4j_bare.buffer.rows import (
    EVENT,
    NO_STATS,
    BufferEntry,
    BufferStats,
    LedgerEntry,
    StoreState,
    added,
    both,
)
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from z4j_bare.buffer.trips import Others, Query
    from z4j_bare.concurrency import BaseConcurrency

T = TypeVar("T")

logger = logging.getLogger("z4j.runtime.buffer")

#: Seconds between attempts to return to the disk: first, and at most.
RETRY_INITIAL = 5.0
RETRY_MAX = 300.0

#: Seconds for which a busy disk is asked again, and between two questions: at first, and at most.
BUSY_TIMEOUT = 3.0
BUSY_BACKOFF_INITIAL = 0.05
BUSY_BACKOFF_MAX = 0.5

#: Seconds between two looks at the figures: on a trip that is made anyway, and for their own sake.
STATS_INTERVAL = 1.0
STATS_INTERVAL_IDLE = 5.0

#: Seconds between two tidyings of an idle store, and between two warnings of one sort.
VACUUM_INTERVAL = 1.0
WARNING_INTERVAL = 60.0


class BufferManager:
    """What the loops see of the store. Every call is one offloaded transaction; nothing here raises for a bad disk.

    A busy disk is asked again for a while. A full one loses its oldest events, a corrupt file is set aside, one that was
    deleted is replaced, each once per call. What no remedy helps goes on in memory, and returns to the disk later.

    :param open_store: opens a new durable store; runs off the hub, at the first use.
    :param memory: makes the store that takes over when the disk fails.
    :param others: asks the other processes' stores about a command; runs off the hub.

    ``generation`` changes whenever row ids start over, because the rows now live somewhere else.
    """

    def __init__(
        self,
        open_store: Callable[[], Any],
        backend: BaseConcurrency,
        memory: Callable[[], MemoryStore] = MemoryStore,
        others: Others | None = None,
    ) -> None:
        self.generation = 0
        self.failures = 0
        self.last_stats = NO_STATS
        #: Rows in a dead process's file that wait for their turn; the adopting loop's.
        self.orphan_rows = 0
        self._open_store = open_store
        self._new_memory = memory
        self._others = others
        self._backend = backend
        self._turn = backend.lock()
        self._disk: Any = None
        self._memory: MemoryStore | None = None
        self._beneath = NO_STATS
        self._owed: dict[tuple[str, str], int] = {}
        self._receipts = Receipts()
        self._retry_at = 0.0
        self._retry_delay = RETRY_INITIAL
        self._looked_at = float("-inf")
        self._outdated = False
        self._tidied_at = float("-inf")
        self._untidy = True
        self._returned_at = float("-inf")
        self._noticed = False
        self._warned: dict[str, float] = {}
        self._remedies = {FULL: self._relieve, CORRUPT: self._set_aside, DELETED: self._abandon}

    @property
    def durable(self) -> bool:
        """Whether rows survive the process just now."""
        return self._memory is None

    @property
    def acked_events(self) -> int:
        """Events that the brain has, and that were deleted."""
        return self._receipts.events

    @property
    def is_idle(self) -> bool:
        """Whether the disk is well and tidy, and holds nothing that the brain has."""
        return self.durable and not self._receipts and not self._untidy

    def append(self, rows: Sequence[tuple[str, str, bytes]]) -> None:
        """Commit rows; see ``IStore.append``. Without a session nobody but this looks at the figures."""
        self._add(lambda store: store.append(rows))

    def append_events(self, payloads: Sequence[bytes]) -> None:
        """Commit events; see ``IStore.append_events``."""
        self._add(lambda store: store.append_events(payloads))

    def _add(self, add: Callable[[Any], int]) -> None:
        stats = self._run(trips.append, add, self._due())
        if stats is not None:
            self._note(stats)
        self._outdated = True

    def refresh_stats(self) -> None:
        """Look at the figures if rows came since the last look."""
        if self._outdated:
            self.stats()

    def ack(self, ids: Sequence[int], events: int, generation: int) -> None:
        """Take note of rows that the brain has, ``events`` of them events; the next trip deletes them.

        ``generation`` is the one that the ids are of: in another one the same numbers are other rows, which stay.
        """
        if ids:
            self._receipts.note(Receipt(generation, ids, events, self._backend.now()))

    def read_next(
        self, results: Query, events: Query, max_bytes: int
    ) -> tuple[list[BufferEntry], list[BufferEntry]]:
        """Read the next rows, results and events, in one trip; none of them is confirmed.

        A query is ``(after, limit, kinds)``. A trip with nothing to do tidies the file a little; what is in memory anyway
        takes none, as long as the rest can wait, and it can while nobody asks for events.
        """
        look, chores = self._due(), self._chores()
        if not self._due(STATS_INTERVAL_IDLE) and self._receipts.may_wait(
            events[0], self._backend.now()
        ):
            read_cached, busy = self._read_cached(results, events, max_bytes), not events[1]
            if read_cached is not None and (
                busy or any(read_cached) or not (chores or self._receipts)
            ):
                return read_cached
        tidied = False

        def trip(store: Any) -> tuple[BufferStats | None, list[BufferEntry], list[BufferEntry]]:
            nonlocal tidied
            found = trips.drain(store, results, events, max_bytes, look)
            if chores and not (found[1] or found[2]):
                self._untidy, tidied = not trips.vacuum_step(store), True
            return found

        stats, found_results, found_events = self._run(trip)
        if stats is not None:
            self._note(stats)
        if tidied:
            self._tidied_at = self._backend.now()
        return found_results, found_events

    def discard(self, ids: Sequence[int], reason: str, generation: int | None = None) -> None:
        """Delete undeliverable rows and count them; ``generation`` as in :meth:`ack`."""
        self._run(
            lambda store: store.discard(ids, reason) if generation in (None, self.generation) else 0
        )

    def mark_suspect(self, ids: Sequence[int], generation: int | None = None) -> None:
        """Note that these rows were on their way when a session died; ``generation`` as in :meth:`ack`."""
        self._run(
            lambda store: (
                store.increment_attempts(ids) if generation in (None, self.generation) else None
            )
        )

    def claim(self, key: str, provisional_result: bytes) -> LedgerEntry | None:
        """Enter a command as started, unless it is known here or to another process; see ``IStore.claim``."""
        entry: LedgerEntry | None = self._run(
            trips.claim, key, self._backend.wall(), provisional_result, self._others
        )
        return entry

    def settle(self, key: str, result: bytes) -> None:
        """Mark what was claimed under ``key`` as done; see ``IStore.settle``."""
        self._run(trips.settle, key, result, self._backend.wall())

    def answer(self, key: str, result: bytes) -> None:
        """Mark a command done and store its answer for sending; see ``IStore.answer``."""
        self._run(trips.answer, key, result, self._backend.wall())

    def stats(self) -> BufferStats:
        """Ask the store for its figures now."""
        self._note(self._run(trips.stats))
        return self.last_stats

    def run_on_disk(self, step: Callable[[Any], T]) -> T | None:
        """Run ``step(store)`` on the disk; ``None`` when there is only memory.

        Raises ``LocalStorageError`` and has no remedy for it: adopted rows are safe where they are.
        """
        with self._turn:
            if self._memory is not None:
                return None
            ok, value = self._backend.offload(self._on_disk, step, ())
            self._say()
        if not ok:
            raise value
        found: T = value
        return found

    def close(self) -> None:
        """Close what is open; what is in memory gets a last chance to reach the disk."""
        with self._turn:
            memory = self._memory
            if memory is not None and (memory.size() or memory.export_state().ledger):
                self._return_to_disk()
                if self._memory is not None and memory.size():
                    logger.warning(
                        "z4j: %d rows were in memory only, and are lost with this process",
                        memory.size(),
                    )
            for store in (self._disk, self._memory):
                if store is not None:
                    self._backend.offload(self._bury, store)
            self._disk = self._memory = None

    def _chores(self) -> bool:
        """Whether the file is to be tidied, should nothing else be to do."""
        return (
            self._untidy
            and not self._receipts
            and self._backend.now() - self._tidied_at >= VACUUM_INTERVAL
        )

    def _due(self, every: float = STATS_INTERVAL) -> bool:
        return self._backend.now() - self._looked_at > every

    def _note(self, stats: BufferStats) -> None:
        memory = self._memory
        stands_in = memory is not None and memory.buffer_id == stats.buffer_id
        self.last_stats = both(self._beneath, stats) if stands_in else stats
        self._looked_at, self._outdated = self._backend.now(), False

    def _read_cached(
        self, results: Query, events: Query, max_bytes: int
    ) -> tuple[list[BufferEntry], list[BufferEntry]] | None:
        with self._turn:  # nobody is inside the store meanwhile
            disk = self._disk
            if disk is None or self._memory is not None:
                return None
            found = trips.each(disk.read_cached, (results, events), max_bytes)
        return None if None in found else (found[0], found[1])

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._turn:
            if self._memory is not None and self._backend.now() >= self._retry_at:
                self._return_to_disk()
            if self._memory is None:
                ok, value = self._attempt(function, args)
                if ok:
                    return value
                self._fall_back(value)
            return self._visit(self._memory, function, args)

    def _attempt(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
        """Call on the disk, with patience for a busy one and one remedy for an ill one; return as ``offload`` does."""
        deadline, delay, remedied = self._backend.now() + BUSY_TIMEOUT, BUSY_BACKOFF_INITIAL, False
        while True:
            ok, value = self._backend.offload(self._on_disk, function, args)
            self._say()
            if ok or not isinstance(value, LocalStorageError):
                return ok, value
            cause = classify(value)
            if cause == BUSY and self._backend.now() < deadline:
                self._backend.sleep(delay)
                delay = min(delay * 2, BUSY_BACKOFF_MAX)
                continue
            remedy = self._remedies.get(cause)
            if remedied or remedy is None or self._disk is None or not remedy(value):
                return False, value
            remedied = True

    def _on_disk(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._disk is None:
            self._disk = self._open_store()
        if self._owed:
            self._disk.import_state(StoreState(self._owed))
            self._owed = {}
        return self._visit(self._disk, function, args)

    def _visit(self, store: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call ``function`` on a store without what the brain has: in a full one it would be evicted, and count as lost."""
        self._delete_confirmed(store)
        return function(store, *args)

    def _delete_confirmed(self, store: Any) -> None:
        if self._receipts and store is (self._memory or self._disk):
            self._untidy = True  # first: at no moment may the store look settled
            self._receipts.redeem(store, self.generation)

    def _bury(self, store: Any) -> None:
        try:
            self._delete_confirmed(store)
        except LocalStorageError:  # the next process sends them again
            pass
        finally:
            store.close()

    # -- remedies: called on the hub, with the error; whether the call is worth another try

    def _relieve(self, error: LocalStorageError) -> bool:
        ok, cost = self._backend.offload(self._disk.free_space)
        if ok:
            self._warn(
                "full", "z4j: the disk is full: the %d oldest events had to go (%s)", cost, error
            )
        return ok

    def _set_aside(self, error: LocalStorageError) -> bool:
        """Count every row of the corrupt file as lost: it may still hold some, but nobody can tell which."""
        disk, self._disk = self._disk, None
        self._owe(disk.state_if_abandoned().losses)
        self._backend.offload(disk.quarantine)
        self.generation += 1
        self._warn(
            "corrupt",
            "z4j: the buffer is corrupt; its file was set aside and a new one begun (%s)",
            error,
        )
        return True

    def _abandon(self, error: LocalStorageError) -> bool:
        """Take along what the file without a name still holds."""
        disk, self._disk = self._disk, None
        self.generation += 1
        ok, moved = self._backend.offload(self._on_disk, trips.move, (disk,))
        if left := disk.size():
            self._owe({(DELETED, EVENT): left})
        self._backend.offload(disk.close)
        self._warn(
            "gone",
            "z4j: the buffer's file was deleted; a new one was begun, %s rows came along (%s)",
            moved,
            error,
        )
        return ok

    def _owe(self, losses: dict[tuple[str, str], int]) -> None:
        for pair, count in losses.items():
            self._owed[pair] = self._owed.get(pair, 0) + count

    # -- without a disk

    def _fall_back(self, error: BaseException) -> None:
        if not isinstance(error, LocalStorageError):
            raise error
        self.failures += 1
        self._memory = self._new_memory()
        self.generation += 1
        self._beneath = self._below()
        if self._backend.now() - self._returned_at > RETRY_MAX:
            self._retry_delay = RETRY_INITIAL
        self._retry_at = self._backend.now() + self._retry_delay
        self._warn(
            "memory", "z4j: the buffer is in memory only, because the disk failed: %s", error
        )

    def _below(self) -> BufferStats:
        """Return what is on the disk that failed, as far as we remember: it is still buffered, or already lost."""
        below = self.last_stats
        if self._disk is not None:
            ok, value = self._backend.offload(self._disk.cached_stats)
            below = value if ok else below
        owed = StoreState(self._owed)
        return replace(
            below,
            lost=added(below.lost, owed.by(0)),
            lost_kinds=added(below.lost_kinds, owed.by(1)),
        )

    def _return_to_disk(self) -> None:
        memory = self._memory
        ok, value = self._attempt(trips.move, (memory,))
        if ok:
            self._memory = None
            self.generation += 1
            self._untidy, self._looked_at = True, float("-inf")
            self._returned_at = self._backend.now()
            self._warn("disk", "z4j: the buffer is on disk again; %d rows came along", value)
        self._retry_delay = min(self._retry_delay * 2, RETRY_MAX)
        self._retry_at = self._backend.now() + self._retry_delay

    def _say(self) -> None:
        """Pass on, once, what the store could not log where it was opened."""
        notice = getattr(self._disk, "notice", "")
        if notice and not self._noticed:
            self._noticed = True
            logger.warning("z4j: %s", notice)

    def _warn(self, sort: str, text: str, *args: object) -> None:
        now = self._backend.now()
        quiet = now - self._warned.get(sort, float("-inf")) < WARNING_INTERVAL
        if not quiet:
            self._warned[sort] = now
        logger.log(logging.DEBUG if quiet else logging.WARNING, text, *args)
