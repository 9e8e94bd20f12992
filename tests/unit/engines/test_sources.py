"""Which source a process gets, by what it is."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import uuid4

import pytest
from celery import Celery, signals
from celery.concurrency.prefork import TaskPool as Prefork
from celery.concurrency.solo import TaskPool as Solo
from z4j_celery import CeleryEngineAdapter
from z4j_core.models import Event, EventKind

from z4j_bare.engines.celery.source import CelerySource, enable_local_events, only_worker
from z4j_bare.engines.engine import describe_engine
from z4j_bare.events.ring import Ring
from z4j_bare.events.source import EventSource
from z4j_bare.settings import Settings


@pytest.fixture
def app():
    found = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)

    @found.task(shared=False, name="shop.add", bind=True)
    def add(self, a, b=0):
        return a + b

    @found.task(shared=False, name="shop.fail")
    def fail():
        raise ValueError("broken")

    yield found
    found.close()


@pytest.fixture
def made(app, backend):
    """``made(consumer)``: the source of a process with that Consumer, connected."""
    sources = []

    def make(consumer=None, **settings):
        ring = Ring(1000, 1000, backend.event())
        source = describe_engine(CeleryEngineAdapter(celery_app=app)).make_source(
            ring, Settings(**settings), backend, consumer
        )
        source.connect()
        sources.append(source)
        return source, lambda: [json.loads(record[0](record)) for record in ring.take(1000)]

    yield make
    for source in sources:
        source.disconnect()


def worker(pool):
    """A Consumer as far as it is looked at."""
    return SimpleNamespace(
        hostname="w@h",
        pool=object.__new__(pool),
        event_dispatcher=SimpleNamespace(groups={"worker"}),
    )


def names(source):
    return [name for name, _run in source.loops()]


def received(app):
    request = SimpleNamespace(
        id="t",
        task=app.tasks["shop.add"],
        args=[1],
        kwargs={},
        parent_id=None,
        root_id="t",
        delivery_info={"routing_key": "q"},
    )
    signals.task_received.send(sender=None, request=request)


def test_a_worker_in_one_process_needs_no_broker(app, made):
    """Where tasks run in the worker's own process the signals tell all, and nothing reads the broker."""
    consumer = worker(Solo)
    source, events = made(consumer)
    assert names(source) == ["z4j-presence-celery"]
    assert consumer.event_dispatcher.groups == {"worker"}
    received(app)
    assert [event["kind"] for event in events()] == ["worker.online", "task.received"]


def test_a_prefork_worker_reads_its_own_events(app, made):
    """The parent's signals tell what came, the broker tells the rest, and the worker sends its events from the start."""
    consumer = worker(Prefork)
    source, events = made(consumer)
    assert names(source) == ["z4j-presence-celery", "z4j-celery-events"]
    assert consumer.event_dispatcher.groups == {"worker", "task"}
    received(app)
    signals.task_prerun.send(sender=None, task_id="t", task=app.tasks["shop.add"])
    take = source._receiver._on_event
    take(
        {
            "type": "task-received",
            "hostname": "w@h",
            "uuid": "t",
            "name": "shop.add",
            "args": "(1,)",
        }
    )
    take({"type": "task-started", "hostname": "w@other", "uuid": "t"})
    take({"type": "task-started", "hostname": "w@h", "uuid": "t"})
    told = events()
    assert [event["kind"] for event in told] == ["worker.online", "task.received", "task.started"]
    assert told[1]["data"]["args"] == [1]
    assert (told[2]["data"]["task_name"], told[2]["data"]["queue"]) == ("shop.add", "q")


def test_elsewhere_every_worker_is_read(made):
    """A process that is no worker tells of all workers that it reads of, and of no others."""
    source, events = made()
    take = source._receiver._on_event
    for name in ("a@h", "b@h"):
        take({"type": "task-started", "hostname": name, "uuid": "t"})
    with pytest.raises(KeyError):
        take({"type": "task-started", "uuid": "t"})
    assert [event["data"]["worker"] for event in events() if event["kind"] == "worker.online"] == [
        "a@h",
        "b@h",
    ]


