"""Decides when the buffer manager deletes acked rows, runs a vacuum and retries a failed disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from z4j_bare.wire.backoff import Backoff

#: Seconds between the failure of the disk and the first attempt to return to it.
RETRY_INITIAL = 5.0
#: Maximum seconds between attempts to return to the disk.
RETRY_MAX = 300.0

#: Maximum seconds between an ack and the deletion of its rows.
#: The deletion waits for another call to the store, because a separate call for it would take 1 ms.
MAX_DEFER_SECONDS = 2.0

#: Seconds between vacuum steps of an idle store.
VACUUM_INTERVAL = 1.0


class AckedRows(NamedTuple):
    """The rows of one ack.

    ``events`` is the number of events among the rows. ``at`` is the time of the ack in monotonic
    seconds.
    """

    generation: int
    ids: Sequence[int]
    events: int
    at: float


class PendingSnapshot(NamedTuple):
    """The pending acks at one moment.

    ``ids`` are the ids of the acked rows in the current store. ``events`` is the number of events
    among these rows.
    """

    acks: int = 0
    ids: Sequence[int] = ()
    events: int = 0


class PendingDeletes:
    """Acknowledged rows that are still in the store.

    In threads mode, several threads may call :meth:`add`.
    """

    def __init__(self) -> None:
        self._acks: deque[AckedRows] = deque()

    def __bool__(self) -> bool:
        return bool(self._acks)

    def add(self, rows: AckedRows) -> None:
        """Add the rows of an ack."""
        self._acks.append(rows)

    def can_defer(self, after: int, now: float) -> bool:
        """Whether the deletion of the acknowledged rows can wait.

        ``False`` if an ack is older than ``MAX_DEFER_SECONDS``, or if a read of the rows with ``id
        > after`` would return an acknowledged row.
        """
        return all(
            now - ack.at < MAX_DEFER_SECONDS and max(ack.ids) <= after for ack in tuple(self._acks)
        )

    def snapshot(self, generation: int | None) -> PendingSnapshot:
        """Return a snapshot of all pending acks, with the ids of their rows in ``generation``.

        If ``generation`` is ``None``, the snapshot is empty.
        """
        if generation is None or not self._acks:
            return PendingSnapshot()
        acks = tuple(self._acks)
        valid = [ack for ack in acks if ack.generation == generation]
        ids = [identity for ack in valid for identity in ack.ids]
        return PendingSnapshot(len(acks), ids, sum(ack.events for ack in valid))

    def remove(self, snapshot: PendingSnapshot) -> None:
        """Remove the acks of ``snapshot``."""
        for _ in range(snapshot.acks):
            self._acks.popleft()


class VacuumSchedule:
    """Decides when the next vacuum step runs."""

    def __init__(self) -> None:
        #: Whether rows may have been deleted after the last complete vacuum.
        self.needed = True
        self._stepped_at = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether a step is needed and ``VACUUM_INTERVAL`` has passed since the last step."""
        return self.needed and now - self._stepped_at >= VACUUM_INTERVAL

    def on_step(self, now: float, *, complete: bool) -> None:
        """Record a vacuum step; ``complete`` means that no further step is needed."""
        self.needed, self._stepped_at = not complete, now


class DiskRetry:
    """Schedules the attempts to return to a failed disk, with exponential back-off."""

    def __init__(self) -> None:
        self._due_at = 0.0
        self._backoff = Backoff(RETRY_INITIAL, RETRY_MAX)
        self._returned_at = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether an attempt to return to the disk is due."""
        return now >= self._due_at

    def on_failure(self, now: float) -> None:
        """Record that the disk failed.

        The back-off is reset if the disk had worked for more than ``RETRY_MAX`` seconds.
        """
        if now - self._returned_at > RETRY_MAX:
            self._backoff.reset()
        self._due_at = now + self._backoff.delay

    def on_return(self, now: float) -> None:
        """Record that the disk works again."""
        self._returned_at = now

    def schedule_next(self, now: float) -> None:
        """Double the delay after an attempt, and schedule the next attempt."""
        self._backoff.increase()
        self._due_at = now + self._backoff.delay
