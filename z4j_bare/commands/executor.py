"""Executes one command: finds and checks its action, calls the action, returns the outcome."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from z4j_core.errors import Z4JError

from z4j_bare.buffer.rows import DONE, FAILED
from z4j_bare.commands.actions import ENGINE_ACTIONS, choose_host, require_capability
from z4j_bare.commands.results import encode_result
from z4j_bare.errors import AgentError, CommandError
from z4j_bare.schedules.actions import SCHEDULE_ACTIONS
from z4j_bare.wire.command import CommandOutcome

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.commands.dispatcher import DispatchState
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.interfaces import IEvent
    from z4j_bare.schedules import ScheduleManager
    from z4j_bare.wire.command import Command

logger = logging.getLogger("z4j.runtime.commands.executor")

#: Prefix of the ledger keys of fires, which are the effects of ``schedule.fire``.
_FIRE = "fire"

#: Actions whose effect has an id of its own.
#: Each value contains the name of the parameter with this id, and the prefix of the ledger key.
IDEMPOTENCY_KEYS = {
    "schedule.fire": ("fire_id", _FIRE),
    "schedule.trigger_now": ("fire_id", _FIRE),
    "schedule.external.control": ("operation_id", "operation"),
    "schedule.external.mutate": ("operation_id", "operation"),
}


class Executor:
    """Executes commands.

    :param buffer: contains the ledger of effects, so that each effect happens once even if several
        commands request the effect.
    :param state: the dispatcher's state. No call begins after ``stopping`` is set.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        schedules: ScheduleManager | None,
        buffer: BufferManager,
        backend: BaseConcurrency,
        state: DispatchState,
    ) -> None:
        self._hosts = hosts
        self._schedules = schedules
        self._backend = backend
        self._state = state
        self._effects = IdempotentEffects(buffer, backend, state)

    def run(self, command: Command) -> tuple[CommandOutcome, EngineHost | ScheduleManager | None]:
        """Return the command's outcome, and the host whose redactor applies to it. Never raises."""
        host: EngineHost | ScheduleManager | None = None
        try:
            schedule_action = SCHEDULE_ACTIONS.get(command.action)
            if schedule_action is not None and self._schedules is not None:
                host = self._schedules
                call = partial(schedule_action, command, self._schedules)
                return self._run_once(command, call), host
            action = ENGINE_ACTIONS.get(command.action)
            if action is None:
                raise CommandError(f"{command.action} is not an action that this agent knows")
            host = choose_host(command, self._hosts, action)
            require_capability(command, host, action)
            return self._run_once(command, partial(action.run, command, host)), host
        except Exception as error:
            return _failure(command, error), host

    def _run_once(self, command: Command, call: Callable[[float], object]) -> CommandOutcome:
        """Call ``call(seconds)``, unless an earlier command already had the same effect."""
        key = idempotency_key(command)
        if key is None:
            return CommandOutcome.from_adapter(call(self._seconds_left(command)))
        self._seconds_left(command)  # raises before the ledger records the effect as started
        return self._effects.run(key, command, lambda: self._call(command, call))

    def _call(self, command: Command, call: Callable[[float], object]) -> CommandOutcome:
        try:
            return CommandOutcome.from_adapter(call(self._seconds_left(command)))
        except Exception as error:
            return _failure(command, error)

    def _seconds_left(self, command: Command) -> float:
        """Return the seconds until the deadline.

        Raises ``CommandError`` if the deadline has passed or the agent is stopping.
        """
        seconds = command.deadline - self._backend.now()
        if self._state.stopping:
            raise CommandError(f"{command.action} was not started: the agent is stopping")
        if seconds <= 0:
            raise CommandError(
                f"{command.action} was not started: it came too late, or waited too long"
                " for its turn"
            )
        return seconds


