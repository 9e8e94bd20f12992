"""Who is here: the ``worker.*`` events that make the brain accept commands for a worker (``brain-contract`` 5.5)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from z4j_bare.events.encode import Record, new_ids
from z4j_bare.events.redaction import safe_name
from z4j_bare.events.ring import Put
from z4j_bare.wire.frames import encode_fields

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

#: Seconds between two ``worker.heartbeat`` events, and how many of those make a ``worker.online`` due again: the brain's
#: retention may erase the first one.
INTERVAL = 60.0
ONLINE_EVERY = 5


class Presence:
    """Announces workers of one engine.

    :param put: ``Ring.put``.
    :param matches: the engine's ``RedactionEngine.value_matches``; see :func:`safe_name`.
    """

    def __init__(
        self,
        engine: str,
        put: Put,
        matches: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.workers: dict[str, None] = {}
        self._engine = engine
        self._put = put
        self._matches = matches
        self._clock = clock
        self._new_id = new_ids()

    def online(self, worker: str) -> str:
        """Announce a worker that is new to us; return its name as the brain can keep it."""
        name = safe_name(worker, self._matches)
        if name not in self.workers:
            self.workers[name] = None
            self._record("worker.online", name)
        return name

    def remove(self, name: str, *, announce: bool) -> None:
        """Announce a worker no longer; with ``left``, say that it went. ``name`` is what :meth:`seen` returned."""
        if self.workers.pop(name, name) is None and announce:
            self._record("worker.offline", name)

    def announce(self, kind: str) -> None:
        """Record ``worker.online``, ``worker.heartbeat`` or ``worker.offline`` for every worker of ours."""
        for worker in list(self.workers):
            self._record(kind, worker)

    def run(self, backend: BaseConcurrency, stop_event: Any) -> None:
        """Announce every ``INTERVAL`` seconds until ``stop_event`` is set."""
        turn = 0
        while not backend.wait(stop_event, INTERVAL):
            turn += 1
            self.announce("worker.heartbeat" if turn % ONLINE_EVERY else "worker.online")

    def _record(self, kind: str, worker: str) -> None:
        record: Record = (self._encode, kind, self._clock(), self._new_id(), {}, {"worker": worker})
        self._put(record)

    def _encode(self, record: Record) -> bytes:
        _, kind, stamp, identity, _common, data = record
        occurred = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stamp))
            + f".{int(stamp % 1 * 1e6):06d}+00:00"
        )
        fields = {
            "id": identity,
            "kind": kind,
            "engine": self._engine,
            "task_id": "",
            "occurred_at": occurred,
        }
        return encode_fields({**fields, "data": data}, trusted=True)
