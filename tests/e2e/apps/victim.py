"""Agent processes to be killed: ``python victim.py MODE`` with the settings in ``Z4J_*``.

The script patches and imports once and forks a process for each request, because a start costs more
than a run. A request is a line of JSON with the fields of ``tests.support.crash_harness.Trial``. At
its point, the process answers with a line of JSON and waits for a kill. A process without a point
runs until all rows are sent.
"""

import os
import signal
import sys

# Patched functions would start a hub that the children inherit. Eventlet's write also never ends
# when the reader is gone.
fork, waitpid, write = os.fork, os.waitpid, os.write

from tests.launch import patch  # noqa: E402

patch(sys.argv[1])

import itertools  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from datetime import UTC, datetime, timedelta  # noqa: E402
from pathlib import Path  # noqa: E402
from uuid import uuid4  # noqa: E402

from z4j_core.models import Event, EventKind  # noqa: E402

import z4j_bare.agent  # noqa: E402, F401 - before the forks
from tests.support.crash_harness import GROUP, KINDS, ONLINE, Trial  # noqa: E402
from tests.support.store_scenario import StatementCounter  # noqa: E402
from z4j_bare import install_agent  # noqa: E402
from z4j_bare.buffer.store import BufferStore  # noqa: E402
from z4j_bare.pipeline.send import Sender  # noqa: E402
from z4j_bare.pipeline.session import Connection  # noqa: E402

#: The descriptor of the answers. The output of the host goes to standard error.
ANSWERS = os.dup(1)
os.dup2(2, 1)

#: Seconds between two groups of events.
PAUSE = 0.02


class Engine:
    name = "celery"

    def capabilities(self):
        return set()


class Host:
    def __init__(self, trial):
        self.trial = trial
        self.runtime = None
        self.began = datetime.now(UTC)

    def run(self):
        """Record the events and run up to the point, or until all rows are sent."""
        self.install_stop()
        self.runtime = install_agent(engines=[Engine()])
        deadline = time.monotonic() + self.trial.timeout
        if self.trial.point in ONLINE:
            self.wait(lambda: self.runtime.stats()["sessions"], deadline)
        for number in range(self.trial.events):
            self.runtime.record_event(self.event(number))
            if number % GROUP == GROUP - 1:
                time.sleep(PAUSE)
        self.wait(self.is_drained, deadline)
        if self.trial.point:
            self.stop("")
        self.runtime.stop()
        self.report("")

    def wait(self, condition, deadline):
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)

    def is_drained(self):
        """Whether all rows, here and in orphaned stores, are acknowledged and deleted."""
        stats = self.runtime.stats()
        if min(stats["stored"], stats["acked"]) < self.trial.events or stats["adopting"]:
            return False
        left = (
            self.runtime._agent.buffer.stats().rows
        )  # the runtime's own figure is up to a second old
        return (
            not left and len(list(Path(os.environ["Z4J_HOME"]).glob("**/z4j-green-*.sqlite"))) == 1
        )

    def event(self, number):
        """Return an event: received, started and succeeded of each task, a millisecond apart."""
        task, step = divmod(number, len(KINDS))
        own = ({"args": [task], "kwargs": {}}, {"worker": "w"}, {"result": task})[step]
        return Event.model_construct(
            id=uuid4(),
            engine="celery",
            task_id=self.trial.task(task),
            kind=EventKind(KINDS[step]),
            occurred_at=self.began + timedelta(milliseconds=number),
            data={"task_name": "victim", "queue": "q", **own},
        )

    def install_stop(self):
        """Stop at the ``nth`` call of the point: before a ``statement``, or before or after it."""
        owners = {
            "append": (BufferStore, "append_events"),
            "delete": (BufferStore, "confirm"),
            "adopt": (BufferStore, "import_rows"),
            "send": (Connection, "send"),
            "sent": (Connection, "send"),
            "ack": (Sender, "on_ack"),
        }
        if self.trial.point not in owners:
            return
        owner, name = owners[self.trial.point]
        original, calls = getattr(owner, name), itertools.count(1)

        def stopping_call(this, *args):
            if (owner is Connection and args[0] != "event_batch") or next(calls) != self.trial.nth:
                return original(this, *args)
            if owner is BufferStore and self.trial.statement:
                StatementCounter(
                    this, self.trial.statement, lambda _watch: self.stop(self.trial.point)
                )
            elif self.trial.point != "sent":
                self.stop(self.trial.point)
            original(this, *args)
            return self.stop(self.trial.point)

        setattr(owner, name, stopping_call)

    def stop(self, point):
        """Report the point and block this native thread, which may run the hub."""
        self.report(point)
        while True:
            signal.pause()

    def report(self, point):
        stored = self.runtime.stats().get("stored", 0) if self.runtime else 0
        answer({"pid": os.getpid(), "point": point, "stored": stored})


def answer(fields):
    """Write a line of JSON to the harness."""
    write(ANSWERS, json.dumps(fields).encode() + b"\n")


def serve(host_of=Host):
    for line in sys.stdin:
        child = fork()
        if not child:
            try:
                host_of(Trial(**json.loads(line))).run()
            finally:
                os._exit(0)
        waitpid(child, 0)
        answer({})


if __name__ == "__main__":
    serve()
