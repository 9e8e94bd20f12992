"""The actions on engines. Each action turns a command's parameters into one adapter call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from z4j_core.models import DeadLetterPage

from z4j_bare.errors import CommandError
from z4j_bare.schedules.actions import fire
from z4j_bare.wire.command import CommandOutcome
from z4j_bare.wire.fit import original

if TYPE_CHECKING:
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.wire.command import Command

#: Maximum number of tasks in one ``bulk_retry``; the same limit as in z4j-bare 1.13.
MAX_BULK = 10_000
#: Maximum number of dead letters in one page; the same limit as in z4j-bare 1.13.
MAX_PAGE = 200
#: Maximum number of slots by which one command resizes a pool. The brain has the same limit.
MAX_DELTA = 100

#: Engines whose messages do not contain the task's name, with the keyword argument for the name.
NAME_KEYS = {"huey": "__z4j_task_name__", "dramatiq": "__z4j_actor_name__"}

#: Engines whose adapters accept the priority that the brain sends with every task.
PRIORITY_ENGINES = frozenset({"celery", "rq"})

#: An action's handler: ``run(command, host, seconds)``.
Run = Callable[["Command", "EngineHost", float], object]


@dataclass(frozen=True, slots=True)
class Action:
    """An action's handler, and the capabilities of which the engine needs at least one."""

    run: Run
    needs: tuple[str, ...] = ()


def submit_task(command: Command, host: EngineHost, seconds: float) -> object:
    """Enqueue a task by name."""
    args, kwargs = command.arguments("args", "kwargs")
    name = _original(command, command.required("name", "task_name"), "task name")
    when = _scheduling_options(command, host)
    return host.invoke(
        "submit_task",
        name,
        timeout=seconds,
        args=args or (),
        kwargs=kwargs or {},
        queue=_queue(command),
        **when,
    )


def retry_task(command: Command, host: EngineHost, seconds: float) -> object:
    """Run a task again.

    The task gets new arguments only from the operator's overrides. The brain's copy of the original
    arguments is not used, because the copy is redacted.
    """
    task_id = _task_id(command, host)
    args, kwargs = _overrides(command)
    if "retry_task" not in host.capabilities():
        return _resubmit(command, host, seconds, args, kwargs)
    _refuse_unsafe(command, host)
    key, name = NAME_KEYS.get(host.name), _task_name(command)
    if key and name and kwargs is not None:
        kwargs[key] = name
    return host.invoke(
        "retry_task",
        task_id,
        timeout=seconds,
        hints={"task_name": name},
        override_args=args,
        override_kwargs=kwargs,
        **_scheduling_options(command, host),
    )


def cancel_task(command: Command, host: EngineHost, seconds: float) -> object:
    """Revoke a task, and terminate it if it is running."""
    return _control(host, "cancel_task", _task_id(command, host), seconds=seconds)


def bulk_retry(command: Command, host: EngineHost, seconds: float) -> object:
    """Retry all tasks that match the filter.

    If the adapter's ``bulk_retry`` takes no overrides, the tasks keep their own arguments.
    """
    selection = command.option("filter", dict, "an object")
    if not selection:
        raise command.error("filter is required")
    _refuse_unsafe(command, host)
    args, kwargs = _overrides(command)
    maximum = command.positive_int("max", 1000, maximum=MAX_BULK)
    return host.invoke(
        "bulk_retry",
        _original_ids(command, selection),
        timeout=seconds,
        hints={"override_args": args, "override_kwargs": kwargs},
        max=maximum,
    )


def purge_queue(command: Command, host: EngineHost, seconds: float) -> object:
    """Empty a queue. The adapter checks the confirmation token against the queue's depth."""
    queue = _original(command, command.required("queue", "id"), "queue name")
    token = command.option("confirm_token", str, "text")
    return host.invoke(
        "purge_queue", queue, timeout=seconds, confirm_token=token, force=command.flag("force")
    )


def requeue_dead_letter(command: Command, host: EngineHost, seconds: float) -> object:
    """Put a task from the dead-letter queue back into its own queue."""
    task_id = _task_id(command, host)
    _refuse_unsafe(command, host)
    args, kwargs = _overrides(command)
    name = _task_name(command)
    return host.invoke(
        "requeue_dead_letter",
        task_id,
        timeout=seconds,
        hints={"task_name": name},
        override_args=args,
        override_kwargs=kwargs,
    )


