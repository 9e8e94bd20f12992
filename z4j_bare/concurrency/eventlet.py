"""The backend for processes that eventlet has patched. eventlet is deprecated by its authors."""

from __future__ import annotations

from _queue import SimpleQueue
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from selectors import BaseSelector
from time import monotonic
from types import FrameType
from typing import Any

import eventlet
from eventlet import hubs, patcher
from eventlet.green import selectors
from eventlet.semaphore import Semaphore
from greenlet import getcurrent
from zope.interface import implementer

from z4j_bare.concurrency import fork
from z4j_bare.concurrency.base import BaseConcurrency, RuntimeLock, suspended_frame
from z4j_bare.concurrency.fork import ForkGuard
from z4j_bare.interfaces import HasFileno, IConcurrency, IEvent

_socket = patcher.original("socket")
_thread = patcher.original("_thread")
_native_ident = _thread.get_ident
_store_guard = ForkGuard(_thread.allocate_lock)

#: Seconds after which a waiter checks its flag without a wake-up.
#: A wake-up is lost if a native thread sets the flag while the hub sorts its timers.
#: The interval is long, because an agent has ten waiters and each check takes 0.2 ms of CPU time.
RECHECK_INTERVAL = 60.0

#: Maximum seconds of one wait for a socket in a process that has forked.
#: Parent and child share the hub's epoll set. After the child has closed a socket, the parent gets
#: no events of that socket until its next wait.
MAX_IO_WAIT = 1.0

#: Maximum seconds of one wait for a socket in a process that has not forked.
#: The wait is limited, because the process may fork during the wait.
MAX_IO_WAIT_UNFORKED = 10.0


