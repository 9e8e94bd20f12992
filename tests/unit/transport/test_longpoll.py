"""Long-poll against a scripted HTTP brain: the transport alone, then the whole runtime."""

import datetime as dt
import gc
import json
import logging
import os
import signal
import time
from functools import partial
from uuid import uuid4

import pytest
from z4j_core.models import Event, EventKind

from tests.support.agents import installed_agents
from tests.support.engines import FakeEngine
from tests.support.http_peer import HttpPeer, Tunnel
from tests.support.peer import AGENT, PROJECT, SECRET, SECRET_TEXT, TOKEN, all_acked
from z4j_bare.errors import (
    AuthenticationRejectedError,
    FrameTooLargeError,
    HostConfigurationError,
    NetworkError,
    RemoteProtocolError,
    SessionLimitError,
)
from z4j_bare.pipeline import heartbeat, send
from z4j_bare.transport import longpoll
from z4j_bare.transport.endpoint import longpoll_url, tls_context
from z4j_bare.transport.longpoll import (
    BODY_LIMIT_INITIAL,
    LearnedLimits,
    LongPollTransport,
    TokenBucket,
)
from z4j_bare.wire import backoff
from z4j_bare.wire.frames import Identity, event_batch, hello
from z4j_bare.wire.session import Session, parse_hello_ack

CAPABILITIES = {
    "celery": ["retry_task", "retry_by_reference_v1"],
    "rq": ["retry_by_reference_v1"],
    "huey": ["retry_task"],
}


def a_hello():
    now = dt.datetime.now(dt.UTC)
    identity = Identity(
        framework="bare",
        agent_version="1.13.0",
        worker_id="w-1",
        worker_pid=1,
        worker_started_at=now,
        capabilities=CAPABILITIES,
    )
    return hello(identity)


@pytest.fixture
def peer(backend):
    created = HttpPeer(backend)
    yield created
    created.stop()
    assert created.errors == []


class LongPollSession:
    """A transport and its signing session."""

    def __init__(self, peer, backend, limits=None, token=TOKEN, secret=SECRET):
        self.limits = limits or LearnedLimits()
        self.backend = backend
        self.secret = secret
        self.url = longpoll_url(peer.url, dev_mode=False)
        self.transport = LongPollTransport(self.url, lambda: token, backend, self.limits)

    def connect(self):
        self.session = Session(parse_hello_ack(self.transport.connect(a_hello())), self.secret)
        return self.session.hello_ack

    def send(self, payload=b'{"events":[]}', kind="event_batch", identity="ev_1"):
        return self.transport.send(
            lambda: self.session.sign(kind, identity, payload, self.backend.wall())
        )


@pytest.fixture
def make_session(peer, backend):
    created = []

    def make(**how):
        created.append(LongPollSession(peer, backend, **how))
        return created[-1]

    yield make
    for client in created:
        client.transport.close()


@pytest.fixture
def connected(make_session):
    client = make_session()
    client.connect()
    return client


# -- connecting


@pytest.mark.parametrize(
    ("given", "created"),
    [
        ("https://brain.example.com", "https://brain.example.com/api/v1"),
        ("https://brain.example.com/z4j/", "https://brain.example.com/z4j/api/v1"),
        ("http://127.0.0.1:7700", "http://127.0.0.1:7700/api/v1"),
    ],
)
def test_longpoll_url_keeps_path_prefix(given, created):
    """The brain's URL becomes that of its API, including a path prefix."""
    assert longpoll_url(given, dev_mode=False) == created


def test_plain_http_to_other_host_is_rejected():
    """Plain HTTP to another host is rejected unless ``dev_mode`` is set."""
    with pytest.raises(HostConfigurationError, match="in the clear"):
        longpoll_url("http://brain.example.com", dev_mode=False)
    assert longpoll_url("http://brain.example.com", dev_mode=True).startswith("http://")


