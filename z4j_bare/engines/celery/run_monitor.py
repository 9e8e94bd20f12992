"""Monitors the runs of a worker's tasks."""

from __future__ import annotations

import logging
from time import time
from typing import TYPE_CHECKING

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.interfaces import IEvent

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.celery.repeated_runs import RepeatedRuns
    from z4j_bare.engines.celery.task_state import TaskStates

logger = logging.getLogger("z4j.runtime.engines.celery.run_monitor")

#: Seconds between two calls of ``report_withheld``.
INTERVAL = 5.0

#: Number of intervals between two checks of the accepted tasks.
CHECK_EVERY = 6

#: A task is counted if its start is not captured within this many seconds after the pool accepts
#: the task.
START_TIMEOUT = 60.0

_CAUSES = {
    False: "the pool's children started before the agent was installed, or do not report to it",
    True: "the pool does not run tasks by Celery's tracer, or task_prerun lost its receivers",
}


class RunMonitor:
    """Reports withheld starts (see :class:`RepeatedRuns`), and counts tasks without a start.

    :param in_process: whether the pool runs tasks in the worker's own process.
    """

    name = "z4j-celery-runs"

    def __init__(
        self, task_states: TaskStates, repeated_runs: RepeatedRuns, *, in_process: bool
    ) -> None:
        #: Number of tasks that the pool has accepted but whose start was not captured.
        self.unheard = 0
        self._task_states = task_states
        self._repeated_runs = repeated_runs
        self._in_process = in_process
        self._counted: set[str] = set()

    def run(self, backend: BaseConcurrency, stop_event: IEvent) -> None:
        """Report withheld starts and check accepted tasks until ``stop_event`` is set."""
        rounds = 0
        while not backend.wait(stop_event, INTERVAL):
            rounds += 1
            self._repeated_runs.report_withheld()
            if rounds % CHECK_EVERY == 0:
                self.check(time(), backend)

    def check(self, now: float, backend: BaseConcurrency) -> None:
        """Count accepted tasks whose start was not captured within :data:`START_TIMEOUT` seconds.

        Only the first of these tasks is logged. A task that waits for its ETA, for a rate limit or
        for a free place is not accepted yet, so it is not counted. No event is recorded for a
        counted task, because its state is unknown.
        """
        from celery.worker import state

        try:
            active = list(state.active_requests)
        except RuntimeError:  # another thread has just added a request
            return
        checkpoint = TimeSlice(backend).checkpoint
        counted = set()
        for request in active:
            checkpoint()
            task_id = str(request.id)
            task_state = self._task_states.get(task_id)
            if (
                task_state is None
                or task_state.started_at
                or not request.time_start
                or now - request.time_start < START_TIMEOUT
            ):
                continue
            counted.add(task_id)
            if task_id not in self._counted:
                self.unheard += 1
                self._warn(task_state.task_type.name, task_id)
        self._counted = counted

    def _warn(self, name: str, task_id: str) -> None:
        if self.unheard == 1:
            logger.warning(
                "z4j: the pool accepted task %s[%s] %.0f s ago, but the agent has not seen its"
                " start: %s. The brain shows such tasks as received; further ones are only"
                " counted (stats: starts_unheard)",
                name,
                task_id,
                START_TIMEOUT,
                _CAUSES[self._in_process],
            )
