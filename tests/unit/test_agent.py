"""The whole runtime against a scripted brain, in the mode of this run."""

import json
import logging
import os
import signal
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
from z4j_core.models import CommandResult, Event, EventKind
from z4j_core.transport.frames import CommandFrame, CommandPayload
from z4j_core.transport.framing import FrameSigner

from tests.support.agents import installed_agents
from tests.support.engines import FakeEngine
from tests.support.peer import AGENT, CLOSE, PING, PROJECT, SECRET_TEXT, TEXT, TOKEN, Peer
from z4j_bare import RuntimeState
from z4j_bare import runtime as runtime_module
from z4j_bare.pipeline import receive, send
from z4j_bare.transport import websocket
from z4j_bare.wire import backoff, close_codes

#: Seconds under which something counts as not having hung; never a measure of speed.
HANG = 15.0


class BlockingEngine(FakeEngine):
    """An engine whose ``cancel_task`` waits for ``release``, and whose ``submit_task`` fails."""

    def __init__(self, backend):
        super().__init__("retry_task", "cancel_task", "submit_task")
        self.release = backend.event()

    async def retry_task(self, task_id, **_options):
        self.calls.append(task_id)
        return CommandResult(status="success", result={"again": task_id})

    async def cancel_task(self, task_id):
        self.calls.append(task_id)
        self.release.wait(HANG)
        return CommandResult(status="success")

    async def submit_task(self, name, **_options):
        self.calls.append(name)
        raise ValueError(name)


def an_event(number=0, **data):
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=f"t-{number}",
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=datetime.now(UTC),
        data={"number": number, **data},
    )


@pytest.fixture(autouse=True)
def fast_timeouts(monkeypatch):
    """Shorten all intervals to hundredths of a second; they have tests of their own."""
    for kind in list(backoff.BACKOFF_POLICIES):
        monkeypatch.setitem(backoff.BACKOFF_POLICIES, kind, backoff.BackoffPolicy(0.01, 0.05))
    monkeypatch.setattr(send, "POLL_BUSY", 0.05)
    monkeypatch.setattr(receive, "READ_TIMEOUT", 0.1)
    monkeypatch.setenv("Z4J_FLUSH_INTERVAL_SECONDS", "0.02")
    monkeypatch.setenv("Z4J_FLUSH_SECONDS", "0.5")


@pytest.fixture
def engine(backend):
    made = BlockingEngine(backend)
    yield made
    made.release.set()


@pytest.fixture
def install(peer, engine):
    """``install(**changes)``: a started agent whose brain is the peer, stopped at the end."""
    with installed_agents(peer, engine) as install:
        yield install
        engine.release.set()


@pytest.fixture
def runtime(install, peer, until):
    """An agent with a session."""
    made = install()
    until(lambda: peer.last and peer.last.frames and made.supervisor_state()["session_id"])
    return made


def is_settled(runtime):
    """Return whether every produced event is acknowledged or lost, and nothing is buffered."""
    runtime._agent.buffer.stats()
    stats = runtime.stats()
    return (
        stats["produced"] == stats["acked"] + stats["buffered"] + sum(stats["lost"].values())
        and not stats["buffered"]
    )


def test_hello_identifies_agent(install, peer, until, mode):
    """The upgrade carries the token, the hello identifies the agent, and a heartbeat follows."""
    runtime = install(agent_name="web-1")
    beat = until(lambda: peer.frames("heartbeat"))[0]
    session = peer.sessions[0]
    assert session.path == "/ws/agent"
    assert session.headers["authorization"] == f"Bearer {TOKEN}"
    assert "origin" not in session.headers
    hello = session.hello.payload
    assert (hello.framework, hello.engines, hello.host) == ("bare", ["stub"], {"name": "web-1"})
    assert hello.capabilities == {"stub": ["cancel_task", "retry_task", "submit_task"]}
    assert (hello.worker_pid, hello.worker_id.split("-")[1]) == (os.getpid(), str(os.getpid()))
    assert beat.payload.adapter_health["z4j.concurrency"] == mode
    assert runtime.state is RuntimeState.RUNNING
    assert runtime.supervisor_state()["session_id"] == session.id
    assert runtime.stats()["session_id"] == session.id


def test_heartbeat_interval_comes_from_hello_ack(install, peer, until):
    """Heartbeats are sent at the interval of ``hello_ack``, with consecutive sequence numbers."""
    peer.heartbeat = 1
    install()
    until(lambda: len(peer.frames("heartbeat")) >= 3)
    assert [frame.seq for frame in peer.sessions[0].frames] == list(
        range(1, len(peer.sessions[0].frames) + 1)
    )
    assert peer.errors == []


