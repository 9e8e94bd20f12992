"""The event source of an engine whose adapter delivers the events itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_bare.events.presence import Presence
from z4j_bare.events.redaction import value_matcher
from z4j_bare.events.ring import Ring
from z4j_bare.interfaces import IEvent
from z4j_bare.process import local_worker_name

if TYPE_CHECKING:
    from z4j_core.models import Event
    from z4j_core.protocols import QueueEngineAdapter

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.settings import Settings

#: A background loop: a name, and a function that runs until the event in its argument is set.
Loop = tuple[str, Callable[[IEvent], None]]


class EventSource:
    """Records the events that the adapter of one engine delivers."""

    #: Whether the agent must connect the adapter's signals to receive the events.
    uses_adapter_events = True

    def __init__(
        self, adapter: QueueEngineAdapter, ring: Ring, settings: Settings, backend: BaseConcurrency
    ) -> None:
        self.engine = adapter.name
        self.presence = Presence(adapter.name, ring.put, value_matcher(adapter))
        self._ring = ring
        self._settings = settings
        self._backend = backend

    def loops(self) -> list[Loop]:
        """Return the background loops to start after :meth:`connect`.

        The agent does not wait for the end of these loops. :meth:`disconnect` waits if needed.
        """
        return [(f"z4j-presence-{self.engine}", partial(self.presence.run, self._backend))]

    def connect(self) -> None:
        """Start the capture, without I/O.

        The agent waits for this call, so that no task is missed.
        """
        if name := local_worker_name(self.engine):
            self.presence.online(name)

    def disconnect(self) -> None:
        """Announce the workers as offline. Subclasses also stop their capture."""
        self.presence.announce("worker.offline")

    def failures(self) -> int:
        """Return how many times the stream of events was interrupted."""
        return 0

    def dropped(self) -> int:
        """Return how many events could not be decoded."""
        return 0

    def lost(self) -> int:
        """Return how many events were lost on the way from child processes to this process."""
        return 0

    def unheard(self) -> int:
        """Return how many tasks started without an event that reported the start."""
        return 0

    def current_task(self) -> str:
        """Return ``name[id]`` of the task that runs on the hub now; empty if it is unknown.

        A native thread may call this. Therefore the method uses no lock and does not log.
        """
        return ""

    def iter_running(
        self, query: Mapping[str, Any], checkpoint: Callable[[], object]
    ) -> Iterator[dict[str, Any]]:
        """Iterate over the tasks that run now, as plain JSON types; none by default.

        :param query: the fields of ``TaskQuery``.
        :param checkpoint: is called between two tasks.
        """
        del query, checkpoint
        return iter(())

    def describe(self) -> dict[str, Any]:
        """Return the engine and its known workers, as plain JSON types.

        ``worker`` is the worker that this process is; ``None`` if the process only observes
        workers. ``queues`` are the worker's queues. ``running`` is the number of the worker's
        running tasks; ``None`` if the number is unknown.
        """
        workers = list(self.presence.workers)
        return {
            "engine": self.engine,
            "worker": workers[0] if workers else None,
            "workers": workers,
            "queues": [],
            "running": None,
        }

    def record(self, event: Event) -> None:
        """Append an event of the adapter to the ring. Never waits, never raises."""
        data = event.data
        if not self._settings.capture_args:
            data.pop("args", None)
            data.pop("kwargs", None)
        if not self._settings.capture_result:
            data.pop("result", None)
        if isinstance(worker := data.get("worker"), str):
            self.presence.online(worker)
        self._ring.put((self._ring.counts.encode_model, event))
