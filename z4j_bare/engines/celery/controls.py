"""Worker controls that report what the worker did, not only that a command was sent.

The adapter broadcasts a command and reports success, even if the worker does not exist or the
worker's pool does not support the command. These controls report the worker's reply, and verify the
effect where it is visible.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from z4j_bare.engines.celery.remote_control import GATHER_TIMEOUT, Node, RemoteControl, reply_text
from z4j_bare.errors import CommandError
from z4j_bare.process import ready_worker
from z4j_bare.wire.command import CommandOutcome

if TYPE_CHECKING:
    from celery import Celery

    from z4j_bare.concurrency import BaseConcurrency

#: Seconds by which a command ends before the caller's timeout. The time serves to report an error.
RESERVE = 0.5

#: Maximum seconds to wait until the first process of a restarted pool has been replaced.
#: The wait does not cover all processes, because a busy process is replaced after its task.
RESTART_TIMEOUT = 5.0

_FIXED_SIZE = "the number of tasks that it runs at a time is fixed at its start"
_CANNOT_CANCEL = "it cannot end a running task, or remove a task that waits in it"
_NO_PROCESSES = "it has no processes that could be replaced"

#: The reasons, by pool, why a pool cannot be resized, end a task or be restarted (Celery 5.7).
_NO_RESIZE = {"threads": _FIXED_SIZE, "solo": "it runs one task at a time"}
_NO_TERMINATE = {"threads": _CANNOT_CANCEL, "solo": _CANNOT_CANCEL}
_NO_RESTART = dict.fromkeys(("gevent", "eventlet", "threads", "solo"), _NO_PROCESSES)

_is_rate = re.compile(r"0|[1-9]\d*(/[smh])?").fullmatch


class CeleryControls:
    """Controls of workers and of running tasks. Each method blocks for at most ``seconds``.

    Every method returns a ``CommandOutcome`` or raises ``CommandError``. ``worker`` is the worker's
    name in the brain.

    :param alias: returns a worker's name in the brain.
    """

    def __init__(self, app: Celery, alias: Callable[[str], str], backend: BaseConcurrency) -> None:
        self._remote = RemoteControl(app, alias, backend)

    def restart_worker(self, worker: str, *, seconds: float) -> CommandOutcome:
        """Replace every process of a prefork pool after its current or its next task.

        An idle process is replaced after its next task, because billiard checks for a restart only
        before it waits for a task. The result contains the number of processes that have not been
        replaced yet. The new processes are forked from the same parent and do not load new code.
        """
        deadline = self._deadline(seconds)
        node = self._resolve_capable(worker, deadline, _NO_RESTART)
        try:
            answer = self._remote.command(node, "pool_restart", deadline)
        except CommandError as error:
            if "not enabled" in str(error):
                raise CommandError(
                    _not_supported(node.pool, f"worker_pool_restarts is off on {node.alias}")
                ) from None
            raise
        old = node.processes
        replaced = (
            self._remote.wait_for(
                lambda: old - self._remote.refresh(node, deadline).processes,
                min(deadline, self._remote.now() + RESTART_TIMEOUT),
            )
            or ()
        )
        pending = len(old) - len(replaced)
        return _success(node, replaced=len(replaced), pending=pending, says=answer)

    def pool_grow(self, worker: str, delta: int, *, seconds: float) -> CommandOutcome:
        """Let a worker run ``delta`` more tasks at a time."""
        return self._resize("pool_grow", worker, delta, self._deadline(seconds))

    def pool_shrink(self, worker: str, delta: int, *, seconds: float) -> CommandOutcome:
        """Let a worker run ``delta`` fewer tasks at a time, but at least one."""
        return self._resize("pool_shrink", worker, -delta, self._deadline(seconds))

    def add_consumer(self, worker: str, queue: str, *, seconds: float) -> CommandOutcome:
        """Let a worker consume one more queue."""
        deadline = self._deadline(seconds)
        node = self._remote.resolve(worker, deadline)
        answer = self._remote.command(node, "add_consumer", deadline, queue=queue)
        effect = self._remote.wait_for(
            lambda: queue in self._remote.queues(node, deadline), deadline
        )
        _require_effect(effect, node, answer, f"{queue} is not among its queues")
        return _success(node, queue=queue)

    def cancel_consumer(self, worker: str, queue: str, *, seconds: float) -> CommandOutcome:
        """Stop a worker from consuming a queue."""
        deadline = self._deadline(seconds)
        node = self._remote.resolve(worker, deadline)
        if queue not in self._remote.queues(node, deadline):
            raise CommandError(f"{node.alias} does not consume from {queue}")
        answer = self._remote.command(node, "cancel_consumer", deadline, queue=queue)
        effect = self._remote.wait_for(
            lambda: queue not in self._remote.queues(node, deadline), deadline
        )
        _require_effect(effect, node, answer, f"{queue} is still among its queues")
        return _success(node, queue=queue)

    def rate_limit(
        self, task: str, rate: str, *, seconds: float, worker_name: str | None = None
    ) -> CommandOutcome:
        """Limit how often each worker, or only the named worker, may start a task.

        :param rate: a number of tasks per second (``5`` or ``5/s``), minute (``10/m``) or hour
            (``10/h``), or ``0`` for no limit.
        """
        deadline = self._deadline(seconds)
        if not _is_rate(rate):
            raise CommandError(
                f"rate_limit: {rate!r} is not a rate: use 0, or a number with /s, /m or /h"
            )
        node = self._remote.resolve(worker_name, deadline) if worker_name else None
        refused: dict[str, str] = {}
        if node is not None:
            self._remote.command(node, "rate_limit", deadline, task_name=task, rate_limit=rate)
            accepted = {node.name: ""}
        else:
            accepted, refused = self._broadcast(
                "rate_limit", deadline, task_name=task, rate_limit=rate
            )
        registered = self._remote.broadcast(
            "registered",
            self._gather_time(deadline),
            to=None if node is None else node.name,
            taskinfoitems=["rate_limit"],
        )
        not_applied = [
            name for name in accepted if not _is_limited(registered.get(name), task, rate)
        ]
        if not_applied:
            raise CommandError(
                f"not applied on {', '.join(self._aliases(not_applied))}", indeterminate=True
            )
        facts = {
            "task_name": task,
            "rate": rate,
            "workers": self._aliases(accepted),
            "refused": refused,
        }
        return CommandOutcome.success(facts)

    def cancel_task(self, task_id: str, *, seconds: float) -> CommandOutcome:
        """Revoke a task on all workers. If the task runs, terminate the run."""
        deadline = self._deadline(seconds)
        if _runs_in_this_solo_worker(task_id):  # it would read "revoke" after the task
            raise CommandError(_not_supported("solo", _CANNOT_CANCEL))
        holder, running = self._find_task(task_id, deadline)
        if holder is not None and holder.pool in _NO_TERMINATE:
            raise CommandError(_not_supported(holder.pool, _NO_TERMINATE[holder.pool]))
        accepted, refused = self._broadcast(
            "revoke", deadline, task_id=task_id, terminate=True, signal="SIGTERM"
        )
        if holder is None:
            running = self._revoke_uuid(_as_uuid(task_id), deadline)
        if holder is not None and running:
            effect = self._remote.wait_for(
                lambda: self._has_ended(task_id, holder, deadline), deadline
            )
            answer = accepted.get(holder.name) or refused.get(holder.alias, "nothing")
            _require_effect(effect, holder, answer, "it still runs")
        facts = {
            "task_id": task_id,
            "terminated": running,
            "worker": holder and holder.alias,
            "workers": self._aliases(accepted),
            "refused": refused,
        }
        return CommandOutcome.success(facts)

    def _deadline(self, seconds: float) -> float:
        return self._remote.now() + max(0.0, seconds - RESERVE)

    def _resolve_capable(self, worker: str, deadline: float, reasons: Mapping[str, str]) -> Node:
        """Return the live worker. Raises ``CommandError`` if ``reasons`` contains its pool."""
        node = self._remote.resolve(worker, deadline)
        if node.pool in reasons:
            raise CommandError(_not_supported(node.pool, reasons[node.pool]))
        return node

    def _resize(self, command: str, worker: str, change: int, deadline: float) -> CommandOutcome:
        node = self._resolve_capable(worker, deadline, _NO_RESIZE)
        target = node.size + change
        if target < 1:
            raise CommandError(
                f"{node.alias} runs {node.size} tasks at a time, and at least one must remain"
            )
        answer = self._remote.command(node, command, deadline, n=abs(change))

        def size_reached() -> int | None:
            size = self._remote.refresh(node, deadline).size
            # The size may exceed the target: ``node.size`` omits a process that is being replaced.
            return size if (size - target) * change >= 0 else None

        size = self._remote.wait_for(size_reached, deadline)
        _require_effect(size, node, answer, f"it does not run {target} tasks at a time")
        return _success(node, delta=abs(change), size=size)

    def _broadcast(
        self, command: str, deadline: float, **arguments: object
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Send a command to all workers.

        Return the replies of the workers that accept the command, by node name, and the errors of
        the workers that refuse it, by alias.
        A worker refuses a command for a task that is not registered in the worker.

        :raises CommandError: if every worker refuses the command, or no worker replies.
        """
        answers = self._remote.broadcast(command, self._gather_time(deadline), to=None, **arguments)
        if not answers:
            raise CommandError("no answer from any worker", indeterminate=True)
        accepted, refused = {}, {}
        for name, answer in sorted(answers.items()):
            try:
                accepted[name] = reply_text(self._remote.alias(name), answer)
            except CommandError as error:
                refused[self._remote.alias(name)] = str(error)
        if not accepted:
            raise CommandError("; ".join(refused.values()))
        return accepted, refused

    def _find_task(self, task_id: str, deadline: float) -> tuple[Node | None, bool]:
        """Return the worker whose pool holds the task, and whether the task runs.

        A task that waits for its ETA is not in a pool yet, and every worker can revoke it.
        """
        answers = self._remote.broadcast("query_task", self._gather_time(deadline), ids=[task_id])
        for name, reply in answers.items():
            if (state := _task_state(reply, task_id)) in ("active", "reserved"):
                node = Node(name, self._remote.alias(name), {})
                return self._remote.refresh(node, deadline), state == "active"
        return None, False

    def _revoke_uuid(self, task_id: UUID | None, deadline: float) -> bool:
        """Revoke a task whose id is a UUID, and return whether a worker has terminated it.

        kombu keeps the type of an id. Therefore a worker does not find such a task by the text of
        the id. An error reply can mean that the task was terminated: after the termination, the
        worker fails to join the ids as text (Celery 5.7).
        """
        if task_id is None:
            return False
        answers = self._remote.broadcast(
            "revoke", self._gather_time(deadline), task_id=task_id, terminate=True, signal="SIGTERM"
        )
        return any("UUID found" in str(answer) for answer in answers.values())

    def _has_ended(self, task_id: str, node: Node, deadline: float) -> bool:
        answers = self._remote.broadcast(
            "query_task", self._gather_time(deadline), to=node.name, ids=[task_id]
        )
        return node.name in answers and _task_state(answers[node.name], task_id) != "active"

    def _gather_time(self, deadline: float) -> float:
        return min(GATHER_TIMEOUT, deadline - self._remote.now())

    def _aliases(self, names: Iterable[str]) -> list[str]:
        return sorted(map(self._remote.alias, names))


