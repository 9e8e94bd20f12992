"""Several agents on one token: on PostgreSQL the brain stores their frames one after another."""

import json
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest
from z4j_core.transport.hmac import decode_agent_hmac_secret

from tests.support.e2e_host import MODES, Host
from z4j_bare.concurrency.threads import ThreadsConcurrency
from z4j_bare.demo.process import until
from z4j_bare.transport.endpoint import websocket_url
from z4j_bare.transport.websocket import WebSocketTransport
from z4j_bare.wire.canonical import canonical
from z4j_bare.wire.frames import Identity, event_batch, frame_id, hello
from z4j_bare.wire.session import Session, parse_hello_ack

#: Events in the frame for which the agents have to wait. The brain needs more than the 3 s for
#: which it lets other frames of the token wait.
LARGE_FRAME = 1_000

#: Seconds after the first attempt within which the skipped frames are stored. Without the proof of
#: the skip the agent would send the frames again after 90 s at the earliest.
RESEND_LIMIT = 80.0

#: What the brain logs for a skipped frame.
SKIPPED = "withholding ack"


class OneFrame:
    """A session that sends one frame, as another worker on the token would."""

    def __init__(self, agent):
        url = websocket_url(agent.brain_url, dev_mode=False)
        self._transport = WebSocketTransport(url, lambda: agent.token, ThreadsConcurrency())
        identity = Identity("bare", "1.13.0", "w-large", 1, datetime.now(UTC), engines=("stub",))
        hello_ack = parse_hello_ack(self._transport.connect(hello(identity)))
        self._session = Session(hello_ack, decode_agent_hmac_secret(agent.hmac_secret))

    def send(self, events):
        payload = event_batch(events)
        self._transport.send(
            lambda: self._session.sign("event_batch", frame_id("ev"), payload, time.time())
        )

    def wait_for_ack(self):
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            message = self._transport.receive(5)
            if message and self._session.verify(message).type == "event_batch_ack":
                return
        raise AssertionError("the large frame got no ack")

    def close(self):
        self._transport.close()


def events(count):
    """Yield encoded events, each of a task of its own."""
    for number in range(count):
        yield canonical(
            {
                "id": str(uuid.uuid4()),
                "engine": "stub",
                "kind": "task.succeeded",
                "task_id": f"large-{number}",
                "occurred_at": datetime.now(UTC).isoformat(),
                "data": {"task_name": "large"},
            }
        )


@pytest.mark.timeout(240)
def test_frames_that_brain_skips_arrive_within_seconds(postgres_brain, tmp_path):
    """Frames that waited too long for another frame of the token are sent again, in each mode."""
    brain, project = postgres_brain, f"p-{uuid.uuid4().hex[:12]}"
    brain.create_project(project)
    agent = brain.mint_agent(project, "shared")
    with ExitStack() as stack:
        hosts = [stack.enter_context(Host(mode, agent, tmp_path / mode)) for mode in MODES]
        for host in hosts:
            host.wait_installed()
            host.until(lambda stats: stats["session_id"], "a session")
        other = OneFrame(agent)
        stack.callback(other.close)
        skipped = brain.log.read_text().count(SKIPPED)
        other.send(list(events(LARGE_FRAME)))
        began = time.monotonic()
        for host in hosts:
            host.produce("shared", 100, 0.2)
        other.wait_for_ack()
        for host in hosts:
            host.wait_acked()
        assert time.monotonic() - began < RESEND_LIMIT
        assert brain.log.read_text().count(SKIPPED) > skipped, "the brain skipped no frame"
        for host in hosts:
            assert host.delivered(brain, "shared"), host.title
    brain.archive_project(project)


def status(host):
    """Return what ``z4j-bare status`` prints about a host's agent, and its JSON."""
    command = [sys.executable, "-m", "z4j_bare", "status"]

    def output(*words):
        done = subprocess.run(
            [*command, *words],
            env=host.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    return output(), json.loads(output("--json"))["agents"][0]


@pytest.mark.timeout(240)
def test_agent_over_cap_keeps_events_until_session_ends(make_brain, tmp_path):
    """One warning and no reconnect is logged; the events arrive after another session's end."""
    project = f"p-{uuid.uuid4().hex[:12]}"
    cap = {"Z4J_WS_PER_AGENT_CONCURRENCY_CAP": "2"}
    with make_brain("sqlite", tmp_path / "brain", **cap) as brain, ExitStack() as stack:
        brain.create_project(project)
        agent = brain.mint_agent(project, "shared")
        # The agent over the cap tries again within a second.
        hosts = [Host(mode, agent, tmp_path / mode) for mode in MODES[:2]]
        hosts.append(Host(MODES[2], agent, tmp_path / MODES[2], FAST_TIMEOUTS="1"))
        for host in hosts:
            stack.enter_context(host)
            host.wait_installed()
            host.until(lambda stats: stats["sessions"], "a session")
        first, _, third = hosts
        third.produce("over", 50, 0.2)
        # The brain accepts each session before it refuses it.
        third.until(lambda stats: stats["sessions"] >= 6, "six attempts")
        third.until(lambda stats: stats["buffered"] == 50, "the buffer")
        stats = third.request("stats")
        assert (stats["state"], stats["acked"], stats["lost"]) == ("running", 0, {})
        log = third.output()
        assert log.count("WARNING z4j.runtime.pipeline.session") == 1
        assert "Z4J_WS_PER_AGENT_CONCURRENCY_CAP" in log
        assert "a Z4J_TOKEN of its own" in log
        assert "connected again" not in log
        text, shown = status(third)
        assert "turned away" in text
        assert shown["turned_away"]
        assert first.finish() == 0
        third.wait_acked()
        assert third.delivered(brain, "over")
        assert third.output().count("connected again") == 1
        # A session counts as accepted when it is older than the brain's refusals.
        until(lambda: "turned away" not in status(third)[0], "a session that has stood", timeout=30)
