"""Stores the starts and ends of a worker's runs in a file that outlives the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from z4j_bare.engines.celery.task_state import FAILED, RETRIED, REVOKED, SUCCEEDED, TaskState
from z4j_bare.interfaces import (
    RUN_ENDED,
    RUN_FAILED,
    RUN_REDELIVERED,
    RUN_RETRIED,
    RUN_REVOKED,
    RUN_SUCCEEDED,
)

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Task

    from z4j_bare.engines.celery.task_encoder import TaskEncoder
    from z4j_bare.events.ring import Captured, Put
    from z4j_bare.interfaces import IOpenRuns

#: Kombu's ``driver_type`` of the brokers that deliver a message again if the worker dies.
REDELIVERING = frozenset({"amqp", "redis", "sqs"})

_OUTCOMES = {
    SUCCEEDED: RUN_SUCCEEDED,
    FAILED: RUN_FAILED,
    RETRIED: RUN_RETRIED,
    REVOKED: RUN_REVOKED,
}


class KeptRuns:
    """Stores the open runs of a worker's tasks.

    For speed, the handlers that run for every task use ``runs`` directly.
    All other handlers call :meth:`put`.

    :param runs: ``Ring.runs``.
    :param put: ``Ring.put``.
    :param encoder: encodes the records. The first item of a record is a method of the encoder.
    :param engine: the adapter's name.
    """

    def __init__(
        self,
        runs: IOpenRuns,
        put: Put,
        encoder: TaskEncoder,
        app: Celery,
        engine: str,
        worker: str | None,
    ) -> None:
        self.runs = runs
        self._put = put
        self._encoder = encoder
        self._app = app
        self._engine = engine
        self._worker = worker
        self._late_flag = RUN_REDELIVERED if redelivers(app) else 0
        runs.enable()

    def put(self, record: Captured) -> None:
        """Append a record to the ring. If it reports a run's start or end, store that as well."""
        self._put(record)
        head = record[0]
        if head == self._encoder.started:
            _, now, task_id, task_state = record
            self.start(task_state, task_id, now, self._app.tasks.get(task_state.task_type.name))
        elif head == self._encoder.succeeded:
            self.end(record[3], SUCCEEDED, record[1])
        elif head == self._encoder.generic:
            _, now, _, task_state, kind, own, _ = record
            self.end(task_state, kind, now, str(own.get("exception", "")))

    def start(self, task_state: TaskState, task_id: str, at: float, task: Task | None) -> None:
        """Store the start of a run. If the task's previous run is open, store its end first.

        :param at: time of the start, in seconds since the epoch.
        :param task: the Celery task; ``None`` if the task is not registered in this process.
        """
        if task_state.slot:
            self.runs.end(task_state.slot, RUN_ENDED, at)
        number = task_state.task_type.descriptions.get(task_state.queue)
        if number is None:
            number = self.describe(task_state)
        flags = self.late_flags(task) if task is not None and task.acks_late else 0
        task_state.slot = self.runs.start(number, task_id, at, flags)

    def end(self, task_state: TaskState, kind: str, at: float, exception: str = "") -> None:
        """Store the end of the task's open run, if the task has one.

        :param kind: the kind of the event that reports the end; empty if no event reports it. The
            event must already be in the ring.
        :param at: time of the end, in seconds since the epoch.
        :param exception: the class of a failed run's exception.
        """
        if task_state.slot:
            self.runs.end(task_state.slot, _OUTCOMES.get(kind, RUN_ENDED), at, exception)
            task_state.slot = 0

    def describe(self, task_state: TaskState) -> int:
        """Store a description: the fields shared by all events of one task type and one queue.

        Return the description's number, or -1 if it could not be stored.
        """
        fields = {
            **task_state.task_type.fields,
            "queue": task_state.queue,
            "worker": self._worker,
        }
        number = self.runs.describe(self._engine, fields)
        task_state.task_type.descriptions[task_state.queue] = number
        return number

    def late_flags(self, task: Task) -> int:
        """Return the flags of a run whose task has ``acks_late``."""
        # An eager run has no message that the broker could deliver again.
        return 0 if task.request.is_eager else self._late_flag


def redelivers(app: Celery) -> bool:
    """Whether the broker delivers a message again if a worker died before acknowledging it."""
    try:
        # The next line does not connect to the broker.
        return app.connection_for_read().get_transport_cls().driver_type in REDELIVERING
    except Exception:
        return False
