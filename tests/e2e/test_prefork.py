"""Prefork workers: the runs of all children, and ends that only the parent or nobody reports."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.toxics import Proxy, Refused
from z4j_bare.demo.process import until

pytestmark = pytest.mark.timeout(120)

#: Options with which a worker has no event dispatcher.
QUIET = ("--without-gossip", "--without-mingle", "--without-heartbeat")

#: Sends the tasks that are named by its arguments, and writes their ids.
SEND = """
import sys
from prefork_app import app
for name in sys.argv[1:]:
    print(app.send_task("e2e." + name, args=[1, 2] if name == "add" else []).id)
"""


@pytest.fixture(scope="module")
def host(project):
    """A worker without Celery's own events, whose children come and go."""
    options = (*QUIET, "--max-tasks-per-child", "3", "--autoscale", "3,1")
    worker = project.worker("prefork_app", pool="prefork", options=options)
    project.warm_up()
    return worker


def runs(project, number):
    """Run ``number`` tasks and return the set of their states in the brain."""
    sent = [project.send("add", each, 1) for each in range(number)]
    return {project.row(task_id)["state"] for task_id in sent}


def test_worker_without_dispatcher_reports_values(project, host):
    """Without Celery's events, and for a silenced task, rows are complete; results are values."""
    task_id, silent = project.send("add", 1, 2), project.send("silent")
    row = project.row(task_id, "success")
    assert (row["result"], row["args"]) == ({"sum": 3, "api_key": "[REDACTED]"}, [1, 2])
    assert project.kinds(task_id) == ["task.received", "task.started", "task.succeeded"]
    assert project.row(silent, "success")["result"] == "silent"
    assert runs(project, 12) == {"success"}  # in children of several generations


def test_violent_ends_have_class_and_message(project, host):
    """A hard time limit, a killed child and a rejected message are failures of the right class,
    each reported once; of what a vanished child had stored or returned, the truth is shown.
    """
    names = ("hangs", "killed", "rejects", "killed_once", "stored")
    ids = {name: project.send(name) for name in names}
    for name, exception, message in (
        ("hangs", "TimeLimitExceeded", "1"),
        ("killed", "WorkerLostError", "SIGKILL"),
        ("rejects", "Reject", "unwanted"),
    ):
        row = project.row(ids[name], "failure")
        assert row["exception"].startswith(exception), row["exception"]
        assert message in row["exception"] + str(row["traceback"]), row
    again = project.row(ids["killed_once"], "success")
    assert again["result"] == "second run"
    stored = project.row(ids["stored"], "success")
    assert stored["result"] == "stored"
    for name in names[:3]:
        assert project.kinds(ids[name]).count("task.failed") == 1
    assert project.kinds(ids["killed_once"]) == [
        "task.received",
        "task.received",
        "task.retried",
        "task.started",
        "task.started",
        "task.succeeded",
    ]


def test_runs_among_short_runs_are_started_in_time(project, host):
    """While short runs keep the parent reading, a long run is shown as started before its end,
    and a run whose child is killed at once has its start and its failure.
    """
    long, killed = project.send("naps", 5), project.send("killed")
    began, short = time.monotonic(), []

    def state():
        short.append(project.send("add", 1, 1))
        return (project.brain.task(project.slug, "celery", long) or {}).get("state")

    until(lambda: state() == "started", "the start of a long run", timeout=30, interval=0.05)
    assert time.monotonic() - began < 5
    project.row(killed, "failure")
    assert project.kinds(killed) == ["task.failed", "task.received", "task.started"]
    assert project.row(long, "success")["result"] == "rested"
    assert {project.row(task_id)["state"] for task_id in short} == {"success"}


def test_restarted_pool_and_worker_report(project, host):
    """Children of a restarted pool, and of a worker that SIGHUP started again, are reported."""
    control = project.producer.control
    control.broadcast("pool_restart", arguments={"reload": False})
    assert runs(project, 3) == {"success"}
    offset = len(host.output())
    os.kill(host.pid, signal.SIGHUP)
    until(lambda: "ready." in host.output()[offset:], "the restarted worker", timeout=40)
    assert runs(project, 3) == {"success"}


def test_broker_outage_loses_no_end(brain, redis_url, fresh_project):
    """Tasks that end while the broker is away are successes when it is back."""
    project = fresh_project
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    proxy = Proxy(port)
    try:
        through = project.redis_url.replace(f":{port}/", f":{proxy.port}/")
        environment = {"DEMO_BROKER": through, "BACKEND": f"file://{project.home}/results"}
        (project.home / "results").mkdir(exist_ok=True)
        project.worker("prefork_app", pool="prefork", environment=environment, options=QUIET)
        # No more than children: on Redis, what a worker had prefetched comes back after an hour.
        sent = [project.send("naps", 5) for _ in range(2)]
        for task_id in sent:
            project.row(task_id, "started")
        with proxy.inject(Refused()):
            time.sleep(7)  # The tasks end.
        sent += [project.send("naps", 0) for _ in range(10)]
        assert {project.row(task_id)["state"] for task_id in sent} == {"success"}
    finally:
        proxy.close()


def test_sqlalchemy_broker_without_event_loop(fresh_project):
    """On a broker without an event loop, and without events, the children are reported."""
    project = fresh_project
    database = f"sqla+sqlite:///{project.home}/broker.sqlite"
    environment = {
        "DEMO_BROKER": database,
        "BACKEND": f"db+sqlite:///{project.home}/results.sqlite",
    }
    project.worker("prefork_app", pool="prefork", environment=environment)
    # In a process of its own, because importing SQLAlchemy's transport warns.
    variables = {**project.environment(agent=False), **environment, "Z4J_DISABLED": "1"}
    command = [sys.executable, "-c", SEND, "add", "silent", "rejects", "add"]
    sent = subprocess.run(
        command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    states = [project.row(task_id)["state"] for task_id in sent]
    assert states == ["success", "success", "failure", "success"]


def test_spawned_children_are_reported(fresh_project):
    """Children that are started instead of forked reach the agent through a named pipe."""
    project = fresh_project
    worker = project.worker(
        "prefork_app", pool="prefork", environment={"START_METHOD": "spawn"}, options=QUIET
    )
    assert runs(project, 4) == {"success"}
    pipes = list((project.home / "agent").glob("channel-*/pipe"))
    assert [path.stat().st_mode & 0o777 for path in pipes] == [0o600]
    worker.stop()
    assert not list((project.home / "agent").glob("channel-*"))
