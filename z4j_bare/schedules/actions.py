"""Handlers of the schedule commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import CommandError
from z4j_bare.wire.command import Command, CommandOutcome

if TYPE_CHECKING:
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.schedules import ScheduleManager
    from z4j_bare.schedules.stream import Stream

#: A handler, called as ``handler(command, schedules, seconds)``; it must return within ``seconds``.
ScheduleAction = Callable[[Command, "ScheduleManager", float], CommandOutcome]


def fire(command: Command, host: EngineHost, seconds: float) -> Any:
    """Enqueue the task of a schedule that is due according to z4j's own scheduler."""
    args, kwargs = command.arguments("args", "kwargs")
    queue = command.option("queue", str, "text") or None
    name = command.required("task_name")
    return host.invoke(
        "submit_task", name, timeout=seconds, args=args or (), kwargs=kwargs or {}, queue=queue
    )


def resync(command: Command, schedules: ScheduleManager, seconds: float) -> CommandOutcome:
    """Publish all schedules of all schedulers again."""
    del command
    return CommandOutcome.success(schedules.resync(seconds))


def enable(command: Command, schedules: ScheduleManager, seconds: float) -> CommandOutcome:
    """Enable a schedule through the adapter, and request a snapshot."""
    return _apply(command, schedules, "enable", "enable_schedule", seconds)


def disable(command: Command, schedules: ScheduleManager, seconds: float) -> CommandOutcome:
    """Disable a schedule through the adapter, and request a snapshot."""
    return _apply(command, schedules, "disable", "disable_schedule", seconds)


def trigger_now(command: Command, schedules: ScheduleManager, seconds: float) -> CommandOutcome:
    """Run a schedule's task now through the adapter, and request a snapshot."""
    return _apply(command, schedules, "trigger_now", "trigger_now", seconds)


def delete(command: Command, schedules: ScheduleManager, seconds: float) -> CommandOutcome:
    """Delete a schedule through the adapter, and request a snapshot."""
    return _apply(command, schedules, "delete", "delete_schedule", seconds)


def activate(command: Command, schedules: ScheduleManager, seconds: float) -> CommandOutcome:
    """Start the stream that publishes a scheduler's schedules."""
    result = _stream(command, schedules).activate(command.parameters, seconds)
    return CommandOutcome.success(result)


def control(command: Command, schedules: ScheduleManager, seconds: float) -> CommandOutcome:
    """Enable or disable a schedule, and store a confirmation in its stream."""
    # Imported here, because most processes have no scheduler.
    from z4j_bare.schedules import operations

    stream = _stream(command, schedules)
    return CommandOutcome.success(operations.control(stream, command.parameters, seconds))


def mutate(command: Command, schedules: ScheduleManager, seconds: float) -> CommandOutcome:
    """Create, change, delete or trigger a schedule, and publish its stream again."""
    from z4j_bare.schedules import operations

    stream = _stream(command, schedules)
    return CommandOutcome.success(operations.mutate(stream, command.parameters, seconds))


SCHEDULE_ACTIONS: Mapping[str, ScheduleAction] = {
    "schedule.resync": resync,
    "schedule.enable": enable,
    "schedule.disable": disable,
    "schedule.trigger_now": trigger_now,
    "schedule.delete": delete,
    "schedule.external.activate": activate,
    "schedule.external.control": control,
    "schedule.external.mutate": mutate,
}


def _apply(
    command: Command, schedules: ScheduleManager, capability: str, method: str, seconds: float
) -> CommandOutcome:
    stream = _stream(command, schedules)
    identity = command.text("external_id") or command.required("schedule_id", "id")
    if capability not in stream.host.capabilities():
        raise CommandError(f"scheduler {stream.name} does not support {command.action}")
    returned = stream.host.invoke(method, stream.adapter_key(identity), timeout=seconds)
    schedules.mark_changed(stream)
    return CommandOutcome.from_adapter(returned)


def _stream(command: Command, schedules: ScheduleManager) -> Stream:
    name = command.option("scheduler", str, "text")
    target = command.target.get("scheduler")
    if name and target and name != target:
        raise command.error(f"scheduler is {name!r} in the parameters and {target!r} in the target")
    return schedules.stream(name or target)
