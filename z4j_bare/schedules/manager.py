"""All schedulers of this process: their streams, and the loop that tells changes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import AgentError, CommandError

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.schedules.host import SchedulerHost
    from z4j_bare.schedules.stream import Stream

logger = logging.getLogger("z4j.runtime.schedules")

#: Seconds for which further changes are waited for, so that a deployment which saves a hundred schedules is told once.
SETTLE = 0.5

#: Seconds between two looks while nothing is to be told: a thread of the host's own may have rung without waking us.
IDLE = 30.0


class ScheduleManager:
    """Tells every stream that is ours when its scheduler says so, and every ``interval`` seconds (0: not by itself)."""

    def __init__(
        self,
        hosts: Iterable[SchedulerHost],
        buffer: BufferManager,
        backend: BaseConcurrency,
        stored: Callable[[], None],
        interval: float,
    ) -> None:
        self.streams = {host.name: _stream(host, buffer, backend, stored) for host in hosts}
        #: Hides in answers to commands what is hidden in schedules; ``None`` without a scheduler.
        self.redactor = next((stream.host.result_redactor for stream in self.streams.values()), None)
        self._backend = backend
        self._interval = interval
        self._bell = backend.event()

    def connect(self) -> None:
        """Listen to the schedulers' own signals; never raises."""
        for stream in self.streams.values():
            stream.host.connect(partial(self.note, stream))

    def disconnect(self) -> None:
        """Undo :meth:`connect`; never raises."""
        for stream in self.streams.values():
            stream.host.disconnect()

    def note(self, stream: Stream) -> None:
        """Note that something changed; for any task or thread, never waits."""
        stream.changed = True
        self._bell.set()

    def lapse(self) -> None:
        """Be silent: the session has ended."""
        for stream in self.streams.values():
            stream.lapse()

    def stream(self, name: Any) -> Stream:
        """Return the stream of the named scheduler, or of the only one. Raises ``CommandError``."""
        if not name and len(self.streams) == 1:
            return next(iter(self.streams.values()))
        if not isinstance(name, str) or name not in self.streams:
            raise CommandError(
                f"this agent has no scheduler {name!r}, only {', '.join(sorted(self.streams)) or 'none'}"
            )
        return self.streams[name]

    def resync(self, seconds: float) -> dict[str, Any]:
        """Tell all schedules of all schedulers anew; return how many were, and why others were not."""
        told, skipped = 0, {}
        until = self._backend.now() + seconds
        for name, stream in self.streams.items():
            try:
                if stream.snapshot("command", until - self._backend.now()):
                    told += 1
                else:
                    skipped[name] = "the brain has not asked this process for its schedules"
            except Exception as error:
                skipped[name] = f"{type(error).__name__}: {error}"
        return {"schedulers_drained": told, "skipped": skipped}

    def run(self, stop_event: Any) -> None:
        """Tell what changes until ``stop_event`` (an ``IEvent``) is set."""
        due = self._backend.now() + self._interval
        while not stop_event.is_set():
            self._bell.clear()
            if any(stream.changed and stream.authority for stream in self.streams.values()):
                self._backend.wait(stop_event, SETTLE)
                self._tell("signal", [stream for stream in self.streams.values() if stream.changed])
            elif self._interval and self._backend.now() >= due:
                due = self._backend.now() + self._interval
                self._tell("periodic", self.streams.values())
            else:
                self._backend.wait(self._bell, self._patience(due))

    def wake(self) -> None:
        """Have :meth:`run` look whether it shall stop."""
        self._bell.set()

    def _patience(self, due: float) -> float:
        return min(IDLE, max(0.0, due - self._backend.now())) if self._interval else IDLE

    def _tell(self, reason: str, streams: Iterable[Stream]) -> None:
        for stream in streams:
            try:
                stream.snapshot(reason)
            except AgentError as error:  # among them: the session has just ended
                logger.debug(
                    "z4j: the schedules of %s are not told (%s): %s", stream.name, reason, error
                )
            except Exception as error:
                logger.warning("z4j: the schedules of %s could not be read: %s", stream.name, error)


def _stream(*args: Any) -> Stream:
    from z4j_bare.schedules.stream import Stream  # most workers have no scheduler

    return Stream(*args)
