"""State of the tasks that are being processed, and properties of their task types."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery.app.task import Task
    from z4j_celery.meta import TaskMeta

#: Kinds of events.
RECEIVED, STARTED, SUCCEEDED = "task.received", "task.started", "task.succeeded"
FAILED, RETRIED, REVOKED, REJECTED = "task.failed", "task.retried", "task.revoked", "task.rejected"

#: Maximum number of task states. If a task returns to the broker and another worker runs it, this
#: process sees no end of the task, and the task's state stays until it is evicted.
MAX_TASKS = 20_000

#: Maximum seconds by which a timestamp may be ahead of the clock. A timestamp is moved ahead to
#: give two events of one kind different seconds.
MAX_TIMESTAMP_LEAD = 5.0


class TaskType:
    """Properties of all runs of a task: its ``@z4j_meta``, and the event fields derived from it."""

    __slots__ = ("fields", "meta", "name", "rate", "unsampled")

    def __init__(self, name: str, meta: TaskMeta | None) -> None:
        self.name = name
        self.meta = meta
        self.rate = 1.0 if meta is None else (0.0 if meta.skip else meta.sample_rate)
        #: Whether every run is reported.
        self.unsampled = self.rate >= 1.0
        #: Fields of every event of this type.
        self.fields: dict[str, Any] = {"task_name": name}
        if meta is not None:
            if meta.tags:
                self.fields["tags"] = list(meta.tags)
            for field in ("priority", "expected_duration_ms", "deadline_ms"):
                if getattr(meta, field) is not None:
                    self.fields[field] = getattr(meta, field)

    def is_sampled(self, task_id: str) -> bool:
        """Whether this run is reported.

        The decision depends on a hash of the task id. Therefore all events of a run are reported,
        or no event of the run is reported.
        """
        return (
            self.unsampled or zlib.crc32(task_id.encode(errors="replace")) < self.rate * 0xFFFFFFFF
        )


#: Maps each kind of event that a task may repeat to an attribute of :class:`TaskState`. The
#: attribute contains the last second that an event of the kind used. A dictionary in every waiting
#: task would be one more container for the garbage collector.
_SECONDS = {RECEIVED: "received", STARTED: "started", RETRIED: "retried", REJECTED: "rejected"}


class TaskState:
    """State of one task: its type and queue, start time, last timestamp and retries seen here."""

    __slots__ = (
        "last_timestamp",
        "queue",
        "retries",
        "started_at",
        "task_type",
        *_SECONDS.values(),
    )

    def __init__(self, task_type: TaskType, queue: str | None) -> None:
        self.task_type = task_type
        self.queue = queue
        #: Performance counter at the start, 0 before.
        self.started_at = 0.0
        #: Timestamp of the last event, in seconds since the epoch; 0 before the first event.
        self.last_timestamp = 0.0
        self.retries = self.received = self.started = self.retried = self.rejected = 0

    def next_timestamp(self, now: float, event: str = "") -> float:
        """Return the timestamp of an event, never earlier than the task's previous timestamp.

        If a task has two events of one kind within the same whole second, the brain drops the
        second event. Therefore each event of a kind that a task may repeat gets its own second.

        :param now: the current time, in seconds since the epoch.
        :param event: the kind of the event; empty if a task cannot repeat the kind.
        """
        clock, now = now, max(now, self.last_timestamp)
        slot = _SECONDS.get(event)
        if slot is not None:
            second, used = int(now), getattr(self, slot)
            if second <= used < clock + MAX_TIMESTAMP_LEAD - 1:
                second = used + 1
                now = float(second)
            setattr(self, slot, second)
        self.last_timestamp = now
        return now


class TaskStates(dict[str, TaskState]):
    """Task states by task id. With :data:`MAX_TASKS` states, ``add`` evicts the oldest state."""

    def add(self, task_id: str, task_state: TaskState) -> TaskState:
        """Add a state and return it."""
        if len(self) >= MAX_TASKS:
            self.pop(next(iter(self)), None)
        self[task_id] = task_state
        return task_state

    def end(self, task_id: str) -> TaskState | None:
        """Remove the state of a task that has ended, and return it."""
        return self.pop(task_id, None)


class TaskTypes:
    """Task types by task name, created at a task's first event.

    :param read_meta: returns the ``@z4j_meta`` of a task.
    """

    def __init__(self, read_meta: Callable[[Task], TaskMeta | None]) -> None:
        self._read_meta = read_meta
        self.known: dict[str, TaskType] = {}

    def of(self, task: Task | str) -> TaskType:
        """Return the type of a Celery task, or of a task name that this app does not know."""
        name = getattr(task, "name", None) or (
            task if isinstance(task, str) else type(task).__name__
        )
        return self.known.get(name) or self._add(name, task)

    def _add(self, name: str, task: Task | str) -> TaskType:
        meta = None if isinstance(task, str) else self._read_meta(task)
        task_type = self.known[name] = TaskType(name, meta)
        return task_type
