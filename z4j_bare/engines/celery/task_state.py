"""State of the tasks that are being processed, and properties of their task types."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery.app.task import Task
    from z4j_celery.meta import TaskMeta

    from z4j_bare.events.task_counts import TaskCell

#: Kinds of events.
RECEIVED, STARTED, SUCCEEDED = "task.received", "task.started", "task.succeeded"
FAILED, RETRIED, REVOKED, REJECTED = "task.failed", "task.retried", "task.revoked", "task.rejected"

#: Maximum number of task states.
#: If another worker finishes a task, the task's state stays in this process until it is evicted.
MAX_TASKS = 20_000

#: Maximum seconds by which a timestamp is moved ahead of the clock to get an unused second.
MAX_TIMESTAMP_LEAD = 5.0


#: Minimum seconds between two reports that a task has returned to the queue.
REQUEUE_INTERVAL = 1.0

#: Identifies a run of a task: ``retries`` and ``replaced_task_nesting`` of the run's message.
RunKey = tuple[int, int]


class TaskType:
    """Properties of all runs of a task: its ``@z4j_meta``, and the event fields derived from it."""

    __slots__ = ("counts", "descriptions", "fields", "meta", "name", "rate", "unsampled")

    def __init__(self, name: str, meta: TaskMeta | None) -> None:
        self.name = name
        self.meta = meta
        self.rate = 1.0 if meta is None else (0.0 if meta.skip else meta.sample_rate)
        #: Whether every run is reported.
        self.unsampled = self.rate >= 1.0
        #: Maps a queue to the number that ``IOpenRuns.describe`` has returned.
        self.descriptions: dict[str | None, int] = {}
        #: Maps a queue to the counts of this type's tasks in the queue.
        self.counts: dict[str | None, TaskCell] = {}
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

        The decision depends on a hash of the task id, so it is the same for all events of a task.
        """
        return (
            self.unsampled or zlib.crc32(task_id.encode(errors="replace")) < self.rate * 0xFFFFFFFF
        )


#: Maps each kind of event that a task may repeat to an attribute of :class:`TaskState`.
#: The attribute contains the last second that was used by an event of the kind.
#: A dictionary in each state would slow down the garbage collector, so attributes are used.
_SECONDS = {RECEIVED: "received", STARTED: "started", RETRIED: "retried", REJECTED: "rejected"}


class TaskState:
    """State of one task: its type, queue, start time, last timestamp, and number of retries."""

    __slots__ = (
        "arrived",
        "attempt",
        "context",
        "last_timestamp",
        "queue",
        "retries",
        "slot",
        "started_at",
        "task_type",
        *_SECONDS.values(),
    )

    def __init__(self, task_type: TaskType, queue: str | None) -> None:
        self.task_type = task_type
        self.queue = queue
        #: Data that distinguishes this run from other runs of its task; ``None`` for most tasks.
        self.attempt: Attempt | None = None
        #: Whether the parent of a prefork worker has reported that the task was received.
        self.arrived = False
        #: The greenlet or thread of the current run; see ``IConcurrency.context_getter``.
        self.context: object = None
        #: Performance counter at the start of the current run; 0 if no run is in progress.
        self.started_at = 0.0
        #: Timestamp of the last event, in seconds since the epoch; 0 before the first event.
        self.last_timestamp = 0.0
        #: Slot of the run in ``IOpenRuns``; 0 if the run is not kept.
        self.slot = 0
        self.retries = self.received = self.started = self.retried = self.rejected = 0

    def mark_repeated(self, now: float) -> None:
        """Mark the second ``now`` as used by a ``task.received`` of another process.

        The other process may have received an earlier run of the task in this second.
        """
        self.received = int(now)

    def next_timestamp(self, now: float, event: str = "") -> float:
        """Return the timestamp of an event, never earlier than the task's previous timestamp.

        If a task has two events of one kind within the same whole second, the brain drops the
        second event. Therefore each event of a kind that a task may repeat gets its own second.

        :param now: the current time, in seconds since the epoch.
        :param event: the kind of the event; empty if a task cannot repeat the kind.
        """
        slot = _SECONDS.get(event)
        if self.attempt is not None:
            if slot is None:
                self.attempt.ended = True
            if self.attempt.newer is not None:
                *_, last = self.since()
                if event == RETRIED and last.attempt is not None and not last.attempt.ended:
                    # The brain counts a retry only if no event of the task is later.
                    return last.next_timestamp(now, event)
                return self._late_timestamp(now, slot)
            if self.attempt.stamps is not None:
                self._continue(self.attempt.stamps)
                self.attempt.stamps = None
        clock, now = now, max(now, self.last_timestamp)
        if slot is not None:
            second, used = int(now), getattr(self, slot)
            if second <= used < clock + MAX_TIMESTAMP_LEAD - 1:
                second = used + 1
                now = float(second)
            setattr(self, slot, second)
        self.last_timestamp = now
        return now

    def _continue(self, previous: TaskState) -> None:
        self.last_timestamp = previous.last_timestamp
        for slot in _SECONDS.values():
            setattr(self, slot, getattr(previous, slot))

    def _late_timestamp(self, now: float, slot: str | None) -> float:
        """Return the timestamp of an event that comes after the next run was received.

        The timestamp lies before the events of the next run. In the brain, an event with a later
        timestamp would overwrite the next run's state. An event of a kind that a task may repeat
        gets a second that none of these runs has used.
        """
        newer = list(self.since())
        received = (each.attempt.received_at for each in newer[1:] if each.attempt is not None)
        now = min(now, *received) - 1e-6
        if slot is not None:
            second = int(now)
            used = {getattr(each, slot) for each in newer}
            while second in used:
                second -= 1
            now = min(now, second + 0.999999)
            setattr(self, slot, second)
        return now

    def since(self) -> Iterator[TaskState]:
        """Iterate over this state and the states of the runs after this run."""
        state: TaskState | None = self
        while state is not None:
            yield state
            state = state.attempt.newer if state.attempt is not None else None


