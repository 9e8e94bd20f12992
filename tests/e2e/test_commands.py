"""Every action of an operator over the brain's REST API, in each pool, judged by what Celery and Redis then do.

Two workers share one agent's token, so that a command reaches either process; controls are for the second one.
"""

import json

import pytest
from z4j_core.purge_token import compute_purge_confirm_token
from z4j_core.transport.hmac import decode_agent_hmac_secret

from tests.support.e2e_project import E2EProject
from z4j_bare import control
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import until
from z4j_bare.demo.rest import BrainRefusedError

pytestmark = pytest.mark.timeout(240)

EVENTLET, THREADS, SOLO = (
    pytest.param(name, marks=pytest.mark.long) for name in ("eventlet", "threads", "solo")
)
POOLS = ("gevent", EVENTLET, THREADS, SOLO, "prefork")
ENDING = ("gevent", EVENTLET, "prefork")
FIXED = (THREADS, SOLO)
#: Where the brain's own question is waited for, which takes it more than a minute; no pool has a part in the answer.
ASKED = ("gevent", "prefork")
#: The second worker's name, and as the brain keeps it: it would take a dotted host for an e-mail address.
SECOND = "w2@web-2.example.com"
ALIAS = "w2@web-2_example_com"


@pytest.fixture(scope="module", params=POOLS)
def pool(request):
    return request.param


@pytest.fixture(scope="module")
def project(pool, redis_url, tmp_path_factory):
    """A place with a brain of its own: the brain takes ten bulk actions a minute from one address."""
    home = tmp_path_factory.mktemp(pool)
    often = {
        "Z4J_RECONCILIATION_SWEEP_SECONDS": "30",
        "Z4J_RECONCILIATION_STALE_THRESHOLD_SECONDS": "60",
    }
    with (
        Brain(home / "brain", environment=often) as brain,
        Commands(brain, redis_url, home) as here,
    ):
        yield here


@pytest.fixture(scope="module")
def workers(project, pool):
    """Two workers on one token, the second one's pool may be restarted."""
    first = project.worker("commanded", pool=pool, name="w1@e2e", concurrency=3)
    second = project.worker(
        "commanded", pool=pool, name=SECOND, concurrency=3, environment={"E2E_RESTARTS": "1"}
    )
    project.warm_up()
    until(
        lambda: {"w1@e2e", ALIAS} <= {row["name"] for row in project.online()},
        "both workers online",
        timeout=40,
    )
    return first, second


@pytest.fixture(scope="module")
def old_task(project, workers):
    """A task that wants to be tried again in an hour: nothing is heard of it for longer than the brain likes."""
    return project.send("retries_later")


class Commands(E2EProject):
    """A place whose operator waits for answers, and who sees what the broker and the workers know."""

    def __init__(self, brain, redis_url, home):
        super().__init__(brain, redis_url, home)
        self.redis_url = redis_url.rpartition("/")[0] + "/2"

    def __enter__(self):
        super().__enter__()
        self.producer.conf.broker_transport_options = {}  # as in the workers
        return self

    def online(self):
        return [row for row in self.brain.workers(self.slug) if row["state"] == "online"]

    def command(self, route, **body):
        """Issue a command and return its row once it is finished."""
        issued = self.brain.issue(self.slug, route, agent_id=self.agent.agent_id, **body)
        return self.brain.wait_command(self.slug, issued["id"])

    def done(self, route, **body):
        """Issue a command that succeeds; return its result."""
        row = self.command(route, **body)
        assert row["status"] == "completed", row["error"]
        return row["result"]

    def refused(self, route, **body):
        """Issue a command that fails; return its error."""
        row = self.command(route, **body)
        assert row["status"] == "failed", row["result"]
        return row["error"]

    def inspect(self, method, *args, node=SECOND):
        """Ask the second worker, and return its answer."""
        return (
            getattr(self.producer.control.inspect(destination=[node], timeout=5), method)(*args)
            or {}
        ).get(node)

    def size(self):
        figures = self.inspect("stats")["pool"]
        return (
            len(figures["processes"])
            if "prefork" in figures["implementation"]
            else figures["max-concurrency"]
        )

    def queues(self, node=SECOND):
        return {queue["name"] for queue in self.inspect("active_queues", node=node)}

    def depth(self, queue):
        with self.producer.connection_for_read() as connection:
            return connection.default_channel.client.llen(queue)

    def token(self, queue, depth):
        secret = decode_agent_hmac_secret(self.agent.hmac_secret)
        return compute_purge_confirm_token(secret=secret, queue_name=queue, queue_depth=depth)


