"""The agent in a process of its own, beside workers that have none."""

import sys
from pathlib import Path

import pytest

from tests.support.e2e_project import E2EProject
from z4j_bare.demo.process import Service, until
from z4j_bare.demo.worker import worker_environment

pytestmark = pytest.mark.timeout(120)

REDACTED = "[REDACTED]"


@pytest.fixture(scope="module")
def project(brain, redis_url, tmp_path_factory):
    with E2EProject(brain, redis_url, tmp_path_factory.mktemp("standalone")) as here:
        yield here


@pytest.fixture(scope="module")
def agent(project):
    """``z4j-bare run`` with its secrets in files, logging everything, beside a worker that was there before."""
    project.worker("chores", pool="prefork", name="early@e2e", agent=False)
    files = {"--token-file": project.agent.token, "--hmac-secret-file": project.agent.hmac_secret}
    options = []
    for option, secret in files.items():
        path = project.home / option.strip("-")
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
        project.brain.url,
        "--project-id",
        project.slug,
        *options,
    ]
    environment = project.environment(agent=False, Z4J_HOME=str(project.home / "agent"))
    service = Service(
        "the agent",
        command,
        environment=worker_environment(environment),
        cwd=project.home,
        log=project.home / "agent.log",
    )
    with service:
        service.spawn(
            lambda: project.brain.agent(project.slug, project.agent.agent_id)["state"] == "online",
            40,
        )
        project.warm_up()
        yield service


def online(project):
    return {row["name"] for row in project.brain.workers(project.slug) if row["state"] == "online"}


def test_every_task_of_an_agentless_worker_is_told(project, agent):
    """All tasks have rows with their state, worker, start and end."""
    rows = [
        project.row(task_id, "success")
        for task_id in [project.send("add", number, 1) for number in range(20)]
    ]
    assert {row["worker_name"] for row in rows} == {"early@e2e"}
    assert all(row["started_at"] and row["finished_at"] and row["runtime_ms"] >= 20 for row in rows)
    row = project.row(project.send("fails", "broken"), "failure")
    assert ("ValueError" in row["exception"], row["worker_name"]) == (True, "early@e2e")


def test_its_rows_say_what_ran(project, agent):
    """Rows of an agentless worker's tasks have name, queue and arguments, their passwords hidden, and each event once."""
    task_id = project.send(
        "add", 2, 3, password="hunter2", note={"token": "abc", "plain": [1.5, None, "it's"]}
    )
    row = project.row(task_id, "success")
    assert project.kinds(task_id) == ["task.received", "task.started", "task.succeeded"]
    assert (row["name"], row["queue"], row["args"], row["result"]) == (
        "e2e.add",
        project.home.name,
        [2, 3],
        5,
    )
    assert row["kwargs"] == {
        "password": REDACTED,
        "note": {"token": REDACTED, "plain": [1.5, None, "it's"]},
    }
    assert row["received_at"] <= row["started_at"] <= row["finished_at"]
    assert "hunter2" not in str(project.brain.events(project.slug, "celery", task_id))


def test_what_cannot_be_read_gives_no_secret_away(project, agent):
    """Arguments that Celery cut in the middle keep their shape and say so, and a password before the cut is hidden."""
    row = project.row(
        project.send("add", 2, 3, password="hunter2", path="C:\\", long=["x" * 500] * 9), "success"
    )
    assert row["kwargs"]["password"] == REDACTED
    assert "cut]" in str(row["kwargs"])
    assert "hunter2" not in str(row)


def test_annotations_hold(project, agent):
    """``@z4j_meta`` keeps, hides and skips what its task asks for, here as inside a worker."""
    silent = [project.send("skipped"), project.send("unsampled")]
    keeps = project.send("keeps", "secret position", amount=12, customer="Ada")
    hides = project.send("hides", amount=12, customer="Ada")
    row = project.row(keeps, "success")
    assert (row["args"], row["kwargs"], row["priority"]) == (REDACTED, {"amount": 12}, "high")
    row = project.row(hides, "success")
    assert (row["kwargs"], row["result"]) == ({"amount": 12, "customer": REDACTED}, REDACTED)
    assert [project.outcome(task_id)[0] for task_id in silent] == ["SUCCESS", "SUCCESS"]
    project.row(
        project.send("add", 0, 0), "success"
    )  # sent later, so what was to come of the silent ones is here
    assert [project.brain.task(project.slug, "celery", task_id) for task_id in silent] == [
        None,
        None,
    ]


def test_retries_are_counted(project, agent):
    """A task that retries twice and then succeeds shows both retries, and has its arguments still."""
    task_id = project.send("retries")
    row = project.row(task_id, "success")
    assert (row["retry_count"], row["name"]) == (2, "e2e.retries")
    assert project.kinds(task_id).count("task.retried") == 2


def test_a_chain_knows_its_parents(project, agent):
    """The second task of a chain names the first as its parent and root."""
    link = project.producer.signature("e2e.add", args=(10,))
    second = (project.producer.signature("e2e.add", args=(1, 2)) | link).apply_async()
    row = project.row(second.id, "success")
    assert (row["parent_task_id"], row["root_task_id"]) == (second.parent.id, second.parent.id)


def test_the_brain_accepts_controls_for_a_worker_it_saw(project, agent):
    """The standalone agent announces the worker, so that the brain takes a pool-resize for it."""
    resize = project.brain.issue(
        project.slug,
        "pool-resize",
        agent_id=project.agent.agent_id,
        worker_name="early@e2e",
        delta=1,
    )
    assert resize["action"] == "pool_grow"


def test_a_worker_that_comes_later_is_told_too(project, agent):
    """A worker without ``-E`` that starts long after the agent is announced, sends its events and tells its queue."""
    project.worker("chores", pool="threads", name="late@e2e", agent=False, options=("-Q", "late"))
    until(lambda: "late@e2e" in online(project), "the announcement of the late worker", timeout=8)
    project.warm_up(queue="late")
    row = project.row(project.send("add", 1, 2, queue="late"), "success")
    assert (row["worker_name"], row["queue"], row["name"], row["args"]) == (
        "late@e2e",
        "late",
        "e2e.add",
        [1, 2],
    )
    resize = project.brain.issue(
        project.slug,
        "pool-resize",
        agent_id=project.agent.agent_id,
        worker_name="late@e2e",
        delta=1,
    )
    assert resize["action"] == "pool_grow"


def test_sigterm_ends_it_and_no_secret_shows(project, agent):
    """Last of all SIGTERM ends it with exit code 0; neither process list nor a log at DEBUG holds a secret."""
    process = Path("/proc") / str(agent.pid)
    public = (process / "cmdline").read_text() + (process / "environ").read_text()
    assert agent.stop() == 0
    assert "DEBUG" in agent.output()
    for secret in (project.agent.token, project.agent.hmac_secret):
        assert secret not in public
        assert secret not in agent.output()
    assert "Traceback" not in agent.output()
