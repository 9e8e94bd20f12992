"""When the manager deletes acked rows, vacuums, and retries a failed disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from z4j_bare.wire.backoff import Backoff

#: Seconds between the failure of the disk and the first attempt to return to it.
RETRY_INITIAL = 5.0
#: Maximum seconds between attempts to return to the disk.
RETRY_MAX = 300.0

#: Maximum seconds between an ack and the deletion of its rows. A call on the native thread costs a
#: worker 1 ms, so the rows wait for the next call that is needed for another reason.
MAX_DEFER_SECONDS = 2.0

#: Seconds between vacuum steps of an idle store.
VACUUM_INTERVAL = 1.0


class AckedRows(NamedTuple):
    """The rows of one ack. ``events`` is their number of events, ``at`` the monotonic time."""

    generation: int
    ids: Sequence[int]
    events: int
    at: float


class PendingSnapshot(NamedTuple):
    """The pending acks at one moment.

    ``acks`` is their number. ``ids`` are their rows in the current generation, and ``events`` is
    the number of events among these.
    """

    acks: int = 0
    ids: Sequence[int] = ()
    events: int = 0


class PendingDeletes:
    """Acknowledged rows that were not deleted yet. In threads mode, several threads add rows."""

    def __init__(self) -> None:
        self._acks: deque[AckedRows] = deque()

    def __bool__(self) -> bool:
        return bool(self._acks)

    def add(self, rows: AckedRows) -> None:
        """Add the rows of an ack."""
        self._acks.append(rows)

    def can_defer(self, after: int, now: float) -> bool:
        """Whether no row is overdue, and a read of ``id > after`` returns none of the rows."""
        return all(
            now - ack.at < MAX_DEFER_SECONDS and max(ack.ids) <= after for ack in tuple(self._acks)
        )

    def snapshot(self, generation: int | None) -> PendingSnapshot:
        """Return the acks so far with the ids of ``generation``.

        The snapshot is empty for ``None``. Ids of other generations are left out, because their
        rows are not in the current store.
        """
        if generation is None or not self._acks:
            return PendingSnapshot()
        acks = tuple(self._acks)
        valid = [ack for ack in acks if ack.generation == generation]
        ids = [identity for ack in valid for identity in ack.ids]
        return PendingSnapshot(len(acks), ids, sum(ack.events for ack in valid))

    def remove(self, snapshot: PendingSnapshot) -> None:
        """Remove the acks of a snapshot."""
        for _ in range(snapshot.acks):
            self._acks.popleft()


class VacuumSchedule:
    """When to run the next vacuum step."""

    def __init__(self) -> None:
        #: Whether rows were deleted since the last complete vacuum.
        self.needed = True
        self._stepped_at = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether a step is needed, and the last one was long enough ago."""
        return self.needed and now - self._stepped_at >= VACUUM_INTERVAL

    def on_step(self, now: float, *, complete: bool) -> None:
        """Record a step."""
        self.needed, self._stepped_at = not complete, now


class DiskRetry:
    """When to try to return to a failed disk, with exponential backoff."""

    def __init__(self) -> None:
        self._due_at = 0.0
        self._backoff = Backoff(RETRY_INITIAL, RETRY_MAX)
        self._returned_at = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether it is time for an attempt."""
        return now >= self._due_at

    def on_failure(self, now: float) -> None:
        """Record that the disk failed; the backoff restarts if it had worked for ``RETRY_MAX``."""
        if now - self._returned_at > RETRY_MAX:
            self._backoff.reset()
        self._due_at = now + self._backoff.delay

    def on_return(self, now: float) -> None:
        """Record that the disk works again."""
        self._returned_at = now

    def schedule_next(self, now: float) -> None:
        """Double the delay after an attempt."""
        self._backoff.increase()
        self._due_at = now + self._backoff.delay
