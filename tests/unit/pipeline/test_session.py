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
    AgentError,
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
def world():
    return SessionHarness()


def outcome(backend, run):
    """Run a loop to its end in a task; return what it raised, in a list that is empty until then."""
    ended = []

    def work():
        try:
            run()
        except AgentError as error:
            ended.append(error)
        else:
            ended.append(None)

    backend.spawn(work, name="loop")
    return ended


# -- heartbeat


def test_beats_at_once_and_then_at_its_interval(world):
    """The first heartbeat needs no waiting, the others come at the interval, each with a fresh payload."""
    numbers = iter(range(100))
    loop = HeartbeatLoop(
        world.connection,
        world.backend,
        world.counters,
        lambda: b'{"buffer_size":%d}' % next(numbers),
        interval=10,
    )
    world.backend.spawn(loop.run, name="beat")
    world.backend.advance(35)
    assert [when for when, _ in world.transport.sent] == [0, 10, 20, 30]
    assert [frame["payload"]["buffer_size"] for frame in world.transport.frames("heartbeat")] == [
        0,
        1,
        2,
        3,
    ]
    assert [frame["seq"] for _, frame in world.transport.sent] == [1, 2, 3, 4]
    assert world.counters.heartbeats == 4


def test_a_switched_off_heartbeat_keeps_alive(world):
    """Switched off, an empty batch every 30 s keeps the brain from closing a silent session (4408 after 90 s)."""
    loop = HeartbeatLoop(
        world.connection, world.backend, world.counters, bytes, interval=10, enabled=False
    )
    world.backend.spawn(loop.run, name="beat")
    world.backend.advance(95)
    assert [when for when, _ in world.transport.sent] == [
        heartbeat.KEEPALIVE_INTERVAL * turn for turn in range(4)
    ]
    assert {frame["type"] for _, frame in world.transport.sent} == {"event_batch"}
    assert world.counters.heartbeats == 0


def test_the_heartbeat_leaves_with_its_session(world):
    """It ends at once when the session is shut, and with an error when the line is broken."""
    loop = HeartbeatLoop(
        world.connection, world.backend, world.counters, lambda: b"{}", interval=10
    )
    ended = outcome(world.backend, loop.run)
    world.backend.advance(5)
    world.connection.close()
    world.backend.advance(0.001)
    assert ended == [None]
    world.reconnect()
    world.transport.send_error = NetworkError("reset")
    ended = outcome(
        world.backend,
        HeartbeatLoop(
            world.connection, world.backend, world.counters, lambda: b"{}", interval=10
        ).run,
    )
    world.backend.advance(0.001)
    assert isinstance(ended[0], NetworkError)


def test_the_agents_status_follows_a_sessions_first_heartbeat(world):
    """The report on the agent itself comes right after the first heartbeat and then once a minute."""
    loop = HeartbeatLoop(
        world.connection,
        world.backend,
        world.counters,
        lambda: b"{}",
        interval=10,
        status=lambda: b'{"buffer_depth":1}',
    )
    world.backend.spawn(loop.run, name="beat")
    world.backend.advance(125)
    assert [(when, frame["type"]) for when, frame in world.transport.sent][:3] == [
        (0, "heartbeat"),
        (0, "agent_status"),
        (10, "heartbeat"),
    ]
    assert [when for when, frame in world.transport.sent if frame["type"] == "agent_status"] == [
        0,
        60,
        120,
    ]


# -- receive


class Reading(SessionHarness):
    """A world with a running reader."""

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
        self.ended = outcome(self.backend, self.loop.run)

    def say(self, frame):
        self.transport.inbox.append(self.signer.sign_and_serialize(frame))
        self.backend.advance(0.01)


@pytest.fixture
def reading():
    return Reading()


