"""From a command frame to one answer: acknowledge, run beside the receive loop, report."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from z4j_core.errors import Z4JError

from z4j_bare.dispatcher.table import ENGINE_ACTIONS, Command, RefusedError
from z4j_bare.errors import AgentError
from z4j_bare.wire.frames import command_ack, command_result

if TYPE_CHECKING:
    from z4j_bare.adapters.engines import EngineHost
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.loops.counters import Counters
    from z4j_bare.loops.link import Link

logger = logging.getLogger("z4j.runtime.dispatcher")

#: Command ids remembered, so that one delivered twice runs once.
REMEMBERED = 10_000

#: Seconds kept back from a command's deadline for the answer's way.
MARGIN = 2.0


class Dispatcher:
    """Runs at most ``workers`` commands at a time, each in a task of its own.

    :param answer: stores a ``command_result`` payload under the command's id.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        answer: Callable[[str, bytes], None],
        seam: BaseConcurrency,
        counters: Counters,
        workers: int,
    ) -> None:
        self._hosts = hosts
        self._answer = answer
        self._seam = seam
        self._counters = counters
        self._workers = workers
        self._running = 0
        self._waiting: deque[Command] = deque()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._turn = seam.lock()

    def submit(self, frame: Any, link: Link) -> None:
        """Acknowledge a command frame and see that it runs; called by the receive loop, never waits for the command."""
        command = self._read(frame)
        try:
            link.send("command_ack", command.id, command_ack(command.token))
        except AgentError as error:
            # For the brain it is dispatched, and most kinds never come again; the result will find another session.
            logger.debug("z4j: command %s is not acknowledged: %s", command.id, error)
        with self._turn:
            if command.id in self._seen:
                return
            self._seen[command.id] = None
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            self._waiting.append(command)
            if self._running >= self._workers:
                return
            self._running += 1
        self._seam.spawn(self._work, name="z4j-command")

    def _read(self, frame: Any) -> Command:
        payload = frame.payload
        seconds = payload.timeout_seconds if isinstance(payload.timeout_seconds, int) else 60
        return Command(
            id=str(frame.id),
            action=str(payload.action),
            target=payload.target if isinstance(payload.target, dict) else {},
            parameters=payload.parameters if isinstance(payload.parameters, dict) else {},
            deadline=self._seam.now() + max(1, seconds),
            token=payload.delivery_claim_token if isinstance(payload.delivery_claim_token, str) else None,
        )

    def _work(self) -> None:
        try:
            while (command := self._next()) is not None:
                self._counters.commands += 1
                status, result, error = self._outcome(command)
                self._answer(command.id, command_result(status, result, error, command.token))
        except BaseException:
            self._running -= 1
            raise

    def _next(self) -> Command | None:
        with self._turn:
            if self._waiting:
                return self._waiting.popleft()
            self._running -= 1
            return None

    def _outcome(self, command: Command) -> tuple[str, dict[str, Any] | None, str | None]:
        try:
            return self._execute(command)
        except RefusedError as error:
            return "failed", None, str(error)
        except TimeoutError:
            return "failed", {"indeterminate": True, "operation": command.action}, "still running: outcome unknown"
        except Z4JError as error:
            return "failed", None, f"{error.code}: {error.message}"
        except Exception as error:
            logger.exception("z4j: command %s failed", command.action)
            return "failed", None, f"internal error: {type(error).__name__}: {error}"

    def _execute(self, command: Command) -> tuple[str, dict[str, Any] | None, str | None]:
        call = ENGINE_ACTIONS.get(command.action)
        if call is None:
            raise RefusedError(f"{command.action} is not supported by this agent")
        host = self._host(command)
        if command.action not in host.capabilities():
            raise RefusedError(f"engine {host.name} does not support {command.action}")
        seconds = command.deadline - MARGIN - self._seam.now()
        if seconds <= 0:
            raise RefusedError(f"{command.action} waited too long for a free worker and was not started")
        outcome = call(command, host, seconds)
        return outcome.status, outcome.result, outcome.error

    def _host(self, command: Command) -> EngineHost:
        name = command.parameters.get("engine") or command.target.get("engine")
        if name is None and len(self._hosts) == 1:
            return next(iter(self._hosts.values()))
        if name not in self._hosts:
            raise RefusedError(f"this agent has no engine {name!r}, only {', '.join(sorted(self._hosts)) or 'none'}")
        return self._hosts[str(name)]
