"""Moves the rows of dead processes in short steps on the native thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from z4j_bare.buffer import files
from z4j_bare.buffer.accounting import Counts
from z4j_bare.buffer.errors import CORRUPT, classify, translate_errors
from z4j_bare.buffer.files import OwnerLock
from z4j_bare.buffer.rows import CORRUPTION, EVENT, EVICTION_ORDER, STARTED, StoreState
from z4j_bare.buffer.schema import read_losses
from z4j_bare.buffer.store import BufferStore
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    import os
    from collections.abc import Container
    from pathlib import Path

#: Maximum number of rows per step.
#: A step of 500 rows takes 10 ms on the native thread and fills one frame.
STEP_ROWS = 500
#: Maximum payload bytes per step.
STEP_BYTES = 1024 * 1024

#: Number of rows in the target store at which a step moves no more rows.
#: The value equals the in-flight window, so that the sender always finds rows to send.
TARGET_BACKLOG = 1_000

#: Outcomes of a step.
MOVED = "moved"
WAIT = "wait"
DONE = "done"


def orphans(buffer_path: str | os.PathLike[str], skip: Container[Path]) -> list[Path]:
    """Return the stores that may belong to dead processes, least recently modified first.

    An owner may still be alive. The constructor of :class:`Orphan` checks this.
    """
    return [
        path
        for directory in files.candidate_directories(buffer_path)
        for path in files.list_stores(directory)
        if path not in skip
    ]


class Orphan:
    """The store of a dead process.

    The constructor claims the store, and renames an unreadable store. The constructor raises
    ``LocalStorageError`` if the owner is alive (cause ``busy``), if the store belongs to another
    deployment, or if the file has unsafe permissions.

    A step appends rows to the target before it deletes them from the orphan. If this process dies
    between the append and the deletion, the rows are sent twice. The brain recognises a repeated
    event by its id and time.
    """

    def __init__(self, path: Path, deployment: str, *, max_rows: int, max_bytes: int) -> None:
        self.path = path
        #: Number of rows moved so far.
        self.moved = 0
        #: Why the store was quarantined; empty for a readable store.
        self.quarantine_reason = ""
        self._target_rows = min(TARGET_BACKLOG, max_rows // 4)
        self._target_bytes = max_bytes // 4
        #: Ids of rows that were copied to the target, but not deleted from the orphan.
        self._pending: list[int] = []
        self._state: StoreState | None = None
        self._store: BufferStore | None = None
        try:
            self._store = BufferStore(
                path,
                deployment=deployment,
                max_rows=max_rows,
                max_bytes=max_bytes,
                busy_timeout=0.1,
                create=False,
            )
        except LocalStorageError as error:
            if classify(error) != CORRUPT:
                raise
            self.quarantine_reason, self._state = str(error), _quarantine(path)

    def rows_left(self) -> int:
        """Return the number of rows that were not moved yet."""
        return 0 if self._store is None else self._store.size()

    def step(self, target: BufferStore) -> str:
        """Move some rows to ``target``.

        Returns ``moved``, ``wait`` (the target is too full), or ``done`` (no rows are left). Raises
        ``LocalStorageError``. A repeated call after an error moves no row twice.
        """
        if self._store is None:
            target.import_state(self._state or StoreState({}))
            return DONE
        if self._pending:
            self._store.confirm(self._pending)
            self._pending = []
        if self._state is None:
            # The ledger is imported first, because the brain may redeliver a command of the dead
            # process at any time.
            state = self._store.export_state()
            target.import_state(StoreState({}, state.ledger))
            self._answer_interrupted_commands(target, state)
            self._state = state
        if target.size() >= self._target_rows or target.byte_size() >= self._target_bytes:
            return WAIT
        rows = self._store.drain(0, STEP_ROWS, min(STEP_BYTES, self._target_bytes), EVICTION_ORDER)
        target.import_rows(rows)
        self.moved += len(rows)
        self._pending = [row.id for row in rows]
        self._store.confirm(self._pending)
        self._pending = []
        if self._store.size():
            return MOVED
        target.import_state(StoreState(self._state.losses))
        self._store.close(ledger_transferred=True)
        return DONE

    @staticmethod
    def _answer_interrupted_commands(target: BufferStore, state: StoreState) -> None:
        """Queue the provisional results of the commands that ran when the process died.

        The outcome of these commands is unknown, and they must not run again.
        """
        for entry in state.ledger:
            known = target.claim(entry.key, entry.at)
            if known is not None and known.state == STARTED and entry.result:
                target.settle_and_queue(entry.key, entry.result, entry.at)

    def quarantine_if_corrupt(self, target: BufferStore) -> bool:
        """Quarantine a corrupt file and count its rows as lost; return whether it was corrupt."""
        if self._store is None or self._store.integrity_ok():
            return False
        counts = Counts(lost=self._store.state_if_abandoned().losses)
        counts.record_loss(CORRUPTION, EVENT, -len(self._pending))  # these rows are in the target
        target.import_state(StoreState(counts.lost))
        self._store.quarantine()
        return True

    def close(self) -> None:
        """Release the store. Any process can claim the store again if rows are left."""
        if self._store is not None:
            self._store.close()


def _quarantine(path: Path) -> StoreState:
    """Lock and rename an unreadable file; return its losses."""
    lock = OwnerLock(files.lock_path(path))
    try:
        losses = read_losses(path)
        with translate_errors(path, "quarantine"):
            files.quarantine(path, time.time())
        return StoreState(losses)
    finally:
        lock.release(delete=not path.exists())