def test_connect_probes_without_claiming_commands(make_session, peer):
    """Connect is one request that claims no command. Its response becomes a ``hello_ack``."""
    hello_ack = make_session().connect()
    (probe,) = peer.requests
    assert (probe.method, probe.path, probe.query) == (
        "GET",
        "/api/v1/agent/commands",
        {"wait": "0", "max_frames": "0"},
    )
    assert probe.headers["authorization"] == f"Bearer {TOKEN}"
    assert (
        probe.headers["x-z4j-runtime-features"]
        == "retry_by_reference,external_schedule_protocol_v1"
    )
    assert (hello_ack.agent_id, hello_ack.project_id, hello_ack.session_id) == (
        AGENT,
        PROJECT,
        probe.nonce,
    )
    assert (hello_ack.heartbeat_seconds, len(probe.nonce) >= 16) == (10.0, True)
    assert abs(hello_ack.server_time - dt.datetime.now(dt.UTC).timestamp()) < 5


def test_each_session_has_new_nonce(make_session, peer):
    """No two sessions have the same nonce, because ``seq`` restarts in each."""
    for _ in range(3):
        make_session().connect()
    assert len({request.nonce for request in peer.requests}) == 3


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (401, {}, AuthenticationRejectedError),
        (403, {}, AuthenticationRejectedError),
        (302, {"Location": "http://127.0.0.1:9/"}, NetworkError),
        (400, {}, NetworkError),
        (404, {}, NetworkError),
        (409, {}, NetworkError),
        (422, {}, NetworkError),
        (429, {"Retry-After": "58"}, SessionLimitError),
        (500, {}, NetworkError),
        (503, {"Retry-After": "1"}, NetworkError),
    ],
)
@pytest.mark.parametrize("where", ["probe", "upload", "poll"])
def test_http_status_has_same_meaning_everywhere(make_session, peer, status, headers, kind, where):
    """A status has the same class, code, reason and ``Retry-After`` in a probe, upload or poll."""
    client = make_session()
    if where != "probe":
        client.connect()
        client.send()
    peer.answers["POST" if where == "upload" else "GET"] = [
        (status, headers, b'{"detail":"as scripted"}')
    ]
    act = {
        "probe": client.connect,
        "upload": client.send,
        "poll": lambda: client.transport.receive(10.0),
    }[where]
    with pytest.raises(kind, match="as scripted") as caught:
        act()
    assert type(caught.value) is kind
    assert caught.value.code == status
    assert caught.value.retry_after == (
        float(headers["Retry-After"]) if "Retry-After" in headers else None
    )
    assert not any(request.path == "/" for request in peer.requests)


def test_rejected_token_names_setting(make_session):
    """A token that the brain rejects names the setting."""
    with pytest.raises(AuthenticationRejectedError, match="Z4J_TOKEN"):
        make_session(token="wrong").connect()


@pytest.mark.parametrize("body", [b"<html>Blocked</html>", b"[]", b"", b"\xff", b"[" * 50_000])
def test_response_of_proxy_is_protocol_error(make_session, peer, body):
    """A proxy's page in place of a response is a protocol error that says so."""
    client = make_session()
    peer.answers["GET"] = [(200, {}, body)]
    with pytest.raises(RemoteProtocolError, match="proxy"):
        client.connect()
    second = make_session()
    second.connect()
    peer.answers["POST"] = [(200, {}, body)]
    with pytest.raises(RemoteProtocolError, match="proxy"):
        second.send()
    peer.answers["GET"] = [(200, {}, body)]
    with pytest.raises(RemoteProtocolError, match="proxy"):
        second.transport.receive(5.0)


def test_closed_port_raises_network_error(backend, peer, make_session):
    """A closed port raises ``NetworkError``."""
    peer.stop()
    with pytest.raises(NetworkError, match="cannot reach the brain"):
        make_session().connect()


# -- uploads


