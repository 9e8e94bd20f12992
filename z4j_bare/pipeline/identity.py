"""The identity and status that the agent reports to the brain and to ``z4j-bare status``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from secrets import token_hex
from typing import TYPE_CHECKING

from z4j_bare.process import is_celery_worker
from z4j_bare.wire import frames

if TYPE_CHECKING:
    from z4j_core.models import Config
    from z4j_core.protocols import FrameworkAdapter

    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.engines.manager import EngineManager
    from z4j_bare.interfaces import ISchedulerHost
    from z4j_bare.monitoring.metrics import AgentMetrics
    from z4j_bare.pipeline.session import Supervisor


#: After the brain has turned the agent away, the agent reports a session as connected only when the
#: session is this many seconds old.
SETTLE_SECONDS = 5.0

#: This process's pid, and the time of the first ``hello`` in this process.
_first_start = (0, datetime.min.replace(tzinfo=UTC))


def _worker_started_at() -> datetime:
    """Return a time that is the same for all agents that run in this process one after another.

    The worker id contains this time. The brain keeps a row for each worker id, so a process keeps
    its row when its agent is restarted.
    """
    global _first_start
    if _first_start[0] != os.getpid():
        _first_start = (os.getpid(), datetime.now(UTC))
    return _first_start[1]


class AgentIdentity:
    """The project, framework, version, role and worker id of this run of the agent."""

    def __init__(
        self,
        config: Config,
        framework: FrameworkAdapter,
        engines: Mapping[str, EngineHost],
        schedulers: Sequence[ISchedulerHost],
    ) -> None:
        self.started_at = datetime.now(UTC)
        #: The identity in the last ``hello``, set by :meth:`hello`.
        self.current: frames.Identity
        self._config = config
        self._framework = framework
        self._engines = engines
        self._schedulers = {host.name: host for host in schedulers}
        self._version = version("z4j-bare")
        self._worker_suffix = ""

    def hello(self) -> bytes:
        """Return the ``hello`` frame with the current capabilities."""
        name, pid, started_at = self._framework.name, os.getpid(), _worker_started_at()
        started_ms = int(started_at.timestamp() * 1000)
        self.current = frames.Identity(
            framework=name,
            agent_version=self._version,
            worker_id=f"{name}-{pid}-{started_ms}{self._worker_suffix}",
            worker_pid=pid,
            worker_started_at=started_at,
            worker_role=self._role(),
            agent_name=self._config.agent_name,
            engines=tuple(self._engines),
            schedulers=tuple(self._schedulers),
            capabilities=self._capabilities(),
        )
        return frames.hello(self.current)

    def change_worker_id(self) -> None:
        """Use another worker id from the next ``hello`` on."""
        self._worker_suffix = f"-{token_hex(3)}"

    def describe(self) -> dict[str, object]:
        """Return the part of the status document that does not change, as plain JSON types."""
        return {
            "project": self._config.project_id,
            "brain_url": str(self._config.brain_url),
            "agent_name": self._config.agent_name,
            "framework": self._framework.name,
            "version": self._version,
            "role": self._role(),
            "started_at": self.started_at.isoformat(),
        }

    def _capabilities(self) -> dict[str, list[str]]:
        found = {name: list(host.capabilities()) for name, host in self._engines.items()}
        found.update({name: host.capabilities() for name, host in self._schedulers.items()})
        return found

    def _role(self) -> str | None:
        if self._config.worker_role:
            return self._config.worker_role
        if is_celery_worker():
            return "task"
        role = getattr(self._framework, "default_worker_role", None)
        return role() if callable(role) else role


class AgentStatus:
    """Collects the values that ``runtime.stats()`` and ``z4j-bare status`` report."""

    def __init__(
        self,
        identity: AgentIdentity,
        supervisor: Supervisor,
        engines: EngineManager,
        metrics: AgentMetrics,
        buffer: BufferManager,
    ) -> None:
        self.metrics = metrics
        self._identity = identity
        self._supervisor = supervisor
        self._engines = engines
        self._buffer = buffer

    def stats(self) -> dict[str, object]:
        """Return the counters and the session's id, as plain JSON types."""
        connection = self._supervisor.connection
        session_id = connection.hello_ack.session_id if connection else None
        return {"session_id": session_id, **self.metrics.stats()}

    def describe(self) -> dict[str, object]:
        """Return identity, connection and counters, as plain JSON types."""
        connection, turned_away = self._supervisor.connection, self._turned_away()
        return {
            "state": "running",
            **self._identity.describe(),
            "connected": connection is not None and not turned_away,
            "connected_at": connection.connected_at if connection else None,
            "turned_away": turned_away,
            "workers": self._engines.workers(),
            "advice": self._engines.advice(),
            "health": self.metrics.health(),
            "oldest_age_seconds": self._buffer.last_stats.oldest_age,
            **self.stats(),
        }

    def _turned_away(self) -> bool:
        """Whether the last session ended because the token has too many sessions.

        A new session changes the result only after ``SETTLE_SECONDS``, because the brain accepts a
        session before it turns the agent away.
        """
        connection = self._supervisor.connection
        age = 0.0 if connection is None else time.time() - connection.connected_at
        return self.metrics.turned_away and age < SETTLE_SECONDS
