"""A process that runs only the agent, and executes the requests of its control connection.

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
from z4j_bare.transport import auto, longpoll, websocket
from z4j_bare.wire import backoff, window

#: Interval of the measurement of blocked times, in seconds.
TICK = 0.01

#: Time of the first event of a batch.
EPOCH = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)


class Engine:
    name = "stub"

    def capabilities(self):
        return {"cancel_task"}

    async def cancel_task(self, task_id):
        return CommandResult(status="success", result={"cancelled": task_id})


class Host:
    """Answers each JSON line with one JSON line."""

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

    def produce(self, batch, first, count, seconds):
        """Record events ``first`` to ``first + count`` of a batch in the background.

        Each event has its own second, because the brain distinguishes events of one task by it.
        """
        self._producers.append(
            threading.Thread(
                target=self._produce, args=(batch, first, count, seconds / count), daemon=True
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
        """Return all texts that could become visible: reprs, stats and errors."""
        objects = (
            each
            for each in gc.get_objects()
            if str(type(each).__module__).startswith(("z4j_bare", "z4j_core"))
        )
        transports = self.runtime._agent.transports
        return {
            "reprs": [text for each in list(objects) for text in (repr(each), str(each))],
            "figures": [self.runtime.stats(), self.runtime.supervisor_state()],
            "errors": [
                connect_error(make().connect)
                for make in (transports.websocket, transports.longpoll)
            ],
        }

    def _produce(self, batch, first, count, gap):
        for number in range(first, first + count):
            self.runtime.record_event(make_event(batch, number))
            time.sleep(gap)

    def _tick(self):
        """Measure the longest time for which the process was blocked."""
        while True:
            began = time.monotonic()
            time.sleep(TICK)
            self._longest = max(self._longest, time.monotonic() - began)


def connect_error(connect):
    """Return the texts of a failed connect, with the contexts of its exception."""
    try:
        connect(b"{}")
    except Exception as error:
        texts, cause = [traceback.format_exc()], error
        while cause is not None:
            texts += [repr(cause), str(cause)]
            cause = cause.__context__
        return texts
    return []


def make_event(batch, number):
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=batch,
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=EPOCH + dt.timedelta(seconds=number),
        data={"task_name": "e2e.embedded", "number": number},
    )


def use_fast_timeouts():
    """Replace timeouts of half a minute by some seconds; other tests cover the default ones."""
    backoff.BACKOFF_POLICIES.update(
        dict.fromkeys(backoff.BACKOFF_POLICIES, backoff.BackoffPolicy(0.2, 1.0))
    )
    override(websocket, CONNECT_TIMEOUT=5.0, HELLO_TIMEOUT=5.0, SEND_TIMEOUT=5.0)
    override(websocket, PING_AFTER=1.0, DEAD_AFTER=5.0)
    override(longpoll, PROBE_TIMEOUT=5.0, POST_TIMEOUT=5.0, POLL_GRACE=5.0)
    # The brain accepts 600 requests a minute from an address, which all hosts share.
    override(longpoll, UPLOAD_RATE=3.0)
    override(longpoll, LearnedLimits=functools.partial(longpoll.LearnedLimits, wait=2))
    override(auto, PROBE_DELAY_INITIAL=2.0, PROBE_DELAY_MAX=2.0, HEALTH_TIMEOUT=2.0)
    override(window, ACK_DEADLINE=10.0)
    override(send, POLL_BUSY=0.2)


def override(module, **constants):
    """Set existing constants of a module."""
    for name, value in constants.items():
        assert hasattr(module, name), f"{module.__name__} has no {name}"
        setattr(module, name, value)


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.DEBUG, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    if "FAST_TIMEOUTS" in os.environ:
        use_fast_timeouts()
    host = Host()
    with socket.create_connection(("127.0.0.1", int(sys.argv[2]))) as control:
        host.serve(control.makefile("rw"))
    host.stop()
