"""The receive path under fire, without a socket and with one: only our own errors come out, and nothing runs.

What the brain did not sign ends the session. What it did sign, but badly, is its own bug: that too must cost no more than
the session.
"""

import json
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from z4j_core.transport.frames import CommandFrame, CommandPayload
from z4j_core.transport.framing import FrameSigner
from z4j_core.transport.hmac import sign_envelope

from tests.support.engines import FakeEngineHost
from tests.support.http_peer import HttpPeer
from tests.support.peer import TOKEN, Peer
from tests.support.session import SECRET, SessionHarness
from z4j_bare.buffer.rows import RESULT
from z4j_bare.commands import Dispatcher
from z4j_bare.commands.actions import ENGINE_ACTIONS
from z4j_bare.concurrency import build, choose, detect
from z4j_bare.errors import AgentError, RemoteError, RemoteProtocolError
from z4j_bare.pipeline.receive import ReceiveLoop
from z4j_bare.transport import longpoll
from z4j_bare.transport.endpoint import longpoll_url, websocket_url
from z4j_bare.transport.websocket import WebSocketTransport, close_error
from z4j_bare.wire import frames
from z4j_bare.wire.session import Session, parse_hello_ack

BINDING = {"agent_id": "agent", "project_id": "project", "session_id": "session"}

#: JSON may hold what UTF-8 cannot: halves of surrogate pairs.
TEXT = st.text(st.characters(codec=None), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KINDS = st.sampled_from(
    [
        "command",
        "event_batch_ack",
        "error",
        "heartbeat",
        "event_batch",
        "registry_delta",
        "command_result",
    ]
)
MISSING = object()
FIELDS = (
    "action",
    "target",
    "parameters",
    "timeout_seconds",
    "delivery_claim_token",
    "acked_id",
    "code",
    "message",
    "fatal",
)

SLOW = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Reading(SessionHarness):
    """A session whose reader feeds a real dispatcher; ``died`` holds what came out of the reader."""

    def __init__(self):
        super().__init__()
        self.engine = FakeEngineHost(self.backend, "stub")
        self.died = []
        dispatcher = Dispatcher(
            {"stub": self.engine}, self.buffer, lambda: None, self.backend, self.counters, 4
        )
        self.acks = []
        loop = ReceiveLoop(self.connection, self.acks.append, dispatcher.submit)

        def run():
            try:
                loop.run()
            except Exception as error:
                self.died.append(error)

        self.backend.spawn(run, name="reader")

    @property
    def answers(self):
        """The keys of all answers that were stored for sending."""
        return [row.key for row in self.disk.store.drain(0, 10_000, 10**9, (RESULT,))]

    def hear(self, *messages):
        """Let the messages arrive, and the session come to its end if it must."""
        self.transport.inbox.extend(messages)
        self.backend.advance(5)


def a_command(sequence=1):
    """Return the bytes of a good command, the ``sequence``-th of its session."""
    signer = FrameSigner(secret=SECRET, **BINDING)
    frame = CommandFrame(
        id="c-1", payload=CommandPayload(action="retry_task", parameters={"task_id": "t"})
    )
    for _ in range(sequence - 1):
        signer.sign_and_serialize(frame)
    return signer.sign_and_serialize(frame)


def signed(kind, payload, **envelope):
    """Return a frame of any content under a good signature."""
    body = {
        "v": 2, "type": kind, "id": "c-1", "ts": datetime.now(UTC).isoformat(), "nonce": uuid4().hex, "seq": 1, "payload": payload, **envelope,
    }  # fmt: skip
    body = {name: value for name, value in body.items() if value is not MISSING}
    body["hmac"] = sign_envelope(SECRET, {**body, **BINDING})
    return json.dumps(body).encode()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_altered_frames(data):
    """A signed command with bytes changed, cut out or put in runs nothing and ends as a remote error."""
    message = a_command()
    start = data.draw(st.integers(0, len(message)))
    end = data.draw(st.integers(start, min(len(message), start + 20)))
    altered = message[:start] + data.draw(st.binary(max_size=20)) + message[end:]
    world = Reading()
    world.hear(altered)
    if not same(altered, message):
        assert world.engine.calls == []
        assert [isinstance(error, RemoteError) for error in world.died] == [True]


def same(altered, message):
    """Whether only the spelling was changed: the signature is about what JSON means."""
    try:
        return json.loads(altered) == json.loads(message)
    except (ValueError, RecursionError):
        return False


@settings(max_examples=200, deadline=None)
@given(
    KINDS,
    st.dictionaries(st.sampled_from(FIELDS) | TEXT, JSON, max_size=6) | JSON,
    st.dictionaries(
        st.sampled_from(["id", "ts", "seq", "nonce", "v", "x"]), JSON | st.just(MISSING), max_size=2
    ),
)
def test_nonsense_under_a_good_signature(kind, payload, envelope):
    """A well-signed frame of any content is taken or ends the session with a remote error; no loop dies of it."""
    try:
        message = signed(kind, payload, **envelope)
    except (ValueError, TypeError, RecursionError):  # z4j_core itself has no canonical form for it
        return
    world = Reading()
    world.hear(message)
    assert all(isinstance(error, RemoteError) for error in world.died), world.died
    if kind != "command" or world.died:
        assert world.engine.calls == []


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {"action": st.sampled_from(sorted(ENGINE_ACTIONS))},
        optional=dict.fromkeys(FIELDS[1:5], JSON),
    ),
    st.dictionaries(st.sampled_from(["task_id", "name", "engine", "args", "kwargs", "eta"]), JSON),
)
def test_commands_of_any_shape_are_answered(payload, parameters):
    """Whatever a well-signed command holds, the reader lives, and there is at most one answer to it."""
    payload.setdefault("parameters", parameters)
    try:
        message = signed("command", payload)
    except (ValueError, TypeError, RecursionError):
        return
    world = Reading()
    world.hear(message)
    assert all(isinstance(error, RemoteError) for error in world.died), world.died
    assert len(world.answers) == (0 if world.died else 1)


