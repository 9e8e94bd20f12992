"""Worker controls against workers that accept, refuse, keep silent, or accept without effect."""

import sys
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest

from tests.support.celery_fakes import FakeCluster, FakeWorker
from z4j_bare.engines.celery import controls as module

#: A worker's node name, and its name in the brain.
NAME = "w2@web-2.example.com"
ALIAS = "w2@web-2_example_com"


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(module, "ready_worker", lambda: None)
    cluster = FakeCluster()
    cluster.workers = {"w1@web-1": FakeWorker("prefork"), NAME: FakeWorker()}
    yield cluster
    assert cluster.connections == 0


@pytest.fixture
def worker(cluster):
    return cluster.workers[NAME]


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "prefork", "celery_pool_asyncio"])
def test_pool_resize_succeeds_when_worker_has_new_size(cluster, worker, pool):
    """A resize succeeds once the worker runs that many tasks; the worker is named by its alias."""
    worker.pool = pool
    result = cluster.controls.pool_grow(ALIAS, 2, seconds=58)
    assert (result.status, result.result) == (
        "success",
        {"worker": ALIAS, "pool": pool, "delta": 2, "size": 6},
    )
    assert worker.size == 6
    assert cluster.controls.pool_shrink(NAME, 5, seconds=58).result == {
        "worker": ALIAS,
        "pool": pool,
        "delta": 5,
        "size": 1,
    }
    assert cluster.commands.count("ping") == 1, "the second resize uses the cached name"


@pytest.mark.parametrize("pool", ["threads", "solo"])
@pytest.mark.parametrize("action", ["pool_grow", "pool_shrink"])
def test_pool_resize_fails_for_pool_of_fixed_size(cluster, worker, pool, action):
    """A pool that cannot be resized gets no command, and the error says not supported."""
    worker.pool = pool
    error = cluster.error_of(action, ALIAS, 1)
    assert str(error).startswith(f"not supported by the {pool} pool: ")
    assert not error.indeterminate
    assert cluster.commands[-1] == "stats"


def test_pool_shrink_keeps_one_task(cluster, worker):
    """A pool is never shrunk to zero."""
    assert "at least one must remain" in str(cluster.error_of("pool_shrink", ALIAS, 4))
    assert worker.size == 4


def test_control_fails_with_worker_error(cluster, worker):
    """The error is the worker's own text."""
    worker.autoscaled = True
    assert (
        str(cluster.error_of("pool_grow", ALIAS, 1))
        == f"{ALIAS} replied: not supported with autoscale"
    )


@pytest.mark.parametrize(
    ("action", "args", "message"),
    [
        ("pool_grow", (2,), "does not run 6 tasks"),
        ("add_consumer", ("q",), "q is not among its queues"),
        ("cancel_consumer", ("celery",), "celery is still among its queues"),
    ],
)
def test_control_fails_without_effect(cluster, worker, action, args, message):
    """A worker that accepts and does nothing is a failure with unknown outcome."""
    worker.lazy = True
    error = cluster.error_of(action, ALIAS, *args)
    assert message in str(error)
    assert error.indeterminate
    assert 10 < cluster.backend.now() < 20


@pytest.mark.parametrize(
    ("action", "args"),
    [
        ("pool_grow", (1,)),
        ("pool_shrink", (1,)),
        ("add_consumer", ("q",)),
        ("cancel_consumer", ("q",)),
        ("restart_worker", ()),
    ],
)
def test_control_fails_for_unknown_worker(cluster, action, args):
    """An unknown worker name is a failure that lists the live workers; nothing is changed."""
    error = cluster.error_of(action, "ghost@x", *args)
    assert str(error) == f"no answer from ghost@x; workers that answer: w1@web-1, {ALIAS}"
    assert not error.indeterminate
    assert cluster.commands == ["ping"]


def test_control_fails_without_workers(cluster):
    """Without a worker nothing is reported as done."""
    cluster.workers = {}
    assert (
        str(cluster.error_of("pool_grow", "w1", 1))
        == "no answer from w1; workers that answer: none"
    )
    for action, args in (("cancel_task", ("t",)), ("rate_limit", ("shop.pay", "1"))):
        error = cluster.error_of(action, *args)
        assert str(error) == "no answer from any worker"
        assert error.indeterminate


