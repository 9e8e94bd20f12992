"""One async generator of an adapter, feeding the synchronous side."""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING, Any

from z4j_bare.asyncio_bridge.future import CallFuture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from z4j_bare.asyncio_bridge.hubloop import HubLoop
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.adapters")

#: Seconds of items after which the pump yields: a full queue never suspends its reader, and 10,000 items are
#: 30 ms.
SLICE = 0.001
#: Seconds of work after which a failure counts as the first again.
STEADY = 60.0
#: Seconds that :meth:`Pump.end` gives to items already queued.
DRAIN = 1.0


def backoff() -> Iterator[float]:
    """Yield the pauses between restarts, in seconds: 1, 2, 4, 8, 16, 30, 30, ..."""
    pause = 1.0
    while True:
        yield min(pause, 30.0)
        pause = min(pause * 2, 30.0)


class Pump:
    """Hands every item of ``iterate()`` to ``sink`` inside the loop step that produced it.

    ``sink`` may append and nothing else: it must not wait, log or switch. A generator that ends has nothing
    more to say (rq, dramatiq and huey end their registry stream at once); one that raises is logged and
    started again.
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
        self._ending: asyncio.Task[None] | None = None
        self.delivered = 0
        self.restarts = 0

    def begin(self) -> None:
        """Start the task. A loop step."""
        self._task = self._loop.create_task(self._run(), name=self._name)
        self._task.add_done_callback(lambda _: self._ended.settle(True, None))

    def end(self) -> None:
        """Let queued items through, then cancel; wait for that at most :data:`DRAIN` seconds. Idempotent."""
        handle = self._loop.call_soon_threadsafe(self._begin_end)
        if handle.cancelled() or self._loop.in_step():
            return
        try:
            self._ended.wait(2 * DRAIN, self._name)
        except TimeoutError:
            logger.warning("z4j: %s does not end; left behind", self._name)

    async def _run(self) -> None:
        pauses = backoff()
        while True:
            began = self._loop.time()
            try:
                await self._feed()
                return
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                if self._task is None or self._task.cancelling():
                    raise  # the cancellation is ours, not the stream's
                if self._loop.time() - began > STEADY:
                    pauses = backoff()
                pause = next(pauses)
                self.restarts += 1
                with self._loop.unmarked():  # a log handler may switch greenlets
                    logger.warning(
                        "z4j: %s failed; again in %g s", self._name, pause, exc_info=error
                    )
            await asyncio.sleep(pause)

    async def _feed(self) -> None:
        stream = self._iterate()
        if inspect.isawaitable(stream):
            stream = await stream
        try:
            await self._drain(stream)
        finally:
            if inspect.isasyncgen(stream):
                await stream.aclose()

    async def _drain(self, stream: Any) -> None:
        yield_at = 0.0
        async for item in stream:
            self._sink(item)
            self.delivered += 1
            if self._loop.time() >= yield_at:
                await asyncio.sleep(0)
                yield_at = self._loop.time() + SLICE

    def _begin_end(self) -> None:
        if self._ending is None:
            self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        deadline, seen = self._loop.time() + DRAIN, -1
        while seen != self.delivered and self._loop.time() < deadline:
            seen = self.delivered
            for _ in range(
                3
            ):  # an item takes three turns of the loop from call_soon_threadsafe to the sink
                await asyncio.sleep(0)
        if self._task is not None:
            self._task.cancel()
