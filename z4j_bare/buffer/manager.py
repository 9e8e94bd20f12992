"""The part of the buffer that runs on the hub, and calls the store on the native thread.

While the disk does not work, a store in memory replaces the store on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from z4j_bare.buffer import store_worker
from z4j_bare.buffer.accounting import ProcessAccounting
from z4j_bare.buffer.errors import BUSY, CORRUPT, DELETED, FULL, classify
from z4j_bare.buffer.maintenance import (
    AckedRows,
    DiskRetry,
    PendingDeletes,
    PendingSnapshot,
    VacuumSchedule,
)
from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.buffer.rows import DONE, EVENT, BufferEntry, BufferStats, LedgerEntry
from z4j_bare.buffer.store_worker import CallResult, Progress, StoreWorker
from z4j_bare.errors import LocalStorageError
from z4j_bare.wire.backoff import Backoff

if TYPE_CHECKING:
    from z4j_bare.buffer.store import BufferStore
    from z4j_bare.buffer.store_worker import LedgerLookup, RowQuery, Store
    from z4j_bare.concurrency import BaseConcurrency

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

logger = logging.getLogger("z4j.runtime.buffer.manager")

#: Seconds for which a call is repeated while the disk is busy.
BUSY_TIMEOUT = 3.0
#: Seconds before a call to a busy disk is repeated for the first time.
BUSY_BACKOFF_INITIAL = 0.05
#: Maximum seconds between two repetitions of a call to a busy disk.
BUSY_BACKOFF_MAX = 0.5

#: Maximum age of the stats in seconds.
#: If the stats are older, the next call to the store reads them again.
STATS_INTERVAL = 1.0
#: Maximum age of the stats in seconds while all reads are answered from the cache.
STATS_INTERVAL_IDLE = 5.0

#: Minimum seconds between two warnings about the same subject.
WARNING_INTERVAL = 60.0

#: How the operator can end the shortage on a full disk.
_FREE_SPACE = (
    "Free disk space, or lower Z4J_BUFFER_MAX_BYTES, which each process of this Z4J_HOME may use"
)


class BufferManager:
    """The buffer as the agent's loops use it, on the hub.

    An operation makes one call on the native thread. Only :meth:`run_on_disk` raises errors of the
    disk. While the disk is busy, the call is repeated. If the disk is full, the file is shrunk. If
    shrinking frees too little space, the oldest events are evicted. A corrupt file is quarantined,
    and a deleted file is replaced. After any other error, or if the call fails again after such a
    recovery, a store in memory is used.

    :param open_store: opens a new store on disk; runs on the native thread at the first operation.
    :param memory: returns a new store in memory, which replaces a failed disk.
    :param lookup: finds a command in stores of other processes; runs on the native thread.
    """

    def __init__(
        self,
        open_store: Callable[[], BufferStore],
        backend: BaseConcurrency,
        memory: Callable[[], MemoryStore] = MemoryStore,
        lookup: LedgerLookup | None = None,
    ) -> None:
        #: Incremented when a new store replaces the current store.
        #: A row id is valid in one generation only.
        self.generation = 0
        #: Number of times that a store in memory replaced the failed disk.
        self.failures = 0
        #: Number of rows in a dead process's store that the adopt loop has not moved yet.
        self.orphan_rows = 0
        self._backend = backend
        self._new_memory = memory
        self._lookup = lookup
        self._lock = backend.lock()
        self._disk = StoreWorker(open_store)
        self._memory: MemoryStore | None = None
        self._accounting = ProcessAccounting()
        self._pending = PendingDeletes()
        self._retry = DiskRetry()
        self._vacuum = VacuumSchedule()
        self._warnings = RateLimitedWarnings(backend)

    @property
    def durable(self) -> bool:
        """Whether new rows are stored on disk and survive the end of the process."""
        return self._memory is None

    @property
    def last_stats(self) -> BufferStats:
        """The last stats that were read."""
        return self._accounting.latest

    @property
    def acked_events(self) -> int:
        """Number of events that were deleted because the brain acknowledged them."""
        return self._accounting.acked_events

    @property
    def is_idle(self) -> bool:
        """Whether the disk works, needs no vacuum and contains no acknowledged rows."""
        return self.durable and not self._pending and not self._vacuum.needed

    # -- rows

    def append(self, rows: Sequence[tuple[str, str, bytes]]) -> None:
        """Commit ``(kind, key, payload)`` rows; see ``IStore.append``."""
        with self._lock:
            self._on_appended(self._run(store_worker.append, rows, self._stats_due()))

    def append_events(self, payloads: Sequence[bytes]) -> None:
        """Commit events; see ``IStore.append_events``."""
        with self._lock:
            self._on_appended(self._run(store_worker.append_events, payloads, self._stats_due()))

    def ack(self, ids: Sequence[int], events: int, generation: int) -> None:
        """Record acknowledged rows. The next call to the store deletes the rows.

        :param events: how many of the rows are events.
        :param generation: the generation of the ids. Ids of an earlier generation are ignored.
        """
        if ids:
            self._pending.add(AckedRows(generation, ids, events, self._backend.now()))

    def read_next(
        self, results: RowQuery, events: RowQuery, max_bytes: int
    ) -> tuple[list[BufferEntry], list[BufferEntry]]:
        """Return the next results and the next events without deleting them.

        A query is ``(after, limit, kinds)``. Cached rows are returned without a call on the native
        thread, unless the stats must be read again or the deletion of acknowledged rows is overdue.
        If no rows are left, a query for events makes the call anyway, to delete acknowledged rows
        or to run a due vacuum step.
        """
        now = self._backend.now()
        vacuum = not self._pending and self._vacuum.is_due(now)
        if not self._accounting.is_due(now, STATS_INTERVAL_IDLE) and self._pending.can_defer(
            events[0], now
        ):
            cached = self._read_cached(results, events, max_bytes)
            can_wait = not events[1] or not (vacuum or self._pending)
            if cached is not None and (can_wait or any(cached)):
                return cached
        with self._lock:
            read = self._run(
                store_worker.read_next, results, events, max_bytes, self._stats_due(), vacuum
            )
            if read.stats is not None:
                self._update_stats(read.stats)
            if read.vacuumed is not None:
                self._vacuum.on_step(self._backend.now(), complete=read.vacuumed)
        return read.results, read.events

    def discard(self, ids: Sequence[int], reason: str, generation: int | None = None) -> None:
        """Delete undeliverable rows and count these rows as lost.

        :param generation: the generation of the ids; see :meth:`ack`. ``None`` means any.
        """
        with self._lock:
            self._run_in_generation(generation, _discard, ids, reason)

    def increment_attempts(self, ids: Sequence[int], generation: int | None = None) -> None:
        """Add 1 to ``attempts`` of each of these rows; see :meth:`ack` for ``generation``."""
        with self._lock:
            self._run_in_generation(generation, _increment_attempts, ids)

    # -- the ledger of commands

    def claim(self, key: str, provisional_result: bytes) -> LedgerEntry | None:
        """Insert a command as started, and return ``None``.

        If the store of this or another process has an entry of the command, return that entry.
        """
        now = self._backend.wall()
        with self._lock:
            return self._run(store_worker.claim, key, now, provisional_result, self._lookup)

    def settle(self, key: str, result: bytes, state: str = DONE) -> None:
        """Mark a command as done and store its result; see ``IStore.settle``."""
        now = self._backend.wall()
        with self._lock:
            self._run(_settle, key, result, now, state)

    def settle_and_queue(self, key: str, result: bytes) -> None:
        """Mark a command as done and append its result; see ``IStore.settle_and_queue``."""
        now = self._backend.wall()
        with self._lock:
            self._run(_settle_and_queue, key, result, now)

    # -- stats and the store

    def stats(self) -> BufferStats:
        """Read the stats of the store now and return them."""
        with self._lock:
            self._update_stats(self._run(_stats))
            return self.last_stats

    def refresh_stats(self) -> None:
        """Read the stats if rows were appended after the last read."""
        if self._accounting.outdated:
            self.stats()

    def run_on_disk(self, operation: Callable[[BufferStore], T]) -> T | None:
        """Run ``operation(store)`` on the native thread; return ``None`` while memory is in use.

        Raises ``LocalStorageError``. An error starts no recovery: the operations only adopt rows,
        and rows that were not adopted stay in the file of the dead process.
        """
        with self._lock:
            if self._memory is not None:
                return None
            result = self._call_disk(operation)
        if result.error is not None:
            raise result.error
        return result.value

    def close(self) -> None:
        """Close the store. If the disk works, first move the rows in memory to the disk."""
        with self._lock:
            memory = self._memory
            if memory is not None and (memory.size() or memory.export_state().ledger):
                self._return_to_disk(memory)
                if self._memory is not None and memory.size():
                    logger.warning(
                        "z4j: %d rows were in memory only and are lost with this process; "
                        "check the disk of Z4J_HOME",
                        memory.size(),
                    )
            pending = self._pending.snapshot(self.generation)
            on_disk = () if self._memory is not None else pending.ids
            ok, deleted = self._backend.offload(self._disk.close, on_disk)
            if self._memory is not None:
                in_memory = store_worker.delete_and_close
                ok, deleted = self._backend.offload(in_memory, self._memory, pending.ids)
            if ok and deleted:
                self._on_deleted(pending)
            self._memory = None

    # -- internals: all callers hold the lock, except the caller of ``_read_cached``

    def _stats_due(self) -> bool:
        return self._accounting.is_due(self._backend.now(), STATS_INTERVAL)

    def _on_appended(self, stats: BufferStats | None) -> None:
        if stats is not None:
            self._update_stats(stats)
        self._accounting.outdated = True

    def _update_stats(self, stats: BufferStats) -> None:
        self._accounting.update(stats, self._backend.now())

    def _read_cached(
        self, results: RowQuery, events: RowQuery, max_bytes: int
    ) -> tuple[list[BufferEntry], list[BufferEntry]] | None:
        with self._lock:  # no call runs on the native thread meanwhile
            if self._memory is not None:
                return None
            cached = self._disk.read_cached(results, events, max_bytes)
        return None if cached is None else (cached.results, cached.events)

    def _run(self, operation: Callable[[Store, *Ts], T], *args: *Ts) -> T:
        """Run an operation on the store on disk, or on the store in memory if the disk fails."""
        memory = self._memory_in_use()
        if memory is None:
            result = self._try_disk(None, operation, *args)
            if result.error is None:
                return result.value  # type: ignore[return-value]
            memory = self._switch_to_memory(result.error)
        return self._run_in_memory(memory, operation, *args)

    def _run_in_generation(
        self, generation: int | None, operation: Callable[[Store, *Ts], object], *args: *Ts
    ) -> None:
        """Run an operation on rows of ``generation``; ``None`` means the current generation.

        Does nothing if another store has replaced the store of ``generation``.
        """
        memory = self._memory_in_use()
        if memory is None:
            result = self._try_disk(generation, operation, *args)
            if result.error is None:
                return
            memory = self._switch_to_memory(result.error)
        if generation in (None, self.generation):
            self._run_in_memory(memory, operation, *args)

    def _memory_in_use(self) -> MemoryStore | None:
        """Retry a failed disk if due; return the store in memory, or ``None`` if unused."""
        if self._memory is not None and self._retry.is_due(self._backend.now()):
            self._return_to_disk(self._memory)
        return self._memory

    def _run_in_memory(
        self, memory: MemoryStore, operation: Callable[[Store, *Ts], T], *args: *Ts
    ) -> T:
        pending = self._pending.snapshot(self.generation)
        if pending.ids:
            memory.confirm(pending.ids)
        self._on_deleted(pending)
        return operation(memory, *args)

    def _try_disk(
        self, generation: int | None, operation: Callable[[BufferStore, *Ts], T], *args: *Ts
    ) -> CallResult[T]:
        """Call the store on disk. Repeat while it is busy; recover once from another error."""
        deadline = self._backend.now() + BUSY_TIMEOUT
        delays = Backoff(BUSY_BACKOFF_INITIAL, BUSY_BACKOFF_MAX)
        recovered = False
        while True:
            if generation not in (None, self.generation):
                return CallResult(Progress.DONE)
            result = self._call_disk(operation, *args)
            error = result.error
            if not isinstance(error, LocalStorageError):
                return result
            cause = classify(error)
            if cause == BUSY and self._backend.now() < deadline:
                self._backend.sleep(delays.next())
                continue
            if recovered or result.progress < Progress.OPEN or not self._recover(cause, error):
                return result
            recovered = True

    def _call_disk(self, operation: Callable[[BufferStore, *Ts], T], *args: *Ts) -> CallResult[T]:
        """Make one call on the native thread and record its completed parts."""
        # While the store in memory is in use, the pending ids are not ids of the disk.
        pending = self._pending.snapshot(self.generation if self._memory is None else None)
        result: CallResult[T] = self._offload(
            self._disk.call, self._accounting.unrecorded_losses, pending.ids, operation, *args
        )
        self._account(result)
        if result.progress >= Progress.ACKED_ROWS_DELETED and self._memory is None:
            self._on_deleted(pending)
        return result

    def _offload(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        ok, value = self._backend.offload(function, *args)
        if not ok:
            raise value
        result: T = value
        return result

    def _account(self, result: CallResult[T]) -> None:
        if result.progress >= Progress.LOSSES_RECORDED:
            self._accounting.unrecorded_losses = {}
        if result.notice:
            self._warnings.warn_once("z4j: %s", result.notice)

    def _on_deleted(self, pending: PendingSnapshot) -> None:
        if pending.acks:
            self._vacuum.needed = True  # before ``remove``, so that ``is_idle`` stays false
            self._pending.remove(pending)
            self._accounting.acked_events += pending.events

    # -- recovery: each method returns whether to repeat the call

    def _recover(self, cause: str, error: LocalStorageError) -> bool:
        if cause == FULL:
            return self._recover_full(error)
        if cause == CORRUPT:
            return self._recover_corrupt(error)
        if cause == DELETED:
            return self._recover_deleted(error)
        return False

    def _recover_full(self, error: LocalStorageError) -> bool:
        ok, evicted = self._backend.offload(self._disk.free_space)
        if ok and not evicted:
            self._warnings.warn(
                "shrunk",
                "z4j: the disk is full: the buffer's file was shrunk, and no event was dropped (%s)"
                ". %s",
                error,
                _FREE_SPACE,
            )
        elif ok:
            self._warnings.warn(
                "full",
                "z4j: the disk is full: the %d oldest events in Z4J_HOME were dropped and count as "
                "lost (%s). %s",
                evicted,
                error,
                _FREE_SPACE,
            )
        return ok

    def _recover_corrupt(self, error: LocalStorageError) -> bool:
        self._accounting.record_later(self._offload(self._disk.quarantine))
        self.generation += 1
        self._warnings.warn(
            "corrupt",
            "z4j: the buffer is corrupt: its file was renamed and a new one created; "
            "its rows count as lost (%s)",
            error,
        )
        return True

    def _recover_deleted(self, error: LocalStorageError) -> bool:
        self.generation += 1
        result, left = self._offload(self._disk.replace_deleted, self._accounting.unrecorded_losses)
        self._account(result)
        if left:
            self._accounting.record_later({(DELETED, EVENT): left})
        self._warnings.warn(
            "deleted",
            "z4j: the buffer's file was deleted: a new one was created with %s of its rows (%s)",
            result.value or 0,
            error,
        )
        return result.error is None

    # -- without a disk

    def _switch_to_memory(self, error: Exception) -> MemoryStore:
        if not isinstance(error, LocalStorageError):
            raise error
        self.failures += 1
        memory = self._memory = self._new_memory()
        self.generation += 1
        ok, stats = self._backend.offload(self._disk.cached_stats)
        self._accounting.disk_failed(stats if ok else None)
        self._retry.on_failure(self._backend.now())
        self._warnings.warn(
            "memory",
            "z4j: the buffer is in memory only, because the disk failed: %s; its rows are lost if "
            "this process ends before the disk of Z4J_HOME works again%s",
            error,
            f". {_FREE_SPACE}" if classify(error) == FULL else "",
        )
        return memory

    def _return_to_disk(self, memory: MemoryStore) -> None:
        result = self._try_disk(None, store_worker.copy_rows, memory)
        now = self._backend.now()
        if result.error is None:
            self._memory = None
            self.generation += 1
            self._vacuum.needed = True
            self._accounting.disk_returned()
            self._retry.on_return(now)
            self._warnings.warn(
                "disk",
                "z4j: the buffer is on disk again; %d rows were moved from memory",
                result.value,
            )
        self._retry.schedule_next(now)


def _discard(store: Store, ids: Sequence[int], reason: str) -> int:
    return store.discard(ids, reason)


def _increment_attempts(store: Store, ids: Sequence[int]) -> None:
    store.increment_attempts(ids)


def _settle(store: Store, key: str, result: bytes, now: float, state: str) -> None:
    store.settle(key, result, now, state)


def _settle_and_queue(store: Store, key: str, result: bytes, now: float) -> None:
    store.settle_and_queue(key, result, now)


def _stats(store: Store) -> BufferStats:
    return store.stats()


class RateLimitedWarnings:
    """Limits the warnings about each subject to one every ``WARNING_INTERVAL`` seconds.

    Further warnings are logged at debug level.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._warned_at: dict[str, float] = {}

    def warn(self, subject: str, text: str, *args: object) -> None:
        """Log ``text`` as a warning, or at debug level if ``subject`` was logged recently."""
        now = self._backend.now()
        repeated = now - self._warned_at.get(subject, float("-inf")) < WARNING_INTERVAL
        if not repeated:
            self._warned_at[subject] = now
        logger.log(logging.DEBUG if repeated else logging.WARNING, text, *args)

    def warn_once(self, text: str, *args: object) -> None:
        """Log ``text`` as a warning once; ignore later calls with the same ``text``."""
        if text not in self._warned_at:
            self._warned_at[text] = float("inf")
            logger.warning(text, *args)
