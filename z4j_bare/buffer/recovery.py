"""The rows of dead processes: found, claimed and moved, in steps small enough for ``offload``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from z4j_bare.buffer import files as paths
from z4j_bare.buffer.errors import CORRUPT, cause_of, translated
from z4j_bare.buffer.lock import OwnerLock
from z4j_bare.buffer.rows import CORRUPTION, DROP_ORDER, EVENT, STARTED, StoreState
from z4j_bare.buffer.schema import counted
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
ENOUGH_ROWS = 1_000

MOVED = "moved"
WAIT = "wait"
DONE = "done"


def orphans(buffer_path: str | os.PathLike[str], skip: Container[Path]) -> list[Path]:
    """Return the files that may be a dead process's: who owns one, its lock tells. Longest untouched first."""
    return [
        path
        for place in paths.places(buffer_path)
        for path in paths.stores_in(place)
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
        self._enough_rows = min(ENOUGH_ROWS, max_rows // 4)
        self._enough_bytes = max_bytes // 4
        self._pending: list[int] = []
        self._legacy: StoreState | None = None
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
            if cause_of(error) != CORRUPT:
                raise
            self.corrupt, self._legacy = str(error), _set_aside(path)

    def left(self) -> int:
        """Return the number of rows still here."""
        return 0 if self._store is None else self._store.size()

    def step(self, heir: BufferStore) -> str:
        """Move some rows; ``moved``, ``wait`` (the heir has enough to do), or ``done``: the file is gone.

        Raises ``LocalStorageError`` for either store, and may be called again: nothing is moved twice by one heir.
        """
        if self._store is None:
            heir.import_state(self._legacy or StoreState({}))
            return DONE
        if self._pending:
            self._store.confirm(self._pending)
            self._pending = []
        if self._legacy is None:
            # First of all: the brain may deliver a command of the dead one again as soon as we are connected.
            export_state = self._store.export_state()
            heir.import_state(StoreState({}, export_state.ledger))
            self._read_testaments(heir, export_state)
            self._legacy = export_state
        if heir.size() >= self._enough_rows or heir.byte_size() >= self._enough_bytes:
            return WAIT
        rows = self._store.drain(0, STEP_ROWS, min(STEP_BYTES, self._enough_bytes), DROP_ORDER)
        heir.import_rows(rows)
        self.moved += len(rows)
        self._pending = [row.id for row in rows]
        self._store.confirm(self._pending)
        self._pending = []
        if self._store.size():
            return MOVED
        heir.import_state(StoreState(self._legacy.losses))
        self._store.close(bequeathed=True)
        return DONE

    @staticmethod
    def _read_testaments(heir: BufferStore, export_state: StoreState) -> None:
        """Answer the commands that died with their process: nobody knows how far they came, and none must run again."""
        for entry in export_state.ledger:
            known = heir.claim(entry.key, entry.at)
            if known is not None and known.state == STARTED and entry.result:
                heir.answer(entry.key, entry.result, entry.at)

    def condemn(self, heir: BufferStore) -> bool:
        """Set a file aside that has turned out corrupt, and count its rows as lost; ``False``: nothing is wrong with it."""
        if self._store is None or self._store.sound():
            return False
        left = self._store.written_off()
        left.losses[CORRUPTION, EVENT] -= len(self._pending)  # the heir has those
        heir.import_state(left)
        self._store.set_aside()
        return True

    def close(self) -> None:
        """Let it go; with rows left in it, it is an orphan again."""
        if self._store is not None:
            self._store.close()


def _set_aside(path: Path) -> StoreState:
    """Rename a file that cannot be read, while nobody else can claim it; return what its counters still say was lost."""
    lock = OwnerLock(paths.lock_of(path))
    try:
        losses = counted(path)
        with translated(path, "set aside"):
            paths.set_aside(path, time.time())
        return StoreState(losses)
    finally:
        lock.release(delete=not path.exists())
