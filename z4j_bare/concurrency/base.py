"""The base class of the backends, which run tasks, measure the tasks' steps and detect forks."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, TypeVarTuple

from zope.interface import implementer

from z4j_bare.concurrency import fork
from z4j_bare.errors import ForkedChildError, InterpreterShutdownError
from z4j_bare.interfaces import HasFileno, IEvent, ILock, ITask

if TYPE_CHECKING:
    from selectors import BaseSelector
    from types import FrameType, ModuleType

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

logger = logging.getLogger("z4j.runtime.concurrency.base")

#: Return value of ``StepTimer.begin`` for the current step of this task.
#: ``None`` during a wait, and in tasks of the host.
_step_start: ContextVar[float | None] = ContextVar("z4j_step_start", default=None)


@implementer(ITask)
class Task:
    """A task that :meth:`BaseConcurrency.spawn` has started."""

    def __init__(
        self, name: str, ended: IEvent, wait: Callable[[IEvent, float | None], bool]
    ) -> None:
        self.name = name
        #: Monotonic start time of the current step in seconds; ``None`` while the task waits.
        self.running_since: float | None = None
        self._ended = ended
        self._wait = wait

    def alive(self) -> bool:
        """Return whether the task is still running."""
        return not self._ended.is_set()

    def stuck(self, seconds: float) -> bool:
        """Return whether the current step takes longer than ``seconds``."""
        running_since = self.running_since
        return running_since is not None and time.monotonic() - running_since > seconds

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of the task; return ``False`` if ``timeout`` seconds pass before."""
        return self._wait(self._ended, timeout)

    def mark_ended(self) -> None:
        """Mark the task as ended, and wake the tasks that wait in :meth:`join`."""
        self._ended.set()


class RuntimeLock(Protocol):
    """A lock or semaphore of threading, gevent or eventlet."""

    def acquire(self, blocking: bool = True, /) -> object:
        """Acquire the lock; return whether this succeeded."""
        ...

    def release(self) -> object:
        """Release the lock."""
        ...


@implementer(ILock)
class CooperativeLock:
    """Wraps a lock of gevent, eventlet or threading.

    A task that waits for the lock ends its step, and checks for a fork.
    """

    def __init__(self, inner: RuntimeLock, call_blocking: Callable[..., object]) -> None:
        self._inner = inner
        self._call_blocking = call_blocking

    def __enter__(self) -> None:
        if not self._inner.acquire(False):
            self._call_blocking(self._inner.acquire)

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        self._inner.release()


