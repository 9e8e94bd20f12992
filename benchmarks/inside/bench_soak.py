"""A host that records events at a constant rate and prints one line of JSON a second.

``python bench_soak.py MODE RATE SECONDS RECONNECT``; ``RECONNECT`` is the interval of reconnects in
seconds.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

from tests.launch import patch

patch(sys.argv[1])

from datetime import UTC, datetime  # noqa: E402
from uuid import uuid4  # noqa: E402

from greenlet import greenlet  # noqa: E402
from z4j_core.models import Event, EventKind  # noqa: E402

from z4j_bare import install_agent  # noqa: E402

#: Events recorded in one go.
GROUP = 10
#: Seconds between two samples.
SAMPLE_INTERVAL = 1.0
#: Seconds between two counts of greenlets, each of which walks the heap.
COUNT_INTERVAL = 10.0
#: Seconds to wait for the last acks: frames without any ack are sent again after 90.
ACK_TIMEOUT = 120.0

KINDS = (EventKind.TASK_RECEIVED, EventKind.TASK_STARTED, EventKind.TASK_SUCCEEDED)
HOME = Path(os.environ["Z4J_HOME"])
PAGE = os.sysconf("SC_PAGE_SIZE")


class Engine:
    """An engine without capabilities."""

    name = "celery"

    def capabilities(self):
        return set()


def main(rate, seconds, reconnect):
    runtime = install_agent(engines=[Engine()])
    began = sampled = asked = time.monotonic()
    counted_at, number, task = -COUNT_INTERVAL, 0, ""
    while (now := time.monotonic()) < began + seconds:
        for _ in range(max(0, int((now - began) * rate) - number)):
            if number % len(KINDS) == 0:
                task = str(uuid4())
            runtime.record_event(event(task, number))
            number += 1
        if now - asked > reconnect:
            asked = now
            runtime.request_reconnect()
        if now - sampled > SAMPLE_INTERVAL:
            sampled += SAMPLE_INTERVAL
            if count := now - counted_at > COUNT_INTERVAL:
                counted_at = now
            print_sample(runtime, now - began, count=count)
        time.sleep(GROUP / rate)
    deadline = time.monotonic() + ACK_TIMEOUT
    while runtime.stats()["acked"] < number and time.monotonic() < deadline:
        time.sleep(0.1)
    print_sample(runtime, time.monotonic() - began, count=True)
    runtime.stop()


def event(task, number):
    kind = KINDS[number % len(KINDS)]
    return Event.model_construct(
        id=uuid4(),
        engine="celery",
        task_id=task,
        kind=kind,
        occurred_at=datetime.now(UTC),
        data={
            "task_name": "bench.soak",
            "queue": "bench",
            "worker": "worker@bench",
            "args": [number],
            "kwargs": {},
        },
    )


def print_sample(runtime, at, *, count):
    stats = runtime.stats()
    counters = {
        name: stats[name]
        for name in ("produced", "acked", "lost", "buffered", "sessions", "restarts")
    }
    sample = {
        "at": round(at, 3),
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
        "fds": entries("fd") - 1,  # without the descriptor of this listing
        "threads": entries("task"),
        "greenlets": greenlets() if count else None,
        "file": sum(path.stat().st_size for path in HOME.glob("**/z4j-green-*")),
        "cpu": time.process_time(),
    }
    print(json.dumps({**sample, **counters}), flush=True)


def entries(folder):
    """Count the entries of a ``/proc`` directory of this process: descriptors or native threads."""
    return len(list(Path("/proc/self", folder).iterdir()))


def greenlets():
    """Count greenlets that have started and not ended."""
    return sum(1 for each in gc.get_objects() if isinstance(each, greenlet) and each)


if __name__ == "__main__":
    main(float(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