@pytest.mark.parametrize("age", [-3600, -61, 61, 3600])
def test_stale_commands(age):
    """A command whose time is off by more than the protocol allows is a remote error and runs nothing."""
    stamp = datetime.fromtimestamp(datetime.now(UTC).timestamp() + age, UTC).isoformat()
    world = Reading()
    world.hear(
        signed("command", {"action": "retry_task", "parameters": {"task_id": "t"}}, ts=stamp)
    )
    assert [type(error) for error in world.died] == [RemoteProtocolError]
    assert world.engine.calls == []


@pytest.mark.parametrize(
    "messages", [("first", "first"), ("second", "first")], ids=["twice", "out-of-order"]
)
def test_replayed_commands(messages):
    """A frame that comes again, or behind a later one, ends the session and runs nothing more."""
    known = {"first": a_command(1), "second": a_command(2)}
    world = Reading()
    world.hear(*(known[name] for name in messages))
    assert [type(error) for error in world.died] == [RemoteProtocolError]
    assert [method for method, *_ in world.engine.calls] == ["retry_task"]


ACK = {
    "protocol_version": "2",
    "brain_version": "1",
    "agent_id": "a",
    "project_id": "p",
    "session_id": "s",
}


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*ACK, "heartbeat_interval_seconds", "max_frame_size_bytes", "x"]),
        SCALARS,
        max_size=3,
    )
)
def test_odd_welcomes(changes):
    """A hello_ack with any values is our error, or makes a session that can sign and send."""
    message = json.dumps(
        {"v": 2, "type": "hello_ack", "id": "h", "payload": {**ACK, **changes}}
    ).encode()
    try:
        hello_ack = parse_hello_ack(message)
        Session(hello_ack, SECRET).sign("heartbeat", "hb", b"{}", 0.0)
    except RemoteError:
        return
    assert hello_ack.heartbeat_seconds >= 1
    assert hello_ack.max_frame_bytes > 0


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=130))
def test_close_frames(body):
    """The body of a close frame, whatever it is, becomes one of our errors."""
    assert isinstance(close_error(body), AgentError)


# -- with a socket

HELLO = frames.hello(
    frames.Identity(
        framework="bare",
        agent_version="1",
        worker_id="w",
        worker_pid=1,
        worker_started_at=datetime.now(UTC),
    )
)

