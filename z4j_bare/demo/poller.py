"""An onlooker, who notes when the brain first shows each task as finished."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

import requests

from z4j_bare.demo.process import HarnessError

if TYPE_CHECKING:
    from types import TracebackType

    from z4j_bare.demo.rest import BrainApi, Row

TERMINAL = frozenset({"success", "failure", "revoked"})
_INTERVAL = 0.1
_SHARE = (
    2  # a pause lasts at least this many times as long as the poll before it, to spare the brain
)


class BrainPoller:
    """Polls the project's task list in a thread of its own, from ``__enter__`` to ``__exit__``.

    ``brain`` is a session for this thread alone. Polls that fail are left out; what they missed shows in the next one.
    """

    def __init__(self, brain: BrainApi, project: str) -> None:
        self._brain = brain
        self._project = project
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-watch", daemon=True)
        self.rows: dict[str, Row] = {}
        self.first_finished: dict[str, float] = {}

    def state(self, task_id: str) -> str | None:
        """Return the task's state at the last poll, ``None`` when the brain had no row of it."""
        row = self.rows.get(task_id)
        return row["state"] if row else None

    def _run(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            began = time.monotonic()
            try:
                self._poll()
            except (HarnessError, requests.RequestException):
                pass
            pause = max(_INTERVAL, _SHARE * (time.monotonic() - began))

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._brain.close()
