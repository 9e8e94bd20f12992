"""Keeps the metrics that a process had at its end.

Without these metrics, ``z4j-bare metrics`` would show the process's last answer to a request. That
answer lacks the tasks that ended later.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency.fork import open_file
from z4j_bare.control import METRICS, safe_name
from z4j_bare.home import ensure_home

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.task_counts import TaskCounts
    from z4j_bare.monitoring.control_server import Response

logger = logging.getLogger("z4j.runtime.monitoring.last_metrics")

#: Seconds for which the file of an ended process is kept and its metrics are shown.
KEEP_SECONDS = 300.0

#: Version of the files' layout.
SCHEMA = 1

_PREFIX = "metrics-ended-"


class LastMetrics:
    """Writes the metrics of this process when its agent stops.

    :param adapter: the framework adapter's name.
    :param handlers: the handlers of the control server's requests, by request.
    """

    def __init__(
        self,
        adapter: str,
        handlers: Mapping[str, Callable[..., Response]],
        task_counts: TaskCounts,
        backend: BaseConcurrency,
    ) -> None:
        self._adapter = adapter
        self._answer = handlers[METRICS]
        self._task_counts = task_counts
        self._backend = backend

    def write(self) -> None:
        """Write the metrics if a task was counted. Never raises."""
        try:
            answer = self._answer() if self._task_counts.number_of_names() else {}
            if isinstance(
                answer, dict
            ):  # there is no task, or ``Z4J_INSPECT=0`` forbids the answer
                return
            text = "".join(answer)
            ok, error = self._backend.offload(_write, self._adapter, text)
        except Exception as caught:
            ok, error = False, caught
        if not ok:
            logger.info(
                "z4j: the last metrics of this process were not written: %s:"
                " `z4j-bare metrics` shows those of its last request",
                error,
            )


def read_last(home: Path, now: float) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield the last answer of each ended process, with the time of its end; remove old files.

    :param now: seconds since the epoch.
    """
    for path in home.glob(f"{_PREFIX}*.json"):
        try:
            document = json.loads(path.read_bytes())
            if document["schema"] == SCHEMA:
                yield float(document["at"]), dict(document["answer"])
        except (OSError, ValueError, TypeError, KeyError):
            pass  # the file was removed, or another version has written it
    _remove_old(home, now)


def _write(adapter: str, text: str) -> None:
    home, now = ensure_home(create=False), time.time()
    _remove_old(home, now)
    path = home / f"{_PREFIX}{os.getpid()}-{token_hex(3)}.json"
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "x", encoding="utf-8", opener=partial(open_file, mode=0o600)) as file:
        head = {"schema": SCHEMA, "at": now}
        # The text is a JSON object without the adapter, which clients add to an agent's answer.
        adapter = json.dumps({"adapter": safe_name(adapter)})[:-1]
        file.write(f'{json.dumps(head)[:-1]}, "answer": {adapter}, {text[1:]}}}\n')
    unfinished.replace(path)


def _remove_old(home: Path, now: float) -> None:
    for path in home.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if now - path.stat().st_mtime > KEEP_SECONDS:
                path.unlink()
