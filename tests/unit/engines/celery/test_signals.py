"""The signal handlers, called by Celery's own signals and tracer."""

import json
import os
from types import SimpleNamespace

import pytest
from celery import signals
from z4j_celery import CeleryEngineAdapter, z4j_meta

from tests.support.celery_fakes import memory_app, receive, trace
from z4j_bare.engines.celery.capture import CeleryCapture, runs_in_process


@pytest.fixture
def app():
    app = memory_app()

    @app.task(shared=False, name="shop.add")
    def add(a, b=0):
        return a + b

    @app.task(shared=False, name="shop.fail")
    def fail():
        raise ValueError("no alice@example.com here")

    @app.task(shared=False, name="shop.again", bind=True, max_retries=3)
    def again(self):
        raise self.retry(countdown=1, exc=KeyError("x"))

    @app.task(shared=False, name="shop.secret")
    @z4j_meta(skip=True)
    def secret():
        return 1

    yield app
    app.close()


@pytest.fixture
def events(app):
    """A connected capture, and the list of its decoded events."""
    decoded = []
    capture = CeleryCapture(
        CeleryEngineAdapter(celery_app=app),
        lambda record: decoded.append(json.loads(record[0](record))),
        "w@h.example.com",
    )
    capture.connect()
    yield SimpleNamespace(list=decoded, capture=capture)
    capture.disconnect()


def kinds(events):
    return [event["kind"] for event in events.list]


def test_capture_reports_successful_task(app, events):
    """Received, started and succeeded come in order, with name, queue, worker, arguments, result
    and runtime.
    """
    receive(app, "shop.add", args=(1,), kwargs={"b": 2, "password": "hunter2"})
    trace(app, "shop.add", args=(1,), kwargs={"b": 2})
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


def test_capture_reports_failed_task(app, events):
    """A failure carries the exception's class, redacted message and traceback, and removes the task
    state.
    """
    receive(app, "shop.fail")
    trace(app, "shop.fail")
    assert kinds(events) == ["task.received", "task.started", "task.failed"]
    data = events.list[-1]["data"]
    assert data["exception"] == "ValueError"
    assert data["exception_message"] == "[REDACTED]"
    assert data["traceback"] == "[REDACTED]"
    assert len(events.capture.task_states) == 0


def test_capture_reports_retried_task(app, events):
    """A retry is counted and keeps the task state, and the events of the second run get seconds of
    their own.
    """
    receive(app, "shop.again")
    trace(app, "shop.again")
    receive(app, "shop.again")
    trace(app, "shop.again")
    assert kinds(events) == ["task.received", "task.started", "task.retried"] * 2
    assert events.list[2]["data"]["retry_count"] == 1
    seconds = {(event["kind"], event["occurred_at"][:19]) for event in events.list}
    assert len(seconds) == 6, "the brain drops the second event of a kind in a second"


def test_capture_reports_revoked_task(app, events):
    """A revocation carries its reason, and the postrun without a state adds no success."""
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


def test_capture_ignores_skipped_task(app, events):
    """A task with ``@z4j_meta(skip=True)`` produces no event."""
    receive(app, "shop.secret")
    trace(app, "shop.secret")
    assert events.list == []


def test_capture_reports_rejected_messages(app, events):
    """A message that no task accepts is reported as rejected, with its id and task name."""
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


def test_capture_omits_arguments_and_results_when_disabled(app):
    """``Z4J_CAPTURE_ARGS=0`` and ``Z4J_CAPTURE_RESULT=0`` remove arguments and results."""
    decoded = []
    capture = CeleryCapture(
        CeleryEngineAdapter(celery_app=app),
        lambda record: decoded.append(json.loads(record[0](record))),
        "w@h",
        args=False,
        result=False,
    )
    capture.connect()
    try:
        receive(app, "shop.add", args=("secret",))
        trace(app, "shop.add", args=(1,))
    finally:
        capture.disconnect()
    assert not {"args", "kwargs", "result"} & {key for event in decoded for key in event["data"]}


def test_disconnected_capture_records_nothing(app, events):
    """After ``disconnect`` no signal reaches the ring."""
    events.capture.disconnect()
    receive(app, "shop.add")
    assert events.list == []


def test_handler_error_does_not_reach_celery(app, events, caplog):
    """An exception in a handler is logged, and Celery continues."""
    results = signals.task_received.send(sender=None, request=None)
    assert [value for _receiver, value in results if isinstance(value, Exception)] == []
    assert "the host is not affected" in caplog.text


def test_capture_records_nothing_in_forked_child(app, events):
    """In a forked child the inherited handlers record nothing."""
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
def test_runs_in_process_depends_on_running_pool(path, expected):
    """Signals fire in the worker's process in every pool but prefork."""
    module, name = path.split(":")
    pool = object.__new__(getattr(__import__(module, fromlist=[name]), name))
    assert runs_in_process(SimpleNamespace(pool=pool)) is expected


def test_runs_in_process_is_false_without_worker():
    """Outside a worker there is no pool."""
    assert not runs_in_process(None)
