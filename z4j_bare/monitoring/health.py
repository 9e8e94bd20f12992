"""The engines' health: asked in turn, in a task of its own, with the last good answer kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from z4j_bare.asyncio_bridge.bridge import Bridge
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost

logger = logging.getLogger("z4j.runtime.health")

#: Seconds between two rounds, and for one answer; a call that overruns keeps its worker, and its answer comes later.
INTERVAL = 20.0
PATIENCE = 5.0


class HealthLoop:
    """Asks every engine, and for Celery the broker and the worker.

    :param consumer: the Consumer of the worker that this process is, or ``None``.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        bridge: Bridge,
        backend: BaseConcurrency,
        consumer: Any,
    ) -> None:
        self._backend = backend
        self._answers: dict[str, str] = {}
        self._rounds: list[Callable[[], Mapping[str, str]]] = []
        for host in hosts.values():
            probes = host.description.make_probes(consumer)
            self._rounds += [
                CachedProbe(bridge, probe.run, probe.on_error) for probe in probes
            ] or [_engine(host)]

    def run(self, stop_event: Any) -> None:
        """Ask until ``stop_event`` is set."""
        while not stop_event.is_set():
            for ask in self._rounds:
                self._answers.update(ask())
            self._backend.wait(stop_event, INTERVAL)

    def latest(self) -> dict[str, str]:
        """Return the last good answers."""
        return dict(self._answers)


class CachedProbe:
    """One question, asked off the loop: at most :data:`PATIENCE` seconds are waited, and never twice at a time.

    :param question: returns entries for the heartbeat; what it returns too late is this object's next answer.
    :param failed: makes the entries that tell of an error.
    """

    def __init__(
        self,
        bridge: Bridge,
        question: Callable[[], Mapping[str, str]],
        failed: Callable[[Exception], Mapping[str, str]],
    ) -> None:
        self._bridge = bridge
        self._question = question
        self._failed = failed
        self._asking = False
        self._answer: Mapping[str, str] = {}

    def __call__(self) -> Mapping[str, str]:
        """Return the newest answer; never raises."""
        try:
            if self._asking:
                raise TimeoutError
            self._bridge.call(self._ask, timeout=PATIENCE)
        except Exception as error:
            logger.debug("z4j: a health check failed: %s", type(error).__name__)
            return self._failed(error)
        return self._answer

    def _ask(self) -> None:
        self._asking = True
        try:
            self._answer = self._question()
        finally:
            self._asking = False


def _engine(host: EngineHost) -> Callable[[], Mapping[str, str]]:
    return lambda: host.health(PATIENCE)
