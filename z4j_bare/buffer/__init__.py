"""The durable queue between event capture and sending, and the ledger of commands.

``manager``, ``maintenance``, ``adopt_loop`` and ``memory`` run on the hub. The other modules run on
the native thread. Code on the native thread never logs, sleeps, switches greenlets or takes a lock
of ``threading``, and raises only ``LocalStorageError``. Only one call to a store may run at a time.

The equation ``produced == confirmed + rows + sum(lost.values())`` holds after every call. After
``SIGKILL`` the equation holds for the committed transactions. After a power failure the file is
intact (WAL with ``synchronous=NORMAL``), but the last commits may be missing.
"""

from __future__ import annotations

from z4j_bare.buffer.files import new_store_path
from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.buffer.rows import EVENT, PROJECTION, RESULT, BufferEntry, BufferStats, LedgerEntry
from z4j_bare.buffer.store import BufferStore

__all__ = [
    "EVENT",
    "PROJECTION",
    "RESULT",
    "BufferEntry",
    "BufferStats",
    "BufferStore",
    "LedgerEntry",
    "MemoryStore",
    "new_store_path",
]
