"""Manages all engines of the process: the host and the event source of each adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from z4j_bare.engines.engine import describe_engine
from z4j_bare.engines.host import EngineHost
from z4j_bare.events.redaction import merge_redaction
from z4j_bare.process import ready_worker

if TYPE_CHECKING:
    from z4j_core.models import Config
    from z4j_core.protocols import QueueEngineAdapter

    from z4j_bare.asyncio_bridge.bridge import Bridge
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.ring import Ring
    from z4j_bare.events.source import EventSource, Loop
    from z4j_bare.settings import Settings

logger = logging.getLogger("z4j.runtime.engines.manager")


class EngineManager:
    """Creates, connects and disconnects the host and the event source of each engine adapter."""

    def __init__(
        self,
        adapters: Sequence[QueueEngineAdapter],
        config: Config,
        settings: Settings,
        ring: Ring,
        bridge: Bridge,
        backend: BaseConcurrency,
    ) -> None:
        self.hosts: dict[str, EngineHost] = {}
        self.sources: list[EventSource] = []
        for adapter in adapters:
            # Merge before creating the source, because the source uses the merged patterns.
            merge_redaction(adapter, config)
            description = describe_engine(adapter)
            source = description.make_source(ring, settings, backend, ready_worker())
            self.sources.append(source)
            self.hosts[adapter.name] = EngineHost(adapter, bridge, backend, source.record)

    @property
    def uses_adapter_events(self) -> bool:
        """Whether an adapter must be connected before its engine's events can be captured."""
        return any(source.uses_adapter_events for source in self.sources)

    def start_capture(self) -> None:
        """Start to capture events. Does no I/O."""
        for source in self.sources:
            source.connect()
        for advice in self.advice():
            logger.warning("z4j: %s", advice)

    def advice(self) -> list[str]:
        """Return what the operator should change in this process, and why."""
        found = (host.description.advice() for host in self.hosts.values())
        return [advice for advice in found if advice]

    def loops(self) -> Iterator[Loop]:
        """Return the background loops of the sources. :meth:`disconnect` waits for their end."""
        for source in self.sources:
            yield from source.loops()

    def connect(self) -> None:
        """Connect the adapters whose events the sources use."""
        for host, source in self.pairs():
            host.connect(events=source.uses_adapter_events)

    def disconnect(self) -> None:
        """Stop the capture and disconnect the adapters."""
        for source in self.sources:
            source.disconnect()
        for host in self.hosts.values():
            host.disconnect()

    def announce_workers(self) -> None:
        """Record a ``worker.online`` event for each known worker. Called when a session starts."""
        for source in self.sources:
            source.presence.announce("worker.online")

    def workers(self) -> dict[str, list[str]]:
        """Return the names of the known workers by engine."""
        return {source.engine: sorted(source.presence.workers) for source in self.sources}

    def describe(self) -> list[dict[str, Any]]:
        """Return the workers, queues and running tasks by engine; see ``EventSource.describe``."""
        return [source.describe() for source in self.sources]

    def iter_running(
        self, query: Mapping[str, Any], checkpoint: Callable[[], object]
    ) -> Iterator[dict[str, Any]]:
        """Iterate over the running tasks of all engines; see ``EventSource.iter_running``."""
        for source in self.sources:
            for row in source.iter_running(query, checkpoint):
                yield {"engine": source.engine, **row}

    def current_task(self) -> str:
        """Return ``name[id]`` of the task that runs on the hub now; empty if no task runs.

        A native thread may call this method, because it uses no lock.
        """
        return next(filter(None, (source.current_task() for source in self.sources)), "")

    def dropped(self) -> dict[str, int]:
        """Return the number of events that the adapter or the source has lost, by engine."""
        return {host.name: host.dropped() + source.dropped() for host, source in self.pairs()}

    def lost(self) -> int:
        """Return how many events were lost on the way from child processes to this process."""
        return sum(source.lost() for source in self.sources)

    def unheard(self) -> int:
        """Return how many tasks the pools accepted without an event of their start."""
        return sum(source.unheard() for source in self.sources)

    def failures(self) -> int:
        """Return how often the connections of event sources failed."""
        return sum(source.failures() for source in self.sources)

    def pairs(self) -> Iterator[tuple[EngineHost, EventSource]]:
        """Return each host with its source."""
        return zip(self.hosts.values(), self.sources, strict=True)
