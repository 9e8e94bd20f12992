"""What the harness reads from a running worker: when tasks ended, and the lag of a ticker.

Each process writes both to memory-mapped files with one slot per sample. A write takes 1 us and
needs no lock, and nothing has to be flushed at exit. Times are ``CLOCK_MONOTONIC``, which all
processes share.
"""

import mmap
import os
import threading
import time
from itertools import count
from pathlib import Path
from struct import Struct

HOME = Path(os.environ["BENCH_HOME"])
TASKS = 1 << 17
TICKS = 1 << 17
INTERVAL = 0.005
#: Seconds between checks whether the ticker is to start.
POLL_INTERVAL = 1.0

_end = Struct("d")
_tick = Struct("dd")


class SampleFile:
    """A memory-mapped file of fixed-size samples, each written once."""

    def __init__(self, name, sample, length):
        self._sample = sample
        self._length = length
        self._next = count()
        path = HOME / f"{name}.{os.getpid()}"
        with path.open("wb+") as file:
            file.truncate(sample.size * length)
            self._map = mmap.mmap(file.fileno(), sample.size * length)

    def write(self, *values):
        slot = next(self._next)
        if slot < self._length:
            self._sample.pack_into(self._map, slot * self._sample.size, *values)


_ends = {}


def ended():
    """Record that a task has ended now; each prefork child has a file of its own."""
    now = time.monotonic()
    pid = os.getpid()
    samples = _ends.get(pid)
    if samples is None:
        samples = _ends.setdefault(pid, SampleFile("ends", _end, TASKS))
    samples.write(now)


def ready(**_signal):
    """Signal the harness that the worker consumes tasks."""
    (HOME / "ready").touch()


def start_ticker(**_signal):
    """Start the ticker when the harness asks for it.

    The ticker is a greenlet if threads are patched, else a thread.
    """
    threading.Thread(target=_run_ticker, daemon=True, name="bench-ticker").start()


def _run_ticker():
    while not (HOME / "tick").exists():
        time.sleep(POLL_INTERVAL)
    samples = SampleFile("ticks", _tick, TICKS)
    while True:
        due = time.monotonic() + INTERVAL
        time.sleep(INTERVAL)
        now = time.monotonic()
        samples.write(now, now - due)
