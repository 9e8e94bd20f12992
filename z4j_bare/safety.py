"""Prevents errors of the agent from reaching the host."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("z4j.runtime.safety")

#: Exceptions by which a host interrupts running code.
#: The host raises them in a signal handler, so they may interrupt the agent's code.
_CONTROL_FLOW_EXCEPTIONS = {
    "billiard.exceptions.SoftTimeLimitExceeded",
    "huey.exceptions.TaskTimeout",
    "rq.exceptions.StopRequested",
    "rq.timeouts.BaseTimeoutException",
}

#: Names of a log record's attributes. ``logging`` rejects these names as keys of ``extra``.
_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def safe_call(func: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
    """Call ``func`` and return its result. If it raises, log the exception and return ``None``.

    Exceptions that the host or a user raises on purpose are not suppressed:

    - exceptions that are not an ``Exception``: ``SystemExit``, ``KeyboardInterrupt``,
      ``GreenletExit``, ``gevent.Timeout`` and ``eventlet.Timeout``. A user's timeout may expire
      inside the call.
    - the exceptions of the time limits of Celery, RQ and huey, and RQ's ``StopRequested``.
    """
    try:
        return func(*args, **kwargs)
    except Exception as error:
        if not should_suppress(func, error):
            raise
        return None


def should_suppress(func: Callable[..., object], error: Exception) -> bool:
    """Log the ``error`` of ``func`` and return ``True``; return ``False`` if it must be re-raised.

    Functions on the hot path call this function in an ``except`` clause, because
    :func:`safe_boundary` would add a function call.
    """
    if is_control_flow(error):
        return False
    _report(func, error)
    return True


def safe_boundary(func: Callable[P, R]) -> Callable[P, R | None]:
    """Decorate ``func`` so that it handles exceptions as :func:`safe_call` does.

    Celery's ``Signal.connect`` accepts only functions with ``**kwargs``. It checks the flags of the
    code object, not the signature. Therefore the wrapper itself declares ``**kwargs``.
    """

    @wraps(func)
    def boundary(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if not should_suppress(func, error):
                raise
            return None

    return boundary


def safe_log_extra(extra: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of ``extra`` with ``user_`` before every key that ``logging`` reserves."""
    return {f"user_{key}" if key in _RESERVED else key: value for key, value in extra.items()}


def is_control_flow(error: Exception) -> bool:
    """Whether a host or a user raised ``error`` on purpose; see :func:`safe_call`."""
    # The classes are compared by name, so that no host library is imported.
    return not _CONTROL_FLOW_EXCEPTIONS.isdisjoint(
        f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__
    )


def _report(func: Callable[..., object], error: Exception) -> None:
    name = getattr(func, "__qualname__", repr(func))
    try:
        logger.error(
            "z4j: %s failed with %s; the host is not affected",
            name,
            type(error).__name__,
            exc_info=error,
        )
    except Exception:
        # Logging failed. Only the type is written, because the message may contain a secret.
        sys.stderr.write(f"z4j: {name} failed with {type(error).__name__}\n")
