"""Fuzz tests of the receive path, without and with a socket: it raises only ``AgentError``.

A message without the brain's signature ends the session and runs nothing. A signed message with bad
content is a bug of the brain, and must not cost more than the session either.
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

#: JSON may contain lone surrogates, which UTF-8 cannot.
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


class ReceiveHarness(SessionHarness):
    """A session whose receive loop feeds a dispatcher; ``errors`` gets what the loop raised."""

    def __init__(self):
        super().__init__()
        self.engine = FakeEngineHost(self.backend, "stub")
        self.errors = []
        dispatcher = Dispatcher(
            {"stub": self.engine}, self.buffer, lambda: None, self.backend, self.counters, 4
        )
        self.acks = []
        loop = ReceiveLoop(self.connection, self.acks.append, dispatcher.submit)

        def run():
            try:
                loop.run()
            except Exception as error:
                self.errors.append(error)

        self.backend.spawn(run, name="reader")

    @property
    def result_keys(self):
        """The keys of all results stored for sending."""
        return [row.key for row in self.disk.store.drain(0, 10_000, 10**9, (RESULT,))]

    def receive(self, *messages):
        """Let the messages arrive, and the session end if one of them ends it."""
        self.transport.inbox.extend(messages)
        self.backend.advance(5)


def make_command(sequence=1):
    """Return the bytes of a valid command, the ``sequence``-th of its session."""
    signer = FrameSigner(secret=SECRET, **BINDING)
    frame = CommandFrame(
        id="c-1", payload=CommandPayload(action="retry_task", parameters={"task_id": "t"})
    )
    for _ in range(sequence - 1):
        signer.sign_and_serialize(frame)
    return signer.sign_and_serialize(frame)


def signed_frame(kind, payload, **envelope):
    """Return a frame with any content and a valid signature."""
    body = {
        "v": 2, "type": kind, "id": "c-1", "ts": datetime.now(UTC).isoformat(),
        "nonce": uuid4().hex, "seq": 1, "payload": payload, **envelope,
    }  # fmt: skip
    body = {name: value for name, value in body.items() if value is not MISSING}
    body["hmac"] = sign_envelope(SECRET, {**body, **BINDING})
    return json.dumps(body).encode()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_altered_command_is_not_run(data):
    """A signed command with changed bytes is not run and raises a remote error."""
    message = make_command()
    start = data.draw(st.integers(0, len(message)))
    end = data.draw(st.integers(start, min(len(message), start + 20)))
    altered = message[:start] + data.draw(st.binary(max_size=20)) + message[end:]
    harness = ReceiveHarness()
    harness.receive(altered)
    if not is_same_json(altered, message):
        assert harness.engine.calls == []
        assert [isinstance(error, RemoteError) for error in harness.errors] == [True]


def is_same_json(altered, message):
    """Return whether only the notation differs: the signature covers the JSON values."""
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
def test_signed_nonsense_raises_only_remote_errors(kind, payload, envelope):
    """A signed frame with any content is accepted, or ends the session with a remote error."""
    try:
        message = signed_frame(kind, payload, **envelope)
    except (ValueError, TypeError, RecursionError):  # z4j_core itself has no canonical form for it
        return
    harness = ReceiveHarness()
    harness.receive(message)
    assert all(isinstance(error, RemoteError) for error in harness.errors), harness.errors
    if kind != "command" or harness.errors:
        assert harness.engine.calls == []


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {"action": st.sampled_from(sorted(ENGINE_ACTIONS))},
        optional=dict.fromkeys(FIELDS[1:5], JSON),
    ),
    st.dictionaries(st.sampled_from(["task_id", "name", "engine", "args", "kwargs", "eta"]), JSON),
)
def test_signed_command_of_any_shape_gets_one_result(payload, parameters):
    """The receive loop survives any signed command, and stores at most one result for it."""
    payload.setdefault("parameters", parameters)
    try:
        message = signed_frame("command", payload)
    except (ValueError, TypeError, RecursionError):
        return
    harness = ReceiveHarness()
    harness.receive(message)
    assert all(isinstance(error, RemoteError) for error in harness.errors), harness.errors
    assert len(harness.result_keys) == (0 if harness.errors else 1)


@pytest.mark.parametrize("age", [-3600, -61, 61, 3600])
def test_stale_command_is_not_run(age):
    """A command with a timestamp outside the allowed 60 s raises a remote error and is not run."""
    stamp = datetime.fromtimestamp(datetime.now(UTC).timestamp() + age, UTC).isoformat()
    harness = ReceiveHarness()
    harness.receive(
        signed_frame("command", {"action": "retry_task", "parameters": {"task_id": "t"}}, ts=stamp)
    )
    assert [type(error) for error in harness.errors] == [RemoteProtocolError]
    assert harness.engine.calls == []


@pytest.mark.parametrize(
    "messages", [("first", "first"), ("second", "first")], ids=["twice", "out-of-order"]
)
def test_replayed_command_ends_session(messages):
    """A repeated frame, or one out of sequence, ends the session and runs nothing more."""
    known = {"first": make_command(1), "second": make_command(2)}
    harness = ReceiveHarness()
    harness.receive(*(known[name] for name in messages))
    assert [type(error) for error in harness.errors] == [RemoteProtocolError]
    assert [method for method, *_ in harness.engine.calls] == ["retry_task"]


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
def test_any_hello_ack_is_usable_or_rejected(changes):
    """A ``hello_ack`` with any values is rejected, or makes a session that can sign and send."""
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
def test_any_close_body_becomes_agent_error(body):
    """The body of a close frame, whatever it contains, becomes an ``AgentError``."""
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

#: WebSocket frames with any first two bytes: opcode, reserved bits, mask, length.
WEBSOCKET = [
    bytes((first, second)) + b"ab"
    for first in range(0, 256, 3)
    for second in (0, 1, 2, 125, 126, 127, 128, 130, 255)
]

#: Whole HTTP responses, and noise in place of each of their parts.
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
def shared_backend():
    """A backend for all examples: hypothesis does not reset function fixtures between them."""
    made = build(choose("auto", detect()))
    yield made
    made.close()


@pytest.fixture(scope="module")
def peer(shared_backend):
    """One scripted brain for all examples."""
    made = Peer(shared_backend)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def http_peer(shared_backend):
    """One scripted long-poll brain for all examples, with no pause between polls."""
    made = HttpPeer(shared_backend)
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
    """Connect and read until an ``AgentError`` ends it; return the messages before."""
    messages = []
    try:
        messages.append(transport.connect(HELLO))
        while len(messages) < 200:
            messages.append(transport.receive(1.0))
        raise AssertionError("the line never ended")
    except AgentError:
        return messages
    finally:
        transport.close()


@SLOW
@given(
    st.lists(st.binary(max_size=140), max_size=4) | st.lists(st.sampled_from(WEBSOCKET), max_size=4)
)
def test_noise_after_upgrade_raises_agent_error(peer, pieces):
    """After the upgrade any bytes yield messages or ``None``, and then an ``AgentError``."""

    def noise(session):
        session.send_raw(b"".join(pieces))
        session.drop()

    peer.on_hello = noise
    assert all(each is None or isinstance(each, bytes) for each in conversation(streaming(peer)))


@SLOW
@given(ANSWERS)
def test_noise_instead_of_response_raises_agent_error(peer, answer):
    """Any response to the upgrade or the probe makes the connect raise an ``AgentError``."""
    peer.raw_response = answer
    try:
        assert conversation(streaming(peer)) == []
        assert conversation(polling(peer)) == []
    finally:
        peer.raw_response = None


@SLOW
@given(
    st.integers(200, 999) | st.just(200),  # of a 1xx, more is still to come
    HEADERS,
    JSON.map(json.dumps)
    | st.fixed_dictionaries({"frames": JSON | st.lists(TEXT, max_size=3)}).map(json.dumps)
    | st.text(max_size=20),
)
def test_any_http_response_raises_agent_error(http_peer, status, headers, body):
    """Any response to a probe or a poll yields messages or ``None``, and then an ``AgentError``."""
    answer = status, headers, body.encode()
    for responses in (
        [answer],
        [(200, {"X-Z4J-Agent-Id": "a", "X-Z4J-Project-Id": "p"}, b"{}"), answer],
    ):
        http_peer.answers["GET"] = [*responses, (401, {}, b"{}")]
        assert all(
            each is None or isinstance(each, bytes) for each in conversation(polling(http_peer))
        )


def test_valid_command_runs_once():
    """A valid command runs once, which shows that the fuzz tests above test something."""
    harness = ReceiveHarness()
    harness.receive(make_command())
    assert (
        [call[0] for call in harness.engine.calls],
        harness.errors,
        len(harness.result_keys),
    ) == (
        ["retry_task"],
        [],
        1,
    )
