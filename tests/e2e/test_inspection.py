"""``z4j-bare tasks`` and ``hub`` with real Celery workers."""

import json
import linecache
import os
import subprocess
import sys
import time

import pytest

from tests.support.e2e_project import APPS, E2EProject
from z4j_bare.control import ControlClient
from z4j_bare.demo.process import until

pytestmark = pytest.mark.timeout(120)

#: The tasks that wait or compute; the code of the lines where each of them may be; and the function
#: that green pools show as the wait.
WAITING = {
    "receives": (("connection.recv(1)",), "socket.recv"),
    "locks": (("lock.acquire(timeout=WAIT_SECONDS)",), ("Lock.acquire", "Semaphore.acquire")),
    "runs_process": (("subprocess.run(",), "subprocess.run"),
    "computes": (("compute()", "time.sleep(0.001)", "sum(", "while time.monotonic()"), ""),
}

#: The ways to hold the hub: an unpatched sleep, a Python loop, and a C function that keeps the
#: interpreter lock.
BLOCKERS = ("sleep", "loop", "regex")

#: Runs a program in a new pid namespace, as in another container.
IN_CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc")


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


def inspect(project, *arguments, prefix=()):
    """Run ``z4j-bare`` in the home of the project's agent and return its JSON document."""
    environment = {**os.environ, "Z4J_HOME": str(project.home / "agent")}
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "z4j_bare", *arguments, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ask(project, verb, **parameters):
    """Send a request to the worker's agent and return the answer."""
    (path,) = (project.home / "agent").glob("agent-*.sock")
    return ControlClient("bare", 0, path).request(verb, 20.0, parameters)


def test_tasks_are_found_where_they_wait(project, pool):
    """Each running task is listed with its age, its worker, and the line where it waits."""
    sent = {project.send(name): name for name in WAITING}

    def listed():
        (agent,) = inspect(project, "tasks", "--stack")["agents"]
        rows = {row["id"]: row for row in agent["tasks"] if row["id"] in sent}
        started = all(row.get("position") for row in rows.values()) or pool == "prefork"
        return rows if len(rows) == len(sent) and started else None

    rows = until(listed, "all tasks in the list", timeout=40, interval=0.5)
    for task_id, name in sent.items():
        row = rows[task_id]
        assert (row["name"], row["worker"]) == (f"e2e.{name}", "w@e2e")
        assert 0 <= row["age_seconds"] < 60
        if pool == "prefork":
            assert row["pid"]
            assert "position" not in row
            continue
        lines, waiting = WAITING[name]
        place, _, function = row["position"].partition(" in ")
        file, _, number = place.partition(":")
        assert (file, function) in (("inspectable.py", name), ("inspectable.py", "compute"))
        assert linecache.getline(str(APPS / file), int(number)).strip().startswith(lines)
        assert any(frame["function"] == name for frame in row["stack"])
        if pool != "threads":
            assert (row["waiting_in"] or "").startswith(waiting)
    for task_id in sent:
        project.producer.control.revoke(task_id, terminate=True)


def test_other_container_sees_tasks(project, pool):
    """A command with the same volume and another pid namespace lists the tasks of the worker."""
    if pool != "gevent":
        return  # the pool has no influence on the command
    if subprocess.run([*IN_CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot create a pid namespace")
    project.send("receives")

    def listed():
        document = inspect(project, "tasks", prefix=IN_CONTAINER)
        return document["agents"][0]["tasks"]

    rows = until(listed, "the task", timeout=40, interval=0.5)
    assert {row["worker"] for row in rows} == {"w@e2e"}
    (pid,) = {agent["pid"] for agent in inspect(project, "status")["agents"]}
    assert {row["pid"] for row in rows} == {pid}


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


def test_profile_names_what_holds_hub(project, pool):
    """A profile attributes the time of each hold to its code and its task, within 20 %."""
    if pool not in ("gevent", "eventlet"):
        assert not ask(project, "hub")["has_hub"]
        return
    assert ask(project, "hub", profile=100)["profiling"]
    held = {kind: project.run("holds", kind, 1.2)[1] for kind in BLOCKERS}

    def totals():
        holds = ask(project, "hub", result=True)["profile"]["holds"]
        found = {
            kind: sum(
                hold["total_seconds"]
                for hold in holds
                if hold["task"] == "e2e.holds" and f"hold_by_{kind}" in hold["place"]
            )
            for kind in BLOCKERS
        }
        return found if all(found.values()) else None

    assert until(totals, "all blockers", timeout=20) == pytest.approx(held, rel=0.2)
