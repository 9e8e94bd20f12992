"""Every operator command over the brain's REST API, and its effect in Celery and Redis.

Two workers share one agent's token, so that a command reaches either process. Controls are sent for
the second worker.
"""

import json

import pytest
from z4j_core.purge_token import compute_purge_confirm_token
from z4j_core.transport.hmac import decode_agent_hmac_secret

from tests.support.e2e_project import E2EProject
from z4j_bare import control
from z4j_bare.demo.process import until
from z4j_bare.demo.rest import BrainRefusedError

pytestmark = pytest.mark.timeout(240)

EVENTLET, THREADS, SOLO = (
    pytest.param(name, marks=pytest.mark.long) for name in ("eventlet", "threads", "solo")
)
POOLS = ("gevent", EVENTLET, THREADS, SOLO, "prefork")
TERMINATING = ("gevent", EVENTLET, "prefork")
NON_TERMINATING = (THREADS, SOLO)

#: The brain's database by pool. A command does not depend on the combination of the two.
DATABASES = {"prefork": "postgresql", "threads": "postgresql"}

#: Pools of the test of the brain's reconciliation, which takes more than a minute. The answer does
#: not depend on the pool.
RECONCILED = ("gevent", "prefork")

#: Name of the second worker.
SECOND = "w2@web-2.example.com"

#: The same name in the brain, which redacts a host with dots as an e-mail address.
ALIAS = "w2@web-2_example_com"


@pytest.fixture(scope="module", params=POOLS)
def pool(request):
    return request.param


@pytest.fixture(scope="module")
def project(pool, make_brain, redis_url, tmp_path_factory):
    """A project in its own brain, which accepts only ten bulk actions a minute."""
    home = tmp_path_factory.mktemp(pool)
    intervals = {
        "Z4J_RECONCILIATION_SWEEP_SECONDS": "30",
        "Z4J_RECONCILIATION_STALE_THRESHOLD_SECONDS": "60",
    }
    with (
        make_brain(DATABASES.get(pool, "sqlite"), home / "brain", **intervals) as brain,
        CommandProject(brain, redis_url, home) as here,
    ):
        yield here


