"""A worker of an engine without a restart method; after SIGTERM it finishes its current task.

``python restartable.py MODE``.
"""

# ruff: noqa: E402 - the process is patched before the other imports

import sys

from tests.launch import patch

patch(sys.argv[1])

import logging
import signal
import time
from datetime import UTC, datetime
from uuid import uuid4

from z4j_core.models import Event, EventKind

from z4j_bare import install_agent
from z4j_bare.commands import process_restart

WORKER = "stub@e2e"

#: Time between two checks for SIGTERM, in seconds.
POLL_INTERVAL = 0.1

#: Rest of the current task after SIGTERM, in seconds.
TASK_SECONDS = 0.5


class Engine:
    """An engine that names its worker in the events of its stream, as adapters do."""

    name = "stub"

    def capabilities(self):
        return {"submit_task"}

    async def subscribe_events(self):
        yield make_event("first", EventKind.TASK_STARTED)


def make_event(task_id, kind):
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=task_id,
        kind=kind,
        occurred_at=datetime.now(UTC),
        data={"task_name": "t", "worker": WORKER},
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    process_restart.MIN_UPTIME = 0.0  # Another test covers the default.
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    runtime = install_agent(engines=[Engine()])
    while not ended:
        time.sleep(POLL_INTERVAL)
    time.sleep(TASK_SECONDS)
    runtime.record_event(make_event("last", EventKind.TASK_SUCCEEDED))
