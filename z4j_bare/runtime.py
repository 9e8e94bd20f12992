"""``AgentRuntime``: the object that adapters build, start, stop and ask. Lifecycle, and nothing else."""

from __future__ import annotations

import logging
import threading
from collections import deque
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency import build, choose, detect
from z4j_bare.process import is_importing_application
from z4j_bare.settings import Settings, load_settings

if TYPE_CHECKING:
    from z4j_core.models import Config, Event

    from z4j_bare.agent import Agent

logger = logging.getLogger("z4j.runtime")

#: Events kept under ``Z4J_TESTING``.
MAX_RECORDED_EVENTS = 1_000


class RuntimeState(StrEnum):
    """Where a runtime is in its life."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class AgentRuntime:
    """The agent of one process.

    :param config: z4j_core's ``Config``; kept as it is, under ``config``.
    :param framework: a framework adapter, kept under ``framework``.
    :param engines: queue engine adapters, keyed by their ``name`` under ``engines``; of two with one name the last wins.
    :param schedulers: scheduler adapters, likewise.
    :param settings: what ``Config`` has no field for; read from ``Z4J_*`` when missing.

    Building one does no I/O and starts nothing.
    """

    def __init__(
        self,
        *,
        config: Config,
        framework: Any,
        engines: list[Any],
        schedulers: list[Any] | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.config = config
        self.framework = framework
        self.engines = {engine.name: engine for engine in engines}
        self.schedulers = {scheduler.name: scheduler for scheduler in schedulers or []}
        #: Under ``Z4J_TESTING``, the last events that ``record_event`` was given; ``None`` otherwise.
        self.recorded: deque[Event] | None = None
        self._settings = settings
        self._state = RuntimeState.STOPPED
        self._agent: Agent | None = None
        self._ever_ran = False
        self._lock = threading.Lock()

    @property
    def state(self) -> RuntimeState:
        """Where the runtime is in its life; in a forked child always ``stopped``."""
        agent = self._agent
        return RuntimeState.STOPPED if agent is not None and agent.backend.forked() else self._state

    @property
    def has_stopped(self) -> bool:
        """Whether it has run and been stopped, so that another may take its place in the process."""
        return self._ever_ran and self.state is RuntimeState.STOPPED

    def start(self) -> None:
        """Start the loops and return at once; connecting goes on in the background. Idempotent.

        Does nothing while a command of ours imports the application that calls it. Raises ``HostConfigurationError`` for a
        setting that is missing or wrong, or a process it cannot live in.
        """
        if is_importing_application():
            logger.debug("z4j: the application is only being looked at; its agent stays out")
            return
        with self._lock:
            if self.state is not RuntimeState.STOPPED:
                return
            self._state = RuntimeState.STARTING
        try:
            agent = self._build()
        except BaseException:
            self._state = RuntimeState.STOPPED
            raise
        if agent is None:
            self._state = RuntimeState.STOPPED
            return
        self._agent = agent
        self._ever_ran = True
        self._state = RuntimeState.RUNNING
        agent.start()
        logger.info(
            "z4j: agent started for project %s on %s", self.config.project_id, agent.backend.name
        )

    def stop(self, timeout: float = 5.0) -> None:
        """Stop within ``timeout`` seconds, hung peer or not. Idempotent; does nothing in a forked child."""
        with self._lock:
            agent = self._agent
            if agent is None or self.state is not RuntimeState.RUNNING:
                return
            self._state = RuntimeState.STOPPING
        try:
            agent.stop(timeout)
        finally:
            self._agent = None
            self._state = RuntimeState.STOPPED

    def record_event(self, event: Event) -> None:
        """Take one event: microseconds, no I/O, never raises. Silent when stopped and in a forked child."""
        agent = self._agent
        if agent is not None and not agent.backend.forked():
            agent.record(event)
        elif self.recorded is not None:
            self.recorded.append(event)

    def buffer_size(self) -> int:
        """Return the rows in the buffer, as of a second ago, or a few where there is no session."""
        agent = self._agent
        return 0 if agent is None else agent.buffer.last_stats.rows

    def request_reconnect(self) -> None:
        """End the session, if there is one, and connect anew at once. Callable from any thread."""
        agent = self._agent
        if agent is not None and not agent.backend.forked():
            agent.supervisor.reconnect()

    def supervisor_state(self) -> dict[str, Any]:
        """Return ``state``, the failure streaks and ``session_id``, under the existing agent's keys."""
        agent = self._agent
        streaks = agent.supervisor.backoff.streaks if agent else {}
        link = agent.supervisor.link if agent else None
        return {
            "state": str(self.state),
            "auth_error_count": streaks.get("auth", 0),
            "protocol_error_count": streaks.get("protocol", 0),
            "connection_error_count": streaks.get("connection", 0),
            "session_id": link.hello_ack.session_id if link else None,
        }

    def stats(self) -> dict[str, Any]:
        """Return the counters: produced, stored, sent, acked, lost by reason, and how the agent is."""
        agent = self._agent
        return {"state": str(self.state), **(agent.stats() if agent else {})}

    def stuck(self, seconds: float) -> list[str]:
        """Return the names of the agent's loops that do not go on: ended, or busy with one thing for longer than that.

        A loop that waits, for the disk or the brain, is none of them: a new process would wait as well.
        """
        agent = self._agent
        return (
            [] if agent is None or self.state is not RuntimeState.RUNNING else agent.stuck(seconds)
        )

    def reinit_after_fork(self) -> None:
        """Start over in a forked child, with a buffer of its own. Does nothing in the process that started it."""
        agent = self._agent
        if agent is None or not agent.backend.forked():
            return
        self._agent = None
        self._state = RuntimeState.STOPPED
        self._lock = threading.Lock()  # the parent may have held it at the fork
        self.config = self.config.model_copy(
            update={"buffer_path": Path(self.config.buffer_path).with_name("fork.sqlite")}
        )
        self.start()

    def _build(self) -> Agent | None:
        settings = self._settings or load_settings()
        if settings.disabled or settings.testing:
            self.recorded = deque(maxlen=MAX_RECORDED_EVENTS) if settings.testing else None
            logger.info(
                "z4j: %s is set; the agent stays out",
                "Z4J_DISABLED" if settings.disabled else "Z4J_TESTING",
            )
            return None
        from z4j_bare.agent import Agent

        backend = build(choose(settings.concurrency, detect()))
        return Agent(
            self.config,
            self.framework,
            list(self.engines.values()),
            list(self.schedulers.values()),
            settings,
            backend,
        )
