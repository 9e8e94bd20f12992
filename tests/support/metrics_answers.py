"""Answers of agents to ``metrics``, for tests of the commands that show them."""

from z4j_bare.events.task_counts import DELAY_BOUNDS, KINDS, RUNTIME_BOUNDS


def histogram(bounds, numbers):
    """Return the numbers of a histogram from ``{bound: number}``."""
    return [numbers.get(bound, 0) for bound in (*bounds, None)]


def task(*, engine="celery", worker="celery@web-1", name="shop.pay", queue="orders", **counts):
    """Return the counts of a task name."""
    return {
        "engine": engine,
        "worker": worker,
        "name": name,
        "queue": queue,
        **{kind: counts.get(kind, 0) for kind in KINDS.values()},
        "failed": counts.get("failed", {}),
        "runtimes": histogram(RUNTIME_BOUNDS, counts.get("runtimes", {})),
        "runtime_seconds": counts.get("runtime_seconds", 0.0),
        "delays": histogram(DELAY_BOUNDS, counts.get("delays", {})),
        "delay_seconds": counts.get("delay_seconds", 0.0),
    }


def answer(
    *,
    adapter="bare",
    pid=7,
    engine="celery",
    worker="celery@web-1",
    workers=None,
    project="shop",
    created=1000.5,
    tasks=(),
    **status,
):
    """Return the answer of an agent; ``status`` are changes of its status."""
    workers = ([worker] if worker else []) if workers is None else workers
    described = {
        "engine": engine,
        "worker": worker,
        "workers": workers,
        "queues": ["orders"] if worker else [],
        "running": 2 if worker else None,
    }
    counters = ("produced", "stored", "sent", "acked", "buffered", "buffer_bytes")
    counters += ("buffer_failures", "sessions", "frames", "heartbeats", "commands")
    return {
        "adapter": adapter,
        "pid": pid,
        "schema": 1,
        "host": "web-1",
        "created": created,
        "status": {
            "project": project,
            "version": "1.13.0",
            "concurrency": "gevent",
            "transport": "ws",
            "connected": True,
            "oldest_age_seconds": None,
            "buffer_durable": True,
            "starts_unheard": 0,
            "lost": {},
            "restarts": {},
            **dict.fromkeys(counters, 1),
            **status,
        },
        "engines": [described],
        "queues": {engine: {"orders": 7}} if worker else {},
        "lag": {"histogram": {"0.001": 1, "0.5": 2, "inf": 1}, "total_seconds": 3.5},
        "task_names": 1,
        "runtime_bounds": list(RUNTIME_BOUNDS),
        "delay_bounds": list(DELAY_BOUNDS),
        "tasks": list(tasks),
    }
