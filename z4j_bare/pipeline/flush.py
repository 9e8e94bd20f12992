"""Ring to store: encode what the host captured and commit it, one transaction a wake."""

from __future__ import annotations

import logging
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING

from z4j_bare.concurrency.timeslice import TimeSlice

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.ring import Captured, Ring
    from z4j_bare.monitoring.metrics import Counters

logger = logging.getLogger("z4j.runtime.flush")

#: Seconds that an empty ring, which wakes us by itself, is left alone: until the figures are looked at, and after that.
QUIET = 5.0
ASLEEP = 60.0

#: The encoder of what has been encoded before.
_ENCODED = itemgetter(1)


class FlushLoop:
    """Wakes ``interval`` seconds after the first event, or when the ring says that there are many.

    :param most: events in one transaction.
    :param stored: called after each commit with the number of events.
    """

    def __init__(
        self,
        ring: Ring,
        buffer: BufferManager,
        backend: BaseConcurrency,
        counters: Counters,
        *,
        interval: float,
        most: int,
        stored: Callable[[int], None],
    ) -> None:
        self._ring = ring
        self._buffer = buffer
        self._backend = backend
        self._counters = counters
        self._interval = interval
        self._most = most
        self._stored = stored
        self._turn = backend.lock()

    def run(self, stop_event: object) -> None:
        """Flush until ``stop_event`` (an ``IEvent``) is set."""
        patience = QUIET
        while not stop_event.is_set():  # type: ignore[attr-defined]
            if self._ring.arm_wakeup():
                if not self._backend.wait(self._ring.wake, patience):
                    self._buffer.refresh_stats()
                    patience = ASLEEP
                self._ring.wake.clear()
                continue
            patience = QUIET
            if len(self._ring) < self._most:
                self._backend.wait(self._ring.wake, self._interval)  # let company come
            self._ring.wake.clear()
            # What came during a commit waits for the next wake, unless it is a whole batch: commits of a dozen events, one
            # after the other, cost the worker 0.2 ms a task; a batch of 256 costs hardly more than one of 12.
            while self._commit() == self._most <= len(self._ring):
                pass

    def flush(self) -> None:
        """Empty the ring into the store. Safe from several tasks: order is kept."""
        while self._commit():
            pass

    def _commit(self) -> int:
        """Store the oldest events, at most one transaction's worth, and return how many they were."""
        with self._turn:
            left = self._ring.take(self._most)
            if not left:
                return 0
            taken, encoded = len(left), list[bytes]()
            left.reverse()
            try:
                self._encode(left, encoded)
                self._buffer.append_events(encoded)
            except BaseException:
                self._ring.requeue([*((_ENCODED, each) for each in encoded), *reversed(left)])
                raise
            self._counters.stored += len(encoded)
            self._stored(len(encoded))
            return taken

    def _encode(self, left: list[Captured], encoded: list[bytes]) -> None:
        """Move the events from ``left``, last first, to ``encoded``: each but once, for a task's stamps grow with each."""
        checkpoint = TimeSlice(self._backend).checkpoint
        while left:
            captured = left[-1]
            try:
                encoded.append(captured[0](captured))
            except Exception:
                self._counters.unencodable += 1
                logger.debug("z4j: an event could not be encoded", exc_info=True)
            left.pop()
            checkpoint()