class Attempt:
    """Data that distinguishes one run of a task from another run with the same id.

    A run may be received before the previous run has ended. This happens after
    ``retry(countdown=0)`` in another thread, and after ``self.replace()``. ``replace`` changes the
    task's name and queue.
    """

    __slots__ = (
        "ended",
        "key",
        "newer",
        "previous",
        "received_at",
        "requeued_at",
        "stamps",
        "withheld",
    )

    def __init__(self, key: RunKey | None = None, received_at: float = 0.0) -> None:
        #: Whether the run's final event has its timestamp.
        self.ended = False
        #: Identifies the run; ``None`` for the task's first run in this process.
        self.key = key
        #: The state with the task's previous timestamps; ``None`` after this run's first event.
        self.stamps: TaskState | None = None
        #: The state of the previous run; ``None`` after that run has ended.
        self.previous: TaskState | None = None
        #: The state of the next run.
        self.newer: TaskState | None = None
        #: When the run was received, in seconds since the epoch; 0 for the first run.
        self.received_at = received_at
        #: When the last return to the queue was reported, in seconds since the epoch; else 0.
        self.requeued_at = 0.0
        #: The withheld record of the run's start; ``None`` after its report.
        self.withheld: tuple[Any, ...] | None = None


class TaskStates(dict[str, TaskState]):
    """Task states by task id. With :data:`MAX_TASKS` states, ``add`` evicts the oldest state.

    :param context: returns the current greenlet or thread.
    """

    def __init__(self, context: Callable[[], object] = get_ident) -> None:
        super().__init__()
        self.context = context

    def add(self, task_id: str, task_state: TaskState) -> TaskState:
        """Add a state and return it."""
        if len(self) >= MAX_TASKS:
            self.pop(next(iter(self)), None)
        self[task_id] = task_state
        return task_state

    def end(self, task_id: str, task_state: TaskState | None = None) -> TaskState | None:
        """Remove the state of a run that has ended, and return it.

        The state of a previous run that has not ended is kept.

        :param task_state: the state to remove; ``None`` means the state of the task's last run.
        """
        last = self.get(task_id)
        if task_state is None:
            task_state = last
        if last is task_state:
            attempt = None if last is None else last.attempt
            if attempt is not None and attempt.previous is not None:
                self[task_id] = attempt.previous
            else:
                self.pop(task_id, None)
        else:
            while last is not None and last.attempt is not None:
                if last.attempt.previous is task_state:
                    ended = None if task_state is None else task_state.attempt
                    last.attempt.previous = None if ended is None else ended.previous
                    break
                last = last.attempt.previous
        return task_state

    def supersede(
        self, task_id: str, task_state: TaskState, new: TaskState, key: RunKey, now: float
    ) -> TaskState:
        """Add the state of another run of a known task, and return it."""
        new.attempt = Attempt(key, now)
        new.attempt.stamps = task_state
        if task_state.started_at:
            if task_state.attempt is None:
                task_state.attempt = Attempt()
            task_state.attempt.newer = new
            if task_state.attempt.previous is not None and task_state.attempt.previous.attempt:
                task_state.attempt.previous.attempt.previous = None  # keep at most three runs
            new.attempt.previous = task_state
        self[task_id] = new
        return new

    @staticmethod
    def of_run(last: TaskState, key: RunKey) -> TaskState:
        """Return the state of the run ``key``, or of the oldest known run if no state has ``key``.

        :param last: the state of the task's last run.
        """
        state = last
        while state.attempt is not None and state.attempt.previous is not None:
            if state.attempt.key == key:
                break
            state = state.attempt.previous
        return state


class TaskTypes:
    """Task types by task name. A type is created at the first event of its task.

    :param read_meta: returns the ``@z4j_meta`` of a task.
    """

    def __init__(self, read_meta: Callable[[Task], TaskMeta | None]) -> None:
        self._read_meta = read_meta
        self.known: dict[str, TaskType] = {}

    def of(self, task: Task | str) -> TaskType:
        """Return the type of ``task``: a Celery task, or its name if the app has no such task."""
        name = getattr(task, "name", None) or (
            task if isinstance(task, str) else type(task).__name__
        )
        return self.known.get(name) or self._add(name, task)

    def _add(self, name: str, task: Task | str) -> TaskType:
        meta = None if isinstance(task, str) else self._read_meta(task)
        task_type = self.known[name] = TaskType(name, meta)
        return task_type
