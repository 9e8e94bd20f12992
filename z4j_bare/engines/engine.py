"""Describes the event source, health checks and controls of each engine."""

# ruff: noqa: ARG002 - the base class ignores arguments that subclasses need

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from z4j_bare.events.source import EventSource
from z4j_bare.safety import safe_call

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer
    from z4j_core.models import DiscoveryHints, TaskDefinition
    from z4j_core.protocols import QueueEngineAdapter

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.celery.controls import CeleryControls
    from z4j_bare.events.ring import Ring
    from z4j_bare.settings import Settings


class HealthProbe(NamedTuple):
    """A health check. ``run`` returns heartbeat entries, ``on_error`` the entries for a failure.

    ``suspect`` returns whether the check should run again soon. ``suspect`` does no I/O.
    """

    run: Callable[[], Mapping[str, str]]
    on_error: Callable[[Exception], Mapping[str, str]]
    suspect: Callable[[], bool] | None = None


class Engine:
    """An engine whose adapter provides the events, health checks and controls."""

    #: ``celery``, ``rq``, or ``generic`` for every other engine.
    kind = "generic"

    def __init__(self, adapter: QueueEngineAdapter) -> None:
        self.adapter = adapter

    def make_source(
        self, ring: Ring, settings: Settings, backend: BaseConcurrency, consumer: Consumer | None
    ) -> EventSource:
        """Return the source of the engine's events.

        :param consumer: the Consumer of this process's Celery worker; ``None`` outside a worker.
        """
        return EventSource(self.adapter, ring, settings, backend)

    def make_probes(self, consumer: Consumer | None) -> list[HealthProbe]:
        """Return the health checks that replace the adapter's ``get_health``; none by default."""
        return []

    def advice(self) -> str:
        """Return what the operator should change in this process, and why; empty by default."""
        return ""

    def make_controls(self, backend: BaseConcurrency) -> CeleryControls | None:
        """Return worker controls that replace the adapter's; ``None`` by default."""
        return None

    def iter_definitions(
        self, hints: DiscoveryHints, checkpoint: Callable[[], object]
    ) -> Iterator[TaskDefinition] | None:
        """Discover tasks in small steps, and call ``checkpoint`` between them.

        Returns ``None`` if the caller must use the adapter's ``discover_tasks``.
        """
        return None

    def retry_problem(self) -> str:
        """Return why the adapter cannot retry a task safely; empty if it can."""
        return ""

    def restarts_by_exit(self) -> bool:
        """Return whether a worker is restarted by ending its process.

        The result is true if the adapter has no capability ``restart_worker``.
        """
        return "restart_worker" not in (safe_call(self.adapter.capabilities) or ())


def adapter_version(adapter: object) -> tuple[str, str]:
    """Return distribution and version of the package that contains the adapter's class.

    The version is empty if the distribution is not installed.
    For a subclass in an application, the base class is used.
    """
    for each in type(adapter).__mro__:
        package = each.__module__.partition(".")[0]
        if package.startswith("z4j_") and package not in _NOT_ADAPTERS:
            distribution = package.replace("_", "-")
            try:
                return distribution, version(distribution)
            except PackageNotFoundError:
                return distribution, ""
    return "", ""


#: Packages of z4j that contain no adapter.
_NOT_ADAPTERS = frozenset({"z4j_core", "z4j_bare"})


def describe_engine(adapter: QueueEngineAdapter) -> Engine:
    """Return the description of an adapter's engine.

    The engine is recognised by the attribute that holds the adapter's application.
    """
    if hasattr(adapter, "celery_app"):
        from z4j_bare.engines.celery.engine import CeleryEngine

        return CeleryEngine(adapter)
    if hasattr(adapter, "rq_app"):
        from z4j_bare.engines.rq import RqEngine

        return RqEngine(adapter)
    return Engine(adapter)
