"""One worker per pool on Redis: what its agent delivers, executes and must not disturb."""

import os
import signal
import time

import pytest

from tests.support.e2e_project import E2EProject
from z4j_bare.demo.process import until
from z4j_bare.demo.worker import CONCURRENCY, POOLS

pytestmark = pytest.mark.timeout(120)

#: Subsets are prefixes of POOLS, because pytest groups tests by the parameter's position.
GREEN = POOLS[:2]
TERMINATING = POOLS[:2]
FORKING = POOLS[:3]
REDACTED = "[REDACTED]"

#: A name on the command line, and in the brain, which redacts a host with dots as an address.
DOTTED = ("w@web-1.example.com", "w@web-1_example_com")
NAMES = {"gevent": DOTTED, "prefork": DOTTED}


@pytest.fixture(scope="module", params=POOLS)
def pool(request):
    """Celery's worker pool."""
    return request.param


@pytest.fixture(scope="module")
def project(pool, brain, redis_url, tmp_path_factory):
    """A project for the pool."""
    with E2EProject(brain, redis_url, tmp_path_factory.mktemp(pool)) as here:
        yield here


@pytest.fixture(scope="module")
def names(pool):
    """The worker's name on the command line, and its name in the brain."""
    return NAMES.get(pool, ("w@e2e", "w@e2e"))


@pytest.fixture(scope="module")
def host(project, pool, names):
    """The pool's worker; prefork's children are replaced often, and ``-E`` is not set."""
    options = ("--max-tasks-per-child", "5") if pool == "prefork" else ()
    worker = project.worker(pool=pool, name=names[0], options=options)
    project.warm_up()
    return worker


def test_successful_task_has_complete_row(project, host, pool, names):
    """A successful task has one event of each kind and a complete row without its password."""
    task_id = project.send("add", 2, 3, password="hunter2", note="plain")
    row = project.row(task_id, "success")
    assert project.kinds(task_id) == ["task.received", "task.started", "task.succeeded"]
    assert (row["name"], row["queue"], row["worker_name"]) == (
        "e2e.add",
        project.home.name,
        names[1],
    )
    assert (row["args"], row["kwargs"]) == ([2, 3], {"password": REDACTED, "note": "plain"})
    assert str(row["result"]) == "5"  # A string in prefork, where it comes from an event.
    assert 20 <= row["runtime_ms"] < 10_000
    assert row["retry_count"] == 0
    assert row["received_at"] <= row["started_at"] <= row["finished_at"]
    assert "hunter2" not in str(project.brain.events(project.slug, "celery", task_id))


def test_worker_row_has_details(project, host, pool, names):
    """The brain's row of the worker has pid, queues and concurrency without a broker request."""

    def filled():
        rows = {row["name"]: row for row in project.brain.workers(project.slug)}
        return (row := rows.get(names[1])) and row["pid"] and row

    row = until(filled, "the worker's details", timeout=60)
    assert (row["pid"], row["queues"], row["concurrency"]) == (
        host.pid,
        [project.home.name],
        CONCURRENCY[pool],
    )


def test_empty_queue_has_depth_zero(project, host):
    """Redis has no empty lists, so that a passive declaration fails; the depth is still 0."""
    depths = until(lambda: project.brain.stats(project.slug)["queue_depths"], "a queue", timeout=60)
    assert {row["name"]: row["pending_count"] for row in depths} == {project.home.name: 0}


def test_failed_task_has_exception(project, host, names):
    """A task that raises is a failure with exception, traceback and worker."""
    task_id = project.send("fails", "it broke here")
    row = project.row(task_id, "failure")
    assert project.kinds(task_id) == ["task.failed", "task.received", "task.started"]
    assert "ValueError" in row["exception"]
    assert "in fails" in row["traceback"]
    assert "it broke here" in row["traceback"]
    assert row["worker_name"] == names[1]


def test_retries_are_counted(project, host):
    """A task that retries twice shows both retries, even within one second."""
    task_id = project.send("retries")
    row = project.row(task_id, "success")
    assert row["retry_count"] == 2
    assert project.kinds(task_id).count("task.retried") == 2


def test_chained_task_has_parent_and_root(project, host):
    """The second task of a chain has the first one as parent and root."""
    link = project.producer.signature("e2e.add", args=(10,))
    second = (project.producer.signature("e2e.add", args=(1, 2)) | link).apply_async()
    row = project.row(second.id, "success")
    assert (row["parent_task_id"], row["root_task_id"]) == (second.parent.id, second.parent.id)
    assert row["args"] == [3, 10]


def test_task_annotations_apply(project, host):
    """``@z4j_meta`` keeps, redacts and skips values as it does with the adapter's own hooks."""
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


@pytest.mark.parametrize("task", ["runs_asyncio", "runs_asgiref", "runs_orm"])
def test_tasks_run_asyncio_and_orm(task, project, host):
    """``asyncio.run``, asgiref's ``async_to_sync`` and Django's ORM work in every task."""
    for _ in range(5):
        state, result = project.run(task)
        assert (state, result) == ("SUCCESS", result), f"{result}"
    assert result == {"runs_asyncio": "asyncio", "runs_asgiref": "asgiref", "runs_orm": 5}[task]


