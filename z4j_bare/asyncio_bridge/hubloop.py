"""An asyncio event loop in one greenlet or thread, hidden from the host's code."""

from __future__ import annotations

import asyncio
import logging
import selectors
import sys
from asyncio.events import _get_running_loop, _set_running_loop
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from greenlet import getcurrent

from z4j_bare.asyncio_bridge.worker_pool import Job, WorkerPool
from z4j_bare.concurrency.timeslice import SLICE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from contextvars import Context

    from _typeshed import FileDescriptorLike

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.interfaces import ITask

logger = logging.getLogger("z4j.runtime.asyncio_bridge.hubloop")

#: Maximum number of workers for ``run_in_executor``. The adapters' thread pools have the same size.
EXECUTOR_WORKERS = 8
#: Seconds before the loop continues after an exception of a step.
RESTART_PAUSE = 0.1
#: Maximum seconds of one wait in ``select``, for two cases in which nothing wakes the loop.
#: A ``put_nowait`` to an asyncio queue from another thread does not wake the loop.
#: Under eventlet, a forked child can remove sockets from its parent's epoll set.
MAX_WAIT = 1.0


def _swap_task(loop: asyncio.AbstractEventLoop | None, task: object) -> object:
    """Set the current task of ``loop`` and return the previous one.

    From CPython 3.14 on, the current task belongs to the OS thread, as the running loop does. While
    another task is set, asyncio cannot enter a task of the loop ("Cannot enter into task"). Earlier
    versions store one current task per loop, so this function does nothing there.

    :param loop: the running loop of this thread; ``None`` if no loop is running.
    """
    if loop is None or sys.version_info < (3, 14):
        return None
    return asyncio.tasks._swap_current_task(loop, task)  # noqa: SLF001


class StepScopedSelector(selectors.BaseSelector):
    """A cooperative selector. During its waits, the thread has no running loop.

    asyncio records the running loop per OS thread, and all greenlets of a hub share one thread. If
    a loop stayed recorded during its waits, every ``asyncio.run()`` of the host would fail, and
    every Django ORM call would raise ``SynchronousOnlyOperation``. A loop waits in ``select``.
    Therefore ``select`` restores the running loop and the async-generator hooks that the thread had
    before the step.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._inner: selectors.BaseSelector = backend.selector()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outer_loop: asyncio.AbstractEventLoop | None = None
        #: The current tasks of the outer loop and of this loop while they are unset.
        self._outer_task: object = None
        self._task: object = None
        self._outer_hooks = self._hooks = sys.get_asyncgen_hooks()
        self._yield_at = 0.0
        self._waiting = self._called = False
        self._greenlet: object = None

    def in_step(self) -> bool:
        """Return whether the caller is a step of the loop.

        Compares greenlets and not running loops: if an adapter switches greenlets within a step,
        other greenlets see the step's running loop. ``getcurrent`` also works in threads mode.
        """
        return self._greenlet is getcurrent()

    def enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """Unset the thread's running loop, because ``loop.run_forever()`` raises if one is set."""
        self._loop, self._greenlet = loop, getcurrent()
        self._unset_outer()

    def leave(self) -> None:
        """Restore the running loop and the hooks that the thread had before the last step."""
        _set_running_loop(self._outer_loop)
        _swap_task(self._outer_loop, self._outer_task)
        sys.set_asyncgen_hooks(*self._outer_hooks)

    def _unset_outer(self) -> None:
        self._outer_loop, self._outer_hooks = _get_running_loop(), sys.get_asyncgen_hooks()
        self._outer_task = _swap_task(self._outer_loop, None)
        _set_running_loop(None)

    @contextmanager
    def running_loop_unset(self) -> Iterator[None]:
        """Unset the running loop inside a step, around code that may switch greenlets."""
        if not self.in_step():
            yield
            return
        self._end_step()
        try:
            yield
        finally:
            self._begin_step()

    def should_wake(self) -> bool:
        """Record a call from outside the loop; return whether to write to the self-pipe.

        To save system calls, only the first call during a wait writes. No call is missed: this
        method sets ``_called`` before it reads ``_waiting``, and ``select`` sets ``_waiting``
        before it reads ``_called``.
        """
        self._called = True
        waiting, self._waiting = self._waiting, False
        return waiting

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for I/O between two steps. Raises ``ForkedChildError`` in a forked child."""
        self._waiting = True
        if self._called:
            timeout = 0
        try:
            if timeout is not None and timeout <= 0 and self._backend.now() < self._yield_at:
                return []
            return self._yield_and_select(MAX_WAIT if timeout is None else min(timeout, MAX_WAIT))
        finally:
            self._waiting = self._called = False

    def _yield_and_select(self, timeout: float) -> list[tuple[selectors.SelectorKey, int]]:
        self._end_step()
        try:
            if timeout <= 0:
                # ``sleep`` runs the hub. gevent's ``select`` with timeout 0 does not.
                self._backend.sleep(0)
            ready: list[tuple[selectors.SelectorKey, int]] = self._backend.call_blocking(
                self._inner.select, timeout
            )
        finally:
            self._begin_step()
            self._yield_at = self._backend.now() + SLICE_SECONDS
        return ready

    def _end_step(self) -> None:
        self._hooks = sys.get_asyncgen_hooks()
        self._task = _swap_task(_get_running_loop(), None)
        self.leave()

    def _begin_step(self) -> None:
        self._unset_outer()
        _set_running_loop(self._loop)
        _swap_task(self._loop, self._task)
        sys.set_asyncgen_hooks(*self._hooks)

    def register(
        self, fileobj: FileDescriptorLike, events: int, data: object = None
    ) -> selectors.SelectorKey:
        """Register a file object with the backend's selector."""
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """Remove a file object from the backend's selector."""
        return self._inner.unregister(fileobj)

    def modify(
        self, fileobj: FileDescriptorLike, events: int, data: object = None
    ) -> selectors.SelectorKey:
        """Change the events of a file object in the backend's selector."""
        return self._inner.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Return the registrations of the backend's selector."""
        return self._inner.get_map()

    def close(self) -> None:
        """Close the backend's selector."""
        self._inner.close()


