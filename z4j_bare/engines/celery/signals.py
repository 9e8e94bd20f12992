"""Captures task events with handlers of the Celery signals that fire in this process.

With the pools gevent, eventlet, threads and solo, all task signals fire in the worker's process. A
handler copies a few values, appends a record to the ring and returns. Reading the events from the
broker instead would take 30 % of the CPU time of a loaded worker.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, time
from typing import TYPE_CHECKING, Any

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
from z4j_bare.events.ring import Captured, Put
from z4j_bare.events.snapshot import snapshot
from z4j_bare.safety import safe_boundary, should_suppress

if TYPE_CHECKING:
    from celery.app.task import Task
    from celery.utils.dispatch import Signal
    from celery.worker.consumer import Consumer
    from celery.worker.request import Request
    from z4j_celery import CeleryEngineAdapter

#: Characters of a traceback that are captured; the encoder sends the first 4,096.
CAPTURED_TRACEBACK_CHARS = 5120

#: Arguments of all tasks without arguments. A new list and a new dictionary for each task would be
#: two more containers for the garbage collector to track. No code modifies captured arguments.
_NO_ARGS: list[Any] = []
_NO_KWARGS: dict[str, Any] = {}

#: Default of the arguments that Celery always sends. A missing one fails in the handler.
_ABSENT: Any = None

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
    """The signal handlers of a worker whose tasks run in its own process.

    :param adapter: its redaction and its tasks' ``@z4j_meta`` apply as in its own handlers.
    :param put: ``Ring.put``.
    :param hostname: the worker's node name; ``None`` outside a worker.
    :param args: whether to capture arguments.
    :param result: whether to capture results.
    """

    #: The signals to connect.
    signals: tuple[str, ...] = tuple(_HANDLERS)

    def __init__(
        self,
        adapter: CeleryEngineAdapter,
        put: Put,
        hostname: str | None,
        *,
        args: bool = True,
        result: bool = True,
        clock: Callable[[], float] = time,
    ) -> None:
        from z4j_celery.meta import get_meta

        self.worker = (
            None if hostname is None else safe_name(hostname, adapter.redaction.value_matches)
        )
        self.task_states = TaskStates()
        self._args = args
        self._result = result
        self._clock = clock
        encoder = TaskEncoder(adapter.name, Redactor(adapter.redaction), self.worker)
        self._put = self._wrapped(put, encoder)
        # Bound once: a method bound at each event is one more object for the garbage collector.
        self._received = encoder.received
        self._started = encoder.started
        self._succeeded = encoder.succeeded
        self._generic = encoder.generic
        self._encode = encoder.encode
        self._task_types = TaskTypes(get_meta)
        self._epoch = fork.epoch()
        self._connected: list[tuple[Signal, Callable[..., None]]] = []

    def connect(self) -> None:
        """Connect the handlers. Idempotent."""
        from celery import signals

        if self._connected:
            return
        for name in self.signals:
            signal, handler = getattr(signals, name), getattr(self, _HANDLERS[name])
            signal.connect(handler, weak=False)
            self._connected.append((signal, handler))

    def disconnect(self) -> None:
        """Disconnect the handlers. Idempotent."""
        while self._connected:
            signal, handler = self._connected.pop()
            signal.disconnect(handler)

    def _wrapped(self, put: Put, _encoder: TaskEncoder, /) -> Put:
        """Return the function that the handlers call with each record."""
        return put

    # The next three run for every task. They have a try of their own instead of safe_boundary,
    # which costs a call.

    def _on_received(self, request: Request = _ABSENT, **_kwargs: object) -> None:
        try:
            task_id = request.id
            task_type = self._task_types.of(request.task)
            if fork.epoch() != self._epoch or not (
                task_type.unsampled or task_type.is_sampled(task_id)
            ):
                return
            task_state = self.task_states.get(task_id) or self.task_states.add(
                task_id, TaskState(task_type, _queue(request))
            )
            args = kwargs = None
            if self._args:
                args = snapshot(request.args) if request.args else _NO_ARGS
                kwargs = snapshot(request.kwargs) if request.kwargs else _NO_KWARGS
            parent, root = request.parent_id, request.root_id
            self._put(
                (self._received, self._clock(), task_id, task_state, args, kwargs, parent, root)
            )
        except Exception as error:
            if not should_suppress(self._on_received, error):
                raise

    def _on_prerun(self, task_id: str = "", task: Task = _ABSENT, **_kwargs: object) -> None:
        try:
            task_state = self._task_state(task_id, task)
            if task_state is not None:
                task_state.started_at = perf_counter()
                self._put((self._started, self._clock(), task_id, task_state))
        except Exception as error:
            if not should_suppress(self._on_prerun, error):
                raise

    def _on_postrun(
        self,
        task_id: str = "",
        task: Task = _ABSENT,
        retval: object = None,
        state: str | None = None,
        **_kwargs: object,
    ) -> None:
        # This handler captures success, because the signal task_success has no task id. A failure
        # has its own signal. If gevent killed the task, state is None.
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
            if not should_suppress(self._on_postrun, error):
                raise

    @safe_boundary
    def _on_failure(
        self,
        sender: Task = _ABSENT,
        task_id: str = "",
        exception: BaseException | None = None,
        einfo: object = None,
        **_kwargs: object,
    ) -> None:
        task_state = self._task_state(task_id, sender)
        if task_state is not None:
            own = {
                "exception": type(exception).__name__,
                "exception_message": snapshot(_text(exception)),
            }
            text = getattr(einfo, "traceback", None)
            if isinstance(text, str):
                own["traceback"] = text[:CAPTURED_TRACEBACK_CHARS]
            self._end(FAILED, task_id, task_state, own)

    @safe_boundary
    def _on_retry(
        self,
        sender: Task = _ABSENT,
        request: Request = _ABSENT,
        reason: object = None,
        **_kwargs: object,
    ) -> None:
        task_state = self._task_state(request.id, sender)
        if task_state is not None:
            retries = int(getattr(request, "retries", 0) or 0) + 1
            own = {"reason": snapshot(_text(reason)), "retry_count": retries}
            self._put((self._generic, self._clock(), request.id, task_state, RETRIED, own, None))

    @safe_boundary
    def _on_revoked(
        self,
        sender: Task = _ABSENT,
        request: Request = _ABSENT,
        terminated: object = None,
        signum: object = None,
        expired: object = None,
        **_kwargs: object,
    ) -> None:
        task_state = self._task_state(request.id, sender)
        if task_state is not None:
            number = int(signum) if isinstance(signum, int) else None
            own = {"terminated": bool(terminated), "signum": number, "expired": bool(expired)}
            self._end(REVOKED, request.id, task_state, own)

    @safe_boundary
    def _on_rejected(self, message: object = None, exc: object = None, **_kwargs: object) -> None:
        headers = getattr(message, "headers", None) or {}
        self._reject(
            str(headers.get("id") or ""),
            str(headers.get("task") or "unknown"),
            snapshot(_text(exc)),
        )

    @safe_boundary
    def _on_unknown(
        self,
        name: object = None,
        id: object = None,  # noqa: A002 - the signal's keyword
        **_kwargs: object,
    ) -> None:
        self._reject(str(id or ""), str(name or "unknown"), "not registered with this worker")

    def _reject(self, task_id: str, name: str, reason: str) -> None:
        if fork.epoch() == self._epoch:
            own = {"worker": self.worker, "task_name": name, "reason": reason}
            self._put((self._encode, REJECTED, self._clock(), task_id, {}, own))

    def _task_state(self, task_id: str, task: Task) -> TaskState | None:
        """Return the state of a task, or ``None`` if the task is not reported.

        A task that was received before the capture started gets its state here.
        """
        if fork.epoch() != self._epoch:
            return None
        task_state = self.task_states.get(task_id)
        if task_state is not None:
            return task_state
        task_type = self._task_types.of(task)
        if not task_type.is_sampled(task_id):
            return None
        queue = _queue(getattr(task, "request", None))
        return self.task_states.add(task_id, TaskState(task_type, queue))

    def _end(self, event: str, task_id: str, task_state: TaskState, own: dict[str, Any]) -> None:
        self._put((self._generic, self._clock(), task_id, task_state, event, own, perf_counter()))
        self.task_states.end(task_id)


class ParentCapture(CeleryCapture):
    """The signal handlers of a prefork worker's parent process.

    They capture the arrival of a task with its real arguments, and rejected messages. Everything
    else comes as events from the broker, which take their timestamps from the same task states.
    """

    signals = ("task_received", "task_rejected", "task_unknown")

    def _wrapped(self, put: Put, encoder: TaskEncoder, /) -> Put:
        def put_stamped(record: Captured) -> None:
            put(encoder.stamped_now(record))

        return put_stamped


class EagerCapture(CeleryCapture):
    """Captures the tasks that a process outside a worker runs itself.

    The process runs a task itself if ``apply()`` or the setting ``task_always_eager`` is used.
    """

    signals = ("task_prerun", "task_postrun", "task_failure", "task_retry")

    def _task_state(self, task_id: str, task: Task) -> TaskState | None:
        eager = getattr(getattr(task, "request", None), "is_eager", False)
        return super()._task_state(task_id, task) if eager else None


def runs_in_process(consumer: Consumer | None) -> bool:
    """Whether a worker runs its tasks in its own process, where the tasks' signals then fire.

    The function examines the running pool, because ``conf.worker_pool`` does not reflect the
    option ``-P``.
    """
    pool = getattr(consumer, "pool", None)
    return pool is not None and not any(
        base.__module__ == "celery.concurrency.prefork" for base in type(pool).__mro__
    )


def _queue(request: object) -> str | None:
    info = getattr(request, "delivery_info", None)
    name = info.get("routing_key") if isinstance(info, dict) else None
    return str(name) if name else None


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__} whose text fails>"
