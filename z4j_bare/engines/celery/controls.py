"""Controls of Celery's workers that report what the worker says and does, not only that they were sent.

The adapter broadcasts and reports success, also for a worker that does not exist and for a pool that cannot do it
(``adapter-surface`` 2.2). Here the worker's own answer decides, and where the effect can be seen it is looked for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from z4j_core.models import CommandResult

from z4j_bare.engines.celery.remote_control import GATHER, Node, RemoteControl, said
from z4j_bare.errors import CommandError
from z4j_bare.process import ready_worker

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

#: Seconds kept back from the time for a command, so that our own words are the answer and not the caller's time-out.
RESERVE = 0.5

#: Seconds for the first process of a restarted pool to go; the others take as long as their tasks.
RESTART = 5.0

_FIXED = "the number of tasks that it runs at a time is fixed at its start"
_ENDLESS = "it cannot end a task that it has begun, or take back one that waits in it"
_LASTING = "it has no processes that could be replaced"
#: What pools cannot do, and why (Celery 5.7).
_RESIZE = {"threads": _FIXED, "solo": "it runs one task at a time"}
_END = {"threads": _ENDLESS, "solo": _ENDLESS}
_RESTART = dict.fromkeys(("gevent", "eventlet", "threads", "solo"), _LASTING)

_RATE = re.compile(r"0|[1-9]\d*(/[smh])?").fullmatch


class CeleryControls:
    """What an operator can do with workers and with running tasks; blocking, each within ``seconds``.

    All methods return a ``CommandResult`` or raise ``CommandError``. A worker goes by its name in the brain.
    """

    def __init__(self, app: Any, alias: Callable[[str], str], backend: BaseConcurrency) -> None:
        self._nodes = RemoteControl(app, alias, backend)

    def restart_worker(self, worker: str, *, seconds: float) -> CommandResult:
        """Let every process of a prefork pool be replaced after the task that it runs, or else after its next one.

        Idle ones wait for a task, so the answer says how many are still to come (billiard looks at the order before each
        task, and an idle process does not look). Code is not loaded again: the new ones are forked of the old parent.
        """
        until = self._until(seconds)
        node = self._able(worker, until, _RESTART)
        try:
            answer = self._nodes.tell(node, "pool_restart", until)
        except CommandError as error:
            if "not enabled" in str(error):
                raise CommandError(
                    _not_supported(node.pool, f"worker_pool_restarts is off on {node.alias}")
                ) from None
            raise
        old = node.processes
        soon = min(until, self._nodes.now() + RESTART)
        gone = self._nodes.see(lambda: old - self._nodes.again(node, until).processes, soon) or ()
        return _done(node, replaced=len(gone), pending=len(old) - len(gone), says=answer)

    def pool_grow(self, worker: str, delta: int, *, seconds: float) -> CommandResult:
        """Let a worker run ``delta`` more tasks at a time."""
        return self._resize("pool_grow", worker, delta, self._until(seconds))

    def pool_shrink(self, worker: str, delta: int, *, seconds: float) -> CommandResult:
        """Let a worker run ``delta`` fewer tasks at a time, but one at least."""
        return self._resize("pool_shrink", worker, -delta, self._until(seconds))

    def add_consumer(self, worker: str, queue: str, *, seconds: float) -> CommandResult:
        """Let a worker consume from one more queue."""
        until = self._until(seconds)
        node = self._nodes.find(worker, until)
        answer = self._nodes.tell(node, "add_consumer", until, queue=queue)
        seen = self._nodes.see(lambda: queue in self._nodes.queues(node, until), until)
        _expect(seen, node, answer, f"{queue} is not among its queues")
        return _done(node, queue=queue)

    def cancel_consumer(self, worker: str, queue: str, *, seconds: float) -> CommandResult:
        """Let a worker consume from a queue no longer."""
        until = self._until(seconds)
        node = self._nodes.find(worker, until)
        if queue not in self._nodes.queues(node, until):
            raise CommandError(f"{node.alias} does not consume from {queue}")
        answer = self._nodes.tell(node, "cancel_consumer", until, queue=queue)
        seen = self._nodes.see(lambda: queue not in self._nodes.queues(node, until), until)
        _expect(seen, node, answer, f"{queue} is still among its queues")
        return _done(node, queue=queue)

    def rate_limit(
        self, task: str, rate: str, *, seconds: float, worker_name: str | None = None
    ) -> CommandResult:
        """Limit how often each worker, or the named one, may start a task: ``10/m``, ``5``, or ``0`` for no limit."""
        until = self._until(seconds)
        if not _RATE(rate):
            raise CommandError(f"rate_limit: {rate!r} is no rate: 0, or a number with /s, /m or /h")
        node = self._nodes.find(worker_name, until) if worker_name else None
        refused: dict[str, str] = {}
        if node is not None:
            self._nodes.tell(node, "rate_limit", until, task_name=task, rate_limit=rate)
            agreed = {node.name: ""}
        else:
            agreed, refused = self._everybody("rate_limit", until, task_name=task, rate_limit=rate)
        to = None if node is None else node.name
        limited = self._nodes.ask(
            "registered", self._gather(until), to=to, taskinfoitems=["rate_limit"]
        )
        deaf = [name for name in agreed if not _is_limited(limited.get(name), task, rate)]
        if deaf:
            raise CommandError(
                f"not in force on {', '.join(self._aliases(deaf))}", indeterminate=True
            )
        facts = {
            "task_name": task,
            "rate": rate,
            "workers": self._aliases(agreed),
            "refused": refused,
        }
        return CommandResult(status="success", result=facts)

    def cancel_task(self, task_id: str, *, seconds: float) -> CommandResult:
        """Revoke a task on all workers, and end it where it runs."""
        until = self._until(seconds)
        if _busy_solo(task_id):  # it would not hear us before the task ends
            raise CommandError(_not_supported("solo", _ENDLESS))
        holder, runs = self._holder(task_id, until)
        if holder is not None and holder.pool in _END:
            raise CommandError(_not_supported(holder.pool, _END[holder.pool]))
        agreed, refused = self._everybody(
            "revoke", until, task_id=task_id, terminate=True, signal="SIGTERM"
        )
        if holder is not None and runs:
            gone = self._nodes.see(lambda: self._ended(task_id, holder, until), until)
            answer = agreed.get(holder.name) or refused.get(holder.alias, "nothing")
            _expect(gone, holder, answer, "it still runs")
        facts = {"task_id": task_id, "terminated": runs, "worker": holder and holder.alias}
        return CommandResult(
            status="success", result={**facts, "workers": self._aliases(agreed), "refused": refused}
        )

    def _until(self, seconds: float) -> float:
        return self._nodes.now() + max(0.0, seconds - RESERVE)

    def _able(self, worker: str, until: float, cannot: Mapping[str, str]) -> Node:
        node = self._nodes.find(worker, until)
        if node.pool in cannot:
            raise CommandError(_not_supported(node.pool, cannot[node.pool]))
        return node

    def _resize(self, command: str, worker: str, change: int, until: float) -> CommandResult:
        node = self._able(worker, until, _RESIZE)
        wanted = node.size + change
        if wanted < 1:
            raise CommandError(
                f"{node.alias} runs {node.size} tasks at a time, and one has to be left"
            )
        answer = self._nodes.tell(node, command, until, n=abs(change))

        def reached() -> int | None:
            size = self._nodes.again(node, until).size
            # A prefork process that was just being replaced was not counted before.
            return size if (size - wanted) * change >= 0 else None

        size = self._nodes.see(reached, until)
        _expect(size, node, answer, f"it does not run {wanted} tasks at a time")
        return _done(node, delta=abs(change), size=size)

    def _everybody(
        self, command: str, until: float, **arguments: Any
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Give all workers a command; return what those say that agree, by name, and those that refuse, by alias.

        Not every worker knows every task. ``CommandError`` when all refuse, or none is there.
        """
        answers = self._nodes.ask(command, self._gather(until), **arguments)
        if not answers:
            raise CommandError("no answer from any worker", indeterminate=True)
        agreed, refused = {}, {}
        for name, answer in sorted(answers.items()):
            try:
                agreed[name] = said(self._nodes.alias(name), answer)
            except CommandError as error:
                refused[self._nodes.alias(name)] = str(error)
        if not agreed:
            raise CommandError("; ".join(refused.values()))
        return agreed, refused

    def _holder(self, task_id: str, until: float) -> tuple[Node | None, bool]:
        """Return the worker whose pool has the task, and whether it runs already.

        One that waits for its time is not in the pool yet: any worker drops it then.
        """
        answers = self._nodes.ask("query_task", self._gather(until), ids=[task_id])
        for name, known in answers.items():
            if (state := _state(known, task_id)) in ("active", "reserved"):
                return self._nodes.again(
                    Node(name, self._nodes.alias(name), {}), until
                ), state == "active"
        return None, False

    def _ended(self, task_id: str, node: Node, until: float) -> bool:
        answers = self._nodes.ask("query_task", self._gather(until), to=node.name, ids=[task_id])
        return node.name in answers and _state(answers[node.name], task_id) != "active"

    def _gather(self, until: float) -> float:
        return min(GATHER, until - self._nodes.now())

    def _aliases(self, names: Iterable[str]) -> list[str]:
        return sorted(map(self._nodes.alias, names))