def list_dead_letters(command: Command, host: EngineHost, seconds: float) -> object:
    """Return one page of the dead-letter queue."""
    limit = command.positive_int("limit", 100, maximum=MAX_PAGE)
    cursor = command.option("cursor", str, "text")
    page = host.invoke(
        "list_dead_letters",
        command.text("queue", "id"),
        timeout=seconds,
        limit=limit,
        cursor=cursor,
    )
    if not isinstance(page, DeadLetterPage):
        raise command.error(
            f"engine {host.name} returned {type(page).__name__} in place of a page of dead letters"
        )
    return CommandOutcome.success(page.model_dump(mode="json"))


def reconcile_task(command: Command, host: EngineHost, seconds: float) -> object:
    """Return the state of a task according to the engine.

    The state is ``unknown`` if the adapter cannot query the engine.
    """
    task_id = _task_id(command, host)
    if not host.has_method("reconcile_task"):
        return CommandOutcome.success({"task_id": task_id, "engine_state": "unknown"})
    return host.invoke("reconcile_task", task_id, timeout=seconds)


def restart_worker(command: Command, host: EngineHost, seconds: float) -> object:
    """Replace a worker's pool, or its whole process if the engine cannot replace the pool."""
    if host.process_restart is not None:
        return host.process_restart.request(_worker(command))
    return _control(host, "restart_worker", _worker(command), seconds=seconds)


def pool_grow(command: Command, host: EngineHost, seconds: float) -> object:
    """Increase the number of tasks that a worker runs at a time."""
    return _control(host, "pool_grow", _worker(command), _delta(command), seconds=seconds)


def pool_shrink(command: Command, host: EngineHost, seconds: float) -> object:
    """Decrease the number of tasks that a worker runs at a time."""
    return _control(host, "pool_shrink", _worker(command), _delta(command), seconds=seconds)


def add_consumer(command: Command, host: EngineHost, seconds: float) -> object:
    """Make a worker consume from another queue."""
    queue = _original(command, command.required("queue"), "queue name")
    return _control(host, "add_consumer", _worker(command), queue, seconds=seconds)


def cancel_consumer(command: Command, host: EngineHost, seconds: float) -> object:
    """Stop a worker from consuming from a queue."""
    queue = _original(command, command.required("queue"), "queue name")
    return _control(host, "cancel_consumer", _worker(command), queue, seconds=seconds)


def rate_limit(command: Command, host: EngineHost, seconds: float) -> object:
    """Limit how often a task may start, on one worker or on all workers."""
    worker = command.option("worker_name", str, "text") or None
    task = _original(command, command.required("task_name", "id"), "task name")
    rate = command.required("rate")
    return _control(host, "rate_limit", task, rate, seconds=seconds, worker_name=worker)


ENGINE_ACTIONS: Mapping[str, Action] = {
    "submit_task": Action(submit_task),
    "retry_task": Action(retry_task, ("retry_task", "submit_task")),
    "cancel_task": Action(cancel_task, ("cancel_task",)),
    "bulk_retry": Action(bulk_retry, ("bulk_retry",)),
    "purge_queue": Action(purge_queue, ("purge_queue",)),
    "requeue_dead_letter": Action(requeue_dead_letter, ("requeue_dead_letter",)),
    "dlq.list": Action(list_dead_letters, ("list_dead_letters",)),
    "reconcile_task": Action(reconcile_task),
    "restart_worker": Action(restart_worker, ("restart_worker",)),
    "pool_grow": Action(pool_grow, ("pool_grow",)),
    "pool_shrink": Action(pool_shrink, ("pool_shrink",)),
    "add_consumer": Action(add_consumer, ("add_consumer",)),
    "cancel_consumer": Action(cancel_consumer, ("cancel_consumer",)),
    "rate_limit": Action(rate_limit, ("rate_limit",)),
    "schedule.fire": Action(fire),
}


def _control(host: EngineHost, action: str, *args: object, seconds: float, **kwargs: Any) -> object:
    """Call the agent's own worker control, or the adapter if the engine has no such control."""
    call = host.control if host.controls is not None else host.invoke
    return call(action, *args, timeout=seconds, **kwargs)


def _resubmit(
    command: Command,
    host: EngineHost,
    seconds: float,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any] | None,
) -> object:
    """Enqueue a new task with the arguments that the operator sent, in place of a retry.

    An engine without the capability ``retry_task`` keeps no arguments of a task.
    """
    if args is None or kwargs is None:
        raise command.error(
            f"engine {host.name} keeps no arguments: override_args and override_kwargs are required"
        )
    name = _original(command, command.required("task_name", "name"), "task name")
    return host.invoke(
        "submit_task",
        name,
        timeout=seconds,
        args=args,
        kwargs=kwargs,
        queue=_queue(command),
        **_scheduling_options(command, host),
    )


