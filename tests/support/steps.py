"""The judge of steps: who of ours held the hub for longer than he may, told apart from who was made to wait for it.

What a step computes is its thread's CPU time without the garbage collector's, which takes from whoever allocated last, and
without greenlet's, which looks through the heap for what an ended native thread has left, in whoever runs then. What it
waited through in the kernel is the rest of its wall time without the time for which threads of this process were ready to
run and another process had the processor. Neither is exact on a busy machine: a virtual processor may stand still or share its
core while CPU time passes, and a native thread that is off the processor with the interpreter's lock makes us wait, and may be
gone before anybody asks it. So what is a little too long counts when it comes again in the same place.
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

#: Seconds that a step of ours may take (design, rule 5, wants 0.002).
LIMIT = 0.010

#: Seconds of CPU and of waiting in the kernel that count at once, and how often shorter ones have to be seen in one place.
SURE_CPU = 0.025
SURE = 0.500
OFTEN = 3

#: Seconds between two looks for new threads.
EVERY = 0.05

#: What the kernel tells of a thread: nanoseconds on a processor, nanoseconds waiting for one, turns.
FIELDS = 3

#: What C's ``clock()`` counts in a second, on every POSIX system.
CLOCKS = 1_000_000

#: ``pread`` that keeps the interpreter's lock: ``os.pread`` would offer it to the native threads, which return it late.
_pread = ctypes.PyDLL(None).pread


class Mark(NamedTuple):
    """A moment: seconds of the wall clock, of this thread's CPU, and for which our threads were kept waiting for one."""

    wall: float
    cpu: float
    queued: float


class Clock:
    """Tells time with the collectors' taken off."""

    def __init__(self):
        self._collected = 0.0
        self._collecting = 0.0
        self._files = {}
        self._waits = {}
        self._looked_at = 0.0
        self._buffer = ctypes.create_string_buffer(100)
        gc.callbacks.append(self._collector)

    def now(self):
        """Return a mark, for :meth:`since`."""
        if time.perf_counter() - self._looked_at > EVERY:
            self._look()
        return self._mark()

    def since(self, mark):
        """Return the CPU seconds since ``mark``, and the seconds that were spent in waiting."""
        now = self._mark()
        wall, cpu = now.wall - mark.wall, now.cpu - mark.cpu
        if wall > LIMIT:
            self._look()  # a thread that began meanwhile was kept waiting within this time only
            now = self._mark()
        return cpu, max(0.0, wall - cpu - (now.queued - mark.queued))

    def close(self):
        gc.callbacks.remove(self._collector)
        for thread in list(self._files):
            self._forget(thread)

    def _forget(self, thread):
        with suppress(OSError):
            os.close(self._files.pop(thread))

    def _mark(self):
        queued = self._queued()
        aside = self._collected + (_greenlet.get_clocks_used_doing_optional_cleanup() or 0) / CLOCKS
        return Mark(time.perf_counter() - aside, time.thread_time() - aside, queued)

    def _look(self):
        for thread in set(os.listdir("/proc/self/task")) - self._files.keys():
            with suppress(OSError):  # it has ended already
                self._files[thread] = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
        self._looked_at = time.perf_counter()

    def _queued(self):
        for thread, file in list(self._files.items()):
            length = _pread(file, self._buffer, 99, ctypes.c_long(0))
            if length <= 0:  # it has ended; what it waited stands
                self._forget(thread)
            elif len(fields := self._buffer.raw[:length].split()) == FIELDS:
                self._waits[thread] = int(fields[1])
            else:  # somebody closed our descriptor, and the number is another file's
                del self._files[thread]
        return sum(self._waits.values()) / 1e9

    def _collector(self, phase, _info):
        if phase == "start":
            self._collecting = time.perf_counter()
        else:
            self._collected += time.perf_counter() - self._collecting


class Judge:
    """Watches the hub of this thread. ``guilty`` holds a text for each step of ours that took too long.

    Two clocks run. The backends' own ends a step where the backend waits, and tells whether a wait of ours evades it. The other
    follows every switch of greenlets, and sees what foreign code does inside a wait: a handshake, a resolver.
    """

    def __init__(self):
        self.guilty = []
        self.longest = 0.0
        self._doubts = Counter()
        self._clock = Clock()
        self._ours = {}
        self._since = None
        self._pid = os.getpid()
        self._before = greenlet.settrace(self._switched)

    def watch(self, backend):
        """Judge the tasks of ``backend`` from now on; return it."""
        backend.steps = Watched(self)
        return backend

    def stop(self):
        greenlet.settrace(self._before)
        self._clock.close()

    def woke(self):
        """A task of ours goes on in the current greenlet; return the mark for :meth:`rested`."""
        now = self._clock.now()
        current = greenlet.getcurrent()
        if current not in self._ours:
            self._ours[current] = "a new task"
            self._since = now
        return now

    def rested(self, began, task):
        """It waits, or has ended."""
        self._ours[greenlet.getcurrent()] = task
        self._consider(began, task, "between two waits", sys._getframe(2))

    def _switched(self, _event, args):
        origin, target = args
        if origin in self._ours:
            self._consider(self._since, self._ours[origin], "between two switches", origin.gr_frame)
            if origin.dead:
                del self._ours[origin]
        if target in self._ours:
            self._since = self._clock.now()

    def _consider(self, began, task, kind, frame):
        cpu, waited = self._clock.since(began)
        self.longest = max(self.longest, cpu)
        if cpu + waited <= LIMIT or os.getpid() != self._pid:
            return
        stack = traceback.format_stack(frame, limit=12) if frame else ["its end"]
        self._doubts[task, *stack] += 1
        if cpu > SURE_CPU or waited > SURE or self._doubts[task, *stack] >= OFTEN:
            figures = f"{cpu * 1000:.1f} ms of CPU and {waited * 1000:.1f} ms of waiting"
            self.guilty.append(f"{task}: {figures} {kind}, up to\n{''.join(stack)}")


class Watched(StepTimer):
    """The steps of one backend, told to a judge."""

    def __init__(self, judge):
        super().__init__()
        self._judge = judge

    def begin(self):
        return super().begin(), self._judge.woke()

    def end(self, began, task):
        super().end(began[0], task)
        self._judge.rested(began[1], task)
