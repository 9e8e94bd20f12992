"""Measures and reduces the disk usage of a store."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from z4j_bare.buffer import files
from z4j_bare.buffer.schema import PAGE, scalar
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from pathlib import Path

#: Maximum number of pages that one ``vacuum_step`` releases to the file system (2 MiB).
VACUUM_STEP_PAGES = 512
#: Number of free pages that remain in the file for the next events.
SPARE_PAGES = 64

#: Estimated bytes of a row without its payload: key, kind, header and index entry.
#: Without this estimate, an eviction would remove far more small rows than necessary.
ROW_OVERHEAD = 64


class DiskUsage:
    """The disk usage of one store: main file, write-ahead log (WAL) and index of the WAL."""

    def __init__(self, connection: sqlite3.Connection, path: Path, max_bytes: int) -> None:
        self._connection = connection
        self._path = path
        self._files = files.store_files(path)
        self._max_bytes = max_bytes

    def live_bytes(self) -> int:
        """Return the bytes of all used pages, including pages of the current transaction."""
        return (scalar(self._connection, "PRAGMA page_count") - self._free_pages()) * PAGE

    def disk_bytes(self) -> int:
        """Return the total size of the three files in bytes."""
        return sum(map(files.file_size, self._files))

    def check_capacity(self) -> None:
        """Reduce the files; raise ``LocalStorageError`` if they still exceed the cap.

        The rows have a smaller cap of their own. Therefore the files exceed their cap only if the
        WAL is too long. The WAL cannot be truncated while another process reads it.
        """
        if self.shrink_if_over_cap() > self._max_bytes:
            raise LocalStorageError(
                f"the store {self._path} is larger than {self._max_bytes} bytes: another process "
                "reads it, so its log cannot be truncated; end that process"
            )

    def shrink_if_over_cap(self) -> int:
        """Reduce the files if they exceed the cap. Return their size in bytes."""
        if (size := self.disk_bytes()) <= self._max_bytes:
            return size
        self._vacuum_all()
        self._checkpoint()
        return self.disk_bytes()

    def reclaim_all(self) -> None:
        """Reduce the files as far as possible. Skip a failed step, for example on a full disk."""
        for step in (self._checkpoint, self._vacuum_all, self._checkpoint):
            try:
                step()
            except sqlite3.Error:
                pass

    def vacuum_step(self) -> bool:
        """Release up to ``VACUUM_STEP_PAGES`` free pages to the file system.

        The last step truncates the WAL. Returns whether the vacuum is complete.
        """
        excess = self._free_pages() - SPARE_PAGES
        if excess > 0:
            self._vacuum(min(excess, VACUUM_STEP_PAGES))
        if excess > VACUUM_STEP_PAGES:
            return False
        return files.file_size(self._files[1]) == 0 or self._checkpoint()

    def _free_pages(self) -> int:
        return scalar(self._connection, "PRAGMA freelist_count")

    def _vacuum_all(self) -> None:
        self._vacuum(self._free_pages())

    def _vacuum(self, pages: int) -> None:
        # ``execute`` runs only one step of a statement that returns no rows, so it would free only
        # one page. ``executescript`` runs all steps.
        self._connection.executescript(f"PRAGMA incremental_vacuum({pages})")

    def _checkpoint(self) -> bool:
        """Copy the WAL into the main file and truncate the WAL.

        Returns ``False`` if another process reads the WAL, so that it cannot be truncated.
        """
        return scalar(self._connection, "PRAGMA wal_checkpoint(TRUNCATE)") == 0
