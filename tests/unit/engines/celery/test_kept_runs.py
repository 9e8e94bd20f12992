"""The runs that the signal handlers keep: start, acknowledgement, and every kind of end."""

import json
from types import SimpleNamespace

import pytest
from celery import signals
from celery.concurrency.prefork import TaskPool as Prefork
from celery.concurrency.solo import TaskPool as Solo
from celery.exceptions import Ignore
from greenlet import GreenletExit
from z4j_celery import CeleryEngineAdapter

from tests.support.celery_fakes import memory_app, receive, trace, worker_consumer
from z4j_bare.buffer.open_runs import OpenRuns, OrphanRuns, runs_path
from z4j_bare.concurrency.threads import ThreadEvent
from z4j_bare.engines.celery.capture import CeleryCapture
from z4j_bare.engines.celery.kept_runs import KeptRuns, redelivers
from z4j_bare.engines.celery.prefork import prefork
from z4j_bare.engines.celery.source import CelerySource
from z4j_bare.engines.celery.task_state import TaskState, TaskType
from z4j_bare.events.ring import Ring
from z4j_bare.settings import load_settings


class Worker:
    """A capture whose runs are in a file."""

    def __init__(self, tmp_path, broker):
        self.app = memory_app()
        self.app.conf.broker_url = broker
        self.ring = Ring(100, 100, ThreadEvent())
        self.runs = self.ring.runs = OpenRuns(self.ring, lambda: "p")
        self.capture = CeleryCapture(
            CeleryEngineAdapter(celery_app=self.app), self.ring.put, "w@h", runs=self.runs
        )
        self.capture.connect()
        self.path = tmp_path / "home" / "z4j-green-1.sqlite"
        self.path.parent.mkdir(0o700)
        self.runs.attach(self.path)
        #: What the file would report if the process died inside a task.
        self.inside = []

    def task(self, name, body, **options):
        """Register a task that looks into the file before its body runs."""

        def run(*args):
            self.inside.append(self.reports())
            return body(*args)

        return self.app.task(shared=False, name=name, **options)(run)

    def run(self, name):
        receive(self.app, name, task_id=name)
        trace(self.app, name, task_id=name)

    def reports(self):
        """Return ``(task id, kind)`` of what the next agent would report now."""
        orphan = OrphanRuns.__new__(OrphanRuns)
        orphan.path = runs_path(self.path)
        orphan._content = orphan.path.read_bytes()
        events = [json.loads(event) for event in orphan.events()]
        return [
            (event["task_id"], event["kind"]) for event in events if event["kind"] != "task.started"
        ]

    def data(self, task_id):
        """Return the data of the report of a task."""
        orphan = OrphanRuns.__new__(OrphanRuns)
        orphan.path, orphan._content = runs_path(self.path), runs_path(self.path).read_bytes()
        events = [json.loads(event) for event in orphan.events()]
        return [event["data"] for event in events if event["task_id"] == task_id][-1]


@pytest.fixture
def make(tmp_path):
    """``make(broker)``: a capture whose runs are in a file."""
    made = []

    def start(broker="redis://localhost"):
        made.append(Worker(tmp_path, broker))
        return made[-1]

    yield start
    for worker in made:
        worker.capture.disconnect()
        worker.runs._lock.release()
        worker.app.close()


def test_running_task_is_kept(make):
    """Inside a task its run is open; when its end is stored, nothing is left."""
    worker = make()
    worker.task("early", lambda: 1)
    worker.run("early")
    assert worker.inside == [[("early", "task.failed")]]
    assert worker.reports() == [("early", "task.succeeded")]
    assert worker.data("early") == {"task_name": "early", "queue": "q", "worker": "w@h"}
    worker.runs.stored(worker.ring.produced, 1.0)
    assert worker.reports() == []


def test_killed_greenlet_is_not_delivered_again(make):
    """Celery acknowledges a killed greenlet, so after a cold stop its late acknowledged run is a
    failure, and not a retry for ever.
    """
    worker = make()

    def body():
        raise GreenletExit

    worker.task("late", body, acks_late=True)
    with pytest.raises(GreenletExit):
        worker.run("late")
    assert worker.inside == [[("late", "task.retried")]]
    assert worker.reports() == [("late", "task.failed")]


@pytest.mark.parametrize(
    ("broker", "kind"),
    [
        ("redis://localhost", "task.retried"),
        ("pyamqp://localhost", "task.retried"),
        ("memory://", "task.failed"),
        ("filesystem://", "task.failed"),
    ],
)
def test_late_acknowledged_task_is_retried_where_broker_redelivers(make, broker, kind):
    """A broker that does not deliver again has lost the task."""
    worker = make(broker)
    worker.task("late", lambda: 1, acks_late=True)
    worker.run("late")
    assert worker.inside == [[("late", kind)]]


