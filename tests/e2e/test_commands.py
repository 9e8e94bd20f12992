"""Every action of an operator over the brain's REST API, in each pool, judged by what Celery and Redis then do.

Two workers share one agent's token, so that a command reaches either process; controls are for the second one.
"""

import json

import pytest
from z4j_core.purge_token import compute_purge_confirm_token
from z4j_core.transport.hmac import decode_agent_hmac_secret

from tests.support.e2e_project import Place
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
def place(pool, redis_url, tmp_path_factory):
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
def workers(place, pool):
    """Two workers on one token, the second one's pool may be restarted."""
    first = place.worker("commanded", pool=pool, name="w1@place", concurrency=3)
    second = place.worker(
        "commanded", pool=pool, name=SECOND, concurrency=3, environment={"E2E_RESTARTS": "1"}
    )
    place.warm_up()
    until(
        lambda: {"w1@place", ALIAS} <= {row["name"] for row in place.online()},
        "both workers online",
        timeout=40,
    )
    return first, second


@pytest.fixture(scope="module")
def old_task(place, workers):
    """A task that wants to be tried again in an hour: nothing is heard of it for longer than the brain likes."""
    return place.send("retries_later")


class Commands(Place):
    """A place whose operator waits for answers, and who sees what the broker and the workers know."""

    def __init__(self, brain, redis_url, home):
        super().__init__(brain, redis_url, home)
        self.redis_url = redis_url.rpartition("/")[0] + "/2"

    def __enter__(self):
        super().__enter__()
        self.producer.conf.broker_transport_options = {}  # as in the workers
        return self

    def online(self):
        return [row for row in self.brain.workers(self.project) if row["state"] == "online"]

    def command(self, route, **body):
        """Issue a command and return its row once it is finished."""
        issued = self.brain.issue(self.project, route, agent_id=self.agent.agent_id, **body)
        return self.brain.wait_command(self.project, issued["id"])

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


def test_retry_with_and_without_overrides(place, workers, old_task):
    """A failed task that is retried runs again under a new id, with its own arguments or the operator's."""
    failed = place.send("fails_once", "again")
    place.row(failed, "failure")
    result = place.done("retry-task", engine="celery", task_id=failed)
    assert place.outcome(result["new_task_id"]) == ("SUCCESS", "succeeded")
    result = place.done(
        "retry-task",
        engine="celery",
        task_id=failed,
        override_args=["other"],
        override_kwargs={},
        eta_seconds=1,
    )
    assert place.outcome(result["new_task_id"])[0] == "FAILURE"
    assert (place.home / "other").exists()


def test_bulk_retry(place, workers):
    """Each task of the list runs again."""
    failed = [place.send("fails_once", f"bulk-{number}") for number in range(3)]
    for task_id in failed:
        place.row(task_id, "failure")
    result = place.done("bulk-retry", filter={"task_ids": failed, "engine": "celery"}, max=10)
    assert (result["requested"], result["succeeded"], result["failed"]) == (3, 3, 0)
    assert [place.outcome(result["new_task_ids"][task_id])[0] for task_id in failed] == [
        "SUCCESS"
    ] * 3


def test_a_manual_trigger_submits(place, workers):
    """Triggering a schedule of the brain's own enqueues its task."""
    schedule = place.brain.post(
        f"/projects/{place.project}/schedules",
        name="by-hand", engine="celery", kind="interval", expression="3600", task_name="e2e.add", args=[20, 3], kwargs={},
    )  # fmt: skip
    place.brain.post(f"/projects/{place.project}/schedules/{schedule['id']}/trigger")
    rows = place.brain.commands(place.project)
    (issued,) = (row for row in rows if row["action"] == "submit_task")
    row = place.brain.wait_command(place.project, issued["id"])
    assert row["status"] == "completed", row["error"]
    assert place.outcome(row["result"]["task_id"]) == ("SUCCESS", 23)


@pytest.mark.parametrize("pool", ENDING, indirect=True)
def test_a_running_task_is_cancelled(place, workers, pool):
    """A task that runs really ends, and the brain shows it as revoked."""
    running = place.send("wait", 60)
    place.row(running, "started")
    result = place.done("cancel-task", engine="celery", task_id=running)
    assert result["terminated"] is True
    assert result["worker"] in ("w1@place", ALIAS)
    assert result["workers"] == sorted(("w1@place", ALIAS))
    if (
        pool != "prefork"
    ):  # there the process dies of the signal, and no code of the task's runs any more
        until((place.home / "wait.ended").exists, "the end of the cancelled task", timeout=20)
    place.row(running, "revoked")


