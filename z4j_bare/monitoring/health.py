"""Runs the health checks of the engines. The heartbeat reports the results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer

    from z4j_bare.asyncio_bridge.bridge import Bridge
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.interfaces import IEvent

logger = logging.getLogger("z4j.runtime.monitoring.health")

#: Seconds from the end of one round of checks to the start of the next round.
INTERVAL = 20.0

#: Seconds to wait for one check.
#: A check that takes longer continues to occupy a worker of the bridge.
CHECK_TIMEOUT = 5.0


class HealthLoop:
    """Runs the health checks of all engines in turn and keeps the last results.

    :param consumer: the Celery consumer if this process is a Celery worker.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        bridge: Bridge,
        backend: BaseConcurrency,
        consumer: Consumer | None,
    ) -> None:
        self._backend = backend
        self._results: dict[str, str] = {}
        self._probes: list[Callable[[], Mapping[str, str]]] = []
        for host in hosts.values():
            probes = host.description.make_probes(consumer)
            if probes:
                self._probes += [CachedProbe(bridge, probe.run, probe.on_error) for probe in probes]
            else:
                self._probes.append(partial(host.health, CHECK_TIMEOUT))

    def run(self, stop_event: IEvent) -> None:
        """Run the checks every :data:`INTERVAL` seconds until ``stop_event`` is set."""
        while not stop_event.is_set():
            for probe in self._probes:
                self._results.update(probe())
            self._backend.wait(stop_event, INTERVAL)

    def latest(self) -> dict[str, str]:
        """Return the last result of each check."""
        return dict(self._results)


class CachedProbe:
    """A blocking health check that delays the caller for at most :data:`CHECK_TIMEOUT` seconds.

    A check that is still running is not started again. A result that arrives after the timeout is
    returned by the next call.

    :param check: returns items for the heartbeat.
    :param on_error: returns the items that report an error of the check.
    """

    def __init__(
        self,
        bridge: Bridge,
        check: Callable[[], Mapping[str, str]],
        on_error: Callable[[Exception], Mapping[str, str]],
    ) -> None:
        self._bridge = bridge
        self._check = check
        self._on_error = on_error
        self._running = False
        self._result: Mapping[str, str] = {}

    def __call__(self) -> Mapping[str, str]:
        """Run the check; return its result, or the items for its error. Never raises."""
        try:
            if self._running:
                raise TimeoutError
            self._bridge.call(self._run, timeout=CHECK_TIMEOUT)
        except Exception as error:
            logger.debug("z4j: health check failed: %s", type(error).__name__)
            return self._on_error(error)
        return self._result

    def _run(self) -> None:
        self._running = True
        try:
            self._result = self._check()
        finally:
            self._running = False
