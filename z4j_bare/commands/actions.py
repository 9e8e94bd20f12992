"""The command table: one small function per action, from the frame's parameters to the adapter's call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from z4j_core.models import CommandResult, DeadLetterPage

from z4j_bare.errors import CommandError
from z4j_bare.schedules.actions import fire

if TYPE_CHECKING:
    from z4j_bare.commands.command import Command
    from z4j_bare.engines.host import EngineHost

#: At most so many tasks in one ``bulk_retry``, dead letters in one page, and slots in one resize of a pool. The first two
#: are the existing agent's, the last the brain's.
MAX_BULK = 10_000
MAX_PAGE = 200
MAX_DELTA = 100

#: Under which keyword these engines look for the task's name, as their messages alone do not tell it.
NAME_KEYS = {"huey": "__z4j_task_name__", "dramatiq": "__z4j_actor_name__"}

#: Engines whose adapters know the brain's words for priorities. It has one for every task, and others refuse any.
RANKING = frozenset({"celery", "rq"})

Run = Callable[["Command", "EngineHost", float], Any]


@dataclass(frozen=True, slots=True)
class Action:
    """What carries an action out within so many seconds, and the capabilities of which the engine needs one, if any."""

    run: Run
    needs: tuple[str, ...] = ()


def submit_task(command: Command, host: EngineHost, seconds: float) -> Any:
    """Enqueue a task by name."""
    args, kwargs = command.arguments("args", "kwargs")
    name = command.required("name", "task_name")
    when = _when(command, host)
    return host.invoke(
        "submit_task",
        name,
        timeout=seconds,
        args=args or (),
        kwargs=kwargs or {},
        queue=_queue(command),
        **when,
    )


def retry_task(command: Command, host: EngineHost, seconds: float) -> Any:
    """Run a task again. Only the operator's overrides are used: the brain's own copy of the arguments is redacted."""
    task_id = _task_id(command, host)
    args, kwargs = _overrides(command)
    if "retry_task" not in host.capabilities():
        return _resubmit(command, host, seconds, args, kwargs)
    _refuse_unsafe(command, host)
    key, name = NAME_KEYS.get(host.name), command.text("task_name", "name")
    if key and name and kwargs is not None:
        kwargs[key] = name
    return host.invoke(
        "retry_task",
        task_id,
        timeout=seconds,
        hints={"task_name": name},
        override_args=args,
        override_kwargs=kwargs,
        **_when(command, host),
    )


def cancel_task(command: Command, host: EngineHost, seconds: float) -> Any:
    """Revoke a task, ending it if it runs."""
    return _controlled(host, "cancel_task", _task_id(command, host), seconds=seconds)


def bulk_retry(command: Command, host: EngineHost, seconds: float) -> Any:
    """Run many tasks again: those that the filter lists."""
    chosen = command.option("filter", dict, "an object")
    if not chosen:
        raise command.error("filter is required")
    _refuse_unsafe(command, host)
    args, kwargs = _overrides(command)
    most = command.whole("max", 1000, most=MAX_BULK)
    return host.invoke(
        "bulk_retry",
        dict(chosen),
        timeout=seconds,
        max=most,
        override_args=args,
        override_kwargs=kwargs,
    )


def purge_queue(command: Command, host: EngineHost, seconds: float) -> Any:
    """Empty a queue; the adapter compares the token with the queue's depth."""
    queue = command.required("queue", "id")
    token = command.option("confirm_token", str, "text")
    return host.invoke(
        "purge_queue", queue, timeout=seconds, confirm_token=token, force=command.flag("force")
    )


def requeue_dead_letter(command: Command, host: EngineHost, seconds: float) -> Any:
    """Bring a task back from where the engine keeps what has failed for good."""
    task_id = _task_id(command, host)
    _refuse_unsafe(command, host)
    args, kwargs = _overrides(command)
    name = command.text("task_name", "name")
    return host.invoke(
        "requeue_dead_letter",
        task_id,
        timeout=seconds,
        hints={"task_name": name},
        override_args=args,
        override_kwargs=kwargs,
    )


def list_dead_letters(command: Command, host: EngineHost, seconds: float) -> Any:
    """Return a page of what has failed for good."""
    limit = command.whole("limit", 100, most=MAX_PAGE)
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
    return CommandResult(status="success", result=page.model_dump(mode="json"))


def reconcile_task(command: Command, host: EngineHost, seconds: float) -> Any:
    """Return what the engine itself knows of a task; an engine that cannot tell knows nothing of it."""
    task_id = _task_id(command, host)
    if not host.offers("reconcile_task"):
        return CommandResult(
            status="success", result={"task_id": task_id, "engine_state": "unknown"}
        )
    return host.invoke("reconcile_task", task_id, timeout=seconds)


def restart_worker(command: Command, host: EngineHost, seconds: float) -> Any:
    """Give a worker a new pool, or where the engine has no way to do that, a new process."""
    if host.process_restart is not None:
        return host.process_restart.order(_worker(command))
    return _controlled(host, "restart_worker", _worker(command), seconds=seconds)


def pool_grow(command: Command, host: EngineHost, seconds: float) -> Any:
    """Let a worker run more tasks at a time."""
    return _controlled(host, "pool_grow", _worker(command), _delta(command), seconds=seconds)