def test_status_follows_first_heartbeat(install, peer, until):
    """An ``agent_status`` with the engines and the losses follows the first heartbeat."""
    install()
    status = until(lambda: peer.frames("agent_status"))[0].payload
    assert (status.engines, status.connection_failure_streak) == (["stub"], 0)
    assert status.telemetry_loss.event_records == 0
    assert status.last_successful_connect_at


def test_disabled_status_is_not_sent(install, peer, until, monkeypatch):
    """With ``Z4J_AGENT_STATUS_DISABLED`` heartbeats go on without an ``agent_status``."""
    monkeypatch.setenv("Z4J_AGENT_STATUS_DISABLED", "1")
    peer.heartbeat = 1
    install()
    until(lambda: len(peer.frames("heartbeat")) >= 2)
    assert peer.frames("agent_status") == []


def test_disabled_heartbeat_sends_keepalives(install, peer, until, monkeypatch):
    """With ``Z4J_HEARTBEAT`` off an empty batch keeps the session (90 s of silence end it)."""
    monkeypatch.setenv("Z4J_HEARTBEAT", "off")
    install()
    assert until(lambda: peer.frames("event_batch"))[0].payload.events == []
    assert peer.frames("heartbeat") == []


def test_events_are_delivered_and_deleted(runtime, peer, until):
    """Every event arrives once, in order, and leaves the buffer with the brain's ack."""
    events = [an_event(number) for number in range(1300)]
    for event in events:
        runtime.record_event(event)
    until(lambda: is_settled(runtime) and runtime.stats()["acked"] == 1300)
    assert [event["id"] for event in peer.events()] == [str(event.id) for event in events]
    assert max(len(frame.payload.events) for frame in peer.frames("event_batch")) <= 500
    assert runtime.buffer_size() == 0


def test_late_acks_cause_no_resend(install, peer, until):
    """Late acks delete their rows, and no row is sent twice meanwhile."""
    peer.acks = 0.3
    runtime = install()
    for number in range(600):
        runtime.record_event(an_event(number))
    until(lambda: is_settled(runtime) and runtime.stats()["acked"] == 600)
    assert [event["data"]["number"] for event in peer.events()] == list(range(600))


def test_large_events(runtime, peer, until):
    """Events of 100 kB are sent whole and in order, in frames of bounded size."""
    for number in range(6):
        runtime.record_event(an_event(number, result="x" * 100_000))
    until(lambda: len(peer.events()) == 6)
    assert [len(event["data"]["result"]) for event in peer.events()] == [100_000] * 6
    assert all(
        len(frame.payload.events) == 1
        for frame in peer.frames("event_batch")
        if frame.payload.events
    )


def test_event_over_frame_limit_is_truncated(install, peer, until):
    """An event over the brain's frame limit is truncated, and ends no session."""
    peer.max_frame = 20_000
    runtime = install()
    runtime.record_event(an_event(1, result="x" * 100_000))
    runtime.record_event(an_event(2))
    until(lambda: is_settled(runtime) and runtime.stats()["acked"] == 2)
    first, second = peer.events()
    assert "bytes cut" in first["data"]["result"]
    assert second["data"]["number"] == 2


@pytest.mark.parametrize(
    "code", [1000, 1001, 1009, 1011, 1012, 4002, 4003, 4400, 4401, 4403, 4408, 4426, 4427, 4429]
)
def test_agent_reconnects_after_each_close_code(install, peer, until, caplog, code):
    """After any close code the next session sends the events with the same id and timestamp."""
    peer.acks = "none"
    runtime = install()
    event = an_event(7)
    runtime.record_event(event)
    until(lambda: len(peer.events()) == 1)
    peer.acks = "all"
    peer.last.close(code, "as scripted")
    until(lambda: is_settled(runtime) and runtime.stats()["acked"] == 1)
    assert {(sent["id"], sent["occurred_at"]) for sent in peer.events()} == {
        (str(event.id), event.occurred_at.isoformat())
    }
    assert runtime.stats()["restarts"] == {}
    assert peer.errors == []
    assert (
        f"no session ({backoff.failure_class(close_codes.error_for_close_code(code))})"
        in caplog.text
    )