def test_upload_carries_one_signed_frame(connected, peer):
    """One POST carries one signed frame as a string, and its return is the ack."""
    connected.send(b'{"events":[{"n":"caf\xc3\xa9 \\" \\\\"}]}')
    (request,) = peer.of("POST")
    assert request.headers["content-type"] == "application/json"
    assert request.nonce == connected.session.hello_ack.session_id
    assert peer.events() == [{"n": 'café " \\'}]


def test_concurrent_uploads_keep_signature_order(connected, peer, backend):
    """Concurrent uploads run one at a time, in the order of their signatures."""
    peer.post_delay = 0.02
    tasks = [backend.spawn(connected.send, name=f"sender-{number}") for number in range(8)]
    assert all(task.join(20) for task in tasks)
    (session,) = peer.sessions.values()
    assert [frame.seq for frame in session.frames] == list(range(1, 9))


def test_rejected_frame_raises_with_reason(connected, peer):
    """A response of 200 that did not accept the frame is an error with the brain's reason."""
    peer.answers["POST"] = [
        (200, {}, b'{"accepted":0,"rejected":1,"errors":["busy"],"error_code":null}')
    ]
    with pytest.raises(NetworkError, match="busy"):
        connected.send()


def test_upload_without_response_raises(connected, peer):
    """A connection that breaks after the request leaves the frame unacknowledged."""
    peer.drop_posts = 1
    with pytest.raises(NetworkError):
        connected.send()


def test_rejected_first_signature_names_secret_and_clock(make_session, peer):
    """A 409 to the first frame of a nonce is an authentication error with two hints."""
    client = make_session(secret=bytes(32))
    client.connect()
    with pytest.raises(AuthenticationRejectedError, match=r"Z4J_HMAC_SECRET.*clock"):
        client.send()
    peer.errors.clear()  # the wrong signature was intended


def test_body_limit_is_halved_and_kept_for_next_session(make_session, peer):
    """413 halves the limit until a body fits.

    The session continues, and the next one keeps the limit.
    """
    peer.body_limit = 8192
    client = make_session()
    assert client.connect().max_frame_bytes > 100_000
    with pytest.raises(FrameTooLargeError) as caught:
        client.send(event_batch([b'"%s"' % (b"x" * 90_000)]))
    while (limit := caught.value.limit) > 8192:
        with pytest.raises(FrameTooLargeError) as caught:
            client.send(event_batch([b'"%s"' % (b"x" * (limit - 1000))]))
    client.send(event_batch([b'{"x":"%s"}' % (b"x" * 7000)]))
    assert client.limits.body_limit == 8192
    before = len(peer.requests)
    second = make_session(limits=client.limits)
    assert 8000 < second.connect().max_frame_bytes < 8192
    with pytest.raises(FrameTooLargeError) as caught:
        second.send(event_batch([b'"%s"' % (b"x" * 8000)]))
    assert (caught.value.limit, len(peer.requests)) == (8192, before + 1)


def test_body_limit_includes_json_escapes(make_session, peer):
    """The limit applies to the body with the escapes of its JSON string."""
    client = make_session(limits=LearnedLimits(body_limit=8192))
    client.connect()
    with pytest.raises(FrameTooLargeError) as caught:
        client.send(event_batch([b'{"k":"v"}'] * 600))
    assert caught.value.size > 8192 > len(event_batch([b'{"k":"v"}'] * 600))
    assert peer.of("POST") == []


def test_broken_large_upload_halves_unproven_limit(connected, peer):
    """A connection that breaks during a large upload halves a limit above 8 KiB."""
    peer.drop_posts = 100
    for _ in range(8):
        with pytest.raises(NetworkError):
            connected.send(
                event_batch([b'"%s"' % (b"x" * min(90_000, connected.limits.body_limit - 1000))])
            )
    assert connected.limits.body_limit == 8192


