"""The durable queue between capture and the wire: rows, caps, loss counters, command ledger.

The manager and the adopt loop run on the hub. All other modules run on the native thread: they
never log, sleep, switch greenlets or take a lock of ``threading``, and raise only
``LocalStorageError``. A store takes one call at a time, from any native thread.

``produced == confirmed + rows + sum(lost.values())`` holds after every call, and after ``SIGKILL``
for all committed transactions. After a power failure, WAL with ``synchronous=NORMAL`` guarantees an
intact file, but the last commits may be missing.
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
