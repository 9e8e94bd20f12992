"""The queue of events from the host's tasks to the flush loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from z4j_bare.events.task_counts import TaskCounts
from z4j_bare.interfaces import IEvent, IOpenRuns

#: A captured event: a tuple whose first item is the function that encodes the tuple to bytes.
#: The tuple is flat, because the garbage collector visits each container in the ring. A full
#: collection stops a large worker for 40 ms even without these visits.
Captured = tuple[Any, ...]

#: The type of ``Ring.put``.
Put = Callable[[Captured], None]


class Ring:
    """A bounded queue. A full queue drops its oldest event and counts the loss.

    :param threshold: number of events at which the flush loop is woken before its interval ends.
    :param wake: wakes the flush loop. The first event after :meth:`arm_wakeup` also sets ``wake``.
        Without this wake-up, an idle flush loop would have to poll. Polling takes 1 ms of CPU time
        a second.
    """

    def __init__(self, limit: int, threshold: int, wake: IEvent) -> None:
        self.wake = wake
        #: The open runs of the tasks whose events are appended; ``None`` if they are not kept.
        self.runs: IOpenRuns | None = None
        #: Counts the events when they are encoded.
        self.counts = TaskCounts()
        #: Total number of appended events.
        self.produced = 0
        self._items: deque[Captured] = deque(maxlen=limit)
        self._threshold = min(threshold, limit)
        # ``next`` on a ``count`` is atomic between native threads and needs no lock.
        self._counter = count(1)
        self._uncaptured_counter = count(1)
        self._armed = False
        self._taken = 0
        self._uncaptured = 0

    def put(self, captured: Captured) -> None:
        """Append an event; drop the oldest event if the ring is full. Takes 0.3 us."""
        self._items.append(captured)
        self.produced = next(self._counter)
        if self._armed or len(self._items) >= self._threshold:
            self._armed = False
            self.wake.set()

    def count_uncaptured(self) -> None:
        """Count an event that could not be captured."""
        self._uncaptured = next(self._uncaptured_counter)

    def arm_wakeup(self) -> bool:
        """If the ring is empty, let the next event set ``wake`` and return ``True``.

        Only the flush loop may call this.
        """
        self._armed = True  # before the check, so that an event after it sets ``wake``
        if self._items:
            self._armed = False
        return self._armed

    def take(self, limit: int) -> list[Captured]:
        """Remove and return at most ``limit`` of the oldest events.

        Only the flush loop may call this method.
        """
        items = self._items
        batch = [items.popleft() for _ in range(min(limit, len(items)))]
        self._taken += len(batch)
        return batch

    def requeue(self, batch: list[Captured]) -> None:
        """Put events back into the ring at the front, because they could not be stored.

        If not all events fit, the oldest are dropped and count as lost.
        """
        room = (self._items.maxlen or 0) - len(self._items)
        self._items.extendleft(reversed(batch[len(batch) - min(room, len(batch)) :]))
        self._taken -= len(batch)

    def close(self) -> None:
        """Close ``runs``, after the store was closed."""
        if self.runs is not None:
            self.runs.close()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def position(self) -> int:
        """Number of the last event that was taken or dropped."""
        return self.produced - len(self._items)

    @property
    def lost(self) -> int:
        """Number of events that were dropped because the ring was full."""
        return max(0, self.produced - self._taken - len(self._items))

    @property
    def uncaptured(self) -> int:
        """Number of events that could not be captured."""
        return self._uncaptured
