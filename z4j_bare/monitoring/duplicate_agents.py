"""Another agent that reports the same worker, such as a standalone one beside it, is named soon after the start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from z4j_bare import control

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.control import ControlClient

logger = logging.getLogger("z4j.runtime.rivals")

#: Seconds before each look: by the first a worker knows its own name, by the second a standalone agent its workers.
LOOKS = (5.0, 55.0)

#: Seconds for an answer. Whoever does not give it holds up the store's thread for as long, once.
PATIENCE = 0.2


class DuplicateAgentCheck:
    """Asks the agents of this ``Z4J_HOME`` which workers they report, and warns of those that are ours too.

    :param describe: what this agent says of itself, which has ``project``, ``workers`` by engine, and ``started_at``.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]], backend: BaseConcurrency) -> None:
        self._describe = describe
        self._backend = backend
        self._named: set[tuple[int, str]] = set()

    def run(self, stop_event: Any) -> None:
        """Look twice, then wait for ``stop_event`` (an ``IEvent``)."""
        for delay in LOOKS:
            if self._backend.wait(stop_event, delay):
                return
            self._look()
        self._backend.wait(stop_event)

    def _look(self) -> None:
        ok, desks = self._backend.offload(control.list_clients)
        own = self._describe()
        ours = workers_of(own)
        for desk in desks if ok and ours else ():
            other = self._ask(desk)
            # Ourselves are told by the start: in containers that share a volume every process has pid 1.
            if (
                other.get("project") == own["project"]
                and other.get("started_at") != own["started_at"]
            ):
                self._warn(desk.pid, ours & workers_of(other))

    def _ask(self, desk: ControlClient) -> dict[str, Any]:
        ok, answer = self._backend.offload(desk.request, control.STATUS, PATIENCE)
        return answer if ok else {}

    def _warn(self, pid: int, workers: Iterable[str]) -> None:
        for worker in sorted(workers):
            if (pid, worker) not in self._named:
                self._named.add((pid, worker))
                logger.warning(
                    "z4j: process %d reports %s too; each event arrives twice: end one of the two",
                    pid,
                    worker,
                )


def workers_of(agent: dict[str, Any]) -> set[str]:
    """Return the names of the workers that an agent reports, whatever their engine."""
    return {name for names in agent.get("workers", {}).values() for name in names}
