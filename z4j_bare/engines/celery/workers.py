"""The registry of Celery workers whose events are read from the broker.

It asks the workers for their queues, and makes them send task events.
"""

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

#: Seconds before each ``enable_events`` to a new worker: at once, then 1 s and 4 s later. On Redis
#: a starting worker listens only after the handlers of ``worker_ready`` have returned.
ENABLE_DELAYS = (0.0, 1.0, 4.0)

#: Seconds between the first two ``enable_events`` broadcasts to all workers.
FIRST_INTERVALS = (4.0,)

#: Seconds between all later broadcasts, for workers that send no heartbeats.
INTERVAL = 60.0

#: Seconds to wait for the workers' replies.
REPLY_TIMEOUT = 1.0

#: Seconds of silence after which a worker is removed.
EXPIRY = 150.0

#: Minimum seconds between two checks of what is due.
POLL_INTERVAL = 0.25

#: Maximum number of workers, and of cached routes.
MAX_WORKERS = 1000

#: Maximum characters of a worker name; the encoder shortens it further.
MAX_NAME_CHARS = 4096


class Worker:
    """A worker's name in the brain, its queues once it has reported them, and its due times."""

    __slots__ = ("due", "enabled_count", "label", "last_seen", "queues")

    def __init__(self, label: str, now: float) -> None:
        self.label = label
        self.last_seen = now
        self.queues: tuple[str, ...] = ()
        #: How often ``enable_events`` was sent, and when it is due next.
        self.enabled_count = 0
        self.due = now

    def count_enabled(self, now: float) -> None:
        """Count an ``enable_events``, and set the time of the next one."""
        self.enabled_count += 1
        more = self.enabled_count < len(ENABLE_DELAYS)
        self.due = now + ENABLE_DELAYS[self.enabled_count] if more else inf


class WorkerRegistry:
    """The workers whose events this process reads.

    One task reports events to it. It calls the workers in tasks of its own, one at a time, so that
    a broker that does not answer delays neither the events nor the agent's stop.

    :param only_hostname: the only worker to report; ``None`` for all.
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
        self._calling = False
        self._poll_at = 0.0
        self._broadcast_at = 0.0
        self._first_intervals = iter(FIRST_INTERVALS)

    def touch(self, hostname: str) -> str | None:
        """Note a sign of life and return the worker's name in the brain.

        A new worker is announced. ``None`` means that the worker is not reported.
        """
        if self._only_hostname is not None and hostname != self._only_hostname:
            return None
        worker = self._workers.get(hostname) or self._add(hostname)
        worker.last_seen = self._backend.now()
        return worker.label

    def online(self, hostname: str) -> None:
        """Note ``worker-online`` and send ``enable_events`` again.

        A worker sends it when it starts, and also when its events have just been enabled. So its
        known queues stay valid until it is asked again.
        """
        if self.touch(hostname) is not None:
            worker = self._workers[hostname]
            worker.enabled_count, worker.due, self._poll_at = 0, self._backend.now(), 0.0

    def offline(self, hostname: str) -> None:
        """Note ``worker-offline``."""
        worker = self._workers.pop(hostname, None)
        if worker is not None:
            self._presence.remove(worker.label, announce=True)

    def queue_of(self, hostname: str, task: str) -> str | None:
        """Return the queue that a task came from, or ``None`` if it cannot be known.

        A task's events do not carry it. It is the only queue that the worker consumes, or of
        several the one to which the app routes the task.
        """
        worker = self._workers.get(hostname)
        queues = worker.queues if worker is not None else ()
        if len(queues) == 1:
            return queues[0]
        return route if queues and (route := self._route(task)) in queues else None

    def tick(self) -> None:
        """Start the calls that are due. Does not wait; cheap enough to call at each event."""
        now = self._backend.now()
        if now < self._poll_at or self._calling:
            return
        self._poll_at = now + POLL_INTERVAL
        due = [hostname for hostname, worker in list(self._workers.items()) if worker.due <= now]
        to_all = self._broadcast_at <= now
        if to_all:
            self._broadcast_at = now + next(self._first_intervals, INTERVAL)
            self._expire(now)
        if due or to_all:
            for hostname in due:
                self._workers[hostname].count_enabled(now)
            self._calling = True
            hostnames = None if to_all else due
            self._backend.spawn(self._call, hostnames, name="z4j-celery-enable-events")

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

    def _call(self, hostnames: list[str] | None) -> None:
        if hostnames is None and self._only_hostname is not None:
            hostnames = [self._only_hostname]
        try:
            # The queues first, so that they are known when the first event arrives.
            for step in (self._ask_queues, self._enable):
                self._backend.call_blocking(self._try, step, hostnames)
        finally:
            self._calling = False

    def _try(
        self, step: Callable[[Connection, list[str] | None], None], hostnames: list[str] | None
    ) -> None:
        try:
            with broker_connection(self._app) as connection:
                step(connection, hostnames)
        except Exception as error:
            logger.debug("z4j: %s failed with %s", step.__name__, type(error).__name__)

    def _ask_queues(self, connection: Connection, hostnames: list[str] | None) -> None:
        inspect = self._app.control.inspect(
            destination=hostnames, timeout=REPLY_TIMEOUT, connection=connection
        )
        for hostname, queues in (inspect.active_queues() or {}).items():
            if self.touch(hostname) is not None:
                worker = self._workers[hostname]
                worker.queues = tuple(str(queue["name"]) for queue in queues or ())
                worker.due = inf  # it answered, so it also receives the enable_events that follows

    def _enable(self, connection: Connection, hostnames: list[str] | None) -> None:
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
    except Exception:  # a router of the host may need the real arguments, which are not known here
        return None
    return str(getattr(queue, "name", None) or queue or app.conf.task_default_queue)