def test_lateness_is_measured_against_the_fastest():
    """What a frame took longer than the fastest of its session is lateness, whatever the clocks say; drift is forgiven."""
    world = SessionHarness(replace(HELLO_ACK, server_time=5_000.0))
    took = world.connection.relative_delay
    world.backend.advance(10)
    assert took(5_010.0) == 0
    assert took(5_003.0) == pytest.approx(7, abs=0.01)
    assert took(5_012.0) == 0
    assert took(5_010.0) == pytest.approx(2, abs=0.01)
    world.backend.advance(100_000)
    assert took(5_010.0 + 100_000 - 5) == 0, "five seconds in a day may be the clocks' own"
    world.reconnect()
    assert world.connection.relative_delay(0.0) == 0, (
        "without the brain's time the first frame counts as in time"
    )


def test_routes_frames(reading):
    """Acks go to the sender, commands to the dispatcher, everything else is ignored."""
    reading.say(
        EventBatchAckFrame(
            id="eba_1",
            payload=EventBatchAckPayload(acked_id="ev_1", received=1, accepted=0, rejected=1),
        )
    )
    reading.say(CommandFrame(id="c-1", payload=CommandPayload(action="retry_task")))
    reading.say(HeartbeatFrame(id="hb_1", payload=HeartbeatPayload()))
    reading.say(ErrorFrame(id="err", payload=ErrorPayload(code="x", message="y", fatal=False)))
    assert reading.acks == ["ev_1"]
    ((frame, connection, late),) = reading.commands
    assert (frame.id, connection) == ("c-1", reading.connection)
    assert 0 <= late < 60
    assert reading.ended == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("protocol_incompatible", IncompatibleError),
        ("agent_incompatible", IncompatibleError),
        ("anything", RemoteProtocolError),
    ],
)
def test_fatal_complaints_end_the_session(reading, code, kind):
    """A fatal error frame ends the session, as an upgrade to make or as a protocol error."""
    reading.say(
        ErrorFrame(id="err", payload=ErrorPayload(code=code, message="because", fatal=True))
    )
    assert type(reading.ended[0]) is kind
    assert "because" in str(reading.ended[0])


@pytest.mark.parametrize("fatal", [True, False])
def test_an_event_that_the_brain_does_not_take_ends_the_session(reading, fatal):
    """The answer to a batch with a legacy schedule event is a matter of that batch, not of an upgrade in an hour."""
    reading.say(
        ErrorFrame(
            id="err_ev_1",
            payload=ErrorPayload(code="scheduler_upgrade_required", message="because", fatal=fatal),
        )
    )
    assert type(reading.ended[0]) is RemoteProtocolError
    assert may_be_poison(reading.ended[0])


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
def test_unsigned_messages_end_the_session(reading, message):
    """Whatever does not verify reaches nobody and ends the session with a protocol error."""
    reading.transport.inbox.append(message)
    reading.backend.advance(0.01)
    assert isinstance(reading.ended[0], RemoteProtocolError)
    assert (reading.acks, reading.commands) == ([], [])


def test_the_reader_leaves_when_told(reading):
    """It ends when the session is shut, and reports a line that broke by itself."""
    reading.connection.closing.set()
    reading.backend.advance(2)
    assert reading.ended == [None]
    other = Reading()
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


class Supervised:
    """A supervisor whose transports answer what the script says: bytes to welcome with, or an error to raise."""

    def __init__(self, script=(), backend=None, serving=None):
        self.backend = backend or FakeConcurrency()
        self.counters = Counters()
        self.script = list(script)
        self.attempts = []
        self.transports = []
        self.stop_event = self.backend.event()
        self.serving = serving

        def dial():
            transport = FakeTransport(self.backend)
            transport.hello_answer = self.script.pop(0) if self.script else ACK
            self.attempts.append(self.backend.now())
            self.transports.append(transport)
            return transport

        def serve(connection):
            if self.serving is not None:
                self.serving(connection)
            self.backend.wait(connection.closing)

        self.supervisor = Supervisor(
            dial, lambda: b"hello", lambda: SECRET, serve, self.backend, self.counters
        )
        self.supervisor.backoff = ReconnectBackoff(random=lambda: 0.0)
        self.task = self.backend.spawn(self.supervisor.run, self.stop_event, name="z4j-supervisor")


