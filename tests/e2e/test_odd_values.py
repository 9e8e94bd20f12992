"""A brain on PostgreSQL has the true state of every task, whatever its values, ids and names."""

import uuid

import pytest

from tests.support.e2e_project import FINISHED, E2EProject
from tests.support.odd_values import IDS, NAMES, QUEUES, TEXTS, VALUES, WORKER
from z4j_bare.demo.process import until
from z4j_bare.wire.fit import fit_id

pytestmark = pytest.mark.timeout(180)

TAKES, RETURNS, RAISES, RETRIES = "odd.takes", "odd.returns", "odd.raises", "odd.retries"

#: Every case: its name, and the message's task, id, queue and other options.
CASES = {
    **{f"argument: {name}": (TAKES, {"args": [each]}) for name, each in VALUES.items()},
    **{f"keyword: {name}": (TAKES, {"kwargs": {"x": each}}) for name, each in VALUES.items()},
    "keyword with nul": (TAKES, {"kwargs": {"k\x00y": 1}}),
    **{f"result: {name}": (RETURNS, {"args": [name]}) for name in VALUES},
    **{f"exception: {name}": (RAISES, {"args": [name]}) for name in TEXTS},
    **{f"retry: {name}": (RETRIES, {"args": [name]}) for name in TEXTS},
    **{f"id: {name}": (TAKES, {"task_id": each}) for name, each in IDS.items()},
    **{
        f"parent and root: {name}": (TAKES, {"parent_id": each + "p", "root_id": each + "r"})
        for name, each in IDS.items()
    },
    **{f"name: {name}": (each, {}) for name, each in NAMES.items()},
    **{f"queue: {name}": (TAKES, {"queue": each}) for name, each in QUEUES.items()},
}


@pytest.fixture(scope="module")
def project(postgres_brain, redis_url, tmp_path_factory):
    """A project of a brain on PostgreSQL, with a worker whose name is too long."""
    with E2EProject(postgres_brain, redis_url, tmp_path_factory.mktemp("odd")) as project:
        project.host = project.worker("odd_app", pool="threads", name=WORKER)
        yield project


@pytest.fixture(scope="module")
def rows(project):
    """The brain's rows by case, once all that will come have come."""
    sent = {}
    for case, (name, options) in CASES.items():
        options = {"task_id": f"t-{len(sent)}", **options}
        project.producer.send_task(name, **options)
        # The brain removes spaces at the start and the end of an id.
        sent[case] = fit_id(options["task_id"], "celery").strip()
    last = str(project.producer.send_task(TAKES).id)

    def complete():
        found = {row["task_id"]: row for row in project.brain.tasks(project.slug)}
        known = {case: found.get(task_id) for case, task_id in sent.items()}
        missing = [case for case, row in known.items() if not row or row["state"] not in FINISHED]
        if last in found and found[last]["state"] == "success":
            waited.append(1)
        return known if not missing or len(waited) > 20 else None

    waited = []
    return until(complete, "the rows", timeout=90, interval=0.25)


@pytest.fixture(scope="module")
def restarted(project):
    """The worker is another process, which has reported no task with a changed id."""
    before = project.sessions()
    project.host.stop()
    project.host = project.worker("odd_app", pool="threads", name=WORKER)
    until(lambda: project.sessions().keys() - before.keys(), "a new session", timeout=30)


@pytest.mark.parametrize("case", CASES)
def test_row_has_true_state(rows, case):
    """The row has the state that the task ended with, and its name, queue and worker."""
    name, options = CASES[case]
    row = rows[case]
    assert row, "no row"
    failed = case.startswith("exception")
    assert row["state"] == ("failure" if failed else "success")
    assert row["name"] == name.replace("\0", "\ufffd")[:500]
    assert row["worker_name"] == WORKER[:200]
    if "queue" in options:
        assert row["queue"] == options["queue"].replace("\0", "\ufffd")[:200]
    assert row["received_at"]
    assert row["started_at"]
    assert row["finished_at"]
    if "parent_id" in options:
        assert row["parent_task_id"] == fit_id(options["parent_id"], "celery")
        assert row["root_task_id"] == fit_id(options["root_id"], "celery")
    if case.startswith("retry"):
        assert row["retry_count"] == 1
    if failed:
        assert "ValueError" in row["exception"]