def test_agent_over_session_cap_is_turned_away(install, peer, until, caplog):
    """One warning names the cap and the cure; the events wait, and arrive once a session is free.

    The brain sends ``hello_ack`` before it closes the session with code 4429.
    """
    caplog.set_level(logging.INFO, "z4j")

    def turn_away(session):
        session.hello_ack()
        session.close(4429)

    hello_ack, peer.on_hello = peer.on_hello, turn_away
    runtime = install()
    status = runtime._agent.status.describe
    until(lambda: len(peer.sessions) >= 5)
    runtime.record_event(an_event(1))
    until(lambda: runtime._agent.buffer.stats().rows)
    until(lambda: len(peer.sessions) >= 8)
    assert (status()["connected"], status()["turned_away"]) == (False, True)
    warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert [("64 sessions" in each.getMessage()) for each in warnings] == [True]
    assert "Z4J_TOKEN of its own" in caplog.text
    assert caplog.text.count("connected again") <= 1
    peer.on_hello = hello_ack
    until(lambda: is_settled(runtime) and runtime.stats()["acked"] == 1)


@pytest.mark.thorough
@pytest.mark.parametrize("code", [1011, 4400, 4403])
def test_poison_event_is_dropped(install, peer, until, caplog, code):
    """An event that ends every session is dropped, counted and logged; all others arrive."""
    events = [an_event(number) for number in range(600)]
    bad, on_frame = str(events[77].id), peer.on_frame

    def picky(session, frame):
        if frame.type == "event_batch" and any(
            event["id"] == bad for event in frame.payload.events
        ):
            session.close(code)
        else:
            on_frame(session, frame)

    peer.on_frame = picky
    runtime = install()
    until(lambda: peer.last)
    for event in events:
        runtime.record_event(event)
    until(lambda: is_settled(runtime) and runtime.stats()["acked"] == 599)
    assert runtime.stats()["lost"] == {"poison": 1}
    assert {event["data"]["number"] for event in peer.events()} == set(range(600))
    assert len(peer.sessions) <= 8
    assert (
        "dropped a row that the brain cannot accept: a 'task.succeeded' of 'stub', task 't-77'"
        in caplog.text
    )
    assert runtime.stats()["restarts"] == {}


def test_restarted_agent_keeps_worker_id(install, peer, until):
    """An agent that is stopped and started again is the same worker, so the brain keeps one row."""
    runtime = install()
    until(lambda: peer.live)
    runtime.stop(timeout=2)
    runtime.start()
    first, second = until(lambda: len(peer.sessions) == 2 and peer.live and peer.sessions)
    old, new = first.hello.payload, second.hello.payload
    assert (old.worker_id, old.worker_started_at) == (new.worker_id, new.worker_started_at)


def test_replaced_session_changes_worker_id(install, peer, until):
    """After its session was replaced, an agent says hello with another worker id."""
    install()
    first = until(lambda: peer.last)
    first.close(4002)
    second = until(lambda: peer.last is not first and peer.last)
    old, new = first.hello.payload.worker_id, second.hello.payload.worker_id
    assert new.startswith(f"{old}-")
    second.close(1012)
    third = until(lambda: peer.last is not second and peer.last)
    assert third.hello.payload.worker_id == new


def test_agent_reconnects_after_reset(runtime, peer, until):
    """A connection that is reset is replaced."""
    first = peer.last
    first.drop()
    until(lambda: peer.last and peer.last is not first)


def test_agent_replaces_half_open_connection(install, peer, until, monkeypatch):
    """A peer that neither reads nor answers is pinged, and its connection is replaced."""
    monkeypatch.setattr(websocket, "PING_AFTER", 0.2)
    monkeypatch.setattr(websocket, "DEAD_AFTER", 0.6)
    install()
    first = until(lambda: peer.last)
    first.stalled = True
    until(lambda: peer.last and peer.last is not first)


def test_idle_connection_is_kept(install, peer, until, monkeypatch):
    """A silent peer that answers pings keeps its session."""
    monkeypatch.setattr(websocket, "PING_AFTER", 0.1)
    monkeypatch.setattr(websocket, "DEAD_AFTER", 5.0)
    install()
    until(lambda: peer.last and peer.last.pings >= 2)
    assert len(peer.sessions) == 1


def test_agent_answers_pings(runtime, peer, until):
    """The brain's pings are answered, because it drops the connection after a minute otherwise."""
    peer.last.send(b"are you there", PING)
    until(lambda: peer.last.pongs)


