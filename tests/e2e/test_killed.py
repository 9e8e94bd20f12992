"""A worker ends while tasks run: what the dashboard shows of them afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from z4j_bare.demo.process import HarnessError, clean_environment, until

POOLS = ("threads", "gevent", "eventlet", "prefork")

#: Seconds after which the parent of a prefork worker knows what its children run.
CHANNEL_SECONDS = 1.0

#: Seconds after which Redis delivers a message of the dead worker to the next one, at its start.
VISIBILITY_TIMEOUT = 1


def kill(worker):
    """Kill a worker and return the time."""
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not worker.running, "the worker's end", timeout=10)
    return datetime.now(UTC)


def start_and_kill(project, pool):
    """Kill a worker in which an early and a late acknowledged task run, and one that just started.

    Returns the time and the ids of the three, and of a task that has succeeded.
    """
    worker = project.worker("killable", pool=pool, name="w1@e2e", concurrency=4)
    project.warm_up()
    done = project.send("add", 1, 2)
    early, late = project.send("holds", "early"), project.send("holds_late", "late")
    for task_id, state in ((done, "success"), (early, "started"), (late, "started")):
        project.row(task_id, state)
    sudden = project.send("holds", "sudden")
    until((project.home / "sudden.started").exists, "the task's start", timeout=20, interval=0.005)
    if pool == "prefork":
        time.sleep(CHANNEL_SECONDS)
    return kill(worker), early, late, sudden, done


def start_next(project, pool):
    """Start the next worker. Redis delivers the message of a late acknowledged task to it again.

    In a green pool only a poll without an event makes Redis do so. Mingling makes such a poll.
    """
    timeout = {"VISIBILITY_TIMEOUT": str(VISIBILITY_TIMEOUT)}
    project.worker("killable", pool=pool, name="w2@e2e", environment=timeout, mingle=True)


def finished_at(row):
    return datetime.fromisoformat(row["finished_at"]).replace(tzinfo=UTC)


@pytest.mark.parametrize("pool", POOLS)
def test_next_worker_reports_runs_of_killed_worker(pool, fresh_project):
    """Acknowledged early: failure, also right after the start. Late: retry, then the outcome of the
    second run. A success stays one.
    """
    project = fresh_project
    killed_at, early, late, sudden, done = start_and_kill(project, pool)
    (project.home / "late.end").touch()
    time.sleep(1)  # a report with the time of the next agent would be later than the death
    start_next(project, pool)
    for task_id in (early, sudden):
        row = project.row(task_id, "failure")
        assert (row["name"], row["exception"]) == ("e2e.holds", "WorkerLostError")
        assert row["worker_name"] == "w1@e2e"
        assert row["started_at"] <= row["finished_at"]
        assert finished_at(row) <= killed_at
    failed = [
        event["payload"]
        for event in project.brain.events(project.slug, "celery", early)
        if event["kind"] == "task.failed"
    ]
    assert [each["exception_message"] for each in failed] == [
        "the worker process died while it ran"
    ]
    row = project.row(late, "success")
    assert (row["result"], row["worker_name"]) == ("late", "w2@e2e")
    until(lambda: "task.retried" in project.kinds(late), "the report of the first run", timeout=20)
    time.sleep(0.5)
    assert project.row(late)["state"] == "success", "the report does not set back the second run"
    assert project.row(done)["state"] == "success"
    until(
        lambda: len(list(project.home.glob("**/*.runs"))) == 1,
        "the deletion of the dead file",
        timeout=20,
    )


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_next_worker_reports_runs_of_stopped_worker(pool, fresh_project):
    """After SIGQUIT, a task that Celery calls retried is shown so. The next worker reports the
    other runs like those of a killed worker.
    """
    project = fresh_project
    worker = project.worker("killable", pool=pool, name="w1@e2e", concurrency=4)
    early, late = project.send("holds", "early"), project.send("holds_late", "late")
    for task_id in (early, late):
        project.row(task_id, "started")
    os.kill(worker.pid, signal.SIGQUIT)
    try:
        until(lambda: not worker.running, "the worker's end", timeout=10)
    except HarnessError:
        assert pool == "gevent", "Celery may wait for a greenlet that it failed to cancel"
        kill(worker)
    stopped_at = datetime.now(UTC)
    (project.home / "late.end").touch()
    start_next(project, pool)
    if pool == "prefork" or project.producer.AsyncResult(early).state == "RETRY":
        project.row(early, "retry")
        assert project.kinds(early) == ["task.received", "task.retried", "task.started"]
    else:
        row = project.row(early, "failure")
        assert (row["exception"], row["worker_name"]) == ("WorkerLostError", "w1@e2e")
        assert finished_at(row) <= stopped_at
    row = project.row(late)
    if row["state"] == "success":
        assert row["worker_name"] == "w2@e2e"
        assert "task.retried" in project.kinds(late)
    else:
        assert pool == "gevent", "Celery acknowledges the message of a greenlet that it cancels"
        assert row["exception"] == "WorkerLostError"


def test_flush_reports_runs_of_killed_worker(fresh_project):
    """``z4j-bare buffer flush`` reports them where no worker starts again."""
    project = fresh_project
    killed_at, early, late, sudden, done = start_and_kill(project, "gevent")
    command = [sys.executable, "-m", "z4j_bare", "buffer", "flush", "--json"]
    environment = {**clean_environment(), **project.agent.env(project.home / "agent")}
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert (answer["left"], answer["runs"], answer["error"]) == (0, 3, "")
    for task_id in (early, sudden):
        row = project.row(task_id, "failure")
        assert row["exception"] == "WorkerLostError"
        assert finished_at(row) <= killed_at
    assert project.row(late, "retry")["name"] == "e2e.holds_late"
    assert project.row(done)["state"] == "success"
    assert list(project.home.glob("**/*.runs")) == []
