"""Scripted answers of agents to ``z4j-bare top``, also as a program: ``python -m``."""

import itertools
import sys

from z4j_bare import control
from z4j_bare.cli import main

LAG = {"recent": {"p99_seconds": 0.0123}}


def agent(pid=7, **changes):
    """Return the status of a connected agent, with ``changes``."""
    return {
        "adapter": "bare",
        "pid": pid,
        "project": "p",
        "connected": True,
        "connected_at": 0.0,
        "concurrency": "gevent",
        "transport": "ws",
        "workers": {"celery": ["celery@a"]},
        "agent_name": None,
        "oldest_age_seconds": None,
        "produced": 10,
        "acked": 4,
        "buffered": 6,
        "adopting": 0,
        "lost": {},
        "last_error": "",
        **changes,
    }


def running(name, age, worker="celery@a"):
    """Return a running task."""
    return {
        "id": f"id-of-{name}",
        "name": name,
        "worker": worker,
        "pid": 7,
        "age_seconds": age,
        "position": "shop/pay.py:88 in charge",
        "waiting_in": "socket.recv",
    }


def counts(name, succeeded=0, failed=0, retried=0, seconds=0.0, queue="orders"):
    """Return the counts of a task name in a queue."""
    return {
        "name": name,
        "queue": queue,
        "succeeded": succeeded,
        "failed": {"ValueError": failed} if failed else {},
        "retried": retried,
        "revoked": 0,
        "runtime_seconds": seconds,
    }


def failure(at, name, exception="ValueError", worker="celery@a"):
    """Return a failure of a task."""
    return {"at": at, "name": name, "exception": exception, "worker": worker}


def script(set_attribute, *samples):
    """Let the clients of the control sockets return each sample, and the last one again.

    A sample maps ``status``, ``tasks`` and ``metrics`` to the answers of all agents.
    """
    left = itertools.chain(samples, itertools.repeat(samples[-1]))
    current = {}

    def status():
        current.update(next(left))
        return [dict(each) for each in current["status"]]

    def query(verb, _parameters=None, _timeout=0.0):
        return [dict(each) for each in current.get(verb, ())]

    set_attribute(control, "status", status)
    set_attribute(control, "query", query)


def one_agent(*, tasks=(), metrics=(), failures=(), **changes):
    """Return a sample of a single agent."""
    key = {"adapter": "bare", "pid": 7}
    return {
        "status": [agent(**changes)],
        "tasks": [{**key, "tasks": list(tasks)}],
        "metrics": [{**key, "tasks": list(metrics), "failures": list(failures)}],
        "hub": [{**key, "lag": LAG}],
    }


def busy_worker(done):
    """Return a sample of a worker with 30 running tasks, after ``done`` ended ones."""
    return one_agent(
        produced=2 * done,
        tasks=[running(f"shop.slow_{number % 4}", 100.0 - number) for number in range(30)],
        metrics=[counts("shop.pay", done, seconds=done * 0.02), counts("shop.mail", 3, 2, 1)],
        failures=[failure(1_000_000.0, "shop.mail", "SMTPServerDisconnected")],
    )


if __name__ == "__main__":
    script(setattr, *(busy_worker(100 * number) for number in range(50)))
    sys.exit(main(sys.argv[1:]))
