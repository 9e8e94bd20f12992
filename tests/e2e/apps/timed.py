"""A host whose only adapter is a scheduler's: ``python timed.py MODE KIND``; it ends with SIGTERM."""

# ruff: noqa: E402 - the process is patched before the other imports

import sys

from tests.launch import patch

patch(sys.argv[1])

import os
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from looking import sees_a_loop

from z4j_bare import install_agent
from z4j_bare.demo import broker

HOME = Path(os.environ[broker.HOME])


def mark(name):
    (HOME / name).touch()


def look(name):
    """Leave the file only where no loop is seen."""
    if not sees_a_loop():
        mark(name)


def apscheduler():
    """Jobs in memory, run by a thread or greenlet of APScheduler's own."""
    from apscheduler.schedulers.background import BackgroundScheduler
    from z4j_apscheduler import APSchedulerAdapter

    scheduler = BackgroundScheduler(timezone="UTC")
    scheduler.add_job(mark, "interval", hours=1, args=["triggered"], id="hourly", name="hourly")
    scheduler.start()
    return APSchedulerAdapter(scheduler=scheduler, tasks={"mark": mark, "look": look})


def switched():
    """The same with an adapter that can switch jobs on and off, and change nothing else."""
    adapter = apscheduler()
    capabilities = adapter.capabilities() - {
        "external_schedule_mutation_v1",
        "create",
        "update",
        "delete",
    }
    adapter.capabilities = lambda: capabilities
    return adapter


def rq():
    """Jobs in Redis; nobody runs them."""
    from redis import Redis
    from rq_scheduler import Scheduler
    from z4j_rqscheduler import RqSchedulerAdapter

    scheduler = Scheduler(connection=Redis.from_url(os.environ[broker.BROKER]))
    soon = datetime.now(UTC) + timedelta(hours=1)
    scheduler.schedule(soon, "os.getpid", interval=3600, id="hourly", repeat=None)
    return RqSchedulerAdapter(scheduler=scheduler, managed=True, tasks={"os.getpid": os.getpid})


signal.signal(signal.SIGTERM, lambda *_: sys.exit())
install_agent(
    engines=[],
    schedulers=[{"apscheduler": apscheduler, "switched": switched, "rq": rq}[sys.argv[2]]()],
)
while True:
    time.sleep(0.1)
