"""Prefork workers whose parent or child is killed: ``python prefork_victim.py threads``.

The protocol is that of ``victim.py``, for the points of ``tests.support.prefork_crash``. A worker
runs ``events / 3`` tasks in two children. The process that reaches the point first answers with its
pid and waits for a kill. If a child was killed, the worker runs the other tasks and stops cleanly.
"""

import os
import select
import signal
import sys
import threading
import time
from itertools import count
from pathlib import Path

from victim import Host, answer, serve, write

import celery  # isort: skip
import celery.bin.worker
import celery.concurrency.prefork
import celery.worker.state
import kombu.transport.redis  # noqa: F401
import z4j_celery.engine
from celery import signals

from tests.support.prefork_crash import CHILD_POINTS, NAP, TASK, result_of
from z4j_bare import install_agent
from z4j_bare.engines.celery import channel, prefork_parent  # noqa: F401
from z4j_bare.engines.celery.kept_starts import KeptStarts

#: Seconds between two checks of the worker's state.
INTERVAL = 0.02


class Numbers:
    """The numbers of the slots, for a child that stops between the message and its number."""

    def __init__(self, numbers, stop):
        self._numbers = numbers
        self._stop = stop

    def __setitem__(self, slot, number):
        if number:
            self._stop()
        self._numbers[slot] = number


class PreforkHost:
    """A worker with the agent."""

    def __init__(self, trial):
        self.trial = trial
        self.folder = Path(os.environ["CRASH_LOGS"])
        self.log = os.open(
            self.folder / f"{trial.name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600
        )
        self.runtime = None
        self.parent = os.getpid()

    def run(self):
        os.setpgid(0, 0)
        self.install_stop()
        app = celery.Celery("victim", broker=os.environ["CRASH_BROKER"], set_as_current=True)
        app.conf.update(
            task_default_queue=self.trial.name,
            task_ignore_result=True,
            worker_hijack_root_logger=False,
            worker_redirect_stdouts=False,
            broker_connection_retry_on_startup=False,
        )
        app.task(name=TASK)(self.task)
        ready = threading.Event()
        signals.worker_ready.connect(lambda **_kwargs: ready.set(), weak=False)
        self.runtime = install_agent(
            engines=[z4j_celery.engine.CeleryEngineAdapter(celery_app=app)]
        )
        threading.Thread(target=self.follow, args=(app, ready), daemon=True).start()
        worker = app.Worker(
            pool="prefork",
            concurrency=2,
            loglevel="WARNING",
            without_mingle=True,
            without_gossip=True,
            without_heartbeat=True,
            hostname=f"{self.trial.name}@crash",
        )
        worker.start()

    def task(self, number):
        """Write start and end to a log file, which keeps them after a kill."""
        write(self.log, f"start {number}\n".encode())
        if number % 4 == 3:
            time.sleep(NAP)
        write(self.log, f"end {number}\n".encode())
        return result_of(number)

    def follow(self, app, ready):
        """Send the tasks, and stop the worker when all have ended."""
        ready.wait(self.trial.timeout)
        tasks = self.trial.events // 3
        for number in range(tasks):
            app.send_task(TASK, (number,), task_id=self.trial.task(number))
        state, deadline = celery.worker.state, time.monotonic() + self.trial.timeout
        while time.monotonic() < deadline:
            open_tasks = len(state.active_requests) + len(state.reserved_requests)
            if sum(state.total_count.values()) >= tasks and not open_tasks:
                break
            time.sleep(INTERVAL)
        else:
            self.stop("")
        if not (self.folder / f"{self.trial.name}.stopped").exists():
            self.stop("")
        os.kill(os.getpid(), signal.SIGTERM)

    def install_stop(self):
        """Stop at the ``nth`` call of the point: before it, after it, or between its writes."""
        point, statement = self.trial.point, self.trial.statement
        owner, name = {
            "write": (channel, "write"),
            "read": (channel, "read"),
            "keep": (KeptStarts, "keep"),
            "drop": (KeptStarts, "drop"),
            "take": (KeptStarts, "message"),
        }[point]
        original, calls = getattr(owner, name), count(1)

        def stopping_call(first, *args):
            here = (os.getpid() != self.parent) == (point in CHILD_POINTS)
            if name == "read" and not select.select([first], [], [], 0)[0]:
                here = False  # nothing to read
            if not here or next(calls) != self.trial.nth:
                return original(first, *args)
            if not statement:
                self.stop(point)
            elif point == "keep" and statement == 1:
                numbers = first._numbers
                first._numbers = Numbers(numbers, lambda: self.stop(point))
                found = original(first, *args)
                first._numbers = numbers
                return found
            found = original(first, *args)
            self.stop(point)
            return found

        setattr(owner, name, stopping_call)

    def stop(self, point):
        """Report the point and wait for a kill, in the first process that calls this method."""
        try:
            os.close(
                os.open(self.folder / f"{self.trial.name}.stopped", os.O_CREAT | os.O_EXCL, 0o600)
            )
        except FileExistsError:
            return
        stored = self.runtime.stats().get("stored", 0) if os.getpid() == self.parent else 0
        answer({"pid": os.getpid(), "parent": self.parent, "point": point, "stored": stored})
        while True:
            time.sleep(60)


def host_of(trial):
    """Return a worker, or the host that sends the remaining rows if the trial has no point."""
    return PreforkHost(trial) if trial.point else Host(trial)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(host_of)
