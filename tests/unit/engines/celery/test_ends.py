"""How runs end: what Celery's tracer signals of them, and what is recorded."""

import json
import uuid
from types import SimpleNamespace

import pytest
from celery import signals
from celery.app.trace import trace_task
from celery.exceptions import Ignore, Reject
from celery.worker import state
from greenlet import GreenletExit
from z4j_celery import CeleryEngineAdapter

from tests.support.celery_fakes import memory_app, task_request
from z4j_bare.engines.celery.capture import CeleryCapture, EagerCapture
from z4j_bare.engines.celery.run_monitor import RunMonitor

#: Celery's warning about an error of the result backend.
OUTSIDE_BODY = pytest.mark.filterwarnings("ignore:Exception raised outside body")

NOW = 1_700_000_000.25


class Timeout(BaseException):
    """Stands for ``gevent.Timeout``, which is no ``Exception`` either."""


class BackendError(Exception):
    """The result backend is away."""


class Run:
    """A capture with a clock that the test sets, and the events that it makes."""

    def __init__(self, app, capture_class=CeleryCapture):
        self.app = app
        self.now = NOW
        self.events = []
        self.capture = capture_class(
            CeleryEngineAdapter(celery_app=app), self.put, "w@h", clock=lambda: self.now
        )

    def put(self, record):
        self.events.append(json.loads(record[0](record)))

    def receive(self, name, task_id="t1", *, queue="q", redelivered=False, **fields):
        """Send ``task_received``."""
        request = task_request(self.app, name, task_id)
        request.delivery_info = {"routing_key": queue, "redelivered": redelivered}
        request.request_dict = fields
        signals.task_received.send(sender=None, request=request)

    def trace(self, name, task_id="t1", *, queue="q", args=(), during=None, **fields):
        """Run a task by Celery's tracer; ``during`` is called by tasks that call it."""
        request = {"id": task_id, "delivery_info": {"routing_key": queue}, **fields}
        self.app.during = during
        trace_task(self.app.tasks[name], task_id, args, {}, request, app=self.app)

    def run(self, name, task_id="t1", **fields):
        """Receive and run a task."""
        self.receive(name, task_id)
        self.trace(name, task_id, **fields)

    @property
    def kinds(self):
        return [event["kind"].removeprefix("task.") for event in self.events]

    @property
    def last(self):
        return self.events[-1]["data"]


@pytest.fixture
def app():
    app = memory_app()
    app.during = None

    @app.task(shared=False, name="shop.add")
    def add():
        return 3

    @app.task(shared=False, name="shop.fail")
    def fail():
        raise ValueError("broken")

    @app.task(shared=False, name="shop.ignore")
    def ignore():
        raise Ignore

    @app.task(shared=False, name="shop.reject", acks_late=True)
    def reject(*, requeue=False):
        raise Reject("poison", requeue=requeue)

    @app.task(shared=False, name="shop.requeue", acks_late=True)
    def requeue():
        raise Reject("later", requeue=True)

    @app.task(shared=False, name="shop.requeue_early")
    def requeue_early():
        raise Reject("later", requeue=True)

    @app.task(shared=False, name="shop.replaced", bind=True)
    def replaced(self):
        app.amqp.send_task_message = lambda *_args, **_kwargs: app.during and app.during()
        raise self.replace(add.si().set(queue="second"))

    @app.task(shared=False, name="shop.again", bind=True, max_retries=9)
    def again(self):
        if self.request.retries:
            return "done"
        app.amqp.send_task_message = lambda *_args, **_kwargs: app.during()
        raise self.retry(countdown=0, exc=KeyError("x"))

    yield app
    app.close()


@pytest.fixture
def run(app):
    run = Run(app)
    run.capture.connect()
    yield run
    run.capture.disconnect()


@pytest.fixture
def failing_backend(app, monkeypatch):
    """``failing_backend(method, ...)``: these methods of the result backend raise."""

    def fail(*names):
        def raises(*_args, **_kwargs):
            raise BackendError("away")

        for name in names:
            monkeypatch.setattr(app.backend, name, raises)

    return fail


def test_uuid_id_is_reported_as_text(app, run, monkeypatch):
    """A task whose id is a ``uuid.UUID`` has all events, under the text of the id."""
    task_id = uuid.uuid4()
    # The in-memory result backend of Celery 5.6.0 cannot store a result under a UUID.
    result_key = app.backend.get_key_for_task
    monkeypatch.setattr(
        app.backend, "get_key_for_task", lambda id_, key="": result_key(str(id_), key)
    )
    run.run("shop.add", task_id)
    run.run("shop.fail", task_id)
    run.run("shop.ignore", task_id)
    signals.task_unknown.send(sender=None, name="shop.gone", id=task_id, message=None, exc=None)
    assert {event["task_id"] for event in run.events} == {str(task_id)}
    assert run.kinds[2::3] == ["succeeded", "failed", "revoked"]
    assert run.events[0]["data"]["root_task_id"] == str(task_id)
    assert run.capture.task_states == {}


