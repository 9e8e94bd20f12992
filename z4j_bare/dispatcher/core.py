"""From a command frame to one answer: acknowledge, run once beside the receive loop, report."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_core.errors import Z4JError

from z4j_bare.buffer.rows import ELSEWHERE, RESULT
from z4j_bare.dispatcher.answers import Answer, encoded, indeterminate
from z4j_bare.dispatcher.command import Command
from z4j_bare.dispatcher.once import Once, key_of
from z4j_bare.dispatcher.pool import Pool
from z4j_bare.dispatcher.schedules import SCHEDULE_ACTIONS
from z4j_bare.dispatcher.table import ENGINE_ACTIONS, check, choose
from z4j_bare.errors import AgentError, CommandError
from z4j_bare.wire.frames import command_ack

if TYPE_CHECKING:
    from z4j_bare.adapters.engines import EngineHost
    from z4j_bare.buffer.keeper import Keeper
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.loops.counters import Counters
    from z4j_bare.loops.link import Link
    from z4j_bare.schedules import Schedules

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
        keeper: Keeper,
        stored: Callable[[], None],
        seam: BaseConcurrency,
        counters: Counters,
        workers: int,
        schedules: Schedules | None = None,
    ) -> None:
        self._hosts = hosts
        self._schedules = schedules
        self._once = Once(keeper, seam, lambda: self._ended)
        self._keeper = keeper
        self._stored = stored
        self._seam = seam
        self._counters = counters
        self._present: set[str] = set()
        self._begun: OrderedDict[str, None] = OrderedDict()
        self._turn = seam.lock()
        self._stopping = self._ended = False
        self._pool = Pool(self._carry_out, seam, workers)

    def submit(self, frame: Any, link: Link, late: float = 0.0) -> None:
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
        self._stopping = True
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
            until=self._seam.now() + seconds - late - min(MARGIN, seconds * MARGIN_PART),
            token=payload.delivery_claim_token,
        )

    def _carry_out(self, command: Command) -> None:
        try:
            if not self._ended and self._claimed(command):
                self._counters.commands += 1
                self._settle(command, *self._outcome(command))
        except Exception:
            logger.exception("z4j: command %s could not be answered; please report it", command.action)
        finally:
            self._present.discard(command.id)

    def _claimed(self, command: Command) -> bool:
        """Whether this delivery is the one that runs; any other is answered as the ledger knows best."""
        testament = encoded(command, indeterminate(command, "the agent ended before the command did: outcome unknown"))
        earlier = self._keeper.claim(command.id, testament)
        with self._turn:
            again = command.id in self._begun
            self._begun[command.id] = None
            while len(self._begun) > REMEMBERED:
                self._begun.popitem(last=False)
        if earlier is None and not again:
            return True
        if earlier is None or (earlier.state != ELSEWHERE and not earlier.result):
            self._settle(command, indeterminate(command, "delivered before: its result is no longer known"))
        elif earlier.state != ELSEWHERE:
            self._keeper.append([(RESULT, command.id, earlier.result)])
            self._stored()
        return False

    def _settle(self, command: Command, answer: Answer, host: EngineHost | Schedules | None = None) -> None:
        if not self._ended:
            self._keeper.answer(command.id, encoded(command, answer, host and host.redactor, self._seam.offload))
            self._stored()
            if answer.then is not None:
                self._seam.spawn(answer.then, name="z4j-departure")

    def _outcome(self, command: Command) -> tuple[Answer, EngineHost | Schedules | None]:
        host: EngineHost | Schedules | None = None
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
        seconds = command.until - self._seam.now()
        if self._stopping:
            raise CommandError(f"{command.action} was not started: the agent is stopping")
        if seconds <= 0:
            raise CommandError(f"{command.action} was not started: it came too late, or waited too long for its turn")
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
