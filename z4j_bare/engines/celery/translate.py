"""Celery's events as the brain reads them (``brain-contract`` 5)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, Any

from z4j_bare.engines.celery.saferepr import ReprText, keep, read
from z4j_bare.engines.celery.signals import TRACEBACK
from z4j_bare.engines.celery.task_state import (
    FAILED,
    RECEIVED,
    REJECTED,
    RETRIED,
    REVOKED,
    STARTED,
    SUCCEEDED,
    TaskState,
    TaskStates,
    TaskType,
    TaskTypes,
)
from z4j_bare.events.encode import Encoder, Record
from z4j_bare.events.redaction import Redactor
from z4j_bare.events.ring import Put
from z4j_bare.events.snapshot import snapshot

if TYPE_CHECKING:
    from z4j_bare.engines.celery.workers import WorkerRegistry

#: Seconds by which a worker's clock may differ from ours; beyond, ours counts. The brain takes no more than 60.
SKEW = 60.0

#: Characters of a task's id and name, as the brain's columns have them (5.8).
LONGEST_ID = 200
LONGEST_NAME = 500

_EXCEPTION = re.compile(r"((?:[A-Za-z_]\w*\.)*)([A-Za-z_]\w*)\(")
_FINAL = frozenset({SUCCEEDED, FAILED, REVOKED})

#: A task that was here before us: its events tell no name.
UNKNOWN = TaskType("<unknown>", None)


class Translator:
    """Turns events into records for the ring. For one task only; raises for an event that is none.

    :param engine: the ``CeleryEngineAdapter``; its redaction and its tasks' ``@z4j_meta`` hold.
    :param put: ``Ring.put``.
    :param task_states: the tasks that are here, shared with the signals' handlers where those tell who was received.
    :param args: whether arguments are sent; likewise ``result``.
    """

    def __init__(
        self,
        engine: Any,
        put: Put,
        roster: WorkerRegistry,
        task_states: TaskStates | None = None,
        *,
        args: bool = True,
        result: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        from z4j_celery.meta import get_meta

        redactor = Redactor(engine.redaction)
        self._app = engine.celery_app
        self._put = put
        self._roster = roster
        self._args = args
        self._result = result
        self._clock = clock
        self._secret = redactor.is_sensitive_key
        self._encode = Encoder(engine.name, redactor)
        self._kinds = TaskTypes(get_meta)
        self._told = task_states is not None
        self._task_states = TaskStates() if task_states is None else task_states
        self._sent = TaskStates()
        self._tellers: dict[
            str, tuple[str, Callable[[dict[str, Any], TaskState, dict[str, Any]], None]]
        ] = {
            "task-received": (RECEIVED, self._received),
            "task-started": (STARTED, lambda *_: None),
            "task-succeeded": (SUCCEEDED, self._succeeded),
            "task-failed": (FAILED, self._failed),
            "task-retried": (RETRIED, self._retried),
            "task-revoked": (REVOKED, self._revoked),
            "task-rejected": (REJECTED, self._rejected),
        }

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event. Raises ``TypeError``, ``ValueError`` or ``LookupError`` for garbage."""
        what = event["type"]
        if what == "task-sent":
            self._note_sent(event)
            return
        hostname = _text(event["hostname"])
        worker = self._roster.touch(hostname)
        if worker is None:
            return
        if what == "worker-online":
            self._roster.online(hostname)
        elif what == "worker-offline":
            self._roster.offline(hostname)
        elif (teller := self._tellers.get(what)) is not None:
            self._tell(teller[0], teller[1], event, {"worker": worker})

    def _tell(
        self, kind: str, fill: Callable[..., None], event: dict[str, Any], own: dict[str, Any]
    ) -> None:
        task_id = _task_id(event)
        task_state = self._task_state(task_id, event)
        fill(event, task_state, own)
        if kind in _FINAL:
            self._task_states.end(task_id)
        if not task_state.kind.reports(task_id) or (self._told and kind == RECEIVED):
            return
        own["queue"] = task_state.queue
        if task_state.kind.meta is not None:
            own["_meta"] = task_state.kind.meta
        stamp = task_state.stamp(self._stamp(event), kind)
        record: Record = (self._finish, kind, stamp, task_id, task_state.kind.fields, own)
        self._put(record)

    def _finish(self, record: Record) -> bytes:
        """Read what is text yet, and encode: on the flush loop's time."""
        own = record[-1]
        for name, value in own.items():
            if isinstance(value, ReprText):
                own[name] = read(value, self._secret)
        if not isinstance(own.get("args", []), list):
            own["args"] = [own["args"]]
        if not isinstance(own.get("kwargs", {}), dict):
            own["kwargs"] = {"...": own["kwargs"]}
        return self._encode(record)

    def _task_state(self, task_id: str, event: dict[str, Any]) -> TaskState:
        task_state = self._task_states.get(task_id)
        if task_state is None:
            task_state = self._task_states.add(
                task_id, self._sent.end(task_id) or TaskState(UNKNOWN, None)
            )
        name = event.get("name")
        if task_state.kind is UNKNOWN and isinstance(name, str) and name:
            task_state.kind = self._kind(name)
        return task_state

    def _kind(self, name: str) -> TaskType:
        # With a name that this app does not know there is no annotation to be had.
        name = name[:LONGEST_NAME]
        return self._kinds.of(self._app.tasks.get(name, name))

    def _note_sent(self, event: dict[str, Any]) -> None:
        """Remember the queue: producers tell it, where ``task_send_sent_event`` is set, and nobody else."""
        task_id, queue = _task_id(event), event.get("queue")
        task_state = self._task_states.get(task_id) or self._sent.add(
            task_id, TaskState(self._kind(_text(event["name"])), None)
        )
        if isinstance(queue, str) and queue:
            task_state.queue = queue[:LONGEST_ID]

    def _received(self, event: dict[str, Any], task_state: TaskState, own: dict[str, Any]) -> None:
        if not task_state.last and isinstance(retries := event.get("retries"), int):
            task_state.retries = retries  # only at first: the next run can be received before the last one tells of its retry
        if task_state.queue is None:
            task_state.queue = self._roster.queue_of(event["hostname"], task_state.kind.name)
        if self._args:
            own["args"] = keep(event.get("args") or "()")
            own["kwargs"] = keep(event.get("kwargs") or "{}")
        for ours, theirs in (("parent_task_id", "parent_id"), ("root_task_id", "root_id")):
            if isinstance(event.get(theirs), str):
                own[ours] = event[theirs][:LONGEST_ID]

    def _succeeded(
        self, event: dict[str, Any], _task_state: TaskState, own: dict[str, Any]
    ) -> None:
        if self._result:
            own["result"] = keep(event.get("result"))
        runtime = event.get("runtime")
        if isinstance(runtime, int | float) and 0 <= runtime < float(2**31):
            own["runtime_ms"] = int(runtime * 1000)

    def _failed(self, event: dict[str, Any], _task_state: TaskState, own: dict[str, Any]) -> None:
        text = str(event.get("exception") or "")
        found = _EXCEPTION.match(text[:LONGEST_NAME])
        own["exception"] = found.group(2) if found else "Exception"
        own["exception_message"] = snapshot(text)
        if isinstance(traceback := event.get("traceback"), str):
            own["traceback"] = traceback[:TRACEBACK]

    def _retried(self, event: dict[str, Any], task_state: TaskState, own: dict[str, Any]) -> None:
        task_state.retries += 1
        own["retry_count"] = task_state.retries
        own["reason"] = snapshot(str(event.get("exception") or ""))

    def _revoked(self, event: dict[str, Any], _task_state: TaskState, own: dict[str, Any]) -> None:
        signum = event.get("signum")
        own["signum"] = signum if isinstance(signum, int) and abs(signum) < 2**31 else None
        own["terminated"], own["expired"] = (
            bool(event.get("terminated")),
            bool(event.get("expired")),
        )

    def _rejected(self, event: dict[str, Any], _task_state: TaskState, own: dict[str, Any]) -> None:
        own["reason"] = "rejected, and back to its queue" if event.get("requeue") else "rejected"

    def _stamp(self, event: dict[str, Any]) -> float:
        """Return the worker's own time, so that every agent that reads this event gives it the same (5.3)."""
        stamp, now = event.get("timestamp"), self._clock()
        usable = isinstance(stamp, int | float) and isfinite(stamp) and abs(stamp - now) <= SKEW
        return float(stamp) if usable and stamp is not None else now


def _task_id(event: dict[str, Any]) -> str:
    task_id = _text(event["uuid"])
    if len(task_id) > LONGEST_ID:
        raise ValueError("no id of a task")
    return task_id


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("no text")
    return value
