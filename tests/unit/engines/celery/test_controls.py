"""Worker controls against workers that answer, refuse, keep silent or say yes and do nothing."""

import sys
from types import SimpleNamespace

import pytest

from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.engines.celery import controls as module
from z4j_bare.engines.celery.controls import CeleryControls
from z4j_bare.errors import CommandError
from z4j_bare.events.redaction import safe_name

MODULES = {"threads": "thread"}
NAME = "w2@web-2.example.com"
ALIAS = "w2@web-2_example_com"


class FakeWorker:
    """What a worker answers to remote control; ``lazy`` says yes and does nothing, ``deaf`` hears nothing."""

    def __init__(self, pool="gevent", size=4):
        self.pool, self.size = pool, size
        self.pids = list(range(100, 100 + size))
        self.queues = ["celery"]
        self.tasks = {"shop.pay": None}
        self.states = {}
        self.revoked = []
        self.idle = 0
        self.restarts = True
        self.autoscaled = self.lazy = self.deaf = False

    def handle(self, command, arguments):
        return getattr(self, f"on_{command}")(**arguments)

    def on_ping(self):
        return {"ok": "pong"}

    def on_stats(self):
        pool = {
            "implementation": f"celery.concurrency.{MODULES.get(self.pool, self.pool)}:TaskPool",
            "max-concurrency": self.size,
        }
        if self.pool == "prefork":
            pool = {**pool, "max-concurrency": 4, "processes": list(self.pids)}
        return {"pool": pool}

    def on_pool_grow(self, n):
        return self._resize(n)

    def on_pool_shrink(self, n):
        return self._resize(-n)

    def _resize(self, n):
        if self.autoscaled:
            return {"error": "not supported with autoscale"}
        if not self.lazy:
            self.size += n
            self.pids = list(range(100, 100 + self.size))
        return {"ok": "pool will change"}

    def on_pool_restart(self):
        if not self.restarts:
            return {"error": "ValueError('Pool restarts not enabled')"}
        self.pids = [*self.pids[: self.idle], *(pid + 1000 for pid in self.pids[self.idle :])]
        return {"ok": "reload started"}

    def on_active_queues(self):
        return [{"name": name} for name in self.queues]

    def on_add_consumer(self, queue):
        if not self.lazy:
            self.queues.append(queue)
        return {"ok": f"add consumer {queue}"}

    def on_cancel_consumer(self, queue):
        if not self.lazy:
            self.queues.remove(queue)
        return {"ok": f"no longer consuming from {queue}"}

    def on_rate_limit(self, task_name, rate_limit):
        if task_name not in self.tasks:
            return {"error": "unknown task"}
        if not self.lazy:
            self.tasks[task_name] = rate_limit
        return {"ok": "new rate limit set successfully"}

    def on_registered(self, taskinfoitems):
        assert taskinfoitems == ["rate_limit"]
        return [
            name if rate is None else f"{name} [rate_limit={rate}]"
            for name, rate in self.tasks.items()
        ]

    def on_query_task(self, ids):
        return {task: [self.states[task], {"id": task}] for task in ids if task in self.states}

    def on_revoke(self, task_id, terminate, signal):
        assert (terminate, signal) == (True, "SIGTERM")
        self.revoked.append(task_id)
        if not self.lazy:
            self.states.pop(task_id, None)
        return {"ok": "terminate: tasks unknown"}


class Connection:
    """A connection of its own for each question, closed after it."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.open = False

    def connect(self):
        if self.cluster.broken:
            raise self.cluster.broken
        self.open = True

    def __enter__(self):
        self.cluster.connections += 1
        return self

    def __exit__(self, *exc):
        self.cluster.connections -= 1


class Mailbox:
    """kombu's: with a pool it would publish on a connection that a forked child may close."""

    producer_pool = "the app's"

    def __init__(self, cluster, connection):
        self.cluster, self.connection = cluster, connection

    def call(self, destination, command, kwargs, timeout):
        assert (self.producer_pool, self.connection.open) == (None, True)
        return self.cluster.broadcast(command, kwargs, destination, timeout)

    def multi_call(self, command, kwargs, timeout):
        return self.call(None, command, kwargs, timeout)


class Cluster:
    """A Celery application whose broadcasts reach the workers in ``workers``; virtual time passes as with a real broker."""

    def __init__(self):
        self.backend = FakeConcurrency()
        self.workers = {}
        self.connections = 0
        self.told = []
        self.broken = None
        self.control = SimpleNamespace(mailbox=lambda connection: Mailbox(self, connection))
        self.controls = CeleryControls(
            self, lambda name: safe_name(name, lambda text: "." in text), self.backend
        )

    def connection_for_write(self, connect_timeout):
        assert connect_timeout > 0
        return Connection(self)

    def broadcast(self, command, arguments, destination, timeout):
        assert timeout > 0
        self.told.append(command)
        names = destination or list(self.workers)
        heard = [name for name in names if name in self.workers and not self.workers[name].deaf]
        replies = [{name: self.workers[name].handle(command, arguments)} for name in heard]
        if destination is None or not replies:
            self.backend.sleep(timeout)
        return replies or None

    def fails(self, action, *args, **kwargs):
        """The error with which a control fails."""
        with pytest.raises(CommandError) as caught:
            getattr(self.controls, action)(*args, seconds=58, **kwargs)
        return caught.value


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(module, "ready_worker", lambda: None)
    made = Cluster()
    made.workers = {"w1@web-1": FakeWorker("prefork"), NAME: FakeWorker()}
    yield made
    assert made.connections == 0


