"""The functions of all queues' tasks, which log their actions to a file."""

import asyncio
import json
import os
import time
from asyncio.events import _get_running_loop

#: Seconds between two checks for a running loop.
CHECK_INTERVAL = 0.001

#: Duration of ``add``, in seconds.
ADD_SECONDS = 0.02


def log_action(action, **facts):
    """Append an action to the log with a single write."""
    line = json.dumps({"action": action, "pid": os.getpid(), **facts}) + "\n"
    with open(os.environ["TASK_LOG"], "ab", buffering=0) as task_log:
        task_log.write(line.encode())


def add(x, y):
    """Take 20 ms, so that a worker can be stopped while it has many tasks."""
    time.sleep(ADD_SECONDS)
    log_action("add", x=x, y=y)
    return x + y


def fails(text):
    raise ValueError(text)


def waits(seconds):
    """Log the start, and take a long time."""
    log_action("waits")
    time.sleep(seconds)
    log_action("waited")


def checks_loop(seconds):
    """Count how often a running loop is visible, then run an own loop."""
    end, seen, checks = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        seen += _get_running_loop() is not None
        checks += 1
        time.sleep(CHECK_INTERVAL)
    log_action("checks_loop", seen=seen, checks=checks, own=asyncio.run(asyncio.sleep(0, "ran")))


async def add_async(x, y):
    await asyncio.sleep(ADD_SECONDS)
    log_action("add", x=x, y=y)
    return x + y


async def fails_async(text):
    raise ValueError(text)


async def waits_async(seconds):
    log_action("waits")
    await asyncio.sleep(seconds)
    log_action("waited")


async def checks_loop_async(seconds):
    """Count how often the running loop is not the host's own, and measure its longest delay."""
    host, late = asyncio.get_running_loop(), 0.0
    end, seen, checks = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        began = time.monotonic()
        await asyncio.sleep(CHECK_INTERVAL)
        late = max(late, time.monotonic() - began - CHECK_INTERVAL)
        seen += asyncio.get_running_loop() is not host
        checks += 1
    log_action("checks_loop", seen=seen, checks=checks, late=late, own="ran")