@pytest.mark.parametrize("status", [301, 401, 403, 404, 429, 500, 502, 503])
def test_refused_upgrade_is_retried(install, peer, until, status):
    """Any HTTP refusal is retried, and the error names its status."""
    peer.upgrade_rejection = (status, {"Location": peer.url.replace("http", "ws")})
    runtime = install(transport="ws")
    until(lambda: len(peer.sessions) >= 2)
    assert runtime.state is RuntimeState.RUNNING
    named = {401: "Z4J_TOKEN", 403: "archived"}.get(status, f"HTTP {status}")
    until(lambda: named in runtime.stats()["last_error"])
    peer.upgrade_rejection = None
    until(lambda: peer.last)


def test_redirects_are_not_followed(install, peer, backend, until):
    """The token is sent to the configured brain only, whatever that answers."""
    elsewhere = Peer(backend)
    try:
        peer.upgrade_rejection = (
            302,
            {"Location": elsewhere.url.replace("http", "ws") + "/ws/agent"},
        )
        install()
        until(lambda: len(peer.sessions) >= 3)
        assert elsewhere.sessions == []
    finally:
        elsewhere.stop()


def test_retry_after_is_honoured(install, peer, until, monkeypatch):
    """No attempt is made before the time that ``Retry-After`` asks for."""
    monkeypatch.setitem(
        backoff.BACKOFF_POLICIES, "incompatible", backoff.BackoffPolicy(120, 3600)
    )  # the bound on what a server may wish
    peer.upgrade_rejection = (429, {"Retry-After": "3000"})
    runtime = install()
    until(lambda: runtime.stats()["last_error"])
    first = len(peer.sessions)
    peer.upgrade_rejection = None
    with pytest.raises(AssertionError):
        until(lambda: len(peer.sessions) > first, seconds=0.5)


def test_start_waits_briefly_for_adapters(install, engine, backend):
    """``start()`` waits for an adapter that connects slowly, but not for one that hangs."""
    connected = []

    def connect_signals():
        backend.sleep(0.1)
        connected.append(1)
        engine.release.wait(HANG)

    engine.connect_signals = connect_signals
    install()
    assert (connected, engine.release.is_set()) == ([1], False)


def test_eventlet_agent_recommends_gevent_once(install, mode, caplog):
    """Under eventlet the advice to use gevent is logged once per process, in other modes never."""
    caplog.set_level(logging.INFO, "z4j")
    runtime_module._recommend_gevent.cache_clear()
    for _ in range(2):
        install().stop()
    lines = [line for line in caplog.messages if "docs/migration.md#from-eventlet" in line]
    assert len(lines) == (1 if mode == "eventlet" else 0)
    page = Path(__file__).parents[2] / "docs/migration.md"
    assert "\n## From eventlet\n" in page.read_text()


def test_start_without_brain(install, backend, until, engine):
    """``start()`` returns at once without a brain, and events are stored."""
    early = Peer(backend)
    early.stop()
    runtime = install(brain_url=early.url)
    runtime.record_event(an_event(1))
    until(lambda: runtime.stats()["last_error"])
    assert runtime.state is RuntimeState.RUNNING
    assert runtime.supervisor_state()["connection_error_count"] >= 1
    until(lambda: runtime.stats()["stored"] == 1)


@pytest.mark.parametrize(
    "greeting",
    [
        lambda session: session.send(b"not json at all"),
        lambda session: session.send(b'{"v":2,"type":"heartbeat","id":"x","payload":{}}'),
        lambda session: session.hello_ack(protocol_version="3"),
        lambda session: session.hello_ack(heartbeat_interval_seconds=0),
        lambda session: session.send(b"", CLOSE),
        lambda session: session.send(b"\x00" * 70_000, TEXT),
        lambda session: session.send_raw(b"\xff\xff\xff\xff\xff\xff"),
        lambda session: session.drop(),
        lambda session: None,
    ],
    ids=[
        "no-json",
        "no-ack",
        "protocol-3",
        "bad-interval",
        "bare-close",
        "zeros",
        "bad-opcode",
        "hang-up",
        "silence",
    ],
)
def test_bad_hello_ack_is_survived(install, peer, until, monkeypatch, greeting):
    """Whatever the brain sends instead of ``hello_ack``, the agent reconnects and no loop dies."""
    monkeypatch.setattr(websocket, "HELLO_TIMEOUT", 0.5)
    peer.on_hello = greeting
    runtime = install()
    until(lambda: len(peer.sessions) >= 2)
    peer.on_hello = type(peer.sessions[0]).hello_ack
    until(lambda: peer.last and peer.last.frames)
    assert runtime.stats()["restarts"] == {}


