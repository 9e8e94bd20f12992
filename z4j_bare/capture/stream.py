"""The Celery adapter's own event stream, brought up to what the capture in process sends.

In prefork, and outside a worker, started, succeeded, failed, retried and revoked come from Celery's broker events. Those
know a task by its name only, so the adapter applies ``@z4j_meta`` to none of them, and they carry no count of retries.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from z4j_core.redaction.markers import REDACTED

from z4j_bare.capture.celery import FAILED, RECEIVED, RETRIED, REVOKED, STARTED, SUCCEEDED
from z4j_bare.capture.names import safe_name
from z4j_bare.capture.tasks import Kinds, Track, Tracks

if TYPE_CHECKING:
    from z4j_core.models import Event

_FINAL = frozenset({SUCCEEDED, FAILED, REVOKED})
_REPEATING = frozenset({RECEIVED, STARTED, RETRIED})


class CeleryStream:
    """Completes one adapter's events; for the task that pumps them only.

    :param engine: the ``CeleryEngineAdapter``.
    :param matches: its ``RedactionEngine.value_matches``, for :func:`safe_name`.
    """

    def __init__(self, engine: Any, matches: Callable[[str], bool]) -> None:
        from z4j_celery.meta import get_meta

        self._app = engine.celery_app
        self._matches = matches
        self._kinds = Kinds(get_meta)
        self._tracks = Tracks()

    def complete(self, event: Event) -> dict[str, Any] | None:
        """Return the event's fields, or ``None`` for a run that its task does not want reported."""
        data, kind = dict(event.data), str(event.kind.value)
        if isinstance(worker := data.get("worker"), str):
            data["worker"] = safe_name(worker, self._matches)
        stamp = event.occurred_at.timestamp()
        if event.task_id:
            track = self._track(event.task_id, data)
            if not track.kind.reports(event.task_id):
                return None
            self._annotate(kind, track, data)
            stamp = track.stamp(stamp, kind if kind in _REPEATING else None)
            if kind in _FINAL:
                self._tracks.end(event.task_id)
        return {
            "id": str(event.id),
            "kind": kind,
            "engine": event.engine,
            "task_id": event.task_id,
            "occurred_at": datetime.fromtimestamp(stamp, UTC).isoformat(),
            "data": data,
        }

    def _track(self, task_id: str, data: dict[str, Any]) -> Track:
        track = self._tracks.get(task_id)
        if track is None:
            name = str(data.get("task_name") or "<unknown>")
            queue = data.get("queue")
            # With a name that this app does not know there is no annotation to be had.
            kind = self._kinds.of(self._app.tasks.get(name, name))
            track = self._tracks.add(task_id, Track(kind, queue if isinstance(queue, str) else None))
        return track

    @staticmethod
    def _annotate(kind: str, track: Track, data: dict[str, Any]) -> None:
        for name, value in track.kind.fields.items():
            data.setdefault(name, value)
        if track.queue and not data.get("queue"):
            data["queue"] = track.queue
        if kind == RETRIED:
            track.retries += 1
            data["retry_count"] = max(track.retries, int(data.get("retry_count") or 0))
        meta = track.kind.meta
        if meta is not None and meta.redact_result and "result" in data:
            data["result"] = REDACTED
