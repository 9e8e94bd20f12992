"""Heartbeats, the reader, the supervisor and the watch over loops, in virtual time."""

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from z4j_core.transport.frames import (
    CommandFrame,
    CommandPayload,
    ErrorFrame,
    ErrorPayload,
    EventBatchAckFrame,
    EventBatchAckPayload,
    HeartbeatFrame,
    HeartbeatPayload,
)
from z4j_core.transport.framing import FrameSigner

from tests.support.session import HELLO_ACK, SECRET, FakeTransport, SessionHarness
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.errors import (
    AuthenticationRejectedError,
    HostConfigurationError,
    IncompatibleError,
    NetworkError,
    RemoteProtocolError,
    SessionLimitError,
)
from z4j_bare.monitoring.metrics import Counters
from z4j_bare.pipeline import heartbeat
from z4j_bare.pipeline.heartbeat import HeartbeatLoop
from z4j_bare.pipeline.receive import ReceiveLoop
from z4j_bare.pipeline.session import BackgroundLoops, Supervisor
from z4j_bare.wire.backoff import ReconnectBackoff
from z4j_bare.wire.close_codes import error_for_close_code, may_be_poison


@pytest.fixture
def harness():
    return SessionHarness()


# -- heartbeat


def test_heartbeat_is_sent_at_once_and_then_at_interval(harness):
    """The first heartbeat is sent at once, the next at the interval, each with a new payload."""
    numbers = iter(range(100))
    loop = HeartbeatLoop(
        harness.connection,
        harness.backend,
        harness.counters,
        lambda: b'{"buffer_size":%d}' % next(numbers),
        interval=10,
    )
    harness.backend.spawn(loop.run, name="beat")
    harness.backend.advance(35)
    assert [when for when, _ in harness.transport.sent] == [0, 10, 20, 30]
    assert [frame["payload"]["buffer_size"] for frame in harness.transport.frames("heartbeat")] == [
        0,
        1,
        2,
        3,
    ]
    assert [frame["seq"] for _, frame in harness.transport.sent] == [1, 2, 3, 4]
    assert harness.counters.heartbeats == 4


def test_disabled_heartbeat_sends_keepalives(harness):
    """An empty batch every 30 s keeps the session, which ends with 4408 after 90 s of silence."""
    loop = HeartbeatLoop(
        harness.connection, harness.backend, harness.counters, bytes, interval=10, enabled=False
    )
    harness.backend.spawn(loop.run, name="beat")
    harness.backend.advance(95)
    assert [when for when, _ in harness.transport.sent] == [
        heartbeat.KEEPALIVE_INTERVAL * turn for turn in range(4)
    ]
    assert {frame["type"] for _, frame in harness.transport.sent} == {"event_batch"}
    assert harness.counters.heartbeats == 0


def test_heartbeat_loop_ends_with_session(harness):
    """The loop ends at once when the session is closed, and with an error when a send fails."""
    loop = HeartbeatLoop(
        harness.connection, harness.backend, harness.counters, lambda: b"{}", interval=10
    )
    ended = harness.run_loop(loop.run)
    harness.backend.advance(5)
    harness.connection.close()
    harness.backend.advance(0.001)
    assert ended == [None]
    harness.reconnect()
    harness.transport.send_error = NetworkError("reset")
    ended = harness.run_loop(
        HeartbeatLoop(
            harness.connection, harness.backend, harness.counters, lambda: b"{}", interval=10
        ).run,
    )
    harness.backend.advance(0.001)
    assert isinstance(ended[0], NetworkError)


def test_status_follows_first_heartbeat(harness):
    """An ``agent_status`` follows the first heartbeat, and then one is sent every minute."""
    loop = HeartbeatLoop(
        harness.connection,
        harness.backend,
        harness.counters,
        lambda: b"{}",
        interval=10,
        status=lambda: b'{"buffer_depth":1}',
    )
    harness.backend.spawn(loop.run, name="beat")
    harness.backend.advance(125)
    assert [(when, frame["type"]) for when, frame in harness.transport.sent][:3] == [
        (0, "heartbeat"),
        (0, "agent_status"),
        (10, "heartbeat"),
    ]
    assert [when for when, frame in harness.transport.sent if frame["type"] == "agent_status"] == [
        0,
        60,
        120,
    ]


# -- receive


class ReceiveHarness(SessionHarness):
    """A session harness with a running receive loop."""

    def __init__(self):
        super().__init__()
        self.signer = FrameSigner(
            secret=SECRET, agent_id="agent", project_id="project", session_id="session"
        )
        self.acks, self.commands = [], []
        self.loop = ReceiveLoop(
            self.connection,
            self.acks.append,
            lambda frame, connection, late: self.commands.append((frame, connection, late)),
        )
        self.ended = self.run_loop(self.loop.run)

    def say(self, frame):
        self.transport.inbox.append(self.signer.sign_and_serialize(frame))
        self.backend.advance(0.01)


