"""Detects a second agent that reports the same worker, for example a standalone agent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from z4j_bare import control

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.control import ControlClient
    from z4j_bare.interfaces import IEvent

logger = logging.getLogger("z4j.runtime.monitoring.duplicate_agents")

#: Seconds before the first check, and from the first check to the second. At the first check the
#: name of this worker is known. At the second check a standalone agent has found all workers.
CHECK_DELAYS = (5.0, 55.0)

#: Seconds to wait for the answer of another agent.
#: The timeout is short, because the wait blocks the native thread that the store uses.
REQUEST_TIMEOUT = 0.2


class DuplicateAgentCheck:
    """Warns about workers that are also reported by another agent with the same ``Z4J_HOME``.

    :param describe: returns the status of this agent: ``project``, ``started_at``, and ``workers``
        by engine.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]], backend: BaseConcurrency) -> None:
        self._describe = describe
        self._backend = backend
        self._warned: set[tuple[int, str]] = set()

    def run(self, stop_event: IEvent) -> None:
        """Check after each of the :data:`CHECK_DELAYS`, then wait for ``stop_event``."""
        for delay in CHECK_DELAYS:
            if self._backend.wait(stop_event, delay):
                return
            self._check()
        self._backend.wait(stop_event)

    def _check(self) -> None:
        ok, clients = self._backend.offload(control.list_clients)
        own = self._describe()
        own_workers = workers_of(own)
        for client in clients if ok and own_workers else ():
            other = self._request_status(client)
            # The start time identifies an agent. The pid does not, because containers can share the
            # volume, and the agent of each container has pid 1.
            if (
                other.get("project") == own["project"]
                and other.get("started_at") != own["started_at"]
            ):
                self._warn(client.pid, own_workers & workers_of(other))

    def _request_status(self, client: ControlClient) -> dict[str, Any]:
        ok, answer = self._backend.offload(client.request, control.STATUS, REQUEST_TIMEOUT)
        return answer if ok else {}

    def _warn(self, pid: int, workers: Iterable[str]) -> None:
        for worker in sorted(workers):
            if (pid, worker) not in self._warned:
                self._warned.add((pid, worker))
                logger.warning(
                    "z4j: the agent in process %d also reports worker %s, so the brain receives"
                    " each event twice: stop one of the two agents",
                    pid,
                    worker,
                )


def workers_of(status: Mapping[str, Any]) -> set[str]:
    """Return the names of the workers of all engines in an agent's status."""
    return {name for names in status.get("workers", {}).values() for name in names}
