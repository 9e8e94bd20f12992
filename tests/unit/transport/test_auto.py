"""The fallback policy without I/O, and the runtime behind a proxy that blocks WebSocket."""

import base64
import datetime as dt
import hashlib
import itertools
import logging
import re
import socket
from contextlib import suppress
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from z4j_core.models import Event, EventKind

from tests.support.agents import installed_agents
from tests.support.engines import FakeEngine
from tests.support.http_peer import HttpPeer, relay
from tests.support.listener import GoneError, Listener, recv_some
from tests.support.peer import GUID, Peer, all_acked
from z4j_bare.errors import (
    AgentError,
    AuthenticationRejectedError,
    HostConfigurationError,
    IncompatibleError,
    NetworkError,
    UnavailableError,
)
from z4j_bare.pipeline import send
from z4j_bare.settings import load_settings
from z4j_bare.transport import auto as fallback
from z4j_bare.transport import longpoll, websocket
from z4j_bare.transport.auto import (
    LONGPOLL,
    PROBE_DELAY_INITIAL,
    PROBE_DELAY_MAX,
    WS,
    AutoTransport,
    FallbackPolicy,
)
from z4j_bare.wire import backoff

RESET = NetworkError("reset")
BLOCKED = [NetworkError("HTTP", code=status) for status in (200, 302, 400, 404, 405, 426)]
BLOCKED += [AuthenticationRejectedError("HTTP", code=status) for status in (401, 403)]
NOT_BLOCKED = [
    AuthenticationRejectedError("close", code=4401),
    IncompatibleError("close", code=4426),
    NetworkError("close", code=1012),
    NetworkError("close", code=4429),
    NetworkError("HTTP", code=429),
    UnavailableError("refused"),
    HostConfigurationError("no token file"),
]
WEAK = [RESET, *(NetworkError("HTTP", code=status) for status in (500, 502, 503, 504))]
WEAK += [NetworkError("close", code=code) for code in (1000, 1001, 1002, 1008)]


def reachable():
    return True


def unreachable():
    return False


# -- the policy


@pytest.mark.parametrize("error", BLOCKED, ids=lambda error: error.code)
def test_http_status_for_upgrade_causes_fallback(error):
    """One status other than 101 selects long-poll, provided the health route answers."""
    policy = FallbackPolicy()
    assert not policy.on_websocket_failure(error, 0, unreachable)
    assert policy.next_transport(1) == WS
    assert policy.on_websocket_failure(error, 1, reachable)
    assert policy.next_transport(2) == LONGPOLL


@pytest.mark.parametrize("error", WEAK, ids=lambda error: error.code)
def test_repeated_reset_causes_fallback(error):
    """A server error, reset, timeout or a proxy's close code selects long-poll the second time."""
    policy = FallbackPolicy()
    assert not policy.on_websocket_failure(error, 0, reachable)
    assert policy.on_websocket_failure(error, 1, reachable)
    assert policy.next_transport(2) == LONGPOLL


@pytest.mark.parametrize("error", NOT_BLOCKED, ids=lambda error: type(error).__name__)
def test_failure_without_indication_keeps_websocket(error):
    """A code of the brain, no connection or a wrong setting keeps WebSocket and ends a series."""
    policy = FallbackPolicy()
    for now in range(10):
        assert not policy.on_websocket_failure(RESET, now, reachable)
        assert not policy.on_websocket_failure(error, now, reachable)


def test_unreachable_brain_keeps_websocket():
    """While the health route fails as well, WebSocket is kept after any number of failures."""
    policy = FallbackPolicy()
    assert not any(policy.on_websocket_failure(RESET, now, unreachable) for now in range(20))
    assert policy.next_transport(20) == WS


def test_session_resets_failure_count():
    """Two resets with a session between them do not select long-poll."""
    policy = FallbackPolicy()
    policy.on_websocket_failure(RESET, 0, reachable)
    policy.on_connected(WS, 1)
    assert not policy.on_websocket_failure(RESET, 2, reachable)


