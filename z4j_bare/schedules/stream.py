"""The stream of one scheduler, with its authority, sequence numbers and order of projections."""

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

logger = logging.getLogger("z4j.runtime.schedules.stream")

#: Timeout in seconds of reading all schedules once. The adapters' own timeouts are 10 or 15 s.
LIST_TIMEOUT = 20.0

#: Returns the seconds until a deadline; raises ``CommandError`` after the deadline.
Remaining = Callable[[], float]


class Stream:
    """Stores the projections of one scheduler. At any time, only one task changes the stream.

    In each epoch the brain expects consecutive sequence numbers from 1, and a complete snapshot as
    the first projection. The brain grants a new epoch in every session, so the sequence number is
    kept in memory only. The brain acknowledges but ignores projections of an older epoch
    (``docs/protocol.md``, "Schedules").

    :param on_stored: called after rows were stored, to wake the sender.
    """

    def __init__(
        self,
        host: SchedulerHost,
        buffer: BufferManager,
        backend: BaseConcurrency,
        on_stored: Callable[[], None],
    ) -> None:
        self.host = host
        self.name = host.name
        #: Whether the scheduler has signalled a change since the start of the last snapshot.
        self.changed = False
        #: The current authority; ``None`` while the stream is inactive.
        self.authority: Authority | None = None
        #: The last sequence number used in the epoch.
        self.sequence = 0
        self._buffer = buffer
        self._backend = backend
        self._on_stored = on_stored
        self._lock = backend.lock()
        self._latest: Authority | None = None
        #: Maps the brain's key to the adapter's key, for schedules whose key is redacted.
        self._adapter_keys: dict[str, str] = {}

    def revoke(self) -> None:
        """Deactivate the stream until the next activation, because its session has ended."""
        self.authority = None

    def activate(self, parameters: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Activate the stream and publish a snapshot; return the command's result.

        Raises ``CommandError`` for an authority older than the latest one, and any exception of the
        adapter.
        """
        authority = Authority.from_parameters(parameters, self.name)
        if (
            parameters.get("owner", self.name) != self.name
            or parameters.get("stable_source") is not True
        ):
            raise CommandError(
                f"the command does not name {self.name} as the owner and as a stable source"
            )
        with self._exclusive(seconds) as remaining:
            self._accept(authority)
            try:
                return self.publish("activation", remaining).facts
            except BaseException:
                self.authority = None
                raise

    def snapshot(self, reason: str, seconds: float = LIST_TIMEOUT) -> bool:
        """Publish all schedules if the stream is active; return whether the stream was active.

        Raises any exception of the adapter.
        """
        if self.authority is None:
            return False
        with self._exclusive(seconds) as remaining:
            self.publish(reason, remaining)
        return True

    @contextmanager
    def operation(self, parameters: Mapping[str, Any], seconds: float) -> Iterator[Remaining]:
        """Lock the stream for an operator's command.

        Raises ``CommandError`` if the command is not for the current authority.
        """
        wanted = Authority.from_parameters(
            {"source_scope": external_schedule_source_scope(self.name), **parameters}, self.name
        )
        with self._exclusive(seconds) as remaining:
            if wanted != self.authority:
                raise CommandError(
                    f"epoch {wanted.epoch_number} of {self.name} does not belong to this process"
                )
            yield remaining

    # -- methods for a task that has locked the stream

    def row(self, key: str, remaining: Remaining) -> Row | None:
        """Return the current row of the schedule with this key, or ``None`` if none exists."""
        schedule = self.host.schedule(self.adapter_key(key), remaining())
        if schedule is None:
            return None
        return projection.make_row(schedule, self.name, self.host.redactor)

    def adapter_key(self, key: str) -> str:
        """Return the adapter's key of the schedule that the brain knows as ``key``."""
        return self._adapter_keys.get(key, key)

    def confirm(self, row: Row, operation: str) -> int:
        """Store the confirmation of a control operation; return its sequence number."""
        authority = self._require_authority()
        number = self.sequence + 1
        self._store([projection.control(authority, number, row, operation, "external-control")])
        return self.sequence

    def publish(self, reason: str, remaining: Remaining) -> Published:
        """Read all schedules, and store and return a complete snapshot."""
        self.changed = False
        rows = self._rows(min(remaining(), LIST_TIMEOUT))
        authority = self._require_authority()
        frames = projection.snapshot(
            authority, self.sequence + 1, rows, reason, TimeSlice(self._backend).checkpoint
        )
        self._store(frames)
        self._adapter_keys = {
            row.key: row.adapter_key for row in rows if row.key != row.adapter_key
        }
        logger.debug("z4j: published %d schedules of %s (%s)", len(rows), self.name, reason)
        facts = {"scheduler": self.name, **authority.as_dict(), "sequence": self.sequence}
        return Published({**facts, "schedule_count": len(rows), "frame_count": len(frames)}, rows)

    # -- internals

    @contextmanager
    def _exclusive(self, seconds: float) -> Iterator[Remaining]:
        deadline = self._backend.now() + seconds

        def remaining() -> float:
            left = deadline - self._backend.now()
            if left <= 0:
                raise CommandError(f"not done: another operation on {self.name} took too long")
            return left

        with self._lock:
            remaining()
            yield remaining

    def _accept(self, authority: Authority) -> None:
        latest = self._latest
        if authority == latest:  # the same activation was delivered again
            self.authority = authority
            return
        if (
            latest is not None
            and authority.stream_id == latest.stream_id
            and authority.epoch_number <= latest.epoch_number
        ):
            raise CommandError(f"epoch {authority.epoch_number} of {self.name} is over")
        self.authority = self._latest = authority
        self.sequence = 0

    def _require_authority(self) -> Authority:
        """Return the authority. Raises ``CommandError`` if the session ended in the meantime."""
        if self.authority is None:
            raise CommandError(f"the session that published the schedules of {self.name} has ended")
        return self.authority

    def _rows(self, seconds: float) -> list[Row]:
        checkpoint, rows = TimeSlice(self._backend).checkpoint, []
        for schedule in self.host.schedules(seconds):
            rows.append(projection.make_row(schedule, self.name, self.host.redactor))
            checkpoint()
        return projection.sort_rows(rows)

    def _store(self, events: list[bytes]) -> None:
        self._buffer.append([(PROJECTION, "", event) for event in events])
        self.sequence += 1
        self._on_stored()


class Published:
    """A stored snapshot.

    ``facts`` are fields of a command's result. ``rows`` contains the rows by key.
    """

    def __init__(self, facts: dict[str, Any], rows: list[Row]) -> None:
        self.facts = facts
        self.rows = {row.key: row for row in rows}