def _failure(command: Command, error: Exception) -> CommandOutcome:
    """Return the outcome of a call that raised ``error``."""
    # Each adapter defines its own OffloadTimeoutError, which is not a subclass of TimeoutError.
    if isinstance(error, TimeoutError) or type(error).__name__ == "OffloadTimeoutError":
        return CommandOutcome.indeterminate(command.action, "still running: outcome unknown")
    if isinstance(error, AgentError):
        if getattr(error, "indeterminate", False):
            return CommandOutcome.indeterminate(command.action, str(error))
        return CommandOutcome.failed(str(error))
    if isinstance(error, Z4JError):
        return CommandOutcome.failed(f"{error.code}: {error.message}")
    if isinstance(error, NotImplementedError):
        return CommandOutcome.failed(str(error) or f"{command.action} is not supported")
    logger.error("z4j: command %s failed", command.action, exc_info=error)
    return CommandOutcome.failed(f"internal error: {type(error).__name__}: {error}")


def idempotency_key(command: Command) -> str | None:
    """Return the ledger key of the command's effect; ``None`` if the effect has no id."""
    parameter, prefix = IDEMPOTENCY_KEYS.get(command.action, ("", ""))
    identity = command.parameters.get(parameter)
    return f"{prefix}:{identity}" if isinstance(identity, str) and identity else None


class IdempotentEffects:
    """Runs each effect once, across restarts and across all processes of the agent.

    The ledger records an effect under the effect's own id. The dispatcher also records the command
    under the command's id.
    """

    def __init__(
        self, buffer: BufferManager, backend: BaseConcurrency, state: DispatchState
    ) -> None:
        self._buffer = buffer
        self._backend = backend
        self._state = state
        self._running: dict[str, IEvent] = {}
        self._lock = backend.lock()

    def run(self, key: str, command: Command, call: Callable[[], CommandOutcome]) -> CommandOutcome:
        """Return the outcome of ``call()``, or the outcome of an earlier command for the effect.

        A failed ``schedule.fire`` is tried again.

        If another command in this process is producing the effect, wait for that command. The
        outcome is indeterminate if a crash interrupted the effect, or if another process is
        producing the effect.
        """
        done = self._backend.event()
        while (running := self._register(key, done)) is not done:
            timeout = max(0.0, command.deadline - self._backend.now())
            if not self._backend.wait(running, timeout):
                return CommandOutcome.indeterminate(
                    command.action, "still running for another command: outcome unknown"
                )
        try:
            # The provisional result is empty, because a result under this key must not be sent.
            earlier = self._buffer.claim(key, b"")
            if earlier is not None:
                return _replayed(earlier.result if earlier.state == DONE else b"", key, command)
            outcome = call()
            if not self._state.closed:
                state = FAILED if _may_repeat(key, outcome) else DONE
                self._buffer.settle(key, encode_result(command, outcome), state)
            return outcome
        finally:
            del self._running[key]
            done.set()

    def _register(self, key: str, done: IEvent) -> IEvent:
        """Return the event of the command that runs for ``key``.

        If no command runs for ``key``, register and return ``done``.
        """
        with self._lock:
            return self._running.setdefault(key, done)


def _may_repeat(key: str, outcome: CommandOutcome) -> bool:
    """Return whether another command may try the effect again.

    A ``schedule.fire`` that certainly failed, for example because the broker is unavailable, has
    enqueued nothing. The brain sends the command again with the same ``fire_id``.
    """
    certain = not (outcome.result or {}).get("indeterminate")
    return key.startswith(f"{_FIRE}:") and outcome.status == "failed" and certain


def _replayed(payload: bytes, key: str, command: Command) -> CommandOutcome:
    """Return the recorded outcome of an effect, marked as deduplicated."""
    if not payload:
        return CommandOutcome.indeterminate(
            command.action, f"started before as {key}, but its result is not known"
        )
    body = json.loads(payload)
    outcome = CommandOutcome(body["status"], body["result"], body["error"])
    result = {**(outcome.result or {}), "deduplicated": True, "dedup_key": key}
    return replace(outcome, result=result)
