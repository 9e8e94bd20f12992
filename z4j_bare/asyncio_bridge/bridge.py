"""Calls functions of asyncio-based adapters with a timeout, and reads their event streams."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from z4j_bare.asyncio_bridge import trampoline
from z4j_bare.asyncio_bridge.future import CallFuture, as_exception
from z4j_bare.asyncio_bridge.worker_pool import WorkerPool
from z4j_bare.errors import AgentError, ForkedChildError
from z4j_bare.interfaces import IBridge

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from z4j_bare.asyncio_bridge.hubloop import HubLoop
    from z4j_bare.asyncio_bridge.pump import Pump
    from z4j_bare.concurrency import BaseConcurrency

#: Maximum number of workers that run calls without an event loop.
#: The number equals the default of ``Z4J_COMMAND_WORKERS``.
#: The loop's executor calls have separate workers, because executor calls may hang.
CALL_WORKERS = 8
#: Maximum timeout of one call in seconds.
MAX_CALL_TIMEOUT = 3600.0
#: Seconds that :meth:`Bridge.stop` waits for the loop to end.
STOP_TIMEOUT = 1.0


@implementer(IBridge)
class Bridge:
    """Calls an adapter's synchronous and asynchronous functions from greenlets and threads.

    Synchronous functions and coroutines without an ``await`` run on persistent workers without an
    event loop. A coroutine that awaits runs as a task of the :class:`HubLoop`. The loop is created
    when it is first needed. A step of the loop must not call this class, because the step would
    wait for its own loop.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._lock = backend.lock()
        self._workers = WorkerPool(backend, "z4j-call", CALL_WORKERS)
        self._loop: HubLoop | None = None
        self._pumps: list[Pump] = []
        self._stopped = False

    @property
    def restarts(self) -> int:
        """The number of restarts of the loop and of all pumps."""
        restarts = sum(pump.restarts for pump in self._pumps)
        return restarts + (self._loop.restarts if self._loop else 0)

    @property
    def dropped(self) -> int:
        """The number of ``call_soon_threadsafe`` calls after the end of the loop."""
        return self._loop.dropped if self._loop else 0

    @property
    def busy(self) -> int:
        """The number of workers that run a call, including hung calls."""
        return self._workers.busy + (self._loop.busy_workers if self._loop else 0)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float, **kwargs: Any) -> Any:
        """Call ``function(*args, **kwargs)``, await an awaitable result, and return the result.

        Raises ``TimeoutError`` after ``timeout`` seconds (at most :data:`MAX_CALL_TIMEOUT`),
        ``AgentError`` after :meth:`stop`, and every exception of the function. After a timeout, a
        coroutine on the loop is cancelled. A blocking function occupies its worker until the
        function returns. A function that has not begun at the timeout is never called.
        """
        self._check_usable()
        description = _name(function)
        deadline = self._backend.now() + min(timeout, MAX_CALL_TIMEOUT)
        job = partial(function, *args, **kwargs)
        if trampoline.needs_loop(function):
            return self._await(job(), deadline, description)
        seconds = self._seconds_until(deadline)
        value = self._workers.call(trampoline.step, job, timeout=seconds, description=description)
        if isinstance(value, trampoline.Unfinished):
            return self._await(value.awaitable, deadline, description)
        return value

    def pump(
        self, iterate: Callable[[], Any], sink: Callable[[Any], object], name: str
    ) -> Callable[[], None]:
        """Pass every item of ``iterate()`` to ``sink``; return :meth:`Pump.stop`.

        See :class:`~z4j_bare.asyncio_bridge.pump.Pump`.
        """
        loop = self.loop()
        # Imported late, because ``pump`` imports asyncio.
        # ``self.loop()`` has imported asyncio without blocking the hub.
        from z4j_bare.asyncio_bridge.pump import Pump

        pump = Pump(self._backend, loop, iterate, sink, name)
        self._pumps.append(pump)
        loop.call_soon_threadsafe(pump.start)
        return pump.stop

    def loop(self) -> HubLoop:
        """Return the loop. Every call returns the same object.

        The adapters of arq and taskiq compare loops by identity. Raises ``AgentError`` if
        :meth:`stop` was called before the loop was created.
        """
        if self._loop is None:
            self._check_usable()
            self._build()
        assert self._loop is not None  # noqa: S101 - _build has just set it
        return self._loop

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Fail queued calls, cancel the loop's tasks and end the loop within ``timeout`` seconds.

        Idempotent. Does nothing in a forked child.
        """
        if self._backend.forked():
            return
        self._stopped = True
        self._workers.stop()
        with self._lock:
            loop = self._loop
        if loop is not None:
            loop.shutdown(timeout)

    def _check_usable(self) -> None:
        if self._backend.forked():
            raise ForkedChildError
        if self._stopped:
            raise AgentError("the agent is stopping")
        if self._loop is not None and self._loop.in_step():
            raise AgentError(
                "called from a step of the adapters' loop; the step would wait for its own loop"
            )

    def _build(self) -> None:
        hubloop = self._backend.import_module("z4j_bare.asyncio_bridge.hubloop")
        with self._lock:
            if self._loop is None and not self._stopped:
                loop = hubloop.HubLoop(self._backend)
                loop.start()
                self._loop = loop
        self._check_usable()

    def _seconds_until(self, deadline: float) -> float:
        return max(0.0, deadline - self._backend.now())

    def _await(self, awaitable: Awaitable[Any], deadline: float, description: str) -> Any:
        call = LoopCall(self._backend, self.loop(), awaitable)
        return call.run(self._seconds_until(deadline), description)


class LoopCall:
    """Runs an awaitable as a task of the loop while the caller waits."""

    def __init__(self, backend: BaseConcurrency, loop: HubLoop, awaitable: Awaitable[Any]) -> None:
        self._loop = loop
        self._awaitable = awaitable
        self._future = CallFuture(backend)
        self._task: asyncio.Task[Any] | None = None

    def run(self, timeout: float, description: str) -> Any:
        """Return the result, or raise what the coroutine raised.

        Raises ``TimeoutError`` after ``timeout`` seconds, and ``AgentError`` if the loop has ended
        or the task was cancelled. The task is cancelled if the wait ends early.
        """
        if self._loop.call_soon_threadsafe(self._start).cancelled():
            self._close()
            raise AgentError("the agent is stopping")
        try:
            return self._future.wait(timeout, description)
        finally:
            if self._future.abandoned:
                self._loop.call_soon_threadsafe(self._cancel)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._on_done)

    async def _run(self) -> Any:
        if self._future.is_awaited():  # a call that timed out before it began must not run
            return await self._awaitable
        from asyncio import CancelledError

        raise CancelledError

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _close(self) -> None:
        """Close the coroutine, because Python warns of coroutines that never began."""
        if inspect.iscoroutine(self._awaitable):
            self._awaitable.close()

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._close()
        if task.cancelled():
            self._future.set_result(False, AgentError("the call was cancelled before it ended"))
        elif (error := task.exception()) is not None:
            self._future.set_result(False, as_exception(error))
        else:
            self._future.set_result(True, task.result())


def _name(function: Callable[..., object]) -> str:
    """Return the function's name, without the arguments of a ``partial``."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)