@pytest.mark.parametrize("size", [2, 8192, 8193, BODY_LIMIT_INITIAL])
def test_rejected_body_size_exceeds_new_limit(size):
    """After a rejection the limit is below the rejected size, or at its minimum."""
    limits = LearnedLimits()
    limits.reject_body(size)
    assert limits.body_limit < size or limits.body_limit == longpoll.BODY_LIMIT_MIN


def test_token_bucket_limits_rate_after_burst():
    """After a burst the rate stays below half of the brain's limit for one address."""
    bucket, now, sent = TokenBucket(), 0.0, 0
    while now < 60:
        now += bucket.take(now)
        sent += 1
    assert 250 < sent <= 335
    assert TokenBucket().take(0.0) == 0.0


# -- polls


def test_receive_returns_polled_commands_in_order(connected, peer, until):
    """The commands of one poll are returned one by one, in order, and verify under the nonce."""
    ids = [peer.command("retry_task") for _ in range(5)]
    got = []
    while len(got) < 5:
        message = connected.transport.receive(10.0)
        assert message is not None
        got.append(connected.session.verify(message).id)
    assert got == ids
    polls = [request for request in peer.of("GET") if request.query["max_frames"] != "0"]
    assert polls[0].query == {"wait": "30", "max_frames": "50"}
    assert polls[0].headers["x-z4j-retry-contracts"] == "celery=1,rq=1"


def test_receive_timeout_does_not_end_poll(connected, peer):
    """A receive times out by its own timeout while the poll continues."""
    assert connected.transport.receive(0.05) is None
    assert connected.transport.receive(0.05) is None
    assert len([request for request in peer.of("GET") if request.query["max_frames"] != "0"]) <= 1


def test_upload_during_poll_succeeds(connected, peer, until):
    """A frame is uploaded while a poll is waiting."""
    connected.transport.receive(0.01)
    until(lambda: peer.polling)
    connected.send()
    assert peer.polling


def test_abort_ends_receive_and_poll(connected, peer, backend, until):
    """``abort`` from another task ends a waiting receive at once, and the poll with it."""
    ended = []

    def read():
        with pytest.raises(NetworkError):
            connected.transport.receive(30.0)
        ended.append(backend.now())

    task = backend.spawn(read, name="reader")
    until(lambda: peer.polling)
    began = backend.now()
    connected.transport.abort()
    connected.transport.abort()
    assert task.join(10)
    assert ended[0] - began < 5
    assert connected.transport._poller.join(5)
    with pytest.raises(NetworkError):
        connected.send()


def test_abort_ends_upload(connected, peer, backend, until):
    """``abort`` ends an upload that has no response."""
    peer.post_delay = 20.0
    failed = []

    def write():
        with pytest.raises(NetworkError):
            connected.send()
        failed.append(True)

    task = backend.spawn(write, name="writer")
    until(lambda: peer.posting)
    connected.transport.abort()
    assert task.join(5)
    assert failed


def test_empty_polls_are_limited_to_one_per_second(connected, peer, backend, monkeypatch):
    """Immediate empty responses, as from a cache, are requested once a second at most."""
    peer.answers["GET"] = [(200, {}, b'{"frames":[]}')] * 50
    began = backend.now()
    while backend.now() - began < 1.2:
        connected.transport.receive(0.1)
    assert len(peer.answers["GET"]) >= 48


def test_gateway_timeout_shortens_polls(connected, peer):
    """After a 504 the next session's polls are shorter."""
    peer.answers["GET"] = [(504, {}, b"")]
    with pytest.raises(NetworkError, match="504"):
        connected.transport.receive(5.0)
    assert connected.limits.wait == 15


def test_drain_waits_for_poll_and_its_commands(connected, peer, backend, until, monkeypatch):
    """``drain`` waits for the current poll and its commands, and no other poll follows."""
    got = []

    def read():
        try:
            while True:
                message = connected.transport.receive(0.1)
                if message is not None:
                    got.append(connected.session.verify(message).id)
        except NetworkError:
            pass

    connected.limits.wait = 5
    reader = backend.spawn(read, name="reader")
    until(lambda: peer.polling)
    drained = backend.spawn(connected.transport.drain, name="drain")
    backend.sleep(0.1)
    assert drained.alive()
    identity = peer.command("retry_task")
    assert drained.join(10)
    until(lambda: got == [identity])
    polls = len(peer.of("GET"))
    connected.transport.receive(0.5)
    assert len(peer.of("GET")) == polls
    connected.transport.abort()
    assert reader.join(5)


