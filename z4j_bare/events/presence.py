"""Announces workers by events. The brain accepts commands only for announced workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from z4j_bare.events.encode import Record, new_ids
from z4j_bare.events.redaction import safe_name
from z4j_bare.events.ring import Put
from z4j_bare.interfaces import IEvent
from z4j_bare.wire.frames import encode_fields

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

#: Seconds between announcements.
INTERVAL = 60.0

#: Every fifth announcement is ``worker.online`` instead of ``worker.heartbeat``. The brain deletes
#: old events, and may have deleted the previous ``worker.online``.
ONLINE_EVERY = 5


class Presence:
    """Announces the workers of one engine.

    :param put: appends a record to the ring (``Ring.put``).
    :param matches: whether a name would be redacted; see :func:`safe_name`.
    """

    def __init__(
        self,
        engine: str,
        put: Put,
        matches: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        #: The names of the announced workers.
        #: The names are the keys of a dict, which keeps their order.
        self.workers: dict[str, None] = {}
        self._engine = engine
        self._put = put
        self._matches = matches
        self._clock = clock
        self._new_id = new_ids()

    def online(self, worker: str) -> str:
        """Announce a new worker; return the worker's :func:`safe_name`."""
        name = safe_name(worker, self._matches)
        if name not in self.workers:
            self.workers[name] = None
            self._record("worker.online", name)
        return name

    def remove(self, name: str, *, announce: bool) -> None:
        """Stop announcing a worker. Idempotent.

        :param name: the name that :meth:`online` returned.
        :param announce: whether to record ``worker.offline``.
        """
        if self.workers.pop(name, name) is None and announce:
            self._record("worker.offline", name)

    def announce(self, kind: str) -> None:
        """Record an event for every announced worker.

        :param kind: ``worker.online``, ``worker.heartbeat`` or ``worker.offline``.
        """
        for worker in list(self.workers):
            self._record(kind, worker)

    def run(self, backend: BaseConcurrency, stop_event: IEvent) -> None:
        """Announce the workers every ``INTERVAL`` seconds until ``stop_event`` is set."""
        rounds = 0
        while not backend.wait(stop_event, INTERVAL):
            rounds += 1
            self.announce("worker.heartbeat" if rounds % ONLINE_EVERY else "worker.online")

    def _record(self, kind: str, worker: str) -> None:
        record: Record = (self._encode, kind, self._clock(), self._new_id(), {}, {"worker": worker})
        self._put(record)

    def _encode(self, record: Record) -> bytes:
        _, kind, timestamp, event_id, _common, data = record
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(timestamp))
        fields = {
            "id": event_id,
            "kind": kind,
            "engine": self._engine,
            "task_id": "",
            "occurred_at": f"{seconds}.{int(timestamp % 1 * 1e6):06d}+00:00",
        }
        return encode_fields({**fields, "data": data}, trusted=True)
