"""Encodes the events in the ring and commits each batch of events to the store."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.events.losses import LossLog
from z4j_bare.interfaces import IEvent

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.ring import Captured, Ring
    from z4j_bare.monitoring.metrics import Counters
    from z4j_bare.pipeline.send import Sender

#: Seconds without an event after which the loop refreshes the buffer's stats for the first time.
#: An event wakes the loop earlier.
IDLE_WAIT = 5.0

#: Seconds between the later refreshes, until an event arrives.
IDLE_WAIT_MAX = 60.0

#: The encoder of a record that is already encoded.
#: The encoder returns the record's second item, the bytes.
_encoded_bytes = itemgetter(1)


class FlushLoop:
    """Flushes the ring ``interval`` seconds after the first event, or at the ring's threshold.

    :param max_events: maximum number of events in one transaction.
    :param sender: its ``on_stored`` is called after each commit.
    """

    def __init__(
        self,
        ring: Ring,
        buffer: BufferManager,
        sender: Sender,
        backend: BaseConcurrency,
        counters: Counters,
        interval: float,
        max_events: int,
    ) -> None:
        self._ring = ring
        self._buffer = buffer
        self._sender = sender
        self._backend = backend
        self._counters = counters
        self._interval = interval
        self._max_events = max_events
        self._commit_lock = backend.lock()
        self._loss_log = LossLog()

    def run(self, stop_event: IEvent) -> None:
        """Flush until ``stop_event`` is set."""
        timeout = IDLE_WAIT
        while not stop_event.is_set():
            if self._ring.arm_wakeup():
                if not self._backend.wait(self._ring.wake, timeout):
                    self._buffer.refresh_stats()
                    timeout = IDLE_WAIT_MAX
                self._ring.wake.clear()
                continue
            timeout = IDLE_WAIT
            if len(self._ring) < self._max_events:
                self._backend.wait(self._ring.wake, self._interval)  # more events may arrive
            self._ring.wake.clear()
            # Events that arrive during a commit wait for the next wake-up, unless they fill a
            # batch. A commit of 256 events takes hardly longer than a commit of 12. Repeated
            # commits of 12 events would cost the worker 0.2 ms of CPU per task.
            while self._commit() == self._max_events <= len(self._ring):
                pass

    def flush(self) -> None:
        """Store all events in the ring in their order. Several tasks may call this method."""
        while self._commit():
            pass

    def _commit(self) -> int:
        """Store the oldest events in one transaction; return how many left the ring."""
        with self._commit_lock:
            remaining = self._ring.take(self._max_events)
            if not remaining:
                return 0
            taken, encoded = len(remaining), list[bytes]()
            position, now = self._ring.position, self._backend.wall()
            remaining.reverse()
            try:
                self._encode(remaining, encoded)
                self._buffer.append_events(encoded)
            except BaseException:
                done = [(_encoded_bytes, event) for event in encoded]
                self._ring.requeue([*done, *reversed(remaining)])
                raise
            if self._ring.runs is not None and self._buffer.durable:
                self._ring.runs.stored(position, now)
            self._counters.stored += len(encoded)
            self._sender.on_stored(len(encoded))
            return taken

    def _encode(self, remaining: list[Captured], encoded: list[bytes]) -> None:
        """Move events from the end of ``remaining`` to ``encoded``.

        Each event is encoded only once, because encoding advances the timestamps of the event's
        task.
        """
        checkpoint = TimeSlice(self._backend).checkpoint
        while remaining:
            captured = remaining[-1]
            try:
                encoded.append(captured[0](captured))
            except Exception as error:
                self._counters.unencodable += 1
                self._loss_log.report("encoding an event", _task_name(captured), error)
            remaining.pop()
            checkpoint()


def _task_name(captured: Captured) -> str:
    """Return the task name in a record of any engine; ``unknown`` if the record has none."""
    for item in captured[1:]:
        task_type = getattr(item, "task_type", None)
        fields = getattr(item, "data", item)
        name = getattr(task_type, "name", None) or (
            fields.get("task_name") if isinstance(fields, dict) else None
        )
        if name:
            return str(name)
    return "unknown"
