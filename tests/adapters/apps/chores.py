"""What the tasks of every queue do; a task's effect is a line in the journal, which is a file."""

import asyncio
import json
import os
import time
from asyncio.events import _get_running_loop

#: Seconds between two looks.
GLANCE = 0.001


def note(did, **facts):
    """Append a line to the journal, in one write."""
    line = json.dumps({"did": did, "pid": os.getpid(), **facts}) + "\n"
    with open(os.environ["JOURNAL"], "ab", buffering=0) as journal:
        journal.write(line.encode())


def add(x, y):
    """Take 20 ms, so that a worker can be stopped in the middle of many."""
    time.sleep(0.02)
    note("add", x=x, y=y)
    return x + y


def fails(text):
    raise ValueError(text)


def waits(seconds):
    """Begin, and take long."""
    note("waits")
    time.sleep(seconds)
    note("waited")


def looks(seconds):
    """Count the moments in which a task without a loop of its own sees a running one, then run one of its own."""
    end, seen, glances = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        seen += _get_running_loop() is not None
        glances += 1
        time.sleep(GLANCE)
    note("looks", seen=seen, glances=glances, own=asyncio.run(asyncio.sleep(0, "ran")))


async def add_async(x, y):
    await asyncio.sleep(0.02)
    note("add", x=x, y=y)
    return x + y


async def fails_async(text):
    raise ValueError(text)


async def waits_async(seconds):
    note("waits")
    await asyncio.sleep(seconds)
    note("waited")


async def looks_async(seconds):
    """Count the moments in which the loop that is running is not the host's own, or in which it was held up."""
    host, late = asyncio.get_running_loop(), 0.0
    end, seen, glances = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        began = time.monotonic()
        await asyncio.sleep(GLANCE)
        late = max(late, time.monotonic() - began - GLANCE)
        seen += asyncio.get_running_loop() is not host
        glances += 1
    note("looks", seen=seen, glances=glances, late=late, own="ran")