@implementer(IEvent)
class Event:
    """An event made of a flag and a semaphore.

    eventlet's own event can be set only once. A patched ``threading.Event`` switches greenlets in
    ``set``.
    """

    def __init__(self) -> None:
        self._flag = False
        self._waiters = 0
        self._semaphore = Semaphore(0)
        self._thread = _native_ident()
        # Set by the first wait.
        # The constructor creates no hub, because a hub cannot be used after a daemon's fork.
        self._hub: Any = None

    def set(self) -> None:
        """Set the flag and make the hub wake all waiters, without switching greenlets."""
        self._flag = True
        if _native_ident() == self._thread:
            self._release()
        elif self._hub is not None:
            # This call is safe on another native thread, because it only appends to a list of the
            # hub. The call does not wake the hub, because only the hub's own thread can wake the
            # hub.
            self._hub.schedule_call_global(0, self._release)

    def _release(self) -> None:
        for _ in range(self._waiters):
            self._semaphore.release()
        self._waiters = 0

    def clear(self) -> None:
        """Clear the flag."""
        self._flag = False

    def is_set(self) -> bool:
        """Return whether the flag is set."""
        return self._flag

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the flag and return ``True``, or ``False`` after ``timeout`` seconds."""
        deadline = None if timeout is None else monotonic() + timeout
        self._hub = hubs.get_hub()
        while not self._flag:
            remaining = RECHECK_INTERVAL if deadline is None else deadline - monotonic()
            if remaining <= 0:
                return False
            self._waiters += 1
            # If a waiter times out just before it is released, a permit remains in the semaphore.
            # The next waiter takes the permit, finds the flag unset, and waits again.
            if not self._semaphore.acquire(timeout=min(remaining, RECHECK_INTERVAL)):
                self._waiters = max(0, self._waiters - 1)
        return True


class NativeWorker:
    """One native thread that runs one job at a time while the hub of the caller continues.

    ``eventlet.tpool`` is not used. That pool has twenty threads, and gives each job to the thread
    that was idle for longest. The caches of such a thread are cold, and SQLite allocates memory for
    each thread.
    """

    def __init__(self) -> None:
        # ``SimpleQueue`` is implemented in C, so it is never patched.
        self._jobs: SimpleQueue[tuple[list[Any], Callable[[], object]] | None] = SimpleQueue()
        self._wakeup_r, self._wakeup_w = _socket.socketpair()
        self._wakeup_r.setblocking(False)
        _thread.start_new_thread(self._work, ())

    def call(self, job: Callable[[], object]) -> Any:
        """Return the result of ``job()``. The job must not raise, log or use objects of the hub."""
        result: list[Any] = []
        self._jobs.put((result, job))
        while not result:
            wait_io(self._wakeup_r, MAX_IO_WAIT, write=False)
            with suppress(BlockingIOError):
                self._wakeup_r.recv(64)  # also reads the wake-ups of killed callers
        return result[0]

    def close(self) -> None:
        """Stop the thread. No :meth:`call` may be running."""
        self._jobs.put(None)
        self._wakeup_r.close()

    def _work(self) -> None:
        with self._wakeup_w:
            while (item := self._jobs.get()) is not None:
                result, job = item
                result.append(job())
                with suppress(OSError):  # the caller was killed, and the other end is closed
                    self._wakeup_w.send(b"!")
                del item, result, job  # release these objects before waiting for the next job


@implementer(IConcurrency)
class EventletConcurrency(BaseConcurrency):
    """Runs each task in a green thread, and offloaded functions in one native thread."""

    name = "eventlet"

    def __init__(self) -> None:
        super().__init__()
        self._offload_lock = Semaphore(1)
        self._worker: NativeWorker | None = None

    def event(self) -> IEvent:
        """Return a new :class:`Event`."""
        return Event()

    def selector(self) -> BaseSelector:
        """Return a new selector of ``eventlet.green``."""
        selector: BaseSelector = selectors.DefaultSelector()
        return selector

    def native_ident(self) -> int:
        """Return the ident of the hub's thread."""
        return int(_native_ident())

    def context_getter(self) -> Callable[[], object]:
        """Return ``greenlet.getcurrent``."""
        current: Callable[[], object] = getcurrent
        return current

    def frame_reader(self) -> Callable[[object], FrameType | None]:
        """Return a function that reads the frame of a suspended greenlet."""
        return suspended_frame

    def start_native_thread(self, function: Callable[..., object], *args: object) -> bool:
        """Run ``function(sleep, *args)`` in an unpatched daemon thread."""
        _thread.start_new_thread(function, (patcher.original("time").sleep, *args))
        return True

    def timer(
        self, seconds: float, function: Callable[[], object], *, once: bool = False
    ) -> Callable[[], object]:
        """Make the hub call ``function()`` every ``seconds`` seconds."""
        hub = hubs.get_hub()
        timers: list[Any] = []

        def tick() -> None:
            if self._tick(function) and not once:
                timers[:] = [hub.schedule_call_global(seconds, tick)]

        timers.append(hub.schedule_call_global(seconds, tick))
        return lambda: [timer.cancel() for timer in timers]

    def close(self) -> None:
        """Stop the native thread, unless a job is running."""
        if not self.forked() and not self._offload_lock.locked():
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.close()

    def _lock(self) -> RuntimeLock:
        lock: RuntimeLock = Semaphore(1)
        return lock

    def _start(self, run: Callable[[], None], name: str) -> None:
        del name
        eventlet.spawn_n(run)

    def _sleep(self, seconds: float) -> None:
        eventlet.sleep(seconds)

    def _offload(self, job: Callable[[], tuple[bool, Any]]) -> tuple[bool, Any]:
        with self._offload_lock:
            if self._worker is None:
                self._worker = NativeWorker()
            outcome: tuple[bool, Any] = self._worker.call(partial(_store_guard.run, job))
            return outcome

    def _wait_io(self, sock: HasFileno, timeout: float, write: bool) -> bool:
        while True:
            max_wait = MAX_IO_WAIT if fork.has_forked() else MAX_IO_WAIT_UNFORKED
            if wait_io(sock, min(timeout, max_wait), write=write):
                return True
            timeout -= max_wait
            if timeout <= 0 or self.forked():
                return False


def wait_io(sock: HasFileno, timeout: float, *, write: bool) -> bool:
    """Wait on the hub until ``sock`` is ready; return ``False`` after ``timeout`` seconds."""
    try:
        hubs.trampoline(
            sock.fileno(), read=not write, write=write, timeout=timeout, timeout_exc=TimeoutError
        )
    except TimeoutError:
        return False
    return True