def test_retry_with_and_without_overrides(project, workers, old_task):
    """A failed task that is retried runs again under a new id, with its own arguments or the operator's."""
    failed = project.send("fails_once", "again")
    project.row(failed, "failure")
    result = project.done("retry-task", engine="celery", task_id=failed)
    assert project.outcome(result["new_task_id"]) == ("SUCCESS", "succeeded")
    result = project.done(
        "retry-task",
        engine="celery",
        task_id=failed,
        override_args=["other"],
        override_kwargs={},
        eta_seconds=1,
    )
    assert project.outcome(result["new_task_id"])[0] == "FAILURE"
    assert (project.home / "other").exists()


def test_bulk_retry(project, workers):
    """Each task of the list runs again."""
    failed = [project.send("fails_once", f"bulk-{number}") for number in range(3)]
    for task_id in failed:
        project.row(task_id, "failure")
    result = project.done("bulk-retry", filter={"task_ids": failed, "engine": "celery"}, max=10)
    assert (result["requested"], result["succeeded"], result["failed"]) == (3, 3, 0)
    assert [project.outcome(result["new_task_ids"][task_id])[0] for task_id in failed] == [
        "SUCCESS"
    ] * 3


def test_a_manual_trigger_submits(project, workers):
    """Triggering a schedule of the brain's own enqueues its task."""
    schedule = project.brain.post(
        f"/projects/{project.slug}/schedules",
        name="by-hand", engine="celery", kind="interval", expression="3600", task_name="e2e.add", args=[20, 3], kwargs={},
    )  # fmt: skip
    project.brain.post(f"/projects/{project.slug}/schedules/{schedule['id']}/trigger")
    rows = project.brain.commands(project.slug)
    (issued,) = (row for row in rows if row["action"] == "submit_task")
    row = project.brain.wait_command(project.slug, issued["id"])
    assert row["status"] == "completed", row["error"]
    assert project.outcome(row["result"]["task_id"]) == ("SUCCESS", 23)


@pytest.mark.parametrize("pool", ENDING, indirect=True)
def test_a_running_task_is_cancelled(project, workers, pool):
    """A task that runs really ends, and the brain shows it as revoked."""
    running = project.send("wait", 60)
    project.row(running, "started")
    result = project.done("cancel-task", engine="celery", task_id=running)
    assert result["terminated"] is True
    assert result["worker"] in ("w1@e2e", ALIAS)
    assert result["workers"] == sorted(("w1@e2e", ALIAS))
    if (
        pool != "prefork"
    ):  # there the process dies of the signal, and no code of the task's runs any more
        until((project.home / "wait.ended").exists, "the end of the cancelled task", timeout=20)
    project.row(running, "revoked")


@pytest.mark.parametrize("pool", FIXED, indirect=True)
def test_a_running_task_that_cannot_be_cancelled(project, workers, pool):
    """Where a running task cannot be ended the answer says so, and the task goes on to its end.

    It runs in the first worker, to which the brain gives every command: a solo worker that is busy answers nobody else.
    """
    queue = f"{project.home.name}-first"
    project.done("add-consumer", worker_name="w1@e2e", queue=queue)
    running = project.send("wait", 6, queue=queue)
    project.row(running, "started")
    error = project.refused("cancel-task", engine="celery", task_id=running)
    assert error.startswith(f"not supported by the {pool} pool: ")
    assert project.outcome(running) == ("SUCCESS", "waited")


def test_a_waiting_task_is_cancelled(project, workers):
    """A task that waits for its time is revoked and never runs."""
    later = project.producer.send_task("e2e.fails_once", args=("never",), countdown=10)
    project.row(later.id, "received")
    assert project.done("cancel-task", engine="celery", task_id=later.id)["terminated"] is False
    assert project.outcome(later.id)[0] == "REVOKED"
    project.row(later.id, "revoked")  # once its time has come
    assert not (project.home / "never").exists()


