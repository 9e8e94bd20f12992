"""Green threads of eventlet. Legacy: eventlet has announced its retirement, so this file stays thin."""

from __future__ import annotations

from _queue import SimpleQueue
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any

import eventlet
from eventlet import hubs, patcher
from eventlet.green import selectors
from eventlet.semaphore import Semaphore
from zope.interface import implementer

from z4j_bare.concurrency import fork
from z4j_bare.concurrency.base import BaseConcurrency, Task
from z4j_bare.concurrency.fork import ForkGuard
from z4j_bare.interfaces import IConcurrency, IEvent

_socket = patcher.original("socket")
_thread = patcher.original("_thread")
_native_thread = _thread.get_ident
_gate = ForkGuard(_thread.allocate_lock)

#: Seconds after which a waiter looks at its flag by itself. One raised in another native thread is seen when the hub wakes
#: next, once a second at least while an agent runs, unless the hub was just sorting its timers. Each look wakes an idle
#: worker for 0.2 ms, and an agent has ten waiters.
LOOK = 60.0

#: Seconds after which a wait for a socket is entered anew in a process that has forked: its child shares the hub's epoll
#: set, and what it closes there is no longer waited for in the parent either; and in one that has not forked yet.
LONGEST_WAIT = 1.0
LONGEST_UNFORKED = 10.0


@implementer(IEvent)
class Event:
    """A flag over a semaphore: eventlet's own event fires once, and a patched ``threading.Event`` switches in ``set``."""

    def __init__(self) -> None:
        self._flag = False
        self._waiters = 0
        self._gate = Semaphore(0)
        self._thread = _native_thread()
        self._hub: Any = (
            None  # not before somebody waits: a hub does not survive the fork of a daemon
        )

    def set(self) -> None:
        """Raise the flag and schedule every waiter; the semaphore hands that to the hub, so nothing switches here."""
        self._flag = True
        if _native_thread() == self._thread:
            self._release()
        elif self._hub is not None:
            self._hub.schedule_call_global(
                0, self._release
            )  # appends to a list; a hub cannot be woken from elsewhere

    def _release(self) -> None:
        for _ in range(self._waiters):
            self._gate.release()
        self._waiters = 0

    def clear(self) -> None:
        """Lower the flag."""
        self._flag = False

    def is_set(self) -> bool:
        """Whether the flag is up."""
        return self._flag

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds."""
        deadline = None if timeout is None else monotonic() + timeout
        self._hub = hubs.get_hub()
        while not self._flag:
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                return False
            self._waiters += 1
            # A permit left over by a waiter that timed out just then costs one more turn of this loop, no more.
            if not self._gate.acquire(timeout=LOOK if left is None else min(left, LOOK)):
                self._waiters = max(0, self._waiters - 1)
        return True


class NativeWorker:
    """One native thread, which does one job at a time while the caller's hub goes on.

    ``eventlet.tpool`` has twenty, and each job goes to the one that has rested longest: its caches are cold, and each gets
    memory of its own for SQLite.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[list[Any], Callable[[], Any]] | None] = (
            SimpleQueue()
        )  # in C: nobody patches it
        self._ear, self._bell = _socket.socketpair()
        self._ear.setblocking(False)
        _thread.start_new_thread(self._work, ())

    def call(self, job: Callable[[], Any]) -> Any:
        """Return what ``job()`` returns. It must not raise, log, or touch what belongs to a hub."""
        result: list[Any] = []
        self._jobs.put((result, job))
        while not result:
            wait_io(self._ear, LONGEST_WAIT, write=False)
            with suppress(BlockingIOError):
                self._ear.recv(64)  # also what was rung for one who did not stay to hear it
        return result[0]

    def close(self) -> None:
        """End the thread. Nobody may be in :meth:`call`."""
        self._jobs.put(None)
        self._ear.close()

    def _work(self) -> None:
        with self._bell:
            while (task := self._jobs.get()) is not None:
                result, job = task
                result.append(job())
                with suppress(
                    OSError
                ):  # whoever asked may have been killed meanwhile, and the other end closed
                    self._bell.send(b"!")
                del task, result, job  # or they would live until the next one


@implementer(IConcurrency)
class EventletConcurrency(BaseConcurrency):
    """One green thread per task; offloaded work goes to one native thread."""

    name = "eventlet"

    def __init__(self) -> None:
        super().__init__()
        self._slot = Semaphore(1)
        self._helper: NativeWorker | None = None

    def event(self) -> Event:
        """Return a new event."""
        return Event()

    def selector(self) -> Any:
        """Return a selector that parks on the hub."""
        return selectors.DefaultSelector()

    def native_ident(self) -> int:
        """Return the hub's thread."""
        return int(_native_thread())

    def start_native_thread(self, function: Callable[..., object], *args: object) -> bool:
        """Start an unpatched daemon thread."""
        _thread.start_new_thread(function, (patcher.original("time").sleep, *args))
        return True

    def timer(
        self, seconds: float, function: Callable[[], object], *, once: bool = False
    ) -> Callable[[], object]:
        """Start a timer of the hub's."""
        hub = hubs.get_hub()
        timers: list[Any] = []

        def tick() -> None:
            if self._tick(function) and not once:
                timers[:] = [hub.schedule_call_global(seconds, tick)]

        timers.append(hub.schedule_call_global(seconds, tick))
        return lambda: [timer.cancel() for timer in timers]

    def close(self) -> None:
        """End the native thread, unless it hangs in the disk: ``stop()`` is bounded."""
        if not self.forked() and not self._slot.locked():
            helper, self._helper = self._helper, None
            if helper is not None:
                helper.close()

    def _lock(self) -> Any:
        return Semaphore(1)

    def _start(self, run: Callable[..., None], task: Task, *args: Any) -> None:
        eventlet.spawn_n(run, task, *args)

    def _sleep(self, seconds: float) -> None:
        eventlet.sleep(seconds)

    def _offload(self, job: Callable[..., Any], *args: Any) -> Any:
        with self._slot:
            if self._helper is None:
                self._helper = NativeWorker()
            return self._helper.call(partial(_gate.run, job, *args))

    def _wait_io(self, sock: Any, timeout: float, write: bool) -> bool:
        while True:
            longest = LONGEST_WAIT if fork.has_forked() else LONGEST_UNFORKED
            if wait_io(sock, min(timeout, longest), write=write):
                return True
            timeout -= longest
            if timeout <= 0 or self.forked():
                return False


def wait_io(sock: Any, timeout: float, *, write: bool) -> bool:
    """Wait at most ``timeout`` seconds; return whether ``sock`` is ready."""
    try:
        hubs.trampoline(
            sock.fileno(), read=not write, write=write, timeout=timeout, timeout_exc=TimeoutError
        )
    except TimeoutError:
        return False
    return True
