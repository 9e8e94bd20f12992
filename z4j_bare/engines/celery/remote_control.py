"""Sends remote control commands to live Celery workers. Callers use the brain's worker names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from z4j_bare.engines.celery.engine import broker_connection, open_connection
from z4j_bare.errors import CommandError

if TYPE_CHECKING:
    from celery import Celery

    from z4j_bare.concurrency import BaseConcurrency

T = TypeVar("T")

#: Seconds after which a request without an answer fails. Without a limit, a request would wait for
#: ever if the network drops its packets.
MAX_WAIT = 10.0

#: Seconds to wait for the reply of one worker.
REPLY_TIMEOUT = 2.0

#: A broadcast ends after this many seconds without a reply, because the number of workers is
#: unknown.
GATHER_TIMEOUT = 1.5

#: Seconds between two checks of a command's effect.
POLL_INTERVAL = 0.2

#: Maximum seconds to wait for a command's effect.
EFFECT_TIMEOUT = 15.0

#: Maximum number of cached worker names. Names accumulate where hosts are often replaced.
MAX_CACHED_NAMES = 1000

#: Maps the module name of a pool's class to the pool's ``-P`` name, if the two names differ.
_POOL_NAMES = {"thread": "threads"}


@dataclass(frozen=True, slots=True)
class Node:
    """A worker that has just replied. ``alias`` is the worker's name in the brain."""

    name: str
    alias: str
    stats: Mapping[str, Any]

    @property
    def pool(self) -> str:
        """Name of the running pool, such as ``gevent``; ``conf.worker_pool`` may differ from it."""
        module, _, _ = str(self._pool_stats().get("implementation", "")).partition(":")
        name = module.rpartition(".")[2]
        return _POOL_NAMES.get(name, name) or "unknown"

    @property
    def size(self) -> int:
        """Number of tasks that the worker runs at a time.

        For a prefork pool the processes are counted, because ``max-concurrency`` does not change
        when the pool is resized.
        """
        processes = self._pool_stats().get("processes")
        if self.pool == "prefork" and processes:
            return len(processes)
        return int(self._pool_stats().get("max-concurrency") or 0)

    @property
    def processes(self) -> frozenset[int]:
        """Process ids of a prefork pool."""
        return frozenset(self._pool_stats().get("processes") or ())

    def _pool_stats(self) -> Mapping[str, Any]:
        pool: Mapping[str, Any] = self.stats.get("pool") or {}
        return pool


class RemoteControl:
    """Sends remote control commands to workers.

    The methods block, so the agent's loops must not call them. A deadline is a time on the clock of
    :meth:`now`.

    :param alias: returns a worker's name in the brain.
    """

    def __init__(self, app: Celery, alias: Callable[[str], str], backend: BaseConcurrency) -> None:
        self.alias = alias
        self._app = app
        self._backend = backend
        #: Node names by node name and by alias.
        self._node_names: dict[str, str] = {}

    def now(self) -> float:
        """Return the monotonic time in seconds."""
        return self._backend.now()

    def broadcast(
        self, command: str, timeout: float, *, to: str | None = None, **arguments: object
    ) -> dict[str, Any]:
        """Send a control command and return the replies by node name.

        With ``to``, the command goes to one worker, and the worker's reply ends the wait.
        Without ``to``, the wait ends after ``timeout`` seconds without a reply.

        :raises CommandError: if the broker fails.
        """
        try:
            replies = self._backend.call_blocking(
                self._broadcast, command, arguments, to, max(0.1, timeout)
            )
        except Exception as error:
            # Only the class is reported, because the text may contain the broker's password.
            raise CommandError(
                f"the broker failed: {type(error).__name__}", indeterminate=True
            ) from error
        answers = {name: answer for reply in replies or () for name, answer in reply.items()}
        if len(self._node_names) > MAX_CACHED_NAMES:
            self._node_names.clear()
        for name in answers:
            self._node_names[name] = self._node_names[self.alias(name)] = name
        return answers

    def _broadcast(
        self, command: str, arguments: dict[str, object], to: str | None, timeout: float
    ) -> Any:
        with broker_connection(self._app) as connection:
            open_connection(connection, MAX_WAIT)
            mailbox = self._app.control.mailbox(connection)
            mailbox.producer_pool = None  # or else kombu publishes on a connection of the pool
            if to is None:
                return mailbox.multi_call(command, arguments, timeout=timeout)
            return mailbox.call([to], command, arguments, timeout=timeout)

    def command(self, node: Node, command: str, deadline: float, **arguments: object) -> str:
        """Send a command to one worker and return the text of its reply.

        :raises CommandError: if the reply is an error, or does not come before the deadline.
        """
        answers = self.broadcast(command, deadline - self.now(), to=node.name, **arguments)
        if node.name not in answers:
            raise CommandError(f"no answer from {node.alias}", indeterminate=True)
        return reply_text(node.alias, answers[node.name])

    def resolve(self, name: str, deadline: float) -> Node:
        """Return the live worker with this name in the brain.

        :raises CommandError: if no worker with that name replies.
        """
        if name in self._node_names:  # a cached name saves a broadcast to all workers
            node_name = self._node_names.pop(name)
            stats = self.broadcast("stats", self._reply_time(deadline), to=node_name).get(node_name)
            if stats is not None:
                return Node(node_name, self.alias(node_name), stats)
        alive = self.broadcast("ping", min(GATHER_TIMEOUT, deadline - self.now()))
        if name in self._node_names:
            return self.refresh(Node(self._node_names[name], self.alias(name), {}), deadline)
        others = ", ".join(sorted(map(self.alias, alive))) or "none"
        raise CommandError(f"no answer from {self.alias(name)}; workers that answer: {others}")

    def refresh(self, node: Node, deadline: float) -> Node:
        """Return the worker with current statistics.

        :raises CommandError: if the worker does not reply.
        """
        answers = self.broadcast("stats", self._reply_time(deadline), to=node.name)
        if node.name not in answers:
            raise CommandError(f"no answer from {node.alias}")
        return Node(node.name, node.alias, answers[node.name])

    def queues(self, node: Node, deadline: float) -> set[str]:
        """Return the names of the queues that a worker consumes."""
        answers = self.broadcast("active_queues", self._reply_time(deadline), to=node.name)
        return {str(queue.get("name")) for queue in answers.get(node.name) or ()}

    def wait_for(self, check: Callable[[], T | None], deadline: float) -> T | None:
        """Call ``check`` until it returns a true value; return its last value.

        Waits at most :data:`EFFECT_TIMEOUT` seconds. A ``CommandError`` counts as ``None``, because
        a busy worker may fail to reply in time.
        """
        deadline = min(deadline, self.now() + EFFECT_TIMEOUT)
        while True:
            try:
                found = check()
            except CommandError:
                found = None
            if found or self.now() + POLL_INTERVAL >= deadline:
                return found
            self._backend.sleep(POLL_INTERVAL)

    def _reply_time(self, deadline: float) -> float:
        return min(REPLY_TIMEOUT, deadline - self.now())


def reply_text(worker: str, reply: object) -> str:
    """Return the text of a worker's reply.

    :raises CommandError: with the worker's text, if the reply is an error.
    """
    if isinstance(reply, Mapping) and "error" in reply:
        raise CommandError(f"{worker} replied: {reply['error']}")
    return str(reply.get("ok", reply)) if isinstance(reply, Mapping) else str(reply)
