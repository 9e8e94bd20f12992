"""The in-flight window: how much may be sent before the brain has acknowledged, and what to make of its silence.

The brain ingests one connection strictly in order (``brain-contract`` 7a), so a long window is latency for everything sent
behind it: a command's result waited 33 s behind 4,000 unacknowledged events. It ingests a frame in one transaction, and on
SQLite nobody else writes meanwhile: others try again every 100 ms, and after 5 s an operator's request is refused (500).
While a bare feed sent frames of a second three at a time, five of six writers waited, 1.3 to 5.0 s; while it sent frames of
1.5 s one at a time with a breath between them, nine of 29, 0.9 to 3.8 s, and the brain ingested as much.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

MAX_EVENTS = 1_000
MIN_EVENTS = 50

#: Seconds. The window halves when the oldest unacknowledged frame is older than SLOW and grows when acks take under FAST.
SLOW = 2.5
FAST = 1.0

#: Seconds after an ack in which no events are sent: as long as SQLite's waiting writers sleep between two tries.
BREATH = 0.1

#: Events in one frame: in a session's first, which is there all the sooner, and at most (the brain on SQLite: 163 events/s
#: in frames of 50, 200 in frames of 500).
FRAME_FIRST = 50
FRAME_EVENTS = 500

#: Seconds of the brain's time that a frame should take: not more, for the operators' sake, and not less, because each costs
#: the worker a millisecond or two, its ack included, whatever it carries, and the brain its breath.
GOAL = 1.5

#: Seconds without any ack, while something is unacknowledged, after which everything is sent again.
ACK_DEADLINE = 90.0

#: Acks that arrive before the send that they answer has returned are remembered; this many.
EARLY = 1_024


@dataclass(frozen=True, slots=True)
class InFlight:
    """A frame on its way: the store's row ids it carries, how many of them are events, when it was sent, as which."""

    ids: tuple[int, ...]
    events: int
    sent_at: float
    number: int


class Window:
    """Lets one frame of events out at a time. Every method takes ``now``, monotonic seconds; it has no clock.

    A frame whose successor is acknowledged first is left behind: the brain works in order, and says nothing of one that
    its database refused for a moment (2.4). It takes no room and slows nobody down, and is sent again, with all that is on
    its way, ``ACK_DEADLINE`` seconds later, or in the next session.
    """

    def __init__(self, limit: int = MAX_EVENTS) -> None:
        self.limit = limit
        #: Events that the next frame may carry.
        self.frame = FRAME_FIRST
        self._largest = limit
        self._flying: OrderedDict[str, InFlight] = OrderedDict()
        self._behind: dict[str, InFlight] = {}
        self._early: OrderedDict[str, None] = OrderedDict()
        self._events = 0
        self._sent = 0
        self._last_ack = 0.0
        self._rests_until = 0.0
        self._hurried = False
        self._behind_since = 0.0
        self._last_change = 0.0

    @property
    def events(self) -> int:
        """Unacknowledged events."""
        return self._events + sum(frame.events for frame in self._behind.values())

    @property
    def frames(self) -> int:
        """Unacknowledged frames."""
        return len(self._flying) + len(self._behind)

    @property
    def queued(self) -> int:
        """Frames that the brain has still to get to."""
        return len(self._flying)

    @property
    def ids(self) -> list[int]:
        """The row ids of everything on its way; what was left behind is past the brain already."""
        return [identity for flying in self._flying.values() for identity in flying.ids]

    def room(self, now: float) -> int:
        """Return how many more events may be sent at ``now``."""
        self._adapt(now)
        if not self._hurried and (self._busy(now) or self.rest(now)):
            return 0
        return max(0, self.limit - self._events)

    def rest(self, now: float) -> float:
        """Return for how many seconds the brain is left alone."""
        return 0.0 if self._hurried else max(0.0, self._rests_until - now)

    def hurry(self) -> None:
        """Let what is left out at once: who sends has no time to wait."""
        self._hurried = True

    def sent(self, frame: str, ids: Sequence[int], events: int, now: float) -> tuple[int, ...]:
        """Enter a frame; return its row ids at once if its ack has already been here."""
        self._sent += 1
        if frame in self._early:
            del self._early[frame]
            self._leave_behind(self._sent, now)
            self._measure(events, 0.0)
            return tuple(ids)
        if not self._flying:
            self._last_ack = now
        self._flying[frame] = InFlight(tuple(ids), events, now, self._sent)
        self._events += events
        return ()

    def acked(self, frame: str, now: float) -> tuple[int, ...]:
        """Take the ack of ``frame``; return the row ids that are done with. The counts in an ack mean nothing (2.4)."""
        earlier, self._last_ack, self._rests_until = self._last_ack, now, now + BREATH
        if frame in self._behind:
            return self._behind.pop(frame).ids
        flying = self._flying.pop(frame, None)
        if flying is None:
            self._early[frame] = None
            while len(self._early) > EARLY:
                self._early.popitem(last=False)
            return ()
        self._events -= flying.events
        self._leave_behind(flying.number, now)
        self._measure(flying.events, now - max(flying.sent_at, earlier))
        if now - flying.sent_at < FAST:
            self._grow(now)
        return flying.ids

    def silent(self, now: float) -> bool:
        """Whether no ack of anything has come for ``ACK_DEADLINE`` seconds, or none of what was left behind so long ago."""
        overdue = bool(self._behind) and now - self._behind_since > ACK_DEADLINE
        return overdue or (bool(self._flying) and now - self._last_ack > ACK_DEADLINE)

    def reset(self) -> None:
        """Forget what is in flight, because it will be sent again."""
        self._flying.clear()
        self._behind.clear()
        self._early.clear()
        self._events = 0

    def _busy(self, now: float) -> bool:
        """Whether the brain has a frame to digest, and has not been silent for so long that it may have skipped it."""
        return (
            bool(self._flying)
            and now - max(self._last_ack, next(reversed(self._flying.values())).sent_at) < SLOW
        )

    def _leave_behind(self, number: int, now: float) -> None:
        """Take what was sent before frame ``number`` for left behind."""
        for name in [name for name, frame in self._flying.items() if frame.number < number]:
            if not self._behind:
                self._behind_since = now
            self._behind[name] = self._flying.pop(name)
            self._events -= self._behind[name].events

    def _measure(self, events: int, cost: float) -> None:
        """Learn from what a frame cost the brain, in seconds, a factor of two at most; a brief small one tells nothing."""
        if cost <= GOAL and 2 * events < self.frame:
            return
        fitting = int(events * GOAL / max(cost, GOAL * events / FRAME_EVENTS, 1e-9))
        self.frame = max(FRAME_FIRST, self.frame // 2, min(FRAME_EVENTS, self.frame * 2, fitting))

    def _adapt(self, now: float) -> None:
        oldest = next(iter(self._flying.values()), None)
        if oldest is not None and now - oldest.sent_at > SLOW and now - self._last_change > SLOW:
            self.limit = max(MIN_EVENTS, self.limit // 2)
            self._last_change = now

    def _grow(self, now: float) -> None:
        if self.limit < self._largest and now - self._last_change > FAST:
            self.limit = min(self._largest, self.limit * 2)
            self._last_change = now
