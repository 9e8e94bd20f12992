"""The event source of Celery: signals, and the broker's events if signals fire elsewhere."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from z4j_bare.engines.celery.signals import (
    CeleryCapture,
    EagerCapture,
    ParentCapture,
    runs_in_process,
)
from z4j_bare.events.ring import Ring
from z4j_bare.events.source import EventSource, Loop

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer
    from z4j_celery import CeleryEngineAdapter

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.celery.event_receiver import EventReceiver
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
        self._consumer = consumer
        self._worker = getattr(consumer, "hostname", None)
        only = None if self._worker else only_worker()
        self._reported_worker = self._worker or only
        args, result = settings.capture_args, settings.capture_result
        in_process = self._worker is not None and runs_in_process(consumer)
        capture_class = (
            CeleryCapture if in_process else EagerCapture if self._worker is None else ParentCapture
        )
        self._capture = capture_class(adapter, ring.put, self._worker, args=args, result=result)
        self._receiver = None if in_process else self._event_receiver(adapter, only)

    def _event_receiver(self, adapter: CeleryEngineAdapter, only: str | None) -> EventReceiver:
        # Imported here, because a worker whose tasks run in its own process does not need them.
        from z4j_bare.engines.celery.event_receiver import EventReceiver
        from z4j_bare.engines.celery.translate import Translator
        from z4j_bare.engines.celery.workers import WorkerRegistry

        app, settings = adapter.celery_app, self._settings
        workers = WorkerRegistry(
            app, self.presence, self._backend, own_hostname=self._worker, only_hostname=only
        )
        task_states = self._capture.task_states if self._worker else None
        args, result = settings.capture_args, settings.capture_result
        translate = Translator(
            adapter, self._ring.put, workers, task_states, args=args, result=result
        )
        return EventReceiver(app, translate, workers.tick, self._backend)

    def loops(self) -> list[Loop]:
        """Return the presence loop, and the receiver of the broker's events if there is one."""
        receiver = self._receiver
        return super().loops() + ([(receiver.name, receiver.run)] if receiver else [])

    def connect(self) -> None:
        """Connect the signal handlers, and enable the task events of this prefork worker."""
        if self._reported_worker is not None:
            self.presence.online(self._reported_worker)
        self._capture.connect()
        if self._receiver is not None and self._worker is not None:
            enable_local_events(self._consumer)

    def disconnect(self) -> None:
        """Read the events that the broker still has, then disconnect the signal handlers."""
        if self._receiver is not None:
            self._receiver.finish()
        super().disconnect()
        self._capture.disconnect()

    def failures(self) -> int:
        """Return how often the connection to the broker failed."""
        return self._receiver.failures if self._receiver else 0

    def dropped(self) -> int:
        """Return how many of the broker's events could not be decoded."""
        return self._receiver.unreadable if self._receiver else 0


def only_worker() -> str | None:
    """Return the name of the only worker whose events a process outside a worker reports.

    ``None`` means all workers. The adapter reads the same environment variables.
    """
    names = (
        os.environ.get(name, "").strip()
        for name in ("Z4J_CELERY_LOCAL_HOSTNAME", "CELERY_HOSTNAME")
    )
    return next(filter(None, names), None)


def enable_local_events(consumer: Consumer | None) -> None:
    """Enable task events in this worker's own process, as ``enable_events`` would.

    A broadcast may arrive before the worker listens to its control queue.
    """
    groups = getattr(getattr(consumer, "event_dispatcher", None), "groups", None)
    if groups:  # an empty set already means all groups
        groups.add("task")
