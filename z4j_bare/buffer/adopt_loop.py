"""The loop on the hub that adopts the stores of dead processes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.errors import BUSY, CORRUPT, classify
from z4j_bare.buffer.existing_agent import (
    ExistingBuffer,
    NoEventsError,
    list_existing_buffers,
)
from z4j_bare.buffer.open_runs import OrphanRuns, orphaned_runs
from z4j_bare.buffer.recovery import DONE, MOVED, Orphan, orphans
from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.errors import LocalStorageError

if TYPE_CHECKING:
    from pathlib import Path

    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.buffer.opener import StoreOpener
    from z4j_bare.buffer.store import BufferStore
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.interfaces import IEvent

logger = logging.getLogger("z4j.runtime.buffer.adopt_loop")

#: Seconds to wait before each of the first scans.
#: The intervals are short, because a worker often starts while its predecessor is exiting.
FIRST_SCAN_DELAYS = (0.0, 2.0, 5.0, 15.0, 30.0)
#: Seconds to wait before each later scan.
SCAN_INTERVAL = 60.0

#: Seconds to wait before the next step while the target store is too full to adopt more rows.
BACKPRESSURE_DELAY = 0.2

#: Seconds for which a file that cannot be adopted is skipped.
SKIP_SECONDS = 600.0

#: Maximum number of consecutive retries for one file. A step that moves rows resets the count.
MAX_RETRIES = 20
#: Seconds to wait before a failed step is retried.
RETRY_DELAY = 30.0


#: A function that counts an event. Its arguments are the event's engine, kind and fields.
CountEvent = Callable[[str, str, dict[str, Any]], object]


class AdoptLoop:
    """Moves the rows of dead processes into this process's store, one file at a time.

    :param claim: claims the store at a path; runs on the native thread.
    :param on_stored: notifies the sender; called after each step that may have moved rows.
    :param claim_runs: locks the ``.runs`` file at a path; runs on the native thread.
    :param claim_existing: claims the existing agent's buffer at a path; runs on the native thread.
    :param on_reported: called for each event that reports a run of a dead process.
    """

    def __init__(
        self,
        buffer_path: str,
        claim: Callable[[Path], Orphan],
        buffer: BufferManager,
        backend: BaseConcurrency,
        on_stored: Callable[[], None],
        claim_runs: Callable[[Path], OrphanRuns] | None = None,
        claim_existing: Callable[[Path], ExistingBuffer] | None = None,
        on_reported: CountEvent | None = None,
    ) -> None:
        self._on_reported = on_reported
        self._buffer_path = buffer_path
        self._claim = claim
        self._buffer = buffer
        self._backend = backend
        self._on_stored = on_stored
        self._claim_runs = claim_runs
        self._claim_existing = claim_existing
        self._skip_until: dict[Path, float] = {}

    @classmethod
    def of_opener(
        cls,
        opener: StoreOpener,
        buffer: BufferManager,
        backend: BaseConcurrency,
        on_stored: Callable[[], None],
        on_reported: CountEvent | None = None,
    ) -> AdoptLoop:
        """Return a loop that claims stores with ``opener``."""
        return cls(
            opener.buffer_path,
            opener.claim,
            buffer,
            backend,
            on_stored,
            opener.claim_runs,
            opener.claim_existing,
            on_reported,
        )

    def run(self, stop_event: IEvent) -> None:
        """Scan for stores of dead processes and adopt them until ``stop_event`` is set."""
        for delay in chain(FIRST_SCAN_DELAYS, repeat(SCAN_INTERVAL)):
            if self._backend.wait(stop_event, delay):
                return
            self._scan(stop_event)
            if self._claim_existing is not None and not stop_event.is_set():
                self._adopt_existing(self._claim_existing, stop_event)
            if self._claim_runs is not None and not stop_event.is_set():
                self._report_runs(self._claim_runs)

    def _scan(self, stop_event: IEvent) -> None:
        now = self._backend.now()
        self._skip_until = {path: end for path, end in self._skip_until.items() if end > now}
        ok, result = self._backend.offload(orphans, self._buffer_path, self._skip_until)
        if not ok:
            logger.debug("z4j: cannot scan for buffers of dead processes: %s", result)
            return
        for path in result:
            if stop_event.is_set():
                return
            ok, orphan = self._backend.offload(self._claim, path)
            if ok:
                if orphan.quarantine_reason:
                    reason = orphan.quarantine_reason
                    logger.warning(
                        "z4j: the buffer %s is unreadable and was renamed: %s", path.name, reason
                    )
                self._adopt(orphan, stop_event)
            else:
                self._skip(path, orphan)

    def _adopt_existing(self, claim: Callable[[Path], ExistingBuffer], stop_event: IEvent) -> None:
        """Adopt the buffers left by the existing agent. Each buffer is logged once."""
        ok, found = self._backend.offload(list_existing_buffers, self._buffer_path)
        for path in found if ok else ():
            if path in self._skip_until or stop_event.is_set():
                continue
            ok, buffer = self._backend.offload(claim, path)
            if ok:
                logger.warning(
                    "z4j: the existing agent left unsent events in %s: sending them now", path
                )
                self._adopt(buffer, stop_event)
                if buffer.unreadable:
                    logger.warning(
                        "z4j: %d rows of %s cannot be read and stay in the file; "
                        "z4j-bare buffer drop deletes it",
                        buffer.unreadable,
                        path,
                    )
            elif isinstance(buffer, LocalStorageError) and classify(buffer) == BUSY:
                continue  # the process runs
            elif not isinstance(buffer, NoEventsError):
                logger.warning(
                    "z4j: the existing agent left the buffer %s, which this agent does not send: "
                    "%s; z4j-bare buffer list shows it, and z4j-bare buffer drop deletes it",
                    path,
                    buffer,
                )
            self._skip_until[path] = math.inf  # no retry: the remaining rows cannot be sent

    def _report_runs(self, claim: Callable[[Path], OrphanRuns]) -> None:
        """Report the runs that were open when their process died.

        All rows of the process must be adopted first, because an event that is sent after the
        report could contradict the report.
        """
        ok, found = self._backend.offload(orphaned_runs, self._buffer_path)
        for path in found if ok else ():
            if path in self._skip_until:
                continue
            ok, runs = self._backend.offload(claim, path)
            if ok:
                self._report(runs)
            else:
                self._skip(path, runs)

    def _report(self, runs: OrphanRuns) -> None:
        reported = False
        try:
            ok, events = self._backend.offload(runs.events)
            if not ok:
                raise events
            reported = not events or self._buffer.run_on_disk(partial(_append, events)) is not None
            if events and reported:
                self._on_stored()
                self._count(events)
                logger.info(
                    "z4j: reported the runs in %s, which were open when their process ended "
                    "(%d events)",
                    runs.path.name,
                    len(events),
                )
        except LocalStorageError as error:
            self._skip(runs.path, error)
        finally:
            if not self._backend.forked():
                self._backend.offload(partial(runs.release, delete=reported))

    def _count(self, events: list[bytes]) -> None:
        """Count events that this process created for the runs of a dead process."""
        if self._on_reported is None:
            return
        ok, parsed = self._backend.offload(lambda: [json.loads(event) for event in events])
        checkpoint = TimeSlice(self._backend).checkpoint
        for event in parsed if ok else ():
            self._on_reported(event["engine"], event["kind"], event["data"])
            checkpoint()

    def _adopt(self, orphan: Orphan | ExistingBuffer, stop_event: IEvent) -> None:
        failures = 0
        try:
            while not stop_event.is_set():
                self._buffer.orphan_rows = orphan.rows_left()
                try:
                    outcome = self._step(orphan, stop_event)
                    ended = outcome == DONE
                    if outcome == MOVED:
                        failures = 0
                except LocalStorageError as error:
                    # The orphan stays claimed between retries. After a release, another process
                    # could move the failed step's rows a second time.
                    failures += 1
                    ended = failures > MAX_RETRIES or self._quarantine(orphan, error)
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

    def _step(self, orphan: Orphan | ExistingBuffer, stop_event: IEvent) -> str | None:
        """Run one step, wait if the target store is too full, and return the outcome."""
        outcome = self._buffer.run_on_disk(orphan.step)
        if outcome == DONE:
            self._on_stored()
            if orphan.moved:
                logger.info(
                    "z4j: adopted %d rows from %s, the buffer of a dead process",
                    orphan.moved,
                    orphan.path.name,
                )
        elif outcome == MOVED:
            self._on_stored()
            self._backend.sleep(0)
        else:
            self._backend.wait(stop_event, BACKPRESSURE_DELAY)
        return outcome

    def _quarantine(self, orphan: Orphan | ExistingBuffer, error: LocalStorageError) -> bool:
        try:
            return classify(error) == CORRUPT and bool(
                self._buffer.run_on_disk(orphan.quarantine_if_corrupt)
            )
        except LocalStorageError:
            return False

    def _skip(self, path: Path, error: BaseException) -> None:
        cause = classify(error) if isinstance(error, LocalStorageError) else ""
        if cause == BUSY:  # the owner is alive, or another process is adopting the store
            return
        self._skip_until[path] = self._backend.now() + SKIP_SECONDS
        level = logging.WARNING if cause == CORRUPT else logging.DEBUG
        logger.log(level, "z4j: cannot adopt the buffer %s: %s", path.name, error)


def _append(events: list[bytes], store: BufferStore) -> int:
    return store.append_events(events)
