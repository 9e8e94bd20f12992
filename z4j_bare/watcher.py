"""Reports changes of ``tasks.py`` files while a worker runs, for development."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from z4j_bare.concurrency import BaseConcurrency, Task, build, choose, detect
from z4j_bare.interfaces import IEvent
from z4j_bare.safety import safe_call

logger = logging.getLogger("z4j.runtime.watcher")

#: Seconds between two scans of the files.
POLL_INTERVAL = 0.5

#: Seconds that :meth:`TasksFileWatcher.stop` waits for the watcher's task.
STOP_TIMEOUT = 2.0

#: Minimum debounce time in seconds.
#: With a shorter time, each write of an editor that saves a file would be reported.
MIN_DEBOUNCE = 0.05

#: Names of directories that are not scanned, because they contain no modules of the application.
_SKIPPED_DIRECTORIES = frozenset({"__pycache__", "node_modules", "site-packages"})

#: Size in bytes and modification time in nanoseconds of each file, by path.
Snapshot = Mapping[str, tuple[int, int]]


class TasksFileWatcher:
    """Watches the files with the given names below ``app_paths``.

    The files are polled twice a second, under gevent and eventlet on a native thread. watchdog is
    not used, because in a patched process its observer thread is a greenlet that blocks the hub.

    :param app_paths: directories that are scanned recursively.
    :param on_change: called in the watcher's task with the path of each changed, created or removed
        file. Its exceptions are logged.
    :param filenames: names of the files to watch.
    :param debounce_ms: ``on_change`` is called after so many milliseconds without a further change.
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
        self._debounce = max(MIN_DEBOUNCE, debounce_ms / 1000)
        self._backend: BaseConcurrency
        self._stop_event: IEvent
        self._task: Task | None = None

    def start(self) -> bool:
        """Start watching; return ``False`` if none of the directories exists. Idempotent."""
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
        """Stop watching within two seconds. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            self._stop_event.set()
            task.join(STOP_TIMEOUT)
            self._backend.close()

    def _run(self, roots: list[str]) -> None:
        known = self._scan(roots, {})
        while not self._backend.wait(self._stop_event, POLL_INTERVAL):
            current = self._scan(roots, known)
            if current != known:
                current = self._debounced(roots, current)
                for path in sorted(known.keys() | current.keys()):
                    if known.get(path) != current.get(path):
                        safe_call(self._on_change, Path(path))
                known = current

    def _debounced(self, roots: list[str], current: Snapshot) -> Snapshot:
        """Scan until two consecutive scans have the same result; return the result."""
        while not self._backend.wait(self._stop_event, self._debounce):
            previous, current = current, self._scan(roots, current)
            if current == previous:
                break
        return current

    def _scan(self, roots: list[str], fallback: Snapshot) -> Snapshot:
        ok, result = self._backend.offload(_scan, roots, self._names)
        if ok:
            return dict(result)
        logger.debug("z4j: could not scan the task files: %s", result)
        return fallback


def _scan(roots: list[str], names: frozenset[str]) -> dict[str, tuple[int, int]]:
    snapshot = {}
    for root in roots:
        for directory, subdirectories, files in os.walk(root):
            subdirectories[:] = [
                name
                for name in subdirectories
                if name not in _SKIPPED_DIRECTORIES and not name.startswith(".")
            ]
            for path in (Path(directory) / name for name in names.intersection(files)):
                with suppress(OSError):  # the file was removed during the scan
                    status = path.stat()
                    snapshot[str(path)] = (status.st_size, status.st_mtime_ns)
    return snapshot
