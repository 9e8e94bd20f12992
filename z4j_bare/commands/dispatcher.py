"""From a command frame to one answer: acknowledge, run once beside the receive loop, report."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.rows import IN_OTHER_PROCESS, RESULT
from z4j_bare.commands.command import Command
from z4j_bare.commands.pool import Pool
from z4j_bare.commands.results import Answer, encoded, indeterminate
from z4j_bare.errors import AgentError
from z4j_bare.wire.frames import command_ack

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.commands.executor import Executor
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.monitoring.metrics import Counters
    from z4j_bare.pipeline.link import Connection
    from z4j_bare.schedules import ScheduleManager

logger = logging.getLogger("z4j.runtime.dispatcher")

#: Command ids remembered in this process, for the ledger may have been on a disk that has failed since.
REMEMBERED = 10_000

#: Seconds kept back from a command's time for the answer's way, but at most this part of it.
MARGIN = 2.0
MARGIN_PART = 0.25


class Dispatcher:
    """Runs each command once, at most ``workers`` at a time, and answers it before its time is up.

    :param keeper: its ledger says what has been begun and done, also by processes before this one.
    :param stored: called after each answer, to wake the sender.
    :param schedules: the schedulers, if there are any.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        buffer: BufferManager,
        stored: Callable[[], None],
        backend: BaseConcurrency,
        counters: Counters,
        workers: int,
        schedules: ScheduleManager | None = None,
    ) -> None:
        self._hosts = hosts
        self._schedules = schedules
        self._buffer = buffer
        self._stored = stored
        self._backend = backend
        self._counters = counters
        self._present: set[str] = set()
        self._begun: OrderedDict[str, None] = OrderedDict()
        self._turn = backend.lock()
        self._loading = backend.lock()
        self._loaded: Executor | None = None
        self._stop_event = self._ended = False
        self._pool = Pool(self._carry_out, backend, workers)

    def submit(self, frame: Any, link: Connection, late: float = 0.0) -> None:
        """Acknowledge a command frame and see that it runs; called by the receive loop, never waits for the command.

        :param late: for how many seconds it has lain unread.
        """
        command = self._read(frame, late)
        try:
            link.send("command_ack", command.id, command_ack(command.token))
        except AgentError as error:
            # For the brain it is dispatched, and most kinds never come again; the result will find another session.
            logger.debug("z4j: command %s is not acknowledged: %s", command.id, error)
        with self._turn:
            if command.id in self._present:
                return
            self._present.add(command.id)
        self._pool.put(command)

    def stop(self) -> None:
        """Begin nothing more: what waits is answered as not started; what runs may end."""
        self._stop_event = True
        for command in self._pool.clear():
            self._carry_out(command)

    def end(self) -> None:
        """Answer nothing more, for the store is about to be closed: of what still runs its testament will tell."""
        self._ended = True

    def _read(self, frame: Any, late: float) -> Command:
        payload = frame.payload
        seconds = float(payload.timeout_seconds)
        return Command(
            id=str(frame.id),
            action=payload.action,
            target=payload.target,
            parameters=payload.parameters,
            until=self._backend.now() + seconds - late - min(MARGIN, seconds * MARGIN_PART),
            token=payload.delivery_claim_token,
        )

    def _carry_out(self, command: Command) -> None:
        try:
            if not self._ended and self._claimed(command):
                self._counters.commands += 1
                self._settle(command, *self._outcome(command))
        except Exception:
            logger.exception(
                "z4j: command %s could not be answered; please report it", command.action
            )
        finally:
            self._present.discard(command.id)

    def _claimed(self, command: Command) -> bool:
        """Whether this delivery is the one that runs; any other is answered as the ledger knows best."""
        provisional_result = encoded(
            command,
            indeterminate(command, "the agent ended before the command did: outcome unknown"),
        )
        earlier = self._buffer.claim(command.id, provisional_result)
        with self._turn:
            again = command.id in self._begun
            self._begun[command.id] = None
            while len(self._begun) > REMEMBERED:
                self._begun.popitem(last=False)
        if earlier is None and not again:
            return True
        if earlier is None or (earlier.state != IN_OTHER_PROCESS and not earlier.result):
            self._settle(
                command, indeterminate(command, "delivered before: its result is no longer known")
            )
        elif earlier.state != IN_OTHER_PROCESS:
            self._buffer.append([(RESULT, command.id, earlier.result)])
            self._stored()
        return False

    def _settle(
        self, command: Command, answer: Answer, host: EngineHost | ScheduleManager | None = None
    ) -> None:
        if not self._ended:
            self._buffer.answer(
                command.id, encoded(command, answer, host and host.redactor, self._backend.offload)
            )
            self._stored()
            if answer.then is not None:
                self._backend.spawn(answer.then, name="z4j-departure")

    def _outcome(self, command: Command) -> tuple[Answer, EngineHost | ScheduleManager | None]:
        try:
            executor = self._executor()
        except (
            Exception
        ) as error:  # the files are no longer those that this process was started from
            why = (
                f"the agent cannot load what carries out commands ({type(error).__name__}: {error})"
            )
            return Answer("failed", None, f"{why}: if it was upgraded, restart this process"), None
        return executor.outcome(command)

    def _executor(self) -> Executor:
        """Return what carries commands out, loaded with the first one: 0.2 MB that most workers never need."""
        with self._loading:
            if self._loaded is None:
                module = self._backend.import_module("z4j_bare.commands.executor")
                parts = self._hosts, self._schedules, self._buffer, self._backend
                self._loaded = module.Executor(
                    *parts, lambda: self._stop_event, lambda: self._ended
                )
            return self._loaded