@pytest.mark.parametrize("pool", FIXED, indirect=True)
def test_a_running_task_that_cannot_be_cancelled(place, workers, pool):
    """Where a running task cannot be ended the answer says so, and the task goes on to its end.

    It runs in the first worker, to which the brain gives every command: a solo worker that is busy answers nobody else.
    """
    queue = f"{place.home.name}-first"
    place.done("add-consumer", worker_name="w1@place", queue=queue)
    running = place.send("wait", 6, queue=queue)
    place.row(running, "started")
    error = place.refused("cancel-task", engine="celery", task_id=running)
    assert error.startswith(f"not supported by the {pool} pool: ")
    assert place.outcome(running) == ("SUCCESS", "waited")


def test_a_waiting_task_is_cancelled(place, workers):
    """A task that waits for its time is revoked and never runs."""
    later = place.producer.send_task("e2e.fails_once", args=("never",), countdown=10)
    place.row(later.id, "received")
    assert place.done("cancel-task", engine="celery", task_id=later.id)["terminated"] is False
    assert place.outcome(later.id)[0] == "REVOKED"
    place.row(later.id, "revoked")  # once its time has come
    assert not (place.home / "never").exists()


@pytest.mark.parametrize("pool", ENDING, indirect=True)
def test_a_pool_grows_and_shrinks(place, workers, pool):
    """The second worker's pool has as many slots as the answer says, and the first one's is as it was."""
    assert place.done("pool-resize", worker_name=ALIAS, delta=2) == {
        "worker": ALIAS,
        "pool": pool,
        "delta": 2,
        "size": 5,
    }
    assert place.size() == 5
    assert place.done("pool-resize", worker_name=ALIAS, delta=-2)["size"] == 3
    assert place.size() == 3
    assert "one has to be left" in place.refused("pool-resize", worker_name=ALIAS, delta=-3)
    assert place.run("add", 1, 2) == ("SUCCESS", 3)


@pytest.mark.parametrize("pool", FIXED, indirect=True)
def test_a_pool_of_fixed_size(place, workers, pool):
    """A pool that cannot be resized is answered as such."""
    for delta in (1, -1):
        assert place.refused("pool-resize", worker_name=ALIAS, delta=delta).startswith(
            f"not supported by the {pool} pool: "
        )


def test_restart(place, workers, pool):
    """Prefork's processes are replaced where Celery allows it; otherwise the answer says why not."""
    if pool != "prefork":
        assert place.refused("restart-worker", worker_name=ALIAS).startswith(
            f"not supported by the {pool} pool: "
        )
        return
    assert "worker_pool_restarts is off on w1@place" in place.refused(
        "restart-worker", worker_name="w1@place"
    )
    before = set(place.inspect("stats")["pool"]["processes"])
    result = place.done("restart-worker", worker_name=ALIAS)
    assert result["replaced"] >= 1
    assert result["replaced"] + result["pending"] == 3

    def replaced():
        tasks = [
            place.send("sees_a_loop") for _ in range(8)
        ]  # half a second each: every process gets one
        assert {place.outcome(task)[0] for task in tasks} == {"SUCCESS"}
        return before.isdisjoint(place.inspect("stats")["pool"]["processes"])

    until(replaced, "all processes replaced, each after a task", timeout=30)


