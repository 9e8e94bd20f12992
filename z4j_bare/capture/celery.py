"""Task events from Celery's signals, as far as they fire in this process.

In gevent, eventlet, threads and solo pools that is all of them. Every handler copies a little, appends to the ring, and
returns. Reading the broker's events instead takes 30 % of a loaded worker's CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from z4j_bare.capture.encode import REMEMBERED, Encoder, Record
from z4j_bare.capture.names import safe_name
from z4j_bare.capture.redact import Redactor
from z4j_bare.capture.ring import Put
from z4j_bare.capture.snapshot import snapshot
from z4j_bare.capture.tasks import Kinds, Track, Tracks
from z4j_bare.concurrency import fork
from z4j_bare.safety import safe_boundary

RECEIVED, STARTED, SUCCEEDED = "task.received", "task.started", "task.succeeded"
FAILED, RETRIED, REVOKED, REJECTED = "task.failed", "task.retried", "task.revoked", "task.rejected"

#: Characters of a traceback that are looked at; the encoder sends the first 4,096.
TRACEBACK = 5120

#: Of tasks without them: two containers less for the garbage collector to count. Nobody changes what was captured.
_NO_ARGS: list[Any] = []
_NO_KWARGS: dict[str, Any] = {}

_HANDLERS = {
    "task_received": "_on_received",
    "task_prerun": "_on_prerun",
    "task_postrun": "_on_postrun",
    "task_failure": "_on_failure",
    "task_retry": "_on_retry",
    "task_revoked": "_on_revoked",
    "task_rejected": "_on_rejected",
    "task_unknown": "_on_unknown",
}


class CeleryCapture:
    """The signal handlers of one worker whose tasks run in its own process.

    :param engine: the ``CeleryEngineAdapter``; its redaction and its tasks' ``@z4j_meta`` hold as with its own hooks.
    :param put: ``Ring.put``.
    :param hostname: the worker's node name; ``None`` in a process that is no worker.
    :param args: whether arguments are sent; likewise ``result``.
    """

    #: The signals that are listened to.
    signals: tuple[str, ...] = tuple(_HANDLERS)

    def __init__(
        self,
        engine: Any,
        put: Put,
        hostname: str | None,
        *,
        args: bool = True,
        result: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        from z4j_celery.meta import get_meta

        self.worker = None if hostname is None else safe_name(hostname, engine.redaction.value_matches)
        self.tracks = Tracks()
        self._put = put
        self._args = args
        self._result = result
        self._clock = clock
        self._encode = Encoder(engine.name, Redactor(engine.redaction))
        self._kinds = Kinds(get_meta)
        self._places: dict[str | None, dict[str, Any]] = {}
        self._epoch = fork.epoch()
        self._connected: list[tuple[Any, Callable[..., Any]]] = []

    def connect(self) -> None:
        """Subscribe to the task signals. Idempotent."""
        from celery import signals

        if self._connected:
            return
        for name in self.signals:
            signal, handler = getattr(signals, name), getattr(self, _HANDLERS[name])
            signal.connect(handler, weak=False)
            self._connected.append((signal, handler))

    def disconnect(self) -> None:
        """Unsubscribe. Idempotent."""
        while self._connected:
            signal, handler = self._connected.pop()
            signal.disconnect(handler)

    @safe_boundary
    def _on_received(self, request: Any = None, **_kwargs: Any) -> None:
        task_id = request.id
        kind = self._kinds.of(request.task)
        if fork.epoch() != self._epoch or not kind.reports(task_id):
            return
        track = self.tracks.get(task_id) or self.tracks.add(task_id, Track(kind, _queue(request)))
        own: dict[str, Any] = {"worker": self.worker, "queue": track.queue}
        if self._args:
            own["args"] = snapshot(request.args) if request.args else _NO_ARGS
            own["kwargs"] = snapshot(request.kwargs) if request.kwargs else _NO_KWARGS
        if request.parent_id:
            own["parent_task_id"] = request.parent_id
        if request.root_id:
            own["root_task_id"] = request.root_id
        if kind.meta is not None:
            own["_meta"] = kind.meta
        self._put((self._encode, RECEIVED, track.stamp(self._clock(), RECEIVED), task_id, kind.fields, own))

    @safe_boundary
    def _on_prerun(self, task_id: str = "", task: Any = None, **_kwargs: Any) -> None:
        track = self._track(task_id, task)
        if track is not None:
            track.began = time.perf_counter()
            stamp = track.stamp(self._clock(), STARTED)
            self._put((self._encode, STARTED, stamp, task_id, track.kind.fields, self._place(track.queue)))

    @safe_boundary
    def _on_postrun(
        self, task_id: str = "", task: Any = None, retval: Any = None, state: Any = None, **_kwargs: Any
    ) -> None:
        # task_success carries no id. Failures have a signal of their own, and a task that gevent killed has no state.
        if state != "SUCCESS":
            return
        track = self._track(task_id, task)
        if track is not None:
            own: dict[str, Any] = {"result": snapshot(retval)} if self._result else {}
            self._finish(SUCCEEDED, task_id, track, own)

    @safe_boundary
    def _on_failure(
        self, sender: Any = None, task_id: str = "", exception: Any = None, einfo: Any = None, **_kwargs: Any
    ) -> None:
        track = self._track(task_id, sender)
        if track is not None:
            own = {"exception": type(exception).__name__, "exception_message": snapshot(_text(exception))}
            text = getattr(einfo, "traceback", None)
            if isinstance(text, str):
                own["traceback"] = text[:TRACEBACK]
            self._finish(FAILED, task_id, track, own)

    @safe_boundary
    def _on_retry(self, sender: Any = None, request: Any = None, reason: Any = None, **_kwargs: Any) -> None:
        track = self._track(request.id, sender)
        if track is not None:
            own = {
                "worker": self.worker,
                "queue": track.queue,
                "reason": snapshot(_text(reason)),
                "retry_count": int(getattr(request, "retries", 0) or 0) + 1,
            }
            stamp = track.stamp(self._clock(), RETRIED)
            self._put((self._encode, RETRIED, stamp, request.id, track.kind.fields, own))

    @safe_boundary
    def _on_revoked(
        self,
        sender: Any = None,
        request: Any = None,
        terminated: Any = None,
        signum: Any = None,
        expired: Any = None,
        **_kwargs: Any,
    ) -> None:
        track = self._track(request.id, sender)
        if track is not None:
            number = int(signum) if isinstance(signum, int) else None
            own = {"terminated": bool(terminated), "signum": number, "expired": bool(expired)}
            self._finish(REVOKED, request.id, track, own)

    @safe_boundary
    def _on_rejected(self, message: Any = None, exc: Any = None, **_kwargs: Any) -> None:
        headers = getattr(message, "headers", None) or {}
        self._refused(str(headers.get("id") or ""), str(headers.get("task") or "unknown"), snapshot(_text(exc)))

    @safe_boundary
    def _on_unknown(self, name: Any = None, id: Any = None, **_kwargs: Any) -> None:  # noqa: A002 - Celery's keyword
        self._refused(str(id or ""), str(name or "unknown"), "not registered with this worker")

    def _refused(self, task_id: str, name: str, reason: Any) -> None:
        if fork.epoch() == self._epoch:
            own = {"worker": self.worker, "task_name": name, "reason": reason}
            self._put((self._encode, REJECTED, self._clock(), task_id, {}, own))

    def _track(self, task_id: str, task: Any) -> Track | None:
        """Return the track of a reported task; one that was received before us begins here."""
        if fork.epoch() != self._epoch:
            return None
        track = self.tracks.get(task_id)
        if track is not None:
            return track
        kind = self._kinds.of(task)
        if not kind.reports(task_id):
            return None
        return self.tracks.add(task_id, Track(kind, _queue(getattr(task, "request", None))))

    def _place(self, queue: str | None) -> dict[str, Any]:
        """Return the only own fields of a ``task.started``, the same object for all that ran here."""
        place = self._places.get(queue)
        if place is None:
            if len(self._places) >= REMEMBERED:
                self._places.clear()
            place = self._places[queue] = {"worker": self.worker, "queue": queue}
        return place

    def _finish(self, event: str, task_id: str, track: Track, own: dict[str, Any]) -> None:
        own["worker"] = self.worker
        own["queue"] = track.queue
        if track.began:
            own["runtime_ms"] = int((time.perf_counter() - track.began) * 1000)
        if track.kind.meta is not None:
            own["_meta"] = track.kind.meta
        record: Record = (self._encode, event, track.stamp(self._clock()), task_id, track.kind.fields, own)
        self._put(record)
        self.tracks.end(task_id)


class ParentCapture(CeleryCapture):
    """What fires in a prefork worker's own process: a task comes, with its real arguments, or cannot be taken.

    The rest fires in its children, and what fires in both is told by the broker's events.
    """

    signals = ("task_received", "task_rejected", "task_unknown")


class EagerCapture(CeleryCapture):
    """Tasks that a process runs itself although it is no worker: ``apply()``, ``task_always_eager``."""

    signals = ("task_prerun", "task_postrun", "task_failure", "task_retry")

    def _track(self, task_id: str, task: Any) -> Track | None:
        eager = getattr(getattr(task, "request", None), "is_eager", False)
        return super()._track(task_id, task) if eager else None


def runs_in_process(consumer: Any) -> bool:
    """Whether a worker's tasks, and so their signals, run in the worker's own process.

    The running pool is asked: ``conf.worker_pool`` knows nothing of ``-P``.
    """
    pool = getattr(consumer, "pool", None)
    return pool is not None and not any(
        base.__module__ == "celery.concurrency.prefork" for base in type(pool).__mro__
    )


def _queue(request: Any) -> str | None:
    info = getattr(request, "delivery_info", None)
    name = info.get("routing_key") if isinstance(info, dict) else None
    return str(name) if name else None


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__} whose text fails>"
