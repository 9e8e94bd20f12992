"""Room on disk: how much a store takes, and how it gives some back."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from z4j_bare.buffer import files as paths
from z4j_bare.buffer.schema import PAGE, scalar
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from pathlib import Path

#: Pages ``vacuum_step`` gives back per call: 2 MiB.
VACUUM_STEP_PAGES = 512
#: Free pages that are not worth a rewrite: the next burst takes them.
SPARE_PAGES = 64

#: What a row takes besides its payload: key, kind, header, index. Without it, freeing room by rows of few
#: bytes would free far too many.
ROW_OVERHEAD = 64


class DiskUsage:
    """The bytes of one store: main file, write-ahead log and its index."""

    def __init__(self, connection: sqlite3.Connection, path: Path, max_bytes: int) -> None:
        self._connection = connection
        self._path = path
        self._files = paths.store_files(path)
        self._max_bytes = max_bytes

    def live_bytes(self) -> int:
        """Return the bytes of the pages in use, those written by the current transaction included."""
        return (scalar(self._connection, "PRAGMA page_count") - self._free_pages()) * PAGE

    def disk_bytes(self) -> int:
        """Return the size of all three files."""
        return sum(map(paths.file_size, self._files))

    def check_capacity(self) -> None:
        """Raise ``LocalStorageError`` if the files are over their cap and cannot be shortened.

        Rows are not the reason, they have a smaller cap of their own: a log that somebody reads is.
        """
        if self.shrink_if_over_cap() > self._max_bytes:
            raise LocalStorageError(
                f"the store {self._path} takes more than {self._max_bytes} bytes: another process reads it "
                "and keeps its log from being shortened"
            )

    def shrink_if_over_cap(self) -> int:
        """Bring the files back under their cap if they are over it; return their size."""
        if (occupied := self.disk_bytes()) <= self._max_bytes:
            return occupied
        self._vacuum_all()
        self._checkpoint()
        return self.disk_bytes()

    def reclaim_all(self) -> None:
        """Give back whatever can be given on a full disk, where any step may fail."""
        for step in (self._checkpoint, self._vacuum_all, self._checkpoint):
            try:
                step()
            except sqlite3.Error:
                pass

    def vacuum_step(self) -> bool:
        """Give at most ``VACUUM_STEP_PAGES`` pages back, at the end cut the log; return whether nothing is left."""
        excess = self._free_pages() - SPARE_PAGES
        if excess > 0:
            self._vacuum(min(excess, VACUUM_STEP_PAGES))
        if excess > VACUUM_STEP_PAGES:
            return False
        return paths.file_size(self._files[1]) == 0 or self._checkpoint()

    def _free_pages(self) -> int:
        return scalar(self._connection, "PRAGMA freelist_count")

    def _vacuum_all(self) -> None:
        self._vacuum(self._free_pages())

    def _vacuum(self, pages: int) -> None:
        # One page per step, and no row yielded: ``execute`` stops after one, ``executescript`` goes on.
        self._connection.executescript(f"PRAGMA incremental_vacuum({pages})")

    def _checkpoint(self) -> bool:
        """Move the log into the file and cut it to nothing; ``False`` when a foreign reader is in the way."""
        return scalar(self._connection, "PRAGMA wal_checkpoint(TRUNCATE)") == 0
