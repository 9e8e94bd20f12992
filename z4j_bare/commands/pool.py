"""A bounded number of commands at a time; the others wait, but never longer than their own time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from z4j_bare.commands.command import Command
    from z4j_bare.concurrency import BaseConcurrency

#: Seconds between two looks at the commands that wait, while some do.
LOOK = 1.0


class Pool:
    """Calls ``work(command)`` in at most ``workers`` tasks.

    What has waited until its time was up gets called beside those, to be refused.
    """

    def __init__(
        self, work: Callable[[Command], None], backend: BaseConcurrency, workers: int
    ) -> None:
        self._work = work
        self._backend = backend
        self._workers = workers
        self._running = 0
        self._watched = False
        self._waiting: deque[Command] = deque()
        self._turn = backend.lock()

    def put(self, command: Command) -> None:
        """Run it, or let it wait for a worker; returns at once."""
        with self._turn:
            self._waiting.append(command)
            hire, watch = self._running < self._workers, not self._watched
            if hire:
                self._running += 1
            elif watch:
                self._watched = True
        if hire:
            self._backend.spawn(self._serve, name="z4j-command")
        elif watch:
            self._backend.spawn(self._watch, name="z4j-command-watch")

    def clear(self) -> list[Command]:
        """Take out all that wait, and return them."""
        with self._turn:
            waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def _serve(self) -> None:
        try:
            while (command := self._next()) is not None:
                self._work(command)
        except BaseException:  # killed: somebody else may have the place
            self._running -= 1
            raise

    def _next(self) -> Command | None:
        with self._turn:
            if self._waiting:
                return self._waiting.popleft()
            self._running -= 1
            return None

    def _watch(self) -> None:
        while (due := self._due()) is not None:
            self._backend.sleep(min(LOOK, max(0.0, due - self._backend.now())))
            for command in self._expired():
                self._work(command)

    def _due(self) -> float | None:
        """Return when the first of those that wait must be answered; ``None`` ends the watch."""
        with self._turn:
            self._watched = bool(self._waiting)
            return min((command.until for command in self._waiting), default=None)

    def _expired(self) -> list[Command]:
        now = self._backend.now()
        with self._turn:
            late = [command for command in self._waiting if command.until <= now]
            self._waiting = deque(command for command in self._waiting if command.until > now)
        return late
