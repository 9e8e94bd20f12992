"""Acknowledges operators' commands, runs each command once, and sends its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from z4j_bare.commands.dispatcher import Dispatcher

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.host import EngineHost
    from z4j_bare.events.source import EventSource

__all__ = ["Dispatcher", "add_process_restarts"]


def add_process_restarts(
    engines: Iterable[tuple[EngineHost, EventSource]],
    stop: Callable[[float], None],
    backend: BaseConcurrency,
    grace: float,
) -> None:
    """Make ``restart_worker`` end this process, for engines that cannot restart a worker.

    :param stop: stops the agent within the given seconds.
    :param grace: seconds allowed for finishing the running tasks.
    """
    for host, source in engines:
        if host.description.restarts_by_exit():
            from z4j_bare.commands.process_restart import ProcessRestart  # unused in Celery

            workers = source.presence.workers.keys()
            host.process_restart = ProcessRestart(host.name, workers, stop, backend, grace)