def test_websocket_is_retried_at_growing_intervals():
    """WebSocket is tried again after one minute, then two, up to one hour."""
    policy, now, waits = FallbackPolicy(), 0.0, []
    policy.on_websocket_failure(BLOCKED[0], now, reachable)
    for _ in range(9):
        waits.append(policy.next_probe_at - now)
        now = policy.next_probe_at
        assert policy.next_transport(now - 0.1) == LONGPOLL
        assert policy.next_transport(now) == WS
        assert policy.on_websocket_failure(RESET, now, unreachable)
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_websocket_session_ends_fallback():
    """A session over WebSocket ends the fallback, and a later one starts again at one minute."""
    policy = FallbackPolicy()
    policy.on_websocket_failure(BLOCKED[0], 0, reachable)
    policy.postpone_probe(60)
    policy.on_connected(WS, 200)
    assert policy.next_transport(201) == WS
    policy.on_websocket_failure(BLOCKED[0], 10_000, reachable)
    assert policy.next_probe_at == 10_000 + PROBE_DELAY_INITIAL


def test_brief_websocket_sessions_keep_interval_growing():
    """If WebSocket works only briefly, the intervals continue to grow."""
    policy = FallbackPolicy()
    now = 0.0
    policy.on_websocket_failure(BLOCKED[0], now, reachable)
    for _ in range(12):
        now = policy.next_probe_at
        policy.postpone_probe(now)
        policy.on_connected(WS, now)
        now += 1
        assert policy.on_websocket_failure(BLOCKED[0], now, reachable)
    assert policy.next_probe_at - now == PROBE_DELAY_MAX


def test_rejected_long_poll_returns_to_websocket():
    """If long-poll is rejected by a proxy or for the token, WebSocket is tried next."""
    for error in (AuthenticationRejectedError("x", code=401), NetworkError("x", code=404)):
        policy = FallbackPolicy()
        policy.on_websocket_failure(BLOCKED[0], 0, reachable)
        policy.on_longpoll_failure(error)
        assert policy.next_transport(1) == WS
    policy.on_websocket_failure(BLOCKED[0], 0, reachable)
    policy.on_longpoll_failure(NetworkError("x", code=503))
    policy.on_longpoll_failure(RESET)
    assert policy.next_transport(1) == LONGPOLL


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["fail", "poll", "hello_ack", "probe_failed"]),
            st.sampled_from([RESET, *BLOCKED, *NOT_BLOCKED]),
            st.booleans(),
            st.floats(0, 5000),
        )
    )
)
def test_websocket_is_retried_within_an_hour_after_any_steps(steps):
    """After any steps, WebSocket is either in use or tried again within an hour."""
    policy, now = FallbackPolicy(), 0.0
    for what, error, healthy, seconds in steps:
        now += seconds
        if what == "fail" and policy.next_transport(now) == WS:
            policy.on_websocket_failure(error, now, lambda healthy=healthy: healthy)
        elif what == "poll" and policy.next_transport(now) == LONGPOLL:
            policy.on_longpoll_failure(error)
        elif what == "hello_ack":
            policy.on_connected(policy.next_transport(now), now)
        elif what == "probe_failed" and policy.name == LONGPOLL:
            policy.postpone_probe(now)
        assert policy.name == WS or policy.next_probe_at <= now + PROBE_DELAY_MAX


@pytest.mark.parametrize("preference", [WS, LONGPOLL])
def test_forced_transport_is_never_left(preference):
    """``ws`` and ``longpoll`` are kept, whatever fails."""
    policy = FallbackPolicy(preference)
    for error in (*BLOCKED, RESET):
        assert not policy.on_websocket_failure(error, 0, reachable)
        policy.on_longpoll_failure(error)
        assert policy.next_transport(1e9) == preference


# -- the choice at a connect


class Clock:
    """The part of a backend that the choice needs."""

    def __init__(self):
        self.seconds = 0.0

    def now(self):
        return self.seconds


class ScriptedTransport:
    """A transport whose ``connect`` returns or raises what the world says at that moment."""

    synchronous_acks = False

    def __init__(self, world, name):
        self.name = name
        self._world = world

    def connect(self, hello):
        self._world.attempts.append(self.name)
        outcome = self._world.outcome(self.name)
        if outcome is not None:
            raise outcome
        return b"hello_ack"

    def close(self):
        pass


class World:
    """A factory of scripted transports, and the brain's health route.

    Each connect and each request to the health route takes the next of ``durations``, in seconds.
    """

    def __init__(self, durations):
        self.policy = FallbackPolicy()
        self.clock = Clock()
        self.attempts = []
        self._durations = durations

    def websocket(self):
        return ScriptedTransport(self, WS)

    def longpoll(self):
        return ScriptedTransport(self, LONGPOLL)

    def is_reachable(self):
        return self._after_step(self.is_up)

    def outcome(self, name):
        return self._after_step(lambda: self.result(name))

    def _after_step(self, function):
        outcome = function()
        self.clock.seconds += self._durations()
        return outcome

    def connect(self):
        """Connect as the session does; return the name of the transport, ``None`` if it failed."""
        transport = AutoTransport(self, self.clock)
        try:
            transport.connect(b"hello")
        except AgentError:
            return None
        return transport.name


