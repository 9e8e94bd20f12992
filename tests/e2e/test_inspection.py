"""``z4j-bare tasks`` and ``hub`` with real Celery workers."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.support.e2e_project import E2EProject
from z4j_bare.demo.process import until

pytestmark = pytest.mark.timeout(120)

#: The tasks that wait, and the function in which each of them waits.
WAITING = {
    "receives": "receives",
    "locks": "locks",
    "runs_process": "runs_process",
    "computes": "comput",
}


@pytest.fixture(scope="module", params=["gevent", "eventlet", "threads", "prefork"])
def pool(request):
    """Celery's worker pool."""
    return request.param


@pytest.fixture(scope="module")
def project(pool, brain, redis_url, tmp_path_factory):
    """A project for the pool, with a worker."""
    with E2EProject(brain, redis_url, tmp_path_factory.mktemp(pool)) as here:
        here.worker("inspectable", pool=pool, options=("-c", "8"))
        here.warm_up()
        yield here


def inspect(project, *arguments):
    """Run ``z4j-bare`` in the home of the project's agent and return its JSON document."""
    environment = {**os.environ, "Z4J_HOME": str(project.home / "agent")}
    done = subprocess.run(
        [sys.executable, "-m", "z4j_bare", *arguments, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tasks_are_found_where_they_wait(project, pool):
    """Each running task is listed with its age, its worker, and the line where it waits."""
    sent = {project.send(name): name for name in WAITING}

    def listed():
        (agent,) = inspect(project, "tasks", "--stack")["agents"]
        rows = {row["id"]: row for row in agent["tasks"] if row["id"] in sent}
        return rows if len(rows) == len(sent) else None

    rows = until(listed, "all tasks in the list", timeout=40, interval=0.5)
    for task_id, name in sent.items():
        row = rows[task_id]
        assert (row["name"], row["worker"]) == (f"e2e.{name}", "w@e2e")
        assert 0 <= row["age_seconds"] < 60
        if pool == "prefork":
            assert row["pid"]
            assert "position" not in row
        else:
            assert row["position"].partition(" in ")[2].startswith(WAITING[name])
            assert row["position"].startswith("inspectable.py:")
            assert any(frame["function"] == name for frame in row["stack"])
    for task_id in sent:
        project.producer.control.revoke(task_id, terminate=True)


def test_top_shows_busiest_and_failed_tasks(project, pool):
    """``top`` counts the ends of each task, and lists a failure by its class, without arguments."""
    task_id = project.send("fails", "4929-1234")
    project.row(task_id, "failure")

    def shown():
        document = inspect(project, "top", "--once")
        return document if document["failures"] else None

    document = until(shown, "the failure", timeout=20, interval=0.5)
    assert document["agents"][0]["workers"] == {"celery": ["w@e2e"]}
    (failed,) = document["failures"]
    assert (failed["name"], failed["exception"]) == ("e2e.fails", "ValueError")
    assert time.time() - 60 < failed["at"] <= time.time()
    busiest = {each["name"]: each for each in document["busiest"]}
    assert busiest["e2e.fails"]["failed"] == 1
    assert busiest["e2e.add"]["done"] >= 1
    assert "4929-1234" not in str(document)


@pytest.mark.parametrize("kind", ["sleep", "loop", "regex"])
def test_profile_names_what_holds_hub(project, pool, kind):
    """A profile assigns the time of a hold to its code and its task, within 20 %."""
    if pool not in ("gevent", "eventlet"):
        (agent,) = inspect(project, "hub")["agents"]
        assert not agent["has_hub"]
        return
    profile = subprocess.Popen(
        [sys.executable, "-m", "z4j_bare", "hub", "--profile", "4", "--json"],
        env={**os.environ, "Z4J_HOME": str(project.home / "agent")},
        stdout=subprocess.PIPE,
        text=True,
    )
    with profile:
        until(lambda: profiling(project), "a running profile", timeout=20, interval=0.1)
        _, held = project.run("holds", kind, 1.2)
        (agent,) = json.loads(profile.communicate(timeout=60)[0])["agents"]
    rows = [row for row in agent["profile"]["holds"] if row["task"] == "e2e.holds"]
    total = sum(row["total_seconds"] for row in rows if f"hold_by_{kind}" in row["place"])
    assert total == pytest.approx(held, rel=0.2)


def profiling(project):
    """Return whether the agent records a profile."""
    (agent,) = inspect(project, "hub")["agents"]
    return agent["profiling"]
