"""Passes the items of an adapter's async generator to a synchronous function."""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING, Any

from z4j_bare.asyncio_bridge.future import CallFuture
from z4j_bare.wire.backoff import Backoff

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from z4j_bare.asyncio_bridge.hubloop import HubLoop
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.asyncio_bridge.pump")

#: Maximum seconds in which a pump delivers items before it yields to the loop.
#: Reading a queue that has items does not yield. Therefore 10,000 items would block the loop for 30
#: ms.
YIELD_INTERVAL = 0.001
#: Seconds before the first restart of a failed generator. Each further failure doubles the delay.
BACKOFF_INITIAL = 1.0
#: Maximum seconds before a restart of a failed generator.
BACKOFF_MAX = 30.0
#: Seconds without a failure after which the delay is reset to ``BACKOFF_INITIAL``.
BACKOFF_RESET = 60.0
#: Maximum seconds in which :meth:`Pump.stop` delivers the queued items.
DRAIN_TIMEOUT = 1.0


class Pump:
    """Passes every item of ``iterate()`` to ``sink`` in the loop step that produced the item.

    ``sink`` must not wait, log or switch greenlets. If a generator raises, the error is logged and
    ``iterate()`` is called again. A generator that ends is not restarted, because the registry
    streams of rq's, dramatiq's and huey's adapters are empty and end at once.
    """

    def __init__(
        self,
        backend: BaseConcurrency,
        loop: HubLoop,
        iterate: Callable[[], Any],
        sink: Callable[[Any], object],
        name: str,
    ) -> None:
        self._loop = loop
        self._iterate = iterate
        self._sink = sink
        self._name = name
        self._ended = CallFuture(backend)
        self._task: asyncio.Task[None] | None = None
        self._stop_task: asyncio.Task[None] | None = None
        self.delivered = 0
        self.restarts = 0

    def start(self) -> None:
        """Start the task. Must be called in a loop step."""
        self._task = self._loop.create_task(self._run(), name=self._name)
        self._task.add_done_callback(lambda _: self._ended.set_result(True, None))

    def stop(self) -> None:
        """Deliver queued items, then cancel the task. Idempotent.

        Waits at most twice :data:`DRAIN_TIMEOUT`.
        """
        handle = self._loop.call_soon_threadsafe(self._begin_stop)
        if handle.cancelled() or self._loop.in_step():
            return
        try:
            self._ended.wait(2 * DRAIN_TIMEOUT, self._name)
        except TimeoutError:
            logger.warning(
                "z4j: %s did not stop within %g s and is abandoned; its queued items may be lost",
                self._name,
                2 * DRAIN_TIMEOUT,
            )

    async def _run(self) -> None:
        delays = Backoff(BACKOFF_INITIAL, BACKOFF_MAX)
        while True:
            started_at = self._loop.time()
            try:
                await self._deliver_all()
                return
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                if self._task is None or self._task.cancelling():
                    raise  # the pump is being cancelled
                if self._loop.time() - started_at > BACKOFF_RESET:
                    delays.reset()
                delay = delays.next()
                self.restarts += 1
                with self._loop.running_loop_unset():  # a log handler may switch greenlets
                    logger.warning(
                        "z4j: %s failed; restarting in %g s", self._name, delay, exc_info=error
                    )
            await asyncio.sleep(delay)

    async def _deliver_all(self) -> None:
        stream = self._iterate()
        if inspect.isawaitable(stream):
            stream = await stream
        try:
            await self._deliver(stream)
        finally:
            if inspect.isasyncgen(stream):
                await stream.aclose()

    async def _deliver(self, stream: AsyncIterator[Any]) -> None:
        yield_at = 0.0
        async for item in stream:
            self._sink(item)
            self.delivered += 1
            if self._loop.time() >= yield_at:
                await asyncio.sleep(0)
                yield_at = self._loop.time() + YIELD_INTERVAL

    def _begin_stop(self) -> None:
        if self._stop_task is None:
            self._stop_task = self._loop.create_task(self._drain_and_cancel())

    async def _drain_and_cancel(self) -> None:
        deadline, before = self._loop.time() + DRAIN_TIMEOUT, -1
        while before != self.delivered and self._loop.time() < deadline:
            before = self.delivered
            # An item takes three loop iterations from call_soon_threadsafe to the sink.
            for _ in range(3):
                await asyncio.sleep(0)
        if self._task is not None:
            self._task.cancel()
