"""An operator's command while a large backlog is drained: its result overtakes the rows, here and in the brain."""

import time
from datetime import UTC, datetime
from hashlib import sha256
from uuid import uuid4

import pytest
import requests
from z4j_core.transport.hmac import decode_agent_hmac_secret

from tests.support.e2e_project import E2EProject
from z4j_bare.buffer.files import new_store_path
from z4j_bare.buffer.rows import EVENT
from z4j_bare.buffer.store import BufferStore
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import until
from z4j_bare.demo.rest import BrainRefusedError
from z4j_bare.wire.frames import encode_fields

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ROWS = 50_000
STEPS = ("task.received", "task.started", "task.succeeded")

#: Commands, seconds between two, and seconds for each to be completed: the promise is 10, and the machine of a test is
#: shared. The brain itself gives a command up after 60.
COMMANDS = 4
APART = 3.0
PATIENCE = 60.0


@pytest.fixture
def project(tmp_path, redis_url):
    """A place with a brain of its own, because this one is kept busy."""
    with Brain(tmp_path / "brain") as brain, E2EProject(brain, redis_url, tmp_path) as here:
        yield here


def event(number):
    """Return the bytes of the ``number``-th event; three make a task."""
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


def leave_a_store(project):
    """Write what a worker that died with ``ROWS`` undelivered rows would have left."""
    environment = project.environment()
    secret = decode_agent_hmac_secret(environment["Z4J_HMAC_SECRET"])
    deployment = sha256(b"%b %b" % (environment["Z4J_PROJECT_ID"].encode(), secret)).hexdigest()[
        :16
    ]
    store = BufferStore(new_store_path(project.home / "agent" / "store"), deployment=deployment)
    for first in range(0, ROWS, 1000):
        store.append([(EVENT, "", event(number)) for number in range(first, first + 1000)])
    assert store.size() == ROWS
    store.close()


def issue(project, refusals):
    """Issue a cancellation and return its row; a brain that is too busy with its database for that is asked again."""

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
            refusals.append(error)
            return None

    return until(issued, "a command that the brain takes", timeout=PATIENCE)


def test_a_result_does_not_wait_for_the_backlog(project, capsys):
    """While 50,000 rows of a dead worker are drained, each command is carried out and completed in the brain soon."""
    leave_a_store(project)
    project.worker(pool="gevent")
    began = time.monotonic()
    until(
        lambda: project.brain.task(project.slug, "celery", "old-0"),
        "the first row",
        timeout=PATIENCE,
    )
    first = time.monotonic() - began
    took, refusals = [], []
    for _ in range(COMMANDS):
        time.sleep(APART)  # deeper into the drain
        issued = issue(project, refusals)
        sent = time.monotonic()
        done = project.brain.wait_command(project.slug, issued["id"], timeout=PATIENCE)
        took.append(time.monotonic() - sent)
        assert (done["status"], done["error"]) == ("completed", None)
    behind = next(
        number
        for number in range(ROWS)
        if not project.brain.task(project.slug, "celery", f"old-{number * 100}")
    )
    assert behind * 100 < ROWS // len(STEPS), "the drain was over: nothing was overtaken"
    with capsys.disabled():
        seconds = ", ".join(f"{each:.1f}" for each in took)
        print(
            f"\n{ROWS} rows: first after {first:.1f} s; commands completed after {seconds} s; {behind * 100} tasks were in"
        )
        print(f"{len(refusals)} commands were refused with 500")
