"""Celery applications, messages, workers and brokers for unit tests, without a running broker."""

from types import SimpleNamespace

import celery
import pytest
from celery.app.trace import build_tracer

from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.engines.celery.controls import CeleryControls
from z4j_bare.engines.celery.event_receiver import POLL_TIMEOUT
from z4j_bare.errors import CommandError
from z4j_bare.events.redaction import safe_name


def memory_app(name="shop"):
    """Return a Celery application on kombu's memory transport."""
    return celery.Celery(name, broker="memory://", backend="cache+memory://", set_as_current=False)


def task_request(app, name, task_id="t1", args=(), kwargs=None):
    """Return a Request of a received task, with the attributes that the handlers read."""
    return SimpleNamespace(
        id=task_id,
        task=app.tasks[name],
        args=list(args),
        kwargs=kwargs or {},
        parent_id=None,
        root_id=task_id,
        delivery_info={"routing_key": "q"},
        retries=0,
        request_dict={"retries": 0},
        argsrepr=repr(tuple(args)),
        kwargsrepr=repr(kwargs or {}),
    )


def receive(app, name, task_id="t1", args=(), kwargs=None):
    """Send ``task_received`` and return the Request."""
    request = task_request(app, name, task_id, args, kwargs)
    celery.signals.task_received.send(sender=None, request=request)
    return request


def trace(app, name, task_id="t1", args=(), kwargs=None):
    """Run a task with Celery's tracer, as every pool does."""
    request = {
        "id": task_id,
        "delivery_info": {"routing_key": "q"},
        "retries": 0,
        "is_eager": False,
    }
    build_tracer(name, app.tasks[name], app=app)(task_id, args, kwargs or {}, request)


def worker_consumer(pool_class):
    """Return a Consumer with this pool and the attributes that the event source reads."""
    return SimpleNamespace(
        hostname="w@h",
        pool=object.__new__(pool_class),
        event_dispatcher=SimpleNamespace(groups={"worker"}),
    )


class FakeWorker:
    """A worker that replies to remote control.

    With ``lazy`` it accepts commands without an effect. With ``silent`` it does not reply.
    """

    def __init__(self, pool="gevent", size=4):
        self.pool, self.size = pool, size
        self.pids = list(range(100, 100 + size))
        self.queues = ["celery"]
        self.tasks = {"shop.pay": None}
        self.states = {}
        self.revoked = []
        self.idle = 0
        self.restarts = True
        self.autoscaled = self.lazy = self.silent = False

    def handle(self, command, arguments):
        return getattr(self, f"on_{command}")(**arguments)

    def on_ping(self):
        return {"ok": "pong"}

    def on_stats(self):
        module = "thread" if self.pool == "threads" else self.pool
        pool = {
            "implementation": f"celery.concurrency.{module}:TaskPool",
            "max-concurrency": self.size,
        }
        if self.pool == "prefork":
            pool = {**pool, "max-concurrency": 4, "processes": list(self.pids)}
        return {"pool": pool}

    def on_pool_grow(self, n):
        return self.resize(n)

    def on_pool_shrink(self, n):
        return self.resize(-n)

    def resize(self, n):
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


class ClusterConnection:
    """A broker connection for one command. The cluster counts the open ones."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.open = False
        self.alt = ["memory://"]
        self.connection = None
        self.transport = SimpleNamespace(driver_type="memory")

    def ensure_connection(self, **_options):
        if self.cluster.broker_error:
            raise self.cluster.broker_error
        self.open = True

    def __enter__(self):
        self.cluster.connections += 1
        return self

    def __exit__(self, *exc):
        self.cluster.connections -= 1


class Mailbox:
    """A fake of kombu's mailbox. It rejects a producer pool, which is not safe in a fork."""

    producer_pool = "the app's"

    def __init__(self, cluster, connection):
        self.cluster, self.connection = cluster, connection

    def call(self, destination, command, kwargs, timeout):
        assert (self.producer_pool, self.connection.open) == (None, True)
        return self.cluster.broadcast(command, kwargs, destination, timeout)

    def multi_call(self, command, kwargs, timeout):
        return self.call(None, command, kwargs, timeout)


class FakeCluster:
    """A Celery application whose broadcasts reach ``workers``, in virtual time."""

    def __init__(self):
        self.backend = FakeConcurrency()
        self.workers = {}
        self.connections = 0
        self.commands = []
        self.broker_error = None
        self.control = SimpleNamespace(mailbox=lambda connection: Mailbox(self, connection))
        self.controls = CeleryControls(
            self, lambda name: safe_name(name, lambda text: "." in text), self.backend
        )

    def connection_for_write(self, connect_timeout):
        assert connect_timeout > 0
        return ClusterConnection(self)

    def broadcast(self, command, arguments, destination, timeout):
        assert timeout > 0
        self.commands.append(command)
        names = destination or list(self.workers)
        reached = [name for name in names if name in self.workers and not self.workers[name].silent]
        replies = [{name: self.workers[name].handle(command, arguments)} for name in reached]
        if destination is None or not replies:
            self.backend.sleep(timeout)
        return replies or None

    def error_of(self, action, *args, **kwargs):
        """Call a control and return the error that it raises."""
        with pytest.raises(CommandError) as caught:
            getattr(self.controls, action)(*args, seconds=58, **kwargs)
        return caught.value


class FakeBroker:
    """A Celery application that is also its only connection to the broker.

    ``connect`` raises ``error``, and ``drain_events`` calls ``drain``. ``attempts`` has the time of
    each connection attempt.
    """

    def __init__(self, backend):
        self.backend = backend
        self.attempts = []
        self.released = 0
        self.error = None
        self.drain = lambda: self.backend.sleep(POLL_TIMEOUT)
        self.events = SimpleNamespace(
            Receiver=lambda _connection: SimpleNamespace(queue=None, accept=None)
        )

    def connection_for_read(self, **_options):
        self.attempts.append(self.backend.now())
        return self

    def connect(self):
        if self.error:
            raise self.error

    def Consumer(self, callbacks, **_options):
        self.callback = callbacks[0]
        return SimpleNamespace(consume=lambda: None)

    def drain_events(self, timeout):
        self.drain()
        self.backend.sleep(timeout)
        raise TimeoutError("timed out")

    def heartbeat_check(self):
        pass

    def release(self):
        self.released += 1
        raise OSError("already disconnected")
