"""Log lines of failures and reconnects, and rejected signatures that a clock has caused."""

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.support.session import HELLO_ACK, SECRET, FakeTransport
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.errors import AuthenticationRejectedError, NetworkError, RemoteProtocolError
from z4j_bare.monitoring.metrics import Counters
from z4j_bare.pipeline.clock import ClockCheck
from z4j_bare.pipeline.reconnect_log import ReconnectLog
from z4j_bare.pipeline.session import Connection, Supervisor
from z4j_bare.wire.backoff import ReconnectBackoff
from z4j_bare.wire.close_codes import error_for_close_code, error_for_http_status
from z4j_bare.wire.session import Session

LOGGER = "z4j.runtime.pipeline.session"


class SteppedClock(FakeConcurrency):
    """Virtual time whose wall clock can be set."""

    def __init__(self):
        super().__init__()
        self.set_by = 0.0

    def wall(self):
        return super().wall() + self.set_by


class BrainHarness:
    """A supervisor and a brain that rejects a signature if the clocks differ by over 60 s.

    The brain acknowledges a frame of each session after a second.
    """

    def __init__(self, *, answers=True):
        self.backend = SteppedClock()
        self.counters = Counters()
        self.asked = 0
        self.answers = answers
        self.brain_set_by = 0.0
        self.down = False
        self.stop_event = self.backend.event()
        self.supervisor = Supervisor(
            self._dial, lambda: b"hello", lambda: SECRET, self._serve, self.backend, self.counters
        )
        self.supervisor.backoff = ReconnectBackoff(random=lambda: 0.0)
        self.supervisor.clock.ask = self._ask
        self.backend.spawn(self.supervisor.run, self.stop_event, name="z4j-supervisor")

    @property
    def ahead(self):
        """The seconds by which the brain's clock is ahead of the host's."""
        return self.brain_set_by - self.backend.set_by

    def _ask(self):
        self.asked += 1
        return self.ahead if self.answers else None

    def _dial(self):
        if self.down:
            raise NetworkError("nobody there")
        transport = FakeTransport(self.backend)
        stamp = datetime.fromtimestamp(self.backend.wall() + self.ahead, UTC).isoformat()
        payload = {
            "protocol_version": "2",
            "brain_version": "1",
            "agent_id": "a",
            "project_id": "p",
            "session_id": "s",
        }
        frame = {"v": 2, "type": "hello_ack", "id": "h", "ts": stamp, "payload": payload}
        transport.hello_answer = json.dumps(frame).encode()
        return transport

    def _serve(self, connection):
        while not self.backend.wait(connection.closing, 1):
            if self.down:
                raise error_for_close_code(1001)
            if abs(self.ahead) > 60:
                raise error_for_close_code(4403)
            connection.accept()


@pytest.fixture
def lines(caplog):
    """``lines(level)``: the messages about sessions of at least that level."""
    caplog.set_level(logging.DEBUG, LOGGER)

    def read(level=logging.INFO):
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == LOGGER and record.levelno >= level
        ]

    return read


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (7200, "this host's clock is 7200 s ahead of the brain's"),
        (-7200, "this host's clock is 7200 s behind the brain's"),
        (61, "this host's clock is 61 s ahead of the brain's"),
    ],
)
def test_step_of_clock_during_session_is_named_in_seconds(lines, seconds, text):
    """The first warning has the difference, and the brain need not be asked for it."""
    harness = BrainHarness()
    harness.backend.advance(100)
    harness.backend.set_by = seconds
    harness.backend.advance(600)
    (warning,) = lines(logging.WARNING)
    assert text in warning
    assert "Z4J_HMAC_SECRET" not in "".join(lines())
    assert "connected again" not in "".join(lines())
    assert harness.asked == 0


def test_step_within_tolerance_ends_no_session(lines):
    """A step of 50 s is accepted by the brain."""
    harness = BrainHarness()
    harness.backend.advance(100)
    harness.backend.set_by = 50
    harness.backend.advance(600)
    assert harness.counters.sessions == 1
    assert lines(logging.WARNING) == []


def test_step_of_brains_clock_is_named_in_seconds(lines):
    """The host's clock has not moved, so the brain is asked for its time."""
    harness = BrainHarness()
    harness.backend.advance(100)
    harness.brain_set_by = 7200
    harness.backend.advance(60)
    assert "this host's clock is 7200 s behind the brain's" in lines(logging.WARNING)[0]
    assert harness.asked == 1


def test_step_while_disconnected_is_logged_when_rejected(lines):
    """The cause changes from an unreachable brain to the clock, which is a new warning."""
    harness = BrainHarness()
    harness.backend.advance(100)
    harness.down = True
    harness.backend.advance(40)
    harness.backend.set_by = 7200
    harness.down = False
    harness.backend.advance(60)
    first, *_, last = lines(logging.WARNING)
    assert "shutting down" in first
    assert "this host's clock is 7200 s ahead of the brain's" in last
    assert "connected again" not in "".join(lines())


def test_wrong_key_is_named_if_clocks_agree(lines):
    """A rejected signature with equal clocks names the key; the brain was asked for its time."""
    harness = BrainHarness()
    harness.supervisor._serve = rejected_at_once(harness.backend)
    harness.backend.advance(5)
    (warning,) = lines(logging.WARNING)
    assert "Z4J_HMAC_SECRET" in warning
    assert "the clocks differ by only 0 s" in warning
    assert harness.asked == 1


def test_brain_without_answer_leaves_known_difference(lines):
    """If the brain does not answer, the difference since ``hello_ack`` is used."""
    harness = BrainHarness(answers=False)
    harness.supervisor._serve = rejected_at_once(harness.backend)
    harness.backend.advance(5)
    assert "the clocks differ by only 0 s" in lines(logging.WARNING)[0]


