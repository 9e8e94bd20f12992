"""The engines' health: asked in turn, in a task of its own, with the last good answer kept.

``get_health`` of the Celery adapter takes 10 s when its worker does not answer (``adapter-surface`` 2.11), so a heartbeat
must never wait for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from z4j_bare.capture.names import safe_name
from z4j_bare.health.broker import BrokerProbe, queue_names

if TYPE_CHECKING:
    from z4j_bare.adapters.bridge import Bridge
    from z4j_bare.adapters.engines import EngineHost
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.health")

#: Seconds between two rounds, and for one answer; a call that overruns keeps its worker, and its answer comes later.
INTERVAL = 20.0
PATIENCE = 5.0


class HealthLoop:
    """Asks every engine, and for Celery the broker itself.

    :param consumer: the Consumer of the worker that this process is, or ``None``.
    """

    def __init__(self, hosts: Mapping[str, EngineHost], bridge: Bridge, seam: BaseConcurrency, consumer: Any) -> None:
        self._seam = seam
        self._bridge = bridge
        self._answers: dict[str, str] = {}
        self._rounds: list[Callable[[], Mapping[str, str]]] = []
        for host in hosts.values():
            self._rounds.append(lambda host=host: self._engine(host))  # type: ignore[misc]
            app = getattr(host.engine, "celery_app", None)
            if app is not None:
                # After the adapter's own answer, whose broker figures are no evidence.
                self._rounds.append(self._broker(BrokerProbe(host.name, app, queue_names(app, consumer))))

    def run(self, stopping: Any) -> None:
        """Ask until ``stopping`` is set."""
        while not stopping.is_set():
            for ask in self._rounds:
                self._answers.update(ask())
            self._seam.pause(stopping, INTERVAL)

    def latest(self) -> dict[str, str]:
        """Return the last good answers."""
        return dict(self._answers)

    def _engine(self, host: EngineHost) -> Mapping[str, str]:
        answer = dict(host.health(PATIENCE))
        details = answer.get(f"{host.name}.worker_details")
        redaction = getattr(host.engine, "redaction", None)
        if details and redaction is not None:
            answer[f"{host.name}.worker_details"] = renamed(details, redaction.value_matches)
        return answer

    def _broker(self, probe: BrokerProbe) -> Callable[[], Mapping[str, str]]:
        def ask() -> Mapping[str, str]:
            try:
                answer: Mapping[str, str] = self._bridge.call(probe, timeout=PATIENCE)
            except Exception as error:
                logger.debug("z4j: the broker did not answer: %s", type(error).__name__)
                return {f"{probe.engine}.broker_connected": "False", f"{probe.engine}.broker_error": type(error).__name__}
            return answer

        return ask


def renamed(details: str, matches: Callable[[str], bool]) -> str:
    """Return worker details (JSON, by worker name) under the names that events use; see :func:`safe_name`."""
    try:
        workers = json.loads(details)
    except ValueError:
        return details
    return json.dumps({safe_name(name, matches): facts for name, facts in workers.items()})
