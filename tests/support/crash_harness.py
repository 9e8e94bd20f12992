"""Hosts of the agent that are killed at a chosen point, and what the brain has to know of them afterwards."""

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

#: What a row shows of a task's events, if each came before the next.
SHOWN = ("state", "args", "received_at", "started_at", "finished_at", "created_at", "updated_at")

#: Where a host can be killed, and how many SQL statements a call has there (0: none; a few more do no harm).
POINTS = {"append": 6, "send": 0, "sent": 0, "ack": 0, "delete": 5, "adopt": 12}

#: Events of one commit: a life has several, and several frames.
GROUP = 12

#: Points that a host without a session never comes to.
ONLINE = frozenset(("send", "sent", "ack", "delete"))

SCRIPT = Path(__file__).parents[1] / "e2e" / "apps" / "victim.py"


@dataclass(frozen=True)
class Trial:
    """One life: record ``events``, die before SQL statement ``statement`` of the ``nth`` call at ``point``.

    ``statement`` 0 is before the call. After ``patience`` seconds without coming to its point it is killed where it is; without
    a point it lives until all is sent.
    """

    name: str
    events: int = 0
    point: str = ""
    nth: int = 1
    statement: int = 0
    patience: float = 20.0

    def task(self, number):
        """Return a task's id."""
        return f"{self.name}-{number:03d}"


@dataclass
class Death:
    """How a trial ended: whether it came to its ``point``, and how many of its first events had been committed by then."""

    trial: Trial
    reached: bool
    committed: int
    corrupt: list = field(default_factory=list)


@dataclass
class Verdict:
    """What the brain has of one trial's events: how many of the first ones, and everything that should not be."""

    told: int
    missing: list
    stray: list
    doubled: list
    #: Tasks of which it took an event after a later one. No fault of the agent's: what the brain's database refuses for a
    #: moment ("database is locked") is not acknowledged and comes again, behind what it did take.
    overtaken: list

    @property
    def faults(self):
        return self.missing + self.stray + self.doubled


def plan(number, events, seed=0):
    """Return trials that take turns at the points; call and statement vary."""
    chance = random.Random(seed)
    trials = []
    for index, point in zip(range(number), itertools.cycle(POINTS)):
        nth = (
            1 if point == "adopt" else chance.randint(1, 3)
        )  # one step takes all that one victim leaves
        trials.append(
            Trial(f"v{seed}-{index:04d}", events, point, nth, chance.randint(0, POINTS[point]))
        )
    return trials


class Victims:
    """Lives in one home under one agent, one after the other, so that each finds what the one before it left.

    :param mode: ``threads``, ``gevent`` or ``eventlet``.
    :param agent: ``Credentials``.
    """

    def __init__(self, mode, agent, home):
        self.home = home / "agent"
        root = str(Path(z4j_bare.__file__).parents[1])
        extra = {
            **agent.env(self.home),
            "PYTHONPATH": root,
            "PYTHONWARNINGS": "ignore",
            "Z4J_FLUSH_EVENTS": str(GROUP),
            "Z4J_FLUSH_INTERVAL_SECONDS": "0.02",
        }
        self._log = (home / f"victims-{mode}.log").open("ab")
        self._server = subprocess.Popen(
            [sys.executable, str(SCRIPT), mode],
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
        """Let a host live up to its point and kill it there; return its :class:`Death`."""
        said = self._live(trial)
        os.kill(said["pid"], signal.SIGKILL)
        self._answer()
        left, corrupt = examine(self.home)
        last = max(
            (number for number in range(trial.events) if key(trial, number) in left), default=-1
        )
        return Death(trial, said["point"] == trial.point, max(said["stored"], last + 1), corrupt)

    def bury(self, patience=90.0):
        """Let a last host send everything that is left; ``HarnessError`` when ``patience`` seconds are not enough for it."""
        self._live(Trial("heir", patience=patience))
        self._answer()
        left, _ = examine(self.home)
        if left:
            raise HarnessError(
                f"{len(left)} rows are still buffered after {patience:g} s: the brain is too slow"
            )

    def _live(self, trial):
        self._server.stdin.write(json.dumps(asdict(trial)).encode() + b"\n")
        return self._answer()

    def _answer(self):
        return json.loads(self._server.stdout.readline())


def key(trial, number):
    """Return ``(task id, kind)`` of an event."""
    task, step = divmod(number, len(KINDS))
    return trial.task(task), KINDS[step]


def examine(home):
    """Return what dead processes left there: ``(task id, kind)`` of all rows, and the names of files that are not whole."""
    keys, corrupt = set(), []
    for path in home.glob("**/z4j-green-*.sqlite"):
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # opening the file itself would shorten its log
            for suffix in ("", "-wal"):
                source = path.with_name(path.name + suffix)
                if source.exists():
                    shutil.copy2(source, Path(folder) / f"copy{suffix}")
            with closing(sqlite3.connect(Path(folder) / "copy")) as connection:
                if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                    corrupt.append(path.name)
                elif connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (
                    0,
                ):  # killed while making it
                    events = (json.loads(row.payload) for row in rows(Path(folder) / "copy"))
                    keys.update((event["task_id"], event["kind"]) for event in events)
    return keys, corrupt


def judge(brain, project, death, rows):
    """Return the :class:`Verdict` on one death; ``rows`` are the project's tasks by id."""
    trial, told, doubled, overtaken = death.trial, [], [], []
    for task in range(-(-trial.events // len(KINDS))):
        row = rows.get(trial.task(task))
        kinds = (
            [event["kind"] for event in brain.events(project, "celery", trial.task(task))]
            if row
            else []
        )
        doubled += [(trial.task(task), kind) for kind in set(kinds) if kinds.count(kind) > 1]
        told += [task * len(KINDS) + step for step, kind in enumerate(KINDS) if kind in kinds]
        if row and not _in_order(row, kinds, task):
            overtaken.append((trial.task(task), kinds, {name: row[name] for name in SHOWN}))
    missing = [key(trial, number) for number in range(death.committed) if number not in told]
    stray = [
        key(trial, number) for number in told if number >= len(told)
    ]  # with one before it missing
    return Verdict(len(told), missing, stray, doubled, overtaken)


def _in_order(row, kinds, task):
    """Whether a row shows all that its events say: one that comes after a later one leaves no trace in it."""
    received, started, succeeded = (kind in kinds for kind in KINDS)
    shows = bool(row["received_at"]) == received and bool(row["started_at"]) == started
    return (
        shows
        and (not received or row["args"] == [task])
        and (row["state"] == "success") == succeeded
    )