class RestartingBrain(World):
    """A brain that is down until ``up_at``, behind a proxy that passes WebSocket."""

    def __init__(self, durations, up_at, failures):
        super().__init__(durations)
        self._up_at = up_at
        self._failures = failures

    def is_up(self):
        return self.clock.now() >= self._up_at

    def result(self, name):
        return None if self.is_up() else self._failures()


class BlockingProxy(World):
    """A proxy that fails every upgrade, in front of a brain that works over long-poll."""

    def __init__(self, failures):
        super().__init__(lambda: 0.1)
        self._failures = failures

    def is_up(self):
        return True

    def result(self, name):
        return self._failures() if name == WS else None


@given(st.data())
def test_restart_of_brain_never_causes_fallback(data):
    """However connects fail during a restart, the first session is over WebSocket.

    The brain can come back at any moment, also between a failed connect and the health request.
    """
    failures = st.sampled_from([*WEAK, *BLOCKED, UnavailableError("refused")])
    durations = st.sampled_from([0.01, 1.0, 5.0, 10.0])
    brain = RestartingBrain(
        lambda: data.draw(durations),
        data.draw(st.sampled_from([0.0, 3.0, 10.0, 25.0])),
        lambda: data.draw(failures),
    )
    for _ in range(30):
        connected = brain.connect()
        if connected:
            break
        brain.clock.seconds += 1.0  # the delay of the reconnect loop
    assert connected == WS
    assert LONGPOLL not in brain.attempts


@given(st.lists(st.sampled_from([*WEAK, *BLOCKED]), min_size=1))
def test_blocked_websocket_causes_fallback_at_second_connect(failures):
    """However a proxy blocks WebSocket, the second connect ends in a long-poll session."""
    failures = itertools.cycle(failures)
    proxy = BlockingProxy(lambda: next(failures))
    assert LONGPOLL in (proxy.connect(), proxy.connect())
    assert proxy.policy.name == LONGPOLL


@given(st.lists(st.sampled_from(NOT_BLOCKED[:-1]), min_size=1))
def test_failures_without_indication_never_cause_fallback(failures):
    """A refused connection, a silent brain or a code of the brain never leads to long-poll."""
    failures = itertools.cycle(failures)
    brain = BlockingProxy(lambda: next(failures))
    assert [brain.connect() for _ in range(10)] == [None] * 10
    assert LONGPOLL not in brain.attempts


def test_fallback_needs_working_long_poll():
    """If long-poll fails as well, the agent stays with WebSocket and reports the first failure."""
    proxy = BlockingProxy(lambda: BLOCKED[0])
    proxy.result = lambda name: BLOCKED[0] if name == WS else NetworkError("HTTP", code=503)
    transport = AutoTransport(proxy, proxy.clock)
    with pytest.raises(NetworkError) as caught:
        transport.connect(b"hello")
    assert caught.value is BLOCKED[0]
    assert proxy.policy.next_transport(1e9) == WS


def test_rejection_over_long_poll_is_reported():
    """If the brain rejects the token over long-poll, this error is reported."""
    proxy = BlockingProxy(lambda: BLOCKED[0])
    rejected = AuthenticationRejectedError("token", code=401)
    proxy.result = lambda name: BLOCKED[0] if name == WS else rejected
    with pytest.raises(AuthenticationRejectedError):
        AutoTransport(proxy, proxy.clock).connect(b"hello")
    assert proxy.policy.name == WS


# -- the setting


def test_transport_setting_and_keyword(monkeypatch):
    """``Z4J_TRANSPORT`` is read, and a keyword overrides it."""
    assert load_settings().transport == "auto"
    monkeypatch.setenv("Z4J_TRANSPORT", "longpoll")
    assert load_settings().transport == "longpoll"
    assert load_settings(transport="ws").transport == "ws"


# -- the runtime behind a proxy


