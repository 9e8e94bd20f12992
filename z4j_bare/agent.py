"""Builds the agent from its parts. Each start of the runtime builds a new agent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.buffer.adopt_loop import AdoptLoop
from z4j_bare.buffer.ledger import find_in_other_stores
from z4j_bare.buffer.manager import BufferManager
from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.buffer.open_runs import OpenRuns
from z4j_bare.buffer.opener import StoreOpener
from z4j_bare.commands import Dispatcher, add_process_restarts
from z4j_bare.engines.manager import EngineManager
from z4j_bare.errors import AgentError
from z4j_bare.events.ring import Ring
from z4j_bare.monitoring.control_server import ControlServer
from z4j_bare.monitoring.duplicate_agents import DuplicateAgentCheck
from z4j_bare.monitoring.health import HealthLoop
from z4j_bare.monitoring.hub_lag import HubLagMonitor
from z4j_bare.monitoring.inspection import control_handlers
from z4j_bare.monitoring.last_metrics import LastMetrics
from z4j_bare.monitoring.metrics import AgentMetrics, Counters
from z4j_bare.monitoring.registry import RegistryLoop
from z4j_bare.pipeline.flush import FlushLoop
from z4j_bare.pipeline.identity import AgentIdentity, AgentStatus
from z4j_bare.pipeline.send import Sender
from z4j_bare.pipeline.session import BackgroundLoops, SessionLoops, Supervisor, run_until
from z4j_bare.process import ready_worker
from z4j_bare.schedules import ScheduleManager, scheduler_hosts
from z4j_bare.settings import Settings, read_key, read_token
from z4j_bare.transport.auto import TransportFactory

if TYPE_CHECKING:
    from z4j_core.models import Config, Event
    from z4j_core.protocols import FrameworkAdapter, QueueEngineAdapter, SchedulerAdapter

    from z4j_bare.concurrency import BaseConcurrency

#: Maximum seconds that :meth:`Agent.start` waits for adapters to connect.
CONNECT_GRACE = 1.0


class Agent:
    """The loops of a running agent and the objects that they share.

    The constructor runs on the host's thread. Its only I/O is to read the HMAC key's file.
    """

    def __init__(
        self,
        config: Config,
        framework: FrameworkAdapter,
        engines: Sequence[QueueEngineAdapter],
        schedulers: Sequence[SchedulerAdapter],
        settings: Settings,
        backend: BaseConcurrency,
    ) -> None:
        key, counters = partial(read_key, config, settings), Counters()
        preference = settings.transport if settings.transport != "auto" else config.transport
        token = partial(read_token, config, settings)
        self.backend = backend
        self.ring = ring = Ring(settings.ring_events, settings.flush_events, backend.event())
        self.transports = TransportFactory(
            str(config.brain_url), preference, token, settings, backend, dev_mode=config.dev_mode
        )
        key()  # read here, so that a wrong key raises; a loop could only log the error
        opener = StoreOpener(config, key)
        ring.runs = runs = OpenRuns(ring, opener.deployment)
        opener.on_open = runs.attach
        self.buffer = buffer = BufferManager(
            opener.open,
            backend,
            lambda: MemoryStore(max_rows=config.buffer_max_events),
            partial(find_in_other_stores, config.buffer_path),
        )
        self.bridge = Bridge(backend)
        self.engines = EngineManager(engines, config, settings, ring, self.bridge, backend)
        hosts, schedule_hosts = self.engines.hosts, scheduler_hosts(schedulers, self.bridge, config)
        add_process_restarts(self.engines.pairs(), self.stop, backend, settings.restart_grace)
        sender = Sender(buffer, backend, counters)
        self._flusher = FlushLoop(
            ring, buffer, sender, backend, counters, settings.flush_interval, settings.flush_events
        )
        self.schedules = ScheduleManager(
            schedule_hosts, buffer, backend, sender.notify, settings.schedule_resync
        )
        schedules, workers = self.schedules, settings.command_workers
        self.dispatcher = Dispatcher(
            hosts, buffer, sender.notify, backend, counters, workers, schedules
        )
        hub_lag = HubLagMonitor(backend, self.engines.current_task)
        health = HealthLoop(hosts, self.bridge, backend, ready_worker())
        identity = AgentIdentity(config, framework, hosts, schedule_hosts)
        metrics = AgentMetrics(
            ring=ring,
            counters=counters,
            buffer=buffer,
            backend=backend,
            hub_lag=hub_lag,
            started=identity.started_at.timestamp(),
            health=health.latest,
            channel_lost=self.engines.lost,
            dropped=self.engines.dropped,
            unheard=self.engines.unheard,
            restarts=lambda: self.bridge.restarts + self.engines.failures(),
        )
        submit, transports = self.dispatcher.submit, self.transports
        self._session_loops = SessionLoops(
            sender, submit, metrics, identity, transports, config, settings, backend, counters
        )
        self.supervisor = supervisor = Supervisor(
            transports.create, identity.hello, key, self._session_loops.run, backend, counters
        )
        supervisor.clock.ask, health.on_change = transports.clock_offset, supervisor.beat
        self.status = AgentStatus(identity, self.supervisor, self.engines, metrics, buffer)
        hints, dev = (
            getattr(framework, "discovery_hints", None),
            config.dev_mode or settings.dev_mode,
        )
        registry = RegistryLoop(hosts, hints, lambda: self.supervisor.connection, backend, dev=dev)
        self._session_loops.on_start += [self.engines.announce_workers, registry.wake]
        self._session_loops.on_end.append(self.schedules.revoke)
        describe, reconnect = self.status.describe, supervisor.reconnect
        handlers = control_handlers(
            describe, reconnect, self.engines, metrics, config, settings, backend
        )
        control_server = ControlServer(framework.name, handlers, backend)
        adopter = AdoptLoop.of_opener(opener, buffer, backend, sender.notify, ring.counts.report)
        self._flush_seconds = settings.flush_seconds
        self._loops = loops = BackgroundLoops(
            backend, counters, LastMetrics(framework.name, handlers, ring.counts, backend).write
        )
        loops.add(self._flusher.run, "z4j-flush", wake=ring.wake.set)
        loops.add(self.supervisor.run, "z4j-supervisor")
        loops.add(health.run, "z4j-health")
        loops.add(hub_lag.run, "z4j-hub-lag", wake=hub_lag.wake)
        loops.add(adopter.run, "z4j-adopt")
        loops.add(control_server.run, "z4j-control", wake=control_server.wake)
        loops.add(DuplicateAgentCheck(describe, backend).run, "z4j-duplicates")
        loops.add(registry.run, "z4j-registry", wake=registry.wake)
        if self.schedules.streams:
            loops.add(self.schedules.run, "z4j-schedules", wake=self.schedules.wake)

    def start(self) -> None:
        """Start the loops; wait at most ``CONNECT_GRACE`` seconds for adapters to connect."""
        self.engines.start_capture()
        self._loops.start()
        for name, run in self.engines.loops():
            self._loops.spawn(run, name, join=False)  # ``engines.disconnect`` waits for these loops
        connecting = self.backend.spawn(self._connect_adapters, name="z4j-adapters")
        if self.engines.uses_adapter_events:
            connecting.join(CONNECT_GRACE)  # so that no event of the first tasks is missed

    def record(self, event: Event) -> None:
        """Append one event of the host to the ring. Never waits, never raises."""
        self.ring.put((self.ring.counts.encode_model, event))

    def stop(self, seconds: float) -> None:
        """Stop within ``seconds``: flush, wait for acks, close the session and the store.

        The wait for acks ends after ``Z4J_FLUSH_SECONDS``.
        """
        backend = self.backend
        deadline = backend.now() + seconds
        self._loops.signal_stop()
        run_until(deadline, self.dispatcher.stop, backend)
        run_until(deadline, self._disconnect_adapters, backend)
        run_until(deadline, self._flusher.flush, backend)
        acks_deadline = min(deadline, backend.now() + self._flush_seconds)
        self._session_loops.sender.drain(acks_deadline, lambda: self.supervisor.is_active)
        self.supervisor.stop()
        self._loops.join(deadline)
        self.dispatcher.close()
        run_until(deadline, self.buffer.close, backend)
        self.ring.close()
        self.bridge.stop()
        backend.close()

    def stuck(self, seconds: float) -> list[str]:
        """Return the loops that have ended or whose current step takes longer than ``seconds``."""
        return sorted(self._loops.stuck(seconds) | self._session_loops.stuck(seconds))

    def _connect_adapters(self) -> None:
        try:
            self.engines.connect()
            self.schedules.connect()
        except AgentError:
            # The error is expected if the agent is stopped while its adapters connect.
            if not self._loops.stop_event.is_set():
                raise

    def _disconnect_adapters(self) -> None:
        self.engines.disconnect()
        self.schedules.disconnect()
