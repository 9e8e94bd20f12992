"""What only the Celery adapter needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency, Task

logger = logging.getLogger("z4j.runtime.adapters.celery")

#: Pauses in seconds before each repetition: 1 s and 5 s after the connection.
PAUSES = (1.0, 4.0)

#: Seconds between further repetitions where we watch workers that are not ours: one may have started since, and until
#: then its events are lost.
EVERY = 10.0


def nudge_events(engine: Any, seam: BaseConcurrency, going: Callable[[], bool] = lambda: False) -> Task:
    """Broadcast ``enable_events`` again, 1 s and 5 s from now, in a task of its own.

    Without a worker of our own (``engine.worker_hostname``), every ten seconds after that while ``going()``.

    The adapter broadcasts once, and on Redis the worker subscribes to its control channel only after the
    handlers of ``worker_ready`` have returned: 0 of 12 runs had events on prefork, threads and solo, all had
    with one repetition (``adapter-surface`` 3.2).
    """
    return seam.spawn(_nudge, engine, seam, going, name="z4j-celery-nudge")


def _nudge(engine: Any, seam: BaseConcurrency, going: Callable[[], bool]) -> None:
    hostname = getattr(engine, "worker_hostname", None)
    for pause in PAUSES:
        seam.sleep(pause)
        _enable(engine, hostname)
    while hostname is None and going():
        seam.sleep(EVERY)
        _enable(engine, None)


def _enable(engine: Any, hostname: str | None) -> None:
    try:
        engine.celery_app.control.enable_events(destination=[hostname] if hostname else None)
    except Exception as error:
        logger.debug("z4j: enable_events failed: %s", type(error).__name__)
