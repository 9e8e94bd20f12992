"""Measures the steps of the agent's tasks and reports steps that block the hub for too long.

The CPU time of a step is the CPU time of its thread, minus two parts that do not depend on the
step. The garbage collector runs in the task that allocates when a collection is due. greenlet's
cleanup runs in the greenlet that runs first after the end of a native thread.

The blocked time of a step is the rest of its wall time, minus the time in which threads of this
process were ready to run but waited for a processor, and minus the time in which the hypervisor
withheld a processor from this machine.

Neither time is exact on a busy machine. A virtual processor may be paused, or share its core, while
CPU time is counted. A native thread may lose the processor while it holds the interpreter's lock,
and end before its waiting time is read. While the disk is slow, an allocation of memory can wait
for another thread of the process that writes to a mapped file. Therefore a step that is only
slightly too long is reported only if it occurs repeatedly in the same place.
"""

import ctypes
import gc
import os
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import greenlet
from greenlet import _greenlet

from z4j_bare.concurrency.base import StepTimer

#: Maximum seconds of a step. The design target is 0.002.
LIMIT = 0.010

#: Seconds of CPU time from which a step is reported at its first occurrence.
IMMEDIATE_CPU = 0.025

#: Blocked time in seconds from which a step is reported at its first occurrence. A wait for a peer,
#: a lock or a name server takes longer. A slow disk once blocked a step for 0.5 s.
IMMEDIATE_BLOCKED = 2.0

#: Number of occurrences in one place from which a shorter step is reported.
REPEATS = 3

#: Seconds between two scans for new threads.
SCAN_INTERVAL = 0.05

#: Fields of ``schedstat``: nanoseconds on a processor, nanoseconds waiting for one, time slices.
FIELDS = 3

#: Position of the stolen time in the first line of ``/proc/stat``, which counts in clock ticks.
STEAL_FIELD = 8

#: Ticks of C's ``clock()`` per second, the same on every POSIX system.
CLOCKS_PER_SEC = 1_000_000

#: ``pread`` that keeps the interpreter's lock. ``os.pread`` would release it to the native threads.
_pread = ctypes.PyDLL(None).pread


class Mark(NamedTuple):
    """A point in time, in seconds: wall time, CPU time of this thread, queued and stolen time.

    The queued time is the sum of the times in which threads waited for a processor. The stolen time
    is the sum of the times in which the hypervisor withheld a processor.
    """

    wall: float
    cpu: float
    queued: float
    stolen: float


class StepClock:
    """Measures CPU time and blocked time, without garbage collection and greenlet's cleanup.

    The stolen time is read with the list of threads, because reading it takes longer than the rest.
    """

    def __init__(self):
        self._collected = 0.0
        self._collection_started = 0.0
        self._files = {}
        self._waits = {}
        self._scanned_at = 0.0
        self._stolen = 0.0
        self._buffer = ctypes.create_string_buffer(100)
        gc.callbacks.append(self._on_collection)

    def now(self):
        """Return a mark for :meth:`since`."""
        if time.perf_counter() - self._scanned_at > SCAN_INTERVAL:
            self._scan()
        return self._mark()

    def since(self, mark):
        """Return the seconds of CPU time and of blocked time since ``mark``."""
        now = self._mark()
        wall, cpu = now.wall - mark.wall, now.cpu - mark.cpu
        if wall > LIMIT:
            self._scan()  # includes threads that started since; all their waiting is in this time
            now = self._mark()
        waited = now.queued - mark.queued + now.stolen - mark.stolen
        return cpu, max(0.0, wall - cpu - waited)

    def close(self):
        gc.callbacks.remove(self._on_collection)
        for thread in list(self._files):
            self._close_file(thread)

    def _close_file(self, thread):
        with suppress(OSError):
            os.close(self._files.pop(thread))

    def _mark(self):
        queued = self._queued()
        cleanup = _greenlet.get_clocks_used_doing_optional_cleanup() or 0
        excluded = self._collected + cleanup / CLOCKS_PER_SEC
        wall, cpu = time.perf_counter() - excluded, time.thread_time() - excluded
        return Mark(wall, cpu, queued, self._stolen)

    def _scan(self):
        for thread in set(os.listdir("/proc/self/task")) - self._files.keys():
            with suppress(OSError):  # the thread has ended
                self._files[thread] = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
        with open("/proc/stat", encoding="ascii") as file:
            self._stolen = int(file.readline().split()[STEAL_FIELD]) / os.sysconf("SC_CLK_TCK")
        self._scanned_at = time.perf_counter()

    def _queued(self):
        for thread, file in list(self._files.items()):
            length = _pread(file, self._buffer, 99, ctypes.c_long(0))
            if length <= 0:  # the thread has ended; its waiting time still counts
                self._close_file(thread)
            elif len(fields := self._buffer.raw[:length].split()) == FIELDS:
                self._waits[thread] = int(fields[1])
            else:  # other code closed the descriptor, and its number now belongs to another file
                del self._files[thread]
        return sum(self._waits.values()) / 1e9

    def _on_collection(self, phase, _info):
        if phase == "start":
            self._collection_started = time.perf_counter()
        else:
            self._collected += time.perf_counter() - self._collection_started


