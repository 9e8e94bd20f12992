"""The event source of each engine, in workers and outside of them."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import uuid4

import pytest
from celery import signals
from celery.concurrency.prefork import TaskPool as Prefork
from celery.concurrency.solo import TaskPool as Solo
from z4j_celery import CeleryEngineAdapter
from z4j_core.models import Event, EventKind

from tests.support.celery_fakes import memory_app, receive, worker_consumer
from z4j_bare.engines.celery.prefork import prefork
from z4j_bare.engines.celery.source import CelerySource, only_worker
from z4j_bare.engines.engine import describe_engine
from z4j_bare.events.ring import Ring
from z4j_bare.events.source import EventSource
from z4j_bare.settings import Settings


@pytest.fixture
def app():
    app = memory_app()

    @app.task(shared=False, name="shop.add", bind=True)
    def add(self, a, b=0):
        return a + b

    @app.task(shared=False, name="shop.fail")
    def fail():
        raise ValueError("broken")

    yield app
    app.close()


@pytest.fixture
def connect(app, backend):
    """``connect(consumer)`` returns a connected source and a function that takes its events."""
    sources = []

    def connect(consumer=None, **settings):
        ring = Ring(1000, 1000, backend.event())
        source = describe_engine(CeleryEngineAdapter(celery_app=app)).make_source(
            ring, Settings(**settings), backend, consumer
        )
        source.connect()
        sources.append(source)
        return source, lambda: [json.loads(record[0](record)) for record in ring.take(1000)]

    yield connect
    for source in sources:
        source.disconnect()
    prefork.close()


def loop_names(source):
    return [name for name, _run in source.loops()]


def test_source_reads_no_broker_in_single_process_worker(app, connect):
    """In a worker whose tasks run in its own process, signals carry every event and the broker is
    not read.
    """
    consumer = worker_consumer(Solo)
    source, events = connect(consumer)
    assert loop_names(source) == ["z4j-presence-celery", "z4j-celery-runs"]
    assert consumer.event_dispatcher.groups == {"worker"}
    receive(app, "shop.add", "t", [1])
    assert [event["kind"] for event in events()] == ["worker.online", "task.received"]


def test_source_reads_no_broker_in_prefork_worker(app, connect):
    """The parent's signals and the channel carry every event; no event of Celery is enabled."""
    consumer = worker_consumer(Prefork)
    source, events = connect(consumer)
    assert loop_names(source) == ["z4j-presence-celery", "z4j-celery-runs", "z4j-celery-channel"]
    assert consumer.event_dispatcher.groups == {"worker"}
    receive(app, "shop.add", "t", [1])
    signals.task_prerun.send(sender=None, task_id="t", task=app.tasks["shop.add"])
    assert [event["kind"] for event in events()] == ["worker.online", "task.received"]


def test_source_reports_every_worker_outside_workers(connect):
    """A process outside a worker announces each worker whose events it reads, and no other."""
    source, events = connect()
    on_event = source._receiver._on_event
    for name in ("a@h", "b@h"):
        on_event({"type": "task-started", "hostname": name, "uuid": "t"})
    with pytest.raises(KeyError):
        on_event({"type": "task-started", "uuid": "t"})
    assert [event["data"]["worker"] for event in events() if event["kind"] == "worker.online"] == [
        "a@h",
        "b@h",
    ]


def test_source_captures_eager_tasks_outside_workers(app, connect):
    """A task that a web process runs itself is captured by its signals, one of a worker in it is
    not.
    """
    _source, events = connect()
    app.tasks["shop.add"].apply((1,))
    app.tasks["shop.fail"].apply()
    signals.task_prerun.send(sender=None, task_id="t", task=app.tasks["shop.add"])
    recorded = [
        (event["kind"], event["data"]["task_name"], event["data"]["worker"]) for event in events()
    ]
    kinds = ["task.started", "task.succeeded", "task.started", "task.failed"]
    assert [kind for kind, _, _ in recorded] == kinds
    assert {worker for _, _, worker in recorded} == {None}


@pytest.mark.parametrize("variable", ["Z4J_CELERY_LOCAL_HOSTNAME", "CELERY_HOSTNAME"])
def test_environment_selects_only_worker_outside_workers(variable, connect, monkeypatch):
    """The adapter's variables name the only worker to report outside a worker; inside one they are
    ignored.
    """
    monkeypatch.setenv(variable, " w@named ")
    assert only_worker() == "w@named"
    source, events = connect()
    for name in ("w@other", "w@named"):
        source._receiver._on_event({"type": "task-started", "hostname": name, "uuid": "t"})
    assert [event["data"]["worker"] for event in events()] == ["w@named", "w@named"]
    own, events = connect(worker_consumer(Prefork))
    assert list(own.presence.workers) == ["w@h"]


def test_capture_switches_apply_to_broker_events(connect):
    """``Z4J_CAPTURE_ARGS=0`` and ``Z4J_CAPTURE_RESULT=0`` remove arguments and results."""
    source, events = connect(capture_args=False, capture_result=False)
    common = {"hostname": "w@h", "uuid": "t", "name": "shop.add"}
    source._receiver._on_event({"type": "task-received", "args": "(1,)", "kwargs": "{}", **common})
    source._receiver._on_event({"type": "task-succeeded", "result": "2", **common})
    assert all(event["data"].keys().isdisjoint({"args", "kwargs", "result"}) for event in events())


def test_source_counts_failures_and_dropped_events(connect):
    """Failed connections and undecodable events appear in the source's counters."""
    source, _events = connect()
    source._receiver.failures, source._receiver.unreadable = 2, 3
    assert (source.failures(), source.dropped()) == (2, 3)
    in_process, _events = connect(worker_consumer(Solo))
    assert (in_process.failures(), in_process.dropped()) == (0, 0)


def test_generic_engine_uses_adapter_events(backend):
    """Events of any other adapter are recorded with their worker announced and the capture switches
    applied.
    """
    ring = Ring(10, 10, backend.event())
    source = describe_engine(SimpleNamespace(name="rq")).make_source(
        ring, Settings(capture_args=False), backend, None
    )
    assert type(source) is EventSource
    assert (source.uses_adapter_events, CelerySource.uses_adapter_events) == (True, False)
    event = Event(
        id=uuid4(),
        project_id=uuid4(),
        agent_id=uuid4(),
        engine="rq",
        task_id="t",
        kind=EventKind.TASK_STARTED,
        occurred_at=datetime(2026, 1, 2, tzinfo=UTC),
        data={"worker": "rq-1", "args": [1], "kwargs": {}},
    )
    source.connect()
    source.record(event)
    source.disconnect()
    recorded = [json.loads(item[0](item)) for item in ring.take(10)]
    assert [each["kind"] for each in recorded] == [
        "worker.online",
        "task.started",
        "worker.offline",
    ]
    assert recorded[1]["data"] == {"worker": "rq-1"}