class StepTimer:
    """Counts the steps of the agent's tasks, and records the longest step in seconds.

    The timer measures wall time. On a busy machine, wall time includes the time of other processes.
    The test suite uses a stricter timer.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self.longest_task = ""
        self.count = 0

    def begin(self) -> float:
        """Return the current time, which must be passed to :meth:`end` as the start of the step."""
        return time.perf_counter()

    def end(self, start: float, task: str) -> None:
        """Record a step that ends now."""
        seconds = time.perf_counter() - start
        self.count += 1
        if seconds > self.longest:
            self.longest, self.longest_task = seconds, task

    def drain(self) -> tuple[float, str]:
        """Return the longest step in seconds and the name of its task, and reset both."""
        longest = (self.longest, self.longest_task)
        self.longest, self.longest_task = 0.0, ""
        return longest


class BaseConcurrency:
    """Implements the common part of ``IConcurrency``. That interface specifies the methods.

    A subclass implements the methods that raise ``NotImplementedError``. Every wait goes through
    :meth:`_yielding`.
    """

    name = ""
    _task: ContextVar[Task] = ContextVar("z4j_task")

    def __init__(self) -> None:
        self._epoch = fork.epoch()
        self.steps = StepTimer()

    def now(self) -> float:
        """Return the monotonic time in seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Return the seconds since the epoch."""
        return time.time()

    def forked(self) -> bool:
        """Return whether this process was forked from the process that created the backend."""
        return fork.epoch() != self._epoch

    def spawn(self, function: Callable[[*Ts], object], *args: *Ts, name: str) -> Task:
        """Run ``function(*args)`` in a new daemon task."""
        task = Task(name, self.event(), self.wait)
        self._start(partial(self._run, task, function, args), name)
        return task

    def sleep(self, seconds: float) -> None:
        """Wait for ``seconds`` while other tasks run."""
        self._yielding(self._sleep, seconds)

    def offload(self, function: Callable[[*Ts], object], *args: *Ts) -> tuple[bool, Any]:
        """Run ``function(*args)`` off the hub.

        Returns ``(True, result)`` or ``(False, exception)``.
        """
        return self._yielding(self._offload, partial(capture_outcome, function, args))

    def wait_readable(self, sock: HasFileno, timeout: float) -> bool:
        """Return whether ``sock`` becomes readable within ``timeout`` seconds."""
        return self._yielding(self._wait_io, sock, timeout, False)

    def wait_writable(self, sock: HasFileno, timeout: float) -> bool:
        """Return whether ``sock`` becomes writable within ``timeout`` seconds."""
        return self._yielding(self._wait_io, sock, timeout, True)

    def wait(self, event: IEvent, timeout: float | None = None) -> bool:
        """Wait for ``event`` and return ``True``, or ``False`` after ``timeout`` seconds."""
        return self._yielding(event.wait, timeout)

    def call_blocking(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call foreign code that waits without the backend. The call is not measured as a step."""
        return self._yielding(partial(function, *args, **kwargs))

    def import_module(self, module: str) -> ModuleType:
        """Import and return a module whose import would take too long for one step."""
        return importlib.import_module(module)

    def close(self) -> None:
        """Stop the native helper threads."""

    def event(self) -> IEvent:
        """Return a new event of this backend."""
        raise NotImplementedError

    def lock(self) -> ILock:
        """Return a new lock of this backend."""
        return CooperativeLock(self._lock(), self.call_blocking)

    def selector(self) -> BaseSelector:
        """Return a new selector that yields to the hub while it waits."""
        raise NotImplementedError

    def native_ident(self) -> int:
        """Return the current OS thread's key in ``sys._current_frames``, or 0 without a hub."""
        return 0

    def context_getter(self) -> Callable[[], object]:
        """Return the function that returns the current greenlet, or the thread's ident."""
        return threading.get_ident

    def frame_reader(self) -> Callable[[object], FrameType | None]:
        """Return a function that returns a context's innermost frame at this moment.

        That function returns ``None`` if the context has ended or, with a hub, is running now.
        """
        frames = current_frames()

        def frame_of(context: object) -> FrameType | None:
            return frames.get(context) if isinstance(context, int) else None

        return frame_of

    def start_native_thread(self, function: Callable[..., object], *args: object) -> bool:
        """If there is a hub, run ``function(sleep, *args)`` in an unpatched daemon thread."""
        del function, args
        return False

    def timer(
        self, seconds: float, function: Callable[[], object], *, once: bool = False
    ) -> Callable[[], object] | None:
        """Make the hub call ``function()`` every ``seconds`` seconds; do nothing without a hub."""
        del seconds, function, once
        return None

    def _tick(self, function: Callable[[], object]) -> bool:
        """Call ``function`` for a timer and return ``True``; in a forked child, return ``False``.

        A forked child has copies of the timers, and must not call their functions.
        """
        if self.forked():
            return False
        function()
        return True

    def _lock(self) -> RuntimeLock:
        raise NotImplementedError

    def _start(self, run: Callable[[], None], name: str) -> None:
        raise NotImplementedError

    def _sleep(self, seconds: float) -> None:
        raise NotImplementedError

    def _offload(self, job: Callable[[], tuple[bool, Any]]) -> tuple[bool, Any]:
        raise NotImplementedError

    def _wait_io(self, sock: HasFileno, timeout: float, write: bool) -> bool:
        raise NotImplementedError

    def _yielding(self, wait: Callable[[*Ts], R], *args: *Ts) -> R:
        if fork.epoch() != self._epoch:
            raise ForkedChildError
        start = _step_start.get()
        if start is not None:
            task = self._task.get()
            task.running_since = None
            self.steps.end(start, task.name)
            # Foreign code that runs during the wait may call the backend.
            # Such a call must not end a step, because this step has ended.
            _step_start.set(None)
        try:
            return wait(*args)
        finally:
            if start is not None:
                _step_start.set(self.steps.begin())
                task.running_since = time.monotonic()
            if fork.epoch() != self._epoch:
                raise ForkedChildError

    def _run(self, task: Task, function: Callable[[*Ts], object], args: tuple[*Ts]) -> None:
        self._task.set(task)
        task.running_since = time.monotonic()
        _step_start.set(self.steps.begin())
        try:
            function(*args)
        except (ForkedChildError, InterpreterShutdownError):
            return  # a copy of the task in a forked child, or the interpreter is shutting down
        except Exception:
            logger.exception("z4j: task %s failed; please report this bug of z4j-bare", task.name)
        finally:
            if not self.forked():
                start = _step_start.get()
                if start is not None:
                    self.steps.end(start, task.name)
                task.running_since = None
                task.mark_ended()


def current_frames() -> dict[int, FrameType]:
    """Return ``sys._current_frames()`` without a garbage collection during the call.

    CPython 3.11 holds a lock of the interpreter during the call. Before the fix of gh-106883, a
    collection during the call could make the process hang.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()  # noqa: SLF001
    finally:
        if enabled:
            gc.enable()


def suspended_frame(context: object) -> FrameType | None:
    """Return the innermost frame of a suspended greenlet; ``None`` if it runs or has ended."""
    frame: FrameType | None = getattr(context, "gr_frame", None)
    return frame


def capture_outcome(function: Callable[[*Ts], object], args: tuple[*Ts]) -> tuple[bool, Any]:
    """Call ``function(*args)``; return ``(True, result)`` or ``(False, exception)``.

    An exception must not leave an offloaded call, because gevent would print its traceback and
    eventlet would raise it in the hub.
    """
    try:
        return True, function(*args)
    except Exception as error:
        return False, error
