"""The parts of the sender: pacing, resend of schedule rows, isolation; and its runs."""

import pytest

from tests.support.session import SessionHarness
from z4j_bare.buffer.rows import EVENT, BufferEntry
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.errors import NetworkError, PoisonRowError, ScheduleStreamError
from z4j_bare.pipeline.poison import PoisonIsolation
from z4j_bare.pipeline.send import (
    MAX_SKIPS,
    MIN_PAYLOAD_BYTES,
    POLL_BUSY,
    POLL_IDLE,
    Pacing,
    ProjectionResend,
)
from z4j_bare.wire.window import ACK_PAUSE, FRAME_EVENTS_INITIAL, FRAME_EVENTS_MAX

POISON_CLOSE = NetworkError("the brain failed on a frame", code=1011)


def entries(count, size=10):
    return [BufferEntry(number, EVENT, "", b"x" * size, 0.0, 0) for number in range(count)]


class FakeBuffer:
    """Records what the isolation does with rows."""

    def __init__(self):
        self.calls = []

    def discard(self, ids, reason, generation):
        self.calls.append(("discard", list(ids), reason, generation))

    def increment_attempts(self, ids, generation):
        self.calls.append(("suspect", list(ids), generation))


@pytest.fixture
def pacing():
    return Pacing(10_000, FakeConcurrency(), synchronous_acks=False)


def test_pacing_limits_first_frame(pacing):
    """The first frame is small; a transport with synchronous acks sends the largest one at once."""
    assert pacing.max_events(pacing.room()) == FRAME_EVENTS_INITIAL
    synchronous = Pacing(10_000, FakeConcurrency(), synchronous_acks=True)
    assert synchronous.max_events(synchronous.room()) == FRAME_EVENTS_MAX


def test_pacing_detects_full_frames(pacing):
    """A frame is full at its number of events or at half of its bytes."""
    assert not pacing.is_full(entries(FRAME_EVENTS_INITIAL - 1), 1000)
    assert pacing.is_full(entries(FRAME_EVENTS_INITIAL), 1000)
    assert pacing.is_full(entries(2, size=3000), 1000)


def test_pacing_reduces_and_raises_payload_limit(pacing):
    """A frame that is too large reduces the limit, never below the minimum; uploads raise it."""
    pacing.on_frame_too_large(1)
    assert pacing.payload_limit == MIN_PAYLOAD_BYTES
    for _ in range(100):
        pacing.on_upload()
    assert pacing.payload_limit == 10_000


def test_pacing_idle_timeout(pacing):
    """The sender polls rarely when idle, often when busy, and at the end of an ack's pause."""
    assert pacing.idle_timeout(is_idle=True) == POLL_IDLE
    assert pacing.idle_timeout(is_idle=False) == POLL_BUSY
    now = pacing._backend.now()
    pacing.window.sent("f-1", [1], 1, now)
    pacing.window.acked("f-1", now)
    pacing.maybe_pending = True
    assert pacing.idle_timeout(is_idle=False) == pytest.approx(ACK_PAUSE)


def test_schedule_rows_time_out_twice():
    """The second ack timeout of a row ends the session; other rows get a second attempt."""
    resend = ProjectionResend()
    resend.on_sent(1)
    resend.on_ack_timeout()
    resend.on_sent(2)
    resend.on_ack_timeout()
    resend.on_sent(2)
    with pytest.raises(ScheduleStreamError):
        resend.on_ack_timeout()


def test_schedule_rows_may_be_skipped_more_often_than_time_out():
    """A skip has a likelier cause than a lost row, so a row is sent six times before the end."""
    resend = ProjectionResend()
    for _ in range(MAX_SKIPS - 1):
        resend.on_sent(1)
        resend.on_skipped()
    resend.on_sent(1)
    with pytest.raises(ScheduleStreamError):
        resend.on_skipped()


def test_acked_schedule_rows_do_not_time_out():
    """An acknowledged row no longer counts."""
    resend = ProjectionResend()
    resend.on_sent(1)
    resend.on_ack_timeout()
    resend.on_sent(1)
    resend.on_acked({1})
    resend.on_ack_timeout()


def test_isolation_marks_rows_in_flight():
    """Rows in flight become suspects, and the error stays what it was."""
    buffer, isolation = FakeBuffer(), PoisonIsolation()
    assert isolation.on_session_error(POISON_CLOSE, [1, 2], buffer, 7) is POISON_CLOSE
    assert buffer.calls == [("suspect", [1, 2], 7)]


def test_isolation_drops_only_suspect():
    """A suspect that is alone in flight is dropped and counted."""
    buffer, isolation = FakeBuffer(), PoisonIsolation()
    isolation.isolated = entries(1)
    error = isolation.on_session_error(POISON_CLOSE, [0], buffer, 7)
    assert isinstance(error, PoisonRowError)
    assert buffer.calls == [("discard", [0], "poison", 7)]


def test_isolation_ignores_other_errors():
    """An error that is not about a frame marks no row."""
    buffer, isolation = FakeBuffer(), PoisonIsolation()
    error = NetworkError("reset")
    assert isolation.on_session_error(error, [1], buffer, 7) is error
    assert buffer.calls == []


def test_sender_without_session_is_idle():
    """Before the first session nothing waits, and notifications and acks change nothing."""
    harness = SessionHarness()
    harness.sender.notify()
    harness.sender.on_stored(3)
    harness.sender.on_ack("f-1")
    assert harness.sender.is_idle()


def test_run_waits_for_run_of_ended_session(monkeypatch):
    """A run that hangs in a slow read ends before the next one starts, and sends nothing there."""
    harness = SessionHarness()
    harness.store(10)
    read_next = harness.buffer.read_next

    def slow_read(*queries):
        harness.backend.sleep(20)
        return read_next(*queries)

    monkeypatch.setattr(harness.buffer, "read_next", slow_read)
    harness.start_sender()
    harness.backend.advance(1)
    first = harness.connection
    harness.end_session()
    monkeypatch.undo()
    harness.start_session()
    harness.backend.advance(5)
    assert harness.transport.sent == []
    error = harness.sender.on_session_error(harness.connection, POISON_CLOSE)
    assert error is POISON_CLOSE
    harness.backend.advance(20)
    assert harness.sender._connection is harness.connection is not first
    assert harness.transport.event_numbers() == list(range(10))