def pool_shrink(command: Command, host: EngineHost, seconds: float) -> Any:
    """Let a worker run fewer tasks at a time."""
    return _controlled(host, "pool_shrink", _worker(command), _delta(command), seconds=seconds)


def add_consumer(command: Command, host: EngineHost, seconds: float) -> Any:
    """Let a worker consume from one more queue."""
    return _controlled(
        host, "add_consumer", _worker(command), command.required("queue"), seconds=seconds
    )


def cancel_consumer(command: Command, host: EngineHost, seconds: float) -> Any:
    """Let a worker consume from a queue no longer."""
    return _controlled(
        host, "cancel_consumer", _worker(command), command.required("queue"), seconds=seconds
    )


def rate_limit(command: Command, host: EngineHost, seconds: float) -> Any:
    """Limit how often a task may start, on one worker or on all."""
    worker = command.option("worker_name", str, "text") or None
    task, rate = command.required("task_name", "id"), command.required("rate")
    return _controlled(host, "rate_limit", task, rate, seconds=seconds, worker_name=worker)


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


def _controlled(host: EngineHost, action: str, *args: Any, seconds: float, **kwargs: Any) -> Any:
    """Use our own way of controlling workers where there is one for the engine, else the adapter's."""
    act = host.control if host.controls is not None else host.invoke
    return act(action, *args, timeout=seconds, **kwargs)


def _resubmit(
    command: Command,
    host: EngineHost,
    seconds: float,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any] | None,
) -> Any:
    """Retry with an engine that can only submit: it keeps no arguments, so the operator has to give them."""
    if args is None or kwargs is None:
        raise command.error(
            f"engine {host.name} keeps no arguments: override_args and override_kwargs are required"
        )
    name = command.required("task_name", "name")
    return host.invoke(
        "submit_task",
        name,
        timeout=seconds,
        args=args,
        kwargs=kwargs,
        queue=_queue(command),
        **_when(command, host),
    )


def _refuse_unsafe(command: Command, host: EngineHost) -> None:
    """Refuse an adapter so old that it would retry with the brain's redacted copy of the arguments."""
    if host.name in NAME_KEYS and not host.retries_by_reference:
        raise command.error(
            f"this version of the {host.name} adapter cannot retry safely: upgrade it"
        )


def _task_id(command: Command, host: EngineHost) -> str:
    """Return the task's id; the target's own id has the engine in front of it."""
    return command.text("task_id") or command.required("task_id", "id").removeprefix(
        f"{host.name}:"
    )


def _overrides(command: Command) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    args, kwargs = command.arguments("override_args", "override_kwargs")
    if (args is None) != (kwargs is None):
        raise command.error("override_args and override_kwargs come together or not at all")
    return args, kwargs


def _when(command: Command, host: EngineHost) -> dict[str, Any]:
    priority = command.option("priority", (str, int), "a word or a whole number")
    if priority == "normal" and host.name not in RANKING:
        priority = None
    return {"eta": command.eta(time.time()), "priority": priority}


def _queue(command: Command) -> str | None:
    return command.option("queue", str, "text") or None


def _worker(command: Command) -> str:
    return command.required("worker_name", "worker_id", "id")


def _delta(command: Command) -> int:
    delta = command.whole("delta", 1, most=MAX_DELTA + 1)
    if delta > MAX_DELTA:
        raise command.error(f"delta must be {MAX_DELTA} or less")
    return delta


def choose(command: Command, hosts: Mapping[str, EngineHost], action: Action) -> EngineHost:
    """Return the engine that a command is for: the one it names, else the only one, else the only one able to do it.

    The brain names none for a queue or a rate limit. Raises ``CommandError``.
    """
    name = _named(command)
    if name is not None:
        if name not in hosts:
            raise CommandError(f"this agent has no engine {name!r}, only {_list(hosts)}")
        return hosts[name]
    able = (
        hosts
        if len(hosts) == 1
        else {key: host for key, host in hosts.items() if _able(host, action)}
    )
    if len(able) != 1:
        raise command.error(f"engine is required: this agent has {_list(hosts)}")
    return next(iter(able.values()))


def check(command: Command, host: EngineHost, action: Action) -> None:
    """Raise ``CommandError`` unless the engine says that it can do this."""
    if not _able(host, action):
        raise CommandError(f"engine {host.name} does not support {command.action}")


def _able(host: EngineHost, action: Action) -> bool:
    if action.run is restart_worker and host.process_restart is not None:
        return True  # which says itself why it would not
    return not action.needs or not set(action.needs).isdisjoint(host.capabilities())


def _named(command: Command) -> str | None:
    """Return the engine's name; the filter of a bulk action is the authority, as the brain targets by it."""
    chosen = command.parameters.get("filter")
    if isinstance(chosen, Mapping) and isinstance(chosen.get("engine"), str) and chosen["engine"]:
        return str(chosen["engine"])
    named = command.option("engine", str, "text")
    if named == "":
        raise command.error("engine must be text")
    target = command.target.get("engine")
    if named and target and named != target:
        raise command.error(f"engine is {named!r} in the parameters and {target!r} in the target")
    return named or (str(target) if target else None)


def _list(hosts: Mapping[str, EngineHost]) -> str:
    return ", ".join(sorted(hosts)) or "none"
