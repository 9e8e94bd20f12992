"""Kills agent processes at chosen points, and verifies which events the brain received."""

import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import z4j_bare
from z4j_bare.buffer.report import rows
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.worker import worker_environment

KINDS = ("task.received", "task.started", "task.succeeded")

#: Fields of a task that its events set when they arrive in order.
TASK_FIELDS = (
    "state",
    "args",
    "received_at",
    "started_at",
    "finished_at",
    "created_at",
    "updated_at",
)

#: Points of a kill, and the number of SQL statements in the call there (0: the call has none). A
#: number that is too large does no harm: the process is then killed after the call.
POINTS = {"append": 6, "send": 0, "sent": 0, "ack": 0, "delete": 5, "adopt": 12}

#: Events per commit. A run has several commits and several frames.
GROUP = 12

#: Points that are only reached in a session.
ONLINE = frozenset(("send", "sent", "ack", "delete"))

SCRIPT = Path(__file__).parents[1] / "e2e" / "apps" / "victim.py"


@dataclass(frozen=True)
class Trial:
    """One run of a process: it records ``events`` and stops before a statement at ``point``.

    It stops before the SQL statement with the number ``statement`` in the ``nth`` call at
    ``point``; 0 means before the call. A process that does not reach its point is killed after
    ``timeout`` seconds. Without a point it runs until all rows are sent.
    """

    name: str
    events: int = 0
    point: str = ""
    nth: int = 1
    statement: int = 0
    timeout: float = 20.0

    def task(self, number):
        """Return a task's id."""
        return f"{self.name}-{number:03d}"


@dataclass
class Kill:
    """A killed trial: whether its point was reached, and how many events were committed."""

    trial: Trial
    reached: bool
    committed: int
    corrupt: list = field(default_factory=list)


@dataclass
class Delivery:
    """The events of one trial in the brain: the number of received events, and all faults."""

    received: int
    missing: list
    unexpected: list
    duplicated: list
    #: Tasks with an event that arrived after a later event. This is not a fault of the agent. An
    #: event that the brain's database rejects ("database is locked") gets no ack and is sent again.
    reordered: list

    @property
    def faults(self):
        return self.missing + self.unexpected + self.duplicated


def plan(number, events, seed=0):
    """Return ``number`` trials: each point in turn, with a random call and statement."""
    rng = random.Random(seed)
    trials = []
    for index, point in zip(range(number), itertools.cycle(POINTS)):
        # One adoption step moves all rows of one trial.
        nth = 1 if point == "adopt" else rng.randint(1, 3)
        trials.append(
            Trial(f"v{seed}-{index:04d}", events, point, nth, rng.randint(0, POINTS[point]))
        )
    return trials


class CrashHarness:
    """Runs processes of one agent in one home. Each process adopts the rows of the previous one.

    :param mode: ``threads``, ``gevent`` or ``eventlet``.
    :param agent: ``Credentials``.
    """

    script = SCRIPT

    def __init__(self, mode, agent, home, **environment):
        self.home = home / "agent"
        root = str(Path(z4j_bare.__file__).parents[1])
        extra = {
            **agent.env(self.home),
            "PYTHONPATH": root,
            "PYTHONWARNINGS": "ignore",
            "Z4J_FLUSH_EVENTS": str(GROUP),
            "Z4J_FLUSH_INTERVAL_SECONDS": "0.02",
            **environment,
        }
        self._log = (home / f"victims-{mode}.log").open("ab")
        self._server = subprocess.Popen(
            [sys.executable, str(self.script), mode],
            env=worker_environment(extra),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._server.kill()
        self._server.wait()
        for stream in (self._server.stdin, self._server.stdout, self._log):
            stream.close()

    def kill(self, trial):
        """Run a process up to its point and kill it there; return its :class:`Kill`."""
        reply = self._kill(trial)
        left, corrupt = read_leftovers(self.home)
        last = max(
            (number for number in range(trial.events) if key(trial, number) in left), default=-1
        )
        return Kill(trial, reply["point"] == trial.point, max(reply["stored"], last + 1), corrupt)

    def upload_rest(self, timeout=90.0):
        """Run a last process until all rows are sent.

        Raises ``HarnessError`` if rows are left after ``timeout`` seconds.
        """
        self._run(Trial("last", timeout=timeout))
        self._read_reply()
        left, _ = read_leftovers(self.home)
        if left:
            raise HarnessError(
                f"{len(left)} rows are still buffered after {timeout:g} s: the brain is too slow"
            )

    def _kill(self, trial):
        """Run a process up to its point, kill it there, and return what it answered."""
        reply = self._run(trial)
        os.kill(reply["pid"], signal.SIGKILL)
        self._read_reply()
        return reply

    def _run(self, trial):
        self._server.stdin.write(json.dumps(asdict(trial)).encode() + b"\n")
        return self._read_reply()

    def _read_reply(self):
        return json.loads(self._server.stdout.readline())


def key(trial, number):
    """Return ``(task id, kind)`` of an event."""
    task, step = divmod(number, len(KINDS))
    return trial.task(task), KINDS[step]


def read_leftovers(home):
    """Return ``(task id, kind)`` of all buffered events, and the names of corrupt files."""
    keys, corrupt = set(), []
    for path in home.glob("**/z4j-green-*.sqlite"):
        # The files are copied, because opening them would truncate the log.
        with tempfile.TemporaryDirectory() as folder:
            for suffix in ("", "-wal"):
                source = path.with_name(path.name + suffix)
                if source.exists():
                    shutil.copy2(source, Path(folder) / f"copy{suffix}")
            with closing(sqlite3.connect(Path(folder) / "copy")) as connection:
                if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                    corrupt.append(path.name)
                    continue
                tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if tables != (0,):  # a process killed while it creates the file leaves no table
                    payloads = [json.loads(row.payload) for row in rows(Path(folder) / "copy")]
                    keys.update(
                        (payload["task_id"], payload["kind"])
                        for payload in payloads
                        if "task_id" in payload  # not a result, and not an event of the worker
                    )
    return keys, corrupt


def verify(brain, project, kill, rows):
    """Return the :class:`Delivery` of a killed trial; ``rows`` are the project's tasks by id."""
    trial, received, duplicated, reordered = kill.trial, [], [], []
    for task in range(-(-trial.events // len(KINDS))):
        row = rows.get(trial.task(task))
        kinds = (
            [event["kind"] for event in brain.events(project, "celery", trial.task(task))]
            if row
            else []
        )
        duplicated += [(trial.task(task), kind) for kind in set(kinds) if kinds.count(kind) > 1]
        received += [task * len(KINDS) + step for step, kind in enumerate(KINDS) if kind in kinds]
        if row and not _in_order(row, kinds, task):
            reordered.append((trial.task(task), kinds, {name: row[name] for name in TASK_FIELDS}))
    missing = [key(trial, number) for number in range(kill.committed) if number not in received]
    # An event beyond the number of received events means that an earlier event is missing.
    unexpected = [key(trial, number) for number in received if number >= len(received)]
    return Delivery(len(received), missing, unexpected, duplicated, reordered)


def _in_order(row, kinds, task):
    """Whether a row has the values of all its events. An event that arrives late sets no value."""
    received, started, succeeded = (kind in kinds for kind in KINDS)
    shows = bool(row["received_at"]) == received and bool(row["started_at"]) == started
    return (
        shows
        and (not received or row["args"] == [task])
        and (row["state"] == "success") == succeeded
    )
