"""Limits the number of events that are sent and not yet acknowledged (the in-flight window).

The brain ingests the frames of one connection in order, each in one transaction. A large window
delays all later frames: behind 4,000 unacknowledged events, a command's result waited 33 s.

In a brain on SQLite, a transaction blocks all other writers, such as requests of operators. A
blocked writer retries every 100 ms and fails with HTTP status 500 after 5 s. With three frames of
1 s in flight, five of six writers waited, for 1.3 to 5.0 s. With one frame of 1.5 s in flight and a
pause after each ack, 9 of 29 writers waited, for 0.9 to 3.8 s. The brain ingested the same number
of events in both measurements.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

#: Maximum number of unacknowledged events, and initial value of the limit.
MAX_EVENTS = 1_000

#: Smallest limit of unacknowledged events. Slow acks halve the limit until it reaches this value.
MIN_EVENTS = 50

#: The limit is halved when the oldest unacknowledged frame is older than this many seconds.
SLOW_ACK = 2.5

#: Seconds within which an ack must arrive for the limit to grow again.
FAST_ACK = 1.0

#: Seconds after an ack during which no events are sent.
#: In this time, each waiting writer of SQLite retries once.
ACK_PAUSE = 0.1

#: Number of events in the first frame of a session. It is small, so that the ack arrives soon.
FRAME_EVENTS_INITIAL = 50

#: Maximum number of events in one frame.
#: A brain on SQLite ingests 163 events/s in frames of 50, and 200 events/s in frames of 500.
FRAME_EVENTS_MAX = 500

#: Seconds that the brain should take for one frame. Larger frames delay the requests of operators.
#: Each frame takes 1 to 2 ms of the worker's CPU time and one ACK_PAUSE.
TARGET_FRAME_SECONDS = 1.5

#: Seconds without any ack after which all unacknowledged frames are sent again.
ACK_DEADLINE = 90.0

#: Maximum number of stored early acks: acks that arrive before ``sent`` adds their frame.
MAX_EARLY_ACKS = 1_024


@dataclass(frozen=True, slots=True)
class InFlight:
    """A frame in flight.

    ``sent_at`` is in monotonic seconds. ``number`` is the frame's position in the order of sending.
    """

    ids: tuple[int, ...]
    events: int
    sent_at: float
    number: int


class Window:
    """Admits one frame of events at a time. ``now`` is always the monotonic time in seconds.

    The brain processes frames in order, and does not acknowledge a frame that its database rejected
    temporarily. Therefore a frame counts as skipped when a later frame is acknowledged first. A
    skipped frame takes no capacity. Its rows are sent again in the next session. After
    ``ACK_DEADLINE`` seconds in the same session, the rows of all unacknowledged frames are sent
    again.
    """

    def __init__(self, limit: int = MAX_EVENTS) -> None:
        self.limit = limit
        #: Maximum number of events in the next frame.
        self.frame_events = FRAME_EVENTS_INITIAL
        self._max_limit = limit
        self._in_flight: OrderedDict[str, InFlight] = OrderedDict()
        self._skipped: dict[str, InFlight] = {}
        self._early_acks: OrderedDict[str, None] = OrderedDict()
        self._events = 0
        self._sent = 0
        self._last_ack = 0.0
        self._paused_until = 0.0
        self._pacing = True
        self._skipped_since = 0.0
        self._last_change = 0.0

    @property
    def events(self) -> int:
        """Number of unacknowledged events, including the events of skipped frames."""
        return self._events + sum(frame.events for frame in self._skipped.values())

    @property
    def frames(self) -> int:
        """Number of unacknowledged frames, including skipped frames."""
        return len(self._in_flight) + len(self._skipped)

    @property
    def in_flight(self) -> int:
        """Number of unacknowledged frames without skipped frames."""
        return len(self._in_flight)

    @property
    def ids(self) -> list[int]:
        """Row ids of the unacknowledged frames without skipped frames."""
        return [identity for frame in self._in_flight.values() for identity in frame.ids]

    def available(self, now: float) -> int:
        """Return how many more events may be sent at ``now``."""
        self._adapt(now)
        if self._pacing and (self._is_busy(now) or self.pause_remaining(now)):
            return 0
        return max(0, self.limit - self._events)

    def pause_remaining(self, now: float) -> float:
        """Return the seconds until the pause after the last ack ends."""
        return max(0.0, self._paused_until - now) if self._pacing else 0.0

    def disable_pacing(self) -> None:
        """Admit events without waiting for acks or pauses, because the agent is stopping."""
        self._pacing = False

    def sent(self, frame: str, ids: Sequence[int], events: int, now: float) -> tuple[int, ...]:
        """Add a frame that was sent. If its ack has arrived already, return its row ids."""
        self._sent += 1
        if frame in self._early_acks:
            del self._early_acks[frame]
            self._mark_skipped(self._sent, now)
            self._tune_frame_size(events, 0.0)
            return tuple(ids)
        if not self._in_flight:
            self._last_ack = now
        self._in_flight[frame] = InFlight(tuple(ids), events, now, self._sent)
        self._events += events
        return ()

    def acked(self, frame: str, now: float) -> tuple[int, ...]:
        """Remove an acknowledged frame; return its row ids."""
        previous, self._last_ack, self._paused_until = self._last_ack, now, now + ACK_PAUSE
        if frame in self._skipped:
            return self._skipped.pop(frame).ids
        acked = self._in_flight.pop(frame, None)
        if acked is None:
            self._early_acks[frame] = None
            while len(self._early_acks) > MAX_EARLY_ACKS:
                self._early_acks.popitem(last=False)
            return ()
        self._events -= acked.events
        self._mark_skipped(acked.number, now)
        self._tune_frame_size(acked.events, now - max(acked.sent_at, previous))
        if now - acked.sent_at < FAST_ACK:
            self._grow(now)
        return acked.ids

    def ack_timed_out(self, now: float) -> bool:
        """Whether ``ACK_DEADLINE`` has passed without any ack, or since a frame was skipped."""
        overdue = bool(self._skipped) and now - self._skipped_since > ACK_DEADLINE
        return overdue or (bool(self._in_flight) and now - self._last_ack > ACK_DEADLINE)

    def reset(self) -> None:
        """Remove all unacknowledged frames, because their rows will be sent again."""
        self._in_flight.clear()
        self._skipped.clear()
        self._early_acks.clear()
        self._events = 0

    def _is_busy(self, now: float) -> bool:
        """Whether the brain is processing a frame.

        ``False`` after ``SLOW_ACK`` seconds, because the brain may have skipped the frame.
        """
        return (
            bool(self._in_flight)
            and now - max(self._last_ack, next(reversed(self._in_flight.values())).sent_at)
            < SLOW_ACK
        )

    def _mark_skipped(self, number: int, now: float) -> None:
        """Mark all frames sent before frame ``number`` as skipped."""
        for name in [name for name, frame in self._in_flight.items() if frame.number < number]:
            if not self._skipped:
                self._skipped_since = now
            self._skipped[name] = self._in_flight.pop(name)
            self._events -= self._skipped[name].events

    def _tune_frame_size(self, events: int, seconds: float) -> None:
        """Adapt the frame size to the brain's time for one frame, by a factor of two at most.

        The time of a small frame does not show how long a larger frame takes. Therefore a small
        frame that was ingested quickly changes nothing.
        """
        if seconds <= TARGET_FRAME_SECONDS and 2 * events < self.frame_events:
            return
        shortest = TARGET_FRAME_SECONDS * events / FRAME_EVENTS_MAX
        fitting = int(events * TARGET_FRAME_SECONDS / max(seconds, shortest, 1e-9))
        self.frame_events = max(
            FRAME_EVENTS_INITIAL,
            self.frame_events // 2,
            min(FRAME_EVENTS_MAX, self.frame_events * 2, fitting),
        )

    def _adapt(self, now: float) -> None:
        oldest = next(iter(self._in_flight.values()), None)
        if (
            oldest is not None
            and now - oldest.sent_at > SLOW_ACK
            and now - self._last_change > SLOW_ACK
        ):
            self.limit = max(MIN_EVENTS, self.limit // 2)
            self._last_change = now

    def _grow(self, now: float) -> None:
        if self.limit < self._max_limit and now - self._last_change > FAST_ACK:
            self.limit = min(self._max_limit, self.limit * 2)
            self._last_change = now
