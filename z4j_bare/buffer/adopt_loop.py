"""What a killed worker could not send: its store is adopted as soon as another one runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.errors import BUSY, CORRUPT, classify
from z4j_bare.buffer.recovery import DONE, MOVED, Orphan, orphans
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from pathlib import Path

    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.adopt")

#: Seconds before each look for orphans: at once, then a few times soon, because a worker is often restarted while its
#: predecessor is still dying, then every minute.
FIRST_SCAN_DELAYS = (0.0, 2.0, 5.0, 15.0, 30.0)
SCAN_INTERVAL = 60.0

#: Seconds between two steps while the heir has enough to do; rows come in as the brain takes them off us.
BACKPRESSURE_DELAY = 0.2

#: Seconds for which a file that we may not have, or cannot use, is left alone.
SKIP_SECONDS = 600.0

#: How often a step that failed is tried again, and after how many seconds.
MAX_RETRIES = 20
RETRY_DELAY = 30.0


class AdoptLoop:
    """Moves orphaned rows into our own store, one file at a time.

    :param claim: makes an :class:`Orphan` of a path; runs off the hub.
    :param stored: called after each step, to wake the sender.
    """

    def __init__(
        self,
        buffer_path: str,
        claim: Callable[[Path], Orphan],
        buffer: BufferManager,
        backend: BaseConcurrency,
        stored: Callable[[], None],
    ) -> None:
        self._buffer_path = buffer_path
        self._claim = claim
        self._buffer = buffer
        self._backend = backend
        self._stored = stored
        self._skip_until: dict[Path, float] = {}

    def run(self, stop_event: Any) -> None:
        """Adopt until ``stop_event`` (an ``IEvent``) is set."""
        for delay in chain(FIRST_SCAN_DELAYS, repeat(SCAN_INTERVAL)):
            if self._backend.wait(stop_event, delay):
                return
            self._scan(stop_event)

    def _scan(self, stop_event: Any) -> None:
        now = self._backend.now()
        self._skip_until = {path: until for path, until in self._skip_until.items() if until > now}
        ok, found = self._backend.offload(orphans, self._buffer_path, self._skip_until)
        if not ok:
            logger.debug("z4j: cannot look for buffers of dead processes: %s", found)
            return
        for path in found:
            if stop_event.is_set():
                return
            ok, orphan = self._backend.offload(self._claim, path)
            if ok:
                if orphan.corrupt:
                    logger.warning("z4j: %s was set aside: %s", path.name, orphan.corrupt)
                self._adopt(orphan, stop_event)
            else:
                self._skip(path, orphan)

    def _adopt(self, orphan: Orphan, stop_event: Any) -> None:
        failures = 0
        try:
            while not stop_event.is_set():
                self._buffer.orphan_rows = orphan.left()
                try:
                    ended = self._step(orphan, stop_event)
                except LocalStorageError as error:
                    # Letting it go would have the rows of the failed step moved again by whoever comes next.
                    failures += 1
                    ended = failures > MAX_RETRIES or self._quarantined(orphan, error)
                    if ended:
                        self._skip(orphan.path, error)
                    else:
                        self._backend.wait(stop_event, RETRY_DELAY)
                if ended:
                    return
        finally:
            self._buffer.orphan_rows = 0
            if not self._backend.forked():
                self._backend.offload(orphan.close)

    def _step(self, orphan: Orphan, stop_event: Any) -> bool:
        """Take one step, and the time that it asks for; return whether it was the last."""
        outcome = self._buffer.run_on_disk(orphan.step)
        if outcome == DONE:
            self._stored()
            if orphan.moved:
                logger.info(
                    "z4j: adopted %d rows of %s, whose process is dead",
                    orphan.moved,
                    orphan.path.name,
                )
            return True
        if outcome == MOVED:
            self._stored()
            self._backend.sleep(0)
        else:
            self._backend.wait(stop_event, BACKPRESSURE_DELAY)
        return False

    def _quarantined(self, orphan: Orphan, error: LocalStorageError) -> bool:
        try:
            return classify(error) == CORRUPT and bool(
                self._buffer.run_on_disk(orphan.quarantine_if_corrupt)
            )
        except LocalStorageError:
            return False

    def _skip(self, path: Path, error: BaseException) -> None:
        cause = classify(error) if isinstance(error, LocalStorageError) else ""
        if cause == BUSY:  # its owner lives, or another heir was faster
            return
        self._skip_until[path] = self._backend.now() + SKIP_SECONDS
        level = logging.WARNING if cause == CORRUPT else logging.DEBUG
        logger.log(level, "z4j: %s is not adopted: %s", path.name, error)
