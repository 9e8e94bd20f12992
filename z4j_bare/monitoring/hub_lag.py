"""How late the hub is, and who made it so.

A timer of the hub's measures how much later than asked it is called. While it is overdue by a second, a native thread
looks at the stack of the hub's thread: that is the code which does not yield. It costs a native wake-up every other second
and nothing per switch or per task; it only reads, and neither logs nor locks.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.hub")

#: Seconds between ticks: 10 samples per heartbeat of a hub, each for 0.2 ms of an idle worker's, and 5 where there is none.
#: There each wakes a thread, which costs 0.1 ms, and tells only how long that waits for the interpreter.
TICK = 1.0
TICK_OF_THREADS = 2.0

#: Seconds of lateness at which the culprit is looked for, and between two looks at one that goes on.
BLOCKED = 1.0
LOOK = 0.25

#: Seconds between two warnings.
WARN_EVERY = 60.0

#: Samples kept between two reports; a heartbeat that never comes must not grow them.
MOST_SAMPLES = 10_000


class HubLagMonitor:
    """The ticker, its samples since the last report, and the culprit of the longest stall."""

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._samples: list[float] = []
        self._every = TICK
        self._due = 0.0
        self._seen: tuple[float, str] = (0.0, "")
        self._warned_at = float("-inf")
        self._stack_of = 0
        self._alarm = backend.event()
        self._stall = 0.0

    def run(self, stop_event: Any) -> None:
        """Tick until ``stop_event`` is set, and :meth:`wake` called."""
        self._stack_of = self._backend.native_ident()
        self._backend.start_native_thread(self._watch, stop_event)
        end = self._backend.timer(TICK, self._tick)
        self._every = TICK if end else TICK_OF_THREADS
        self._due = self._backend.now() + self._every
        try:
            while not stop_event.is_set():
                self._backend.wait(self._alarm, None if end else self._every)
                self._alarm.clear()
                if not end:
                    self._tick()
                if self._stall:
                    self._blame(self._stall)
        finally:
            if end:
                end()

    def wake(self) -> None:
        """Let the loop look at ``stop_event``; waits for nothing."""
        self._alarm.set()

    def _tick(self) -> None:
        """Take a sample; on the hub, where nothing may log."""
        now = self._backend.now()
        late, self._due = now - self._due, now + self._every
        if len(self._samples) < MOST_SAMPLES:
            self._samples.append(max(0.0, late))
        if late > BLOCKED:
            self._stall = late
            self._alarm.set()

    def take(self) -> tuple[float, float, str]:
        """Return p99 and maximum in seconds since the last call, and who blocked the hub longest, if anybody was seen."""
        samples, self._samples = sorted(self._samples), []
        culprit, self._seen = self._seen[1], (0.0, "")
        if not samples:
            return 0.0, 0.0, culprit
        return samples[min(len(samples) - 1, int(len(samples) * 0.99))], samples[-1], culprit

    def _blame(self, late: float) -> None:
        now, self._stall = self._backend.now(), 0.0
        if self._seen[1] and now - self._warned_at > WARN_EVERY:
            self._warned_at = now
            logger.warning("z4j: the hub stood still for %.1f s; it was in %s", late, self._seen[1])

    def _watch(self, sleep: Any, stop_event: Any) -> None:
        """Run in a native thread of its own: reads stacks and assigns, nothing else."""
        pause = TICK
        while not stop_event.is_set():
            sleep(pause)
            late = self._backend.now() - self._due
            if late > BLOCKED and late > self._seen[0]:
                frame = sys._current_frames().get(self._stack_of)  # noqa: SLF001 - no public equivalent
                if frame is not None:
                    self._seen = (late, describe(frame))
            pause = next_look(late)


def next_look(late: float) -> float:
    """Return the seconds until the watcher should look again: just after the hub, if it does not tick, is ``BLOCKED`` late.

    ``late`` is negative until the next tick is due. A hub on time is looked at after every other tick.
    """
    return LOOK if late >= BLOCKED else BLOCKED - late + LOOK / 10


def describe(frame: FrameType | None) -> str:
    """Return where a stack is, and the Celery task it belongs to: ``shop.pay[id] at shop/tasks.py:12 in charge``."""
    where, task = "", ""
    while frame is not None:
        code = frame.f_code
        if not where and not _ours_or_standard(code.co_filename):
            where = f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        if code.co_name == "trace_task" and frame.f_globals.get("__name__") == "celery.app.trace":
            task = f"{frame.f_locals.get('name', 'a task')}[{frame.f_locals.get('uuid', '?')}] at "
            break
        frame = frame.f_back
    return f"{task}{where or 'the standard library'}"


def _ours_or_standard(path: str) -> bool:
    return path.startswith("<") or (
        path.startswith(sys.base_prefix) and "site-packages" not in path
    )
