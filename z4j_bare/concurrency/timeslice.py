"""Time slices: long work on a hub yields after each slice, so that other tasks can run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from z4j_bare.concurrency.base import BaseConcurrency

#: Maximum seconds that the agent works on a hub before it yields. The host's tasks run in the same
#: thread as the hub.
SLICE_SECONDS = 0.002

#: Seconds that a yield sleeps under gevent. The value is not 0, because gevent may process neither
#: timers nor sockets during up to fifty consecutive calls of ``gevent.sleep(0)``.
YIELD_SECONDS = 1e-5


class TimeSlice:
    """The current slice of one task.

    Call :meth:`checkpoint` often: it yields when the slice is used up.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._started_at = time.perf_counter()

    def restart(self) -> None:
        """Start a new slice without a yield, because the task has just waited for something."""
        self._started_at = time.perf_counter()

    def checkpoint(self) -> None:
        """Yield to other tasks and start a new slice if this one is used up."""
        if time.perf_counter() - self._started_at > SLICE_SECONDS:
            self._backend.sleep(0)
            self._started_at = time.perf_counter()