@pytest.mark.parametrize(
    ("case", "kind", "changed"),
    [
        ("argument: unicode", "task.received", []),
        ("argument: written nul", "task.received", ["nul"]),
        ("argument: nul in key", "task.received", ["nul"]),
        ("argument: nul in key", "task.succeeded", []),
        ("result: nul", "task.succeeded", ["nul"]),
        ("exception: nul", "task.failed", ["nul"]),
        ("id: 250 characters", "task.started", ["task_id"]),
        ("parent and root: 250 characters", "task.received", ["parent_task_id", "root_task_id"]),
        ("name: 501 characters", "task.started", ["task_name"]),
        ("queue: 300 characters", "task.succeeded", ["queue"]),
    ],
)
def test_events_list_what_was_changed(project, rows, case, kind, changed):
    """An event lists its changed parts; here the worker is always one of them."""
    events = project.brain.events(project.slug, "celery", rows[case]["task_id"])
    (payload,) = [event["payload"] for event in events if event["kind"] == kind]
    assert sorted(payload["fitted"]) == sorted([*changed, "worker"])


def test_worker_has_details(project, rows):
    """The worker's details arrive, although a name among them contains NUL."""

    def found():
        (row,) = project.brain.workers(project.slug)
        return row if row["pid"] else None

    row = until(found, "the worker's details", timeout=60, interval=0.5)
    assert (row["name"], row["pid"]) == (WORKER[:200], project.host.pid)


def command(project, route, task_id):
    """Issue a command for a task and return its finished row."""
    issued = project.brain.issue(
        project.slug,
        route,
        agent_id=project.agent.agent_id,
        engine="celery",
        task_id=fit_id(task_id, "celery"),
    )
    return project.brain.wait_command(project.slug, issued["id"])


@pytest.mark.parametrize("task_id", ["c" * 250, "c\0" * 80], ids=["long", "nul"])
def test_task_with_changed_id_can_be_cancelled(project, rows, task_id):
    """A cancelled task is revoked, although the brain does not have its true id."""
    project.producer.send_task(TAKES, task_id=task_id, countdown=4)
    project.row(fit_id(task_id, "celery"), "received")
    assert command(project, "cancel-task", task_id)["status"] == "completed"
    project.row(fit_id(task_id, "celery"), "revoked")


def test_task_with_uuid_as_id_can_be_cancelled_and_retried(project, rows):
    """The commands find a task whose id is a ``uuid.UUID`` by the id's text."""
    cancelled, again = uuid.uuid4(), uuid.uuid4()
    project.producer.send_task(TAKES, task_id=cancelled, countdown=8)
    project.producer.send_task(TAKES, task_id=again)
    project.row(str(cancelled), "received")
    done = command(project, "cancel-task", str(cancelled))
    assert done["status"] == "completed", done
    project.row(str(cancelled), "revoked")
    project.row(str(again), "success")
    done = command(project, "retry-task", str(again))
    assert done["status"] == "completed", done
    assert project.row(done["result"]["new_task_id"], "success")["name"] == TAKES


def test_task_with_changed_id_can_be_retried(project, rows):
    """A retried task runs again with its true arguments, which the result backend has."""
    task_id = IDS["250 characters"]
    done = command(project, "retry-task", task_id)
    assert done["status"] == "completed", done
    assert project.row(done["result"]["new_task_id"], "success")["name"] == TAKES


@pytest.mark.parametrize("route", ["cancel-task", "retry-task"])
def test_command_for_unknown_changed_id_fails(project, rows, restarted, route):
    """Another process refuses a changed id: Celery would revoke it and report success."""
    done = command(project, route, IDS["250 characters"])
    assert done["status"] == "failed"
    assert "does not know the original" in done["error"]
