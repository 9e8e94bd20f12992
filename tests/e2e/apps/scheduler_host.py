"""A process with only a scheduler: ``python scheduler_host.py MODE KIND``; SIGTERM ends it."""

# ruff: noqa: E402 - the process is patched before the other imports

import sys

from tests.launch import patch

patch(sys.argv[1])

import os
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from loop_check import sees_a_loop

from z4j_bare import install_agent
from z4j_bare.demo import broker

HOME = Path(os.environ[broker.HOME])

#: Time between two checks for SIGTERM, in seconds.
POLL_INTERVAL = 0.1


def mark(name):
    (HOME / name).touch()


def mark_without_loop(name):
    """Create the file if no running loop is visible."""
    if not sees_a_loop():
        mark(name)


def apscheduler():
    """Jobs in memory that a thread or greenlet of APScheduler runs."""
    from apscheduler.schedulers.background import BackgroundScheduler
    from z4j_apscheduler import APSchedulerAdapter

    scheduler = BackgroundScheduler(timezone="UTC")
    scheduler.add_job(mark, "interval", hours=1, args=["triggered"], id="hourly", name="hourly")
    scheduler.start()
    return APSchedulerAdapter(
        scheduler=scheduler, tasks={"mark": mark, "mark_without_loop": mark_without_loop}
    )


def enable_only():
    """The same with an adapter that can only enable and disable jobs."""
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
    """Jobs in Redis that no worker runs."""
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
    schedulers=[{"apscheduler": apscheduler, "enable_only": enable_only, "rq": rq}[sys.argv[2]]()],
)
while True:
    time.sleep(POLL_INTERVAL)
