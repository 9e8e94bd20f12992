"""Manages the streams of all schedulers of this process, and publishes changes in a loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import AgentError, CommandError

if TYPE_CHECKING:
    from z4j_core.models import Config
    from z4j_core.protocols import SchedulerAdapter

    from z4j_bare.asyncio_bridge.bridge import Bridge
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.interfaces import IEvent
    from z4j_bare.schedules.host import SchedulerHost
    from z4j_bare.schedules.stream import Stream

logger = logging.getLogger("z4j.runtime.schedules.manager")

#: Seconds from a signal to the snapshot.
#: A deployment that saves a hundred schedules in this time causes one snapshot.
DEBOUNCE = 0.5

#: Maximum seconds between two checks for changes. The loop checks without a wake-up, because a
#: signal from a thread of the host may fail to wake the loop.
IDLE_INTERVAL = 30.0


class ScheduleManager:
    """Publishes each active stream when its scheduler signals a change, and periodically.

    :param on_stored: called after rows were stored, to wake the sender.
    :param interval: seconds between two periodic snapshots; 0 disables periodic snapshots.
    """

    def __init__(
        self,
        hosts: Iterable[SchedulerHost],
        buffer: BufferManager,
        backend: BaseConcurrency,
        on_stored: Callable[[], None],
        interval: float,
    ) -> None:
        self.streams = {host.name: _stream(host, buffer, backend, on_stored) for host in hosts}
        #: Redacts results of schedule commands; ``None`` without a scheduler.
        self.redactor = next(
            (stream.host.result_redactor for stream in self.streams.values()), None
        )
        self._backend = backend
        self._interval = interval
        self._wakeup = backend.event()

    def connect(self) -> None:
        """Connect the signals of all schedulers; never raises."""
        for stream in self.streams.values():
            stream.host.connect(partial(self.mark_changed, stream))

    def disconnect(self) -> None:
        """Disconnect the signals of all schedulers; never raises."""
        for stream in self.streams.values():
            stream.host.disconnect()

    def mark_changed(self, stream: Stream) -> None:
        """Request a snapshot of the stream. Any task or thread may call this method."""
        stream.changed = True
        self._wakeup.set()

    def revoke(self) -> None:
        """Deactivate all streams, because the session has ended."""
        for stream in self.streams.values():
            stream.revoke()

    def stream(self, name: object) -> Stream:
        """Return the stream of the scheduler ``name``.

        Without a name, return the stream of the only scheduler. Raises ``CommandError`` if there is
        no such stream.
        """
        if not name and len(self.streams) == 1:
            return next(iter(self.streams.values()))
        if not isinstance(name, str) or name not in self.streams:
            known = ", ".join(sorted(self.streams)) or "none"
            raise CommandError(f"this agent has no scheduler {name!r}, only {known}")
        return self.streams[name]

    def resync(self, seconds: float) -> dict[str, Any]:
        """Publish all streams within ``seconds``.

        The result contains the number of published streams, and the reason for each skipped stream.
        """
        published, skipped = 0, {}
        deadline = self._backend.now() + seconds
        for name, stream in self.streams.items():
            try:
                if stream.snapshot("command", deadline - self._backend.now()):
                    published += 1
                else:
                    skipped[name] = "the brain has not asked this process for its schedules"
            except Exception as error:
                skipped[name] = f"{type(error).__name__}: {error}"
        return {"schedulers_drained": published, "skipped": skipped}

    def run(self, stop_event: IEvent) -> None:
        """Publish changes until ``stop_event`` is set."""
        next_due = self._backend.now() + self._interval
        while not stop_event.is_set():
            self._wakeup.clear()
            if any(stream.changed and stream.authority for stream in self.streams.values()):
                self._backend.wait(stop_event, DEBOUNCE)
                changed = [stream for stream in self.streams.values() if stream.changed]
                self._publish("signal", changed)
            elif self._interval and self._backend.now() >= next_due:
                next_due = self._backend.now() + self._interval
                self._publish("periodic", self.streams.values())
            else:
                self._backend.wait(self._wakeup, self._idle_timeout(next_due))

    def wake(self) -> None:
        """Wake :meth:`run`, which then checks its ``stop_event``."""
        self._wakeup.set()

    def _idle_timeout(self, next_due: float) -> float:
        if not self._interval:
            return IDLE_INTERVAL
        return min(IDLE_INTERVAL, max(0.0, next_due - self._backend.now()))

    def _publish(self, reason: str, streams: Iterable[Stream]) -> None:
        for stream in streams:
            try:
                stream.snapshot(reason)
            except AgentError as error:  # for example, the session has just ended
                logger.debug(
                    "z4j: could not publish the schedules of %s (%s): %s",
                    stream.name,
                    reason,
                    error,
                )
            except Exception as error:
                logger.warning("z4j: could not read the schedules of %s: %s", stream.name, error)


def _stream(
    host: SchedulerHost,
    buffer: BufferManager,
    backend: BaseConcurrency,
    on_stored: Callable[[], None],
) -> Stream:
    # Imported here, because most processes have no scheduler.
    from z4j_bare.schedules.stream import Stream

    return Stream(host, buffer, backend, on_stored)


def scheduler_hosts(
    adapters: Sequence[SchedulerAdapter], bridge: Bridge, config: Config
) -> list[SchedulerHost]:
    """Return a ``SchedulerHost`` for each adapter."""
    if not adapters:
        return []
    # Imported here, because most processes have no scheduler.
    from z4j_bare.schedules.host import SchedulerHost

    return [SchedulerHost(adapter, bridge, config) for adapter in adapters]
