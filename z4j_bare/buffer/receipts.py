"""Rows that the brain has and that are still here: noted at its ack, deleted by a trip that is made anyway."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds for which what the brain has may wait for a trip that deletes it. A trip costs a worker 1 ms.
MAX_DEFER_SECONDS = 2.0


class Receipt(NamedTuple):
    """Rows of one ``generation``, how many of them are ``events``, and when their ack came, in monotonic seconds."""

    generation: int
    ids: Sequence[int]
    events: int
    at: float


class Receipts:
    """Noted on the hub, redeemed where the store is, which may be another thread."""

    def __init__(self) -> None:
        #: Events that were deleted.
        self.events = 0
        self._noted: deque[Receipt] = deque()

    def __bool__(self) -> bool:
        return bool(self._noted)

    def note(self, receipt: Receipt) -> None:
        """Take note of rows that the brain has."""
        self._noted.append(receipt)

    def may_wait(self, after: int, now: float) -> bool:
        """Whether a look at the rows behind ``after`` may leave these where they are: it finds none, and they are young."""
        return all(
            now - each.at < MAX_DEFER_SECONDS and max(each.ids) <= after
            for each in tuple(self._noted)
        )

    def redeem(self, store: Any, generation: int) -> None:
        """Delete from ``store`` what is of this generation, and forget the rest; if it raises, nothing is forgotten."""
        noted = list(islice(self._noted, len(self._noted)))  # more may come meanwhile
        valid = [each for each in noted if each.generation == generation]
        if valid:
            store.confirm([identity for each in valid for identity in each.ids])
        for _ in noted:
            self._noted.popleft()
        self.events += sum(each.events for each in valid)
