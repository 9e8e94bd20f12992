"""Time slices. A long computation on a hub yields after each slice, so that other tasks can run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from z4j_bare.concurrency.base import BaseConcurrency

#: Maximum seconds that an agent's task computes on a hub before it yields to the host's tasks.
SLICE_SECONDS = 0.002

#: Seconds that a yield sleeps under gevent.
#: Not 0: during fifty calls of ``gevent.sleep(0)``, gevent may process neither timers nor sockets.
YIELD_SECONDS = 1e-5


class TimeSlice:
    """The current time slice of one task.

    Call :meth:`checkpoint` often during a long computation.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._started_at = time.perf_counter()

    def restart(self) -> None:
        """Start a new slice without a yield. Called after the task has waited for something."""
        self._started_at = time.perf_counter()

    def checkpoint(self) -> None:
        """Yield to other tasks and start a new slice, if the current slice is used up."""
        if time.perf_counter() - self._started_at > SLICE_SECONDS:
            self._backend.sleep(0)
            self._started_at = time.perf_counter()
