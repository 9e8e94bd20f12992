"""A dead loop is restarted and counted; a silent one is how a customer loses data for days (posthog-python #865)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import InterpreterShutdownError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.concurrency.base import Task
    from z4j_bare.monitoring.metrics import Counters

logger = logging.getLogger("z4j.runtime.watch")

#: Seconds before a loop that died runs again: first, and at most.
FIRST = 1.0
LONGEST = 60.0


def keep(
    run: Callable[[Any], None],
    name: str,
    stop_event: Any,
    backend: BaseConcurrency,
    counters: Counters,
) -> Task:
    """Spawn ``run(stop_event)`` under ``name`` and run it again whenever it dies; return the task."""
    return backend.spawn(_keep, run, name, stop_event, backend, counters, name=name)


def _keep(
    run: Callable[[Any], None],
    name: str,
    stop_event: Any,
    backend: BaseConcurrency,
    counters: Counters,
) -> None:
    delay = FIRST
    while not stop_event.is_set():
        began = backend.now()
        try:
            run(stop_event)
        except InterpreterShutdownError:
            return
        except Exception:
            delay = FIRST if backend.now() - began > LONGEST else delay
            counters.restarts[name] += 1
            logger.exception(
                "z4j: loop %s died and runs again in %.0f s; please report it", name, delay
            )
            backend.wait(stop_event, delay)
            delay = min(delay * 2, LONGEST)
