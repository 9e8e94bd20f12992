"""Captures task events in the process that runs the tasks.

That is a worker with the pool gevent, eventlet, threads or solo, or a process with eager tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from time import time
from typing import TYPE_CHECKING

from z4j_bare.engines.celery.kept_runs import KeptRuns
from z4j_bare.engines.celery.queue_names import QueueNames, routing_key
from z4j_bare.engines.celery.signals import SignalHandlers
from z4j_bare.engines.celery.task_encoder import TaskEncoder
from z4j_bare.engines.celery.task_state import TaskState, TaskTypes
from z4j_bare.events.redaction import Redactor, safe_name
from z4j_bare.events.ring import Put

if TYPE_CHECKING:
    from celery.app.task import Task
    from celery.worker.consumer import Consumer
    from z4j_celery import CeleryEngineAdapter

    from z4j_bare.interfaces import IOpenRuns


class CeleryCapture(SignalHandlers):
    """The signal handlers of a worker whose tasks run in its own process.

    :param adapter: the adapter whose redaction is applied. The ``@z4j_meta`` of its tasks is
        applied, too, as in the adapter's own handlers.
    :param put: ``Ring.put``.
    :param hostname: the worker's node name; ``None`` outside a worker.
    :param args: whether to capture arguments.
    :param result: whether to capture results.
    :param consumer: the worker's Consumer, which knows the queues. ``None``: the routing key is
        reported as the queue.
    :param runs: ``Ring.runs``; ``None`` keeps no open runs.
    :param on_loss: counts an event that could not be captured.
    """

    withholds = True

    def __init__(
        self,
        adapter: CeleryEngineAdapter,
        put: Put,
        hostname: str | None,
        *,
        args: bool = True,
        result: bool = True,
        clock: Callable[[], float] = time,
        consumer: Consumer | None = None,
        runs: IOpenRuns | None = None,
        on_loss: Callable[[], object] = int,
    ) -> None:
        from z4j_celery.meta import get_meta

        worker = None if hostname is None else safe_name(hostname, adapter.redaction.value_matches)
        encoder = TaskEncoder(adapter.name, Redactor(adapter.redaction), worker)
        super().__init__(
            put,
            encoder,
            TaskTypes(get_meta),
            worker=worker,
            args=args,
            result=result,
            clock=clock,
            queue_of=routing_key if consumer is None else QueueNames(consumer).of,
            kept_runs=None
            if runs is None
            else KeptRuns(runs, put, encoder, adapter.celery_app, adapter.name, worker),
            on_loss=on_loss,
        )


class EagerCapture(CeleryCapture):
    """Captures the tasks that a process outside a worker runs itself.

    The process runs a task itself if ``apply()`` or the setting ``task_always_eager`` is used.
    """

    signals = (
        "task_prerun",
        "task_postrun",
        "task_failure",
        "task_internal_error",
        "task_retry",
    )

    def _task_state(self, task_id: str, task: Task) -> TaskState | None:
        # When task_internal_error is sent, the request and its ``is_eager`` are gone. So a task is
        # also accepted if an earlier signal recorded its id in ``task_states``.
        eager = getattr(getattr(task, "request", None), "is_eager", False)
        if not eager and task_id not in self.task_states:
            return None
        return super()._task_state(task_id, task)


def runs_in_process(consumer: Consumer | None) -> bool:
    """Whether a worker runs its tasks in its own process. Then their signals fire there.

    The function examines the running pool, because ``conf.worker_pool`` does not reflect the
    option ``-P``.
    """
    pool = getattr(consumer, "pool", None)
    return pool is not None and not any(
        base.__module__ == "celery.concurrency.prefork" for base in type(pool).__mro__
    )
