"""Several agents on one token: on PostgreSQL the brain stores their frames one after another."""

import time
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest
from z4j_core.transport.hmac import decode_agent_hmac_secret

from tests.support.e2e_host import MODES, Host
from z4j_bare.concurrency.threads import ThreadsConcurrency
from z4j_bare.transport.endpoint import websocket_url
from z4j_bare.transport.websocket import WebSocketTransport
from z4j_bare.wire.canonical import canonical
from z4j_bare.wire.frames import Identity, event_batch, frame_id, hello
from z4j_bare.wire.session import Session, parse_hello_ack

#: Events in the frame for which the agents have to wait. The brain needs more than the 3 s for
#: which it lets other frames of the token wait.
LARGE_FRAME = 1_000

#: Seconds after the large frame within which the skipped frames are stored. Without the proof of
#: the skip they would be sent again after 90 s.
RESEND_LIMIT = 40.0

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
        for host in hosts:
            host.produce("shared", 100, 0.2)
        other.wait_for_ack()
        began = time.monotonic()
        for host in hosts:
            host.wait_acked()
        assert time.monotonic() - began < RESEND_LIMIT
        assert brain.log.read_text().count(SKIPPED) > skipped, "the brain skipped no frame"
        for host in hosts:
            assert host.delivered(brain, "shared"), host.title
    brain.archive_project(project)