@pytest.fixture
def worker(cluster):
    return cluster.workers[NAME]


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "prefork", "celery_pool_asyncio"])
def test_a_pool_grows_and_shrinks(cluster, worker, pool):
    """A resize is a success when the worker then runs that many tasks at a time; it goes by its name in the brain."""
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
    assert cluster.told.count("ping") == 1, "the second time it was known"


@pytest.mark.parametrize("pool", ["threads", "solo"])
@pytest.mark.parametrize("action", ["pool_grow", "pool_shrink"])
def test_a_pool_of_fixed_size(cluster, worker, pool, action):
    """What a pool cannot do is answered as not supported, and the worker is told nothing."""
    worker.pool = pool
    error = cluster.fails(action, ALIAS, 1)
    assert str(error).startswith(f"not supported by the {pool} pool: ")
    assert not error.indeterminate
    assert cluster.told[-1] == "stats"


def test_one_task_at_a_time_is_left(cluster, worker):
    """A pool is never shrunk to nothing."""
    assert "one has to be left" in str(cluster.fails("pool_shrink", ALIAS, 4))
    assert worker.size == 4


def test_the_workers_own_error_is_the_answer(cluster, worker):
    """What the worker says against it is passed on."""
    worker.autoscaled = True
    assert (
        str(cluster.fails("pool_grow", ALIAS, 1)) == f"{ALIAS} says: not supported with autoscale"
    )


@pytest.mark.parametrize(
    ("action", "args", "left"),
    [
        ("pool_grow", (2,), "does not run 6 tasks"),
        ("add_consumer", ("q",), "q is not among its queues"),
        ("cancel_consumer", ("celery",), "celery is still among its queues"),
    ],
)
def test_yes_is_not_enough(cluster, worker, action, args, left):
    """A worker that agrees and does nothing is no success, and the outcome counts as unknown."""
    worker.lazy = True
    error = cluster.fails(action, ALIAS, *args)
    assert left in str(error)
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
def test_a_worker_that_does_not_exist(cluster, action, args):
    """A name that no live worker bears is a failure that lists those there are, and changes nothing."""
    error = cluster.fails(action, "ghost@x", *args)
    assert str(error) == f"no answer from ghost@x; workers that answer: w1@web-1, {ALIAS}"
    assert not error.indeterminate
    assert cluster.told == ["ping"]


def test_no_worker_at_all(cluster):
    """Without any worker nothing is reported as done."""
    cluster.workers = {}
    assert (
        str(cluster.fails("pool_grow", "w1", 1)) == "no answer from w1; workers that answer: none"
    )
    for action, args in (("cancel_task", ("t",)), ("rate_limit", ("shop.pay", "1"))):
        error = cluster.fails(action, *args)
        assert str(error) == "no answer from any worker"
        assert error.indeterminate


def test_a_worker_that_falls_silent(cluster, worker):
    """A worker that answers no more after it has been found is waited for until the end of our time, and not longer."""

    def last_words():
        worker.deaf = True
        return FakeWorker().on_stats()

    worker.on_stats = last_words
    error = cluster.fails("pool_grow", NAME, 1)
    assert (str(error), error.indeterminate) == (f"no answer from {ALIAS}", True)
    assert 50 < cluster.backend.now() < 58


def test_a_broker_that_fails(cluster):
    """An error of the broker is an answer, without the address that it may quote."""
    cluster.broken = ConnectionRefusedError("no broker at redis://:secret@host")
    assert str(cluster.fails("pool_grow", ALIAS, 1)) == "the broker failed: ConnectionRefusedError"


def test_consumers_come_and_go(cluster, worker):
    """A worker consumes from one more queue, and no longer from it; what it does not consume it cannot give up."""
    assert cluster.controls.add_consumer(ALIAS, "extra", seconds=58).result == {
        "worker": ALIAS,
        "pool": "gevent",
        "queue": "extra",
    }
    assert worker.queues == ["celery", "extra"]
    assert cluster.controls.cancel_consumer(ALIAS, "extra", seconds=58).status == "success"
    assert worker.queues == ["celery"]
    assert (
        str(cluster.fails("cancel_consumer", ALIAS, "extra"))
        == f"{ALIAS} does not consume from extra"
    )


def test_a_prefork_pool_restarts(cluster):
    """A restart is what the worker says it is, and the answer tells how many processes have been replaced so far."""
    cluster.workers["w1@web-1"].idle = 1
    result = cluster.controls.restart_worker("w1@web-1", seconds=58).result
    assert result == {
        "worker": "w1@web-1",
        "pool": "prefork",
        "replaced": 3,
        "pending": 1,
        "says": "reload started",
    }


