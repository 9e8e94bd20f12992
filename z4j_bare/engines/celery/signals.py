"""Captures task events with handlers of the Celery signals that fire in this process.

With the pools gevent, eventlet, threads and solo, all task signals fire in the worker's process. A
handler copies a few values, appends a record to the ring and returns. Events are not read from the
broker, because this would take 30 % of the CPU time of a loaded worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from sys import exc_info
from threading import get_ident
from time import perf_counter, time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from z4j_bare.concurrency import fork
from z4j_bare.engines.celery.kept_runs import KeptRuns
from z4j_bare.engines.celery.masks import carry_over
from z4j_bare.engines.celery.outcomes import (
    IGNORED,
    REJECTED_STATE,
    end_without_signal,
    failure_fields,
    is_reject,
    is_reported,
    is_retry,
    mark_reported,
    result_is_unstored,
    retry_fields,
    revoked_fields,
    run_key,
    text_of,
)
from z4j_bare.engines.celery.queue_names import routing_key
from z4j_bare.engines.celery.repeated_runs import RepeatedRuns
from z4j_bare.engines.celery.task_state import (
    FAILED,
    REJECTED,
    RETRIED,
    REVOKED,
    TaskState,
    TaskStates,
    TaskTypes,
)
from z4j_bare.events.losses import LossLog
from z4j_bare.events.ring import Captured, Put
from z4j_bare.events.snapshot import snapshot
from z4j_bare.interfaces import RUN_SUCCEEDED
from z4j_bare.safety import is_control_flow

if TYPE_CHECKING:
    from celery.app.task import Task
    from celery.utils.dispatch import Signal
    from celery.worker.request import Request


#: The recorded ``args`` and ``kwargs`` of tasks without arguments. All such tasks share the two
#: objects, so the garbage collector visits fewer objects. No code modifies them.
_NO_ARGS: list[Any] = []
_NO_KWARGS: dict[str, Any] = {}

#: States of runs whose end only ``task_postrun`` reports.
#: The state is ``None`` if the task raised an exception that is not an ``Exception``.
_ENDS_WITHOUT_SIGNAL = frozenset({IGNORED, REJECTED_STATE, None})

#: Default of parameters for which Celery always passes an argument.
_ABSENT: Any = None

_HANDLERS = {
    "before_task_publish": "_on_publish",
    "task_received": "_on_received",
    "task_prerun": "_on_prerun",
    "task_postrun": "_on_postrun",
    "task_failure": "_on_failure",
    "task_internal_error": "_on_internal_error",
    "task_retry": "_on_retry",
    "task_revoked": "_on_revoked",
    "task_rejected": "_on_rejected",
    "task_unknown": "_on_unknown",
}


def _counted(handler: Callable[..., None]) -> Callable[..., None]:
    """Decorate a handler: count its error as a lost event, and keep the error away from Celery.

    The wrapper needs ``**kwargs``, because Celery's ``Signal.connect`` reads the flags of the
    wrapper's code object, not the signature that ``wraps`` copies.
    """

    @wraps(handler)
    def counted(self: SignalHandlers, *args: object, **kwargs: object) -> None:
        try:
            handler(self, *args, **kwargs)
        except Exception as error:
            task = kwargs.get("name") or getattr(kwargs.get("sender"), "name", None)
            if not self._suppresses(handler.__name__.removeprefix("_on_"), task, error):
                raise

    return counted


class RecordHeads(Protocol):
    """The first items of records, by kind.

    In a prefork child, the first item is a number. Elsewhere, the first item is the method of
    :class:`TaskEncoder` that encodes the record.
    """

    @property
    def received(self) -> object: ...  # noqa: D102
    @property
    def started(self) -> object: ...  # noqa: D102
    @property
    def succeeded(self) -> object: ...  # noqa: D102
    @property
    def generic(self) -> object: ...  # noqa: D102
    @property
    def rejected(self) -> object: ...  # noqa: D102


class BoundHeads(NamedTuple):
    """The attributes of a :class:`RecordHeads`, each read once."""

    received: object
    started: object
    succeeded: object
    generic: object
    rejected: object


class SignalHandlers:
    """The handlers of Celery's signals. Each makes a record from the signal's arguments.

    :param task_types: the types of the tasks, with their sampling rates.
    :param worker: the worker's name in the brain; ``None`` outside a worker.
    :param queue_of: returns the name of the queue for a request's ``delivery_info``.
    :param kept_runs: stores the open runs; if ``None``, they are not stored.
    :param on_loss: counts an event that could not be captured.
    :param context: returns the greenlet or thread that runs a task.
    """

    #: The signals to connect.
    signals: tuple[str, ...] = tuple(_HANDLERS)

    #: ``withholds`` of :class:`RepeatedRuns`.
    withholds = False

    def __init__(
        self,
        put: Put,
        heads: RecordHeads,
        task_types: TaskTypes,
        *,
        worker: str | None = None,
        args: bool = True,
        result: bool = True,
        clock: Callable[[], float] = time,
        queue_of: Callable[[object], str | None] = routing_key,
        kept_runs: KeptRuns | None = None,
        on_loss: Callable[[], object] = int,
        context: Callable[[], object] = get_ident,
    ) -> None:
        self._losses = LossLog(on_loss)
        self.worker = worker
        self.task_states = TaskStates(context)
        self._args = args
        self._result = result
        self._clock = clock
        self._queue_of = queue_of
        self._put = put
        self._kept_runs = kept_runs
        # Each method is read once, because reading it at each event would create another object.
        self._heads = BoundHeads(
            heads.received, heads.started, heads.succeeded, heads.generic, heads.rejected
        )
        self._task_types = task_types
        self._epoch = fork.epoch()
        self.repeated_runs = RepeatedRuns(
            self.task_states, self._put_rare, heads.generic, clock, withholds=self.withholds
        )
        self._connected: list[tuple[Signal, Callable[..., None]]] = []

    def connect(self) -> None:
        """Connect the handlers. A second call does nothing."""
        from celery import signals

        if self._connected:
            return
        for name in self.signals:
            signal, handler = getattr(signals, name), getattr(self, _HANDLERS[name])
            signal.connect(handler, weak=False)
            self._connected.append((signal, handler))

    def disconnect(self) -> None:
        """Disconnect the handlers. A second call does nothing."""
        while self._connected:
            signal, handler = self._connected.pop()
            signal.disconnect(handler)

    def _put_rare(self, record: Captured) -> None:
        """Put a record into the ring. If it reports the start or end of a run, store that as well.

        The handlers that run for every task do not use this method, because a call costs time.
        """
        (self._put if self._kept_runs is None else self._kept_runs.put)(record)

    # The next three handlers run for every task. They do not use _counted, to save one call.

    def _on_received(self, request: Request = _ABSENT, **_kwargs: object) -> None:
        try:
            task_id = request.id
            if task_id.__class__ is not str:
                task_id = str(task_id)
            task_type = self._task_types.of(request.task)
            if fork.epoch() != self._epoch or not (
                task_type.unsampled or task_type.is_sampled(task_id)
            ):
                return
            task_state = self.task_states.get(task_id)
            now = self._clock()
            if task_state is None:
                task_state = self.task_states.add(
                    task_id, TaskState(task_type, self._queue_of(request.delivery_info))
                )
                message = request.request_dict
                if message.get("retries") or message.get("replaced_task_nesting"):
                    task_state.mark_repeated(now)
            else:
                task_state = self.repeated_runs.received(
                    task_id, task_state, task_type, self._queue_of(request.delivery_info), request
                )
                if task_state is None:
                    return
            args = kwargs = texts = None
            if self._args:
                args, kwargs = request.args, request.kwargs
                if args or kwargs:
                    texts = request.argsrepr, request.kwargsrepr
                args = snapshot(args) if args else _NO_ARGS
                kwargs = snapshot(kwargs) if kwargs else _NO_KWARGS
            parent, root = request.parent_id, request.root_id
            self._put(
                (self._heads.received, now, task_id, task_state, args, kwargs, parent, root, texts)
            )
        except Exception as error:
            if not self._suppresses("task_received", getattr(request, "name", None), error):
                raise

    def _on_prerun(self, task_id: str = "", task: Task = _ABSENT, **_kwargs: object) -> None:
        try:
            if task_id.__class__ is not str:
                task_id = str(task_id)
            task_state = self._task_state(task_id, task)
            if task_state is not None:
                now = self._clock()
                record = (self._heads.started, now, task_id, task_state)
                if task_state.attempt is None:
                    task_state.started_at = perf_counter()
                    task_state.context = self.task_states.context()
                    self._put(record)
                    kept = self._kept_runs
                    if kept is not None:
                        # These lines do the work of KeptRuns.start without the cost of a call.
                        if task_state.slot:
                            kept.end(task_state, "", now)
                        number = task_state.task_type.descriptions.get(task_state.queue)
                        if number is None:
                            number = kept.describe(task_state)
                        flags = kept.late_flags(task) if task.acks_late else 0
                        task_state.slot = kept.runs.start(number, task_id, now, flags)
                else:
                    self.repeated_runs.started(record, task.request)
        except Exception as error:
            if not self._suppresses("task_prerun", getattr(task, "name", None), error):
                raise

    def _on_postrun(
        self,
        task_id: str = "",
        task: Task = _ABSENT,
        retval: object = None,
        state: str | None = None,
        **_kwargs: object,
    ) -> None:
        # This handler captures success, because the signal task_success has no task id.
        # A failure has its own signal.
        if state != "SUCCESS":
            if state in _ENDS_WITHOUT_SIGNAL:
                self._on_end_without_signal(task_id, task, retval, state)
            return
        try:
            if exc_info()[1] is not None and result_is_unstored():
                return
            if task_id.__class__ is not str:
                task_id = str(task_id)
            task_state = self._task_state(task_id, task)
            if task_state is not None:
                if task_state.attempt is None:
                    self.task_states.pop(task_id, None)
                else:
                    task_state = self.repeated_runs.ended(task_id, task_state, task.request)
                result = snapshot(retval) if self._result else None
                now = self._clock()
                self._put(
                    (
                        self._heads.succeeded,
                        now,
                        task_id,
                        task_state,
                        perf_counter(),
                        self._result,
                        result,
                    )
                )
                if task_state.slot and self._kept_runs is not None:
                    self._kept_runs.runs.end(task_state.slot, RUN_SUCCEEDED, now)
        except Exception as error:
            if not self._suppresses("task_postrun", getattr(task, "name", None), error):
                raise

    @_counted
    def _on_end_without_signal(
        self, task_id: object, task: Task, raised: object, state: str | None
    ) -> None:
        task_id = str(task_id)
        task_state = self._task_state(task_id, task)
        if task_state is None:
            return
        end = end_without_signal(state, raised, acks_late=bool(task.acks_late))
        if end is not None and end[0] == RETRIED:
            self.repeated_runs.requeued(task_id, task_state, task.request, end[1])
        elif end is not None:
            self._end(end[0], task_id, task_state, task.request, end[1])
        elif state == IGNORED:
            self._replaced(task_id, task_state, task)
        elif state is None and self._kept_runs is not None:
            # The task's greenlet was killed. Celery acknowledges the task's message as if the task
            # had succeeded. At a cold stop, Celery sends no signal about the run's end.
            task_state = self.task_states.of_run(task_state, run_key(task.request))
            self._kept_runs.runs.acknowledged(task_state.slot)

    def _replaced(self, task_id: str, task_state: TaskState, task: Task) -> None:
        """End a run whose task was replaced. The replacement has the same task id."""
        task_state = self.repeated_runs.ended(task_id, task_state, task.request, keep=True)
        task_state.started_at = 0.0
        if self._kept_runs is not None:
            self._kept_runs.end(task_state, "", self._clock())

    @_counted
    def _on_failure(
        self,
        sender: Task = _ABSENT,
        task_id: object = "",
        exception: BaseException | None = None,
        einfo: object = None,
        **_kwargs: object,
    ) -> None:
        task_id = str(task_id)
        if is_reject(exception) or is_reported(exception, task_id):
            return
        task_state = self._task_state(task_id, sender)
        if task_state is not None:
            own = failure_fields(exception, getattr(einfo, "traceback", None))
            self._end(FAILED, task_id, task_state, sender.request, own)

    @_counted
    def _on_internal_error(
        self,
        sender: Task = _ABSENT,
        task_id: object = "",
        request: Mapping[str, object] | None = None,
        exception: BaseException | None = None,
        einfo: object = None,
        **_kwargs: object,
    ) -> None:
        # Celery sends this signal if the result backend or a handler of the task's class failed.
        # If eager tasks propagate their errors, every error causes this signal, and no retry runs.
        task_id = str(task_id)
        if is_reported(exception, task_id):
            return
        mark_reported(exception, task_id)
        task_state = self._task_state(task_id, sender)
        if task_state is not None:
            kind, own = FAILED, failure_fields(exception, getattr(einfo, "traceback", None))
            if is_retry(exception):
                kind, own = RETRIED, retry_fields(request, exception)
            self._end(kind, task_id, task_state, request, own)

    @_counted
    def _on_retry(
        self,
        sender: Task = _ABSENT,
        request: Request = _ABSENT,
        reason: object = None,
        **_kwargs: object,
    ) -> None:
        task_id = str(request.id)
        task_state = self._task_state(task_id, sender)
        if task_state is not None:
            now = self._clock()
            if task_state.attempt is not None:
                task_state = self.repeated_runs.ended(task_id, task_state, request, keep=True)
            own = retry_fields(request, reason)
            self._put_rare((self._heads.generic, now, task_id, task_state, RETRIED, own, None))
            task_state.started_at = 0.0
            self.repeated_runs.retried(task_id, task_state)

    @_counted
    def _on_revoked(
        self,
        sender: Task = _ABSENT,
        request: Request = _ABSENT,
        terminated: object = None,
        signum: object = None,
        expired: object = None,
        **_kwargs: object,
    ) -> None:
        task_id = str(request.id)
        task_state = self._task_state(task_id, sender)
        if task_state is not None:
            own = revoked_fields(terminated, signum, expired)
            self._end(REVOKED, task_id, task_state, request, own)

    @_counted
    def _on_publish(
        self, headers: dict[str, Any] | None = None, body: object = None, **_kwargs: object
    ) -> None:
        if headers:
            carry_over(headers, body)

    @_counted
    def _on_rejected(self, message: object = None, exc: object = None, **_kwargs: object) -> None:
        headers = getattr(message, "headers", None) or {}
        self._reject(
            str(headers.get("id") or ""),
            str(headers.get("task") or "unknown"),
            snapshot(text_of(exc)),
        )

    @_counted
    def _on_unknown(
        self,
        name: object = None,
        id: object = None,  # noqa: A002 - the signal's keyword
        **_kwargs: object,
    ) -> None:
        self._reject(str(id or ""), str(name or "unknown"), "not registered with this worker")

    def _suppresses(self, signal: str, task: object, error: Exception) -> bool:
        """Count and log a lost event.

        For a control-flow exception, do nothing and return ``False``.
        The caller must raise the exception.
        """
        if is_control_flow(error):
            return False
        self._losses.report(f"capturing {signal}", task or "unknown", error)
        return True

    def _reject(self, task_id: str, name: str, reason: str) -> None:
        if fork.epoch() == self._epoch:
            own = {"worker": self.worker, "task_name": name, "reason": reason}
            self._put((self._heads.rejected, REJECTED, self._clock(), task_id, {}, own))

    def _task_state(self, task_id: str, task: Task) -> TaskState | None:
        """Return the state of a task, or ``None`` if the task is not reported.

        Create the state of a task that was received before the capture started.
        """
        if fork.epoch() != self._epoch:
            return None
        task_state = self.task_states.get(task_id)
        if task_state is not None:
            return task_state
        task_type = self._task_types.of(task)
        if not task_type.is_sampled(task_id):
            return None
        queue = self._queue_of(task.request.delivery_info)
        return self.task_states.add(task_id, TaskState(task_type, queue))

    def _end(
        self, event: str, task_id: str, task_state: TaskState, request: object, own: dict[str, Any]
    ) -> None:
        task_state = self.repeated_runs.ended(task_id, task_state, request)
        record = (
            self._heads.generic,
            self._clock(),
            task_id,
            task_state,
            event,
            own,
            perf_counter(),
        )
        self._put_rare(record)
        self.repeated_runs.retried(task_id, task_state)
