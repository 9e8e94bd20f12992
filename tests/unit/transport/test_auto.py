"""Which transport is used when: the policy without I/O, then the runtime behind a gate that blocks WebSocket."""

import datetime as dt
import logging
import socket
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from z4j_core.models import CommandResult, Event, EventKind

from tests.support.http_peer import HttpPeer, join
from tests.support.listener import GoneError, Listener, some
from tests.support.peer import SECRET_TEXT, TOKEN, Peer, settled
from z4j_bare import _process_singleton, install_agent
from z4j_bare.errors import (
    AuthenticationRejectedError,
    HostConfigurationError,
    IncompatibleError,
    NetworkError,
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
    FallbackPolicy,
)
from z4j_bare.wire import backoff

RESET = NetworkError("reset")
BLOCKED = [NetworkError("HTTP", code=status) for status in (200, 302, 400, 404, 405, 426)]
BLOCKED += [AuthenticationRejectedError("HTTP", code=status) for status in (401, 403)]
SPEAKS = [
    AuthenticationRejectedError("close", code=4401),
    IncompatibleError("close", code=4426),
    NetworkError("close", code=1012),
    NetworkError("close", code=4429),
    NetworkError("HTTP", code=429),
    HostConfigurationError("no token file"),
]


def yes():
    return True


def no():
    return False


# -- the policy


@pytest.mark.parametrize("error", BLOCKED, ids=lambda error: error.code)
def test_an_http_answer_to_the_upgrade_is_plain(error):
    """One answer other than 101 makes long-poll the choice, provided the health route answers."""
    policy = FallbackPolicy()
    assert not policy.on_websocket_failure(error, 0, no)
    assert policy.next_transport(1) == WS
    assert policy.on_websocket_failure(error, 1, yes)
    assert policy.next_transport(2) == LONGPOLL


@pytest.mark.parametrize("error", [RESET, NetworkError("HTTP", code=502)], ids=["reset", "502"])
def test_resets_have_to_repeat(error):
    """A server error, reset, time-out or death before hello_ack counts when it comes twice in a row with a healthy brain."""
    policy = FallbackPolicy()
    assert not policy.on_websocket_failure(error, 0, yes)
    assert policy.on_websocket_failure(error, 1, yes)
    assert policy.next_transport(2) == LONGPOLL


@pytest.mark.parametrize("error", SPEAKS, ids=lambda error: type(error).__name__)
def test_who_closes_with_a_code_speaks_websocket(error):
    """A close code of the brain's, or a mistake of our own, never leads away from WebSocket, and ends a row of resets."""
    policy = FallbackPolicy()
    for now in range(10):
        assert not policy.on_websocket_failure(RESET, now, yes)
        assert not policy.on_websocket_failure(error, now, yes)


def test_a_brain_that_is_down_is_no_proxy():
    """While the health route does not answer either, nothing changes however often it fails."""
    policy = FallbackPolicy()
    assert not any(policy.on_websocket_failure(RESET, now, no) for now in range(20))
    assert policy.next_transport(20) == WS


def test_a_session_in_between_starts_the_count_anew():
    """Two resets with a good session between them are chance."""
    policy = FallbackPolicy()
    policy.on_websocket_failure(RESET, 0, yes)
    policy.on_connected(WS, 1)
    assert not policy.on_websocket_failure(RESET, 2, yes)


def test_looks_again_at_growing_intervals():
    """WebSocket gets another try after a minute, then two, up to an hour apart."""
    policy, now, waits = FallbackPolicy(), 0.0, []
    policy.on_websocket_failure(BLOCKED[0], now, yes)
    for _ in range(9):
        waits.append(policy.next_probe_at - now)
        now = policy.next_probe_at
        assert policy.next_transport(now - 0.1) == LONGPOLL
        assert policy.next_transport(now) == WS
        assert policy.on_websocket_failure(RESET, now, no)
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_returns():
    """Once a session stands over WebSocket it is the choice again, and a later blockade starts at a minute."""
    policy = FallbackPolicy()
    policy.on_websocket_failure(BLOCKED[0], 0, yes)
    policy.postpone_probe(60)
    policy.on_connected(WS, 200)
    assert policy.next_transport(201) == WS
    policy.on_websocket_failure(BLOCKED[0], 10_000, yes)
    assert policy.next_probe_at == 10_000 + PROBE_DELAY_INITIAL