@OUTSIDE_BODY
def test_unstored_success_is_failure_of_backend(app, run, failing_backend):
    """A task that succeeds while its result cannot be stored is a failure with that error, once."""
    failing_backend("mark_as_done")
    run.run("shop.add")
    assert run.kinds == ["received", "started", "failed"]
    assert (run.last["exception"], run.last["exception_message"]) == ("BackendError", "away")
    assert "BackendError" in run.last["traceback"]
    assert run.capture.task_states == {}


@OUTSIDE_BODY
def test_unstored_failure_is_failure_of_backend(app, run, failing_backend):
    """A failure that cannot be stored has the backend's error; it is reported once."""
    failing_backend("mark_as_failure")
    run.run("shop.fail")
    assert run.kinds == ["received", "started", "failed"]
    assert run.last["exception"] == "BackendError"
    assert run.capture.task_states == {}


def test_success_in_handler_of_another_error_is_success(app, run):
    """An eager task that succeeds while its caller handles an error is a success."""
    try:
        raise ValueError("the caller's")
    except ValueError:
        app.tasks["shop.add"].apply(task_id="t1")
    assert run.kinds == ["started", "succeeded"]


def test_ignored_run_is_revoked(run):
    """``Ignore`` ends a task as revoked, with the reason, and nothing is remembered of it."""
    run.run("shop.ignore")
    assert run.kinds == ["received", "started", "revoked"]
    assert (run.last["reason"], run.last["terminated"]) == ("ignored", False)
    assert run.capture.task_states == {}


def test_rejected_run_is_failure(app, run):
    """``Reject`` without requeue is a failure, once, although Celery 5.7 signals it again."""
    run.run("shop.reject")
    error = Reject("poison", requeue=False)
    signals.task_failure.send(
        sender=app.tasks["shop.reject"], task_id="t1", exception=error, args=(), kwargs={}
    )
    assert run.kinds == ["received", "started", "failed"]
    assert (run.last["exception"], run.last["exception_message"]) == ("Reject", "poison")
    assert run.capture.task_states == {}


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt("stop"), Timeout("5 seconds")])
def test_run_that_raises_no_exception_class_is_failure(app, run, raised):
    """``sys.exit()`` or a green time-out in a task is a failure with that class."""

    @app.task(shared=False, name="shop.leave")
    def leave():
        raise raised

    with pytest.raises(type(raised)):
        run.run("shop.leave")
    assert run.kinds == ["received", "started", "failed"]
    assert (run.last["exception"], run.last["exception_message"]) == (
        type(raised).__name__,
        str(raised),
    )
    assert run.capture.task_states == {}


def test_killed_greenlet_is_no_failure(app, run):
    """``task_revoked`` reports a task that an operator has terminated, not ``task_postrun``."""

    @app.task(shared=False, name="shop.killed")
    def killed():
        raise GreenletExit

    with pytest.raises(GreenletExit):
        run.run("shop.killed")
    assert run.kinds == ["received", "started"]


def test_unpicklable_exception_has_its_own_class(app, run):
    """Celery's wrapper of an exception that cannot be pickled is shown as that exception."""

    class UnpicklableError(Exception):
        def __init__(self, text, function):
            super().__init__(text)
            self.function = function

    @app.task(shared=False, name="shop.unpicklable")
    def unpicklable():
        raise UnpicklableError("broken", lambda: 1)

    run.run("shop.unpicklable")
    assert (run.last["exception"], run.last["exception_message"]) == ("UnpicklableError", "broken")


def _failing(*_args):
    raise RuntimeError("the exception's class fails")


@pytest.mark.parametrize(
    "members",
    [
        {"__str__": _failing},
        {"__str__": lambda _self: 5},
        {"__class__": property(_failing)},
        {"__traceback__": property(_failing)},
        {"__context__": property(_failing)},
        {"__getattr__": _failing},
        {"_z4j_reported": property(_failing)},
        {"__eq__": _failing, "__hash__": None},
        {"__bool__": _failing, "__len__": _failing},
    ],
    ids=lambda members: "-".join(members),
)
def test_exception_whose_class_fails_is_failure(run, members):
    """A failure is reported with its class, even if the code of that class raises an error."""
    error = type("OddError", (Exception,), members)("text")
    run.receive("shop.fail")
    task = run.app.tasks["shop.fail"]
    signals.task_prerun.send(sender=task, task_id="t1", task=task)
    signals.task_failure.send(sender=task, task_id="t1", exception=error, einfo=None)
    assert run.kinds == ["received", "started", "failed"]
    assert run.last["exception"] == "OddError"


