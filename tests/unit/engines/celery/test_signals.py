"""The signal handlers, driven by Celery's own signals and its eager tracer."""

import json
import os
from types import SimpleNamespace

import pytest
from celery import Celery, signals
from celery.app.trace import build_tracer
from z4j_celery import CeleryEngineAdapter, z4j_meta

from z4j_bare.engines.celery.signals import CeleryCapture, runs_in_process


@pytest.fixture
def app():
    """An app of its own, with a few tasks."""
    found = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)

    @found.task(shared=False, name="shop.add")
    def add(a, b=0):
        return a + b

    @found.task(shared=False, name="shop.fail")
    def fail():
        raise ValueError("no alice@example.com here")

    @found.task(shared=False, name="shop.again", bind=True, max_retries=3)
    def again(self):
        raise self.retry(countdown=1, exc=KeyError("x"))

    @found.task(shared=False, name="shop.secret")
    @z4j_meta(skip=True)
    def secret():
        return 1

    yield found
    found.close()


@pytest.fixture
def events(app):
    """Capture connected to the app's worker; yields the list of decoded events."""
    got = []
    capture = CeleryCapture(
        CeleryEngineAdapter(celery_app=app),
        lambda record: got.append(json.loads(record[0](record))),
        "w@h.example.com",
    )
    capture.connect()
    got_capture = SimpleNamespace(list=got, capture=capture)
    yield got_capture
    capture.disconnect()


def receive(app, name, task_id="t1", args=(), kwargs=None, **extra):
    request = SimpleNamespace(
        id=task_id,
        task=app.tasks[name],
        args=list(args),
        kwargs=kwargs or {},
        parent_id=None,
        root_id=task_id,
        delivery_info={"routing_key": "q"},
        retries=0,
        **extra,
    )
    signals.task_received.send(sender=None, request=request)
    return request


def run(app, name, task_id="t1", args=(), kwargs=None):
    """Run a task through Celery's own tracer, as every pool does."""
    task = app.tasks[name]
    tracer = build_tracer(name, task, app=app)
    tracer(
        task_id,
        args,
        kwargs or {},
        {"id": task_id, "delivery_info": {"routing_key": "q"}, "retries": 0, "is_eager": False},
    )


def kinds(events):
    return [event["kind"] for event in events.list]


def test_a_good_task(app, events):
    """Received, started, succeeded: in order, with name, queue, worker, arguments once, result and runtime."""
    receive(app, "shop.add", args=(1,), kwargs={"b": 2, "password": "hunter2"})
    run(app, "shop.add", args=(1,), kwargs={"b": 2})
    assert kinds(events) == ["task.received", "task.started", "task.succeeded"]
    for event in events.list:
        assert event["task_id"] == "t1"
        assert event["data"]["task_name"] == "shop.add"
        assert event["data"]["queue"] == "q"
        assert event["data"]["worker"] == "w@h_example_com"
    received, started, succeeded = (event["data"] for event in events.list)
    assert received["args"] == [1]
    assert received["kwargs"] == {"b": 2, "password": "[REDACTED]"}
    assert received["root_task_id"] == "t1"
    assert "args" not in started
    assert succeeded["result"] == 3
    assert succeeded["runtime_ms"] >= 0
    stamps = [event["occurred_at"] for event in events.list]
    assert stamps == sorted(stamps)


def test_a_failing_task(app, events):
    """A failure carries the exception's class, its redacted text and traceback, and forgets the task."""
    receive(app, "shop.fail")
    run(app, "shop.fail")
    assert kinds(events) == ["task.received", "task.started", "task.failed"]
    data = events.list[-1]["data"]
    assert data["exception"] == "ValueError"
    assert data["exception_message"] == "[REDACTED]"
    assert data["traceback"] == "[REDACTED]"
    assert len(events.capture.task_states) == 0


