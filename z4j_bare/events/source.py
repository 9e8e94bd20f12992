"""Where an engine's events come from: signals of this process, the broker's events, or the adapter's own stream."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_bare.engines.celery.signals import (
    CeleryCapture,
    EagerCapture,
    ParentCapture,
    runs_in_process,
)
from z4j_bare.events.encode import encode_model
from z4j_bare.events.names import value_matcher
from z4j_bare.events.presence import Presence
from z4j_bare.events.ring import Ring
from z4j_bare.process import local_worker_name

if TYPE_CHECKING:
    from z4j_core.models import Event

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.celery.event_receiver import EventReceiver
    from z4j_bare.settings import Settings

#: What runs until an event is set, and its name.
Loop = tuple[str, Callable[[Any], None]]


class EventSource:
    """One engine's events, taken from the adapter's own stream."""

    #: Whether the adapter has to be connected for them.
    adapted = True

    def __init__(
        self, engine: Any, ring: Ring, settings: Settings, backend: BaseConcurrency
    ) -> None:
        self.engine = engine.name
        self.presence = Presence(engine.name, ring.put, value_matcher(engine))
        self._ring = ring
        self._settings = settings
        self._backend = backend

    def loops(self) -> list[Loop]:
        """Return what has to run from :meth:`connect` on; nothing has to wait for its end but :meth:`disconnect`."""
        return [(f"z4j-presence-{self.engine}", partial(self.presence.run, self._backend))]

    def connect(self) -> None:
        """Begin to capture. Cheap, and on the caller's time, so that no early task is missed."""
        if name := local_worker_name(self.engine):
            self.presence.seen(name)

    def disconnect(self) -> None:
        """End the capture once what has happened is told, and announce that the workers leave."""
        self.presence.announce("worker.offline")

    def failures(self) -> int:
        """Return how often the stream of events broke."""
        return 0

    def dropped(self) -> int:
        """Return how many events could not be read."""
        return 0

    def record(self, event: Event) -> None:
        """Take an event of the adapter's own stream. Never waits, never raises."""
        data = event.data
        if not self._settings.capture_args:
            data.pop("args", None)
            data.pop("kwargs", None)
        if not self._settings.capture_result:
            data.pop("result", None)
        if isinstance(worker := data.get("worker"), str):
            self.presence.seen(worker)
        self._ring.put((encode_model, event))


class CelerySource(EventSource):
    """Celery's events. What signals cannot tell comes from the broker; the adapter's own hooks and monitor are not used.

    :param consumer: the Consumer of the Celery worker that this process is, or ``None``.
    """

    adapted = False

    def __init__(
        self, engine: Any, ring: Ring, settings: Settings, backend: BaseConcurrency, consumer: Any
    ) -> None:
        super().__init__(engine, ring, settings, backend)
        self._consumer = consumer
        self._worker = getattr(consumer, "hostname", None)
        only = None if self._worker else only_worker()
        self._known = self._worker or only
        args, result = settings.capture_args, settings.capture_result
        in_process = self._worker is not None and runs_in_process(consumer)
        handlers = (
            CeleryCapture if in_process else EagerCapture if self._worker is None else ParentCapture
        )
        self._capture = handlers(engine, ring.put, self._worker, args=args, result=result)
        self._stream = None if in_process else self._broker_stream(engine, only)

    def _broker_stream(self, engine: Any, only: str | None) -> EventReceiver:
        from z4j_bare.engines.celery.event_receiver import (
            EventReceiver,
        )  # most workers need none of these
        from z4j_bare.engines.celery.translate import Translator
        from z4j_bare.engines.celery.workers import WorkerRegistry

        app, settings = engine.celery_app, self._settings
        roster = WorkerRegistry(app, self.presence, self._backend, mine=self._worker, only=only)
        tracks = self._capture.tracks if self._worker else None
        args, result = settings.capture_args, settings.capture_result
        take = Translator(engine, self._ring.put, roster, tracks, args=args, result=result)
        return EventReceiver(app, take, roster.tend, self._backend)

    def loops(self) -> list[Loop]:
        """Presence, and the broker's events where they are needed."""
        return super().loops() + ([(self._stream.name, self._stream.run)] if self._stream else [])

    def connect(self) -> None:
        """Listen to the signals, and have this worker send its events."""
        if self._known is not None:
            self.presence.seen(self._known)
        self._capture.connect()
        if self._stream is not None and self._worker is not None:
            enable_here(self._consumer)

    def disconnect(self) -> None:
        """Read what the broker has yet, and stop listening."""
        if self._stream is not None:
            self._stream.finish()
        super().disconnect()
        self._capture.disconnect()

    def failures(self) -> int:
        """Return how often the connection to the broker broke."""
        return self._stream.failures if self._stream else 0

    def dropped(self) -> int:
        """Return how many of the broker's events could not be read."""
        return self._stream.unreadable if self._stream else 0


def make_source(
    engine: Any, ring: Ring, settings: Settings, backend: BaseConcurrency, consumer: Any
) -> EventSource:
    """Return the source of an engine's events; ``consumer`` as in :class:`CelerySource`."""
    if hasattr(engine, "celery_app"):
        return CelerySource(engine, ring, settings, backend, consumer)
    if hasattr(engine, "rq_app"):
        from z4j_bare.engines.rq import RqSource

        return RqSource(engine, ring, settings, backend)
    return EventSource(engine, ring, settings, backend)


def only_worker() -> str | None:
    """Return the one worker that a process which is none itself reports, by the variables that the adapter reads."""
    names = (
        os.environ.get(name, "").strip()
        for name in ("Z4J_CELERY_LOCAL_HOSTNAME", "CELERY_HOSTNAME")
    )
    return next(filter(None, names), None)


def enable_here(consumer: Any) -> None:
    """Do in a worker's own process what ``enable_events`` asks it to do: a broadcast can come before it listens."""
    groups = getattr(getattr(consumer, "event_dispatcher", None), "groups", None)
    if groups:  # empty means all
        groups.add("task")
