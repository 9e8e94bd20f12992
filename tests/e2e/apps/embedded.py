"""A host that is nothing but a host: it installs the agent and does what the lines on its control connection ask for.

``python embedded.py MODE PORT``; see :mod:`tests.support.e2e_host`.
"""

# ruff: noqa: E402 - the process is patched before the other imports

import sys

from tests.launch import patch

patch(sys.argv[1])

import datetime as dt
import functools
import gc
import json
import logging
import os
import socket
import threading
import time
import traceback
from uuid import uuid4

from z4j_core.models import CommandResult, Event, EventKind

from z4j_bare import install_agent
from z4j_bare.pipeline import send
from z4j_bare.transport import auto as fallback
from z4j_bare.transport import longpoll, websocket
from z4j_bare.wire import backoff, window

EPOCH = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)


class Engine:
    name = "stub"

    def capabilities(self):
        return {"cancel_task"}

    async def cancel_task(self, task_id):
        return CommandResult(status="success", result={"cancelled": task_id})


class Host:
    """Answers each line of JSON with one."""

    def __init__(self):
        self.runtime = install_agent(engines=[Engine()])
        self._producers = []
        self._longest = 0.0
        threading.Thread(target=self._tick, daemon=True).start()

    def serve(self, lines):
        for line in lines:
            request = json.loads(line)
            lines.write(json.dumps(getattr(self, request.pop("do"))(**request)) + "\n")
            lines.flush()

    def produce(self, lot, first, count, seconds):
        """Record events ``first`` to ``first + count`` of the lot, spread over some seconds, in the background.

        The brain knows events of one task and kind apart by the second: hence their times.
        """
        self._producers.append(
            threading.Thread(
                target=self._produce, args=(lot, first, count, seconds / count), daemon=True
            )
        )
        self._producers[-1].start()

    def stats(self):
        busy = any(producer.is_alive() for producer in self._producers)
        return {**self.runtime.stats(), "busy": busy, "longest_gap": self._longest}

    def reconnect(self):
        self.runtime.request_reconnect()

    def stop(self):
        self.runtime.stop()

    def expose(self):
        """Return every text of ours that somebody could come to see: how things call themselves, and what errors say."""
        ours = (
            each
            for each in gc.get_objects()
            if str(type(each).__module__).startswith(("z4j_bare", "z4j_core"))
        )
        routes = self.runtime._agent.transports
        return {
            "reprs": [text for each in list(ours) for text in (repr(each), str(each))],
            "figures": [self.runtime.stats(), self.runtime.supervisor_state()],
            "errors": [report(road().connect) for road in (routes.websocket, routes.longpoll)],
        }

    def _produce(self, lot, first, count, gap):
        for number in range(first, first + count):
            self.runtime.record_event(an_event(lot, number))
            time.sleep(gap)

    def _tick(self):
        """Measure how long the host is kept from running."""
        while True:
            began = time.monotonic()
            time.sleep(0.01)
            self._longest = max(self._longest, time.monotonic() - began)


def report(connect):
    """Return how connecting fails, with everything that the error keeps of what was before it."""
    try:
        connect(b"{}")
    except Exception as error:
        told, seen = [traceback.format_exc()], error
        while seen is not None:
            told += [repr(seen), str(seen)]
            seen = seen.__context__
        return told
    return []


def an_event(lot, number):
    return Event.model_construct(
        id=uuid4(), engine="stub", task_id=lot, kind=EventKind.TASK_SUCCEEDED,
        occurred_at=EPOCH + dt.timedelta(seconds=number), data={"task_name": "e2e.embedded", "number": number},
    )  # fmt: skip


def hurry():
    """Wait a second where an agent waits half a minute: patience as such has its own tests."""
    backoff.BACKOFF_POLICIES.update(
        dict.fromkeys(backoff.BACKOFF_POLICIES, backoff.BackoffPolicy(0.2, 1.0))
    )
    websocket.CONNECT_TIMEOUT = websocket.SEND_TIMEOUT = longpoll.PROBE_TIMEOUT = 5.0
    websocket.PING_AFTER, websocket.DEAD_AFTER = 1.0, 5.0
    longpoll.POST_TIMEOUT, longpoll.POLL_GRACE = 5.0, 5.0
    longpoll.UPLOAD_RATE = (
        3.0  # the brain takes 600 requests a minute from an address, and that is everybody's
    )
    longpoll.LearnedLimits = functools.partial(longpoll.LearnedLimits, wait=2)
    fallback.PROBE_DELAY_INITIAL = fallback.PROBE_DELAY_MAX = fallback.HEALTH_TIMEOUT = 2.0
    window.ACK_DEADLINE = 10.0
    send.IDLE = 0.2


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.DEBUG, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    if "HURRY" in os.environ:
        hurry()
    host = Host()
    with socket.create_connection(("127.0.0.1", int(sys.argv[2]))) as control:
        host.serve(control.makefile("rw"))
    host.stop()
