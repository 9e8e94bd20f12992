"""One coroutine of an adapter on its way through the loop."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

from z4j_bare.asyncio_bridge.future import CallFuture, as_exception
from z4j_bare.errors import AgentError

if TYPE_CHECKING:
    from z4j_bare.asyncio_bridge.hubloop import HubLoop
    from z4j_bare.concurrency import BaseConcurrency


class LoopCall:
    """Runs an awaitable as a task of the loop while its caller waits in another greenlet or thread."""

    def __init__(self, backend: BaseConcurrency, loop: HubLoop, awaitable: Any) -> None:
        self._loop = loop
        self._awaitable = awaitable
        self._outcome = CallFuture(backend)
        self._task: asyncio.Task[Any] | None = None

    def run(self, timeout: float, what: str) -> Any:
        """Return the result or raise what the coroutine raised.

        ``TimeoutError`` after ``timeout`` seconds; the task is cancelled then, as it is when the waiting
        greenlet gets killed. ``AgentError`` when the loop has ended or the task was cancelled.
        """
        if self._loop.call_soon_threadsafe(self._begin).cancelled():
            self._close()
            raise AgentError("the agent is stopping")
        try:
            return self._outcome.wait(timeout, what)
        finally:
            if self._outcome.abandoned:
                self._loop.call_soon_threadsafe(self._cancel)

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._ended)

    async def _run(self) -> Any:
        if self._outcome.wanted():  # what expired unbegun must not happen afterwards
            return await self._awaitable
        raise asyncio.CancelledError

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _close(self) -> None:
        """Close a coroutine that never began, which would warn otherwise; one that ended does not mind."""
        if inspect.iscoroutine(self._awaitable):
            self._awaitable.close()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._close()
        if task.cancelled():
            self._outcome.settle(False, AgentError("the call was cancelled before it ended"))
        elif (error := task.exception()) is not None:
            self._outcome.settle(False, as_exception(error))
        else:
            self._outcome.settle(True, task.result())
