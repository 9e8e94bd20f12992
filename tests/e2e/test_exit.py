"""The exit of a process with the agent: cold shutdown, script end, and an unresponsive brain."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.support.e2e_project import APPS
from z4j_bare.demo.process import until
from z4j_bare.demo.worker import POOLS, worker_environment

pytestmark = pytest.mark.timeout(120)

#: Pools whose cold shutdown interrupts a running task; threads waits for it even without an agent.
INTERRUPTING = frozenset(POOLS) - {"threads"}


@contextmanager
def silent_listener():
    """Accept connections without responding; yield the port and the accepted sockets."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1], accepted
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for each in accepted:
        each.close()


@pytest.mark.parametrize("pool", POOLS)
def test_cold_shutdown_loses_no_finished_task(pool, fresh_project):
    """SIGQUIT ends a worker in bounded time, and the brain has the tasks that had finished."""
    project = fresh_project
    worker = project.worker(pool=pool)
    project.warm_up()
    finished = [project.send("add", number, 1) for number in range(5)]
    assert {project.outcome(task_id)[0] for task_id in finished} == {"SUCCESS"}
    if pool in INTERRUPTING:
        project.send("wait", 60)
        until((project.home / "wait.started").exists, "the running task", timeout=30)
    began = time.monotonic()
    os.kill(worker.pid, signal.SIGQUIT)
    until(lambda: not worker.running, "the worker's end", timeout=30)
    assert time.monotonic() - began < 15
    known = {row["task_id"]: row["state"] for row in project.brain.tasks(project.slug)}
    assert {known.get(task_id) for task_id in finished} == {"success"}
    assert "cannot switch" not in worker.output()


def test_unresponsive_brain_does_not_delay_worker(fresh_project):
    """With a brain that never responds tasks run in every pool, and SIGTERM ends the worker."""
    project = fresh_project
    with silent_listener() as (port, accepted), ThreadPoolExecutor(len(POOLS)) as threads:
        url = {"Z4J_BRAIN_URL": f"http://127.0.0.1:{port}"}

        def start(pool):
            return project.worker(
                pool=pool, name=f"{pool}@e2e", environment=url, options=("-Q", pool)
            )

        def stop(worker):
            began = time.monotonic()
            return worker.stop(timeout=30), time.monotonic() - began

        workers = list(threads.map(start, POOLS))
        sent = [project.send("add", 1, 2, queue=pool) for pool in POOLS]
        assert [project.outcome(task_id) for task_id in sent] == [("SUCCESS", 3)] * len(POOLS)
        until(lambda: len(accepted) >= len(POOLS), "a connection of each", timeout=20)
        ends = dict(zip(POOLS, threads.map(stop, workers), strict=True))
    assert {pool: code for pool, (code, _seconds) in ends.items()} == dict.fromkeys(POOLS, 0)
    assert all(seconds < 20 for _code, seconds in ends.values()), ends
    for worker in workers:
        assert "z4j_bare/" not in worker.output(), "a traceback through this package"


def test_events_of_ended_script_arrive(fresh_project):
    """The events of a script that does not stop its agent arrive, and its exit code is kept."""
    project = fresh_project
    ids = [f"script-{number}" for number in range(20)]
    done = subprocess.run(
        [sys.executable, str(APPS / "script.py"), *ids],
        env=worker_environment(project.environment()),
        cwd=project.home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = project.brain.tasks(project.slug)
    assert {row["task_id"]: row["name"] for row in rows} == dict.fromkeys(ids, "e2e.script")


def test_script_with_unresponsive_brain_ends(fresh_project):
    """With a brain that never responds a script ends within the agent's stop timeout."""
    project = fresh_project
    with silent_listener() as (port, _accepted):
        environment = project.environment(Z4J_BRAIN_URL=f"http://127.0.0.1:{port}")
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(APPS / "script.py"), "one"],
            env=worker_environment(environment),
            cwd=project.home,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0
        assert time.monotonic() - began < 20
