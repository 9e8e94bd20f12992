"""Tells the brain which tasks the engines know: all of them once, then what has changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_core.models import DiscoveryHints

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.engines.discovery import discover, task_directories
from z4j_bare.errors import AgentError, FrameTooLargeError
from z4j_bare.wire.frames import frame_id, registry_delta

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.interfaces import IConnection
    from z4j_bare.watcher import TasksFileWatcher

logger = logging.getLogger("z4j.runtime.registry")

#: Seconds between two looks at what the engines know.
INTERVAL = 300.0

#: Bytes of definitions in one frame, at first: a session's frames shall not queue behind it.
PART = 16 * 1024


class RegistryLoop:
    """Discovers tasks while there is a session, and sends the differences to what was sent.

    The protocol has no receipt for that, so a difference counts as sent when the transport took it.

    :param hints: the framework adapter's ``discovery_hints``.
    :param link: returns the session, or ``None``.
    :param dev: look again whenever a ``tasks.py`` changes.
    """

    def __init__(
        self,
        hosts: Mapping[str, EngineHost],
        hints: Callable[[], DiscoveryHints] | None,
        link: Callable[[], IConnection | None],
        backend: BaseConcurrency,
        *,
        dev: bool,
    ) -> None:
        self._hosts = {
            name: host for name, host in hosts.items() if host.has_method("discover_tasks")
        }
        self._hints = hints
        self._link = link
        self._backend = backend
        self._dev = dev
        self._timeslice = TimeSlice(backend)
        self._wake = backend.event()
        self._stale = True
        self._found: dict[str, dict[str, bytes]] = {}
        self._sent: dict[str, dict[str, bytes]] = {}

    def wake(self) -> None:
        """Look whether there is something to do: a session has begun, or the agent stops. Never waits."""
        self._wake.set()

    def run(self, stop_event: Any) -> None:
        """Discover and tell until ``stop_event`` is set, and :meth:`wake` called."""
        watcher = self._watch()
        try:
            while not stop_event.is_set():
                link = self._link()
                if link is not None and self._hosts:
                    self._turn(link)
                if not self._backend.wait(self._wake, INTERVAL):
                    self._stale = True
                self._wake.clear()
        finally:
            if watcher is not None and not self._backend.forked():
                watcher.stop()

    def _turn(self, link: IConnection) -> None:
        if self._stale:
            self._stale = False
            self._discover()
        try:
            for engine, found in self._found.items():
                self._tell(link, engine, found)
        except AgentError as error:  # the next session gets the rest
            logger.debug("z4j: the registry is not told: %s", error)

    def _discover(self) -> None:
        hints = self._hinted()
        for name, host in self._hosts.items():
            try:
                self._found[name] = discover(host, hints, self._timeslice.checkpoint)
            except Exception as error:
                logger.info(
                    "z4j: the tasks of %s are not known: %s: %s", name, type(error).__name__, error
                )

    def _tell(self, link: IConnection, engine: str, found: Mapping[str, bytes]) -> None:
        sent = self._sent.setdefault(engine, {})
        part, size = [], 0
        for name in [*found, *(name for name in list(sent) if name not in found)]:
            if sent.get(name) == found.get(name):
                continue
            part.append(name)
            size += len(found.get(name, name))
            if size >= PART:
                self._send(link, engine, part)
                part, size = [], 0
        if part:
            self._send(link, engine, part)

    def _send(self, link: IConnection, engine: str, names: list[str]) -> None:
        """Send what has come of these names, in smaller pieces if need be."""
        found, sent = self._found[engine], self._sent[engine]
        added = [found[name] for name in names if name in found and name not in sent]
        updated = [found[name] for name in names if name in found and name in sent]
        removed = [name for name in names if name not in found]
        self._timeslice.checkpoint()
        try:
            link.send(
                "registry_delta", frame_id("rd"), registry_delta(engine, added, removed, updated)
            )
        except FrameTooLargeError as error:
            middle = len(names) // 2
            if middle:
                self._send(link, engine, names[:middle])
                self._send(link, engine, names[middle:])
                return
            logger.debug("z4j: task %s is not told: %s", names[0], error)
        for name in names:
            if name in found:
                sent[name] = found[name]
            else:
                del sent[name]

    def _hinted(self) -> DiscoveryHints:
        """Return the framework's hints; in development with every directory that has a ``tasks`` module in use."""
        try:
            hints = self._hints() if self._hints else DiscoveryHints()
        except Exception:
            logger.info("z4j: the framework gives no hints where tasks are", exc_info=True)
            hints = DiscoveryHints()
        return (
            hints.model_copy(update={"app_paths": task_directories(hints)}) if self._dev else hints
        )

    def _watch(self) -> TasksFileWatcher | None:
        if not self._dev or not self._hosts:
            return None
        from z4j_bare.watcher import TasksFileWatcher  # a tool of developers

        watcher = TasksFileWatcher(app_paths=self._hinted().app_paths, on_change=self._changed)
        if not watcher.start():
            logger.info(
                "z4j: Z4J_DEV_MODE is set, but no directory is known where tasks are declared"
            )
        return watcher

    def _changed(self, path: Path) -> None:
        logger.info("z4j: %s has changed; looking for tasks again", path)
        self._stale = True
        self._wake.set()
