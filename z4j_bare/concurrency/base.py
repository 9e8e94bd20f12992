"""What the runtimes share: fork guard, step timer, task bookkeeping. A backend adds the primitives."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from typing import Any

from zope.interface import implementer

from z4j_bare.concurrency import fork
from z4j_bare.errors import ForkedChildError, InterpreterShutdownError
from z4j_bare.interfaces import ILock, ITask

logger = logging.getLogger("z4j.runtime.concurrency")

#: What ``StepTimer.begin`` returned when this task running_since last; nothing in a task that is not ours.
_step_start: ContextVar[Any] = ContextVar("z4j_step_start", default=None)


@implementer(ITask)
class Task:
    """A spawned loop, for every backend."""

    def __init__(self, name: str, ended: Any, wait: Callable[[Any, float | None], bool]) -> None:
        self.name = name
        #: Monotonic time of its last wake-up, in seconds; ``None`` while it waits.
        self.running_since: float | None = None
        self._ended = ended
        self._wait = wait

    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return not self._ended.is_set()

    def stuck(self, seconds: float) -> bool:
        """Whether it has computed, or waited for what the backend knows nothing of, for longer than that."""
        running_since = self.running_since
        return running_since is not None and time.monotonic() - running_since > seconds

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds for its end; return whether it has ended."""
        return self._wait(self._ended, timeout)


@implementer(ILock)
class CooperativeLock:
    """A lock of the runtime's own; call_blocking for it ends the step, as every wait does.

    :param inner: has ``acquire(blocking)`` and ``release()``.
    """

    def __init__(self, inner: Any, call_blocking: Callable[..., Any]) -> None:
        self._inner = inner
        self._call_blocking = call_blocking

    def __enter__(self) -> None:
        if not self._inner.acquire(False):
            self._call_blocking(self._inner.acquire)

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        self._inner.release()