class ProxyGate:
    """A proxy in front of two peers that forwards WebSocket or blocks it.

    ``block`` is a status with which it answers upgrades, ``reset``, ``silent`` (it disconnects
    during the upgrade), ``closed`` (it disconnects after it) or ``None``. The next ``failing``
    connections of either kind get status 503, as while the brain restarts.
    """

    def __init__(self, backend, ws_peer, http_peer):
        self.backend = backend
        self.block = None
        self.failing = 0
        self.upgrades = 0
        self._ports = {"ws": ws_peer.listener.port, "http": http_peer.port}
        self._door = Listener(backend, self._pass, name="gate")
        self.url = self._door.url

    def stop(self):
        self._door.stop()

    def _pass(self, sock):
        head = b""
        try:
            while b"\r\n\r\n" not in head:
                head += recv_some(self.backend, sock)
            upgrade = b"upgrade: websocket" in head.lower()
            self.upgrades += upgrade
            if self.failing:
                self.failing -= 1
                self._answer(sock, 503)
            elif upgrade and isinstance(self.block, int):
                self._answer(sock, self.block)
            elif upgrade and self.block == "closed":
                sock.send(switching_protocols(head))
            elif upgrade and self.block == "reset":
                pass
            else:
                self._join(
                    sock,
                    head,
                    "ws" if upgrade else "http",
                    silent=upgrade and self.block == "silent",
                )
        except (GoneError, OSError):
            pass
        finally:
            sock.close()

    @staticmethod
    def _answer(sock, status):
        sock.send(
            b"HTTP/1.1 %d Blocked\r\nContent-Length: 7\r\nConnection: close\r\n\r\nBlocked" % status
        )

    def _join(self, sock, head, kind, *, silent):
        with socket.create_connection(("127.0.0.1", self._ports[kind])) as inner:
            inner.settimeout(0)
            self._door.socks.append(inner)
            inner.send(head)
            relay(self.backend, sock, inner, 1 if silent else None)


def switching_protocols(head):
    """Return the response that accepts the upgrade request ``head``."""
    key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)[1]
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def an_event(number):
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=f"t-{number}",
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=dt.datetime.now(dt.UTC),
        data={"number": number},
    )


@pytest.fixture
def peers(backend):
    created = Peer(backend), HttpPeer(backend)
    yield created
    for peer in created:
        peer.stop()


@pytest.fixture
def gate(backend, peers):
    created = ProxyGate(backend, *peers)
    yield created
    created.stop()


@pytest.fixture
def install(gate, monkeypatch):
    for kind in list(backoff.BACKOFF_POLICIES):
        monkeypatch.setitem(backoff.BACKOFF_POLICIES, kind, backoff.BackoffPolicy(0.01, 0.05))
    monkeypatch.setattr(send, "POLL_BUSY", 0.05)
    monkeypatch.setattr(longpoll, "UPLOAD_RATE", 1000.0)
    monkeypatch.setattr(longpoll, "POLL_WAIT", 1)
    with installed_agents(gate, FakeEngine("retry_task")) as install:
        yield install


@pytest.mark.parametrize("block", [200, 403, 404, 426, "reset", "silent", "closed"])
def test_agent_falls_back_behind_blocking_proxy(install, gate, peers, until, caplog, block):
    """Behind each kind of proxy the agent connects over long-poll, and log and heartbeat say so."""
    caplog.set_level(logging.INFO, "z4j")
    gate.block = block
    _, http_peer = peers
    runtime = install()
    runtime.record_event(an_event(1))
    beat = until(lambda: http_peer.frames("heartbeat"))[0]
    assert beat.payload.adapter_health["z4j.transport"] == "longpoll"
    until(lambda: all_acked(runtime, 1))
    assert len(http_peer.events()) == 1
    assert caplog.text.count("falling back to long-poll") == 1
    assert "connected over longpoll" in caplog.text or "connected again" in caplog.text
    assert http_peer.errors == []


def test_restarting_brain_is_not_left_for_long_poll(install, gate, peers, until):
    """While a brain behind a proxy restarts, status 503 for both kinds keeps WebSocket."""
    ws_peer, http_peer = peers
    gate.failing = 7
    install()
    until(lambda: ws_peer.last and ws_peer.last.of("heartbeat"))
    assert http_peer.sessions == {}


@pytest.mark.parametrize("block", [404, 503, "reset", "closed"])
def test_upgrade_that_works_again_keeps_websocket(install, gate, peers, until, monkeypatch, block):
    """If the upgrade works again once the health route answers, no long-poll session begins."""
    ws_peer, http_peer = peers
    gate.block = block
    is_reachable = fallback.TransportFactory.is_reachable

    def unblock(factory):
        gate.block = None
        return is_reachable(factory)

    monkeypatch.setattr(fallback.TransportFactory, "is_reachable", unblock)
    install()
    until(lambda: ws_peer.last and ws_peer.last.of("heartbeat"))
    assert http_peer.sessions == {}


