"""The agent does not block the hub at 1,000 events/s while something fails or is large.

The ``step_limit`` fixture fails a test in which a step takes over 10 ms. In threads mode, where
a long step blocks nobody, the same tests show that the agent goes on working.
"""

import _socket
import gc
import os
import socket
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from z4j_core.models import Event, EventKind

from tests.support import steps
from tests.support.engines import FakeEngine
from tests.support.http_peer import HttpPeer
from tests.support.peer import SECRET, SECRET_TEXT, TOKEN, Peer
from z4j_bare import _process_singleton, install_agent
from z4j_bare.buffer.opener import open_store
from z4j_bare.buffer.rows import EVENT
from z4j_bare.settings import deployment_id
from z4j_bare.transport import auto as fallback
from z4j_bare.transport import http, longpoll, websocket
from z4j_bare.wire import backoff
from z4j_bare.wire.canonical import canonical_plain

pytestmark = pytest.mark.thorough

#: Events a second.
RATE = 1000

#: Seconds between two bursts of them.
PULSE = 0.01

#: Seconds of load in each test.
LOAD = 1.5

#: Seconds that the resolver hangs.
HANG_SECONDS = 0.7

#: Rows in the store at the start.
MANY = 100_000

#: Rows that are stored at a time.
BATCH = 5_000


class RecordingEngine(FakeEngine):
    """An engine that also records the options of each submitted task."""

    async def submit_task(self, name, **options):
        return self.respond((name, options))


class Load:
    """The host's events, evenly spaced; ``late`` is the hub's largest lag in seconds."""

    def __init__(self, backend, runtime):
        self.produced = 0
        self.late = 0.0
        self.note = "x" * 60
        self._backend = backend
        self._runtime = runtime

    def run(self, seconds=LOAD):
        """Record events at ``RATE`` for ``seconds``."""
        before, began = self.produced, time.monotonic()
        due = began
        while (now := time.monotonic()) < began + seconds:
            self.late = max(self.late, now - due)
            for _ in range(before + int((now - began) * RATE) - self.produced):
                self._runtime.record_event(an_event(self.produced, self.note))
                self.produced += 1
            due = time.monotonic() + PULSE
            self._backend.sleep(PULSE)


def an_event(number, note):
    data = {
        "task_name": "shop.tasks.charge", "queue": "celery", "worker": "celery@w1",
        "args": [number, "EUR"], "runtime_ms": 12.5,
        "kwargs": {
            "order": f"o-{number}", "amount": 12.5, "retry": False, "note": note,
            "customer": {"id": number, "vip": True},
        },
    }  # fmt: skip
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=f"t-{number}",
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=datetime.now(UTC),
        data=data,
    )


@pytest.fixture(autouse=True)
def fast_timeouts(monkeypatch):
    """Reconnect at once, and let the store hold the rows of start and load."""
    monkeypatch.setenv("Z4J_BUFFER_MAX_EVENTS", str(2 * MANY))
    for kind in list(backoff.BACKOFF_POLICIES):
        monkeypatch.setitem(backoff.BACKOFF_POLICIES, kind, backoff.BackoffPolicy(0.05, 0.2))


@pytest.fixture
def engine():
    return RecordingEngine("submit_task")


@pytest.fixture
def start(backend, engine, tmp_path, step_limit):
    """``start(brain_url)``: a running agent and its load."""
    made = []

    def make(brain_url, **changes):
        options = {
            "engines": [engine],
            "token": TOKEN,
            "project_id": "demo",
            "hmac_secret": SECRET_TEXT,
        }
        runtime = install_agent(
            brain_url=brain_url, buffer_path=tmp_path / "buffer.sqlite", **{**options, **changes}
        )
        made.append((runtime, Load(backend, runtime)))
        return made[-1]

    yield make
    for runtime, load in made:
        longest = (
            step_limit.longest if step_limit else runtime.stats().get("longest_step_seconds", 0.0)
        )
        print(
            f"longest step {longest * 1000:.1f} ms, hub late by {load.late * 1000:.1f} ms at most"
        )  # pytest -rP
        runtime.stop(timeout=3)
        _process_singleton.clear_runtime(expected=runtime)


