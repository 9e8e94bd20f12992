"""Schedules through the whole runtime and a scripted brain, in the mode of this run."""

import asyncio
import json

import pytest

from tests.support.peer import SECRET_TEXT, TOKEN, Peer, PeerSession
from tests.support.streams import KEY, StreamBrain, StubScheduler, schedule
from z4j_bare import _process_singleton, install_agent
from z4j_bare.pipeline import receive, send
from z4j_bare.wire import backoff


class AwaitingScheduler(StubScheduler):
    """A scheduler whose calls await, as those of the real adapters do."""

    async def list_schedules(self):
        await asyncio.sleep(0.01)
        return await super().list_schedules()

    async def get_schedule(self, identity):
        await asyncio.sleep(0.01)
        return await super().get_schedule(identity)


@pytest.fixture
def scheduler():
    return AwaitingScheduler(
        schedule("hourly"),
        *(schedule(f"n{number}", kwargs={"filler": "x" * 500}) for number in range(400)),
    )


@pytest.fixture
def peer(backend, monkeypatch):
    """A peer that grants an epoch in each session, as the brain does, with short intervals."""
    for kind in list(backoff.BACKOFF_POLICIES):
        monkeypatch.setitem(backoff.BACKOFF_POLICIES, kind, backoff.BackoffPolicy(0.01, 0.05))
    monkeypatch.setattr(send, "POLL_BUSY", 0.05)
    monkeypatch.setattr(send, "POLL_IDLE", 0.05)
    monkeypatch.setattr(receive, "READ_TIMEOUT", 0.1)
    made = Peer(backend)
    made.brain, made.received_events = StreamBrain(), 0

    def on_hello(session):
        session.hello_ack()
        made.brain.activation = session.command(
            "schedule.external.activate",
            made.brain.grant(),
            target={"type": "scheduler", "scheduler": "beat"},
        )

    made.on_hello = on_hello
    yield made
    made.stop()


@pytest.fixture
def runtime(peer, scheduler, monkeypatch):
    """An agent with one scheduler and no engine."""
    monkeypatch.setenv("Z4J_FLUSH_SECONDS", "0.5")
    made = install_agent(
        engines=[],
        schedulers=[scheduler],
        brain_url=peer.url,
        token=TOKEN,
        project_id="demo",
        hmac_secret=SECRET_TEXT,
    )
    yield made
    made.stop(timeout=3)
    _process_singleton.clear_runtime(expected=made)


def published_reasons(peer):
    """Deliver new events to the brain's model; return the reasons of all projections so far."""
    events = peer.events()
    for event in events[peer.received_events :]:
        peer.brain.receive_event(json.loads(json.dumps(event)))
    peer.received_events = len(events)
    return peer.brain.published_reasons


def answer(peer, identity):
    return next(
        (frame.payload for frame in peer.frames("command_result") if frame.id == identity), None
    )


def test_activation_signal_control_and_mutation_in_order(runtime, peer, scheduler, until):
    """Activation, signal, control and mutation are published in order."""
    until(lambda: published_reasons(peer) == ["activation"])
    hello = peer.sessions[0].hello.payload
    assert (hello.schedulers, "external_schedule_protocol_v1" in hello.runtime_features) == (
        ["beat"],
        True,
    )
    assert "external_schedule_stable_snapshot_v1" in hello.capabilities["beat"]
    assert len(peer.brain.rows) == 401
    result = until(lambda: answer(peer, peer.brain.activation))
    assert (result.status, result.result["schedule_count"], result.result["sequence"]) == (
        "success",
        401,
        1,
    )

    scheduler.schedules["id:new"] = schedule("new")
    until(lambda: scheduler.sink)("created", scheduler.schedules["id:new"])
    until(lambda: published_reasons(peer) == ["activation", "signal"])
    assert "id:new" in peer.brain.rows

    session = peer.last
    control = session.command(
        "schedule.external.control", peer.brain.control(KEY, on=False), token="c"
    )
    assert until(lambda: answer(peer, control)).status == "success"
    assert published_reasons(peer)[-1] == "external-control", "stored before the result"
    mutation = session.command(
        "schedule.external.mutate", peer.brain.mutation("delete", KEY), token="m"
    )
    result = until(lambda: answer(peer, mutation))
    assert (result.status, result.delivery_claim_token) == ("success", "m")
    assert published_reasons(peer)[-1].startswith("native-mutation:")
    assert KEY not in peer.brain.rows
    until(lambda: runtime.buffer_size() == 0)
    assert peer.errors == []
    assert runtime.stats()["acked"] == 0


def test_new_session_starts_new_epoch(runtime, peer, scheduler, until):
    """Unacknowledged projections of the old session do not affect the new one."""
    until(
        lambda: (
            published_reasons(peer) == ["activation"] and runtime._agent.buffer.stats().rows == 0
        )
    )
    peer.acks = "none"
    scheduler.sink("updated", None)
    until(lambda: len(published_reasons(peer)) == 2)
    peer.acks = "all"
    peer.last.drop()
    until(lambda: len(peer.sessions) >= 2 and len(published_reasons(peer)) == 3)
    assert peer.brain.published_reasons == ["activation", "signal", "activation"]
    until(lambda: runtime.buffer_size() == 0)
    assert peer.brain.ignored >= 1
    assert peer.errors == []


def test_session_without_activation_publishes_nothing(runtime, peer, scheduler, until):
    """Without an activation in its session, a stream publishes nothing."""
    until(
        lambda: (
            published_reasons(peer) == ["activation"] and runtime._agent.buffer.stats().rows == 0
        )
    )
    peer.on_hello = PeerSession.hello_ack
    peer.last.drop()
    until(lambda: len(peer.sessions) >= 2 and peer.last and peer.last.frames)
    scheduler.sink("updated", None)
    identity = peer.last.command("schedule.resync")
    assert until(lambda: answer(peer, identity)).result["schedulers_drained"] == 0
    until(lambda: runtime.buffer_size() == 0)
    assert published_reasons(peer) == ["activation"]


def test_stop_disconnects_scheduler_signals(runtime, peer, scheduler, until):
    """After a stop the scheduler's signals are disconnected."""
    until(lambda: published_reasons(peer) and scheduler.sink)
    runtime.stop(timeout=5)
    assert scheduler.sink is None