def test_eager_tasks_of_such_a_process_are_told(app, made):
    """Tasks that a web process runs itself are captured by their signals, those of a worker inside of it are not."""
    _source, events = made()
    app.tasks["shop.add"].apply((1,))
    app.tasks["shop.fail"].apply()
    signals.task_prerun.send(sender=None, task_id="t", task=app.tasks["shop.add"])
    told = [
        (event["kind"], event["data"]["task_name"], event["data"]["worker"]) for event in events()
    ]
    kinds = ["task.started", "task.succeeded", "task.started", "task.failed"]
    assert [kind for kind, _, _ in told] == kinds
    assert {worker for _, _, worker in told} == {None}


@pytest.mark.parametrize("variable", ["Z4J_CELERY_LOCAL_HOSTNAME", "CELERY_HOSTNAME"])
def test_one_worker_can_be_named(variable, made, monkeypatch):
    """The variables that the adapter reads name the only worker to report, which is announced at once; in a worker they do not."""
    monkeypatch.setenv(variable, " w@named ")
    assert only_worker() == "w@named"
    source, events = made()
    for name in ("w@other", "w@named"):
        source._receiver._on_event({"type": "task-started", "hostname": name, "uuid": "t"})
    assert [event["data"]["worker"] for event in events()] == ["w@named", "w@named"]
    own, events = made(worker(Prefork))
    assert list(own.presence.workers) == ["w@h"]


def test_switches_hold_for_the_broker_s_events(made):
    """``Z4J_CAPTURE_ARGS=0`` and ``Z4J_CAPTURE_RESULT=0`` send neither."""
    source, events = made(capture_args=False, capture_result=False)
    common = {"hostname": "w@h", "uuid": "t", "name": "shop.add"}
    source._receiver._on_event({"type": "task-received", "args": "(1,)", "kwargs": "{}", **common})
    source._receiver._on_event({"type": "task-succeeded", "result": "2", **common})
    assert all(event["data"].keys().isdisjoint({"args", "kwargs", "result"}) for event in events())


def test_loss_is_counted(made):
    """Connections that failed and events that could not be read show in the source's figures."""
    source, _events = made()
    source._receiver.failures, source._receiver.unreadable = 2, 3
    assert (source.failures(), source.dropped()) == (2, 3)
    in_process, _events = made(worker(Solo))
    assert (in_process.failures(), in_process.dropped()) == (0, 0)


@pytest.mark.parametrize(
    "consumer", [None, SimpleNamespace(), SimpleNamespace(event_dispatcher=None)]
)
def test_a_consumer_without_a_dispatcher_is_left_alone(consumer):
    """Celery's insides may change; the broadcast remains."""
    enable_local_events(consumer)


def test_no_groups_mean_all_groups():
    """A worker with ``-E`` sends everything, and goes on doing so."""
    consumer = SimpleNamespace(event_dispatcher=SimpleNamespace(groups=set()))
    enable_local_events(consumer)
    assert consumer.event_dispatcher.groups == set()


def test_other_engines_bring_their_own_stream(backend):
    """An adapter that is not Celery's is connected, and its events pass with its workers announced and the switches held."""
    ring = Ring(10, 10, backend.event())
    source = describe_engine(SimpleNamespace(name="rq")).make_source(
        ring, Settings(capture_args=False), backend, None
    )
    assert type(source) is EventSource
    assert (source.uses_adapter_events, CelerySource.uses_adapter_events) == (True, False)
    event = Event(
        id=uuid4(), project_id=uuid4(), agent_id=uuid4(), engine="rq", task_id="t", kind=EventKind.TASK_STARTED,
        occurred_at=datetime(2026, 1, 2, tzinfo=UTC), data={"worker": "rq-1", "args": [1], "kwargs": {}},
    )  # fmt: skip
    source.connect()
    source.record(event)
    source.disconnect()
    told = [json.loads(item[0](item)) for item in ring.take(10)]
    assert [each["kind"] for each in told] == ["worker.online", "task.started", "worker.offline"]
    assert told[1]["data"] == {"worker": "rq-1"}
