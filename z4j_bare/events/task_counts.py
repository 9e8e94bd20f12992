"""Counts the task events that the flush loop encodes, for ``z4j-bare metrics``.

The encoders count in the flush loop. The signal handlers count nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple

from z4j_bare.events.encode import encode_model
from z4j_bare.wire.fit import MAX_TASK_NAME_CHARS, fit_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from z4j_core.models import Event

#: Maximum number of task names. Further tasks are counted under :data:`OTHER`.
MAX_NAMES = 1000

#: Maximum number of queue names, and of worker names.
MAX_QUEUES = MAX_WORKERS = 100

#: Maximum number of exception classes of one task name and queue.
MAX_EXCEPTIONS = 50

#: Maximum number of combinations of worker, task name and queue. One takes about 1 KB.
MAX_CELLS = 4000

#: Maximum number of failures that are kept, with time and exception class.
MAX_FAILURES = 20

#: The label of everything beyond these limits.
OTHER = "other"

#: Upper bounds of the histograms of run times, in seconds. The first fourteen are the defaults of
#: ``prometheus_client``, which celery-exporter uses.
RUNTIME_BOUNDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(30.0, 60.0, 300.0, 1800.0),
)

#: Upper bounds of the histograms of the time from ``task.received`` to ``task.started``, in
#: seconds.
DELAY_BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1800.0)

#: Maps each counted kind of event to an attribute of :class:`TaskCell`.
#: ``task.failed`` is counted by exception class.
KINDS = {
    "task.received": "received",
    "task.started": "started",
    "task.succeeded": "succeeded",
    "task.retried": "retried",
    "task.revoked": "revoked",
    "task.rejected": "rejected",
}

#: Identifies a cell: engine, worker, task name, queue.
Key = tuple[str, str | None, str, str | None]


class TaskFailure(NamedTuple):
    """A failure of a task. ``at`` is in seconds since the epoch."""

    at: float
    name: str
    exception: str
    worker: str


class TaskCell:
    """The counts of one task name in one queue of one worker."""

    __slots__ = (
        "delay_seconds",
        "delays",
        "failed",
        "failures",
        "key",
        "runtime_seconds",
        "runtimes",
        *KINDS.values(),
    )

    def __init__(self, key: Key, failures: deque[TaskFailure]) -> None:
        self.key = key
        #: The last failures of all cells.
        self.failures = failures
        self.received = self.started = self.succeeded = 0
        self.retried = self.revoked = self.rejected = 0
        #: Number of failures by exception class.
        self.failed: dict[str, int] = {}
        #: Successful runs by run time, one number for each bound and one for longer runs.
        self.runtimes = [0] * (len(RUNTIME_BOUNDS) + 1)
        self.runtime_seconds = 0.0
        #: Runs by the time from ``task.received`` to ``task.started``.
        self.delays = [0] * (len(DELAY_BOUNDS) + 1)
        self.delay_seconds = 0.0

    def add_runtime(self, seconds: float) -> None:
        """Add the run time of a successful run."""
        self.runtimes[bisect_left(RUNTIME_BOUNDS, seconds)] += 1
        self.runtime_seconds += seconds

    def add_delay(self, seconds: float) -> None:
        """Add the time from ``task.received`` to ``task.started``."""
        # The difference of two hosts' clocks can be negative.
        seconds = max(0.0, seconds)
        self.delays[bisect_left(DELAY_BOUNDS, seconds)] += 1
        self.delay_seconds += seconds

    def add(self, kind: str, data: Mapping[str, Any]) -> None:
        """Count an event of any kind.

        :param data: the fields of the event. Only the exception class of a failure is read.
        """
        name = KINDS.get(kind)
        if name is not None:
            setattr(self, name, getattr(self, name) + 1)
        elif kind == "task.failed":
            exception = str(data.get("exception") or "Exception")
            if exception not in self.failed and len(self.failed) >= MAX_EXCEPTIONS:
                exception = OTHER
            self.failed[exception] = self.failed.get(exception, 0) + 1
            _, worker, task, _ = self.key
            self.failures.append(TaskFailure(time(), task, exception, worker or ""))

    def describe(self) -> dict[str, Any]:
        """Return the counts as plain JSON types."""
        engine, worker, name, queue = self.key
        return {
            "engine": engine,
            "worker": worker,
            "name": name,
            "queue": queue,
            **{kind: getattr(self, kind) for kind in KINDS.values()},
            "failed": dict(self.failed),
            "runtimes": list(self.runtimes),
            "runtime_seconds": round(self.runtime_seconds, 6),
            "delays": list(self.delays),
            "delay_seconds": round(self.delay_seconds, 6),
        }


class TaskCounts:
    """The counts of all tasks since the agent started.

    Only the flush loop changes the counts, except those of :meth:`report`.
    """

    def __init__(self) -> None:
        #: The time at which every count was zero, in seconds since the epoch.
        self.created = time()
        #: The last failures, oldest first, without arguments and texts.
        self.failures: deque[TaskFailure] = deque(maxlen=MAX_FAILURES)
        self._cells: dict[Key, TaskCell] = {}
        #: Counts of the events that report runs of dead processes. These cells are separate,
        #: because another thread counts these events.
        self._reported: dict[Key, TaskCell] = {}
        self._names: set[str] = set()
        self._queues: set[str] = set()
        self._workers: set[str] = set()

    def cell(self, engine: str, worker: str | None, name: str, queue: str | None) -> TaskCell:
        """Return the cell of a task name in a queue of a worker.

        Beyond one of the limits, the result is a cell whose name, queue or worker is
        :data:`OTHER`.
        """
        return self._cells.get((engine, worker, name, queue)) or self._add(
            engine, worker, name, queue
        )

    def encode_model(self, captured: tuple[Any, Event]) -> bytes:
        """Count an event that was captured as a z4j_core model, and return the event's bytes."""
        event = captured[1]
        kind, data = event.kind.value, event.data
        if kind in KINDS or kind == "task.failed":
            name = str(data.get("task_name") or "unknown")
            cell = self.cell(event.engine, _text(data, "worker"), name, _text(data, "queue"))
            cell.add(kind, data)
            runtime = data.get("runtime_ms")
            if kind == "task.succeeded" and isinstance(runtime, int | float) and runtime >= 0:
                cell.add_runtime(runtime / 1000)
        return encode_model(captured)

    def report(self, engine: str, kind: str, data: Mapping[str, Any]) -> None:
        """Count an event that reports a run of a dead process, as an event of this process."""
        key = self._key(engine, None, str(data.get("task_name") or "unknown"), _text(data, "queue"))
        if key not in self._reported and len(self._reported) >= MAX_CELLS:
            key = (engine, None, OTHER, OTHER)
        self._reported.setdefault(key, TaskCell(key, self.failures)).add(kind, data)

    def number_of_names(self) -> int:
        """Return the number of task names, which is at most :data:`MAX_NAMES`."""
        return len(self._names)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over the counts of all cells as plain JSON types.

        If two rows have the same labels, the reader must add their counts.
        """
        for cell in (*self._cells.values(), *self._reported.values()):
            yield cell.describe()

    def _add(self, engine: str, worker: str | None, name: str, queue: str | None) -> TaskCell:
        key = self._key(engine, worker, name, queue)
        if key not in self._cells and len(self._cells) >= MAX_CELLS:
            key = (engine, OTHER if worker else None, OTHER, OTHER)
        return self._cells.setdefault(key, TaskCell(key, self.failures))

    def _key(self, engine: str, worker: str | None, name: str, queue: str | None) -> Key:
        return (
            engine,
            None if worker is None else _limit(self._workers, fit_name(worker), MAX_WORKERS),
            _limit(self._names, fit_name(name, MAX_TASK_NAME_CHARS), MAX_NAMES),
            None if queue is None else _limit(self._queues, fit_name(queue), MAX_QUEUES),
        )


def _limit(known: set[str], name: str, limit: int) -> str:
    if name not in known:
        if len(known) >= limit:
            return OTHER
        known.add(name)
    return name


def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value if isinstance(value, str) and value else None