class StepLimitChecker:
    """Checks the steps on this thread's hub; ``violations`` describes each step over the limit.

    Steps are measured in two ways. The backend's own steps end where the backend waits, which
    detects a wait that bypasses the backend. Switches between greenlets also show what foreign code
    does inside a wait, such as a TLS handshake or a resolver.
    """

    def __init__(self):
        self.violations = []
        self.longest = 0.0
        self._occurrences = Counter()
        self._clock = StepClock()
        self._tasks = {}
        self._since = None
        self._pid = os.getpid()
        self._previous_trace = greenlet.settrace(self._on_switch)

    def watch(self, backend):
        """Check the tasks of ``backend`` from now on; return it."""
        backend.steps = CheckedStepTimer(self)
        return backend

    def stop(self):
        greenlet.settrace(self._previous_trace)
        self._clock.close()

    def on_step_start(self):
        """Start a step, because a task of the agent runs in this greenlet; return its mark."""
        now = self._clock.now()
        current = greenlet.getcurrent()
        if current not in self._tasks:
            self._tasks[current] = "a new task"
            self._since = now
        return now

    def on_step_end(self, began, task):
        """End a step, because the task waits or has ended."""
        self._tasks[greenlet.getcurrent()] = task
        self._check(began, task, "between two waits", sys._getframe(2))

    def _on_switch(self, _event, args):
        origin, target = args
        if origin in self._tasks:
            self._check(self._since, self._tasks[origin], "between two switches", origin.gr_frame)
            if origin.dead:
                del self._tasks[origin]
        if target in self._tasks:
            self._since = self._clock.now()

    def _check(self, began, task, kind, frame):
        cpu, blocked = self._clock.since(began)
        self.longest = max(self.longest, cpu)
        if cpu + blocked <= LIMIT or os.getpid() != self._pid:
            return
        stack = traceback.format_stack(frame, limit=12) if frame else ["its end"]
        place = (task, *stack)
        self._occurrences[place] += 1
        repeated = self._occurrences[place] >= REPEATS
        if cpu > IMMEDIATE_CPU or blocked > IMMEDIATE_BLOCKED or repeated:
            times = f"{cpu * 1000:.1f} ms of CPU and {blocked * 1000:.1f} ms blocked"
            self.violations.append(f"{task}: {times} {kind}, up to\n{''.join(stack)}")


class CheckedStepTimer(StepTimer):
    """The steps of one backend, reported to a checker."""

    def __init__(self, checker):
        super().__init__()
        self._checker = checker

    def begin(self):
        return super().begin(), self._checker.on_step_start()

    def end(self, began, task):
        super().end(began[0], task)
        self._checker.on_step_end(began[1], task)