def test_command_runs_once(runtime, peer, engine, until):
    """Ack and result carry the command's id and token; a redelivery gets both again."""
    session, token = peer.last, str(uuid4())
    identity = session.command("retry_task", {"task_id": "t-9"}, token=token)
    result = until(lambda: session.of("command_result"))[0]
    assert [frame.type for frame in session.frames if frame.id == identity] == [
        "command_ack",
        "command_result",
    ]
    assert session.of("command_ack")[0].payload.delivery_claim_token == token
    assert result.payload.delivery_claim_token == token
    assert (result.payload.status, result.payload.result, result.payload.error) == (
        "success",
        {"again": "t-9"},
        None,
    )
    session.command("retry_task", {"task_id": "t-9"}, token=token, identity=identity)
    until(lambda: len(session.of("command_ack")) == 2 and len(session.of("command_result")) == 2)
    session.close(1012)
    until(lambda: peer.last and peer.last is not session)
    peer.last.command("retry_task", {"task_id": "t-9"}, identity=identity)
    until(lambda: peer.last.of("command_ack") and peer.last.of("command_result"))
    assert all(frame.payload == result.payload for frame in peer.frames("command_result"))
    assert engine.calls == ["t-9"]


def test_empty_batch_follows_result(runtime, peer, until):
    """A result has no ack, so an empty batch follows; its ack deletes the result."""
    session = peer.last
    session.command("retry_task", {"task_id": "t-1"})
    until(lambda: session.of("command_result"))
    batch = until(lambda: session.of("event_batch"))[-1]
    assert batch.payload.events == []
    assert batch.seq > session.of("command_result")[0].seq
    until(lambda: runtime.buffer_size() == 0 and runtime.stats()["stored"] == 0)


def test_results_are_not_counted_as_events(runtime, peer, until):
    """Produced equals acknowledged + buffered + lost although results are sent in between."""
    for number in range(5):
        peer.last.command("retry_task", {"task_id": f"t-{number}"})
    for number in range(20):
        runtime.record_event(an_event(number))
    until(lambda: len(peer.frames("command_result")) == 5 and len(peer.events()) == 20)
    until(lambda: is_settled(runtime))
    assert runtime.stats()["acked"] == 20


def test_result_is_sent_in_next_session(runtime, peer, engine, until):
    """A result that is ready after the connection was lost is sent in the next session."""
    identity = peer.last.command("cancel_task", {"task_id": "t-1"})
    until(lambda: engine.calls)
    first = peer.last
    peer.upgrade_rejection = (503, {})
    first.drop()
    until(lambda: len(peer.sessions) >= 2)
    engine.release.set()
    peer.upgrade_rejection = None
    until(lambda: peer.last and peer.last.of("command_result"))
    assert peer.frames("command_result")[0].id == identity
    assert first.of("command_result") == []


def test_hung_command_blocks_nothing(install, peer, engine, until):
    """While a command hangs, heartbeats, acks and other commands go on."""
    peer.heartbeat = 1
    runtime = install()
    until(lambda: peer.last)
    peer.last.command("cancel_task", {"task_id": "stuck"})
    until(lambda: engine.calls == ["stuck"])
    beats = len(peer.frames("heartbeat"))
    other = peer.last.command("retry_task", {"task_id": "t-2"})
    runtime.record_event(an_event(1))
    until(lambda: [frame.id for frame in peer.frames("command_result")] == [other])
    until(lambda: len(peer.events()) == 1 and len(peer.frames("heartbeat")) >= beats + 1)
    engine.release.set()
    until(lambda: len(peer.frames("command_result")) == 2)


def test_hung_command_does_not_block_others(install, peer, engine, until):
    """Of fifty commands one hangs: all are acknowledged, and the others get their results."""
    peer.heartbeat = 1
    runtime = install()
    until(lambda: peer.last)
    stuck = peer.last.command("cancel_task", {"task_id": "stuck"})
    others = {peer.last.command("retry_task", {"task_id": f"t-{number}"}) for number in range(49)}
    until(lambda: {frame.id for frame in peer.frames("command_ack")} == {*others, stuck})
    until(lambda: {frame.id for frame in peer.frames("command_result")} == others)
    beats = len(peer.frames("heartbeat"))
    runtime.record_event(an_event(1))
    until(lambda: runtime.stats()["acked"] == 1 and len(peer.frames("heartbeat")) > beats)
    engine.release.set()
    until(lambda: stuck in {frame.id for frame in peer.frames("command_result")})
    assert len(engine.calls) == 50
    assert peer.errors == []


