"""Kills parents and children of prefork workers at calls of the channel, and verifies the rows."""

import itertools
import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.crash_harness import CrashHarness, Trial, read_leftovers

#: Points of a kill, and the number of places at each call: before it, after it, and for ``keep``
#: also between its writes.
CHILD_POINTS = {"keep": 3, "write": 2, "drop": 2}
PARENT_POINTS = {"read": 2, "take": 2}
POINTS = {**CHILD_POINTS, **PARENT_POINTS}

#: The calls at which a process stops, by point. The default is one of the first four.
CALLS = {"drop": (2, 3), "take": (1, 2)}

#: Tasks of each worker.
TASKS = 9

#: The name of the tasks.
TASK = "victim.run"

#: Duration of every fourth task in seconds, so that the parent sees the task as started.
NAP = 0.35

#: Lengths of the results: a short message, one of several KB, and one of two parts. Longer results
#: would be truncated.
LENGTHS = (3, 3000, 6000)

#: The states of a run that has ended.
ENDED = ("success", "failure", "revoked", "rejected")

#: The events that report the end of a run.
END_KINDS = frozenset(("task.succeeded", "task.failed", "task.revoked", "task.rejected"))


def result_of(number):
    """Return the result of a task. At each position it differs from the results of other tasks."""
    return (f"{number:03d}" * LENGTHS[-1])[: LENGTHS[number % 3]]


@dataclass
class PreforkKill:
    """A killed process of a worker.

    ``committed`` is the number of events that were in the buffer of a killed parent, ``left`` are
    their keys. ``begun`` and ``ended`` are the tasks whose begin and end are in the tasks' log.
    """

    trial: Trial
    reached: bool
    parent: bool
    committed: int
    left: list
    begun: list
    ended: list
    corrupt: list = field(default_factory=list)


@dataclass
class PreforkDelivery:
    """The tasks of one worker in the brain: the number of received events, and all faults.

    ``missing`` are committed events and tasks without a row, ``unexpected`` wrong states and
    values, ``duplicated`` second ends. ``lost_runs`` are the tasks of killed processes: Celery
    reports the task of a killed child, and the next host the tasks of a killed parent.
    """

    received: int = 0
    missing: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)
    duplicated: list = field(default_factory=list)
    reordered: list = field(default_factory=list)
    lost_runs: list = field(default_factory=list)

    @property
    def faults(self):
        return self.missing + self.unexpected + self.duplicated


def plan(number, seed=0):
    """Return ``number`` trials: each point and place in turn, at a random call."""
    rng = random.Random(seed)
    places = [(point, place) for point, places in POINTS.items() for place in range(places)]
    return [
        Trial(
            f"p{seed}-{index:04d}",
            events=3 * TASKS,
            point=point,
            # A child's first ``drop`` belongs to the child's start, not to a task.
            nth=rng.choice(CALLS.get(point, (1, 2, 3, 4))),
            statement=place,
            timeout=60.0,
        )
        for index, (point, place) in zip(range(number), itertools.cycle(places), strict=False)
    ]


class PreforkHarness(CrashHarness):
    """Runs prefork workers of one agent in one home.

    :param broker: URL of a Redis database.
    """

    script = Path(__file__).parents[1] / "e2e" / "apps" / "prefork_victim.py"

    def __init__(self, agent, home, broker):
        self._logs = home / "logs"
        self._logs.mkdir()
        super().__init__("threads", agent, home, CRASH_BROKER=broker, CRASH_LOGS=str(self._logs))

    def kill(self, trial):
        """Run a worker up to its point and kill the process there; return its result."""
        reply = self._kill(trial)
        with suppress(ProcessLookupError):  # the children of a killed parent
            os.killpg(reply["parent"], signal.SIGKILL)
        left, corrupt = read_leftovers(self.home)
        own = sorted(key for key in left if key[0].startswith(trial.name))
        parent = reply["pid"] == reply["parent"]
        lines = (self._logs / f"{trial.name}.log").read_text().splitlines()
        begun, ended = (
            sorted(int(line.split()[1]) for line in lines if line.startswith(word))
            for word in ("start", "end")
        )
        reached = reply["point"] == trial.point
        committed = max(reply["stored"], len(own))
        return PreforkKill(trial, reached, parent, committed, own, begun, ended, corrupt)


def verify(brain, project, kill, rows):
    """Return the :class:`PreforkDelivery` of a trial; ``rows`` are the project's tasks by id."""
    trial, delivery, kinds_by_task = kill.trial, PreforkDelivery(), {}
    for number in range(TASKS):
        task_id = trial.task(number)
        row = rows.get(task_id)
        events = brain.events(project, "celery", task_id) if row else []
        kinds_by_task[task_id] = [event["kind"] for event in events]
        delivery.received += len(events)
        judge(delivery, kill, number, row, kinds_by_task[task_id])
    if not kill.parent and len(delivery.lost_runs) > 1:
        delivery.unexpected.append(("more than one run of a killed child", *delivery.lost_runs))
    delivery.missing += [key for key in kill.left if key[1] not in kinds_by_task.get(key[0], ())]
    return delivery


def judge(delivery, kill, number, row, kinds):
    """Add the faults of one task to ``delivery``.

    Celery reports the task of a killed child as lost; every other task has its true end. The events
    of a killed parent may be lost while they are in its memory or in the channel. Then a task may
    be unknown, waiting or lost, and a success may lack its result. But no task stays started.
    """
    task_id = kill.trial.task(number)
    if row is None:
        if not kill.parent:
            delivery.missing.append((task_id, "no row"))
        return
    ends = [kind for kind in kinds if kind in END_KINDS]
    if len(ends) > 1:
        delivery.duplicated.append((task_id, ends))
    if row["state"] == "success":
        results = (result_of(number), None) if kill.parent else (result_of(number),)
        if row["result"] not in results or number not in kill.ended:
            delivery.unexpected.append((task_id, "success", str(row["result"])[:60]))
    elif row["state"] == "failure":
        if row["exception"] != "WorkerLostError":
            delivery.unexpected.append((task_id, "failure", row["exception"]))
        delivery.lost_runs.append(task_id)
    elif row["state"] == "started" or not kill.parent:
        delivery.unexpected.append((task_id, row["state"], "no end"))
