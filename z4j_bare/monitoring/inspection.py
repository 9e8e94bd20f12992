"""Answers the requests to the control server.

The data for ``z4j-bare tasks``, ``hub``, ``metrics`` and ``doctor --bundle`` is collected only when
a client requests it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.control import HUB, LOG, METRICS, RESTART, STATUS, TASKS
from z4j_bare.events.task_counts import DELAY_BOUNDS, RUNTIME_BOUNDS
from z4j_bare.monitoring.control_server import join_items
from z4j_bare.monitoring.holds import HoldTable

if TYPE_CHECKING:
    from z4j_core.models import Config

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.engines.manager import EngineManager
    from z4j_bare.monitoring.control_server import Response
    from z4j_bare.monitoring.hub_lag import HubLagMonitor
    from z4j_bare.monitoring.hub_profile import HubProfile
    from z4j_bare.monitoring.metrics import AgentMetrics
    from z4j_bare.settings import Settings

#: Version of the documents in the answers.
SCHEMA = 1


def control_handlers(
    status: Callable[[], dict[str, Any]],
    reconnect: Callable[[], object],
    engines: EngineManager,
    metrics: AgentMetrics,
    config: Config,
    settings: Settings,
    backend: BaseConcurrency,
) -> dict[str, Callable[..., Response]]:
    """Return the handlers for a :class:`ControlServer`.

    :param status: returns the status document.
    :param reconnect: closes the session, so that the agent connects again.
    """

    def restart() -> dict[str, Any]:
        reconnect()
        return {}

    handlers: dict[str, Callable[..., Response]] = {STATUS: status, RESTART: restart}
    inspect: dict[str, Callable[..., Response]] = {
        TASKS: partial(stream_tasks, engines, backend),
        HUB: HubInspector(metrics.hub_lag, engines, backend).answer,
        METRICS: partial(stream_metrics, status, engines, metrics, backend),
        LOG: partial(stream_log, engines, config, settings, backend),
    }
    if not settings.inspect:
        inspect = dict.fromkeys(inspect, _refuse)
    return handlers | inspect


def stream_tasks(
    engines: EngineManager,
    backend: BaseConcurrency,
    *,
    task: str = "",
    stack: bool = False,
    all_frames: bool = False,
) -> Iterator[str]:
    """Return the parts of a JSON text with the tasks that run now."""
    checkpoint = TimeSlice(backend).checkpoint
    query = {"task": task, "stack": stack, "all_frames": all_frames}
    yield json.dumps(_head(engines, backend))[:-1] + ', "tasks": ['
    rows = engines.iter_running(query, checkpoint)
    yield from join_items(json.dumps(row, default=str) for row in rows)
    yield "]}"


def stream_log(
    engines: EngineManager, config: Config, settings: Settings, backend: BaseConcurrency
) -> Iterator[str]:
    """Return the parts of a JSON text with settings, versions and the last log lines."""
    module = backend.import_module("z4j_bare.monitoring.log_report")
    parts: Iterator[str] = module.stream_log(_head(engines, backend), config, settings, backend)
    return parts


def stream_metrics(
    status: Callable[[], dict[str, Any]],
    engines: EngineManager,
    metrics: AgentMetrics,
    backend: BaseConcurrency,
) -> Iterator[str]:
    """Return the parts of a JSON text with the counts of the tasks and of the agent."""
    checkpoint, counts = TimeSlice(backend).checkpoint, metrics.task_counts
    head = {
        "schema": SCHEMA,
        "pid": os.getpid(),
        "host": platform.node(),
        "created": counts.created,
        "status": status(),
        "engines": engines.describe(),
        "queues": metrics.queue_depths(),
        "lag": metrics.hub_lag.history.describe(),
        "task_names": counts.number_of_names(),
        "failures": [failure._asdict() for failure in list(counts.failures)],
        "runtime_bounds": RUNTIME_BOUNDS,
        "delay_bounds": DELAY_BOUNDS,
    }
    yield json.dumps(head, default=str)[:-1] + ', "tasks": ['
    for part in join_items(map(json.dumps, counts.iter_rows())):
        yield part
        checkpoint()
    yield "]}"


class HubInspector:
    """Answers ``z4j-bare hub``: lags, the code that held the hub, and a profile."""

    def __init__(
        self, hub_lag: HubLagMonitor, engines: EngineManager, backend: BaseConcurrency
    ) -> None:
        self._hub_lag = hub_lag
        self._engines = engines
        self._backend = backend
        self._profile: HubProfile | None = None

    def answer(self, *, profile: float = 0.0, result: bool = False) -> Response:
        """Return the lags and the table of holds.

        :param profile: start a profile of this many seconds; 0 starts none.
        :param result: return the last profile as well.
        :raises ValueError: ``profile`` is not between 0 and 600 seconds.
        """
        has_hub = bool(self._hub_lag.hub_thread)
        if profile and has_hub:
            self._start(float(profile))
        document: dict[str, Any] = {
            **_head(self._engines, self._backend),
            "has_hub": has_hub,
            "profiling": self._profile is not None and self._profile.is_running(),
            "lag": self._hub_lag.history.describe(),
            "holds": self._hub_lag.holds.rows(),
        }
        if result and self._profile is not None:
            return self._stream_profile(document, self._profile)
        return document

    def _start(self, seconds: float) -> None:
        module = self._backend.import_module("z4j_bare.monitoring.hub_profile")
        if not 0 < seconds <= module.MAX_SECONDS:
            raise ValueError
        if self._profile is None or not self._profile.is_running():
            self._profile = module.HubProfile(
                self._backend, self._hub_lag.hub_thread, seconds, self._engines.current_task
            )

    def _stream_profile(self, document: dict[str, Any], profile: HubProfile) -> Iterator[str]:
        checkpoint, table = TimeSlice(self._backend).checkpoint, HoldTable()
        stacks: dict[str, float] = {}
        for hold in profile.holds:
            table.add(hold)
            profile.add_stacks(stacks, hold)
            checkpoint()
        document["profile"] = {
            "seconds": profile.seconds,
            "running": profile.is_running(),
            "holds": table.rows(),
        }
        yield json.dumps(document)[:-1] + ', "stacks": {'
        items = (f"{json.dumps(text)}: {round(value * 1000)}" for text, value in stacks.items())
        for part in join_items(items):
            yield part
            checkpoint()
        yield "}}"


def _head(engines: EngineManager, backend: BaseConcurrency) -> dict[str, Any]:
    """Return the fields that identify this agent in a document."""
    return {
        "schema": SCHEMA,
        "pid": os.getpid(),
        "concurrency": backend.name,
        "workers": engines.workers(),
    }


def _refuse(**_parameters: object) -> dict[str, Any]:
    return {"error": "Z4J_INSPECT=0 forbids this request: remove the variable to allow it"}
