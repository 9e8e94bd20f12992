"""The agent in a process of its own, beside workers that have none."""

import sys
from pathlib import Path

import pytest

from tests.support.e2e_project import Place
from z4j_bare.demo.process import Service, until
from z4j_bare.demo.worker import worker_environment

pytestmark = pytest.mark.timeout(120)

REDACTED = "[REDACTED]"


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
    command = [
        sys.executable,
        "-m",
        "z4j_bare",
        "--log-level",
        "DEBUG",
        "run",
        "--engine",
        "celery",
    ]
    command += [
        "--app",
        "chores:app",
        "--brain-url",
        place.brain.url,
        "--project-id",
        place.project,
        *options,
    ]
    environment = place.environment(agent=False, Z4J_HOME=str(place.home / "agent"))
    service = Service(
        "the agent",
        command,
        environment=worker_environment(environment),
        cwd=place.home,
        log=place.home / "agent.log",
    )
    with service:
        service.spawn(
            lambda: place.brain.agent(place.project, place.agent.agent_id)["state"] == "online", 40
        )
        place.warm_up()
        yield service


def online(place):
    return {row["name"] for row in place.brain.workers(place.project) if row["state"] == "online"}


def test_every_task_of_an_agentless_worker_is_told(place, agent):
    """All tasks have rows with their state, worker, start and end."""
    rows = [
        place.row(task_id, "success")
        for task_id in [place.send("add", number, 1) for number in range(20)]
    ]
    assert {row["worker_name"] for row in rows} == {"early@place"}
    assert all(row["started_at"] and row["finished_at"] and row["runtime_ms"] >= 20 for row in rows)
    row = place.row(place.send("fails", "broken"), "failure")
    assert ("ValueError" in row["exception"], row["worker_name"]) == (True, "early@place")


def test_its_rows_say_what_ran(place, agent):
    """Rows of an agentless worker's tasks have name, queue and arguments, their passwords hidden, and each event once."""
    task_id = place.send(
        "add", 2, 3, password="hunter2", note={"token": "abc", "plain": [1.5, None, "it's"]}
    )
    row = place.row(task_id, "success")
    assert place.kinds(task_id) == ["task.received", "task.started", "task.succeeded"]
    assert (row["name"], row["queue"], row["args"], row["result"]) == (
        "e2e.add",
        place.home.name,
        [2, 3],
        5,
    )
    assert row["kwargs"] == {
        "password": REDACTED,
        "note": {"token": REDACTED, "plain": [1.5, None, "it's"]},
    }
    assert row["received_at"] <= row["started_at"] <= row["finished_at"]
    assert "hunter2" not in str(place.brain.events(place.project, "celery", task_id))


def test_what_cannot_be_read_gives_no_secret_away(place, agent):
    """Arguments that Celery cut in the middle keep their shape and say so, and a password before the cut is hidden."""
    row = place.row(
        place.send("add", 2, 3, password="hunter2", path="C:\\", long=["x" * 500] * 9), "success"
    )
    assert row["kwargs"]["password"] == REDACTED
    assert "cut]" in str(row["kwargs"])
    assert "hunter2" not in str(row)


def test_annotations_hold(place, agent):
    """``@z4j_meta`` keeps, hides and skips what its task asks for, here as inside a worker."""
    silent = [place.send("skipped"), place.send("unsampled")]
    keeps = place.send("keeps", "secret position", amount=12, customer="Ada")
    hides = place.send("hides", amount=12, customer="Ada")
    row = place.row(keeps, "success")
    assert (row["args"], row["kwargs"], row["priority"]) == (REDACTED, {"amount": 12}, "high")
    row = place.row(hides, "success")
    assert (row["kwargs"], row["result"]) == ({"amount": 12, "customer": REDACTED}, REDACTED)
    assert [place.outcome(task_id)[0] for task_id in silent] == ["SUCCESS", "SUCCESS"]
    place.row(
        place.send("add", 0, 0), "success"
    )  # sent later, so what was to come of the silent ones is here
    assert [place.brain.task(place.project, "celery", task_id) for task_id in silent] == [
        None,
        None,
    ]


def test_retries_are_counted(place, agent):
    """A task that retries twice and then succeeds shows both retries, and has its arguments still."""
    task_id = place.send("retries")
    row = place.row(task_id, "success")
    assert (row["retry_count"], row["name"]) == (2, "e2e.retries")
    assert place.kinds(task_id).count("task.retried") == 2


def test_a_chain_knows_its_parents(place, agent):
    """The second task of a chain names the first as its parent and root."""
    link = place.producer.signature("e2e.add", args=(10,))
    second = (place.producer.signature("e2e.add", args=(1, 2)) | link).apply_async()
    row = place.row(second.id, "success")
    assert (row["parent_task_id"], row["root_task_id"]) == (second.parent.id, second.parent.id)


def test_the_brain_accepts_controls_for_a_worker_it_saw(place, agent):
    """The standalone agent announces the worker, so that the brain takes a pool-resize for it."""
    resize = place.brain.issue(
        place.project,
        "pool-resize",
        agent_id=place.agent.agent_id,
        worker_name="early@place",
        delta=1,
    )
    assert resize["action"] == "pool_grow"


def test_a_worker_that_comes_later_is_told_too(place, agent):
    """A worker without ``-E`` that starts long after the agent is announced, sends its events and tells its queue."""
    place.worker("chores", pool="threads", name="late@place", agent=False, options=("-Q", "late"))
    until(lambda: "late@place" in online(place), "the announcement of the late worker", timeout=8)
    place.warm_up(queue="late")
    row = place.row(place.send("add", 1, 2, queue="late"), "success")
    assert (row["worker_name"], row["queue"], row["name"], row["args"]) == (
        "late@place",
        "late",
        "e2e.add",
        [1, 2],
    )
    resize = place.brain.issue(
        place.project,
        "pool-resize",
        agent_id=place.agent.agent_id,
        worker_name="late@place",
        delta=1,
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