@pytest.mark.parametrize("pool", ENDING, indirect=True)
def test_a_pool_grows_and_shrinks(project, workers, pool):
    """The second worker's pool has as many slots as the answer says, and the first one's is as it was."""
    assert project.done("pool-resize", worker_name=ALIAS, delta=2) == {
        "worker": ALIAS,
        "pool": pool,
        "delta": 2,
        "size": 5,
    }
    assert project.size() == 5
    assert project.done("pool-resize", worker_name=ALIAS, delta=-2)["size"] == 3
    assert project.size() == 3
    assert "one has to be left" in project.refused("pool-resize", worker_name=ALIAS, delta=-3)
    assert project.run("add", 1, 2) == ("SUCCESS", 3)


@pytest.mark.parametrize("pool", FIXED, indirect=True)
def test_a_pool_of_fixed_size(project, workers, pool):
    """A pool that cannot be resized is answered as such."""
    for delta in (1, -1):
        assert project.refused("pool-resize", worker_name=ALIAS, delta=delta).startswith(
            f"not supported by the {pool} pool: "
        )


def test_restart(project, workers, pool):
    """Prefork's processes are replaced where Celery allows it; otherwise the answer says why not."""
    if pool != "prefork":
        assert project.refused("restart-worker", worker_name=ALIAS).startswith(
            f"not supported by the {pool} pool: "
        )
        return
    assert "worker_pool_restarts is off on w1@e2e" in project.refused(
        "restart-worker", worker_name="w1@e2e"
    )
    before = set(project.inspect("stats")["pool"]["processes"])
    result = project.done("restart-worker", worker_name=ALIAS)
    assert result["replaced"] >= 1
    assert result["replaced"] + result["pending"] == 3

    def replaced():
        tasks = [
            project.send("sees_a_loop") for _ in range(8)
        ]  # half a second each: every process gets one
        assert {project.outcome(task)[0] for task in tasks} == {"SUCCESS"}
        return before.isdisjoint(project.inspect("stats")["pool"]["processes"])

    until(replaced, "all processes replaced, each after a task", timeout=30)


def test_consumers_rate_limit_and_purge(project, workers):
    """The second worker consumes from one more queue, is held to a rate, and gives the queue up; what is left is purged."""
    queue = f"{project.home.name}-extra"
    assert project.done("add-consumer", worker_name=ALIAS, queue=queue)["queue"] == queue
    assert queue in project.queues()
    assert queue not in project.queues(node="w1@e2e")
    assert project.outcome(project.send("add", 4, 4, queue=queue)) == ("SUCCESS", 8)

    limited = project.done("rate-limit", task_name="e2e.returns", rate="1/h", worker_name=ALIAS)
    assert limited == {"task_name": "e2e.returns", "rate": "1/h", "workers": [ALIAS], "refused": {}}
    first, held = (project.send("returns", 1, queue=queue) for _ in range(2))
    assert project.outcome(first)[0] == "SUCCESS"
    until(lambda: project.depth(queue) == 0, "the second task in the worker's hands", timeout=20)
    assert project.outcome(project.send("add", 5, 5, queue=queue)) == ("SUCCESS", 10)
    assert not project.producer.AsyncResult(held).ready()
    assert project.done("rate-limit", task_name="e2e.returns", rate="0")["workers"] == sorted(
        ("w1@e2e", ALIAS)
    )
    assert "unknown task" in project.refused(
        "rate-limit", task_name="no.such", rate="1/s", worker_name=ALIAS
    )

    project.done("cancel-consumer", worker_name=ALIAS, queue=queue)
    assert queue not in project.queues()
    assert f"does not consume from {queue}" in project.refused(
        "cancel-consumer", worker_name=ALIAS, queue=queue
    )
    for _ in range(4):
        project.send("add", 1, 1, queue=queue)
    # The worker's last BRPOP may have one more, which kombu puts back as nobody's.
    until(lambda: project.depth(queue) == 4, "all four tasks in the queue", timeout=20)
    assert "missing confirm_token" in project.refused("purge-queue", queue=queue)
    assert "confirm_token mismatch" in project.refused("purge-queue", queue=queue, observed_depth=3)
    assert project.depth(queue) == 4
    assert "cannot measure" in project.refused(
        "purge-queue", queue="no-such-queue", observed_depth=0
    )
    assert (
        project.done("purge-queue", queue=queue, confirm_token=project.token(queue, 4))["purged"]
        == 4
    )
    assert project.depth(queue) == 0
    project.send("add", 1, 1, queue=queue)
    project.done("purge-queue", queue=queue, force=True)
    assert project.depth(queue) == 0