def test_overrunning_command_is_indeterminate(runtime, peer, engine, until):
    """A command still running at its deadline gets an indeterminate result and is not run again."""
    peer.last.command("cancel_task", {"task_id": "slow"}, timeout=3)
    result = until(lambda: peer.frames("command_result"))[0].payload
    assert (result.status, result.result) == (
        "failed",
        {"indeterminate": True, "operation": "cancel_task"},
    )
    assert engine.calls == ["slow"]


@pytest.mark.parametrize(
    ("action", "parameters", "said"),
    [
        ("submit_task", {"name": "boom"}, "internal error: ValueError: boom"),
        ("retry_task", {}, "retry_task: task_id is required"),
        ("purge_queue", {}, "purge_queue"),
        ("no.such.thing", {}, "not an action that this agent knows"),
        ("retry_task", {"task_id": "x", "engine": "rq"}, "no engine 'rq'"),
    ],
)
def test_failed_command_gets_result(runtime, peer, until, action, parameters, said):
    """A command that cannot be run gets a failed result with the reason."""
    peer.last.command(action, parameters)
    payload = until(lambda: peer.frames("command_result"))[0].payload
    assert payload.status == "failed"
    assert said in payload.error


def a_command(identity="c-1"):
    return CommandFrame(
        id=identity, payload=CommandPayload(action="retry_task", parameters={"task_id": "forged"})
    )


def wrongly_signed(session):
    signer = FrameSigner(
        secret=bytes(32), agent_id=AGENT, project_id=PROJECT, session_id=session.id
    )
    session.send(session.signed(a_command(), signer))


def of_another_session(session):
    signer = FrameSigner(
        secret=session.peer.secret, agent_id=AGENT, project_id=PROJECT, session_id=str(uuid4())
    )
    session.send(session.signed(a_command(), signer))


def unsigned(session):
    session.send(
        json.dumps(
            {
                "v": 2,
                "type": "command",
                "id": "c",
                "payload": {"action": "retry_task", "parameters": {"task_id": "forged"}},
            }
        ).encode()
    )


def altered(session):
    session.send(session.signed(a_command()).replace(b"forged", b"FORGED"))


def oversized(session):
    with suppress(OSError):  # the agent may hang up before it has all been written
        session.send(b'{"v":2,"type":"command","payload":{"x":"' + b"y" * 3_000_000 + b'"}}')


def half_a_frame(session):
    session.send_raw(b"\x82\x7f" + (10_000).to_bytes(8, "big") + b"only this much")
    session.drop()


@pytest.mark.parametrize(
    "attack",
    [
        wrongly_signed,
        of_another_session,
        unsigned,
        altered,
        oversized,
        half_a_frame,
        lambda session: session.send(b""),
        lambda session: session.send(b"\xff\xfe\xfd"),
        lambda session: session.send(b"[" * 50_000),
        lambda session: session.send(b"null", TEXT),
        lambda session: session.send_raw(b"\xff" * 500),
        lambda session: session.send_raw(b"\x82\xff" + b"\xff" * 12),
    ],
    ids=[
        "key",
        "session",
        "unsigned",
        "altered",
        "oversized",
        "half",
        "empty",
        "no-utf8",
        "deep",
        "null",
        "noise",
        "masked",
    ],
)
def test_attack_runs_nothing(runtime, peer, engine, until, attack):
    """Unsigned, altered and malformed messages run no command; the agent starts a new session."""
    first = peer.last
    attack(first)
    first_gone = until(lambda: peer.last and peer.last is not first)
    assert first_gone
    runtime.record_event(an_event(1))
    until(lambda: peer.events())
    assert engine.calls == []
    assert runtime.stats()["restarts"] == {}


def test_replayed_command_runs_once(runtime, peer, engine, until):
    """A recorded frame that is sent again ends this session or the next, and runs nothing."""
    first = peer.last
    recorded = first.signed(a_command())
    first.send(recorded)
    until(lambda: engine.calls == ["forged"])
    first.send(recorded)
    until(lambda: peer.last and peer.last is not first)
    second = peer.last
    second.send(recorded)
    until(lambda: peer.last and peer.last is not second)
    assert engine.calls == ["forged"]


def test_unknown_frame_is_ignored(runtime, peer, until):
    """A signed frame of another type, or an error that is not fatal, changes nothing."""
    first = peer.last
    first.error("something", fatal=False)
    first.command("retry_task", {"task_id": "t-1"})
    until(lambda: first.of("command_result"))
    assert peer.last is first


