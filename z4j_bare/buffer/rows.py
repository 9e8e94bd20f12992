"""Data types of the buffer: rows, stats and ledger entries."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EVENT = "event"
RESULT = "result"
PROJECTION = "projection"

#: Kinds in the order of eviction: the kind whose loss has the smallest effect comes first.
#: A lost event is missing from a task's history. A lost result makes a command time out.
#: A lost frame of a schedule projection invalidates the whole projection, because the frames are
#: numbered.
EVICTION_ORDER = (EVENT, RESULT, PROJECTION)
KINDS = frozenset(EVICTION_ORDER)

#: Loss reason of rows that a cap evicted.
CAPACITY = "capacity"
#: Loss reason of rows in an unreadable file.
CORRUPTION = "corrupt"
#: Loss reason of rows that the brain cannot process.
POISON = "poison"

#: States of a command in the ledger.
STARTED = "started"
DONE = "done"
#: The effect of the command failed. A later claim may start the command again.
FAILED = "failed"
#: Another process started the command.
#: That process, or the process that adopts its store, sends the result.
IN_OTHER_PROCESS = "elsewhere"

#: Maximum number of commands in the ledger. The brain redelivers a command for one minute.
#: At 160 commands a second, the ledger holds the commands of that minute.
LEDGER_CAP = 10_000

#: A row to append: ``(kind, key, payload)``.
Row = tuple[str, str, bytes]

#: Number of lost rows by ``(reason, kind)``.
Losses = dict[tuple[str, str], int]


class BufferEntry(NamedTuple):
    """One buffered row.

    Ids strictly increase within a store. ``created_at`` is in seconds since the epoch. ``attempts``
    counts how often the brain ended a session because of a frame while this row was in flight. The
    fields match the table's columns, so that entries need no conversion.
    """

    id: int
    kind: str
    key: str
    payload: bytes
    created_at: float
    attempts: int


#: Getters of an entry's fields, for use with ``map``, which takes a fraction of a loop's time.
KIND, PAYLOAD = (itemgetter(BufferEntry._fields.index(name)) for name in ("kind", "payload"))


@dataclass(frozen=True, slots=True)
class BufferStats:
    """The counters of a store at one moment.

    ``bytes`` is the size of the store: its files with WAL and SHM, or its memory. ``oldest_age`` is
    in seconds, ``None`` for an empty store. ``lost`` counts the lost rows by reason, and
    ``lost_kinds`` by kind. ``lost``, ``lost_kinds``, ``produced`` and ``confirmed`` count from the
    creation of the store.
    """

    rows: int
    bytes: int
    payload_bytes: int
    oldest_age: float | None
    lost: dict[str, int]
    lost_kinds: dict[str, int]
    produced: int
    confirmed: int
    buffer_id: str
    durable: bool


#: The stats before the first store is opened.
NO_STATS = BufferStats(0, 0, 0, None, {}, {}, 0, 0, "unopened", durable=False)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """The ledger's entry of one command.

    ``state`` is ``started``, ``done``, ``failed`` for a command that may run again, or
    ``elsewhere`` for a command of another process. ``result`` is the payload of the result, or of
    the provisional result while the command runs. ``result`` is empty if the result was dropped to
    free space. ``at`` is the time of the last change in seconds since the epoch.
    """

    key: str
    state: str
    result: bytes
    at: float

    def supersedes(self, earlier: LedgerEntry | None) -> bool:
        """Return whether this entry of another store replaces the ``earlier`` entry."""
        if earlier is None or self.state == earlier.state:
            return earlier is None
        return earlier.state == FAILED or (earlier.state == STARTED and self.state == DONE)


@dataclass(frozen=True, slots=True)
class StoreState:
    """The data other than rows that one store imports from another store."""

    losses: Losses
    ledger: tuple[LedgerEntry, ...] = ()


def reject_unknown_kinds(rows: Sequence[Row]) -> None:
    """Raise ``LocalStorageError`` if a row is of an unknown kind."""
    unknown = {row[0] for row in rows} - KINDS
    if unknown:
        raise LocalStorageError(f"unknown kind of row: {', '.join(sorted(map(repr, unknown)))}")


def ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Compress ids into inclusive ``(first, last)`` ranges, each for one SQL statement."""
    ordered = sorted(set(ids))
    if not ordered:
        return []
    if ordered[-1] - ordered[0] == len(ordered) - 1:  # the usual case
        return [(ordered[0], ordered[-1])]
    breaks = [index for index in range(1, len(ordered)) if ordered[index] != ordered[index - 1] + 1]
    return [
        (ordered[first], ordered[last - 1])
        for first, last in zip([0, *breaks], [*breaks, len(ordered)], strict=True)
    ]


def take_fitting(
    entries: Iterable[BufferEntry], limit: int, max_bytes: int, *, allow_oversized: bool = True
) -> list[BufferEntry]:
    """Return the first entries: at most ``limit``, with at most ``max_bytes`` of payloads.

    With ``allow_oversized``, a first entry that is larger than ``max_bytes`` is returned alone.
    """
    taken: list[BufferEntry] = []
    for entry in entries:
        max_bytes -= len(entry.payload)
        if len(taken) >= limit or (max_bytes < 0 and (taken or not allow_oversized)):
            break
        taken.append(entry)
    return taken


def batch_timestamp(entry: BufferEntry) -> float | None:
    """Return ``created_at`` of an event that can be in a batch, ``None`` for any other entry."""
    return (
        entry.created_at if entry.kind == EVENT and not entry.key and not entry.attempts else None
    )


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, because a task id may contain them and SQLite rejects them."""
    return text.encode("utf-8", "replace").decode("utf-8")
