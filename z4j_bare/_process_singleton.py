"""One runtime per process: adapters and users may each try to install one, and the first wins."""

from __future__ import annotations

import logging
import threading
from typing import Any

from z4j_bare.process import is_importing_application

logger = logging.getLogger("z4j.runtime.singleton")

_lock = threading.Lock()
_runtime: Any = None
_owner: str | None = None


def try_register(runtime: Any, *, owner: str) -> Any:
    """Claim the process for ``runtime`` and return the runtime that has it.

    A runtime that has been stopped is no claim: after a web server's shutdown its slot is free for the next one. Nor is
    that of an application which a command of ours imports: it gets its runtime back, and the process stays free.
    """
    global _runtime, _owner
    if is_importing_application():
        return runtime
    with _lock:
        if _runtime is None or _runtime is runtime or _is_free(_runtime):
            _runtime, _owner = runtime, owner
            return runtime
        holder, holder_owner = _runtime, _owner
    logger.info(
        "z4j: %s asked for an agent, but %s has installed one in this process; that one stays",
        owner,
        holder_owner,
    )
    return holder


def current_runtime() -> Any:
    """Return the runtime that has the process, or ``None``."""
    return _runtime


def current_owner() -> str | None:
    """Return who registered it, such as ``install_agent``."""
    return _owner


def clear_runtime(expected: Any = None) -> bool:
    """Free the slot; with ``expected`` only if that runtime has it. Return whether anything was freed."""
    global _runtime, _owner
    with _lock:
        if _runtime is None or (expected is not None and _runtime is not expected):
            return False
        _runtime = _owner = None
        return True


def post_fork() -> Any:
    """Restart the agent in a forked server process (gunicorn's ``post_fork``, uWSGI's ``@postfork``) and return it.

    Not for Celery's prefork children: the parent reports for them.
    """
    runtime = _runtime
    if runtime is not None:
        try:
            runtime.reinit_after_fork()
        except Exception:
            logger.warning("z4j: the agent could not be restarted after fork", exc_info=True)
    return runtime


def _is_free(runtime: Any) -> bool:
    return bool(getattr(runtime, "has_stopped", False))