@pytest.fixture
def receiver():
    return ReceiveHarness()


def test_delay_is_relative_to_fastest_frame():
    """A delay is relative to the fastest frame, whatever the clocks show; drift is ignored."""
    harness = SessionHarness(replace(HELLO_ACK, server_time=5_000.0))
    took = harness.connection.relative_delay
    harness.backend.advance(10)
    assert took(5_010.0) == 0
    assert took(5_003.0) == pytest.approx(7, abs=0.01)
    assert took(5_012.0) == 0
    assert took(5_010.0) == pytest.approx(2, abs=0.01)
    harness.backend.advance(100_000)
    assert took(5_010.0 + 100_000 - 5) == 0, "five seconds in a day may be the clocks' own"
    harness.reconnect()
    assert harness.connection.relative_delay(0.0) == 0, (
        "without the brain's time the first frame counts as in time"
    )


def test_frames_are_routed_to_handlers(receiver):
    """Acks go to the sender, commands to the dispatcher, all other frames are ignored."""
    receiver.say(
        EventBatchAckFrame(
            id="eba_1",
            payload=EventBatchAckPayload(acked_id="ev_1", received=1, accepted=0, rejected=1),
        )
    )
    receiver.say(CommandFrame(id="c-1", payload=CommandPayload(action="retry_task")))
    receiver.say(HeartbeatFrame(id="hb_1", payload=HeartbeatPayload()))
    receiver.say(ErrorFrame(id="err", payload=ErrorPayload(code="x", message="y", fatal=False)))
    assert receiver.acks == ["ev_1"]
    ((frame, connection, late),) = receiver.commands
    assert (frame.id, connection) == ("c-1", receiver.connection)
    assert 0 <= late < 60
    assert receiver.ended == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("protocol_incompatible", IncompatibleError),
        ("agent_incompatible", IncompatibleError),
        ("anything", RemoteProtocolError),
    ],
)
def test_fatal_error_frame_ends_session(receiver, code, kind):
    """A fatal error frame ends the session with an incompatibility or a protocol error."""
    receiver.say(
        ErrorFrame(id="err", payload=ErrorPayload(code=code, message="because", fatal=True))
    )
    assert type(receiver.ended[0]) is kind
    assert "because" in str(receiver.ended[0])


@pytest.mark.parametrize("fatal", [True, False])
def test_rejected_event_ends_session(receiver, fatal):
    """The rejection of a legacy schedule event is about one batch, and not about an upgrade."""
    receiver.say(
        ErrorFrame(
            id="err_ev_1",
            payload=ErrorPayload(code="scheduler_upgrade_required", message="because", fatal=fatal),
        )
    )
    assert type(receiver.ended[0]) is RemoteProtocolError
    assert may_be_poison(receiver.ended[0])


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{}",
        b"\xff",
        b"[]",
        b'{"v":2,"type":"command","id":"x","payload":{"action":"retry_task"}}',
    ],
)
def test_unverified_message_ends_session(receiver, message):
    """A message that fails verification reaches no handler and ends the session."""
    receiver.transport.inbox.append(message)
    receiver.backend.advance(0.01)
    assert isinstance(receiver.ended[0], RemoteProtocolError)
    assert (receiver.acks, receiver.commands) == ([], [])


def test_receive_loop_ends_with_session(receiver):
    """The loop ends when the session is closed, and raises when the connection is lost."""
    receiver.connection.closing.set()
    receiver.backend.advance(2)
    assert receiver.ended == [None]
    other = ReceiveHarness()
    other.transport.inbox.append(NetworkError("reset", code=1006))
    other.backend.advance(0.01)
    assert other.ended[0].code == 1006


# -- supervisor

ACK = json.dumps(
    {
        "v": 2,
        "type": "hello_ack",
        "id": "h",
        "payload": {
            "protocol_version": "2",
            "brain_version": "1",
            "agent_id": "a",
            "project_id": "p",
            "session_id": "s",
        },
    }
).encode()


class SupervisorHarness:
    """A supervisor whose transports answer as scripted: a ``hello_ack`` or an error to raise."""

    def __init__(self, script=(), backend=None, serve_session=None):
        self.backend = backend or FakeConcurrency()
        self.counters = Counters()
        self.script = list(script)
        self.attempts = []
        self.transports = []
        self.stop_event = self.backend.event()
        self.serve_session = serve_session

        def dial():
            transport = FakeTransport(self.backend)
            transport.hello_answer = self.script.pop(0) if self.script else ACK
            self.attempts.append(self.backend.now())
            self.transports.append(transport)
            return transport

        def serve(connection):
            if self.serve_session is not None:
                self.serve_session(connection)
            self.backend.wait(connection.closing)

        self.supervisor = Supervisor(
            dial, lambda: b"hello", lambda: SECRET, serve, self.backend, self.counters
        )
        self.supervisor.backoff = ReconnectBackoff(random=lambda: 0.0)
        self.task = self.backend.spawn(self.supervisor.run, self.stop_event, name="z4j-supervisor")


