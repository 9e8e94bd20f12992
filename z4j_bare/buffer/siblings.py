"""What other processes' stores know of a command: the brain may deliver it to any session of an agent."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from z4j_bare.buffer import files as paths
from z4j_bare.buffer.rows import DONE, IN_OTHER_PROCESS, LedgerEntry
from z4j_bare.buffer.schema import read_only
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    import os
    from pathlib import Path


def find_in_other_stores(
    buffer_path: str | os.PathLike[str], own: Path, key: str
) -> LedgerEntry | None:
    """Return what is known of command ``key`` beside our ``own`` store, in those of the living and of the dead.

    One that is not done is ``elsewhere``: its process answers, or whoever adopts its store. For ``offload``; never raises.
    """
    found = None
    try:
        for place in paths.candidate_directories(buffer_path):
            for path in paths.list_stores(place):
                entry = _ask(path, key) if path != own else None
                if entry is not None and entry.state == DONE:
                    return entry
                found = found or entry
    except (OSError, LocalStorageError):  # then we know what we know
        pass
    return found and LedgerEntry(key, IN_OTHER_PROCESS, b"", found.at)


def _ask(path: Path, key: str) -> LedgerEntry | None:
    try:
        with read_only(path) as connection:
            row = connection.execute(
                "SELECT key, state, result, at FROM ledger WHERE key = ?", (key,)
            ).fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else LedgerEntry(*row)