def fail_with(backend, error, seconds):
    """What serves a session by failing after some seconds."""

    def serve(connection):
        backend.wait(connection.closing, seconds)
        raise error

    return serve


def test_one_session_while_it_lasts():
    """A session that stands is left alone, and is there to be asked for."""
    world = Supervised()
    world.backend.advance(1000)
    assert world.attempts == [0]
    assert world.transports[0].hellos == [b"hello"]
    assert world.supervisor.connection.hello_ack.session_id == "s"
    assert world.counters.sessions == 1


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
def test_waits_longer_with_each_failure(error, delays):
    """Every class of failure has its schedule, and every failed transport is closed."""
    world = Supervised([error] * len(delays))
    world.backend.advance(sum(delays) + 1)
    gaps = [later - earlier for earlier, later in pairwise(world.attempts)]
    assert gaps == pytest.approx(delays)
    assert all(transport.closed for transport in world.transports[:-1])
    assert world.supervisor.connection is not None


def test_another_kind_of_failure_is_warned_of(caplog):
    """A failure that asks for another cure than the one before it is a warning of its own; more of the same are not."""
    caplog.set_level(logging.DEBUG, "z4j")
    Supervised(
        [NetworkError("down")] * 3 + [AuthenticationRejectedError("a bad token")] * 3
    ).backend.advance(200)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [("down" in message, "a bad token" in message) for message in warned] == [
        (True, False),
        (False, True),
    ]


def test_a_session_that_holds_resets_the_schedule():
    """After a session of half a minute the next failure waits as briefly as the first."""
    world = Supervised([NetworkError("x")] * 5 + [ACK] + [NetworkError("x")])
    world.backend.advance(31 + 31)
    assert world.counters.last_error == ""
    world.supervisor.connection.close()
    world.backend.advance(5)
    assert world.attempts[-1] - world.attempts[-2] == pytest.approx(1)


@pytest.mark.parametrize(
    ("error", "delays"),
    [
        (NetworkError("the brain fails on each hello", code=1011), [1, 2, 4, 8, 16, 30, 30]),
        (SessionLimitError("the 65th worker", code=4429), [10, 20, 40, 80, 160, 320, 600, 600]),
        (AuthenticationRejectedError("a signature", code=4403), [10, 20, 40, 80]),
    ],
    ids=["1011", "4429", "4403"],
)
def test_sessions_that_die_young_come_later_and_later(error, delays):
    """A welcome alone proves nothing: what ends session after session right behind it waits as a failed connect does."""
    world = Supervised()
    world.serving = fail_with(world.backend, error, 0.5)
    world.backend.advance(sum(delays) + len(delays))
    gaps = [later - earlier - 0.5 for earlier, later in pairwise(world.attempts)]
    assert gaps == pytest.approx(delays)
    assert world.counters.sessions == len(world.attempts)


def test_two_that_replace_each_other_part():
    """Two processes under one worker id, each thrown out when the other comes, end up minutes apart, not in a fight."""
    backend, seats = FakeConcurrency(), []

    def serve(connection):
        if seats:
            seats.pop().transport.inbox.append(SessionLimitError("replaced", code=4002))
        seats.append(connection)
        connection.transport.receive(1e9)

    one, two = (Supervised(backend=backend, serving=serve) for _ in range(2))
    backend.advance(6 * 3600)
    for each in (one, two):
        gaps = [later - earlier for earlier, later in pairwise(each.attempts)]
        assert gaps[-1] >= 600
        assert len(each.attempts) < 50


def test_a_session_that_never_holds_is_not_a_line_each_time(caplog):
    """What dies right after each welcome is told of as seldom as a brain that is away."""
    caplog.set_level(logging.INFO)
    world = Supervised()
    world.serving = fail_with(world.backend, NetworkError("x", code=1011), 0.5)
    world.backend.advance(1200)
    lines = [record for record in caplog.records if record.name == "z4j.runtime.pipeline.session"]
    assert len(world.attempts) > 40
    assert len(lines) < 10