#: WebSocket frames that are wrong in their first two bytes: opcode, reserved bits, mask, length.
WEBSOCKET = [
    bytes((first, second)) + b"ab"
    for first in range(0, 256, 3)
    for second in (0, 1, 2, 125, 126, 127, 128, 130, 255)
]

#: Whole HTTP answers, and noise in each of their places.
ANSWERS = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda noise: b"HTTP/1.1 101 S\r\n" + noise + b"\r\n\r\n"),
    st.binary(max_size=60).map(lambda noise: b"HTTP/1.1 200 OK\r\n" + noise + b"\r\n\r\n{}"),
    st.sampled_from(
        [
            b"HTTP/1.1 101\r\n\r\n",
            b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            b"HTTP/1.1 500 \xff\r\nX: \xff\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
            b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
        ]
    ),
)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["Date", "Retry-After", "X-Z4J-Agent-Id", "X-Z4J-Project-Id", "Set-Cookie", "Location"]
    ),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
)


@pytest.fixture(scope="module")
def own_seam():
    """A backend for all examples: what belongs to one test is no good for hypothesis."""
    made = build(choose("auto", detect()))
    yield made
    made.close()


@pytest.fixture(scope="module")
def peer(own_seam):
    """One scripted brain for all examples."""
    made = Peer(own_seam)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def http_peer(own_seam):
    """One for long-poll, which is asked without a pause."""
    made = HttpPeer(own_seam)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EMPTY_POLL_INTERVAL", "MIN_POLL_INTERVAL", "POLL_GRACE"):
            patch.setattr(longpoll, name, 0.05)
        yield made
    made.stop()


def streaming(peer):
    return WebSocketTransport(websocket_url(peer.url, dev_mode=False), lambda: TOKEN, peer.backend)


def polling(peer):
    url = longpoll_url(peer.url, dev_mode=False)
    return longpoll.LongPollTransport(
        url, lambda: TOKEN, peer.backend, longpoll.LearnedLimits(wait=0)
    )


def conversation(transport):
    """Connect, read until one of our errors ends it, and return what came before."""
    heard = []
    try:
        heard.append(transport.connect(HELLO))
        while len(heard) < 200:
            heard.append(transport.receive(1.0))
        raise AssertionError("the line never ended")
    except AgentError:
        return heard
    finally:
        transport.close()


@SLOW
@given(
    st.lists(st.binary(max_size=140), max_size=4) | st.lists(st.sampled_from(WEBSOCKET), max_size=4)
)
def test_noise_on_the_line(peer, pieces):
    """Whatever bytes follow the upgrade, the transport yields bytes or ``None`` and ends with one of our errors."""

    def noise(session):
        session.send_raw(b"".join(pieces))
        session.drop()

    peer.greet = noise
    assert all(each is None or isinstance(each, bytes) for each in conversation(streaming(peer)))


@SLOW
@given(ANSWERS)
def test_noise_instead_of_an_answer(peer, answer):
    """Whatever answers the upgrade or the probe, connecting ends with one of our errors."""
    peer.noise = answer
    try:
        assert conversation(streaming(peer)) == []
        assert conversation(polling(peer)) == []
    finally:
        peer.noise = None


@SLOW
@given(
    st.integers(200, 999) | st.just(200),  # of a 1xx, more is still to come
    HEADERS,
    JSON.map(json.dumps)
    | st.fixed_dictionaries({"frames": JSON | st.lists(TEXT, max_size=3)}).map(json.dumps)
    | st.text(max_size=20),
)
def test_odd_answers(http_peer, status, headers, body):
    """Whatever a probe and a poll are answered, the transport yields bytes or ``None`` and ends with one of our errors."""
    answer = status, headers, body.encode()
    for answers in (
        [answer],
        [(200, {"X-Z4J-Agent-Id": "a", "X-Z4J-Project-Id": "p"}, b"{}"), answer],
    ):
        http_peer.answers["GET"] = [*answers, (401, {}, b"{}")]
        assert all(
            each is None or isinstance(each, bytes) for each in conversation(polling(http_peer))
        )


def test_a_good_command_runs():
    """The fuzz above would be worthless if a good command did not run: it does, once."""
    world = Reading()
    world.hear(a_command())
    assert ([call[0] for call in world.engine.calls], world.died, len(world.answers)) == (
        ["retry_task"],
        [],
        1,
    )
