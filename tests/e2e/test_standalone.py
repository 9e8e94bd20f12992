"""The standalone agent in its own process, beside workers without an agent."""

from pathlib import Path

import pytest

from tests.support.standalone import standalone_agent, start_standalone_agent
from z4j_bare.demo.process import until

pytestmark = pytest.mark.timeout(120)

REDACTED = "[REDACTED]"


@pytest.fixture(scope="module")
def agent(project):
    """``z4j-bare run`` at DEBUG with secrets in files, beside a worker that started earlier."""
    project.worker("sample_tasks", pool="prefork", name="early@e2e", agent=False)
    with standalone_agent(project, "sample_tasks:app") as service:
        start_standalone_agent(service, project)
        yield service


def online(project):
    """Return the names of the workers that the brain shows as online."""
    return {row["name"] for row in project.brain.workers(project.slug) if row["state"] == "online"}


def test_tasks_of_worker_without_agent_have_rows(project, agent):
    """All tasks have rows with state, worker, start and end."""
    rows = [
        project.row(task_id, "success")
        for task_id in [project.send("add", number, 1) for number in range(20)]
    ]
    assert {row["worker_name"] for row in rows} == {"early@e2e"}
    assert all(row["started_at"] and row["finished_at"] and row["runtime_ms"] >= 20 for row in rows)
    row = project.row(project.send("fails", "broken"), "failure")
    assert ("ValueError" in row["exception"], row["worker_name"]) == (True, "early@e2e")


def test_rows_of_worker_without_agent_are_complete(project, agent):
    """Rows have name, queue and redacted arguments, and each event occurs once."""
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


def test_truncated_arguments_are_redacted(project, agent):
    """Arguments that Celery truncated keep their structure, and a password in them is redacted."""
    row = project.row(
        project.send("add", 2, 3, password="hunter2", path="C:\\", long=["x" * 500] * 9), "success"
    )
    assert row["kwargs"]["password"] == REDACTED
    assert "cut]" in str(row["kwargs"])
    assert "hunter2" not in str(row)


def test_masked_arguments_stay_hidden(project, agent):
    """What ``argsrepr`` and ``kwargsrepr`` hide does not reach the brain."""
    task_id = project.producer.send_task(
        "e2e.add",
        args=(4929, 1234),
        kwargs={"note": "Alice: flu"},
        argsrepr="(<hidden>, <hidden>)",
        kwargsrepr=repr({"note": "****"}),
    ).id
    row = project.row(task_id, "success")
    assert (row["args"], row["kwargs"]) == (["<hidden>", "<hidden>"], {"note": "****"})
    events = str(project.brain.events(project.slug, "celery", task_id))
    assert "4929" not in events
    assert "Alice" not in events


def test_task_annotations_apply(project, agent):
    """``@z4j_meta`` keeps, redacts and skips values as it does inside a worker."""
    skipped = [project.send("skipped"), project.send("unsampled")]
    keeps = project.send("keeps", "secret position", amount=12, customer="Ada")
    hides = project.send("hides", amount=12, customer="Ada")
    row = project.row(keeps, "success")
    assert (row["args"], row["kwargs"], row["priority"]) == (REDACTED, {"amount": 12}, "high")
    row = project.row(hides, "success")
    assert (row["kwargs"], row["result"]) == ({"amount": 12, "customer": REDACTED}, REDACTED)
    assert [project.outcome(task_id)[0] for task_id in skipped] == ["SUCCESS", "SUCCESS"]
    # This task was sent later, so that events of the skipped tasks would have arrived before.
    project.row(project.send("add", 0, 0), "success")
    assert [project.brain.task(project.slug, "celery", task_id) for task_id in skipped] == [
        None,
        None,
    ]


def test_retries_are_counted(project, agent):
    """A task that retries twice shows both retries, and its row keeps the arguments."""
    task_id = project.send("retries")
    row = project.row(task_id, "success")
    assert (row["retry_count"], row["name"]) == (2, "e2e.retries")
    assert project.kinds(task_id).count("task.retried") == 2


def test_chained_task_has_parent_and_root(project, agent):
    """The second task of a chain has the first one as parent and root."""
    link = project.producer.signature("e2e.add", args=(10,))
    second = (project.producer.signature("e2e.add", args=(1, 2)) | link).apply_async()
    row = project.row(second.id, "success")
    assert (row["parent_task_id"], row["root_task_id"]) == (second.parent.id, second.parent.id)


def test_brain_accepts_control_for_announced_worker(project, agent):
    """The standalone agent announces the worker, so that the brain accepts a pool resize."""
    resize = project.brain.issue(
        project.slug,
        "pool-resize",
        agent_id=project.agent.agent_id,
        worker_name="early@e2e",
        delta=1,
    )
    assert resize["action"] == "pool_grow"


def test_later_worker_is_announced(project, agent):
    """A worker without ``-E`` that starts later is announced, and its events are reported."""
    project.worker(
        "sample_tasks", pool="threads", name="late@e2e", agent=False, options=("-Q", "late")
    )
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


def test_sigterm_stops_agent_without_exposing_secrets(project, agent):
    """SIGTERM ends the agent with code 0; process list and log contain no secret."""
    process = Path("/proc") / str(agent.pid)
    public = (process / "cmdline").read_text() + (process / "environ").read_text()
    assert agent.stop() == 0
    assert "DEBUG" in agent.output()
    for secret in (project.agent.token, project.agent.hmac_secret):
        assert secret not in public
        assert secret not in agent.output()
    assert "Traceback" not in agent.output()
