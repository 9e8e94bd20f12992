"""Captures task events in the process that runs the tasks.

Such a process is a worker with the pool gevent, eventlet, threads or solo, or any process with
eager tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
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

    from z4j_bare.events.task_counts import TaskCounts
    from z4j_bare.interfaces import IOpenRuns


class CeleryCapture(SignalHandlers):
    """The signal handlers of a worker whose tasks run in its own process.

    :param adapter: the adapter. Its redaction and the ``@z4j_meta`` of its tasks are applied.
    :param put: ``Ring.put``.
    :param hostname: the worker's node name; ``None`` outside a worker.
    :param consumer: the worker's Consumer, from which the queues are read. If ``consumer`` is
        ``None``, the routing key is reported as the queue.
    :param runs: ``Ring.runs``; if ``None``, open runs are not stored.
    :param context: ``IConcurrency.context_getter()``.
    :param counts: ``Ring.counts``.
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
        context: Callable[[], object] = get_ident,
        counts: TaskCounts | None = None,
    ) -> None:
        from z4j_celery.meta import get_meta

        worker = None if hostname is None else safe_name(hostname, adapter.redaction.value_matches)
        encoder = TaskEncoder(adapter.name, Redactor(adapter.redaction), worker, counts)
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
            context=context,
        )


class EagerCapture(CeleryCapture):
    """Captures the eager tasks of a process outside a worker.

    A task is eager if ``apply()`` or the setting ``task_always_eager`` is used.
    """

    signals = (
        "task_prerun",
        "task_postrun",
        "task_failure",
        "task_internal_error",
        "task_retry",
    )

    def _task_state(self, task_id: str, task: Task) -> TaskState | None:
        # Celery removes the request, which has ``is_eager``, before it sends task_internal_error.
        # Therefore a task that an earlier signal added to ``task_states`` is also accepted.
        eager = getattr(getattr(task, "request", None), "is_eager", False)
        if not eager and task_id not in self.task_states:
            return None
        return super()._task_state(task_id, task)


def runs_in_process(consumer: Consumer | None) -> bool:
    """Whether the worker's own process runs the tasks, so that their signals fire in this process.

    The running pool is examined, because ``conf.worker_pool`` does not reflect the option ``-P``.
    """
    pool = getattr(consumer, "pool", None)
    return pool is not None and not any(
        base.__module__ == "celery.concurrency.prefork" for base in type(pool).__mro__
    )
