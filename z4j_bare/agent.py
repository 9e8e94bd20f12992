"""One incarnation of the agent: the rooms put together, from ``start()`` to ``stop()``. A new start builds a new one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.buffer.adopt_loop import AdoptLoop
from z4j_bare.buffer.manager import BufferManager
from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.buffer.opener import open_store
from z4j_bare.buffer.recovery import Orphan
from z4j_bare.buffer.siblings import find_in_other_stores
from z4j_bare.commands import Dispatcher
from z4j_bare.control import RESTART, STATUS
from z4j_bare.engines.engine import describe_engine
from z4j_bare.engines.host import EngineHost
from z4j_bare.errors import AgentError, InterpreterShutdownError, RemoteError
from z4j_bare.events.encode import encode_model
from z4j_bare.events.redaction import merge_redaction
from z4j_bare.events.ring import Ring
from z4j_bare.events.source import EventSource
from z4j_bare.monitoring.control_server import Desk
from z4j_bare.monitoring.duplicate_agents import DuplicateAgentCheck
from z4j_bare.monitoring.health import HealthLoop
from z4j_bare.monitoring.hub_lag import HubLagMonitor
from z4j_bare.monitoring.metrics import AgentMetrics, Counters
from z4j_bare.monitoring.registry import RegistryLoop
from z4j_bare.pipeline.flush import FlushLoop
from z4j_bare.pipeline.heartbeat import HeartbeatLoop
from z4j_bare.pipeline.receive import ReceiveLoop
from z4j_bare.pipeline.send import SendLoop
from z4j_bare.pipeline.session import Supervisor
from z4j_bare.pipeline.watch import keep
from z4j_bare.process import is_celery_worker, ready_worker
from z4j_bare.schedules import ScheduleManager
from z4j_bare.settings import Settings, deployment_id, read_key, read_token
from z4j_bare.transport.auto import TransportFactory
from z4j_bare.wire import close_codes, frames

if TYPE_CHECKING:
    from pathlib import Path

    from z4j_core.models import Config, Event

    from z4j_bare.buffer.store import BufferStore
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.pipeline.link import Connection
    from z4j_bare.schedules.host import SchedulerHost

logger = logging.getLogger("z4j.runtime")

#: Seconds that a session's loops get to leave after its end.
LEAVE = 5.0
#: Longest wait in seconds of :meth:`Agent.start` for adapters to connect, which takes them milliseconds.
CONNECT_GRACE = 1.0


class Agent:
    """Everything that runs. Built on the host's thread without I/O; its loops do the rest."""

    def __init__(
        self,
        config: Config,
        framework: Any,
        engines: Sequence[Any],
        schedulers: Sequence[Any],
        settings: Settings,
        backend: BaseConcurrency,
    ) -> None:
        self.backend = backend
        self.counters = Counters()
        self.ring = Ring(settings.ring_events, settings.flush_events, backend.event())
        self._config = config
        self._framework = framework
        self._settings = settings
        self._started_at = datetime.now(UTC)
        self._worker_suffix = ""
        self._stop_event = backend.event()
        self._tasks: list[Any] = []
        self._chores: list[Any] = []
        self._sender: SendLoop | None = None
        wish = settings.transport if settings.transport != "auto" else config.transport
        self.routes = TransportFactory(
            str(config.brain_url), wish, self._token, settings, backend, dev_mode=config.dev_mode
        )
        self._version = version("z4j-bare")
        self.secret()  # a bad key must fail here, at the host's call, not in a loop
        self.buffer = BufferManager(
            self._open_store,
            backend,
            lambda: MemoryStore(max_rows=config.buffer_max_events),
            partial(find_in_other_stores, config.buffer_path),
        )
        self.bridge = Bridge(backend)
        self.sources: list[EventSource] = []
        self.hosts = {engine.name: self._host(engine) for engine in engines}
        self.flusher = FlushLoop(
            self.ring,
            self.buffer,
            backend,
            self.counters,
            interval=settings.flush_interval,
            most=settings.flush_events,
            stored=self._stored,
        )
        self._adopter = AdoptLoop(
            str(config.buffer_path), self._claim, self.buffer, backend, self._wake_sender
        )
        self.schedules = ScheduleManager(
            self._hosted(schedulers),
            self.buffer,
            backend,
            self._wake_sender,
            settings.schedule_resync,
        )
        self.dispatcher = Dispatcher(
            self.hosts,
            self.buffer,
            self._wake_sender,
            backend,
            self.counters,
            settings.command_workers,
            self.schedules,
        )
        self.supervisor = Supervisor(
            self.routes.create, self._hello, self.secret, self._serve, backend, self.counters
        )
        self.desk = Desk(framework.name, {STATUS: self.describe, RESTART: self._restart}, backend)
        hints = getattr(framework, "discovery_hints", None)
        dev = config.dev_mode or settings.dev_mode
        self.registry = RegistryLoop(
            self.hosts, hints, lambda: self.supervisor.link, backend, dev=dev
        )
        self.lateness = HubLagMonitor(backend)
        self._health = HealthLoop(self.hosts, self.bridge, backend, ready_worker())
        self.figures = AgentMetrics(
            ring=self.ring,
            counters=self.counters,
            buffer=self.buffer,
            backend=backend,
            lateness=self.lateness,
            started=self._started_at.timestamp(),
            health=self._health.latest,
            dropped=self._dropped,
            restarts=lambda: (
                self.bridge.restarts + sum(source.failures() for source in self.sources)
            ),
        )

    def start(self) -> None:
        """Spawn the loops and return; nothing here waits for the disk or the brain, and hardly for an adapter."""
        for source in self.sources:
            source.connect()
        loops: list[tuple[str, Callable[[Any], None]]] = [
            ("z4j-flush", self.flusher.run),
            ("z4j-supervisor", self.supervisor.run),
            ("z4j-health", self._health.run),
            ("z4j-lateness", self.lateness.run),
            ("z4j-adopt", self._adopter.run),
            ("z4j-desk", self.desk.run),
            ("z4j-rivals", DuplicateAgentCheck(self.describe, self.backend).run),
            ("z4j-registry", self.registry.run),
        ]
        if self.schedules.streams:
            loops.append(("z4j-schedules", self.schedules.run))
        for name, run in loops:
            self._tasks.append(keep(run, name, self._stop_event, self.backend, self.counters))
        for name, run in (loop for source in self.sources for loop in source.loops()):
            keep(
                run, name, self._stop_event, self.backend, self.counters
            )  # a source's end is waited for by disconnect()
        connecting = self.backend.spawn(self._connect_adapters, name="z4j-adapters")
        if any(source.uses_adapter_events for source in self.sources):
            connecting.join(CONNECT_GRACE)  # or the host's first tasks would run unheard

    def record(self, event: Event) -> None:
        """Take one event of the host's own making. Never waits, never raises."""
        self.ring.put((encode_model, event))

    def secret(self) -> bytes:
        """Return the project's key. Raises ``HostConfigurationError`` naming the setting."""
        return read_key(self._config, self._settings)

    def stop(self, seconds: float) -> None:
        """Flush, wait for acks within the flush budget, say goodbye; all of it within ``seconds``."""
        deadline = self.backend.now() + seconds
        self._stop_event.set()
        self.ring.wake.set()
        self.desk.wake()
        self.lateness.wake()
        self.registry.wake()
        self.schedules.wake()
        self._within(deadline, self.dispatcher.stop)
        self._within(deadline, self._disconnect_adapters)
        self._within(deadline, self.flusher.flush)
        self._await_acks(min(deadline, self.backend.now() + self._settings.flush_seconds))
        self.supervisor.end()
        for task in self._tasks:
            task.join(max(0.0, deadline - self.backend.now()))
        self.dispatcher.close()
        self._within(deadline, self.buffer.close)
        self.bridge.stop()
        self.backend.close()

    def stats(self) -> dict[str, Any]:
        """Return the counters as plain JSON types."""
        link = self.supervisor.link
        return {"session_id": link.hello_ack.session_id if link else None, **self.figures.stats()}

    def stuck(self, seconds: float) -> list[str]:
        """Return the names of the loops that have ended, or have been busy with one thing for longer than that."""
        hung = {task.name for task in self._tasks + self._chores if task.stuck(seconds)}
        return sorted(hung.union(task.name for task in self._tasks if not task.alive()))

    def describe(self) -> dict[str, Any]:
        """Return who this is and how it is, for ``z4j-bare status``."""
        config, link, sources = self._config, self.supervisor.link, self.sources
        return {
            "state": "running",
            "project": config.project_id,
            "brain_url": str(config.brain_url),
            "agent_name": config.agent_name,
            "framework": self._framework.name,
            "version": self._version,
            "role": config.worker_role or self._role(),
            "started_at": self._started_at.isoformat(),
            "connected": link is not None,
            "connected_at": self.supervisor.connected_at if link else None,
            "workers": {source.engine: sorted(source.presence.workers) for source in sources},
            "oldest_age_seconds": self.buffer.last_stats.oldest_age,
            **self.stats(),
        }

    def _restart(self) -> dict[str, Any]:
        self.supervisor.reconnect()
        return {}

    def capabilities(self) -> dict[str, list[str]]:
        """Return what each adapter can do just now; asked again at every connect, because answers can change."""
        found = {name: list(host.capabilities()) for name, host in self.hosts.items()}
        found.update(
            {name: stream.host.capabilities() for name, stream in self.schedules.streams.items()}
        )
        return found

    def _host(self, engine: Any) -> EngineHost:
        merge_redaction(
            engine, self._config
        )  # first: the source goes by the merged patterns, and a bad one raises
        description = describe_engine(engine)
        source = description.make_source(self.ring, self._settings, self.backend, ready_worker())
        self.sources.append(source)
        host = EngineHost(engine, self.bridge, self.backend, source.record)
        if description.restarts_by_exit():
            from z4j_bare.commands.process_restart import ProcessRestart

            own, grace = source.presence.workers.keys(), self._settings.restart_grace
            host.process_restart = ProcessRestart(host.name, own, self.stop, self.backend, grace)
        return host

    def _hosted(self, schedulers: Sequence[Any]) -> list[SchedulerHost]:
        if not schedulers:
            return []
        from z4j_bare.schedules.host import SchedulerHost  # most workers have none

        return [SchedulerHost(scheduler, self.bridge, self._config) for scheduler in schedulers]

    def _dropped(self) -> dict[str, int]:
        hosts = self.hosts.values()
        return {
            host.name: host.dropped() + source.dropped()
            for host, source in zip(hosts, self.sources, strict=True)
        }

    def _open_store(self) -> BufferStore:
        config = self._config
        return open_store(
            config.buffer_path,
            max_rows=config.buffer_max_events,
            max_bytes=config.buffer_max_bytes,
            deployment=deployment_id(config, self.secret()),
        )

    def _claim(self, path: Path) -> Orphan:
        config = self._config
        ours = deployment_id(config, self.secret())
        return Orphan(
            path, ours, max_rows=config.buffer_max_events, max_bytes=config.buffer_max_bytes
        )

    def _token(self) -> str:
        return read_token(self._config, self._settings)

    def _hello(self) -> bytes:
        config, pid = self._config, os.getpid()
        self._identity = frames.Identity(
            framework=self._framework.name,
            agent_version=self._version,
            worker_id=f"{self._framework.name}-{pid}-{int(self._started_at.timestamp() * 1000)}{self._worker_suffix}",
            worker_pid=pid,
            worker_started_at=self._started_at,
            worker_role=config.worker_role or self._role(),
            agent_name=config.agent_name,
            engines=tuple(self.hosts),
            schedulers=tuple(self.schedules.streams),
            capabilities=self.capabilities(),
        )
        return frames.hello(self._identity)

    def _status(self) -> bytes:
        """Return an ``agent_status``; a session's first one tells of the failures before it."""
        streaks, self.supervisor.overcome = self.supervisor.overcome, {}
        return self.figures.status(streaks, self.supervisor.connected_at, self._identity)

    def _role(self) -> str | None:
        if is_celery_worker():
            return "task"
        role = getattr(self._framework, "default_worker_role", None)
        return role() if callable(role) else role

    def _serve(self, link: Connection) -> None:
        for source in self.sources:
            source.presence.announce("worker.online")
        self.registry.wake()
        sender = self._sender = SendLoop(link, self.buffer, self.backend, self.counters)
        beat = HeartbeatLoop(
            link,
            self.backend,
            self.counters,
            self.figures.heartbeat,
            interval=min(float(self._config.heartbeat_seconds), link.hello_ack.heartbeat_seconds),
            enabled=self._settings.heartbeat,
            status=None if self._settings.status_disabled else self._status,
        )
        failures: list[AgentError] = []
        chores: list[tuple[Callable[[], None], str]] = [
            (sender.run, "z4j-send"),
            (beat.run, "z4j-heartbeat"),
        ]
        if self.routes.needs_recovery(link):
            chores.append((partial(self.routes.monitor_recovery, link), "z4j-fallback"))
        self._chores = [
            self.backend.spawn(self._in_session, link, run, name, failures, name=name)
            for run, name in chores
        ]
        try:
            ReceiveLoop(link, sender.acked, self.dispatcher.submit).run()
        except AgentError as error:
            if failures or not link.closing.is_set():  # else we broke the line ourselves
                failures.append(error)
        finally:
            link.shut()
            self.schedules.lapse()
            self._sender = None
            for task in self._chores:
                task.join(LEAVE)
        if failures:
            raise self._conclude(sender, failures)

    def _conclude(self, sender: SendLoop, failures: list[AgentError]) -> AgentError:
        """Return what ended a session: a sender sees no more than a broken line, the reader may have read why."""
        told = [error for error in failures if getattr(error, "code", None) is not None]
        error = next(
            (each for each in failures if isinstance(each, RemoteError)), (told or failures)[0]
        )
        if getattr(error, "code", None) == close_codes.SESSION_REPLACED:
            self._worker_suffix = (
                f"-{token_hex(3)}"  # under the old id the two would replace each other for ever
            )
        return sender.judge(error)

    def _in_session(
        self, link: Connection, run: Callable[[], None], name: str, failures: list[AgentError]
    ) -> None:
        try:
            run()
        except AgentError as error:
            if not link.closing.is_set():
                failures.append(error)
        except Exception as error:
            self.counters.restarts[name] += 1
            logger.exception(
                "z4j: loop %s died; its session ends and a new one begins. Please report it", name
            )
            failures.append(
                AgentError(f"loop {name} died of {type(error).__name__}")
            )  # an error: the next one backs off
        finally:
            if not self.backend.forked():
                link.shut()

    def _wake_sender(self) -> None:
        link = self.supervisor.link
        if link is not None:
            link.wake.set()

    def _stored(self, events: int) -> None:
        if self._sender is not None:
            self._sender.stored(events)

    def _connect_adapters(self) -> None:
        try:
            for host, source in zip(self.hosts.values(), self.sources, strict=True):
                host.connect(events=source.uses_adapter_events)
            self.schedules.connect()
        except AgentError:
            if not self._stop_event.is_set():  # a process that ends while it starts is no error
                raise

    def _disconnect_adapters(self) -> None:
        for source in self.sources:
            source.disconnect()
        for host in self.hosts.values():
            host.disconnect()
        self.schedules.disconnect()

    def _await_acks(self, deadline: float) -> None:
        while self.supervisor.busy and self.backend.now() < deadline:
            sender = self._sender
            if sender is not None:
                sender.hurry()
            if (sender is None or sender.idle()) and not self.buffer.stats().rows:
                return
            self.backend.sleep(0.02)

    def _within(self, deadline: float, function: Callable[[], object]) -> None:
        try:
            task = self.backend.spawn(function, name="z4j-stop")
        except InterpreterShutdownError:
            function()
            return
        task.join(max(0.0, deadline - self.backend.now()))