def test_control_waits_for_silent_worker_until_deadline(cluster, worker):
    """A worker that stops replying is waited for until the deadline, and no longer."""

    def reply_once():
        worker.silent = True
        return FakeWorker().on_stats()

    worker.on_stats = reply_once
    error = cluster.error_of("pool_grow", NAME, 1)
    assert (str(error), error.indeterminate) == (f"no answer from {ALIAS}", True)
    assert 50 < cluster.backend.now() < 58


def test_control_fails_when_broker_fails(cluster):
    """The error of the broker is reported without its address."""
    cluster.broker_error = ConnectionRefusedError("no broker at redis://:secret@host")
    assert (
        str(cluster.error_of("pool_grow", ALIAS, 1)) == "the broker failed: ConnectionRefusedError"
    )


def test_consumer_is_added_and_cancelled(cluster, worker):
    """A queue can be added and cancelled; one that the worker does not consume cannot."""
    assert cluster.controls.add_consumer(ALIAS, "extra", seconds=58).result == {
        "worker": ALIAS,
        "pool": "gevent",
        "queue": "extra",
    }
    assert worker.queues == ["celery", "extra"]
    assert cluster.controls.cancel_consumer(ALIAS, "extra", seconds=58).status == "success"
    assert worker.queues == ["celery"]
    assert (
        str(cluster.error_of("cancel_consumer", ALIAS, "extra"))
        == f"{ALIAS} does not consume from extra"
    )


def test_restart_reports_replaced_processes(cluster):
    """The result has the worker's reply and the number of processes replaced so far."""
    cluster.workers["w1@web-1"].idle = 1
    result = cluster.controls.restart_worker("w1@web-1", seconds=58).result
    assert result == {
        "worker": "w1@web-1",
        "pool": "prefork",
        "replaced": 3,
        "pending": 1,
        "says": "reload started",
    }


def test_restart_does_not_wait_for_busy_processes(cluster):
    """While every process runs a task none can be replaced, and the control returns."""
    cluster.workers["w1@web-1"].idle = 4
    result = cluster.controls.restart_worker("w1@web-1", seconds=58).result
    assert (result["replaced"], result["pending"]) == (0, 4)
    assert cluster.backend.now() < 10


def test_restart_names_setting_when_disabled(cluster):
    """Celery disables restarts by default, and the error names the setting."""
    cluster.workers["w1@web-1"].restarts = False
    error = str(cluster.error_of("restart_worker", "w1@web-1"))
    assert error == "not supported by the prefork pool: worker_pool_restarts is off on w1@web-1"


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "threads", "solo"])
def test_restart_fails_for_pools_without_processes(cluster, worker, pool):
    """Only a prefork pool has processes to replace."""
    worker.pool = pool
    assert str(cluster.error_of("restart_worker", ALIAS)).startswith(
        f"not supported by the {pool} pool: "
    )


def test_rate_limit_applies_to_one_or_all_workers(cluster, worker):
    """The limit is set on the named worker or on all, and verified there."""
    result = cluster.controls.rate_limit("shop.pay", "10/m", seconds=58, worker_name=ALIAS)
    assert result.result == {
        "task_name": "shop.pay",
        "rate": "10/m",
        "workers": [ALIAS],
        "refused": {},
    }
    assert [each.tasks["shop.pay"] for each in cluster.workers.values()] == [None, "10/m"]
    assert cluster.controls.rate_limit("shop.pay", "0", seconds=58).result["workers"] == [
        "w1@web-1",
        ALIAS,
    ]
    assert [each.tasks["shop.pay"] for each in cluster.workers.values()] == ["0", "0"]


def test_rate_limit_reports_workers_without_task(cluster, worker):
    """A limit for all workers applies where the task is known, and the result names the others."""
    worker.tasks = {"mail.send": None}
    result = cluster.controls.rate_limit("mail.send", "1/s", seconds=58).result
    assert (result["workers"], result["refused"]) == (
        [ALIAS],
        {"w1@web-1": "w1@web-1 replied: unknown task"},
    )


