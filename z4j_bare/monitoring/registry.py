"""Reports the engines' tasks to the brain.

The first report contains all tasks. Later reports contain only changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from z4j_core.models import DiscoveryHints

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.engines.discovery import discover, task_directories
from z4j_bare.errors import AgentError, FrameTooLargeError
from z4j_bare.wire.frames import frame_id, registry_delta

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.interfaces import IConnection, IEvent
    from z4j_bare.watcher import TasksFileWatcher

logger = logging.getLogger("z4j.runtime.monitoring.registry")

#: Seconds between two discoveries of tasks.
INTERVAL = 300.0

#: Bytes of task definitions at which a frame is complete.
#: The frames are small, because heartbeats and events wait while a frame is written.
MAX_DELTA_BYTES = 16 * 1024


class RegistryLoop:
    """Discovers tasks during a session, and sends the changes since the last report.

    The protocol has no acks for ``registry_delta`` frames. A change counts as reported when the
    transport has accepted the frame.

    :param connection: returns the current connection, or ``None`` without a session.
    :param dev: whether to discover the tasks again when a ``tasks.py`` changes.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        hints: Callable[[], DiscoveryHints] | None,
        connection: Callable[[], IConnection | None],
        backend: BaseConcurrency,
        *,
        dev: bool,
    ) -> None:
        self._hosts = {
            name: host for name, host in hosts.items() if host.has_method("discover_tasks")
        }
        self._hints = hints
        self._connection = connection
        self._backend = backend
        self._dev = dev
        self._timeslice = TimeSlice(backend)
        self._wakeup = backend.event()
        self._stale = True
        # The task definitions found by the last discovery, and those that were sent.
        # Both contain canonical JSON by engine and by the name of the task.
        self._found: dict[str, dict[str, bytes]] = {}
        self._sent: dict[str, dict[str, bytes]] = {}

    def wake(self) -> None:
        """Wake the loop, because a session has started or the agent stops. Never waits."""
        self._wakeup.set()

    def run(self, stop_event: IEvent) -> None:
        """Discover and report until ``stop_event`` is set and :meth:`wake` is called."""
        watcher = self._start_watcher()
        try:
            while not stop_event.is_set():
                connection = self._connection()
                if connection is not None and self._hosts:
                    self._sync(connection)
                if not self._backend.wait(self._wakeup, INTERVAL):
                    self._stale = True
                self._wakeup.clear()
        finally:
            if watcher is not None and not self._backend.forked():
                watcher.stop()

    def _sync(self, connection: IConnection) -> None:
        if self._stale:
            self._stale = False
            self._discover()
        try:
            for engine in self._found:
                self._send_changes(connection, engine)
        except AgentError as error:  # the next session sends the rest
            logger.debug("z4j: could not send registry changes: %s", error)

    def _discover(self) -> None:
        hints = self._discovery_hints()
        for name, host in self._hosts.items():
            try:
                self._found[name] = discover(host, hints, self._timeslice.checkpoint)
            except Exception as error:
                logger.info(
                    "z4j: could not discover the tasks of %s, next attempt in %.0f s: %s: %s",
                    name,
                    INTERVAL,
                    type(error).__name__,
                    error,
                )

    def _send_changes(self, connection: IConnection, engine: str) -> None:
        found, sent = self._found[engine], self._sent.setdefault(engine, {})
        changed, size = [], 0
        for name in [*found, *(name for name in list(sent) if name not in found)]:
            if sent.get(name) == found.get(name):
                continue
            changed.append(name)
            size += len(found.get(name, name))
            if size >= MAX_DELTA_BYTES:
                self._send(connection, engine, changed)
                changed, size = [], 0
        if changed:
            self._send(connection, engine, changed)

    def _send(self, connection: IConnection, engine: str, names: list[str]) -> None:
        """Send the changes of these tasks, in smaller frames if one frame is too large."""
        found, sent = self._found[engine], self._sent[engine]
        added = [found[name] for name in names if name in found and name not in sent]
        updated = [found[name] for name in names if name in found and name in sent]
        removed = [name for name in names if name not in found]
        self._timeslice.checkpoint()
        try:
            connection.send(
                "registry_delta", frame_id("rd"), registry_delta(engine, added, removed, updated)
            )
        except FrameTooLargeError as error:
            middle = len(names) // 2
            if middle:
                self._send(connection, engine, names[:middle])
                self._send(connection, engine, names[middle:])
                return
            logger.debug("z4j: task %s is left out of the registry: %s", names[0], error)
        for name in names:
            if name in found:
                sent[name] = found[name]
            else:
                del sent[name]

    def _discovery_hints(self) -> DiscoveryHints:
        """Return the framework's hints; in dev mode, add the directories of ``tasks`` modules."""
        try:
            hints = self._hints() if self._hints else DiscoveryHints()
        except Exception:
            logger.info("z4j: the framework's discovery_hints failed", exc_info=True)
            hints = DiscoveryHints()
        if not self._dev:
            return hints
        return hints.model_copy(update={"app_paths": task_directories(hints)})

    def _start_watcher(self) -> TasksFileWatcher | None:
        if not self._dev or not self._hosts:
            return None
        from z4j_bare.watcher import TasksFileWatcher  # only used in development

        watcher = TasksFileWatcher(
            app_paths=self._discovery_hints().app_paths, on_change=self._on_change
        )
        if not watcher.start():
            logger.info(
                "z4j: Z4J_DEV_MODE is set, but no directory of tasks is known: changes of tasks.py"
                " are not watched"
            )
        return watcher

    def _on_change(self, path: Path) -> None:
        logger.info("z4j: %s has changed: discovering tasks again", path)
        self._stale = True
        self._wakeup.set()
