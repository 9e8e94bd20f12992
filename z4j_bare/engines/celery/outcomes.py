"""Derives the kind and the fields of a run's last event from the arguments of Celery's signals.

The functions use no object of the agent. Therefore they also work in a child of a prefork worker.
"""

from __future__ import annotations

import sys
from traceback import format_exception
from typing import Any

from z4j_bare.engines.celery.task_state import FAILED, RETRIED, REVOKED, RunKey
from z4j_bare.events.snapshot import class_name, snapshot

#: Maximum characters of a traceback that are captured. The encoder sends the first 4,096.
CAPTURED_TRACEBACK_CHARS = 5120

#: The states of ``task_postrun`` for a run that raised ``Ignore`` or ``Reject``. No other signal in
#: the run's process reports the end of such a run.
IGNORED, REJECTED_STATE = "IGNORED", "REJECTED"

#: The key of a run that is neither a retry nor a replacement.
FIRST_RUN: RunKey = (0, 0)

#: Name of the attribute that marks an exception as reported. Its value is the task's id.
_REPORTED = "_z4j_reported"

#: Maximum number of exceptions that :func:`is_reported` examines in a chain of ``__context__``.
_MAX_CONTEXT = 20


def failure_fields(exception: object, traceback: object) -> dict[str, Any]:
    """Return the fields of ``task.failed``: the exception's class, message and traceback.

    :param traceback: the text of the traceback. For any other type, the traceback of ``exception``
        is formatted.
    """
    name, reason = _short_name(type(exception)), exception
    if is_reject(exception):
        reason = getattr(exception, "reason", None)
    elif name == "UnpickleableExceptionWrapper":
        # Celery replaces an exception that cannot be pickled.
        # The replacement has the original's class name and arguments.
        name = str(getattr(exception, "exc_cls_name", name))
        reason = BaseException(*getattr(exception, "exc_args", None) or ())
    fields = {"exception": name, "exception_message": snapshot(text_of(reason))}
    if not isinstance(traceback, str):
        traceback = _formatted(exception)
    if isinstance(traceback, str):
        fields["traceback"] = traceback[:CAPTURED_TRACEBACK_CHARS]
    return fields


def _formatted(exception: object) -> str | None:
    """Return the formatted traceback of ``exception``, or ``None`` if it has none."""
    try:
        if not isinstance(exception, BaseException) or exception.__traceback__ is None:
            return None
        return "".join(format_exception(exception))
    except Exception:  # the exception's class redefines __class__, __traceback__ or __cause__
        return None


def _short_name(kind: type) -> str:
    return class_name(kind).rpartition(".")[2]


def retry_fields(request: object, reason: object) -> dict[str, Any]:
    """Return the fields of ``task.retried`` for a run that called ``Task.retry``."""
    return {"reason": snapshot(text_of(reason)), "retry_count": run_key(request)[0] + 1}


def revoked_fields(terminated: object, signum: object, expired: object) -> dict[str, Any]:
    """Return the fields of ``task.revoked``."""
    number = int(signum) if isinstance(signum, int) else None
    return {"terminated": bool(terminated), "signum": number, "expired": bool(expired)}


def end_without_signal(
    state: str | None, raised: object, *, acks_late: bool
) -> tuple[str, dict[str, Any]] | None:
    """Return kind and fields of the last event of a run, if no other signal reports the run's end.

    Such a run raised ``Ignore``, ``Reject``, or an exception that is not an ``Exception``, such as
    ``SystemExit`` or ``gevent.Timeout``.
    Returns ``None`` if the task was replaced, if the run was killed, or for any other ``state``.

    :param state: ``state`` of the signal ``task_postrun``.
    :param raised: ``retval`` of the signal, which is the exception.
    :param acks_late: the task's ``acks_late``. If it is false, the message cannot return to the
        queue.
    """
    if state is None:
        error = sys.exc_info()[1]
        if error is None or isinstance(error, Exception) or is_kill(error):
            return None
        return FAILED, failure_fields(error, None)
    if state == IGNORED and not is_replacement(raised):
        return REVOKED, {**revoked_fields(False, None, False), "reason": "ignored"}
    if state == REJECTED_STATE and is_reject(raised):
        if not (acks_late and getattr(raised, "requeue", False)):
            return FAILED, failure_fields(raised, None)
        reason = text_of(getattr(raised, "reason", None))
        return RETRIED, {"reason": snapshot(f"rejected, and back to its queue: {reason}")}
    return None


