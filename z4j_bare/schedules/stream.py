"""The stream of one scheduler: who may speak for it, the next sequence number, and what is told in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from z4j_core.schedule_external import external_schedule_source_scope

from z4j_bare.buffer.rows import PROJECTION
from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.errors import CommandError
from z4j_bare.schedules import projection
from z4j_bare.schedules.projection import Authority, Row

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.schedules.host import SchedulerHost

logger = logging.getLogger("z4j.runtime.schedules")

#: Seconds for one listing; the adapters give up after 10 or 15 by themselves.
LISTING = 20.0

#: Tells how many seconds are left; raises ``CommandError`` when none are.
Left = Callable[[], float]


class Stream:
    """Everything that is told of one scheduler goes through here, one thing at a time.

    The brain takes the sequence numbers of an epoch without a gap, from 1 on, first of all a complete snapshot. It grants a
    new epoch with every session, so no number has to outlive the process; what was stored for an older epoch is
    acknowledged and ignored.

    :param stored: called after rows were stored, to wake the sender.
    """

    def __init__(
        self,
        host: SchedulerHost,
        buffer: BufferManager,
        backend: BaseConcurrency,
        stored: Callable[[], None],
    ) -> None:
        self.host = host
        self.name = host.name
        #: Whether the scheduler has said that something changed since the last snapshot began.
        self.changed = False
        #: By which right we speak just now, if any.
        self.authority: Authority | None = None
        #: The last number that was used in its epoch.
        self.sequence = 0
        self._buffer = buffer
        self._backend = backend
        self._stored = stored
        self._turn = backend.lock()
        self._newest: Authority | None = None
        #: What the adapter calls the schedules whose key had to be hidden.
        self._natives: dict[str, str] = {}

    def lapse(self) -> None:
        """Be silent until the next activation: the session that this one came with has ended."""
        self.authority = None

    def activate(self, parameters: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Take the authority of ``schedule.external.activate`` and tell everything; return the command's result.

        Raises ``CommandError`` for one that is older than what was there, else whatever the adapter raises.
        """
        authority = Authority.of(parameters, self.name)
        if (
            parameters.get("owner", self.name) != self.name
            or parameters.get("stable_source") is not True
        ):
            raise CommandError(f"{self.name} can only be told by its owner, as a stable source")
        with self._alone(seconds) as left:
            self._take(authority)
            try:
                return self.tell("activation", left).facts
            except BaseException:
                self.authority = None
                raise

    def snapshot(self, reason: str, seconds: float = LISTING) -> bool:
        """Tell everything, if it is ours to tell; return whether it was. Raises whatever the adapter raises."""
        if self.authority is None:
            return False
        with self._alone(seconds) as left:
            self.tell(reason, left)
        return True

    @contextmanager
    def order(self, parameters: Mapping[str, Any], seconds: float) -> Iterator[Left]:
        """Hold the stream for one operator's order. Raises ``CommandError`` when it is not for our authority."""
        wanted = Authority.of(
            {"source_scope": external_schedule_source_scope(self.name), **parameters}, self.name
        )
        with self._alone(seconds) as left:
            if wanted != self.authority:
                raise CommandError(
                    f"epoch {wanted.epoch_number} of {self.name} is not this process's"
                )
            yield left

    # -- for whoever holds the stream

    def row(self, key: str, left: Left) -> Row | None:
        """Return what the scheduler says of one schedule now, ``None`` when it has none of that name."""
        schedule = self.host.schedule(self.native(key), left())
        return (
            None if schedule is None else projection.row_of(schedule, self.name, self.host.redactor)
        )

    def native(self, key: str) -> str:
        """Return what the adapter calls the schedule that the brain calls ``key``."""
        return self._natives.get(key, key)

    def confirm(self, row: Row, operation: str) -> int:
        """Store the confirmation of a control operation; return its sequence number."""
        self._store(
            [
                projection.control(
                    self._authority(), self.sequence + 1, row, operation, "external-control"
                )
            ]
        )
        return self.sequence

    def tell(self, reason: str, left: Left) -> Published:
        """Store a complete snapshot."""
        self.changed = False
        rows = self._rows(min(left(), LISTING))
        authority = self._authority()
        frames = projection.snapshot(
            authority, self.sequence + 1, rows, reason, TimeSlice(self._backend).checkpoint
        )
        self._store(frames)
        self._natives = {row.key: row.native for row in rows if row.key != row.native}
        logger.debug("z4j: told %d schedules of %s (%s)", len(rows), self.name, reason)
        facts = {"scheduler": self.name, **authority.named(), "sequence": self.sequence}
        return Published({**facts, "schedule_count": len(rows), "frame_count": len(frames)}, rows)

    # -- how

    @contextmanager
    def _alone(self, seconds: float) -> Iterator[Left]:
        until = self._backend.now() + seconds

        def left() -> float:
            remaining = until - self._backend.now()
            if remaining <= 0:
                raise CommandError(f"not done: other business with {self.name} took too long")
            return remaining

        with self._turn:
            left()
            yield left

    def _take(self, authority: Authority) -> None:
        newest = self._newest
        if authority == newest:  # delivered again
            self.authority = authority
            return
        if (
            newest is not None
            and authority.stream_id == newest.stream_id
            and authority.epoch_number <= newest.epoch_number
        ):
            raise CommandError(f"epoch {authority.epoch_number} of {self.name} is over")
        self.authority = self._newest = authority
        self.sequence = 0

    def _authority(self) -> Authority:
        """Return by which right we speak, or raise ``CommandError``: a session may end at any time."""
        if self.authority is None:
            raise CommandError(f"the session that told the schedules of {self.name} has ended")
        return self.authority

    def _rows(self, seconds: float) -> list[Row]:
        checkpoint, rows = TimeSlice(self._backend).checkpoint, []
        for schedule in self.host.schedules(seconds):
            rows.append(projection.row_of(schedule, self.name, self.host.redactor))
            checkpoint()
        return projection.ordered(rows)

    def _store(self, events: list[bytes]) -> None:
        self._buffer.append([(PROJECTION, "", event) for event in events])
        self.sequence += 1
        self._stored()


class Published:
    """A snapshot that was stored: what the answer to a command says of it, and its rows by key."""

    def __init__(self, facts: dict[str, Any], rows: list[Row]) -> None:
        self.facts = facts
        self.rows = {row.key: row for row in rows}
