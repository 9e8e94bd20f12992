"""CPU time and memory of a worker with all its processes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


def reserve_processor() -> int | None:
    """Reserve the last processor for the workers and return its number.

    The brain, the broker and the benchmark itself use the other processors. Return ``None`` if
    there is only one processor.
    """
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        return None
    # All other processes inherit this set. Each worker then pins itself to the reserved processor.
    os.sched_setaffinity(0, processors[:-1])
    return processors[-1]


@dataclass(frozen=True)
class Reading:
    """One reading: monotonic time, CPU seconds since the worker's start, resident bytes."""

    at: float
    cpu: float
    rss: int


class Meter:
    """Reads the CPU time and memory of a worker and its running children.

    The CPU clock of each process counts nanoseconds and includes ended threads.
    ``/proc/PID/stat`` is not used, because it counts in hundredths of a second.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def read(self) -> Reading:
        """Return the current reading."""
        family, at = self._family(), time.monotonic()
        return Reading(
            at, sum(_cpu(each.pid) for each in family), sum(_rss(each) for each in family)
        )

    def pss(self) -> int:
        """Return the proportional set size of all processes in bytes.

        A page that several processes share counts once, divided among them. The kernel computes the
        size at each call, which takes milliseconds.
        """
        return sum(_pss(each.pid) for each in self._family())

    def _family(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


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


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