def is_kill(error: BaseException) -> bool:
    """Whether ``error`` is the ``GreenletExit`` that ends a killed greenlet.

    A killed greenlet needs no event, because ``task_revoked`` reports a task that an operator
    terminates.
    """
    return any(base.__name__ == "GreenletExit" for base in type(error).__mro__)


def is_reject(error: object) -> bool:
    """Whether ``error`` is Celery's ``Reject``.

    Celery 5.7 sends both ``task_failure`` and ``task_postrun`` for a run that raised ``Reject``.
    Earlier versions send only ``task_postrun``.
    """
    from celery.exceptions import Reject

    # isinstance() would read error.__class__, which the exception's class may redefine.
    return issubclass(type(error), Reject)


def is_retry(error: object) -> bool:
    """Whether ``error`` is Celery's ``Retry``."""
    from celery.exceptions import Retry

    return issubclass(type(error), Retry)


def run_key(request: object) -> RunKey:
    """Return the key that identifies a run among the runs of its task.

    :param request: Celery's ``Context``, or the request as a dictionary.
    """
    if isinstance(request, dict):
        retries, nesting = request.get("retries"), request.get("replaced_task_nesting")
    else:
        retries = getattr(request, "retries", 0)
        nesting = getattr(request, "replaced_task_nesting", 0)
    return int(retries or 0), int(nesting or 0)


def is_replacement(ignore: object) -> bool:
    """Whether ``self.replace()`` raised ``ignore``. If so, the task continues under the same id."""
    from celery.app.task import Task

    step = _read(ignore, "__traceback__")
    while step is not None:
        if step.tb_frame.f_code is Task.replace.__code__:
            return True
        step = step.tb_next
    return False


def result_is_unstored() -> bool:
    """Whether the result backend failed to store the result of a run that succeeded.

    In this case Celery first sends ``task_postrun`` with the state ``SUCCESS``, while the error
    propagates. Then Celery sends ``task_internal_error``. The handler of ``task_postrun`` calls
    this function.
    """
    error = sys.exc_info()[1]
    if not isinstance(error, Exception) or is_reject(error) or error.__traceback__ is None:
        return False
    frame = sys._getframe(1)  # noqa: SLF001 - no public equivalent
    while frame is not None and frame.f_code.co_name != "trace_task":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is error.__traceback__.tb_frame


def mark_reported(error: BaseException | None, task_id: str) -> None:
    """Mark ``error`` as reported for task ``task_id``; see :func:`is_reported`."""
    try:
        setattr(error, _REPORTED, task_id)
    except Exception:
        pass


def is_reported(error: BaseException | None, task_id: str) -> bool:
    """Whether ``error``, or an exception in its chain of ``__context__``, is marked as reported.

    Celery can send two signals for one failure. After ``task_internal_error``, Celery tries to
    store the failure. It then sends ``task_failure``, or ``task_internal_error`` again if storing
    fails. The mark is an attribute of the exception, so the agent need not store the ids of ended
    tasks.
    """
    for _ in range(_MAX_CONTEXT):
        if error is None:
            break
        if _read(error, _REPORTED) == task_id:
            return True
        error = _read(error, "__context__")
    return False


def _read(error: object, name: str) -> Any:
    """Return an attribute; ``None`` if it is missing, or if code of the class fails to read it."""
    try:
        return getattr(error, name, None)
    except Exception:
        return None


def text_of(value: object) -> str:
    """Return ``str(value)``, or a placeholder if ``str`` raises an exception."""
    try:
        return str(value)
    except Exception:
        return f"<{_short_name(type(value))} whose text fails>"
