"""What goes into a store and what comes out of it; no I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EVENT = "event"
RESULT = "result"
PROJECTION = "projection"

#: Who leaves first when a cap is reached. A lost event is one line of history and a lost result one command
#: that looks timed out, but a hole in a sequenced schedule stream spoils the whole stream.
EVICTION_ORDER = (EVENT, RESULT, PROJECTION)
KINDS = frozenset(EVICTION_ORDER)

#: The reason under which the caps count what they evict.
CAPACITY = "capacity"
#: The reason under which rows of an unreadable file are counted.
CORRUPTION = "corrupt"
#: The reason under which rows that the brain cannot take are counted.
POISON = "poison"

STARTED = "started"
DONE = "done"
#: Started by another process, which will answer, or its heir.
IN_OTHER_PROCESS = "elsewhere"

#: Commands the ledger remembers; the brain redelivers for a minute, so this is 160 commands a second.
LEDGER_CAP = 10_000

Row = tuple[str, str, bytes]


class BufferEntry(NamedTuple):
    """One buffered row: ``id`` grows strictly, ``created_at`` is in seconds since the epoch.

    ``attempts`` counts the sessions that the brain ended over a frame while this row was on its way. The fields are the
    table's columns, so that an entry is what SQLite takes and gives.
    """

    id: int
    kind: str
    key: str
    payload: bytes
    created_at: float
    attempts: int


#: An entry's fields as functions, for ``map`` over whole batches, which takes a fraction of a loop's time.
KIND, PAYLOAD = (itemgetter(BufferEntry._fields.index(name)) for name in ("kind", "payload"))


@dataclass(frozen=True, slots=True)
class BufferStats:
    """One moment of a store.

    ``bytes`` is what the store occupies (files with WAL and SHM, or memory), ``payload_bytes`` what it
    carries, ``oldest_age`` seconds or ``None`` when it is empty. ``lost`` and ``lost_kinds`` are the same
    losses by reason and by kind; both are cumulative over the life of ``buffer_id``.
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


#: The figures of a store that has not been asked yet.
NO_STATS = BufferStats(0, 0, 0, None, {}, {}, 0, 0, "unopened", durable=False)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What is known of one command: ``state`` is ``started``, ``done`` or, of another process's, ``elsewhere``.

    ``result`` is the answer. Until the command is done, it is its testament: what to say if this process dies before
    that. It is empty when its bytes had to make room (a very old one).
    """

    key: str
    state: str
    result: bytes
    at: float


@dataclass(frozen=True, slots=True)
class StoreState:
    """What a store leaves besides its rows: losses by ``(reason, kind)``, and what is known of young commands."""

    losses: dict[tuple[str, str], int]
    ledger: tuple[LedgerEntry, ...] = ()

    def by(self, field: int) -> dict[str, int]:
        """Return the losses by reason (``field`` 0) or by kind (``field`` 1)."""
        return losses_by(self.losses, field)


def refuse_unknown_kinds(rows: Sequence[Row]) -> None:
    """Raise ``LocalStorageError`` for a kind outside the drop order: it could never be evicted."""
    unknown = {row[0] for row in rows} - KINDS
    if unknown:
        raise LocalStorageError(f"unknown kind of row: {', '.join(sorted(map(repr, unknown)))}")


def ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Compress ids into inclusive ``(first, last)`` ranges: acks come in runs, a run is one statement."""
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
    entries: Iterable[BufferEntry], limit: int, max_bytes: int, *, alone: bool = True
) -> list[BufferEntry]:
    """Return the first ``entries``: at most ``limit``, of ``max_bytes`` together, or one, if it may be ``alone``."""
    found: list[BufferEntry] = []
    for entry in entries:
        max_bytes -= len(entry.payload)
        if len(found) >= limit or (max_bytes < 0 and (found or not alone)):
            break
        found.append(entry)
    return found


def batch_timestamp(entry: BufferEntry) -> float | None:
    """Return when an event came, if it is like all others that came then, so that they may be stored together."""
    return (
        entry.created_at if entry.kind == EVENT and not entry.key and not entry.attempts else None
    )


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates: a foreign task id may hold some, and SQLite takes none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def losses_by(counts: dict[tuple[str, str], int], field: int) -> dict[str, int]:
    """Sum ``(reason, kind)`` counters by reason (``field`` 0) or by kind (``field`` 1)."""
    sums: dict[str, int] = {}
    for pair, count in counts.items():
        sums[pair[field]] = sums.get(pair[field], 0) + count
    return sums


def added(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """Return the sums of two sets of counters."""
    return {key: first.get(key, 0) + second.get(key, 0) for key in {**first, **second}}


def both(disk: BufferStats, memory: BufferStats) -> BufferStats:
    """Return the figures while memory stands in for the disk: the rows down there are still ours."""
    return replace(
        memory,
        rows=disk.rows + memory.rows,
        bytes=disk.bytes + memory.bytes,
        payload_bytes=disk.payload_bytes + memory.payload_bytes,
        oldest_age=memory.oldest_age if disk.oldest_age is None else disk.oldest_age,
        lost=added(disk.lost, memory.lost),
        lost_kinds=added(disk.lost_kinds, memory.lost_kinds),
        produced=disk.produced + memory.produced,
        confirmed=disk.confirmed + memory.confirmed,
        buffer_id=memory.buffer_id if disk.buffer_id == NO_STATS.buffer_id else disk.buffer_id,
    )
