"""The newest rows of a store, kept at hand: what was written a moment ago is sent without being read back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

from z4j_bare.buffer.rows import EVENT, IDENTITY, KIND, PAYLOAD, BufferEntry

#: Rows, and bytes of their payloads, that are kept in memory. The in-flight window takes 1,000; a backlog comes from disk.
ROWS = 2_000
BYTES = 1024 * 1024

#: Rows of a kind: how many, and the bytes of their payloads.
Weight = tuple[str, int, int]


class Tail:
    """A copy of the rows from some id on. It follows the store's transactions, after each has been committed.

    :param start: the id that the next row will get.
    """

    def __init__(self, start: int) -> None:
        self.restart(start)

    def add(self, entries: Sequence[BufferEntry]) -> None:
        """Take rows that have been written, in the order of their ids."""
        if not entries:
            return
        self._entries.update(zip(map(IDENTITY, entries), entries, strict=True))
        self._bytes += sum(map(len, map(PAYLOAD, entries)))
        self._end = entries[-1].id + 1
        while len(self._entries) > ROWS or self._bytes > BYTES:
            first = next(iter(self._entries))
            self._bytes -= len(self._entries.pop(first).payload)
            self._reach = first + 1

    def after(self, after: int, limit: int, max_bytes: int) -> list[BufferEntry] | None:
        """Return the oldest events with ``id > after`` as ``IStore.drain`` does, or ``None`` if they go further back."""
        if after + 1 < self._reach:
            return None
        found: list[BufferEntry] = []
        for identity in range(max(after + 1, next(iter(self._entries), self._end)), self._end):
            entry = self._entries.get(identity)
            if entry is None or entry.kind != EVENT:
                continue
            max_bytes -= len(entry.payload)
            if len(found) >= limit or (max_bytes < 0 and found):
                break
            found.append(entry)
        return found

    def weigh(self, ids: Iterable[int]) -> list[Weight] | None:
        """Return what these rows weigh, by kind; ``None`` if one of them is not here."""
        try:
            entries = [self._entries[identity] for identity in ids]
        except KeyError:
            return None
        return [_weight(kind, entries) for kind in set(map(KIND, entries))]

    def forget(self, ids: Iterable[int]) -> None:
        """Drop rows that have been deleted."""
        here = [entry for entry in map(self._entries.pop, ids, repeat(None)) if entry is not None]
        self._bytes -= sum(map(len, map(PAYLOAD, here)))

    def restart(self, start: int) -> None:
        """Forget everything: rows before ``start`` have changed."""
        self._entries: dict[int, BufferEntry] = {}
        self._bytes = 0
        #: Every row of the store from this id on is here.
        self._reach = start
        self._end = start


def _weight(kind: str, entries: Sequence[BufferEntry]) -> Weight:
    lengths = [len(entry.payload) for entry in entries if entry.kind == kind]
    return kind, len(lengths), sum(lengths)
