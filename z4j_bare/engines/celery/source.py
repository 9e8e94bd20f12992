"""The event source of Celery.

A worker captures events with signal handlers. A prefork worker also reads its children's messages.
A process outside a worker captures its eager tasks, and reads the workers' events from the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_bare.engines.celery.broker_health import queue_names
from z4j_bare.engines.celery.capture import CeleryCapture, EagerCapture, runs_in_process
from z4j_bare.engines.celery.run_monitor import RunMonitor
from z4j_bare.events.ring import Ring
from z4j_bare.events.source import EventSource, Loop

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer
    from z4j_celery import CeleryEngineAdapter

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.celery.event_receiver import EventReceiver
    from z4j_bare.engines.celery.prefork_parent import PreforkCapture
    from z4j_bare.engines.celery.running_tasks import RunningTasks
    from z4j_bare.engines.celery.signals import SignalHandlers
    from z4j_bare.engines.celery.task_state import TaskStates
    from z4j_bare.settings import Settings


class CelerySource(EventSource):
    """Captures Celery's events without the adapter's own signal handlers and event monitor.

    :param consumer: the Consumer of this process's Celery worker; ``None`` outside a worker.
    """

    uses_adapter_events = False

    def __init__(
        self,
        adapter: CeleryEngineAdapter,
        ring: Ring,
        settings: Settings,
        backend: BaseConcurrency,
        consumer: Consumer | None,
    ) -> None:
        super().__init__(adapter, ring, settings, backend)
        self._app = adapter.celery_app
        self._consumer = consumer
        self._worker = getattr(consumer, "hostname", None)
        only = None if self._worker else only_worker()
        self._reported_worker = self._worker or only
        self._receiver: EventReceiver | None = None
        self._children: PreforkCapture | None = None
        self._monitor: RunMonitor | None = None
        self._capture: CeleryCapture | PreforkCapture
        args, result = settings.capture_args, settings.capture_result
        if consumer is not None and not runs_in_process(consumer):
            # The module is imported here, because only a prefork worker needs the module.
            from z4j_bare.engines.celery.prefork_parent import PreforkCapture

            self._capture = self._children = PreforkCapture(
                adapter,
                ring.put,
                consumer,
                backend,
                args=args,
                result=result,
                runs=ring.runs,
                on_loss=ring.count_uncaptured,
                counts=ring.counts,
            )
            arrivals = self._children.arrivals
            self._monitor = RunMonitor(
                arrivals.task_states, arrivals.repeated_runs, in_process=False
            )
            return
        if self._worker is None:
            self._capture = EagerCapture(
                adapter,
                ring.put,
                None,
                args=args,
                result=result,
                on_loss=ring.count_uncaptured,
                counts=ring.counts,
                context=backend.context_getter(),
            )
            self._receiver = self._event_receiver(adapter, only)
        else:
            self._capture = CeleryCapture(
                adapter,
                ring.put,
                self._worker,
                args=args,
                result=result,
                consumer=consumer,
                runs=ring.runs,
                on_loss=ring.count_uncaptured,
                counts=ring.counts,
                context=backend.context_getter(),
            )
            self._monitor = RunMonitor(
                self._capture.task_states, self._capture.repeated_runs, in_process=True
            )

    def _event_receiver(self, adapter: CeleryEngineAdapter, only: str | None) -> EventReceiver:
        # The modules are imported here, because a worker does not need them.
        from z4j_bare.engines.celery.event_receiver import EventReceiver
        from z4j_bare.engines.celery.translate import Translator
        from z4j_bare.engines.celery.workers import WorkerRegistry

        app, settings = adapter.celery_app, self._settings
        workers = WorkerRegistry(app, self.presence, self._backend, only_hostname=only)
        args, result = settings.capture_args, settings.capture_result
        counts = self._ring.counts
        translate = Translator(
            adapter, self._ring.put, workers, args=args, result=result, counts=counts
        )
        return EventReceiver(app, translate, workers.tick, self._backend)

    def loops(self) -> list[Loop]:
        """Return the loops that report presence, monitor a worker's runs, and read events."""
        loops = super().loops()
        if (monitor := self._monitor) is not None:
            loops.append((monitor.name, partial(monitor.run, self._backend)))
        if (reader := self._receiver or self._children) is not None:
            loops.append((reader.name, reader.run))
        return loops

    def connect(self) -> None:
        """Connect the signal handlers. If the worker's name is known, report it as online."""
        if self._reported_worker is not None:
            self.presence.online(self._reported_worker)
        self._capture.connect()

    def disconnect(self) -> None:
        """Wait a limited time for the last messages, then disconnect the signal handlers."""
        if self._receiver is not None:
            self._receiver.finish()
        if self._children is not None:
            self._children.finish()
        super().disconnect()
        self._capture.disconnect()

    def unheard(self) -> int:
        """Return how many tasks the pool accepted without a captured start."""
        return self._monitor.unheard if self._monitor else 0

    def current_task(self) -> str:
        """Return ``name[id]`` of the task whose greenlet runs now; empty if no task runs."""
        try:
            states = list(self._task_states().items()) if self._children is None else ()
        except RuntimeError:  # the hub has just added a task
            return ""
        for task_id, task_state in states:
            # ``gr_frame`` of a started greenlet that has not ended is ``None`` only while the
            # greenlet runs.
            context = task_state.context
            if (
                task_state.started_at
                and getattr(context, "gr_frame", self) is None
                and not getattr(context, "dead", True)
            ):
                return f"{task_state.task_type.name}[{task_id}]"
        return ""

    def iter_running(
        self, query: Mapping[str, Any], checkpoint: Callable[[], object]
    ) -> Iterator[dict[str, Any]]:
        """Iterate over the tasks that the worker runs, longest run first.

        A process outside a worker has no running tasks, except for eager ones.
        """
        module = self._backend.import_module("z4j_bare.engines.celery.running_tasks")
        tasks: RunningTasks = module.RunningTasks(
            self._app,
            self._task_states(),
            self._reported_worker,
            self._backend,
            in_process=self._children is None,
        )
        return tasks.iter_rows(module.TaskQuery(**query), checkpoint)

    def describe(self) -> dict[str, Any]:
        """Return the worker, its queues, and the number of tasks that its pool has accepted."""
        if self._consumer is None:
            return {**super().describe(), "worker": None}
        from celery.worker import state

        return {
            **super().describe(),
            "worker": self._handlers().worker,
            "queues": list(queue_names(self._app, self._consumer)()),
            "running": len(state.active_requests),
        }

    def _task_states(self) -> TaskStates:
        return self._handlers().task_states

    def _handlers(self) -> SignalHandlers:
        """Return the handlers of the signals that fire in this process."""
        if isinstance(self._capture, CeleryCapture):
            return self._capture
        return self._capture.arrivals

    def failures(self) -> int:
        """Return how often the connection to the broker failed."""
        return self._receiver.failures if self._receiver else 0

    def dropped(self) -> int:
        """Return how many events of the broker or of the children could not be decoded."""
        reader = self._receiver or self._children
        return reader.unreadable if reader else 0

    def lost(self) -> int:
        """Return how many events did not fit into the channel of a prefork worker."""
        return self._children.lost() if self._children else 0


def only_worker() -> str | None:
    """Return the name of the one worker whose events are reported; ``None`` means all workers.

    The name comes from the same environment variables that the adapter reads.
    """
    names = (
        os.environ.get(name, "").strip()
        for name in ("Z4J_CELERY_LOCAL_HOSTNAME", "CELERY_HOSTNAME")
    )
    return next(filter(None, names), None)
