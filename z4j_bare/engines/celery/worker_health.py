"""Collects details of Celery workers for the heartbeat.

A worker process reads the details from the worker's objects. Other processes request them over the
broker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_bare.engines.celery.engine import broker_connection
from z4j_bare.events.redaction import safe_name
from z4j_bare.wire.fit import fit_name

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker.consumer import Consumer
    from celery.worker.request import Request

#: Seconds for which the details are cached.
DETAILS_TTL = 60.0

#: Seconds to wait for the workers' replies.
#: A request always takes this long, because the number of workers is unknown.
REPLY_TIMEOUT = 1.0

#: Maximum number of attempts to copy the set of running tasks.
#: A copy fails if the worker's thread changes the set during the copy.
_COPY_ATTEMPTS = 3

#: Names of the settings that the heartbeat contains, because the brain stores them.
#: Other settings may contain credentials.
_SETTINGS = (
    "task_serializer",
    "result_serializer",
    "accept_content",
    "task_default_queue",
    "worker_concurrency",
    "worker_prefetch_multiplier",
    "worker_max_tasks_per_child",
    "worker_max_memory_per_child",
    "task_acks_late",
    "task_reject_on_worker_lost",
    "task_time_limit",
    "task_soft_time_limit",
    "broker_pool_limit",
    "broker_heartbeat",
    "timezone",
    "enable_utc",
)


class WorkerDetails:
    """Returns the value of ``<engine>.worker_details``, cached for :data:`DETAILS_TTL` seconds.

    :param consumer: the Consumer of this process's worker. ``None`` outside a worker, where the
        details of all workers are requested.
    :param matches: the adapter's ``RedactionEngine.value_matches``, for :func:`safe_name`.
    """

    def __init__(
        self,
        app: Celery,
        consumer: Consumer | None,
        matches: Callable[[str], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = (
            partial(remote_details, app) if consumer is None else partial(local_details, consumer)
        )
        self._matches = matches
        self._clock = clock
        self._read_at = float("-inf")
        self._text = "{}"

    def __call__(self) -> str:
        """Return the details as JSON by worker name. May raise any exception."""
        if self._clock() - self._read_at >= DETAILS_TTL:
            self._read_at = self._clock()
            found = {
                fit_name(safe_name(name, self._matches)): facts
                for name, facts in self._read().items()
            }
            self._text = json.dumps(found, default=str)
        return self._text


def local_details(consumer: Consumer) -> dict[str, dict[str, Any]]:
    """Return this worker's details in the form of its replies to ``inspect``.

    Running tasks are listed without arguments, because the brain does not redact this entry.
    """
    from celery.worker import state

    facts: dict[str, Any] = {
        "stats": consumer.controller.stats(),
        "registered": sorted(name for name in consumer.app.tasks if not name.startswith("celery.")),
        "conf": {name: consumer.app.conf.get(name) for name in _SETTINGS},
    }
    task_consumer = consumer.task_consumer
    if task_consumer is not None:
        facts["active_queues"] = [queue.as_dict(recurse=True) for queue in task_consumer.queues]
    active = _copy(state.active_requests)
    if active is not None:  # the brain keeps the previous value of a missing key
        facts["active"] = [_without_arguments(request) for request in active]
    return {consumer.hostname: facts}


def remote_details(app: Celery) -> dict[str, dict[str, Any]]:
    """Return the statistics of all workers that reply."""
    with broker_connection(app) as connection:
        inspect = app.control.inspect(timeout=REPLY_TIMEOUT, connection=connection)
        answers: Mapping[str, Any] = inspect.stats() or {}
    return {name: {"stats": stats} for name, stats in answers.items()}


def _copy(requests: Iterable[Request]) -> list[Request] | None:
    for _ in range(_COPY_ATTEMPTS):
        try:
            return list(requests)
        except RuntimeError:  # the set changed during the iteration
            continue
    return None


def _without_arguments(request: Request) -> dict[str, Any]:
    info: dict[str, Any] = request.info(safe=True)
    info.pop("args", None)
    info.pop("kwargs", None)
    return info
