"""One worker per pool on Redis, and everything that its agent must deliver, execute and leave alone."""

import os
import signal
import time

import pytest

from tests.support.e2e_project import E2EProject
from z4j_bare.demo.process import until
from z4j_bare.demo.worker import CONCURRENCY, POOLS

pytestmark = pytest.mark.timeout(120)

#: Each is the beginning of POOLS: pytest groups the tests of one worker by the parameter's position.
GREEN = POOLS[:2]
ENDING = POOLS[:2]
FORKING = POOLS[:3]
REDACTED = "[REDACTED]"
#: As given on the command line, and as the brain keeps it: it takes a dotted host for an e-mail address.
DOTTED = ("w@web-1.example.com", "w@web-1_example_com")
NAMES = {"gevent": DOTTED, "prefork": DOTTED}


@pytest.fixture(scope="module", params=POOLS)
def pool(request):
    return request.param


@pytest.fixture(scope="module")
def project(pool, brain, redis_url, tmp_path_factory):
    with E2EProject(brain, redis_url, tmp_path_factory.mktemp(pool)) as here:
        yield here


@pytest.fixture(scope="module")
def names(pool):
    return NAMES.get(pool, ("w@e2e", "w@e2e"))


@pytest.fixture(scope="module")
def host(project, pool, names):
    """The worker; prefork's children are replaced all the time, and none has ``-E``."""
    options = ("--max-tasks-per-child", "5") if pool == "prefork" else ()
    worker = project.worker(pool=pool, name=names[0], options=options)
    project.warm_up()
    return worker


def test_a_success_is_told_whole(project, host, pool, names):
    """A task that succeeds has one event of each kind and a row with all that a dashboard shows, its password hidden."""
    task_id = project.send("add", 2, 3, password="hunter2", note="plain")
    row = project.row(task_id, "success")
    assert project.kinds(task_id) == ["task.received", "task.started", "task.succeeded"]
    assert (row["name"], row["queue"], row["worker_name"]) == (
        "e2e.add",
        project.home.name,
        names[1],
    )
    assert (row["args"], row["kwargs"]) == ([2, 3], {"password": REDACTED, "note": "plain"})
    assert str(row["result"]) == "5"  # prefork's comes from the broker's event, as text
    assert 20 <= row["runtime_ms"] < 10_000
    assert row["retry_count"] == 0
    assert row["received_at"] <= row["started_at"] <= row["finished_at"]
    assert "hunter2" not in str(project.brain.events(project.slug, "celery", task_id))


def test_the_worker_page_is_filled(project, host, pool, names):
    """The brain's row of the worker has what the worker tells of itself, though nobody asks it over the broker."""

    def filled():
        rows = {row["name"]: row for row in project.brain.workers(project.slug)}
        return (row := rows.get(names[1])) and row["pid"] and row

    row = until(filled, "the worker's details", timeout=60)
    assert (row["pid"], row["queues"], row["concurrency"]) == (
        host.pid,
        [project.home.name],
        CONCURRENCY[pool],
    )


def test_a_queue_that_is_empty_is_no_broken_broker(project, host):
    """Redis has no empty lists, so a passive declaration fails there: the depth is 0 all the same."""
    depths = until(lambda: project.brain.stats(project.slug)["queue_depths"], "a queue", timeout=60)
    assert {row["name"]: row["pending_count"] for row in depths} == {project.home.name: 0}


def test_a_failure_names_its_exception(project, host, names):
    """A task that raises is a failure with exception, traceback and worker."""
    task_id = project.send("fails", "it broke here")
    row = project.row(task_id, "failure")
    assert project.kinds(task_id) == ["task.failed", "task.received", "task.started"]
    assert "ValueError" in row["exception"]
    assert "in fails" in row["traceback"]
    assert "it broke here" in row["traceback"]
    assert row["worker_name"] == names[1]


def test_retries_are_counted(project, host):
    """A task that retries twice and then succeeds shows both retries, also those within one second."""
    task_id = project.send("retries")
    row = project.row(task_id, "success")
    assert row["retry_count"] == 2
    assert project.kinds(task_id).count("task.retried") == 2


