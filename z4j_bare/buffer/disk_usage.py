"""The disk usage of a store: measuring and reducing it."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from z4j_bare.buffer import files
from z4j_bare.buffer.schema import PAGE, scalar
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from pathlib import Path

#: Maximum number of pages that one ``vacuum_step`` returns to the file system: 2 MiB.
VACUUM_STEP_PAGES = 512
#: Free pages that stay in the file, because the next burst of events uses them.
SPARE_PAGES = 64

#: Bytes of a row besides its payload: key, kind, header, index. Without them, an eviction of small
#: rows would remove far too many.
ROW_OVERHEAD = 64


class DiskUsage:
    """The size of one store: main file, write-ahead log and its index."""

    def __init__(self, connection: sqlite3.Connection, path: Path, max_bytes: int) -> None:
        self._connection = connection
        self._path = path
        self._files = files.store_files(path)
        self._max_bytes = max_bytes

    def live_bytes(self) -> int:
        """Return the bytes of the pages in use, including those of the current transaction."""
        return (scalar(self._connection, "PRAGMA page_count") - self._free_pages()) * PAGE

    def disk_bytes(self) -> int:
        """Return the size of all three files."""
        return sum(map(files.file_size, self._files))

    def check_capacity(self) -> None:
        """Raise ``LocalStorageError`` if the files are over their cap and cannot be reduced.

        The rows cannot be the reason, because their own cap is smaller. The reason is a log that
        cannot be truncated while another process reads it.
        """
        if self.shrink_if_over_cap() > self._max_bytes:
            raise LocalStorageError(
                f"the store {self._path} is larger than {self._max_bytes} bytes: another process "
                "reads it, so its log cannot be truncated; end that process"
            )

    def shrink_if_over_cap(self) -> int:
        """Reduce the files if they are over their cap; return their size in bytes."""
        if (size := self.disk_bytes()) <= self._max_bytes:
            return size
        self._vacuum_all()
        self._checkpoint()
        return self.disk_bytes()

    def reclaim_all(self) -> None:
        """Reduce the files as far as possible on a full disk, where each step may fail."""
        for step in (self._checkpoint, self._vacuum_all, self._checkpoint):
            try:
                step()
            except sqlite3.Error:
                pass

    def vacuum_step(self) -> bool:
        """Return up to ``VACUUM_STEP_PAGES`` pages to the file system.

        The last step truncates the log. Returns whether the work is complete.
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
        # The pragma frees one page per step and returns no row: ``execute`` would free one page.
        self._connection.executescript(f"PRAGMA incremental_vacuum({pages})")

    def _checkpoint(self) -> bool:
        """Move the log into the file and truncate it; ``False`` when a reader prevents that."""
        return scalar(self._connection, "PRAGMA wal_checkpoint(TRUNCATE)") == 0