def test_the_clock_is_named_when_it_is_off():
    """A signature refused in a session says by how many seconds this host's clock differs from the brain's."""
    stamp = datetime.fromtimestamp(1_700_000_000 + 75, UTC).isoformat()
    world = Supervised([ACK[:-1] + f', "ts": "{stamp}"}}'.encode()])
    world.serving = fail_with(world.backend, error_for_close_code(4403), 0.5)
    world.backend.advance(1)
    assert "this host's clock is 75 s behind the brain's" in world.counters.last_error


def test_a_bad_welcome_is_a_protocol_error():
    """A first message that is no hello_ack counts as the brain's fault, one of another protocol as an upgrade to make."""
    world = Supervised(
        [b"nonsense", ACK.replace(b'"protocol_version": "2"', b'"protocol_version": "3"')]
    )
    world.backend.advance(1.5)
    assert world.supervisor.backoff.streaks == {"connection": 0, "protocol": 2, "auth": 0}
    assert "upgrade" in world.counters.last_error


def test_reconnect_now():
    """A request to reconnect ends a wait and a session alike, and is used up by one attempt."""
    world = Supervised(
        [
            AuthenticationRejectedError("x"),
            AuthenticationRejectedError("x"),
            ACK,
            ACK,
            AuthenticationRejectedError("x"),
        ]
    )
    world.backend.advance(5)
    world.supervisor.reconnect()
    world.backend.advance(0.001)
    assert world.attempts == [0, 5]
    world.backend.advance(30)
    assert len(world.attempts) == 3
    world.supervisor.reconnect()
    world.backend.advance(0.001)
    assert len(world.attempts) == 4
    assert world.transports[2].aborted
    assert world.transports[2].closed
    world.supervisor.connection.close()
    world.backend.advance(9.9)
    assert len(world.attempts) == 5, "the request was used up: the failure after it waits in full"


def test_stops_wherever_it_is():
    """Told to end it leaves from a session and from a wait of an hour."""
    for script in ([], [IncompatibleError("x")]):
        world = Supervised(script)
        world.backend.advance(5)
        world.stop_event.set()
        world.supervisor.stop()
        world.backend.advance(0.001)
        assert not world.task.alive()
        assert world.transports[-1].closed
        assert len(world.attempts) == 1


def test_logs_the_first_failure_and_every_tenth(caplog):
    """An hour without a brain is a handful of lines: the first loud, every tenth quiet, and one when it is back."""
    caplog.set_level(logging.INFO)
    world = Supervised([NetworkError("nobody there")] * 25)
    world.backend.advance(3600)
    lines = [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "z4j.runtime.pipeline.session"
    ]
    assert [level for level, _ in lines] == ["WARNING", "INFO", "INFO", "INFO"]
    assert "nobody there" in lines[0][1]
    assert lines[-1][1] == "z4j: connected again after 25 failed attempts"


# -- watch


def test_a_dead_loop_runs_again(caplog):
    """A loop that dies is logged, counted and started again, later and later, until it is told to stop."""
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


def test_a_loop_that_ran_well_for_long_comes_back_soon():
    """Deaths that lie days apart do not add up to a minute's wait."""
    backend, counters, runs = FakeConcurrency(), Counters(), []

    def run(_stop_event):
        runs.append(backend.now())
        backend.sleep(3600)
        raise ValueError("a rare bug")

    BackgroundLoops(backend, counters).spawn(run, "z4j-odd")
    backend.advance(3600 * 8)
    assert {round(later - earlier) for earlier, later in pairwise(runs)} == {3601}


def test_a_loop_that_returns_because_it_was_told_to_is_not_restarted():
    """A loop that ends after ``stop_event`` ends for good, uncounted."""
    backend, counters = FakeConcurrency(), Counters()
    loops = BackgroundLoops(backend, counters)
    task = loops.spawn(backend.wait, "z4j-idle")
    backend.advance(5)
    loops.signal_stop()
    backend.advance(0.001)
    assert not task.alive()
    assert counters.restarts == {}