def test_a_restart_that_waits_for_tasks(cluster):
    """While every process is at a task none can be replaced, and nobody waits for that long."""
    cluster.workers["w1@web-1"].idle = 4
    result = cluster.controls.restart_worker("w1@web-1", seconds=58).result
    assert (result["replaced"], result["pending"]) == (0, 4)
    assert cluster.backend.now() < 10


def test_restarts_that_are_off_name_the_setting(cluster):
    """Celery's default forbids restarts, and the answer says which setting allows them."""
    cluster.workers["w1@web-1"].restarts = False
    error = str(cluster.fails("restart_worker", "w1@web-1"))
    assert error == "not supported by the prefork pool: worker_pool_restarts is off on w1@web-1"


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "threads", "solo"])
def test_pools_that_cannot_restart(cluster, worker, pool):
    """Only a prefork pool has something to replace."""
    worker.pool = pool
    assert str(cluster.fails("restart_worker", ALIAS)).startswith(
        f"not supported by the {pool} pool: "
    )


def test_a_rate_limit_on_one_and_on_all(cluster, worker):
    """The limit is set on the worker that was named, or on every one, and looked up there."""
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


def test_not_every_worker_knows_every_task(cluster, worker):
    """A limit for all is in force where the task is known, and the answer names who does not know it."""
    worker.tasks = {"mail.send": None}
    result = cluster.controls.rate_limit("mail.send", "1/s", seconds=58).result
    assert (result["workers"], result["refused"]) == (
        [ALIAS],
        {"w1@web-1": "w1@web-1 says: unknown task"},
    )


def test_a_look_that_fails_is_not_the_last(cluster, worker):
    """A worker too busy to answer one look at the effect is asked again."""

    def grow(n):
        worker.deaf = True
        cluster.backend.spawn(
            lambda: cluster.backend.sleep(3) or setattr(worker, "deaf", False), name="recovers"
        )
        return worker._resize(n)

    worker.on_pool_grow = grow
    assert cluster.controls.pool_grow(ALIAS, 1, seconds=58).result["size"] == 5
    assert cluster.backend.now() > 3


def test_a_rate_limit_that_is_not_in_force(cluster, worker):
    """Unknown tasks, bad rates and workers that only say yes are failures that name the worker."""
    assert f"{ALIAS} says: unknown task" in str(
        cluster.fails("rate_limit", "no.such", "1", worker_name=ALIAS)
    )
    assert "unknown task" in str(cluster.fails("rate_limit", "no.such", "1"))
    for rate in ("fast", "-1", "1/d", "01", ""):
        assert "is not a rate" in str(cluster.fails("rate_limit", "shop.pay", rate))
    worker.lazy = True
    assert str(cluster.fails("rate_limit", "shop.pay", "5")) == f"not in force on {ALIAS}"


@pytest.mark.parametrize("pool", ["gevent", "eventlet", "prefork"])
def test_a_running_task_is_ended(cluster, worker, pool):
    """All workers are told, and the one that runs the task is watched until it does not."""
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
def test_a_running_task_that_cannot_be_ended(cluster, worker, pool, state):
    """Where a pool cannot end a task nobody is told anything: revoking would only hide that it goes on."""
    worker.pool = pool
    worker.states["t"] = state
    assert str(cluster.fails("cancel_task", "t")).startswith(f"not supported by the {pool} pool: ")
    assert all(each.revoked == [] for each in cluster.workers.values())


@pytest.mark.parametrize(
    ("state", "pool"), [(None, "threads"), ("scheduled", "threads"), ("reserved", "gevent")]
)
def test_a_task_that_does_not_run_is_revoked(cluster, worker, state, pool):
    """A task that waits, in the queue or for its time, is revoked in every pool."""
    worker.pool = pool
    worker.states.update({"t": state} if state else {})
    result = cluster.controls.cancel_task("t", seconds=58).result
    assert (result["terminated"], result["workers"]) == (False, ["w1@web-1", ALIAS])


def test_a_task_that_goes_on(cluster, worker):
    """A task that still runs long after its worker said yes is no success."""
    worker.states["t"] = "active"
    worker.lazy = True
    error = cluster.fails("cancel_task", "t")
    assert "it still runs" in str(error)
    assert error.indeterminate


def test_our_own_busy_solo_worker(cluster, monkeypatch):
    """A solo worker hears nothing while it runs a task, so this process looks for itself."""
    pool = type("TaskPool", (), {"__module__": "celery.concurrency.solo"})()
    monkeypatch.setattr(module, "ready_worker", lambda: SimpleNamespace(pool=pool))
    monkeypatch.setitem(
        sys.modules,
        "celery.worker.state",
        SimpleNamespace(active_requests=[SimpleNamespace(id="t")]),
    )
    assert "not supported by the solo pool" in str(cluster.fails("cancel_task", "t"))
    assert cluster.controls.cancel_task("other", seconds=58).status == "success"