def test_requeue_after_early_ack_is_failure(run):
    """A message that was acknowledged early cannot return to its queue: the task has failed."""
    run.run("shop.requeue_early")
    assert run.kinds == ["received", "started", "failed"]
    assert run.capture.task_states == {}


def test_requeue_loop_reports_once_a_second(run):
    """A task that always returns to its queue has at most one event a second."""
    run.run("shop.requeue")
    assert run.kinds == ["received", "started", "retried"]
    for _ in range(40):
        run.now += 0.125
        run.receive("shop.requeue", redelivered=True)
        run.trace("shop.requeue")
        run.capture.repeated_runs.report_withheld()
    assert run.kinds[3:] == ["retried"] * 5
    assert "later" in run.last["reason"]


def test_success_after_requeue_reports_start(run, app):
    """A run that ends after a return to the queue has its start, with its own time."""
    run.run("shop.requeue")
    task = app.tasks["shop.requeue"]
    task.run, task.__trace__ = (lambda: "done"), None
    run.now += 0.5
    run.receive("shop.requeue", redelivered=True)
    run.trace("shop.requeue")
    assert run.kinds == ["received", "started", "retried", "started", "succeeded"]
    assert run.capture.task_states == {}


def test_long_run_after_requeue_reports_start(run, app):
    """The start of a run that goes on after a return to the queue is reported meanwhile."""
    run.run("shop.requeue")
    task = app.tasks["shop.requeue"]
    run.receive("shop.requeue", redelivered=True)
    task.push_request(id="t1", retries=0)
    signals.task_prerun.send(sender=task, task_id="t1", task=task, args=(), kwargs={})
    run.capture.repeated_runs.report_withheld()
    assert run.kinds == ["received", "started", "retried"]
    run.now += 1.5
    run.capture.repeated_runs.report_withheld()
    task.pop_request()
    assert run.kinds == ["received", "started", "retried", "started"]


def test_replaced_run_is_no_end(run):
    """``self.replace()`` adds no end; the new task has its own name and queue, under the same id,
    also if it is received before the old run has ended.
    """

    def receive():
        run.receive("shop.add", queue="second", replaced_task_nesting=1)

    run.receive("shop.replaced")
    run.trace("shop.replaced", during=receive)
    run.trace("shop.add", queue="second", replaced_task_nesting=1)
    assert run.kinds == ["received", "started", "received", "started", "succeeded"]
    assert len({(event["kind"], event["occurred_at"][:19]) for event in run.events}) == 5
    names = [(event["data"]["task_name"], event["data"]["queue"]) for event in run.events]
    old, new = ("shop.replaced", "q"), ("shop.add", "second")
    assert names == [old, old, new, new, new]
    assert run.capture.task_states == {}


def test_replacement_keeps_seconds_of_replaced_run(run):
    """Events of a replacement have seconds of their own, in whatever order it is received."""
    run.run("shop.replaced")
    assert run.capture.task_states != {}
    run.receive("shop.add", queue="second", replaced_task_nesting=1)
    run.trace("shop.add", queue="second", replaced_task_nesting=1)
    assert run.kinds == ["received", "started", "received", "started", "succeeded"]
    assert len({(event["kind"], event["occurred_at"][:19]) for event in run.events}) == 5
    assert run.capture.task_states == {}


@pytest.mark.parametrize("fields", [{"retries": 1}, {"replaced_task_nesting": 1}])
def test_repeated_run_of_unknown_task_has_next_second(run, fields):
    """What was received elsewhere before, perhaps in this second, is received in the next one here:
    the brain would drop the event, and with it a replacement's name.
    """
    run.receive("shop.add", **fields)
    run.trace("shop.add", **fields)
    run.receive("shop.add", "t2")
    seconds = [event["occurred_at"][17:19] for event in run.events]
    assert seconds == ["21", "21", "21", "20"]