def test_consumers_rate_limit_and_purge(place, workers):
    """The second worker consumes from one more queue, is held to a rate, and gives the queue up; what is left is purged."""
    queue = f"{place.home.name}-extra"
    assert place.done("add-consumer", worker_name=ALIAS, queue=queue)["queue"] == queue
    assert queue in place.queues()
    assert queue not in place.queues(node="w1@place")
    assert place.outcome(place.send("add", 4, 4, queue=queue)) == ("SUCCESS", 8)

    limited = place.done("rate-limit", task_name="e2e.returns", rate="1/h", worker_name=ALIAS)
    assert limited == {"task_name": "e2e.returns", "rate": "1/h", "workers": [ALIAS], "refused": {}}
    first, held = (place.send("returns", 1, queue=queue) for _ in range(2))
    assert place.outcome(first)[0] == "SUCCESS"
    until(lambda: place.depth(queue) == 0, "the second task in the worker's hands", timeout=20)
    assert place.outcome(place.send("add", 5, 5, queue=queue)) == ("SUCCESS", 10)
    assert not place.producer.AsyncResult(held).ready()
    assert place.done("rate-limit", task_name="e2e.returns", rate="0")["workers"] == sorted(
        ("w1@place", ALIAS)
    )
    assert "unknown task" in place.refused(
        "rate-limit", task_name="no.such", rate="1/s", worker_name=ALIAS
    )

    place.done("cancel-consumer", worker_name=ALIAS, queue=queue)
    assert queue not in place.queues()
    assert f"does not consume from {queue}" in place.refused(
        "cancel-consumer", worker_name=ALIAS, queue=queue
    )
    for _ in range(4):
        place.send("add", 1, 1, queue=queue)
    # The worker's last BRPOP may have one more, which kombu puts back as nobody's.
    until(lambda: place.depth(queue) == 4, "all four tasks in the queue", timeout=20)
    assert "missing confirm_token" in place.refused("purge-queue", queue=queue)
    assert "confirm_token mismatch" in place.refused("purge-queue", queue=queue, observed_depth=3)
    assert place.depth(queue) == 4
    assert "cannot measure" in place.refused("purge-queue", queue="no-such-queue", observed_depth=0)
    assert (
        place.done("purge-queue", queue=queue, confirm_token=place.token(queue, 4))["purged"] == 4
    )
    assert place.depth(queue) == 0
    place.send("add", 1, 1, queue=queue)
    place.done("purge-queue", queue=queue, force=True)
    assert place.depth(queue) == 0


def test_names_that_nobody_bears(place, workers):
    """For a worker that does not exist nothing is reported as done; controls the brain refuses by itself."""
    error = place.refused("rate-limit", task_name="e2e.add", rate="5/s", worker_name="ghost@x")
    assert error == f"no answer from ghost@x; workers that answer: w1@place, {ALIAS}"
    with pytest.raises(BrainRefusedError):
        place.command("pool-resize", worker_name="ghost@x", delta=1)


def test_what_celery_has_not(place, workers):
    """Dead letters are no capability of Celery's adapter, and the brain does not even ask."""
    with pytest.raises(BrainRefusedError, match="422"):
        place.command("requeue-dead-letter", engine="celery", task_id="t")
    with pytest.raises(BrainRefusedError, match="409"):
        place.brain.get(f"/projects/{place.project}/dead-letters", engine="celery")


def test_twenty_at_once(place, workers):
    """Twenty commands at once are all answered, and tasks go on meanwhile."""
    issued = [
        place.brain.issue(
            place.project,
            "rate-limit",
            agent_id=place.agent.agent_id,
            task_name="e2e.add",
            rate="0",
            worker_name=ALIAS,
        )
        for _ in range(20)
    ]
    assert place.run("add", 2, 2) == ("SUCCESS", 4)
    rows = [place.brain.wait_command(place.project, row["id"]) for row in issued]
    assert {row["status"] for row in rows} == {"completed"}, json.dumps(
        [row["error"] for row in rows]
    )


def test_told_from_outside(place, workers, monkeypatch):
    """Both agents answer another process for themselves, and connect anew when they are told to; the workers go on."""
    monkeypatch.setenv("Z4J_HOME", str(place.home / "agent"))
    rows = control.status()
    assert sorted(row["pid"] for row in rows) == sorted(worker.pid for worker in workers)
    assert sorted(name for row in rows for name in row["workers"]["celery"]) == ["w1@place", ALIAS]
    assert [row["connected"] for row in rows] == [True, True]
    before = place.sessions()
    code, said = control.send_restart(rows[0]["adapter"])
    assert code == 0, said

    def anew():
        now = place.sessions()
        return all(now[worker] != stamp for worker, stamp in before.items())

    until(anew, "two new sessions", timeout=20)
    assert place.run("add", 1, 2) == ("SUCCESS", 3)


@pytest.mark.long
@pytest.mark.parametrize("pool", ASKED, indirect=True)
def test_the_brain_asks_after_a_task(place, workers, old_task):
    """The brain's own question after a task that it has not heard of for long is answered with what Celery knows."""

    def answered():
        rows = [
            row for row in place.brain.commands(place.project) if row["action"] == "reconcile_task"
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


def test_nothing_was_logged_as_an_error(place, workers):
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
