"""Polls the brain's task list and records when each task first appears in a final state."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

import requests

from z4j_bare.demo.process import HarnessError

if TYPE_CHECKING:
    from z4j_bare.demo.rest import BrainApi, Row

#: Final states of a task.
TERMINAL = frozenset({"success", "failure", "revoked"})

#: Minimum pause between two polls, in seconds.
_INTERVAL = 0.1

#: Minimum pause as a multiple of the duration of the previous poll, to limit the brain's load.
_PAUSE_FACTOR = 2


class BrainPoller:
    """Polls the tasks of a project in a thread between ``__enter__`` and ``__exit__``.

    The poller ignores a failed poll, because the next poll returns all tasks again.

    :param brain: a REST session that no other thread uses.
    """

    def __init__(self, brain: BrainApi, project: str) -> None:
        self._brain = brain
        self._project = project
        self._stop_event = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-poller", daemon=True)
        self.rows: dict[str, Row] = {}
        self.first_finished: dict[str, float] = {}

    def state(self, task_id: str) -> str | None:
        """Return the task's state in the latest poll; ``None`` if the brain lists no such task."""
        row = self.rows.get(task_id)
        return row["state"] if row else None

    def _run(self) -> None:
        pause = 0.0
        while not self._stop_event.wait(pause):
            began = time.monotonic()
            try:
                self._poll()
            except (HarnessError, requests.RequestException):
                pass
            pause = max(_INTERVAL, _PAUSE_FACTOR * (time.monotonic() - began))

    def _poll(self) -> None:
        rows = {row["task_id"]: row for row in self._brain.tasks(self._project)}
        now = time.time()
        for task_id, row in rows.items():
            if row["state"] in TERMINAL:
                self.first_finished.setdefault(task_id, now)
        self.rows = rows

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._stop_event.set()
        self._thread.join()
        self._brain.close()
