"""What comes of a command: its action found, checked and called, and whatever happens made an answer.

Most workers get no command for days, so this module and all that it imports are loaded with the first one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_core.errors import Z4JError

from z4j_bare.commands.actions import ENGINE_ACTIONS, check, choose
from z4j_bare.commands.once import IdempotentEffects, key_of
from z4j_bare.commands.results import Answer, indeterminate
from z4j_bare.errors import AgentError, CommandError
from z4j_bare.schedules.actions import SCHEDULE_ACTIONS

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.commands.command import Command
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.schedules import ScheduleManager

logger = logging.getLogger("z4j.runtime.dispatcher")


class Executor:
    """Carries commands out.

    :param keeper: its ledger knows the effects that must happen once although several commands ask for them.
    :param stopping: whether nothing may begin any more.
    :param ended: whether the store is about to be closed, so that nothing must be entered any more.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        schedules: ScheduleManager | None,
        buffer: BufferManager,
        backend: BaseConcurrency,
        stop_event: Callable[[], bool],
        ended: Callable[[], bool],
    ) -> None:
        self._hosts = hosts
        self._schedules = schedules
        self._backend = backend
        self._stop_event = stop_event
        self._once = IdempotentEffects(buffer, backend, ended)

    def outcome(self, command: Command) -> tuple[Answer, EngineHost | ScheduleManager | None]:
        """Return the answer to a command, and whose redactor is to look at it; never raises."""
        host: EngineHost | ScheduleManager | None = None
        try:
            act = SCHEDULE_ACTIONS.get(command.action)
            if act is not None and self._schedules is not None:
                host = self._schedules
                return self._effect(command, partial(act, command, self._schedules)), host
            action = ENGINE_ACTIONS.get(command.action)
            if action is None:
                raise CommandError(f"{command.action} is not an action that this agent knows")
            host = choose(command, self._hosts, action)
            check(command, host, action)
            return self._effect(command, partial(action.run, command, host)), host
        except Exception as error:
            return _failure(command, error), host

    def _effect(self, command: Command, act: Callable[[float], Any]) -> Answer:
        """Call ``act(seconds)``, once for an effect that has an id of its own."""
        key = key_of(command)
        if key is None:
            return Answer.of(act(self._seconds(command)))
        self._seconds(command)  # what must not begin must not be remembered as begun
        return self._once.run(key, command, lambda: self._tried(command, act))

    def _tried(self, command: Command, act: Callable[[float], Any]) -> Answer:
        try:
            return Answer.of(act(self._seconds(command)))
        except Exception as error:
            return _failure(command, error)

    def _seconds(self, command: Command) -> float:
        """Return the time that a command has, or raise ``CommandError`` when it must not begin any more."""
        seconds = command.until - self._backend.now()
        if self._stop_event():
            raise CommandError(f"{command.action} was not started: the agent is stopping")
        if seconds <= 0:
            raise CommandError(
                f"{command.action} was not started: it came too late, or waited too long for its turn"
            )
        return seconds


def _failure(command: Command, error: Exception) -> Answer:
    """Return what to say about a call that has raised."""
    # Each adapter has an OffloadTimeoutError of its own (``adapter-surface`` 2.14).
    if isinstance(error, TimeoutError) or type(error).__name__ == "OffloadTimeoutError":
        return indeterminate(command, "still running: outcome unknown")
    if isinstance(error, AgentError):
        unknown = getattr(error, "indeterminate", False)
        return indeterminate(command, str(error)) if unknown else Answer("failed", None, str(error))
    if isinstance(error, Z4JError):
        return Answer("failed", None, f"{error.code}: {error.message}")
    if isinstance(error, NotImplementedError):
        return Answer("failed", None, str(error) or f"{command.action} is not supported")
    logger.error("z4j: command %s failed", command.action, exc_info=error)
    return Answer("failed", None, f"internal error: {type(error).__name__}: {error}")