def test_tasks_see_no_running_loop(project, host):
    """``asyncio.get_running_loop`` raises at any time of a task while the agent works."""
    assert project.run("sees_a_loop") == ("SUCCESS", False)


def test_huge_argument_is_truncated(project, host, pool):
    """A task with huge arguments has a row in which they are marked as truncated."""
    task_id = project.send("takes", "x" * 5_000_000, numbers=list(range(100_000)))
    assert project.outcome(task_id) == ("SUCCESS", [5_000_000, 100_000])
    row = project.row(task_id, "success")
    assert len(str(row["args"])) < 20_000
    assert len(str(row["kwargs"])) < 20_000
    assert "cut]" in str(row["args"]) or "truncated" in str(row["args"])
    assert "cut]" in str(row["kwargs"]) or "truncated" in str(row["kwargs"])
    large = project.send("returns", 5_000_000)
    assert len(str(project.row(large, "success")["result"])) < 20_000
    project.row(project.send("add", 0, 0), "success")


@pytest.mark.parametrize("pool", FORKING, indirect=True)
def test_forked_children_send_nothing(project, host, pool):
    """``os.fork``, multiprocessing and subprocess keep the session, and a child sends nothing."""
    before = project.sessions()
    assert project.run("forks", "os") == ("SUCCESS", 0)
    assert project.run("multiprocesses", "mp") == ("SUCCESS", 0)
    assert project.run("subprocesses") == ("SUCCESS", "child\n")
    project.row(project.send("add", 0, 0), "success")
    assert project.sessions() == before
    assert len(before) == 1
    for mark in ("os", "mp"):
        assert project.brain.task(project.slug, "celery", f"{mark}-in-child") is None


@pytest.mark.parametrize("pool", TERMINATING, indirect=True)
def test_cancel_and_retry_commands_complete(project, host, pool):
    """A cancelled running task ends as revoked, and a retried failed task succeeds."""
    running = project.send("wait", 60)
    project.row(running, "started")
    cancelled = project.brain.issue(
        project.slug,
        "cancel-task",
        agent_id=project.agent.agent_id,
        engine="celery",
        task_id=running,
    )
    assert project.brain.wait_command(project.slug, cancelled["id"])["status"] == "completed"
    until((project.home / "wait.ended").exists, "the end of the cancelled task", timeout=20)
    project.row(running, "revoked")

    failed = project.send("fails_once", "first")
    project.row(failed, "failure")
    retried = project.brain.issue(
        project.slug, "retry-task", agent_id=project.agent.agent_id, engine="celery", task_id=failed
    )
    done = project.brain.wait_command(project.slug, retried["id"])
    assert done["status"] == "completed", done
    assert project.row(done["result"]["new_task_id"], "success")["name"] == "e2e.fails_once"


def test_brain_accepts_control_for_worker(project, host, names):
    """The worker is online under an unredacted name, and the brain accepts a pool resize for it."""
    assert [
        row["name"] for row in project.brain.workers(project.slug) if row["state"] == "online"
    ] == [names[1]]
    resize = project.brain.issue(
        project.slug, "pool-resize", agent_id=project.agent.agent_id, worker_name=names[1], delta=1
    )
    assert resize["action"] == "pool_grow"
    project.brain.wait_command(project.slug, resize["id"])


def test_only_main_process_has_session(project, host, pool):
    """Only the main process has a session; tasks of prefork's children are reported by it."""
    pids = {
        project.outcome(task_id)[1]
        for task_id in [project.send("pid", number) for number in range(12)]
    }
    assert len(pids) >= (3 if pool == "prefork" else 1)
    assert (host.pid in pids) is (pool != "prefork")
    rows = project.brain.agent_workers(project.slug)
    assert [(row["pid"], row["state"]) for row in rows] == [(host.pid, "online")]
    assert rows[0]["role"] == "task"


def test_warm_shutdown_reports_all_tasks(project, host, pool):
    """SIGTERM lets the running task finish, exits with 0, and all events arrive."""
    finished = [project.send("add", number, 1) for number in range(30)]
    # The worker returns tasks that have not started to the queue.
    assert {project.outcome(task_id)[0] for task_id in finished} == {"SUCCESS"}
    running = project.send("wait", 2)
    until((project.home / "wait.started").exists, "the last task's start", timeout=30)
    os.kill(host.pid, signal.SIGTERM)
    began = time.monotonic()
    until(lambda: not host.running, "the worker's end", timeout=30)
    assert host.exit_code == 0
    assert time.monotonic() - began < 15
    known = {row["task_id"]: row["state"] for row in project.brain.tasks(project.slug)}
    assert {known.get(task_id) for task_id in (*finished, running)} == {"success"}
    assert known["shutting-down"] == "success"
    log = host.output()
    for error in (
        "Traceback",
        "cannot switch",
        "BlockingSwitchOutError",
        "died and runs again",
        "please report",
    ):
        assert error not in _without_expected_errors(log), error


def _without_expected_errors(log):
    """Return the log without the tracebacks of tasks that fail on purpose."""
    blocks = log.split("\n[")
    return "\n[".join(
        block
        for block in blocks
        if "Task e2e.fails" not in block and "Task e2e.retries" not in block
    )
