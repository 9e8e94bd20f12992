"""Describes the Celery engine, and creates connections to Celery's broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING

from z4j_bare.engines.engine import Engine, HealthProbe
from z4j_bare.events.redaction import safe_name, value_matcher
from z4j_bare.wire.fit import MAX_TASK_NAME_CHARS, fit_name

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker.consumer import Consumer
    from kombu import Connection
    from z4j_celery import CeleryEngineAdapter
    from z4j_core.models import DiscoveryHints, TaskDefinition

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.celery.controls import CeleryControls
    from z4j_bare.engines.celery.source import CelerySource
    from z4j_bare.events.ring import Ring
    from z4j_bare.settings import Settings

#: Seconds until an attempt to connect to the broker fails.
CONNECT_TIMEOUT = 3.0

#: Number of tasks that are described between two checkpoints. One task takes 20 us.
TASKS_PER_STEP = 25


class CeleryEngine(Engine):
    """The Celery engine. The adapter's own events, health checks and controls are not used."""

    kind = "celery"
    adapter: CeleryEngineAdapter

    def make_source(
        self, ring: Ring, settings: Settings, backend: BaseConcurrency, consumer: Consumer | None
    ) -> CelerySource:
        """Return a source that captures signals, or broker events where no signals fire."""
        from z4j_bare.engines.celery.source import CelerySource

        return CelerySource(self.adapter, ring, settings, backend, consumer)

    def make_probes(self, consumer: Consumer | None) -> list[HealthProbe]:
        """Return the checks of the broker and of the workers.

        The adapter's ``get_health`` is not used: it reports wrong values (see the module
        ``broker_health``) and can hang a child (see :func:`broker_connection`).
        """
        from z4j_bare.engines.celery.broker_health import BrokerProbe, ConsumerWatch, queue_names
        from z4j_bare.engines.celery.worker_health import WorkerDetails

        app, name = self.adapter.celery_app, self.adapter.name
        watch = ConsumerWatch(consumer)
        broker = BrokerProbe(name, app, queue_names(app, consumer), watch.silence)
        details = WorkerDetails(app, consumer, value_matcher(self.adapter))

        def suspect() -> bool:
            return not broker.connected or watch.in_trouble()

        return [
            HealthProbe(broker, broker.failed, suspect),
            HealthProbe(lambda: {f"{name}.worker_details": details()}, lambda _: {}),
        ]

    def advice(self) -> str:
        """Return what to do about kombu's unpatched sleep; empty if kombu's sleep is patched."""
        from z4j_bare.engines.celery import green_kombu

        return green_kombu.ADVICE if green_kombu.has_unpatched_sleep() else ""

    def make_controls(self, backend: BaseConcurrency) -> CeleryControls:
        """Return controls that wait for the worker's reply. The adapter's controls do not wait."""
        from z4j_bare.engines.celery.controls import CeleryControls

        matches = value_matcher(self.adapter)

        def alias(name: str) -> str:
            return fit_name(safe_name(name, matches))

        return CeleryControls(self.adapter.celery_app, alias, backend)

    def iter_definitions(
        self, hints: DiscoveryHints, checkpoint: Callable[[], object]
    ) -> Iterator[TaskDefinition] | None:
        """Discover tasks as the adapter does, but in small steps.

        The adapter's ``discover_tasks`` blocks for 6 ms for 300 tasks, and 50 ms for the files of
        twenty apps. Returns ``None`` if a subclass of the adapter overrides ``discover_tasks``.
        """
        method = getattr(type(self.adapter), "discover_tasks", None)
        if not getattr(method, "__module__", "").startswith("z4j_celery."):
            return None
        return self._iter_definitions(hints, checkpoint)

    def _iter_definitions(
        self, hints: DiscoveryHints, checkpoint: Callable[[], object]
    ) -> Iterator[TaskDefinition]:
        adapter_discovery = import_module("z4j_celery.discovery")
        loaded = set()
        tasks = list(self.adapter.celery_app.tasks.items())
        for first in range(0, len(tasks), TASKS_PER_STEP):
            checkpoint()
            batch = tasks[first : first + TASKS_PER_STEP]
            # z4j_core's model refuses longer names.
            part = SimpleNamespace(
                tasks={fit_name(name, MAX_TASK_NAME_CHARS): task for name, task in batch}
            )
            for definition in adapter_discovery.discover_runtime(part):
                loaded.add(definition.name)
                yield definition
        for path in hints.app_paths:
            checkpoint()
            for definition in adapter_discovery.discover_static([path]):
                if definition.name not in loaded:
                    yield definition

    def restarts_by_exit(self) -> bool:
        """Return ``False``: only prefork pools can restart, and remote control restarts them."""
        return False


def broker_connection(app: Celery, *, reading: bool = False) -> Connection:
    """Return a new connection to the broker, not open, and not part of the app's pool.

    A connection of the pool is not safe in a process that forks. A child closes the pool that it
    inherits, and reads replies to this process from the shared socket. If this process reads such a
    reply first, the child waits for ever (kombu 5.6 and 5.7, prefork).

    Call :func:`open_connection` to get an error if the broker is down. Without that call, the first
    use of the connection retries until the broker is available.
    """
    connect = app.connection_for_read if reading else app.connection_for_write
    return connect(connect_timeout=CONNECT_TIMEOUT)


def open_connection(connection: Connection, max_wait: float | None = None) -> None:
    """Connect, once to each of the broker's addresses.

    ``Connection.connect()`` is not used. After a failure it waits 2 s with kombu's ``sleep``, which
    blocks the hub of a gevent worker (see the module ``green_kombu``).

    :param max_wait: seconds after which a request without an answer from Redis or AMQP fails. With
        ``None``, a request waits for ever if the network drops its packets.
    """
    if max_wait is not None and connection.transport.driver_type == "redis":
        options = connection.transport_options
        for name in ("socket_timeout", "socket_connect_timeout"):
            options[name] = min(options.get(name) or max_wait, max_wait)
    connection.ensure_connection(
        max_retries=max(0, len(connection.alt) - 1), reraise_as_library_errors=False
    )
    # Only AMQP connections have this attribute. The connections of kombu's own transports lack it.
    transport = getattr(connection.connection, "transport", None)
    sock = getattr(transport, "sock", None)
    if max_wait is not None and sock is not None:
        sock.settimeout(max_wait)
