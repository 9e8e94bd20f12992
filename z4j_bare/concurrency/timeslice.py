"""Long work on a hub, in slices (design, rule 5)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

#: Seconds of CPU on the host's only thread before the others get their turn.
SLICE = 0.002


class TimeSlice:
    """Call it often: it yields whenever a slice is over."""

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._began = time.perf_counter()

    def rested(self) -> None:
        """Begin a slice: the others have just had their turn."""
        self._began = time.perf_counter()

    def __call__(self) -> None:
        """Yield if the slice is over."""
        if time.perf_counter() - self._began > SLICE:
            self._backend.sleep(0)
            self._began = time.perf_counter()
