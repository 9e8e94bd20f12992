"""What is remembered of a task while it is here, and what is known of its kind."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

#: Kinds of events.
RECEIVED, STARTED, SUCCEEDED = "task.received", "task.started", "task.succeeded"
FAILED, RETRIED, REVOKED, REJECTED = "task.failed", "task.retried", "task.revoked", "task.rejected"

#: Tasks remembered at most; a task that goes back to the broker for another worker is never heard of again.
REMEMBERED = 20_000

#: Seconds that a stamp may run ahead of the clock to keep two events of one kind apart.
AHEAD = 5.0


class TaskType:
    """What is the same for every run of a task: its ``@z4j_meta`` annotations, and the fields they add to each event."""

    __slots__ = ("fields", "meta", "name", "rate", "whole")

    def __init__(self, name: str, meta: Any) -> None:
        self.name = name
        self.meta = meta
        self.rate = 1.0 if meta is None else (0.0 if meta.skip else meta.sample_rate)
        #: Whether every run is reported.
        self.whole = self.rate >= 1.0
        self.fields: dict[str, Any] = {"task_name": name}
        if meta is not None:
            if meta.tags:
                self.fields["tags"] = list(meta.tags)
            for field in ("priority", "expected_duration_ms", "deadline_ms"):
                if getattr(meta, field) is not None:
                    self.fields[field] = getattr(meta, field)

    def reports(self, task_id: str) -> bool:
        """Whether this run is reported: by a hash of its id, so that a run is reported wholly or not at all."""
        return self.whole or zlib.crc32(task_id.encode(errors="replace")) < self.rate * 0xFFFFFFFF


#: Where a track keeps the last second of the events that come more than once. An attribute each: a dictionary in every task
#: that waits is one more thing for the garbage collector to walk.
_SECONDS = {RECEIVED: "received", STARTED: "started", RETRIED: "retried", REJECTED: "rejected"}


class TaskState:
    """One task that is here: its kind and queue, when it began, the last stamp it got, and the retries counted here."""

    __slots__ = ("began", "kind", "last", "queue", "retries", *_SECONDS.values())

    def __init__(self, kind: TaskType, queue: str | None) -> None:
        self.kind = kind
        self.queue = queue
        self.began = self.last = 0.0
        self.retries = self.received = self.started = self.retried = self.rejected = 0

    def stamp(self, now: float, event: str = "") -> float:
        """Return the time for an event: never before the last one, and in a second of its own among events of its kind.

        The brain drops a second event of one kind for a task within the same whole second (``brain-contract`` 5.3).

        :param event: the kind; only of those that may come more than once is a second reserved.
        """
        clock, now = now, max(now, self.last)
        slot = _SECONDS.get(event)
        if slot is not None:
            second, taken = int(now), getattr(self, slot)
            if second <= taken < clock + AHEAD - 1:
                second = taken + 1
                now = float(second)
            setattr(self, slot, second)
        self.last = now
        return now


class TaskStates(dict[str, TaskState]):
    """Every task that is here, by its id, bounded; the oldest are forgotten first."""

    def add(self, task_id: str, task_state: TaskState) -> TaskState:
        """Remember a task."""
        if len(self) >= REMEMBERED:
            self.pop(next(iter(self)), None)
        self[task_id] = task_state
        return task_state

    def end(self, task_id: str) -> TaskState | None:
        """Forget a task that has ended, and return what was known of it."""
        return self.pop(task_id, None)


class TaskTypes:
    """The kinds seen so far, by task name."""

    def __init__(self, read_meta: Callable[[Any], Any]) -> None:
        self._read_meta = read_meta
        #: By name.
        self.known: dict[str, TaskType] = {}

    def of(self, task: Any) -> TaskType:
        """Return the kind of a task object or name."""
        name = getattr(task, "name", None) or (
            task if isinstance(task, str) else type(task).__name__
        )
        return self.known.get(name) or self._meet(name, task)

    def _meet(self, name: str, task: Any) -> TaskType:
        meta = None if isinstance(task, str) else self._read_meta(task)
        found = self.known[name] = TaskType(name, meta)
        return found
