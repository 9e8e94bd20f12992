"""Acknowledges each command frame, runs the command once in a task, and stores its result."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from z4j_bare.buffer.rows import IN_OTHER_PROCESS, RESULT
from z4j_bare.commands.results import encode_result
from z4j_bare.errors import AgentError
from z4j_bare.wire.command import Command, CommandOutcome
from z4j_bare.wire.frames import command_ack

if TYPE_CHECKING:
    from z4j_core.transport.frames import CommandFrame

    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.commands.executor import Executor
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.monitoring.metrics import Counters
    from z4j_bare.pipeline.session import Connection
    from z4j_bare.schedules import ScheduleManager

logger = logging.getLogger("z4j.runtime.commands.dispatcher")

#: Maximum number of ids of started commands that are kept in memory.
#: The ids serve to detect a redelivery if the ledger was lost with a failed disk.
MAX_STARTED_IDS = 10_000

#: Maximum seconds of a command's timeout that are reserved for sending its result.
MARGIN = 2.0
#: Maximum fraction of the timeout that is reserved for sending the result.
MARGIN_FRACTION = 0.25

#: Maximum seconds between two checks of the deadlines of waiting commands.
POLL_INTERVAL = 1.0


@dataclass(slots=True)
class DispatchState:
    """The progress of the dispatcher's shutdown. The executor reads the same object."""

    #: Whether the agent is stopping. If so, no further command begins.
    stopping: bool = False
    #: Whether the store is about to be closed. If so, nothing may be recorded.
    closed: bool = False