# -- proxies, TLS and forks


def test_proxy_variables_apply_and_netrc_does_not(make_session, peer, monkeypatch, tmp_path):
    """A proxy variable and ``NO_PROXY`` apply, and a ``.netrc`` never replaces the token."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(NetworkError, match="ProxyError"):
        make_session().connect()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    make_session().connect()
    assert peer.requests[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_session_through_forward_proxy(make_session, peer, monkeypatch, backend):
    """Through a forward proxy the request has the full URL, and the session works."""
    monkeypatch.setenv("http_proxy", peer.url)
    monkeypatch.setattr(
        peer,
        "answer",
        lambda request: (
            200,
            {"X-Z4J-Agent-Id": AGENT, "X-Z4J-Project-Id": PROJECT},
            b'{"frames":[]}',
        ),
    )
    client = LongPollSession(peer, backend)
    client.transport = LongPollTransport(
        "http://brain.invalid/api/v1", lambda: TOKEN, backend, LearnedLimits()
    )
    client.connect()
    client.transport.close()
    assert peer.requests[0].headers["host"] == "brain.invalid"


@pytest.fixture
def tls_peer(backend, server_tls):
    created = HttpPeer(backend, tls=server_tls)
    yield created
    created.stop()


@pytest.fixture
def make_tls_session(tls_peer, backend):
    created = []

    def make(ca):
        client = LongPollSession(tls_peer, backend)
        client.transport = LongPollTransport(
            client.url, lambda: TOKEN, backend, client.limits, tls_context(ca, None, None)
        )
        created.append(client)
        return client

    yield make
    for client in created:
        client.transport.close()


def test_session_over_tls(make_tls_session, tls_peer, certificate):
    """Over TLS frames of any size are uploaded during a poll, and commands arrive."""
    client = make_tls_session(certificate)
    client.connect()
    client.transport.receive(0.01)
    for size in (10, 100_000):
        client.send(event_batch([b'{"x":"%s"}' % (b"x" * size)]))
    identity = tls_peer.command("retry_task")
    assert client.session.verify(client.transport.receive(10.0)).id == identity
    assert [len(event["x"]) for event in tls_peer.events()] == [10, 100_000]
    assert tls_peer.errors == []


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # raised by eventlet itself
def test_unknown_certificate_is_rejected_before_token(make_tls_session, tls_peer, certificate):
    """An untrusted certificate ends the connection before the token is sent."""
    with pytest.raises(NetworkError, match="certificate verify failed"):
        make_tls_session(None).connect()
    gc.collect()
    assert tls_peer.requests == []


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # raised by eventlet itself
def test_requests_adds_no_ca_certificates(
    make_tls_session, tls_peer, certificate, monkeypatch, tmp_path
):
    """Neither the bundle of ``requests`` nor its variables add CA certificates."""
    monkeypatch.setenv("CURL_CA_BUNDLE", str(certificate))
    client = make_tls_session(None)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with pytest.raises(NetworkError):
        client.connect()
    gc.collect()  # eventlet does not close a socket after a failed handshake
    client = make_tls_session(certificate)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    client.connect()
    assert len(client.transport._tls.get_ca_certs()) == 1


def test_tunnel_proxy_never_sees_token(
    make_tls_session, tls_peer, certificate, backend, monkeypatch
):
    """Over TLS a proxy sees CONNECT and its own credentials, but never the token."""
    tunnel = Tunnel(backend)
    try:
        monkeypatch.setenv("https_proxy", f"http://user:pass@127.0.0.1:{tunnel.port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        client = make_tls_session(certificate)
        client.connect()
        client.send()
        client.transport.close()
        assert tunnel.heads
        assert all(head.startswith(f"CONNECT 127.0.0.1:{tls_peer.port} ") for head in tunnel.heads)
        assert all(
            "Proxy-Authorization: Basic dXNlcjpwYXNz" in head and TOKEN not in head
            for head in tunnel.heads
        )
        assert tls_peer.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
        assert len(tls_peer.frames("event_batch")) == 1
    finally:
        tunnel.stop()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("idle", [0.0, 1.5], ids=["exits-at-once", "runs-its-hub"])
def test_forked_child_does_not_touch_connections(connected, peer, backend, until, mode, idle):
    """A child neither uses nor breaks its parent's connections, and the session continues."""
    if idle and mode == "eventlet":
        pytest.skip("eventlet's hub shares its epoll set with the child, so both hubs cannot run")
    connected.transport.receive(0.01)
    until(lambda: peer.polling)
    connected.send()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(20)
            time.sleep(idle)
            try:
                connected.send()
            except BaseException as error:
                code = 0 if type(error).__name__ == "ForkedChildError" else 2
            connected.transport.abort()
            connected.transport.close()
        finally:
            os._exit(code)
    identity = peer.command("retry_task")
    message = until(lambda: connected.transport.receive(0.1))
    connected.send()
    assert connected.session.verify(message).id == identity
    status = until(lambda: [code for found, code in [os.waitpid(pid, os.WNOHANG)] if found])
    assert status == [0]
    connected.send()
    assert [frame.seq for frame in peer.frames("event_batch")] == [1, 2, 3]


