"""Reports the runs of a task that this process receives more than once under one id."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from z4j_bare.engines.celery.outcomes import FIRST_RUN, run_key
from z4j_bare.engines.celery.task_state import (
    REQUEUE_INTERVAL,
    RETRIED,
    Attempt,
    TaskState,
    TaskStates,
    TaskType,
)
from z4j_bare.events.ring import Captured, Put

if TYPE_CHECKING:
    from celery.worker.request import Request


class RepeatedRuns:
    """Keeps a state for each run of a task. A retry or a redelivered message starts another run.

    :param withholds: whether :meth:`started` may withhold the report of a start. If so,
        :meth:`report_withheld` must be called every few seconds.
    """

    def __init__(
        self,
        task_states: TaskStates,
        put: Put,
        generic: object,
        clock: Callable[[], float],
        *,
        withholds: bool,
    ) -> None:
        self._task_states = task_states
        self._put = put
        self._generic = generic
        self._clock = clock
        self._withholds = withholds
        #: States of the runs whose start is withheld, by task id.
        self._withheld: dict[str, TaskState] = {}

    def received(
        self,
        task_id: str,
        known: TaskState,
        task_type: TaskType,
        queue: str | None,
        request: Request,
    ) -> TaskState | None:
        """Return the state of a received run of a known task; ``None`` if the run is not reported.

        :param known: the state of the task's last run.
        """
        if known.task_type is task_type and known.queue == queue:
            if known.attempt is not None and known.attempt.requeued_at:
                return None
            info = request.delivery_info
            again = isinstance(info, dict) and info.get("redelivered")
            key = run_key(request.request_dict)
            if not known.started_at or again or key == FIRST_RUN:
                return known
        else:
            key = run_key(request.request_dict)
        new = TaskState(task_type, queue)
        return self._task_states.supersede(task_id, known, new, key, self._clock())

    def started(self, record: Captured, request: object) -> None:
        """Report the start of a run.

        In two cases the report is withheld until the run ends or a second has passed:

        - The task has returned to the queue.
          Without the delay, a task that returns again and again would flood the brain.
        - The run is a retry, and Celery has not signalled the end of the previous run.
          :meth:`retried` reports the start after the retry. In the other order the brain would show
          ``retry`` until this run ends, because the brain shows the state of the last event.

        :param record: the record of the start. Its last item is the state of the task's last run.
        :param request: Celery's ``Context``, or the request as a dictionary.
        """
        head, now, task_id, last = record
        key = run_key(request)
        task_state = self._task_states.of_run(last, key)
        task_state.started_at = perf_counter()
        task_state.context = self._task_states.context()
        record = (head, now, task_id, task_state)
        attempt = task_state.attempt
        if (
            self._withholds
            and attempt is not None
            and (attempt.requeued_at or (attempt.previous is not None and key[0] > 0))
        ):
            attempt.withheld = record
            self._withheld[task_id] = task_state
        else:
            self._put(record)

    def ended(
        self, task_id: str, last: TaskState, request: object, *, keep: bool = False
    ) -> TaskState:
        """Remove the state of the run that ends, and return it.

        :param last: the state of the task's last run.
        :param keep: whether to keep the state of the last run, because the task continues.
        """
        task_state = self._task_states.of_run(last, run_key(request))
        attempt = task_state.attempt
        if attempt is not None:
            self._report_start(task_id, attempt)
            attempt.requeued_at = 0.0
        if not keep or (attempt is not None and attempt.newer is not None):
            self._task_states.end(task_id, task_state)
        return task_state

    def retried(self, task_id: str, task_state: TaskState) -> None:
        """Report the start of the next run, if that start was withheld.

        Call after reporting the retry.

        :param task_state: the state of the run that was retried.
        """
        attempt = task_state.attempt
        if attempt is not None and attempt.newer is not None and attempt.newer.attempt is not None:
            self._report_start(task_id, attempt.newer.attempt)

    def requeued(self, task_id: str, last: TaskState, request: object, own: dict[str, Any]) -> None:
        """Report that a run was returned to the queue, at most once a second.

        :param own: the fields of the event.
        """
        now = self._clock()
        task_state = self._task_states.of_run(last, run_key(request))
        if task_state.attempt is None:
            task_state.attempt = Attempt()
        attempt = task_state.attempt
        attempt.withheld = None
        self._withheld.pop(task_id, None)
        task_state.started_at = 0.0
        if now - attempt.requeued_at >= REQUEUE_INTERVAL:
            attempt.requeued_at = now
            self._put((self._generic, now, task_id, task_state, RETRIED, own, None))

    def report_withheld(self) -> None:
        """Report the starts that have been withheld for at least a second."""
        latest = self._clock() - REQUEUE_INTERVAL
        for task_id, task_state in list(self._withheld.items()):
            attempt = task_state.attempt
            if attempt is not None and attempt.withheld and attempt.withheld[1] <= latest:
                self._report_start(task_id, attempt)

    def _report_start(self, task_id: str, attempt: Attempt) -> None:
        record, attempt.withheld = attempt.withheld, None
        if record is not None:
            self._withheld.pop(task_id, None)
            self._put(record)
