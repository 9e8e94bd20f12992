"""Measures the lag of the hub, and finds the code that blocks the hub.

A timer of the hub measures how late the hub calls it. When the timer is overdue by a second, a
native thread samples the stack of the hub's thread, to find the code that does not yield. Tasks do
not become slower, because the native thread wakes only every other second, does not log and takes
no locks.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any

from z4j_bare.monitoring.holds import Hold, HoldTable, Sample, place_of, take_sample

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.interfaces import IEvent

logger = logging.getLogger("z4j.runtime.monitoring.hub_lag")

#: Seconds between two samples of the lag on a hub.
#: There are 10 samples per heartbeat, and each takes 0.2 ms of CPU.
TICK = 1.0

#: Seconds between two samples of the lag without a hub. Each sample wakes a thread, which takes 0.1
#: ms of CPU. In threads mode the lag is the time that this thread waits for the interpreter lock.
TICK_OF_THREADS = 2.0

#: Lag in seconds at which the stack of the hub's thread is sampled.
BLOCKED_AFTER = 1.0

#: Seconds between two samples of the stack while the hub stays blocked.
STACK_SAMPLE_INTERVAL = 0.25

#: Minimum seconds between two warnings about a blocked hub.
WARN_INTERVAL = 60.0

#: Upper bounds of the histogram of lags, in seconds.
LAG_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

#: Number of lags of which the recent quantiles are calculated: five minutes on a hub.
RECENT_LAGS = 300

#: Maximum number of stack samples of one hold.
MAX_STACK_SAMPLES = 1000

#: Maximum number of stored samples.
#: Heartbeats empty the list, but without a session there are no heartbeats.
MAX_SAMPLES = 10_000


class LagHistory:
    """The distribution of the lag since the start, and the last lags."""

    def __init__(self) -> None:
        self._counts = [0] * (len(LAG_BOUNDS) + 1)
        self._total = 0.0
        self._longest = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_LAGS)

    def add(self, lag: float) -> None:
        """Add a lag in seconds."""
        self._counts[bisect_left(LAG_BOUNDS, lag)] += 1
        self._total += lag
        self._longest = max(self._longest, lag)
        self._recent.append(lag)

    def describe(self) -> dict[str, Any]:
        """Return quantiles in seconds and the histogram, as plain JSON types.

        The quantiles since the start are upper bounds, because they are calculated from the
        histogram.
        """
        recent = sorted(self._recent)
        number = sum(self._counts)
        bounds = (*LAG_BOUNDS, self._longest)

        def bound_of(part: float) -> float:
            seen = 0
            for bound, count in zip(bounds, self._counts, strict=True):
                seen += count
                if seen >= number * part:
                    return min(bound, self._longest)
            return self._longest

        return {
            "samples": number,
            "p50_seconds": bound_of(1 / 2),
            "p99_seconds": bound_of(99 / 100),
            "max_seconds": self._longest,
            "total_seconds": self._total,
            "histogram": {
                f"{bound:g}": count
                for bound, count in zip((*LAG_BOUNDS, inf), self._counts, strict=True)
            },
            "recent": {
                "samples": len(recent),
                "p50_seconds": recent[len(recent) // 2] if recent else 0.0,
                "p99_seconds": recent[int((len(recent) - 1) * 0.99)] if recent else 0.0,
                "max_seconds": recent[-1] if recent else 0.0,
            },
        }


class HubLagMonitor:
    """Collects samples of the lag, and the position of the code that blocked the hub longest.

    :param current_task: returns ``name[id]`` of the task that runs on the hub now; empty if no task
        runs. A native thread calls this function.
    """

    def __init__(self, backend: BaseConcurrency, current_task: Callable[[], str] = str) -> None:
        self.history = LagHistory()
        self.holds = HoldTable()
        self._current_task = current_task
        #: Samples of the present hold, and the holds that have ended.
        self._stacks: list[Sample] = []
        self._ended: list[Hold] = []
        self._backend = backend
        self._samples: list[float] = []
        self._interval = TICK
        self._due = 0.0
        #: The longest observed lag in seconds, and the position of the code that caused it.
        self._longest: tuple[float, str] = (0.0, "")
        self._warned_at = float("-inf")
        self._hub_thread = 0
        self._wakeup = backend.event()

    @property
    def hub_thread(self) -> int:
        """The key of the hub's thread in ``sys._current_frames``; 0 without a hub."""
        return self._hub_thread

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
                self._add_holds()
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
        """Take a sample. A timer of the hub calls this method, so it must not log."""
        now = self._backend.now()
        lag, self._due = now - self._due, now + self._interval
        lag = max(0.0, lag)
        if len(self._samples) < MAX_SAMPLES:
            self._samples.append(lag)
        self.history.add(lag)
        if lag > BLOCKED_AFTER:
            stacks, self._stacks = self._stacks, []
            self._ended.append(Hold(now - lag, now, stacks))
            self._wakeup.set()

    def _add_holds(self) -> None:
        while self._ended:
            hold = self._ended.pop()
            self.holds.add(hold)
            self._warn_blocked(hold.end - hold.start)

    def _warn_blocked(self, lag: float) -> None:
        now = self._backend.now()
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
            now = self._backend.now()
            lag = now - self._due
            if lag > BLOCKED_AFTER and len(self._stacks) < MAX_STACK_SAMPLES:
                sample = take_sample(now, self._hub_thread, self._current_task())
                if sample is not None:
                    self._stacks.append(sample)
                    if lag > self._longest[0]:
                        self._longest = (lag, describe(sample))
            delay = next_check(lag)


def next_check(lag: float) -> float:
    """Return the seconds until the native thread checks the hub again.

    If no tick comes, the delay ends just after the lag exceeds ``BLOCKED_AFTER``.
    Therefore, while the hub is on time, the thread wakes only after every other tick.
    ``lag`` is negative before a tick is due.
    """
    if lag >= BLOCKED_AFTER:
        return STACK_SAMPLE_INTERVAL
    return BLOCKED_AFTER - lag + STACK_SAMPLE_INTERVAL / 10


def describe(sample: Sample) -> str:
    """Return the running task and the innermost position in the user's code.

    An example is ``shop.pay[id] at shop/tasks.py:12 in charge``.
    """
    place = place_of(sample.stack)
    return f"{sample.task} at {place}" if sample.task else place
