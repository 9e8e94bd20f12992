"""A host that records events at a constant rate and prints one line of JSON a second.

``python bench_soak.py MODE NAME RATE SECONDS RECONNECT``; ``NAME`` begins the ids of its tasks, and
``RECONNECT`` is the interval of reconnects in seconds. At the end of ``SECONDS`` the host waits
until its home has no event of any process. SIGTERM stops it without that wait.
"""

import gc
import json
import os
import signal
import stat
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
#: Seconds between two counts of greenlets. Each count walks the heap.
COUNT_INTERVAL = 10.0
#: Seconds to wait until the home is empty. Frames without any ack are sent again after 90 s. The
#: file of a dead process is adopted within 60 s.
SETTLE_TIMEOUT = 150.0

#: The file that fills the disk.
FILLER = "filler"

KINDS = (EventKind.TASK_RECEIVED, EventKind.TASK_STARTED, EventKind.TASK_SUCCEEDED)
HOME = Path(os.environ["Z4J_HOME"])
PAGE = os.sysconf("SC_PAGE_SIZE")


class Engine:
    """An engine without capabilities."""

    name = "celery"

    def capabilities(self):
        return set()


def main(name, rate, seconds, reconnect):
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    runtime = install_agent(engines=[Engine()])
    began = sampled = asked = time.monotonic()
    counted_at, number = -COUNT_INTERVAL, 0
    while (now := time.monotonic()) < began + seconds and not terminated:
        for _ in range(max(0, int((now - began) * rate) - number)):
            runtime.record_event(event(name, number))
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
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while not (terminated or is_settled(runtime, number)) and time.monotonic() < deadline:
        time.sleep(0.1)
    print_sample(runtime, time.monotonic() - began, count=True)
    runtime.stop()


def is_settled(runtime, number):
    """Whether no process of this home has left an event: all are acknowledged or lost."""
    stats = runtime.stats()
    left = stats["buffered"] or stats["adopting"]
    done = stats["acked"] + sum(stats["lost"].values()) >= number
    return done and not left and len(list(HOME.glob("**/z4j-green-*.sqlite"))) == 1


def event(name, number):
    task, step = divmod(number, len(KINDS))
    return Event.model_construct(
        id=uuid4(),
        engine="celery",
        task_id=f"{name}-{task}",
        kind=KINDS[step],
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
        for name in (
            *("produced", "stored", "acked", "lost", "buffered", "adopting"),
            *("buffer_durable", "buffer_failures", "sessions", "restarts"),
        )
    }
    sample = {
        "at": round(at, 3),
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
        "fds": entries("fd") - 1,  # without the descriptor of this listing
        "threads": entries("task"),
        "greenlets": greenlets() if count else None,
        **disk_usage(),
        "cpu": time.process_time(),
    }
    print(json.dumps({**sample, **counters}), flush=True)


def disk_usage():
    """Return the bytes of all buffer files, and the number of all files in the home."""
    size = files = 0
    for path in HOME.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:  # another process has deleted it
            continue
        if not stat.S_ISDIR(status.st_mode):
            files += path.name != FILLER
            size += status.st_size if path.name.startswith("z4j-green-") else 0
    return {"file": size, "files": files}


def entries(folder):
    """Count the entries of a ``/proc`` directory of this process: descriptors or native threads."""
    return len(list(Path("/proc/self", folder).iterdir()))


def greenlets():
    """Count greenlets that have started and not ended."""
    return sum(1 for each in gc.get_objects() if isinstance(each, greenlet) and each)


if __name__ == "__main__":
    main(sys.argv[2], *map(float, sys.argv[3:]))