def test_a_chain_knows_its_parents(project, host):
    """The second task of a chain names the first as its parent and root."""
    link = project.producer.signature("e2e.add", args=(10,))
    second = (project.producer.signature("e2e.add", args=(1, 2)) | link).apply_async()
    row = project.row(second.id, "success")
    assert (row["parent_task_id"], row["root_task_id"]) == (second.parent.id, second.parent.id)
    assert row["args"] == [3, 10]


def test_annotations_hold(project, host):
    """``@z4j_meta`` keeps, hides and skips what its task asks for, here as with the adapter's own hooks."""
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


@pytest.mark.parametrize("task", ["runs_asyncio", "runs_asgiref", "runs_orm"])
def test_what_a_running_loop_would_break_succeeds(task, project, host):
    """``asyncio.run``, asgiref's ``async_to_sync`` and Django's ORM work in every task."""
    for _ in range(5):
        state, result = project.run(task)
        assert (state, result) == ("SUCCESS", result), f"{result}"
    assert result == {"runs_asyncio": "asyncio", "runs_asgiref": "asgiref", "runs_orm": 5}[task]


def test_no_running_loop_is_ever_visible(project, host):
    """``asyncio.get_running_loop`` raises at every moment of a task while the agent beats and sends."""
    assert project.run("sees_a_loop") == ("SUCCESS", False)


def test_a_huge_argument_is_cut_and_says_so(project, host, pool):
    """A task with a 5 MB string and a list of 100,000 has its row, marked as cut, and the worker goes on."""
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
def test_forked_children_stay_silent(project, host, pool):
    """``os.fork``, multiprocessing and subprocess in a task cost no session, and what a child does is never sent."""
    before = project.sessions()
    assert project.run("forks", "os") == ("SUCCESS", 0)
    assert project.run("multiprocesses", "mp") == ("SUCCESS", 0)
    assert project.run("subprocesses") == ("SUCCESS", "child\n")
    project.row(project.send("add", 0, 0), "success")
    assert project.sessions() == before
    assert len(before) == 1
    for mark in ("os", "mp"):
        assert project.brain.task(project.slug, "celery", f"{mark}-in-child") is None


@pytest.mark.parametrize("pool", ENDING, indirect=True)
def test_an_operator_cancels_and_retries(project, host, pool):
    """A running task that an operator cancels really ends and is revoked; a failed one that he retries succeeds."""
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


def test_the_brain_accepts_worker_controls(project, host, names):
    """The worker is online under a name that redaction leaves alone, and the brain takes a pool-resize for it."""
    assert [
        row["name"] for row in project.brain.workers(project.slug) if row["state"] == "online"
    ] == [names[1]]
    resize = project.brain.issue(
        project.slug, "pool-resize", agent_id=project.agent.agent_id, worker_name=names[1], delta=1
    )
    assert resize["action"] == "pool_grow"
    project.brain.wait_command(project.slug, resize["id"])


def test_one_process_speaks_for_the_worker(project, host, pool):
    """Only the worker's main process has said hello, once; prefork's later children never, and their tasks are told."""
    pids = {
        project.outcome(task_id)[1]
        for task_id in [project.send("pid", number) for number in range(12)]
    }
    assert len(pids) >= (3 if pool == "prefork" else 1)
    assert (host.pid in pids) is (pool != "prefork")
    rows = project.brain.agent_workers(project.slug)
    assert [(row["pid"], row["state"]) for row in rows] == [(host.pid, "online")]
    assert rows[0]["role"] == "task"


def test_sigterm_ends_it_with_everything_told(project, host, pool):
    """A warm shutdown, last of all, lets the running task end, exits 0 in time, and no event is missing."""
    finished = [project.send("add", number, 1) for number in range(30)]
    assert {project.outcome(task_id)[0] for task_id in finished} == {
        "SUCCESS"
    }  # the worker gives back what only waits
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
    for complaint in (
        "Traceback",
        "cannot switch",
        "BlockingSwitchOutError",
        "died and runs again",
        "please report",
    ):
        assert complaint not in _expected_removed(log), complaint


def _expected_removed(log):
    """Return the log without the tracebacks of tasks that fail on purpose."""
    blocks = log.split("\n[")
    return "\n[".join(
        block
        for block in blocks
        if "Task e2e.fails" not in block and "Task e2e.retries" not in block
    )