def test_flapping_looks_later_and_later():
    """WebSocket that works for moments only is looked at ever more rarely."""
    policy = FallbackPolicy()
    now = 0.0
    policy.on_websocket_failure(BLOCKED[0], now, yes)
    for _ in range(12):
        now = policy.next_probe_at
        policy.postpone_probe(now)
        policy.on_connected(WS, now)
        now += 1
        assert policy.on_websocket_failure(BLOCKED[0], now, yes)
    assert policy.next_probe_at - now == PROBE_DELAY_MAX


def test_long_poll_refused_leads_back():
    """Where long-poll is refused too, by a proxy or for the token, WebSocket is the next try."""
    for error in (AuthenticationRejectedError("x", code=401), NetworkError("x", code=404)):
        policy = FallbackPolicy()
        policy.on_websocket_failure(BLOCKED[0], 0, yes)
        policy.on_longpoll_failure(error)
        assert policy.next_transport(1) == WS
    policy.on_websocket_failure(BLOCKED[0], 0, yes)
    policy.on_longpoll_failure(NetworkError("x", code=503))
    policy.on_longpoll_failure(RESET)
    assert policy.next_transport(1) == LONGPOLL


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["fail", "poll", "hello_ack", "look"]),
            st.sampled_from([RESET, *BLOCKED, *SPEAKS]),
            st.booleans(),
            st.floats(0, 5000),
        )
    )
)
def test_never_stuck(steps):
    """Whatever happens, either WebSocket is the choice or a look at it is due within an hour."""
    policy, now = FallbackPolicy(), 0.0
    for what, error, healthy, seconds in steps:
        now += seconds
        if what == "fail" and policy.next_transport(now) == WS:
            policy.on_websocket_failure(error, now, lambda healthy=healthy: healthy)
        elif what == "poll" and policy.next_transport(now) == LONGPOLL:
            policy.on_longpoll_failure(error)
        elif what == "hello_ack":
            policy.on_connected(policy.next_transport(now), now)
        elif what == "look" and policy.name == LONGPOLL:
            policy.postpone_probe(now)
        assert policy.name == WS or policy.next_probe_at <= now + PROBE_DELAY_MAX


@pytest.mark.parametrize("preference", [WS, LONGPOLL])
def test_a_forced_transport_stays(preference):
    """``ws`` and ``longpoll`` are never left, whatever fails."""
    policy = FallbackPolicy(preference)
    for error in (*BLOCKED, RESET):
        assert not policy.on_websocket_failure(error, 0, yes)
        policy.on_longpoll_failure(error)
        assert policy.next_transport(1e9) == preference


# -- the setting


def test_the_setting(monkeypatch):
    """Z4J_TRANSPORT is read, a keyword wins over it."""
    assert load_settings().transport == "auto"
    monkeypatch.setenv("Z4J_TRANSPORT", "longpoll")
    assert load_settings().transport == "longpoll"
    assert load_settings(transport="ws").transport == "ws"


# -- the runtime behind a gate


class ForkGuard:
    """A listener in front of two peers that lets WebSocket through or blocks it in one of the ways of proxies."""

    def __init__(self, backend, ws_peer, http_peer):
        self.backend = backend
        self.block = None
        self.upgrades = 0
        self._ports = {"ws": ws_peer.door.port, "http": http_peer.port}
        self._door = Listener(backend, self._pass, name="gate")
        self.url = self._door.url

    def stop(self):
        self._door.stop()

    def _pass(self, sock):
        head = b""
        try:
            while b"\r\n\r\n" not in head:
                head += some(self.backend, sock)
            upgrade = b"upgrade: websocket" in head.lower()
            self.upgrades += upgrade
            if upgrade and self.block == "403":
                sock.send(
                    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 7\r\nConnection: close\r\n\r\nBlocked"
                )
            elif upgrade and self.block == "reset":
                pass
            else:
                self._join(
                    sock, head, "ws" if upgrade else "http", mute=upgrade and self.block == "mute"
                )
        except (GoneError, OSError):
            pass
        finally:
            sock.close()

    def _join(self, sock, head, kind, *, mute):
        with socket.create_connection(("127.0.0.1", self._ports[kind])) as inner:
            inner.settimeout(0)
            self._door.socks.append(inner)
            inner.send(head)
            join(self.backend, sock, inner, 1 if mute else None)


class StubEngine:
    name = "stub"

    def capabilities(self):
        return {"retry_task"}

    async def retry_task(self, task_id, **_options):
        return CommandResult(status="success", result={"again": task_id})


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
    made = Peer(backend), HttpPeer(backend)
    yield made
    for peer in made:
        peer.stop()


@pytest.fixture
def gate(backend, peers):
    made = ForkGuard(backend, *peers)
    yield made
    made.stop()


