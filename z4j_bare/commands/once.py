"""Effects that must happen once although several commands may ask for them: a fire of a schedule, an operation on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.rows import DONE
from z4j_bare.commands.results import Answer, encoded, indeterminate

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.commands.command import Command
    from z4j_bare.concurrency import BaseConcurrency

#: By what parameter each of these actions knows its effect, and how that is called in the ledger.
KEYS = {
    "schedule.fire": ("fire_id", "fire"),
    "schedule.trigger_now": ("fire_id", "fire"),
    "schedule.external.control": ("operation_id", "operation"),
    "schedule.external.mutate": ("operation_id", "operation"),
}


def key_of(command: Command) -> str | None:
    """Return under which key the ledger keeps the command's effect, ``None`` where only the command has an id."""
    parameter, prefix = KEYS.get(command.action, ("", ""))
    identity = command.parameters.get(parameter)
    return f"{prefix}:{identity}" if isinstance(identity, str) and identity else None


class IdempotentEffects:
    """Remembers effects by their own ids, beside the commands: over restarts, and in other processes of the agent.

    :param ended: whether the store is about to be closed, so that nothing must be entered any more.
    """

    def __init__(
        self, buffer: BufferManager, backend: BaseConcurrency, ended: Callable[[], bool]
    ) -> None:
        self._ended = ended
        self._buffer = buffer
        self._backend = backend
        self._running: dict[str, Any] = {}
        self._turn = backend.lock()

    def run(self, key: str, command: Command, act: Callable[[], Answer]) -> Answer:
        """Return the answer of ``act()``, or the one that the same effect had for an earlier command.

        While that is still being carried out here, its end is waited for; one that a crash has cut short, or that runs
        in another process, is indeterminate.
        """
        done = self._backend.event()
        while (running := self._begin(key, done)) is not done:
            if not self._backend.wait(running, max(0.0, command.until - self._backend.now())):
                return indeterminate(command, "still running for another command: outcome unknown")
        try:
            # No testament: it would be sent under this key, which is no command's.
            earlier = self._buffer.claim(key, b"")
            if earlier is not None:
                return _again(earlier.result if earlier.state == DONE else b"", key, command)
            answer = act()
            if not self._ended():
                self._buffer.settle(key, encoded(command, answer))
            return answer
        finally:
            del self._running[key]
            done.set()

    def _begin(self, key: str, done: Any) -> Any:
        """Return the event of who carries ``key`` out now: ``done``, unless somebody is at it already."""
        with self._turn:
            return self._running.setdefault(key, done)


def _again(payload: bytes, key: str, command: Command) -> Answer:
    if not payload:
        return indeterminate(command, f"begun before as {key}, and nothing is known of its end")
    body = json.loads(payload)
    answer = Answer(body["status"], body["result"], body["error"])
    return replace(answer, result={**(answer.result or {}), "deduplicated": True, "dedup_key": key})
