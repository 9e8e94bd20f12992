"""The registry of Celery workers whose events are read from the broker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from z4j_bare.engines.celery.engine import broker_connection

if TYPE_CHECKING:
    from celery import Celery
    from kombu import Connection

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.presence import Presence

logger = logging.getLogger("z4j.runtime.engines.celery.workers")

#: Seconds before each of the three ``enable_events`` to a new worker. The first one may be lost on
#: Redis, where a worker receives commands only after its ``worker_ready`` handlers have returned.
ENABLE_DELAYS = (0.0, 1.0, 4.0)

#: Seconds between the first two ``enable_events`` broadcasts to all workers.
FIRST_INTERVALS = (4.0,)

#: Seconds between all later broadcasts. Only a broadcast reaches a worker without heartbeats.
INTERVAL = 60.0

#: Seconds to wait for the workers' replies.
REPLY_TIMEOUT = 1.0

#: A worker is removed after this many seconds without an event or a reply.
EXPIRY = 150.0

#: Minimum seconds between two checks for due requests.
POLL_INTERVAL = 0.25

#: Maximum number of workers in the registry, and of tasks whose route is cached.
MAX_WORKERS = 1000

#: Maximum characters of a worker name. The encoder applies a smaller limit later.
MAX_NAME_CHARS = 4096


class Worker:
    """A worker. ``label`` is its name in the brain. ``queues`` are the queues that it reported."""

    __slots__ = ("due", "enabled_count", "label", "last_seen", "queues")

    def __init__(self, label: str, now: float) -> None:
        self.label = label
        self.last_seen = now
        self.queues: tuple[str, ...] = ()
        #: Number of ``enable_events`` that were sent to the worker since it came online.
        self.enabled_count = 0
        #: When the next ``enable_events`` is due, in the backend's monotonic seconds.
        self.due = now

    def count_enabled(self, now: float) -> None:
        """Count an ``enable_events``, and set the time of the next one."""
        self.enabled_count += 1
        more = self.enabled_count < len(ENABLE_DELAYS)
        self.due = now + ENABLE_DELAYS[self.enabled_count] if more else inf


class WorkerRegistry:
    """The workers whose events this process reads, with their queues.

    Only one background task calls the methods.
    The registry sends its requests in another background task, one at a time.
    Therefore a broker that does not reply delays neither the events nor the agent's stop.

    :param only_hostname: the one worker whose events are reported; ``None`` for all workers.
    """

    def __init__(
        self,
        app: Celery,
        presence: Presence,
        backend: BaseConcurrency,
        *,
        only_hostname: str | None = None,
    ) -> None:
        self._app = app
        self._presence = presence
        self._backend = backend
        self._only_hostname = only_hostname
        self._workers: dict[str, Worker] = {}
        self._routes: dict[str, str | None] = {}
        self._requesting = False
        self._poll_at = 0.0
        self._broadcast_at = 0.0
        self._first_intervals = iter(FIRST_INTERVALS)

    def touch(self, hostname: str) -> str | None:
        """Record that the worker is alive now; return the worker's name in the brain.

        A new worker is announced. Returns ``None`` if this registry does not report the worker.
        """
        if self._only_hostname is not None and hostname != self._only_hostname:
            return None
        worker = self._workers.get(hostname) or self._add(hostname)
        worker.last_seen = self._backend.now()
        return worker.label

    def online(self, hostname: str) -> None:
        """Process a ``worker-online`` event, and make ``enable_events`` due again.

        A worker sends this event when it starts, and also when its events are enabled.
        In the second case the worker's queues are unchanged. Therefore the known queues are kept
        until the worker reports its queues again.
        """
        if self.touch(hostname) is not None:
            worker = self._workers[hostname]
            worker.enabled_count, worker.due, self._poll_at = 0, self._backend.now(), 0.0

    def offline(self, hostname: str) -> None:
        """Process a ``worker-offline`` event."""
        worker = self._workers.pop(hostname, None)
        if worker is not None:
            self._presence.remove(worker.label, announce=True)

    def queue_of(self, hostname: str, task: str) -> str | None:
        """Return the queue that a task came from, or ``None`` if the queue is unknown.

        A task's events do not contain its queue. The result is the worker's only queue, or the
        queue to which the app routes the task if the worker consumes that queue.
        """
        worker = self._workers.get(hostname)
        queues = worker.queues if worker is not None else ()
        if len(queues) == 1:
            return queues[0]
        return route if queues and (route := self._route(task)) in queues else None

    def tick(self) -> None:
        """Start the requests that are due. Does not wait, so it may be called for each event."""
        now = self._backend.now()
        if now < self._poll_at or self._requesting:
            return
        self._poll_at = now + POLL_INTERVAL
        to_all = self._broadcast_at <= now
        if to_all:
            self._broadcast_at = now + next(self._first_intervals, INTERVAL)
            self._expire(now)
        due = [hostname for hostname, worker in list(self._workers.items()) if worker.due <= now]
        if due or to_all:
            for hostname in due:
                self._workers[hostname].count_enabled(now)
            self._requesting = True
            hostnames = None if to_all else due
            self._backend.spawn(self._send_requests, hostnames, name="z4j-celery-enable-events")

    def _add(self, hostname: str) -> Worker:
        if not 0 < len(hostname) <= MAX_NAME_CHARS:
            raise ValueError(f"worker name empty or longer than {MAX_NAME_CHARS} characters")
        if len(self._workers) >= MAX_WORKERS:
            self._remove(min(self._workers, key=lambda name: self._workers[name].last_seen))
        label = self._presence.online(hostname)
        worker = self._workers[hostname] = Worker(label, self._backend.now())
        self._poll_at = 0.0
        return worker

    def _expire(self, now: float) -> None:
        for hostname, worker in list(self._workers.items()):
            if worker.last_seen < now - EXPIRY and hostname != self._only_hostname:
                self._remove(hostname)

    def _remove(self, hostname: str) -> None:
        self._presence.remove(self._workers.pop(hostname).label, announce=False)

    def _send_requests(self, hostnames: list[str] | None) -> None:
        if hostnames is None and self._only_hostname is not None:
            hostnames = [self._only_hostname]
        try:
            # Request the queues first, so that they are known when the first event arrives.
            for step in (self._request_queues, self._enable_events):
                self._backend.call_blocking(self._send_request, step, hostnames)
        finally:
            self._requesting = False

    def _send_request(
        self, step: Callable[[Connection, list[str] | None], None], hostnames: list[str] | None
    ) -> None:
        try:
            with broker_connection(self._app) as connection:
                step(connection, hostnames)
        except Exception as error:
            logger.debug(
                "z4j: request to Celery's workers failed (%s): %s",
                step.__name__.strip("_"),
                type(error).__name__,
            )

    def _request_queues(self, connection: Connection, hostnames: list[str] | None) -> None:
        inspect = self._app.control.inspect(
            destination=hostnames, timeout=REPLY_TIMEOUT, connection=connection
        )
        for hostname, queues in (inspect.active_queues() or {}).items():
            if self.touch(hostname) is not None:
                worker = self._workers[hostname]
                worker.queues = tuple(str(queue["name"]) for queue in queues or ())
                worker.due = inf  # the next step enables the events of this worker

    def _enable_events(self, connection: Connection, hostnames: list[str] | None) -> None:
        self._app.control.enable_events(destination=hostnames, connection=connection)

    def _route(self, task: str) -> str | None:
        if task not in self._routes:
            if len(self._routes) >= MAX_WORKERS:
                self._routes.clear()
            self._routes[task] = _lookup_route(self._app, task)
        return self._routes[task]


def _lookup_route(app: Celery, task: str) -> str | None:
    try:
        own = getattr(app.tasks.get(task), "queue", None)
        queue = own or (app.amqp.router.lookup_route(task, (), {}, {}) or {}).get("queue")
    except Exception:  # a custom router may need the task's arguments, which are unknown here
        return None
    return str(getattr(queue, "name", None) or queue or app.conf.task_default_queue)