def test_names_that_nobody_bears(project, workers):
    """For a worker that does not exist nothing is reported as done; controls the brain refuses by itself."""
    error = project.refused("rate-limit", task_name="e2e.add", rate="5/s", worker_name="ghost@x")
    assert error == f"no answer from ghost@x; workers that answer: w1@e2e, {ALIAS}"
    with pytest.raises(BrainRefusedError):
        project.command("pool-resize", worker_name="ghost@x", delta=1)


def test_what_celery_has_not(project, workers):
    """Dead letters are no capability of Celery's adapter, and the brain does not even ask."""
    with pytest.raises(BrainRefusedError, match="422"):
        project.command("requeue-dead-letter", engine="celery", task_id="t")
    with pytest.raises(BrainRefusedError, match="409"):
        project.brain.get(f"/projects/{project.slug}/dead-letters", engine="celery")


def test_twenty_at_once(project, workers):
    """Twenty commands at once are all answered, and tasks go on meanwhile."""
    issued = [
        project.brain.issue(
            project.slug,
            "rate-limit",
            agent_id=project.agent.agent_id,
            task_name="e2e.add",
            rate="0",
            worker_name=ALIAS,
        )
        for _ in range(20)
    ]
    assert project.run("add", 2, 2) == ("SUCCESS", 4)
    rows = [project.brain.wait_command(project.slug, row["id"]) for row in issued]
    assert {row["status"] for row in rows} == {"completed"}, json.dumps(
        [row["error"] for row in rows]
    )


def test_told_from_outside(project, workers, monkeypatch):
    """Both agents answer another process for themselves, and connect anew when they are told to; the workers go on."""
    monkeypatch.setenv("Z4J_HOME", str(project.home / "agent"))
    rows = control.status()
    assert sorted(row["pid"] for row in rows) == sorted(worker.pid for worker in workers)
    assert sorted(name for row in rows for name in row["workers"]["celery"]) == ["w1@e2e", ALIAS]
    assert [row["connected"] for row in rows] == [True, True]
    before = project.sessions()
    code, said = control.send_restart(rows[0]["adapter"])
    assert code == 0, said

    def anew():
        now = project.sessions()
        return all(now[worker] != stamp for worker, stamp in before.items())

    until(anew, "two new sessions", timeout=20)
    assert project.run("add", 1, 2) == ("SUCCESS", 3)


@pytest.mark.long
@pytest.mark.parametrize("pool", ASKED, indirect=True)
def test_the_brain_asks_after_a_task(project, workers, old_task):
    """The brain's own question after a task that it has not heard of for long is answered with what Celery knows."""

    def answered():
        rows = [
            row for row in project.brain.commands(project.slug) if row["action"] == "reconcile_task"
        ]
        return next(
            (row for row in rows if row["target_id"] == old_task and row["status"] == "completed"),
            None,
        )

    row = until(answered, "the answer to the brain's question", timeout=120, interval=0.5)
    assert row["result"] == {
        "task_id": old_task,
        "engine_state": "pending",
        "finished_at": None,
        "exception": None,
    }


def test_nothing_was_logged_as_an_error(project, workers):
    """Last of all: no worker complains about the agent."""
    for worker in workers:
        log = worker.output()
        for complaint in (
            "please report",
            "died and runs again",
            "cannot switch",
            "BlockingSwitchOutError",
            "z4j: command",
        ):
            assert complaint not in log, complaint