class HubLoop(asyncio.SelectorEventLoop):
    """The event loop of the adapters, used between ``start()`` and ``shutdown()``.

    Differences from the standard loop: this loop is the thread's running loop only during a step,
    and never the current event loop. ``run_in_executor`` uses workers of the backend.
    ``call_soon_threadsafe`` never raises. In a forked child the copy of the loop ends without using
    the file descriptors of the parent.
    """

    #: Started loops. The references prevent garbage collection of the loops in a forked child,
    #: because the collection would remove descriptors from the parent's epoll set.
    _in_use: ClassVar[set[HubLoop]] = set()

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._scope = StepScopedSelector(backend)
        self._workers = WorkerPool(backend, "z4j-offload", EXECUTOR_WORKERS)
        self._task: ITask | None = None
        self._shutdown_task: asyncio.Task[None] | None = None
        self._shutting_down = False
        self.dropped = 0
        self.restarts = 0
        super().__init__(self._scope)
        # Off: PYTHONASYNCIODEBUG would turn on coroutine origin tracking for the whole thread.
        self.set_debug(False)

    @property
    def busy_workers(self) -> int:
        """The number of executor calls that run, including hung calls."""
        return self._workers.busy

    def start(self) -> None:
        """Start the loop and its first worker without waiting."""
        self._in_use.add(self)
        self._workers.start()
        self._task = self._backend.spawn(self._main, name="z4j-hubloop")

    def shutdown(self, timeout: float) -> bool:
        """Cancel every task and end the loop within ``timeout`` seconds. Idempotent.

        Returns whether the loop has ended. In a step of the loop, returns ``True`` without waiting.
        """
        if not self._shutting_down:
            self.call_soon_threadsafe(self._begin_shutdown, timeout)
            self._shutting_down = True
        return self.in_step() or self._task is None or bool(self._task.join(timeout))

    def in_step(self) -> bool:
        """Return whether the caller is a step of this loop."""
        return self._scope.in_step()

    def running_loop_unset(self) -> AbstractContextManager[None]:
        """Return a context manager that unsets the running loop inside a step, for logging."""
        return self._scope.running_loop_unset()

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule ``callback``. Never switches greenlets, never raises.

        After :meth:`shutdown` and in a forked child, counts the call in ``dropped`` and returns a
        cancelled handle.
        """
        if not self._shutting_down and not self._backend.forked():
            try:
                return super().call_soon_threadsafe(callback, *args, context=context)
            except RuntimeError:  # the loop was closed since the check
                pass
        self.dropped += 1
        handle = asyncio.Handle(callback, args, self, context)
        handle.cancel()
        return handle

    def run_in_executor(  # type: ignore[override]
        self,
        executor: object,  # noqa: ARG002 - ignored on purpose
        func: Callable[..., Any],
        *args: Any,
    ) -> asyncio.Future[Any]:
        """Run ``func`` on the backend's workers and ignore ``executor``.

        An executor would start a thread within a step. Under gevent and eventlet this thread would
        be a greenlet that may never run.
        """
        future = self.create_future()
        self._workers.submit(
            Job(func, args, partial(self._deliver, future), lambda: not future.cancelled())
        )
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log as asyncio does, with the running loop unset; log nothing in a forked child."""
        if not self._backend.forked():
            with self._scope.running_loop_unset():
                super().call_exception_handler(context)

    def add_signal_handler(self, *_: object) -> None:
        """Raise ``NotImplementedError``: signal handlers belong to the host."""
        raise NotImplementedError

    def _write_to_self(self) -> None:
        if self._scope.should_wake():
            super()._write_to_self()  # type: ignore[misc]

    def _deliver(self, future: asyncio.Future[Any], ok: bool, value: object) -> None:
        self.call_soon_threadsafe(_set_future, future, ok, value)

    def _main(self) -> None:
        try:
            while not self._run_steps() and not self.is_closed():
                self._backend.sleep(RESTART_PAUSE)
        finally:
            if not self._backend.forked():
                self._release()

    def _run_steps(self) -> bool:
        """Run steps until :meth:`stop`; return ``False`` if an exception ended the run."""
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
            "z4j: an exception escaped from an adapter's callback; the adapters' loop continues",
            exc_info=escaped,
        )
        return False

    def _release(self) -> None:
        self._shutting_down = True
        self._workers.stop()
        self.close()
        self._in_use.discard(self)

    def _begin_shutdown(self, timeout: float) -> None:
        self._shutdown_task = self.create_task(self._cancel_and_stop(timeout))

    async def _cancel_and_stop(self, seconds: float) -> None:
        try:
            await self._cancel_all(self.time() + seconds / 2)
        finally:
            self.stop()

    async def _cancel_all(self, deadline: float) -> None:
        cancelled = {self._shutdown_task}
        while (
            running := asyncio.all_tasks(self) - {self._shutdown_task}
        ) and self.time() < deadline:
            for task in running - cancelled:
                task.cancel()
            cancelled |= running
            timeout = max(0.0, deadline - self.time())
            await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            # Without this assignment, asyncio would log an error when it destroys the task.
            # There is no public method for this.
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001


def _set_future(future: asyncio.Future[Any], ok: bool, value: Any) -> None:
    if future.done():
        return
    if ok:
        future.set_result(value)
    else:
        future.set_exception(value)