def failing_session(backend, error, seconds):
    """Return a ``serve`` function that fails after some seconds."""

    def serve(connection):
        backend.wait(connection.closing, seconds)
        raise error

    return serve


def test_lasting_session_is_kept():
    """A lasting session is kept, and its connection is available."""
    harness = SupervisorHarness()
    harness.backend.advance(1000)
    assert harness.attempts == [0]
    assert harness.transports[0].hellos == [b"hello"]
    assert harness.supervisor.connection.hello_ack.session_id == "s"
    assert harness.counters.sessions == 1


@pytest.mark.parametrize(
    ("error", "delays"),
    [
        (NetworkError("x"), [1, 2, 4, 8, 16, 30, 30]),
        (RemoteProtocolError("x"), [1, 2, 4, 8, 16, 32, 60, 60]),
        (AuthenticationRejectedError("x"), [10, 20, 40, 80, 160, 320, 600, 600]),
        (IncompatibleError("x"), [120, 240, 480, 960, 1920, 3600, 3600]),
        (HostConfigurationError("a token file that is gone"), [1, 2, 4, 8, 16, 30, 30]),
    ],
)
def test_delay_grows_with_each_failure(error, delays):
    """Each class of failure has its delays, and every failed transport is closed."""
    harness = SupervisorHarness([error] * len(delays))
    harness.backend.advance(sum(delays) + 1)
    gaps = [later - earlier for earlier, later in pairwise(harness.attempts)]
    assert gaps == pytest.approx(delays)
    assert all(transport.closed for transport in harness.transports[:-1])
    assert harness.supervisor.connection is not None


def test_new_failure_class_is_logged_as_warning(caplog):
    """A failure of another class is a new warning; further failures of a class are not."""
    caplog.set_level(logging.DEBUG, "z4j")
    SupervisorHarness(
        [NetworkError("down")] * 3 + [AuthenticationRejectedError("a bad token")] * 3
    ).backend.advance(200)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [("down" in message, "a bad token" in message) for message in warned] == [
        (True, False),
        (False, True),
    ]


def test_lasting_session_resets_backoff():
    """After a session of 30 s the next failure has the initial delay."""
    harness = SupervisorHarness([NetworkError("x")] * 5 + [ACK] + [NetworkError("x")])
    harness.backend.advance(31 + 31)
    assert harness.counters.last_error == ""
    harness.supervisor.connection.close()
    harness.backend.advance(5)
    assert harness.attempts[-1] - harness.attempts[-2] == pytest.approx(1)


@pytest.mark.parametrize(
    ("error", "delays"),
    [
        (NetworkError("the brain fails on each hello", code=1011), [1, 2, 4, 8, 16, 30, 30]),
        (SessionLimitError("the 65th worker", code=4429), [10, 20, 40, 80, 160, 320, 600, 600]),
        (AuthenticationRejectedError("a signature", code=4403), [10, 20, 40, 80]),
    ],
    ids=["1011", "4429", "4403"],
)
def test_short_sessions_back_off(error, delays):
    """Sessions that end right after their start are delayed like failed connects."""
    harness = SupervisorHarness()
    harness.serve_session = failing_session(harness.backend, error, 0.5)
    harness.backend.advance(sum(delays) + len(delays))
    gaps = [later - earlier - 0.5 for earlier, later in pairwise(harness.attempts)]
    assert gaps == pytest.approx(delays)
    assert harness.counters.sessions == len(harness.attempts)


def test_processes_with_one_worker_id_back_off():
    """Two processes that replace each other's session end up minutes apart."""
    backend, connections = FakeConcurrency(), []

    def serve(connection):
        if connections:
            connections.pop().transport.inbox.append(SessionLimitError("replaced", code=4002))
        connections.append(connection)
        connection.transport.receive(1e9)

    one, two = (SupervisorHarness(backend=backend, serve_session=serve) for _ in range(2))
    backend.advance(6 * 3600)
    for each in (one, two):
        gaps = [later - earlier for earlier, later in pairwise(each.attempts)]
        assert gaps[-1] >= 600
        assert len(each.attempts) < 50


def test_flapping_sessions_are_logged_rarely(caplog):
    """Sessions that end right after their start are logged as rarely as an unreachable brain."""
    caplog.set_level(logging.INFO)
    harness = SupervisorHarness()
    harness.serve_session = failing_session(harness.backend, NetworkError("x", code=1011), 0.5)
    harness.backend.advance(1200)
    lines = [record for record in caplog.records if record.name == "z4j.runtime.pipeline.session"]
    assert len(harness.attempts) > 40
    assert len(lines) < 10