def test_acknowledgement_is_kept_per_run(make):
    """A task that is changed while the worker runs is acknowledged as it is at its start."""
    worker = make()
    task = worker.task("changed", lambda: 1)
    for task.acks_late in (True, False):
        worker.run("changed")
        worker.runs.stored(worker.ring.produced, 1.0)
    assert worker.inside == [[("changed", "task.retried")], [("changed", "task.failed")]]


def test_eager_run_inside_task_fails_with_it(make):
    """An eager run has no message that could be delivered again."""
    worker = make()
    inner = worker.task("inner", lambda: 1, acks_late=True)
    worker.task("outer", lambda: inner.apply(task_id="inner") and 1)
    worker.run("outer")
    assert worker.inside[1] == [("outer", "task.failed"), ("inner", "task.failed")]


def test_failed_task_is_kept_with_its_class(make):
    """The class of the exception survives, its message does not."""
    worker = make()

    def fail():
        raise KeyError("secret")

    worker.task("fails", fail)
    worker.run("fails")
    assert worker.reports() == [("fails", "task.failed")]
    assert worker.data("fails")["exception"] == "KeyError"
    assert b"secret" not in runs_path(worker.path).read_bytes()


def test_retried_task_is_kept_until_stored(make):
    """The end of a run that retries is a retry, and the next run is open again."""
    worker = make("memory://")

    def again(task):
        raise task.retry(countdown=1, exc=KeyError("x"))

    worker.task("retries", again, bind=True, max_retries=9)
    worker.run("retries")
    assert worker.reports() == [("retries", "task.retried")]
    worker.runs.stored(worker.ring.produced, 1.0)
    worker.run("retries")
    assert worker.inside[1] == [("retries", "task.failed")]


def test_revoked_task_is_kept_until_stored(make):
    """A run that was terminated is revoked."""
    worker = make()
    task = worker.task("revoked", lambda: 1)
    request = receive(worker.app, "revoked", task_id="revoked")
    signals.task_prerun.send(sender=task, task_id="revoked", task=task, args=(), kwargs={})
    signals.task_revoked.send(sender=task, request=request, terminated=True, signum=15)
    assert worker.reports() == [("revoked", "task.revoked")]


def test_end_without_event_is_not_reported(make):
    """The worker lived when the run ended, so its death is not the run's end."""
    worker = make()

    def ignore():
        raise Ignore

    worker.task("ignores", ignore)
    worker.run("ignores")
    assert worker.inside == [[("ignores", "task.failed")]]
    assert [each for each in worker.reports() if each[1] == "task.failed"] == []


def test_transport_that_cannot_be_loaded_does_not_redeliver():
    """A broker URL that Celery refuses must not stop the agent."""
    app = memory_app()
    app.conf.broker_url = "nonsense://"
    assert redelivers(app) is False
    app.close()


@pytest.mark.parametrize(("pool", "kept"), [(Solo, True), (Prefork, True), (None, False)])
def test_source_keeps_runs_of_worker(backend, pool, kept):
    """A worker keeps its runs in every pool, a process outside a worker none."""
    ring = Ring(10, 10, ThreadEvent())
    enabled = []
    ring.runs = SimpleNamespace(
        start=None, end=None, describe=None, enable=lambda: enabled.append(1)
    )
    app = memory_app()
    consumer = None if pool is None else worker_consumer(pool)
    CelerySource(CeleryEngineAdapter(celery_app=app), ring, load_settings(), backend, consumer)
    prefork.close()
    app.close()
    assert bool(enabled) == kept


def test_runs_of_prefork_children_are_kept(make):
    """The parent keeps what its children run, by the records that it makes of their notes."""
    worker = make()
    task = worker.task("child", lambda: 1, acks_late=True)
    encoder = SimpleNamespace(started="started", succeeded="succeeded", generic="generic")
    kept = KeptRuns(worker.runs, worker.ring.put, encoder, worker.app, "celery", "w@h")
    state = TaskState(TaskType(task.name, None), "q")
    kept.put(("received", 1.0, "t1", state, [], {}, None, None))
    assert worker.reports() == []
    kept.put(("started", 2.0, "t1", state))
    assert worker.reports() == [("t1", "task.retried")]
    kept.put(("generic", 3.0, "t1", state, "task.failed", {"exception": "KeyError"}, 1.0))
    assert worker.data("t1")["exception"] == "KeyError"
    kept.put(("started", 4.0, "t1", state))
    kept.put(("succeeded", 5.0, "t1", state, 1.0, True, None))
    assert worker.reports()[-1] == ("t1", "task.succeeded")
    kept.put(("started", 6.0, "t2", TaskState(TaskType("unregistered", None), "q")))
    assert worker.reports()[-1] == ("t2", "task.failed")
