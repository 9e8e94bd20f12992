"""The durable queue between capture and the wire: SQLite, caps, loss counters, the ledger of commands.

Everything here is plain synchronous code for ``offload``: it never logs, sleeps, switches greenlets or takes
a lock of ``threading``, and its only error is ``LocalStorageError``. One call at a time per store, from any
native thread.

The promise: ``produced == confirmed + rows + sum(lost.values())`` after every call, and after ``SIGKILL`` for
whatever was committed. Against power failure WAL with ``synchronous=NORMAL`` promises only an intact file
(the last commits may be missing).
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