def _success(node: Node, **facts: object) -> CommandOutcome:
    return CommandOutcome.success({"worker": node.alias, "pool": node.pool, **facts})


def _require_effect(effect: object, node: Node, answer: str, failure: str) -> None:
    if not effect:
        raise CommandError(f"{node.alias} replied: {answer}; but {failure}", indeterminate=True)


def _not_supported(pool: str, why: str) -> str:
    return f"not supported by the {pool} pool: {why}"


def _as_uuid(task_id: str) -> UUID | None:
    """Return the UUID that has the same text as a task id."""
    try:
        typed = UUID(task_id)
    except ValueError:
        return None
    return typed if str(typed) == task_id else None


def _task_state(reply: object, task_id: str) -> str | None:
    """Return the state of a task from a worker's reply, ``{task_id: [state, info]}``."""
    found = reply.get(task_id) if isinstance(reply, Mapping) else None
    return str(found[0]) if found else None


def _is_limited(registered: Iterable[object] | None, task: str, rate: str) -> bool:
    """Return whether ``registered`` lists the task and rate: ``shop.pay [rate_limit=10/m]``."""
    return any(
        str(entry).split(" ", 1)[0] == task and f"rate_limit={rate}]" in str(entry)
        for entry in registered or ()
    )


def _runs_in_this_solo_worker(task_id: str) -> bool:
    """Return whether the task runs in this process, in a solo pool.

    In a solo pool the same thread runs the tasks and reads the control commands.
    """
    pool = getattr(ready_worker(), "pool", None)
    state: Any = sys.modules.get("celery.worker.state")
    if state is None or not type(pool).__module__.endswith(".solo"):
        return False
    return any(str(request.id) == task_id for request in list(state.active_requests))
