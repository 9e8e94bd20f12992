"""A host that installs an agent, records events and prints what became of them.

Arguments: the number of events, and the bytes of each. The brain does not answer.
"""

import json
import logging
import sys
import time
from datetime import UTC, datetime
from uuid import uuid4

from z4j_core.models import Event, EventKind

from tests.support.engines import FakeEngine
from z4j_bare import install_agent

#: Maximum seconds until every event is counted.
TIMEOUT = 30.0


def an_event(number, size):
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=f"t-{number}",
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=datetime.now(UTC),
        data={"result": "x" * size},
    )


def main(number, size):
    logging.basicConfig(level=logging.WARNING)
    agent = install_agent(engines=[FakeEngine("retry_task")])
    for each in range(number):
        agent.record_event(an_event(each, size))
        if each % 20 == 0:
            time.sleep(0.02)
    buffer, deadline = agent._agent.buffer, time.monotonic() + TIMEOUT
    kept, lost, consistent = 0, 0, False
    while not (consistent and kept + lost >= number) and time.monotonic() < deadline:
        time.sleep(0.05)
        before = sum(agent.stats()["lost"].values())
        kept, lost = buffer.stats().rows, sum(agent.stats()["lost"].values())
        consistent = lost == before  # between the two readings no row was lost
    outcome = {
        "home": str(agent.config.buffer_path.parent),
        "kept": kept,
        "lost": lost,
        "durable": buffer.durable,
    }
    print(json.dumps(outcome), flush=True)
    sys.stdin.readline()
    agent.stop(timeout=3)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
