"""The tasks' own record of when each of their runs ended: evidence that owes nothing to an agent."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RETURNED = "returned"


@dataclass(frozen=True)
class Run:
    """One run of one task: ``ended`` as a POSIX time, ``outcome`` ``"returned"`` or the exception's name."""

    task_id: str
    ended: float
    outcome: str


def path(home: Path) -> Path:
    """Return the journal of a run in ``home``."""
    return home / "journal.jsonl"


def write(home: Path, task_id: str, outcome: str) -> None:
    """Append one run, in one ``write`` to a file opened for appending: lines of processes do not mix."""
    line = json.dumps({"task_id": task_id, "ended": time.time(), "outcome": outcome}) + "\n"
    descriptor = os.open(path(home), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class TaskLog:
    """The script's side: the runs so far, per task id."""

    def __init__(self, home: Path) -> None:
        self._path = path(home)
        self._offset = 0
        self._runs: dict[str, list[Run]] = {}

    def runs(self, task_id: str) -> list[Run]:
        """Return the runs of one task that have ended by now, oldest first."""
        self._read_new()
        return self._runs.get(task_id, [])

    def ended(self, task_id: str) -> bool:
        """Whether it has ended for good: a run that ends in ``Retry`` is followed by another."""
        runs = self.runs(task_id)
        return bool(runs) and runs[-1].outcome != "Retry"

    def last_end(self, task_id: str) -> float | None:
        """Return when its last run ended, ``None`` when none has."""
        runs = self.runs(task_id)
        return runs[-1].ended if runs else None

    def _read_new(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        if whole:
            self._offset += len(whole) + 1
        for line in whole.splitlines():
            run = Run(**json.loads(line))
            self._runs.setdefault(run.task_id, []).append(run)