def test_refused_signature_reports_clock_offset():
    """A refused signature is explained by the clock offset in seconds."""
    stamp = datetime.fromtimestamp(1_700_000_000 + 75, UTC).isoformat()
    harness = SupervisorHarness([ACK[:-1] + f', "ts": "{stamp}"}}'.encode()])
    harness.serve_session = failing_session(harness.backend, error_for_close_code(4403), 0.5)
    harness.backend.advance(1)
    assert "this host's clock is 75 s behind the brain's" in harness.counters.last_error


def test_bad_hello_ack_is_protocol_error():
    """A bad first message is a protocol error; another protocol version asks to upgrade."""
    harness = SupervisorHarness(
        [b"nonsense", ACK.replace(b'"protocol_version": "2"', b'"protocol_version": "3"')]
    )
    harness.backend.advance(1.5)
    assert harness.supervisor.backoff.streaks == {"connection": 0, "protocol": 2, "auth": 0}
    assert "upgrade" in harness.counters.last_error


def test_reconnect_ends_session_and_wait():
    """A reconnect request ends a session or a wait, and is used up by one attempt."""
    harness = SupervisorHarness(
        [
            AuthenticationRejectedError("x"),
            AuthenticationRejectedError("x"),
            ACK,
            ACK,
            AuthenticationRejectedError("x"),
        ]
    )
    harness.backend.advance(5)
    harness.supervisor.reconnect()
    harness.backend.advance(0.001)
    assert harness.attempts == [0, 5]
    harness.backend.advance(30)
    assert len(harness.attempts) == 3
    harness.supervisor.reconnect()
    harness.backend.advance(0.001)
    assert len(harness.attempts) == 4
    assert harness.transports[2].aborted
    assert harness.transports[2].closed
    harness.supervisor.connection.close()
    harness.backend.advance(9.9)
    assert len(harness.attempts) == 5, "the request was used up: the failure after it waits in full"


def test_stop_ends_session_and_wait():
    """A stop ends a session, and a wait of an hour."""
    for script in ([], [IncompatibleError("x")]):
        harness = SupervisorHarness(script)
        harness.backend.advance(5)
        harness.stop_event.set()
        harness.supervisor.stop()
        harness.backend.advance(0.001)
        assert not harness.task.alive()
        assert harness.transports[-1].closed
        assert len(harness.attempts) == 1


def test_first_and_every_tenth_failure_are_logged(caplog):
    """An hour without a brain logs one warning, every tenth failure, and the reconnect."""
    caplog.set_level(logging.INFO)
    harness = SupervisorHarness([NetworkError("nobody there")] * 25)
    harness.backend.advance(3600)
    lines = [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "z4j.runtime.pipeline.session"
    ]
    assert [level for level, _ in lines] == ["WARNING", "INFO", "INFO", "INFO"]
    assert "nobody there" in lines[0][1]
    assert lines[-1][1] == "z4j: connected again after 25 failed attempts"


# -- watch


def test_dead_loop_is_restarted_with_backoff(caplog):
    """A loop that dies is logged, counted and restarted after growing delays, until the stop."""
    backend, counters = FakeConcurrency(), Counters()
    loops, runs = BackgroundLoops(backend, counters), []

    def run(_stop_event):
        runs.append(backend.now())
        raise ValueError("a bug")

    task = loops.spawn(run, "z4j-odd")
    backend.advance(400)
    gaps = [later - earlier for earlier, later in pairwise(runs)]
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    assert counters.restarts == {"z4j-odd": len(runs)}
    assert "z4j-odd died" in caplog.text
    loops.signal_stop()
    backend.advance(0.001)
    assert not task.alive()


def test_rare_deaths_do_not_add_up():
    """A loop that ran for an hour is restarted after the initial delay."""
    backend, counters, runs = FakeConcurrency(), Counters(), []

    def run(_stop_event):
        runs.append(backend.now())
        backend.sleep(3600)
        raise ValueError("a rare bug")

    BackgroundLoops(backend, counters).spawn(run, "z4j-odd")
    backend.advance(3600 * 8)
    assert {round(later - earlier) for earlier, later in pairwise(runs)} == {3601}


def test_stopped_loop_is_not_restarted():
    """A loop that ends after ``stop_event`` is neither restarted nor counted."""
    backend, counters = FakeConcurrency(), Counters()
    loops = BackgroundLoops(backend, counters)
    task = loops.spawn(backend.wait, "z4j-idle")
    backend.advance(5)
    loops.signal_stop()
    backend.advance(0.001)
    assert not task.alive()
    assert counters.restarts == {}