# -- the whole runtime


def an_event(number=0, **data):
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=f"t-{number}",
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=dt.datetime.now(dt.UTC),
        data={"number": number, **data},
    )


@pytest.fixture
def engine():
    return FakeEngine("retry_task", "retry_by_reference_v1", result={"done": True})


@pytest.fixture
def install(peer, engine, monkeypatch):
    """Starts agents that use long-poll, with short delays and without a rate limit."""
    for kind in list(backoff.BACKOFF_POLICIES):
        monkeypatch.setitem(backoff.BACKOFF_POLICIES, kind, backoff.BackoffPolicy(0.01, 0.05))
    monkeypatch.setattr(send, "POLL_BUSY", 0.05)
    monkeypatch.setattr(longpoll, "UPLOAD_RATE", 1000.0)
    peer.body_limit = 8192
    with installed_agents(peer, engine) as install:
        yield partial(install, transport="longpoll")


def test_agent_works_within_8_kib_bodies(install, peer, engine, until):
    """Heartbeats, events, commands and results work within a body limit of 8 KiB."""
    runtime = install()
    beat = until(lambda: peer.frames("heartbeat"))[0]
    assert beat.payload.adapter_health["z4j.transport"] == "longpoll"
    for number in range(300):
        runtime.record_event(an_event(number, text='say "hi" \\ to é'))
    until(lambda: all_acked(runtime, 300), 30)
    assert [event["data"]["number"] for event in peer.events()] == list(range(300))
    assert len(peer.frames("event_batch")) < 30
    identity = peer.command("retry_task", {"task_id": "t-1"})
    result = until(lambda: peer.frames("command_result"))[0]
    assert (result.id, result.payload.status, engine.calls) == (identity, "success", ["t-1"])
    assert max(len(request.body) for request in peer.of("POST")[8:]) <= 8192
    assert runtime.stats()["restarts"] == {}
    assert runtime.stats()["recut"] == 0


