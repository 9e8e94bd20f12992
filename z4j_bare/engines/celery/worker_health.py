"""What Celery workers say of themselves: read where this process is one, asked over the broker where it is not.

Asking has a price in a worker that forks. ``control.inspect`` waits for replies on a connection of the app's pool. A child
that is forked meanwhile closes that pool (kombu's after-fork hook), and in doing so reads the answer that the parent waits
for from the socket they share; it hangs for good when the parent was first, and its tasks never run (kombu 5.6, prefork
with ``--max-tasks-per-child``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from z4j_bare.engines.celery.engine import broker_connection
from z4j_bare.events.redaction import safe_name

#: Seconds between two looks; the dashboard's worker page lives by them.
DETAILS_EVERY = 60.0

#: Seconds that workers elsewhere have to answer: with no known destination, the whole of it passes every time.
REPLY_SECONDS = 1.0

#: Looks at a set that the worker's own thread changes meanwhile.
_LOOKS = 3

#: The settings that the brain keeps (``brain-contract`` 2.6); others may carry credentials.
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
    """``<engine>.worker_details``, renewed every minute.

    :param consumer: the Consumer of the worker that this process is, or ``None``: then all workers are asked.
    :param matches: the adapter's ``RedactionEngine.value_matches``, for :func:`safe_name`.
    """

    def __init__(
        self,
        app: Any,
        consumer: Any,
        matches: Callable[[str], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = (
            partial(remote_details, app) if consumer is None else partial(local_details, consumer)
        )
        self._matches = matches
        self._clock = clock
        self._looked_at = float("-inf")
        self._text = "{}"

    def __call__(self) -> str:
        """Return the details as JSON by worker name, at most :data:`DETAILS_EVERY` seconds old. May raise anything."""
        if self._clock() - self._looked_at >= DETAILS_EVERY:
            self._looked_at = self._clock()
            found = {safe_name(name, self._matches): facts for name, facts in self._look().items()}
            self._text = json.dumps(found, default=str)
        return self._text


def local_details(consumer: Any) -> dict[str, dict[str, Any]]:
    """Return what the worker around ``consumer`` would answer to ``inspect``, without asking it.

    Running tasks come without their arguments: the brain redacts nothing here, and each task's row has them redacted.
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
    active = _listed(state.active_requests)
    if active is not None:  # the brain keeps what it had of a key that is missing
        facts["active"] = [_running(request) for request in active]
    return {consumer.hostname: facts}


def remote_details(app: Any) -> dict[str, dict[str, Any]]:
    """Ask all workers for their statistics, over a connection that belongs to no pool."""
    with broker_connection(app) as connection:
        inspect = app.control.inspect(timeout=REPLY_SECONDS, connection=connection)
        answers: Mapping[str, Any] = inspect.stats() or {}
    return {name: {"stats": stats} for name, stats in answers.items()}


def _listed(requests: Any) -> list[Any] | None:
    for _ in range(_LOOKS):
        try:
            return list(requests)
        except RuntimeError:
            continue
    return None


def _running(request: Any) -> dict[str, Any]:
    info: dict[str, Any] = request.info(safe=True)
    info.pop("args", None)
    info.pop("kwargs", None)
    return info
