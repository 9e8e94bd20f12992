"""A log of task runs that the tasks write themselves, independently of the agent."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: Outcome of a run that did not raise.
RETURNED = "returned"


@dataclass(frozen=True)
class Run:
    """One run of a task.

    ``ended`` is a POSIX time in seconds. ``outcome`` is ``"returned"`` or the exception's class.
    """

    task_id: str
    ended: float
    outcome: str


def path(home: Path) -> Path:
    """Return the path of the log in the directory of a demo run."""
    return home / "tasks.jsonl"


def write(home: Path, task_id: str, outcome: str) -> None:
    """Append one run. A single ``write`` keeps the lines of several processes apart."""
    line = json.dumps({"task_id": task_id, "ended": time.time(), "outcome": outcome}) + "\n"
    descriptor = os.open(path(home), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class TaskLog:
    """Reads the log. Each call reads only the lines that were appended since the previous call."""

    def __init__(self, home: Path) -> None:
        self._path = path(home)
        self._offset = 0
        self._runs: dict[str, list[Run]] = {}

    def runs(self, task_id: str) -> list[Run]:
        """Return the completed runs of a task, oldest first."""
        self._read_new()
        return self._runs.get(task_id, [])

    def ended(self, task_id: str) -> bool:
        """Whether the task has ended: its last run did not end with ``Retry``."""
        runs = self.runs(task_id)
        return bool(runs) and runs[-1].outcome != "Retry"

    def last_end(self, task_id: str) -> float | None:
        """Return the POSIX time of the end of the last run; ``None`` if no run has ended."""
        runs = self.runs(task_id)
        return runs[-1].ended if runs else None

    def _read_new(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete = file.read().rpartition(b"\n")[0]
        if complete:
            self._offset += len(complete) + 1
        for line in complete.splitlines():
            run = Run(**json.loads(line))
            self._runs.setdefault(run.task_id, []).append(run)
