"""Limits the number of events that were sent but not yet acknowledged (the in-flight window).

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import random as _uniform

from z4j_bare.wire.backoff import Backoff

#: Maximum number of unacknowledged events, and initial value of the limit.
MAX_EVENTS = 1_000

#: Smallest limit of unacknowledged events. Slow acks halve the limit until it reaches this value.
MIN_EVENTS = 50

#: The limit is halved when the oldest unacknowledged frame is older than this many seconds.
SLOW_ACK = 2.5

#: Seconds without an ack after which the first empty frame is sent behind the frames in flight.
#: A brain on PostgreSQL skips a frame that waits more than 3 s for another frame of the same token.
#: The delay is shorter.
PROBE_DELAY_INITIAL = 2.5

#: Factor by which the delay grows from one empty frame to the next.
#: With this factor, four empty frames are sent within 15 s.
PROBE_DELAY_FACTOR = 1.2

#: Maximum seconds between two empty frames. Each empty frame costs the brain some milliseconds.
PROBE_DELAY_MAX = 10.0

#: Seconds from the ack that proves a skip until the skipped frames are sent again. The delay
#: doubles up to the maximum while the brain skips one frame after the other.
RESEND_DELAY_INITIAL = 0.5
#: Maximum seconds from the ack that proves a skip until the resend, without the random addition.
RESEND_DELAY_MAX = 2.0
#: Maximum random addition to the delay of a resend, relative to the delay.
#: The brain ingests the frames of one token one after another. Without the addition, agents whose
#: frames were skipped at the same time would wait for each other again.
RESEND_JITTER = 1.0

#: Seconds within which an ack must arrive for the limit to grow again.
FAST_ACK = 1.0

#: Seconds after an ack during which no events are sent.
#: The pause is long enough for one retry of each waiting writer of SQLite.
ACK_PAUSE = 0.1

#: Number of events in the first frame of a session.
#: The first frame is small, so that its ack arrives soon.
FRAME_EVENTS_INITIAL = 50

#: Smallest number of events to which skipped frames reduce the size of a frame.
#: Slow acks reduce the size only to ``FRAME_EVENTS_INITIAL``, because the brain ingests fewer
#: events/s in small frames.
FRAME_EVENTS_MIN = 10

#: Maximum number of events in one frame.
#: A brain on SQLite ingests 163 events/s in frames of 50, and 200 events/s in frames of 500.
FRAME_EVENTS_MAX = 500

#: Seconds that the brain should take for one frame. Larger frames delay the requests of operators.
#: Smaller frames cost more, because each frame takes 1 to 2 ms of the worker's CPU time and one
#: ACK_PAUSE.
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


class FrameSize:
    """The maximum number of events in the next frame."""

    def __init__(self) -> None:
        self.events = FRAME_EVENTS_INITIAL

    def on_ack(self, events: int, seconds: float) -> None:
        """Adapt the size to the brain's time for one frame, by a factor of two at most.

        The time of a small frame does not show how long a larger frame takes. Therefore a small
        frame that was ingested quickly changes nothing, and neither does an empty frame.
        """
        if not events or (seconds <= TARGET_FRAME_SECONDS and 2 * events < self.events):
            return
        shortest = TARGET_FRAME_SECONDS * events / FRAME_EVENTS_MAX
        fitting = int(events * TARGET_FRAME_SECONDS / max(seconds, shortest, 1e-9))
        self.events = max(
            min(FRAME_EVENTS_INITIAL, self.events),
            self.events // 2,
            min(FRAME_EVENTS_MAX, self.events * 2, fitting),
        )

    def on_skip(self, events: int) -> None:
        """Halve the size, because the brain skipped a frame of ``events`` events.

        A small frame changes nothing, because its size was not the cause.
        """
        if 2 * events >= self.events:
            self.events = max(FRAME_EVENTS_MIN, self.events // 2)


class SkippedFrames:
    """The frames that the brain has skipped, and the time at which they are sent again.

    :param random: returns a float in [0, 1).
    """

    def __init__(self, random: Callable[[], float] = _uniform) -> None:
        self._frames: dict[str, InFlight] = {}
        self._delay = Backoff(
            RESEND_DELAY_INITIAL, RESEND_DELAY_MAX, jitter=RESEND_JITTER, random=random
        )
        #: Monotonic time at which the frames are sent again; infinite if there are none.
        self.resend_at = float("inf")

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def events(self) -> int:
        """Number of events in the skipped frames."""
        return sum(frame.events for frame in self._frames.values())

    def add(self, frames: dict[str, InFlight], now: float) -> None:
        """Add frames that were skipped, because a later frame was acknowledged at ``now``."""
        if not self._frames:
            self.resend_at = now + self._delay.next()
        self._frames.update(frames)

    def acked(self, frame: str) -> InFlight | None:
        """Remove and return a frame whose ack arrived late; ``None`` for a frame not skipped."""
        found = self._frames.pop(frame, None)
        if not self._frames:
            self.resend_at = float("inf")
        return found

    def clear(self) -> None:
        """Remove all frames, because the sender sends their rows again."""
        self._frames.clear()
        self.resend_at = float("inf")

    def on_success(self) -> None:
        """Reset the delay, because the brain has ingested events."""
        self._delay.reset()


class Window:
    """Admits one frame of events at a time. ``now`` is always the monotonic time in seconds.

    The brain processes frames in order, and does not acknowledge a frame that its database rejected
    temporarily. Therefore a frame counts as skipped when a later frame is acknowledged first. The
    rows of skipped frames are sent again after a short random delay, before any other events.

    If an ack is late, an empty frame is sent behind the frames in flight. The empty frame's ack
    proves that the brain has skipped those frames. Without this proof the brain may still process
    the frames. Then their rows are sent again only in the next session, or after ``ACK_DEADLINE``
    seconds without any ack.

    :param random: returns a float in [0, 1).
    """

    def __init__(self, limit: int = MAX_EVENTS, random: Callable[[], float] = _uniform) -> None:
        self.limit = limit
        self.skipped = SkippedFrames(random)
        self._max_limit = limit
        self._size = FrameSize()
        self._in_flight: OrderedDict[str, InFlight] = OrderedDict()
        self._early_acks: OrderedDict[str, None] = OrderedDict()
        self._events = 0
        self._sent = 0
        self._last_ack = 0.0
        self._paused_until = 0.0
        self._pacing = True
        self._probe_delay = Backoff(PROBE_DELAY_INITIAL, PROBE_DELAY_MAX, factor=PROBE_DELAY_FACTOR)
        self._probe_at = 0.0
        self._last_change = 0.0

    @property
    def frame_events(self) -> int:
        """Maximum number of events in the next frame."""
        return self._size.events

    @property
    def events(self) -> int:
        """Number of unacknowledged events, including the events of skipped frames."""
        return self._events + self.skipped.events

    @property
    def frames(self) -> int:
        """Number of unacknowledged frames, including skipped frames."""
        return len(self._in_flight) + len(self.skipped)

    @property
    def in_flight(self) -> int:
        """Number of unacknowledged frames without skipped frames."""
        return len(self._in_flight)

    @property
    def ids(self) -> list[int]:
        """Row ids of the unacknowledged frames without skipped frames."""
        return [identity for frame in self._in_flight.values() for identity in frame.ids]

    def available(self, now: float) -> int:
        """Return how many more events may be sent at ``now``.

        While there are skipped frames, no other events are sent. Thus the order of events is kept.
        """
        self._adapt(now)
        if self.skipped or (self._pacing and (self._events or self.pause_remaining(now))):
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
            self._size.on_ack(events, 0.0)
            return tuple(ids)
        if not self._in_flight:
            self._last_ack = now
            self._schedule_probe(now)
        elif not events:
            self._probe_delay.increase()
            self._probe_at = now + self._probe_delay.delay
        self._in_flight[frame] = InFlight(tuple(ids), events, now, self._sent)
        self._events += events
        return ()

    def acked(self, frame: str, now: float) -> tuple[int, ...]:
        """Remove an acknowledged frame; return its row ids."""
        previous, self._last_ack, self._paused_until = self._last_ack, now, now + ACK_PAUSE
        self._schedule_probe(now)
        if late := self.skipped.acked(frame):
            return late.ids
        acked = self._in_flight.pop(frame, None)
        if acked is None:
            self._early_acks[frame] = None
            while len(self._early_acks) > MAX_EARLY_ACKS:
                self._early_acks.popitem(last=False)
            return ()
        self._events -= acked.events
        self._mark_skipped(acked.number, now)
        self._size.on_ack(acked.events, now - max(acked.sent_at, previous))
        if acked.events:
            self.skipped.on_success()
        if now - acked.sent_at < FAST_ACK:
            self._grow(now)
        return acked.ids

    def probe_due(self, now: float) -> bool:
        """Whether to send an empty frame. Its ack proves that earlier frames were skipped."""
        return bool(self._in_flight) and now >= self._probe_at

    def resend_due(self, now: float) -> bool:
        """Whether to send the rows of skipped frames again, once no other rows are in flight."""
        return now >= self._resend_at()

    def has_rows_in_flight(self) -> bool:
        """Whether a frame in flight contains rows. A frame that proves a skip may be empty."""
        return any(frame.ids for frame in self._in_flight.values())

    def next_check(self, now: float) -> float:
        """Return the seconds until ``probe_due`` or ``resend_due`` can become true."""
        resend_at = float("inf") if self.has_rows_in_flight() else self._resend_at()
        probe_at = self._probe_at if self._in_flight else float("inf")
        return max(0.0, min(resend_at, probe_at) - now)

    def ack_timed_out(self, now: float) -> bool:
        """Whether frames are in flight and ``ACK_DEADLINE`` has passed without any ack."""
        return bool(self._in_flight) and now - self._last_ack > ACK_DEADLINE

    def reset(self) -> None:
        """Remove all unacknowledged frames, because their rows will be sent again."""
        self._in_flight.clear()
        self.skipped.clear()
        self._early_acks.clear()
        self._events = 0

    def _resend_at(self) -> float:
        return self.skipped.resend_at if self._pacing or not self.skipped else 0.0

    def _schedule_probe(self, now: float) -> None:
        self._probe_delay.reset()
        self._probe_at = now + self._probe_delay.delay

    def _mark_skipped(self, number: int, now: float) -> None:
        """Mark all frames sent before frame ``number`` as skipped, and drop those without rows."""
        skipped = {name: each for name, each in self._in_flight.items() if each.number < number}
        for name, frame in skipped.items():
            del self._in_flight[name]
            self._events -= frame.events
            self._size.on_skip(frame.events)
        with_rows = {name: frame for name, frame in skipped.items() if frame.ids}
        if with_rows:
            self.skipped.add(with_rows, now)

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