def _refuse_unsafe(command: Command, host: EngineHost) -> None:
    """Raise ``CommandError`` for an old adapter.

    Such an adapter would retry with redacted arguments, or would unpickle the task.
    """
    if host.name in NAME_KEYS and not host.retries_by_reference:
        raise command.error(
            f"this version of the {host.name} adapter cannot retry safely: upgrade it"
        )
    if host.retry_problem:
        raise command.error(host.retry_problem)


def _task_id(command: Command, host: EngineHost) -> str:
    """Return the task's id.

    In the command's target, the id follows the engine's name and a colon. These are removed.
    """
    shown = command.text("task_id") or command.required("task_id", "id").removeprefix(
        f"{host.name}:"
    )
    return _original(command, shown, "id")


def _original_ids(command: Command, selection: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bulk action's filter with the original task ids."""
    result = dict(selection)
    if isinstance(ids := result.get("task_ids"), list):
        result["task_ids"] = [_original(command, str(each), "id") for each in ids]
    if isinstance(priorities := result.get("task_priorities"), dict):
        result["task_priorities"] = {
            _original(command, str(each), "id"): priority for each, priority in priorities.items()
        }
    return result


def _task_name(command: Command) -> str | None:
    """Return the task's name, or ``None`` if the command has none."""
    name = command.text("task_name", "name")
    return None if name is None else _original(command, name, "task name")


def _original(command: Command, shown: str, what: str) -> str:
    """Return the text that the agent has changed to ``shown`` for the brain's database.

    With the changed text, an action could succeed without an effect. For example, Celery accepts
    the revocation of an id that no task has.
    """
    found = original(shown)
    if found is None:
        raise command.error(
            f"the {what} was changed for the brain's database, and this process does not know the"
            " original: only the process that reported it does"
        )
    return found


def _overrides(command: Command) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    args, kwargs = command.arguments("override_args", "override_kwargs")
    if (args is None) != (kwargs is None):
        raise command.error("override_args and override_kwargs must be given together")
    return args, kwargs


def _scheduling_options(command: Command, host: EngineHost) -> dict[str, Any]:
    priority = command.option("priority", (str, int), "a word or a whole number")
    if priority == "normal" and host.name not in PRIORITY_ENGINES:
        priority = None
    return {"eta": command.eta(time.time()), "priority": priority}


def _queue(command: Command) -> str | None:
    return command.option("queue", str, "text") or None


def _worker(command: Command) -> str:
    return command.required("worker_name", "worker_id", "id")


def _delta(command: Command) -> int:
    delta = command.positive_int("delta", 1, maximum=MAX_DELTA + 1)
    if delta > MAX_DELTA:
        raise command.error(f"delta must be {MAX_DELTA} or less")
    return delta


def choose_host(command: Command, hosts: Mapping[str, EngineHost], action: Action) -> EngineHost:
    """Return the engine that must execute a command.

    If the command names no engine, for example a command for a queue or a rate limit, return the
    only engine, or the only engine with the required capability. Raises ``CommandError`` if there
    is no such engine.
    """
    name = _engine_name(command)
    if name is not None:
        if name not in hosts:
            raise CommandError(f"this agent has no engine {name!r}, only {_list(hosts)}")
        return hosts[name]
    candidates = list(hosts.values())
    if len(candidates) > 1:
        candidates = [host for host in candidates if _is_capable(host, action)]
    if len(candidates) != 1:
        raise command.error(f"engine is required: this agent has {_list(hosts)}")
    return candidates[0]


def require_capability(command: Command, host: EngineHost, action: Action) -> None:
    """Raise ``CommandError`` unless the engine has a capability that the action needs."""
    if not _is_capable(host, action):
        raise CommandError(f"engine {host.name} does not support {command.action}")


def _is_capable(host: EngineHost, action: Action) -> bool:
    if action.run is restart_worker and host.process_restart is not None:
        return True  # the restart states the reason if it refuses
    return not action.needs or not set(action.needs).isdisjoint(host.capabilities())


def _engine_name(command: Command) -> str | None:
    """Return the name of the engine that the command names, or ``None``.

    An engine in the filter of a bulk action takes precedence, because the brain chooses the agent
    by this filter.
    """
    selection = command.parameters.get("filter")
    if isinstance(selection, Mapping):
        engine = selection.get("engine")
        if isinstance(engine, str) and engine:
            return engine
    named = command.option("engine", str, "text")
    if named == "":
        raise command.error("engine must be text")
    target = command.target.get("engine")
    if named and target and named != target:
        raise command.error(f"engine is {named!r} in the parameters and {target!r} in the target")
    return named or (str(target) if target else None)


def _list(hosts: Mapping[str, EngineHost]) -> str:
    return ", ".join(sorted(hosts)) or "none"
