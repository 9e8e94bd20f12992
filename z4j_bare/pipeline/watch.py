"""A dead loop is restarted and counted; a silent one is how a customer loses data for days (posthog-python #865)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import NoMoreThreadsError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.concurrency.base import Task
    from z4j_bare.monitoring.counters import Counters

logger = logging.getLogger("z4j.runtime.watch")

#: Seconds before a loop that died runs again: first, and at most.
FIRST = 1.0
LONGEST = 60.0


def keep(
    run: Callable[[Any], None], name: str, stopping: Any, seam: BaseConcurrency, counters: Counters
) -> Task:
    """Spawn ``run(stopping)`` under ``name`` and run it again whenever it dies; return the task."""
    return seam.spawn(_keep, run, name, stopping, seam, counters, name=name)


def _keep(run: Callable[[Any], None], name: str, stopping: Any, seam: BaseConcurrency, counters: Counters) -> None:
    delay = FIRST
    while not stopping.is_set():
        began = seam.now()
        try:
            run(stopping)
        except NoMoreThreadsError:
            return
        except Exception:
            delay = FIRST if seam.now() - began > LONGEST else delay
            counters.restarts[name] += 1
            logger.exception("z4j: loop %s died and runs again in %.0f s; please report it", name, delay)
            seam.pause(stopping, delay)
            delay = min(delay * 2, LONGEST)
