"""The boundary between the host and us: nothing of ours that fails may fail the host's call."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("z4j.runtime.safety")

#: Exceptions that are no errors: hosts raise them from a signal handler, in whatever code runs just then, ours included.
_ORDERS = {
    "billiard.exceptions.SoftTimeLimitExceeded",
    "huey.exceptions.TaskTimeout",
    "rq.exceptions.StopRequested",
    "rq.timeouts.BaseTimeoutException",
}

#: Attributes that ``logging`` refuses in ``extra`` because every record has them already.
_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def safe_call(func: Callable[..., R], *args: Any, **kwargs: Any) -> R | None:
    """Call ``func`` and return its result, or ``None`` after logging an ordinary exception.

    Only ``Exception`` is held back. ``SystemExit``, ``KeyboardInterrupt``, ``GreenletExit``, ``gevent.Timeout`` and
    ``eventlet.Timeout`` pass: a user's time-out may fire inside a signal handler of ours, and it is the user's. So do the
    time limits of Celery, RQ and huey and RQ's request to stop, although they are an ``Exception``.
    """
    try:
        return func(*args, **kwargs)
    except Exception as error:
        if not excused(func, error):
            raise
        return None


def excused(func: Callable[..., Any], error: Exception) -> bool:
    """Log what ``func`` failed of, unless a host has raised it to be obeyed: then say no, and the caller raises it on.

    For a handler on the hot path that has a ``try`` of its own, which costs nothing; :func:`safe_boundary` costs a call.
    """
    if _is_order(error):
        return False
    _report(func, error)
    return True


def safe_boundary(func: Callable[P, R]) -> Callable[P, R | None]:
    """Decorate ``func`` so that it behaves like :func:`safe_call`.

    The wrapper's own code takes ``**kwargs``: Celery's ``Signal.connect`` reads the code flags, not the signature.
    """

    @wraps(func)
    def boundary(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if not excused(func, error):
                raise
            return None

    return boundary


def safe_log_extra(extra: dict[str, Any]) -> dict[str, Any]:
    """Copy ``extra`` with ``user_`` in front of every key that ``logging`` reserves."""
    return {f"user_{key}" if key in _RESERVED else key: value for key, value in extra.items()}


def _is_order(error: Exception) -> bool:
    """Whether a host has raised it to be obeyed. Told by names: nothing of a host's is imported here."""
    return not _ORDERS.isdisjoint(
        f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__
    )


def _report(func: Callable[..., Any], error: Exception) -> None:
    name = getattr(func, "__qualname__", repr(func))
    try:
        logger.error(
            "z4j: %s failed with %s; the host goes on", name, type(error).__name__, exc_info=error
        )
    except Exception:
        # Logging itself is broken; the type alone tells enough and can hold no secret.
        sys.stderr.write(f"z4j: {name} failed with {type(error).__name__}\n")
