"""Sends rows from the store to the brain: results and schedule frames first, then events."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from z4j_bare.buffer.rows import EVENT, PROJECTION, RESULT
from z4j_bare.errors import AgentError, FrameTooLargeError, ScheduleStreamError
from z4j_bare.pipeline.poison import SUSPECT_AFTER, PoisonIsolation, next_trial
from z4j_bare.wire.frames import event_batch, frame_id, shrink_event, shrink_result
from z4j_bare.wire.session import ENVELOPE_BYTES
from z4j_bare.wire.window import ACK_DEADLINE, FRAME_EVENTS_MAX, Window

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.buffer.rows import BufferEntry
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.monitoring.metrics import Counters
    from z4j_bare.pipeline.session import Connection

logger = logging.getLogger("z4j.runtime.pipeline.send")

#: Maximum bytes of a frame. Signing and masking a larger frame would block the hub for too long.
FRAME_BYTES = 128 * 1024

#: Minimum of the limit for the events of one frame, in bytes.
MIN_PAYLOAD_BYTES = 512

#: Maximum seconds between two reads of the store while a frame is in flight, while rows are in
#: memory only, or while acknowledged rows wait for their deletion.
#: A wake-up causes an earlier read.
POLL_BUSY = 2.0

#: Maximum seconds between two reads of the store in all other cases.
POLL_IDLE = 30.0

#: Seconds between two checks for the last acks at shutdown.
DRAIN_POLL = 0.02

#: Maximum number of rows of ``PRIORITY_KINDS`` that are sent before the next events.
MAX_PRIORITY_ROWS = 50

#: Kinds of rows that are sent before events. The rows of both kinds are sent in the order in which
#: they were stored, so that a command's result follows the schedule frames that the command caused.
PRIORITY_KINDS = (PROJECTION, RESULT)

#: Maximum number of times that a schedule row is sent while the brain skips its frame.
#: The brain skips a row that is out of sequence, so after this many times an earlier row counts as
#: lost. Fewer times do not suffice, because other agents with the same token can cause skips.
MAX_SKIPS = 6


class Pacing:
    """Decides how many events the next frame contains, and when the sender runs again.

    Each session has its own object. In threads mode an ack can arrive while the sender runs, so
    callers hold the sender's window lock while they use ``window``.
    """

    def __init__(
        self, max_payload: int, backend: BaseConcurrency, *, synchronous_acks: bool
    ) -> None:
        self.synchronous_acks = synchronous_acks
        self.window = Window()
        #: Maximum bytes of the events in the next frame.
        self.payload_limit = max_payload
        #: Whether the store may hold rows that the sender has not read yet.
        self.maybe_pending = False
        self._max_payload = max_payload
        self._backend = backend

    def room(self) -> int:
        """Return how many events may be sent now."""
        return self.window.available(self._backend.now())

    def max_events(self, room: int) -> int:
        """Return the maximum number of events in the next frame, which is at most ``room``."""
        return min(room, FRAME_EVENTS_MAX if self.synchronous_acks else self.window.frame_events)

    def is_full(self, events: Sequence[BufferEntry], room: int) -> bool:
        """Return whether the read of ``events`` stopped at a limit, so the store may hold more.

        The result may be ``False`` if the next row is larger than half a frame. A later read
        returns that row.
        """
        if self.synchronous_acks:
            return bool(events)  # how many events fit is known only after the upload
        return (
            len(events) >= self.max_events(room)
            or sum(len(entry.payload) for entry in events) > self.payload_limit // 2
        )

    def on_frame_too_large(self, fits: int) -> None:
        """Reduce the payload's limit to ``fits`` bytes, a size that the brain accepts."""
        self.payload_limit = max(MIN_PAYLOAD_BYTES, min(self.payload_limit, fits))

    def on_upload(self) -> None:
        """Raise the limit by 1/16, because an exceptional batch may have reduced the limit."""
        self.payload_limit = min(self._max_payload, self.payload_limit + self.payload_limit // 16)

    def pause(self) -> float:
        """Return the remaining seconds of the pause after an ack."""
        return self.window.pause_remaining(self._backend.now())

    def idle_timeout(self, *, is_idle: bool) -> float:
        """Return the seconds after which the sender runs again without a wake-up.

        :param is_idle: whether no ack is expected and the store has no pending work, such as
            deletions.
        """
        pause = self.pause()
        if self.maybe_pending and (pause or not self.window.frames):
            return pause  # only the pause delays the events; 0 if the pause is over
        check = self.window.next_check(self._backend.now())
        return min(check, POLL_IDLE if is_idle else POLL_BUSY)


class ProjectionResend:
    """Tracks the schedule rows in flight, and counts how often each row was sent.

    The brain does not acknowledge a schedule frame that is out of sequence. If a row was sent
    several times without an ack, an earlier row was lost, and only a new session with a new epoch
    can continue the stream.
    """

    def __init__(self) -> None:
        #: How often each unacknowledged row was sent.
        self._sent: Counter[int] = Counter()
        self._in_flight: set[int] = set()

    def on_sent(self, row_id: int) -> None:
        """Record a row as in flight."""
        self._in_flight.add(row_id)
        self._sent[row_id] += 1

    def on_acked(self, row_ids: set[int]) -> None:
        """Remove acknowledged rows."""
        self._in_flight.difference_update(row_ids)
        for row_id in row_ids:
            self._sent.pop(row_id, None)

    def on_skipped(self) -> None:
        """Record that the brain skipped the rows in flight. These rows will be sent again.

        Raises ``ScheduleStreamError`` if one of these rows was sent ``MAX_SKIPS`` times.
        """
        self._resend(MAX_SKIPS)

    def on_ack_timeout(self) -> None:
        """Record that the rows in flight got no ack in time and will be sent again.

        Raises ``ScheduleStreamError`` if one of these rows was sent twice.
        """
        self._resend(2)

    def _resend(self, limit: int) -> None:
        if any(self._sent[row_id] >= limit for row_id in self._in_flight):
            raise ScheduleStreamError(
                "the brain does not acknowledge schedules: a new session sends all schedules again"
            )
        self._in_flight = set()


class Sender:
    """Sends rows to the brain, and deletes acknowledged rows from the store.

    One sender serves all sessions, one after another.

    A row without an ack is sent again: in the same session if the brain has skipped its frame,
    otherwise in the next session. The row keeps its id and timestamp.

    The brain does not acknowledge a result. The brain processes the frames of a connection in
    order, so the ack of the next ``event_batch`` proves that the result has arrived. If there are
    no events, the sender sends an empty batch.

    Each row of a schedule stream is sent in a frame of its own. See :class:`ProjectionResend`.

    Suspected rows are sent in isolation, after the brain has acknowledged a frame in this session.
    See :mod:`z4j_bare.pipeline.poison`.
    """

    def __init__(self, buffer: BufferManager, backend: BaseConcurrency, counters: Counters) -> None:
        self._buffer = buffer
        self._backend = backend
        self._counters = counters
        # Held by ``run``, because the previous session's ``run`` may still wait for a slow disk.
        self._run_lock = backend.lock()
        # Guards the window, because in threads mode an ack and the sender may change it at once.
        self._window_lock = backend.lock()
        self._connection: Connection | None = None
        self._pacing = Pacing(FRAME_BYTES, backend, synchronous_acks=False)
        self._isolation = PoisonIsolation()
        self._projections = ProjectionResend()
        # Ids of rows of ``PRIORITY_KINDS`` that were sent and are not acknowledged yet.
        self._priority_in_flight: set[int] = set()
        # Ids of results after which no ``event_batch`` has been sent yet.
        self._unconfirmed_results: list[int] = []
        self._generation = 0
        self._after_event = 0
        self._after_priority = 0

    def run(self, connection: Connection) -> None:
        """Send until the session ends.

        Raises ``NetworkError`` if the connection fails. Over a transport with synchronous acks,
        raises ``RemoteError`` if the brain rejects a frame.
        """
        with self._run_lock:
            self._attach(connection)
            try:
                while not connection.closing.is_set():
                    connection.wake.clear()
                    if not self._step(connection):
                        self._backend.wait(connection.wake, self._idle_timeout())
            except AgentError as error:
                self._isolation.upload_error = error
                raise

    def notify(self) -> None:
        """Wake the sender, because rows may have been stored. Any task may call this method."""
        connection = self._connection
        if connection is not None:
            connection.wake.set()

    def on_stored(self, events: int) -> None:
        """Record that the flush loop has stored events.

        Wake the sender if no frame is in flight. Otherwise the next ack wakes the sender.
        """
        # Set ``maybe_pending`` first, because an ack that arrives now reads it.
        self._pacing.maybe_pending = self._pacing.maybe_pending or events > 0
        if not self._pacing.window.in_flight:
            self.notify()

    def on_ack(self, frame: str) -> None:
        """Process the ack of the frame whose id is ``frame``. The receive loop calls this."""
        connection, pacing = self._connection, self._pacing
        if connection is None:
            return
        with self._window_lock:
            now = self._backend.now()
            self._on_delivered(pacing.window.acked(frame, now))
            self._isolation.session_works = True
            pause = pacing.window.pause_remaining(now)
            skipped = bool(pacing.window.skipped)
        if not pacing.maybe_pending and not skipped:
            return
        # Wake the sender at the end of the pause.
        # Without a hub there is no timer, so wake the sender now.
        if self._backend.timer(pause, connection.wake.set, once=True) is None:
            connection.wake.set()

    def is_idle(self) -> bool:
        """Return whether every row was sent and acknowledged, or there is no session."""
        connection = self._connection
        if connection is None or connection.closing.is_set():
            return True
        return self._is_idle()

    def drain(self, deadline: float, may_send: Callable[[], bool]) -> None:
        """Send without pacing until the store is empty.

        Returns earlier at ``deadline``, or when ``may_send()`` is false.

        :param deadline: in seconds of the backend's monotonic clock.
        :param may_send: returns whether a session exists or can start without a delay.
        """
        while may_send() and self._backend.now() < deadline:
            self.disable_pacing()
            if self.is_idle() and not self._buffer.stats().rows:
                return
            self._backend.sleep(DRAIN_POLL)

    def disable_pacing(self) -> None:
        """Send events without pauses, up to the window's limit, until the session ends."""
        self._pacing.window.disable_pacing()
        self.notify()

    def on_session_error(self, connection: Connection, error: AgentError) -> AgentError:
        """Mark the rows that may have ended the session, and return the error to report.

        Called after the session's loops have ended.
        """
        if connection is not self._connection:
            return error  # the sender still runs for an earlier session
        if not self._pacing.synchronous_acks:
            with self._window_lock:
                ids = [*self._unconfirmed_results, *self._pacing.window.ids]
        elif error is self._isolation.upload_error:
            ids = [entry.id for entry in self._isolation.uploading]
        else:
            ids = []
        return self._isolation.on_session_error(error, ids, self._buffer, self._generation)

    def _attach(self, connection: Connection) -> None:
        """Start a session, in which all rows without an ack are sent again."""
        limit = min(FRAME_BYTES, connection.hello_ack.max_frame_bytes) - ENVELOPE_BYTES
        pacing = Pacing(
            limit, self._backend, synchronous_acks=connection.transport.synchronous_acks
        )
        with self._window_lock:
            self._pacing = pacing
            self._isolation = PoisonIsolation()
            self._projections = ProjectionResend()
            self._priority_in_flight = set()
        self._reset_cursors()
        self._connection = connection

    def _reset_cursors(self) -> None:
        with self._window_lock:
            self._pacing.window.reset()
        self._rewind()

    def _rewind(self) -> None:
        """Read the store from its first row again. No rows are in flight."""
        self._isolation.isolated = ()
        self._generation = self._buffer.generation
        self._after_event = 0
        self._after_priority = 0
        self._unconfirmed_results = []

    def _is_idle(self) -> bool:
        pacing = self._pacing
        return not (pacing.maybe_pending or pacing.window.frames or self._unconfirmed_results)

    def _idle_timeout(self) -> float:
        is_idle = self._is_idle() and self._buffer.is_idle
        with self._window_lock:
            return self._pacing.idle_timeout(is_idle=is_idle)

    def _room(self) -> int:
        with self._window_lock:
            return self._pacing.room()

    def _step(self, connection: Connection) -> bool:
        """Read rows and send them; return whether there may be more to send at once."""
        pacing = self._pacing
        if not self._check_acks(connection):
            return False
        if self._isolation.isolated and pacing.window.frames:
            return False
        self._isolation.isolated = ()
        # Reset before the read, because rows that are stored during the read may be missing in its
        # result.
        pacing.maybe_pending = False
        room = self._room()
        results, events = self._read(room)
        suspected: Sequence[BufferEntry] = ()
        if any(entry.attempts >= SUSPECT_AFTER for entry in (*results, *events)):
            results, events, suspected = next_trial(results, events)
        # Computed before the rows are sent, because a synchronous ack raises the limits.
        full = pacing.is_full(events, room)
        for entry in results:
            self._send_priority(connection, entry)
        self._send_events(connection, events)
        if suspected:
            return self._send_isolated(connection, suspected)
        if room == 0 or full or len(results) == MAX_PRIORITY_ROWS:  # room 0: no event was read
            pacing.maybe_pending = True
        # Rows of schedules are large, so one read often returns a single row.
        # The store may hold further schedule rows.
        return any(row.kind == PROJECTION for row in results) or (
            pacing.maybe_pending and self._room() > 0
        )

    def _check_acks(self, connection: Connection) -> bool:
        """Act on frames without an ack; return whether further rows may be sent.

        After the brain has skipped frames, no further rows are sent while rows are in flight.
        """
        with self._window_lock:
            window, now = self._pacing.window, self._backend.now()
            timed_out = window.ack_timed_out(now)
            probe = window.probe_due(now)
            resend, in_flight = window.resend_due(now), window.has_rows_in_flight()
        if timed_out:
            self._on_ack_timeout()
        elif resend and not in_flight:
            self._on_skipped()
        elif probe:
            self._send_batch(connection, ())
        return timed_out or not (resend and in_flight)

    def _on_skipped(self) -> None:
        self._projections.on_skipped()
        logger.debug(
            "z4j: the brain skipped frames without an ack: sending their %d events again",
            self._pacing.window.skipped.events,
        )
        with self._window_lock:
            self._pacing.window.skipped.clear()
        self._rewind()

    def _on_ack_timeout(self) -> None:
        self._projections.on_ack_timeout()
        logger.warning(
            "z4j: frames got no ack from the brain within %.0f s: sending their %d events again",
            ACK_DEADLINE,
            self._pacing.window.events,
        )
        self._reset_cursors()

    def _read(self, room: int) -> tuple[list[BufferEntry], list[BufferEntry]]:
        priority = (self._after_priority, MAX_PRIORITY_ROWS, PRIORITY_KINDS)
        events = (self._after_event, self._pacing.max_events(room), (EVENT,))
        found = self._buffer.read_next(priority, events, self._pacing.payload_limit)
        if self._buffer.generation != self._generation:  # the rows of a new store have new ids
            self._reset_cursors()
            self._priority_in_flight.clear()
            self._projections = ProjectionResend()
            return [], []
        return found

    def _send_isolated(self, connection: Connection, suspected: Sequence[BufferEntry]) -> bool:
        """Send suspected rows if no other row is in flight and the session works.

        Returns whether there may be more to send at once.
        """
        self._pacing.maybe_pending = True  # set before the send, so that an ack wakes the sender
        if self._pacing.window.frames:
            return False
        if not self._isolation.session_works:
            self._probe_session(connection)
            return self._pacing.synchronous_acks
        self._isolation.isolated = suspected
        if suspected[0].kind in PRIORITY_KINDS:
            self._send_priority(connection, suspected[0])
            suspected = ()
        self._send_events(connection, suspected)
        return self._pacing.synchronous_acks

    def _probe_session(self, connection: Connection) -> None:
        """Send an empty batch, whose ack shows that the session works."""
        if self._pacing.synchronous_acks:
            self._isolation.uploading = ()
            connection.send("event_batch", frame_id("ev"), event_batch(()))
            self._isolation.session_works = True
        else:
            self._send_batch(connection, ())

    def _send_priority(self, connection: Connection, entry: BufferEntry) -> None:
        # The id is added first, because the ack may arrive before the send returns.
        self._priority_in_flight.add(entry.id)
        if entry.kind == PROJECTION:
            self._projections.on_sent(entry.id)
            self._send_events(connection, (entry,))
        else:
            self._send_result(connection, entry)
        self._after_priority = entry.id

    def _send_result(self, connection: Connection, entry: BufferEntry) -> None:
        self._isolation.uploading = (entry,)
        self._counters.recut += connection.send_shrinking(
            "command_result", entry.key, entry.payload, shrink_result
        )
        if self._pacing.synchronous_acks:
            self._on_delivered((entry.id,))
        else:
            self._unconfirmed_results.append(entry.id)

    def _send_events(self, connection: Connection, events: Sequence[BufferEntry]) -> None:
        if events and self._pacing.synchronous_acks:
            self._upload(connection, events)
        elif events or self._unconfirmed_results:
            self._send_batch(connection, events)

    def _upload(self, connection: Connection, events: Sequence[BufferEntry]) -> None:
        """Send as many ``events`` as fit in one frame, over a transport with synchronous acks."""
        payloads = [entry.payload for entry in events]
        payload, truncated = event_batch(payloads), False
        while True:
            self._isolation.uploading = events[: len(payloads)]
            try:
                connection.send("event_batch", frame_id("ev"), payload)
                break
            except FrameTooLargeError as error:
                fits = _payload_that_fits(payload, error)
                if len(payloads) > 1:
                    self._pacing.on_frame_too_large(fits)
                    payloads = payloads[: _count_fitting(payloads, fits)]
                else:
                    payloads, truncated = [_truncate(payloads[0], fits, error)], True
                payload = event_batch(payloads)
        self._counters.recut += truncated
        self._pacing.on_upload()
        self._on_delivered([entry.id for entry in events[: len(payloads)]])
        self._count_sent(events[: len(payloads)])

    def _send_batch(self, connection: Connection, events: Sequence[BufferEntry]) -> None:
        frame, max_bytes = frame_id("ev"), connection.hello_ack.max_frame_bytes
        payload = event_batch([entry.payload for entry in events])
        if len(payload) > self._pacing.payload_limit and len(payload) + ENVELOPE_BYTES > max_bytes:
            limit = max_bytes - ENVELOPE_BYTES - 16
            payload = event_batch(
                [shrink_event(json.loads(each.payload), limit) for each in events]
            )
        connection.send("event_batch", frame, payload)
        ids = [*self._unconfirmed_results, *(entry.id for entry in events)]
        self._unconfirmed_results = []
        with self._window_lock:
            window, now = self._pacing.window, self._backend.now()
            self._on_delivered(window.sent(frame, ids, len(events), now))
        self._count_sent(events)

    def _on_delivered(self, ids: Sequence[int]) -> None:
        """Delete from the buffer the rows that the brain has received."""
        priority = self._priority_in_flight.intersection(ids)
        self._priority_in_flight.difference_update(priority)
        self._projections.on_acked(priority)
        self._buffer.ack(ids, len(ids) - len(priority), self._generation)

    def _count_sent(self, events: Sequence[BufferEntry]) -> None:
        self._counters.frames += 1
        if events and events[-1].kind == EVENT:
            self._counters.sent += len(events)
            self._after_event = events[-1].id
        self._counters.last_flush_at = self._backend.wall()


def _payload_that_fits(payload: bytes, error: FrameTooLargeError) -> int:
    """Return the maximum size of a payload that grows in the envelope at the rate of ``payload``.

    A payload grows because JSON in a JSON string needs a backslash before each quote.
    """
    growth = max(1.0, (error.size - ENVELOPE_BYTES) / len(payload))
    return max(1, int((error.limit - ENVELOPE_BYTES) / growth) - len(event_batch([])))


def _truncate(payload: bytes, limit: int, error: FrameTooLargeError) -> bytes:
    """Return the event, truncated to about ``limit`` bytes.

    Raises ``error`` if the event cannot be made smaller.
    """
    truncated = shrink_event(json.loads(payload), limit)
    if len(truncated) >= len(payload):
        raise error
    return truncated


def _count_fitting(payloads: Sequence[bytes], limit: int) -> int:
    """Return how many of the first payloads fit into ``limit`` bytes together.

    The result is at least one. It is smaller than the number of payloads if there are several.
    """
    count = 0
    for payload in payloads[:-1]:
        limit -= len(payload) + 1
        if limit < 0:
            break
        count += 1
    return max(1, count)
