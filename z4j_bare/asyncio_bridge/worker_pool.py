"""Persistent workers on the backend, for everything in adapters that blocks.

Persistent, because Celery keeps one result backend per thread or greenlet: a fresh greenlet per job pays a
new Redis connection each time, 0.3 s at 50 ms per reply (``adapter-surface`` 4, row 19).
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from z4j_bare.asyncio_bridge.future import CallFuture, as_exception
from z4j_bare.errors import AgentError, ForkedChildError

if TYPE_CHECKING:
    from collections.abc import Callable

    from z4j_bare.concurrency import BaseConcurrency


@dataclass(frozen=True, slots=True)
class Job:
    """A blocking call, who wants it and who gets its outcome."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    done: Callable[[bool, Any], object]
    wanted: Callable[[], bool]

    def run(self, call: Callable[..., Any]) -> None:
        """Run the function with ``call``, unless nobody waits any more: what timed out unbegun must not happen."""
        if not self.wanted():
            return
        try:
            ok, value = True, call(self.function, *self.args)
        except ForkedChildError:
            raise
        except BaseException as error:
            ok, value = False, as_exception(error)
        self.done(ok, value)


class WorkerPool:
    """At most ``limit`` workers; a hung call occupies its own and no other.

    The last to become idle works first, so that few connections are opened. There is always one to spare
    below the limit, and a worker starts it: a submitter may be a loop step, and starting a thread switches
    greenlets there (``adapter-surface`` 5.2).
    """

    def __init__(self, backend: BaseConcurrency, name: str, limit: int) -> None:
        self._backend = backend
        self._name = name
        self._limit = limit
        self._lock = backend.lock()
        self._jobs: deque[Job] = deque()
        self._idle: list[Any] = []
        self._numbers = itertools.count(1)
        self._stopped = False
        self.size = 0

    @property
    def busy(self) -> int:
        """How many workers run a job now, hung ones included."""
        return max(0, self.size - len(self._idle))

    def start(self) -> bool:
        """Start the first worker, not in a loop step; whether there is one. Idempotent."""
        if not self.size:
            self._hire()
        return self.size > 0

    def submit(self, job: Job) -> None:
        """Queue a job. Never switches; after :meth:`stop` the job fails at once."""
        self._jobs.append(job)
        if self._stopped:
            self._refuse()
            return
        try:
            idle = self._idle.pop()
        except IndexError:
            return
        idle.set()

    def call(self, function: Callable[..., Any], *args: Any, timeout: float, what: str) -> Any:
        """Run ``function(*args)`` on a worker; ``TimeoutError`` after ``timeout`` s. Not for loop steps.

        Runs inline when no worker can be had: CPython 3.12 starts no thread once the interpreter is going down.
        """
        outcome = CallFuture(self._backend)
        job = Job(function, args, outcome.settle, outcome.wanted)
        if self.start() or self._stopped:
            self.submit(job)
        else:
            job.run(self._backend.call_blocking)
        return outcome.wait(timeout, what)

    def stop(self) -> None:
        """Fail what is queued and let every worker end after its present job. Idempotent, never waits."""
        self._stopped = True
        self._refuse()
        while self._idle:
            self._idle.pop().set()

    def _refuse(self) -> None:
        while self._jobs:
            self._jobs.popleft().done(False, AgentError("the agent is stopping"))

    def _hire(self) -> None:
        with self._lock:
            if self._idle or self._stopped or self.size >= self._limit:
                return
            self.size += 1
        try:
            self._backend.spawn(self._work, name=f"{self._name}-{next(self._numbers)}")
        except RuntimeError:  # no more threads to be had; those there are carry on
            self.size -= 1

    def _work(self) -> None:
        bell = self._backend.event()
        try:
            while not self._stopped:
                self._turn(bell)
        finally:
            if not self._backend.forked():  # there the lock may be a copy that nobody will release
                with self._lock:
                    self.size -= 1

    def _turn(self, bell: Any) -> None:
        if (
            self._backend.forked()
        ):  # a copy that woke inside a job must not take the parent's next one
            raise ForkedChildError
        try:
            job = self._jobs.popleft()
        except IndexError:
            self._rest(bell)
        else:
            self._hire()
            job.run(self._backend.call_blocking)  # an adapter's code waits by itself

    def _rest(self, bell: Any) -> None:
        bell.clear()
        self._idle.append(bell)
        # Looked at again after lying down: whoever appended a job just before saw no idle bell to ring.
        if not self._jobs and not self._stopped:
            self._backend.wait(bell)
        try:
            self._idle.remove(bell)
        except ValueError:
            return  # rung, hence taken off by the ringer
