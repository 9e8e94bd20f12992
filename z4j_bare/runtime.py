"""The agent's lifecycle. Adapters build, start, query and stop an ``AgentRuntime``."""

from __future__ import annotations

import logging
import threading
from collections import deque
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_bare import home
from z4j_bare.concurrency import build, choose, detect
from z4j_bare.monitoring.recent_log import start_recording
from z4j_bare.process import is_importing_application
from z4j_bare.safety import safe_call
from z4j_bare.settings import Settings, load_settings

if TYPE_CHECKING:
    from z4j_core.models import Config, Event

    from z4j_bare.agent import Agent

logger = logging.getLogger("z4j.runtime.runtime")

#: Maximum number of events in ``AgentRuntime.recorded``. The oldest events are dropped.
MAX_RECORDED_EVENTS = 1_000


@cache
def _recommend_gevent() -> None:
    """Log that eventlet is at its end of life; the cache limits the line to one per process."""
    logger.info(
        "z4j: eventlet is at its end of life and gets no new features: this agent supports it only"
        " while it works with this Python; plan the change to gevent, see"
        " docs/migration.md#from-eventlet"
    )


class RuntimeState(StrEnum):
    """The lifecycle state of a runtime."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


class AgentRuntime:
    """The agent of one process. The constructor does no I/O and starts nothing.

    :param engines: queue engine adapters. The attribute ``engines`` contains them by name.
    :param schedulers: scheduler adapters. The attribute ``schedulers`` contains them by name.
    :param settings: settings that ``Config`` does not have; by default read from ``Z4J_*`` at
        start.
    """

    def __init__(
        self,
        *,
        config: Config,
        framework: object,
        engines: list[Any],
        schedulers: list[Any] | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.config = config
        self.framework: Any = framework
        self.engines = {engine.name: engine for engine in engines}
        self.schedulers = {scheduler.name: scheduler for scheduler in schedulers or []}
        #: The latest events of ``record_event`` if ``Z4J_TESTING`` is set, otherwise ``None``.
        self.recorded: deque[Event] | None = None
        self._settings = settings
        self._state = RuntimeState.STOPPED
        self._agent: Agent | None = None
        self._ever_ran = False
        self._lock = threading.Lock()

    @property
    def state(self) -> RuntimeState:
        """The lifecycle state; always ``stopped`` in a forked child."""
        agent = self._agent
        return RuntimeState.STOPPED if agent is not None and agent.backend.forked() else self._state

    @property
    def has_stopped(self) -> bool:
        """Whether the runtime ran and was stopped, so that the process may install another."""
        return self._ever_ran and self.state is RuntimeState.STOPPED

    def start(self) -> None:
        """Start the agent's loops, which connect in the background. Idempotent.

        Does nothing while a z4j-bare command imports the application.

        :raises HostConfigurationError: a setting is missing or wrong, or the agent cannot run in
            this process.
        """
        if is_importing_application():
            logger.debug(
                "z4j: not starting: the application is being imported by a z4j-bare command"
            )
            return
        with self._lock:
            if self.state is not RuntimeState.STOPPED:
                return
            self._state = RuntimeState.STARTING
        start_recording()
        try:
            agent = self._build()
        except BaseException:
            self._state = RuntimeState.STOPPED
            raise
        if agent is None:
            self._state = RuntimeState.STOPPED
            return
        self._agent = agent
        self._state = RuntimeState.RUNNING
        try:
            agent.start()
        except BaseException:
            # Some loops may already run. They must end, so that a later start can succeed.
            safe_call(self.stop)
            raise
        self._ever_ran = True
        logger.info(
            "z4j: agent started for project %s on %s", self.config.project_id, agent.backend.name
        )
        if agent.backend.name == "eventlet":
            _recommend_gevent()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop within ``timeout`` seconds, even if the brain does not respond. Idempotent.

        Does nothing in a forked child.
        """
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
        """Append one event to the ring. Takes microseconds, does no I/O and never raises.

        A stopped runtime and a forked child ignore the event. With ``Z4J_TESTING`` the event is
        appended to ``recorded`` instead.
        """
        agent = self._agent
        if agent is not None and not agent.backend.forked():
            agent.record(event)
        elif self.recorded is not None:
            self.recorded.append(event)

    def buffer_size(self) -> int:
        """Return the number of rows in the buffer, at most a few seconds old."""
        agent = self._agent
        return 0 if agent is None else agent.buffer.last_stats.rows

    def request_reconnect(self) -> None:
        """End the current session and reconnect immediately. May be called from any thread."""
        agent = self._agent
        if agent is not None and not agent.backend.forked():
            agent.supervisor.reconnect()

    def supervisor_state(self) -> dict[str, Any]:
        """Return the state, the consecutive failures by kind, and the session id.

        The keys are those of z4j-bare 1.13.0.
        """
        agent = self._agent
        streaks = agent.supervisor.backoff.streaks if agent else {}
        connection = agent.supervisor.connection if agent else None
        return {
            "state": str(self.state),
            "auth_error_count": streaks.get("auth", 0),
            "protocol_error_count": streaks.get("protocol", 0),
            "connection_error_count": streaks.get("connection", 0),
            "session_id": connection.hello_ack.session_id if connection else None,
        }

    def stats(self) -> dict[str, Any]:
        """Return the event counters, the losses by reason, and the agent's health."""
        agent = self._agent
        return {"state": str(self.state), **(agent.status.stats() if agent else {})}

    def stuck(self, seconds: float) -> list[str]:
        """Return the names of loops that ended or have not yielded for ``seconds`` seconds.

        A loop that waits for the disk or the brain is not stuck, because a restart would not help.
        """
        agent = self._agent
        if agent is None or self.state is not RuntimeState.RUNNING:
            return []
        return agent.stuck(seconds)

    def reinit_after_fork(self) -> None:
        """Start a new agent with its own buffer in a forked child. Does nothing in the parent."""
        agent = self._agent
        if agent is None or not agent.backend.forked():
            return
        self._agent = None
        self._state = RuntimeState.STOPPED
        self._lock = threading.Lock()  # the parent may have held the old lock at the fork
        self.config = self.config.model_copy(
            update={"buffer_path": Path(self.config.buffer_path).with_name("fork.sqlite")}
        )
        self.start()

    def _settle_home(self) -> None:
        """Move the buffer and log a warning if the state directory is unusable for this user.

        An adapter may have built the configuration before the directory was checked, and Celery may
        have changed the user since.
        """
        home.settle_home()
        path = home.move_from_replaced(Path(self.config.buffer_path))
        self.config = self.config.model_copy(update={"buffer_path": path})
        notice = home.take_notice()
        if notice:
            logger.warning("z4j: %s", notice)

    def _build(self) -> Agent | None:
        settings = self._settings or load_settings()
        if settings.disabled or settings.testing:
            self.recorded = deque(maxlen=MAX_RECORDED_EVENTS) if settings.testing else None
            logger.info(
                "z4j: not starting the agent: %s is set",
                "Z4J_DISABLED" if settings.disabled else "Z4J_TESTING",
            )
            return None
        from z4j_bare.agent import Agent

        self._settle_home()
        backend = build(choose(settings.concurrency, detect()))
        return Agent(
            self.config,
            self.framework,
            list(self.engines.values()),
            list(self.schedulers.values()),
            settings,
            backend,
        )