class Dispatcher:
    """Runs each command once, at most ``workers`` at a time, and stores its result by the deadline.

    :param buffer: contains the ledger of commands that this or an earlier process has started or
        finished.
    :param on_stored: called after each stored result, to wake the sender.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        buffer: BufferManager,
        on_stored: Callable[[], object],
        backend: BaseConcurrency,
        counters: Counters,
        workers: int,
        schedules: ScheduleManager | None = None,
    ) -> None:
        self._hosts = hosts
        self._schedules = schedules
        self._buffer = buffer
        self._on_stored = on_stored
        self._backend = backend
        self._counters = counters
        self._queued_ids: set[str] = set()
        self._started_ids: OrderedDict[str, None] = OrderedDict()
        self._lock = backend.lock()
        self._load_lock = backend.lock()
        self._loaded_executor: Executor | None = None
        self._state = DispatchState()
        self._pool = CommandPool(self._execute, backend, workers)

    def submit(self, frame: CommandFrame, connection: Connection, delay: float = 0.0) -> None:
        """Acknowledge a command frame and queue the command. Never waits for the command.

        :param delay: seconds between the arrival of the frame and this call.
        """
        command = self._read(frame, delay)
        try:
            connection.send("command_ack", command.id, command_ack(command.token))
        except AgentError as error:
            # Run the command nevertheless, because the brain redelivers only few kinds of commands.
            # The result is sent in the next session.
            logger.debug("z4j: could not acknowledge command %s: %s", command.id, error)
        with self._lock:
            if command.id in self._queued_ids:
                return
            self._queued_ids.add(command.id)
        self._pool.put(command)

    def stop(self) -> None:
        """Report waiting and later commands as not started; running commands may finish."""
        self._state.stopping = True
        for command in self._pool.clear():
            self._execute(command)

    def close(self) -> None:
        """Stop recording results, because the store is about to be closed.

        The provisional result of a command that is still running reports "outcome unknown".
        """
        self._state.closed = True

    def _read(self, frame: CommandFrame, delay: float) -> Command:
        payload = frame.payload
        seconds = float(payload.timeout_seconds)
        margin = min(MARGIN, seconds * MARGIN_FRACTION)
        return Command(
            id=str(frame.id),
            action=payload.action,
            target=payload.target,
            parameters=payload.parameters,
            deadline=self._backend.now() + seconds - delay - margin,
            token=payload.delivery_claim_token,
        )

    def _execute(self, command: Command) -> None:
        try:
            if not self._state.closed and self._claim(command):
                self._counters.commands += 1
                self._store_outcome(command, *self._run(command))
        except Exception:
            logger.exception(
                "z4j: could not store the result of command %s; please report this bug of z4j-bare",
                command.action,
            )
        finally:
            self._queued_ids.discard(command.id)

    def _claim(self, command: Command) -> bool:
        """Return whether the command is delivered for the first time, and therefore must run.

        For a redelivery, queue the result in the ledger, so that the result is sent again.
        """
        provisional_result = encode_result(
            command,
            CommandOutcome.indeterminate(
                command.action, "the agent ended before the command did: outcome unknown"
            ),
        )
        earlier = self._buffer.claim(command.id, provisional_result)
        with self._lock:
            redelivered = command.id in self._started_ids
            self._started_ids[command.id] = None
            while len(self._started_ids) > MAX_STARTED_IDS:
                self._started_ids.popitem(last=False)
        if earlier is None and not redelivered:
            return True
        if earlier is None or (earlier.state != IN_OTHER_PROCESS and not earlier.result):
            error = "delivered before: its result is no longer known"
            self._store_outcome(command, CommandOutcome.indeterminate(command.action, error))
        elif earlier.state != IN_OTHER_PROCESS:
            self._buffer.append([(RESULT, command.id, earlier.result)])
            self._on_stored()
        return False

    def _store_outcome(
        self,
        command: Command,
        outcome: CommandOutcome,
        host: EngineHost | ScheduleManager | None = None,
    ) -> None:
        if self._state.closed:
            return
        redactor = None if host is None else host.redactor
        payload = encode_result(command, outcome, redactor, self._backend.offload)
        self._buffer.settle_and_queue(command.id, payload)
        self._on_stored()
        if outcome.after_stored is not None:
            self._backend.spawn(outcome.after_stored, name="z4j-process-restart")

    def _run(self, command: Command) -> tuple[CommandOutcome, EngineHost | ScheduleManager | None]:
        try:
            executor = self._executor()
        except Exception as error:  # the package was replaced on disk since this process started
            return CommandOutcome.failed(
                "the agent cannot load the code that runs commands"
                f" ({type(error).__name__}: {error}): if it was upgraded, restart this process"
            ), None
        return executor.run(command)

    def _executor(self) -> Executor:
        """Return the executor. The first call imports its module.

        The module takes 0.2 MB of memory, and most workers never receive a command.
        """
        with self._load_lock:
            if self._loaded_executor is None:
                module = self._backend.import_module("z4j_bare.commands.executor")
                self._loaded_executor = module.Executor(
                    self._hosts, self._schedules, self._buffer, self._backend, self._state
                )
            return self._loaded_executor


class CommandPool:
    """Calls ``run(command)`` in at most ``workers`` tasks.

    A command that is still waiting at its deadline is passed to ``run``, and ``run`` refuses the
    command.
    """

    def __init__(
        self, run: Callable[[Command], None], backend: BaseConcurrency, workers: int
    ) -> None:
        self._run = run
        self._backend = backend
        self._workers = workers
        self._running = 0
        self._watching = False
        self._waiting: deque[Command] = deque()
        self._lock = backend.lock()

    def put(self, command: Command) -> None:
        """Run the command, or queue it until a worker is free. Returns at once."""
        with self._lock:
            self._waiting.append(command)
            has_slot = self._running < self._workers
            needs_watch = not has_slot and not self._watching
            if has_slot:
                self._running += 1
            elif needs_watch:
                self._watching = True
        if has_slot:
            self._backend.spawn(self._work, name="z4j-command")
        elif needs_watch:
            self._backend.spawn(self._watch_deadlines, name="z4j-command-watch")

    def clear(self) -> list[Command]:
        """Remove and return all waiting commands."""
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def _work(self) -> None:
        try:
            while (command := self._next()) is not None:
                self._run(command)
        except BaseException:  # the worker greenlet was killed: release its slot
            self._running -= 1
            raise

    def _next(self) -> Command | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._running -= 1
            return None

    def _watch_deadlines(self) -> None:
        while (deadline := self._first_deadline()) is not None:
            self._backend.sleep(min(POLL_INTERVAL, max(0.0, deadline - self._backend.now())))
            for command in self._expired():
                self._run(command)

    def _first_deadline(self) -> float | None:
        """Return the earliest deadline of the waiting commands; ``None`` if no command waits."""
        with self._lock:
            self._watching = bool(self._waiting)
            return min((command.deadline for command in self._waiting), default=None)

    def _expired(self) -> list[Command]:
        now = self._backend.now()
        with self._lock:
            expired = [command for command in self._waiting if command.deadline <= now]
            self._waiting = deque(command for command in self._waiting if command.deadline > now)
        return expired