def rejected_at_once(backend):
    def serve(connection):
        backend.wait(connection.closing, 1)
        raise error_for_close_code(4403)

    return serve


def test_corrected_clock_ends_wait_for_next_attempt(lines):
    """The agent reconnects within 10 s, although the delay has grown to 10 minutes."""
    harness = BrainHarness()
    harness.backend.advance(100)
    harness.backend.set_by = 7200
    harness.backend.advance(3600)
    sessions = harness.counters.sessions
    harness.backend.set_by = 0
    harness.backend.advance(12)
    assert harness.counters.sessions == sessions + 1
    assert "connected again" in lines()[-1]


def test_second_step_of_clock_is_warned_at_once(lines):
    """A clock that is set to another wrong time causes a new warning, with the new difference."""
    harness = BrainHarness()
    harness.backend.advance(100)
    for seconds in (7200, 3600, -5400):
        harness.backend.set_by = seconds
        harness.backend.advance(12)
    texts = ["7200 s ahead of", "3600 s ahead of", "5400 s behind"]
    warnings = lines(logging.WARNING)
    assert [text in line for text, line in zip(texts, warnings, strict=True)] == [True] * 3
    harness.backend.set_by = 0
    harness.backend.advance(12)
    assert sum("connected again" in line for line in lines()) == 1


def connection_with(backend, server_time=None):
    ack = replace(HELLO_ACK, server_time=server_time)
    return Connection(FakeTransport(backend), Session(ack, SECRET), backend)


@pytest.mark.parametrize(
    "error",
    [
        RemoteProtocolError("the brain's frame failed verification", code=4403),
        AuthenticationRejectedError("the first upload", code=409),
        error_for_http_status(409, "fresh session nonce"),
    ],
)
def test_each_kind_of_rejected_signature_names_step(error):
    """Frames of the brain and requests of long-poll are explained by the clock as well."""
    backend = SteppedClock()
    connection = connection_with(backend, server_time=backend.wall())
    backend.advance(50)
    backend.set_by = 7200
    explained = ClockCheck(backend).explain(error, connection)
    assert "this host's clock is 7200 s ahead of the brain's" in str(explained)


def test_unknown_session_of_longpoll_is_unchanged():
    """Without a step status 409 means that the brain does not know the session."""
    backend = SteppedClock()
    error = error_for_http_status(409, "fresh session nonce")
    connection = connection_with(backend, server_time=backend.wall())
    assert ClockCheck(backend).explain(error, connection) is error


# -- log lines


def test_changed_text_is_logged_at_once(lines):
    """Another text of the same class is logged with the next failure, apart from numbers."""
    log = ReconnectLog(FakeConcurrency())
    for text in ("no route 1", "no route 2", "refused"):
        log.on_failure("connection", NetworkError(text), 1)
    assert [("refused" in line, "no route 1" in line) for line in lines()] == [
        (False, True),
        (True, False),
    ]


def test_changed_text_is_warning_once_a_minute(lines):
    """A change of the text a minute after the last warning is a warning."""
    backend = FakeConcurrency()
    log = ReconnectLog(backend)
    log.on_failure("connection", NetworkError("no route"), 1)
    backend.advance(61)
    log.on_failure("connection", NetworkError("refused"), 1)
    assert len(lines(logging.WARNING)) == 2


def test_alternating_causes_are_logged_once_a_minute(lines):
    """Two causes that alternate for ten minutes log each cause once a minute at most."""
    backend = FakeConcurrency()
    log = ReconnectLog(backend)
    for attempt in range(600):
        log.on_failure("connection", NetworkError("refused" if attempt % 2 else "reset"), 1)
        backend.advance(1)
    assert len(lines()) <= 2 * 10 + 60
    assert len(lines(logging.WARNING)) <= 11


def test_session_without_ack_is_established_after_30_seconds(lines):
    """An idle session sends no events, so that no ack arrives."""
    backend = FakeConcurrency()
    log = ReconnectLog(backend)
    log.on_failure("connection", NetworkError("refused"), 1)
    backend.spawn(log.watch, connection_with(backend), name="watch")
    backend.advance(29)
    assert "connected again" not in lines()[-1]
    backend.advance(2)
    assert lines()[-1] == "z4j: connected again after 1 failed attempts"
    assert log.failures == 0


def test_session_is_established_with_first_ack(lines):
    """The line is logged at the first ack; the failures count until the session has lasted."""
    backend = FakeConcurrency()
    log, connection = ReconnectLog(backend), connection_with(backend)
    log.on_failure("connection", NetworkError("refused"), 1)
    backend.spawn(log.watch, connection, name="watch")
    log.on_accepted()
    backend.advance(1)
    assert lines()[-1] == "z4j: connected again after 1 failed attempts"
    connection.close()
    backend.advance(60)
    assert log.failures == 1


def test_sessions_that_end_after_ack_are_announced_once(lines):
    """A brain that ends each session after its first ack causes no line per session."""
    backend = FakeConcurrency()
    log = ReconnectLog(backend)
    for _ in range(100):
        log.on_failure("connection", NetworkError("closed"), 1)
        connection = connection_with(backend)
        backend.spawn(log.watch, connection, name="watch")
        log.on_accepted()
        backend.advance(1)
        connection.close()
        backend.advance(1)
    assert sum("connected again" in line for line in lines()) == 1
    assert len(lines(logging.WARNING)) == 2
    backend.spawn(log.watch, connection_with(backend), name="watch")
    backend.advance(31)
    assert lines()[-1] == "z4j: connected again after 100 failed attempts"
