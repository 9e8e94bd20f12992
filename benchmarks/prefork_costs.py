"""Micro costs of capture in a prefork worker: the two signals in a child, and the parent's read."""

from __future__ import annotations

import os
from array import array
from contextlib import closing
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from benchmarks.figures import costs_of

#: Tasks that the child starts and ends before the parent reads.
_TASKS = 200


def prefork_costs(app: Any, task: Any, calls: int) -> dict[str, list[float]]:
    """Return the sorted microseconds that a task takes in the child and in the parent."""
    from z4j_celery import CeleryEngineAdapter

    from z4j_bare.concurrency.threads import ThreadsConcurrency
    from z4j_bare.engines.celery.prefork import prefork
    from z4j_bare.engines.celery.prefork_parent import PreforkCapture
    from z4j_bare.events.ring import Ring

    backend, limit = ThreadsConcurrency(), 10 * _TASKS
    ring = Ring(limit, limit, backend.event())
    pool = SimpleNamespace(_pool=SimpleNamespace(_pool=[]))
    consumer: Any = SimpleNamespace(hostname="worker@bench", pool=pool)
    with closing(prefork):
        prefork.open().counters.polling = 1  # as the parent's loop does while messages arrive
        capture = PreforkCapture(CeleryEngineAdapter(celery_app=app), ring.put, consumer, backend)
        capture.connect()
        in_child, in_parent = array("d"), list[float]()
        with closing(_Child(task)) as child:
            for _ in range(max(10, calls // _TASKS)):
                in_child += child.round()
                in_parent += costs_of(lambda _: capture.drain(), 1, _TASKS)
                ring.take(limit)
        capture.disconnect()
    return {
        "prefork child, per task": sorted(in_child),
        "prefork parent, per task": sorted(in_parent),
    }


class _Child:
    """A forked child that sends the signals of :data:`_TASKS` tasks at each :meth:`round`."""

    def __init__(self, task: Any) -> None:
        (order, self._orders), (self._costs, costs) = os.pipe(), os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                self._run(task, order, costs)
            finally:
                os._exit(0)
        os.close(order)
        os.close(costs)

    def round(self) -> array[float]:
        """Return the costs of each task in microseconds."""
        os.write(self._orders, b"x")
        costs = array("d")
        costs.frombytes(os.read(self._costs, costs.itemsize * _TASKS))
        return costs

    def close(self) -> None:
        """End the child."""
        os.close(self._orders)
        os.close(self._costs)
        os.waitpid(self._pid, 0)

    def _run(self, task: Any, order: int, costs: int) -> None:
        from celery import signals

        os.close(self._orders)
        signals.worker_process_init.send(sender="worker@bench")
        task.push_request(retries=0)
        while os.read(order, 1):
            ids = [str(uuid4()) for _ in range(_TASKS)]

            def run(number: int, ids: list[str] = ids) -> None:
                shared = {"task_id": ids[number], "task": task, "args": (), "kwargs": {}}
                signals.task_prerun.send(task, **shared)
                signals.task_postrun.send(task, **shared, retval=None, state="SUCCESS")

            os.write(costs, array("d", costs_of(run, _TASKS)).tobytes())
