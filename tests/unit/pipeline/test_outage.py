"""The whole agent, with a real store, during ten minutes of virtual time without a brain."""

import datetime as dt
import json
from itertools import pairwise
from uuid import uuid4

import pytest
from z4j_core.models import Config, Event, EventKind
from z4j_core.transport.frames import EventBatchAckFrame, EventBatchAckPayload
from z4j_core.transport.framing import FrameSigner

from tests.support.peer import SECRET, SECRET_TEXT
from tests.support.session import FakeTransport
from z4j_bare.agent import Agent
from z4j_bare.concurrency import timeslice
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.errors import NetworkError
from z4j_bare.framework import BareFrameworkAdapter
from z4j_bare.settings import Settings
from z4j_bare.wire.backoff import BACKOFF_POLICIES, JITTER

pytestmark = pytest.mark.thorough

#: Virtual seconds: when the brain goes and comes back, and between two events.
AWAY_AT, BACK_AT, GAP = 31.0, 631.0, 0.25


class FakeBrain:
    """Accepts sessions and acknowledges their frames, except while it is away."""

    def __init__(self, backend):
        self.backend = backend
        self.away = False
        self.attempts = []
        self.sessions = []
        self.received = []

    def transport(self):
        made = FakeTransport(self.backend)
        self.attempts.append(self.backend.now())
        if self.away:
            made.hello_answer = NetworkError("connection refused")
        else:
            self._accept(made, f"session-{len(self.sessions)}")
        return made

    def go_away(self):
        self.away = True
        self.sessions[-1].send_error = NetworkError("reset")
        self.sessions[-1].inbox.append(NetworkError("reset"))

    def frames(self, kind):
        return [(when, frame["payload"]) for when, frame in self.received if frame["type"] == kind]

    def numbers(self):
        return [
            event["data"]["number"]
            for _, payload in self.frames("event_batch")
            for event in payload["events"]
        ]

    def _accept(self, transport, session):
        ids = {"agent_id": "agent", "project_id": "project", "session_id": session}
        payload = {
            "protocol_version": "2",
            "brain_version": "1",
            "heartbeat_interval_seconds": 10,
            **ids,
        }
        transport.hello_answer = json.dumps(
            {"v": 2, "type": "hello_ack", "id": "h", "payload": payload}
        ).encode()
        signer = FrameSigner(secret=SECRET, **ids)

        def received(frame):
            self.received.append((self.backend.now(), frame))
            if frame["type"] == "event_batch":
                number = len(frame["payload"]["events"])
                ack = EventBatchAckPayload(
                    acked_id=frame["id"], received=number, accepted=number, rejected=0
                )
                transport.inbox.append(
                    signer.sign_and_serialize(EventBatchAckFrame(id="a", payload=ack))
                )

        transport.on_frame = received
        self.sessions.append(transport)


class OutageScenario:
    """An agent that records an event every ``GAP`` seconds, its brain, and one sample a second."""

    def __init__(self, home, **caps):
        self.backend = FakeConcurrency()
        self.brain = FakeBrain(self.backend)
        config = Config(
            brain_url="http://localhost", token="t" * 43, project_id="p", hmac_secret=SECRET_TEXT,
            buffer_path=home / "buffer.sqlite", **caps,
        )  # fmt: skip
        self.agent = Agent(config, BareFrameworkAdapter(config), [], [], Settings(), self.backend)
        self.agent.supervisor._make_transport = self.brain.transport
        self.produced = 0
        self.samples = []
        self.agent.start()
        self._producer = self.backend.spawn(self._produce, name="producer")

    def _produce(self):
        while self.backend.now() < BACK_AT + 60:
            self.agent.record(an_event(self.produced))
            self.produced += 1
            self.backend.sleep(GAP)

    def run_until(self, when):
        """Advance virtual time, and take a sample of the accounting every second."""
        while self.backend.now() < when:
            self.backend.advance(min(1.0, when - self.backend.now()))
            buffer, stats = self.agent.buffer.stats(), self.agent.status.stats()
            self.samples.append(
                (
                    stats["produced"],
                    stats["acked"]
                    + buffer.rows
                    + len(self.agent.ring)
                    + sum(stats["lost"].values()),
                    buffer,
                )
            )


def an_event(number):
    return Event.model_construct(
        id=uuid4(), engine="stub", task_id=f"t-{number}", kind=EventKind.TASK_SUCCEEDED,
        occurred_at=dt.datetime.now(dt.UTC), data={"number": number, "text": "x" * 200},
    )  # fmt: skip


@pytest.fixture(
    params=[{}, {"buffer_max_events": 1000}, {"buffer_max_bytes": 1_048_576}],
    ids=["uncapped", "rows", "bytes"],
)
def outage(request, tmp_path, monkeypatch):
    """An agent that ran before, during and after ten minutes without a brain."""
    monkeypatch.setattr(
        timeslice, "SLICE_SECONDS", 1e9
    )  # in real seconds: a busy machine must not change virtual time
    made = OutageScenario(tmp_path, **request.param)
    made.caps = request.param
    made.run_until(AWAY_AT)
    made.in_doubt = (
        len(made.brain.numbers()) - made.agent.status.stats()["acked"]
    )  # the brain has them, but not we its ack
    made.brain.go_away()
    made.run_until(BACK_AT)
    made.brain.away = False
    made.run_until(BACK_AT + 120)
    yield made
    made.agent.stop(5.0)


def test_agent_survives_ten_minutes_without_brain(outage):
    """The back-off is kept, caps hold, the accounting balances, and the rest is delivered."""
    brain, caps = outage.brain, outage.caps
    assert all(produced == accounted for produced, accounted, _ in outage.samples)
    assert outage.samples[-1][0] == outage.produced
    lost = outage.agent.status.stats()["lost"]
    if caps:
        assert set(lost) == {"capacity"}
        assert lost["capacity"] > 0
    else:
        assert lost == {}
    assert max(buffer.rows for *_, buffer in outage.samples) <= caps.get(
        "buffer_max_events", 100_000
    )
    assert max(buffer.bytes for *_, buffer in outage.samples) <= caps.get("buffer_max_bytes", 2**28)
    assert outage.samples[-1][2].rows == 0

    schedule = BACKOFF_POLICIES["connection"]
    attempts = [when for when in brain.attempts if when >= AWAY_AT]
    delays = [later - earlier for earlier, later in pairwise([AWAY_AT, *attempts])]
    for turn, delay in enumerate(delays):
        due = min(schedule.maximum, schedule.initial * 2**turn)
        assert due <= delay <= due * (1 + JITTER) + 0.01, f"attempt {turn}"
    assert BACK_AT <= attempts[-1] <= BACK_AT + schedule.maximum * (1 + JITTER)
    assert len(brain.sessions) == 2

    heartbeats = [when for when, _ in brain.frames("heartbeat")]
    assert [when for when in heartbeats if AWAY_AT < when < attempts[-1]] == []
    assert all(later - earlier >= 9.9 for earlier, later in pairwise(heartbeats))
    assert min(when for when in heartbeats if when > AWAY_AT) - attempts[-1] < 1

    delivered = list(
        dict.fromkeys(brain.numbers())
    )  # what was on its way when the line broke came again
    assert delivered == sorted(delivered)
    counted_lost_but_there = len(delivered) - (outage.produced - sum(lost.values()))
    assert 0 <= counted_lost_but_there <= (outage.in_doubt if caps else 0)
    assert delivered[-1] == outage.produced - 1
