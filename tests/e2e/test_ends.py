"""How tasks end in pools that run them in the worker's own process, as the brain shows it."""

import uuid

import pytest

from tests.support.e2e_project import E2EProject
from z4j_bare.demo.process import until

pytestmark = pytest.mark.timeout(120)

POOLS = ("gevent", "eventlet", "threads", "solo", "prefork")


@pytest.fixture(scope="module", params=POOLS)
def pool(request):
    """Celery's worker pool."""
    return request.param


@pytest.fixture(scope="module")
def project(pool, brain, redis_url, tmp_path_factory):
    """A project for the pool."""
    with E2EProject(brain, redis_url, tmp_path_factory.mktemp(pool)) as here:
        yield here


@pytest.fixture(scope="module", autouse=True)
def host(project, pool):
    """The pool's worker, with a second queue."""
    queues = ",".join((project.home.name, second(project)))
    worker = project.worker("ending", pool=pool, options=("-Q", queues))
    project.warm_up()
    return worker


def second(project):
    """The worker's second queue."""
    return project.home.name + "-second"


def kinds(project, task_id):
    return [kind.removeprefix("task.") for kind in project.kinds(task_id)]


def test_uuid_id_succeeds(project):
    """A task whose id is a ``uuid.UUID`` is found under the text of the id."""
    task_id = uuid.uuid4()
    project.producer.send_task("e2e.add", args=(2, 3), task_id=task_id)
    row = project.row(str(task_id), "success")
    assert (row["name"], row["args"], row["result"]) == ("e2e.add", [2, 3], 5)
    assert kinds(project, str(task_id)) == ["received", "started", "succeeded"]


@pytest.mark.parametrize("task", ["retries_masked", "replaces_masked"])
def test_masked_arguments_stay_hidden(project, task):
    """What ``argsrepr`` and ``kwargsrepr`` hide is neither in the brain nor in the buffer, also
    after a retry, and after a replacement with the same arguments.
    """
    task_id = project.producer.send_task(
        f"e2e.{task}",
        args=("quagga-1234",),
        kwargs={"note": "okapi 5678"},
        argsrepr="(<hidden>,)",
        kwargsrepr=repr({"note": "****"}),
    ).id
    row = project.row(task_id, "success")
    assert (row["args"], row["kwargs"]) == (["<hidden>"], {"note": "****"})
    # A replacement is retried too. The brain may drop events if two runs are in one second.
    assert kinds(project, task_id).count("received") >= 2
    events = str(project.brain.events(project.slug, "celery", task_id))
    files = b"".join(path.read_bytes() for path in (project.home / "agent").glob("*.sqlite*"))
    assert files
    for hidden in ("quagga", "okapi"):
        assert hidden not in events
        assert hidden.encode() not in files


def test_value_that_cannot_be_examined_costs_itself_alone(project):
    """A task whose result has a value that raises errors is a success, with the other values."""
    row = project.row(project.send("returns_failing_value"), "success")
    assert row["result"] == {"at": "<datetime.datetime>", "number": 3}


def test_unstored_results_are_failures(project):
    """What the result backend cannot store is a failure with the backend's error, once."""
    for task in ("unstored", "unstored_failure"):
        task_id = project.send(task)
        row = project.row(task_id, "failure")
        assert "ConnectionError" in row["exception"]
        assert "the backend is away" in row["traceback"]
        assert kinds(project, task_id) == ["failed", "received", "started"]


def test_ignored_task_is_revoked(project):
    """A task that raises ``Ignore`` is revoked, with the reason."""
    task_id = project.send("ignores")
    project.row(task_id, "revoked")
    events = project.brain.events(project.slug, "celery", task_id)
    assert [e["payload"]["reason"] for e in events if e["kind"] == "task.revoked"] == ["ignored"]


def test_rejected_task_is_failure(project):
    """A task that raises ``Reject`` is a failure with that exception, once."""
    task_id = project.send("rejects")
    row = project.row(task_id, "failure")
    assert "Reject" in row["exception"]
    assert kinds(project, task_id) == ["failed", "received", "started"]


def test_requeued_task_succeeds_without_flood(project):
    """A task that returns to its queue again and again has an event a second, and its end."""
    task_id = project.send("requeues", "requeued", 1.5)
    row = project.row(task_id, "success")
    assert row["started_at"]
    found = kinds(project, task_id)
    assert 2 <= found.count("retried") <= 3
    assert (found.count("received"), found.count("started"), found.count("succeeded")) == (1, 2, 1)


def test_retried_task_is_started_during_its_second_run(project, pool):
    """A retry that is signalled after the start of the second run does not hide that start."""
    task_id = project.send("retries_at_once", "retried", pool != "solo")
    expected = ["received", "received", "retried", "started", "started"]
    until(lambda: kinds(project, task_id) == expected, "the second run", timeout=20)
    assert project.row(task_id, "started", timeout=2)["retry_count"] == 1
    (project.home / "retried.end").touch()
    assert project.row(task_id, "success")["result"] == "second run"


def test_replacement_has_own_name_and_queue(project):
    """A task that replaces another one has one row with its own name, queue and annotations."""
    task_id = project.send("replaces", second(project))
    row = project.row(task_id, "success")
    assert (row["name"], row["queue"], row["args"], row["result"]) == (
        "e2e.final",
        second(project),
        [7],
        "[REDACTED]",
    )
    assert "revoked" not in kinds(project, task_id)