@pytest.fixture(scope="module")
def workers(project, pool):
    """Two workers with the same token. Only the second one allows a pool restart."""
    first = project.worker("controllable", pool=pool, name="w1@e2e", concurrency=3)
    second = project.worker(
        "controllable", pool=pool, name=SECOND, concurrency=3, environment={"E2E_RESTARTS": "1"}
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
    """A task in the state ``retry`` for an hour, so that the brain reconciles it after a minute.

    The brain reconciles tasks in the states pending, started and retry, not in the state received.
    """
    return project.send("retries_later")


class CommandProject(E2EProject):
    """A project with methods for commands and for the state of the broker and the workers."""

    def __init__(self, brain, redis_url, home):
        super().__init__(brain, redis_url, home)
        self.redis_url = redis_url.rpartition("/")[0] + "/2"

    def __enter__(self):
        super().__enter__()
        self.producer.conf.broker_transport_options = {}  # The same as in the workers.
        return self

    def online(self):
        return [row for row in self.brain.workers(self.slug) if row["state"] == "online"]

    def command(self, route, **body):
        """Issue a command and return its row after it has finished."""
        issued = self.brain.issue(self.slug, route, agent_id=self.agent.agent_id, **body)
        return self.brain.wait_command(self.slug, issued["id"])

    def run_command(self, route, **body):
        """Issue a command, assert that it succeeds, and return its result."""
        row = self.command(route, **body)
        assert row["status"] == "completed", row["error"]
        return row["result"]

    def failed_error(self, route, **body):
        """Issue a command, assert that it fails, and return its error."""
        row = self.command(route, **body)
        assert row["status"] == "failed", row["result"]
        return row["error"]

    def inspect(self, method, *args, node=SECOND):
        """Return a worker's reply to an inspect command."""
        inspect = self.producer.control.inspect(destination=[node], timeout=5)
        return (getattr(inspect, method)(*args) or {}).get(node)

    def size(self):
        stats = self.inspect("stats")["pool"]
        if "prefork" in stats["implementation"]:
            return len(stats["processes"])
        return stats["max-concurrency"]

    def queues(self, node=SECOND):
        return {queue["name"] for queue in self.inspect("active_queues", node=node)}

    def depth(self, queue):
        with self.producer.connection_for_read() as connection:
            return connection.default_channel.client.llen(queue)

    def token(self, queue, depth):
        secret = decode_agent_hmac_secret(self.agent.hmac_secret)
        return compute_purge_confirm_token(secret=secret, queue_name=queue, queue_depth=depth)


def test_retry_runs_task_with_own_or_overridden_arguments(project, workers, old_task):
    """A retried task runs under a new id, with its own arguments or those of the command."""
    failed = project.send("fails_once", "again")
    project.row(failed, "failure")
    result = project.run_command("retry-task", engine="celery", task_id=failed)
    assert project.outcome(result["new_task_id"]) == ("SUCCESS", "succeeded")
    result = project.run_command(
        "retry-task",
        engine="celery",
        task_id=failed,
        override_args=["other"],
        override_kwargs={},
        eta_seconds=1,
    )
    assert project.outcome(result["new_task_id"])[0] == "FAILURE"
    assert (project.home / "other").exists()


def test_bulk_retry_runs_each_task(project, workers):
    """A bulk retry runs each task of its list again."""
    failed = [project.send("fails_once", f"bulk-{number}") for number in range(3)]
    for task_id in failed:
        project.row(task_id, "failure")
    result = project.run_command(
        "bulk-retry", filter={"task_ids": failed, "engine": "celery"}, max=10
    )
    assert (result["requested"], result["succeeded"], result["failed"]) == (3, 3, 0)
    assert [project.outcome(result["new_task_ids"][task_id])[0] for task_id in failed] == [
        "SUCCESS"
    ] * 3


def test_manual_trigger_submits_task(project, workers):
    """A manual trigger of a schedule in the brain enqueues its task."""
    schedule = project.brain.post(
        f"/projects/{project.slug}/schedules",
        name="by-hand",
        engine="celery",
        kind="interval",
        expression="3600",
        task_name="e2e.add",
        args=[20, 3],
        kwargs={},
    )
    project.brain.post(f"/projects/{project.slug}/schedules/{schedule['id']}/trigger")
    rows = project.brain.commands(project.slug)
    (issued,) = (row for row in rows if row["action"] == "submit_task")
    row = project.brain.wait_command(project.slug, issued["id"])
    assert row["status"] == "completed", row["error"]
    assert project.outcome(row["result"]["task_id"]) == ("SUCCESS", 23)


@pytest.mark.parametrize("pool", TERMINATING, indirect=True)
def test_cancel_terminates_running_task(project, workers, pool):
    """A cancelled task stops running, and the brain shows it as revoked."""
    running = project.send("wait", 60)
    project.row(running, "started")
    result = project.run_command("cancel-task", engine="celery", task_id=running)
    assert result["terminated"] is True
    assert result["worker"] in ("w1@e2e", ALIAS)
    assert result["workers"] == sorted(("w1@e2e", ALIAS))
    # In prefork the signal kills the process, and the task's finally block does not run.
    if pool != "prefork":
        until((project.home / "wait.ended").exists, "the end of the cancelled task", timeout=20)
    project.row(running, "revoked")


@pytest.mark.parametrize("pool", NON_TERMINATING, indirect=True)
def test_cancel_in_pool_without_termination_fails(project, workers, pool):
    """A pool that cannot terminate a task reports an error, and the task runs to its end.

    The task runs in the first worker, to which the brain sends every command, because a busy solo
    worker answers no other process.
    """
    queue = f"{project.home.name}-first"
    project.run_command("add-consumer", worker_name="w1@e2e", queue=queue)
    running = project.send("wait", 6, queue=queue)
    project.row(running, "started")
    error = project.failed_error("cancel-task", engine="celery", task_id=running)
    assert error.startswith(f"not supported by the {pool} pool: ")
    assert project.outcome(running) == ("SUCCESS", "waited")


def test_cancel_revokes_waiting_task(project, workers):
    """A task that waits for its ETA is revoked and never runs."""
    later = project.producer.send_task("e2e.fails_once", args=("never",), countdown=10)
    project.row(later.id, "received")
    assert (
        project.run_command("cancel-task", engine="celery", task_id=later.id)["terminated"] is False
    )
    assert project.outcome(later.id)[0] == "REVOKED"
    project.row(later.id, "revoked")  # At its ETA.
    assert not (project.home / "never").exists()


@pytest.mark.parametrize("pool", TERMINATING, indirect=True)
def test_pool_resize_changes_one_worker(project, workers, pool):
    """The second worker's pool has the reported size, and the first worker's is unchanged."""
    assert project.run_command("pool-resize", worker_name=ALIAS, delta=2) == {
        "worker": ALIAS,
        "pool": pool,
        "delta": 2,
        "size": 5,
    }
    assert project.size() == 5
    assert project.run_command("pool-resize", worker_name=ALIAS, delta=-2)["size"] == 3
    assert project.size() == 3
    assert "at least one must remain" in project.failed_error(
        "pool-resize", worker_name=ALIAS, delta=-3
    )
    assert project.run("add", 1, 2) == ("SUCCESS", 3)


@pytest.mark.parametrize("pool", NON_TERMINATING, indirect=True)
def test_resize_of_fixed_pool_fails(project, workers, pool):
    """A pool that cannot be resized reports an error."""
    for delta in (1, -1):
        assert project.failed_error("pool-resize", worker_name=ALIAS, delta=delta).startswith(
            f"not supported by the {pool} pool: "
        )


def test_restart_replaces_prefork_processes(project, workers, pool):
    """Prefork replaces its processes if Celery allows it; other cases report an error."""
    if pool != "prefork":
        assert project.failed_error("restart-worker", worker_name=ALIAS).startswith(
            f"not supported by the {pool} pool: "
        )
        return
    assert "worker_pool_restarts is off on w1@e2e" in project.failed_error(
        "restart-worker", worker_name="w1@e2e"
    )
    before = set(project.inspect("stats")["pool"]["processes"])
    result = project.run_command("restart-worker", worker_name=ALIAS)
    assert result["replaced"] >= 1
    assert result["replaced"] + result["pending"] == 3

    def replaced():
        # Each takes half a second, so that every process gets one.
        tasks = [project.send("sees_a_loop") for _ in range(8)]
        assert {project.outcome(task)[0] for task in tasks} == {"SUCCESS"}
        return before.isdisjoint(project.inspect("stats")["pool"]["processes"])

    until(replaced, "all processes replaced, each after a task", timeout=30)


def test_consumer_rate_limit_and_purge_commands_take_effect(project, workers):
    """Adding a consumer, a rate limit, cancelling the consumer and a purge change the worker."""
    queue = f"{project.home.name}-extra"
    assert project.run_command("add-consumer", worker_name=ALIAS, queue=queue)["queue"] == queue
    assert queue in project.queues()
    assert queue not in project.queues(node="w1@e2e")
    assert project.outcome(project.send("add", 4, 4, queue=queue)) == ("SUCCESS", 8)

    limited = project.run_command(
        "rate-limit", task_name="e2e.returns", rate="1/h", worker_name=ALIAS
    )
    assert limited == {"task_name": "e2e.returns", "rate": "1/h", "workers": [ALIAS], "refused": {}}
    first, held = (project.send("returns", 1, queue=queue) for _ in range(2))
    assert project.outcome(first)[0] == "SUCCESS"
    until(lambda: project.depth(queue) == 0, "the reception of the second task", timeout=20)
    assert project.outcome(project.send("add", 5, 5, queue=queue)) == ("SUCCESS", 10)
    assert not project.producer.AsyncResult(held).ready()
    assert project.run_command("rate-limit", task_name="e2e.returns", rate="0")[
        "workers"
    ] == sorted(("w1@e2e", ALIAS))
    assert "unknown task" in project.failed_error(
        "rate-limit", task_name="no.such", rate="1/s", worker_name=ALIAS
    )

    project.run_command("cancel-consumer", worker_name=ALIAS, queue=queue)
    assert queue not in project.queues()
    assert f"does not consume from {queue}" in project.failed_error(
        "cancel-consumer", worker_name=ALIAS, queue=queue
    )
    for _ in range(4):
        project.send("add", 1, 1, queue=queue)
    # The worker's last BRPOP may receive one more task, which kombu returns to the queue.
    until(lambda: project.depth(queue) == 4, "all four tasks in the queue", timeout=20)
    assert "missing confirm_token" in project.failed_error("purge-queue", queue=queue)
    assert "confirm_token mismatch" in project.failed_error(
        "purge-queue", queue=queue, observed_depth=3
    )
    assert project.depth(queue) == 4
    assert "cannot measure" in project.failed_error(
        "purge-queue", queue="no-such-queue", observed_depth=0
    )
    assert (
        project.run_command("purge-queue", queue=queue, confirm_token=project.token(queue, 4))[
            "purged"
        ]
        == 4
    )
    assert project.depth(queue) == 0
    project.send("add", 1, 1, queue=queue)
    project.run_command("purge-queue", queue=queue, force=True)
    assert project.depth(queue) == 0


def test_command_for_unknown_worker_fails(project, workers):
    """A command for an unknown worker reports an error; the brain rejects controls itself."""
    error = project.failed_error(
        "rate-limit", task_name="e2e.add", rate="5/s", worker_name="ghost@x"
    )
    assert error == f"no answer from ghost@x; workers that answer: w1@e2e, {ALIAS}"
    with pytest.raises(BrainRefusedError):
        project.command("pool-resize", worker_name="ghost@x", delta=1)


def test_dead_letter_commands_are_rejected_by_brain(project, workers):
    """Celery's adapter has no dead letters, and the brain rejects such commands itself."""
    with pytest.raises(BrainRefusedError, match="422"):
        project.command("requeue-dead-letter", engine="celery", task_id="t")
    with pytest.raises(BrainRefusedError, match="409"):
        project.brain.get(f"/projects/{project.slug}/dead-letters", engine="celery")


def test_concurrent_commands_all_complete(project, workers):
    """Twenty concurrent commands complete while tasks run."""
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


def test_control_socket_reports_and_restarts_agents(project, workers, monkeypatch):
    """Another process reads both agents' status and makes them reconnect; the workers go on."""
    monkeypatch.setenv("Z4J_HOME", str(project.home / "agent"))
    rows = control.status()
    assert sorted(row["pid"] for row in rows) == sorted(worker.pid for worker in workers)
    assert sorted(name for row in rows for name in row["workers"]["celery"]) == ["w1@e2e", ALIAS]
    assert [row["connected"] for row in rows] == [True, True]
    before = project.sessions()
    code, message = control.send_restart(rows[0]["adapter"])
    assert code == 0, message

    def reconnected():
        now = project.sessions()
        return all(now[worker] != stamp for worker, stamp in before.items())

    until(reconnected, "two new sessions", timeout=20)
    assert project.run("add", 1, 2) == ("SUCCESS", 3)


@pytest.mark.long
@pytest.mark.parametrize("pool", RECONCILED, indirect=True)
def test_reconciliation_reports_task_state(project, workers, old_task):
    """The brain's own request for a task without recent events returns Celery's state."""

    def answered():
        rows = [
            row for row in project.brain.commands(project.slug) if row["action"] == "reconcile_task"
        ]
        return next(
            (row for row in rows if row["target_id"] == old_task and row["status"] == "completed"),
            None,
        )

    row = until(answered, "the result of the reconciliation", timeout=120, interval=0.5)
    assert row["result"] == {
        "task_id": old_task,
        "engine_state": "pending",
        "finished_at": None,
        "exception": None,
    }


def test_no_errors_were_logged(project, workers):
    """After all other tests the workers' logs contain no errors of the agent."""
    errors = (
        "please report",
        "died and runs again",
        "cannot switch",
        "BlockingSwitchOutError",
        "z4j: command",
    )
    for worker in workers:
        log = worker.output()
        for error in errors:
            assert error not in log, error
