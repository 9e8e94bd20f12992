"""A Celery application with an agent, whose tasks wait in different ways or hold the hub."""

import re
import socket
import subprocess
import sys
import threading
import time

from sample_tasks import app
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent

#: Seconds that each waiting task lasts.
WAIT_SECONDS = 60

if "eventlet" in sys.modules:
    from eventlet import patcher

    blocking_sleep = patcher.original("time").sleep
else:
    from gevent.monkey import get_original

    blocking_sleep = get_original("time", "sleep")

server = socket.create_server(("127.0.0.1", 0))
lock = threading.Lock()
lock.acquire()


@app.task(name="e2e.receives")
def receives():
    with socket.create_connection(server.getsockname()) as connection:
        connection.settimeout(WAIT_SECONDS)
        connection.recv(1)


@app.task(name="e2e.locks")
def locks():
    lock.acquire(timeout=WAIT_SECONDS)


@app.task(name="e2e.runs_process")
def runs_process():
    subprocess.run(["sleep", str(WAIT_SECONDS)], check=True)


@app.task(name="e2e.computes")
def computes():
    """Compute, and let other greenlets run now and then."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        compute()
        time.sleep(0.001)


def compute():
    sum(number * number for number in range(1000))


@app.task(name="e2e.holds")
def holds(kind, seconds):
    """Hold the hub for ``seconds`` and return how long it took."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        {"sleep": hold_by_sleep, "loop": hold_by_loop, "regex": hold_by_regex}[kind]()
    return time.perf_counter() - start


def hold_by_sleep():
    blocking_sleep(0.3)


def hold_by_loop():
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass


def hold_by_regex():
    re.match(r"(a*)*b", "a" * 22)


runtime = install_agent(engines=[CeleryEngineAdapter(celery_app=app)])