def _done(node: Node, **facts: Any) -> CommandResult:
    return CommandResult(
        status="success", result={"worker": node.alias, "pool": node.pool, **facts}
    )


def _expect(seen: Any, node: Node, answer: Any, otherwise: str) -> None:
    if not seen:
        raise CommandError(
            f"{node.alias} says: {answer}; but in the end {otherwise}", indeterminate=True
        )


def _not_supported(pool: str, why: str) -> str:
    return f"not supported by the {pool} pool: {why}"


def _state(known: Any, task_id: str) -> str | None:
    """Return a worker's ``[state, info]`` of a task, the state alone."""
    found = known.get(task_id) if isinstance(known, Mapping) else None
    return str(found[0]) if found else None


def _is_limited(registered: Any, task: str, rate: str) -> bool:
    """Whether a worker's list, ``shop.pay [rate_limit=10/m]``, shows the rate for the task."""
    return any(
        str(entry).split(" ", 1)[0] == task and f"rate_limit={rate}]" in str(entry)
        for entry in registered or ()
    )


def _busy_solo(task_id: str) -> bool:
    """Whether this very process runs the task in a solo pool, whose only thread reads the control commands too."""
    pool = getattr(ready_worker(), "pool", None)
    state: Any = sys.modules.get("celery.worker.state")
    if state is None or not type(pool).__module__.endswith(".solo"):
        return False
    return any(request.id == task_id for request in list(state.active_requests))