def test_fatal_error_frame_ends_session(runtime, peer, until):
    """After a fatal error frame the agent starts a new session."""
    first = peer.last
    peer.upgrade_rejection = (503, {})
    first.error("bad_frame", fatal=True)
    until(lambda: len(peer.sessions) >= 2)
    peer.upgrade_rejection = None
    until(lambda: peer.last)


@pytest.mark.parametrize("stalled", [False, True], ids=["reads", "reads-nothing"])
def test_stop_is_bounded(install, peer, until, stalled):
    """``stop()`` keeps its timeout with a peer that neither acknowledges nor closes."""
    peer.acks = "none"
    runtime = install()
    until(lambda: peer.last)
    peer.last.stalled = stalled
    for number in range(3000):
        runtime.record_event(an_event(number, text="x" * 300))
    until(lambda: runtime.stats()["sent"] or stalled)
    began = time.monotonic()
    runtime.stop(timeout=2.0)
    assert time.monotonic() - began < HANG
    assert runtime.state is RuntimeState.STOPPED
    runtime.stop()
    runtime.record_event(an_event(1))
    assert runtime.stats() == {"state": "stopped"}


def test_stop_delivers_last_events(runtime, peer, until):
    """Events recorded just before ``stop()`` are acknowledged, and the brain gets a close frame."""
    session = peer.last
    for number in range(400):
        runtime.record_event(an_event(number))
    runtime.stop()
    until(lambda: session.ended)
    assert [event["data"]["number"] for event in peer.events()] == list(range(400))
    assert session.close_code == 1000


def test_stop_without_brain(install, backend, until):
    """``stop()`` does not wait for a brain that is not there."""
    gone = Peer(backend)
    gone.stop()
    runtime = install(brain_url=gone.url)
    runtime.record_event(an_event(1))
    until(lambda: runtime.stats()["last_error"])
    began = time.monotonic()
    runtime.stop(timeout=2.0)
    assert time.monotonic() - began < HANG


def test_runtime_restarts_after_stop(runtime, peer, until):
    """A stopped runtime can be started again and delivers what was left."""
    runtime.stop()
    runtime.start()
    until(lambda: len(peer.live) == 1 and runtime.supervisor_state()["session_id"] == peer.last.id)
    runtime.record_event(an_event(5))
    until(lambda: [event["data"]["number"] for event in peer.events()] == [5])


def test_dead_session_loop_ends_session(install, peer, until, monkeypatch, caplog):
    """A bug in a session loop is counted and logged; the next session follows after a back-off."""
    real, died = send.Sender.run, []

    def run(sender, connection):
        if len(died) < 2:
            died.append(1)
            raise ValueError("a bug")
        real(sender, connection)

    monkeypatch.setattr(send.Sender, "run", run)
    runtime = install()
    runtime.record_event(an_event(1))
    until(lambda: peer.events())
    assert runtime.stats()["restarts"] == {"z4j-send": 2}
    assert "loop z4j-send died of ValueError; next attempt" in caplog.text


def test_request_reconnect_replaces_session(runtime, peer, until):
    """``request_reconnect()`` ends the session and starts a new one at once."""
    first = peer.last
    runtime.request_reconnect()
    until(lambda: peer.last and peer.last is not first)
    until(lambda: first.ended)
    assert len(peer.live) == 1


def test_request_reconnect_ends_backoff(install, peer, until, monkeypatch):
    """During a back-off of an hour ``request_reconnect()`` connects at once."""
    monkeypatch.setitem(backoff.BACKOFF_POLICIES, "connection", backoff.BackoffPolicy(3600, 3600))
    peer.upgrade_rejection = (503, {})
    runtime = install()
    until(lambda: runtime.stats()["last_error"])
    peer.upgrade_rejection = None
    runtime.request_reconnect()
    until(lambda: peer.last)


def test_rotated_credentials_are_read_at_connect(install, peer, until, tmp_path):
    """Token and key files are read at each connect: a rotation needs no restart."""
    token, key = tmp_path / "token", tmp_path / "key"
    token.write_text("old token\n")
    key.write_text("c" * 43 + "\n")
    runtime = install(token=None, hmac_secret=None, token_file=token, hmac_secret_file=key)
    until(lambda: len(peer.sessions) >= 2)
    assert runtime.supervisor_state()["auth_error_count"] >= 1
    token.write_text(f"{TOKEN}\n")
    key.write_text(f"{SECRET_TEXT}\n")
    until(lambda: peer.last and peer.last.frames)
    assert [
        type(error).__name__ for error in peer.errors if type(error).__name__ != "SignatureError"
    ] == []


