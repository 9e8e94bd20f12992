"""Persistent workers that run the adapters' blocking calls in tasks of the backend."""

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
    from z4j_bare.interfaces import IEvent


@dataclass(frozen=True, slots=True)
class Job:
    """A blocking call, a callback for its result, and a check whether the caller still waits."""

    function: Callable[..., object]
    args: tuple[object, ...]
    set_result: Callable[[bool, object], object]
    is_awaited: Callable[[], bool]

    def run(self, call: Callable[..., object]) -> None:
        """Run ``call(function, *args)`` and set the result, if the caller still waits."""
        if not self.is_awaited():
            return
        try:
            ok, value = True, call(self.function, *self.args)
        except ForkedChildError:
            raise
        except BaseException as error:
            ok, value = False, as_exception(error)
        self.set_result(ok, value)


class WorkerPool:
    """A pool of at most ``limit`` workers. A hung call blocks only its own worker.

    The workers are persistent, because Celery creates one result backend per thread or greenlet. A
    new greenlet would open a new Redis connection for each call. With a latency of 50 ms, a
    connection takes 0.3 s.

    The next job runs on the worker that became idle last, so that few connections are opened. One
    idle worker is kept in reserve until there are ``limit`` workers, because :meth:`submit` cannot
    start a worker. The reason is that a loop step may call :meth:`submit`, and starting a thread
    switches greenlets.
    """

    def __init__(self, backend: BaseConcurrency, name: str, limit: int) -> None:
        self._backend = backend
        self._name = name
        self._limit = limit
        self._lock = backend.lock()
        self._jobs: deque[Job] = deque()
        self._idle: list[IEvent] = []
        self._numbers = itertools.count(1)
        self._stopped = False
        self.size = 0

    @property
    def busy(self) -> int:
        """The number of workers that run a job, including hung jobs."""
        return max(0, self.size - len(self._idle))

    def start(self) -> bool:
        """Start a worker if there is none; return whether there is a worker.

        A loop step must not call this method.
        """
        if not self.size:
            self._spawn()
        return self.size > 0

    def submit(self, job: Job) -> None:
        """Queue a job without switching greenlets. After :meth:`stop` the job fails at once."""
        self._jobs.append(job)
        if self._stopped:
            self._fail_queued()
            return
        try:
            wakeup = self._idle.pop()
        except IndexError:
            return
        wakeup.set()

    def call(
        self, function: Callable[..., object], *args: object, timeout: float, description: str
    ) -> Any:
        """Run ``function(*args)`` on a worker and return its result.

        A loop step must not call this method. Raises ``TimeoutError`` after ``timeout`` seconds.
        During the shutdown of the interpreter no worker can be started, and the function runs in
        the calling task.
        """
        future = CallFuture(self._backend)
        job = Job(function, args, future.set_result, future.is_awaited)
        if self.start() or self._stopped:
            self.submit(job)
        else:
            job.run(self._backend.call_blocking)
        return future.wait(timeout, description)

    def stop(self) -> None:
        """Fail the queued jobs; let each worker end after its current job. Never waits."""
        self._stopped = True
        self._fail_queued()
        while self._idle:
            self._idle.pop().set()

    def _fail_queued(self) -> None:
        while self._jobs:
            self._jobs.popleft().set_result(False, AgentError("the agent is stopping"))

    def _spawn(self) -> None:
        with self._lock:
            if self._idle or self._stopped or self.size >= self._limit:
                return
            self.size += 1
        try:
            self._backend.spawn(self._work, name=f"{self._name}-{next(self._numbers)}")
        except RuntimeError:  # no thread can be started, but existing workers continue
            self.size -= 1

    def _work(self) -> None:
        wakeup = self._backend.event()
        try:
            while not self._stopped:
                self._run_one(wakeup)
        finally:
            if not self._backend.forked():  # in a forked child the lock may never be released
                with self._lock:
                    self.size -= 1

    def _run_one(self, wakeup: IEvent) -> None:
        if self._backend.forked():  # a copy of the worker must not run the parent's jobs
            raise ForkedChildError
        try:
            job = self._jobs.popleft()
        except IndexError:
            self._wait_for_job(wakeup)
        else:
            self._spawn()
            job.run(self._backend.call_blocking)

    def _wait_for_job(self, wakeup: IEvent) -> None:
        wakeup.clear()
        self._idle.append(wakeup)
        # Check again: a job that was submitted before the ``append`` did not wake this worker.
        if not self._jobs and not self._stopped:
            self._backend.wait(wakeup)
        try:
            self._idle.remove(wakeup)
        except ValueError:
            return  # already removed by the submitter that woke this worker