@pytest.fixture
def peer(backend):
    made = Peer(backend)
    yield made
    made.stop()
    assert made.errors == []


@pytest.fixture
def delivered(until, peer):
    """Wait until everything recorded has been acknowledged."""

    def wait(runtime, load):
        until(lambda: runtime.stats()["acked"] >= load.produced, 60)
        assert len({event["id"] for event in peer.events()}) >= load.produced
        assert runtime.stats()["lost"] == {}

    return wait


def test_stream_to_healthy_brain(start, peer, delivered):
    """The load alone: recorded, stored, signed, sent and acknowledged."""
    runtime, load = start(peer.url)
    load.run()
    delivered(runtime, load)


LOCKER = """
import sqlite3, sys, time
held = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)
held.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
time.sleep(2)
held.execute("COMMIT")
"""


def test_locked_database(start, peer, delivered, until):
    """The store waits in its native thread while another process holds the database for 2 s."""
    runtime, load = start(peer.url)
    load.run(0.5)
    path = until(lambda: runtime._agent.buffer._disk._store).path
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path)], stdout=subprocess.PIPE
    ) as locker:
        load.run(2.5)
        assert locker.stdout.read() == b"locked\n"
    assert locker.returncode == 0
    delivered(runtime, load)


@pytest.fixture
def dead_dns(mode, monkeypatch):
    """Name servers that never answer: the resolver hangs, under eventlet on a green socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        if mode == "eventlet":
            from eventlet.support import greendns

            monkeypatch.setattr(greendns.resolver._resolver, "nameservers", ["127.0.0.1"])
            monkeypatch.setattr(greendns.resolver._resolver, "port", silent.getsockname()[1])
            monkeypatch.setattr(greendns.resolver._resolver, "lifetime", HANG_SECONDS)
        else:
            monkeypatch.setattr(_socket, "getaddrinfo", hanging_getaddrinfo)
        yield


def unpatched_sleep():
    if os.environ.get("Z4J_TEST_MODE") != "gevent":
        return time.sleep
    from gevent.monkey import get_original

    return get_original("time", "sleep")


def hanging_getaddrinfo(*_args, **_options):
    """Hang as the C library's resolver does without name servers, in its native thread."""
    unpatched_sleep()(HANG_SECONDS)
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def wait_until_stored(until, runtime, load):
    """Wait until everything recorded is in the store."""
    until(lambda: runtime.stats()["stored"] >= load.produced)
    assert runtime.stats()["lost"] == {}


@pytest.mark.usefixtures("dead_dns")
@pytest.mark.filterwarnings("ignore:please use dns.resolver:DeprecationWarning")  # eventlet's own
@pytest.mark.parametrize("transport", ["auto", "longpoll"])
def test_dead_dns(start, until, monkeypatch, transport):
    """Events are stored while the resolver hangs."""
    monkeypatch.setenv("Z4J_TRANSPORT", transport)
    runtime, load = start("https://brain.invalid")
    load.run(3 * HANG_SECONDS)
    wait_until_stored(until, runtime, load)
    until(lambda: runtime.stats()["last_error"])


@pytest.mark.parametrize("transport", ["auto", "longpoll"])
def test_brain_that_never_answers(start, until, monkeypatch, transport):
    """A brain that accepts the connection and sends nothing delays only the connection attempt."""
    monkeypatch.setenv("Z4J_TRANSPORT", transport)
    monkeypatch.setattr(websocket, "CONNECT_TIMEOUT", 0.4)
    monkeypatch.setattr(http, "CONNECT_TIMEOUT", 0.4)
    monkeypatch.setattr(longpoll, "PROBE_TIMEOUT", 0.4)
    monkeypatch.setattr(fallback, "HEALTH_TIMEOUT", 0.4)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hole:
        runtime, load = start(f"http://127.0.0.1:{hole.getsockname()[1]}")
        load.run()
        wait_until_stored(until, runtime, load)
        assert runtime.stats()["last_error"]


class NarrowSocket(websocket.CooperativeSocket):
    """A socket with a send buffer smaller than the frames in flight."""

    def __init__(self, sock, *rest):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().__init__(sock, *rest)