def test_a_retried_task(app, events):
    """A retry counts, keeps the track, and its second run gets seconds of its own."""
    receive(app, "shop.again")
    run(app, "shop.again")
    receive(app, "shop.again")
    run(app, "shop.again")
    assert kinds(events) == ["task.received", "task.started", "task.retried"] * 2
    assert events.list[2]["data"]["retry_count"] == 1
    seconds = {(event["kind"], event["occurred_at"][:19]) for event in events.list}
    assert len(seconds) == 6, "the brain would drop a second event of a kind in the same second"


def test_a_revoked_task(app, events):
    """A revocation says how it came, and a kill's stateless postrun adds no success."""
    request = receive(app, "shop.add")
    signals.task_prerun.send(
        sender=app.tasks["shop.add"], task_id="t1", task=app.tasks["shop.add"], args=(), kwargs={}
    )
    signals.task_revoked.send(
        sender=app.tasks["shop.add"], request=request, terminated=True, signum=15, expired=False
    )
    signals.task_postrun.send(
        sender=app.tasks["shop.add"],
        task_id="t1",
        task=app.tasks["shop.add"],
        args=(),
        kwargs={},
        retval=None,
        state=None,
    )
    assert kinds(events) == ["task.received", "task.started", "task.revoked"]
    assert (events.list[-1]["data"]["terminated"], events.list[-1]["data"]["signum"]) == (True, 15)


def test_skipped_tasks_leave_no_trace(app, events):
    """A task annotated with skip produces no event at all."""
    receive(app, "shop.secret")
    run(app, "shop.secret")
    assert events.list == []


def test_refused_messages(app, events):
    """Messages that no task takes are told as rejected, with what is known of them."""
    signals.task_unknown.send(
        sender=None, name="shop.gone", id="t9", message=None, exc=KeyError("shop.gone")
    )
    signals.task_rejected.send(
        sender=None,
        message=SimpleNamespace(headers={"id": "t8", "task": "shop.bad"}),
        exc=ValueError("body"),
    )
    assert [
        (event["kind"], event["task_id"], event["data"]["task_name"]) for event in events.list
    ] == [
        ("task.rejected", "t9", "shop.gone"),
        ("task.rejected", "t8", "shop.bad"),
    ]


def test_nothing_of_arguments_and_results_when_switched_off(app):
    """Z4J_CAPTURE_ARGS=0 and Z4J_CAPTURE_RESULT=0 send neither."""
    got = []
    capture = CeleryCapture(
        CeleryEngineAdapter(celery_app=app),
        lambda record: got.append(json.loads(record[0](record))),
        "w@h",
        args=False,
        result=False,
    )
    capture.connect()
    try:
        receive(app, "shop.add", args=("secret",))
        run(app, "shop.add", args=(1,))
    finally:
        capture.disconnect()
    assert not {"args", "kwargs", "result"} & {key for event in got for key in event["data"]}


def test_disconnected_is_deaf(app, events):
    """After disconnect no signal reaches the ring."""
    events.capture.disconnect()
    receive(app, "shop.add")
    assert events.list == []


def test_a_broken_request_does_not_reach_celery(app, events, caplog):
    """A handler that fails is logged and Celery goes on."""
    results = signals.task_received.send(sender=None, request=None)
    assert [value for _receiver, value in results if isinstance(value, Exception)] == []
    assert "the host is not affected" in caplog.text


def test_a_forked_child_is_silent(app, events):
    """In a forked child the inherited handlers record nothing: the parent speaks for it, or nobody."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        receive(app, "shop.add")
        os.write(write, b"%d" % len(events.list))
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"0"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("celery.concurrency.prefork:TaskPool", False),
        ("celery.concurrency.solo:TaskPool", True),
        ("celery.concurrency.thread:TaskPool", True),
    ],
)
def test_the_running_pool_decides(path, expected):
    """Signals fire in the worker's process in every pool but prefork; the pool object says which it is."""
    module, name = path.split(":")
    pool = object.__new__(getattr(__import__(module, fromlist=[name]), name))
    assert runs_in_process(SimpleNamespace(pool=pool)) is expected


def test_no_worker_no_capture():
    """Outside a worker there is no pool to ask."""
    assert not runs_in_process(None)
