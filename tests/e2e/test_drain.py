"""Commands during the drain of a large backlog: their results are sent before the backlog."""

import time
from datetime import UTC, datetime
from hashlib import sha256
from uuid import uuid4

import pytest
import requests
from z4j_core.transport.hmac import decode_agent_hmac_secret

from z4j_bare.buffer.files import new_store_path
from z4j_bare.buffer.rows import EVENT
from z4j_bare.buffer.store import BufferStore
from z4j_bare.demo.process import until
from z4j_bare.demo.rest import BrainRefusedError
from z4j_bare.wire.frames import encode_fields

pytestmark = pytest.mark.timeout(300)

STEPS = ("task.received", "task.started", "task.succeeded")

#: Seconds between two commands.
COMMAND_INTERVAL = 3.0

#: Maximum time for each command, in seconds. The guarantee is 10 s, but the test machine is shared.
#: The brain's own timeout is 60 s.
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def brain(request, make_brain, tmp_path_factory):
    """A brain that only this module uses, because the backlog keeps it busy."""
    with make_brain(request.param, tmp_path_factory.mktemp("brain")) as running:
        yield running


def event(number):
    """Return the encoded event ``number``; three consecutive events belong to one task."""
    task, step = divmod(number, len(STEPS))
    data = {
        "task_name": "e2e.add",
        "queue": "celery",
        "worker": "old@e2e",
        "args": [task, 1],
        "kwargs": {},
    }
    fields = {
        "id": str(uuid4()),
        "kind": STEPS[step],
        "engine": "celery",
        "task_id": f"old-{task}",
        "data": data,
    }
    return encode_fields({**fields, "occurred_at": datetime.now(UTC).isoformat()})


def write_orphaned_store(project, rows):
    """Write the store of a dead worker with ``rows`` unsent rows."""
    environment = project.environment()
    secret = decode_agent_hmac_secret(environment["Z4J_HMAC_SECRET"])
    key = b"%b %b" % (environment["Z4J_PROJECT_ID"].encode(), secret)
    deployment = sha256(key).hexdigest()[:16]
    store = BufferStore(new_store_path(project.home / "agent" / "store"), deployment=deployment)
    for first in range(0, rows, 1000):
        store.append([(EVENT, "", event(number)) for number in range(first, first + 1000)])
    assert store.size() == rows
    store.close()


def issue(project, errors):
    """Issue a cancellation and return its row; repeat it while the brain returns status 500."""

    def issued():
        try:
            return project.brain.issue(
                project.slug,
                "cancel-task",
                agent_id=project.agent.agent_id,
                engine="celery",
                task_id=uuid4().hex,
            )
        except BrainRefusedError as error:
            if error.status != requests.codes.internal_server_error:
                raise
            errors.append(error)
            return None

    return until(issued, "an accepted command", timeout=TIMEOUT)


@pytest.mark.parametrize(
    ("brain", "rows", "commands"),
    [
        pytest.param("postgresql", 20_000, 2, id="postgresql-short"),
        pytest.param("postgresql", 50_000, 4, marks=pytest.mark.long),
        pytest.param("sqlite", 50_000, 4, marks=pytest.mark.long),
    ],
    indirect=["brain"],
)
def test_result_overtakes_backlog(fresh_project, capsys, rows, commands):
    """While thousands of rows of a dead worker are drained, each command completes soon."""
    project = fresh_project
    write_orphaned_store(project, rows)
    project.worker(pool="gevent")
    began = time.monotonic()
    until(
        lambda: project.brain.task(project.slug, "celery", "old-0"),
        "the first row",
        timeout=TIMEOUT,
    )
    first = time.monotonic() - began
    durations, errors = [], []
    for _ in range(commands):
        time.sleep(COMMAND_INTERVAL)
        issued = issue(project, errors)
        sent = time.monotonic()
        done = project.brain.wait_command(project.slug, issued["id"], timeout=TIMEOUT)
        durations.append(time.monotonic() - sent)
        assert (done["status"], done["error"]) == ("completed", None)
    missing = next(
        number
        for number in range(rows)
        if not project.brain.task(project.slug, "celery", f"old-{number * 100}")
    )
    assert missing * 100 < rows // len(STEPS), "the drain ended before the last command"
    with capsys.disabled():
        seconds = ", ".join(f"{each:.1f}" for each in durations)
        print(
            f"\n{rows} rows: first after {first:.1f} s; commands completed after {seconds} s; "
            f"{missing * 100} tasks were sent"
        )
        print(f"the brain rejected {len(errors)} commands with status 500")
