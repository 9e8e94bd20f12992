"""Which Celery workers there are, what they consume, and that they send their events: asked of the workers themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any

from z4j_bare.engines.celery.engine import broker_connection

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.presence import Presence

logger = logging.getLogger("z4j.runtime.capture.roster")

#: Seconds before each greeting of a worker that is new: at once, and 1 s and 5 s after that. One that is just starting
#: listens on Redis only after the handlers of ``worker_ready`` have returned (``adapter-surface`` 3.2).
GREETINGS = (0.0, 1.0, 4.0)

#: Seconds between the calls to all workers: the first two, then for good, for those that send no heartbeats.
CALLS = (4.0,)
EVERY = 60.0

#: Seconds that workers get to answer, and of silence after which one is announced no longer.
ANSWER = 1.0
SILENT = 150.0

#: Seconds between two looks at what is due.
LOOK = 0.25

#: Workers known at most, and characters of a name: the brain's column (``brain-contract`` 5.8).
MOST = 1000
LONGEST = 200


class Worker:
    """One worker: its name for the brain, when it was last heard of, its queues once it has told them, what it is owed."""

    __slots__ = ("due", "greeted", "label", "queues", "seen")

    def __init__(self, label: str, now: float) -> None:
        self.label = label
        self.seen = now
        self.queues: tuple[str, ...] = ()
        self.greeted = 0
        self.due = now

    def greet(self, now: float) -> None:
        """Note a greeting, and when the next one is due."""
        self.greeted += 1
        self.due = now + GREETINGS[self.greeted] if self.greeted < len(GREETINGS) else inf


class WorkerRegistry:
    """The workers whose events we read.

    Told of each event's worker by one task; asks and enables in tasks of its own, one at a time, so that a broker that does
    not answer holds up neither events nor the end of the agent.

    :param mine: the worker that this process is; it is greeted, but not asked: its signals tell the queue.
    :param only: the one worker to report.
    """

    def __init__(
        self,
        app: Any,
        presence: Presence,
        backend: BaseConcurrency,
        *,
        own_hostname: str | None = None,
        only_hostname: str | None = None,
    ) -> None:
        self._app = app
        self._presence = presence
        self._backend = backend
        self._ask = own_hostname is None
        self._only = own_hostname or only_hostname
        self._workers: dict[str, Worker] = {}
        self._routes: dict[str, str | None] = {}
        self._calling = False
        self._look = 0.0
        self._call_at = inf if own_hostname else 0.0
        self._pauses = iter(CALLS)

    def touch(self, hostname: str) -> str | None:
        """Return the name under which a worker is reported, or ``None`` for one that is not. Announces a new one."""
        if self._only is not None and hostname != self._only:
            return None
        worker = self._workers.get(hostname) or self._meet(hostname)
        worker.seen = self._backend.now()
        return worker.label

    def online(self, hostname: str) -> None:
        """Note that a worker has just started: whatever it was told before, it does not know.

        Or that it has just been made to send its events, which Celery tells in the same words: the queues that it told a
        moment ago hold until it is asked again.
        """
        if self.touch(hostname) is not None:
            worker = self._workers[hostname]
            worker.greeted, worker.due, self._look = 0, self._backend.now(), 0.0

    def offline(self, hostname: str) -> None:
        """Note that a worker said goodbye."""
        worker = self._workers.pop(hostname, None)
        if worker is not None and self._ask:
            self._presence.remove(worker.label, announce=True)

    def queue_of(self, hostname: str, task: str) -> str | None:
        """Return the queue that a task came from, as far as it can be known: its events do not say.

        It is the one queue that its worker consumes; of several, the one to which the app routes the task.
        """
        worker = self._workers.get(hostname)
        queues = worker.queues if worker is not None else ()
        if len(queues) == 1:
            return queues[0]
        return route if queues and (route := self._route(task)) in queues else None

    def tick(self) -> None:
        """Greet whom a greeting is due. Never waits; cheap enough to be called at each event."""
        now = self._backend.now()
        if now < self._look or self._calling:
            return
        self._look = now + LOOK
        due = [hostname for hostname, worker in list(self._workers.items()) if worker.due <= now]
        everyone = self._call_at <= now
        if everyone:
            self._call_at = now + next(self._pauses, EVERY)
            self._forget_the_silent(now)
        if due or everyone:
            for hostname in due:
                self._workers[hostname].greet(now)
            self._calling = True
            self._backend.spawn(self._greet, None if everyone else due, name="z4j-celery-greeting")

    def _meet(self, hostname: str) -> Worker:
        if not 0 < len(hostname) <= LONGEST:
            raise ValueError("no name of a worker")
        if len(self._workers) >= MOST:
            self._drop(min(self._workers, key=lambda name: self._workers[name].seen))
        worker = self._workers[hostname] = Worker(
            self._presence.online(hostname), self._backend.now()
        )
        self._look = 0.0
        return worker

    def _forget_the_silent(self, now: float) -> None:
        for hostname, worker in list(self._workers.items()):
            if worker.seen < now - SILENT and hostname != self._only:
                self._drop(hostname)

    def _drop(self, hostname: str) -> None:
        self._presence.remove(self._workers.pop(hostname).label, announce=False)

    def _greet(self, hostnames: list[str] | None) -> None:
        if hostnames is None and self._only is not None:
            hostnames = [self._only]
        try:
            # First the queues, so that they are known when the first event comes.
            for step in (self._ask_queues, self._enable) if self._ask else (self._enable,):
                self._backend.call_blocking(self._try, step, hostnames)
        finally:
            self._calling = False

    def _try(
        self, step: Callable[[Any, list[str] | None], None], hostnames: list[str] | None
    ) -> None:
        try:
            # Of no pool: a child that is forked meanwhile would close that, and read what is meant for us.
            with broker_connection(self._app) as connection:
                step(connection, hostnames)
        except Exception as error:
            logger.debug("z4j: %s: %s", step.__name__, type(error).__name__)

    def _ask_queues(self, connection: Any, hostnames: list[str] | None) -> None:
        inspect = self._app.control.inspect(
            destination=hostnames, timeout=ANSWER, connection=connection
        )
        for hostname, queues in (inspect.active_queues() or {}).items():
            if self.touch(hostname) is not None:
                worker = self._workers[hostname]
                worker.queues = tuple(str(queue["name"]) for queue in queues or ())
                worker.due = inf  # it listens, so it will hear what comes next

    def _enable(self, connection: Any, hostnames: list[str] | None) -> None:
        self._app.control.enable_events(destination=hostnames, connection=connection)

    def _route(self, task: str) -> str | None:
        if task not in self._routes:
            if len(self._routes) >= MOST:
                self._routes.clear()
            self._routes[task] = _routed(self._app, task)
        return self._routes[task]


def _routed(app: Any, task: str) -> str | None:
    try:
        own = getattr(app.tasks.get(task), "queue", None)
        queue = own or (app.amqp.router.lookup_route(task, (), {}, {}) or {}).get("queue")
    except Exception:  # a router of the host's own, which wants arguments that we do not have
        return None
    return str(getattr(queue, "name", None) or queue or app.conf.task_default_queue)
