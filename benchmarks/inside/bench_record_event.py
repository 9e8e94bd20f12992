"""Print the microseconds of ``record_event``, the public call that both agents share, as JSON.

No brain answers, so the cost of the call is measured while the agent buffers events.
"""

import base64
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from celery import Celery
from z4j_celery import CeleryEngineAdapter
from z4j_core.models import Event, EventKind

from z4j_bare import install_agent

GROUP = 10
RATE = 500


def main(count: int) -> None:
    """Record ``count`` events in groups of ten, 500 a second.

    Print the sorted microseconds of the calls.
    """
    with tempfile.TemporaryDirectory(prefix="z4j-bench-", ignore_cleanup_errors=True) as home:
        Path(home).chmod(0o700)
        os.environ["Z4J_HOME"] = home
        runtime = install_agent(
            engines=[CeleryEngineAdapter(celery_app=Celery("bench", broker="memory://"))],
            brain_url="http://127.0.0.1:9",
            token="bench",  # noqa: S106 - no server listens there
            project_id="bench",
            hmac_secret=base64.urlsafe_b64encode(bytes(range(32))).decode(),
        )
        costs = []
        for first in range(0, count, GROUP):
            time.sleep(GROUP / RATE)
            events = [_event(number) for number in range(first, first + GROUP)]
            costs += [_record(runtime, event) for event in events]
        runtime.stop(timeout=5.0)
    print(json.dumps(sorted(costs)))


def _record(runtime: object, event: Event) -> float:
    began = time.perf_counter()
    runtime.record_event(event)
    return (time.perf_counter() - began) * 1e6


def _event(number: int) -> Event:
    return Event(
        id=uuid4(),
        project_id=uuid4(),
        agent_id=uuid4(),
        engine="celery",
        task_id=f"task-{number}",
        kind=EventKind.TASK_RECEIVED,
        occurred_at=datetime.now(UTC),
        data={
            "task_name": "bench.nap",
            "queue": "bench",
            "worker": "w@bench",
            "args": [],
            "kwargs": {"number": number},
        },
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