def test_large_event_is_truncated_and_counted(install, peer, until):
    """An event over the limit loses traceback, result and args as far as needed.

    It is marked and counted.
    """
    runtime = install()
    runtime.record_event(an_event(1, traceback="t" * 6000, result="r" * 4000, args=[1]))
    runtime.record_event(an_event(2, traceback='"' * 9000, result="r" * 9000, args=["a" * 9000]))
    runtime.record_event(an_event(3))
    until(lambda: all_acked(runtime, 3))
    first, second, third = (event["data"] for event in peer.events())
    assert "bytes cut" in first["traceback"]
    assert (first["result"], first["args"]) == ("r" * 4000, [1])
    assert all("bytes cut" in second[name] for name in ("traceback", "result", "args"))
    assert third == {"number": 3}
    until(lambda: runtime.stats()["recut"] == 2)
    assert runtime.stats()["lost"] == {}


def test_large_heartbeat_is_reduced_and_sent(install, peer, until, monkeypatch):
    """A heartbeat over the limit loses worker details in order, but is sent every time."""
    runtime = install()
    until(lambda: peer.frames("heartbeat"))
    agent = runtime._agent
    big = {
        "w1": {
            "active": [{"x": "y" * 50}] * 200,
            "registered": ["r"] * 3,
            "conf": {"timezone": "UTC"},
            "stats": {"pid": 7},
        }
    }
    huge = {"w1": {"stats": {"x": "y" * 9000}}}
    for details, left in (
        (big, {"w1": {"registered": ["r"] * 3, "conf": {"timezone": "UTC"}, "stats": {"pid": 7}}}),
        (huge, None),
    ):
        monkeypatch.setattr(
            agent.status.metrics,
            "_health",
            lambda details=details: {"stub.worker_details": json.dumps(details)},
        )
        before = len(peer.frames("heartbeat"))
        runtime.request_reconnect()
        beat = until(lambda before=before: peer.frames("heartbeat")[before:])[0]
        found = beat.payload.adapter_health.get("stub.worker_details")
        assert (json.loads(found) if found else None) == left
    assert beat.payload.adapter_health["z4j.cut"] == "worker_details"
    assert beat.payload.adapter_health["z4j.transport"] == "longpoll"
    until(lambda: runtime.stats()["recut"] == 2)


def test_commands_of_lost_session_are_executed(install, peer, engine, until):
    """All commands of a poll run although their session is lost.

    The next session sends their results.
    """
    runtime = install()
    # All uploads at the start of a session have been answered. The next one is a command_ack.
    until(
        lambda: (
            peer.frames("heartbeat")
            and peer.frames("agent_status")
            and peer.polling
            and not peer.posting
        )
    )
    until(lambda: runtime.stats()["heartbeats"])
    for session in peer.sessions.values():
        session.reject_posts = True
    ids = [peer.command("retry_task", {"task_id": f"t-{number}"}) for number in range(5)]
    until(lambda: len(peer.frames("command_result")) == 5)
    assert sorted(frame.id for frame in peer.frames("command_result")) == sorted(ids)
    assert sorted(engine.calls) == [f"t-{number}" for number in range(5)]


def test_redelivered_command_gets_same_result(install, peer, engine, until):
    """A command that is delivered again gets the same result and is not executed again."""
    install()
    identity = peer.command("retry_task", {"task_id": "t-1"})
    until(lambda: peer.frames("command_result"))
    assert peer.command("retry_task", {"task_id": "t-1"}, identity=identity) == identity
    until(lambda: len(peer.frames("command_result")) == 2)
    first, second = peer.frames("command_result")
    assert (first.id, first.payload) == (second.id, second.payload)
    assert engine.calls == ["t-1"]


def test_large_result_becomes_summary(install, peer, engine, until):
    """A result over the limit keeps its status and numbers, and reports the reason."""
    engine.result = {"rows": ["x" * 100] * 200, "done": 200}
    install()
    identity = peer.command("retry_task", {"task_id": "t-1"})
    result = until(lambda: peer.frames("command_result"))[0]
    assert (result.id, result.payload.status) == (identity, "success")
    assert result.payload.result.pop("why").endswith("bytes, more than this transport takes")
    assert result.payload.result == {"shortened": True, "done": 200}


