"""Tells when a ``tasks.py`` changes: for development, where tasks come and go while the worker runs.

It looks at the files twice a second, on a native worker under gevent and eventlet. watchdog is not used: its observer reads
inotify in a thread, which in a patched process is a greenlet that stops the hub.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from z4j_bare.concurrency import build, choose, detect
from z4j_bare.safety import safe_call

logger = logging.getLogger("z4j.runtime.watcher")

#: Seconds between two looks, and for :meth:`TasksFileWatcher.stop`.
POLL_INTERVAL = 0.5
STOP_TIMEOUT = 2.0

#: Seconds that a file has to be quiet, at least: editors write in steps.
MIN_DEBOUNCE = 0.05

#: Directories that hold no tasks of anybody's.
_SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages"})

#: What two looks are compared by: size and time of the last change, by path.
Snapshot = Mapping[str, tuple[int, int]]


class TasksFileWatcher:
    """Watches the files of these names below ``app_paths``.

    :param on_change: called with the path of each that was changed, made or removed, once it has been quiet for
        ``debounce_ms``; in a task of the watcher's own. What it raises is logged.
    """

    def __init__(
        self,
        *,
        app_paths: Iterable[Path],
        on_change: Callable[[Path], object],
        filenames: Iterable[str] = frozenset({"tasks.py"}),
        debounce_ms: int = 250,
    ) -> None:
        self._paths = [Path(path) for path in app_paths]
        self._on_change = on_change
        self._names = frozenset(filenames)
        self._window = max(MIN_DEBOUNCE, debounce_ms / 1000)
        self._backend: Any = None
        self._stop_event: Any = None
        self._task: Any = None

    def start(self) -> bool:
        """Begin to watch; return whether there is a directory to watch. Idempotent."""
        if self._task is not None:
            return True
        roots = [str(path) for path in self._paths if path.is_dir()]
        if not roots:
            return False
        self._backend = build(choose("auto", detect()))
        self._stop_event = self._backend.event()
        self._task = self._backend.spawn(self._run, roots, name="z4j-watcher")
        return True

    def stop(self) -> None:
        """End it, within two seconds. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            self._stop_event.set()
            task.join(STOP_TIMEOUT)
            self._backend.close()

    def _run(self, roots: list[str]) -> None:
        known = self._scan(roots, {})
        while not self._backend.wait(self._stop_event, POLL_INTERVAL):
            found = self._scan(roots, known)
            if found != known:
                found = self._debounced(roots, found)
                for path in sorted(known.keys() | found.keys()):
                    if known.get(path) != found.get(path):
                        safe_call(self._on_change, Path(path))
                known = found

    def _debounced(self, roots: list[str], found: Snapshot) -> Snapshot:
        """Look until two looks in a row show the same."""
        while not self._backend.wait(self._stop_event, self._window):
            earlier, found = found, self._scan(roots, found)
            if found == earlier:
                break
        return found

    def _scan(self, roots: list[str], otherwise: Snapshot) -> Snapshot:
        ok, found = self._backend.offload(_scan, roots, self._names)
        if ok:
            return dict(found)
        logger.debug("z4j: the watcher could not look: %s", found)
        return otherwise


def _scan(roots: list[str], names: frozenset[str]) -> dict[str, tuple[int, int]]:
    found = {}
    for root in roots:
        for directory, below, files in os.walk(root):
            below[:] = [name for name in below if name not in _SKIPPED and not name.startswith(".")]
            for path in (Path(directory) / name for name in names.intersection(files)):
                with suppress(OSError):  # removed since
                    seen = path.stat()
                    found[str(path)] = (seen.st_size, seen.st_mtime_ns)
    return found