def test_brain_that_answers_hello_late_keeps_websocket(install, gate, peers, until, monkeypatch):
    """A silent brain is no sign of a blocked WebSocket. Its late ``hello_ack`` starts a session."""
    monkeypatch.setattr(websocket, "CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(websocket, "HELLO_TIMEOUT", 0.6)
    ws_peer, http_peer = peers
    delays = iter([2.0, 2.0, 2.0])

    def answer_late(session):
        ws_peer.backend.sleep(next(delays, 0.4))
        with suppress(OSError):
            session.hello_ack()

    ws_peer.on_hello = answer_late
    runtime = install()
    until(lambda: "Z4J_TRANSPORT=longpoll" in runtime.stats()["last_error"])
    until(lambda: ws_peer.last and ws_peer.last.of("heartbeat"))
    assert len(ws_peer.sessions) == 4
    assert http_peer.requests == []


@pytest.mark.thorough
def test_changes_of_transport_lose_no_event(install, gate, peers, until, monkeypatch, caplog):
    """When the transport changes under load, every event arrives once and in order."""
    caplog.set_level(logging.INFO, "z4j")
    monkeypatch.setattr(fallback, "PROBE_DELAY_INITIAL", 0.3)
    monkeypatch.setattr(fallback, "PROBE_DELAY_MAX", 0.5)
    ws_peer, http_peer = peers
    gate.block = 403
    runtime = install()
    numbers = iter(range(10_000))
    for _ in range(100):
        runtime.record_event(an_event(next(numbers)))
    until(lambda: http_peer.frames("heartbeat") and all_acked(runtime, 100))
    http_peer.command("retry_task", {"task_id": "t-1"})
    until(lambda: http_peer.frames("command_result"))
    upgrades = gate.upgrades
    until(lambda: gate.upgrades > upgrades)
    gate.block = None
    for _ in range(100):
        runtime.record_event(an_event(next(numbers)))
    session = until(lambda: ws_peer.last and ws_peer.last.frames and ws_peer.last, 20)
    assert until(lambda: session.of("heartbeat"))[0].payload.adapter_health["z4j.transport"] == "ws"
    for _ in range(100):
        runtime.record_event(an_event(next(numbers)))
    until(lambda: all_acked(runtime, 300))
    sent = [event["data"]["number"] for event in [*http_peer.events(), *ws_peer.events()]]
    assert sent == list(range(300))
    assert "WebSocket works again" in caplog.text
    gate.block = 403
    session.drop()
    before = len(http_peer.frames("heartbeat"))
    until(lambda: len(http_peer.frames("heartbeat")) > before)
    assert http_peer.errors == []


def test_rejected_token_keeps_websocket(install, gate, peers, until):
    """Close code 4401 keeps the agent on WebSocket, because the brain sent it."""
    ws_peer, http_peer = peers
    ws_peer.token = "another"
    runtime = install()
    until(lambda: len(ws_peer.sessions) >= 4)
    assert "Z4J_TOKEN" in runtime.stats()["last_error"]
    assert http_peer.requests == []


@pytest.mark.parametrize("transport", ["ws", "longpoll"])
def test_forced_transport_is_used_from_first_attempt(install, gate, peers, until, transport):
    """A forced transport is used from the first attempt, and the other one never."""
    ws_peer, http_peer = peers
    install(transport=transport)
    used, unused = (ws_peer, http_peer) if transport == "ws" else (http_peer, ws_peer)
    until(lambda: used.frames("heartbeat"))
    assert not unused.sessions


def test_unknown_transport_raises_at_install(install):
    """An unknown transport raises an error at installation."""
    with pytest.raises(Exception, match=r"(?i)transport"):
        install(transport="pigeon")


def test_stop_is_bounded_while_connecting(install, gate, peers, until, backend, monkeypatch):
    """``stop()`` is bounded while neither transport connects."""
    monkeypatch.setattr(websocket, "CONNECT_TIMEOUT", 3.0)
    gate.block = "reset"
    _, http_peer = peers
    http_peer.answers["GET"] = [(503, {}, b"{}")] * 1000
    runtime = install()
    until(lambda: len(http_peer.requests) >= 2)
    began = backend.now()
    runtime.stop(timeout=5)
    assert backend.now() - began < 6
