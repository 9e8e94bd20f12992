"""Translates Celery's events from the broker to the events of the brain."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, Any
from uuid import UUID

from z4j_bare.engines.celery.outcomes import CAPTURED_TRACEBACK_CHARS
from z4j_bare.engines.celery.saferepr import ReprText, bound, parse
from z4j_bare.engines.celery.task_state import (
    FAILED,
    RECEIVED,
    REJECTED,
    RETRIED,
    REVOKED,
    STARTED,
    SUCCEEDED,
    Attempt,
    TaskState,
    TaskStates,
    TaskType,
    TaskTypes,
)
from z4j_bare.events.encode import Encoder, Record
from z4j_bare.events.redaction import Redactor
from z4j_bare.events.ring import Captured, Put
from z4j_bare.events.snapshot import snapshot
from z4j_bare.events.task_counts import TaskCounts

if TYPE_CHECKING:
    from z4j_celery import CeleryEngineAdapter

    from z4j_bare.engines.celery.workers import WorkerRegistry

#: A decoded event of Celery.
CeleryEvent = dict[str, Any]

#: A function that adds the fields of an event to the dictionary in its last argument.
_FillFields = Callable[[CeleryEvent, TaskState, dict[str, Any]], None]

#: Maximum difference in seconds between an event's timestamp and this host's clock.
#: If the difference is larger, the event gets the time of this host's clock.
#: The brain accepts a difference of at most 60 s.
MAX_CLOCK_SKEW = 60.0

#: Maximum characters of a task id and of a name. An event with a longer task id is malformed. A
#: longer name, parent id or root id is cut. The encoder applies smaller limits of the brain later.
MAX_ID_CHARS = MAX_NAME_CHARS = 4096

#: Number of characters at the start of an exception's text in which the class name is searched.
MAX_CLASS_CHARS = 500

_EXCEPTION = re.compile(r"((?:[A-Za-z_]\w*\.)*)([A-Za-z_]\w*)\(")
_FINAL = frozenset({SUCCEEDED, FAILED, REVOKED})

#: The type of a task that was received before the agent started.
#: The task's later events do not contain its name.
UNKNOWN = TaskType("<unknown>", None)


class Translator:
    """Translates Celery events to records for the ring. Must not be called concurrently.

    :param adapter: Celery adapter. Its redaction and the ``@z4j_meta`` of its tasks apply.
    :param put: ``Ring.put``.
    :param counts: ``Ring.counts``; default: counts that nothing reads.
    """

    def __init__(
        self,
        adapter: CeleryEngineAdapter,
        put: Put,
        workers: WorkerRegistry,
        *,
        args: bool = True,
        result: bool = True,
        clock: Callable[[], float] = time.time,
        counts: TaskCounts | None = None,
    ) -> None:
        from z4j_celery.meta import get_meta

        redactor = Redactor(adapter.redaction)
        self._engine = adapter.name
        self._counts = counts or TaskCounts()
        self._app = adapter.celery_app
        self._put = put
        self._workers = workers
        self._args = args
        self._result = result
        self._clock = clock
        self._is_sensitive_key = redactor.is_sensitive_key
        self._encode = Encoder(adapter.name, redactor)
        self._task_types = TaskTypes(get_meta)
        self._task_states = TaskStates()
        self._sent = TaskStates()
        self._handlers: dict[str, tuple[str, _FillFields]] = {
            "task-received": (RECEIVED, self._received),
            "task-started": (STARTED, lambda *_: None),
            "task-succeeded": (SUCCEEDED, self._succeeded),
            "task-failed": (FAILED, self._failed),
            "task-retried": (RETRIED, self._retried),
            "task-revoked": (REVOKED, self._revoked),
            "task-rejected": (REJECTED, self._rejected),
        }

    def __call__(self, event: CeleryEvent) -> None:
        """Translate one event.

        :raises TypeError, ValueError, LookupError, AttributeError: for a malformed event.
        """
        event_type = event["type"]
        if event_type == "task-sent":
            self._on_sent(event)
            return
        hostname = _text(event["hostname"])
        worker = self._workers.touch(hostname)
        if worker is None:
            return
        if event_type == "worker-online":
            self._workers.online(hostname)
        elif event_type == "worker-offline":
            self._workers.offline(hostname)
        elif (handler := self._handlers.get(event_type)) is not None:
            self._handle(handler[0], handler[1], event, {"worker": worker})

    def _handle(
        self, kind: str, fill: _FillFields, event: CeleryEvent, own: dict[str, Any]
    ) -> None:
        task_id = _task_id(event)
        task_state = self._task_state(task_id, event, kind)
        fill(event, task_state, own)
        if kind in _FINAL:
            self._task_states.end(task_id)
        task_type = task_state.task_type
        if not task_type.is_sampled(task_id):
            return
        own["queue"] = task_state.queue
        if task_type.meta is not None:
            own["_meta"] = task_type.meta
        previous, now = task_state.last_timestamp, self._timestamp(event)
        timestamp = task_state.next_timestamp(now, kind)
        delay = now - previous if kind == STARTED and previous else None
        self._put((self._finish, kind, timestamp, task_id, task_type.fields, own, delay))

    def _finish(self, captured: Captured) -> bytes:
        """Count the event, parse its fields in ``saferepr`` notation, and encode the event.

        The flush loop calls this method.
        """
        *head, delay = captured
        record: Record = tuple(head)
        _, kind, _, _, fields, own = record
        self._count(kind, fields["task_name"], own, delay)
        for name, value in own.items():
            if isinstance(value, ReprText):
                own[name] = parse(value, self._is_sensitive_key)
        if not isinstance(own.get("args", []), list):
            own["args"] = [own["args"]]
        if not isinstance(own.get("kwargs", {}), dict):
            own["kwargs"] = {"...": own["kwargs"]}
        return self._encode(record)

    def _count(self, kind: str, name: str, own: dict[str, Any], delay: float | None) -> None:
        cell = self._counts.cell(self._engine, own["worker"], name, own["queue"])
        cell.add(kind, own)
        if delay is not None:
            cell.add_delay(delay)
        if kind == SUCCEEDED and (runtime := own.get("runtime_ms")) is not None:
            cell.add_runtime(runtime / 1000)

    def _task_state(self, task_id: str, event: CeleryEvent, kind: str) -> TaskState:
        task_state, name = self._task_states.get(task_id), event.get("name")
        if task_state is None:
            task_state = self._sent.end(task_id) or TaskState(UNKNOWN, None)
            self._task_states.add(task_id, task_state)
        if not isinstance(name, str) or not name:
            return task_state
        if task_state.task_type is UNKNOWN:
            task_state.task_type = self._task_type(name)
        elif kind == RECEIVED and (task_type := self._task_type(name)) is not task_state.task_type:
            # The known task was replaced by another task with the same id.
            new = self._sent.end(task_id) or TaskState(task_type, None)
            new.attempt = Attempt()
            new.attempt.stamps = task_state
            task_state = self._task_states[task_id] = new
        return task_state

    def _task_type(self, name: str) -> TaskType:
        # The type of a task that this app does not know has no @z4j_meta.
        name = name[:MAX_NAME_CHARS]
        return self._task_types.of(self._app.tasks.get(name, name))

    def _on_sent(self, event: CeleryEvent) -> None:
        """Store a task's queue. Only a producer with ``task_send_sent_event`` sends this event."""
        task_id, queue = _task_id(event), event.get("queue")
        task_type = self._task_type(_text(event["name"]))
        task_state = self._task_states.get(task_id)
        if task_state is None or task_state.task_type not in {task_type, UNKNOWN}:
            task_state = self._sent.add(task_id, TaskState(task_type, None))
        if isinstance(queue, str) and queue:
            task_state.queue = queue[:MAX_NAME_CHARS]

    def _received(self, event: CeleryEvent, task_state: TaskState, own: dict[str, Any]) -> None:
        # Use ``retries`` of the first event only. Later values are unreliable, because a run may be
        # received before the previous run's retry is reported.
        if not task_state.last_timestamp and isinstance(retries := event.get("retries"), int):
            task_state.retries = retries
        if task_state.queue is None:
            task_name = task_state.task_type.name
            task_state.queue = self._workers.queue_of(event["hostname"], task_name)
        if self._args:
            own["args"] = bound(event.get("args") or "()")
            own["kwargs"] = bound(event.get("kwargs") or "{}")
        for ours, theirs in (("parent_task_id", "parent_id"), ("root_task_id", "root_id")):
            if isinstance(above := event.get(theirs), str | UUID):
                own[ours] = str(above)[:MAX_ID_CHARS]

    def _succeeded(self, event: CeleryEvent, _task_state: TaskState, own: dict[str, Any]) -> None:
        if self._result:
            own["result"] = bound(event.get("result"))
        runtime = event.get("runtime")
        if isinstance(runtime, int | float) and 0 <= runtime < float(2**31):
            own["runtime_ms"] = int(runtime * 1000)

    def _failed(self, event: CeleryEvent, _task_state: TaskState, own: dict[str, Any]) -> None:
        text = str(event.get("exception") or "")
        found = _EXCEPTION.match(text[:MAX_CLASS_CHARS])
        own["exception"] = found.group(2) if found else "Exception"
        own["exception_message"] = snapshot(text)
        if isinstance(traceback := event.get("traceback"), str):
            own["traceback"] = traceback[:CAPTURED_TRACEBACK_CHARS]

    def _retried(self, event: CeleryEvent, task_state: TaskState, own: dict[str, Any]) -> None:
        task_state.retries += 1
        own["retry_count"] = task_state.retries
        own["reason"] = snapshot(str(event.get("exception") or ""))

    def _revoked(self, event: CeleryEvent, _task_state: TaskState, own: dict[str, Any]) -> None:
        signum = event.get("signum")
        own["signum"] = signum if isinstance(signum, int) and abs(signum) < 2**31 else None
        own["terminated"] = bool(event.get("terminated"))
        own["expired"] = bool(event.get("expired"))

    def _rejected(self, event: CeleryEvent, _task_state: TaskState, own: dict[str, Any]) -> None:
        own["reason"] = "rejected, and back to its queue" if event.get("requeue") else "rejected"

    def _timestamp(self, event: CeleryEvent) -> float:
        """Return the event's timestamp, or the current time if the timestamp is unusable.

        The event's timestamp is preferred, so that all agents that read the event report the same
        time.
        """
        timestamp, now = event.get("timestamp"), self._clock()
        if (
            isinstance(timestamp, int | float)
            and isfinite(timestamp)
            and abs(timestamp - now) <= MAX_CLOCK_SKEW
        ):
            return float(timestamp)
        return now


def _task_id(event: CeleryEvent) -> str:
    task_id = event["uuid"]
    task_id = _text(str(task_id) if isinstance(task_id, UUID | int) else task_id)
    if len(task_id) > MAX_ID_CHARS:
        raise ValueError(f"task id longer than {MAX_ID_CHARS} characters")
    return task_id


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("not a non-empty string")
    return value
