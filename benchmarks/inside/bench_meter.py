"""What the harness reads from a worker while it runs: when tasks ended, and how late a ticker woke.

Both are files mapped into memory, one of each per process, a slot per sample: a microsecond to write, no lock,
nothing to flush at exit. Times are ``CLOCK_MONOTONIC``, which all processes of a machine share.
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
#: Seconds between two looks whether the ticker shall begin.
LOOK = 1.0

_end = Struct("d")
_tick = Struct("dd")


class Tape:
    """A file of fixed-size samples, each written once."""

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
    """Note that a task has ended now; a prefork child has a tape of its own."""
    now = time.monotonic()
    pid = os.getpid()
    tape = _ends.get(pid)
    if tape is None:
        tape = _ends.setdefault(pid, Tape("ends", _end, TASKS))
    tape.write(now)


def ready(**_signal):
    """Tell the harness that the worker consumes."""
    (HOME / "ready").touch()


def start_ticker(**_signal):
    """Let the ticker begin when it is asked to: a greenlet where threads are patched, else a thread."""
    threading.Thread(target=_run_ticker, daemon=True, name="bench-ticker").start()


def _run_ticker():
    while not (HOME / "tick").exists():
        time.sleep(LOOK)
    tape = Tape("ticks", _tick, TICKS)
    while True:
        due = time.monotonic() + INTERVAL
        time.sleep(INTERVAL)
        now = time.monotonic()
        tape.write(now, now - due)
