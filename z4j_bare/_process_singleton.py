"""Keeps one runtime per process: the first runtime that is installed."""

from __future__ import annotations

import logging
import threading
from typing import Any, TypeVar

from z4j_bare.process import is_importing_application

R = TypeVar("R")

logger = logging.getLogger("z4j.runtime._process_singleton")

_lock = threading.Lock()
_runtime: Any = None
_owner: str | None = None


def try_register(runtime: R, *, owner: str) -> R:
    """Register ``runtime`` if none is registered; return the registered runtime.

    A stopped runtime is replaced, because a web server that was shut down may install the agent
    again. While a z4j-bare command imports an application, ``runtime`` is returned without being
    registered.

    :param owner: the name of the installer, such as ``install_agent``, for log lines.
    """
    global _runtime, _owner
    if is_importing_application():
        return runtime
    with _lock:
        if _runtime is None or _runtime is runtime or _is_free(_runtime):
            _runtime, _owner = runtime, owner
            return runtime
        holder: R = _runtime
        holder_owner = _owner
    logger.info(
        "z4j: %s requested an agent, but %s already installed one in this process; "
        "keeping the installed agent",
        owner,
        holder_owner,
    )
    return holder


def current_runtime() -> Any:
    """Return the registered ``AgentRuntime``, or ``None``."""
    return _runtime


def current_owner() -> str | None:
    """Return the name of the installer, such as ``install_agent``, or ``None``."""
    return _owner


def clear_runtime(expected: object = None) -> bool:
    """Remove the registered runtime and return whether one was removed.

    :param expected: if given, remove only this runtime.
    """
    global _runtime, _owner
    with _lock:
        if _runtime is None or (expected is not None and _runtime is not expected):
            return False
        _runtime = _owner = None
        return True


def post_fork() -> Any:
    """Restart the agent in a forked server process and return the runtime. Never raises.

    Call this function in gunicorn's ``post_fork`` or uWSGI's ``@postfork`` hook. A child of a
    Celery prefork worker must not call it, because the parent reports the child's tasks.
    """
    runtime = _runtime
    if runtime is not None:
        try:
            runtime.reinit_after_fork()
        except Exception:
            logger.warning(
                "z4j: could not restart the agent after a fork; this process reports nothing until "
                "it is restarted",
                exc_info=True,
            )
    return runtime


def _is_free(runtime: object) -> bool:
    return bool(getattr(runtime, "has_stopped", False))