def test_effect_check_is_repeated_after_failure(cluster, worker):
    """A worker too busy to reply to one check is checked again."""

    def grow(n):
        worker.silent = True
        cluster.backend.spawn(
            lambda: cluster.backend.sleep(3) or setattr(worker, "silent", False), name="recovers"
        )
        return worker.resize(n)

    worker.on_pool_grow = grow
    assert cluster.controls.pool_grow(ALIAS, 1, seconds=58).result["size"] == 5
    assert cluster.backend.now() > 3


def test_rate_limit_fails_when_not_applied(cluster, worker):
    """Unknown tasks, invalid rates and limits without effect are failures."""
    assert f"{ALIAS} replied: unknown task" in str(
        cluster.error_of("rate_limit", "no.such", "1", worker_name=ALIAS)
    )
    assert "unknown task" in str(cluster.error_of("rate_limit", "no.such", "1"))
    for rate in ("fast", "-1", "1/d", "01", ""):
        assert "is not a rate" in str(cluster.error_of("rate_limit", "shop.pay", rate))
    worker.lazy = True
    assert str(cluster.error_of("rate_limit", "shop.pay", "5")) == f"not applied on {ALIAS}"


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "prefork"])
def test_cancel_task_terminates_running_task(cluster, worker, pool):
    """All workers get the revoke, and the control waits until the task has ended."""
    worker.pool = pool
    worker.states["t"] = "active"
    result = cluster.controls.cancel_task("t", seconds=58)
    assert result.result == {
        "task_id": "t",
        "terminated": True,
        "worker": ALIAS,
        "workers": ["w1@web-1", ALIAS],
        "refused": {},
    }
    assert [each.revoked for each in cluster.workers.values()] == [["t"], ["t"]]


@pytest.mark.parametrize("pool", ["threads", "solo"])
@pytest.mark.parametrize("state", ["active", "reserved"])
def test_cancel_task_fails_for_pools_that_cannot_terminate(cluster, worker, pool, state):
    """If the pool cannot end the task, no worker gets a revoke that would hide it."""
    worker.pool = pool
    worker.states["t"] = state
    assert str(cluster.error_of("cancel_task", "t")).startswith(
        f"not supported by the {pool} pool: "
    )
    assert all(each.revoked == [] for each in cluster.workers.values())


@pytest.mark.parametrize(
    ("state", "pool"), [(None, "threads"), ("scheduled", "threads"), ("reserved", "gevent")]
)
def test_cancel_task_revokes_waiting_task(cluster, worker, state, pool):
    """A task that waits in a queue or for its ETA is revoked in every pool."""
    worker.pool = pool
    worker.states.update({"t": state} if state else {})
    result = cluster.controls.cancel_task("t", seconds=58).result
    assert (result["terminated"], result["workers"]) == (False, ["w1@web-1", ALIAS])


def test_cancel_task_revokes_uuid_too(cluster, worker):
    """An id that no worker has as text is revoked as a UUID as well; any other one only as text."""
    task_id = uuid4()
    assert cluster.controls.cancel_task(str(task_id), seconds=58).result["terminated"] is False
    assert worker.revoked == [str(task_id), task_id]
    worker.on_revoke = lambda task_id, **_: {
        "error": "TypeError('sequence item 0: expected str instance, UUID found')"
        if isinstance(task_id, UUID)
        else "none"
    }
    assert cluster.controls.cancel_task(str(task_id), seconds=58).result["terminated"] is True


def test_cancel_task_fails_when_task_continues(cluster, worker):
    """A task that still runs long after the revoke is a failure with unknown outcome."""
    worker.states["t"] = "active"
    worker.lazy = True
    error = cluster.error_of("cancel_task", "t")
    assert "it still runs" in str(error)
    assert error.indeterminate


def test_cancel_task_detects_busy_local_solo_worker(cluster, monkeypatch):
    """A solo worker reads no command while it runs a task, so this process checks its own tasks."""
    pool = type("TaskPool", (), {"__module__": "celery.concurrency.solo"})()
    monkeypatch.setattr(module, "ready_worker", lambda: SimpleNamespace(pool=pool))
    monkeypatch.setitem(
        sys.modules,
        "celery.worker.state",
        SimpleNamespace(active_requests=[SimpleNamespace(id="t")]),
    )
    assert "not supported by the solo pool" in str(cluster.error_of("cancel_task", "t"))
    assert cluster.controls.cancel_task("other", seconds=58).status == "success"
