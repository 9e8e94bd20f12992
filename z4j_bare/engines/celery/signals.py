"""Task events from Celery's signals, as far as they fire in this process.

In gevent, eventlet, threads and solo pools that is all of them. Every handler copies a little, appends to the ring, and
returns. Reading the broker's events instead takes 30 % of a loaded worker's CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, time
from typing import Any

from z4j_bare.concurrency import fork
from z4j_bare.engines.celery.task_encoder import TaskEncoder
from z4j_bare.engines.celery.task_state import (
    FAILED,
    REJECTED,
    RETRIED,
    REVOKED,
    TaskState,
    TaskStates,
    TaskTypes,
)
from z4j_bare.events.redaction import Redactor, safe_name
from z4j_bare.events.ring import Put
from z4j_bare.events.snapshot import snapshot
from z4j_bare.safety import excused, safe_boundary

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
        clock: Callable[[], float] = time,
    ) -> None:
        from z4j_celery.meta import get_meta

        self.worker = (
            None if hostname is None else safe_name(hostname, engine.redaction.value_matches)
        )
        self.task_states = TaskStates()
        self._put = put
        self._args = args
        self._result = result
        self._clock = clock
        scribe = TaskEncoder(engine.name, Redactor(engine.redaction), self.worker)
        # Bound once: a bound method made at each event is one more thing for the garbage collector to count.
        self._received, self._started, self._succeeded = (
            scribe.received,
            scribe.started,
            scribe.succeeded,
        )
        self._other, self._encode = scribe.other, scribe.encode
        self._at_once = scribe.at_once
        self._kinds = TaskTypes(get_meta)
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

    # The first three are called for every task, and so have no boundary around them but a ``try`` of their own.

    def _on_received(self, request: Any = None, **_kwargs: Any) -> None:
        try:
            task_id = request.id
            kind = self._kinds.of(request.task)
            if fork.epoch() != self._epoch or not (kind.whole or kind.reports(task_id)):
                return
            task_state = self.task_states.get(task_id) or self.task_states.add(
                task_id, TaskState(kind, _queue(request))
            )
            args = kwargs = None
            if self._args:
                args = snapshot(request.args) if request.args else _NO_ARGS
                kwargs = snapshot(request.kwargs) if request.kwargs else _NO_KWARGS
            above, root = request.parent_id, request.root_id
            self._put(
                (self._received, self._clock(), task_id, task_state, args, kwargs, above, root)
            )
        except Exception as error:
            if not excused(self._on_received, error):
                raise

    def _on_prerun(self, task_id: str = "", task: Any = None, **_kwargs: Any) -> None:
        try:
            task_state = self._task_state(task_id, task)
            if task_state is not None:
                task_state.began = perf_counter()
                self._put((self._started, self._clock(), task_id, task_state))
        except Exception as error:
            if not excused(self._on_prerun, error):
                raise

    def _on_postrun(
        self,
        task_id: str = "",
        task: Any = None,
        retval: Any = None,
        state: Any = None,
        **_kwargs: Any,
    ) -> None:
        # task_success carries no id. Failures have a signal of their own, and a task that gevent killed has no state.
        if state != "SUCCESS":
            return
        try:
            task_state = self._task_state(task_id, task)
            if task_state is not None:
                self.task_states.pop(task_id, None)
                result = snapshot(retval) if self._result else None
                self._put(
                    (
                        self._succeeded,
                        self._clock(),
                        task_id,
                        task_state,
                        perf_counter(),
                        self._result,
                        result,
                    )
                )
        except Exception as error:
            if not excused(self._on_postrun, error):
                raise

    @safe_boundary
    def _on_failure(
        self,
        sender: Any = None,
        task_id: str = "",
        exception: Any = None,
        einfo: Any = None,
        **_kwargs: Any,
    ) -> None:
        task_state = self._task_state(task_id, sender)
        if task_state is not None:
            own = {
                "exception": type(exception).__name__,
                "exception_message": snapshot(_text(exception)),
            }
            text = getattr(einfo, "traceback", None)
            if isinstance(text, str):
                own["traceback"] = text[:TRACEBACK]
            self._finish(FAILED, task_id, task_state, own)

    @safe_boundary
    def _on_retry(
        self, sender: Any = None, request: Any = None, reason: Any = None, **_kwargs: Any
    ) -> None:
        task_state = self._task_state(request.id, sender)
        if task_state is not None:
            retries = int(getattr(request, "retries", 0) or 0) + 1
            own = {"reason": snapshot(_text(reason)), "retry_count": retries}
            self._put((self._other, self._clock(), request.id, task_state, RETRIED, own, None))

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
        task_state = self._task_state(request.id, sender)
        if task_state is not None:
            number = int(signum) if isinstance(signum, int) else None
            own = {"terminated": bool(terminated), "signum": number, "expired": bool(expired)}
            self._finish(REVOKED, request.id, task_state, own)

    @safe_boundary
    def _on_rejected(self, message: Any = None, exc: Any = None, **_kwargs: Any) -> None:
        headers = getattr(message, "headers", None) or {}
        self._refused(
            str(headers.get("id") or ""),
            str(headers.get("task") or "unknown"),
            snapshot(_text(exc)),
        )

    @safe_boundary
    def _on_unknown(self, name: Any = None, id: Any = None, **_kwargs: Any) -> None:  # noqa: A002 - Celery's keyword
        self._refused(str(id or ""), str(name or "unknown"), "not registered with this worker")

    def _refused(self, task_id: str, name: str, reason: Any) -> None:
        if fork.epoch() == self._epoch:
            own = {"worker": self.worker, "task_name": name, "reason": reason}
            self._put((self._encode, REJECTED, self._clock(), task_id, {}, own))

    def _task_state(self, task_id: str, task: Any) -> TaskState | None:
        """Return the track of a reported task; one that was received before us begins here."""
        if fork.epoch() != self._epoch:
            return None
        task_state = self.task_states.get(task_id)
        if task_state is not None:
            return task_state
        kind = self._kinds.of(task)
        if not kind.reports(task_id):
            return None
        return self.task_states.add(
            task_id, TaskState(kind, _queue(getattr(task, "request", None)))
        )

    def _finish(self, event: str, task_id: str, task_state: TaskState, own: dict[str, Any]) -> None:
        self._put((self._other, self._clock(), task_id, task_state, event, own, perf_counter()))
        self.task_states.end(task_id)


class ParentCapture(CeleryCapture):
    """What fires in a prefork worker's own process: a task comes, with its real arguments, or cannot be taken.

    The rest fires in its children, and what fires in both is told by the broker's events, which are stamped by the same
    tracks as they come.
    """

    signals = ("task_received", "task_rejected", "task_unknown")

    def __init__(self, engine: Any, put: Put, hostname: str | None, **options: Any) -> None:
        super().__init__(engine, lambda note: put(self._at_once(note)), hostname, **options)


class EagerCapture(CeleryCapture):
    """Tasks that a process runs itself although it is no worker: ``apply()``, ``task_always_eager``."""

    signals = ("task_prerun", "task_postrun", "task_failure", "task_retry")

    def _task_state(self, task_id: str, task: Any) -> TaskState | None:
        eager = getattr(getattr(task, "request", None), "is_eager", False)
        return super()._task_state(task_id, task) if eager else None


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
