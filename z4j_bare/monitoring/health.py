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

#: Seconds from the end of a check to its next run.
INTERVAL = 20.0

#: Seconds from the end of a check to its next run while the check's ``suspect`` returns true.
SUSPECT_INTERVAL = 4.0

#: Seconds between two calls of ``suspect``, which reads only memory.
WATCH_INTERVAL = 2.5

#: Seconds to wait for one check. A check that takes longer continues in a thread of the bridge.
#: With this limit, a broker that does not answer is reported within 10 s.
CHECK_TIMEOUT = 4.0

#: Minimum seconds between two warnings about one engine's broker.
LOG_INTERVAL = 60.0

#: Suffixes of the keys whose change is reported at once.
_VERDICTS = (".broker_connected", ".broker_error", ".error")


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
        #: Called when the value of a key that ends with one of ``_VERDICTS`` has changed.
        self.on_change: Callable[[], object] = lambda: None
        self._backend = backend
        self._log = BrokerLog(backend.now)
        self._checks: list[Check] = []
        for host in hosts.values():
            probes = host.description.make_probes(consumer)
            for probe in probes:
                cached = CachedProbe(bridge, probe.run, probe.on_error)
                suspect = probe.suspect and partial(_is_suspect, cached, probe.suspect)
                self._checks.append(Check(cached, suspect))
            if not probes:
                self._checks.append(Check(partial(host.health, CHECK_TIMEOUT)))

    def run(self, stop_event: IEvent) -> None:
        """Run the checks that are due until ``stop_event`` is set."""
        while not stop_event.is_set():
            before = self._verdicts()
            for check in self._checks:
                if check.due_in(self._backend.now()) <= 0:
                    check.run(self._backend)
            if before and self._verdicts() != before:
                self.on_change()
            self._log.update(self.latest())
            now = self._backend.now()
            self._backend.wait(stop_event, min((c.wait(now) for c in self._checks), default=None))

    def latest(self) -> dict[str, str]:
        """Return the results of the last run of each check."""
        return {key: value for check in self._checks for key, value in check.results.items()}

    def _verdicts(self) -> dict[str, str]:
        return {key: value for key, value in self.latest().items() if key.endswith(_VERDICTS)}


class BrokerLog:
    """Logs that a broker cannot be reached, and that it answers again.

    A failure, or a change of its error, is logged at most once a minute for each engine.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._logged: dict[str, tuple[str, float]] = {}

    def update(self, results: Mapping[str, str]) -> None:
        """Log what has changed since the last line.

        :param results: the items of the heartbeat, by ``<engine>.<name>``.
        """
        for key, connected in results.items():
            engine, _, name = key.rpartition(".")
            if name != "broker_connected":
                continue
            error = "" if connected == "True" else results.get(f"{engine}.broker_error", "unknown")
            before, logged_at = self._logged.get(engine, ("", float("-inf")))
            if error == before:
                continue
            if not error:
                self._logged[engine] = "", logged_at
                logger.info("z4j: %s: the broker answers again", engine)
            elif self._now() - logged_at >= LOG_INTERVAL:
                self._logged[engine] = error, self._now()
                self._warn(engine, error)

    def _warn(self, engine: str, error: str) -> None:
        logger.warning(
            "z4j: %s: the broker cannot be reached (%s), so no task can arrive; check whether it "
            "runs, the network to it, and the application's address of it (for Celery: broker_url)",
            engine,
            error,
        )


class Check:
    """One health check, its last results and its schedule.

    The results of a run replace all results of the previous run. So if a failed check does not
    return the depths of a broker's queues, the old depths are not reported again.

    :param suspect: returns whether the check should run again soon, without asking the broker.
    """

    def __init__(
        self, run: Callable[[], Mapping[str, str]], suspect: Callable[[], bool] | None = None
    ) -> None:
        self.results: Mapping[str, str] = {}
        self._run = run
        self._suspect = suspect
        self._ended_at = float("-inf")

    def due_in(self, now: float) -> float:
        """Return the seconds until the next run."""
        elapsed = now - self._ended_at
        if self._suspect is not None and SUSPECT_INTERVAL <= elapsed < INTERVAL and self._suspect():
            return 0.0
        return INTERVAL - elapsed

    def wait(self, now: float) -> float:
        """Return the seconds until :meth:`due_in` has to be called again."""
        due_in = max(0.0, self.due_in(now))
        return due_in if self._suspect is None else min(due_in, WATCH_INTERVAL)

    def run(self, backend: BaseConcurrency) -> None:
        """Run the check and keep its results."""
        self.results = self._run()
        self._ended_at = backend.now()


class CachedProbe:
    """A blocking health check that delays the caller for at most :data:`CHECK_TIMEOUT` seconds.

    While a check runs, a call does not start it again.
    If a result arrives after the timeout, the next call returns it.

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
        #: Whether the last call returned the items for an error.
        self.failing = False
        self._running = False
        self._runs = 0
        self._result: Mapping[str, str] = {}

    def __call__(self) -> Mapping[str, str]:
        """Run the check; return its result, or the items for its error. Never raises."""
        runs = self._runs
        self.failing = False
        try:
            if self._running:
                raise TimeoutError
            self._bridge.call(self._run, timeout=CHECK_TIMEOUT)
        except Exception as error:
            if self._runs != runs:
                # The hub was blocked, and the check ended before the timeout was processed.
                return self._result
            logger.debug("z4j: health check failed: %s", type(error).__name__)
            self.failing = True
            return self._on_error(error)
        return self._result

    def _run(self) -> None:
        self._running = True
        try:
            self._result = self._check()
            self._runs += 1
        finally:
            self._running = False


def _is_suspect(probe: CachedProbe, suspect: Callable[[], bool]) -> bool:
    """Return whether the probe has failed or may fail now.

    ``suspect`` alone is not enough. A probe that succeeds after its timeout makes ``suspect``
    false, but only the next call of the probe reports its result.
    """
    return probe.failing or suspect()
