"""The ring between the host and the flush loop: an append, and nothing else, on the host's time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

#: What the ring holds: a tuple whose first item makes the event's bytes of it. One tuple, not two: the garbage collector
#: counts what waits here, and each of its full passes holds up a large worker for 40 ms.
Captured = tuple[Any, ...]
#: ``Ring.put``.
Put = Callable[[Captured], None]


class Ring:
    """A bounded queue, oldest out first, that counts what it lost.

    :param limit: events held at most.
    :param threshold: events at which ``wake`` is set, so that the flush loop does not wait for its interval. It is also set
        by the first event after :meth:`arm_wakeup`: looking five times a second instead costs an idle worker 1 ms/s.
    :param wake: an ``IEvent``.
    """

    def __init__(self, limit: int, threshold: int, wake: Any) -> None:
        self.wake = wake
        self._items: deque[Captured] = deque(maxlen=limit)
        self._threshold = min(threshold, limit)
        # next() on a count is one bytecode: no update is lost between native threads, and no lock is needed.
        self._counter = count(1)
        self._armed = False
        self._produced = 0
        self._taken = 0

    def put(self, captured: Captured) -> None:
        """Append; over the limit the oldest goes. 0.3 microseconds."""
        self._items.append(captured)
        self._produced = next(self._counter)
        if self._armed or len(self._items) >= self._threshold:
            self._armed = False
            self.wake.set()

    def arm_wakeup(self) -> bool:
        """Ask for a wake by the next event; ``False`` if there are events already. For the flush loop only."""
        self._armed = True  # before the look: an event that comes between the two sets ``wake``
        if self._items:
            self._armed = False
        return self._armed

    def take(self, limit: int) -> list[Captured]:
        """Remove and return at most ``limit`` of the oldest. For the flush loop only."""
        items = self._items
        batch = [items.popleft() for _ in range(min(limit, len(items)))]
        self._taken += len(batch)
        return batch

    def requeue(self, batch: list[Captured]) -> None:
        """Put at the front what :meth:`take` returned and nobody could keep; what has no room any more counts as lost."""
        room = (self._items.maxlen or 0) - len(self._items)
        self._items.extendleft(reversed(batch[len(batch) - min(room, len(batch)) :]))
        self._taken -= len(batch)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def produced(self) -> int:
        """Events ever appended."""
        return self._produced

    @property
    def lost(self) -> int:
        """Events that fell off the far end."""
        return max(0, self._produced - self._taken - len(self._items))