def test_lost_session_is_replaced_after_409(install, peer, until):
    """After a 409 a new nonce is probed, and the events are sent again with the same id."""
    runtime = install()
    until(lambda: peer.frames("heartbeat"))
    for session in list(peer.sessions.values()):
        session.invalidated = True
    event = an_event(1)
    runtime.record_event(event)
    until(lambda: all_acked(runtime, 1))
    assert [sent["id"] for sent in peer.events()] == [str(event.id)]
    assert len(peer.sessions) >= 2
    assert "HTTP 409" in runtime.stats()["last_error"] or not runtime.stats()["last_error"]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b"{}"),
        (403, b"blocked by the firewall"),
        (409, b"{}"),
        (422, b"{}"),
        (200, b'{"accepted":0,"error_code":"scheduler_upgrade_required"}'),
    ],
    ids=["400", "403", "409", "422", "error-code"],
)
def test_poison_upload_is_dropped_and_counted(install, peer, engine, until, caplog, status, body):
    """An event or result whose upload always fails is dropped and counted."""
    answer, events = peer.answer, [an_event(number) for number in range(12)]
    engine.result = {"say": "hemlock"}
    marks = [b"hemlock", str(events[5].id).encode()]

    def reject_marked(request):
        return (
            (status, {}, body)
            if request.method == "POST" and any(mark in request.body for mark in marks)
            else answer(request)
        )

    peer.answer = reject_marked
    runtime = install()
    until(lambda: peer.frames("heartbeat") and peer.polling)
    identity = peer.command("retry_task", {"task_id": "t-1"})
    until(
        lambda: engine.calls
    )  # in the first session, because a poll of a lost session would take the command
    for event in events:
        runtime.record_event(event)
    until(lambda: all_acked(runtime, 11) and runtime.stats()["lost"] == {"poison": 2})
    assert sorted({event["data"]["number"] for event in peer.events()}) == [
        number for number in range(12) if number != 5
    ]
    dropped = [
        record.getMessage() for record in caplog.records if "cannot accept" in record.getMessage()
    ]
    assert (
        sum("task 't-5'" in line for line in dropped)
        == sum(f"the result of command {identity}" in line for line in dropped)
        == 1
    )
    assert runtime.stats()["restarts"] == {}


def test_upload_without_response_is_repeated(install, peer, until):
    """An event without a response is sent again with the same id in a new session."""
    runtime = install()
    until(lambda: peer.frames("heartbeat"))
    event = an_event(1)
    peer.drop_posts = 1
    runtime.record_event(event)
    until(lambda: all_acked(runtime, 1))
    assert {sent["id"] for sent in peer.events()} == {str(event.id)}


def test_stop_is_bounded_during_poll(install, peer, backend, until):
    """A waiting poll does not delay ``stop()``, and recorded events are delivered."""
    runtime = install()
    until(lambda: peer.polling)
    runtime.record_event(an_event(1))
    began = backend.now()
    runtime.stop(timeout=5)
    assert backend.now() - began < 5
    assert len(peer.events()) == 1


def test_log_contains_no_secret(install, peer, until, caplog):
    """The log has neither the token nor the secret, not even at DEBUG."""
    caplog.set_level(logging.DEBUG)
    runtime = install()
    runtime.record_event(an_event(1))
    until(lambda: all_acked(runtime, 1))
    assert TOKEN not in caplog.text
    assert SECRET_TEXT not in caplog.text


def test_empty_batches_replace_disabled_heartbeats(install, peer, until, monkeypatch):
    """With heartbeats disabled the agent sends empty batches, as over WebSocket."""
    monkeypatch.setenv("Z4J_HEARTBEAT", "off")
    monkeypatch.setattr(heartbeat, "KEEPALIVE_INTERVAL", 0.1)
    install()
    until(lambda: len(peer.frames("event_batch")) >= 2)
    assert peer.frames("heartbeat") == []
