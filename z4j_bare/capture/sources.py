"""Where an engine's events come from: its own process's signals, or the adapter's event stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare.capture.celery import CeleryCapture, runs_in_process
from z4j_bare.capture.names import value_matcher
from z4j_bare.capture.presence import Presence
from z4j_bare.capture.ring import Ring
from z4j_bare.capture.stream import CeleryStream
from z4j_bare.wire.events import encode_event, encode_fields

if TYPE_CHECKING:
    from z4j_core.models import Event

    from z4j_bare.settings import Settings


class Source:
    """One engine's events.

    :param engine: the adapter; capture in process is for Celery's.
    :param consumer: the Consumer of the Celery worker that this process is, or ``None``.
    :param only: the one worker whose presence is announced when this process is no worker
        (``Z4J_CELERY_LOCAL_HOSTNAME``); ``None`` means every worker that is seen.
    """

    def __init__(self, engine: Any, ring: Ring, settings: Settings, consumer: Any, only: str | None = None) -> None:
        self.engine = engine.name
        self._ring = ring
        self._settings = settings
        self._capture: CeleryCapture | None = None
        matches = value_matcher(engine)
        self.presence = Presence(engine.name, ring.put, matches)
        hostname = getattr(consumer, "hostname", None) if hasattr(engine, "celery_app") else None
        self._learn = hostname is None and only is None
        if hostname is not None and runs_in_process(consumer):
            self._capture = CeleryCapture(
                engine, ring.put, hostname, args=settings.capture_args, result=settings.capture_result
            )
        self._stream = CeleryStream(engine, matches) if hasattr(engine, "celery_app") else None
        self._known = hostname or only

    @property
    def in_process(self) -> bool:
        """Whether the adapter's own event stream is not needed."""
        return self._capture is not None

    def connect(self) -> None:
        """Begin to capture. Cheap, and on the caller's time, so that no early task is missed."""
        if self._known is not None:
            self.presence.seen(self._known)
        if self._capture is not None:
            self._capture.connect()

    def disconnect(self) -> None:
        """Announce that the worker leaves, and end the capture."""
        self.presence.announce("worker.offline")
        if self._capture is not None:
            self._capture.disconnect()

    def record(self, event: Event) -> None:
        """Take an event of the adapter's own stream. Never waits, never raises."""
        data = event.data
        if not self._settings.capture_args:
            data.pop("args", None)
            data.pop("kwargs", None)
        if not self._settings.capture_result:
            data.pop("result", None)
        if self._learn and isinstance(worker := data.get("worker"), str):
            self.presence.seen(worker)
        if self._stream is None:
            self._ring.put(encode_event, event)
        elif (fields := self._stream.complete(event)) is not None:
            self._ring.put(encode_fields, fields)