def test_late_retry_does_not_set_back_next_run(run):
    """A retry that is signalled after the end of the next run has an earlier time than that run's
    events, and a second of its own.
    """

    def next_run():
        run.now += 0.01
        run.receive("shop.again", retries=1)
        run.now += 0.01
        run.trace("shop.again", retries=1)
        run.now += 0.01

    run.receive("shop.again")
    run.trace("shop.again", during=next_run)
    assert run.kinds == ["received", "started", "received", "started", "succeeded", "retried"]
    stamps = [event["occurred_at"] for event in run.events]
    assert stamps[-1] < min(stamps[2:-1])
    assert run.capture.task_states == {}


def test_late_retry_is_counted_while_next_run_is_open(run):
    """A retry that is signalled after the start of the next run is later than that start, because
    the brain ignores the retry count of an event that is older than the row.
    """

    def next_run_starts():
        run.now += 0.01
        run.receive("shop.again", retries=1)
        run.now += 0.01

    run.receive("shop.again")
    run.trace("shop.again", during=next_run_starts)
    assert run.kinds == ["received", "started", "received", "retried"]
    stamps = [event["occurred_at"] for event in run.events]
    assert stamps[-1] >= max(stamps[:-1])


def start_retry(run):
    """Receive and start the second run of ``shop.again`` while the first one ends."""
    run.now += 0.01
    run.receive("shop.again", retries=1)
    run.now += 0.01
    task = run.app.tasks["shop.again"]
    task.push_request(id="t1", retries=1, delivery_info={"routing_key": "q"})
    try:
        signals.task_prerun.send(sender=task, task_id="t1", task=task, args=(), kwargs={})
    finally:
        task.pop_request()


def test_start_of_retry_follows_late_signal(run):
    """If the next run starts before Celery signals the retry, its start is the last event."""
    run.receive("shop.again")
    run.trace("shop.again", during=lambda: start_retry(run))
    assert run.kinds == ["received", "started", "received", "retried", "started"]
    stamps = [event["occurred_at"] for event in run.events]
    assert stamps == sorted(stamps)
    seconds = [stamp[:19] for stamp in stamps]
    assert seconds[1] != seconds[4], "the brain drops the second start of a second"
    run.now += 5
    run.capture.repeated_runs.report_withheld()
    assert len(run.events) == 5


def test_start_of_retry_is_reported_after_a_second_without_signal(run):
    """If the signal of the retry is late by more than a second, the start is reported before it."""

    def backend_is_slow():
        start_retry(run)
        run.capture.repeated_runs.report_withheld()
        assert run.kinds == ["received", "started", "received"]
        run.now += 1.1
        run.capture.repeated_runs.report_withheld()

    run.receive("shop.again")
    run.trace("shop.again", during=backend_is_slow)
    assert run.kinds == ["received", "started", "received", "started", "retried"]


@OUTSIDE_BODY
@pytest.mark.parametrize("task", ["shop.add", "shop.fail", "shop.ignore", "shop.reject"])
def test_eager_runs_end(app, task):
    """Eager tasks end as tasks of a worker do, also where their errors propagate."""
    for propagates in (False, True):
        run = Run(app, EagerCapture)
        run.capture.connect()
        app.conf.task_eager_propagates = propagates
        try:
            app.tasks[task].apply(task_id="t1")
        except ValueError:
            assert propagates
        finally:
            run.capture.disconnect()
        end = {"add": "succeeded", "ignore": "revoked"}.get(task[5:], "failed")
        assert run.kinds == ["started", end]
        assert run.capture.task_states == {}


def test_unheard_start_is_counted_and_logged_once(app, run, backend, monkeypatch, caplog):
    """A task that the pool accepted a minute ago without a start is counted; one warning names it.

    Tasks that have just been accepted, that wait, or that have started are not counted.
    """

    def accepted(task_id, at):
        run.receive("shop.add", task_id)
        return SimpleNamespace(id=task_id, time_start=at)

    task = app.tasks["shop.add"]
    signalled = accepted("started", NOW - 70)
    signals.task_prerun.send(sender=task, task_id="started", task=task, args=(), kwargs={})
    active = [accepted("a", NOW - 70), accepted("b", NOW - 61), accepted("c", NOW - 5), signalled]
    active += [accepted("waits", None), SimpleNamespace(id="unknown", time_start=NOW - 99)]
    monkeypatch.setattr(state, "active_requests", active)
    capture = run.capture
    monitor = RunMonitor(capture.task_states, capture.repeated_runs, in_process=True)
    before = len(run.events)
    monitor.check(NOW, backend)
    monitor.check(NOW + 1, backend)
    assert monitor.unheard == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "shop.add[a]" in warnings[0]
    assert "task_prerun" in warnings[0]
    assert len(run.events) == before