def test_brain_that_stops_reading(start, peer, until, delivered, monkeypatch):
    """The send of a full connection times out, and the next session delivers everything."""
    monkeypatch.setattr(websocket, "SEND_TIMEOUT", 0.5)
    monkeypatch.setattr(websocket, "CooperativeSocket", NarrowSocket)
    peer.listener._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    runtime, load = start(peer.url)
    first = until(lambda: peer.last)
    load.run(0.5)
    first.stalled = True
    load.note = "x" * 8000  # small events would fit into the kernel's buffers
    load.run()
    delivered(runtime, load)
    assert len(peer.sessions) > 1


@pytest.fixture
def secure(backend, certificate, monkeypatch):
    monkeypatch.setenv("Z4J_CA_BUNDLE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # eventlet's own
@pytest.mark.parametrize("transport", ["ws", "longpoll"])
def test_tls(start, backend, secure, until, monkeypatch, transport):
    """TLS handshake, verification and encryption fit into the step limit."""
    monkeypatch.setenv("Z4J_TRANSPORT", transport)
    peer = (Peer if transport == "ws" else HttpPeer)(backend, tls=secure)
    try:
        runtime, load = start(peer.url)
        load.run()
        until(lambda: runtime.stats()["acked"] >= load.produced)
        assert runtime.stats()["transport"] == transport
        for _ in range(3):
            runtime.request_reconnect()
            load.run(0.3)
        until(lambda: runtime.stats()["acked"] >= load.produced)
    finally:
        peer.stop()
        gc.collect()  # eventlet does not close the socket of an interrupted handshake


BULK = {
    "string": ["x" * 1_040_000],
    "numbers": list(range(150_000)),
    "records": [
        {"id": number, "name": f"name {number}", "ok": True, "share": number / 7}
        for number in range(16_000)
    ],
}


@pytest.mark.parametrize("bulk", BULK)
def test_command_of_one_mebibyte(start, peer, engine, until, delivered, bulk):
    """A command of 1 MiB is verified, acknowledged and run with all its arguments."""
    runtime, load = start(peer.url)
    session = until(lambda: peer.last)
    load.run(0.5)
    for _ in range(steps.REPEATS):
        session.command("submit_task", {"name": "shop.import", "args": BULK[bulk]})
    load.run(1.0)
    until(lambda: len(peer.frames("command_result")) == steps.REPEATS)
    assert all(options["args"] == tuple(BULK[bulk]) for _, options in engine.calls)
    delivered(runtime, load)


def row_batches():
    """Yield ``MANY`` events as the store keeps them, in batches."""
    for first in range(0, MANY, BATCH):
        yield [
            (EVENT, "", canonical_plain({"id": f"e-{number}", "data": {"n": number}}))
            for number in range(first, first + BATCH)
        ]


def test_backlog_of_100000_rows(start, peer, until):
    """The load goes on while 100,000 stored rows are sent in the first session."""
    peer.upgrade_rejection = (503, {})
    runtime, load = start(peer.url)
    for batch in row_batches():
        runtime._agent.buffer.append(batch)
    peer.upgrade_rejection = None
    load.run()
    until(lambda: runtime.stats()["acked"] >= MANY + load.produced, 120)
    assert runtime.stats()["lost"] == {}


@pytest.mark.parametrize("transport", ["ws", "longpoll"])
def test_orphan_of_100000_rows(start, backend, until, monkeypatch, tmp_path, transport):
    """The load goes on while 100,000 rows of a dead process are adopted."""
    monkeypatch.setenv("Z4J_TRANSPORT", transport)
    peer = (Peer if transport == "ws" else HttpPeer)(backend)
    runtime, load = start(peer.url, autostart=False)
    deployment = deployment_id(runtime.config, SECRET)
    orphan = open_store(tmp_path / "buffer.sqlite", deployment=deployment)
    for batch in row_batches():
        orphan.append(batch)
    orphan.close()
    try:
        runtime.start()
        load.run()
        until(lambda: runtime.stats()["acked"] > load.produced + 2 * BATCH, 60)
        assert runtime.stats()["lost"] == {}
    finally:
        runtime.stop(timeout=3)
        peer.stop()
