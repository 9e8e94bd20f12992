"""The rows of dead processes: found, claimed and moved, in steps small enough for ``offload``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from z4j_bare.buffer import files as paths
from z4j_bare.buffer.errors import CORRUPT, classify, translate_errors
from z4j_bare.buffer.lock import OwnerLock
from z4j_bare.buffer.rows import CORRUPTION, EVENT, EVICTION_ORDER, STARTED, StoreState
from z4j_bare.buffer.schema import read_losses
from z4j_bare.buffer.store import BufferStore
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    import os
    from collections.abc import Container
    from pathlib import Path

#: What one step moves at most: 500 rows are 10 ms off the hub, and one frame.
STEP_ROWS = 500
STEP_BYTES = 1024 * 1024

#: Rows of the heir above which nothing moves. It is the longest window in flight, so that the brain never waits for a
#: step, and a fresh event waits behind few adopted ones.
TARGET_BACKLOG = 1_000

MOVED = "moved"
WAIT = "wait"
DONE = "done"


def orphans(buffer_path: str | os.PathLike[str], skip: Container[Path]) -> list[Path]:
    """Return the files that may be a dead process's: who owns one, its lock tells. Longest untouched first."""
    return [
        path
        for place in paths.candidate_directories(buffer_path)
        for path in paths.list_stores(place)
        if path not in skip
    ]


class Orphan:
    """A dead process's store, claimed by the constructor: ``LocalStorageError`` when its owner lives (``busy``), when it is
    of another deployment, or not safe to open. One that cannot be read is set aside, and ``corrupt`` says why.

    Rows are appended to the heir before they leave here: whoever dies in between leaves them twice, and the brain knows an
    event again by its id and time.
    """  # noqa: D205

    def __init__(self, path: Path, deployment: str, *, max_rows: int, max_bytes: int) -> None:
        self.path = path
        self.moved = 0
        self.corrupt = ""
        self._enough_rows = min(TARGET_BACKLOG, max_rows // 4)
        self._enough_bytes = max_bytes // 4
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
            self.corrupt, self._state = str(error), _set_aside(path)

    def left(self) -> int:
        """Return the number of rows still here."""
        return 0 if self._store is None else self._store.size()

    def step(self, target: BufferStore) -> str:
        """Move some rows; ``moved``, ``wait`` (the target has enough to do), or ``done``: the file is gone.

        Raises ``LocalStorageError`` for either store, and may be called again: nothing is moved twice by one heir.
        """
        if self._store is None:
            target.import_state(self._state or StoreState({}))
            return DONE
        if self._pending:
            self._store.confirm(self._pending)
            self._pending = []
        if self._state is None:
            # First of all: the brain may deliver a command of the dead one again as soon as we are connected.
            export_state = self._store.export_state()
            target.import_state(StoreState({}, export_state.ledger))
            self._answer_interrupted_commands(target, export_state)
            self._state = export_state
        if target.size() >= self._enough_rows or target.byte_size() >= self._enough_bytes:
            return WAIT
        rows = self._store.drain(0, STEP_ROWS, min(STEP_BYTES, self._enough_bytes), EVICTION_ORDER)
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
    def _answer_interrupted_commands(target: BufferStore, export_state: StoreState) -> None:
        """Answer the commands that died with their process: nobody knows how far they came, and none must run again."""
        for entry in export_state.ledger:
            known = target.claim(entry.key, entry.at)
            if known is not None and known.state == STARTED and entry.result:
                target.answer(entry.key, entry.result, entry.at)

    def quarantine_if_corrupt(self, target: BufferStore) -> bool:
        """Set a file aside that has turned out corrupt, and count its rows as lost; ``False``: nothing is wrong with it."""
        if self._store is None or self._store.integrity_ok():
            return False
        left = self._store.state_if_abandoned()
        left.losses[CORRUPTION, EVENT] -= len(self._pending)  # the heir has those
        target.import_state(left)
        self._store.quarantine()
        return True

    def close(self) -> None:
        """Let it go; with rows left in it, it is an orphan again."""
        if self._store is not None:
            self._store.close()


def _set_aside(path: Path) -> StoreState:
    """Rename a file that cannot be read, while nobody else can claim it; return what its counters still say was lost."""
    lock = OwnerLock(paths.lock_path(path))
    try:
        losses = read_losses(path)
        with translate_errors(path, "set aside"):
            paths.quarantine(path, time.time())
        return StoreState(losses)
    finally:
        lock.release(delete=not path.exists())
