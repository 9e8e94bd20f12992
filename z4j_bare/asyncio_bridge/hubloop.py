"""A real asyncio loop in one greenlet (or thread) that never shows itself to the host."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from z4j_bare.asyncio_bridge.marks import StepScopedSelector
from z4j_bare.asyncio_bridge.worker_pool import Job, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.adapters")

#: Workers behind ``run_in_executor``; the adapters' own pools have eight (``adapter-surface`` 2.1).
OFFLOADERS = 8
#: Seconds before a loop whose step let an exception escape goes on.
RESTART_PAUSE = 0.1


class HubLoop(asyncio.SelectorEventLoop):
    """The loop that asyncio-flavoured adapters run on: ``start()``, use, ``shutdown()``.

    Differs from the stock loop in what a host notices: its running mark is on its thread during a step only,
    the given executor is ignored in favour of workers on the backend, ``call_soon_threadsafe`` never raises,
    nothing is ever set as "the current event loop", and a forked copy leaves without touching a file
    descriptor that it shares.
    """

    #: Loops in use, so that no garbage collection in a forked child closes what the parent still polls.
    _alive: ClassVar[set[HubLoop]] = set()

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._scope = StepScopedSelector(backend)
        self._workers = WorkerPool(backend, "z4j-offload", OFFLOADERS)
        self._task: Any = None
        self._ending = False
        self.dropped = 0
        self.restarts = 0
        super().__init__(self._scope)
        # PYTHONASYNCIODEBUG would switch on coroutine origin tracking, which is per OS thread: the host's
        # greenlets too.
        self.set_debug(False)

    @property
    def busy_workers(self) -> int:
        """How many offloaded calls run now, hung ones included."""
        return self._workers.busy

    def start(self) -> None:
        """Spawn the loop and its first worker; returns without waiting. Also inside a user's running loop."""
        self._alive.add(self)
        self._workers.start()
        self._task = self._backend.spawn(self._main, name="z4j-hubloop")

    def shutdown(self, timeout: float) -> bool:
        """Cancel every task and end the loop; whether it has ended after ``timeout`` seconds. Idempotent."""
        if not self._ending:
            self.call_soon_threadsafe(self._begin_end, timeout)
            self._ending = True
        return self.in_step() or bool(self._task.join(timeout))

    def in_step(self) -> bool:
        """Whether the caller is a step of this loop."""
        return self._scope.in_step()

    def unmarked(self) -> Any:
        """Return a context manager that hides the running mark inside a step, for logging."""
        return self._scope.hidden()

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """Schedule ``callback``; never switches, never raises.

        After :meth:`shutdown`, and in a forked child, the call is counted in ``dropped`` and comes back
        cancelled.
        """
        if not self._ending and not self._backend.forked():
            try:
                return super().call_soon_threadsafe(callback, *args, context=context)
            except RuntimeError:  # closed between the question and the call
                pass
        self.dropped += 1
        handle = asyncio.Handle(callback, args, self, context)
        handle.cancel()
        return handle

    def run_in_executor(  # type: ignore[override]
        self,
        executor: Any,  # noqa: ARG002 - ignored on purpose
        func: Callable[..., Any],
        *args: Any,
    ) -> asyncio.Future[Any]:
        """Run ``func`` on our own workers whatever the pool: theirs would start threads inside a step.

        Under gevent and eventlet those threads are greenlets of a hub that may never run (``adapter-surface``
        4, row 1).
        """
        future = self.create_future()
        self._workers.submit(
            Job(func, args, partial(self._deliver, future), lambda: not future.cancelled())
        )
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log as asyncio does, with the mark off; say nothing about what a forked child leaves behind."""
        if not self._backend.forked():
            with self._scope.hidden():
                super().call_exception_handler(context)

    def add_signal_handler(self, *_: Any) -> None:  # type: ignore[override]
        """Refuse: signal handlers belong to the host."""
        raise NotImplementedError

    def _write_to_self(self) -> None:
        if self._scope.needs_waking():
            super()._write_to_self()  # type: ignore[misc]

    def _deliver(self, future: asyncio.Future[Any], ok: bool, value: Any) -> None:
        self.call_soon_threadsafe(_settle, future, ok, value)

    def _main(self) -> None:
        try:
            while not self._run_steps() and not self.is_closed():
                self._backend.sleep(RESTART_PAUSE)
        finally:
            if not self._backend.forked():
                self._discard()

    def _run_steps(self) -> bool:
        """Run until :meth:`stop`, then return ``True``; ``False`` when an exception escaped from a step."""
        self._scope.enter(self)
        try:
            self.run_forever()
            return True
        except (Exception, SystemExit) as error:
            escaped = error
        finally:
            self._scope.leave()
        self.restarts += 1
        logger.error(
            "z4j: an error escaped from the adapters' loop, which goes on", exc_info=escaped
        )
        return False

    def _discard(self) -> None:
        self._ending = True
        self._workers.stop()
        self.close()
        self._alive.discard(self)

    def _begin_end(self, patience: float) -> None:
        self._last_task = self.create_task(self._end(patience))

    async def _end(self, patience: float) -> None:
        try:
            await self._cancel_all(self.time() + patience / 2)
        finally:
            self.stop()

    async def _cancel_all(self, deadline: float) -> None:
        cancelled: set[asyncio.Task[Any]] = {self._last_task}
        while (left := asyncio.all_tasks(self) - {self._last_task}) and self.time() < deadline:
            for task in left - cancelled:
                task.cancel()
            cancelled |= left
            patience = max(0.0, deadline - self.time())
            await asyncio.wait(left, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001 - nobody else can tell


def _settle(future: asyncio.Future[Any], ok: bool, value: Any) -> None:
    if future.done():
        return
    if ok:
        future.set_result(value)
    else:
        future.set_exception(value)
