"""Holds: periods in which code held the hub without yielding, and the code that did so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from z4j_bare.concurrency.base import current_frames
from z4j_bare.concurrency.stacks import Position, innermost_user_code, read_stack, text_of

#: The place of a hold in which no sample was taken.
UNSAMPLED = "(not sampled: a C function kept the interpreter lock, or the process had no processor)"

#: Modules of the innermost frame of a hub's thread while the hub waits for events.
_IDLE_MODULES = frozenset(
    ("gevent.hub", "eventlet.hubs.hub", "eventlet.hubs.poll", "eventlet.hubs.epolls")
)

#: Maximum number of rows of a table. Further places are counted in the row :data:`OTHER`.
MAX_ROWS = 500
OTHER = "(other places)"


class Sample(NamedTuple):
    """The stack of the hub's thread at one moment, and ``name[id]`` of the running task."""

    at: float
    stack: tuple[Position, ...]
    task: str

    @property
    def holder(self) -> tuple[object, ...]:
        """Identifies the greenlet: its task, or the code in which it started.

        The frame objects do not identify the greenlet, because CPython creates new ones at each
        read.
        """
        return (self.task, *self.stack[-1:])


class Hold(NamedTuple):
    """A period in which the hub could not run its timers, with the samples taken in it."""

    start: float
    end: float
    samples: list[Sample]


class Weighted(NamedTuple):
    """A sample, and the seconds of the hold that are attributed to it."""

    seconds: float
    sample: Sample | None


class HoldTable:
    """Total times by function and task, each with the first line that was sampled."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, hold: Hold) -> None:
        """Add a hold to the rows of the places that its samples contain."""
        weighted = list(weigh(hold))
        single = len({each.sample.holder for each in weighted if each.sample}) <= 1
        seen: dict[tuple[str, str], dict[tuple[object, ...], float]] = {}
        for seconds, sample in weighted:
            key, place = (UNSAMPLED, ""), UNSAMPLED
            holder = () if sample is None else sample.holder
            if sample is not None:
                place = place_of(sample.stack)
                # One row per function: a loop is sampled at several of its lines.
                key = (_without_line(place), sample.task.partition("[")[0])
            self._row(key, place)
            holders = seen.setdefault(key, {})
            holders[holder] = holders.get(holder, 0.0) + seconds
        for key, holders in seen.items():
            row = self._row(key, key[0])
            row["holds"] += 1
            row["single_holds"] += single
            row["total_seconds"] += sum(holders.values())
            row["longest_seconds"] = max(row["longest_seconds"], *holders.values())

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows as plain JSON types, the most expensive first.

        ``longest_seconds`` is the longest time that one greenlet held the hub at this place.
        ``single_holds`` counts the holds whose samples show only one greenlet.
        In other holds, several greenlets ran one after another before the hub could run its timers.
        """
        return sorted(self._rows.values(), key=lambda row: -float(row["total_seconds"]))

    def _row(self, key: tuple[str, str], place: str) -> dict[str, Any]:
        if key not in self._rows and len(self._rows) >= MAX_ROWS:
            key, place = (OTHER, ""), OTHER
        return self._rows.setdefault(
            key,
            {
                "place": place,
                "task": key[1] or None,
                "holds": 0,
                "single_holds": 0,
                "total_seconds": 0.0,
                "longest_seconds": 0.0,
            },
        )


def take_sample(at: float, thread: int, task: str) -> Sample | None:
    """Return the present stack of the hub's thread; ``None`` if the hub waits for events.

    A hold may be over before this thread gets the interpreter lock, and then the hub waits for
    events again.

    :param thread: key of the thread in ``sys._current_frames``.
    """
    stack = tuple(read_stack(current_frames().get(thread)))
    if not stack or stack[0].module in _IDLE_MODULES:
        return None
    return Sample(at, stack, task)


def weigh(hold: Hold) -> Iterator[Weighted]:
    """Iterate over the samples of a hold, each with the seconds that are attributed to it.

    A sample gets the time since the previous sample. If a C function keeps the interpreter lock for
    540 ms, only one sample is taken, and it gets 540 ms.
    """
    before, last = hold.start, len(hold.samples) - 1
    if last < 0:
        yield Weighted(hold.end - hold.start, None)
    for number, sample in enumerate(hold.samples):
        end = hold.end if number == last else sample.at
        yield Weighted(end - before, sample)
        before = end


def place_of(stack: Sequence[Position]) -> str:
    """Return the innermost position in the user's code; without one, the innermost of all."""
    index, _ = innermost_user_code(stack)
    if index < 0:
        return text_of(stack[0]) if stack else "(no Python code)"
    return text_of(stack[index])


def _without_line(place: str) -> str:
    """Return ``shop/pay.py:8 in charge`` without its line number."""
    position, separator, function = place.partition(" in ")
    return position.rpartition(":")[0] + separator + function
