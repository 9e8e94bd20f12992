"""CPU time and memory of a worker with all its processes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Reading:
    """One reading: monotonic time, CPU seconds since the worker's start, resident bytes."""

    at: float
    cpu: float
    rss: int


class Meter:
    """Reads the CPU time and memory of a worker and its running children.

    It uses the CPU clock of each process, which counts nanoseconds and includes ended threads;
    ``/proc/PID/stat`` counts in hundredths of a second.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    def read(self) -> Reading:
        """Return the current reading."""
        family = [self._process, *self._process.children(recursive=True)]
        at = time.monotonic()
        return Reading(
            at, sum(_cpu(each.pid) for each in family), sum(_rss(each) for each in family)
        )


def _cpu(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << 3) | 2)  # Linux: the CPU clock of another process
    except OSError:
        return 0.0


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