class StepTimer:
    """The longest stretch that a task of ours ran without yielding, in seconds; reset by whoever reports it.

    It is wall time: on a busy machine that contains the time for which another process had the processor. The test suite
    puts a stricter clock in its place.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self.longest_task = ""
        self.count = 0

    def begin(self) -> Any:
        """Note that a task of ours wakes; return what :meth:`end` shall get."""
        return time.perf_counter()

    def end(self, began: Any, task: str) -> None:
        """Count one step."""
        seconds = time.perf_counter() - began
        self.count += 1
        if seconds > self.longest:
            self.longest, self.longest_task = seconds, task

    def drain(self) -> tuple[float, str]:
        """Return the longest step and the task it belongs to, and start over."""
        longest = (self.longest, self.longest_task)
        self.longest, self.longest_task = 0.0, ""
        return longest


class BaseConcurrency:
    """The part of ``IConcurrency`` that is the same everywhere.

    A backend implements the underscored methods plus ``event``. Everything that waits passes through
    :meth:`_yielding`, which ends the current step, waits, and checks the fork epoch on waking.
    """

    name = ""
    _task: ContextVar[Task] = ContextVar("z4j_task")

    def __init__(self) -> None:
        self._epoch = fork.epoch()
        self.steps = StepTimer()

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def forked(self) -> bool:
        """Whether this process is a child of the one that built the backend."""
        return fork.epoch() != self._epoch

    def spawn(self, function: Callable[..., object], *args: object, name: str) -> Task:
        """Run ``function(*args)`` in a daemon task; see ``IConcurrency``."""
        task = Task(name, self.event(), self.wait)
        self._start(self._run, task, function, args)
        return task

    def sleep(self, seconds: float) -> None:
        """Let others run for ``seconds``."""
        self._yielding(self._sleep, seconds)

    def offload(self, function: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
        """Run a pure function off the hub; ``(True, value)`` or ``(False, exception)``."""
        outcome: tuple[bool, Any] = self._yielding(self._offload, capture_outcome, function, args)
        return outcome

    def wait_readable(self, sock: Any, timeout: float) -> bool:
        """Wait until ``sock`` can be read."""
        return bool(self._yielding(self._wait_io, sock, timeout, False))

    def wait_writable(self, sock: Any, timeout: float) -> bool:
        """Wait until ``sock`` can be written."""
        return bool(self._yielding(self._wait_io, sock, timeout, True))

    def wait(self, event: Any, timeout: float | None = None) -> bool:
        """``event.wait(timeout)`` with the fork guard: how every loop of ours waits."""
        return bool(self._yielding(event.wait, timeout))

    def call_blocking(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call foreign code that waits by itself, such as a library on patched sockets: not a step of ours."""
        return self._yielding(partial(function, *args, **kwargs))

    def import_module(self, module: str) -> Any:
        """Import and return a module that is large for one step of a hub."""
        return import_module(module)

    def close(self) -> None:
        """Give native helpers back."""

    def event(self) -> Any:
        """Return a new event of this runtime."""
        raise NotImplementedError

    def lock(self) -> Any:
        """Return a new lock of this runtime."""
        return CooperativeLock(self._lock(), self.call_blocking)

    def _lock(self) -> Any:
        raise NotImplementedError

    def selector(self) -> Any:
        """Return a new selector that cooperates with this runtime."""
        raise NotImplementedError

    def native_ident(self) -> int:
        """Return the identity of the OS thread we are on, as ``sys._current_frames`` keys it."""
        return 0

    def start_native_thread(self, function: Callable[..., object], *args: object) -> bool:
        """Run ``function(sleep, *args)`` in an unpatched thread, ``sleep`` being the unpatched one; ``False``: no need.

        Only hubs need it: it must not log, lock, or touch anything that belongs to the hub.
        """
        del function, args
        return False

    def timer(
        self, seconds: float, function: Callable[[], object], *, once: bool = False
    ) -> Callable[[], object] | None:
        """Have the hub itself call ``function()`` every ``seconds``; return what ends that, or ``None``: no hub here.

        It costs a quarter of waking a task, and is no step: ``function`` must not wait, log, raise, or do much. For the
        hub's own tasks only.

        :param once: call it a single time.
        """
        del seconds, function, once
        return None

    def _tick(self, function: Callable[[], object]) -> bool:
        """Call ``function``; ``False`` instead in a forked child, which has a copy of its parent's timers."""
        if self.forked():
            return False
        function()
        return True

    def _start(self, run: Callable[..., None], task: Task, *args: Any) -> None:
        raise NotImplementedError

    def _sleep(self, seconds: float) -> None:
        raise NotImplementedError

    def _offload(self, job: Callable[..., Any], *args: Any) -> Any:
        raise NotImplementedError

    def _wait_io(self, sock: Any, timeout: float, write: bool) -> bool:
        raise NotImplementedError

    def _yielding(self, wait: Callable[..., Any], *args: Any) -> Any:
        if fork.epoch() != self._epoch:
            raise ForkedChildError
        began = _step_start.get()
        if began is not None:
            task = self._task.get()
            task.running_since = None
            self.steps.end(began, task.name)
            _step_start.set(None)  # what foreign code inside the wait asks of us is no step either
        try:
            return wait(*args)
        finally:
            if began is not None:
                _step_start.set(self.steps.begin())
                task.running_since = time.monotonic()
            if fork.epoch() != self._epoch:
                raise ForkedChildError

    def _run(self, task: Task, function: Callable[..., object], args: tuple[object, ...]) -> None:
        self._task.set(task)
        task.running_since = time.monotonic()
        _step_start.set(self.steps.begin())
        try:
            function(*args)
        except (ForkedChildError, InterpreterShutdownError):
            return  # a copy in a child, or a process that is ending: neither is an error to report
        except Exception:
            logger.exception("z4j: task %s ended by an error of ours; please report it", task.name)
        finally:
            if not self.forked():
                self.steps.end(_step_start.get(), task.name)
                task.running_since = None
                task._ended.set()  # noqa: SLF001 - the seam owns its tasks


def capture_outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    """Call ``function(*args)`` and return its outcome as a value.

    gevent prints a traceback for an exception that leaves a pool job, and eventlet re-raises it in the hub.
    """
    try:
        return True, function(*args)
    except Exception as error:
        return False, error