@pytest.fixture
def install(gate, monkeypatch):
    for kind in list(backoff.BACKOFF_POLICIES):
        monkeypatch.setitem(backoff.BACKOFF_POLICIES, kind, backoff.BackoffPolicy(0.01, 0.05))
    monkeypatch.setattr(send, "POLL_BUSY", 0.05)
    monkeypatch.setattr(longpoll, "UPLOAD_RATE", 1000.0)
    monkeypatch.setattr(longpoll, "POLL_WAIT", 1)
    made = []

    def make(**changes):
        options = {
            "engines": [StubEngine()],
            "brain_url": gate.url,
            "token": TOKEN,
            "project_id": "demo",
            "hmac_secret": SECRET_TEXT,
        }
        made.append(install_agent(**{**options, **changes}))
        return made[-1]

    yield make
    for runtime in made:
        runtime.stop(timeout=3)
        _process_singleton.clear_runtime(expected=runtime)


@pytest.mark.parametrize("block", ["403", "reset", "mute"])
def test_falls_back(install, gate, peers, until, caplog, block):
    """Behind each kind of blockade the agent reaches the brain over long-poll, and log and heartbeat say so."""
    caplog.set_level(logging.INFO, "z4j")
    gate.block = block
    _, http_peer = peers
    runtime = install()
    runtime.record_event(an_event(1))
    beat = until(lambda: http_peer.frames("heartbeat"))[0]
    assert beat.payload.adapter_health["z4j.transport"] == "longpoll"
    until(lambda: settled(runtime, 1))
    assert len(http_peer.events()) == 1
    assert caplog.text.count("falling back to long-poll") == 1
    assert "connected over longpoll" in caplog.text or "connected again" in caplog.text
    assert http_peer.mishaps == []


@pytest.mark.thorough
def test_returns_and_loses_nothing(install, gate, peers, until, monkeypatch, caplog):
    """Back and forth under load, every event arrives once and in order on whichever road was open, and commands run."""
    caplog.set_level(logging.INFO, "z4j")
    monkeypatch.setattr(fallback, "PROBE_DELAY_INITIAL", 0.3)
    monkeypatch.setattr(fallback, "PROBE_DELAY_MAX", 0.5)
    ws_peer, http_peer = peers
    gate.block = "403"
    runtime = install()
    numbers = iter(range(10_000))
    for _ in range(100):
        runtime.record_event(an_event(next(numbers)))
    until(lambda: http_peer.frames("heartbeat") and settled(runtime, 100))
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
    until(lambda: settled(runtime, 300))
    sent = [event["data"]["number"] for event in [*http_peer.events(), *ws_peer.events()]]
    assert sent == list(range(300))
    assert "WebSocket works again" in caplog.text
    gate.block = "403"
    session.drop()
    before = len(http_peer.frames("heartbeat"))
    until(lambda: len(http_peer.frames("heartbeat")) > before)
    assert http_peer.mishaps == []


def test_a_refused_token_is_not_a_proxy(install, gate, peers, until):
    """Close code 4401 keeps the agent on WebSocket, because that is the brain speaking."""
    ws_peer, http_peer = peers
    ws_peer.token = "another"
    runtime = install()
    until(lambda: len(ws_peer.sessions) >= 4)
    assert "Z4J_TOKEN" in runtime.stats()["last_error"]
    assert http_peer.requests == []


@pytest.mark.parametrize("transport", ["ws", "longpoll"])
def test_forced(install, gate, peers, until, transport):
    """A forced transport is used from the first attempt, and the other never."""
    ws_peer, http_peer = peers
    install(transport=transport)
    used, unused = (ws_peer, http_peer) if transport == "ws" else (http_peer, ws_peer)
    until(lambda: used.frames("heartbeat"))
    assert not unused.sessions


def test_an_unknown_transport_is_refused(install):
    """A transport that does not exist is an error of the host's, at its call."""
    with pytest.raises(Exception, match=r"(?i)transport"):
        install(transport="pigeon")


def test_stop_while_connecting(install, gate, peers, until, backend, monkeypatch):
    """stop() is bounded while neither road leads anywhere."""
    monkeypatch.setattr(websocket, "CONNECT_TIMEOUT", 3.0)
    gate.block = "reset"
    _, http_peer = peers
    http_peer.answers["GET"] = [(503, {}, b"{}")] * 1000
    runtime = install()
    until(lambda: len(http_peer.requests) >= 2)
    began = backend.now()
    runtime.stop(timeout=5)
    assert backend.now() - began < 6