def test_missing_token_file_is_reported(install, peer, until, tmp_path):
    """A missing token file is named in the error, and the agent connects when it is back."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    runtime = install(token=None, token_file=token)
    first = until(lambda: peer.last)
    token.unlink()
    first.drop()
    until(lambda: "Z4J_TOKEN_FILE" in runtime.stats()["last_error"])
    token.write_text(TOKEN)
    until(lambda: peer.last and peer.last is not first)
    assert runtime.stats()["restarts"] == {}


def test_secrets_are_not_logged(install, peer, until, caplog):
    """Neither token nor key is logged at DEBUG, through refusals, closes and a stop."""
    caplog.set_level(logging.DEBUG)
    peer.upgrade_rejection = (401, {})
    runtime = install()
    until(lambda: len(peer.sessions) >= 2)
    peer.upgrade_rejection = None
    first = until(lambda: peer.last)
    wrongly_signed(first)
    until(lambda: peer.last and peer.last is not first and peer.last.frames)
    peer.last.close(4401)
    runtime.stop()
    assert caplog.records
    text = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records)
    for secret in (TOKEN, SECRET_TEXT, SECRET_TEXT.rstrip("="), bytes(range(32)).hex()):
        assert secret not in text
        assert secret not in repr(vars(runtime))


def start_child(work, seconds=40.0):
    """Fork and run ``work()`` in the child, which prints its value as JSON; return pid and pipe."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(int(seconds))
            os.write(write, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return pid, read


def wait_for_child(pid, read, until):
    """Wait for the child cooperatively; return its value."""
    status = []

    def ended():
        found, code = os.waitpid(pid, os.WNOHANG)
        if found:
            status.append(code)
        return found

    until(ended, seconds=45)
    said = os.read(read, 65536)
    os.close(read)
    assert status == [0], f"the child ended with {status}: {said!r}"
    return json.loads(said)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("idle", [0.0, 1.5], ids=["exits-at-once", "runs-its-hub"])
def test_fork_leaves_session_alone(install, peer, until, mode, idle):
    """A forked child takes nothing from the session and adds nothing, even if it runs its hub."""
    if idle and mode == "eventlet":
        pytest.skip(
            "eventlet's hub shares its epoll set with the child: only one of them can run it"
        )
    peer.heartbeat = 1
    runtime = install()
    session = until(lambda: peer.last and peer.last.frames and peer.last)
    before = runtime.supervisor_state()["session_id"]
    assert before == session.id

    def child():
        from time import sleep

        if idle:
            sleep(idle)
        runtime.record_event(an_event(666))
        runtime.request_reconnect()
        runtime.stop()
        return [str(runtime.state), runtime.stats().get("produced", 0)]

    pid, read = start_child(child)
    for number in range(50):
        runtime.record_event(an_event(number))
    assert wait_for_child(pid, read, until) == ["stopped", 0]
    beats = len(session.of("heartbeat"))
    until(lambda: is_settled(runtime) and len(session.of("heartbeat")) >= beats + 1)
    assert runtime.supervisor_state()["session_id"] == before
    assert len(peer.sessions) == 1
    assert [frame.seq for frame in session.frames] == list(range(1, len(session.frames) + 1))
    assert [event["data"]["number"] for event in peer.events()] == list(range(50))
    assert peer.errors == []
    session.command("retry_task", {"task_id": "after"})
    until(lambda: session.of("command_result"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_can_start_own_agent(runtime, peer, until, mode):
    """``reinit_after_fork()`` gives the child a session and a buffer of its own."""
    if mode == "eventlet":
        pytest.skip(
            "eventlet's hub shares its epoll set with the child: only one of them can run it"
        )
    first = peer.last

    def child():
        runtime.reinit_after_fork()
        runtime.record_event(an_event(42))
        deadline = time.monotonic() + 30
        from time import sleep

        while time.monotonic() < deadline and runtime.stats()["acked"] < 1:
            sleep(0.02)
        acked = runtime.stats()["acked"]
        runtime.stop()
        return [acked]

    pid, read = start_child(child)
    assert wait_for_child(pid, read, until) == [1]
    assert [event["data"]["number"] for event in peer.events()] == [42]
    assert peer.last is first
    runtime.record_event(an_event(43))
    until(lambda: len(peer.events()) == 2)
