"""Measures the lag of the hub, and finds the code that blocks the hub.

A timer of the hub measures how late the hub calls it. When the timer is overdue by a second, a
native thread samples the stack of the hub's thread, to find the code that does not yield. The
native thread wakes every other second, does not log and takes no locks, so tasks are not slower.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.interfaces import IEvent

logger = logging.getLogger("z4j.runtime.monitoring.hub_lag")

#: Seconds between two samples of the lag on a hub.
#: There are 10 samples per heartbeat, and each takes 0.2 ms of CPU.
TICK = 1.0

#: Seconds between two samples of the lag without a hub. A sample wakes a thread, which takes 0.1 ms
#: of CPU. The lag is then only the time that this thread waits for the interpreter.
TICK_OF_THREADS = 2.0

#: Lag in seconds at which the stack of the hub's thread is sampled.
BLOCKED_AFTER = 1.0

#: Seconds between two samples of the stack while the hub stays blocked.
STACK_SAMPLE_INTERVAL = 0.25

#: Minimum seconds between two warnings about a blocked hub.
WARN_INTERVAL = 60.0

#: Maximum number of stored samples.
#: A heartbeat removes the samples, but without a session there is no heartbeat.
MAX_SAMPLES = 10_000


class HubLagMonitor:
    """Collects samples of the lag, and the position of the code that blocked the hub longest."""

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._samples: list[float] = []
        self._interval = TICK
        self._due = 0.0
        #: The longest observed lag in seconds, and the position of the code that caused it.
        self._longest: tuple[float, str] = (0.0, "")
        self._warned_at = float("-inf")
        self._hub_thread = 0
        self._wakeup = backend.event()
        self._blocked_for = 0.0

    def run(self, stop_event: IEvent) -> None:
        """Take samples until ``stop_event`` is set and :meth:`wake` is called."""
        self._hub_thread = self._backend.native_ident()
        self._backend.start_native_thread(self._watch, stop_event)
        cancel = self._backend.timer(TICK, self._tick)
        self._interval = TICK if cancel else TICK_OF_THREADS
        self._due = self._backend.now() + self._interval
        try:
            while not stop_event.is_set():
                self._backend.wait(self._wakeup, None if cancel else self._interval)
                self._wakeup.clear()
                if not cancel:
                    self._tick()
                if self._blocked_for:
                    self._warn_blocked(self._blocked_for)
        finally:
            if cancel:
                cancel()

    def wake(self) -> None:
        """Make the loop check its stop event. Never waits."""
        self._wakeup.set()

    def drain(self) -> tuple[float, float, str]:
        """Return the lag since the last call: p99 and maximum in seconds, and the blocking code.

        The third item is empty if no stack was sampled.
        """
        samples, self._samples = sorted(self._samples), []
        blocking_code, self._longest = self._longest[1], (0.0, "")
        if not samples:
            return 0.0, 0.0, blocking_code
        p99 = samples[min(len(samples) - 1, int(len(samples) * 0.99))]
        return p99, samples[-1], blocking_code

    def _tick(self) -> None:
        """Take a sample. Must not log, because a timer of the hub calls this method."""
        now = self._backend.now()
        lag, self._due = now - self._due, now + self._interval
        if len(self._samples) < MAX_SAMPLES:
            self._samples.append(max(0.0, lag))
        if lag > BLOCKED_AFTER:
            self._blocked_for = lag
            self._wakeup.set()

    def _warn_blocked(self, lag: float) -> None:
        now, self._blocked_for = self._backend.now(), 0.0
        if self._longest[1] and now - self._warned_at > WARN_INTERVAL:
            self._warned_at = now
            logger.warning(
                "z4j: the hub was blocked for %.1f s, so no task could run; the blocking code: %s",
                lag,
                self._longest[1],
            )

    def _watch(self, sleep: Callable[[float], object], stop_event: IEvent) -> None:
        """Sample the stack of a blocked hub. This native thread must not log or take a lock."""
        delay = TICK
        while not stop_event.is_set():
            sleep(delay)
            lag = self._backend.now() - self._due
            if lag > BLOCKED_AFTER and lag > self._longest[0]:
                frame = sys._current_frames().get(self._hub_thread)  # noqa: SLF001
                if frame is not None:
                    self._longest = (lag, describe(frame))
            delay = next_check(lag)


def next_check(lag: float) -> float:
    """Return the seconds until the native thread checks the hub again.

    The delay ends just after the lag would exceed ``BLOCKED_AFTER`` if no further tick came. While
    the hub is on time, the thread therefore wakes only after every other tick. ``lag`` is negative
    before a tick is due.
    """
    if lag >= BLOCKED_AFTER:
        return STACK_SAMPLE_INTERVAL
    return BLOCKED_AFTER - lag + STACK_SAMPLE_INTERVAL / 10


def describe(frame: FrameType | None) -> str:
    """Return the innermost position in a stack outside the standard library, and the Celery task.

    An example is ``shop.pay[id] at shop/tasks.py:12 in charge``.
    """
    position, task = "", ""
    while frame is not None:
        code = frame.f_code
        if not position and not _in_standard_library(code.co_filename):
            position = f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        if code.co_name == "trace_task" and frame.f_globals.get("__name__") == "celery.app.trace":
            task = f"{frame.f_locals.get('name', 'a task')}[{frame.f_locals.get('uuid', '?')}] at "
            break
        frame = frame.f_back
    return f"{task}{position or 'the standard library'}"


def _in_standard_library(path: str) -> bool:
    return path.startswith("<") or (
        path.startswith(sys.base_prefix) and "site-packages" not in path
    )
