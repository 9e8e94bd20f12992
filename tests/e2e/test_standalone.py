"""The agent in a process of its own, beside workers that have none."""

import sys
from pathlib import Path

import pytest

from tests.e2e.place import Place
from z4j_bare.demo.process import Service
from z4j_bare.demo.worker import worker_environment

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def place(brain, redis_url, tmp_path_factory):
    with Place(brain, redis_url, tmp_path_factory.mktemp("standalone")) as here:
        yield here


@pytest.fixture(scope="module")
def agent(place):
    """``z4j-bare run`` with its secrets in files, logging everything, beside a worker that was there before."""
    place.worker("chores", pool="prefork", name="early@place", agent=False)
    files = {"--token-file": place.agent.token, "--hmac-secret-file": place.agent.hmac_secret}
    options = []
    for option, secret in files.items():
        path = place.home / option.strip("-")
        path.write_text(secret + "\n")
        options += [option, str(path)]
    command = [sys.executable, "-m", "z4j_bare", "--log-level", "DEBUG", "run", "--engine", "celery"]
    command += ["--app", "chores:app", "--brain-url", place.brain.url, "--project-id", place.project, *options]
    environment = place.environment(agent=False, Z4J_HOME=str(place.home / "agent"))
    service = Service(
        "the agent", command, environment=worker_environment(environment), cwd=place.home, log=place.home / "agent.log"
    )
    with service:
        service.spawn(lambda: place.brain.agent(place.project, place.agent.agent_id)["state"] == "online", 40)
        place.warm_up()
        yield service


def rows_of(place, count):
    return [place.row(task_id, "success") for task_id in [place.send("add", number, 1) for number in range(count)]]


def test_every_task_of_an_agentless_worker_is_told(place, agent):
    """All tasks have rows with their state, worker, start and end."""
    rows = [place.row(task_id, "success") for task_id in [place.send("add", number, 1) for number in range(20)]]
    assert {row["worker_name"] for row in rows} == {"early@place"}
    assert all(row["started_at"] and row["finished_at"] and row["runtime_ms"] >= 20 for row in rows)
    row = place.row(place.send("fails", "broken"), "failure")
    assert ("ValueError" in row["exception"], row["worker_name"]) == (True, "early@place")


@pytest.mark.xfail(reason="the adapter's monitor drops task-received, the only broker event with name and arguments")
def test_its_rows_say_what_ran(place, agent):
    """Rows of an agentless worker's tasks have name, queue and arguments."""
    row = place.row(place.send("add", 2, 3), "success")
    assert (row["name"], row["queue"], row["args"]) == ("e2e.add", place.home.name, [2, 3])


def test_the_brain_accepts_controls_for_a_worker_it_saw(place, agent):
    """The standalone agent announces the worker, so that the brain takes a pool-resize for it."""
    resize = place.brain.issue(
        place.project, "pool-resize", agent_id=place.agent.agent_id, worker_name="early@place", delta=1
    )
    assert resize["action"] == "pool_grow"


def test_a_worker_that_comes_later_is_told_too(place, agent):
    """A worker without ``-E`` that starts long after the agent is made to send its events, and is announced."""
    place.worker("chores", pool="threads", name="late@place", agent=False, options=("-Q", "late"))
    place.warm_up(queue="late")
    assert place.row(place.send("add", 1, 2, queue="late"), "success")["worker_name"] == "late@place"
    resize = place.brain.issue(
        place.project, "pool-resize", agent_id=place.agent.agent_id, worker_name="late@place", delta=1
    )
    assert resize["action"] == "pool_grow"


def test_sigterm_ends_it_and_no_secret_shows(place, agent):
    """Last of all SIGTERM ends it with exit code 0; neither process list nor a log at DEBUG holds a secret."""
    process = Path("/proc") / str(agent.pid)
    public = (process / "cmdline").read_text() + (process / "environ").read_text()
    assert agent.stop() == 0
    assert "DEBUG" in agent.output()
    for secret in (place.agent.token, place.agent.hmac_secret):
        assert secret not in public
        assert secret not in agent.output()
    assert "Traceback" not in agent.output()
