"""Celery's live workers: asked by broadcast, found by the name that the brain knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from z4j_bare.engines.celery.engine import broker_connection
from z4j_bare.errors import CommandError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

T = TypeVar("T")

#: Seconds for one worker's answer to a question, and between the answers of all when nobody knows how many there are.
ASK = 2.0
GATHER = 1.5

#: Seconds between two looks whether something has come about, and for which it may take to.
LOOK = 0.2
EFFECT = 15.0

#: Names of workers kept for the next question; they change where hosts come and go.
REMEMBERED = 1000

#: Module of a pool's class to the name by which users start it, where these differ.
_POOLS = {"thread": "threads"}


@dataclass(frozen=True, slots=True)
class Node:
    """A worker that has just answered. ``alias`` is its name in the brain, ``pool`` such as ``gevent``."""

    name: str
    alias: str
    stats: Mapping[str, Any]

    @property
    def pool(self) -> str:
        """What the worker runs its tasks in; ask the worker, for ``conf.worker_pool`` proves nothing."""
        module, _, _ = str(self._pool().get("implementation", "")).partition(":")
        kind = module.rpartition(".")[2]
        return _POOLS.get(kind, kind) or "unknown"

    @property
    def size(self) -> int:
        """How many tasks it runs at a time; prefork's own figure is the one it was started with."""
        processes = self._pool().get("processes")
        return (
            len(processes)
            if self.pool == "prefork" and processes
            else int(self._pool().get("max-concurrency") or 0)
        )

    @property
    def processes(self) -> frozenset[int]:
        """The pids of a prefork pool."""
        return frozenset(self._pool().get("processes") or ())

    def _pool(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.stats.get("pool") or {}
        return found


class RemoteControl:
    """Asks workers through Celery's remote control. Methods wait; none is for loop steps.

    :param app: the Celery application.
    :param alias: a worker's name as the brain keeps it.
    """

    def __init__(self, app: Any, alias: Callable[[str], str], backend: BaseConcurrency) -> None:
        self.alias = alias
        self._app = app
        self._backend = backend
        self._real: dict[str, str] = {}

    def now(self) -> float:
        """Monotonic seconds."""
        return self._backend.now()

    def ask(
        self, command: str, seconds: float, *, to: str | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """Broadcast a control command and return the answers by worker.

        From one worker the first answer ends it; from all, ``seconds`` without a further one. Raises ``CommandError``
        when the broker fails.
        """
        try:
            replies = self._backend.call_blocking(
                self._broadcast, command, arguments, to, max(0.1, seconds)
            )
        except Exception as error:
            # The text may quote the broker's address with its password; the class says enough.
            raise CommandError(
                f"the broker failed: {type(error).__name__}", indeterminate=True
            ) from error
        answers = {name: answer for reply in replies or () for name, answer in reply.items()}
        if len(self._real) > REMEMBERED:
            self._real.clear()
        for name in answers:
            self._real[name] = self._real[self.alias(name)] = name
        return answers

    def _broadcast(
        self, command: str, arguments: dict[str, Any], to: str | None, seconds: float
    ) -> Any:
        """Ask on a connection of our own, publishing included.

        A child that is forked meanwhile closes the app's pool, and would read the replies off the socket that it shares
        with us there; it hangs when we are first (kombu 5.7, prefork).
        """
        with broker_connection(self._app) as connection:
            connection.connect()
            mailbox = self._app.control.mailbox(connection)
            mailbox.producer_pool = None
            if to is None:
                return mailbox.multi_call(command, arguments, timeout=seconds)
            return mailbox.call([to], command, arguments, timeout=seconds)

    def tell(self, node: Node, command: str, until: float, **arguments: Any) -> str:
        """Give one worker a command and return what it says to it, waiting for that ``until`` the end of our time.

        Raises ``CommandError`` with its error, or when it does not answer.
        """
        answers = self.ask(command, until - self.now(), to=node.name, **arguments)
        if node.name not in answers:
            raise CommandError(f"no answer from {node.alias}", indeterminate=True)
        return said(node.alias, answers[node.name])

    def find(self, name: str, until: float) -> Node:
        """Return the live worker that the brain calls ``name``; ``CommandError`` when there is none."""
        if name in self._real:  # heard of before, which costs no round among all
            real = self._real.pop(name)
            stats = self.ask("stats", min(ASK, until - self.now()), to=real).get(real)
            if stats is not None:
                return Node(real, self.alias(real), stats)
        alive = self.ask("ping", min(GATHER, until - self.now()))
        if name in self._real:
            return self.again(Node(self._real[name], self.alias(name), {}), until)
        others = ", ".join(sorted(map(self.alias, alive))) or "none"
        raise CommandError(f"no answer from {self.alias(name)}; workers that answer: {others}")

    def again(self, node: Node, until: float) -> Node:
        """Ask a worker for its figures once more."""
        answers = self.ask("stats", min(ASK, until - self.now()), to=node.name)
        if node.name not in answers:
            raise CommandError(f"no answer from {node.alias}")
        return Node(node.name, node.alias, answers[node.name])

    def queues(self, node: Node, until: float) -> set[str]:
        """Return the names of the queues from which a worker consumes."""
        answers = self.ask("active_queues", min(ASK, until - self.now()), to=node.name)
        return {str(queue.get("name")) for queue in answers.get(node.name) or ()}

    def see(self, look: Callable[[], T | None], until: float) -> T | None:
        """Look until there is something to see, for :data:`EFFECT` seconds; return it, or ``None``.

        A worker that is too busy to answer one look may answer the next.
        """
        until = min(until, self.now() + EFFECT)
        while True:
            try:
                found = look()
            except CommandError:
                found = None
            if found or self.now() + LOOK >= until:
                return found
            self._backend.sleep(LOOK)


def said(worker: str, answer: Any) -> str:
    """Return a worker's own words; raise ``CommandError`` with them when they are an error."""
    if isinstance(answer, Mapping) and "error" in answer:
        raise CommandError(f"{worker} says: {answer['error']}")
    return str(answer.get("ok", answer)) if isinstance(answer, Mapping) else str(answer)
