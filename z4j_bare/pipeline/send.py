"""Store to brain: results first, then events in frames, as far as the in-flight window allows."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.rows import EVENT, POISON, PROJECTION, RESULT
from z4j_bare.errors import AgentError, FrameTooLargeError, PoisonRowError, ScheduleStreamError
from z4j_bare.pipeline.poison import describe, part
from z4j_bare.wire import close_codes
from z4j_bare.wire.frames import event_batch, frame_id, shrink_event, shrink_result
from z4j_bare.wire.session import ENVELOPE_BYTES
from z4j_bare.wire.window import FRAME_EVENTS, Window

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.buffer.rows import BufferEntry
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.monitoring.metrics import Counters
    from z4j_bare.pipeline.link import Connection

logger = logging.getLogger("z4j.runtime.send")

#: Bytes of one frame: signing and masking more would hold the hub too long.
FRAME_BYTES = 128 * 1024

#: Bytes of events below which the limit of a frame does not sink, however much its JSON grows on the way.
SMALLEST = 512

#: Seconds between two looks at the store when nobody wakes the loop: while something is under way, in memory only, or to be
#: tidied, and else.
IDLE = 2.0
QUIET = 30.0

#: Results sent in one turn, so that a flood of them cannot starve events.
RESULTS = 50

#: What overtakes events, in the order in which it was stored: the result of an order comes behind what it tells of.
EXPRESS = (PROJECTION, RESULT)


class SendLoop:
    """One per session: every row that is not confirmed is sent again in the next one, with the same id and time.

    A result has no ack of its own. The next ``event_batch``, empty if need be, is its receipt: the brain works through a
    connection in order, so that batch's ack says that the result has arrived too.

    A frame of a schedule stream travels alone, because the brain acknowledges none that comes out of sequence. If it keeps
    silent over one that it got twice, a row before it has been lost, and only a new session, with a new epoch, goes on.

    Rows that brought down two sessions (see ``suspects``) are tried apart: nothing else is on its way, and the brain has
    acknowledged an empty batch in this very session, so that what kills every session is not held against them.
    """

    def __init__(
        self, link: Connection, buffer: BufferManager, backend: BaseConcurrency, counters: Counters
    ) -> None:
        self._link = link
        self._buffer = buffer
        self._backend = backend
        self._counters = counters
        self._synchronous_acks: bool = link.transport.synchronous_acks
        self._most = self._limit = min(FRAME_BYTES, link.hello_ack.max_frame_bytes) - ENVELOPE_BYTES
        self._window = Window()
        # In threads an ack may come between the two halves of whatever the sender does to the window.
        self._books = backend.lock()
        self._overtook: set[int] = set()
        # Whether there may be events that have not been looked at.
        self._more = False
        # What a transport that confirms is uploading, and what an upload failed with.
        self._uploading: Sequence[BufferEntry] = ()
        self._failure: AgentError | None = None
        self._proven = False
        # Rows of schedule streams that were sent again for want of an ack.
        self._doubted: set[int] = set()
        self._rewind()

    def run(self) -> None:
        """Send until the session ends. Raises ``NetworkError``, or a ``RemoteError`` where the answer comes with a send."""
        try:
            while not self._link.closing.is_set():
                self._link.wake.clear()
                if not self._turn():
                    self._backend.wait(self._link.wake, self._patience())
        except AgentError as error:
            self._failure = error
            raise

    def acked(self, frame: str) -> None:
        """Take an ``event_batch_ack``; called by the receive loop."""
        with self._books:
            now = self._backend.now()
            self._finish(self._window.acked(frame, now))
            self._proven = True
            rest = self._window.pause_remaining(now)
        # A hub wakes us once, when the brain has had its breath. Without one we wake now, see that, and wait it out.
        if self._more and self._backend.timer(rest, self._link.wake.set, once=True) is None:
            self._link.wake.set()

    def stored(self, events: int) -> None:
        """Take note of events that were committed; called by the flush loop. If a frame is under way, its ack wakes us."""
        self._more = self._more or events > 0  # first: an ack that comes now has to see it
        if not self._window.in_flight:
            self._link.wake.set()

    def hurry(self) -> None:
        """Let nothing wait from now on: the agent stops."""
        self._window.disable_pacing()
        self._link.wake.set()

    def idle(self) -> bool:
        """Whether everything that was stored has been sent and acknowledged."""
        return not (self._more or self._window.frames or self._owed)

    def judge(self, error: AgentError) -> AgentError:
        """Draw the conclusion from what ended the session, once its loops have left; return what to report.

        Rows that were on their way when the brain refused a frame are marked. The only one, in a session that worked until
        then, is dropped and counted.
        """
        ids = self._undecided(error) if close_codes.may_be_poison(error) else []
        if not ids:
            return error
        apart = [entry for entry in self._apart if entry.id in ids]
        if len(ids) == len(apart) == 1:
            self._buffer.discard(ids, POISON, self._generation)
            logger.warning(
                "z4j: dropped what the brain cannot take: %s (%s)", describe(apart[0]), error
            )
        else:
            self._buffer.mark_suspect(ids, self._generation)
        return PoisonRowError(str(error), code=getattr(error, "code", None)) if apart else error

    def _undecided(self, error: AgentError) -> list[int]:
        """Return the ids of the rows that may be what ``error`` is about."""
        if self._synchronous_acks:
            return [entry.id for entry in self._uploading] if error is self._failure else []
        with self._books:
            return [*self._owed, *self._window.ids]

    def _patience(self) -> float:
        """Return for how many seconds nothing happens that does not wake us."""
        rest = self._window.pause_remaining(self._backend.now())
        if self._more and (rest or not self._window.frames):
            return rest  # only the brain's breath keeps us, which may have just ended
        # No ack is due, nothing is to be deleted or tidied, and the disk needs no second try.
        return QUIET if self.idle() and self._buffer.is_idle else IDLE

    def _finish(self, ids: Sequence[int]) -> None:
        """Take note of rows that the brain has."""
        others = self._overtook.intersection(ids)
        self._overtook.difference_update(others)
        self._told.difference_update(others)
        self._buffer.ack(ids, len(ids) - len(others), self._generation)

    def _rewind(self) -> None:
        with self._books:
            self._window.reset()
        # The suspects on their way.
        self._apart: Sequence[BufferEntry] = ()
        # Rows of schedule streams that are on their way.
        self._told: set[int] = set()
        self._generation = self._buffer.generation
        self._after_event = 0
        self._after_result = 0
        self._owed: list[int] = []

    def _turn(self) -> bool:
        """Confirm, look, send; return whether there may be more to send at once."""
        now = self._backend.now()
        with self._books:
            silent = self._window.ack_timed_out(now)
        if silent:
            if self._told & self._doubted:
                raise ScheduleStreamError("no ack for schedules: a new session tells them anew")
            self._doubted = set(self._told)
            logger.warning(
                "z4j: no ack for a long time; sending %d events again", self._window.events
            )
            self._rewind()
        if self._apart and self._window.frames:
            return False
        self._apart = ()
        self._more = False  # before the look: what is stored from now on may be missed by it
        room = self._room(now)
        results, events, suspects = part(*self._fetch(room))
        full = self._full(
            events, room
        )  # now: with an ack that comes at once, the next frame may be larger
        for entry in results:
            self._send_express(entry)
        self._send_events(events)
        if suspects:
            return self._try_apart(suspects)
        if room == 0 or full or len(results) == RESULTS:  # without room nobody looked
            self._more = True
        # Of a schedule stream a frame or so is fetched at a time.
        return any(row.kind == PROJECTION for row in results) or (
            self._more and self._room(self._backend.now()) > 0
        )

    def _full(self, events: Sequence[BufferEntry], room: int) -> bool:
        """Whether it took a limit to end ``events``; a row that is half a frame by itself shows at the next look."""
        if self._synchronous_acks:
            return bool(events)  # how many of them fitted is not known here
        return (
            len(events) >= self._most_events(room)
            or sum(len(entry.payload) for entry in events) > self._limit // 2
        )

    def _most_events(self, room: int) -> int:
        return min(room, FRAME_EVENTS if self._synchronous_acks else self._window.frame_events)

    def _try_apart(self, suspects: Sequence[BufferEntry]) -> bool:
        """Send suspects when nothing else is on its way and the session has proved to work; return as ``_turn`` does."""
        self._more = True  # first of all: the ack that it waits for wakes it
        if self._window.frames:
            return False
        if not self._proven:
            self._prove()
            return self._synchronous_acks
        self._apart = suspects
        if suspects[0].kind in EXPRESS:
            self._send_express(suspects[0])
            suspects = ()
        self._send_events(suspects)
        return self._synchronous_acks

    def _prove(self) -> None:
        """Have an empty batch acknowledged."""
        if self._synchronous_acks:
            self._uploading = ()
            self._link.send("event_batch", frame_id("ev"), event_batch(()))
            self._proven = True
        else:
            self._send_batch(())

    def _send_events(self, events: Sequence[BufferEntry]) -> None:
        if events and self._synchronous_acks:
            self._deliver(events)
        elif events or self._owed:
            self._send_batch(events)

    def _room(self, now: float) -> int:
        with self._books:
            return self._window.available(now)

    def _fetch(self, room: int) -> tuple[list[BufferEntry], list[BufferEntry]]:
        next_results = (self._after_result, RESULTS, EXPRESS)
        next_events = (self._after_event, self._most_events(room), (EVENT,))
        results, events = self._buffer.read_next(next_results, next_events, self._limit)
        if self._buffer.generation != self._generation:  # another file, other ids
            self._rewind()
            self._overtook.clear()
            self._doubted.clear()
            return [], []
        return results, events

    def _send_express(self, entry: BufferEntry) -> None:
        self._overtook.add(entry.id)  # first: the ack may come while we send
        if entry.kind == PROJECTION:
            self._told.add(entry.id)
            self._send_events((entry,))
        else:
            self._send_result(entry)
        self._after_result = entry.id

    def _send_result(self, entry: BufferEntry) -> None:
        self._uploading = (entry,)
        self._counters.recut += self._link.send_shrinking(
            "command_result", entry.key, entry.payload, shrink_result
        )
        if self._synchronous_acks:
            self._finish((entry.id,))
        else:
            self._owed.append(entry.id)

    def _deliver(self, events: Sequence[BufferEntry]) -> None:
        """Send as many of ``events`` as fit over a transport that confirms, and be done with those."""
        payloads = [entry.payload for entry in events]
        payload, cut = event_batch(payloads), False
        while True:
            self._uploading = events[: len(payloads)]
            try:
                self._link.send("event_batch", frame_id("ev"), payload)
                break
            except FrameTooLargeError as error:
                room = _room_for(payload, error)
                if len(payloads) > 1:
                    self._limit = max(SMALLEST, min(self._limit, room))
                    payloads = payloads[: _fitting(payloads, room)]
                else:
                    payloads, cut = [_recut(payloads[0], room, error)], True
                payload = event_batch(payloads)
        self._counters.recut += cut
        # It may have been an unusual batch: the next ones are a little longer each, and trying costs no request.
        self._limit = min(self._most, self._limit + self._limit // 16)
        self._finish([entry.id for entry in events[: len(payloads)]])
        self._note(events[: len(payloads)])

    def _send_batch(self, events: Sequence[BufferEntry]) -> None:
        frame = frame_id("ev")
        payload = event_batch([entry.payload for entry in events])
        if (
            len(payload) > self._limit
            and len(payload) + ENVELOPE_BYTES > self._link.hello_ack.max_frame_bytes
        ):
            payload = event_batch([self._cut(entry.payload) for entry in events])
        self._link.send("event_batch", frame, payload)
        ids = [*self._owed, *(entry.id for entry in events)]
        self._owed = []
        with self._books:
            self._finish(self._window.sent(frame, ids, len(events), self._backend.now()))
        self._note(events)

    def _note(self, events: Sequence[BufferEntry]) -> None:
        self._counters.frames += 1
        if events and events[-1].kind == EVENT:
            self._counters.sent += len(events)
            self._after_event = events[-1].id
        self._counters.last_flush_at = self._backend.wall()

    def _cut(self, payload: bytes) -> bytes:
        fields: dict[str, Any] = json.loads(payload)
        return shrink_event(fields, self._link.hello_ack.max_frame_bytes - ENVELOPE_BYTES - 16)


def _room_for(payload: bytes, error: FrameTooLargeError) -> int:
    """Return how long a payload may be that grows on the wire as this one did: JSON in JSON costs a backslash a quote."""
    growth = max(1.0, (error.size - ENVELOPE_BYTES) / len(payload))
    return max(1, int((error.limit - ENVELOPE_BYTES) / growth) - len(event_batch([])))


def _recut(payload: bytes, room: int, error: FrameTooLargeError) -> bytes:
    """Return the event in ``room`` bytes or little more; raise ``error`` when there is nothing left to cut."""
    fields: dict[str, Any] = json.loads(payload)
    cut = shrink_event(fields, room)
    if len(cut) >= len(payload):
        raise error
    return cut


def _fitting(payloads: Sequence[bytes], room: int) -> int:
    """Return how many of the first payloads have room: one at least, and never all of them."""
    number = 0
    for payload in payloads[:-1]:
        room -= len(payload) + 1
        if room < 0:
            break
        number += 1
    return max(1, number)
