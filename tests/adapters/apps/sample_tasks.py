"""What the tasks of every queue do; a task's effect is a line in the journal, which is a file."""

import asyncio
import json
import os
import time
from asyncio.events import _get_running_loop

#: Seconds between two looks.
CHECK_INTERVAL = 0.001


def log_action(action, **facts):
    """Append a line to the journal, in one write."""
    line = json.dumps({"action": action, "pid": os.getpid(), **facts}) + "\n"
    with open(os.environ["TASK_LOG"], "ab", buffering=0) as task_log:
        task_log.write(line.encode())


def add(x, y):
    """Take 20 ms, so that a worker can be stopped in the middle of many."""
    time.sleep(0.02)
    log_action("add", x=x, y=y)
    return x + y


def fails(text):
    raise ValueError(text)


def waits(seconds):
    """Begin, and take long."""
    log_action("waits")
    time.sleep(seconds)
    log_action("waited")


def checks_loop(seconds):
    """Count the moments in which a task without a loop of its own sees a running one, then run one of its own."""
    end, seen, checks = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        seen += _get_running_loop() is not None
        checks += 1
        time.sleep(CHECK_INTERVAL)
    log_action("checks_loop", seen=seen, checks=checks, own=asyncio.run(asyncio.sleep(0, "ran")))


async def add_async(x, y):
    await asyncio.sleep(0.02)
    log_action("add", x=x, y=y)
    return x + y


async def fails_async(text):
    raise ValueError(text)


async def waits_async(seconds):
    log_action("waits")
    await asyncio.sleep(seconds)
    log_action("waited")


async def checks_loop_async(seconds):
    """Count the moments in which the loop that is running is not the host's own, or in which it was held up."""
    host, late = asyncio.get_running_loop(), 0.0
    end, seen, checks = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        began = time.monotonic()
        await asyncio.sleep(CHECK_INTERVAL)
        late = max(late, time.monotonic() - began - CHECK_INTERVAL)
        seen += asyncio.get_running_loop() is not host
        checks += 1
    log_action("checks_loop", seen=seen, checks=checks, late=late, own="ran")
